"""Stopping consumers with a broker in the test's hands: what goes over the wire, in which order, whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from typing import Any

import pytest
from pamqp import commands

import leveret
from leveret import Ack, Channel, Consumer, DrainReport, IncomingMessage, Message
from leveret.exceptions import ConnectionClosed, DeliveryLost
from tests.protocol.kit import Link, linked, turns, until, within
from tests.protocol.robust_kit import channel_of, lost, queue_on, robust

Basic = commands.Basic


@pytest.fixture(autouse=True)
def _no_quorum_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leveret.draining.SETTLING", 0.001)


class Handler:
    """Waits until it is let go."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.began: list[bytes] = []
        self.cancelled: list[bytes] = []

    async def __call__(self, message: IncomingMessage) -> leveret.Verdict:
        self.began.append(message.body)
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled.append(message.body)
            raise
        return Ack


async def consuming(link: Link, callback: Any, bodies: int = 0, **options: Any) -> tuple[Channel, Consumer]:
    """A channel and a consumer tagged "tag", which got messages 1 to *bodies*."""
    channel = await link.channel()
    queue = await link.queue(channel)
    consume = asyncio.ensure_future(queue.consume(callback, consumer_tag="tag", **options))
    method = await link.session.receive()
    if isinstance(method[1], Basic.Qos):
        link.session.send(1, Basic.QosOk())
        await link.session.expect(Basic.Consume)
    link.session.send(1, Basic.ConsumeOk("tag"))
    consumer = await within(consume)
    for n in range(1, bodies + 1):
        link.session.deliver(1, "tag", n, b"%d" % n)
    await until(lambda: consumer.delivered == bodies)
    await turns()
    return channel, consumer


def names(frames: list[Any]) -> list[str]:
    """What they are, with their delivery tags."""
    found = []
    for frame in frames:
        multiple = "*" if getattr(frame, "multiple", False) else ""
        tag = getattr(frame, "delivery_tag", "")
        found.append(f"{type(frame).__name__}{tag}{multiple}")
    return found


# -------------------------------------------------------------------------------------------------- Consumer


async def test_a_consumer_is_its_tag_and_tells_how_it_is() -> None:
    handler = Handler()
    async with linked() as link:
        channel, consumer = await consuming(link, handler, 3, concurrency=2)
        assert (consumer, str(consumer), f"{consumer}", {consumer: 1}["tag"]) == ("tag", "tag", "tag", 1)
        assert type(str(consumer)) is str
        assert (consumer.delivered, consumer.in_flight, consumer.waiting, consumer.failed) == (3, 2, 1, 0)
        assert consumer.is_active
        consumer.set_concurrency(3)
        await turns()
        assert consumer.in_flight == 3
        with pytest.raises(ValueError, match="concurrency"):
            consumer.set_concurrency(0)
        queue = await link.queue(channel)
        await link.answer(queue.cancel(consumer), Basic.Cancel, Basic.CancelOk("tag"))
        assert not consumer.is_active
        assert consumer.in_flight == 3
        handler.go.set()
        assert names(await link.sent()) == ["Ack3*"]


@pytest.mark.parametrize(
    ("options", "prefetch"),
    [({"concurrency": 7}, 14), ({"concurrency": 7, "prefetch": 3}, 3), ({"concurrency": 40_000}, 65_535)],
)
async def test_the_prefetch_is_twice_the_concurrency_unless_told_otherwise(
    options: dict[str, Any], prefetch: int
) -> None:
    async with linked() as link:
        channel = await link.channel()
        queue = await link.queue(channel)
        consume = asyncio.ensure_future(queue.consume(print, consumer_tag="tag", **options))
        _, qos = await link.session.expect(Basic.Qos)
        assert (qos.prefetch_count, qos.global_) == (prefetch, False)
        link.session.send(1, Basic.QosOk())
        await link.session.expect(Basic.Consume)
        link.session.send(1, Basic.ConsumeOk("tag"))
        await within(consume)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"concurrency": 0}, "concurrency"),
        ({"on_error": "drop"}, "on_error"),
        ({"ack_batch": 1}, "ack_batch"),
        ({"ack_batch": 10, "prefetch": 5}, "ack_batch"),
        ({"ack_batch": 10, "no_ack": True}, "ack_batch"),
    ],
)
async def test_what_makes_no_sense_is_refused(options: dict[str, Any], error: str) -> None:
    async with linked() as link:
        queue = await link.queue(await link.channel())
        with pytest.raises(ValueError, match=error):
            await queue.consume(print, **options)
        with pytest.raises(TypeError, match="coroutine function"):
            await queue.consume(Handler(), thread=True)  # type: ignore[arg-type]
        assert await link.sent() == []


