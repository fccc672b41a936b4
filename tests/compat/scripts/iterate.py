"""The first consumer of aio-pika 10's documentation: an iterator, and process()."""

import asyncio
import os

import leveret as aio_pika


async def main() -> None:
    connection = await aio_pika.connect_robust(os.environ["AMQP_URL"])
    queue_name = "test_queue_iterate"

    async with connection:
        channel: aio_pika.abc.AbstractChannel = await connection.channel()
        await channel.set_qos(prefetch_count=10)
        queue: aio_pika.abc.AbstractQueue = await channel.declare_queue(queue_name, auto_delete=True)
        for body in ("one", "two", queue_name):
            await channel.default_exchange.publish(aio_pika.Message(body=body.encode()), routing_key=queue_name)

        async with queue.iterator() as queue_iter:
            async for message in queue_iter:
                async with message.process():
                    print(message.body)
                    if queue.name in message.body.decode():
                        break


if __name__ == "__main__":
    asyncio.run(main())
