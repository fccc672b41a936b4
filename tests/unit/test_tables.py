"""Field tables: every type of RabbitMQ, exact errors, and no way to hurt the decoder."""

import datetime
import decimal
import math
import struct
import time
import uuid
from collections import OrderedDict, UserDict, UserList, deque
from decimal import Decimal
from enum import Enum, IntEnum
from types import MappingProxyType

import pytest

from leveret.exceptions import MessageDecodeError
from leveret.wire.tables import MAX_DEPTH, decode_table, encode_table

UTC = datetime.UTC


def sized(content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + content


def table(*values: bytes, key: bytes = b"\x01k") -> bytes:
    return sized(b"".join(key + value for value in values))


def decode(value: bytes):
    """The one value behind *value*, its type letter and bytes."""
    decoded, _ = decode_table(table(value))
    return decoded["k"]


def encode(value: object) -> bytes:
    """The type letter and the bytes of *value*."""
    return encode_table({"k": value})[6:]


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b"t\x00", False),
        (b"t\x01", True),
        (b"t\x02", True),
        (b"b\xff", -1),
        (b"B\xff", 255),
        (b"s\xff\xfe", -2),
        (b"u\xff\xfe", 65534),
        (b"I\xff\xff\xff\xfe", -2),
        (b"i\xff\xff\xff\xfe", 2**32 - 2),
        (b"l" + b"\xff" * 8, -1),
        (b"L" + b"\xff" * 8, 2**64 - 1),
        (b"f\x3f\xc0\x00\x00", 1.5),
        (b"d" + struct.pack(">d", 0.1), 0.1),
        (b"D\x02\xff\xff\xff\x83", Decimal("-1.25")),
        (b"D\xff\x00\x00\x00\x01", Decimal((0, (1,), -255))),
        (b"S\x00\x00\x00\x02\xc3\xa9", "é"),
        (b"S\x00\x00\x00\x02\xff\xfe", b"\xff\xfe"),
        (b"x\x00\x00\x00\x02ab", b"ab"),
        (b"T" + struct.pack(">Q", 0), datetime.datetime(1970, 1, 1, tzinfo=UTC)),
        (b"T" + struct.pack(">Q", 253402300799), datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)),
        (b"T" + struct.pack(">Q", 253402300800), 253402300800),
        (b"T" + b"\xff" * 8, 2**64 - 1),
        (b"V", None),
        (b"A\x00\x00\x00\x00", []),
        (b"A\x00\x00\x00\x03Vt\x01", [None, True]),
        (b"F\x00\x00\x00\x00", {}),
        (b"F\x00\x00\x00\x03\x01aV", {"a": None}),
    ],
)
def test_decodes_every_type(raw, value):
    decoded = decode(raw)
    assert decoded == value
    assert type(decoded) is type(value)


def test_decodes_decimals_exactly_whatever_the_users_context():
    with decimal.localcontext(prec=2, traps=[decimal.Inexact, decimal.Rounded]):
        assert str(decode(b"D\x02\x7f\xff\xff\xff")) == "21474836.47"


def test_a_table_may_start_and_end_anywhere_in_the_data():
    raw = encode_table({"a": 1})
    assert decode_table(b"before" + raw + b"after", 6) == ({"a": 1}, 6 + len(raw))


def test_the_last_of_equal_keys_wins():
    assert decode_table(table(b"b\x01", b"b\x02"))[0] == {"k": 2}


def test_a_key_that_is_no_utf8_survives_the_round_trip():
    raw = table(b"V", key=b"\x02\xff\xed")
    decoded, _ = decode_table(raw)
    assert decoded == {"\udcff\udced": None}
    assert encode_table(decoded) == raw


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00\x00\x00",
        b"\x00\x00\x00\x01",
        b"\xff\xff\xff\xff\x01aV",
        sized(b"\x05aV"),
        sized(b"\x01"),
        sized(b"\x01a"),
        *(table(bytes([letter])) for letter in b"tbBsuIilLfdDSATFx"),
        *(table(bytes([letter])) + b"\0" * 20 for letter in b"tbBsuIilLfdDSATFx"),
        table(b"z"),
        table(b"\x00"),
        table(b"S\x00\x00\x00\x05abcd") + b"e",
        table(b"S\xff\xff\xff\xffabcd"),
        table(b"x\x00\x00\x00\x05abcd") + b"e",
        table(b"x\xff\xff\xff\xffabcd"),
        table(b"A\xff\xff\xff\xffV"),
        table(b"A\x00\x00\x00\x02V") + b"V",
        table(b"A\x00\x00\x00\x02I\x00") + b"\0" * 8,
        table(b"F\x00\x00\x00\x04\x01aV") + b"V",
        table(b"F\x80\x00\x00\x00"),
    ],
)
def test_malformed_tables_raise_one_documented_error(data):
    with pytest.raises(MessageDecodeError, match="malformed field table") as caught:
        decode_table(data)
    assert caught.value.__context__ is None


