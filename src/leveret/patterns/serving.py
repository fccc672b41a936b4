"""The serving half of RPC: functions that others call.

The reply is written together with the ack of the call, and neither waits for a confirm. If the link dies before both
are written, or the broker closes the channel, the call comes again, and is executed again: at least once. A call is
always answered: by the result, by an error, or, where nothing can be sent, by being rejected.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Coroutine, Iterable, Mapping
from enum import Enum
from functools import partial
from typing import Any

from leveret.channel import Channel
from leveret.consuming import Consumer, stop_together
from leveret.draining import check_drain
from leveret.exceptions import ChannelClosed, ChannelInvalidStateError, DeliveryLost, RemoteError
from leveret.exchange import Exchange
from leveret.failures import is_being_cancelled
from leveret.log import get_logger
from leveret.message import IncomingMessage, Message
from leveret.outcome import DONE
from leveret.patterns.apart import LARGE, publish_apart
from leveret.patterns.base import AnyCallback, Base, CallbackType, T, as_coroutine_function
from leveret.patterns.errors import plain_args, plain_error, summary, text_of
from leveret.prompt import Prompt
from leveret.queue import Queue
from leveret.types import DeliveryMode, FieldValue

log = get_logger("leveret.patterns.rpc")  # one name for all that is about RPC

_MAX_APART = 8
"""Replies that have a channel of their own at a time: a connection has not many."""


class RPCMessageType(str, Enum):
    """The ``type`` of a message."""

    ERROR = "error"
    RESULT = "result"
    CALL = "call"


class Server(Base):
    """What :class:`~leveret.patterns.rpc.RPC` is to those who register functions.

    Args:
        channel: an open channel.
        host_exceptions: as of RPC.

    Attributes:
        channel, routes, queues, consumer_tags, host_exceptions, rpc_exchange: as of RPC.
    """

    DLX_NAME = "rpc.dlx"

    def __init__(self, channel: Channel, host_exceptions: bool = False) -> None:
        self.channel = channel
        self.routes: dict[str, CallbackType[Any]] = {}
        self.queues: dict[AnyCallback, Queue] = {}
        self.consumer_tags: dict[AnyCallback, Consumer] = {}
        self.host_exceptions = host_exceptions
        self.rpc_exchange: Exchange | None = None
        self._names: dict[AnyCallback, str] = {}  # also of those that are being registered
        self._is_wary = False  # a channel was closed by the broker, over a reply perhaps
        self._apart_from = LARGE  # bytes
        self._apart = asyncio.Semaphore(_MAX_APART)

    def _format_routing_key(self, method_name: str) -> str:
        return method_name if self.rpc_exchange is None else f"{self.rpc_exchange.name}::{method_name}"

    async def register(
        self,
        method_name: str,
        func: AnyCallback,
        *,
        prefetch: int | None = None,
        concurrency: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Let others call *func*.

        What it returns goes to the caller, and what it raises, too, as a RemoteError: the name of the class, the text,
        and the arguments, never a traceback. It may raise a RemoteError of its own making. Failures are logged here. It
        may run twice for one call, when the link is lost, or the channel closed, before the reply is with the broker.

        Args:
            method_name: the name that it is called by, and that its queue has.
            func: a coroutine function, or a plain one; called with keyword arguments only.
            prefetch: how many calls the broker sends ahead; None for twice the *concurrency*, or else for the
                channel's.
            concurrency: how many calls may run at a time; None for no limit but the prefetch.
            kwargs: for :meth:`Channel.declare_queue`. All servers of a method have to say the same.

        Raises:
            RuntimeError: *func*, or the name, is registered already; or it is not initialised, or closed meanwhile.
            TypeError: *func* cannot be called.
            ValueError: a number is out of range.
            ChannelClosed: the broker refuses the queue: others have declared it with other arguments.
            ChannelInvalidStateError: the channel is not open.
            TimeoutError: no answer in time.

        Reconnect: calls that run go on, and come again, because their acks are lost.
        """
        self._check_serving()
        routing_key = self._format_routing_key(method_name)
        if func in self._names:
            raise RuntimeError("the function is registered already")
        if routing_key in self.routes:
            raise RuntimeError(f"Method name already used for {self.routes[routing_key]!r}")
        self.routes[routing_key] = as_coroutine_function(func)
        self._names[func] = routing_key
        given: Mapping[str, FieldValue] = kwargs.pop("arguments", None) or {}
        arguments = {**given, "x-dead-letter-exchange": self.DLX_NAME}
        try:
            queue = await self.channel.declare_queue(routing_key, arguments=arguments, **kwargs)
            if self.rpc_exchange is not None:
                await queue.bind(self.rpc_exchange, routing_key)
            consumer = await queue.consume(
                partial(self.on_call_message, method_name), prefetch=prefetch, concurrency=concurrency
            )
            if self._names.get(func) != routing_key:
                await consumer.stop(0)
                raise RuntimeError(f"{method_name!r} was unregistered while it was being registered")
        except BaseException:
            del self.routes[routing_key]
            if self._names.get(func) == routing_key:
                del self._names[func]
            raise
        self.queues[func], self.consumer_tags[func] = queue, consumer

    async def unregister(self, func: AnyCallback, *, drain: float = 10) -> None:
        """Let others call *func* no more; if it was not registered, nothing happens.

        Calls that run come to their end, those that wait go back to the queue, for other servers. The queue stays.

        Args:
            func: as it was registered.
            drain: seconds that calls get to end by themselves; 0 to cancel them at once.

        Raises:
            ValueError: *drain* is negative.

        Cancellation: it is unregistered all the same.
        """
        check_drain(drain)
        await self._unregister([func], drain)

    def _check_serving(self) -> None:
        """Raise RuntimeError where nothing can be registered now."""

    async def _unregister(self, functions: Iterable[AnyCallback], drain: float) -> None:
        """The same for many, in the time that one takes; from a task of its own it would wait for its caller."""
        names = [(func, name) for func in functions if (name := self._names.pop(func, None)) is not None]
        serving = [(func, name) for func, name in names if func in self.consumer_tags]  # the others undo it themselves
        consumers = [self.consumer_tags.pop(func) for func, _ in serving]
        for func, _ in serving:
            self.queues.pop(func)
        try:
            await stop_together(consumers, drain)
        finally:
            for _, name in serving:
                self.routes.pop(name, None)

    async def on_call_message(self, method_name: str, message: IncomingMessage) -> None:
        """Somebody calls: execute it, answer, and acknowledge.

        Raises:
            CancelledError: it was cancelled, by a channel that is closed, say; the call comes again.
            DeliveryLost: the channel is gone; the call comes again.
        """
        func = self.routes.get(self._format_routing_key(method_name))
        result: Any = None
        failure: Exception | None = None
        if func is None:
            log.warning("a call of %r, which nobody has registered on %r", method_name, self)
            failure = RemoteError("MethodNotRegistered", f"nobody serves {method_name!r} here")
        else:
            try:
                payload = await self.deserialize_message(message)
                result = await self.execute(func, payload)
            except Exception as exc:
                self._log_failure(method_name, message, exc)
                failure = exc
            except asyncio.CancelledError as exc:
                if is_being_cancelled() and not self._goes_on(method_name, message):
                    raise
                self._log_failure(method_name, message, exc)
                failure = RemoteError("CancelledError", text_of(exc))
        reply_to = message.reply_to
        if not reply_to:
            log.info('RPC message without "reply_to" header (%s): the result is lost', summary(message))
            await message.ack()
            return
        if not message.is_live:
            log.info("a reply is not sent: the link was lost, and the call comes again")
            return
        try:
            await self._reply(message, reply_to, await self._answer(message, result, failure))
        except DeliveryLost:
            raise
        except Exception as exc:
            log.error("Failed to send the reply to %r: %s: %s", method_name, type(exc).__name__, text_of(exc))
            log.debug("Full traceback for failure to send a reply", exc_info=True)
            if not message.processed:
                await message.reject(requeue=False)

    def _goes_on(self, method_name: str, message: IncomingMessage) -> bool:
        """Whether calls are served as before: then it is not leveret that cancels, but the function itself, say."""
        routing_key = self._format_routing_key(method_name)
        try:
            _ = self.channel.sender  # which refuses from the beginning of close() on
        except ChannelInvalidStateError:
            return False
        return message.is_live and any(
            consumer.is_active and self._names.get(func) == routing_key for func, consumer in self.consumer_tags.items()
        )

    def _log_failure(self, method_name: str, message: IncomingMessage, error: BaseException) -> None:
        level = logging.ERROR if self.host_exceptions else logging.WARNING
        if isinstance(error, RemoteError):  # what its caller is meant to get
            level = logging.INFO
        log.log(
            level,
            "method %r failed (correlation_id %r): %s",
            method_name,
            message.correlation_id,
            text_of(error, repr),
            exc_info=error if self.host_exceptions else None,
        )

    async def _answer(self, message: IncomingMessage, result: Any, failure: Exception | None) -> Message:
        """The reply to *message*: *result*, or *failure*, or as much of it as can be sent."""
        mode, is_last = message.delivery_mode, False
        while True:
            try:
                return await self.serialize_message(
                    payload=result if failure is None else self.serialize_exception(failure),
                    message_type=RPCMessageType.RESULT if failure is None else RPCMessageType.ERROR,
                    correlation_id=message.correlation_id,
                    delivery_mode=mode,
                )
            except Exception as exc:
                if is_last:
                    raise
                what = "result" if failure is None else "error"
                problem = text_of(exc, repr)
                log.error(
                    "the %s of a call cannot be sent (correlation_id %r): %s", what, message.correlation_id, problem
                )
                mode = DeliveryMode.NOT_PERSISTENT
                failure, is_last = (exc, False) if failure is None else (plain_error(failure), True)

    async def _reply(self, message: IncomingMessage, reply_to: str, reply: Message) -> None:
        """Send *reply* to who sent *message*, and acknowledge that.

        Raises:
            DeliveryLost: the channel is gone.
        """
        if len(reply.body) > self._apart_from or (self._is_wary and message.redelivered):
            await self._reply_apart(message, reply_to, reply)
            return
        exchange, output = self.channel.default_exchange, self.channel.wire.publisher.output
        if output.is_held:  # do not acknowledge before it is written
            await exchange.publish(reply, reply_to, mandatory=False)
            await message.ack()
            return

        def reply_and_ack() -> Coroutine[Any, Any, None]:
            publish: Any = exchange.publish(reply, reply_to, mandatory=False)
            if isinstance(publish, Prompt):
                publish.on_end(_on_reply_published)
            elif publish is not DONE:  # of an Exchange.publish that somebody has wrapped
                return _ack_after(publish, message)
            return message.ack()

        await output.together(reply_and_ack)

    async def _reply_apart(self, message: IncomingMessage, reply_to: str, reply: Message) -> None:
        """The same for a *reply* that the broker may refuse: the sender gets an error instead, then.

        Raises:
            DeliveryLost: the channel is gone.
            Exception: nothing can be sent.
        """
        size = reply.body_size
        async with self._apart:
            try:
                await publish_apart(self.channel, reply, reply_to)
                self._apart_from = min(LARGE, max(self._apart_from, size))
            except ChannelClosed as exc:
                if exc.reply_code == 406:  # too large, by far the most likely
                    self._apart_from = min(self._apart_from, size - 1)
                log.error("the broker refused a reply of %d bytes: %s", size, text_of(exc))
                failure = RemoteError("ReplyRefused", f"the broker refused the reply, of {size} bytes: {text_of(exc)}")
                await publish_apart(self.channel, await self._answer(message, None, failure), reply_to)
        await message.ack()

    def serialize_exception(self, exception: Exception) -> Any:
        """What goes over the wire for *exception*; a subclass may have its own."""
        if isinstance(exception, RemoteError):
            return {"error": {"type": exception.type, "message": exception.message, "data": exception.data}}
        return {
            "error": {"type": type(exception).__name__, "message": text_of(exception), "args": plain_args(exception)}
        }

    async def execute(self, func: CallbackType[T], payload: dict[str, Any]) -> T:
        """Call *func*; a subclass may do more.

        Raises:
            Exception: whatever *func* raises goes to the caller.
        """
        return await func(**payload)

    async def serialize_message(
        self,
        payload: Any,
        message_type: RPCMessageType,
        correlation_id: str | None,
        delivery_mode: DeliveryMode | int,
        **kwargs: Any,
    ) -> Message:
        """A message to send; a subclass may have its own.

        Args:
            payload: what to serialise: arguments, a result, or what :meth:`serialize_exception` returns.
            message_type: which of these it is.
            correlation_id: of the call.
            delivery_mode: of the call.
            kwargs: for :class:`~leveret.Message`.

        Raises:
            TypeError, ValueError: something cannot be serialised, or is out of range.
        """
        return Message(
            self.serialize(payload),
            content_type=self.CONTENT_TYPE,
            correlation_id=correlation_id,
            delivery_mode=delivery_mode,
            type=message_type._value_,  # in 3.11 the property costs more than all else here
            **kwargs,
        )

    async def deserialize_message(self, message: IncomingMessage) -> Any:
        """What *message* carries; a subclass may have its own.

        Raises:
            MessageDecodeError: it cannot be read, or another serializer has made it.
        """
        return self.read_message(message)

    def read_message(self, message: IncomingMessage) -> Any:
        """What *message* carries.

        Raises:
            MessageDecodeError: it cannot be read, or another serializer has made it.
        """
        self.check_content_type(message)
        return self.deserialize(message.body)


async def _ack_after(publish: Awaitable[object], message: IncomingMessage) -> None:
    await publish
    await message.ack()


def _on_reply_published(publish: asyncio.Future[Any]) -> None:
    if not publish.cancelled() and (error := publish.exception()) is not None:
        log.warning("a reply may be lost: %s", error)
