"""Connections and channels that come back.

They run the same code as the plain ones. What differs is small: a robust channel *remembers* what was declared, bound
and consumed (:mod:`leveret.topology`), waits for its wire instead of refusing, and lets :mod:`leveret.recovery` see
to it that it gets a new one.
"""

from __future__ import annotations

import asyncio
import math
import ssl as ssl_module
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, overload

from pamqp.commands import Connection as ConnectionMethods
from yarl import URL

from leveret.callbacks import CallbackCollection
from leveret.channel import CLOSE_TIMEOUT
from leveret.connection import Connection, normal_close
from leveret.credentials import CredentialsProvider, Login
from leveret.exceptions import (
    AMQPConnectionError,
    ConnectionClosed,
)
from leveret.hosts import Host, Hosts, Resolver
from leveret.lifecycle import ConnectionState, Health
from leveret.log import get_logger, printable
from leveret.older import OlderRobustConnection
from leveret.records import Record
from leveret.recovery import Recovery
from leveret.registry import Registry
from leveret.retry import RetryPolicy, is_retryable
from leveret.robust_channel import RobustChannel, RobustQueue
from leveret.types import FieldValue, SSLOptions, TimeoutType
from leveret.url import make_urls
from leveret.wire.transport import Transport
from leveret.wire.waiting import Budget, WaitingRoom

_log = get_logger(__name__)

C = TypeVar("C", bound="RobustConnection")

_RETRY = RetryPolicy()


