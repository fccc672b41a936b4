"""Options of the chaos tests, and what several of them share.

``--chaos-minutes 10`` runs the schedules for so long, and the sweeps and leak tests in full;
``--chaos-seed 5`` repeats a run, ``--chaos-clusters 3.10,4.0,4.3`` has the cluster test on all versions.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
from typing import TYPE_CHECKING

import pytest

from tests.broker.test_helpers import eventually
from tests.support.node import Node
from tests.support.proxy import FaultProxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator

CLOSE_ALL = (
    '[rabbit_networking:close_connection(Pid, <<"maintenance">>) || Pid <- rabbit_networking:connections(), '
    "not lists:member(pid_to_list(Pid), [{}])]"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos-minutes", type=float, default=None, help="run the chaos tests in full, for so long")
    parser.addoption("--chaos-seed", type=int, default=None, help="the seed of the faults; printed on failure")
    parser.addoption("--chaos-clusters", default="4.3", help="of --brokers, those that the cluster test runs on")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cluster_version" in metafunc.fixturenames:
        wanted = {version.strip() for version in metafunc.config.getoption("--chaos-clusters").split(",")}
        chosen: str = metafunc.config.getoption("--brokers")
        versions = sorted(wanted if chosen == "auto" else wanted & {*chosen.split(",")})
        metafunc.parametrize("cluster_version", [] if "AMQP_URL" in os.environ else versions)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    minutes: float = config.getoption("--chaos-minutes") or 0
    for item in items:
        if "chaos" in item.path.parts:
            item.add_marker(pytest.mark.timeout(300 if not minutes else 1200 + minutes * 60))


@pytest.fixture(scope="session")
def chaos_minutes(request: pytest.FixtureRequest) -> float | None:
    """How long, and all of it; None for the short form."""
    minutes: float | None = request.config.getoption("--chaos-minutes")
    return minutes


@pytest.fixture
def chaos_seed(request: pytest.FixtureRequest) -> int:
    """The seed; what a test prints is shown when it fails."""
    given: int | None = request.config.getoption("--chaos-seed")
    seed = random.randrange(1_000_000) if given is None else given
    print(f"to repeat: --chaos-seed {seed}")
    return seed


@pytest.fixture(scope="session")
def fragile(broker_version: str) -> Iterator[Node]:
    """A node that these tests hurt; each leaves it running and well."""
    if "AMQP_URL" in os.environ:
        pytest.skip("needs a node of its own, and AMQP_URL is set")
    with Node(broker_version) as node:
        yield node


@pytest.fixture
async def proxy(fragile: Node) -> AsyncIterator[FaultProxy]:
    async with FaultProxy("127.0.0.1", fragile.port) as proxy:
        yield proxy


async def connections(node: Node) -> list[str]:
    """The connections that the node has, as it names them."""
    found = await asyncio.to_thread(node.eval, "[pid_to_list(Pid) || Pid <- rabbit_networking:connections()]")
    return re.findall(r"<[0-9.]+>", found)


async def the_only_one(node: Node) -> list[str]:
    """The one connection that there is, once the node knows of it, and no more of those of the test before."""

    async def found() -> list[str]:
        known = await connections(node)
        return known if len(known) == 1 else []

    only: list[str] = await eventually(found)
    return only


async def close_all(node: Node, *, but: Iterable[str] = ()) -> None:
    """As ``rabbitmqctl close_all_connections``, in milliseconds; those that *but* names go on."""
    await asyncio.to_thread(node.eval, CLOSE_ALL.format(", ".join(f'"{pid}"' for pid in but)))
