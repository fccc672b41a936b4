"""What packages built on aio-pika rely on, beyond what its documentation shows; on a real broker."""

from __future__ import annotations

import asyncio
import warnings

import pytest
from pamqp.commands import Basic, Queue

import leveret as aio_pika
from leveret import Message, RobustChannel, RobustConnection, connect
from leveret.compat.aiormq.abc import DeliveredMessage

pytestmark = pytest.mark.one_version


async def test_results_are_pamqp_s_frames(channel, name):
    queue = await channel.declare_queue(name, auto_delete=True)
    assert isinstance(queue.declaration_result, Queue.DeclareOk)
    assert isinstance(await queue.bind("amq.direct", name), Queue.BindOk)
    assert isinstance(await channel.default_exchange.publish(Message(b""), name), Basic.Ack)
    tag = await queue.consume(lambda message: None, no_ack=True)
    assert isinstance(await queue.cancel(tag), Basic.CancelOk)
    assert await queue.purge(no_wait=True) is None


async def test_what_comes_back_is_a_delivered_message_and_the_callback_has_run(channel):
    returned = []
    channel.return_callbacks.add(lambda sender, message: returned.append(message))
    result = await channel.default_exchange.publish(Message(b"lost"), "no such queue")
    assert isinstance(result, DeliveredMessage)
    assert result.delivery.reply_text == "NO_ROUTE"
    assert returned == [result]


async def test_the_underlay_channel_has_aiormq_s_methods(channel, name):
    underlay = await channel.get_underlay_channel()
    assert underlay == await channel.get_underlay_channel()
    assert not underlay.is_closed
    declared = await underlay.queue_declare(name, exclusive=True)
    assert declared.queue == name
    await underlay.exchange_declare(f"{name}.e", exchange_type="fanout", auto_delete=True)
    await underlay.queue_bind(name, f"{name}.e", "key")
    await underlay.basic_qos(prefetch_count=5)
    queue = await channel.get_queue(name)
    tag = await queue.consume(lambda message: None)
    assert set(underlay.consumers) == {tag}
    await underlay.queue_unbind(name, f"{name}.e", "key")
    assert (await underlay.queue_purge(name)).message_count == 0
    await underlay.basic_cancel(tag)
    assert not underlay.consumers
    await underlay.queue_delete(name, nowait=True)
    with pytest.warns(DeprecationWarning, match="get_underlay_channel"):
        assert channel.channel == underlay


async def test_an_underlay_channel_that_is_closed_closes_a_plain_channel(channel):
    underlay = await channel.get_underlay_channel()
    closing = underlay.closing
    await underlay.close()
    assert underlay.is_closed
    assert channel.is_closed
    with pytest.raises(aio_pika.exceptions.ChannelClosed):
        await closing
    with pytest.raises(aio_pika.exceptions.ChannelInvalidStateError):
        await channel.get_underlay_channel()


async def test_an_underlay_channel_that_is_closed_is_replaced_on_a_robust_one(robust):
    channel = await robust.channel()
    reopened = asyncio.Event()
    channel.reopen_callbacks.add(lambda sender: reopened.set())
    underlay = await channel.get_underlay_channel()
    await underlay.close(asyncio.CancelledError)
    await asyncio.wait_for(reopened.wait(), 10)
    assert await channel.get_underlay_channel() != underlay
    await channel.declare_queue(exclusive=True)


async def test_the_transport_tells_of_the_connection_and_closes_it(robust):
    transport = robust.transport
    assert transport.connection.connection_tune.heartbeat > 0
    assert transport.connection.server_properties["product"] == "RabbitMQ"
    assert transport.connection.basic_nack
    assert transport.connection.url.port == robust.url.port
    assert not transport.connection.is_closed
    restored = asyncio.Event()
    robust.reconnect_callbacks.add(lambda sender: restored.set())
    await transport.connection.close(aio_pika.exceptions.ConnectionClosed(320, "maintenance"))
    assert transport.connection.is_closed
    await asyncio.wait_for(restored.wait(), 10)
    assert robust.transport != transport


async def test_there_is_no_transport_before_connecting(amqp_url):
    connection = aio_pika.Connection(amqp_url)
    assert connection.transport is None
    with pytest.raises(RuntimeError, match="not opened"):
        connection.channel()
    await connection.connect()
    await connection.ready()
    assert connection.transport is not None
    await connection.close()


async def test_what_instrumentation_asks_of_a_channel(robust):
    channel = await robust.channel()
    assert not hasattr(channel._connection, "connection")
    assert (channel._connection.url.host, channel._connection.url.port) == (robust.url.host, robust.url.port)
    assert robust.connected.is_set()


async def test_a_message_knows_its_channel(channel, queue):
    await channel.default_exchange.publish(Message(b"x"), queue.name)
    message = await queue.get()
    assert message.channel == await channel.get_underlay_channel()
    await message.channel.basic_ack(message.delivery_tag)
    assert not message.locked
    await channel.close()
    with pytest.raises(aio_pika.exceptions.ChannelInvalidStateError):
        _ = message.channel


async def test_a_channel_that_was_not_awaited_is_opened_by_async_with(connection):
    opened = connection.channel()
    assert not opened.is_initialized
    async with opened as channel:
        assert channel is opened
        assert not channel.is_closed
    assert channel.is_closed


async def test_iterating_a_queue_of_a_closed_channel_is_a_runtime_error(channel, queue):
    await channel.close()
    with pytest.raises(RuntimeError):
        async for _ in queue:
            pass


