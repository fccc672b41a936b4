"""The task in which callbacks begin: one while none suspends, a new one for each that does, none when all is over."""

from __future__ import annotations

import asyncio
import gc

import pytest

from leveret.prompt import Wakeups
from leveret.wire.hand import Hand
from leveret.wire.output import Output


class Socket:
    def __init__(self):
        self.sent = []

    def write(self, data):
        self.sent.append(data)


class Bench:
    """A hand, what it did, and the socket that it wrote to."""

    def __init__(self):
        self.wakeups, self.output, self.socket = Wakeups(), Output(1), Socket()
        self.output.open(self.socket)
        self.hand = Hand(self.wakeups, self.output)
        self.done = []
        self.go = asyncio.Event()

    def job(self, name):
        def do(task):
            assert asyncio.current_task() is task
            self.done.append((name, task))

        return do

    def suspending(self, name):
        def do(task):
            self.done.append((name, task))
            return self.rest(name, task)

        return do

    def rest(self, name, task):
        yield from self.go.wait().__await__()
        assert asyncio.current_task() is task
        self.done.append((f"{name} again", task))

    @property
    def names(self):
        return [name for name, _ in self.done]

    @property
    def tasks(self):
        return {task for _, task in self.done}

    async def read(self, *jobs):
        """A read that brings *jobs*."""
        over = asyncio.get_running_loop().create_future()

        def on_readable():
            self.wakeups.is_reading = True
            for job in jobs:
                self.hand.add(job)
            self.wakeups.is_reading = False
            self.output.may_send_at_once = True
            self.wakeups.run()
            over.set_result(None)

        asyncio.get_running_loop().call_soon(on_readable)
        await over


@pytest.fixture
async def bench():
    bench = Bench()
    yield bench
    bench.hand.end()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_one_task_does_what_read_after_read_brings(bench):
    await bench.read(bench.job(1), bench.job(2))
    await asyncio.sleep(0)  # the first time it has to begin
    assert bench.names == [1, 2]
    for number in range(3, 9):
        await bench.read(bench.job(number))
        assert bench.names[-1] == number  # in the turn of the read
    assert len(bench.tasks) == 1


async def test_who_suspends_keeps_the_task_and_the_others_get_another(bench):
    await bench.read(bench.suspending(1), bench.job(2), bench.suspending(3))
    for _ in range(3):
        await asyncio.sleep(0)
    assert bench.names == [1, 2, 3]
    assert len(bench.tasks) == 2
    bench.go.set()
    await asyncio.wait(bench.tasks)
    assert bench.names[3:] == ["1 again", "3 again"]


async def test_what_a_read_has_it_write_goes_out_in_one_piece(bench):
    def write(task):
        bench.output.write(b"ab")
        bench.output.write(b"cd")

    await bench.read(bench.job(1))
    await asyncio.sleep(0)
    await bench.read(write, write)
    assert bench.socket.sent == [b"abcdabcd"]


async def test_it_does_what_comes_while_nothing_is_read(bench):
    bench.hand.add(bench.job(1))
    await asyncio.sleep(0)
    bench.hand.add(bench.job(2))
    bench.hand.add(bench.job(3))
    await asyncio.sleep(0)
    assert bench.names == [1, 2, 3]
    assert len(bench.tasks) == 1


async def test_what_a_job_adds_is_done_as_well(bench):
    def adds(task):
        bench.hand.add(bench.job("added"))

    await bench.read(adds)
    await asyncio.sleep(0)
    assert bench.names == ["added"]


@pytest.mark.parametrize("is_parked", [False, True])
async def test_a_cancelled_task_does_not_stop_what_comes_later(bench, is_parked):
    bench.hand.add(bench.job(1))
    if is_parked:
        await asyncio.sleep(0)
    (task,) = asyncio.all_tasks() - {asyncio.current_task()}
    task.cancel()
    bench.hand.add(bench.job(2))
    await asyncio.wait([task])
    await asyncio.sleep(0)
    assert task.cancelled()
    assert bench.names == [1, 2]


