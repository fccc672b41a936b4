"""Tutorial 1, "Hello World!": send one message to the queue `hello`.

Its sibling prints it, now or later::

    python examples/tutorials/send.py
    python examples/tutorials/receive.py

https://www.rabbitmq.com/tutorials/tutorial-one-python
"""

import asyncio
import os

import leveret

URL = os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/")


async def main() -> None:
    async with await leveret.connect(URL) as connection:
        channel = await connection.channel(on_return_raises=True)
        # Both sides declare the queue, so it does not matter which of them starts first.
        queue = await channel.declare_queue("hello", durable=True)
        # Messages go to an exchange; the default one hands them to the queue that the routing key names.
        await channel.default_exchange.publish(leveret.Message(b"Hello World!"), routing_key=queue.name)
        print(" [x] Sent 'Hello World!'")


if __name__ == "__main__":
    asyncio.run(main())
