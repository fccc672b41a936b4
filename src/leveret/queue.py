"""Queues: declare, bind, consume, fetch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

from pamqp.commands import Basic
from pamqp.commands import Queue as QueueMethods

from leveret.batches import BatchIterator
from leveret.consumer import ConsumerCallback, OnCancelled
from leveret.consuming import Consumer, consume
from leveret.exceptions import QueueEmpty
from leveret.exchange import Exchange, exchange_name
from leveret.failures import OnError
from leveret.iterator import QueueIterator
from leveret.lazy import pass_on
from leveret.message import IncomingMessage, incoming_message
from leveret.records import QueueBinding, QueueRecord, queue_key
from leveret.types import Arguments, ConsumerTag, TimeoutType
from leveret.wire.fetching import fetch_many
from leveret.wire.methods import make

if TYPE_CHECKING:
    from leveret.channel import Channel
    from leveret.message_retry import MessageRetry
    from leveret.wire.channel import Fetched, WireChannel

pass_on(__name__)


class Queue:
    """A queue, as seen from one channel. Get one from ``channel.declare_queue()`` or ``get_queue()``.

    Attributes:
        declaration_result: the broker's ``Queue.DeclareOk``: ``message_count``, ``consumer_count``.

    https://www.rabbitmq.com/docs/queues
    """

    __slots__ = (
        "__dict__",
        "__weakref__",
        "_is_server_named",
        "arguments",
        "auto_delete",
        "channel",
        "close_callbacks",
        "declaration_result",
        "durable",
        "exclusive",
        "name",
        "passive",
    )

    declaration_result: QueueMethods.DeclareOk

    def __init__(
        self,
        channel: Channel,
        name: str | None,
        durable: bool = False,
        exclusive: bool = False,
        auto_delete: bool = False,
        arguments: Arguments = None,
        passive: bool = False,
    ) -> None:
        self.channel = channel
        self.name = name or ""
        self.durable = durable
        self.exclusive = exclusive
        self.auto_delete = auto_delete
        self.arguments = arguments
        self.passive = passive
        self.close_callbacks = channel.close_callbacks
        self._is_server_named = False

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return (
            f"<Queue({self.name}): auto_delete={self.auto_delete}, durable={self.durable}, "
            f"exclusive={self.exclusive}, arguments={self.arguments!r}>"
        )

    @property
    def _type(self) -> object:
        return (self.arguments or {}).get("x-queue-type")

    def _refuse_stream(self, verb: str, instead: str) -> None:
        if self._type == "stream":
            raise ValueError(f"RabbitMQ cannot {verb} a stream, and would close the connection (540); use {instead}")

    async def declare(self, timeout: TimeoutType = None, *, robust: bool = True) -> QueueMethods.DeclareOk:
        """``queue.declare``; a queue without a name gets the broker's.

        Declaring that one again only checks that it is there: its name is the broker's to give.

        Args:
            timeout: seconds; None for the connection's ``operation_timeout``.
            robust: declare it again after a reconnect, on a connection of :func:`~leveret.connect_robust`.

        Raises:
            ChannelClosed and others: as :meth:`Channel.declare_queue`.
        """
        record = QueueRecord(
            name=self.name,
            durable=self.durable,
            exclusive=self.exclusive,
            auto_delete=self.auto_delete,
            arguments=self.arguments,
        )
        passive = self.passive or self._is_server_named
        result: QueueMethods.DeclareOk = await self.channel.call(record.method(passive=passive), timeout)
        self.declaration_result = result
        self._is_server_named = self._is_server_named or not self.name
        self.name = result.queue or ""
        if robust and not passive:
            self.channel.remember(record._replace(name=self.name, server_named=self._is_server_named))
        return result

    async def bind(
        self,
        exchange: Exchange | str,
        routing_key: str | None = None,
        *,
        arguments: Arguments = None,
        timeout: TimeoutType = None,
        robust: bool = True,
    ) -> QueueMethods.BindOk:
        """Let what is published to *exchange* reach this queue (``queue.bind``).

        Args:
            exchange: or its name.
            routing_key: None for the queue's name.
            arguments: such as the headers to match.
            timeout: seconds; None for the connection's ``operation_timeout``.
            robust: bind it again after a reconnect, on a connection of :func:`~leveret.connect_robust`.

        Raises:
            ChannelNotFoundEntity: the exchange or the queue does not exist. This closes the channel.
            ChannelAccessRefused: the default exchange, or no permission. This closes the channel.
            ChannelInvalidStateError: the channel is not open.
            TimeoutError: no answer in time; the channel stays usable, and the late reply is swallowed.
            ValueError: a name of more than 255 bytes.
        """
        binding = self._binding(exchange, routing_key, arguments)
        result: QueueMethods.BindOk = await self.channel.call(binding.method(), timeout)
        if robust:
            self.channel.remember(binding)
        return result

    async def unbind(
        self,
        exchange: Exchange | str,
        routing_key: str | None = None,
        arguments: Arguments = None,
        timeout: TimeoutType = None,
    ) -> QueueMethods.UnbindOk:
        """Undo :meth:`bind`, with the same arguments (``queue.unbind``).

        Args:
            exchange: or its name.
            routing_key: as it was bound; None for the queue's name.
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
            result: QueueMethods.UnbindOk = await self.channel.call(binding.undo(), timeout)
        return result

    def _binding(self, exchange: Exchange | str, routing_key: str | None, arguments: Arguments) -> QueueBinding:
        return QueueBinding(
            queue=self.name,
            exchange=exchange_name(exchange),
            routing_key=self.name if routing_key is None else routing_key,
            arguments=arguments,
        )

    async def consume(
        self,
        callback: ConsumerCallback,
        no_ack: bool = False,
        exclusive: bool = False,
        arguments: Arguments = None,
        consumer_tag: ConsumerTag | None = None,
        timeout: TimeoutType = None,
        robust: bool = True,
        on_cancelled: OnCancelled = "resubscribe",
        *,
        prefetch: int | None = None,
        concurrency: int | None = None,
        on_error: OnError = "leave",
        thread: bool = False,
        ack_batch: int | None = None,
        retry: MessageRetry | None = None,
    ) -> Consumer:
        """Run *callback* for every message (``basic.consume``).

        Callbacks start in order of arrival; one that waits does not hold up the next. How many run is bounded by
        *concurrency*, or else by *prefetch* or the channel's (:meth:`Channel.set_qos`).

        A callback settles its message by its methods, by ``message.process()``, or by returning ``leveret.Ack``,
        ``Nack``, ``Reject`` or ``Requeue``. Anything else that it returns means nothing, which is warned of once. One
        that fails is logged, with the message's ids.

        Args:
            callback: takes an :class:`~leveret.IncomingMessage`; a coroutine function, or a plain one.
            no_ack: the broker forgets each message as it sends it; what callbacks return means nothing then.
            exclusive: be the queue's only consumer.
            arguments: such as ``x-priority`` or ``x-stream-offset``.
            consumer_tag: of your own choice; unique on the channel.
            timeout: seconds; None for the connection's ``operation_timeout``.
            robust: consume again after a reconnect, on a connection of :func:`~leveret.connect_robust`.
            on_cancelled: what to do when the broker cancels the consumer, because its queue was deleted, say.
                ``"resubscribe"``, on a connection of :func:`~leveret.connect_robust`: declare the queue again if this
                connection declared it, and consume again. ``"raise"``, and every plain connection: log a warning and
                call the channel's ``consumer_cancelled_callbacks``. ``"stop"``: the warning alone.
            prefetch: how many unacknowledged messages the broker sends ahead to this consumer, from 0 (no limit) to
                65,535; None for twice the *concurrency*, or else for the channel's.
            concurrency: how many callbacks may run at a time; None for no limit but the prefetch.
            on_error: what to do with a message whose callback failed, unless it was settled. ``"leave"``:
                unacknowledged until the channel closes. ``"reject"``: dropped or dead-lettered. ``"requeue"``: back to
                the queue, which means at once, and for ever if it always fails. Or a callable, async or not, that is
                called with the message and the error, settled or not, and may return what a callback may.
            thread: run *callback*, a plain function, in the event loop's default executor. It settles by what it
                returns; the methods of the message raise RuntimeError there. A thread cannot be cancelled: a call
                that is cut off goes on to its end, and what it returns is dropped.
            ack_batch: write this many acks at a time, or what there is after 0.1 seconds; 2 or more, and no more than
                the prefetch. When the link is lost, messages whose acks were not written come again. None writes
                acks at the end of the event loop's turn.
            retry: try a message again whose callback failed, and put it aside at last, instead of *on_error*. A message
                whose callback returns is acknowledged then, unless it was settled. See :class:`~leveret.MessageRetry`.

        Returns:
            The consumer: a string, its tag, with methods of its own.

        Raises:
            TypeError: *callback* cannot be called, or is a coroutine function where *thread* wants a plain one.
            ValueError: *on_cancelled* or *on_error* is none of the choices, a number is out of range, or *retry* is
                given beside *on_error* or *no_ack*; and as :meth:`MessageRetry.prepare`.
            DuplicateConsumerTag: the channel has that tag.
            ChannelNotFoundEntity: no such queue.
            ChannelAccessRefused: it has an exclusive consumer.

        Cancellation: leaves no consumer behind; what it was sent meanwhile is requeued.

        Reconnect: callbacks that run go on. What none has started on is dropped: it comes again.

        https://www.rabbitmq.com/docs/consumers
        """
        return await consume(
            self,
            callback,
            no_ack=no_ack,
            exclusive=exclusive,
            arguments=arguments,
            consumer_tag=consumer_tag,
            timeout=timeout,
            robust=robust,
            on_cancelled=on_cancelled,
            prefetch=prefetch,
            concurrency=concurrency,
            on_error=on_error,
            thread=thread,
            ack_batch=ack_batch,
            retry=retry,
        )

    async def cancel(
        self, consumer_tag: ConsumerTag, timeout: TimeoutType = None, nowait: bool = False
    ) -> Basic.CancelOk | None:
        """Stop a consumer (``basic.cancel``); callbacks that run go on, and may still ack.

        Args:
            consumer_tag: what :meth:`consume` returned.
            timeout: seconds; None for the connection's ``operation_timeout``.
            nowait: do not wait for the broker's answer; what is still on its way is requeued.

        Raises:
            ChannelInvalidStateError: the channel is not open.
            TimeoutError: no answer in time; the channel stays usable, and the late reply is swallowed.
            ValueError: a name of more than 255 bytes.
        """
        return await self.channel.unsubscribe(consumer_tag, timeout, nowait=nowait)

    @overload
    async def get(
        self, *, no_ack: bool = False, fail: Literal[True] = True, timeout: TimeoutType = 5
    ) -> IncomingMessage: ...

    @overload
    async def get(
        self, *, no_ack: bool = False, fail: bool = True, timeout: TimeoutType = 5
    ) -> IncomingMessage | None: ...

    async def get(self, *, no_ack: bool = False, fail: bool = True, timeout: TimeoutType = 5) -> IncomingMessage | None:
        """Fetch one message (``basic.get``); for more than now and then, :meth:`consume` is far cheaper.

        Args:
            no_ack: the broker forgets the message as it sends it.
            fail: raise when the queue is empty, rather than return None.
            timeout: seconds; None for the connection's ``operation_timeout``.

        Raises:
            QueueEmpty: there is none.
            ValueError: a stream, which can only be consumed.

        Cancellation, and a timeout: a message that comes too late is requeued.
        """
        self._refuse_stream("get", "consume() with a prefetch and x-stream-offset")
        wire, seconds = await self.channel.live_wire(self.channel.seconds(timeout))
        fetched = await wire.get(self.name, no_ack, seconds)
        if isinstance(fetched, Basic.GetEmpty):
            if fail:
                raise QueueEmpty(f"queue {self.name!r} is empty")
            return None
        return _fetched_message(wire, fetched, no_ack)

    async def get_many(self, n: int, *, no_ack: bool = False, timeout: TimeoutType = 5) -> list[IncomingMessage]:
        """Fetch up to *n* messages that are there now (``basic.get``), several at a time.

        It does not wait for messages that are still to come: :meth:`batches` does.

        Args:
            n: how many at most. Never more than these are taken out of the queue.
            no_ack: the broker forgets each message as it sends it.
            timeout: seconds for the whole; None for the connection's ``operation_timeout``.

        Returns:
            The messages in their order; fewer than *n* if the queue had no more, or if there was no time for more.

        Raises:
            TimeoutError: none came in time.
            ChannelNotFoundEntity: no such queue. This closes the channel.
            ChannelInvalidStateError: the channel is not open.
            ChannelClosed, ConnectionClosed: it was lost meanwhile. What had come is redelivered; with *no_ack* it
                is returned instead.
            ValueError: *n* is negative; or the queue is a stream, which can only be consumed.

        Cancellation: what had come, and what comes too late, is requeued; with *no_ack* it is gone. The same holds for
        what comes after the timeout.

        https://www.rabbitmq.com/docs/consumers#polling
        """
        if n < 0:
            raise ValueError(f"n must not be negative: {n}")
        self._refuse_stream("get", "consume() with a prefetch and x-stream-offset")
        wire, seconds = await self.channel.live_wire(self.channel.seconds(timeout))
        fetched = await fetch_many(wire, self.name, n, no_ack, seconds)
        return [_fetched_message(wire, each, no_ack) for each in fetched]

    def batches(
        self,
        size: int = 100,
        timeout: float | None = 1.0,
        *,
        prefetch: int | None = None,
        redelivered_apart: bool = False,
        no_ack: bool = False,
        exclusive: bool = False,
        arguments: Arguments = None,
        consumer_tag: ConsumerTag | None = None,
        robust: bool = True,
        on_cancelled: OnCancelled = "resubscribe",
    ) -> BatchIterator:
        """Messages in batches, for ``async for``, best inside ``async with``.

        The arguments are those of :class:`~leveret.BatchIterator`.

        Raises:
            ValueError: *size*, *timeout* or *prefetch* make no sense, or *on_cancelled* is none of the three.
        """
        return BatchIterator(
            self,
            size,
            timeout,
            prefetch=prefetch,
            redelivered_apart=redelivered_apart,
            no_ack=no_ack,
            exclusive=exclusive,
            arguments=arguments,
            consumer_tag=consumer_tag,
            robust=robust,
            on_cancelled=on_cancelled,
        )

    def iterator(self, **kwargs: Any) -> QueueIterator:
        """Messages for ``async for``; the arguments are those of :class:`~leveret.QueueIterator`."""
        return QueueIterator(self, **kwargs)

    def __aiter__(self) -> QueueIterator:
        return self.iterator()

    async def purge(self, no_wait: bool = False, timeout: TimeoutType = None) -> QueueMethods.PurgeOk | None:
        """Drop all messages that are ready, not those out for acknowledgement (``queue.purge``).

        Raises:
            ValueError: a stream, which keeps what it has, or a name of more than 255 bytes.
            ChannelNotFoundEntity: no such queue. This closes the channel.
            ChannelInvalidStateError: the channel is not open.
            TimeoutError: no answer in time; the channel stays usable, and the late reply is swallowed.
        """
        self._refuse_stream("purge", "a retention policy")
        method = make(QueueMethods.Purge, queue=self.name, nowait=no_wait)
        result: QueueMethods.PurgeOk | None = await self.channel.call_or_send(method, timeout)
        return result

    async def delete(
        self, *, if_unused: bool = True, if_empty: bool = True, timeout: TimeoutType = None
    ) -> QueueMethods.DeleteOk:
        """Delete it (``queue.delete``); by default only while nobody consumes from it and it is empty.

        Raises:
            ChannelPreconditionFailed: it is in use, or not empty; this closes the channel.
            ValueError: a quorum queue, for which RabbitMQ has neither condition and would close the connection
                (540). A queue from ``get_queue()`` does not tell its type: pass False for both there.
        """
        if (if_unused or if_empty) and self._type == "quorum":
            raise ValueError(
                "RabbitMQ deletes quorum queues without conditions only: delete(if_unused=False, if_empty=False)"
            )
        with self.channel.forgetting(queue_key(self.name)):
            result: QueueMethods.DeleteOk = await self.channel.call(
                make(QueueMethods.Delete, queue=self.name, if_unused=if_unused, if_empty=if_empty), timeout
            )
        return result


def _fetched_message(wire: WireChannel, fetched: Fetched, no_ack: bool) -> IncomingMessage:
    """What ``basic.get`` brought, as a message."""
    get_ok = fetched.get_ok
    message = incoming_message(
        None if no_ack else wire.settler,
        None,
        get_ok.delivery_tag,
        get_ok.redelivered,
        get_ok.route,
        fetched.properties,
        fetched.body,
        no_ack,
    )
    message.message_count = get_ok.message_count
    return message
