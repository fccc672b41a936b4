"""Futures whose tasks go on with the read that ended them; and that everything else about them is as of any future."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import weakref

import pytest

from leveret.prompt import Prompt, PromptEvent, Wakeups

VARIABLE = contextvars.ContextVar("VARIABLE", default="unset")


class Reader:
    """Reads as the event loop has a transport do: in a callback."""

    def __init__(self):
        self.wakeups = Wakeups()
        self.turn = asyncio.get_running_loop().create_future

    async def read(self, *steps):
        """Take in a read that does *steps*, and then what is due; wait until that has happened."""
        done = asyncio.get_running_loop().create_future()

        def on_readable():
            self.wakeups.is_reading = True
            for step in steps:
                step()
            self.wakeups.is_reading = False
            self.wakeups.run()
            done.set_result(None)

        asyncio.get_running_loop().call_soon(on_readable)
        await done


async def waiter(future, seen, name="it"):
    try:
        seen.append((name, await future))
    except (asyncio.CancelledError, LookupError) as exc:
        seen.append((name, type(exc)))
        raise


async def began(coroutine):
    task = asyncio.create_task(coroutine)
    await asyncio.sleep(0)
    return task


async def test_tasks_go_on_when_the_read_is_taken_in_and_not_before():
    reader, seen = Reader(), []
    one, two = Prompt(reader.wakeups), Prompt(reader.wakeups)
    tasks = [await began(waiter(one, seen, "one")), await began(waiter(two, seen, "two"))]
    during = []
    await reader.read(
        lambda: two.set_result(2),
        lambda: during.append(list(seen)),
        lambda: one.set_result(1),
        lambda: during.append(list(seen)),
        lambda: asyncio.get_running_loop().call_soon(during.append, list(seen)),
    )
    assert seen == [("two", 2), ("one", 1)]  # in the order of what ended, within the same turn
    assert during[:2] == [[], []]
    await asyncio.gather(*tasks)


async def test_beside_a_read_tasks_go_on_a_turn_later():
    seen = []
    future = Prompt(Wakeups())
    task = await began(waiter(future, seen))
    future.set_result(1)
    assert seen == []
    await asyncio.sleep(0)
    assert seen == [("it", 1)]
    await task


async def test_without_wakeups_it_is_as_any_future():
    seen = []
    future = Prompt()
    task = await began(waiter(future, seen))
    future.set_result(1)
    await task
    assert seen == [("it", 1)]


async def test_who_asks_to_be_called_back_is_called_in_the_next_turn():
    reader, seen = Reader(), []
    future = Prompt(reader.wakeups)
    future.add_done_callback(seen.append)
    gathered = asyncio.gather(future)
    await reader.read(lambda: future.set_result(1), lambda: seen.append("read"))
    assert seen == ["read", future]
    assert await gathered == [1]


async def test_a_method_of_a_task_is_a_callback_as_any_other():
    class Watching(asyncio.Task):
        def watch(self, future):
            seen.append(future)

    reader, seen, ended = Reader(), [], asyncio.Event()
    watching = Watching(ended.wait(), loop=asyncio.get_running_loop())
    future = Prompt(reader.wakeups)
    future.add_done_callback(watching.watch)
    assert future.remove_done_callback(watching.watch) == 1
    future.add_done_callback(watching.watch)
    await reader.read(lambda: future.set_result(1), lambda: seen.append("read"), ended.set)
    await watching
    assert seen == ["read", future]


@pytest.mark.parametrize("factory", [asyncio.Task, asyncio.tasks._PyTask])
async def test_every_kind_of_task_goes_on_with_the_read(factory):
    reader, seen = Reader(), []
    future = Prompt(reader.wakeups)
    task = factory(waiter(future, seen), loop=asyncio.get_running_loop())
    await asyncio.sleep(0)
    await reader.read(lambda: future.set_result(1), lambda: asyncio.get_running_loop().call_soon(seen.append, "turn"))
    assert seen == [("it", 1), "turn"]
    await task


@pytest.mark.parametrize("in_a_read", [True, False])
async def test_who_keeps_it_keeps_no_task(in_a_read):
    reader, seen = Reader(), []
    future = Prompt(reader.wakeups)
    task = await began(waiter(future, seen))
    ref = weakref.ref(task)
    if in_a_read:
        await reader.read(lambda: future.set_result(1))
    else:
        future.set_result(1)
    await task
    del task
    await asyncio.sleep(0)  # that wakes this one, and has it meanwhile
    gc.collect()
    assert ref() is None


async def test_a_failure_reaches_the_task_with_the_read():
    reader, seen = Reader(), []
    future = Prompt(reader.wakeups)
    task = await began(waiter(future, seen))
    await reader.read(lambda: future.set_exception(LookupError("why")))
    assert seen == [("it", LookupError)]
    with pytest.raises(LookupError):
        await task


async def test_of_several_tasks_each_goes_on():
    reader, seen = Reader(), []
    future = Prompt(reader.wakeups)
    tasks = [await began(waiter(future, seen, number)) for number in range(3)]
    await reader.read(lambda: future.set_result("all"))
    await asyncio.gather(*tasks)
    assert sorted(seen) == [(0, "all"), (1, "all"), (2, "all")]


@pytest.mark.parametrize("what", ["task", "future"])
async def test_a_cancelled_task_goes_on_as_ever(what):
    seen = []
    future = Prompt(Wakeups())
    task = await began(waiter(future, seen))
    (task if what == "task" else future).cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == [("it", asyncio.CancelledError)]
    assert not future.cancel()


async def test_a_task_that_is_cancelled_by_what_went_on_before_it_is_cancelled():
    reader, seen = Reader(), []
    one, two = Prompt(reader.wakeups), Prompt(reader.wakeups)
    tasks = []

    async def canceller():
        await one
        tasks[1].cancel()

    tasks = [await began(canceller()), await began(waiter(two, seen))]
    await reader.read(lambda: one.set_result(1), lambda: two.set_result(2))
    assert seen == [("it", asyncio.CancelledError)]
    await asyncio.gather(*tasks, return_exceptions=True)
    assert tasks[1].cancelled()


async def test_a_task_has_its_own_context_and_is_the_current_one():
    reader, seen = Reader(), []
    future = Prompt(reader.wakeups)

    async def look():
        VARIABLE.set("mine")
        await future
        seen.append((VARIABLE.get(), asyncio.current_task()))
        VARIABLE.set("changed")
        async with asyncio.timeout(5):
            await asyncio.sleep(0)
        return VARIABLE.get()

    task = await began(look())
    await reader.read(lambda: future.set_result(None), lambda: seen.append(asyncio.current_task()))
    assert seen == [None, ("mine", task)]
    assert VARIABLE.get() == "unset"
    assert await task == "changed"


async def test_what_a_task_ends_while_it_goes_on_has_its_task_go_on_a_turn_later():
    """So two tasks that wait for each other cannot keep the loop from turning."""
    reader, seen = Reader(), []
    one, two = Prompt(reader.wakeups), Prompt(reader.wakeups)

    async def first():
        await one
        two.set_result("two")
        seen.append("one")

    tasks = [await began(first()), await began(waiter(two, seen))]
    await reader.read(lambda: one.set_result(None), lambda: None)
    await asyncio.gather(*tasks)
    assert seen == ["one", ("it", "two")]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_what_ends_the_loop_does_not_stop_what_else_is_due(error):
    seen = []

    async def leave(future):
        await future
        raise error

    async def main():
        reader = Reader()
        one, two = Prompt(reader.wakeups), Prompt(reader.wakeups)
        leaving, other = await began(leave(one)), await began(waiter(two, seen))
        try:
            await reader.read(lambda: one.set_result(1), lambda: two.set_result(2))
            await asyncio.sleep(5)
        finally:
            seen.append("over")
            await asyncio.gather(leaving, other, return_exceptions=True)

    loop = asyncio.new_event_loop()
    task = loop.create_task(main())
    with pytest.raises(type(error)):
        loop.run_until_complete(task)
    assert seen == [("it", 2)]
    task.cancel()
    with pytest.raises((asyncio.CancelledError, type(error))):
        loop.run_until_complete(task)
    loop.close()


async def test_a_read_that_a_task_takes_in_wakes_others_a_turn_later():
    wakeups, seen = Wakeups(), []
    future = Prompt(wakeups)
    task = await began(waiter(future, seen))
    wakeups.is_reading = True
    future.set_result(1)
    wakeups.is_reading = False
    wakeups.run()
    assert seen == []
    await task
    assert seen == [("it", 1)]


async def test_watchers_are_told_at_once_and_in_their_order():
    seen = []
    future = Prompt(Wakeups())
    future.on_end(lambda ended: seen.append((1, ended)))
    future.on_end(lambda ended: seen.append((2, ended)))
    future.set_result(None)
    future.on_end(lambda ended: seen.append((3, ended)))
    assert seen == [(1, future), (2, future), (3, future)]


@pytest.mark.parametrize("end", [lambda future: future.cancel(), lambda future: future.set_exception(LookupError())])
async def test_watchers_are_told_of_every_end(end):
    seen = []
    future = Prompt(Wakeups())
    future.on_end(seen.append)
    end(future)
    assert seen == [future]
    assert future.cancelled() or isinstance(future.exception(), LookupError)


async def test_who_waits_for_an_event_goes_on_with_the_read_that_sets_it():
    reader, seen = Reader(), []
    event = PromptEvent()
    event.wakeups = reader.wakeups

    async def waits():
        await event.wait()
        seen.append("went on")

    tasks = [await began(waits()), await began(waits())]
    await reader.read(event.set, event.set, lambda: seen.append("read"))
    assert seen == ["read", "went on", "went on"]
    await asyncio.gather(*tasks)
    await event.wait()  # as long as it is set
    event.clear()
    late = await began(waits())
    assert not late.done()
    late.cancel()
    await asyncio.wait([late])
    event.set()
    assert len(seen) == 3
