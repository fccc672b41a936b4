"""Calls: each gets its own reply, and one that was given up disturbs nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from pamqp import base, body, commands, frame, header

from leveret import Channel, IncomingMessage, Queue
from leveret.exceptions import (
    AMQPConnectionError,
    ChannelClosed,
    ChannelInvalidStateError,
    ChannelNotFoundEntity,
    DuplicateConsumerTag,
    QueueEmpty,
)
from tests.protocol.kit import Link, cancel_with_the_next_read, linked, turns, until, within

GET_OK = commands.Basic.GetOk(9, False, "", "q", 0)

Call = Callable[[Channel, Queue, float | None], Awaitable[Any]]
CALLS: dict[str, tuple[Call, type[base.Frame], base.Frame]] = {
    "declare": (lambda c, q, t: q.declare(timeout=t), commands.Queue.Declare, commands.Queue.DeclareOk("late", 1, 1)),
    "declare exchange": (
        lambda c, q, t: c.declare_exchange("x", timeout=t),
        commands.Exchange.Declare,
        commands.Exchange.DeclareOk(),
    ),
    "bind": (lambda c, q, t: q.bind("x", timeout=t), commands.Queue.Bind, commands.Queue.BindOk()),
    "qos": (lambda c, q, t: c.set_qos(1, timeout=t), commands.Basic.Qos, commands.Basic.QosOk()),
    "get": (lambda c, q, t: q.get(timeout=t), commands.Basic.Get, GET_OK),
    "get nothing": (lambda c, q, t: q.get(timeout=t), commands.Basic.Get, commands.Basic.GetEmpty()),
    "consume": (
        lambda c, q, t: q.consume(print, consumer_tag="late", timeout=t),
        commands.Basic.Consume,
        commands.Basic.ConsumeOk("late"),
    ),
    "cancel": (
        lambda c, q, t: q.cancel("tag", timeout=t),
        commands.Basic.Cancel,
        commands.Basic.CancelOk("tag"),
    ),
    "purge": (lambda c, q, t: q.purge(timeout=t), commands.Queue.Purge, commands.Queue.PurgeOk(3)),
    "delete": (lambda c, q, t: q.delete(timeout=t), commands.Queue.Delete, commands.Queue.DeleteOk(3)),
}


async def reply(link: Link, value: base.Frame) -> None:
    if isinstance(value, commands.Basic.GetOk):
        parts = (value, header.ContentHeader(0, 4, commands.Basic.Properties()), body.ContentBody(b"late"))
        link.session.send_raw(b"".join(frame.marshal(part, 1) for part in parts))  # in one piece
    else:
        link.session.send(1, value)


async def check_usable(link: Link, channel: Channel, expected: list[type[base.Frame]]) -> list[base.Frame]:
    """The next call gets its own reply; what the client sent before it, which has to be *expected*."""
    sent = await link.sent()
    assert [type(value) for value in sent] == expected
    ok = await link.answer(
        channel.declare_queue("next"), commands.Queue.Declare, commands.Queue.DeclareOk("next", 42, 0)
    )
    assert (ok.name, ok.declaration_result.message_count) == ("next", 42)
    return sent


UNDOES: dict[str, list[type[base.Frame]]] = {"get": [commands.Basic.Nack], "consume": [commands.Basic.Cancel]}


def check_undone(sent: list[base.Frame]) -> None:
    for value in sent:
        if isinstance(value, commands.Basic.Nack):
            assert (value.delivery_tag, value.multiple, value.requeue) == (9, False, True)
        if isinstance(value, commands.Basic.Cancel):
            assert value.consumer_tag == "late"


@pytest.mark.parametrize("how", ["cancelled", "timed out"])
@pytest.mark.parametrize("name", CALLS)
async def test_a_call_given_up_leaves_the_channel_usable_and_its_late_reply_is_swallowed(name: str, how: str) -> None:
    call, request, late = CALLS[name]
    async with linked() as link:
        channel = await link.channel()
        queue = await link.consume(channel, print)
        task = asyncio.ensure_future(call(channel, queue, 0.05 if how == "timed out" else None))
        await link.session.expect(request)
        if how == "cancelled":
            task.cancel()
        with pytest.raises(asyncio.CancelledError if how == "cancelled" else TimeoutError):
            await within(task)
        assert not channel.is_closed
        await reply(link, late)
        check_undone(await check_usable(link, channel, UNDOES.get(name, [])))


@pytest.mark.parametrize("name", CALLS)
async def test_the_next_call_waits_behind_one_that_was_given_up(name: str) -> None:
    call, request, late = CALLS[name]
    async with linked() as link:
        channel = await link.channel()
        queue = await link.consume(channel, print)
        task = asyncio.ensure_future(call(channel, queue, None))
        await link.session.expect(request)
        task.cancel()
        following = asyncio.create_task(channel.declare_queue("mine"))
        await link.session.expect(commands.Queue.Declare)
        await reply(link, late)
        link.session.send(1, commands.Queue.DeclareOk("mine", 7, 0))
        declared = await within(following)
        assert (declared.name, declared.declaration_result.message_count) == ("mine", 7)
        check_undone(await link.sent())


@pytest.mark.parametrize("name", ["get", "consume"])
async def test_a_call_cancelled_in_the_turn_of_its_reply_is_undone_too(name: str) -> None:
    call, request, answer = CALLS[name]
    async with linked() as link:
        channel = await link.channel()
        queue = await link.consume(channel, print)
        task: asyncio.Future[Any] = asyncio.ensure_future(call(channel, queue, None))
        await link.session.expect(request)
        cancel_with_the_next_read(link, task)
        await reply(link, answer)
        with pytest.raises(asyncio.CancelledError):
            await within(task)
        check_undone(await check_usable(link, channel, UNDOES[name]))


async def test_a_late_get_without_ack_is_not_nacked() -> None:
    async with linked() as link:
        channel = await link.channel()
        task = asyncio.ensure_future((await link.queue(channel)).get(no_ack=True))
        await link.session.expect(commands.Basic.Get)
        task.cancel()
        await turns()
        await reply(link, GET_OK)
        await check_usable(link, channel, [])


@pytest.mark.parametrize("no_ack", [False, True])
async def test_deliveries_of_a_consumer_that_was_given_up_are_requeued(no_ack: bool) -> None:
    got: list[IncomingMessage] = []
    async with linked() as link:
        channel = await link.channel()
        queue = await link.queue(channel)
        task = asyncio.create_task(queue.consume(got.append, no_ack=no_ack, consumer_tag="late"))
        await link.session.expect(commands.Basic.Consume)
        task.cancel()
        await turns()
        link.session.send(1, commands.Basic.ConsumeOk("late"))
        link.session.deliver(1, "late", 1, b"one")
        link.session.deliver(1, "late", 2, b"two")
        _, cancel = await link.session.expect(commands.Basic.Cancel)
        assert cancel.consumer_tag == "late"
        link.session.deliver(1, "late", 3, b"three")
        link.session.send(1, commands.Basic.CancelOk("late"))
        nacks = await link.sent()
        assert all(isinstance(value, commands.Basic.Nack) and value.requeue for value in nacks)
        assert [value.delivery_tag for value in nacks] == ([] if no_ack else [1, 2, 3])
        assert not got


async def test_a_tag_is_free_again_once_its_abandoned_consumer_is_gone() -> None:
    async with linked() as link:
        channel = await link.channel()
        queue = await link.queue(channel)
        task = asyncio.create_task(queue.consume(print, consumer_tag="late"))
        await link.session.expect(commands.Basic.Consume)
        task.cancel()
        await turns()
        with pytest.raises(DuplicateConsumerTag):
            await queue.consume(print, consumer_tag="late")
        link.session.send(1, commands.Basic.ConsumeOk("late"))
        await link.session.expect(commands.Basic.Cancel)
        link.session.send(1, commands.Basic.CancelOk("late"))
        await link.fence()
        await link.consume(channel, print, "late")


async def test_replies_go_to_their_calls_in_order() -> None:
    async with linked() as link:
        channel = await link.channel()
        tasks = [asyncio.create_task(channel.declare_queue(f"q{n}")) for n in range(20)]
        for n in range(20):
            assert (await link.session.expect(commands.Queue.Declare))[1].queue == f"q{n}"
        for n in range(20):
            link.session.send(1, commands.Queue.DeclareOk(f"q{n}", n, 0))
        queues = await within(asyncio.gather(*tasks))
        assert [(queue.name, queue.declaration_result.message_count) for queue in queues] == [
            (f"q{n}", n) for n in range(20)
        ]


async def test_two_concurrent_gets_with_one_message_each_get_their_own_answer() -> None:
    async with linked() as link:
        channel = await link.channel()
        queue = await link.queue(channel)
        first, second = (asyncio.create_task(queue.get()) for _ in range(2))
        await link.session.expect(commands.Basic.Get)
        await link.session.expect(commands.Basic.Get)
        link.session.send_content(1, GET_OK, b"first")
        link.session.send(1, commands.Basic.GetEmpty())
        message = await within(first)
        assert (message.body, message.delivery_tag, message.message_count, message.consumer_tag) == (
            b"first",
            9,
            0,
            None,
        )
        with pytest.raises(QueueEmpty):
            await within(second)


async def test_calls_on_two_channels_do_not_wait_for_each_other() -> None:
    async with linked() as link:
        one, two = await link.channel(), await link.channel()
        slow = asyncio.create_task(one.declare_queue("slow"))
        await link.session.expect(commands.Queue.Declare, channel=1)
        await link.answer(
            two.declare_queue("fast"), commands.Queue.Declare, commands.Queue.DeclareOk("fast", 0, 0), channel=2
        )
        assert not slow.done()
        link.session.send(1, commands.Queue.DeclareOk("slow", 0, 0))
        await within(slow)


async def test_a_delivery_between_call_and_reply_does_not_disturb_the_call() -> None:
    got: list[IncomingMessage] = []
    async with linked() as link:
        channel = await link.channel()
        await link.consume(channel, got.append)
        task = asyncio.create_task(channel.set_qos(1))
        await link.session.expect(commands.Basic.Qos)
        link.session.deliver(1, "tag", 1, b"x")
        link.session.send(1, commands.Basic.QosOk())
        await within(task)
        await until(lambda: got)


async def test_a_404_fails_all_pending_calls_of_its_channel_each_with_its_own_exception() -> None:
    async with linked() as link:
        channel, other = await link.channel(), await link.channel()
        tasks = [asyncio.create_task(channel.declare_queue(f"q{n}")) for n in range(3)]
        for _ in range(3):
            await link.session.expect(commands.Queue.Declare)
        link.session.send(1, commands.Channel.Close(404, "NOT_FOUND - no queue", 50, 10))
        await link.session.expect(commands.Channel.CloseOk, channel=1)
        errors = await within(asyncio.gather(*tasks, return_exceptions=True))
        assert all(isinstance(error, ChannelNotFoundEntity) for error in errors)
        assert len({id(error) for error in errors}) == 3
        with pytest.raises(ChannelInvalidStateError) as caught:
            await channel.declare_queue("more")
        assert isinstance(caught.value.__cause__, ChannelNotFoundEntity)
        assert not other.is_closed


@pytest.mark.parametrize("how", ["eof", "reset"])
async def test_a_lost_link_fails_every_pending_call(how: str) -> None:
    async with linked() as link:
        channel = await link.channel()
        tasks = [
            asyncio.create_task(channel.declare_queue("q")),
            asyncio.create_task(channel.set_qos(1)),
            asyncio.create_task(link.connection.update_secret("x")),
            asyncio.create_task(link.connection.channel().initialize()),
        ]
        for _ in range(5):
            await link.session.receive()
        getattr(link.session, how)()
        for error in await within(asyncio.gather(*tasks, return_exceptions=True)):
            assert isinstance(error, AMQPConnectionError)
        with pytest.raises(ChannelInvalidStateError):
            await channel.set_qos(2)


NOWAIT: dict[str, tuple[Call, type[base.Frame]]] = {
    "purge": (lambda c, q, t: q.purge(no_wait=True), commands.Queue.Purge),
    "queue delete": (lambda c, q, t: c.queue_delete("q", nowait=True), commands.Queue.Delete),
    "exchange delete": (lambda c, q, t: c.exchange_delete("x", nowait=True), commands.Exchange.Delete),
    "cancel": (lambda c, q, t: q.cancel("tag", nowait=True), commands.Basic.Cancel),
}


@pytest.mark.parametrize("name", NOWAIT)
async def test_nowait_sends_and_waits_for_nothing(name: str) -> None:
    call, request = NOWAIT[name]
    async with linked() as link:
        channel = await link.channel()
        queue = await link.consume(channel, print)
        assert await within(call(channel, queue, None)) is None
        _, sent = await link.session.expect(request)
        if isinstance(sent, commands.Basic.Cancel):  # an answer tells when the last delivery has come
            link.session.send(1, commands.Basic.CancelOk("tag"))
        else:
            assert sent.nowait  # type: ignore[attr-defined]
        await check_usable(link, channel, [])


async def test_deliveries_after_cancel_nowait_are_requeued() -> None:
    got: list[IncomingMessage] = []
    async with linked() as link:
        channel = await link.channel()
        queue = await link.consume(channel, got.append)
        await queue.cancel("tag", nowait=True)
        await link.session.expect(commands.Basic.Cancel)
        link.session.deliver(1, "tag", 1, b"x")
        link.session.send(1, commands.Basic.CancelOk("tag"))
        (nack,) = await link.sent()
        assert isinstance(nack, commands.Basic.Nack)
        assert nack.requeue
        assert not got


async def test_replies_of_consumers_may_be_overtaken_by_those_of_later_calls() -> None:
    """RabbitMQ leaves consume and cancel to the queue (observed on 3.10 to 4.3)."""
    async with linked() as link:
        channel = await link.channel()
        queue = await link.queue(channel)
        consumes = [asyncio.create_task(queue.consume(print, consumer_tag=tag)) for tag in ("one", "two")]
        declare = asyncio.create_task(channel.declare_queue("q"))
        for kind in (commands.Basic.Consume, commands.Basic.Consume, commands.Queue.Declare):
            await link.session.expect(kind)
        link.session.send(1, commands.Queue.DeclareOk("q", 5, 0))
        link.session.send(1, commands.Basic.ConsumeOk("two"), commands.Basic.ConsumeOk("one"))
        assert await within(asyncio.gather(*consumes)) == ["one", "two"]
        assert (await within(declare)).declaration_result.message_count == 5


async def test_the_default_timeout_is_the_operation_timeout_of_the_url() -> None:
    async with linked(query="operation_timeout=0.05") as link:
        channel = await link.channel()
        with pytest.raises(TimeoutError, match=r"Queue\.Declare got no answer within 0\.05 s"):
            await within(channel.declare_queue("q"))
        await link.session.expect(commands.Queue.Declare)


async def test_a_timed_out_call_while_blocked_says_so() -> None:
    async with linked() as link:
        channel = await link.channel()
        link.session.send(0, commands.Connection.Blocked("low on memory"))
        await until(lambda: link.connection.blocked)
        with pytest.raises(TimeoutError, match="low on memory"):
            await within(channel.declare_queue("q", timeout=0.05))
        await link.session.expect(commands.Queue.Declare)


async def test_opening_a_channel_in_vain_is_undone_and_its_number_rests_until_close_ok() -> None:
    async with linked(channel_max=1) as link:
        with pytest.raises(TimeoutError, match=r"Channel\.Open"):
            await within(link.connection.channel().initialize(timeout=0.05))
        await link.session.expect(commands.Channel.Open)
        await link.session.expect(commands.Confirm.Select)
        await link.session.expect(commands.Channel.Close, channel=1)
        link.session.send(1, commands.Channel.OpenOk(), commands.Confirm.SelectOk(), commands.Channel.CloseOk())
        await link.fence()
        assert (await link.channel()).number == 1


@pytest.mark.parametrize("answers", [0, 1])
async def test_cancelling_the_opening_of_a_channel_leaves_none(answers: int) -> None:
    async with linked(channel_max=1) as link:
        task = asyncio.create_task(link.connection.channel().initialize())
        await link.session.expect(commands.Channel.Open)
        await link.session.expect(commands.Confirm.Select)
        if answers:
            link.session.send(1, commands.Channel.OpenOk())
            await link.fence()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await within(task)
        await link.session.expect(commands.Channel.Close, channel=1)
        link.session.send(1, commands.Channel.CloseOk())
        await link.fence()
        assert (await link.channel()).number == 1


@pytest.mark.parametrize("level", ["channel", "connection"])
async def test_a_channel_closed_in_the_turn_of_its_opening_is_told(level: str) -> None:
    async with linked() as link:
        channel = link.connection.channel()
        task = asyncio.create_task(channel.initialize())
        await link.session.expect(commands.Channel.Open)
        await link.session.expect(commands.Confirm.Select)
        link.session.send(1, commands.Channel.OpenOk(), commands.Confirm.SelectOk())
        if level == "channel":
            link.session.send(1, commands.Channel.Close(406, "PRECONDITION_FAILED", 0, 0))
            await link.session.expect(commands.Channel.CloseOk)
        else:
            link.session.send(0, commands.Connection.Close(320, "CONNECTION_FORCED", 0, 0))
            await link.session.expect(commands.Connection.CloseOk)
        with pytest.raises(ChannelClosed if level == "channel" else AMQPConnectionError):
            await within(task)
        assert channel.is_closed
        if level == "connection":
            await within(link.connection.closed())


async def test_a_channel_refused_while_opening_tells_why() -> None:
    async with linked() as link:
        task = asyncio.create_task(link.connection.channel().initialize())
        await link.session.expect(commands.Channel.Open)
        await link.session.expect(commands.Confirm.Select)
        link.session.send(0, commands.Connection.Close(530, "NOT_ALLOWED - too many channels", 20, 10))
        await link.session.expect(commands.Connection.CloseOk)
        with pytest.raises(AMQPConnectionError, match="too many channels"):
            await within(task)


async def test_opening_one_channel_twice_at_a_time_makes_one() -> None:
    async with linked(lenient=True) as link:
        channel = link.connection.channel()
        tasks = [asyncio.create_task(channel.initialize()) for _ in range(2)]
        await turns()
        opened = 0
        for _, value in await link.fence():
            if isinstance(value, commands.Channel.Open):
                opened += 1
                link.session.send(opened, commands.Channel.OpenOk(), commands.Confirm.SelectOk())
        results = await within(asyncio.gather(*tasks, return_exceptions=True))
        assert opened == 1
        assert sorted(isinstance(result, RuntimeError) for result in results) == [False, True]
