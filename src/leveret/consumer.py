"""What happens to deliveries: callbacks.

They run in order of arrival, without a task of their own as long as they do not wait. A *runner* task starts them
one after another; when one suspends, the runner becomes that callback's task to its end (so ``current_task()``,
``timeout()`` and cancellation mean what they should), and a new runner takes over the rest. Every callback has a copy
of the context that ``consume()`` was called in, so context variables do not leak from one into another.

What the broker delivered on a channel that is gone, and no handler has started on, is dropped: it comes again. What
needs no acknowledgement (``no_ack``) is handed out all the same: it does not.

On a channel that recovers, the same callback is attached to one wire after the other.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import types
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Generator
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from leveret.exceptions import Closed, ConsumerCancelled, DeliveryLost
from leveret.log import get_logger
from leveret.message import IncomingMessage

if TYPE_CHECKING:
    from leveret.wire.channel import WireChannel, WireConsumer

_log = get_logger(__name__)

ConsumerCallback = Callable[[IncomingMessage], Awaitable[object] | None]

OnCancelled: TypeAlias = Literal["resubscribe", "stop", "raise"]
"""What to do when the broker cancels a consumer."""

_MESSAGE = 256
_TASK = 2560
"""Bytes that a message takes beside its contents, and that a callback which waits takes with its task (measured on
CPython 3.11). Those that have not begun count as much: they begin whether anything is read or not."""

Attach: TypeAlias = "Callable[[WireChannel, str], WireConsumer]"
"""Makes the consumer for a wire, with the tag that it has there."""


class CallbackConsumer:
    """Runs *callback* for each delivery.

    Args:
        wire: the channel that delivers.
        consumer_tag: this consumer's.
        callback: a coroutine function; a plain function, or one that returns any awaitable, will do.
        no_ack: whether deliveries need no acknowledgement.
        tasks: keeps the running tasks; whoever owns it ends them.
        on_cancelled: called when the broker cancels the consumer.
        context: each callback runs in a copy of it.
    """

    __slots__ = (
        "_callback",
        "_context",
        "_on_cancelled",
        "_queue",
        "_runner",
        "_suspended",
        "_suspended_size",
        "_tag",
        "_tasks",
        "_wire",
        "no_ack",
    )

    def __init__(
        self,
        wire: WireChannel,
        consumer_tag: str,
        callback: ConsumerCallback,
        no_ack: bool,
        tasks: set[asyncio.Task[None]],
        on_cancelled: Callable[[ConsumerCancelled], object],
        context: contextvars.Context,
    ) -> None:
        self.no_ack = no_ack
        self._wire = None if no_ack else wire
        self._tag = consumer_tag.encode("utf-8", "surrogateescape")
        self._callback = callback
        self._tasks = tasks
        self._on_cancelled = on_cancelled
        self._queue: deque[IncomingMessage] = deque()
        self._context = context
        self._runner: asyncio.Task[None] | None = None  # the one that is about to look at the queue
        self._suspended = self._suspended_size = 0  # callbacks that wait for something, and what they hold

    @property
    def backlog(self) -> int:
        """How many messages no callback has finished with."""
        return len(self._queue) + self._suspended

    def backlog_size(self) -> int:
        """Bytes of memory that they take, about."""
        return held(self._queue) + self._suspended_size + self.backlog * _TASK

    def on_delivery(
        self, delivery_tag: int, redelivered: bool, route: bytes, properties: bytes, body: bytes, /
    ) -> None:
        """A message came."""
        self._queue.append(
            IncomingMessage(self._wire, self._tag, delivery_tag, redelivered, route, properties, body, self.no_ack)
        )
        if self._runner is None:
            self._start_runner()

    def on_abandoned(self) -> None:
        """Nobody waits for it: give back what no callback has started on."""
        give_back(self._queue)

    def on_end(self, error: Exception) -> None:
        """No more will come."""
        if isinstance(error, ConsumerCancelled):
            self._on_cancelled(error)
        elif not self.no_ack or is_normal(error):
            self._queue.clear()

    def _start_runner(self) -> None:
        # Not create_task(): an eager task factory would run it before it is known as the runner.
        loop = asyncio.get_running_loop()
        self._runner = task = asyncio.Task(self._run(), loop=loop, name=f"leveret consumer {self._tag!r}")
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._runner is task:  # cancelled before it began
            self._runner = None

    async def _run(self) -> None:
        await self._run_callbacks()

    @types.coroutine
    def _run_callbacks(self) -> Generator[Any, Any, None]:
        queue, task, wire = self._queue, self._runner, self._wire
        assert task is not None
        while queue and not task.cancelling():  # a callback that cancels its task must not cancel the next one
            message = queue.popleft()
            if wire is not None and wire.error is not None:
                continue
            context = self._context.copy()
            try:
                running = context.run(self._callback, message)
                if not inspect.isawaitable(running):
                    continue  # a plain function: it is done
                coroutine: Coroutine[Any, Any, Any] = running if inspect.iscoroutine(running) else _await(running)
                waits_for = context.run(coroutine.send, None)
            except StopIteration:
                continue
            except Exception as exc:
                self._report(message, exc)
                continue
            except asyncio.CancelledError as exc:  # of something that it waited for: nobody cancelled this task
                self._report(message, exc)
                continue
            self._runner = None
            if queue:
                self._start_runner()
            size = message.received_size
            self._suspended += 1
            self._suspended_size += size
            try:
                yield from self._finish(message, coroutine, context, waits_for)
            finally:
                self._suspended -= 1
                self._suspended_size -= size
            return
        self._runner = None
        if queue:
            self._start_runner()

    def _finish(
        self,
        message: IncomingMessage,
        coroutine: Coroutine[Any, Any, Any],
        context: contextvars.Context,
        waits_for: Any,
    ) -> Generator[Any, Any, None]:
        """Run a callback that has suspended to its end; this task is now its own."""
        try:
            while True:
                try:
                    value = yield waits_for
                except BaseException as exc:
                    waits_for = context.run(coroutine.throw, exc)
                else:
                    waits_for = context.run(coroutine.send, value)
        except StopIteration:
            pass
        except Exception as exc:
            self._report(message, exc)
        except asyncio.CancelledError as exc:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            self._report(message, exc)  # of something that it waited for: nobody cancelled this task

    def _report(self, message: IncomingMessage, error: BaseException) -> None:
        if isinstance(error, DeliveryLost):
            _log.warning("consumer %r: %s", self._tag, error)
            return
        level = logging.ERROR if isinstance(error, Exception) else logging.WARNING  # cancelled
        _log.log(
            level,
            "the callback of consumer %r failed on delivery %d (message_id %r, routing key %r, %s): %r",
            self._tag,
            message.delivery_tag,
            message.message_id,
            message.routing_key,
            "settled" if message.processed else "left unacknowledged",
            error,
            exc_info=error,
        )


def check_on_cancelled(on_cancelled: str) -> None:
    """Raise ValueError for what is none of the choices."""
    if on_cancelled not in get_args(OnCancelled):
        raise ValueError(f"on_cancelled must be one of {', '.join(get_args(OnCancelled))}, not {on_cancelled!r}")


def check_prefetch(name: str, prefetch: int | None) -> None:
    """Raise ValueError for a *prefetch*, the argument *name*, that AMQP cannot carry."""
    if prefetch is not None and not 0 <= prefetch <= 65_535:
        raise ValueError(f"{name} must be from 0 (no limit) to 65535, not {prefetch}")


def is_normal(error: Exception | None) -> bool:
    """Whether *error* says that this side closed on purpose."""
    return isinstance(error, Closed) and error.is_normal


def held(messages: Collection[IncomingMessage]) -> int:
    """Bytes of memory that *messages* take, about."""
    return len(messages) * _MESSAGE + sum(message.received_size for message in messages)


def give_back(messages: deque[IncomingMessage]) -> None:
    """Requeue *messages*, in their order."""
    while messages:
        if (message := messages.popleft()).is_live:
            _ = message.give_back()


async def _await(awaitable: Awaitable[Any]) -> Any:
    return await awaitable
