"""A link that delivers byte by byte."""

from __future__ import annotations

import asyncio
import random

from yarl import URL

from leveret import Message, connect
from tests.support.proxy import FaultProxy


async def test_everything_works_byte_by_byte(amqp_url: str) -> None:
    asyncio.get_running_loop().set_debug(False)  # 400,000 steps
    url = URL(amqp_url)
    async with FaultProxy(url.host or "localhost", url.port or 5672) as proxy:
        proxy.up.slice = proxy.down.slice = 1
        async with await connect(proxy.url) as connection, connection.channel() as channel:
            queue = await channel.declare_queue(exclusive=True)
            body = random.Random(1).randbytes(65_536)
            await channel.default_exchange.publish(Message(body, headers={"a": [1, {"b": "c"}]}), queue.name)
            async with queue.iterator() as messages:
                message = await asyncio.wait_for(anext(messages), 60)
                await message.ack()
            assert (message.body, message.headers) == (body, {"a": [1, {"b": "c"}]})
            assert await queue.get(fail=False) is None
