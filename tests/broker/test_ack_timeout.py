"""A message held longer than the broker's ack timeout."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from leveret import connect
from leveret.exceptions import ChannelPreconditionFailed, ConsumerCancelled, DeliveryLost
from tests.broker.test_helpers import drain, eventually, fill, holds

if TYPE_CHECKING:
    from tests.support.node import Node


async def test_it_costs_the_channel_or_the_consumer_once_and_nothing_else(impatient: Node, name: str) -> None:
    cancels_only = impatient.version_info >= (4, 3)
    async with (
        await connect(impatient.url) as connection,
        connection.channel() as other,
        connection.channel() as channel,
    ):
        kept = await other.declare_queue(exclusive=True)
        told: list[BaseException | None] = []
        channel.close_callbacks.add(lambda _, error: told.append(error))
        queue = await channel.declare_queue(name, durable=True, arguments={"x-queue-type": "quorum"})
        await fill(channel, queue, [b"held"])
        async with queue.iterator() as messages:
            held = await asyncio.wait_for(anext(messages), 10)
            with pytest.raises(ConsumerCancelled if cancels_only else ChannelPreconditionFailed) as caught:
                await asyncio.wait_for(anext(messages), 30)
            # The older brokers repeat channel.close at every tick until they have read our answer.
            for i in range(12):
                await fill(other, kept, [b"%d" % i])
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(connection.closed(), 0.1)
        assert await drain(kept) == [b"%d" % i for i in range(12)]
        assert not connection.is_closed
        if cancels_only:
            assert not channel.is_closed
            assert not told
        else:
            assert "timed out" in str(caught.value)
            assert len(told) == 1
            with pytest.raises(DeliveryLost):
                await held.ack()
            await channel.reopen()
            assert len(told) == 1
        back = await channel.get_queue(name)
        await holds(channel, back, 1)
        message = await eventually(lambda: back.get(fail=False))
        assert (message.body, message.redelivered) == (b"held", True)
        await message.ack()
