"""Consumers come back: after their queue was deleted, their channel closed, their link lost; and no message twice."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from typing import TYPE_CHECKING, Any

import pytest
from pamqp import commands, frame
from pamqp.exceptions import UnmarshalingException

from leveret import IncomingMessage, Message, connect_robust, restore
from leveret.exceptions import (
    AMQPConnectionError,
    AMQPError,
    ChannelAccessRefused,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    ConsumerCancelled,
    DeliveryLost,
)
from tests.broker.test_helpers import consumers, eventually, fill, holds, ready
from tests.broker.test_robust import (
    KEPT,
    QUICK,
    Inbox,
    close_all,
    consumer_count,
    half_open,
    kept_queue,
    lose,
    restored,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from leveret import Channel, RobustConnection
    from tests.support.node import Node
    from tests.support.proxy import FaultProxy


def methods(log: bytearray) -> Iterator[Any]:
    """The methods in what a client wrote since it connected."""
    data = bytes(log)
    data = data[8:] if data.startswith(b"AMQP") else data
    while data:
        try:
            size, _, value = frame.unmarshal(data)
        except UnmarshalingException:
            return
        yield value
        data = data[size:]


# ------------------------------------------------------------------------------------------ the queue is deleted


@pytest.mark.parametrize(("recreated", "declared"), [(True, True), (True, False), (False, True)])
async def test_the_queue_is_deleted_by_somebody_else(
    robust: RobustConnection, channel: Channel, name: str, recreated: bool, declared: bool
) -> None:
    """R1: a callback and an iterator go on; what this connection declared and bound is there again."""
    loop = asyncio.get_running_loop()
    exchange = await channel.declare_exchange(f"{name}-x", "fanout", durable=True)
    mine = await robust.channel()
    told: list[object] = []
    mine.close_callbacks.add(lambda *_: told.append("closed"))
    mine.consumer_cancelled_callbacks.add(lambda *_: told.append("cancelled"))
    names = [f"{name}-callback", f"{name}-iterator"]
    queues = []
    for each in names:
        if declared:
            queue = await kept_queue(mine, each)
            await queue.bind(exchange.name)
        else:
            await channel.declare_queue(each, durable=True, arguments=KEPT)
            queue = await mine.get_queue(each)  # type: ignore[assignment]
        queues.append(queue)
    inbox = Inbox()
    tag = await queues[0].consume(inbox)
    messages = queues[1].iterator()
    await messages.consume()
    took: list[float] = []
    for i in range(2):
        began = loop.time()
        for each in names:
            await channel.queue_delete(each)
            if recreated:
                await channel.declare_queue(each, durable=True, arguments=KEPT)
            await consumed_by(channel, each, 1)
        took.append(loop.time() - began)
        if declared:
            await exchange.publish(Message(b"%d" % i), "")
        else:
            await asyncio.gather(*[fill(channel, each, [b"%d" % i]) for each in names])
        message = await asyncio.wait_for(anext(messages), 5)
        assert message.body == b"%d" % i
        await message.ack()
        await inbox.has(*[b"%d" % n for n in range(i + 1)])
    assert min(took) < 1  # a busy machine may be late, once
    assert told == []
    assert mine.is_live
    assert robust.connection_attempt == 1
    await queues[0].cancel(tag)  # the tag that the user knows
    await messages.close()
    for each in names:
        await consumed_by(channel, each, 0)
    await exchange.delete()


async def test_many_queues_are_deleted_at_once(robust: RobustConnection, channel: Channel, name: str) -> None:
    """Restoring one consumer must not close the channel over the queue of the next one."""
    mine = await robust.channel()
    told: list[object] = []
    mine.close_callbacks.add(lambda _, error: told.append(error))
    inbox = Inbox()
    names = [f"{name}-{i}" for i in range(20)]
    for each in names:
        await (await kept_queue(mine, each)).consume(inbox)
    await asyncio.gather(*[channel.queue_delete(each) for each in names])
    for each in names:
        await consumed_by(channel, each, 1)
    assert told == []


async def consumer_count_of(channel: Channel, name: str) -> int:
    """How many consumers, or -1 for no such queue."""
    try:
        return await consumers(channel, name)
    except ChannelNotFoundEntity:
        await channel.reopen()
        return -1


async def consumed_by(channel: Channel, name: str, count: int) -> None:
    """Wait until the queue has so many consumers."""

    async def is_so() -> bool:
        return await consumer_count_of(channel, name) == count

    await eventually(is_so)


async def test_what_happens_on_a_cancel_is_a_choice(robust: RobustConnection, channel: Channel, name: str) -> None:
    mine = await robust.channel()
    told: list[ConsumerCancelled] = []
    mine.consumer_cancelled_callbacks.add(lambda _, error: told.append(error))
    queue = await kept_queue(mine, name)
    inbox = Inbox()
    await queue.consume(inbox, consumer_tag="raising", on_cancelled="raise")
    await queue.consume(inbox, consumer_tag="stopping", on_cancelled="stop")
    stopping, raising = queue.iterator(on_cancelled="stop"), queue.iterator(on_cancelled="raise")
    waiting = [asyncio.create_task(iterator.__anext__()) for iterator in (stopping, raising)]
    await eventually(lambda: stopping.consumer_tag and raising.consumer_tag)
    await channel.queue_delete(name)
    with pytest.raises(StopAsyncIteration):
        await asyncio.wait_for(waiting[0], 5)
    with pytest.raises(ConsumerCancelled):
        await asyncio.wait_for(waiting[1], 5)
    await eventually(lambda: told)
    assert [error.consumer_tag for error in told] == ["raising"]
    await queue.declare()
    await queue.consume(inbox, consumer_tag="raising")  # the tag is free again
    await fill(channel, name, [b"1"])
    await inbox.has(b"1")
    assert mine.is_live


async def test_explicit_endings_stop_a_recovering_consumer(
    robust: RobustConnection, channel: Channel, name: str
) -> None:
    """Section A 8: cancel, delete and close count while the queue is missing."""
    await channel.declare_queue(name, durable=True)
    mine = await robust.channel()
    queue = await mine.get_queue(name)
    inbox = Inbox()
    tags = [await queue.consume(inbox) for _ in range(3)]
    messages = queue.iterator()
    waiting = asyncio.create_task(messages.__anext__())
    await eventually(lambda: messages.consumer_tag)
    await channel.queue_delete(name)
    await eventually(lambda: robust.health().status == "degraded")
    for tag in tags[:2]:
        assert isinstance(await queue.cancel(tag), commands.Basic.CancelOk)
    await messages.close()
    with pytest.raises(StopAsyncIteration):
        await asyncio.wait_for(waiting, 5)
    await channel.declare_queue(name, durable=True, arguments=KEPT)
    await fill(channel, name, [b"1"])
    await inbox.has(b"1")
    assert await consumers(channel, name) == 1
    await mine.close()
    assert await consumers(channel, name) == 0


# ------------------------------------------------------------------------------------------------ ack timeout


async def test_an_ack_timeout_costs_one_redelivery(impatient: Node, name: str) -> None:
    """R2, in both dialects: the channel is closed (3.10, 4.0), the consumer is cancelled (4.3)."""
    async with await connect_robust(impatient.url) as robust:
        other, mine = await robust.channel(), await robust.channel()
        disturbed: list[object] = []
        robust.close_callbacks.add(lambda *_: disturbed.append("connection"))
        other.close_callbacks.add(lambda *_: disturbed.append("other channel"))
        untouched = await other.declare_queue(exclusive=True)
        inbox = Inbox()
        await untouched.consume(inbox)
        queue = await mine.declare_queue(name, durable=True, arguments={"x-queue-type": "quorum"})
        await mine.set_qos(1)
        held: list[IncomingMessage] = []

        async def hold_the_first(message: IncomingMessage) -> None:
            held.append(message)
            if len(held) > 1:
                await message.ack()

        await queue.consume(hold_the_first)
        await fill(other, name, [b"held"])
        await eventually(lambda: len(held) == 2, 30)
        assert [(message.body, message.redelivered) for message in held] == [(b"held", False), (b"held", True)]
        late: object = None
        try:
            await held[0].ack()
        except DeliveryLost as error:
            late = error
        if impatient.version_info < (4, 3):
            assert isinstance(late, DeliveryLost)
        await fill(other, name, [b"more"])
        await eventually(lambda: held[-1].body == b"more", 15)
        await fill(other, untouched, [b"fine"])
        await inbox.has(b"fine")
        assert await consumer_count(impatient, name) == 1
        assert disturbed == []
        assert robust.connection_attempt == 1
        assert mine.is_live


# ---------------------------------------------------------------------------------- deliveries of a lost link


async def test_old_deliveries_stay_old(link: FaultProxy, robust: RobustConnection, channel: Channel, name: str) -> None:
    """R13: no old tag on a new link, each message once more, and nothing that was only buffered is handed out."""
    mine, other = await robust.channel(), await robust.channel()
    await mine.set_qos(10)
    queue = await kept_queue(mine, name)
    second = await kept_queue(mine, f"{name}-2")
    started: list[IncomingMessage] = []
    gate = asyncio.Event()

    async def hold(message: IncomingMessage) -> None:
        started.append(message)
        await gate.wait()

    await queue.consume(hold)
    messages = second.iterator()
    await messages.consume()
    await fill(channel, name, [b"%d" % i for i in range(10)])
    await fill(channel, second, [b"%d" % i for i in range(10)])
    await eventually(lambda: len(started) == 10)
    first = await asyncio.wait_for(anext(messages), 5)
    await holds(channel, second, 0)  # the other nine are in the buffer
    link.up.record = True
    link.up.log.clear()
    await lose(link, robust)
    await eventually(lambda: len(started) == 20)
    assert not any(message.is_live for message in started[:10])
    for message in [*started[:10], first]:
        for settle in (message.ack, message.nack, message.reject):
            with pytest.raises(DeliveryLost):
                await settle()
    with pytest.raises(DeliveryLost):
        await started[0].ack(multiple=True)
    assert [message.redelivered for message in started[10:]] == [True] * 10
    handed_out = [await asyncio.wait_for(anext(messages), 5) for _ in range(10)]
    assert [message.body for message in handed_out] == [b"%d" % i for i in range(10)]
    assert all(message.is_live for message in handed_out)
    settled = [m for m in methods(link.up.log) if isinstance(m, commands.Basic.Ack | commands.Basic.Nack)]
    assert settled == []
    for message in [*started[10:], *handed_out]:
        await message.ack()
    gate.set()
    await queue.declare()  # what was acked before is the broker's now
    await lose(link, robust)
    assert await ready(other, name) == await ready(other, second) == 0
    assert len(started) == 20
    await messages.close()


async def test_a_handler_that_publishes_while_the_link_is_lost(
    link: FaultProxy, robust: RobustConnection, channel: Channel, name: str
) -> None:
    """Restoring does not wait for handlers, and handlers may wait for it."""
    mine = await robust.channel()
    await mine.set_qos(1)
    queue, results = await kept_queue(mine, name), await kept_queue(mine, f"{name}-results")
    outcomes: list[object] = []

    async def handler(message: IncomingMessage) -> None:
        if not message.redelivered:
            await link.refuse()
            link.rst()
            await asyncio.wait_for(mine.closed() if mine.is_closed else _lost(robust), 5)
            await link.accept()
        outcomes.append(await mine.default_exchange.publish(Message(b"result"), results.name))
        with contextlib.suppress(DeliveryLost):
            await message.ack()

    await queue.consume(handler)
    await fill(channel, name, [b"work"])
    await eventually(lambda: len(outcomes) == 2)
    await holds(channel, results.name, 2)
    await holds(channel, name, 0)


async def _lost(robust: RobustConnection) -> None:
    await eventually(lambda: not robust.connected.is_set())


async def test_prefetch_is_back(shaky: Node, name: str) -> None:
    """R24: one on a quorum queue, not global; consumers of one channel with two values keep the last."""
    async with await connect_robust(shaky.url, retry=QUICK) as robust:
        mine, other = await robust.channel(), await robust.channel()
        await mine.set_qos(1)
        await other.set_qos(7)
        queue = await mine.declare_queue(name, durable=True, arguments={"x-queue-type": "quorum"})
        await queue.consume(Inbox())
        await (await other.get_queue(name)).consume(Inbox())

        async def prefetches() -> list[str]:
            listed = await asyncio.to_thread(shaky.ctl, "list_consumers", "queue_name", "prefetch_count")
            return sorted(line.split("\t")[1] for line in listed.splitlines() if line.startswith(name))

        assert await prefetches() == ["1", "7"]
        await close_all(shaky)
        await restored(robust, 2)
        assert await prefetches() == ["1", "7"]
        assert "540" not in "".join(robust.health().reasons)


# ------------------------------------------------------------------------------------------- a closed channel


async def test_each_consumer_has_the_prefetch_that_it_began_with(
    link: FaultProxy, robust: RobustConnection, channel: Channel, name: str
) -> None:
    names = {f"{name}-{prefetch}": prefetch for prefetch in (3, 5, 7)}
    mine = await robust.channel()
    got: dict[str, int] = dict.fromkeys(names, 0)

    def keep(queue: str, message: IncomingMessage) -> None:
        got[queue] += message.is_live

    await mine.set_qos(3)
    for queue, prefetch in names.items():
        ours = await mine.declare_queue(queue)
        given = None if prefetch == 3 else prefetch
        await ours.consume(functools.partial(keep, queue), prefetch=given)
    await mine.set_qos(9)
    for queue in names:
        await fill(channel, await channel.get_queue(queue), [b"x"] * 20)
    await eventually(lambda: got == names)
    link.rst()
    await _lost(robust)
    await eventually(lambda: got == {queue: 2 * prefetch for queue, prefetch in names.items()})
    with pytest.raises(ValueError, match="prefetch must be from 0"):
        await ours.consume(print, prefetch=-1)
    for queue in names:
        await channel.queue_delete(queue)


async def test_a_channel_closed_by_the_broker_is_back_with_all_of_it(
    robust: RobustConnection, channel: Channel, name: str
) -> None:
    """Publishing to a missing exchange (404) closes the channel: consumers and QoS are back, nobody else notices."""
    mine, other = await robust.channel(), await robust.channel()
    told: list[str] = []
    mine.close_callbacks.add(lambda *_: told.append("closed"))
    mine.reopen_callbacks.add(lambda *_: told.append("back"))
    other.close_callbacks.add(lambda *_: told.append("other closed"))
    robust.close_callbacks.add(lambda *_: told.append("connection closed"))
    await mine.set_qos(2)
    queue = await kept_queue(mine, name)
    held: list[IncomingMessage] = []
    await queue.consume(held.append)
    messages = queue.iterator()
    await messages.consume()
    missing = await mine.get_exchange(f"{name}-missing", ensure=False)
    with pytest.raises(AMQPError, match="NOT_FOUND"):
        await missing.publish(Message(b"x"), "")
    await asyncio.wait_for(mine.ready(), 5)
    await eventually(lambda: told == ["closed", "back"])
    assert await consumers(channel, name) == 2
    await fill(other, name, [b"%d" % i for i in range(8)])
    await eventually(lambda: len(held) == 2)
    await holds(channel, name, 4)  # two for each consumer are out
    await asyncio.wait_for(anext(messages), 5)
    assert robust.connection_attempt == 1
    assert robust.health().status == "ready"
    await messages.close()


async def test_a_channel_that_is_closed_again_and_again_is_degraded(robust: RobustConnection, name: str) -> None:
    loop = asyncio.get_running_loop()
    mine = await robust.channel()
    missing = await mine.get_exchange(f"{name}-missing", ensure=False)
    began = loop.time()
    for _ in range(4):
        with pytest.raises(AMQPError, match="NOT_FOUND"):
            await missing.publish(Message(b"x"), "")
        await asyncio.wait_for(mine.ready(), 5)
    assert loop.time() - began > 0.2 + 0.4  # pauses that grow
    assert robust.health().status == "degraded"
    assert "missing" in robust.health().reasons[0]
    assert robust.connection_attempt == 1


async def test_an_unknown_delivery_tag_costs_the_channel_once(
    robust: RobustConnection, channel: Channel, name: str
) -> None:
    """406 over an ack that the broker does not know, as a client with a bug sends it."""
    mine = await robust.channel()
    queue = await kept_queue(mine, name)
    inbox, lost = Inbox(), []
    mine.close_callbacks.add(lambda _, error: lost.append(error))
    await queue.consume(inbox)
    mine.wire.send(commands.Basic.Ack(delivery_tag=4711))
    await eventually(lambda: lost)
    assert isinstance(lost[0], ChannelPreconditionFailed)
    await asyncio.wait_for(mine.ready(), 5)
    await fill(channel, name, [b"1"])
    await inbox.has(b"1")
    assert await consumers(channel, name) == 1


async def test_direct_reply_to_straight_after_a_reconnect(
    link: FaultProxy, robust: RobustConnection, channel: Channel, name: str
) -> None:
    """No 406: the consumer is there before what waited is published."""
    server = await channel.declare_queue(name, durable=True, arguments=KEPT)
    mine = await robust.channel()
    closed: list[object] = []
    replies: list[bytes] = []
    reply_to = await mine.get_queue("amq.rabbitmq.reply-to", ensure=False)
    await reply_to.consume(lambda message: replies.append(message.body), no_ack=True)

    async def serve(message: IncomingMessage) -> None:
        assert message.reply_to
        await channel.default_exchange.publish(Message(b"re: " + message.body), message.reply_to)
        await message.ack()

    mine.close_callbacks.add(lambda _, error: closed.append(error))
    await server.consume(serve)
    for i in range(3):
        link.rst()
        await eventually(lambda: not mine.is_live)
        question = Message(b"%d" % i, reply_to="amq.rabbitmq.reply-to")
        await asyncio.wait_for(mine.default_exchange.publish(question, name), 10)
        await eventually(functools.partial(replies.__contains__, b"re: %d" % i))
    assert not any(isinstance(error, ChannelPreconditionFailed) for error in closed)
    assert len(closed) == 3


async def test_direct_reply_to_after_a_failed_attempt(
    link: FaultProxy, robust: RobustConnection, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One consume-ok is lost: the next attempt must succeed."""
    monkeypatch.setattr(restore, "_CONSUME", 0.3)
    mine = await robust.channel()
    replies: list[bytes] = []
    reply_to = await mine.get_queue("amq.rabbitmq.reply-to", ensure=False)
    await reply_to.consume(lambda message: replies.append(message.body), no_ack=True)
    refused: list[Exception] = []
    robust.on_recovery_error.add(lambda _, record, error: refused.append(error))
    consume_ok = b"\x00\x3c\x00\x15"
    link.down.mangle = lambda data: b"" if consume_ok in data else data
    link.rst()
    await eventually(lambda: refused)
    assert isinstance(refused[0], TimeoutError)
    link.down.mangle = None
    await eventually(lambda: robust.health().status == "ready", 3)