async def test_a_robust_channel_is_usable_after_a_404(robust, name):
    channel = await robust.channel()
    with pytest.raises(aio_pika.exceptions.ChannelNotFoundEntity):
        await channel.get_queue(name)
    queue = await channel.declare_queue(name, auto_delete=True)
    assert isinstance(await channel.default_exchange.publish(Message(b""), name), Basic.Ack)
    assert (await queue.get()).body == b""
    await queue.delete(if_empty=False, if_unused=False)


async def test_asking_for_a_queue_or_exchange_again_gives_the_same_object_with_the_news(robust, name):
    channel = await robust.channel()
    queue = await channel.declare_queue(name, exclusive=True)
    exchange = await channel.declare_exchange(name, auto_delete=True)
    await channel.default_exchange.publish(Message(b""), name)
    assert await channel.get_queue(name) is queue
    assert queue.declaration_result.message_count == 1
    assert await channel.get_exchange(name) is exchange
    other = await robust.channel()
    assert await other.get_queue(name) is not queue
    assert await channel.declare_queue(name, passive=True, robust=False) is not queue


async def test_the_tag_of_a_consumer_is_the_same_in_the_underlay_after_the_broker_cancelled_it(robust, name):
    channel = await robust.channel()
    queue = await channel.declare_queue(name)
    got: asyncio.Queue[aio_pika.abc.AbstractIncomingMessage] = asyncio.Queue()
    tag = await queue.consume(got.put, no_ack=True)
    underlay = await channel.get_underlay_channel()
    other = await robust.channel()
    await underlay.queue_delete(name)  # behind the back of the channel, as an operator does
    async with asyncio.timeout(10):
        while not (await other.declare_queue(name)).declaration_result.consumer_count:  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # the broker tells nobody
    assert set((await channel.get_underlay_channel()).consumers) == {tag}
    await channel.default_exchange.publish(Message(b"again"), name)
    assert (await asyncio.wait_for(got.get(), 10)).body == b"again"
    await queue.cancel(tag)
    await queue.delete()


async def test_direct_reply_to_is_consumed_without_acks(robust, name):
    channel = await robust.channel()
    requests = await channel.declare_queue(name, exclusive=True)
    replies = await channel.get_queue("amq.rabbitmq.reply-to")
    answered = asyncio.get_running_loop().create_future()
    await replies.consume(answered.set_result, no_ack=True)

    async def serve(message: aio_pika.abc.AbstractIncomingMessage) -> None:
        async with message.process():
            await channel.default_exchange.publish(Message(message.body * 2), message.reply_to)

    await requests.consume(serve)
    await channel.default_exchange.publish(Message(b"ab", reply_to="amq.rabbitmq.reply-to"), name)
    assert (await asyncio.wait_for(answered, 10)).body == b"abab"


async def test_callbacks_may_be_plain_or_async_and_are_called_with_their_sender(amqp_url):
    calls = []
    done = asyncio.Event()

    async def on_close(sender: object, exc: BaseException | None) -> None:
        await asyncio.sleep(0)
        calls.append(("async", type(sender)))
        done.set()

    connection = await connect(amqp_url)
    connection.close_callbacks.add(lambda sender, exc: calls.append(("plain", type(sender))))
    connection.close_callbacks.add(on_close)
    await connection.close()
    await asyncio.wait_for(done.wait(), 10)
    assert calls == [("plain", aio_pika.Connection), ("async", aio_pika.Connection)]


async def test_the_older_callback_methods_work_and_say_what_to_write(channel, recwarn):
    seen = []

    def on_return(sender, message):
        seen.append(message.body)

    def on_close(sender, exc):
        seen.append("closed")

    warnings.simplefilter("always", DeprecationWarning)
    channel.add_on_return_callback(on_return)
    channel.add_close_callback(on_close)
    channel.add_close_callback(print)
    channel.remove_close_callback(print)
    assert on_close in channel.done_callbacks
    await channel.default_exchange.publish(Message(b"back"), "no such queue")
    channel.remove_on_return_callback(on_return)
    await channel.default_exchange.publish(Message(b"unseen"), "no such queue")
    await channel.close()
    assert seen == [b"back", "closed"]
    told = [str(warning.message).partition(" is ")[0].removesuffix("()") for warning in recwarn]
    assert told == [
        "add_on_return_callback",
        "add_close_callback",
        "add_close_callback",
        "remove_close_callback",
        "done_callbacks",
        "remove_on_return_callback",
    ]
    assert {warning.filename for warning in recwarn} == {__file__}


async def test_all_channels_is_global(channel):
    with pytest.warns(DeprecationWarning, match="global_"):
        await channel.set_qos(10, all_channels=True)
    assert channel.prefetch == 0


async def test_a_connection_class_of_the_user_s_own_is_made_with_url_and_loop(amqp_url):
    class OwnChannel(RobustChannel):
        pass

    class Own(RobustConnection):
        CHANNEL_CLASS = OwnChannel

        def __init__(self, url, loop=None, **kwargs):
            super().__init__(url, loop, **kwargs)

    async with await aio_pika.connect_robust(
        amqp_url, connection_class=Own, heartbeat=5, reconnect_interval=1
    ) as connection:
        assert type(connection) is Own
        assert type(await connection.channel()) is OwnChannel
        assert connection.kwargs == {"heartbeat": 5}
        assert connection.reconnect_interval == 1


async def test_queues_made_by_hand_work_on_a_channel(channel, name):
    queue = aio_pika.Queue(channel, name, False, True, False, None)
    await queue.declare()
    exchange = aio_pika.Exchange(channel, "")
    await exchange.publish(Message(b"by hand"), queue.name)
    assert (await queue.get(no_ack=True)).body == b"by hand"