@pytest.mark.expects_errors
async def test_failures_that_fill_the_prefetch_show_in_health(caplog: pytest.LogCaptureFixture) -> None:
    async def callback(message: IncomingMessage) -> None:
        raise LookupError

    async with linked() as link:
        _, consumer = await consuming(link, callback, 1, prefetch=2)
        assert link.connection.health()
        link.session.deliver(1, "tag", 2)
        await until(lambda: consumer.failed == 2)
        health = link.connection.health()
        assert health.status == "degraded"
        assert "'tag' gets nothing more: 2 messages" in health.reasons[0]
        assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
        await link.answer(consumer.stop(), Basic.Cancel, Basic.CancelOk("tag"))


# ------------------------------------------------------------------------------------------------------ stop()


async def test_cancel_goes_first_then_what_waits_and_acks_until_the_end() -> None:
    handler = Handler()
    async with linked() as link:
        channel, consumer = await consuming(link, handler, 3, concurrency=1)
        stopping = asyncio.create_task(consumer.stop(5))
        await link.session.expect(Basic.Cancel)
        link.session.deliver(1, "tag", 4)  # on its way when the broker was told
        await turns()
        link.session.send(1, Basic.CancelOk("tag"))
        assert names(await link.sent()) == ["Nack2", "Nack3", "Nack4"]
        assert not stopping.done()
        assert not consumer.is_active
        publish = channel.default_exchange.publish(Message(b"result"), "key")  # as a handler would
        await link.session.expect_publish()
        link.session.send(1, Basic.Ack(1))
        await within(publish)
        handler.go.set()
        assert await within(stopping) == DrainReport(drained=1, requeued=3)
        assert names(await link.sent()) == ["Ack1*"]
        assert handler.began == [b"1"]
        assert await within(consumer.stop()) == DrainReport(drained=1, requeued=3)
        assert await link.sent() == []


async def test_the_broker_cancels_while_it_is_stopped() -> None:
    handler = Handler()
    async with linked() as link:
        _, consumer = await consuming(link, handler, 2, concurrency=1)
        stopping = asyncio.create_task(consumer.stop(5))
        await link.session.expect(Basic.Cancel)
        link.session.send(1, Basic.Cancel("tag", True), Basic.CancelOk("tag"))
        assert await link.sent() == []
        handler.go.set()
        assert await within(stopping) == DrainReport(drained=1, requeued=1)
        assert await link.sent() == []  # the broker has taken all of it back


async def test_a_consumer_that_was_cancelled_before_is_not_cancelled_again() -> None:
    handler = Handler()
    async with linked() as link:
        channel, consumer = await consuming(link, handler, 1)
        queue = await link.queue(channel)
        await link.answer(queue.cancel("tag"), Basic.Cancel, Basic.CancelOk("tag"))
        stopping = asyncio.create_task(consumer.stop(0))
        assert await within(stopping) == DrainReport(requeued=1)
        assert names(await link.sent()) == ["Nack1"]


async def test_the_link_is_lost_while_it_is_stopped() -> None:
    handler = Handler()
    async with linked() as link:
        _, consumer = await consuming(link, handler, 2, concurrency=1)
        stopping = asyncio.create_task(consumer.stop(60))
        await link.session.expect(Basic.Cancel)
        link.session.reset()
        assert await within(stopping) == DrainReport(requeued=2)
        assert handler.cancelled == [b"1"]


