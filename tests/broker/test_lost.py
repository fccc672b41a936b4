"""A connection that the broker or the network ends: everybody who waits is told why, once."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from yarl import URL

from leveret import Connection, IncomingMessage, Message, connect
from leveret.exceptions import (
    AMQPConnectionError,
    ChannelInvalidStateError,
    ConnectionClosed,
    DeliveryLost,
    PublishOutcomeUnknown,
)
from tests.broker.test_helpers import eventually, fill, holds
from tests.support.node import Node
from tests.support.proxy import FaultProxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def proxy(amqp_url: str) -> AsyncIterator[FaultProxy]:
    url = URL(amqp_url)
    async with FaultProxy(url.host or "localhost", url.port or 5672) as proxy:
        yield proxy


class Witness:
    """Waits on a connection in every way there is, and checks that each way ends with the cause."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.told: list[BaseException | None] = []
        connection.close_callbacks.add(lambda _, error: self.told.append(error))

    async def begin(self) -> None:
        self.channel = await self.connection.channel()
        self.channel_told: list[BaseException | None] = []
        self.channel.close_callbacks.add(lambda _, error: self.channel_told.append(error))
        queue = await self.channel.declare_queue(exclusive=True)
        await fill(self.channel, queue, [b"unacked"])
        self.messages = queue.iterator()
        self.unacked = await anext(self.messages)
        self.started = asyncio.Event()
        self.callback_error: BaseException | None = None
        await queue.consume(self.callback)
        await fill(self.channel, queue, [b"1", b"2"])
        await asyncio.wait_for(self.started.wait(), 5)
        await anext(self.messages)
        self.next = asyncio.create_task(self.messages.__anext__())
        self.closed = self.connection.closed()

    async def callback(self, message: IncomingMessage) -> None:
        self.started.set()
        await asyncio.wait_for(self.connection.closed(), 30)
        try:
            await message.ack()
        except DeliveryLost as error:
            self.callback_error = error

    async def end(self) -> BaseException:
        """Check it all, and return the cause."""
        assert await asyncio.wait_for(self.closed, 10) is True
        assert self.connection.is_closed
        assert not self.connection.connected.is_set()
        assert self.channel.is_closed
        [cause] = self.told
        assert cause is not None
        assert self.channel_told == [cause]
        with pytest.raises(type(cause)) as caught:
            await asyncio.wait_for(self.next, 1)
        assert caught.value.__cause__ is cause
        with pytest.raises(type(cause)):
            await anext(self.messages)
        with pytest.raises(DeliveryLost):
            await self.unacked.ack()
        with pytest.raises(ChannelInvalidStateError):
            await self.channel.declare_queue()
        with pytest.raises(ChannelInvalidStateError):
            self.channel.default_exchange.publish(Message(b""), "x")
        with pytest.raises(ChannelInvalidStateError):
            await self.connection.channel()
        await eventually(lambda: self.callback_error)
        await self.messages.close()
        await self.channel.close()
        await self.connection.close()
        assert len(self.told) == 1
        return cause


@pytest.mark.node
async def test_closed_by_an_operator(broker: Node, caplog: pytest.LogCaptureFixture) -> None:
    async with await connect(broker.url) as connection:
        witness = Witness(connection)
        await witness.begin()
        await asyncio.to_thread(broker.close_connections, "maintenance")
        cause = await witness.end()
    assert isinstance(cause, ConnectionClosed)
    assert (cause.reply_code, cause.by_broker, cause.retryable) == (320, True, True)
    assert "maintenance" in str(cause)
    lost = [record for record in caplog.records if "connection lost" in record.getMessage()]
    assert len(lost) == 1


async def test_the_node_stops_and_starts(shaky: Node) -> None:
    async with await connect(shaky.url) as connection:
        witness = Witness(connection)
        await witness.begin()
        await asyncio.to_thread(shaky.stop_app)
        cause = await witness.end()
    assert isinstance(cause, ConnectionClosed)
    assert (cause.reply_code, cause.by_broker) == (320, True)
    assert "shutdown" in str(cause)
    with pytest.raises(AMQPConnectionError, match="RabbitMQ"):
        await connect(shaky.url)
    await asyncio.to_thread(shaky.start_app)
    async with await connect(shaky.url) as connection:
        await (await connection.channel()).declare_queue(exclusive=True)


async def test_the_node_is_killed_with_calls_and_publishes_in_flight(shaky: Node, name: str) -> None:
    async with await connect(shaky.url) as connection:
        witness = Witness(connection)
        await witness.begin()
        channel = await connection.channel()
        queue = await channel.declare_queue(name, durable=True)
        await fill(channel, queue, [b"confirmed %d" % i for i in range(20)], delivery_mode=2)
        await asyncio.to_thread(shaky.flush)
        shaky.freeze()  # so that nothing of this is answered
        publishes = [channel.default_exchange.publish(Message(b"?", delivery_mode=2), name) for _ in range(50)]
        calls: list[Any] = [queue.declare(), queue.get(), channel.set_qos(1), connection.channel().initialize()]
        tasks = [asyncio.ensure_future(call) for call in calls]
        await asyncio.sleep(0)
        await asyncio.to_thread(shaky.kill)
        cause = await witness.end()
        assert isinstance(cause, ConnectionClosed)
        assert not cause.by_broker
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(type(result) is type(cause) for result in results), results
        assert len({id(result) for result in results}) == len(results)
        outcomes = await asyncio.gather(*publishes, return_exceptions=True)
        assert all(isinstance(outcome, PublishOutcomeUnknown) for outcome in outcomes)
        assert all(outcome.__cause__ is cause for outcome in outcomes)  # type: ignore[union-attr]
    await asyncio.to_thread(shaky.start)
    async with await connect(shaky.url) as connection, connection.channel() as channel:
        queue = await channel.declare_queue(name, durable=True)
        bodies = [(await queue.get(no_ack=True)).body for _ in range(20)]
        assert bodies == [b"confirmed %d" % i for i in range(20)]
        await queue.delete(if_empty=False)


@pytest.mark.parametrize("how", ["rst", "fin"])
async def test_the_link_is_cut(proxy: FaultProxy, how: str) -> None:
    async with await connect(proxy.url) as connection:
        witness = Witness(connection)
        await witness.begin()
        getattr(proxy, how)()
        cause = await witness.end()
    assert isinstance(cause, ConnectionClosed)
    assert (cause.reply_code, cause.by_broker, cause.retryable) == (0, False, True)
    assert "was lost" in str(cause)


@pytest.mark.parametrize("cut_after", [1, 7, 30, 100, 5_000, 100_000])
async def test_a_link_cut_in_the_middle_of_a_message(
    amqp_url: str, proxy: FaultProxy, name: str, cut_after: int
) -> None:
    async with await connect(amqp_url) as sane, sane.channel() as observer:
        queue = await observer.declare_queue(name, auto_delete=True)
        await observer.declare_queue(name, passive=True)
        async with await connect(proxy.url) as connection, connection.channel() as channel:
            proxy.up.cut_after = cut_after
            with pytest.raises(PublishOutcomeUnknown):
                await channel.default_exchange.publish(Message(bytes(200_000)), name)
        await holds(observer, queue, 0)
        await fill(observer, queue, [bytes(200_000)])
        async with await connect(proxy.url) as connection, connection.channel() as channel:
            theirs = await channel.get_queue(name)
            proxy.down.cut_after = cut_after
            with pytest.raises(ConnectionClosed):
                await theirs.get()
        await holds(observer, queue, 1)
        assert (await queue.get(no_ack=True)).body == bytes(200_000)
        await queue.delete()
