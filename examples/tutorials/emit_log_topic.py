"""Tutorial 5, topics: send a log line with a routing key of several words, <facility>.<severity>.

Start receivers for some patterns, and send::

    python examples/tutorials/receive_logs_topic.py "kern.*" "*.critical"
    python examples/tutorials/emit_log_topic.py kern.critical A critical kernel error

https://www.rabbitmq.com/tutorials/tutorial-five-python
"""

import asyncio
import os
import sys

import leveret

URL = os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/")


async def main(routing_key: str, line: str) -> None:
    async with await leveret.connect(URL) as connection:
        channel = await connection.channel()
        exchange = await channel.declare_exchange("topic_logs", leveret.ExchangeType.TOPIC, durable=True)
        await exchange.publish(leveret.Message(line.encode()), routing_key, mandatory=False)
        print(f" [x] Sent {routing_key}:{line}")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if sys.argv[1:] else "anonymous.info", " ".join(sys.argv[2:]) or "Hello World!"))
