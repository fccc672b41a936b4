"""Consumers without a prefetch: what they hold is bounded, the link lives, and nothing comes to a standstill."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from leveret import Connection, IncomingMessage, Message, connect, connect_robust
from leveret.wire import intake
from tests.broker.test_helpers import eventually, holds

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from leveret import Channel, Queue
    from tests.support.brokers import TLSAuthority
    from tests.support.node import Node

SIZE = 1024
MANY = 40_000
"""As many as would take four times half the real high-water mark."""


def resident() -> int:
    """Bytes of memory that this process has."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


@pytest.fixture
async def channel(amqp_url: str) -> AsyncIterator[Channel]:
    asyncio.get_running_loop().set_debug(False)  # a stack for each task would take time and memory
    async with await connect(amqp_url) as connection, connection.channel(publisher_confirms=False) as channel:
        yield channel


async def fill(channel: Channel, name: str, count: int) -> Queue:
    """A queue with so many messages of SIZE bytes."""
    queue = await channel.declare_queue(name, auto_delete=False)
    message = Message(bytes(SIZE))
    for _ in range(0, count, 500):
        for _ in range(500):
            await channel.default_exchange.publish(message, name)
        await asyncio.sleep(0)
    await holds(channel, queue, count)
    return queue


@pytest.fixture
def marks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The high-water mark, made smaller to save the tests' time: MiB."""
    high: int = request.param * 1024 * 1024
    monkeypatch.setattr(intake, "HIGH", high)
    monkeypatch.setattr(intake, "LOW", high // 2)
    return high


def throttled(connection: Connection) -> Any:
    """The connection's intake; see :mod:`leveret.wire.intake`."""
    return connection._transport.intake  # type: ignore[union-attr]


@pytest.mark.parametrize("marks", [32], indirect=True)
async def test_waiting_handlers_hold_a_bounded_part_of_a_long_queue(
    amqp_url: str, channel: Channel, name: str, marks: int
) -> None:
    """The link outlives two heartbeat intervals, a handler's publish is confirmed, and in the end all is received."""
    await fill(channel, name, MANY)
    gc.collect()
    before = resident()
    go, published, count = asyncio.Event(), asyncio.Event(), 0
    async with await connect(f"{amqp_url}?heartbeat=1") as connection:
        consuming = await connection.channel()
        replies = await consuming.declare_queue(exclusive=True)

        async def handle(message: IncomingMessage) -> None:
            nonlocal count
            if message.delivery_tag == 1:
                await eventually(lambda: throttled(connection).is_throttled)
                await consuming.default_exchange.publish(Message(b"from a handler"), replies.name)
                published.set()
            await go.wait()
            count += 1
            await message.ack()

        await (await consuming.get_queue(name)).consume(handle)
        async with asyncio.timeout(10):
            await published.wait()
        await beats(connection, 5)
        health = connection.health()
        assert not connection.is_closed
        assert health.status == "degraded"
        assert "reading is throttled" in health.reasons[0]
        # The confirm came behind what two kernels had taken from the broker by then: some 6 MB, with tasks 20.
        assert throttled(connection)._measure() < 2.5 * marks
        assert resident() - before < 3 * marks
        go.set()
        await eventually(lambda: count >= MANY, 30)
        assert not throttled(connection).is_throttled
        assert connection.health().status == "ready"
        assert len((await replies.get()).body) == len(b"from a handler")
    await holds(channel, await channel.get_queue(name), 0)
    await channel.queue_delete(name)


async def beats(connection: Connection, count: int) -> None:
    """Wait until the transport has looked so often whether the peer lives: every half interval."""
    transport: Any = connection._transport
    for _ in range(count):
        due = transport._beat_due
        await eventually(lambda due=due: transport._beat_due != due or connection.is_closed)


@pytest.mark.parametrize("marks", [4], indirect=True)
@pytest.mark.parametrize("robust", [False, True])
async def test_an_iterator_that_nobody_asks_holds_a_bounded_part(
    amqp_url: str, channel: Channel, name: str, robust: bool, marks: int
) -> None:
    count = 10_000
    await fill(channel, name, count)
    async with await (connect_robust if robust else connect)(amqp_url) as connection:
        consuming = await connection.channel()
        async with (await consuming.get_queue(name)).iterator(no_ack=True) as messages:
            await eventually(lambda: throttled(connection).is_throttled)
            assert throttled(connection)._count() < 6_000
            await consuming.declare_queue(exclusive=True)  # a call is answered, behind what was on its way
            assert len([await anext(messages) for _ in range(count)]) == count
    await channel.queue_delete(name)


@pytest.mark.parametrize("marks", [4], indirect=True)
async def test_an_idle_consumer_gets_what_a_handler_waits_for(
    amqp_url: str, channel: Channel, name: str, marks: int
) -> None:
    """As the reply to a remote call, whose consumer is on the same connection."""
    await fill(channel, name, 1500)
    got: asyncio.Queue[IncomingMessage] = asyncio.Queue()
    go, count = asyncio.Event(), 0
    async with await connect(amqp_url) as connection:
        consuming = await connection.channel()
        replies = await consuming.declare_queue(exclusive=True)

        async def handle(message: IncomingMessage) -> None:
            nonlocal count
            await go.wait()
            count += 1

        await replies.consume(got.put, no_ack=True)
        await (await consuming.get_queue(name)).consume(handle, no_ack=True)
        await eventually(lambda: throttled(connection).is_throttled)
        await channel.default_exchange.publish(Message(b"reply"), replies.name)
        async with asyncio.timeout(10):
            assert (await got.get()).body == b"reply"
        go.set()
        await eventually(lambda: count == 1500)
    await channel.queue_delete(name)


@pytest.mark.parametrize("marks", [4], indirect=True)
async def test_a_throttled_connection_is_closed_in_time(amqp_url: str, channel: Channel, name: str, marks: int) -> None:
    queue = await fill(channel, name, 5_000)
    connection = await connect(amqp_url)
    consuming = await connection.channel()

    async def handle(message: IncomingMessage) -> None:
        await asyncio.get_running_loop().create_future()

    await (await consuming.get_queue(name)).consume(handle)
    await eventually(lambda: throttled(connection).is_throttled)
    async with asyncio.timeout(3):
        await connection.close()
    await holds(channel, queue, 5_000)
    await channel.queue_delete(name)


@pytest.mark.node
@pytest.mark.parametrize("marks", [4], indirect=True)
async def test_tls_is_throttled_too(
    broker: Node, tls_authority: TLSAuthority, channel: Channel, name: str, marks: int
) -> None:
    """The layer in between has buffers of its own."""
    count = 8_000
    await fill(channel, name, count)
    async with await connect(broker.tls_url, ssl_context=tls_authority.client_context()) as connection:
        consuming = await connection.channel()
        async with (await consuming.get_queue(name)).iterator(no_ack=True) as messages:
            await eventually(lambda: throttled(connection).is_throttled)
            assert throttled(connection)._count() < 6_000
            await consuming.declare_queue(exclusive=True)
            assert len([await anext(messages) for _ in range(count)]) == count
    await channel.queue_delete(name)
