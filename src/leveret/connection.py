"""Connections: where a program starts."""

from __future__ import annotations

import asyncio
import functools
import ssl as ssl_module
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar, overload

from pamqp.commands import Connection as ConnectionMethods
from yarl import URL

from leveret.callbacks import CallbackCollection
from leveret.channel import CLOSE_TIMEOUT, Channel
from leveret.draining import Drainable, DrainReport, check_drain, drain_for
from leveret.exceptions import ChannelInvalidStateError, ConnectionClosed, ConnectTimeout, fresh
from leveret.lazy import pass_on
from leveret.lifecycle import Health
from leveret.log import get_logger, printable
from leveret.older import OlderConnection, choose_loop
from leveret.types import FieldValue, SSLOptions, TimeoutType
from leveret.url import PARAMETERS, ConnectionParameter, ConnectionParameters, parse_url, redact
from leveret.url import make_url as make_url
from leveret.wire.methods import make
from leveret.wire.tally import Tally
from leveret.wire.transport import Transport

if TYPE_CHECKING:
    from typing import Self

pass_on(__name__)
_log = get_logger(__name__)

C = TypeVar("C", bound="Connection")


class Connection(OlderConnection):
    """A connection to the broker. Get one from :func:`connect`.

    It closes itself at the end of ``async with``. When the broker or the network ends it, everything that waits on
    it raises, ``close_callbacks`` are told why, and it stays closed.

    Attributes:
        url: what it connects to, with the password in it; ``str(connection)`` hides that.
        close_callbacks: called with (connection, exception) when it is closed, by whomever.
        blocked_callbacks: called with (connection, reason) when the broker blocks publishers, for lack of memory or
            disk, and with (connection, None) when it lets them go on.
        connected: an ``asyncio.Event`` that is set while it is open.
        tally: what it has done so far, in numbers; :class:`~leveret.metrics.Metrics` reads them.

    https://www.rabbitmq.com/docs/connections
    """

    CHANNEL_CLASS: type[Channel] = Channel
    PARAMETERS: tuple[ConnectionParameter, ...] = PARAMETERS
    """What may stand in the query of the URL."""

    def __init__(
        self,
        url: URL | str,
        loop: asyncio.AbstractEventLoop | None = None,
        ssl_context: ssl_module.SSLContext | None = None,
        client_properties: Mapping[str, FieldValue] | None = None,
        **kwargs: Any,
    ) -> None:
        self.url = make_url(url, **kwargs)
        self.loop = choose_loop(loop)
        self.close_callbacks: CallbackCollection[Connection, [BaseException | None]] = CallbackCollection(self)
        self.blocked_callbacks: CallbackCollection[Connection, [str | None]] = CallbackCollection(self)
        self.connected = asyncio.Event()
        self._parameters = parse_url(self.url)
        self._ssl_context = ssl_context
        self._client_properties = client_properties
        self._transport: Transport | None = None
        self.tally = Tally()
        self._channels: set[Channel] = set()
        self._opening: asyncio.Task[Transport] | None = None
        self._close_called = False
        self._closed: asyncio.Future[bool] = self.loop.create_future()

    def __str__(self) -> str:
        return redact(self.url)

    def __repr__(self) -> str:
        return f'<{type(self).__name__}: "{self}">'

    # --------------------------------------------------------------------------------------- opening, closing

    async def connect(self, timeout: TimeoutType = None) -> None:
        """Connect and log in; :func:`connect` does it for you.

        Args:
            timeout: seconds for the whole; None leaves it at the limit for each stage (``connect_timeout``).

        Raises:
            RuntimeError: it is connected, or was closed.
            ConnectionClosed: :meth:`close` was called meanwhile.
            AMQPConnectionError: as :func:`connect`.
        """
        if self._opening is not None or self._transport is not None or self._close_called:
            raise RuntimeError("a Connection connects once; make another")
        self._warn_of_cleartext()
        self._opening = self.loop.create_task(self._open_transport(self._parameters, timeout), name="leveret connect")
        try:
            self._transport = transport = await self._opening
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._close_called and task is not None and not task.cancelling():
                raise normal_close() from None
            raise
        finally:
            self._opening = None
        if self._close_called:
            await transport.close(normal_close(), self.loop.time() + CLOSE_TIMEOUT)
        if not transport.is_open:  # closed or lost before this task came to run again
            raise transport.closed_error()
        self.connected.set()

    async def _open_transport(self, parameters: ConnectionParameters, timeout: TimeoutType) -> Transport:
        try:
            async with asyncio.timeout(timeout):
                return await Transport.connect(
                    parameters,
                    on_lost=self._on_lost,
                    on_blocked=self._on_blocked,
                    client_properties=self._client_properties,
                    ssl_context=self._ssl_context,
                    tally=self.tally,
                )
        except TimeoutError as exc:
            if isinstance(exc, ConnectTimeout):
                raise
            raise ConnectTimeout(f"not connected to {parameters.host}:{parameters.port} within {timeout:g} s") from None

    def _warn_of_cleartext(self) -> None:
        p = self._parameters
        if (
            not p.ssl
            and p.auth != "external"
            and not (p.host == "localhost" or p.host.startswith("127.") or p.host == "::1")
        ):
            _log.warning("%s: the password goes over the network in clear text; use amqps://", self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @overload
    async def close(self, exc: BaseException | None = None, *, timeout: float = ..., drain: None = None) -> None: ...

    @overload
    async def close(self, exc: BaseException | None = None, *, timeout: float = ..., drain: float) -> DrainReport: ...

    async def close(
        self, exc: BaseException | None = None, *, timeout: float = CLOSE_TIMEOUT, drain: float | None = None
    ) -> DrainReport | None:
        """Close it: end the callbacks, wait for outstanding confirms, shake hands.

        Without *drain*, callbacks that still run are cancelled, and their messages requeued. With it, the consumers
        of all channels are stopped first, as by :meth:`Consumer.stop`; what a callback awaits on this connection works
        as before until it ends. Publishes that are not confirmed by the deadline end as PublishOutcomeUnknown. It
        never takes longer than *drain* and *timeout* together, whatever the broker does, and may be called at any
        time, in any state, again, and from inside a callback. Called without *drain* while another call drains, it
        ends that.

        Args:
            exc: what ``close_callbacks`` and those who wait on the connection get; None for a ConnectionClosed.
            timeout: seconds for all but *drain*.
            drain: seconds that callbacks get to end by themselves; whoever iterates, too, to settle the message at
                hand. None to cancel them at once.

        Returns:
            What became of the work at hand, with *drain*; otherwise None.

        Raises:
            ValueError: *drain* is negative.

        Cancellation: the socket is closed at once.

        Reconnect: while the link is lost there is nothing to wait for, because what was not settled comes again.
        """
        if drain is None:
            await self._close(exc, timeout)
            return None
        check_drain(drain)
        return await drain_for(self.consumers(), functools.partial(self._close, exc), drain, timeout)

    def consumers(self) -> list[Drainable]:
        """All that consume on its channels."""
        return [consumer for channel in self._channels for consumer in channel.consumers]

    async def _close(self, exc: BaseException | None, timeout: float) -> None:
        first = not self._close_called
        self._close_called = True
        deadline = self.loop.time() + timeout
        error = exc if isinstance(exc, Exception) else normal_close()
        if not first:
            if self._transport is not None:
                await self._transport.closed(deadline)
            return
        channels = list(self._channels)
        try:
            if (opening := self._opening) is not None:
                opening.cancel()
                await asyncio.wait([opening], timeout=max(0.0, deadline - self.loop.time()))
            await self._before_close(deadline)
            for channel in channels:
                channel.begin_close()
            for channel in channels:
                await channel.end_handlers(deadline)
            for channel in channels:
                await channel.wait_for_confirms(deadline)
            if self._transport is not None:
                await self._transport.close(error, deadline)
        finally:
            if self._transport is not None:
                self._transport.abort(error)
            self._set_closed(error)

    async def _before_close(self, deadline: float) -> None:
        """What has to end before the connection is closed; until *deadline* in event loop time."""

    def _on_lost(self, error: Exception) -> None:
        """The transport died."""
        self.connected.clear()
        if not self._close_called:
            _log.warning("%s: connection lost: %s", self, printable(str(error)))
        self._set_closed(error)

    def _set_closed(self, error: BaseException | None) -> None:
        if not self._closed.done():
            self._closed.set_result(True)
            self.close_callbacks(error)

    @property
    def is_closed(self) -> bool:
        """Whether it was closed, or lost."""
        return self._closed.done()

    @property
    def close_called(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._close_called

    def closed(self) -> asyncio.Future[bool]:
        """A future that is True once the connection is closed, by whomever."""
        return asyncio.shield(self._closed)

    async def ready(self) -> None:
        """Wait until it is connected.

        Raises:
            ConnectionClosed: it is closed.
        """
        if not self.connected.is_set():
            connected: asyncio.Future[Any] = asyncio.ensure_future(self.connected.wait())
            either: list[asyncio.Future[Any]] = [connected, self._closed]
            try:
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            finally:
                connected.cancel()
        if self.is_closed:
            raise fresh(self._error())

    def _error(self) -> Exception:
        error = self._transport.error if self._transport is not None and not self._close_called else None
        return error or normal_close()

    # ----------------------------------------------------------------------------------------------- channels

    def channel(
        self,
        channel_number: int | None = None,
        publisher_confirms: bool = True,
        on_return_raises: bool = False,
    ) -> Channel:
        """A channel, to be opened by ``await`` or ``async with``.

        Args:
            channel_number: None for the next free one.
            publisher_confirms: have the broker confirm each publish.
            on_return_raises: raise MessageReturned for a mandatory message that comes back, instead of
                returning it to the publisher.

        Raises:
            RuntimeError: the connection was not opened, or *on_return_raises* without *publisher_confirms*.
        """
        if self._transport is None:
            raise RuntimeError("Connection was not opened")
        return self.CHANNEL_CLASS(
            self,
            channel_number=channel_number,
            publisher_confirms=publisher_confirms,
            on_return_raises=on_return_raises,
        )

    def open_transport(self) -> Transport:
        """The transport, for a channel to open on.

        Raises:
            ChannelInvalidStateError: there is none, or it is closed.
        """
        transport = self._transport
        if transport is None or not transport.is_open or self._close_called:
            raise ChannelInvalidStateError("the connection is not open") from self._error()
        return transport

    @property
    def waiting_publishes(self) -> int:
        """How many publishes of all its channels wait to be written: for the link, for a blocking broker, for room."""
        return sum(channel.waiting_publishes for channel in self._channels)

    def adopt(self, channel: Channel) -> None:
        """*channel* is open: it is closed with the connection."""
        self._channels.add(channel)

    def disown(self, channel: Channel) -> None:
        """*channel* is closed, and none of its callbacks runs."""
        self._channels.discard(channel)

    @property
    def operation_timeout(self) -> float:
        """Seconds that a call without a ``timeout`` of its own may take."""
        return self._parameters.operation_timeout

    # ------------------------------------------------------------------------------------ what the broker says

    def health(self) -> Health:
        """Whether it works, for a health check: ``"ready"``, ``"degraded"`` or ``"down"``, and why.

        It is ``"degraded"`` while the broker blocks publishers or refuses many, while confirms are overdue, and while
        the connection is read slowly because consumers without a prefetch hold too much.
        """
        if self.is_closed or self._transport is None:
            return Health("down", (printable(str(self._error())),))
        reasons = self._degraded()
        return Health("degraded" if reasons else "ready", tuple(reasons))

    def _degraded(self) -> list[str]:
        """What is not as it should be, on a link that is there."""
        reasons = [f"the broker blocks publishers: {printable(self.blocked)}"] if self.blocked is not None else []
        if self._transport is not None and (complaint := self._transport.intake.complaint) is not None:
            reasons.append(complaint)
        for channel in self._channels:
            reasons += channel.complaints
        return reasons

    @property
    def blocked(self) -> str | None:
        """Why the broker blocks publishers of this connection now; None if it does not.

        https://www.rabbitmq.com/docs/connection-blocked
        """
        return None if self._transport is None else self._transport.blocked

    def _on_blocked(self, reason: str | None) -> None:
        self.blocked_callbacks(reason)

    @property
    def server_properties(self) -> Mapping[str, FieldValue]:
        """What the broker says of itself: product, version, cluster name, capabilities."""
        return {} if self._transport is None else self._transport.server_properties

    async def update_secret(
        self, new_secret: str, *, reason: str = "", timeout: TimeoutType = None
    ) -> ConnectionMethods.UpdateSecretOk:
        """Give the broker a new password or token before the old one expires (``connection.update-secret``).

        Only some backends check it (OAuth 2 does, the internal one takes any). The URL keeps the new secret.

        Raises:
            RuntimeError: the connection was not opened.
            ConnectionClosed: it is closed; or the broker refused, and closed it.

        https://www.rabbitmq.com/docs/oauth2#token-expiration
        """
        if self._transport is None:
            raise RuntimeError("Connection was not opened")
        method = make(ConnectionMethods.UpdateSecret, new_secret=new_secret, reason=reason)
        seconds = self.operation_timeout if timeout is None else timeout
        result: ConnectionMethods.UpdateSecretOk = await self._transport.call(method, seconds)
        self.url = self.url.with_password(new_secret)
        self._parameters = self._parameters._replace(password=new_secret)
        return result


def normal_close() -> ConnectionClosed:
    """What those who wait get when this side closes."""
    return ConnectionClosed("the connection was closed", reply_code=200, reply_text="Normal shutdown")


@overload
async def connect(
    url: str | URL | None = None,
    *,
    host: str = ...,
    port: int = ...,
    login: str = ...,
    password: str = ...,
    virtualhost: str = ...,
    ssl: bool = ...,
    loop: asyncio.AbstractEventLoop | None = ...,
    ssl_options: SSLOptions | None = ...,
    ssl_context: ssl_module.SSLContext | None = ...,
    timeout: TimeoutType = ...,
    client_properties: Mapping[str, FieldValue] | None = ...,
    connection_class: type[C],
    **kwargs: Any,
) -> C: ...


@overload
async def connect(
    url: str | URL | None = None,
    *,
    host: str = ...,
    port: int = ...,
    login: str = ...,
    password: str = ...,
    virtualhost: str = ...,
    ssl: bool = ...,
    loop: asyncio.AbstractEventLoop | None = ...,
    ssl_options: SSLOptions | None = ...,
    ssl_context: ssl_module.SSLContext | None = ...,
    timeout: TimeoutType = ...,
    client_properties: Mapping[str, FieldValue] | None = ...,
    **kwargs: Any,
) -> Connection: ...


async def connect(
    url: str | URL | None = None,
    *,
    host: str = "localhost",
    port: int = 5672,
    login: str = "guest",
    password: str = "guest",
    virtualhost: str = "/",
    ssl: bool = False,
    loop: asyncio.AbstractEventLoop | None = None,
    ssl_options: SSLOptions | None = None,
    ssl_context: ssl_module.SSLContext | None = None,
    timeout: TimeoutType = None,
    client_properties: Mapping[str, FieldValue] | None = None,
    connection_class: type[Connection] = Connection,
    **kwargs: Any,
) -> Connection:
    """Connect to RabbitMQ.

    ::

        async with await leveret.connect("amqp://guest:guest@localhost/") as connection:
            channel = await connection.channel()

    Args:
        url: ``amqp://user:password@host:port/vhost?heartbeat=30``, or ``amqps://`` for TLS; characters such as
            ``# ? / @`` in user and password are percent-encoded. With a URL, *host* to *ssl* are not looked at.
        host: of the broker.
        port: 5672, or 5671 for TLS.
        login: user name.
        password: of the user.
        virtualhost: of the broker.
        ssl: use TLS; certificate and host name of the broker are verified.
        loop: accepted for aio-pika's sake; the running loop is used.
        ssl_options: ``cafile``, ``capath``, ``cadata``, ``certfile``, ``keyfile``.
        ssl_context: instead of *ssl_options*; used as it is.
        timeout: seconds for the whole; None leaves it at ``connect_timeout`` (10 s) for each stage.
        client_properties: shown in RabbitMQ's management pages, beside ``name``.
        connection_class: to be used instead of :class:`Connection`.
        kwargs: any query parameter of the URL: ``name``, ``heartbeat``, ``operation_timeout``, …

    Raises:
        ValueError: the URL or a parameter makes no sense.
        ConnectTimeout: a stage took too long (also a TimeoutError).
        LoginRefused: user or password were not accepted.
        ConnectionNotAllowed: no such vhost, no access to it, or a limit was reached.
        ProbableAuthenticationError: the broker hung up during the login.
        IncompatibleProtocolError: what answers is no RabbitMQ, or not on that port.
        FileNotFoundError: a TLS file is missing.
        AMQPConnectionError: the broker cannot be reached.

    Cancellation: leaves no socket open.

    https://www.rabbitmq.com/docs/uri-spec
    """
    full_url = make_url(
        url,
        host=host,
        port=port,
        login=login,
        password=password,
        virtualhost=virtualhost,
        ssl=ssl,
        ssl_options=ssl_options,
        **kwargs,
    )
    if client_properties is not None:  # classes of aio-pika's users may not take it
        kwargs["client_properties"] = client_properties
    connection = connection_class(full_url, loop=loop, ssl_context=ssl_context, **kwargs)
    await connection.connect(timeout=timeout)
    return connection
