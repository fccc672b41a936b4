"""Field tables and arrays (AMQP 0-9-1 §4.2.5.5), with the type letters that RabbitMQ reads.

Decoding is one forward pass without look-ahead. Nothing checks a bound before reading: a value that
overruns its container moves the offset past the container's end, and there one comparison finds it.
So the work is linear in the bytes that are there, whatever lengths they declare.

Encoding sends only letters that every client of RabbitMQ reads. Going round is lossless in value: an
int may change its width, and a float32 comes back as a float64, but ``decode`` never gives anything
``encode`` refuses, except integers over 63 bits, which RabbitMQ itself has no signed type for.
"""

from __future__ import annotations

import calendar
import datetime
import math
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from enum import Enum
from struct import Struct
from typing import TYPE_CHECKING, Any, TypeAlias

from leveret.exceptions import MessageDecodeError

if TYPE_CHECKING:
    from leveret.types import FieldValue

MAX_DEPTH = 100
"""How deep tables and arrays may nest, in both directions."""

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_SECOND = datetime.timedelta(seconds=1)
_LAST_SECOND = (datetime.datetime.max.replace(tzinfo=datetime.UTC) - _EPOCH) // _SECOND
_LENGTH = Struct(">I")

# ------------------------------------------------------------------------------------------------ decoding

_Decoder: TypeAlias = "Callable[[bytes, int, int], tuple[FieldValue, int]]"
"""(data, offset of the value, depth of its container) → the value, and the offset after it."""


def decode_table(data: bytes, offset: int = 0) -> tuple[dict[str, FieldValue], int]:
    """Decode the field table at *offset*; *data* may go on after it.

    A key that is no UTF-8 is decoded with ``surrogateescape``, and of equal keys the last one wins.
    A long string that is no UTF-8 becomes bytes. A timestamp that is no datetime stays an int.

    Returns:
        The table, and the offset after it.

    Raises:
        MessageDecodeError: The bytes are no table. No other exception ever comes out of malformed bytes.
    """
    try:
        return _decode_table(data, offset, 0)
    except (struct.error, IndexError):
        reason = "the data ends within a value"
    except KeyError as error:
        reason = f"there is no field type {chr(error.args[0])!r}"
    raise MessageDecodeError(f"malformed field table: {reason}")


def _decode_table(data: bytes, offset: int, depth: int) -> tuple[dict[str, FieldValue], int]:
    offset, end = _enter(data, offset, depth)
    depth += 1
    table: dict[str, FieldValue] = {}
    decoders = _DECODERS
    while offset < end:
        type_at = offset + 1 + data[offset]
        key = data[offset + 1 : type_at].decode(errors="surrogateescape")
        table[key], offset = decoders[data[type_at]](data, type_at + 1, depth)
    return table, _leave(offset, end)


def _decode_array(data: bytes, offset: int, depth: int) -> tuple[list[FieldValue], int]:
    offset, end = _enter(data, offset, depth)
    depth += 1
    array: list[FieldValue] = []
    append, decoders = array.append, _DECODERS
    while offset < end:
        value, offset = decoders[data[offset]](data, offset + 1, depth)
        append(value)
    return array, _leave(offset, end)


def _enter(data: bytes, offset: int, depth: int) -> tuple[int, int]:
    """Where the content of the container at *offset* begins and ends."""
    if depth >= MAX_DEPTH:
        raise MessageDecodeError(f"malformed field table: nested deeper than {MAX_DEPTH} levels")
    start = offset + 4
    end = start + _LENGTH.unpack_from(data, offset)[0]
    if end > len(data):
        raise MessageDecodeError("malformed field table: a table or array is longer than the data")
    return start, end


def _leave(offset: int, end: int) -> int:
    if offset != end:
        raise MessageDecodeError("malformed field table: a value overruns its table or array")
    return end


def _decode_bytes(data: bytes, offset: int, depth: int) -> tuple[bytes, int]:
    start = offset + 4
    end = start + _LENGTH.unpack_from(data, offset)[0]
    return data[start:end], end


def _decode_string(data: bytes, offset: int, depth: int) -> tuple[str | bytes, int]:
    start = offset + 4
    end = start + _LENGTH.unpack_from(data, offset)[0]
    raw = data[start:end]
    try:
        return raw.decode(), end
    except UnicodeDecodeError:
        return raw, end


def _decode_timestamp(data: bytes, offset: int, depth: int) -> tuple[datetime.datetime | int, int]:
    (seconds,) = _UINT64.unpack_from(data, offset)
    if seconds > _LAST_SECOND:
        return seconds, offset + 8
    return _EPOCH + datetime.timedelta(seconds=seconds), offset + 8


