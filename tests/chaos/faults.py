"""The faults, each undone before it returns, and the schedules that choose among them by a seed."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import TYPE_CHECKING, TypeAlias

from leveret import Message, connect
from leveret.exceptions import AMQPError, PublishOutcomeUnknown
from tests.broker.test_helpers import eventually
from tests.chaos.conftest import close_all
from tests.support.proxy import Direction, FaultProxy

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from leveret import Channel
    from tests.support.node import Node

Fault: TypeAlias = "Callable[[random.Random], Awaitable[None]]"

WATERMARK = "vm_memory_monitor set_vm_memory_high_watermark [{}]"
NO_EXCHANGE = "no-such-exchange"


class Schedule:
    """Fault after fault, with random pauses between: the same seed gives the same faults.

    Args:
        seed: any string.
        faults: by name, each with a weight.
        pauses: seconds between two, from and to.
    """

    def __init__(self, seed: str, faults: Mapping[str, tuple[float, Fault]], pauses: tuple[float, float]) -> None:
        self._random = random.Random(seed)
        self._faults = faults
        self._pauses = pauses
        self.history: list[str] = []

    async def run(self, seconds: float) -> None:
        """Until *seconds* are over, and the last fault is undone."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        names = list(self._faults)
        weights = [weight for weight, _ in self._faults.values()]
        while True:
            # Each fault has a random number generator of its own: how many numbers it takes does not matter.
            pause, [name] = self._random.uniform(*self._pauses), self._random.choices(names, weights)
            own = random.Random(self._random.random())
            await asyncio.sleep(pause)
            now = loop.time() - began
            if now > seconds:
                return
            self.history.append(f"{now:.1f}: {name}")
            await self._faults[name][1](own)


class ProxyFaults:
    """What happens to the links through *proxy*; *heartbeat* is theirs, in seconds."""

    def __init__(self, proxy: FaultProxy, heartbeat: float) -> None:
        self.proxy = proxy
        self.heartbeat = heartbeat

    def all(self) -> dict[str, tuple[float, Fault]]:
        """Each with its weight."""
        return {
            "rst": (2, self.rst),
            "fin": (2, self.fin),
            "half-open": (1, self.half_open),
            "stall": (1, self.stall),
            "refuse": (1, self.refuse),
            "cut": (4, self.cut),
            "cut while coming back": (3, self.cut_while_coming_back),
            "latency": (1, self.latency),
            "slow": (1, self.slow),
            "silent": (1, self.silent),
        }

    def _ways(self, rng: random.Random) -> list[Direction]:
        return rng.choice([[self.proxy.up], [self.proxy.down], [self.proxy.up, self.proxy.down]])

    def new_ways(self) -> None:
        """New links have no faults. Those that are there keep theirs: TCP never goes on after bytes that are gone."""
        self.proxy.up, self.proxy.down = Direction(), Direction()

    async def rst(self, rng: random.Random) -> None:
        self.proxy.rst()

    async def fin(self, rng: random.Random) -> None:
        self.proxy.fin()

    async def half_open(self, rng: random.Random) -> None:
        """Nothing arrives any more, one way or both; new links are well after two to three heartbeats."""
        for way in self._ways(rng):
            way.blackhole = True
        await asyncio.sleep(rng.uniform(2, 3) * self.heartbeat)
        self.new_ways()

    async def stall(self, rng: random.Random) -> None:
        """Nothing moves, and then all of it goes on; now and then long enough to be taken for dead."""
        ways = self._ways(rng)
        for way in ways:
            way.stall = True
        await asyncio.sleep(rng.choice([0.5, 1.0, 3.0]) * self.heartbeat)
        for way in ways:
            way.stall = False

    async def refuse(self, rng: random.Random) -> None:
        await self.proxy.refuse()
        if rng.random() < 0.8:
            self.proxy.rst()
        await asyncio.sleep(rng.uniform(0.2, 2))
        await self.proxy.accept()

    async def cut(self, rng: random.Random) -> None:
        """In the middle of whatever it is, in either direction."""
        await self._cut_after(rng.choice([0, rng.randrange(100), rng.randrange(20_000)]), rng)

    async def cut_while_coming_back(self, rng: random.Random) -> None:
        """Again and again, within the handshake or the replay."""
        for _ in range(rng.randint(1, 4)):
            self.proxy.rst()
            await self._cut_after(rng.randrange(2_000), rng)

    async def _cut_after(self, count: int, rng: random.Random) -> None:
        self.proxy.cut = rng.choice(["rst", "fin"])
        [way] = rng.choice([[self.proxy.up], [self.proxy.down]])
        way.cut_after = count
        with contextlib.suppress(TimeoutError):
            await eventually(lambda: way.cut_after is None, 2)
        way.cut_after = None

    async def latency(self, rng: random.Random) -> None:
        ways = self._ways(rng)
        for way in ways:
            way.latency = rng.uniform(0.02, 0.3)
        await asyncio.sleep(rng.uniform(0.5, 3))
        for way in ways:
            way.latency = 0.0

    async def slow(self, rng: random.Random) -> None:
        ways = self._ways(rng)
        for way in ways:
            way.rate = rng.choice([2_000, 20_000])
        await asyncio.sleep(rng.uniform(0.5, 2))
        for way in ways:
            way.rate = None

    async def silent(self, rng: random.Random) -> None:
        """Those who connect are accepted, and never answered."""
        self.proxy.silent = True
        self.proxy.rst()
        await asyncio.sleep(rng.uniform(0.2, 2))
        self.proxy.silent = False
        self.proxy.rst()


