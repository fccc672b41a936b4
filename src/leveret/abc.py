"""aio-pika's names for types: aliases of leveret's own classes.

There are no abstract classes beside the real ones. ``isinstance(x, abc.AbstractChannel)`` and annotations work, and
``create_autospec(abc.AbstractChannel)`` has what a channel has.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from pamqp.commands import Basic
from yarl import URL

from leveret.channel import Channel
from leveret.connection import Connection
from leveret.delivered import DeliveredMessage
from leveret.exchange import Exchange, ExchangeParamType
from leveret.exchange import exchange_name as get_exchange_name
from leveret.iterator import QueueIterator
from leveret.lazy import pass_on
from leveret.message import IncomingMessage, Message, ProcessContext, ReturnedMessage
from leveret.pool import PoolInstance
from leveret.queue import Queue
from leveret.robust import RobustConnection
from leveret.robust_channel import RobustChannel, RobustExchange, RobustQueue
from leveret.tools import CallbackCollection, CallbackSetType, CallbackType, OneShotCallback
from leveret.transaction import Transaction
from leveret.types import (
    MILLISECONDS,
    Arguments,
    ConsumerTag,
    DateType,
    DeliveryMode,
    ExchangeType,
    FieldValue,
    HeadersType,
    MessageInfo,
    SSLOptions,
    TimeoutType,
    TransactionState,
)
from leveret.underlay import UnderlayChannel, UnderlayConnection
from leveret.url import ConnectionParameter

pass_on(__name__)

AbstractChannel = Channel
AbstractConnection = Connection
AbstractExchange = Exchange
AbstractIncomingMessage = IncomingMessage
AbstractMessage = Message
AbstractProcessContext = ProcessContext
AbstractQueue = Queue
AbstractQueueIterator = QueueIterator
AbstractRobustChannel = RobustChannel
AbstractRobustConnection = RobustConnection
AbstractRobustExchange = RobustExchange
AbstractRobustQueue = RobustQueue
AbstractTransaction = Transaction

NoneType = type(None)
ExceptionType: TypeAlias = BaseException | type[BaseException]
PublishResultType: TypeAlias = Basic.Ack | ReturnedMessage
ChannelCloseCallback: TypeAlias = Callable[[Channel | None, BaseException | None], Awaitable[Any] | Any]
ConnectionCloseCallback: TypeAlias = Callable[[Connection | None, BaseException | None], Awaitable[Any] | Any]
ReturnCallback: TypeAlias = Callable[[Channel, ReturnedMessage], Any]
ConnectionType = TypeVar("ConnectionType", bound=Connection)


@dataclass(frozen=True)
class DeclarationResult:
    """What ``declare()`` tells of a queue; what it returns is pamqp's ``Queue.DeclareOk``, which has these as well.

    Attributes:
        message_count: messages that are ready.
        consumer_count: who consumes.
    """

    message_count: int
    consumer_count: int


__all__ = [
    "MILLISECONDS",
    "URL",
    "AbstractChannel",
    "AbstractConnection",
    "AbstractExchange",
    "AbstractIncomingMessage",
    "AbstractMessage",
    "AbstractProcessContext",
    "AbstractQueue",
    "AbstractQueueIterator",
    "AbstractRobustChannel",
    "AbstractRobustConnection",
    "AbstractRobustExchange",
    "AbstractRobustQueue",
    "AbstractTransaction",
    "Arguments",
    "CallbackCollection",
    "CallbackSetType",
    "CallbackType",
    "ChannelCloseCallback",
    "ConnectionCloseCallback",
    "ConnectionParameter",
    "ConnectionType",
    "ConsumerTag",
    "DateType",
    "DeclarationResult",
    "DeliveredMessage",
    "DeliveryMode",
    "ExceptionType",
    "ExchangeParamType",
    "ExchangeType",
    "FieldValue",
    "HeadersType",
    "MessageInfo",
    "NoneType",
    "OneShotCallback",
    "PoolInstance",
    "PublishResultType",
    "ReturnCallback",
    "SSLOptions",
    "TimeoutType",
    "TransactionState",
    "UnderlayChannel",
    "UnderlayConnection",
    "get_exchange_name",
]
