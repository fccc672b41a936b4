"""Messages: what round-trips, and how they are settled."""

from __future__ import annotations

import asyncio
import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
from yarl import URL

from leveret import Channel, Connection, DeliveryMode, Message, MessageProcessError, connect
from leveret.exceptions import ChannelInvalidStateError, DeliveryLost, QueueEmpty
from tests.broker.test_helpers import drain, fill, holds
from tests.support.proxy import FaultProxy

if TYPE_CHECKING:
    from leveret import IncomingMessage, Queue

UTC = datetime.UTC
NOON = datetime.datetime(2024, 2, 29, 12, 0, 1, tzinfo=UTC)


# -------------------------------------------------------------------------------------------------- round trip


async def test_all_fourteen_properties_round_trip(channel: Channel, queue: Queue) -> None:
    given: dict[str, Any] = {
        "app_id": "app",
        "content_encoding": "gzip",
        "content_type": "application/json",
        "correlation_id": "correlation ä",
        "delivery_mode": DeliveryMode.PERSISTENT,
        "expiration": 60.5,
        "headers": {"h": 1},
        "message_id": "message",
        "priority": 7,
        "reply_to": "reply",
        "timestamp": NOON,
        "type": "type",
        "user_id": "guest",
    }
    message = Message(b"body", **given)
    message.cluster_id = "cluster"
    await channel.default_exchange.publish(message, queue.name)
    got = await queue.get()
    assert {key: getattr(got, key) for key in given} == given
    assert got.cluster_id == "cluster"
    assert got.body == b"body"
    info = got.info()
    assert {key: info[key] for key in given} == given  # type: ignore[literal-required]
    assert (info["routing_key"], info["exchange"], info["delivery_tag"]) == (queue.name, "", 1)
    assert info["body_size"] == 4
    await got.ack()


async def test_no_properties_round_trip(channel: Channel, queue: Queue) -> None:
    await fill(channel, queue, [b""])
    got = await queue.get(no_ack=True)
    assert (got.headers, got.message_id, got.timestamp, got.expiration) == ({}, None, None, None)
    assert got.delivery_mode is DeliveryMode.NOT_PERSISTENT


async def test_headers_of_any_nesting_round_trip(channel: Channel, queue: Queue) -> None:
    headers: dict[str, Any] = {
        "str": "text ä 🐇",
        "empty": "",
        "bytes": b"\x00\xff",
        "none": None,
        "true": True,
        "false": False,
        "ints": [0, -1, 127, 128, -32768, 32768, 2**31 - 1, -(2**31), 2**31, 2**63 - 1, -(2**63)],
        "float": 0.1,
        "decimal": Decimal("-12.345"),
        "time": NOON,
        "list": [1, "two", None, [True, {"deep": [b"\xfe"]}], {}, []],
        "table": {"a": {"b": {"c": {"d": [{"e": None}]}}}},
        "": "empty key",
        "key ä": 1,
    }
    deep: Any = "bottom"
    for _ in range(60):
        deep = [deep]
    headers["deep"] = deep
    await channel.default_exchange.publish(Message(b"", headers=headers), queue.name)
    got = await queue.get(no_ack=True)
    assert got.headers_error is None
    assert got.headers == headers
    assert {key: type(value) for key, value in got.headers.items()} == {k: type(v) for k, v in headers.items()}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (NOON, NOON),
        (NOON.replace(tzinfo=None), NOON),
        (NOON.astimezone(datetime.timezone(datetime.timedelta(hours=5))), NOON),
        (NOON.timestamp(), NOON),
        (int(NOON.timestamp()), NOON),
        (0, datetime.datetime(1970, 1, 1, tzinfo=UTC)),
        (2**40, 2**40),
    ],
)
async def test_timestamp_types(channel: Channel, queue: Queue, given: Any, expected: Any) -> None:
    await fill(channel, queue, [b""], timestamp=given)
    assert (await queue.get(no_ack=True)).timestamp == expected


async def test_timestamp_as_a_timedelta_is_from_now(channel: Channel, queue: Queue) -> None:
    await fill(channel, queue, [b""], timestamp=datetime.timedelta(hours=1))
    got = (await queue.get(no_ack=True)).timestamp
    assert isinstance(got, datetime.datetime)
    distance = got - datetime.datetime.now(UTC) - datetime.timedelta(hours=1)
    assert abs(distance) < datetime.timedelta(seconds=30)