async def test_an_exclusive_consumer_of_an_auto_delete_queue(link: FaultProxy, amqp_url: str, name: str) -> None:
    """The old link is half-open and has the queue; when the broker lets go, the queue goes with its consumer."""
    urls = [link.url]

    async def resolve() -> list[str]:
        return list(urls)

    async with await connect_robust(link.url, resolver=resolve, retry=QUICK) as robust:
        mine = await robust.channel()
        queue = await mine.declare_queue(name, durable=True, auto_delete=True)
        inbox, refused = Inbox(), []
        robust.on_recovery_error.add(lambda _, record, error: refused.append(error))
        await queue.consume(inbox, exclusive=True)
        urls[:] = [amqp_url]
        await half_open(link, robust)
        await eventually(lambda: refused)
        link.rst()  # the broker lets go
        await eventually(lambda: robust.health().status == "ready", 3)
        await fill(await robust.channel(), name, [b"1"])
        await inbox.has(b"1")


async def test_a_refused_delete_changes_nothing(robust: RobustConnection, channel: Channel, name: str) -> None:
    """By default delete() is refused while somebody consumes."""
    mine = await robust.channel()
    queue = await kept_queue(mine, name)
    bodies: list[bytes] = []

    async def loop() -> None:
        async with queue.iterator() as messages:
            async for message in messages:
                bodies.append(message.body)
                await message.ack()

    looping = asyncio.create_task(loop())
    try:
        await consumed_by(channel, name, 1)
        with pytest.raises(ChannelPreconditionFailed):
            await queue.delete()
        await asyncio.wait_for(mine.ready(), 5)
        await fill(channel, name, [b"1"])
        await eventually(lambda: looping.done() or bodies)
        assert bodies == [b"1"]
        assert not looping.done()
    finally:
        await mine.close()
        with contextlib.suppress(AMQPError):
            await asyncio.wait_for(looping, 5)


