"""A relay on loopback between a client and a broker: a link that can be cut without touching either."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Self

from yarl import URL

from leveret.url import parse_url

_CHUNK = 65536


class Relay:
    """For ``async with``.

    Args:
        url: of the broker.
    """

    def __init__(self, url: str | URL) -> None:
        self._url = URL(url) if isinstance(url, str) else url
        self._target = parse_url(self._url)
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._on_connection, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.drop_connections()
        if self._tasks:
            await asyncio.wait(self._tasks)

    @property
    def url(self) -> str:
        """That of the broker, but by way of the relay."""
        port: int = self._server.sockets[0].getsockname()[1]
        url = self._url.with_host("127.0.0.1").with_port(port)
        if self._target.ssl and self._target.server_hostname is None:  # else the name in the certificate is wrong
            url = url.update_query(server_hostname=self._target.host)
        return str(url)

    def drop_connections(self) -> None:
        """Cut all: both ends see a reset, and what is on its way is lost."""
        for writer in self._writers:
            writer.transport.abort()

    def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        both = {writer}
        self._writers.add(writer)
        try:
            there, back = await asyncio.open_connection(self._target.host, self._target.port)
            both.add(back)
            self._writers.add(back)
            pumps = [asyncio.ensure_future(_pump(reader, back)), asyncio.ensure_future(_pump(there, writer))]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in pumps:
                pump.cancel()
            await asyncio.wait(pumps)
        except OSError:
            pass  # no broker: the client sees a connection that is closed at once
        finally:
            self._writers -= both
            for each in both:
                each.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()
        writer.close()
        await writer.wait_closed()
