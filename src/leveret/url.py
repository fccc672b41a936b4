"""URLs and keywords → :class:`ConnectionParameters`.

Two dialects of query parameters are understood: aio-pika's, and the one of RabbitMQ's URI specification
(https://www.rabbitmq.com/docs/uri-query-parameters). :data:`_OPTIONS` is the whole list.

A password must not get out through an error: a URL that yarl refuses is never quoted, and yarl's own
exception, which may quote it, is neither the cause nor the context of the one that is raised.
"""

from __future__ import annotations

import inspect
import math
import re
import warnings
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias
from urllib.parse import unquote

from yarl import URL

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from leveret.types import SSLOptions

Auth: TypeAlias = Literal["plain", "amqplain", "external"]

PORT = 5672
TLS_PORT = 5671
_PORTS = {"amqp": PORT, "amqps": TLS_PORT}
_HIDDEN = "******"
_MECHANISMS = ("plain", "amqplain", "external")
_MIN_FRAME_MAX = 8192
"""RabbitMQ 4 refuses less, and the first frames are sent before anything is negotiated."""


class ConnectionParameters(NamedTuple):
    """Everything that is needed to connect to one server.

    Attributes:
        host: Host name or IP address.
        port: TCP port.
        login: User name.
        password: Its password; never in the ``repr``.
        virtualhost: Virtual host.
        ssl: Whether to speak TLS.
        auth: SASL mechanism.
        heartbeat: Seconds, 0 for no heartbeats, None to take what is negotiated.
        channel_max: How many channels to ask for; 0 means no limit of ours.
        frame_max: Largest frame to ask for, in bytes.
        name: What the management UI calls the connection (``connection_name``).
        connect_timeout: Seconds for each stage of connecting.
        operation_timeout: Seconds for each call that names no timeout; ``math.inf`` for no limit.
        cafile: PEM file of CA certificates to trust.
        capath: Directory of CA certificates to trust.
        cadata: CA certificates to trust, as PEM or as base64 of DER.
        certfile: PEM file of the client's certificate.
        keyfile: PEM file of its key, where that is not in ``certfile``.
        verify: Whether to verify the server's certificate and host name.
        server_hostname: Name to expect in the certificate; None means ``host``.
        interleave: See :meth:`asyncio.loop.create_connection`.
        happy_eyeballs_delay: See :meth:`asyncio.loop.create_connection`.
        reconnect_interval: Seconds between attempts to connect again; None for pauses that grow.
        fail_fast: Whether the first failure to connect at all is raised, rather than retried.
    """

    host: str = "localhost"
    port: int = PORT
    login: str = "guest"
    password: str = "guest"
    virtualhost: str = "/"
    ssl: bool = False
    auth: Auth = "plain"
    heartbeat: int | None = None
    channel_max: int = 2047
    frame_max: int = 131072
    name: str | None = None
    connect_timeout: float = 10
    operation_timeout: float = 30
    cafile: str | None = None
    capath: str | None = None
    cadata: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    verify: bool = True
    server_hostname: str | None = None
    interleave: int | None = None
    happy_eyeballs_delay: float | None = None
    reconnect_interval: float | None = None
    fail_fast: bool = True

    def __repr__(self) -> str:
        values = self._asdict().items()
        shown = (f"{name}={_HIDDEN if value and _is_secret(name) else repr(value)}" for name, value in values)
        return f"{type(self).__name__}({', '.join(shown)})"


# ------------------------------------------------------------------------------------------ the query string


def _text(value: str) -> str:
    if not value:
        raise ValueError("a value that is not empty")
    return value


def _host_name(value: str) -> str:
    if value in {"", "disable"}:
        raise ValueError("a host name (SNI cannot be disabled)")
    return value


def _integer(low: int, high: int) -> Callable[[str], int]:
    def read(value: str) -> int:
        if not re.fullmatch(r"\d{1,10}", value, re.ASCII) or not low <= int(value) <= high:
            raise ValueError(f"an integer from {low} to {high}")
        return int(value)

    return read


