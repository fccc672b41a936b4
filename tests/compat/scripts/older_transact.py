"""Transactions in the way of aio-pika 6.8's documentation, which closes them."""

import asyncio
import os

import leveret as aio_pika


async def main(loop):
    connection = await aio_pika.connect_robust(os.environ["AMQP_URL"], loop=loop)

    async with connection:
        routing_key = "test_queue_older_tx"
        channel = await connection.channel(publisher_confirms=False)
        queue = await channel.declare_queue(routing_key, auto_delete=True)

        async with channel.transaction():
            for i in range(10):
                message = aio_pika.Message(body=f"Hello #{i}".encode())
                await channel.default_exchange.publish(message, routing_key=routing_key)

        tx = channel.transaction()
        await tx.select()
        await channel.default_exchange.publish(aio_pika.Message(body=b"Hello"), routing_key=routing_key)
        await tx.commit()
        tx.close()

        tx = channel.transaction()
        await tx.select()
        await channel.default_exchange.publish(aio_pika.Message(body=b"Should be rejected"), routing_key=routing_key)
        await tx.rollback()
        tx.close()
        print((await queue.declare()).message_count)


if __name__ == "__main__":
    loop = asyncio.new_event_loop()
    loop.run_until_complete(main(loop))
    loop.close()
