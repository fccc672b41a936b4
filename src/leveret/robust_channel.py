"""Channels that come back, and the queues and exchanges on them.

They run the same code as the plain ones. What differs is small: a robust channel *remembers* what was declared, bound
and consumed, and waits for its wire instead of refusing. :mod:`leveret.restore` gives it a new wire.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import weakref
from collections.abc import Generator
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pamqp.commands import Basic
from pamqp.commands import Queue as QueueMethods

from leveret.callbacks import CallbackCollection
from leveret.channel import MANY_NACKS, Channel, H, consume
from leveret.consumer import Attach, OnCancelled
from leveret.exceptions import (
    AMQPError,
    ChannelClosed,
    ChannelInvalidStateError,
    ConnectionClosed,
    ConsumerCancelled,
    DuplicateConsumerTag,
)
from leveret.exchange import Exchange
from leveret.lazy import pass_on
from leveret.log import get_logger, printable
from leveret.queue import Queue
from leveret.records import ConsumerRecord, Key, Record, consumer_key, exchange_key, queue_key
from leveret.types import Arguments, ExchangeType, TimeoutType
from leveret.wire.channel import WireChannel, WireConsumer
from leveret.wire.outgoing import Publish, PublishSender
from leveret.wire.transport import Transport

if TYPE_CHECKING:
    from leveret.robust import RobustConnection

pass_on(__name__)
_log = get_logger(__name__)

_handles: weakref.WeakValueDictionary[tuple[int, type[Any], str], Any] = weakref.WeakValueDictionary()
"""By key of the channel, type and name: asking for one again gives the same object, as in aio-pika."""

_LAST_ANSWERS = 0.5
"""Seconds for the answers to what is on its way on a wire that is to be replaced."""
_MAX_RENEWALS = 6
"""The pause before the next one grows to 2 to the power of this, in seconds."""


class NothingSent(TimeoutError):
    """The channel was not back in time."""


def _is_refusal(error: Exception) -> bool:
    """Whether what was asked for has not been done."""
    return not isinstance(error, TimeoutError) or isinstance(error, NothingSent)


class RobustExchange(Exchange):
    """An exchange that is declared again, with its bindings, when the connection is back."""

    channel: RobustChannel

    async def restore(self, channel: object = None) -> None:
        """Declare it and its bindings again now.

        Args:
            channel: as in aio-pika before 9; ignored.

        Raises:
            TopologyError: the broker refuses; the cause says why.
            ChannelInvalidStateError: the channel is closed.
        """
        await self.channel.restore_records(exchange_key(self.name))


class RobustQueue(Queue):
    """A queue that is declared again, with its bindings and consumers, when the connection is back."""

    channel: RobustChannel

    async def declare(self, timeout: TimeoutType = None, *, robust: bool = True) -> QueueMethods.DeclareOk:
        """As :meth:`Queue.declare`; ``name`` follows when the broker chooses another one.

        Raises:
            ChannelClosed and others: as :meth:`Channel.declare_queue`.
        """
        result = await super().declare(timeout, robust=robust)
        if self._is_server_named:
            self.channel.follow_name_of(self)
        return result

    async def restore(self, channel: object = None) -> None:
        """Declare it and its bindings again now, and consume again.

        Args:
            channel: as in aio-pika before 9; ignored.

        Raises:
            TopologyError: the broker refuses; the cause says why.
            ChannelInvalidStateError: the channel is closed.
        """
        await self.channel.restore_records(queue_key(self.name))


class _Subscription:
    """A consumer, whichever wire it is attached to."""

    __slots__ = ("attach", "consumer", "is_consuming", "is_lost", "is_starting", "on_cancelled", "wire", "wire_tag")

    def __init__(self, attach: Attach, on_cancelled: OnCancelled, wire: WireChannel, tag: str) -> None:
        self.attach = attach
        self.on_cancelled = on_cancelled
        self.is_starting = True
        self.attach_to(wire, tag)

    def attach_to(self, wire: WireChannel, tag: str) -> None:
        """Have a consumer for *wire*, which knows it by *tag*."""
        self.wire, self.wire_tag = wire, tag
        self.is_lost = self.is_consuming = False
        self.consumer = self.attach(wire, tag)

    @property
    def is_attached(self) -> bool:
        """Whether it consumes, or is about to."""
        return self.wire.is_open and not self.is_lost


class RobustChannel(Channel):
    """A channel that comes back: after a lost connection, and after the broker closed it.

    Calls, and publishes too, wait for it within their timeout. Its prefetch, its consumers and what was declared and
    bound through it are restored. A consumer of the user's is never lost over somebody else's mistake.

    Attributes:
        close_callbacks: called with (channel, exception) whenever it is lost or closed.

    https://www.rabbitmq.com/docs/channels
    """

    QUEUE_CLASS = RobustQueue
    EXCHANGE_CLASS = RobustExchange

    default_exchange: RobustExchange  # pyright: ignore[reportIncompatibleVariableOverride]
    _connection: RobustConnection

    if TYPE_CHECKING:  # what QUEUE_CLASS, EXCHANGE_CLASS and the connection come to

        @property
        def connection(self) -> RobustConnection: ...

        async def declare_exchange(
            self,
            name: str,
            type: ExchangeType | str = ExchangeType.DIRECT,
            durable: bool = False,
            auto_delete: bool = False,
            internal: bool = False,
            passive: bool = False,
            arguments: Arguments = None,
            timeout: TimeoutType = None,
            robust: bool = True,
        ) -> RobustExchange: ...

        async def get_exchange(self, name: str, *, ensure: bool = True) -> RobustExchange: ...

        async def declare_queue(
            self,
            name: str | None = None,
            *,
            durable: bool = False,
            exclusive: bool = False,
            passive: bool = False,
            auto_delete: bool = False,
            arguments: Arguments = None,
            timeout: TimeoutType = None,
            robust: bool = True,
        ) -> RobustQueue: ...

        async def get_queue(self, name: str, *, ensure: bool = True) -> RobustQueue: ...

    def __init__(
        self,
        connection: RobustConnection,
        channel_number: int | None = None,
        publisher_confirms: bool = True,
        on_return_raises: bool = False,
    ) -> None:
        super().__init__(connection, channel_number, publisher_confirms, on_return_raises)
        self._subscriptions: dict[str, _Subscription] = {}
        self._waiting = connection.new_waiting_room()
        self._is_up = False
        self._came_up: asyncio.Event | None = None  # while somebody waits for it
        self._close_called = False
        self._lost_transaction = False
        self._is_renewing = False
        self._renewals, self._renewed_at = 0, -math.inf
        self._incarnation = 0  # how often the user closed it
        self._registry = connection.registry
        self._recovery = connection.recovery

    @cached_property
    def reopen_callbacks(self) -> CallbackCollection[RobustChannel, []]:
        """Called with (channel) whenever it is back."""
        return CallbackCollection(self)

    # --------------------------------------------------------------------------------------- opening, closing

    async def _open(self, timeout: TimeoutType) -> None:
        if self._opening:
            raise RuntimeError("the channel is being opened already")
        self._opening = True
        self._close_called = False
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.seconds(timeout)
        try:
            while True:
                transport = await self._connection.ready_transport(deadline)
                try:
                    await self.open_on(transport, max(0.0, deadline - loop.time()))
                    break
                except AMQPError:
                    if transport.is_open or self._is_over:
                        raise
        finally:
            self._opening = False
        self.prefetch = 0
        if self._closed.done():
            self._closed = loop.create_future()
        self._connection.adopt(self)
        self._go_live()

    async def open_on(self, transport: Transport, timeout: float) -> WireChannel:
        """Give it a new wire; :meth:`release` lets others use it.

        Raises:
            ChannelInvalidStateError, ConnectionClosed, ChannelLimitReached, TimeoutError: as :meth:`initialize`.
        """
        incarnation = self._incarnation
        if self._wire is not None and self._requested_number is not None:  # the number may not be free yet
            await self._wire.wait_closed(asyncio.get_running_loop().time() + timeout)
        wire = await WireChannel.open(
            transport,
            self,
            number=self._requested_number,
            publisher_confirms=self.publisher_confirms,
            timeout=timeout,
        )
        if self._is_over or self._incarnation != incarnation:
            wire.close()
            raise ChannelInvalidStateError("the channel was closed while it was being opened")
        self._wire = wire
        return wire

    def _go_live(self) -> None:
        self._is_renewing = False
        self._waiting.hand_over(self.wire.publisher)
        self._set_up()
        self._choose_publish()

    def _set_up(self) -> None:
        self._is_up = True
        if self._came_up is not None:
            self._came_up.set()
            self._came_up = None

    def _choose_publish(self) -> None:
        """How to publish now."""
        if self._closed.done():
            self.write_publish = self._refuse_publish
        elif self._lost_transaction:
            self.write_publish = self._refuse_in_transaction
        else:
            self.write_publish = self.wire.publisher.publish if self._is_up else self._waiting.publish

    def _refuse_in_transaction(self, *_: object) -> Any:
        raise ChannelInvalidStateError("the transaction ended with its channel: roll it back, and begin again")

    def enter_transaction(self) -> None:
        """A transaction has begun on it, and may have been lost in the same turn."""
        super().enter_transaction()
        self._lost_transaction = not self._is_up
        self._choose_publish()

    def leave_transaction(self) -> None:
        """The transaction on it was ended; if it was lost meanwhile, publishing goes on from here."""
        super().leave_transaction()
        self._lost_transaction = False
        self._choose_publish()

    def release(self) -> None:
        """It is restored."""
        if not self._is_over:
            self._go_live()
            self.reopen_callbacks()

    async def reopen(self) -> None:
        """Open it again after it was closed; one that is open gets a new wire, with all that was on the old one."""
        if self._is_over or self._wire is None:
            await self.close()
            await self._open(None)
        else:
            self._wire.close(ChannelClosed("reopen() was called"))
            await self.live_wire(self._connection.operation_timeout)

    async def _close(self, timeout: float) -> None:
        """It does not come back; publishes that still wait for the connection end as PublishNotSent."""
        self._close_called = True
        self._incarnation += 1
        await super()._close(timeout)
        if self._wire is not None:
            self._end(ChannelClosed("the channel was closed", reply_code=200, reply_text="Normal shutdown"))

    @property
    def _is_over(self) -> bool:
        return self._close_called or self._connection.close_called or self._connection.is_closed

    @property
    def is_closed(self) -> bool:
        """Whether it is closed for good, or not yet opened; not while it is being restored."""
        return self._wire is None or self._is_over or self._closed.done()

    @property
    def is_live(self) -> bool:
        """Whether what is sent on it goes out now; not while it is being restored."""
        return not self.is_closed and self._is_up

    def why_not_live(self) -> str:
        """What is in the way of sending."""
        return super().why_not_live() if self.is_closed else f"the channel is lost, {self._connection.why_down()}"

    async def ready(self) -> None:
        """Wait until the channel is restored.

        Raises:
            ChannelInvalidStateError: it is closed.
        """
        await self.live_wire(float("inf"))

    async def restore(self, channel: object = None) -> None:
        """Check all that was declared, bound and consumed through it, now.

        Args:
            channel: as in aio-pika before 9; ignored.

        Raises:
            TopologyError: the broker refuses some of it; the cause says why.
            ChannelInvalidStateError: it is closed.
        """
        await self.restore_records(*self._registry.keys_of(self.key))

    async def restore_records(self, *keys: Key) -> None:
        """As :meth:`restore`, for these and what belongs to them.

        Raises:
            TopologyError, ChannelInvalidStateError: as :meth:`restore`.
        """
        seconds = self._connection.operation_timeout
        async with asyncio.timeout(seconds):
            await self._recovery.restored(keys)
        await self.live_wire(seconds)

    # ---------------------------------------------------------------------------------- waiting for the wire

    async def live_wire(self, seconds: float) -> tuple[WireChannel, float]:
        """The channel below, once it is restored, and how many of *seconds* are left then.

        Raises:
            ChannelInvalidStateError: it is closed, or was never opened.
            TimeoutError: it is not back in time.
        """
        wire = self.wire
        if self._is_up and not self._is_over:
            return wire, seconds
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        try:
            async with asyncio.timeout_at(deadline):
                while not self._is_over and not self._closed.done():
                    if not self._is_up:
                        self._came_up = self._came_up or asyncio.Event()
                        await self._came_up.wait()
                    if self.is_live:
                        return self.wire, max(0.0, deadline - loop.time())
        except TimeoutError:
            raise NothingSent(f"nothing was sent within {seconds:g} s: {self._connection.why_down()}") from None
        raise ChannelInvalidStateError("the channel is closed")

    def _refuse_publish(self, *_: object) -> Any:
        if self._wire is not None:
            raise ChannelInvalidStateError("the channel is closed")
        return super()._refuse_publish()

    @property
    def sender(self) -> PublishSender:
        """Who takes what is published on it now: the wire, or the waiting room while there is none.

        Raises:
            ChannelInvalidStateError: it is closed, or its transaction was lost.
        """
        if self.is_live and not self._lost_transaction:
            return super().sender
        if self.is_closed:
            self._refuse_publish()
        if self._lost_transaction:
            self._refuse_in_transaction()
        return self._waiting

    @property
    def waiting_publishes(self) -> int:
        """How many publishes wait to be written, or for the channel to be back."""
        return super().waiting_publishes + len(self._waiting)

    def take_back(self, publish: Publish, error: Exception) -> bool:
        """*publish* waits for the next wire."""
        return not self._is_over and not self.in_transaction and self._waiting.add(publish)

    def on_nacked(self, in_a_row: int) -> None:
        """Get a new wire where the broker goes on refusing, where nothing was consumed or fetched on this one.

        RabbitMQ 3.10 may refuse all that comes on a channel after the leader of a quorum queue has gone, for ever; it
        takes what comes on a new one. Where the queue is full, that costs little, and is not done often.
        """
        loop = asyncio.get_running_loop()
        wire = self.wire
        if in_a_row < MANY_NACKS or not self.is_live or not wire.publishes_only:
            return
        if wire.publisher.has_confirmed:  # else the last one was of no use
            self._renewals = 0
        if loop.time() < self._renewed_at + 2.0**self._renewals:
            return
        _log.warning("%r: the broker refused the last %d publishes: trying another channel", self, in_a_row)
        self._renewals = min(self._renewals + 1, _MAX_RENEWALS)
        self._renewed_at = loop.time()
        self._is_renewing = True
        self._is_up = False
        self._choose_publish()
        self._renew(wire, loop.time() + _LAST_ANSWERS)

    def _renew(self, wire: WireChannel, deadline: float) -> None:
        """Close *wire* when nobody waits for it any more; where that takes too long, go on with it."""
        if not self._is_renewing or self._is_over:  # lost, or closed, meanwhile
            return
        loop = asyncio.get_running_loop()
        if not wire.is_awaited:
            wire.close(ChannelClosed("the broker refused all that was published on it"))
        elif loop.time() < deadline:
            loop.call_later(_LAST_ANSWERS / 50, self._renew, wire, deadline)
        else:
            self._go_live()

    def on_wire_lost(self, wire: WireChannel, error: Exception) -> None:
        """The wire is gone: wait for another one, unless it was the user who closed."""
        if wire is not self._wire:
            return
        was_live = self._is_up or self._is_renewing
        self._is_renewing = False
        self._is_up = False
        self._lost_transaction = self.in_transaction
        if self._is_over:
            self._end(error)
            return
        self._choose_publish()
        if was_live:
            self._log_loss(error)
            self.close_callbacks(error)
            if not wire.transport.is_open:
                return
            if isinstance(error, ChannelClosed) and not error.by_broker:  # reopen()
                self._recovery.refresh()
            else:
                self._recovery.on_channel_lost(self, error)

    def _end(self, error: Exception) -> None:
        if self._closed.done():
            return
        self._waiting.fail(error)
        subscriptions, self._subscriptions = self._subscriptions, {}
        for subscription in subscriptions.values():
            if not subscription.is_attached:  # else its wire tells it
                subscription.consumer.on_end(error)
        if not self._connection.close_called:
            self._registry.forget_channel(self.key)
        super()._end(error)
        self._choose_publish()
        self._set_up()  # those who wait for it look what has become of it

    def give_up(self, error: Exception) -> None:
        """The connection is closed for good."""
        if self._wire is not None:
            self._end(error)

    # --------------------------------------------------------------------------------------------- remembering

    def remember(self, record: Record) -> None:
        """*record* is to be true on every connection from now on."""
        if not self.is_closed:
            self._registry.remember(record, self.key)

    @contextlib.contextmanager
    def forgetting(self, key: Key) -> Generator[None]:
        """The record of that identity, and what the broker deletes along, is forgotten, unless the block raises.

        Given up on, it may have gone, and was meant to.
        """
        with self._registry.forgetting(key, undone_by=_is_refusal):
            yield

    def tag_of(self, wire_tag: str) -> str:
        """The tag that a consumer was started with; after the broker cancelled it, it has another one on the wire."""
        return next((tag for tag, each in self._subscriptions.items() if each.wire_tag == wire_tag), wire_tag)

    def handle_of(self, declared: H) -> H:
        """The queue or exchange that the user has already, for a passive declaration of the same name."""
        key = self.key, type(declared), declared.name
        known: H | None = _handles.get(key)
        if declared.passive and known is not None and known.name == declared.name:
            if isinstance(declared, Queue) and isinstance(known, Queue):
                known.declaration_result = declared.declaration_result
            return known
        _handles[key] = declared
        return declared

    def new_queue_name(self) -> str:
        """A name of its own, which stays the same over reconnects."""
        return f"amq_{self.new_consumer_tag().partition('.')[2]}"

    def follow_name_of(self, queue: RobustQueue) -> None:
        """Change ``queue.name`` when the broker chooses another one."""
        self._connection.follow_name_of(queue)

    # ----------------------------------------------------------------------------------------------- consumers

    async def subscribe(
        self,
        record: ConsumerRecord,
        attach: Attach,
        timeout: TimeoutType,
        *,
        on_cancelled: OnCancelled,
        robust: bool,
    ) -> None:
        """Start a consumer, and have it back when the channel is.

        Args:
            record: what is consumed, and how.
            attach: makes the consumer for a wire.
            timeout: seconds, waiting for the channel included; None for the connection's ``operation_timeout``.
            on_cancelled: what happens when the broker cancels it.
            robust: whether it comes back.

        Raises:
            DuplicateConsumerTag and others: as :meth:`Channel.subscribe`.
        """
        if not robust:
            await super().subscribe(record, attach, timeout, on_cancelled=on_cancelled, robust=robust)
            return
        wire, seconds = await self.live_wire(self.seconds(timeout))
        record = self.with_prefetch(record)
        tag = record.consumer_tag
        if tag in self._subscriptions:
            raise DuplicateConsumerTag(f"the channel has a consumer tagged {tag!r} already")
        self._subscriptions[tag] = subscription = _Subscription(attach, on_cancelled, wire, tag)
        try:
            await consume(wire, record, subscription.consumer, seconds)
        except BaseException:
            self._subscriptions.pop(tag, None)
            raise
        if self._subscriptions.get(tag) is not subscription:  # cancelled meanwhile
            return
        subscription.is_starting, subscription.is_consuming = False, True
        self.remember(record)
        if subscription.is_lost:  # cancelled in the turn in which it began
            self._recovery.on_consumer_lost(record.key, ConsumerCancelled(tag))

    async def resubscribe(self, record: ConsumerRecord, timeout: float) -> None:
        """Consume again, by a fresh tag where this wire has seen the old one already.

        Raises:
            ChannelClosed, ConnectionClosed, ChannelInvalidStateError, TimeoutError: it does not consume.
        """
        subscription, wire = self._subscriptions.get(record.consumer_tag), self.wire
        if subscription is None:  # cancelled meanwhile
            return
        tag = record.consumer_tag if subscription.wire is not wire else self.new_consumer_tag()
        subscription.attach_to(wire, tag)
        try:
            await consume(wire, record, subscription.consumer, timeout, consumer_tag=tag)
        except BaseException:
            subscription.is_lost = True
            raise
        subscription.is_consuming = True
        if self._subscriptions.get(record.consumer_tag) is not subscription and wire.is_open:  # cancelled meanwhile
            await wire.cancel(tag, timeout, nowait=True)

    def is_open_on(self, transport: Transport) -> bool:
        """Whether it has an open wire on *transport*."""
        return self._wire is not None and self._wire.is_open and self._wire.transport is transport

    def is_attached(self, record: ConsumerRecord) -> bool:
        """Whether it consumes, or has been cancelled."""
        subscription = self._subscriptions.get(record.consumer_tag)
        return subscription is None or subscription.is_attached

    def is_consuming(self, record: ConsumerRecord) -> bool:
        """Whether the broker has confirmed that it consumes."""
        subscription = self._subscriptions.get(record.consumer_tag)
        return subscription is None or (subscription.is_attached and subscription.is_consuming)

    async def unsubscribe(
        self, consumer_tag: str, timeout: TimeoutType, *, nowait: bool = False
    ) -> Basic.CancelOk | None:
        """Stop a consumer, by the tag that :meth:`Queue.consume` returned or the one that its messages have.

        Raises:
            TimeoutError: no answer in time; the late one is swallowed, and it does not come back.
        """
        known_as = next((t for t, s in self._subscriptions.items() if consumer_tag in {t, s.wire_tag}), None)
        if known_as is None:
            return await super().unsubscribe(consumer_tag, timeout, nowait=nowait)
        subscription = self._subscriptions.pop(known_as)
        self._registry.forget(consumer_key(self.key, known_as))
        try:
            if subscription.is_attached:
                return await subscription.wire.cancel(subscription.wire_tag, self.seconds(timeout), nowait=nowait)
        except (ChannelInvalidStateError, ChannelClosed, ConnectionClosed):
            pass  # it went with its wire
        return None if nowait else Basic.CancelOk(known_as)

    def is_subscribed(self, consumer: WireConsumer) -> bool:
        """Whether *consumer* gets messages, or will when the channel is back."""
        mine = any(subscription.consumer is consumer for subscription in self._subscriptions.values())
        return mine or super().is_subscribed(consumer)

    def keeps_consumer(self, consumer_tag: str, error: Exception) -> bool:
        """Whether it will be back: unless it was cancelled or forgotten, or is not to outlive a broker's cancel."""
        subscription = self._subscriptions.get(consumer_tag)
        key = consumer_key(self.key, consumer_tag)
        if subscription is None or self._is_over:
            return False
        if isinstance(error, ConsumerCancelled):
            if not subscription.is_starting and key not in self._registry:
                return False  # its queue is being deleted by the user
            if subscription.on_cancelled != "resubscribe":
                del self._subscriptions[consumer_tag]
                self._registry.forget(key)
                return False
            subscription.is_lost = True
            _log.warning("%s It will be subscribed again.", printable(str(error)))
            self._recovery.on_consumer_lost(key, error)
        return True

    def drop_consumer(self, consumer_tag: str) -> None:
        """Its queue was deleted by the user."""
        subscription = self._subscriptions.pop(consumer_tag, None)
        if subscription is not None and not subscription.is_attached:  # else the broker tells
            subscription.consumer.on_end(ConsumerCancelled(consumer_tag))
