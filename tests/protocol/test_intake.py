"""Reading is throttled while consumers without a prefetch hold too much: the link lives, and who waits is served."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from pamqp import commands

from leveret import IncomingMessage, Message
from leveret.wire import intake
from tests.protocol.kit import Link, linked, turns, until, within
from tests.protocol.robust_kit import again, robust

HIGH = 1024 * 1024
BODY = bytes(8 * 1024)
MANY = HIGH // len(BODY)

MORE = MANY // 8


@contextlib.contextmanager
def marks(*, longest: float = 3600.0, high: int = HIGH, sip: int = 32 * 1024) -> Iterator[None]:
    """Marks that a test reaches, and no sips that nobody waits for."""
    with contextlib.ExitStack() as stack:
        for name, value in {"HIGH": high, "LOW": high // 2, "_LONGEST": longest, "_SIP": sip}.items():
            stack.enter_context(mock.patch.object(intake, name, value))
        yield


def of(connection: Any) -> Any:
    return connection._transport.intake


class Handler:
    """Waits with every message until it is told to go."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.done = 0
        self.begun: list[IncomingMessage] = []

    async def __call__(self, message: IncomingMessage) -> None:
        self.begun.append(message)
        await self.go.wait()
        self.done += 1


def flood(link: Link, count: int = MANY, first: int = 1, tag: str = "tag") -> None:
    for number in range(first, first + count):
        link.session.deliver(1, tag, number, BODY)


async def throttle(link: Link, **kwargs: Any) -> tuple[Any, Handler]:
    """A channel, and the handler of its consumer, which has more than it may have, with a little more to come."""
    channel = await link.channel()
    handler = Handler()
    await link.consume(channel, handler, **kwargs)
    flood(link)
    await until(lambda: of(link.connection).is_throttled)
    flood(link, MORE, MANY + 1)
    return channel, handler


async def test_a_slow_handler_throttles_and_going_on_frees() -> None:
    with marks():
        async with linked(lenient=True) as link:
            _, handler = await throttle(link)
            await until(lambda: len(handler.begun) * len(BODY) > HIGH / 2)
            assert of(link.connection)._count() < 1.5 * MANY
            health = link.connection.health()
            assert health.status == "degraded"
            assert "reading is throttled" in health.reasons[0]
            handler.go.set()
            await until(lambda: handler.done == MANY + MORE)
            assert not of(link.connection).is_throttled
            assert link.connection.health().status == "ready"


async def test_an_iterator_that_nobody_asks_throttles() -> None:
    with marks():
        async with linked(lenient=True) as link:
            channel = await link.channel()
            iterator = (await link.queue(channel)).iterator(consumer_tag="tag", no_ack=True)
            await link.answer(iterator.consume(), commands.Basic.Consume, commands.Basic.ConsumeOk("tag"))
            flood(link, 4 * MANY)
            await until(lambda: of(link.connection).is_throttled)
            await turns(20)
            assert len(iterator._messages) < 3 * MANY
            async with asyncio.timeout(3):
                assert len([await anext(iterator) for _ in range(4 * MANY)]) == 4 * MANY


@pytest.mark.parametrize("how", ["prefetch=", "set_qos()"])
async def test_consumers_with_a_prefetch_do_not(how: str) -> None:
    with marks():
        async with linked(lenient=True) as link:
            channel = await link.channel()
            handler = Handler()
            queue = await link.queue(channel)
            if how == "set_qos()":
                await link.answer(channel.set_qos(1000), commands.Basic.Qos, commands.Basic.QosOk())
                starting = asyncio.create_task(queue.consume(handler, consumer_tag="tag"))
            else:
                starting = asyncio.create_task(queue.consume(handler, consumer_tag="tag", prefetch=1000))
                await link.session.expect(commands.Basic.Qos)
                link.session.send(1, commands.Basic.QosOk())
            await link.session.expect(commands.Basic.Consume)
            link.session.send(1, commands.Basic.ConsumeOk("tag"))
            await within(starting)
            flood(link, 2 * MANY)
            await until(lambda: len(handler.begun) == 2 * MANY)
            assert not of(link.connection).is_throttled
            handler.go.set()


async def test_a_publish_from_a_handler_is_confirmed() -> None:
    with marks():
        async with linked(lenient=True) as link:
            channel, handler = await throttle(link)
            publishing = asyncio.ensure_future(channel.default_exchange.publish(Message(b""), "key"))
            await link.session.expect_publish()
            link.session.send(1, commands.Basic.Ack(1))  # behind all that is on its way
            await within(publishing)
            assert of(link.connection).is_throttled
            handler.go.set()


