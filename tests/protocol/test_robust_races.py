"""Races that a reviewer found in recovery, each with what it did."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest import mock

import pytest
from pamqp import base, commands

from leveret import IncomingMessage, Message, RobustChannel
from leveret.exceptions import MessageNacked
from tests.protocol.kit import turns, until, within
from tests.protocol.robust_kit import (
    Held,
    Server,
    ServerLink,
    channel_of,
    closed_by_broker,
    fence,
    queue_on,
    refuse,
    robust,
    silent,
)

CONSUME, DECLARE, OPEN = commands.Basic.Consume, commands.Queue.Declare, commands.Channel.Open
PUBLISH, QOS = commands.Basic.Publish, commands.Basic.Qos


async def test_an_event_while_a_lost_consumer_s_queue_is_declared_makes_no_endless_round() -> None:
    """Each comparison doubted the queue again, and the consumer never began."""
    async with robust() as (connection, server):
        channel, other = await channel_of(connection), await channel_of(connection)
        await (await queue_on(channel)).consume(print)
        server.link.cancel("q")
        await server.seen(CONSUME, 2)
        await until(lambda: connection.health().status == "ready")
        held = Held()
        server.at(DECLARE, held)
        server.link.cancel("q")  # a second loss: its turn comes after a pause
        await held.reached()
        restoring = asyncio.ensure_future(other.restore())
        await turns()
        held.go()
        await within(restoring)
        await server.seen(CONSUME, 3)
        assert len(server.link.all(DECLARE)) < 6


async def test_an_event_while_somebody_else_s_queue_is_looked_for_makes_no_endless_round() -> None:
    """The next comparison took back that it was there, and the consumer never began."""
    async with robust() as (connection, server):
        channel, other = await channel_of(connection), await channel_of(connection)
        await (await channel.get_queue("theirs", ensure=False)).consume(print)
        held = Held()
        server.at(DECLARE, held)
        server.link.cancel("theirs")
        await held.reached()
        restoring = asyncio.ensure_future(other.restore())
        await turns()
        held.go()
        await within(restoring)
        await server.seen(CONSUME, 2)
        assert len(server.link.all(DECLARE)) < 4


@pytest.mark.parametrize("answer", ["in time", "late"])
async def test_a_consumer_after_set_qos_has_that_prefetch_even_before_its_answer(answer: str) -> None:
    """The consumer sent the prefetch before."""
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        queue = await queue_on(channel)
        if answer == "in time":
            await asyncio.gather(channel.set_qos(5), queue.consume(print))
        else:
            held = Held()
            server.at(QOS, held)
            with pytest.raises(TimeoutError):
                await channel.set_qos(5, timeout=0.02)
            held.go()
            await queue.consume(print)
        assert [method.prefetch_count for method in server.link.all(QOS)] == [5]


async def test_a_number_that_the_user_asked_for_is_free_on_the_next_link() -> None:
    """With few channels, recovery took the first number."""
    async with robust(server=Server(channel_max=8)) as (connection, server):
        channel = await channel_of(connection, channel_number=1)
        await queue_on(channel)
        server.drop()
        await until(lambda: connection.connection_attempt == 2)
        assert channel.is_live


@pytest.mark.parametrize("lost", ["channel", "consumer"])
async def test_what_was_lost_just_before_the_link_is_back_when_it_is_ready(lost: str) -> None:
    """It counted as tried on the new link."""
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        await (await queue_on(channel)).consume(print)
        seen: list[tuple[bool, int]] = []

        def on_state(_: object, __: object, new: Any, ___: object) -> None:
            if new.value == "ready":
                seen.append((channel.is_live, len(server.links[1].all(CONSUME))))

        connection.state_callbacks.add(on_state)
        if lost == "channel":
            server.link.close_channel(channel.number or 0, 406)
        else:
            server.link.cancel("q")
        server.link.kill(320)
        await until(lambda: connection.connection_attempt == 2)
        assert seen == [(True, 1)]


async def test_a_channel_that_was_closed_and_reopened_while_it_was_restored_has_one_wire() -> None:
    """The restoring went on, and swapped its wire in."""
    async with robust() as (connection, server):
        channel, other = await channel_of(connection), await channel_of(connection)
        held = Held()
        server.at(OPEN, held, link=0)
        await closed_by_broker(channel, server, 406)
        await held.reached()
        await channel.close()
        reopening = asyncio.ensure_future(channel.reopen())
        await fence(connection)
        held.go()
        await within(reopening)
        await fence(connection)
        await until(lambda: server.link.open == {channel.number, other.number})


async def test_restore_waits_for_no_channel_that_has_nothing_to_do_with_it_for_long() -> None:
    """It waited for a moment in which no channel was being restored."""
    async with robust() as (connection, server):
        good = await channel_of(connection)
        await queue_on(good, "good")
        bad = [await channel_of(connection) for _ in range(5)]
        for number, channel in enumerate(bad):
            await (await queue_on(channel, f"bad{number}")).consume(print)
        server.at(CONSUME, silent, where=lambda method: method.queue.startswith("bad"), times=None)
        with mock.patch("leveret.restore._CONSUME", 0.3):
            for number in range(5):
                server.link.cancel(f"bad{number}")
                await asyncio.sleep(0.05)
            await within(good.restore(), 2)


async def test_restore_ends_when_it_was_tried() -> None:
    """A declaration behind one without an answer was not looked at, and restore() said that all was well."""
    async with robust() as (connection, server):
        one, two = await channel_of(connection), await channel_of(connection)
        await queue_on(one, "a")
        await queue_on(two, "b")
        server.at(DECLARE, silent, where=lambda method: method.queue == "a")

        def declared() -> int:
            return [method.queue for method in server.link.all(DECLARE)].count("b")

        async def restore() -> int:
            await two.restore()
            return declared()

        before = declared()
        with mock.patch("leveret.restore._STEP", 0.1):
            _, after = await asyncio.gather(one.restore(), restore(), return_exceptions=True)
        assert after == before + 2  # the first of them was never answered


async def test_a_consumer_that_was_refused_is_tried_out_whenever_its_pause_ends() -> None:
    """When it ended while another one was tried out, the refusal closed the user's channel."""
    async with robust() as (connection, server):
        one, two = await channel_of(connection), await channel_of(connection)
        await (await queue_on(one, "a")).consume(print)
        await (await queue_on(two, "b")).consume(print)
        closings: list[object] = []
        one.close_callbacks.add(lambda *_: closings.append(1))
        server.at(CONSUME, refuse(403), where=lambda method: method.queue == "a", times=None)
        held = Held()
        with mock.patch("leveret.troubles._FIRST_PAUSE", 0.25):
            server.at(CONSUME, refuse(403), where=lambda method: method.queue == "b")
            server.link.cancel("b")
            await server.seen(CONSUME, 3)
            await within(two.ready())
            await asyncio.sleep(0.1)
            server.link.cancel("a")
            await until(lambda: closings)
            await within(one.ready())
            server.at(CONSUME, held, where=lambda method: method.queue == "b")
            await held.reached()  # b is tried out
            await asyncio.sleep(0.3)  # meanwhile a's pause ends
            held.go()
            await until(lambda: len(tried(server.link, "a")) > 1)
        server.forget_rules()
        assert closings == [1]


