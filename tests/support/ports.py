"""Port numbers for the servers that tests start."""

from __future__ import annotations

import itertools
import os
import random
import socket


def own_range() -> range:
    """The numbers for this process: each one that pytest-xdist starts has a share of its own.

    So none gives away the port of a server that another one has stopped, and will start again.
    """
    ports = range(12_000, 32_000)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    share = len(ports) // workers
    return ports[worker % workers * share :][:share]  # one that takes the place of a crashed one has a new number


_PORTS = itertools.cycle(random.sample(own_range(), len(own_range())))  # none twice, before all have had their turn


def free_port() -> int:
    """A loopback port that nobody listens on, below the range that the kernel hands to outgoing connections.

    A server of a test goes away and comes back on its port. From the kernel's own range, a client that keeps trying
    could be given that very port meanwhile, take it away from the server, or even connect to itself.
    """
    while True:
        port = next(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