@pytest.mark.parametrize("given", [60, 60.0, datetime.timedelta(minutes=1)])
async def test_expiration_types(channel: Channel, queue: Queue, given: Any) -> None:
    await fill(channel, queue, [b""], expiration=given)
    assert (await queue.get(no_ack=True)).expiration == 60


async def test_expiration_as_a_datetime_is_when(channel: Channel, queue: Queue) -> None:
    await fill(channel, queue, [b""], expiration=datetime.datetime.now(UTC) + datetime.timedelta(hours=1))
    got = (await queue.get(no_ack=True)).expiration
    assert isinstance(got, float)
    assert 3500 < got <= 3600


async def test_an_expired_message_is_gone(channel: Channel, queue: Queue) -> None:
    await fill(channel, queue, [b"0"], expiration=0)
    await fill(channel, queue, [b"past"], expiration=datetime.datetime(2020, 1, 1, tzinfo=UTC))
    await fill(channel, queue, [b"1"], expiration=0.001)

    await holds(channel, queue, 0)


@pytest.mark.parametrize("bad", [b"\xff" * 8, b"\x7f" + b"\xff" * 7])
async def test_a_timestamp_that_is_no_time_harms_nobody(
    amqp_url: str, channel: Channel, queue: Queue, bad: bytes
) -> None:
    good = 0x0102_0304
    got = await _through_a_forger(amqp_url, channel, queue, Message(b"", timestamp=good), good.to_bytes(8), bad)
    assert isinstance(got.timestamp, int)
    assert got.timestamp in {int.from_bytes(bad), int.from_bytes(bad, signed=True)}


async def test_a_header_key_that_is_no_text_harms_nobody(amqp_url: str, channel: Channel, queue: Queue) -> None:
    message = Message(b"", headers={"abcdefgh": 1, "fine": 2})
    got = await _through_a_forger(amqp_url, channel, queue, message, b"abcdefgh", b"\xff\xfe\xfd\xfc" * 2)
    assert got.headers_error is not None or got.headers["fine"] == 2


async def _through_a_forger(
    amqp_url: str, channel: Channel, queue: Queue, message: Message, good: bytes, bad: bytes
) -> IncomingMessage:
    """What a consumer gets of *message*, published by somebody who writes *bad* for *good*, and of a good one."""
    url = URL(amqp_url)
    async with FaultProxy(url.host or "localhost", url.port or 5672) as proxy:
        proxy.up.mangle = lambda data: data.replace(good, bad)
        async with await connect(proxy.url) as forger:
            await (await forger.channel()).default_exchange.publish(message, queue.name)
    await fill(channel, queue, [b"good"])
    received: asyncio.Queue[IncomingMessage] = asyncio.Queue()
    tag = await queue.consume(received.put)
    forged, fine = [await asyncio.wait_for(received.get(), 5) for _ in range(2)]
    assert fine.body == b"good"
    await asyncio.gather(forged.ack(), fine.ack())
    await queue.cancel(tag)
    assert not channel.is_closed
    return forged


# ---------------------------------------------------------------------------------------------------- settling


async def test_get_from_an_empty_queue(queue: Queue) -> None:
    with pytest.raises(QueueEmpty) as caught:
        await queue.get()
    assert isinstance(caught.value, asyncio.QueueEmpty)
    assert await queue.get(fail=False) is None


async def test_get_tells_what_is_left(channel: Channel, queue: Queue) -> None:
    await fill(channel, queue, [b"1", b"2"])
    message = await queue.get()
    assert (message.message_count, message.redelivered, message.consumer_tag) == (1, False, None)
    assert (message.delivery_tag, message.exchange, message.routing_key) == (1, "", queue.name)
    await message.ack()


async def test_unsettled_messages_come_back_when_the_channel_closes(
    connection: Connection, channel: Channel, queue: Queue
) -> None:
    await fill(channel, queue, [b"left", b"acked", b"nacked", b"rejected", b"requeued"])
    async with connection.channel() as other:
        theirs = await other.get_queue(queue.name)
        messages = {message.body: message for message in [await theirs.get() for _ in range(5)]}
        await messages[b"acked"].ack()
        await messages[b"nacked"].nack(requeue=False)
        await messages[b"rejected"].reject()
        await messages[b"requeued"].reject(requeue=True)
        assert messages[b"acked"].processed
        assert not messages[b"left"].processed
    back = [await queue.get(), await queue.get()]
    assert [(message.body, message.redelivered) for message in back] == [(b"left", True), (b"requeued", True)]
    assert await queue.get(fail=False) is None
    for message in back:
        await message.ack()


