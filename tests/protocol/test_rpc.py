"""Races of remote procedure calls, against a server whose timing is in the test's hands."""

from __future__ import annotations

import asyncio
import gc
import logging
from typing import Any

import pytest
from pamqp import commands

from leveret import RobustChannel
from leveret.exceptions import (
    MessageNacked,
    NoServer,
    PublishNotSent,
    PublishOutcomeUnknown,
    RemoteError,
)
from leveret.outcome import Outcome
from leveret.patterns import RPC
from leveret.wire.codec import encode_ack
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
    refuse,
    robust,
    silent,
)

CONSUME, PUBLISH = commands.Basic.Consume, commands.Basic.Publish
REPLY_TO = "amq.rabbitmq.reply-to"


def call(rpc: RPC, name: str = "m", **kwargs: Any) -> asyncio.Future[Any]:
    return asyncio.ensure_future(rpc.call(name, {}, **kwargs))


def reply(
    rpc: RPC, link: ServerLink, correlation_id: str | None = None, body: bytes = b"1", type: str = "result", **more: Any
) -> None:
    """Send the reply to the only call that waits, or to another."""
    correlation_id = correlation_id or next(iter(rpc.futures))
    properties = commands.Basic.Properties(correlation_id=correlation_id, message_type=type, **more)
    consume = next(m for m in reversed(link.all(CONSUME)) if m.queue == rpc.result_queue.name)
    channel = link.channel_of(rpc.result_queue.name)
    link.session.deliver(channel, consume.consumer_tag, 1, body, properties=properties)


@pytest.fixture(params=[True, False], ids=["confirms", "no confirms"])
def confirms(request: pytest.FixtureRequest) -> Any:
    return request.param


async def test_the_reply_to_a_call_may_overtake_its_confirm() -> None:
    async with robust() as (connection, server):
        rpc = await RPC.create(await channel_of(connection))
        server.holds_confirms = True
        calling = call(rpc)
        await until(lambda: server.keys() == ["m"])
        reply(rpc, server.link)
        assert await within(calling) == 1
        server.link.send(1, commands.Basic.Ack(1))
        await fence(connection)
        assert not rpc.futures


async def test_a_reply_is_read_without_a_task() -> None:
    async with robust() as (connection, server):
        rpc = await RPC.create(await channel_of(connection))
        calling = call(rpc)
        await until(lambda: server.keys() == ["m"])
        names: set[str] = set()
        (future,) = rpc.futures.values()
        future.add_done_callback(lambda _: names.update(task.get_name() for task in asyncio.all_tasks()))
        reply(rpc, server.link)
        await within(calling)
        assert names
        assert not [name for name in names if name.startswith(("leveret consumer", "leveret RPC"))]


async def test_a_nacked_call_fails() -> None:
    async with robust() as (connection, server):
        rpc = await RPC.create(await channel_of(connection))
        server.at(PUBLISH, lambda link, channel, method: link.send(channel, commands.Basic.Nack(1)))
        with pytest.raises(MessageNacked):
            await within(call(rpc))
        assert not rpc.futures


@pytest.mark.parametrize("how", ["link", "channel"])
async def test_calls_that_the_channel_is_lost_with_fail_at_once(confirms: bool, how: str) -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection, publisher_confirms=confirms)
        rpc = await RPC.create(channel)
        calls = [call(rpc) for _ in range(3)]
        await until(lambda: len(server.published) == 3)
        if how == "link":
            server.drop()
        else:
            assert isinstance(channel, RobustChannel)
            await closed_by_broker(channel, server)
        for calling in calls:
            with pytest.raises(PublishOutcomeUnknown):
                await within(calling)
        assert not rpc.futures
        await within(channel.ready())
        late = call(rpc)
        await until(lambda: len(server.published) == 4)
        reply(rpc, server.link)
        assert await within(late) == 1


async def test_with_retry_they_are_made_again(confirms: bool) -> None:
    async with robust() as (connection, server):
        rpc = await RPC.create(await channel_of(connection, publisher_confirms=confirms))
        calls = [call(rpc, retry=True) for _ in range(3)]
        await until(lambda: len(server.published) == 3)
        link = await again(connection, server)
        await until(lambda: len(server.published) == 6)
        for correlation_id in list(rpc.futures):
            reply(rpc, link, correlation_id)
        assert await within(asyncio.gather(*calls)) == [1, 1, 1]


