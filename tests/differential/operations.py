"""What is done to a broker, as values: an operation's text is the Python that makes it again.

Names of queues and exchanges are short (``q0``, ``x1``; ``gen0`` is the first one that the broker named): whoever plays
a sequence puts a prefix before them, so that no two sequences meet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SHORT = 60
"""Milliseconds of a TTL that is waited for; any other is 0, or longer than a test."""


class Op:
    """One operation on one channel.

    Channels 0 and 1 are on one connection, channel 2 on another; each is opened when it is needed.

    Args:
        kind: an AMQP method, ``"queue.declare"``; or ``"close"``, ``"settle"``, ``"reply"``.
        channel: which channel.
        arguments: those of the method. ``basic.publish`` has ``properties`` and ``body`` beside its own; ``settle`` has
            ``verdict``, ``multiple``, and ``which``: the number of the delivery among those that are not settled, or
            ``tag``, a delivery tag as it is.
    """

    __slots__ = ("arguments", "channel", "kind")

    def __init__(self, kind: str, channel: int = 0, **arguments: Any) -> None:
        self.kind = kind
        self.channel = channel
        self.arguments: Mapping[str, Any] = arguments

    def __repr__(self) -> str:
        given = "".join(f", {name}={value!r}" for name, value in self.arguments.items())
        return f'Op("{self.kind}", {self.channel}{given})'


def listing(operations: Iterable[Op]) -> str:
    """The Python that makes *operations*."""
    return "[\n" + "".join(f"    {each!r},\n" for each in operations) + "]"


def has_short_times(operations: Iterable[Op]) -> bool:
    """Whether something is to expire while *operations* are played."""
    return any(_is_short(each.arguments) for each in operations)


def _is_short(value: object) -> bool:
    if isinstance(value, dict):
        return any(
            each in (SHORT, str(SHORT)) if name in {"x-message-ttl", "x-expires", "expiration"} else _is_short(each)
            for name, each in value.items()
        )
    return False
