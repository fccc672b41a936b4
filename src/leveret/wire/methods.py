"""Cold bytes: every method that is not sent or received once per message.

pamqp knows which arguments a method has, and of which type; its command classes are what users see. The
bytes are made and read here all the same, because pamqp refuses what brokers accept: names beyond ASCII,
bytes in a table, keys over 128 bytes. For that reason methods are built by :func:`make` and not by pamqp's
``__init__``.

Methods and their arguments: AMQP 0-9-1 §2.3.5.1 and §4.2.5; numbers and names: the XML reference, with
RabbitMQ's additions (https://www.rabbitmq.com/docs/specification).
"""

from __future__ import annotations

import inspect
import struct
from collections.abc import Callable, Mapping
from itertools import groupby
from struct import Struct
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar, cast

from pamqp.base import Frame
from pamqp.commands import INDEX_MAPPING

from leveret.exceptions import MessageDecodeError, ProtocolError
from leveret.wire.codec import METHOD, encode_frame, encode_shortstr
from leveret.wire.tables import EncodedTable, decode_table, encode_table

if TYPE_CHECKING:
    from leveret.types import FieldValue

F = TypeVar("F", bound=Frame)
T = TypeVar("T")

_COMMANDS = cast("dict[int, type[Frame]]", INDEX_MAPPING)
"""Class id << 16 | method id → pamqp's class."""
_CLASS_IDS = frozenset(index >> 16 for index in _COMMANDS)
_BY_NAME = {command.name: command for command in _COMMANDS.values()}

REPLIES: Final[Mapping[type[Frame], tuple[type[Frame], ...]]] = MappingProxyType(
    {
        command: tuple(_BY_NAME[name] for name in command.valid_responses)
        for command in _COMMANDS.values()
        if command.valid_responses
    }
)
"""Every method that is answered → what may answer it."""


def is_reply(request: type[Frame], method: Frame) -> bool:
    """Whether *method* answers a *request*."""
    return isinstance(method, REPLIES.get(request, ()))


# ------------------------------------------------------------------------------------------------- building


def make(cls: type[F], /, **arguments: object) -> F:
    """A pamqp command with *arguments*, and pamqp's defaults for the others, but without its checks.

    Values are checked when they are encoded, by what AMQP can carry.

    Raises:
        TypeError: the method has no argument of that name.
    """
    defaults = _DEFAULTS[cls]
    for name in arguments:
        if name not in defaults:
            raise TypeError(f"{cls.name} has no argument {name!r}")
    method = cls.__new__(cls)
    for name, default in defaults.items():
        setattr(method, name, arguments.get(name, default))
    return method


def _defaults(cls: type[Frame]) -> dict[str, object]:
    parameters = inspect.signature(cls.__init__).parameters
    defaults = {name: parameters[name].default for name in cls.__slots__}
    # A close that no method caused says 0 (AMQP 0-9-1 reference, connection.close); pamqp would say None.
    return {name: 0 if name in {"class_id", "method_id"} else default for name, default in defaults.items()}


def _fields(cls: type[Frame]) -> tuple[tuple[tuple[str, ...], str], ...]:
    """The arguments of *cls* as they stand on the wire: their names, and their AMQP type.

    Only bits have several names: neighbours share an octet, the first in the lowest bit (§4.2.5.2), and no
    method has more than eight.
    """
    fields: list[tuple[tuple[str, ...], str]] = []
    for amqp_type, names in groupby(cls.__slots__, cls.amqp_type):
        if amqp_type == "bit":
            fields.append((tuple(names), amqp_type))
        else:
            fields.extend(((name,), amqp_type) for name in names)
    return tuple(fields)


class _OnDemand(dict[type[Frame], T]):
    """Made for each method when it is first asked for: a program uses few of them, and looking at all is slow."""

    def __init__(self, make: Callable[[type[Frame]], T]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, cls: type[Frame]) -> T:
        made = self[cls] = self._make(cls)
        return made


_DEFAULTS = _OnDemand(_defaults)
_FIELDS = _OnDemand(_fields)


# ------------------------------------------------------------------------------------------------- encoding

_Writer: TypeAlias = Callable[[Any, str], bytes]
"""(value, what an error calls it) → bytes."""


def encode_method(channel: int, method: Frame) -> bytes:
    """The complete frame of *method*; raises as :func:`encode_payload`."""
    return encode_frame(METHOD, channel, encode_payload(method))


def encode_payload(method: Frame) -> bytes:
    """What the frame of *method* carries.

    Raises:
        TypeError, ValueError: an argument that AMQP cannot carry; names it and the method.
    """
    parts = [method.index.to_bytes(4, "big")]
    for names, write, what in _WRITING[type(method)]:
        parts.append(_write_bits(method, names) if write is None else write(getattr(method, names[0]), what))
    return b"".join(parts)


def _write_bits(method: Frame, names: tuple[str, ...]) -> bytes:
    octet = 0
    for place, name in enumerate(names):
        value = getattr(method, name)
        if not isinstance(value, int):
            raise TypeError(f"{method.name} {name} must be a bool, not {type(value).__name__}")
        octet |= bool(value) << place
    return bytes((octet,))