def _decode_decimal(data: bytes, offset: int, depth: int) -> tuple[Decimal, int]:
    scale, mantissa = _DECIMAL.unpack_from(data, offset)
    # Built from a tuple, because arithmetic would round to the precision of the user's context.
    digits = Decimal(mantissa).as_tuple()
    return Decimal((digits.sign, digits.digits, -scale)), offset + 5


def _decode_void(data: bytes, offset: int, depth: int) -> tuple[None, int]:
    return None, offset


def _fixed(layout: str) -> _Decoder:
    number = Struct(">" + layout)
    unpack_from, size = number.unpack_from, number.size

    def decode(data: bytes, offset: int, depth: int) -> tuple[FieldValue, int]:
        return unpack_from(data, offset)[0], offset + size

    return decode


_UINT64 = Struct(">Q")
_DECIMAL = Struct(">Bi")
_DECODERS: dict[int, _Decoder] = {
    ord("t"): _fixed("?"),
    ord("b"): _fixed("b"),
    ord("B"): _fixed("B"),
    ord("s"): _fixed("h"),
    ord("u"): _fixed("H"),
    ord("I"): _fixed("i"),
    ord("i"): _fixed("I"),
    ord("l"): _fixed("q"),
    # Signed in old clients, unsigned in the specification's grammar (long-long-uint); RabbitMQ's own
    # signed type is `l`, so whoever takes the trouble to send an `L` means what the grammar says.
    ord("L"): _fixed("Q"),
    ord("f"): _fixed("f"),
    ord("d"): _fixed("d"),
    ord("D"): _decode_decimal,
    ord("S"): _decode_string,
    ord("A"): _decode_array,
    ord("T"): _decode_timestamp,
    ord("F"): _decode_table,
    ord("V"): _decode_void,
    ord("x"): _decode_bytes,
}

# ------------------------------------------------------------------------------------------------ encoding

_Encoder: TypeAlias = Callable[[Any, int], bytes]
"""(value, depth of its container) → its type letter and its bytes."""


class _Refused(Exception):
    """A value that AMQP has no type for. On its way up it collects the path to that value."""

    def __init__(self, kind: type[Exception], reason: str, path: str = "") -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason
        self.path = path


class EncodedTable(bytes):
    """A table that is encoded already, as an argument of a method."""


def encode_table(table: Mapping[str, FieldValue], *, what: str = "header") -> bytes:
    """Encode *table* with its length in front.

    Args:
        table: Keys of at most 255 bytes of UTF-8. A naive datetime is taken as UTC, and its fraction of
            a second is dropped. A str or int that is an Enum is sent as its value.
        what: What an error calls an entry of the table.

    Raises:
        TypeError: A key is not a str, or a value has a type that AMQP does not know; names the entry.
        ValueError: A value does not fit into its AMQP type, or the nesting is too deep; names the entry.
    """
    try:
        return _encode_entries(table, 0)
    except _Refused as refused:
        kind, reason, path = refused.kind, refused.reason, refused.path
    raise kind(f"{what} {_shortened(path.removeprefix('.'))!r}: {reason}")


def _encode_entries(table: Mapping[str, FieldValue], depth: int) -> bytes:
    """The content of a table, behind its length."""
    depth = _deeper(depth)
    content = bytearray()
    encoders = _ENCODERS
    key: object = ""
    try:
        for key, value in table.items():
            raw = key.encode("utf-8", "surrogateescape")
            content.append(len(raw))
            content += raw
            content += (encoders.get(type(value)) or _encoder_for(value))(value, depth)
    except _Refused as refused:
        refused.path = f".{key}{refused.path}"
        raise
    except (AttributeError, ValueError):
        # Checked only now, to spare every good key the checks.
        _check_key(key)
        raise
    return _LENGTH.pack(len(content)) + content