async def test_a_job_that_cancels_its_task_does_not_cancel_the_next(bench):
    def cancels(task):
        bench.done.append(("cancels", task))
        task.cancel()

    await bench.read(bench.job(1))
    await asyncio.sleep(0)
    await bench.read(cancels, bench.job(2))
    await asyncio.sleep(0)
    assert bench.names == [1, "cancels", 2]
    assert len(bench.tasks) == 2


@pytest.mark.parametrize("when", ["before it began", "while it is parked", "while it is about to go on"])
async def test_what_a_cancelled_task_was_to_do_is_done_although_nothing_more_comes(bench, when):
    if when != "before it began":
        bench.hand.add(bench.job(1))
        await asyncio.sleep(0)
    if when != "while it is parked":
        bench.hand.add(bench.job(2))
    (task,) = asyncio.all_tasks() - {asyncio.current_task()}
    task.cancel()
    if when == "while it is parked":
        bench.hand.add(bench.job(2))
    await asyncio.wait([task])
    for _ in range(3):
        await asyncio.sleep(0)
    assert bench.names[-1] == 2


async def test_a_job_that_cancels_its_task_and_suspends_leaves_the_others_to_a_task_of_their_own(bench):
    def cancels(task):
        task.cancel()
        bench.hand.add(bench.job("added"))
        return bench.rest("cancels", task)

    await bench.read(cancels)
    for _ in range(4):
        await asyncio.sleep(0)
    await bench.read(bench.job(2))
    await asyncio.sleep(0)
    assert bench.names == ["added", 2]
    assert len(bench.tasks) == 1


async def test_what_ends_a_task_does_not_end_what_else_was_to_be_done(bench):
    class Odd(BaseException):
        pass

    tasks = []

    def raises(task):
        tasks.append(task)
        raise Odd

    await bench.read(raises, bench.job(2))
    for _ in range(4):
        await asyncio.sleep(0)
    assert bench.names == [2]
    assert isinstance(tasks[0].exception(), Odd)


async def test_a_cancellation_that_was_taken_back_loses_nothing(bench):
    """It stays with the task all the same, before Python 3.13, and cancels whatever that waits for next."""

    def cancels(task):
        task.cancel()
        task.uncancel()

    await bench.read(cancels)
    bench.hand.add(bench.job(2))  # before it learns that it was cancelled
    for _ in range(4):
        await asyncio.sleep(0)
    await bench.read(bench.job(3))
    await asyncio.sleep(0)
    assert bench.names == [2, 3]


def close_a_loop_after(job):
    async def work():
        bench = Bench()
        bench.hand.add(job(bench, 1))
        await asyncio.sleep(0)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(work())
    loop.close()
    gc.collect()


def test_a_loop_that_is_closed_before_the_connection_complains_of_no_task_that_does_nothing(caplog):
    close_a_loop_after(Bench.job)
    assert caplog.text == ""


def test_a_loop_that_is_closed_complains_of_a_callback_that_waits(caplog):
    close_a_loop_after(Bench.suspending)
    assert "Task was destroyed but it is pending" in caplog.text


async def test_when_the_connection_is_gone_no_task_is_left_and_what_comes_is_done(bench):
    bench.hand.add(bench.job(1))
    await asyncio.sleep(0)
    bench.hand.end()
    bench.hand.end()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    bench.hand.add(bench.job(2))
    for _ in range(2):
        await asyncio.sleep(0)
    assert bench.names == [1, 2]
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_job_may_end_it(bench):
    await bench.read(lambda _: bench.hand.end(), bench.job(2))
    for _ in range(2):
        await asyncio.sleep(0)
    assert bench.names == [2]
    assert asyncio.all_tasks() == {asyncio.current_task()}
