"""What is to happen to a message whose handler failed, and by way of which queues.

Nothing here waits or talks to a broker; :mod:`leveret.retrier` does what is decided here.

A message waits on a *rung*: a queue without consumers, one for each delay, whose messages expire after that delay and
are dead-lettered through the default exchange to the queue that they came from, and to no other.

What this rests on was observed on RabbitMQ 3.10.8, 4.0.5 and 4.3.6:

* Headers that a publisher sends. All of ``x-death``, ``x-delivery-count``, ``x-acquired-count``, ``x-first-death-*``
  reach the consumer as sent. When a message is dead-lettered, 4.0 and 4.3 forget a publisher's ``x-death`` and write
  their own; 3.10 *believes* it: with an entry that names the queue that the rung leads to, it sees a cycle, and the
  message stays on the rung; a malformed one crashes the process that dead-letters again and again, until no queue of
  the node does. So no ``x-death`` is ever sent to a rung.
* ``x-delivery-count`` of a quorum queue. 4.0 and 4.3 write it once it is over 0, in place of what a publisher sent,
  whatever type that had, and remove duplicates. 3.10 replaces the first of several entries of that name only, so that
  a publisher can hide the broker's count for ever. So it is relied on from 4.0 on. What counts: in 3.10 and 4.0 every
  return, by nack and reject alike; in 4.3 reject, not nack (that is in ``x-acquired-count``).
* A quorum queue of 4.0 and later drops (or dead-letters) a message that was returned more than 20 times, or
  ``x-delivery-limit``; 3.10 has no such limit unless it is given.
* ``x-delayed-retry-type`` (``all``, ``failed``, ``returned``, ``disabled``), ``-min`` and ``-max`` (milliseconds) of
  a quorum queue delay what is returned by min × count, at most max, in 4.3; ``all`` and ``failed`` do for reject.
  3.10 and 4.0 take the arguments, and do nothing.
* CC and BCC work on the default exchange too; a publish with the ``user_id`` of somebody else closes the channel (406);
  ``expiration`` is removed when a message is dead-lettered, and if it is shorter than the rung's delay it ends the
  wait.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import enum
import hashlib
import re
from collections.abc import Mapping
from typing import TypeAlias

from leveret.message import IncomingMessage, Message
from leveret.types import DeliveryMode, FieldValue, HeadersType

MAX_NAME = 255
"""Bytes that AMQP's short strings hold."""
DEFAULT_LIMIT = 20
"""``x-delivery-limit`` of quorum queues that have none, from RabbitMQ 4.0 on."""
_IDLE_MS = 3_600_000
"""How long the rung of an auto-delete queue is kept beyond its delay, when it is not declared again."""
_MAX_ERROR_TEXT = 1000
_MAX_RAW_HEADERS = 16_384

COUNT = "x-retry-count"
"""The header that counts failures: of a message on its way through the ladder."""
QUEUE, EXCHANGE, ROUTING_KEY = "x-retry-queue", "x-retry-exchange", "x-retry-routing-key"
EXPIRATION, USER_ID = "x-retry-expiration", "x-retry-user-id"
ATTEMPTS, REASON = "x-retry-attempts", "x-retry-reason"
ERROR_TYPE, ERROR, ERROR_TIME = "x-retry-error-type", "x-retry-error", "x-retry-error-time"
RAW_HEADERS = "x-retry-raw-headers"

_FAN_OUT = ("CC", "BCC")
_BROKERS_OWN = re.compile(r"x-death|x-(first|last)-death-\w+|x-delivery-count|x-acquired-count")


# --------------------------------------------------------------------------------------------------- topology


