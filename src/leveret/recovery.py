"""The one owner of a robust connection's recovery: a task that has a link, and has everything restored on it.

Whatever happens, it asks in this order what is missing: a link? something on it (:mod:`leveret.restore`)? So a loss in
the middle of recovery starts over, and needs no code of its own. When nothing is missing it ends: while a connection
is well, there is no task.

*Events* (a channel or a consumer was lost, a refresh was asked for) go into an inbox, are told to the registry
(:mod:`leveret.registry`) before each comparison, and have the task begin, or go on; so does the loss of the link. Only
this task moves the state (:mod:`leveret.lifecycle`), but for that loss and ``close()``, which count at once.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterable

from leveret.exceptions import AMQPConnectionError, AMQPError, ConnectionClosed, TopologyError
from leveret.lifecycle import ConnectionState, Event, next_state
from leveret.log import get_logger, printable
from leveret.outcome import fail
from leveret.prompt import start_task
from leveret.records import ConsumerRecord, Key, Record
from leveret.registry import Registry, RestorableChannel
from leveret.restore import ChannelsOf, Restorer
from leveret.retry import RetryPolicy
from leveret.wire.transport import Transport

_log = get_logger(__name__)

_STABLE_AFTER, _MAX_FLAP_PAUSE = 1.0, 2.0
"""A link that was ready for less than so many seconds flaps: the next attempt waits, up to so long."""
_MIN_PAUSE = 0.05


class Recovery:
    """The lifecycle of one robust connection.

    Args:
        owner: whose connection it is, for the log.
        registry: what is to be restored.
        channels: those that the user has open.
        connect: one attempt at each host; returns an open transport.
        retry: how to go on after a loss.
        on_state: told of each change (old, new, cause).
        on_trouble: told of each refusal (record, error).
        on_renamed: told when a server-named queue has another name (old, new).
        chores: begins what else there is to do on a link; returns when it wants to be called again, in event loop time.
    """

    def __init__(
        self,
        owner: object,
        registry: Registry,
        *,
        channels: ChannelsOf,
        connect: Callable[[], Awaitable[Transport]],
        retry: RetryPolicy,
        on_state: Callable[[ConnectionState, ConnectionState, Exception | None], None],
        on_trouble: Callable[[Record, Exception], object],
        on_renamed: Callable[[str, str], None],
        chores: Callable[[], float],
    ) -> None:
        self.state = ConnectionState.NEW
        self.transport: Transport | None = None
        self.cause: Exception | None = None
        self._owner = owner
        self._registry = registry
        self._connect = connect
        self._retry = retry
        self._on_state = on_state
        self._chores = chores
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = asyncio.Event()
        self._restorer = Restorer(
            owner, registry, channels=channels, wake=self._wake, on_trouble=on_trouble, on_renamed=on_renamed
        )
        self._refreshing: set[asyncio.Future[None]] = set()
        self._ready_at: float | None = None
        self._flaps = 0
        self._task: asyncio.Task[None] | None = None  # done, when there is nothing to do
        self._context: contextvars.Context | None = None  # of whoever made the connection
        self._alarm: asyncio.TimerHandle | None = None  # for when there will be
        self._first_link: asyncio.Future[None] | None = None

    # ------------------------------------------------------------------------------------------ from outside

    async def start(self, first: RetryPolicy | None) -> None:
        """Connect for the first time, and look after the connection from then on.

        Args:
            first: how to go on when that fails; None to give up at once.

        Raises:
            AMQPConnectionError: it could not be made, and *first* does not go on.
        """
        self._move(Event.CONNECT)
        self._first_link = asyncio.get_running_loop().create_future()
        self._context = contextvars.copy_context()
        self._begin(first)
        await self._first_link

    async def stop(self, deadline: float) -> None:
        """End the task, but do not wait for it beyond *deadline* in event loop time; the link, if any, stays."""
        self._move(Event.CLOSE)
        self._set_alarm(math.inf)
        task = self._task
        if self._first_link is not None and not self._first_link.done():
            fail(self._first_link, ConnectionClosed("the connection was closed while it was being made"))
        if task is not None and not task.done() and task is not asyncio.current_task():
            task.cancel()
            await asyncio.wait([task], timeout=max(0.0, deadline - asyncio.get_running_loop().time()))
        self._tell_refreshing()

    def on_closed(self) -> None:
        """The connection is closed for good."""
        self._move(Event.CLOSED)

    def on_link_lost(self, error: Exception) -> None:
        """The transport died."""
        if self.transport is not None and not self.transport.is_open and self._move(Event.LOST, error):
            self._rouse()

    def on_channel_lost(self, channel: RestorableChannel, error: Exception) -> None:
        """A channel lost its wire on a link that is there."""
        self._post(lambda: self._registry.on_channel_lost(channel, error))

    def on_consumer_lost(self, consumer: Key, error: Exception) -> None:
        """The broker cancelled that consumer."""
        record = self._registry.get(consumer)
        if isinstance(record, ConsumerRecord):
            self._registry.announce(record)
            self._post(lambda: self._registry.on_consumer_lost(record, error))

    def refresh(self, *keys: Key) -> None:
        """Declare these again, and see what else is missing: the broker may not have them any more."""
        self._post(lambda: self._registry.refresh(keys))

    async def restored(self, keys: Iterable[Key]) -> None:
        """As :meth:`refresh`, for what needs them, too; returns when that was tried.

        Raises:
            TopologyError: the broker refuses one.
            ConnectionClosed: the connection is closed.
        """
        if self._is_stopped or self.state is ConnectionState.NEW:
            raise ConnectionClosed("the connection is closed")
        tried: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._refreshing.add(tried)
        tried.add_done_callback(self._refreshing.discard)
        due = self._registry.with_dependents(keys)
        self.refresh(*due)
        await tried
        for key in due:
            trouble, record = self._registry.trouble(key), self._registry.get(key)
            if trouble is not None and record is not None:
                raise TopologyError(f"cannot restore {trouble}", record) from trouble.error

    def hurry(self) -> None:
        """What was in the way is gone: try again what is due later."""
        self._registry.hurry()
        self._rouse()

    def _post(self, event: Callable[[], None]) -> None:
        self._inbox.append(event)
        self._rouse()

    def _rouse(self) -> None:
        """There is something to do."""
        self._wake.set()
        if self._task is not None and self._task.done() and self.transport is not None and not self._is_stopped:
            self._begin()

    def _begin(self, first: RetryPolicy | None = None) -> None:
        self._task = start_task(self._run(first), "leveret recovery", context=self._context)
        self._task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() and not self._is_stopped:  # by a stranger, who may not want tasks any more
            self._give_up(ConnectionClosed("recovery was cancelled"))

    def _set_alarm(self, due: float) -> None:
        """Have something to do at *due*, in event loop time; ``math.inf`` for never."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if due < math.inf and not self._is_stopped:
            self._alarm = asyncio.get_running_loop().call_at(due, self._rouse)

    def _move(self, event: Event, cause: Exception | None = None) -> bool:
        """Go where *event* leads; returns whether that is another state."""
        old, new = self.state, next_state(self.state, event)
        if old is new:
            return False
        self.state = new
        self.cause = cause
        self._on_state(old, new, cause)
        return True

    @property
    def _is_stopped(self) -> bool:
        return self.state in {ConnectionState.CLOSING, ConnectionState.CLOSED}

    # ---------------------------------------------------------------------------------------------- the task

    async def _run(self, first: RetryPolicy | None) -> None:
        try:
            await self._look_after(first)
        finally:
            await self._restorer.stop()

    async def _look_after(self, first: RetryPolicy | None) -> None:
        while not self._is_stopped:
            transport = self.transport
            try:
                if transport is None:
                    transport = await self._link(first, is_first=True)
                elif not transport.is_open:
                    await self._calm_down()
                    transport = await self._link(self._retry, is_first=False)
            except Exception as exc:
                if transport is not None and not self._is_stopped:
                    _log.error("%s: gave up reconnecting: %s", self._owner, printable(str(exc)))
                self._give_up(exc)
                return
            try:
                if await self._restore(transport):
                    return
            except Exception:
                _log.exception("%s: recovery failed; starting over with a new link", self._owner)
                transport.abort(AMQPConnectionError("recovery failed"))
                self._ready_at = None

    def _give_up(self, error: Exception) -> None:
        self._move(Event.GAVE_UP, error)
        self._set_alarm(math.inf)
        self._tell_refreshing()
        if self._first_link is not None:
            fail(self._first_link, error)

    def _tell_refreshing(self) -> None:
        """Nothing is restored any more."""
        for tried in list(self._refreshing):
            fail(tried, ConnectionClosed("the connection is closed"))

    async def _calm_down(self) -> None:
        """Pause before connecting again if the last link did not last."""
        now = asyncio.get_running_loop().time()
        if self._ready_at is not None and now - self._ready_at >= _STABLE_AFTER:
            self._flaps = 0
            return
        self._flaps += 1
        await asyncio.sleep(min(_MAX_FLAP_PAUSE, _MIN_PAUSE * 2 ** min(self._flaps, 10)) * random.random())

    async def _link(self, policy: RetryPolicy | None, *, is_first: bool) -> Transport:
        """Attempt after attempt, until there is a link.

        Raises:
            Exception: the last attempt's, when *policy* gives up.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        pauses = iter(policy.pauses()) if policy is not None else iter(())
        while True:
            try:
                transport = await self._connect()
                if not transport.is_open:  # lost before this task came to run again
                    raise transport.closed_error()
            except Exception as exc:
                pause = next(pauses, None)
                if pause is None or policy is None or self._is_stopped:
                    raise
                if not policy.retryable(exc):
                    if is_first:
                        raise
                    if isinstance(exc, AMQPError | OSError):  # else it is the user's provider or resolver that failed
                        pause = max(pause, policy.maximum)
                    level, said = logging.ERROR, repr(exc)
                else:
                    level, said = logging.INFO, str(exc)
                _log.log(level, "%s: not connected, next attempt in %.1f s: %s", self._owner, pause, printable(said))
                self.cause = exc
                if policy.max_time is not None and loop.time() + pause - began > policy.max_time:
                    raise
                await asyncio.sleep(max(pause, _MIN_PAUSE))
            else:
                self.transport = transport
                self._ready_at = None
                self._read_inbox()  # it is about the link before
                self._registry.on_linked()
                self._move(Event.LINKED)
                return transport

    async def _restore(self, transport: Transport) -> bool:
        """Have restored what is missing; returns whether all is there, or False when the link is lost."""
        loop = asyncio.get_running_loop()
        while transport.is_open:
            began = loop.time()
            self._set_alarm(math.inf)
            self._wake.clear()
            refreshing = list(self._refreshing)
            self._read_inbox()
            self._registry.look()
            all_was_tried = await self._restorer.compare(transport)
            due = self._chores()
            if not transport.is_open:
                break
            if all_was_tried:
                if refreshing:
                    _when_done(self._restorer.busy, refreshing)
                self._check_settled()
            if not self._wake.is_set():
                # What was due when this comparison began was tried, or waits for something else that is in trouble.
                self._set_alarm(min(due, self._registry.next_due(began)))
                if all_was_tried and not self._restorer.busy:
                    return True
                await self._wake.wait()
        return False

    def _read_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _check_settled(self) -> None:
        if self.state is not ConnectionState.RECOVERING or self._restorer.busy or self._inbox:
            return
        if not self._registry.is_settled():
            return
        self._registry.on_settled()
        self._ready_at = asyncio.get_running_loop().time()
        self._move(Event.RESTORED)
        if self._registry.has_troubles:  # from here on they are tried again and again
            self._wake.set()
        if self._first_link is not None and not self._first_link.done():
            self._first_link.set_result(None)


def _when_done(tasks: set[asyncio.Task[None]], waiting: list[asyncio.Future[None]]) -> None:
    """Tell those who wait when *tasks* are done."""

    def on_done(task: asyncio.Task[None]) -> None:
        tasks.discard(task)
        if not tasks:
            tell()

    def tell() -> None:
        for each in waiting:
            if not each.done():
                each.set_result(None)

    for task in list(tasks):
        task.add_done_callback(on_done)
    if not tasks:
        tell()
