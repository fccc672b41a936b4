"""One publish on its way: waiting to be written, or for its confirm.

The same object moves from holder to holder (a publisher, the waiting room of a channel that is down, the next
publisher), so whoever awaits it and its deadline never notice.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any, Protocol

from leveret.exceptions import (
    PublishNotSent,
    PublishNotSentInTime,
    PublishOutcomeUnknown,
    PublishUnconfirmedInTime,
)
from leveret.outcome import Outcome, fail


class PublishHolder(Protocol):
    """Who has a publish at the moment, and knows what it means that its time is up."""

    def timeout_error(self, publish: Publish, /) -> Exception:
        """What *publish* fails with now."""
        ...


class Publish(Outcome[Any]):
    """A publish that waits for its confirm, or to be written.

    Attributes:
        timeout: seconds that it was given.
        deadline: when they are up, in event loop time.
        timer: of its own; None where its holder looks after the deadline.
        holder: who has it now.
        retry_unknown: whether to send it again when the link died before its confirm.
        was_written: on a link that died.
    """

    __slots__ = (
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
        exchange: str,
        routing_key: str,
        properties: bytes,
        body: bytes,
        mandatory: bool,
        timeout: float,
        retry_unknown: bool,
    ) -> None:
        super().__init__(loop=loop)
        self.holder = holder
        self.exchange = exchange
        self.routing_key = routing_key
        self.properties = properties
        self.body = body
        self.mandatory = mandatory
        self.timeout = timeout
        self.deadline = loop.time() + timeout
        self.retry_unknown = retry_unknown
        self.was_written = False
        self.returned: Any = None
        self.timer: asyncio.TimerHandle | None = None

    def __str__(self) -> str:
        return f"exchange {self.exchange!r}, routing key {self.routing_key!r}"

    def limit_time(self) -> None:
        """Give it a timer of its own, unless it has one, or time without limit."""
        if self.timer is None and self.deadline != math.inf:
            self.timer = self.get_loop().call_at(self.deadline, self._time_out)
            self.add_done_callback(_stop_timer)

    def unsent(self, text: str, *, in_time: bool = False) -> Exception:
        """What it fails with when its holder has not written it.

        Args:
            text: why.
            in_time: whether its time was up.
        """
        if self.was_written:
            return (PublishUnconfirmedInTime if in_time else PublishOutcomeUnknown)(f"written once, but {text}")
        return (PublishNotSentInTime if in_time else PublishNotSent)(text)

    def _time_out(self) -> None:
        fail(self, self.holder.timeout_error(self))


def _stop_timer(publish: asyncio.Future[Any]) -> None:
    if isinstance(publish, Publish) and publish.timer is not None:
        publish.timer.cancel()
