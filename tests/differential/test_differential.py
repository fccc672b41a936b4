"""RabbitMQ and `leveret.testing.Broker` do the same, whatever is done to them: see `tests.differential.known`.

A failure prints the operations that it takes, ready for `tests.differential.regressions`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from leveret.testing import Broker
from leveret.testing.dialect import VERSIONS
from tests.differential.play import Difference, Pair, shrunk
from tests.differential.regressions import REGRESSIONS
from tests.differential.sequences import sequence

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.differential.operations import Op
    from tests.support.brokers import RemoteBroker
    from tests.support.node import Node

pytestmark = [pytest.mark.rabbitmq("is compared with it"), pytest.mark.timeout(3600)]


def first_difference(broker: Node | RemoteBroker, sequences: Iterable[list[Op]]) -> Difference | None:
    """Play *sequences* up to the first difference, and make that as short as it can be."""
    version = ".".join(map(str, broker.version_info))
    if version not in VERSIONS:
        pytest.skip(f"leveret.testing has no RabbitMQ {version}")

    async def play() -> Difference | None:
        async with Broker(version=version) as ours:
            pair = Pair(version, broker.url, ours.url)
            try:
                for operations in sequences:
                    found = await pair.play(operations)
                    if found is not None:
                        pair.patience /= 2
                        return await shrunk(pair, found)
            finally:
                await pair.close()
        return None

    return asyncio.run(play())  # not in debug mode, as pytest's loop is: that takes three times as long


def test_any_sequence_looks_the_same(broker: Node | RemoteBroker, request: pytest.FixtureRequest) -> None:
    seed: int = request.config.getoption("differential_seed")
    first: int = request.config.getoption("differential_first")
    count: int = request.config.getoption("differential_sequences")
    played = 0

    def sequences() -> Iterable[list[Op]]:
        nonlocal played
        for number in range(first, first + count):
            played = number
            yield sequence(seed, number)

    found = first_difference(broker, sequences())
    assert found is None, f"sequence {played} of --differential-seed {seed}:\n{found}"
    assert played == first + count - 1


def test_what_differed_once_looks_the_same(broker: Node | RemoteBroker) -> None:
    names = iter(REGRESSIONS)
    name = ""

    def sequences() -> Iterable[list[Op]]:
        nonlocal name
        for name in names:
            yield REGRESSIONS[name]

    found = first_difference(broker, sequences())
    assert found is None, f"{name}:\n{found}"
    assert name == list(REGRESSIONS)[-1]
