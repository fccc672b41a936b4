"""Channels: numbers, limits, QoS, closing by either side and opening again."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from pamqp import commands

from leveret import Channel, Connection, Message, connect
from leveret.exceptions import (
    ChannelClosed,
    ChannelInvalidStateError,
    ChannelLimitReached,
    ChannelNotFoundEntity,
    ConnectionNotAllowed,
)
from tests.broker.test_helpers import consumers, drain, eventually, fill

if TYPE_CHECKING:
    from tests.support.node import Node


async def test_a_channel_opens_by_await_and_by_async_with(connection: Connection) -> None:
    channel = await connection.channel()
    assert not channel.is_closed
    await channel.close()
    async with connection.channel() as channel:
        assert not channel.is_closed
    assert channel.is_closed
    unopened = connection.channel()
    assert unopened.is_closed
    assert not unopened.is_initialized
    with pytest.raises(ChannelInvalidStateError):
        await unopened.declare_queue()
    await unopened.close()


async def test_numbers_are_given_or_chosen(connection: Connection) -> None:
    one, forty = await connection.channel(), await connection.channel(channel_number=40)
    assert (one.number, forty.number) == (1, 40)
    with pytest.raises(ValueError, match="in use"):
        await connection.channel(channel_number=40)
    with pytest.raises(ValueError, match="2047"):
        await connection.channel(channel_number=2048)
    await forty.close()
    await connection.channel(channel_number=40)


async def test_a_404_on_one_channel_leaves_another_with_consumer_and_publishes_untouched(
    connection: Connection, name: str
) -> None:
    async with connection.channel() as channel, connection.channel() as guilty:
        queue = await channel.declare_queue(exclusive=True)
        received: asyncio.Queue[object] = asyncio.Queue()
        await queue.consume(received.put, no_ack=True)
        for _ in range(20):
            publishes = [channel.default_exchange.publish(Message(b""), queue.name) for _ in range(50)]
            with pytest.raises(ChannelNotFoundEntity):
                await guilty.get_queue(name)
            results = await asyncio.gather(*publishes)
            assert all(isinstance(result, commands.Basic.Ack) for result in results)
            await guilty.reopen()
        await eventually(lambda: received.qsize() == 1000)


async def test_pending_calls_of_a_channel_that_the_broker_closes_fail(connection: Connection, name: str) -> None:
    async with connection.channel() as channel:
        calls = [channel.get_queue(name), channel.declare_queue(), channel.set_qos(1)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(result, ChannelNotFoundEntity) for result in results)
        assert len({id(result) for result in results}) == 3  # each its own


async def test_a_channel_closed_by_the_broker_tells_everybody_once(connection: Connection, name: str) -> None:
    async with connection.channel() as channel:
        told: list[tuple[Channel, BaseException | None]] = []
        channel.close_callbacks.add(lambda channel, error: told.append((channel, error)))
        queue = await channel.declare_queue(exclusive=True)
        async with queue.iterator() as messages:
            task = asyncio.create_task(messages.__anext__())
            with pytest.raises(ChannelNotFoundEntity):
                await channel.get_queue(name)
            with pytest.raises(ChannelNotFoundEntity):
                await asyncio.wait_for(task, 5)
        assert await asyncio.wait_for(channel.closed(), 5) is True
    [(sender, error)] = told
    assert sender is channel
    assert isinstance(error, ChannelNotFoundEntity)


async def test_close_tells_once_and_is_normal(connection: Connection) -> None:
    channel = await connection.channel()
    told: list[BaseException | None] = []
    channel.close_callbacks.add(lambda _, error: told.append(error))
    await asyncio.gather(*[channel.close() for _ in range(3)])
    await channel.close()
    [error] = told
    assert isinstance(error, ChannelClosed)
    assert error.is_normal
    assert await channel.closed() is True
    with pytest.raises(ChannelInvalidStateError):
        channel.default_exchange.publish(Message(b""), "x")
    assert not connection.is_closed


async def test_reopen_works_after_either_sides_close(connection: Connection, name: str) -> None:
    channel = await connection.channel()
    told: list[BaseException | None] = []
    channel.close_callbacks.add(lambda _, error: told.append(error))
    for count in range(1, 6):
        if count % 2:
            await channel.close()
        else:
            with pytest.raises(ChannelNotFoundEntity):
                await channel.get_queue(name)
        assert channel.is_closed
        assert len(told) == count
        await channel.reopen()
        assert not channel.closed().done()
        queue = await channel.declare_queue(exclusive=True)
        await fill(channel, queue, [b"1"])
        assert await drain(queue) == [b"1"]


async def test_a_channel_opens_once(connection: Connection) -> None:
    channel = await connection.channel()
    with pytest.raises(RuntimeError, match="initialized"):
        await channel.initialize()


async def test_channel_max_is_kept_to(amqp_url: str) -> None:
    async with await connect(amqp_url, channel_max=3) as connection:
        channels = [await connection.channel() for _ in range(3)]
        with pytest.raises(ChannelLimitReached, match="3"):
            await connection.channel()
        await channels[1].close()
        assert (await connection.channel()).number == 2
        await channels[0].declare_queue(exclusive=True)


async def test_a_number_is_used_again_and_again(amqp_url: str) -> None:
    async with await connect(amqp_url, channel_max=1) as connection:
        for _ in range(100):
            async with connection.channel() as channel:
                assert channel.number == 1


async def test_a_thousand_channels(connection: Connection) -> None:
    channels = await asyncio.gather(*[connection.channel().__aenter__() for _ in range(1000)])
    assert len({channel.number for channel in channels}) == 1000
    await asyncio.gather(*[channel.close() for channel in channels])


@pytest.mark.node
async def test_a_users_limit_of_channels_closes_the_connection(broker: Node) -> None:
    broker.limit_channels("guest", 1)
    try:
        async with await connect(broker.url) as connection:
            await connection.channel()
            with pytest.raises(ConnectionNotAllowed, match="limit") as caught:
                await connection.channel()
            assert caught.value.reply_code == 530
            assert connection.is_closed
    finally:
        broker.limit_channels("guest", None)


async def test_what_would_cost_the_connection_is_refused_here(connection: Connection) -> None:
    async with connection.channel() as channel:
        with pytest.raises(ValueError, match="540"):
            await channel.flow(False)
        assert isinstance(await channel.flow(True), commands.Channel.FlowOk)
        with pytest.raises(ValueError, match="540"):
            await channel.set_qos(1, prefetch_size=1)
        for count in (-1, 65_536):
            with pytest.raises(ValueError, match="prefetch_count"):
                await channel.set_qos(count)
        assert isinstance(await channel.set_qos(65_535), commands.Basic.QosOk)


async def test_on_return_raises_needs_confirms(connection: Connection) -> None:
    with pytest.raises(RuntimeError, match="confirms"):
        connection.channel(publisher_confirms=False, on_return_raises=True)


async def test_calls_of_many_tasks_on_one_channel_get_their_own_answers(connection: Connection, name: str) -> None:
    async def use(i: int) -> None:
        queue = await channel.declare_queue(f"{name}-{i}", exclusive=True)
        await fill(channel, queue, [b"%d" % i])
        message = await queue.get()
        assert (message.body, message.routing_key) == (b"%d" % i, queue.name)
        await message.ack()
        assert await queue.get(fail=False) is None
        assert await consumers(channel, queue) == 0
        assert (await queue.delete()).message_count == 0

    async with connection.channel() as channel:
        await asyncio.gather(*[use(i) for i in range(100)])


async def test_calls_beside_a_consume_or_a_cancel_get_their_own_answers(connection: Connection, name: str) -> None:
    # A classic queue itself answers basic.consume and basic.cancel: replies to later calls overtake its own.
    async with connection.channel() as channel, connection.channel() as other:
        queues = [await channel.declare_queue(f"{name}-{i}", exclusive=True) for i in range(3)]
        for i in range(20):
            await fill(other, queues[0], [b"x"])
            tag, got, found, _, again = await asyncio.gather(
                queues[1].consume(print),  # type: ignore[arg-type]
                queues[0].get(),
                channel.get_queue(queues[2].name),
                channel.set_qos(i),
                queues[2].consume(print),  # type: ignore[arg-type]
            )
            await got.ack()
            assert found.name == queues[2].name
            cancelled, empty, _, also = await asyncio.gather(
                queues[1].cancel(tag), queues[0].get(fail=False), queues[1].purge(), queues[2].cancel(again)
            )
            assert (cancelled.consumer_tag, empty, also.consumer_tag) == (tag, None, again)
