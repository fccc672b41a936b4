"""How a connection begins: start → tune → open (AMQP 0-9-1 §2.2.4).

::

    the server sends      we answer           and wait for
    -                     protocol header     connection.start
    connection.start      start-ok            connection.tune
    connection.tune       tune-ok, open       connection.open-ok
    connection.open-ok    -                   nothing: done

A :class:`Handshake` is told each method and gives the bytes to send; it does no I/O and knows no time. Brokers are
curt here: a login, a limit or a header that they dislike often gets no answer but a closed socket. So what a loss or
a silence means depends on how far we got, and :meth:`Handshake.lost`, :meth:`Handshake.overdue` and
:meth:`Handshake.explain` put it in words.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Final

from pamqp.commands import Connection

from leveret._version import __version__
from leveret.exceptions import (
    AMQPConnectionError,
    AuthenticationError,
    ConnectTimeout,
    IncompatibleProtocolError,
    LoginRefused,
    MessageTooLarge,
    ProbableAuthenticationError,
    ProtocolError,
    connection_closed,
)
from leveret.wire.codec import MIN_FRAME_MAX
from leveret.wire.methods import encode_method, make
from leveret.wire.tables import EncodedTable, encode_table

if TYPE_CHECKING:
    from pamqp.base import Frame

    from leveret.types import FieldValue
    from leveret.url import ConnectionParameters

PROTOCOL_HEADER: Final = b"AMQP\x00\x00\x09\x01"

_HEARTBEAT = 60
"""Seconds that we propose where the user has no wish."""
_CHANNEL_MAX = 65_535
"""What "no limit" means: channel numbers have 16 bits (§2.3.5)."""

_CAPABILITIES: Final[Mapping[str, FieldValue]] = MappingProxyType(
    {
        # What a client may announce (https://www.rabbitmq.com/docs/connections#capabilities); others, such as
        # per_consumer_qos, are the server's to announce.
        "authentication_failure_close": True,
        "basic.nack": True,
        "connection.blocked": True,
        "consumer_cancel_notify": True,
        "exchange_exchange_bindings": True,
        "publisher_confirms": True,
    }
)

_OURS: Final[Mapping[str, FieldValue]] = MappingProxyType(
    {
        "product": "leveret",
        "version": __version__,
        "platform": f"Python {platform.python_version()}",
        "information": "An asyncio client for AMQP 0-9-1",
        "capabilities": _CAPABILITIES,
    }
)

_SENT_BY_AMQP = (b"\x01\x00\x00", b"\x00\x0a")
"""How a method frame on channel 0 begins, and how its payload does: class 10, connection."""
_SENT_BY_TLS = (b"\x15\x03", b"\x16\x03")
"""How a TLS alert begins, and a TLS handshake record."""


class _Secret(bytes):
    """Bytes that hold a password, and do not show it."""

    def __repr__(self) -> str:
        return "b'******'"

    __str__ = __repr__


class Handshake:
    """One run through the table above.

    Attributes:
        server_properties: what the server says of itself.
        server_capabilities: the optional features among it.
        mechanisms: the SASL mechanisms that the server offers.
        frame_max: largest frame in bytes, negotiated.
        channel_max: highest channel number, negotiated.
        heartbeat: seconds, negotiated; 0 is off.

    Raises:
        TypeError, ValueError: *parameters* or *client_properties* hold what AMQP cannot carry. Told here,
            before there is a socket.
    """

    def __init__(
        self, parameters: ConnectionParameters, client_properties: Mapping[str, FieldValue] | None = None
    ) -> None:
        self.server_properties: dict[str, FieldValue] = {}
        self.server_capabilities: Mapping[str, bool] = {}
        self.mechanisms: tuple[str, ...] = ()
        self.frame_max = MIN_FRAME_MAX
        self.channel_max = _limit(parameters.channel_max)
        self.heartbeat = _HEARTBEAT if parameters.heartbeat is None else parameters.heartbeat
        self._parameters = parameters
        self._mechanism = parameters.auth.upper()
        self._expected: type[Frame] | None = Connection.Start
        start_ok = make(
            Connection.StartOk,
            client_properties=_client_properties(parameters.name, client_properties),
            mechanism=self._mechanism,
            response=_RESPONSES[self._mechanism](parameters),
        )
        self._start_ok = _Secret(encode_method(0, start_ok))
        self._open = encode_method(0, make(Connection.Open, virtual_host=parameters.virtualhost))
        self._tune_ok()  # raises, if it cannot be said
        if (size := len(self._start_ok)) > MIN_FRAME_MAX:
            raise MessageTooLarge(
                f"Connection.StartOk is {size} bytes, and {MIN_FRAME_MAX} are allowed before tuning: "
                "shorten client_properties or the password"
            )

    def __repr__(self) -> str:
        return f"<Handshake with {self._peer}: {self.stage}>"

    @property
    def done(self) -> bool:
        """Whether the connection is open."""
        return self._expected is None

    @property
    def stage(self) -> str:
        """Where we are, in words for an error."""
        if self._expected is None:
            return "done"
        stage = f"waiting for {_NAMES[self._expected]}"
        return f"{stage} ({self._wishes})" if self._expected is Connection.OpenOk else stage

    @property
    def _peer(self) -> str:
        return f"{self._parameters.host}:{self._parameters.port}"

    @property
    def _wishes(self) -> str:
        return (
            f"vhost {self._parameters.virtualhost!r}, frame_max {self.frame_max}, "
            f"channel_max {self.channel_max}, heartbeat {self.heartbeat}"
        )

    # --------------------------------------------------------------------------------------------- the table

    def receive(self, method: Frame) -> bytes:
        """What to send in answer to *method*: complete frames, or nothing.

        A ``connection.close`` is raised as the error that it stands for; its close-ok is the caller's to send.

        Raises:
            LoginRefused: the broker refused the login (403).
            ConnectionClosed: it closed the connection for another reason, 530 for the vhost among them.
            AuthenticationError: there is no way to log in that both sides know.
            IncompatibleProtocolError: the server speaks another version of AMQP.
            AMQPConnectionError: the server's frames are too small for RabbitMQ's own rules.
            ProtocolError: *method* has no place here.
        """
        if isinstance(method, Connection.Close):
            raise self._closed(method)
        if isinstance(method, Connection.Secure) and self._expected is Connection.Tune:
            raise AuthenticationError(
                f"{self._peer} sent a challenge (connection.secure), which {self._mechanism} does not have"
            )
        if self._expected is None or not isinstance(method, self._expected):
            raise ProtocolError(f"{method.name} came while {self.stage}", reply_code=503)
        step, expected = self._TABLE[self._expected]
        answer = step(self, method)
        self._expected = expected
        return answer

    def _on_start(self, start: Connection.Start) -> bytes:
        self.server_properties = start.server_properties  # type: ignore[assignment]
        self.server_capabilities = _flags(self.server_properties.get("capabilities"))
        self.mechanisms = tuple(start.mechanisms.split())
        if (start.version_major, start.version_minor) != (0, 9):
            raise IncompatibleProtocolError(
                f"{self._peer} speaks AMQP {start.version_major}-{start.version_minor}, not 0-9-1"
            )
        if self._mechanism not in self.mechanisms:
            raise AuthenticationError(
                f"{self._peer} does not offer the SASL mechanism {self._mechanism}: it offers "
                f"{', '.join(self.mechanisms) or 'none'}; leveret has {', '.join(_RESPONSES)} (auth=…)"
            )
        return self._start_ok

    def _on_tune(self, tune: Connection.Tune) -> bytes:
        wanted = self._parameters
        self.frame_max = min(tune.frame_max or wanted.frame_max, wanted.frame_max)
        if self.frame_max < MIN_FRAME_MAX:
            raise AMQPConnectionError(
                f"{self._peer} allows frames of {tune.frame_max} bytes (frame_max); "
                f"leveret was told to use {wanted.frame_max}, and needs at least {MIN_FRAME_MAX}"
            )
        self.channel_max = min(_limit(tune.channel_max), _limit(wanted.channel_max))
        if wanted.heartbeat is None:
            # The smaller of both; but 0 is no wish of the server's, and leaves it to us.
            self.heartbeat = min(tune.heartbeat or _HEARTBEAT, _HEARTBEAT)
        # There is no answer to tune-ok, so open goes with it.
        return self._tune_ok() + self._open

    def _on_open_ok(self, open_ok: Connection.OpenOk) -> bytes:
        return b""

    _TABLE: ClassVar[dict[type[Frame], tuple[Callable[[Handshake, Any], bytes], type[Frame] | None]]] = {
        Connection.Start: (_on_start, Connection.Tune),
        Connection.Tune: (_on_tune, Connection.OpenOk),
        Connection.OpenOk: (_on_open_ok, None),
    }
    """What we wait for → what to do then, and what to wait for next."""

    def _tune_ok(self) -> bytes:
        agreed = {"channel_max": self.channel_max, "frame_max": self.frame_max, "heartbeat": self.heartbeat}
        return encode_method(0, make(Connection.TuneOk, **agreed))

    # --------------------------------------------------------------------------------------- what went wrong

    def _closed(self, close: Connection.Close) -> AMQPConnectionError:
        closed = connection_closed(close)
        if close.reply_code != 403:
            return closed
        refused = LoginRefused(f"the broker refused {self._login}: {close.reply_text}{self._advice}")
        refused.__cause__ = closed
        return refused

    @property
    def _login(self) -> str:
        wanted = self._parameters
        return f"the login of user {wanted.login!r} by {self._mechanism} (vhost {wanted.virtualhost!r})"

    @property
    def _advice(self) -> str:
        # https://www.rabbitmq.com/docs/access-control#loopback-users
        is_guest = self._parameters.login == "guest"
        return (
            " Note that guest may log in from localhost only, unless the broker is configured so." if is_guest else ""
        )

    def lost(self, error: Exception | None) -> AMQPConnectionError:
        """What it means that the connection ended now.

        Args:
            error: what the socket says; None for an end of file. It becomes the cause.
        """
        if self._expected is Connection.Start:
            lost = AMQPConnectionError(
                f"{self._peer} closed the connection before it said a word: is that an AMQP port?{self._tls_advice}"
            )
        elif self._expected is Connection.Tune:
            lost = ProbableAuthenticationError(
                f"{self._peer} closed the connection during {self._login}, "
                f"which RabbitMQ does when it refuses one.{self._advice}"
            )
        else:
            lost = AMQPConnectionError(
                f"{self._peer} closed the connection instead of opening it ({self._wishes}): "
                "it may not like one of these; its log says more"
            )
        lost.__cause__ = error
        return lost

    @property
    def _tls_advice(self) -> str:
        if self._parameters.ssl:  # since TLS 1.3 the server looks at it when the client thinks that all is done
            return " It may not accept the client's certificate, which TLS 1.3 tells after its handshake."
        return " Port 5671 usually speaks TLS: use amqps://." if self._speaks_plain_to_tls_port else ""

    @property
    def _speaks_plain_to_tls_port(self) -> bool:
        return self._parameters.port == 5671 and not self._parameters.ssl

    def overdue(self) -> ConnectTimeout:
        """What it means that nothing came for ``connect_timeout``."""
        return ConnectTimeout(
            f"{self._peer} accepted the connection, but {self.stage} "
            f"it did not answer within {self._parameters.connect_timeout:g} s"
        )

    def explain(self, data: bytes) -> IncompatibleProtocolError | None:
        """What answered, if *data*, its first bytes, are no AMQP frame.

        Returns:
            None where the peer does speak AMQP 0-9-1, or did before, so that the fault is another one.
        """
        if not data or self._expected is not Connection.Start or data.startswith(_SENT_BY_AMQP):
            return None
        return IncompatibleProtocolError(f"{self._peer} {_described(data)}")


_NAMES: dict[type[Frame], str] = {
    Connection.Start: "connection.start",
    Connection.Tune: "connection.tune",
    Connection.OpenOk: "connection.open-ok",
}


def _limit(channel_max: int) -> int:
    return channel_max or _CHANNEL_MAX


def _flags(capabilities: FieldValue) -> Mapping[str, bool]:
    if not isinstance(capabilities, Mapping):
        return {}
    return {name: value for name, value in capabilities.items() if isinstance(value, bool)}


def _client_properties(name: str | None, given: Mapping[str, FieldValue] | None) -> EncodedTable:
    """What we say of ourselves; the management UI shows it. The user's word wins."""
    if name is None and not given:
        return _ours()
    properties = dict(_OURS)
    if name is not None:
        properties["connection_name"] = name
    properties |= given or {}
    if isinstance(capabilities := properties["capabilities"], Mapping):
        properties["capabilities"] = {**_CAPABILITIES, **capabilities}
    return _encode_properties(properties)


