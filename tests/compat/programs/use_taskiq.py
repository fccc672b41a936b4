"""taskiq-aio-pika: tasks with results, a retry, a delay, and a connection that is cut between two of them."""

from __future__ import annotations

import asyncio
import uuid

from common import URL, cut, finish
from taskiq import InMemoryBroker, SimpleRetryMiddleware
from taskiq.api import run_receiver_task
from taskiq_aio_pika import AioPikaBroker, Exchange, Queue

name = f"taskiq-{uuid.uuid4().hex}"
broker = (
    AioPikaBroker(
        URL,
        exchange=Exchange(name=name),
        delay_queue=Queue(name=f"{name}.delay"),
        dead_letter_queue=Queue(name=f"{name}.dead"),
        reconnect_interval=0.1,
    )
    .with_queue(Queue(name=name))
    .with_result_backend(InMemoryBroker().result_backend)
    .with_middlewares(SimpleRetryMiddleware(default_retry_count=3))
)
attempts = 0


@broker.task
async def add(one: int, two: int) -> int:
    return one + two


@broker.task(retry_on_error=True)
async def third_time_lucky() -> int:
    global attempts
    attempts += 1
    if attempts < 3:
        raise ValueError("not yet")
    return attempts


async def result(task) -> object:
    return (await task.wait_result(timeout=20)).return_value


async def main() -> None:
    broker.is_worker_process = True
    await broker.startup()
    worker = asyncio.create_task(run_receiver_task(broker))
    assert await result(await add.kiq(1, 2)) == 3
    assert await result(await third_time_lucky.kiq()) == 3
    before = asyncio.get_running_loop().time()
    assert await result(await add.kicker().with_labels(delay=0.5).kiq(2, 3)) == 5
    assert asyncio.get_running_loop().time() - before >= 0.4
    await cut(broker.read_conn, broker.write_conn)
    assert await result(await add.kiq(4, 5)) == 9
    results = [await result(task) for task in [await add.kiq(n, n) for n in range(20)]]
    assert results == [2 * n for n in range(20)], results
    worker.cancel()
    await asyncio.gather(worker, return_exceptions=True)
    await broker.shutdown()
    finish()


asyncio.run(main())
