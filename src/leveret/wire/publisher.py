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
    Closed,
    ConnectionBlocked,
    MessageNacked,
    MessageReturned,
    MessageTooLarge,
    ProtocolError,
    PublishNotSent,
    PublishOutcomeUnknown,
    PublishUnconfirmedInTime,
)
from leveret.log import get_logger, printable
from leveret.outcome import DONE
from leveret.wire.codec import (
    Properties,
    PublishEncoder,
    Return,
    decode_route,
    encode_properties,
)
from leveret.wire.confirms import Confirms
from leveret.wire.outgoing import AwaitedPublish, Publish
from leveret.wire.output import CommitGate, Output
from leveret.wire.transport import Transport

_log = get_logger(__name__)


_BASIC_PUBLISH = (60, 40)


class PublishOwner(Protocol):
    """Who is told of what becomes of publishes; all of it is synchronous and does not raise."""

    on_return_raises: bool

    def on_returned(self, method: Return, properties: bytes, body: bytes, /) -> Any:
        """A mandatory message came back; the result is what its publisher gets."""
        ...

    def on_nacked(self, in_a_row: int, /) -> None:
        """The broker refused publishes, *in_a_row* since it last took one."""
        ...

    def take_back(self, publish: Publish, error: Exception, /) -> bool:
        """The channel is gone, and *publish* may be sent by another one; False leaves it to fail."""
        ...


