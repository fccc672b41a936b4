"""A queue: what waits in it, who takes it, what expires and what overflows. Classic ones, and what others share; pure.

A queue knows nothing of sockets: consumers are given as :class:`~leveret.testing.consumers.Consumer`, the time as a
:class:`~leveret.testing.clock.Clock`, and what leaves as a dead letter goes to the :class:`Keeper`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol

from leveret.testing.backlog import Backlog
from leveret.testing.consumers import Consumer, Consumers
from leveret.testing.messages import HAS_EXPIRATION, HAS_PRIORITY, Entry, Stored

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from leveret.testing.clock import Clock, Timer
    from leveret.testing.dialect import Dialect
    from leveret.types import FieldValue

Reason = Literal["rejected", "expired", "maxlen", "delivery_limit"]
"""Why a message became a dead letter."""


class Keeper(Protocol):
    """What a queue asks of the virtual host that it is in."""

    clock: Clock
    dialect: Dialect

    def dead_letter(self, queue: Queue, message: Stored, reason: Reason, failures: int) -> None:
        """Publish what left *queue* to where its arguments say, with the number of its *failures*."""
        ...

    def delete_queue(self, queue: Queue) -> object:
        """Delete *queue*, which is not wanted any more."""
        ...


class Queue:
    """One queue.

    Attributes:
        type: as ``x-queue-type`` names it.
        owner: the connection of an exclusive queue.
        unacked: how many of its messages are out for acknowledgement.
        is_deleted: whether it is gone; what is still out then leads nowhere.
    """

    type = "classic"
    is_stream = False

    def __init__(
        self,
        name: str,
        keeper: Keeper,
        *,
        durable: bool = False,
        exclusive: bool = False,
        auto_delete: bool = False,
        arguments: Mapping[str, FieldValue] | None = None,
        owner: object = None,
    ) -> None:
        self.name = name
        self.durable = durable
        self.exclusive = exclusive
        self.auto_delete = auto_delete
        self.arguments: dict[str, Any] = dict(arguments or {})
        self.owner = owner
        self._keeper = keeper
        self.consumers = self._no_consumers()
        self.unacked = 0
        self.is_deleted = False
        self._clock = keeper.clock
        self._counts_failures = self.type in keeper.dialect.failures_counted_by
        self._priorities = self._number("x-max-priority") or 0
        self.backlog = Backlog(self._priorities)
        self._position = 0
        ttl = self._number("x-message-ttl")
        self._ttl = None if ttl is None else ttl / 1000
        expires = self._number("x-expires")
        self._expires = None if expires is None else expires / 1000
        self._max_length = self._number("x-max-length")
        self._max_bytes = self._number("x-max-length-bytes")
        self._is_limited = self._max_length is not None or self._max_bytes is not None
        self._overflow = self.arguments.get("x-overflow", "drop-head")
        self._may_expire = False
        self._expiry: Timer | None = None
        self._unused: Timer | None = None
        self._is_dispatching = False
        self.touch()

    def __repr__(self) -> str:
        return f"<Queue {self.name!r} {self.type} ready={self.ready} unacked={self.unacked}>"

    def _number(self, name: str) -> int | None:
        value = self.arguments.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    @property
    def _has_single_active(self) -> bool:
        return self.arguments.get("x-single-active-consumer") is True

    def _no_consumers(self) -> Consumers:
        return Consumers(single_active=self._has_single_active)

    @property
    def is_quorum(self) -> bool:
        """Whether it counts how often a message came back."""
        return self.type == "quorum"

    @property
    def ready(self) -> int:
        """How many messages wait."""
        return self.backlog.count

    def waiting(self) -> Iterable[Stored]:
        """The messages that wait, in order."""
        return (entry.message for entry in self.backlog)

    # ----------------------------------------------------------------------------------------------- coming in

    def publish(self, message: Stored) -> bool:
        """Take *message*; ``False`` when the queue is full and refuses it (``x-overflow: reject-publish…``)."""
        if self._is_limited and self._overflow != "drop-head" and self._is_full(len(message.body)):
            if self._overflow == "reject-publish-dlx":
                self._keeper.dead_letter(self, message, "maxlen", message.failures)
            return False
        flags = message.flags
        self._position += 1
        priority = message.priority if self._priorities and flags & HAS_PRIORITY else 0
        expires_at = None
        if self._ttl is not None or flags & HAS_EXPIRATION:
            expires_at = self._expiry_of(message)
            self._may_expire = True
        entry = self._entry(message, priority, expires_at)
        if not self.backlog.count and (consumer := self.consumers.next()) is not None:
            entry.redelivered = False  # whatever was before: RabbitMQ looks only at what it takes from a queue
            self._hand_out(consumer, entry)
            return True
        self.backlog.push(entry)
        dropped = self._is_limited and self._drop_heads()
        if self.backlog.count and self.consumers:
            self.dispatch()
        if self._may_expire and (dropped or self.backlog.count == 1):
            self._expire()  # RabbitMQ does not look at a message that a priority has put at the head
        return True

    def _entry(self, message: Stored, priority: int, expires_at: float | None) -> Entry:
        entry = Entry(message, self._position, priority, expires_at)
        entry.redelivered = self._counts_failures and message.failures > 0
        return entry

    def _die(self, entry: Entry, reason: Reason) -> None:
        self._keeper.dead_letter(self, entry.message, reason, entry.failures)

    def _is_full(self, size: int) -> bool:
        if self._max_length is not None and self.backlog.count >= self._max_length:
            return True
        return self._max_bytes is not None and self.backlog.size + size > self._max_bytes

    def _expiry_of(self, message: Stored, *, least: float = 0.0) -> float | None:
        ttls = [ttl for ttl in (self._ttl, message.ttl) if ttl is not None]
        return self._clock.now() + max(least, min(ttls)) if ttls else None

    def _drop_heads(self) -> bool:
        """Drop what is too much; whether there was something."""
        backlog, before = self.backlog, self.backlog.count
        while backlog.count and (
            (self._max_length is not None and backlog.count > self._max_length)
            or (self._max_bytes is not None and backlog.size > self._max_bytes)
        ):
            self._die(backlog.pop(), "maxlen")
        return backlog.count < before

    # ------------------------------------------------------------------------------------------------ going out

    def dispatch(self) -> None:
        """Hand out what waits to those who have room."""
        if self._is_dispatching:
            return  # a delivery that made room for the next: the loop below goes on anyway
        self._is_dispatching = True
        backlog, consumers = self.backlog, self.consumers
        if consumers.has_blocked:
            consumers.refresh()
        try:
            while backlog.count and (consumer := consumers.next()) is not None:
                self._hand_out(consumer, backlog.pop())
                if self._may_expire:
                    self._expire()
        finally:
            self._is_dispatching = False

    def _hand_out(self, consumer: Consumer, entry: Entry) -> None:
        if not consumer.no_ack:
            self.unacked += 1
        consumer.taker.deliver(consumer, entry)

    def get(self, *, no_ack: bool) -> Entry | None:
        """Take the next message, as ``basic.get`` does."""
        self.touch()
        self._expire()
        if not self.backlog.count:
            return None
        entry = self.backlog.pop()
        if not no_ack:
            self.unacked += 1
        self._expire()
        return entry

    def properties_of(self, entry: Entry, *, by_get: bool = False) -> bytes:
        """The properties to send *entry* with."""
        return entry.message.properties

    # ------------------------------------------------------------------------------------------ settled and back

    def settled(self, entry: Entry) -> None:
        """*entry* is done with."""
        self.unacked -= 1

    def reject(self, entry: Entry, *, failed: bool = True) -> None:
        """*entry* was refused for good; *failed* says that it was by ``basic.reject``, which RabbitMQ 4.3 counts."""
        self.unacked -= 1
        if not self.is_deleted:
            entry.failures += self._counts_failures and (failed or not self._keeper.dialect.counts_failures_only)
            self._die(entry, "rejected")

    def requeue(
        self, entries: Iterable[Entry], *, failed: bool = False, ended: bool = False, consumer: Consumer | None = None
    ) -> None:
        """*entries* come back, to the places that they had.

        Args:
            failed: whether they were rejected, or their channel ended.
            ended: whether it was that.
            consumer: who had them in hand, if it is still there.
        """
        if self.is_deleted:
            return
        for entry in entries:
            self.unacked -= 1
            entry.redelivered = True
            entry.failures += failed and self._counts_failures
            self.backlog.put_back(entry)
        self._came_back()

    def _came_back(self) -> None:
        if self._is_limited and self._overflow == "drop-head":
            self._drop_heads()
        self._expire()
        self.dispatch()

    # ------------------------------------------------------------------------------------------------ consumers

    def add_consumer(self, consumer: Consumer) -> None:
        """Let *consumer* take messages."""
        self.consumers.add(consumer)
        self.touch()
        self.dispatch()

    def remove_consumer(self, consumer: Consumer) -> None:
        """Let it take none; an auto-delete queue goes with its last one."""
        if self.is_deleted:
            return
        self.consumers.remove(consumer)
        self.touch()
        if self.auto_delete and not self.consumers:
            self._keeper.delete_queue(self)
        else:
            self.dispatch()  # to the next single active consumer

    # ------------------------------------------------------------------------------------------- ends and limits

    def touch(self) -> None:
        """Somebody used the queue: ``x-expires`` counts from now, and not while there are consumers."""
        if self._unused is not None:
            self._unused.cancel()
            self._unused = None
        if self._expires is not None and not self.consumers and not self.is_deleted:
            self._unused = self._clock.call_later(self._expires, lambda: self._keeper.delete_queue(self))

    def _expire(self, now: float | None = None) -> None:
        """Drop what has expired at the head, and be called again when the next one does."""
        for entry in self.backlog.expired(self._clock.now() if now is None else now):
            self._die(entry, "expired")
        when = self.backlog.next_expiry()
        if when is None:
            return
        if self._expiry is not None and not self._expiry.is_cancelled:
            if self._expiry.when <= when:
                return
            self._expiry.cancel()
        self._expiry = self._clock.call_at(when, self._expire)

    def purge(self) -> int:
        """Drop all that waits; how many there were."""
        return len(self.backlog.clear())

    def forget_transient(self) -> None:
        """What a restart of the broker leaves: the persistent messages, and those of a quorum queue."""
        entries = self.backlog.clear()
        self.unacked = 0
        self.consumers = self._no_consumers()
        for entry in entries:
            if self.is_quorum or entry.message.is_persistent:
                entry.redelivered = True
                self.backlog.put_back(entry)
        self.touch()

    def delete(self) -> int:
        """End the queue; how many messages waited in it."""
        self.is_deleted = True
        for timer in (self._expiry, self._unused):
            if timer is not None:
                timer.cancel()
        count = len(self.backlog.clear())
        for consumer in self.consumers:
            self.consumers.remove(consumer)
            consumer.taker.cancel_consumer(consumer)
        return count