@pytest.mark.parametrize("verb", ["ack", "nack"])
async def test_multiple_settles_all_before_and_none_after(
    connection: Connection, channel: Channel, queue: Queue, verb: str
) -> None:
    await fill(channel, queue, [b"%d" % i for i in range(5)])
    async with connection.channel() as other:
        messages = [await (await other.get_queue(queue.name)).get() for _ in range(5)]
        await messages[1].ack()
        if verb == "ack":
            await messages[3].ack(multiple=True)
        else:
            await messages[3].nack(multiple=True, requeue=False)
        with pytest.raises(MessageProcessError):
            await messages[0].ack()
        assert not other.is_closed
    assert await drain(queue) == [b"4"]


async def test_settling_twice_is_refused_and_harms_nothing(channel: Channel, queue: Queue) -> None:
    await fill(channel, queue, [b"1"])
    message = await queue.get()
    await message.ack()
    for again in (message.ack, message.nack, message.reject):
        with pytest.raises(MessageProcessError):
            await again()
    await holds(channel, queue, 0)
    assert not channel.is_closed


async def test_no_ack_needs_no_settling_and_takes_none(channel: Channel, queue: Queue) -> None:
    await fill(channel, queue, [b"1"])
    message = await queue.get(no_ack=True)
    assert message.processed
    with pytest.raises(TypeError):
        await message.ack()
    await holds(channel, queue, 0)


async def test_a_late_ack_of_a_closed_channel_reaches_nobody(channel: Channel, queue: Queue) -> None:
    await fill(channel, queue, [b"1", b"2"])
    old = await queue.get()
    await channel.reopen()
    assert not old.is_live
    fresh = await queue.get()
    assert (fresh.delivery_tag, fresh.body, fresh.redelivered) == (old.delivery_tag, b"1", True)
    for verb in (old.ack, old.nack, old.reject):
        with pytest.raises(DeliveryLost) as caught:
            await verb()
        assert isinstance(caught.value, ChannelInvalidStateError)
    assert not old.processed
    await fresh.nack()
    assert await drain(queue) == [b"1", b"2"]


# --------------------------------------------------------------------------------------------------- process()


async def test_process_acks(connection: Connection, channel: Channel, queue: Queue) -> None:
    await fill(channel, queue, [b"1"])
    async with connection.channel() as other:
        async with (await (await other.get_queue(queue.name)).get()).process() as message:
            assert message.body == b"1"
        assert message.processed
    await holds(channel, queue, 0)


async def test_process_rejects_on_an_exception(channel: Channel, queue: Queue) -> None:
    await fill(channel, queue, [b"1"])
    with pytest.raises(ZeroDivisionError):
        async with (await queue.get()).process():
            raise ZeroDivisionError
    await holds(channel, queue, 0)


async def test_process_requeues_on_an_exception_if_told_to(channel: Channel, queue: Queue) -> None:
    await fill(channel, queue, [b"1"])
    with pytest.raises(ZeroDivisionError):
        async with (await queue.get()).process(requeue=True):
            raise ZeroDivisionError
    message = await queue.get()
    assert (message.body, message.redelivered) == (b"1", True)
    await message.ack()


async def test_process_rejects_on_redelivered(channel: Channel, queue: Queue) -> None:
    await fill(channel, queue, [b"1"])
    for left in (1, 0):
        with pytest.raises(ZeroDivisionError):
            async with (await queue.get()).process(requeue=True, reject_on_redelivered=True):
                raise ZeroDivisionError
        await holds(channel, queue, left)


async def test_process_requeues_on_cancellation(channel: Channel, queue: Queue) -> None:
    await fill(channel, queue, [b"1"])
    message = await queue.get()
    inside = asyncio.Event()

    async def work() -> None:
        async with message.process():
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await drain(queue) == [b"1"]


async def test_process_and_a_block_that_settles_itself(channel: Channel, queue: Queue) -> None:
    await fill(channel, queue, [b"1", b"2"])
    async with (await queue.get()).process(ignore_processed=True) as message:
        await message.reject()
    with pytest.raises(MessageProcessError):
        async with (await queue.get()).process() as message:
            await message.ack()
    await holds(channel, queue, 0)
    assert not channel.is_closed


async def test_process_on_a_channel_that_was_lost_is_quiet(channel: Channel, queue: Queue) -> None:
    await fill(channel, queue, [b"1"])
    async with (await queue.get()).process():
        await channel.reopen()
    assert await drain(queue) == [b"1"]
