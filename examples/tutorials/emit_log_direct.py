"""Tutorial 4, routing: send a log line with a severity.

Start receivers for some severities, and send::

    python examples/tutorials/receive_logs_direct.py warning error
    python examples/tutorials/emit_log_direct.py error The disk is full

https://www.rabbitmq.com/tutorials/tutorial-four-python
"""

import asyncio
import os
import sys

import leveret

URL = os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/")


async def main(severity: str, line: str) -> None:
    async with await leveret.connect(URL) as connection:
        channel = await connection.channel()
        # A direct exchange gives a copy to each queue that is bound with exactly this routing key.
        exchange = await channel.declare_exchange("direct_logs", leveret.ExchangeType.DIRECT, durable=True)
        # mandatory=False: the broker drops what nobody wants, and does not send it back.
        await exchange.publish(leveret.Message(line.encode()), routing_key=severity, mandatory=False)
        print(f" [x] Sent {severity}:{line}")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if sys.argv[1:] else "info", " ".join(sys.argv[2:]) or "Hello World!"))
