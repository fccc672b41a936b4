"""Makes the broker's side match the registry, on a link that is there.

It compares, and does not count steps: is each exchange, queue and binding declared on this link? Has each open channel
a wire on it, with its prefetch? Does each consumer consume on that wire? So it does nothing twice, and a loss in the
middle needs no code of its own.

A *private channel* declares, so that a refusal (404, 406, …) closes none of the user's. Channels are restored beside
each other: a broker that owes one an answer keeps no other waiting.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeAlias, TypeVar

from pamqp.base import Frame

from leveret.exceptions import (
    AMQPConnectionError,
    ChannelClosed,
    ChannelLimitReached,
    ChannelNotFoundEntity,
    ConnectionClosed,
)
from leveret.log import get_logger
from leveret.prompt import start_task
from leveret.records import ConsumerRecord, Entity, Key, QueueRecord, Record, queue_key
from leveret.registry import Registry, RestorableChannel
from leveret.troubles import Trouble
from leveret.wire.channel import WireChannel
from leveret.wire.outgoing import Publish
from leveret.wire.transport import Transport

_log = get_logger(__name__)

T = TypeVar("T")

_STEP = 10.0
"""Seconds for each answer of the broker."""
_CONSUME = 5.0
"""Seconds for a consume-ok: a queue without a leader may owe it for long, and its channel waits for it."""
_PATIENCE = 1.0
"""Seconds for the answer to a declaration, at first; a queue without a leader may owe it for long."""
_PIPELINE = 25
"""Declarations that are sent ahead of their answers."""


class WiredChannel(RestorableChannel, Protocol):
    """What is asked of a channel of the user's that gets a new wire."""

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

    async def resubscribe(self, record: ConsumerRecord, timeout: float, /) -> None:
        """Consume again."""
        ...

    def release(self) -> None:
        """It is restored: let those go on who wait for it."""
        ...


ChannelsOf: TypeAlias = Callable[[], Sequence[WiredChannel]]
"""Those that the user has open."""


class _Private:
    """A channel of our own on one link: opened when it is needed, and again after a refusal has closed it.

    Args:
        transport: the link.
        lend: gives a channel of the user's, for when they have all that there are. A refusal closes that one, but
            it comes back, and what is missing would not.

    Attributes:
        is_trying: whether consumers are tried out on it: they consume until it is closed.
        is_borrowed: whether it is the user's.
    """

    on_return_raises = False

    def __init__(self, transport: Transport, lend: Callable[[], WireChannel | None]) -> None:
        self.transport = transport
        self.is_trying = self.is_borrowed = False
        self._lend = lend
        self._wire: WireChannel | None = None

    async def wire(self) -> WireChannel:
        if self._wire is None or not self._wire.is_open:
            self.is_trying = self.is_borrowed = False
            try:
                self._wire = await self._open()
            except ChannelLimitReached:
                self._wire = self._lend()
                if self._wire is None:
                    raise
                self.is_borrowed = True
        return self._wire

    async def _open(self) -> WireChannel:
        transport = self.transport
        number = transport.spare_number()
        opening = WireChannel.open(transport, self, number=number, publisher_confirms=False, timeout=math.inf)
        return await _answered(opening, _STEP, transport)

    async def close(self, needed: int = 0) -> None:
        """Close it; where so many channels of the user's need its number too, wait until that is free."""
        wire, self._wire = self._wire, None
        if wire is None or self.is_borrowed:
            return
        wire.close()
        if needed >= self.transport.channel_max:
            await wire.wait_closed(asyncio.get_running_loop().time() + _STEP)

    def on_returned(self, *_: object) -> None: ...

    def take_back(self, publish: Publish, error: Exception) -> bool:
        return False

    def on_nacked(self, in_a_row: int) -> None: ...

    def on_wire_lost(self, wire: WireChannel, error: Exception) -> None: ...


