"""A robust connection: its states, what it says, how it closes, and what of it is back after every kind of loss."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from typing import TYPE_CHECKING, Any

import pytest
from pamqp.commands import Basic

from leveret import (
    ConnectionState,
    IncomingMessage,
    Message,
    RetryPolicy,
    RobustConnection,
    RobustQueue,
    connect_robust,
)
from leveret.exceptions import (
    AMQPConnectionError,
    ChannelInvalidStateError,
    ConnectionClosed,
    HeartbeatTimeout,
    PublishNotSent,
)
from tests.broker.test_helpers import consumers, eventually, fill, holds

if TYPE_CHECKING:
    from collections.abc import Iterator

    from leveret import Channel, Health, RobustChannel
    from tests.support.node import Node
    from tests.support.proxy import FaultProxy

QUICK = RetryPolicy(initial=0.05, maximum=0.2)
"""For tests that wait for a broker to be back."""
_RECOVERING = ConnectionState.RECOVERING
KEPT = {"x-expires": 60_000}
"""Arguments of a queue that outlives connections, but not the tests by long."""


class Inbox:
    """A callback that acknowledges, and remembers what came."""

    def __init__(self) -> None:
        self.messages: list[IncomingMessage] = []

    async def __call__(self, message: IncomingMessage) -> None:
        self.messages.append(message)
        await message.ack()

    @property
    def bodies(self) -> list[bytes]:
        return [message.body for message in self.messages]

    async def has(self, *bodies: bytes, timeout: float = 10) -> None:
        """Wait until exactly *bodies* have come, in any order."""
        await eventually(lambda: sorted(self.bodies) == sorted(bodies), timeout)


async def restored(robust: RobustConnection, attempt: int, timeout: float = 10) -> None:
    """Wait until *robust* is ready for the *attempt*-th time."""
    await eventually(lambda: robust.connection_attempt >= attempt and robust.connected.is_set(), timeout)


async def lose(link: FaultProxy, robust: RobustConnection, timeout: float = 10) -> None:
    """Cut the link, and wait until all is restored."""
    attempt = robust.connection_attempt + 1
    link.rst()
    await restored(robust, attempt, timeout)


async def half_open(link: FaultProxy, robust: RobustConnection) -> None:
    """Have *robust* reconnect, by another way, and the broker keep the old link until ``link.rst()``."""
    link.up.blackhole = True  # not even the end of the stream gets through
    robust.open_transport().abort(AMQPConnectionError("half-open, for a test"))
    await restored(robust, robust.connection_attempt + 1)


async def kept_queue(channel: RobustChannel, name: str, **kwargs: Any) -> RobustQueue:
    """A queue that outlives the connection."""
    queue = await channel.declare_queue(name, durable=True, arguments=KEPT, **kwargs)
    assert isinstance(queue, RobustQueue)
    return queue


async def consumer_count(node: Node, name: str) -> int:
    """How many consumers *name* has, asked without a connection; -1 without such a queue."""
    return await asyncio.to_thread(node.consumer_count, name)


async def close_all(node: Node) -> None:
    """Close every connection of *node*, as an operator does."""
    await asyncio.to_thread(node.close_connections)


@contextlib.contextmanager
def few_warnings(caplog: pytest.LogCaptureFixture, most: int = 3) -> Iterator[None]:
    """At most so many records of leveret at WARNING or above in the block."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "leveret"):
        yield
    loud = [r.getMessage() for r in caplog.records if r.name.startswith("leveret") and r.levelno >= logging.WARNING]
    assert len(loud) <= most, loud


# ----------------------------------------------------------------------------------------------- lost and back


