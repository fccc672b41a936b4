"""How patterns make bytes of data, and data of bytes.

A serializer has a content type and two methods, and imports what it needs when it is first used. What Python has and
JSON has not is sent in a plain form, and arrives as that: other languages shall be able to read it.
``docs/howto/rpc.md`` has the table.
"""

from __future__ import annotations

import binascii
import dataclasses
import datetime
import functools
from collections.abc import Callable, Mapping, Set
from decimal import Decimal
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol
from uuid import UUID

from leveret.exceptions import MessageDecodeError

if TYPE_CHECKING:
    import json

_GZIP = 31  # zlib's number for gzip's format


class Serializer(Protocol):
    """What ``serializer=`` takes.

    Attributes:
        content_type: goes with each message; one of another type is not deserialised.
    """

    content_type: str

    def serialize(self, data: Any) -> bytes:
        """Bytes for *data*."""
        ...

    def deserialize(self, data: bytes) -> Any:
        """What *data* stands for."""
        ...


def plain(value: Any) -> Any:
    """What JSON has for a *value* that it does not know; the members of the result may be such values again.

    Raises:
        TypeError: it has nothing.
    """
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal | UUID):
        return str(value)
    if isinstance(value, bytes | bytearray):
        return binascii.b2a_base64(value, newline=False).decode("ascii")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return dict(value)  # pyright: ignore[reportUnknownArgumentType,reportUnknownVariableType]
    if isinstance(value, Set):
        return list(value)  # pyright: ignore[reportUnknownArgumentType,reportUnknownVariableType]
    if callable(dump := getattr(value, "model_dump", None)):  # pydantic
        return dump(mode="json")
    raise TypeError(
        f"{type(value).__name__} has no form in JSON: convert it, or use a serializer of your own (serializer=)"
    )


class JSONSerializer:
    """JSON in UTF-8; see :func:`plain` for what JSON does not know.

    Args:
        default: called for what JSON does not know, and returns what it does.
    """

    content_type = "application/json"

    def __init__(self, default: Callable[[Any], Any] = plain) -> None:
        self._default = default

    @functools.cached_property
    def _encode(self) -> Callable[[Any], str]:
        import json

        # json.dumps() with arguments builds an encoder for each call.
        return json.JSONEncoder(
            ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=self._default
        ).encode

    @functools.cached_property
    def _decoder(self) -> json.JSONDecoder:
        import json

        return json.JSONDecoder()

    def serialize(self, data: Any) -> bytes:
        """JSON for *data*.

        Raises:
            TypeError: something in it has no form in JSON.
            ValueError: it contains itself, or NaN or an infinity, which JSON does not have, or text that is no Unicode.
        """
        try:
            return self._encode(data).encode()
        except ValueError as exc:
            if "JSON compliant" not in str(exc):
                raise
            raise ValueError("JSON has neither NaN nor Infinity: send None, or a string") from exc

    def deserialize(self, data: bytes) -> Any:
        """What the JSON in *data* says.

        Raises:
            MessageDecodeError: it is no JSON in UTF-8.
        """
        try:
            text = data.decode().strip(" \t\n\r")
            value, end = self._decoder.raw_decode(text)
            return value if end == len(text) else self._decoder.decode(text)  # which says what is wrong
        except (ValueError, RecursionError) as exc:
            raise MessageDecodeError(f"the body is no JSON: {exc}") from exc


class CompressedJSONSerializer(JSONSerializer):
    """The same, compressed by gzip.

    Args:
        level: from 0 to 9; more is smaller and slower.
        max_size: how many bytes a body may unpack to: a small one may stand for gigabytes.
    """

    content_type = "application/json;compression=gzip"

    def __init__(self, level: int = 6, max_size: int = 128 * 1024 * 1024) -> None:
        super().__init__()
        self._level = level
        self._max_size = max_size

    def serialize(self, data: Any) -> bytes:
        """Compressed JSON for *data*.

        Raises:
            TypeError, ValueError: as :meth:`JSONSerializer.serialize`.
        """
        import zlib

        return zlib.compress(super().serialize(data), self._level, wbits=_GZIP)

    def deserialize(self, data: bytes) -> Any:
        """What the compressed JSON in *data* says.

        Raises:
            MessageDecodeError: it is no such thing, or too much.
        """
        import zlib

        unpacker = zlib.decompressobj(_GZIP)
        try:
            unpacked = unpacker.decompress(data, self._max_size)
        except zlib.error as exc:
            raise MessageDecodeError(f"the body is not compressed by gzip: {exc}") from exc
        if not unpacker.eof:
            if unpacker.unconsumed_tail:
                raise MessageDecodeError(f"the body unpacks to more than {self._max_size} bytes (max_size)")
            raise MessageDecodeError("the body is not compressed by gzip, or is cut off")
        return super().deserialize(unpacked)


class PickleSerializer:
    """Python's pickle: **whoever can publish to the queue can run any code here.**

    For talking to programs that use aio-pika's defaults, between parties that trust each other, and nothing else.
    """

    content_type = "application/python-pickle"

    def serialize(self, data: Any) -> bytes:
        """A pickle of *data*.

        Raises:
            pickle.PicklingError, TypeError, AttributeError: it cannot be pickled.
        """
        import pickle

        return pickle.dumps(data)

    def deserialize(self, data: bytes) -> Any:
        """What the pickle makes, or does.

        Raises:
            MessageDecodeError: it is no pickle, or makes nothing here.
        """
        import pickle

        try:
            return pickle.loads(data)
        except Exception as exc:  # a pickle calls what it likes
            raise MessageDecodeError(f"the body cannot be unpickled: {type(exc).__name__}: {exc}") from exc


def is_content_type(given: str | None, wanted: str) -> bool:
    """Whether a message of the content type *given* may be read as *wanted*.

    A message may do without one, case and blanks do not matter, and UTF-8 may be named.
    """
    return not given or given == wanted or _essence(given) == _essence(wanted)


def _essence(content_type: str) -> tuple[str, ...]:
    kind, *parameters = (part.strip().lower() for part in content_type.split(";"))
    return (kind, *sorted(part for part in parameters if part not in {"", "charset=utf-8", 'charset="utf-8"'}))