async def test_a_call_waits_for_the_link_and_is_not_lost_with_it(confirms: bool) -> None:
    async with robust() as (connection, server):
        rpc = await RPC.create(await channel_of(connection, publisher_confirms=confirms))
        await lost(connection, server)
        calling = call(rpc)
        await turns()
        assert not server.published
        await back(connection, server)
        await until(lambda: server.keys() == ["m"])
        # The consumer of replies is there before the call is: else RabbitMQ would close the channel (406).
        kinds = [type(m) for _, m in server.link.methods if isinstance(m, CONSUME | PUBLISH)]
        assert kinds == [CONSUME, PUBLISH]
        reply(rpc, server.link)
        assert await within(calling) == 1


@pytest.mark.parametrize("how", ["cancelled", "timed out", "closed"])
async def test_a_call_that_ends_before_it_is_sent_is_never_sent(confirms: bool, how: str) -> None:
    async with robust() as (connection, server):
        rpc = await RPC.create(await channel_of(connection, publisher_confirms=confirms))
        await lost(connection, server)
        calling = call(rpc, timeout=0.02 if how == "timed out" else 10)
        await turns()
        if how == "cancelled":
            calling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await calling
        elif how == "timed out":
            with pytest.raises(TimeoutError):
                await within(calling)
        else:
            await within(rpc.channel.close())
            with pytest.raises((PublishNotSent, PublishOutcomeUnknown)):
                await within(calling)
        await back(connection, server)
        await fence(connection)
        assert not server.published
        assert not rpc.futures


async def test_a_cancelled_call_leaves_nothing(confirms: bool) -> None:
    unretrieved = Outcome.unretrieved
    async with robust() as (connection, server):
        rpc = await RPC.create(await channel_of(connection, publisher_confirms=confirms))
        server.holds_confirms = True
        calling = call(rpc)
        await until(lambda: server.keys() == ["m"])
        (correlation_id,) = rpc.futures
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        assert not rpc.futures
        reply(rpc, server.link, correlation_id)
        await fence(connection)
        assert rpc.dropped_replies == 1
    gc.collect()
    assert Outcome.unretrieved == unretrieved


async def test_the_loss_of_the_link_and_the_cancellation_of_a_call_in_one_turn(confirms: bool) -> None:
    async with robust() as (connection, server):
        rpc = await RPC.create(await channel_of(connection, publisher_confirms=confirms))
        calling = call(rpc)
        await until(lambda: server.keys() == ["m"])
        rpc.channel.close_callbacks.add(lambda *_: calling.cancel())
        server.drop()
        with pytest.raises(asyncio.CancelledError):
            await within(calling)
        assert not rpc.futures


async def test_a_returned_call_fails_and_other_returns_are_not_its_business(caplog: pytest.LogCaptureFixture) -> None:
    async with robust() as (connection, server):
        rpc = await RPC.create(await channel_of(connection, publisher_confirms=False))
        calling = call(rpc)
        await until(lambda: server.keys() == ["m"])
        (correlation_id,) = rpc.futures
        for each in ("unknown", correlation_id, correlation_id):
            properties = commands.Basic.Properties(correlation_id=each)
            returned = commands.Basic.Return(312, "NO_ROUTE", "", "m")
            server.link.session.send_content(1, returned, b"", properties)
        with pytest.raises(NoServer, match="'m'"):
            await within(calling)
        await fence(connection)
        assert caplog.text.count("a message came back that no call waits for") == 2


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ({"type": "error", "body": b'{"error":{"type":"T","message":"m","data":5}}'}, RemoteError),
        ({"type": "error", "body": b"5"}, RuntimeError),
        ({"type": "call"}, TimeoutError),
        ({"type": "what"}, RuntimeError),
        ({"body": b"{"}, Exception),
        ({"content_type": "application/python-pickle"}, Exception),
    ],
    ids=repr,
)
@pytest.mark.expects_errors
async def test_what_a_server_may_answer(answer: dict[str, Any], error: type[Exception]) -> None:
    async with robust() as (connection, server):
        rpc = await RPC.create(await channel_of(connection))
        calling = call(rpc)
        await until(lambda: server.keys() == ["m"])
        reply(rpc, server.link, **answer)
        with pytest.raises(error):
            await within(calling)


