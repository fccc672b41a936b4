"""Tutorial 4, routing: print log lines of the severities that you name, until Ctrl-C.

Start receivers for some severities, and send::

    python examples/tutorials/receive_logs_direct.py warning error
    python examples/tutorials/emit_log_direct.py error The disk is full

https://www.rabbitmq.com/tutorials/tutorial-four-python
"""

import asyncio
import contextlib
import os
import signal
import sys

import leveret

URL = os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/")


async def main(severities: list[str]) -> None:
    async with await leveret.connect(URL) as connection:
        channel = await connection.channel()
        exchange = await channel.declare_exchange("direct_logs", leveret.ExchangeType.DIRECT, durable=True)
        queue = await channel.declare_queue(exclusive=True)
        for severity in severities:
            await queue.bind(exchange, routing_key=severity)

        async with queue.iterator(no_ack=True) as messages:
            print(" [*] Waiting for logs. To exit press CTRL+C")
            async for message in messages:
                print(f" [x] {message.routing_key}:{message.body.decode()}")


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(f"Usage: {sys.argv[0]} [info] [warning] [error]")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # even where a shell script had it ignored
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))  # stop as on Ctrl-C
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(sys.argv[1:]))
