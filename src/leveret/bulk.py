"""Publishing many messages with one waiter.

Each message is a :class:`_BulkPublish`: a publish like every other one to those who write it, hold it or confirm it,
but without a future, and gone as soon as it has ended. The :class:`Bulk` counts what has not ended (the window) and
waits for that to shrink before it takes another message; one timer looks after all deadlines, because messages that
are taken in order are also due in order. A message that cannot be written now waits where every publish waits, and has
its place in the window, so those places need no bound of their own.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Sequence, Sized
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias, cast

from leveret.checks import check_count
from leveret.exceptions import (
    ChannelAccessRefused,
    ChannelInvalidStateError,
    ChannelNotFoundEntity,
    MessageReturned,
    MessageTooLarge,
    PublishNotSent,
    PublishNotSentInTime,
)
from leveret.message import Message
from leveret.report import PublishFailure, PublishReport
from leveret.types import TimeoutType
from leveret.wire.codec import Properties, encode_properties
from leveret.wire.outgoing import Publish, PublishHolder

if TYPE_CHECKING:
    from leveret.channel import Channel

Routed: TypeAlias = Message | tuple[Message, str]
"""A message, or a message and its routing key."""
Messages: TypeAlias = Iterable[Routed] | AsyncIterable[Routed]

_SLICE: Final = 0.005
"""Seconds for which an iterable that never waits may keep the event loop."""
_TURN: Final = 256
"""Messages after which the event loop has its turn in any case: not every loop's clock goes on in between."""
_MAX_REFUSALS: Final = 3
"""Channels that are closed over the exchange, with nothing confirmed in between."""
_END: Final = object()
_UNFINISHED: Final = "unfinished"
_DONE: Final = "done"
_CANCELLED: Final = "cancelled"


class _BulkPublish(Publish):
    """One of many.

    Attributes:
        bulk: which it is one of.
        index: its place among them.
        message: the user's object.
        size: bytes that it counts for in the window.
    """

    __slots__ = (
        "_callbacks",
        "_state",
        "began",
        "body",
        "bulk",
        "deadline",
        "exchange",
        "holder",
        "index",
        "mandatory",
        "message",
        "properties",
        "retry_unknown",
        "returned",
        "routing_key",
        "size",
        "timeout",
        "was_written",
    )

    is_bounded = True

    def __init__(
        self,
        bulk: Bulk,
        index: int,
        message: Message,
        routing_key: str,
        properties: bytes,
        body: bytes,
        began: float,
    ) -> None:
        self.bulk = bulk
        self.index = index
        self.message = message
        self.exchange = bulk.exchange
        self.routing_key = routing_key
        self.properties = properties
        self.body = body
        self.mandatory = bulk.mandatory
        self.began = began
        self.timeout = bulk.timeout
        self.deadline = began + bulk.timeout
        self.retry_unknown = bulk.retry_unknown
        self.holder: PublishHolder = bulk
        self.size = len(body) + len(properties)
        self.returned: Any = None
        self.was_written = False
        self._state = _UNFINISHED
        self._callbacks: list[Callable[[Publish], object]] | None = None

    @property
    def has_timer(self) -> bool:
        """Its bulk has."""
        return True

    def limit_time(self) -> None:
        """Its bulk does."""

    def done(self) -> bool:
        """Whether it has ended."""
        return self._state is not _UNFINISHED

    def cancelled(self) -> bool:
        """Whether it has ended with the task that waited for all of them."""
        return self._state is _CANCELLED

    def set_result(self, result: Any, /) -> None:
        """It is confirmed, has come back, or is written where there are no confirms."""
        if self.returned is not None:
            self.fail(MessageReturned(self.returned))
            return
        if result is not None:
            self.bulk.confirmed += 1
        self._end(_DONE)

    def fail(self, error: Exception) -> None:
        """It has ended with *error*, unless it has ended already."""
        if self._state is _UNFINISHED:
            if isinstance(error.__cause__, ChannelNotFoundEntity | ChannelAccessRefused):
                self.bulk.on_refused(error.__cause__)
            self.bulk.failures.append(PublishFailure(self.index, self.message, self.routing_key, error))
            self._end(_DONE)

    def cancel(self) -> None:
        """Nobody wants to know any more."""
        self._end(_CANCELLED)

    def on_end(self, callback: Callable[[Publish], object]) -> None:
        """Call *callback* with it when it has ended."""
        if self._callbacks is None:
            self._callbacks = []
        self._callbacks.append(callback)

    def _end(self, state: str) -> None:
        self._state = state
        self.bulk.on_end(self)
        if self._callbacks is not None:
            for callback in self._callbacks:
                callback(self)


