"""Many messages at a time: every one has its outcome, and the iterable goes no faster than the broker."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from leveret import Channel, Connection, Message, RobustConnection, connect
from leveret.exceptions import (
    ChannelNotFoundEntity,
    ConnectionBlocked,
    MessageNacked,
    MessageReturned,
    PublishNotSent,
    PublishOutcomeUnknown,
)
from tests.broker.test_blocked import block, memory_alarm
from tests.broker.test_helpers import drain, eventually, holds
from tests.broker.test_robust import kept_queue

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from leveret import Queue
    from tests.support.node import Node
    from tests.support.proxy import FaultProxy


def numbered(count: int) -> list[Message]:
    return [Message(b"%d" % i) for i in range(count)]


async def test_thousands_arrive_in_their_order(channel: Channel, queue: Queue) -> None:
    source = (Message(b"%d" % i) for i in range(5000))
    report = await channel.default_exchange.publish_many(source, queue.name, window=300)
    assert (report.total, report.confirmed, report.failures) == (5000, 5000, [])
    await holds(channel, queue, 5000)
    taken: list[bytes] = []
    done = asyncio.Event()

    async def take(message: Message) -> None:
        taken.append(message.body)
        if len(taken) == 5000:
            done.set()

    await queue.consume(take, no_ack=True)
    await asyncio.wait_for(done.wait(), 20)
    assert taken == [b"%d" % i for i in range(5000)]


async def test_the_unroutable_and_the_refused_are_named(channel: Channel, name: str) -> None:
    full = await channel.declare_queue(exclusive=True, arguments={"x-max-length": 2, "x-overflow": "reject-publish"})
    message = Message(b"same")
    keys = [full.name, name, full.name, name, full.name, full.name]
    report = await channel.default_exchange.publish_many([(message, key) for key in keys], window=1)
    assert [(failure.index, type(failure.error)) for failure in report.failures] == [
        (1, MessageReturned),
        (3, MessageReturned),
        (4, MessageNacked),
        (5, MessageNacked),
    ]
    assert report.confirmed == 2
    assert await drain(full) == [b"same", b"same"]


async def test_returns_among_many(channel: Channel, queue: Queue, name: str) -> None:
    keys = [name if i % 7 == 3 else queue.name for i in range(2000)]
    report = await channel.default_exchange.publish_many((Message(b"x"), key) for key in keys)
    assert [failure.index for failure in report.returned] == [i for i in range(2000) if i % 7 == 3]
    assert report.confirmed == 2000 - len(report.failures)


async def test_a_quorum_queue_and_large_bodies(channel: Channel, name: str) -> None:
    queue = await channel.declare_queue(name, durable=True, arguments={"x-queue-type": "quorum", "x-expires": 60_000})
    sizes = [3_000_000, 10, 0, 300_000, 1]
    source = [Message(bytes(size), delivery_mode=2) for size in sizes]
    report = await channel.default_exchange.publish_many(source, name, window_bytes=1_000_000)
    assert report.confirmed == 5
    assert [len(body) for body in await drain(queue)] == sizes
    await queue.delete(if_unused=False, if_empty=False)


async def test_one_channel_is_enough_for_many_publishers(channel: Channel, queue: Queue) -> None:
    exchange = channel.default_exchange
    many = [exchange.publish_many((Message(b"%d" % i) for i in range(300)), queue.name, window=7) for _ in range(10)]
    one = [exchange.publish(Message(b"one"), queue.name) for _ in range(300)]
    reports = await asyncio.gather(*many)
    await asyncio.gather(*one)
    assert [report.confirmed for report in reports] == [300] * 10
    await holds(channel, queue, 3300)


async def test_an_endless_generator_that_is_cancelled(channel: Channel, queue: Queue) -> None:
    taken = 0
    closed = asyncio.Event()

    async def endless() -> AsyncIterator[Message]:
        nonlocal taken
        try:
            while True:
                taken += 1
                yield Message(b"")
        finally:
            closed.set()

    task = asyncio.create_task(channel.default_exchange.publish_many(endless(), queue.name, window=50))
    await eventually(lambda: taken > 200)
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    assert closed.is_set()
    assert await channel.default_exchange.publish_many(numbered(3), queue.name)
    await holds(channel, queue, taken + 3)


async def test_a_missing_exchange(connection: Connection, name: str) -> None:
    channel = await connection.channel()
    exchange = await channel.get_exchange(name, ensure=False)
    report = await exchange.publish_many(numbered(100), "key", window=10)
    assert (report.total, report.confirmed) == (100, 0)
    unknown = [failure.error for failure in report.failures if isinstance(failure.error, PublishOutcomeUnknown)]
    assert len(unknown) == 10
    assert isinstance(unknown[0].__cause__, ChannelNotFoundEntity)
    assert all(isinstance(failure.error, PublishNotSent) for failure in report.failures[10:])
    assert report.stopped_by is not None


async def test_without_confirms(connection: Connection, queue: Queue) -> None:
    async with connection.channel(publisher_confirms=False) as channel:
        report = await channel.default_exchange.publish_many(numbered(2000), queue.name)
        assert (report.total, report.confirmed, bool(report)) == (2000, 0, True)
        await holds(channel, queue, 2000)


async def test_in_a_transaction(connection: Connection, queue: Queue) -> None:
    async with connection.channel(publisher_confirms=False) as channel:
        async with channel.transaction():
            assert await channel.default_exchange.publish_many(numbered(10), queue.name)
        await holds(channel, queue, 10)


async def test_blocked(shaky: Node) -> None:
    async with await connect(shaky.url) as connection, connection.channel() as channel:
        queue = await channel.declare_queue(exclusive=True)
        exchange = channel.default_exchange
        async with memory_alarm(shaky):
            first = await block(connection, channel, queue.name)
            with pytest.raises(ConnectionBlocked, match="low on memory"):
                _ = exchange.publish_nowait(Message(b""), queue.name)
            report = await exchange.publish_many(numbered(5), queue.name, timeout=0.1)
            assert [type(failure.error) for failure in report.failures] == [ConnectionBlocked] * 5
            task = asyncio.create_task(exchange.publish_many(numbered(50), queue.name, window=20))
            await asyncio.sleep(0)
        assert (await asyncio.wait_for(task, 10)).confirmed == 50
        await first
        await exchange.publish_nowait(Message(b""), queue.name)
        await holds(channel, queue, 52)


@pytest.mark.parametrize("retry", [False, True])
async def test_the_link_is_cut_in_the_middle(
    link: FaultProxy, robust: RobustConnection, channel: Channel, name: str, retry: bool
) -> None:
    """Confirmed is there; what failed is known; with *retry_unknown* all are there, some perhaps twice."""
    mine = await robust.channel()
    await kept_queue(mine, name)

    def source() -> Iterator[Message]:
        for i in range(600):
            if i in (200, 400):
                link.rst()
            yield Message(b"%d" % i)

    report = await asyncio.wait_for(
        mine.default_exchange.publish_many(source(), name, window=100, retry_unknown=retry), 20
    )
    assert report.total == 600
    assert {type(failure.error) for failure in report.failures} <= {PublishOutcomeUnknown}
    assert report.stopped_by is None
    failed = {failure.index for failure in report.failures}
    assert report.confirmed == 600 - len(failed)
    assert not (retry and failed)
    there = {int(body) for body in await drain(await channel.get_queue(name))}
    assert there | failed == set(range(600))