class NodeFaults:
    """What happens to *node*.

    Args:
        node: to be hurt.
        heartbeat: of the links to it.
        victim: a queue to delete, whose messages nobody counts.
        clumsy: a channel of a robust connection, to be closed by the broker over a publish.
    """

    def __init__(self, node: Node, heartbeat: float, victim: str, clumsy: Channel) -> None:
        self.node = node
        self.heartbeat = heartbeat
        self.victim = victim
        self.clumsy = clumsy
        self.deleted_at = 0.0

    def all(self) -> dict[str, tuple[float, Fault]]:
        """Each with its weight."""
        return {
            "close all": (3, self.close_all),
            "short freeze": (2, self.short_freeze),
            "long freeze": (1, self.long_freeze),
            "kill": (1, self.kill),
            "alarm": (2, self.alarm),
            "delete queue": (3, self.delete_queue),
            "publish to nowhere": (2, self.publish_to_nowhere),
        }

    async def close_all(self, rng: random.Random) -> None:
        await close_all(self.node)

    async def short_freeze(self, rng: random.Random) -> None:
        await self._freeze(rng.uniform(0.1, 1) * self.heartbeat)

    async def long_freeze(self, rng: random.Random) -> None:
        await self._freeze(rng.uniform(2.5, 4) * self.heartbeat)

    async def _freeze(self, seconds: float) -> None:
        self.node.freeze()
        try:
            await asyncio.sleep(seconds)
        finally:
            self.node.thaw()

    async def kill(self, rng: random.Random) -> None:
        """Crash and restart, but not within 1.5 s of a declare: RabbitMQ itself loses such a queue."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep(max(0.0, self.deleted_at + 3 - loop.time()))
        await asyncio.to_thread(self.node.kill)
        await asyncio.sleep(rng.uniform(0, 1))
        await asyncio.to_thread(self.node.start)

    async def alarm(self, rng: random.Random) -> None:
        await asyncio.to_thread(self.node.call, WATERMARK.format("0.00001"))
        await asyncio.sleep(rng.uniform(0.3, 3))
        await asyncio.to_thread(self.node.call, WATERMARK.format("0.6"))

    async def delete_queue(self, rng: random.Random) -> None:
        """By another client; the robust one consumes from it."""
        with contextlib.suppress(AMQPError, TimeoutError):  # an alarm, or a fault of the proxies', may be on
            async with await connect(self.node.url) as connection, connection.channel() as channel:
                await channel.queue_delete(self.victim, timeout=5)
        self.deleted_at = asyncio.get_running_loop().time()

    async def publish_to_nowhere(self, rng: random.Random) -> None:
        exchange = await self.clumsy.get_exchange(NO_EXCHANGE, ensure=False)
        with contextlib.suppress(PublishOutcomeUnknown, TimeoutError):
            await exchange.publish(Message(b"?"), "?", timeout=1)
