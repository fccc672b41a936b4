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

from leveret.prompt import Prompt, Wakeups
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
        elif (parked := self._parked) is not None:
            self._parked = None
            parked.set_result(None)

    def end(self) -> None:
        """The connection is gone: keep no task waiting. What comes all the same is done."""
        self._is_over = True
        if (parked := self._parked) is not None and not parked.done():
            self._parked = None
            parked.set_result(None)

    def _start(self) -> None:
        # Not create_task(): an eager task factory would run it before it is known.
        self._task = asyncio.Task(self._work(), loop=asyncio.get_running_loop(), name="leveret callbacks")

    async def _work(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            while True:
                rest = self._output.together(self._do_jobs)
                if rest is not None:
                    await _finish(rest)
                    return
                if self._is_over or task.cancelling():  # a callback may have cancelled it: not the next one
                    break
                parked: Prompt[None] = Prompt(self._wakeups)
                self._parked = parked
                await parked
        finally:
            if self._task is task:
                self._task = self._parked = None
        if self._jobs and self._task is None:
            self._start()

    def _do_jobs(self) -> Rest | None:
        """Do what there is, until a callback suspends; what is left of that one keeps the task."""
        task = self._task
        assert task is not None
        while self._jobs and not task.cancelling():
            rest = self._jobs.popleft()(task)
            if rest is not None:
                self._task = None
                if self._jobs:
                    self._start()
                return rest
        return None


@types.coroutine
def _finish(rest: Rest) -> Rest:
    yield from rest
