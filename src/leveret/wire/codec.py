"""Hot bytes: the methods that move messages, and what goes with them.

Everything that happens once per message is written by hand here, with ``struct``; the rest of the protocol
goes through pamqp (:mod:`leveret.wire.methods`), which is also the oracle of the tests.

**Writing.** A publish is one ``bytes``: method, header and body frames. Its head repeats from message to
message, so heads are kept per (exchange, routing key, mandatory, properties, size). Where a message has something
of its own, such as a correlation id, what is around that is kept, and its head is put together.

Frames: AMQP 0-9-1 §2.3; content: §2.3.5.2; methods of class basic: §1.8.3 of the reference.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Final, NamedTuple

from leveret.exceptions import MessageDecodeError, MessageTooLarge, ProtocolError
from leveret.types import FieldValue
from leveret.wire.tables import decode_table, encode_table

METHOD: Final = 1
HEADER: Final = 2
BODY: Final = 3
HEARTBEAT: Final = 8
FRAME_END: Final = b"\xce"
FRAME_OVERHEAD: Final = 8
"""Octets of a frame around its payload: type, channel, size, end. ``frame_max`` counts them."""
MIN_FRAME_MAX: Final = 8192
"""The limit before tuning, and the least that RabbitMQ 4.3 accepts."""

HEARTBEAT_FRAME: Final = b"\x08\x00\x00\x00\x00\x00\x00\xce"

BASIC_PUBLISH: Final = 60 << 16 | 40
BASIC_RETURN: Final = 60 << 16 | 50
BASIC_DELIVER: Final = 60 << 16 | 60
BASIC_GET_OK: Final = 60 << 16 | 71
BASIC_ACK: Final = 60 << 16 | 80
BASIC_REJECT: Final = 60 << 16 | 90
BASIC_NACK: Final = 60 << 16 | 120

_CACHE_SIZE = 2048
_CACHED_PROPERTIES = 1024
"""Heads with larger properties are seldom alike, and would fill the memory."""

_unpack_tag_and_bits = struct.Struct(">QB").unpack_from
_unpack_u16 = struct.Struct(">H").unpack_from
_unpack_u32 = struct.Struct(">I").unpack_from
_unpack_u64 = struct.Struct(">Q").unpack_from
_pack_head = struct.Struct(">BHI").pack
_pack_method_head = struct.Struct(">BHII").pack
_pack_header_head = struct.Struct(">BHIIQ").pack
_pack_tag_method = struct.Struct(">BHIIQBB").pack
_pack_u16 = struct.Struct(">H").pack
_pack_u64 = struct.Struct(">Q").pack


# --------------------------------------------------------------------------------------------- short strings


def encode_shortstr(value: str, what: str) -> bytes:
    """*value* as a short string; *what* names it in the error.

    Names that came from the wire as bad UTF-8 carry surrogates and go back as the bytes they were.

    Raises:
        TypeError: not a str.
        ValueError: longer than 255 bytes of UTF-8.
    """
    try:
        data = value.encode()
    except UnicodeEncodeError:
        data = value.encode("utf-8", "surrogateescape")
    except AttributeError:
        raise TypeError(f"{what} must be str, not {type(value).__name__}: {value!r}") from None
    if len(data) > 255:
        raise ValueError(f"{what} is {len(data)} bytes of UTF-8; AMQP allows 255: {value[:40]!r}…")
    return bytes((len(data),)) + data


def encode_tag(consumer_tag: str) -> bytes:
    """*consumer_tag* as it stands in a delivery; bad UTF-8 as in :func:`encode_shortstr`."""
    return consumer_tag.encode("utf-8", "surrogateescape")


def decode_route(route: bytes) -> tuple[str, str]:
    """Exchange and routing key of the two short strings in *route*."""
    key = 1 + route[0]
    return (
        route[1:key].decode("utf-8", "surrogateescape"),
        route[key + 1 : key + 1 + route[key]].decode("utf-8", "surrogateescape"),
    )


# ------------------------------------------------------------------------------------------------ properties


class Properties(NamedTuple):
    """The properties of class basic in the order of their flags, with the values that the wire has."""

    content_type: str | None = None
    content_encoding: str | None = None
    headers: Mapping[str, FieldValue] | None = None
    delivery_mode: int | None = None
    priority: int | None = None
    correlation_id: str | None = None
    reply_to: str | None = None
    expiration: Any = None  # milliseconds as text on the wire; a Message keeps what the user gave
    message_id: str | None = None
    timestamp: Any = None  # whole seconds since 1970 on the wire; a Message keeps a datetime
    type: str | None = None
    user_id: str | None = None
    app_id: str | None = None
    cluster_id: str | None = None


make_properties: Callable[[Iterable[Any]], Properties] = partial(tuple.__new__, Properties)  # pyright: ignore[reportUnknownMemberType]
"""Properties of all its values, which is what costs least."""

_OCTETS = {"delivery_mode", "priority"}
_FLAGS: tuple[tuple[int, str], ...] = tuple((0x8000 >> i, name) for i, name in enumerate(Properties._fields))
_HEADERS, _CORRELATION_ID, _MESSAGE_ID, _TIMESTAMP = 0x2000, 0x0400, 0x0080, 0x0040
"""Flags of what often differs from message to message; the others lie in four runs around them."""
_ITS_OWN = _CORRELATION_ID | _MESSAGE_ID | _TIMESTAMP
"""Flags of what seldom comes twice: a head with one of these is not kept."""
_RUNS = _FLAGS[:2], _FLAGS[3:5], _FLAGS[6:8], _FLAGS[10:]

_properties_cache: dict[Properties, bytes] = {}
_runs_cache: dict[tuple[Any, ...], tuple[int, bytes, bytes, bytes, bytes]] = {}


def encode_properties(properties: Properties) -> bytes:
    """Flags and values as they stand in a content header.

    Raises:
        ValueError, TypeError: a value that AMQP cannot carry, named.
    """
    if (
        properties.headers is None
        and properties.correlation_id is None
        and properties.message_id is None
        and properties.timestamp is None
    ):
        cached = _properties_cache.get(properties)
        if cached is None:
            if len(_properties_cache) >= _CACHE_SIZE:
                _properties_cache.clear()
            cached = _properties_cache[properties] = _encode_properties(properties)
        return cached
    return _encode_properties(properties)


def _encode_properties(properties: Properties) -> bytes:
    runs = properties[:2], properties[3:5], properties[6:8], properties[10:]
    encoded = _runs_cache.get(runs)
    if encoded is None:
        if len(_runs_cache) >= _CACHE_SIZE:
            _runs_cache.clear()
        encoded = _runs_cache[runs] = _encode_runs(runs)
    flags, first, second, third, fourth = encoded
    headers = correlation_id = message_id = timestamp = b""
    if properties.headers is not None:
        flags |= _HEADERS
        headers = encode_table(properties.headers)
    if properties.correlation_id is not None:
        flags |= _CORRELATION_ID
        correlation_id = encode_shortstr(properties.correlation_id, "correlation_id")
    if properties.message_id is not None:
        flags |= _MESSAGE_ID
        message_id = encode_shortstr(properties.message_id, "message_id")
    if (seconds := properties.timestamp) is not None:
        if not 0 <= seconds < 1 << 64:
            raise ValueError(f"timestamp must be from 0 to 2**64-1 seconds since 1970, not {seconds}")
        flags |= _TIMESTAMP
        timestamp = _pack_u64(seconds)
    return b"".join((_pack_u16(flags), first, headers, second, correlation_id, third, message_id, timestamp, fourth))


def _encode_runs(runs: tuple[tuple[Any, ...], ...]) -> tuple[int, bytes, bytes, bytes, bytes]:
    flags = 0
    encoded: list[bytes] = []
    for fields, values in zip(_RUNS, runs, strict=True):
        run = b""
        for (flag, name), value in zip(fields, values, strict=True):
            if value is None:
                continue
            flags |= flag
            if name not in _OCTETS:
                run += encode_shortstr(value, name)
            elif 0 <= value <= 255:
                run += bytes((value,))
            else:
                raise ValueError(f"{name} must be from 0 to 255, not {value}")
        encoded.append(run)
    first, second, third, fourth = encoded
    return flags, first, second, third, fourth


class DecodedProperties(NamedTuple):
    """What could be read of a content header's properties."""

    properties: Properties
    error: MessageDecodeError | None
    raw_headers: bytes | None


