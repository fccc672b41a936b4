"""A message as bytes to print: pretty, JSON lines, raw. No I/O."""

from __future__ import annotations

import base64
import datetime
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from leveret.cli.options import counted, name_of
from leveret.log import printable
from leveret.message import IncomingMessage
from leveret.types import DeliveryMode

Format: TypeAlias = Callable[[int, IncomingMessage], bytes]
"""Number of the message, from 1, and the message → what is printed for it."""

_PROPERTIES = (
    "content_type",
    "content_encoding",
    "delivery_mode",
    "priority",
    "correlation_id",
    "reply_to",
    "expiration",
    "message_id",
    "timestamp",
    "type",
    "user_id",
    "app_id",
    "cluster_id",
)


def properties_of(message: IncomingMessage) -> dict[str, Any]:
    """The properties that the publisher set, in AMQP's order."""
    found: dict[str, Any] = {}
    for name in _PROPERTIES:
        value = getattr(message, name)
        # What every message has without anybody asking for it is left out.
        if value is None or (name == "priority" and value == 0) or (name == "delivery_mode" and value == 1):
            continue
        found[name] = value
    return found


# ----------------------------------------------------------------------------------------------------- JSON


def json_value(value: object) -> Any:
    """What a header may hold, as JSON may: what it cannot carry becomes text, or ``{"base64": …}``."""
    if isinstance(value, bytes | bytearray):
        text = _as_text(bytes(value))
        return {"base64": _base64(bytes(value))} if text is None else text
    if isinstance(value, Mapping):
        return {json_value(str(key)): json_value(each) for key, each in value.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(value, datetime.datetime):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()  # a lone surrogate cannot be printed
    if value is None or isinstance(value, bool | int | float):
        return int(value) if isinstance(value, DeliveryMode) else value
    if isinstance(value, Sequence):
        return [json_value(each) for each in value]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return str(value)


def as_json(number: int, message: IncomingMessage) -> bytes:
    """One line of JSON; a body that is not UTF-8 is in ``body_base64`` instead of ``body``."""
    text = _as_text(message.body)
    record = {
        "exchange": message.exchange,
        "routing_key": message.routing_key,
        "redelivered": message.redelivered,
        "properties": properties_of(message),
        "headers": message.headers,
    }
    if message.headers_error is not None:
        record["headers_error"] = str(message.headers_error)
        record["headers_raw_base64"] = _base64(message.headers_raw or b"")
    record |= {"body_base64": _base64(message.body)} if text is None else {"body": text}
    return json.dumps(json_value(record), ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _as_text(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


# --------------------------------------------------------------------------------------------------- pretty


def as_pretty(number: int, message: IncomingMessage) -> bytes:
    """For people: a headline, properties, headers, and the body with its control characters escaped."""
    facts = [
        f"{number:,}",
        f"exchange {name_of(message.exchange)}" if message.exchange else "default exchange",
        f"routing key {name_of(message.routing_key)}",
        counted(len(message.body), "byte"),
    ]
    lines = [" | ".join([*facts, "redelivered"] if message.redelivered else facts)]
    lines += [f"  {name:<16} {_shown(value)}" for name, value in properties_of(message).items()]
    headers = message.headers
    lines += [f"  header {printable(str(name))} = {_shown(value)}" for name, value in headers.items()]
    if message.headers_error is not None:
        lines.append(f"  headers cannot be read: {printable(str(message.headers_error))}")
        lines.append(f"  headers, as they came: {(message.headers_raw or b'').hex(' ') or 'nothing'}")
    return "\n".join([*lines, _body(message.body), ""]).encode("utf-8", "backslashreplace") + b"\n"


def _shown(value: object) -> str:
    return json.dumps(json_value(value), ensure_ascii=False) if not isinstance(value, str) else printable(value)


def _body(body: bytes) -> str:
    text = _as_text(body)
    if text is None:
        shown = body[:256].hex(" ")
        return f"  not UTF-8: {shown}" + (f" … ({len(body) - 256:,} bytes more)" if len(body) > 256 else "")
    # Line breaks and tabs are harmless; anything else that is not printable could reprogram the terminal.
    return "".join(
        character if character.isprintable() or character in "\n\t" else printable(character) for character in text
    )


# ------------------------------------------------------------------------------------------------------ raw


def raw(delimiter: bytes) -> Format:
    """The body as it is, and *delimiter* behind it."""
    return lambda _, message: message.body + delimiter
