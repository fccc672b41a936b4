"""What most broker tests begin with: a connection, a channel, a queue; and a robust connection with a link to cut."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator

import pytest
from yarl import URL

from leveret import Channel, Connection, Queue, RobustConnection, connect, connect_robust
from tests.support.brokers import plain_node
from tests.support.node import Node
from tests.support.proxy import FaultProxy


@pytest.fixture
async def connection(amqp_url: str) -> AsyncIterator[Connection]:
    async with await connect(amqp_url) as connection:
        yield connection


@pytest.fixture
async def channel(connection: Connection) -> AsyncIterator[Channel]:
    async with connection.channel() as channel:
        yield channel


@pytest.fixture
async def queue(channel: Channel) -> Queue:
    return await channel.declare_queue(exclusive=True)


@pytest.fixture
async def link(amqp_url: str) -> AsyncIterator[FaultProxy]:
    """A proxy in front of the shared broker; what `connection` and `channel` do does not go through it."""
    url = URL(amqp_url)
    async with FaultProxy(url.host or "localhost", url.port or 5672) as link:
        yield link


@pytest.fixture
async def robust(link: FaultProxy) -> AsyncIterator[RobustConnection]:
    """A connection that recovers, by way of `link`."""
    async with await connect_robust(link.url) as robust:
        yield robust


@pytest.fixture(scope="session")
def shaky(broker_version: str) -> Iterator[Node]:
    """A node that tests stop, kill, block and drain; each leaves it running."""
    if "AMQP_URL" in os.environ:
        pytest.skip("needs a node of its own, and AMQP_URL is set")
    with plain_node(broker_version) as node:
        yield node


@pytest.fixture
def impatient(shaky: Node) -> Iterator[Node]:
    """`shaky`, with an ack timeout of a second for the channels and the queues of this test."""
    shaky.set_ack_timeout(1)
    yield shaky
    shaky.set_ack_timeout(None)
