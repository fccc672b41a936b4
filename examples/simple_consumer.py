"""Print every message of the queue `leveret.demo`, one after another, until Ctrl-C.

Run it, and in a second terminal the publisher::

    python examples/simple_consumer.py
    python examples/simple_publisher.py
"""

import asyncio
import contextlib
import os
import signal

import leveret

URL = os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/")
QUEUE = "leveret.demo"


async def main() -> None:
    async with await leveret.connect_robust(URL) as connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=20)  # how many messages the broker may send ahead
        queue = await channel.declare_queue(QUEUE, durable=True)

        async with queue.iterator() as messages:
            print(f"Waiting for messages in {QUEUE}. To stop, press Ctrl-C.")
            async for message in messages:
                async with message.process():  # acknowledges at the end of the block, rejects on an exception
                    print(f"Received: {message.body.decode()}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # even where a shell script had it ignored
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))  # stop as on Ctrl-C
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