class Publisher:
    """The publishing half of channel *number* on *transport*.

    Attributes:
        output: where it writes to.
        nacked_in_a_row: how many publishes the broker refused since it last took one.
        has_confirmed: whether it ever took one.
    """

    __slots__ = (
        "_came_back",
        "_confirms",
        "_encoder",
        "_expiry",
        "_held",
        "_loop",
        "_number",
        "_owner",
        "_refusal",
        "_tally",
        "_timeout",
        "_transport",
        "_written",
        "has_confirmed",
        "nacked_in_a_row",
        "output",
    )

    def __init__(self, transport: Transport, number: int, publisher_confirms: bool, owner: PublishOwner) -> None:
        self._transport = transport
        self.output: Output | CommitGate = transport.output
        self._number = number
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._timeout = transport.parameters.operation_timeout
        self._encoder = PublishEncoder(number, transport.frame_max)
        self._confirms: Confirms[Publish] | None = Confirms() if publisher_confirms else None
        self._held: dict[Publish, None] = {}
        self._expiry: asyncio.TimerHandle | None = None
        self._refusal: tuple[str, Exception | None] | None = None
        self._written = 0  # without confirms, which number what is written
        self._came_back = 0  # of what is unsettled
        self._tally = transport.tally
        self._tally.publishers.add(self)
        self.nacked_in_a_row = 0
        self.has_confirmed = False

    def publish(
        self,
        exchange: str,
        routing_key: str,
        properties: Properties,
        body: bytes,
        mandatory: bool,
        timeout: float | None,
        retry_unknown: bool = False,
    ) -> Coroutine[Any, Any, Any]:
        """Publish now, or as soon as nobody holds publishes; the result awaits the broker's confirm.

        Args:
            exchange: name of the exchange, "" for the default one.
            routing_key: at most 255 bytes of UTF-8.
            properties: with values as the wire has them.
            body: any size.
            mandatory: whether the broker shall return what it cannot route.
            timeout: seconds for the whole, None for the connection's ``operation_timeout``.
            retry_unknown: whether the owner may take it back when the channel is lost before its confirm.

        Raises:
            ChannelInvalidStateError: the channel is not open.
            ValueError, TypeError: a property that AMQP cannot carry.
            MessageTooLarge: the headers do not fit into one frame.
        """
        if self._refusal is not None:
            self.check_open()
        encoded = encode_properties(properties)
        output = self.output
        # Of what is held this raises what sending it would: the body is not to be kept twice.
        data = self._encoder.encode(exchange, routing_key, mandatory, encoded, b"" if output.is_held else body)
        confirms = self._confirms
        if confirms is None and not output.is_held:
            self._written += 1
            output.write(data)
            return DONE
        seconds = self._timeout if timeout is None else timeout
        loop, wakeups = self._loop, self._transport.wakeups
        publish = AwaitedPublish(
            self, loop, wakeups, exchange, routing_key, encoded, body, mandatory, seconds, retry_unknown
        )
        if output.is_held or confirms is None:
            self._hold(publish)
            return publish
        if timeout is not None:
            publish.limit_time()
        elif self._expiry is None and seconds != math.inf:
            self._expiry = self._loop.call_at(publish.deadline, self._expire)
        confirms.add(publish)
        output.write(data)
        return publish

    def send(self, publish: Publish) -> None:
        """As :meth:`publish`, for one that is made already, and that somebody else looks after.

        Raises:
            ChannelInvalidStateError: the channel is not open.
            ValueError: exchange or routing key over 255 bytes.
            MessageTooLarge: the headers do not fit into one frame.
        """
        if self._refusal is not None:
            self.check_open()
        output = self.output
        body = b"" if output.is_held else publish.body
        data = self._encoder.encode(publish.exchange, publish.routing_key, publish.mandatory, publish.properties, body)
        publish.holder = self
        if output.is_held:
            self._hold(publish)
        elif self._confirms is None:
            self._written += 1
            output.write(data)
            publish.set_result(None)
        else:
            self._confirms.add(publish)
            output.write(data)

    def check_open(self) -> None:
        """Raise ChannelInvalidStateError, chained to the reason, unless the channel is open."""
        if self._refusal is not None:
            state, cause = self._refusal
            reason = "" if cause is None else f": {cause}"
            raise ChannelInvalidStateError(f"channel {self._number} {state}{reason}") from cause

    def check_not_held(self) -> None:
        """Raise what a publish that does not wait raises, if somebody holds publishes.

        Raises:
            ChannelInvalidStateError: the channel is not open.
            ConnectionBlocked: the broker blocks publishers.
            PublishNotSent: the socket is full, or the broker stopped the flow of a channel.
        """
        self.check_open()
        if self.output.is_held:
            if (reason := self._transport.blocked) is not None:
                raise ConnectionBlocked(f"not sent: the broker blocks publishers: {reason}")
            raise PublishNotSent("not sent: the broker does not keep up, and the publish was not to wait for it")

    def adopt(self, publish: Publish) -> None:
        """Send one that waited elsewhere, or that another channel lost."""
        publish.returned = None
        publish.holder = self
        publish.limit_time()
        try:
            self._encode(publish, b"")
        except MessageTooLarge as exc:  # this broker's frames are smaller
            publish.fail(exc)
            return
        self._hold(publish)
        if not self.output.is_held:
            self.output.release(self)

    def _encode(self, publish: Publish, body: bytes) -> bytes:
        return self._encoder.encode(publish.exchange, publish.routing_key, publish.mandatory, publish.properties, body)

    def _hold(self, publish: Publish) -> None:
        """Write it when publishes are no longer held, unless its time is up or its owner has gone."""

        def write() -> None:
            if publish.done():
                return
            if self._confirms is None:
                self._written += 1
                publish.set_result(None)
            else:
                self._held.pop(publish, None)
                self._confirms.add(publish)
            self.output.write(self._encode(publish, publish.body))

        def forget(_: object) -> None:
            self._held.pop(publish, None)
            self.output.forget(publish)

        self._held[publish] = None
        publish.on_end(forget)
        self.output.when_released(publish, write)
        publish.limit_time()

    # ---------------------------------------------------------------------------------------------- deadlines

    def _expire(self) -> None:
        """End the publishes whose default deadline has passed; one timer serves them all."""
        self._expiry = None
        now = self._loop.time()
        for publish in list(self._confirms or ()):
            if publish.done() or publish.has_timer:
                continue
            if publish.deadline > now:
                self._expiry = self._loop.call_at(publish.deadline, self._expire)
                break
            publish.fail(self.timeout_error(publish))

    def timeout_error(self, publish: Publish) -> Exception:
        """What a publish fails with whose time is up."""
        if publish not in self._held:
            hint = self._transport.blocked_hint()
            return PublishUnconfirmedInTime(f"no confirm within {publish.timeout:g} s{hint} ({publish})")
        within = f"not sent within {publish.timeout:g} s"
        if (reason := self._transport.blocked) is not None and not publish.was_written:
            return ConnectionBlocked(f"{within}: the broker blocks publishers: {reason}")
        return publish.unsent(f"{within}: the broker does not keep up ({publish})", in_time=True)

    @property
    def published(self) -> int:
        """How many messages it wrote."""
        return self._written if self._confirms is None else self._confirms.last_number

    @property
    def unconfirmed(self) -> int:
        """How many of them the broker has not answered, whether somebody still waits for that or not."""
        return 0 if self._confirms is None else len(self._confirms)

    @property
    def waiting(self) -> int:
        """How many publishes wait to be written."""
        return len(self._held)

    @property
    def unconfirmed_too_long(self) -> int:
        """How many publishes were given up whose confirm has not come, on a link that is otherwise sound."""
        return sum(publish.done() and not publish.cancelled() for publish in self._confirms or ())

    # ---------------------------------------------------------------------------------- what the broker answers

    def on_ack(self, number: int, multiple: bool) -> None:
        """``basic.ack`` from the broker.

        Raises:
            ProtocolError: for a publish that is not outstanding.
        """
        settled = self._settle(number, multiple)
        back = self._take_came_back(settled) if self._came_back else 0
        self.nacked_in_a_row, self.has_confirmed = 0, True
        self._tally.confirmed += len(settled) - back
        self._tally.returned += back
        ack = Basic.Ack(number, multiple)
        for publish in settled:
            if publish.done():
                continue
            if publish.returned is None:
                publish.set_result(ack)
            elif self._owner.on_return_raises:
                publish.fail(MessageReturned(publish.returned))
            else:
                publish.set_result(publish.returned)

    def on_nack(self, number: int, multiple: bool) -> None:
        """``basic.nack``, as :meth:`on_ack`."""
        settled = self._settle(number, multiple)
        self._take_came_back(settled)
        self.nacked_in_a_row += len(settled)
        self._tally.nacked += len(settled)
        nack = Basic.Nack(number, multiple)
        for publish in settled:
            if not publish.done():
                publish.fail(MessageNacked(nack))
        if self.nacked_in_a_row:
            self._owner.on_nacked(self.nacked_in_a_row)

    def _settle(self, number: int, multiple: bool) -> list[Publish]:
        """Take out what a confirm settles, and measure how long it took if somebody wants to know."""
        if self._confirms is None:
            raise ProtocolError("a confirm on a channel without publisher confirms", reply_code=503)
        settled = self._confirms.settle(number, multiple)
        if self._tally.on_confirmed is not None:
            now = self._loop.time()
            for publish in settled:
                self._tally.on_confirmed(now - publish.began)
        return settled

    def _take_came_back(self, settled: list[Publish]) -> int:
        """How many of *settled* came back."""
        count = sum(publish.returned is not None for publish in settled)
        self._came_back -= count
        return count

    def on_return(self, method: Return, properties: bytes, body: bytes) -> None:
        """``basic.return``, which comes before the confirm of the same message."""
        returned = self._owner.on_returned(method, properties, body)
        if self._confirms is None:
            self._tally.returned += 1
            return
        publish = self._confirms.match_return(*decode_route(method.route), properties, body)
        if publish is not None:
            publish.returned = returned
            self._came_back += 1
        else:
            text = printable(method.reply_text)
            _log.warning("channel %d: a message came back that no publish waits for: %s", self._number, text)

    # ----------------------------------------------------------------------------------------------- closing

    def refuse(self, state: str, cause: Exception | None = None) -> None:
        """Raise ChannelInvalidStateError for every publish from now on: the channel *state*, as "is closed"."""
        self._refusal = state, cause

    @property
    def has_held(self) -> bool:
        """Whether publishes wait to be written."""
        return bool(self._held)

    @property
    def is_awaited(self) -> bool:
        """Whether somebody may wait for a publish."""
        return bool(self._held) or any(not publish.done() for publish in self._confirms or ())

    async def settled(self, deadline: float) -> None:
        """Wait until every publish that somebody may wait for is settled, or until *deadline* in event loop time."""
        unsettled = [publish for publish in (*(self._confirms or ()), *self._held) if not publish.done()]
        if not unsettled:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                for publish in unsettled:
                    if not publish.done():
                        ended: asyncio.Future[None] = self._loop.create_future()
                        publish.on_end(lambda _, ended=ended: ended.done() or ended.set_result(None))
                        await ended

    def end(self, error: Exception) -> None:
        """The channel is gone: end every publish that is not settled."""
        self.refuse("is closed", error)
        if self._expiry is not None:
            self._expiry.cancel()
        written = self._confirms.abandon() if self._confirms is not None else []
        held, self._held = self._held, {}
        # What was closed over a publish would be closed over it again.
        over_a_publish = isinstance(error, Closed) and (error.class_id, error.method_id) == _BASIC_PUBLISH
        for publish in written:
            may_repeat = publish.was_written = publish.retry_unknown and not over_a_publish
            if not publish.done() and may_repeat and self._owner.take_back(publish, error):
                self._tally.resent += 1
                continue
            self._tally.unknown += 1
            if not publish.done():
                lost = PublishOutcomeUnknown(f"the channel was lost before the confirm: {error}")
                _fail_from(publish, lost, error)
        for publish in held:
            self.output.forget(publish)
            if not publish.done() and not self._owner.take_back(publish, error):
                _fail_from(publish, publish.unsent(f"the channel was lost before it was sent: {error}"), error)
        self.output.release(self)
        self._tally.on_publisher_ended(self)

    # --------------------------------------------------------------------------------------------------- flow

    def on_flow(self, active: bool) -> None:
        """``channel.flow`` from the broker."""
        if active:
            self.output.release(self)
        else:
            self.output.hold(self)


def _fail_from(publish: Publish, error: Exception, cause: Exception) -> None:
    error.__cause__ = cause
    publish.fail(error)
