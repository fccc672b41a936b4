"""The task in which the callbacks of one connection begin.

It waits for deliveries, and goes on in the turn of the event loop that read them. A callback that suspends keeps it,
to its end: so ``current_task()``, ``timeout()`` and cancellation mean in a callback what they mean anywhere, and one
that does not suspend costs no task of its own. Then another one takes its place.
"""

from __future__ import annotations

import asyncio
import types
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, TypeAlias

from leveret.prompt import Prompt, Wakeups, start_task, will_be_cancelled
from leveret.wire.output import Output

Rest: TypeAlias = Generator[Any, Any, None]
"""What is left of a callback that has suspended."""

Job: TypeAlias = Callable[[asyncio.Task[None]], Rest | None]
"""Runs callbacks in the task that it is given, until one suspends, or there are no more; it does not raise."""


class Hand:
    """Does jobs one after another, in a task.

    What one turn of the event loop has it do is written in one piece.

    Args:
        wakeups: those of the connection.
        output: that of the connection.
    """

    __slots__ = ("_is_over", "_jobs", "_output", "_parked", "_task", "_wakeups")

    def __init__(self, wakeups: Wakeups, output: Output) -> None:
        self._wakeups = wakeups
        self._output = output
        self._jobs: deque[Job] = deque()
        self._task: asyncio.Task[None] | None = None
        self._parked: Prompt[None] | None = None
        self._is_over = False

    def add(self, job: Job) -> None:
        """Do *job* when the read that is being taken in is; or else soon."""
        self._jobs.append(job)
        if self._task is None or self._task.cancelling():
            self._start()
        else:
            self._go_on()

    def end(self) -> None:
        """The connection is gone: keep no task waiting. What comes all the same is done."""
        self._is_over = True
        self._go_on()

    def _go_on(self) -> None:
        """Have the task go on, if it waits."""
        parked = self._parked
        if parked is not None:
            self._parked = None
            if not parked.done():  # cancelled, and another task will be started
                parked.set_result(None)

    def _start(self) -> None:
        self._task = task = start_task(self._work(), "leveret callbacks")
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # nothing is lost with one that does nothing
        task.add_done_callback(self._on_task_done)

    async def _work(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        while True:
            rest = self._output.together(self._do_jobs)
            if rest is not None:
                await _finish(rest)
                return
            if self._is_over or will_be_cancelled(task):
                return
            parked: Prompt[None] = Prompt(self._wakeups)
            self._parked = parked
            await parked

    def _do_jobs(self) -> Rest | None:
        """Do what there is, until a callback suspends; what is left of that one keeps the task."""
        task = asyncio.current_task()
        assert task is not None
        while self._jobs and not will_be_cancelled(task):
            rest = self._jobs.popleft()(task)
            if rest is not None:
                task._log_destroy_pending = True  # type: ignore[attr-defined]
                task.remove_done_callback(self._on_task_done)
                self._on_task_done(task)
                return rest
        return None

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        """*task* does no more jobs: what was left to it is for another one."""
        if self._task is task:
            self._task = self._parked = None
            if self._jobs:
                self._start()


@types.coroutine
def _finish(rest: Rest) -> Rest:
    yield from rest
