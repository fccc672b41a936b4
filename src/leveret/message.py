"""Messages: what is published, what comes in, what comes back.

A message is a body and its properties. The properties of an incoming message are decoded when first looked at,
so a consumer that reads the body only pays for nothing else, and one that cannot be decoded harms nobody but
its reader.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Container, Coroutine, Iterator, Mapping, Sequence
from operator import attrgetter
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar, overload

from pamqp.commands import Basic
from pamqp.header import ContentHeader

from leveret.exceptions import (
    ChannelInvalidStateError,
    DeliveryLost,
    MessageDecodeError,
    MessageProcessError,
    MethodNotImplemented,
)
from leveret.lazy import pass_on
from leveret.log import get_logger
from leveret.older import warn_of
from leveret.outcome import DONE, in_turn, returns_awaitable
from leveret.times import decode_expiration as decode_expiration
from leveret.times import decode_timestamp as decode_timestamp
from leveret.times import encode_expiration as encode_expiration
from leveret.times import encode_timestamp as encode_timestamp
from leveret.times import quick_expiration
from leveret.times import to_milliseconds as to_milliseconds
from leveret.types import DateType, DeliveryMode, FieldValue, HeadersType, MessageInfo
from leveret.wire.codec import Properties, decode_properties, decode_route, encode_shortstr, encode_tag, make_properties

if TYPE_CHECKING:
    from leveret.delivered import DeliveredMessage

pass_on(__name__)
_log = get_logger(__name__)

T = TypeVar("T")
_new: Callable[[type[IncomingMessage]], IncomingMessage] = object.__new__


# ------------------------------------------------------------------------------------------------- published


def _text(value: Any) -> str | None:
    # An empty text is not sent, as in aio-pika: an empty user_id, say, would cost the channel.
    return (value if isinstance(value, str) else str(value)) or None if value is not None else None


def _priority(value: Any) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255):
        return value
    raise ValueError(f"priority must be a whole number from 0 to 255, not {value!r}")


def _delivery_mode(value: DeliveryMode | int | None) -> int:
    return 1 if value is None else int(value if value.__class__ is DeliveryMode else DeliveryMode(value))


def _expiration(value: DateType) -> DateType:
    quick_expiration(value)
    return value


def _with_times(properties: Properties, expiration: Any, timestamp: Any) -> Properties:
    return make_properties((*properties[:7], expiration, properties[8], timestamp, *properties[10:]))


if TYPE_CHECKING:

    class _Field(Generic[T]):
        """A property of the message, for type checkers; at run time a plain ``property``."""

        @overload
        def __get__(self, message: None, owner: type, /) -> _Field[T]: ...
        @overload
        def __get__(self, message: Message, owner: type, /) -> T: ...
        def __get__(self, message: Message | None, owner: type, /) -> Any: ...
        def __set__(self, message: Message, value: Any, /) -> None: ...


def _field(name: str, convert: Any, doc: str) -> Any:
    def assign(message: Message, value: Any) -> None:
        message._assign(name, convert(value))  # pyright: ignore[reportPrivateUsage]

    return property(attrgetter(f"_properties.{name}"), assign, doc=doc)


_DELIVERY_MODES: dict[int, DeliveryMode] = {mode.value: mode for mode in DeliveryMode}


class Message:
    """A message to publish.

    It may be published any number of times, concurrently too; publishing changes nothing in it.

    Args:
        body: the payload; encode text yourself (``text.encode()``).
        headers: any nesting of str, int, float, bool, None, bytes, Decimal, datetime, list and dict. Copied.
        content_type: MIME type of the body, for the consumers to know.
        content_encoding: such as ``gzip``.
        delivery_mode: PERSISTENT to survive a restart of the broker in a durable queue.
        priority: 0 to 255; counts in queues with ``x-max-priority``.
        correlation_id: whatever the reply shall carry back.
        reply_to: name of the queue for the reply.
        expiration: time to live: seconds, timedelta, or the datetime of expiry.
        message_id: your own; leveret never sets one.
        timestamp: seconds since 1970, datetime (naive means UTC), or timedelta from now; whole seconds are sent.
        type: your name for the kind of message.
        user_id: must be the name that the connection logged in with, or the broker closes the channel (406).
        app_id: your application.

    Raises:
        TypeError: the body is a str, an int or None, or a value is of a type that makes no sense.
        ValueError: a value out of range.

    https://www.rabbitmq.com/docs/publishers#message-properties
    """

    __slots__ = ("_body", "_locked", "_properties")

    _body: bytes
    _properties: Properties
    _locked: bool

    def __init__(
        self,
        body: bytes,
        *,
        headers: Mapping[str, FieldValue] | None = None,
        content_type: str | None = None,
        content_encoding: str | None = None,
        delivery_mode: DeliveryMode | int | None = None,
        priority: int | None = None,
        correlation_id: str | None = None,
        reply_to: str | None = None,
        expiration: DateType = None,
        message_id: str | None = None,
        timestamp: DateType = None,
        type: str | None = None,
        user_id: str | None = None,
        app_id: str | None = None,
    ) -> None:
        self._locked = False
        self._body = body if body.__class__ is bytes else _to_bytes(body)
        self._properties = make_properties(
            (
                content_type or None,
                content_encoding or None,
                None if headers is None else dict(headers),
                1 if delivery_mode is None else _delivery_mode(delivery_mode),
                0 if priority is None else _priority(priority),
                None if correlation_id is None else _text(correlation_id),
                None if reply_to is None else _text(reply_to),
                None if expiration is None else _expiration(expiration),
                None if message_id is None else _text(message_id),
                None if timestamp is None else decode_timestamp(timestamp),
                None if type is None else _text(type),
                None if user_id is None else _text(user_id),
                None if app_id is None else _text(app_id),
                None,
            ),
        )

    def _assign_body(self, value: bytes) -> None:
        self._check_unlocked()
        self._body = _to_bytes(value)

    body: _Field[bytes] = property(attrgetter("_body"), _assign_body, doc="The payload.")  # type: ignore[assignment]
    content_type: _Field[str | None] = _field("content_type", _text, "MIME type of the body.")
    content_encoding: _Field[str | None] = _field("content_encoding", _text, "Such as ``gzip``.")
    priority: _Field[int | None] = _field("priority", _priority, "0 to 255.")
    correlation_id: _Field[str | None] = _field("correlation_id", _text, "What the reply carries back.")
    reply_to: _Field[str | None] = _field("reply_to", _text, "Name of the queue for the reply.")
    expiration: _Field[DateType] = _field("expiration", _expiration, "Time to live; seconds when incoming.")
    message_id: _Field[str | None] = _field("message_id", _text, "The publisher's own.")
    timestamp: _Field[datetime.datetime | int | None] = _field(
        "timestamp", decode_timestamp, "Aware datetime; an int where datetime cannot hold it."
    )
    type: _Field[str | None] = _field("type", _text, "The publisher's name for the kind of message.")
    user_id: _Field[str | None] = _field("user_id", _text, "Login of the publisher; the broker checks it.")
    app_id: _Field[str | None] = _field("app_id", _text, "The publishing application.")
    cluster_id: _Field[str | None] = _field("cluster_id", _text, "Deprecated by AMQP; read if it came.")

    @property
    def delivery_mode(self) -> DeliveryMode | int:
        """Persistent or not; an int where the publisher sent one that AMQP does not have."""
        mode = self._properties.delivery_mode
        if mode is None:
            return DeliveryMode.NOT_PERSISTENT
        return _DELIVERY_MODES.get(mode, mode)

    @delivery_mode.setter
    def delivery_mode(self, value: DeliveryMode | int | None) -> None:
        self._assign("delivery_mode", _delivery_mode(value))

    @property
    def headers(self) -> HeadersType:
        """The headers; change them in place or set new ones."""
        headers = self._properties.headers
        if headers is None:
            headers = {}
            self._properties = self._properties._replace(headers=headers)
        return headers  # type: ignore[return-value]

    @headers.setter
    def headers(self, value: Mapping[str, FieldValue] | None) -> None:
        self._assign("headers", None if value is None else dict(value))

    @property
    def body_size(self) -> int:
        """Bytes of the body."""
        return len(self.body)

    @property
    def properties(self) -> Basic.Properties:
        """The properties as pamqp's object, built anew each time; its headers are those of the message."""
        headers, wire = self.headers, self.wire_properties()
        properties = Basic.Properties.__new__(Basic.Properties)
        for name, value in zip(Basic.Properties.__slots__, wire, strict=True):
            setattr(properties, name, value)
        properties.timestamp = self.timestamp  # type: ignore[assignment]
        properties.headers = headers  # type: ignore[assignment]
        return properties

    def wire_properties(self) -> Properties:
        """The properties with the values that go on the wire now; ``expiration`` may be relative to it."""
        properties = self._properties
        if properties.expiration is None and properties.timestamp is None:
            return properties
        expiration = properties.expiration
        if not isinstance(expiration, str):  # text came from the wire, as no number
            expiration = quick_expiration(expiration)
        timestamp = None if properties.timestamp is None else encode_timestamp(properties.timestamp)
        return _with_times(properties, expiration, timestamp)

    def lock(self) -> None:
        """Make every later assignment to the body or a property a ValueError."""
        self._locked = True

    @property
    def locked(self) -> bool:
        """Whether properties can no longer be assigned."""
        return self._locked

    def _assign(self, name: str, value: Any) -> None:
        self._check_unlocked()
        self._properties = self._properties._replace(**{name: value})

    def _check_unlocked(self) -> None:
        if self.locked:
            raise ValueError("Message is locked")

    def info(self) -> MessageInfo:
        """Everything about the message but its body."""
        return MessageInfo(
            app_id=self.app_id,
            body_size=self.body_size,
            cluster_id=self.cluster_id,
            consumer_tag=None,
            content_encoding=self.content_encoding,
            content_type=self.content_type,
            correlation_id=self.correlation_id,
            delivery_mode=self.delivery_mode,
            delivery_tag=None,
            exchange=None,
            expiration=self.expiration,
            headers=self._properties.headers or {},  # type: ignore[typeddict-item]
            message_id=self.message_id,
            priority=self.priority,
            redelivered=None,
            reply_to=self.reply_to,
            routing_key=None,
            timestamp=self.timestamp,
            type=self.type,
            user_id=self.user_id,
        )

    def __repr__(self) -> str:
        from pprint import pformat  # most users never need it

        return f"{type(self).__name__}:{pformat(self.info())}"

    def __iter__(self) -> Iterator[int]:
        return iter(self.body)

    def __copy__(self) -> Message:
        twin = Message.__new__(Message)
        twin._body, twin._properties, twin._locked = self._body, self._properties, False
        return twin


