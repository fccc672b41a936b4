"""Fetch one message from the queue `leveret.demo`, if there is one.

Put some in with the publisher first::

    python examples/simple_publisher.py
    python examples/get_one_message.py

Fetching asks the broker once for each message. For more than now and then, consume: see simple_consumer.py.
"""

import asyncio
import os

import leveret

URL = os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/")
QUEUE = "leveret.demo"


async def main() -> None:
    async with await leveret.connect(URL) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue(QUEUE, durable=True)

        message = await queue.get(fail=False)  # with fail=True, the default, an empty queue raises QueueEmpty
        if message is None:
            print("The queue is empty.")
            return
        async with message.process():
            print(f"Got: {message.body.decode()} ({message.message_count} more in the queue)")


if __name__ == "__main__":
    asyncio.run(main())
