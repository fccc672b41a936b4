"""Tutorial 6, remote procedure call: ask the server for Fibonacci numbers, all at a time.

Run the server, and in a second terminal the client::

    python examples/tutorials/rpc_server.py
    python examples/tutorials/rpc_client.py 10 20 30

https://www.rabbitmq.com/tutorials/tutorial-six-python
"""

import asyncio
import os
import sys
import uuid

import leveret

URL = os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/")
TIMEOUT = 30


class FibonacciClient:
    """Sends requests, and finds the request that each reply belongs to."""

    def __init__(self, channel: leveret.Channel) -> None:
        self._channel = channel
        self._waiting: dict[str | None, asyncio.Future[int]] = {}
        self._replies: leveret.Queue

    async def start(self) -> None:
        self._replies = await self._channel.declare_queue(exclusive=True)
        await self._replies.consume(self._on_reply, no_ack=True)

    async def _on_reply(self, message: leveret.IncomingMessage) -> None:
        future = self._waiting.get(message.correlation_id)
        if future is not None and not future.done():  # else it came too late
            future.set_result(int(message.body))

    async def call(self, n: int) -> int:
        correlation_id = uuid.uuid4().hex
        reply: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting[correlation_id] = reply
        try:
            async with asyncio.timeout(TIMEOUT):
                request = leveret.Message(
                    str(n).encode(),
                    correlation_id=correlation_id,
                    reply_to=self._replies.name,
                    expiration=TIMEOUT,  # afterwards no server needs to bother
                )
                await self._channel.default_exchange.publish(request, routing_key="rpc_queue")
                return await reply
        finally:
            del self._waiting[correlation_id]


async def main(numbers: list[int]) -> None:
    async with await leveret.connect(URL) as connection:
        # Raises MessageReturned if there is no rpc_queue, which is better than to wait for a reply in vain.
        client = FibonacciClient(await connection.channel(on_return_raises=True))
        await client.start()
        print(f" [x] Requesting fib of {numbers}")
        for n, result in zip(numbers, await asyncio.gather(*map(client.call, numbers)), strict=True):
            print(f" [.] fib({n}) = {result}")


if __name__ == "__main__":
    asyncio.run(main([int(n) for n in sys.argv[1:]] or [30]))
