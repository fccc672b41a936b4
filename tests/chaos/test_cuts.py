"""Links that are cut at every byte of coming back, and at any moment: all is restored, once."""

from __future__ import annotations

import asyncio
import collections
import functools
import random
import statistics
from typing import TYPE_CHECKING, Literal

import pytest

from leveret import ConnectionState, ExchangeType, IncomingMessage, Message, connect, connect_robust
from tests.broker.test_helpers import eventually, fill
from tests.chaos.checker import consumer_count
from tests.chaos.conftest import close_all, connections, the_only_one
from tests.support.proxy import Direction, FaultProxy

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from leveret import Channel, RobustConnection
    from tests.support.node import Node

AT_A_TIME = 6
"""So many connections share a sweep: a link that is lost at once again is waited for longer each time."""


async def came_back(connection: RobustConnection, before: int) -> None:
    """Wait until it is ready for another time."""
    await eventually(lambda: connection.connection_attempt > before, 30)


class Patient:
    """A robust connection through a proxy of its own, with everything there is to restore on it."""

    def __init__(self, node: Node, name: str, seed: str) -> None:
        self.proxy = FaultProxy("127.0.0.1", node.port)
        self.name = name
        self.random = random.Random(seed)
        self.received: collections.Counter[bytes] = collections.Counter()
        self.registered: dict[str, int] = {}

    async def begin(self) -> None:
        await self.proxy.accept()
        self.connection = await connect_robust(f"{self.proxy.url}?connect_timeout=1&heartbeat=1")
        self.channel = await self.connection.channel()
        await self.channel.set_qos(10)
        self.other = await self.connection.channel()
        self.named = await self.channel.declare_queue(self.name)
        await self.named.consume(self._on_message)
        await self.named.consume(self._on_message)
        self.own = await self.other.declare_queue("", exclusive=True)
        exchange = await self.other.declare_exchange(f"{self.name}-fanout", ExchangeType.FANOUT, auto_delete=True)
        await self.own.bind(exchange)
        self.messages = self.own.iterator()
        await self.messages.consume()
        self.exchange = exchange

    async def _on_message(self, message: IncomingMessage) -> None:
        self.received[message.body] += 1
        await message.ack()

    async def measure(self) -> int:
        """How many bytes the broker sends to have it all back."""
        before = self.proxy.down.bytes
        await self.lose(None)
        await self.connection.ready()
        return self.proxy.down.bytes - before

    async def lose(self, cut_after: int | None, cut: Literal["rst", "fin", "blackhole"] = "rst") -> None:
        """Reset the link, and cut the one that takes its place after so many bytes from the broker."""
        before = self.connection.connection_attempt
        self.proxy.cut = cut
        down, self.proxy.down = self.proxy.down, Direction()
        self.proxy.down.bytes = down.bytes
        self.proxy.down.cut_after = cut_after
        self.proxy.rst()
        if cut_after is not None and cut == "blackhole":
            await eventually(lambda: self.proxy.down.blackhole, 15)
            self.proxy.up, self.proxy.down = Direction(), Direction()  # for the next link
        await came_back(self.connection, before)

    async def check(self, observer: Channel, text: str) -> None:
        """It is all there, once: consumers at the broker, and what is published."""
        while True:  # it may have been ready before the cut was due
            attempt = self.connection.connection_attempt
            await self.connection.ready()
            await eventually(self._is_counted_once(observer), 15)  # the broker finds out late of a half-open link
            body = text.encode()
            out = self.channel.default_exchange
            await out.publish(Message(body), self.name, retry_unknown=True)
            await self.exchange.publish(Message(body), "")
            await eventually(functools.partial(self.received.get, body))
            message = await asyncio.wait_for(anext(self.messages), 10)
            await message.ack()
            own = (await self.own.declare()).consumer_count, (await self.named.declare()).consumer_count
            if self.connection.connection_attempt == attempt:
                break
        assert own == (1, 2), text
        assert message.body == body, text
        assert self.received[body] == 1, text
        assert self.connection.health().status == "ready", (text, self.connection.health())

    def _is_counted_once(self, observer: Channel) -> Callable[[], Awaitable[bool]]:
        async def is_so() -> bool:
            return await consumer_count(observer, self.name) == 2

        return is_so

    async def end(self) -> None:
        await self.connection.close()
        await self.proxy.__aexit__()


