"""leveret, from this checkout: as aio-pika, and what only leveret has."""

from __future__ import annotations

from typing import Any

from tests.bench.adapter import CONTENT_TYPE
from tests.bench.clients import aio_pika


class Client(aio_pika.Client):
    """By way of ``connect_robust`` too."""

    package = "leveret"

    async def publish_many(self, channel: Any, exchange: str, key: str, body: bytes, n: int) -> None:
        if not hasattr(self.api.Exchange, "publish_many"):
            raise NotImplementedError
        messages = (self.api.Message(body, content_type=CONTENT_TYPE) for _ in range(n))
        await (await channel.get_exchange(exchange, ensure=False)).publish_many(messages, key, window=1000)

    async def batches(self, channel: Any, queue: str, n: int) -> None:
        if not hasattr(self.api.Queue, "batches"):
            raise NotImplementedError
        seen = 0
        async with (await channel.get_queue(queue, ensure=False)).batches(size=100) as batches:
            async for batch in batches:
                seen += len(batch)
                await batch.ack()
                if seen >= n:
                    break