def nested(depth: int, wrap) -> bytes:
    value = b"V"
    for _ in range(depth):
        value = wrap(value)
    return table(value)


WRAPS = [lambda value: b"A" + sized(value), lambda value: b"F" + table(value)]


@pytest.mark.parametrize("wrap", WRAPS)
def test_nesting_is_limited_when_decoding(wrap):
    decode_table(nested(MAX_DEPTH - 1, wrap))
    for depth in (MAX_DEPTH, 5000, 20_000):
        with pytest.raises(MessageDecodeError, match="nested deeper"):
            decode_table(nested(depth, wrap) if depth <= 5000 else table(b"A\x00\x01\x86\xa0" * depth + b"V" * 100_000))


@pytest.mark.parametrize("wrap", [lambda value: [value], lambda value: {"k": value}])
def test_nesting_is_limited_when_encoding(wrap):
    value = None
    for _ in range(MAX_DEPTH - 1):
        value = wrap(value)
    assert decode_table(encode_table({"k": value}))[0] == {"k": value}
    with pytest.raises(ValueError, match=r"header 'k.*nested deeper"):
        encode_table({"k": wrap(value)})


def test_a_structure_that_contains_itself_is_refused():
    loop: list[object] = []
    loop.extend([loop, loop])
    with pytest.raises(ValueError, match="containing itself"):
        encode_table({"loop": loop})


@pytest.mark.parametrize(
    "build",
    [
        lambda count: table(*[b"V"] * count),
        lambda count: table(*[b"I\x00\x00\x00\x01"] * count),
        lambda count: table(b"A" + sized(b"V" * count)),
    ],
    ids=["voids", "equal keys", "array of voids"],
)
def test_hostile_tables_cost_linear_time(build):
    def cost(count: int) -> float:
        data = build(count)

        def once() -> float:
            start = time.process_time()
            assert len(decode_table(data)[0]) == 1
            return time.process_time() - start

        return min(once() for _ in range(5))

    assert cost(120_000) < 10 * cost(30_000)  # four times as many; it would be 16 times, were it quadratic


class Color(str, Enum):
    RED = "red"


class Number(IntEnum):
    TWO = 2


class Plain(Enum):
    ONE = 1


@pytest.mark.parametrize(
    ("value", "raw"),
    [
        (None, b"V"),
        (True, b"t\x01"),
        (False, b"t\x00"),
        (0, b"I\x00\x00\x00\x00"),
        (2**31 - 1, b"I\x7f\xff\xff\xff"),
        (-(2**31), b"I\x80\x00\x00\x00"),
        (2**31, b"l\x00\x00\x00\x00\x80\x00\x00\x00"),
        (-(2**63), b"l\x80" + b"\x00" * 7),
        (0.1, b"d" + struct.pack(">d", 0.1)),
        ("é", b"S\x00\x00\x00\x02\xc3\xa9"),
        (b"\xff", b"x\x00\x00\x00\x01\xff"),
        (bytearray(b"a"), b"x\x00\x00\x00\x01a"),
        (memoryview(b"abcd")[::2], b"x\x00\x00\x00\x02ac"),
        (Decimal("-1.25"), b"D\x02\xff\xff\xff\x83"),
        (Decimal("1E+3"), b"D\x00\x00\x00\x03\xe8"),
        (Decimal("0E+999999"), b"D\x00\x00\x00\x00\x00"),
        (Decimal("1E-255"), b"D\xff\x00\x00\x00\x01"),
        (Decimal("-2147483648"), b"D\x00\x80\x00\x00\x00"),
        (datetime.datetime(1970, 1, 1, 0, 0, 1, 999999, tzinfo=UTC), b"T" + struct.pack(">Q", 1)),
        (datetime.datetime(1970, 1, 1, 0, 0, 1), b"T" + struct.pack(">Q", 1)),
        (
            datetime.datetime(1970, 1, 1, 2, tzinfo=datetime.timezone(datetime.timedelta(hours=2))),
            b"T" + struct.pack(">Q", 0),
        ),
        (time.gmtime(5), b"T" + struct.pack(">Q", 5)),
        ([None], b"A\x00\x00\x00\x01V"),
        ((None,), b"A\x00\x00\x00\x01V"),
        (deque([None]), b"A\x00\x00\x00\x01V"),
        (UserList([None]), b"A\x00\x00\x00\x01V"),
        ({"a": None}, b"F\x00\x00\x00\x03\x01aV"),
        (OrderedDict(a=None), b"F\x00\x00\x00\x03\x01aV"),
        (UserDict(a=None), b"F\x00\x00\x00\x03\x01aV"),
        (MappingProxyType({"a": None}), b"F\x00\x00\x00\x03\x01aV"),
        (Color.RED, b"S\x00\x00\x00\x03red"),
        (Number.TWO, b"I\x00\x00\x00\x02"),
    ],
)
def test_encodes_every_type(value, raw):
    assert encode(value) == raw


