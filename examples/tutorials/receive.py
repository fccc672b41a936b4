"""Tutorial 1, "Hello World!": print what arrives in the queue `hello`, until Ctrl-C.

Run it, and in a second terminal its sibling::

    python examples/tutorials/receive.py
    python examples/tutorials/send.py

https://www.rabbitmq.com/tutorials/tutorial-one-python
"""

import asyncio
import contextlib
import os
import signal

import leveret

URL = os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/")


async def main() -> None:
    async with await leveret.connect(URL) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue("hello", durable=True)

        # no_ack: the broker forgets each message as it sends it. Tutorial 2 shows when that is too early.
        async with queue.iterator(no_ack=True) as messages:
            print(" [*] Waiting for messages. To exit press CTRL+C")
            async for message in messages:
                print(f" [x] Received {message.body.decode()!r}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # even where a shell script had it ignored
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))  # stop as on Ctrl-C
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
