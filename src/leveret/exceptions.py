"""Every error that leveret raises, and how the broker's reply codes become classes.

::

    AMQPError (= AMQPException)
    ├─ AMQPConnectionError (also a ConnectionError)
    │  ├─ ConnectTimeout (also a TimeoutError) · IncompatibleProtocolError
    │  ├─ AuthenticationError · ProbableAuthenticationError ── LoginRefused is both
    │  └─ ConnectionClosed
    │     └─ ConnectionFrameError 501 · ConnectionSyntaxError 502 · ConnectionCommandInvalid 503
    │        · ConnectionChannelError 504 · ConnectionUnexpectedFrame 505 · ConnectionResourceError 506
    │        · ConnectionNotAllowed 530 · ConnectionNotImplemented 540 · ConnectionInternalError 541
    │        · HeartbeatTimeout
    ├─ AMQPChannelError
    │  ├─ ChannelInvalidStateError (also a RuntimeError)
    │  ├─ ChannelLimitReached
    │  └─ ChannelClosed
    │     └─ ChannelAccessRefused 403 · ChannelNotFoundEntity 404 · ChannelLockedResource 405
    │        · ChannelPreconditionFailed 406 · DuplicateConsumerTag
    ├─ ProtocolError               the peer broke the protocol
    │  └─ HandshakeError (also an IncompatibleProtocolError)
    ├─ ProtocolSyntaxError ── InvalidFrameError
    ├─ DeliveryError
    │  ├─ PublishError ── MessageReturned
    │  ├─ MessageNacked
    │  ├─ PublishNotSent (also a ChannelInvalidStateError)
    │  │  └─ PublishNotSentInTime (also a TimeoutError) ── ConnectionBlocked
    │  ├─ PublishOutcomeUnknown (also an AMQPConnectionError)
    │  │  └─ PublishUnconfirmedInTime (also a TimeoutError)
    │  └─ PublishManyFailed
    ├─ DeliveryLost (also a ChannelInvalidStateError)
    ├─ ConsumerCancelled · MessageDecodeError · MessageTooLarge
    ├─ RemoteError · MessageProcessError ── NoServer
    ├─ MethodNotImplemented · QueueEmpty (also an asyncio.QueueEmpty)
    └─ TopologyError

A mistake of the caller is a ``ValueError`` or a ``TypeError`` before a byte is written, and what took too
long is always a ``TimeoutError`` too. Data sits on attributes; every waiter gets an exception object of its
own (:func:`fresh`), whose ``__cause__`` is the error that ended the connection or channel.
"""

from __future__ import annotations

import copy
from asyncio import QueueEmpty as _AsyncioQueueEmpty
from typing import TYPE_CHECKING, Any, TypeVar

from pamqp.exceptions import PAMQPException

if TYPE_CHECKING:
    from pamqp.commands import Basic, Channel, Connection

    from leveret.message import IncomingMessage, ReturnedMessage
    from leveret.report import PublishReport

_E = TypeVar("_E", bound=BaseException)


class AMQPError(Exception):
    """The root of everything that leveret raises about the broker or the protocol."""

    @property
    def reason(self) -> str:
        """What happened: the same as ``str()``."""
        return str(self)


AMQPException = AMQPError


# ---------------------------------------------------------------------------------------------- connection


class AMQPConnectionError(AMQPError, ConnectionError):
    """The connection could not be made, or was lost."""

    def __str__(self) -> str:
        # OSError would read two arguments as (errno, strerror) and print "[Errno 320] …".
        return " ".join(str(arg) for arg in self.args)


class ConnectTimeout(AMQPConnectionError, TimeoutError):
    """A stage of connecting (DNS and TCP, TLS, the AMQP handshake) took too long."""


class IncompatibleProtocolError(AMQPConnectionError):
    """What answered at the other end does not speak AMQP 0-9-1."""


class AuthenticationError(AMQPConnectionError):
    """The broker and leveret could not agree on a login."""


