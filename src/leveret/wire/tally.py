"""What one connection has done, in numbers, over all its links.

The numbers are plain attributes. Whoever sees something happen adds to them in passing, with no call, so they are kept
whether anybody asks for them or not; :mod:`leveret.metrics` reads them. What an object counts anyway (the number of the
last publish, what is unsettled) is not counted again: publishers are known here while they live, and leave their
count behind.

What has to be *measured* costs a call for each event. So the two hooks for that are None unless somebody measures.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol


class CountedPublisher(Protocol):
    """A publisher that is open."""

    @property
    def published(self) -> int:
        """How many messages it wrote."""
        ...

    @property
    def unconfirmed(self) -> int:
        """How many of them are neither confirmed nor refused."""
        ...


class Tally:
    """The numbers of one connection.

    Attributes:
        confirmed: publishes that the broker took responsibility for, without those that came back.
        nacked: publishes that it refused.
        returned: publishes that came back, because no queue is bound for them.
        unknown: publishes that were written, and whose channel was lost before the broker's answer.
        resent: those of them that were sent again, which are not counted as unknown.
        delivered: messages that came, those that were fetched included.
        acked: deliveries that were acknowledged.
        requeued: deliveries that were given back to their queue.
        rejected: deliveries that were refused for good: dropped, or dead-lettered.
        reconnects: how often the connection came back.
        publishers: those that are open.
        on_confirmed: called with the seconds from each publish to its answer; None where nobody measures.
        measured: makes of a consumer's callback one that is measured; None where nobody measures.
    """

    __slots__ = (
        "_blocked_for",
        "_blocked_since",
        "_published",
        "acked",
        "confirmed",
        "delivered",
        "measured",
        "nacked",
        "on_confirmed",
        "publishers",
        "reconnects",
        "rejected",
        "requeued",
        "resent",
        "returned",
        "unknown",
    )

    def __init__(self) -> None:
        self.confirmed = self.nacked = self.returned = self.unknown = self.resent = 0
        self.delivered = self.acked = self.requeued = self.rejected = 0
        self.reconnects = 0
        self.publishers: set[CountedPublisher] = set()
        self.on_confirmed: Callable[[float], object] | None = None
        self.measured: Callable[[Callable[[Any], object]], Callable[[Any], Awaitable[object]]] | None = None
        self._published = 0
        self._blocked_for = 0.0
        self._blocked_since: float | None = None

    @property
    def published(self) -> int:
        """How many messages were written; those that were sent again count again."""
        return self._published + sum(publisher.published for publisher in self.publishers)

    @property
    def unconfirmed(self) -> int:
        """How many publishes wait for the broker's answer."""
        return sum(publisher.unconfirmed for publisher in self.publishers)

    def on_publisher_ended(self, publisher: CountedPublisher) -> None:
        """*publisher* writes nothing more."""
        self.publishers.discard(publisher)
        self._published += publisher.published

    def on_blocked(self, now: float) -> None:
        """The broker blocks publishers, at *now* in event loop time."""
        if self._blocked_since is None:
            self._blocked_since = now

    def on_unblocked(self, now: float) -> None:
        """It does not any more, or the link is gone."""
        self._blocked_for = self.blocked_seconds(now)
        self._blocked_since = None

    def blocked_seconds(self, now: float) -> float:
        """For how long the broker blocked publishers, in all."""
        return self._blocked_for + (0.0 if self._blocked_since is None else now - self._blocked_since)
