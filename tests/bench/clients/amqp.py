"""py-amqp, what is below kombu."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import amqp

from tests.bench.adapter import CONTENT_TYPE, DONE, Blocking

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class Client(Blocking):
    async def connect(self, url: str) -> None:
        parts = urlsplit(url)
        host, user = f"{parts.hostname}:{parts.port or 5672}", parts.username or "guest"
        self.connection = amqp.Connection(host, user, parts.password or "guest")
        self.connection.connect()

    async def close(self) -> None:
        self.connection.close()

    async def channel(self, *, confirms: bool = True) -> Any:
        self.connection.confirm_publish = confirms
        return self.connection.channel()

    async def qos(self, channel: Any, prefetch: int) -> None:
        channel.basic_qos(0, prefetch, False)

    async def publisher(
        self, channel: Any, exchange: str, key: str, body: bytes, *, persistent: bool = False
    ) -> Callable[[], Awaitable[object]]:
        mode = 2 if persistent else 1

        def publish_one() -> Awaitable[object]:
            channel.basic_publish(amqp.Message(body, content_type=CONTENT_TYPE, delivery_mode=mode), exchange, key)
            return DONE

        return publish_one

    async def consume(self, channel: Any, queue: str, n: int, *, ack: bool) -> None:
        seen = 0

        def on_message(message: Any) -> None:
            nonlocal seen
            if ack:
                channel.basic_ack(message.delivery_tag)
            seen += 1

        channel.basic_consume(queue, no_ack=not ack, callback=on_message)
        while seen < n:
            self.connection.drain_events()
