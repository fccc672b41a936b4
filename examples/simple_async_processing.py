"""Work on up to five messages of the queue `leveret.demo` at the same time, until Ctrl-C.

Run it, and in a second terminal the publisher::

    python examples/simple_async_processing.py
    python examples/simple_publisher.py
"""

import asyncio
import contextlib
import os
import signal
import sys

import leveret

URL = os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/")
QUEUE = "leveret.demo"


async def handle(message: leveret.IncomingMessage) -> None:
    # If this block raises, the message goes back to the queue once; the second time it is dropped, or goes to
    # the queue's dead-letter exchange. If it is cancelled (Ctrl-C), the message always goes back.
    async with message.process(requeue=True, reject_on_redelivered=True):
        await asyncio.sleep(0.1)  # here you would call a database or a web service
        print(f"Done: {message.body.decode()}")


async def main() -> None:
    async with await leveret.connect_robust(URL) as connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=5)  # which is also how many callbacks may run at a time
        queue = await channel.declare_queue(QUEUE, durable=True)
        await queue.consume(handle)
        print(f"Waiting for messages in {QUEUE}. To stop, press Ctrl-C.")

        await channel.closed()  # comes only if the broker or the network ends it; the log says why
        sys.exit("The channel was closed.")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # even where a shell script had it ignored
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))  # stop as on Ctrl-C
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
