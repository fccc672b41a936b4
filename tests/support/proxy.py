"""A TCP proxy that injects faults, in both directions or in one.

::

    async with FaultProxy("127.0.0.1", node.port) as proxy:
        await connect(proxy.url)
        proxy.up.latency = 0.05         # client → broker: seconds that each piece is late
        proxy.down.rate = 4096          # broker → client: bytes per second
        proxy.down.slice = 1            # byte by byte
        proxy.up.blackhole = True       # read and thrown away: a half-open link
        proxy.down.stall = True         # no longer read: the window fills, and the peer's writes block
        proxy.down.cut_after = 1000     # after exactly that many more bytes, do proxy.cut: "rst", "fin" or "blackhole"
        proxy.down.mangle = bytes.upper # change, drop or add bytes
        proxy.down.record = True        # keep what passes in proxy.down.log
        proxy.rst()                     # now: reset, or …
        proxy.fin()                     # … close every connection
        await proxy.refuse()            # nobody listens any more, until …
        await proxy.accept()            # … the port is back
        proxy.silent = True             # new connections are accepted and never answered
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable

CHUNK = 65536


class Direction:
    """What happens to the bytes that go one way; :meth:`heal` undoes it all."""

    latency: float
    rate: int | None
    slice: int | None
    blackhole: bool
    cut_after: int | None
    mangle: Callable[[bytes], bytes] | None
    record: bool
    bytes: int
    log: bytearray

    def __init__(self) -> None:
        self._flowing = asyncio.Event()
        self.bytes = 0
        self.log = bytearray()
        self.heal()

    def heal(self) -> None:
        """No more faults, from now on; the counter and the log stay."""
        self.latency = 0.0
        self.rate = self.slice = self.cut_after = self.mangle = None
        self.blackhole = self.stall = self.record = False

    @property
    def stall(self) -> bool:
        """Whether nothing is read any more."""
        return not self._flowing.is_set()

    @stall.setter
    def stall(self, stalled: bool) -> None:
        if stalled:
            self._flowing.clear()
        else:
            self._flowing.set()

    async def flow(self) -> None:
        """Wait until there is no stall."""
        await self._flowing.wait()


@dataclass(eq=False)
class _Link:
    """One connection through the proxy: the client's side, and the broker's unless the proxy is silent."""

    writers: list[asyncio.StreamWriter]

    def rst(self) -> None:
        for writer in self.writers:
            if not writer.transport.is_closing():
                reset(writer)

    def fin(self) -> None:
        for writer in self.writers:
            writer.close()


def reset(writer: asyncio.StreamWriter) -> None:
    """Close with a TCP reset: what is under way is lost, as when the peer's machine dies."""
    with contextlib.suppress(OSError):
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


class FaultProxy:
    """Passes TCP connections on to a broker, as badly as it is told; see the top of the module.

    Args:
        host: where the broker is.
        port: where the broker is.
        cut: what happens when a ``cut_after`` is used up.
    """

    def __init__(self, host: str, port: int, cut: Literal["rst", "fin", "blackhole"] = "rst") -> None:
        self.target = (host, port)
        self.cut = cut
        self.port = free_port()
        self.up = Direction()
        self.down = Direction()
        self.silent = False
        self.accepted = 0
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        """The URL of the default user, through the proxy."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    @property
    def connections(self) -> int:
        """How many connections are open now."""
        return len(self._links)

    async def __aenter__(self) -> Self:
        await self.accept()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.refuse()
        self.rst()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def accept(self) -> None:
        """Listen, again and on the same port, after :meth:`refuse`."""
        if self._server is None:
            self._server = await asyncio.start_server(self._on_client, "127.0.0.1", self.port, limit=CHUNK)

    async def refuse(self) -> None:
        """Listen no more: who connects is refused. Open connections stay."""
        if self._server is not None:
            self._server.close()
            self._server = None
            await asyncio.sleep(0)

    def heal(self) -> None:
        """No more faults in either direction, and no silence; what was closed stays closed."""
        self.silent = False
        self.up.heal()
        self.down.heal()

    def rst(self) -> None:
        """Reset every open connection."""
        for link in self._links:
            link.rst()

    def fin(self) -> None:
        """Close every open connection in the orderly way."""
        for link in self._links:
            link.fin()

    # -- one connection

    def _on_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.create_task(self._serve(reader, writer), name=f"proxy-{self.accepted}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = _Link([writer])
        self._links.add(link)
        try:
            if self.silent:
                await reader.read()
                return
            try:
                broker_reader, broker_writer = await asyncio.open_connection(*self.target, limit=CHUNK)
            except OSError:
                link.rst()
                return
            link.writers.append(broker_writer)
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(reader, broker_writer, self.up, link))
                pumps.create_task(self._pump(broker_reader, writer, self.down, link))
        finally:
            self._links.discard(link)
            link.fin()
            for side in link.writers:
                with contextlib.suppress(OSError):
                    await side.wait_closed()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Direction, link: _Link
    ) -> None:
        try:
            while True:
                await way.flow()
                data = await reader.read(CHUNK if way.rate is None else max(1, min(CHUNK, way.rate // 10)))
                await way.flow()  # stalled while we sat in read()
                if way.latency:
                    await asyncio.sleep(way.latency)
                if not data:
                    if not way.blackhole and not writer.is_closing():
                        writer.write_eof()
                    return
                if way.mangle is not None:
                    data = way.mangle(data)
                if not way.blackhole and await self._forward(data, writer, way):
                    self._cut(link)
        except OSError:
            link.rst()

    async def _forward(self, data: bytes, writer: asyncio.StreamWriter, way: Direction) -> bool:
        """Write *data* as the faults of its *way* want it; returns whether the link is to be cut now."""
        cut = way.cut_after is not None and len(data) >= way.cut_after
        if way.cut_after is not None:
            data, way.cut_after = data[: way.cut_after], None if cut else way.cut_after - len(data)
        if way.record:
            way.log += data
        step = way.slice or len(data) or 1
        for start in range(0, len(data), step):
            piece = data[start : start + step]
            writer.write(piece)
            way.bytes += len(piece)
            await writer.drain()
            if way.slice:
                await asyncio.sleep(0)
        if way.rate:
            await asyncio.sleep(len(data) / way.rate)
        return cut

    def _cut(self, link: _Link) -> None:
        if self.cut == "rst":
            link.rst()
        elif self.cut == "fin":
            link.fin()
        else:
            self.up.blackhole = self.down.blackhole = True
