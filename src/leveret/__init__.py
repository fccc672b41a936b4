"""leveret: a kind async AMQP 0-9-1 client for RabbitMQ.

(PYTEST_DONT_REWRITE: so that pytest, which finds a plugin beside it, does not warn where this was imported before.)
"""

import typing

from leveret import exceptions
from leveret._version import __version__
from leveret.batches import Batch, BatchIterator
from leveret.callbacks import CallbackCollection
from leveret.channel import Channel
from leveret.connection import Connection, connect
from leveret.consuming import Consumer
from leveret.credentials import Credentials
from leveret.draining import DrainReport
from leveret.exceptions import AMQPException, MessageProcessError
from leveret.exchange import Exchange
from leveret.iterator import QueueIterator
from leveret.lifecycle import ConnectionState, Health
from leveret.log import logger
from leveret.message import IncomingMessage, Message, ReturnedMessage
from leveret.message_retry import MessageRetry
from leveret.queue import Queue
from leveret.report import PublishFailure, PublishReport
from leveret.retry import RetryPolicy
from leveret.robust import RobustConnection, connect_robust
from leveret.robust_channel import RobustChannel, RobustExchange, RobustQueue
from leveret.settling import Ack, Nack, Reject, Requeue, Verdict
from leveret.signals import run_until_signalled
from leveret.transaction import Transaction
from leveret.types import DeliveryMode, ExchangeType

if typing.TYPE_CHECKING:
    from leveret import abc as abc
    from leveret import compat as compat
    from leveret import patterns as patterns
    from leveret import pool as pool
    from leveret import tools as tools
else:
    from leveret.lazy import __getattr__ as __getattr__

__all__ = [
    "AMQPException",
    "Ack",
    "Batch",
    "BatchIterator",
    "CallbackCollection",
    "Channel",
    "Connection",
    "ConnectionState",
    "Consumer",
    "Credentials",
    "DeliveryMode",
    "DrainReport",
    "Exchange",
    "ExchangeType",
    "Health",
    "IncomingMessage",
    "Message",
    "MessageProcessError",
    "MessageRetry",
    "Nack",
    "PublishFailure",
    "PublishReport",
    "Queue",
    "QueueIterator",
    "Reject",
    "Requeue",
    "RetryPolicy",
    "ReturnedMessage",
    "RobustChannel",
    "RobustConnection",
    "RobustExchange",
    "RobustQueue",
    "Transaction",
    "Verdict",
    "__version__",
    "abc",
    "connect",
    "connect_robust",
    "exceptions",
    "logger",
    "patterns",
    "pool",
    "run_until_signalled",
]