async def test_an_iterator_that_raises_on_a_cancel_outlives_a_lost_link(
    link: FaultProxy, robust: RobustConnection, channel: Channel, name: str
) -> None:
    mine = await robust.channel()
    queue = await kept_queue(mine, name)
    messages = queue.iterator(on_cancelled="raise")
    waiting = asyncio.create_task(messages.__anext__())
    await eventually(lambda: messages.consumer_tag)
    await lose(link, robust)
    await fill(channel, name, [b"1"])
    assert (await asyncio.wait_for(waiting, 5)).body == b"1"
    await channel.queue_delete(name)
    with pytest.raises(ConsumerCancelled):
        await asyncio.wait_for(anext(messages), 5)


# ------------------------------------------------------------------------------------------- starting, ending


async def lost_again(robust: RobustConnection) -> None:
    """Wait for the next loss."""
    lost = asyncio.Event()
    robust.close_callbacks.add(lambda *_: lost.set())
    await lost.wait()


async def test_closing_the_channel_while_a_consumer_starts(robust: RobustConnection, name: str) -> None:
    """Whoever waits for the consumer is told that the channel was closed, and not of a KeyError."""
    mine = await robust.channel()
    queue = await kept_queue(mine, name)
    starting = asyncio.create_task(queue.consume(Inbox()))
    await asyncio.sleep(0)  # basic.consume is on its way
    await mine.close()
    with pytest.raises(AMQPError):
        await asyncio.wait_for(starting, 5)


