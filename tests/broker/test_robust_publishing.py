"""Publishing over losses: each publish ends as what it was, and nothing confirmed is lost."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from pamqp.commands import Basic

from leveret import ConnectionState, Message, ReturnedMessage, RobustConnection, connect, connect_robust, restore
from leveret.exceptions import (
    AMQPConnectionError,
    ChannelInvalidStateError,
    ConnectionBlocked,
    DeliveryError,
    MessageReturned,
    PublishNotSent,
    PublishOutcomeUnknown,
)
from tests.broker.test_blocked import memory_alarm
from tests.broker.test_helpers import drain, eventually, fill, holds, ready
from tests.broker.test_robust import KEPT, QUICK, Inbox, close_all, kept_queue, lose, restored

if TYPE_CHECKING:
    from leveret import Channel
    from tests.support.node import Node
    from tests.support.proxy import FaultProxy


async def down(link: FaultProxy, robust: RobustConnection) -> None:
    """Cut the link, and let nobody connect."""
    await link.refuse()
    link.rst()
    await eventually(lambda: robust.state is ConnectionState.RECONNECTING)


# ------------------------------------------------------------------------------------------ while the link is down


async def test_when_down(link: FaultProxy, robust: RobustConnection, channel: Channel, name: str) -> None:
    """R7: wait in vain, do not wait, and wait until it is back: confirmed once."""
    loop = asyncio.get_running_loop()
    mine = await robust.channel()
    await kept_queue(mine, name)
    await down(link, robust)
    publish = mine.default_exchange.publish
    began = loop.time()
    with pytest.raises(PublishNotSent, match="reconnecting") as caught:
        await publish(Message(b"a"), name, timeout=1)
    assert isinstance(caught.value, TimeoutError)
    assert loop.time() - began == pytest.approx(1, abs=0.2)
    began = loop.time()
    with pytest.raises(PublishNotSent):
        await publish(Message(b"b"), name, wait_for_link=False)
    with pytest.raises(PublishNotSent):
        await publish(Message(b"c"), name, timeout=0)
    assert loop.time() - began < 0.1
    waiting = [publish(Message(b"%d" % i), name) for i in range(100)]
    cancelled = asyncio.ensure_future(publish(Message(b"cancelled"), name))
    cancelled.cancel()
    await link.accept()
    results = await asyncio.wait_for(asyncio.gather(*waiting), 10)
    assert all(isinstance(result, Basic.Ack) for result in results)
    await holds(channel, name, 100)
    assert await drain(await channel.get_queue(name)) == [b"%d" % i for i in range(100)]


async def test_only_so_many_wait(link: FaultProxy, name: str) -> None:
    class Small(RobustConnection):
        MAX_WAITING_PUBLISHES = 1000
        MAX_WAITING_BYTES = 10_000

    async with await connect_robust(link.url, connection_class=Small) as robust:
        one, two = await robust.channel(), await robust.channel()
        await kept_queue(one, name)
        await down(link, robust)
        waiting = [one.default_exchange.publish(Message(b""), name) for _ in range(999)]
        waiting.append(two.default_exchange.publish(Message(b""), name))
        for channel in (one, two):
            with pytest.raises(PublishNotSent, match="1000 publishes"):
                _ = channel.default_exchange.publish(Message(b""), name)
        waiting[0].cancel()  # type: ignore[attr-defined]
        await asyncio.sleep(0)
        waiting[0] = one.default_exchange.publish(Message(b"x" * 10_000), name)
        waiting[1].cancel()  # type: ignore[attr-defined]
        await asyncio.sleep(0)
        with pytest.raises(PublishNotSent, match="bytes"):
            _ = one.default_exchange.publish(Message(b"x"), name)
        waiting[1] = one.default_exchange.publish(Message(b""), name)
        await link.accept()
        await asyncio.wait_for(asyncio.gather(*waiting), 10)
        assert await ready(one, name) == 1000


async def test_in_flight_is_unknown_and_numbers_begin_anew(
    link: FaultProxy, robust: RobustConnection, channel: Channel, name: str
) -> None:
    mine = await robust.channel()
    await kept_queue(mine, name)
    publish = mine.default_exchange.publish
    link.down.blackhole = True  # no confirm comes back
    unknown = [publish(Message(b"unknown"), name) for _ in range(10)]
    retried = [publish(Message(b"retried %d" % i), name, retry_unknown=True) for i in range(10)]
    await holds(channel, name, 20)
    link.rst()
    link.down.blackhole = False
    outcomes = await asyncio.wait_for(asyncio.gather(*unknown, return_exceptions=True), 5)
    assert all(isinstance(outcome, PublishOutcomeUnknown) for outcome in outcomes)
    results = await asyncio.wait_for(asyncio.gather(*retried), 5)
    assert {result.delivery_tag for result in results if isinstance(result, Basic.Ack)} <= set(range(1, 11))
    await publish(Message(b"after"), name)
    await holds(channel, name, 31)


async def test_one_message_published_in_many_ways_at_once(
    link: FaultProxy, robust: RobustConnection, name: str
) -> None:
    """R11, on a wire that was restored."""
    mine = await robust.channel(on_return_raises=True)
    queue = await kept_queue(mine, name)
    await lose(link, robust)
    message = Message(b"same", message_id="same")
    publish = mine.default_exchange.publish
    keys = [f"{name}-missing", name, f"{name}-missing", name]
    for _ in range(20):
        results = await asyncio.gather(*[publish(message, key) for key in keys], return_exceptions=True)
        assert [type(result) for result in results] == [MessageReturned, Basic.Ack, MessageReturned, Basic.Ack]
    await queue.purge()


async def test_unroutable_is_returned_after_a_reconnect(link: FaultProxy, robust: RobustConnection, name: str) -> None:
    mine, raising = await robust.channel(), await robust.channel(on_return_raises=True)
    returned: list[ReturnedMessage] = []
    mine.return_callbacks.add(lambda _, message: returned.append(message))
    await down(link, robust)
    publishes = [c.default_exchange.publish(Message(b"x"), name) for c in (mine, raising)]
    not_mandatory = mine.default_exchange.publish(Message(b"x"), name, mandatory=False)
    await link.accept()
    results = await asyncio.wait_for(asyncio.gather(*publishes, not_mandatory, return_exceptions=True), 10)
    assert [type(result) for result in results] == [ReturnedMessage, MessageReturned, Basic.Ack]
    assert [message.body for message in returned] == [b"x"]


async def test_without_confirms(link: FaultProxy, robust: RobustConnection, channel: Channel, name: str) -> None:
    mine = await robust.channel(publisher_confirms=False)
    await kept_queue(mine, name)
    await down(link, robust)
    publish = asyncio.ensure_future(mine.default_exchange.publish(Message(b"waits"), name))
    await link.accept()
    assert await asyncio.wait_for(publish, 10) is None
    assert await mine.default_exchange.publish(Message(b"goes"), name) is None
    await holds(channel, name, 2)


async def test_large_bodies_cut_in_the_middle(
    link: FaultProxy, robust: RobustConnection, channel: Channel, name: str
) -> None:
    """No half frame after the reconnect."""
    mine = await robust.channel()
    await kept_queue(mine, name)
    body = bytes(500_000)
    for cut_after in (5, 1_000, 300_000):
        link.up.cut_after = cut_after
        with pytest.raises(PublishOutcomeUnknown):
            await asyncio.wait_for(mine.default_exchange.publish(Message(body), name), 10)
        link.up.cut_after = None
    publish = mine.default_exchange.publish(Message(body), name, retry_unknown=True)
    link.up.cut_after = 300_000
    assert isinstance(await asyncio.wait_for(publish, 10), Basic.Ack)
    await holds(channel, name, 1)
    assert robust.health().status == "ready"


# --------------------------------------------------------------------------------------------------- restarts


async def test_nothing_confirmed_is_lost_over_a_crash(shaky: Node, name: str) -> None:
    """R8, scaled down: 5,000 messages in a window of 200, and the node is killed and started in the middle."""
    total, window = 5_000, asyncio.Semaphore(200)
    outcomes: dict[int, object] = {}
    async with await connect_robust(shaky.url, retry=QUICK) as robust:
        mine = await robust.channel()
        queue = await mine.declare_queue(name, durable=True, arguments={"x-queue-type": "quorum"})
        await asyncio.to_thread(shaky.flush)

        async def publish(i: int) -> None:
            async with window:
                try:
                    outcomes[i] = await mine.default_exchange.publish(Message(b"%d" % i, delivery_mode=2), name)
                except DeliveryError as error:
                    outcomes[i] = error

        async def publish_all() -> None:
            await asyncio.gather(*[publish(i) for i in range(total)])

        publishing = asyncio.create_task(publish_all())
        await eventually(lambda: len(outcomes) > total // 4, 60)
        await asyncio.to_thread(shaky.kill)
        assert len(outcomes) < total
        await asyncio.to_thread(shaky.start)
        await asyncio.wait_for(publishing, 40)
        assert set(outcomes) == set(range(total))
        confirmed = {i for i, outcome in outcomes.items() if isinstance(outcome, Basic.Ack)}
        unknown = {i for i, outcome in outcomes.items() if isinstance(outcome, PublishOutcomeUnknown)}
        assert len(confirmed) >= total - 200 - len(unknown)
        assert len(unknown) <= 200
        received: set[int] = set()
        last = b"end"
        await mine.default_exchange.publish(Message(last, delivery_mode=2), name)
        async with asyncio.timeout(20):
            async with queue.iterator(no_ack=True) as messages:
                async for message in messages:
                    if message.body == last:
                        break
                    received.add(int(message.body))
        assert confirmed <= received
        assert received <= confirmed | unknown


# ------------------------------------------------------------------------------------------------ memory alarm


async def test_an_alarm_blocks_publishers_only(shaky: Node, name: str) -> None:
    """R18: on two connections; the state of the block is learned anew after a reconnect."""
    loop = asyncio.get_running_loop()
    async with (
        await connect_robust(shaky.url, retry=QUICK) as consuming,
        await connect_robust(shaky.url, retry=QUICK) as publishing,
    ):
        events: list[str | None] = []
        publishing.blocked_callbacks.add(lambda _, reason: events.append(reason))
        one, two = await consuming.channel(), await publishing.channel()
        await one.set_qos(1)
        queue = await kept_queue(one, name)
        await fill(two, name, [b"0", b"1"])
        messages = queue.iterator()
        first = await asyncio.wait_for(anext(messages), 5)
        async with memory_alarm(shaky):
            stuck = two.default_exchange.publish(Message(b"stuck"), name)
            await eventually(lambda: publishing.blocked)
            began = loop.time()
            with pytest.raises(ConnectionBlocked, match="memory"):
                await two.default_exchange.publish(Message(b"late"), name, timeout=0.5)
            assert loop.time() - began == pytest.approx(0.5, abs=0.2)
            assert publishing.health().status == "degraded"
            await first.ack()
            second = await asyncio.wait_for(anext(messages), 5)  # the ack reached the broker
            assert second.body == b"1"
            await second.ack()
            await close_all(shaky)
            with pytest.raises(PublishOutcomeUnknown):
                await asyncio.wait_for(stuck, 5)
            await restored(publishing, 2)
            await restored(consuming, 2)
            assert publishing.blocked is None
            again = two.default_exchange.publish(Message(b"again"), name)
            await eventually(lambda: publishing.blocked)
            assert consuming.health().status == "ready"
            began = loop.time()
            async with await connect_robust(shaky.url) as third:
                channel = await third.channel()
                held = channel.default_exchange.publish(Message(b"held"), name)
                await eventually(lambda: third.blocked)
                await third.close(timeout=0.5)
                assert loop.time() - began < 3
                with pytest.raises(PublishOutcomeUnknown):
                    await held
        assert isinstance(await asyncio.wait_for(again, 10), Basic.Ack)
        await eventually(lambda: publishing.blocked is None)
        assert events == ["low on memory", None, "low on memory", None]
        await messages.close()


@pytest.mark.parametrize("event", ["consumer", "channel"])
async def test_an_alarm_is_no_reason_to_drop_the_link(
    shaky: Node, name: str, event: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker does not read a blocked connection: what recovery asks of it is answered when the alarm ends."""
    monkeypatch.setattr(restore, "_STEP", 0.5)
    monkeypatch.setattr(restore, "_CONSUME", 0.5)
    async with await connect_robust(shaky.url, retry=QUICK) as robust, await connect(shaky.url) as plain:
        lost: list[object] = []
        robust.close_callbacks.add(lambda _, error: lost.append(error))
        observer = await plain.channel()
        mine, other = await robust.channel(), await robust.channel()
        queue = await kept_queue(mine, name)
        inbox = Inbox()
        await queue.consume(inbox)
        async with memory_alarm(shaky):
            stuck = asyncio.ensure_future(other.default_exchange.publish(Message(b"stuck"), f"{name}-x"))
            await eventually(lambda: robust.blocked)
            if event == "consumer":
                await observer.queue_delete(name)
            else:
                mine.wire.close()  # as after a mistake that the broker answers
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(stuck), 1.5)  # nothing may happen
        await asyncio.wait_for(stuck, 10)
        assert lost == []
        await eventually(lambda: robust.health().status == "ready")
        await fill(observer, name, [b"1"])
        await inbox.has(b"1")


