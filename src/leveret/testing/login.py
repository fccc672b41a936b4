"""How a connection to the broker begins: greeting, login, tuning, virtual host. One function a step.

RabbitMQ is curt here: whoever breaks a rule before the connection is open sees it hang up, with a few exceptions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from pamqp.commands import Connection

from leveret.testing.refusals import Refusal
from leveret.wire.methods import make

if TYPE_CHECKING:
    from leveret.testing.session import Session


def greet(session: Session) -> None:
    """The client speaks AMQP: say who we are."""
    session.stage = "start"
    session.send_method(
        0,
        make(
            Connection.Start,
            version_major=0,
            version_minor=9,
            server_properties=session.server.dialect.server_properties(),
            mechanisms=" ".join(_mechanisms(session)),
            locales="en_US",
        ),
    )


def _mechanisms(session: Session) -> tuple[str, ...]:
    by_tls = session.about("ssl_object") is not None
    return tuple(each for each in session.server.dialect.mechanisms if by_tls or each != "EXTERNAL")


def _certificate_name(session: Session) -> str | None:
    """The common name in the client's certificate, if it showed one."""
    certificate = cast("Mapping[str, Any]", session.about("peercert") or {})
    subject: tuple[tuple[tuple[str, str], ...], ...] = certificate.get("subject", ())
    return next((value for part in subject for key, value in part if key == "commonName"), None)


def on_start_ok(session: Session, method: Connection.StartOk) -> None:
    """Who it is."""
    session.client_properties = cast("Mapping[str, Any]", method.client_properties)
    session.mechanism = method.mechanism
    if method.mechanism not in _mechanisms(session):
        session.abort()
        return
    try:
        response = method.response.encode("utf-8", "surrogateescape")
        user = session.server.access.authenticate(method.mechanism, response, _certificate_name(session))
    except ValueError:
        session.abort()
        return
    if user is None:
        if session.understands("authentication_failure_close"):
            raise Refusal(
                403,
                f"Login was refused using authentication mechanism {method.mechanism}. For details see the broker "
                "logfile.",
                closes_connection=True,
                class_id=0,
                method_id=0,
            )
        session.abort()
        return
    session.user = user
    session.stage = "tune"
    server = session.server
    session.send_method(
        0,
        make(
            Connection.Tune,
            channel_max=server.channel_max,
            frame_max=server.frame_max,
            heartbeat=server.heartbeat,
        ),
    )


def _is_agreed(wanted: int, offered: int, least: int) -> bool:
    """Whether a client may want that; 0 is no limit, which it may want where none is offered."""
    if wanted == 0:
        return offered == 0
    return least <= wanted and (offered == 0 or wanted <= offered)


def on_tune_ok(session: Session, method: Connection.TuneOk) -> None:
    """How large, how many, how often."""
    server = session.server
    if not (
        _is_agreed(method.frame_max, server.frame_max, server.dialect.min_frame_max)
        and _is_agreed(method.channel_max, server.channel_max, 1)
    ):
        session.abort()
        return
    session.frame_max = method.frame_max or server.largest_frame
    session.channel_max = method.channel_max or 65_535
    session.heartbeat = method.heartbeat
    session.tuned()
    session.stage = "open"


def on_open(session: Session, method: Connection.Open) -> None:
    """Which virtual host."""
    name, user, server = method.virtual_host, session.user, session.server
    vhost = server.vhosts.get(name)
    if vhost is None:
        raise Refusal(530, f"vhost {name} not found")
    if name not in user.permissions:
        raise Refusal(530, f"access to vhost '{name}' refused for user '{user.name}'")
    limit = user.max_connections
    if limit is not None and server.connections_of(user) >= limit:
        raise Refusal(530, f"connection refused for user '{user.name}': user connection limit ({limit}) is reached")
    session.vhost = vhost
    session.stage = "running"
    session.send_method(0, make(Connection.OpenOk, known_hosts=""))
