"""A broker that is low on memory blocks publishers: they wait, are told, and nothing is lost or reordered."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest
from pamqp import commands

from leveret import Channel, Connection, IncomingMessage, Message, connect
from leveret.exceptions import ConnectionBlocked, PublishNotSent, PublishOutcomeUnknown
from tests.broker.test_helpers import drain, eventually, fill, holds
from tests.support.node import Node

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
def node(shaky: Node) -> Node:
    """A node that these tests bring into trouble, and out again."""
    return shaky


@pytest.fixture
async def connection(node: Node) -> AsyncIterator[Connection]:
    async with await connect(node.url) as connection:
        yield connection


async def is_felt(node: Node) -> None:
    """Wait until the broker blocks who publishes: it has an alarm a little before its connections have heard of it."""
    async with await connect(node.url) as probe, probe.channel(publisher_confirms=False) as channel:

        async def is_blocked() -> bool:
            if not probe.blocked:
                await channel.default_exchange.publish(Message(b"probe"), "nobody", mandatory=False)
            return bool(probe.blocked)

        await eventually(is_blocked)


@contextlib.asynccontextmanager
async def memory_alarm(node: Node) -> AsyncIterator[None]:
    """The node is low on memory meanwhile; connections that are there are blocked when they publish."""
    await asyncio.to_thread(node.set_memory_alarm, True)
    try:
        await is_felt(node)
        yield
    finally:
        await asyncio.to_thread(node.set_memory_alarm, False)


async def block(connection: Connection, channel: Channel, name: str) -> asyncio.Future[object]:
    """Publish the message that makes the broker block *connection*; its confirm comes when that ends."""
    publish = asyncio.ensure_future(channel.default_exchange.publish(Message(b"first"), name))
    await eventually(lambda: connection.blocked)
    return publish


async def test_publishes_wait_and_are_confirmed_in_order(node: Node, connection: Connection, channel: Channel) -> None:
    events: list[str | None] = []
    connection.blocked_callbacks.add(lambda _, reason: events.append(reason))
    queue = await channel.declare_queue(exclusive=True)
    assert connection.blocked is None
    async with memory_alarm(node):
        first = await block(connection, channel, queue.name)
        assert connection.blocked == "low on memory"
        held = [channel.default_exchange.publish(Message(b"%d" % i), queue.name) for i in range(100)]
        with pytest.raises(ConnectionBlocked, match="low on memory") as caught:
            await channel.default_exchange.publish(Message(b"too late"), queue.name, timeout=0.1)
        assert isinstance(caught.value, TimeoutError)
        assert isinstance(caught.value, PublishNotSent)
        assert not any(publish.done() for publish in [first, *held])  # type: ignore[attr-defined]
        assert events == ["low on memory"]
    results = await asyncio.wait_for(asyncio.gather(first, *held), 10)
    assert all(isinstance(result, commands.Basic.Ack) for result in results)
    assert events == ["low on memory", None]
    assert connection.blocked is None
    await holds(channel, queue, 101)
    assert await drain(queue) == [b"first", *[b"%d" % i for i in range(100)]]


async def test_a_cancelled_publish_that_waited_is_never_sent(
    node: Node, connection: Connection, channel: Channel
) -> None:
    queue = await channel.declare_queue(exclusive=True)
    async with memory_alarm(node):
        first = await block(connection, channel, queue.name)
        held = [channel.default_exchange.publish(Message(b"%d" % i), queue.name) for i in range(10)]
        for publish in held[::2]:
            publish.cancel()  # type: ignore[attr-defined]
    results = await asyncio.wait_for(asyncio.gather(first, *held, return_exceptions=True), 10)
    assert sum(isinstance(result, commands.Basic.Ack) for result in results) == 6
    await holds(channel, queue, 6)
    assert await drain(queue) == [b"first", *[b"%d" % i for i in range(1, 10, 2)]]


async def test_consumers_on_another_connection_go_on(node: Node, connection: Connection, channel: Channel) -> None:
    queue = await channel.declare_queue(auto_delete=True)
    await fill(channel, queue, [b"%d" % i for i in range(100)])
    done: list[bytes] = []

    async def callback(message: IncomingMessage) -> None:
        await message.ack()
        done.append(message.body)

    async with memory_alarm(node):
        first = await block(connection, channel, queue.name)
        async with await connect(node.url) as other, other.channel() as consuming:
            await consuming.set_qos(10)
            theirs = await consuming.get_queue(queue.name)
            await theirs.consume(callback)
            await eventually(lambda: len(done) == 100)
            await holds(consuming, theirs, 0)
            assert other.blocked is None
    await asyncio.wait_for(first, 10)


async def test_a_call_on_a_blocked_connection_says_so_and_the_channel_lives(
    node: Node, connection: Connection, channel: Channel, name: str
) -> None:
    queue = await channel.declare_queue(name, exclusive=True)
    async with memory_alarm(node):
        first = await block(connection, channel, queue.name)
        with pytest.raises(TimeoutError, match="low on memory"):
            await queue.declare(timeout=0.1)
        with pytest.raises(TimeoutError, match="low on memory"):
            await connection.channel().initialize(timeout=0.1)
    await asyncio.wait_for(first, 10)
    await holds(channel, queue, 1)


async def test_closing_while_blocked_is_bounded(node: Node) -> None:
    loop = asyncio.get_running_loop()
    connection = await connect(node.url)
    channel = await connection.channel()
    queue = await channel.declare_queue(exclusive=True)
    async with memory_alarm(node):
        first = await block(connection, channel, queue.name)
        held = [channel.default_exchange.publish(Message(b"%d" % i), queue.name) for i in range(10)]
        began = loop.time()
        await channel.close(timeout=0.3)
        assert loop.time() - began < 1
        await connection.close(timeout=0.3)
        assert loop.time() - began < 2
        results = await asyncio.wait_for(asyncio.gather(first, *held, return_exceptions=True), 1)
    assert isinstance(results[0], PublishOutcomeUnknown)
    assert all(isinstance(result, PublishNotSent) for result in results[1:]), results


async def test_blocked_ends_with_the_connection(node: Node) -> None:
    async with memory_alarm(node), await connect(node.url) as connection, connection.channel() as channel:
        first = await block(connection, channel, "nowhere")
        await asyncio.to_thread(node.close_connections)
        with pytest.raises(PublishOutcomeUnknown):
            await asyncio.wait_for(first, 10)
        assert connection.is_closed
