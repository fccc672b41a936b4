"""Remote procedure calls.

A method is a queue of its name. A call is a message of type "call" in it, with a correlation id and an address for
the reply, which is a message of type "result" or "error". That is how aio-pika's RPC does it, too.

**Calling.** Replies come by `direct reply-to <https://www.rabbitmq.com/docs/direct-reply-to>`_, which needs no
queue, or else to an exclusive one. A call is not confirmed before its reply is: the reply says all that a confirm
would. What else may become of it arrives by other ways, and ends it at once: it is returned (nobody serves the method),
refused, dead-lettered (it expired), or the channel is lost.

**Serving** is in :mod:`leveret.patterns.serving`.
"""

from __future__ import annotations

import asyncio
import math
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from leveret.channel import Channel
from leveret.checks import check_timeout
from leveret.exceptions import ChannelInvalidStateError, ConsumerCancelled, PublishOutcomeUnknown, RemoteError
from leveret.exchange import Exchange
from leveret.lazy import pass_on
from leveret.message import IncomingMessage
from leveret.outcome import fail
from leveret.patterns.apart import refused
from leveret.patterns.base import Proxy
from leveret.patterns.calls import Call, Calls, no_server
from leveret.patterns.errors import error_fields, summary, text_of
from leveret.patterns.replies import Replies
from leveret.patterns.serializers import JSONSerializer, PickleSerializer, Serializer, plain
from leveret.patterns.serving import RPCMessageType, Server, log
from leveret.queue import Queue
from leveret.types import DateType, DeliveryMode, ExchangeType, TimeoutType

if TYPE_CHECKING:
    from typing import Self

pass_on(__name__)

DIRECT_REPLY_TO = "amq.rabbitmq.reply-to"

_DRAIN = 10.0
"""Seconds that functions which run get when it is closed."""

_direct_reply_to: weakref.WeakKeyDictionary[Channel, bytes | None] = weakref.WeakKeyDictionary()
"""The channels that have it: None where an RPC does, or the tag of a consumer that the broker may still have.

RabbitMQ closes a channel that consumes from it a second time (406), also before the first is cancelled.
"""


def _has_direct_reply_to(channel: Channel) -> bool:
    tag = _direct_reply_to.get(channel, b"")
    return tag is None or (channel.is_initialized and channel.wire.consumer(tag) is not None)


class RPCException(RuntimeError):
    """What a server sent as an error is none: ``args[1]``."""


RPCMessageTypes = RPCMessageType


