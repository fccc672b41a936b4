"""Many messages: none lost, none twice."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from leveret import Channel, Connection, IncomingMessage, Message, connect
from tests.broker.test_helpers import eventually, holds

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from leveret import Queue


@pytest.fixture
async def connection(amqp_url: str) -> AsyncIterator[Connection]:
    asyncio.get_running_loop().set_debug(False)  # it would take most of the time
    async with await connect(amqp_url) as connection:
        yield connection


@pytest.fixture
def count(broker_version: str) -> int:
    """The full number with the newest broker only."""
    return 100_000 if broker_version == "4.3" else 10_000


async def publish(channel: Channel, queue: Queue, count: int) -> None:
    for start in range(0, count, 5000):
        await asyncio.gather(
            *[channel.default_exchange.publish(Message(b"%d" % i), queue.name) for i in range(start, start + 5000)]
        )


async def test_callbacks_see_every_message_once_in_order(connection: Connection, channel: Channel, count: int) -> None:
    queue = await channel.declare_queue(exclusive=True)
    bodies: list[bytes] = []

    async def callback(message: IncomingMessage) -> None:
        bodies.append(message.body)
        await message.ack()

    async with connection.channel() as consuming:
        await consuming.set_qos(100)
        await (await consuming.get_queue(queue.name)).consume(callback)
        await publish(channel, queue, count)
        await eventually(lambda: len(bodies) >= count, 60)
    assert bodies == [b"%d" % i for i in range(count)]
    await holds(channel, queue, 0)


async def test_callbacks_that_wait_see_every_message_once(connection: Connection, channel: Channel) -> None:
    queue = await channel.declare_queue(exclusive=True)
    bodies: list[bytes] = []

    async def callback(message: IncomingMessage) -> None:
        await asyncio.sleep(0.001 if message.delivery_tag % 7 == 0 else 0)
        bodies.append(message.body)
        await message.ack()

    async with connection.channel() as consuming:
        await consuming.set_qos(100)
        await (await consuming.get_queue(queue.name)).consume(callback)
        await publish(channel, queue, 10_000)
        await eventually(lambda: len(bodies) >= 10_000, 60)
    assert sorted(bodies, key=int) == [b"%d" % i for i in range(10_000)]
    await holds(channel, queue, 0)


async def test_an_iterator_sees_every_message_once_in_order(
    connection: Connection, channel: Channel, count: int
) -> None:
    queue = await channel.declare_queue(exclusive=True)
    await publish(channel, queue, count)
    expected = 0
    async with connection.channel() as consuming:
        await consuming.set_qos(100)
        async with (await consuming.get_queue(queue.name)).iterator() as messages:
            async for message in messages:
                assert message.body == b"%d" % expected
                await message.ack()
                expected += 1
                if expected == count:
                    break
    await holds(channel, queue, 0)
