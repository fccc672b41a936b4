"""The codec by example: what is refused, what is kept, and what is read of malformed bytes."""

from __future__ import annotations

import struct
import sys
import time
import tracemalloc

import pytest
from pamqp.commands import Basic

from leveret.exceptions import MessageDecodeError, MessageTooLarge, ProtocolError
from leveret.wire.codec import (
    Properties,
    PublishEncoder,
    decode_content_header,
    decode_deliver,
    decode_properties,
    decode_return,
    decode_route,
    encode_properties,
    encode_shortstr,
)

FRAME_MAX = 131_072
NO_PROPERTIES = b"\x00\x00"
ROUTE = b"\x02ex\x03key"


def test_properties_with_three_headers_decode_in_20_microseconds():
    raw = encode_properties(
        Properties(
            content_type="application/json",
            delivery_mode=2,
            correlation_id="0123456789abcdef",
            headers={"trace": "00-4bf92f3577b34da6a3ce929d0e0e4736-00", "attempt": 3, "x-death": None},
        )
    )

    def seconds() -> float:
        began = time.perf_counter()
        for _ in range(1000):
            decode_properties(raw)
        return time.perf_counter() - began

    assert min(seconds() for _ in range(20)) < 1000 * 20e-6


def test_120_000_voids_in_the_headers_decode_in_30_milliseconds():
    table = b"".join(b"\x01aA" + struct.pack(">I", 120_000) + b"V" * 120_000 for _ in range(1))
    raw = b"\x20\x00" + struct.pack(">I", len(table)) + table

    def seconds() -> float:
        began = time.process_time()
        assert decode_properties(raw).error is None
        return time.process_time() - began

    assert min(seconds() for _ in range(5)) < (0.1 if sys.flags.dev_mode else 0.03)  # -X dev checks every allocation


def test_encoding_a_publish_again_gives_equal_bytes_whatever_else_was_published():
    encoder = PublishEncoder(1, FRAME_MAX)
    first = encoder.encode("ex", "key", True, NO_PROPERTIES, b"body")
    for index in range(5000):
        encoder.encode("ex", f"key{index}", bool(index % 2), NO_PROPERTIES, b"x" * (index % 7))
    assert encoder.encode("ex", "key", True, NO_PROPERTIES, b"body") == first
    assert encoder.encode("ex", "key", False, NO_PROPERTIES, b"body") != first


def test_headers_that_do_not_fit_into_a_frame_are_refused_with_what_to_do():
    encoder = PublishEncoder(1, 8192)
    fits = NO_PROPERTIES + bytes(8192 - 8 - 12 - 2)
    encoder.encode("", "key", True, fits, b"")
    with pytest.raises(MessageTooLarge, match="put large values into the body"):
        encoder.encode("", "key", True, fits + b"x", b"")


@pytest.mark.parametrize("what", ["exchange name", "routing key"])
def test_a_name_over_255_bytes_of_utf8_is_refused_and_named(what):
    names = {"exchange name": "ex", "routing key": "key", what: "é" * 128}
    with pytest.raises(ValueError, match=f"{what} is 256 bytes"):
        PublishEncoder(1, FRAME_MAX).encode(*names.values(), True, NO_PROPERTIES, b"")
    names[what] = "é" * 127
    PublishEncoder(1, FRAME_MAX).encode(*names.values(), True, NO_PROPERTIES, b"")


@pytest.mark.parametrize("value", [None, 5, b"bytes"])
def test_a_name_that_is_no_text_is_a_type_error_that_names_it(value):
    with pytest.raises(TypeError, match=r"routing key must be str, not \w+"):
        PublishEncoder(1, FRAME_MAX).encode("", value, True, NO_PROPERTIES, b"")


def test_a_lone_surrogate_is_a_value_error():
    with pytest.raises(ValueError, match="surrogates not allowed"):
        encode_shortstr("\ud800", "routing key")


def test_the_cache_of_publish_heads_does_not_grow_with_the_size_of_headers():
    encoder = PublishEncoder(1, FRAME_MAX)
    tracemalloc.start()
    try:
        for index in range(1500):
            encoder.encode("ex", "key", True, encode_properties(Properties(headers={"k": f"{index}" * 10_000})), b"")
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert used < 16 << 20


def test_heads_of_messages_that_have_something_of_their_own_are_not_kept():
    encoder = PublishEncoder(1, FRAME_MAX)
    for own in ({"correlation_id": "1"}, {"message_id": "1"}, {"timestamp": 1}):
        encoder.encode("ex", "key", True, encode_properties(Properties(**own)), b"body")
    assert not encoder._heads
    for alike in ({}, {"type": "t"}, {"headers": {"k": 1}}):
        encoder.encode("ex", "key", True, encode_properties(Properties(**alike)), b"body")
    assert len(encoder._heads) == 3


