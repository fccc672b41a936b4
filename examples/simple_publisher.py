"""Publish ten messages to the queue `leveret.demo`, and see the broker confirm each.

Run it as often as you like; simple_consumer.py, simple_async_processing.py and get_one_message.py take them out::

    python examples/simple_publisher.py
"""

import asyncio
import os

import leveret

URL = os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/")
QUEUE = "leveret.demo"


async def main() -> None:
    async with await leveret.connect_robust(URL) as connection:
        # A message that no queue takes comes back, and publish() raises MessageReturned.
        channel = await connection.channel(on_return_raises=True)
        await channel.declare_queue(QUEUE, durable=True)

        for number in range(1, 11):
            message = leveret.Message(
                f"Message {number} of 10".encode(),
                content_type="text/plain",
                delivery_mode=leveret.DeliveryMode.PERSISTENT,  # with a durable queue: survives a restart
            )
            await channel.default_exchange.publish(message, routing_key=QUEUE)  # returns when it is confirmed
            print(f"Confirmed: {message.body.decode()}")


if __name__ == "__main__":
    asyncio.run(main())
