"""Expiration and timestamp: what users give, what the wire has, and back."""

from __future__ import annotations

import datetime
import math
from functools import singledispatch
from typing import Any

from leveret.types import MILLISECONDS, DateType

UTC = datetime.UTC
_LONGEST_EXPIRATION = 315_360_000_000
"""Milliseconds, ten years: RabbitMQ closes the channel over more ("value_too_large")."""


@singledispatch
def encode_expiration(value: DateType) -> str | None:
    """A message's time to live in milliseconds, as the text that RabbitMQ wants.

    ``encode_expiration.register`` teaches it another type.

    Args:
        value: seconds, a timedelta, or the datetime at which it expires; a naive one is in local time, as
            ``datetime.now()`` gives it.

    Raises:
        ValueError: negative, or over ten years (3,650 days), which is the most that RabbitMQ takes. A datetime that has
            passed is 0: expire unless a consumer is waiting.
        TypeError: of no such type.

    https://www.rabbitmq.com/docs/ttl#per-message-ttl-in-publishers
    """
    if value is None:
        return None
    if isinstance(value, datetime.datetime):
        seconds = max(0.0, (value - datetime.datetime.now(value.tzinfo)).total_seconds())
    elif isinstance(value, datetime.timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = value
    else:
        raise TypeError(f"expiration must be seconds, a timedelta or a datetime, not {type(value).__name__}")
    if seconds < 0:
        raise ValueError(f"expiration must not be negative: {value!r}")
    if not math.isfinite(seconds):
        raise ValueError(f"expiration must be a number of seconds: {value!r}")
    milliseconds = round(seconds * 1000)
    if milliseconds > _LONGEST_EXPIRATION:
        longest = _LONGEST_EXPIRATION // 1000
        raise ValueError(f"expiration must not be over {longest:,} seconds, which is RabbitMQ's limit: {value!r}")
    return str(milliseconds)


_encoders = encode_expiration.registry
"""A view that sees what is registered: one, until somebody teaches it another type."""


def quick_expiration(value: Any) -> str | None:
    """As :func:`encode_expiration`, without its dispatch for plain seconds, unless somebody has registered a type.

    Raises:
        ValueError, TypeError: as that.
    """
    if (
        (value.__class__ is float or value.__class__ is int)
        and 0 <= value <= _LONGEST_EXPIRATION / MILLISECONDS
        and len(_encoders) == 1
    ):
        return str(round(value * MILLISECONDS))
    return encode_expiration(value)


def decode_expiration(value: str | None) -> float | str | None:
    """Seconds from the wire's milliseconds; text that is no number stays as it is."""
    if value is None:
        return None
    try:
        return int(value) / 1000
    except ValueError:
        return value


@singledispatch
def encode_timestamp(value: DateType) -> int | None:
    """Whole seconds since 1970 for the wire.

    ``encode_timestamp.register`` teaches it another type.

    Args:
        value: seconds since 1970, a datetime (naive means UTC), or a timedelta from now.

    Raises:
        TypeError: of no such type.
        ValueError: out of range, or no number.
    """
    try:
        return _seconds(value)
    except OverflowError:
        raise ValueError(f"timestamp is out of range: {value!r}") from None


def _seconds(value: DateType) -> int | None:
    if value is None:
        return None
    if isinstance(value, datetime.datetime):
        return int(_aware(value).timestamp())
    if isinstance(value, datetime.timedelta):
        return int((datetime.datetime.now(UTC) + value).timestamp())
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return int(value)
    raise TypeError(f"timestamp must be seconds, a datetime or a timedelta, not {type(value).__name__}")


def decode_timestamp(value: DateType) -> datetime.datetime | int | None:
    """An aware datetime; a number beyond what datetime can hold stays a number."""
    seconds = value if type(value) is int else encode_timestamp(value)  # an int is what the wire has
    if seconds is None:
        return None
    try:
        return datetime.datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, ValueError, OSError):
        return seconds


def to_milliseconds(seconds: float) -> int:
    """Whole milliseconds."""
    return int(seconds * MILLISECONDS)


def _aware(value: datetime.datetime) -> datetime.datetime:
    return value if value.tzinfo is not None else value.replace(tzinfo=UTC)
