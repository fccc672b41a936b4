"""Batches: full or in time, settled by as few frames as it takes, and never of a link that is gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import pytest
from pamqp import commands

from leveret import Batch, BatchIterator, Message
from leveret.exceptions import (
    ConnectionClosed,
    ConsumerCancelled,
    DeliveryLost,
    MethodNotImplemented,
)
from tests.protocol.kit import Link, linked, turns, within
from tests.protocol.robust_kit import again, closed_by_broker, robust

Ack, Nack, Reject = commands.Basic.Ack, commands.Basic.Nack, commands.Basic.Reject
NEVER = None
"""The timeout of a batch that is to be full."""


async def batches(
    link: Link, size: int = 3, timeout: float | None = NEVER, *, prefetch_sent: int | None = None, **kwargs: Any
) -> BatchIterator:
    """A batch iterator that consumes on channel 1 with the tag "tag"."""
    channel = await link.channel()
    iterator = (await link.queue(channel)).batches(size, timeout, consumer_tag="tag", **kwargs)
    starting = asyncio.create_task(iterator.consume())
    prefetch = 2 * size if prefetch_sent is None else prefetch_sent
    if prefetch:
        _, qos = await link.session.expect(commands.Basic.Qos)
        assert qos.prefetch_count == prefetch
        link.session.send(1, commands.Basic.QosOk())
    await link.session.expect(commands.Basic.Consume)
    link.session.send(1, commands.Basic.ConsumeOk("tag"))
    await within(starting)
    return iterator


def deliver(link: Link, *tags: int, **kwargs: Any) -> None:
    for tag in tags:
        link.session.deliver(1, "tag", tag, b"%d" % tag, **kwargs)


def tags(batch: Batch) -> list[int]:
    return [message.delivery_tag for message in batch]


def shown(frames: list[Any]) -> list[tuple[Any, ...]]:
    """Settling methods as (kind, tag, multiple or requeue)."""
    found: list[tuple[Any, ...]] = []
    for each in frames:
        if isinstance(each, Reject):
            found.append((Reject, each.delivery_tag, each.requeue))
        elif isinstance(each, Nack):
            found.append((Nack, each.delivery_tag, each.multiple, each.requeue))
        else:
            found.append((type(each), each.delivery_tag, each.multiple))
    return found


# ------------------------------------------------------------------------------------------------- handing out


async def test_a_batch_is_handed_out_when_it_is_full() -> None:
    async with linked(lenient=True) as link:
        iterator = await batches(link)
        waiting = asyncio.ensure_future(anext(iterator))
        deliver(link, 1, 2)
        await link.fence()
        assert not waiting.done()
        deliver(link, 3, 4, 5, 6, 7)
        batch = await within(waiting)
        assert [message.body for message in batch] == [b"1", b"2", b"3"]
        assert tags(await within(anext(iterator))) == [4, 5, 6]


async def test_a_batch_is_handed_out_when_its_first_message_has_waited_long_enough() -> None:
    loop = asyncio.get_running_loop()
    async with linked(lenient=True) as link:
        iterator = await batches(link, 100, 0.2)
        waiting = asyncio.ensure_future(anext(iterator))
        await asyncio.sleep(0.25)  # an empty batch is never handed out
        assert not waiting.done()
        deliver(link, 1)
        await link.fence()
        begun = loop.time()
        deliver(link, 2)
        assert tags(await within(waiting)) == [1, 2]
        assert 0.15 < loop.time() - begun < 0.5


async def test_the_clock_runs_while_another_batch_is_handled() -> None:
    loop = asyncio.get_running_loop()
    async with linked(lenient=True) as link:
        iterator = await batches(link, 3, 0.1)
        deliver(link, 1, 2, 3)
        assert tags(await within(anext(iterator))) == [1, 2, 3]
        deliver(link, 4)
        await link.fence()
        await asyncio.sleep(0.15)
        begun = loop.time()
        assert tags(await within(anext(iterator))) == [4]
        assert loop.time() - begun < 0.05


async def test_what_is_left_over_waits_for_more_but_not_for_ever() -> None:
    async with linked(lenient=True) as link:
        iterator = await batches(link, 3, 0.1)
        deliver(link, 1, 2, 3, 4)
        assert tags(await within(anext(iterator))) == [1, 2, 3]
        assert tags(await within(anext(iterator))) == [4]


async def test_a_timeout_of_0_takes_what_is_there() -> None:
    async with linked(lenient=True) as link:
        iterator = await batches(link, 3, 0)
        deliver(link, 1, 2)
        await link.fence()
        assert tags(await within(anext(iterator))) == [1, 2]


async def test_redelivered_messages_come_alone_and_in_their_order() -> None:
    async with linked(lenient=True) as link:
        iterator = await batches(link, 4, redelivered_apart=True)
        first = asyncio.ensure_future(anext(iterator))
        deliver(link, 1, redelivered=True)
        assert tags(await within(first)) == [1]  # without waiting for others
        second = asyncio.ensure_future(anext(iterator))
        deliver(link, 2, 3)
        deliver(link, 4, redelivered=True)
        deliver(link, 5, redelivered=True)
        deliver(link, 6, 7, 8, 9)
        assert tags(await within(second)) == [2, 3]
        assert [tags(await within(anext(iterator))) for _ in range(3)] == [[4], [5], [6, 7, 8, 9]]


async def test_redelivered_messages_are_like_others_unless_asked_for() -> None:
    async with linked(lenient=True) as link:
        iterator = await batches(link, 2)
        deliver(link, 1, 2, redelivered=True)
        assert tags(await within(anext(iterator))) == [1, 2]


async def test_a_cancelled_wait_takes_nothing() -> None:
    async with linked(lenient=True) as link:
        iterator = await batches(link)
        deliver(link, 1, 2)
        for _ in range(3):
            waiting = asyncio.ensure_future(anext(iterator))
            await link.fence()
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        deliver(link, 3)
        assert tags(await within(anext(iterator))) == [1, 2, 3]


async def test_tasks_that_share_an_iterator_share_its_batches() -> None:
    async with linked(lenient=True) as link:
        iterator = await batches(link)
        waiting = [asyncio.ensure_future(anext(iterator)) for _ in range(2)]
        await turns()
        deliver(link, *range(1, 7))
        got = await within(asyncio.gather(*waiting))
        assert sorted(map(tags, got)) == [[1, 2, 3], [4, 5, 6]]


async def test_async_for_alone_begins_to_consume_and_ends_with_the_channel() -> None:
    async with linked(lenient=True) as link:
        channel = await link.channel()
        iterator = (await link.queue(channel)).batches(2, NEVER, consumer_tag="tag", prefetch=0)
        waiting = asyncio.ensure_future(anext(iterator))
        await link.session.expect(commands.Basic.Consume)
        link.session.send(1, commands.Basic.ConsumeOk("tag"))
        deliver(link, 1, 2)
        assert tags(await within(waiting)) == [1, 2]
        waiting = asyncio.ensure_future(anext(iterator))
        await link.answer(channel.close(), commands.Channel.Close, commands.Channel.CloseOk())
        with pytest.raises(StopAsyncIteration):
            await within(waiting)


async def test_leaving_gives_back_what_was_not_handed_out() -> None:
    async with linked() as link:
        iterator = await batches(link)
        async with iterator:
            deliver(link, *range(1, 6))
            batch = await within(anext(iterator))
            closing = asyncio.create_task(iterator.close())
            await link.session.expect(commands.Basic.Cancel)
            deliver(link, 6)
            link.session.send(1, commands.Basic.CancelOk("tag"))
            await within(closing)
        assert shown(await link.sent()) == [(Nack, tag, False, True) for tag in (4, 5, 6)]
        await batch.ack()
        assert shown(await link.sent()) == [(Ack, 3, True)]
        with pytest.raises(StopAsyncIteration):
            await within(anext(iterator))


async def test_what_came_before_the_brokers_cancel_is_handed_out_full_or_not() -> None:
    async with linked() as link:
        iterator = await batches(link)
        waiting = asyncio.ensure_future(anext(iterator))
        deliver(link, 1, 2)
        link.session.send(1, commands.Basic.Cancel("tag", True))
        batch = await within(waiting)
        assert tags(batch) == [1, 2]
        await batch.ack()  # without a byte: the broker has taken them back
        assert batch.processed
        with pytest.raises(ConsumerCancelled):
            await within(anext(iterator))
        assert await link.sent() == []


# ------------------------------------------------------------------------------------------------------ settling


async def test_one_batch_after_the_other_is_one_frame_each() -> None:
    async with linked() as link:
        iterator = await batches(link)
        deliver(link, *range(1, 7))
        for last in (3, 6):
            batch = await within(anext(iterator))
            assert not batch.processed
            await batch.ack()
            assert batch.processed
            assert shown(await link.sent()) == [(Ack, last, True)]


async def test_batches_acked_in_one_turn_share_a_frame() -> None:
    async with linked() as link:
        iterator = await batches(link)
        deliver(link, *range(1, 7))
        await link.fence()
        for _ in range(2):
            await (await anext(iterator)).ack()
        assert shown(await link.sent()) == [(Ack, 6, True)]


@pytest.mark.parametrize("requeue", [True, False])
async def test_handing_back_is_one_frame_too(requeue: bool) -> None:
    async with linked() as link:
        iterator = await batches(link)
        deliver(link, *range(1, 7))
        await (await within(anext(iterator))).nack(requeue)
        await (await within(anext(iterator))).nack(requeue=requeue)
        assert shown(await link.sent()) == [(Nack, 3, True, requeue), (Nack, 6, True, requeue)]


async def test_rejecting_is_one_frame_but_for_requeueing_which_the_broker_counts() -> None:
    async with linked() as link:
        iterator = await batches(link)
        deliver(link, *range(1, 7))
        await (await within(anext(iterator))).reject()
        await (await within(anext(iterator))).reject(requeue=True)
        assert shown(await link.sent()) == [(Nack, 3, True, False), *[(Reject, tag, True) for tag in (4, 5, 6)]]


async def test_what_was_settled_singly_is_left_out() -> None:
    async with linked() as link:
        iterator = await batches(link, 6)
        deliver(link, *range(1, 7))
        batch = await within(anext(iterator))
        await batch[1].reject()
        await batch[5].nack()
        await batch[2].ack()
        assert shown(await link.sent()) == [(Reject, 2, False), (Nack, 6, False, True), (Ack, 3, False)]
        await batch.ack()
        assert batch.processed
        assert shown(await link.sent()) == [(Ack, 5, True)]
        await batch.ack()
        await batch.nack()
        await batch.reject()
        assert await link.sent() == []


async def test_what_a_multiple_of_a_single_message_settled_is_left_out() -> None:
    async with linked() as link:
        iterator = await batches(link, 4)
        deliver(link, *range(1, 5))
        batch = await within(anext(iterator))
        await batch[1].ack(multiple=True)
        await batch.nack()
        assert shown(await link.sent()) == [(Ack, 2, True), (Nack, 4, True, True)]


async def test_an_unsettled_message_before_it_makes_a_batch_settle_singly() -> None:
    async with linked() as link:
        iterator = await batches(link)
        deliver(link, *range(1, 7))
        first, second = await within(anext(iterator)), await within(anext(iterator))
        await second.ack()
        assert shown(await link.sent()) == [(Ack, tag, False) for tag in (4, 5, 6)]
        await first.nack()
        assert shown(await link.sent()) == [(Nack, 3, True, True)]


async def test_an_ack_that_is_due_goes_before_what_is_handed_back() -> None:
    async with linked() as link:
        iterator = await batches(link)
        deliver(link, *range(1, 7))
        await link.fence()
        await (await anext(iterator)).ack()
        await (await anext(iterator)).nack()
        assert shown(await link.sent()) == [(Ack, 3, True), (Nack, 6, True, True)]


async def test_a_batch_without_acknowledgements_cannot_be_settled() -> None:
    async with linked(lenient=True) as link:
        iterator = await batches(link, no_ack=True)
        deliver(link, 1, 2, 3)
        batch = await within(anext(iterator))
        assert batch.processed
        assert not batch.is_live
        for settle in (batch.ack, batch.nack, batch.reject):
            with pytest.raises(TypeError, match="no_ack"):
                settle()
        async with batch.process():
            pass


async def test_without_basic_nack() -> None:
    async with linked(without="basic.nack", lenient=True) as link:
        iterator = await batches(link)
        deliver(link, *range(1, 10))
        first, second, third = [await within(anext(iterator)) for _ in range(3)]
        with pytest.raises(MethodNotImplemented):
            first.nack()
        assert not first.processed
        await first.reject()
        await second.give_back()
        await third.ack()
        expected = [(Reject, tag, False) for tag in (1, 2, 3)] + [(Reject, tag, True) for tag in (4, 5, 6)]
        assert shown(await link.sent()) == [*expected, (Ack, 9, True)]


@pytest.mark.parametrize(
    ("how", "kwargs", "expected"),
    [
        ("ends", {}, [(Ack, 3, True)]),
        ("raises", {}, [(Nack, 3, True, False)]),
        ("raises", {"requeue": True}, [(Reject, tag, True) for tag in (1, 2, 3)]),
        (
            "raises",
            {"requeue": True, "reject_on_redelivered": True},
            [(Reject, 1, True), (Reject, 2, False), (Reject, 3, True)],
        ),
        ("is cancelled", {}, [(Nack, 3, True, True)]),
        ("settles one", {}, [(Reject, 2, False), (Ack, 3, True)]),
    ],
)
async def test_process_settles_by_how_the_block_ends(how: str, kwargs: Any, expected: Any) -> None:
    async with linked() as link:
        iterator = await batches(link)
        deliver(link, 1)
        deliver(link, 2, redelivered=True)
        deliver(link, 3)
        batch = await within(anext(iterator))
        with contextlib.suppress(LookupError, asyncio.CancelledError):
            async with batch.process(**kwargs) as inside:
                assert inside is batch
                if how == "raises":
                    raise LookupError
                if how == "is cancelled":
                    raise asyncio.CancelledError
                if how == "settles one":
                    await batch[1].reject()
        assert batch.processed
        assert shown(await link.sent()) == expected


async def test_settling_a_batch_of_a_lost_link_raises_DeliveryLost(caplog: pytest.LogCaptureFixture) -> None:  # noqa: N802
    async with linked(lenient=True) as link:
        iterator = await batches(link)
        deliver(link, *range(1, 7))
        batch = await within(anext(iterator))
        assert batch.is_live
        link.session.reset()
        await within(link.connection.closed())
        assert not batch.is_live
        for settle in (batch.ack, batch.nack, batch.reject, batch.give_back):
            with pytest.raises(DeliveryLost):
                settle()
        assert not batch.processed
        async with batch.process():
            pass
        assert "the broker redelivers <Batch of 3: delivery tags 1 to 3>" in caplog.text
        assert [record.levelno for record in caplog.records if "redelivers" in record.getMessage()] == [logging.WARNING]
        with pytest.raises(ConnectionClosed):  # 4 to 6 come again, to whomever
            await within(anext(iterator))


async def test_settling_works_under_transactions() -> None:
    async with linked() as link:
        channel = await link.channel(confirm=False)
        iterator = (await link.queue(channel)).batches(2, NEVER, consumer_tag="tag", prefetch=0)
        await link.answer(iterator.consume(), commands.Basic.Consume, commands.Basic.ConsumeOk("tag"))
        transaction = channel.transaction()
        await link.answer(transaction.select(), commands.Tx.Select, commands.Tx.SelectOk())
        deliver(link, 1, 2)
        await (await within(anext(iterator))).ack()
        committing = asyncio.create_task(transaction.commit())
        _, ack = await link.session.expect(Ack)
        assert (ack.delivery_tag, ack.multiple) == (2, True)
        await link.session.expect(commands.Tx.Commit)
        link.session.send(1, commands.Tx.CommitOk())
        await within(committing)


# ------------------------------------------------------------------------------------------------------- the rest


def test_a_batch_is_a_sequence() -> None:
    async def main() -> None:
        async with linked(lenient=True) as link:
            iterator = await batches(link)
            deliver(link, 1, 2, 3)
            batch = await within(anext(iterator))
            assert len(batch) == 3
            assert batch[0].body == b"1"
            assert [each.body for each in batch[1:]] == [b"2", b"3"]
            assert batch[-1] in batch
            assert repr(batch) == "<Batch of 3: delivery tags 1 to 3>"
            assert repr(iterator) == "<BatchIterator: queue='q' consumer_tag='tag'>"

    asyncio.run(main())


async def test_messages_of_two_channels_are_not_settled_together() -> None:
    async with linked() as link:
        iterator = await batches(link)
        deliver(link, 1, 2, 3)
        batch = await within(anext(iterator))
        other = await link.channel()
        getting = asyncio.create_task((await link.queue(other)).get())
        await link.session.expect(commands.Basic.Get)
        link.session.send_content(2, commands.Basic.GetOk(1, False, "", "q", 0), b"")
        message = await within(getting)
        with pytest.raises(ValueError, match="different channels"):
            Batch([*batch, message]).ack()
        await Batch(batch[::-1]).ack()  # in whatever order
        assert shown(await link.sent()) == [(Ack, 3, True)]
        await message.ack()
        assert shown(await link.sent()) == [(Ack, 1, True)]


async def test_an_empty_batch_settles_nothing() -> None:
    batch = Batch([])
    await batch.ack()
    await batch.nack()
    assert batch.processed
    assert not batch.is_live
    assert repr(batch) == "<Batch of 0: delivery tags none>"


@pytest.mark.parametrize(
    "kwargs",
    [
        {"size": 0},
        {"size": 65_536},
        {"size": 10, "prefetch": 9},
        {"prefetch": 65_536},
        {"prefetch": -1},
        {"timeout": -1.0},
        {"timeout": float("nan")},
        {"on_cancelled": "whatever"},
    ],
)
async def test_what_makes_no_sense_is_refused(kwargs: Any) -> None:
    async with linked(lenient=True) as link:
        queue = await link.queue(await link.channel())
        with pytest.raises(ValueError, match=r"must|would"):
            queue.batches(**kwargs)


@pytest.mark.parametrize(("size", "prefetch", "sent"), [(3, 3, 3), (3, 0, 0), (40_000, None, 65_535)])
async def test_the_prefetch_that_is_sent(size: int, prefetch: int | None, sent: int) -> None:
    async with linked(lenient=True) as link:
        await batches(link, size, prefetch=prefetch, prefetch_sent=sent)


# ------------------------------------------------------------------------------------------------------- recovery


@pytest.mark.parametrize("what", ["link", "channel"])
async def test_a_batch_that_was_half_there_begins_anew(what: str) -> None:
    async with robust() as (connection, server):
        channel = await connection.channel()
        queue = await channel.declare_queue("q")
        async with queue.batches(3, NEVER) as iterator:
            waiting = asyncio.ensure_future(anext(iterator))
            for tag in (1, 2):
                server.link.deliver("q", tag, b"old")
            await channel.declare_queue("fence")
            assert not waiting.done()
            if what == "link":
                link = await again(connection, server)
            else:
                link = server.link
                await closed_by_broker(channel, server)
                await within(channel.ready())
            for tag in (1, 2, 3):
                link.deliver("q", tag, b"new %d" % tag)
            batch = await within(waiting)
            assert [message.body for message in batch] == [b"new 1", b"new 2", b"new 3"]
            await batch.ack()
            await channel.default_exchange.publish(Message(b""), "fence")
            (ack,) = await server.seen(Ack)
            assert (ack.delivery_tag, ack.multiple) == (3, True)


async def test_a_batch_handed_out_before_the_reconnect_is_lost_and_the_next_is_not() -> None:
    async with robust() as (connection, server):
        channel = await connection.channel()
        queue = await channel.declare_queue("q")
        async with queue.batches(2, 5) as iterator:
            for tag in (1, 2, 3):
                server.link.deliver("q", tag, b"old")
            batch = await within(anext(iterator))
            link = await again(connection, server)
            with pytest.raises(DeliveryLost):
                batch.ack()
            for tag in (1, 2):
                link.deliver("q", tag, b"new")
            batch = await within(anext(iterator))
            assert [message.body for message in batch] == [b"new", b"new"]
            assert [qos.prefetch_count for qos in link.all(commands.Basic.Qos)] == [4]
            await batch.ack()