_plans: dict[int, tuple[tuple[int, str | None], ...]] = {}
"""By flags, the fields that are there: index, and the name of one that is no short string."""


def decode_properties(raw: bytes) -> DecodedProperties:
    """Read flags and values; never raises.

    One message's bad headers are that message's trouble: they come back empty, with the error and their
    bytes, and the properties around them are read all the same.
    """
    values: list[Any] = [None] * 14
    error: MessageDecodeError | None = None
    raw_headers: bytes | None = None
    pos = 2
    try:
        flags = _unpack_u16(raw)[0]
        if flags & 3:
            raise MessageDecodeError(f"undefined property flags {flags:#06x}")
        plan = _plans.get(flags)
        if plan is None:
            plan = _plans[flags] = _plan(flags)
        size = len(raw)
        for index, name in plan:
            if name is None:
                start = pos + 1
                pos = start + raw[pos]
                if pos > size:
                    raise MessageDecodeError(f"{Properties._fields[index]} is longer than its frame")
                text = raw[start:pos]
                try:
                    values[index] = text.decode()
                except UnicodeDecodeError:
                    values[index] = text.decode("utf-8", "surrogateescape")
            elif name == "headers":
                stop = pos + 4 + _unpack_u32(raw, pos)[0]
                if stop > size:
                    values[index], raw_headers = {}, raw[pos:]
                    raise MessageDecodeError("the header table is longer than its frame")
                try:
                    values[index] = decode_table(raw, pos)[0]
                except MessageDecodeError as exc:
                    values[index], error, raw_headers = {}, exc, raw[pos:stop]
                pos = stop
            elif name in _OCTETS:
                values[index] = raw[pos]
                pos += 1
            else:
                values[index] = _unpack_u64(raw, pos)[0]
                pos += 8
    except MessageDecodeError as exc:
        error = exc
    except (struct.error, IndexError):
        error = MessageDecodeError("the properties end too soon")
    return _make_decoded((make_properties(values), error, raw_headers))


