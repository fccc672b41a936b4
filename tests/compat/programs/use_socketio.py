"""python-socketio's AsyncAioPikaManager: one server's emits reach another one's, also after a lost connection."""

from __future__ import annotations

import asyncio
import uuid

from common import URL, cut, finish
from socketio import AsyncAioPikaManager, AsyncServer

channel = f"socketio-{uuid.uuid4().hex}"


class Listening(AsyncAioPikaManager):
    """Keeps what it is told."""

    heard: list[dict]

    async def _handle_emit(self, message):
        self.heard.append(message)


async def main() -> None:
    manager = Listening(URL, channel=channel)
    manager.heard = []
    server = AsyncServer(client_manager=manager, async_mode="asgi")
    manager.set_server(server)
    server.manager_initialized = True
    manager.initialize()
    writer = AsyncAioPikaManager(URL, channel=channel, write_only=True)

    async def emit_until_heard(event: str) -> None:
        async with asyncio.timeout(30):
            while not any(message["event"] == event for message in manager.heard):
                await writer.emit(event, {"n": 1})
                await asyncio.sleep(0.1)

    await emit_until_heard("first")
    await cut()
    await emit_until_heard("second")
    manager.thread.cancel()
    await asyncio.gather(manager.thread, return_exceptions=True)
    await writer.publisher_connection.close()
    finish()


asyncio.run(main())
