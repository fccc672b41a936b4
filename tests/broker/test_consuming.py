"""Consuming: callbacks and iterators, prefetch, cancelling, what happens when a callback fails."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import logging
import random
from typing import TYPE_CHECKING, Any

import pytest
from pamqp import commands

from leveret import Channel, Connection, IncomingMessage, Message, connect
from leveret.exceptions import (
    ChannelAccessRefused,
    ChannelClosed,
    ConsumerCancelled,
    DuplicateConsumerTag,
    MessageProcessError,
)
from tests.broker.test_helpers import consumers, drain, eventually, fill, holds

if TYPE_CHECKING:
    from collections.abc import Callable

    from leveret import Queue
    from tests.support.brokers import RemoteBroker
    from tests.support.node import Node

Received = asyncio.Queue[IncomingMessage]


@pytest.fixture
def received() -> Received:
    return asyncio.Queue()


async def take(received: Received, count: int) -> list[IncomingMessage]:
    async with asyncio.timeout(10):
        return [await received.get() for _ in range(count)]


# --------------------------------------------------------------------------------------------------- callbacks


def coroutine_function(received: Received) -> Any:
    async def callback(message: IncomingMessage) -> None:
        await asyncio.sleep(0)
        received.put_nowait(message)

    return callback


def coroutine_function_that_never_waits(received: Received) -> Any:
    async def callback(message: IncomingMessage) -> None:
        received.put_nowait(message)

    return callback


def plain_function(received: Received) -> Any:
    def callback(message: IncomingMessage) -> None:
        received.put_nowait(message)

    return callback


def partial(received: Received) -> Any:
    async def callback(received: Received, message: IncomingMessage) -> None:
        await received.put(message)

    return functools.partial(callback, received)


def bound_method(received: Received) -> Any:
    return received.put


def callable_object(received: Received) -> Any:
    class Callback:
        async def __call__(self, message: IncomingMessage) -> None:
            await received.put(message)

    return Callback()


def function_that_returns_a_task(received: Received) -> Any:
    return lambda message: asyncio.ensure_future(received.put(message))


@pytest.mark.parametrize(
    "make",
    [
        coroutine_function,
        coroutine_function_that_never_waits,
        plain_function,
        partial,
        bound_method,
        callable_object,
        function_that_returns_a_task,
    ],
)
async def test_any_callable_is_a_callback(
    channel: Channel, queue: Queue, received: Received, make: Callable[[Received], Any]
) -> None:
    tag = await queue.consume(make(received))
    await fill(channel, queue, [b"%d" % i for i in range(50)])
    messages = await take(received, 50)
    assert [message.body for message in messages] == [b"%d" % i for i in range(50)]
    assert {message.consumer_tag for message in messages} == {tag}
    assert [message.delivery_tag for message in messages] == list(range(1, 51))
    await asyncio.gather(*[message.ack() for message in messages])
    assert isinstance(await queue.cancel(tag), commands.Basic.CancelOk)
    assert await consumers(channel, queue) == 0
    await holds(channel, queue, 0)


async def test_what_cannot_be_called_is_refused(queue: Queue) -> None:
    with pytest.raises(TypeError, match="callable"):
        await queue.consume("print")  # type: ignore[arg-type]


async def test_callbacks_run_at_the_same_time(channel: Channel, queue: Queue) -> None:
    together = asyncio.Barrier(10)

    async def callback(message: IncomingMessage) -> None:
        async with asyncio.timeout(10):
            await together.wait()
        await message.ack()

    await queue.consume(callback)
    await fill(channel, queue, [b""] * 30)
    await holds(channel, queue, 0)
    await eventually(lambda: not channel.handler_tasks)


async def test_prefetch_bounds_the_callbacks_in_flight(channel: Channel, queue: Queue) -> None:
    running, most, done = 0, 0, 0
    go = asyncio.Event()

    async def callback(message: IncomingMessage) -> None:
        nonlocal running, most, done
        running += 1
        most = max(most, running)
        await go.wait()
        running -= 1
        done += 1
        await message.ack()

    await channel.set_qos(3)
    await queue.consume(callback)
    await fill(channel, queue, [b""] * 20)
    await eventually(lambda: running == 3)
    await holds(channel, queue, 17)  # and no fourth one came meanwhile
    assert running == 3
    go.set()
    await eventually(lambda: done == 20)
    assert most == 3


async def test_global_prefetch_counts_for_all_consumers_of_the_channel(
    broker: Node | RemoteBroker, channel: Channel, received: Received
) -> None:
    allowed = 6 if broker.version_info >= (4, 3) else 3  # 4.3 takes no global one any more: each consumer has it
    await channel.set_qos(3, global_=True)
    queues = [await channel.declare_queue(exclusive=True) for _ in range(2)]
    for queue in queues:
        await fill(channel, queue, [b""] * 5)
        await queue.consume(received.put)
    first = await take(received, allowed)
    await channel.get_queue(queues[0].name)
    assert received.empty()
    await asyncio.gather(*[message.ack() for message in first])
    await take(received, min(10 - allowed, allowed))


async def test_context_variables_are_each_callbacks_own(channel: Channel, queue: Queue, received: Received) -> None:
    variable: contextvars.ContextVar[bytes] = contextvars.ContextVar("variable", default=b"unset")
    seen: list[tuple[bytes, bytes, bytes]] = []

    async def callback(message: IncomingMessage) -> None:
        before = variable.get()
        variable.set(message.body)
        if message.body != b"1":  # which does not wait
            await asyncio.sleep(0.001)
        seen.append((message.body, before, variable.get()))
        await message.ack()

    variable.set(b"outside")
    await queue.consume(callback)
    variable.set(b"later")
    await fill(channel, queue, [b"%d" % i for i in range(20)])
    await eventually(lambda: len(seen) == 20)
    assert sorted(seen) == sorted((b"%d" % i, b"outside", b"%d" % i) for i in range(20))
    assert variable.get() == b"later"


async def test_a_callback_is_its_own_task_while_it_waits(channel: Channel, queue: Queue) -> None:
    tasks: list[tuple[object, object]] = []
    timed_out: list[bytes] = []

    async def callback(message: IncomingMessage) -> None:
        before = asyncio.current_task()
        try:
            async with asyncio.timeout(0.01):
                await asyncio.Event().wait()
        except TimeoutError:
            timed_out.append(message.body)
        tasks.append((before, asyncio.current_task()))
        await message.ack()

    await queue.consume(callback)
    await fill(channel, queue, [b"%d" % i for i in range(5)])
    await eventually(lambda: len(tasks) == 5)
    assert all(before is after for before, after in tasks)
    assert len({before for before, _ in tasks}) == 5
    assert sorted(timed_out) == [b"%d" % i for i in range(5)]


@pytest.mark.expects_errors
@pytest.mark.parametrize("waits", [True, False])
async def test_a_failing_callback_is_logged_once_and_leaves_the_message(
    connection: Connection, channel: Channel, queue: Queue, caplog: pytest.LogCaptureFixture, waits: bool
) -> None:
    seen: list[bytes] = []

    async def callback(message: IncomingMessage) -> None:
        seen.append(message.body)
        if waits:
            await asyncio.sleep(0)
        if message.body == b"bad":
            raise ZeroDivisionError("oops")
        await message.ack()

    async with connection.channel() as other:
        await (await other.get_queue(queue.name)).consume(callback)
        await fill(channel, queue, [b"1", b"bad", b"2"], message_id="the-id")
        await eventually(lambda: len(seen) == 3)
        await eventually(lambda: not other.handler_tasks)
        await holds(channel, queue, 0)
    [record] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert "the-id" in record.getMessage()
    assert "oops" in record.getMessage()
    assert record.exc_info
    assert record.exc_info[0] is ZeroDivisionError
    await holds(channel, queue, 1)
    message = await queue.get()
    assert (message.body, message.redelivered) == (b"bad", True)
    await message.ack()


@pytest.mark.expects_errors
async def test_a_callback_that_fails_after_it_settled_changes_nothing(channel: Channel, queue: Queue) -> None:
    seen: list[bytes] = []

    async def callback(message: IncomingMessage) -> None:
        async with message.process():
            seen.append(message.body)
            raise ZeroDivisionError

    await queue.consume(callback)
    await fill(channel, queue, [b"1", b"2"])
    await eventually(lambda: len(seen) == 2)
    assert not channel.is_closed
    await channel.close()
    await channel.reopen()
    await holds(channel, queue, 0)


@pytest.mark.parametrize("seed", range(4))
async def test_settling_in_any_order_and_manner_leaves_nothing(
    connection: Connection, channel: Channel, queue: Queue, seed: int
) -> None:
    rng = random.Random(seed)
    settled: set[bytes] = set()

    async def callback(message: IncomingMessage) -> None:
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(rng.random() / 200)
        verb = rng.choice(["ack", "ack", "ack", "nack", "reject", "requeue", "put back"])
        if verb == "ack":
            await message.ack()
        elif verb == "nack":
            await message.nack(requeue=False)
        elif verb == "reject":
            await message.reject()
        elif verb == "requeue":
            await message.nack()
            return
        else:
            await message.reject(requeue=True)
            return
        settled.add(message.body)

    async with connection.channel() as other:
        await other.set_qos(rng.choice([0, 7, 50]))
        await (await other.get_queue(queue.name)).consume(callback)
        await fill(channel, queue, [b"%d" % i for i in range(500)])
        await eventually(lambda: len(settled) == 500, 60)
        await other.get_queue(queue.name)
        assert not other.is_closed
    await holds(channel, queue, 0)


@pytest.mark.parametrize("seed", range(2))
async def test_multiple_among_single_acks_leaves_nothing(
    connection: Connection, channel: Channel, queue: Queue, seed: int
) -> None:
    rng = random.Random(seed)
    done = 0

    async def callback(message: IncomingMessage) -> None:
        nonlocal done
        if rng.random() < 0.7:
            await asyncio.sleep(rng.random() / 500)
        with contextlib.suppress(MessageProcessError):  # a multiple was faster
            await message.ack(multiple=rng.random() < 0.2)
        done += 1

    async with connection.channel() as other:
        await other.set_qos(20)
        await (await other.get_queue(queue.name)).consume(callback)
        await fill(channel, queue, [b""] * 500)
        await eventually(lambda: done == 500, 60)
        await other.get_queue(queue.name)
    await holds(channel, queue, 0)


async def test_no_ack_consumer(connection: Connection, channel: Channel, queue: Queue, received: Received) -> None:
    async with connection.channel() as other:
        await (await other.get_queue(queue.name)).consume(received.put, no_ack=True)
        await fill(channel, queue, [b"1", b"2"])
        messages = await take(received, 2)
        assert [message.processed for message in messages] == [True, True]
    await holds(channel, queue, 0)


async def test_exclusive_consumer(connection: Connection, queue: Queue, received: Received) -> None:
    await queue.consume(received.put, exclusive=True)
    async with connection.channel() as other:
        with pytest.raises(ChannelAccessRefused):
            await (await other.get_queue(queue.name)).consume(received.put)


async def test_consumer_arguments_and_tag_reach_the_broker(channel: Channel, queue: Queue, received: Received) -> None:
    low: Received = asyncio.Queue()
    await queue.consume(low.put, arguments={"x-priority": 1})
    assert await queue.consume(received.put, arguments={"x-priority": 5}, consumer_tag="mine ä") == "mine ä"
    await fill(channel, queue, [b"%d" % i for i in range(10)])
    assert {message.consumer_tag for message in await take(received, 10)} == {"mine ä"}
    assert low.empty()


async def test_a_tag_in_use_is_refused_here(channel: Channel, queue: Queue, received: Received) -> None:
    await queue.consume(received.put, consumer_tag="mine")
    with pytest.raises(DuplicateConsumerTag):
        await queue.consume(received.put, consumer_tag="mine")
    await queue.cancel("mine")
    await queue.consume(received.put, consumer_tag="mine")
    await fill(channel, queue, [b"1"])
    await take(received, 1)


async def test_a_refused_consume_leaves_its_tag_free(connection: Connection, queue: Queue, received: Received) -> None:
    async with connection.channel() as channel:
        missing = await channel.get_queue(f"{queue.name}-missing", ensure=False)
        with pytest.raises(ChannelClosed):
            await missing.consume(received.put, consumer_tag="mine")
        await channel.reopen()
        there = await channel.get_queue(queue.name)
        assert await there.consume(received.put, consumer_tag="mine") == "mine"


async def test_callbacks_that_run_may_ack_after_cancel(connection: Connection, channel: Channel, queue: Queue) -> None:
    go, started, acked = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def callback(message: IncomingMessage) -> None:
        started.set()
        await go.wait()
        await message.ack()
        acked.set()

    async with connection.channel() as other:
        theirs = await other.get_queue(queue.name)
        tag = await theirs.consume(callback)
        await fill(channel, queue, [b"1"])
        await asyncio.wait_for(started.wait(), 5)
        await theirs.cancel(tag)
        go.set()
        await asyncio.wait_for(acked.wait(), 5)
    await holds(channel, queue, 0)


async def test_what_arrives_after_a_cancel_without_waiting_is_requeued(
    connection: Connection, channel: Channel, queue: Queue, received: Received
) -> None:
    await fill(channel, queue, [b"%d" % i for i in range(500)])
    async with connection.channel() as other:
        theirs = await other.get_queue(queue.name)
        tag = await theirs.consume(received.put)
        await theirs.cancel(tag, nowait=True)
        assert await consumers(other, queue) == 0
        for message in [received.get_nowait() for _ in range(received.qsize())]:
            await message.nack()
        await holds(other, queue, 500)
    assert sorted(await drain(queue), key=int) == [b"%d" % i for i in range(500)]


async def test_publishing_and_declaring_inside_a_callback(channel: Channel, queue: Queue, received: Received) -> None:
    async def callback(message: IncomingMessage) -> None:
        async with message.process():
            answers = await channel.declare_queue(message.reply_to, passive=True)
            await channel.default_exchange.publish(Message(message.body.upper()), answers.name)

    answers = await channel.declare_queue(exclusive=True)
    await queue.consume(callback)
    await answers.consume(received.put, no_ack=True)
    await fill(channel, queue, [b"abc"] * 20, reply_to=answers.name)
    assert {message.body for message in await take(received, 20)} == {b"ABC"}


# --------------------------------------------------------------------------------------------------- iterators


async def test_async_for_over_a_queue(channel: Channel, queue: Queue) -> None:
    await fill(channel, queue, [b"1", b"2", b"3"])
    bodies = []
    iterator = aiter(queue)
    async for message in iterator:
        bodies.append(message.body)
        await message.ack()
        if len(bodies) == 3:
            break
    assert bodies == [b"1", b"2", b"3"]
    await iterator.close()
    assert await consumers(channel, queue) == 0


async def test_leaving_the_block_requeues_the_rest_in_order(channel: Channel, queue: Queue) -> None:
    await fill(channel, queue, [b"%d" % i for i in range(100)])
    async with queue.iterator() as messages:
        async for message in messages:
            await message.ack()
            if message.body == b"9":
                break
    assert await consumers(channel, queue) == 0
    await holds(channel, queue, 90)
    assert await drain(queue) == [b"%d" % i for i in range(10, 100)]


async def test_an_exception_in_the_block_requeues_the_rest_too(channel: Channel, queue: Queue) -> None:
    async def fail() -> None:
        async with queue.iterator() as messages:
            async for message in messages:
                async with message.process(requeue=True):
                    raise ZeroDivisionError

    await fill(channel, queue, [b"%d" % i for i in range(10)])
    with pytest.raises(ZeroDivisionError):
        await fail()
    await holds(channel, queue, 10)
    assert await drain(queue) == [b"%d" % i for i in range(10)]


async def test_an_iterator_is_usable_after_its_timeout(channel: Channel, queue: Queue) -> None:
    async with queue.iterator(timeout=0.1) as messages:
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await anext(messages)
        await fill(channel, queue, [b"1"])
        message = await anext(messages)
        assert (message.body, message.redelivered) == (b"1", False)
        await message.ack()


async def test_a_cancelled_anext_takes_no_message(channel: Channel, queue: Queue) -> None:
    async with queue.iterator() as messages:
        for _ in range(2):  # R15
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(messages), 0.02)
        await fill(channel, queue, [b"1"])
        message = await asyncio.wait_for(anext(messages), 5)
        assert (message.body, message.redelivered) == (b"1", False)
        await message.ack()


async def test_an_anext_cancelled_at_any_moment_loses_nothing(channel: Channel, queue: Queue) -> None:
    rng = random.Random(3)
    bodies: list[bytes] = []
    async with queue.iterator() as messages:
        for i in range(100):
            task = asyncio.create_task(messages.__anext__())
            publish = channel.default_exchange.publish(Message(b"%d" % i), queue.name)
            for _ in range(rng.randrange(12)):
                await asyncio.sleep(0)
            task.cancel()
            for result in await asyncio.gather(task, return_exceptions=True):
                if isinstance(result, IncomingMessage):
                    bodies.append(result.body)
                    await result.ack()
            await publish
        while len(bodies) < 100:
            message = await asyncio.wait_for(anext(messages), 5)
            bodies.append(message.body)
            await message.ack()
    assert bodies == [b"%d" % i for i in range(100)]


async def test_two_tasks_share_an_iterator(channel: Channel, queue: Queue) -> None:
    bodies: list[bytes] = []

    async def work() -> None:
        async for message in messages:
            bodies.append(message.body)
            await message.ack()

    async with queue.iterator() as messages, asyncio.TaskGroup() as group:
        tasks = [group.create_task(work()) for _ in range(3)]
        await fill(channel, queue, [b"%d" % i for i in range(30)])
        await eventually(lambda: len(bodies) == 30)
        await messages.close()  # ends them
        await asyncio.wait_for(asyncio.gather(*tasks), 5)
    assert sorted(bodies, key=int) == [b"%d" % i for i in range(30)]


async def test_iterator_arguments(connection: Connection, channel: Channel, queue: Queue) -> None:
    await fill(channel, queue, [b"1", b"2"])
    async with queue.iterator(no_ack=True, exclusive=True, consumer_tag="mine") as messages:
        assert messages.consumer_tag == "mine"
        assert (await anext(messages)).consumer_tag == "mine"
        assert (await anext(messages)).processed
        async with connection.channel() as other:
            with pytest.raises(ChannelAccessRefused):
                await (await other.get_queue(queue.name)).consume(print)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["channel", "connection"])
async def test_closing_ends_the_loop(amqp_url: str, how: str) -> None:
    async with await connect(amqp_url) as connection, connection.channel() as channel:
        queue = await channel.declare_queue(exclusive=True)
        looping = asyncio.Event()

        async def loop() -> int:
            count = 0
            async with queue.iterator() as messages:
                looping.set()
                async for message in messages:
                    await message.ack()
                    count += 1
            return count

        task = asyncio.create_task(loop())
        await looping.wait()
        await fill(channel, queue, [b""] * 3)
        await holds(channel, queue, 0)
        await (channel if how == "channel" else connection).close()
        assert await asyncio.wait_for(task, 5) == 3


# -------------------------------------------------------------------------------------- cancelled by the broker


async def test_an_iterator_learns_that_its_queue_is_gone(connection: Connection, channel: Channel, name: str) -> None:
    queue = await channel.declare_queue(name, exclusive=True)
    await fill(channel, queue, [b"1"])
    async with queue.iterator() as messages, connection.channel() as other:
        waiting = await anext(messages)
        task = asyncio.create_task(messages.__anext__())
        await other.queue_delete(name)
        with pytest.raises(ConsumerCancelled) as caught:
            await asyncio.wait_for(task, 5)
        assert caught.value.consumer_tag == messages.consumer_tag
        with pytest.raises(ConsumerCancelled):
            await anext(messages)
        await waiting.ack()
    assert not channel.is_closed


async def test_a_callback_consumer_whose_queue_is_gone_is_logged(
    connection: Connection, channel: Channel, name: str, caplog: pytest.LogCaptureFixture, received: Received
) -> None:
    queue = await channel.declare_queue(name, exclusive=True)
    tag = await queue.consume(received.put, consumer_tag="the-tag")
    async with connection.channel() as other:
        await other.queue_delete(name)
    await channel.declare_queue(name, exclusive=True)
    records = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.levelno for record in records] == [logging.WARNING]
    assert tag in records[0].getMessage()
    assert not channel.is_closed
    await queue.consume(received.put, consumer_tag=tag)
    await fill(channel, queue, [b"again"])
    assert [message.body for message in await take(received, 1)] == [b"again"]
