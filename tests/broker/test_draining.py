"""Draining on RabbitMQ: what ends in time is done once, and what does not comes again."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from typing import TYPE_CHECKING

import pytest

import leveret
from leveret import Ack, Channel, DrainReport, IncomingMessage, Message, Queue, connect, connect_robust
from tests.broker.test_helpers import consumers, drain, eventually, fill, holds

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from leveret import RobustConnection
    from tests.support.proxy import FaultProxy


@pytest.fixture
async def shared(channel: Channel, name: str) -> AsyncIterator[Queue]:
    """A queue that several connections consume."""
    queue = await channel.declare_queue(name, durable=True)
    yield queue
    await channel.queue_delete(name)


@pytest.mark.parametrize(
    ("kind", "queue_type", "total"),
    [("callbacks", "classic", 300), ("callbacks", "quorum", 1000), ("iterators", "classic", 200)],
)
async def test_messages_over_restarts_without_a_duplicate(
    amqp_url: str, channel: Channel, name: str, kind: str, queue_type: str, total: int
) -> None:
    """Consumers are restarted in the middle of their work, again and again; each message is handled once."""
    rng = random.Random(17)
    handled: Counter[bytes] = Counter()
    enough = asyncio.Event()

    async def handle(message: IncomingMessage) -> leveret.Verdict:
        handled[message.body] += 1
        await asyncio.sleep(rng.random() / 50)
        if len(handled) >= goal:
            enough.set()
        return Ack

    async def iterate(queue: Queue) -> None:
        async with queue.iterator(prefetch=10) as messages:
            async for message in messages:
                await handle(message)
                await message.ack()

    arguments = {"x-queue-type": queue_type}
    shared = await channel.declare_queue(name, durable=True, arguments=arguments)
    try:
        await fill(channel, shared, [b"%d" % n for n in range(total)])
        report = DrainReport()
        rounds = 0
        while len(handled) < total:
            rounds += 1
            goal = min(total, len(handled) + total // 5)
            enough.clear()
            connection = await connect_robust(amqp_url)
            mine = await connection.channel()
            queue = await mine.get_queue(name)
            workers: list[asyncio.Task[None]] = []
            if kind == "callbacks":
                await queue.consume(handle, prefetch=1000, concurrency=total // 10, ack_batch=20)
            else:
                workers = [asyncio.create_task(iterate(queue)) for _ in range(20)]
            await asyncio.wait_for(enough.wait(), 30)
            report += await connection.close(drain=10)
            await asyncio.gather(*workers)
        assert rounds >= 4
        assert report.abandoned == 0
        assert report.drained > 0
        assert report.requeued > 0
        assert handled == Counter({b"%d" % n: 1 for n in range(total)})
        await holds(channel, name, 0)
    finally:
        await channel.queue_delete(name)


async def test_a_thousand_in_flight_end_and_are_acknowledged(amqp_url: str, channel: Channel, shared: Queue) -> None:
    go = asyncio.Event()

    async def handle(message: IncomingMessage) -> leveret.Verdict:
        await go.wait()
        return Ack

    await fill(channel, shared, [b""] * 1200)
    connection = await connect(amqp_url)
    mine = await connection.channel()
    consumer = await (await mine.get_queue(shared.name)).consume(handle, prefetch=1100, concurrency=1000)
    await eventually(lambda: consumer.in_flight == 1000 and consumer.waiting == 100)
    closing = asyncio.create_task(connection.close(drain=60))
    await holds(channel, shared, 200)
    go.set()
    assert await closing == DrainReport(drained=1000, requeued=100)
    await holds(channel, shared, 200)
    assert await consumers(channel, shared) == 0


async def test_at_the_deadline_it_comes_again(amqp_url: str, channel: Channel, shared: Queue) -> None:
    began = asyncio.Event()

    async def handle(message: IncomingMessage) -> None:
        async with message.process():
            began.set()
            await asyncio.Event().wait()

    connection = await connect(amqp_url)
    mine = await connection.channel()
    await (await mine.get_queue(shared.name)).consume(handle)
    await fill(channel, shared, [b"1"])
    await asyncio.wait_for(began.wait(), 10)
    assert await connection.close(drain=0.1) == DrainReport(requeued=1)
    await holds(channel, shared, 1)


async def test_handlers_publish_to_the_end_and_all_is_confirmed(
    amqp_url: str, channel: Channel, shared: Queue, queue: Queue
) -> None:
    go = asyncio.Event()

    async def handle(message: IncomingMessage) -> leveret.Verdict:
        await go.wait()
        await mine.default_exchange.publish(Message(message.body), queue.name)
        await mine.declare_queue(shared.name + "-other", auto_delete=True)
        _ = mine.default_exchange.publish(Message(message.body), queue.name)
        return Ack

    connection = await connect_robust(amqp_url)
    mine = await connection.channel()
    consumer = await (await mine.get_queue(shared.name)).consume(handle)
    await fill(channel, shared, [b"%d" % n for n in range(50)])
    await eventually(lambda: consumer.in_flight == 50)
    closing = asyncio.create_task(connection.close(drain=60))
    await eventually(lambda: not consumer.is_active)
    go.set()
    assert await closing == DrainReport(drained=50)
    await holds(channel, queue, 100)
    await holds(channel, shared, 0)
    await channel.queue_delete(shared.name + "-other")
    assert Counter(await drain(queue)) == Counter({b"%d" % n: 2 for n in range(50)})


async def test_one_consumer_stops_and_the_other_goes_on(channel: Channel, queue: Queue) -> None:
    seen: list[str | None] = []

    async def handle(message: IncomingMessage) -> leveret.Verdict:
        await asyncio.sleep(0)
        seen.append(message.consumer_tag)
        return Ack

    one = await queue.consume(handle, prefetch=5)
    two = await queue.consume(handle, prefetch=5)
    await fill(channel, queue, [b""] * 50)
    report = await one.stop()
    assert report.abandoned == 0
    so_far = seen.count(one)
    await fill(channel, queue, [b""] * 50)
    await eventually(lambda: len(seen) == 100)
    assert seen.count(one) == so_far
    assert two.is_active
    assert not one.is_active
    await holds(channel, queue, 0)


async def test_the_link_is_lost_while_it_drains(
    robust: RobustConnection, link: FaultProxy, channel: Channel, shared: Queue
) -> None:
    began = asyncio.Event()

    async def handle(message: IncomingMessage) -> None:
        began.set()
        await asyncio.Event().wait()

    mine = await robust.channel()
    consumer = await (await mine.get_queue(shared.name)).consume(handle)
    await fill(channel, shared, [b"1"])
    await asyncio.wait_for(began.wait(), 10)
    stopping = asyncio.create_task(consumer.stop(60))
    await eventually(lambda: not mine.is_subscribed(consumer._running))
    link.rst()
    assert await asyncio.wait_for(stopping, 10) == DrainReport(requeued=1)
    await holds(channel, shared, 1)
    await robust.ready()
    assert await consumers(channel, shared) == 0


async def test_a_signal_ends_a_service(amqp_url: str, channel: Channel, shared: Queue) -> None:
    began, go = asyncio.Event(), asyncio.Event()

    async def handle(message: IncomingMessage) -> leveret.Verdict:
        began.set()
        await go.wait()
        return Ack

    connection = await connect_robust(amqp_url)
    mine = await connection.channel()
    await (await mine.get_queue(shared.name)).consume(handle, concurrency=1)
    await fill(channel, shared, [b"1", b"2"])
    running = asyncio.create_task(leveret.run_until_signalled(connection, drain=30))
    await asyncio.wait_for(began.wait(), 10)
    os.kill(os.getpid(), signal.SIGTERM)
    await holds(channel, shared, 1)
    go.set()
    report = await running
    assert (report.drained, report.abandoned) == (1, 0)
    assert connection.is_closed
    await holds(channel, shared, 1)
