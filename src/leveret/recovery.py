"""The one owner of a robust connection's recovery: a task that makes the broker's side match the records.

It compares, and does not count steps: whatever happens, the task wakes and asks in this order what is missing. Is
there a link? Is each exchange, queue and binding declared on it (``_done``)? Has each open channel a wire on it, with
its prefetch? Is each consumer attached to that wire? So a loss in the middle of recovery needs no code of its own, and
nothing is done twice.

*Events* (a channel or a consumer was lost, a refresh was asked for) go into an inbox, are looked at before the
comparison, and wake the task; so does the loss of the link. Only this task moves the state (:mod:`leveret.lifecycle`),
but for that loss and ``close()``, which count at once.

A *private channel* declares, so that a refusal (404, 406, …) closes none of the user's. What was refused is *trouble*:
kept, retried with growing pauses, reported; what needs it waits, and nothing else does. A channel that the broker
closes again and again is trouble in the same way.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import random
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Any, Protocol, TypeAlias

from pamqp.base import Frame

from leveret.exceptions import AMQPConnectionError, AMQPError, ChannelClosed, ChannelNotFoundEntity, ConnectionClosed
from leveret.lifecycle import ConnectionState, Event, next_state
from leveret.log import get_logger, printable
from leveret.outcome import fail
from leveret.records import (
    ConsumerRecord,
    Entity,
    ExchangeBinding,
    ExchangeRecord,
    Key,
    QueueBinding,
    QueueRecord,
    Record,
    queue_key,
)
from leveret.retry import RetryPolicy
from leveret.topology import Topology
from leveret.troubles import Trouble, Troubles
from leveret.wire.channel import WireChannel
from leveret.wire.outgoing import Publish
from leveret.wire.transport import Transport

_log = get_logger(__name__)

_STEP = 10.0
"""Seconds for each answer of the broker while restoring."""
_CONSUME = 5.0
"""Seconds for a consume-ok: a queue without a leader may owe it for long, and its channel waits for it."""
_PIPELINE = 25
"""Declarations that are sent ahead of their answers."""
_STABLE_AFTER, _MAX_FLAP_PAUSE = 1.0, 2.0
"""A link that was ready for less than so many seconds flaps: the next attempt waits, up to so long."""
_MIN_PAUSE = 0.05


class Subscriptions(Protocol):
    """What recovery asks of a channel of the user's; *wire* methods are about its newest one."""

    key: int

    @property
    def is_closed(self) -> bool:
        """Whether it is closed for good."""
        ...

    @property
    def is_live(self) -> bool:
        """Whether it is restored."""
        ...

    @property
    def wire(self) -> WireChannel:
        """Its newest wire."""
        ...

    def is_open_on(self, transport: Transport, /) -> bool:
        """Whether it has an open wire on *transport*."""
        ...

    async def open_on(self, transport: Transport, timeout: float, /) -> WireChannel:
        """Give it a new wire."""
        ...

    def is_attached(self, record: ConsumerRecord, /) -> bool:
        """Whether that consumer consumes on the wire."""
        ...

    def is_consuming(self, record: ConsumerRecord, /) -> bool:
        """Whether the broker has confirmed that it does."""
        ...

    async def resubscribe(self, record: ConsumerRecord, timeout: float, /) -> None:
        """Consume again."""
        ...

    def release(self) -> None:
        """It is restored: let those go on who wait for it."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class _ChannelLost:
    channel: Subscriptions
    error: Exception


@dataclasses.dataclass(frozen=True, slots=True)
class _ConsumerLost:
    record: ConsumerRecord
    error: Exception


@dataclasses.dataclass(frozen=True, slots=True)
class _Refresh:
    """These records may be true no longer."""

    keys: tuple[Key, ...]


_Event: TypeAlias = _ChannelLost | _ConsumerLost | _Refresh


class _Private:
    """Recovery's own channel on one link: opened when it is needed, and again after a refusal has closed it."""

    on_return_raises = False

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._wire: WireChannel | None = None

    async def wire(self) -> WireChannel:
        if self._wire is None or not self._wire.is_open:
            transport = self._transport
            # The last number: the user may want to give the first ones to channels of their own.
            number = transport.channel_max if transport.channel_max not in transport.channels else None
            self._wire = await WireChannel.open(transport, self, number=number, publisher_confirms=False, timeout=_STEP)
        return self._wire

    async def close(self, needed: int = 0) -> None:
        """Close it; where so many channels of the user's need its number too, wait until that is free."""
        if self._wire is not None:
            self._wire.close()
            if needed >= self._transport.channel_max:
                await self._wire.wait_closed(asyncio.get_running_loop().time() + _STEP)

    def on_returned(self, *_: object) -> None: ...

    def take_back(self, publish: Publish, error: Exception) -> bool:
        return False

    def on_wire_lost(self, wire: WireChannel, error: Exception) -> None: ...


