"""Callbacks are called in order, with their sender, and can neither fail nor block who calls them."""

import asyncio
import copy
import gc
import logging
import weakref

import pytest

from leveret.callbacks import CallbackCollection


class Sender:
    pass


@pytest.fixture
def sender():
    return Sender()


@pytest.fixture
def callbacks(sender):
    return CallbackCollection(sender)


def test_callbacks_get_the_sender_and_the_arguments_in_the_order_they_were_added(callbacks, sender):
    calls = []
    for number in range(5):
        callbacks.add(lambda *args, number=number, **kwargs: calls.append((number, args, kwargs)))
    callbacks(1, key=2)
    assert calls == [(number, (sender, 1), {"key": 2}) for number in range(5)]


def test_a_callback_is_added_once(callbacks):
    calls = []
    callbacks.add(calls.append)
    callbacks.add(calls.append)
    callbacks()
    assert len(calls) == len(callbacks) == 1


def test_it_is_a_set(callbacks):
    calls = []
    assert not callbacks
    callbacks.add(calls.append)
    assert callbacks
    assert calls.append in callbacks
    assert list(callbacks) == [calls.append]
    callbacks.remove(calls.append)
    callbacks.discard(calls.append)
    with pytest.raises(KeyError):
        callbacks.remove(calls.append)
    callbacks |= {print, repr}
    callbacks.clear()
    assert len(callbacks) == 0
    assert len({callbacks, callbacks}) == 1


def test_what_cannot_be_called_is_refused(callbacks):
    with pytest.raises(ValueError, match="callable"):
        callbacks.add(5)


def test_the_sender_is_held_weakly(callbacks, sender):
    calls = []
    callbacks = CallbackCollection(gone := Sender())
    callbacks.add(calls.append)
    ref = weakref.ref(gone)
    del gone
    assert ref() is None
    callbacks()
    assert calls == [None]


def test_the_sender_may_be_given_as_a_weak_reference(sender):
    calls = []
    callbacks = CallbackCollection(weakref.ref(sender))
    callbacks.add(calls.append)
    callbacks()
    assert calls == [sender]


def test_a_callback_may_change_the_collection(callbacks):
    calls = []

    def once(sender):
        calls.append("once")
        callbacks.remove(once)
        callbacks.add(later)

    def later(sender):
        calls.append("later")

    callbacks.add(once)
    callbacks()
    assert calls == ["once"]
    callbacks()
    assert calls == ["once", "later"]


@pytest.mark.expects_errors
def test_a_failing_callback_is_logged_once_and_the_next_is_called(callbacks, caplog):
    calls = []

    def fail(sender):
        raise ValueError("broken")

    callbacks.add(fail)
    callbacks.add(calls.append)
    callbacks()
    assert len(calls) == 1
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert isinstance(record.exc_info[1], ValueError)


@pytest.mark.expects_errors
def test_wrong_arguments_of_a_callback_are_logged_as_well(callbacks, caplog):
    callbacks.add(lambda: None)
    callbacks()
    assert len(caplog.records) == 1


def test_frozen_means_no_changes(callbacks):
    callbacks.add(print)
    callbacks.freeze()
    assert callbacks.is_frozen
    for change in (lambda: callbacks.add(repr), lambda: callbacks.remove(print), lambda: callbacks.discard(print)):
        with pytest.raises(RuntimeError):
            change()
    with pytest.raises(RuntimeError):
        callbacks.clear()
    with pytest.raises(RuntimeError):
        callbacks.freeze()
    callbacks.unfreeze()
    with pytest.raises(RuntimeError):
        callbacks.unfreeze()
    callbacks.clear()


def test_a_copy_is_independent_and_keeps_sender_and_frozenness(callbacks, sender):
    calls = []
    callbacks.add(calls.append)
    callbacks.freeze()
    twin = copy.copy(callbacks)
    assert twin.is_frozen
    twin.unfreeze()
    assert callbacks.is_frozen
    twin()
    assert calls == [sender]
    twin.clear()
    assert len(callbacks) == 1


def test_a_chained_collection_is_called_without_the_sender_and_held_weakly(callbacks):
    other_sender, calls = Sender(), []
    other = CallbackCollection(other_sender)
    other.add(lambda *args: calls.append(args))
    callbacks.add(other)
    assert other in callbacks
    callbacks("event")
    assert calls == [(other_sender, "event")]
    del other
    gc.collect()
    callbacks("event")
    assert len(calls) == 1
    assert len(callbacks) == 0