def _seconds(value: str) -> float:
    return _duration(value, "seconds")


def _milliseconds(value: str) -> float:
    return _duration(value, "milliseconds") / 1000


def _duration(value: str, unit: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not number > 0:
        raise ValueError(f"a number of {unit} over 0, or inf")
    return number


def _mechanism(value: str) -> str:
    if value.lower() not in _MECHANISMS:
        raise ValueError(" or ".join(_MECHANISMS))
    return value.lower()


def _verify(value: str) -> bool:
    if value in {"verify_peer", "1", "true"}:
        return True
    if value in {"verify_none", "0", "false"}:
        return False
    raise ValueError("verify_peer or verify_none")


def _no_verify(value: str) -> bool:
    # As in aio-pika, anything but a plain no switches verification off.
    return value.lower() in {"0", "false"}


def _interval(value: str) -> float:
    return 0.0 if value in {"0", "0.0"} else _seconds(value)


def _yes(value: str) -> bool:
    # What aio-pika takes for a yes; it takes anything else for a no.
    if value.lower() in {"true", "yes", "y", "enable", "on", "enabled", "1"}:
        return True
    if value.lower() in {"false", "no", "n", "disable", "off", "disabled", "0"}:
        return False
    raise ValueError("1 or 0")


def _ignored(value: str) -> None:
    return None


_OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    # leveret's own, named as the attributes of ConnectionParameters
    "auth": ("auth", _mechanism),
    "cadata": ("cadata", _text),
    "cafile": ("cafile", _text),
    "capath": ("capath", _text),
    "certfile": ("certfile", _text),
    "channel_max": ("channel_max", _integer(0, 65535)),
    "connect_timeout": ("connect_timeout", _seconds),
    "frame_max": ("frame_max", _integer(_MIN_FRAME_MAX, 0xFFFF_FFFF)),
    "happy_eyeballs_delay": ("happy_eyeballs_delay", _interval),
    "heartbeat": ("heartbeat", _integer(0, 65535)),
    "interleave": ("interleave", _integer(0, 65535)),
    "keyfile": ("keyfile", _text),
    "name": ("name", _text),
    "operation_timeout": ("operation_timeout", _seconds),
    "server_hostname": ("server_hostname", _host_name),
    "verify": ("verify", _verify),
    # aio-pika's other names
    "no_verify_ssl": ("verify", _no_verify),
    "timeout": ("connect_timeout", _seconds),
    "fail_fast": ("fail_fast", _yes),
    "reconnect_interval": ("reconnect_interval", _interval),
    # RabbitMQ's other names
    "auth_mechanism": ("auth", _mechanism),
    "cacertfile": ("cafile", _text),
    "connection_name": ("name", _text),
    "connection_timeout": ("connect_timeout", _milliseconds),
    "server_name_indication": ("server_hostname", _host_name),
}
"""Query parameter → attribute, and its reader: a ValueError from it says what is expected."""


def _options(query: Mapping[str, str]) -> dict[str, Any]:
    """The attributes that *query* gives."""
    attributes: dict[str, Any] = {}
    for key in query:
        # Asked for by name, because a key that is given twice counts with its first value, as in aio-pika.
        value = query[key]
        attribute, read = _OPTIONS.get(key, ("", _ignored))
        if key not in _OPTIONS:
            warn_user(_unknown(key))
        try:
            result = read(value)
        except ValueError as error:
            expected = str(error)
        else:
            if attribute:
                attributes[attribute] = result
            continue
        shown = _HIDDEN if _is_secret(key) else value
        raise ValueError(f"{key}={shown} in the URL: expected {expected}")
    if not attributes.get("verify", True):
        warn_user("the URL switches off the verification of the server's certificate: anybody can pose as the server")
    return attributes


