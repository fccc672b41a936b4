"""Who may do what: users, passwords, virtual hosts, permissions, limits. Pure.

Permissions are three regular expressions, as in RabbitMQ (https://www.rabbitmq.com/docs/access-control).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from leveret.exceptions import MessageDecodeError
from leveret.testing.refusals import Refusal, exchange_name, queue_name
from leveret.wire.tables import decode_table

if TYPE_CHECKING:
    from leveret.testing.dialect import Dialect

Verb = Literal["configure", "write", "read"]


class Permissions(NamedTuple):
    """Regular expressions for the names that a user may configure, write to and read from; ``""`` is none."""

    configure: str = ".*"
    write: str = ".*"
    read: str = ".*"


EVERYTHING: Final = Permissions()
MECHANISMS: Final = frozenset(("PLAIN", "AMQPLAIN", "ANONYMOUS", "EXTERNAL"))


@dataclass
class User:
    """One user.

    Attributes:
        permissions: by virtual host; without an entry, the user may not even connect to it.
        impersonates: whether the user may publish with another's ``user_id`` (RabbitMQ's tag ``impersonator``).
        max_channels, max_connections: ``None`` is no limit.
    """

    name: str
    password: str | None = field(repr=False)
    permissions: dict[str, Permissions] = field(default_factory=dict[str, Permissions])
    impersonates: bool = False
    max_channels: int | None = None
    max_connections: int | None = None


class Access:
    """The users and virtual hosts of a broker."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self.users: dict[str, User] = {}

    def authenticate(self, mechanism: str, response: bytes, certificate_name: str | None) -> User | None:
        """The user who logs in, or ``None`` when it is refused.

        Raises:
            ValueError: *response* is not what *mechanism* asks for.
        """
        if mechanism == "EXTERNAL":
            return None if certificate_name is None else self.users.get(certificate_name)
        if mechanism == "ANONYMOUS":
            return self.users.get("guest")
        name, password = _plain(response) if mechanism == "PLAIN" else _amqplain(response)
        user = self.users.get(name)
        return user if user is not None and user.password is not None and user.password == password else None

    def check(self, user: User, vhost: str, verb: Verb, name: str, *, is_queue: bool) -> None:
        """Refuse *verb* on a queue or an exchange.

        Raises:
            Refusal: 403.
        """
        permissions = user.permissions.get(vhost)
        pattern = "^$" if permissions is None else getattr(permissions, verb) or "^$"
        if pattern == ".*" or re.search(pattern, name or "amq.default"):
            return
        called = queue_name(name, vhost) if is_queue else exchange_name(name or "amq.default", vhost)
        what = f"{verb} access" if self._dialect.names_permission else "access"
        raise Refusal(403, f"{what} to {called} refused for user '{user.name}'")


def _plain(response: bytes) -> tuple[str, str]:
    parts = response.split(b"\0")
    if len(parts) != 3:
        raise ValueError("PLAIN is three strings with NUL between")
    return parts[1].decode("utf-8", "replace"), parts[2].decode("utf-8", "replace")


def _amqplain(response: bytes) -> tuple[str, str]:
    try:
        table = decode_table(len(response).to_bytes(4, "big") + response)[0]
    except MessageDecodeError as error:
        raise ValueError("AMQPLAIN is a field table") from error
    login, password = table.get("LOGIN"), table.get("PASSWORD")
    if not isinstance(login, str) or not isinstance(password, str):
        raise ValueError("AMQPLAIN needs LOGIN and PASSWORD")
    return login, password


def given_permissions(user: str, by_vhost: Mapping[str, Permissions | tuple[str, str, str]]) -> dict[str, Permissions]:
    """What *user* may do, by virtual host.

    Raises:
        TypeError: no three strings.
        ValueError: not three of them, or one that is no regular expression.
    """
    given: dict[str, Permissions] = {}
    for vhost, patterns in by_vhost.items():
        if not isinstance(patterns, tuple) or not all(isinstance(each, str) for each in patterns):
            raise TypeError(
                f"permissions of {user!r} on {vhost!r} must be Permissions(configure, write, read), not {patterns!r}"
            )
        if len(patterns) != 3:
            raise ValueError(f"permissions of {user!r} on {vhost!r} must be three patterns, not {patterns!r}")
        for verb, pattern in zip(Permissions._fields, patterns, strict=True):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"{verb} of {user!r} on {vhost!r} must be a regular expression, not {pattern!r}: {error}"
                ) from None
        given[vhost] = Permissions(*patterns)
    return given


def given_users(dialect: Dialect, users: Mapping[str, str], vhosts: tuple[str, ...]) -> Access:
    """The access that a broker begins with: *users* and their passwords, who may do everything."""
    access = Access(dialect)
    for name, password in users.items():
        access.users[name] = User(name, password, dict.fromkeys(vhosts, EVERYTHING))
    return access
