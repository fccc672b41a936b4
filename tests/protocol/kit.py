"""What the protocol tests share: a connection whose both ends are in the test's hands.

::

    async with linked() as link:
        channel = await link.channel()
        publish = asyncio.ensure_future(channel.default_exchange.publish(Message(b""), "key"))
        await link.session.expect_publish()
        link.session.send(1, commands.Basic.Ack(1))
        await publish

Nothing waits for time to pass: :meth:`Link.fence` brings both sides up to date, and :func:`turns` lets the loop run.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from pamqp import commands, heartbeat

from leveret import Channel, Connection, Queue, connect
from tests.support.peer import CAPABILITIES, Frame, PeerError, ScriptedPeer, Session

T = TypeVar("T")

BOUND = 3.0
"""Seconds that anything may take; a test that works takes milliseconds."""

NORMAL = commands.Connection.Close(200, "", 0, 0)


async def within(awaitable: Awaitable[T], seconds: float = BOUND) -> T:
    """Await, but not for ever."""
    async with asyncio.timeout(seconds):
        return await awaitable


async def turns(count: int = 5) -> None:
    """Let the event loop turn."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], object]) -> None:
    """Let the loop run until *condition*, which bytes on their way will bring about."""
    async with asyncio.timeout(BOUND):
        while not condition():  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.001)


def cancel_with_the_next_read(link: Link, task: asyncio.Future[Any]) -> None:
    """Cancel *task* with the next read: after the reply came, before its waiter runs again."""
    transport: Any = link.connection._transport

    transport.wakeups.due.append((contextvars.copy_context(), lambda _: task.cancel(), None))


async def hang_up(session: Session) -> None:
    """End the connection as a broker does once both have said goodbye; the client has to close too."""
    with contextlib.suppress(OSError):  # it has gone already
        session.eof()
    await session.closed()


@contextlib.asynccontextmanager
async def deaf() -> AsyncIterator[tuple[str, asyncio.Event, asyncio.Event]]:
    """A server that says nothing: its URL, and what is set when a client has come, and when it has gone."""
    has_come, has_gone = asyncio.Event(), asyncio.Event()

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        has_come.set()
        await reader.read()
        has_gone.set()
        writer.close()

    async with await asyncio.start_server(say_nothing, "127.0.0.1") as server:
        yield f"amqp://127.0.0.1:{server.sockets[0].getsockname()[1]}/", has_come, has_gone


def run_strictly(script: str) -> subprocess.CompletedProcess[str]:
    """Run *script* in a Python of its own, with every check on."""
    return subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def sockets() -> set[str]:
    """The sockets that this process has open."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{fd}")
            if target.startswith("socket:"):
                found.add(target)
    return found


class Link:
    """Both ends of one connection.

    Attributes:
        connection: the client's end.
        session: the server's end.
        leftover: frames that the client sent and nobody expected; the end fails the test unless it is *lenient*.
    """

    def __init__(self, connection: Connection, session: Session, lenient: bool) -> None:
        self.connection = connection
        self.session = session
        self.lenient = lenient
        self.leftover: list[tuple[int, Frame]] = []

    async def channel(self, *, confirm: bool = True, **kwargs: Any) -> Channel:
        """Open a channel."""
        channel = self.connection.channel(publisher_confirms=confirm, **kwargs)
        await within(asyncio.gather(channel.initialize(), self.session.open_channel(confirm=confirm)))
        return channel

    async def queue(self, channel: Channel, name: str = "q") -> Queue:
        """A queue of that name; nothing is sent."""
        return await channel.get_queue(name, ensure=False)

    async def answer(self, call: Awaitable[T], kind: type[Any], *replies: Frame, channel: int = 1) -> T:
        """Start *call*, expect a *kind* of it and answer with *replies*; returns what the call returns."""
        task = asyncio.ensure_future(call)
        try:
            await self.session.expect(kind, channel=channel)
            self.session.send(channel, *replies)
            return await within(task)
        finally:
            task.cancel()

    async def consume(self, channel: Channel, callback: Any, tag: str = "tag", **kwargs: Any) -> Queue:
        """Start a consumer on the queue "q"."""
        queue = await self.queue(channel)
        await self.answer(
            queue.consume(callback, consumer_tag=tag, **kwargs),
            commands.Basic.Consume,
            commands.Basic.ConsumeOk(tag),
            channel=channel.number or 0,
        )
        return queue

    async def fence(self) -> list[tuple[int, Frame]]:
        """Wait until each side has read all that the other wrote so far; returns what the client sent.

        The first round trip ends when the client has read everything, the second brings what it wrote over that.
        """
        frames: list[tuple[int, Frame]] = []
        for _ in range(2):
            task = asyncio.create_task(self.connection.update_secret("guest"))
            try:
                while True:
                    found = await self.session.receive("Connection.UpdateSecret")
                    if isinstance(found[1], commands.Connection.UpdateSecret):
                        break
                    frames.append(found)
                self.session.send(0, commands.Connection.UpdateSecretOk())
                await within(task)
            finally:
                task.cancel()
        return frames

    async def sent(self) -> list[Frame]:
        """The same, without the channels."""
        return [value for _, value in await self.fence()]

    async def finish(self) -> None:
        """Play the server's part of the client's close, and keep what else it sends in ``leftover``."""
        async for channel, value in self.session.frames():
            if isinstance(value, commands.Channel.Close):
                self.session.send(channel, commands.Channel.CloseOk())
            elif isinstance(value, commands.Connection.Close):
                self.session.send(0, commands.Connection.CloseOk())
                with contextlib.suppress(OSError):  # it has gone already
                    self.session.eof()
            elif not isinstance(value, commands.Channel.CloseOk | commands.Connection.CloseOk):
                self.leftover.append((channel, value))


@contextlib.asynccontextmanager
async def linked(
    *, query: str = "", lenient: bool = False, without: str | None = None, **handshake: Any
) -> AsyncIterator[Link]:
    """A connection and its server.

    Args:
        query: of the URL.
        lenient: whether frames that nobody expected are no failure.
        without: a capability that the server lacks.
        handshake: as of Session.handshake.
    """
    ready: asyncio.Future[Session] = asyncio.get_running_loop().create_future()
    over = asyncio.Event()
    capabilities = {key: value for key, value in CAPABILITIES.items() if key != without}
    handshake.setdefault("capabilities", capabilities)

    async def script(session: Session) -> None:
        await session.handshake(**handshake)
        ready.set_result(session)
        await over.wait()

    async with ScriptedPeer(script) as peer:
        connection: Connection | None = None
        try:
            connection = await within(connect(f"{peer.url}?{query}"))
            link = Link(connection, await within(ready), lenient)
            yield link
            if connection.is_closed:
                with contextlib.suppress(PeerError):  # reset
                    await link.finish()
            else:
                await within(asyncio.gather(connection.close(timeout=2), link.finish()), 4)
            assert link.lenient or not link.leftover, f"the client also sent {link.leftover}"
        finally:
            over.set()
            if connection is not None:
                await connection.close(timeout=0)


def raw_frame(kind: int, channel: int, payload: bytes, end: bytes = b"\xce") -> bytes:
    """A frame with any content."""
    return bytes([kind]) + channel.to_bytes(2, "big") + len(payload).to_bytes(4, "big") + payload + end


HEARTBEAT = heartbeat.Heartbeat
