"""For ``from aio_pika.robust_exchange import …``."""

from leveret.abc import AbstractChannel, AbstractExchange, AbstractRobustExchange, get_exchange_name
from leveret.exchange import Exchange
from leveret.lazy import pass_on
from leveret.robust_channel import RobustExchange
from leveret.types import ExchangeType

pass_on(__name__)

__all__ = [
    "AbstractChannel",
    "AbstractExchange",
    "AbstractRobustExchange",
    "Exchange",
    "ExchangeType",
    "RobustExchange",
    "get_exchange_name",
]
