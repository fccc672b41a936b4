"""What is said of errors and messages, to callers and in logs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from leveret.exceptions import RemoteError
from leveret.message import IncomingMessage, Message


def error_fields(payload: Any) -> tuple[str, str, Any] | None:
    """Type, message and data of an error as RPC and JsonRPC send it; None for anything else."""
    match payload:
        case {"error": {"type": str(type), "message": str(message), **rest}}:
            return type, message, rest.get("data", rest.get("args"))
        case _:
            return None


def text_of(error: BaseException, form: Callable[[object], str] = str) -> str:
    """The text of *error*, without what is no Unicode: it may be anybody's, and have no text at all."""
    try:
        return _clean(form(error))
    except Exception as exc:
        return f"<{type(error).__name__}, whose text fails with {type(exc).__name__}>"


def summary(message: Message) -> str:
    """What a log says of *message*, in one line."""
    sender = f", routing key {message.routing_key!r}" if isinstance(message, IncomingMessage) else ""
    return f"type {message.type!r}, correlation_id {message.correlation_id!r}, {message.body_size} bytes{sender}"


def _clean(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def plain_error(error: Exception) -> RemoteError:
    """What can be sent of any *error*."""
    if isinstance(error, RemoteError):
        return RemoteError(_clean(str(error.type)), _clean(str(error.message)))
    return RemoteError(type(error).__name__, text_of(error))


def plain_args(exception: Exception) -> list[Any]:
    """The arguments of *exception*, as JSON has them: what it does not know as its ``repr()``."""
    return [_plain_arg(arg) for arg in exception.args]


def _plain_arg(arg: object) -> Any:
    if isinstance(arg, str):
        return _clean(arg)
    if arg is None or isinstance(arg, int) or (isinstance(arg, float) and math.isfinite(arg)):
        return arg
    return _clean(repr(arg))
