"""kombu, over py-amqp."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import kombu

from tests.bench.adapter import CONTENT_TYPE, DONE, Blocking

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class Client(Blocking):
    async def connect(self, url: str) -> None:
        self.connection = kombu.Connection(url, transport_options={"confirm_publish": True})

    async def close(self) -> None:
        self.connection.close()

    async def channel(self, *, confirms: bool = True) -> Any:
        self.connection.transport_options["confirm_publish"] = confirms  # it connects with the first channel
        return self.connection.channel()

    async def qos(self, channel: Any, prefetch: int) -> None:
        channel.basic_qos(0, prefetch, False)

    async def publisher(
        self, channel: Any, exchange: str, key: str, body: bytes, *, persistent: bool = False
    ) -> Callable[[], Awaitable[object]]:
        publish, mode = kombu.Producer(channel).publish, 2 if persistent else 1

        def publish_one() -> Awaitable[object]:
            publish(
                body,
                exchange=exchange,
                routing_key=key,
                content_type=CONTENT_TYPE,
                content_encoding="binary",
                delivery_mode=mode,
            )
            return DONE

        return publish_one

    async def consume(self, channel: Any, queue: str, n: int, *, ack: bool) -> None:
        seen = 0

        def on_message(message: Any) -> None:
            nonlocal seen
            if ack:
                message.ack()
            seen += 1

        source = kombu.Queue(queue, no_declare=True)
        kombu.Consumer(channel, source, no_ack=not ack, on_message=on_message, auto_declare=False).consume()
        while seen < n:
            self.connection.drain_events()