class Recovery:
    """The lifecycle of one robust connection.

    Args:
        topology: what is to be restored.
        loop: where it runs.
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
        topology: Topology,
        *,
        loop: asyncio.AbstractEventLoop,
        channels: Callable[[], Iterable[Subscriptions]],
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
        self._topology = topology
        self._channels = channels
        self._connect = connect
        self._retry = retry
        self._on_state = on_state
        self._on_trouble = on_trouble
        self._on_renamed = on_renamed
        self._chores = chores
        self._inbox: deque[_Event] = deque()
        self._news: set[Key] = set()  # consumers that the inbox is about
        self._wake = asyncio.Event()
        self._refreshing: list[asyncio.Future[None]] = []
        self._done: set[Key] = set()
        self._known: set[Key] = set()  # what was declared on this link at some time
        self._troubles = Troubles(loop.time)
        self._ready_at: float | None = None
        self._linked_at = 0.0
        self._flaps = 0
        self._task: asyncio.Task[None] | None = None
        self._first_link: asyncio.Future[None] | None = None

    # ------------------------------------------------------------------------------------------ from outside

    async def start(self, first: RetryPolicy | None) -> None:
        """Connect for the first time, and look after the connection from then on.

        Args:
            first: how to go on when that fails; None to give up at once.

        Raises:
            AMQPConnectionError: it could not be made, and *first* does not go on.
        """
        loop = asyncio.get_running_loop()
        self._move(Event.CONNECT)
        self._first_link = loop.create_future()
        self._task = loop.create_task(self._run(first), name="leveret recovery")
        await asyncio.shield(self._first_link)

    async def stop(self, deadline: float) -> None:
        """End the task, but do not wait for it beyond *deadline* in event loop time; the link, if any, stays."""
        self._move(Event.CLOSE)
        loop = asyncio.get_running_loop()
        task = self._task  # kept: the loop holds its tasks weakly
        if self._first_link is not None:
            fail(self._first_link, ConnectionClosed("the connection was closed while it was being made"))
        if task is not None and task is not asyncio.current_task():
            task.cancel()
            await asyncio.wait([task], timeout=max(0.0, deadline - loop.time()))

    def on_closed(self) -> None:
        """The connection is closed for good."""
        self._move(Event.CLOSED)

    def on_link_lost(self, error: Exception) -> None:
        """The transport died; the comparison sees that for itself."""
        if self.transport is not None and not self.transport.is_open and self._move(Event.LOST, error):
            self._wake.set()

    def on_channel_lost(self, channel: Subscriptions, error: Exception) -> None:
        """A channel lost its wire on a link that is there."""
        self._post(_ChannelLost(channel, error))

    def on_consumer_lost(self, record: ConsumerRecord, error: Exception) -> None:
        """The broker cancelled a consumer: its queue may be gone, and with it its bindings."""
        self._news.add(record.key)
        self._post(_ConsumerLost(record, error))

    def refresh(self, *keys: Key) -> None:
        """Declare these again, and see what else is missing: the broker may not have them any more."""
        self._post(_Refresh(keys))

    async def refreshed(self, *keys: Key) -> None:
        """As :meth:`refresh`; returns when it was tried.

        Raises:
            ConnectionClosed: the connection is closed.
        """
        if self._task is None or self._task.done():
            raise ConnectionClosed("the connection is closed")
        tried: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._refreshing.append(tried)
        self.refresh(*keys)
        await tried

    def hurry(self) -> None:
        """What was in the way is gone: try again what is due later."""
        self._troubles.hurry_all(but=())
        self._wake.set()

    def on_done(self, key: Key) -> None:
        """The user has just declared, bound or consumed that."""
        self._done.add(key)
        self._known.add(key)
        self._troubles.over(key)

    def on_forgotten(self, key: Key) -> None:
        """The record is gone."""
        self._done.discard(key)
        self._known.discard(key)
        self._troubles.over(key)
        self._troubles.over(_lost_key(key))

    @property
    def troubles(self) -> list[Trouble]:
        """What is not restored, and the channels that were lost more than once lately."""
        well: set[Key] = set()
        for channel in self._channels():
            if channel.is_live:
                well.add(channel_key(channel))
                well |= {_lost_key(r.key) for r in self._topology.consumers(channel.key) if channel.is_attached(r)}
        return self._troubles.current(well.__contains__)

    @property
    def missing(self) -> list[str]:
        """What is about to be restored."""
        channels = [channel for channel in self._channels() if not channel.is_live]
        consumers = [
            r
            for channel in self._channels()
            for r in self._topology.consumers(channel.key)
            if not channel.is_consuming(r) and r.key not in self._troubles
        ]
        return [f"{what}: not restored yet" for what in [*(f"channel {c}" for c in channels), *consumers]]

    def trouble(self, key: Key) -> Trouble | None:
        """What is wrong with that record."""
        return self._troubles.get(key)

    # ---------------------------------------------------------------------------------------------- the task

    async def _run(self, first: RetryPolicy | None) -> None:
        try:
            await self._look_after(first)
        finally:
            for tried in self._refreshing:
                fail(tried, ConnectionClosed("the connection is closed"))

    async def _look_after(self, first: RetryPolicy | None) -> None:
        try:
            transport = await self._link(first, is_first=True)
        except Exception as exc:
            self._move(Event.GAVE_UP, exc)
            if self._first_link is not None:
                fail(self._first_link, exc)
            return
        while not self._is_stopped:
            try:
                await self._keep(transport)
            except Exception:
                _log.exception("recovery failed; starting over with a new link")
                transport.abort(AMQPConnectionError("recovery failed"))
                self._ready_at = None
            try:
                await self._calm_down()
                transport = await self._link(self._retry, is_first=False)
            except Exception as exc:
                if not self._is_stopped:
                    _log.error("gave up reconnecting: %s", printable(str(exc)))
                    self._move(Event.GAVE_UP, exc)
                if self._first_link is not None:
                    fail(self._first_link, exc)
                return

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
                    _log.error("cannot reconnect, next attempt in %.1f s: %s", pause, printable(repr(exc)))
                else:
                    _log.info("cannot connect, next attempt in %.1f s: %s", pause, printable(str(exc)))
                self.cause = exc
                if policy.max_time is not None and loop.time() + pause - began > policy.max_time:
                    raise
                await asyncio.sleep(max(pause, _MIN_PAUSE))
            else:
                self.transport = transport
                self._done.clear()
                self._known.clear()
                self._troubles.hurry_all(but=ConnectionClosed)  # those may have been what killed the last link
                self._ready_at, self._linked_at = None, loop.time()
                self._move(Event.LINKED)
                return transport

    @property
    def _is_stopped(self) -> bool:
        return self.state in {ConnectionState.CLOSING, ConnectionState.CLOSED}

    async def _keep(self, transport: Transport) -> None:
        """Restore what is missing whenever something is, until the link is lost."""
        loop = asyncio.get_running_loop()
        while transport.is_open:
            began = loop.time()
            self._wake.clear()
            waiting = len(self._refreshing)
            self._read_inbox()
            self._forget_troubles()
            await self._restore(transport)
            due = self._chores()
            if not transport.is_open:
                return
            for tried in self._refreshing[:waiting]:
                if not tried.done():
                    tried.set_result(None)
            del self._refreshing[:waiting]
            if self.state is ConnectionState.RECOVERING and self._is_restored():
                self._ready_at = loop.time()
                self._move(Event.RESTORED)
                if self._troubles:  # from here on they are tried again and again
                    self._wake.set()
                if self._first_link is not None and not self._first_link.done():
                    self._first_link.set_result(None)
            if self._wake.is_set():
                continue
            # What was due when this comparison began was tried, or waits for something else that is in trouble.
            due = min(due, self._troubles.next_due(began))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(due if due < math.inf else None):
                    await self._wake.wait()

    def _forget_troubles(self) -> None:
        """Of what nobody wants any more."""
        if self._troubles:
            channels = {channel_key(channel) for channel in self._channels()}
            keys = {record.key for record in self._topology}
            self._troubles.keep(channels | keys | {_lost_key(key) for key in keys})

    def _is_restored(self) -> bool:
        """Whether all was tried: it is true, or in trouble, or needs what is."""
        if self._inbox:
            return False
        if any(self._is_due(record) and record.key not in self._troubles for record in self._topology.plan()):
            return False
        for channel in self._channels():
            if not channel.is_live:
                keys = [channel_key(channel), *(record.key for record in self._topology.qos(channel.key))]
                if not any(key in self._troubles for key in keys):
                    return False
            elif any(record.key not in self._troubles for record in self._missing(channel)):
                return False
        return True

    def _read_inbox(self) -> None:
        doubted: set[Key] = set()
        while self._inbox:
            event = self._inbox.popleft()
            if isinstance(event, _ConsumerLost):
                doubted.add(queue_key(event.record.queue))
            self._on_event(event)
        self._news.clear()
        self._doubt(doubted)

    def _doubt(self, keys: Collection[Key]) -> None:
        """These may not be there any more, nor what needs them."""
        if keys:
            self._done.difference_update(self._topology.with_dependents(keys))

    def _on_event(self, event: _Event) -> None:
        match event:
            case _ChannelLost(channel, error):
                self._troubles.lost(channel_key(channel), f"channel {channel}", error)
                if isinstance(error, ChannelNotFoundEntity):  # somebody deleted it: was it ours?
                    self._done.clear()
            case _ConsumerLost(record, error):
                self._troubles.lost(_lost_key(record.key), str(record), error)
            case _Refresh(keys):
                self._done.difference_update(keys)
                for key in keys:
                    self._troubles.hurry(key)
                    self._troubles.hurry(_lost_key(key))

    def _post(self, event: _Event) -> None:
        self._inbox.append(event)
        self._wake.set()

    def _move(self, event: Event, cause: Exception | None = None) -> bool:
        """Go where *event* leads; returns whether that is another state."""
        old, new = self.state, next_state(self.state, event)
        if old is new:
            return False
        self.state = new
        self.cause = cause
        self._on_state(old, new, cause)
        return True

    # --------------------------------------------------------------------------------------------- restoring

    async def _restore(self, transport: Transport) -> None:
        """One comparison, and what follows from it."""
        private = _Private(transport)
        self._doubt_queues()
        try:
            for kind in (ExchangeRecord, QueueRecord, QueueBinding | ExchangeBinding):
                plan = [record for record in self._topology.plan() if isinstance(record, kind) and self._is_due(record)]
                await self._declare(private, transport, [(record, self._method(record)) for record in plan])
            tried_out = await self._check_consumers(private, transport)
            if not tried_out:
                await private.close(len(list(self._channels())))
            await self._restore_channels(transport)
        finally:
            await private.close()

    def _doubt_queues(self) -> None:
        """A consumer that waited its turn was told of no further deletion of its queue: declare that again."""
        doubted: set[Key] = set()
        for channel in self._channels():
            for record in self._topology.consumers(channel.key):
                lost = self._troubles.get(_lost_key(record.key))
                if lost is not None and lost.due > lost.at and self._is_missing(record, channel):
                    doubted.add(queue_key(record.queue))
        self._doubt(doubted)

    async def _restore_channels(self, transport: Transport) -> None:
        channels = [channel for channel in self._channels() if self._is_incomplete(channel, transport)]
        results = await asyncio.gather(*(self._restore_channel(c, transport) for c in channels), return_exceptions=True)
        for channel, result in zip(channels, results, strict=True):
            if isinstance(result, Exception) and transport.is_open and not channel.is_closed:
                self._on_refused(f"channel {channel}", channel_key(channel), result)

    def _method(self, record: Entity) -> Frame:
        """How to make sure of it; a queue that the broker named on this link may still be there."""
        if isinstance(record, QueueRecord):
            return record.method(passive=record.server_named and record.key in self._known)
        return record.method()

    def _is_due(self, record: Record) -> bool:
        """Whether it is not true yet, and now is the time to make it so."""
        return record.key not in self._done and self._is_possible(record)

    def _is_possible(self, record: Record) -> bool:
        """Whether what it needs is there, and it was not refused a moment ago."""
        needs_are_met = all(key in self._done or key not in self._topology for key in record.needs)
        return needs_are_met and self._may_try(record.key)

    def _may_try(self, key: Key) -> bool:
        """Whether it is in no trouble, or its pause is over; before all is ready, each has one attempt."""
        trouble = self._troubles.get(key)
        if trouble is not None and self.state is ConnectionState.RECOVERING and trouble.at >= self._linked_at:
            return False
        return self._troubles.may_try(key)

    def _missing(self, channel: Subscriptions) -> list[ConsumerRecord]:
        """The consumers of *channel* that are to be restored now."""
        return [record for record in self._topology.consumers(channel.key) if self._is_missing(record, channel)]

    def _is_missing(self, record: ConsumerRecord, channel: Subscriptions) -> bool:
        """Whether it is to be restored now: not before it was looked at why it was lost."""
        if channel.is_attached(record) or not self._is_possible(record):
            return False
        is_news = record.key in self._news
        return not is_news and record.key in self._topology and self._may_try(_lost_key(record.key))

    def _is_incomplete(self, channel: Subscriptions, transport: Transport) -> bool:
        keys = [channel_key(channel), *(record.key for record in self._topology.qos(channel.key))]
        if channel.is_closed or not all(map(self._may_try, keys)):
            return False
        return not channel.is_live or not channel.is_open_on(transport) or bool(self._missing(channel))

    async def _declare(self, private: _Private, transport: Transport, steps: list[tuple[Record, Frame]]) -> None:
        """Declare or check, many at a time; whoever is refused does not stop the others."""
        steps = list(steps)
        while steps and transport.is_open:
            steps = [step for step in steps if step[0].key in self._topology]
            batch = steps[:_PIPELINE]
            try:
                wire = await private.wire()
            except Exception as exc:
                self._on_no_channel(transport, exc)
                for record, _ in steps:
                    self._blame(record, transport, exc)
                return
            replies = await asyncio.gather(*(wire.call(frame, _STEP) for _, frame in batch), return_exceptions=True)
            for (record, _), reply in zip(batch, replies, strict=True):
                del steps[0]
                if isinstance(reply, BaseException):
                    # The first that failed is to blame. Those behind it were not looked at, or have to wait.
                    await private.close()
                    if isinstance(reply, ChannelNotFoundEntity) and record.key in self._known:
                        self._known.discard(record.key)
                        if isinstance(record, QueueRecord):  # it has gone, and the broker has to name another one
                            steps.insert(0, (record, record.method()))
                            break
                    self._blame(record, transport, reply)
                    if isinstance(reply, TimeoutError):  # first those who do not depend on it
                        self._wake.set()
                        return
                    break
                if record.key in self._topology:
                    self._on_declared(record, reply)

    def _on_declared(self, record: Record, reply: Any) -> None:
        if isinstance(record, ConsumerRecord):
            return  # only looked whether its queue is there
        self._troubles.over(record.key)
        key = record.key
        if isinstance(record, QueueRecord) and record.server_named and reply.queue != record.name:
            self._topology.rename(record.name, reply.queue)
            key = queue_key(reply.queue)
            self._forget_troubles()
            self._on_renamed(record.name, reply.queue)
        self._done.add(key)
        self._known.add(key)

    async def _check_consumers(self, private: _Private, transport: Transport) -> bool:
        """See to it that consuming will not close a channel of the user's.

        A queue that others declared may be gone; a consumer that was refused before is tried out here first.

        Returns:
            Whether one was tried out; it consumes until *private* is closed.
        """
        due = [record for channel in self._channels() for record in self._missing(channel)]
        others = [r for r in due if queue_key(r.queue) not in self._topology and not _is_reply_to(r.queue)]
        await self._declare(private, transport, [(r, QueueRecord(name=r.queue).method(passive=True)) for r in others])
        tried_out = False
        live = {channel.key for channel in self._channels() if channel.is_live}
        for record in due:  # a channel that is not live yet has nothing to lose
            if (
                record.channel in live
                and record.key in self._troubles
                and self._may_try(record.key)
                and transport.is_open
            ):
                tried_out |= await self._try_out(private, transport, record)
        return tried_out

    async def _try_out(self, private: _Private, transport: Transport, record: ConsumerRecord) -> bool:
        """Whether the broker lets it consume, and goes on to until *private* is closed."""
        queue = self._topology.get(queue_key(record.queue))
        if record.exclusive and isinstance(queue, QueueRecord) and queue.auto_delete:
            return False  # it would have to stop before the real one starts, and that would delete the queue
        if _is_reply_to(record.queue):
            return False  # each channel has its own
        try:
            wire = await private.wire()
            await wire.try_consume(
                record.queue, exclusive=record.exclusive, arguments=record.arguments, timeout=_CONSUME
            )
        except Exception as exc:
            self._blame(record, transport, exc)
            await private.close()
            return False
        return not record.exclusive

    async def _restore_channel(self, channel: Subscriptions, transport: Transport) -> None:
        """A wire, prefetch, consumers; then let those go on who wait for it."""
        record: Record
        while transport.is_open and not channel.is_closed:
            blamed = False
            if not channel.is_open_on(transport):
                try:
                    wire = await channel.open_on(transport, _STEP)
                except Exception as exc:
                    self._on_no_channel(transport, exc)
                    raise
                for record in self._topology.qos(channel.key):
                    try:
                        await wire.call(record.method(), _STEP)
                    except Exception as exc:  # its consumers would get too much: the whole channel has to wait
                        self._blame(record, transport, exc)
                        wire.close()
                        return
                    self._troubles.over(record.key)
            for record in self._missing(channel):
                if not channel.is_open_on(transport):
                    break
                if not self._is_missing(record, channel):
                    continue
                try:
                    await channel.resubscribe(record, _CONSUME)
                except Exception as exc:
                    blamed = True
                    self._blame(record, transport, exc)
                    if isinstance(exc, TimeoutError):  # the others, and who waits for the channel, do not wait for it
                        self._wake.set()
                        break
                else:
                    self._troubles.over(record.key)
            if not channel.is_open_on(transport) and not blamed:  # a wire that does not last
                if transport.is_open and not channel.is_closed:
                    error = channel.wire.error or ChannelClosed("lost")
                    self._troubles.lost(channel_key(channel), f"channel {channel}", error)
                    self._wake.set()
                return
            if channel.is_open_on(transport):
                if not channel.is_live:
                    self._troubles.restored(channel_key(channel))
                    channel.release()
                return

    def _on_no_channel(self, transport: Transport, error: Exception) -> None:
        if isinstance(error, TimeoutError) and transport.blocked is None:  # a sound link always can
            transport.abort(AMQPConnectionError(f"the broker opens no channel: {error}"))

    def _blame(self, record: Record, transport: Transport, error: BaseException) -> None:
        """*record* was refused with *error*, unless it was the link that failed."""
        if not transport.is_open:
            # The broker closes the connection itself over some refusals, and says by which method.
            lost = transport.error
            if not (isinstance(lost, ConnectionClosed) and lost.by_broker and lost.class_id):
                return
            error = lost
        if not isinstance(error, Exception):
            raise error
        if record.key in self._topology:
            self._on_refused(str(record), record.key, error)
            self._on_trouble(record, error)
            if isinstance(error, ChannelNotFoundEntity):  # is what it needs not there any more?
                self._doubt(record.needs)
                self._wake.set()

    def _on_refused(self, what: str, key: Key, error: Exception) -> None:
        trouble = self._troubles.refused(key, what, error)
        level = logging.WARNING if trouble.attempts == 1 else logging.INFO
        _log.log(level, "cannot restore %s; next attempt in %.1f s", trouble, trouble.due - trouble.at)


def channel_key(channel: Subscriptions) -> Key:
    """By which a channel is known where records are known by theirs."""
    return "channel", channel.key


def _lost_key(consumer: Key) -> Key:
    """By which it is known how often the broker cancelled a consumer."""
    return "lost", *consumer


def _is_reply_to(queue: str) -> bool:
    """Direct reply-to is no queue that could be looked for (https://www.rabbitmq.com/docs/direct-reply-to)."""
    return queue.startswith("amq.rabbitmq.reply-to")
