"""A message as the broker keeps it: the bytes that came, looked into only where something depends on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from leveret.testing.refusals import Refusal
from leveret.wire.codec import Properties, decode_properties, decode_route, encode_properties, encode_shortstr

if TYPE_CHECKING:
    from collections.abc import Mapping

    from leveret.types import FieldValue

HAS_HEADERS: Final = 0x2000
HAS_DELIVERY_MODE: Final = 0x1000
HAS_PRIORITY: Final = 0x0800
HAS_REPLY_TO: Final = 0x0200
HAS_EXPIRATION: Final = 0x0100
HAS_USER_ID: Final = 0x0010

_ROUTES: dict[bytes, tuple[str, str]] = {}
_LAST_TTL: Final = 315_360_000_000
"""Ten years in milliseconds: RabbitMQ takes no more."""


def names_of(route: bytes) -> tuple[str, str]:
    """Exchange and routing key of an encoded *route*; the same ones come again and again."""
    names = _ROUTES.get(route)
    if names is None:
        if len(_ROUTES) > 4096:
            _ROUTES.clear()
        names = _ROUTES[route] = decode_route(route)
    return names


class Stored:
    """One message, shared by all queues that it was routed to.

    Attributes:
        route: exchange and routing key, encoded as they stand in ``basic.publish`` and ``basic.deliver``.
        properties: flags and values as they stand in the content header.
        also: further routing keys (``CC``).
        blind: those (``BCC``) that nobody is to see.
        failures: of a dead letter, how often its delivery has failed, as far as that counts.
    """

    __slots__ = ("also", "blind", "body", "failures", "properties", "route")

    def __init__(self, route: bytes, properties: bytes, body: bytes, also: tuple[str, ...] = ()) -> None:
        self.route = route
        self.properties = properties
        self.body = body
        self.also = also
        self.blind: tuple[str, ...] = ()
        self.failures = 0

    @classmethod
    def of(cls, exchange: str, routing_key: str, properties: Properties, body: bytes) -> Stored:
        """A message of values."""
        return cls(encode_route(exchange, routing_key), encode_properties(properties), body)

    def __repr__(self) -> str:
        return f"<Stored {self.exchange!r} {self.routing_key!r} {len(self.body)} bytes>"

    @property
    def exchange(self) -> str:
        """Where it was published to."""
        return names_of(self.route)[0]

    @property
    def routing_key(self) -> str:
        """With what it was published."""
        return names_of(self.route)[1]

    @property
    def flags(self) -> int:
        """Which properties there are."""
        return self.properties[0] << 8 | self.properties[1]

    def decoded(self) -> Properties:
        """The properties; of malformed headers, none."""
        return decode_properties(self.properties).properties

    @property
    def headers(self) -> Mapping[str, FieldValue]:
        """The headers; empty where there are none, or malformed ones."""
        return (self.decoded().headers or {}) if self.flags & HAS_HEADERS else {}

    @property
    def priority(self) -> int:
        """The priority, 0 without one."""
        return (self.decoded().priority or 0) if self.flags & HAS_PRIORITY else 0

    @property
    def is_persistent(self) -> bool:
        """Whether it would be on disk."""
        return bool(self.flags & HAS_DELIVERY_MODE) and self.decoded().delivery_mode == 2

    @property
    def ttl(self) -> float | None:
        """The seconds of its ``expiration``, ``None`` without one."""
        if not self.flags & HAS_EXPIRATION:
            return None
        expiration = self.decoded().expiration  # malformed properties have the flag, and nothing behind it
        return None if expiration is None else int(expiration) / 1000

    def changed(self, **properties: Any) -> Stored:
        """The same message with other properties."""
        changed = Stored(self.route, encode_properties(self.decoded()._replace(**properties)), self.body, self.also)
        changed.blind = self.blind
        return changed

    def with_headers(self, headers: Mapping[str, FieldValue]) -> bytes:
        """Its properties with more *headers*; as they are when malformed."""
        found = decode_properties(self.properties)
        if found.error is not None:
            return self.properties
        merged: dict[str, FieldValue] = dict(found.properties.headers or {})
        merged.update(headers)
        return encode_properties(found.properties._replace(headers=merged))


def encode_route(exchange: str, routing_key: str) -> bytes:
    """The two names as they stand in ``basic.publish``, ``basic.deliver`` and ``basic.return``."""
    return encode_shortstr(exchange, "exchange name") + encode_shortstr(routing_key, "routing key")


class Entry:
    """One message in one queue.

    Attributes:
        position: its place; smaller is earlier.
        expires_at: the clock's time, ``None`` is never.
        redelivered: whether it was delivered before.
        returns: how often it came back to a quorum queue.
        failures: how often its delivery has failed, here and where it was before as a dead letter.
    """

    __slots__ = ("expires_at", "failures", "message", "position", "priority", "redelivered", "returns")

    def __init__(self, message: Stored, position: int, priority: int, expires_at: float | None) -> None:
        self.message = message
        self.position = position
        self.priority = priority
        self.expires_at = expires_at
        self.redelivered = False
        self.returns = 0
        self.failures = message.failures

    def __lt__(self, other: Entry) -> bool:
        return self.position < other.position


def check_user(message: Stored, user: str, *, may_impersonate: bool) -> None:
    """Refuse a ``user_id`` that is somebody else's.

    Raises:
        Refusal: 406, and the channel closes.
    """
    if not message.flags & HAS_USER_ID:
        return
    claimed = message.decoded().user_id
    if claimed != user and not may_impersonate:
        raise Refusal(406, f"user_id property set to '{claimed}' but authenticated user was '{user}'")


def check_expiration(text: str) -> None:
    """Refuse an ``expiration`` that is no number of milliseconds."""
    digits = text[1:] if text[:1] in "+-" else text
    number = len(digits) - len(digits.lstrip("0123456789"))
    if not number:
        problem = "no_integer"
    elif number < len(digits):
        problem = f'{{leftover_string,"{digits[number:]}"}}'
    elif int(text) < 0:
        problem = f"{{value_negative,{int(text)}}}"
    elif int(text) > _LAST_TTL:
        problem = f"{{value_too_large,{int(text)}}}"
    else:
        return
    raise Refusal(406, f"invalid expiration '{text}': {problem}")


def copies(message: Stored) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The routing keys in ``CC`` and in ``BCC``.

    Raises:
        Refusal: 406: one of them is no array of strings.
    """
    keys: list[tuple[str, ...]] = []
    headers = message.headers
    for name in ("CC", "BCC"):
        value = headers.get(name)
        if value is None:
            value = []
        if not isinstance(value, list):
            raise Refusal(406, f'invalid message: {{unacceptable_type_in_header,"{name}",{erlang_type(value)}}}')
        keys.append(tuple(item for item in value if isinstance(item, str)))
    return keys[0], keys[1]


def erlang_type(value: object) -> str:
    """What RabbitMQ calls the AMQP type of *value*."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "signedint" if -0x8000_0000 <= value <= 0x7FFF_FFFF else "long"
    names = {str: "longstr", float: "double", bytes: "binary", list: "array", dict: "table", type(None): "void"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), "timestamp")
