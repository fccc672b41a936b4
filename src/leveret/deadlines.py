"""Futures that end in time: one timer for all calls on a connection, and for all of one RPC object.

``asyncio.timeout()`` sets a timer for each wait, takes it back, and interrupts the task when it goes off. Here it is
the future that ends, and the timer is set to the earliest deadline that it has heard of. It is not taken back when a
future ends in time, but looks around when it goes off: for calls with the default timeout twice a minute, however many
there are.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any, TypeVar

from leveret.outcome import fail

T = TypeVar("T")


class Deadlines:
    """When futures are to end at the latest, in event loop time; ``math.inf`` for never. Each has one who waits."""

    __slots__ = ("_due", "_loop", "_timer", "_waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: dict[asyncio.Future[Any], tuple[float, Callable[[], Exception]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._due = math.inf

    async def in_time(self, future: asyncio.Future[T], deadline: float, late: Callable[[], Exception]) -> T:
        """What comes of *future*, which at *deadline* ends with the error that *late* makes.

        Cancellation: cancels *future*.
        """
        if deadline < math.inf and not future.done():
            self._waiting[future] = deadline, late
            if deadline < self._due:
                self._set_timer(deadline)
        try:
            return await future
        finally:
            self._waiting.pop(future, None)

    def extend(self, future: asyncio.Future[Any], deadline: float) -> None:
        """Give *future*, if it is waited for, until then."""
        if future in self._waiting:
            _, late = self._waiting[future]
            self._waiting[future] = deadline, late

    def end(self) -> None:
        """Nobody waits any more; who does so later is looked after again."""
        if self._timer is not None:
            self._timer.cancel()
        self._due = math.inf

    def _set_timer(self, due: float) -> None:
        self.end()
        self._due = due
        self._timer = self._loop.call_at(due, self._look)

    def _look(self) -> None:
        now = max(self._loop.time(), self._due)  # a loop may be early, by the resolution of its clock
        self._due = due = math.inf
        for future, (deadline, late) in list(self._waiting.items()):
            if deadline > now:
                due = min(due, deadline)
            elif not future.done():
                fail(future, late())
        if due < math.inf:
            self._set_timer(due)