def _to_bytes(body: Any) -> bytes:
    if isinstance(body, str):
        raise TypeError("the body must be bytes: use text.encode()")
    try:
        return bytes(memoryview(body))
    except TypeError:
        text = f"the body must be bytes, not {type(body).__name__}: encode it, say by json.dumps(data).encode()"
        raise TypeError(text) from None


# -------------------------------------------------------------------------------------------------- incoming


class Wire(Protocol):
    """What a message asks of the channel that brought it."""

    @property
    def channel(self) -> Any:
        """The channel itself."""
        ...

    @property
    def cancelled(self) -> Container[bytes | None]:
        """Tags of consumers that the broker cancelled: it has taken back what they held."""
        ...

    @property
    def is_open(self) -> bool:
        """Whether acks still reach the broker."""
        ...

    def ack(self, delivery_tag: int, multiple: bool = False) -> Coroutine[Any, Any, None]:
        """``basic.ack``"""
        ...

    def nack(self, delivery_tag: int, multiple: bool = False, requeue: bool = True) -> Coroutine[Any, Any, None]:
        """``basic.nack``"""
        ...

    def reject(self, delivery_tag: int, requeue: bool = False) -> Coroutine[Any, Any, None]:
        """``basic.reject``"""
        ...

    def settle_all(self, delivery_tags: Sequence[int], *, requeue: bool | None) -> Coroutine[Any, Any, None]:
        """The first or, with *requeue*, the second of them for all *delivery_tags*, which ascend."""
        ...

    def server_supports(self, capability: str) -> bool:
        """Whether the broker announced *capability*."""
        ...


