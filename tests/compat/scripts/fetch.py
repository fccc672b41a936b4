"""Fetching one message, as aio-pika's README does."""

import asyncio
import os

from leveret import Message, connect_robust
from leveret.abc import AbstractIncomingMessage


async def main() -> None:
    connection = await connect_robust(os.environ["AMQP_URL"], client_properties={"connection_name": "caller"})
    async with connection:
        queue_name = "test_queue_fetch"
        routing_key = "test_queue_fetch"
        channel = await connection.channel()
        exchange = await channel.declare_exchange("direct_fetch", auto_delete=True)
        queue = await channel.declare_queue(queue_name, auto_delete=True)
        await queue.bind(exchange, routing_key)
        await exchange.publish(
            Message(bytes("Hello", "utf-8"), content_type="text/plain", headers={"foo": "bar"}), routing_key
        )
        incoming_message: AbstractIncomingMessage | None = await queue.get(timeout=5, fail=False)
        if incoming_message:
            await incoming_message.ack()
            print(incoming_message.body, incoming_message.headers, incoming_message.content_type)
        else:
            print("Queue empty")
        await queue.unbind(exchange, routing_key)
        await queue.delete()


if __name__ == "__main__":
    asyncio.run(main())
