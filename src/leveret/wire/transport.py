"""One TCP connection: it is opened once, and dies once.

**Life.** CONNECTING (handshake) → OPEN → CLOSING (our ``connection.close`` is out) → CLOSED. Every way out ends
in :meth:`Transport._die`, which tells each channel, each waiter and the owner exactly once. A dead transport is
never revived; reconnecting builds another.

**Reading.** The socket reads into the decoder's buffer, which hands deliveries to consumers and every other
frame to :meth:`Transport._on_frame`. No queue and no task stands between, so nothing here may block or raise.
How fast it is read while consumers do not keep up is :class:`~leveret.wire.intake.Intake`'s.

**Writing** is :class:`~leveret.wire.output.Output`'s.

**Heartbeats.** One timer, no task. Any byte from the peer is life; silence over two intervals is death, and
then the socket is aborted without a close handshake (AMQP 0-9-1 §4.2.7, rabbitmq.com/docs/heartbeats). Silence
counts only while the socket is being read.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import os
import re
import socket
import ssl
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol, TypeVar

from pamqp.base import Frame
from pamqp.commands import Channel as ChannelMethods
from pamqp.commands import Connection as ConnectionMethods

from leveret.deadlines import Deadlines
from leveret.exceptions import (
    AMQPConnectionError,
    ChannelInvalidStateError,
    ChannelLimitReached,
    ConnectionClosed,
    ConnectTimeout,
    HandshakeError,
    HeartbeatTimeout,
    MessageTooLarge,
    ProtocolError,
    connection_closed,
    fresh,
)
from leveret.log import get_logger, printable
from leveret.outcome import fail
from leveret.prompt import Prompt, PromptEvent, Wakeups
from leveret.types import FieldValue
from leveret.url import ConnectionParameters
from leveret.wire.codec import HEARTBEAT, HEARTBEAT_FRAME, METHOD
from leveret.wire.decoder import ContentSink, FrameDecoder
from leveret.wire.hand import Hand
from leveret.wire.handshake import PROTOCOL_HEADER, Handshake
from leveret.wire.intake import Intake, Source
from leveret.wire.methods import decode_method, encode_method, is_reply, make
from leveret.wire.output import Output
from leveret.wire.tally import Tally

_log = get_logger(__name__)

_HAPPY_EYEBALLS_DELAY = 0.25  # RFC 8305: so that one silent address does not use up the whole time
_GOODBYE = encode_method(0, make(ConnectionMethods.Close, reply_code=200, reply_text="Normal shutdown"))
E = TypeVar("E", bound=Exception)
T = TypeVar("T")

_STALL = 1.0
"""Seconds that the heartbeat timer may be late before it is told: the event loop was blocked.

That sees only what the loop stood still beyond the moment when the timer was due, and nothing of what ended before. It
is for those who watch nothing else; :class:`~leveret.metrics.Metrics` looks four times a second."""
_LAST_WORDS = 1.0
"""Seconds that a close frame may take to leave before the socket is aborted."""


class State(enum.Enum):
    """Where a transport is in its one life."""

    CONNECTING = "connecting"
    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


class TransportChannel(ContentSink, Source, Protocol):
    """What the transport tells a channel; all of it is synchronous and raises ProtocolError at most."""

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits for something that the broker is to say on it."""
        ...

    def on_frame(self, kind: int, payload: bytes) -> None:
        """A frame for this channel."""
        ...

    def on_connection_lost(self, error: Exception) -> None:
        """The transport died."""
        ...


