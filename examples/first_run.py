"""See leveret at work on a real RabbitMQ, even where there is none yet.

From the root of the checkout::

    python -m examples.first_run

It runs a private RabbitMQ on loopback, which it downloads from a Debian mirror the first time (Linux on x86-64), and
ends it afterwards. With ``AMQP_URL`` set it uses that broker instead.
"""

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Generator

import leveret


@contextlib.contextmanager
def broker() -> Generator[str, None, None]:
    """The URL of a broker: that of AMQP_URL, or of a private one."""
    if url := os.environ.get("AMQP_URL"):
        yield url
        return
    try:  # what the tests of leveret run on; it is in the checkout, not in the installed package
        from tests.support.node import Node
        from tests.support.provision import BrokerUnavailable, provision
    except ModuleNotFoundError:
        sys.exit("Run it from the root of the checkout, as python -m examples.first_run, or set AMQP_URL.")

    print("Getting RabbitMQ 4.0 (about 45 MB, the first time only) …")
    try:
        provision("4.0")
    except BrokerUnavailable as error:
        sys.exit(f"No RabbitMQ to run against: {error}")
    print("Starting it …")
    with Node("4.0") as node:
        yield node.url


async def publish(url: str, queue_name: str) -> None:
    async with await leveret.connect(url) as connection:
        channel = await connection.channel()
        exchange = channel.default_exchange

        await exchange.publish(leveret.Message(b"Hello, hare!"), queue_name)
        print(f"published to {queue_name!r}: the broker confirmed it")

        returned = await exchange.publish(leveret.Message(b"Anybody?"), "nowhere")
        assert isinstance(returned, leveret.ReturnedMessage)
        print(f"published to 'nowhere': it came back ({returned.reply_text})")

        begun = time.perf_counter()
        await asyncio.gather(*(exchange.publish(leveret.Message(b"%d" % n), queue_name) for n in range(10_000)))
        print(f"published 10,000 more, each confirmed: {time.perf_counter() - begun:.2f} s")


async def consume(queue: leveret.Queue) -> None:
    begun = time.perf_counter()
    async with queue.iterator() as messages:
        for _ in range(10_001):
            async with (await anext(messages)).process() as message:
                if message.body.startswith(b"Hello"):
                    print(f"consumed {message.body.decode()!r}")
    print(f"consumed 10,001 messages, each acknowledged: {time.perf_counter() - begun:.2f} s")


async def main(url: str) -> None:
    async with await leveret.connect(url) as connection:
        product, version = (connection.server_properties[key] for key in ("product", "version"))
        print(f"connected to {product} {version} at {connection}")
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=100)
        queue = await channel.declare_queue("leveret.first_run", auto_delete=True, durable=True)
        await publish(url, queue.name)
        await consume(queue)


if __name__ == "__main__":
    with broker() as url:
        asyncio.run(main(url))
