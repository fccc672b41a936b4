"""The sixth tutorial in aio-pika's way: a client class with futures, and a server that iterates."""

import asyncio
import os
import uuid
from collections.abc import MutableMapping

from leveret import Message, connect
from leveret.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage, AbstractQueue


class FibonacciRpcClient:
    connection: AbstractConnection
    channel: AbstractChannel
    callback_queue: AbstractQueue

    def __init__(self) -> None:
        self.futures: MutableMapping[str, asyncio.Future] = {}

    async def connect(self) -> "FibonacciRpcClient":
        self.connection = await connect(os.environ["AMQP_URL"])
        self.channel = await self.connection.channel()
        self.callback_queue = await self.channel.declare_queue(exclusive=True)
        await self.callback_queue.consume(self.on_response, no_ack=True)
        return self

    async def on_response(self, message: AbstractIncomingMessage) -> None:
        if message.correlation_id is None:
            print(f"Bad message {message!r}")
            return
        future: asyncio.Future = self.futures.pop(message.correlation_id)
        future.set_result(message.body)

    async def call(self, n: int) -> int:
        correlation_id = str(uuid.uuid4())
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self.futures[correlation_id] = future
        await self.channel.default_exchange.publish(
            Message(
                str(n).encode(),
                content_type="text/plain",
                correlation_id=correlation_id,
                reply_to=self.callback_queue.name,
            ),
            routing_key="rpc_queue_compat",
        )
        return int(await future)


def fib(n: int) -> int:
    return n if n < 2 else fib(n - 1) + fib(n - 2)


async def serve(ready: asyncio.Event) -> None:
    connection = await connect(os.environ["AMQP_URL"])
    async with connection:
        channel = await connection.channel()
        exchange = channel.default_exchange
        queue = await channel.declare_queue("rpc_queue_compat", auto_delete=True)
        async with queue.iterator() as qiterator:
            ready.set()
            message: AbstractIncomingMessage
            async for message in qiterator:
                async with message.process(requeue=False):
                    assert message.reply_to is not None
                    n = int(message.body.decode())
                    response = str(fib(n)).encode()
                    await exchange.publish(
                        Message(body=response, correlation_id=message.correlation_id), routing_key=message.reply_to
                    )


async def main() -> None:
    ready = asyncio.Event()
    server = asyncio.create_task(serve(ready))
    await ready.wait()
    client = await FibonacciRpcClient().connect()
    print(await client.call(10), await client.call(12))
    await client.connection.close()
    server.cancel()
    await asyncio.gather(server, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(main())
