"""What is done to a broker, as values: an operation's text is the Python that makes it again.

Names of queues and exchanges are short (``q0``, ``x1``; ``gen0`` is the first one that the broker named): whoever plays
a sequence puts a prefix before them, so that no two sequences meet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

SHORT = 60
"""Milliseconds of the longest TTL that is waited for; longer ones are longer than a test."""
_SHORT = {str(number) for number in range(1, SHORT + 1)}


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


def time_to_pass(operations: Iterable[Op]) -> float:
    """The seconds after which both brokers see the end of what is to expire while *operations* are played."""
    lives = {life for each in operations for life in _lives(each.arguments)}
    if lives & _SHORT:
        return (SHORT + 40) / 1000
    return 0.005 if "0" in lives else 0.0  # which is a millisecond for quorum queues


def _lives(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for name, each in cast("dict[str, object]", value).items():
            if name in {"x-message-ttl", "x-expires", "expiration"}:
                yield str(each)
            else:
                yield from _lives(each)
