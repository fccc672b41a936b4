"""The runner of callbacks, without a broker: order, tasks, contexts, and that nothing stops it."""

from __future__ import annotations

import asyncio
import contextvars

import pytest

from leveret.consumer import CallbackConsumer
from leveret.draining import drain
from leveret.exceptions import ChannelClosed, ChannelNotFoundEntity, ConnectionClosed, ConsumerCancelled
from leveret.prompt import Wakeups
from leveret.wire.hand import Hand
from leveret.wire.output import Output

VARIABLE = contextvars.ContextVar("VARIABLE", default="unset")


hands: list[Hand] = []


@pytest.fixture(autouse=True)
async def no_hand_waits():
    """As when their connections are closed."""
    yield
    for hand in hands:
        hand.end()
    hands.clear()
    await asyncio.sleep(0)


async def nothing(seconds):
    """Cancels no consumer."""


class Consumer(CallbackConsumer):
    __slots__ = ("cancellations", "tasks")

    def __init__(self, callback, no_ack=False, **options):
        self.tasks: set[asyncio.Task[None]] = set()
        self.cancellations: list[ConsumerCancelled] = []
        context = contextvars.copy_context()
        unsubscribe = options.pop("unsubscribe", nothing)
        cancelled = self.cancellations.append
        super().__init__(callback, no_ack, self.tasks, cancelled, context, unsubscribe, lambda: "a consumer", **options)
        self._hand = Hand(Wakeups(), Output(1))
        hands.append(self._hand)

    def deliver(self, *tags: int) -> None:
        for tag in tags:
            self.on_delivery(tag, False, b"\x00\x00", b"\x00\x00", b"")

    async def rest(self) -> None:
        """Wait until nothing runs any more."""
        for _ in range(50):
            await asyncio.sleep(0)


async def test_callbacks_that_do_not_wait_share_one_task():
    ran = []

    async def callback(message):
        ran.append((message.delivery_tag, asyncio.current_task()))

    consumer = Consumer(callback)
    consumer.deliver(*range(100))
    await consumer.rest()
    assert [tag for tag, _ in ran] == list(range(100))
    assert len({task for _, task in ran}) == 1
    assert not consumer.tasks


async def test_a_callback_that_waits_does_not_hold_up_the_next_and_has_a_task_of_its_own():
    go, began, ended = asyncio.Event(), [], []

    async def callback(message):
        began.append((message.delivery_tag, asyncio.current_task()))
        await go.wait()
        assert asyncio.current_task() is began[message.delivery_tag][1]
        ended.append(message.delivery_tag)

    consumer = Consumer(callback)
    consumer.deliver(0, 1, 2)
    await consumer.rest()
    assert [tag for tag, _ in began] == [0, 1, 2]
    assert len({task for _, task in began}) == len(consumer.tasks) == 3
    go.set()
    await consumer.rest()
    assert ended == [0, 1, 2]
    assert not consumer.tasks


async def test_context_variables_do_not_leak_from_one_callback_into_another():
    seen = []

    async def callback(message):
        seen.append(VARIABLE.get())
        VARIABLE.set(message.delivery_tag)
        if message.delivery_tag % 2:
            await asyncio.sleep(0)
        seen.append(VARIABLE.get())

    VARIABLE.set("consume")
    consumer = Consumer(callback)
    VARIABLE.set("later")
    consumer.deliver(1, 2, 3)
    await consumer.rest()
    assert sorted(map(str, seen)) == ["1", "2", "3", "consume", "consume", "consume"]
    assert VARIABLE.get() == "later"


@pytest.mark.expects_errors
@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("error", [LookupError("why"), StopIteration(), StopAsyncIteration(), TimeoutError()])
async def test_a_callback_that_fails_does_not_stop_the_next(error, waits):
    ran = []

    async def callback(message):
        ran.append(message.delivery_tag)
        if waits:
            await asyncio.sleep(0)
        raise error

    consumer = Consumer(callback)
    consumer.deliver(1, 2)
    await consumer.rest()
    consumer.deliver(3)
    await consumer.rest()
    assert ran == [1, 2, 3]


@pytest.mark.expects_errors
@pytest.mark.parametrize("waits", [False, True])
async def test_a_callback_that_ends_in_cancellation_does_not_stop_the_next(waits):
    """As when it awaits a future that somebody else cancelled."""
    cancelled = asyncio.get_running_loop().create_future()
    cancelled.cancel()
    ran = []

    async def callback(message):
        ran.append(message.delivery_tag)
        if waits:
            await asyncio.sleep(0)
        await cancelled

    consumer = Consumer(callback)
    consumer.deliver(1, 2)
    await consumer.rest()
    consumer.deliver(3)
    await consumer.rest()
    assert ran == [1, 2, 3]


async def test_a_callback_that_cancels_its_own_task_does_not_cancel_the_next():
    ended = []

    async def callback(message):
        if message.delivery_tag == 1:
            asyncio.current_task().cancel()
            return
        await asyncio.sleep(0)
        ended.append(message.delivery_tag)

    consumer = Consumer(callback)
    consumer.deliver(1, 2, 3)
    await consumer.rest()
    assert ended == [2, 3]


async def test_a_runner_that_is_cancelled_before_it_began_does_not_stop_the_next():
    ran = []

    async def callback(message):
        ran.append(message.delivery_tag)

    consumer = Consumer(callback)
    consumer.deliver(1)
    (task,) = asyncio.all_tasks() - {asyncio.current_task()}
    task.cancel()
    await consumer.rest()
    assert ran == [1]
    consumer.deliver(2)
    await consumer.rest()
    assert ran == [1, 2]


