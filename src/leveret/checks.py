"""Arguments that are checked in more than one place, before a byte is sent."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable


def check_count(name: str, value: object, least: int, most: int | None = None, hint: str = "") -> None:
    """Raise unless *value*, the argument *name*, is a whole number of that range.

    Raises:
        TypeError: it is no int.
        ValueError: it is less than *least*, or more than *most* (None for no limit); *hint* is added to the text.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, not {value!r}")
    if value < least or (most is not None and value > most):
        allowed = f"{least} or more" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be {allowed}{hint}, not {value}")


def check_timeout(name: str, value: object) -> None:
    """Raise unless *value*, the argument *name*, is a number of seconds; ``math.inf`` is one.

    Raises:
        TypeError: it is no number.
        ValueError: it is not a number by its name (NaN).
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number of seconds, not {value!r}")
    if value != value:
        raise ValueError(f"{name} must be a number of seconds (math.inf for no limit), not {value}")


def check_seconds(name: str, value: object, *, zero: bool = True, hint: str = "") -> None:
    """Raise unless *value*, the argument *name*, is a finite number of seconds.

    Raises:
        TypeError: it is no number.
        ValueError: it is negative, 0 where *zero* is not allowed, NaN or infinite; *hint* is added to the text.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number of seconds, not {value!r}")
    if not (value >= 0 and math.isfinite(value)) or (value == 0 and not zero):
        allowed = "0 or more seconds" if zero else "more than 0 seconds"
        raise ValueError(f"{name} must be {allowed}, and finite{hint}, not {value}")


def check_callback(callback: Callable[..., object]) -> None:
    """Raise unless *callback* can be called with one argument, a message.

    Raises:
        TypeError: it is not callable, or takes other arguments.
    """
    check_takes("the callback", callback, (None,), "one argument, the message")


def check_takes(name: str, function: object, arguments: tuple[object, ...], described: str) -> None:
    """Raise TypeError unless *function*, the argument *name*, can be called with *arguments*, which are *described*."""
    if not callable(function):
        raise TypeError(f"{name} must be callable, not {function!r}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some that are written in C do not tell
        return
    try:
        signature.bind(*arguments)
    except TypeError as exc:
        called = getattr(function, "__qualname__", repr(function))
        raise TypeError(f"{name} is called with {described}, but is {called}{signature}: {exc}") from exc
