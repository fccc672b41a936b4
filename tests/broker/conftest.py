"""What most broker tests begin with: a connection, a channel, a queue."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from leveret import Channel, Connection, Queue, connect


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