class Bulk:
    """One ``publish_many()``.

    Args:
        channel: what to publish on.
        exchange: its name.
        routing_key: for messages that come without one.
        window: how many messages may be unconfirmed at a time.
        window_bytes: how many bytes of them; one that is larger goes alone.
        mandatory: whether the broker shall return what it cannot route.
        timeout: seconds for each message.
        retry_unknown: whether to send again what the link died with.
    """

    def __init__(
        self,
        channel: Channel,
        exchange: str,
        routing_key: str | None,
        *,
        window: int,
        window_bytes: int,
        mandatory: bool,
        timeout: TimeoutType,
        retry_unknown: bool,
    ) -> None:
        check_count("window", window, 1)
        check_count("window_bytes", window_bytes, 1)
        self.exchange = exchange
        self.mandatory = mandatory
        self.timeout = channel.seconds(timeout)
        self.retry_unknown = retry_unknown
        self.confirmed = 0
        self.failures: list[PublishFailure] = []
        self._channel = channel
        self._routing_key = routing_key
        self._window = window
        self._window_bytes = window_bytes
        self._loop = asyncio.get_running_loop()
        self._total = 0
        self._stopped_by: Exception | None = None
        self._refused_by: Exception | None = None
        self._refusals = self._confirmed_before = 0
        # Neighbours are mostly alike, and comparing them is a fifth of the work of looking them up.
        self._last_values: Properties | None = None
        self._last_properties = b""
        # What has not ended, oldest first, with the one that waits for its place in the window.
        self._unfinished: dict[_BulkPublish, None] = {}
        self._bytes = 0
        self._waiter: asyncio.Future[None] | None = None
        self._enough = (0, 0)  # what the waiter waits for: so many unfinished, and bytes of them, at most
        self._timer: asyncio.TimerHandle | None = None

    async def run(self, messages: Messages) -> PublishReport:
        """Publish all of *messages*; as :meth:`Exchange.publish_many`."""
        try:
            try:
                if isinstance(messages, AsyncIterable):
                    await self._feed_async(messages)
                else:
                    await self._feed(messages)
            except Exception as error:
                await self._shrink(0, 0)
                report = self._report()
                error.publish_report = report  # type: ignore[attr-defined]
                error.add_note(f"publish_many() ended with it: {report}")
                raise
            await self._shrink(0, 0)
            return self._report()
        finally:
            for publish in list(self._unfinished):
                publish.cancel()
            if self._timer is not None:
                self._timer.cancel()

    def on_refused(self, error: Exception) -> None:
        """The broker closed the channel over the exchange: take no more when it does so again and again.

        Once means little: recovery may declare the exchange again.
        """
        if error is not self._refused_by:  # else it is the same closing, of which each publish tells
            self._refusals = self._refusals + 1 if self.confirmed == self._confirmed_before else 1
            self._refused_by, self._confirmed_before = error, self.confirmed
            if self._refusals >= _MAX_REFUSALS:
                self._stopped_by = self._stopped_by or error

    def _report(self) -> PublishReport:
        self.failures.sort(key=lambda failure: failure.index)
        return PublishReport(self._total, self.confirmed, self.failures, self._stopped_by)

    # ---------------------------------------------------------------------------------------- taking messages

    async def _feed(self, messages: Iterable[Any]) -> None:
        if isinstance(messages, Message) or not isinstance(messages, Iterable):  # iterating a message gives its bytes
            raise TypeError(f"publish_many() takes an iterable of messages, not {type(messages).__name__}")
        iterator = iter(messages)
        now = self._loop.time
        while (send := self._find_sender(messages)) is not None:
            until = now() + _SLICE
            while len(self._unfinished) < self._window and self._bytes < self._window_bytes:
                item = next(iterator, _END)
                if item is _END:
                    return
                taken = now()
                publish = self._take(item, taken)
                if self._bytes > self._window_bytes:
                    await self._wait_for_place(publish)
                    send = self._send
                try:
                    send(publish)
                except (ChannelInvalidStateError, TypeError, ValueError):  # nothing was sent
                    self._send(publish)
                if taken > until or not self._total % _TURN:
                    break
            await self._wait_for_room()

    async def _feed_async(self, messages: AsyncIterable[Any]) -> None:
        iterator = aiter(messages)
        until = self._loop.time() + _SLICE
        try:
            while self._find_sender(messages) is not None:
                try:
                    item = await anext(iterator)
                except StopAsyncIteration:
                    return
                taken = self._loop.time()
                publish = self._take(item, taken)
                if self._bytes > self._window_bytes:
                    await self._wait_for_place(publish)
                self._send(publish)
                if self._is_full or taken > until or not self._total % _TURN:
                    await self._wait_for_room()
                    until = self._loop.time() + _SLICE
        finally:
            if isinstance(iterator, AsyncGenerator):
                await iterator.aclose()

    def _find_sender(self, messages: object) -> Callable[[_BulkPublish], None] | None:
        """Who sends what is taken in this turn of the loop; None if no more is to be taken.

        When the channel is closed, what is known to end is taken all the same, to say what was not sent.
        """
        if self._stopped_by is None:
            try:
                return self._channel.sender.send
            except ChannelInvalidStateError as error:
                if not self._total:
                    raise
                self._stopped_by = error
        return self._send if isinstance(messages, Sized) else None

    def _take(self, item: Any, now: float) -> _BulkPublish:
        """Make a publish of what the iterable gave, and give it its place in the window.

        Raises:
            TypeError, ValueError: it is none, or cannot be one.
        """
        routing_key = self._routing_key
        if isinstance(item, Message):
            message = item
        else:
            message, routing_key = self._unpack(item)
        if routing_key is None:
            self._blame(TypeError("it has no routing key: give publish_many() one, or pairs of a message and its key"))
        try:
            values = message.wire_properties()
            if values != self._last_values or values.headers is not None:
                self._last_properties = encode_properties(values)
                self._last_values = values
        except (TypeError, ValueError) as error:
            self._blame(error)
        properties = self._last_properties
        publish = _BulkPublish(self, self._total, message, routing_key, properties, message.body, now)
        self._total += 1
        self._unfinished[publish] = None
        self._bytes += publish.size
        if self._timer is None and publish.deadline != math.inf:
            self._timer = self._loop.call_at(publish.deadline, self._expire)
        return publish

    def _unpack(self, item: object) -> Sequence[Any]:
        """Message and routing key of a pair, of which nothing is known yet."""
        pair = cast("tuple[Any, ...]", item)
        if not (isinstance(item, tuple) and len(pair) == 2 and isinstance(pair[0], Message)):
            self._blame(
                TypeError(f"it must be a Message, or a pair of a Message and its routing key, not {item!r:.99}")
            )
        return pair

    def _send(self, publish: _BulkPublish) -> None:
        """Send it by whoever sends now.

        Raises:
            TypeError, ValueError: it cannot be sent.
        """
        if publish.done():  # its time was up while it waited for its place
            return
        try:
            if self._stopped_by is None:
                self._channel.sender.send(publish)
                return
        except ChannelInvalidStateError as error:
            self._stopped_by = error
        except (TypeError, ValueError) as error:
            publish.cancel()
            self._total -= 1
            self._blame(error)
        not_sent = PublishNotSent(f"not sent: {self._stopped_by}")
        not_sent.__cause__ = self._stopped_by
        publish.fail(not_sent)

    def _blame(self, error: Exception) -> NoReturn:
        """Raise *error*, with the place of the message that is taken."""
        kind = next(kind for kind in (MessageTooLarge, TypeError, ValueError) if isinstance(error, kind))
        raise kind(f"the message at index {self._total} of publish_many(): {error}") from error

    # ----------------------------------------------------------------------------------------- waiting for room

    @property
    def _is_full(self) -> bool:
        return len(self._unfinished) >= self._window or self._bytes >= self._window_bytes

    async def _wait_for_room(self) -> None:
        """Let the loop turn, and if the window is full wait until a good part of it is free."""
        if self._is_full:
            await self._shrink(self._window * 3 // 4, self._window_bytes * 3 // 4)
        else:
            await asyncio.sleep(0)

    async def _wait_for_place(self, publish: _BulkPublish) -> None:
        """Wait until *publish*, which is counted already, fits, or is the only one."""
        if publish.size >= self._window_bytes:
            await self._shrink(1, self._bytes)
        else:
            await self._shrink(self._window, self._window_bytes)

    async def _shrink(self, count: int, size: int) -> None:
        """Wait until no more than that is unfinished; everything is one day, because it has a deadline."""
        if len(self._unfinished) > count or self._bytes > size:
            self._enough = (count, size)
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def on_end(self, publish: _BulkPublish) -> None:
        """*publish* has ended, and leaves the window."""
        del self._unfinished[publish]
        self._bytes -= publish.size
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            count, size = self._enough
            if len(self._unfinished) <= count and self._bytes <= size:
                waiter.set_result(None)

    # ------------------------------------------------------------------------------------------------ deadlines

    def _expire(self) -> None:
        """End those whose time is up; they are due in the order in which they were taken."""
        self._timer = None
        now = self._loop.time()
        for publish in list(self._unfinished):
            if publish.deadline > now:
                self._timer = self._loop.call_at(publish.deadline, self._expire)
                break
            publish.fail(publish.holder.timeout_error(publish))

    def timeout_error(self, publish: Publish) -> Exception:
        """What one fails with whose time is up before it had its place in the window."""
        return PublishNotSentInTime(f"not sent within {self.timeout:g} s: the window is full ({publish})")