def _encode_properties(properties: Mapping[str, FieldValue]) -> EncodedTable:
    return EncodedTable(encode_table(properties, what="Connection.StartOk client_properties"))


@functools.cache
def _ours() -> EncodedTable:
    return _encode_properties(_OURS)


def _described(data: bytes) -> str:
    if data.startswith(b"AMQP"):
        return f"speaks AMQP {'.'.join(map(str, data[5:8]))}, not 0-9-1"
    if data.startswith(_SENT_BY_TLS):
        return "speaks TLS: use amqps:// (usually port 5671)"
    if data.startswith(b"HTTP/"):
        line = data.splitlines()[0].decode("ascii", "backslashreplace")
        return f"answered {line!r}: is that the management port? AMQP is usually on 5672"
    return f"does not speak AMQP: its first bytes are {data[:32]!r}"


# ----------------------------------------------------------------------------------------- SASL mechanisms


def _plain(parameters: ConnectionParameters) -> bytes:
    """RFC 4616, with no identity but the user's own."""
    if "\0" in parameters.login + parameters.password:
        raise ValueError("login and password must not contain NUL, which separates them in PLAIN: use auth=amqplain")
    return _utf8(f"\0{parameters.login}\0{parameters.password}")


def _amqplain(parameters: ConnectionParameters) -> bytes:
    """A field table without its length (https://www.rabbitmq.com/docs/access-control#mechanisms)."""
    return encode_table({"LOGIN": parameters.login, "PASSWORD": parameters.password}, what="AMQPLAIN")[4:]


def _external(parameters: ConnectionParameters) -> bytes:
    """Nothing: the client's certificate says who we are."""
    return b""


def _utf8(secret: str) -> bytes:
    try:
        return secret.encode()
    except UnicodeEncodeError:
        # Not chained, because that exception holds the secret.
        pass
    raise ValueError("login and password must be valid text: they cannot be encoded as UTF-8")


# ANONYMOUS, which RabbitMQ 4 offers, is left out: nobody should log in as nobody by mistake.
_RESPONSES: dict[str, Callable[[ConnectionParameters], bytes]] = {
    "PLAIN": _plain,
    "AMQPLAIN": _amqplain,
    "EXTERNAL": _external,
}
