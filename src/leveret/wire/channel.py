"""One open channel on one transport.

**Calls.** The broker answers the methods of a channel in their order, so pending replies are a FIFO. A call that
was cancelled or timed out leaves its place in it: the late reply is swallowed, and where it changed something
(a consumer was made, a message was fetched) that is undone. The channel stays usable.

**Content.** A delivery, a return or a fetched message is method, header, bodies, in this order and never
interleaved on one channel. What the decoder did not deliver whole is put together here.

**Publishing.** A confirm number is taken and the bytes are written in one step with no ``await`` between, so
nothing can shift the numbers that follow. Every publish ends as one of: confirmed, nacked, returned, not
sent, outcome unknown.

**Acks.** Contiguous tags of one turn of the event loop go out as one ``multiple``; before any other method of
the channel they are written first, so the order that the user wrote is the order on the wire.

**End.** :meth:`WireChannel._die` is the one way out, for the broker's close, ours, and a lost connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import struct
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, Protocol

from pamqp.base import Frame
from pamqp.commands import Basic, Confirm
from pamqp.commands import Channel as ChannelMethods

from leveret.exceptions import (
    ChannelClosed,
    ChannelInvalidStateError,
    ConnectionBlocked,
    ConsumerCancelled,
    DeliveryLost,
    DuplicateConsumerTag,
    MessageNacked,
    MessageProcessError,
    MessageReturned,
    MessageTooLarge,
    ProtocolError,
    PublishNotSent,
    PublishNotSentInTime,
    PublishOutcomeUnknown,
    PublishUnconfirmedInTime,
    channel_closed,
    fresh,
)
from leveret.log import get_logger, printable
from leveret.outcome import DONE, Outcome, fail
from leveret.types import Arguments
from leveret.wire.codec import (
    BASIC_ACK,
    BASIC_DELIVER,
    BASIC_GET_OK,
    BASIC_NACK,
    BASIC_RETURN,
    BODY,
    HEADER,
    HEARTBEAT,
    METHOD,
    Deliver,
    GetOk,
    OnDelivery,
    Properties,
    PublishEncoder,
    Return,
    decode_confirm,
    decode_content_header,
    decode_deliver,
    decode_get_ok,
    decode_return,
    decode_route,
    encode_ack,
    encode_nack,
    encode_properties,
    encode_reject,
)
from leveret.wire.confirms import Confirms
from leveret.wire.methods import decode_method, is_reply, make
from leveret.wire.transport import Transport

_log = get_logger(__name__)

MAX_MESSAGE_SIZE = 536_870_912
"""RabbitMQ's own upper limit; a header that announces more is refused before a byte of it is kept."""

_TRACKED_TAGS = 4096

_unpack_method_id = struct.Struct(">I").unpack_from


class Fetched(NamedTuple):
    """What ``basic.get`` brought."""

    get_ok: GetOk
    properties: bytes
    body: bytes


class WireConsumer(Protocol):
    """What the channel tells a consumer; all of it is synchronous and does not raise."""

    no_ack: bool

    def on_delivery(
        self, delivery_tag: int, redelivered: bool, route: bytes, properties: bytes, body: bytes, /
    ) -> None:
        """A message came."""
        ...

    def on_end(self, error: Exception) -> None:
        """No more will come: the broker cancelled it, or the channel is gone."""
        ...


class ChannelOwner(Protocol):
    """What the channel tells the handle that opened it; synchronous, and does not raise."""

    on_return_raises: bool

    def on_returned(self, method: Return, properties: bytes, body: bytes, /) -> Any:
        """A mandatory message came back; the result is what its publisher gets."""
        ...

    def on_wire_lost(self, wire: WireChannel, error: Exception, /) -> None:
        """The channel is gone."""
        ...


class Publish(Outcome[Any]):
    """A publish that waits for its confirm."""

    __slots__ = ("body", "deadline", "exchange", "mandatory", "properties", "returned", "routing_key")

    exchange: str
    routing_key: str
    properties: bytes
    body: bytes
    mandatory: bool
    returned: Any
    deadline: float