class ProbableAuthenticationError(AMQPConnectionError):
    """The broker hung up during the login, which it does when it refuses one."""


class LoginRefused(AuthenticationError, ProbableAuthenticationError):
    """The broker refused the user, the password or the SASL mechanism (403)."""


class Closed(AMQPError):
    """What a ``connection.close`` or ``channel.close`` said.

    Attributes:
        reply_code: AMQP's reply code, or 0 where none was given.
        reply_text: the broker's words.
        class_id: class of the method that caused the close, or 0.
        method_id: that method's number within its class, or 0.
        by_broker: True if the broker closed, False if this side did.
    """

    def __init__(
        self,
        *args: object,
        reply_code: int = 0,
        reply_text: str = "",
        class_id: int = 0,
        method_id: int = 0,
        by_broker: bool = False,
    ) -> None:
        super().__init__(*args)
        self.reply_code = reply_code
        self.reply_text = reply_text
        self.class_id = class_id
        self.method_id = method_id
        self.by_broker = by_broker

    @property
    def is_normal(self) -> bool:
        """Whether it was closed on purpose, by ``close()``."""
        return self.reply_code == 200


class ConnectionClosed(Closed, AMQPConnectionError):
    """The connection is closed."""

    @property
    def retryable(self) -> bool:
        """Whether connecting again may help without anybody changing anything."""
        return self.reply_code not in {403, 530}


class ConnectionFrameError(ConnectionClosed):
    """501 FRAME_ERROR: a malformed frame."""


class ConnectionSyntaxError(ConnectionClosed):
    """502 SYNTAX_ERROR: a frame with illegal values."""


class ConnectionCommandInvalid(ConnectionClosed):
    """503 COMMAND_INVALID: a method that makes no sense in this state."""


class ConnectionChannelError(ConnectionClosed):
    """504 CHANNEL_ERROR: a channel that was not opened."""


class ConnectionUnexpectedFrame(ConnectionClosed):
    """505 UNEXPECTED_FRAME: content where a method was due, or the reverse."""


class ConnectionResourceError(ConnectionClosed):
    """506 RESOURCE_ERROR: the broker lacks resources."""


class ConnectionNotAllowed(ConnectionClosed):
    """530 NOT_ALLOWED: missing vhost, no access to it, or a limit was reached."""


class ConnectionNotImplemented(ConnectionClosed):
    """540 NOT_IMPLEMENTED: the broker does not have that feature."""


class ConnectionInternalError(ConnectionClosed):
    """541 INTERNAL_ERROR: the broker failed."""


class HeartbeatTimeout(ConnectionClosed):
    """Nothing came from the broker for two heartbeat intervals; the socket was aborted."""


# ------------------------------------------------------------------------------------------------- channel


class AMQPChannelError(AMQPError):
    """Something about one channel; others on the connection are untouched."""


class ChannelInvalidStateError(AMQPChannelError, RuntimeError):
    """The channel is not open, so nothing was sent."""


class ChannelLimitReached(AMQPChannelError):
    """The connection has as many channels as was negotiated (``channel_max``)."""


class ChannelClosed(Closed, AMQPChannelError):
    """The channel is closed."""


class ChannelAccessRefused(ChannelClosed):
    """403 ACCESS_REFUSED: the user lacks a permission, or the name is reserved."""


class ChannelNotFoundEntity(ChannelClosed):
    """404 NOT_FOUND: no such queue or exchange."""


class ChannelLockedResource(ChannelClosed):
    """405 RESOURCE_LOCKED: an exclusive queue of another connection."""


class ChannelPreconditionFailed(ChannelClosed):
    """406 PRECONDITION_FAILED: other arguments than the entity has, an unknown delivery tag, …"""


class DuplicateConsumerTag(ChannelClosed):
    """The channel has a consumer of that tag; refused here, as the broker would close the connection."""


# ------------------------------------------------------------------------------------------------ protocol


