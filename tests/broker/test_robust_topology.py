"""What was declared and bound is there again after a loss; what is gone stays gone; what is refused stops nobody."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Any

import pytest

from leveret import ConnectionState, ExchangeType, Message, RobustQueue, connect, connect_robust
from leveret.exceptions import (
    ChannelAccessRefused,
    ChannelLockedResource,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    TopologyError,
)
from leveret.records import ConsumerRecord, QueueRecord
from tests.broker.test_helpers import consumers, drain, eventually, fill, ready
from tests.broker.test_robust import KEPT, QUICK, Inbox, close_all, half_open, kept_queue, lose, restored

if TYPE_CHECKING:
    from leveret import Channel, RobustConnection
    from tests.support.node import Node
    from tests.support.proxy import FaultProxy


class Refusals:
    """What ``on_recovery_error`` was told."""

    def __init__(self, robust: RobustConnection) -> None:
        self.said: list[tuple[Any, Exception]] = []
        robust.on_recovery_error.add(lambda _, record, error: self.said.append((record, error)))

    def __len__(self) -> int:
        return len(self.said)


async def exists(channel: Channel, name: str, *, exchange: bool = False) -> bool:
    """Whether there is such a queue or exchange; the channel is opened again if there is not."""
    try:
        if exchange:
            await channel.declare_exchange(name, passive=True)
        else:
            await channel.declare_queue(name, passive=True)
    except ChannelNotFoundEntity:
        await channel.reopen()
        return False
    return True


# --------------------------------------------------------------------------------------------------- refused


async def test_one_refused_queue_stops_nobody(
    robust: RobustConnection, link: FaultProxy, channel: Channel, name: str
) -> None:
    """R3, with both consumers on one channel, and on two."""
    loop = asyncio.get_running_loop()
    one, two = await robust.channel(), await robust.channel()
    refusals, inbox, bad_inbox = Refusals(robust), Inbox(), Inbox()
    ok = await one.declare_queue(f"{name}-ok", durable=True, arguments=KEPT)
    also_ok = await two.declare_queue(f"{name}-ok2", durable=True, arguments=KEPT)
    bad = await kept_queue(one, f"{name}-bad")
    for queue, box in ((bad, bad_inbox), (ok, inbox), (also_ok, inbox)):
        await queue.consume(box)
    await link.refuse()
    link.rst()
    await eventually(lambda: robust.state is ConnectionState.RECONNECTING)
    await channel.queue_delete(bad.name)
    await channel.declare_queue(bad.name, durable=True, arguments={"x-expires": 50_000})
    began = loop.time()
    await link.accept()
    await restored(robust, 2)
    await fill(channel, ok.name, [b"1"])
    await fill(channel, also_ok.name, [b"2"])
    await inbox.has(b"1", b"2")
    assert loop.time() - began < 5
    assert [type(error) for _, error in refusals.said[:1]] == [ChannelPreconditionFailed]
    assert isinstance(refusals.said[0][0], QueueRecord)
    assert refusals.said[0][0].name == bad.name
    health = robust.health()
    assert health.status == "degraded"
    assert any(bad.name in reason and "PRECONDITION" in reason for reason in health.reasons)
    with pytest.raises(TopologyError) as caught:
        await bad.restore()
    assert isinstance(caught.value.__cause__, ChannelPreconditionFailed)
    await eventually(lambda: len(refusals) >= 4)
    assert await consumers(channel, ok.name) == 1
    assert one.is_live
    assert two.is_live
    # Somebody puts it right; it is tried again by itself, or at once when told to.
    await channel.queue_delete(bad.name)
    await bad.restore()
    await fill(channel, bad.name, [b"back"])
    await bad_inbox.has(b"back")
    assert robust.health().status == "ready"
    assert len(refusals) < 10


async def test_attempts_at_what_is_refused_are_bounded(
    robust: RobustConnection, link: FaultProxy, channel: Channel, name: str
) -> None:
    mine = await robust.channel()
    queue = await kept_queue(mine, name)
    await queue.consume(Inbox())
    refusals = Refusals(robust)
    await link.refuse()
    link.rst()
    await channel.queue_delete(name)
    await channel.declare_queue(name, durable=True, arguments={"x-expires": 50_000})
    await link.accept()
    await restored(robust, 2)
    await asyncio.sleep(2)  # 0.2 s, 0.4 s, 0.8 s, 1.6 s between attempts
    assert 3 <= len(refusals) <= 4
    link.rst()  # a new link is a new chance, but not a new beginning of the pauses
    await restored(robust, 3)
    assert len(refusals) <= 5


async def test_an_exclusive_queue_is_back_when_the_broker_lets_go(amqp_url: str, link: FaultProxy, name: str) -> None:
    """R4: the old link is half-open: the broker keeps it, and the queue, for a while."""
    loop = asyncio.get_running_loop()
    urls = [f"{link.url}?heartbeat=1"]

    async def resolve() -> list[str]:
        return list(urls)

    async with (
        await connect_robust(link.url, resolver=resolve, retry=QUICK) as robust,
        await connect(amqp_url) as plain,
        plain.channel() as observer,
    ):
        mine = await robust.channel()
        exclusive = await mine.declare_queue(f"{name}-excl", exclusive=True)
        normal = await kept_queue(mine, name)
        refusals, inbox = Refusals(robust), Inbox()
        await exclusive.consume(inbox)
        await normal.consume(inbox)
        lost: list[float] = []
        robust.close_callbacks.add(lambda *_: lost.append(loop.time()))
        urls[:] = [f"{amqp_url}?heartbeat=1"]
        link.up.blackhole = link.down.blackhole = True
        await restored(robust, 2)
        assert loop.time() - lost[0] < 1
        # The old consumer may be sent it first: it comes again when the broker drops the old link.
        await fill(observer, normal.name, [b"normal"])
        if refusals.said:
            assert {type(error) for _, error in refusals.said} == {ChannelLockedResource}
            assert robust.health().status == "degraded"
        await eventually(lambda: robust.health().status == "ready", 15)
        publisher = await robust.channel()
        await fill(publisher, exclusive.name, [b"exclusive"])
        await eventually(lambda: {b"normal", b"exclusive"} <= set(inbox.bodies), 15)
        assert robust.connection_attempt == 2


async def test_an_exclusive_queue_takes_its_exchange_along(amqp_url: str, link: FaultProxy, name: str) -> None:
    """The auto-delete exchange is there until the broker lets go of the old link; then it goes with the old queue."""
    urls = [link.url]

    async def resolve() -> list[str]:
        return list(urls)

    async with await connect_robust(link.url, resolver=resolve, retry=QUICK) as robust:
        mine = await robust.channel()
        exchange = await mine.declare_exchange(f"{name}-x", "topic", auto_delete=True)
        queue = await mine.declare_queue(exclusive=True)
        await queue.bind(exchange, "#")
        refusals, inbox = Refusals(robust), Inbox()
        await queue.consume(inbox)
        urls[:] = [amqp_url]
        await half_open(link, robust)
        await eventually(lambda: len(refusals))
        link.rst()  # the broker lets go
        await eventually(lambda: robust.health().status == "ready", 3)
        await exchange.publish(Message(b"1"), "key")
        await inbox.has(b"1")


# --------------------------------------------------------------------------------------- server-named queues


async def test_a_server_named_queue_follows(
    robust: RobustConnection, link: FaultProxy, channel: Channel, name: str
) -> None:
    """R5: three forced closes."""
    mine, other = await robust.channel(), await robust.channel()
    fanout = await channel.declare_exchange(name, "fanout", durable=True)
    queue = await mine.declare_queue("", exclusive=True)
    await queue.bind(fanout.name)
    inbox = Inbox()
    await queue.consume(inbox)
    renamed: list[tuple[str, str]] = []
    robust.renamed_callbacks.add(lambda _, old, new: renamed.append((old, new)))
    names = [queue.name]
    for i in range(3):
        await lose(link, robust)
        names.append(queue.name)
        await fanout.publish(Message(b"%d" % i), "")
        await inbox.has(*[b"%d" % n for n in range(i + 1)])
        assert await consumers(other, queue.name) == 1
        await other.default_exchange.publish(Message(b"direct"), queue.name)
        await eventually(lambda: b"direct" in inbox.bodies)
        inbox.messages.pop()
    assert len(set(names)) == 4
    assert renamed == list(itertools.pairwise(names))
    await fanout.delete()


@pytest.mark.parametrize("how", ["404", "restore"])
async def test_a_server_named_queue_that_is_there_keeps_its_name(
    robust: RobustConnection, channel: Channel, name: str, how: str
) -> None:
    """A mistake on another channel, or restore(), is no reason for a second queue under another name."""
    mine, other = await robust.channel(), await robust.channel()
    fanout = await channel.declare_exchange(name, "fanout", durable=True)
    queue = await mine.declare_queue("", exclusive=True)
    assert isinstance(queue, RobustQueue)
    await queue.bind(fanout.name)
    inbox = Inbox()
    await queue.consume(inbox)
    renamed: list[tuple[str, str]] = []
    robust.renamed_callbacks.add(lambda _, old, new: renamed.append((old, new)))
    old = queue.name
    if how == "404":
        with pytest.raises(ChannelNotFoundEntity):
            await other.declare_queue(f"{name}-missing", passive=True)
        await asyncio.wait_for(other.ready(), 5)
    else:
        await asyncio.wait_for(queue.restore(), 5)
    await fill(await robust.channel(), queue.name, [b"direct"])
    await fanout.publish(Message(b"once"), "")
    await fanout.delete()
    await inbox.has(b"direct", b"once", timeout=2)
    assert renamed == []
    assert queue.name == old


async def test_a_server_named_queue_that_is_deleted_has_another_name(
    robust: RobustConnection, channel: Channel, name: str
) -> None:
    mine = await robust.channel()
    fanout = await channel.declare_exchange(name, "fanout", durable=True)
    queue = await mine.declare_queue("", durable=True, arguments=KEPT)
    await queue.bind(fanout.name)
    inbox = Inbox()
    await queue.consume(inbox)
    old = queue.name
    renamed: list[tuple[str, str]] = []
    robust.renamed_callbacks.add(lambda _, old, new: renamed.append((old, new)))
    await channel.queue_delete(old)
    await eventually(lambda: renamed)
    assert renamed == [(old, queue.name)]

    async def is_consumed() -> bool:
        return await consumers(channel, queue.name) == 1

    await eventually(is_consumed)
    await eventually(lambda: robust.health().status == "ready")
    await fanout.publish(Message(b"1"), "")
    await inbox.has(b"1")
    await fanout.delete()


async def test_a_client_named_queue_keeps_its_name(robust: RobustConnection, link: FaultProxy, name: str) -> None:
    """Section A 10."""
    mine = await robust.channel()
    queue = await mine.declare_queue(exclusive=True)
    assert queue.name.startswith("amq_")
    assert len(queue.name) == 4 + 32
    inbox, old = Inbox(), queue.name
    await queue.consume(inbox)
    await lose(link, robust)
    await eventually(lambda: robust.health().status == "ready")
    assert queue.name == old
    await fill(mine, queue, [b"1"])
    await inbox.has(b"1")


# ----------------------------------------------------------------------------------- what goes, and what stays


async def test_passive_is_never_replayed_as_active(
    robust: RobustConnection, link: FaultProxy, channel: Channel, name: str
) -> None:
    await channel.declare_queue(name, durable=True)
    await channel.declare_exchange(f"{name}-x", durable=True)
    mine = await robust.channel()
    queue = await mine.get_queue(name)
    await mine.get_exchange(f"{name}-x")
    await (await mine.get_exchange(f"{name}-x", ensure=False)).declare()
    inbox, refusals = Inbox(), Refusals(robust)
    await queue.consume(inbox)
    await link.refuse()
    link.rst()
    await eventually(lambda: robust.state is ConnectionState.RECONNECTING)
    await channel.queue_delete(name)
    await channel.exchange_delete(f"{name}-x")
    await link.accept()
    await restored(robust, 2)
    assert not await exists(channel, name)
    assert not await exists(channel, f"{name}-x", exchange=True)
    # Section A 7: a queue of others that is missing is reported, and consumed again when it is back.
    await eventually(lambda: len(refusals) >= 2)
    assert all(isinstance(record, ConsumerRecord) for record, _ in refusals.said)
    assert all(isinstance(error, ChannelNotFoundEntity) for _, error in refusals.said)
    assert robust.health().status == "degraded"
    await channel.declare_queue(name, durable=True)
    await fill(channel, name, [b"back"])
    await inbox.has(b"back")
    assert mine.is_live
    await channel.queue_delete(name)
    await eventually(lambda: len(refusals) >= 3)
    assert not await exists(channel, name)


async def test_what_was_undone_on_another_channel_stays_undone(
    robust: RobustConnection, link: FaultProxy, channel: Channel, name: str
) -> None:
    one, two = await robust.channel(), await robust.channel()
    exchange = await one.declare_exchange(f"{name}-x", "topic", durable=True)
    doomed_exchange = await one.declare_exchange(f"{name}-y", "topic", durable=True)
    queue = await kept_queue(one, name)
    doomed = await kept_queue(one, f"{name}-doomed")
    cancelled, inbox = Inbox(), Inbox()
    await queue.bind(exchange, "keep")
    await queue.bind(exchange, "undone")
    await queue.bind(doomed_exchange, "x")
    await doomed.bind(exchange, "keep")
    await doomed.consume(cancelled)
    await queue.consume(inbox)
    tag = await queue.consume(cancelled)

    await (await two.get_queue(name)).unbind(f"{name}-x", "undone")
    await two.queue_delete(doomed.name)
    await two.exchange_delete(f"{name}-y")
    await one.get_queue(name, ensure=False)
    await queue.cancel(tag)
    await lose(link, robust)
    assert not await exists(channel, doomed.name)
    assert not await exists(channel, f"{name}-y", exchange=True)
    assert await consumers(channel, name) == 1
    theirs = await channel.get_exchange(f"{name}-x")
    await theirs.publish(Message(b"1"), "undone")
    await theirs.publish(Message(b"2"), "keep")
    await inbox.has(b"2")
    assert cancelled.messages == []
    assert robust.health().status == "ready"
    await theirs.delete()


async def test_undone_while_the_link_is_down(
    robust: RobustConnection, link: FaultProxy, channel: Channel, name: str
) -> None:
    """They wait for the link, and count."""
    mine = await robust.channel()
    queue, doomed = await kept_queue(mine, name), await kept_queue(mine, f"{name}-doomed")
    exchange = await mine.declare_exchange(f"{name}-x", "fanout", durable=True)
    await queue.bind(exchange)
    inbox = Inbox()
    tag = await queue.consume(inbox)
    await link.refuse()
    link.rst()
    await eventually(lambda: robust.state is ConnectionState.RECONNECTING)
    undone = [
        asyncio.create_task(queue.unbind(exchange)),
        asyncio.create_task(doomed.delete(if_unused=False, if_empty=False)),
        asyncio.create_task(queue.cancel(tag)),
    ]
    await asyncio.sleep(0)
    await link.accept()
    await asyncio.wait_for(asyncio.gather(*undone), 10)
    await lose(link, robust)
    assert not await exists(channel, doomed.name)
    assert await consumers(channel, name) == 0
    await (await channel.get_exchange(f"{name}-x")).publish(Message(b"1"), "")
    assert await ready(channel, name) == 0
    await mine.exchange_delete(f"{name}-x")


async def test_closing_a_channel_takes_its_part_along(
    robust: RobustConnection, link: FaultProxy, channel: Channel, name: str
) -> None:
    one, two = await robust.channel(), await robust.channel()
    shared = await kept_queue(one, name)
    await kept_queue(two, name)
    alone = await kept_queue(one, f"{name}-alone")
    inbox = Inbox()
    await shared.consume(inbox)
    await (await two.get_queue(name)).consume(inbox)
    await one.close()
    await link.refuse()
    link.rst()
    await channel.queue_delete(alone.name)
    await channel.queue_delete(name)
    await link.accept()
    await restored(robust, 2)
    assert not await exists(channel, alone.name)
    assert await consumers(channel, name) == 1


async def test_an_auto_delete_cascade_is_forgotten(
    robust: RobustConnection, link: FaultProxy, channel: Channel, name: str
) -> None:
    mine = await robust.channel()
    source = await mine.declare_exchange(f"{name}-source", "topic", auto_delete=True)
    middle = await mine.declare_exchange(f"{name}-middle", "topic", auto_delete=True)
    await middle.bind(source, "#")
    queue = await mine.declare_queue(name, durable=True, auto_delete=True)
    await queue.bind(middle, "#")
    inbox = Inbox()
    tag = await queue.consume(inbox)
    await lose(link, robust)  # the broker deleted all of it; it is back
    await source.publish(Message(b"1"), "key")
    await inbox.has(b"1")
    await queue.cancel(tag)  # the queue goes, then what was bound to it, and what that was bound to
    await lose(link, robust)
    assert not await exists(channel, name)
    assert not await exists(channel, f"{name}-middle", exchange=True)
    assert not await exists(channel, f"{name}-source", exchange=True)
    assert robust.health().status == "ready"


async def test_a_queue_that_is_deleted_while_its_consumer_is_refused(
    robust: RobustConnection, link: FaultProxy, channel: Channel, name: str
) -> None:
    """It is declared again all the same."""
    mine = await robust.channel()
    queue = await kept_queue(mine, name)
    inbox, refusals = Inbox(), Refusals(robust)
    await queue.consume(inbox, exclusive=True)
    await link.refuse()
    link.rst()

    async def consume_exclusively() -> bool:
        try:
            await (await channel.get_queue(name)).consume(Inbox(), exclusive=True)
        except ChannelAccessRefused:
            await channel.reopen()
            return False
        return True

    await eventually(consume_exclusively)
    await link.accept()
    await restored(robust, 2)
    await eventually(lambda: len(refusals))
    await channel.queue_delete(name)
    await eventually(lambda: robust.health().status == "ready", 3)
    await fill(await robust.channel(), name, [b"1"])
    await inbox.has(b"1")


# -------------------------------------------------------------------------------------------------- bindings


async def test_bindings_that_differ_in_arguments_only(
    robust: RobustConnection, link: FaultProxy, channel: Channel, name: str
) -> None:
    mine = await robust.channel()
    exchange = await mine.declare_exchange(name, ExchangeType.HEADERS, durable=True)
    queue = await mine.declare_queue(exclusive=True)
    both = [{"x-match": "all", "kind": "a"}, {"x-match": "all", "kind": "b"}, {"x-match": "all", "kind": "c"}]
    for arguments in both:
        await queue.bind(exchange, "", arguments=arguments)
    await queue.unbind(exchange, "", arguments={"kind": "c", "x-match": "all"})  # another order, the same table
    inbox = Inbox()
    await queue.consume(inbox)
    await lose(link, robust)
    await eventually(lambda: robust.health().status == "ready")
    for kind in "abc":
        await exchange.publish(Message(kind.encode(), headers={"kind": kind}), "")
    await inbox.has(b"a", b"b")
    await exchange.delete()


async def test_transient_exchanges_and_their_bindings_after_a_restart(shaky: Node, name: str) -> None:
    async with await connect_robust(shaky.url, retry=QUICK) as robust:
        one, two = await robust.channel(), await robust.channel()
        front = await one.declare_exchange(f"{name}-front", "topic")
        inner = await two.declare_exchange(f"{name}-inner", "fanout", internal=True)
        unrouted = await two.declare_exchange(f"{name}-rest", "fanout")
        alternate = await one.declare_exchange(
            f"{name}-alt", "direct", arguments={"alternate-exchange": f"{name}-rest"}
        )
        await inner.bind(front, "in.*")
        queue = await one.declare_queue(exclusive=True)
        await queue.bind(inner)
        await queue.bind(unrouted)
        inbox = Inbox()
        await queue.consume(inbox)
        await asyncio.to_thread(shaky.stop_app)
        await asyncio.to_thread(shaky.start_app)
        await restored(robust, 2, 20)
        await eventually(lambda: robust.health().status == "ready")
        with pytest.raises(ValueError, match="internal"):
            _ = inner.publish(Message(b"x"), "")
        await front.publish(Message(b"1"), "in.x")
        await front.publish(Message(b"2"), "out.x")
        await alternate.publish(Message(b"3"), "nowhere")
        await inbox.has(b"1", b"3")


async def test_a_lot_of_topology(shaky: Node, name: str) -> None:
    """More than one batch, with a refused one in the middle."""
    async with await connect_robust(shaky.url, retry=QUICK) as robust:
        mine = await robust.channel()
        exchange = await mine.declare_exchange(name, "direct", durable=True)
        queues = [await mine.declare_queue(f"{name}-{i}", exclusive=True) for i in range(150)]
        await asyncio.gather(*[queue.bind(exchange, queue.name) for queue in queues])
        inbox, refusals = Inbox(), Refusals(robust)
        for queue in queues[::10]:
            await queue.consume(inbox)
        await close_all(shaky)
        await restored(robust, 2)
        await eventually(lambda: robust.health().status == "ready")
        for queue in queues:
            await exchange.publish(Message(queue.name.encode()), queue.name)
        await inbox.has(*[queue.name.encode() for queue in queues[::10]])
        assert [await drain(queue) for queue in queues[1:4]] == [[queue.name.encode()] for queue in queues[1:4]]
        assert all(isinstance(error, ChannelLockedResource) for _, error in refusals.said)
        await exchange.delete()


async def test_robust_false_is_not_restored(
    robust: RobustConnection, link: FaultProxy, channel: Channel, name: str
) -> None:
    mine = await robust.channel()
    await mine.declare_queue(name, durable=True, robust=False)
    await mine.declare_exchange(f"{name}-x", durable=True, robust=False)
    kept = await kept_queue(mine, f"{name}-kept")
    await kept.consume(Inbox(), robust=False)
    iterator = kept.iterator(robust=False)
    waiting = asyncio.create_task(iterator.__anext__())
    await eventually(lambda: iterator.consumer_tag)
    await link.refuse()
    link.rst()
    await channel.queue_delete(name)
    await channel.exchange_delete(f"{name}-x")
    await link.accept()
    await restored(robust, 2)
    with pytest.raises(Exception, match="lost"):
        await asyncio.wait_for(waiting, 5)
    assert not await exists(channel, name)
    assert not await exists(channel, f"{name}-x", exchange=True)
    assert await consumers(channel, kept.name) == 0
    assert len(robust.health().reasons) == 0