class RobustConnection(OlderRobustConnection, Connection):
    """A connection that comes back, with all that was on it. Get one from :func:`connect_robust`.

    Attributes:
        close_callbacks: called with (connection, exception) whenever the link is lost, and when it is closed.
        reconnect_callbacks: called with (connection) whenever all is restored.
        state_callbacks: called with (connection, old, new, cause) whenever :attr:`state` changes, in order.
        renamed_callbacks: called with (connection, old, new) when a queue that the broker names has another name.
        on_recovery_error: called with (connection, record, error) whenever the broker refuses to restore something.
        connection_attempt: how often the connection has become ready.
        connected: an ``asyncio.Event`` that is set while it is ready.
        reconnect_interval: seconds between attempts, as given; None for pauses that grow.
        fail_fast: whether the first failure to connect at all is raised.
        registry: what is to be restored, for its channels; *recovery* is who restores it.

    https://www.rabbitmq.com/docs/reliability
    """

    CHANNEL_CLASS = RobustChannel
    MAX_WAITING_PUBLISHES = 100_000
    """How many publishes may wait for the link; more are refused with PublishNotSent."""
    MAX_WAITING_BYTES = 64 * 1024 * 1024
    """How many bytes of bodies may wait for the link."""

    def __init__(
        self,
        url: URL | str | Sequence[URL | str],
        loop: asyncio.AbstractEventLoop | None = None,
        ssl_context: ssl_module.SSLContext | None = None,
        client_properties: Mapping[str, FieldValue] | None = None,
        *,
        retry: RetryPolicy | None = None,
        first_retry: RetryPolicy | None = None,
        credentials: CredentialsProvider | None = None,
        resolver: Resolver | None = None,
        **kwargs: Any,
    ) -> None:
        urls = make_urls(url, **kwargs)
        super().__init__(urls[0], loop, ssl_context, client_properties)
        self.reconnect_callbacks: CallbackCollection[RobustConnection, []] = CallbackCollection(self)
        self.state_callbacks: CallbackCollection[
            RobustConnection, [ConnectionState, ConnectionState, Exception | None]
        ] = CallbackCollection(self)
        self.renamed_callbacks: CallbackCollection[RobustConnection, [str, str]] = CallbackCollection(self)
        self.on_recovery_error: CallbackCollection[RobustConnection, [Record, Exception]] = CallbackCollection(self)
        self.reconnect_interval = self._parameters.reconnect_interval
        self.fail_fast = self._parameters.fail_fast
        self.connection_attempt = 0
        hosts = [Host(self.url, self._parameters), *map(Host.at, urls[1:])]
        self._hosts = Hosts(hosts, resolver, kwargs)
        self._login = Login(credentials)
        self._renewal: asyncio.Task[None] | None = None
        self._former: weakref.WeakSet[Transport] = weakref.WeakSet()  # links whose last words may still be under way
        self._timeout: TimeoutType = None
        self._budget = Budget(self.MAX_WAITING_PUBLISHES, self.MAX_WAITING_BYTES)
        self._server_named: weakref.WeakSet[RobustQueue] = weakref.WeakSet()
        for name, given in (("retry", retry), ("first_retry", first_retry)):
            if not isinstance(given, RetryPolicy | None):
                raise TypeError(f"{name} must be a RetryPolicy, which is about connecting, not {given!r}")
        interval = self.reconnect_interval
        if retry is None:
            retry = _RETRY if interval is None else RetryPolicy.every(interval)
        elif interval is not None:
            raise ValueError(f"reconnect_interval={interval:g} and retry={retry!r}: give one of them")
        self._first_retry = first_retry or (None if self.fail_fast else retry)
        self.registry = Registry(self._robust_channels, self.loop.time)
        self.recovery = Recovery(
            self,
            self.registry,
            channels=self._robust_channels,
            connect=self._connect_to_any,
            retry=retry,
            on_state=self._on_state,
            on_trouble=self.on_recovery_error,
            on_renamed=self._on_renamed,
            chores=self._renew_login,
        )

    # --------------------------------------------------------------------------------------- opening, closing

    async def connect(self, timeout: TimeoutType = None) -> None:
        """Connect; :func:`connect_robust` does it for you. After a failure it may be called again.

        Args:
            timeout: seconds for each attempt; None leaves it at the limit for each stage (``connect_timeout``).

        Raises:
            RuntimeError: it is connected, or was closed.
            AMQPConnectionError: as :func:`connect_robust`.

        Cancellation: closes the connection for good.
        """
        if self.state is not ConnectionState.NEW:
            raise RuntimeError(f"the connection is {self.state.value}: it connects once, and comes back by itself")
        self._timeout = timeout
        self._warn_of_cleartext()
        try:
            await self.recovery.start(self._first_retry)
        except asyncio.CancelledError:
            await self.close()
            raise

    async def _connect_to_any(self) -> Transport:
        """One attempt at each host."""
        errors: list[Exception] = []
        for host in await self._hosts.round(self._parameters.connect_timeout):
            self._hosts.used(host)
            parameters = await self._login.apply(host.parameters)
            if self._close_called:  # by the provider
                raise normal_close()
            try:
                transport = await self._open_transport(parameters, self._timeout)
            except (AMQPConnectionError, OSError) as exc:
                errors.append(exc)
            else:
                if self._transport is not None:
                    self._former.add(self._transport)
                self.url, self._parameters, self._transport = host.url, parameters, transport
                return transport
        if len(errors) == 1 or not any(map(is_retryable, errors)):
            raise errors[-1]
        raise AMQPConnectionError("no host can be reached: " + "; ".join(map(str, errors))) from errors[-1]

    async def _before_close(self, deadline: float) -> None:
        await self.recovery.stop(deadline)
        if (renewal := self._renewal) is not None:
            renewal.cancel()
            await asyncio.wait([renewal], timeout=max(0.0, deadline - self.loop.time()))
        for transport in list(self._former):
            transport.abort(normal_close())
            await transport.closed(deadline)

    def _set_closed(self, error: BaseException | None) -> None:
        if self._closed.done():
            return
        self._closed.set_result(True)
        self.connected.clear()
        if self._renewal is not None:
            self._renewal.cancel()
        ended = error if isinstance(error, Exception) else normal_close()
        for channel in self._robust_channels():
            channel.give_up(ended)
        self.close_callbacks(error)
        self.recovery.on_closed()

    async def reconnect(self) -> None:
        """Drop the link and make another one; returns when all is restored.

        Raises:
            ConnectionClosed: the connection is closed.
        """
        transport = self._transport
        if transport is not None and transport.is_open and not self._close_called:
            deadline = self.loop.time() + CLOSE_TIMEOUT
            for channel in self._robust_channels():
                await channel.wait_for_confirms(deadline)
            transport.leave(ConnectionClosed("reconnect() was called"))
        await self.ready()

    @property
    def state(self) -> ConnectionState:
        """Where it is."""
        return self.recovery.state

    @property
    def reconnecting(self) -> bool:
        """Whether the link was lost and not everything is back."""
        return self.state in {ConnectionState.RECONNECTING, ConnectionState.RECOVERING}

    def health(self) -> Health:
        """As :meth:`Connection.health`, and it counts what recovery is about.

        It is ``"degraded"`` too while something that was declared, bound or consumed is not restored, while a channel
        is lost again and again, and while the login cannot be renewed.
        """
        if self.state not in {ConnectionState.READY, ConnectionState.RECOVERING}:
            return Health("down", (self.why_down(),))
        reasons = [*self._degraded(), *map(str, self.registry.troubles), *map(printable, self.registry.pending)]
        if self._login.problem is not None:
            reasons.append(self._login.problem)
        if self.state is ConnectionState.RECOVERING:
            reasons.append("being restored")
        return Health("degraded" if reasons else "ready", tuple(reasons))

    def why_down(self) -> str:
        """Why there is no link, or why a channel is not there."""
        cause = self.recovery.cause
        return f"the connection is {self.state.value}" + (f": {printable(str(cause))}" if cause is not None else "")

    # ------------------------------------------------------------------------------------- what recovery says

    def _on_lost(self, error: Exception) -> None:
        self.recovery.on_link_lost(error)

    def _on_blocked(self, reason: str | None) -> None:
        super()._on_blocked(reason)
        if reason is None:
            self.recovery.hurry()

    def _on_state(self, old: ConnectionState, new: ConnectionState, cause: Exception | None) -> None:
        if new is ConnectionState.RECONNECTING:
            self.connected.clear()
            if self._transport is not None and self._transport.blocked is not None:
                self._transport.blocked = None
                self.blocked_callbacks(None)
            _log.warning("%s: connection lost, reconnecting: %s", self, printable(str(cause)))
            _log.debug("%s: connection lost", self, exc_info=cause)
        elif new is ConnectionState.READY:
            self.connected.set()
            self.connection_attempt += 1
            if self.connection_attempt > 1:
                self.tally.reconnects += 1
                _log.info("%s: connection restored", self)
        self.state_callbacks(old, new, cause)
        if new is ConnectionState.RECONNECTING:
            self.close_callbacks(cause)
        elif new is ConnectionState.READY and self.connection_attempt > 1:
            self.reconnect_callbacks()
        elif new is ConnectionState.CLOSED and not self._close_called:  # gave up
            self._set_closed(cause)

    def _on_renamed(self, old: str, new: str) -> None:
        for queue in self._server_named:
            if queue.name == old:
                queue.name = new
        self.renamed_callbacks(old, new)

    def _renew_login(self) -> float:
        """Begin to, if it is due; returns when it will be next."""
        if self._renewal is not None:
            return math.inf
        if self._login.due <= self.loop.time():
            renewing = self._login.renew(self.update_secret, self._parameters.connect_timeout)
            self._renewal = self.loop.create_task(renewing, name="leveret login")
            self._renewal.add_done_callback(self._on_renewed)
            return math.inf
        return self._login.due

    def _on_renewed(self, task: asyncio.Task[None]) -> None:
        self._renewal = None
        self.recovery.refresh()

    async def update_secret(
        self, new_secret: str, *, reason: str = "", timeout: TimeoutType = None
    ) -> ConnectionMethods.UpdateSecretOk:
        """As :meth:`Connection.update_secret`; it is what the next attempts to connect use, too.

        Raises:
            RuntimeError, ConnectionClosed: as :meth:`Connection.update_secret`.
        """
        result = await super().update_secret(new_secret, reason=reason, timeout=timeout)
        self._hosts.change_password(new_secret)
        return result

    # -------------------------------------------------------------------------------------------- for channels

    def channel(
        self,
        channel_number: int | None = None,
        publisher_confirms: bool = True,
        on_return_raises: bool = False,
    ) -> RobustChannel:
        """As :meth:`Connection.channel`; the channel comes back with the connection, and after the broker closed it."""
        channel = super().channel(channel_number, publisher_confirms, on_return_raises)
        assert isinstance(channel, RobustChannel)
        return channel

    def _robust_channels(self) -> list[RobustChannel]:
        return [channel for channel in self._channels if isinstance(channel, RobustChannel)]

    async def ready_transport(self, deadline: float) -> Transport:
        """The link, once all is restored.

        Raises:
            ChannelInvalidStateError: the connection is closed.
            TimeoutError: it is not back at *deadline*, in event loop time.
        """
        try:
            if not self.connected.is_set():
                async with asyncio.timeout_at(deadline):
                    while not self._close_called and not self.is_closed:
                        if self.connected.is_set():
                            break
                        await self.ready()
        except TimeoutError:
            raise TimeoutError(f"no channel was opened in time: {self.why_down()}") from None
        except ConnectionClosed:
            pass
        return self.open_transport()

    def new_waiting_room(self) -> WaitingRoom:
        """Where the publishes of one channel wait."""
        return WaitingRoom(self._budget, self.operation_timeout, self._parameters.frame_max, self.why_down)

    def follow_name_of(self, queue: RobustQueue) -> None:
        """Change ``queue.name`` when the broker chooses another one."""
        self._server_named.add(queue)


