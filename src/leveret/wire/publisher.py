"""Publishing on one channel, with or without confirms.

A confirm number is taken and the bytes are written in one step with no ``await`` between, so nothing can shift
the numbers that follow. Every publish ends as exactly one of: confirmed, nacked, returned, not sent, outcome
unknown; a cancelled one keeps its number, and its late confirm disturbs nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Coroutine
from typing import Any, Protocol

from pamqp.commands import Basic

from leveret.exceptions import (
    ChannelInvalidStateError,
    ConnectionBlocked,
    MessageNacked,
    MessageReturned,
    ProtocolError,
    PublishNotSent,
    PublishNotSentInTime,
    PublishOutcomeUnknown,
    PublishUnconfirmedInTime,
)
from leveret.log import get_logger, printable
from leveret.outcome import DONE, Outcome, fail
from leveret.wire.codec import (
    Properties,
    PublishEncoder,
    Return,
    decode_confirm,
    decode_route,
    encode_properties,
)
from leveret.wire.confirms import Confirms
from leveret.wire.methods import make
from leveret.wire.output import CommitGate, Output
from leveret.wire.transport import Transport

_log = get_logger(__name__)

_HELD = -math.inf
"""Deadline of a publish that is not written yet."""
_TIMED = math.inf
"""Deadline of a publish that has a timer of its own."""


class ReturnHandler(Protocol):
    """Who is told of mandatory messages that come back."""

    on_return_raises: bool

    def on_returned(self, method: Return, properties: bytes, body: bytes, /) -> Any:
        """One came back; the result is what its publisher gets. Synchronous, and does not raise."""
        ...


class Publish(Outcome[Any]):
    """A publish that waits for its confirm, or to be written."""

    __slots__ = ("body", "deadline", "exchange", "mandatory", "properties", "returned", "routing_key")

    exchange: str
    routing_key: str
    properties: bytes
    body: bytes
    mandatory: bool
    returned: Any
    deadline: float


class Publisher:
    """The publishing half of channel *number* on *transport*.

    Attributes:
        output: where it writes to.
    """

    __slots__ = (
        "_confirms",
        "_encoder",
        "_expiry",
        "_held",
        "_loop",
        "_number",
        "_refusal",
        "_return_handler",
        "_timeout",
        "_transport",
        "output",
    )

    def __init__(
        self, transport: Transport, number: int, publisher_confirms: bool, return_handler: ReturnHandler
    ) -> None:
        self._transport = transport
        self.output: Output | CommitGate = transport.output
        self._number = number
        self._return_handler = return_handler
        self._loop = asyncio.get_running_loop()
        self._timeout = transport.parameters.operation_timeout
        self._encoder = PublishEncoder(number, transport.frame_max)
        self._confirms: Confirms[Publish] | None = Confirms() if publisher_confirms else None
        self._held: set[Publish] = set()
        self._expiry: asyncio.TimerHandle | None = None
        self._refusal: ChannelInvalidStateError | None = None

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
        if self._refusal is not None:
            raise ChannelInvalidStateError(*self._refusal.args) from self._refusal.__cause__
        encoded = encode_properties(properties)
        data = self._encoder.encode(exchange, routing_key, mandatory, encoded, body)
        output = self.output
        confirms = self._confirms
        if confirms is None and not output.is_held:
            output.write(data)
            return DONE
        publish = Publish(loop=self._loop)
        publish.exchange = exchange
        publish.routing_key = routing_key
        publish.properties = encoded
        publish.body = body
        publish.mandatory = mandatory
        publish.returned = None
        if output.is_held or confirms is None:
            self._hold(publish, data, timeout)
            return publish
        if timeout is None:
            publish.deadline = deadline = self._loop.time() + self._timeout
            if self._expiry is None and deadline != math.inf:
                self._expiry = self._loop.call_at(deadline, self._expire)
        else:
            publish.deadline = _TIMED
            self._limit_time(publish, timeout)
        confirms.add(publish)
        output.write(data)
        return publish

    def _hold(self, publish: Publish, data: bytes, timeout: float | None) -> None:
        """Write *data* when publishes are no longer held, unless its time is up or its owner has gone."""

        def write() -> None:
            if publish.done():
                return
            publish.deadline = _TIMED
            if self._confirms is None:
                publish.set_result(None)
            else:
                self._held.discard(publish)
                self._confirms.add(publish)
            self.output.write(data)

        def forget(_: object) -> None:
            self._held.discard(publish)
            self.output.forget(publish)

        publish.deadline = _HELD
        self._held.add(publish)
        publish.add_done_callback(forget)
        self.output.when_released(publish, write)
        self._limit_time(publish, self._timeout if timeout is None else timeout)

    # ---------------------------------------------------------------------------------------------- deadlines

    def _limit_time(self, publish: Publish, timeout: float) -> None:
        if timeout != math.inf:
            timer = self._loop.call_later(timeout, self._time_out, publish, timeout)
            publish.add_done_callback(lambda _: timer.cancel())

    def _expire(self) -> None:
        """End the publishes whose default deadline has passed; one timer serves them all."""
        self._expiry = None
        now = self._loop.time()
        for publish in list(self._confirms or ()):
            if publish.done() or publish.deadline == _TIMED:
                continue
            if publish.deadline > now:
                self._expiry = self._loop.call_at(publish.deadline, self._expire)
                break
            self._time_out(publish, self._timeout)

    def _time_out(self, publish: Publish, timeout: float) -> None:
        where = f"exchange {publish.exchange!r}, routing key {publish.routing_key!r}"
        blocked = self._transport.blocked
        if publish.deadline != _HELD:
            hint = self._transport.blocked_hint()
            fail(publish, PublishUnconfirmedInTime(f"no confirm within {timeout:g} s{hint} ({where})"))
        elif blocked is not None:
            fail(publish, ConnectionBlocked(f"not sent within {timeout:g} s: the broker blocks publishers: {blocked}"))
        else:
            fail(publish, PublishNotSentInTime(f"not sent within {timeout:g} s: the broker does not keep up ({where})"))

    # ---------------------------------------------------------------------------------- what the broker answers

    def on_confirm(self, payload: bytes, cls: type[Basic.Ack] | type[Basic.Nack]) -> None:
        """``basic.ack`` or ``basic.nack`` from the broker.

        Raises:
            ProtocolError: for a publish that is not outstanding.
        """
        number, multiple = decode_confirm(payload)
        if self._confirms is None:
            raise ProtocolError("a confirm on a channel without publisher confirms", reply_code=503)
        frame = make(cls, delivery_tag=number, multiple=multiple)
        for publish in self._confirms.settle(number, multiple):
            if publish.done():
                continue
            if isinstance(frame, Basic.Nack):
                fail(publish, MessageNacked(frame))
            elif publish.returned is None:
                publish.set_result(frame)
            elif self._return_handler.on_return_raises:
                fail(publish, MessageReturned(publish.returned))
            else:
                publish.set_result(publish.returned)

    def on_return(self, method: Return, properties: bytes, body: bytes) -> None:
        """``basic.return``, which comes before the confirm of the same message."""
        returned = self._return_handler.on_returned(method, properties, body)
        if self._confirms is None:
            return
        publish = self._confirms.match_return(*decode_route(method.route), properties, body)
        if publish is not None:
            publish.returned = returned
        else:
            text = printable(method.reply_text)
            _log.warning("channel %d: a message came back that no publish waits for: %s", self._number, text)

    # ----------------------------------------------------------------------------------------------- closing

    def refuse(self, text: str, cause: Exception | None = None) -> None:
        """Raise ChannelInvalidStateError for every publish from now on."""
        self._refusal = ChannelInvalidStateError(text)
        self._refusal.__cause__ = cause

    @property
    def has_held(self) -> bool:
        """Whether publishes wait to be written."""
        return bool(self._held)

    async def settled(self, deadline: float) -> None:
        """Wait until every publish that somebody may wait for is settled, or until *deadline* in event loop time."""
        unsettled = [publish for publish in (*(self._confirms or ()), *self._held) if not publish.done()]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                for publish in unsettled:
                    if not publish.done():
                        ended: asyncio.Future[None] = self._loop.create_future()
                        publish.add_done_callback(lambda _, ended=ended: ended.done() or ended.set_result(None))
                        await ended

    def end(self, error: Exception) -> None:
        """The channel is gone: end every publish that is not settled."""
        self.refuse(f"channel {self._number} is closed: {error}", error)
        if self._expiry is not None:
            self._expiry.cancel()
        written = self._confirms.abandon() if self._confirms is not None else []
        held, self._held = self._held, set()
        for publish in written:
            _fail_from(publish, PublishOutcomeUnknown(f"the channel was lost before the confirm: {error}"), error)
        for publish in held:
            _fail_from(publish, PublishNotSent(f"the channel was lost before the message was sent: {error}"), error)
        self.output.release(self)

    # --------------------------------------------------------------------------------------------------- flow

    def on_flow(self, active: bool) -> None:
        """``channel.flow`` from the broker."""
        if active:
            self.output.release(self)
        else:
            self.output.hold(self)


def _fail_from(publish: Publish, error: Exception, cause: Exception) -> None:
    error.__cause__ = cause
    fail(publish, error)
