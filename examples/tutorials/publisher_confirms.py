"""Tutorial 7, publisher confirms: four ways to wait for them, and what each costs.

It needs no sibling::

    python examples/tutorials/publisher_confirms.py
    python examples/tutorials/publisher_confirms.py 50000

A message is safe when the broker has confirmed it. What you choose is how many may be on their way meanwhile.

https://www.rabbitmq.com/tutorials/tutorial-seven-java
"""

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable

import leveret

URL = os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/")
BATCH = 100

Publish = Callable[[leveret.Channel, str, int], Awaitable[None]]


async def one_by_one(channel: leveret.Channel, queue: str, count: int) -> None:
    """Wait for each confirm before the next message: simple, and one round trip each."""
    for number in range(count):
        await channel.default_exchange.publish(leveret.Message(str(number).encode()), queue)


async def in_batches(channel: leveret.Channel, queue: str, count: int) -> None:
    """Wait once for each hundred messages."""
    for start in range(0, count, BATCH):
        # publish() sends at once; awaiting what it returns waits for the confirm. gather() makes no task for it.
        await asyncio.gather(
            *(
                channel.default_exchange.publish(leveret.Message(str(number).encode()), queue)
                for number in range(start, min(start + BATCH, count))
            )
        )


async def all_in_flight(channel: leveret.Channel, queue: str, count: int) -> None:
    """Send everything, and look at each outcome by itself."""
    confirms = [
        channel.default_exchange.publish(leveret.Message(str(number).encode()), queue) for number in range(count)
    ]
    for number, outcome in enumerate(await asyncio.gather(*confirms, return_exceptions=True)):
        if isinstance(outcome, BaseException):
            print(f"Message {number} is not confirmed: {outcome!r}")  # publish it again, or tell somebody


async def by_iterable(channel: leveret.Channel, queue: str, count: int) -> None:
    """Let leveret keep as many in flight as is good, and look at those that failed."""
    messages = (leveret.Message(str(number).encode()) for number in range(count))
    report = await channel.default_exchange.publish_many(messages, queue)
    for failure in report.failures:
        print(f"Message {failure.index} is not confirmed: {failure.error!r}")


async def measure(channel: leveret.Channel, publish: Publish, count: int) -> None:
    queue = await channel.declare_queue(exclusive=True)
    begun = time.perf_counter()
    await publish(channel, queue.name, count)
    seconds = time.perf_counter() - begun
    kept = (await channel.get_queue(queue.name)).declaration_result.message_count
    rate = count / seconds
    print(f"{publish.__name__:>13}: {kept:,} messages confirmed in {seconds:.2f} s, {rate:,.0f} a second")


async def main(count: int) -> None:
    async with await leveret.connect(URL) as connection:
        channel = await connection.channel(on_return_raises=True)
        for publish in (one_by_one, in_batches, all_in_flight, by_iterable):
            await measure(channel, publish, count)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if sys.argv[1:] else 10_000))
