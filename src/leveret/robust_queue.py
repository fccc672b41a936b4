"""For ``from aio_pika.robust_queue import …``."""

from leveret.iterator import QueueIterator as RobustQueueIterator
from leveret.robust_channel import RobustQueue

__all__ = ["RobustQueue", "RobustQueueIterator"]