async def test_a_callback_that_cancels_its_own_task_and_waits_is_ended_and_the_others_run():
    ended = []

    async def callback(message):
        if message.delivery_tag == 1:
            asyncio.current_task().cancel()
        await asyncio.sleep(0)
        ended.append(message.delivery_tag)

    consumer = Consumer(callback)
    consumer.deliver(1, 2, 3)
    await consumer.rest()
    assert ended == [2, 3]
    assert consumer.in_flight == 0


async def test_a_cancellation_that_a_callback_took_back_cancels_no_other():
    """As a TaskGroup does before Python 3.13 whose tasks are eager, and fail: it cancels the next thing waited for."""
    ended = []

    async def callback(message):
        if message.delivery_tag == 1:
            asyncio.current_task().cancel()
            asyncio.current_task().uncancel()
            return
        await asyncio.sleep(0)
        ended.append(message.delivery_tag)

    consumer = Consumer(callback)
    consumer.deliver(1, 2, 3)
    await consumer.rest()
    assert ended == [2, 3]


async def test_once_it_is_stopped_no_callback_begins_not_even_those_that_were_about_to():
    ran = []
    consumer = Consumer(ran.append)
    consumer.deliver(1, 2)
    consumer.begin_stop(asyncio.get_running_loop().time() + 5)
    await consumer.rest()
    assert ran == []
    assert consumer.report.requeued == 2


async def test_what_needs_no_ack_and_was_about_to_be_handled_is_waited_for_when_it_is_drained():
    ran = []
    consumer = Consumer(lambda message: ran.append(message.delivery_tag), no_ack=True)
    consumer.deliver(1, 2)
    report = await drain([consumer], 5, 1)
    assert ran == [1, 2]
    assert report.abandoned == 0


async def test_a_lower_limit_counts_for_those_that_were_about_to_begin():
    ran, go = [], asyncio.Event()

    async def callback(message):
        ran.append(message.delivery_tag)
        await go.wait()

    consumer = Consumer(callback, concurrency=3)
    consumer.deliver(1, 2)
    await consumer.rest()
    consumer.deliver(3)
    consumer.limit(2)
    await consumer.rest()
    assert ran == [1, 2]
    go.set()
    await consumer.rest()
    assert ran == [1, 2, 3]


@pytest.mark.parametrize("kind", ["plain", "future", "awaitable", "coroutine"])
async def test_a_callback_may_return_anything_that_can_be_awaited_or_nothing(kind):
    ran = []

    class Awaitable:
        def __await__(self):
            yield from asyncio.sleep(0).__await__()
            ran.append("awaited")

    def callback(message):
        ran.append(message.delivery_tag)
        if kind == "future":
            future = asyncio.get_running_loop().create_future()
            future.get_loop().call_soon(future.set_result, None)
            return future
        if kind == "awaitable":
            return Awaitable()
        return asyncio.sleep(0) if kind == "coroutine" else None

    consumer = Consumer(callback)
    consumer.deliver(1, 2)
    await consumer.rest()
    assert [tag for tag in ran if tag != "awaited"] == [1, 2]
    assert ran.count("awaited") == (2 if kind == "awaitable" else 0)


async def test_what_no_callback_has_started_on_is_dropped_when_the_channel_is_lost():
    ran = []

    async def callback(message):
        ran.append(message.delivery_tag)

    consumer = Consumer(callback)
    consumer.deliver(1, 2)
    consumer.on_end(ConnectionClosed("lost"))
    await consumer.rest()
    assert ran == []


async def test_what_needs_no_ack_is_handed_out_although_the_channel_is_lost():
    """The broker does not deliver it again."""
    ran = []

    async def callback(message):
        ran.append(message.delivery_tag)

    consumer = Consumer(callback, no_ack=True)
    consumer.deliver(1, 2)
    consumer.on_end(ConnectionClosed("lost"))
    await consumer.rest()
    assert ran == [1, 2]


async def test_the_broker_s_cancellation_is_told_once_and_what_it_had_delivered_is_handed_out():
    ran = []

    async def callback(message):
        ran.append(message.delivery_tag)

    consumer = Consumer(callback)
    error = ConsumerCancelled("tag")
    consumer.deliver(1, 2)
    consumer.on_end(error)
    await consumer.rest()
    assert consumer.cancellations == [error]
    assert ran == [1, 2]


@pytest.mark.parametrize(
    "error",
    [
        ConnectionClosed("lost"),
        ChannelNotFoundEntity("no queue"),
        ChannelClosed("the channel was closed", reply_code=200, reply_text="Normal shutdown"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_no_other_end_is_told_as_a_cancellation(error, caplog):
    consumer = Consumer(lambda message: None)
    consumer.on_end(error)
    await consumer.rest()
    assert consumer.cancellations == []
    assert not caplog.records


async def test_timeouts_in_a_callback_end_what_they_are_around():
    seen, both = [], asyncio.Event()

    async def callback(message):
        try:
            async with asyncio.timeout(0.01):
                await asyncio.Event().wait()
        except TimeoutError:
            seen.append(message.delivery_tag)
            if len(seen) == 2:
                both.set()

    consumer = Consumer(callback)
    consumer.deliver(1, 2)
    async with asyncio.timeout(5):
        await both.wait()
    await consumer.rest()
    assert seen == [1, 2]