@pytest.mark.parametrize("what", ["declare", "cancel", "close the channel", "update the secret"])
async def test_calls_are_answered(what: str) -> None:
    with marks():
        async with linked(lenient=True) as link:
            channel, handler = await throttle(link)
            queue = await link.queue(channel)
            if what == "declare":
                await link.answer(
                    channel.declare_queue("other"), commands.Queue.Declare, commands.Queue.DeclareOk("other", 0, 0)
                )
            elif what == "cancel":
                await link.answer(queue.cancel("tag"), commands.Basic.Cancel, commands.Basic.CancelOk("tag"))
            elif what == "close the channel":
                await link.answer(channel.close(), commands.Channel.Close, commands.Channel.CloseOk())
            else:
                await link.fence()
            handler.go.set()


async def test_the_broker_may_close_the_channel_while_somebody_waits() -> None:
    with marks():
        async with linked(lenient=True) as link:
            channel, handler = await throttle(link)
            declaring = asyncio.create_task(channel.declare_queue("other"))
            await link.session.expect(commands.Queue.Declare)
            link.session.send(1, commands.Channel.Close(404, "NOT_FOUND", 50, 10))
            with pytest.raises(Exception, match="NOT_FOUND"):
                await within(declaring)
            await until(lambda: not of(link.connection).is_throttled)  # what its consumers hold comes again
            handler.go.set()


async def test_an_idle_consumer_gets_its_message() -> None:
    with marks(), mock.patch.object(intake, "_WHILE_IDLE", 0.001):
        async with linked(lenient=True) as link:
            channel, handler = await throttle(link)
            got: list[IncomingMessage] = []
            await link.consume(channel, got.append, "idle", no_ack=True)
            link.session.deliver(1, "idle", 1000, b"reply")
            await until(lambda: got)
            assert of(link.connection).is_throttled
            handler.go.set()


async def test_unblocking_is_noticed() -> None:
    with marks():
        async with linked(lenient=True) as link:
            channel = await link.channel()
            handler = Handler()
            await link.consume(channel, handler)
            link.session.send(0, commands.Connection.Blocked("low on memory"))
            await until(lambda: link.connection.blocked)
            flood(link)
            await until(lambda: of(link.connection).is_throttled)
            link.session.send(0, commands.Connection.Unblocked())
            await until(lambda: link.connection.blocked is None)
            handler.go.set()


async def test_closing_takes_no_time() -> None:
    with marks():
        async with linked(lenient=True) as link:
            await throttle(link)
            async with asyncio.timeout(1):
                await asyncio.gather(link.connection.close(), link.finish())


async def test_silence_that_is_our_doing_does_not_count_and_heartbeats_go_on() -> None:
    with marks():
        async with linked(query="heartbeat=1", lenient=True) as link:
            _, handler = await throttle(link)
            loop = asyncio.get_running_loop()
            begun = loop.time()
            for _ in range(5):  # every half interval, whatever the server says
                await link.session.expect_heartbeat(timeout=1)
            assert loop.time() - begun > 2.0
            assert not link.connection.is_closed
            handler.go.set()
            await until(lambda: not of(link.connection).is_throttled)
            resumed = loop.time()
            await within(link.connection.closed(), 4)  # the server has its time again, and then it is dead
            assert 1.9 < loop.time() - resumed < 3.1


async def test_a_server_that_is_dead_is_found_dead_while_somebody_waits() -> None:
    """A socket that is open, though only for a sip, is being listened to."""
    with marks():
        async with linked(query="heartbeat=1", lenient=True) as link:
            channel = await link.channel()
            handler = Handler()
            await link.consume(channel, handler)
            flood(link)
            await until(lambda: of(link.connection).is_throttled)
            publishing = asyncio.ensure_future(channel.default_exchange.publish(Message(b""), "key"))
            with pytest.raises(Exception, match="silent"):
                await within(publishing, 4)
            handler.go.set()


async def test_a_lost_link_frees_and_the_next_one_begins_anew() -> None:
    with marks(longest=0.01):
        async with robust() as (connection, server):
            channel = await connection.channel()
            queue = await channel.declare_queue("q")
            handler = Handler()
            await queue.consume(handler, no_ack=True)
            for number in range(1, 2 * MANY):
                server.link.deliver("q", number, BODY)
            await until(lambda: of(connection).is_throttled)
            old = of(connection)
            await again(connection, server)
            assert not old.is_throttled
            assert not of(connection).is_throttled
            assert connection.health().status == "ready"
            handler.go.set()


UVLOOP = """
import uvloop
from tests.protocol import test_intake, test_batches
for test in (
    test_intake.test_a_slow_handler_throttles_and_going_on_frees,
    test_intake.test_a_publish_from_a_handler_is_confirmed,
    test_intake.test_closing_takes_no_time,
    test_intake.test_a_lost_link_frees_and_the_next_one_begins_anew,
    test_batches.test_a_batch_is_handed_out_when_it_is_full,
    test_batches.test_a_batch_is_handed_out_when_its_first_message_has_waited_long_enough,
    test_batches.test_leaving_gives_back_what_was_not_handed_out,
):
    uvloop.run(test())
"""


def test_under_uvloop() -> None:
    pytest.importorskip("uvloop")
    run = subprocess.run(
        [sys.executable, "-c", UVLOOP],
        check=False,
        timeout=60,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