class RPC(Server):
    """Calls functions elsewhere, and lets others call functions here. Make one with :meth:`create`.

    ::

        rpc = await RPC.create(channel)
        await rpc.register("multiply", multiply)

        await rpc.proxy.multiply(x=2, y=3)
        await rpc.call("multiply", {"x": 2, "y": 3}, timeout=5)

    Any number of tasks may call at a time. It speaks JSON; :class:`~leveret.patterns.base.Base` says how to
    change that.

    Args:
        channel: an open channel; on one of :func:`~leveret.connect_robust`, registered methods and whoever calls
            survive the loss of the link.
        host_exceptions: whether functions that fail are logged as errors with their traceback, rather than in a line.
        serializer: makes bytes of arguments and results; None for that of the class.

    Attributes:
        channel: what it calls and serves on.
        proxy: ``proxy.a.b(x=1)`` is ``call("a.b", {"x": 1})``.
        futures: the calls that wait for their replies, by correlation id.
        routes: the functions that are served, by the name of the queue.
        queues: their queues, by function.
        consumer_tags: their consumers, by function.
        host_exceptions: as given.
        dropped_replies: how many replies came that nobody waited for (any more).
        result_queue: where replies come in, once it is initialised; ``amq.rabbitmq.reply-to`` is no real queue.
        result_consumer_tag: what consumes from it.
        rpc_exchange: what calls are published to; None for the default exchange.
        dlx_exchange: where expired calls go; there is one where replies have a queue, and after a call with an
            ``expiration`` of its own.

    https://www.rabbitmq.com/docs/direct-reply-to
    """

    DELIVERY_MODE = DeliveryMode.NOT_PERSISTENT

    result_queue: Queue
    result_consumer_tag: str
    dlx_exchange: Exchange

    def __init__(
        self, channel: Channel, host_exceptions: bool = False, *, serializer: Serializer | None = None
    ) -> None:
        super().__init__(channel, host_exceptions)
        self.loop = asyncio.get_running_loop()
        self.proxy = Proxy(self.call)
        self.dropped_replies = 0
        self._calls = Calls(self.loop)
        self._is_initialized = False
        self._is_closing = False
        self._why_not: Exception = RuntimeError("the RPC is not initialised: use await RPC.create(channel)")
        self._expired_queue: Queue | None = None
        self._replies: Replies | None = None
        self._expired: Replies | None = None
        self._reading: set[asyncio.Task[None]] = set()
        # A subclass may have its own, which may wait.
        self._deserializes_later = type(self).deserialize_message is not Server.deserialize_message
        self._changing = asyncio.Lock()
        self.use(serializer)

    @property
    def futures(self) -> dict[str, Call]:
        """The calls that wait for their replies, by correlation id."""
        return self._calls.futures

    def __repr__(self) -> str:
        served = f"serves {', '.join(self.routes) or 'nothing'}"
        return f"<{type(self).__name__} on {self.channel!r}: {served}, {len(self.futures)} calls wait>"

    async def __aenter__(self) -> Self:
        await self.initialize()
        return self

    async def __aexit__(self, exc_type: object, exc: BaseException | None, tb: object) -> None:
        if not self.channel.is_closed:
            await self.close()

    # --------------------------------------------------------------------------------------- beginning, ending

    @classmethod
    async def create(
        cls,
        channel: Channel,
        *,
        host_exceptions: bool | None = None,
        serializer: Serializer | None = None,
        **kwargs: Any,
    ) -> Self:
        """One that is initialised.

        Args:
            channel: as of the class.
            host_exceptions: as of the class; None leaves it to the class.
            serializer: as of the class; None leaves it to the class.
            kwargs: as of :meth:`initialize`.

        Raises:
            ValueError, ChannelInvalidStateError, ChannelClosed, TimeoutError: as :meth:`initialize`.
        """
        rpc = cls(channel)
        if host_exceptions is not None:
            rpc.host_exceptions = host_exceptions
        rpc.use(serializer)
        await rpc.initialize(**kwargs)
        return rpc

    async def initialize(
        self,
        auto_delete: bool = True,
        durable: bool = False,
        exchange: str = "",
        *,
        direct_reply_to: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Listen for replies; what is initialised already stays as it is.

        Args:
            auto_delete: whether the queue for replies goes when nobody consumes from it.
            durable: whether that queue, and the *exchange*, survive a restart of the broker.
            exchange: name of the direct exchange that calls go to; "" for the default exchange. Queues have it, and
                ``::``, before the name of the method then. Servers and callers have to agree.
            direct_reply_to: True for replies without a queue; False for a queue, which is exclusive unless *kwargs*
                say otherwise. None for the former, but where *kwargs* or *auto_delete* are about a queue, or another
                RPC on the channel has it: there can be but one.
            kwargs: for :meth:`Channel.declare_queue`.

        Raises:
            ValueError: *direct_reply_to*, and arguments for a queue, or the channel has it already.
            ChannelInvalidStateError: the channel is not open.
            ChannelClosed: the broker refuses the exchange or the queue.
            TimeoutError: no answer in time.

        https://www.rabbitmq.com/docs/direct-reply-to
        """
        async with self._changing:
            if self._is_initialized:
                return
            self._replies = None
            is_direct = self._choose_direct(direct_reply_to, bool(kwargs) or not auto_delete)
            try:
                await self._listen(is_direct, auto_delete, durable, exchange, kwargs)
            except BaseException:
                if is_direct:
                    self._release_direct_reply_to()
                self._forget_expired_queue()
                self.rpc_exchange = None
                raise

    def _choose_direct(self, asked: bool | None, is_about_queue: bool) -> bool:
        is_taken = _has_direct_reply_to(self.channel)
        if asked and is_about_queue:
            raise ValueError("direct_reply_to=True has no queue that other arguments could be about")
        if asked and is_taken:
            raise ValueError("another RPC on this channel has direct reply-to: there can be but one")
        is_direct = asked if asked is not None else not (is_about_queue or is_taken)
        if is_direct:
            _direct_reply_to[self.channel] = None
        return is_direct

    async def _listen(
        self, is_direct: bool, auto_delete: bool, durable: bool, exchange: str, kwargs: dict[str, Any]
    ) -> None:
        channel = self.channel
        if exchange:
            self.rpc_exchange = await channel.declare_exchange(
                exchange, ExchangeType.DIRECT, auto_delete=True, durable=durable
            )
        if is_direct:
            queue = await channel.get_queue(DIRECT_REPLY_TO, ensure=False)
        else:
            kwargs = {"exclusive": True} | kwargs
            queue = await channel.declare_queue(None, auto_delete=auto_delete, durable=durable, **kwargs)
            await self._bind_to_dlx(queue)
            self._expired_queue = queue
        self.result_queue = queue
        self._replies = Replies(queue, self._on_reply, self._on_cancelled)
        await self._replies.start(exclusive=not is_direct)
        self.result_consumer_tag = self._replies.consumer_tag
        self._is_initialized = True
        channel.close_callbacks.add(self.on_close)
        channel.return_callbacks.add(self.on_message_returned)

    async def _bind_to_dlx(self, queue: Queue) -> None:
        """Have calls that expire in the queue of a method come to *queue*."""
        self.dlx_exchange = await self.channel.declare_exchange(self.DLX_NAME, ExchangeType.HEADERS, auto_delete=True)
        await queue.bind(self.dlx_exchange, "", arguments={"From": queue.name, "x-match": "any"})

    async def _hear_of_expired_calls(self) -> None:
        """Have a queue for them where there is none: direct reply-to is no queue that could be bound."""
        async with self._changing:
            if self._expired_queue is None and self._is_initialized:
                queue = await self.channel.declare_queue(None, exclusive=True, auto_delete=True)
                await self._bind_to_dlx(queue)
                self._expired = Replies(queue, self._on_reply, lambda _: self._forget_expired_queue())
                await self._expired.start()
                self._expired_queue = queue

    def _forget_expired_queue(self) -> None:
        self._expired_queue = self._expired = None

    def _stop_listening(self, why: Exception) -> None:
        if not self._is_initialized:
            return
        self._is_initialized = False
        self._why_not = why
        self._forget_expired_queue()
        self.channel.close_callbacks.discard(self.on_close)
        self.channel.return_callbacks.discard(self.on_message_returned)

    async def close(self) -> None:
        """Call and serve no more: functions are unregistered, then calls that wait end with PublishOutcomeUnknown.

        Functions that run get ten seconds to come to their end, and may call others meanwhile. The channel stays
        open. Closing what is closed logs a warning. A function that closes it is not waited for; nothing can be
        registered from now on.

        Raises:
            ChannelInvalidStateError: the channel is closed.
            TimeoutError: no answer in time.
        """
        self._is_closing = True
        try:
            await self._close()
        finally:
            self._is_closing = False

    async def _close(self) -> None:
        await self._unregister(list(self._names), _DRAIN)
        async with self._changing:
            if not self._is_initialized:
                log.warning("the RPC is closed already")
                return
            expired_queue, listening = self._expired_queue, [self._replies, self._expired]
            self._stop_listening(RuntimeError("the RPC is not initialised any more: it was closed"))
            self._calls.close()
            for reading in self._reading:
                reading.cancel()
            try:
                for replies in listening:
                    if replies is not None:
                        await replies.stop()
            finally:
                if self.result_queue.name == DIRECT_REPLY_TO:
                    self._release_direct_reply_to()
            if expired_queue is not None:
                await expired_queue.delete(if_unused=False, if_empty=False)
            del self.result_queue, self.result_consumer_tag
            self.rpc_exchange = None

    def _release_direct_reply_to(self) -> None:
        """Let others on the channel have it."""
        _direct_reply_to[self.channel] = b"" if self._replies is None else self._replies.wire_tag

    def _check_initialized(self) -> None:
        if not self._is_initialized:
            raise type(self._why_not)(*self._why_not.args)  # each caller gets its own

    def _check_serving(self) -> None:
        self._check_initialized()
        if self._is_closing:
            raise RuntimeError("the RPC is being closed")

    # ------------------------------------------------------------------------------------------------- calling

    def create_future(self) -> tuple[Call, str]:
        """What a call awaits, and its correlation id."""
        return self._calls.begin(None if self._replies is None else self._replies.wakeups)

    async def call(
        self,
        method_name: str,
        kwargs: Mapping[str, Any] | None = None,
        *,
        timeout: TimeoutType = None,
        expiration: DateType = None,
        priority: int = 5,
        delivery_mode: DeliveryMode = DELIVERY_MODE,
        retry: bool = False,
    ) -> Any:
        """Have a function called elsewhere, and return what it returns.

        Args:
            method_name: the name that it is registered by.
            kwargs: its arguments.
            timeout: seconds for the whole; None for the connection's ``operation_timeout``, ``math.inf`` for no limit.
                Servers do not begin on a call that is older.
            expiration: how long the call may wait for a server, if not for as long as *timeout*: seconds, timedelta or
                datetime. A call that expires ends at once, at the cost of a queue for this object.
            priority: 0 to 255; counts where the queue of the method has ``x-max-priority``.
            delivery_mode: whether the call survives a restart of the broker, in a durable queue.
            retry: call again when the link is lost, on a connection of :func:`~leveret.connect_robust`, rather than
                raise PublishOutcomeUnknown. The function may run twice then. Where it is the broker that closes the
                channel, which may be over this call, it is tried once more only.

        Raises:
            RemoteError: the function failed, or the server does not have it, or the broker refused its reply.
            NoServer: nobody serves the method (a MessageProcessError).
            TimeoutError: there was no reply in time, or the call expired. The function may have run all the same.
            PublishNotSent: the call could not be sent: nothing has run.
            PublishOutcomeUnknown: the link was lost, or this object was closed, before the reply: it may have run.
            MessageNacked: the broker refused the call, as a full queue may.
            MessageDecodeError: the reply cannot be read, or another serializer has made it.
            RuntimeError: it is not initialised, or no longer: it was closed, or its queue for replies was deleted.
            ChannelInvalidStateError: the channel is closed.
            TypeError, ValueError: something cannot be serialised, or is out of range.

        Cancellation: nothing is left behind, and a reply that comes is dropped. The function may run.

        Reconnect: while the link is down, the call waits for it within *timeout*.
        """
        self._check_initialized()
        if timeout is not None:
            check_timeout("timeout", timeout)
        loop, seconds = self.loop, self.channel.seconds(timeout)
        deadline = loop.time() + seconds
        if expiration is not None and self._expired_queue is None:
            async with asyncio.timeout_at(deadline if deadline < math.inf else None):
                await self._hear_of_expired_calls()
        routing_key, arguments = self._format_routing_key(method_name), dict(kwargs) if kwargs else {}
        exchange = self.rpc_exchange or self.channel.default_exchange
        while True:
            call, correlation_id = self.create_future()
            try:
                call.name = method_name
                message = await self.serialize_message(
                    payload=arguments,
                    message_type=RPCMessageType.CALL,
                    correlation_id=correlation_id,
                    delivery_mode=delivery_mode,
                    reply_to=self.result_queue.name,
                    priority=priority,
                    expiration=expiration if expiration is not None else seconds if seconds != math.inf else None,
                    headers=None if (queue := self._expired_queue) is None else {"From": queue.name},
                )
                call.watch(exchange.publish(message, routing_key, mandatory=True, timeout=timeout))
                return await self._calls.result(call, deadline)
            except PublishOutcomeUnknown as exc:
                timeout = seconds = deadline - loop.time()
                if not retry or seconds <= 0 or self.channel.is_closed or not self._is_initialized:
                    raise
                retry = refused(exc.__cause__) is None  # over this call, perhaps: it is tried once more, and no more
            finally:
                self._calls.futures.pop(correlation_id, None)
                call.end()

    def _on_reply(self, message: IncomingMessage) -> None:
        """A message came in where replies do."""
        if self._deserializes_later:
            task = self.loop.create_task(self.on_result_message(message), name="leveret RPC reply")
            self._reading.add(task)
            task.add_done_callback(self._reading.discard)
            return
        call = self._call_of(message)
        if call is not None:
            try:
                payload = self.read_message(message)
            except Exception as exc:
                self._fail_to_read(call, message, exc)
            else:
                self._finish(call, message, payload)

    async def on_result_message(self, message: IncomingMessage) -> None:
        """A reply came, or a call of ours that expired; it never raises."""
        call = self._call_of(message)
        if call is not None:
            try:
                payload = await self.deserialize_message(message)
            except Exception as exc:
                self._fail_to_read(call, message, exc)
            else:
                self._finish(call, message, payload)

    def _call_of(self, message: IncomingMessage) -> Call | None:
        """The call that *message* replies to, if somebody waits for the reply."""
        correlation_id = message.correlation_id
        call = self._calls.waiting(correlation_id)
        if call is None:
            self.dropped_replies += 1
            if correlation_id is None:
                log.warning("a reply without a correlation_id: %s", summary(message))
            else:
                log.warning("Unknown message: %s", summary(message))
            return None
        if message.type == "call":
            fail(call, TimeoutError(f"no server took the call of {call.name!r} before it expired"))
            return None
        return call

    def _fail_to_read(self, call: Call, message: IncomingMessage, error: Exception) -> None:
        log.error("a reply cannot be read: %s: %s", summary(message), text_of(error, repr))
        fail(call, error)

    def _finish(self, call: Call, message: IncomingMessage, payload: Any) -> None:
        """The reply to *call* says *payload*."""
        if call.done():  # meanwhile
            return
        if (message_type := message.type) == "result":
            call.set_result(payload)
        elif message_type == "error":
            fail(call, self._remote_error(payload))
        else:
            fail(call, RuntimeError(f"Unknown message type {message_type!r}"))

    @staticmethod
    def _remote_error(payload: Any) -> Exception:
        """What to raise for the *payload* of an error."""
        if isinstance(payload, Exception) and not isinstance(payload, StopIteration):  # which no future takes
            return payload
        error = error_fields(payload)
        return RPCException("the failure is no exception", payload) if error is None else RemoteError(*error)

    def on_message_returned(self, channel: Channel | None, message: IncomingMessage) -> None:
        """A message came back; if it is a call of ours, nobody serves the method."""
        if message.correlation_id is None:
            log.warning("a message without a correlation_id came back: %s", summary(message))
        elif (call := self._calls.waiting(message.correlation_id)) is None:
            log.warning("a message came back that no call waits for: %s", summary(message))
        else:
            fail(call, no_server(message))

    def on_close(self, channel: Channel | None, exc: BaseException | None = None) -> None:
        """The channel is lost or closed: replies that were due do not come."""
        log.debug("the calls that wait end: %r", exc)
        self._calls.lose(exc)
        self._is_wary = self._is_wary or refused(exc) is not None
        if self.channel.is_closed:
            if self.result_queue.name == DIRECT_REPLY_TO:
                self._release_direct_reply_to()
            self._stop_listening(ChannelInvalidStateError("the channel is closed"))

    def _on_cancelled(self, error: ConsumerCancelled) -> None:
        """The queue for replies was deleted, and will not be back."""
        self._stop_listening(RuntimeError("the queue for replies was deleted: await rpc.initialize() for another one"))
        self._calls.lose(error)


class JsonRPCError(RemoteError, RuntimeError):
    """What :class:`JsonRPC` raises for an error of the server; ``args[1]`` is all that it sent."""

    def __init__(self, text: str, payload: Any = None) -> None:
        super().__init__(*(error_fields(payload) or ("", text, payload)))
        self.args = (text, payload)

    def __str__(self) -> str:
        """As of the exception there, whose ``repr()`` the message is."""
        if not self.message.startswith(f"{self.type}("):
            return super().__str__()
        match self.data:
            case []:
                return self.type
            case [str(text)]:
                return f"{self.type}: {text}"
            case _:
                return self.message


class JsonRPC(RPC):
    """The same, with aio-pika's form of errors: what JSON does not know at all is sent as its ``repr()``."""

    SERIALIZER = JSONSerializer(default=lambda value: _plain_or_repr(value))
    CONTENT_TYPE = "application/json"

    def serialize_exception(self, exception: Exception) -> Any:
        """As aio-pika does: the message is the ``repr()`` of the exception."""
        if isinstance(exception, RemoteError):
            return super().serialize_exception(exception)
        return {
            "error": {
                "type": type(exception).__name__,
                "message": repr(exception),
                "args": exception.args,
            }
        }

    @staticmethod
    def _remote_error(payload: Any) -> Exception:
        return JsonRPCError("RPC exception", payload)


class PickleRPC(RPC):
    """RPC as aio-pika's default is: **whoever can publish to a queue of it can run any code there.**

    Exceptions arrive as what they are; one that cannot be pickled, or unpickled, as a RuntimeError that names it. For
    talking to programs that cannot be changed yet, between parties that trust each other, and nothing else.
    """

    SERIALIZER = PickleSerializer()
    CONTENT_TYPE = PickleSerializer.content_type

    def serialize_exception(self, exception: Exception) -> Any:
        """The exception itself, if a pickle of it can be read."""
        import pickle

        try:
            pickle.loads(pickle.dumps(exception))
        except Exception:
            return RuntimeError(f"{type(exception).__name__}: {text_of(exception)}")
        return exception


def _plain_or_repr(value: Any) -> Any:
    try:
        return plain(value)
    except TypeError:
        return repr(value)
