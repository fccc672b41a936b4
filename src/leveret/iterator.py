"""What happens to deliveries: iterators.

:class:`QueueConsumer` keeps what comes; :class:`QueueIterator` hands it out one by one, and
:class:`~leveret.batches.BatchIterator` by the dozen.

They hand messages out in order of arrival; a cancelled or timed-out ``__anext__`` takes none. As with callbacks
(:mod:`leveret.consumer`), what was delivered on a channel that is gone is dropped unless it needs no acknowledgement,
and on a channel that recovers the same iterator is attached to one wire after the other.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

from leveret.consumer import OnCancelled, check_on_cancelled, check_prefetch, give_back, held, is_normal
from leveret.draining import DrainReport, wait_until
from leveret.exceptions import ChannelInvalidStateError, Closed, ConsumerCancelled, fresh
from leveret.in_hand import InHand
from leveret.log import get_logger, printable
from leveret.message import IncomingMessage, Wire, incoming_message
from leveret.prompt import PromptEvent
from leveret.records import ConsumerRecord
from leveret.types import Arguments, TimeoutType

if TYPE_CHECKING:
    from typing import Self

    from leveret.queue import Queue
    from leveret.wire.channel import WireChannel

_log = get_logger(__name__)


class QueueConsumer:
    """A consumer that keeps what comes until it is asked for; the arguments are those of :class:`QueueIterator`."""

    DEFAULT_CLOSE_TIMEOUT = 5

    def __init__(
        self,
        queue: Queue,
        *,
        no_ack: bool = False,
        exclusive: bool = False,
        arguments: Arguments = None,
        consumer_tag: str | None = None,
        timeout: TimeoutType = None,
        robust: bool = True,
        on_cancelled: OnCancelled = "resubscribe",
        prefetch: int | None = None,
    ) -> None:
        check_on_cancelled(on_cancelled)
        check_prefetch("prefetch", prefetch)
        self.no_ack = no_ack
        self._robust = robust
        self._on_cancelled: OnCancelled = on_cancelled
        self._queue = queue
        self._exclusive = exclusive
        self._arguments = arguments
        self._requested_tag = consumer_tag
        self._prefetch = prefetch
        self._timeout = timeout
        self._messages: deque[IncomingMessage] = deque()
        self._arrived = PromptEvent()
        self._wire: WireChannel | None = None
        self._message_wire: Wire | None = None
        self._consumer_tag: str | None = None
        self._is_consuming = False
        self._tag = b""
        self._consuming: asyncio.Lock = asyncio.Lock()
        self._error: Exception | None = None
        self._closed = False
        self._given_back = False
        # From here on: for draining.
        self._in_hand = InHand()
        self._stopping: asyncio.Task[None] | None = None
        self._parked: deque[IncomingMessage] = deque()
        self._at_stop: list[IncomingMessage] = []  # what users worked on when it was stopped
        self._requeued = self._lost = 0

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: queue={self._queue.name!r} consumer_tag={self.consumer_tag!r}>"

    @property
    def queue_name(self) -> str:
        """The queue that it consumes."""
        return self._queue.name

    @property
    def consumer_tag(self) -> str | None:
        """The tag; None before consuming has begun."""
        return self._consumer_tag if self._is_consuming else None

    async def consume(self) -> None:
        """Begin to consume, unless it has; ``async for`` does it by itself."""
        async with self._consuming:
            if self._is_consuming or self._closed:
                return
            channel = self._queue.channel
            channel.consumers.add(self)
            tag = self._requested_tag or channel.new_consumer_tag()
            record = ConsumerRecord(
                channel=channel.key,
                consumer_tag=tag,
                queue=self._queue.name,
                no_ack=self.no_ack,
                exclusive=self._exclusive,
                arguments=self._arguments,
                prefetch=self._prefetch,
            )
            self._consumer_tag = tag
            await channel.subscribe(
                record, self._attach, self._timeout, on_cancelled=self._on_cancelled, robust=self._robust
            )
            self._is_consuming = True
            if self._closed:  # meanwhile
                await channel.unsubscribe(tag, self.DEFAULT_CLOSE_TIMEOUT)

    def _attach(self, wire: WireChannel, wire_tag: str) -> Self:
        self._wire, self._tag = wire, wire_tag.encode("utf-8", "surrogateescape")
        self._arrived.wakeups = wire.transport.wakeups
        self._message_wire = None if self.no_ack else wire.settler
        return self

    @property
    def backlog(self) -> int:
        """How many messages wait to be handed out."""
        return len(self._messages)

    def backlog_size(self) -> int:
        """Bytes of memory that they take, about."""
        return held(self._messages)

    def on_delivery(
        self, delivery_tag: int, redelivered: bool, route: bytes, properties: bytes, body: bytes, /
    ) -> None:
        """A message came."""
        self._messages.append(
            incoming_message(
                self._message_wire, self._tag, delivery_tag, redelivered, route, properties, body, self.no_ack
            )
        )
        if len(self._messages) == 1:
            self._arrived.set()
            if self._stopping is not None:
                self._park()
            if self._given_back:  # close() was cancelled before the broker's answer
                self._give_back()

    def on_abandoned(self) -> None:
        """Nobody waits for it: give back what came."""
        give_back(self._messages)

    def on_end(self, error: Exception) -> None:
        """No more will come, unless the channel has it back."""
        if not isinstance(error, ConsumerCancelled) and (not self.no_ack or is_normal(error)):
            self._messages.clear()
        if self._consumer_tag is not None and self._queue.channel.keeps_consumer(self._consumer_tag, error):
            return
        if isinstance(error, ConsumerCancelled) and self._on_cancelled == "stop":
            _log.warning("%s", printable(str(error)))
            self._closed = True
        self._error = error
        self._arrived.set()

    def _check_going_on(self) -> None:
        """Raise what ends the iteration, if nothing more will come."""
        if self._closed or is_normal(self._error):
            raise StopAsyncIteration
        if self._error is not None:
            raise fresh(self._error)

    def _next(self) -> IncomingMessage | None:
        """The next message that can still be settled."""
        while self._messages:
            message = self._messages.popleft()
            if self.no_ack or message.is_live:
                return message
        return None

    async def __aenter__(self) -> Self:
        await self.consume()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel the consumer, and give what was not handed out back to the queue, in its order.

        Idempotent, and bounded by DEFAULT_CLOSE_TIMEOUT seconds; on a channel that is gone there is nothing to do.
        """
        self._in_hand.come_back(asyncio.current_task())
        await self._close()

    async def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._arrived.set()
        tag = self.consumer_tag
        try:
            if tag is not None and self._error is None:
                await self._queue.channel.unsubscribe(tag, self.DEFAULT_CLOSE_TIMEOUT)
        except (TimeoutError, ChannelInvalidStateError, Closed) as exc:
            _log.info("%r: closing: %s", self, exc)
        finally:
            self._give_back()

    def _give_back(self) -> None:
        """Requeue what nobody has seen; what cannot be is handed out while somebody drains."""
        self._given_back = True
        self._requeued += give_back(self._parked)
        if not (self.no_ack and self._stopping is not None):
            self._drop()
            self.on_abandoned()

    def _drop(self) -> None:
        if self.no_ack and self._messages:
            _log.warning("%r: %d messages were not handed out, and are gone (no_ack)", self, len(self._messages))
            if self._stopping is not None:
                self._lost += len(self._messages)
            self._messages.clear()
            self._arrived.set()

    # ------------------------------------------------------------------- when the channel or connection is drained

    @property
    def report(self) -> DrainReport:
        """What became of its messages since it was stopped."""
        drained = sum(message.processed for message in self._at_stop)
        return DrainReport(drained, self._requeued + len(self._at_stop) - drained, self._lost)

    @property
    def waiting(self) -> int:
        """How many messages are here, and were not handed out."""
        return len(self._messages) + len(self._parked)

    @property
    def in_flight(self) -> int:
        """How many messages were handed out, and are not settled."""
        return len(self._in_hand.unsettled)

    @property
    def complaint(self) -> str | None:
        """Whoever iterates knows what failed."""
        return None

    @property
    def is_stopped(self) -> bool:
        """Whether it was closed, and there is nothing to wait for."""
        return self._closed and (self._stopping is None or self._stopping.done())

    def _park(self) -> None:
        """Hand out nothing more, unless it would be lost."""
        if not self.no_ack:
            self._parked.extend(self._messages)
            self._messages.clear()

    def begin_stop(self, deadline: float) -> None:
        """Close it, and hand out nothing more."""
        if self._stopping is not None or self._closed:
            return
        self._at_stop = self._in_hand.unsettled
        self._park()
        loop = asyncio.get_running_loop()
        self._stopping = task = asyncio.Task(self._close(), loop=loop, name=f"leveret stops {self!r}")
        tasks = self._queue.channel.handler_tasks
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        if self._wire is not None:
            self._wire.watch(self._in_hand.look_again)

    def enter(self, task: asyncio.Task[Any]) -> None:
        """Whoever iterates does not wait for itself."""
        self._in_hand.come_back(task)

    def leave(self, task: asyncio.Task[Any]) -> None:
        """There is nothing to undo: it is closed."""

    async def until_idle(self, deadline: float) -> None:
        """Wait until users have settled what they work on, ask for the next, or have ended.

        It never raises, and waits until *deadline* in event loop time at most. Messages that need no acknowledgement
        are waited for until they are taken.
        """
        await self._in_hand.until_settled(deadline)
        while self.no_ack and self._messages and not self._in_hand.is_deserted:
            if asyncio.get_running_loop().time() >= deadline:
                return
            await self._in_hand.until_next(deadline)

    def cut_short(self) -> None:
        """The users' tasks are not ours to cancel."""
        self._drop()

    async def until_stopped(self, deadline: float) -> None:
        """Wait until it is closed; until *deadline* at most. It never raises."""
        if self._stopping is not None:
            await wait_until([self._stopping], deadline)


