"""What publish(), ack(), nack() and reject() return, in every place where a coroutine or a future may stand."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import logging
from collections.abc import Awaitable, Coroutine
from unittest import mock

import pytest

from leveret import Channel, Exchange, IncomingMessage, Message
from leveret.message import incoming_message
from leveret.outcome import DONE, Outcome, fail, returns_awaitable


def now(value: object = None, error: BaseException | None = None) -> Outcome:
    """An outcome that is there already."""
    outcome: Outcome = Outcome(loop=asyncio.get_running_loop())
    if error is not None:
        outcome.set_exception(error)
    else:
        outcome.set_result(value)
    return outcome


def soon(value: object = None, error: BaseException | None = None) -> Outcome:
    """An outcome that comes with the next turn of the loop."""
    outcome: Outcome = Outcome(loop=asyncio.get_running_loop())
    asyncio.get_running_loop().call_soon(
        lambda: outcome.done() or (outcome.set_result(value) if error is None else outcome.set_exception(error))
    )
    return outcome


async def by_await(outcome):
    return await outcome


async def by_gather(outcome):
    return (await asyncio.gather(outcome))[0]


async def by_wait_for(outcome):
    return await asyncio.wait_for(outcome, 5)


async def by_create_task(outcome):
    return await asyncio.create_task(outcome)


async def by_loop_create_task(outcome):
    return await asyncio.get_running_loop().create_task(outcome, name="mine")


async def by_ensure_future(outcome):
    return await asyncio.ensure_future(outcome)


async def by_shield(outcome):
    return await asyncio.shield(outcome)


async def by_task_group(outcome):
    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(outcome)
    except* LookupError as errors:
        raise errors.exceptions[0] from None
    return task.result()


async def by_timeout(outcome):
    async with asyncio.timeout(5):
        return await outcome


async def by_as_completed(outcome):
    (first,) = asyncio.as_completed([outcome])
    return await first


async def by_wait(outcome):
    done, _ = await asyncio.wait([asyncio.create_task(outcome)], timeout=5)  # it refuses coroutines, since 3.11
    return done.pop().result()


async def by_coroutine(outcome):
    async def wrapper():
        return await outcome

    return await asyncio.create_task(wrapper())


async def by_thread(outcome):
    loop = asyncio.get_running_loop()
    future = asyncio.run_coroutine_threadsafe(outcome, loop)
    return await asyncio.wrap_future(future)


FORMS = [
    by_await,
    by_gather,
    by_wait_for,
    by_create_task,
    by_loop_create_task,
    by_ensure_future,
    by_shield,
    by_task_group,
    by_timeout,
    by_as_completed,
    by_wait,
    by_coroutine,
    by_thread,
]
form = pytest.mark.parametrize("form", FORMS)
when = pytest.mark.parametrize("when", [now, soon])


@form
@when
async def test_its_result_comes_out_of_every_form_of_waiting(form, when):
    assert await form(when("result")) == "result"


@form
@when
async def test_its_error_comes_out_of_every_form_of_waiting_and_counts_as_seen(form, when, caplog):
    before = Outcome.unretrieved
    with pytest.raises(LookupError, match="why"):
        await form(when(error=LookupError("why")))
    gc.collect()
    assert Outcome.unretrieved == before
    assert not caplog.records


@form
async def test_done_is_awaited_in_every_form_any_number_of_times(form):
    assert await form(DONE) is None
    assert await form(DONE) is None
    assert await asyncio.gather(DONE, DONE, DONE) == [None, None, None]


@form
async def test_cancelling_whoever_waits_ends_the_wait(form):
    outcome: Outcome = Outcome()
    waiter = asyncio.create_task(form(outcome))
    for _ in range(3):
        await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(waiter, 5)
    outcome.cancel()
    for _ in range(3):
        await asyncio.sleep(0)


async def test_an_outcome_is_awaited_again():
    outcome = soon("result")
    assert [await outcome, await outcome, await asyncio.create_task(outcome)] == ["result"] * 3


async def test_a_thousand_in_one_gather_make_no_task():
    before = len(asyncio.all_tasks())
    gathered = asyncio.gather(*(soon(index) for index in range(1000)))
    assert len(asyncio.all_tasks()) == before
    assert await gathered == list(range(1000))


async def test_gather_hands_out_each_exception():
    error = LookupError("why")
    results = await asyncio.gather(soon(1), now(error=error), soon(3), return_exceptions=True)
    assert results == [1, error, 3]


async def test_one_that_fails_cancels_the_others_of_a_task_group():
    others = []

    async def main():
        async with asyncio.TaskGroup() as group:
            others.append(group.create_task(Outcome()))
            group.create_task(soon(error=LookupError("why")))

    with pytest.raises(ExceptionGroup) as caught:
        await main()
    assert caught.group_contains(LookupError)
    assert others[0].cancelled()


async def test_wait_for_gives_up_in_time():
    outcome: Outcome = Outcome()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(outcome, 0.01)
    assert outcome.cancelled()


async def test_a_task_that_is_cancelled_before_it_began_leaves_the_outcome_alone():
    outcome: Outcome = Outcome()
    task = asyncio.create_task(outcome)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    outcome.cancel()


@pytest.mark.parametrize("make", [lambda: now("result"), lambda: DONE], ids=["outcome", "done"])
async def test_names_and_reprs_of_its_task_do_not_crash(make):
    task = asyncio.create_task(make(), name="mine")
    assert "mine" in repr(task)
    assert task.get_name() == "mine"
    assert task.get_stack() == []
    task.print_stack(file=mock.Mock())
    await task
    assert "mine" in repr(task)
    assert "Outcome" in repr(now())


def test_it_runs_in_the_debug_mode_of_asyncio_and_without(caplog):
    async def main():
        for form in FORMS:
            assert await form(soon(1)) == 1
            assert await form(DONE) is None

    for debug in (True, False):
        with asyncio.Runner(debug=debug) as runner:
            runner.run(main())
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_it_is_what_those_who_ask_expect():
    outcome = now()
    for awaitable in (outcome, DONE):
        assert asyncio.iscoroutine(awaitable)
        assert inspect.isawaitable(awaitable)
        assert isinstance(awaitable, Coroutine)
        assert isinstance(awaitable, Awaitable)
    assert asyncio.isfuture(outcome)


async def test_close_and_throw_are_those_of_a_coroutine():
    for awaitable in (now(), DONE, Outcome()):
        awaitable.close()
        with pytest.raises(LookupError, match="why"):
            awaitable.throw(LookupError("why"))
        with pytest.raises(LookupError):
            awaitable.throw(LookupError)
        with pytest.raises(LookupError, match="why"):
            awaitable.throw(LookupError, LookupError("why"), None)


# ------------------------------------------------------------------------------------------------------ unretrieved


async def test_a_failure_that_nobody_awaited_is_logged_and_counted_once(caplog, loop_errors):
    before = Outcome.unretrieved
    outcome = now(error=LookupError("why"))
    del outcome
    gc.collect()
    assert Outcome.unretrieved == before + 1
    assert [record.getMessage() for record in caplog.records] == [
        "nobody awaited it, and it failed: LookupError('why')"
    ]
    assert caplog.records[0].name == "leveret.outcome"
    assert caplog.records[0].levelno == logging.WARNING
    assert loop_errors == [], "asyncio's own complaint would be the second"


async def test_success_and_cancellation_that_nobody_awaited_say_nothing(caplog, loop_errors):
    before = Outcome.unretrieved
    now(1)
    Outcome().cancel()
    Outcome()
    gc.collect()
    assert Outcome.unretrieved == before
    assert not caplog.records
    assert loop_errors == []


async def test_a_failure_that_somebody_looked_at_says_nothing(caplog):
    before = Outcome.unretrieved
    assert isinstance(now(error=LookupError()).exception(), LookupError)
    gc.collect()
    assert Outcome.unretrieved == before
    assert not caplog.records


async def test_a_done_callback_alone_is_not_looking(caplog):
    before = Outcome.unretrieved
    outcome = now(error=LookupError("why"))
    outcome.add_done_callback(lambda _: None)
    await asyncio.sleep(0)
    del outcome
    gc.collect()
    assert Outcome.unretrieved == before + 1


async def test_fail_ends_a_plain_future_without_a_complaint_and_an_outcome_with_one(caplog, loop_errors):
    before = Outcome.unretrieved
    future = asyncio.get_running_loop().create_future()
    fail(future, LookupError("why"))
    fail(future, LookupError("again"))
    outcome: Outcome = Outcome()
    fail(outcome, LookupError("why"))
    fail(outcome, LookupError("again"))
    with pytest.raises(LookupError, match="why"):
        await future
    del future, outcome
    gc.collect()
    assert Outcome.unretrieved == before + 1
    assert loop_errors == []


async def test_fail_leaves_what_was_cancelled_alone():
    outcome: Outcome = Outcome()
    outcome.cancel()
    fail(outcome, LookupError("why"))
    assert outcome.cancelled()


# ---------------------------------------------------------------------------------------------- plain functions


@returns_awaitable
def plain(value, *, error=None):
    """Its docstring."""
    if error:
        raise error
    return now(value)


METHODS = [Exchange.publish, IncomingMessage.ack, IncomingMessage.nack, IncomingMessage.reject]


async def test_a_marked_function_is_called_at_once_and_raises_at_the_call():
    outcome = plain(1)
    assert isinstance(outcome, Outcome)
    assert await outcome == 1
    with pytest.raises(LookupError):
        plain(1, error=LookupError())


@pytest.mark.parametrize(
    "function",
    [plain, *METHODS, functools.partial(plain, 1)],
    ids=["plain", *(f.__qualname__ for f in METHODS), "partial"],
)
def test_inspect_and_asyncio_take_a_marked_function_for_a_coroutine_function(function):
    assert inspect.iscoroutinefunction(function)


async def test_bound_methods_are_coroutine_functions_too():
    message = incoming_message(None, None, 1, False, b"\0\0", b"\0\0", b"", True)
    for method in (message.ack, message.nack, message.reject):
        assert inspect.iscoroutinefunction(method)


def test_a_marked_function_keeps_its_name_docstring_and_signature():
    assert plain.__name__ == "plain"
    assert plain.__doc__ == "Its docstring."
    assert str(inspect.signature(plain)) == "(value, *, error=None)"
    assert not inspect.isgeneratorfunction(plain)


def test_a_function_that_was_not_marked_stays_what_it_was():
    assert not inspect.iscoroutinefunction(Channel.transaction)
    assert not inspect.iscoroutinefunction(IncomingMessage.process)


async def test_autospecced_mocks_of_marked_methods_are_awaitable():
    exchange = mock.create_autospec(Exchange, instance=True)
    exchange.publish.return_value = "confirmed"
    assert await exchange.publish(Message(b""), "key") == "confirmed"
    exchange.publish.assert_awaited_once()
    with pytest.raises(TypeError):
        await exchange.publish()

    message = mock.AsyncMock(spec=IncomingMessage)
    for verb in ("ack", "nack", "reject"):
        await getattr(message, verb)()
        getattr(message, verb).assert_awaited_once_with()

    function = mock.create_autospec(plain, return_value=5)
    assert await function(1) == 5
