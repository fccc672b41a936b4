"""Awaitables of plain functions.

``publish()``, ``ack()``, ``nack()`` and ``reject()`` act when they are called, not when they are awaited, so
that a loop over them makes no coroutine and a ``gather`` of them makes no task. What they return can still be
awaited wherever a coroutine can: by ``await``, ``gather``, ``wait_for``, ``create_task`` and ``TaskGroup``.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Callable, Coroutine, Generator, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from leveret.log import get_logger
from leveret.prompt import Prompt

_log = get_logger(__name__)

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

if TYPE_CHECKING:

    class _Future(Prompt[T], Coroutine[Any, Any, T]):
        """The type that checkers see; at run time the coroutine's methods alone are enough."""
else:
    _Future = Prompt


class Outcome(_Future[T]):
    """A future that is a coroutine to those who insist on one.

    A failure that nobody asks for is logged and counted when the outcome is thrown away: publishing without
    looking at the result is a choice, a failing publish that nobody sees is not.
    """

    __slots__ = ("_iterator",)

    unretrieved: ClassVar[int] = 0
    """How many outcomes failed without anybody looking, in this process."""

    def send(self, value: Any, /) -> Any:
        """As of a coroutine."""
        return self._steps().send(value)

    def throw(self, typ: Any, val: Any = None, tb: Any = None, /) -> Any:
        """As of a coroutine."""
        error = val if val is not None else typ
        return self._steps().throw(error if isinstance(error, BaseException) else error())

    def close(self) -> None:
        """As of a coroutine; there is nothing to unwind."""

    def _steps(self) -> Generator[Any, Any, T]:
        try:
            return self._iterator
        except AttributeError:
            self._iterator: Generator[Any, Any, T] = self.__await__()
            return self._iterator

    def describe(self) -> str:
        """What it is the outcome of, for the log."""
        return "it"

    def __del__(self) -> None:
        if getattr(self, "_log_traceback", False):
            Outcome.unretrieved += 1
            _log.warning("nobody awaited %s, and it failed: %r", self.describe(), self.exception())


class _Done(Coroutine[Any, Any, None]):
    """An outcome that is there already, and is None."""

    __slots__ = ()

    def __await__(self) -> Generator[Any, Any, None]:
        return
        yield

    def send(self, value: Any, /) -> Any:
        raise StopIteration

    def throw(self, typ: Any, val: Any = None, tb: Any = None, /) -> Any:
        error = val if val is not None else typ
        raise error

    def close(self) -> None:
        """There is nothing to unwind."""


DONE = _Done()


def in_turn(outcomes: Iterable[Coroutine[Any, Any, None]]) -> Coroutine[Any, Any, None]:
    """One that awaits *outcomes*, one after another."""
    left = [outcome for outcome in outcomes if outcome is not DONE]
    return _await_all(left) if left else DONE


async def _await_all(outcomes: list[Coroutine[Any, Any, None]]) -> None:
    for outcome in outcomes:
        await outcome


def fail(future: asyncio.Future[Any], error: BaseException) -> None:
    """End *future* with *error*, unless it has ended; a plain future's waiter may have gone by then."""
    if not future.done():
        future.set_exception(error)
        if not isinstance(future, Outcome):
            future.exception()  # marks it as seen: its owner tells whoever is there


def returns_awaitable(function: F) -> F:
    """Make ``inspect.iscoroutinefunction`` true for a plain function that returns an awaitable.

    Mocks and wrappers (``AsyncMock``, ``create_autospec``, tracing) ask it to decide how to call.
    """
    if sys.version_info >= (3, 12):
        return inspect.markcoroutinefunction(function)
    # Before 3.12 only the code flag counts. Since 3.11 it is an opcode that makes a call return a coroutine,
    # not this flag, so setting it changes what inspect says and nothing else.
    code = function.__code__
    function.__code__ = code.replace(co_flags=code.co_flags | inspect.CO_COROUTINE)
    return function
