"""No client at all: the event loop, a socket, one prepared publish, and a future for its confirm.

What this costs, everybody pays who waits for each confirm on that loop.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from pamqp import body, commands, frame, header
from yarl import URL

from tests.bench.adapter import CONTENT_TYPE, Adapter

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pamqp.base import Frame


class Client(Adapter):
    async def connect(self, url: str) -> None:
        parts = URL(url)
        loop = asyncio.get_running_loop()
        _, self.connection = await loop.create_connection(_Connection, parts.host, parts.port)
        await self.connection.ask(b"AMQP\0\0\x09\x01")
        login = f"\0{parts.user}\0{parts.password}"
        await self._ask(0, commands.Connection.StartOk({}, "PLAIN", login, "en_US"))
        self.connection.write(frame.marshal(commands.Connection.TuneOk(2047, 131072, 0), 0))
        await self._ask(0, commands.Connection.Open())

    async def close(self) -> None:
        await self._ask(0, commands.Connection.Close(200, "", 0, 0))

    async def channel(self, *, confirms: bool = True) -> None:
        if not confirms:
            raise NotImplementedError
        await self._ask(1, commands.Channel.Open())
        await self._ask(1, commands.Confirm.Select())

    async def qos(self, channel: None, prefetch: int) -> None:
        await self._ask(1, commands.Basic.Qos(0, prefetch, False))

    async def publisher(
        self, channel: None, exchange: str, key: str, content: bytes, *, persistent: bool = False
    ) -> Callable[[], Awaitable[object]]:
        properties = commands.Basic.Properties(content_type=CONTENT_TYPE, delivery_mode=2 if persistent else 1)
        publish = b"".join(
            frame.marshal(part, 1)
            for part in (
                commands.Basic.Publish(exchange=exchange, routing_key=key, mandatory=True),
                header.ContentHeader(0, len(content), properties),
                body.ContentBody(content),
            )
        )
        return lambda: self.connection.ask(publish)

    def _ask(self, channel: int, method: Frame) -> Awaitable[None]:
        return self.connection.ask(frame.marshal(method, channel))


class _Connection(asyncio.BufferedProtocol):
    """Takes whatever comes for the answer."""

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(131_072))
        self._loop = asyncio.get_running_loop()
        self._answer: asyncio.Future[None] = self._loop.create_future()

    def connection_made(self, transport: asyncio.WriteTransport) -> None:  # type: ignore[override]
        self.write = transport.write

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if not self._answer.done():
            self._answer.set_result(None)

    def ask(self, data: bytes) -> Awaitable[None]:
        self._answer = self._loop.create_future()
        self.write(data)
        return self._answer
