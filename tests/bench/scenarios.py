"""What is measured. Each scenario prepares, and does its work inside ``with meter``."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import Self

    from tests.bench.adapter import Adapter

EXCHANGE = "leveret.bench"
"""A fanout exchange, bound to a queue that keeps nothing. (aio-pika publishes with ``mandatory``: without a queue
every message would come back.)"""
REPLIES = "leveret.bench.replies"


@dataclass
class Job:
    """One measurement: *n* messages with bodies of *size* bytes."""

    url: str
    n: int
    size: int

    @property
    def body(self) -> bytes:
        return b"x" * self.size

    @property
    def queue(self) -> str:
        """The queue of this job; the null sink reads off its name what to deliver."""
        return f"leveret.bench.{self.n}.{self.size}"


@dataclass
class Meter:
    """Measures what is done inside ``with meter``, *n* messages' worth."""

    n: int
    figures: dict[str, float] = field(default_factory=dict)

    def __enter__(self) -> Self:
        gc.collect()
        self._rss = _rss()
        self._cpu = cpu_seconds()
        self._wall = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        wall = time.perf_counter() - self._wall
        cpu = cpu_seconds() - self._cpu
        self.figures |= {
            "cpu_us": cpu / self.n * 1e6,
            "per_second": self.n / wall,
            "rss_bytes": (_rss() - self._rss) / self.n,
        }

    def latencies(self, seconds: list[float]) -> None:
        """One for each message."""
        seconds.sort()
        self.figures["p50_us"] = seconds[len(seconds) // 2] * 1e6
        self.figures["p99_us"] = seconds[len(seconds) * 99 // 100] * 1e6


def cpu_seconds() -> float:
    """CPU time of this process, all its threads, user and system."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _rss() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ----------------------------------------------------------------------------------------------- publishing


async def publish(client: Adapter, job: Job, meter: Meter, *, confirms: bool) -> None:
    channel = await client.open(job.url, confirms=confirms)
    publish = await client.publisher(channel, EXCHANGE, "key", job.body)
    with meter:
        for _ in range(job.n):
            await publish()
        await client.qos(channel, 1)


async def publish_in_flight(client: Adapter, job: Job, meter: Meter, *, quorum: bool = False) -> None:
    _need_concurrency(client)
    channel = await client.open(job.url)
    exchange, key = ("", job.queue) if quorum else (EXCHANGE, "key")
    publish = await client.publisher(channel, exchange, key, job.body, persistent=quorum)
    with meter:
        for begun in range(0, job.n, 1000):
            await asyncio.gather(*[publish() for _ in range(min(1000, job.n - begun))])


async def publish_many(client: Adapter, job: Job, meter: Meter) -> None:
    channel = await client.open(job.url)
    with meter:
        await client.publish_many(channel, EXCHANGE, "key", job.body, job.n)


async def publish_on_200_channels(client: Adapter, job: Job, meter: Meter) -> None:
    _need_concurrency(client)
    each = max(1, job.n // 200)
    meter.n = 200 * each
    await client.connect(job.url)
    publishers = [await client.publisher(await client.channel(), EXCHANGE, "key", job.body) for _ in range(200)]

    async def work(publish: Callable[[], Awaitable[object]]) -> None:
        for _ in range(each):
            await publish()

    with meter:
        await asyncio.gather(*map(work, publishers))


# ------------------------------------------------------------------------------------------------ consuming


async def consume(
    client: Adapter, job: Job, meter: Meter, *, how: str = "consume", prefetch: int, **options: Any
) -> None:
    channel = await client.open(job.url)
    if prefetch:
        await client.qos(channel, prefetch)
    with meter:
        await getattr(client, how)(channel, job.queue, job.n, **options)
        await client.qos(channel, 1)


# ----------------------------------------------------------------------------------------------- round trips


async def rpc(client: Adapter, job: Job, meter: Meter, *, at_once: int) -> None:
    _need_concurrency(client)
    channel = await client.open(job.url, confirms=False)
    send = client.sender(channel)
    waiting: dict[str, asyncio.Future[None]] = {}

    def serve(body: bytes, correlation_id: str, reply_to: str) -> Awaitable[object]:
        return send(reply_to, body, correlation_id)

    def on_reply(_body: bytes, correlation_id: str, _reply_to: str) -> None:
        waiting.pop(correlation_id).set_result(None)

    await client.listen(channel, job.queue, serve)
    await client.listen(channel, REPLIES, on_reply)
    loop, body = asyncio.get_running_loop(), job.body

    async def call(number: int) -> None:
        reply = waiting[str(number)] = loop.create_future()
        await send(job.queue, body, str(number), REPLIES)
        await reply

    with meter:
        if at_once == 1:
            for number in range(job.n):
                await call(number)
        else:
            for begun in range(0, job.n, at_once):
                await asyncio.gather(*[call(begun + number) for number in range(min(at_once, job.n - begun))])


async def rpc_by_pattern(client: Adapter, job: Job, meter: Meter, *, at_once: int) -> None:
    _need_concurrency(client)
    channel = await client.open(job.url, confirms=False)
    call = await client.procedure(channel, f"{job.queue}.procedure")
    text = job.body.decode()
    with meter:
        if at_once == 1:
            for _ in range(job.n):
                await call(text)
        else:
            for begun in range(0, job.n, at_once):
                await asyncio.gather(*[call(text) for _ in range(min(at_once, job.n - begun))])


async def latency(client: Adapter, job: Job, meter: Meter) -> None:
    _need_concurrency(client)
    channel = await client.open(job.url, confirms=False)
    send = client.sender(channel)
    taken: list[float] = []
    done = asyncio.Event()

    def on_message(body: bytes, *_: object) -> None:
        taken.append(time.perf_counter() - float(body[:24]))
        if len(taken) == job.n:
            done.set()

    await client.listen(channel, job.queue, on_message)
    with meter:
        due = time.perf_counter()
        for _ in range(job.n):
            await send(job.queue, (b"%024.9f" % time.perf_counter()).ljust(job.size, b"x"))
            due += 1 / 500
            await asyncio.sleep(max(0, due - time.perf_counter()))
        await done.wait()
    meter.latencies(taken)


async def connect(client: Adapter, job: Job, meter: Meter) -> None:
    with meter:
        for _ in range(job.n):
            await client.open(job.url)
            await client.close()


# --------------------------------------------------------------------------------------------------- memory


async def channels(client: Adapter, job: Job, meter: Meter) -> None:
    await client.open(job.url)
    with meter:
        kept = [await client.channel() for _ in range(job.n)]
    del kept


async def queues(client: Adapter, job: Job, meter: Meter) -> None:
    channel = await client.open(job.url)
    with meter:
        kept = [await client.declare(channel, f"{job.queue}.{number}") for number in range(job.n)]
    del kept


async def messages(client: Adapter, job: Job, meter: Meter) -> None:
    channel = await client.open(job.url)
    with meter:
        kept = await client.collect(channel, job.queue, job.n)
    del kept


def _need_concurrency(client: Adapter) -> None:
    if not client.concurrent:
        raise NotImplementedError


# ------------------------------------------------------------------------------------------------- the list


@dataclass(frozen=True)
class Scenario:
    """One scenario.

    Args:
        run: the work, with a client, a job and a meter; None for the import, which is not a worker's.
        n: how many messages (or connections, channels, queues).
        figure: what the table shows, and compares.
        beside: what it shows in addition.
        prefilled: the queue holds *n* messages when it begins.
        quorum: the queue is a quorum queue.
        sized: whether the size of bodies matters.
        sink: whether the null sink will do.
    """

    run: Callable[[Adapter, Job, Meter], Awaitable[None]] | None
    n: int
    figure: str = "cpu_us"
    beside: str | None = "per_second"
    prefilled: bool = False
    quorum: bool = False
    sized: bool = True
    sink: bool = True


def _consume(prefetch: int, how: str = "consume", **options: Any) -> Scenario:
    return Scenario(partial(consume, how=how, prefetch=prefetch, **options), 20_000, prefilled=True)


SCENARIOS = {
    "pub": Scenario(partial(publish, confirms=False), 20_000),
    "pubc1": Scenario(partial(publish, confirms=True), 2_000),
    "pubc1000": Scenario(publish_in_flight, 20_000),
    "pubmany": Scenario(publish_many, 20_000),
    "pubq": Scenario(partial(publish_in_flight, quorum=True), 5_000, quorum=True, sink=False),
    "con_noack": _consume(0, ack=False),
    "con_cb100": _consume(100, ack=True),
    "con_cb1000": _consume(1000, ack=True),
    "con_it100": _consume(100, "iterate"),
    "con_it1000": _consume(1000, "iterate"),
    "con_batch": _consume(200, "batches"),
    "rpc": Scenario(partial(rpc, at_once=1), 1_500, sink=False),
    "rpc100": Scenario(partial(rpc, at_once=100), 6_000, sink=False),
    "rpc_pat": Scenario(partial(rpc_by_pattern, at_once=1), 1_500, sink=False),
    "rpc_pat100": Scenario(partial(rpc_by_pattern, at_once=100), 6_000, sink=False),
    "chan200": Scenario(publish_on_200_channels, 10_000),
    "connect": Scenario(connect, 40, sized=False),
    "import": Scenario(None, 1, beside=None, sized=False),
    "latency": Scenario(latency, 1_000, "p50_us", "p99_us", sink=False),
    "mem_channel": Scenario(channels, 1_000, "rss_bytes", None, sized=False),
    "mem_queue": Scenario(queues, 500, "rss_bytes", None, sized=False),
    "mem_message": Scenario(messages, 100_000, "rss_bytes", None, prefilled=True),
}
