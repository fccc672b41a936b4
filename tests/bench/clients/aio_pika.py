"""aio-pika; and, by inheritance, what has its API."""

from __future__ import annotations

import asyncio
import importlib
from typing import TYPE_CHECKING, Any

from tests.bench.adapter import CONTENT_TYPE, Adapter

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class Client(Adapter):
    """By way of ``connect_robust``, as its documentation has it."""

    package = "aio_pika"

    def __init__(self) -> None:
        self.api = importlib.import_module(self.package)

    async def connect(self, url: str) -> None:
        self.connection = await self.api.connect_robust(url)

    async def close(self) -> None:
        await self.connection.close()

    async def channel(self, *, confirms: bool = True) -> Any:
        return await self.connection.channel(publisher_confirms=confirms)

    async def qos(self, channel: Any, prefetch: int) -> None:
        await channel.set_qos(prefetch_count=prefetch)

    async def declare(self, channel: Any, name: str) -> Any:
        return await channel.declare_queue(name, exclusive=True)

    async def publisher(
        self, channel: Any, exchange: str, key: str, body: bytes, *, persistent: bool = False
    ) -> Callable[[], Awaitable[object]]:
        target = await channel.get_exchange(exchange, ensure=False) if exchange else channel.default_exchange
        publish, message = target.publish, self.api.Message
        mode = self.api.DeliveryMode.PERSISTENT if persistent else self.api.DeliveryMode.NOT_PERSISTENT

        def publish_one() -> Awaitable[object]:
            return publish(message(body, content_type=CONTENT_TYPE, delivery_mode=mode), key)  # type: ignore[no-any-return]

        return publish_one

    def sender(self, channel: Any) -> Callable[..., Awaitable[object]]:
        publish, message = channel.default_exchange.publish, self.api.Message

        def send(
            queue: str, body: bytes, correlation_id: str | None = None, reply_to: str | None = None
        ) -> Awaitable[object]:
            return publish(message(body, correlation_id=correlation_id, reply_to=reply_to), queue)  # type: ignore[no-any-return]

        return send

    async def procedure(self, channel: Any, name: str) -> Callable[[str], Awaitable[object]]:
        async def echo(*, text: str) -> str:
            return text

        rpc = await self.api.patterns.RPC.create(channel)
        await rpc.register(name, echo, auto_delete=True)
        call = rpc.call

        def call_echo(text: str) -> Awaitable[object]:
            return call(name, {"text": text})  # type: ignore[no-any-return]

        return call_echo

    async def consume(self, channel: Any, queue: str, n: int, *, ack: bool) -> None:
        done = asyncio.Event()
        seen = 0

        async def on_message(message: Any) -> None:
            nonlocal seen
            if ack:
                await message.ack()
            seen += 1
            if seen == n:
                done.set()

        await (await channel.get_queue(queue, ensure=False)).consume(on_message, no_ack=not ack)
        await done.wait()

    async def iterate(self, channel: Any, queue: str, n: int) -> None:
        seen = 0
        async with (await channel.get_queue(queue, ensure=False)).iterator() as messages:
            async for message in messages:
                await message.ack()
                seen += 1
                if seen == n:
                    break

    async def collect(self, channel: Any, queue: str, n: int) -> list[Any]:
        done = asyncio.Event()
        messages: list[Any] = []

        async def on_message(message: Any) -> None:
            messages.append(message)
            if len(messages) == n:
                done.set()

        await (await channel.get_queue(queue, ensure=False)).consume(on_message, no_ack=True)
        await done.wait()
        return messages

    async def listen(self, channel: Any, queue: str, on_message: Callable[[bytes, str, str], Any]) -> None:
        async def on_incoming(message: Any) -> None:
            result = on_message(message.body, message.correlation_id, message.reply_to)
            if result is not None:
                await result

        await (await channel.get_queue(queue, ensure=False)).consume(on_incoming, no_ack=True)
