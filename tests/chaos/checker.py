"""Numbered messages, what their publishers were told of them, and who received them.

As Jepsen's total-queue: what was confirmed was received, and what was received was published. Beyond that, what was
"not sent" was not received, every publish ends within its time, and nothing but the errors that are promised is raised.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import random
from typing import TYPE_CHECKING

from pamqp.commands import Basic

from leveret import Message, ReturnedMessage
from leveret.exceptions import DeliveryLost, MessageNacked, PublishNotSent, PublishOutcomeUnknown
from tests.broker.test_helpers import eventually

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from leveret import Channel, Exchange, IncomingMessage, QueueIterator

LATE = 5.0
"""Seconds that a publish may end after its timeout, on a busy machine."""


class Ledger:
    """The messages of one stream: numbered, published to one exchange, received from the queues that it fills.

    Args:
        name: of the stream; part of every message.
        is_lossy: whether a confirmed message may get lost: its queue is deleted, or consumed without acks.
    """

    def __init__(self, name: str, *, is_lossy: bool = False) -> None:
        self.name = name
        self.is_lossy = is_lossy
        self.attempted: dict[int, frozenset[str]] = {}
        self.confirmed: set[int] = set()
        self.nacked: set[int] = set()
        self.returned: set[int] = set()
        self.unknown: set[int] = set()
        self.not_sent: set[int] = set()
        self.received: dict[str, collections.Counter[int]] = collections.defaultdict(collections.Counter)
        self.unflagged: collections.Counter[str] = collections.Counter()
        self.strange: list[str] = []
        self.slowest = 0.0

    def __str__(self) -> str:
        received = sum(map(len, self.received.values()))
        return (
            f"{self.name}: {len(self.attempted)} attempted, {len(self.confirmed)} confirmed, {len(self.unknown)} "
            f"unknown, {len(self.not_sent)} not sent, {len(self.nacked)} nacked, {len(self.returned)} returned; "
            f"{received} received, {self.duplicates} twice ({sum(self.unflagged.values())} without a flag); "
            f"slowest publish {self.slowest:.1f} s"
        )

    def number(self, *queues: str) -> int:
        """A message that is to reach *queues* is about to be published."""
        number = len(self.attempted)
        self.attempted[number] = frozenset(queues)
        return number

    def body(self, number: int) -> bytes:
        """What message *number* carries."""
        return f"{self.name} {number}".encode()

    def receive(self, queue: str, message: IncomingMessage) -> int:
        """It came; returns its number."""
        name, _, digits = message.body.decode().rpartition(" ")
        number = int(digits)
        if name != self.name or queue not in self.attempted.get(number, ()):
            self.strange.append(f"{queue} brought {message.body!r}, which nobody published to it")
        if self.received[queue][number] and not message.redelivered:
            self.unflagged[queue] += 1
        self.received[queue][number] += 1
        return number

    async def publish(
        self, exchange: Exchange, routing_key: str, queues: Iterable[str], *, timeout: float, **options: bool
    ) -> int:
        """Publish the next message, and note what becomes of it."""
        loop = asyncio.get_running_loop()
        began, number = loop.time(), self.number(*queues)
        message = Message(self.body(number), delivery_mode=2)
        try:
            result = await exchange.publish(message, routing_key, timeout=timeout, **options)
            if isinstance(result, ReturnedMessage):
                self.returned.add(number)
            elif isinstance(result, Basic.Ack):
                self.confirmed.add(number)
            else:
                self.strange.append(f"publish {number} gave {result!r}")
        except MessageNacked:
            self.nacked.add(number)
        except PublishNotSent:
            self.not_sent.add(number)
        except PublishOutcomeUnknown:
            self.unknown.add(number)
        except asyncio.CancelledError:
            self.unknown.add(number)
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            self.strange.append(f"publish {number} raised a CancelledError that nobody asked for")
        except Exception as error:
            self.strange.append(f"publish {number} raised {error!r}")
        took = loop.time() - began
        self.slowest = max(self.slowest, took)
        if took > timeout + LATE:
            self.strange.append(f"publish {number} took {took:.1f} s, with a timeout of {timeout:g} s")
        return number

    # ------------------------------------------------------------------------------------------- the verdict

    @property
    def lost(self) -> dict[str, list[int]]:
        """Confirmed, and not received."""
        lost: dict[str, list[int]] = collections.defaultdict(list)
        for number in self.confirmed:
            for queue in self.attempted[number]:
                if number not in self.received[queue]:
                    lost[queue].append(number)
        return dict(lost)

    @property
    def duplicates(self) -> int:
        """How often a message came that had come already."""
        return sum(received.total() - len(received) for received in self.received.values())

    @property
    def received_though_not_sent(self) -> list[int]:
        """Those of which it was said that not a byte was written."""
        return sorted(self.not_sent & {number for received in self.received.values() for number in received})

    def faults(self) -> list[str]:
        """What is wrong; nothing, one hopes."""
        found = [f"{self.name}: {text}" for text in self.strange]
        if not self.is_lossy:
            found += [f"{self.name}: LOST in {queue}: {_some(numbers)}" for queue, numbers in self.lost.items()]
        if numbers := self.received_though_not_sent:
            found.append(f"{self.name}: 'not sent', and received: {_some(numbers)}")
        told = (self.confirmed, self.nacked, self.returned, self.unknown, self.not_sent)
        if sum(map(len, told)) != len(self.attempted):
            found.append(f"{self.name}: {len(self.attempted)} attempted, {[len(each) for each in told]} told")
        return found


def _some(numbers: Sequence[int]) -> str:
    numbers = sorted(numbers)
    return f"{len(numbers)} messages, {numbers[:20]}"


class Publisher:
    """*workers* tasks that publish one message after the other until :meth:`stop`.

    Args:
        ledger: where that is noted.
        exchange: where to.
        routes: routing keys, and the queues that each leads to.
        workers: how many.
        timeout: seconds for each.
        pause: seconds between two of one worker, at most.
        options: of ``publish``.
    """

    def __init__(
        self,
        ledger: Ledger,
        exchange: Exchange,
        routes: Sequence[tuple[str, Sequence[str]]],
        *,
        workers: int = 8,
        timeout: float = 10.0,
        pause: float = 0.05,
        **options: bool,
    ) -> None:
        self.ledger = ledger
        self._exchange = exchange
        self._routes = routes
        self._timeout = timeout
        self._pause = pause
        self._options = options
        self._stopped = False
        self._tasks = [asyncio.create_task(self._work(), name=f"publish to {ledger.name}") for _ in range(workers)]

    async def _work(self) -> None:
        while not self._stopped:
            await self._publish(random.choice(self._routes))
            await asyncio.sleep(random.random() * self._pause)

    async def _publish(self, route: tuple[str, Sequence[str]]) -> int:
        key, queues = route
        return await self.ledger.publish(self._exchange, key, queues, timeout=self._timeout, **self._options)

    async def stop(self) -> None:
        """Stop, and wait for what is under way."""
        self._stopped = True
        _, hanging = await asyncio.wait(self._tasks, timeout=self._timeout + LATE)
        for task in hanging:
            task.cancel()
            self.ledger.strange.append("a publish hangs")
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def probe(self, timeout: float) -> str | None:
        """Publish on each route, until one is confirmed and received on every queue; returns what went wrong."""
        for route in self._routes:
            try:
                async with asyncio.timeout(timeout):
                    while not await self._comes_back(route):
                        pass
            except TimeoutError:
                return f"{self.ledger.name}: nothing that is published with {route[0]!r} comes back ({self.ledger})"
        return None

    async def _comes_back(self, route: tuple[str, Sequence[str]]) -> bool:
        number = await self._publish(route)
        with contextlib.suppress(TimeoutError):
            await eventually(lambda: all(number in self.ledger.received[queue] for queue in route[1]), 5)
            return number in self.ledger.confirmed
        return False


async def acked(message: IncomingMessage) -> None:
    """Ack it, unless it is too late for that."""
    with contextlib.suppress(DeliveryLost):
        await message.ack()


async def iterate(ledger: Ledger, queue: str, messages: QueueIterator) -> None:
    """Receive and ack what the iterator brings; an error that ends it is strange."""
    try:
        async for message in messages:
            ledger.receive(queue, message)
            await acked(message)
    except Exception as error:
        ledger.strange.append(f"the iterator on {queue} raised {error!r}")


async def consumer_count(channel: Channel, queue: str) -> int:
    """How many consumers the broker knows for it."""
    found = await channel.declare_queue(queue, passive=True)
    return found.declaration_result.consumer_count or 0


async def drain_into(ledger: Ledger, channel: Channel, queue: str) -> int:
    """Receive what is left in *queue*; returns how much that was."""
    left = 0
    source = await channel.get_queue(queue)
    while (message := await source.get(no_ack=True, fail=False)) is not None:
        ledger.receive(queue, message)
        left += 1
    return left
