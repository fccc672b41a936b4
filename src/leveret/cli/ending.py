"""How a command ends before its time: the first signal asks it to, the second one makes it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from contextvars import ContextVar
from types import FrameType
from typing import Any

import leveret
from leveret.cli.terminal import say

GRACE = 10.0
"""Seconds that a command gets, after the first signal, to finish what is on its way and to close."""
_SILENT = 1.0
"""Seconds of them in which nothing is said: most commands end in less."""
_STUCK = 1.0
"""Seconds after the second signal in which further ones do nothing: then a third one ends the process."""


class Ending:
    """Of one command; for ``with``, around the event loop. Without that, it knows of no signals."""

    def __init__(self) -> None:
        self.signal: int | None = None
        """The first one that came."""
        self.waits_for = "the broker, to close the connection"
        """What the command is busy with after the first signal, in words for people."""
        self.is_now = False
        """Whether nothing is waited for any more."""
        self._at_once_since: float | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        self._connections: list[leveret.Connection] = []
        self._closings: list[asyncio.Task[None]] = []
        self._timers: list[asyncio.TimerHandle] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Ending:
        self._token = _current.set(self)
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as of a process in the background
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)
        if self.signal is None:  # else the process is about to end, which a signal more is not to disturb
            for number, handler in self._before.items():
                signal.signal(number, handler)

    async def run(self, command: Callable[[], Any]) -> int:
        """The exit code of *command*, which the signals cancel.

        Raises:
            CancelledError: it was, or :meth:`limit` has passed.
        """
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        if self.signal is not None:  # it came before the loop did
            self._begin()
        try:
            code: int = await command()
            return code
        finally:
            for timer in self._timers:
                timer.cancel()
            if self._closings:
                await asyncio.wait(self._closings)

    def add(self, connection: leveret.Connection) -> None:
        """Have it aborted when nothing is waited for any more."""
        self._connections.append(connection)

    def limit(self, seconds: float) -> None:
        """Stop at once after *seconds*, as the second signal does."""
        if self._loop is not None and self._task is not None:
            self._timers.append(self._loop.call_later(seconds, self._now))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Between any two lines of the main thread, as Python calls it: the loop does the work.
        if self.signal is None:
            self.signal = number
            self._call(self._begin)
        elif self._at_once_since is None:
            self._at_once_since = time.monotonic()
            self._call(self._now)
        elif time.monotonic() - self._at_once_since > _STUCK:  # the loop stands still: printing into a full pipe, say
            os._exit(128 + self.signal)

    def _call(self, callback: Callable[[], None]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback)

    def _begin(self) -> None:
        self.limit(GRACE)
        if self._loop is not None:
            self._timers.append(self._loop.call_later(_SILENT, self._tell))
        if self._task is not None:
            self._task.cancel()

    def _tell(self) -> None:
        if not self.is_now:
            say(f"waiting for {self.waits_for}, {GRACE:g} s at most; Ctrl-C again stops at once")

    def _now(self) -> None:
        if self.is_now:
            return
        self.is_now = True
        for connection in self._connections:
            if not connection.close_called:
                self._closings.append(asyncio.ensure_future(connection.close(timeout=0)))
        if self._task is not None:
            self._task.cancel()  # who closes a connection already, aborts it


_current: ContextVar[Ending | None] = ContextVar("leveret_cli_ending", default=None)


def ending() -> Ending:
    """That of the command that runs."""
    found = _current.get()
    if found is None:
        found = Ending()
    return found
