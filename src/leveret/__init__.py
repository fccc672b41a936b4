"""leveret: a kind async AMQP 0-9-1 client for RabbitMQ."""

from leveret import exceptions
from leveret._version import __version__
from leveret.callbacks import CallbackCollection
from leveret.channel import Channel
from leveret.connection import Connection, connect
from leveret.consumer import QueueIterator
from leveret.exceptions import AMQPException, MessageProcessError
from leveret.exchange import Exchange
from leveret.log import logger
from leveret.message import IncomingMessage, Message, ReturnedMessage
from leveret.queue import Queue
from leveret.transaction import Transaction
from leveret.types import DeliveryMode, ExchangeType

__all__ = [
    "AMQPException",
    "CallbackCollection",
    "Channel",
    "Connection",
    "DeliveryMode",
    "Exchange",
    "ExchangeType",
    "IncomingMessage",
    "Message",
    "MessageProcessError",
    "Queue",
    "QueueIterator",
    "ReturnedMessage",
    "Transaction",
    "__version__",
    "connect",
    "exceptions",
    "logger",
]
