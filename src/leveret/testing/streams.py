"""A stream: a log that consumers read from where they like, and that reading leaves as it is. Pure."""

from __future__ import annotations

import datetime
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from leveret.testing.arguments import is_age, parse_age
from leveret.testing.messages import HAS_DELIVERY_MODE, Entry, Stored
from leveret.testing.queues import Keeper, Queue

if TYPE_CHECKING:
    from leveret.testing.consumers import Consumer
    from leveret.types import FieldValue


def is_offset(spec: object) -> bool:
    """Whether *spec* says where to begin."""
    if isinstance(spec, str):
        return spec in {"first", "last", "next"} or is_age(spec)
    return isinstance(spec, int | datetime.datetime) and not isinstance(spec, bool)


class _Record(NamedTuple):
    message: Stored
    time: float


class Stream(Queue):
    """A queue of type ``stream``.

    Messages leave it only by ``x-max-length-bytes`` and ``x-max-age``, the oldest first. RabbitMQ drops whole segments
    (500 MB by default), this broker single messages.
    """

    type = "stream"
    is_stream = True

    def __init__(self, name: str, keeper: Keeper, **options: Any) -> None:
        super().__init__(name, keeper, **options)
        self._log: deque[_Record] = deque()
        self._first = 0
        """The offset of what stands first in the log."""
        self._size = 0
        age = self.arguments.get("x-max-age")
        self._max_age = parse_age(age) if isinstance(age, str) else None

    @property
    def ready(self) -> int:
        """How many messages the log has."""
        return len(self._log)

    def waiting(self) -> Iterable[Stored]:
        """The log."""
        return (record.message for record in self._log)

    def publish(self, message: Stored) -> bool:
        """Append *message*."""
        self._log.append(_Record(self._converted(message), self._clock.wall()))
        self._size += len(message.body)
        self._cut()
        self.dispatch()
        return True

    def _converted(self, message: Stored) -> Stored:
        """*message* without the headers that RabbitMQ loses when it makes an AMQP 1.0 message of it."""
        headers = message.headers
        kept = {
            name: value
            for name, value in headers.items()
            if not isinstance(value, list | dict)
            or (self._keeper.dialect.streams_keep_annotations and (name == "CC" or name.startswith("x-")))
        }
        return message if len(kept) == len(headers) else message.changed(headers=kept)

    def _cut(self) -> None:
        oldest = None if self._max_age is None else self._clock.wall() - self._max_age
        while len(self._log) > 1 and (
            (self._max_bytes is not None and self._size > self._max_bytes)
            or (oldest is not None and self._log[0].time < oldest)
        ):
            self._size -= len(self._log.popleft().message.body)
            self._first += 1

    def dispatch(self) -> None:
        """Send every consumer what it has not read and has room for."""
        for consumer in self.consumers:
            if self.consumers.active not in (None, consumer):
                continue
            consumer.offset = max(consumer.offset, self._first)
            while consumer.offset - self._first < len(self._log) and consumer.taker.can_take(consumer):
                offset = consumer.offset
                consumer.offset += 1
                entry = Entry(self._log[offset - self._first].message, offset, 0, None)
                self._hand_out(consumer, entry)

    def properties_of(self, entry: Entry, *, by_get: bool = False) -> bytes:
        """With the offset as a header; a log of AMQP 1.0 messages knows whether each of them is durable."""
        message = entry.message
        if self._keeper.dialect.streams_tell_durability and not message.flags & HAS_DELIVERY_MODE:
            message = message.changed(delivery_mode=1)
        return message.with_headers({"x-stream-offset": entry.position})

    def add_consumer(self, consumer: Consumer) -> None:
        """Begin at ``x-stream-offset``."""
        consumer.offset = self._begin(consumer.arguments.get("x-stream-offset", "next"))
        super().add_consumer(consumer)

    def _begin(self, spec: FieldValue) -> int:
        end = self._first + len(self._log)
        if isinstance(spec, int):
            return spec
        if isinstance(spec, datetime.datetime):
            return self._at(spec.timestamp())
        if spec == "first":
            return self._first
        if spec == "last":  # RabbitMQ begins with the last chunk; here a chunk is one message
            return max(self._first, end - 1)
        if spec == "next":
            return end
        assert isinstance(spec, str), spec
        return self._at(self._clock.wall() - parse_age(spec))

    def _at(self, moment: float) -> int:
        for index, record in enumerate(self._log):
            if int(record.time) >= int(moment):
                return self._first + index
        return self._first + len(self._log)

    def reject(self, entry: Entry, *, failed: bool = True) -> None:
        """As settled: nothing leaves a stream that way."""
        self.settled(entry)

    def requeue(
        self, entries: Iterable[Entry], *, failed: bool = False, ended: bool = False, consumer: Consumer | None = None
    ) -> None:
        """As settled: it is still there."""
        for entry in entries:
            self.settled(entry)
        self.dispatch()

    def forget_transient(self) -> None:
        """All of a stream is on disk; its readers are gone."""
        self.unacked = 0
        for consumer in self.consumers:
            self.consumers.remove(consumer)

    def delete(self) -> int:
        """End the stream."""
        super().delete()
        return 0
