"""What is measured against, and what has to be there before a scenario begins."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import leveret
from tests.bench.peers import compiled
from tests.bench.scenarios import EXCHANGE, REPLIES
from tests.support.node import Node

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.bench.scenarios import Job, Scenario

DROP_QUEUE = "leveret.bench.drop"


@dataclass(frozen=True)
class Broker:
    """RabbitMQ, or the null sink: its name for people, and its URL."""

    name: str
    url: str
    is_sink: bool = False

    @contextlib.contextmanager
    def prepared(self, scenario: Scenario, job: Job) -> Iterator[None]:
        """Have what the scenario needs while this is open. The sink pretends that everything is there."""
        if self.is_sink:
            yield
            return
        asyncio.run(_declare(scenario, job))
        try:
            yield
        finally:
            asyncio.run(_delete(job))


@contextlib.contextmanager
def sink() -> Iterator[Broker]:
    """The null sink, which swallows and delivers at once, and so shows the limit of the client alone."""
    program = compiled(Path(__file__).with_name("sink.c"))
    # It ends with its standard input, that is with this process.
    with subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield Broker("null sink", f"amqp://guest:guest@127.0.0.1:{int(process.stdout.readline())}/", is_sink=True)


@contextlib.contextmanager
def rabbitmq(url: str | None) -> Iterator[Broker]:
    """The broker at *url*; None for a private node."""
    with contextlib.nullcontext() if url else Node("4.0") as node:
        found = url or node.url  # type: ignore[union-attr]
        yield Broker(asyncio.run(_name(found)), found)


async def _name(url: str) -> str:
    async with await leveret.connect(url) as connection:
        return "{product} {version}".format_map(connection.server_properties)


@contextlib.asynccontextmanager
async def _channel(url: str) -> AsyncIterator[leveret.Channel]:
    async with await leveret.connect(url) as connection, connection.channel() as channel:
        yield channel


async def _declare(scenario: Scenario, job: Job) -> None:
    await _delete(job)
    async with _channel(job.url) as channel:
        exchange = await channel.declare_exchange(EXCHANGE, leveret.ExchangeType.FANOUT)
        drop = await channel.declare_queue(DROP_QUEUE, durable=True, arguments={"x-max-length": 0})
        await drop.bind(exchange)
        await channel.declare_queue(REPLIES, durable=True)
        kind = "quorum" if scenario.quorum else "classic"
        await channel.declare_queue(job.queue, durable=True, arguments={"x-queue-type": kind})
        if scenario.prefilled:
            message = leveret.Message(job.body, content_type="application/octet-stream")
            for begun in range(0, job.n, 1000):
                left = min(1000, job.n - begun)
                await asyncio.gather(*[channel.default_exchange.publish(message, job.queue) for _ in range(left)])


async def _delete(job: Job) -> None:
    async with _channel(job.url) as channel:
        for queue in (job.queue, REPLIES, DROP_QUEUE):
            await channel.queue_delete(queue)
        await channel.exchange_delete(EXCHANGE)
