"""Settling messages whose handler failed, as :class:`~leveret.MessageRetry` has it.

:meth:`MessageRetry.prepare() <leveret.MessageRetry.prepare>` declares what that takes and gives a :class:`Retrier`,
whose :meth:`~Retrier.on_failure` settles one failed message. What is decided, and by way of which queues it is done,
is in :mod:`leveret.retry_ladder`.

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
import weakref
from collections.abc import Callable, Iterator
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
from leveret.failures import is_being_cancelled
from leveret.log import get_logger, printable
from leveret.message import IncomingMessage, Message, ReturnedMessage
from leveret.retry_ladder import (
    Backend,
    GiveBack,
    Park,
    Plan,
    QueueToDeclare,
    Wait,
    copy_to_park,
    copy_to_retry,
    origin,
    version_of,
)

if TYPE_CHECKING:
    from leveret.channel import Channel
    from leveret.connection import Connection
    from leveret.message_retry import MessageRetry
    from leveret.queue import Queue

_log = get_logger(__name__)

PAUSES = (0.0, 0.1, 0.5, 2.0, 5.0, 10.0)
"""Seconds after each failed attempt to publish a copy, while the message is held; then it is requeued, if it can be."""

_REFRESH_AFTER = 600.0
"""Seconds after which rungs of an auto-delete queue are declared again before they are used."""


class Retrier:
    """Settles messages of one queue whose handler failed. Get one from :meth:`MessageRetry.prepare`."""

    def __init__(self, retry: MessageRetry, queue: Queue) -> None:
        self._retry = retry
        self._queue = queue
        self._connection: Connection = queue.channel.connection
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


def _is_cancellation(error: BaseException) -> bool:
    """Whether the handler was stopped, rather than failed."""
    if isinstance(error, asyncio.CancelledError):
        return is_being_cancelled()
    return not isinstance(error, Exception)  # KeyboardInterrupt, SystemExit


def _described(message: IncomingMessage, queue: str) -> str:
    return printable(
        f"delivery {message.delivery_tag} of queue {queue!r} (message_id {message.message_id!r},"
        f" routing key {message.routing_key!r})"
    )
