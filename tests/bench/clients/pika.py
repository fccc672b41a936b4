"""pika's BlockingConnection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pika

from tests.bench.adapter import CONTENT_TYPE, DONE, Blocking

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class Client(Blocking):
    async def connect(self, url: str) -> None:
        self.connection = pika.BlockingConnection(pika.URLParameters(url))

    async def close(self) -> None:
        self.connection.close()

    async def channel(self, *, confirms: bool = True) -> Any:
        channel = self.connection.channel()
        if confirms:
            channel.confirm_delivery()
        return channel

    async def qos(self, channel: Any, prefetch: int) -> None:
        channel.basic_qos(prefetch_count=prefetch)

    async def publisher(
        self, channel: Any, exchange: str, key: str, body: bytes, *, persistent: bool = False
    ) -> Callable[[], Awaitable[object]]:
        mode = 2 if persistent else 1

        def publish_one() -> Awaitable[object]:
            properties = pika.BasicProperties(content_type=CONTENT_TYPE, delivery_mode=mode)
            channel.basic_publish(exchange, key, body, properties)
            return DONE

        return publish_one

    async def consume(self, channel: Any, queue: str, n: int, *, ack: bool) -> None:
        seen = 0

        def on_message(channel: Any, method: Any, _properties: Any, _body: bytes) -> None:
            nonlocal seen
            if ack:
                channel.basic_ack(method.delivery_tag)
            seen += 1
            if seen == n:
                channel.stop_consuming()

        channel.basic_consume(queue, on_message, auto_ack=not ack)
        channel.start_consuming()

    async def iterate(self, channel: Any, queue: str, n: int) -> None:
        for seen, (method, _properties, _body) in enumerate(channel.consume(queue), 1):
            channel.basic_ack(method.delivery_tag)
            if seen == n:
                break
