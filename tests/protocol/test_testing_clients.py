"""Other clients on `leveret.testing.Broker`: pika, which blocks, and aio-pika, which does not."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from leveret.testing import Broker

if TYPE_CHECKING:
    from collections.abc import Iterator

pika: Any = pytest.importorskip("pika")


@pytest.fixture(params=["3.10", "4.0", "4.3"])
def broker(request: pytest.FixtureRequest) -> Iterator[Broker]:
    with Broker(version=request.param) as broker:
        yield broker


# ---------------------------------------------------------------------------------------------------------- pika


@pytest.fixture
def connection(broker: Broker) -> Iterator[Any]:
    connection = pika.BlockingConnection(pika.URLParameters(broker.url))
    yield connection
    with contextlib.suppress(pika.exceptions.AMQPConnectionError):
        connection.close()


@pytest.fixture
def channel(connection: Any) -> Any:
    return connection.channel()


def answer_for_ever(connection: Any) -> None:
    """Let pika hear what the broker says; an exception ends it."""
    while True:
        connection.process_data_events(time_limit=5)


def test_pika_publishes_with_confirms_and_consumes(channel: Any, broker: Broker) -> None:
    channel.confirm_delivery()
    channel.exchange_declare("logs", exchange_type="topic", durable=True)
    name = channel.queue_declare("", exclusive=True).method.queue
    channel.queue_bind(name, "logs", "order.#")
    properties = pika.BasicProperties(delivery_mode=2, headers={"n": 1}, message_id="m1")
    for number in range(3):
        channel.basic_publish("logs", "order.new", f"order {number}".encode(), properties, mandatory=True)
    bodies = []
    for method, found, body in channel.consume(name, inactivity_timeout=5):
        assert (found.headers, found.message_id, method.routing_key) == ({"n": 1}, "m1", "order.new")
        channel.basic_ack(method.delivery_tag)
        bodies.append(body)
        if len(bodies) == 3:
            break
    channel.cancel()
    assert bodies == [b"order 0", b"order 1", b"order 2"]
    assert channel.queue_declare(name, passive=True, exclusive=True).method.message_count == 0
    assert broker.queues[name].unacked == 0


def test_pika_is_told_what_has_no_route_and_what_is_refused(channel: Any, broker: Broker) -> None:
    channel.confirm_delivery()
    with pytest.raises(pika.exceptions.UnroutableError) as unroutable:
        channel.basic_publish("", "nobody", b"lost", mandatory=True)
    assert [returned.body for returned in unroutable.value.messages] == [b"lost"]
    channel.queue_declare("full", arguments={"x-max-length": 1, "x-overflow": "reject-publish"})
    channel.basic_publish("", "full", b"one")
    with pytest.raises(pika.exceptions.NackError):
        channel.basic_publish("", "full", b"two")
    assert list(broker.queues["full"].bodies) == [b"one"]


def test_pika_gets_nacks_and_dead_letters(channel: Any) -> None:
    channel.queue_declare("dead")
    channel.queue_declare(
        "work", arguments={"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "dead", "x-message-ttl": 60_000}
    )
    channel.basic_publish("", "work", b"job")
    method, _, _ = channel.basic_get("work")
    channel.basic_nack(method.delivery_tag, requeue=True)
    method, _, _ = channel.basic_get("work")
    assert method.redelivered
    channel.basic_reject(method.delivery_tag, requeue=False)
    method, properties, body = channel.basic_get("dead", auto_ack=True)
    assert (body, properties.headers["x-death"][0]["reason"]) == (b"job", "rejected")
    assert channel.basic_get("dead") == (None, None, None)


def test_pika_calls_by_direct_reply_to(connection: Any, channel: Any) -> None:
    channel.queue_declare("rpc", exclusive=True)
    answers = []
    channel.basic_consume("amq.rabbitmq.reply-to", lambda *found: answers.append(found[3]), auto_ack=True)

    def serve(server: Any, method: Any, properties: Any, body: bytes) -> None:
        server.basic_publish("", properties.reply_to, body.upper(), pika.BasicProperties(correlation_id="c"))
        server.basic_ack(method.delivery_tag)

    channel.basic_consume("rpc", serve)
    channel.basic_publish("", "rpc", b"question", pika.BasicProperties(reply_to="amq.rabbitmq.reply-to"))
    while not answers:
        connection.process_data_events(time_limit=5)
    assert answers == [b"QUESTION"]


def test_pika_sees_closed_channels_and_connections(connection: Any, channel: Any, broker: Broker) -> None:
    with pytest.raises(pika.exceptions.ChannelClosedByBroker) as missing:
        channel.queue_declare("nope", passive=True)
    assert missing.value.reply_code == 404
    assert missing.value.reply_text == "NOT_FOUND - no queue 'nope' in vhost '/'"
    again = connection.channel()
    again.queue_declare("q", durable=True)
    with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="inequivalent arg 'durable'"):
        again.queue_declare("q", durable=False)
    connection.channel()
    broker.close_connections("maintenance")
    with pytest.raises(pika.exceptions.ConnectionClosedByBroker, match="CONNECTION_FORCED - maintenance"):
        answer_for_ever(connection)


def test_pika_is_cancelled_with_the_queue_and_commits_transactions(connection: Any, channel: Any) -> None:
    channel.queue_declare("q")
    cancelled = []
    channel.add_on_cancel_callback(lambda frame: cancelled.append(frame.method.consumer_tag))
    tag = channel.basic_consume("q", lambda *_: None)
    other = connection.channel()
    other.queue_delete("q")
    while not cancelled:
        connection.process_data_events(time_limit=5)
    assert cancelled == [tag]
    other.tx_select()
    other.queue_declare("tx")
    other.basic_publish("", "tx", b"one")
    assert other.queue_declare("tx", passive=True).method.message_count == 0
    other.tx_commit()
    assert other.queue_declare("tx", passive=True).method.message_count == 1
    other.basic_publish("", "tx", b"two")
    other.tx_rollback()
    assert other.queue_purge("tx").method.message_count == 1


def test_pika_refuses_a_wrong_password(broker: Broker) -> None:
    parameters = pika.URLParameters(broker.url.replace("guest:guest", "guest:wrong"))
    with pytest.raises(pika.exceptions.ProbableAuthenticationError):
        pika.BlockingConnection(parameters)


# ------------------------------------------------------------------------------------------------------ aio-pika


async def test_aio_pika_publishes_consumes_and_calls(broker: Broker) -> None:
    aio_pika = pytest.importorskip("aio_pika")
    async with await aio_pika.connect_robust(broker.url) as connection:
        channel = await connection.channel(on_return_raises=True)
        await channel.set_qos(prefetch_count=2)
        exchange = await channel.declare_exchange("logs", aio_pika.ExchangeType.FANOUT)
        queue = await channel.declare_queue("work", durable=True)
        await queue.bind(exchange)
        for number in range(3):
            await exchange.publish(aio_pika.Message(str(number).encode(), headers={"n": number}), "")
        bodies = []
        async with queue.iterator(timeout=5) as messages:
            async for message in messages:
                async with message.process():
                    bodies.append((message.body, message.headers["n"]))
                if len(bodies) == 3:
                    break
        assert bodies == [(b"0", 0), (b"1", 1), (b"2", 2)]
        with pytest.raises(aio_pika.exceptions.DeliveryError):
            await channel.default_exchange.publish(aio_pika.Message(b"lost"), "nobody")
        with pytest.raises(aio_pika.exceptions.ChannelNotFoundEntity):
            await channel.declare_queue("nope", passive=True)


async def test_aio_pika_answers_calls_and_comes_back(broker: Broker) -> None:
    aio_pika = pytest.importorskip("aio_pika")
    patterns = pytest.importorskip("aio_pika.patterns")
    async with await aio_pika.connect_robust(broker.url, reconnect_interval=0.05) as connection:
        rpc = await patterns.RPC.create(await connection.channel())

        async def double(*, n: int) -> int:
            return 2 * n

        await rpc.register("double", double, auto_delete=True)
        assert await asyncio.wait_for(rpc.call("double", {"n": 21}), 5) == 42
        await rpc.close()
        channel = await connection.channel()
        queue = await channel.declare_queue("after", durable=True)
        reopened = asyncio.Event()
        connection.reconnect_callbacks.add(lambda *_: reopened.set())
        broker.drop_connections()
        await asyncio.wait_for(reopened.wait(), 5)
        await channel.default_exchange.publish(aio_pika.Message(b"still here"), "after", timeout=5)
        assert (await queue.get(timeout=5)).body == b"still here"
