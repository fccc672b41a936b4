"""What is counted and measured, frame by frame: every publish and every delivery once, whatever becomes of it."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from pamqp import commands, frame

import leveret
from leveret import Channel, Connection, IncomingMessage, Message
from leveret.exceptions import ConnectionClosed, DeliveryLost, PublishOutcomeUnknown, PublishUnconfirmedInTime
from leveret.metrics import LOOK_EVERY, Metrics, Snapshot
from tests.protocol.kit import Link, linked, turns, until, within
from tests.protocol.robust_kit import robust
from tests.unit.test_call_ceilings import deliver

Ack, Nack = commands.Basic.Ack, commands.Basic.Nack


def watched(connection: Connection) -> Metrics:
    metrics = Metrics()
    metrics.watch(connection)
    return metrics


def clock_of_loop(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """What puts on the clock of the event loop by so many seconds."""
    loop, ahead = asyncio.get_running_loop(), 0.0
    clock = loop.time

    def put_on(seconds: float) -> None:
        nonlocal ahead
        ahead += seconds

    monkeypatch.setattr(loop, "time", lambda: clock() + ahead)
    return put_on


def adds_up(found: Snapshot) -> bool:
    """Whether every publish is in one place."""
    answered = found.confirmed + found.nacked + found.returned
    return found.published == answered + found.unknown + found.resent + found.unconfirmed


async def publish(link: Link, channel: Channel, count: int, **kwargs: Any) -> list[asyncio.Future[Any]]:
    futures = [
        asyncio.ensure_future(channel.default_exchange.publish(Message(b"%d" % n), "key", **kwargs))
        for n in range(count)
    ]
    for _ in range(count):
        await link.session.expect_publish()
    return futures


def returned(link: Link, body: bytes) -> None:
    link.session.send_content(1, commands.Basic.Return(312, "NO_ROUTE", "", "key"), body)


async def test_every_answer_of_the_broker_is_counted_once() -> None:
    async with linked() as link:
        channel = await link.channel()
        metrics = watched(link.connection)
        futures = await publish(link, channel, 7)
        assert metrics.snapshot().unconfirmed == metrics.snapshot().published == 7
        returned(link, b"1")
        await link.fence()
        found = metrics.snapshot()
        assert (found.returned, found.confirmed, found.unconfirmed) == (0, 0, 7), "its confirm is still to come"
        link.session.send(1, Ack(3, True), Nack(4), Ack(6))
        await link.fence()
        found = metrics.snapshot()
        assert (found.confirmed, found.returned, found.nacked, found.unconfirmed) == (3, 1, 1, 2)
        assert adds_up(found)
        assert found.confirm_seconds.count == 5
        link.session.send(1, Ack(0, True))
        await asyncio.gather(*futures, return_exceptions=True)
        assert metrics.snapshot().confirmed == 5
        assert metrics.snapshot().unconfirmed == 0


async def test_a_publish_that_nobody_waits_for_any_more_is_counted_by_its_answer() -> None:
    async with linked() as link:
        channel = await link.channel()
        metrics = watched(link.connection)
        late, cancelled = await publish(link, channel, 2, timeout=0.01)
        cancelled.cancel()
        with pytest.raises(PublishUnconfirmedInTime):
            await late
        assert metrics.snapshot().unconfirmed == 2
        link.session.send(1, Ack(2, True))
        await link.fence()
        found = metrics.snapshot()
        assert (found.confirmed, found.unconfirmed, found.unknown) == (2, 0, 0)
        assert found.confirm_seconds.count == 2
        assert found.confirm_seconds.sum >= 0.01


async def test_what_the_link_died_with_is_unknown_and_stays_counted_when_the_connection_is_closed() -> None:
    async with linked() as link:
        channel = await link.channel()
        metrics = watched(link.connection)
        futures = await publish(link, channel, 3)
        link.session.send(1, Ack(1))
        await link.fence()
        link.session.eof()
        assert [type(each) for each in await asyncio.gather(*futures, return_exceptions=True)] == [
            Ack,
            PublishOutcomeUnknown,
            PublishOutcomeUnknown,
        ]
        found = metrics.snapshot()
        assert (found.published, found.confirmed, found.unknown, found.unconfirmed) == (3, 1, 2, 0)
        assert found.connections == 0
        assert metrics._timer is None, "nothing is left to look at"
        assert "0 connections" in repr(metrics)


async def test_without_confirms_it_counts_what_is_written() -> None:
    async with linked() as link:
        channel = await link.channel(confirm=False)
        metrics = watched(link.connection)
        await asyncio.gather(*await publish(link, channel, 3))
        report = await channel.default_exchange.publish_many([Message(b"")] * 4, "key")
        assert report.total == 4
        for _ in range(4):
            await link.session.expect_publish()
        returned(link, b"1")
        await link.fence()
        found = metrics.snapshot()
        assert (found.published, found.unconfirmed, found.returned) == (7, 0, 1)


async def test_held_publishes_and_the_time_for_which_the_broker_blocks_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_on = clock_of_loop(monkeypatch)
    async with linked() as link:
        channel = await link.channel()
        metrics = watched(link.connection)
        link.session.send(0, commands.Connection.Blocked("low on memory"))
        await until(lambda: link.connection.blocked)
        held = [channel.default_exchange.publish(Message(b""), "key") for _ in range(2)]
        put_on(5)
        found = metrics.snapshot()
        assert (found.unsent, found.published) == (2, 0)
        assert 5 <= found.blocked_seconds < 10
        link.session.send(0, commands.Connection.Unblocked())
        for _ in range(2):
            await link.session.expect_publish()
        link.session.send(1, Ack(2, True))
        await within(asyncio.gather(*held))
        found = metrics.snapshot()
        assert (found.unsent, found.confirmed) == (0, 2)
        blocked = found.blocked_seconds
        put_on(5)
        assert metrics.snapshot().blocked_seconds == blocked
        assert found.confirm_seconds.sum >= 2 * 5, "the waiting is part of it"


async def test_deliveries_are_counted_by_what_became_of_them() -> None:
    waits, go_on = asyncio.Event(), asyncio.Event()

    async def callback(message: IncomingMessage) -> None:
        if message.body == b"wait":
            waits.set()
            await go_on.wait()
        verdict = {b"nack": message.nack, b"reject": message.reject, b"wait": message.ack, b"ack": message.ack}
        await verdict[message.body]()

    async with linked(lenient=True) as link:
        channel = await link.channel()
        metrics = watched(link.connection)
        await link.consume(channel, callback, concurrency=1, prefetch=0)
        for tag, body in enumerate([b"ack", b"nack", b"reject", b"ack", b"wait", b"ack", b"ack"], 1):
            link.session.deliver(1, "tag", tag, body)
        await within(waits.wait())
        await link.fence()
        found = metrics.snapshot()
        assert (found.delivered, found.acked, found.requeued, found.rejected) == (7, 2, 1, 1)
        assert (found.waiting, found.in_flight) == (2, 1)
        go_on.set()
        await until(lambda: metrics.snapshot().acked == 5)
        found = metrics.snapshot()
        assert (found.waiting, found.in_flight) == (0, 0)
        assert found.handler_seconds.count == 7


async def test_settling_many_at_once_counts_them_all() -> None:
    async with linked(lenient=True) as link:
        channel = await link.channel()
        metrics = watched(link.connection)
        queue = await link.queue(channel)
        batches = queue.batches(4, consumer_tag="tag", prefetch=0)
        await link.answer(batches.consume(), commands.Basic.Consume, commands.Basic.ConsumeOk("tag"))
        for tag in range(1, 13):
            link.session.deliver(1, "tag", tag, b"%d" % tag)
        await link.fence()
        first, second, third = [await within(anext(batches)) for _ in range(3)]
        assert metrics.snapshot().in_flight == 4, "a task works on the last that it took"
        await first[1].ack()  # by itself
        await first.ack()
        assert metrics.snapshot().acked == 4
        await second.nack()
        assert metrics.snapshot().requeued == 4
        await third[1].ack(multiple=True)
        assert metrics.snapshot().acked == 6
        await third[2].reject()
        await third[3].nack(requeue=False)
        found = metrics.snapshot()
        assert (found.delivered, found.acked, found.requeued, found.rejected) == (12, 6, 4, 2)
        assert found.in_flight == 1  # the one that a multiple settled does not know it


async def test_acks_that_are_kept_are_counted_when_they_are_given() -> None:
    async def callback(message: IncomingMessage) -> None:
        await message.ack()

    async with linked(lenient=True) as link:
        channel = await link.channel()
        metrics = watched(link.connection)
        await link.consume(channel, callback, ack_batch=10)
        for tag in range(1, 6):
            link.session.deliver(1, "tag", tag, b"")
        await link.fence()
        await until(lambda: metrics.snapshot().acked == 5)


async def test_a_large_message_and_a_fetched_one_are_deliveries_too() -> None:
    async with linked(lenient=True) as link:
        channel = await link.channel()
        metrics = watched(link.connection)
        got: list[IncomingMessage] = []
        queue = await link.consume(channel, got.append, no_ack=True)
        link.session.deliver(1, "tag", 1, b"x" * 300_000)
        await until(lambda: got)
        get = asyncio.ensure_future(queue.get())
        await link.session.expect(commands.Basic.Get, channel=1)
        link.session.send_content(1, commands.Basic.GetOk(2, False, "", "q", 0), b"fetched")
        await within(get)
        assert metrics.snapshot().delivered == 2


@pytest.mark.expects_errors
async def test_callbacks_are_timed_and_their_failures_counted_whatever_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_on, go_on = clock_of_loop(monkeypatch), asyncio.Event()

    async def waits(message: IncomingMessage) -> None:
        await go_on.wait()
        await message.ack()

    def plain(message: IncomingMessage) -> None:
        raise RuntimeError("as it is meant to")

    async def is_cancelled(message: IncomingMessage) -> None:
        await asyncio.Event().wait()

    async with linked(lenient=True) as link:
        channel = await link.channel()
        metrics = watched(link.connection)
        for tag, callback in {"a": waits, "b": plain, "c": is_cancelled}.items():
            await link.consume(channel, callback, tag)
        for number, tag in enumerate("abbc", 1):
            link.session.deliver(1, tag, number, b"")
        await until(lambda: metrics.snapshot().in_flight == 2)
        put_on(5)
        go_on.set()
        await until(lambda: metrics.snapshot().acked == 1)
        found = metrics.snapshot()
        assert (found.handlers_failed, found.handler_seconds.count, found.in_flight) == (2, 3, 1)
        assert found.handler_seconds.sum >= 5
    found = metrics.snapshot()
    assert (found.handlers_failed, found.handler_seconds.count) == (2, 4), "to be cancelled is no failure"


async def test_a_callback_that_nobody_watches_is_called_as_it_is() -> None:
    async with linked(lenient=True) as link:
        channel = await link.channel()
        got: list[IncomingMessage] = []
        await link.consume(channel, got.append)
        (running,) = channel.consumers
        assert running._callback == got.append  # type: ignore[attr-defined]
        assert link.connection.tally.on_confirmed is None


async def test_an_event_loop_that_stands_still_shows_in_the_lag(monkeypatch: pytest.MonkeyPatch) -> None:
    put_on = clock_of_loop(monkeypatch)
    async with linked() as link:
        metrics = watched(link.connection)
        put_on(LOOK_EVERY + 0.5)  # as if something blocked the loop
        await until(lambda: metrics.snapshot().loop_lag_seconds.count)
        assert 0.5 <= metrics.snapshot().loop_lag_seconds.sum < 3


async def test_what_came_in_one_read_with_the_end_of_the_connection_is_counted() -> None:
    async with linked(lenient=True) as link:
        channel = await link.channel()
        metrics = watched(link.connection)
        await link.consume(channel, lambda _: None)
        close = frame.marshal(commands.Connection.Close(320, "CONNECTION_FORCED", 0, 0), 0)
        link.session.send_raw(deliver("tag", 1) + deliver("tag", 2) + close)
        await until(lambda: link.connection.is_closed)
        assert metrics.snapshot().delivered == 2


async def test_other_threads_get_what_the_loop_last_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leveret.metrics._LOOKS_FOR_A_READ", 1)
    async with linked() as link:
        channel = await link.channel()
        metrics = watched(link.connection)
        await publish(link, channel, 1)
        assert await asyncio.to_thread(metrics.snapshot) == Snapshot()
        for _ in range(2):
            looks = metrics._lag.read().count
            await until(lambda looks=looks: metrics._lag.read().count > looks)  # type: ignore[misc]
        assert (await asyncio.to_thread(metrics.snapshot)).published == 1
        link.session.send(1, Ack(1))
        await link.fence()


async def test_counters_go_on_over_links_and_resent_publishes_are_none_the_less() -> None:
    async with robust() as (connection, server):
        metrics = watched(connection)
        channel = await connection.channel()
        server.at(commands.Basic.Publish, lambda *_: None, times=2)  # unanswered
        repeated = asyncio.ensure_future(channel.default_exchange.publish(Message(b"again"), "key", retry_unknown=True))
        lost = asyncio.ensure_future(channel.default_exchange.publish(Message(b"lost"), "key"))
        await turns()
        await until(lambda: metrics.snapshot().unconfirmed == 2)
        server.drop()
        with pytest.raises(PublishOutcomeUnknown):
            await within(lost)
        waiting = channel.default_exchange.publish(Message(b"waits"), "key")
        assert metrics.snapshot().unsent >= 1
        assert metrics.snapshot().connections == 0
        await within(repeated)
        await within(waiting)
        found = metrics.snapshot()
        assert (found.published, found.confirmed, found.unknown, found.resent) == (4, 2, 1, 1)
        assert (found.reconnects, found.connections, found.unsent) == (1, 1, 0)
        assert adds_up(found)


async def test_several_connections_add_up_and_what_was_before_counts() -> None:
    async with linked() as one, linked() as two:
        metrics = Metrics("both")
        futures = []
        for link in (one, two):
            channel = await link.channel()
            futures += await publish(link, channel, 2)
            metrics.watch(link.connection)
            metrics.watch(link.connection)  # again is no more than once
        assert metrics.snapshot().published == 4
        assert metrics.snapshot().connections == 2
        for link in (one, two):
            link.session.send(1, Ack(2, True))
        await within(asyncio.gather(*futures))
        assert metrics.snapshot().confirmed == 4
        with pytest.raises(ValueError, match="another Metrics"):
            Metrics().watch(one.connection)


async def test_a_closed_connection_is_not_watched() -> None:
    async with linked() as link:
        link.session.eof()
        await until(lambda: link.connection.is_closed)
        with pytest.raises(ValueError, match="is closed"):
            Metrics().watch(link.connection)


async def test_a_connection_that_was_closed_may_be_followed_by_another() -> None:
    metrics = Metrics()
    for _ in range(2):
        async with linked() as link:
            metrics.watch(link.connection)
            channel = await link.channel()
            (future,) = await publish(link, channel, 1)
            link.session.send(1, Ack(1))
            await within(future)
    assert metrics.snapshot().confirmed == 2
    assert metrics.snapshot().connections == 0


def test_a_metrics_serves_one_event_loop_at_a_time() -> None:
    metrics = Metrics()

    async def one(inner: bool) -> None:
        async with linked() as link:
            metrics.watch(link.connection)
            if inner:
                with pytest.raises(RuntimeError, match="another event loop"):
                    await asyncio.to_thread(asyncio.run, one(False))

    asyncio.run(one(True))
    asyncio.run(one(False))  # the next one may have it
    assert metrics.snapshot().connections == 0


async def test_closing_the_connection_leaves_nothing_behind() -> None:
    async with linked() as link:
        metrics = watched(link.connection)
        tally = link.connection.tally
        await link.channel()
        assert len(tally.publishers) == 1
    assert tally.on_confirmed is None
    assert tally.measured is None
    assert not tally.publishers
    assert metrics._loop is None
    assert isinstance(link.connection._error(), ConnectionClosed)


async def test_a_connection_that_is_no_longer_watched_keeps_what_it_did_and_adds_nothing() -> None:
    async with linked(lenient=True) as one, linked(lenient=True) as two:
        metrics, got = Metrics(), list[bytes]()
        for link in (one, two):
            metrics.watch(link.connection)
        channel = await one.channel()
        await one.consume(channel, lambda message: got.append(message.body), no_ack=True)
        one.session.deliver(1, "tag", 1, b"1")
        futures = await publish(one, channel, 2)
        one.session.send(1, Ack(1))
        await within(futures[0])
        await until(lambda: got == [b"1"])
        metrics.unwatch(one.connection)
        metrics.unwatch(one.connection)  # again is no less
        found = metrics.snapshot()
        assert (found.published, found.confirmed, found.delivered) == (2, 1, 1)
        assert (found.connections, found.unconfirmed) == (1, 0), "gauges are of what is watched"
        assert (found.confirm_seconds.count, found.handler_seconds.count) == (1, 1)
        one.session.deliver(1, "tag", 2, b"2")
        one.session.send(1, Ack(2))
        await within(futures[1])
        await until(lambda: got == [b"1", b"2"])
        later = metrics.snapshot()
        assert (later.confirmed, later.delivered) == (1, 1)
        assert (later.confirm_seconds.count, later.handler_seconds.count) == (1, 1)
        assert len(one.connection.close_callbacks) == 0
        assert metrics._timer is not None, "the other is watched still"


async def test_what_was_unwatched_may_be_watched_again_and_is_not_counted_twice() -> None:
    async with linked() as link:
        channel = await link.channel()
        metrics = watched(link.connection)
        for _ in range(2):
            (future,) = await publish(link, channel, 1)
            metrics.unwatch(link.connection)
            assert metrics._timer is None
            link.session.send(1, Ack(0, True))
            await within(future)
            metrics.watch(link.connection)
        assert (metrics.snapshot().published, metrics.snapshot().confirmed) == (2, 2)
        metrics.unwatch(link.connection)
        other = watched(link.connection)
        assert other.snapshot().published == 2


async def test_to_unwatch_what_is_not_watched_does_nothing() -> None:
    async with linked() as link:
        metrics = watched(link.connection)
        Metrics().unwatch(link.connection)
        assert metrics.snapshot().connections == 1
        with pytest.raises(ValueError, match="another Metrics"):
            Metrics().watch(link.connection)
    metrics.unwatch(link.connection)
    assert metrics.snapshot().connections == 0


@pytest.mark.parametrize("end", ["unwatched", "closed"])
async def test_metrics_keep_no_connection_alive(end: str) -> None:
    metrics = Metrics()

    async def one() -> weakref.ref[Connection]:
        async with linked() as link:
            metrics.watch(link.connection)
            await link.channel()
            if end == "unwatched":
                metrics.unwatch(link.connection)
            return weakref.ref(link.connection)

    reference = await one()
    await turns()
    gc.collect()
    assert reference() is None


async def waits_in_vain(message: IncomingMessage, *_: object) -> None:
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    await future


async def is_lost(message: IncomingMessage) -> None:
    raise DeliveryLost("as it is meant to")


def fails(message: IncomingMessage) -> None:
    raise RuntimeError("as it is meant to")


@pytest.mark.expects_errors
@pytest.mark.parametrize(
    ("callback", "options", "failures"),
    [
        (fails, {}, 1),
        (fails, {"on_error": "reject"}, 1),
        (fails, {"on_error": lambda *_: leveret.Nack}, 1),
        (fails, {"on_error": fails}, 1),
        (fails, {"on_error": waits_in_vain}, 1),
        (fails, {"thread": True}, 1),
        (waits_in_vain, {}, 1),
        (waits_in_vain, {"on_error": "requeue"}, 1),
        (is_lost, {}, 0),  # its message comes again
        (is_lost, {"on_error": "requeue"}, 0),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
async def test_a_callback_that_fails_is_counted_once_by_its_consumer_and_by_the_metrics(
    callback: Any, options: dict[str, Any], failures: int
) -> None:
    async with linked(lenient=True, without="basic.nack") as link:  # so that leveret.Nack fails, too
        channel = await link.channel(confirm=False)
        metrics = watched(link.connection)
        queue = await link.queue(channel)
        call = queue.consume(callback, consumer_tag="tag", **options)
        consumer = await link.answer(call, commands.Basic.Consume, commands.Basic.ConsumeOk("tag"))
        link.session.deliver(1, "tag", 1, b"")
        await until(lambda: metrics.snapshot().handler_seconds.count)
        await link.fence()
        assert (consumer.failed, metrics.snapshot().handlers_failed) == (failures, failures)
