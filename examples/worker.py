"""Work on tasks that master.py publishes, until Ctrl-C.

Run it, and in a second terminal the master::

    python examples/worker.py
    python examples/master.py
"""

import asyncio
import os

import leveret
from leveret.patterns import Master, RejectMessage

URL = os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/")


async def work(*, number: int) -> None:
    if number < 0:
        print(f"Refused: {number}", flush=True)
        raise RejectMessage  # dropped, or sent to the queue's dead-letter exchange
    await asyncio.sleep(0.1)  # here you would call a database or a web service
    print(f"Done: {number}", flush=True)


async def main() -> None:
    connection = await leveret.connect_robust(URL)
    master = Master(await connection.channel(), reject_on_redelivered=True)
    await master.create_worker("leveret.tasks", work, concurrency=5, durable=True)
    print("Waiting for tasks. To stop, press Ctrl-C.")
    await leveret.run_until_signalled(connection, drain=30)


if __name__ == "__main__":
    asyncio.run(main())