class QueueIterator(QueueConsumer):
    """Messages of a queue, for ``async for``.

    Use it as ``async with queue.iterator() as messages``: leaving the block cancels the consumer and gives
    what was not handed out back to the queue.

    Args:
        queue: what to consume.
        no_ack: the broker forgets each message as it sends it.
        exclusive: be the queue's only consumer.
        arguments: of ``basic.consume``.
        consumer_tag: of your own choice.
        robust: go on after a reconnect, on a connection of :func:`~leveret.connect_robust`.
        on_cancelled: what to do when the broker cancels the consumer, because its queue was deleted, say.
            ``"resubscribe"``, on a connection of :func:`~leveret.connect_robust`: declare the queue again if this
            connection declared it, and go on. ``"raise"``, and every plain connection: raise ConsumerCancelled.
            ``"stop"``: end the iteration.
        timeout: seconds for each ``__anext__``, which takes as long as it takes without; and for ``basic.consume``,
            which has the connection's ``operation_timeout`` without.
        prefetch: how many unacknowledged messages the broker sends ahead to this consumer, from 0 (no limit) to 65,535;
            None for the channel's (:meth:`Channel.set_qos`).
    """

    def __aiter__(self) -> QueueIterator:
        return self

    async def __anext__(self) -> IncomingMessage:
        """The next message.

        Raises:
            StopAsyncIteration: the iterator, its channel or the connection was closed by this side; or the broker
                cancelled the consumer, which is to stop then.
            TimeoutError: none came within the iterator's timeout; it stays usable.
            ConsumerCancelled: the broker cancelled the consumer, and what it had delivered is handed out.
            ChannelClosed, ConnectionClosed: the channel or connection was lost.
            ChannelInvalidStateError: the channel was closed before iterating began.

        Cancellation: takes no message, and the iterator stays usable.

        Reconnect: goes on waiting on a connection of :func:`~leveret.connect_robust`; what was delivered before and
        not handed out is dropped, because the broker delivers it again.
        """
        if (message := self._next()) is not None:
            self._in_hand.take((message,))
            return message
        self._in_hand.come_back(asyncio.current_task())
        async with asyncio.timeout(self._timeout):
            if not self._is_consuming:
                await self.consume()
            while (message := self._next()) is None:
                self._check_going_on()
                self._arrived.clear()
                await self._arrived.wait()
        self._in_hand.take((message,))
        return message
