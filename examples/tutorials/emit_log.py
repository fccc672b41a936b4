"""Tutorial 3, publish/subscribe: send a log line to everybody who listens.

Start one receiver or more, and send::

    python examples/tutorials/receive_logs.py
    python examples/tutorials/emit_log.py Something happened

https://www.rabbitmq.com/tutorials/tutorial-three-python
"""

import asyncio
import os
import sys

import leveret

URL = os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/")


async def main(line: str) -> None:
    async with await leveret.connect(URL) as connection:
        channel = await connection.channel()
        # A fanout exchange gives a copy to each queue that is bound to it, and does not look at the routing key.
        exchange = await channel.declare_exchange("logs", leveret.ExchangeType.FANOUT, durable=True)
        result = await exchange.publish(leveret.Message(line.encode()), routing_key="")
        # The message comes back when no queue is bound: here that is no error.
        heard = "nobody listens" if isinstance(result, leveret.ReturnedMessage) else "somebody listens"
        print(f" [x] Sent {line!r} ({heard})")


if __name__ == "__main__":
    asyncio.run(main(" ".join(sys.argv[1:]) or "info: Hello World!"))