def _unknown(key: str) -> str:
    if not re.fullmatch(r"[\w.-]+", key):
        # Nobody names a parameter so: it is the rest of a password, behind its `?`.
        return "the URL has a parameter with an odd name: percent-encode # ? / @ in the user name and password"
    import difflib  # most users never need it

    nearest = difflib.get_close_matches(key, _OPTIONS, n=1)
    advice = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(sorted(_OPTIONS))}"
    return f"unknown parameter {key!r}, in the URL or beside it: {advice}"


def warn_user(text: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the first line outside leveret."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith("leveret."):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, category, stacklevel=level)


def _is_secret(key: str) -> bool:
    return key == "cadata" or re.search("passw|passphrase|secret|token", key, re.IGNORECASE) is not None


class ConnectionParameter(NamedTuple):
    """A query parameter of the URL, as aio-pika describes it.

    Attributes:
        name: of the parameter.
        parser: what makes its value of the text; a ValueError says that it cannot.
        default: what it is where it is not given, or not valid.
        is_kwarg: whether it is in ``connection.kwargs``, or else an attribute of a robust connection.
    """

    name: str
    parser: Callable[[str], Any]
    default: str | None = None
    is_kwarg: bool = False

    def parse(self, value: str | None) -> Any:
        """What *value* stands for; the default for None, and for what makes no sense."""
        if value is None:
            return self.default
        try:
            return self.parser(value)
        except ValueError:
            return self.default


PARAMETERS = tuple(
    ConnectionParameter(name, reader, is_kwarg=name not in {"fail_fast", "reconnect_interval"})
    for name, (_, reader) in _OPTIONS.items()
)
"""All that leveret knows."""


# --------------------------------------------------------------------------------------------------- public


def make_url(
    url: URL | str | None = None,
    *,
    host: str = "localhost",
    port: int = PORT,
    login: str = "guest",
    password: str = "guest",
    virtualhost: str = "/",
    ssl: bool = False,
    ssl_options: SSLOptions | None = None,
    client_properties: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> URL:
    """Build one URL from what ``connect()`` takes.

    Args:
        url: Given, it stands for all up to *ssl*, which are ignored with a warning; the rest is added to its query.
        host: Host name or IP address.
        port: TCP port. With *ssl*, 5672 becomes 5671, which is where brokers speak TLS; for TLS on
            5672 give a URL (``amqps://host:5672``).
        login: User name.
        password: Its password.
        virtualhost: Virtual host, as it is: nothing is percent-decoded.
        ssl: Whether to speak TLS.
        ssl_options: TLS files, as query parameters.
        client_properties: Not part of the URL; ignored.
        kwargs: More query parameters. None means not given, True and False become 1 and 0.

    Raises:
        ValueError: *url* is none.
    """
    given: dict[str, Any] = {**kwargs, **(ssl_options or {})}
    query = {
        key: str(int(value)) if isinstance(value, bool) else str(value)
        for key, value in given.items()
        if value is not None
    }
    if url is not None:
        parts = {"host": (host, "localhost"), "port": (port, PORT), "login": (login, "guest")}
        parts |= {"password": (password, "guest"), "virtualhost": (virtualhost, "/"), "ssl": (ssl, False)}
        if ignored := [name for name, (value, default) in parts.items() if value != default]:
            warn_user(f"{', '.join(ignored)} beside a URL: put it into the URL, or give the parts and no URL")
        url = _url(url)
        return url.update_query(query) if query else url
    return URL.build(
        scheme="amqps" if ssl else "amqp",
        host=host,
        port=TLS_PORT if ssl and port == PORT else port,
        user=login,
        password=password,
        path=f"/{virtualhost}",
        query=query,
    )


def make_urls(url: URL | str | Sequence[URL | str] | None, **kwargs: Any) -> list[URL]:
    """As :func:`make_url`, for one URL, a list of them, or one that names several hosts, with commas between.

    Raises:
        ValueError: a URL is none, a host is missing, or the list is empty.
    """
    if url is None or isinstance(url, URL):
        return [make_url(url, **kwargs)]
    given = [url] if isinstance(url, str) else list(url)
    if not given:
        raise ValueError("an empty list of URLs: give at least one")
    single = [one for some in given for one in (_split_hosts(some) if isinstance(some, str) else [some])]
    return [make_url(one, **kwargs) for one in single]


def _split_hosts(url: str) -> list[str]:
    """``amqp://user:password@one:5672,two/vhost`` as one URL for each host."""
    scheme, separator, rest = url.partition("://")
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    user, at, hosts = authority.rpartition("@")
    if "," not in hosts:
        return [url]
    if not all(hosts.split(",")):
        raise ValueError("the URL has a comma without a host beside it")
    return [f"{scheme}{separator}{user}{at}{host}{rest[len(authority) :]}" for host in hosts.split(",")]


def parse_url(url: URL | str) -> ConnectionParameters:
    """Read a URL of the form ``amqp[s]://user:password@host:port/vhost?option=value``.

    What is left out is guest, guest, localhost, 5672 (amqps: 5671) and ``/``. The vhost is the path
    without its first slash, so write a slash in it as ``%2F``; as in aio-pika an empty path, ``/`` and
    ``//`` all mean the vhost ``/``.

    Raises:
        ValueError: The URL or one of its values is wrong; says which, and what is expected.

    Warns:
        UserWarning: The URL has a parameter that leveret does not know, or switches off verification.
    """
    url = _url(url)
    if url.scheme not in _PORTS:
        raise ValueError(
            f"the URL's scheme is {url.scheme!r}, but leveret speaks amqp and amqps: write amqp://host:port/vhost"
        )
    if url.raw_user is None and _MISPLACED_USER.search(str(url).partition("://")[2]):
        raise ValueError("the URL has an @ behind its host: percent-encode # ? / @ in the user name and password")
    if url.raw_path and not url.raw_path.startswith("/"):
        raise ValueError(f"the URL lacks two slashes: write {url.scheme}://host:port/vhost")
    port = _PORTS[url.scheme] if url.explicit_port is None else url.explicit_port
    if not port:
        raise ValueError("port 0 in the URL: expected 1 to 65535")
    return ConnectionParameters(
        host=url.host or "localhost",
        port=port,
        login=url.user or "guest",
        password=url.password or "guest",
        # `path` would decode a second time what `%25` stood for.
        virtualhost=unquote(url.raw_path[1:]) or "/",
        ssl=url.scheme == "amqps",
        **_options(url.query),
    )


def redact(url: URL) -> str:
    """*url* as text, with its password and the secrets in its query replaced by ``******``."""
    if url.raw_password:
        url = url.with_password(_HIDDEN)
    return str(url.update_query({key: _HIDDEN for key in url.query if _is_secret(key) or key not in _OPTIONS}))


_MISPLACED_AT = re.compile(r"[^:/?#]*://[^]\[:/?#@]*:[^/?#@]*[/?#].*@", re.DOTALL)
"""A port, no user, and an @ later on: ``amqp://user:12/34@host`` would connect to the host ``user``."""


_MISPLACED_USER = re.compile(r"[/?#][^:@]*:[^@]*@")
"""No user, and what looks like the rest of one later on: ``amqp://us#er:secret@host`` would connect to ``us``."""


def _url(url: URL | str) -> URL:
    if isinstance(url, URL):
        return url
    if not _MISPLACED_AT.match(url):
        try:
            return URL(url)
        except ValueError:
            pass  # Raised below, where yarl's error, which may quote the password, is no longer its context.
    authority = re.split("[/?#]", url.partition("://")[2], maxsplit=1)[0]
    if "," in authority.rpartition("@")[2]:
        raise ValueError("several hosts are for connect_robust(): connect() takes one")
    raise ValueError(
        "the URL cannot be read: its host or its port (1 to 65535) is wrong; "
        "percent-encode # ? / @ in the user name and password, and @ wherever else it stands"
    )
