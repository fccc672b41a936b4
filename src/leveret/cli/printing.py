"""Printing messages so that only what was printed, and by all that can be told read, counts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import leveret
from leveret.cli.formats import Format
from leveret.cli.pipes import OutputClosed, Writer

T = TypeVar("T")

AT_ONCE = 100
"""Messages that are printed, and then acknowledged, together."""
_LOOK_AGAIN = 0.0005, 0.05
"""Seconds between looks at a pipe that its reader has not emptied: the first, and the most."""
_LAST_WORDS = 0.2
"""Seconds that writing gets when the command is to end."""


class Printing:
    """Prints messages, and counts those that are printed; for ``with``, so that a reader who goes ends the command."""

    def __init__(self, format: Format) -> None:
        self.count = 0
        self._format = format
        self._writer = Writer()
        self._waiting = False
        self._closed = False
        self._task = asyncio.current_task()
        self.at_once = 1 if self._writer.is_pipe else AT_ONCE

    async def print(self, messages: Sequence[leveret.IncomingMessage]) -> None:
        """Returns when all are written.

        Cancellation: what is written in the next moment counts as written, so that it can be acknowledged; the
        cancellation comes with the next wait then.
        """
        first = self.count + 1
        data = b"".join(self._format(number, message) for number, message in enumerate(messages, first))
        writing = asyncio.ensure_future(self._writer.write(data))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait([writing], timeout=_LAST_WORDS)
            if not writing.done() or self._task is None:
                writing.cancel()
                await asyncio.wait([writing])
                raise
            self._task.uncancel()
            self._task.cancel()
            writing.result()
        self.count += len(messages)

    async def until_read(self) -> None:
        """Returns when a reader behind a pipe has read all that is written.

        What is sent ahead grows with what was read: so ``head -3`` leaves the fourth message where it was.

        Raises:
            OutputClosed: the reader went, and left some.
        """
        pause, longest = _LOOK_AGAIN
        while self._writer.unread():
            if self._closed:
                raise OutputClosed
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)
        self.at_once = min(2 * self.at_once, AT_ONCE)

    async def wait_for(self, work: Callable[[], Awaitable[T]]) -> T:
        """What *work* returns.

        Raises:
            OutputClosed: nobody would read it; the task is cancelled when the reader goes meanwhile.
        """
        if self._closed:
            raise OutputClosed
        self._waiting = True
        try:
            return await work()
        finally:
            self._waiting = False

    def _on_closed(self) -> None:
        self._stop_watching()
        self._closed = True
        if self._waiting and self._task is not None:  # what is being written fails by itself
            self._task.cancel()

    def __enter__(self) -> Printing:
        self._stop_watching = self._writer.when_closed(self._on_closed)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop_watching()
        if kind is asyncio.CancelledError and self._closed:
            raise OutputClosed
