"""One open channel on one transport.

**Calls.** A call that was cancelled or timed out leaves its place in :class:`Replies`: the late reply is swallowed,
and where it changed something (a consumer was made, a message was fetched) that is undone. The channel stays usable.

**Content.** What the decoder did not deliver whole is put together by a :class:`ContentAssembler`.

**Halves.** Publishing is a :class:`Publisher`'s, and settling deliveries a :class:`Settler`'s. They write to the same
output; before any other method of the channel, the acks that were saved up go out.

**End.** :meth:`WireChannel._end` is the one way out, for the broker's close, ours, and a lost connection.
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

from pamqp.base import Frame
from pamqp.commands import Basic, Confirm, Tx
from pamqp.commands import Channel as ChannelMethods

from leveret.exceptions import (
    ChannelClosed,
    ChannelInvalidStateError,
    ConsumerCancelled,
    DuplicateConsumerTag,
    MessageTooLarge,
    ProtocolError,
    channel_closed,
    fresh,
)
from leveret.log import get_logger, printable
from leveret.outcome import fail
from leveret.prompt import Prompt
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
    decode_confirm,
    decode_deliver,
    decode_get_ok,
    decode_return,
    encode_frame,
    encode_tag,
)
from leveret.wire.content import Content, ContentAssembler
from leveret.wire.decoder import OnAck, OnDelivery
from leveret.wire.methods import decode_method, encode_payload, make
from leveret.wire.output import CommitGate, Output
from leveret.wire.publisher import Publisher, PublishOwner
from leveret.wire.replies import Pending, Replies
from leveret.wire.settler import Settler
from leveret.wire.transport import Transport

_log = get_logger(__name__)

_unpack_method_id = struct.Struct(">I").unpack_from


_OPEN, _SELECT = make(ChannelMethods.Open), make(Confirm.Select)
_OPEN_PAYLOAD, _SELECT_PAYLOAD = encode_payload(_OPEN), encode_payload(_SELECT)


class Fetched(NamedTuple):
    """What ``basic.get`` brought."""

    get_ok: GetOk
    properties: bytes
    body: bytes


class WireConsumer(Protocol):
    """What the channel tells a consumer; all of it is synchronous and does not raise."""

    no_ack: bool

    @property
    def backlog(self) -> int:
        """How many messages it has not finished with."""
        ...

    def backlog_size(self) -> int:
        """Bytes of memory that they take, about."""
        ...

    def on_delivery(
        self, delivery_tag: int, redelivered: bool, route: bytes, properties: bytes, body: bytes, /
    ) -> None:
        """A message came."""
        ...

    def on_abandoned(self) -> None:
        """Whoever started it has gone before it was confirmed: give back what it did not start on."""
        ...

    def on_end(self, error: Exception) -> None:
        """No more will come: the broker cancelled it, or the channel is gone."""
        ...


class ChannelOwner(PublishOwner, Protocol):
    """What the channel tells the handle that opened it; synchronous, and does not raise."""

    def on_wire_lost(self, wire: WireChannel, error: Exception, /) -> None:
        """The channel is gone."""
        ...


class _Trial:
    """A consumer that does nothing."""

    backlog = 0

    def __init__(self, *, no_ack: bool = False) -> None:
        self.no_ack = no_ack

    def on_delivery(
        self, delivery_tag: int, redelivered: bool, route: bytes, properties: bytes, body: bytes, /
    ) -> None:
        """It is requeued when the channel is closed."""

    def backlog_size(self) -> int:
        """It holds nothing."""
        return 0

    def on_abandoned(self) -> None:
        """Nobody is left to be told."""

    def on_end(self, error: Exception) -> None:
        """Nobody is left to be told."""


class _Requeuer(_Trial):
    """Stands in for a consumer whose owner has gone: what still comes is handed back."""

    def __init__(self, settler: Settler, no_ack: bool) -> None:
        super().__init__(no_ack=no_ack)
        self._settler = settler

    def on_delivery(
        self, delivery_tag: int, redelivered: bool, route: bytes, properties: bytes, body: bytes, /
    ) -> None:
        if not self.no_ack and self._settler.is_open:
            self._settler.requeue(delivery_tag)


def _drop(delivery_tag: int, redelivered: bool, route: bytes, properties: bytes, body: bytes, /) -> None:
    """What a channel that is about to close does with a delivery."""


class WireChannel:
    """One incarnation of a channel. Make one with :meth:`open`.

    A connection may have thousands, most of them with little to do: what is empty at first is a dict (64 bytes) or a
    list here and in what belongs to it, where one would expect a set (216) or a deque (760).

    Attributes:
        error: why it is closed; None while it is open.
        consumers: where deliveries go, by consumer tag.
        prefetch: the last that was sent (``basic.qos``, not global).
        publishes_only: whether nothing was ever consumed or fetched on it.
    """

    __slots__ = (
        "_close_ok",
        "_closing",
        "_consumers",
        "_content",
        "_loop",
        "_output",
        "_owner",
        "_replies",
        "_starting",
        "_tally",
        "_unlimited",
        "_watchers",
        "consumers",
        "error",
        "is_assembling",
        "number",
        "on_ack",
        "prefetch",
        "publisher",
        "publishes_only",
        "settler",
        "transport",
    )

    def __init__(self, transport: Transport, owner: ChannelOwner, number: int | None, publisher_confirms: bool) -> None:
        self.number = number = transport.attach(self, number)
        self.transport: Transport = transport
        self.error: Exception | None = None
        self.consumers: dict[bytes, OnDelivery] = {}
        self.is_assembling = False
        self.prefetch = 0
        self.publishes_only = True
        self._consumers: dict[bytes, WireConsumer] = {}
        self._starting: dict[bytes, asyncio.Future[None]] = {}
        self._unlimited: dict[bytes, None] = {}
        self._loop = asyncio.get_running_loop()
        self._tally = transport.tally
        self._output: Output | CommitGate = transport.output
        self._owner = owner
        self._replies = Replies()
        self._content = ContentAssembler()
        self._watchers: list[Callable[[], None]] = []
        self.publisher = Publisher(transport, number, publisher_confirms, owner)
        self.on_ack: OnAck | None = self.publisher.on_ack
        self.settler = Settler(self)
        self._closing = False
        self._close_ok: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"<channel {self.number} of {self.transport!r}>"

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
        self = cls(transport, owner, number, publisher_confirms)
        reply, data = self._expect_reply(_OPEN), encode_frame(METHOD, self.number, _OPEN_PAYLOAD)
        if publisher_confirms:
            reply = self._expect_reply(_SELECT)  # the last to come
            data += encode_frame(METHOD, self.number, _SELECT_PAYLOAD)
        try:
            transport.output.write(data)
            await transport.answer(reply, _OPEN, timeout)
            if self.error is not None:  # lost before this task came to run again
                raise fresh(self.error)
        except BaseException:
            if self.error is None:
                self._send_close()
                self._end(ChannelClosed("opening the channel was given up", reply_code=200))
            raise
        return self

    @property
    def is_open(self) -> bool:
        """Whether methods may be sent."""
        return self.error is None

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
        self._check_callable()
        reply = self._request(method, on_reply, on_late)
        try:
            return await self.transport.answer(reply, method, timeout)
        except asyncio.CancelledError:
            came = reply.done() and not reply.cancelled() and reply.exception() is None
            if came and on_late is not None and self.error is None:
                on_late(reply.result())  # it came just before the caller went
            raise

    def _check_callable(self) -> None:
        self.check_open()
        if self._closing:
            raise ChannelInvalidStateError(f"channel {self.number} is being closed")

    def _request(
        self,
        method: Frame,
        on_reply: Callable[[Frame], None] | None = None,
        on_late: Callable[[Any], None] | None = None,
    ) -> asyncio.Future[Any]:
        """Send *method*; the future is its reply."""
        self.check_open()
        data = self.transport.encode(self.number, method)
        if isinstance(method, Tx.Commit) and self.publisher.has_held:
            raise ChannelInvalidStateError("publishes are still held back (await them before the commit)")
        reply = self._expect_reply(method, on_reply, on_late)
        self.settler.flush()
        if isinstance(method, Basic.Qos) and not method.global_:
            self.prefetch = method.prefetch_count
        if isinstance(method, Basic.Consume | Basic.Get):
            self.publishes_only = False
        if isinstance(method, Tx.Rollback):
            self.settler.on_rollback()
        if isinstance(method, Tx.Select) and isinstance(self._output, Output):
            self._output = self.publisher.output = self.settler.output = CommitGate(self._output)
        if isinstance(self._output, CommitGate):
            self._output.write(data, isinstance(method, Tx.Commit))
        else:
            self._output.write(data)
        return reply

    def _expect_reply(
        self,
        method: Frame,
        on_reply: Callable[[Frame], None] | None = None,
        on_late: Callable[[Any], None] | None = None,
    ) -> asyncio.Future[Any]:
        reply: asyncio.Future[Any] = Prompt(self.transport.wakeups)
        self._replies.add(Pending(method, reply, on_reply, on_late))
        return reply

    def send(self, method: Frame) -> None:
        """Send a method that has no reply."""
        self.check_open()
        data = self.transport.encode(self.number, method)
        self.settler.flush()
        self._output.write(data)

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
            try:
                self._on_content(self._content.add_header(payload))
            except MessageTooLarge as exc:
                _log.error("%r: %s; closing the channel", self, exc)
                self._send_close(311, str(exc))
                self._end(exc)
        elif kind == BODY:
            self._on_content(self._content.add_body(payload))
        elif kind == HEARTBEAT:
            raise ProtocolError(f"a heartbeat on channel {self.number}", reply_code=505, data=payload)

    def _on_method_frame(self, payload: bytes) -> None:
        if self.is_assembling:
            raise ProtocolError("a method where content was due", reply_code=505, data=payload)
        if len(payload) < 4:
            raise ProtocolError("a method frame of less than 4 bytes", reply_code=501, data=payload)
        method_id = _unpack_method_id(payload)[0]
        if method_id == BASIC_ACK:
            self.publisher.on_ack(*decode_confirm(payload))
        elif method_id == BASIC_NACK:
            self.publisher.on_nack(*decode_confirm(payload))
        elif method_id == BASIC_DELIVER:
            self._content.begin(decode_deliver(payload))
        elif method_id == BASIC_GET_OK:
            if not self._replies.awaits_message:
                raise ProtocolError("basic.get-ok without a basic.get", reply_code=503)
            self._content.begin(decode_get_ok(payload))
        elif method_id == BASIC_RETURN:
            self._content.begin(decode_return(payload))
        else:
            self._on_method(decode_method(payload))
        self.is_assembling = not self._content.is_empty

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
            self.send(make(ChannelMethods.FlowOk, active=method.active))
            self.publisher.on_flow(bool(method.active))
        elif (pending := self._replies.take(method)) is not None:
            if isinstance(method, Tx.CommitOk) and isinstance(self._output, CommitGate):
                self._output.on_commit_ok()
            if pending.on_reply is not None:
                pending.on_reply(method)
            pending.settle(method)
        else:
            # A method of class connection (10) has no business here at all.
            code = 504 if method.index >> 16 == 10 else 503
            raise ProtocolError(f"unexpected {method.name} on channel {self.number}", reply_code=code)

    def _on_content(self, content: Content | None) -> None:
        """Content that may be complete."""
        if content is None:
            return
        self.is_assembling = False
        method, properties, body = content
        if isinstance(method, Deliver):
            on_delivery = self.consumers.get(method.consumer_tag)
            if on_delivery is None:
                self._on_stray_delivery(method)
            else:
                self._tally.delivered += 1
                on_delivery(method.delivery_tag, method.redelivered, method.route, properties, body)
        elif isinstance(method, GetOk):
            self._tally.delivered += 1
            self._replies.take_get().settle(Fetched(method, properties, body))
        else:
            self.publisher.on_return(method, properties, body)

    def _on_stray_delivery(self, method: Deliver) -> None:
        """A delivery for nobody.

        A quorum queue of RabbitMQ 4.3 goes on with a consumer that it cancelled over its ack timeout, once that
        acks something: hand it back, and cancel the consumer for good.
        """
        tag = method.consumer_tag.decode("utf-8", "surrogateescape")
        no_ack = self.settler.cancelled.get(method.consumer_tag)
        if no_ack is None:
            raise ProtocolError(f"a delivery for consumer {printable(tag)!r}, which does not exist", reply_code=503)
        self._set_consumer(method.consumer_tag, _Requeuer(self.settler, no_ack))
        self._abandon_consumer(tag)
        if not no_ack:
            self.settler.requeue(method.delivery_tag)

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
        prefetch: int | None = None,
    ) -> Basic.ConsumeOk:
        """``basic.consume``; deliveries go to *consumer* from the first one on.

        *prefetch* is sent ahead (``basic.qos``) where the last one was another; None leaves it at that.

        A caller that times out or is cancelled leaves no consumer behind: the broker is told to cancel it, and
        what it delivers meanwhile is requeued.

        Raises:
            DuplicateConsumerTag: the channel has that tag; the broker would close the connection (530).
        """
        self.check_open()
        tag = encode_tag(consumer_tag)
        if tag in self._consumers:
            raise DuplicateConsumerTag(f"channel {self.number} has a consumer tagged {consumer_tag!r} already")
        method = make(
            Basic.Consume,
            queue=queue,
            consumer_tag=consumer_tag,
            no_ack=no_ack,
            exclusive=exclusive,
            arguments=arguments or {},
        )

        def undo(_: Any) -> None:
            self._abandon_consumer(consumer_tag)

        def start(_: Frame) -> None:
            self._starting.pop(tag).set_result(None)

        if prefetch is not None and prefetch != self.prefetch:
            self._request(make(Basic.Qos, prefetch_count=prefetch))
        self._set_consumer(tag, consumer)
        if no_ack or not self.prefetch:
            self._unlimited[tag] = None
        self.settler.cancelled.pop(tag, None)
        self._starting[tag] = self._loop.create_future()
        try:
            ok: Basic.ConsumeOk = await self.call(method, timeout, on_reply=start, on_late=undo)
        except (TimeoutError, asyncio.CancelledError):
            # Undone already, if its reply came just before the caller went.
            if self._consumers.get(tag) is consumer:
                self._set_consumer(tag, _Requeuer(self.settler, no_ack))
            consumer.on_abandoned()
            raise
        except BaseException:
            self._starting.pop(tag, None)
            self._remove_consumer(tag)
            raise
        return ok

    async def try_consume(self, queue: str, *, exclusive: bool, arguments: Arguments, timeout: float) -> None:
        """Consume, to see whether the broker lets us; the one message that it may send is requeued with the channel.

        An exclusive consumer is cancelled at once, another one consumes until the channel is closed: an auto-delete
        queue would go with it.

        Raises:
            ChannelClosed: it does not.
            ChannelInvalidStateError, TimeoutError: as :meth:`call`.
        """
        tag = f"leveret-try-{os.urandom(8).hex()}"
        await self.consume(
            queue,
            tag,
            _Trial(),
            no_ack=False,
            exclusive=exclusive,
            arguments=arguments,
            timeout=timeout,
            prefetch=1,  # streams are not consumed without
        )
        if exclusive:
            await self.cancel(tag, timeout)

    async def cancel(self, consumer_tag: str, timeout: float, *, nowait: bool = False) -> Basic.CancelOk | None:
        """``basic.cancel``; until its reply, deliveries still go to the consumer.

        With *nowait* there is no reply to wait for, and what is still on its way is requeued. A consumer that is being
        started is cancelled when it is: a cancel that overtakes consume-ok crashes RabbitMQ's channel (541 up to 4.0),
        or costs the consume-ok (4.3).
        """
        if (starting := self._starting.get(encode_tag(consumer_tag))) is not None:
            deadline = self._loop.time() + timeout
            await asyncio.wait([starting], timeout=timeout)
            if not starting.done():
                raise TimeoutError(f"Basic.Consume got no answer within {timeout:g} s, and cannot be cancelled before")
            timeout = max(0.0, deadline - self._loop.time())
        if nowait:
            self._abandon_consumer(consumer_tag)
            return None
        method = make(Basic.Cancel, consumer_tag=consumer_tag)
        ok: Basic.CancelOk = await self.call(method, timeout, on_reply=self._when_cancelled(consumer_tag))
        return ok

    def _when_cancelled(self, consumer_tag: str) -> Callable[[Frame], None]:
        """What to do on ``basic.cancel-ok``: no more deliveries come to the consumer that has the tag now."""
        tag = encode_tag(consumer_tag)
        consumer = self._consumers.get(tag)

        def remove(_: Frame) -> None:
            if self._consumers.get(tag) is consumer:
                self._remove_consumer(tag)

        return remove

    def _abandon_consumer(self, consumer_tag: str) -> None:
        """Cancel a consumer whose owner has gone; until the reply, what comes is requeued."""
        tag = encode_tag(consumer_tag)
        if (consumer := self._consumers.get(tag)) is not None:
            self._set_consumer(tag, _Requeuer(self.settler, consumer.no_ack))
        self._request(make(Basic.Cancel, consumer_tag=consumer_tag), on_reply=self._when_cancelled(consumer_tag))

    @property
    def unlimited(self) -> Iterable[WireConsumer]:
        """The consumers that get as much as the queue has: no prefetch, or none that counts for them."""
        return [self._consumers[tag] for tag in self._unlimited]

    @property
    def has_idle_consumer(self) -> bool:
        """Whether a consumer holds nothing."""
        return any(not consumer.backlog for consumer in self._consumers.values())

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits for a reply or a confirm."""
        is_closing = self._close_ok is not None and not self._close_ok.done()
        return is_closing or self._replies.is_awaited or self.publisher.is_awaited

    def begin_close(self) -> None:
        """Refuse calls and publishes and drop what is still delivered: the channel is about to be closed."""
        if self.error is not None:
            return
        self._closing = True
        self.settler.begin_close()
        self.publisher.refuse("is being closed")
        for consumer in self._consumers.values():
            consumer.on_end(ChannelClosed("the channel is being closed", reply_code=200))
        for tag in self._consumers:
            self.consumers[tag] = _drop

    def consumer(self, tag: bytes) -> WireConsumer | None:
        """Where deliveries for *tag* go."""
        return self._consumers.get(tag)

    def has_consumer(self, consumer: WireConsumer) -> bool:
        """Whether deliveries go to *consumer*."""
        return consumer in self._consumers.values()

    def watch(self, callback: Callable[[], None]) -> None:
        """Call *callback* when the channel is gone."""
        if self.error is None:
            self._watchers.append(callback)

    def _set_consumer(self, tag: bytes, consumer: WireConsumer) -> None:
        self._consumers[tag] = consumer
        self.consumers[tag] = consumer.on_delivery

    def _remove_consumer(self, tag: bytes) -> WireConsumer | None:
        self.consumers.pop(tag, None)
        self._unlimited.pop(tag, None)
        return self._consumers.pop(tag, None)

    def _on_broker_cancel(self, method: Basic.Cancel) -> None:
        consumer_tag = method.consumer_tag or ""
        consumer = self._remove_consumer(encode_tag(consumer_tag))
        if self.transport.server_supports("accept_consumer_cancel_ok"):  # whatever nowait says: it is always set
            self.send(make(Basic.CancelOk, consumer_tag=consumer_tag))
        if consumer is not None:
            self.settler.flush()  # of a consumer that counts as cancelled from here on, none would be written
            self.settler.cancelled[encode_tag(consumer_tag)] = consumer.no_ack
            consumer.on_end(ConsumerCancelled(consumer_tag))

    # ----------------------------------------------------------------------------------------- fetching, closing

    async def get(self, queue: str, no_ack: bool, timeout: float) -> Fetched | Basic.GetEmpty:
        """``basic.get``; a message that comes after the caller has gone is requeued."""

        result: Fetched | Basic.GetEmpty = await self.call(
            make(Basic.Get, queue=queue, no_ack=no_ack), timeout, on_late=None if no_ack else self.give_back
        )
        return result

    def ask_for(self, queue: str, no_ack: bool) -> asyncio.Future[Fetched | Basic.GetEmpty]:
        """The same without waiting; a message that comes when the future was cancelled is requeued.

        Raises:
            ChannelInvalidStateError: the channel is not open.
        """
        self._check_callable()
        return self._request(make(Basic.Get, queue=queue, no_ack=no_ack), None, None if no_ack else self.give_back)

    def give_back(self, fetched: Fetched | Basic.GetEmpty) -> None:
        """Requeue what was fetched, if there is something, and the channel."""
        if isinstance(fetched, Fetched) and self.error is None:
            self.settler.requeue(fetched.get_ok.delivery_tag)

    def close(self, error: Exception | None = None) -> None:
        """Close it, without waiting for anything; publishes that are not confirmed end as outcome unknown.

        Args:
            error: what those who wait get; None for a ChannelClosed that says that it was meant to be.
        """
        if self.error is None:
            self._send_close()
            self._end(error or ChannelClosed("the channel was closed", reply_code=200, reply_text="Normal shutdown"))

    async def wait_closed(self, deadline: float) -> None:
        """Wait for the broker's close-ok, but not beyond *deadline* in event loop time.

        If none comes (a blocked connection gets none), the number stays taken until one does.
        """
        if self._close_ok is not None:
            try:
                async with asyncio.timeout_at(deadline):
                    await asyncio.shield(self._close_ok)
            except TimeoutError:
                _log.info("%r: no close-ok in time%s", self, self.transport.blocked_hint())

    def _send_close(self, code: int = 200, text: str = "Normal shutdown") -> None:
        self.settler.flush()
        # Not by way of a CommitGate: it is the one method that may overtake a commit.
        self.transport.send(self.number, make(ChannelMethods.Close, reply_code=code, reply_text=text))
        self._close_ok = self._loop.create_future()

    def _on_close(self, method: ChannelMethods.Close) -> None:
        self.transport.send(self.number, make(ChannelMethods.CloseOk))
        if self._close_ok is not None:
            return  # the closes crossed: the broker answers ours too, and the number is free then
        self.transport.detach(self.number)
        self._end(channel_closed(method))

    def on_connection_lost(self, error: Exception) -> None:
        """The transport died."""
        if self._close_ok is not None and not self._close_ok.done():
            self._close_ok.set_result(None)
        if self.error is None:
            self._end(error)

    def _end(self, error: Exception) -> None:
        """The one way out: every waiter, consumer and the owner are told."""
        self.error = error
        self._content.drop()
        self.settler.end(error)
        for starting in self._starting.values():
            starting.set_result(None)
        self._starting.clear()
        consumers = list(self._consumers.values())
        self._consumers.clear()
        self._unlimited.clear()
        self.consumers.clear()
        self.on_ack = None
        for pending in self._replies.take_all():
            fail(pending.reply, fresh(error))
        self.publisher.end(error)
        for consumer in consumers:
            consumer.on_end(error)
        watchers, self._watchers = self._watchers, []
        for callback in watchers:
            callback()
        self._owner.on_wire_lost(self, error)
