"""For ``from aio_pika.robust_queue import …``."""

from leveret.abc import (
    AbstractChannel,
    AbstractExchange,
    AbstractIncomingMessage,
    AbstractQueueIterator,
    AbstractRobustQueue,
    get_exchange_name,
)
from leveret.exceptions import ChannelInvalidStateError
from leveret.iterator import QueueIterator
from leveret.iterator import QueueIterator as RobustQueueIterator
from leveret.lazy import pass_on
from leveret.queue import Queue
from leveret.robust_channel import RobustQueue

pass_on(__name__)

__all__ = [
    "AbstractChannel",
    "AbstractExchange",
    "AbstractIncomingMessage",
    "AbstractQueueIterator",
    "AbstractRobustQueue",
    "ChannelInvalidStateError",
    "Queue",
    "QueueIterator",
    "RobustQueue",
    "RobustQueueIterator",
    "get_exchange_name",
]
