"""Exchanges: declare, bind, publish."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeAlias

from pamqp.commands import Basic
from pamqp.commands import Exchange as ExchangeMethods

from leveret.bulk import Bulk, Messages
from leveret.exceptions import PublishNotSent
from leveret.lazy import pass_on
from leveret.message import Message, ReturnedMessage
from leveret.outcome import returns_awaitable
from leveret.records import ExchangeBinding, ExchangeRecord, exchange_key
from leveret.report import PublishReport
from leveret.types import Arguments, TimeoutType
from leveret.types import ExchangeType as ExchangeType
from leveret.wire.methods import make

if TYPE_CHECKING:
    from leveret.channel import Channel

pass_on(__name__)


class Exchange:
    """An exchange, as seen from one channel. Get one from ``channel.declare_exchange()`` or ``get_exchange()``.

    https://www.rabbitmq.com/docs/exchanges
    """

    __slots__ = (
        "__dict__",
        "__weakref__",
        "arguments",
        "auto_delete",
        "channel",
        "durable",
        "internal",
        "name",
        "passive",
        "type",
    )

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
            raise self._is_internal()
        if immediate:
            raise ValueError("RabbitMQ does not implement immediate=True, and would close the connection (540)")
        if not isinstance(message, Message):
            raise TypeError(f"publish() takes a Message, not {type(message).__name__}")
        channel = self.channel
        if not wait_for_link and not channel.is_live:
            raise PublishNotSent(f"not sent: {channel.why_not_live()}, and the publish was not to wait for it")
        return channel.write_publish(
            self.name, routing_key, message.wire_properties(), message.body, mandatory, timeout, retry_unknown
        )

    @returns_awaitable
    def publish_nowait(
        self, message: Message, routing_key: str, *, mandatory: bool = True, timeout: TimeoutType = None
    ) -> Coroutine[Any, Any, Basic.Ack | ReturnedMessage | None]:
        """Publish now or not at all; what is returned awaits the broker's confirmation (``basic.publish``).

        As :meth:`publish`, but where that would wait before a byte is written, this raises at the call. So a publisher
        that must not fall behind learns at once that it has to drop or keep its message.

        Args:
            message: is not changed; its ``message_id`` is yours.
            routing_key: at most 255 bytes of UTF-8.
            mandatory: have the broker return the message if no queue takes it.
            timeout: seconds that the confirm may take; None for the connection's ``operation_timeout``.

        Returns:
            as :meth:`publish`.

        Raises:
            PublishNotSent: the link is down, the socket is full, the broker stopped the flow of the channel, or
                other publishes wait for the same. This and the next two are raised by the call.
            ConnectionBlocked: the broker blocks publishers (a PublishNotSent).
            ChannelInvalidStateError, ValueError, TypeError, MessageTooLarge: as :meth:`publish`.
            MessageReturned, MessageNacked, PublishOutcomeUnknown: when awaited, as :meth:`publish`.

        Cancellation: it was sent; its number and its late confirm disturb nobody.

        Reconnect: as :meth:`publish` with ``wait_for_link=False``; it is not sent again.

        https://www.rabbitmq.com/docs/confirms#publisher-confirms
        """
        channel = self.channel
        is_live = channel.is_live
        if is_live:
            channel.wire.publisher.check_not_held()
        # On a live channel there is nothing to wait for: it need not look again.
        return self.publish(message, routing_key, mandatory=mandatory, timeout=timeout, wait_for_link=is_live)

    async def publish_many(
        self,
        messages: Messages,
        routing_key: str | None = None,
        *,
        window: int = 1000,
        window_bytes: int = 16 * 1024 * 1024,
        mandatory: bool = True,
        timeout: TimeoutType = None,
        retry_unknown: bool = False,
    ) -> PublishReport:
        """Publish many messages, and wait until the last of them is confirmed.

        They go out in their order, as many at a time as the *window* allows, and the iterable is only asked for
        another one when there is room. So it may be lazy, and endless: a slow broker slows it down, and memory is
        bounded. The event loop keeps turning, also for an iterable that never waits. Any number of tasks may do this
        on one channel at a time, next to :meth:`publish`; no pool of channels is needed.

        Args:
            messages: an iterable or asynchronous iterable of :class:`~leveret.Message`, or of pairs of a message and
                its routing key. The same message may be in it more than once. An asynchronous generator is closed
                when publishing ends before it does.
            routing_key: of the messages that come without one; at most 255 bytes of UTF-8.
            window: how many messages may be unconfirmed at a time.
            window_bytes: how many bytes of bodies and properties they may have together. A larger message goes alone.
            mandatory: have the broker return messages that no queue takes.
            timeout: seconds for each message, from when it is taken to its confirm; None for the connection's
                ``operation_timeout``, ``math.inf`` for no limit.
            retry_unknown: on a connection of :func:`~leveret.connect_robust`, send again what the link died with
                before its confirm came. The broker may then have it twice. What ends with the channel that was closed
                over a publish is not sent again.

        Returns:
            a :class:`~leveret.PublishReport`, which is true if every message is confirmed and none came back. What
            the broker or the network did to a message is in its ``failures`` and is not raised: MessageReturned
            (whatever the channel's ``on_return_raises``), MessageNacked, PublishNotSent, PublishOutcomeUnknown.
            Without publisher confirms it says what was written.

        Raises:
            ChannelInvalidStateError: the channel is not open to begin with.
            TypeError: an item that is neither; a message without a routing key; a header that AMQP does not have.
            ValueError: an internal exchange, a window below 1, or a value that AMQP cannot carry.
            MessageTooLarge: the headers of a message do not fit into one frame.

        A mistake in a message names its number; nothing of that message is sent, and no later one is taken. It, and
        what *messages* itself raises, comes out when all messages before it have ended. The exception then has the
        report of those as ``publish_report``.

        Cancellation: what was written stays written, and its late confirms disturb nobody; nothing more is sent, and
        nothing more is taken. There is no report then.

        Reconnect: what is not yet written waits for the link, for as long as its time allows; what was written and
        not confirmed is PublishOutcomeUnknown, or sent again with *retry_unknown*; then it goes on. If the channel
        is closed for good, what was taken and not written is PublishNotSent, and so is the rest of a list or
        whatever else has a length. Of other iterables no more is taken; ``stopped_by`` says why.

        https://www.rabbitmq.com/docs/confirms#publisher-confirms
        """
        if self.internal:
            raise self._is_internal()
        bulk = Bulk(
            self.channel,
            self.name,
            routing_key,
            window=window,
            window_bytes=window_bytes,
            mandatory=mandatory,
            timeout=timeout,
            retry_unknown=retry_unknown,
        )
        return await bulk.run(messages)

    def _is_internal(self) -> ValueError:
        return ValueError(f"exchange {self.name!r} is internal: clients cannot publish to it")

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


ExchangeParamType: TypeAlias = Exchange | str
"""Where an exchange, or its name, will do."""


def exchange_name(value: ExchangeParamType) -> str:
    """The name of what may be an exchange or its name."""
    if isinstance(value, Exchange):
        return value.name
    if isinstance(value, str):
        return value
    raise ValueError(f"an exchange must be an Exchange or its name, not {value!r}")
