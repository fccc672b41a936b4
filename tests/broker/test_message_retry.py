"""Messages whose handler fails: tried again after their delays, put aside in the end, never lost, never for ever."""

from __future__ import annotations

import asyncio
import copy
import logging
from typing import TYPE_CHECKING, Any

import pytest

from leveret import (
    Channel,
    IncomingMessage,
    Message,
    MessageRetry,
    Queue,
    Reject,
    RobustConnection,
    Verdict,
    connect,
)
from leveret.exceptions import ChannelAccessRefused, ChannelNotFoundEntity, ChannelPreconditionFailed
from leveret.retrier import Retrier
from leveret.retry_ladder import Backend
from leveret.wire import codec
from tests.broker.test_helpers import drain, eventually, fill, holds, ready
from tests.broker.test_robust import lose, restored

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from leveret import Connection
    from tests.support.brokers import RemoteBroker
    from tests.support.node import Node
    from tests.support.proxy import FaultProxy

QUORUM = {"x-queue-type": "quorum"}
KINDS: dict[str, dict[str, Any]] = {
    "classic": {"durable": True, "arguments": {"x-queue-type": "classic"}},
    "quorum": {"durable": True, "arguments": QUORUM},
    "priority": {"durable": True, "arguments": {"x-queue-type": "classic", "x-max-priority": 9}},
    "auto-delete": {"auto_delete": True},
    "exclusive": {"exclusive": True},
}


class Handler:
    """Fails as often as it is told, and remembers what came, and when."""

    def __init__(self, failures: float = float("inf"), error: BaseException | None = None) -> None:
        self.failures = failures
        self.error = error or ValueError("no good")
        self.messages: list[IncomingMessage] = []
        self.times: list[float] = []

    async def __call__(self, message: IncomingMessage) -> None:
        self.messages.append(message)
        self.times.append(asyncio.get_running_loop().time())
        if len(self.messages) <= self.failures:
            raise copy.copy(self.error)

    async def called(self, times: int) -> None:
        """Wait until it was called so many times."""
        await eventually(lambda: len(self.messages) >= times)
        assert len(self.messages) == times


