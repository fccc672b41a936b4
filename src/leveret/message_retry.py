"""What becomes of a message whose handler failed: it is tried again after a while, and at last put aside.

:class:`MessageRetry` says what the user wants; :meth:`MessageRetry.prepare` declares what that takes and gives a
:class:`Retrier`, whose :meth:`~Retrier.on_failure` settles one failed message. What is decided, and by way of which
queues it is done, is in :mod:`leveret.retry_ladder`.

A message is never acknowledged before the broker has confirmed its copy, so nothing is lost. If the link dies between
the two, there are two of it: the copy, and the original that the broker delivers again.

Copies go out, and queues are declared, on a channel of this module's own, one for each connection: what the broker
refuses there closes no channel of the user's, and publisher confirms are always on. Declarations are tried on a
channel that is thrown away first, so that not even that one is closed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from leveret.exceptions import (
    AMQPError,
    ChannelAccessRefused,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    DeliveryLost,
    MessageNacked,
    MessageProcessError,
    MessageReturned,
    PublishOutcomeUnknown,
)
from leveret.log import get_logger, printable
from leveret.message import IncomingMessage, Message, ReturnedMessage
from leveret.retry_ladder import (
    MAX_NAME,
    Backend,
    GiveBack,
    Park,
    Plan,
    QueueFacts,
    QueueToDeclare,
    Wait,
    choose_backend,
    copy_to_park,
    copy_to_retry,
    derived_name,
    origin,
    version_of,
)

if TYPE_CHECKING:
    from leveret.channel import Channel
    from leveret.connection import Connection
    from leveret.queue import Queue

_log = get_logger(__name__)

MAX_DELAY = 365 * 86_400
"""Seconds; RabbitMQ takes up to ten years."""

PAUSES = (0.0, 0.1, 0.5, 2.0, 5.0, 10.0)
"""Seconds after each failed attempt to publish a copy, while the message is held; then it is requeued, if it can be."""

_DELAYS = (1.0, 5.0, 30.0, 120.0)
_REFRESH_AFTER = 600.0
"""Seconds after which rungs of an auto-delete queue are declared again before they are used."""


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
        delays = (delays,) if isinstance(delays, int | float) else tuple(delays)
        for delay in delays:
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
            if name is not None and len(name.encode("utf-8", "surrogateescape")) > MAX_NAME:
                raise ValueError(f"{what} has more than {MAX_NAME} bytes")
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
        retrier = Retrier(self, queue)
        await retrier.declare()
        _log.debug("%r is ready", retrier)
        return retrier

    def plan(self, queue: Queue, version: tuple[int, ...]) -> Plan:
        """How this is done for *queue* on a broker of that version.

        Raises:
            ValueError: as :meth:`prepare`.
        """
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


class Retrier:
    """Settles messages of one queue whose handler failed. Get one from :meth:`MessageRetry.prepare`."""

    def __init__(self, retry: MessageRetry, queue: Queue) -> None:
        self._retry = retry
        self._queue = queue
        self._connection: Connection = queue.channel._connection  # pyright: ignore[reportPrivateUsage]
        self._outlet = _outlet_of(self._connection)
        self._plan = self._new_plan()
        self._is_declared = False
        self._declared_at = 0.0

    def __repr__(self) -> str:
        return f"<Retrier of queue {self._plan.queue.name!r}: {self._plan.backend.value}, {self._retry!r}>"

    @property
    def backend(self) -> Backend:
        """Who counts the attempts, and who makes a message wait."""
        return self._plan.backend

    def _new_plan(self) -> Plan:
        return self._retry.plan(self._queue, version_of(self._connection.server_properties))

    # --------------------------------------------------------------------------------------------- declaring

    async def declare(self) -> None:
        """Declare rungs and the parking queue, or check that the exchange exists.

        Raises:
            ChannelClosed and others: as :meth:`MessageRetry.prepare`.
        """
        plan = self._new_plan()  # the queue may have another name, or the broker another version
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with self._outlet.lock:
            for spec in plan.queues:
                await self._declare(spec)
            if self._retry.dead_letter_to is not None:
                async with self._connection.channel() as probe:
                    await probe.get_exchange(self._retry.dead_letter_to)
        self._plan, self._is_declared, self._declared_at = plan, True, began

    async def _declare(self, spec: QueueToDeclare) -> None:
        try:
            await self._try(spec)
        except ChannelPreconditionFailed:  # it exists with other arguments
            if not spec.any_arguments:
                raise
            return
        except ChannelAccessRefused as refused:
            try:
                await self._try(spec, passive=True)  # if it is there, somebody else has made it
            except ChannelNotFoundEntity:
                raise refused from None
            return
        if not spec.exclusive:
            channel = await self._outlet.channel(self._connection)
            await channel.declare_queue(spec.name, durable=spec.durable, arguments=spec.arguments)

    async def _try(self, spec: QueueToDeclare, *, passive: bool = False) -> None:
        async with self._connection.channel() as probe:
            await probe.declare_queue(
                spec.name,
                durable=spec.durable,
                exclusive=spec.exclusive,
                passive=passive,
                arguments=spec.arguments,
                robust=False,
            )

    async def _refresh(self) -> None:
        """Declare again if something may be missing, or what is temporary is about to go."""
        is_old = asyncio.get_running_loop().time() - self._declared_at > _REFRESH_AFTER
        if is_old and any(spec.is_temporary for spec in self._plan.queues):
            self._is_declared = False
        if not self._is_declared:
            await self.declare()

    # ---------------------------------------------------------------------------------------------- settling

    async def on_failure(self, message: IncomingMessage, error: BaseException) -> None:
        """Settle *message*, whose handler ended in *error*: try it again later, or put it aside.

        Its copy is published and confirmed, and then it is acknowledged. If the copy is refused, comes back, or ends
        in the unknown, the message is held and the copy sent again after growing pauses, then the message is
        requeued; but not while that could make a quorum queue reach its delivery limit and drop it. Errors of the
        broker's are logged, not raised.

        It does nothing but log if the message was settled before, or its channel is gone: then the broker delivers it
        again. If the handler was cancelled, the message goes back to its queue, and is not counted as failed.

        Args:
            message: as it was delivered.
            error: what the handler raised.

        Cancellation: the message goes back to its queue. Its copy may have been published.

        Reconnect: the message comes again. If the link died after its copy was written, the copy may be there too.

        It never raises, but for cancellation.
        """
        what = _described(message, self._queue.name)
        if message.processed:
            _log.warning(
                "%s is not tried again: it had been settled when its handler failed (with retry=, leave that to it,"
                " and do without process()): %r",
                what,
                error,
                exc_info=error,
            )
            return
        if not message.is_live:
            _log.info("%s failed (%r), but its channel is gone: the broker delivers it again", what, error)
            return
        try:
            if _is_cancellation(error):
                await message.give_back()
            else:
                await self._settle(message, error, what)
        except DeliveryLost as exc:
            _log.warning("%s: %s", what, exc)
        except MessageProcessError as exc:
            _log.warning("%s was settled by somebody else meanwhile: %s", what, exc)
        except asyncio.CancelledError:
            if message.is_live and not message.processed:
                await message.give_back()
            raise

    async def _settle(self, message: IncomingMessage, error: BaseException, what: str) -> None:
        if self._plan.queue.name != self._queue.name:  # the broker has named it anew
            self._plan, self._is_declared = self._new_plan(), False
        plan = self._plan
        readable = message.headers_error is None
        failures = (plan.failures(message.headers) if readable else 0) + 1
        verdict = plan.decide(failures, retryable=self._retry.retries(error), readable=readable)
        if isinstance(verdict, Wait):
            fate = f"tried again in {verdict.delay_ms / 1000:g} s"
        elif isinstance(verdict, GiveBack):
            fate = "tried again"
        else:
            fate = f"put aside ({verdict.reason})"
        is_last = isinstance(verdict, Park)
        _log.log(
            logging.WARNING if is_last else logging.INFO,
            "%s failed, attempt %d of %d, %s: %r",
            what,
            failures,
            plan.attempts,
            fate,
            error,
            exc_info=error if is_last else None,
        )
        if isinstance(verdict, GiveBack):
            await message.reject(requeue=True)
        else:
            await self._move(message, self._copies(message, verdict, failures, error), what)

    def _copies(
        self, message: IncomingMessage, verdict: Wait | Park, failures: int, error: BaseException
    ) -> Iterator[_Copy]:
        """What to publish in place of *message*: the next one if the broker will not have what is in the one before."""
        queue, retry = self._plan.queue.name, self._retry
        if isinstance(verdict, Wait):
            yield _Copy("", self._plan.key_of(verdict.delay_ms), lambda: copy_to_retry(message, queue, failures))
            verdict = Park("cannot be published again")
        reason = verdict.reason
        exchange, key = retry.dead_letter_to, retry.dead_letter_key
        if exchange is None:
            exchange, key = "", self._plan.park_in
        elif key is None:
            key = origin(message, queue)[1]
        yield _Copy(exchange, key or "", lambda: copy_to_park(message, queue, failures, reason, error))
        yield _Copy(exchange, key or "", lambda: copy_to_park(message, queue, failures, reason, error, bare=True))

    async def _move(self, message: IncomingMessage, copies: Iterator[_Copy], what: str) -> None:
        """Publish the first of *copies* that can be published, and acknowledge *message*."""
        copy, tries = next(copies), 0
        while True:
            try:
                problem = await self._publish(copy)
            except _Unfit as exc:
                problem = exc.__cause__ or exc
                if (after := next(copies, None)) is not None:
                    _log.warning("%s: its copy cannot be published (%r), another one is tried", what, problem)
                    copy = after
                    continue
            if problem is None:
                await message.ack()
                return
            if not message.is_live:
                _log.info("%s: its channel is gone (%r), the broker delivers it again", what, problem)
                return
            if not isinstance(problem, MessageNacked):  # that one comes from a queue that is there
                self._is_declared = False
            if tries >= len(PAUSES) and self._plan.may_requeue(message.headers, readable=message.headers_error is None):
                _log.error("%s is requeued: its copy cannot be published: %r", what, problem)
                await message.give_back()
                return
            _log.warning("%s is held: its copy cannot be published: %r", what, problem)
            await asyncio.sleep(PAUSES[min(tries, len(PAUSES) - 1)])
            tries += 1

    async def _publish(self, copy: _Copy) -> BaseException | None:
        """Publish *copy*: None once it is confirmed, else what was in the way.

        Raises:
            _Unfit: it is not to be published as it is.
        """
        try:
            await self._refresh()
            channel = await self._outlet.channel(self._connection)
            problem = await _confirmed(channel, copy)
            if not _is_precondition(problem):
                return problem
            # The broker closed the channel over some copy, not necessarily this one: alone it will show.
            async with self._connection.channel() as probe:
                problem = await _confirmed(probe, copy)
        except (AMQPError, OSError) as exc:  # a TimeoutError is an OSError
            return exc
        if problem is not None and _is_precondition(problem):
            raise _Unfit from problem
        return problem


async def _confirmed(channel: Channel, copy: _Copy) -> BaseException | None:
    """Publish *copy* on *channel*: None once it is confirmed, else what was in the way."""
    exchange = await channel.get_exchange(copy.exchange, ensure=False)
    try:
        # Not waiting for a link that is down: the message that this is a copy of is gone then, and comes again.
        outcome = await exchange.publish(copy.make(), copy.routing_key, wait_for_link=False)
    except (ValueError, TypeError) as exc:
        raise _Unfit from exc
    except (AMQPError, OSError) as exc:
        return exc
    return MessageReturned(outcome) if isinstance(outcome, ReturnedMessage) else None


def _is_precondition(problem: BaseException | None) -> bool:
    return isinstance(problem, PublishOutcomeUnknown) and isinstance(problem.__cause__, ChannelPreconditionFailed)


class _Unfit(Exception):
    """The broker, or AMQP, does not take the copy for what is in it; the cause says what."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Copy:
    exchange: str
    routing_key: str
    make: Callable[[], Message]


