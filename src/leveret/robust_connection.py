"""For ``from aio_pika.robust_connection import …``."""

from leveret.robust import RobustConnection, connect_robust

__all__ = ["RobustConnection", "connect_robust"]
