"""Cutting frames: any chunking, the short cuts of deliveries and confirms, and what is refused."""

from __future__ import annotations

import struct
import time
import tracemalloc

import pytest
from pamqp import body as pamqp_body
from pamqp import frame as pamqp_frame

from leveret.exceptions import ProtocolError
from leveret.wire.codec import (
    BASIC_ACK,
    BODY,
    HEADER,
    HEARTBEAT,
    HEARTBEAT_FRAME,
    METHOD,
    PublishEncoder,
    decode_content_header,
    encode_frame,
)
from leveret.wire.decoder import FrameDecoder

FRAME_MAX = 131_072


NO_PROPERTIES = b"\x00\x00"
ROUTE = b"\x02ex\x03key"


class Sink:
    """A channel that keeps what reaches it."""

    def __init__(self, *tags: bytes) -> None:
        self.is_assembling = False
        self.got: list[tuple] = []
        self.acks: list[tuple] = []
        self.on_ack = lambda *ack: self.acks.append(ack)
        self.consumers = {tag: self.collector(tag) for tag in tags}

    def collector(self, tag: bytes):
        return lambda *delivery: self.got.append((tag, *delivery))


class Bench:
    """A decoder, its channel 1, and the frames that took the general path."""

    def __init__(self, frame_max: int | None = FRAME_MAX) -> None:
        self.channel = Sink(b"tag")
        self.frames: list[tuple[int, int, bytes]] = []
        self.channels = {1: self.channel}
        self.decoder = FrameDecoder(lambda *frame: self.frames.append(frame), self.channels)
        if frame_max:
            self.decoder.limit(frame_max)
        self.read(HEARTBEAT_FRAME * 1024)  # fills the buffer of an idle connection, so that it gets that of a busy one
        self.frames.clear()

    def read(self, data: bytes, size: int = 1 << 20) -> None:
        """Read *data* as a socket would, at most *size* bytes each time."""
        while data:
            view = self.decoder.get_buffer()
            count = min(len(view), len(data), size)
            view[:count] = data[:count]
            self.decoder.buffer_updated(count)
            data = data[count:]


