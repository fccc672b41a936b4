"""Pools of connections and of channels, on a real broker."""

from __future__ import annotations

import asyncio

import pytest

from leveret import Channel, Connection, Message, RobustConnection, connect, connect_robust
from leveret.exceptions import ChannelNotFoundEntity
from leveret.pool import Pool
from tests.support.proxy import FaultProxy


async def test_connections_and_channels_as_aio_pika_s_documentation_has_it(amqp_url: str) -> None:
    async with Pool(connect_robust, amqp_url, max_size=2) as connections:

        async def new_channel() -> Channel:
            async with connections.acquire() as connection:
                return await connection.channel()

        async with Pool(new_channel, max_size=10) as channels:
            async with channels.acquire() as channel:
                queue = await channel.declare_queue(auto_delete=False)

            async def publish(number: int) -> None:
                async with channels.acquire() as channel:
                    await channel.default_exchange.publish(Message(b"%d" % number), queue.name)

            await asyncio.gather(*map(publish, range(50)))
            async with channels.acquire() as channel:
                found = await channel.get_queue(queue.name)
                assert found.declaration_result.message_count == 50
                await found.delete(if_empty=False)


async def test_a_channel_that_the_broker_closed_is_replaced(connection: Connection) -> None:
    async with Pool(connection.channel, max_size=1) as pool:
        with pytest.raises(ChannelNotFoundEntity):
            async with pool.acquire() as first:
                await first.get_queue("leveret.no_such_queue")
        async with pool.acquire() as second:
            assert second is not first
            await second.declare_queue(exclusive=True)


async def test_a_connection_that_was_lost_is_replaced(link: FaultProxy) -> None:
    async with Pool(connect, link.url, max_size=1) as pool:
        async with pool.acquire() as first:
            closed = first.closed()
            link.rst()
            await closed
        async with pool.acquire() as second:
            assert second is not first
            assert not second.is_closed


async def test_a_robust_connection_that_comes_back_stays(link: FaultProxy) -> None:
    async with Pool(connect_robust, link.url, max_size=1) as pool:
        async with pool.acquire() as first:
            assert isinstance(first, RobustConnection)
            link.rst()
        async with pool.acquire() as second:
            assert second is first
            await second.ready()