async def test_replies_that_nobody_waits_for_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    async with robust() as (connection, server):
        rpc = await RPC.create(await channel_of(connection))
        reply(rpc, server.link, "unknown")
        await fence(connection)
        assert rpc.dropped_replies == 1
        assert "Unknown message" in caplog.text


async def test_a_refused_beginning_leaves_direct_reply_to_to_others() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        server.at(CONSUME, silent)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await RPC.create(channel)
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        rpc = await RPC.create(channel, direct_reply_to=True)
        await rpc.close()
        await RPC.create(channel, direct_reply_to=True)


# ---------------------------------------------------------------------------------------------------- serving


def deliver(server: Server, reply_to: str = "their.queue", tag: int = 1, correlation_id: str = "id") -> None:
    """Call the method "m"."""
    link = server.link
    consume = next(m for m in reversed(link.all(CONSUME)) if m.queue == "m")
    properties = commands.Basic.Properties(correlation_id=correlation_id, message_type="call", reply_to=reply_to)
    link.session.deliver(link.channel_of("m"), consume.consumer_tag, tag, b"{}", properties=properties)


async def test_a_reply_goes_out_with_its_ack_behind_it_and_waits_for_no_confirm(confirms: bool) -> None:
    async with robust() as (connection, server):
        server.holds_confirms = True
        rpc = await RPC.create(await channel_of(connection, publisher_confirms=confirms))
        await rpc.register("m", lambda: 5)
        deliver(server)
        await server.seen(commands.Basic.Ack)
        kinds = [type(m) for _, m in server.link.methods][-2:]
        assert kinds == [PUBLISH, commands.Basic.Ack]
        assert [(sent.routing_key, sent.body) for sent in server.published] == [("their.queue", b"5")]


