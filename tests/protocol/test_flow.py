"""Flow control: only publishes wait, in their order; acks, calls and heartbeats go out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pamqp import commands

from leveret import Channel, IncomingMessage, Message
from leveret.exceptions import (
    ChannelInvalidStateError,
    ConnectionBlocked,
    PublishNotSent,
    PublishNotSentInTime,
    PublishOutcomeUnknown,
)
from tests.protocol.kit import Link, linked, turns, until, within

BIG = bytes(1_000_000)
Ack = commands.Basic.Ack


def start(channel: Channel, body: bytes, **kwargs: Any) -> asyncio.Future[Any]:
    return asyncio.ensure_future(channel.default_exchange.publish(Message(body), "key", **kwargs))


async def fill(link: Link, channel: Channel) -> list[asyncio.Future[Any]]:
    """Publish until the socket takes no more; the publishes that were written."""
    output = link.connection._transport.output  # type: ignore[union-attr]
    written: list[asyncio.Future[Any]] = []
    while not output.is_held:
        written.append(start(channel, BIG))
        await turns(2)
        assert len(written) < 200
    return written


async def end(link: Link, futures: list[asyncio.Future[Any]]) -> None:
    link.session.reset()
    await within(link.connection.closed())
    await within(asyncio.gather(*futures, return_exceptions=True))


async def test_a_peer_that_does_not_read_makes_publishes_wait_and_keeps_their_order() -> None:
    async with linked() as link:
        channel = await link.channel()
        written = await fill(link, channel)
        held = [start(channel, b"%d" % n) for n in range(5)]
        await turns(20)
        assert not any(future.done() for future in held)
        for _ in written:
            *_, body = await link.session.expect_publish()
            assert body == BIG
        bodies = [(await link.session.expect_publish())[3] for _ in held]
        assert bodies == [b"0", b"1", b"2", b"3", b"4"]
        link.session.send(1, Ack(0, True))
        await within(asyncio.gather(*written, *held))


async def test_a_held_publish_times_out_as_not_sent_and_is_never_sent() -> None:
    async with linked() as link:
        channel = await link.channel()
        written = await fill(link, channel)
        late, kept = start(channel, b"late", timeout=0.05), start(channel, b"kept")
        with pytest.raises(PublishNotSentInTime) as caught:
            await within(late)
        assert isinstance(caught.value, PublishNotSent)
        assert isinstance(caught.value, TimeoutError)
        assert not isinstance(caught.value, PublishOutcomeUnknown)
        for _ in written:
            await link.session.expect_publish()
        assert (await link.session.expect_publish())[3] == b"kept"
        link.session.send(1, Ack(len(written) + 1, True))
        await within(kept)


async def test_a_cancelled_held_publish_is_never_sent() -> None:
    async with linked() as link:
        channel = await link.channel()
        written = await fill(link, channel)
        cancelled, kept = start(channel, b"cancelled"), start(channel, b"kept")
        cancelled.cancel()
        for _ in written:
            await link.session.expect_publish()
        assert (await link.session.expect_publish())[3] == b"kept"
        link.session.send(1, Ack(len(written) + 1, True))
        await within(kept)


async def test_acks_and_calls_are_written_behind_a_full_socket_before_held_publishes() -> None:
    got: list[IncomingMessage] = []
    async with linked() as link:
        channel = await link.channel()
        queue = await link.consume(channel, got.append)
        link.session.deliver(1, "tag", 1, b"x")
        await until(lambda: got)
        written = await fill(link, channel)
        held = start(channel, b"held")
        drained = asyncio.ensure_future(got[0].ack())
        declare = asyncio.create_task(queue.declare())
        await turns(20)
        assert not drained.done()  # back-pressure for those who await it
        for _ in written:
            await link.session.expect_publish()
        await link.session.expect(commands.Basic.Ack)
        await link.session.expect(commands.Queue.Declare)
        assert (await link.session.expect_publish())[3] == b"held"
        link.session.send(1, commands.Queue.DeclareOk("q", 0, 0), Ack(0, True))
        await within(asyncio.gather(drained, declare, held))


@pytest.mark.parametrize("how", ["eof", "reset"])
async def test_a_link_lost_behind_a_full_socket_is_noticed(how: str) -> None:
    """A closing socket with unsent bytes would wait for a peer that does not read."""
    async with linked(lenient=True) as link:
        channel = await link.channel()
        written = await fill(link, channel)
        held = start(channel, b"held")
        getattr(link.session, how)()
        await within(link.connection.closed(), 1)
        with pytest.raises(PublishNotSent):
            await within(held)
        for future in written:
            with pytest.raises(PublishOutcomeUnknown):
                await within(future)


async def test_close_behind_a_full_socket_is_bounded() -> None:
    async with linked(lenient=True) as link:
        channel = await link.channel()
        written = await fill(link, channel)
        held = start(channel, b"held")
        begun = asyncio.get_running_loop().time()
        await within(link.connection.close(timeout=0.1))
        assert asyncio.get_running_loop().time() - begun < 1
        with pytest.raises(PublishNotSent):
            await within(held)
        for future in written:
            with pytest.raises(PublishOutcomeUnknown):
                await within(future)
        link.session.reset()


async def test_a_peer_that_does_not_read_but_speaks_is_alive_for_longer_than_two_heartbeats() -> None:
    """As RabbitMQ during an alarm: it reads nothing, and goes on sending heartbeats."""
    async with linked(query="heartbeat=1", lenient=True) as link:
        channel = await link.channel()
        futures = await fill(link, channel)
        loop = asyncio.get_running_loop()
        begun = loop.time()
        while loop.time() - begun < 3.2 and not link.connection.is_closed:
            link.session.send_heartbeat()
            await asyncio.sleep(0.2)
        assert not link.connection.is_closed, link.connection._transport.error  # type: ignore[union-attr]
        await end(link, futures)


async def test_heartbeats_are_written_behind_a_full_socket() -> None:
    async with linked(query="heartbeat=1") as link:
        channel = await link.channel()
        written = await fill(link, channel)
        begun = asyncio.get_running_loop().time()
        await until(lambda: asyncio.get_running_loop().time() - begun > 1.1)
        for _ in written:
            await link.session.expect_publish()
        await link.session.expect_heartbeat()
        link.session.send(1, Ack(0, True))
        await within(asyncio.gather(*written))


# ------------------------------------------------------------------------------------- blocked, and channel.flow


@contextlib.asynccontextmanager
async def held_by(link: Link, how: str) -> AsyncIterator[asyncio.Event]:
    """Publishes are held within this block (to its end, unless the event is set), by the broker or channel 1's flow."""
    lost = asyncio.Event()
    output = link.connection._transport.output  # type: ignore[union-attr]
    if how == "blocked":
        link.session.send(0, commands.Connection.Blocked("low on memory"))
    else:
        link.session.send(1, commands.Channel.Flow(False))
        _, ok = await link.session.expect(commands.Channel.FlowOk, channel=1)
        assert ok.active is False
    await until(lambda: output.is_held)
    yield lost
    if lost.is_set():
        return
    if how == "blocked":
        link.session.send(0, commands.Connection.Unblocked())
    else:
        link.session.send(1, commands.Channel.Flow(True))
        _, ok = await link.session.expect(commands.Channel.FlowOk, channel=1)
        assert ok.active is True


