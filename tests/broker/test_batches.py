"""Batches and fetching several at a time: every message once, settled by few frames, given back when not handed out."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest

from leveret import Batch, Channel, Connection, Message, RobustConnection
from leveret.exceptions import DeliveryLost
from tests.broker.test_helpers import eventually, fill, holds

if TYPE_CHECKING:
    from leveret import Queue
    from tests.support.proxy import FaultProxy


def numbered(count: int) -> list[bytes]:
    return [b"%d" % number for number in range(count)]


async def test_every_message_once_in_order_and_the_last_batch_in_time(channel: Channel, queue: Queue) -> None:
    asyncio.get_running_loop().set_debug(False)
    await fill(channel, queue, numbered(5050))
    bodies: list[bytes] = []
    sizes: list[int] = []
    async with queue.batches(100, 0.2) as batches:
        async for batch in batches:
            bodies += [message.body for message in batch]
            sizes.append(len(batch))
            await batch.ack()
            if len(bodies) == 5050:
                break
    assert bodies == numbered(5050)
    assert sizes == [*[100] * 50, 50]
    await holds(channel, queue, 0)


async def test_the_next_batch_fills_while_one_is_handled(channel: Channel, queue: Queue) -> None:
    await fill(channel, queue, numbered(20))
    async with queue.batches(10, None) as batches:
        first = await anext(batches)
        await eventually(lambda: len(batches._messages) == 10)
        second = await anext(batches)
        await second.ack()  # out of order: each for itself
        await first.ack()
    await holds(channel, queue, 0)


async def test_settling_singly_and_the_rest_together(channel: Channel, queue: Queue) -> None:
    await fill(channel, queue, numbered(10))
    async with queue.batches(10, None, redelivered_apart=True) as batches:
        batch = await anext(batches)
        await batch[3].reject()
        await batch[7].nack()
        await batch.ack()
        alone = await anext(batches)
        assert [(message.body, message.redelivered) for message in alone] == [(b"7", True)]
        await alone.nack(requeue=False)
    await holds(channel, queue, 0)


async def test_a_poison_message_fails_alone_the_second_time(channel: Channel, queue: Queue) -> None:
    await fill(channel, queue, numbered(10))
    done: list[bytes] = []
    failed: list[list[bytes]] = []
    async with queue.batches(10, 0.5, redelivered_apart=True) as batches:
        while len(done) < 9 or len(failed) < 2:
            batch = await anext(batches)
            bodies = [message.body for message in batch]
            with contextlib.suppress(LookupError):
                async with batch.process(requeue=True, reject_on_redelivered=True):
                    if b"5" in bodies:
                        failed.append(bodies)
                        raise LookupError
                    done += bodies
    assert failed == [numbered(10), [b"5"]]
    assert sorted(done) == sorted(set(numbered(10)) - {b"5"})
    await holds(channel, queue, 0)


@pytest.mark.parametrize("how", ["nack", "reject", "leave", "cancel"])
async def test_handing_back(channel: Channel, queue: Queue, how: str) -> None:
    await fill(channel, queue, numbered(25))
    async with queue.batches(10, None) as batches:
        batch = await anext(batches)
        assert [message.body for message in batch] == numbered(10)
        if how == "nack":
            await batch.nack()
        elif how == "reject":
            await batch.reject(requeue=True)
        elif how == "leave":
            await batch.ack()
        else:
            with contextlib.suppress(asyncio.CancelledError):
                async with batch.process():
                    raise asyncio.CancelledError
    await holds(channel, queue, 15 if how == "leave" else 25)


async def test_a_batch_begins_anew_after_a_lost_link(
    robust: RobustConnection, link: FaultProxy, channel: Channel, name: str
) -> None:
    consuming = await robust.channel()
    queue = await consuming.declare_queue(name)
    bodies: set[bytes] = set()
    async with queue.batches(10, None) as batches:
        await fill(channel, name, numbered(15))
        batch = await anext(batches)
        await eventually(lambda: len(batches._messages) == 5)
        link.rst()
        await eventually(lambda: not batch.is_live)
        with pytest.raises(DeliveryLost):
            batch.ack()
        await fill(channel, name, [b"%d" % number for number in range(15, 20)])
        async with asyncio.timeout(10):
            for _ in range(2):
                batch = await anext(batches)
                bodies |= {message.body for message in batch}
                await batch.ack()
    assert bodies == set(numbered(20))
    await holds(channel, name, 0)
    await channel.queue_delete(name)


async def test_batches_without_acknowledgements(channel: Channel, queue: Queue) -> None:
    await fill(channel, queue, numbered(20))
    async with queue.batches(10, None, no_ack=True) as batches:
        assert [[message.body for message in await anext(batches)] for _ in range(2)] == [
            numbered(10),
            numbered(20)[10:],
        ]
    await holds(channel, queue, 0)


async def test_a_quorum_queue(channel: Channel, name: str) -> None:
    queue = await channel.declare_queue(name, durable=True, arguments={"x-queue-type": "quorum"})
    await fill(channel, queue, numbered(200))
    count = 0
    async with queue.batches(50, 1) as batches:
        while count < 200:
            batch = await anext(batches)
            count += len(batch)
            await batch.ack()
    await holds(channel, queue, 0)
    await channel.queue_delete(name, if_unused=False)


# ------------------------------------------------------------------------------------------------------ get_many


@pytest.mark.parametrize(("there", "wanted"), [(0, 10), (5, 10), (10, 10), (200, 150), (300, 300), (3, 0)])
async def test_get_many(channel: Channel, queue: Queue, there: int, wanted: int) -> None:
    await fill(channel, queue, numbered(there))
    got = min(there, wanted)
    messages = await queue.get_many(wanted)
    assert [message.body for message in messages] == numbered(got)
    await holds(channel, queue, there - got)
    await Batch(messages).ack()
    assert len(await queue.get_many(1000, no_ack=True)) == there - got
    await holds(channel, queue, 0)


async def test_a_cancelled_get_many_leaves_all_in_the_queue(connection: Connection, queue: Queue) -> None:
    async with connection.channel() as channel:
        await fill(channel, queue, numbered(100))
        getting = asyncio.create_task((await channel.get_queue(queue.name)).get_many(100))
        for turn in range(50):
            await asyncio.sleep(0)
            if turn == 20 or getting.done():
                break
        was_done = getting.done()
        getting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await getting
        if not was_done:
            await holds(channel, queue, 100)


async def test_get_many_of_a_message_that_is_published_meanwhile(channel: Channel, queue: Queue) -> None:
    assert await queue.get_many(3) == []
    await channel.default_exchange.publish(Message(b"x"), queue.name)
    assert [message.body for message in await queue.get_many(3, no_ack=True)] == [b"x"]
