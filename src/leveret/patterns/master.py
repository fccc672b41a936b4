"""Tasks for workers: a queue of its name for each kind, and a message with keyword arguments for each task."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from pamqp.commands import Basic

from leveret.channel import Channel
from leveret.consuming import Consumer
from leveret.exceptions import MessageDecodeError
from leveret.exchange import Exchange
from leveret.lazy import pass_on
from leveret.log import get_logger
from leveret.message import IncomingMessage, Message, ReturnedMessage
from leveret.patterns.base import AnyCallback, Base, CallbackType, Proxy, T, as_coroutine_function
from leveret.patterns.serializers import (
    CompressedJSONSerializer,
    JSONSerializer,
    PickleSerializer,
    Serializer,
)
from leveret.queue import Queue
from leveret.types import DeliveryMode

log = get_logger(__name__)
pass_on(__name__)


class MessageProcessingError(Exception):
    """What a worker's function raises to have its task settled in another way."""


class NackMessage(MessageProcessingError):
    """Hand the task back (``basic.nack``).

    Args:
        requeue: to its queue; otherwise it is dropped, or dead-lettered.
    """

    def __init__(self, requeue: bool = False) -> None:
        self.requeue = requeue


class RejectMessage(MessageProcessingError):
    """Refuse the task (``basic.reject``).

    Args:
        requeue: back to its queue; otherwise it is dropped, or dead-lettered.
    """

    def __init__(self, requeue: bool = False) -> None:
        self.requeue = requeue


class Worker:
    """A function that works on the tasks of a queue. :meth:`Master.create_worker` returns it.

    Attributes:
        queue: the queue.
        consumer_tag: the :class:`~leveret.Consumer`: counters, and ``stop(drain=…)``, which lets tasks end.
        loop: the event loop.
    """

    __slots__ = "_closing", "consumer_tag", "loop", "queue"

    def __init__(self, queue: Queue, consumer_tag: Consumer, loop: asyncio.AbstractEventLoop) -> None:
        self.queue = queue
        self.consumer_tag = consumer_tag
        self.loop = loop
        self._closing: asyncio.Task[None] | None = None

    def close(self) -> asyncio.Task[None]:
        """Take no more tasks; those that run go on. It begins when called; awaiting waits for the broker's answer.

        Raises:
            ChannelInvalidStateError: the channel is closed. This and the next are raised when awaited.
            TimeoutError: no answer in time.
        """
        if self._closing is None:
            self._closing = self.loop.create_task(self._close(), name=f"leveret closes a worker of {self.queue}")
        return self._closing

    async def _close(self) -> None:
        await self.queue.cancel(self.consumer_tag)