class Bench:
    """Consumes with retries, and cleans up."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.queues: set[str] = set()

    async def consume(
        self, queue: Queue, retry: MessageRetry, handler: Callable[[IncomingMessage], Awaitable[None]]
    ) -> Retrier:
        retrier = await retry.prepare(queue)
        self.queues |= {queue.name, *(spec.name for spec in retrier._plan.queues)}
        await queue.consume(handler, retry=retry)
        return retrier

    async def parked(self, name: str) -> IncomingMessage:
        """The one message that ends in that queue."""
        parked = await self._channel.get_queue(name)
        message = await eventually(lambda: parked.get(fail=False))
        await message.ack()
        assert await ready(self._channel, name) == 0
        assert isinstance(message, IncomingMessage)
        return message


@pytest.fixture
async def bench(channel: Channel) -> AsyncIterator[Bench]:
    bench = Bench(channel)
    yield bench
    for name in bench.queues:
        await channel.queue_delete(name)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leveret.retrier.PAUSES", (0.0, 0.01, 0.02))


async def published(channel: Channel, name: str, body: bytes = b"a", **properties: Any) -> None:
    await fill(channel, name, [body], **properties)


# ---------------------------------------------------------------------------------------------------- again and again


@pytest.mark.parametrize("kind", KINDS)
async def test_fails_twice_and_succeeds(
    connection: Connection, bench: Bench, channel: Channel, name: str, kind: str
) -> None:
    """The delays are kept, the message is as it was, and nobody else gets it a second time."""
    exchange = await channel.declare_exchange(f"{name}-x", "topic", auto_delete=True)
    queue = await channel.declare_queue(name, **KINDS[kind])
    other = await channel.declare_queue(exclusive=True)
    copied = await channel.declare_queue(exclusive=True)
    for each in (queue, other):
        await each.bind(exchange, "order.*")
    await copied.bind(exchange, copied.name)
    handler = Handler(failures=2)
    await bench.consume(queue, MessageRetry(delays=(0.06, 0.15), park_in=f"{name}.aside"), handler)
    own = {"priority": 3, "delivery_mode": 2, "type": "t", "reply_to": "r", "message_id": "m", "correlation_id": "c"}
    headers = {"mine": [1, {"a": b"\xff"}], "BCC": [copied.name]}
    message = Message(b"a", headers=headers, expiration=60, user_id="guest", **own)  # type: ignore[arg-type]
    await exchange.publish(message, "order.new")
    await handler.called(3)
    gaps = [after - before for before, after in zip(handler.times, handler.times[1:], strict=False)]
    assert gaps[0] >= 0.06
    assert gaps[1] >= 0.15
    last = handler.messages[2]
    assert {key: getattr(last, key) for key in own} == own
    assert last.body == b"a"
    assert last.headers["mine"] == [1, {"a": b"\xff"}]
    assert last.headers["x-retry-count"] == 2
    assert (last.headers["x-retry-exchange"], last.headers["x-retry-routing-key"]) == (exchange.name, "order.new")
    assert (last.headers["x-retry-expiration"], last.headers["x-retry-user-id"]) == (60.0, "guest")
    assert last.expiration is None
    await eventually(lambda: last.processed)
    assert await drain(other) == [b"a"]
    assert await drain(copied) == [b"a"]
    await holds(channel, f"{name}.aside", 0)
    assert not channel.is_closed


async def test_cc_does_not_fan_out_again(bench: Bench, channel: Channel, name: str) -> None:
    queue = await channel.declare_queue(name, durable=True)
    copied = await channel.declare_queue(exclusive=True)
    await bench.consume(queue, MessageRetry(attempts=3, delays=(0.02, 0)), Handler())
    await published(channel, name, headers={"CC": [copied.name]})
    parked = await bench.parked(f"{name}.parked")
    assert "CC" not in parked.headers
    assert await drain(copied) == [b"a"]


async def test_a_queue_of_which_the_name_is_known_only(bench: Bench, channel: Channel, name: str) -> None:
    """Its rungs are those that somebody who declared it uses."""
    retry = MessageRetry(delays=0.05)
    for arguments in (QUORUM, {"x-queue-type": "classic"}):
        mine = f"{name}-{arguments['x-queue-type']}"
        declared = await channel.declare_queue(mine, durable=True, arguments=arguments)
        handler = Handler(failures=1)
        await retry.prepare(declared)
        await bench.consume(await channel.get_queue(mine), retry, handler)
        await published(channel, mine)
        await handler.called(2)
        assert handler.times[1] - handler.times[0] >= 0.05


async def test_a_long_name_and_a_channel_without_confirms(connection: Connection, bench: Bench, name: str) -> None:
    async with connection.channel(publisher_confirms=False) as channel:
        queue = await channel.declare_queue(name + "é" * ((255 - len(name)) // 2), durable=True)
        handler = Handler(failures=1)
        retrier = await bench.consume(queue, MessageRetry(delays=0.02), handler)
        assert all(len(spec.name.encode()) <= 255 for spec in retrier._plan.queues)
        await channel.default_exchange.publish(Message(b"a"), queue.name)
        await handler.called(2)


# ---------------------------------------------------------------------------------------------- the queue's own means


async def test_a_quorum_queue_counts_itself(
    bench: Bench, channel: Channel, name: str, broker: Node | RemoteBroker
) -> None:
    queue = await channel.declare_queue(name, durable=True, arguments=QUORUM)
    handler = Handler()
    retrier = await bench.consume(queue, MessageRetry(attempts=4, delays=0), handler)
    native = broker.version_info >= (4, 0)
    assert retrier.backend is (Backend.REQUEUE if native else Backend.LADDER)
    await published(channel, name, headers={"x-delivery-count": -7})
    parked = await bench.parked(f"{name}.parked")
    await handler.called(4)
    assert parked.headers["x-retry-attempts"] == 4
    assert ("x-retry-count" in handler.messages[-1].headers) is not native
    counts = [m.headers.get("x-delivery-count") for m in handler.messages][1:]
    assert counts == ([1, 2, 3] if native else [None] * 3)


async def test_a_delivery_limit_that_is_too_low_is_gone_around(bench: Bench, channel: Channel, name: str) -> None:
    queue = await channel.declare_queue(name, durable=True, arguments=QUORUM | {"x-delivery-limit": 2})
    handler = Handler()
    retrier = await bench.consume(queue, MessageRetry(attempts=5, delays=0), handler)
    assert retrier.backend is Backend.LADDER
    await published(channel, name)
    assert (await bench.parked(f"{name}.parked")).headers["x-retry-attempts"] == 5
    await handler.called(5)


async def test_delayed_retry(bench: Bench, channel: Channel, name: str, broker: Node | RemoteBroker) -> None:
    """RabbitMQ 4.3 delays by the queue's figures; releases before take the arguments, and rungs do it."""
    arguments = {"x-delayed-retry-type": "failed", "x-delayed-retry-min": 60, "x-delayed-retry-max": 100}
    queue = await channel.declare_queue(name, durable=True, arguments=QUORUM | arguments)
    handler = Handler()
    retrier = await bench.consume(queue, MessageRetry(attempts=3, delays=(0.06, 0.1)), handler)
    assert (retrier.backend is Backend.DELAYED_RETRY) is (broker.version_info >= (4, 3))
    await published(channel, name)
    assert (await bench.parked(f"{name}.parked")).headers["x-retry-attempts"] == 3
    await handler.called(3)
    assert handler.times[1] - handler.times[0] >= 0.055
    assert handler.times[2] - handler.times[1] >= 0.095