_make_decoded: Callable[[tuple[Any, ...]], DecodedProperties] = partial(tuple.__new__, DecodedProperties)  # pyright: ignore[reportUnknownMemberType]


def _plan(flags: int) -> tuple[tuple[int, str | None], ...]:
    others = {"headers", "timestamp", *_OCTETS}
    return tuple((i, name if name in others else None) for i, (flag, name) in enumerate(_FLAGS) if flags & flag)


# --------------------------------------------------------------------------------------------------- writing


def encode_frame(kind: int, channel: int, payload: bytes) -> bytes:
    """One frame."""
    return _pack_head(kind, channel, len(payload)) + payload + FRAME_END


def encode_ack(channel: int, delivery_tag: int, multiple: bool) -> bytes:
    """``basic.ack``"""
    return _pack_tag_method(METHOD, channel, 13, BASIC_ACK, delivery_tag, multiple, 0xCE)


def encode_nack(channel: int, delivery_tag: int, multiple: bool, requeue: bool) -> bytes:
    """``basic.nack``"""
    return _pack_tag_method(METHOD, channel, 13, BASIC_NACK, delivery_tag, multiple | requeue << 1, 0xCE)


def encode_reject(channel: int, delivery_tag: int, requeue: bool) -> bytes:
    """``basic.reject``"""
    return _pack_tag_method(METHOD, channel, 13, BASIC_REJECT, delivery_tag, requeue, 0xCE)


_routes: dict[tuple[str, str, bool], bytes] = {}


def _encode_route(exchange: str, routing_key: str, mandatory: bool) -> bytes:
    """The arguments of ``basic.publish``."""
    route = _routes.get((exchange, routing_key, mandatory))
    if route is None:
        if len(_routes) >= _CACHE_SIZE:
            _routes.clear()
        names = encode_shortstr(exchange, "exchange name") + encode_shortstr(routing_key, "routing key")
        route = _routes[exchange, routing_key, mandatory] = b"\0\0" + names + (b"\1" if mandatory else b"\0")
    return route


class PublishEncoder:
    """``basic.publish`` with its content, for one channel."""

    __slots__ = ("_channel", "_heads", "_max_payload")

    def __init__(self, channel: int, frame_max: int) -> None:
        self._channel = channel
        self._max_payload = frame_max - FRAME_OVERHEAD
        self._heads: dict[tuple[str, str, bool, bytes, int], bytes] = {}

    def encode(self, exchange: str, routing_key: str, mandatory: bool, properties: bytes, body: bytes) -> bytes:
        """Method, header and body frames of one message.

        Raises:
            ValueError: exchange or routing key over 255 bytes.
            MessageTooLarge: the properties do not fit into one frame (a content header cannot be split).
        """
        size = len(body)
        key = (exchange, routing_key, mandatory, properties, size)
        head = self._heads.get(key)
        if head is None:
            head = self._encode_head(*key)
            if not _unpack_u16(properties)[0] & _ITS_OWN and len(properties) <= _CACHED_PROPERTIES:
                if len(self._heads) >= _CACHE_SIZE:
                    self._heads.clear()
                self._heads[key] = head
        if size == 0:
            return head
        if size <= self._max_payload:
            return b"".join((head, body, FRAME_END))
        return self._encode_split(head, memoryview(body))

    def _encode_head(self, exchange: str, routing_key: str, mandatory: bool, properties: bytes, size: int) -> bytes:
        """All that stands before the body, the head of its first frame included."""
        header_size = 12 + len(properties)
        if header_size > self._max_payload:
            raise MessageTooLarge(
                f"properties and headers are {len(properties)} bytes and must fit into one frame "
                f"of {self._max_payload} (frame_max): put large values into the body"
            )
        route = _encode_route(exchange, routing_key, mandatory)
        channel = self._channel
        return b"".join(
            (
                _pack_method_head(METHOD, channel, 4 + len(route), BASIC_PUBLISH),
                route,
                FRAME_END,
                _pack_header_head(HEADER, channel, header_size, 60 << 16, size),
                properties,
                FRAME_END,
                _pack_head(BODY, channel, min(size, self._max_payload)) if size else b"",
            )
        )

    def _encode_split(self, head: bytes, body: memoryview) -> bytes:
        step = self._max_payload
        parts: list[bytes | memoryview] = [head, body[:step], FRAME_END]
        for start in range(step, len(body), step):
            part = body[start : start + step]
            parts += (_pack_head(BODY, self._channel, len(part)), part, FRAME_END)
        return b"".join(parts)