class Master(Base):
    """Gives tasks to workers, which may be anywhere, and makes workers.

    ::

        master = Master(channel)
        worker = await master.create_worker("resize", resize, durable=True)

        await master.proxy.resize(path="hare.png", width=100)
        await master.create_task("resize", {"path": "hare.png", "width": 100})

    It speaks JSON; :class:`~leveret.patterns.base.Base` says how to change that.

    Args:
        channel: an open channel.
        requeue: whether a task whose function failed goes back to its queue, which may be for ever; the delivery limit
            of a quorum queue ends it. Otherwise it is dropped, or dead-lettered.
        reject_on_redelivered: but not a second time.
        serializer: makes bytes of arguments; None for that of the class.

    Attributes:
        channel: the channel.
        loop: the event loop.
        proxy: ``proxy.a.b(x=1)`` is ``create_task("a.b", {"x": 1})``.

    https://www.rabbitmq.com/tutorials/tutorial-two-python
    """

    DELIVERY_MODE = DeliveryMode.PERSISTENT

    def __init__(
        self,
        channel: Channel,
        requeue: bool = True,
        reject_on_redelivered: bool = False,
        *,
        serializer: Serializer | None = None,
    ) -> None:
        self.channel = channel
        self.loop = asyncio.get_running_loop()
        self.proxy = Proxy(self.create_task)
        self._requeue = requeue
        self._reject_on_redelivered = reject_on_redelivered
        self.use(serializer)
        channel.return_callbacks.add(self.on_message_returned)

    @property
    def exchange(self) -> Exchange:
        """What tasks are published to: the default exchange."""
        return self.channel.default_exchange

    @staticmethod
    def on_message_returned(channel: Channel | None, message: IncomingMessage) -> None:
        """No queue took a task."""
        log.warning("a task came back, there is no such queue: %r", message)

    @classmethod
    async def execute(cls, func: CallbackType[T], kwargs: Any) -> T:
        """Call *func*; a subclass may do more.

        Raises:
            RejectMessage: *kwargs* are no keyword arguments.
            Exception: whatever *func* raises.
        """
        kwargs = kwargs or {}
        if not isinstance(kwargs, dict):
            log.error("a task for %r has no keyword arguments, but %r", func, kwargs)
            raise RejectMessage(requeue=False)
        return await func(**kwargs)

    async def on_message(self, func: CallbackType[Any], message: IncomingMessage) -> None:
        """A task for *func* came.

        One that another serializer made is left unacknowledged: whoever can read it gets it when this worker has gone.

        Raises:
            Exception: whatever *func* raises; the task is settled then.
        """
        try:
            self.check_content_type(message)
        except MessageDecodeError as exc:
            log.error("a task in %r is not for this worker, and is left to others: %s", message.routing_key, exc)
            return
        async with message.process(
            requeue=self._requeue, reject_on_redelivered=self._reject_on_redelivered, ignore_processed=True
        ):
            try:
                await self.execute(func, self._arguments(message))
            except RejectMessage as exc:
                await message.reject(requeue=exc.requeue)
            except NackMessage as exc:
                await message.nack(requeue=exc.requeue)

    def _arguments(self, message: IncomingMessage) -> Any:
        """What the task says. One that cannot be read can never be: it must not go back to its queue."""
        try:
            return self.deserialize(message.body)
        except Exception as exc:
            log.error("a task in %r cannot be read, and is rejected: %s", message.routing_key, exc)
            raise RejectMessage(requeue=False) from exc

    async def create_queue(self, queue_name: str, **kwargs: Any) -> Queue:
        """Declare the queue of a worker; a subclass may do it in its own way.

        Args:
            queue_name: its name.
            kwargs: for :meth:`Channel.declare_queue`.

        Raises:
            ChannelClosed: the broker refuses it.
            ChannelInvalidStateError: the channel is not open.
            TimeoutError: no answer in time.
        """
        return await self.channel.declare_queue(queue_name, **kwargs)

    async def create_worker(
        self,
        queue_name: str,
        func: AnyCallback,
        *,
        prefetch: int | None = None,
        concurrency: int | None = None,
        **kwargs: Any,
    ) -> Worker:
        """Have *func* work on the tasks of a queue.

        A task is done when *func* returns. When it fails, which is logged, it depends on *requeue* of the class; it may
        raise RejectMessage or NackMessage to say otherwise.

        Args:
            queue_name: the queue, which is declared.
            func: a coroutine function, or a plain one; called with keyword arguments only.
            prefetch: how many tasks the broker sends ahead; None for twice the *concurrency*, or else for the
                channel's.
            concurrency: how many tasks may be worked on at a time; None for no limit but the prefetch.
            kwargs: for :meth:`Channel.declare_queue`. All workers of a queue have to say the same.

        Raises:
            TypeError: *func* cannot be called.
            ValueError: a number is out of range.
            ChannelClosed: the broker refuses the queue.
            ChannelInvalidStateError: the channel is not open.
            TimeoutError: no answer in time.

        Reconnect: the worker comes back. Tasks that run go on, and come again, because their acks are lost.
        """
        func = as_coroutine_function(func)
        queue = await self.create_queue(queue_name, **kwargs)
        consumer = await queue.consume(partial(self.on_message, func), prefetch=prefetch, concurrency=concurrency)
        return Worker(queue, consumer, self.loop)

    async def create_task(
        self, channel_name: str, kwargs: Mapping[str, Any] = MappingProxyType({}), **message_kwargs: Any
    ) -> Basic.Ack | ReturnedMessage | None:
        """Publish a task, and await its confirm.

        Args:
            channel_name: name of the queue.
            kwargs: arguments for the function.
            message_kwargs: for :class:`~leveret.Message`: ``priority``, ``expiration``, ``headers`` and the like.

        Returns:
            ``Basic.Ack`` when the broker has it; the :class:`~leveret.ReturnedMessage` when there is no such queue,
            which is logged, too; None on a channel without publisher confirms.

        Raises:
            TypeError, ValueError: something cannot be serialised, or is out of range.
            MessageReturned: there is no such queue, and the channel has ``on_return_raises``.
            MessageNacked, PublishNotSent, PublishOutcomeUnknown: as :meth:`Exchange.publish`.
        """
        message_kwargs.setdefault("content_type", self.CONTENT_TYPE)
        message_kwargs.setdefault("delivery_mode", self.DELIVERY_MODE)
        message = Message(self.serialize(dict(kwargs)), **message_kwargs)
        return await self.exchange.publish(message, channel_name, mandatory=True)


class JsonMaster(Master):
    """Master, which speaks JSON anyway; for programs written for aio-pika."""

    SERIALIZER = JSONSerializer()
    CONTENT_TYPE = JSONSerializer.content_type


class CompressedJsonMaster(Master):
    """Master with JSON that is compressed by gzip."""

    SERIALIZER = CompressedJSONSerializer()
    CONTENT_TYPE = CompressedJSONSerializer.content_type
    COMPRESS_LEVEL = 6

    def serialize(self, data: Any) -> bytes:
        """Compressed JSON, by ``COMPRESS_LEVEL``.

        Raises:
            TypeError, ValueError: as of Master.
        """
        if self._serializer is not None:
            return super().serialize(data)
        return CompressedJSONSerializer(self.COMPRESS_LEVEL).serialize(data)


class PickleMaster(Master):
    """Master as aio-pika's default is: **whoever can publish to its queue can run any code in the worker.**

    For talking to programs that cannot be changed yet, between parties that trust each other, and nothing else.
    """

    SERIALIZER = PickleSerializer()
    CONTENT_TYPE = PickleSerializer.content_type