async def test_cancelling_a_consumer_while_it_starts(robust: RobustConnection, channel: Channel, name: str) -> None:
    mine = await robust.channel()
    queue = await kept_queue(mine, name)
    lost = asyncio.ensure_future(lost_again(robust))
    starting = asyncio.create_task(queue.consume(Inbox(), consumer_tag="mine"))
    await asyncio.sleep(0)
    await queue.cancel("mine")
    # RabbitMQ 3.10 and 4.0 close the connection (541) over a cancel that comes too early, and 4.3 owes the consume-ok.
    await asyncio.wait_for(starting, 2)
    await asyncio.wait([lost], timeout=0.5)
    assert lost.cancel()  # it has not ended
    assert await consumers(channel, name) == 0
    await asyncio.wait_for(mine.reopen(), 5)
    assert await consumers(channel, name) == 0


async def test_an_exclusive_consumer_waits_for_its_turn(
    link: FaultProxy, robust: RobustConnection, channel: Channel, name: str
) -> None:
    """Somebody else is quicker: the other consumers of the channel are back all the same, and it is once it may."""
    mine = await robust.channel()
    queue, normal = await kept_queue(mine, name), await kept_queue(mine, f"{name}-2")
    inbox, refused = Inbox(), []
    robust.on_recovery_error.add(lambda _, record, error: refused.append(error))
    await queue.consume(inbox, exclusive=True)
    await normal.consume(inbox)
    await link.refuse()
    link.rst()

    async def consume_exclusively() -> str:
        try:
            return await (await channel.get_queue(name)).consume(Inbox(), exclusive=True)
        except ChannelAccessRefused:
            await channel.reopen()
            return ""

    tag = await eventually(consume_exclusively)
    await link.accept()
    await restored(robust, 2)
    await fill(channel, normal, [b"1"])
    await inbox.has(b"1")
    await eventually(lambda: len(refused) >= 2)
    assert {type(error) for error in refused} == {ChannelAccessRefused}
    assert await consumers(channel, normal.name) == 1
    closed: list[object] = []
    mine.close_callbacks.add(lambda _, error: closed.append(error))
    await eventually(lambda: len(refused) >= 3)
    assert closed == []  # the later attempts are made elsewhere
    await (await channel.get_queue(name)).cancel(tag)
    await fill(channel, name, [b"2"])
    await inbox.has(b"1", b"2")
    await eventually(lambda: robust.health().status == "ready")


