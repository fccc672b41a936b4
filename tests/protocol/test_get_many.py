"""Fetching several messages at a time: never too many, none lost, whatever ends it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from pamqp import commands

from leveret import Batch, IncomingMessage
from leveret.exceptions import ChannelInvalidStateError, ConnectionClosed
from leveret.wire.fetching import _AHEAD
from tests.protocol.kit import Link, cancel_with_the_next_read, linked, turns, within

Ack, Nack = commands.Basic.Ack, commands.Basic.Nack


def fetched(link: Link, tag: int, left: int = 0) -> None:
    link.session.send_content(1, commands.Basic.GetOk(tag, False, "x", "key", left), b"%d" % tag)


async def asked(link: Link, count: int) -> None:
    for _ in range(count):
        await link.session.expect(commands.Basic.Get)


def bodies(messages: list[IncomingMessage]) -> list[bytes]:
    return [message.body for message in messages]


@pytest.mark.parametrize("no_ack", [False, True])
async def test_as_many_as_there_are(no_ack: bool) -> None:
    async with linked() as link:
        queue = await link.queue(await link.channel())
        getting = asyncio.create_task(queue.get_many(5, no_ack=no_ack))
        await asked(link, 5)
        for tag in (1, 2, 3):
            fetched(link, tag, 3 - tag)
        link.session.send(1, commands.Basic.GetEmpty(), commands.Basic.GetEmpty())
        messages = await within(getting)
        assert bodies(messages) == [b"1", b"2", b"3"]
        assert [message.message_count for message in messages] == [2, 1, 0]
        assert [message.processed for message in messages] == [no_ack] * 3
        assert await link.sent() == []  # and it asks no more
        if not no_ack:
            await Batch(messages).ack()
            (ack,) = await link.sent()
            assert (ack.delivery_tag, ack.multiple) == (3, True)


async def test_never_more_than_asked_for_and_not_all_at_once() -> None:
    count = 2 * _AHEAD + 3
    async with linked() as link:
        queue = await link.queue(await link.channel())
        getting = asyncio.create_task(queue.get_many(count, no_ack=True))
        await asked(link, _AHEAD)
        fetched(link, 1)
        await asked(link, 1)
        assert await link.sent() == []
        for tag in range(2, count - _AHEAD + 1):
            fetched(link, tag)
            await asked(link, 1)
        for tag in range(count - _AHEAD + 1, count + 1):
            fetched(link, tag)
        assert bodies(await within(getting)) == [b"%d" % tag for tag in range(1, count + 1)]
        assert await link.sent() == []


async def test_a_message_after_an_empty_answer_counts() -> None:
    """One that was published in between."""
    async with linked() as link:
        queue = await link.queue(await link.channel())
        getting = asyncio.create_task(queue.get_many(2, no_ack=True))
        await asked(link, 2)
        link.session.send(1, commands.Basic.GetEmpty())
        fetched(link, 1)
        assert bodies(await within(getting)) == [b"1"]


async def test_none_asks_nothing() -> None:
    async with linked() as link:
        queue = await link.queue(await link.channel())
        assert await queue.get_many(0) == []
        with pytest.raises(ValueError, match="negative"):
            await queue.get_many(-1)
        assert await link.sent() == []


async def test_a_timeout_returns_what_came_and_requeues_what_comes_too_late() -> None:
    async with linked() as link:
        queue = await link.queue(await link.channel())
        getting = asyncio.create_task(queue.get_many(3, timeout=0.2))
        await asked(link, 3)
        fetched(link, 1)
        assert bodies(await within(getting)) == [b"1"]
        fetched(link, 2)
        link.session.send(1, commands.Basic.GetEmpty())
        (nack,) = await link.sent()
        assert (nack.delivery_tag, nack.requeue) == (2, True)


async def test_a_timeout_with_nothing_raises() -> None:
    async with linked() as link:
        queue = await link.queue(await link.channel())
        getting = asyncio.create_task(queue.get_many(2, timeout=0.05))
        await asked(link, 2)
        with pytest.raises(TimeoutError, match="Get got no answer within"):
            await within(getting)
        fetched(link, 1)
        link.session.send(1, commands.Basic.GetEmpty())
        assert [type(each) for each in await link.sent()] == [Nack]
        again = asyncio.create_task(queue.get_many(1))
        await asked(link, 1)
        fetched(link, 2)
        assert bodies(await within(again)) == [b"2"]


@pytest.mark.parametrize("moment", ["before the read", "with the read"])
async def test_cancelling_requeues_all(moment: str) -> None:
    async with linked() as link:
        queue = await link.queue(await link.channel())
        getting = asyncio.create_task(queue.get_many(3))
        await asked(link, 3)
        fetched(link, 1)
        await link.fence()
        if moment == "with the read":
            cancel_with_the_next_read(link, getting)
            fetched(link, 2)
        else:
            getting.cancel()
            await turns()
            fetched(link, 2)
        with pytest.raises(asyncio.CancelledError):
            await within(getting)
        link.session.send(1, commands.Basic.GetEmpty())
        nacks: Any = await link.sent()
        assert sorted((nack.delivery_tag, nack.requeue, nack.multiple) for nack in nacks) == [
            (1, True, False),
            (2, True, False),
        ]


async def test_cancelling_tells_of_what_is_gone_without_acknowledgements(caplog: pytest.LogCaptureFixture) -> None:
    async with linked() as link:
        queue = await link.queue(await link.channel())
        getting = asyncio.create_task(queue.get_many(2, no_ack=True))
        await asked(link, 2)
        fetched(link, 1)
        await link.fence()
        getting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await within(getting)
        link.session.send(1, commands.Basic.GetEmpty())
        assert await link.sent() == []
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert "1 messages are gone" in caplog.text


@pytest.mark.parametrize("no_ack", [False, True])
async def test_a_lost_link_raises_or_returns_what_comes_no_more(no_ack: bool) -> None:
    async with linked(lenient=True) as link:
        queue = await link.queue(await link.channel())
        getting = asyncio.create_task(queue.get_many(2, no_ack=no_ack))
        await asked(link, 2)
        fetched(link, 1)
        await link.fence()
        link.session.reset()
        if no_ack:
            assert bodies(await within(getting)) == [b"1"]
        else:
            with pytest.raises(ConnectionClosed):
                await within(getting)
        with pytest.raises(ChannelInvalidStateError):
            await queue.get_many(1)


async def test_a_missing_queue_closes_the_channel_and_says_so() -> None:
    async with linked() as link:
        queue = await link.queue(await link.channel())
        getting = asyncio.create_task(queue.get_many(2))
        await asked(link, 2)
        link.session.send(1, commands.Channel.Close(404, "NOT_FOUND - no queue", 60, 70))
        with pytest.raises(Exception, match="no queue"):
            await within(getting)
        await link.session.expect(commands.Channel.CloseOk)


async def test_a_stream_is_refused() -> None:
    async with linked() as link:
        channel = await link.channel()
        queue = await link.answer(
            channel.declare_queue("s", durable=True, arguments={"x-queue-type": "stream"}),
            commands.Queue.Declare,
            commands.Queue.DeclareOk("s", 0, 0),
        )
        with pytest.raises(ValueError, match="stream"):
            await queue.get_many(1)
