"""In the way of aio-pika 6.8's documentation: loop=, a sync process(), acks that nobody awaits, add_…_callback()."""

import asyncio
import os

import leveret as aio_pika


async def main(loop):
    connection = await aio_pika.connect_robust(os.environ["AMQP_URL"], loop=loop)
    connection.add_close_callback(lambda sender, exc: print("closed", type(sender).__name__))
    connection.add_reconnect_callback(lambda sender, connection: print("never"))
    queue_name = "test_queue_older"

    async with connection:
        channel = await connection.channel()  # type: aio_pika.Channel
        channel.add_close_callback(lambda sender, exc: print("channel closed"))
        channel.add_on_return_callback(lambda sender, message: print("returned", message.body))
        await channel.set_qos(prefetch_count=1, all_channels=False)
        exchange = await channel.declare_exchange("older_direct", auto_delete=True)
        queue = await channel.declare_queue(queue_name, auto_delete=True)
        await queue.bind(exchange, queue_name)
        await exchange.publish(aio_pika.Message(b"nowhere"), "no such key")
        for body in (b"one", b"two", queue_name.encode()):
            await exchange.publish(aio_pika.Message(body), routing_key=queue_name)

        incoming_message = await queue.get(timeout=5)
        incoming_message.ack()
        print(incoming_message.body)

        async with queue.iterator() as queue_iter:
            async for message in queue_iter:
                with message.process():
                    print(message.body)
                    if queue.name in message.body.decode():
                        break


if __name__ == "__main__":
    loop = asyncio.new_event_loop()
    loop.run_until_complete(main(loop))
    loop.close()
