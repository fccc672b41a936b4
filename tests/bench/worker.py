"""The process of one measurement: ``python -m tests.bench.worker LOOP CLIENT SCENARIO URL N SIZE``.

It prints its figures as one line of JSON, or ``null`` when the client cannot do such a thing.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import signal
import sys
from typing import TYPE_CHECKING

from tests.bench.scenarios import SCENARIOS, Job, Meter

if TYPE_CHECKING:
    from tests.bench.adapter import Adapter


def main(loop: str, client: str, scenario: str, url: str, n: str, size: str) -> None:
    """Run one scenario with one client."""
    signal.alarm(900)  # the end of it, even if whoever started it was killed: some clients reconnect for ever
    adapter: Adapter = importlib.import_module(f"tests.bench.clients.{client}").Client()
    run = SCENARIOS[scenario].run
    assert run is not None
    job, meter = Job(url, int(n), int(size)), Meter(int(n))
    loop_factory = importlib.import_module("uvloop").new_event_loop if loop == "uvloop" else None
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        try:
            runner.run(run(adapter, job, meter))  # type: ignore[arg-type]
        except NotImplementedError:
            print("null", flush=True)
        else:
            print(json.dumps(meter.figures), flush=True)
        os._exit(0)  # however the client would end its threads and connections


if __name__ == "__main__":
    main(*sys.argv[1:])