async def test_a_cancelled_stop_has_told_the_broker_and_callbacks_go_on() -> None:
    handler = Handler()
    async with linked() as link:
        _, consumer = await consuming(link, handler, 2, concurrency=1)
        stopping = asyncio.create_task(consumer.stop(60))
        await link.session.expect(Basic.Cancel)
        stopping.cancel()
        await asyncio.wait([stopping])
        link.session.send(1, Basic.CancelOk("tag"))
        assert names(await link.sent()) == ["Nack2"]
        handler.go.set()
        assert names(await link.sent()) == ["Ack1*"]


async def test_a_callback_stops_its_own_consumer() -> None:
    reports: list[DrainReport] = []

    async def callback(message: IncomingMessage) -> leveret.Verdict:
        reports.append(await consumers[0].stop(60))
        return Ack

    consumers: list[Consumer] = []
    async with linked() as link:
        channel = await link.channel()
        queue = await link.queue(channel)
        call = queue.consume(callback, consumer_tag="tag")
        consumers.append(await link.answer(call, Basic.Consume, Basic.ConsumeOk("tag")))
        link.session.deliver(1, "tag", 1)
        await link.session.expect(Basic.Cancel)
        link.session.send(1, Basic.CancelOk("tag"))
        await until(lambda: reports)
        assert names(await link.sent()) == ["Ack1*"]
        assert reports == [DrainReport()]


# ---------------------------------------------------------------------------------------------- batches of acks


async def test_acks_are_written_in_batches_and_what_is_left_when_it_stops() -> None:
    async def callback(message: IncomingMessage) -> leveret.Verdict | None:
        return None if message.body == b"2" else Ack

    async with linked() as link:
        channel, consumer = await consuming(link, callback, 4, ack_batch=3)
        assert names(await link.sent()) == ["Ack1*", "Ack3", "Ack4"]  # three; 2 was not acknowledged
        link.session.deliver(1, "tag", 5)
        link.session.deliver(1, "tag", 6)
        await until(lambda: consumer.delivered == 6)
        await turns()
        stopping = asyncio.create_task(consumer.stop())
        assert [(await link.session.expect(Basic.Ack))[1].delivery_tag for _ in range(2)] == [5, 6]
        await link.session.expect(Basic.Cancel)
        link.session.send(1, Basic.CancelOk("tag"))
        assert await within(stopping) == DrainReport()
        assert not channel.handler_tasks


async def test_a_batch_is_written_after_a_while() -> None:
    async with linked() as link:
        await consuming(link, lambda message: Ack, 2, ack_batch=100)
        _, ack = await link.session.expect(Basic.Ack)
        assert (ack.delivery_tag, ack.multiple) == (2, True)


@pytest.mark.parametrize("how", ["channel", "connection"])
async def test_closing_writes_the_batch_first(how: str) -> None:
    async with linked() as link:
        channel, _ = await consuming(link, lambda message: Ack, 2, ack_batch=100)
        closing = asyncio.create_task(channel.close() if how == "channel" else link.connection.close())
        _, ack = await link.session.expect(Basic.Ack)
        assert (ack.delivery_tag, ack.multiple) == (2, True)
        await within(asyncio.gather(closing, link.finish()) if how == "connection" else answered(link, closing))


async def answered(link: Link, closing: asyncio.Task[Any]) -> None:
    await link.session.expect(commands.Channel.Close)
    link.session.send(1, commands.Channel.CloseOk())
    await closing


async def test_a_lost_link_forgets_the_batch() -> None:
    kept: list[IncomingMessage] = []
    async with linked() as link:
        await consuming(link, kept.append, 2, ack_batch=100)
        await kept[0].ack()
        link.session.reset()
        await within(link.connection.closed())
        with pytest.raises(DeliveryLost):
            await kept[1].ack()


# ------------------------------------------------------------------------------------- closing with drain


