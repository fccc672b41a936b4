"""Channels: where everything but connecting starts."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import weakref
from collections.abc import Callable, Coroutine, Generator
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, overload

from pamqp.base import Frame
from pamqp.commands import Basic
from pamqp.commands import Channel as ChannelMethods
from pamqp.commands import Exchange as ExchangeMethods
from pamqp.commands import Queue as QueueMethods

from leveret.callbacks import CallbackCollection
from leveret.consumer import Attach, OnCancelled, check_prefetch
from leveret.draining import Drainable, DrainReport, check_drain, drain_for
from leveret.exceptions import ChannelClosed, ChannelInvalidStateError, ConsumerCancelled
from leveret.exchange import Exchange
from leveret.lazy import pass_on
from leveret.log import get_logger, printable
from leveret.message import ReturnedMessage
from leveret.older import OlderChannel, warn_of
from leveret.queue import Queue
from leveret.records import ConsumerRecord, Key, QosRecord, Record, exchange_key, queue_key
from leveret.transaction import Transaction
from leveret.types import Arguments, ExchangeType, TimeoutType
from leveret.wire.channel import WireChannel, WireConsumer
from leveret.wire.codec import Return
from leveret.wire.methods import make
from leveret.wire.outgoing import Publish, PublishSender
from leveret.wire.tally import Tally

if TYPE_CHECKING:
    from typing import Self

    from leveret.connection import Connection

pass_on(__name__)
_log = get_logger(__name__)

_keys = itertools.count(1)
H = TypeVar("H", Queue, Exchange)

MANY_NACKS = 100
"""A queue that is full refuses some; so many in a row mean that something is wrong with the broker."""

CLOSE_TIMEOUT = 10
"""Seconds that closing may take by default."""


class Channel(OlderChannel):
    """A channel of a connection. Get one from ``connection.channel()``.

    Open it with ``await connection.channel()`` or ``async with connection.channel() as channel:``. Any number of
    tasks may use it at a time, publishers too: there is no need for a pool.

    A mistake (a missing queue, other arguments than a queue has) makes the broker close the channel; the call that
    made it raises the broker's words, every later one ChannelInvalidStateError, and other channels never notice.
    :meth:`reopen` makes it usable again.

    Attributes:
        prefetch: how many unacknowledged messages the broker sends to a consumer that begins now without a
            ``prefetch`` of its own; 0 for no limit.
        key: tells it from the other channels of this process, in records of what was declared and consumed.
        in_transaction: whether a transaction has begun on it and was not ended.
        write_publish: how exchanges publish on it, for as long as it is as it is now.

    https://www.rabbitmq.com/docs/channels
    """

    QUEUE_CLASS: type[Queue] = Queue
    EXCHANGE_CLASS: type[Exchange] = Exchange

    def __init__(
        self,
        connection: Connection,
        channel_number: int | None = None,
        publisher_confirms: bool = True,
        on_return_raises: bool = False,
    ) -> None:
        if on_return_raises and not publisher_confirms:
            raise RuntimeError("on_return_raises needs publisher_confirms: without them nobody waits for the publish")
        self.publisher_confirms = publisher_confirms
        self.on_return_raises = on_return_raises
        self.prefetch = 0
        self.key = next(_keys)
        self.write_publish: Callable[..., Coroutine[Any, Any, Any]] = self._refuse_publish
        self.in_transaction = False
        self._connection = connection
        self._requested_number = channel_number
        self._wire: WireChannel | None = None
        self._opening = False
        self._closed: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    # What many channels never need is made when it is first used: a connection may have thousands of them.

    @cached_property
    def close_callbacks(self) -> CallbackCollection[Channel, [BaseException | None]]:
        """Called with (channel, exception) when it is closed, by whomever."""
        return CallbackCollection(self)

    @cached_property
    def return_callbacks(self) -> CallbackCollection[Channel, [ReturnedMessage]]:
        """Called with (channel, :class:`~leveret.ReturnedMessage`) when a mandatory message comes back."""
        return CallbackCollection(self)

    @cached_property
    def consumer_cancelled_callbacks(self) -> CallbackCollection[Channel, [ConsumerCancelled]]:
        """Called with (channel, :class:`~leveret.exceptions.ConsumerCancelled`) when the broker cancels a callback
        consumer.
        """
        return CallbackCollection(self)

    @cached_property
    def default_exchange(self) -> Exchange:
        """Routes to the queue named by the routing key."""
        return self.EXCHANGE_CLASS(self, "", durable=True)

    @cached_property
    def handler_tasks(self) -> set[asyncio.Task[None]]:
        """Callbacks that run, and consumers that are being stopped."""
        return set()

    @cached_property
    def consumers(self) -> weakref.WeakSet[Drainable]:
        """What consumes on it, or did, and somebody still holds."""
        return weakref.WeakSet()

    def __str__(self) -> str:
        return "Not initialized channel" if self._wire is None else str(self.number)

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else "open" if self.is_live else "lost"
        return f"<{type(self).__name__}: {self} {state}>"

    # --------------------------------------------------------------------------------------- opening, closing

    def __await__(self) -> Generator[Any, Any, Self]:
        yield from self.initialize().__await__()
        return self

    async def __aenter__(self) -> Self:
        if not self.is_initialized:
            await self.initialize()
        return self

    async def __aexit__(self, exc_type: object, exc: BaseException | None, tb: object) -> None:
        await self.close(exc)

    async def initialize(self, timeout: TimeoutType = None) -> None:
        """Open it (``channel.open``, and ``confirm.select`` unless told otherwise).

        Args:
            timeout: seconds; None for the connection's ``operation_timeout``.

        Raises:
            RuntimeError: it was opened before.
            ChannelInvalidStateError: the connection is not open.
            ChannelLimitReached: the connection has all channels that it may have.
        """
        if self._wire is not None:
            raise RuntimeError("Already initialized")
        await self._open(timeout)

    async def reopen(self) -> None:
        """Open it again after it was closed, with its callbacks; QoS and consumers are the caller's to set up again."""
        await self.close()
        await self._open(None)

    async def _open(self, timeout: TimeoutType) -> None:
        if self._opening:
            raise RuntimeError("the channel is being opened already")
        self._opening = True
        try:
            self._wire = await WireChannel.open(
                self._connection.open_transport(),
                self,
                number=self._requested_number,
                publisher_confirms=self.publisher_confirms,
                timeout=self.seconds(timeout),
            )
        finally:
            self._opening = False
        self.prefetch = 0
        self.write_publish = self._wire.publisher.publish
        if self._closed.done():
            self._closed = asyncio.get_running_loop().create_future()
        self._connection.adopt(self)

    @overload
    async def close(self, exc: BaseException | None = None, *, timeout: float = ..., drain: None = None) -> None: ...

    @overload
    async def close(self, exc: BaseException | None = None, *, timeout: float = ..., drain: float) -> DrainReport: ...

    async def close(
        self, exc: BaseException | None = None, *, timeout: float = CLOSE_TIMEOUT, drain: float | None = None
    ) -> DrainReport | None:
        """Close it: end its callbacks, wait for outstanding confirms, shake hands.

        Without *drain*, callbacks that still run are cancelled, and their messages requeued by the broker. With it,
        all consumers are stopped first, as by :meth:`Consumer.stop`; what a callback awaits on this channel works as
        before until it ends. Publishes that are not confirmed by the deadline end as PublishOutcomeUnknown. It
        never takes longer than *drain* and *timeout* together; closing what is closed does nothing.

        Args:
            exc: as in aio-pika; it changes nothing.
            timeout: seconds for all but *drain*.
            drain: seconds that callbacks get to end by themselves; whoever iterates, too, to settle the message at
                hand. None to cancel them at once.

        Returns:
            What became of the work at hand, with *drain*; otherwise None.

        Raises:
            ValueError: *drain* is negative.

        Cancellation: it is closed without waiting for anything.
        """
        if drain is None:
            await self._close(timeout)
            return None
        check_drain(drain)
        return await drain_for(list(self.consumers), self._close, drain, timeout)

    async def _close(self, timeout: float) -> None:
        wire = self._wire
        if wire is None or (self._closed.done() and not self.handler_tasks):
            return
        deadline = asyncio.get_running_loop().time() + timeout
        self.begin_close()
        try:
            await self.end_handlers(deadline)
            await wire.publisher.settled(deadline)
        finally:
            wire.close()
        await wire.wait_closed(deadline)

    def begin_close(self) -> None:
        """Start no more callbacks, and cancel those that run (but not the one that calls this)."""
        if self._wire is not None:
            self._wire.begin_close()
        for task in self.handler_tasks - {asyncio.current_task()}:
            task.cancel()

    async def wait_for_confirms(self, deadline: float) -> None:
        """Wait until every publish is settled, or until *deadline* in event loop time; it never raises."""
        if self._wire is not None:
            await self._wire.publisher.settled(deadline)

    async def end_handlers(self, deadline: float) -> None:
        """Wait for the callbacks that run (but not for the one that calls this) until *deadline*; it never raises."""
        tasks = self.handler_tasks - {asyncio.current_task()}
        if tasks:
            await asyncio.wait(tasks, timeout=max(0, deadline - asyncio.get_running_loop().time()))

    @property
    def connection(self) -> Connection:
        """The connection that it is on."""
        return self._connection

    @property
    def is_initialized(self) -> bool:
        """Whether it was ever opened."""
        return self._wire is not None

    @property
    def is_closed(self) -> bool:
        """Whether it is closed, or not yet opened."""
        return self._wire is None or not self._wire.is_open

    @property
    def is_live(self) -> bool:
        """Whether what is sent on it goes out now."""
        return not self.is_closed

    def why_not_live(self) -> str:
        """What is in the way of sending."""
        error = None if self._wire is None else self._wire.error
        return "the channel was not opened" if error is None else f"the channel is closed: {printable(str(error))}"

    @property
    def complaints(self) -> list[str]:
        """What is wrong with publishing and consuming on it, as far as we know."""
        if self._wire is None or not self._wire.is_open:
            return []
        publisher = self._wire.publisher
        complaints = [text for consumer in self.consumers if (text := consumer.complaint) is not None]
        if overdue := publisher.unconfirmed_too_long:
            complaints.append(f"channel {self}: {overdue} confirms are overdue")
        if publisher.nacked_in_a_row >= MANY_NACKS:
            complaints.append(f"channel {self}: the broker refused the last {publisher.nacked_in_a_row} publishes")
        return complaints

    def closed(self) -> asyncio.Future[bool]:
        """A future that is True once the channel is closed, by whomever."""
        return asyncio.shield(self._closed)

    @property
    def number(self) -> int | None:
        """The channel number; before opening the one that was asked for."""
        return self._requested_number if self._wire is None else self._wire.number

    # ------------------------------------------------------------------------------------ what the wire says

    def on_returned(self, method: Return, properties: bytes, body: bytes) -> ReturnedMessage:
        """A mandatory message came back."""
        message = ReturnedMessage(method.reply_code, method.reply_text, method.route, properties, body)
        self.return_callbacks(message)
        return message

    def on_nacked(self, in_a_row: int) -> None:
        """The broker refused publishes; :attr:`complaints` tells when that goes on."""

    def take_back(self, publish: Publish, error: Exception) -> bool:
        """Whether *publish*, which the channel was lost with, is sent again: not on a channel that stays closed."""
        return False

    def keeps_consumer(self, consumer_tag: str, error: Exception) -> bool:
        """Whether the consumer, which *error* ended, will be back: not on a channel that stays closed."""
        return False

    def on_consumer_cancelled(self, consumer_tag: str, on_cancelled: OnCancelled, error: ConsumerCancelled) -> None:
        """The broker cancelled a callback consumer."""
        if self.keeps_consumer(consumer_tag, error):
            return
        _log.warning("%s", printable(str(error)))
        if on_cancelled != "stop":
            self.consumer_cancelled_callbacks(error)

    def on_wire_lost(self, wire: WireChannel, error: Exception) -> None:
        """The channel was closed, by this side, by the broker, or with its connection."""
        if wire is self._wire:
            self._log_loss(error)
            self._end(error)

    def _log_loss(self, error: Exception) -> None:
        if isinstance(error, ChannelClosed) and error.by_broker:
            _log.warning("%r was closed by the broker: %s", self, printable(error.reply_text))

    def _end(self, error: Exception) -> None:
        """It is closed, and stays so unless somebody opens it again."""
        if not self._closed.done():
            self._closed.set_result(True)
            for task in self.handler_tasks:
                task.add_done_callback(self._on_last_handlers)
            self._on_last_handlers()
            self.close_callbacks(error)

    def _on_last_handlers(self, _: object = None) -> None:
        """The connection keeps a closed channel for as long as callbacks run, to end them when it is closed."""
        if not self.handler_tasks and self.is_closed:
            self._connection.disown(self)

    # -------------------------------------------------------------------------- for exchanges, queues, iterators

    @property
    def wire(self) -> WireChannel:
        """The channel below, open or not: it checks that itself.

        Raises:
            ChannelInvalidStateError: the channel was never opened.
        """
        wire = self._wire
        if wire is None:
            raise ChannelInvalidStateError("the channel was not opened: await it, or use it with async with")
        return wire

    async def live_wire(self, seconds: float) -> tuple[WireChannel, float]:
        """The channel below, and how many of *seconds* are left; here it is what there is, open or not.

        Raises:
            ChannelInvalidStateError: the channel was never opened.
        """
        return self.wire, seconds

    def _refuse_publish(self, *_: object) -> Coroutine[Any, Any, Any]:
        raise ChannelInvalidStateError("the channel was not opened: await it, or use it with async with")

    @property
    def sender(self) -> PublishSender:
        """Who takes what is published on it now.

        Raises:
            ChannelInvalidStateError: the channel is not open.
        """
        publisher = self.wire.publisher
        publisher.check_open()
        return publisher

    @property
    def waiting_publishes(self) -> int:
        """How many publishes wait to be written."""
        return 0 if self._wire is None else self._wire.publisher.waiting

    @property
    def tally(self) -> Tally:
        """What its connection has done so far."""
        return self._connection.tally

    def remember(self, record: Record) -> None:
        """*record* is true now, and the user wants it to stay so; a plain channel keeps no records."""

    def enter_transaction(self) -> None:
        """A transaction has begun on it."""
        self.in_transaction = True

    def leave_transaction(self) -> None:
        """The transaction on it was ended."""
        self.in_transaction = False

    @contextlib.contextmanager
    def forgetting(self, key: Key) -> Generator[None]:
        """The record of that identity is no longer true, unless the block raises; a plain channel keeps no records."""
        yield

    def seconds(self, timeout: TimeoutType) -> float:
        """*timeout*, or the connection's ``operation_timeout`` for None."""
        return self._connection.operation_timeout if timeout is None else timeout

    def handle_of(self, declared: H) -> H:
        """What the user gets for what was just declared."""
        return declared

    def new_consumer_tag(self) -> str:
        """A consumer tag that nobody else has."""
        return f"ctag{self.number}.{os.urandom(16).hex()}"

    def tag_of(self, wire_tag: str) -> str:
        """The tag that a consumer was started with, which the wire knows by *wire_tag*."""
        return wire_tag

    def new_queue_name(self) -> str:
        """The name of a queue that was given none; "" leaves it to the broker."""
        return ""

    async def call(self, method: Frame, timeout: TimeoutType) -> Any:
        """Send *method* and wait for its reply.

        Raises:
            ChannelInvalidStateError: the channel is not open.
            ChannelClosed, ConnectionClosed: the broker closed it over this, or it was lost meanwhile.
            TimeoutError: no answer in time; the channel stays usable, and the late reply is swallowed.
            ValueError: a name of more than 255 bytes.
        """
        wire, seconds = await self.live_wire(self.seconds(timeout))
        return await wire.call(method, seconds)

    async def call_after_publishes(self, method: Frame, timeout: TimeoutType) -> Any:
        """The same, after the publishes that are held back now.

        Raises:
            ChannelInvalidStateError: the channel is not open, or publishes are still held back at the deadline.
            ChannelClosed: the broker closed the channel over it.
            TimeoutError: no answer in time.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.seconds(timeout)
        wire = self.wire
        await wire.publisher.settled(deadline)
        return await wire.call(method, max(0.0, deadline - loop.time()))

    async def call_or_send(self, method: Any, timeout: TimeoutType) -> Any:
        """The same, but do not wait for the reply where *method* says ``nowait``.

        Raises:
            ChannelInvalidStateError, ChannelClosed, ConnectionClosed, TimeoutError, ValueError: as :meth:`call`. With
                ``nowait`` a refusal closes the channel, and later calls tell.
        """
        if method.nowait:
            wire, _ = await self.live_wire(self.seconds(timeout))
            wire.send(method)
            return None
        return await self.call(method, timeout)

    async def subscribe(
        self, record: ConsumerRecord, attach: Attach, timeout: TimeoutType, *, on_cancelled: OnCancelled, robust: bool
    ) -> None:
        """Start a consumer.

        Args:
            record: what is consumed, and how.
            attach: makes the consumer for a wire.
            timeout: seconds; None for the connection's ``operation_timeout``.
            on_cancelled: what happens when the broker cancels it, where the channel recovers.
            robust: whether it comes back with the channel, where that recovers.

        Raises:
            DuplicateConsumerTag: the channel has that tag.
            ChannelInvalidStateError, ChannelClosed, ConnectionClosed, TimeoutError, ValueError: as :meth:`call`.
        """
        wire, seconds = await self.live_wire(self.seconds(timeout))
        await consume(wire, self.with_prefetch(record), attach(wire, record.consumer_tag), seconds)

    def with_prefetch(self, record: ConsumerRecord) -> ConsumerRecord:
        """*record* as it begins now."""
        return record if record.prefetch is not None else record._replace(prefetch=self.prefetch)

    async def unsubscribe(
        self, consumer_tag: str, timeout: TimeoutType, *, nowait: bool = False
    ) -> Basic.CancelOk | None:
        """Stop a consumer.

        Raises:
            ChannelInvalidStateError, ChannelClosed, ConnectionClosed, TimeoutError, ValueError: as :meth:`call`.
        """
        return await self.wire.cancel(consumer_tag, self.seconds(timeout), nowait=nowait)

    def is_subscribed(self, consumer: WireConsumer) -> bool:
        """Whether *consumer* gets messages, or will when the channel is back."""
        return self._wire is not None and self._wire.has_consumer(consumer)

    # --------------------------------------------------------------------------------------------- declaring

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
    ) -> Exchange:
        """Create the exchange if there is none (``exchange.declare``).

        Args:
            name: at most 255 bytes; names that begin with ``amq.`` are the broker's.
            type: an :class:`~leveret.ExchangeType` or a string. RabbitMQ 3.10 closes the connection, later releases
                the channel, over a type that they do not have.
            durable: keep it over a restart of the broker.
            auto_delete: delete it when its last binding goes.
            internal: only other exchanges may publish to it.
            passive: only check that it exists.
            arguments: such as ``alternate-exchange``.
            timeout: seconds; None for the connection's ``operation_timeout``.
            robust: declare it again after a reconnect, on a connection of :func:`~leveret.connect_robust`.

        Raises:
            ChannelPreconditionFailed: it exists with other properties. This closes the channel.
            ChannelNotFoundEntity: *passive*, and it does not exist. This closes the channel.
        """
        exchange = self.EXCHANGE_CLASS(
            self,
            name,
            type,
            durable=durable,
            auto_delete=auto_delete,
            internal=internal,
            passive=passive,
            arguments=arguments,
        )
        await exchange.declare(timeout, robust=robust)
        return self.handle_of(exchange) if robust else exchange

    async def get_exchange(self, name: str, *, ensure: bool = True) -> Exchange:
        """An exchange that exists; with *ensure* the broker is asked whether it does (a passive declare).

        Raises:
            ChannelNotFoundEntity: *ensure*, and it does not exist. This closes the channel.
            ChannelInvalidStateError: the channel is not open.
            TimeoutError: no answer in time; the channel stays usable, and the late reply is swallowed.
            ValueError: a name of more than 255 bytes.

        Without *ensure* nothing is sent, and nothing raised.
        """
        if ensure:
            return await self.declare_exchange(name, passive=True)
        return self.EXCHANGE_CLASS(self, name, passive=True)

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
    ) -> Queue:
        """Create the queue if there is none (``queue.declare``).

        Args:
            name: at most 255 bytes; "" lets the broker choose one, and None too, but on a connection of
                :func:`~leveret.connect_robust`, where it stands for a new name that stays the same when the
                connection is lost. The broker chooses another one then, which ``queue.name`` follows.
            durable: keep it over a restart of the broker, with its persistent messages.
            exclusive: only this connection may use it, and it goes with the connection.
            passive: only check that it exists.
            auto_delete: delete it when its last consumer goes.
            arguments: such as ``x-queue-type``, ``x-message-ttl``, ``x-dead-letter-exchange``.
            timeout: seconds; None for the connection's ``operation_timeout``.
            robust: declare it again after a reconnect, on a connection of :func:`~leveret.connect_robust`.

        Raises:
            ChannelPreconditionFailed: it exists with other properties. This closes the channel.
            ChannelNotFoundEntity: *passive*, and it does not exist. This closes the channel.
            ChannelLockedResource: it is another connection's exclusive queue. This closes the channel.

        https://www.rabbitmq.com/docs/queues
        """
        given = self.new_queue_name() if name is None else name
        queue = self.QUEUE_CLASS(self, given, durable, exclusive, auto_delete, arguments, passive)
        await queue.declare(timeout, robust=robust)
        return self.handle_of(queue) if robust else queue

    async def get_queue(self, name: str, *, ensure: bool = True) -> Queue:
        """A queue that exists; with *ensure* the broker is asked whether it does (a passive declare).

        Raises:
            ChannelNotFoundEntity: *ensure*, and it does not exist. This closes the channel.
            ChannelLockedResource: *ensure*, and it is another connection's exclusive queue. This closes the channel.
            ChannelInvalidStateError: the channel is not open.
            TimeoutError: no answer in time; the channel stays usable, and the late reply is swallowed.
            ValueError: a name of more than 255 bytes.

        Without *ensure* nothing is sent, and nothing raised.
        """
        if ensure:
            return await self.declare_queue(name, passive=True)
        return self.QUEUE_CLASS(self, name, False, False, False, None, True)

    async def exchange_delete(
        self, exchange_name: str, timeout: TimeoutType = None, if_unused: bool = False, nowait: bool = False
    ) -> ExchangeMethods.DeleteOk | None:
        """Delete an exchange by name (``exchange.delete``).

        Args:
            exchange_name: its name.
            timeout: seconds; None for the connection's ``operation_timeout``.
            if_unused: only while nothing is bound to it.
            nowait: do not wait for the answer; a refusal closes the channel, and later calls tell.

        Raises:
            ChannelPreconditionFailed: *if_unused*, and it is in use. This closes the channel.
            ChannelAccessRefused: a predeclared exchange, or no permission. This closes the channel.
            ChannelInvalidStateError: the channel is not open.
            TimeoutError: no answer in time; the channel stays usable, and the late reply is swallowed.
            ValueError: a name of more than 255 bytes.
        """
        method = make(ExchangeMethods.Delete, exchange=exchange_name, if_unused=if_unused, nowait=nowait)
        with self.forgetting(exchange_key(exchange_name)):
            result: ExchangeMethods.DeleteOk | None = await self.call_or_send(method, timeout)
        return result

    async def queue_delete(
        self,
        queue_name: str,
        timeout: TimeoutType = None,
        if_unused: bool = False,
        if_empty: bool = False,
        nowait: bool = False,
    ) -> QueueMethods.DeleteOk | None:
        """Delete a queue by name (``queue.delete``).

        Args:
            queue_name: its name.
            timeout: seconds; None for the connection's ``operation_timeout``.
            if_unused: only while nobody consumes from it. RabbitMQ closes the connection over this, and over
                *if_empty*, for a quorum queue (540).
            if_empty: only while it has no messages.
            nowait: do not wait for the answer; a refusal closes the channel, and later calls tell.

        Raises:
            ChannelPreconditionFailed: a condition is not met. This closes the channel.
            ChannelAccessRefused: no permission. This closes the channel.
            ChannelInvalidStateError: the channel is not open.
            TimeoutError: no answer in time; the channel stays usable, and the late reply is swallowed.
            ValueError: a name of more than 255 bytes.
        """
        method = make(QueueMethods.Delete, queue=queue_name, if_unused=if_unused, if_empty=if_empty, nowait=nowait)
        with self.forgetting(queue_key(queue_name)):
            result: QueueMethods.DeleteOk | None = await self.call_or_send(method, timeout)
        return result

    # ------------------------------------------------------------------------------------------ QoS and the rest

    async def set_qos(
        self,
        prefetch_count: int = 0,
        prefetch_size: int = 0,
        global_: bool = False,
        timeout: TimeoutType = None,
        all_channels: bool | None = None,
    ) -> Basic.QosOk:
        """How many unacknowledged messages the broker sends ahead (``basic.qos``).

        Args:
            prefetch_count: 0 (no limit) to 65,535; counts for each consumer that starts afterwards. Where consumers
                without a limit do not keep up, the whole connection is read more slowly (:meth:`Connection.health`).
            prefetch_size: must be 0; RabbitMQ does not implement it, and would close the connection.
            global_: count for all consumers of the channel together. RabbitMQ 4.3 counts for each all the same, and
                quorum queues refuse it.
            timeout: seconds; None for the connection's ``operation_timeout``.
            all_channels: the same as *global_*, as aio-pika named it before 9.

        Raises:
            ValueError: a value that RabbitMQ does not take.

        https://www.rabbitmq.com/docs/consumer-prefetch
        """
        if prefetch_size != 0:
            raise ValueError("RabbitMQ does not implement prefetch_size, and would close the connection (540)")
        check_prefetch("prefetch_count", prefetch_count)
        if all_channels is not None:
            warn_of("all_channels=", "use global_=")
            global_ = all_channels
        record = QosRecord(channel=self.key, prefetch_count=prefetch_count, global_=global_)
        wire, seconds = await self.live_wire(self.seconds(timeout))
        if not global_:  # for those who consume before the answer is here, too
            self.prefetch = prefetch_count
        result: Basic.QosOk = await wire.call(record.method(), seconds)
        self.remember(record)
        return result

    async def flow(self, active: bool = True) -> ChannelMethods.FlowOk:
        """Ask the broker to go on delivering (``channel.flow``).

        Raises:
            ValueError: *active* is False; RabbitMQ does not implement it, and would close the connection. Use a
                small prefetch, or cancel the consumer.
        """
        if not active:
            raise ValueError("RabbitMQ does not implement channel.flow(False), and would close the connection (540)")
        result: ChannelMethods.FlowOk = await self.call(make(ChannelMethods.Flow, active=active), None)
        return result

    def transaction(self) -> Transaction:
        """A transaction, for ``async with``.

        Raises:
            RuntimeError: the channel has publisher confirms, which AMQP does not combine with transactions.
        """
        if self.publisher_confirms:
            raise RuntimeError("transactions need a channel opened with publisher_confirms=False")
        return Transaction(self)


async def consume(
    wire: WireChannel,
    record: ConsumerRecord,
    consumer: WireConsumer,
    seconds: float,
    *,
    consumer_tag: str | None = None,
) -> None:
    """Start *consumer* on *wire* as *record* says; *consumer_tag* where the wire has to know it by another."""
    await wire.consume(
        record.queue,
        consumer_tag or record.consumer_tag,
        consumer,
        no_ack=record.no_ack,
        exclusive=record.exclusive,
        arguments=record.arguments,
        timeout=seconds,
        prefetch=record.prefetch,
    )
