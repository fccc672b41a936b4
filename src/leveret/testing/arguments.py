"""Which arguments a queue may be declared with, and when two declarations are the same. Pure.

The order of the checks and the Erlang terms in the texts are RabbitMQ's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

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
    "x-queue-version": _one_of("\"unsupported queue version '{}'\"", 1, 2),
    "x-single-active-consumer": _flag,
    "x-queue-type": _one_of("\"unsupported queue type '{}'\"", "classic", "quorum", "stream"),
    "x-quorum-initial-group-size": _non_negative,
    "x-max-age": _age,
    "x-stream-max-segment-size-bytes": _non_negative,
    "x-initial-cluster-size": _non_negative,
    "x-queue-leader-locator": _one_of("invalid_queue_locator_arg", "client-local", "balanced"),
}

_COMMON: Final = ("x-queue-type", "x-max-length", "x-max-length-bytes", "x-single-active-consumer")
_DEAD: Final = ("x-dead-letter-exchange", "x-dead-letter-routing-key")
ARGUMENTS: Final[dict[str, frozenset[str]]] = {
    "classic": frozenset(
        {
            *_COMMON,
            *_DEAD,
            "x-expires",
            "x-max-priority",
            "x-message-ttl",
            "x-overflow",
            "x-queue-leader-locator",
            "x-queue-master-locator",
            "x-queue-mode",
            "x-queue-version",
        }
    ),
    "quorum": frozenset(
        {
            *_COMMON,
            *_DEAD,
            "x-consumer-timeout",
            "x-dead-letter-strategy",
            "x-delayed-retry-max",
            "x-delayed-retry-min",
            "x-delayed-retry-type",
            "x-delivery-limit",
            "x-expires",
            "x-max-in-memory-bytes",
            "x-max-in-memory-length",
            "x-message-ttl",
            "x-overflow",
            "x-queue-leader-locator",
            "x-quorum-initial-group-size",
            "x-quorum-target-group-size",
        }
    ),
    "stream": frozenset(
        {
            *_COMMON,
            "x-initial-cluster-size",
            "x-max-age",
            "x-queue-leader-locator",
            "x-stream-filter-size-bytes",
            "x-stream-max-segment-size-bytes",
        }
    ),
}
"""What each type of queue knows; declarations that differ in anything else are the same."""
_ORDER: Final = ("x-expires", "x-message-ttl", *_DEAD, "x-max-length", "x-max-length-bytes")
"""What is compared first."""
_KNOWN: Final = ARGUMENTS["classic"] | ARGUMENTS["quorum"] | ARGUMENTS["stream"]


def check_declaration(
    name: str,
    vhost: str,
    arguments: Mapping[str, Any],
    *,
    durable: bool,
    exclusive: bool,
    auto_delete: bool,
) -> None:
    """Refuse what RabbitMQ refuses.

    Raises:
        Refusal: 406.
    """
    called = queue_name(name, vhost)
    kind = arguments.get("x-queue-type", "classic")
    if isinstance(kind, str) and kind in ARGUMENTS:
        for key in sorted(_KNOWN & arguments.keys()):
            if key not in ARGUMENTS[kind]:
                raise Refusal(406, f"invalid arg '{key}' for {called} of queue type rabbit_{kind}_queue")
    exchange = arguments.get("x-dead-letter-exchange", "")
    if not isinstance(exchange, str):
        raise Refusal(406, f"invalid type '{erlang_type(exchange)}' for arg 'x-dead-letter-exchange' in {called}")
    for key, check in _CHECKS.items():
        if key in arguments:
            problem = check(arguments[key], arguments)
            if problem is not None:
                raise Refusal(406, f"invalid arg '{key}' for {called}: {problem}")
    if kind != "classic":
        flags = {"non-durable": not durable, "exclusive-owner": exclusive, "auto-delete": auto_delete}
        for flag, is_set in flags.items():
            if is_set:
                raise Refusal(406, f"invalid property '{flag}' for {called}")


def assert_same(queue: Queue, vhost: str, arguments: Mapping[str, Any], **flags: bool) -> None:
    """Refuse a declaration that does not fit the *queue* that is there.

    Raises:
        Refusal: 406, with the first thing that differs.
    """
    called = queue_name(queue.name, vhost)
    for key, current in (("durable", queue.durable), ("auto_delete", queue.auto_delete)):
        if key in flags and flags[key] != current:
            raise inequivalent(key, called, flags[key], current)
    assert_same_arguments(queue.arguments, arguments, called, [*_ORDER, *sorted(ARGUMENTS[queue.type] - {*_ORDER})])


def assert_same_arguments(
    current: Mapping[str, Any], received: Mapping[str, Any], called: str, keys: list[str]
) -> None:
    """Refuse arguments that differ in one of *keys*."""
    for key in keys:
        old, new = current.get(key, _NONE), received.get(key, _NONE)
        if key == "x-queue-type":
            old, new = (("classic" if value is _NONE else value) for value in (old, new))
        if old is _NONE and new is _NONE:
            continue
        if _class(old) != _class(new) or old != new:
            if old is not _NONE and new is not _NONE:
                raise inequivalent(key, called, new, old)
            raise Refusal(
                406, f"inequivalent arg '{key}' for {called}: received {_typed(new)} but current is {_typed(old)}"
            )


def inequivalent(key: str, called: str, received: object, current: object) -> Refusal:
    """Two plain values that differ."""
    return Refusal(
        406, f"inequivalent arg '{key}' for {called}: received '{_plain(received)}' but current is '{_plain(current)}'"
    )


_NONE: Final = object()


def _class(value: object) -> str:
    kind = "" if value is _NONE else erlang_type(value)
    return "int" if kind in {"signedint", "long"} else kind


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _typed(value: object) -> str:
    return "none" if value is _NONE else f"the value '{_plain(value)}' of type '{erlang_type(value)}'"
