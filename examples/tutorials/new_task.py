"""Tutorial 2, work queues: hand a task to whichever worker is free; each dot is a second of work.

Start one worker or more, and give them tasks::

    python examples/tutorials/worker.py
    python examples/tutorials/new_task.py A very hard task...

https://www.rabbitmq.com/tutorials/tutorial-two-python
"""

import asyncio
import os
import sys

import leveret

URL = os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/")


async def main(task: str) -> None:
    async with await leveret.connect(URL) as connection:
        channel = await connection.channel(on_return_raises=True)
        # A quorum queue is replicated in a cluster, and always durable.
        queue = await channel.declare_queue("task_queue", durable=True, arguments={"x-queue-type": "quorum"})
        message = leveret.Message(task.encode(), delivery_mode=leveret.DeliveryMode.PERSISTENT)
        await channel.default_exchange.publish(message, routing_key=queue.name)
        print(f" [x] Sent {task!r}")  # confirmed: the task survives a crash of the broker now


if __name__ == "__main__":
    asyncio.run(main(" ".join(sys.argv[1:]) or "Hello World!"))