class _Outlet:
    """The channel of one connection that copies go out on.

    The connection keeps the channel; this only knows it, so as not to keep the connection.
    """

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self._opening = asyncio.Lock()
        self._channel: Callable[[], Channel | None] = _nothing

    async def channel(self, connection: Connection) -> Channel:
        """The channel, opened where there is none or it was closed.

        Raises:
            ChannelInvalidStateError, ChannelLimitReached, ConnectionClosed, TimeoutError: it cannot be opened.
        """
        async with self._opening:
            channel = self._channel()
            if channel is None or channel.is_closed:
                channel = await connection.channel()
                self._channel = weakref.ref(channel)
            return channel


def _nothing() -> None:
    return None


_outlets: weakref.WeakKeyDictionary[Connection, _Outlet] = weakref.WeakKeyDictionary()


def _outlet_of(connection: Connection) -> _Outlet:
    return _outlets.setdefault(connection, _Outlet())


def _exceptions(name: str, given: type[Exception] | tuple[type[Exception], ...]) -> tuple[type[Exception], ...]:
    classes = given if isinstance(given, tuple) else (given,)
    for each in classes:
        if not (isinstance(each, type) and issubclass(each, Exception)):
            raise TypeError(f"{name} must be an exception class or a tuple of them, not {each!r}")
    return classes


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000)) if seconds else 0


def _is_cancellation(error: BaseException) -> bool:
    """Whether the handler was stopped, rather than failed."""
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is None or task.cancelling() > 0  # else it is of something that the handler waited for
    return not isinstance(error, Exception)  # KeyboardInterrupt, SystemExit


def _described(message: IncomingMessage, queue: str) -> str:
    return printable(
        f"delivery {message.delivery_tag} of queue {queue!r} (message_id {message.message_id!r},"
        f" routing key {message.routing_key!r})"
    )