@pytest.mark.parametrize("how", ["rst", "fin", "reconnect()"])
async def test_all_of_it_is_back(
    link: FaultProxy, robust: RobustConnection, channel: Channel, name: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[str] = []
    robust.close_callbacks.add(lambda _, error: events.append(f"lost {type(error).__name__}"))
    robust.reconnect_callbacks.add(lambda _: events.append("back"))
    robust.state_callbacks.add(lambda _, old, new, __: events.append(f"{old.value} > {new.value}"))
    mine = await robust.channel()
    mine.close_callbacks.add(lambda *_: events.append("channel lost"))
    mine.reopen_callbacks.add(lambda *_: events.append("channel back"))
    await mine.set_qos(3)
    exchange = await mine.declare_exchange(f"{name}-x", "topic", auto_delete=True)
    queue = await kept_queue(mine, name)
    await queue.bind(exchange, "a.#")
    inbox = Inbox()
    tag = await queue.consume(inbox)
    messages = queue.iterator()
    await messages.consume()
    waiting = asyncio.create_task(messages.__anext__())
    assert robust.state is ConnectionState.READY
    assert robust.health()
    assert events == []

    with few_warnings(caplog):
        if how == "reconnect()":
            await robust.reconnect()
        else:
            getattr(link, how)()
        await restored(robust, 2)
    assert events == [
        "channel lost",
        "ready > reconnecting",
        "lost ConnectionClosed",
        "reconnecting > recovering",
        "channel back",
        "recovering > ready",
        "back",
    ]
    assert robust.connection_attempt == 2
    assert robust.health().status == "ready"
    assert await consumers(channel, queue.name) == 2
    for i in range(6):
        assert isinstance(await exchange.publish(Message(b"%d" % i), "a.b"), Basic.Ack)
    got = [await asyncio.wait_for(waiting, 10)]
    await got[0].ack()
    while len(got) + len(inbox.messages) < 6:
        message = await asyncio.wait_for(anext(messages), 10)
        got.append(message)
        await message.ack()
    assert sorted([*inbox.bodies, *(m.body for m in got)]) == [b"%d" % i for i in range(6)]
    assert {message.consumer_tag for message in inbox.messages} == {tag}
    await messages.close()
    await queue.cancel(tag)
    await eventually(lambda: _is_zero(consumers(channel, queue.name)))
    await holds(channel, queue.name, 0)


async def _is_zero(count: Any) -> bool:
    return bool(await count == 0)


async def test_twenty_forced_closes_at_random_moments(shaky: Node, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """R: reconnected but not consuming; never a consumer more than registered."""
    wanted = {f"{name}-{i}": i + 1 for i in range(3)}
    inbox = Inbox()
    chance = random.Random(11)
    async with await connect_robust(shaky.url, retry=QUICK) as robust:
        for queue_name, count in wanted.items():
            channel = await robust.channel()
            await channel.set_qos(5)
            queue = await kept_queue(channel, queue_name)
            for _ in range(count):
                await queue.consume(inbox)
        for _ in range(20):
            await close_all(shaky)
            await asyncio.sleep(chance.random() * 0.15)  # anywhere between just lost and long restored

            async def counts_are_right() -> bool:
                found = {queue_name: await consumer_count(shaky, queue_name) for queue_name in wanted}
                assert all(found[key] <= wanted[key] for key in wanted), found
                return found == wanted

            if chance.random() < 0.5:
                await eventually(counts_are_right, 5)
        await eventually(counts_are_right, 5)
        await eventually(lambda: robust.state is ConnectionState.READY)
        assert robust.health().status == "ready"
        publisher = await robust.channel()
        for queue_name in wanted:
            await fill(publisher, queue_name, [b"%d" % i for i in range(10)])
        await inbox.has(*[b"%d" % (i // 3) for i in range(30)])


async def test_a_dead_link_is_noticed_and_everything_restored(link: FaultProxy, channel: Channel, name: str) -> None:
    """R6: a black hole both ways, no reset."""
    heartbeat = 1
    loop = asyncio.get_running_loop()
    async with await connect_robust(f"{link.url}?heartbeat={heartbeat}&connect_timeout=1", retry=QUICK) as robust:
        lost: list[tuple[float, BaseException | None]] = []
        robust.close_callbacks.add(lambda _, error: lost.append((loop.time(), error)))
        mine = await robust.channel()
        queue = await kept_queue(mine, name)
        inbox = Inbox()
        await queue.consume(inbox)
        link.up.blackhole = link.down.blackhole = True
        began = loop.time()
        publish = mine.default_exchange.publish(Message(b"into the hole"), name)
        with pytest.raises(AMQPConnectionError):
            await asyncio.wait_for(publish, 5)
        [(at, error)] = lost
        assert isinstance(error, HeartbeatTimeout)
        assert at - began <= 2.2 * heartbeat + 0.5
        down: Health = robust.health()
        assert down.status == "down"
        assert "heartbeat" in down.reasons[0] or "reconnecting" in down.reasons[0]
        later = mine.default_exchange.publish(Message(b"later"), name)
        await asyncio.sleep(heartbeat)  # the third interval of silence
        link.heal()
        await asyncio.wait_for(later, 5)
        await inbox.has(b"later")
        await eventually(lambda: robust.health().status == "ready")
        # The broker notices later than we do that the old link is dead; only then is the old consumer gone.
        await eventually(lambda: _is_one(consumers(channel, name)))


async def _is_one(count: Any) -> bool:
    return bool(await count == 1)


async def test_an_iterator_goes_on_after_timeouts(robust: RobustConnection, link: FaultProxy, channel: Channel) -> None:
    """R15, before and after a loss."""
    mine = await robust.channel()
    queue = await mine.declare_queue(exclusive=True)
    other = await robust.channel()
    messages = queue.iterator()
    for body in (b"one", b"two"):
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(messages), 0.1)
        await fill(other, queue.name, [body])
        message = await asyncio.wait_for(anext(messages), 10)
        assert message.body == body
        await message.ack()
        assert await consumers(other, queue.name) == 1
        await lose(link, robust)
    await messages.close()


async def test_an_iterator_and_a_callback_outlive_a_restart(
    shaky: Node, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """R16; and at most three records at WARNING or above."""
    async with await connect_robust(shaky.url, retry=QUICK) as robust:
        mine = await robust.channel()
        queue = await kept_queue(mine, name)
        other = await kept_queue(mine, f"{name}-2")
        inbox = Inbox()
        await other.consume(inbox)
        bodies: list[bytes] = []

        async def loop() -> None:
            async for message in queue:
                bodies.append(message.body)
                await message.ack()

        looping = asyncio.create_task(loop())
        await fill(mine, queue, [b"before"])
        await eventually(lambda: bodies == [b"before"])
        with few_warnings(caplog):
            await asyncio.to_thread(shaky.stop, remove=False)
            await eventually(lambda: robust.state is ConnectionState.RECONNECTING)
            assert robust.reconnecting
            publish = mine.default_exchange.publish(Message(b"while down", delivery_mode=2), name)
            await asyncio.to_thread(shaky.start)
            await asyncio.wait_for(publish, 20)
            await restored(robust, 2)
        await fill(mine, queue, [b"after"])
        await fill(mine, other, [b"to the callback"])
        await eventually(lambda: bodies == [b"before", b"while down", b"after"])
        await inbox.has(b"to the callback")
        assert not looping.done()
        await robust.close()
        await asyncio.wait_for(looping, 5)


async def test_reconnect(robust: RobustConnection, link: FaultProxy, name: str) -> None:
    mine = await robust.channel()
    queue = await kept_queue(mine, name)
    inbox = Inbox()
    await queue.consume(inbox)
    publish = mine.default_exchange.publish(Message(b"in flight"), name)
    await asyncio.wait_for(robust.reconnect(), 10)
    assert robust.connection_attempt == 2
    await asyncio.wait_for(publish, 1)
    await fill(mine, queue, [b"after"])
    await eventually(lambda: {b"in flight", b"after"} <= set(inbox.bodies))


async def test_reopening_a_channel_keeps_what_was_on_it(robust: RobustConnection, name: str) -> None:
    mine = await robust.channel()
    queue = await kept_queue(mine, name)
    inbox = Inbox()
    await queue.consume(inbox)
    for i in range(5):
        await asyncio.wait_for(mine.reopen(), 10)
        await fill(mine, queue, [b"%d" % i])
        assert await consumers(mine, name) == 1
    await inbox.has(*[b"%d" % i for i in range(5)])
    assert robust.health().status == "ready"


async def test_callbacks_of_every_kind(robust: RobustConnection, link: FaultProxy, loop_errors: list[Any]) -> None:
    """Section A 13: sync or async, exceptions stay inside, changed from inside."""
    called: list[str] = []

    async def slowly(connection: RobustConnection | None) -> None:
        await asyncio.sleep(0)
        called.append("async")

    def once(connection: RobustConnection | None) -> None:
        called.append("once")
        robust.reconnect_callbacks.discard(once)
        robust.reconnect_callbacks.add(lambda _: called.append("added"))

    robust.reconnect_callbacks.add(once)
    robust.reconnect_callbacks.add(slowly)
    await lose(link, robust)
    await eventually(lambda: "async" in called)
    assert sorted(called) == ["async", "once"]
    await lose(link, robust)
    await eventually(lambda: called.count("async") == 2)
    assert called.count("once") == 1
    assert called.count("added") == 1


@pytest.mark.expects_errors
async def test_a_callback_that_raises_disturbs_nobody(robust: RobustConnection, link: FaultProxy) -> None:
    def wrong(*_: Any) -> None:
        raise RuntimeError("a mistake")

    mine = await robust.channel()
    for collection in (robust.close_callbacks, robust.reconnect_callbacks, robust.state_callbacks):
        collection.add(wrong)
    mine.close_callbacks.add(wrong)
    mine.reopen_callbacks.add(wrong)
    await lose(link, robust)
    await mine.declare_queue(exclusive=True)


# --------------------------------------------------------------------------------------------------- closing


@pytest.mark.parametrize("moment", ["backoff", "tcp", "handshake", "replay"])
async def test_close_wins(link: FaultProxy, name: str, moment: str) -> None:
    """R21: close() in the middle of recovering returns in time, and nothing comes back later."""
    robust = await connect_robust(link.url, reconnect_interval=30 if moment == "backoff" else 0.01)
    mine = await robust.channel()
    queue = await kept_queue(mine, name)
    inbox = Inbox()
    await queue.consume(inbox)
    messages = queue.iterator()
    waiting = asyncio.create_task(messages.__anext__())
    await eventually(lambda: messages.consumer_tag)
    accepted = link.accepted
    if moment == "backoff":
        await link.refuse()
    elif moment == "replay":  # no answer from there on

        def stall(_: object, old: ConnectionState, new: ConnectionState, cause: object) -> None:
            link.down.stall = new is _RECOVERING

        robust.state_callbacks.add(stall)
    else:
        link.silent = True
    link.rst()
    await eventually(lambda: robust.state is ConnectionState.RECONNECTING)
    if moment == "handshake":
        await eventually(lambda: link.accepted > accepted)
    elif moment == "replay":
        await eventually(lambda: robust.state is _RECOVERING)
    publish = mine.default_exchange.publish(Message(b"x"), name)
    began = asyncio.get_running_loop().time()
    await robust.close(timeout=1)
    assert asyncio.get_running_loop().time() - began < 2
    assert robust.state is ConnectionState.CLOSED
    assert robust.is_closed
    assert mine.is_closed
    with pytest.raises(StopAsyncIteration):
        await asyncio.wait_for(waiting, 1)
    with pytest.raises((PublishNotSent, AMQPConnectionError)):
        await asyncio.wait_for(publish, 1)
    with pytest.raises(ChannelInvalidStateError):
        await mine.declare_queue(name, passive=True)
    accepted = link.accepted
    link.heal()
    await link.accept()
    assert "leveret recovery" not in {task.get_name() for task in asyncio.all_tasks()}, "nothing is left to connect"
    assert link.accepted == accepted
    await robust.close()
    assert robust.state is ConnectionState.CLOSED


async def test_closing_twice_at_once_and_from_inside(link: FaultProxy, name: str) -> None:
    """Section A 12."""
    never = RobustConnection(link.url)
    await never.close()
    with pytest.raises(RuntimeError):
        await never.connect()

    robust = await connect_robust(link.url)
    mine = await robust.channel()
    queue = await kept_queue(mine, name)
    closed_inside = asyncio.Event()

    async def callback(message: IncomingMessage) -> None:
        await message.ack()
        await robust.close()
        closed_inside.set()

    await queue.consume(callback)
    waiters = [asyncio.ensure_future(robust.closed()) for _ in range(2)]
    waiters[0].cancel()
    await fill(mine, queue, [b"close"])
    await asyncio.wait_for(closed_inside.wait(), 5)
    await asyncio.gather(robust.close(), robust.close())
    assert await waiters[1] is True
    assert robust.health().status == "down"

    robust = await connect_robust(link.url)
    told: list[object] = []
    robust.close_callbacks.add(lambda _, error: told.append(error))

    async def close_it(connection: RobustConnection | None) -> None:
        await robust.close()
        told.append("closed")

    robust.reconnect_callbacks.add(close_it)
    link.rst()
    await eventually(lambda: "closed" in told)
    assert robust.state is ConnectionState.CLOSED
    assert [type(error) for error in told] == [ConnectionClosed, ConnectionClosed, str]


async def test_a_failed_connect_may_be_repeated(link: FaultProxy) -> None:
    await link.refuse()
    robust = RobustConnection(link.url)
    for _ in range(2):
        with pytest.raises(AMQPConnectionError):
            await robust.connect()
        assert robust.state is ConnectionState.NEW
    await link.accept()
    await robust.connect()
    assert robust.state is ConnectionState.READY
    with pytest.raises(RuntimeError):
        await robust.connect()
    await robust.close()


@pytest.mark.expects_errors
async def test_giving_up_tells_everybody(link: FaultProxy, name: str) -> None:
    robust = await connect_robust(link.url, retry=RetryPolicy(initial=0.01, maximum=0.01, max_attempts=3))
    mine = await robust.channel()
    queue = await kept_queue(mine, name)
    told: list[BaseException | None] = []
    mine.close_callbacks.add(lambda _, error: told.append(error))
    messages = queue.iterator()
    waiting = asyncio.create_task(messages.__anext__())
    await eventually(lambda: messages.consumer_tag)
    await link.refuse()
    link.rst()
    await eventually(lambda: robust.state is ConnectionState.RECONNECTING)
    publish = mine.default_exchange.publish(Message(b"x"), name)
    declaring = asyncio.create_task(mine.declare_queue(name, passive=True))
    opening = asyncio.create_task(robust.channel().initialize())
    closed = asyncio.ensure_future(robust.closed())
    assert await asyncio.wait_for(closed, 5) is True
    for future in (waiting, publish, declaring, opening):
        with pytest.raises((AMQPConnectionError, ChannelInvalidStateError)):
            await asyncio.wait_for(future, 1)
    with pytest.raises(ConnectionClosed):
        await robust.ready()
    assert robust.state is ConnectionState.CLOSED
    assert len(told) == 2
    assert robust.health().status == "down"
    await robust.close()
