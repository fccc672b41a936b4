"""Tables against pamqp as the oracle, the round trip, and arbitrary bytes."""

import contextlib
import datetime
import struct
from decimal import Decimal

import pamqp.decode
import pamqp.encode
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leveret.exceptions import MessageDecodeError
from leveret.wire.tables import decode_table, encode_table

texts = st.text(st.characters(codec="utf-8"), max_size=20)
keys = st.text(st.characters(codec="utf-8"), max_size=20)
ints = st.integers(-(2**63), 2**63 - 1)
decimals = st.builds(
    lambda mantissa, scale: Decimal(mantissa).scaleb(-scale),
    st.integers(-(2**31), 2**31 - 1),
    st.integers(0, 255),
)
datetimes = st.datetimes(
    datetime.datetime(1970, 1, 1), datetime.datetime(9999, 12, 31), timezones=st.just(datetime.UTC)
).map(lambda moment: moment.replace(microsecond=0))
# pamqp reads seconds over 32 bits as milliseconds.
pamqp_datetimes = datetimes.filter(lambda moment: moment.timestamp() <= 0xFFFF_FFFF)


def tables(*scalars):
    values = st.recursive(
        st.one_of(st.none(), st.booleans(), ints, texts, decimals, *scalars),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
        max_leaves=15,
    )
    return st.dictionaries(keys, values, max_size=6)


binaries = st.binary(max_size=20)
floats = st.floats(allow_nan=False, allow_infinity=False)
ours = tables(floats, binaries, datetimes)
for_pamqp = tables(st.floats(width=32, allow_nan=False, allow_infinity=False), binaries.map(bytearray), pamqp_datetimes)


def same(left, right):
    """Equal, and of the same types; bytes and bytearray count as one."""
    if isinstance(left, dict):
        return isinstance(right, dict) and left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list):
        return isinstance(right, list) and len(left) == len(right) and all(map(same, left, right))
    kinds = {bytearray if isinstance(value, bytes) else type(value) for value in (left, right)}
    return left == right and len(kinds) == 1


@given(ours)
def test_what_is_encoded_is_decoded_again(table):
    raw = encode_table(table)
    decoded, end = decode_table(raw)
    assert same(decoded, table)
    assert end == len(raw)
    assert encode_table(decoded) == raw


@given(for_pamqp)
def test_pamqps_bytes_mean_the_same_to_leveret(table):
    raw = pamqp.encode.field_table(table)
    assert same(decode_table(raw)[0], table)
    assert decode_table(raw)[1] == len(raw)


@given(for_pamqp)
def test_leverets_bytes_mean_the_same_to_pamqp(table):
    consumed, decoded = pamqp.decode.field_table(encode_table(table))
    assert consumed == len(encode_table(table))
    assert same(decoded, table)


@given(ours, st.binary(max_size=10), st.binary(max_size=10))
def test_what_surrounds_a_table_does_not_matter(table, before, after):
    raw = before + encode_table(table) + after
    decoded, end = decode_table(raw, len(before))
    assert same(decoded, table)
    assert end == len(raw) - len(after)


@given(ours, st.data())
def test_a_truncated_table_is_malformed(table, data):
    raw = encode_table(table)
    with pytest.raises(MessageDecodeError):
        decode_table(raw[: data.draw(st.integers(0, len(raw) - 1))])


letters = st.sampled_from([bytes([letter]) for letter in b"tbBsuIilLfdDSATFVx\x00z"])
lengths = st.integers(0, 2**32 - 1).map(struct.Struct(">I").pack)
small = st.integers(0, 40).map(struct.Struct(">I").pack)
almost_tables = st.lists(st.one_of(letters, lengths, small, st.binary(max_size=4)), max_size=40).map(b"".join)


@given(st.one_of(st.binary(max_size=200), almost_tables), st.booleans())
def test_any_bytes_give_a_table_or_the_documented_error(content, with_length):
    raw = struct.pack(">I", len(content)) + content if with_length else content
    try:
        table, end = decode_table(raw)
    except MessageDecodeError:
        return
    assert end <= len(raw)
    assert isinstance(table, dict)


@given(ours, st.data())
def test_any_flipped_byte_gives_a_table_or_the_documented_error(table, data):
    raw = bytearray(encode_table(table))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(MessageDecodeError):
        decode_table(bytes(raw))
