"""A cluster of three, and one robust connection that knows them all, under load, while the nodes go and come."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest

from leveret import IncomingMessage, connect_robust
from leveret.types import Arguments
from tests.broker.test_helpers import eventually
from tests.chaos.checker import Ledger, Publisher, acked
from tests.support.node import Node, cluster

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterator

    from leveret import QueueIterator, RobustConnection

NAME = "rolling"
BACK = 10.0
"""Seconds within which every consumer is back."""
ARGUMENTS: Arguments = {"x-queue-type": "quorum", "x-quorum-initial-group-size": 3, "x-delivery-limit": 100_000}


@pytest.fixture
def nodes(cluster_version: str) -> Iterator[list[Node]]:
    with cluster(cluster_version) as nodes:
        yield nodes


class Witness:
    """Two consumers, what each received last, and how long it waited for that."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._loop = asyncio.get_running_loop()
        self._newest: dict[str, int] = {"callback": -1, "iterator": -1}
        self._latest = dict.fromkeys(self._newest, self._loop.time())
        self._longest = 0.0

    async def on_message(self, message: IncomingMessage) -> None:
        self._note("callback", message)
        await acked(message)

    async def iterate(self, messages: QueueIterator) -> None:
        async for message in messages:
            self._note("iterator", message)
            await acked(message)

    def _note(self, name: str, message: IncomingMessage) -> None:
        now = self._loop.time()
        self._longest = max(self._longest, now - self._latest[name])
        self._latest[name] = now
        self._newest[name] = max(self._newest[name], self.ledger.receive(NAME, message))

    async def longest_gap(self, what: str, step: Awaitable[object]) -> float:
        """Do *step*, until each consumer has received what was published after it; the longest that one had to wait."""
        began, before = self._loop.time(), len(self.ledger.confirmed)
        self._latest, self._longest = dict.fromkeys(self._newest, began), 0.0
        await step
        number = len(self.ledger.attempted)
        await eventually(lambda: min(self._newest.values()) >= number, 60)
        rate = (len(self.ledger.confirmed) - before) / (self._loop.time() - began)
        print(f"{what}: a consumer received nothing for {self._longest:.2f} s at most; {rate:.0f} confirmed/s")
        return self._longest


async def members(nodes: list[Node], wanted: str) -> list[str]:
    """The names of the nodes that are ``leader``, or ``online``, for the queue."""
    asked = next(node for node in nodes if node.is_running)
    found = json.loads(await asyncio.to_thread(asked.ctl, "list_queues", "name", wanted, "--formatter", "json"))
    [value] = [queue[wanted] for queue in found if queue["name"] == NAME]
    return [value] if isinstance(value, str) else list(value)


async def all_online(nodes: list[Node]) -> None:
    """Wait until each node has its part in the queue again, as one does before taking away the next."""

    async def are() -> bool:
        return len(await members(nodes, "online")) == len(nodes)

    await eventually(are, 60)


def connected_to(connection: RobustConnection, nodes: list[Node]) -> Node:
    return next(node for node in nodes if node.port == connection.url.port)


async def test_nodes_go_and_come(cluster_version: str, nodes: list[Node], chaos_minutes: float | None) -> None:
    ledger = Ledger(NAME)
    witness = Witness(ledger)
    urls = [f"{node.url}?heartbeat=2&connect_timeout=5" for node in nodes]
    tasks: list[asyncio.Task[None]] = []
    async with await connect_robust(urls) as connection:
        channel = await connection.channel()
        consuming = await connection.channel()
        await consuming.set_qos(100)
        queue = await consuming.declare_queue(NAME, durable=True, arguments=ARGUMENTS)
        await queue.consume(witness.on_message)
        messages = queue.iterator()
        await messages.consume()
        tasks.append(asyncio.create_task(witness.iterate(messages)))
        await all_online(nodes)
        await asyncio.sleep(2)  # so that a crash does not take what was declared a moment ago along
        publisher = Publisher(ledger, channel.default_exchange, [(NAME, [NAME])], workers=100, pause=0.08)
        try:
            longest = await hurt(connection, nodes, witness, 2 if chaos_minutes else 1)
            await publisher.stop()
            await eventually(lambda: not ledger.lost, 60)
            assert len(await _consumers(nodes)) == 2
            await eventually(lambda: connection.health().status == "ready", 10)
        finally:
            print(ledger)
            await publisher.stop()
            await messages.close()
            for task in tasks[1:]:
                task.cancel()
            await asyncio.wait(tasks, timeout=10)
    assert not ledger.faults()
    assert longest < BACK


async def hurt(connection: RobustConnection, nodes: list[Node], witness: Witness, turns: int) -> float:
    """Kill two nodes, then restart all; the longest that a consumer received nothing."""
    gaps = [await witness.longest_gap("nothing done", asyncio.sleep(3))]

    [leader] = await members(nodes, "leader")
    victim = next(node for node in nodes if node.name == leader)
    for what in ("leader", "our node"):
        gaps.append(await witness.longest_gap(f"{what} killed", asyncio.to_thread(victim.kill)))
        await asyncio.to_thread(victim.start)
        await all_online(nodes)
        victim = connected_to(connection, nodes)

    for turn in range(turns):
        for node in nodes:
            what = f"turn {turn}: {node.name}"
            gaps.append(await witness.longest_gap(f"{what} stopped", asyncio.to_thread(node.stop, remove=False)))
            gaps.append(await witness.longest_gap(f"{what} started", asyncio.to_thread(node.start)))
            await all_online(nodes)
    return max(gaps)


async def _consumers(nodes: list[Node]) -> list[object]:
    found = await asyncio.to_thread(nodes[0].ctl, "list_consumers", "--formatter", "json")
    consumers: list[object] = json.loads(found)
    return consumers
