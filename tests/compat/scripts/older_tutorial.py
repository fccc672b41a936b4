"""Tutorials 2 and 6 in the way of aio-pika 6.8: plain callbacks, partials, sync process(), loop= everywhere."""

import asyncio
import os
import uuid
from functools import partial

from leveret import DeliveryMode, IncomingMessage, Message, connect
from leveret.exchange import Exchange


def on_task(message: IncomingMessage):
    with message.process():
        print(f" [x] Received message {message.body!r}")


async def on_request(exchange: Exchange, message: IncomingMessage):
    with message.process():
        n = int(message.body.decode())
        await exchange.publish(
            Message(body=str(n * n).encode(), correlation_id=message.correlation_id), routing_key=message.reply_to
        )


class Client:
    def __init__(self, loop):
        self.connection = None
        self.channel = None
        self.callback_queue = None
        self.futures = {}
        self.loop = loop

    async def connect(self):
        self.connection = await connect(os.environ["AMQP_URL"], loop=self.loop)
        self.channel = await self.connection.channel()
        self.callback_queue = await self.channel.declare_queue(exclusive=True)
        await self.callback_queue.consume(self.on_response)
        return self

    def on_response(self, message: IncomingMessage):
        future = self.futures.pop(message.correlation_id)
        future.set_result(message.body)
        message.ack()

    async def call(self, n):
        correlation_id = str(uuid.uuid4()).encode()
        future = self.loop.create_future()
        self.futures[str(correlation_id)] = future
        await self.channel.default_exchange.publish(
            Message(
                str(n).encode(),
                content_type="text/plain",
                correlation_id=correlation_id,
                reply_to=self.callback_queue.name,
            ),
            routing_key="older_rpc_queue",
        )
        return int(await future)


async def main(loop):
    connection = await connect(os.environ["AMQP_URL"], loop=loop)
    channel = await connection.channel()
    await channel.set_qos(prefetch_count=1)
    tasks = await channel.declare_queue("older_task_queue", auto_delete=True)
    requests = await channel.declare_queue("older_rpc_queue", auto_delete=True)
    await tasks.consume(on_task)
    await requests.consume(partial(on_request, channel.default_exchange))
    await channel.default_exchange.publish(
        Message(b"task", delivery_mode=DeliveryMode.PERSISTENT), routing_key="older_task_queue"
    )
    client = await Client(loop).connect()
    print(await client.call(30))
    await client.connection.close()
    await connection.close()


if __name__ == "__main__":
    loop = asyncio.new_event_loop()
    loop.run_until_complete(main(loop))
    loop.close()
