"""One connection to the broker: bytes in and out, channel 0, heartbeats, and the frames of its channels.

What a session may do next is its *stage*; each method of class connection has its place in one of them. Bytes to the
client are gathered and written once for all that one read brought.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from pamqp.commands import Channel as ChannelMethods
from pamqp.commands import Connection

from leveret.exceptions import ProtocolError
from leveret.testing import frames, login
from leveret.testing.channel import Channel
from leveret.testing.methods import HANDLERS
from leveret.testing.refusals import Refusal, octets
from leveret.wire.codec import HEARTBEAT, HEARTBEAT_FRAME, METHOD
from leveret.wire.decoder import FrameDecoder
from leveret.wire.methods import decode_method, encode_method, make

if TYPE_CHECKING:
    from pamqp.base import Frame

    from leveret.testing.access import User, Verb
    from leveret.testing.server import Server
    from leveret.testing.vhost import VirtualHost

_log = logging.getLogger("leveret.testing")
_HEADERS = (b"AMQP\x00\x00\x09\x01", b"AMQP\x01\x01\x00\x09", b"AMQP\x01\x01\x08\x00")
_FLUSH_AT = 65_536
_UNREAD = 1_000_000
"""Bytes that a client may leave unread before it is not read either. RabbitMQ goes on for longer."""
_CLOSE_TIMEOUT = 10.0
"""Seconds that a client has to answer connection.close."""
_HANDSHAKE_TIMEOUT = 10.0
"""Seconds that a client has until its connection is open, as RabbitMQ's ``handshake_timeout``."""


