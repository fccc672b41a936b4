"""aiormq, what is below aio-pika."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import aiormq

from tests.bench.adapter import CONTENT_TYPE, Adapter

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

Properties = aiormq.spec.Basic.Properties


class Client(Adapter):
    async def connect(self, url: str) -> None:
        self.connection = await aiormq.connect(url)

    async def close(self) -> None:
        await self.connection.close()

    async def channel(self, *, confirms: bool = True) -> Any:
        return await self.connection.channel(publisher_confirms=confirms)

    async def qos(self, channel: Any, prefetch: int) -> None:
        await channel.basic_qos(prefetch_count=prefetch)

    async def publisher(
        self, channel: Any, exchange: str, key: str, body: bytes, *, persistent: bool = False
    ) -> Callable[[], Awaitable[object]]:
        mode = 2 if persistent else 1

        def publish_one() -> Awaitable[object]:
            properties = Properties(content_type=CONTENT_TYPE, delivery_mode=mode)
            return channel.basic_publish(body, exchange=exchange, routing_key=key, properties=properties)  # type: ignore[no-any-return]

        return publish_one

    def sender(self, channel: Any) -> Callable[..., Awaitable[object]]:
        def send(
            queue: str, body: bytes, correlation_id: str | None = None, reply_to: str | None = None
        ) -> Awaitable[object]:
            properties = Properties(correlation_id=correlation_id, reply_to=reply_to)
            return channel.basic_publish(body, routing_key=queue, properties=properties)  # type: ignore[no-any-return]

        return send

    async def consume(self, channel: Any, queue: str, n: int, *, ack: bool) -> None:
        done = asyncio.Event()
        seen = 0

        async def on_message(message: Any) -> None:
            nonlocal seen
            if ack:
                await channel.basic_ack(message.delivery.delivery_tag, wait=False)
            seen += 1
            if seen == n:
                done.set()

        await channel.basic_consume(queue, on_message, no_ack=not ack)
        await done.wait()

    async def collect(self, channel: Any, queue: str, n: int) -> list[Any]:
        done = asyncio.Event()
        messages: list[Any] = []

        async def on_message(message: Any) -> None:
            messages.append(message)
            if len(messages) == n:
                done.set()

        await channel.basic_consume(queue, on_message, no_ack=True)
        await done.wait()
        return messages

    async def listen(self, channel: Any, queue: str, on_message: Callable[[bytes, str, str], Any]) -> None:
        async def on_incoming(message: Any) -> None:
            properties = message.header.properties
            result = on_message(message.body, properties.correlation_id, properties.reply_to)
            if result is not None:
                await result

        await channel.basic_consume(queue, on_incoming, no_ack=True)