class IncomingMessage(Message):
    """A message that the broker delivered; settle it with :meth:`ack`, :meth:`reject`, :meth:`nack` or :meth:`process`.

    It belongs to the channel that brought it: when that is gone the broker redelivers the message, and settling
    this copy raises DeliveryLost without sending anything. When the broker cancelled the consumer that got it, the
    broker has taken the message back (or its queue is gone), and settling it does nothing.

    Attributes:
        body: the payload.
        delivery_tag: the broker's number for this delivery on its channel.
        redelivered: whether it was delivered before, to whomever; a hint only.
        message_count: messages left in the queue, if it was fetched with ``queue.get()``; else None.
    """

    __slots__ = (
        "_consumer_tag",
        "_raw_properties",
        "_route",
        "_settled",
        "_wire",
        "delivery_tag",
        "message_count",
        "redelivered",
    )

    delivery_tag: int
    redelivered: bool
    message_count: int | None

    def __init__(self, message: DeliveredMessage, no_ack: bool = False) -> None:
        """Made by hand, as tests do; what comes from the broker is made by :meth:`from_wire`.

        Args:
            message: the frames of a delivery.
            no_ack: whether it needs no acknowledgement.

        Raises:
            TypeError: *message* is something else.
        """
        if not hasattr(message, "wire"):
            raise TypeError(f"IncomingMessage() takes a leveret.abc.DeliveredMessage, not {type(message)!r}")
        self._locked = not message.delivery_tag
        self._body = message.body
        wire: Wire = message.wire
        self._wire = None if no_ack else wire
        self._consumer_tag = None if message.consumer_tag is None else encode_tag(message.consumer_tag)
        self.delivery_tag = message.delivery_tag or 0
        self.redelivered = bool(message.redelivered)
        self._route = encode_shortstr(message.exchange or "", "exchange")
        self._route += encode_shortstr(message.routing_key or "", "routing_key")
        self._raw_properties = b"\x00\x00"
        self._properties = _from_wire(message.properties)
        self._settled = no_ack
        if message.message_count is not None:
            self.message_count = message.message_count

    @staticmethod
    def from_wire(
        wire: Wire | None,
        consumer_tag: bytes | None,
        delivery_tag: int,
        redelivered: bool,
        route: bytes,
        properties: bytes,
        body: bytes,
        no_ack: bool,
    ) -> IncomingMessage:
        """The message of one delivery on *wire*; properties and route are bytes that are decoded when looked at."""
        self = _new(IncomingMessage)
        self._locked = False
        self._body = body
        self._wire = wire
        self._consumer_tag = consumer_tag
        self.delivery_tag = delivery_tag
        self.redelivered = redelivered
        self._route = route
        self._raw_properties = properties
        self._settled = no_ack
        return self

    def __getattr__(self, name: str) -> Any:
        # A slot that was never set: the properties, until somebody looks at one of them.
        if name == "_properties":
            self._properties = properties = _from_wire(decode_properties(self._raw_properties).properties)
            return properties
        if name == "message_count":
            return None
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def exchange(self) -> str:
        """The exchange that it was published to."""
        return decode_route(self._route)[0]

    @property
    def routing_key(self) -> str:
        """The routing key that it was published with."""
        return decode_route(self._route)[1]

    @property
    def consumer_tag(self) -> str | None:
        """The consumer that it was delivered to; None if it was fetched."""
        return None if self._consumer_tag is None else self._consumer_tag.decode("utf-8", "surrogateescape")

    @property
    def channel(self) -> Any:
        """The channel that brought it, with aiormq's methods, for code written for aio-pika.

        Raises:
            ChannelInvalidStateError: it is closed, or the message needs no acknowledgement and does not know it.
        """
        from leveret.underlay import channel_of

        return channel_of(self._wire)

    @property
    def headers_error(self) -> MessageDecodeError | None:
        """Why the headers or properties could not be read (fully), or None."""
        return decode_properties(self._raw_properties).error

    @property
    def headers_raw(self) -> bytes | None:
        """The bytes of a header table that could not be read; None if it could."""
        return decode_properties(self._raw_properties).raw_headers

    @property
    def received_size(self) -> int:
        """Bytes of the body and of the properties, as they came."""
        return len(self._body) + len(self._raw_properties)

    @property
    def is_live(self) -> bool:
        """Whether the channel that brought it is still open, so that settling it can reach the broker."""
        return self._wire is not None and self._wire.is_open

    @property
    def processed(self) -> bool:
        """Whether it was acknowledged, rejected or handed back, or never needed to be (``no_ack``)."""
        return self._settled

    @property
    def locked(self) -> bool:
        """Whether properties can no longer be assigned; true once it is processed."""
        return self._locked or self._settled

    @returns_awaitable
    def ack(self, multiple: bool = False) -> Coroutine[Any, Any, None]:
        """Acknowledge: the broker forgets the message (``basic.ack``).

        It takes effect when called; awaiting adds back-pressure while the socket is full.

        Args:
            multiple: all earlier unsettled messages of the channel too.

        Raises:
            TypeError: it was consumed with ``no_ack``.
            MessageProcessError: it was settled before.
            DeliveryLost: its channel is gone; the broker redelivers it.
        """
        wire = self._wire
        if self._settled or wire is None:
            raise self._cannot_settle("ack")
        done = wire.ack(self.delivery_tag, multiple) if multiple or self._consumer_tag not in wire.cancelled else DONE
        self._settled = True
        return done

    @returns_awaitable
    def reject(self, requeue: bool = False) -> Coroutine[Any, Any, None]:
        """Refuse it (``basic.reject``): the broker drops or dead-letters it, or requeues it if asked to.

        Raises:
            TypeError, MessageProcessError, DeliveryLost: as :meth:`ack`.
        """
        wire = self._wire
        if self._settled or wire is None:
            raise self._cannot_settle("reject")
        done = wire.reject(self.delivery_tag, requeue) if self._consumer_tag not in wire.cancelled else DONE
        self._settled = True
        return done

    @returns_awaitable
    def nack(self, multiple: bool = False, requeue: bool = True) -> Coroutine[Any, Any, None]:
        """Hand it back (``basic.nack``), with all earlier unsettled ones if *multiple*.

        Unlike :meth:`reject`, RabbitMQ 4.3 does not count it as a failed delivery in quorum queues.

        Raises:
            MethodNotImplemented: the broker does not know ``basic.nack``.
            TypeError, MessageProcessError, DeliveryLost: as :meth:`ack`.

        https://www.rabbitmq.com/docs/nack
        """
        wire = self._wire
        if self._settled or wire is None:
            raise self._cannot_settle("nack")
        if not wire.server_supports("basic.nack"):
            raise MethodNotImplemented("the broker does not know basic.nack; use reject()")
        done = (
            wire.nack(self.delivery_tag, multiple, requeue)
            if multiple or self._consumer_tag not in wire.cancelled
            else DONE
        )
        self._settled = True
        return done

    def give_back(self) -> Coroutine[Any, Any, None]:
        """Requeue it, by whichever method the broker knows."""
        wire = self._wire
        if wire is None or wire.server_supports("basic.nack"):
            return self.nack(requeue=True)
        return self.reject(requeue=True)

    def _cannot_settle(self, verb: str) -> Exception:
        if self._wire is None:
            return TypeError(f"cannot {verb} a message that needs no acknowledgement (no_ack, or returned)")
        text = f"cannot {verb}: Message already processed (inside process(), use process(ignore_processed=True))"
        return MessageProcessError(text, self)

    def process(
        self, requeue: bool = False, reject_on_redelivered: bool = False, ignore_processed: bool = False
    ) -> ProcessContext:
        """Settle it by how an ``async with`` block ends: ack on success, reject on an exception.

        Cancellation always requeues, and so do KeyboardInterrupt and SystemExit: a service that shuts down must not
        lose work.

        Args:
            requeue: requeue it on an exception, instead of dropping or dead-lettering it.
            reject_on_redelivered: but do not requeue it a second time.
            ignore_processed: do nothing at the end if the block settled it itself.
        """
        return ProcessContext(
            self, requeue=requeue, reject_on_redelivered=reject_on_redelivered, ignore_processed=ignore_processed
        )

    def info(self) -> MessageInfo:
        """Everything about the message and its delivery but the body."""
        info = super().info()
        info["consumer_tag"] = self.consumer_tag
        info["delivery_tag"] = self.delivery_tag
        info["exchange"] = self.exchange
        info["redelivered"] = self.redelivered
        info["routing_key"] = self.routing_key
        return info

    @staticmethod
    def settle_together(
        messages: Sequence[IncomingMessage], verb: Literal["ack", "nack", "reject", "give back"], requeue: bool = True
    ) -> Coroutine[Any, Any, None]:
        """Settle those of *messages* that are not, by as few methods as it takes; it takes effect when called.

        Args:
            messages: of one channel.
            verb: "give back" requeues, by whichever method the broker knows.
            requeue: whether those that are not acknowledged go back to their queue.

        Raises:
            TypeError: they were consumed with ``no_ack``.
            ValueError: they are not of one channel.
            MethodNotImplemented: the broker does not know ``basic.nack``.
            DeliveryLost: their channel is gone; the broker redelivers them.
        """
        if not messages:
            return DONE
        unsettled = [message for message in messages if not message._settled]
        wire = (unsettled or messages)[0]._wire
        if wire is None:
            raise messages[0]._cannot_settle(verb)
        if any(message._wire is not wire for message in unsettled):
            raise ValueError("messages of different channels cannot be settled together")
        cancelled = wire.cancelled
        tags = [message.delivery_tag for message in unsettled if message._consumer_tag not in cancelled]
        tags.sort()
        # To the broker they are the same, but it counts a basic.reject that requeues as a failed delivery (4.3), and
        # that method is about one message only.
        may_nack = verb != "ack" and wire.server_supports("basic.nack")
        if verb == "nack" and not may_nack:
            raise MethodNotImplemented("the broker does not know basic.nack; use reject()")
        done: Coroutine[Any, Any, None] = DONE
        if tags and (verb == "ack" or (may_nack and not (verb == "reject" and requeue))):
            done = wire.settle_all(tags, requeue=None if verb == "ack" else requeue)
        else:
            done = in_turn([wire.reject(tag, requeue) for tag in tags])
        for message in unsettled:
            message._settled = True
        return done