@pytest.mark.one_version
async def test_cut_while_coming_back(fragile: Node, chaos_seed: int, chaos_minutes: float | None) -> None:
    """After each number of bytes of handshake and replay; a seeded tenth of them unless there is time."""
    patients = [Patient(fragile, f"sweep-{number}", f"{chaos_seed} {number}") for number in range(AT_A_TIME)]
    rng = random.Random(chaos_seed)
    async with await connect(fragile.url) as sane, sane.channel() as observer:
        try:
            await asyncio.gather(*(patient.begin() for patient in patients))
            size = await patients[0].measure()
            lengths = list(range(size)) if chaos_minutes else rng.sample(range(size), size // 30)
            rng.shuffle(lengths)

            async def sweep(patient: Patient) -> None:
                while lengths:
                    length = lengths.pop()
                    cut = patient.random.choices(["rst", "fin", "blackhole"], [5, 5, 1])[0]
                    text = f"cut ({cut}) after {length} of {size} bytes"
                    try:
                        await patient.lose(length, cut)  # type: ignore[arg-type]
                        async with asyncio.timeout(30):
                            await patient.check(observer, text)
                    except Exception as error:
                        error.add_note(text)
                        raise

            async with asyncio.TaskGroup() as sweeps:
                for patient in patients:
                    sweeps.create_task(sweep(patient))
        finally:
            await asyncio.gather(*(patient.end() for patient in patients))


async def test_forced_closes(fragile: Node, chaos_seed: int, chaos_minutes: float | None) -> None:
    """At random moments, also in the middle of coming back: soon after each, every consumer is there, once."""
    rng = random.Random(chaos_seed)
    registered = {"forced-a": 2, "forced-b": 1}
    took: list[float] = []
    async with await connect(fragile.url) as sane, sane.channel() as observer:
        spared = await the_only_one(fragile)
        async with await connect_robust(fragile.url) as connection:
            channel = await connection.channel()
            for name, count in registered.items():
                queue = await channel.declare_queue(name)
                for _ in range(count):
                    await queue.consume(lambda message: message.ack())

            async def all_are_there() -> bool:
                return {name: await consumer_count(observer, name) for name in registered} == registered

            for _ in range(100 if chaos_minutes else 8):
                await asyncio.sleep(rng.choice([rng.random() * 0.02, rng.random()]))
                began, before = connection.loop.time(), connection.connection_attempt
                await close_all(fragile, but=spared)
                await came_back(connection, before)
                await eventually(all_are_there, 15)
                took.append(connection.loop.time() - began)
            assert connection.health().status == "ready"
            assert len(await connections(fragile)) == len(spared) + 1
    print(f"{len(took)} forced closes: consumers back after {statistics.median(took):.2f} s, worst {max(took):.2f} s")
    assert max(took) < 5


@pytest.mark.one_version
async def test_consuming_again(fragile: Node, chaos_minutes: float | None) -> None:
    """How long nothing is delivered when the broker closes the connection while a queue is full."""
    arrivals: list[float] = []
    lost: list[float] = []
    gaps: list[tuple[float, float]] = []
    async with await connect(fragile.url) as sane, sane.channel() as observer:
        spared = await the_only_one(fragile)
        queue = await observer.declare_queue("backlog", durable=True)
        async with await connect_robust(fragile.url) as connection:
            connection.close_callbacks.add(lambda *_: lost.append(connection.loop.time()))
            channel = await connection.channel()
            await channel.set_qos(1)

            async def on_message(message: IncomingMessage) -> None:
                arrivals.append(connection.loop.time())
                await asyncio.sleep(0.005)
                if message.is_live:
                    await message.ack()

            await (await channel.get_queue("backlog")).consume(on_message)
            for _ in range(50 if chaos_minutes else 5):
                await asyncio.sleep(1.1)  # a link that does not last is waited for longer
                await fill(observer, queue, [b"x"] * 500)
                arrivals.clear()
                lost.clear()
                await eventually(lambda: arrivals)
                began = connection.loop.time()
                await close_all(fragile, but=spared)
                await eventually(lambda: lost)
                await eventually(lambda: arrivals[-1] > lost[-1], 15)
                again = next(moment for moment in arrivals if moment > lost[-1])
                gaps.append((again - began, again - lost[-1]))
        await queue.delete(if_unused=False, if_empty=False)
    for text, times in zip(("the order to close", "the loss"), zip(*gaps, strict=True), strict=True):
        print(f"consuming again after {text}: median {statistics.median(times):.3f} s, worst {max(times):.3f} s")
    assert max(gap for _, gap in gaps) < 5


@pytest.mark.one_version
@pytest.mark.parametrize("way", ["down", "both"])
async def test_a_half_open_link_is_noticed(proxy: FaultProxy, chaos_minutes: float | None, way: str) -> None:
    """Within 2.2 heartbeats, at whatever moment of an interval it begins."""
    if way == "down" and not chaos_minutes:
        pytest.skip("in full only")
    heartbeat = 2
    took: list[float] = []

    async def once(delay: float) -> None:
        async with (
            FaultProxy(*proxy.target) as mine,
            await connect_robust(f"{mine.url}?heartbeat={heartbeat}") as connection,
        ):
            lost = asyncio.Event()
            connection.close_callbacks.add(lambda *_: lost.set())
            await asyncio.sleep(delay)
            began = connection.loop.time()
            mine.down.blackhole, mine.up.blackhole = True, way == "both"
            await asyncio.wait_for(lost.wait(), 4 * heartbeat)
            took.append(connection.loop.time() - began)
            assert connection.state is ConnectionState.RECONNECTING
            mine.up, mine.down = Direction(), Direction()
            await asyncio.wait_for(connection.ready(), 10)

    count = 40 if chaos_minutes else 10
    await asyncio.gather(*(once(0.5 + 2 * heartbeat * number / count) for number in range(count)))
    print(f"half-open ({way}), heartbeat {heartbeat} s: {min(took):.2f} to {max(took):.2f} s until it was noticed")
    assert max(took) <= 2.2 * heartbeat + 0.5  # for a busy machine
