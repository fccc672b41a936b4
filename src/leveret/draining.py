"""Stopping consumers without losing or repeating work.

What no handler has started on goes back to the queue; handlers that run get time to end, and settle and publish as
before; those that do not end in time are cancelled, and their messages go back too.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol

SETTLING = 0.2
"""Seconds between the last ack and closing.

A channel of RabbitMQ (observed on 4.0) passes 32 acks on to a quorum queue, and keeps others back until the queue has
applied some. Those that it still has when it is closed are lost, and their messages come again.
"""


@dataclasses.dataclass(frozen=True, slots=True)
class DrainReport:
    """What became of the work that was in hand when consumers were stopped.

    Attributes:
        drained: handlers that came to their end in time.
        requeued: messages that come again: no handler had started on them, or theirs was cancelled.
        abandoned: work that was cut off and does not come again by itself: a handler that went on although it was
            cancelled, or was cancelled after its message was settled; a message consumed with ``no_ack`` whose handler
            was not called, or was cancelled.
    """

    drained: int = 0
    requeued: int = 0
    abandoned: int = 0

    def __add__(self, other: DrainReport) -> DrainReport:
        return DrainReport(
            self.drained + other.drained, self.requeued + other.requeued, self.abandoned + other.abandoned
        )


class Drainable(Protocol):
    """What is asked of a consumer, by :func:`drain` and by its channel; nothing of it raises but CancelledError."""

    @property
    def report(self) -> DrainReport:
        """What became of its messages since it was stopped."""
        ...

    @property
    def waiting(self) -> int:
        """How many messages are here, and nobody has started on them."""
        ...

    @property
    def in_flight(self) -> int:
        """How many messages handlers have begun with, and not ended."""
        ...

    @property
    def complaint(self) -> str | None:
        """What is wrong with it, for ``connection.health()``."""
        ...

    @property
    def is_stopped(self) -> bool:
        """Whether it was stopped before, and there is nothing to wait for."""
        ...

    def begin_stop(self, deadline: float) -> None:
        """Start no handler any more, cancel the consumer until *deadline*, and give back what was not started on."""
        ...

    async def until_idle(self, deadline: float) -> None:
        """Wait for its handlers, but not for those that wait for the same."""
        ...

    def cut_short(self) -> None:
        """Cancel the handlers that still run."""
        ...

    async def until_stopped(self, deadline: float) -> None:
        """Wait until the broker has confirmed that it no longer consumes, and write the acks that were saved up."""
        ...

    def enter(self, task: asyncio.Task[Any]) -> None:
        """*task* waits for handlers: if it is one itself, nobody waits for it, nor cancels it."""
        ...

    def leave(self, task: asyncio.Task[Any]) -> None:
        """It no longer does."""
        ...


async def drain(consumers: Iterable[Drainable], seconds: float, grace: float) -> DrainReport:
    """Stop *consumers*.

    Args:
        consumers: all are stopped at once.
        seconds: that handlers get to end by themselves.
        grace: seconds on top of it, for handlers to end once they are cancelled, and for the broker to answer.

    Cancellation: they are stopped all the same; handlers go on.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    deadline = began + seconds
    stopping = list(consumers)
    task = asyncio.current_task()
    assert task is not None
    try:
        for each in stopping:
            each.enter(task)
            each.begin_stop(began + grace)
        for each in stopping:
            await each.until_idle(deadline)
        last = min(loop.time(), deadline) + grace
        for each in stopping:
            each.cut_short()
        for each in stopping:
            await each.until_idle(last)
        for each in stopping:
            await each.until_stopped(last)
        return sum((each.report for each in stopping), DrainReport())
    finally:
        for each in stopping:
            each.leave(task)


async def drain_for(
    consumers: Iterable[Drainable],
    close: Callable[[float], Awaitable[None]],
    seconds: float,
    timeout: float,
) -> DrainReport:
    """Stop *consumers*, and *close* what they are on within what is left of the *timeout*.

    Half of that is for handlers that are cancelled, and for the broker to answer; the other half at least is for
    closing.

    Cancellation: it is closed without waiting for anything.
    """
    loop = asyncio.get_running_loop()
    last = loop.time() + seconds + timeout
    left = 0.0
    stopping = [each for each in consumers if not each.is_stopped]
    try:
        report = await drain(stopping, seconds, timeout / 2)
        if stopping:
            await asyncio.sleep(max(0.0, min(SETTLING, last - loop.time())))
        left = min(timeout, last - loop.time())
    finally:
        await close(max(0.0, left))
    return report


def check_drain(seconds: float) -> None:
    """Raise ValueError for what is no time to wait."""
    if not seconds >= 0:
        raise ValueError(f"drain must be seconds, 0 or more (math.inf for no limit), not {seconds}")


async def wait_until(futures: Iterable[asyncio.Future[Any]], deadline: float) -> None:
    """Wait until all of *futures* are done, or until *deadline* in event loop time; nothing is cancelled."""
    pending = [future for future in futures if not future.done()]
    if pending:
        left = None if deadline == math.inf else max(0.0, deadline - asyncio.get_running_loop().time())
        await asyncio.wait(pending, timeout=left)