@overload
async def connect_robust(
    url: str | URL | Sequence[str | URL] | None = None,
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
    retry: RetryPolicy | None = ...,
    first_retry: RetryPolicy | None = ...,
    credentials: CredentialsProvider | None = ...,
    resolver: Resolver | None = ...,
    connection_class: type[C],
    **kwargs: Any,
) -> C: ...


@overload
async def connect_robust(
    url: str | URL | Sequence[str | URL] | None = None,
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
    retry: RetryPolicy | None = ...,
    first_retry: RetryPolicy | None = ...,
    credentials: CredentialsProvider | None = ...,
    resolver: Resolver | None = ...,
    **kwargs: Any,
) -> RobustConnection: ...


async def connect_robust(
    url: str | URL | Sequence[str | URL] | None = None,
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
    retry: RetryPolicy | None = None,
    first_retry: RetryPolicy | None = None,
    credentials: CredentialsProvider | None = None,
    resolver: Resolver | None = None,
    connection_class: type[RobustConnection] = RobustConnection,
    **kwargs: Any,
) -> RobustConnection:
    """Connect to RabbitMQ, and stay connected.

    ::

        async with await leveret.connect_robust("amqp://guest:guest@one,two,three/") as connection:
            channel = await connection.channel()

    When the link is lost it is made again, and all that was declared, bound and consumed on it is restored. Calls and
    publishes wait for that within their timeout.

    Args:
        url: as for :func:`~leveret.connect`; or a list of URLs, or one with several hosts, with commas between, which
            are tried in turn, in an order that is shuffled once.
        host: as for :func:`~leveret.connect`, as are the following up to *ssl_context*.
        port: TCP port.
        login: user name.
        password: its password.
        virtualhost: virtual host.
        ssl: whether to speak TLS.
        loop: for aio-pika's sake; the running loop is used.
        ssl_options: TLS files.
        ssl_context: a ready TLS context.
        timeout: seconds for each attempt; None leaves it at the limit for each stage (``connect_timeout``).
        client_properties: more to tell the broker of this client.
        retry: how to go on after a loss; None for ``RetryPolicy()``: at once, then after pauses that grow to 30 s,
            for ever. With ``reconnect_interval`` the pauses are all the same.
        first_retry: how to go on when the first connect fails; None to raise, or with ``fail_fast=False`` for *retry*.
        credentials: an async callable that returns :class:`~leveret.Credentials`, asked before every attempt; a login
            that expires is renewed on the live connection.
        resolver: an async callable that returns the URLs to try, asked before every round of attempts.
        connection_class: a subclass of :class:`RobustConnection`.
        kwargs: query parameters of the URL, such as ``heartbeat``, ``reconnect_interval`` or ``fail_fast``.

    Raises:
        ValueError: the URL or an argument is wrong.
        LoginRefused: the broker refuses the login. This, and a vhost that is missing, is final on the first connect.
        AMQPConnectionError: the broker cannot be reached, and *first_retry* does not go on; see
            :func:`~leveret.connect` for the kinds.

    Cancellation: leaves no socket and no task.

    https://www.rabbitmq.com/docs/uri-spec
    """
    urls = make_urls(
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
    given = {
        "client_properties": client_properties,
        "retry": retry,
        "first_retry": first_retry,
        "credentials": credentials,
        "resolver": resolver,
    }
    kwargs |= {name: value for name, value in given.items() if value is not None}  # not all classes may take them
    connection = connection_class(urls if len(urls) > 1 else urls[0], loop=loop, ssl_context=ssl_context, **kwargs)
    await connection.connect(timeout=timeout)
    return connection