class Restorer:
    """Restores what is missing.

    Args:
        owner: whose connection it is, for the log.
        registry: what there is to be.
        channels: those that the user has open.
        wake: set when there is more to do, or something new to look at; only while :meth:`compare` runs, or somebody
            waits for what is :attr:`busy`, as nobody else would notice.
        on_trouble: told of each refusal (record, error).
        on_renamed: told when a server-named queue has another name (old, new).
    """

    def __init__(
        self,
        owner: object,
        registry: Registry,
        *,
        channels: ChannelsOf,
        wake: asyncio.Event,
        on_trouble: Callable[[Record, Exception], object],
        on_renamed: Callable[[str, str], None],
    ) -> None:
        self._owner = owner
        self._registry = registry
        self._channels = channels
        self._wake = wake
        self._on_trouble = on_trouble
        self._on_renamed = on_renamed
        self._private: _Private | None = None
        self._busy: dict[WiredChannel, asyncio.Task[None]] = {}
        self._checked: set[Key] = set()  # consumers that may begin on a channel that is live

    @property
    def busy(self) -> set[asyncio.Task[None]]:
        """Channels that are still being restored; *wake* is set when that ends."""
        return set(self._busy.values())

    async def stop(self) -> None:
        """End what is under way."""
        tasks = list(self._busy.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.gather(*tasks, return_exceptions=True)

    async def compare(self, transport: Transport) -> bool:
        """One comparison, and what follows from it; channels are restored behind its back, see :attr:`busy`.

        Returns:
            Whether everything was tried that is due.
        """
        if self._private is None and self._registry.is_empty and not self._channels():
            return True
        if self._private is None or self._private.transport is not transport:
            self._private = _Private(transport, functools.partial(self._lend, transport))
            self._checked.clear()
        private = self._private
        try:
            all_were_tried = True
            for stage in self._registry.plan():
                steps: list[tuple[Record, Frame]] = [(record, self._registry.method(record)) for record in stage]
                all_were_tried &= await self._declare(private, steps)
            all_were_tried &= await self._check_consumers(private)
            if not private.is_trying:
                await private.close(len(self._channels()))
            self._restore_channels(transport)
            return all_were_tried
        finally:
            if not self._busy:  # else those that are tried out keep auto-delete queues alive
                await private.close()

    def _lend(self, transport: Transport) -> WireChannel | None:
        return next((channel.wire for channel in self._channels() if channel.is_open_on(transport)), None)

    # ------------------------------------------------------------------------------------- exchanges and queues

    async def _declare(self, private: _Private, steps: list[tuple[Record, Frame]]) -> bool:
        """Declare or check, many at a time; whoever is refused does not stop the others.

        Returns:
            Whether all were tried: not while an answer is missing.
        """
        transport = private.transport
        steps.sort(key=lambda step: self._patience(step[0]))
        while steps and transport.is_open:
            steps = [step for step in steps if step[0].key in self._registry]
            try:
                wire = await private.wire()
            except Exception as exc:
                _on_no_channel(transport, exc)
                for record, _ in steps:
                    self._blame(record, transport, exc)
                return True
            batch = steps[:_PIPELINE]
            calls = [asyncio.ensure_future(wire.call(frame, math.inf)) for _, frame in batch]
            try:
                for (record, _), call in zip(batch, calls, strict=True):
                    del steps[0]
                    try:
                        self._on_answer(record, await _answered(call, self._patience(record), transport))
                    except Exception as exc:
                        # It is to blame. Those behind it were not looked at, or have to wait.
                        await private.close()
                        if (frame := self._registry.replacement(record, exc)) is not None:
                            steps.insert(0, (record, frame))
                            break
                        self._blame(record, transport, exc)
                        if isinstance(exc, TimeoutError):  # first those who do not depend on it
                            self._wake.set()
                            return False
                        break
            finally:
                for call in calls:
                    call.cancel()
                await asyncio.gather(*calls, return_exceptions=True)
        return True

    def _patience(self, record: Record) -> float:
        """Seconds for its answer: not many at first, as others wait behind it, but more each time that it owes one."""
        trouble = self._registry.trouble(record.key)
        silences = trouble.attempts if trouble is not None and isinstance(trouble.error, TimeoutError) else 0
        return min(_STEP, _PATIENCE * 2.0 ** min(silences, 10))

    def _on_answer(self, record: Record, reply: object) -> None:
        if isinstance(record, ConsumerRecord):
            self._checked.add(record.key)
        elif record.key in self._registry and isinstance(record, Entity):
            self._on_declared(record, reply)

    def _on_declared(self, record: Entity, reply: object) -> None:
        old_name = record.name if isinstance(record, QueueRecord) else ""
        new_name = self._registry.on_declared(record, reply)
        if new_name is not None:
            self._on_renamed(old_name, new_name)

    # ------------------------------------------------------------------------------------------------ consumers

    async def _check_consumers(self, private: _Private) -> bool:
        """See to it that consuming will not close a channel of the user's.

        A queue that others declared may be gone; a consumer that was refused before is tried out here first.

        Returns:
            Whether all were checked.
        """
        # Those of a channel that is being restored were checked before that began.
        idle = [channel for channel in self._channels() if channel not in self._busy]
        due = [record for channel in idle for record in self._registry.missing(channel)]
        others = [r for r in due if queue_key(r.queue) not in self._registry and not _is_reply_to(r.queue)]
        self._checked |= {record.key for record in due}
        self._checked -= {record.key for record in others}
        all_were_tried = await self._declare(
            private, [(record, QueueRecord(name=record.queue).method(passive=True)) for record in others]
        )
        live = {channel.key for channel in self._channels() if channel.is_live}
        for record in due:  # a channel that is not live yet has nothing to lose
            was_refused = record.channel in live and self._registry.trouble(record.key) is not None
            if was_refused and self._registry.may_try(record.key) and private.transport.is_open:
                await self._try_out(private, record)
        return all_were_tried

    async def _try_out(self, private: _Private, record: ConsumerRecord) -> None:
        """See whether the broker lets it consume; unless it is exclusive, it goes on to until *private* is closed."""
        queue = self._registry.get(queue_key(record.queue))
        if record.exclusive and isinstance(queue, QueueRecord) and queue.auto_delete:
            return  # it would have to stop before the real one starts, and that would delete the queue
        if _is_reply_to(record.queue):
            return  # each channel has its own
        try:
            wire = await private.wire()
            if private.is_borrowed:
                return  # that is no better than the user's own
            trying = wire.try_consume(
                record.queue, exclusive=record.exclusive, arguments=record.arguments, timeout=math.inf
            )
            await _answered(trying, _CONSUME, private.transport)
        except Exception as exc:
            self._blame(record, private.transport, exc)
            await private.close()
        else:
            private.is_trying |= not record.exclusive

    # ------------------------------------------------------------------------------------------------- channels

    def _restore_channels(self, transport: Transport) -> None:
        """Begin with those that need it, and are not being restored already."""
        for channel in self._channels():
            if channel not in self._busy and self._is_incomplete(channel, transport):
                restoring = self._restore_or_blame(channel, transport)
                self._busy[channel] = task = start_task(restoring, f"leveret recovery of channel {channel}")
                task.add_done_callback(functools.partial(self._on_task_done, channel, transport))

    def _is_incomplete(self, channel: WiredChannel, transport: Transport) -> bool:
        return self._registry.incomplete(channel, is_open=channel.is_open_on(transport))

    async def _restore_or_blame(self, channel: WiredChannel, transport: Transport) -> None:
        try:
            await self._restore_channel(channel, transport)
        except Exception as exc:
            _on_no_channel(transport, exc)
            if transport.is_open and not channel.is_closed:
                self._log_refusal(self._registry.on_channel_refused(channel, exc))

    def _on_task_done(self, channel: WiredChannel, transport: Transport, task: asyncio.Task[None]) -> None:
        del self._busy[channel]
        if not self._busy or self._is_incomplete(channel, transport):
            self._wake.set()

    async def _restore_channel(self, channel: WiredChannel, transport: Transport) -> None:
        """A wire, prefetch, consumers; then let those go on who wait for it."""
        if not channel.is_open_on(transport):
            wire = await _answered(channel.open_on(transport, math.inf), _STEP, transport)
            for qos in self._registry.qos(channel):
                try:
                    await _answered(wire.call(qos.method(), math.inf), _STEP, transport)
                except Exception as exc:  # its consumers would get too much: the whole channel has to wait
                    self._blame(qos, transport, exc)
                    wire.close()
                    return
                self._registry.on_restored(qos)
        blamed = not await self._resubscribe(channel, transport)
        if channel.is_open_on(transport):
            if not channel.is_live:
                self._registry.on_channel_restored(channel)
                channel.release()
        elif not blamed and transport.is_open and not channel.is_closed:  # a wire that does not last
            self._registry.on_channel_lost(channel, channel.wire.error or ChannelClosed("lost"))

    async def _resubscribe(self, channel: WiredChannel, transport: Transport) -> bool:
        """Have the missing consumers of *channel* back; returns whether none was refused."""
        none_was_refused = True
        for record in self._registry.missing(channel):
            if not channel.is_open_on(transport):
                break
            is_checked = not channel.is_live or record.key in self._checked
            if not is_checked or not self._registry.is_missing(record, channel):
                continue
            self._checked.discard(record.key)  # which is good for one attempt
            try:
                await _answered(channel.resubscribe(record, math.inf), _CONSUME, transport)
            except Exception as exc:
                none_was_refused = False
                self._blame(record, transport, exc)
                if isinstance(exc, TimeoutError):  # the others, and who waits for the channel, do not wait for it
                    break
            else:
                self._registry.on_restored(record)
        return none_was_refused

    # ------------------------------------------------------------------------------------------------- refusals

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
        self._checked.discard(record.key)
        if record.key in self._registry:
            self._log_refusal(self._registry.on_refused(record, error))
            self._on_trouble(record, error)
            if isinstance(error, ChannelNotFoundEntity):  # what it needs is looked at again
                self._wake.set()

    def _log_refusal(self, trouble: Trouble) -> None:
        is_slow = isinstance(trouble.error, TimeoutError)
        level = logging.WARNING if trouble.attempts == (3 if is_slow else 1) else logging.INFO
        pause = trouble.due - trouble.at
        _log.log(level, "%s: cannot restore %s; next attempt in %.1f s", self._owner, trouble, pause)


async def _answered(call: Awaitable[T], seconds: float, transport: Transport) -> T:
    """What the broker answers.

    Raises:
        TimeoutError: nothing within so many seconds; while it blocks the connection it does not read, and they do not
            count.
    """
    task = asyncio.ensure_future(call)
    try:
        while not task.done():
            was_blocked = transport.blocked is not None
            await asyncio.wait({task}, timeout=seconds)
            if not task.done() and not was_blocked and transport.blocked is None:
                raise TimeoutError(f"the broker did not answer within {seconds:g} s")
    finally:
        if task.cancel():
            await asyncio.wait({task})
    return task.result()


def _on_no_channel(transport: Transport, error: Exception) -> None:
    if isinstance(error, TimeoutError):  # a sound link always can
        transport.abort(AMQPConnectionError(f"the broker opens no channel: {error}"))


def _is_reply_to(queue: str) -> bool:
    """Direct reply-to is no queue that could be looked for (https://www.rabbitmq.com/docs/direct-reply-to)."""
    return queue.startswith("amq.rabbitmq.reply-to")