async def test_the_reply_to_a_call_leaves_in_one_piece_with_its_ack_in_the_turn_of_the_function(
    confirms: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with robust() as (connection, server):
        rpc = await RPC.create(await channel_of(connection, publisher_confirms=confirms))
        output = rpc.channel.wire.publisher.output
        sent: list[tuple[str, bytes]] = []

        def answer() -> int:
            socket = output._socket
            monkeypatch.setattr(output, "_socket", Recorder(socket.write, sent))
            asyncio.get_running_loop().call_soon(sent.append, ("next turn", b""))
            return 5

        await rpc.register("m", answer)
        deliver(server)
        await until(lambda: len(sent) > 1)
        (what, data), *later = sent
        assert (what, later) == ("sent", [("next turn", b"")])
        assert encode_ack(rpc.channel.number, 1, True) == data[-len(encode_ack(1, 1, True)) :]
        monkeypatch.undo()


class Recorder:
    """A socket that notes what is sent."""

    def __init__(self, write: Any, sent: list[tuple[str, bytes]]) -> None:
        self._write, self._sent = write, sent

    def write(self, data: bytes) -> None:
        self._sent.append(("sent", data))
        self._write(data)


async def test_a_call_whose_ack_cannot_be_sent_is_not_answered(confirms: bool) -> None:
    """It comes again."""
    began, go = asyncio.Event(), asyncio.Event()

    async def slow() -> None:
        began.set()
        await go.wait()

    async with robust() as (connection, server):
        rpc = await RPC.create(await channel_of(connection, publisher_confirms=confirms))
        await rpc.register("m", slow)
        deliver(server)
        await within(began.wait())
        await again(connection, server)
        go.set()
        await until(lambda: rpc.consumer_tags[slow].in_flight == 0)
        await fence(connection)
        assert not server.published
        deliver(server)
        await until(lambda: server.keys() == ["their.queue"])


async def test_while_publishers_are_blocked_a_call_is_not_acknowledged_before_its_reply_is_written(
    confirms: bool,
) -> None:
    async with robust() as (connection, server):
        rpc = await RPC.create(await channel_of(connection, publisher_confirms=confirms))
        await rpc.register("m", lambda: 5)
        server.link.send(0, commands.Connection.Blocked("memory"))
        await until(lambda: connection.blocked)
        deliver(server)
        await fence(connection)
        assert not server.link.all(commands.Basic.Ack)
        server.link.send(0, commands.Connection.Unblocked())
        await server.seen(commands.Basic.Ack)
        assert [type(m) for _, m in server.link.methods][-2:] == [PUBLISH, commands.Basic.Ack]


async def test_a_lost_reply_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with robust() as (connection, server):
        rpc = await RPC.create(await channel_of(connection))
        await rpc.register("m", lambda: 5)
        server.at(PUBLISH, lambda link, channel, method: link.send(channel, commands.Basic.Nack(1)))
        with caplog.at_level(logging.WARNING):
            deliver(server)
            await server.seen(commands.Basic.Ack)
            await fence(connection)
        assert "a reply may be lost" in caplog.text


async def test_a_method_that_is_refused_is_not_registered() -> None:
    async with robust() as (connection, server):
        rpc = await RPC.create(await channel_of(connection))
        server.at(CONSUME, silent, where=lambda m: m.queue == "m")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await rpc.register("m", print)
        assert not rpc.routes
        assert not rpc.queues


# ------------------------------------------------------------------------- replies that close the channel


def redeliver(server: Server, tag: int = 1, correlation_id: str = "id") -> None:
    """Deliver the call again, as the broker does after it has closed the channel."""
    link = server.link
    consume = next(m for m in reversed(link.all(CONSUME)) if m.queue == "m")
    properties = commands.Basic.Properties(correlation_id=correlation_id, message_type="call", reply_to="their.queue")
    link.session.deliver(
        link.channel_of("m"), consume.consumer_tag, tag, b"{}", properties=properties, redelivered=True
    )


TOO_LARGE = refuse(406, "PRECONDITION_FAILED - message size 5 is larger than configured max size 4")


@pytest.mark.expects_errors
async def test_a_reply_that_closed_the_channel_closes_it_once_and_is_answered_by_an_error(confirms: bool) -> None:
    runs = 0

    async def function() -> str:
        nonlocal runs
        runs += 1
        return "large"

    async with robust() as (connection, server):
        channel = await channel_of(connection, publisher_confirms=confirms)
        rpc = await RPC.create(channel)
        await rpc.register("m", function)
        server.at(PUBLISH, TOO_LARGE, times=2)
        deliver(server)
        await until(lambda: len(server.link.all(CONSUME)) == 4)  # it is back: the replies, and the function
        await within(channel.ready())  # type: ignore[attr-defined]
        redeliver(server)
        await server.seen(commands.Basic.Ack)
        assert runs == 2
        refused_twice, answer = server.published[:2], server.published[2]
        assert [sent.body for sent in refused_twice] == [b'"large"', b'"large"']
        assert refused_twice[1].channel != server.link.channel_of("m")
        assert b"ReplyRefused" in answer.body
        assert b"larger than" in answer.body
        assert len(server.link.all(CONSUME)) == 4


async def test_what_came_again_with_it_is_run_again_and_gets_its_result(confirms: bool) -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection, publisher_confirms=confirms)
        rpc = await RPC.create(channel)
        await rpc.register("m", lambda: 5)
        server.at(PUBLISH, TOO_LARGE)
        deliver(server)
        await until(lambda: len(server.link.all(CONSUME)) == 4)
        await within(channel.ready())  # type: ignore[attr-defined]
        redeliver(server)
        await server.seen(commands.Basic.Ack)
        assert [sent.body for sent in server.published] == [b"5", b"5"]


@pytest.mark.expects_errors
async def test_where_not_even_an_error_can_be_sent_the_call_is_rejected(confirms: bool) -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection, publisher_confirms=confirms)
        rpc = await RPC.create(channel)
        await rpc.register("m", lambda: 5)
        server.at(PUBLISH, refuse(403), times=3)
        deliver(server)
        await until(lambda: len(server.link.all(CONSUME)) == 4)
        await within(channel.ready())  # type: ignore[attr-defined]
        redeliver(server)
        (reject,) = await server.seen(commands.Basic.Reject)
        assert not reject.requeue
        assert not server.link.all(commands.Basic.Ack)


