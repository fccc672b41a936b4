"""What one robust connection is to have, and what of that it has on its link now.

To the records (:mod:`leveret.topology`) it adds what is *done*, declared or found on this link, and what is in
*trouble* (:mod:`leveret.troubles`): refused, or lost again and again. From the three, and from what the channels say of
their consumers, follows what is to be restored next. Handles tell it what the user does,
:mod:`leveret.recovery` what happens, :mod:`leveret.restore` what has come of it.

Nothing here waits, or sends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from typing import Any, Protocol

from pamqp.base import Frame

from leveret.exceptions import ChannelNotFoundEntity, ConnectionClosed
from leveret.records import ConsumerRecord, Entity, Key, QosRecord, QueueRecord, Record, queue_key
from leveret.topology import Topology
from leveret.troubles import Trouble, Troubles


class RestorableChannel(Protocol):
    """What is asked of a channel of the user's."""

    key: int

    @property
    def is_closed(self) -> bool:
        """Whether it is closed for good."""
        ...

    @property
    def is_live(self) -> bool:
        """Whether it is restored."""
        ...

    def is_attached(self, record: ConsumerRecord, /) -> bool:
        """Whether that consumer consumes on its newest wire, or is about to."""
        ...

    def is_consuming(self, record: ConsumerRecord, /) -> bool:
        """Whether the broker has confirmed that it does."""
        ...

    def drop_consumer(self, consumer_tag: str, /) -> None:
        """Its queue was deleted by the user."""
        ...


