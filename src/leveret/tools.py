"""aio-pika's helpers about callbacks, for code that imports them."""

from __future__ import annotations

import asyncio
import functools
import inspect
import warnings
from collections.abc import Awaitable, Callable, Generator
from collections.abc import Set as AbstractSet
from typing import Any, Generic, ParamSpec, Protocol, TypeAlias, TypeVar
from weakref import WeakMethod

from leveret.callbacks import CallbackCollection
from leveret.lazy import pass_on
from leveret.log import get_logger

pass_on(__name__)
_log = get_logger(__name__)

T = TypeVar("T")
_Params = ParamSpec("_Params")
_Sender = TypeVar("_Sender", contravariant=True)
_Return = TypeVar("_Return", covariant=True)


class CallbackType(Protocol[_Sender, _Params, _Return]):
    """What a :class:`~leveret.CallbackCollection` calls: async or not, with the sender as its first argument."""

    def __call__(
        self, __sender: _Sender | None, /, *args: _Params.args, **kwargs: _Params.kwargs
    ) -> _Return | Awaitable[_Return]:
        """Called with the sender and what happened."""
        ...


CallbackSetType: TypeAlias = AbstractSet[Any]
"""The callbacks of a :class:`~leveret.CallbackCollection`."""


class StubAwaitable:
    """Awaitable, and done after one turn of the event loop."""

    __slots__ = ()

    def __await__(self) -> Generator[Any, Any, None]:
        yield


STUB_AWAITABLE = StubAwaitable()


def create_task(
    func: Callable[..., Any], *args: Any, loop: asyncio.AbstractEventLoop | None = None, **kwargs: Any
) -> asyncio.Future[Any]:
    """Call *func* soon: a coroutine function as a task, another one from the event loop.

    Args:
        func: what to call.
        args: its arguments.
        loop: the event loop; None for the current one.
        kwargs: its keyword arguments.
    """
    loop = loop or asyncio.get_event_loop()
    if inspect.iscoroutinefunction(func):
        return loop.create_task(func(*args, **kwargs))
    future: asyncio.Future[Any] = loop.create_future()

    def run() -> None:
        if future.done():
            return
        try:
            future.set_result(func(*args, **kwargs))
        except Exception as exc:
            future.set_exception(exc)

    loop.call_soon(run)
    return future


def ensure_awaitable(func: Callable[_Params, Any]) -> Callable[_Params, Awaitable[Any]]:
    """*func* as a coroutine function, whether it returns an awaitable or a plain value."""
    if inspect.iscoroutinefunction(func):
        return func

    @functools.wraps(func)
    async def wrapper(*args: _Params.args, **kwargs: _Params.kwargs) -> Any:
        result = func(*args, **kwargs)
        return await result if inspect.isawaitable(result) else result

    return wrapper


def iscoroutinepartial(fn: Callable[..., Any]) -> bool:
    """Write ``inspect.iscoroutinefunction()``, which looks through partials too."""
    warnings.warn("use inspect.iscoroutinefunction()", DeprecationWarning, stacklevel=2)
    return inspect.iscoroutinefunction(fn)


class OneShotCallback(Generic[T]):
    """Calls *callback* once, as a task, however often it is called itself; a failure is logged.

    Attributes:
        finished: an ``asyncio.Event`` that is set when it has come to its end.
        callback: what is called.
        loop: the event loop that it is called in.
    """

    def __init__(self, callback: Callable[..., Awaitable[T]]) -> None:
        self.callback = callback
        self.finished = asyncio.Event()
        self.loop = asyncio.get_event_loop()
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: cb={self.callback!r}>"

    async def wait(self) -> None:
        """Wait until it has come to its end."""
        await self.finished.wait()

    def __call__(self, *args: Any, **kwargs: Any) -> Awaitable[Any]:
        """Start it, the first time.

        Returns:
            Awaitable, and done when the callback is; another one from the second time on.
        """
        if self._task is not None:
            return StubAwaitable()
        self._task = self.loop.create_task(self._run(args, kwargs))
        return self._task

    async def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            await self.callback(*args, **kwargs)
        except Exception:
            _log.exception("callback %r failed", self.callback)
        finally:
            self.finished.set()


def weak_method_callback(method: Callable[_Params, Any]) -> Callable[_Params, Any]:
    """Calls a bound method for as long as something else holds its object; then it does nothing."""
    reference: WeakMethod[Any] = WeakMethod(method)

    def call(*args: _Params.args, **kwargs: _Params.kwargs) -> Any:
        alive = reference()
        return None if alive is None else alive(*args, **kwargs)

    return call


__all__ = [
    "STUB_AWAITABLE",
    "CallbackCollection",
    "CallbackSetType",
    "CallbackType",
    "OneShotCallback",
    "create_task",
    "ensure_awaitable",
    "iscoroutinepartial",
    "weak_method_callback",
]
