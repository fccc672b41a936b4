"""Cold bytes against pamqp, wherever pamqp accepts the values, and against hostile bytes."""

from __future__ import annotations

import contextlib
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import frame
from pamqp.commands import INDEX_MAPPING

from leveret.exceptions import ProtocolError
from leveret.wire.methods import decode_method, encode_method, make

COMMANDS = sorted(INDEX_MAPPING.values(), key=lambda command: command.index)

# pamqp wants the deprecated arguments to have their default, and other names to be short ASCII.
RESERVED = {
    "ticket": 0,
    "capabilities": "",
    "insist": False,
    "known_hosts": "",
    "out_of_band": "0",
    "channel_id": "0",
    "cluster_id": "",
}
NAMES = st.text("abcXYZ019-_.:@#,/+ ", max_size=127)
NAMED = {"queue", "exchange", "source", "destination", "virtual_host"}
SHORT_TEXT = st.text(max_size=60)  # up to 240 bytes

# Integers and floats are left out: pamqp chooses their width by their value. pamqp also sorts the keys.
TABLES = st.recursive(
    st.none() | st.booleans() | st.text(max_size=10),
    lambda values: st.dictionaries(SHORT_TEXT.filter(lambda key: len(key.encode()) <= 128), values, max_size=4),
    max_leaves=8,
).filter(lambda value: isinstance(value, dict))


def in_order(table):
    return {key: in_order(value) if isinstance(value, dict) else value for key, value in sorted(table.items())}


VALUES = {
    "bit": st.booleans(),
    "octet": st.integers(0, 255),
    "short": st.integers(0, 65535),
    "long": st.integers(0, 2**32 - 1),
    "longlong": st.integers(0, 2**63 - 1),  # pamqp's have a sign
    "shortstr": SHORT_TEXT,
    "longstr": st.text(max_size=300),
    "table": TABLES.map(in_order),
}


def values_of(command, name):
    if name in RESERVED:
        return st.just(RESERVED[name])
    return NAMES if name in NAMED else VALUES[command.amqp_type(name)]


def arguments_of(command):
    return st.fixed_dictionaries({name: values_of(command, name) for name in command.__slots__})


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
@given(data=st.data(), channel=st.integers(0, 65535))
def test_same_bytes_and_values_as_pamqp(command, data, channel):
    arguments = data.draw(arguments_of(command))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # basic.recover-async
        oracle = frame.marshal(command(**arguments), channel)

    encoded = encode_method(channel, make(command, **arguments))
    decoded = decode_method(encoded[7:-1])

    assert encoded == oracle
    assert type(decoded) is command
    assert dict(decoded) == arguments


NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.binary(max_size=20)


@given(st.dictionaries(st.text(max_size=60), NUMBERS | st.lists(NUMBERS, max_size=3), max_size=5))
def test_what_pamqp_does_differently_keeps_its_value(table):
    command = INDEX_MAPPING[0x0032000A]
    assert decode_method(encode_method(1, make(command, arguments=table))[7:-1]).arguments == table


@given(st.binary(max_size=255))
def test_any_name_goes_back_as_it_came(name):
    payload = b"\0\x3c\0\x15" + bytes((len(name),)) + name
    assert encode_method(1, decode_method(payload))[7:-1] == payload


PAYLOADS = st.binary(max_size=300) | st.tuples(st.sampled_from(COMMANDS), st.binary(max_size=300)).map(
    lambda pair: pair[0].index.to_bytes(4, "big") + pair[1]
)


@given(PAYLOADS)
def test_hostile_bytes_raise_nothing_but_protocol_errors(payload):
    with contextlib.suppress(ProtocolError):
        method = decode_method(payload)
        assert set(dict(method)) == set(type(method).__slots__)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
@given(data=st.data())
def test_every_proper_prefix_of_a_method_is_refused(command, data):
    arguments = data.draw(arguments_of(command))
    payload = encode_method(1, make(command, **arguments))[7:-1]
    cut = data.draw(st.integers(0, len(payload) - 1))
    with pytest.raises(ProtocolError) as caught:
        decode_method(payload[:cut])
    assert caught.value.reply_code == (501 if cut < 4 else 502)