class ProtocolError(AMQPError):
    """The peer broke the protocol; the connection is closed with ``reply_code``.

    Attributes:
        reply_code: the code that the connection is closed with.
        data: the first of the offending bytes, 64 at most.
    """

    def __init__(self, message: str, *, reply_code: int = 501, data: bytes = b"") -> None:
        super().__init__(message)
        self.reply_code = reply_code
        self.data = data[:64]


class HandshakeError(IncompatibleProtocolError, ProtocolError):
    """The peer broke the protocol before the connection was open."""


class ProtocolSyntaxError(AMQPError):
    """Kept for ``except`` clauses written for aio-pika."""


class InvalidFrameError(ProtocolSyntaxError):
    """Kept for ``except`` clauses written for aio-pika."""


# ------------------------------------------------------------------------------------------------ delivery


class DeliveryError(AMQPError):
    """A publish that the broker did not confirm.

    Attributes:
        message: what the broker sent back, or None.
        frame: the ``Basic.Nack`` that refused it, or None.
    """

    message: Any = None
    frame: Any = None

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        if len(args) == 2:  # as aio-pika's, which tests make by hand
            self.message, self.frame = args


class PublishError(DeliveryError):
    """The broker could not route the message."""


class MessageReturned(PublishError):
    """A mandatory message came back: no queue is bound for its routing key (``basic.return``).

    Attributes:
        message: the :class:`~leveret.ReturnedMessage`.
    """

    def __init__(self, message: ReturnedMessage) -> None:
        super().__init__(
            f"{message.reply_text} (exchange {message.exchange!r}, routing key {message.routing_key!r})",
            message.routing_key,
        )
        self.message: ReturnedMessage = message
        self.frame = message.delivery

    def __str__(self) -> str:
        return str(self.args[0])

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.message,)


class MessageNacked(DeliveryError):
    """The broker refused the message (``basic.nack``): its queue is full, or it had an internal error."""

    def __init__(self, frame: Basic.Nack) -> None:
        super().__init__(f"the broker refused the message (basic.nack, delivery tag {frame.delivery_tag})")
        self.frame: Basic.Nack = frame

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.frame,)


class PublishNotSent(DeliveryError, ChannelInvalidStateError):
    """Not a byte of the message was written: publishing it again is safe."""


class PublishOutcomeUnknown(DeliveryError, AMQPConnectionError):
    """The message was written, but its confirm never came: the broker may or may not have it."""


class PublishNotSentInTime(PublishNotSent, TimeoutError):
    """The deadline passed before the message could be written."""


class PublishUnconfirmedInTime(PublishOutcomeUnknown, TimeoutError):
    """The deadline passed after the message was written and before its confirm came."""


class ConnectionBlocked(PublishNotSentInTime):
    """The deadline passed while the broker blocked publishers; the reason is in the text."""


class PublishManyFailed(DeliveryError):
    """Some of many messages were not confirmed, or came back; see :meth:`PublishReport.raise_for_failures`.

    Attributes:
        report: the :class:`~leveret.PublishReport`, which says which.
    """

    def __init__(self, text: str, report: PublishReport) -> None:
        super().__init__(text, report)
        self.report: PublishReport = report

    def __str__(self) -> str:
        return str(self.args[0])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


class DeliveryLost(ChannelInvalidStateError):
    """The channel that brought the message is gone: nothing was sent, and the broker redelivers."""


class ConsumerCancelled(AMQPError):
    """The broker cancelled the consumer: its queue was deleted, or moved to another node."""

    def __init__(self, consumer_tag: str) -> None:
        super().__init__(f"the broker cancelled consumer {consumer_tag!r}: was its queue deleted?")
        self.consumer_tag = consumer_tag

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.consumer_tag,)


class MessageDecodeError(AMQPError):
    """The properties or headers of one message are malformed; the connection is sound."""


class MessageTooLarge(AMQPError, ValueError):
    """The headers do not fit into one frame, or an incoming body is over the limit."""


