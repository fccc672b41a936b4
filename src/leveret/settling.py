"""How the messages of one consumer are settled: what a callback may return for it, and which way acks take."""

from __future__ import annotations

import enum
import inspect
import threading
from collections.abc import Awaitable, Callable, Container, Coroutine, Sequence
from typing import Any, Protocol

from leveret.message import IncomingMessage, Wire


class Verdict(enum.Enum):
    """What a callback may return, to have its message settled.

    Each member is also a name of the package: ``return leveret.Ack``.

    Attributes:
        ACK: as ``message.ack()``: done.
        NACK: as ``message.nack()``: back to the queue, which is no failed delivery to a quorum queue of RabbitMQ 4.3.
        REJECT: as ``message.reject()``: dropped or dead-lettered.
        REQUEUE: as ``message.reject(requeue=True)``: back to the queue, as a failed delivery.
    """

    ACK = "ack"
    NACK = "nack"
    REJECT = "reject"
    REQUEUE = "requeue"


Ack, Nack, Reject, Requeue = Verdict.ACK, Verdict.NACK, Verdict.REJECT, Verdict.REQUEUE


def settle(message: IncomingMessage, verdict: Verdict) -> Coroutine[Any, Any, None]:
    """Do to *message* what *verdict* says.

    Raises:
        MessageProcessError, DeliveryLost, MethodNotImplemented: as the methods of the message.
    """
    if verdict is Ack:
        return message.ack()
    if verdict is Nack:
        return message.nack()
    return message.reject(requeue=verdict is Requeue)


def ack_on_return(callback: Callable[[IncomingMessage], object]) -> Callable[[IncomingMessage], Awaitable[object]]:
    """Make of *callback* one that says that its message is done, unless it says or does otherwise."""

    async def settling(message: IncomingMessage) -> object:
        result = callback(message)
        if inspect.isawaitable(result):
            result = await result
        return result if isinstance(result, Verdict) or message.processed else Ack

    return settling


class BatchingWire(Wire, Protocol):
    """A wire that can keep acks, to write many at a time."""

    def ack_later(self, delivery_tag: int, count: int) -> Coroutine[Any, Any, None]:
        """``basic.ack``, with others."""
        ...


class WireOfConsumer:
    """A wire, as the messages of a consumer see it that settles in a way of its own.

    Args:
        wire: what settles on the channel that delivers.
        ack_batch: how many acks are written at a time; None for those of one turn of the event loop.
        thread: the only one that may settle, by its identifier; None where no other thread sees the messages.
    """

    __slots__ = ("_ack_batch", "_thread", "_wire")

    def __init__(self, wire: BatchingWire, ack_batch: int | None, thread: int | None) -> None:
        self._wire = wire
        self._ack_batch = ack_batch
        self._thread = thread

    @property
    def channel(self) -> Any:
        """As of the wire."""
        return self._wire.channel

    @property
    def cancelled(self) -> Container[bytes | None]:
        """As of the wire."""
        return self._wire.cancelled

    @property
    def is_open(self) -> bool:
        """As of the wire."""
        return self._wire.is_open

    def server_supports(self, capability: str) -> bool:
        """As of the wire."""
        return self._wire.server_supports(capability)

    def ack(self, delivery_tag: int, multiple: bool = False) -> Coroutine[Any, Any, None]:
        """``basic.ack``, later if it can wait."""
        self._check_thread()
        if self._ack_batch is None or multiple:
            return self._wire.ack(delivery_tag, multiple)
        return self._wire.ack_later(delivery_tag, self._ack_batch)

    def nack(self, delivery_tag: int, multiple: bool = False, requeue: bool = True) -> Coroutine[Any, Any, None]:
        """``basic.nack``"""
        self._check_thread()
        return self._wire.nack(delivery_tag, multiple, requeue)

    def reject(self, delivery_tag: int, requeue: bool = False) -> Coroutine[Any, Any, None]:
        """``basic.reject``"""
        self._check_thread()
        return self._wire.reject(delivery_tag, requeue)

    def settle_all(self, delivery_tags: Sequence[int], *, requeue: bool | None) -> Coroutine[Any, Any, None]:
        """As of the wire: many are a batch already."""
        self._check_thread()
        return self._wire.settle_all(delivery_tags, requeue=requeue)

    def _check_thread(self) -> None:
        if self._thread is not None and threading.get_ident() != self._thread:
            raise RuntimeError(
                "a message is settled in the thread of the event loop only: with thread=True, return leveret.Ack,"
                " Nack, Reject or Requeue"
            )