def test_the_buffer_is_small_until_a_read_fills_it():
    decoder = FrameDecoder(lambda *_: None, {})
    idle = len(decoder.get_buffer())
    assert idle == 8192
    decoder.feed(HEARTBEAT_FRAME * 1023)
    assert len(decoder.get_buffer()) == idle
    decoder.feed(HEARTBEAT_FRAME * 1024)
    busy = len(decoder.get_buffer())
    assert busy > 64 * 1024
    decoder.feed(HEARTBEAT_FRAME * (busy // 4))
    assert len(decoder.get_buffer()) == busy


@pytest.fixture
def bench() -> Bench:
    return Bench()


def deliver(
    delivery_tag: int,
    body: bytes = b"body",
    *,
    channel: int = 1,
    tag: bytes = b"tag",
    redelivered: bool = False,
    route: bytes = ROUTE,
    properties: bytes = NO_PROPERTIES,
    split: int = FRAME_MAX - 8,
) -> bytes:
    method = b"\x00\x3c\x00\x3c" + bytes((len(tag),)) + tag + struct.pack(">QB", delivery_tag, redelivered) + route
    parts = [
        encode_frame(METHOD, channel, method),
        encode_frame(HEADER, channel, struct.pack(">HHQ", 60, 0, len(body)) + properties),
    ]
    parts += [encode_frame(BODY, channel, body[at : at + split]) for at in range(0, len(body), split)]
    return b"".join(parts)


def delivered(delivery_tag: int, body: bytes = b"body", **differs) -> tuple:
    facts = {"tag": b"tag", "redelivered": False, "route": ROUTE, "properties": NO_PROPERTIES} | differs
    return (facts["tag"], delivery_tag, facts["redelivered"], facts["route"], facts["properties"], body)


def kept(decoder: FrameDecoder) -> int:
    """Bytes of unfinished frames that the decoder holds."""
    big = len(decoder._big) if decoder._big is not None else 0
    return big + sum(map(len, decoder._kept))


@pytest.mark.parametrize("size", [FRAME_MAX - 7, 2**31, 0xFFFF_FFFF])
@pytest.mark.parametrize("kind", [METHOD, HEADER, BODY, HEARTBEAT])
def test_a_frame_over_frame_max_is_refused_on_its_head_and_nothing_is_kept(bench, kind, size):
    with pytest.raises(ProtocolError, match=r"frame of \d+ bytes exceeds frame_max 131072") as caught:
        bench.read(struct.pack(">BHI", kind, 1, size))
    assert caught.value.reply_code == 501
    assert kept(bench.decoder) == 0


def test_the_largest_frame_is_accepted(bench):
    payload = bytes(FRAME_MAX - 8)
    bench.read(encode_frame(BODY, 1, payload))
    assert bench.frames == [(BODY, 1, payload)]


def test_before_tuning_the_limit_is_8_kib():
    bench = Bench(frame_max=None)
    bench.read(encode_frame(METHOD, 0, bytes(8184)))
    assert len(bench.frames) == 1
    with pytest.raises(ProtocolError) as caught:
        bench.read(struct.pack(">BHI", METHOD, 0, 8185))
    assert caught.value.reply_code == 501
    assert kept(bench.decoder) == 0


@pytest.mark.parametrize("kind", [0, 4, 7, 9, ord("A"), ord("H"), 255])
@pytest.mark.parametrize("step", [1, 7, 100])
def test_an_unknown_frame_type_is_refused_on_its_head(bench, kind, step):
    with pytest.raises(ProtocolError, match=f"unknown frame type {kind}") as caught:
        bench.read(struct.pack(">BHI", kind, 1, 4), step)
    assert caught.value.reply_code == 501
    assert kept(bench.decoder) <= 7


@pytest.mark.parametrize("step", [1, 3, 1 << 20])
@pytest.mark.parametrize("size", [0, 10, 8192, 20_000])
def test_a_frame_without_its_end_octet_is_refused(bench, size, step):
    frame = encode_frame(BODY, 1, bytes(size))[:-1] + b"\xcd"
    with pytest.raises(ProtocolError, match="does not end with 0xCE") as caught:
        bench.read(HEARTBEAT_FRAME + frame, step)
    assert caught.value.reply_code == 501
    assert bench.frames == [(HEARTBEAT, 0, b"")]


def test_frames_before_the_bad_one_are_handed_on(bench):
    with pytest.raises(ProtocolError):
        bench.read(deliver(1) + HEARTBEAT_FRAME + b"\x00" * 20)
    assert bench.channel.got == [delivered(1)]
    assert bench.frames == [(HEARTBEAT, 0, b"")]


def test_the_error_carries_at_most_64_of_the_offending_bytes(bench):
    with pytest.raises(ProtocolError) as caught:
        bench.read(b"HTTP/1.1 400 Bad Request\r\n" + b"x" * 5000)
    assert caught.value.data.startswith(b"HTTP/1.1 400")
    assert len(caught.value.data) <= 64


def test_a_peer_that_announces_much_and_sends_little_makes_us_keep_little(bench):
    bench.read(struct.pack(">BHI", BODY, 1, FRAME_MAX - 8) + bytes(100))
    assert kept(bench.decoder) <= FRAME_MAX


def test_an_empty_chunk_changes_nothing(bench):
    data = deliver(1)
    for piece in (b"", data[:9], b"", data[9:], b""):
        bench.decoder.feed(piece)
    bench.read(deliver(2))
    assert bench.channel.got == [delivered(1), delivered(2)]


def test_feed_takes_a_frame_over_8_kib_in_two_pieces(bench):
    data = encode_frame(BODY, 1, bytes(20_000))
    bench.decoder.feed(data[:100])
    bench.decoder.feed(data[100:] + HEARTBEAT_FRAME)
    assert bench.frames == [(BODY, 1, bytes(20_000)), (HEARTBEAT, 0, b"")]


def test_deliveries_alike_but_for_tag_and_body_take_the_short_cut_and_come_out_right(bench):
    bodies = [bytes((index % 256,)) * (1 + index % 200) for index in range(500)]
    bench.decoder.feed(b"".join(deliver(tag, body) for tag, body in enumerate(bodies)))
    assert bench.channel.got == [delivered(tag, body) for tag, body in enumerate(bodies)]
    assert not bench.frames


UNLIKE = {
    "redelivered": {"redelivered": True},
    "route": {"route": b"\x02ex\x03kez"},
    "a longer route": {"route": b"\x02ex\x04keyy"},
    "properties": {"properties": b"\x10\x00\x02"},
    "consumer": {"tag": b"gat"},
    "a longer consumer tag": {"tag": b"longer"},
}


@pytest.mark.parametrize("differs", UNLIKE.values(), ids=UNLIKE)
@pytest.mark.parametrize("before", range(5))
def test_a_delivery_that_differs_is_not_taken_for_one_alike(bench, before, differs):
    for tag in (b"gat", b"longer"):
        bench.channel.consumers[tag] = bench.channel.collector(tag)
    stream = [deliver(tag) for tag in range(before)] + [deliver(77, **differs)] + [deliver(tag) for tag in range(3)]
    bench.read(b"".join(stream))
    expected = [delivered(tag) for tag in range(before)]
    expected += [delivered(77, **differs)]
    expected += [delivered(tag) for tag in range(3)]
    assert bench.channel.got == expected


def test_a_delivery_on_another_channel_is_not_taken_for_one_alike(bench):
    other = bench.channels[2] = Sink(b"tag")
    bench.read(b"".join(deliver(tag, channel=1 + tag // 3 % 2) for tag in range(12)))
    assert [got[1] for got in bench.channel.got] == [0, 1, 2, 6, 7, 8]
    assert [got[1] for got in other.got] == [3, 4, 5, 9, 10, 11]


@pytest.mark.parametrize("size", [0, 1, 16_384 - 9, 16_384 - 8])
def test_a_body_of_any_size_may_follow_ones_alike(size):
    bench = Bench(frame_max=16_384)
    body = bytes(size)
    bench.decoder.feed(deliver(1) + deliver(2) + deliver(3) + deliver(4, body) + deliver(5))
    assert bench.channel.got == [delivered(1), delivered(2), delivered(3), delivered(4, body), delivered(5)]
    assert not bench.frames


@pytest.mark.parametrize("alike", [0, 3])
def test_a_body_in_several_frames_goes_frame_by_frame(bench, alike):
    bench.read(b"".join(deliver(tag) for tag in range(alike)) + deliver(9, b"abcdef", split=2))
    assert [(kind, number) for kind, number, _ in bench.frames] == [(METHOD, 1), (HEADER, 1), *[(BODY, 1)] * 3]
    assert len(bench.channel.got) == alike


@pytest.mark.parametrize("alike", [0, 3])
def test_a_body_frame_over_frame_max_is_refused_after_ones_alike_too(bench, alike):
    size = FRAME_MAX - 7
    data = deliver(9, bytes(size), split=size)
    with pytest.raises(ProtocolError, match="exceeds frame_max"):
        bench.read(b"".join(deliver(tag) for tag in range(alike)) + data)
    assert len(bench.channel.got) == alike


@pytest.mark.parametrize("alike", [0, 3])
@pytest.mark.parametrize("body_size", [3, 5])
def test_a_body_that_is_not_of_the_announced_size_goes_frame_by_frame(bench, alike, body_size):
    data = deliver(9, b"1234")
    wrong = data[: data.index(struct.pack(">BHI", BODY, 1, 4))] + encode_frame(BODY, 1, bytes(body_size))
    bench.read(b"".join(deliver(tag) for tag in range(alike)) + wrong)
    assert [kind for kind, _, _ in bench.frames] == [METHOD, HEADER, BODY]
    assert len(bench.channel.got) == alike


@pytest.mark.parametrize("alike", [0, 1, 2, 3, 4])
def test_a_body_frame_that_nobody_announced_is_handed_on_after_ones_alike_too(bench, alike):
    bench.read(b"".join(deliver(tag) for tag in range(alike)) + deliver(9, b"") + encode_frame(BODY, 1, b""))
    assert bench.channel.got[-1] == delivered(9, b"")
    assert bench.frames == [(BODY, 1, b"")]


def test_an_empty_body_frame_that_pamqp_refuses_is_a_frame(bench):
    frame = encode_frame(BODY, 1, b"")
    with pytest.raises(Exception, match="No frame size"):
        pamqp_frame.unmarshal(frame)
    bench.read(frame)
    assert bench.frames == [(BODY, 1, b"")]
    assert pamqp_frame.marshal(pamqp_body.ContentBody(b""), 1) == frame, "although pamqp writes it"


def confirm(tag: int, bits: int = 0, more: bytes = b"") -> bytes:
    return encode_frame(METHOD, 1, struct.pack(">IQB", BASIC_ACK, tag, bits) + more)


def test_confirms_go_straight_to_who_waits_for_them(bench):
    bench.read(confirm(1) + confirm(2, 1) + deliver(1) + confirm(1 << 63, 0xFE))
    assert bench.channel.acks == [(1, False), (2, True), (1 << 63, False)]
    assert bench.channel.got == [delivered(1)]
    assert bench.frames == []


@pytest.mark.parametrize("why", ["nobody waits", "content is due", "too long", "another channel"])
def test_confirms_out_of_the_ordinary_go_frame_by_frame(bench, why):
    frame = confirm(1, more=b"x" if why == "too long" else b"")
    if why == "nobody waits":
        bench.channel.on_ack = None
    if why == "content is due":
        bench.channel.is_assembling = True
    if why == "another channel":
        del bench.channels[1]
    bench.read(frame)
    assert bench.frames == [(METHOD, 1, frame[7:-1])]
    assert bench.channel.acks == []


@pytest.mark.parametrize("alike", [0, 3])
def test_a_delivery_inside_another_content_goes_frame_by_frame(bench, alike):
    bench.read(b"".join(deliver(tag) for tag in range(alike)))
    bench.channel.is_assembling = True
    bench.read(deliver(9))
    assert [kind for kind, _, _ in bench.frames] == [METHOD, HEADER, BODY]
    assert len(bench.channel.got) == alike


@pytest.mark.parametrize("alike", [0, 3])
def test_a_delivery_for_no_consumer_goes_frame_by_frame(bench, alike):
    bench.read(b"".join(deliver(tag) for tag in range(alike)))
    consumer = bench.channel.consumers.pop(b"tag")
    bench.read(deliver(9))
    assert [kind for kind, _, _ in bench.frames] == [METHOD, HEADER, BODY]
    bench.channel.consumers[b"tag"] = consumer
    bench.read(deliver(10))
    assert bench.channel.got[alike:] == [delivered(10)]


def test_a_consumer_that_took_over_a_tag_gets_the_next_delivery(bench):
    bench.read(deliver(1) + deliver(2) + deliver(3))
    successor: list[tuple] = []
    bench.channel.consumers[b"tag"] = lambda *delivery: successor.append(delivery)
    bench.read(deliver(4))
    assert [got[1] for got in bench.channel.got] == [1, 2, 3]
    assert [got[0] for got in successor] == [4]


def test_a_channel_that_took_over_a_number_gets_the_next_delivery(bench):
    bench.read(deliver(1) + deliver(2) + deliver(3))
    bench.channels[1] = successor = Sink(b"tag")
    bench.channel.consumers.clear()
    bench.read(deliver(4) + deliver(5))
    assert [got[1] for got in successor.got] == [4, 5]
    assert [got[1] for got in bench.channel.got] == [1, 2, 3]


@pytest.mark.parametrize("alike", [0, 1, 2, 3])
def test_a_consumer_may_cancel_itself_in_the_middle_of_a_chunk(bench, alike):
    def on_delivery(*delivery):
        bench.channel.got.append((b"tag", *delivery))
        if len(bench.channel.got) > alike:
            del bench.channel.consumers[b"tag"]

    bench.channel.consumers[b"tag"] = on_delivery
    bench.read(b"".join(deliver(tag) for tag in range(alike + 3)))
    assert [got[1] for got in bench.channel.got] == list(range(alike + 1))
    assert len(bench.frames) == 2 * 3


@pytest.mark.parametrize("alike", [0, 1, 2, 3])
def test_nothing_is_handed_on_after_a_stop_in_the_middle_of_a_chunk(bench, alike):
    def on_delivery(*delivery):
        bench.channel.got.append((b"tag", *delivery))
        if len(bench.channel.got) > alike:
            bench.decoder.stop()

    bench.channel.consumers[b"tag"] = on_delivery
    bench.read(b"".join(deliver(tag) for tag in range(alike + 4)) + HEARTBEAT_FRAME)
    bench.read(deliver(50) + deliver(51) + deliver(52) + HEARTBEAT_FRAME)
    assert [got[1] for got in bench.channel.got] == list(range(alike + 1))
    assert bench.frames == []


def test_nothing_is_handed_on_after_a_stop_inside_a_frame(bench):
    bench.read(HEARTBEAT_FRAME + deliver(1)[:20])
    bench.decoder.stop()
    bench.read(deliver(1)[20:] + deliver(2))
    assert bench.channel.got == []
    assert bench.frames == [(HEARTBEAT, 0, b"")]


def test_nothing_is_handed_on_after_a_stop_inside_a_large_frame(bench):
    data = encode_frame(BODY, 1, bytes(50_000))
    bench.read(data[:20_000])
    bench.decoder.stop()
    bench.read(data[20_000:])
    assert bench.frames == []


def test_after_a_stop_the_large_buffers_are_given_back(bench):
    tracemalloc.start()
    try:
        decoder = FrameDecoder(lambda *_: None, {})
        decoder.limit(131_072)
        decoder.feed(encode_frame(BODY, 1, bytes(50_000))[:40_000])
        kept = tracemalloc.get_traced_memory()[0]
        decoder.stop()
        assert tracemalloc.get_traced_memory()[0] < kept - 150_000
    finally:
        tracemalloc.stop()


def test_after_a_stop_any_bytes_are_ignored(bench):
    bench.decoder.stop()
    bench.read(b"garbage that is no frame at all" * 100)
    assert bench.frames == []


def test_5_mb_byte_by_byte_in_bounded_time(bench):
    body = bytes(range(256)) * 20_000
    data = deliver(1, body)
    began = time.process_time()
    view = bench.decoder.get_buffer
    for index in range(len(data)):
        view()[:1] = data[index : index + 1]
        bench.decoder.buffer_updated(1)
    assert time.process_time() - began < 20
    assert b"".join(payload for kind, _, payload in bench.frames if kind == BODY) == body


def test_small_frames_byte_by_byte_cost_the_same_per_byte(bench):
    def seconds(size: int) -> float:
        data = encode_frame(BODY, 1, bytes(size)) * (160_000 // size)
        began = time.process_time()
        for index in range(len(data)):
            bench.decoder.feed(data[index : index + 1])
        return time.process_time() - began

    seconds(80)
    assert seconds(8000) < 4 * seconds(80) + 0.1


@pytest.mark.parametrize("size", [0, 1, 4087, 4088, 4089, 8175, 8176, 8177, 100_000])
def test_a_body_is_split_so_that_no_frame_exceeds_frame_max(size):
    body = bytes(range(256)) * (size // 256 + 1)
    body = body[:size]
    bench = Bench(8192)
    bench.read(PublishEncoder(1, 4096).encode("ex", "key", True, NO_PROPERTIES, body))
    bodies = [payload for kind, _, payload in bench.frames if kind == BODY]
    assert [len(part) for part in bodies] == [4088] * (size // 4088) + ([size % 4088] if size % 4088 else [])
    assert b"".join(bodies) == body
    assert decode_content_header(bench.frames[1][2]) == (size, NO_PROPERTIES)


@pytest.mark.parametrize("alike", [0, 3])
def test_a_content_header_of_another_class_after_a_deliver_goes_frame_by_frame(bench, alike):
    data = deliver(9).replace(struct.pack(">HHQ", 60, 0, 4), struct.pack(">HHQ", 10, 0, 4))
    bench.read(b"".join(deliver(tag) for tag in range(alike)) + data)
    assert [kind for kind, _, _ in bench.frames] == [METHOD, HEADER, BODY]
    assert len(bench.channel.got) == alike


def test_a_body_size_of_64_bits_is_read_and_nothing_is_allocated(bench):
    size = 2**64 - 1
    data = deliver(1)[: deliver(1).index(struct.pack(">BHI", HEADER, 1, 14))]
    bench.read(data + encode_frame(HEADER, 1, struct.pack(">HHQ", 60, 0, size) + NO_PROPERTIES) + deliver(1)[:30])
    assert decode_content_header(bench.frames[1][2])[0] == size
    assert kept(bench.decoder) < 100