# ----------------------------------------------------------------------------------------------------------- put aside


async def test_parked_with_the_reasons(bench: Bench, channel: Channel, name: str) -> None:
    queue = await channel.declare_queue(name, durable=True)
    handler = Handler()
    await bench.consume(queue, MessageRetry(attempts=2, delays=0.02), handler)
    await published(channel, name, headers={"mine": 1}, priority=4, message_id="m")
    parked = await bench.parked(f"{name}.parked")
    await handler.called(2)
    assert (parked.body, parked.priority, parked.message_id, parked.headers["mine"]) == (b"a", 4, "m", 1)
    expected = {
        "x-retry-attempts": 2,
        "x-retry-reason": "attempts used up",
        "x-retry-error-type": "builtins.ValueError",
        "x-retry-error": "no good",
        "x-retry-queue": name,
        "x-retry-exchange": "",
        "x-retry-routing-key": name,
    }
    assert {key: parked.headers.get(key) for key in expected} == expected
    assert "x-retry-count" not in parked.headers  # it starts anew when somebody moves it back
    assert await ready(channel, name) == 0


async def test_errors_that_are_not_worth_it(bench: Bench, channel: Channel, name: str) -> None:
    queue = await channel.declare_queue(name, durable=True)
    handler = Handler(error=UnicodeError("never"))
    await bench.consume(queue, MessageRetry(retry_on=ValueError, never=UnicodeError, park_in=f"{name}.aside"), handler)
    await published(channel, name)
    assert (await bench.parked(f"{name}.aside")).headers["x-retry-reason"] == "not retried"
    await handler.called(1)


