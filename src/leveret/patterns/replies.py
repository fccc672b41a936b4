"""A consumer that hands each message to a function as it is read, with no task and no queue between.

It is for replies: handling one is putting its contents into a future. It is none of the channel's consumers that are
drained, so handlers that run to their end while a channel is drained still get the replies that they wait for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from leveret.exceptions import ConsumerCancelled
from leveret.log import get_logger
from leveret.message import IncomingMessage
from leveret.prompt import Wakeups
from leveret.queue import Queue
from leveret.records import ConsumerRecord

if TYPE_CHECKING:
    from leveret.wire.channel import WireChannel

_log = get_logger("leveret.patterns.rpc")


class Replies:
    """Consumes a queue, with ``no_ack``, until its channel or the queue is gone.

    Args:
        queue: where replies come in.
        on_message: called with each message.
        on_cancelled: called when the broker has cancelled it for good.

    Attributes:
        consumer_tag: its tag.
        wire_tag: the one that the wire knows it by, once it was started.
        wakeups: those of the connection that brings the messages, once it was started.
    """

    no_ack = True
    backlog = 0

    def __init__(
        self,
        queue: Queue,
        on_message: Callable[[IncomingMessage], object],
        on_cancelled: Callable[[ConsumerCancelled], object],
    ) -> None:
        self.consumer_tag = queue.channel.new_consumer_tag()
        self._queue = queue
        self._on_message = on_message
        self._on_cancelled = on_cancelled
        self.wire_tag = b""
        self.wakeups: Wakeups | None = None

    async def start(self, *, exclusive: bool = False) -> None:
        """Consume, and again after a reconnect, on a channel that recovers.

        Raises:
            ChannelClosed, ChannelInvalidStateError, TimeoutError: as :meth:`Queue.consume`.
        """
        channel = self._queue.channel
        record = ConsumerRecord(
            channel=channel.key,
            consumer_tag=self.consumer_tag,
            queue=self._queue.name,
            no_ack=True,
            exclusive=exclusive,
        )
        await channel.subscribe(record, self._attach, None, on_cancelled="resubscribe", robust=True)

    async def stop(self) -> None:
        """Consume no more.

        Raises:
            ChannelInvalidStateError, TimeoutError: as :meth:`Queue.cancel`.
        """
        await self._queue.channel.unsubscribe(self.consumer_tag, None)

    def _attach(self, wire: WireChannel, wire_tag: str) -> Replies:
        self.wire_tag = wire_tag.encode()
        self.wakeups = wire.transport.wakeups
        return self

    # ---------------------------------------------------------------------------------- what the wire says

    def backlog_size(self) -> int:
        """It keeps nothing."""
        return 0

    def on_delivery(
        self, delivery_tag: int, redelivered: bool, route: bytes, properties: bytes, body: bytes, /
    ) -> None:
        """A message came."""
        message = IncomingMessage.from_wire(
            None, self.wire_tag, delivery_tag, redelivered, route, properties, body, True
        )
        try:
            self._on_message(message)
        except Exception:
            _log.exception("handling a reply failed")

    def on_abandoned(self) -> None:
        """There is nothing to give back."""

    def on_end(self, error: Exception) -> None:
        """No more will come, unless the channel has it back."""
        channel = self._queue.channel
        if isinstance(error, ConsumerCancelled) and not channel.keeps_consumer(self.consumer_tag, error):
            self._on_cancelled(error)
