"""Transactions, as aio-pika 10's documentation shows them."""

import asyncio
import os

import leveret as aio_pika


async def main() -> None:
    connection = await aio_pika.connect_robust(os.environ["AMQP_URL"])

    async with connection:
        routing_key = "test_queue_transact"
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

        tx = channel.transaction()
        await tx.select()
        await channel.default_exchange.publish(aio_pika.Message(body=b"Gone"), routing_key=routing_key)
        await tx.rollback()

        result = await queue.declare()
        print(result.message_count, tx.state is aio_pika.abc.TransactionState.ROLLED_BACK)


if __name__ == "__main__":
    asyncio.run(main())
