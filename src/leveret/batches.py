"""What happens to deliveries: batches.

A batch is not collected anywhere: messages stay where :class:`~leveret.iterator.QueueConsumer` keeps them until there
are enough, or the first of them has waited long enough. So a ``__anext__`` that is cancelled has taken none, leaving
gives back all that was not handed out, and when the link dies half a batch is dropped with the rest, to begin anew.

Settling a batch takes one frame where nothing before its last message is left unsettled on the channel
(:meth:`leveret.wire.acks.Acks.split`), which is what handling one batch after the other leads to.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Coroutine, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

from leveret.checks import check_count
from leveret.consumer import MAX_PREFETCH, OnCancelled
from leveret.exceptions import DeliveryLost
from leveret.iterator import QueueConsumer
from leveret.log import get_logger
from leveret.message import IncomingMessage
from leveret.outcome import returns_awaitable
from leveret.types import Arguments

if TYPE_CHECKING:
    from leveret.queue import Queue

_log = get_logger(__name__)


class Batch(Sequence[IncomingMessage]):
    """Messages that are handled together: a sequence, in the order of their arrival.

    ``queue.batches()`` makes them, never empty; what ``queue.get_many()`` fetched can be made one too. They have to be
    of one channel: settling others together is a ValueError.

    Settle them by :meth:`ack`, :meth:`nack`, :meth:`reject` or :meth:`process`, which leave out those that were settled
    singly before; when all are, they do nothing.
    """

    __slots__ = ("_messages",)

    def __init__(self, messages: Sequence[IncomingMessage]) -> None:
        self._messages = messages

    def __repr__(self) -> str:
        tags = f"{self._messages[0].delivery_tag} to {self._messages[-1].delivery_tag}" if self._messages else "none"
        return f"<Batch of {len(self)}: delivery tags {tags}>"

    def __len__(self) -> int:
        return len(self._messages)

    def __iter__(self) -> Iterator[IncomingMessage]:
        return iter(self._messages)

    @overload
    def __getitem__(self, index: int) -> IncomingMessage: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[IncomingMessage]: ...

    def __getitem__(self, index: int | slice) -> IncomingMessage | Sequence[IncomingMessage]:
        return self._messages[index]

    @property
    def is_live(self) -> bool:
        """Whether the channel that brought it is still open, so that settling it can reach the broker."""
        return bool(self._messages) and self._messages[0].is_live

    @property
    def processed(self) -> bool:
        """Whether every message is settled, or never needed to be (``no_ack``)."""
        return all(message.processed for message in self._messages)

    @returns_awaitable
    def ack(self) -> Coroutine[Any, Any, None]:
        """Acknowledge them (``basic.ack``): one frame, unless messages before or among them are left unsettled.

        It takes effect when called; awaiting adds back-pressure while the socket is full.

        Raises:
            TypeError: they were consumed with ``no_ack``.
            DeliveryLost: their channel is gone; the broker redelivers them.
        """
        return IncomingMessage.settle_together(self._messages, "ack")

    @returns_awaitable
    def nack(self, requeue: bool = True) -> Coroutine[Any, Any, None]:
        """Hand them back (``basic.nack``), as few frames as for :meth:`ack`.

        Args:
            requeue: False drops or dead-letters them.

        Raises:
            MethodNotImplemented: the broker does not know ``basic.nack``.
            TypeError, DeliveryLost: as :meth:`ack`.
        """
        return IncomingMessage.settle_together(self._messages, "nack", requeue)

    @returns_awaitable
    def reject(self, requeue: bool = False) -> Coroutine[Any, Any, None]:
        """Refuse them: they are dropped or dead-lettered, or requeued if asked to.

        With *requeue* that is a ``basic.reject`` for each, because RabbitMQ 4.3 counts these, and not those that are
        handed back by :meth:`nack`, as failed deliveries in quorum queues.

        Raises:
            TypeError, DeliveryLost: as :meth:`ack`.
        """
        return IncomingMessage.settle_together(self._messages, "reject", requeue)

    def give_back(self) -> Coroutine[Any, Any, None]:
        """Requeue them, by whichever method the broker knows."""
        return IncomingMessage.settle_together(self._messages, "give back")

    def process(self, requeue: bool = False, reject_on_redelivered: bool = False) -> BatchContext:
        """Settle it by how an ``async with`` block ends: ack on success, reject on an exception.

        What the block settled itself is left out. Cancellation always requeues, as with a single message.

        Args:
            requeue: requeue them on an exception, instead of dropping or dead-lettering them.
            reject_on_redelivered: but do not requeue those a second time that were redelivered.
        """
        return BatchContext(self, requeue=requeue, reject_on_redelivered=reject_on_redelivered)


class BatchContext:
    """What :meth:`Batch.process` returns."""

    __slots__ = ("_batch", "_reject_on_redelivered", "_requeue")

    def __init__(self, batch: Batch, *, requeue: bool, reject_on_redelivered: bool) -> None:
        self._batch = batch
        self._requeue = requeue
        self._reject_on_redelivered = reject_on_redelivered

    async def __aenter__(self) -> Batch:
        return self._batch

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        batch = self._batch
        if batch.processed:
            return
        try:
            if exc is None:
                await batch.ack()
            elif not isinstance(exc, Exception):  # cancelled, or the program ends: somebody else shall do it
                await batch.give_back()
            elif self._requeue and self._reject_on_redelivered:
                for message in batch:
                    if not message.processed:
                        await message.reject(requeue=not message.redelivered)
            else:
                await batch.reject(requeue=self._requeue)
        except DeliveryLost:
            verb = "Ack" if exc is None else "Reject"
            _log.warning("%s is not sent since channel is closed: the broker redelivers %r", verb, batch)


class BatchIterator(QueueConsumer):
    """Messages of a queue in batches, for ``async for``. Get one from ``queue.batches()``.

    Use it as ``async with queue.batches(100) as batches``: leaving the block cancels the consumer and gives what was
    not handed out back to the queue.

    Args:
        queue: what to consume.
        size: how many messages a batch has at most.
        timeout: seconds after which a batch that is not full is handed out. They count from when its first message
            arrived, or was left over by the batch before. None waits until the batch is full.
        prefetch: how many unacknowledged messages the broker sends ahead, *size* to 65,535, or 0 for no limit. None for
            twice *size*, so that the next batch fills while one is handled. A prefetch that the whole channel has
            (``set_qos(global_=True)``) holds beside it.
        redelivered_apart: hand out redelivered messages as batches of one, so that a message which makes its batch
            fail does so alone the next time.
        no_ack: the broker forgets each message as it sends it. There is no prefetch then.
        exclusive: be the queue's only consumer.
        arguments: of ``basic.consume``.
        consumer_tag: of your own choice.
        robust: go on after a reconnect, on a connection of :func:`~leveret.connect_robust`.
        on_cancelled: as of :class:`~leveret.QueueIterator`.

    Raises:
        ValueError: *size* is not from 1 to 65,535, *timeout* is negative, or *prefetch* would never fill a batch.
    """

    def __init__(
        self,
        queue: Queue,
        size: int = 100,
        timeout: float | None = 1.0,
        *,
        prefetch: int | None = None,
        redelivered_apart: bool = False,
        no_ack: bool = False,
        exclusive: bool = False,
        arguments: Arguments = None,
        consumer_tag: str | None = None,
        robust: bool = True,
        on_cancelled: OnCancelled = "resubscribe",
    ) -> None:
        check_count("size", size, 1, MAX_PREFETCH)
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"timeout must not be negative: {timeout}")
        if prefetch is None:
            prefetch = min(2 * size, MAX_PREFETCH)
        elif 0 < prefetch < size:
            raise ValueError(f"a prefetch of {prefetch} would never fill a batch of {size}; twice the size is good")
        super().__init__(
            queue,
            no_ack=no_ack,
            exclusive=exclusive,
            arguments=arguments,
            consumer_tag=consumer_tag,
            robust=robust,
            on_cancelled=on_cancelled,
            prefetch=prefetch,
        )
        self.size = size
        self._patience = timeout
        self._apart = redelivered_apart
        self._loop = asyncio.get_running_loop()
        self._due: float | None = None  # when what there is makes a batch, full or not

    def on_delivery(
        self, delivery_tag: int, redelivered: bool, route: bytes, properties: bytes, body: bytes, /
    ) -> None:
        """A message came."""
        super().on_delivery(delivery_tag, redelivered, route, properties, body)
        count = len(self._messages)
        if count == 1:
            self._start_clock()
        elif count == self.size or (redelivered and self._apart):
            self._arrived.set()

    def __aiter__(self) -> BatchIterator:
        return self

    async def __anext__(self) -> Batch:
        """The next batch: once it is full, or its time is up.

        Raises:
            StopAsyncIteration: the iterator, its channel or the connection was closed by this side; or the broker
                cancelled the consumer, which is to stop then.
            ConsumerCancelled: the broker cancelled the consumer, and what it had delivered is handed out.
            ChannelClosed, ConnectionClosed: the channel or connection was lost.
            ChannelInvalidStateError: the channel was closed before iterating began.

        Cancellation: takes no message; what there is stays for the next call.

        Reconnect: goes on waiting on a connection of :func:`~leveret.connect_robust`. What was delivered before and
        not handed out is dropped, because the broker delivers it again.
        """
        if not (count := self._count()):
            self._in_hand.come_back(asyncio.current_task())
            if not self._is_consuming:
                await self.consume()
            while not (count := self._count()):
                if not self._messages:
                    self._check_going_on()
                self._arrived.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(self._due if self._messages else None):
                        await self._arrived.wait()
        messages = self._messages
        batch = Batch([messages.popleft() for _ in range(count)])
        self._start_clock()  # for what is left over
        self._in_hand.take(batch)
        return batch

    def _start_clock(self) -> None:
        self._due = None if self._patience is None else self._loop.time() + self._patience

    def _count(self) -> int:
        """How many messages the next batch has; 0 if it is not complete yet."""
        messages = self._messages
        while messages and not (self.no_ack or messages[0].is_live):  # those of one wire follow each other
            messages.popleft()
        count = min(len(messages), self.size)
        if self._apart:
            for index, message in enumerate(itertools.islice(messages, count)):
                if message.redelivered:
                    return max(index, 1)
        is_over = self._closed or self._error is not None or (self._due is not None and self._loop.time() >= self._due)
        return count if is_over or count == self.size else 0
