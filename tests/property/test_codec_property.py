"""The codec against a reader that cuts frame by frame, against pamqp, and against arbitrary bytes.

The decoder has three ways to read a delivery (template, fused, frame by frame). The reference knows only one:
it slices the whole stream with ``int.from_bytes`` and puts contents together as the AMQP specification words it.
"""

from __future__ import annotations

import datetime
import string
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pamqp import body as pamqp_body
from pamqp import frame as pamqp_frame
from pamqp import header as pamqp_header
from pamqp.commands import Basic

from leveret.exceptions import MessageDecodeError, ProtocolError
from leveret.wire.codec import (
    BODY,
    HEADER,
    HEARTBEAT,
    METHOD,
    DecodedProperties,
    Properties,
    PublishEncoder,
    decode_confirm,
    decode_content_header,
    decode_deliver,
    decode_get_ok,
    decode_properties,
    decode_return,
    decode_route,
    encode_ack,
    encode_frame,
    encode_nack,
    encode_properties,
    encode_reject,
)
from leveret.wire.decoder import FrameDecoder

FRAME_MAX = 131_072
TOGGLE = b"\x27\x0f"  # class 9999: the test's own method, which makes a consumer appear or go
NO_PROPERTIES = b"\x00\x00"


# ---------------------------------------------------------------------------------------- both sides of a channel


class Channel:
    """What WireChannel does with frames, in the words of the specification; writes down what happens."""

    def __init__(self, number: int, events: list[object]) -> None:
        self.number = number
        self.events = events
        self.consumers = {}
        self.is_assembling = False
        self._method = None
        self._properties = None
        self._size = 0
        self._body = b""

    def on_ack(self, delivery_tag: int, multiple: bool) -> None:
        self.events.append(("ack", self.number, delivery_tag, multiple))

    def toggle(self, tag: bytes) -> None:
        if self.consumers.pop(tag, None) is None:

            def on_delivery(*delivery):
                self.events.append(("delivery", self.number, tag, *delivery))

            self.consumers[tag] = on_delivery

    def on_frame(self, kind: int, payload: bytes) -> None:
        if kind == METHOD and payload[:4] == b"\x00\x3c\x00\x3c" and not self.is_assembling:
            self._method, self._properties, self.is_assembling = payload, None, True
        elif kind == METHOD and payload[:4] == b"\x00\x3c\x00\x50" and len(payload) == 13 and not self.is_assembling:
            self.on_ack(int.from_bytes(payload[4:12], "big"), bool(payload[12] & 1))
        elif kind == METHOD and payload[:2] == TOGGLE and not self.is_assembling:
            self.toggle(payload[2:])
            self.events.append(("toggle", self.number, payload[2:]))
        elif kind == HEADER and self.is_assembling and self._properties is None:
            self._size, self._properties, self._body = int.from_bytes(payload[4:12], "big"), payload[12:], b""
            self._deliver_when_complete()
        elif kind == BODY and self.is_assembling and self._properties is not None:
            self._body += payload
            self._deliver_when_complete()
        else:
            self.events.append(("frame", kind, self.number, payload))

    def _deliver_when_complete(self) -> None:
        if len(self._body) < self._size:
            return
        self.is_assembling = False
        payload = self._method
        tag = 5 + payload[4]
        on_delivery = self.consumers.get(payload[5:tag])
        if on_delivery is None:
            self.events.append(("for nobody", self.number, payload, self._properties, self._body))
            return
        number, bits, route = int.from_bytes(payload[tag : tag + 8], "big"), payload[tag + 8], payload[tag + 9 :]
        on_delivery(number, bool(bits & 1), route, self._properties, self._body)


class Side:
    """Three channels with a consumer each, and what they saw."""

    def __init__(self) -> None:
        self.events: list[object] = []
        self.channels = {number: Channel(number, self.events) for number in (1, 2, 3)}
        for channel in self.channels.values():
            channel.toggle(b"a")
            channel.toggle(b"another")

    def on_frame(self, kind: int, number: int, payload: bytes) -> None:
        if number in self.channels:
            self.channels[number].on_frame(kind, payload)
        else:
            self.events.append(("frame", kind, number, payload))


def reference(stream: bytes) -> list[object]:
    side = Side()
    pos = 0
    while pos < len(stream):
        size = int.from_bytes(stream[pos + 3 : pos + 7], "big")
        payload = stream[pos + 7 : pos + 7 + size]
        side.on_frame(stream[pos], int.from_bytes(stream[pos + 1 : pos + 3], "big"), payload)
        pos += size + 8
    return side.events


