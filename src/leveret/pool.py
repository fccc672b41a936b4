"""A pool of whatever takes time to make: connections, or channels of a plain connection.

Channels need no pool: any number of tasks may publish on one. Nothing here knows AMQP.

Each item is *idle*, *in use*, or *being made*; together they are never more than ``max_size``. Whoever finds none to
have waits in line, and is given either an item or the leave to make one. Nobody else can take what was given, so a
waiter that is cancelled at that moment has to pass it on.
"""

from __future__ import annotations

import abc
import asyncio
import inspect
import warnings
from collections import deque
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from leveret.checks import check_count
from leveret.lazy import pass_on
from leveret.log import get_logger

if TYPE_CHECKING:
    from typing import Self

pass_on(__name__)
_log = get_logger(__name__)

T = TypeVar("T")


class PoolInstance(abc.ABC):
    """What a pool may hold: something that can be closed. Deriving from it is not needed."""

    @abc.abstractmethod
    def close(self) -> Awaitable[None]:
        """Close it.

        Raises:
            NotImplementedError: always; items have a method of their own.
        """
        raise NotImplementedError


ConstructorType = Callable[..., Awaitable[Any]]


class PoolInvalidStateError(RuntimeError):
    """The pool is closed."""


class _MakeOne:
    """Given to a waiter instead of an item: there is room for another one."""


_MAKE_ONE = _MakeOne()


