"""Transactions: what a commit does and a rollback undoes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from leveret import Channel, Message, Queue, Transaction, connect
from leveret.exceptions import ChannelPreconditionFailed
from leveret.types import TransactionState
from tests.broker.test_helpers import drain, fill, holds

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def channel(amqp_url: str) -> AsyncIterator[Channel]:
    async with await connect(amqp_url) as connection, connection.channel(publisher_confirms=False) as channel:
        yield channel


async def fail_in_a_transaction(channel: Channel, queue: Queue, *, close: bool = False) -> None:
    async with channel.transaction():
        await fill(channel, queue, [b"lost"])
        if close:
            await channel.close()
        raise ZeroDivisionError


async def test_a_block_commits_at_its_end(channel: Channel, queue: Queue) -> None:
    async with channel.transaction() as transaction:
        assert transaction.state is TransactionState.STARTED
        await fill(channel, queue, [b"1", b"2"])
        await holds(channel, queue, 0)
    assert transaction.state is TransactionState.COMMITED
    await holds(channel, queue, 2)
    assert await drain(queue) == [b"1", b"2"]


async def test_an_exception_rolls_back(channel: Channel, queue: Queue) -> None:
    with pytest.raises(ZeroDivisionError):
        await fail_in_a_transaction(channel, queue)
    async with channel.transaction():
        await fill(channel, queue, [b"kept"])
    await holds(channel, queue, 1)
    assert await drain(queue) == [b"kept"]


async def test_commit_and_rollback_by_hand(channel: Channel, queue: Queue) -> None:
    transaction = Transaction(channel)
    assert str(transaction) == "created"
    await transaction.select()
    await fill(channel, queue, [b"1"])
    await transaction.commit()
    await fill(channel, queue, [b"2"])
    await transaction.rollback()
    assert transaction.state is TransactionState.ROLLED_BACK
    await fill(channel, queue, [b"3"])
    await transaction.commit()
    await holds(channel, queue, 2)


async def test_a_rollback_undoes_acks(channel: Channel, queue: Queue) -> None:
    async with channel.transaction() as transaction:
        await fill(channel, queue, [b"1"])
        await transaction.commit()
        message = await queue.get()
        await message.ack()
        await transaction.rollback()
    await channel.close()
    await channel.reopen()
    message = await queue.get()
    assert (message.body, message.redelivered) == (b"1", True)
    await message.ack()


async def test_an_ack_after_a_rollback_settles_nothing_else(channel: Channel, queue: Queue) -> None:
    async with channel.transaction() as transaction:
        await fill(channel, queue, [b"1", b"2"])
        await transaction.commit()
        first, second = await queue.get(), await queue.get()
        await first.ack()
        await transaction.rollback()
        await second.ack()
    await channel.close()
    await channel.reopen()
    message = await queue.get()
    assert (message.body, message.redelivered) == (b"1", True)
    await message.ack()


@pytest.mark.parametrize("what", ["call", "publish", "ack"])
async def test_what_is_sent_while_a_commit_is_under_way_waits_for_it(channel: Channel, name: str, what: str) -> None:
    # RabbitMQ closes the connection over any method that reaches a channel which still commits (504).
    queue = await channel.declare_queue(name, durable=True)
    async with channel.transaction() as transaction:
        for i in range(20):
            await fill(channel, queue, [bytes(10_000)] * 20, delivery_mode=2)
            await transaction.commit()
            message = await queue.get()
            await fill(channel, queue, [bytes(10_000)] * 20, delivery_mode=2)
            commit = asyncio.ensure_future(transaction.commit())
            await asyncio.sleep(0)
            if what == "call":
                assert (await channel.set_qos(i)).name == "Basic.QosOk"
            elif what == "publish":
                await channel.default_exchange.publish(Message(b""), name)
            else:
                await message.ack()
            assert (await commit).name == "Tx.CommitOk"
    await queue.delete(if_empty=False)


async def test_closing_while_a_commit_is_under_way_costs_no_connection(amqp_url: str, name: str) -> None:
    async with await connect(amqp_url) as connection, connection.channel() as other:
        queue = await other.declare_queue(name, durable=True)
        for _ in range(5):
            channel = await connection.channel(publisher_confirms=False)
            transaction = Transaction(channel)
            await transaction.select()
            await fill(channel, queue, [bytes(10_000)] * 20, delivery_mode=2)
            commit = asyncio.ensure_future(transaction.commit())
            await asyncio.sleep(0)
            await asyncio.wait_for(channel.close(), 5)
            await asyncio.gather(commit, return_exceptions=True)
            await other.get_queue(name)
        await queue.delete(if_empty=False)


async def test_confirms_and_transactions_do_not_mix(amqp_url: str) -> None:
    async with await connect(amqp_url) as connection, connection.channel() as channel:
        with pytest.raises(RuntimeError, match="publisher_confirms"):
            channel.transaction()
        with pytest.raises(ChannelPreconditionFailed):
            await Transaction(channel).select()


async def test_an_exception_on_a_lost_channel_is_not_hidden(channel: Channel, queue: Queue) -> None:
    with pytest.raises(ZeroDivisionError):
        await fail_in_a_transaction(channel, queue, close=True)
    with pytest.raises(RuntimeError, match="closed"):
        await Transaction(channel).select()


async def test_a_mandatory_message_comes_back_at_commit(channel: Channel, name: str) -> None:
    returned: list[bytes] = []
    channel.return_callbacks.add(lambda _, message: returned.append(message.body))
    async with channel.transaction():
        await channel.default_exchange.publish(Message(b"lost"), name)
    assert returned == [b"lost"]