class _Pending(NamedTuple):
    """A call that waits for its reply; *on_late* undoes what a reply did that nobody waits for any more."""

    method: Frame
    reply: asyncio.Future[Any]
    on_reply: Callable[[Frame], None] | None
    on_late: Callable[[Any], None] | None


class _Requeuer:
    """Stands in for a consumer whose owner has gone: what still comes is handed back."""

    def __init__(self, wire: WireChannel, no_ack: bool) -> None:
        self._wire = wire
        self.no_ack = no_ack
        self.is_cancelled = False  # the broker was told to cancel it: its tag is free again

    def on_delivery(
        self, delivery_tag: int, redelivered: bool, route: bytes, properties: bytes, body: bytes, /
    ) -> None:
        if not self.no_ack and self._wire.is_open:
            _ = self._wire.nack(delivery_tag, requeue=True)

    def on_end(self, error: Exception) -> None:
        """Nobody is left to be told."""


def _drop(delivery_tag: int, redelivered: bool, route: bytes, properties: bytes, body: bytes, /) -> None:
    """What a channel that is about to close does with a delivery."""


class WireChannel:
    """One incarnation of a channel. Make one with :meth:`open`."""

    __slots__ = (
        "_acked",
        "_all_settled",
        "_body",
        "_close_ok",
        "_closing",
        "_confirms",
        "_consumers",
        "_content",
        "_deadline_timer",
        "_due_ack",
        "_encoder",
        "_held",
        "_loop",
        "_owner",
        "_properties",
        "_remaining",
        "_replies",
        "_settled_ahead",
        "consumers",
        "error",
        "is_assembling",
        "number",
        "transport",
    )

    def __init__(self, transport: Transport, owner: ChannelOwner) -> None:
        self.transport = transport
        self.number = 0
        self.error: Exception | None = None
        self.consumers: dict[bytes, OnDelivery] = {}
        self.is_assembling = False
        self._consumers: dict[bytes, WireConsumer] = {}
        self._loop = asyncio.get_running_loop()
        self._owner = owner
        self._replies: deque[_Pending] = deque()
        self._close_ok: asyncio.Future[None] | None = None

        self._content: Deliver | GetOk | Return | None = None
        self._properties: bytes | None = None
        self._body: list[bytes] = []
        self._remaining = 0

        self._encoder: PublishEncoder
        self._confirms: Confirms[Publish] | None = None
        self._held: set[Publish] = set()
        self._all_settled: asyncio.Future[None] | None = None
        self._closing = False
        self._deadline_timer: asyncio.TimerHandle | None = None

        self._acked = 0  # every delivery tag up to it is settled
        self._settled_ahead: set[int] = set()  # and these beyond it
        self._due_ack = 0  # the tag up to which an ack is still to be written

    def __repr__(self) -> str:
        state = "open" if self.is_open else "closed"
        return f"<WireChannel {self.number} {state} on {self.transport!r}>"

    @classmethod
    async def open(
        cls,
        transport: Transport,
        owner: ChannelOwner,
        *,
        number: int | None = None,
        publisher_confirms: bool = True,
        timeout: float,
    ) -> WireChannel:
        """Open a channel, with publisher confirms on if asked for.

        Raises:
            ChannelInvalidStateError: the connection is not open.
            ChannelLimitReached: no number is free.
            TimeoutError: no answer within *timeout* seconds; the channel is closed behind the caller's back.
        """
        self = cls(transport, owner)
        self.number = transport.attach(self, number)
        self._encoder = PublishEncoder(self.number, transport.frame_max)
        requests: list[Frame] = [make(ChannelMethods.Open)]
        if publisher_confirms:
            self._confirms = Confirms()
            requests.append(make(Confirm.Select))
        try:
            async with asyncio.timeout(timeout):
                for reply in [self._request(method) for method in requests]:
                    await reply
            if self.error is not None:  # lost before this task came to run again
                raise fresh(self.error)
        except BaseException as exc:
            if self.error is None:
                self._send_close()
                self._end(ChannelClosed("opening the channel was given up", reply_code=200))
            if isinstance(exc, TimeoutError):
                text = f"Channel.Open got no answer within {timeout:g} s{transport.blocked_hint()}"
                raise TimeoutError(text) from None
            raise
        return self

    @property
    def is_open(self) -> bool:
        """Whether methods may be sent."""
        return self.error is None

    def server_supports(self, capability: str) -> bool:
        """Whether the broker announced *capability*."""
        return self.transport.server_supports(capability)

    def check_open(self) -> None:
        """Raise ChannelInvalidStateError, chained to the reason, unless the channel is open."""
        if self.error is not None:
            raise ChannelInvalidStateError(f"channel {self.number} is closed: {self.error}") from self.error

    # ------------------------------------------------------------------------------------------------- calls

    async def call(
        self,
        method: Frame,
        timeout: float,
        *,
        on_reply: Callable[[Frame], None] | None = None,
        on_late: Callable[[Any], None] | None = None,
    ) -> Any:
        """Send *method* and wait for its reply.

        Args:
            method: a synchronous method of AMQP.
            timeout: seconds; ``math.inf`` for none.
            on_reply: called with the reply the moment it arrives, before any frame that follows it.
            on_late: called with a reply that comes after the caller has gone.

        Raises:
            ChannelInvalidStateError: the channel is not open.
            ChannelClosed: the broker closed the channel over it.
            TimeoutError: no reply in time; the channel stays open and the late reply is swallowed.
        """
        reply = self._request(method, on_reply, on_late)
        try:
            async with asyncio.timeout(None if timeout == math.inf else timeout):
                return await reply
        except (TimeoutError, asyncio.CancelledError) as exc:
            came = reply.done() and not reply.cancelled() and reply.exception() is None
            if came and on_late is not None and self.error is None:
                on_late(reply.result())  # it came just before the caller went
            if isinstance(exc, asyncio.CancelledError):
                raise
            hint = self.transport.blocked_hint()
            raise TimeoutError(f"{method.name} got no answer within {timeout:g} s{hint}") from None

    def _request(
        self,
        method: Frame,
        on_reply: Callable[[Frame], None] | None = None,
        on_late: Callable[[Any], None] | None = None,
    ) -> asyncio.Future[Any]:
        """Send *method*; the future is its reply."""
        self.check_open()
        data = self.transport.encode(self.number, method)
        reply: asyncio.Future[Any] = self._loop.create_future()
        self._replies.append(_Pending(method, reply, on_reply, on_late))
        self._write_due_ack()
        self.transport.write(data)
        return reply

    def send(self, method: Frame) -> None:
        """Send a method that has no reply."""
        self.check_open()
        data = self.transport.encode(self.number, method)
        self._write_due_ack()
        self.transport.write(data)

    def _settle_reply(self, result: Any, method: Frame | type[Frame]) -> None:
        """Hand *result* to the call at the head of the line."""
        pending = self._replies.popleft()
        if pending.on_reply is not None and isinstance(method, Frame):
            pending.on_reply(method)
        if not pending.reply.done():
            pending.reply.set_result(result)
        elif pending.on_late is not None and self.error is None:
            pending.on_late(result)

    # ------------------------------------------------------------------------------------------------ frames

    def on_frame(self, kind: int, payload: bytes) -> None:
        """Take a frame that the decoder cut.

        Raises:
            ProtocolError: it is not one that may come now.
        """
        if self.error is not None:  # closing: everything but close and close-ok is discarded (§1.5.2.5)
            if kind == METHOD:
                method = decode_method(payload)
                if isinstance(method, ChannelMethods.Close | ChannelMethods.CloseOk):
                    self._on_method(method)
        elif kind == METHOD:
            self._on_method_frame(payload)
        elif kind == HEADER:
            self._on_header(payload)
        elif kind == BODY:
            self._on_body(payload)
        elif kind == HEARTBEAT:
            raise ProtocolError(f"a heartbeat on channel {self.number}", reply_code=505, data=payload)

    def _on_method_frame(self, payload: bytes) -> None:
        if self.is_assembling:
            raise ProtocolError("a method where content was due", reply_code=505, data=payload)
        if len(payload) < 4:
            raise ProtocolError("a method frame of less than 4 bytes", reply_code=501, data=payload)
        method_id = _unpack_method_id(payload)[0]
        if method_id == BASIC_ACK:
            self._on_confirm(payload, Basic.Ack)
        elif method_id == BASIC_NACK:
            self._on_confirm(payload, Basic.Nack)
        elif method_id == BASIC_DELIVER:
            self._begin_content(decode_deliver(payload))
        elif method_id == BASIC_GET_OK:
            self._begin_content(decode_get_ok(payload))
        elif method_id == BASIC_RETURN:
            self._begin_content(decode_return(payload))
        else:
            self._on_method(decode_method(payload))

    def _on_method(self, method: Frame) -> None:
        if isinstance(method, ChannelMethods.Close):
            self._on_close(method)
        elif isinstance(method, ChannelMethods.CloseOk) and self._close_ok is not None:
            self.transport.detach(self.number)
            if not self._close_ok.done():
                self._close_ok.set_result(None)
        elif isinstance(method, Basic.Cancel):
            self._on_broker_cancel(method)
        elif isinstance(method, ChannelMethods.Flow):
            self._on_flow(method)
        elif self._replies and is_reply(type(self._replies[0].method), method):
            self._settle_reply(method, method)
        else:
            # A method of class connection (10) has no business here at all.
            code = 504 if method.index >> 16 == 10 else 503
            raise ProtocolError(f"unexpected {method.name} on channel {self.number}", reply_code=code)

    def _begin_content(self, content: Deliver | GetOk | Return) -> None:
        if isinstance(content, GetOk) and not (self._replies and isinstance(self._replies[0].method, Basic.Get)):
            raise ProtocolError("basic.get-ok without a basic.get", reply_code=503)
        self._content = content
        self.is_assembling = True

    def _on_header(self, payload: bytes) -> None:
        if self._content is None or self._properties is not None:
            raise ProtocolError("a content header that no method announced", reply_code=505, data=payload)
        size, self._properties = decode_content_header(payload)
        self._remaining = size
        if size == 0:
            self._complete_content()
        elif size > MAX_MESSAGE_SIZE:
            text = f"a message of {size} bytes is over the limit of {MAX_MESSAGE_SIZE}"
            _log.error("%r: %s; closing the channel", self, text)
            self._send_close(311, text)
            self._end(MessageTooLarge(text))

    def _on_body(self, payload: bytes) -> None:
        if self._properties is None:
            raise ProtocolError("a content body that no header announced", reply_code=505, data=payload[:64])
        self._remaining -= len(payload)
        if self._remaining < 0:
            raise ProtocolError("a content body longer than its header announced", reply_code=501, data=payload[:64])
        self._body.append(payload)
        if self._remaining == 0:
            self._complete_content()

    def _complete_content(self) -> None:
        content, properties, parts = self._content, self._properties or b"", self._body
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        self._drop_content()
        if isinstance(content, Deliver):
            on_delivery = self.consumers.get(content.consumer_tag)
            if on_delivery is None:
                tag = content.consumer_tag.decode("utf-8", "replace")
                raise ProtocolError(f"a delivery for consumer {tag!r}, which does not exist", reply_code=503)
            on_delivery(content.delivery_tag, content.redelivered, content.route, properties, body)
        elif isinstance(content, GetOk):
            self._settle_reply(Fetched(content, properties, body), Basic.GetOk)
        elif content is not None:
            self._on_return(content, properties, body)

    def _drop_content(self) -> None:
        self._content = None
        self._properties = None
        self._body = []
        self.is_assembling = False

    def _on_flow(self, method: ChannelMethods.Flow) -> None:
        self.send(make(ChannelMethods.FlowOk, active=method.active))
        if method.active:
            self.transport.release(self)
        else:
            self.transport.hold(self)

    # -------------------------------------------------------------------------------------------- publishing

    def publish(
        self,
        exchange: str,
        routing_key: str,
        properties: Properties,
        body: bytes,
        mandatory: bool,
        timeout: float | None,
    ) -> Coroutine[Any, Any, Any]:
        """Publish now, or as soon as nobody holds publishes; the result awaits the broker's confirm.

        Args:
            exchange: name of the exchange, "" for the default one.
            routing_key: at most 255 bytes of UTF-8.
            properties: with values as the wire has them.
            body: any size.
            mandatory: whether the broker shall return what it cannot route.
            timeout: seconds for the whole, None for the connection's ``operation_timeout``.

        Raises:
            ChannelInvalidStateError: the channel is not open.
            ValueError, TypeError: a property that AMQP cannot carry.
            MessageTooLarge: the headers do not fit into one frame.
        """
        if self.error is not None or self._closing:
            self.check_open()
            raise ChannelInvalidStateError(f"channel {self.number} is being closed")
        encoded = encode_properties(properties)
        data = self._encoder.encode(exchange, routing_key, mandatory, encoded, body)
        transport = self.transport
        if self._confirms is None and not transport.publishing_held:
            transport.write(data)
            return DONE
        publish = Publish(loop=self._loop)
        publish.exchange = exchange
        publish.routing_key = routing_key
        publish.properties = encoded
        publish.body = body
        publish.mandatory = mandatory
        publish.returned = None
        if transport.publishing_held:
            self._hold_publish(publish, data, timeout)
        elif timeout is None:
            publish.deadline = self._loop.time() + transport.parameters.operation_timeout
            if self._deadline_timer is None and publish.deadline != math.inf:
                self._deadline_timer = self._loop.call_at(publish.deadline, self._expire_publishes)
            self._confirms.add(publish)  # type: ignore[union-attr]
            transport.write(data)
        else:
            publish.deadline = math.inf
            self._confirms.add(publish)  # type: ignore[union-attr]
            transport.write(data)
            self._limit_time(publish, timeout)
        return publish

    def _hold_publish(self, publish: Publish, data: bytes, timeout: float | None) -> None:
        """Write *data* when publishes are no longer held, unless its time is up or its owner has gone."""
        publish.deadline = -math.inf  # not written yet

        def write() -> None:
            if publish.done():
                return
            publish.deadline = math.inf
            self._held.discard(publish)
            if self._confirms is None:
                publish.set_result(None)
            else:
                self._confirms.add(publish)
            self.transport.write(data)

        def forget(_: object) -> None:
            self._held.discard(publish)
            self._check_settled()

        self._held.add(publish)
        publish.add_done_callback(forget)
        self.transport.when_released(write)
        self._limit_time(publish, self.transport.parameters.operation_timeout if timeout is None else timeout)

    def _limit_time(self, publish: Publish, timeout: float) -> None:
        if timeout != math.inf:
            timer = self._loop.call_later(timeout, self._time_out, publish, timeout)
            publish.add_done_callback(lambda _: timer.cancel())

    def _expire_publishes(self) -> None:
        """End the publishes whose default deadline has passed; one timer serves them all."""
        self._deadline_timer = None
        now = self._loop.time()
        for publish in list(self._confirms or ()):
            if publish.done() or publish.deadline == math.inf:
                continue
            if publish.deadline > now:
                self._deadline_timer = self._loop.call_at(publish.deadline, self._expire_publishes)
                break
            self._time_out(publish, self.transport.parameters.operation_timeout)

    def _time_out(self, publish: Publish, timeout: float) -> None:
        blocked = self.transport.blocked
        where = f"exchange {publish.exchange!r}, routing key {publish.routing_key!r}"
        if publish.deadline != -math.inf:
            hint = self.transport.blocked_hint()
            fail(publish, PublishUnconfirmedInTime(f"no confirm within {timeout:g} s{hint} ({where})"))
        elif blocked is not None:
            fail(publish, ConnectionBlocked(f"not sent within {timeout:g} s: the broker blocks publishers: {blocked}"))
        else:
            fail(publish, PublishNotSentInTime(f"not sent within {timeout:g} s: the broker does not keep up ({where})"))

    def _on_confirm(self, payload: bytes, cls: type[Basic.Ack] | type[Basic.Nack]) -> None:
        number, multiple = decode_confirm(payload)
        if self._confirms is None:
            raise ProtocolError("a confirm on a channel without publisher confirms", reply_code=503)
        settled = self._confirms.settle(number, multiple)
        frame = make(cls, delivery_tag=number, multiple=multiple)
        for publish in settled:
            if publish.done():
                continue
            if isinstance(frame, Basic.Nack):
                fail(publish, MessageNacked(frame))
            elif publish.returned is None:
                publish.set_result(frame)
            elif self._owner.on_return_raises:
                fail(publish, MessageReturned(publish.returned))
            else:
                publish.set_result(publish.returned)
        self._check_settled()

    def _check_settled(self) -> None:
        if self._all_settled is not None and not self._confirms and not self._held and not self._all_settled.done():
            self._all_settled.set_result(None)

    def _on_return(self, method: Return, properties: bytes, body: bytes) -> None:
        returned = self._owner.on_returned(method, properties, body)
        if self._confirms is None:
            return
        publish = self._confirms.match_return(*decode_route(method.route), properties, body)
        if publish is not None:
            publish.returned = returned
        else:
            _log.warning("%r: a message came back that no publish waits for: %s", self, printable(method.reply_text))

    async def wait_for_confirms(self, deadline: float) -> None:
        """Wait until every publish is settled, or until *deadline* in event loop time."""
        if self.error is not None or not (self._confirms or self._held):
            return
        if self._all_settled is None or self._all_settled.done():
            self._all_settled = self._loop.create_future()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await asyncio.shield(self._all_settled)

    # ------------------------------------------------------------------------------------- settling deliveries

    def ack(self, delivery_tag: int, multiple: bool = False) -> Coroutine[Any, Any, None]:
        """``basic.ack``: takes effect at once, is on the wire at the end of this turn of the event loop.

        Raises:
            DeliveryLost: this channel is gone; nothing is sent.
            MessageProcessError: a ``multiple`` has settled it already.
        """
        if self.error is not None:
            raise self._lost()
        if delivery_tag == self._acked + 1:
            self._acked = delivery_tag
            if self._settled_ahead:
                self._catch_up()
            if not self._due_ack:
                self.transport.before_flush(self._write_due_ack)
            self._due_ack = delivery_tag  # not _acked: the broker refuses a tag that it has seen settled
        else:
            self._check_unsettled(delivery_tag)
            self._write_due_ack()
            self.transport.write(encode_ack(self.number, delivery_tag, multiple))
            self._note_settled(delivery_tag, multiple)
        return self.transport.drain()

    def nack(self, delivery_tag: int, multiple: bool = False, requeue: bool = True) -> Coroutine[Any, Any, None]:
        """``basic.nack``; raises as :meth:`ack` does."""
        if self.error is not None:
            raise self._lost()
        self._check_unsettled(delivery_tag)
        self._write_due_ack()
        self.transport.write(encode_nack(self.number, delivery_tag, multiple, requeue))
        self._note_settled(delivery_tag, multiple)
        return self.transport.drain()

    def reject(self, delivery_tag: int, requeue: bool = False) -> Coroutine[Any, Any, None]:
        """``basic.reject``; raises as :meth:`ack` does."""
        if self.error is not None:
            raise self._lost()
        self._check_unsettled(delivery_tag)
        self._write_due_ack()
        self.transport.write(encode_reject(self.number, delivery_tag, requeue))
        self._note_settled(delivery_tag, False)
        return self.transport.drain()

    def _lost(self) -> DeliveryLost:
        error = DeliveryLost(f"the channel that brought the message is gone, the broker redelivers it: {self.error}")
        error.__cause__ = self.error
        return error

    def _check_unsettled(self, delivery_tag: int) -> None:
        if delivery_tag <= self._acked or delivery_tag in self._settled_ahead:
            raise MessageProcessError(f"delivery tag {delivery_tag} was settled by an earlier multiple")

    def _note_settled(self, delivery_tag: int, multiple: bool) -> None:
        if self._acked < 0:
            return
        if multiple:
            self._acked = delivery_tag
            self._settled_ahead = {tag for tag in self._settled_ahead if tag > delivery_tag}
        else:
            self._settled_ahead.add(delivery_tag)
        self._catch_up()
        if len(self._settled_ahead) > _TRACKED_TAGS:
            # A tag that nobody settles (left unacked, or of a no_ack consumer) stops the count: ack singly then.
            self._acked = -1
            self._settled_ahead.clear()

    def _catch_up(self) -> None:
        while self._acked + 1 in self._settled_ahead:
            self._acked += 1
            self._settled_ahead.discard(self._acked)

    def _write_due_ack(self) -> None:
        if self._due_ack:
            self.transport.write(encode_ack(self.number, self._due_ack, True))
            self._due_ack = 0

    # --------------------------------------------------------------------------------------------- consumers

    async def consume(
        self,
        queue: str,
        consumer_tag: str,
        consumer: WireConsumer,
        *,
        no_ack: bool,
        exclusive: bool,
        arguments: Arguments,
        timeout: float,
    ) -> Basic.ConsumeOk:
        """``basic.consume``; deliveries go to *consumer* from the first one on.

        A caller that times out or is cancelled leaves no consumer behind: the broker is told to cancel it, and
        what it delivers meanwhile is requeued.

        Raises:
            DuplicateConsumerTag: the channel has that tag; the broker would close the connection (530).
        """
        self.check_open()
        tag = consumer_tag.encode("utf-8", "surrogateescape")
        former = self._consumers.get(tag)
        if former is not None and not (isinstance(former, _Requeuer) and former.is_cancelled):
            raise DuplicateConsumerTag(f"channel {self.number} has a consumer tagged {consumer_tag!r} already")
        method = make(
            Basic.Consume,
            queue=queue,
            consumer_tag=consumer_tag,
            no_ack=no_ack,
            exclusive=exclusive,
            arguments=arguments or {},
        )
        self._consumers[tag] = consumer
        self.consumers[tag] = consumer.on_delivery

        requeuer = _Requeuer(self, no_ack)

        def undo(_: Any) -> None:
            self.send(make(Basic.Cancel, consumer_tag=consumer_tag, nowait=True))
            requeuer.is_cancelled = True

        try:
            ok: Basic.ConsumeOk = await self.call(method, timeout, on_late=undo)
        except (TimeoutError, asyncio.CancelledError):
            if self.error is None:
                self._replace_consumer(tag, requeuer)
            raise
        except BaseException:
            self._remove_consumer(tag)
            raise
        return ok

    async def cancel(self, consumer_tag: str, timeout: float, *, nowait: bool = False) -> Basic.CancelOk | None:
        """``basic.cancel``; until its reply, deliveries still go to the consumer.

        With *nowait* there is no reply to wait for, and what is still on its way is requeued.
        """
        tag = consumer_tag.encode("utf-8", "surrogateescape")
        method = make(Basic.Cancel, consumer_tag=consumer_tag, nowait=nowait)
        if nowait:
            self.send(method)
            if (consumer := self._consumers.get(tag)) is not None:
                requeuer = _Requeuer(self, consumer.no_ack)
                requeuer.is_cancelled = True
                self._replace_consumer(tag, requeuer)
            return None

        def remove(_: Frame) -> None:
            self._remove_consumer(tag)

        ok: Basic.CancelOk = await self.call(method, timeout, on_reply=remove)
        return ok

    def begin_close(self) -> None:
        """Refuse publishes and drop what is still delivered: the channel is about to be closed."""
        self._closing = True
        for consumer in self._consumers.values():
            consumer.on_end(ChannelClosed("the channel is being closed", reply_code=200))
        for tag in self._consumers:
            self.consumers[tag] = _drop

    def _replace_consumer(self, tag: bytes, consumer: WireConsumer) -> None:
        self._consumers[tag] = consumer
        self.consumers[tag] = consumer.on_delivery

    def _remove_consumer(self, tag: bytes) -> WireConsumer | None:
        self.consumers.pop(tag, None)
        return self._consumers.pop(tag, None)

    def _on_broker_cancel(self, method: Basic.Cancel) -> None:
        consumer_tag = method.consumer_tag or ""
        consumer = self._remove_consumer(consumer_tag.encode("utf-8", "surrogateescape"))
        if not method.nowait and self.transport.server_supports("accept_consumer_cancel_ok"):
            self.send(make(Basic.CancelOk, consumer_tag=consumer_tag))
        if consumer is not None:
            consumer.on_end(ConsumerCancelled(consumer_tag))

    # ----------------------------------------------------------------------------------------- fetching, closing

    async def get(self, queue: str, no_ack: bool, timeout: float) -> Fetched | Basic.GetEmpty:
        """``basic.get``; a message that comes after the caller has gone is requeued."""

        def give_back(result: Fetched | Basic.GetEmpty) -> None:
            if isinstance(result, Fetched) and not no_ack:
                _ = self.nack(result.get_ok.delivery_tag, requeue=True)

        result: Fetched | Basic.GetEmpty = await self.call(
            make(Basic.Get, queue=queue, no_ack=no_ack), timeout, on_late=give_back
        )
        return result

    async def close(self, deadline: float) -> None:
        """Wait for outstanding confirms, then shake hands to close; never later than *deadline*, never raises.

        What is not confirmed by then ends as outcome unknown. If no close-ok comes (a blocked connection gets
        none) the channel is gone all the same, and its number stays taken until one does.
        """
        self.begin_close()
        await self.wait_for_confirms(deadline)
        if self.error is None:
            self._send_close()
            self._end(ChannelClosed("the channel was closed", reply_code=200, reply_text="Normal shutdown"))
        if self._close_ok is not None:
            try:
                async with asyncio.timeout_at(deadline):
                    await asyncio.shield(self._close_ok)
            except TimeoutError:
                _log.info("%r: no close-ok in time%s", self, self.transport.blocked_hint())

    def _send_close(self, code: int = 200, text: str = "Normal shutdown") -> None:
        self.send(make(ChannelMethods.Close, reply_code=code, reply_text=text, class_id=0, method_id=0))
        self._close_ok = self._loop.create_future()

    def _on_close(self, method: ChannelMethods.Close) -> None:
        self.transport.send(self.number, make(ChannelMethods.CloseOk))
        if self._close_ok is not None:
            return  # the closes crossed: the broker answers ours too, and the number is free then
        self.transport.detach(self.number)
        error = channel_closed(method)
        _log.warning("%r: closed by the broker: %s", self, printable(method.reply_text))
        self._end(error)

    def on_connection_lost(self, error: Exception) -> None:
        """The transport died."""
        if self._close_ok is not None and not self._close_ok.done():
            self._close_ok.set_result(None)
        if self.error is None:
            self._end(error)

    def _end(self, error: Exception) -> None:
        """The one way out: every waiter, consumer and the owner are told."""
        self.error = error
        self._drop_content()
        self._due_ack = 0
        self._settled_ahead.clear()
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
        consumers = list(self._consumers.values())
        self._consumers.clear()
        self.consumers.clear()
        replies, self._replies = self._replies, deque()
        for pending in replies:
            fail(pending.reply, fresh(error))
        for publish in self._confirms.abandon() if self._confirms is not None else ():
            if not publish.done():
                unknown = PublishOutcomeUnknown(f"the channel was lost before the confirm: {error}")
                unknown.__cause__ = error
                fail(publish, unknown)
        for publish in list(self._held):
            not_sent = PublishNotSent(f"the channel was lost before the message could be sent: {error}")
            not_sent.__cause__ = error
            fail(publish, not_sent)
        self._held.clear()
        self._check_settled()
        self.transport.release(self)
        for consumer in consumers:
            consumer.on_end(error)
        self._owner.on_wire_lost(self, error)