def _from_wire(properties: Properties) -> Properties:
    """*properties* with the values that a message keeps."""
    if properties.expiration is None and properties.timestamp is None:
        return properties
    timestamp = None if properties.timestamp is None else decode_timestamp(properties.timestamp)
    return _with_times(properties, decode_expiration(properties.expiration), timestamp)


incoming_message = IncomingMessage.from_wire


class ReturnedMessage(IncomingMessage):
    """A mandatory message that came back because no queue would take it (``basic.return``).

    Attributes:
        reply_code: 312, NO_ROUTE.
        reply_text: the broker's words.
    """

    __slots__ = ("reply_code", "reply_text")

    def __init__(self, reply_code: int, reply_text: str, route: bytes, properties: bytes, body: bytes) -> None:
        self._locked, self._settled, self._wire = False, True, None
        self._consumer_tag, self.delivery_tag, self.redelivered = None, 0, False
        self._route, self._raw_properties, self._body = route, properties, body
        self.reply_code = reply_code
        self.reply_text = reply_text

    @property
    def delivery(self) -> Basic.Return:
        """The frame that it came back with."""
        return Basic.Return(self.reply_code, self.reply_text, self.exchange, self.routing_key)

    @property
    def header(self) -> ContentHeader:
        """The frame with its properties."""
        return ContentHeader(0, self.body_size, self.properties)