@pytest.mark.parametrize("confirm", [True, False])
@pytest.mark.parametrize("how", ["blocked", "flow"])
async def test_held_publishes_go_out_in_order_and_others_go_out_at_once(how: str, confirm: bool) -> None:
    got: list[IncomingMessage] = []
    async with linked() as link:
        channel = await link.channel(confirm=confirm)
        queue = await link.consume(channel, got.append)
        link.session.deliver(1, "tag", 1, b"x")
        await until(lambda: got)
        async with held_by(link, how):
            futures = [start(channel, b"%d" % n) for n in range(3)]
            cancelled = start(channel, b"cancelled")
            await turns()
            cancelled.cancel()
            futures.append(start(channel, b"3"))
            await got[0].ack()
            declared = link.answer(queue.declare(), commands.Basic.Ack, commands.Queue.DeclareOk("q", 0, 0))
            await within(declared)
            await link.session.expect(commands.Queue.Declare)
            assert await link.fence() == []
            assert not any(future.done() for future in futures)
        bodies = [(await link.session.expect_publish())[3] for _ in futures]
        assert bodies == [b"0", b"1", b"2", b"3"]
        if confirm:
            link.session.send(1, commands.Basic.Nack(4), Ack(0, True))
        results = await within(asyncio.gather(*futures, return_exceptions=True))
        assert [type(result).__name__ for result in results] == (
            ["Ack"] * 3 + ["MessageNacked"] if confirm else ["NoneType"] * 4
        )


@pytest.mark.parametrize(("how", "kind"), [("blocked", ConnectionBlocked), ("flow", PublishNotSentInTime)])
async def test_held_publishes_time_out_with_the_reason(how: str, kind: type[PublishNotSentInTime]) -> None:
    async with linked() as link:
        channel = await link.channel()
        async with held_by(link, how):
            with pytest.raises(kind, match="low on memory" if how == "blocked" else None) as caught:
                await within(start(channel, b"x", timeout=0.05))
            assert type(caught.value) is kind
        assert await link.fence() == []