class Backend(enum.Enum):
    """Who counts, and who makes a message wait."""

    LADDER = "ladder"
    """A header counts, rungs delay."""
    REQUEUE = "requeue"
    """The quorum queue counts; nothing delays."""
    DELAYED_RETRY = "delayed retry"
    """The quorum queue counts and delays."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QueueFacts:
    """What is known of the queue that is consumed.

    Attributes:
        known: it was declared through this handle; else there is its name only.
    """

    name: str
    known: bool
    durable: bool = False
    exclusive: bool = False
    auto_delete: bool = False
    arguments: Mapping[str, FieldValue] = dataclasses.field(default_factory=dict[str, FieldValue])

    @property
    def type(self) -> FieldValue:
        """``x-queue-type``, as far as it is known."""
        return self.arguments.get("x-queue-type")

    @property
    def delivery_limit(self) -> int | None:
        """How often a quorum queue takes a message back; None for ever."""
        limit = self.arguments.get("x-delivery-limit")
        if not isinstance(limit, int):
            return DEFAULT_LIMIT
        return limit if limit >= 0 else None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QueueToDeclare:
    """A queue to declare.

    Attributes:
        any_arguments: one that exists with other arguments will do.
    """

    name: str
    durable: bool = True
    exclusive: bool = False
    arguments: Mapping[str, FieldValue]
    any_arguments: bool = False

    @property
    def is_temporary(self) -> bool:
        """Whether it goes unless it is declared again and again."""
        return "x-expires" in self.arguments


def derived_name(queue: str, suffix: str) -> str:
    """The name of a queue that belongs to *queue*: the same in every process, and within what AMQP can carry.

    A name that would be too long is cut, and told from others by a digest. ``amq.`` is the broker's, so a name does not
    begin with it.
    """
    name = ("leveret." if queue.startswith("amq.") else "") + queue
    encoded, tail = name.encode("utf-8", "surrogateescape"), suffix.encode()
    if len(encoded) + len(tail) <= MAX_NAME:
        return name + suffix
    tail = b"~" + hashlib.sha256(encoded).hexdigest()[:16].encode() + tail
    return encoded[: MAX_NAME - len(tail)].decode("utf-8", "ignore") + tail.decode()


def rung(queue: QueueFacts, delay_ms: int) -> QueueToDeclare:
    """The queue where messages of *queue* wait for *delay_ms*.

    It lasts as long as *queue*: an exclusive one goes with the connection, the others are durable if *queue* is.
    Durable rungs are quorum queues, whatever the type of *queue*: these alone keep a message until its own queue has
    confirmed it. And as nothing but the name of a queue may be known here, and more there, it must not depend on the
    type: two processes would declare the same rung with different arguments.
    """
    arguments: dict[str, FieldValue] = {
        "x-message-ttl": delay_ms,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": queue.name,
    }
    durable = queue.durable or not queue.known
    if durable:
        arguments |= {
            "x-queue-type": "quorum",
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",  # at-least-once demands it
        }
    else:
        arguments["x-queue-type"] = "classic"
    if queue.auto_delete and not queue.exclusive:
        # Nothing would ever delete it else. A queue expires with all that is in it, so it is declared anew in time.
        arguments["x-expires"] = delay_ms + _IDLE_MS
    name = derived_name(queue.name, f".retry.{delay_ms}")
    return QueueToDeclare(name=name, durable=durable, exclusive=queue.exclusive, arguments=arguments)


def parking(name: str) -> QueueToDeclare:
    """The queue where messages stay that are not tried again; any that has the name will do."""
    return QueueToDeclare(name=name, arguments={"x-queue-type": "quorum"}, any_arguments=True)


def version_of(server_properties: Mapping[str, FieldValue]) -> tuple[int, ...]:
    """Major and minor version of the broker; (0, 0) if it does not tell."""
    numbers = re.match(r"(\d+)\.(\d+)", str(server_properties.get("version", "")))
    return tuple(map(int, numbers.groups())) if numbers else (0, 0)


def choose_backend(queue: QueueFacts, attempts: int, delays_ms: tuple[int, ...], version: tuple[int, ...]) -> Backend:
    """The queue's own means where they do what is asked for, else the ladder."""
    limit = queue.delivery_limit
    if queue.type != "quorum" or version < (4, 0) or (limit is not None and attempts > limit):
        return Backend.LADDER
    if version >= (4, 3) and queue.arguments.get("x-delayed-retry-type") in ("all", "failed"):
        return Backend.DELAYED_RETRY
    return Backend.LADDER if any(delays_ms) else Backend.REQUEUE


# --------------------------------------------------------------------------------------------------- decisions


@dataclasses.dataclass(frozen=True, slots=True)
class GiveBack:
    """Give it back to its queue, which counts it as failed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Wait:
    """Put it on the rung of *delay_ms*; 0 is the end of its own queue."""

    delay_ms: int


@dataclasses.dataclass(frozen=True, slots=True)
class Park:
    """Put it aside, because of *reason*."""

    reason: str


Decision: TypeAlias = GiveBack | Wait | Park


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How failed messages of one queue are dealt with.

    Attributes:
        attempts: how often a message is handled in all.
        delays_ms: how long it waits after the first failure, the second, and so on; the last counts for all later ones.
        park_in: the queue for what is not tried again; None where an exchange takes it.
    """

    queue: QueueFacts
    attempts: int
    delays_ms: tuple[int, ...]
    backend: Backend
    park_in: str | None

    @property
    def queues(self) -> tuple[QueueToDeclare, ...]:
        """What is to be declared: rungs, parking queue."""
        specs: list[QueueToDeclare] = []
        if self.backend is Backend.LADDER:
            delays = self.delays_ms[: self.attempts - 1]
            specs += [rung(self.queue, delay) for delay in dict.fromkeys(delays) if delay]
        if self.park_in is not None:
            specs.append(parking(self.park_in))
        return tuple(specs)

    def key_of(self, delay_ms: int) -> str:
        """The queue where a message waits for that long."""
        return rung(self.queue, delay_ms).name if delay_ms else self.queue.name

    def failures(self, headers: Mapping[str, FieldValue]) -> int:
        """How often the message with these headers has failed before: fewer times than ``attempts``.

        A publisher can send a count as well. That makes its message be tried less often, never more often: each trip
        over a rung writes a count that is larger by one, and the count of a quorum queue replaces what was sent.
        """
        count = _count(headers.get(COUNT))
        if self.backend is not Backend.LADDER:
            # Not on the ladder: RabbitMQ 4.0 counts there what a worker gave back because it was stopped.
            count += _count(headers.get("x-delivery-count"))
        return min(count, self.attempts - 1)

    def decide(self, failures: int, *, retryable: bool, readable: bool) -> Decision:
        """What to do with a message that has just failed.

        Args:
            failures: how often, this time included.
            retryable: whether another attempt may help.
            readable: whether its headers could be read; what cannot be counted is not tried again.
        """
        if not readable:
            return Park("malformed headers")
        if not retryable:
            return Park("not retried")
        if failures >= self.attempts:
            return Park("attempts used up")
        if self.backend is not Backend.LADDER:
            return GiveBack()
        return Wait(self.delays_ms[min(failures, len(self.delays_ms)) - 1])

    def may_requeue(self, headers: Mapping[str, FieldValue], *, readable: bool) -> bool:
        """Whether a message whose copy cannot be published may go back to its queue, which will not drop it."""
        limit = self.queue.delivery_limit
        if self.queue.type == "classic" or limit is None:
            return True
        return readable and _count(headers.get("x-delivery-count")) < limit // 2