def decoder() -> tuple[FrameDecoder, Side]:
    side = Side()
    made = FrameDecoder(side.on_frame, side.channels)
    made.limit(FRAME_MAX)
    return made, side


def read(made: FrameDecoder, data: bytes) -> None:
    """Read *data* as a socket would, from one call of recv."""
    while data:
        view = made.get_buffer()
        count = min(len(view), len(data))
        view[:count] = data[:count]
        made.buffer_updated(count)
        data = data[count:]


# ------------------------------------------------------------------------------------------------------- streams


def shortstr(value: bytes) -> bytes:
    return bytes((len(value),)) + value


def filler(size: int) -> bytes:
    return (bytes(range(256)) * (size // 256 + 1))[:size]


small_sizes = st.sampled_from([0, 1, 2, 7, 8, 21, 100, 255, 256])
big_sizes = st.sampled_from([4089, 8176, 8184, 8185, 8192, 8193, 9000, 16_384, 40_000, FRAME_MAX - 8])
raw_properties = st.sampled_from(
    [
        NO_PROPERTIES,
        b"\x10\x00\x02",
        b"\x80\x00\x0atext/plain",
        b"\x20\x00\x00\x00\x00\x00",
        encode_properties(Properties(headers={"k": "v" * 300}, message_id="m" * 200)),
    ]
)


@st.composite
def deliveries(draw, sizes):
    """Frames of one delivery, or of a run of deliveries that differ in tag and body only."""
    channel = draw(st.sampled_from([1, 1, 1, 2, 3]))
    consumer = draw(st.sampled_from([b"a", b"a", b"another", b"nobody"]))
    redelivered = draw(st.sampled_from([0, 0, 1]))
    route = draw(st.sampled_from([b"\x00\x01q", b"\x02ex\x03key", b"\x00\x00", b"\x00\xff" + b"k" * 255]))
    properties = draw(raw_properties)
    frames = []
    for tag in draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5)):
        method = b"\x00\x3c\x00\x3c" + shortstr(consumer) + struct.pack(">QB", tag, redelivered) + route
        size = draw(sizes)
        frames.append(encode_frame(METHOD, channel, method))
        frames.append(encode_frame(HEADER, channel, struct.pack(">HHQ", 60, 0, size) + properties))
        left = filler(size)
        while left:
            step = draw(st.sampled_from([size, size, size, size // 2, 1, 0]))
            step = max(step, len(left) - 40_000, 0) if step < 2 else min(step, len(left))
            frames.append(encode_frame(BODY, channel, left[:step]))
            left = left[step:]
    return frames


heartbeats = st.just([encode_frame(HEARTBEAT, 0, b"")])
toggles = st.builds(
    lambda number, tag: [encode_frame(METHOD, number, TOGGLE + tag)],
    st.integers(1, 3),
    st.sampled_from([b"a", b"another", b"nobody"]),
)
confirms = st.builds(
    lambda number, tag, bits, more: [
        encode_frame(METHOD, number, b"\x00\x3c\x00\x50" + struct.pack(">QB", tag, bits) + more)
    ],
    st.integers(1, 4),
    st.integers(0, 2**64 - 1),
    st.integers(0, 255),
    st.sampled_from([b"", b"", b"", b"more"]),
)
others = st.builds(
    lambda number, payload: [encode_frame(METHOD, number, b"\x00\x0a" + payload)],
    st.sampled_from([0, 1, 2, 3, 4, 65_535]),
    st.binary(max_size=30),
)


@st.composite
def streams(draw, sizes=small_sizes):
    """Whole frames of all kinds; another channel's frames and heartbeats may stand inside a content."""
    runs = draw(
        st.lists(st.one_of(deliveries(sizes), deliveries(sizes), confirms, heartbeats, toggles, others), max_size=8)
    )
    frames: list[bytes] = []
    for run in runs:
        if draw(st.integers(0, 3)) == 0 and frames:
            spot = draw(st.integers(0, len(frames)))
            # Only what no channel's content can be disturbed by.
            frames[spot:spot] = [encode_frame(HEARTBEAT, 0, b"")]
        frames += run
    return b"".join(frames)


piece_sizes = st.lists(st.sampled_from([1, 2, 3, 7, 8, 9, 22, 50, 333, 5000, 100_000]), min_size=1, max_size=12)


def cut(stream: bytes, sizes: list[int]) -> list[bytes]:
    """*stream* in pieces of *sizes*, again and again; a large stream is not cut into bytes all the way."""
    if len(stream) > 20_000:
        sizes = [*sizes, 20_000]
    pieces, pos, turn = [], 0, 0
    while pos < len(stream):
        size = sizes[turn % len(sizes)]
        pieces.append(stream[pos : pos + size])
        pos += size
        turn += 1
    return pieces


@given(streams(), piece_sizes)
def test_any_chunking_through_feed_gives_what_the_reference_reads(stream, sizes):
    made, side = decoder()
    for piece in cut(stream, sizes):
        made.feed(piece)
    assert side.events == reference(stream)


@given(streams(), piece_sizes)
def test_any_chunking_through_the_buffer_gives_what_the_reference_reads(stream, sizes):
    made, side = decoder()
    for piece in cut(stream, sizes):
        read(made, piece)
    assert side.events == reference(stream)


@settings(max_examples=60, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])
@given(streams(st.one_of(small_sizes, big_sizes)), piece_sizes)
def test_frames_larger_than_8_kib_through_the_buffer_give_what_the_reference_reads(stream, sizes):
    made, side = decoder()
    for piece in cut(stream, sizes):
        read(made, piece)
    assert side.events == reference(stream)


@settings(max_examples=60, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])
@given(streams(st.one_of(small_sizes, big_sizes)), piece_sizes)
def test_frames_larger_than_8_kib_through_feed_give_what_the_reference_reads(stream, sizes):
    made, side = decoder()
    for piece in cut(stream, sizes):
        made.feed(piece)
    assert side.events == reference(stream)


@given(streams(), st.integers(0))
def test_every_single_cut_gives_the_same_as_no_cut(stream, place):
    whole, whole_side = decoder()
    whole.feed(stream)
    cut = place % (len(stream) + 1)
    made, side = decoder()
    made.feed(stream[:cut])
    made.feed(stream[cut:])
    assert side.events == whole_side.events == reference(stream)


@given(streams().filter(bool), piece_sizes, st.integers(0), st.integers(1, 255))
def test_a_flipped_byte_gives_frames_or_a_protocol_error(stream, sizes, place, bits):
    damaged = bytearray(stream)
    damaged[place % len(stream)] ^= bits
    made, _ = decoder()
    try:
        for piece in cut(bytes(damaged), sizes):
            read(made, piece)
    except ProtocolError as error:
        assert error.reply_code in {501, 502}  # noqa: PT017 - it need not be raised


@given(st.lists(st.binary(max_size=40), max_size=10))
def test_any_bytes_give_frames_or_a_protocol_error(pieces):
    made, _ = decoder()
    try:
        for piece in pieces:
            read(made, piece)
    except ProtocolError as error:
        assert error.reply_code == 501  # noqa: PT017 - it need not be raised


# ----------------------------------------------------------------------------------------------- pamqp as oracle

# What pamqp takes: it checks names against an ASCII pattern.
ascii_names = st.text(string.ascii_letters + string.digits + "-_.:", max_size=40)
texts = st.text(st.characters(codec="utf-8"), max_size=20).filter(lambda text: len(text.encode()) <= 255)
scalars = st.one_of(st.none(), st.booleans(), texts)


def in_order(table):
    """*table* with its keys sorted, as pamqp writes them."""
    return {key: in_order(table[key]) for key in sorted(table)} if isinstance(table, dict) else table


headers = st.dictionaries(
    st.text(string.ascii_letters, min_size=1, max_size=20),
    st.recursive(
        scalars,
        lambda inner: st.lists(scalars, max_size=3) | st.dictionaries(texts, inner, max_size=3).map(in_order),
        max_leaves=5,
    ),
    max_size=4,
).map(in_order)
moments = st.datetimes(datetime.datetime(1970, 1, 1), datetime.datetime(2100, 1, 1)).map(
    lambda moment: moment.replace(microsecond=0, tzinfo=datetime.UTC)
)
maybe_text = st.none() | texts.filter(bool)  # pamqp drops an empty text
wire_properties = st.builds(
    Properties,
    content_type=maybe_text,
    content_encoding=maybe_text,
    headers=st.none() | headers,
    delivery_mode=st.none() | st.sampled_from([1, 2]),
    priority=st.none() | st.integers(0, 255),
    correlation_id=maybe_text,
    reply_to=maybe_text,
    expiration=maybe_text,
    message_id=maybe_text,
    timestamp=st.none() | moments.map(lambda moment: int(moment.timestamp())),
    type=maybe_text,
    user_id=maybe_text,
    app_id=maybe_text,
    cluster_id=st.none(),
)
FIELDS = [name for name in Properties._fields if name != "cluster_id"]


def to_pamqp(properties: Properties) -> Basic.Properties:
    values = {name: getattr(properties, name) for name in FIELDS}
    values["message_type"] = values.pop("type")
    if values["timestamp"] is not None:
        values["timestamp"] = datetime.datetime.fromtimestamp(values["timestamp"], datetime.UTC)
    return Basic.Properties(**values)


def from_pamqp(properties: Basic.Properties) -> Properties:
    values = {name: getattr(properties, "message_type" if name == "type" else name) for name in FIELDS}
    if values["timestamp"] is not None:
        values["timestamp"] = int(values["timestamp"].timestamp())
    return Properties(**values)


@given(wire_properties)
def test_properties_are_the_bytes_that_pamqp_makes(properties):
    assert encode_properties(properties) == to_pamqp(properties).marshal()


@given(wire_properties)
def test_properties_come_back_as_they_were(properties):
    assert decode_properties(encode_properties(properties)) == DecodedProperties(properties, None, None)


@given(wire_properties)
def test_properties_mean_to_leveret_what_they_mean_to_pamqp(properties):
    frame = pamqp_frame.marshal(pamqp_header.ContentHeader(0, 7, to_pamqp(properties)), 1)
    read_back = pamqp_frame.unmarshal(frame)[2]
    size, raw = decode_content_header(frame[7:-1])
    assert size == read_back.body_size
    assert decode_properties(raw).properties == from_pamqp(read_back.properties)


@given(
    st.integers(0, 65_535),
    ascii_names,
    ascii_names,
    st.booleans(),
    wire_properties,
    st.binary(max_size=100),
    st.integers(1, 200),
)
def test_a_publish_is_the_bytes_that_pamqp_makes(channel, exchange, key, mandatory, properties, body, times):
    payload = 4096
    body *= times
    raw = encode_properties(properties)
    expected = pamqp_frame.marshal(Basic.Publish(exchange=exchange, routing_key=key, mandatory=mandatory), channel)
    expected += pamqp_frame.marshal(pamqp_header.ContentHeader(0, len(body), to_pamqp(properties)), channel)
    for start in range(0, len(body), payload):
        expected += pamqp_frame.marshal(pamqp_body.ContentBody(body[start : start + payload]), channel)
    encoder = PublishEncoder(channel, payload + 8)
    assert encoder.encode(exchange, key, mandatory, raw, body) == expected
    assert encoder.encode(exchange, key, mandatory, raw, body) == expected, "the second time, from the cache"


tags = st.integers(0, 2**63 - 1)  # pamqp packs delivery tags as signed
channels = st.integers(0, 65_535)


@given(channels, tags, st.booleans(), st.booleans())
def test_settlements_are_the_bytes_that_pamqp_makes(channel, tag, multiple, requeue):
    assert encode_ack(channel, tag, multiple) == pamqp_frame.marshal(Basic.Ack(tag, multiple), channel)
    assert encode_nack(channel, tag, multiple, requeue) == pamqp_frame.marshal(
        Basic.Nack(tag, multiple, requeue), channel
    )
    assert encode_reject(channel, tag, requeue) == pamqp_frame.marshal(Basic.Reject(tag, requeue), channel)


def payload_of(method) -> bytes:
    return pamqp_frame.marshal(method, 1)[7:-1]


@given(ascii_names, tags, st.booleans(), ascii_names, ascii_names)
def test_a_deliver_means_what_it_means_to_pamqp(consumer, tag, redelivered, exchange, key):
    found = decode_deliver(payload_of(Basic.Deliver(consumer, tag, redelivered, exchange, key)))
    assert (found.consumer_tag, found.delivery_tag, found.redelivered) == (consumer.encode(), tag, redelivered)
    assert decode_route(found.route) == (exchange, key)


@given(tags, st.booleans(), ascii_names, ascii_names, st.integers(0, 2**31 - 1))
def test_a_get_ok_means_what_it_means_to_pamqp(tag, redelivered, exchange, key, count):
    found = decode_get_ok(payload_of(Basic.GetOk(tag, redelivered, exchange, key, count)))
    assert (found.delivery_tag, found.redelivered, found.message_count) == (tag, redelivered, count)
    assert decode_route(found.route) == (exchange, key)


@given(st.integers(0, 32_767), texts, ascii_names, ascii_names)
def test_a_return_means_what_it_means_to_pamqp(code, text, exchange, key):
    found = decode_return(payload_of(Basic.Return(code, text, exchange, key)))
    assert (found.reply_code, found.reply_text) == (code, text)
    assert decode_route(found.route) == (exchange, key)


@given(tags, st.booleans())
def test_a_confirm_means_what_it_means_to_pamqp(tag, multiple):
    assert decode_confirm(payload_of(Basic.Ack(tag, multiple))) == (tag, multiple)
    assert decode_confirm(payload_of(Basic.Nack(tag, multiple))) == (tag, multiple)


utf8_names = st.text(st.characters(codec="utf-8"), max_size=60).filter(lambda text: len(text.encode()) <= 255)


@given(utf8_names, utf8_names, st.booleans())
def test_utf8_names_that_pamqp_refuses_go_out_as_rabbitmq_takes_them(exchange, key, mandatory):
    data = PublishEncoder(1, FRAME_MAX).encode(exchange, key, mandatory, NO_PROPERTIES, b"")
    expected = b"\x00\x3c\x00\x28\x00\x00" + shortstr(exchange.encode()) + shortstr(key.encode()) + bytes((mandatory,))
    assert data[: len(expected) + 8] == encode_frame(METHOD, 1, expected)


@given(st.binary(max_size=255), st.binary(max_size=255))
def test_names_of_any_bytes_survive_decoding_and_encoding(exchange, key):
    texts = decode_route(shortstr(exchange) + shortstr(key))
    data = PublishEncoder(1, FRAME_MAX).encode(*texts, False, NO_PROPERTIES, b"")
    assert shortstr(exchange) + shortstr(key) in data


@given(st.binary(max_size=60), st.binary(max_size=20))
def test_bytes_as_header_values_that_pamqp_refuses_survive(value, other):
    table = {"x": value, "list": [other]}
    with pytest.raises(TypeError):
        Basic.Properties(headers=table).marshal()
    assert decode_properties(encode_properties(Properties(headers=table))).properties.headers == table


@given(st.sampled_from([name for name in FIELDS if name not in {"headers", "delivery_mode", "priority", "timestamp"}]))
def test_an_empty_text_that_pamqp_drops_survives(name):
    properties = Properties(**{name: ""})
    assert to_pamqp(properties).marshal() == NO_PROPERTIES
    assert decode_properties(encode_properties(properties)).properties == properties


@given(st.integers(0, 2**64 - 1))
def test_any_timestamp_that_amqp_can_carry_survives(seconds):
    decoded = decode_properties(encode_properties(Properties(timestamp=seconds)))
    assert decoded == DecodedProperties(Properties(timestamp=seconds), None, None)


# ---------------------------------------------------------------------------------------------------------- fuzz

almost_methods = st.one_of(
    st.binary(max_size=80),
    st.builds(
        lambda head, parts: head + b"".join(parts),
        st.sampled_from([b"\x00\x3c\x00\x3c", b"\x00\x3c\x00\x47", b"\x00\x3c\x00\x32", b"\x00\x3c\x00\x50"]),
        st.lists(st.one_of(st.binary(max_size=9), st.binary(max_size=9).map(shortstr)), max_size=5),
    ),
)


@pytest.mark.parametrize("decode", [decode_deliver, decode_get_ok, decode_return, decode_confirm])
@given(almost_methods)
def test_any_method_payload_decodes_or_is_a_protocol_error(decode, payload):
    try:
        found = decode(payload)
    except ProtocolError as error:
        assert error.reply_code == 502  # noqa: PT017 - it need not be raised
    else:
        if hasattr(found, "route"):
            decode_route(found.route)


@given(st.binary(max_size=40))
def test_any_content_header_decodes_or_is_a_protocol_error(payload):
    try:
        decode_content_header(payload)
    except ProtocolError as error:
        assert error.reply_code in {501, 505}  # noqa: PT017 - it need not be raised


almost_properties = st.one_of(
    st.binary(max_size=120),
    st.builds(lambda flags, rest: struct.pack(">H", flags) + rest, st.integers(0, 65_535), st.binary(max_size=120)),
    st.builds(
        lambda properties, at, byte: bytes(
            byte if index == at else value for index, value in enumerate(encode_properties(properties))
        ),
        wire_properties,
        st.integers(0, 60),
        st.integers(0, 255),
    ),
)


@given(almost_properties)
def test_any_properties_decode_to_values_or_to_an_error_that_is_told(raw):
    found = decode_properties(raw)
    assert isinstance(found.properties, Properties)
    assert found.error is None or isinstance(found.error, MessageDecodeError)
    assert (found.raw_headers is None) or found.error is not None


@given(wire_properties, st.data())
def test_truncated_properties_tell_so_and_keep_what_came_before(properties, data):
    raw = encode_properties(properties)
    cut = data.draw(st.integers(0, len(raw) - 1))
    found = decode_properties(raw[:cut])
    assert isinstance(found.error, MessageDecodeError)
    for value, original in zip(found.properties, properties, strict=True):
        assert value in (None, {}, original)
