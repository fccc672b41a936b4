"""publish_many() over a link that is down, goes down, and comes back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pamqp import commands

from leveret import Message, PublishReport, RobustChannel, RobustConnection
from leveret.exceptions import (
    ChannelInvalidStateError,
    ChannelNotFoundEntity,
    PublishNotSent,
    PublishNotSentInTime,
    PublishOutcomeUnknown,
    PublishUnconfirmedInTime,
)
from tests.protocol.kit import turns, until, within
from tests.protocol.robust_kit import again, back, channel_of, closed_by_broker, fence, lost, refuse, robust
from tests.protocol.test_publish_many import Counted, kinds, numbered


def start(channel: RobustChannel, messages: Any, **kwargs: Any) -> asyncio.Task[PublishReport]:
    return asyncio.create_task(channel.default_exchange.publish_many(messages, "key", **kwargs))


def sent(server: Any) -> list[tuple[int, bytes]]:
    return [(each.link, each.body) for each in server.published]


class Small(RobustConnection):
    """Lets one publish wait."""

    MAX_WAITING_PUBLISHES = 1


async def test_what_is_taken_while_the_link_is_down_waits_for_it_within_the_window() -> None:
    async with robust(connection_class=Small) as (connection, server):
        channel = await channel_of(connection)
        await lost(connection, server)
        messages = Counted()
        task = start(channel, (next(messages) for _ in range(7)), window=3)
        await turns(20)
        assert messages.taken == 3
        assert not server.published
        await back(connection, server)
        report = await within(task)
        assert (report.total, report.confirmed) == (7, 7)
        assert sent(server) == [(server.link.number, b"%d" % n) for n in range(7)]


async def test_what_waits_for_the_link_has_its_time_and_is_never_sent_after_it() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        await lost(connection, server)
        report = await within(start(channel, numbered(3), window=2, timeout=0.02))
        assert kinds(report) == [(n, PublishNotSentInTime) for n in range(3)]
        assert report.stopped_by is None
        task = start(channel, numbered(3))
        await turns()
        task.cancel()
        await asyncio.wait({task})
        await back(connection, server)
        await fence(connection)
        assert not server.published


@pytest.mark.parametrize("retry", [False, True])
async def test_the_link_is_lost_in_the_middle(retry: bool) -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        server.holds_confirms = True
        task = start(channel, numbered(8), window=4, retry_unknown=retry)
        await until(lambda: len(server.published) == 4)
        server.link.send(channel.number or 0, commands.Basic.Ack(2))
        await fence(connection)
        server.holds_confirms = False
        link = await again(connection, server)
        report = await within(task)
        first = [(link.number - 1, b"%d" % n) for n in range(5)]  # one confirm made room for another one
        lost_with_it = [n for n in range(5) if n != 1]
        if retry:
            assert (report.confirmed, report.failures) == (8, [])
            resent = [*lost_with_it, 5, 6, 7]
        else:
            assert report.confirmed == 4
            assert kinds(report) == [(n, PublishOutcomeUnknown) for n in lost_with_it]
            resent = [5, 6, 7]
        assert sent(server) == first + [(link.number, b"%d" % n) for n in resent]


async def test_what_was_written_once_and_is_not_sent_again_in_time_is_unknown() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        server.holds_confirms = True
        task = start(channel, numbered(2), retry_unknown=True, timeout=0.1)
        await until(lambda: len(server.published) == 2)
        await lost(connection, server)
        assert kinds(await within(task)) == [(0, PublishUnconfirmedInTime), (1, PublishUnconfirmedInTime)]
        await back(connection, server)


@pytest.mark.parametrize("retry", [False, True])
async def test_the_broker_closes_the_channel_over_a_publish(retry: bool) -> None:
    """What was closed over a publish is not sent again; the channel comes back, and the rest is sent on it."""
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        server.at(commands.Basic.Publish, refuse(404, "NOT_FOUND - no exchange"))
        report = await within(start(channel, numbered(4), window=2, retry_unknown=retry))
        assert [index for index, kind in kinds(report) if kind is PublishOutcomeUnknown] == [0, 1]
        assert isinstance(report.failures[0].error.__cause__, ChannelNotFoundEntity)
        assert report.confirmed == 2
        assert report.stopped_by is None


async def test_the_broker_closes_the_channel_over_something_else() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        server.holds_confirms = True
        task = start(channel, numbered(4), window=2, retry_unknown=True)
        await until(lambda: len(server.published) == 2)
        server.holds_confirms = False
        await closed_by_broker(channel, server)
        assert (await within(task)).confirmed == 4


@pytest.mark.parametrize("what", ["channel", "connection"])
async def test_closed_for_good_while_the_link_is_down(what: str) -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        await lost(connection, server)
        messages = Counted()
        listed, lazy = start(channel, numbered(4), window=2), start(channel, messages, window=3)
        await turns()
        await within((channel if what == "channel" else connection).close(timeout=0.1))
        report = await within(listed)
        assert kinds(report) == [(n, PublishNotSent) for n in range(4)]
        assert isinstance(report.stopped_by, ChannelInvalidStateError)
        report = await within(lazy)
        assert kinds(report) == [(n, PublishNotSent) for n in range(3)]
        assert messages.taken == 3
        with pytest.raises(ChannelInvalidStateError):
            await channel.default_exchange.publish_many(numbered(1), "key")


async def test_publish_and_publish_many_keep_their_order_over_a_reconnect() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        await lost(connection, server)
        task = start(channel, numbered(3))
        await turns()
        single = asyncio.ensure_future(channel.default_exchange.publish(Message(b"s"), "key"))
        await back(connection, server)
        assert (await within(task)).confirmed == 3
        await within(single)
        assert [body for _, body in sent(server)] == [b"0", b"1", b"2", b"s"]


async def test_nowait_does_not_wait_for_the_link() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        await within(channel.default_exchange.publish_nowait(Message(b"up"), "key"))
        await lost(connection, server)
        with pytest.raises(PublishNotSent):
            _ = channel.default_exchange.publish_nowait(Message(b"down"), "key")
        await back(connection, server)
        await fence(connection)
        assert [body for _, body in sent(server)] == [b"up"]


async def test_without_confirms_what_waits_is_written_when_the_link_is_back() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection, publisher_confirms=False)
        await lost(connection, server)
        task = start(channel, numbered(5), window=2)
        await turns()
        await back(connection, server)
        report = await within(task)
        await fence(connection)
        assert (report.total, report.confirmed, bool(report)) == (5, 0, True)
        assert [body for _, body in sent(server)] == [b"%d" % n for n in range(5)]


async def test_a_lost_transaction_ends_it() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection, publisher_confirms=False)
        transaction = channel.transaction()
        await within(transaction.select())
        assert (await within(start(channel, numbered(2)))).total == 2
        await again(connection, server)
        with pytest.raises(ChannelInvalidStateError, match="transaction"):
            await channel.default_exchange.publish_many(numbered(1), "key")
        with pytest.raises(ChannelInvalidStateError):
            await transaction.rollback()
        assert (await within(start(channel, numbered(1)))).total == 1
