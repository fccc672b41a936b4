"""Which arguments a queue may be declared with, and when two declarations are the same. Pure.

The order of the checks and the Erlang terms in the texts are RabbitMQ's.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, cast

from leveret.testing.messages import erlang_type
from leveret.testing.refusals import Refusal, queue_name

if TYPE_CHECKING:
    from leveret.testing.queues import Queue

_Check = Callable[[Any, Mapping[str, Any]], str | None]
"""(value, all arguments) → what is wrong with it, as an Erlang term."""

_MAX_EXPIRY: Final = 315_360_000_000
AGE_UNITS: Final = {"Y": 31_536_000, "M": 2_592_000, "D": 86_400, "h": 3600, "m": 60, "s": 1}
"""What ``x-max-age`` and ``x-stream-offset`` end with, in seconds."""


def parse_age(text: str) -> float:
    """The seconds of an age as ``7D``."""
    return int(text[:-1]) * AGE_UNITS[text[-1]]


def is_age(text: str) -> bool:
    """Whether *text* is an age as ``7D``."""
    return text[-1:] in AGE_UNITS and text[:-1].isdigit()


def _bad_type(value: object) -> str:
    return f"{{unacceptable_type,{erlang_type(value)}}}"


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def not_an_int(value: object) -> str | None:
    """What RabbitMQ says of a value that is to be an integer; ``None`` when it is one."""
    return None if _is_int(value) else f'"expected integer, got {erlang_type(value)}"'


def _non_negative(value: Any, _: Mapping[str, Any]) -> str | None:
    if (problem := not_an_int(value)) is not None:
        return problem
    return f"{{value_negative,{value}}}" if value < 0 else None


def _ttl(value: Any, arguments: Mapping[str, Any]) -> str | None:
    problem = _non_negative(value, arguments)
    if problem is None and value > _MAX_EXPIRY:
        return f"{{value_too_large,{value}}}"
    return problem


def _expires(value: Any, arguments: Mapping[str, Any]) -> str | None:
    return "{value_zero,0}" if _is_int(value) and value == 0 else _ttl(value, arguments)


def _text(value: Any, _: Mapping[str, Any]) -> str | None:
    return None if isinstance(value, str) else _bad_type(value)


def _dead_letter_key(value: Any, arguments: Mapping[str, Any]) -> str | None:
    problem = _text(value, arguments)
    if problem is None and "x-dead-letter-exchange" not in arguments:
        return "routing_key_but_no_dlx_defined"
    return problem


def _priority(value: Any, arguments: Mapping[str, Any]) -> str | None:
    problem = _non_negative(value, arguments)
    if problem is None and value > 255:
        return f"{{max_value_exceeded,{value}}}"
    return problem


def _positive(value: Any, arguments: Mapping[str, Any]) -> str | None:
    return "{value_zero,0}" if _is_int(value) and value == 0 else _non_negative(value, arguments)


def _version(known: Container[int]) -> _Check:
    def check(value: Any, arguments: Mapping[str, Any]) -> str | None:
        problem = _non_negative(value, arguments)
        return f"\"unsupported queue version '{value}'\"" if problem is None and value not in known else problem

    return check


def _flag(value: Any, _: Mapping[str, Any]) -> str | None:
    return None if isinstance(value, bool) else _bad_type(value)


def _one_of(problem: str, *values: object) -> _Check:
    def check(value: Any, _: Mapping[str, Any]) -> str | None:
        if type(value) is not type(values[0]):
            return _bad_type(value)
        return None if value in values else problem.format(value)

    return check


def _age(value: Any, _: Mapping[str, Any]) -> str | None:
    if not isinstance(value, str):
        return _bad_type(value)
    return None if is_age(value) else "invalid_max_age"


_CHECKS: Final[dict[str, _Check]] = {
    "x-expires": _expires,
    "x-message-ttl": _ttl,
    "x-dead-letter-routing-key": _dead_letter_key,
    "x-dead-letter-strategy": _one_of("invalid_dlx_strategy", "at-most-once", "at-least-once"),
    "x-max-length": _non_negative,
    "x-max-length-bytes": _non_negative,
    "x-max-in-memory-length": _non_negative,
    "x-max-in-memory-bytes": _non_negative,
    "x-max-priority": _priority,
    "x-overflow": _one_of("invalid_overflow", "drop-head", "reject-publish", "reject-publish-dlx"),
    "x-queue-mode": _one_of("\"unsupported queue mode '{}'\"", "default", "lazy"),
    "x-queue-version": _version((1, 2)),
    "x-single-active-consumer": _flag,
    "x-consumer-timeout": _non_negative,
    "x-consumer-disconnected-timeout": _non_negative,
    "x-queue-type": _one_of("\"unsupported queue type '{}'\"", "classic", "quorum", "stream"),
    "x-quorum-initial-group-size": _positive,
    "x-max-age": _age,
    "x-stream-max-segment-size-bytes": _non_negative,
    "x-stream-filter-size-bytes": _non_negative,
    "x-initial-cluster-size": _positive,
    "x-queue-leader-locator": _one_of("invalid_queue_locator_arg", "client-local", "balanced"),
}


def check_declaration(
    name: str,
    vhost: str,
    arguments: Mapping[str, Any],
    known: Mapping[str, tuple[str, ...]],
    unchecked: Container[str],
    versions: Container[int],
    *,
    durable: bool,
    exclusive: bool,
    auto_delete: bool,
) -> None:
    """Refuse what RabbitMQ refuses.

    Args:
        name, vhost, arguments, durable, exclusive, auto_delete: the declaration.
        known: the arguments that each type of queue knows.
        unchecked: those that may have any value.
        versions: what ``x-queue-version`` may be.

    Raises:
        Refusal: 406.
    """
    called = queue_name(name, vhost)
    exchange = arguments.get("x-dead-letter-exchange", "")
    if not isinstance(exchange, str):
        raise Refusal(406, f"invalid type '{erlang_type(exchange)}' for arg 'x-dead-letter-exchange' in {called}")
    _check_value("x-queue-type", arguments, called, _CHECKS)
    kind: str = arguments.get("x-queue-type", "classic")
    checks = {**_CHECKS, "x-queue-version": _version(versions)}
    for key in checks:
        if key in known[kind] and key not in unchecked:
            _check_value(key, arguments, called, checks)
    others = {each for keys in known.values() for each in keys} - {*known[kind]}
    for key in arguments if "x-queue-type" in arguments else sorted(arguments):  # RabbitMQ sorts when it adds the type
        if key in others:
            raise Refusal(406, f"invalid arg '{key}' for {called} of queue type rabbit_{kind}_queue")
    if kind != "classic":
        flags = {"auto-delete": auto_delete, "exclusive-owner": exclusive, "non-durable": not durable}
        for flag, is_set in flags.items():
            if is_set:
                raise Refusal(406, f"invalid property '{flag}' for {called}")


def _check_value(key: str, arguments: Mapping[str, Any], called: str, checks: Mapping[str, _Check]) -> None:
    if key in arguments and (problem := checks[key](arguments[key], arguments)) is not None:
        raise Refusal(406, f"invalid arg '{key}' for {called}: {problem}")


def assert_same(
    queue: Queue,
    vhost: str,
    arguments: Mapping[str, Any],
    known: Iterable[str],
    *,
    adds_type: bool,
    durable: bool,
    auto_delete: bool,
) -> None:
    """Refuse a declaration that does not fit the *queue* that is there.

    Args:
        queue, vhost: what is there.
        arguments, durable, auto_delete: the declaration.
        known: the arguments that are compared.
        adds_type: whether a queue without a type is told from others by ``classic``, or by nothing.

    Raises:
        Refusal: 406, with the first thing that differs.
    """
    called = queue_name(queue.name, vhost)
    for key, received, current in (
        ("durable", durable, queue.durable),
        ("auto_delete", auto_delete, queue.auto_delete),
    ):
        if received != current:
            raise inequivalent(key, called, received, current)
    added = {"x-queue-type": "classic"} if adds_type else {}
    assert_same_arguments(added | queue.arguments, {**added, **arguments}, called, known)


def assert_same_arguments(
    current: Mapping[str, Any], received: Mapping[str, Any], called: str, keys: Iterable[str]
) -> None:
    """Refuse arguments that differ in one of *keys*."""
    for key in keys:
        old, new = current.get(key, _NONE), received.get(key, _NONE)
        if old is _NONE and new is _NONE:
            continue
        if key == "x-queue-type" and [old, new] in ([_NONE, "classic"], ["classic", _NONE]):
            continue
        if _class(old) != _class(new) or old != new:
            if old is not _NONE and new is not _NONE:
                raise inequivalent(key, called, new, old)
            raise Refusal(
                406, f"inequivalent arg '{key}' for {called}: received {_typed(new)} but current is {_typed(old)}"
            )


def inequivalent(key: str, called: str, received: object, current: object) -> Refusal:
    """Two plain values that differ."""
    received, current = ("none" if value is None else f"'{plain(value)}'" for value in (received, current))
    return Refusal(406, f"inequivalent arg '{key}' for {called}: received {received} but current is {current}")


_NONE: Final = object()


def _class(value: object) -> str:
    kind = "" if value is _NONE else erlang_type(value)
    return "int" if kind in {"signedint", "long"} else kind


def plain(value: object) -> str:
    """As Erlang prints it; text without quotes."""
    return value if isinstance(value, str) else _term(value)


def _term(value: object) -> str:
    if value is None:
        return "undefined"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(f'{{{erlang_type(each)},{_term(each)}}}' for each in cast('list[object]', value))}]"
    if isinstance(value, dict):
        items = cast("dict[str, object]", value).items()
        return f"[{','.join(f'{{{_term(key)},{erlang_type(each)},{_term(each)}}}' for key, each in items)}]"
    return f'<<"{value}">>' if isinstance(value, str) else str(value)


def _typed(value: object) -> str:
    return "none" if value is _NONE else f"the value '{plain(value)}' of type '{erlang_type(value)}'"
