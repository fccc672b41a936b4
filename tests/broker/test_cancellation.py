"""Cancelling and timing out any call: the channel, its numbers and its messages stay right."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import TYPE_CHECKING, Any

import pytest
from pamqp import commands
from yarl import URL

from leveret import Channel, Connection, IncomingMessage, Message, ReturnedMessage, connect
from leveret.exceptions import ChannelLimitReached, PublishOutcomeUnknown
from tests.broker.test_helpers import consumers, drain, eventually, fill, holds
from tests.support.proxy import FaultProxy

if TYPE_CHECKING:
    from leveret import Queue


async def cancelled(call: Any, turns: int = 1) -> Any:
    """Cancel *call* after that many turns of the event loop: it has been sent, and its reply is not there yet."""
    task = asyncio.ensure_future(call)
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    [result] = await asyncio.gather(task, return_exceptions=True)
    return result


async def test_thirty_declares_that_time_out_harm_nobody(channel: Channel, queue: Queue, name: str) -> None:
    redelivered: list[bool] = []

    async def callback(message: IncomingMessage) -> None:
        redelivered.append(message.redelivered)
        await message.ack()

    await queue.consume(callback)
    for i in range(30):  # R9
        publish = channel.default_exchange.publish(Message(b""), queue.name)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(channel.declare_queue(f"{name}-{i}", exclusive=True), 0.0005)
        await publish
    declared = await channel.declare_queue(f"{name}-last", exclusive=True)
    assert declared.declaration_result.queue == f"{name}-last"
    await eventually(lambda: len(redelivered) == 30)
    assert not any(redelivered)
    assert not channel.is_closed


async def test_the_next_call_gets_its_own_answer(channel: Channel, queue: Queue, name: str) -> None:
    for i in range(50):
        assert isinstance(await cancelled(channel.declare_queue(f"{name}-{i}", exclusive=True)), asyncio.CancelledError)
        assert isinstance(await cancelled(queue.purge()), asyncio.CancelledError)
        assert (await channel.declare_queue(f"{name}-x{i}", exclusive=True)).name == f"{name}-x{i}"
        assert (await channel.get_queue(f"{name}-{i}")).name == f"{name}-{i}"  # it was declared all the same


async def test_a_call_that_times_out_leaves_the_channel_usable(amqp_url: str, name: str) -> None:
    url = URL(amqp_url)
    async with (
        FaultProxy(url.host or "localhost", url.port or 5672) as proxy,
        await connect(proxy.url) as connection,
        connection.channel() as channel,
    ):
        queue = await channel.declare_queue(name, exclusive=True)
        proxy.down.stall = True
        for call in (queue.declare(timeout=0.05), queue.purge(timeout=0.05), channel.set_qos(1, timeout=0.05)):
            with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
                await call
        with pytest.raises(PublishOutcomeUnknown) as caught:
            await channel.default_exchange.publish(Message(b"1"), name, timeout=0.05)
        assert isinstance(caught.value, TimeoutError)
        proxy.down.stall = False
        assert (await queue.declare()).queue == name
        result = await channel.default_exchange.publish(Message(b"2"), name)
        assert isinstance(result, commands.Basic.Ack)
        assert result.delivery_tag == 2
        assert await drain(queue) == [b"1", b"2"]


async def test_cancelled_publishes_shift_no_number(channel: Channel, queue: Queue, name: str) -> None:
    rng = random.Random(10)
    publish = channel.default_exchange.publish
    big = [publish(Message(b"%d" % i + bytes(200_000)), queue.name) for i in range(100)]  # R10
    for victim in rng.sample(big, 25):
        victim.cancel()  # type: ignore[attr-defined]
    keys = [rng.choice([queue.name, name]) for _ in range(500)]
    small = [publish(Message(b"%d" % i), key) for i, key in enumerate(keys)]
    results = await asyncio.gather(*small)
    assert [isinstance(result, ReturnedMessage) for result in results] == [key == name for key in keys]
    assert [r.body for r in results if isinstance(r, ReturnedMessage)] == [
        b"%d" % i for i, key in enumerate(keys) if key == name
    ]
    answers = await asyncio.gather(*big, return_exceptions=True)
    assert sum(isinstance(answer, asyncio.CancelledError) for answer in answers) == 25
    assert sum(isinstance(answer, commands.Basic.Ack) for answer in answers) == 75


async def test_cancelled_waits_for_a_publish_shift_no_number(channel: Channel, queue: Queue, name: str) -> None:
    publish = channel.default_exchange.publish
    for i in range(50):
        await cancelled(publish(Message(b"x"), name if i % 3 else queue.name), turns=i % 5)
        assert isinstance(await publish(Message(b"%d" % i), name), ReturnedMessage)
        assert isinstance(await publish(Message(b"%d" % i), queue.name), commands.Basic.Ack)


async def test_the_same_message_thrice_after_a_cancelled_one(channel: Channel, queue: Queue, name: str) -> None:
    message = Message(b"same", message_id="same")
    publish = channel.default_exchange.publish
    publish(message, name).cancel()  # type: ignore[attr-defined]
    results = await asyncio.gather(*[publish(message, key) for key in (name, queue.name, name)])  # R11
    assert [isinstance(result, ReturnedMessage) for result in results] == [True, False, True]


async def test_a_cancelled_get_leaves_the_message_in_the_queue(channel: Channel, queue: Queue) -> None:
    for i in range(20):
        await fill(channel, queue, [b"%d" % i])
        assert isinstance(await cancelled(queue.get()), asyncio.CancelledError)
        await holds(channel, queue, 1)
        message = await queue.get()
        assert (message.body, message.redelivered) == (b"%d" % i, True)
        await message.ack()


async def test_a_cancelled_get_from_an_empty_queue_disturbs_nobody(channel: Channel, queue: Queue) -> None:
    assert isinstance(await cancelled(queue.get()), asyncio.CancelledError)
    await fill(channel, queue, [b"1"])
    assert (await queue.get(no_ack=True)).body == b"1"


async def test_a_cancelled_consume_leaves_no_consumer(channel: Channel, queue: Queue) -> None:
    await fill(channel, queue, [b"%d" % i for i in range(10)])
    received: list[IncomingMessage] = []
    for tag in [None, "mine"] * 5:
        call = queue.consume(received.append, consumer_tag=tag)  # type: ignore[arg-type]
        assert isinstance(await cancelled(call), asyncio.CancelledError)

        async def is_alone() -> bool:
            return await consumers(channel, queue) == 0

        await eventually(is_alone)
        await holds(channel, queue, 10)
    assert not received
    assert await drain(queue) == [b"%d" % i for i in range(10)]
    await queue.consume(received.append, consumer_tag="mine")  # type: ignore[arg-type]


async def test_a_cancelled_cancel_still_cancels(channel: Channel, queue: Queue) -> None:
    tag = await queue.consume(print)  # type: ignore[arg-type]
    assert isinstance(await cancelled(queue.cancel(tag)), asyncio.CancelledError)
    assert await consumers(channel, queue) == 0
    assert await queue.consume(print, consumer_tag=tag) == tag  # type: ignore[arg-type]


async def test_a_cancelled_channel_opening_gives_its_number_back(amqp_url: str) -> None:
    async with await connect(amqp_url, channel_max=1) as connection:

        async def opened() -> Channel | None:
            with contextlib.suppress(ChannelLimitReached):  # until the close-ok
                return await connection.channel()
            return None

        for turns in (1, 2, 3, 1, 2, 3):
            given_up = connection.channel()
            if await cancelled(given_up.initialize(), turns) is None:  # it was faster
                await given_up.close()
            channel: Channel = await eventually(opened)
            assert channel.number == 1
            await channel.declare_queue(exclusive=True)
            await channel.close()


@pytest.mark.parametrize("seed", range(5))
async def test_calls_cancelled_at_random_moments_leave_the_channel_right(
    connection: Connection, name: str, seed: int
) -> None:
    rng = random.Random(seed)
    async with connection.channel() as channel:
        queue = await channel.declare_queue(f"{name}-{seed}", exclusive=True)
        got: list[IncomingMessage] = []
        published: list[bytes] = []
        for i in range(150):
            call = rng.choice(["declare", "publish", "get", "consume", "qos"])
            turns = rng.randrange(8)
            if call == "declare":
                await cancelled(channel.declare_queue(f"{name}-{i}", exclusive=True), turns)
            elif call == "publish":
                published.append(b"%d" % i)
                await cancelled(channel.default_exchange.publish(Message(b"%d" % i), queue.name), turns)
            elif call == "get":
                result = await cancelled(queue.get(fail=False), turns)
                if isinstance(result, IncomingMessage):
                    got.append(result)
            elif call == "consume":
                result = await cancelled(queue.consume(got.append), turns)  # type: ignore[arg-type]
                if isinstance(result, str):
                    await queue.cancel(result)
            else:
                await cancelled(channel.set_qos(rng.randrange(10)), turns)
        for i in range(50):
            assert (await channel.declare_queue(f"{name}-x{i}", exclusive=True)).name == f"{name}-x{i}"
            assert isinstance(await channel.default_exchange.publish(Message(b""), f"{name}-nowhere"), ReturnedMessage)
        for message in got:
            await message.nack()
        await holds(channel, queue, len(published))
        assert sorted(await drain(queue)) == sorted(published)