class Transport(asyncio.BufferedProtocol):
    """The socket, its channels by number, and channel 0.

    Make one with :meth:`connect`. *on_lost* is called once, with the error that ended it; *on_blocked* with the
    broker's reason when it blocks publishers, and with None when it lets them go on.
    """

    def __init__(
        self,
        parameters: ConnectionParameters,
        client_properties: Mapping[str, FieldValue] | None,
        on_lost: Callable[[Exception], None],
        on_blocked: Callable[[str | None], None],
        tally: Tally | None = None,
    ) -> None:
        self.parameters = parameters
        self.tally = tally or Tally()
        self.state = State.CONNECTING
        self.error: Exception | None = None
        self.blocked: str | None = None
        self.output = Output(parameters.operation_timeout)
        self.channels: dict[int, TransportChannel] = {}
        self.wakeups = Wakeups()
        self.hand = Hand(self.wakeups, self.output)
        self.intake = Intake(self.channels, self._is_awaited)
        self._loop = asyncio.get_running_loop()
        self.deadlines = Deadlines(self._loop)
        self._on_lost = on_lost
        self._on_blocked = on_blocked
        self._socket: asyncio.Transport | None = None
        self._disconnected = PromptEvent()
        self._is_connected = False  # the loop has handed the socket over
        self._is_aborted = False

        self._handshake = Handshake(parameters, client_properties)
        self._opened: asyncio.Future[None] = Prompt(self.wakeups)

        self._decoder = FrameDecoder(self._on_frame, self.channels, self.tally)
        self.get_buffer = self._decoder.get_buffer  # type: ignore[method-assign]  # a call less for each read
        self._last_read = self._loop.time()
        self._heartbeat_timer: asyncio.TimerHandle | None = None
        self._beat_due = 0.0
        self._suspected = False

        self._last_number = 0
        self._used_numbers: set[int] = set()
        self._replies: deque[tuple[Frame, asyncio.Future[Frame]]] = deque()
        self._close_ok: asyncio.Future[None] | None = None
        self._closed_with: Exception | None = None
        self._last_words: asyncio.TimerHandle | None = None
        self._closing_channels: list[TransportChannel] = []

    def __repr__(self) -> str:
        return f"<Transport {self.parameters.host}:{self.parameters.port} {self.state.value}>"

    # -------------------------------------------------------------------------------------------- connecting

    @classmethod
    async def connect(
        cls,
        parameters: ConnectionParameters,
        *,
        on_lost: Callable[[Exception], None],
        on_blocked: Callable[[str | None], None],
        client_properties: Mapping[str, FieldValue] | None = None,
        ssl_context: ssl.SSLContext | None = None,
        tally: Tally | None = None,
    ) -> Transport:
        """Connect, shake hands, and return an open transport.

        Each stage (DNS and TCP, TLS, every answer of the handshake) has ``connect_timeout`` seconds.

        Raises:
            AMQPConnectionError: of the kind that says why.
        """
        self = cls(parameters, client_properties, on_lost, on_blocked, tally)
        try:
            await self._connect_socket(ssl_context)
            due = self._loop.time() + parameters.connect_timeout
            await self.deadlines.in_time(self._opened, due, self._handshake.overdue)
        except BaseException as exc:
            if self.state is not State.CLOSED:
                self.state = State.CONNECTING  # even if it has just opened: nobody has it, so nobody loses it
                self._die(exc if isinstance(exc, Exception) else ConnectionClosed("connecting was cancelled"))
            await self._disconnect()
            raise
        return self

    async def _connect_socket(self, ssl_context: ssl.SSLContext | None) -> None:
        p = self.parameters
        tls: dict[str, Any] = {}
        if p.ssl:
            if ssl_context is None:
                from leveret.wire.tls import create_context

                ssl_context = create_context(p)
            tls = {
                "ssl": ssl_context,
                "server_hostname": p.server_hostname or p.host,
                "ssl_handshake_timeout": p.connect_timeout,
            }
        delay = p.happy_eyeballs_delay
        # Under eager tasks asyncio fails at it, before 3.12.8 and 3.13.1.
        if delay is None and not _is_address(p.host) and self._loop.get_task_factory() is None:
            delay = _HAPPY_EYEBALLS_DELAY
        options: dict[str, Any] = {}
        if isinstance(self._loop, asyncio.BaseEventLoop):  # uvloop has no such thing
            options = {"happy_eyeballs_delay": delay, "interleave": p.interleave}
        try:
            async with asyncio.timeout(p.connect_timeout * (2 if p.ssl else 1)):
                await self._loop.create_connection(lambda: self, p.host, p.port, **options, **tls)
                self._is_connected = True
        except ssl.SSLError as exc:
            raise _explain_tls(exc, p) from exc
        except TimeoutError as exc:
            raise ConnectTimeout(f"no connection to {p.host}:{p.port} within {p.connect_timeout:g} s") from exc
        except ConnectionAbortedError as exc:  # asyncio's word for ssl_handshake_timeout
            raise ConnectTimeout(f"no TLS handshake with {p.host}:{p.port} within {p.connect_timeout:g} s") from exc
        except OSError as exc:
            raise _explain_connect(exc, p) from exc
        except UnicodeError as exc:
            raise ValueError(f"{p.host!r} cannot be the name of a host: {exc}") from exc

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The socket is connected (and TLS established)."""
        self._socket = transport
        sock = transport.get_extra_info("socket")
        if sock is not None:
            # Not TCP_USER_TIMEOUT: it also ends a connection whose peer is alive but does not read, as a broker
            # does that blocks publishers.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.intake.start(transport)
        self.output.open(transport)
        self.output.write(PROTOCOL_HEADER)

    def _on_handshake_method(self, method: Frame) -> None:
        self.deadlines.extend(self._opened, self._last_read + self.parameters.connect_timeout)
        try:
            answers = self._handshake.receive(method)
        except (AMQPConnectionError, ValueError) as exc:
            if isinstance(method, ConnectionMethods.Close):
                self.send(0, make(ConnectionMethods.CloseOk))
            self._fail(exc)
            return
        if answers:
            self.output.write(answers)
        if not self._handshake.done:
            if isinstance(method, ConnectionMethods.Tune):
                self._decoder.limit(self._handshake.frame_max)
            return
        self.state = State.OPEN
        if self.heartbeat:
            self._schedule_beat(self.heartbeat / 2)
        if not self._opened.done():
            self._opened.set_result(None)

    # ---------------------------------------------------------------------------------------- what was agreed

    @property
    def is_open(self) -> bool:
        """Whether channels may be opened and used."""
        return self.state is State.OPEN

    @property
    def frame_max(self) -> int:
        """Negotiated, in bytes."""
        return self._handshake.frame_max

    @property
    def channel_max(self) -> int:
        """Negotiated."""
        return self._handshake.channel_max

    @property
    def heartbeat(self) -> int:
        """Negotiated, in seconds; 0 is off."""
        return self._handshake.heartbeat

    @property
    def server_properties(self) -> Mapping[str, FieldValue]:
        """What the broker said of itself."""
        return self._handshake.server_properties

    def server_supports(self, capability: str) -> bool:
        """Whether the broker announced *capability*."""
        return bool(self._handshake.server_capabilities.get(capability))

    # ----------------------------------------------------------------------------------------------- reading

    def buffer_updated(self, nbytes: int) -> None:
        """The socket read *nbytes*."""
        self._last_read = self._loop.time()
        self.output.may_send_at_once = True
        self.wakeups.is_reading = True
        try:
            self._decoder.buffer_updated(nbytes)
        except ProtocolError as exc:
            said_nothing_yet = self.state is State.CONNECTING and not self._handshake.server_properties
            explained = self._handshake.explain(exc.data) if said_nothing_yet and exc.data else None
            self._fail(explained or exc)
        finally:  # whatever happens, those whose futures have ended go on
            self.wakeups.is_reading = False
            self.intake.budget -= nbytes
            if self.intake.budget < 0:
                self.intake.look()
            if self.wakeups.due:
                self.wakeups.run()

    def _is_awaited(self) -> bool:
        """Whether somebody waits for something that the broker is to say."""
        return (
            self.state is not State.OPEN
            or bool(self._replies)
            or self.blocked is not None
            or self.output.is_held
            or any(channel.is_awaited for channel in self.channels.values())
        )

    def eof_received(self) -> None:
        """The peer will send no more; what still waits to be sent to it would keep the socket open."""
        if self.state is not State.CLOSED:
            self._die(self._explain_loss(None))
        self._abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is gone."""
        self._disconnected.set()
        if self.state is not State.CLOSED:
            self._die(self._explain_loss(exc))

    def _explain_loss(self, exc: Exception | None) -> Exception:
        p = self.parameters
        if self.state is State.CONNECTING:
            return _explain_tls(exc, p) if isinstance(exc, ssl.SSLError) else self._handshake.lost(exc)
        if self._closed_with is not None:  # we said goodbye: however the peer goes, that is why
            return self._closed_with
        reason = str(exc) if exc is not None else "closed by the peer without a word"
        return _caused(
            ConnectionClosed(f"the connection to {p.host}:{p.port} was lost: {reason}", reply_text=reason), exc
        )

    def _on_frame(self, kind: int, number: int, payload: bytes) -> None:
        channel = self.channels.get(number)
        if channel is not None:
            channel.on_frame(kind, payload)
        elif self.state is State.CLOSING and number:
            pass  # after connection.close, everything but close and close-ok is discarded (§4.2.2)
        elif number:
            self._on_stray_frame(kind, number, payload)
        elif kind == METHOD:
            self._on_control(decode_method(payload))
        elif kind != HEARTBEAT:
            raise ProtocolError("content on channel 0", reply_code=505, data=payload)
        elif payload:
            raise ProtocolError("a heartbeat with a payload", reply_code=501, data=payload)

    def _on_stray_frame(self, kind: int, number: int, payload: bytes) -> None:
        """A frame for a channel that is not there."""
        if kind == HEARTBEAT:
            raise ProtocolError(f"a heartbeat on channel {number}", reply_code=505, data=payload)
        if number not in self._used_numbers:
            raise ProtocolError(f"a frame for channel {number}, which was never opened", reply_code=504, data=payload)
        # What a channel that we closed still had on its way. RabbitMQ up to 4.0 repeats its channel.close until
        # it has seen our close-ok, and each wants one.
        if kind == METHOD and isinstance(decode_method(payload), ChannelMethods.Close):
            self.send(number, make(ChannelMethods.CloseOk))

    def _on_control(self, method: Frame) -> None:
        """A method on channel 0."""
        if self.state is State.CONNECTING:
            self._on_handshake_method(method)
        elif isinstance(method, ConnectionMethods.Close):
            self._on_close(method)
        elif isinstance(method, ConnectionMethods.CloseOk) and self._close_ok is not None:
            self._abort()  # so the socket is closed when whoever waits for this comes to run
            if not self._close_ok.done():
                self._close_ok.set_result(None)
        elif self.state is State.CLOSING:
            pass  # as in _on_frame
        elif isinstance(method, ConnectionMethods.Blocked):
            self._set_blocked(method.reason)
        elif isinstance(method, ConnectionMethods.Unblocked):
            self._set_blocked(None)
        elif self._replies and is_reply(type(self._replies[0][0]), method):
            _, reply = self._replies.popleft()
            if not reply.done():
                reply.set_result(method)
        else:
            code = 503 if method.index >> 16 == 10 else 504  # only class connection (10) lives on channel 0
            raise ProtocolError(f"unexpected {method.name} on channel 0", reply_code=code)

    def _on_close(self, method: ConnectionMethods.Close) -> None:
        error = connection_closed(method)
        self.send(0, make(ConnectionMethods.CloseOk))
        if self._close_ok is not None:  # the closes crossed
            if not self._close_ok.done():
                self._close_ok.set_result(None)
        else:
            self._fail(error)

    def _set_blocked(self, reason: str | None) -> None:
        if reason is None and self.blocked is None:
            return
        if reason is not None and self.blocked is None:
            _log.warning("the broker blocks publishers on %r: %s", self, printable(reason))
        self.blocked = reason
        if reason is None:
            _log.info("the broker no longer blocks publishers on %r", self)
            self.tally.on_unblocked(self._loop.time())
            self.output.release("broker")
        else:
            self.tally.on_blocked(self._loop.time())
            self.output.hold("broker")
        self._on_blocked(reason)

    # ----------------------------------------------------------------------------------------------- writing

    def encode(self, channel: int, method: Frame) -> bytes:
        """A method frame.

        Raises:
            ValueError, TypeError: an argument that AMQP cannot carry, named.
            MessageTooLarge: it does not fit into one frame, over which the broker would close the connection.
        """
        data = encode_method(channel, method)
        if len(data) > self.frame_max:
            raise MessageTooLarge(
                f"{method.name} with its arguments is {len(data)} bytes; frame_max is {self.frame_max}"
            )
        return data

    def send(self, channel: int, method: Frame) -> None:
        """Write a method frame."""
        self.output.write(self.encode(channel, method))

    def pause_writing(self) -> None:
        """The socket's buffer is full."""
        self.output.pause()

    def resume_writing(self) -> None:
        """The socket's buffer has emptied."""
        self.output.resume()

    # -------------------------------------------------------------------------------------------- heartbeats

    def _schedule_beat(self, seconds: float) -> None:
        self._beat_due = self._loop.time() + seconds
        self._heartbeat_timer = self._loop.call_at(self._beat_due, self._beat)

    def _beat(self) -> None:
        now = self._loop.time()
        # While we do not read ourselves, the peer cannot be heard; afterwards it has its time again.
        silence = now - max(self._last_read, self.intake.changed) if self.intake.is_open else 0.0
        if (late := now - self._beat_due) > _STALL:
            _log.warning(
                "the event loop stood still for at least %.1f s: something blocks it, and heartbeats wait for it", late
            )
        if silence < 2 * self.heartbeat:
            self._suspected = False
            if not self.output.has_written:
                self.output.write(HEARTBEAT_FRAME)
                self.output.flush()
            self.output.has_written = False
            until_dead = 2 * self.heartbeat - silence
            self._schedule_beat(min(self.heartbeat / 2, until_dead))
        elif not self._suspected:
            # If the event loop stood still, the socket may be full of life: let it be read first.
            self._suspected = True
            self._schedule_beat(min(0.5, self.heartbeat / 10))
        else:
            p = self.parameters
            text = f"{p.host}:{p.port} was silent for {silence:.1f} s, two heartbeat intervals of {self.heartbeat} s"
            self._die(HeartbeatTimeout(text, reply_text=text))
            self._abort()

    # ---------------------------------------------------------------------------------------------- channels

    def attach(self, channel: TransportChannel, number: int | None = None) -> int:
        """Give *channel* a number: *number*, or the next free one.

        Numbers go round, so that one which was just closed rests as long as possible.

        Raises:
            ChannelInvalidStateError: the connection is not open.
            ChannelLimitReached: all numbers are in use.
            ValueError: *number* is in use, or not from 1 to ``channel_max``.
        """
        if self.state is not State.OPEN:
            raise ChannelInvalidStateError("the connection is not open") from self.error
        if number is None:
            if len(self.channels) >= self.channel_max:
                raise ChannelLimitReached(f"all {self.channel_max} channels of the connection are in use (channel_max)")
            number = self._last_number % self.channel_max + 1
            while number in self.channels:
                number = number % self.channel_max + 1
            self._last_number = number
        elif number in self.channels:
            raise ValueError(f"channel number {number} is in use")
        elif not 1 <= number <= self.channel_max:
            raise ValueError(f"channel number must be from 1 to {self.channel_max}, not {number}")
        self.channels[number] = channel
        self._used_numbers.add(number)
        return number

    def spare_number(self) -> int | None:
        """For a channel of leveret's own: the last one, as users ask for the first; None where that is taken."""
        return self.channel_max if self.channel_max not in self.channels else None

    def detach(self, number: int) -> None:
        """The number is free again: its close-ok was sent or received."""
        self.channels.pop(number, None)

    # ------------------------------------------------------------------------------------- calls and closing

    async def call(self, method: Frame, timeout: float) -> Any:
        """Send *method* on channel 0 and wait for its reply.

        Raises:
            TimeoutError: no reply within *timeout* seconds; a late one is swallowed.
            ConnectionClosed: the connection is not open, or was lost meanwhile.
        """
        if self.state is not State.OPEN:
            raise self.closed_error()
        data = self.encode(0, method)
        reply: asyncio.Future[Frame] = Prompt(self.wakeups)
        self._replies.append((method, reply))
        self.output.write(data)
        return await self.answer(reply, method, timeout)

    def answer(self, reply: asyncio.Future[T], method: Frame, timeout: float) -> Coroutine[Any, Any, T]:
        """The *reply* to *method*.

        Raises:
            TimeoutError: there was none within *timeout* seconds; that is what *reply* ends as.
        """
        return self.deadlines.in_time(
            reply,
            self._loop.time() + timeout,
            lambda: TimeoutError(f"{method.name} got no answer within {timeout:g} s{self.blocked_hint()}"),
        )

    def closed_error(self) -> Exception:
        """An error of its own for somebody who needs the connection and finds it closed."""
        return fresh(self.error) if self.error is not None else ConnectionClosed("the connection is being closed")

    def blocked_hint(self) -> str:
        """What to add to an error while the broker reads nothing."""
        return f"; the broker blocks this connection: {self.blocked}" if self.blocked is not None else ""

    async def close(self, error: Exception, deadline: float) -> None:
        """Shake hands to close, until *deadline* in event loop time; then abort. Cancelling aborts too.

        Args:
            error: what every waiter gets.
            deadline: ``loop.time()`` at which to stop being polite.
        """
        if self.state is State.OPEN:
            self._say_goodbye()
            self.state = State.CLOSING
            self._closed_with = error
            self._close_ok = Prompt(self.wakeups)
            self._closing_channels = list(self.channels.values())
            self.channels.clear()
        if self.state is State.CLOSING and self._close_ok is not None:
            try:
                await self.deadlines.in_time(self._close_ok, deadline, TimeoutError)
            except TimeoutError:
                _log.info("%r: no close-ok in time%s; aborting", self, self.blocked_hint())
            finally:
                self.abort(error)
        if self._last_words is not None and self._last_words.when() > deadline:
            self._last_words.cancel()
            self._last_words = self._loop.call_at(deadline, self._abort)
        await self._disconnect()

    def leave(self, error: Exception) -> None:
        """End it now with *error* for all who use it; the broker is told, but not waited for."""
        if self.state is State.OPEN:
            self._say_goodbye()
            self._die(error)
            self._last_words = self._loop.call_later(_LAST_WORDS, self._abort)

    def _say_goodbye(self) -> None:
        self.output.flush_all()
        self.output.write(_GOODBYE)
        self.output.flush()

    async def closed(self, deadline: float) -> None:
        """Wait until it is closed, but not beyond *deadline* in event loop time."""
        try:
            async with asyncio.timeout_at(deadline):
                await self._disconnected.wait()
        except TimeoutError:
            _log.info("%r: still being closed", self)

    def abort(self, error: Exception) -> None:
        """End it now, without a handshake."""
        if self.state is not State.CLOSED:
            self._die(error)
        self._abort()

    def _fail(self, error: Exception) -> None:
        """Die of *error*, telling the peer why if it broke the protocol."""
        if self.state is State.CLOSED:
            return
        has_last_words = isinstance(error, ProtocolError | ConnectionClosed)
        if isinstance(error, ProtocolError):
            _log.error("%r: protocol error: %s", self, printable(str(error)))
            text = str(error).encode()[:255].decode("utf-8", "ignore")
            self.send(0, make(ConnectionMethods.Close, reply_code=error.reply_code, reply_text=text))
            if self.state is State.CONNECTING:
                p = self.parameters
                text = f"{p.host}:{p.port} broke the protocol: {error}"
                error = _caused(HandshakeError(text, reply_code=error.reply_code, data=error.data), error)
        self.output.flush()
        self._die(error)
        if has_last_words:
            # Closing a socket that still holds unread bytes resets it, and the peer would not read our words: go on
            # reading, into nothing, until it closes.
            self._last_words = self._loop.call_later(_LAST_WORDS, self._abort)
        else:
            self._abort()

    def _die(self, error: Exception) -> None:
        """The one way into CLOSED: everybody who waits is told."""
        was_connecting = self.state is State.CONNECTING
        self.state = State.CLOSED
        self.error = error
        self._decoder.stop()
        self.intake.stop()
        if self.blocked is not None:
            self.tally.on_unblocked(self._loop.time())
        self.deadlines.end()
        if self._heartbeat_timer is not None:
            self._heartbeat_timer.cancel()
        self.output.close()
        fail(self._opened, error)
        if self._close_ok is not None and not self._close_ok.done():
            self._close_ok.set_result(None)
        channels = [*self._closing_channels, *self.channels.values()]
        self._closing_channels.clear()
        self.channels.clear()
        for channel in channels:
            channel.on_connection_lost(error)
        for _, reply in self._replies:
            fail(reply, fresh(error))
        self._replies.clear()
        self.hand.end()
        if not was_connecting:
            self._on_lost(error)

    def _abort(self) -> None:
        if self._last_words is not None:
            self._last_words.cancel()
        if self._socket is not None and not self._is_aborted:
            self._is_aborted = True
            self._socket.abort()

    async def _disconnect(self) -> None:
        """Wait until the socket is closed."""
        if self._socket is not None:
            if self._last_words is None:
                self._abort()
            if self._is_connected:  # else uvloop would close it without a word
                await self._disconnected.wait()


