"""What comes back after a loss, wherever it strikes, and what does not stop the rest from coming back."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
from pamqp import base, commands

from leveret import (
    ConnectionState,
    ExchangeType,
    IncomingMessage,
    Message,
    RobustChannel,
    RobustConnection,
    RobustExchange,
)
from leveret.exceptions import (
    ChannelAccessRefused,
    ChannelClosed,
    ChannelInvalidStateError,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    ConnectionClosed,
    ConsumerCancelled,
    DeliveryLost,
    DuplicateConsumerTag,
    TopologyError,
)
from leveret.queue import Queue
from leveret.records import Record
from tests.protocol.kit import turns, until, within
from tests.protocol.robust_kit import (
    Held,
    Server,
    ServerLink,
    again,
    back,
    channel_of,
    closed_by_broker,
    drop,
    fence,
    kill,
    lost,
    queue_on,
    refuse,
    robust,
    silent,
)
from tests.support.peer import CAPABILITIES, Session

CONSUME, CANCEL = commands.Basic.Consume, commands.Basic.Cancel
DECLARE = commands.Queue.Declare


def troubles(connection: RobustConnection) -> list[tuple[str, Exception]]:
    found: list[tuple[str, Exception]] = []

    def note(_: object, record: Record, error: Exception) -> None:
        found.append((str(record), error))

    connection.on_recovery_error.add(note)
    return found


class World(list[IncomingMessage]):
    """Two channels, with everything that can be restored; a list of what their callbacks got."""

    one: RobustChannel
    two: RobustChannel

    async def build(self, connection: RobustConnection) -> None:
        self.one = await channel_of(connection)
        await self.one.set_qos(7)
        source = await self.one.declare_exchange("source", ExchangeType.TOPIC)
        target = await self.one.declare_exchange("target", internal=True)
        await target.bind(source, "#")
        for name in ("q1", "q2"):
            queue = await self.one.declare_queue(name)
            await queue.bind(target, name)
            await queue.consume(self.append, consumer_tag=name)
        self.two = await channel_of(connection, publisher_confirms=False)
        await self.two.set_qos(3)
        await (await self.two.declare_queue("q3", auto_delete=True)).consume(self.append, consumer_tag="q3")

    @staticmethod
    def check(link: ServerLink) -> None:
        """All was restored on *link*, and nothing twice."""
        assert sorted(e.exchange for e in link.all(commands.Exchange.Declare)) == ["source", "target"]
        assert sorted(q.queue for q in link.all(DECLARE)) == ["q1", "q2", "q3"]
        assert sorted(b.routing_key for b in link.all(commands.Queue.Bind)) == ["q1", "q2"]
        assert len(link.all(commands.Exchange.Bind)) == 1
        assert sorted(q.prefetch_count for q in link.all(commands.Basic.Qos)) == [3, 7]
        assert Counter(c.consumer_tag for c in link.all(CONSUME)) == {"q1": 1, "q2": 1, "q3": 1}
        assert len(link.all(commands.Confirm.Select)) == 1
        order = [type(method) for _, method in link.methods]
        assert max(i for i, kind in enumerate(order) if kind is DECLARE) < order.index(commands.Queue.Bind)
        for channel in {c for c, m in link.methods if isinstance(m, CONSUME)}:
            kinds = [type(m) for c, m in link.methods if c == channel]
            assert kinds.index(commands.Basic.Qos) < kinds.index(CONSUME)


def handed(got: list[IncomingMessage]) -> list[bytes]:
    return [message.body for message in got]


# ---------------------------------------------------------------------------------------- losses wherever they strike


async def replay_length() -> int:
    async with robust() as (connection, server):
        await World().build(connection)
        link = await again(connection, server)
        await fence(connection)
        World.check(link)
        return sum(not isinstance(m, commands.Connection.UpdateSecret) for _, m in link.methods)


@pytest.mark.parametrize("how", ["drop", "kill"])
async def test_after_a_loss_at_any_frame_of_replay_all_is_restored_once(how: str) -> None:
    length = await replay_length()
    assert length > 15
    async with robust() as (connection, server):
        await World().build(connection)
        for nth in range(length):
            countdown = iter(range(nth))
            first = len(server.links)

            def at_the_nth(_: object, left: Any = countdown) -> bool:
                return next(left, None) is None

            action = drop if how == "drop" else lambda link, *_: link.kill()
            server.at(base.Frame, action, link=first, where=at_the_nth)
            server.drop()
            await server.up(first)
            await until(lambda n=first: server.links[n].over)  # type: ignore[misc]
            await server.up(first + 1)
            await within(connection.ready())
            await fence(connection)
            assert server.link.number == first + 1, f"frame {nth}"
            World.check(server.link)
            server.forget_rules()


class Cutting(Server):
    """Sends of its link of number ``next_cut[0]`` so many bytes as ``next_cut[1]``, and no more."""

    next_cut = (-1, 0)

    async def script(self, session: Session) -> None:
        if session.number == self.next_cut[0]:
            writer: Any = session._writer
            write, left = writer.write, self.next_cut[1]

            def limited(data: bytes) -> None:
                nonlocal left
                if left > 0:
                    write(data[:left])
                    left -= len(data)
                    if left <= 0:
                        self.links[session.number].over = True
                        writer.write_eof()

            writer.write = limited
        await super().script(session)


class Counting(Server):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()

    async def script(self, session: Session) -> None:
        writer: Any = session._writer
        write = writer.write

        def counted(data: bytes) -> None:
            self.counts[session.number] += len(data)
            write(data)

        writer.write = counted
        await super().script(session)


async def output_length() -> int:
    """Bytes that the server writes from its first word until all is restored."""
    server = Counting()
    async with robust(server=server) as (connection, _):
        await World().build(connection)
        await again(connection, server)
        return server.counts[1]


@pytest.mark.parametrize("how", ["drop", "kill"])
@pytest.mark.parametrize(
    "kind",
    [DECLARE, commands.Queue.Bind, commands.Basic.Qos, CONSUME],
    ids=["declare", "bind", "qos", "consume"],
)
async def test_a_loss_is_no_refusal(kind: type[base.Frame], how: str) -> None:
    async with robust() as (connection, server):
        await World().build(connection)
        found = troubles(connection)
        server.at(kind, drop if how == "drop" else lambda link, *_: link.kill(), link=1)
        await again(connection, server)
        assert [(what, str(error)) for what, error in found] == []


async def test_a_cut_after_any_number_of_bytes_of_the_server_is_survived() -> None:
    """All of them with LEVERET_EVERY_CUT=1; otherwise a tenth."""
    length = await output_length()
    cuts = list(range(1, length))
    if "LEVERET_EVERY_CUT" not in os.environ:
        cuts = sorted(random.Random(length).sample(cuts, len(cuts) // 10))
    server = Cutting()
    async with robust(server=server) as (connection, _):
        await World().build(connection)
        for cut in cuts:
            number = len(server.links)
            server.next_cut = (number, cut)
            server.drop()
            await until(lambda n=number: len(server.links) > n + 1)  # type: ignore[misc]
            await within(connection.ready())
            await fence(connection)
            assert server.link.number == number + 1, f"cut after {cut}"
            World.check(server.link)


async def test_a_loss_while_recovery_opens_its_channel_is_no_error() -> None:
    async with robust() as (connection, server):
        await (await channel_of(connection)).declare_queue("q")
        server.at(commands.Channel.Open, drop, link=1)
        with mock.patch("leveret.recovery._log.exception") as logged:
            await again(connection, server)
        logged.assert_not_called()


async def test_a_declare_that_is_not_answered_in_time_is_tried_again() -> None:
    async with robust() as (connection, server):
        await World().build(connection)
        server.at(DECLARE, silent, link=1, where=lambda m: m.queue == "q1")
        with mock.patch("leveret.restore._STEP", 0.05):
            link = await again(connection, server)
            await until(lambda: connection.health().status == "ready")
        await fence(connection)
        assert Counter(c.consumer_tag for c in server.link.all(CONSUME)) == {"q1": 1, "q2": 1, "q3": 1}
        assert link is server.link


async def test_channels_that_are_not_opened_in_time_cost_the_link() -> None:
    async with robust() as (connection, server):
        await World().build(connection)
        server.at(commands.Channel.Open, silent, link=1, where=lambda _: len(server.link.all(DECLARE)) == 3)
        with mock.patch("leveret.restore._STEP", 0.05):
            link = await again(connection, server)
        assert link.number == 2
        await fence(connection)
        World.check(link)


async def test_a_hundred_and_fifty_queues_come_back_once() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        for n in range(150):
            await channel.declare_queue(f"q{n}")
        link = await again(connection, server)
        assert Counter(q.queue for q in link.all(DECLARE)) == {f"q{n}": 1 for n in range(150)}


# ---------------------------------------------------------------------------------------------- calls while down

CALLS: dict[str, Callable[[RobustChannel, Queue, float | None], Any]] = {
    "declare": lambda c, q, t: c.declare_queue("other", timeout=t),
    "exchange": lambda c, q, t: c.declare_exchange("other", timeout=t),
    "bind": lambda c, q, t: q.bind("source", timeout=t),
    "unbind": lambda c, q, t: q.unbind("source", timeout=t),
    "consume": lambda c, q, t: q.consume(print, timeout=t),
    "get": lambda c, q, t: q.get(fail=False, timeout=t),
    "qos": lambda c, q, t: c.set_qos(1, timeout=t),
    "purge": lambda c, q, t: q.purge(timeout=t),
    "delete": lambda c, q, t: c.queue_delete("other", timeout=t),
    "delete nowait": lambda c, q, t: c.queue_delete("other", timeout=t, nowait=True),
}


@pytest.mark.parametrize("name", CALLS)
async def test_a_call_while_down_waits_for_the_channel(name: str) -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        queue = await channel.declare_queue("q")
        await lost(connection, server)
        task = asyncio.ensure_future(CALLS[name](channel, queue, None))
        await turns()
        assert not task.done()
        await back(connection, server)
        await within(task)


@pytest.mark.parametrize("name", CALLS)
async def test_a_call_while_down_ends_with_its_timeout_and_names_the_state(name: str) -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        queue = await channel.declare_queue("q")
        await lost(connection, server)
        with pytest.raises(TimeoutError, match="reconnecting"):
            await within(CALLS[name](channel, queue, 0.01))
        await back(connection, server)
        await fence(connection)
        assert not server.link.all(CONSUME)
        assert [q.queue for q in server.link.all(DECLARE)] == ["q"]


async def test_a_channel_may_be_opened_while_down() -> None:
    async with robust() as (connection, server):
        await lost(connection, server)
        with pytest.raises(TimeoutError, match="reconnecting"):
            await within(connection.channel().initialize(timeout=0.01))
        channel = connection.channel()
        task = asyncio.ensure_future(channel.initialize())
        await turns()
        await back(connection, server)
        await within(task)
        await within(channel.declare_queue("q"))


async def test_ready_of_channel_and_connection_wait_for_each_other() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        await within(channel.ready())
        await lost(connection, server)
        tasks = [asyncio.ensure_future(channel.ready()), asyncio.ensure_future(connection.ready())]
        await turns()
        assert not any(task.done() for task in tasks)
        await back(connection, server)
        await within(asyncio.gather(*tasks))
        await channel.close()
        with pytest.raises(ChannelInvalidStateError):
            await within(channel.ready())


async def test_what_is_deleted_unbound_or_cancelled_while_down_stays_so() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        kept = await channel.declare_queue("kept")
        gone = await channel.declare_queue("gone")
        await channel.declare_exchange("x")
        await kept.bind("x", "kept")
        await kept.bind("x", "gone")
        await kept.consume(print, consumer_tag="t")
        await lost(connection, server)
        tasks = [
            asyncio.ensure_future(gone.delete()),
            asyncio.ensure_future(kept.unbind("x", "gone")),
            asyncio.ensure_future(kept.cancel("t")),
        ]
        await turns()
        await back(connection, server)
        await within(asyncio.gather(*tasks))
        await fence(connection)
        assert [q.queue for q in server.link.all(DECLARE)] == ["kept"]
        assert [b.routing_key for b in server.link.all(commands.Queue.Bind)] == ["kept"]
        assert not server.link.all(CONSUME)


async def test_a_server_named_queue_follows_its_new_name() -> None:
    renamed: list[tuple[str, str]] = []
    async with robust() as (connection, server):
        connection.renamed_callbacks.add(lambda _, old, new: renamed.append((old, new)))
        channel = await channel_of(connection)
        await channel.declare_exchange("x")
        queue = await channel.declare_queue("", exclusive=True)
        old = queue.name
        await queue.bind("x")
        await queue.consume(print)
        link = await again(connection, server)
        assert queue.name != old
        assert renamed == [(old, queue.name)]
        (bind,), (consume,) = link.all(commands.Queue.Bind), link.all(CONSUME)
        assert (bind.queue, bind.routing_key, consume.queue) == (queue.name, queue.name, queue.name)


# -------------------------------------------------------------------------------------------- restore() and reopen()


async def test_restore_declares_again_what_somebody_deleted() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        queue = await queue_on(channel)
        exchange = await channel.declare_exchange("x")
        assert isinstance(exchange, RobustExchange)
        await queue.bind(exchange, "k")
        await within(queue.restore())
        assert len(server.link.all(DECLARE)) == 2
        assert len(server.link.all(commands.Queue.Bind)) == 2
        await within(exchange.restore())
        assert len(server.link.all(commands.Exchange.Declare)) == 2
        await within(channel.restore())
        assert len(server.link.all(DECLARE)) == 3


async def test_restore_tells_what_the_broker_refuses() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        queue = await queue_on(channel)
        server.at(DECLARE, refuse(406, "PRECONDITION_FAILED"))
        with pytest.raises(TopologyError) as caught:
            await within(queue.restore())
        assert isinstance(caught.value.__cause__, ChannelPreconditionFailed)
        assert "queue 'q'" in str(caught.value)
        await within(queue.restore())
        assert not channel.is_closed


async def test_restore_while_down_waits() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        queue = await queue_on(channel)
        await lost(connection, server)
        task = asyncio.ensure_future(queue.restore())
        await turns()
        assert not task.done()
        await back(connection, server)
        await within(task)


async def test_restore_goes_on_after_a_loss_in_its_middle() -> None:
    async with robust() as (connection, server):
        queue = await queue_on(await channel_of(connection))
        server.at(DECLARE, drop)
        await within(queue.restore())
        assert len(server.links) == 2


async def test_restore_goes_on_after_a_loss_at_its_very_beginning() -> None:
    async with robust() as (connection, server):
        queue = await queue_on(await channel_of(connection))
        server.at(commands.Channel.Open, drop, link=0)
        await within(queue.restore(), 1)


async def test_restore_ends_when_the_connection_is_closed() -> None:
    async with robust() as (connection, server):
        queue = await queue_on(await channel_of(connection))
        held = Held()
        server.at(DECLARE, held)
        task = asyncio.ensure_future(queue.restore())
        await held.reached()
        await within(connection.close())
        with pytest.raises((ConnectionClosed, ChannelInvalidStateError)):
            await within(task, 0.5)


async def test_reopen_gives_a_live_channel_a_new_wire_with_all_that_it_had() -> None:
    async with robust() as (connection, server):
        world = World()
        await world.build(connection)
        reopened: list[object] = []
        world.one.reopen_callbacks.add(lambda channel: reopened.append(channel))
        await within(world.one.reopen())
        await fence(connection)
        assert Counter(c.consumer_tag for c in server.link.all(CONSUME)) == {"q1": 2, "q2": 2, "q3": 1}
        assert [q.prefetch_count for q in server.link.all(commands.Basic.Qos)] == [7, 3, 7]
        assert reopened == [world.one]


async def test_reopen_after_close_starts_afresh() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        await (await channel.declare_queue("q")).consume(print, consumer_tag="t")
        await within(channel.close())
        await within(channel.reopen())
        assert not channel.is_closed
        await within(channel.declare_queue("r"))
        link = await again(connection, server)
        assert [q.queue for q in link.all(DECLARE)] == ["r"]
        assert not link.all(CONSUME)


async def test_a_channel_closed_while_down_does_not_come_back() -> None:
    async with robust() as (connection, server):
        world = World()
        await world.build(connection)
        await lost(connection, server)
        await within(world.two.close())
        await back(connection, server)
        await fence(connection)
        assert [c.consumer_tag for c in server.link.all(CONSUME)] == ["q1", "q2"]
        assert sorted(q.queue for q in server.link.all(DECLARE)) == ["q1", "q2"]


async def test_a_channel_closed_while_it_is_being_opened_again_is_closed_there_too() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        held = Held()
        server.at(commands.Channel.Open, held, link=1)
        server.drop()
        await held.reached()
        await within(channel.close())
        held.go()
        await within(connection.ready())
        await fence(connection)
        assert len(server.link.all(commands.Channel.Close)) == 1


async def test_a_channel_closed_while_it_is_being_opened_again_is_no_trouble() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        held = Held()
        server.at(commands.Channel.Open, held, link=1)
        server.drop()
        await held.reached()
        await within(channel.close())
        held.go()
        await within(connection.ready())
        await until_or_not(lambda: connection.health().status == "ready")
        assert connection.health().status == "ready"


@pytest.mark.parametrize("kind", [commands.Basic.Qos, CONSUME], ids=["qos", "consume"])
async def test_a_channel_closed_while_it_is_restored_is_no_trouble(
    kind: type[base.Frame], caplog: pytest.LogCaptureFixture
) -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        await channel.set_qos(7)
        await (await channel.declare_queue("q")).consume(print)
        found = troubles(connection)
        held = Held()
        server.at(kind, held, link=1)
        server.drop()
        await held.reached()
        await within(channel.close(timeout=0))
        held.go()
        await within(connection.ready())
        await fence(connection)
        assert connection.health().status == "ready"
        assert not found
        assert "cannot restore" not in caplog.text


# --------------------------------------------------------------------------------- channels that the broker closes


async def test_a_channel_that_the_broker_closed_is_back_and_others_never_notice() -> None:
    async with robust() as (connection, server):
        world = World()
        await world.build(connection)
        told: list[str] = []
        world.one.close_callbacks.add(lambda *_: told.append("one closed"))
        world.one.reopen_callbacks.add(lambda *_: told.append("one back"))
        world.two.close_callbacks.add(lambda *_: told.append("two closed"))
        link = server.link
        link.close_channel(link.channel_of("q1"), 406, "PRECONDITION_FAILED - unknown delivery tag", (60, 80))
        await until(lambda: "one back" in told)
        await fence(connection)
        assert told == ["one closed", "one back"]
        assert connection.state is ConnectionState.READY
        assert Counter(c.consumer_tag for c in link.all(CONSUME)) == {"q1": 2, "q2": 2, "q3": 1}
        assert [q.prefetch_count for q in link.all(commands.Basic.Qos)] == [7, 3, 7]
        assert len(link.all(commands.Confirm.Select)) == 2
        await within(world.one.default_exchange.publish(Message(b""), "key"))
        assert connection.health().status == "ready"  # once is no trouble


async def test_the_call_that_made_the_broker_close_the_channel_raises_and_later_ones_work() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        server.at(DECLARE, refuse(406, "PRECONDITION_FAILED"))
        with pytest.raises(ChannelPreconditionFailed):
            await within(channel.declare_queue("q"))
        await within(channel.declare_queue("q"))
        assert connection.state is ConnectionState.READY


async def test_a_passive_declare_in_vain_leaves_the_channel_usable_and_is_not_repeated() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        server.at(DECLARE, refuse(404, "NOT_FOUND"), where=lambda m: m.queue == "none")
        with pytest.raises(ChannelNotFoundEntity):
            await within(channel.get_queue("none"))
        await within(channel.ready())
        await again(connection, server)
        assert not server.link.all(DECLARE)


async def test_a_channel_that_is_closed_again_and_again_backs_off_and_shows() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        loop = asyncio.get_running_loop()
        pauses = []
        for _ in range(6):
            await within(channel.ready())
            began = loop.time()
            await closed_by_broker(channel, server, 406, "PRECONDITION_FAILED - again")
            await within(channel.ready())
            pauses.append(loop.time() - began)
        assert pauses[-1] > 0.1  # 10 ms, doubled four times
        health = connection.health()
        assert health.status == "degraded"
        assert "again (6 times)" in health.reasons[0]


async def test_a_channel_closed_while_it_is_restored_is_opened_once_more() -> None:
    async with robust() as (connection, server):
        world = World()
        await world.build(connection)
        server.at(commands.Basic.Qos, refuse(406, "PRECONDITION_FAILED"), link=1)
        link = await again(connection, server)
        await until(lambda: len(link.all(CONSUME)) == 3)
        await fence(connection)
        assert Counter(c.consumer_tag for c in link.all(CONSUME)) == {"q1": 1, "q2": 1, "q3": 1}


@pytest.mark.parametrize("how", ["refuse", "silent"])
async def test_a_prefetch_that_was_refused_is_tried_again(how: str) -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        await channel.set_qos(7)
        await (await channel.declare_queue("q")).consume(print)
        server.at(commands.Basic.Qos, refuse(406) if how == "refuse" else lambda *_: None, link=1)
        with mock.patch("leveret.restore._STEP", 0.05):
            await again(connection, server)
            await until_or_not(lambda: connection.health().status == "ready")
        assert connection.health().status == "ready"


async def until_or_not(condition: Callable[[], object], seconds: float = 0.3) -> None:
    """Wait for what a bug prevents."""
    with contextlib.suppress(TimeoutError):
        await within(until(condition), seconds)


# ---------------------------------------------------------------------------------- consumers that the broker cancels


async def test_a_cancelled_consumer_is_back_with_its_queue_and_bindings_by_a_fresh_tag() -> None:
    got: list[IncomingMessage] = []
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        await channel.declare_exchange("x")
        queue = await channel.declare_queue("q")
        await queue.bind("x", "k")
        tag = await queue.consume(got.append, consumer_tag="mine")
        link = server.link
        link.cancel("q")
        _, fresh = await server.seen(CONSUME, 2)
        assert fresh.consumer_tag != "mine"
        assert len(link.all(DECLARE)) == 2
        assert len(link.all(commands.Queue.Bind)) == 2
        await until(lambda: connection.health().status == "ready")
        link.deliver("q", 1, b"after")
        await until(lambda: got)
        assert got[0].consumer_tag == fresh.consumer_tag
        await within(queue.cancel(tag))
        assert link.all(CANCEL)[-1].consumer_tag == fresh.consumer_tag
        link = await again(connection, server)
        assert not link.all(CONSUME)


async def test_a_fresh_tag_works_in_cancel_too_and_the_old_one_is_used_on_the_next_link() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        queue = await channel.declare_queue("q")
        await queue.consume(print, consumer_tag="mine")
        server.link.cancel("q")
        _, fresh = await server.seen(CONSUME, 2)
        await fence(connection)
        with pytest.raises(DuplicateConsumerTag):
            await within(queue.consume(print, consumer_tag="mine"))
        await within(queue.cancel(fresh.consumer_tag))
        await queue.consume(print, consumer_tag="mine")
        server.link.cancel("q")
        await server.seen(CONSUME, 4)
        link = await again(connection, server)
        assert [c.consumer_tag for c in link.all(CONSUME)] == ["mine"]


async def test_a_consumer_that_is_cancelled_again_and_again_backs_off_and_shows() -> None:
    async with robust() as (connection, server):
        queue = await (await channel_of(connection)).declare_queue("q")
        await queue.consume(print)
        loop = asyncio.get_running_loop()
        pauses = []
        for n in range(6):
            began = loop.time()
            server.link.cancel("q")
            await server.seen(CONSUME, n + 2)
            pauses.append(loop.time() - began)
            await fence(connection)
        assert pauses[-1] > 0.1  # 10 ms, doubled four times
        health = connection.health()
        assert health.status == "degraded"
        assert "(6 times)" in health.reasons[0]
        assert connection.state is ConnectionState.READY


async def test_restore_consumes_again_at_once_what_waits_for_its_turn() -> None:
    async with robust() as (connection, server):
        queue = await queue_on(await channel_of(connection))
        await queue.consume(print)
        with mock.patch("leveret.troubles._FIRST_PAUSE", 30):
            server.link.cancel("q")
            await server.seen(CONSUME, 2)
            await fence(connection)
            server.link.cancel("q")
            await fence(connection)
            assert len(server.link.all(CONSUME)) == 2
            await within(queue.restore())
            await fence(connection)
            assert len(server.link.all(CONSUME)) == 3


@pytest.mark.parametrize("announced", [False, True])
async def test_a_cancel_of_the_broker_is_confirmed_only_where_it_says_so(announced: bool) -> None:
    extra = {"accept_consumer_cancel_ok": True} if announced else {}
    async with robust(server=Server(capabilities=CAPABILITIES | extra)) as (connection, server):
        queue = await (await channel_of(connection)).declare_queue("q")
        await queue.consume(print, consumer_tag="mine")
        server.link.cancel("q")
        await server.seen(CONSUME, 2)
        await fence(connection)
        assert [ok.consumer_tag for ok in server.link.all(commands.Basic.CancelOk)] == (["mine"] if announced else [])


@pytest.mark.parametrize("on_cancelled", ["stop", "raise"])
async def test_a_callback_consumer_may_ask_not_to_be_back(on_cancelled: Any) -> None:
    told: list[ConsumerCancelled] = []
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        channel.consumer_cancelled_callbacks.add(lambda _, error: told.append(error))
        queue = await channel.declare_queue("q")
        await queue.consume(print, on_cancelled=on_cancelled)
        server.link.cancel("q")
        await fence(connection)
        assert len(told) == (on_cancelled == "raise")
        link = await again(connection, server)
        assert len(server.links[0].all(CONSUME)) == 1
        assert not link.all(CONSUME)


@pytest.mark.parametrize(("on_cancelled", "error"), [("stop", StopAsyncIteration), ("raise", ConsumerCancelled)])
async def test_an_iterator_may_ask_not_to_be_back(on_cancelled: Any, error: type[Exception]) -> None:
    async with robust() as (connection, server):
        queue = await (await channel_of(connection)).declare_queue("q")
        iterator = queue.iterator(on_cancelled=on_cancelled)
        await iterator.consume()
        task = asyncio.ensure_future(anext(iterator))
        await turns()
        server.link.cancel("q")
        with pytest.raises(error):
            await within(task)
        assert not (await again(connection, server)).all(CONSUME)


async def test_an_iterator_goes_on_after_the_broker_cancelled_it() -> None:
    async with robust() as (connection, server):
        queue = await (await channel_of(connection)).declare_queue("q")
        async with queue.iterator() as messages:
            server.link.deliver("q", 1, b"before")
            server.link.cancel("q")
            await server.seen(CONSUME, 2)
            server.link.deliver("q", 2, b"after")
            assert [(await within(anext(messages))).body for _ in range(2)] == [b"before", b"after"]


@pytest.mark.parametrize("first", ["cancel", "delete-ok"])
async def test_deleting_the_queue_oneself_ends_its_consumers(first: str) -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        queue = await channel.declare_queue("q")
        iterator = queue.iterator()
        await iterator.consume()
        task = asyncio.ensure_future(anext(iterator))
        held = Held()
        server.at(commands.Queue.Delete, held)
        delete = asyncio.ensure_future(queue.delete(if_unused=False))
        await held.reached()
        if first == "cancel":
            server.link.cancel("q")
        held.go()
        if first == "delete-ok":
            server.link.cancel("q")
        await within(delete)
        with pytest.raises(ConsumerCancelled):
            await within(task)
        await fence(connection)
        assert len(server.link.all(CONSUME)) == 1
        link = await again(connection, server)
        assert not link.all(CONSUME)
        assert not link.all(DECLARE)


@pytest.mark.parametrize("how", ["refused", "lost"])
async def test_an_iterator_survives_a_delete_that_fails(how: str) -> None:
    """``queue.delete()`` has if_unused=True by default: with a consumer the broker closes the channel."""
    async with robust() as (connection, server):
        queue = await (await channel_of(connection)).declare_queue("q")
        iterator = queue.iterator()
        await iterator.consume()
        task = asyncio.ensure_future(anext(iterator))
        server.at(commands.Queue.Delete, refuse(406, "PRECONDITION_FAILED - in use") if how == "refused" else drop)
        with pytest.raises((ChannelPreconditionFailed, ConnectionClosed)):
            await within(queue.delete())
        await server.seen(CONSUME, 2)
        await within(connection.ready())
        await fence(connection)
        server.link.deliver("q", 1, b"after")
        assert (await within(task)).body == b"after"


async def test_a_consumer_cancelled_by_the_user_while_it_is_started_again_is_cancelled_there() -> None:
    async with robust() as (connection, server):
        queue = await (await channel_of(connection)).declare_queue("q")
        await queue.consume(print, consumer_tag="mine")
        held = Held()
        server.at(CONSUME, held)
        server.link.cancel("q")
        await held.reached()
        task = asyncio.ensure_future(queue.cancel("mine"))
        await turns()
        assert not server.link.all(CANCEL)  # one that overtakes consume-ok would crash RabbitMQ's channel
        held.go()
        await within(task)
        await fence(connection)
        fresh = server.link.all(CONSUME)[-1].consumer_tag
        assert {c.consumer_tag for c in server.link.all(CANCEL)} == {fresh}
        assert not (await again(connection, server)).all(CONSUME)


async def test_a_consumer_cancelled_while_its_link_is_made_is_not_started() -> None:
    async with robust() as (connection, server):
        queue = await (await channel_of(connection)).declare_queue("q")
        await queue.consume(print, consumer_tag="a")
        await queue.consume(print, consumer_tag="b")
        held = Held()
        server.at(CONSUME, held, link=1)
        server.drop()
        await held.reached()
        await within(queue.cancel("b"))
        held.go()
        await within(connection.ready())
        await fence(connection)
        assert [c.consumer_tag for c in server.link.all(CONSUME)] == ["a"]


async def test_a_consumer_that_is_cancelled_in_the_turn_of_its_start_is_back() -> None:
    async with robust() as (connection, server):
        queue = await (await channel_of(connection)).declare_queue("q")

        def ok_and_cancel(link: ServerLink, channel: int, method: commands.Basic.Consume) -> None:
            tag = method.consumer_tag
            link.send(channel, commands.Basic.ConsumeOk(tag), commands.Basic.Cancel(tag, True))

        server.at(CONSUME, ok_and_cancel)
        await within(queue.consume(print))
        await until_or_not(lambda: len(server.link.all(CONSUME)) == 2)
        assert len(server.link.all(CONSUME)) == 2


@pytest.mark.parametrize("how", ["channel", "connection"])
async def test_a_consumer_whose_wire_ends_in_the_turn_of_its_start_is_back(how: str) -> None:
    async with robust() as (connection, server):
        queue = await (await channel_of(connection)).declare_queue("q")

        def ok_and_close(link: ServerLink, channel: int, method: commands.Basic.Consume) -> None:
            link.send(channel, commands.Basic.ConsumeOk(method.consumer_tag))
            if how == "channel":
                link.close_channel(channel)
            else:
                link.over = True
                link.session.eof()

        server.at(CONSUME, ok_and_close)
        await within(queue.consume(print))
        await until(lambda: sum(len(link.all(CONSUME)) for link in server.links) == 2)


async def test_a_channel_opened_in_the_turn_of_a_loss_opens_on_the_next_link() -> None:
    async with robust() as (connection, server):

        def ok_and_end(link: ServerLink, channel: int, _: object) -> None:
            link.send(channel, commands.Confirm.SelectOk())
            link.over = True
            link.session.eof()

        server.at(commands.Confirm.Select, ok_and_end)
        channel = connection.channel()
        await within(channel.initialize())
        await server.up(1)
        await within(connection.ready())
        await fence(connection)
        assert len(server.link.all(commands.Confirm.Select)) == 1


async def test_a_queue_declared_in_the_turn_of_a_loss_is_declared_on_the_next_link() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)

        def ok_and_end(link: ServerLink, channel: int, method: commands.Queue.Declare) -> None:
            link.send(channel, commands.Queue.DeclareOk("q", 0, 0))
            link.over = True
            link.session.eof()

        server.at(DECLARE, ok_and_end)
        await within(channel.declare_queue("q"))
        await server.seen(DECLARE, link=1)


async def test_a_channel_with_a_number_of_its_own_keeps_it() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection, channel_number=5)
        await again(connection, server)
        assert channel.number == 5
        await closed_by_broker(channel, server)
        await within(channel.ready())
        await within(channel.reopen())
        assert channel.number == 5


async def test_reopening_a_channel_with_a_number_of_its_own_is_no_trouble(caplog: pytest.LogCaptureFixture) -> None:
    async with robust() as (connection, _):
        channel = await channel_of(connection, channel_number=5)
        await within(channel.reopen())
        assert "cannot restore" not in caplog.text


async def test_a_consumer_is_back_although_no_channel_is_left_for_recovery() -> None:
    async with robust(server=Server(channel_max=1)) as (connection, server):
        queue = await (await channel_of(connection)).declare_queue("q")
        await queue.consume(print)
        server.link.cancel("q")
        await until_or_not(lambda: len(server.links) > 1 or len(server.link.all(CONSUME)) == 2)
        assert len(server.links) == 1


async def test_all_is_restored_on_a_link_with_one_channel() -> None:
    async with robust(server=Server(channel_max=1)) as (connection, server):
        channel = await channel_of(connection)
        await (await channel.declare_queue("q")).consume(print)
        await again(connection, server)
        await within(channel.ready())
        await server.seen(CONSUME, link=1)


# --------------------------------------------------------------------------------------------- what the broker refuses


async def test_one_refused_queue_stops_nobody_else_and_is_back_when_the_refusal_ends() -> None:
    async with robust() as (connection, server):
        world = World()
        await world.build(connection)
        found = troubles(connection)
        server.at(DECLARE, refuse(406, "PRECONDITION_FAILED - durable"), times=4, where=lambda m: m.queue == "q1")
        link = await again(connection, server)
        assert connection.state is ConnectionState.READY
        assert "q2" in [c.consumer_tag for c in link.all(CONSUME)]
        assert "q1" not in [c.consumer_tag for c in link.all(CONSUME)]
        health = connection.health()
        assert health.status == "degraded"
        assert "queue 'q1'" in health.reasons[0]
        assert "PRECONDITION_FAILED - durable" in health.reasons[0]
        await until(lambda: connection.health().status == "ready")
        await fence(connection)
        assert [what for what, _ in found] == ["queue 'q1'"] * 4
        assert all(isinstance(error, ChannelPreconditionFailed) for _, error in found)
        assert Counter(c.consumer_tag for c in link.all(CONSUME)) == {"q1": 1, "q2": 1, "q3": 1}
        assert sorted(b.routing_key for b in link.all(commands.Queue.Bind)) == ["q1", "q2"]
        assert len(server.links) == 2


@pytest.mark.parametrize(
    "kind", [commands.Exchange.Declare, commands.Exchange.Bind, commands.Queue.Bind], ids=lambda kind: kind.name
)
async def test_any_refused_entity_comes_back(kind: type[base.Frame]) -> None:
    async with robust() as (connection, server):
        world = World()
        await world.build(connection)
        server.at(kind, refuse(403, "ACCESS_REFUSED"), times=2, link=1)
        link = await again(connection, server)
        assert Counter(c.consumer_tag for c in link.all(CONSUME)) == {"q1": 1, "q2": 1, "q3": 1}
        await until(lambda: {b.routing_key for b in link.all(commands.Queue.Bind)} == {"q1", "q2"})
        await until(lambda: len(link.all(commands.Exchange.Bind)))
        await until(lambda: connection.health().status == "ready")


async def test_refusals_are_retried_with_growing_pauses() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        await channel.declare_queue("q")
        times: list[float] = []
        loop = asyncio.get_running_loop()

        def refuse_and_note(link: ServerLink, number: int, method: base.Frame) -> None:
            times.append(loop.time())
            refuse(406)(link, number, method)

        server.at(DECLARE, refuse_and_note, times=6, link=1)
        await again(connection, server)
        await until(lambda: connection.health().status == "ready")
        pauses = [b - a for a, b in itertools.pairwise(times)]
        assert len(pauses) == 5
        assert pauses[-1] > 0.1
        assert pauses[-1] > 3 * pauses[1]


async def test_a_refused_consumer_costs_its_channel_one_attempt_and_the_others_are_back() -> None:
    async with robust() as (connection, server):
        world = World()
        await world.build(connection)
        found = troubles(connection)
        closed: list[object] = []
        server.at(CONSUME, refuse(403, "ACCESS_REFUSED - exclusive"), times=4, link=1, where=lambda m: m.queue == "q1")
        link = await again(connection, server)
        world.one.close_callbacks.add(lambda *_: closed.append(1))
        await until(lambda: "q2" in [c.consumer_tag for c in link.all(CONSUME)])
        assert connection.health().status == "degraded"
        await until(lambda: connection.health().status == "ready")
        await fence(connection)
        assert {what for what, _ in found} == {"consumer 'q1' of queue 'q1'"}
        assert all(isinstance(error, ChannelAccessRefused) for _, error in found)
        assert not closed  # it was tried out on another channel
        final = Counter(c.consumer_tag for n, c in link.methods if isinstance(c, CONSUME) and n == world.one.number)
        assert final["q1"] >= 1
        link.deliver("q1", 1, b"x")
        await until(lambda: world)


async def test_a_consumer_of_somebody_elses_queue_waits_until_it_is_there() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        queue = await channel.get_queue("theirs", ensure=False)
        await queue.consume(print)
        other = await channel.declare_queue("ours")
        await other.consume(print)
        closed: list[object] = []
        server.at(DECLARE, refuse(404, "NOT_FOUND"), times=3, where=lambda m: m.queue == "theirs" and m.passive)
        link = await again(connection, server)
        channel.close_callbacks.add(lambda *_: closed.append(1))
        assert [c.queue for c in link.all(CONSUME)] == ["ours"]
        await until(lambda: "theirs" in [c.queue for c in link.all(CONSUME) if c.consumer_tag[:4] == "ctag"])
        assert not closed
        assert all(m.passive for m in link.all(DECLARE) if m.queue == "theirs")


async def test_a_consume_that_is_not_answered_in_time_is_tried_again() -> None:
    async with robust() as (connection, server):
        world = World()
        await world.build(connection)
        server.at(CONSUME, lambda *_: None, link=1, where=lambda m: m.consumer_tag == "q1")
        with mock.patch("leveret.restore._CONSUME", 0.05):
            link = await again(connection, server)
            await until(lambda: connection.health().status == "ready")
        link.deliver("q1", 1, b"x", link.all(CONSUME)[-1].consumer_tag)
        await until(lambda: world)
        assert len(server.links) == 2


async def test_a_record_over_which_the_broker_closes_the_connection_does_not_keep_all_down() -> None:
    async with robust() as (connection, server):
        world = World()
        await world.build(connection)
        found = troubles(connection)
        is_poison = True
        server.at(DECLARE, kill(540, "NOT_IMPLEMENTED"), times=None, where=lambda m: m.queue == "q1" and is_poison)
        with mock.patch("leveret.troubles._FIRST_PAUSE", 0.3):
            await again(connection, server)
            assert "q3" in [c.consumer_tag for c in server.link.all(CONSUME)]
            assert [what for what, _ in found] == ["queue 'q1'"]
            assert "q2" in [c.consumer_tag for c in server.link.all(CONSUME)]
            is_poison = False
            await until(lambda: connection.health().status == "ready")
        assert len(server.links) == 3


async def test_a_consumer_over_which_the_broker_closes_the_connection_does_not_keep_all_down() -> None:
    async with robust() as (connection, server):
        world = World()
        await world.build(connection)
        found = troubles(connection)
        server.at(CONSUME, kill(540, "NOT_IMPLEMENTED"), times=1, where=lambda m: m.queue == "q1")
        with mock.patch("leveret.troubles._FIRST_PAUSE", 0.3):
            link = await again(connection, server)
            assert link.number == 2
            assert "consumer 'q1' of queue 'q1'" in [what for what, _ in found]
            await until(lambda: connection.health().status == "ready")
        assert len(server.links) == 3


async def test_an_exclusive_queue_that_the_dead_link_still_holds_is_retried_soon() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        queue = await channel.declare_queue("mine", exclusive=True)
        await queue.consume(print)
        other = await channel.declare_queue("other")
        await other.consume(print)
        server.at(DECLARE, refuse(405, "RESOURCE_LOCKED"), times=5, link=1, where=lambda m: m.queue == "mine")
        with mock.patch("leveret.troubles._MAX_LOCKED_PAUSE", 0.02):
            link = await again(connection, server)
            assert [c.queue for c in link.all(CONSUME)] == ["other"]
            await until(lambda: sorted(c.queue for c in link.all(CONSUME)) == ["mine", "other"])
        await until(lambda: connection.health().status == "ready")


async def test_what_is_deleted_is_no_trouble_any_more() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        queue = await channel.declare_queue("q")
        server.at(DECLARE, refuse(406), times=None, link=1)
        await again(connection, server)
        assert connection.health().status == "degraded"
        await within(queue.delete())
        assert connection.health().status == "ready"


async def test_what_a_cancelled_delete_has_forgotten_is_no_trouble_any_more() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        queue = await channel.declare_queue("q")
        server.at(DECLARE, refuse(406), times=None, link=1)
        await again(connection, server)
        held = Held()
        server.at(commands.Queue.Delete, held)
        task = asyncio.ensure_future(queue.delete())
        await held.reached()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        held.go()
        await fence(connection)
        assert connection.health().status == "ready"


# -------------------------------------------------------------------------------------------------- stale deliveries


async def test_what_a_lost_link_had_delivered_reaches_no_callback() -> None:
    started: list[bytes] = []
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        queue = await channel.declare_queue("q")

        def callback(message: IncomingMessage) -> None:
            started.append(message.body)
            if len(started) == 1:
                server.drop()

        await queue.consume(callback)
        for n in range(1, 4):
            server.link.deliver("q", n, b"%d" % n)
        await until(lambda: started)
        await until(lambda: not connection.connected.is_set())
        await within(connection.ready())
        server.link.deliver("q", 1, b"again")
        await until(lambda: b"again" in started)
        assert started[0] == b"1"


async def test_an_iterator_drops_what_a_lost_link_had_delivered_and_goes_on() -> None:
    async with robust() as (connection, server):
        queue = await (await channel_of(connection)).declare_queue("q")
        async with queue.iterator() as messages:
            for n in range(1, 4):
                server.link.deliver("q", n, b"old %d" % n)
            first = await within(anext(messages))
            await fence(connection)
            await again(connection, server)
            server.link.deliver("q", 1, b"new")
            assert (await within(anext(messages))).body == b"new"
            with pytest.raises(DeliveryLost):
                await first.ack()
            with pytest.raises(DeliveryLost):
                await first.nack()
            await fence(connection)
            assert not server.link.all(commands.Basic.Ack)
            assert not server.link.all(commands.Basic.Nack)


async def test_deliveries_without_ack_are_handed_out_although_their_link_is_lost() -> None:
    async with robust() as (connection, server):
        queue = await (await channel_of(connection)).declare_queue("q")
        async with queue.iterator(no_ack=True) as messages:
            for n in range(1, 4):
                server.link.deliver("q", n, b"%d" % n)
            await fence(connection)
            await again(connection, server)
            server.link.deliver("q", 1, b"new")
            assert [(await within(anext(messages))).body for _ in range(4)] == [b"1", b"2", b"3", b"new"]


async def test_deliveries_without_ack_are_handed_out_after_reopen() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        queue = await channel.declare_queue("q")
        async with queue.iterator(no_ack=True) as messages:
            server.link.deliver("q", 1, b"1")
            await fence(connection)
            await within(channel.reopen())
            server.link.deliver("q", 1, b"2")
            assert (await within(anext(messages))).body == b"1"


async def test_a_handler_that_outlives_its_link_cannot_ack() -> None:
    errors: list[BaseException] = []
    go = asyncio.Event()
    async with robust() as (connection, server):
        queue = await (await channel_of(connection)).declare_queue("q")

        async def handle(message: IncomingMessage) -> None:
            await go.wait()
            try:
                await message.ack()
            except DeliveryLost as exc:
                errors.append(exc)

        await queue.consume(handle)
        server.link.deliver("q", 1, b"")
        await fence(connection)
        await again(connection, server)
        go.set()
        await until(lambda: errors)
        await fence(connection)
        assert not server.link.all(commands.Basic.Ack)


async def test_a_handler_may_publish_and_close_while_its_channel_is_restored() -> None:
    """Restoring must not wait for handlers."""
    published: list[object] = []
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        queue = await channel.declare_queue("q")

        async def handle(message: IncomingMessage) -> None:
            await until(lambda: not connection.connected.is_set())
            published.append(await channel.default_exchange.publish(Message(b""), "from handler"))

        await queue.consume(handle)
        server.link.deliver("q", 1, b"")
        await fence(connection)
        await again(connection, server)
        await until(lambda: published)


async def test_anext_that_is_cancelled_while_down_takes_nothing() -> None:
    async with robust() as (connection, server):
        queue = await (await channel_of(connection)).declare_queue("q")
        async with queue.iterator() as messages:
            await lost(connection, server)
            task = asyncio.ensure_future(anext(messages))
            await turns()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await within(task)
            await back(connection, server)
            server.link.deliver("q", 1, b"x")
            assert (await within(anext(messages))).body == b"x"


async def test_iterating_may_begin_and_end_while_down() -> None:
    async with robust() as (connection, server):
        queue = await (await channel_of(connection)).declare_queue("q")
        await lost(connection, server)
        fresh = queue.iterator()
        task = asyncio.ensure_future(anext(fresh))
        await turns()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await within(task)
        await within(fresh.close())
        used = queue.iterator()
        task = asyncio.ensure_future(anext(used))
        await turns()
        await back(connection, server)
        await server.seen(CONSUME)
        await fence(connection)
        server.link.deliver("q", 1, b"x")
        assert (await within(task)).body == b"x"
        await lost(connection, server)
        await within(used.close())
        await back(connection, server)
        await fence(connection)
        assert not server.link.all(CONSUME)


async def test_a_consumer_that_is_not_robust_ends_with_its_link() -> None:
    async with robust() as (connection, server):
        queue = await (await channel_of(connection)).declare_queue("q")
        iterator = queue.iterator(robust=False)
        await iterator.consume()
        task = asyncio.ensure_future(anext(iterator))
        await again(connection, server)
        with pytest.raises((ConnectionClosed, ChannelClosed)):
            await within(task)
        assert not server.link.all(CONSUME)
