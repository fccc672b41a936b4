"""What happens to deliveries: callbacks.

They run in order of arrival, without a task of their own as long as they do not wait. The connection's *hand*
(:mod:`leveret.wire.hand`) starts them one after another in its task; when one suspends, that becomes the callback's
task to its end (so ``current_task()``, ``timeout()`` and cancellation mean what they should), and another task takes
over the rest, unless as many callbacks run as may. Every callback has a copy of the context that ``consume()`` was
called in, so context variables do not leak from one into another.

What the broker delivered on a channel that is gone, and no handler has started on, is dropped: it comes again. What
needs no acknowledgement (``no_ack``) is handed out all the same: it does not.

On a channel that recovers, the same consumer is attached to one wire after the other.

**Stopping** (:mod:`leveret.draining`). The hand takes messages from the queue that there was when it began with them.
So whoever wants it to start nothing more gives the consumer a new queue with what waits, and leaves the hand the empty
one: callbacks cost nothing for being stoppable.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import types
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Generator
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from leveret.checks import check_count
from leveret.draining import DrainReport, wait_until
from leveret.exceptions import ChannelInvalidStateError, Closed, ConsumerCancelled, DeliveryLost
from leveret.failures import FailureHandler, Failures, is_being_cancelled
from leveret.handlers import Handlers
from leveret.log import get_logger
from leveret.message import IncomingMessage, Wire, incoming_message
from leveret.prompt import will_be_cancelled
from leveret.settling import BatchingWire, Verdict, settle

if TYPE_CHECKING:
    from leveret.wire.channel import WireChannel, WireConsumer
    from leveret.wire.hand import Rest

_log = get_logger(__name__)

ConsumerCallback = Callable[[IncomingMessage], Awaitable[object] | Verdict | None]

OnCancelled: TypeAlias = Literal["resubscribe", "stop", "raise"]
"""What to do when the broker cancels a consumer."""

_MESSAGE = 256
_TASK = 2560
"""Bytes that a message takes beside its contents, and that a callback which waits takes with its task (measured on
CPython 3.11). Those that have not begun count as much: they begin whether anything is read or not."""

MAX_PREFETCH = 65_535

Attach: TypeAlias = "Callable[[WireChannel, str], WireConsumer]"
"""Makes the consumer for a wire, with the tag that it has there."""

_NO_LIMIT = 1 << 62


class CallbackConsumer:
    """Runs *callback* for each delivery.

    Args:
        callback: a coroutine function; a plain function, or one that returns any awaitable, will do.
        no_ack: whether deliveries need no acknowledgement.
        tasks: keeps the running tasks; whoever owns it ends them.
        on_cancelled: called when the broker cancels the consumer.
        context: each callback runs in a copy of it.
        unsubscribe: cancels the consumer, within so many seconds.
        describe: tells what the log calls it.
        prefetch: how many unacknowledged messages the broker sends; 0 for no limit.
        concurrency: how many callbacks may run at a time; None for no limit.
        on_failure: what sees to a message whose callback failed; None to leave it.
        logs_failures: whether failures are logged before that is called.
        via: gives what settles as the messages see it; None for the wire's own.

    Attributes:
        delivered: how many messages came.
        failures: the callbacks that failed.
    """

    __slots__ = (
        "__weakref__",
        "_callback",
        "_context",
        "_describe",
        "_given_back",
        "_hand",
        "_handlers",
        "_has_warned",
        "_limit",
        "_message_wire",
        "_on_cancelled",
        "_queue",
        "_stopping",
        "_tag",
        "_task_name",
        "_unsubscribe",
        "_via",
        "_wire",
        "delivered",
        "failures",
        "no_ack",
    )

    def __init__(
        self,
        callback: Callable[[IncomingMessage], object],
        no_ack: bool,
        tasks: set[asyncio.Task[None]],
        on_cancelled: Callable[[ConsumerCancelled], object],
        context: contextvars.Context,
        unsubscribe: Callable[[float], Awaitable[object]],
        describe: Callable[[], str],
        *,
        prefetch: int = 0,
        concurrency: int | None = None,
        on_failure: FailureHandler | None = None,
        logs_failures: bool = True,
        via: Callable[[BatchingWire], Wire] | None = None,
    ) -> None:
        self.no_ack = no_ack
        self.delivered = 0
        self.failures = failures = Failures(prefetch, self._is_settled, describe)
        if on_failure is not None:
            callback = failures.guard(callback, on_failure, logs=logs_failures)
        self._callback = callback
        self._on_cancelled = on_cancelled
        self._context = context
        self._unsubscribe = unsubscribe
        self._describe = describe
        self._limit = concurrency or _NO_LIMIT
        self._via = via
        self._wire: WireChannel | None = None
        self._message_wire: Wire | None = None
        self._tag = b""
        self._task_name = ""
        self._has_warned = False
        self._queue: deque[IncomingMessage] = deque()
        self._handlers = Handlers(no_ack, tasks)
        self._stopping: asyncio.Task[None] | None = None
        self._given_back = False

    @property
    def backlog(self) -> int:
        """How many messages no callback has finished with."""
        return len(self._queue) + len(self._handlers.suspended)

    def backlog_size(self) -> int:
        """Bytes of memory that they take, about."""
        return held(self._queue) + held(self._handlers.suspended.values()) + self.backlog * _TASK

    def attach(self, wire: WireChannel, wire_tag: str) -> CallbackConsumer:
        """Consume on *wire*, which knows it by *wire_tag*."""
        if self._wire is not None and not self._wire.is_open and not self.no_ack:
            self._queue.clear()
        self._wire = wire
        self._hand = wire.transport.hand
        self._message_wire = None if self.no_ack else wire.settler if self._via is None else self._via(wire.settler)
        self._task_name = f"leveret {self._describe()}"
        self._tag = wire_tag.encode("utf-8", "surrogateescape")
        self.failures.forget()
        return self

    def on_delivery(
        self, delivery_tag: int, redelivered: bool, route: bytes, properties: bytes, body: bytes, /
    ) -> None:
        """A message came."""
        self.delivered += 1
        self._queue.append(
            incoming_message(
                self._message_wire, self._tag, delivery_tag, redelivered, route, properties, body, self.no_ack
            )
        )
        if not self._handlers.is_due:
            self._start()

    def on_abandoned(self) -> None:
        """Nobody waits for it: give back what no callback has started on."""
        give_back(self._queue)

    def on_end(self, error: Exception) -> None:
        """No more will come."""
        if isinstance(error, ConsumerCancelled):
            self.failures.forget()
            self._on_cancelled(error)
        elif not self.no_ack or is_normal(error):
            if self._stopping is not None and not self.no_ack:
                self._handlers.requeued += len(self._queue)
            self._queue.clear()

    # --------------------------------------------------------------------------------------- running callbacks

    def _may_begin(self) -> bool:
        """Whether a callback may begin; once it is stopped, what comes is given back instead."""
        if self._stopping is not None and not self.no_ack:
            if self._given_back:
                self._handlers.requeued += give_back(self._queue)
            return False
        return len(self._handlers.suspended) < self._limit

    def _start(self) -> None:
        """Have the hand look at the queue, if it may."""
        if self._may_begin():
            self._handlers.is_due = True
            self._hand.add(self._run_callbacks)

    def _run_callbacks(self, task: asyncio.Task[None]) -> Rest | None:
        """Run callbacks in *task*, until one suspends."""
        if not self._may_begin():  # since it was to look
            self._handlers.is_due = False
            self._handlers.remove(task)
            return None
        queue = self._queue
        wire = None if self.no_ack else self._wire
        rest: Rest | None = None
        self._handlers.tasks.add(task)
        self._handlers.of_channel.add(task)
        task.set_name(self._task_name)
        try:
            while queue and not will_be_cancelled(task):  # by a callback before, which must not cancel the next one
                message = queue.popleft()
                if wire is not None and wire.error is not None:
                    continue
                context = self._context.copy()
                try:
                    running: Any = context.run(self._callback, message)
                    coroutine: Coroutine[Any, Any, Any]
                    kind: type[object] = running.__class__
                    if kind is types.CoroutineType:  # nearly always; isawaitable() is slow
                        coroutine = running
                    elif inspect.isawaitable(running):
                        coroutine = _await(running)
                    else:  # a plain function: it is done
                        if running is not None or not message.processed:
                            self._on_result(message, running)
                        continue
                    waits_for = context.run(coroutine.send, None)
                except StopIteration as stop:
                    if stop.value is not None or not message.processed:
                        self._on_result(message, stop.value)
                    continue
                except Exception as exc:
                    self._on_failure(message, exc)
                    continue
                except asyncio.CancelledError as exc:  # of something that it waited for: nobody cancelled this task
                    self._on_failure(message, exc)
                    continue
                self._handlers.suspended[task] = message
                rest = self._finish(message, coroutine, context, waits_for)
                break
        finally:
            self._handlers.is_due = False
            if self._queue:
                self._start()
            if rest is None:
                self._handlers.remove(task)
            elif self._stopping is not None:  # by the callback itself, perhaps, which waits until none is due
                self._handlers.tell_idle()
        return rest

    def _finish(
        self,
        message: IncomingMessage,
        coroutine: Coroutine[Any, Any, Any],
        context: contextvars.Context,
        waits_for: Any,
    ) -> Generator[Any, Any, None]:
        """Run a callback that has suspended to its end; this task is now its own."""
        task = asyncio.current_task()
        assert task is not None
        has_ended = True
        try:
            while True:
                try:
                    value = yield waits_for
                except BaseException as exc:
                    waits_for = context.run(coroutine.throw, exc)
                else:
                    waits_for = context.run(coroutine.send, value)
        except StopIteration as stop:
            if stop.value is not None or not message.processed:
                self._on_result(message, stop.value)
        except Exception as exc:
            self._on_failure(message, exc)
        except asyncio.CancelledError as exc:
            if is_being_cancelled():
                has_ended = False
                raise
            self._on_failure(message, exc)  # of something that it waited for: nobody cancelled this task
        finally:
            del self._handlers.suspended[task]
            if self._stopping is not None:
                self._handlers.on_end(task, message, has_ended)
            if self._queue and not self._handlers.is_due:
                self._start()
            self._handlers.remove(task)

    def _on_result(self, message: IncomingMessage, result: object) -> None:
        """A callback has returned something, or has not settled its message; only a verdict means anything."""
        if not isinstance(result, Verdict):
            self.failures.returned(message)
            if result is not None and not message.processed:
                self._warn_once(
                    "%s: a callback returned %r, which means nothing, and left its message unacknowledged;"
                    " leveret.Ack would acknowledge it",
                    result,
                )
            return
        if message.processed:
            why = "needs no acknowledgement (no_ack)" if self.no_ack else "is settled already"
            self._warn_once("%s: a callback returned %s for a message that %s", result, why)
            return
        try:
            _ = settle(message, result)
        except DeliveryLost as exc:
            _log.debug("%s: %s", self._describe(), exc)
        except Exception as exc:
            self._on_failure(message, exc)

    def _warn_once(self, text: str, *values: object) -> None:
        if not self._has_warned:
            self._has_warned = True
            _log.warning(text, self._describe(), *values)

    def _on_failure(self, message: IncomingMessage, error: BaseException) -> None:
        self.failures.report(message, error, "left unacknowledged")
        self.failures.left(message)

    def _is_settled(self, delivery_tag: int) -> bool:
        return self._wire is None or self._wire.settler.is_settled(delivery_tag)

    # ---------------------------------------------------------------------------------------------- for its user

    @property
    def waiting(self) -> int:
        """How many messages no callback has started on."""
        return len(self._queue)

    @property
    def in_flight(self) -> int:
        """How many callbacks have begun, and wait for something."""
        return len(self._handlers.suspended)

    @property
    def is_stopping(self) -> bool:
        """Whether it was told to stop."""
        return self._stopping is not None

    @property
    def is_stopped(self) -> bool:
        """Whether it was stopped before, and no callback runs."""
        return self._stopping is not None and self._stopping.done() and not self._handlers.tasks

    @property
    def complaint(self) -> str | None:
        """What is wrong with it, for ``connection.health()``."""
        is_active = self._stopping is None and self._wire is not None and self._wire.is_open
        return self.failures.complaint() if is_active else None

    def limit(self, concurrency: int | None) -> None:
        """Run at most so many callbacks at a time from now on; None for no limit."""
        self._limit = concurrency or _NO_LIMIT
        self._stall()
        if self._queue and not self._handlers.is_due:
            self._start()

    def _stall(self) -> None:
        """Have the hand, if it is at it, start nothing more: it looks again whether it may."""
        waiting, self._queue = self._queue, deque(self._queue)
        waiting.clear()

    # ------------------------------------------------------------------------------------------------- stopping

    def begin_stop(self, deadline: float) -> None:
        """Start no callback any more, cancel the consumer, and give back what was not started on.

        What needs no acknowledgement cannot be given back: callbacks go on with it.
        """
        if self._stopping is not None:
            return
        if not self.no_ack:
            self._stall()
        loop = asyncio.get_running_loop()
        self._stopping = task = asyncio.Task(self._stop(deadline), loop=loop, name=f"leveret stops {self._describe()}")
        self._handlers.add_chore(task)
        if self._wire is not None:
            self._wire.watch(self._handlers.cancel_lost)
        self._handlers.cancel_lost()

    async def _stop(self, deadline: float) -> None:
        try:
            await self._unsubscribe(max(0.0, deadline - asyncio.get_running_loop().time()))
        except (TimeoutError, ChannelInvalidStateError, Closed) as exc:
            _log.info("stopping %s: %s", self._describe(), exc)
        finally:
            self._given_back = True
            if not self.no_ack:
                self._handlers.requeued += give_back(self._queue)

    def cut_short(self) -> None:
        """Cancel the callbacks that still run."""
        if self.no_ack and self._queue:
            _log.warning("%s: %d messages were not handled, and are gone (no_ack)", self._describe(), self.waiting)
            self._handlers.abandoned += self.waiting
            self._queue.clear()
        self._handlers.cut_short()

    def enter(self, task: asyncio.Task[Any]) -> None:
        """*task* waits for callbacks."""
        self._handlers.enter(task)

    def leave(self, task: asyncio.Task[Any]) -> None:
        """It no longer does."""
        self._handlers.leave(task)

    async def until_idle(self, deadline: float) -> None:
        """Wait for the callbacks that run, but not for those that wait for the same; until *deadline* at most."""
        await self._handlers.until_idle(deadline)

    async def until_stopped(self, deadline: float) -> None:
        """Wait until it is cancelled, and write what acks were saved up."""
        if self._stopping is not None:
            await wait_until([self._stopping], deadline)
        if self._wire is not None and self._wire.is_open:
            self._wire.settler.flush()

    @property
    def report(self) -> DrainReport:
        """What became of its messages since it was stopped."""
        not_yet_back = 0 if self.no_ack else len(self._queue)
        return self._handlers.report() + DrainReport(requeued=not_yet_back)


def check_on_cancelled(on_cancelled: str) -> None:
    """Raise ValueError for what is none of the choices."""
    if on_cancelled not in get_args(OnCancelled):
        raise ValueError(f"on_cancelled must be one of {', '.join(get_args(OnCancelled))}, not {on_cancelled!r}")


def check_prefetch(name: str, prefetch: int | None) -> None:
    """Raise TypeError or ValueError for a *prefetch*, the argument *name*, that AMQP cannot carry."""
    if prefetch is not None:
        check_count(name, prefetch, 0, MAX_PREFETCH, " (0 is no limit)")


def is_normal(error: Exception | None) -> bool:
    """Whether *error* says that this side closed on purpose."""
    return isinstance(error, Closed) and error.is_normal


def held(messages: Collection[IncomingMessage]) -> int:
    """Bytes of memory that *messages* take, about."""
    return len(messages) * _MESSAGE + sum(message.received_size for message in messages)


def give_back(messages: deque[IncomingMessage]) -> int:
    """Requeue *messages*, in their order; returns how many there were."""
    count = len(messages)
    while messages:
        if (message := messages.popleft()).is_live:
            _ = message.give_back()
    return count


async def _await(awaitable: Awaitable[Any]) -> Any:
    return await awaitable
