"""Tutorial 5, topics: print log lines whose routing key matches one of your patterns, until Ctrl-C.

In a pattern `*` stands for one word, and `#` for any number of words, none included::

    python examples/tutorials/receive_logs_topic.py "kern.*" "*.critical"
    python examples/tutorials/emit_log_topic.py kern.critical A critical kernel error

https://www.rabbitmq.com/tutorials/tutorial-five-python
"""

import asyncio
import contextlib
import os
import signal
import sys

import leveret

URL = os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/")


async def main(patterns: list[str]) -> None:
    async with await leveret.connect(URL) as connection:
        channel = await connection.channel()
        exchange = await channel.declare_exchange("topic_logs", leveret.ExchangeType.TOPIC, durable=True)
        queue = await channel.declare_queue(exclusive=True)
        for pattern in patterns:
            await queue.bind(exchange, routing_key=pattern)  # a message that fits two of them comes once

        async with queue.iterator(no_ack=True) as messages:
            print(" [*] Waiting for logs. To exit press CTRL+C")
            async for message in messages:
                print(f" [x] {message.routing_key}:{message.body.decode()}")


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(f"Usage: {sys.argv[0]} PATTERN …   for example '#', 'kern.*', '*.critical'")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # even where a shell script had it ignored
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))  # stop as on Ctrl-C
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(sys.argv[1:]))
