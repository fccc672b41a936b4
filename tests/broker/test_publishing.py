"""Publishing: confirms, returns, nacks, lost channels, every kind of awaiting, every size."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import pytest
from pamqp import commands

from leveret import Channel, Connection, DeliveryMode, Message, ReturnedMessage, connect
from leveret.exceptions import (
    AMQPConnectionError,
    ChannelInvalidStateError,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    MessageNacked,
    MessageReturned,
    MessageTooLarge,
    PublishOutcomeUnknown,
)
from tests.broker.test_helpers import drain, holds

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from leveret import Queue
    from tests.support.node import Node

FRAME_MAX = 131_072


# --------------------------------------------------------------------------------------------------- outcomes


async def test_the_brokers_ack_is_the_result(channel: Channel, queue: Queue) -> None:
    tags = [
        (await channel.default_exchange.publish(Message(b"%d" % i), queue.name)).delivery_tag  # type: ignore[union-attr]
        for i in range(3)
    ]
    assert tags == [1, 2, 3]
    assert await drain(queue) == [b"0", b"1", b"2"]


async def test_without_confirms_the_result_is_none(connection: Connection) -> None:
    async with connection.channel(publisher_confirms=False) as channel:
        queue = await channel.declare_queue(exclusive=True)
        for i in range(100):
            assert await channel.default_exchange.publish(Message(b"%d" % i), queue.name) is None
        await holds(channel, queue, 100)
        assert await drain(queue) == [b"%d" % i for i in range(100)]


async def test_a_message_that_no_queue_takes_is_the_result(channel: Channel, name: str) -> None:
    returned: list[ReturnedMessage] = []
    channel.return_callbacks.add(lambda _, message: returned.append(message))
    message = Message(b"body", headers={"a": [1, {"b": None}]}, message_id="id", content_type="text/plain")
    result = await channel.default_exchange.publish(message, name)
    assert isinstance(result, ReturnedMessage)
    assert returned == [result]
    assert (result.reply_code, result.reply_text) == (312, "NO_ROUTE")
    assert (result.exchange, result.routing_key, result.body) == ("", name, b"body")
    assert (result.headers, result.message_id, result.content_type) == ({"a": [1, {"b": None}]}, "id", "text/plain")


async def test_on_return_raises(connection: Connection, name: str) -> None:
    async with connection.channel(on_return_raises=True) as channel:
        queue = await channel.declare_queue(exclusive=True)
        with pytest.raises(MessageReturned, match=name) as caught:
            await channel.default_exchange.publish(Message(b"body"), name)
        assert caught.value.message.body == b"body"
        assert isinstance(await channel.default_exchange.publish(Message(b""), queue.name), commands.Basic.Ack)


async def test_without_confirms_a_return_comes_to_the_callbacks(connection: Connection, name: str) -> None:
    async with connection.channel(publisher_confirms=False) as channel:
        returned: asyncio.Queue[ReturnedMessage] = asyncio.Queue()
        channel.return_callbacks.add(lambda _, message: returned.put_nowait(message))
        assert await channel.default_exchange.publish(Message(b"body"), name) is None
        assert (await asyncio.wait_for(returned.get(), 5)).body == b"body"


async def test_not_mandatory_is_confirmed_and_gone(channel: Channel, name: str) -> None:
    result = await channel.default_exchange.publish(Message(b""), name, mandatory=False)
    assert isinstance(result, commands.Basic.Ack)


@pytest.mark.parametrize("message_id", [None, "the-same"])
async def test_one_message_published_thrice_at_a_time_reports_the_two_lost(
    channel: Channel, queue: Queue, name: str, message_id: str | None
) -> None:
    message = Message(b"same", message_id=message_id)
    publish = channel.default_exchange.publish
    results = await asyncio.gather(*[publish(message, key) for key in (name, queue.name, name)])
    assert [isinstance(result, ReturnedMessage) for result in results] == [True, False, True]
    assert [result.body for result in results if isinstance(result, ReturnedMessage)] == [b"same", b"same"]
    assert await drain(queue) == [b"same"]
    assert message.message_id == message_id


async def test_exactly_the_unroutable_of_many_come_back(connection: Connection, name: str) -> None:
    rng = random.Random(7)
    async with connection.channel(on_return_raises=True) as channel:
        queue = await channel.declare_queue(exclusive=True)
        keys = [rng.choice([queue.name, name, f"{name}-2"]) for _ in range(1000)]
        messages = [Message(rng.choice([b"a", b"b"]), message_id=rng.choice(["x", "y", None])) for _ in keys]
        publishes = [channel.default_exchange.publish(m, key) for m, key in zip(messages, keys, strict=True)]
        results = await asyncio.gather(*publishes, return_exceptions=True)
        assert [isinstance(result, MessageReturned) for result in results] == [key != queue.name for key in keys]
        await holds(channel, queue, keys.count(queue.name))


async def test_a_full_queue_nacks_exactly_those_that_it_does_not_take(channel: Channel) -> None:
    arguments = {"x-max-length": 1, "x-overflow": "reject-publish"}
    queue = await channel.declare_queue(exclusive=True, arguments=arguments)
    publishes = [channel.default_exchange.publish(Message(b"%d" % i), queue.name) for i in range(20)]
    results = await asyncio.gather(*publishes, return_exceptions=True)
    taken = [b"%d" % i for i, result in enumerate(results) if isinstance(result, commands.Basic.Ack)]
    nacks = [result for result in results if isinstance(result, MessageNacked)]
    assert taken
    assert len(taken) + len(nacks) == 20
    assert all(isinstance(nack.frame, commands.Basic.Nack) for nack in nacks)
    assert await drain(queue) == taken


async def test_a_missing_exchange_leaves_what_was_in_flight_unknown(
    connection: Connection, channel: Channel, queue: Queue, name: str
) -> None:
    async with connection.channel() as guilty:
        nowhere = await guilty.get_exchange(name, ensure=False)
        publishes = [guilty.default_exchange.publish(Message(b"%d" % i), queue.name) for i in range(20)]
        publishes += [nowhere.publish(Message(b""), "x")]
        publishes += [guilty.default_exchange.publish(Message(b"later"), queue.name) for _ in range(20)]
        results = await asyncio.gather(*publishes, return_exceptions=True)
        assert all(isinstance(result, PublishOutcomeUnknown) for result in results[20:])
        for result in results:
            if isinstance(result, PublishOutcomeUnknown):
                assert isinstance(result, AMQPConnectionError)
                assert isinstance(result.__cause__, ChannelNotFoundEntity)
                assert name in str(result)
        with pytest.raises(ChannelInvalidStateError):
            nowhere.publish(Message(b""), "x")
        await channel.default_exchange.publish(Message(b"other channel"), queue.name)
        bodies = await drain(queue)
        confirmed = [b"%d" % i for i, result in enumerate(results) if isinstance(result, commands.Basic.Ack)]
        assert set(confirmed) <= set(bodies)
        assert b"later" not in bodies
        assert bodies[-1] == b"other channel"
        await guilty.reopen()
        result = await guilty.default_exchange.publish(Message(b""), queue.name)
        assert result.delivery_tag == 1  # type: ignore[union-attr]


async def test_a_user_id_that_is_not_ours_closes_the_channel(channel: Channel, queue: Queue) -> None:
    with pytest.raises(PublishOutcomeUnknown) as caught:
        await channel.default_exchange.publish(Message(b"", user_id="somebody"), queue.name)
    assert isinstance(caught.value.__cause__, ChannelPreconditionFailed)


async def test_ten_thousand_in_flight_are_answered_exactly_once(channel: Channel, queue: Queue) -> None:
    answered: list[int] = []
    publishes = []
    for i in range(10_000):
        publish = channel.default_exchange.publish(Message(b"%d" % i), queue.name)
        publish.add_done_callback(lambda _, i=i: answered.append(i))  # type: ignore[attr-defined]
        publishes.append(publish)
    results = await asyncio.gather(*publishes)
    assert all(isinstance(result, commands.Basic.Ack) for result in results)
    assert sorted(answered) == list(range(10_000))
    bodies = []
    async with queue.iterator(no_ack=True) as messages:
        async for message in messages:
            bodies.append(message.body)
            if len(bodies) == 10_000:
                break
    assert bodies == [b"%d" % i for i in range(10_000)]


async def test_returns_among_ten_thousand_in_flight(channel: Channel, queue: Queue, name: str) -> None:
    keys = [name if i % 100 == 0 else queue.name for i in range(10_000)]
    message = Message(b"same")
    results = await asyncio.gather(*[channel.default_exchange.publish(message, key) for key in keys])
    assert [isinstance(result, ReturnedMessage) for result in results] == [key == name for key in keys]


# --------------------------------------------------------------------------------------------- ways to wait


async def _await(publish: Any) -> Any:
    return await publish


async def _gather(publish: Any) -> Any:
    return (await asyncio.gather(publish))[0]


async def _wait_for(publish: Any) -> Any:
    return await asyncio.wait_for(publish, 5)


async def _create_task(publish: Any) -> Any:
    return await asyncio.create_task(publish)


async def _task_group(publish: Any) -> Any:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(publish)
    return task.result()


async def _shield(publish: Any) -> Any:
    return await asyncio.shield(publish)


@pytest.mark.parametrize("wait", [_await, _gather, _wait_for, _create_task, _task_group, _shield])
async def test_a_publish_is_awaited_by_any_means(
    connection: Connection, name: str, wait: Callable[[Any], Awaitable[Any]]
) -> None:
    async with connection.channel(on_return_raises=True) as channel:
        queue = await channel.declare_queue(exclusive=True)
        assert isinstance(await wait(channel.default_exchange.publish(Message(b""), queue.name)), commands.Basic.Ack)
        with pytest.raises((MessageReturned, ExceptionGroup)):
            await wait(channel.default_exchange.publish(Message(b""), name))
        assert not channel.is_closed


async def test_a_publish_is_on_its_way_before_it_is_awaited(channel: Channel, queue: Queue) -> None:
    publish = channel.default_exchange.publish(Message(b"x"), queue.name)
    await holds(channel, queue, 1)
    await publish


# ---------------------------------------------------------------------------------------------------- mistakes


async def test_mistakes_are_refused_here_and_harm_nothing(channel: Channel, queue: Queue) -> None:
    publish = channel.default_exchange.publish
    with pytest.raises(MessageTooLarge, match="frame"):
        publish(Message(b"", headers={"big": "x" * FRAME_MAX}), queue.name)
    with pytest.raises(ValueError, match="immediate"):
        publish(Message(b""), queue.name, immediate=True)
    with pytest.raises(TypeError):
        publish(b"bytes", queue.name)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        publish(Message(b"", headers={"x": object()}), queue.name)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="255"):
        publish(Message(b"", message_id="x" * 256), queue.name)
    result = await publish(Message(b"fine"), queue.name)
    assert result.delivery_tag == 1  # type: ignore[union-attr]
    assert await drain(queue) == [b"fine"]


async def test_headers_that_just_fit_in_a_frame_pass(channel: Channel, queue: Queue) -> None:
    # frame 8, class, weight, size, flags 14, delivery mode and priority 2, table 4, key 2, type and length 5
    value = "x" * (FRAME_MAX - 8 - 14 - 2 - 4 - 2 - 5)
    await channel.default_exchange.publish(Message(b"", headers={"k": value}), queue.name)
    assert (await queue.get(no_ack=True)).headers == {"k": value}
    with pytest.raises(MessageTooLarge):
        channel.default_exchange.publish(Message(b"", headers={"k": f"{value}x"}), queue.name)


# ------------------------------------------------------------------------------------------------------- sizes

SIZES = [0, 1, FRAME_MAX - 9, FRAME_MAX - 8, FRAME_MAX - 7, 2 * (FRAME_MAX - 8), 1024**2, 16 * 1024**2]


@pytest.mark.parametrize("size", SIZES)
async def test_a_body_of_any_size_comes_back(channel: Channel, queue: Queue, name: str, size: int) -> None:
    body = random.Random(size).randbytes(size)
    publish = channel.default_exchange.publish
    assert isinstance(await publish(Message(body), queue.name), commands.Basic.Ack)
    async with queue.iterator() as messages:
        message = await asyncio.wait_for(anext(messages), 30)
        assert message.body == body
        await message.nack()
    assert (await queue.get(no_ack=True, timeout=30)).body == body
    returned = await publish(Message(body), name)
    assert isinstance(returned, ReturnedMessage)
    assert returned.body == body


@pytest.mark.parametrize("frame_max", [8192, 8193, 40_000])
async def test_a_smaller_frame_max_is_kept_to(amqp_url: str, frame_max: int) -> None:
    async with await connect(amqp_url, frame_max=frame_max) as connection, connection.channel() as channel:
        queue = await channel.declare_queue(exclusive=True)
        for size in (frame_max - 9, frame_max - 8, frame_max - 7, 100_000):
            body = random.Random(size).randbytes(size)
            await channel.default_exchange.publish(Message(body), queue.name)
            assert (await queue.get(no_ack=True)).body == body


async def test_a_body_over_the_brokers_limit_is_unknown_with_the_reason(
    broker: Node, connection: Connection, queue: Queue
) -> None:
    async with connection.channel() as channel:
        publish = channel.default_exchange.publish(Message(bytes(16 * 1024**2 + 1)), queue.name)
        if broker.version_info < (4, 0):  # 128 MiB
            await publish
            return
        with pytest.raises(PublishOutcomeUnknown, match="larger than") as caught:
            await publish
        assert isinstance(caught.value.__cause__, ChannelPreconditionFailed)
    assert not connection.is_closed


async def test_more_than_the_socket_takes_waits_in_order(channel: Channel, queue: Queue) -> None:
    bodies = [b"%03d" % i + bytes(500_000) for i in range(50)]
    await asyncio.gather(*[channel.default_exchange.publish(Message(body), queue.name) for body in bodies])
    assert [body[:3] for body in await drain(queue)] == [b"%03d" % i for i in range(50)]


# ---------------------------------------------------------------------------------------------- many channels


async def test_two_hundred_channels_at_once(connection: Connection) -> None:
    async def use(i: int) -> bytes:
        async with connection.channel() as channel:
            queue = await channel.declare_queue(exclusive=True)
            await channel.default_exchange.publish(Message(b"%d" % i * 1000), queue.name)
            async with queue.iterator() as messages:
                message = await anext(messages)
                await message.ack()
                return message.body

    assert await asyncio.gather(*[use(i) for i in range(200)]) == [b"%d" % i * 1000 for i in range(200)]


async def test_publishers_share_a_channel(channel: Channel, queue: Queue) -> None:
    async def publisher(i: int) -> None:
        for j in range(50):
            message = Message(b"%d-%d" % (i, j), delivery_mode=DeliveryMode.PERSISTENT)
            await channel.default_exchange.publish(message, queue.name)

    await asyncio.gather(*[publisher(i) for i in range(20)])
    bodies = await drain(queue)
    assert len(bodies) == len(set(bodies)) == 1000
    for i in range(20):
        assert [b for b in bodies if b.startswith(b"%d-" % i)] == [b"%d-%d" % (i, j) for j in range(50)]
