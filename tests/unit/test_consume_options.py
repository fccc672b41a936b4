"""What `consume()` can do besides calling back: concurrency, verdicts, on_error, threads, stopping."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import logging
import sys
import threading
import types

import pytest

from leveret import Ack, DrainReport, IncomingMessage, Nack, Reject, Requeue, Verdict, failures
from leveret.consumer import CallbackConsumer
from leveret.draining import check_drain, drain
from leveret.exceptions import ConnectionClosed, ConsumerCancelled, DeliveryLost
from leveret.failures import failure_handler
from leveret.message import incoming_message
from leveret.outcome import DONE
from leveret.prompt import Wakeups
from leveret.settling import WireOfConsumer
from leveret.threads import in_thread
from leveret.wire.hand import Hand
from leveret.wire.output import Output

VARIABLE = contextvars.ContextVar("VARIABLE", default="unset")


wires: list[FakeWire] = []


@pytest.fixture(autouse=True)
async def no_hand_waits():
    """As when their connections are closed."""
    yield
    for wire in wires:
        wire.transport.hand.end()
    wires.clear()
    await asyncio.sleep(0)


class FakeWire:
    """Keeps what is settled."""

    def __init__(self):
        self.settled: list[tuple[str, int]] = []
        self.later: list[int] = []
        self.error: Exception | None = None
        self.cancelled: dict[bytes | None, bool] = {}
        self.watchers = []
        self.flushed = 0
        self.transport = types.SimpleNamespace(hand=Hand(Wakeups(), Output(1)))
        wires.append(self)

    is_open = property(lambda self: self.error is None)
    settler = property(lambda self: self)

    def server_supports(self, capability):
        return True

    def settle(self, verb, tag):
        if self.error is not None:
            raise DeliveryLost("lost")
        self.settled.append((verb, tag))
        return DONE

    def ack(self, tag, multiple=False):
        return self.settle("ack", tag)

    def ack_later(self, tag, count):
        self.later.append(tag)
        return DONE

    def nack(self, tag, multiple=False, requeue=True):
        return self.settle("nack" if requeue else "drop", tag)

    def reject(self, tag, requeue=False):
        return self.settle("requeue" if requeue else "reject", tag)

    def is_settled(self, tag):
        return any(tag == other for _, other in self.settled)

    def flush(self):
        self.flushed += 1

    def watch(self, callback):
        self.watchers.append(callback)

    def lose(self):
        self.error = ConnectionClosed("lost")
        for callback in self.watchers:
            callback()


def describe():
    return "consumer 'tag' of queue 'work'"


class Consumer(CallbackConsumer):
    """A consumer on a fake wire."""

    __slots__ = ("go", "tasks", "unsubscribed", "wire")

    def __init__(self, callback, no_ack=False, **options):
        self.tasks: set[asyncio.Task[None]] = set()
        self.unsubscribed: list[float] = []
        self.go = asyncio.Event()
        self.go.set()
        self.wire = FakeWire()
        context = contextvars.copy_context()
        super().__init__(callback, no_ack, self.tasks, [].append, context, self.unsubscribe, describe, **options)
        self.attach(self.wire, "tag")

    async def unsubscribe(self, seconds):
        self.unsubscribed.append(seconds)
        async with asyncio.timeout(seconds):
            await self.go.wait()

    def deliver(self, *tags: int) -> None:
        for tag in tags:
            self.on_delivery(tag, False, b"\x00\x00", b"\x00\x00", b"")

    @property
    def settled(self):
        return self.wire.settled


async def rest() -> None:
    """Let the loop run until nothing happens any more."""
    for _ in range(30):
        await asyncio.sleep(0)


class Gate:
    """A callback that waits until its message is let go."""

    def __init__(self, result=None):
        self.result = result
        self.began: list[int] = []
        self.ended: list[int] = []
        self.cancelled: list[int] = []
        self.gates: dict[int, asyncio.Event] = {}
        self.most = self.now = 0

    async def __call__(self, message: IncomingMessage):
        tag = message.delivery_tag
        self.began.append(tag)
        self.now += 1
        self.most = max(self.most, self.now)
        self.gates[tag] = asyncio.Event()
        try:
            await self.gates[tag].wait()
        except asyncio.CancelledError:
            self.cancelled.append(tag)
            raise
        finally:
            self.now -= 1
        self.ended.append(tag)
        return self.result

    def let_go(self, *tags: int) -> None:
        for tag in tags or list(self.gates):
            self.gates[tag].set()


# -------------------------------------------------------------------------------------------------- concurrency


async def test_no_more_callbacks_run_than_may_and_they_start_in_order():
    gate = Gate()
    consumer = Consumer(gate, concurrency=2)
    consumer.deliver(1, 2, 3, 4, 5)
    await rest()
    assert (gate.began, consumer.in_flight, consumer.waiting, consumer.delivered) == ([1, 2], 2, 3, 5)
    gate.let_go(2)
    await rest()
    assert gate.began == [1, 2, 3]
    gate.let_go(1, 3)
    await rest()
    assert gate.began == [1, 2, 3, 4, 5]
    consumer.deliver(6)
    await rest()
    assert 6 not in gate.began
    gate.let_go()
    await rest()
    gate.let_go()
    await rest()
    assert (gate.most, consumer.in_flight, consumer.waiting, consumer.tasks) == (2, 0, 0, set())


@pytest.mark.expects_errors
async def test_callbacks_that_fail_or_are_cancelled_make_room():
    gate = Gate()

    async def callback(message):
        await gate(message)
        raise LookupError

    consumer = Consumer(callback, concurrency=1)
    consumer.deliver(1, 2, 3)
    await rest()
    gate.let_go(1)
    await rest()
    assert gate.began == [1, 2]
    for task in list(consumer.tasks):
        task.cancel()
    await rest()
    assert gate.began == [1, 2, 3]
    gate.let_go(3)
    await rest()
    assert not consumer.tasks
    assert consumer.failures.count == 2


async def test_callbacks_that_do_not_wait_are_not_held_up_by_a_limit():
    ran = []
    consumer = Consumer(lambda message: ran.append(message.delivery_tag), concurrency=1)
    consumer.deliver(*range(1, 100))
    await rest()
    assert ran == list(range(1, 100))


async def test_the_limit_changes_while_callbacks_run():
    gate = Gate()
    consumer = Consumer(gate, concurrency=2)
    consumer.deliver(*range(1, 9))
    await rest()
    consumer.limit(4)
    await rest()
    assert gate.began == [1, 2, 3, 4]
    consumer.limit(1)
    await rest()
    gate.let_go(1, 2, 3)
    await rest()
    assert gate.began == [1, 2, 3, 4]
    gate.let_go(4)
    await rest()
    assert gate.began == [1, 2, 3, 4, 5]
    consumer.limit(None)
    await rest()
    assert gate.began == list(range(1, 9))
    gate.let_go()
    await rest()


async def test_a_callback_may_lower_the_limit_at_once():
    ran = []

    async def callback(message):
        ran.append(message.delivery_tag)
        if message.delivery_tag == 2:
            consumer.limit(1)
        if message.delivery_tag == 1:
            await gone.wait()

    gone = asyncio.Event()
    consumer = Consumer(callback, concurrency=3)
    consumer.deliver(1, 2, 3, 4)
    await rest()
    assert ran == [1, 2]
    gone.set()
    await rest()
    assert ran == [1, 2, 3, 4]


# ----------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize("kind", ["plain", "coroutine", "waits", "awaitable"])
@pytest.mark.parametrize(
    ("verdict", "verb"), [(Ack, "ack"), (Nack, "nack"), (Reject, "reject"), (Requeue, "requeue")], ids=str
)
async def test_what_a_callback_returns_settles_its_message(kind, verdict, verb):
    async def coroutine(message):
        if kind == "waits":
            await asyncio.sleep(0)
        return verdict

    def plain(message):
        if kind == "awaitable":
            return asyncio.ensure_future(coroutine(message))
        return verdict

    consumer = Consumer(plain if kind in {"plain", "awaitable"} else coroutine)
    consumer.deliver(1, 2)
    await rest()
    assert consumer.settled == [(verb, 1), (verb, 2)]


@pytest.mark.parametrize("result", [None, 0, "ack", True, object(), Verdict, b""])
@pytest.mark.parametrize("waits", [False, True])
async def test_anything_else_that_it_returns_means_nothing_which_is_told_once(result, waits, caplog):
    async def callback(message):
        if waits:
            await asyncio.sleep(0)
        return result

    consumer = Consumer(callback)
    consumer.deliver(1, 2)
    await rest()
    assert consumer.settled == []
    assert ["which means nothing" in record.getMessage() for record in caplog.records] == [True] * (result is not None)


@pytest.mark.parametrize("no_ack", [False, True])
async def test_a_verdict_on_what_is_settled_is_a_warning_once(no_ack, caplog):
    async def callback(message):
        if not no_ack:
            await message.reject()
        return Ack

    consumer = Consumer(callback, no_ack=no_ack)
    consumer.deliver(1, 2)
    await rest()
    assert consumer.settled == ([] if no_ack else [("reject", 1), ("reject", 2)])
    assert len(caplog.records) == 1
    assert ("no_ack" if no_ack else "settled already") in caplog.text


async def test_a_verdict_after_the_link_was_lost_is_quiet(caplog):
    gate = Gate(Ack)
    consumer = Consumer(gate)
    consumer.deliver(1)
    await rest()
    consumer.wire.lose()
    gate.let_go(1)
    await rest()
    assert gate.ended == [1]
    assert not [record for record in caplog.records if record.levelname != "DEBUG"]


# ------------------------------------------------------------------------------------------------------ on_error


def failing(waits: bool, error: BaseException):
    async def callback(message):
        if waits:
            await asyncio.sleep(0)
        raise error

    return callback


@pytest.mark.expects_errors
@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize(
    ("on_error", "settled"), [("leave", []), ("reject", [("reject", 1)]), ("requeue", [("requeue", 1)])]
)
async def test_on_error_settles_what_a_failed_callback_did_not(on_error, settled, waits, caplog):
    consumer = Consumer(failing(waits, LookupError("why")), on_failure=failure_handler(on_error))
    consumer.deliver(1)
    await rest()
    assert consumer.settled == settled
    assert consumer.failures.count == 1
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "delivery 1" in caplog.text


@pytest.mark.expects_errors
@pytest.mark.parametrize("on_error", ["reject", "requeue"])
async def test_on_error_leaves_alone_what_is_settled(on_error):
    async def callback(message):
        async with message.process(requeue=True):
            raise LookupError

    consumer = Consumer(callback, on_failure=failure_handler(on_error))
    consumer.deliver(1)
    await rest()
    assert consumer.settled == [("requeue", 1)]


@pytest.mark.expects_errors
@pytest.mark.parametrize("is_async", [False, True])
async def test_on_error_may_be_a_callable_which_may_return_a_verdict(is_async):
    seen = []

    def plain(message, error):
        seen.append((message.delivery_tag, str(error)))
        return Reject

    async def slow(message, error):
        await asyncio.sleep(0)
        return plain(message, error)

    consumer = Consumer(failing(True, LookupError("why")), on_failure=failure_handler(slow if is_async else plain))
    consumer.deliver(1, 2)
    await rest()
    assert seen == [(1, "why"), (2, "why")]
    assert consumer.settled == [("reject", 1), ("reject", 2)]


@pytest.mark.expects_errors
async def test_on_error_that_fails_is_logged_and_the_next_callback_runs(caplog):
    def on_error(message, error):
        raise ZeroDivisionError

    consumer = Consumer(failing(False, LookupError("why")), on_failure=failure_handler(on_error))
    consumer.deliver(1, 2)
    await rest()
    assert consumer.failures.count == 2
    assert caplog.text.count("on_error of consumer 'tag' of queue 'work' failed") == 2


async def test_on_error_is_not_asked_over_a_message_that_comes_again(caplog):
    asked = []
    consumer = Consumer(
        failing(True, DeliveryLost("gone")), on_failure=failure_handler(lambda message, error: asked.append(message))
    )
    consumer.deliver(1)
    await rest()
    assert (asked, consumer.failures.count) == ([], 0)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.expects_errors
async def test_on_error_sees_a_foreign_cancellation_and_not_that_of_the_callback():
    seen = []
    foreign = asyncio.get_running_loop().create_future()
    foreign.cancel()

    async def callback(message):
        await asyncio.sleep(0)
        if message.delivery_tag == 1:
            await foreign
        await asyncio.Event().wait()

    consumer = Consumer(callback, on_failure=failure_handler(lambda message, error: seen.append(type(error))))
    consumer.deliver(1, 2)
    await rest()
    for task in list(consumer.tasks):
        task.cancel()
    await rest()
    assert seen == [asyncio.CancelledError]


def test_on_error_must_be_one_of_the_choices():
    for wrong in ("drop", None, 5):
        with pytest.raises(ValueError, match="on_error"):
            failure_handler(wrong)  # type: ignore[arg-type]


@pytest.mark.expects_errors
async def test_failures_that_fill_the_prefetch_are_a_complaint_and_one_warning(caplog):
    messages = []

    async def callback(message):
        messages.append(message)
        raise LookupError

    consumer = Consumer(callback, prefetch=2)
    consumer.deliver(1)
    await rest()
    assert consumer.complaint is None
    consumer.deliver(2)
    await rest()
    assert "consumer 'tag' of queue 'work' gets nothing more: its callbacks left 2 messages" in consumer.complaint
    consumer.deliver(3)
    await rest()
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
    await messages[0].ack()
    await messages[2].ack()
    assert consumer.complaint is None
    consumer.deliver(4)
    await rest()
    assert consumer.complaint is not None
    consumer.on_end(ConsumerCancelled("tag"))
    assert consumer.complaint is None


@pytest.mark.expects_errors
async def test_what_on_error_leaves_takes_one_place_in_the_prefetch():
    consumer = Consumer(failing(True, LookupError()), prefetch=2, on_failure=failure_handler(lambda *_: None))
    consumer.deliver(1)
    await rest()
    assert consumer.complaint is None
    consumer.deliver(2)
    await rest()
    assert "left 2 messages" in consumer.complaint


@pytest.mark.expects_errors
async def test_what_on_error_leaves_to_somebody_who_settles_it_is_no_complaint():
    kept = []
    consumer = Consumer(
        failing(True, LookupError()), prefetch=1, on_failure=failure_handler(lambda m, _: kept.append(m))
    )
    consumer.deliver(1)
    await rest()
    await kept[0].ack()
    assert consumer.complaint is None


@pytest.mark.expects_errors
async def test_an_on_error_that_waits_in_vain_is_told_and_what_fails_is_counted_once(caplog):
    foreign = asyncio.get_running_loop().create_future()
    foreign.cancel()

    async def on_error(message, error):
        await foreign

    consumer = Consumer(failing(True, LookupError()), on_failure=failure_handler(on_error))
    consumer.deliver(1)
    await rest()
    assert consumer.failures.count == 1
    assert "on_error of consumer 'tag' of queue 'work' failed on delivery 1" in caplog.text


async def test_callbacks_that_settle_nothing_are_a_complaint_and_after_a_while_a_warning(caplog, monkeypatch):
    told = asyncio.Event()
    monkeypatch.setattr(failures, "_PATIENCE", 0.02)
    monkeypatch.setattr(failures._log, "warning", lambda *args: (logging.getLogger("told").warning(*args), told.set()))
    messages = []
    consumer = Consumer(messages.append, prefetch=2)
    consumer.deliver(1)
    await rest()
    assert consumer.complaint is None
    consumer.deliver(2)
    await rest()
    assert consumer.complaint is None
    assert not told.is_set()
    await told.wait()
    assert "'work' gets nothing more: its callbacks left 2 messages unacknowledged" in consumer.complaint
    assert "gets nothing more" in caplog.text
    await messages[0].ack()
    assert consumer.complaint is None


async def test_messages_that_are_acknowledged_later_are_not_warned_of(caplog, monkeypatch):
    monkeypatch.setattr(failures, "_PATIENCE", 0.02)
    looked = asyncio.Event()
    look_again = failures.Failures._look_again
    monkeypatch.setattr(failures.Failures, "_look_again", lambda *args: (look_again(*args), looked.set()))
    messages = []
    consumer = Consumer(messages.append, prefetch=2)
    consumer.deliver(1, 2)
    await rest()
    for message in messages:
        await message.ack()
    await looked.wait()
    assert not caplog.records


@pytest.mark.expects_errors
@pytest.mark.parametrize(("prefetch", "on_error"), [(0, "leave"), (1, "reject")])
async def test_nothing_to_complain_about(prefetch, on_error):
    consumer = Consumer(failing(False, LookupError()), prefetch=prefetch, on_failure=failure_handler(on_error))
    consumer.deliver(1, 2, 3)
    await rest()
    assert consumer.complaint is None


# -------------------------------------------------------------------------------------------------------- threads


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.001)


async def test_plain_functions_run_in_threads_with_their_context():
    seen = []

    def callback(message):
        seen.append((threading.get_ident() != here, VARIABLE.get()))
        VARIABLE.set("changed")
        return Ack

    here = threading.get_ident()
    VARIABLE.set("consume")
    consumer = Consumer(in_thread(callback))
    consumer.deliver(1, 2, 3)
    await until(lambda: len(consumer.settled) == 3)
    assert seen == [(True, "consume")] * 3
    assert VARIABLE.get() == "consume"


async def test_coroutine_functions_are_refused_where_a_thread_is_wanted():
    async def callback(message):
        pass

    class Callable_:  # noqa: N801
        async def __call__(self, message):
            pass

    for wrong in (callback, functools.partial(callback), Callable_()):
        with pytest.raises(TypeError, match="coroutine function"):
            in_thread(wrong)


@pytest.mark.expects_errors
@pytest.mark.parametrize("error", [LookupError("why"), StopIteration()], ids=repr)
async def test_a_thread_that_fails_is_a_callback_that_fails(error, caplog):
    def callback(message):
        raise error

    consumer = Consumer(in_thread(callback), on_failure=failure_handler("reject"))
    consumer.deliver(1)
    await until(lambda: consumer.settled)
    assert consumer.settled == [("reject", 1)]
    assert repr(error) in caplog.text or "StopIteration" in caplog.text


@pytest.mark.expects_errors
async def test_a_function_that_returns_an_awaitable_has_no_place_in_a_thread(caplog):
    async def work():
        pass

    consumer = Consumer(in_thread(lambda message: work()))
    consumer.deliver(1)
    await until(lambda: consumer.failures.count)
    assert "returned an awaitable" in caplog.text


async def test_settling_is_for_the_loops_thread_only():
    wire = FakeWire()
    via = WireOfConsumer(wire, None, threading.get_ident())
    message = incoming_message(via, b"tag", 1, False, b"\x00\x00", b"\x00\x00", b"", False)
    for verb in (message.ack, message.nack, message.reject):
        with pytest.raises(RuntimeError, match=r"return leveret\.Ack"):
            await asyncio.to_thread(verb)
    assert not message.processed
    assert message.is_live
    await message.nack()
    assert wire.settled == [("nack", 1)]


async def test_acks_go_in_batches_and_the_rest_does_not():
    wire = FakeWire()
    via = WireOfConsumer(wire, 10, None)
    messages = [incoming_message(via, b"tag", n, False, b"\x00\x00", b"\x00\x00", b"", False) for n in range(1, 5)]
    await messages[0].ack()
    await messages[1].nack()
    await messages[2].reject()
    await messages[3].ack(multiple=True)
    assert (wire.later, wire.settled) == ([1], [("nack", 2), ("reject", 3), ("ack", 4)])
    wire.cancelled[b"tag"] = False
    assert b"tag" in via.cancelled


# -------------------------------------------------------------------------------------------------------- stopping


async def test_what_runs_ends_and_what_waits_goes_back():
    gate = Gate(Ack)
    consumer = Consumer(gate, concurrency=2)
    consumer.deliver(1, 2, 3, 4)
    await rest()
    stopping = asyncio.create_task(drain([consumer], 5, 1))
    consumer.deliver(5)
    await rest()
    assert consumer.settled == [("nack", 3), ("nack", 4), ("nack", 5)]
    consumer.deliver(6)  # a broker that does not care
    await rest()
    assert consumer.settled[-1] == ("nack", 6)
    assert not stopping.done()
    gate.let_go()
    assert await stopping == DrainReport(drained=2, requeued=4)
    assert gate.began == [1, 2]
    assert consumer.settled[4:] == [("ack", 1), ("ack", 2)]
    assert consumer.wire.flushed == 1
    assert not consumer.tasks


async def test_nothing_goes_back_before_the_broker_has_cancelled():
    """It would come again, to this consumer."""
    consumer = Consumer(Gate(), concurrency=1)
    consumer.go.clear()
    consumer.deliver(1, 2, 3)
    await rest()
    stopping = asyncio.create_task(drain([consumer], 0, 5))
    await rest()
    assert consumer.settled == [("nack", 1)]  # its callback was cancelled
    consumer.go.set()
    assert await stopping == DrainReport(requeued=3)
    assert consumer.settled == [("nack", 1), ("nack", 2), ("nack", 3)]


async def test_at_the_deadline_callbacks_are_cancelled_and_their_messages_go_back():
    gate = Gate()

    async def callback(message):
        if message.delivery_tag == 2:
            await message.ack()
        if message.delivery_tag == 3:
            async with message.process():
                await gate(message)
        await gate(message)

    consumer = Consumer(callback)
    consumer.deliver(1, 2, 3)
    await rest()
    assert await drain([consumer], 0.01, 1) == DrainReport(requeued=2, abandoned=1)
    assert sorted(gate.cancelled) == [1, 2, 3]
    assert sorted(consumer.settled) == [("ack", 2), ("nack", 1), ("nack", 3)]


async def test_a_callback_that_ignores_its_cancellation_is_abandoned():
    end = asyncio.Event()

    async def callback(message):
        while not end.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await end.wait()
        await message.ack()

    consumer = Consumer(callback)
    consumer.deliver(1)
    await rest()
    assert await drain([consumer], 0, 0.01) == DrainReport(abandoned=1)
    end.set()
    await rest()
    assert consumer.settled == [("ack", 1)]
    assert await drain([consumer], 0, 0.01) == DrainReport(drained=1)


@pytest.mark.parametrize("times", [2, 5])
async def test_stopping_at_the_same_time_and_again_says_the_same(times):
    gate = Gate(Ack)
    consumer = Consumer(gate)
    consumer.deliver(1, 2)
    await rest()
    stops = [asyncio.create_task(drain([consumer], 5, 1)) for _ in range(times)]
    await rest()
    gate.let_go()
    assert await asyncio.gather(*stops) == [DrainReport(drained=2)] * times
    assert await drain([consumer], 0, 0) == DrainReport(drained=2)
    assert len(consumer.unsubscribed) == 1


async def test_a_second_stop_with_less_time_ends_the_first():
    gate = Gate()
    consumer = Consumer(gate)
    consumer.deliver(1)
    await rest()
    first = asyncio.create_task(drain([consumer], 60, 1))
    await rest()
    assert await drain([consumer], 0, 1) == DrainReport(requeued=1)
    assert await first == DrainReport(requeued=1)


async def test_callbacks_that_stop_their_consumer_do_not_wait_for_each_other():
    reports = []

    async def callback(message):
        if message.delivery_tag < 3:
            await asyncio.sleep(0)
        reports.append(await drain([consumer], 60, 1))
        await message.ack()

    consumer = Consumer(callback)
    consumer.deliver(1, 2, 3)
    async with asyncio.timeout(5):
        await rest()
        await asyncio.gather(*consumer.tasks)
    assert len(reports) == 3 - len([verb for verb, _ in consumer.settled if verb == "nack"])
    assert not consumer.tasks


async def test_a_callback_that_begins_with_stopping_its_consumer_is_not_waited_for():
    async def callback(message):
        await drain([consumer], 60, 1)
        await message.ack()

    consumer = Consumer(callback)
    consumer.deliver(1)
    async with asyncio.timeout(5):
        await rest()
        await asyncio.gather(*consumer.tasks)
    assert consumer.settled == [("ack", 1)]


async def test_two_consumers_whose_callbacks_stop_everything_end():
    consumers = []
    gate = Gate(Ack)

    async def callback(message):
        await asyncio.sleep(0)
        if message.delivery_tag == 1:
            await drain(consumers, 60, 1)
            return Ack
        return await gate(message)

    consumers += [Consumer(callback), Consumer(callback)]
    for consumer in consumers:
        consumer.deliver(1)
    consumers[0].deliver(2)
    await rest()
    gate.let_go()
    await rest()
    assert [consumer.settled for consumer in consumers] == [[("ack", 2), ("ack", 1)], [("ack", 1)]]


async def test_a_cancelled_stop_has_stopped_it():
    gate = Gate(Ack)
    consumer = Consumer(gate, concurrency=1)
    consumer.deliver(1, 2)
    await rest()
    stopping = asyncio.create_task(drain([consumer], 5, 1))
    await asyncio.sleep(0)
    stopping.cancel()
    await asyncio.wait([stopping])
    assert stopping.cancelled()
    await rest()
    assert consumer.settled == [("nack", 2)]
    gate.let_go(1)
    await rest()
    assert consumer.settled == [("nack", 2), ("ack", 1)]


async def test_when_the_link_is_lost_only_settled_work_is_waited_for():
    gate = Gate()

    async def callback(message):
        if message.delivery_tag == 1:
            await message.ack()
        await gate(message)

    consumer = Consumer(callback)
    consumer.deliver(1, 2)
    await rest()
    stopping = asyncio.create_task(drain([consumer], 60, 1))
    await rest()
    consumer.wire.lose()
    await rest()
    assert gate.cancelled == [2]
    gate.let_go(1)
    assert await stopping == DrainReport(drained=1, requeued=1)


async def test_there_is_nothing_to_wait_for_on_a_lost_link():
    gate = Gate()
    consumer = Consumer(gate, concurrency=1)
    consumer.deliver(1, 2)
    await rest()
    consumer.wire.lose()
    assert await drain([consumer], 60, 1) == DrainReport(requeued=2)
    assert consumer.settled == []


async def test_a_broker_that_does_not_answer_costs_the_grace_and_no_message():
    consumer = Consumer(Gate(), concurrency=1)
    consumer.go.clear()
    consumer.deliver(1, 2)
    await rest()
    assert await drain([consumer], 0, 0.01) == DrainReport(requeued=2)
    await rest()
    assert sorted(consumer.settled) == [("nack", 1), ("nack", 2)]


async def test_what_needs_no_ack_is_handled_until_the_deadline(caplog):
    gate = Gate()
    consumer = Consumer(gate, no_ack=True, concurrency=1)
    consumer.deliver(1, 2, 3, 4)
    await rest()
    stopping = asyncio.create_task(drain([consumer], 0.05, 1))
    await rest()
    gate.let_go(1)
    await rest()
    assert gate.began == [1, 2]
    assert await stopping == DrainReport(drained=1, abandoned=3)
    assert "2 messages were not handled" in caplog.text


async def test_stopping_what_has_nothing_to_do():
    consumer = Consumer(Gate())
    assert await drain([consumer], 0, 1) == DrainReport()
    assert await drain([], 0, 1) == DrainReport()
    assert consumer.is_stopping


@pytest.mark.parametrize("seconds", [-1, float("nan")])
def test_a_time_to_drain_is_not_negative(seconds):
    with pytest.raises(ValueError, match="drain"):
        check_drain(seconds)


def test_reports_add_up():
    assert DrainReport(1, 2, 3) + DrainReport(10, 20, 30) == DrainReport(11, 22, 33)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with 3.12")
async def test_with_eager_tasks():
    asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
    gate = Gate(Ack)
    consumer = Consumer(gate, concurrency=2)
    consumer.deliver(1, 2, 3)
    await rest()
    stopping = asyncio.create_task(drain([consumer], 5, 1))
    await rest()
    gate.let_go()
    assert await stopping == DrainReport(drained=2, requeued=1)
    assert gate.most == 2
