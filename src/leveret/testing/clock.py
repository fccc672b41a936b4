"""The broker's time: what expires, and when. Pure: whoever runs the broker tells it when to look.

Tests of TTL do not sleep: :meth:`Clock.advance` moves the time, and everything due happens at once.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable

from leveret.testing.given import check_span

_FEW = 64
"""Timers that are not worth tidying up."""


class Timer:
    """Something that is to happen; :meth:`cancel` forgets it."""

    __slots__ = ("_act", "when")

    def __init__(self, when: float, act: Callable[[], object]) -> None:
        self.when = when
        self._act: Callable[[], object] | None = act

    @property
    def is_cancelled(self) -> bool:
        """Whether it will not happen (any more)."""
        return self._act is None

    def cancel(self) -> None:
        """Forget it; does no harm twice."""
        self._act = None

    def fire(self) -> None:
        """Let it happen, once."""
        act, self._act = self._act, None
        if act is not None:
            act()


class Clock:
    """Monotonic seconds, and timers by them.

    Args:
        source: where the seconds come from.

    Attributes:
        on_earlier: called with no arguments when the next timer has changed to an earlier one.
    """

    def __init__(self, source: Callable[[], float] = time.monotonic) -> None:
        self._source = source
        self._offset = 0.0
        self._timers: list[tuple[float, int, Timer]] = []
        self._crowded = _FEW
        self._numbers = itertools.count()
        self.on_earlier: Callable[[], object] | None = None

    def now(self) -> float:
        """Seconds, from an arbitrary beginning."""
        return self._source() + self._offset

    def wall(self) -> float:
        """Seconds since 1970, moved on as :meth:`advance` said."""
        return time.time() + self._offset

    def call_at(self, when: float, act: Callable[[], object]) -> Timer:
        """Have *act* called at *when* of :meth:`now`."""
        if len(self._timers) > self._crowded:  # of cancelled ones, mostly: queues that expire renew theirs all the time
            self._timers = [each for each in self._timers if not each[2].is_cancelled]
            heapq.heapify(self._timers)
            self._crowded = max(_FEW, 2 * len(self._timers))
        timer = Timer(when, act)
        heapq.heappush(self._timers, (when, next(self._numbers), timer))
        if self._timers[0][2] is timer and self.on_earlier is not None:
            self.on_earlier()
        return timer

    def call_later(self, delay: float, act: Callable[[], object]) -> Timer:
        """Have *act* called in *delay* seconds."""
        return self.call_at(self.now() + delay, act)

    @property
    def next_due(self) -> float | None:
        """When to look again; ``None`` is never."""
        timers = self._timers
        while timers and timers[0][2].is_cancelled:
            heapq.heappop(timers)
        return timers[0][0] if timers else None

    def run_due(self) -> None:
        """Let everything happen whose time has come, in its order."""
        while (due := self.next_due) is not None and due <= self.now():
            heapq.heappop(self._timers)[2].fire()

    def advance(self, seconds: float) -> None:
        """Move the time forward, stopping at every timer on the way."""
        check_span("seconds", seconds, hint=" (time goes forward only)")
        end = self.now() + seconds
        while (due := self.next_due) is not None and due <= end:
            self._offset += max(0.0, due - self.now())
            self.run_due()
        self._offset += max(0.0, end - self.now())
