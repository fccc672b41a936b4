"""The numbers on a real broker, over a lost link, and as Prometheus gets them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from leveret import Ack, IncomingMessage, Message, Reject, Requeue, ReturnedMessage
from leveret.metrics import Metrics
from leveret.prometheus import register
from tests.broker.test_helpers import eventually, fill
from tests.broker.test_robust import KEPT, lose

if TYPE_CHECKING:
    from leveret import Channel, Connection, Queue, RobustConnection
    from tests.support.proxy import FaultProxy


async def test_a_day_in_numbers(connection: Connection, channel: Channel, queue: Queue) -> None:
    metrics = Metrics()
    metrics.watch(connection)
    exchange = channel.default_exchange
    report = await exchange.publish_many([Message(b"%d" % i) for i in range(100)], queue.name)
    assert report
    assert isinstance(await exchange.publish(Message(b""), "nowhere"), ReturnedMessage)
    full = await channel.declare_queue(exclusive=True, arguments={"x-max-length": 0, "x-overflow": "reject-publish"})
    await asyncio.gather(exchange.publish(Message(b""), full.name), return_exceptions=True)
    found = metrics.snapshot()
    assert (found.published, found.confirmed, found.returned, found.nacked) == (102, 100, 1, 1)
    assert found.confirm_seconds.count == 102
    assert found.confirm_seconds.sum > 0

    async def callback(message: IncomingMessage) -> object:
        if message.body == b"7":
            return Reject
        if message.body == b"8" and not message.redelivered:
            return Requeue
        return Ack

    await queue.consume(callback)
    await eventually(lambda: metrics.snapshot().acked == 99)
    found = metrics.snapshot()
    assert (found.delivered, found.rejected, found.requeued) == (101, 1, 1)
    assert (found.handler_seconds.count, found.handlers_failed) == (101, 0)
    assert (found.in_flight, found.waiting, found.unconfirmed, found.unsent) == (0, 0, 0, 0)


async def test_counters_never_go_back_over_a_reconnect(robust: RobustConnection, link: FaultProxy, name: str) -> None:
    metrics = Metrics("orders")
    metrics.watch(robust)
    channel = await robust.channel()
    queue = await channel.declare_queue(name, arguments=KEPT)
    handled: list[bytes] = []

    async def callback(message: IncomingMessage) -> None:
        await message.ack()
        handled.append(message.body)

    await queue.consume(callback)
    await fill(channel, queue, [b"before"] * 10)
    await eventually(lambda: len(handled) == 10)
    before = metrics.snapshot()
    assert (before.published, before.confirmed, before.acked, before.reconnects) == (10, 10, 10, 0)
    await lose(link, robust)
    await fill(channel, queue, [b"after"] * 5)
    await eventually(lambda: handled.count(b"after") == 5)
    after = metrics.snapshot()
    assert (after.published, after.confirmed) == (15, 15)
    assert after.acked == after.delivered == len(handled) >= 15  # acks that the link died with come again
    assert (after.reconnects, after.connections, after.unknown) == (1, 1, 0)
    assert after.handler_seconds.count == len(handled)
    await robust.close()
    closed = metrics.snapshot()
    assert (closed.published, closed.acked, closed.connections) == (15, after.acked, 0)


async def test_everything_that_is_published_while_links_break_is_in_one_place(
    robust: RobustConnection, link: FaultProxy, name: str
) -> None:
    metrics = Metrics()
    metrics.watch(robust)
    channel = await robust.channel()
    queue = await channel.declare_queue(name, arguments=KEPT)
    outcomes: list[asyncio.Future[object]] = []
    for number in range(4):
        outcomes += [
            asyncio.ensure_future(
                channel.default_exchange.publish(Message(b"%d" % i), queue.name, retry_unknown=number % 2 == 0)
            )
            for i in range(200)
        ]
        await asyncio.sleep(0)  # they are on their way
        await lose(link, robust)
        found = metrics.snapshot()
        answered = found.confirmed + found.nacked + found.returned
        assert found.published == answered + found.unknown + found.resent + found.unconfirmed
    results = await asyncio.gather(*outcomes, return_exceptions=True)
    found = metrics.snapshot()
    assert found.unknown == sum(isinstance(each, Exception) for each in results)
    assert found.confirmed == len(outcomes) - found.unknown
    assert found.reconnects == 4
    assert found.unsent == found.unconfirmed == 0


async def test_prometheus_reads_from_a_thread_of_its_own(
    connection: Connection, channel: Channel, queue: Queue
) -> None:
    metrics, registry = Metrics("orders"), CollectorRegistry()
    metrics.watch(connection)
    register(metrics, registry=registry)
    await fill(channel, queue, [b""] * 3)
    label = {"connection": "orders"}

    async def has(name: str, value: float) -> bool:
        return await asyncio.to_thread(registry.get_sample_value, name, label) == value

    await eventually(lambda: has("leveret_messages_confirmed_total", 3))
    await eventually(lambda: has("leveret_confirm_seconds_count", 3))
    assert await has("leveret_connections_open", 1)
