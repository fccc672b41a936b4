"""For ``from aio_pika.robust_connection import …``."""

from typing import TypeVar

from leveret.abc import (
    AbstractRobustChannel,
    AbstractRobustConnection,
    CallbackCollection,
    ConnectionParameter,
    SSLOptions,
)
from leveret.connection import Connection, make_url
from leveret.exceptions import CONNECTION_EXCEPTIONS, ChannelNotFoundEntity
from leveret.lazy import pass_on
from leveret.robust import RobustConnection, connect_robust
from leveret.robust_channel import RobustChannel

pass_on(__name__)

RobustConnectionType = TypeVar("RobustConnectionType", bound=RobustConnection)

__all__ = [
    "CONNECTION_EXCEPTIONS",
    "AbstractRobustChannel",
    "AbstractRobustConnection",
    "CallbackCollection",
    "ChannelNotFoundEntity",
    "Connection",
    "ConnectionParameter",
    "RobustChannel",
    "RobustConnection",
    "RobustConnectionType",
    "SSLOptions",
    "connect_robust",
    "make_url",
]
