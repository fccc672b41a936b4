"""What aio-pika's users find below a channel or a connection: aiormq's methods, as thin views.

leveret has no aiormq. Code that reaches below aio-pika, by ``connection.transport``, ``message.channel`` or
``channel.get_underlay_channel()``, finds the names here that such code uses. A view belongs to one incarnation: what is
declared through it is not restored, and after a reconnect there is another one. Calls with ``nowait`` return None.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, NamedTuple, TypeVar

from pamqp.base import Frame
from pamqp.commands import Basic, Exchange, Queue
from yarl import URL

from leveret.exceptions import ChannelClosed, ChannelInvalidStateError, ConnectionClosed
from leveret.types import Arguments, ExchangeType, FieldValue, TimeoutType
from leveret.wire.channel import WireChannel
from leveret.wire.methods import make
from leveret.wire.transport import Transport

CLOSE_TIMEOUT = 10

R = TypeVar("R", bound=Frame)

Reason = BaseException | type[BaseException] | None


class Tune(NamedTuple):
    """What was negotiated.

    Attributes:
        channel_max: how many channels there may be.
        frame_max: bytes of a frame.
        heartbeat: seconds; 0 for none.
    """

    channel_max: int
    frame_max: int
    heartbeat: int


class UnderlayChannel:
    """One channel on one connection, with the methods that aiormq's channels have.

    aio-pika has two objects here, one in the other; this is both.

    Args:
        wire: the channel.
        known_as: a consumer tag on the wire → the one that the user knows.
    """

    def __init__(self, wire: WireChannel, known_as: Callable[[str], str] = str) -> None:
        self._wire = wire
        self._known_as = known_as

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._wire!r}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UnderlayChannel) and other._wire is self._wire

    def __hash__(self) -> int:
        return hash(self._wire)

    @property
    def channel(self) -> UnderlayChannel:
        """Itself."""
        return self

    @property
    def connection(self) -> UnderlayConnection:
        """The connection that it is on."""
        return UnderlayConnection(self._wire.transport)

    @property
    def number(self) -> int:
        """Its number."""
        return self._wire.number

    @property
    def is_closed(self) -> bool:
        """Whether this channel is gone; the handle may have another one by now."""
        return not self._wire.is_open

    @property
    def closing(self) -> asyncio.Future[None]:
        """A future that fails when it is gone, with what ended it; the same for all that look."""
        return _closing_of(self._wire).future

    @property
    def consumers(self) -> Mapping[str, Any]:
        """What consumes on it, by the tag that ``queue.consume()`` returned."""
        tags = {tag: tag.decode("utf-8", "surrogateescape") for tag in self._wire.consumers}
        return {self._known_as(tags[tag]): each for tag, each in self._wire.consumers.items()}

    async def close(self, exc: Reason = None, timeout: TimeoutType = None) -> None:
        """Close it; a robust channel gets another one.

        Args:
            exc: what those who wait get; None for a ChannelClosed.
            timeout: seconds for the broker's answer; None for 10.
        """
        self._wire.close(exc if isinstance(exc, Exception) else ChannelClosed("the underlay channel was closed"))
        await self._wire.wait_closed(_deadline(timeout))

    def _seconds(self, timeout: TimeoutType) -> float:
        return self._wire.transport.parameters.operation_timeout if timeout is None else timeout

    async def _call(self, method: Frame, reply: type[R], timeout: TimeoutType) -> R:
        answer = await self._wire.call(method, self._seconds(timeout))
        assert isinstance(answer, reply)
        return answer

    async def _send_or_call(self, method: Frame, nowait: bool, reply: type[R], timeout: TimeoutType) -> R | None:
        """With *nowait*, which the *method* has to say as well, the broker answers nothing."""
        if nowait:
            self._wire.send(method)
            return None
        return await self._call(method, reply, timeout)

    async def queue_declare(
        self,
        queue: str = "",
        *,
        passive: bool = False,
        durable: bool = False,
        exclusive: bool = False,
        auto_delete: bool = False,
        nowait: bool = False,
        arguments: Arguments = None,
        timeout: TimeoutType = None,
    ) -> Queue.DeclareOk | None:
        """``queue.declare``"""
        method = make(
            Queue.Declare,
            queue=queue,
            passive=passive,
            durable=durable,
            exclusive=exclusive,
            auto_delete=auto_delete,
            nowait=nowait,
            arguments=arguments or {},
        )
        return await self._send_or_call(method, nowait, Queue.DeclareOk, timeout)

    async def queue_bind(
        self,
        queue: str,
        exchange: str,
        routing_key: str = "",
        nowait: bool = False,
        arguments: Arguments = None,
        timeout: TimeoutType = None,
    ) -> Queue.BindOk | None:
        """``queue.bind``"""
        method = make(
            Queue.Bind,
            queue=queue,
            exchange=exchange,
            routing_key=routing_key,
            nowait=nowait,
            arguments=arguments or {},
        )
        return await self._send_or_call(method, nowait, Queue.BindOk, timeout)

    async def queue_unbind(
        self,
        queue: str = "",
        exchange: str = "",
        routing_key: str = "",
        arguments: Arguments = None,
        timeout: TimeoutType = None,
    ) -> Queue.UnbindOk:
        """``queue.unbind``"""
        method = make(Queue.Unbind, queue=queue, exchange=exchange, routing_key=routing_key, arguments=arguments or {})
        return await self._call(method, Queue.UnbindOk, timeout)

    async def queue_delete(
        self,
        queue: str = "",
        if_unused: bool = False,
        if_empty: bool = False,
        nowait: bool = False,
        timeout: TimeoutType = None,
    ) -> Queue.DeleteOk | None:
        """``queue.delete``"""
        method = make(Queue.Delete, queue=queue, if_unused=if_unused, if_empty=if_empty, nowait=nowait)
        return await self._send_or_call(method, nowait, Queue.DeleteOk, timeout)

    async def queue_purge(
        self, queue: str = "", nowait: bool = False, timeout: TimeoutType = None
    ) -> Queue.PurgeOk | None:
        """``queue.purge``"""
        return await self._send_or_call(make(Queue.Purge, queue=queue, nowait=nowait), nowait, Queue.PurgeOk, timeout)

    async def exchange_declare(
        self,
        exchange: str = "",
        *,
        exchange_type: ExchangeType | str = ExchangeType.DIRECT,
        passive: bool = False,
        durable: bool = False,
        auto_delete: bool = False,
        internal: bool = False,
        nowait: bool = False,
        arguments: Arguments = None,
        timeout: TimeoutType = None,
    ) -> Exchange.DeclareOk | None:
        """``exchange.declare``"""
        method = make(
            Exchange.Declare,
            exchange=exchange,
            exchange_type=exchange_type.value if isinstance(exchange_type, ExchangeType) else exchange_type,
            passive=passive,
            durable=durable,
            auto_delete=auto_delete,
            internal=internal,
            nowait=nowait,
            arguments=arguments or {},
        )
        return await self._send_or_call(method, nowait, Exchange.DeclareOk, timeout)

    async def exchange_bind(
        self,
        destination: str = "",
        source: str = "",
        routing_key: str = "",
        *,
        nowait: bool = False,
        arguments: Arguments = None,
        timeout: TimeoutType = None,
    ) -> Exchange.BindOk | None:
        """``exchange.bind``"""
        method = make(
            Exchange.Bind,
            destination=destination,
            source=source,
            routing_key=routing_key,
            nowait=nowait,
            arguments=arguments or {},
        )
        return await self._send_or_call(method, nowait, Exchange.BindOk, timeout)

    async def exchange_unbind(
        self,
        destination: str = "",
        source: str = "",
        routing_key: str = "",
        *,
        nowait: bool = False,
        arguments: Arguments = None,
        timeout: TimeoutType = None,
    ) -> Exchange.UnbindOk | None:
        """``exchange.unbind``"""
        method = make(
            Exchange.Unbind,
            destination=destination,
            source=source,
            routing_key=routing_key,
            nowait=nowait,
            arguments=arguments or {},
        )
        return await self._send_or_call(method, nowait, Exchange.UnbindOk, timeout)

    async def exchange_delete(
        self, exchange: str = "", *, if_unused: bool = False, nowait: bool = False, timeout: TimeoutType = None
    ) -> Exchange.DeleteOk | None:
        """``exchange.delete``"""
        method = make(Exchange.Delete, exchange=exchange, if_unused=if_unused, nowait=nowait)
        return await self._send_or_call(method, nowait, Exchange.DeleteOk, timeout)

    async def basic_qos(
        self,
        *,
        prefetch_size: int | None = None,
        prefetch_count: int | None = None,
        global_: bool = False,
        timeout: TimeoutType = None,
    ) -> Basic.QosOk:
        """``basic.qos``; RabbitMQ has no *prefetch_size*.

        Raises:
            ValueError: *prefetch_size* is not 0: the broker would close the connection.
        """
        if prefetch_size:
            raise ValueError("RabbitMQ does not implement prefetch_size, and would close the connection (540)")
        method = make(Basic.Qos, prefetch_count=prefetch_count or 0, global_=global_)
        return await self._call(method, Basic.QosOk, timeout)

    async def basic_cancel(
        self, consumer_tag: str, *, nowait: bool = False, timeout: TimeoutType = None
    ) -> Basic.CancelOk | None:
        """``basic.cancel``; behind the back of a robust channel, which does not forget the consumer."""
        return await self._wire.cancel(consumer_tag, self._seconds(timeout), nowait=nowait)

    def basic_ack(self, delivery_tag: int, multiple: bool = False) -> Coroutine[Any, Any, None]:
        """``basic.ack``"""
        return self._wire.settler.ack(delivery_tag, multiple)

    def basic_nack(self, delivery_tag: int, multiple: bool = False, requeue: bool = True) -> Coroutine[Any, Any, None]:
        """``basic.nack``"""
        return self._wire.settler.nack(delivery_tag, multiple, requeue)

    def basic_reject(self, delivery_tag: int, *, requeue: bool = True) -> Coroutine[Any, Any, None]:
        """``basic.reject``"""
        return self._wire.settler.reject(delivery_tag, requeue)


class _Closing:
    """Ends the future of :attr:`UnderlayChannel.closing`. A channel has one among its watchers, so it lasts as long."""

    def __init__(self, wire: WireChannel) -> None:
        self._wire = wire
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def __call__(self) -> None:
        if not self.future.done():
            self.future.set_exception(self._wire.error or ChannelClosed())
            self.future.exception()  # nobody has to look


def _closing_of(wire: WireChannel) -> _Closing:
    watchers = wire._watchers  # pyright: ignore[reportPrivateUsage]
    closing = next((each for each in watchers if isinstance(each, _Closing)), None)
    if closing is None:
        closing = _Closing(wire)
        wire.watch(closing)
    elif closing.future.cancelled():  # somebody waited for it no longer
        closing.future = asyncio.get_running_loop().create_future()
    if not wire.is_open:
        closing()
    return closing


class UnderlayConnection:
    """One TCP connection, with what aiormq's connections tell.

    aio-pika has two objects here, one in the other; this is both.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._transport!r}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UnderlayConnection) and other._transport is self._transport

    def __hash__(self) -> int:
        return hash(self._transport)

    @property
    def connection(self) -> UnderlayConnection:
        """Itself."""
        return self

    @property
    def url(self) -> URL:
        """Where it is connected to."""
        parameters = self._transport.parameters
        return URL.build(
            scheme="amqps" if parameters.ssl else "amqp",
            user=parameters.login,
            password=parameters.password,
            host=parameters.host,
            port=parameters.port,
            path=f"/{parameters.virtualhost}",
        )

    @property
    def is_closed(self) -> bool:
        """Whether this connection is gone; the handle may have another one by now."""
        return not self._transport.is_open

    @property
    def is_opened(self) -> bool:
        """Whether it is open."""
        return self._transport.is_open

    @property
    def server_properties(self) -> Mapping[str, FieldValue]:
        """What the broker says of itself."""
        return self._transport.server_properties

    @property
    def connection_tune(self) -> Tune:
        """What was negotiated."""
        transport = self._transport
        return Tune(transport.channel_max, transport.frame_max, transport.heartbeat)

    @property
    def basic_nack(self) -> bool:
        """Whether the broker knows ``basic.nack``."""
        return self._transport.server_supports("basic.nack")

    @property
    def publisher_confirms(self) -> bool:
        """Whether the broker knows publisher confirms."""
        return self._transport.server_supports("publisher_confirms")

    async def ready(self) -> None:
        """It is connected from the start.

        Raises:
            ConnectionClosed: it is gone.
        """
        if not self._transport.is_open:
            raise self._transport.closed_error()

    async def close(self, exc: Reason = None, timeout: TimeoutType = None) -> None:
        """Close it; a robust connection makes another one.

        Args:
            exc: what those who wait get; None for a ConnectionClosed.
            timeout: seconds for the broker's answer; None for 10.
        """
        error = exc if isinstance(exc, Exception) else ConnectionClosed("the underlay connection was closed")
        if self._transport.is_open:
            self._transport.leave(error)
        await self._transport.closed(_deadline(timeout))


def channel_of(wire: Any) -> Any:
    """The view of the channel that a message came by, or what it was made with by hand.

    Raises:
        ChannelInvalidStateError: the channel is closed, or the message knows none.
    """
    if wire is None or not wire.is_open:
        raise ChannelInvalidStateError("the message's channel is closed, or it needs no acknowledgement (no_ack)")
    below = wire.channel
    return UnderlayChannel(below) if isinstance(below, WireChannel) else below


def _deadline(timeout: TimeoutType) -> float:
    return asyncio.get_running_loop().time() + (CLOSE_TIMEOUT if timeout is None else timeout)
