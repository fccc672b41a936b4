"""``aiormq.connection``: what reads the values of query parameters, for those who declare some of their own."""

from __future__ import annotations

from leveret.types import TimeoutType
from leveret.underlay import UnderlayConnection as Connection


def parse_bool(v: object) -> bool:
    """Whether *v* is true, or a text that says so; any other text says no."""
    return v if isinstance(v, bool) else str(v).lower() in {"true", "yes", "y", "enable", "on", "enabled", "1"}


def parse_int(v: object) -> int:
    """The integer that *v* is, or says; 0 for any other text."""
    if isinstance(v, int):
        return v
    try:
        return int(str(v))
    except ValueError:
        return 0


def parse_timeout(v: object) -> TimeoutType:
    """The seconds that *v* are, or says, as an integer where they are whole; 0 for any other text."""
    if isinstance(v, int):
        return v
    try:
        seconds = float(str(v))
    except ValueError:
        return 0
    return int(seconds) if seconds.is_integer() else seconds


__all__ = ["Connection", "parse_bool", "parse_int", "parse_timeout"]
