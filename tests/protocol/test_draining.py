"""Draining where its parts meet: what it waits for, how long at most, and what it counts."""

from __future__ import annotations

import asyncio
import math
import os
import signal
from collections.abc import Callable

import pytest
from pamqp import commands

from leveret import Batch, IncomingMessage, QueueIterator, RobustQueue, run_until_signalled
from tests.protocol.kit import until, within
from tests.protocol.robust_kit import Server, ServerLink, channel_of, queue_on, robust, silent

ACK, CANCEL = commands.Basic.Ack, commands.Basic.Cancel


async def taken(messages: QueueIterator, link: ServerLink, count: int = 1) -> list[IncomingMessage]:
    """The first messages of *messages*, which consumes from "q"."""
    await messages.consume()
    for number in range(count):
        link.deliver("q", number + 1, b"%d" % number)
    return [await within(anext(messages)) for _ in range(count)]


def acked(link: ServerLink) -> list[tuple[int, bool]]:
    return [(method.delivery_tag, method.multiple) for method in link.all(ACK)]


@pytest.mark.parametrize("drain", [1.0, math.inf])
async def test_with_nothing_to_wait_for_only_the_broker_s_answer_counts(drain: float) -> None:
    async with robust() as (connection, server):
        consumer = await (await queue_on(await channel_of(connection))).consume(print)
        server.at(CANCEL, silent)
        began = asyncio.get_running_loop().time()
        await within(consumer.stop(drain, timeout=0.2), 0.8)
        assert asyncio.get_running_loop().time() - began < 0.8


async def test_every_task_that_shares_an_iterator_is_waited_for() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        messages = (await queue_on(channel)).iterator()
        await messages.consume()
        go, working = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            message = await anext(messages)
            working.set()
            await go.wait()
            await message.ack()

        worker = asyncio.ensure_future(work())
        server.link.deliver("q", 1, b"1")
        await within(working.wait())
        other = asyncio.ensure_future(anext(messages))
        await asyncio.sleep(0)
        closing = asyncio.ensure_future(channel.close(drain=5))
        await server.seen(CANCEL)
        assert not closing.done()
        go.set()
        report = await within(closing)
        await within(worker)
        assert (report.drained, report.requeued, report.abandoned) == (1, 0, 0)
        assert acked(server.link) == [(1, True)]
        with pytest.raises(StopAsyncIteration):
            await other


@pytest.mark.parametrize("how", ["its task has ended", "settled, and no more asked for"])
async def test_an_iterator_that_nobody_comes_back_to_holds_nothing_up(how: str) -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        messages = (await queue_on(channel)).iterator()
        if how == "its task has ended":
            await asyncio.ensure_future(taken(messages, server.link))
            await within(channel.close(drain=math.inf), 2)
        else:
            [message] = await taken(messages, server.link)
            closing = asyncio.ensure_future(channel.close(drain=math.inf))
            await server.seen(CANCEL)
            await message.ack()
            assert (await within(closing, 2)).drained == 1


async def test_what_needs_no_acknowledgement_is_handed_out_while_it_drains() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        messages = (await queue_on(channel)).iterator(no_ack=True)
        await messages.consume()
        got: list[bytes] = []
        go = asyncio.Event()

        async def iterate() -> None:
            async for message in messages:
                got.append(message.body)
                await go.wait()

        iterating = asyncio.ensure_future(iterate())
        for number in range(3):
            server.link.deliver("q", number + 1, b"%d" % number)
        await until(lambda: got)
        closing = asyncio.ensure_future(channel.close(drain=5))
        await server.seen(CANCEL)
        go.set()
        report = await within(closing)
        await within(iterating)
        assert got == [b"0", b"1", b"2"]
        assert report.abandoned == 0


async def test_what_was_stopped_before_is_not_counted_again() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        queue = await queue_on(channel)
        go = asyncio.Event()

        async def callback(message: IncomingMessage) -> None:
            await go.wait()
            await message.ack()

        consumer = await queue.consume(callback)
        server.link.deliver("q", 1, b"1")
        await until(lambda: consumer.in_flight)
        stopping = asyncio.ensure_future(consumer.stop(5))
        go.set()
        assert (await within(stopping)).drained == 1
        assert (await within(channel.close(drain=1))).drained == 0


async def test_a_batch_goes_out_this_turn_although_other_acks_are_held_back() -> None:
    async with robust() as (connection, server):
        queue = await queue_on(await channel_of(connection))
        got: list[IncomingMessage] = []
        await queue.consume(got.append, ack_batch=50)
        for number in range(1, 5):
            server.link.deliver("q", number, b"m")
        await until(lambda: len(got) == 4)
        await got[0].ack()
        began = asyncio.get_running_loop().time()
        await Batch(got[1:]).ack()
        await server.seen(ACK)
        assert asyncio.get_running_loop().time() - began < 0.08
        assert acked(server.link) == [(4, True)]


@pytest.mark.expects_errors
async def test_a_consumer_that_was_stopped_complains_of_nothing() -> None:
    async with robust() as (connection, server):

        def fail(_: IncomingMessage) -> None:
            raise ValueError("no good")

        consumer = await (await queue_on(await channel_of(connection))).consume(fail, prefetch=1)
        server.link.deliver("q", 1, b"m")
        await until(lambda: connection.health().status == "degraded")
        await within(consumer.stop(0))
        assert connection.health().status == "ready"


async def test_a_signal_stops_all_connections_at_once() -> None:
    """The second one went on taking messages while the first one drained."""
    async with robust() as (one, server), robust(server=Server()) as (two, other):
        go = asyncio.Event()

        async def wait(message: IncomingMessage) -> None:
            await go.wait()
            await message.ack()

        async def consumed(queue: RobustQueue, link: Callable[[], ServerLink]) -> None:
            consumer = await queue.consume(wait)
            link().deliver("q", 1, b"m")
            await until(lambda: consumer.in_flight)

        await consumed(await queue_on(await channel_of(one)), lambda: server.link)
        await consumed(await queue_on(await channel_of(two)), lambda: other.link)
        running = asyncio.ensure_future(run_until_signalled(one, two, drain=10))
        await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        await server.seen(CANCEL)
        await other.seen(CANCEL)
        assert not running.done()
        go.set()
        assert (await within(running)).drained == 2
