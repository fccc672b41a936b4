"""FastStream's RabbitMQ broker: handlers, manual acks, rejects, requeues, RPC, a lost connection, its test broker."""

from __future__ import annotations

import asyncio
import uuid

from common import URL, cut, finish, settled
from faststream import AckPolicy
from faststream.exceptions import NackMessage, RejectMessage
from faststream.rabbit import (
    Channel,
    ExchangeType,
    RabbitBroker,
    RabbitExchange,
    RabbitMessage,
    RabbitQueue,
    TestRabbitBroker,
)

prefix = f"faststream-{uuid.uuid4().hex}"
broker = RabbitBroker(URL, default_channel=Channel(prefetch_count=10), reconnect_interval=0.1, log_level=10)
dead = RabbitExchange(f"{prefix}.dead", type=ExchangeType.FANOUT, auto_delete=True)
topic = RabbitExchange(f"{prefix}.topic", type=ExchangeType.TOPIC, auto_delete=True)
work = RabbitQueue(f"{prefix}.work", arguments={"x-dead-letter-exchange": dead.name}, auto_delete=True)
seen: list[str] = []
buried: list[str] = []
logs: list[tuple[str, dict]] = []


@broker.subscriber(work)
async def handle(body: str, message: RabbitMessage) -> None:
    seen.append(body)
    if body == "again" and seen.count("again") < 3:
        raise NackMessage(requeue=True)
    if body == "bad":
        raise RejectMessage(requeue=False)


@broker.subscriber(RabbitQueue(f"{prefix}.manual", auto_delete=True), ack_policy=AckPolicy.MANUAL)
async def by_hand(body: str, message: RabbitMessage) -> None:
    seen.append(f"manual {body}")
    await message.ack()


@broker.subscriber(RabbitQueue(f"{prefix}.graves", auto_delete=True), dead)
async def bury(body: str) -> None:
    buried.append(body)


@broker.subscriber(RabbitQueue(f"{prefix}.logs", routing_key="logs.*", auto_delete=True), topic)
async def log(body: str, message: RabbitMessage) -> None:
    logs.append((message.raw_message.routing_key, message.headers))


@broker.subscriber(RabbitQueue(f"{prefix}.square", auto_delete=True))
async def square(n: int) -> int:
    return n * n


async def in_memory() -> None:
    async with TestRabbitBroker(broker) as test:
        await test.publish("in memory", work)
        handle.mock.assert_called_once_with("in memory")
        assert await (await test.request(6, f"{prefix}.square")).decode() == 36
    seen.clear()


async def main() -> None:
    await in_memory()
    await broker.start()
    assert await broker.ping(timeout=5)
    for body in ("good", "again", "bad"):
        await broker.publish(body, work)
    await broker.publish("done", f"{prefix}.manual")
    await broker.publish("told", exchange=topic, routing_key="logs.info", headers={"k": "v"})
    await settled(lambda: len(seen) == 6 and buried and logs)
    assert sorted(seen) == ["again", "again", "again", "bad", "good", "manual done"], seen
    assert buried == ["bad"]
    assert logs[0][0] == "logs.info"
    assert logs[0][1]["k"] == "v"
    assert await (await broker.request(7, f"{prefix}.square", timeout=10)).decode() == 49
    seen.clear()
    await cut(broker._connection)
    await broker.publish("after", work)
    await settled(lambda: seen == ["after"])
    assert await (await broker.request(8, f"{prefix}.square", timeout=10)).decode() == 64
    assert await broker.ping(timeout=5)
    await broker.stop()
    finish()


asyncio.run(main())