def test_keys_may_be_empty_long_and_enums():
    assert encode_table({}) == b"\x00\x00\x00\x00"
    assert encode_table({"": None}) == sized(b"\x00V")
    assert encode_table({"é" * 127: None}) == sized(b"\xfe" + "é".encode() * 127 + b"V")
    assert encode_table({Color.RED: None}) == sized(b"\x03redV")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_floats_that_are_no_numbers_are_refused_because_rabbitmq_would_end_the_connection(value):
    with pytest.raises(ValueError, match=rf"'k'.* RabbitMQ cannot read {value}; send it as str"):
        encode(value)
    received = decode(b"d" + struct.pack(">d", value))
    assert received == value or math.isnan(received)


@pytest.mark.parametrize(
    ("headers", "error", "text"),
    [
        ({"a": {"b": [0, 1, 2, {1}]}}, TypeError, r"header 'a\.b\[3\]': set is not an AMQP type; use a list"),
        ({"a": uuid.uuid4()}, TypeError, r"header 'a': UUID .*use str"),
        ({"a": datetime.date.today()}, TypeError, "header 'a': date .*datetime"),
        ({"a": datetime.timedelta()}, TypeError, "header 'a': timedelta .*total_seconds"),
        ({"a": Plain.ONE}, TypeError, "header 'a': Plain .*its value"),
        ({"a": object()}, TypeError, "header 'a': object .*bool, int"),
        ({"a": 2**63}, ValueError, "header 'a': .*64 bits"),
        ({"a": [-(2**63) - 1]}, ValueError, r"header 'a\[0\]'"),
        ({"a": Decimal("NaN")}, ValueError, "header 'a': NaN"),
        ({"a": Decimal("sNaN")}, ValueError, "header 'a': sNaN"),
        ({"a": Decimal("-Infinity")}, ValueError, "header 'a': -Infinity"),
        ({"a": Decimal("1E-256")}, ValueError, "header 'a': the decimal"),
        ({"a": Decimal("2147483648")}, ValueError, "header 'a': the decimal"),
        ({"a": Decimal("1E+999999")}, ValueError, "header 'a': the decimal"),
        ({"a": datetime.datetime(1969, 12, 31)}, ValueError, "header 'a': .*1970"),
        ({"a": "\ud800"}, ValueError, "header 'a': .*UTF-8"),
        ({"a": {5: 1}}, TypeError, "header 'a.5': a key must be a str, not int"),
        ({b"a": 1}, TypeError, "a key must be a str, not bytes"),
        ({None: 1}, TypeError, "a key must be a str, not NoneType"),
        ({"k" * 256: 1}, ValueError, "header 'kkk.*…': .*255 bytes, this one has 256"),
        ({"a": {"é" * 128: 1}}, ValueError, "header 'a.éé.*255 bytes"),
        ({"\ud800": 1}, ValueError, "the key cannot be encoded"),
    ],
)
def test_what_amqp_cannot_carry_is_an_error_that_names_the_entry(headers, error, text):
    with pytest.raises(error, match=text) as caught:
        encode_table(headers)
    assert caught.value.__context__ is None


def test_an_error_can_speak_of_arguments():
    with pytest.raises(TypeError, match="argument 'x-max-length'"):
        encode_table({"x-max-length": object()}, what="argument")