def _count(value: FieldValue) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


# ----------------------------------------------------------------------------------------------------- copies


def origin(message: IncomingMessage, queue: str) -> tuple[str, str]:
    """The exchange and the routing key that it was first published with.

    On its way back from a rung the message does not know any more; its headers do.
    """
    headers = message.headers
    came_back = message.exchange == "" and message.routing_key == queue and _count(headers.get(COUNT))
    if came_back and EXCHANGE in headers and ROUTING_KEY in headers:
        return _name(headers[EXCHANGE]), _name(headers[ROUTING_KEY])
    return message.exchange, message.routing_key


def _name(value: FieldValue) -> str:
    """A name from a header, which may hold anything: what is none becomes ""."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    return value if isinstance(value, str) and len(value.encode("utf-8", "surrogateescape")) <= MAX_NAME else ""


def _header(name: str) -> FieldValue:
    """A name for a header: as bytes if it came from the wire as bad UTF-8."""
    raw = name.encode("utf-8", "surrogateescape")
    return name if raw == name.encode("utf-8", "ignore") else raw


def copy_to_retry(message: IncomingMessage, queue: str, failures: int) -> Message:
    """What goes on a rung: body, properties and headers as they were, but for what would not survive, or do harm."""
    headers = {name: value for name, value in message.headers.items() if not _BROKERS_OWN.fullmatch(name)}
    return _copy(message, headers | {COUNT: failures}, queue)


def copy_to_park(
    message: IncomingMessage, queue: str, attempts: int, reason: str, error: BaseException, *, bare: bool = False
) -> Message:
    """What is put aside, with headers that say why.

    Args:
        message: what failed.
        queue: where it came from.
        attempts: how often it failed.
        reason: why it is not tried again.
        error: how it failed last.
        bare: leave out its own headers and properties, with which it cannot be published.
    """
    exchange, routing_key = origin(message, queue)
    facts: HeadersType = {
        ATTEMPTS: attempts,
        REASON: reason,
        ERROR_TYPE: f"{type(error).__module__}.{type(error).__qualname__}"[:_MAX_ERROR_TEXT],
        ERROR: error_text(error),
        ERROR_TIME: datetime.datetime.now(datetime.UTC),
        QUEUE: _header(queue),
        EXCHANGE: _header(exchange),
        ROUTING_KEY: _header(routing_key),
    }
    raw = message.headers_raw
    if raw is not None and len(raw) <= _MAX_RAW_HEADERS:
        facts[RAW_HEADERS] = raw
    if bare:
        return Message(message.body, headers=facts, delivery_mode=DeliveryMode.PERSISTENT)
    headers = {name: value for name, value in message.headers.items() if name != COUNT}
    return _copy(message, headers | facts, queue)


def _copy(message: IncomingMessage, headers: HeadersType, queue: str) -> Message:
    twin = copy.copy(message)
    for name in _FAN_OUT:
        headers.pop(name, None)
    exchange, routing_key = origin(message, queue)
    headers |= {EXCHANGE: _header(exchange), ROUTING_KEY: _header(routing_key)}
    if isinstance(message.expiration, str | int | float):  # seconds; text where it was no number
        headers[EXPIRATION] = message.expiration
    if message.user_id is not None:
        headers[USER_ID] = message.user_id
    twin.headers, twin.expiration, twin.user_id = headers, None, None
    return twin


def error_text(error: BaseException) -> str:
    """The text of *error*, whatever it is, cut to what is sensible in a header."""
    try:
        text = str(error)
    except Exception as exc:  # the exception is the user's, and so is its __str__
        text = f"(its text cannot be had: {type(exc).__name__})"
    return text[:_MAX_ERROR_TEXT].encode("utf-8", "backslashreplace").decode()
