"""What ``queue.consume()`` does and returns."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from leveret.checks import check_callback, check_count
from leveret.consumer import (
    MAX_PREFETCH,
    Attach,
    CallbackConsumer,
    ConsumerCallback,
    OnCancelled,
    check_on_cancelled,
    check_prefetch,
)
from leveret.draining import DrainReport, check_drain
from leveret.draining import drain as drain_consumers
from leveret.failures import FailureHandler, OnError, failure_handler
from leveret.message import Wire
from leveret.message_retry import MessageRetry
from leveret.records import ConsumerRecord
from leveret.settling import BatchingWire, WireOfConsumer, ack_on_return
from leveret.threads import in_thread
from leveret.types import Arguments, TimeoutType

if TYPE_CHECKING:
    from leveret.channel import Channel
    from leveret.queue import Queue


class Consumer(str):
    """A consumer that runs a callback. ``queue.consume()`` returns it.

    As a string it is the consumer tag, as in aio-pika, so ``queue.cancel(consumer)`` works. It stays the same when
    the connection is lost and comes back.
    """

    _channel: Channel
    _running: CallbackConsumer

    def __new__(cls, tag: str, channel: Channel, running: CallbackConsumer) -> Consumer:
        """Made by ``queue.consume()``."""
        self = super().__new__(cls, tag)
        self._channel = channel
        self._running = running
        return self

    @property
    def is_active(self) -> bool:
        """Whether it gets messages, or will when the connection is back; not once it was stopped or cancelled."""
        return not self._running.is_stopping and self._channel.is_subscribed(self._running)

    @property
    def delivered(self) -> int:
        """How many messages the broker delivered to it so far."""
        return self._running.delivered

    @property
    def waiting(self) -> int:
        """How many messages are here, and no callback has started on them."""
        return self._running.waiting

    @property
    def in_flight(self) -> int:
        """How many callbacks have begun, and wait for something."""
        return self._running.in_flight

    @property
    def failed(self) -> int:
        """How many callbacks failed so far."""
        return self._running.failures.count

    def set_concurrency(self, concurrency: int | None) -> None:
        """Let at most so many callbacks run at a time, from now on; those that run go on.

        AMQP cannot change the prefetch of a consumer that runs, so more than that many never run. Begin with a
        ``prefetch`` that is large enough for what you may want later.

        Args:
            concurrency: 1 or more; None for no limit but the prefetch.

        Raises:
            ValueError: less than 1.
        """
        _check_concurrency(concurrency)
        self._running.limit(concurrency)

    async def stop(self, drain: float = 10, *, timeout: TimeoutType = None) -> DrainReport:
        """Stop it, and let the callbacks that run come to their end.

        It is cancelled (``basic.cancel``), what no callback has started on goes back to the queue, callbacks that
        run may settle and publish as before, and their acks are written. Those that run after *drain* seconds are
        cancelled, and their messages go back too. The channel stays open. It may be called again, also with less
        time, and from inside a callback, which then does not wait for itself.

        Args:
            drain: seconds that callbacks get; 0 to cancel them at once, ``math.inf`` for as long as they take.
            timeout: seconds on top of it, for callbacks to end that were cancelled, and for the broker to answer;
                None for the connection's ``operation_timeout``.

        Returns:
            What became of the messages that were here.

        Raises:
            ValueError: *drain* is negative.

        Cancellation: it is stopped all the same; callbacks go on.

        Reconnect: when the link is lost, callbacks are cancelled whose messages are not settled: these come again.
        """
        check_drain(drain)
        return await drain_consumers([self._running], drain, self._channel.seconds(timeout))


async def stop_together(consumers: Sequence[Consumer], drain: float) -> None:
    """Stop *consumers* of one channel as :meth:`Consumer.stop` does, in the time that one takes."""
    if consumers:
        running = [each._running for each in consumers]  # pyright: ignore[reportPrivateUsage]
        channel = consumers[0]._channel  # pyright: ignore[reportPrivateUsage]
        await drain_consumers(running, drain, channel.seconds(None))


async def consume(
    queue: Queue,
    callback: ConsumerCallback,
    *,
    no_ack: bool,
    exclusive: bool,
    arguments: Arguments,
    consumer_tag: str | None,
    timeout: TimeoutType,
    robust: bool,
    on_cancelled: OnCancelled,
    prefetch: int | None,
    concurrency: int | None,
    on_error: OnError,
    thread: bool,
    ack_batch: int | None,
    retry: MessageRetry | None,
) -> Consumer:
    """What :meth:`Queue.consume` does, with the same arguments.

    Raises:
        TypeError, ValueError, DuplicateConsumerTag, ChannelNotFoundEntity, ChannelAccessRefused: as that.
    """
    check_callback(callback)
    check_on_cancelled(on_cancelled)
    channel = queue.channel
    on_failure = failure_handler(on_error)
    _check_concurrency(concurrency)
    if prefetch is None and concurrency is not None:
        prefetch = min(2 * concurrency, MAX_PREFETCH)
    check_prefetch("prefetch", prefetch)
    _check_ack_batch(ack_batch, channel.prefetch if prefetch is None else prefetch, no_ack)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + channel.seconds(timeout)
    tag = str(consumer_tag) if consumer_tag else channel.new_consumer_tag()

    async def unsubscribe(seconds: float) -> None:
        if channel.is_subscribed(running):
            await channel.unsubscribe(tag, seconds)

    if thread:
        callback = in_thread(callback)
    if channel.tally.measured is not None:
        callback = channel.tally.measured(callback)
    if retry is not None:
        _check_retry(retry, on_failure, no_ack)
        async with asyncio.timeout_at(deadline):
            retrier = await retry.prepare(queue)
        callback, on_failure = ack_on_return(callback), retrier.on_failure
    running = CallbackConsumer(
        callback,
        no_ack,
        channel.handler_tasks,
        functools.partial(channel.on_consumer_cancelled, tag, on_cancelled),
        contextvars.copy_context(),
        unsubscribe,
        lambda: f"consumer {tag!r} of queue {queue.name!r}",
        prefetch=channel.prefetch if prefetch is None else prefetch,
        concurrency=concurrency,
        on_failure=on_failure,
        logs_failures=retry is None,  # which says what becomes of the message, too
        via=_via(thread, ack_batch),
    )
    record = ConsumerRecord(
        channel=channel.key,
        consumer_tag=tag,
        queue=queue.name,
        no_ack=no_ack,
        exclusive=exclusive,
        arguments=arguments,
        prefetch=prefetch,
    )
    channel.consumers.add(running)
    attach: Attach = running.attach
    left = max(0.0, deadline - loop.time())
    await channel.subscribe(record, attach, left, on_cancelled=on_cancelled, robust=robust)
    return Consumer(tag, channel, running)


def _via(thread: bool, ack_batch: int | None) -> Callable[[BatchingWire], Wire] | None:
    """How messages see the wire; None for the wire itself."""
    if not thread and ack_batch is None:
        return None
    owner = threading.get_ident() if thread else None

    def via(wire: BatchingWire) -> Wire:
        return WireOfConsumer(wire, ack_batch, owner)

    return via


def _check_concurrency(concurrency: int | None) -> None:
    if concurrency is not None:
        check_count("concurrency", concurrency, 1, hint=", or None for no limit")


def _check_retry(retry: object, on_failure: FailureHandler | None, no_ack: bool) -> None:
    if not isinstance(retry, MessageRetry):
        raise TypeError(f"retry must be a MessageRetry(), which is about messages, not {retry!r}")
    if on_failure is not None:
        raise ValueError("choose one of retry and on_error: both say what becomes of a message whose callback failed")
    if no_ack:
        raise ValueError("retry means nothing with no_ack: the broker has forgotten the message")


def _check_ack_batch(ack_batch: int | None, prefetch: int, no_ack: bool) -> None:
    if ack_batch is None:
        return
    if no_ack:
        raise ValueError("ack_batch means nothing with no_ack: there are no acks")
    check_count("ack_batch", ack_batch, 2)
    if 0 < prefetch < ack_batch:
        raise ValueError(f"ack_batch is {ack_batch}, but the broker sends only {prefetch} messages ahead (prefetch)")
