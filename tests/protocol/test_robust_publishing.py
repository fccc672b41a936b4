"""Publishes that meet a link which is down, goes down, or comes back: each has one outcome, and the right one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pamqp import commands

from leveret import IncomingMessage, Message, RobustChannel, RobustConnection
from leveret.exceptions import (
    ChannelInvalidStateError,
    ChannelNotFoundEntity,
    ConnectionBlocked,
    MessageNacked,
    MessageReturned,
    PublishNotSent,
    PublishNotSentInTime,
    PublishOutcomeUnknown,
)
from leveret.message import ReturnedMessage
from tests.protocol.kit import turns, until, within
from tests.protocol.robust_kit import (
    Held,
    ServerLink,
    again,
    back,
    channel_of,
    drop,
    fence,
    ids,
    kill,
    lost,
    refuse,
    robust,
)

PUBLISH = commands.Basic.Publish


def publish(channel: RobustChannel, key: str, body: bytes = b"", **kwargs: Any) -> asyncio.Future[Any]:
    return asyncio.ensure_future(channel.default_exchange.publish(Message(body), key, **kwargs))


class Small(RobustConnection):
    """Lets three publishes and a hundred bytes wait."""

    MAX_WAITING_PUBLISHES = 3
    MAX_WAITING_BYTES = 100


# ---------------------------------------------------------------------------------------------------- the link is down


async def test_a_publish_while_down_is_sent_and_confirmed_when_the_link_is_back() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        await lost(connection, server)
        task = publish(channel, "key", b"body")
        await turns()
        assert not task.done()
        await back(connection, server)
        assert isinstance(await within(task), commands.Basic.Ack)
        assert [(sent.routing_key, sent.body) for sent in server.published] == [("key", b"body")]


@pytest.mark.parametrize("timeout", [0, 0.02])
async def test_a_publish_while_down_ends_with_its_time_and_is_never_sent(timeout: float) -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        await lost(connection, server)
        with pytest.raises(PublishNotSentInTime, match="reconnecting") as caught:
            await within(publish(channel, "key", timeout=timeout))
        assert isinstance(caught.value, TimeoutError)
        await back(connection, server)
        await fence(connection)
        assert not server.published


async def test_the_default_time_is_the_operation_timeout() -> None:
    async with robust("operation_timeout=0.05") as (connection, server):
        channel = await channel_of(connection)
        await lost(connection, server)
        with pytest.raises(PublishNotSentInTime, match=r"0\.05 s"):
            await within(publish(channel, "key"))
        await back(connection, server)


async def test_who_does_not_wait_for_the_link_is_told_at_once() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        await within(publish(channel, "up", wait_for_link=False))
        await lost(connection, server)
        with pytest.raises(PublishNotSent):
            _ = channel.default_exchange.publish(Message(b""), "down", wait_for_link=False)
        await back(connection, server)
        await fence(connection)
        assert server.keys() == ["up"]


async def test_a_cancelled_publish_is_never_sent() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        await lost(connection, server)
        tasks = [publish(channel, f"{n}") for n in range(3)]
        await turns()
        tasks[1].cancel()
        await back(connection, server)
        await within(asyncio.gather(*tasks, return_exceptions=True))
        assert server.keys() == ["0", "2"]


async def test_what_cannot_be_sent_is_refused_by_the_call() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        await lost(connection, server)
        with pytest.raises(ValueError, match="255"):
            _ = channel.default_exchange.publish(Message(b""), "k" * 256)
        with pytest.raises(TypeError):
            _ = channel.default_exchange.publish(Message(b"", headers={"h": object()}), "k")  # type: ignore[dict-item]
        await back(connection, server)


async def test_publishes_keep_their_order_over_a_reconnect() -> None:
    """Also those made in the turn in which the channel is back, and by callbacks that are told of it."""
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        tasks: list[asyncio.Future[Any]] = []
        numbers = iter(range(10_000))

        def more(*_: object) -> None:
            tasks.append(asyncio.ensure_future(channel.default_exchange.publish(Message(b""), f"{next(numbers)}")))

        channel.reopen_callbacks.add(more)
        connection.reconnect_callbacks.add(more)
        connection.state_callbacks.add(more)
        await lost(connection, server)
        for _ in range(50):
            more()
        server.is_down = False
        while not connection.connected.is_set():  # one in every turn
            more()
            await asyncio.sleep(0)
        for _ in range(20):
            more()
            await asyncio.sleep(0)
        connection.state_callbacks.remove(more)
        await within(asyncio.gather(*tasks))
        assert server.keys() == [f"{n}" for n in range(len(tasks))]


async def test_the_waiting_share_their_limit_of_publishes() -> None:
    async with robust(connection_class=Small) as (connection, server):
        one, two = await channel_of(connection), await channel_of(connection)
        await lost(connection, server)
        tasks = [publish(one, "0"), publish(two, "1"), publish(one, "2", timeout=0.01)]
        await turns()
        with pytest.raises(PublishNotSent, match="3 publishes"):
            _ = two.default_exchange.publish(Message(b""), "too many")
        with pytest.raises(PublishNotSentInTime):
            await within(tasks[2])
        await turns()
        tasks.append(publish(two, "3"))  # the place of the one whose time was up
        await turns()
        tasks[0].cancel()
        await turns()
        tasks.append(publish(two, "4"))  # the place of the cancelled one
        await turns()
        with pytest.raises(PublishNotSent):
            _ = one.default_exchange.publish(Message(b""), "too many")
        await back(connection, server)
        await within(asyncio.gather(*tasks, return_exceptions=True))
        assert sorted(server.keys()) == ["1", "3", "4"]
        await lost(connection, server)  # all places are free again
        tasks = [publish(one, f"{n}") for n in range(3)]
        await turns()
        assert not any(task.done() for task in tasks)
        await back(connection, server)
        await within(asyncio.gather(*tasks))


async def test_the_waiting_share_their_limit_of_bytes() -> None:
    async with robust(connection_class=Small) as (connection, server):
        channel = await channel_of(connection)
        await lost(connection, server)
        first = publish(channel, "0", b"x" * 60)
        await turns()
        with pytest.raises(PublishNotSent, match="60 bytes"):
            _ = channel.default_exchange.publish(Message(b"x" * 41), "too much")
        second = publish(channel, "1", b"x" * 40)
        await back(connection, server)
        await within(asyncio.gather(first, second))
        await lost(connection, server)
        large = publish(channel, "2", b"x" * 1000)  # alone, it may
        await turns()
        assert not large.done()
        await back(connection, server)
        await within(large)


async def test_without_confirms_a_publish_waits_until_it_is_written() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection, publisher_confirms=False)
        await lost(connection, server)
        tasks = [publish(channel, f"{n}") for n in range(3)]
        await turns()
        assert not any(task.done() for task in tasks)
        await back(connection, server)
        assert await within(asyncio.gather(*tasks)) == [None] * 3
        await fence(connection)
        assert server.keys() == ["0", "1", "2"]


async def test_a_channel_that_the_user_closed_takes_no_publishes() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        await channel.close()
        with pytest.raises(ChannelInvalidStateError):
            _ = channel.default_exchange.publish(Message(b""), "key")
        with pytest.raises(ChannelInvalidStateError):
            _ = channel.default_exchange.publish(Message(b""), "key", wait_for_link=False)
        with pytest.raises(ChannelInvalidStateError):
            _ = connection.channel().default_exchange.publish(Message(b""), "key")
        assert not server.published


@pytest.mark.parametrize("what", ["channel", "connection"])
async def test_closing_while_down_ends_those_who_wait(what: str) -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        await lost(connection, server)
        tasks = [publish(channel, f"{n}") for n in range(3)]
        await turns()
        await within(channel.close() if what == "channel" else connection.close(), 0.5)
        errors = await within(asyncio.gather(*tasks, return_exceptions=True))
        assert all(isinstance(error, PublishNotSent) for error in errors)
        assert len({id(error) for error in errors}) == 3
        assert not server.published


# ----------------------------------------------------------------------------------- the link dies before the confirm


async def test_what_was_written_when_the_link_died_is_unknown() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        server.holds_confirms = True
        tasks = [publish(channel, f"{n}") for n in range(3)]
        await until(lambda: len(server.published) == 3)
        await again(connection, server)
        for error in await within(asyncio.gather(*tasks, return_exceptions=True)):
            assert isinstance(error, PublishOutcomeUnknown)
        server.holds_confirms = False
        await within(publish(channel, "after"))  # numbered from 1 again
        assert server.keys() == ["0", "1", "2", "after"]


async def test_retry_unknown_sends_again_what_the_lost_link_did_not_confirm() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        server.holds_confirms = True
        tasks = [publish(channel, f"{n}", retry_unknown=True) for n in range(3)]
        await until(lambda: len(server.published) == 3)
        server.holds_confirms = False
        server.is_down = True
        server.drop()
        await until(lambda: not connection.connected.is_set())
        tasks.append(publish(channel, "3"))
        await back(connection, server)
        for ok in await within(asyncio.gather(*tasks)):
            assert isinstance(ok, commands.Basic.Ack)
        assert server.keys() == ["0", "1", "2", "0", "1", "2", "3"]


async def test_retry_unknown_over_many_losses_ends_confirmed() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        server.at(PUBLISH, drop, times=5)
        assert isinstance(await within(publish(channel, "key", retry_unknown=True)), commands.Basic.Ack)
        assert server.keys() == ["key"] * 6


async def test_retry_unknown_sends_again_after_a_channel_closed_over_something_else() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        server.at(PUBLISH, lambda link, number, _: link.close_channel(number, 406, "REFUSED", (60, 80)))
        assert isinstance(await within(publish(channel, "key", retry_unknown=True)), commands.Basic.Ack)
        assert server.keys() == ["key"] * 2
        assert len(server.links) == 1


async def test_retry_unknown_does_not_send_again_over_what_a_channel_was_closed() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        server.at(PUBLISH, refuse(404, "NOT_FOUND - no exchange"))
        with pytest.raises(PublishOutcomeUnknown) as caught:
            await within(publish(channel, "key", retry_unknown=True))
        assert isinstance(caught.value.__cause__, ChannelNotFoundEntity)
        await within(publish(channel, "after"))
        assert server.keys() == ["key", "after"]


async def test_retry_unknown_does_not_send_again_over_what_the_connection_was_closed() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        server.at(PUBLISH, kill(540, "NOT_IMPLEMENTED"), times=5, where=lambda m: m.routing_key == "poison")
        with pytest.raises(PublishOutcomeUnknown):
            await within(publish(channel, "poison", retry_unknown=True))
        assert ids(PUBLISH()) == (60, 40)
        assert server.keys() == ["poison"]


@pytest.mark.parametrize("how", ["timeout", "close"])
async def test_what_was_written_once_is_never_called_not_sent(how: str) -> None:
    """PublishNotSent promises that not a byte was written, so that the caller may send it again."""
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        server.holds_confirms = True
        task = publish(channel, "key", retry_unknown=True, timeout=0.2 if how == "timeout" else None)
        await until(lambda: server.published)
        await lost(connection, server)
        assert not task.done()
        if how == "close":
            await within(connection.close())
        with pytest.raises(PublishOutcomeUnknown):
            await within(task)


async def test_what_was_taken_back_is_in_time_or_ends() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        server.holds_confirms = True
        task = publish(channel, "key", retry_unknown=True, timeout=0.05)
        await until(lambda: server.published)
        await lost(connection, server)
        with pytest.raises(TimeoutError):
            await within(task)
        await back(connection, server)
        await fence(connection)
        assert server.keys() == ["key"]


async def test_where_too_many_wait_already_the_unconfirmed_are_unknown() -> None:
    async with robust(connection_class=Small) as (connection, server):
        channel = await channel_of(connection)
        server.holds_confirms = True
        tasks = [publish(channel, f"{n}", retry_unknown=True) for n in range(5)]
        await until(lambda: len(server.published) == 5)
        server.holds_confirms = False
        await again(connection, server)
        results = await within(asyncio.gather(*tasks, return_exceptions=True))
        assert [type(result) for result in results] == [commands.Basic.Ack] * 3 + [PublishOutcomeUnknown] * 2


async def test_a_confirm_that_the_link_brought_before_it_died_counts() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)

        def ack_and_drop(link: ServerLink, number: int, _: object) -> None:
            link.send(number, commands.Basic.Ack(1))
            link.over = True
            link.session.eof()

        server.at(PUBLISH, ack_and_drop)
        assert isinstance(await within(publish(channel, "key", retry_unknown=True)), commands.Basic.Ack)
        await server.up(1)
        await within(connection.ready())
        await fence(connection)
        assert server.keys() == ["key"]


# ----------------------------------------------------------------------------------------- blocked, returned, nacked


async def test_publishes_held_back_while_blocked_go_to_the_next_link() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        server.link.send(0, commands.Connection.Blocked("low on memory"))
        await until(lambda: connection.blocked)
        tasks = [publish(channel, f"{n}") for n in range(20)]
        await turns()
        assert not server.published
        await lost(connection, server)
        tasks.append(publish(channel, "20"))
        await back(connection, server)
        await within(asyncio.gather(*tasks))
        assert server.keys() == [f"{n}" for n in range(21)]
        assert {sent.link for sent in server.published} == {server.link.number}


async def test_publishes_handed_over_to_a_link_that_is_blocked_wait_on() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        held = Held()
        server.at(commands.Channel.Open, held, link=1)
        server.drop()
        await held.reached()
        early = publish(channel, "early")
        doomed = publish(channel, "doomed", timeout=0.1)
        await turns()
        server.link.send(0, commands.Connection.Blocked("low on memory"))
        held.go()
        await within(connection.ready())
        late = publish(channel, "late")
        with pytest.raises(ConnectionBlocked, match="low on memory"):
            await within(doomed)
        assert not server.published
        server.link.send(0, commands.Connection.Unblocked())
        await within(asyncio.gather(early, late))
        assert server.keys() == ["early", "late"]


@pytest.mark.parametrize("holder", ["flow", "blocked"])
async def test_publishes_held_back_go_to_the_next_wire_of_their_channel_alone(holder: str) -> None:
    """A method on a channel that is closed makes RabbitMQ close the connection."""
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        number, held = channel.number or 0, Held()
        server.at(commands.Channel.Open, held)
        if holder == "flow":
            server.link.send(number, commands.Channel.Flow(False))
            await server.seen(commands.Channel.FlowOk)
        else:
            server.link.send(0, commands.Connection.Blocked("low on memory"))
            await until(lambda: connection.blocked)
        task = publish(channel, "key")
        await turns()
        server.link.close_channel(number, 406, "PRECONDITION_FAILED", (60, 80))
        if holder == "blocked":
            server.link.send(0, commands.Connection.Unblocked())
        await held.reached()
        await fence(connection)
        early = server.keys()
        held.go()
        await within(task)
        assert (early, server.keys()) == ([], ["key"])


@pytest.mark.parametrize("raises", [False, True])
async def test_a_publish_that_waited_may_come_back_or_be_refused(raises: bool) -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection, on_return_raises=raises)

        def send_back(link: ServerLink, number: int, method: commands.Basic.Publish) -> None:
            returned = commands.Basic.Return(312, "NO_ROUTE", "", method.routing_key)
            link.session.send_content(number, returned, b"body")
            link.send(number, commands.Basic.Ack(1))

        server.at(PUBLISH, send_back)
        server.at(PUBLISH, lambda link, number, _: link.send(number, commands.Basic.Nack(2)))
        await lost(connection, server)
        returned, refused = publish(channel, "nowhere", b"body"), publish(channel, "refused")
        await turns()
        await back(connection, server)
        if raises:
            with pytest.raises(MessageReturned):
                await within(returned)
        else:
            assert isinstance(await within(returned), ReturnedMessage)
        with pytest.raises(MessageNacked):
            await within(refused)


async def test_a_channel_closed_over_one_publish_leaves_the_others_unknown_and_later_ones_work() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        server.holds_confirms = True
        server.at(PUBLISH, refuse(404, "NOT_FOUND"), where=lambda m: m.routing_key == "2")
        tasks = [publish(channel, f"{n}") for n in range(4)]
        for error in await within(asyncio.gather(*tasks, return_exceptions=True)):
            assert isinstance(error, PublishOutcomeUnknown)
            assert isinstance(error.__cause__, ChannelNotFoundEntity)
        server.holds_confirms = False
        await within(publish(channel, "after"))


async def test_large_bodies_wait_and_arrive_whole() -> None:
    bodies = [bytes([n]) * 300_000 for n in range(5)]
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        await lost(connection, server)
        tasks = [publish(channel, f"{n}", body) for n, body in enumerate(bodies)]
        await turns()
        await back(connection, server)
        await within(asyncio.gather(*tasks))
        assert [sent.body for sent in server.published] == bodies


async def test_a_publish_made_by_a_handler_in_the_turn_of_the_loss_waits() -> None:
    """The link is lost in the turn in which a callback publishes."""
    results: list[object] = []
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        queue = await channel.declare_queue("q")

        async def answer(message: IncomingMessage) -> None:
            results.append(await channel.default_exchange.publish(Message(b""), "answer"))

        def publish_too(*_: object) -> None:
            channel.close_callbacks.remove(publish_too)
            results.append(publish(channel, "from callback"))

        channel.close_callbacks.add(publish_too)
        await queue.consume(answer)
        await again(connection, server)
        server.link.deliver("q", 1, b"")
        await until(lambda: len(results) == 2)
        assert sorted(server.keys()) == ["answer", "from callback"]


# ------------------------------------------------------------------------------------------------------ transactions


async def test_a_transaction_ends_with_its_link_and_the_channel_may_begin_another() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection, publisher_confirms=False)
        transaction = channel.transaction()
        await within(transaction.select())
        await publish(channel, "undone")
        await again(connection, server)
        with pytest.raises(ChannelInvalidStateError, match="undone"):
            await within(transaction.commit())
        async with channel.transaction():
            await publish(channel, "done")
        await fence(connection)
        assert [type(method) for _, method in server.link.methods if isinstance(method, TX)] == [*TX]


TX = (commands.Tx.Select, commands.Tx.Commit)


async def test_what_is_published_in_a_transaction_that_its_link_ended_does_not_go_out_alone() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection, publisher_confirms=False)
        transaction = channel.transaction()
        await within(transaction.select())
        await publish(channel, "one")
        await fence(connection)
        await lost(connection, server)
        with pytest.raises(ChannelInvalidStateError, match="roll it back"):
            publish(channel, "two")
        await back(connection, server)
        with pytest.raises(ChannelInvalidStateError, match="roll it back"):
            publish(channel, "three")
        with pytest.raises(ChannelInvalidStateError, match="undone"):
            await within(transaction.commit())
        await publish(channel, "four")
        await fence(connection)
        assert server.keys() == ["one", "four"]
