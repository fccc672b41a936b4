"""Heartbeats: we send when idle, any byte is life, silence is death."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from pamqp import commands, frame, heartbeat

from leveret import IncomingMessage, Message
from leveret.exceptions import AMQPConnectionError, DeliveryLost, HeartbeatTimeout, PublishOutcomeUnknown
from tests.protocol.kit import Link, linked, until, within


def beats(link: Link) -> int:
    return sum(isinstance(value, heartbeat.Heartbeat) for _, value in link.session.received)


async def test_an_idle_client_beats_twice_an_interval() -> None:
    async with linked(query="heartbeat=1") as link:
        begun = asyncio.get_running_loop().time()
        for timeout in (1.3, 0.8):  # the first half interval is one in which we wrote
            await link.session.expect_heartbeat(timeout=timeout)
            link.session.send_heartbeat()
        assert 1.0 < asyncio.get_running_loop().time() - begun < 2.0


async def test_a_client_that_writes_does_not_beat() -> None:
    async with linked(query="heartbeat=1") as link:
        channel = await link.channel(confirm=False)
        loop = asyncio.get_running_loop()
        begun = loop.time()
        while loop.time() - begun < 1.3:
            await within(channel.default_exchange.publish(Message(b""), "key"))
            await link.session.expect_publish()
            link.session.send_heartbeat()
            await asyncio.sleep(0.05)
        assert beats(link) == 0


async def test_no_heartbeats_where_they_are_switched_off() -> None:
    async with linked(query="heartbeat=0", heartbeat=60) as link:
        assert link.session.tune_ok.heartbeat == 0
        assert link.connection._transport._heartbeat_timer is None  # type: ignore[union-attr]


async def test_silence_over_two_intervals_is_death_and_all_who_wait_are_told() -> None:
    async with linked(query="heartbeat=1", lenient=True) as link:
        got: list[IncomingMessage] = []
        reasons: list[BaseException | None] = []
        link.connection.close_callbacks.add(lambda _, reason: reasons.append(reason))
        channel = await link.channel()
        queue = await link.consume(channel, got.append)
        link.session.deliver(1, "tag", 1, b"x")
        await until(lambda: got)
        iterator = queue.iterator(consumer_tag="it")
        await link.answer(iterator.consume(), commands.Basic.Consume, commands.Basic.ConsumeOk("it"))
        waiting = asyncio.ensure_future(anext(iterator))
        declare = asyncio.create_task(queue.declare())
        publish = asyncio.ensure_future(channel.default_exchange.publish(Message(b""), "key"))
        begun = asyncio.get_running_loop().time()
        results = await within(asyncio.gather(declare, publish, waiting, return_exceptions=True), 4)
        took = asyncio.get_running_loop().time() - begun
        assert 1.9 < took < 3.1
        assert [type(result) for result in results] == [HeartbeatTimeout, PublishOutcomeUnknown, HeartbeatTimeout]
        assert isinstance(results[1].__cause__, HeartbeatTimeout)
        assert isinstance(results[0], AMQPConnectionError)
        assert link.connection.is_closed
        assert isinstance(reasons[0], HeartbeatTimeout)
        with pytest.raises(DeliveryLost):
            await got[0].ack()
        frames = [value async for _, value in link.session.frames()]
        assert not any(isinstance(value, commands.Connection.Close) for value in frames)  # aborted


async def test_any_byte_is_life() -> None:
    await asyncio.gather(*map(live_on, ["heartbeat", "one byte", "delivery", "method"]))


async def live_on(what: str) -> None:
    got: list[IncomingMessage] = []
    async with linked(query="heartbeat=1", lenient=True) as link:
        channel = await link.channel()
        await link.consume(channel, got.append, no_ack=True)
        trickle = iter(frame.marshal(commands.Connection.Blocked("x" * 200), 0))
        loop = asyncio.get_running_loop()
        begun = loop.time()
        n = 0
        while loop.time() - begun < 2.9:
            n += 1
            if what == "heartbeat":
                link.session.send_heartbeat()
            elif what == "one byte":
                link.session.send_raw(bytes([next(trickle)]))
            elif what == "delivery":
                link.session.deliver(1, "tag", n)
            else:
                link.session.send(1, commands.Channel.Flow(True))
            await asyncio.sleep(0.4)
        assert not link.connection.is_closed
        link.session.send_raw(bytes(trickle) if what == "one byte" else b"")
        if what == "one byte":
            await until(lambda: link.connection.blocked)


async def test_a_loop_that_stood_still_reads_what_waits_before_it_judges(caplog: pytest.LogCaptureFixture) -> None:
    async with linked(query="heartbeat=1", lenient=True) as link:
        link.session.send_heartbeat()
        await link.fence()
        link.session.send_heartbeat()
        time.sleep(2.6)  # noqa: ASYNC251 - a handler that blocks the loop
        for _ in range(4):
            await asyncio.sleep(0.25)
            assert not link.connection.is_closed
            link.session.send_heartbeat()
    (line,) = [record.getMessage() for record in caplog.records if "stood still" in record.getMessage()]
    assert "2." in line


async def test_a_loop_that_stood_still_finds_a_dead_peer_dead_soon_after() -> None:
    async with linked(query="heartbeat=1", lenient=True) as link:
        time.sleep(2.2)  # noqa: ASYNC251
        begun = asyncio.get_running_loop().time()
        await within(link.connection.closed())
        assert asyncio.get_running_loop().time() - begun < 1.0


async def test_heartbeats_stop_with_the_connection() -> None:
    async with linked(query="heartbeat=1") as link:
        transport: Any = link.connection._transport
        await within(asyncio.gather(link.connection.close(), link.finish()))
        assert transport._heartbeat_timer.cancelled()


async def test_a_peer_that_reads_but_says_nothing_during_a_busy_publish_is_found_dead() -> None:
    async with linked(query="heartbeat=1", lenient=True) as link:
        channel = await link.channel(confirm=False)
        loop = asyncio.get_running_loop()
        begun = loop.time()
        while not link.connection.is_closed and loop.time() - begun < 4:
            await within(channel.default_exchange.publish(Message(b"x"), "key"))
            await link.session.expect_publish()
            await asyncio.sleep(0.1)
        assert 1.9 < loop.time() - begun < 3.2