def _is_address(host: str) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host.partition("%")[0])  # without the zone of a link-local address
        except (OSError, ValueError):  # ValueError: a NUL, or what is no ASCII
            continue
        return True
    return False


def _caused(error: E, cause: Exception | None) -> E:
    error.__cause__ = cause
    return error


def _explain_connect(exc: OSError, p: ConnectionParameters) -> AMQPConnectionError:
    if isinstance(exc, socket.gaierror):
        # Offline, a name server that does not answer looks the same on some systems.
        text = f"cannot find the host {p.host!r}: {exc.strerror}. Is its name right, and does name resolution work?"
        return AMQPConnectionError(text)
    # asyncio wraps what each address said into one text, and names the call instead of the reason.
    numbers = [int(number) for number in re.findall(r"\[Errno (\d+)\]", str(exc))]
    reason = ", ".join(dict.fromkeys(map(os.strerror, numbers))) or str(exc)
    nowhere = bool(numbers) and {errno.ENETUNREACH, errno.EHOSTUNREACH}.issuperset(numbers)
    advice = "Is the address right, and the network up?" if nowhere else "Is RabbitMQ running there?"
    return AMQPConnectionError(f"cannot connect to {p.host}:{p.port}: {reason}. {advice}")


def _explain_tls(exc: ssl.SSLError, p: ConnectionParameters) -> AMQPConnectionError:
    where = f"TLS with {p.host}:{p.port} failed"
    if isinstance(exc, ssl.SSLCertVerificationError):
        text = f"the broker's certificate was not accepted: {exc.verify_message}"
    elif exc.reason == "WRONG_VERSION_NUMBER":
        text = "it does not speak TLS. Port 5672 is usually plain; amqps uses 5671"
    else:
        text = exc.reason or str(exc)
    return _caused(AMQPConnectionError(f"{where}: {text}"), exc)
