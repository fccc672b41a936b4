"""Consuming by a callback, with tools and annotations imported from aio-pika's modules."""

import asyncio
import os

import leveret as aio_pika
from leveret.abc import AbstractIncomingMessage, AbstractRobustConnection, HeadersType
from leveret.exceptions import AMQPException
from leveret.tools import create_task

seen: list[bytes] = []
done = asyncio.Event()


async def process_message(message: AbstractIncomingMessage) -> None:
    async with message.process():
        headers: HeadersType = message.headers
        print(message.body, headers)
        await asyncio.sleep(0)
        seen.append(message.body)
        if len(seen) == 3:
            done.set()


async def main() -> None:
    connection: AbstractRobustConnection = await aio_pika.connect_robust(os.environ["AMQP_URL"])
    queue_name = "test_queue_process"
    channel = await connection.channel()
    await channel.set_qos(prefetch_count=100)
    queue = await channel.declare_queue(queue_name, auto_delete=True)
    tag = await queue.consume(process_message)
    try:
        for n in range(3):
            task = create_task(
                channel.default_exchange.publish,
                aio_pika.Message(b"%d" % n, headers={"n": n}, delivery_mode=aio_pika.DeliveryMode.PERSISTENT),
                queue_name,
            )
            await task
        await done.wait()
        await queue.cancel(tag)
    except AMQPException as exc:
        print("failed", exc)
    finally:
        await connection.close()


if __name__ == "__main__":
    asyncio.run(main())
