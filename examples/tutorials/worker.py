"""Tutorial 2, work queues: take one task at a time from the queue `task_queue`, until Ctrl-C.

Start as many as you like; the broker shares the tasks out among them::

    python examples/tutorials/worker.py
    python examples/tutorials/new_task.py A very hard task...

https://www.rabbitmq.com/tutorials/tutorial-two-python
"""

import asyncio
import contextlib
import os
import signal

import leveret

URL = os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/")


async def work(task: str) -> None:
    print(f" [x] Received {task!r}")
    await asyncio.sleep(task.count("."))
    print(" [x] Done")


async def main() -> None:
    async with await leveret.connect(URL) as connection:
        channel = await connection.channel()
        # The next task comes when this one is acknowledged: a busy worker gets none that a free one could do.
        await channel.set_qos(prefetch_count=1)
        queue = await channel.declare_queue("task_queue", durable=True, arguments={"x-queue-type": "quorum"})

        async with queue.iterator() as messages:
            print(" [*] Waiting for tasks. To exit press CTRL+C")
            async for message in messages:
                # Acknowledged when the work is done. A worker that dies or is stopped loses no task.
                async with message.process():
                    await work(message.body.decode())


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # even where a shell script had it ignored
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))  # stop as on Ctrl-C
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