class Handler:
    __hash__ = None  # as of a dataclass

    def __init__(self):
        self.calls = 0

    def handle(self, sender):
        self.calls += 1


def test_a_weak_method_lives_as_long_as_its_object(callbacks):
    handler, twin = Handler(), Handler()
    callbacks.add(handler.handle, weak=True)
    callbacks.add(handler.handle, weak=True)
    gc.collect()
    callbacks()
    assert handler.calls == 1
    assert handler.handle in callbacks
    assert twin.handle not in callbacks
    del handler
    gc.collect()
    assert len(callbacks) == 0


def test_a_weak_callback_can_be_removed(callbacks):
    handler = Handler()
    callbacks.add(handler.handle, weak=True)
    callbacks.remove(handler.handle)
    assert handler.handle not in callbacks


def test_added_weakly_and_then_strongly_is_held_strongly_and_called_once(callbacks):
    calls = []

    def callback(sender):
        calls.append(sender)

    callbacks.add(callback, weak=True)
    callbacks.add(callback)
    callbacks.add(callback, weak=True)
    del callback
    gc.collect()
    callbacks()
    assert len(calls) == 1


def test_dead_callbacks_do_not_pile_up(callbacks):
    for _ in range(100):
        callbacks.add(lambda sender: None, weak=True)
    assert len(callbacks._entries) == 1


@pytest.mark.asyncio
async def test_awaiting_the_call_waits_for_all_async_callbacks(callbacks, sender):
    calls = []

    async def slow(sender, event):
        await asyncio.sleep(0)
        calls.append((sender, event))

    async def slower(sender, event):
        await asyncio.sleep(0.001)
        calls.append((sender, event))

    callbacks.add(slow)
    callbacks.add(slower)
    await callbacks("event")
    assert calls == [(sender, "event")] * 2


@pytest.mark.asyncio
async def test_without_async_callbacks_awaiting_returns_at_once(callbacks):
    callbacks.add(lambda sender: None)
    await callbacks()
    await asyncio.wait_for(callbacks(), 1)


@pytest.mark.asyncio
async def test_awaiting_waits_for_async_callbacks_of_chained_collections(callbacks, sender):
    done = []

    async def slow(sender):
        await asyncio.sleep(0.001)
        done.append(sender)

    chained = CallbackCollection(sender)
    chained.add(slow)
    callbacks.add(chained)
    await callbacks()
    assert done == [sender]


@pytest.mark.asyncio
async def test_an_async_callback_runs_although_nobody_awaits_or_holds_it(sender):
    done = asyncio.Event()

    async def slow(sender):
        await asyncio.sleep(0.001)
        done.set()

    callbacks = CallbackCollection(sender)
    callbacks.add(slow)
    callbacks()
    del callbacks
    await asyncio.sleep(0)
    gc.collect()
    await asyncio.wait_for(done.wait(), 1)


@pytest.mark.asyncio
@pytest.mark.expects_errors
async def test_a_failing_async_callback_is_logged_once_and_never_raised(callbacks, caplog):
    caplog.set_level(logging.ERROR)

    async def fail(sender):
        await asyncio.sleep(0)
        raise ValueError("broken")

    callbacks.add(fail)
    await callbacks()
    gc.collect()
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert isinstance(record.exc_info[1], ValueError)


@pytest.mark.asyncio
async def test_cancelling_the_wait_does_not_cancel_the_callbacks(callbacks):
    started, go, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def slow(sender):
        started.set()
        await go.wait()
        done.set()

    callbacks.add(slow)

    async def call():
        await callbacks()

    waiter = asyncio.create_task(call())
    await started.wait()
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    go.set()
    await asyncio.wait_for(done.wait(), 1)


@pytest.mark.asyncio
async def test_a_callback_may_return_any_awaitable(callbacks):
    future = asyncio.get_running_loop().create_future()
    callbacks.add(lambda sender: future)
    asyncio.get_running_loop().call_soon(future.set_result, None)
    await callbacks()
    assert future.done()


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_what_ends_the_loop_does_not_keep_the_others_from_being_called(sender, error):
    seen = []

    def leave(sender):
        raise error

    async def main():
        callbacks = CallbackCollection(sender)
        callbacks.add(leave)
        callbacks.add(seen.append)
        callbacks()
        seen.append("went on")
        await asyncio.sleep(5)

    loop = asyncio.new_event_loop()
    task = loop.create_task(main())
    with pytest.raises(type(error)):
        loop.run_until_complete(task)
    assert seen == [sender, "went on"]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(task)
    loop.close()