class Pool(Generic[T]):
    """Items that are made when they are needed, and used again.

    ::

        async with Pool(connect_robust, URL, max_size=2) as pool:
            async with pool.acquire() as connection:
                ...

    An item whose ``is_closed`` is true is thrown away, and another one is made when somebody wants it.

    Args:
        constructor: makes an item; it is called with *args*, and what it returns is awaited.
        args: for the constructor.
        max_size: how many items there may be at a time, those that are being made included; None for no limit.
        loop: accepted for aio-pika's sake; the running loop is used.

    Raises:
        TypeError: *max_size* is no int.
        ValueError: it is less than 1.
    """

    def __init__(
        self,
        constructor: Callable[..., Awaitable[T]],
        *args: Any,
        max_size: int | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        if max_size is not None:
            check_count("max_size", max_size, 1, hint=", or None for no limit")
        if loop is not None:
            warnings.warn("Pool() takes no loop any more: it uses the running one", DeprecationWarning, stacklevel=2)
        self._constructor = constructor
        self._args = args
        self._max_size = max_size
        self._idle: deque[T] = deque()
        self._in_use: list[T] = []
        self._being_made = 0
        self._waiters: deque[asyncio.Future[T | _MakeOne]] = deque()
        self._is_closed = False

    def __repr__(self) -> str:
        size = "no limit" if self._max_size is None else f"at most {self._max_size}"
        state = "closed" if self._is_closed else f"{len(self._in_use)} in use, {len(self._idle)} idle, {size}"
        return f"<{type(self).__name__}: {state}>"

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The running event loop."""
        return asyncio.get_running_loop()

    @property
    def is_closed(self) -> bool:
        """Whether it was closed."""
        return self._is_closed

    def acquire(self) -> PoolItemContextManager[T]:
        """An item, for ``async with``; at the end of the block it goes back.

        Raises:
            PoolInvalidStateError: the pool is closed, or is closed while it is waited for; the latter when entering.

        What the constructor raises comes out when entering, too.

        Cancellation: the item, or the right to make one, goes to whoever waits next.
        """
        self._check_open()
        return PoolItemContextManager(self)

    def put(self, item: T) -> None:
        """Give back *item*; the end of the ``async with`` block does it.

        Raises:
            PoolInvalidStateError: the pool is closed, and its items with it.
            ValueError: nobody has acquired it, or it was given back before.
        """
        self._check_open()
        self._take_back(item)

    async def close(self) -> None:
        """Close all items, also those in use, and wake up who waits; nothing can be acquired any more.

        It does not wait for an item that is being made: that is closed as soon as it is there. An item that cannot
        be closed is logged. Closing twice does nothing.

        Cancellation: the closing of the items is cancelled too; the pool is closed.
        """
        self._is_closed = True
        waiters, self._waiters = self._waiters, deque()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(PoolInvalidStateError("the pool was closed"))
        items = [*self._idle, *self._in_use]
        self._idle.clear()
        self._in_use.clear()
        await asyncio.gather(*map(_close, items))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise PoolInvalidStateError("the pool is closed")

    async def get(self) -> T:
        """An item that has to be given back by :meth:`put`; better use :meth:`acquire`.

        Raises:
            PoolInvalidStateError: the pool is closed, or was closed meanwhile.
        """
        self._check_open()
        if not self._waiters:  # else they come first
            while self._idle:
                item = self._idle.popleft()
                if not _is_dead(item):
                    self._in_use.append(item)
                    return item
            if self._has_room:
                self._being_made += 1
                return await self._make()
        given = await self._wait()
        if not isinstance(given, _MakeOne):
            self._check_open()  # it may have been closed, with the item, since that was given
            return given
        return await self._make()

    async def _wait(self) -> T | _MakeOne:
        """What it returns is counted already, as in use or as being made."""
        waiter: asyncio.Future[T | _MakeOne] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.cancelled():
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
            elif waiter.exception() is None:  # it was given something, and cancelled before it ran
                given = waiter.result()
                if isinstance(given, _MakeOne):
                    self._being_made -= 1
                    self._wake_next()
                elif not self._is_closed:
                    self._take_back(given)
            raise

    async def _make(self) -> T:
        try:
            self._check_open()
            item = await self._constructor(*self._args)
        except BaseException:
            self._being_made -= 1
            self._wake_next()
            raise
        self._being_made -= 1
        if self._is_closed:
            await _close(item)
            raise PoolInvalidStateError("the pool was closed while the item was being made")
        self._in_use.append(item)
        return item

    @property
    def _has_room(self) -> bool:
        return self._max_size is None or len(self._idle) + len(self._in_use) + self._being_made < self._max_size

    def _take_back(self, item: T) -> None:
        for index, each in enumerate(self._in_use):
            if each is item:
                del self._in_use[index]
                break
        else:
            raise ValueError(f"{item!r} was not acquired from this pool, or has been given back")
        if not _is_dead(item):
            self._idle.append(item)
        self._wake_next()

    def _wake_next(self) -> None:
        """Give an idle item, or the leave to make one, to the first who waits."""
        while self._waiters and (self._idle or self._has_room):
            waiter = self._waiters.popleft()
            if waiter.done():  # cancelled
                continue
            while self._idle and _is_dead(self._idle[0]):
                self._idle.popleft()
            if self._idle:
                item = self._idle.popleft()
                self._in_use.append(item)
                waiter.set_result(item)
            else:
                self._being_made += 1
                waiter.set_result(_MAKE_ONE)


class PoolItemContextManager(Generic[T]):
    """What :meth:`Pool.acquire` returns.

    Attributes:
        pool: the pool.
        item: what was acquired, inside the block.
    """

    __slots__ = "item", "pool"

    item: T

    def __init__(self, pool: Pool[T]) -> None:
        self.pool = pool

    async def __aenter__(self) -> T:
        self.item = await self.pool.get()
        return self.item

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if not self.pool.is_closed:  # else the item was closed with it
            self.pool.put(self.item)


def _is_dead(item: object) -> bool:
    """Whether *item* says that it is closed."""
    is_closed: object = getattr(item, "is_closed", False)
    return bool(cast("Callable[[], object]", is_closed)() if callable(is_closed) else is_closed)


async def _close(item: object) -> None:
    """Close *item*, in whichever way it can be."""
    close = getattr(item, "close", None)
    if close is None:
        return
    try:
        result = close()
        if inspect.isawaitable(result):
            await result
    except Exception:
        _log.warning("an item of a pool could not be closed: %r", item, exc_info=True)
