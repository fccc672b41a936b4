"""amqpstorm: blocking, with a thread that reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import amqpstorm

from tests.bench.adapter import CONTENT_TYPE, DONE, Blocking

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class Client(Blocking):
    async def connect(self, url: str) -> None:
        self.connection = amqpstorm.UriConnection(url)

    async def close(self) -> None:
        self.connection.close()

    async def channel(self, *, confirms: bool = True) -> Any:
        channel = self.connection.channel()
        if confirms:
            channel.confirm_deliveries()
        return channel

    async def qos(self, channel: Any, prefetch: int) -> None:
        channel.basic.qos(prefetch)

    async def publisher(
        self, channel: Any, exchange: str, key: str, body: bytes, *, persistent: bool = False
    ) -> Callable[[], Awaitable[object]]:
        mode = 2 if persistent else 1

        def publish_one() -> Awaitable[object]:
            properties = {"content_type": CONTENT_TYPE, "delivery_mode": mode}
            channel.basic.publish(body, key, exchange, properties=properties)
            return DONE

        return publish_one

    async def consume(self, channel: Any, queue: str, n: int, *, ack: bool) -> None:
        seen = 0

        def on_message(message: Any) -> None:
            nonlocal seen
            if ack:
                message.ack()
            seen += 1
            if seen == n:
                channel.stop_consuming()

        channel.basic.consume(on_message, queue, no_ack=not ack)
        channel.start_consuming()

    async def iterate(self, channel: Any, queue: str, n: int) -> None:
        channel.basic.consume(None, queue)
        for seen, message in enumerate(channel.build_inbound_messages(break_on_empty=False), 1):
            message.ack()
            if seen == n:
                break
