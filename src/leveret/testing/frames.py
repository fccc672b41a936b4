"""The broker's side of the hot bytes: reading ``basic.publish`` and acks, writing deliveries and their like. Pure."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from leveret.testing.refusals import NAMES, Refusal, octets
from leveret.wire.codec import (
    BASIC_ACK,
    BASIC_DELIVER,
    BASIC_GET_OK,
    BASIC_PUBLISH,
    BASIC_RETURN,
    BODY,
    FRAME_OVERHEAD,
    HEADER,
    METHOD,
    encode_frame,
)

if TYPE_CHECKING:
    from leveret.exceptions import ProtocolError

PUBLISH: Final = BASIC_PUBLISH.to_bytes(4, "big")
ACK: Final = BASIC_ACK.to_bytes(4, "big")

_pack_head = struct.Struct(">BHI").pack
_pack_method_head = struct.Struct(">BHIIB").pack
_pack_header = struct.Struct(">BHIIQ").pack
_pack_tag = struct.Struct(">QB").pack
_unpack_tag = struct.Struct(">QB").unpack_from


def decode_publish(payload: bytes) -> tuple[bytes, bool, bool]:
    """The route, ``mandatory`` and ``immediate`` of a ``basic.publish``.

    Raises:
        IndexError: the method ends too soon.
    """
    key = 7 + payload[6]
    stop = key + 1 + payload[key]
    bits = payload[stop]
    return payload[6:stop], bool(bits & 1), bool(bits & 2)


def decode_settle(payload: bytes) -> tuple[int, int]:
    """The delivery tag and the bits of a ``basic.ack``, ``nack`` or ``reject``.

    Raises:
        struct.error: the method ends too soon.
    """
    tag, bits = _unpack_tag(payload, 4)
    return tag, bits


def encode_content(channel: int, properties: bytes, body: bytes, frame_max: int) -> bytes:
    """The header frame and the body frames."""
    size = len(body)
    head = _pack_header(HEADER, channel, 12 + len(properties), 60 << 16, size)
    if not size:
        return b"".join((head, properties, b"\xce"))
    step = frame_max - FRAME_OVERHEAD
    if size <= step:
        return b"".join((head, properties, b"\xce", _pack_head(BODY, channel, size), body, b"\xce"))
    parts: list[bytes | memoryview] = [head, properties, b"\xce"]
    view = memoryview(body)
    for start in range(0, size, step):
        part = view[start : start + step]
        parts += (_pack_head(BODY, channel, len(part)), part, b"\xce")
    return b"".join(parts)


def encode_deliver(channel: int, consumer_tag: bytes, delivery_tag: int, redelivered: bool, route: bytes) -> bytes:
    """``basic.deliver``, without its content."""
    size = 14 + len(consumer_tag) + len(route)
    return b"".join(
        (
            _pack_method_head(METHOD, channel, size, BASIC_DELIVER, len(consumer_tag)),
            consumer_tag,
            _pack_tag(delivery_tag, redelivered),
            route,
            b"\xce",
        )
    )


def encode_get_ok(channel: int, delivery_tag: int, redelivered: bool, route: bytes, left: int) -> bytes:
    """``basic.get-ok``, without its content."""
    payload = b"".join(
        (BASIC_GET_OK.to_bytes(4, "big"), _pack_tag(delivery_tag, redelivered), route, left.to_bytes(4, "big"))
    )
    return encode_frame(METHOD, channel, payload)


def encode_return(channel: int, code: int, route: bytes) -> bytes:
    """``basic.return``, without its content."""
    text = NAMES[code].encode()
    payload = b"".join((BASIC_RETURN.to_bytes(4, "big"), code.to_bytes(2, "big"), bytes((len(text),)), text, route))
    return encode_frame(METHOD, channel, payload)


def frame_error(error: ProtocolError, frame_max: int) -> Refusal:
    """What RabbitMQ says of a frame that is none."""
    data: bytes = error.data or b""
    if len(data) < 7:
        return Refusal(501, str(error), class_id=0, method_id=0)
    kind, size = data[0], int.from_bytes(data[3:7], "big")
    if kind not in (1, 2, 3, 8):
        text = f"type {kind}, all octets = {octets(b'')}: unknown_frame"
    elif size > frame_max - FRAME_OVERHEAD:
        text = f"type {kind}, all octets = {octets(b'')}: {{frame_too_large,{size},{frame_max - FRAME_OVERHEAD}}}"
    else:
        end = data[7 + size] if len(data) > 7 + size else 0
        text = f"type {kind}, all octets = {octets(data[7 : 7 + size])}: {{invalid_frame_end_marker,{end}}}"
    return Refusal(501, text, class_id=0, method_id=0)
