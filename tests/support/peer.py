"""A peer for protocol tests: a server that speaks AMQP bytes and says what a script tells it to.

::

    async def script(session: Session) -> None:
        await session.handshake(heartbeat=1)
        await session.open_channel()
        channel, declare = await session.expect(commands.Queue.Declare)
        session.send(channel, commands.Queue.DeclareOk(declare.queue, 0, 0))
        await session.play_close()

    async with ScriptedPeer(script) as peer:
        connection = await connect(peer.url)
        …

The script runs once for each connection (``session.number`` counts from 0). When it fails, the connection is reset and
the failure is raised where the ``async with`` ends. Every wait is bounded, so a test never hangs: by 5 seconds each,
or what ``timeout=`` says.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Self, TypeAlias, TypeVar

from pamqp import base, body, commands, frame, header, heartbeat

from tests.support.proxy import reset

Frame: TypeAlias = base.Frame | header.ContentHeader | body.ContentBody | heartbeat.Heartbeat
Script: TypeAlias = Callable[["Session"], Awaitable[None]]
_F = TypeVar("_F", bound=Frame)

CAPABILITIES: dict[str, Any] = {
    "publisher_confirms": True,
    "exchange_exchange_bindings": True,
    "basic.nack": True,
    "consumer_cancel_notify": True,
    "connection.blocked": True,
    "consumer_priorities": True,
    "authentication_failure_close": True,
    "per_consumer_qos": True,
    "direct_reply_to": True,
}
"""What RabbitMQ says that it can do."""


class PeerError(AssertionError):
    """The client did not do what the script expected."""


class Session:
    """One connection of a client, as the script sees it.

    Attributes:
        number: how many connections the peer had before this one.
        received: every frame that was read so far, with its channel; heartbeats too.
        start_ok: what the client answered in :meth:`handshake`; likewise ``tune_ok`` and ``open``.
        frame_max: what the handshake agreed on; a larger frame of the client fails the script.
    """

    start_ok: commands.Connection.StartOk
    tune_ok: commands.Connection.TuneOk
    open: commands.Connection.Open

    def __init__(
        self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, timeout: float = 5
    ) -> None:
        self.number = number
        self.timeout = timeout
        self.received: list[tuple[int, Frame]] = []
        self.frame_max = 131_072
        self._reader = reader
        self._writer = writer

    # -- reading

    @contextlib.asynccontextmanager
    async def _limit(self, what: str, timeout: float | None = None) -> AsyncIterator[None]:
        """Turn a time limit, or the end of the connection, into a failure that tells what was waited for."""
        try:
            async with asyncio.timeout(self.timeout if timeout is None else timeout):
                yield
        except TimeoutError:
            raise PeerError(f"no {what} in time; {self._story()}") from None
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise PeerError(f"the client went away instead of {what} ({error!r}); {self._story()}") from None

    def _story(self) -> str:
        frames = [f"{channel}:{getattr(value, 'name', type(value).__name__)}" for channel, value in self.received]
        return f"received so far: {', '.join(frames) or 'nothing'}"

    async def _read(self) -> tuple[int, Frame] | None:
        """The next frame, whatever it is; ``None`` when the client closed or reset the connection before it."""
        try:
            head = await self._reader.readexactly(7)
        except ConnectionError:
            return None
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise
            return None
        size = int.from_bytes(head[3:])
        if size + 8 > self.frame_max:
            raise PeerError(f"a frame of {size + 8} bytes where {self.frame_max} were agreed; {self._story()}")
        _, channel, value = frame.unmarshal(head + await self._reader.readexactly(size + 1))
        assert not isinstance(value, header.ProtocolHeader | None)
        self.received.append((channel, value))
        return channel, value

    async def receive(self, what: str = "frame", *, timeout: float | None = None) -> tuple[int, Frame]:
        """The next frame that is not a heartbeat: its channel, and itself. *what* is for the failure's message."""
        async with self._limit(what, timeout):
            found = await self._read()
            while found is not None and isinstance(found[1], heartbeat.Heartbeat):
                found = await self._read()
        if found is None:
            raise PeerError(f"the client went away instead of {what}; {self._story()}")
        return found

    async def expect(
        self, kind: type[_F], *, channel: int | None = None, timeout: float | None = None
    ) -> tuple[int, _F]:
        """The next frame that is not a heartbeat, which has to be a *kind* (and on *channel*)."""
        name = getattr(kind, "name", kind.__name__)
        number, value = await self.receive(name, timeout=timeout)
        if not isinstance(value, kind) or channel not in (None, number):
            where = "" if channel is None else f" on channel {channel}"
            raise PeerError(f"{name}{where} was expected, not {value!r} on channel {number}")
        return number, value

    async def expect_heartbeat(self, *, timeout: float | None = None) -> None:
        """The next frame has to be a heartbeat."""
        async with self._limit("heartbeat", timeout):
            found = await self._read()
        if found is None or not isinstance(found[1], heartbeat.Heartbeat):
            raise PeerError(f"a heartbeat was expected, not {found or 'the end'}")

    async def expect_publish(
        self, *, timeout: float | None = None
    ) -> tuple[int, commands.Basic.Publish, header.ContentHeader, bytes]:
        """The next frames have to be a publish: its channel, method, content header and body."""
        channel, publish = await self.expect(commands.Basic.Publish, timeout=timeout)
        _, head = await self.expect(header.ContentHeader, channel=channel, timeout=timeout)
        data = b""
        while len(data) < head.body_size:
            data += (await self.expect(body.ContentBody, channel=channel, timeout=timeout))[1].value
        return channel, publish, head, data

    async def frames(self, *, timeout: float | None = None) -> AsyncIterator[tuple[int, Frame]]:
        """All frames but heartbeats until the client closes the socket; each has to come in time."""
        while True:
            async with self._limit("frame, and no end", timeout):
                found = await self._read()
            if found is None:
                return
            if not isinstance(found[1], heartbeat.Heartbeat):
                yield found

    async def closed(self, *, timeout: float | None = None) -> None:
        """Wait until the client closed the socket; heartbeats are allowed before that, other frames are not."""
        async for channel, value in self.frames(timeout=timeout):
            raise PeerError(f"the client was to close the socket, and sent {value!r} on {channel}")

    # -- writing

    def send(self, channel: int, *frames: Frame | bytes) -> None:
        """Send frames on *channel*; bytes go out as they are."""
        self._writer.write(
            b"".join(value if isinstance(value, bytes) else frame.marshal(value, channel) for value in frames)
        )

    def send_raw(self, data: bytes) -> None:
        """Send any bytes."""
        self._writer.write(data)

    def send_heartbeat(self) -> None:
        """Send a heartbeat."""
        self.send(0, heartbeat.Heartbeat())

    def send_content(
        self, channel: int, method: base.Frame, data: bytes = b"", properties: commands.Basic.Properties | None = None
    ) -> None:
        """Send a method that carries content, with its header and its body in as many frames as it needs."""
        properties = properties or commands.Basic.Properties()
        self.send(channel, method, header.ContentHeader(body_size=len(data), properties=properties))
        step = self.frame_max - 8
        for start in range(0, len(data), step):
            self.send(channel, body.ContentBody(data[start : start + step]))

    def deliver(
        self,
        channel: int,
        consumer_tag: str,
        delivery_tag: int,
        data: bytes = b"",
        *,
        exchange: str = "",
        routing_key: str = "",
        redelivered: bool = False,
        properties: commands.Basic.Properties | None = None,
    ) -> None:
        """Send a ``basic.deliver`` with its content."""
        method = commands.Basic.Deliver(consumer_tag, delivery_tag, redelivered, exchange, routing_key)
        self.send_content(channel, method, data, properties)

    async def drain(self) -> None:
        """Wait until the client has taken nearly all that was sent."""
        async with self._limit("reading client"):
            await self._writer.drain()

    def eof(self) -> None:
        """Send no more, in the orderly way (FIN); reading goes on."""
        self._writer.write_eof()

    def reset(self) -> None:
        """Reset the connection (RST)."""
        reset(self._writer)

    # -- whole conversations

    async def expect_header(self) -> None:
        """The client's first eight bytes have to be the protocol header."""
        async with self._limit("protocol header"):
            greeting = await self._reader.readexactly(8)
        if greeting != b"AMQP\x00\x00\x09\x01":
            raise PeerError(f"the client began with {greeting!r}")

    async def handshake(
        self,
        *,
        frame_max: int = 131_072,
        channel_max: int = 2_047,
        heartbeat: int = 0,
        capabilities: dict[str, Any] | None = None,
        mechanisms: str = "PLAIN AMQPLAIN EXTERNAL",
        version: str = "4.0.5",
    ) -> None:
        """Play header, start, tune and open, and check that the client's answers keep to what was offered."""
        await self.expect_header()
        properties: dict[str, Any] = {
            "product": "RabbitMQ",
            "version": version,
            "cluster_name": "scripted peer",
            "capabilities": CAPABILITIES if capabilities is None else capabilities,
        }
        self.send(0, commands.Connection.Start(0, 9, properties, mechanisms, "en_US"))
        _, self.start_ok = await self.expect(commands.Connection.StartOk, channel=0)
        if self.start_ok.mechanism not in mechanisms.split() or self.start_ok.locale != "en_US":
            raise PeerError(f"start-ok with what was not offered: {self.start_ok!r}")
        self.send(0, commands.Connection.Tune(channel_max, frame_max, heartbeat))
        _, self.tune_ok = await self.expect(commands.Connection.TuneOk, channel=0)
        for name, ours, theirs in (
            ("frame_max", frame_max, self.tune_ok.frame_max),
            ("channel_max", channel_max, self.tune_ok.channel_max),
        ):
            if ours and not 0 < theirs <= ours:  # 0 means no limit
                raise PeerError(f"tune-ok with {name} {theirs}, and {ours} was offered")
        self.frame_max = self.tune_ok.frame_max or self.frame_max
        _, self.open = await self.expect(commands.Connection.Open, channel=0)
        self.send(0, commands.Connection.OpenOk())

    async def open_channel(self, *, confirm: bool = False) -> int:
        """Play channel.open, and confirm.select after it when *confirm*; returns the channel's number."""
        channel, _ = await self.expect(commands.Channel.Open)
        self.send(channel, commands.Channel.OpenOk())
        if confirm:
            await self.expect(commands.Confirm.Select, channel=channel)
            self.send(channel, commands.Confirm.SelectOk())
        return channel

    async def play_close(self) -> commands.Connection.Close:
        """Play the end that the client begins: channel.close (any number), connection.close, and the socket."""
        channel, value = await self.receive()
        while isinstance(value, commands.Channel.Close):
            self.send(channel, commands.Channel.CloseOk())
            channel, value = await self.receive()
        if not isinstance(value, commands.Connection.Close):
            raise PeerError(f"connection.close was expected, not {value!r} on {channel}")
        self.send(0, commands.Connection.CloseOk())
        self.eof()
        await self.closed()
        return value


