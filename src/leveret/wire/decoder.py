"""Cutting frames out of a stream of bytes.

:class:`FrameDecoder` lends its buffer to the socket, cuts what arrived into frames and hands each on. A frame is
refused on its seven-byte head, before anything of it is kept, so a peer can make us buffer ``frame_max`` bytes and no
more.

**Short cuts.** A delivery whose three frames (method, header, body) lie complete in the buffer is parsed in one step
and goes straight to its consumer. When three deliveries in a row have the same properties, and the last two look alike
but for tag and body, their common bytes become a template, and the next one is a single ``unpack`` and three
comparisons. A confirm goes straight to its publisher. What fits none of these goes frame by frame, with the same
result.

Frames: AMQP 0-9-1 §2.3; content: §2.3.5.2.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from leveret.exceptions import ProtocolError
from leveret.wire.codec import (
    BASIC_ACK,
    BASIC_DELIVER,
    BODY,
    FRAME_OVERHEAD,
    HEADER,
    HEARTBEAT,
    METHOD,
    MIN_FRAME_MAX,
    decode_deliver,
)
from leveret.wire.tally import Tally

_READ_SIZE = 98_304
"""Of a connection that has something to read. More would make the C library serve each read from fresh pages, at ten
times the price (measured)."""
_READ_IN_PLACE = 8192
"""A frame that misses more than this is read straight into a buffer of its own."""

_KINDS = frozenset((METHOD, HEADER, BODY, HEARTBEAT))
_DELIVER_BYTES = BASIC_DELIVER.to_bytes(4, "big")
_ACK_BYTES = BASIC_ACK.to_bytes(4, "big")
_ACK_SIZE = 13
"""Bytes of a basic.ack: its class and method, the delivery tag, and the bit that is ``multiple``."""

_unpack_head = struct.Struct(">BHI").unpack_from
_unpack_content = struct.Struct(">BHIIQ").unpack_from
_unpack_tag_and_bits = struct.Struct(">QB").unpack_from
_unpack_u16 = struct.Struct(">H").unpack_from


OnDelivery = Callable[[int, bool, bytes, bytes, bytes], None]
"""What a consumer does with (delivery tag, redelivered, route, raw properties, body)."""


OnAck = Callable[[int, bool], None]
"""What a publisher does with the (delivery tag, multiple) of a confirm."""


class ContentSink(Protocol):
    """What the decoder asks of a channel."""

    consumers: dict[bytes, OnDelivery]
    on_ack: OnAck | None
    """None where confirms are not to come, or not to count any more."""

    @property
    def is_assembling(self) -> bool:
        """Whether a method or header came whose content is not complete."""
        ...


class _Template(NamedTuple):
    unpack: Callable[[bytes, int], tuple[Any, ...]]
    length: int
    before_tag: bytes
    before_size: bytes
    before_length: bytes
    channel: ContentSink
    consumer_tag: bytes
    redelivered: bool
    route: bytes
    properties: bytes


class FrameDecoder:
    """Cuts a byte stream into frames, for any chunking of it.

    The socket reads into :meth:`get_buffer` and tells :meth:`buffer_updated`; bytes from elsewhere come in
    through :meth:`feed`. Deliveries go straight to the consumers in *channels*, and confirms to whoever waits for
    them there; every other frame goes to *on_frame* as (type, channel number, payload). *tally* counts the former.
    """

    __slots__ = (
        "_big",
        "_big_have",
        "_big_need",
        "_channels",
        "_frame_max",
        "_have",
        "_is_stopped",
        "_kept",
        "_last_properties",
        "_last_shape",
        "_need",
        "_on_frame",
        "_read_view",
        "_tally",
        "_template",
    )

    def __init__(
        self,
        on_frame: Callable[[int, int, bytes], None],
        channels: Mapping[int, ContentSink],
        tally: Tally | None = None,
    ) -> None:
        self._on_frame = on_frame
        self._tally = tally or Tally()
        self._channels: Mapping[int, ContentSink] = channels
        self._frame_max = MIN_FRAME_MAX
        self._read_view = memoryview(bytearray(MIN_FRAME_MAX))
        # An unfinished frame: small ones as the chunks that came, large ones in a buffer of their own.
        self._kept: list[bytes] = []
        self._have = self._need = 0
        self._big: memoryview | None = None
        self._big_have = self._big_need = 0
        self._template: _Template | None = None
        self._is_stopped = False
        self._last_properties = b""
        self._last_shape: tuple[bytes, bytes, bytes] | None = None

    def limit(self, frame_max: int) -> None:
        """Accept frames up to *frame_max*, as tuned; until then it is 8 KiB."""
        self._frame_max = frame_max

    def stop(self) -> None:
        """Drop what is buffered and ignore what still comes."""
        self._is_stopped = True
        # The buffers go now, not when the garbage collector comes to the transport: the next one gets the same memory.
        self._read_view = memoryview(bytearray(MIN_FRAME_MAX))
        self._big = None
        self._on_frame = _ignore_frame
        self._channels = {}
        self._template = None
        self._kept.clear()
        self._big_need = 0

    def get_buffer(self, sizehint: int = -1) -> memoryview:
        """Where the socket may write; how much the event loop would like makes no difference."""
        if self._big_need:
            assert self._big is not None
            return self._big[self._big_have : self._big_need]
        return self._read_view

    def buffer_updated(self, count: int) -> None:
        """*count* bytes were written into what :meth:`get_buffer` gave: cut them.

        Raises:
            ProtocolError: a frame that is none.
        """
        if self._is_stopped:
            return
        if self._big_need:
            self._on_big(count)
            return
        data = bytes(self._read_view[:count])
        if count == len(self._read_view) < _READ_SIZE:  # it was idle, and is no longer
            self._read_view = memoryview(bytearray(_READ_SIZE))
        if self._kept:
            self._kept.append(data)
            self._have += len(data)
            if self._have < self._need:
                return
            data = b"".join(self._kept)
            self._kept.clear()
        pos, end, delivered = 0, len(data), 0
        try:
            while end - pos >= FRAME_OVERHEAD and not self._is_stopped:
                template = self._template
                if template is not None and end - pos > template.length:
                    after = self._deliver_alike(template, data, pos, end)
                    if after:
                        pos = after
                        delivered += 1
                        continue
                kind, number, size = _unpack_head(data, pos)
                if size > self._frame_max - FRAME_OVERHEAD or kind not in _KINDS:
                    raise self._bad_head(data[pos:])
                stop = pos + size + FRAME_OVERHEAD
                if stop > end:
                    break
                if data[stop - 1] != 0xCE:
                    raise _bad_end(data[pos : pos + 64])
                if kind == METHOD:
                    method_id = data[pos + 7 : pos + 11]
                    if method_id == _DELIVER_BYTES:
                        after = self._deliver(data, pos, stop, end)
                        if after:
                            pos = after
                            delivered += 1
                            continue
                    elif method_id == _ACK_BYTES and size == _ACK_SIZE:
                        channel = self._channels.get(number)
                        if channel is not None and channel.on_ack is not None and not channel.is_assembling:
                            delivery_tag, bits = _unpack_tag_and_bits(data, pos + 11)
                            pos = stop
                            channel.on_ack(delivery_tag, bool(bits & 1))
                            continue
                self._on_frame(kind, number, data[pos + 7 : stop - 1])
                pos = stop
        finally:
            self._tally.delivered += delivered
        if pos < end and not self._is_stopped:
            self._keep(data[pos:] if pos else data)

    def feed(self, data: bytes) -> None:
        """Cut *data*, which follows what came before.

        Raises:
            ProtocolError: a frame that is none.
        """
        while data:
            view = self.get_buffer()
            count = min(len(view), len(data))
            view[:count] = data[:count]
            self.buffer_updated(count)
            data = data[count:]

    def _on_big(self, count: int) -> None:
        """There are *count* more bytes of the frame that has a buffer of its own."""
        self._big_have += count
        if self._big_have == self._big_need:
            assert self._big is not None
            stop, self._big_need = self._big_need, 0
            frame = self._big[:stop]
            if frame[stop - 1] != 0xCE:
                raise _bad_end(bytes(frame[:64]))
            kind, number, _ = _unpack_head(frame)
            self._on_frame(kind, number, bytes(frame[7 : stop - 1]))

    def _keep(self, data: bytes) -> None:
        """Hold the beginning of a frame until the rest is here."""
        have = len(data)
        need = 7
        if have >= 7:
            kind, _, size = _unpack_head(data)
            if size > self._frame_max - FRAME_OVERHEAD or kind not in _KINDS:
                raise self._bad_head(data)
            need = size + FRAME_OVERHEAD
        if need - have > _READ_IN_PLACE:
            if self._big is None or len(self._big) < need:
                self._big = memoryview(bytearray(self._frame_max))
            self._big[:have] = data
            self._big_have, self._big_need = have, need
        else:
            self._kept.append(data)
            self._have, self._need = have, need

    def _bad_head(self, data: bytes) -> ProtocolError:
        kind, _, size = _unpack_head(data)
        if kind not in _KINDS:
            return ProtocolError(f"unknown frame type {kind}", reply_code=501, data=data)
        return ProtocolError(
            f"frame of {size + FRAME_OVERHEAD} bytes exceeds frame_max {self._frame_max}", reply_code=501, data=data
        )

    def _deliver_alike(self, template: _Template, data: bytes, pos: int, end: int) -> int:
        """Deliver what matches *template*; the position after it, or 0."""
        unpack, length, before_tag, before_size, before_length, channel, tag, redelivered, route, properties = template
        head, delivery_tag, middle, body_size, tail, body_length = unpack(data, pos)
        stop: int = pos + length + body_length + 1
        if (
            head != before_tag
            or middle != before_size
            or tail != before_length
            or body_size != body_length
            or not body_length
            or stop > end
            or data[stop - 1] != 0xCE
            or body_length > self._frame_max - FRAME_OVERHEAD
            or channel.is_assembling
        ):
            return 0
        on_delivery = channel.consumers.get(tag)
        if on_delivery is None:
            return 0
        on_delivery(delivery_tag, redelivered, route, properties, data[pos + length : stop - 1])
        return stop

    def _deliver(self, data: bytes, pos: int, stop: int, end: int) -> int:
        """Deliver a message whose three frames are here and in order; the position after it, or 0.

        Anything out of the ordinary is left to the frame-by-frame path, which names what is wrong with it.
        """
        if end - stop < 22:
            return 0
        number = _unpack_u16(data, pos + 1)[0]
        kind, header_number, header_size, class_and_weight, body_size = _unpack_content(data, stop)
        header_stop: int = stop + header_size + FRAME_OVERHEAD
        if (
            kind != HEADER
            or header_number != number
            or class_and_weight != 60 << 16
            or not 14 <= header_size <= self._frame_max - FRAME_OVERHEAD
            or header_stop > end
            or data[header_stop - 1] != 0xCE
        ):
            return 0
        after = header_stop
        if body_size:
            if body_size > self._frame_max - FRAME_OVERHEAD:
                return 0
            after += body_size + FRAME_OVERHEAD
            if after > end or _unpack_head(data, header_stop) != (BODY, number, body_size) or data[after - 1] != 0xCE:
                return 0
        channel = self._channels.get(number)
        if channel is None or channel.is_assembling:
            return 0
        try:
            consumer_tag, delivery_tag, redelivered, route = decode_deliver(data[pos + 7 : stop - 1])
        except ProtocolError:
            return 0
        on_delivery = channel.consumers.get(consumer_tag)
        if on_delivery is None:
            return 0
        properties = data[stop + 19 : header_stop - 1]
        body = data[header_stop + 7 : after - 1] if body_size else b""
        on_delivery(delivery_tag, redelivered, route, properties, body)
        if properties != self._last_properties:
            self._last_properties = properties
        elif body_size and not self._is_stopped:
            at_tag = pos + 12 + len(consumer_tag)
            shape = (data[pos:at_tag], data[at_tag + 8 : stop + 11], data[stop + 19 : header_stop + 3])
            if shape == self._last_shape:
                layout = struct.Struct(">{}sQ{}sQ{}sI".format(*map(len, shape)))
                self._template = _Template(
                    layout.unpack_from, layout.size, *shape, channel, consumer_tag, redelivered, route, properties
                )
            else:
                self._last_shape = shape
        return after


def _bad_end(data: bytes) -> ProtocolError:
    return ProtocolError("a frame does not end with 0xCE", reply_code=501, data=data)


def _ignore_frame(kind: int, channel: int, payload: bytes) -> None:
    """What a stopped decoder does with a frame."""