async def drained(link: Link, close: Any, after: tuple[int, Any] = (0, None)) -> tuple[DrainReport, list[str]]:
    """Play the broker until *close* is done; what it returned, and what was sent.

    *after* that many frames, call something.
    """
    sent: list[str] = []

    async def play() -> None:
        async for channel, frame in link.session.frames():
            sent.extend(names([frame]))
            if len(sent) == after[0]:
                after[1]()
            if isinstance(frame, Basic.Cancel):
                link.session.send(channel, Basic.CancelOk(frame.consumer_tag))
            elif isinstance(frame, commands.Channel.Close):
                link.session.send(channel, commands.Channel.CloseOk())
            elif isinstance(frame, commands.Connection.Close):
                link.session.send(0, commands.Connection.CloseOk())
                with contextlib.suppress(OSError):
                    link.session.eof()

    playing = asyncio.create_task(play())
    try:
        return await within(close), sent
    finally:
        playing.cancel()
        await asyncio.wait([playing])


@pytest.mark.parametrize("how", ["channel", "connection"])
async def test_close_drains_callbacks_and_iterators(how: str) -> None:
    handler = Handler()
    async with linked() as link:
        channel, consumer = await consuming(link, handler, 2, concurrency=1)
        iterator = (await link.queue(channel)).iterator(consumer_tag="other", prefetch=2)
        await link.answer(iterator.consume(), Basic.Consume, Basic.ConsumeOk("other"))
        for n in (3, 4):
            link.session.deliver(1, "other", n, b"%d" % n)

        async def at_work() -> list[bytes]:
            message = await anext(iterator)
            is_at_work.set()
            await handler.go.wait()
            await message.ack()
            return [message.body async for message in iterator]

        is_at_work = asyncio.Event()
        working = asyncio.create_task(at_work())
        await within(is_at_work.wait())
        await link.fence()
        close = channel.close(drain=5) if how == "channel" else link.connection.close(drain=5)
        report, sent = await drained(link, close, (4, handler.go.set))
        assert report == DrainReport(drained=2, requeued=2)
        assert await within(working) == []
        assert sorted(sent[:4]) == ["Cancel", "Cancel", "Nack2", "Nack4"]
        assert sorted(sent[4:-1]) in (["Ack1*", "Ack3"], ["Ack3"], ["Ack1*", "Ack3*"], ["Ack3*"])
        assert sent[-1] == "Close"
        assert channel.is_closed
        assert not consumer.is_active


async def test_close_without_drain_returns_none_and_with_it_again_a_report() -> None:
    async with linked() as link:
        channel = await link.channel()
        assert (await drained(link, channel.close()))[0] is None
        assert await within(channel.close(drain=5)) == DrainReport()
        with pytest.raises(ValueError, match="drain"):
            await channel.close(drain=-1)
        with pytest.raises(ValueError, match="drain"):
            await link.connection.close(drain=-1)
        assert not link.connection.is_closed


async def test_close_waits_for_what_the_last_callback_published() -> None:
    handler = Handler()
    outcomes: list[object] = []

    async def callback(message: IncomingMessage) -> leveret.Verdict:
        await handler(message)
        publish = channel.default_exchange.publish(Message(b"result"), "key")
        publish.add_done_callback(outcomes.append)  # type: ignore[attr-defined]
        return Ack

    async with linked() as link:
        channel, _ = await consuming(link, callback, 1)
        closing = asyncio.create_task(link.connection.close(drain=5))
        await link.session.expect(Basic.Cancel)
        link.session.send(1, Basic.CancelOk("tag"))
        handler.go.set()
        await link.session.expect_publish()
        await link.session.expect(Basic.Ack)
        assert not outcomes
        assert not closing.done()
        link.session.send(1, Basic.Ack(1))
        report, _ = await drained(link, closing)
        assert report == DrainReport(drained=1)
        assert len(outcomes) == 1


