"""One publish on its way: waiting to be written, or for its confirm.

The same object moves from holder to holder (a publisher, the waiting room of a channel that is down, the next
publisher), so whoever awaits it and its deadline never notice.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

from leveret.exceptions import (
    PublishNotSent,
    PublishNotSentInTime,
    PublishOutcomeUnknown,
    PublishUnconfirmedInTime,
)
from leveret.outcome import Outcome
from leveret.prompt import Wakeups

_LEFT_TO_SUBCLASSES: tuple[str, ...] = ()
"""A base with slots of its own could not be combined with a future."""


class PublishHolder(Protocol):
    """Who has a publish at the moment, and knows what it means that its time is up."""

    def timeout_error(self, publish: Publish, /) -> Exception:
        """What *publish* fails with now."""
        ...


class PublishSender(Protocol):
    """Who takes publishes."""

    def send(self, publish: Publish, /) -> None:
        """Send *publish*, now or later.

        Raises:
            ChannelInvalidStateError: the channel is closed.
            ValueError: exchange or routing key over 255 bytes.
            MessageTooLarge: the headers do not fit into one frame.
        """
        ...


class Publish:
    """A publish that waits for its confirm, or to be written.

    It has the methods of a future by which others end it and ask for its end. Who makes it says what they do.

    Attributes:
        timeout: seconds that it was given.
        began: when it was made, in event loop time.
        deadline: when they are up, in event loop time.
        has_timer: whether somebody else than its holder looks after the deadline.
        is_bounded: whether whoever made it bounds how many of them there are.
        holder: who has it now.
        retry_unknown: whether to send it again when the link died before its confirm.
        returned: what came back of it.
        was_written: on a link that died.
    """

    __slots__ = _LEFT_TO_SUBCLASSES

    is_bounded: ClassVar[bool] = False

    exchange: str
    routing_key: str
    properties: bytes
    body: bytes
    mandatory: bool
    timeout: float
    began: float
    deadline: float
    holder: PublishHolder
    retry_unknown: bool
    returned: Any
    was_written: bool

    def __str__(self) -> str:
        return f"exchange {self.exchange!r}, routing key {self.routing_key!r}"

    def done(self) -> bool:
        """Whether it has ended."""
        raise NotImplementedError

    def cancelled(self) -> bool:
        """Whether it has ended because nobody wants to know any more."""
        raise NotImplementedError

    def set_result(self, result: Any, /) -> None:
        """It has ended well: confirmed, returned, or written where there are no confirms."""
        raise NotImplementedError

    def fail(self, error: Exception) -> None:
        """It has ended with *error*, unless it has ended already."""
        raise NotImplementedError

    def on_end(self, callback: Callable[[Publish], object]) -> None:
        """Call *callback* with it the moment that it has ended; it is not to raise."""
        raise NotImplementedError

    @property
    def has_timer(self) -> bool:
        """Whether somebody else than its holder looks after the deadline."""
        raise NotImplementedError

    def limit_time(self) -> None:
        """Have somebody look after the deadline who is not its holder."""
        raise NotImplementedError

    def unsent(self, text: str, *, in_time: bool = False) -> Exception:
        """What it fails with when its holder has not written it.

        Args:
            text: why.
            in_time: whether its time was up.
        """
        if self.was_written:
            return (PublishUnconfirmedInTime if in_time else PublishOutcomeUnknown)(f"written once, but {text}")
        return (PublishNotSentInTime if in_time else PublishNotSent)(text)


class AwaitedPublish(Outcome[Any], Publish):
    """One that its publisher may await.

    Attributes:
        timer: of its own; None where its holder looks after the deadline.
    """

    __slots__ = (
        "began",
        "body",
        "deadline",
        "exchange",
        "holder",
        "mandatory",
        "properties",
        "retry_unknown",
        "returned",
        "routing_key",
        "timeout",
        "timer",
        "was_written",
    )

    def __init__(
        self,
        holder: PublishHolder,
        loop: asyncio.AbstractEventLoop,
        wakeups: Wakeups | None,
        exchange: str,
        routing_key: str,
        properties: bytes,
        body: bytes,
        mandatory: bool,
        timeout: float,
        retry_unknown: bool,
    ) -> None:
        super().__init__(wakeups, loop=loop)
        self.holder = holder
        self.exchange = exchange
        self.routing_key = routing_key
        self.properties = properties
        self.body = body
        self.mandatory = mandatory
        self.timeout = timeout
        self.began = began = loop.time()
        self.deadline = began + timeout
        self.retry_unknown = retry_unknown
        self.was_written = False
        self.returned: Any = None
        self.timer: asyncio.TimerHandle | None = None

    def describe(self) -> str:
        """What it is the outcome of, for the log."""
        return f"a publish ({self})"

    def fail(self, error: Exception) -> None:
        """It has ended with *error*, unless it has ended already."""
        if not self.done():
            self.set_exception(error)

    @property
    def has_timer(self) -> bool:
        """Whether it has a timer of its own."""
        return self.timer is not None

    def limit_time(self) -> None:
        """Give it a timer of its own, unless it has one, or time without limit."""
        if self.timer is None and self.deadline != math.inf:
            self.timer = self.get_loop().call_at(self.deadline, self._time_out)
            self.on_end(_stop_timer)

    def _time_out(self) -> None:
        self.fail(self.holder.timeout_error(self))


def _stop_timer(publish: Publish) -> None:
    if isinstance(publish, AwaitedPublish) and publish.timer is not None:
        publish.timer.cancel()