async def test_a_held_publish_uses_the_default_timeout() -> None:
    async with linked(query="operation_timeout=0.05") as link:
        channel = await link.channel()
        async with held_by(link, "blocked"):
            with pytest.raises(ConnectionBlocked):
                await within(start(channel, b"x"))


async def test_a_publish_written_after_waiting_keeps_its_one_deadline() -> None:
    async with linked() as link:
        channel = await link.channel()
        async with held_by(link, "blocked"):
            future = start(channel, b"x", timeout=0.1)
            await turns()
        await link.session.expect_publish()
        with pytest.raises(PublishOutcomeUnknown) as caught:
            await within(future)
        assert isinstance(caught.value, TimeoutError)


@pytest.mark.parametrize("how", ["blocked", "flow"])
@pytest.mark.parametrize("loss", ["reset", "channel.close", "close()"])
async def test_held_publishes_of_a_lost_channel_are_not_sent(how: str, loss: str) -> None:
    async with linked(lenient=True) as link:
        channels = [await link.channel(confirm=confirm) for confirm in (True, True, False)]
        async with held_by(link, how) as lost:
            lost.set()
            futures = [start(channel, b"x") for channel in channels]
            await turns()
            if loss == "reset":
                link.session.reset()
                await within(link.connection.closed())
            elif loss == "close()":
                closing = asyncio.create_task(link.connection.close(timeout=0.1))
                await within(closing)
            else:
                for number in (3, 2, 1):
                    link.session.send(number, commands.Channel.Close(406, "PRECONDITION_FAILED", 0, 0))
                    await link.session.expect(commands.Channel.CloseOk)
            for future in futures:
                with pytest.raises(PublishNotSent):
                    await within(future)
            for channel in channels:
                with pytest.raises(ChannelInvalidStateError):
                    channel.default_exchange.publish(Message(b""), "key")
            if loss == "channel.close":
                assert await link.fence() == []


async def test_a_channel_whose_flow_was_stopped_frees_the_others_when_it_is_closed() -> None:
    async with linked() as link:
        stopped, other = await link.channel(), await link.channel()
        link.session.send(1, commands.Channel.Flow(False))
        await link.session.expect(commands.Channel.FlowOk)
        await link.answer(stopped.close(), commands.Channel.Close, commands.Channel.CloseOk())
        future = start(other, b"x")
        await link.session.expect_publish()
        link.session.send(2, Ack(1))
        await within(future)


async def test_blocked_is_told_once_with_its_reason_and_once_when_it_ends() -> None:
    told: list[str | None] = []
    async with linked() as link:
        link.connection.blocked_callbacks.add(lambda _, reason: told.append(reason))
        assert link.connection.blocked is None
        link.session.send(0, commands.Connection.Blocked("low on memory"))
        await link.fence()
        assert link.connection.blocked == "low on memory"
        link.session.send(0, commands.Connection.Unblocked())
        await link.fence()
        link.session.send(0, commands.Connection.Unblocked())
        await link.fence()
        assert link.connection.blocked is None
    assert told == ["low on memory", None]


async def test_publishes_wait_for_all_who_hold_them() -> None:
    async with linked() as link:
        channel = await link.channel()
        async with held_by(link, "flow"):
            async with held_by(link, "blocked"):
                future = start(channel, b"x")
            assert await link.fence() == []
            assert not future.done()
        await link.session.expect_publish()
        link.session.send(1, Ack(1))
        await within(future)


async def test_close_on_a_blocked_connection_is_bounded() -> None:
    async with linked() as link:
        await link.channel()
        link.session.send(0, commands.Connection.Blocked("low on memory"))
        await until(lambda: link.connection.blocked)
        await within(link.connection.close(timeout=0.1), 1)
        await link.session.expect(commands.Connection.Close)
        await link.session.closed()


async def test_many_held_publishes_that_time_out_are_not_kept() -> None:
    """A publisher that retries during an alarm of hours must not pile up what it gave up."""
    async with linked() as link:
        channel = await link.channel()
        async with held_by(link, "blocked"):
            futures = [start(channel, b"x" * 1000, timeout=0.01) for _ in range(200)]
            await within(asyncio.gather(*futures, return_exceptions=True))
            await turns()
            output = link.connection._transport.output  # type: ignore[union-attr]
            assert len(output._held) < 50