class ScriptedPeer:
    """A server on loopback that plays a script to each client; see the top of the module.

    Args:
        script: what to play; may also be set as the attribute ``script`` later, or be a method of a subclass.
        timeout: seconds that each wait of a script may take, and the scripts' end after the ``async with`` block.
    """

    script: Script

    def __init__(self, script: Script | None = None, *, timeout: float = 5) -> None:
        if script is not None:
            self.script = script
        self.timeout = timeout
        self.sessions: list[Session] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        """Where the peer listens."""
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    @property
    def url(self) -> str:
        """What to connect to."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._on_client, "127.0.0.1", 0)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Let the scripts end (or cancel them, after an error of the test), and raise the failure of one of them."""
        assert self._server is not None
        self._server.close()
        unfinished: set[asyncio.Task[None]] = set()
        if self._tasks and error is None:
            _, unfinished = await asyncio.wait(self._tasks, timeout=self.timeout)
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        for session in self.sessions:
            session._writer.transport.abort()
        await asyncio.sleep(0)
        for result in results:
            if isinstance(result, Exception):
                raise result
        if unfinished:
            raise PeerError(f"the script still ran {self.timeout:g} s after the test; {self.sessions[-1]._story()}")

    def _on_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        session = Session(len(self.sessions), reader, writer, self.timeout)
        self.sessions.append(session)
        self._tasks.append(asyncio.create_task(self._play(session), name=f"script-{session.number}"))

    async def _play(self, session: Session) -> None:
        try:
            played = self.script(session)
            assert inspect.isawaitable(played), "the script has to be a coroutine function"
            await played
        except Exception:
            session.reset()  # so that the client does not wait for an answer that will not come
            raise
