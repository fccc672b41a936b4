"""Play a sequence against two brokers, and find the first thing that they see differently."""

from __future__ import annotations

import asyncio
import copy
import itertools
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.differential.known import is_open, normalised
from tests.differential.operations import Op, listing, time_to_pass
from tests.differential.side import Side, State

if TYPE_CHECKING:
    from collections.abc import Sequence

_serial = itertools.count()
_RUN = os.urandom(2).hex()


class Difference(NamedTuple):
    """The brokers disagree about the last of *operations*."""

    operations: list[Op]
    what: str

    @property
    def signature(self) -> str:
        """What kind of difference it is, about."""
        return self.operations[-1].kind + " " + self.what.split(":")[0]

    def __str__(self) -> str:
        return f"{listing(self.operations)}\n{self.what}"


class Pair:
    """RabbitMQ and the broker in this process.

    Args:
        version: which RabbitMQ.
        real, ours: their URLs.
        patience: seconds until they have to agree.
    """

    def __init__(self, version: str, real: str, ours: str, *, patience: float = 3.0) -> None:
        self.version = version
        self.real = Side(real)
        self.ours = Side(ours)
        self.patience = patience

    async def close(self) -> None:
        """Close all connections."""
        await asyncio.gather(self.real.close(), self.ours.close())

    async def play(self, operations: Sequence[Op]) -> Difference | None:
        """Play all of them, up to the first difference."""
        prefix = f"d{_RUN}{next(_serial)}_"
        sides = (self.real, self.ours)
        pause = time_to_pass(operations)
        await asyncio.gather(*(side.begin(prefix) for side in sides))
        try:
            for number, op in enumerate(operations):
                same_order = self.real.order(op.channel) == self.ours.order(op.channel)
                replies = await asyncio.gather(*(side.play(op, may_be_multiple=same_order) for side in sides))
                if pause:
                    await asyncio.sleep(pause)
                what = await self._compare(*replies, operations[: number + 1])
                if what is not None and is_open(operations[: number + 1], self.version) and ".closed" not in what:
                    return None
                if what is not None:
                    return Difference(list(operations[: number + 1]), what)
        finally:
            await asyncio.gather(*(side.end() for side in sides))
        return None

    async def _compare(self, real: Any, ours: Any, operations: Sequence[Op]) -> str | None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.patience
        pause = 0.002
        while True:
            states = await asyncio.gather(self.real.state(), self.ours.state())
            one, other = (
                normalised(copy.deepcopy(view), operations, self.version)
                for view in ((states[0], real), (states[1], ours))
            )
            if one == other:
                return None
            if loop.time() > deadline:
                return describe(one, other)
            await asyncio.sleep(pause)
            pause = min(pause * 1.6, 0.2)


def describe(one: Any, other: Any, path: str = "") -> str:
    """Where two values differ first."""
    if isinstance(one, State) and isinstance(other, State):
        one, other = one._asdict(), other._asdict()
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys(), key=str):
            if one.get(key) != other.get(key):
                return describe(one.get(key), other.get(key), f"{path}.{key}")
    if path.endswith(".closed"):
        return f"{path}:\n  RabbitMQ {one!r}\n  leveret  {other!r}"
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            if pair[0] != pair[1]:
                return describe(*pair, f"{path}[{index}]")
    return f"{path}:\n  RabbitMQ {one!r}\n  leveret  {other!r}"


async def shrunk(pair: Pair, found: Difference, *, most: int = 60) -> Difference:
    """The same difference with as few operations as it takes: each is left out, to see whether it is needed."""
    index = len(found.operations) - 2
    while index >= 0 and most:
        most -= 1
        fewer = [*found.operations[:index], *found.operations[index + 1 :]]
        again = await pair.play(fewer)
        if again is not None and again.signature == found.signature:
            found = again
            index = min(index, len(found.operations) - 1)
        index -= 1
    return found
