"""Exchanges, queues and bindings: every kind, every flag, every refusal."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from typing import TYPE_CHECKING, Any

import pytest
from pamqp import commands

from leveret import Channel, Connection, ExchangeType, Message, ReturnedMessage, connect
from leveret.exceptions import (
    ChannelAccessRefused,
    ChannelClosed,
    ChannelInvalidStateError,
    ChannelLockedResource,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    MessageTooLarge,
)
from tests.broker.test_helpers import drain, eventually, fill, holds

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.support.node import Node


# -------------------------------------------------------------------------------------------------- exchanges

ROUTES: list[tuple[ExchangeType, str, dict[str, Any], dict[str, bool]]] = [
    (ExchangeType.DIRECT, "red", {}, {"red": True, "blue": False}),
    (ExchangeType.FANOUT, "", {}, {"red": True, "blue": True}),
    (ExchangeType.TOPIC, "*.err.#", {}, {"a.err": True, "a.err.b.c": True, "err": False}),
    (ExchangeType.HEADERS, "", {"x-match": "all", "red": 1, "big": True}, {"red": True, "blue": False}),
]


@pytest.mark.parametrize(("kind", "binding", "arguments", "expected"), ROUTES, ids=[r[0].value for r in ROUTES])
async def test_exchange_types_route(
    channel: Channel, name: str, kind: ExchangeType, binding: str, arguments: dict[str, Any], expected: dict[str, bool]
) -> None:
    exchange = await channel.declare_exchange(name, kind, auto_delete=True)
    queue = await channel.declare_queue(exclusive=True)
    assert isinstance(await queue.bind(exchange, binding, arguments=arguments), commands.Queue.BindOk)
    for key, routed in expected.items():
        result = await exchange.publish(Message(key.encode(), headers={key: 1, "big": True}), key)
        assert isinstance(result, ReturnedMessage) is not routed, key
    assert await drain(queue) == [key.encode() for key, routed in expected.items() if routed]
    assert isinstance(await queue.unbind(exchange, binding, arguments=arguments), commands.Queue.UnbindOk)


async def test_exchange_type_as_a_string(channel: Channel, name: str) -> None:
    exchange = await channel.declare_exchange(name, "topic")
    assert exchange.type == "topic"
    assert isinstance(await exchange.delete(), commands.Exchange.DeleteOk)


@pytest.mark.node
@pytest.mark.rabbitmq("has plugins")
async def test_exchange_types_of_plugins_route(broker: Node, name: str) -> None:
    kinds = [ExchangeType.X_CONSISTENT_HASH, ExchangeType.X_MODULUS_HASH]
    if broker.version_info >= (4, 0):
        kinds.append(ExchangeType.X_LOCAL_RANDOM)
    async with await connect(broker.url) as connection, connection.channel() as channel:
        for kind in kinds:
            exchange = await channel.declare_exchange(f"{name}-{kind.value}", kind)
            queues = [await channel.declare_queue(exclusive=True) for _ in range(2)]
            for queue in queues:
                await queue.bind(exchange, "1" if kind is ExchangeType.X_CONSISTENT_HASH else "")
            await asyncio.gather(*[exchange.publish(Message(b"%d" % i), str(i)) for i in range(40)])
            shares = [await drain(queue) for queue in queues]
            assert sorted(itertools.chain(*shares), key=int) == [b"%d" % i for i in range(40)]
            assert all(shares), f"{kind} used one queue only"


@pytest.mark.node
async def test_unknown_exchange_type_is_refused(broker: Node, name: str) -> None:
    async with await connect(broker.url) as connection, connection.channel() as channel:
        with pytest.raises((ChannelPreconditionFailed, ConnectionError), match="unknown exchange type") as caught:
            await channel.declare_exchange(name, "nosuch")
        if broker.version_info >= (4, 0):
            assert isinstance(caught.value, ChannelPreconditionFailed)
            assert not connection.is_closed
        else:  # 3.10 closes the connection
            assert getattr(caught.value, "reply_code", None) == 503


async def test_exchange_to_exchange_binding(channel: Channel, name: str) -> None:
    source = await channel.declare_exchange(f"{name}-source", "topic")
    target = await channel.declare_exchange(f"{name}-target", "fanout")
    queue = await channel.declare_queue(exclusive=True)
    await queue.bind(target)
    assert isinstance(await target.bind(source, "a.#"), commands.Exchange.BindOk)
    await source.publish(Message(b"1"), "a.b")
    assert isinstance(await target.unbind(source.name, "a.#"), commands.Exchange.UnbindOk)
    await source.publish(Message(b"2"), "a.b")
    await target.bind(source.name, "a.#")
    await source.publish(Message(b"3"), "a.b")
    assert await drain(queue) == [b"1", b"3"]
    await source.delete()
    await target.delete()


async def test_internal_exchange_is_refused_here_and_by_the_broker(channel: Channel, name: str) -> None:
    inner = await channel.declare_exchange(name, "fanout", internal=True)
    with pytest.raises(ValueError, match="internal"):
        inner.publish(Message(b""), "")
    other = await channel.get_exchange(name)
    with pytest.raises(ConnectionError) as caught:
        await other.publish(Message(b""), "")
    assert isinstance(caught.value.__cause__, ChannelAccessRefused)
    await channel.reopen()
    await channel.exchange_delete(name)


async def test_internal_exchange_takes_messages_by_a_binding(channel: Channel, name: str) -> None:
    outer = await channel.declare_exchange(f"{name}-outer", "fanout", auto_delete=True)
    inner = await channel.declare_exchange(f"{name}-inner", "fanout", internal=True)
    queue = await channel.declare_queue(exclusive=True)
    await queue.bind(inner)
    await inner.bind(outer)
    await outer.publish(Message(b"x"), "")
    assert await drain(queue) == [b"x"]
    await inner.delete()


async def test_alternate_exchange_takes_what_has_no_route(channel: Channel, name: str) -> None:
    other = await channel.declare_exchange(f"{name}-other", "fanout")
    exchange = await channel.declare_exchange(name, arguments={"alternate-exchange": other.name})
    queue = await channel.declare_queue(exclusive=True)
    await queue.bind(other)
    assert isinstance(await exchange.publish(Message(b"x"), "nowhere"), commands.Basic.Ack)
    assert await drain(queue) == [b"x"]
    await exchange.delete()
    await other.delete()


async def test_auto_delete_exchange_goes_with_its_last_binding(channel: Channel, name: str) -> None:
    exchange = await channel.declare_exchange(name, auto_delete=True)
    queue = await channel.declare_queue(exclusive=True)
    await queue.bind(exchange)
    await queue.unbind(exchange)
    with pytest.raises(ChannelNotFoundEntity):
        await channel.get_exchange(name)


async def test_exchange_delete_if_unused(connection: Connection, channel: Channel, name: str) -> None:
    exchange = await channel.declare_exchange(name)
    queue = await channel.declare_queue(exclusive=True)
    await queue.bind(exchange, "x")
    async with connection.channel() as other:
        with pytest.raises(ChannelPreconditionFailed, match="in use"):
            await other.exchange_delete(name, if_unused=True)
    await queue.unbind(exchange, "x")
    await exchange.delete(if_unused=True)
    await channel.declare_exchange(name, "fanout")  # of another type, so the first one is gone
    await channel.exchange_delete(name, nowait=True)
    with pytest.raises(ChannelNotFoundEntity):
        await channel.get_exchange(name)


async def test_get_exchange(channel: Channel, name: str) -> None:
    assert (await channel.get_exchange("amq.topic")).name == "amq.topic"
    assert (await channel.get_exchange(name, ensure=False)).name == name
    assert not channel.is_closed
    with pytest.raises(ChannelNotFoundEntity, match=name):
        await channel.get_exchange(name)


# ------------------------------------------------------------------------------------------------------ queues


@pytest.mark.parametrize("given", [None, ""])
async def test_queue_without_a_name_gets_the_brokers(channel: Channel, given: str | None) -> None:
    queue = await channel.declare_queue(given, exclusive=True)
    assert queue.name.startswith("amq.gen-")
    assert queue.declaration_result.queue == queue.name
    await fill(channel, queue, [b"x"])
    assert await drain(queue) == [b"x"]


@pytest.mark.parametrize("text", ["schöne-queue-äöü", "очередь", "キュー", "🐇", "with space and\ttab", "x" * 200])
async def test_names_are_utf8(channel: Channel, name: str, text: str) -> None:
    name = f"{text}{name[-8:]}"
    exchange = await channel.declare_exchange(name, auto_delete=True)
    queue = await channel.declare_queue(name, exclusive=True)
    assert queue.name == name
    await queue.bind(exchange, text)
    await exchange.publish(Message(b"x"), text)
    message = await queue.get()
    assert (message.exchange, message.routing_key) == (name, text)
    await message.ack()


async def test_a_name_over_255_bytes_is_refused_here(channel: Channel) -> None:
    with pytest.raises(ValueError, match="255"):
        await channel.declare_queue("ä" * 128)
    with pytest.raises(ValueError, match="255"):
        channel.default_exchange.publish(Message(b""), "ä" * 128)
    assert (await channel.declare_queue("y" * 255, exclusive=True)).name == "y" * 255


async def test_arguments_that_fit_in_no_frame_are_refused_here(channel: Channel, name: str) -> None:
    with pytest.raises(MessageTooLarge, match="frame_max"):
        await channel.declare_queue(name, exclusive=True, arguments={"x-too-much": "x" * 200_000})
    await channel.declare_queue(name, exclusive=True)


async def test_arguments_take_effect(channel: Channel, name: str) -> None:
    arguments = {"x-max-length": 2, "x-max-priority": 5, "x-message-ttl": 60_000, "x-overflow": "drop-head"}
    queue = await channel.declare_queue(name, exclusive=True, arguments=arguments)
    await fill(channel, queue, [b"1"], priority=1)
    await fill(channel, queue, [b"2"], priority=3)
    assert await drain(queue) == [b"2", b"1"]
    await fill(channel, queue, [b"1", b"2", b"3"])
    assert await drain(queue) == [b"2", b"3"]


async def test_quorum_queue(channel: Channel, name: str) -> None:
    queue = await channel.declare_queue(name, durable=True, arguments={"x-queue-type": "quorum"})
    await fill(channel, queue, [b"1", b"2"])
    message = await queue.get()
    assert message.body == b"1"
    await message.nack()
    assert sorted(await drain(queue)) == [b"1", b"2"]
    await queue.delete(if_unused=False, if_empty=False)


@pytest.mark.parametrize("kind", ["quorum", "stream"])
async def test_deleting_by_the_defaults_costs_no_connection(
    connection: Connection, channel: Channel, name: str, kind: str
) -> None:
    queue = await channel.declare_queue(name, durable=True, arguments={"x-queue-type": kind})
    with contextlib.suppress(ValueError):  # RabbitMQ closes the connection over if_unused for a quorum queue (540)
        await queue.delete()
    assert not connection.is_closed
    await queue.delete(if_unused=False, if_empty=False)  # deleting what is gone is no error


@pytest.mark.parametrize("verb", ["get", "purge"])
async def test_what_streams_do_not_have_costs_no_connection(
    connection: Connection, channel: Channel, name: str, verb: str
) -> None:
    queue = await channel.declare_queue(name, durable=True, arguments={"x-queue-type": "stream"})
    with pytest.raises(ValueError, match="stream"):  # RabbitMQ closes the connection over it (540)
        await getattr(queue, verb)()
    assert not connection.is_closed
    await queue.delete(if_unused=False, if_empty=False)


async def test_stream(channel: Channel, name: str) -> None:
    queue = await channel.declare_queue(name, durable=True, arguments={"x-queue-type": "stream"})
    await fill(channel, queue, [b"%d" % i for i in range(10)])
    await channel.set_qos(5)
    async with queue.iterator(arguments={"x-stream-offset": 3}) as messages:
        for offset in range(3, 10):
            message = await asyncio.wait_for(anext(messages), 10)
            assert (message.body, message.headers["x-stream-offset"]) == (b"%d" % offset, offset)
            await message.ack()
    await queue.delete(if_unused=False, if_empty=False)


async def test_passive_declare_counts_and_creates_nothing(channel: Channel, name: str) -> None:
    queue = await channel.declare_queue(name, exclusive=True)
    await fill(channel, queue, [b"1", b"2"])
    found = await channel.declare_queue(name, passive=True)
    assert (found.declaration_result.message_count, found.declaration_result.consumer_count) == (2, 0)
    with pytest.raises(ChannelNotFoundEntity):
        await channel.declare_queue(f"{name}-other", passive=True)
    with pytest.raises(ChannelInvalidStateError):
        await queue.declare()


async def test_get_queue(channel: Channel, name: str) -> None:
    await channel.declare_queue(name, exclusive=True)
    assert (await channel.get_queue(name)).declaration_result.message_count == 0
    assert (await channel.get_queue(f"{name}-other", ensure=False)).name == f"{name}-other"
    assert not channel.is_closed
    with pytest.raises(ChannelNotFoundEntity, match=f"{name}-other"):
        await channel.get_queue(f"{name}-other")


async def test_exclusive_queue_goes_with_its_connection(amqp_url: str, channel: Channel, name: str) -> None:
    async with await connect(amqp_url) as other:
        await (await other.channel()).declare_queue(name, exclusive=True)
    with pytest.raises(ChannelNotFoundEntity):
        await channel.get_queue(name)


async def test_auto_delete_queue_goes_with_its_last_consumer(channel: Channel, name: str) -> None:
    queue = await channel.declare_queue(name, auto_delete=True)
    tag = await queue.consume(print)  # type: ignore[arg-type]
    await queue.cancel(tag)
    with pytest.raises(ChannelNotFoundEntity):
        await channel.get_queue(name)


async def test_delete_if_unused_and_if_empty(connection: Connection, name: str) -> None:
    async with connection.channel() as keeper:
        queue = await keeper.declare_queue(name, exclusive=True)
        tag = await queue.consume(print)  # type: ignore[arg-type]
        async with connection.channel() as channel:
            with pytest.raises(ChannelPreconditionFailed, match="in use"):
                await (await channel.get_queue(name)).delete()
        await queue.cancel(tag)
        await fill(keeper, queue, [b"1", b"2", b"3"])
        async with connection.channel() as channel:
            with pytest.raises(ChannelPreconditionFailed, match="not empty"):
                await (await channel.get_queue(name)).delete()
        deleted = await queue.delete(if_empty=False)
        assert deleted.message_count == 3


async def test_purge_leaves_what_is_out_for_acknowledgement(channel: Channel) -> None:
    queue = await channel.declare_queue(exclusive=True)
    await fill(channel, queue, [b"1", b"2", b"3"])
    message = await queue.get()
    purged = await queue.purge()
    assert purged is not None
    assert purged.message_count == 2
    await message.nack()
    assert await drain(queue) == [b"1"]


async def test_nowait_variants(channel: Channel, name: str) -> None:
    queue = await channel.declare_queue(name, exclusive=True)
    tag = await queue.consume(print)  # type: ignore[arg-type]
    assert await queue.cancel(tag, nowait=True) is None
    await fill(channel, queue, [b"1"])
    assert await queue.purge(no_wait=True) is None
    await holds(channel, queue, 0)
    assert await channel.queue_delete(name, nowait=True) is None
    with pytest.raises(ChannelNotFoundEntity):
        await channel.get_queue(name)


async def test_dead_letters_go_where_arguments_say(channel: Channel) -> None:
    dead = await channel.declare_queue(exclusive=True)
    queue = await channel.declare_queue(
        exclusive=True, arguments={"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead.name}
    )
    await fill(channel, queue, [b"x"])
    await (await queue.get()).reject()
    message = await eventually(lambda: dead.get(fail=False))
    [death] = message.headers["x-death"]
    assert (death["queue"], death["reason"], death["count"]) == (queue.name, "rejected", 1)
    await message.ack()


# ---------------------------------------------------------------------------------------------------- refusals


async def _missing(channel: Channel, name: str) -> object:
    return await channel.get_queue(name)


async def _unbindable(channel: Channel, name: str) -> object:
    return await (await channel.declare_queue(exclusive=True)).bind(name)


async def _other_properties(channel: Channel, name: str) -> object:
    await channel.declare_queue(name, exclusive=True)
    return await channel.declare_queue(name, exclusive=True, arguments={"x-max-length": 1})


async def _other_type(channel: Channel, name: str) -> object:
    return await channel.declare_exchange("amq.topic", "direct", durable=True)


async def _bad_argument(channel: Channel, name: str) -> object:
    return await channel.declare_queue(name, exclusive=True, arguments={"x-message-ttl": -1})


async def _reserved(channel: Channel, name: str) -> object:
    return await channel.declare_queue(f"amq.{name}", exclusive=True)


async def _missing_consumed(channel: Channel, name: str) -> object:
    return await (await channel.get_queue(name, ensure=False)).consume(print)  # type: ignore[arg-type]


async def _missing_fetched(channel: Channel, name: str) -> object:
    return await (await channel.get_queue(name, ensure=False)).get()


@pytest.mark.parametrize(
    ("attempt", "expected", "code", "method"),
    [
        (_missing, ChannelNotFoundEntity, 404, (50, 10)),
        (_unbindable, ChannelNotFoundEntity, 404, (50, 20)),
        (_missing_consumed, ChannelNotFoundEntity, 404, (60, 20)),
        (_missing_fetched, ChannelNotFoundEntity, 404, (60, 70)),
        (_other_properties, ChannelPreconditionFailed, 406, (50, 10)),
        (_other_type, ChannelPreconditionFailed, 406, (40, 10)),
        (_bad_argument, ChannelPreconditionFailed, 406, (50, 10)),
        (_reserved, ChannelAccessRefused, 403, (50, 10)),
    ],
)
async def test_a_refusal_has_its_class_and_hurts_no_other_channel(
    connection: Connection,
    name: str,
    attempt: Callable[[Channel, str], Awaitable[object]],
    expected: type[ChannelClosed],
    code: int,
    method: tuple[int, int],
) -> None:
    async with connection.channel() as other, connection.channel() as channel:
        queue = await other.declare_queue(exclusive=True)
        with pytest.raises(expected) as caught:
            await attempt(channel, name)
        error = caught.value
        assert (error.reply_code, error.by_broker) == (code, True)
        assert (error.class_id, error.method_id) == method
        assert error.reply_text in str(error)
        assert channel.is_closed
        with pytest.raises(ChannelInvalidStateError, match=error.reply_text.split()[0]):
            await channel.declare_queue()
        await fill(other, queue, [b"fine"])
        assert await drain(queue) == [b"fine"]


async def test_exclusive_queue_of_another_connection_is_locked(
    amqp_url: str, connection: Connection, name: str
) -> None:
    async with await connect(amqp_url) as other:
        await (await other.channel()).declare_queue(name, exclusive=True)
        async with connection.channel() as channel:
            with pytest.raises(ChannelLockedResource) as caught:
                await channel.declare_queue(name, exclusive=True)
            assert caught.value.reply_code == 405


@pytest.mark.node
async def test_a_user_without_permission_is_refused(broker: Node, name: str) -> None:
    broker.add_user("carol", "carol", "", "", ".*")
    async with await connect(host="127.0.0.1", port=broker.port, login="carol", password="carol") as connection:
        async with connection.channel() as channel:
            with pytest.raises(ChannelAccessRefused, match="carol") as caught:
                await channel.declare_queue(name)
            assert caught.value.reply_code == 403
        async with connection.channel() as channel:
            with pytest.raises(ConnectionError) as lost:
                await (await channel.get_exchange("amq.topic", ensure=False)).publish(Message(b""), "x")
            assert isinstance(lost.value.__cause__, ChannelAccessRefused)
    broker.delete_user("carol")


async def test_declares_at_the_same_time_get_their_own_answers(channel: Channel, name: str) -> None:
    queues = await asyncio.gather(*[channel.declare_queue(f"{name}-{i}", exclusive=True) for i in range(100)])
    assert [queue.declaration_result.queue for queue in queues] == [f"{name}-{i}" for i in range(100)]
