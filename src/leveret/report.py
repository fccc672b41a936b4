"""What became of the messages of one ``publish_many()``.

Nearly all of them are confirmed, and of those nothing is kept but their number.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from leveret.exceptions import MessageReturned, PublishManyFailed
from leveret.message import Message


@dataclass(frozen=True, slots=True)
class PublishFailure:
    """A message that was not confirmed, or that came back, and why.

    Attributes:
        index: its place among the messages, from 0.
        message: the very object that was given.
        routing_key: what it was published with.
        error: what ``publish()`` would have raised: MessageReturned, MessageNacked, PublishNotSent or
            PublishOutcomeUnknown.
    """

    index: int
    message: Message
    routing_key: str
    error: Exception


@dataclass(frozen=True, slots=True, repr=False)
class PublishReport:
    """The outcome of :meth:`Exchange.publish_many() <leveret.Exchange.publish_many>`; true if all went well.

    Attributes:
        total: how many messages were taken from the iterable.
        confirmed: for how many of them the broker took responsibility, those that came back not included. Without
            publisher confirms nobody knows, and it is 0.
        failures: the others, in their order.
        stopped_by: why no more were taken, where the channel was closed before the iterable was exhausted; else None.
    """

    total: int = 0
    confirmed: int = 0
    failures: list[PublishFailure] = field(default_factory=list[PublishFailure])
    stopped_by: Exception | None = None

    def __bool__(self) -> bool:
        return not self.failures and self.stopped_by is None

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self}>"

    def __str__(self) -> str:
        text = f"{self.total} messages, {self.confirmed} confirmed, {len(self.failures)} failed"
        if self.failures:
            first = self.failures[0]
            text += f"; the first of them, at index {first.index}: {first.error!r}"
        if self.stopped_by is not None:
            text += f"; then the channel was closed: {self.stopped_by}"
        return text

    @property
    def returned(self) -> list[PublishFailure]:
        """Those of *failures* that came back because no queue is bound for them; ``error.message`` is what came."""
        return [failure for failure in self.failures if isinstance(failure.error, MessageReturned)]

    def error(self, index: int) -> Exception | None:
        """What the message at *index* failed with, None where nothing is wrong with it.

        Raises:
            IndexError: no such message was taken.
        """
        if not 0 <= index < self.total:
            raise IndexError(f"{self.total} messages were taken, so there is none at index {index}")
        place = bisect_left(self.failures, index, key=lambda failure: failure.index)
        found = self.failures[place : place + 1]
        return found[0].error if found and found[0].index == index else None

    def raise_for_failures(self) -> None:
        """Do nothing if all went well.

        Raises:
            PublishManyFailed: it did not; ``report`` is this, and the first error is its cause.
        """
        if not self:
            cause = self.failures[0].error if self.failures else self.stopped_by
            raise PublishManyFailed(str(self), self) from cause
