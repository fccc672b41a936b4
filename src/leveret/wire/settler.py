"""Settling what one channel delivered: the wire, as messages see it.

Contiguous tags of one turn of the event loop go out as one ``multiple``, at its end or before the next method of the
channel. Publishes do not wait for it: what a handler publishes goes out before what it acks. Those of a consumer that
asks for it are kept over several turns, until there are enough of them or the next method is sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from leveret.exceptions import DeliveryLost
from leveret.wire.acks import Acks
from leveret.wire.codec import encode_ack, encode_nack, encode_reject
from leveret.wire.output import CommitGate, Output

if TYPE_CHECKING:
    from leveret.wire.channel import WireChannel

ACK_DELAY = 0.1
"""Seconds that an ack waits for others at most, where a consumer asks for batches of them."""


class Settler:
    """Tells the broker what became of the deliveries of one channel, and counts it.

    Attributes:
        channel: the channel that brought them.
        output: where to write.
        cancelled: tags of consumers that the broker cancelled, and whether they were ``no_ack``.
    """

    __slots__ = (
        "_ack_timer",
        "_acks",
        "_error",
        "_is_due",
        "_loop",
        "_may_hold",
        "_tally",
        "cancelled",
        "channel",
        "output",
    )

    def __init__(self, channel: WireChannel) -> None:
        self.channel = channel
        self.output: Output | CommitGate = channel.transport.output
        self.cancelled: dict[bytes | None, bool] = {}
        self._loop = asyncio.get_running_loop()
        self._tally = channel.transport.tally
        self._acks = Acks()
        self._is_due = False  # whether the end of this turn flushes
        self._may_hold = True
        self._ack_timer: asyncio.TimerHandle | None = None
        self._error: Exception | None = None

    @property
    def is_open(self) -> bool:
        """Whether what settles still reaches the broker."""
        return self._error is None

    def server_supports(self, capability: str) -> bool:
        """Whether the broker announced *capability*."""
        return self.channel.transport.server_supports(capability)

    def ack(self, delivery_tag: int, multiple: bool = False) -> Coroutine[Any, Any, None]:
        """``basic.ack``: takes effect at once, is on the wire at the end of this turn of the event loop.

        Raises:
            DeliveryLost: this channel is gone; nothing is sent.
            MessageProcessError: a ``multiple`` has settled it already.
        """
        if self._error is not None:
            raise self._lost(self._error)
        if self._acks.save_up(delivery_tag):
            self._tally.acked += 1
            if not self._is_due:
                self._is_due = True
                self.output.before_flush(self.flush)
        else:
            data = encode_ack(self.channel.number, delivery_tag, multiple)
            self._tally.acked += self._settle(delivery_tag, multiple, data)
        return self.output.drain()

    def ack_later(self, delivery_tag: int, count: int) -> Coroutine[Any, Any, None]:
        """:meth:`ack`, written when *count* of them have come, or after ACK_DELAY seconds; raises as that does."""
        if self._error is not None:
            raise self._lost(self._error)
        if not self._may_hold or not self._acks.hold(delivery_tag):
            return self.ack(delivery_tag)
        self._tally.acked += 1
        if self._ack_timer is None:
            self._ack_timer = self._loop.call_later(ACK_DELAY, self.flush)
        if self._acks.pending >= count:
            self.flush()
        return self.output.drain()

    def is_settled(self, delivery_tag: int) -> bool:
        """Whether *delivery_tag* is known to be settled."""
        return self._acks.is_settled(delivery_tag)

    def nack(self, delivery_tag: int, multiple: bool = False, requeue: bool = True) -> Coroutine[Any, Any, None]:
        """``basic.nack``; raises as :meth:`ack` does."""
        if self._error is not None:
            raise self._lost(self._error)
        data = encode_nack(self.channel.number, delivery_tag, multiple, requeue)
        self._count_refused(self._settle(delivery_tag, multiple, data), requeue)
        return self.output.drain()

    def reject(self, delivery_tag: int, requeue: bool = False) -> Coroutine[Any, Any, None]:
        """``basic.reject``; raises as :meth:`ack` does."""
        if self._error is not None:
            raise self._lost(self._error)
        data = encode_reject(self.channel.number, delivery_tag, requeue)
        self._count_refused(self._settle(delivery_tag, False, data), requeue)
        return self.output.drain()

    def settle_all(self, delivery_tags: Sequence[int], *, requeue: bool | None) -> Coroutine[Any, Any, None]:
        """Settle *delivery_tags*, which ascend, by as few methods as it takes; takes effect at once.

        Args:
            delivery_tags: of this channel; what a ``multiple`` has settled already is passed over.
            requeue: of ``basic.nack``; None for ``basic.ack``.

        Raises:
            DeliveryLost: this channel is gone; nothing is sent.
        """
        if self._error is not None:
            raise self._lost(self._error)
        number = self.channel.number
        together, apart = self._acks.split(delivery_tags)
        if together and requeue is None:
            if not self._is_due:
                self._is_due = True
                self.output.before_flush(self.flush)
            self._tally.acked += self._acks.unsettled_up_to(together)
            self._acks.save_up_to(together)
        elif together:
            data = encode_nack(number, together, True, bool(requeue))
            self._count_refused(self._settle(together, True, data), bool(requeue))
        for tag in apart:
            if requeue is None:
                self._tally.acked += self._settle(tag, False, encode_ack(number, tag, False))
            else:
                self._count_refused(self._settle(tag, False, encode_nack(number, tag, False, requeue)), requeue)
        return self.output.drain()

    def requeue(self, delivery_tag: int) -> None:
        """Hand a delivery back, by whichever method the broker knows."""
        if self.server_supports("basic.nack"):
            _ = self.nack(delivery_tag, requeue=True)
        else:
            _ = self.reject(delivery_tag, requeue=True)

    def _settle(self, delivery_tag: int, multiple: bool, data: bytes) -> int:
        """Write *data*, which settles *delivery_tag*, unless that was settled before; returns how many that settles."""
        self._acks.check(delivery_tag)
        count = self._acks.unsettled_up_to(delivery_tag) if multiple else 1
        self.flush()
        self.output.write(data)
        self._acks.note(delivery_tag, multiple)
        return count

    def _count_refused(self, count: int, requeue: bool) -> None:
        if requeue:
            self._tally.requeued += count
        else:
            self._tally.rejected += count

    def _lost(self, cause: Exception) -> DeliveryLost:
        error = DeliveryLost(f"the channel that brought the message is gone, the broker redelivers it: {cause}")
        error.__cause__ = cause
        return error

    # ---------------------------------------------------------------------------------- what the channel tells it

    def flush(self) -> None:
        """Write the acks that were saved up or held back."""
        self._is_due = False
        if due := self._acks.take_due():
            self.output.write(encode_ack(self.channel.number, due, True))
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None
            for tag in self._acks.take_held():
                self.output.write(encode_ack(self.channel.number, tag, False))

    def begin_close(self) -> None:
        """The channel is about to be closed: from now on, no ack waits for others."""
        self._may_hold = False
        self.flush()

    def on_rollback(self) -> None:
        """What is settled is no longer known."""
        self._acks.stop_counting()

    def end(self, error: Exception) -> None:
        """The channel is gone, and with it what was to be written."""
        self._error = error
        self._acks.take_due()
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None