async def test_to_an_exchange(bench: Bench, channel: Channel, name: str) -> None:
    """By the routing key that it was first published with, also after it was on a rung."""
    shop = await channel.declare_exchange(f"{name}-shop", "topic", auto_delete=True)
    dead = await channel.declare_exchange(f"{name}-dead", "topic", auto_delete=True)
    queue = await channel.declare_queue(name, durable=True)
    await queue.bind(shop, "#")
    by_key = await channel.declare_queue(f"{name}-k", exclusive=True)
    await by_key.bind(dead, "order.new")
    await bench.consume(queue, MessageRetry(attempts=3, delays=(0.02, 0), dead_letter_to=dead.name), Handler())
    await shop.publish(Message(b"a"), "order.new")
    parked = await bench.parked(by_key.name)
    assert (parked.exchange, parked.headers["x-retry-exchange"]) == (dead.name, shop.name)
    assert parked.routing_key == "order.new"
    with pytest.raises(ChannelNotFoundEntity):
        await MessageRetry(dead_letter_to=f"{name}-none").prepare(queue)
    assert not channel.is_closed


FORGED: list[dict[str, Any]] = [
    {"x-retry-count": -(2**63), "x-delivery-count": -1},
    {"x-retry-count": 2**63 - 1},
    {"x-retry-count": "1", "x-retry-exchange": 5, "x-retry-routing-key": [1], "x-retry-error-time": "never"},
    {"x-death": [1, 2]},
    {"x-death": [{"queue": 5, "count": "x", "reason": 3, "exchange": 1, "routing-keys": 2}]},
    {"x-death": "nothing", "x-first-death-queue": 5, "x-acquired-count": [1], "CC": 5},
]


@pytest.mark.parametrize("kind", ["classic", "quorum"])
async def test_forged_headers(bench: Bench, channel: Channel, name: str, kind: str) -> None:
    """Each message comes to its end after so many attempts or fewer, and harms no other."""
    queue = await channel.declare_queue(name, **KINDS[kind])
    handler = Handler()
    await bench.consume(queue, MessageRetry(attempts=3, delays=0.03), handler)
    cycle = {"queue": name, "reason": "expired", "count": 7, "exchange": "e", "routing-keys": ["a"]}
    forged = [*FORGED[:-1], {"x-death": [cycle]}]
    for number, headers in enumerate(forged):
        await published(channel, name, b"%d" % number, headers=headers)
    await published(channel, name, b"innocent")
    await holds(channel, f"{name}.parked", len(forged) + 1)
    calls = [message.body for message in handler.messages]
    assert calls.count(b"innocent") == 3
    assert calls.count(b"1") == 1
    assert max(map(calls.count, set(calls))) == 3


