"""Everything at once: publishers and consumers of every kind, and random faults between them and the broker."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from typing import TYPE_CHECKING, Any

from leveret import ExchangeType, IncomingMessage, RobustConnection, connect, connect_robust
from leveret.exceptions import AMQPError
from leveret.types import Arguments
from tests.broker.test_helpers import eventually
from tests.chaos.checker import Ledger, Publisher, acked, consumer_count, drain_into, iterate
from tests.chaos.faults import NodeFaults, ProxyFaults, Schedule
from tests.support.proxy import FaultProxy

if TYPE_CHECKING:
    from collections.abc import Callable

    from leveret import Channel, Queue, RobustChannel
    from tests.support.node import Node

SECONDS = 30.0
CALM = 60.0
"""Seconds that everything may take to be well again: a channel that was lost often comes back after up to 30 s."""
QUORUM: Arguments = {"x-queue-type": "quorum", "x-delivery-limit": 100_000}


class Load:
    """Three robust connections: one publishes, one consumes, and one does both and is clumsy at it."""

    def __init__(self, node: Node, publishing: FaultProxy, consuming: FaultProxy) -> None:
        self.node = node
        self.urls = [
            f"{publishing.url}?heartbeat=1&connect_timeout=3",
            f"{consuming.url}?heartbeat=2&connect_timeout=3",
            f"{publishing.url}?heartbeat=2&connect_timeout=3",
        ]
        self.ledgers: list[Ledger] = []
        self.publishers: list[Publisher] = []
        self.registered: dict[str, int] = {}
        self.connections: list[RobustConnection] = []
        self.clumsy: RobustChannel
        self.server_named: Queue
        self._iterating: list[asyncio.Task[None]] = []

    async def begin(self) -> None:
        publisher, consumer, mixed = self.connections = [await connect_robust(url) for url in self.urls]
        out = await publisher.channel()
        again = await publisher.channel()
        many = await consumer.channel()
        await many.set_qos(20)
        own = await consumer.channel()
        await own.set_qos(20)
        self.clumsy = await mixed.channel()
        await self.clumsy.set_qos(20)

        kinds: dict[str, Arguments] = {"classic": None, "quorum": QUORUM}
        for name, arguments in kinds.items():
            ledger = self._ledger(name)
            queue = await many.declare_queue(name, durable=True, arguments=arguments)
            await self._consume(queue, self._slowly(ledger, name), 2)
            self._iterate(ledger, await own.declare_queue(name, durable=True, arguments=arguments))
            await self._publish(ledger, out, "", [(name, [name])])
            ledger = self._ledger(f"{name} again")
            queue = await own.declare_queue(ledger.name, durable=True, arguments=arguments)
            await self._consume(queue, self._at_once(ledger, ledger.name), 1)
            await self._publish(ledger, again, "", [(ledger.name, [ledger.name])], retry_unknown=True)

        ledger = self._ledger("topic")
        await many.declare_exchange("topic", ExchangeType.TOPIC, durable=True)
        for name, key in {"left": "a.#", "right": "*.b"}.items():
            queue = await many.declare_queue(name, durable=True)
            await queue.bind("topic", key)
            await self._consume(queue, self._at_once(ledger, name), 1)
        await self._publish(ledger, out, "topic", [("a.b", ["left", "right"]), ("a.c", ["left"]), ("x.b", ["right"])])

        ledger = self._ledger("fanout", is_lossy=True)
        await own.declare_exchange("fanout", ExchangeType.FANOUT, durable=True)
        self.server_named = await own.declare_queue("", exclusive=True)
        await self.server_named.bind("fanout")
        await self.server_named.consume(self._at_once(ledger, "server-named"))
        await self._publish(ledger, out, "fanout", [("", ["server-named"])])

        ledger = self._ledger("no-ack", is_lossy=True)
        queue = await many.declare_queue("no-ack", durable=True)
        await self._consume(queue, self._without_ack(ledger, "no-ack"), 1, no_ack=True)
        await self._publish(ledger, out, "", [("no-ack", ["no-ack"])])

        ledger = self._ledger("victim", is_lossy=True)
        queue = await many.declare_queue("victim", durable=True)
        await self._consume(queue, self._at_once(ledger, "victim"), 1)
        await self._publish(ledger, out, "", [("victim", ["victim"])])

        ledger = self._ledger("clumsy")
        queue = await self.clumsy.declare_queue("clumsy", durable=True)
        await self._consume(queue, self._slowly(ledger, "clumsy"), 1)
        self._iterate(ledger, queue)
        await self._publish(ledger, self.clumsy, "", [("clumsy", ["clumsy"])])

    def _ledger(self, name: str, *, is_lossy: bool = False) -> Ledger:
        self.ledgers.append(Ledger(name, is_lossy=is_lossy))
        return self.ledgers[-1]

    async def _publish(
        self, ledger: Ledger, channel: Channel, exchange: str, routes: list[tuple[str, list[str]]], **options: bool
    ) -> None:
        target = await channel.get_exchange(exchange, ensure=False)
        self.publishers.append(Publisher(ledger, target, routes, **options))

    async def _consume(
        self, queue: Queue, callback: Callable[[IncomingMessage], Any], count: int, *, no_ack: bool = False
    ) -> None:
        for _ in range(count):
            await queue.consume(callback, no_ack=no_ack)
        self._register(queue.name, count)

    def _iterate(self, ledger: Ledger, queue: Queue) -> None:
        task = asyncio.create_task(iterate(ledger, queue.name, queue.iterator()), name=f"iterate over {queue}")
        self._iterating.append(task)
        self._register(queue.name, 1)

    def _register(self, queue: str, count: int) -> None:
        self.registered[queue] = self.registered.get(queue, 0) + count

    @staticmethod
    def _slowly(ledger: Ledger, queue: str) -> Callable[[IncomingMessage], Any]:
        async def callback(message: IncomingMessage) -> None:
            ledger.receive(queue, message)
            await asyncio.sleep(random.random() * 0.02)
            await acked(message)

        return callback

    @staticmethod
    def _at_once(ledger: Ledger, queue: str) -> Callable[[IncomingMessage], Any]:
        async def callback(message: IncomingMessage) -> None:
            ledger.receive(queue, message)
            await acked(message)

        return callback

    @staticmethod
    def _without_ack(ledger: Ledger, queue: str) -> Callable[[IncomingMessage], Any]:
        def callback(message: IncomingMessage) -> None:
            ledger.receive(queue, message)

        return callback

    # ------------------------------------------------------------------------------------------- the verdict

    async def calm(self) -> list[str]:
        """No more faults: everything is to be well again; returns what is not."""
        wrong = [text for text in await asyncio.gather(*(p.probe(CALM) for p in self.publishers)) if text]
        await asyncio.gather(*(publisher.stop() for publisher in self.publishers))
        for _ in range(int(CALM)):
            if not any(ledger.lost for ledger in self.ledgers if not ledger.is_lossy):
                break
            await asyncio.sleep(1)
        wrong += [f"{ledger.name}: not consumed: {ledger.lost}" for ledger in self.ledgers if self._is_behind(ledger)]
        async with await connect(self.node.url) as sane, sane.channel() as observer:
            wrong += await self._miscounted(observer)
            wrong += self._unwell()
            await self.end()
            for ledger in self.ledgers:
                for queue in ledger.received:
                    if queue != "server-named":
                        await drain_into(ledger, observer, queue)
        return wrong + [text for ledger in self.ledgers for text in ledger.faults()]

    @staticmethod
    def _is_behind(ledger: Ledger) -> bool:
        return bool(ledger.lost) and not ledger.is_lossy

    async def _miscounted(self, observer: Channel) -> list[str]:
        """Consumers that are missing, or there twice."""
        found: dict[str, int] = {}

        async def is_right() -> bool:
            for queue in self.registered:
                found[queue] = await consumer_count(observer, queue)
            return found == self.registered

        with contextlib.suppress(TimeoutError):
            await eventually(is_right, 15)
            return []
        return [f"consumers: {found}, registered: {self.registered}"]

    def _unwell(self) -> list[str]:
        healths = [connection.health() for connection in self.connections]
        # What was lost again and again counts as unwell for a minute, though it is back.
        pardoned = re.compile(
            r"channel( channel)? \d+: .*no-such-exchange.*times\)|consumer '.*' of queue 'victim': .*times\)"
        )
        unwell = [text for health in healths for text in health.reasons if not pardoned.match(text)]
        return [f"unwell: {text}" for text in unwell] + [f"{h}" for h in healths if h.status == "down"]

    async def end(self) -> None:
        """Close all; tasks that iterate end with that."""
        await asyncio.gather(*(connection.close() for connection in self.connections))
        _, hanging = await asyncio.wait(self._iterating, timeout=10)
        for task in hanging:
            task.cancel()
            self.ledgers[0].strange.append(f"{task.get_name()} goes on after close()")
        await asyncio.gather(*self._iterating, return_exceptions=True)


async def test_nothing_confirmed_is_lost(fragile: Node, chaos_seed: int, chaos_minutes: float | None) -> None:
    seconds = SECONDS if chaos_minutes is None else chaos_minutes * 60
    async with (
        FaultProxy("127.0.0.1", fragile.port) as publishing,
        FaultProxy("127.0.0.1", fragile.port) as consuming,
        await connect(fragile.url) as sane,
    ):
        async with sane.channel() as channel:
            for queue in ("classic", "quorum", "classic again", "quorum again", "left", "right", "no-ack", "clumsy"):
                with contextlib.suppress(AMQPError):
                    await channel.queue_delete(queue)
        await sane.close()
        load = Load(fragile, publishing, consuming)
        await load.begin()
        await asyncio.sleep(2)  # so that a crash does not take what was declared a moment ago along
        faults = NodeFaults(fragile, 1.5, "victim", load.clumsy)
        schedules = {
            "publishing": Schedule(f"{chaos_seed} publishing", ProxyFaults(publishing, 1).all(), (0.2, 1.5)),
            "consuming": Schedule(f"{chaos_seed} consuming", ProxyFaults(consuming, 2).all(), (0.2, 1.5)),
            "node": Schedule(f"{chaos_seed} node", faults.all(), (1, 4)),
        }
        try:
            await asyncio.gather(*(schedule.run(seconds) for schedule in schedules.values()))
            wrong = await load.calm()
        finally:
            for name, schedule in schedules.items():
                print(name, "|", "; ".join(schedule.history))
            for ledger in load.ledgers:
                print(ledger)
            await load.end()
        links = [connection.connection_attempt for connection in load.connections]
        print(f"ready {links} times")
        assert not wrong, "\n".join(wrong)
        assert all(len(ledger.confirmed) > 10 for ledger in load.ledgers), "the load did not get through"
