from __future__ import annotations

import pytest
from pamqp import frame
from pamqp.commands import INDEX_MAPPING, Basic, Channel, Connection, Exchange, Queue

from leveret.exceptions import MessageDecodeError, ProtocolError
from leveret.types import ExchangeType
from leveret.wire.methods import REPLIES, decode_method, encode_method, is_reply, make


def roundtrip(method):
    data = encode_method(1, method)
    assert data[-1] == 0xCE
    assert len(data) == 8 + int.from_bytes(data[3:7], "big")
    return decode_method(data[7:-1])


# ------------------------------------------------------------------------------------------------- building


def test_make_takes_the_defaults_of_pamqp():
    method = make(Queue.Declare, queue="q", durable=True)
    assert isinstance(method, Queue.Declare)
    assert (method.queue, method.durable, method.exclusive, method.ticket) == ("q", True, False, 0)


def test_make_accepts_names_that_pamqp_refuses():
    with pytest.raises(ValueError, match="Invalid value for queue"):
        Queue.Declare(queue="é{}")
    assert make(Queue.Declare, queue="é{}").queue == "é{}"


def test_make_refuses_an_unknown_argument():
    with pytest.raises(TypeError, match=r"Queue\.Declare has no argument 'durible'"):
        make(Queue.Declare, durible=True)


def test_make_builds_a_method_without_arguments():
    assert encode_method(0, make(Connection.CloseOk)) == frame.marshal(Connection.CloseOk(), 0)


def test_a_close_that_no_method_caused_says_zero():
    method = make(Channel.Close, reply_code=200, reply_text="bye")
    assert dict(roundtrip(method)) == {"reply_code": 200, "reply_text": "bye", "class_id": 0, "method_id": 0}


@pytest.mark.parametrize("command", INDEX_MAPPING.values(), ids=lambda command: command.name)
def test_make_knows_every_command(command):
    assert set(dict(make(command))) == set(command.__slots__)


# ------------------------------------------------------------------------------------------------- encoding


def test_the_frame_is_what_pamqp_makes():
    method = Queue.Declare(queue="q", durable=True, auto_delete=True, arguments={"x-queue-type": "quorum"})
    assert encode_method(300, method) == frame.marshal(method, 300)


def test_utf8_names_go_round():
    method = roundtrip(make(Queue.Bind, queue="очередь", exchange="交換", routing_key="🐇.é"))
    assert (method.queue, method.exchange, method.routing_key) == ("очередь", "交換", "🐇.é")


def test_a_name_of_bad_utf8_goes_back_as_the_bytes_it_was():
    payload = Basic.ConsumeOk.index.to_bytes(4, "big") + b"\x03\xff\xfea"
    method = decode_method(payload)
    assert method.consumer_tag == "\udcff\udcfea"
    assert encode_method(1, method)[7:-1] == payload


def test_a_long_string_of_bad_utf8_goes_back_as_the_bytes_it_was():
    payload = Connection.Secure.index.to_bytes(4, "big") + b"\x00\x00\x00\x02\xff\x00"
    assert encode_method(0, decode_method(payload))[7:-1] == payload


def test_a_long_string_may_be_bytes():
    assert roundtrip(make(Connection.SecureOk, response=b"\0a\0b")).response == "\0a\0b"


def test_table_values_that_pamqp_refuses():
    arguments = {"bytes": b"\xff", "k" * 200: 1.1, "empty": None, "list": [1, {"a": True}]}
    assert roundtrip(make(Queue.Declare, arguments=arguments)).arguments == arguments


def test_no_arguments_are_an_empty_table():
    assert roundtrip(make(Queue.Declare, arguments=None)).arguments == {}


def test_an_enum_is_sent_as_its_value():
    assert roundtrip(make(Exchange.Declare, exchange_type=ExchangeType.TOPIC)).exchange_type == "topic"


@pytest.mark.parametrize("name", ["a" * 255, "é" * 127 + "a"])
def test_short_strings_of_255_bytes_fit(name):
    assert roundtrip(make(Queue.Declare, queue=name)).queue == name


@pytest.mark.parametrize("name", ["a" * 256, "é" * 128])
def test_short_strings_of_256_bytes_are_refused(name):
    with pytest.raises(ValueError, match=r"Queue\.Declare queue is 256 bytes"):
        encode_method(1, make(Queue.Declare, queue=name))


