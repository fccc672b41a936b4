"""What tests give the broker and its controls, checked at the call: later, it would hurt a client. Pure."""

from __future__ import annotations

import inspect
import math
import reprlib
from collections.abc import Mapping
from typing import Final, cast

from leveret.checks import check_count, check_seconds, check_takes

LONGEST: Final = 100 * 365 * 86_400
"""Seconds that anything may take: dates end with the year 9999."""


def check_text(name: str, value: object) -> None:
    """Raise TypeError unless *value*, the argument *name*, is a string."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, not {value!r}")


def check_text_or_none(name: str, value: object) -> None:
    """Raise TypeError unless *value*, the argument *name*, is a string or None."""
    if value is not None:
        check_text(name, value)


def check_name(name: str, value: object) -> None:
    """Raise unless *value*, the argument *name*, can be the name of a user or a virtual host: AMQP's short string."""
    check_text(name, value)
    text = cast("str", value)
    if not text:
        raise ValueError(f"{name} must not be empty")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{name} must be text that UTF-8 can carry, not {text!r}") from None
    if size > 255:
        raise ValueError(f"{name} must be 255 bytes at most, not {size}: {reprlib.repr(text)}")


def check_password(name: str, value: object) -> None:
    """Raise unless *value*, the argument *name*, is a password that one can log in with."""
    check_text(name, value)
    if not value:
        raise ValueError(f"{name} must not be empty: RabbitMQ refuses logins without a password")


def check_names(name: str, value: object) -> None:
    """Raise unless *value*, the argument *name*, is a collection of names, and not one string."""
    if not isinstance(value, tuple | list):
        raise TypeError(f"{name} must be a tuple of strings, as ({value!r},), not {value!r}")
    for each in cast("tuple[object, ...]", value):
        check_name(f"each of {name}", each)


def check_any(name: str, value: object, example: str) -> None:
    """Raise ValueError where *value*, the argument *name*, is empty: nobody could log in."""
    if not value:
        raise ValueError(f"{name} must have one at least, as {example}, not {value!r}: nobody could log in")


def check_users(users: object) -> None:
    """Raise unless *users* has names and passwords to log in with."""
    if not isinstance(users, Mapping):
        raise TypeError(f"users must be a mapping of names to passwords, as {{'guest': 'guest'}}, not {users!r}")
    found = cast("Mapping[object, object]", users)
    check_any("users", dict(found), "{'guest': 'guest'}")
    for name, password in found.items():
        check_name("a user's name", name)
        check_password(f"the password of user {name!r}", password)


def check_limit(name: str, value: object) -> None:
    """Raise unless *value*, the argument *name*, is how many there may be; None, or RabbitMQ's -1, is any number."""
    if value is not None:
        check_count(name, value, -1, hint=" (-1 or None for any number)")


def check_number(name: str, value: object) -> None:
    """Raise unless *value*, the argument *name*, is the number of a port or a channel, or None."""
    if value is not None:
        check_count(name, value, 1, 65_535)


def check_bytes(name: str, value: object) -> None:
    """Raise TypeError unless *value*, the argument *name*, is bytes."""
    if not isinstance(value, bytes | bytearray):
        raise TypeError(f"{name} must be bytes, not {value!r}")


def check_span(name: str, value: object, *, zero: bool = True, hint: str = "") -> None:
    """Raise unless *value*, the argument *name*, is a number of seconds, and not more than :data:`LONGEST`."""
    if isinstance(value, int | float) and LONGEST < value < math.inf:  # asked first: math cannot take any integer
        raise ValueError(f"{name} must be at most {LONGEST}, a hundred years, not {reprlib.repr(value)}")
    check_seconds(name, value, zero=zero, hint=hint)


def check_consumer_timeout(name: str, seconds: object, tick_name: str, tick: object) -> None:
    """Raise unless both are seconds; None is for ever, and a tick of 0 would leave no time for anything else."""
    if seconds is not None:
        check_span(name, seconds, hint=", or None for ever")
    check_span(tick_name, tick, zero=False)


def check_tap(tap: object) -> None:
    """Raise TypeError unless *tap* can be called as a tap is."""
    if inspect.iscoroutinefunction(tap):
        raise TypeError(f"tap must be no coroutine function, for bytes do not wait; {tap!r} is one")
    check_takes("tap", tap, (None, "in", b""), "the connection, the direction and the bytes")