class Registry:
    """The records of one robust connection, and where each stands.

    Args:
        channels: those that the user has open.
        time: event loop time.
    """

    def __init__(self, channels: Callable[[], Iterable[RestorableChannel]], time: Callable[[], float]) -> None:
        self._channels = channels
        self._time = time
        self._topology = Topology()
        self._troubles = Troubles(time)
        self._done: set[Key] = set()
        self._known: set[Key] = set()  # what was done on this link at some time
        self._lost_queues: set[Key] = set()  # of consumers that the broker cancelled since the last look
        self._lost_consumers: set[Key] = set()
        self._looked_after: dict[Key, float] = {}  # when those were lost whose queue was doubted as their turn came
        self._linked_at = 0.0
        self._is_settling = False

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be restored but channels."""
        return not self._topology

    def __contains__(self, key: Key) -> bool:
        return key in self._topology

    def get(self, key: Key) -> Record | None:
        """The record of that identity."""
        return self._topology.get(key)

    def keys_of(self, channel: int) -> list[Key]:
        """What came by way of *channel*."""
        return self._topology.keys_of(channel)

    def with_dependents(self, keys: Iterable[Key]) -> list[Key]:
        """*keys*, and the records that need one of them."""
        return self._topology.with_dependents(keys)

    def trouble(self, key: Key) -> Trouble | None:
        """What is wrong with that record."""
        return self._troubles.get(key)

    # --------------------------------------------------------------------------------------- what the user does

    def remember(self, record: Record, channel: int) -> None:
        """*record* is true, by way of *channel*."""
        self._topology.remember(record, channel)
        self._done.add(record.key)
        self._known.add(record.key)
        self._troubles.over(record.key)

    def forget(self, key: Key) -> None:
        """It is no longer true."""
        self._on_forgotten(record for record, _ in self._topology.forget(key))

    @contextlib.contextmanager
    def forgetting(self, key: Key, *, undone_by: Callable[[Exception], bool]) -> Generator[None]:
        """It is no longer true, unless the block raises what says that it still is."""
        forgotten = self._topology.forget(key)
        try:
            yield
        except Exception as exc:
            if undone_by(exc):
                self._topology.bring_back(forgotten)
                forgotten = []
            raise
        finally:
            self._on_forgotten(record for record, _ in forgotten)

    def forget_channel(self, channel: int) -> None:
        """The user closed it."""
        self._clear(_channel_key(channel))
        self._on_forgotten(self._topology.forget_channel(channel))

    def _on_forgotten(self, records: Iterable[Record]) -> None:
        consumers: list[ConsumerRecord] = []
        for record in records:
            self._clear(record.key)
            if isinstance(record, ConsumerRecord):
                consumers.append(record)
        channels = {channel.key: channel for channel in self._channels()} if consumers else {}
        for consumer in consumers:
            if (channel := channels.get(consumer.channel)) is not None:
                channel.drop_consumer(consumer.consumer_tag)

    def _clear(self, key: Key) -> None:
        self._done.discard(key)
        self._known.discard(key)
        self._looked_after.pop(key, None)
        self._troubles.over(key)
        self._troubles.over(_losses_of(key))

    # --------------------------------------------------------------------------------------------- what happens

    def on_linked(self) -> None:
        """There is a new link, and nothing on it."""
        self._done.clear()
        self._known.clear()
        self._looked_after.clear()
        self._linked_at = self._time()
        self._is_settling = True
        self._troubles.hurry_all(but=ConnectionClosed)  # those may have been what killed the last link

    def on_settled(self) -> None:
        """All was tried once on this link; from here on, what is in trouble is tried again and again."""
        self._is_settling = False

    def on_channel_lost(self, channel: RestorableChannel, error: Exception) -> None:
        """It lost its wire on a link that is there."""
        self._troubles.lost(_channel_key(channel.key), f"channel {channel}", error)
        if isinstance(error, ChannelNotFoundEntity):  # somebody deleted it: was it ours?
            self._done.clear()

    def on_consumer_lost(self, record: ConsumerRecord, error: Exception) -> None:
        """The broker cancelled it: its queue may be gone, and with it its bindings."""
        self._troubles.lost(_losses_of(record.key), str(record), error)
        self._lost_queues.add(queue_key(record.queue))

    def announce(self, record: ConsumerRecord) -> None:
        """It was lost, and nobody has looked yet why: it is not to be restored before."""
        self._lost_consumers.add(record.key)

    def refresh(self, keys: Iterable[Key]) -> None:
        """They may be true no longer: make sure, at once."""
        for key in keys:
            self._done.discard(key)
            self._troubles.hurry(key)
            self._troubles.hurry(_losses_of(key))

    def hurry(self) -> None:
        """What was in the way is gone: try again what is due later."""
        self._troubles.hurry_all(but=())

    # --------------------------------------------------------------------------------- what is to be restored now

    def look(self) -> None:
        """Take in what happened, before the next comparison."""
        self._lost_consumers.clear()
        # A consumer that waited its turn was told of no further deletion of its queue: make sure of that again.
        for channel in self._channels():
            for record in self._topology.consumers(channel.key):
                lost = self._troubles.get(_losses_of(record.key))
                if lost is None or lost.due <= lost.at or self._looked_after.get(record.key) == lost.at:
                    continue
                if self.is_missing(record, channel):
                    self._looked_after[record.key] = lost.at
                    self._lost_queues.add(queue_key(record.queue))
        self._doubt(self._lost_queues)
        self._lost_queues.clear()
        self._forget_troubles()

    def _forget_troubles(self) -> None:
        """Of what nobody wants any more."""
        if self._troubles:
            channels = {_channel_key(channel.key) for channel in self._channels()}
            keys = {record.key for record in self._topology}
            self._troubles.keep(channels | keys | {_losses_of(key) for key in keys})

    def _doubt(self, keys: Collection[Key]) -> None:
        """These may not be there any more, nor what needs them."""
        if keys:
            self._done.difference_update(self._topology.with_dependents(keys))

    def plan(self) -> Iterator[list[Entity]]:
        """What is to be declared, stage by stage; each is looked at when its turn has come."""
        if not self._topology:
            return
        for stage in self._topology.plan():
            yield [record for record in stage if self._is_due(record)]

    def method(self, record: Entity) -> Frame:
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
        return needs_are_met and self.may_try(record.key)

    def may_try(self, key: Key) -> bool:
        """Whether it is in no trouble, or its pause is over; before all is settled, each has one attempt."""
        trouble = self._troubles.get(key)
        if trouble is None:
            return True
        was_refused = trouble.at >= self._linked_at and not trouble.is_loss
        return not (self._is_settling and was_refused) and self._troubles.may_try(key)

    def _was_tried(self, key: Key) -> bool:
        """Whether it got into trouble on this link."""
        trouble = self._troubles.get(key)
        return trouble is not None and trouble.at >= self._linked_at

    def incomplete(self, channel: RestorableChannel, *, is_open: bool) -> bool:
        """Whether something of *channel*, which *is_open* on this link or not, is to be restored now."""
        if channel.is_closed or not all(map(self.may_try, self._needed_by(channel))):
            return False
        return not is_open or not channel.is_live or bool(self.missing(channel))

    def _needed_by(self, channel: RestorableChannel) -> list[Key]:
        return [_channel_key(channel.key), *(record.key for record in self.qos(channel))]

    def qos(self, channel: RestorableChannel) -> list[QosRecord]:
        """Its prefetch."""
        return self._topology.qos(channel.key)

    def missing(self, channel: RestorableChannel) -> list[ConsumerRecord]:
        """The consumers of *channel* that are to be restored now."""
        return [record for record in self._topology.consumers(channel.key) if self.is_missing(record, channel)]

    def is_missing(self, record: ConsumerRecord, channel: RestorableChannel) -> bool:
        """Whether it is one of them."""
        return (
            not channel.is_attached(record)
            and self._is_possible(record)
            and record.key not in self._lost_consumers
            and record.key in self._topology
            and self.may_try(_losses_of(record.key))
        )

    def is_settled(self) -> bool:
        """Whether all was tried: it is true, or in trouble, or needs what is."""
        if any(self.plan()):
            return False
        for channel in self._channels():
            needed = self._needed_by(channel)
            if channel.is_live:
                if self.missing(channel) and all(map(self.may_try, needed)):
                    return False
            elif not any(map(self._was_tried, needed)):
                return False
        return True

    def next_due(self, after: float) -> float:
        """When the first attempt after that moment is due, in event loop time; ``math.inf`` if there is none."""
        return self._troubles.next_due(after)

    @property
    def has_troubles(self) -> bool:
        """Whether anything is."""
        return bool(self._troubles)

    # --------------------------------------------------------------------------------------- what has come of it

    def on_declared(self, record: Entity, reply: Any) -> str | None:
        """The broker has it; returns the name that it has given to a queue, if that is another one."""
        self._troubles.over(record.key)
        key, new_name = record.key, None
        if isinstance(record, QueueRecord) and record.server_named and reply.queue != record.name:
            new_name = reply.queue
            self._topology.rename(record.name, new_name)
            key = queue_key(new_name)
            self._forget_troubles()
        self._done.add(key)
        self._known.add(key)
        return new_name

    def replacement(self, record: Record, error: BaseException) -> Frame | None:
        """How to declare another queue, where *error* says that one is gone which was there on this link."""
        if not isinstance(error, ChannelNotFoundEntity) or record.key not in self._known:
            return None
        self._known.discard(record.key)
        return record.method() if isinstance(record, QueueRecord) else None

    def on_refused(self, record: Record, error: Exception) -> Trouble:
        """The broker refuses it, or does not answer."""
        if isinstance(error, ChannelNotFoundEntity):  # is what it needs not there any more?
            self._doubt(record.needs)
        return self._troubles.refused(record.key, str(record), error)

    def on_channel_refused(self, channel: RestorableChannel, error: Exception) -> Trouble:
        """It could not be opened."""
        return self._troubles.refused(_channel_key(channel.key), f"channel {channel}", error)

    def on_restored(self, record: Record) -> None:
        """The broker did as it says."""
        self._troubles.over(record.key)

    def on_channel_restored(self, channel: RestorableChannel) -> None:
        """It is live again."""
        self._troubles.restored(_channel_key(channel.key))

    # ----------------------------------------------------------------------------------------------- for health

    @property
    def troubles(self) -> list[Trouble]:
        """What is not restored, and the channels and consumers that were lost more than once lately."""
        well: set[Key] = set()
        for channel in self._channels():
            if channel.is_live:
                well.add(_channel_key(channel.key))
                well |= {_losses_of(r.key) for r in self._topology.consumers(channel.key) if channel.is_attached(r)}
        return self._troubles.current(well.__contains__)

    @property
    def pending(self) -> list[str]:
        """What is about to be restored."""
        channels = [channel for channel in self._channels() if not channel.is_live]
        consumers = [
            r
            for channel in self._channels()
            for r in self._topology.consumers(channel.key)
            if not channel.is_consuming(r) and r.key not in self._troubles
        ]
        return [f"{what}: not restored yet" for what in [*(f"channel {c}" for c in channels), *consumers]]


def _channel_key(channel: int) -> Key:
    """By which a channel is known where records are known by theirs."""
    return "channel", channel


def _losses_of(consumer: Key) -> Key:
    """By which it is known how often the broker cancelled a consumer."""
    return "lost", *consumer
