"""The benchmark: what a message costs in leveret and in other clients, side by side.

::

    python -m tests.bench --clients leveret,aio_pika,pika --scenarios pub,con_cb100 --sizes 16,1024

`docs/performance.md` says what each scenario is, how to read the figures, and the command behind each of its tables.

The figure is CPU time (user and system) of the *client's* process per message. It is what a client can be blamed for,
and it holds on a busy machine, where throughput does not. Every measurement is a process of its own; a repetition runs
all clients one after the other, so that a drift of the machine hits them alike, and a ratio is the median of the ratios
within the repetitions.

========================  =============================================================================
`__main__.py`             the command line: what to run, in which order
`report.py`               the table
`brokers.py`              what is measured against, and what has to be there before a scenario begins
`peers.py`                the clients: a virtual environment for each, or a compiler for those in C
`worker.py`               the process of one measurement
`scenarios.py`            what is measured
`clients/`                an adapter for each client; `adapter.py` says what it has to have
`sink.c`                  the null sink
========================  =============================================================================

`worker.py`, `scenarios.py` and `clients/` run in the clients' environments: they import the client, each other, and
the standard library.
"""