class MessageProcessError(AMQPError):
    """The message has been acknowledged, rejected or handed back before.

    Attributes:
        message: the message.
    """

    def __init__(self, text: str, message: IncomingMessage | None = None) -> None:
        super().__init__(text, message)
        self.message = message

    def __str__(self) -> str:
        return str(self.args[0])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


class NoServer(MessageProcessError):
    """Nobody serves the method that was called: no queue took the call (``basic.return``).

    Attributes:
        message: the :class:`~leveret.ReturnedMessage`.
    """


class RemoteError(AMQPError):
    """A remote procedure failed; or, raised by one, what its caller is to get.

    Attributes:
        type: name of the class of the exception there; there may be no such class here.
        message: its text.
        data: what else came with it: the arguments of the exception, unless the procedure said otherwise.
    """

    def __init__(self, type: str, message: str, data: Any = None) -> None:
        super().__init__(type, message, data)
        self.type = type
        self.message = message
        self.data = data

    def __str__(self) -> str:
        return f"{self.type}: {self.message}" if self.message else self.type


class MethodNotImplemented(AMQPError):
    """The broker does not announce the feature."""


class QueueEmpty(AMQPError, _AsyncioQueueEmpty):
    """``queue.get()`` found no message."""


class TopologyError(AMQPError):
    """The broker refuses to restore something; its words are the ``__cause__``.

    Attributes:
        record: what it refuses, as it was declared.
    """

    def __init__(self, text: str, record: object = None) -> None:
        super().__init__(text, record)
        self.record = record

    def __str__(self) -> str:
        return str(self.args[0])


CONNECTION_EXCEPTIONS: tuple[type[Exception], ...] = (
    AMQPError,
    ConnectionError,
    OSError,
    RuntimeError,
    StopAsyncIteration,
    PAMQPException,
)
"""What a reconnecting ``except`` clause written for aio-pika catches."""


# ----------------------------------------------------------------------------------- reply codes → classes

_CONNECTION_CLASSES: dict[int, type[ConnectionClosed]] = {
    501: ConnectionFrameError,
    502: ConnectionSyntaxError,
    503: ConnectionCommandInvalid,
    504: ConnectionChannelError,
    505: ConnectionUnexpectedFrame,
    506: ConnectionResourceError,
    530: ConnectionNotAllowed,
    540: ConnectionNotImplemented,
    541: ConnectionInternalError,
}
_CHANNEL_CLASSES: dict[int, type[ChannelClosed]] = {
    403: ChannelAccessRefused,
    404: ChannelNotFoundEntity,
    405: ChannelLockedResource,
    406: ChannelPreconditionFailed,
}
_C = TypeVar("_C", bound=Closed)


def connection_closed(method: Connection.Close) -> ConnectionClosed:
    """The exception for the broker's ``connection.close``."""
    return _closed(_CONNECTION_CLASSES, ConnectionClosed, method)


def channel_closed(method: Channel.Close) -> ChannelClosed:
    """The exception for the broker's ``channel.close``."""
    return _closed(_CHANNEL_CLASSES, ChannelClosed, method)


def _closed(classes: dict[int, type[_C]], general: type[_C], method: Connection.Close | Channel.Close) -> _C:
    code, text = method.reply_code or 0, method.reply_text
    cls = classes.get(code, general)
    # As in aio-pika: a class of its own has the text as its argument, the general one (code, text).
    return cls(
        *((code, text) if cls is general else (text,)),
        reply_code=code,
        reply_text=text,
        class_id=method.class_id or 0,
        method_id=method.method_id or 0,
        by_broker=True,
    )


def fresh(error: _E) -> _E:
    """A copy of *error* for one waiter, chained to it.

    An exception object that several tasks raise collects the traceback of each; so each gets its own.
    """
    try:
        twin = copy.copy(error)
    except Exception:  # a user's exception, whose constructor does not take what it passed on
        return error
    twin.__cause__ = error
    return twin
