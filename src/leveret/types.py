"""Enumerations and the types that signatures are written in."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from decimal import Decimal
from enum import Enum, IntEnum, unique
from typing import TypeAlias, TypedDict

TimeoutType: TypeAlias = float | int | None
"""Seconds; None means the connection's ``operation_timeout``."""

DateType: TypeAlias = int | float | datetime.datetime | datetime.timedelta | None
"""A point in time, or for ``expiration`` a duration: seconds, datetime or timedelta."""

FieldValue: TypeAlias = (
    bool
    | bytes
    | bytearray
    | int
    | float
    | str
    | Decimal
    | datetime.datetime
    | Sequence["FieldValue"]
    | Mapping[str, "FieldValue"]
    | None
)
"""What a header or an argument may hold."""

HeadersType: TypeAlias = dict[str, FieldValue]
Arguments: TypeAlias = Mapping[str, FieldValue] | None
ConsumerTag: TypeAlias = str
MILLISECONDS = 1000


@unique
class ExchangeType(str, Enum):
    """Exchange types of RabbitMQ and its plugins; any other may be given as a string.

    RabbitMQ 3.10 answers an unknown type by closing the *connection*, later releases the channel only.
    """

    FANOUT = "fanout"
    DIRECT = "direct"
    TOPIC = "topic"
    HEADERS = "headers"
    X_DELAYED_MESSAGE = "x-delayed-message"
    X_CONSISTENT_HASH = "x-consistent-hash"
    X_MODULUS_HASH = "x-modulus-hash"
    X_LOCAL_RANDOM = "x-local-random"


@unique
class DeliveryMode(IntEnum):
    """Whether a durable queue keeps the message over a restart of the broker."""

    NOT_PERSISTENT = 1
    PERSISTENT = 2


@unique
class TransactionState(str, Enum):
    """Where a :class:`~leveret.Transaction` is."""

    CREATED = "created"
    COMMITED = "commited"
    ROLLED_BACK = "rolled back"
    STARTED = "started"


class SSLOptions(TypedDict, total=False):
    """TLS files, by aio-pika's names."""

    cafile: str
    capath: str
    cadata: str
    keyfile: str
    certfile: str
    no_verify_ssl: int


class MessageInfo(TypedDict):
    """What :meth:`leveret.Message.info` returns."""

    app_id: str | None
    body_size: int
    cluster_id: str | None
    consumer_tag: str | None
    content_encoding: str | None
    content_type: str | None
    correlation_id: str | None
    delivery_mode: DeliveryMode | int
    delivery_tag: int | None
    exchange: str | None
    expiration: DateType
    headers: HeadersType
    message_id: str | None
    priority: int | None
    redelivered: bool | None
    reply_to: str | None
    routing_key: str | None
    timestamp: datetime.datetime | int | None
    type: str | None
    user_id: str | None
