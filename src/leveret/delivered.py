"""A delivery as the frames that AMQP has for it, for those who make an incoming message by hand."""

from __future__ import annotations

import inspect
from abc import ABC
from collections.abc import Container, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from pamqp.commands import Basic
from pamqp.header import ContentHeader

from leveret.exceptions import DeliveryLost
from leveret.message import ReturnedMessage
from leveret.outcome import DONE, in_turn
from leveret.wire.codec import Properties


@dataclass(frozen=True)
class DeliveredMessage(ABC):
    """What ``IncomingMessage(…)`` takes: the frames of a delivery, and the channel that is told of acks.

    Attributes:
        delivery: the method that it came with.
        header: its properties are those of the message.
        body: the payload.
        channel: has ``is_closed``, ``basic_ack()``, ``basic_nack()`` and ``basic_reject()``, as aiormq's channels do;
            None where nobody settles the message.
    """

    delivery: Basic.Deliver | Basic.GetOk | Basic.GetEmpty | Basic.Return
    header: ContentHeader
    body: bytes
    channel: Any

    def _fact(self, name: str) -> Any:
        return getattr(self.delivery, name, None)

    @property
    def routing_key(self) -> str | None:
        """The routing key that it was published with."""
        return self._fact("routing_key")  # type: ignore[no-any-return]

    @property
    def exchange(self) -> str | None:
        """The exchange that it was published to."""
        return self._fact("exchange")  # type: ignore[no-any-return]

    @property
    def delivery_tag(self) -> int | None:
        """The number of the delivery on its channel; None for one that came back."""
        return self._fact("delivery_tag")  # type: ignore[no-any-return]

    @property
    def redelivered(self) -> bool | None:
        """Whether it was delivered before; None for one that came back."""
        return self._fact("redelivered")  # type: ignore[no-any-return]

    @property
    def consumer_tag(self) -> str | None:
        """The consumer that it was delivered to, if it was."""
        return self._fact("consumer_tag")  # type: ignore[no-any-return]

    @property
    def message_count(self) -> int | None:
        """How many messages were left, if it was fetched."""
        return self._fact("message_count")  # type: ignore[no-any-return]

    @property
    def properties(self) -> Properties:
        """The properties, as a message keeps them."""
        given = self.header.properties
        return Properties(*(getattr(given, name) for name in Basic.Properties.__slots__))

    @property
    def wire(self) -> WireOfDelivered:
        """The channel, as a message sees it."""
        return WireOfDelivered(self.channel)


DeliveredMessage.register(ReturnedMessage)  # which is what aiormq gives to the publisher of one that came back


class WireOfDelivered:
    """Settles on a channel with aiormq's methods.

    Args:
        channel: see :class:`DeliveredMessage`.
    """

    __slots__ = ("channel",)

    cancelled: Container[bytes | None] = ()

    def __init__(self, channel: Any) -> None:
        self.channel = channel

    @property
    def is_open(self) -> bool:
        """Whether there is a channel that is not closed."""
        return self.channel is not None and not self.channel.is_closed

    def server_supports(self, capability: str) -> bool:
        """Whether the broker knows ``basic.nack``, the only one that is asked for."""
        return bool(getattr(self.channel.connection, capability.replace(".", "_"), True))

    def ack(self, delivery_tag: int, multiple: bool = False) -> Coroutine[Any, Any, None]:
        """``basic_ack()``"""
        return self._settle("basic_ack", delivery_tag, multiple=multiple)

    def nack(self, delivery_tag: int, multiple: bool = False, requeue: bool = True) -> Coroutine[Any, Any, None]:
        """``basic_nack()``"""
        return self._settle("basic_nack", delivery_tag, multiple=multiple, requeue=requeue)

    def reject(self, delivery_tag: int, requeue: bool = False) -> Coroutine[Any, Any, None]:
        """``basic_reject()``"""
        return self._settle("basic_reject", delivery_tag, requeue=requeue)

    def settle_all(self, delivery_tags: Sequence[int], *, requeue: bool | None) -> Coroutine[Any, Any, None]:
        """One after another."""
        return in_turn([self.ack(tag) if requeue is None else self.nack(tag, requeue=requeue) for tag in delivery_tags])

    def _settle(self, method: str, delivery_tag: int, **options: bool) -> Coroutine[Any, Any, None]:
        if not delivery_tag:  # a delivery that was made up has none
            return DONE
        if not self.is_open:
            raise DeliveryLost("the channel that brought the message is gone")
        done = getattr(self.channel, method)(delivery_tag=delivery_tag, **options)
        return done if inspect.isawaitable(done) else DONE  # type: ignore[return-value]
