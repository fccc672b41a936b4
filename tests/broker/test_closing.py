"""Closing by this side, in every state: bounded, once, and everybody gets a true answer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from pamqp import commands
from yarl import URL

from leveret import Channel, Connection, IncomingMessage, Message, connect
from leveret.exceptions import (
    ChannelInvalidStateError,
    ConnectionClosed,
    PublishNotSent,
    PublishOutcomeUnknown,
)
from tests.broker.test_helpers import consumers, drain, eventually, fill, holds
from tests.support.proxy import FaultProxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def observer(amqp_url: str) -> AsyncIterator[Channel]:
    """A channel on a connection of its own, to see what is left."""
    async with await connect(amqp_url) as connection, connection.channel() as channel:
        yield channel


@pytest.fixture
async def proxy(amqp_url: str) -> AsyncIterator[FaultProxy]:
    url = URL(amqp_url)
    async with FaultProxy(url.host or "localhost", url.port or 5672) as proxy:
        yield proxy


async def test_an_idle_connection_closes_once(amqp_url: str) -> None:
    connection = await connect(amqp_url)
    told: list[tuple[object, BaseException | None]] = []
    connection.close_callbacks.add(lambda sender, error: told.append((sender, error)))
    closed = connection.closed()
    await connection.close()
    assert await closed is True
    assert connection.is_closed
    assert connection.close_called
    await connection.close()
    await asyncio.gather(*[connection.close() for _ in range(3)])
    [(sender, error)] = told
    assert sender is connection
    assert isinstance(error, ConnectionClosed)
    assert error.is_normal
    with pytest.raises(ConnectionClosed):
        await connection.ready()


async def test_concurrent_closes_all_return_when_it_is_closed(amqp_url: str) -> None:
    connection = await connect(amqp_url)
    told: list[object] = []
    connection.close_callbacks.add(lambda *args: told.append(args))

    async def close() -> bool:
        await connection.close()
        return connection.is_closed

    assert await asyncio.gather(*[close() for _ in range(10)]) == [True] * 10
    assert len(told) == 1


async def test_closing_hands_on_the_exception_it_was_given(amqp_url: str) -> None:
    connection = await connect(amqp_url)
    told: list[BaseException | None] = []
    connection.close_callbacks.add(lambda _, error: told.append(error))
    reason = RuntimeError("enough")
    await connection.close(reason)
    assert told == [reason]


@pytest.mark.parametrize("what", ["channel", "connection"])
async def test_closing_waits_for_confirms_in_flight(amqp_url: str, observer: Channel, name: str, what: str) -> None:
    queue = await observer.declare_queue(name, auto_delete=True)
    async with await connect(amqp_url) as connection, connection.channel() as channel:
        publishes = [channel.default_exchange.publish(Message(b"%d" % i), name) for i in range(500)]
        await (channel if what == "channel" else connection).close()
        assert all(publish.done() for publish in publishes)  # type: ignore[attr-defined]
        results = await asyncio.gather(*publishes, return_exceptions=True)
        assert all(isinstance(result, commands.Basic.Ack) for result in results)
        with pytest.raises(ChannelInvalidStateError):
            channel.default_exchange.publish(Message(b""), name)
    await holds(observer, queue, 500)
    assert await drain(queue) == [b"%d" % i for i in range(500)]
    await queue.delete()


async def test_closing_while_others_publish_gives_each_a_true_answer(
    amqp_url: str, observer: Channel, name: str
) -> None:
    queue = await observer.declare_queue(name)
    async with await connect(amqp_url) as connection, connection.channel() as channel:
        confirmed: list[bytes] = []
        unsent: list[bytes] = []

        async def publisher(i: int) -> None:
            for j in range(1000):
                body = b"%d-%d" % (i, j)
                try:
                    await channel.default_exchange.publish(Message(body), name)
                except ChannelInvalidStateError:
                    unsent.append(body)
                    return
                confirmed.append(body)

        tasks = [asyncio.create_task(publisher(i)) for i in range(20)]
        await eventually(lambda: len(confirmed) > 100)
        await connection.close()
        await asyncio.wait_for(asyncio.gather(*tasks), 10)
        assert len(unsent) == 20
    await holds(observer, queue, len(confirmed))
    assert sorted(await drain(queue)) == sorted(confirmed)
    await queue.delete()


@pytest.mark.parametrize("what", ["channel", "connection"])
async def test_callbacks_that_run_are_cancelled_and_their_messages_redelivered(
    amqp_url: str, observer: Channel, name: str, what: str
) -> None:
    queue = await observer.declare_queue(name)
    await fill(observer, queue, [b"1", b"2", b"3"])
    running, cancelled = 0, 0

    async def callback(message: IncomingMessage) -> None:
        nonlocal running, cancelled
        running += 1
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled += 1
            raise

    async with await connect(amqp_url) as connection, connection.channel() as channel:
        await channel.set_qos(2)
        await (await channel.get_queue(name)).consume(callback)
        await eventually(lambda: running == 2)
        await (channel if what == "channel" else connection).close()
        assert (running, cancelled) == (2, 2)
        assert not channel.handler_tasks
    await holds(observer, queue, 3)
    back = [await queue.get(no_ack=True) for _ in range(3)]
    assert [(message.body, message.redelivered) for message in back] == [(b"1", True), (b"2", True), (b"3", False)]
    await queue.delete()


async def test_a_callback_may_settle_while_it_is_cancelled(amqp_url: str, observer: Channel, name: str) -> None:
    queue = await observer.declare_queue(name)
    await fill(observer, queue, [b"1"])
    started = asyncio.Event()

    async def callback(message: IncomingMessage) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await message.ack()

    async with await connect(amqp_url) as connection, connection.channel() as channel:
        await (await channel.get_queue(name)).consume(callback)
        await asyncio.wait_for(started.wait(), 5)
    await holds(observer, queue, 0)
    await queue.delete()


@pytest.mark.parametrize("what", ["channel", "connection"])
async def test_closing_from_inside_a_callback(amqp_url: str, observer: Channel, name: str, what: str) -> None:
    queue = await observer.declare_queue(name)
    after: list[bool] = []

    async def callback(message: IncomingMessage) -> None:
        await message.ack()
        await (channel if what == "channel" else connection).close()
        after.append(channel.is_closed)

    async with await connect(amqp_url) as connection, connection.channel() as channel:
        await (await channel.get_queue(name)).consume(callback)
        await fill(observer, queue, [b"1"])
        await asyncio.wait_for(channel.closed(), 5)
        await eventually(lambda: after == [True])
        await eventually(lambda: not channel.handler_tasks)
        assert connection.is_closed is (what == "connection")
    await holds(observer, queue, 0)
    await queue.delete()


async def test_closing_with_a_backlog_of_deliveries_requeues_them(amqp_url: str, observer: Channel, name: str) -> None:
    queue = await observer.declare_queue(name)
    await fill(observer, queue, [b"%d" % i for i in range(2000)])
    done: list[bytes] = []

    async def callback(message: IncomingMessage) -> None:
        await asyncio.sleep(0)
        await message.ack()
        done.append(message.body)

    async with await connect(amqp_url) as connection, connection.channel() as channel:
        await (await channel.get_queue(name)).consume(callback)
        await eventually(lambda: len(done) > 10)
    await holds(observer, queue, 2000 - len(done))
    assert await consumers(observer, queue) == 0
    assert sorted([*done, *await drain(queue)], key=int) == [b"%d" % i for i in range(2000)]
    await queue.delete()


async def test_pending_calls_end_when_the_connection_is_closed(proxy: FaultProxy, name: str) -> None:
    connection = await connect(proxy.url)
    channel = await connection.channel()
    queue = await channel.declare_queue(name, exclusive=True)
    tag = await queue.consume(print)  # type: ignore[arg-type]
    proxy.down.stall = True
    calls: list[Any] = [queue.declare(), queue.get(), queue.purge(), queue.cancel(tag), connection.update_secret("x")]
    tasks = [asyncio.ensure_future(call) for call in calls]
    publish = channel.default_exchange.publish(Message(b""), name)
    await asyncio.sleep(0)
    loop = asyncio.get_running_loop()
    began = loop.time()
    await connection.close(timeout=0.3)
    assert loop.time() - began < 1
    results = await asyncio.wait_for(asyncio.gather(*tasks, publish, return_exceptions=True), 1)
    assert all(isinstance(result, ConnectionError | ChannelInvalidStateError) for result in results[:-1]), results
    assert isinstance(results[-1], PublishOutcomeUnknown)


@pytest.mark.parametrize("what", ["channel", "connection"])
async def test_closing_is_bounded_when_nobody_answers(proxy: FaultProxy, what: str) -> None:
    loop = asyncio.get_running_loop()
    connection = await connect(proxy.url)
    channel = await connection.channel()
    proxy.down.blackhole = True
    began = loop.time()
    await (channel if what == "channel" else connection).close(timeout=0.2)
    assert 0.1 < loop.time() - began < 1
    assert channel.is_closed
    await connection.close(timeout=0.1)
    assert connection.is_closed


async def test_closing_is_bounded_when_the_peer_stops_reading(proxy: FaultProxy, name: str) -> None:
    connection = await connect(proxy.url)
    channel = await connection.channel()
    proxy.up.stall = True
    publishes = [channel.default_exchange.publish(Message(bytes(1_000_000)), name) for _ in range(20)]
    began = asyncio.get_running_loop().time()
    await connection.close(timeout=0.3)
    assert asyncio.get_running_loop().time() - began < 1.5
    results = await asyncio.gather(*publishes, return_exceptions=True)
    assert {type(result) for result in results} <= {PublishOutcomeUnknown, PublishNotSent}, results
    assert any(isinstance(result, PublishOutcomeUnknown) for result in results)


async def test_a_cancelled_close_closes_at_once(proxy: FaultProxy) -> None:
    connection = await connect(proxy.url)
    await connection.channel()
    proxy.down.blackhole = True
    task = asyncio.create_task(connection.close())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert connection.is_closed
    await eventually(lambda: not proxy.connections)


async def test_an_exception_in_the_block_is_not_hidden(amqp_url: str) -> None:
    connection: Connection = await connect(amqp_url)

    async def fail() -> None:
        async with connection, connection.channel():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert connection.is_closed


async def test_a_hundred_connections_open_and_close(amqp_url: str) -> None:
    async def use() -> str:
        async with await connect(amqp_url) as connection, connection.channel() as channel:
            return (await channel.declare_queue(exclusive=True)).name

    for _ in range(5):
        assert len(set(await asyncio.gather(*[use() for _ in range(20)]))) == 20
