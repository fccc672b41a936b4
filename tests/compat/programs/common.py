"""What the programs share: leveret in place of aio-pika, and how they speak with their test."""

from __future__ import annotations

import asyncio
import os
import sys

import leveret.compat

leveret.compat.install()

URL = os.environ["AMQP_URL"]


async def cut(*connections: leveret.RobustConnection) -> None:
    """Have the test cut the connections; returns when those given are restored.

    Between the cut and the moment that a client learns of it, what it publishes ends as outcome unknown.
    """
    restored = [asyncio.Event() for _ in connections]
    for connection, event in zip(connections, restored, strict=True):
        connection.reconnect_callbacks.add(lambda _, event=event: event.set())
    print("CUT", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    async with asyncio.timeout(20):
        for event in restored:
            await event.wait()


async def settled(condition, seconds: float = 20) -> None:
    """Wait until *condition()* holds."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - of whatever kind the dependent's state is
            await asyncio.sleep(0.02)


def finish() -> None:
    """Nothing of the real aio-pika or aiormq was loaded."""
    files = [getattr(module, "__file__", None) or "" for module in sys.modules.values()]
    strangers = [file for file in files if "/site-packages/aio_pika/" in file or "/site-packages/aiormq/" in file]
    assert not strangers, strangers
    print("DONE", flush=True)
