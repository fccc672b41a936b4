"""Publish in transactions: what is committed arrives together, what is rolled back never does.

It needs no sibling::

    python examples/transactions.py

Transactions are slow, and RabbitMQ keeps them for one queue at a time only. When all you want to know is whether
the broker has your messages, publisher confirms (the default everywhere else here) are what you need.
"""

import asyncio
import os

import leveret

URL = os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/")


async def count(queue: leveret.Queue) -> int:
    """How many messages are ready in the queue."""
    return (await queue.channel.get_queue(queue.name)).declaration_result.message_count or 0


async def main() -> None:
    async with await leveret.connect(URL) as connection:
        channel = await connection.channel(publisher_confirms=False)  # a channel has transactions or confirms
        queue = await channel.declare_queue(exclusive=True)
        exchange = channel.default_exchange

        async with channel.transaction():  # commits at the end of the block
            await exchange.publish(leveret.Message(b"debit"), queue.name)
            await exchange.publish(leveret.Message(b"credit"), queue.name)
            print(f"Before the commit: {await count(queue)} messages")
        print(f"After the commit: {await count(queue)} messages")

        try:
            async with channel.transaction():
                await exchange.publish(leveret.Message(b"a mistake"), queue.name)
                raise LookupError("no such account")  # any exception rolls it back
        except LookupError as error:
            print(f"Rolled back ({error}): {await count(queue)} messages")


if __name__ == "__main__":
    asyncio.run(main())