class ProcessContext:
    """What :meth:`IncomingMessage.process` returns."""

    __slots__ = ("_ignore_processed", "_message", "_reject_on_redelivered", "_requeue")

    def __init__(
        self, message: IncomingMessage, *, requeue: bool, reject_on_redelivered: bool, ignore_processed: bool
    ) -> None:
        self._message = message
        self._requeue = requeue
        self._reject_on_redelivered = reject_on_redelivered
        self._ignore_processed = ignore_processed

    async def __aenter__(self) -> IncomingMessage:
        return self._message

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            await self._settle(exc)
        except ChannelInvalidStateError:  # of a channel that somebody made by hand
            if exc is None:
                raise

    def __enter__(self) -> IncomingMessage:
        warn_of("with message.process()", "write async with, which waits while the socket is full")
        return self._message

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        _ = self._settle(exc)

    def _settle(self, exc: BaseException | None) -> Coroutine[Any, Any, None]:
        """Settle the message, whose block ended with *exc*; it takes effect when called."""
        message = self._message
        if self._ignore_processed and message.processed:
            return DONE
        try:
            if exc is None:
                return message.ack()
            if not isinstance(exc, Exception):  # cancelled, or the program ends: somebody else shall do it
                return DONE if message.processed else message.give_back()
            if self._reject_on_redelivered and message.redelivered:
                _log.info("Message %r was redelivered and will be rejected", message)
                return message.reject(requeue=False)
            return message.reject(requeue=self._requeue)
        except DeliveryLost:
            verb = "Ack" if exc is None else "Reject"
            _log.warning("%s is not sent since channel is closed: the broker redelivers %r", verb, message.delivery_tag)
            return DONE
