"""Closing: in every order, from every side, in time, and once."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from pamqp import commands

from leveret import Connection, IncomingMessage, Message
from leveret.exceptions import (
    AMQPConnectionError,
    ChannelClosed,
    ChannelInvalidStateError,
    ChannelLimitReached,
    ChannelNotFoundEntity,
    ConnectionClosed,
    DeliveryLost,
    PublishOutcomeUnknown,
)
from leveret.testing import Broker
from leveret.wire.transport import Transport
from tests.protocol.kit import deaf, hang_up, linked, sockets, turns, until, within

Close, CloseOk = commands.Channel.Close, commands.Channel.CloseOk
GONE = Close(404, "NOT_FOUND - no queue 'q'", 50, 10)
ConnClose, ConnCloseOk = commands.Connection.Close, commands.Connection.CloseOk
FORCED = ConnClose(320, "CONNECTION_FORCED - shutdown", 0, 0)


# ----------------------------------------------------------------------------------------------------- channels


@pytest.mark.parametrize("order", ["close, close-ok", "close-ok, close"])
async def test_crossing_channel_closes(order: str) -> None:
    async with linked(channel_max=1) as link:
        channel = await link.channel()
        closing = asyncio.create_task(channel.close())
        await link.session.expect(Close)
        frames = [GONE, CloseOk()]
        link.session.send(1, *(frames if order == "close, close-ok" else reversed(frames)))
        await link.session.expect(CloseOk)
        await within(closing)
        await link.fence()
        assert (await link.channel()).number == 1


async def test_a_channel_close_that_crossed_calls_back_once_and_needs_our_close_ok_and_theirs() -> None:
    calls: list[Any] = []
    async with linked(channel_max=1) as link:
        channel = await link.channel()
        channel.close_callbacks.add(lambda *args: calls.append(args))
        closing = asyncio.create_task(channel.close())
        await link.session.expect(Close)
        link.session.send(1, GONE)
        await link.session.expect(CloseOk)
        await link.fence()
        assert not closing.done()
        with pytest.raises(ChannelLimitReached):
            await link.connection.channel()
        link.session.send(1, CloseOk())
        await within(closing)
        assert len(calls) == 1


@pytest.mark.parametrize("count", [2, 5])
async def test_each_repeated_channel_close_is_answered_and_told_once(count: int) -> None:
    calls: list[Any] = []
    async with linked() as link:
        channel = await link.channel()
        channel.close_callbacks.add(lambda *args: calls.append(args))
        link.session.send(1, *[GONE] * count)
        for _ in range(count):
            await link.session.expect(CloseOk, channel=1)
        assert await link.fence() == []
        assert len(calls) == 1
        assert calls[0][0] is channel
        assert isinstance(calls[0][1], ChannelNotFoundEntity)
        assert not link.connection.is_closed


async def test_a_repeated_channel_close_during_ours_is_answered_too() -> None:
    async with linked() as link:
        channel = await link.channel()
        closing = asyncio.create_task(channel.close())
        await link.session.expect(Close)
        link.session.send(1, GONE, GONE, CloseOk(), GONE)
        for _ in range(3):
            await link.session.expect(CloseOk, channel=1)
        await within(closing)
        assert await link.fence() == []


async def test_nothing_is_sent_on_a_channel_that_the_broker_closed() -> None:
    got: list[IncomingMessage] = []
    async with linked() as link:
        channel = await link.channel()
        await link.consume(channel, got.append)
        for n in (1, 2):
            link.session.deliver(1, "tag", n)
        await until(lambda: len(got) == 2)
        _ = got[0].ack()  # saved up when the close arrives, at the earliest
        link.session.send(1, GONE)
        await until(lambda: channel.is_closed)
        with pytest.raises(DeliveryLost):
            await got[1].ack()
        with pytest.raises(ChannelInvalidStateError):
            channel.default_exchange.publish(Message(b""), "key")
        sent = await link.sent()
        assert [type(value) for value in sent] == [commands.Basic.Ack, CloseOk]


async def test_a_number_is_used_again_only_after_close_ok() -> None:
    async with linked(channel_max=2) as link:
        first, _ = await link.channel(), await link.channel()
        closing = asyncio.create_task(first.close())
        await link.session.expect(Close, channel=1)
        with pytest.raises(ChannelLimitReached):
            await link.connection.channel()
        link.session.send(1, CloseOk())
        await within(closing)
        assert (await link.channel()).number == 1


async def test_a_number_whose_close_was_never_answered_stays_taken_until_it_is() -> None:
    async with linked(channel_max=1) as link:
        channel = await link.channel()
        await within(channel.close(timeout=0.05))
        await link.session.expect(Close)
        assert channel.is_closed
        with pytest.raises(ChannelLimitReached):
            await link.connection.channel()
        link.session.send(1, CloseOk())
        await link.fence()
        assert (await link.channel()).number == 1


async def test_numbers_rest_before_they_are_used_again() -> None:
    async with linked(channel_max=3) as link:
        numbers = []
        for _ in range(7):
            channel = await link.channel()
            numbers.append(channel.number)
            await link.answer(channel.close(), Close, CloseOk(), channel=channel.number or 0)
        assert numbers == [1, 2, 3, 1, 2, 3, 1]


async def test_closing_a_channel_twice_and_at_the_same_time_sends_one_close() -> None:
    calls: list[Any] = []
    async with linked() as link:
        channel = await link.channel()
        channel.close_callbacks.add(lambda *args: calls.append(args))
        closings = asyncio.gather(*(channel.close() for _ in range(3)))
        await link.session.expect(Close)
        link.session.send(1, CloseOk())
        await within(closings)
        await within(channel.close())
        assert await within(channel.closed()) is True
        assert await link.fence() == []
        assert len(calls) == 1


async def test_channel_close_waits_for_confirms() -> None:
    async with linked() as link:
        channel = await link.channel()
        publish = asyncio.ensure_future(channel.default_exchange.publish(Message(b""), "key"))
        await link.session.expect_publish()
        closing = asyncio.create_task(channel.close())
        assert await link.fence() == []
        link.session.send(1, commands.Basic.Ack(1))
        await link.session.expect(Close)
        link.session.send(1, CloseOk())
        await within(closing)
        assert isinstance(await publish, commands.Basic.Ack)


async def test_channel_close_gives_up_waiting_for_confirms_at_its_deadline() -> None:
    async with linked() as link:
        channel = await link.channel()
        publish = asyncio.ensure_future(channel.default_exchange.publish(Message(b""), "key"))
        await link.session.expect_publish()
        await within(channel.close(timeout=0.05))
        await link.session.expect(Close)
        with pytest.raises(PublishOutcomeUnknown):
            await within(publish)


@pytest.mark.parametrize("pending", [True, False])
async def test_a_cancelled_channel_close_has_closed_it(pending: bool) -> None:
    async with linked() as link:
        channel = await link.channel()
        futures = []
        if pending:
            futures = [asyncio.ensure_future(channel.default_exchange.publish(Message(b""), "key"))]
            await link.session.expect_publish()
        closing = asyncio.create_task(channel.close())
        await turns()
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await within(closing)
        await link.session.expect(Close)
        assert channel.is_closed
        for future in futures:
            with pytest.raises(PublishOutcomeUnknown):
                await within(future)


async def test_a_cancelled_channel_close_has_closed_it_while_a_callback_lingers() -> None:
    release = asyncio.Event()

    async def stubborn(_: IncomingMessage) -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    async with linked() as link:
        channel = await link.channel()
        await link.consume(channel, stubborn)
        link.session.deliver(1, "tag", 1)
        await until(lambda: channel.handler_tasks)
        await turns()
        closing = asyncio.create_task(channel.close())
        await turns()
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await within(closing)
        try:
            await link.session.expect(Close, timeout=0.5)
            assert channel.is_closed
        finally:
            release.set()
            await turns()


async def test_a_link_lost_during_channel_close_ends_it() -> None:
    async with linked() as link:
        channel = await link.channel()
        closing = asyncio.create_task(channel.close())
        await link.session.expect(Close)
        link.session.reset()
        await within(closing, 1)
        assert await within(channel.closed()) is True


async def test_calls_on_a_channel_that_is_being_closed_are_refused() -> None:
    async with linked() as link:
        channel = await link.channel()
        closing = asyncio.create_task(channel.close())
        await link.session.expect(Close)
        with pytest.raises(ChannelInvalidStateError):
            await channel.declare_queue("q")
        with pytest.raises(ChannelInvalidStateError):
            channel.default_exchange.publish(Message(b""), "key")
        link.session.send(1, CloseOk())
        await within(closing)


async def test_async_with_closes_a_channel_that_the_broker_closed_without_a_word() -> None:
    async with linked() as link:
        channel = await link.channel()
        async with channel:
            link.session.send(1, GONE)
            await link.session.expect(CloseOk)
            await until(lambda: channel.is_closed)
        assert await link.fence() == []


async def test_reopen_of_a_channel_that_fails_leaves_it_closed() -> None:
    async with linked() as link:
        channel = await link.channel()
        link.session.reset()
        await within(link.connection.closed())
        with pytest.raises(ChannelInvalidStateError):
            await channel.reopen()
        assert channel.is_closed
        assert await within(channel.closed()) is True


# -------------------------------------------------------------------------------------------------- connections


@pytest.mark.parametrize("order", ["close", "close, close-ok", "close-ok, close"])
async def test_crossing_connection_closes(order: str) -> None:
    calls: list[Any] = []
    async with linked() as link:
        await link.channel()
        link.connection.close_callbacks.add(lambda *args: calls.append(args))
        closing = asyncio.create_task(link.connection.close())
        await link.session.expect(ConnClose)
        frames = {"close": [FORCED], "close, close-ok": [FORCED, ConnCloseOk()]}.get(order, [ConnCloseOk(), FORCED])
        link.session.send(0, *frames)
        await within(closing, 1)
        rest = [value async for _, value in link.session.frames()]
        assert all(isinstance(value, ConnCloseOk) for value in rest)
        if order == "close":
            assert len(rest) == 1
        assert len(calls) == 1
        assert link.connection.is_closed


async def test_the_brokers_close_is_answered_and_told_to_everybody() -> None:
    calls: list[Any] = []
    async with linked() as link:
        channel = await link.channel()
        link.connection.close_callbacks.add(lambda *args: calls.append(args))
        channel.close_callbacks.add(lambda *args: calls.append(args))
        declare = asyncio.create_task(channel.declare_queue("q"))
        await link.session.expect(commands.Queue.Declare)
        publish = asyncio.ensure_future(channel.default_exchange.publish(Message(b""), "key"))
        await link.session.expect_publish()
        link.session.send(0, FORCED)
        await link.session.expect(ConnCloseOk, channel=0)
        await hang_up(link.session)
        results = await within(asyncio.gather(declare, publish, return_exceptions=True))
        assert isinstance(results[0], ConnectionClosed)
        assert (results[0].reply_code, results[0].by_broker) == (320, True)
        assert isinstance(results[1], PublishOutcomeUnknown)
        assert isinstance(results[1].__cause__, ConnectionClosed)
        assert [sender for sender, _ in calls] == [channel, link.connection]
        assert all(error.reply_code == 320 for _, error in calls)
        assert link.connection.is_closed
        assert not link.connection.connected.is_set()
        with pytest.raises(ChannelInvalidStateError):
            await link.connection.channel()
        with pytest.raises(ConnectionClosed):
            await link.connection.ready()
        with pytest.raises(ConnectionClosed):
            await link.connection.update_secret("x")


@pytest.mark.parametrize("how", ["eof", "reset", "silence", "connection.close"])
async def test_closing_ends_whatever_the_peer_does_instead_of_close_ok(how: str) -> None:
    async with linked() as link:
        channel = await link.channel()
        before = sockets()
        closing = asyncio.create_task(link.connection.close(timeout=0.1))
        await link.session.expect(ConnClose)
        if how == "connection.close":
            link.session.send(0, FORCED)
        elif how != "silence":
            getattr(link.session, how)()
        begun = asyncio.get_running_loop().time()
        await within(closing, 1)
        assert asyncio.get_running_loop().time() - begun < 0.5
        assert link.connection.is_closed
        assert channel.is_closed
        await until(lambda: len(sockets()) < len(before))


async def test_closing_a_connection_twice_and_at_the_same_time_sends_one_close() -> None:
    calls: list[Any] = []
    async with linked() as link:
        connection = link.connection
        connection.close_callbacks.add(lambda *args: calls.append(args))
        closings = asyncio.gather(*(connection.close() for _ in range(3)))
        await link.session.expect(ConnClose)
        link.session.send(0, ConnCloseOk())
        await within(closings)
        await within(connection.close())
        assert await within(connection.closed()) is True
        await link.session.closed()
        assert len(calls) == 1
        assert calls[0][1].reply_code == 200


async def test_a_second_close_has_its_own_timeout() -> None:
    async with linked() as link:
        first = asyncio.create_task(link.connection.close(timeout=1))
        await link.session.expect(ConnClose)
        begun = asyncio.get_running_loop().time()
        await within(link.connection.close(timeout=0.05))
        assert asyncio.get_running_loop().time() - begun < 0.5
        link.session.send(0, ConnCloseOk())
        await within(first)


@pytest.mark.parametrize("pending", [True, False])
async def test_a_cancelled_close_closes_the_socket_at_once(pending: bool) -> None:
    async with linked(lenient=True) as link:
        channel = await link.channel()
        publish = asyncio.ensure_future(channel.default_exchange.publish(Message(b""), "key")) if pending else None
        await link.fence()
        closing = asyncio.create_task(link.connection.close())
        await turns()
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await within(closing)
        assert link.connection.is_closed
        if publish is not None:
            with pytest.raises(PublishOutcomeUnknown):
                await within(publish)
        _ = [frame async for frame in link.session.frames(timeout=1)]


async def test_close_waits_for_confirms_and_refuses_new_publishes_meanwhile() -> None:
    async with linked() as link:
        channel = await link.channel()
        publish = asyncio.ensure_future(channel.default_exchange.publish(Message(b""), "key"))
        await link.session.expect_publish()
        closing = asyncio.create_task(link.connection.close())
        await turns()
        with pytest.raises(ChannelInvalidStateError):
            channel.default_exchange.publish(Message(b""), "key")
        with pytest.raises(ChannelInvalidStateError):
            await channel.declare_queue("q")
        with pytest.raises(ChannelInvalidStateError):
            await link.connection.channel()
        link.session.send(1, commands.Basic.Ack(1))
        await link.session.expect(ConnClose)
        link.session.send(0, ConnCloseOk())
        await within(closing)
        assert isinstance(await publish, commands.Basic.Ack)


async def test_publishes_that_nobody_waits_for_any_more_do_not_hold_up_close() -> None:
    async with linked() as link:
        channel = await link.channel()
        publish = asyncio.ensure_future(channel.default_exchange.publish(Message(b""), "key", timeout=0.01))
        await link.session.expect_publish()
        with pytest.raises(PublishOutcomeUnknown):
            await within(publish)
        begun = asyncio.get_running_loop().time()
        await within(asyncio.gather(link.connection.close(timeout=2), link.finish()))
        assert asyncio.get_running_loop().time() - begun < 1


async def test_close_from_inside_a_callback_shakes_hands_and_lets_the_callback_end() -> None:
    ended: list[str] = []
    connection: Connection

    async def callback(message: IncomingMessage) -> None:
        await asyncio.sleep(0)
        try:
            await connection.close(timeout=1)
            ended.append("closed")
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async with linked() as link:
        connection = link.connection
        channel = await link.channel()
        await link.consume(channel, callback)
        link.session.deliver(1, "tag", 1)
        await link.session.expect(ConnClose)
        link.session.send(0, ConnCloseOk())
        await link.session.closed()
        await until(lambda: ended)
        assert ended == ["closed"]


async def test_channel_close_from_inside_a_callback() -> None:
    ended: list[str] = []

    async with linked() as link:
        channel = await link.channel()

        async def callback(message: IncomingMessage) -> None:
            await message.ack()
            await channel.close(timeout=1)
            ended.append("closed")

        await link.consume(channel, callback)
        link.session.deliver(1, "tag", 1)
        await link.session.expect(commands.Basic.Ack)
        await link.session.expect(Close)
        link.session.send(1, CloseOk())
        await until(lambda: ended)


async def test_close_from_inside_a_close_callback() -> None:
    async with linked() as link:
        ended: list[bool] = []

        async def again(connection: Connection, _: object) -> None:
            await connection.close()
            ended.append(True)

        link.connection.close_callbacks.add(again)
        link.session.send(0, FORCED)
        await link.session.expect(ConnCloseOk)
        await hang_up(link.session)
        await within(link.connection.closed())
        await until(lambda: ended)


async def test_running_callbacks_are_cancelled_by_close_and_may_still_ack() -> None:
    got: list[str] = []

    async def callback(message: IncomingMessage) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await message.ack()
            got.append("ended")

    async with linked() as link:
        channel = await link.channel()
        await link.consume(channel, callback)
        link.session.deliver(1, "tag", 1)
        await until(lambda: channel.handler_tasks)
        await turns()
        closing = asyncio.create_task(link.connection.close())
        await link.session.expect(commands.Basic.Ack)
        await link.session.expect(ConnClose)
        link.session.send(0, ConnCloseOk())
        await within(closing)
        assert got == ["ended"]


async def test_a_callback_that_does_not_end_does_not_hold_up_close() -> None:
    release = asyncio.Event()

    async def stubborn(_: IncomingMessage) -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    async with linked() as link:
        channel = await link.channel()
        await link.consume(channel, stubborn)
        link.session.deliver(1, "tag", 1)
        await until(lambda: channel.handler_tasks)
        await turns()
        begun = time.monotonic()
        await within(link.connection.close(timeout=0.1))
        assert time.monotonic() - begun < 1
        release.set()
        await link.session.expect(ConnClose)
        await link.session.closed()


async def test_acks_of_the_last_turn_precede_the_close() -> None:
    got: list[IncomingMessage] = []
    async with linked() as link:
        channel = await link.channel()
        await link.consume(channel, got.append)
        link.session.deliver(1, "tag", 1)
        await until(lambda: got)
        _ = got[0].ack()
        closing = asyncio.create_task(link.connection.close())
        await link.session.expect(commands.Basic.Ack)
        await link.session.expect(ConnClose)
        link.session.send(0, ConnCloseOk())
        await within(closing)


async def test_the_error_given_to_close_is_what_waiters_get() -> None:
    reason = RuntimeError("shutting down")
    calls: list[Any] = []
    async with linked() as link:
        channel = await link.channel()
        link.connection.close_callbacks.add(lambda _, error: calls.append(error))
        declare = asyncio.create_task(channel.declare_queue("q"))
        await link.session.expect(commands.Queue.Declare)
        closing = asyncio.create_task(link.connection.close(reason))
        await link.session.expect(ConnClose)
        link.session.send(0, ConnCloseOk())
        await within(closing)
        with pytest.raises(RuntimeError, match="shutting down"):
            await within(declare)
        assert calls == [reason]


@pytest.mark.parametrize("how", ["eof", "reset"])
async def test_a_lost_link_closes_everything_without_close(how: str) -> None:
    calls: list[Any] = []
    async with linked() as link:
        channel = await link.channel()
        link.connection.close_callbacks.add(lambda _, error: calls.append(error))
        getattr(link.session, how)()
        await within(link.connection.closed(), 1)
        assert channel.is_closed
        assert await within(channel.closed()) is True
        (error,) = calls
        assert isinstance(error, AMQPConnectionError)
        assert "127.0.0.1" in str(error)
        begun = asyncio.get_running_loop().time()
        await within(link.connection.close())
        assert asyncio.get_running_loop().time() - begun < 0.2


async def test_a_server_that_closes_a_channel_within_its_own_content() -> None:
    """channel.close may come at any time: what had begun will never be complete."""
    async with linked() as link:
        channel = await link.channel()
        await link.consume(channel, print)
        closing = asyncio.create_task(channel.close())
        await link.session.expect(Close)
        link.session.send(1, commands.Basic.Deliver("tag", 1, False, "", ""), GONE, CloseOk())
        await link.session.expect(CloseOk)
        await within(closing)
        assert await link.fence() == []


async def test_an_iterator_ends_quietly_when_this_side_closes() -> None:
    async with linked() as link:
        channel = await link.channel()
        queue = await link.queue(channel)
        iterator = queue.iterator(consumer_tag="tag")
        await link.answer(iterator.consume(), commands.Basic.Consume, commands.Basic.ConsumeOk("tag"))
        waiting = asyncio.ensure_future(anext(iterator, None))
        await turns()
        await link.answer(channel.close(), Close, CloseOk())
        assert await within(waiting) is None


async def test_an_iterator_raises_what_the_broker_said() -> None:
    async with linked() as link:
        channel = await link.channel()
        queue = await link.queue(channel)
        iterator = queue.iterator(consumer_tag="tag")
        await link.answer(iterator.consume(), commands.Basic.Consume, commands.Basic.ConsumeOk("tag"))
        waiting = asyncio.ensure_future(anext(iterator))
        await turns()
        link.session.send(1, Close(406, "PRECONDITION_FAILED - timeout", 0, 0))
        await link.session.expect(CloseOk)
        with pytest.raises(ChannelClosed, match="timeout"):
            await within(waiting)


async def test_ready_ends_when_the_connection_is_closed_before_it_was_open() -> None:
    connection = Connection("amqp://localhost/")
    waiter = asyncio.ensure_future(connection.ready())
    await turns()
    await within(connection.close())
    with pytest.raises(ConnectionClosed):
        await within(waiter)


# ----------------------------------------------------------------------------------- while it is being connected


@pytest.mark.parametrize("how", ["close", "cancel"])
async def test_close_ends_a_connect_that_waits_for_the_broker(how: str) -> None:
    async with deaf() as (url, has_come, has_gone):
        connection = Connection(url)
        connecting = asyncio.create_task(connection.connect())
        await within(has_come.wait())
        if how == "cancel":
            connecting.cancel()
        await within(connection.close())
        with pytest.raises(asyncio.CancelledError if how == "cancel" else ConnectionClosed):
            await within(connecting)
        await within(has_gone.wait())
        assert connection.is_closed


async def test_a_connect_that_is_cancelled_as_the_connection_opens_is_no_loss(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Broker() as broker:
        connection, losses = Connection(broker.url), []
        connection.close_callbacks.add(lambda *args: losses.append(args))
        connecting = asyncio.create_task(connection.connect())
        with monkeypatch.context() as patched:
            on_method = Transport._on_handshake_method

            def cancel_at_the_end(self: Transport, method: Any) -> None:
                if isinstance(method, commands.Connection.OpenOk):
                    connecting.cancel()
                on_method(self, method)

            patched.setattr(Transport, "_on_handshake_method", cancel_at_the_end)
            with pytest.raises(asyncio.CancelledError):
                await within(connecting)
        assert not losses
        assert not connection.is_closed
        assert "lost" not in caplog.text
        await within(connection.connect())
        assert connection.health().status == "ready"
        await connection.close()
        assert len(losses) == 1