@pytest.mark.parametrize(
    ("method", "error", "words"),
    [
        (make(Queue.Declare, queue=None), TypeError, "Queue.Declare queue must be a str, not NoneType"),
        (make(Queue.Declare, queue=b"q"), TypeError, "Queue.Declare queue must be a str, not bytes"),
        (make(Queue.Declare, queue="\ud800"), ValueError, "Queue.Declare queue cannot be encoded as UTF-8"),
        (make(Queue.Declare, durable="no"), TypeError, "Queue.Declare durable must be a bool, not str"),
        (make(Queue.Declare, arguments=["x"]), TypeError, "Queue.Declare arguments must be a dict, not list"),
        (make(Queue.Declare, arguments={"x": {1}}), TypeError, "Queue.Declare arguments 'x'"),
        (make(Queue.Declare, arguments={"x": 1 << 64}), ValueError, "Queue.Declare arguments 'x'"),
        (make(Basic.Qos, prefetch_count=65536), ValueError, "prefetch_count must be from 0 to 65535, not 65536"),
        (make(Basic.Qos, prefetch_count=-1), ValueError, "prefetch_count must be from 0 to 65535, not -1"),
        (make(Basic.Qos, prefetch_size=1 << 32), ValueError, "Basic.Qos prefetch_size must be from 0 to"),
        (make(Basic.Qos, prefetch_count=1.0), TypeError, "prefetch_count must be an int, not float"),
        (make(Basic.Ack, delivery_tag=1 << 64), ValueError, "Basic.Ack delivery_tag must be from 0 to"),
        (make(Connection.SecureOk), TypeError, "Connection.SecureOk response must be a str or bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_amqp_cannot_carry_is_refused_by_name(method, error, words):
    with pytest.raises(error, match="^.*" + words.replace(".", r"\.")):
        encode_method(1, method)


def test_an_error_does_not_hold_a_secret():
    with pytest.raises(ValueError, match="new_secret cannot be encoded") as caught:
        encode_method(0, make(Connection.UpdateSecret, new_secret="hunter2\ud800", reason=""))
    assert "hunter2" not in str(caught.value)
    assert caught.value.__context__ is None


@pytest.mark.parametrize("command", INDEX_MAPPING.values(), ids=lambda command: command.name)
def test_no_method_needs_more_than_one_octet_for_neighbouring_bits(command):
    assert [command.amqp_type(name) for name in command.__slots__].count("bit") <= 8


# ------------------------------------------------------------------------------------------------- decoding


def test_declare_ok():
    data = frame.marshal(Queue.DeclareOk("q", 5, 2), 1)
    method = decode_method(data[7:-1])
    assert isinstance(method, Queue.DeclareOk)
    assert (method.queue, method.message_count, method.consumer_count) == ("q", 5, 2)


def test_the_first_bit_is_the_lowest():
    method = decode_method(Basic.Nack.index.to_bytes(4, "big") + b"\0\0\0\0\0\0\0\x07\x02")
    assert (method.delivery_tag, method.multiple, method.requeue) == (7, False, True)


def test_delivery_tags_have_64_bits_without_sign():
    assert roundtrip(make(Basic.Ack, delivery_tag=(1 << 64) - 1)).delivery_tag == (1 << 64) - 1


def test_junk_after_the_arguments_is_accepted():
    data = frame.marshal(Queue.DeclareOk("q", 5, 2), 1)
    assert dict(decode_method(data[7:-1] + b"more")) == {"queue": "q", "message_count": 5, "consumer_count": 2}
    assert isinstance(decode_method(Queue.BindOk.index.to_bytes(4, "big") + b"more"), Queue.BindOk)


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"", 501),
        (b"\0\x0a\0", 501),
        (b"\x03\xe7\0\x0a", 503),
        (b"\xff\xff\xff\xff", 503),
        (b"\0\x3c\x03\xe7", 540),
        (b"\0\x32\0\x0b", 502),  # no arguments
        (b"\0\x32\0\x0b\x05abc", 502),  # a short string that is too long
        (b"\0\x32\0\x0b\x03abc\0\0\0\1\0\0\0", 502),  # an integer that is too short
        (b"\0\x0a\0\x14\xff\xff\xff\xffx", 502),  # a long string that is too long
        (b"\0\x3c\0\x50\0\0\0\0\0\0\0\1", 502),  # no octet for the bit
        (b"\0\x0a\0\x0a\0\x09\0\0\0\x05\1a?\0\0", 502),  # a table with an unknown type
        (b"\0\x0a\0\x0a\0\x09\xff\xff\xff\xff", 502),  # a table that is too long
    ],
)
def test_hostile_bytes_are_a_protocol_error(payload, code):
    with pytest.raises(ProtocolError) as caught:
        decode_method(payload)
    assert caught.value.reply_code == code
    assert caught.value.data == payload
    # It becomes the reply text of our connection.close, which is a short string.
    assert len(str(caught.value).encode()) < 200
    assert str(caught.value).isascii()


def test_a_malformed_table_is_the_cause():
    with pytest.raises(ProtocolError, match=r"Connection\.Start is malformed") as caught:
        decode_method(b"\0\x0a\0\x0a\0\x09\xff\xff\xff\xff")
    assert isinstance(caught.value.__cause__, MessageDecodeError)


# -------------------------------------------------------------------------------------------------- replies


def test_replies():
    assert REPLIES[Queue.Declare] == (Queue.DeclareOk,)
    assert REPLIES[Basic.Get] == (Basic.GetOk, Basic.GetEmpty)
    assert REPLIES[Exchange.Unbind] == (Exchange.UnbindOk,)
    assert Basic.Publish not in REPLIES
    assert Basic.Ack not in REPLIES


def test_every_synchronous_method_has_replies():
    assert set(REPLIES) == {command for command in INDEX_MAPPING.values() if command.synchronous}


def test_is_reply():
    assert is_reply(Basic.Get, make(Basic.GetEmpty))
    assert is_reply(Queue.Declare, make(Queue.DeclareOk))
    assert not is_reply(Queue.Declare, make(Queue.BindOk))
    assert not is_reply(Basic.Publish, make(Basic.Ack))
