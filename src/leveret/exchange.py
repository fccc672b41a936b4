"""Exchanges: declare, bind, publish."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from pamqp.commands import Basic
from pamqp.commands import Exchange as ExchangeMethods

from leveret.exceptions import PublishNotSent
from leveret.message import Message, ReturnedMessage
from leveret.outcome import returns_awaitable
from leveret.records import ExchangeBinding, ExchangeRecord, exchange_key
from leveret.types import Arguments, ExchangeType, TimeoutType
from leveret.wire.methods import make

if TYPE_CHECKING:
    from leveret.channel import Channel


class Exchange:
    """An exchange, as seen from one channel. Get one from ``channel.declare_exchange()`` or ``get_exchange()``.

    https://www.rabbitmq.com/docs/exchanges
    """

    def __init__(
        self,
        channel: Channel,
        name: str,
        type: ExchangeType | str = ExchangeType.DIRECT,
        *,
        auto_delete: bool = False,
        durable: bool = False,
        internal: bool = False,
        passive: bool = False,
        arguments: Arguments = None,
    ) -> None:
        self.channel = channel
        self.name = name
        self.type = type.value if isinstance(type, ExchangeType) else type
        self.auto_delete = auto_delete
        self.durable = durable
        self.internal = internal
        self.passive = passive
        self.arguments = arguments or {}

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return (
            f"<Exchange({self.name}): auto_delete={self.auto_delete}, durable={self.durable}, "
            f"type={self.type}, arguments={self.arguments!r}>"
        )

    async def declare(self, timeout: TimeoutType = None, *, robust: bool = True) -> ExchangeMethods.DeclareOk:
        """``exchange.declare``

        Args:
            timeout: seconds; None for the connection's ``operation_timeout``.
            robust: declare it again after a reconnect, on a connection of :func:`~leveret.connect_robust`.

        Raises:
            ChannelClosed and others: as :meth:`Channel.declare_exchange`.
        """
        record = ExchangeRecord(
            name=self.name,
            type=self.type,
            durable=self.durable,
            auto_delete=self.auto_delete,
            internal=self.internal,
            arguments=self.arguments,
        )
        result: ExchangeMethods.DeclareOk = await self.channel.call(record.method(passive=self.passive), timeout)
        if robust and not self.passive:
            self.channel.remember(record)
        return result

    async def bind(
        self,
        exchange: Exchange | str,
        routing_key: str = "",
        *,
        arguments: Arguments = None,
        timeout: TimeoutType = None,
        robust: bool = True,
    ) -> ExchangeMethods.BindOk:
        """Let what is published to *exchange* flow into this one (``exchange.bind``).

        Args:
            exchange: the source, or its name.
            routing_key: which messages, as the source's type reads it.
            arguments: such as the headers to match.
            timeout: seconds; None for the connection's ``operation_timeout``.
            robust: bind it again after a reconnect, on a connection of :func:`~leveret.connect_robust`.

        Raises:
            ChannelNotFoundEntity: one of the two does not exist. This closes the channel.
            ChannelAccessRefused: the default exchange, or no permission. This closes the channel.
            ChannelInvalidStateError: the channel is not open.
            TimeoutError: no answer in time; the channel stays usable, and the late reply is swallowed.
            ValueError: a name of more than 255 bytes.

        https://www.rabbitmq.com/docs/e2e
        """
        binding = self._binding(exchange, routing_key, arguments)
        result: ExchangeMethods.BindOk = await self.channel.call(binding.method(), timeout)
        if robust:
            self.channel.remember(binding)
        return result

    async def unbind(
        self,
        exchange: Exchange | str,
        routing_key: str = "",
        arguments: Arguments = None,
        timeout: TimeoutType = None,
    ) -> ExchangeMethods.UnbindOk:
        """Undo :meth:`bind`, with the same arguments (``exchange.unbind``).

        Args:
            exchange: the source, or its name.
            routing_key: as it was bound.
            arguments: as it was bound.
            timeout: seconds; None for the connection's ``operation_timeout``.

        Raises:
            ChannelAccessRefused: the default exchange, or no permission. This closes the channel.
            ChannelInvalidStateError: the channel is not open.
            TimeoutError: no answer in time; the channel stays usable, and the late reply is swallowed.
            ValueError: a name of more than 255 bytes.
        """
        binding = self._binding(exchange, routing_key, arguments)
        with self.channel.forgetting(binding.key):
            result: ExchangeMethods.UnbindOk = await self.channel.call(binding.undo(), timeout)
        return result

    def _binding(self, source: Exchange | str, routing_key: str, arguments: Arguments) -> ExchangeBinding:
        return ExchangeBinding(
            destination=self.name, source=exchange_name(source), routing_key=routing_key, arguments=arguments
        )

    @returns_awaitable
    def publish(
        self,
        message: Message,
        routing_key: str,
        *,
        mandatory: bool = True,
        immediate: bool = False,
        timeout: TimeoutType = None,
        wait_for_link: bool = True,
        retry_unknown: bool = False,
    ) -> Coroutine[Any, Any, Basic.Ack | ReturnedMessage | None]:
        """Publish, and await the broker's confirmation (``basic.publish``).

        The message is numbered and on its way when this returns; awaiting the result waits for the confirm. Any
        number of tasks may publish on one channel at a time. While the broker blocks publishers, or the socket
        is full, messages wait in their order.

        Args:
            message: is not changed; its ``message_id`` is yours.
            routing_key: at most 255 bytes of UTF-8.
            mandatory: have the broker return the message if no queue takes it.
            immediate: must be False; RabbitMQ has no such thing.
            timeout: seconds for the whole; None for the connection's ``operation_timeout``.
            wait_for_link: on a connection of :func:`~leveret.connect_robust` that is down, wait for it to be back;
                False fails at once.
            retry_unknown: on such a connection, send it again when the link dies before the confirm came. The broker
                may then have it twice. What ends with the channel that was closed over a publish is not sent again.

        Returns:
            ``Basic.Ack`` when the broker took responsibility for it; the :class:`~leveret.ReturnedMessage`
            when it came back and the channel does not have ``on_return_raises``; None without publisher
            confirms.

        Raises:
            MessageReturned: no queue took it, and the channel has ``on_return_raises``.
            MessageNacked: the broker refused it.
            PublishNotSent: not a byte was written (also a TimeoutError when time ran out, and
                ConnectionBlocked while the broker blocks publishers). Raised by the call itself where the link is
                down and it does not wait for it, or too many wait already.
            PublishOutcomeUnknown: written, but the channel was lost before the confirm, or time ran out
                (then also a TimeoutError).
            ChannelInvalidStateError: the channel is not open. This and what follows is raised by the call.
            ValueError: an internal exchange, ``immediate``, or a value that AMQP cannot carry.
            TypeError: not a Message, or a header of a type that AMQP does not have.
            MessageTooLarge: the headers do not fit into one frame.

        Cancellation: the message may have been sent; its number and its late confirm disturb nobody.

        https://www.rabbitmq.com/docs/confirms#publisher-confirms
        """
        if self.internal:
            raise ValueError(f"exchange {self.name!r} is internal: clients cannot publish to it")
        if immediate:
            raise ValueError("RabbitMQ does not implement immediate=True, and would close the connection (540)")
        if not isinstance(message, Message):
            raise TypeError(f"publish() takes a Message, not {type(message).__name__}")
        channel = self.channel
        if not wait_for_link and not channel.is_live:
            raise PublishNotSent("not sent: the channel is not open, and the publish was not to wait for it")
        return channel.write_publish(
            self.name, routing_key, message.wire_properties(), message.body, mandatory, timeout, retry_unknown
        )

    async def delete(self, if_unused: bool = False, timeout: TimeoutType = None) -> ExchangeMethods.DeleteOk:
        """Delete it (``exchange.delete``), with *if_unused* only while nothing is bound to it.

        Raises:
            ChannelPreconditionFailed: *if_unused*, and it is in use. This closes the channel.
            ChannelAccessRefused: a predeclared exchange, or no permission. This closes the channel.
            ChannelInvalidStateError: the channel is not open.
            TimeoutError: no answer in time; the channel stays usable, and the late reply is swallowed.
            ValueError: a name of more than 255 bytes.
        """
        with self.channel.forgetting(exchange_key(self.name)):
            result: ExchangeMethods.DeleteOk = await self.channel.call(
                make(ExchangeMethods.Delete, exchange=self.name, if_unused=if_unused), timeout
            )
        return result


def exchange_name(exchange: Exchange | str) -> str:
    """The name of what may be an exchange or its name."""
    if isinstance(exchange, Exchange):
        return exchange.name
    if isinstance(exchange, str):
        return exchange
    raise ValueError(f"an exchange must be an Exchange or its name, not {exchange!r}")