async def test_a_callback_closes_the_connection_and_drains() -> None:
    reports: list[DrainReport] = []
    handler = Handler()

    async def callback(message: IncomingMessage) -> leveret.Verdict:
        if message.body == b"2":
            reports.append(await link.connection.close(drain=60))
        else:
            await handler(message)
        return Ack

    async with linked(lenient=True) as link:
        await consuming(link, callback, 2)
        handler.go.set()
        await drained(link, link.connection.closed())
        await until(lambda: reports)
        assert reports == [DrainReport(drained=1)]


async def test_whoever_iterates_may_drain_the_connection() -> None:
    async with linked() as link:
        iterator = (await link.queue(await link.channel())).iterator(consumer_tag="tag")
        await link.answer(iterator.consume(), Basic.Consume, Basic.ConsumeOk("tag"))
        link.session.deliver(1, "tag", 1)
        async for message in iterator:
            report, _ = await drained(link, link.connection.close(drain=60))
            assert report == DrainReport()
            assert not message.processed
            break


async def test_close_without_drain_ends_one_that_drains() -> None:
    handler = Handler()
    async with linked(lenient=True) as link:
        await consuming(link, handler, 1)
        draining = asyncio.create_task(link.connection.close(drain=60))
        await turns()

        async def both() -> DrainReport:
            await link.connection.close()
            return await draining

        report, _ = await drained(link, both())
        assert report == DrainReport(requeued=1)
        assert handler.cancelled == [b"1"]


async def test_a_cancelled_close_that_drains_has_closed_it() -> None:
    handler = Handler()
    async with linked(lenient=True) as link:
        await consuming(link, handler, 1)
        draining = asyncio.create_task(link.connection.close(drain=60))
        await turns()
        draining.cancel()
        await within(asyncio.wait([draining]))
        assert draining.cancelled()
        assert link.connection.is_closed
        await until(lambda: handler.cancelled)


async def test_close_takes_no_longer_than_drain_and_timeout() -> None:
    end = asyncio.Event()

    async def stubborn(message: IncomingMessage) -> None:
        while not end.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await end.wait()

    async with linked(lenient=True) as link:
        await consuming(link, stubborn, 1)
        began = asyncio.get_running_loop().time()
        report = await within(link.connection.close(drain=0.05, timeout=0.1))  # the broker says nothing
        assert asyncio.get_running_loop().time() - began < 1
        assert report == DrainReport(abandoned=1)
        end.set()
        await turns()


async def test_a_thread_does_not_hold_up_the_end() -> None:
    release = threading.Event()
    began = threading.Event()

    def callback(message: IncomingMessage) -> leveret.Verdict:
        began.set()
        release.wait(5)
        return Ack

    async with linked() as link:
        _, consumer = await consuming(link, callback, 1, thread=True)
        await asyncio.to_thread(began.wait, 5)
        assert consumer.in_flight == 1
        report, sent = await drained(link, link.connection.close(drain=0))
        assert report == DrainReport(requeued=1)
        assert sent == ["Cancel", "Nack1", "Close"]
        release.set()


# ----------------------------------------------------------------------------------------------------- robust


async def test_a_consumer_stays_itself_over_a_reconnect() -> None:
    handler = Handler()
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        consumer = await (await queue_on(channel)).consume(handler, concurrency=1)
        server.link.deliver("q", 1, b"old")
        server.link.deliver("q", 2, b"waits")
        await until(lambda: consumer.delivered == 2)
        await lost(connection, server)
        assert consumer.is_active
        assert consumer.waiting == 0
        server.is_down = False
        await within(connection.ready())
        server.link.deliver("q", 1, b"new")
        await until(lambda: consumer.waiting == 1)  # the old callback still runs, and counts
        assert handler.began == [b"old"]
        handler.go.set()
        await until(lambda: handler.began == [b"old", b"new"])
        assert await within(consumer.stop()) == DrainReport(drained=consumer.in_flight)
        assert not consumer.is_active
        assert connection.health()


async def test_there_is_nothing_to_wait_for_while_it_reconnects() -> None:
    handler = Handler()
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        consumer = await (await queue_on(channel)).consume(handler)
        server.link.deliver("q", 1, b"1")
        await until(lambda: handler.began)
        await lost(connection, server)
        assert await within(connection.close(drain=60)) == DrainReport(requeued=1)
        assert handler.cancelled == [b"1"]
        assert not consumer.is_active