def tried(link: ServerLink, queue: str) -> list[str]:
    """The tags by which consumers of *queue* were tried out."""
    return [m.consumer_tag for m in link.all(CONSUME) if m.queue == queue and m.consumer_tag.startswith("leveret-try")]


# --------------------------------------------------------------- a channel on which the broker refuses all publishes


def nack(link: ServerLink, channel: int, _: base.Frame) -> None:
    link.send(channel, commands.Basic.Nack(link.confirming[channel]))


async def refused(channel: RobustChannel, server: Server) -> None:
    server.at(PUBLISH, nack, times=100)
    results = await asyncio.gather(
        *[channel.default_exchange.publish(Message(b"x"), "q") for _ in range(100)], return_exceptions=True
    )
    assert {type(result) for result in results} == {MessageNacked}


async def test_a_consumer_that_begins_as_the_channel_is_replaced_begins_on_the_next_one() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        queue = await queue_on(channel)
        await refused(channel, server)
        got: list[IncomingMessage] = []
        await queue.consume(got.append)
        server.link.deliver("q", 1, b"m")
        await until(lambda: got)
        await fence(connection)
        assert got[0].is_live
        assert len(server.link.all(OPEN)) == 2


async def test_a_channel_is_not_replaced_while_somebody_waits_on_it() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        late = Held()
        server.at(DECLARE, late)
        declaring = asyncio.ensure_future(channel.declare_queue("slow"))
        await late.reached()
        await refused_while_one_waits(channel, server)
        with mock.patch("leveret.robust_channel._LAST_ANSWERS", 0.05):
            await asyncio.sleep(0.1)
        late.go()
        assert (await within(declaring)).name == "slow"


async def refused_while_one_waits(channel: RobustChannel, server: Server) -> None:
    """As `refused`, on a channel whose answers are held: the nacks are sent by hand."""
    publishes = [channel.default_exchange.publish(Message(b"x"), "q") for _ in range(100)]
    await until(lambda: len(server.published) == 100)
    server.link.send(channel.number or 0, commands.Basic.Nack(100, multiple=True))
    await asyncio.gather(*publishes, return_exceptions=True)


async def test_replacing_a_channel_costs_no_publish_that_is_on_its_way() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        server.at(PUBLISH, lambda *_: None)  # the first one is not answered
        first = asyncio.ensure_future(channel.default_exchange.publish(Message(b"x"), "q"))
        with mock.patch("leveret.robust_channel._LAST_ANSWERS", 0.05):
            server.at(PUBLISH, nack, times=100)
            await asyncio.gather(
                *[channel.default_exchange.publish(Message(b"x"), "q") for _ in range(100)], return_exceptions=True
            )
            await within(channel.ready())
        assert await within(channel.default_exchange.publish(Message(b"y"), "q"))
        server.link.send(channel.number or 0, commands.Basic.Ack(1))
        assert await within(first)
        assert len(server.link.all(OPEN)) == 1


async def test_a_queue_that_stays_full_for_days_does_no_harm() -> None:
    """From the 1,024th time on, 2 to that power was no float any more, and the link died."""
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        channel._renewals = 1023
        await refused(channel, server)
        await within(channel.ready())
        assert len(server.links) == 1


async def test_pauses_grow_only_while_replacing_the_channel_is_of_no_use() -> None:
    """They went on from where they were the last time, so the third lost leader cost half a minute."""
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        channel._renewals, channel._renewed_at = 6, asyncio.get_running_loop().time() - 2
        assert await channel.default_exchange.publish(Message(b"x"), "q")
        await refused(channel, server)
        assert await within(channel.default_exchange.publish(Message(b"y"), "q"), 2)
        assert len(server.link.all(OPEN)) == 2
