"""Tutorial 3, publish/subscribe: print every log line sent from now on, until Ctrl-C.

Start one receiver or more, and send::

    python examples/tutorials/receive_logs.py
    python examples/tutorials/emit_log.py Something happened

https://www.rabbitmq.com/tutorials/tutorial-three-python
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
        exchange = await channel.declare_exchange("logs", leveret.ExchangeType.FANOUT, durable=True)
        # A queue of our own: the broker makes up its name, and deletes it when this connection ends.
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind(exchange)

        async with queue.iterator(no_ack=True) as messages:
            print(" [*] Waiting for logs. To exit press CTRL+C")
            async for message in messages:
                print(f" [x] {message.body.decode()}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # even where a shell script had it ignored
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))  # stop as on Ctrl-C
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
