"""Facts about the broker that can be replayed: what was declared, bound, consumed.

A *record* is frozen. It knows its identity (``key``), what it needs to be there first (``needs``), and the AMQP method
that makes it true (``method()``), which is also how the handles make it true in the first place.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias, cast

from pamqp.base import Frame
from pamqp.commands import Basic
from pamqp.commands import Exchange as ExchangeMethods
from pamqp.commands import Queue as QueueMethods

from leveret.types import Arguments
from leveret.wire.methods import make
from leveret.wire.tables import encode_table

Key: TypeAlias = tuple[str | int | bytes, ...]
"""Identity of a record, its kind first."""


def exchange_key(name: str) -> Key:
    """The identity of an exchange."""
    return "exchange", name


def queue_key(name: str) -> Key:
    """The identity of a queue."""
    return "queue", name


def consumer_key(channel: int, consumer_tag: str) -> Key:
    """The identity of a consumer."""
    return "consumer", channel, consumer_tag


class ExchangeRecord(NamedTuple):
    """``exchange.declare``"""

    name: str
    type: str
    durable: bool = False
    auto_delete: bool = False
    internal: bool = False
    arguments: Arguments = None

    def __str__(self) -> str:
        return f"exchange {self.name!r}"

    @property
    def key(self) -> Key:
        return exchange_key(self.name)

    @property
    def needs(self) -> tuple[Key, ...]:
        return ()

    def method(self, *, passive: bool = False) -> Frame:
        return make(
            ExchangeMethods.Declare,
            exchange=self.name,
            exchange_type=self.type,
            passive=passive,
            durable=self.durable,
            auto_delete=self.auto_delete,
            internal=self.internal,
            arguments=self.arguments or {},
        )


class QueueRecord(NamedTuple):
    """``queue.declare``; *server_named*: the broker chose the name, and chooses another one when it is replayed."""

    name: str
    durable: bool = False
    exclusive: bool = False
    auto_delete: bool = False
    arguments: Arguments = None
    server_named: bool = False

    def __str__(self) -> str:
        return f"queue {self.name!r}"

    @property
    def key(self) -> Key:
        return queue_key(self.name)

    @property
    def needs(self) -> tuple[Key, ...]:
        return ()

    def method(self, *, passive: bool = False) -> Frame:
        return make(
            QueueMethods.Declare,
            queue="" if self.server_named and not passive else self.name,
            passive=passive,
            durable=self.durable,
            exclusive=self.exclusive,
            auto_delete=self.auto_delete,
            arguments=self.arguments or {},
        )


class QueueBinding(NamedTuple):
    """``queue.bind``"""

    queue: str
    exchange: str
    routing_key: str
    arguments: Arguments = None

    def __str__(self) -> str:
        return f"binding of queue {self.queue!r} to exchange {self.exchange!r} with {self.routing_key!r}"

    @property
    def key(self) -> Key:
        return "queue binding", self.queue, self.exchange, self.routing_key, canonical(self.arguments)

    @property
    def needs(self) -> tuple[Key, ...]:
        return queue_key(self.queue), exchange_key(self.exchange)

    @property
    def source(self) -> str:
        return self.exchange

    def method(self) -> Frame:
        return make(QueueMethods.Bind, **self._arguments())

    def undo(self) -> Frame:
        return make(QueueMethods.Unbind, **self._arguments())

    def _arguments(self) -> dict[str, Any]:
        return {
            "queue": self.queue,
            "exchange": self.exchange,
            "routing_key": self.routing_key,
            "arguments": self.arguments or {},
        }


class ExchangeBinding(NamedTuple):
    """``exchange.bind``"""

    destination: str
    source: str
    routing_key: str
    arguments: Arguments = None

    def __str__(self) -> str:
        return f"binding of exchange {self.destination!r} to exchange {self.source!r} with {self.routing_key!r}"

    @property
    def key(self) -> Key:
        return "exchange binding", self.destination, self.source, self.routing_key, canonical(self.arguments)

    @property
    def needs(self) -> tuple[Key, ...]:
        return exchange_key(self.destination), exchange_key(self.source)

    def method(self) -> Frame:
        return make(ExchangeMethods.Bind, **self._arguments())

    def undo(self) -> Frame:
        return make(ExchangeMethods.Unbind, **self._arguments())

    def _arguments(self) -> dict[str, Any]:
        return {
            "destination": self.destination,
            "source": self.source,
            "routing_key": self.routing_key,
            "arguments": self.arguments or {},
        }


class QosRecord(NamedTuple):
    """``basic.qos`` of one channel."""

    channel: int
    prefetch_count: int
    global_: bool

    def __str__(self) -> str:
        return f"prefetch {self.prefetch_count}"

    @property
    def key(self) -> Key:
        return "qos", self.channel, self.global_

    @property
    def needs(self) -> tuple[Key, ...]:
        return ()

    def method(self) -> Frame:
        return make(Basic.Qos, prefetch_count=self.prefetch_count, global_=self.global_)


class ConsumerRecord(NamedTuple):
    """``basic.consume`` on one channel; *consumer_tag* is the one that the user knows.

    *prefetch* is the one it began with, which the channel's may differ from by now; None before it began, for the
    channel's.
    """

    channel: int
    consumer_tag: str
    queue: str
    no_ack: bool = False
    exclusive: bool = False
    arguments: Arguments = None
    prefetch: int | None = None

    def __str__(self) -> str:
        return f"consumer {self.consumer_tag!r} of queue {self.queue!r}"

    @property
    def key(self) -> Key:
        return consumer_key(self.channel, self.consumer_tag)

    @property
    def needs(self) -> tuple[Key, ...]:
        return (queue_key(self.queue),)


Binding: TypeAlias = QueueBinding | ExchangeBinding
Entity: TypeAlias = ExchangeRecord | QueueRecord | QueueBinding | ExchangeBinding
"""What belongs to the broker, not to one channel."""
Record: TypeAlias = Entity | QosRecord | ConsumerRecord


def canonical(arguments: Arguments) -> bytes:
    """*arguments* as bytes, the same for tables that a broker takes for the same."""
    return encode_table(_sorted(arguments or {}))


def _sorted(value: Any) -> Any:
    if isinstance(value, Mapping):
        table = cast("Mapping[str, Any]", value)
        return {key: _sorted(table[key]) for key in sorted(table)}
    if isinstance(value, list | tuple) and not isinstance(value, time.struct_time):  # that one is a timestamp
        return [_sorted(item) for item in cast("Iterable[Any]", value)]
    return value


def with_own_arguments(record: Record) -> Record:
    """*record* with arguments that its maker cannot change any more."""
    if isinstance(record, QosRecord) or record.arguments is None:
        return record
    return record._replace(arguments=_copied(record.arguments))


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, list | tuple) and not isinstance(value, time.struct_time):
        return [_copied(item) for item in cast("Iterable[Any]", value)]
    return copy.copy(value)


def renamed(record: Record, old: str, new: str) -> Record:
    """*record* after the queue *old* has become *new*."""
    if isinstance(record, QueueRecord) and record.name == old:
        return record._replace(name=new)
    if isinstance(record, ConsumerRecord) and record.queue == old:
        return record._replace(queue=new)
    if isinstance(record, QueueBinding) and record.queue == old:
        routing_key = new if record.routing_key == old else record.routing_key
        return record._replace(queue=new, routing_key=routing_key)
    return record