# ------------------------------------------------------------------------------- reading: methods and headers


class Deliver(NamedTuple):
    """``basic.deliver``; *route* is exchange and routing key, still encoded."""

    consumer_tag: bytes
    delivery_tag: int
    redelivered: bool
    route: bytes


_make_deliver: Callable[[tuple[Any, ...]], Deliver] = partial(tuple.__new__, Deliver)  # pyright: ignore[reportUnknownMemberType]


class GetOk(NamedTuple):
    """``basic.get-ok``"""

    delivery_tag: int
    redelivered: bool
    route: bytes
    message_count: int


class Return(NamedTuple):
    """``basic.return``"""

    reply_code: int
    reply_text: str
    route: bytes


def _truncated(method: str, payload: bytes) -> ProtocolError:
    return ProtocolError(f"{method} ends too soon", reply_code=502, data=payload)


def _end_of_route(payload: bytes, start: int) -> int:
    """Where the two short strings at *start* end; IndexError beyond the payload."""
    key = start + 1 + payload[start]
    stop = key + 1 + payload[key]
    if stop > len(payload):
        raise IndexError
    return stop


def decode_deliver(payload: bytes) -> Deliver:
    """Read a method frame's payload.

    Raises:
        ProtocolError: truncated.
    """
    try:
        tag = 5 + payload[4]
        delivery_tag, redelivered = _unpack_tag_and_bits(payload, tag)
        route = payload[tag + 9 : _end_of_route(payload, tag + 9)]
    except (struct.error, IndexError):
        raise _truncated("basic.deliver", payload) from None
    return _make_deliver((payload[5:tag], delivery_tag, bool(redelivered & 1), route))


def decode_get_ok(payload: bytes) -> GetOk:
    """Read a method frame's payload.

    Raises:
        ProtocolError: truncated.
    """
    try:
        delivery_tag, redelivered = _unpack_tag_and_bits(payload, 4)
        stop = _end_of_route(payload, 13)
        return GetOk(delivery_tag, bool(redelivered & 1), payload[13:stop], _unpack_u32(payload, stop)[0])
    except (struct.error, IndexError):
        raise _truncated("basic.get-ok", payload) from None


def decode_return(payload: bytes) -> Return:
    """Read a method frame's payload.

    Raises:
        ProtocolError: truncated.
    """
    try:
        route = 7 + payload[6]
        text = payload[7:route].decode("utf-8", "replace")
        return Return(_unpack_u16(payload, 4)[0], text, payload[route : _end_of_route(payload, route)])
    except (struct.error, IndexError):
        raise _truncated("basic.return", payload) from None


def decode_confirm(payload: bytes) -> tuple[int, bool]:
    """Delivery tag and ``multiple`` of the broker's ``basic.ack`` or ``basic.nack``.

    Raises:
        ProtocolError: truncated.
    """
    try:
        delivery_tag, bits = _unpack_tag_and_bits(payload, 4)
    except struct.error:
        raise _truncated("basic.ack or basic.nack", payload) from None
    return delivery_tag, bool(bits & 1)


def decode_content_header(payload: bytes) -> tuple[int, bytes]:
    """Body size and raw properties of a header frame's payload.

    Raises:
        ProtocolError: truncated, or not of class basic.
    """
    if len(payload) < 14:
        raise ProtocolError("the content header ends too soon", reply_code=501, data=payload)
    class_id = _unpack_u16(payload)[0]
    if class_id != 60:
        raise ProtocolError(f"content header of class {class_id}, not 60 (basic)", reply_code=505, data=payload)
    return _unpack_u64(payload, 4)[0], payload[12:]
