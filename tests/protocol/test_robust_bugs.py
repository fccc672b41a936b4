"""Bugs that reviewers and attackers found in recovery, each with what it did."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest import mock

import pytest
from pamqp import base, commands

from leveret import Credentials, Message, MessageRetry, RetryPolicy, connect_robust
from leveret.exceptions import (
    ChannelInvalidStateError,
    ChannelNotFoundEntity,
    ConsumerCancelled,
    MessageNacked,
    PublishNotSent,
)
from tests.protocol.kit import turns, until, within
from tests.protocol.robust_kit import (
    Held,
    Server,
    ServerLink,
    again,
    back,
    channel_of,
    closed_by_broker,
    fence,
    lost,
    queue_on,
    refuse,
    robust,
    silent,
)

DECLARE = commands.Queue.Declare
CONSUME = commands.Basic.Consume


async def test_a_channel_that_the_user_closes_over_a_mistake_leaves_no_trouble() -> None:
    async with robust() as (connection, server):
        server.at(DECLARE, refuse(404, "NOT_FOUND"), where=lambda method: bool(method.passive), times=3)
        for _ in range(3):
            with pytest.raises(ChannelNotFoundEntity):
                async with connection.channel() as channel:
                    await channel.get_queue("missing")
        await until(lambda: connection.health().status == "ready")


async def test_a_queue_that_is_deleted_while_others_are_declared_again_stays_gone() -> None:
    async with robust() as (connection, server):
        one, two = await channel_of(connection), await channel_of(connection)
        queues = [await queue_on(two, f"q{n}") for n in range(60)]
        before, held = len(server.link.all(DECLARE)), Held()
        server.at(DECLARE, held, where=lambda method: method.queue == "q0")
        await closed_by_broker(one, server, 404)
        await held.reached()
        await within(queues[50].delete(if_unused=False, if_empty=False))
        held.go()
        await within(one.ready())
        await fence(connection)
        declared = [method.queue for method in server.link.all(DECLARE)[before:]]
        assert "q59" in declared
        assert "q50" not in declared


async def test_a_refused_binding_of_a_queue_that_is_renamed_leaves_no_trouble() -> None:
    async with robust() as (connection, server):
        queue = await (await channel_of(connection)).declare_queue("")
        await queue.bind("x", "k")
        for link in (1, 2):
            server.at(commands.Queue.Bind, refuse(404, "no exchange"), link=link)
        for _ in range(3):
            await again(connection, server)
        await until(lambda: connection.health().status == "ready")
        assert server.link.all(commands.Queue.Bind)[-1].queue == queue.name


async def test_what_a_commit_waits_for_is_not_published_on_the_next_link() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection, publisher_confirms=False)
        transaction = channel.transaction()
        await transaction.select()
        server.link.send(0, commands.Connection.Blocked("low on memory"))
        await until(lambda: connection.blocked)
        publish = asyncio.ensure_future(channel.default_exchange.publish(Message(b"in it"), "key"))
        await turns()
        commit = asyncio.ensure_future(transaction.commit())
        await turns()
        await lost(connection, server)
        with pytest.raises(PublishNotSent):
            await within(publish)
        with pytest.raises(ChannelInvalidStateError):
            await within(commit)
        await back(connection, server)
        await fence(connection)
        assert not server.published
        assert not server.link.all(commands.Tx.Commit)


async def test_a_delete_that_never_left_forgets_nothing() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        ended: list[ConsumerCancelled] = []
        channel.consumer_cancelled_callbacks.add(lambda _, error: ended.append(error))
        queue = await queue_on(channel)
        await queue.consume(print)
        await lost(connection, server)
        with pytest.raises(TimeoutError, match="nothing was sent"):
            await queue.delete(timeout=0.05)
        await back(connection, server)
        await within(channel.ready())
        assert (len(server.link.all(DECLARE)), len(server.link.all(CONSUME)), ended) == (1, 1, [])


async def test_a_channel_that_dies_behind_each_consume_ok_backs_off() -> None:
    def ok_and_close(link: ServerLink, channel: int, method: Any) -> None:
        link.reply(channel, method)
        link.close_channel(channel, 406, "unknown delivery tag", (60, 80))

    async with robust() as (connection, server):
        await (await queue_on(await channel_of(connection))).consume(print)
        server.at(CONSUME, ok_and_close, link=1, times=1000)
        server.drop()
        await server.seen(CONSUME, 3, link=1)
        assert connection.health().status == "degraded"
        await asyncio.sleep(0.3)
        assert len(server.link.all(commands.Channel.Open)) < 12
        server.forget_rules()


async def test_a_hiccup_of_the_credentials_provider_costs_no_long_pause() -> None:
    asked = 0

    async def provider() -> Credentials:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise RuntimeError("token server: 503")
        return Credentials("guest", "guest")

    retry = RetryPolicy(initial=0.01, maximum=60)
    async with robust(credentials=provider, retry=retry) as (connection, server):
        with mock.patch("leveret.recovery._log.log"):
            await again(connection, server)
        assert asked == 3


async def test_silent_consumers_hold_up_neither_other_channels_nor_readiness_for_long() -> None:
    async with robust() as (connection, server):
        bad, good = await channel_of(connection), await channel_of(connection)
        for n in range(3):
            await (await queue_on(bad, f"bad{n}")).consume(print)
        await (await queue_on(good, "good")).consume(print)
        server.at(CONSUME, silent, where=lambda method: method.queue.startswith("bad"), times=100, link=1)
        with mock.patch("leveret.restore._CONSUME", 0.1):
            server.drop()
            await until(lambda: connection.state.value == "recovering")
            await within(good.ready(), 0.5)
            await within(connection.ready(), 2)
        assert connection.health().status == "degraded"


async def test_all_channels_find_a_number_when_there_are_no_others() -> None:
    async with robust(server=Server(channel_max=2)) as (connection, server):
        channels = [await channel_of(connection), await channel_of(connection)]
        await queue_on(channels[0])
        await again(connection, server)
        assert [channel.is_live for channel in channels] == [True, True]


@pytest.mark.parametrize("wrong", ["bogus", None])
async def test_a_misspelt_choice_is_told(wrong: Any) -> None:
    async with robust() as (connection, _):
        queue = await queue_on(await channel_of(connection))
        with pytest.raises(ValueError, match="resubscribe"):
            await queue.consume(print, on_cancelled=wrong)
        with pytest.raises(ValueError, match="resubscribe"):
            queue.iterator(on_cancelled=wrong)


def nack(link: ServerLink, channel: int, _: base.Frame) -> None:
    link.send(channel, commands.Basic.Nack(link.confirming[channel]))


async def test_a_channel_on_which_all_is_refused_is_replaced() -> None:
    """RabbitMQ 3.10 may refuse all that comes on a channel after a leader has gone; it was to be reopened by hand."""
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        server.at(commands.Basic.Publish, nack, times=100)
        refused = await asyncio.gather(
            *[channel.default_exchange.publish(Message(b"x"), "q") for _ in range(100)], return_exceptions=True
        )
        assert {type(result) for result in refused} == {MessageNacked}
        assert await within(channel.default_exchange.publish(Message(b"y"), "q"), 2)
        assert len(server.link.all(commands.Channel.Open)) == 2
        assert connection.health().status == "ready"


async def test_a_channel_that_consumes_is_kept_although_all_is_refused() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        await (await queue_on(channel)).consume(print)
        server.at(commands.Basic.Publish, nack, times=None)
        results = await asyncio.gather(
            *[channel.default_exchange.publish(Message(b"x"), "q") for _ in range(300)], return_exceptions=True
        )
        assert {type(result) for result in results} == {MessageNacked}
        await fence(connection)
        assert len(server.link.all(commands.Channel.Open)) == 1
        assert "the broker refused the last 300 publishes" in connection.health().reasons[0]


async def test_a_consumer_is_back_whose_queue_is_to_be_declared_although_all_channels_are_the_user_s() -> None:
    """It waited for a channel to declare the queue on, for ever."""
    async with robust(server=Server(channel_max=2)) as (connection, server):
        channels = [await channel_of(connection) for _ in range(2)]
        await (await queue_on(channels[0])).consume(print)
        server.at(commands.Queue.Declare, refuse(405))
        server.link.cancel("q")
        await server.seen(commands.Queue.Declare, 3)  # one was refused: that channel is back, too
        await server.seen(commands.Basic.Consume, 2)
        await until(lambda: connection.health().status == "ready")


async def test_a_silent_consumer_keeps_no_other_from_coming_back() -> None:
    """While the broker owed one a consume-ok, up to 5 s, what it cancelled elsewhere waited."""
    async with robust() as (connection, server):
        bad, good = await channel_of(connection), await channel_of(connection)
        await (await queue_on(bad, "bad")).consume(print)
        await (await queue_on(good, "good")).consume(print)
        held = Held()
        server.at(commands.Basic.Consume, held, where=lambda method: method.queue == "bad")
        server.link.cancel("bad")
        await held.reached()
        server.link.cancel("good")
        await within(server.seen(commands.Basic.Consume, 4), 1)
        held.go()
        await until(lambda: connection.health().status == "ready")


async def test_two_ways_to_say_how_to_go_on_are_refused() -> None:
    """``reconnect_interval`` was ignored without a word where there was a ``retry``."""
    with pytest.raises(ValueError, match=r"reconnect_interval=1 and retry=RetryPolicy\(.*give one of them"):
        await connect_robust("amqp://localhost/?reconnect_interval=1", retry=RetryPolicy())


async def test_the_log_names_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    async with robust() as (connection, server):
        await (await queue_on(await channel_of(connection))).consume(print)
        server.at(commands.Queue.Declare, refuse(403), link=1)
        await again(connection, server)
        assert f"{connection}: cannot restore queue 'q'" in caplog.text


@pytest.mark.parametrize("wrong", [MessageRetry(), 5])
async def test_a_retry_of_the_other_kind_is_refused(wrong: Any) -> None:
    """Both are called ``retry=``; this one was accepted, and ended the connection with the first lost link."""
    with pytest.raises(TypeError, match="retry must be a RetryPolicy"):
        await connect_robust("amqp://localhost/", retry=wrong)
    async with robust() as (connection, _):
        queue = await queue_on(await channel_of(connection))
        with pytest.raises(TypeError, match="retry must be a MessageRetry"):
            await queue.consume(print, retry=RetryPolicy())  # type: ignore[arg-type]