async def test_a_count_that_is_there_several_times(
    bench: Bench, channel: Channel, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RabbitMQ 3.10 replaces the first one only, and the last one is what a client sees: it would hide the true one."""
    queue = await channel.declare_queue(name, durable=True, arguments=QUORUM)
    handler = Handler()
    await bench.consume(queue, MessageRetry(attempts=3, delays=0), handler)
    await publish_raw(channel, name, b"\x10x-delivery-countI\0\0\0\0" * 3, monkeypatch)
    await bench.parked(f"{name}.parked")
    await handler.called(3)


async def test_malformed_headers(bench: Bench, channel: Channel, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They cannot be counted, so the message is put aside at its first failure."""
    queue = await channel.declare_queue(name, durable=True)
    handler = Handler()
    await bench.consume(queue, MessageRetry(delays=0.02), handler)
    deep = b""  # no broker minds
    for _ in range(500):
        deep = b"\x01aF" + len(deep).to_bytes(4, "big") + deep
    await publish_raw(channel, name, deep, monkeypatch)
    parked = await bench.parked(f"{name}.parked")
    assert handler.messages[0].headers_error is not None
    assert parked.headers["x-retry-reason"] == "malformed headers"
    assert parked.headers["x-retry-raw-headers"] == handler.messages[0].headers_raw
    await handler.called(1)


async def publish_raw(channel: Channel, name: str, table: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Publish a message with those bytes for a table of headers."""
    properties = (0x2000).to_bytes(2, "big") + len(table).to_bytes(4, "big") + table
    with monkeypatch.context() as patch:
        patch.setattr(codec, "_encode_properties", lambda _: properties)
        confirmed = channel.default_exchange.publish(Message(b"a", headers={"mine": 1}), name)
    await confirmed


async def test_headers_that_leave_no_room(bench: Bench, channel: Channel, name: str) -> None:
    """A message whose headers fill the frame is put aside without them: no header can be added to it."""
    queue = await channel.declare_queue(name, durable=True)
    await bench.consume(queue, MessageRetry(delays=0.02), Handler())
    await published(channel, name, headers={"mine": "x" * (131_072 - 60)})
    parked = await bench.parked(f"{name}.parked")
    assert "mine" not in parked.headers
    assert parked.headers["x-retry-reason"] == "cannot be published again"


async def test_what_the_broker_refuses(bench: Bench, channel: Channel, name: str) -> None:
    """It closes the channel over such a copy; others that were on their way are not taken for such."""
    queue = await channel.declare_queue(name, durable=True)
    retrier = await MessageRetry(attempts=2, delays=0.02).prepare(queue)
    bench.queues |= {name, f"{name}.parked", f"{name}.retry.20"}
    await fill(channel, name, [b"good", b"bad", b"good"])
    messages = [await queue.get() for _ in range(3)]
    messages[1].reply_to = "amq.rabbitmq.reply-to"  # refused without a consumer for it
    await asyncio.gather(*[retrier.on_failure(message, ValueError("no good")) for message in messages])
    parked = await bench.parked(f"{name}.parked")
    assert (parked.body, parked.headers["x-retry-reason"]) == (b"bad", "cannot be published again")
    assert parked.reply_to is None
    again = [await eventually(lambda: queue.get(no_ack=True, fail=False)) for _ in range(2)]
    assert [message.body for message in again] == [b"good", b"good"]
    assert not channel.is_closed


# ------------------------------------------------------------------------------------------------ declared by several


async def test_many_prepare_at_once(amqp_url: str, bench: Bench, channel: Channel, name: str) -> None:
    retry = MessageRetry(delays=(0.02, 0.03, 0.02), park_in=f"{name}.aside")
    queue = await channel.declare_queue(name, durable=True, arguments=QUORUM)
    async with await connect(amqp_url) as one, await connect(amqp_url) as two:
        handles = [await (await each.channel()).get_queue(name) for each in (one, two) for _ in range(3)]
        await asyncio.gather(*[retry.prepare(each) for each in (*handles, queue)])
        assert len(one._channels) == 4  # one more than this test opened
    await retry.prepare(queue)
    handler = Handler(failures=3)
    await bench.consume(queue, retry, handler)
    await published(channel, name)
    await handler.called(4)


async def test_queues_that_exist_with_other_arguments(bench: Bench, channel: Channel, name: str) -> None:
    """Any parking queue will do; a rung has to be what it is, and no channel of the user's is closed."""
    queue = await channel.declare_queue(name, durable=True)
    await channel.declare_queue(f"{name}.aside", durable=True, arguments={"x-max-length": 5})
    await bench.consume(queue, MessageRetry(attempts=1, park_in=f"{name}.aside"), Handler())
    await published(channel, name)
    await bench.parked(f"{name}.aside")
    await channel.declare_queue(f"{name}.retry.77", auto_delete=True)
    bench.queues.add(f"{name}.retry.77")
    with pytest.raises(ChannelPreconditionFailed, match=r"retry\.77"):
        await MessageRetry(delays=0.077, park_in=f"{name}.aside").prepare(queue)
    assert not channel.is_closed


async def test_a_robust_channel_is_spared_too(
    robust: RobustConnection, bench: Bench, channel: Channel, name: str
) -> None:
    mine = await robust.channel()
    lost: list[object] = []
    mine.close_callbacks.add(lambda _, error: lost.append(error))
    queue = await mine.declare_queue(name, durable=True)
    await channel.declare_queue(f"{name}.parked", durable=True, arguments={"x-max-length": 5})
    handler = Handler()
    await bench.consume(queue, MessageRetry(attempts=2, delays=0.02), handler)
    await published(channel, name)
    await bench.parked(f"{name}.parked")
    await handler.called(2)
    assert lost == []


@pytest.mark.node
async def test_a_user_that_may_declare_nothing(broker: Node, bench: Bench, channel: Channel, name: str) -> None:
    """It is enough that the queues exist."""
    await asyncio.to_thread(permit, broker, "^$")
    try:
        retry = MessageRetry(attempts=2, delays=0.02)
        theirs = await channel.declare_queue(name, durable=True)
        async with await connect(broker.url.replace("guest:guest", "alice:unused")) as mine:
            queue = await (await mine.channel()).get_queue(name)
            with pytest.raises(ChannelAccessRefused):
                await retry.prepare(queue)
            await retry.prepare(theirs)
            await bench.consume(queue, retry, Handler())
            await published(channel, name, user_id="guest")
            assert (await bench.parked(f"{name}.parked")).headers["x-retry-user-id"] == "guest"
    finally:
        await asyncio.to_thread(permit, broker, ".*")


def permit(broker: Node, configure: str) -> None:
    """What alice may declare."""
    broker.set_permissions("alice", configure, ".*", ".*")


async def test_queues_that_were_deleted_are_back(bench: Bench, channel: Channel, name: str) -> None:
    queue = await channel.declare_queue(name, durable=True)
    handler = Handler()
    await bench.consume(queue, MessageRetry(attempts=2, delays=0.04), handler)
    for each in (f"{name}.parked", f"{name}.retry.40"):
        await channel.queue_delete(each)
    await published(channel, name)
    await handler.called(1)
    await eventually(lambda: len(handler.messages) == 2)
    await holds(channel, f"{name}.parked", 1)
    await bench.parked(f"{name}.parked")


@pytest.mark.expects_errors
@pytest.mark.usefixtures("quick")
async def test_what_cannot_be_parked_is_requeued(
    bench: Bench, channel: Channel, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Not acknowledged before it is confirmed: the full parking queue refuses it."""
    queue = await channel.declare_queue(name, durable=True)
    full = await channel.declare_queue(
        f"{name}.aside", durable=True, arguments={"x-max-length": 1, "x-overflow": "reject-publish"}
    )
    await published(channel, full.name, b"first")
    handler = Handler()
    await bench.consume(queue, MessageRetry(attempts=1, park_in=full.name), handler)
    await published(channel, name)
    await eventually(lambda: len(handler.messages) == 3)
    assert [message.redelivered for message in handler.messages] == [False, True, True]
    assert (await full.get(no_ack=True)).body == b"first"
    assert (await bench.parked(full.name)).body == b"a"
    said = [record.levelname for record in caplog.records if "cannot be published" in record.getMessage()]
    assert said[:4] == ["WARNING"] * 3 + ["ERROR"]


@pytest.mark.usefixtures("quick")
async def test_it_is_held_where_requeueing_could_lose_it(
    bench: Bench, channel: Channel, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quorum queue that takes it back once drops it the second time; it is held until there is room."""
    queue = await channel.declare_queue(name, durable=True, arguments=QUORUM | {"x-delivery-limit": 1})
    full = await channel.declare_queue(
        f"{name}.aside", durable=True, arguments={"x-max-length": 1, "x-overflow": "reject-publish"}
    )
    await published(channel, full.name, b"first")
    handler = Handler()
    publishes = count_calls(monkeypatch)
    await bench.consume(queue, MessageRetry(attempts=1, park_in=full.name), handler)
    await published(channel, name)
    await eventually(lambda: len(publishes) > 6)
    assert (await full.get(no_ack=True)).body == b"first"
    assert (await bench.parked(full.name)).body == b"a"
    await handler.called(1)


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What retriers publish from now on."""
    publish, calls = Retrier._publish, list[object]()

    async def counted(self: Retrier, copy: Any) -> Any:
        calls.append(copy)
        return await publish(self, copy)

    monkeypatch.setattr(Retrier, "_publish", counted)
    return calls


# ------------------------------------------------------------------------------------------------------ lost, cancelled


async def test_cut_between_publish_and_ack(link: FaultProxy, bench: Bench, channel: Channel, name: str) -> None:
    """The copy is there, its confirm never comes: the original was not acknowledged, so there are two."""
    async with await connect(link.url) as mine:
        queue = await (await mine.channel()).declare_queue(name, durable=True)
        handler = Handler()

        async def blind(message: IncomingMessage) -> None:
            link.down.blackhole = True
            await handler(message)

        await bench.consume(queue, MessageRetry(attempts=1), blind)
        await published(channel, name)
        await holds(channel, f"{name}.parked", 1)
        assert not handler.messages[0].processed
        link.rst()
        await eventually(lambda: mine.is_closed)
        await holds(channel, name, 1)
        await eventually(lambda: not mine._channels)  # its handler has ended, without an error


@pytest.mark.parametrize("where", ["rung", "parking queue"])
async def test_a_robust_connection_recovers_meanwhile(
    link: FaultProxy, robust: RobustConnection, bench: Bench, channel: Channel, name: str, where: str
) -> None:
    """The link dies while the copy is on its way: the message is dealt with again, once or twice, and never lost."""
    mine = await robust.channel()
    queue = await mine.declare_queue(name, durable=True, arguments=QUORUM)
    calls: list[IncomingMessage] = []

    async def handle(message: IncomingMessage) -> None:
        calls.append(message)
        if len(calls) == 1:
            link.down.blackhole = True
        if len(calls) == 1 or where != "rung":
            raise ValueError("no good")

    attempts = 3 if where == "rung" else 1
    retry = MessageRetry(attempts=attempts, delays=0.05 if attempts > 1 else None)
    await bench.consume(queue, retry, handle)
    await published(channel, name)
    aside = f"{name}.retry.50" if where == "rung" else f"{name}.parked"
    await eventually(lambda: calls)
    if where == "parking queue":
        await holds(channel, aside, 1)
    attempt = robust.connection_attempt + 1
    link.rst()
    link.down.heal()
    await restored(robust, attempt)
    if where == "rung":
        await eventually(lambda: len(calls) >= 2 and calls[-1].processed)
    else:
        await holds(channel, aside, 2)
    await holds(channel, name, 0)
    assert any(message.body == b"a" for message in calls[1:])


async def test_a_server_named_queue_gets_rungs_for_its_new_name(
    link: FaultProxy, robust: RobustConnection, bench: Bench, channel: Channel, name: str
) -> None:
    mine = await robust.channel()
    queue = await mine.declare_queue("", exclusive=True)
    handler = Handler()
    await bench.consume(queue, MessageRetry(attempts=2, delays=0.02, park_in=f"{name}.aside"), handler)
    for _ in range(2):
        await mine.default_exchange.publish(Message(b"a"), queue.name)
        assert (await bench.parked(f"{name}.aside")).headers["x-retry-queue"] == queue.name
        old = queue.name
        await lose(link, robust)
        assert queue.name != old
    await handler.called(4)


async def test_cancelled_handlers_fail_nothing(
    connection: Connection, bench: Bench, channel: Channel, name: str
) -> None:
    """What a stopped worker was at goes back to the queue as it was."""
    begun = asyncio.Event()

    async def handle(message: IncomingMessage) -> None:
        begun.set()
        await asyncio.Event().wait()

    async with connection.channel() as mine:
        queue = await mine.declare_queue(name, durable=True)
        await bench.consume(queue, MessageRetry(attempts=1), handle)
        await published(channel, name)
        await begun.wait()
    await holds(channel, name, 1)
    await holds(channel, f"{name}.parked", 0)


async def test_cancelled_while_it_is_held(
    connection: Connection, bench: Bench, channel: Channel, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = await channel.declare_queue(
        f"{name}.aside", durable=True, arguments={"x-max-length": 1, "x-overflow": "reject-publish"}
    )
    await published(channel, full.name, b"first")
    async with connection.channel() as mine:
        queue = await mine.declare_queue(name, durable=True)
        publishes = count_calls(monkeypatch)
        await bench.consume(queue, MessageRetry(attempts=1, park_in=full.name), Handler())
        await published(channel, name)
        await eventually(lambda: len(publishes) == 3)
    await holds(channel, name, 1)
    assert await drain(full) == [b"first"]


async def test_an_error_of_something_cancelled_is_a_failure(bench: Bench, channel: Channel, name: str) -> None:
    """Nobody stopped the handler: it awaited what somebody else had cancelled. It must not go round in a hurry."""
    queue = await channel.declare_queue(name, durable=True)
    retrier = await MessageRetry(attempts=1).prepare(queue)
    bench.queues |= {name, f"{name}.parked"}
    await published(channel, name)
    message = await queue.get()
    await retrier.on_failure(message, asyncio.CancelledError())
    assert (await bench.parked(f"{name}.parked")).headers["x-retry-error-type"].endswith("CancelledError")  # type: ignore[union-attr]


async def test_settled_or_lost_before(
    amqp_url: str, bench: Bench, channel: Channel, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    queue = await channel.declare_queue(name, durable=True)
    retrier = await MessageRetry(attempts=1).prepare(queue)
    bench.queues |= {name, f"{name}.parked"}
    await published(channel, name)
    message = await queue.get()
    await message.ack()
    with caplog.at_level(logging.INFO, "leveret"):
        await retrier.on_failure(message, ValueError("too late"))
        assert "had been settled" in caplog.text
        async with await connect(amqp_url) as other:
            theirs = await (await other.channel()).get_queue(name)
            retrier = await MessageRetry(attempts=1).prepare(theirs)
            await published(channel, name)
            message = await theirs.get()
        await retrier.on_failure(message, ValueError("gone"))
        assert "delivers it again" in caplog.text
    await holds(channel, name, 1)
    await holds(channel, f"{name}.parked", 0)


async def test_retry_is_instead_of_on_error_and_needs_acks(channel: Channel, name: str) -> None:
    queue = await channel.declare_queue(name, exclusive=True)
    retry = MessageRetry(park_in=f"{name}.parked")
    with pytest.raises(ValueError, match="choose one of retry and on_error"):
        await queue.consume(print, retry=retry, on_error="reject")
    with pytest.raises(ValueError, match="retry means nothing with no_ack"):
        await queue.consume(print, True, retry=retry)
    with pytest.raises(ValueError, match="temporary"):
        await queue.consume(print, retry=MessageRetry())
    with pytest.raises(ValueError, match="ack_batch must be 2 or more"):
        await queue.consume(print, retry=retry, ack_batch=1)
    with pytest.raises(ChannelNotFoundEntity):  # nothing was declared
        await (await channel._connection.channel()).get_queue(f"{name}.parked")
    assert queue.channel.is_live


@pytest.mark.parametrize("thread", [False, True])
async def test_a_callback_that_returns_has_its_message_acknowledged(channel: Channel, name: str, thread: bool) -> None:
    queue = await channel.declare_queue(name, exclusive=True)
    seen: list[bytes] = []

    def callback(message: IncomingMessage) -> Verdict | None:
        seen.append(message.body)
        return Reject if message.body == b"no" else None

    retry = MessageRetry(park_in=f"{name}.parked")
    consumer = await queue.consume(callback, retry=retry, thread=thread, prefetch=1)
    await fill(channel, queue, [b"yes", b"no", b"yes"])
    await eventually(lambda: len(seen) == 3)
    await consumer.stop()
    assert await ready(channel, name) == 0
    assert consumer.failed == 0
    await channel.queue_delete(f"{name}.parked")
