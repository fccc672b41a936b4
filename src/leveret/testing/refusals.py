"""How the broker says no: a reply code and RabbitMQ's own words, raised wherever the rule is known.

A :class:`Refusal` closes the channel or the connection that it happens on. Which of them is not told by the code
alone: an unknown exchange type closes the connection of RabbitMQ 3.10, and the channel of 4.x.
"""

from __future__ import annotations

from typing import Final

NAMES: Final = {
    311: "CONTENT_TOO_LARGE",
    312: "NO_ROUTE",
    313: "NO_CONSUMERS",
    320: "CONNECTION_FORCED",
    402: "INVALID_PATH",
    403: "ACCESS_REFUSED",
    404: "NOT_FOUND",
    405: "RESOURCE_LOCKED",
    406: "PRECONDITION_FAILED",
    501: "FRAME_ERROR",
    502: "SYNTAX_ERROR",
    503: "COMMAND_INVALID",
    504: "CHANNEL_ERROR",
    505: "UNEXPECTED_FRAME",
    506: "RESOURCE_ERROR",
    530: "NOT_ALLOWED",
    540: "NOT_IMPLEMENTED",
    541: "INTERNAL_ERROR",
}
"""Reply codes of AMQP 0-9-1 and RabbitMQ."""
_SOFT: Final = frozenset((311, 312, 313, 403, 404, 405, 406))


def check_code(code: int) -> int:
    """*code*, if it is one of `NAMES`.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(code, int) or code not in NAMES:
        raise ValueError(f"code must be an AMQP reply code ({', '.join(map(str, NAMES))}), not {code!r}")
    return code


class Refusal(Exception):
    """What a client asked for cannot be.

    Args:
        code: a reply code of `NAMES`.
        sentence: what is wrong, in RabbitMQ's words; the name of the code is put before it.
        closes_connection: whether the connection goes with it; ``None`` lets the code decide.
        class_id, method_id: the guilty method, where it is not the one that is being handled.
    """

    def __init__(
        self,
        code: int,
        sentence: str,
        *,
        closes_connection: bool | None = None,
        class_id: int | None = None,
        method_id: int | None = None,
    ) -> None:
        self.code = code
        self.text = fit(f"{NAMES[code]} - {sentence}") if sentence else NAMES[code]
        self.closes_connection = code not in _SOFT if closes_connection is None else closes_connection
        self.class_id = class_id
        self.method_id = method_id
        super().__init__(self.text)


def fit(text: str) -> str:
    """*text* as a short string can carry it; RabbitMQ ends what it cuts with three dots."""
    if len(text.encode("utf-8", "surrogateescape")) <= 255:
        return text
    return text.encode("utf-8", "surrogateescape")[:252].decode("utf-8", "ignore") + "..."


def queue_name(name: str, vhost: str) -> str:
    """A queue as errors call it."""
    return f"queue '{name}' in vhost '{vhost}'"


def exchange_name(name: str, vhost: str) -> str:
    """An exchange as errors call it."""
    return f"exchange '{name}' in vhost '{vhost}'"


def octets(data: bytes) -> str:
    """*data* as Erlang prints a binary that is no text."""
    return f"<<{','.join(map(str, data))}>>"
