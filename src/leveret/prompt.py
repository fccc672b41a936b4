"""Futures whose tasks go on in the turn of the event loop that brought what they waited for.

An ordinary future has its task woken by ``call_soon``, one turn of the loop later: for a task that waits for each
confirm, that is a good part of what a client costs. Here, what is read is taken in whole; then the tasks that it woke
go on, one after another. So they find everything up to date, as they would after ``call_soon``, none of them runs in
the middle of anything, and what they write goes out in one piece.

Only tasks that await are woken so. Who asks a future to call back (``gather()``, ``wait()``, a user) is called by
``call_soon``, as ever.
"""

from __future__ import annotations

import asyncio
import operator
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

_WAKE = frozenset({"task_wakeup", "__wakeup"})
"""What the method of a task is called that has it go on; that of asyncio's tasks in C, and of those in Python."""

_set_result: Callable[[asyncio.Future[Any], Any], None] = asyncio.Future[Any].set_result

will_be_cancelled: Callable[[asyncio.Task[Any]], bool] = operator.attrgetter("_must_cancel")
"""Whether a task that runs will be cancelled when it waits next.

``cancelling()`` does not tell: before Python 3.13 ``uncancel()`` takes nothing back, and a ``TaskGroup`` whose eager
tasks fail leaves such a cancellation behind.
"""


class Wakeups:
    """What goes on when a read of one connection has been taken in.

    Attributes:
        is_reading: whether a read is being taken in.
        due: how to go on with the tasks that await what has ended meanwhile.
    """

    __slots__ = ("due", "is_reading")

    def __init__(self) -> None:
        self.is_reading = False
        self.due: list[tuple[Context, Callable[[Any], object], Prompt[Any]]] = []

    def run(self) -> None:
        """Have the tasks go on that await what is due."""
        due, self.due = self.due, []
        for context, resume, future in due:
            try:
                context.run(resume, future)
            except (KeyboardInterrupt, SystemExit) as exc:  # which end the loop, and not what reads the socket
                raise_soon(exc)
            except RuntimeError:  # it was read by a task, as no event loop does
                future.get_loop().call_soon(resume, future, context=context)


class Prompt(asyncio.Future[T]):
    """A future whose task goes on when the read is taken in that ended it.

    Args:
        wakeups: those of the connection that will end it; None has its task woken as any other is.
        loop: None for the one that runs.
    """

    __slots__ = ("_context", "_resume", "_wakeups", "_watchers")

    def __init__(self, wakeups: Wakeups | None = None, *, loop: asyncio.AbstractEventLoop | None = None) -> None:
        super().__init__(loop=loop)
        self._wakeups = wakeups
        self._resume: Callable[[Any], object] | None = None
        self._watchers: list[Callable[[Any], object]] | None = None

    def add_done_callback(self, fn: Callable[[Any], object], /, *, context: Context | None = None) -> None:
        """As of every future."""
        if (
            self._wakeups is not None
            and self._resume is None
            and getattr(fn, "__name__", None) in _WAKE  # so it is of a task that awaits
            and not self.done()
        ):
            self._resume = fn
            self._context = copy_context() if context is None else context
        else:
            super().add_done_callback(fn, context=context)

    def set_result(self, result: T, /) -> None:
        """As of every future."""
        _set_result(self, result)
        if self._resume is not None or self._watchers is not None:
            self._tell()

    def set_exception(self, exception: type | BaseException, /) -> None:
        """As of every future."""
        super().set_exception(exception)
        self._tell()

    def cancel(self, msg: Any | None = None) -> bool:
        """As of every future."""
        if not super().cancel(msg):
            return False
        self._tell()
        return True

    def on_end(self, callback: Callable[[Any], object]) -> None:
        """Call *callback* with it the moment that it ends, or has ended; it is not to raise."""
        if self.done():
            callback(self)
        elif self._watchers is None:
            self._watchers = [callback]
        else:
            self._watchers.append(callback)

    def _tell(self) -> None:
        """It has ended."""
        if self._watchers is not None:
            watchers, self._watchers = self._watchers, None
            for callback in watchers:
                callback(self)
        resume = self._resume
        if resume is None:
            return
        self._resume = None  # who keeps a future does not keep its task
        if self._wakeups is not None and self._wakeups.is_reading:
            self._wakeups.due.append((self._context, resume, self))
        else:
            self.get_loop().call_soon(resume, self, context=self._context)


class PromptEvent:
    """An ``asyncio.Event`` whose tasks go on when the read is taken in that set it.

    Attributes:
        wakeups: those of the connection that will set it; None has the tasks woken as any others are.
    """

    __slots__ = ("_is_set", "_waiters", "wakeups")

    def __init__(self) -> None:
        self.wakeups: Wakeups | None = None
        self._is_set = False
        self._waiters: list[Prompt[None]] = []

    def set(self) -> None:
        """Have those go on who wait, and who will wait, until it is cleared."""
        self._is_set = True
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def clear(self) -> None:
        """Have those wait who come from now on."""
        self._is_set = False

    async def wait(self) -> None:
        """Wait until it is set."""
        if not self._is_set:
            waiter: Prompt[None] = Prompt(self.wakeups)
            self._waiters.append(waiter)
            try:
                await waiter
            finally:
                self._waiters.remove(waiter)


def start_task(work: Coroutine[Any, Any, T], name: str, *, context: Context | None = None) -> asyncio.Task[T]:
    """A task that begins in the next turn of the loop, whatever its task factory: whoever starts it knows it by then.

    ``create_task()`` runs its first step at once under an eager factory, and may have come to the end.
    """
    return asyncio.Task(work, loop=asyncio.get_running_loop(), name=name, context=context)


def raise_soon(error: BaseException) -> None:
    """Have the event loop end with *error*, a KeyboardInterrupt or SystemExit, and nothing else break off."""
    asyncio.get_running_loop().call_soon(_raise, error)


def _raise(error: BaseException) -> NoReturn:
    raise error
