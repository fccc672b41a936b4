"""Messages: what a constructor takes, what the wire gets, what comes in, and how it is settled."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import datetime
import gc
import logging
import math
import pickle
import struct
import sys
import time
import tracemalloc
from decimal import Decimal

import pytest
from pamqp.commands import Basic

from leveret import DeliveryMode, IncomingMessage, Message, MessageProcessError, ReturnedMessage
from leveret.exceptions import ChannelInvalidStateError, DeliveryLost, MessageDecodeError, MethodNotImplemented
from leveret.message import incoming_message
from leveret.outcome import DONE
from leveret.times import decode_expiration, decode_timestamp, encode_expiration, encode_timestamp
from leveret.wire import codec
from leveret.wire.codec import Properties, decode_properties, encode_properties

UTC = datetime.UTC
EAST = datetime.timezone(datetime.timedelta(hours=3))
ROUTE = b"\x02ex\x03key"
ALL = {
    "headers": {"k": [1, {"n": None}], "d": Decimal("1.5")},
    "content_type": "application/json",
    "content_encoding": "gzip",
    "delivery_mode": DeliveryMode.PERSISTENT,
    "priority": 7,
    "correlation_id": "corr",
    "reply_to": "replies",
    "expiration": 1.5,
    "message_id": "id-1",
    "timestamp": datetime.datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC),
    "type": "order",
    "user_id": "guest",
    "app_id": "shop",
}


class FakeWire:
    """A channel that writes down what it is asked for."""

    def __init__(self, *, is_open: bool = True, has_nack: bool = True) -> None:
        self.is_open = is_open
        self.cancelled: set[bytes | None] = set()
        self.has_nack = has_nack
        self.calls: list[tuple] = []

    def _do(self, *call):
        if not self.is_open:
            raise DeliveryLost("gone")
        self.calls.append(call)
        return DONE

    def ack(self, delivery_tag, multiple=False):
        return self._do("ack", delivery_tag, multiple)

    def nack(self, delivery_tag, multiple=False, requeue=True):
        return self._do("nack", delivery_tag, multiple, requeue)

    def reject(self, delivery_tag, requeue=False):
        return self._do("reject", delivery_tag, requeue)

    def server_supports(self, capability):
        return self.has_nack if capability == "basic.nack" else False


def incoming(
    properties: Properties | bytes = b"\x00\x00",
    *,
    wire: FakeWire | None = None,
    no_ack: bool = False,
    redelivered: bool = False,
    body: bytes = b"body",
    tag: bytes | None = b"tag",
) -> IncomingMessage:
    raw = properties if isinstance(properties, bytes) else encode_properties(properties)
    return incoming_message(wire, tag, 9, redelivered, ROUTE, raw, body, no_ack)


# ---------------------------------------------------------------------------------------------------- construction


def test_defaults_are_those_of_aio_pika():
    message = Message(b"body")
    assert (message.body, message.body_size) == (b"body", 4)
    assert message.headers == {}
    assert message.delivery_mode is DeliveryMode.NOT_PERSISTENT
    assert message.priority == 0
    for name in ALL.keys() - {"headers", "delivery_mode", "priority"}:
        assert getattr(message, name) is None, name
    assert not message.locked


def test_every_property_is_what_was_given():
    message = Message(b"", **ALL)
    for name, value in ALL.items():
        assert getattr(message, name) == value, name


@pytest.mark.parametrize("body", [b"body", bytearray(b"body"), memoryview(b"body")])
def test_bytes_in_any_form_are_a_body(body):
    message = Message(body)
    assert message.body == b"body"
    assert type(message.body) is bytes


@pytest.mark.parametrize("body", [{1: 2}, [1, 2], ()])
def test_what_is_no_bytes_is_refused_as_a_body_with_advice(body):
    with pytest.raises(TypeError, match=r"json\.dumps"):
        Message(body)


def test_a_body_of_bytes_is_not_copied():
    body = b"x" * 100
    assert Message(body).body is body


def test_a_body_that_changes_later_does_not_change_the_message():
    body = bytearray(b"body")
    message = Message(body)
    body[:] = b"else"
    assert message.body == b"body"


def test_text_as_body_is_a_type_error_that_says_what_to_do():
    with pytest.raises(TypeError, match=r"the body must be bytes: use text\.encode\(\)"):
        Message("text")


@pytest.mark.parametrize("body", [5, 0, True, None, 1.5, object()])
def test_what_is_no_bytes_is_a_type_error(body):
    with pytest.raises(TypeError):
        Message(body)


def test_arguments_but_the_body_are_keywords():
    with pytest.raises(TypeError):
        Message(b"", {"k": "v"})
    with pytest.raises(TypeError):
        Message(b"", cluster_id="c")


@pytest.mark.parametrize("name", ["correlation_id", "reply_to", "message_id", "type", "user_id", "app_id"])
@pytest.mark.parametrize("value", [5, 0, Decimal("1.5"), "text"])
def test_what_names_something_becomes_text(name, value):
    message = Message(b"", **{name: value})
    assert getattr(message, name) == str(value)
    setattr(message, name, None)
    assert getattr(message, name) is None
    setattr(message, name, value)
    assert getattr(message, name) == str(value)


TEXTS = (
    "content_type",
    "content_encoding",
    "correlation_id",
    "reply_to",
    "message_id",
    "type",
    "user_id",
    "app_id",
)


@pytest.mark.parametrize("name", TEXTS)
def test_an_empty_text_is_not_sent(name):
    """As in aio-pika."""
    message = Message(b"", **{name: ""})
    assert getattr(message, name) is None
    assert getattr(message.wire_properties(), name) is None
    setattr(message, name, "text")
    assert getattr(message.wire_properties(), name) == "text"


@pytest.mark.parametrize("value", [-1, 256, 10**10, 5.0, "5", True])
def test_a_priority_that_is_no_octet_is_a_value_error_at_once(value):
    with pytest.raises(ValueError, match="priority must be a whole number from 0 to 255"):
        Message(b"", priority=value)
    message = Message(b"")
    with pytest.raises(ValueError, match="priority"):
        message.priority = value
    assert message.priority == 0


@pytest.mark.parametrize("value", [0, 3, -1, 256])
def test_a_delivery_mode_that_amqp_does_not_have_is_a_value_error_at_once(value):
    with pytest.raises(ValueError, match="DeliveryMode"):
        Message(b"", delivery_mode=value)


@pytest.mark.parametrize(("value", "mode"), [(None, 1), (1, 1), (2, 2), (DeliveryMode.PERSISTENT, 2)])
def test_delivery_modes(value, mode):
    message = Message(b"", delivery_mode=value)
    assert message.delivery_mode == mode
    assert isinstance(message.delivery_mode, DeliveryMode)
    message.delivery_mode = 2
    assert message.delivery_mode is DeliveryMode.PERSISTENT


def test_the_headers_are_the_messages_own():
    given = {"k": "v"}
    message = Message(b"", headers=given)
    message.headers["more"] = 1
    given["late"] = 1
    assert message.headers == {"k": "v", "more": 1}
    assert Message(b"").headers is not Message(b"").headers


def test_headers_may_be_any_mapping_and_may_be_replaced():
    from types import MappingProxyType

    message = Message(b"", headers=MappingProxyType({"k": "v"}))
    assert message.headers == {"k": "v"}
    message.headers = {"other": 1}
    assert message.headers == {"other": 1}
    message.headers = None
    assert message.headers == {}


@pytest.mark.parametrize("headers", [5, "text", ["a"]])
def test_headers_that_are_no_mapping_are_refused_at_once(headers):
    with pytest.raises((TypeError, ValueError)):
        Message(b"", headers=headers)


def test_headers_that_were_only_looked_at_go_out_as_an_empty_table():
    message = Message(b"")
    assert decode_properties(encode_properties(message.wire_properties())).properties.headers is None
    assert message.headers == {}
    message.headers["k"] = "v"
    assert decode_properties(encode_properties(message.wire_properties())).properties.headers == {"k": "v"}


# ---------------------------------------------------------------------------------------------------- expiration


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, None),
        (0, "0"),
        (1, "1000"),
        (1.5, "1500"),
        (0.0004, "0"),
        (0.001, "1"),
        (4_294_967.295, "4294967295"),
        (315_360_000, "315360000000"),
        (datetime.timedelta(0), "0"),
        (datetime.timedelta(seconds=2, milliseconds=5), "2005"),
        (datetime.timedelta(days=30), "2592000000"),
        (datetime.datetime(2000, 1, 1), "0"),
        (datetime.datetime(2000, 1, 1, tzinfo=EAST), "0"),
        (datetime.datetime.min, "0"),
    ],
)
def test_expiration_on_the_wire(value, text):
    assert encode_expiration(value) == text
    assert Message(b"", expiration=value).wire_properties().expiration == text


@pytest.fixture
def new_york(monkeypatch):
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize("zone", [None, UTC, EAST])
@pytest.mark.usefixtures("new_york")
def test_a_datetime_as_expiration_counts_from_the_moment_of_publishing(zone):
    """One without a zone is in local time, as datetime.now() and aio-pika have it."""
    message = Message(b"", expiration=datetime.datetime.now(zone) + datetime.timedelta(seconds=100))
    assert 95_000 < int(message.wire_properties().expiration) <= 100_000


@pytest.mark.parametrize("value", [-1, -0.001, -math.inf, datetime.timedelta(seconds=-1)])
def test_a_negative_expiration_is_a_value_error_at_once(value):
    with pytest.raises(ValueError, match="must not be negative"):
        Message(b"", expiration=value)


@pytest.mark.parametrize("value", [315_360_000.001, 10**12, datetime.timedelta(days=3651), datetime.datetime.max])
def test_an_expiration_that_rabbitmq_does_not_take_is_a_value_error_at_once(value):
    with pytest.raises(ValueError, match="must not be over 315,360,000 seconds"):
        Message(b"", expiration=value)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_an_expiration_that_is_no_number_of_milliseconds_is_a_value_error_at_once(value):
    with pytest.raises(ValueError, match=r"expiration|NaN"):
        Message(b"", expiration=value)


@pytest.mark.parametrize("value", [True, False, "1000", b"1", object(), datetime.date(2026, 1, 1)])
def test_an_expiration_of_another_type_is_a_type_error_at_once(value):
    with pytest.raises(TypeError, match="expiration must be seconds, a timedelta or a datetime"):
        Message(b"", expiration=value)
    message = Message(b"", expiration=5)
    with pytest.raises(TypeError):
        message.expiration = value
    assert message.expiration == 5


@pytest.mark.parametrize(
    ("text", "value"), [(None, None), ("0", 0.0), ("1500", 1.5), ("soon", "soon"), ("", ""), ("9" * 255, None)]
)
def test_expiration_from_the_wire(text, value):
    decoded = decode_expiration(text)
    assert value is None or decoded == value
    assert incoming(Properties(expiration=text)).expiration == decoded


@pytest.mark.parametrize("milliseconds", [1, 999, 60_001, 4_294_967_295, 86_400_000_123])
def test_expiration_survives_being_republished_to_the_millisecond(milliseconds):
    message = incoming(Properties(expiration=str(milliseconds)))
    assert message.wire_properties().expiration == str(milliseconds)


# ---------------------------------------------------------------------------------------------------- timestamp

MOMENT = datetime.datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (None, None),
        (0, datetime.datetime(1970, 1, 1, tzinfo=UTC)),
        (MOMENT.timestamp(), MOMENT),
        (MOMENT.timestamp() + 0.9, MOMENT),
        (int(MOMENT.timestamp()), MOMENT),
        (MOMENT, MOMENT),
        (MOMENT.replace(tzinfo=None), MOMENT),
        (MOMENT.astimezone(EAST), MOMENT),
        (MOMENT.replace(microsecond=999_999), MOMENT),
        (253_402_300_800, 253_402_300_800),
        (2**64 - 1, 2**64 - 1),
    ],
)
def test_timestamps(value, kept):
    message = Message(b"", timestamp=value)
    assert message.timestamp == kept
    if isinstance(kept, datetime.datetime):
        assert message.timestamp.tzinfo is not None
    seconds = message.wire_properties().timestamp
    assert seconds == (kept if not isinstance(kept, datetime.datetime) else int(kept.timestamp()))
    assert incoming(Properties(timestamp=seconds)).timestamp == kept


def test_a_timedelta_as_timestamp_counts_from_now():
    message = Message(b"", timestamp=datetime.timedelta(hours=-1))
    hour_ago = datetime.datetime.now(UTC) - datetime.timedelta(hours=1)
    assert abs(message.timestamp - hour_ago) < datetime.timedelta(seconds=5)


@pytest.mark.parametrize("value", [True, "2026", b"1", object(), datetime.date(2026, 1, 1)])
def test_a_timestamp_of_another_type_is_a_type_error_at_once(value):
    with pytest.raises(TypeError, match="timestamp must be seconds, a datetime or a timedelta"):
        Message(b"", timestamp=value)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, datetime.timedelta.max, datetime.timedelta.min])
def test_a_timestamp_that_no_number_of_seconds_can_be_is_a_value_error_at_once(value):
    with pytest.raises(ValueError, match=r".*"):
        Message(b"", timestamp=value)


@pytest.mark.parametrize("value", [-1, 2**64, datetime.datetime(1969, 12, 31, tzinfo=UTC)])
def test_a_timestamp_that_amqp_cannot_carry_is_a_value_error_before_a_byte_is_written(value):
    with pytest.raises(ValueError, match=r"timestamp must be from 0"):
        encode_properties(Message(b"", timestamp=value).wire_properties())


@pytest.mark.parametrize("seconds", [0, 1, 2**31, 2**32, 253_402_300_799, 253_402_300_800, 2**63, 2**64 - 1])
def test_every_timestamp_of_the_wire_can_be_read_and_sent_again(seconds):
    assert encode_timestamp(decode_timestamp(seconds)) == seconds
    assert incoming(Properties(timestamp=seconds)).wire_properties().timestamp == seconds


# ---------------------------------------------------------------------------------------------------- lock, copy


@pytest.mark.parametrize("name", [*ALL, "body"])
def test_a_locked_message_refuses_every_assignment(name):
    message = Message(b"body", **ALL)
    message.lock()
    assert message.locked
    with pytest.raises(ValueError, match="Message is locked"):
        setattr(message, name, b"x" if name == "body" else None)


def test_the_headers_of_a_locked_message_can_still_be_changed_in_place():
    message = Message(b"", headers={"k": "v"})
    message.lock()
    message.headers["k"] = "w"
    assert message.headers == {"k": "w"}


def test_a_message_has_no_attributes_but_its_own():
    with pytest.raises(AttributeError):
        Message(b"").contant_type = "text/plain"


def test_a_copy_is_unlocked_and_shares_the_headers():
    message = Message(b"body", **ALL)
    message.lock()
    twin = copy.copy(message)
    assert type(twin) is Message
    assert not twin.locked
    assert twin.info() == message.info()
    assert twin.headers is message.headers
    twin.app_id = "other"
    assert message.app_id == "shop"


def test_deep_copies_and_pickles_are_equal_and_independent():
    message = Message(b"body", **ALL)
    for twin in (copy.deepcopy(message), pickle.loads(pickle.dumps(message))):
        assert twin.body == message.body
        assert twin.info() == message.info()
        twin.headers["k"] = 1
        assert message.headers["k"] == [1, {"n": None}]


def test_publishing_changes_nothing_in_the_message():
    message = Message(b"body", **ALL)
    before = message.info()
    first = message.wire_properties()
    assert message.wire_properties() == first
    assert message.info() == before
    assert message.message_id == "id-1"
    assert Message(b"").wire_properties().message_id is None


# ---------------------------------------------------------------------------------------------------- views of it

INFO = {
    *ALL,
    *("body_size", "cluster_id", "consumer_tag", "delivery_tag", "exchange", "redelivered", "routing_key"),
}


def test_info_has_the_20_keys_of_aio_pika():
    info = Message(b"body", **ALL).info()
    assert info.keys() == INFO
    assert len(info) == 20
    assert info["body_size"] == 4
    assert {name: info[name] for name in ALL} == ALL
    for name in ("consumer_tag", "delivery_tag", "exchange", "redelivered", "routing_key", "cluster_id"):
        assert info[name] is None


def test_info_of_a_delivery_has_its_facts():
    info = incoming(Properties(message_id="id"), wire=FakeWire()).info()
    assert info.keys() == INFO
    assert (info["consumer_tag"], info["delivery_tag"], info["exchange"]) == ("tag", 9, "ex")
    assert (info["routing_key"], info["redelivered"], info["message_id"]) == ("key", False, "id")


def test_the_repr_is_aio_pikas():
    text = repr(Message(b"secret body", message_id="id"))
    assert text.startswith("Message:{")
    assert "'message_id': 'id'" in text
    assert "secret body" not in text
    assert repr(incoming()).startswith("IncomingMessage:{")


def test_iterating_gives_the_bodys_octets():
    assert list(Message(b"\x01\x02")) == [1, 2]


def test_properties_are_pamqps_object_with_the_values_of_the_wire():
    properties = Message(b"", **ALL).properties
    assert isinstance(properties, Basic.Properties)
    assert (properties.expiration, properties.delivery_mode, properties.message_type) == ("1500", 2, "order")
    assert properties.timestamp == ALL["timestamp"]
    assert properties.headers == ALL["headers"]
    properties.app_id = "changed"
    assert Message(b"", **ALL).properties.app_id == "shop"


# ---------------------------------------------------------------------------------------------------- incoming


def test_all_14_properties_come_in_as_they_went_out():
    message = Message(b"body", **ALL)
    sent = message.wire_properties()._replace(cluster_id="cluster")
    got = incoming(sent)
    for name, value in ALL.items():
        assert getattr(got, name) == value, name
    assert got.cluster_id == "cluster"


def test_the_facts_of_a_delivery():
    message = incoming(wire=FakeWire(), redelivered=True)
    assert (message.exchange, message.routing_key, message.consumer_tag) == ("ex", "key", "tag")
    assert (message.delivery_tag, message.redelivered, message.message_count) == (9, True, None)
    assert message.is_live
    assert incoming(tag=None).consumer_tag is None
    assert incoming().message_count is None


def test_without_properties_everything_is_none_or_its_default():
    message = incoming()
    assert message.headers == {}
    assert message.delivery_mode is DeliveryMode.NOT_PERSISTENT
    assert message.priority is None
    assert message.timestamp is None
    assert message.expiration is None


def test_a_delivery_mode_that_amqp_does_not_have_comes_in_as_a_number():
    assert incoming(Properties(delivery_mode=3)).delivery_mode == 3


def test_properties_are_decoded_once_and_only_when_looked_at(monkeypatch):
    seen = []

    def spy(raw):
        seen.append(raw)
        return codec.decode_properties(raw)

    monkeypatch.setattr("leveret.message.decode_properties", spy)
    message = incoming(Properties(message_id="id"), wire=FakeWire())
    assert (message.body, message.body_size, message.delivery_tag) == (b"body", 4, 9)
    assert (message.exchange, message.processed, message.locked, message.is_live) == ("ex", False, False, True)
    _ = message.ack()
    assert seen == []
    assert message.message_id == "id"
    assert message.app_id is None
    assert message.headers == {}
    message.info()
    assert len(seen) == 1


def test_two_messages_that_came_with_equal_headers_have_their_own():
    raw = encode_properties(Properties(headers={"k": [1]}))
    first, second = incoming(raw), incoming(raw)
    first.headers["k"].append(2)
    assert second.headers == {"k": [1]}


BAD_HEADERS = b"\xb0\x80" + b"\x04text" + struct.pack(">I", 3) + b"\x01kz" + b"\x02" + b"\x02me"


def test_malformed_headers_are_empty_and_say_what_was_wrong():
    message = incoming(BAD_HEADERS, wire=FakeWire())
    assert message.headers == {}
    assert isinstance(message.headers_error, MessageDecodeError)
    assert message.headers_raw == struct.pack(">I", 3) + b"\x01kz"
    assert (message.content_type, message.delivery_mode, message.message_id) == ("text", 2, "me")
    _ = message.ack()


def test_sound_headers_have_no_error():
    message = incoming(Properties(headers={"k": "v"}))
    assert message.headers_error is None
    assert message.headers_raw is None


@pytest.mark.parametrize("raw", [b"", b"\x80", b"\x00\x01", b"\xff\xfc", b"\x20\x00\xff\xff\xff\xff"])
def test_undecodable_properties_harm_nobody_but_their_reader(raw):
    message = incoming(raw, wire=FakeWire())
    assert isinstance(message.headers_error, MessageDecodeError)
    assert message.headers == {}
    assert message.info().keys() == INFO
    assert "IncomingMessage" in repr(message)
    _ = message.ack()


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'bodi'"):
        _ = incoming().bodi
    assert not hasattr(incoming(), "__deepcopy__")


def test_an_incoming_message_is_republished_as_it_came():
    sent = Message(b"body", **ALL).wire_properties()
    message = incoming(sent, wire=FakeWire())
    assert encode_properties(message.wire_properties()) == encode_properties(sent)
    twin = copy.copy(message)
    assert type(twin) is Message
    assert encode_properties(twin.wire_properties()) == encode_properties(sent)


def test_an_incoming_message_with_an_expiration_that_is_no_number_is_republished_as_it_came():
    message = incoming(Properties(expiration="soon"))
    assert message.wire_properties().expiration == "soon"


def test_a_property_of_an_incoming_message_can_be_changed_until_it_is_settled():
    message = incoming(Properties(app_id="a", message_id="id"), wire=FakeWire())
    message.app_id = "b"
    assert message.wire_properties() == Properties(app_id="b", message_id="id")
    _ = message.ack()
    assert message.locked
    with pytest.raises(ValueError, match="Message is locked"):
        message.app_id = "c"


def test_a_returned_message_tells_why_and_cannot_be_settled():
    message = ReturnedMessage(312, "NO_ROUTE", ROUTE, encode_properties(Properties(message_id="id")), b"body")
    assert (message.reply_code, message.reply_text) == (312, "NO_ROUTE")
    assert (message.exchange, message.routing_key, message.message_id) == ("ex", "key", "id")
    assert message.processed
    assert not message.is_live
    for settle in (message.ack, message.nack, message.reject):
        with pytest.raises(TypeError):
            settle()


# ---------------------------------------------------------------------------------------------------- settling


@pytest.mark.parametrize(
    ("settle", "call"),
    [
        (lambda m: m.ack(), ("ack", 9, False)),
        (lambda m: m.ack(multiple=True), ("ack", 9, True)),
        (lambda m: m.nack(), ("nack", 9, False, True)),
        (lambda m: m.nack(True, False), ("nack", 9, True, False)),
        (lambda m: m.reject(), ("reject", 9, False)),
        (lambda m: m.reject(requeue=True), ("reject", 9, True)),
    ],
)
async def test_settling_takes_effect_at_the_call_and_once(settle, call):
    wire = FakeWire()
    message = incoming(wire=wire)
    assert not message.processed
    done = settle(message)
    assert wire.calls == [call]
    assert message.processed
    assert message.locked
    await done
    for again in (message.ack, message.nack, message.reject):
        with pytest.raises(MessageProcessError, match="already processed") as caught:
            again()
        assert caught.value.message is message
    assert wire.calls == [call]


def test_settling_on_a_dead_channel_is_delivery_lost_and_settles_nothing():
    wire = FakeWire(is_open=False)
    message = incoming(wire=wire)
    assert not message.is_live
    for settle in (message.ack, message.nack, message.reject):
        with pytest.raises(DeliveryLost) as caught:
            settle()
        assert isinstance(caught.value, ChannelInvalidStateError)
    assert not message.processed


@pytest.mark.parametrize("wire", [None, FakeWire()])
def test_a_message_that_needs_no_ack_is_processed_and_refuses_one(wire):
    message = incoming(no_ack=True)
    assert message.processed
    assert message.locked
    for settle in (message.ack, message.nack, message.reject):
        with pytest.raises(TypeError, match="no_ack"):
            settle()


def test_nack_says_when_the_broker_does_not_know_it():
    message = incoming(wire=FakeWire(has_nack=False))
    with pytest.raises(MethodNotImplemented, match=r"use reject\(\)"):
        message.nack()
    assert not message.processed


# ---------------------------------------------------------------------------------------------------- process()

MODES = [(requeue, on_redelivered) for requeue in (False, True) for on_redelivered in (False, True)]


@pytest.mark.parametrize(("requeue", "on_redelivered"), MODES)
@pytest.mark.parametrize("redelivered", [False, True])
async def test_process_acks_on_success_in_every_mode(requeue, on_redelivered, redelivered):
    wire = FakeWire()
    async with incoming(wire=wire, redelivered=redelivered).process(requeue, on_redelivered) as message:
        assert isinstance(message, IncomingMessage)
        assert wire.calls == []
    assert wire.calls == [("ack", 9, False)]


@pytest.mark.parametrize(("requeue", "on_redelivered"), MODES)
@pytest.mark.parametrize("redelivered", [False, True])
async def test_process_rejects_on_an_exception_and_lets_it_out(requeue, on_redelivered, redelivered):
    wire = FakeWire()
    message = incoming(wire=wire, redelivered=redelivered)
    with pytest.raises(LookupError, match="why"):
        async with message.process(requeue=requeue, reject_on_redelivered=on_redelivered):
            raise LookupError("why")
    assert wire.calls == [("reject", 9, requeue and not (redelivered and on_redelivered))]


@pytest.mark.parametrize(("requeue", "on_redelivered"), MODES)
@pytest.mark.parametrize("redelivered", [False, True])
@pytest.mark.parametrize("has_nack", [True, False])
async def test_process_requeues_on_cancellation_in_every_mode(requeue, on_redelivered, redelivered, has_nack):
    wire = FakeWire(has_nack=has_nack)
    message = incoming(wire=wire, redelivered=redelivered)
    with pytest.raises(asyncio.CancelledError):
        async with message.process(requeue=requeue, reject_on_redelivered=on_redelivered):
            raise asyncio.CancelledError
    assert wire.calls == [("nack", 9, False, True) if has_nack else ("reject", 9, True)]


async def test_process_ignores_what_was_settled_if_asked_to():
    for error in (None, LookupError("why")):
        wire = FakeWire()
        with contextlib.suppress(LookupError):
            async with incoming(wire=wire).process(ignore_processed=True) as message:
                await message.nack(requeue=False)
                if error:
                    raise error
        assert wire.calls == [("nack", 9, False, False)]


async def test_process_settles_what_was_not_settled_if_asked_to_ignore_what_was():
    wire = FakeWire()
    async with incoming(wire=wire).process(ignore_processed=True):
        pass
    assert wire.calls == [("ack", 9, False)]


async def test_process_says_when_the_block_settled_the_message_itself():
    wire = FakeWire()
    with pytest.raises(MessageProcessError):
        async with incoming(wire=wire).process() as message:
            await message.ack()
    assert wire.calls == [("ack", 9, False)]


async def test_a_cancellation_gets_out_of_process_although_the_block_settled_the_message_itself():
    wire = FakeWire()

    async def handle():
        async with incoming(wire=wire).process() as message:
            await message.ack()
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await handle()
    assert wire.calls == [("ack", 9, False)]


@pytest.mark.parametrize("error", [LookupError("why"), asyncio.CancelledError()])
async def test_on_a_dead_channel_process_warns_and_lets_the_exception_out(error, caplog):
    with pytest.raises(type(error)):
        async with incoming(wire=FakeWire(is_open=False)).process():
            raise error
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert caplog.records[0].name == "leveret.message"
    assert "Reject is not sent since channel is closed" in caplog.text


async def test_process_tells_with_the_message_that_a_redelivered_one_is_rejected(caplog):
    caplog.set_level(logging.INFO, "leveret")
    message = incoming(wire=FakeWire(), redelivered=True)
    with pytest.raises(LookupError):
        async with message.process(requeue=True, reject_on_redelivered=True):
            raise LookupError
    records = [record for record in caplog.records if record.levelno == logging.INFO]
    assert [record.args for record in records] == [(message,)]


# ---------------------------------------------------------------------------------------------------- memory


def test_a_message_is_small():
    assert sys.getsizeof(Message(b"")) <= 64
    assert sys.getsizeof(incoming()) <= 128


def test_ten_thousand_incoming_messages_take_less_than_400_bytes_each():
    wire, route, properties = FakeWire(), ROUTE, encode_properties(Properties(content_type="text/plain"))

    def make(count: int) -> list[IncomingMessage]:
        return [
            incoming_message(wire, b"tag", index + 1000, False, route, properties, b"", False) for index in range(count)
        ]

    make(10)
    gc.collect()
    tracemalloc.start()
    try:
        messages = make(10_000)
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(messages) == 10_000
    assert used / 10_000 < 400


def test_looking_at_the_headers_of_a_message_without_any_keeps_nothing_of_other_messages():
    raw = encode_properties(Properties())
    messages = [incoming(raw) for _ in range(3)]
    messages[0].headers["k"] = 1
    assert [message.headers for message in messages] == [{"k": 1}, {}, {}]
