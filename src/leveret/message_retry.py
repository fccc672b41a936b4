"""What is to become of a message whose handler failed: tried again after a while, and at last put aside.

:class:`MessageRetry` says what the user wants. What does it is :mod:`leveret.retrier`, which is not imported before
somebody uses it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from leveret.log import get_logger
from leveret.wire.codec import encode_shortstr

if TYPE_CHECKING:
    from leveret.queue import Queue
    from leveret.retrier import Retrier
    from leveret.retry_ladder import Plan

_log = get_logger(__name__)

MAX_DELAY = 365 * 86_400
"""Seconds; RabbitMQ takes up to ten years."""

_DELAYS = (1.0, 5.0, 30.0, 120.0)


@dataclasses.dataclass(frozen=True, slots=True, init=False)
class MessageRetry:
    """Try a message again when its handler failed: so often, after such delays; then put it aside.

    Write it once, and give it to ``queue.consume(handler, retry=…)`` as often as you like.

    The message waits in a queue of its own for each delay, ``{queue}.retry.{milliseconds}``, and returns to the end
    of the queue that it came from, to no other. Where RabbitMQ can do it alone, it does: a quorum queue declared with
    ``x-delayed-retry-type`` on RabbitMQ 4.3 delays by its own figures, and one with no delays (``delays=0``) on 4.0
    and later takes the message back and counts.

    What is not tried again goes to a parking queue, which is declared if it does not exist, or to an exchange of
    yours, with headers that say why (``x-retry-error`` and others). If it cannot go there, it is held, then requeued;
    it is not lost.

    Args:
        attempts: how often the handler gets a message in all, the first time included. None: once more than there are
            delays, so 5 by default.
        delays: seconds from each failure to the next attempt; one number for equal ones. With more attempts the last
            one repeats. 0 is at once. None for 1, 5, 30 and 120, as many as *attempts* need. See :meth:`exponential`.
        retry_on: the exceptions after which another attempt may help.
        never: of these, the exceptions after which it does not: the message is put aside at once.
        park_in: the parking queue; None for ``{queue}.parked``.
        dead_letter_to: an exchange that gets what is not tried again, instead of a parking queue. It must exist, and
            route it.
        dead_letter_key: the routing key for that; None for the one that the message was first published with.

    Raises:
        ValueError: a number that makes no sense, more delays than attempts leave room for, both *park_in* and
            *dead_letter_to*, a key without an exchange, or a name that AMQP cannot carry.
        TypeError: *retry_on* or *never* are not exceptions.

    https://www.rabbitmq.com/docs/dlx
    """

    attempts: int
    delays: tuple[float, ...]
    retry_on: tuple[type[Exception], ...]
    never: tuple[type[Exception], ...]
    park_in: str | None
    dead_letter_to: str | None
    dead_letter_key: str | None

    def __init__(
        self,
        *,
        attempts: int | None = None,
        delays: Sequence[float] | float | None = None,
        retry_on: type[Exception] | tuple[type[Exception], ...] = Exception,
        never: type[Exception] | tuple[type[Exception], ...] = (),
        park_in: str | None = None,
        dead_letter_to: str | None = None,
        dead_letter_key: str | None = None,
    ) -> None:
        if attempts is not None and (isinstance(attempts, bool) or not isinstance(attempts, int) or attempts < 1):
            raise ValueError(f"attempts must be a whole number from 1, not {attempts!r}")
        if delays is None:
            delays = _DELAYS if attempts is None else _DELAYS[: attempts - 1]
        delays = (delays,) if isinstance(delays, int | float | str) else tuple(delays)
        for delay in delays:
            if not isinstance(delay, int | float):
                raise TypeError(f"a delay must be seconds, an int or float, not {delay!r}")
            if not 0 <= delay <= MAX_DELAY:
                raise ValueError(f"a delay must be from 0 to {MAX_DELAY} seconds (a year), not {delay!r}")
        if attempts is None:
            attempts = len(delays) + 1
        if attempts > 1 and not delays:
            raise ValueError(f"{attempts} attempts need a delay between them; delays=0 is at once")
        if len(delays) >= attempts:
            raise ValueError(
                f"{len(delays)} delays are more than the {attempts - 1} pauses between {attempts} attempts"
            )
        if park_in is not None and dead_letter_to is not None:
            raise ValueError("choose one of park_in (a queue) and dead_letter_to (an exchange)")
        if dead_letter_key is not None and dead_letter_to is None:
            raise ValueError("dead_letter_key is for the exchange of dead_letter_to")
        for what, name in (("park_in", park_in), ("dead_letter_to", dead_letter_to)):
            if name == "":
                raise ValueError(f"{what} must not be empty")
        for what, name in (
            ("park_in", park_in),
            ("dead_letter_to", dead_letter_to),
            ("dead_letter_key", dead_letter_key),
        ):
            if name is not None:
                encode_shortstr(name, what)
        fields = {
            "attempts": attempts,
            "delays": delays,
            "retry_on": _exceptions("retry_on", retry_on),
            "never": _exceptions("never", never),
            "park_in": park_in,
            "dead_letter_to": dead_letter_to,
            "dead_letter_key": dead_letter_key,
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @staticmethod
    def exponential(
        attempts: int, *, first: float = 1.0, factor: float = 2.0, maximum: float = 3600.0
    ) -> tuple[float, ...]:
        """The delays between so many attempts, each *factor* times the one before: for ``delays``.

        Args:
            attempts: how often a message is handled in all.
            first: the first delay, in seconds.
            factor: at least 1.
            maximum: no delay is longer, in seconds.

        Raises:
            ValueError: a number that makes no sense.
        """
        if attempts < 1 or not 0 < first <= maximum <= MAX_DELAY or not 1 <= factor < math.inf:
            raise ValueError(
                "expected attempts >= 1, factor >= 1 and 0 < first <= maximum <= a year, not "
                f"{attempts}, {factor}, {first} and {maximum}"
            )
        delays, delay = list[float](), first
        for _ in range(attempts - 1):
            delays.append(delay)
            delay = min(delay * factor, maximum)
        return tuple(delays)

    def retries(self, error: BaseException) -> bool:
        """Whether a message is tried again after *error*."""
        # A CancelledError that gets here is of something that the handler waited for: it says nothing of the message.
        return isinstance(error, (*self.retry_on, asyncio.CancelledError)) and not isinstance(error, self.never)

    async def prepare(self, queue: Queue) -> Retrier:
        """Declare what it takes for *queue*, and give what settles its failed messages.

        It may be called any number of times, by any number of consumers and processes: what exists already is used. A
        parking queue may have any arguments; a rung must have its own. Where this user may not declare queues, they
        have to exist.

        What *queue* is, its arguments tell, with which it was declared through this very object: it decides between
        the queue's own means and rungs. From ``get_queue()`` they are not known: rungs are used then, which suit
        every type.

        Raises:
            ValueError: *queue* has no name yet, is a stream, or would be its own parking queue; or it is exclusive or
                auto-delete, and neither *park_in* nor *dead_letter_to* is given.
            ChannelPreconditionFailed: a rung exists with other arguments.
            ChannelNotFoundEntity: the exchange of *dead_letter_to* does not exist.
            ChannelAccessRefused: a queue is missing, and this user may not declare it.
            ChannelInvalidStateError, ConnectionClosed, TimeoutError: as all calls.

        Cancellation: leaves behind what was declared so far, which does no harm.

        Reconnect: on a connection of :func:`~leveret.connect_robust` it is all declared again.
        """
        from leveret.retrier import Retrier

        retrier = Retrier(self, queue)
        await retrier.declare()
        _log.debug("%r is ready", retrier)
        return retrier

    def plan(self, queue: Queue, version: tuple[int, ...]) -> Plan:
        """How this is done for *queue* on a broker of that version.

        Raises:
            ValueError: as :meth:`prepare`.
        """
        from leveret.retry_ladder import Plan, QueueFacts, choose_backend, derived_name

        facts = QueueFacts(
            name=queue.name,
            known=not queue.passive,
            durable=queue.durable,
            exclusive=queue.exclusive,
            auto_delete=queue.auto_delete,
            arguments=dict(queue.arguments or {}),
        )
        if not facts.name:
            raise ValueError("the queue has no name yet: declare it first")
        if facts.type == "stream":
            raise ValueError("a stream takes no message back, and keeps those that failed: there is nothing to retry")
        park_in = self.park_in
        if park_in is None and self.dead_letter_to is None:
            if facts.exclusive or facts.auto_delete:
                raise ValueError(
                    f"queue {facts.name!r} is temporary, and its failed messages would not be found again: "
                    "say where they go with park_in or dead_letter_to"
                )
            park_in = derived_name(facts.name, ".parked")
        delays_ms = tuple(_milliseconds(delay) for delay in self.delays)
        plan = Plan(
            queue=facts,
            attempts=self.attempts,
            delays_ms=delays_ms,
            backend=choose_backend(facts, self.attempts, delays_ms, version),
            park_in=park_in,
        )
        if park_in in (facts.name, *(plan.key_of(delay) for delay in delays_ms)):
            raise ValueError(
                f"park_in={park_in!r} is the queue itself, or one of its rungs: messages would go round for ever"
            )
        return plan


def _exceptions(name: str, given: type[Exception] | tuple[type[Exception], ...]) -> tuple[type[Exception], ...]:
    classes = given if isinstance(given, tuple) else (given,)
    for each in classes:
        if not (isinstance(each, type) and issubclass(each, Exception)):
            raise TypeError(f"{name} must be an exception class or a tuple of them, not {each!r}")
    return classes


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000)) if seconds else 0