@pytest.mark.parametrize("auto_delete", [False, True])
async def test_a_permission_that_comes_back(shaky: Node, name: str, auto_delete: bool) -> None:
    """403 for the consumer only; once it may, it consumes."""
    user = name.replace(".", "-")

    async def permit(read: str) -> None:
        await asyncio.to_thread(shaky.set_permissions, user, ".*", ".*", read)

    await asyncio.to_thread(shaky.add_user, user, "secret")
    async with await connect_robust(shaky.url.replace("guest:guest", f"{user}:secret"), retry=QUICK) as robust:
        mine, other = await robust.channel(), await robust.channel()
        queue = await mine.declare_queue(name, durable=True, auto_delete=auto_delete, arguments=KEPT)
        inbox, refused = Inbox(), []
        robust.on_recovery_error.add(lambda _, record, error: refused.append(error))
        await queue.consume(inbox)
        await permit("")
        await close_all(shaky)
        await restored(robust, 2)
        await eventually(lambda: len(refused) >= 2)
        assert {type(error) for error in refused} == {ChannelAccessRefused}
        await permit(".*")
        await eventually(lambda: robust.health().status == "ready", 3)
        await fill(other, name, [b"1"])
        await inbox.has(b"1")


async def test_an_iterator_is_closed_while_it_is_restored(amqp_url: str, channel: Channel, name: str) -> None:
    """A basic.cancel before the consume-ok: RabbitMQ 3.10 and 4.0 close the connection (541), 4.3 may owe the ok."""
    loop = asyncio.get_running_loop()
    async with await connect_robust(amqp_url) as robust:
        mine = await robust.channel()
        queue = await mine.declare_queue(name, durable=True, arguments={"x-queue-type": "quorum"})
        messages = queue.iterator()
        await messages.consume()
        old = mine.wire
        robust.open_transport().abort(AMQPConnectionError("lost, for a test"))
        while mine.wire is old or not mine.wire.consumers:  # noqa: ASYNC110
            await asyncio.sleep(0)
        lost = asyncio.ensure_future(lost_again(robust))
        began = loop.time()  # basic.consume is on its way
        await messages.close()
        await restored(robust, 2)
        assert loop.time() - began < 1
        await asyncio.wait([lost], timeout=0.5)
        assert lost.cancel()  # it has not ended
        assert await consumers(channel, name) == 0
        assert robust.health().status == "ready"
