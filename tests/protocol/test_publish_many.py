"""publish_many() and publish_nowait() on a plain channel: one waiter, a window, and an outcome for each message."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from pamqp import commands

from leveret import Channel, Message, PublishReport
from leveret.exceptions import (
    ChannelInvalidStateError,
    ChannelNotFoundEntity,
    ConnectionBlocked,
    ConnectionClosed,
    MessageNacked,
    MessageReturned,
    MessageTooLarge,
    PublishManyFailed,
    PublishNotSent,
    PublishNotSentInTime,
    PublishOutcomeUnknown,
    PublishUnconfirmedInTime,
)
from tests.protocol.kit import Link, linked, turns, until, within
from tests.protocol.robust_kit import channel_of, refuse, robust

Ack, Nack = commands.Basic.Ack, commands.Basic.Nack


def start(channel: Channel, messages: Any, key: str | None = "key", **kwargs: Any) -> asyncio.Task[PublishReport]:
    return asyncio.create_task(channel.default_exchange.publish_many(messages, key, **kwargs))


def numbered(count: int) -> list[Message]:
    return [Message(b"%d" % n) for n in range(count)]


class Counted(Iterator[Message]):
    """Messages without end, and how many were taken."""

    def __init__(self) -> None:
        self.taken = 0

    def __next__(self) -> Message:
        self.taken += 1
        return Message(b"%d" % (self.taken - 1))


async def bodies(link: Link, count: int) -> list[bytes]:
    return [(await link.session.expect_publish())[3] for _ in range(count)]


def kinds(report: PublishReport) -> list[tuple[int, type[Exception]]]:
    return [(failure.index, type(failure.error)) for failure in report.failures]


# -------------------------------------------------------------------------------------------------------- the good case


async def test_nothing_to_publish() -> None:
    async with linked() as link:
        channel = await link.channel()
        report = await within(channel.default_exchange.publish_many([]))
        assert report == PublishReport(total=0, confirmed=0)
        assert report
        assert await link.sent() == []


async def test_all_are_confirmed() -> None:
    async with linked() as link:
        channel = await link.channel()
        messages = numbered(5)
        task = start(channel, messages)
        assert await bodies(link, 5) == [message.body for message in messages]
        link.session.send(1, Ack(2), Ack(1), Ack(5, True))
        report = await within(task)
        assert (report.total, report.confirmed, report.failures, report.stopped_by) == (5, 5, [], None)
        assert report
        assert report.error(4) is None
        report.raise_for_failures()


async def test_pairs_and_the_routing_key_of_the_others() -> None:
    async with linked() as link:
        channel = await link.channel()
        task = start(channel, [(Message(b"a"), "one"), Message(b"b"), (Message(b"c"), "")], "two")
        keys = [(await link.session.expect_publish())[1].routing_key for _ in range(3)]
        link.session.send(1, Ack(0, True))
        assert (await within(task)).confirmed == 3
        assert keys == ["one", "two", ""]


async def test_the_same_message_many_times_with_headers_that_change() -> None:
    async with linked() as link:
        channel = await link.channel()
        message = Message(b"x", headers={"n": -1})

        def each() -> Iterator[Message]:
            for n in range(3):
                message.headers["n"] = n
                yield message

        task = start(channel, each())
        heads = [(await link.session.expect_publish())[2] for _ in range(3)]
        link.session.send(1, Ack(3, True))
        assert (await within(task)).confirmed == 3
        assert [head.properties.headers for head in heads] == [{"n": 0}, {"n": 1}, {"n": 2}]


async def test_properties_change_from_message_to_message() -> None:
    async with linked() as link:
        channel = await link.channel()
        ids = ["a", "a", None, "b", "a"]
        task = start(channel, (Message(b"", message_id=each) for each in ids))
        heads = [(await link.session.expect_publish())[2] for _ in ids]
        link.session.send(1, Ack(0, True))
        assert (await within(task)).confirmed == 5
        assert [head.properties.message_id for head in heads] == ids


async def test_not_mandatory() -> None:
    async with linked() as link:
        channel = await link.channel()
        task = start(channel, numbered(1), mandatory=False)
        assert not (await link.session.expect_publish())[1].mandatory
        link.session.send(1, Ack(1))
        assert (await within(task)).confirmed == 1


# ----------------------------------------------------------------------------------------------------------- the window


async def test_no_more_is_taken_than_the_window_has_room_for() -> None:
    async with linked() as link:
        channel = await link.channel()
        messages = Counted()
        task = start(channel, messages, window=4)
        assert await bodies(link, 4) == [b"0", b"1", b"2", b"3"]
        assert not await link.sent()
        assert messages.taken == 4
        link.session.send(1, Ack(1))
        assert await bodies(link, 1) == [b"4"]
        assert not await link.sent()
        assert messages.taken == 5
        link.session.send(1, Ack(0, True))
        assert await bodies(link, 4) == [b"5", b"6", b"7", b"8"]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await within(task)
        link.session.send(1, Ack(0, True))
        assert not await link.sent()
        assert messages.taken == 9
        assert not channel.is_closed


async def test_a_window_of_one_sends_one_at_a_time() -> None:
    async with linked() as link:
        channel = await link.channel()
        task = start(channel, numbered(3), window=1)
        for n in range(3):
            assert await bodies(link, 1) == [b"%d" % n]
            assert not await link.sent()
            link.session.send(1, Ack(n + 1))
        assert (await within(task)).confirmed == 3


async def test_a_window_of_bytes_and_a_body_larger_than_it_goes_alone() -> None:
    async with linked() as link:
        channel = await link.channel()
        sizes = [40, 40, 40, 500, 10]
        task = start(channel, (Message(bytes(size)) for size in sizes), window_bytes=100)
        number = 0
        for together in ([40, 40], [40], [500], [10]):
            assert [len(body) for body in await bodies(link, len(together))] == together
            assert not await link.sent()
            number += len(together)
            link.session.send(1, Ack(number, True))
        assert (await within(task)).confirmed == 5


async def test_the_first_body_may_be_larger_than_the_window() -> None:
    async with linked() as link:
        channel = await link.channel()
        task = start(channel, [Message(bytes(300_000))] * 2, window_bytes=1)
        for n in (1, 2):
            assert [len(body) for body in await bodies(link, 1)] == [300_000]
            assert not await link.sent()
            link.session.send(1, Ack(n))
        assert (await within(task)).confirmed == 2


@pytest.mark.parametrize("wrong", [{"window": 0}, {"window_bytes": 0}])
async def test_a_window_is_one_at_least(wrong: dict[str, int]) -> None:
    async with linked() as link:
        channel = await link.channel()
        with pytest.raises(ValueError, match="window"):
            await channel.default_exchange.publish_many([], "key", **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("confirm", [True, False])
async def test_the_loop_turns_while_an_iterable_never_waits(confirm: bool) -> None:
    async with linked(lenient=True) as link:
        channel = await link.channel(confirm=confirm)
        messages = Counted()
        task = start(channel, messages, window=1_000_000)
        taken = []
        for _ in range(3):
            taken.append(messages.taken)
            await asyncio.sleep(0)
        assert taken == sorted(set(taken))
        assert max(b - a for a, b in itertools.pairwise(taken)) <= 256
        task.cancel()
        await asyncio.wait({task})


# ---------------------------------------------------------------------------------------------------- nacks and returns


async def test_nacks_name_their_messages() -> None:
    async with linked() as link:
        channel = await link.channel()
        messages = numbered(6)
        task = start(channel, iter(messages))
        await bodies(link, 6)
        link.session.send(1, Nack(5), Nack(2, True), Ack(6, True))
        report = await within(task)
        assert not report
        assert (report.total, report.confirmed) == (6, 3)
        assert kinds(report) == [(0, MessageNacked), (1, MessageNacked), (4, MessageNacked)]
        failure = report.failures[2]
        assert failure.message is messages[4]
        assert failure.routing_key == "key"
        assert report.error(4) is failure.error
        with pytest.raises(IndexError):
            report.error(6)
        with pytest.raises(
            PublishManyFailed, match="6 messages, 3 confirmed, 3 failed; the first of them, at index 0"
        ) as e:
            report.raise_for_failures()
        assert e.value.report is report
        assert e.value.__cause__ is report.failures[0].error


@pytest.mark.parametrize("raises", [False, True])
async def test_what_comes_back_is_a_failure_whether_or_not_returns_raise(raises: bool) -> None:
    async with linked() as link:
        channel = await link.channel(on_return_raises=raises)
        seen: list[Any] = []
        channel.return_callbacks.add(lambda _, message: seen.append(message))
        task = start(channel, [(Message(b"x"), "good"), (Message(b"x"), "bad"), (Message(b"x"), "bad")])
        await bodies(link, 3)
        for _ in range(2):
            link.session.send_content(1, commands.Basic.Return(312, "NO_ROUTE", "", "bad"), b"x")
        link.session.send(1, Ack(3, True))
        report = await within(task)
        assert report.confirmed == 1
        assert kinds(report) == [(1, MessageReturned), (2, MessageReturned)]
        assert report.returned == report.failures
        error = report.error(1)
        assert isinstance(error, MessageReturned)
        assert error.message is seen[0]


async def test_others_publish_on_the_channel_meanwhile() -> None:
    async with linked() as link:
        channel = await link.channel()
        exchange = channel.default_exchange
        singles: list[Any] = []

        def each() -> Iterator[Message]:
            for n in range(4):
                singles.append(asyncio.ensure_future(exchange.publish(Message(b"s%d" % n), "single")))
                yield Message(b"a%d" % n)

        one, two = start(channel, each()), start(channel, [Message(b"b")] * 3)
        assert await bodies(link, 11) == [
            *(b"%c%d" % (kind, n) for n in range(4) for kind in b"sa"),
            *[b"b"] * 3,
        ]
        link.session.send(1, Nack(4), Nack(7), Nack(10), Ack(11, True))
        assert kinds(await within(one)) == [(1, MessageNacked)]
        assert kinds(await within(two)) == [(1, MessageNacked)]
        results = await within(asyncio.gather(*singles, return_exceptions=True))
        assert [type(result) for result in results] == [Ack, Ack, Ack, MessageNacked]


# -------------------------------------------------------------------------------------------------------- time, blocked


async def test_each_message_has_its_time_and_late_confirms_disturb_nobody() -> None:
    async with linked() as link:
        channel = await link.channel()
        task = start(channel, numbered(3), timeout=0.3)
        await bodies(link, 3)
        link.session.send(1, Ack(2))
        report = await within(task)
        assert kinds(report) == [(0, PublishUnconfirmedInTime), (2, PublishUnconfirmedInTime)]
        assert isinstance(report.failures[0].error, TimeoutError)
        assert any("overdue" in text for text in channel.complaints)
        link.session.send(1, Ack(3), Ack(1))
        task = start(channel, numbered(1))
        await bodies(link, 1)
        link.session.send(1, Ack(4))
        assert await within(task)
        assert not channel.complaints


async def test_the_default_time_is_the_operation_timeout() -> None:
    async with linked(query="operation_timeout=0.02") as link:
        channel = await link.channel()
        report = await within(start(channel, numbered(2)))
        assert kinds(report) == [(0, PublishUnconfirmedInTime), (1, PublishUnconfirmedInTime)]
        await bodies(link, 2)


async def test_time_without_limit() -> None:
    async with linked() as link:
        channel = await link.channel()
        task = start(channel, numbered(1), timeout=float("inf"))
        await bodies(link, 1)
        link.session.send(1, Ack(1))
        assert await within(task)


async def test_what_waits_for_its_place_is_not_sent_when_its_time_is_up() -> None:
    async with linked() as link:
        channel = await link.channel()
        report = await within(start(channel, [Message(bytes(9)), Message(bytes(99))], window_bytes=50, timeout=0.02))
        assert kinds(report) == [(0, PublishUnconfirmedInTime), (1, PublishNotSentInTime)]
        assert await bodies(link, 1) == [bytes(9)]


async def test_a_blocked_broker_holds_them_and_they_go_on_when_it_unblocks() -> None:
    async with linked() as link:
        channel = await link.channel()
        link.session.send(0, commands.Connection.Blocked("low on memory"))
        await until(lambda: link.connection.blocked)
        messages = Counted()
        task = start(channel, itertools.islice(messages, 5), window=3)
        await turns()
        assert messages.taken == 3
        assert not await link.sent()
        link.session.send(0, commands.Connection.Unblocked())
        assert await bodies(link, 3) == [b"0", b"1", b"2"]
        link.session.send(1, Ack(3, True))
        assert await bodies(link, 2) == [b"3", b"4"]
        link.session.send(1, Ack(5, True))
        assert (await within(task)).confirmed == 5


async def test_a_broker_that_stays_blocked_and_a_task_that_is_cancelled() -> None:
    async with linked() as link:
        channel = await link.channel()
        link.session.send(0, commands.Connection.Blocked("low on memory"))
        await until(lambda: link.connection.blocked)
        report = await within(start(channel, numbered(2), timeout=0.02))
        assert kinds(report) == [(0, ConnectionBlocked), (1, ConnectionBlocked)]
        task = start(channel, numbered(2))
        await turns()
        task.cancel()
        await asyncio.wait({task})
        link.session.send(0, commands.Connection.Unblocked())
        assert not await link.sent()


# -------------------------------------------------------------------------------------------------- the channel is lost


async def test_the_broker_closes_the_channel_in_the_middle_of_a_list() -> None:
    async with linked() as link:
        channel = await link.channel()
        messages = numbered(6)
        task = start(channel, messages, window=4)
        await bodies(link, 4)
        link.session.send(1, Ack(1), commands.Channel.Close(404, "NOT_FOUND - no exchange", 60, 40))
        report = await within(task)
        assert report.confirmed == 1
        assert kinds(report) == [
            *((n, PublishOutcomeUnknown) for n in (1, 2, 3)),
            (4, PublishNotSent),
            (5, PublishNotSent),
        ]
        assert isinstance(report.failures[0].error.__cause__, ChannelNotFoundEntity)
        assert isinstance(report.stopped_by, ChannelInvalidStateError)
        assert report.failures[4].message is messages[5]
        await link.session.expect(commands.Channel.CloseOk)
        with pytest.raises(ChannelInvalidStateError, match="NOT_FOUND") as caught:
            await channel.default_exchange.publish_many(numbered(1), "key")
        assert not isinstance(caught.value, PublishNotSent)


async def test_no_more_of_an_endless_iterable_is_taken_when_the_channel_is_lost() -> None:
    async with linked() as link:
        channel = await link.channel()
        messages = Counted()
        task = start(channel, messages, window=2)
        await bodies(link, 2)
        link.session.reset()
        report = await within(task)
        assert kinds(report) == [(0, PublishOutcomeUnknown), (1, PublishOutcomeUnknown)]
        assert messages.taken == report.total == 2
        assert isinstance(report.stopped_by, ChannelInvalidStateError)
        assert isinstance(report.stopped_by.__cause__, ConnectionClosed)
        assert "closed" in str(report)


async def test_a_report_that_was_stopped_is_not_true_even_if_nothing_failed() -> None:
    async with linked() as link:
        channel = await link.channel()
        gate = asyncio.Event()

        async def slowly() -> AsyncIterator[Message]:
            yield Message(b"")
            await gate.wait()
            yield Message(b"")
            raise AssertionError

        task = start(channel, slowly())
        await bodies(link, 1)
        link.session.send(1, Ack(1), commands.Channel.Close(406, "REFUSED", 0, 0))
        await link.session.expect(commands.Channel.CloseOk)
        gate.set()
        report = await within(task)
        assert (report.total, report.confirmed) == (2, 1)
        assert kinds(report) == [(1, PublishNotSent)]
        assert not report
        assert not PublishReport(1, 1, [], report.stopped_by)
        with pytest.raises(PublishManyFailed):
            report.raise_for_failures()


async def test_the_user_closes_the_channel_in_the_middle() -> None:
    async with linked() as link:
        channel = await link.channel()
        task = start(channel, numbered(5), window=2)
        await bodies(link, 2)
        closing = asyncio.create_task(channel.close())
        await turns()
        link.session.send(1, Ack(2, True))  # which closing waits for
        await link.session.expect(commands.Channel.Close)
        link.session.send(1, commands.Channel.CloseOk())
        await within(closing)
        report = await within(task)
        assert report.confirmed == 2
        assert kinds(report) == [(2, PublishNotSent), (3, PublishNotSent), (4, PublishNotSent)]


# --------------------------------------------------------------------------------------- mistakes and raising iterables


@pytest.mark.parametrize(
    ("wrong", "kind", "text"),
    [
        ("text", TypeError, "pair of a Message and its routing key, not 'text'"),
        ((b"body", "key"), TypeError, "pair"),
        ((Message(b""), "key", 1), TypeError, "pair"),
        ((Message(b""), 5), TypeError, "routing key must be str, not int"),
        ((Message(b""), None), TypeError, "no routing key"),
        ((Message(b""), "k" * 256), ValueError, "255"),
        (Message(b"", headers={"h": object()}), TypeError, "object"),  # type: ignore[dict-item]
        (Message(b"", headers={"h": "x" * 200_000}), MessageTooLarge, "frame_max"),
        (Message(b"", message_id="m" * 256), ValueError, "message_id"),
    ],
)
async def test_a_mistake_is_raised_after_what_came_before_and_names_the_message(
    wrong: Any, kind: type[Exception], text: str
) -> None:
    async with linked() as link:
        channel = await link.channel()
        task = start(channel, [*numbered(3), wrong, *numbered(1)])
        await bodies(link, 3)
        assert not await link.sent()
        assert not task.done()
        link.session.send(1, Ack(2, True), Nack(3))
        with pytest.raises(kind, match="message at index 3 of publish_many") as caught:
            await within(task)
        assert text in str(caught.value)
        report = caught.value.publish_report  # type: ignore[attr-defined]
        assert (report.total, report.confirmed) == (3, 2)
        assert kinds(report) == [(2, MessageNacked)]
        task = start(channel, numbered(1))
        await bodies(link, 1)
        link.session.send(1, Ack(4))
        assert await within(task)


async def test_a_message_without_a_key() -> None:
    async with linked() as link:
        channel = await link.channel()
        with pytest.raises(TypeError, match=r"message at index 0 .* no routing key"):
            await within(channel.default_exchange.publish_many([Message(b"")]))


@pytest.mark.parametrize("wrong", [Message(b""), None, 5])
async def test_what_is_not_iterable(wrong: Any) -> None:
    async with linked() as link:
        channel = await link.channel()
        with pytest.raises(TypeError, match="takes an iterable of messages"):
            await within(channel.default_exchange.publish_many(wrong, "key"))


async def test_an_internal_exchange() -> None:
    async with linked() as link:
        channel = await link.channel()
        exchange = channel.EXCHANGE_CLASS(channel, "in", internal=True)
        with pytest.raises(ValueError, match="internal"):
            await exchange.publish_many(numbered(1), "key")
        with pytest.raises(ValueError, match="internal"):
            _ = exchange.publish_nowait(Message(b""), "key")


async def test_what_the_iterable_raises_comes_out_after_what_came_before() -> None:
    async with linked() as link:
        channel = await link.channel()

        def failing() -> Iterator[Message]:
            yield from numbered(2)
            raise KeyError("source")

        task = start(channel, failing())
        await bodies(link, 2)
        await turns()
        assert not task.done()
        link.session.send(1, Ack(2, True))
        with pytest.raises(KeyError, match="source") as caught:
            await within(task)
        assert caught.value.publish_report == PublishReport(2, 2)  # type: ignore[attr-defined]
        assert "2 messages, 2 confirmed" in caught.value.__notes__[0]


# ---------------------------------------------------------------------------------------- async iterables, cancellation


class Source:
    """An async generator that says when it is closed."""

    def __init__(self) -> None:
        self.taken = 0
        self.is_closed = False

    async def messages(self) -> AsyncIterator[Message]:
        try:
            while True:
                self.taken += 1
                yield Message(b"")
        finally:
            self.is_closed = True


async def test_an_async_generator_is_taken_from_no_faster_and_closed_on_cancellation() -> None:
    async with linked() as link:
        channel = await link.channel()
        source = Source()
        task = start(channel, source.messages(), window=3)
        await bodies(link, 3)
        assert not await link.sent()
        assert source.taken == 3
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        assert source.is_closed
        link.session.send(1, Ack(3, True))
        assert not await link.sent()
        task = start(channel, numbered(1))
        await bodies(link, 1)
        link.session.send(1, Ack(4))
        assert await within(task)


async def test_an_async_generator_is_closed_after_a_mistake_and_when_the_channel_is_lost() -> None:
    async with linked() as link:
        channel = await link.channel()
        source = Source()
        with pytest.raises(TypeError):
            await within(start(channel, source.messages(), None))
        assert source.is_closed
        source = Source()
        task = start(channel, source.messages(), window=1)
        await bodies(link, 1)
        link.session.send(1, commands.Channel.Close(404, "NOT_FOUND", 60, 40))
        await link.session.expect(commands.Channel.CloseOk)
        report = await within(task)
        assert kinds(report) == [(0, PublishOutcomeUnknown)]
        assert report.stopped_by is not None
        assert source.is_closed


async def test_an_async_generator_that_waits_and_ends() -> None:
    async with linked() as link:
        channel = await link.channel()

        async def slowly() -> AsyncIterator[tuple[Message, str]]:
            for n in range(4):
                await asyncio.sleep(0)
                yield Message(b"%d" % n), "key"

        task = start(channel, slowly(), None, window=2)
        for number in (2, 4):
            await bodies(link, 2)
            link.session.send(1, Ack(number, True))
        assert (await within(task)).confirmed == 4


async def test_cancelled_while_it_waits_for_the_last_confirms_of_a_mistake() -> None:
    async with linked() as link:
        channel = await link.channel()
        task = start(channel, [Message(b""), "wrong"])
        await bodies(link, 1)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        link.session.send(1, Ack(1))
        assert not await link.sent()


# ----------------------------------------------------------------------------------------------------- without confirms


async def test_without_confirms_it_says_what_was_written() -> None:
    async with linked() as link:
        channel = await link.channel(confirm=False)
        report = await within(start(channel, numbered(300), window=3))
        assert report
        assert (report.total, report.confirmed) == (300, 0)
        await bodies(link, 300)


async def test_without_confirms_a_full_socket_slows_it_down() -> None:
    async with linked(lenient=True) as link:
        channel = await link.channel(confirm=False)
        messages = Counted()
        body = bytes(100_000)
        task = start(channel, (Message(body) for _ in messages), window=5)
        publisher = channel.wire.publisher
        await until(lambda: publisher.has_held)
        await turns(20)
        taken = messages.taken
        await turns(20)
        assert messages.taken == taken
        assert not task.done()
        for _ in range(taken):  # the peer reads: more is taken
            await link.session.expect_publish()
        await until(lambda: messages.taken > taken)
        task.cancel()
        await asyncio.wait({task})


async def test_in_a_transaction() -> None:
    async with linked() as link:
        channel = await link.channel(confirm=False)
        transaction = channel.transaction()
        await link.answer(transaction.select(), commands.Tx.Select, commands.Tx.SelectOk())
        assert (await within(start(channel, numbered(3)))).total == 3
        await bodies(link, 3)
        await link.answer(transaction.commit(), commands.Tx.Commit, commands.Tx.CommitOk())


# ------------------------------------------------------------------------------------------------------- publish_nowait


async def test_nowait_is_a_publish_where_nobody_has_to_wait() -> None:
    async with linked() as link:
        channel = await link.channel()
        outcome = channel.default_exchange.publish_nowait(Message(b"x"), "key", mandatory=False)
        _, method, _, body = await link.session.expect_publish()
        assert (method.mandatory, body) == (False, b"x")
        link.session.send(1, Ack(1))
        assert isinstance(await within(outcome), Ack)
        with pytest.raises(PublishUnconfirmedInTime):
            await within(channel.default_exchange.publish_nowait(Message(b""), "key", timeout=0.01))
        await bodies(link, 1)
        with pytest.raises(TypeError):
            _ = channel.default_exchange.publish_nowait(b"no message", "key")  # type: ignore[arg-type]


async def test_nowait_raises_while_the_broker_blocks_and_when_it_stops_the_flow() -> None:
    async with linked() as link:
        channel = await link.channel()
        exchange = channel.default_exchange
        link.session.send(0, commands.Connection.Blocked("low on disk"))
        await until(lambda: link.connection.blocked)
        with pytest.raises(ConnectionBlocked, match="low on disk"):
            _ = exchange.publish_nowait(Message(b""), "key")
        link.session.send(0, commands.Connection.Unblocked())
        await until(lambda: not link.connection.blocked)
        link.session.send(1, commands.Channel.Flow(False))
        await link.session.expect(commands.Channel.FlowOk)
        with pytest.raises(PublishNotSent, match="keep up"):
            _ = exchange.publish_nowait(Message(b""), "key")
        link.session.send(1, commands.Channel.Flow(True))
        await link.session.expect(commands.Channel.FlowOk)
        outcome = exchange.publish_nowait(Message(b""), "key")
        await bodies(link, 1)
        link.session.send(1, Ack(1))
        await within(outcome)
        assert not await link.sent()


async def test_nowait_raises_when_the_socket_is_full() -> None:
    async with linked(lenient=True) as link:
        channel = await link.channel(confirm=False)
        message = Message(bytes(100_000))
        while not channel.wire.publisher.output.is_held:
            await channel.default_exchange.publish_nowait(message, "key")
        with pytest.raises(PublishNotSent, match="keep up"):
            _ = channel.default_exchange.publish_nowait(message, "key")


async def test_nowait_on_a_lost_link_and_a_closed_channel() -> None:
    async with linked() as link:
        channel = await link.channel()
        link.session.send(1, commands.Channel.Close(406, "REFUSED", 0, 0))
        await link.session.expect(commands.Channel.CloseOk)
        with pytest.raises(PublishNotSent):
            _ = channel.default_exchange.publish_nowait(Message(b""), "key")
        with pytest.raises(PublishNotSent):
            _ = link.connection.channel().default_exchange.publish_nowait(Message(b""), "key")


async def test_it_stops_when_the_broker_refuses_the_exchange_again_and_again() -> None:
    """On a channel that comes back it went on for ever, with an endless iterable."""
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        exchange = await channel.get_exchange("gone", ensure=False)
        server.at(commands.Basic.Publish, refuse(404), times=None)

        def endless() -> Iterator[Message]:
            while True:
                yield Message(b"x")

        report = await within(exchange.publish_many(endless(), "key", window=5), 10)
        assert isinstance(report.stopped_by, ChannelNotFoundEntity)
        assert not report
        assert len(server.link.all(commands.Channel.Open)) in {3, 4}
