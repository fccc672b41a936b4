"""Publish tasks for worker.py, each confirmed by the broker.

Run the worker, and in a second terminal the master::

    python examples/worker.py
    python examples/master.py
"""

import asyncio
import os

import leveret
from leveret.patterns import Master

URL = os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/")


async def main() -> None:
    async with await leveret.connect_robust(URL) as connection:
        master = Master(await connection.channel(on_return_raises=True))
        for number in (1, 2, 3, -4):
            await master.proxy.leveret.tasks(number=number)  # the queue is leveret.tasks
            print(f"Confirmed: {number}")


if __name__ == "__main__":
    asyncio.run(main())
