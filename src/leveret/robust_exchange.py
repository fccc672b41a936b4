"""For ``from aio_pika.robust_exchange import …``."""

from leveret.robust_channel import RobustExchange

__all__ = ["RobustExchange"]