def _check_key(key: object) -> None:
    if not isinstance(key, str):
        raise _Refused(TypeError, f"a key must be a str, not {type(key).__name__}", f".{key}")
    try:
        size = len(key.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        raise _Refused(ValueError, "the key cannot be encoded as UTF-8", f".{key}") from None
    if size > 255:
        raise _Refused(ValueError, f"a key has at most 255 bytes, this one has {size}", f".{key}")


def _encode_table(value: Mapping[str, FieldValue], depth: int) -> bytes:
    return b"F" + _encode_entries(value, depth)


def _encode_array(value: Sequence[FieldValue], depth: int) -> bytes:
    depth = _deeper(depth)
    content = bytearray()
    encoders = _ENCODERS
    index = 0
    try:
        for index, item in enumerate(value):  # noqa: B007 - the error below names it
            content += (encoders.get(type(item)) or _encoder_for(item))(item, depth)
    except _Refused as refused:
        refused.path = f"[{index}]{refused.path}"
        raise
    return b"A" + _LENGTH.pack(len(content)) + content


def _deeper(depth: int) -> int:
    if depth >= MAX_DEPTH:
        raise _Refused(ValueError, f"nested deeper than {MAX_DEPTH} levels, or containing itself")
    return depth + 1


def _encode_void(value: None, depth: int) -> bytes:
    return b"V"


def _encode_bool(value: bool, depth: int) -> bytes:
    return b"t\x01" if value else b"t\x00"


_INT32 = Struct(">ci")
_INT64 = Struct(">cq")
_FLOAT64 = Struct(">cd")
_SIZED = Struct(">cI")


def _encode_int(value: int, depth: int) -> bytes:
    if -0x8000_0000 <= value <= 0x7FFF_FFFF:
        return _INT32.pack(b"I", value)
    try:
        return _INT64.pack(b"l", value)
    except struct.error:
        raise _Refused(ValueError, "the integer does not fit into 64 bits with sign; send it as str") from None


def _encode_float(value: float, depth: int) -> bytes:
    if not math.isfinite(value):  # Erlang has no such floats: RabbitMQ would end the connection (541)
        raise _Refused(ValueError, f"RabbitMQ cannot read {value}; send it as str")
    return _FLOAT64.pack(b"d", value)


def _encode_string(value: str, depth: int) -> bytes:
    try:
        raw = str.encode(value)
    except UnicodeEncodeError:
        raise _Refused(ValueError, "the text cannot be encoded as UTF-8 (lone surrogates)") from None
    return _SIZED.pack(b"S", len(raw)) + raw


def _encode_bytes(value: bytes | bytearray | memoryview, depth: int) -> bytes:
    raw = bytes(value)
    return _SIZED.pack(b"x", len(raw)) + raw


def _encode_datetime(value: datetime.datetime, depth: int) -> bytes:
    if value.utcoffset() is None:
        value = value.replace(tzinfo=datetime.UTC)
    return _encode_seconds((value - _EPOCH) // _SECOND)


def _encode_struct_time(value: time.struct_time, depth: int) -> bytes:
    return _encode_seconds(calendar.timegm(value))


def _encode_seconds(seconds: int) -> bytes:
    if seconds < 0:
        raise _Refused(ValueError, "AMQP has no timestamps before 1970")
    return b"T" + _UINT64.pack(seconds)


def _encode_decimal(value: Decimal, depth: int) -> bytes:
    sign, digits, exponent = value.as_tuple()
    if not isinstance(exponent, int):
        raise _Refused(ValueError, f"{value} is no AMQP decimal")
    zeros = max(exponent, 0) if value else 0
    # Counted before multiplying: 1E+999999 must not become a million zeros first.
    if len(digits) + zeros <= 10:
        mantissa = int("".join(map(str, digits))) * 10**zeros
        try:
            return b"D" + _DECIMAL.pack(max(-exponent, 0), -mantissa if sign else mantissa)
        except struct.error:
            pass
    raise _Refused(ValueError, "the decimal does not fit into 32 bits and a scale of 0 to 255; send it as str")


_ENCODERS: dict[type, _Encoder] = {
    str: _encode_string,
    bool: _encode_bool,
    int: _encode_int,
    float: _encode_float,
    type(None): _encode_void,
    bytes: _encode_bytes,
    bytearray: _encode_bytes,
    memoryview: _encode_bytes,
    datetime.datetime: _encode_datetime,
    Decimal: _encode_decimal,
    dict: _encode_table,
    list: _encode_array,
    tuple: _encode_array,
    time.struct_time: _encode_struct_time,
}
_ABSTRACT: dict[type, _Encoder] = {Mapping: _encode_table, Sequence: _encode_array}


def _encoder_for(value: object) -> _Encoder:
    """The encoder of a value whose exact type is not in the table: a subclass, or something like a list."""
    for kinds in (_ENCODERS, _ABSTRACT):
        for kind, encoder in kinds.items():
            if isinstance(value, kind):
                return encoder
    raise _Refused(TypeError, f"{type(value).__name__} is not an AMQP type; use {_advice_for(value)}")


def _advice_for(value: object) -> str:
    from uuid import UUID  # not for all who import leveret

    match value:
        case set() | frozenset():
            return "a list"
        case UUID():
            return "str(…)"
        case datetime.date():
            return "a datetime, or its isoformat()"
        case datetime.timedelta():
            return "its total_seconds()"
        case Enum():
            return "its value"
        case _:
            return "bool, int, float, str, bytes, Decimal, datetime, None, a list or a dict"


def _shortened(path: str) -> str:
    return path if len(path) <= 100 else path[:80] + "…"
