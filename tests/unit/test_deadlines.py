"""Deadlines: what waits ends in time, once, with an error of its own, and one timer is enough for all."""

from __future__ import annotations

import asyncio
import math

import pytest

from leveret.deadlines import Deadlines


@pytest.fixture
async def deadlines() -> Deadlines:
    return Deadlines(asyncio.get_running_loop())


def new_future() -> asyncio.Future[str]:
    return asyncio.get_running_loop().create_future()


def soon(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


def too_late() -> Exception:
    return TimeoutError("too late")


def timers() -> list[asyncio.TimerHandle]:
    loop = asyncio.get_running_loop()
    return [timer for timer in loop._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]


async def test_what_ends_in_time_is_returned(deadlines: Deadlines) -> None:
    future = new_future()
    asyncio.get_running_loop().call_soon(future.set_result, "here")
    assert await deadlines.in_time(future, soon(60), too_late) == "here"


async def test_what_has_ended_is_returned_even_after_its_deadline(deadlines: Deadlines) -> None:
    future = new_future()
    future.set_result("here")
    assert await deadlines.in_time(future, soon(-1), too_late) == "here"


async def test_each_ends_at_its_deadline_with_its_own_error(deadlines: Deadlines) -> None:
    ended: list[str] = []

    async def wait(name: str, seconds: float) -> None:
        with pytest.raises(TimeoutError, match=name):
            await deadlines.in_time(new_future(), soon(seconds), lambda: TimeoutError(name))
        ended.append(name)

    async with asyncio.timeout(5):
        await asyncio.gather(wait("third", 0.06), wait("first", 0.01), wait("second", 0.03))
    assert ended == ["first", "second", "third"]


async def test_a_deadline_that_has_passed_ends_it_at_once(deadlines: Deadlines) -> None:
    async with asyncio.timeout(5):
        with pytest.raises(TimeoutError, match="too late"):
            await deadlines.in_time(new_future(), soon(-1), too_late)


async def test_without_a_deadline_there_is_no_timer(deadlines: Deadlines) -> None:
    before = timers()
    waiting = asyncio.create_task(deadlines.in_time(new_future(), math.inf, too_late))
    await asyncio.sleep(0)
    assert timers() == before
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_one_timer_is_enough_for_all_that_come_with_later_deadlines(deadlines: Deadlines) -> None:
    before = len(timers())
    waiting = [asyncio.create_task(deadlines.in_time(new_future(), soon(60 + n), too_late)) for n in range(20)]
    await asyncio.sleep(0)
    assert len(timers()) == before + 1
    deadlines.end()
    assert len(timers()) == before
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)


async def test_who_gets_more_time_ends_later(deadlines: Deadlines) -> None:
    future, began = new_future(), asyncio.get_running_loop().time()
    asyncio.get_running_loop().call_soon(deadlines.extend, future, soon(0.05))
    with pytest.raises(TimeoutError):
        await deadlines.in_time(future, soon(0.01), too_late)
    assert asyncio.get_running_loop().time() - began >= 0.045


async def test_to_give_more_time_to_what_nobody_waits_for_changes_nothing(deadlines: Deadlines) -> None:
    before = timers()
    deadlines.extend(new_future(), soon(0))
    assert timers() == before


async def test_whoever_is_cancelled_cancels_what_it_waits_for(deadlines: Deadlines) -> None:
    future = new_future()
    waiting = asyncio.create_task(deadlines.in_time(future, soon(60), too_late))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert future.cancelled()
    deadlines.end()


async def test_an_error_that_nobody_is_left_to_take_is_not_complained_of(deadlines: Deadlines) -> None:
    """Time is up and the task is cancelled in one turn: the loop's exception handler would fail this test."""
    future = new_future()
    waiting = asyncio.create_task(deadlines.in_time(future, soon(-1), too_late))
    await asyncio.sleep(0)
    future.add_done_callback(lambda _: waiting.cancel())
    await asyncio.wait([waiting])
    assert future.done()


async def test_the_timer_goes_on_for_those_that_are_left(deadlines: Deadlines) -> None:
    future = new_future()
    asyncio.get_running_loop().call_soon(future.set_result, "here")
    await deadlines.in_time(future, soon(0.01), too_late)
    async with asyncio.timeout(5):
        with pytest.raises(TimeoutError):
            await deadlines.in_time(new_future(), soon(0.03), too_late)


async def test_who_waits_after_the_end_is_looked_after_too(deadlines: Deadlines) -> None:
    """As the calls of an RPC object that was closed and initialized again."""
    future = new_future()
    asyncio.get_running_loop().call_soon(future.set_result, "here")
    await deadlines.in_time(future, soon(0.01), too_late)
    deadlines.end()
    async with asyncio.timeout(5):
        with pytest.raises(TimeoutError, match="too late"):
            await deadlines.in_time(new_future(), soon(0.02), too_late)


async def test_what_has_ended_needs_no_timer(deadlines: Deadlines) -> None:
    before, future = timers(), new_future()
    future.set_result("here")
    await deadlines.in_time(future, soon(60), too_late)
    assert timers() == before


async def test_a_clock_that_is_early_costs_no_second_look(deadlines: Deadlines) -> None:
    waiting = asyncio.create_task(deadlines.in_time(new_future(), soon(60), too_late))
    await asyncio.sleep(0)
    deadlines._look()  # a minute early, by a clock without any resolution
    with pytest.raises(TimeoutError):
        await waiting