BAD_PROPERTIES = [
    (Properties(priority=-1), ValueError, "priority must be from 0 to 255, not -1"),
    (Properties(priority=256), ValueError, "priority must be from 0 to 255"),
    (Properties(delivery_mode=256), ValueError, "delivery_mode must be from 0 to 255"),
    (Properties(timestamp=-1), ValueError, "timestamp must be from 0"),
    (Properties(timestamp=2**64), ValueError, "timestamp must be from 0"),
    (Properties(content_type="x" * 256), ValueError, "content_type is 256 bytes"),
    (Properties(message_id=5), TypeError, "message_id must be str, not int"),
    (Properties(headers={5: "x"}), TypeError, "5"),
    (Properties(headers={"k": object()}), TypeError, "k"),
    (Properties(headers={"k": 2**64}), ValueError, "k"),
]


@pytest.mark.parametrize(("properties", "error", "text"), BAD_PROPERTIES)
def test_a_property_that_amqp_cannot_carry_is_refused_and_named(properties, error, text):
    for _ in range(2):  # the second time from the cache, were it kept there
        with pytest.raises(error, match=text):
            encode_properties(properties)


def test_delivery_modes_that_pamqp_refuses_are_sent_on():
    with pytest.raises(ValueError, match="delivery_mode"):
        Basic.Properties(delivery_mode=3).marshal()
    assert encode_properties(Properties(delivery_mode=3)) == b"\x10\x00\x03"


def test_no_properties_are_two_octets():
    assert encode_properties(Properties()) == b"\x00\x00"
    assert decode_properties(b"\x00\x00") == (Properties(), None, None)


@pytest.mark.parametrize("seconds", [2**63, 2**64 - 1, 253_402_300_800, 0x1_0000_0000])
def test_a_timestamp_that_no_datetime_holds_is_read_as_its_number(seconds):
    found = decode_properties(b"\x00\x40" + struct.pack(">Q", seconds))
    assert found.properties.timestamp == seconds
    assert found.error is None


def test_malformed_headers_leave_the_properties_around_them_readable():
    table = struct.pack(">I", 3) + b"\x01kz"
    found = decode_properties(b"\xb0\x80" + b"\x04text" + table + b"\x02" + b"\x02me")
    assert found.properties == Properties(content_type="text", headers={}, delivery_mode=2, message_id="me")
    assert isinstance(found.error, MessageDecodeError)
    assert found.raw_headers == table


def test_headers_longer_than_their_frame_are_an_error_and_their_bytes_are_kept():
    found = decode_properties(b"\xa0\x00" + b"\x04text" + struct.pack(">I", 1000) + b"\x01kt\x01")
    assert found.properties.content_type == "text"
    assert isinstance(found.error, MessageDecodeError)
    assert found.raw_headers is not None
    assert found.raw_headers.endswith(b"\x01kt\x01")


@pytest.mark.parametrize("flags", [0x0001, 0x0002, 0x0003, 0x8001])
def test_undefined_flags_are_an_error_of_that_message(flags):
    found = decode_properties(struct.pack(">H", flags) + b"\x04text")
    assert isinstance(found.error, MessageDecodeError)
    assert found.properties == Properties()


@pytest.mark.parametrize("raw", [b"", b"\x80", b"\x80\x00", b"\x80\x00\x05text", b"\x00\x40\x00", b"\x20\x00\x00"])
def test_properties_that_end_too_soon_are_an_error_of_that_message(raw):
    assert isinstance(decode_properties(raw).error, MessageDecodeError)


def test_names_that_are_not_utf8_are_read_so_that_they_can_be_written_again():
    assert decode_properties(b"\x80\x00\x02\xff\xfe").properties.content_type == "\udcff\udcfe"
    assert encode_shortstr("\udcff\udcfe", "content_type") == b"\x02\xff\xfe"
    assert decode_route(b"\x01\xff\x01\xfe") == ("\udcff", "\udcfe")


def test_junk_after_the_arguments_is_not_part_of_the_route():
    payload = b"\x00\x3c\x00\x3c\x03tag" + struct.pack(">QB", 1, 0) + ROUTE
    assert decode_deliver(payload + b"junk").route == ROUTE


def test_a_reply_text_that_is_not_utf8_is_readable():
    found = decode_return(b"\x00\x3c\x00\x32" + struct.pack(">H", 312) + b"\x03NO\xff" + ROUTE)
    assert (found.reply_code, found.reply_text) == (312, "NO\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize("class_id", [10, 50, 61, 0])
def test_a_content_header_of_another_class_is_refused(class_id):
    with pytest.raises(ProtocolError, match=f"of class {class_id}, not 60") as caught:
        decode_content_header(struct.pack(">HHQ", class_id, 0, 5) + NO_PROPERTIES)
    assert caught.value.reply_code == 505