def _integer_writer(layout: str) -> _Writer:
    number = Struct(">" + layout)
    last = (1 << 8 * number.size) - 1

    def write(value: object, what: str) -> bytes:
        if not isinstance(value, int):
            raise TypeError(f"{what} must be an int, not {type(value).__name__}")
        if not 0 <= value <= last:
            raise ValueError(f"{what} must be from 0 to {last}, not {value}")
        return number.pack(value)

    return write


def _write_shortstr(value: object, what: str) -> bytes:
    if not isinstance(value, str):
        raise TypeError(f"{what} must be a str, not {type(value).__name__}")
    try:
        return encode_shortstr(value, what)
    except UnicodeEncodeError:
        raise ValueError(f"{what} cannot be encoded as UTF-8 (lone surrogates)") from None


def _write_longstr(value: object, what: str) -> bytes:
    if isinstance(value, str):
        value = _utf8(value)
        if value is None:
            raise ValueError(f"{what} cannot be encoded as UTF-8 (lone surrogates)")
    if not isinstance(value, bytes):
        raise TypeError(f"{what} must be a str or bytes, not {type(value).__name__}")
    return len(value).to_bytes(4, "big") + value


def _utf8(text: str) -> bytes | None:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        # That exception holds the text, which may be a secret: it must not become another one's context.
        return None


def _write_table(value: object, what: str) -> bytes:
    if isinstance(value, EncodedTable):
        return value
    if value is None:
        value = {}
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} must be a dict, not {type(value).__name__}")
    return encode_table(cast("Mapping[str, FieldValue]", value), what=what)


_WRITERS: dict[str, _Writer] = {
    "octet": _integer_writer("B"),
    "short": _integer_writer("H"),
    "long": _integer_writer("I"),
    "longlong": _integer_writer("Q"),
    "shortstr": _write_shortstr,
    "longstr": _write_longstr,
    "table": _write_table,
}


def _writing(cls: type[Frame]) -> tuple[tuple[tuple[str, ...], _Writer | None, str], ...]:
    """The arguments of *cls*: their names, what writes them (None: bits), and what an error calls them."""
    return tuple((names, _WRITERS.get(amqp_type), f"{cls.name} {names[0]}") for names, amqp_type in _FIELDS[cls])


_WRITING = _OnDemand(_writing)

# ------------------------------------------------------------------------------------------------- decoding

_Reader: TypeAlias = Callable[[bytes, int], tuple[Any, int]]
"""(payload, offset) → the value, and the offset after it, which may lie beyond the payload."""


def decode_method(payload: bytes) -> Frame:
    """The method in the *payload* of a method frame.

    Names are decoded with ``surrogateescape``, so that they can be sent back as the bytes they were.
    Octets after the last argument are ignored: a later version of the protocol may put more there.

    Raises:
        ProtocolError: the payload is no method, or one that is not known. Nothing else is ever raised.
    """
    if len(payload) < 4:
        raise ProtocolError("a method frame without class and method id", reply_code=501, data=payload)
    index = int.from_bytes(payload[:4], "big")
    cls = _COMMANDS.get(index)
    if cls is None:
        raise _unknown(index, payload)
    method = cls.__new__(cls)
    offset = 4
    try:
        for names, amqp_type in _FIELDS[cls]:
            value, offset = _READERS[amqp_type](payload, offset)
            if amqp_type == "bit":
                for place, name in enumerate(names):
                    setattr(method, name, bool(value >> place & 1))
            else:
                setattr(method, names[0], value)
    except (struct.error, IndexError, MessageDecodeError) as error:
        raise ProtocolError(f"{cls.name} is malformed", reply_code=502, data=payload) from error
    if offset > len(payload):
        # Slices do not raise, so a string that is too long for its frame is found here.
        raise ProtocolError(f"{cls.name} ends within a string", reply_code=502, data=payload)
    return method


def _unknown(index: int, payload: bytes) -> ProtocolError:
    class_id, method_id = index >> 16, index & 0xFFFF
    if class_id in _CLASS_IDS:
        return ProtocolError(f"class {class_id} has no method {method_id}", reply_code=540, data=payload)
    return ProtocolError(f"there is no class {class_id} (method {method_id})", reply_code=503, data=payload)


def _integer_reader(layout: str) -> _Reader:
    number = Struct(">" + layout)
    unpack_from, size = number.unpack_from, number.size
    return lambda data, offset: (unpack_from(data, offset)[0], offset + size)


def _read_shortstr(data: bytes, offset: int) -> tuple[str, int]:
    end = offset + 1 + data[offset]
    return data[offset + 1 : end].decode("utf-8", "surrogateescape"), end


_read_length = Struct(">I").unpack_from


def _read_longstr(data: bytes, offset: int) -> tuple[str, int]:
    end = offset + 4 + _read_length(data, offset)[0]
    return data[offset + 4 : end].decode("utf-8", "surrogateescape"), end


_READERS: dict[str, _Reader] = {
    "bit": _integer_reader("B"),
    "octet": _integer_reader("B"),
    "short": _integer_reader("H"),
    "long": _integer_reader("I"),
    "longlong": _integer_reader("Q"),
    "shortstr": _read_shortstr,
    "longstr": _read_longstr,
    "table": decode_table,
}