# ------------------------------------------------------------------------------------------------ transactions


async def test_a_transaction_over_a_loss(
    link: FaultProxy, robust: RobustConnection, channel: Channel, name: str
) -> None:
    mine = await robust.channel(publisher_confirms=False)
    await kept_queue(mine, name)

    async def lose_one(error: Exception | None) -> None:
        async with mine.transaction():
            await mine.default_exchange.publish(Message(b"undone"), name)
            await lose(link, robust)
            if error is not None:
                raise error

    with pytest.raises(ChannelInvalidStateError, match="transaction"):
        await lose_one(None)
    with pytest.raises(RuntimeError, match="mine"):
        await lose_one(RuntimeError("mine"))
    async with mine.transaction():
        await mine.default_exchange.publish(Message(b"done"), name)
    await holds(channel, name, 1)
    assert await drain(await channel.get_queue(name)) == [b"done"]


@pytest.mark.parametrize("back", [True, False])
async def test_a_transaction_that_was_lost_takes_no_effect_at_all(
    link: FaultProxy, robust: RobustConnection, channel: Channel, name: str, back: bool
) -> None:
    """What is published in its block after the loss belongs to it, too."""
    mine = await robust.channel(publisher_confirms=False)
    await kept_queue(mine, name)
    with contextlib.suppress(ChannelInvalidStateError):
        async with mine.transaction():
            await mine.default_exchange.publish(Message(b"first half"), name)
            await down(link, robust)
            if back:
                await link.accept()
                await restored(robust, 2)
                await mine.default_exchange.publish(Message(b"second half"), name)
            else:
                publish = asyncio.ensure_future(mine.default_exchange.publish(Message(b"second half"), name))
                await link.accept()
                await publish
    await link.accept()
    await asyncio.wait_for(mine.ready(), 5)
    await mine.declare_queue(name, passive=True)  # what was published before has arrived
    assert await drain(await channel.get_queue(name)) == []


async def test_calls_wait_for_the_link_too(link: FaultProxy, robust: RobustConnection, name: str) -> None:
    mine = await robust.channel()
    await down(link, robust)
    with pytest.raises(TimeoutError, match="reconnecting"):
        await mine.declare_queue(name, durable=True, arguments=KEPT, timeout=0.1)
    with pytest.raises(TimeoutError, match="reconnecting"):
        await robust.channel().initialize(timeout=0.1)
    calls: list[Any] = [
        mine.declare_queue(name, durable=True, arguments=KEPT),
        mine.set_qos(3),
        robust.channel().initialize(),
        robust.ready(),
        mine.ready(),
    ]
    tasks = [asyncio.ensure_future(call) for call in calls]
    await asyncio.sleep(0)
    await link.accept()
    queue = (await asyncio.wait_for(asyncio.gather(*tasks), 10))[0]
    assert queue.name == name
    # A call that was under way when the link died raises; nobody repeats it.
    link.up.blackhole = True
    declaring = asyncio.create_task(mine.declare_queue(name, passive=True))
    await asyncio.sleep(0)
    link.rst()
    link.heal()
    with pytest.raises(AMQPConnectionError):
        await asyncio.wait_for(declaring, 5)
    await restored(robust, 3)