# ------------------------------------------------------------------------------------ beginning, and ending


@pytest.mark.parametrize("how", ["cancelled", "timed out"])
async def test_a_beginning_that_was_given_up_leaves_the_channel_usable(how: str) -> None:
    """RabbitMQ closes a channel that consumes twice from direct reply-to, also before the first is cancelled."""
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        held = Held()
        server.at(CONSUME, held)
        creating = asyncio.ensure_future(RPC.create(channel))
        await held.reached()
        if how == "cancelled":
            creating.cancel()
            with pytest.raises(asyncio.CancelledError):
                await creating
        else:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await creating
        second = await within(RPC.create(channel))
        assert second.result_queue.name != REPLY_TO
        held.go()
        await server.seen(commands.Basic.Cancel)
        await fence(connection)
        third = await within(RPC.create(channel, direct_reply_to=True))
        assert third.result_queue.name == REPLY_TO


@pytest.mark.parametrize("first", ["close", "register"])
async def test_nothing_is_served_after_a_close_that_met_a_registration(first: str) -> None:
    async with robust() as (connection, server):
        rpc = await RPC.create(await channel_of(connection))
        calls = {"close": rpc.close, "register": lambda: rpc.register("m", print)}
        order = [first, *(calls.keys() - {first})]
        results = await within(asyncio.gather(*(calls[each]() for each in order), return_exceptions=True))
        assert isinstance(results[order.index("register")], RuntimeError)
        assert results[order.index("close")] is None
        cancelled = {m.consumer_tag for m in server.link.all(commands.Basic.Cancel)}
        assert {m.consumer_tag for m in server.link.all(CONSUME)} == cancelled
        assert not rpc.routes
        assert not rpc.consumer_tags
        with pytest.raises(RuntimeError, match="closed"):
            await rpc.register("m", print)


async def test_after_the_reply_queue_was_deleted_calls_say_so_until_there_is_another() -> None:
    async with robust() as (connection, server):
        rpc = await RPC.create(await channel_of(connection), direct_reply_to=False)
        # The channel forgets a queue that is deleted through it.
        await rpc.result_queue.delete(if_unused=False, if_empty=False)
        server.link.cancel(rpc.result_queue.name)
        await fence(connection)
        with pytest.raises(RuntimeError, match="queue for replies was deleted"):
            await rpc.call("m")
        await rpc.initialize()
        calling = call(rpc)
        await until(lambda: server.keys() == ["m"])
        reply(rpc, server.link)
        assert await within(calling) == 1


async def test_the_log_has_one_line_for_each_message(caplog: pytest.LogCaptureFixture) -> None:
    async with robust() as (connection, server):
        rpc = await RPC.create(await channel_of(connection))
        for correlation_id in ("unknown", "un\nknown"):
            reply(rpc, server.link, correlation_id, headers={str(n): "x" * 50 for n in range(20)})
        await fence(connection)
        messages = [each.getMessage() for each in caplog.records if each.name == "leveret.patterns.rpc"]
        assert len(messages) == 2
        assert all(len(each.splitlines()) == 1 for each in messages)


@pytest.mark.parametrize("timeout", ["5", True, float("nan"), object()])
async def test_a_timeout_that_is_none_is_refused(timeout: Any) -> None:
    async with robust() as (connection, server):
        rpc = await RPC.create(await channel_of(connection))
        with pytest.raises((TypeError, ValueError), match="timeout must be a number of seconds"):
            await rpc.call("m", timeout=timeout)
        assert not server.published
        assert not rpc.futures


async def test_no_timer_of_a_call_outlives_the_connection() -> None:
    async with robust() as (connection, server):
        rpc = await RPC.create(await channel_of(connection))
        calling = call(rpc, timeout=3600)
        await until(lambda: server.keys() == ["m"])
        reply(rpc, server.link)
        assert await within(calling) == 1
        await connection.close()
        loop: Any = asyncio.get_running_loop()
        far = [timer for timer in loop._scheduled if not timer.cancelled() and timer.when() > loop.time() + 600]
        assert not far