async def test_a_consumer_that_is_stopped_while_it_reconnects_does_not_come_back() -> None:
    handler = Handler()
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        consumer = await (await queue_on(channel)).consume(handler)
        await lost(connection, server)
        assert await within(consumer.stop()) == DrainReport()
        server.is_down = False
        await within(connection.ready())
        assert not server.link.all(Basic.Consume)


async def test_a_link_that_is_lost_while_a_connection_drains() -> None:
    handler = Handler()
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        await (await queue_on(channel)).consume(handler)
        server.link.deliver("q", 1, b"1")
        await until(lambda: handler.began)
        closing = asyncio.create_task(connection.close(drain=60))
        await until(lambda: server.link.all(Basic.Cancel))
        server.may_leave = True
        server.drop()
        assert await within(closing) == DrainReport(requeued=1)


async def test_a_robust_channel_drains() -> None:
    handler = Handler()
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        await (await queue_on(channel)).consume(handler)
        server.link.deliver("q", 1, b"1")
        await until(lambda: handler.began)
        closing = asyncio.create_task(channel.close(drain=60))
        await until(lambda: server.link.all(Basic.Cancel))
        await within(channel.declare_queue("other"))  # works until the end
        handler.go.set()
        assert await within(closing) == DrainReport(drained=1)
        assert channel.is_closed
        assert [ack.delivery_tag for ack in server.link.all(Basic.Ack)] == [1]


# ----------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_and_closes(number: signal.Signals) -> None:
    handler = Handler()
    before = signal.getsignal(number)
    async with linked() as link:
        await consuming(link, handler, 1)
        running = asyncio.create_task(leveret.run_until_signalled(link.connection, drain=60))
        await turns()
        os.kill(os.getpid(), number)
        await link.session.expect(Basic.Cancel)
        link.session.send(1, Basic.CancelOk("tag"))
        handler.go.set()
        report, _ = await drained(link, running)
        assert report == DrainReport(drained=1)
        assert link.connection.is_closed
    assert signal.getsignal(number) == before


async def test_a_second_signal_closes_at_once() -> None:
    handler = Handler()
    async with linked(lenient=True) as link:
        await consuming(link, handler, 1)
        running = asyncio.create_task(leveret.run_until_signalled(link.connection, drain=60))
        await turns()
        os.kill(os.getpid(), signal.SIGTERM)
        await link.session.expect(Basic.Cancel)
        os.kill(os.getpid(), signal.SIGTERM)
        report, _ = await drained(link, running)
        assert report == DrainReport(requeued=1)
        assert handler.cancelled == [b"1"]


async def test_a_connection_that_is_lost_for_good_ends_it() -> None:
    async with linked() as link:
        running = asyncio.create_task(leveret.run_until_signalled(link.connection))
        await turns()
        link.session.reset()
        with pytest.raises(ConnectionClosed):
            await within(running)


async def test_a_program_that_closes_its_connection_ends_it() -> None:
    async with linked() as link:
        running = asyncio.create_task(leveret.run_until_signalled(link.connection))
        await turns()
        await drained(link, link.connection.close())
        assert await within(running) == DrainReport()


async def test_a_cancelled_wait_for_signals_closes_the_connection() -> None:
    async with linked() as link:
        running = asyncio.create_task(leveret.run_until_signalled(link.connection))
        await turns()
        running.cancel()
        await drained(link, asyncio.wait([running]))
        assert link.connection.is_closed


async def test_a_loop_without_signals_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise NotImplementedError

    async with linked() as link:
        monkeypatch.setattr(asyncio.get_running_loop(), "add_signal_handler", refuse, raising=False)
        call = leveret.run_until_signalled(link.connection)
        with pytest.raises(RuntimeError, match="handles no signals"):
            await drained(link, call)
    with pytest.raises(ValueError, match="needs a connection"):
        await leveret.run_until_signalled()
