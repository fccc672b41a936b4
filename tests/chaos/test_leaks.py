"""Reconnects and channels by the hundred and the thousand: nothing is left of them."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import ctypes
import gc
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from leveret import ExchangeType, Message, RobustConnection, connect, connect_robust
from tests.broker.test_helpers import eventually
from tests.support.proxy import FaultProxy

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from leveret import IncomingMessage
    from tests.support.node import Node

AT_A_TIME = 8
PAGE = os.sysconf("SC_PAGE_SIZE")
FLAT = 0.02
FLAT_SOON = 0.06
"""For memory where there is no time: the allocator takes some 300 reconnects to have all that it wants."""


class Usage(NamedTuple):
    """What this process has."""

    objects: int
    tasks: int
    files: int
    memory: int

    @classmethod
    def now(cls) -> Usage:
        gc.collect()
        with contextlib.suppress(AttributeError):  # glibc only
            ctypes.CDLL(None).malloc_trim(0)
        files = len(list(Path("/proc/self/fd").iterdir()))
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
        # A loop keeps up to a hundred timers that were cancelled, each with a context.
        objects = sum(not isinstance(each, asyncio.TimerHandle | contextvars.Context) for each in gc.get_objects())
        return cls(objects, len(asyncio.all_tasks()), files, resident)


@pytest.fixture(autouse=True)
def _few_logs(caplog: pytest.LogCaptureFixture) -> None:
    for logger in ("leveret", "asyncio"):  # pytest keeps every record, also of what was slow on a busy machine
        caplog.set_level(logging.ERROR, logger)


async def settled() -> Usage:
    for _ in range(10):  # let what is closed run its last callbacks
        await asyncio.sleep(0.01)
    return Usage.now()


async def stays_flat(
    rounds: int, warm_up: int, once: Callable[[], Awaitable[None]], *, memory: float = FLAT_SOON
) -> None:
    """Run *once* in *rounds*; after the first *warm_up*, nothing may grow, but *memory* by so little."""
    # A loop keeps timers that were cancelled for a while, and with debug on the traceback of each.
    asyncio.get_running_loop().set_debug(False)
    for _ in range(warm_up):
        await once()
    before = await settled()
    for _ in range(rounds):
        await once()
    after = await settled()
    print(f"{rounds} rounds after {warm_up} to warm up:", before, after, sep="\n")
    assert after.tasks <= before.tasks
    assert after.files <= before.files
    assert after.objects <= before.objects * (1 + FLAT)
    assert after.memory <= before.memory * (1 + memory)


@pytest.mark.one_version
async def test_reconnects(fragile: Node, chaos_minutes: float | None) -> None:
    received: set[bytes] = set()

    async def on_message(message: IncomingMessage) -> None:
        received.add(message.body)
        await message.ack()

    async def begin(connection: RobustConnection, number: int) -> None:
        channel = await connection.channel()
        await channel.set_qos(10)
        exchange = await channel.declare_exchange(f"leaks-{number}", ExchangeType.TOPIC, auto_delete=True)
        for name in (f"leaks-{number}", ""):
            queue = await channel.declare_queue(name, exclusive=not name)
            await queue.bind(exchange, "#")
            await queue.consume(on_message)

    async with FaultProxy("127.0.0.1", fragile.port) as proxy, contextlib.AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(await connect_robust(proxy.url)) for _ in range(AT_A_TIME)]
        for number, connection in enumerate(connections):
            await begin(connection, number)
        channels = [await connection.channel() for connection in connections]

        async def once() -> None:
            before = [connection.connection_attempt for connection in connections]
            proxy.rst()
            await eventually(
                lambda: all(c.connection_attempt > b for c, b in zip(connections, before, strict=True)), 30
            )
            received.clear()
            for number, channel in enumerate(channels):
                exchange = await channel.get_exchange(f"leaks-{number}", ensure=False)
                await exchange.publish(Message(b"%d" % number), "x", retry_unknown=True)
            await eventually(lambda: len(received) == AT_A_TIME)

        if chaos_minutes:
            await stays_flat(200 // AT_A_TIME, 320 // AT_A_TIME, once, memory=FLAT)
        else:
            await stays_flat(40 // AT_A_TIME, 5, once)


@pytest.mark.one_version
async def test_channels(fragile: Node, chaos_minutes: float | None) -> None:
    """Opened, used and closed; some by the broker, over a publish to nowhere."""
    count = 20_000 if chaos_minutes else 2_000
    async with await connect_robust(fragile.url) as connection:

        async def use() -> None:
            async with connection.channel() as channel:
                queue = await channel.declare_queue(exclusive=True)
                await channel.default_exchange.publish(Message(b"x"), queue.name)
                await queue.delete(if_empty=False)

        async def once() -> None:
            await asyncio.gather(*(use() for _ in range(20)))

        await stays_flat(count // 20, count // 100, once, memory=FLAT if chaos_minutes else FLAT_SOON)
        assert connection.health().status == "ready"


@pytest.mark.one_version
async def test_channels_of_a_plain_connection(fragile: Node, chaos_minutes: float | None) -> None:
    count = 20_000 if chaos_minutes else 2_000
    async with await connect(fragile.url) as connection:

        async def use() -> None:
            async with connection.channel() as channel:
                await channel.declare_queue(exclusive=True, auto_delete=True)
                await channel.default_exchange.publish(Message(b"x"), "nobody")

        async def once() -> None:
            await asyncio.gather(*(use() for _ in range(20)))

        await stays_flat(count // 20, count // 100, once, memory=FLAT if chaos_minutes else FLAT_SOON)