class Session(asyncio.Protocol):
    """One client.

    Attributes:
        stage: ``header``, ``start``, ``tune``, ``open``, ``running``, ``closing``, ``closed``.
        can_write: whether the client reads what it is sent.
        client_properties: what the client said of itself.
        channels: by number.
    """

    user: User
    vhost: VirtualHost

    def __init__(self, server: Server) -> None:
        self.server = server
        self.stage = "header"
        self.can_write = True
        self.client_properties: Mapping[str, Any] = {}
        self.mechanism = ""
        self.frame_max = server.frame_max
        self.channel_max = server.channel_max
        self.heartbeat = 0
        self.channels: dict[int, Channel] = {}
        self.peer = ("", 0)
        self._transport: asyncio.Transport | None = None
        self._decoder = FrameDecoder(self._on_frame, {})
        self._head = b""
        self._out: list[bytes] = []
        self._out_size = 0
        self._is_flush_due = False
        self._confirming: list[Channel] = []
        self._held: deque[tuple[int, int, bytes]] | None = None  # frames that wait, while there is a reason to wait
        self._is_blocked = False
        self._is_going_on = False
        self._told_blocked = False
        self._heard = self._said = 0.0
        self._beat: asyncio.TimerHandle | None = None
        self._farewell: asyncio.TimerHandle | None = None
        self._handshake: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Session {self.name or self.peer[1]} {self.stage}>"

    @property
    def name(self) -> str:
        """The ``connection_name`` that the client gave."""
        return str(self.client_properties.get("connection_name", ""))

    def understands(self, capability: str) -> bool:
        """Whether the client announced *capability*."""
        capabilities = self.client_properties.get("capabilities")
        return isinstance(capabilities, Mapping) and cast("Mapping[str, Any]", capabilities).get(capability) is True

    def check(self, verb: Verb, name: str, *, is_queue: bool) -> None:
        """Refuse what the user may not do."""
        self.server.access.check(self.user, self.vhost.name, verb, name, is_queue=is_queue)

    # ---------------------------------------------------------------------------------------------- the socket

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is here."""
        self._transport = cast("asyncio.Transport", transport)
        if not self.server.is_listening:  # stopped while asyncio was accepting
            self.abort()
            return
        self.peer = transport.get_extra_info("peername") or ("", 0)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.server.sessions[self] = None
        self._handshake = self.server.loop.call_later(_HANDSHAKE_TIMEOUT, self._end_handshake)
        if self.server.is_paused:
            self._transport.pause_reading()

    def _end_handshake(self) -> None:
        if self.stage not in {"header", "start", "tune", "open"}:
            return
        if self.server.is_paused:  # nobody can get on
            self._handshake = self.server.loop.call_later(_HANDSHAKE_TIMEOUT, self._end_handshake)
        else:
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._end()

    def pause_writing(self) -> None:
        """The client does not read: its consumers get nothing for a while."""
        self.can_write = False

    def resume_writing(self) -> None:
        """It reads again."""
        self.can_write = True
        self._go_on()
        for channel in tuple(self.channels.values()):
            channel.dispatch()

    def data_received(self, data: bytes) -> None:
        """Handle what came, and answer all of it in one write."""
        self._heard = self.server.loop.time()
        if self.server.tap is not None:
            data = self.server.tapped(self, "in", data)
        if self.stage == "header":
            data = self._greet(data)
        try:
            self._decoder.feed(data)
        except ProtocolError as error:
            self._decoder.stop()
            self.close(frames.frame_error(error, self.frame_max or self.server.largest_frame))
        self.flush()

    def send(self, data: bytes) -> None:
        """Send *data* with what else there is to send."""
        self._out.append(data)
        self._out_size += len(data)
        if self._out_size > _FLUSH_AT:
            self._write()
        elif not self._is_flush_due:
            self._is_flush_due = True
            self.server.loop.call_soon(self.flush)

    def send_method(self, number: int, method: Frame) -> None:
        """Send a method."""
        self.send(encode_method(number, method))

    def will_confirm(self, channel: Channel) -> None:
        """Have *channel* send its confirms with the next flush."""
        self._confirming.append(channel)
        if not self._is_flush_due:
            self._is_flush_due = True
            self.server.loop.call_soon(self.flush)

    def flush(self) -> None:
        """Send everything now."""
        self._is_flush_due = False
        if self._confirming:
            confirming, self._confirming = self._confirming, []
            self._is_flush_due = True  # what they send goes below
            for channel in confirming:
                if not channel.is_closing:
                    channel.publisher.flush_confirms()
            self._is_flush_due = False
        if self._out:
            self._write()

    def _write(self) -> None:
        if self.server.is_paused or self._transport is None:
            return
        data = b"".join(self._out)
        self._out.clear()
        self._out_size = 0
        self._said = self.server.loop.time()
        if self.server.tap is not None:
            data = self.server.tapped(self, "out", data)
        self._transport.write(data)
        if not self.can_write and self.stage == "running" and self._transport.get_write_buffer_size() > _UNREAD:
            self._hold()  # or whatever it asks for would be kept in memory: messages that it gets, returns

    def abort(self) -> None:
        """Reset the connection."""
        transport = self._transport
        if transport is not None:
            sock = transport.get_extra_info("socket")
            if sock is not None and sock.fileno() >= 0:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        self._end()

    def _end(self) -> None:
        if self.stage == "closed":
            return
        self.stage = "closed"
        self._decoder.stop()
        self._out.clear()
        self._held = None
        for timer in (self._beat, self._farewell, self._handshake):
            if timer is not None:
                timer.cancel()
        self.server.sessions.pop(self, None)
        self._release()

    def _release(self) -> None:
        channels, self.channels = self.channels, {}
        self._confirming.clear()
        for channel in channels.values():
            channel.release()
        if hasattr(self, "vhost"):
            for queue in [queue for queue in self.vhost.queues.values() if queue.owner is self]:
                self.vhost.delete_queue(queue)

    # ----------------------------------------------------------------------------------------- pauses and alarms

    def freeze(self) -> None:
        """Read nothing, write nothing."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def thaw(self) -> None:
        """Undo :meth:`freeze`."""
        self._go_on()
        self._read_on()
        self.flush()

    def _read_on(self) -> None:
        if (
            self._held is None
            and self._transport is not None
            and not self._transport.is_closing()
            and not self.server.is_paused
        ):
            self._transport.resume_reading()

    def _hold(self) -> None:
        """Handle no frame for a while, and read no more of them."""
        if self._held is None:
            self._held = deque()
            if self._transport is not None and not self._transport.is_closing():
                self._transport.pause_reading()

    def _go_on(self) -> None:
        """Handle what was held, as far as nothing holds it again."""
        if self._is_going_on or self.server.is_paused:
            return
        self._is_going_on = True
        try:
            while self._held and not self._is_blocked and self.can_write:
                self._handle(*self._held.popleft())
        finally:
            self._is_going_on = False
        if not self._is_blocked and self.can_write:
            self._held = None
            self._read_on()

    def _block(self, reason: str) -> None:
        # RabbitMQ stops reading a connection that publishes, and it alone: everything behind that publish waits.
        self._is_blocked = True
        self._hold()
        if self.understands("connection.blocked"):
            self._told_blocked = True
            self.send_method(0, make(Connection.Blocked, reason=reason))

    def unblock(self) -> None:
        """The alarm is over: go on where the session was stopped."""
        if not self._is_blocked:
            return
        self._is_blocked = False
        if self._told_blocked:
            self._told_blocked = False
            self.send_method(0, make(Connection.Unblocked))
        self._go_on()

    # ------------------------------------------------------------------------------------------------ heartbeats

    def _keep_beating(self) -> None:
        now = self.server.loop.time()
        if not self.server.is_paused:
            if (
                self._held is None and now - self._heard >= 3 * self.heartbeat
            ):  # RabbitMQ looks twice, a heartbeat apart
                self.abort()
                return
            if now - self._said >= self.heartbeat / 2:
                self.send(HEARTBEAT_FRAME)
        self._beat = self.server.loop.call_later(self.heartbeat / 2, self._keep_beating)

    # --------------------------------------------------------------------------------------------------- frames

    def _greet(self, data: bytes) -> bytes:
        """Read the protocol header; what comes behind it."""
        self._head += data
        if len(self._head) < 8:
            return b""
        head, rest = self._head[:8], self._head[8:]
        if head not in _HEADERS:
            assert self._transport is not None
            self._decoder.stop()
            self._transport.write(self.server.dialect.wrong_header_answer)
            self._transport.close()
            return b""
        login.greet(self)
        return rest

    def about(self, what: str) -> Any:
        """What the socket knows of itself: ``peercert``, ``ssl_object``."""
        return None if self._transport is None else self._transport.get_extra_info(what)

    def tuned(self) -> None:
        """The limits are agreed on: frames may be larger now, and heartbeats begin."""
        self._decoder.limit(self.server.largest_frame)
        if self.heartbeat:
            self._said = self.server.loop.time()
            self._beat = self.server.loop.call_later(self.heartbeat / 2, self._keep_beating)

    def _on_frame(self, kind: int, number: int, payload: bytes) -> None:
        if self._held is not None and self.stage == "running":
            self._held.append((kind, number, payload))
        else:
            self._handle(kind, number, payload)

    def _handle(self, kind: int, number: int, payload: bytes) -> None:
        try:
            if number and self.stage == "running":
                channel = self.channels.get(number)
                if channel is None or kind == HEARTBEAT:
                    self._on_stray(kind, number, payload)
                elif channel.is_closing:
                    self._on_farewell(channel, kind, payload)
                elif self.server.alarms and kind == METHOD and payload[:4] == frames.PUBLISH:
                    self._block(self.server.alarm_reason)
                    if self._held is not None:
                        self._held.appendleft((kind, number, payload))
                else:
                    channel.on_frame(kind, payload)
            elif kind == METHOD:
                self._on_method(number, payload)
            elif kind != HEARTBEAT:
                raise Refusal(505, f"type {kind}, all octets = {octets(payload[:64])}", class_id=0, method_id=0)
        except Refusal as refusal:
            self._refuse(number, refusal, payload if kind == METHOD else b"")
        except ProtocolError as error:
            if error.reply_code in (503, 540):  # RabbitMQ's reader crashes over what it does not know
                self.abort()
                return
            self._refuse(number, Refusal(501, f"cannot decode {octets(payload[4:])}"), payload)
        except Exception as error:
            _log.exception("%r sent a frame that the broker stumbles over: please report it", self)
            self.close(Refusal(541, f"{type(error).__name__}: {error}", class_id=0, method_id=0))

    def _refuse(self, number: int, refusal: Refusal, payload: bytes) -> None:
        class_id, method_id = refusal.class_id, refusal.method_id
        if class_id is None or method_id is None:
            class_id, method_id = struct.unpack_from(">HH", payload) if len(payload) >= 4 else (0, 0)
        channel = self.channels.get(number)
        if channel is None or refusal.closes_connection:
            self.close(refusal, class_id, method_id)
        else:
            channel.close(refusal, class_id, method_id)

    def close(self, refusal: Refusal, class_id: int | None = None, method_id: int | None = None) -> None:
        """Close the connection with RabbitMQ's words; the client's close-ok is awaited, for a while."""
        if self.stage in {"closing", "closed"}:
            return
        self.flush()
        self.stage = "closing"
        self._release()
        self._is_blocked = False
        self._held = None
        self._read_on()
        self.send_method(
            0,
            make(
                Connection.Close,
                reply_code=refusal.code,
                reply_text=refusal.text,
                class_id=(refusal.class_id or 0) if class_id is None else class_id,
                method_id=(refusal.method_id or 0) if method_id is None else method_id,
            ),
        )
        self._farewell = self.server.loop.call_later(_CLOSE_TIMEOUT, self.abort)

    def _on_stray(self, kind: int, number: int, payload: bytes) -> None:
        if kind == HEARTBEAT:
            raise Refusal(
                505, f"type 8, all octets = {octets(payload)}", closes_connection=True, class_id=0, method_id=0
            )
        if kind != METHOD:
            raise Refusal(504, "expected 'channel.open'", class_id=0, method_id=0)
        method = decode_method(payload)
        if not isinstance(method, ChannelMethods.Open):
            raise Refusal(504, "expected 'channel.open'")
        self.server.faults.apply(method.name)
        limit = self.user.max_channels
        if limit is not None and self.server.channels_of(self.user) >= limit:
            raise Refusal(
                530,
                f"number of channels opened for user '{self.user.name}' has reached the maximum allowed user limit of "
                f"({limit})",
                class_id=0,
                method_id=0,
            )
        if len(self.channels) >= self.channel_max:
            raise Refusal(
                530,
                f"number of channels opened ({len(self.channels)}) has reached the negotiated channel_max "
                f"({self.channel_max})",
                class_id=0,
                method_id=0,
            )
        self.channels[number] = Channel(self, number)
        self.send_method(number, make(ChannelMethods.OpenOk))

    def _on_farewell(self, channel: Channel, kind: int, payload: bytes) -> None:
        """A frame of a channel that the broker closed: all but the two that end it is dropped."""
        if kind != METHOD:
            return
        index = payload[:4]
        if index == b"\x00\x14\x00\x29":
            del self.channels[channel.number]
        elif index == b"\x00\x14\x00\x28":
            self.send_method(channel.number, make(ChannelMethods.CloseOk))
        elif index == b"\x00\x14\x00\x0a":
            raise Refusal(504, "second 'channel.open' seen")

    def on_channel_method(self, channel: Channel, payload: bytes) -> None:
        """A method of an open channel that has no content."""
        method = decode_method(payload)
        if not payload.isascii():
            _check_text(method)
        self.server.faults.apply(method.name)
        if isinstance(method, ChannelMethods.Close):
            channel.publisher.flush_confirms()
            channel.release()
            del self.channels[channel.number]
            self.send_method(channel.number, make(ChannelMethods.CloseOk))
            return
        if isinstance(method, ChannelMethods.Open):
            raise Refusal(504, "second 'channel.open' seen")
        handler = HANDLERS.get(type(method))
        if handler is None:
            if method.name == "Basic.Deliver":
                return  # RabbitMQ takes no notice of it
            raise Refusal(503, "unimplemented method")
        reply = handler(channel, method)
        if reply is not None and not getattr(method, "nowait", False):
            self.send_method(channel.number, reply)

    # ------------------------------------------------------------------------------------------------- channel 0

    def _on_method(self, number: int, payload: bytes) -> None:
        if self.stage == "closing":
            if payload[:4] == b"\x00\x0a\x00\x33" and self._transport is not None:
                self._decoder.stop()
                self._transport.close()
            elif payload[:4] == b"\x00\x0a\x00\x32":
                self.send_method(0, make(Connection.CloseOk))
            return
        method = decode_method(payload)
        step = _STEPS.get((self.stage, type(method)))
        if step is None or number:
            if self.stage != "running":
                self.abort()
                return
            raise Refusal(504, "unexpected method in connection state running")
        self.server.faults.apply(method.name)
        step(self, method)

    def on_update_secret(self, method: Connection.UpdateSecret) -> None:
        """A new password, which RabbitMQ's own users do not have to prove."""
        self.send_method(0, make(Connection.UpdateSecretOk))

    def on_close(self, method: Connection.Close) -> None:
        """The client says goodbye."""
        self.flush()
        self._release()
        self.send_method(0, make(Connection.CloseOk))
        self.flush()
        self._decoder.stop()
        if self._transport is not None:
            self._transport.close()


_STEPS: dict[tuple[str, type[Frame]], Any] = {
    ("start", Connection.StartOk): login.on_start_ok,
    ("tune", Connection.TuneOk): login.on_tune_ok,
    ("open", Connection.Open): login.on_open,
    ("running", Connection.UpdateSecret): Session.on_update_secret,
    ("running", Connection.Close): Session.on_close,
}


def _check_text(method: Frame) -> None:
    for name in method.__slots__:
        value = getattr(method, name)
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                raise Refusal(501, "Malformed UTF-8 in shortstr", class_id=0, method_id=0) from None
