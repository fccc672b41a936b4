"""A set of callbacks that belong to one sender, such as ``connection.close_callbacks``."""

from __future__ import annotations

import asyncio
import inspect
import weakref
from collections.abc import Awaitable, Callable, Generator, Hashable, Iterator, MutableSet
from types import MethodType
from typing import Any, Concatenate, Generic, ParamSpec, TypeAlias, TypeGuard, TypeVar

from leveret.log import get_logger
from leveret.prompt import raise_soon

_log = get_logger(__name__)

_Sender = TypeVar("_Sender")
_Params = ParamSpec("_Params")
_Callback: TypeAlias = Callable[..., object]

_tasks: set[asyncio.Task[None]] = set()
"""Async callbacks that run: asyncio itself holds its tasks weakly only."""


class CallbackCollection(MutableSet[_Callback], Generic[_Sender, _Params]):
    """Callables that are called, in the order they were added, with the sender and what happened.

    Calling the collection never raises. A callback that fails is logged, and the next one is called. A
    callback may be a coroutine function: then it runs as a task, and awaiting what the call returned waits
    for it. Callbacks may add and remove callbacks; that counts from the next call on.

    A collection may be added to another one. It is held weakly, and called without the other's sender,
    because it has its own.

    Args:
        sender: The first argument of every callback; held weakly, and None once it is gone.
    """

    def __init__(self, sender: _Sender | weakref.ReferenceType[_Sender]) -> None:
        given: Any = sender
        self._sender: weakref.ReferenceType[Any] = (
            given if isinstance(given, weakref.ReferenceType) else weakref.ref(given)
        )
        self._entries: dict[Hashable, Callable[[], _Callback | None]] = {}
        """Key → what gives the callback, or None once a weakly held one is gone."""
        self._is_frozen = False

    def add(
        self,
        callback: Callable[Concatenate[_Sender, _Params], object] | CallbackCollection[Any, _Params],
        weak: bool = False,
    ) -> None:
        """Add *callback*, once.

        Args:
            callback: A callable, a coroutine function, or another collection.
            weak: Forget the callback when nothing else holds it (for a bound method: its object).

        Raises:
            ValueError: It is not callable.
            RuntimeError: The collection is frozen.
        """
        self._check_not_frozen()
        if not callable(callback):
            raise ValueError(f"a callback must be callable, not {callback!r}")
        if callback in self._entries:
            return
        if not (weak or _is_collection(callback)):
            self._entries.pop(_weak_key(callback), None)
            self._entries[callback] = lambda: callback
            return
        self._forget_dead()
        if isinstance(callback, MethodType):
            self._entries.setdefault(_weak_key(callback), weakref.WeakMethod(callback))
        else:
            self._entries.setdefault(_weak_key(callback), weakref.ref(callback))

    def discard(self, value: _Callback) -> None:
        """Remove a callback, if it is there.

        Raises:
            RuntimeError: The collection is frozen.
        """
        self._check_not_frozen()
        self._entries.pop(_weak_key(value), None)
        self._entries.pop(value, None)

    def remove(self, value: _Callback) -> None:
        """Remove a callback.

        Raises:
            KeyError: It is not there.
            RuntimeError: The collection is frozen.
        """
        self._check_not_frozen()
        if value not in self:
            raise KeyError(value)
        self.discard(value)

    def clear(self) -> None:
        """Remove all callbacks.

        Raises:
            RuntimeError: The collection is frozen.
        """
        self._check_not_frozen()
        self._entries.clear()

    @property
    def is_frozen(self) -> bool:
        """Whether callbacks can neither be added nor removed."""
        return self._is_frozen

    def freeze(self) -> None:
        """Refuse changes from now on.

        Raises:
            RuntimeError: The collection is frozen.
        """
        self._check_not_frozen()
        self._is_frozen = True

    def unfreeze(self) -> None:
        """Allow changes again.

        Raises:
            RuntimeError: The collection is not frozen.
        """
        if not self._is_frozen:
            raise RuntimeError("the callbacks are not frozen")
        self._is_frozen = False

    def _check_not_frozen(self) -> None:
        if self._is_frozen:
            raise RuntimeError("the callbacks are frozen")

    def __call__(self, *args: _Params.args, **kwargs: _Params.kwargs) -> Awaitable[None]:
        """Call every callback with the sender and the arguments.

        Returns:
            Awaitable, and done when all async callbacks are done; it may as well be dropped.
            **Cancellation**: the callbacks go on.
        """
        if not self._entries:
            return _NOTHING
        sender = self._sender()
        tasks: list[asyncio.Task[None]] = []
        for callback in list(self):
            try:
                own = () if _is_collection(callback) else (sender,)
                result = callback(*own, *args, **kwargs)
                if inspect.isawaitable(result) and result is not _NOTHING:
                    tasks.append(self._start(callback, result))
            except (Exception, asyncio.CancelledError):
                self._log_failure(callback)
            except (KeyboardInterrupt, SystemExit) as exc:  # which end the loop, and not what told of the event
                raise_soon(exc)
        return _Completion(tasks) if tasks else _NOTHING

    def _start(self, callback: _Callback, result: Awaitable[object]) -> asyncio.Task[None]:
        loop = asyncio.get_running_loop()
        task = loop.create_task(self._finish(callback, result), name="leveret callback")
        _tasks.add(task)
        task.add_done_callback(_tasks.discard)
        return task

    async def _finish(self, callback: _Callback, result: Awaitable[object]) -> None:
        try:
            await result
        except Exception:
            self._log_failure(callback)

    def _log_failure(self, callback: _Callback) -> None:
        _log.exception("callback %r of %r failed", callback, self._sender())

    def _forget_dead(self) -> None:
        # Not by the weak references' own callbacks: those may come in the middle of an iteration.
        for key, get in list(self._entries.items()):
            if get() is None:
                self._entries.pop(key, None)

    def __iter__(self) -> Iterator[_Callback]:
        for get in list(self._entries.values()):
            callback = get()
            if callback is not None:
                yield callback

    def __contains__(self, x: object) -> bool:
        if x in self._entries:
            return True
        get = self._entries.get(_weak_key(x))
        # An entry whose callback is gone may have the identity of a new object.
        return get is not None and get() is not None

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __hash__(self) -> int:
        return id(self)

    def __copy__(self) -> CallbackCollection[_Sender, _Params]:
        twin: CallbackCollection[_Sender, _Params] = type(self)(self._sender)
        twin._entries = self._entries.copy()
        twin._is_frozen = self._is_frozen
        return twin

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._sender()!r}: {list(self)!r}>"


class _Completion(Awaitable[None]):
    """Waits for tasks, without cancelling them when the wait is cancelled."""

    def __init__(self, tasks: list[asyncio.Task[None]]) -> None:
        self._tasks = tasks

    def __await__(self) -> Generator[Any, Any, None]:
        if self._tasks:
            yield from asyncio.wait(self._tasks).__await__()


_NOTHING = _Completion([])


def _is_collection(callback: object) -> TypeGuard[CallbackCollection[Any, ...]]:
    return isinstance(callback, CallbackCollection)


def _weak_key(callback: object) -> Hashable:
    """Stands for *callback* without holding it, and is the same for each ``object.method``."""
    if isinstance(callback, MethodType):
        return "weak", id(callback.__self__), callback.__func__
    return "weak", id(callback)
