"""Work on five messages of the queue `leveret.demo` at a time; on Ctrl-C or SIGTERM, finish them and end.

Run it, and in a second terminal the publisher::

    python examples/graceful_shutdown.py
    python examples/simple_publisher.py
"""

import asyncio
import os

import leveret

URL = os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/")
QUEUE = "leveret.demo"


async def handle(message: leveret.IncomingMessage) -> leveret.Verdict:
    await asyncio.sleep(0.1)  # here you would call a database or a web service
    print(f"Done: {message.body.decode()}", flush=True)
    return leveret.Ack


async def main() -> None:
    connection = await leveret.connect_robust(URL)
    channel = await connection.channel()
    queue = await channel.declare_queue(QUEUE, durable=True)
    # A message whose callback fails is dropped, or goes to the queue's dead-letter exchange.
    await queue.consume(handle, concurrency=5, on_error="reject")
    print(f"Waiting for messages in {QUEUE}. To stop, press Ctrl-C.")

    report = await leveret.run_until_signalled(connection, drain=30)
    if report.abandoned:
        raise SystemExit(f"Not everything was finished: {report}")


if __name__ == "__main__":
    asyncio.run(main())
