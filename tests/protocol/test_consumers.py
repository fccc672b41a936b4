"""Consumers: callbacks run as they should, none falls silent, and what a dead link left behind reaches nobody."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import sys
import traceback
from typing import Any

import pytest
from pamqp import commands

from leveret import IncomingMessage, Message
from leveret.exceptions import (
    AMQPConnectionError,
    ConsumerCancelled,
    DeliveryLost,
    DuplicateConsumerTag,
    MessageProcessError,
)
from tests.protocol.kit import Link, cancel_with_the_next_read, linked, turns, until, within

Ack, Nack, Reject = commands.Basic.Ack, commands.Basic.Nack, commands.Basic.Reject


async def iterate(link: Link, **kwargs: Any) -> Any:
    """An iterator that consumes on channel 1 with the tag "tag"."""
    channel = await link.channel()
    iterator = (await link.queue(channel)).iterator(consumer_tag="tag", **kwargs)
    await link.answer(iterator.consume(), commands.Basic.Consume, commands.Basic.ConsumeOk("tag"))
    return iterator


# ------------------------------------------------------------------------------------------- broker's basic.cancel


async def test_an_iterator_drains_and_then_raises_when_the_broker_cancels() -> None:
    async with linked() as link:
        iterator = await iterate(link)
        for n in (1, 2):
            link.session.deliver(1, "tag", n, b"%d" % n)
        link.session.send(1, commands.Basic.Cancel("tag", True))
        await link.fence()
        assert [(await within(anext(iterator))).body for _ in range(2)] == [b"1", b"2"]
        for _ in range(2):
            with pytest.raises(ConsumerCancelled) as caught:
                await within(anext(iterator))
            assert caught.value.consumer_tag == "tag"
        await within(iterator.close())
        assert await link.fence() == []  # there is nothing to cancel


async def test_an_iterator_that_waits_is_told_of_the_cancel() -> None:
    async with linked() as link:
        iterator = await iterate(link)
        waiting = asyncio.ensure_future(anext(iterator))
        await turns()
        link.session.send(1, commands.Basic.Cancel("tag", True))
        with pytest.raises(ConsumerCancelled):
            await within(waiting)


async def test_messages_drained_after_a_cancel_are_settled_without_a_byte() -> None:
    """The broker has taken them back, or their queue is gone."""
    async with linked() as link:
        iterator = await iterate(link)
        link.session.deliver(1, "tag", 1)
        link.session.send(1, commands.Basic.Cancel("tag", True))
        message = await within(anext(iterator))
        await message.ack()
        assert message.processed
        assert await link.sent() == []


async def test_a_delivery_for_a_consumer_that_the_broker_cancelled_goes_back_and_ends_it_for_good() -> None:
    """A quorum queue of RabbitMQ 4.3 may go on with a consumer that it cancelled over its ack timeout."""
    async with linked() as link:
        iterator = await iterate(link)
        link.session.send(1, commands.Basic.Cancel("tag", True))
        link.session.deliver(1, "tag", 7)
        link.session.deliver(1, "tag", 8)
        sent = await link.sent()
        assert [type(value) for value in sent] == [commands.Basic.Cancel, commands.Basic.Nack, commands.Basic.Nack]
        with pytest.raises(ConsumerCancelled):
            await within(anext(iterator))


@pytest.mark.parametrize("nowait", [False, True])
@pytest.mark.parametrize("capable", [False, True])
async def test_cancel_ok_is_sent_only_to_a_server_that_wants_it(capable: bool, nowait: bool) -> None:
    from tests.support.peer import CAPABILITIES

    async with linked(capabilities={**CAPABILITIES, "accept_consumer_cancel_ok": capable}) as link:
        channel = await link.channel()
        await link.consume(channel, print)
        link.session.send(1, commands.Basic.Cancel("tag", nowait))
        sent = await link.sent()  # whatever nowait says, which RabbitMQ always sets
        assert [type(value) for value in sent] == ([commands.Basic.CancelOk] if capable else [])


async def test_a_cancelled_callback_consumer_is_logged_and_its_channel_and_tag_stay_usable(
    caplog: pytest.LogCaptureFixture,
) -> None:
    got: list[IncomingMessage] = []
    async with linked() as link:
        channel = await link.channel()
        await link.consume(channel, got.append)
        link.session.send(1, commands.Basic.Cancel("tag", True))
        await link.fence()
        assert "'tag'" in caplog.text
        await link.consume(channel, got.append)
        link.session.deliver(1, "tag", 1)
        await until(lambda: got)


async def test_the_brokers_cancel_of_one_consumer_leaves_the_others() -> None:
    got: list[IncomingMessage] = []
    async with linked() as link:
        channel = await link.channel()
        await link.consume(channel, print, "one")
        await link.consume(channel, got.append, "two")
        link.session.send(1, commands.Basic.Cancel("one", True))
        link.session.deliver(1, "two", 1)
        await until(lambda: got)


async def test_the_brokers_cancel_crossing_ours() -> None:
    async with linked() as link:
        channel = await link.channel()
        queue = await link.consume(channel, print)
        cancel = asyncio.create_task(queue.cancel("tag"))
        await link.session.expect(commands.Basic.Cancel)
        link.session.send(1, commands.Basic.Cancel("tag", True), commands.Basic.CancelOk("tag"))
        await within(cancel)
        assert await link.fence() == []


async def test_a_duplicate_tag_is_refused_locally() -> None:
    async with linked() as link:
        channel, other = await link.channel(), await link.channel()
        queue = await link.consume(channel, print)
        with pytest.raises(DuplicateConsumerTag, match="'tag'"):
            await queue.consume(print, consumer_tag="tag")
        assert await link.fence() == []
        await link.consume(other, print)  # tags are of a channel
        await link.answer(queue.cancel("tag"), commands.Basic.Cancel, commands.Basic.CancelOk("tag"))
        await link.consume(channel, print)


async def test_generated_tags_differ() -> None:
    async with linked() as link:
        channel = await link.channel()
        queue = await link.queue(channel)
        tags = set()
        for _ in range(3):
            task = asyncio.create_task(queue.consume(print))
            _, consume = await link.session.expect(commands.Basic.Consume)
            link.session.send(1, commands.Basic.ConsumeOk(consume.consumer_tag))
            assert await within(task) == consume.consumer_tag
            tags.add(consume.consumer_tag)
        assert len(tags) == 3


async def test_the_arguments_of_consume_go_out() -> None:
    async with linked() as link:
        channel = await link.channel()
        queue = await link.queue(channel)
        task = asyncio.create_task(
            queue.consume(print, no_ack=True, exclusive=True, arguments={"x-priority": 5}, consumer_tag="t")
        )
        _, consume = await link.session.expect(commands.Basic.Consume)
        assert (consume.queue, consume.no_ack, consume.exclusive, consume.arguments, consume.consumer_tag) == (
            "q",
            True,
            True,
            {"x-priority": 5},
            "t",
        )
        link.session.send(1, commands.Basic.ConsumeOk("t"))
        await within(task)


# ------------------------------------------------------------------------------------------------------ link lost


async def test_queued_deliveries_of_a_lost_link_never_reach_a_handler() -> None:
    got: list[int] = []

    async with linked(lenient=True) as link:
        channel = await link.channel()

        def handler(message: IncomingMessage) -> None:
            got.append(message.delivery_tag)
            if len(got) == 1:  # the others wait in the consumer's queue
                link.connection._transport.abort(RuntimeError("lost"))  # type: ignore[union-attr]

        await link.consume(channel, handler)
        for n in range(1, 6):
            link.session.deliver(1, "tag", n)
        await within(link.connection.closed())
        await turns()
        assert got == [1]


async def test_queued_deliveries_of_a_lost_link_are_not_iterated() -> None:
    async with linked() as link:
        iterator = await iterate(link)
        for n in range(1, 6):
            link.session.deliver(1, "tag", n)
        await link.fence()
        first = await within(anext(iterator))
        link.session.reset()
        await within(link.connection.closed())
        for _ in range(2):
            with pytest.raises(AMQPConnectionError):
                await within(anext(iterator))
        assert not first.is_live
        await within(iterator.close())


async def test_a_running_handler_goes_on_and_its_ack_raises_DeliveryLost() -> None:  # noqa: N802
    lost = asyncio.Event()
    results: list[Any] = []

    async def handler(message: IncomingMessage) -> None:
        await lost.wait()
        for settle in (message.ack, message.nack, message.reject):
            try:
                await settle()
            except DeliveryLost as error:
                results.append((type(error.__cause__), message.is_live, message.processed))

    async with linked() as link:
        channel = await link.channel()
        await link.consume(channel, handler)
        link.session.deliver(1, "tag", 1)
        await until(lambda: channel.handler_tasks)
        await turns()
        link.session.reset()
        await within(link.connection.closed())
        lost.set()
        await until(lambda: len(results) == 3)
        assert [(issubclass(kind, AMQPConnectionError), *rest) for kind, *rest in results] == [(True, False, False)] * 3


@pytest.mark.parametrize("fails", [False, True])
async def test_process_on_a_lost_link_only_logs(fails: bool, caplog: pytest.LogCaptureFixture) -> None:
    lost = asyncio.Event()
    ended: list[BaseException | None] = []

    async def handler(message: IncomingMessage) -> None:
        try:
            async with message.process():
                await lost.wait()
                if fails:
                    raise KeyError("mine")
        except BaseException as error:
            ended.append(error)
        else:
            ended.append(None)

    async with linked() as link:
        channel = await link.channel()
        await link.consume(channel, handler)
        link.session.deliver(1, "tag", 1)
        await until(lambda: channel.handler_tasks)
        await turns()
        link.session.reset()
        await within(link.connection.closed())
        lost.set()
        await until(lambda: ended)
        assert isinstance(ended[0], KeyError) if fails else ended == [None]
        assert "not sent since channel is closed" in caplog.text


async def test_a_callback_that_does_not_catch_DeliveryLost_is_a_warning_not_an_error(  # noqa: N802
    caplog: pytest.LogCaptureFixture,
) -> None:
    lost = asyncio.Event()

    async def handler(message: IncomingMessage) -> None:
        await lost.wait()
        await message.ack()

    async with linked() as link:
        channel = await link.channel()
        await link.consume(channel, handler)
        link.session.deliver(1, "tag", 1)
        await until(lambda: channel.handler_tasks)
        await turns()
        link.session.reset()
        await within(link.connection.closed())
        lost.set()
        await until(lambda: not channel.handler_tasks)
        await turns()
    assert [record.levelname for record in caplog.records if record.name == "leveret.consumer"] == ["WARNING"]


@pytest.mark.expects_errors
async def test_the_log_names_a_consumer_by_its_tag_and_its_queue(caplog: pytest.LogCaptureFixture) -> None:
    names: list[str] = []

    async def handler(message: IncomingMessage) -> None:
        task = asyncio.current_task()
        assert task is not None
        names.append(task.get_name())
        raise LookupError("why")

    async with linked() as link:
        channel = await link.channel()
        queue = await link.consume(channel, handler, tag="täg\n")
        link.session.deliver(1, "täg\n", 1)
        await until(lambda: names)
        queue.name = "other"  # as of one that the server names, and that was declared again
        link.session.deliver(1, "täg\n", 2)
        await until(lambda: len(names) == 2)
        assert channel.connection is link.connection
    lines = [record.getMessage() for record in caplog.records if record.name == "leveret.consumer"]
    assert [line.partition(" (")[0] for line in lines] == [
        r"the callback of consumer 'täg\n' of queue 'q' failed on delivery 1",
        r"the callback of consumer 'täg\n' of queue 'other' failed on delivery 2",
    ]
    assert names[0] == r"leveret consumer 'täg\n' of queue 'q'"


# ------------------------------------------------------------------------------------------- callbacks and their task


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("success", [Ack]),
        ("failure", [Reject]),
        ("requeue", [Reject]),
        ("cancelled", [Nack]),
        ("settled inside", [Nack]),
    ],
)
async def test_process_settles_by_how_the_block_ends(how: str, expected: list[type[Any]]) -> None:
    async with linked() as link:
        channel = await link.channel()
        got: list[IncomingMessage] = []
        await link.consume(channel, got.append)
        link.session.deliver(1, "tag", 1)
        await until(lambda: got)

        async def run() -> None:
            async with got[0].process(requeue=how == "requeue", ignore_processed=True):
                if how in {"failure", "requeue"}:
                    raise KeyError
                if how == "cancelled":
                    raise asyncio.CancelledError
                if how == "settled inside":
                    await got[0].nack(requeue=False)

        await asyncio.gather(run(), return_exceptions=True)
        (sent,) = await link.sent()
        assert [type(sent)] == expected
        if isinstance(sent, Reject | Nack):
            assert sent.requeue is (how in {"requeue", "cancelled"})


async def test_settling_twice_raises_and_sends_nothing() -> None:
    async with linked() as link:
        channel = await link.channel()
        got: list[IncomingMessage] = []
        await link.consume(channel, got.append)
        link.session.deliver(1, "tag", 1)
        await until(lambda: got)
        await got[0].ack()
        for settle in (got[0].ack, got[0].nack, got[0].reject):
            with pytest.raises(MessageProcessError):
                await settle()
        assert len(await link.sent()) == 1


async def test_without_basic_nack_an_iterator_gives_back_by_reject() -> None:
    async with linked(without="basic.nack") as link:
        iterator = await iterate(link)
        link.session.deliver(1, "tag", 1)
        await link.fence()
        await link.answer(iterator.close(), commands.Basic.Cancel, commands.Basic.CancelOk("tag"))
        (sent,) = await link.sent()
        assert isinstance(sent, Reject)
        assert sent.requeue


async def test_without_basic_nack_a_cancelled_process_requeues_by_reject() -> None:
    async with linked(without="basic.nack") as link:
        iterator = await iterate(link)
        link.session.deliver(1, "tag", 1)
        message = await within(anext(iterator))
        with pytest.raises(asyncio.CancelledError):
            async with message.process():
                raise asyncio.CancelledError
        (sent,) = await link.sent()
        assert isinstance(sent, Reject)
        assert sent.requeue


async def test_without_basic_nack_a_late_get_is_given_back_by_reject() -> None:
    async with linked(without="basic.nack") as link:
        channel = await link.channel()
        task = asyncio.ensure_future((await link.queue(channel)).get())
        await link.session.expect(commands.Basic.Get)
        task.cancel()
        await turns()
        link.session.send_content(1, commands.Basic.GetOk(1, False, "", "q", 0), b"late")
        (sent,) = await link.sent()
        assert isinstance(sent, Reject)
        assert sent.requeue


async def run_callback(callback: Any, deliveries: int = 1, *, done: Any) -> None:
    async with linked(lenient=True) as link:
        channel = await link.channel()
        await link.consume(channel, callback)
        for n in range(1, deliveries + 1):
            link.session.deliver(1, "tag", n, b"%d" % n)
        await until(done)


async def test_callbacks_start_in_order_and_run_at_the_same_time() -> None:
    events: list[str] = []
    gate = asyncio.Event()

    async def callback(message: IncomingMessage) -> None:
        events.append(f"start {message.delivery_tag}")
        if message.delivery_tag == 4:
            gate.set()
        await gate.wait()
        events.append(f"end {message.delivery_tag}")

    await run_callback(callback, 4, done=lambda: len(events) == 8)
    assert events[:4] == [f"start {n}" for n in (1, 2, 3, 4)]


async def test_callbacks_that_do_not_wait_share_one_task() -> None:
    tasks: list[Any] = []

    async def callback(_: IncomingMessage) -> None:
        tasks.append(asyncio.current_task())

    await run_callback(callback, 50, done=lambda: len(tasks) == 50)
    assert len(set(tasks)) < 10


async def test_a_callback_that_waits_has_a_task_of_its_own() -> None:
    before: list[Any] = []
    after: list[Any] = []

    async def callback(_: IncomingMessage) -> None:
        before.append(asyncio.current_task())
        await asyncio.sleep(0)
        after.append(asyncio.current_task())

    await run_callback(callback, 5, done=lambda: len(after) == 5)
    assert before == after
    assert len(set(after)) == 5


async def test_timeout_and_cancel_inside_a_callback_mean_that_callback() -> None:
    results: list[str] = []
    others_ended = asyncio.Event()

    async def callback(message: IncomingMessage) -> None:
        if message.body == b"1":
            try:
                async with asyncio.timeout(0.02):
                    await asyncio.Event().wait()
            except TimeoutError:
                results.append("timeout")
                if len(results) == 2:
                    others_ended.set()
        elif message.body == b"2":
            task = asyncio.current_task()
            assert task is not None
            asyncio.get_running_loop().call_soon(task.cancel)
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                results.append("cancelled")
                if len(results) == 2:
                    others_ended.set()
                raise
        else:
            await others_ended.wait()
            async with asyncio.TaskGroup() as group:
                group.create_task(asyncio.sleep(0))
            results.append("whole")

    await run_callback(callback, 3, done=lambda: len(results) == 3)
    assert sorted(results) == ["cancelled", "timeout", "whole"]


@pytest.mark.expects_errors
@pytest.mark.parametrize("waits", [False, True])
async def test_a_callback_that_ends_in_CancelledError_does_not_silence_the_consumer(waits: bool) -> None:  # noqa: N802
    got: list[bytes] = []

    async def callback(message: IncomingMessage) -> None:
        if waits:
            await asyncio.sleep(0)
        got.append(message.body)
        if message.body == b"1":
            gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            gone.cancel()
            await gone  # raises CancelledError without having waited

    async with linked() as link:
        channel = await link.channel()
        await link.consume(channel, callback)
        link.session.deliver(1, "tag", 1, b"1")
        await until(lambda: got)
        await turns()
        for n in (2, 3):
            link.session.deliver(1, "tag", n, b"%d" % n)
        await until(lambda: len(got) == 3)


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.expects_errors
async def test_a_CancelledError_that_nobody_asked_for_is_reported_like_any_failure(  # noqa: N802
    waits: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """What it waited for was cancelled, not the callback: its message is left behind, and somebody should know."""

    async def callback(_: IncomingMessage) -> None:
        if waits:
            await asyncio.sleep(0)
        gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        gone.cancel()
        await gone

    async with linked() as link:
        channel = await link.channel()
        await link.consume(channel, callback)
        link.session.deliver(1, "tag", 7)
        await link.fence()
        await turns()
    assert len([record for record in caplog.records if "delivery 7" in record.getMessage()]) == 1


@pytest.mark.expects_errors
async def test_a_plain_function_that_fails_and_one_that_raises_BaseException_are_survived() -> None:  # noqa: N802
    got: list[bytes] = []

    def callback(message: IncomingMessage) -> None:
        got.append(message.body)
        if message.body == b"1":
            raise asyncio.CancelledError
        if message.body == b"2":
            raise ValueError

    async with linked() as link:
        channel = await link.channel()
        await link.consume(channel, callback)
        for n in (1, 2, 3):
            link.session.deliver(1, "tag", n, b"%d" % n)
            await link.fence()
        await until(lambda: len(got) == 3)


async def test_context_variables_of_consume_reach_callbacks_and_do_not_leak_between_them() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    seen: list[str] = []

    async def callback(message: IncomingMessage) -> None:
        seen.append(variable.get())
        variable.set(f"set by {message.delivery_tag}")
        if message.delivery_tag % 2:
            await asyncio.sleep(0)
            seen.append(variable.get())

    variable.set("outer")
    await run_callback(callback, 4, done=lambda: len(seen) == 6)
    assert sorted(seen) == ["outer"] * 4 + ["set by 1", "set by 3"]
    assert variable.get() == "outer"


@pytest.mark.parametrize("kind", ["coroutine", "waits", "plain", "awaitable"])
@pytest.mark.expects_errors
async def test_a_failing_callback_is_logged_once_with_the_users_frame(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    def users_function() -> None:
        raise KeyError("the cause")

    async def coroutine(_: IncomingMessage) -> None:
        if kind == "waits":
            await asyncio.sleep(0)
        users_function()

    def plain(_: IncomingMessage) -> None:
        users_function()

    def awaitable(message: IncomingMessage) -> asyncio.Future[None]:
        return asyncio.ensure_future(coroutine(message))

    callback = {"plain": plain, "awaitable": awaitable}.get(kind, coroutine)

    def errors() -> list[logging.LogRecord]:
        return [record for record in caplog.records if record.levelno == logging.ERROR]

    async with linked() as link:
        channel = await link.channel()
        await link.consume(channel, callback)
        link.session.deliver(1, "tag", 7, routing_key="key", properties=commands.Basic.Properties(message_id="mid"))
        await until(errors)
        await turns()
        assert await link.fence() == []  # left unacknowledged
    (record,) = errors()
    assert all(word in record.getMessage() for word in ("'mid'", "'key'", "7", "KeyError"))
    assert record.exc_info
    assert "users_function" in "".join(traceback.format_exception(record.exc_info[1]))


@pytest.mark.expects_errors
async def test_a_failing_callback_does_not_stop_the_next() -> None:
    got: list[bytes] = []

    async def callback(message: IncomingMessage) -> None:
        got.append(message.body)
        raise ValueError

    await run_callback(callback, 3, done=lambda: len(got) == 3)


async def test_a_callback_may_return_any_awaitable() -> None:
    async with linked() as link:
        channel = await link.channel()
        await link.consume(channel, lambda message: message.ack())
        for n in (1, 2):
            link.session.deliver(1, "tag", n)
            _, ack = await link.session.expect(Ack)
            assert ack.delivery_tag == n


async def test_a_callback_may_publish_and_call_on_its_own_channel() -> None:
    results: list[Any] = []

    async with linked() as link:
        channel = await link.channel()

        async def callback(message: IncomingMessage) -> None:
            async with message.process():
                await channel.default_exchange.publish(Message(message.body), "key")
                results.append(await channel.declare_queue("new"))

        await link.consume(channel, callback)
        link.session.deliver(1, "tag", 1, b"x")
        assert (await link.session.expect_publish())[3] == b"x"
        link.session.send(1, Ack(1))
        await link.session.expect(commands.Queue.Declare)
        link.session.send(1, commands.Queue.DeclareOk("new", 0, 0))
        await link.session.expect(Ack)
        assert len(results) == 1


# ------------------------------------------------------------------------------------------------------ iterators


async def test_a_timed_out_or_cancelled_anext_takes_nothing_and_the_iterator_stays_usable() -> None:
    async with linked() as link:
        iterator = await iterate(link)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(iterator), 0.02)
        waiting = asyncio.ensure_future(anext(iterator))
        await turns()
        cancel_with_the_next_read(link, waiting)
        link.session.deliver(1, "tag", 1, b"x")
        with pytest.raises(asyncio.CancelledError):
            await within(waiting)
        assert (await within(anext(iterator))).body == b"x"
        assert await link.fence() == []


async def test_an_iterators_timeout_leaves_it_usable() -> None:
    async with linked() as link:
        iterator = await iterate(link, timeout=0.05)
        with pytest.raises(TimeoutError):
            await within(anext(iterator))
        link.session.deliver(1, "tag", 1, b"x")
        assert (await within(anext(iterator))).body == b"x"


async def test_leaving_an_iterator_gives_back_in_order_what_was_not_handed_out() -> None:
    async with linked() as link:
        iterator = await iterate(link)
        for n in range(1, 5):
            link.session.deliver(1, "tag", n)
        await link.fence()
        await within(anext(iterator))
        closing = asyncio.create_task(iterator.close())
        await link.session.expect(commands.Basic.Cancel)
        link.session.deliver(1, "tag", 5)
        link.session.send(1, commands.Basic.CancelOk("tag"))
        await within(closing)
        sent = await link.sent()
        assert all(isinstance(value, Nack) and value.requeue for value in sent)
        assert [value.delivery_tag for value in sent] == [2, 3, 4, 5]
        await within(iterator.close())
        with pytest.raises(StopAsyncIteration):
            await within(anext(iterator))


async def test_a_cancelled_iterator_close_still_gives_back_what_comes_later() -> None:
    async with linked() as link:
        iterator = await iterate(link)
        link.session.deliver(1, "tag", 1)
        await link.fence()
        closing = asyncio.create_task(iterator.close())
        await link.session.expect(commands.Basic.Cancel)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await within(closing)
        link.session.deliver(1, "tag", 2)
        link.session.send(1, commands.Basic.CancelOk("tag"))
        sent = await link.sent()
        assert [(type(value), value.delivery_tag) for value in sent] == [(Nack, 1), (Nack, 2)]


async def test_breaking_out_of_async_for_within_async_with_requeues() -> None:
    async with linked() as link:
        channel = await link.channel()
        queue = await link.queue(channel)

        async def first() -> bytes:
            async with queue.iterator(consumer_tag="tag") as messages:
                async for message in messages:
                    async with message.process():
                        return message.body
            raise AssertionError

        task = asyncio.create_task(first())
        await link.session.expect(commands.Basic.Consume)
        link.session.send(1, commands.Basic.ConsumeOk("tag"))
        for n in (1, 2):
            link.session.deliver(1, "tag", n, b"%d" % n)
        frames = [await link.session.receive() for _ in range(2)]
        assert [type(value) for _, value in frames] == [Ack, commands.Basic.Cancel]
        link.session.send(1, commands.Basic.CancelOk("tag"))
        assert await within(task) == b"1"
        (nack,) = await link.sent()
        assert isinstance(nack, Nack)
        assert nack.delivery_tag == 2


async def test_two_tasks_on_one_iterator_start_one_consumer_and_share_its_messages() -> None:
    async with linked() as link:
        channel = await link.channel()
        iterator = (await link.queue(channel)).iterator(consumer_tag="tag")
        tasks = [asyncio.ensure_future(anext(iterator)) for _ in range(2)]
        await link.session.expect(commands.Basic.Consume)
        link.session.send(1, commands.Basic.ConsumeOk("tag"))
        for n in (1, 2):
            link.session.deliver(1, "tag", n, b"%d" % n)
        messages = await within(asyncio.gather(*tasks))
        assert sorted(message.body for message in messages) == [b"1", b"2"]
        assert await link.fence() == []


async def test_all_who_wait_on_one_iterator_are_told_of_its_end() -> None:
    async with linked() as link:
        iterator = await iterate(link)
        tasks = [asyncio.ensure_future(anext(iterator)) for _ in range(3)]
        await turns()
        link.session.send(1, commands.Basic.Cancel("tag", True))
        results = await within(asyncio.gather(*tasks, return_exceptions=True))
        assert all(isinstance(result, ConsumerCancelled) for result in results)


async def test_an_iterator_whose_consume_was_cancelled_can_begin_again() -> None:
    async with linked() as link:
        channel = await link.channel()
        iterator = (await link.queue(channel)).iterator()
        task = asyncio.create_task(iterator.consume())
        _, consume = await link.session.expect(commands.Basic.Consume)
        task.cancel()
        await turns()
        link.session.send(1, commands.Basic.ConsumeOk(consume.consumer_tag))
        await link.session.expect(commands.Basic.Cancel)
        again = asyncio.ensure_future(anext(iterator))
        _, consume = await link.session.expect(commands.Basic.Consume)
        link.session.send(1, commands.Basic.ConsumeOk(consume.consumer_tag))
        link.session.deliver(1, consume.consumer_tag, 1, b"x")
        assert (await within(again)).body == b"x"


async def test_no_ack_deliveries_need_no_settling() -> None:
    got: list[IncomingMessage] = []
    async with linked() as link:
        channel = await link.channel()
        await link.consume(channel, got.append, no_ack=True)
        link.session.deliver(1, "tag", 1)
        await until(lambda: got)
        assert got[0].processed
        with pytest.raises(TypeError):
            await got[0].ack()
        assert await link.fence() == []


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with 3.12")
async def test_callbacks_run_under_an_eager_task_factory() -> None:
    seen: list[bytes] = []

    async def callback(message: IncomingMessage) -> None:
        seen.append(message.body)
        await asyncio.sleep(0)

    asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
    await run_callback(callback, 3, done=lambda: len(seen) == 3)
    assert seen == [b"1", b"2", b"3"]


async def test_a_callback_that_a_foreign_cancellation_ends_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    async def callback(message: IncomingMessage) -> None:
        await asyncio.sleep(0)
        foreign: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        foreign.cancel()
        await foreign

    await run_callback(callback, 1, done=lambda: "failed on delivery 1" in caplog.text)
