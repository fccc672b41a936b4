"""What `consume()` can do besides calling back, on RabbitMQ: concurrency, verdicts, on_error, threads, ack_batch."""

from __future__ import annotations

import asyncio
import random
import threading
from typing import TYPE_CHECKING

import pytest

import leveret
from leveret import Ack, Channel, Connection, IncomingMessage, Nack, Queue, Reject, Requeue
from tests.broker.test_helpers import consumers, eventually, fill, holds

if TYPE_CHECKING:
    from leveret import RobustConnection
    from tests.support.proxy import FaultProxy


async def test_concurrency_bounds_what_runs_and_the_prefetch_what_is_here(channel: Channel, queue: Queue) -> None:
    running = most = done = 0
    go = asyncio.Event()

    async def callback(message: IncomingMessage) -> leveret.Verdict:
        nonlocal running, most, done
        running += 1
        most = max(most, running)
        await go.wait()
        running -= 1
        done += 1
        return Ack

    consumer = await queue.consume(callback, concurrency=3)
    await fill(channel, queue, [b""] * 20)
    await eventually(lambda: (consumer.in_flight, consumer.waiting) == (3, 3))
    await holds(channel, queue, 14)
    consumer.set_concurrency(5)
    await eventually(lambda: consumer.in_flight == 5)
    consumer.set_concurrency(2)
    go.set()
    await eventually(lambda: done == 20)
    assert most == 5
    await consumer.stop()
    await holds(channel, queue, 0)
    assert await consumers(channel, queue) == 0


async def test_verdicts_settle(channel: Channel, name: str) -> None:
    await channel.declare_queue(f"{name}-dead", exclusive=True)
    arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": f"{name}-dead"}
    queue = await channel.declare_queue(name, exclusive=True, arguments=arguments)
    seen: list[tuple[bytes, bool]] = []
    verdicts = {b"ack": Ack, b"nack": Nack, b"reject": Reject, b"requeue": Requeue}

    async def callback(message: IncomingMessage) -> leveret.Verdict:
        seen.append((message.body, bool(message.redelivered)))
        return Ack if message.redelivered else verdicts[message.body]

    consumer = await queue.consume(callback)
    await fill(channel, queue, verdicts)
    await eventually(lambda: len(seen) == 6)
    assert sorted(seen) == sorted([(body, False) for body in verdicts] + [(b"nack", True), (b"requeue", True)])
    await consumer.stop()
    await holds(channel, queue, 0)
    await holds(channel, f"{name}-dead", 1)


@pytest.mark.expects_errors
async def test_on_error(channel: Channel, queue: Queue) -> None:
    tries: dict[bytes, int] = {}

    async def callback(message: IncomingMessage) -> leveret.Verdict:
        tries[message.body] = tries.get(message.body, 0) + 1
        if tries[message.body] < 3:
            raise LookupError(message.body)
        return Ack

    def decide(message: IncomingMessage, error: BaseException) -> leveret.Verdict:
        assert isinstance(error, LookupError)
        return Reject if message.body == b"poison" else Requeue

    consumer = await queue.consume(callback, on_error=decide)
    await fill(channel, queue, [b"good", b"poison"])
    await eventually(lambda: tries.get(b"good") == 3 and tries.get(b"poison"))
    await consumer.stop()
    await holds(channel, queue, 0)
    assert tries == {b"good": 3, b"poison": 1}
    assert consumer.failed == 3


@pytest.mark.expects_errors
async def test_health_tells_that_failures_fill_the_prefetch(connection: Connection, queue: Queue) -> None:
    def callback(message: IncomingMessage) -> None:
        raise LookupError

    async with connection.channel() as other:
        consumer = await (await other.get_queue(queue.name)).consume(callback, prefetch=3)
        await fill(other, queue, [b""] * 4)
        await eventually(lambda: consumer.failed == 3)
        health = connection.health()
        assert health.status == "degraded"
        assert str(consumer) in health.reasons[0]
    assert connection.health()


async def test_threads_do_not_hold_up_the_loop_and_settle_by_what_they_return(channel: Channel, queue: Queue) -> None:
    together = threading.Barrier(3)
    threads: list[int] = []

    def callback(message: IncomingMessage) -> leveret.Verdict:
        together.wait(10)
        threads.append(threading.get_ident())
        return Ack

    consumer = await queue.consume(callback, thread=True, concurrency=3)
    await fill(channel, queue, [b""] * 30)
    await eventually(lambda: len(threads) == 30 and not channel.handler_tasks)
    assert threading.get_ident() not in threads
    assert len(set(threads)) >= 3
    await consumer.stop()
    await holds(channel, queue, 0)


@pytest.mark.parametrize("ack_batch", [2, 10, 100])
async def test_batches_of_acks_lose_none(
    connection: Connection, channel: Channel, queue: Queue, ack_batch: int
) -> None:
    rng = random.Random(ack_batch)
    left: list[bytes] = []

    async def callback(message: IncomingMessage) -> leveret.Verdict | None:
        if rng.random() < 0.5:
            await asyncio.sleep(rng.random() / 500)
        if message.body == b"left":
            left.append(message.body)
            return None
        return Ack

    async with connection.channel() as other:
        own = await other.get_queue(queue.name)
        consumer = await own.consume(callback, ack_batch=ack_batch, prefetch=100)
        await fill(channel, queue, [*[b"%d" % n for n in range(500)], b"left", *[b""] * 20])
        await eventually(lambda: consumer.delivered == 521 and not consumer.waiting and not consumer.in_flight)
        await consumer.stop()
        await other.get_queue(queue.name)  # no 406
    assert left == [b"left"]
    await holds(channel, queue, 1)


async def test_options_outlive_a_reconnect(robust: RobustConnection, link: FaultProxy, name: str) -> None:
    channel = await robust.channel()
    queue = await channel.declare_queue(name, durable=True)
    running = most = 0
    seen: list[bytes] = []

    async def callback(message: IncomingMessage) -> leveret.Verdict:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        seen.append(message.body)
        return Ack

    try:
        consumer = await queue.consume(callback, concurrency=2, ack_batch=4)
        await fill(channel, queue, [b"1"] * 10)
        await eventually(lambda: len(seen) >= 10)
        attempt = robust.connection_attempt
        link.rst()
        await eventually(lambda: robust.connection_attempt > attempt)
        await fill(channel, queue, [b"2"] * 10)
        await eventually(lambda: seen.count(b"2") == 10)
        assert consumer.is_active
        assert most == 2
        await consumer.stop()
        await holds(channel, queue, 0)
    finally:
        await queue.delete(if_unused=False, if_empty=False)
