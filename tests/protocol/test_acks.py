"""Acks on the wire: as few as possible, in the order that was written, and never one that the broker would refuse."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from pamqp import commands

from leveret import Channel, IncomingMessage, Message, Queue
from leveret.exceptions import ChannelClosed, MessageProcessError
from tests.protocol.kit import Link, linked, turns, until, within

Ack, Nack, Reject = commands.Basic.Ack, commands.Basic.Nack, commands.Basic.Reject


async def messages(link: Link, count: int, **kwargs: Any) -> list[IncomingMessage]:
    """That many deliveries on channel 1, tags from 1."""
    got: list[IncomingMessage] = []
    channel = await link.channel(**kwargs)
    await link.consume(channel, got.append)
    for n in range(1, count + 1):
        link.session.deliver(1, "tag", n)
    await until(lambda: len(got) == count)
    return got


def plain(frames: list[Any]) -> list[tuple[str, int, bool]]:
    return [
        (value.name.removeprefix("Basic."), value.delivery_tag, getattr(value, "multiple", False)) for value in frames
    ]


async def test_contiguous_acks_of_one_turn_are_one_frame() -> None:
    async with linked() as link:
        for message in await messages(link, 100):
            message.ack()
        assert plain(await link.sent()) == [("Ack", 100, True)]


async def test_acks_of_two_turns_are_two_frames() -> None:
    async with linked() as link:
        got = await messages(link, 4)
        for message in got[:2]:
            _ = message.ack()
        await turns(2)
        for message in got[2:]:
            _ = message.ack()
        assert plain(await link.sent()) == [("Ack", 2, True), ("Ack", 4, True)]


async def test_a_multiple_ack_of_the_next_tag_is_written_without_waiting_for_anything_else() -> None:
    async with linked() as link:
        got = await messages(link, 2)
        await got[0].ack(multiple=True)
        _, first = await link.session.expect(Ack, timeout=0.5)  # nothing else is written that could take it along
        assert first.delivery_tag == 1
        await got[1].ack()
        _, second = await link.session.expect(Ack, timeout=0.5)
        assert second.delivery_tag == 2


async def test_acks_out_of_order_are_written_one_by_one_and_a_gap_that_closes_joins_them() -> None:
    async with linked() as link:
        got = await messages(link, 5)
        for n in (3, 2, 1, 5, 4):
            _ = got[n - 1].ack()
        sent = plain(await link.sent())
        assert sent == [("Ack", 3, False), ("Ack", 2, False), ("Ack", 1, True), ("Ack", 5, False), ("Ack", 4, True)]


async def test_a_gap_is_never_covered_by_a_multiple() -> None:
    async with linked() as link:
        got = await messages(link, 5)
        for n in (1, 2, 4, 5):
            _ = got[n - 1].ack()
        assert plain(await link.sent()) == [("Ack", 2, True), ("Ack", 4, False), ("Ack", 5, False)]


async def test_a_multiple_of_the_user_settles_all_before_it() -> None:
    async with linked() as link:
        got = await messages(link, 5)
        await got[3].ack(multiple=True)
        for n in (1, 2, 3):
            with pytest.raises(MessageProcessError):
                await got[n - 1].ack()
        await got[4].ack()
        assert [tag for _, tag, _ in plain(await link.sent())] == [4, 5]


async def test_nack_and_reject_write_the_saved_up_ack_first() -> None:
    async with linked() as link:
        got = await messages(link, 5)
        for n, settle in enumerate(("ack", "ack", "nack", "ack", "reject")):
            getattr(got[n], settle)()
        assert plain(await link.sent()) == [
            ("Ack", 2, True),
            ("Nack", 3, False),
            ("Ack", 4, True),
            ("Reject", 5, False),
        ]


Call = Callable[[Channel, Queue], Awaitable[Any]]
FOLLOWING: dict[str, tuple[Call, type[Any], Any]] = {
    "declare": (lambda c, q: q.declare(), commands.Queue.Declare, commands.Queue.DeclareOk("q", 0, 0)),
    "qos": (lambda c, q: c.set_qos(1), commands.Basic.Qos, commands.Basic.QosOk()),
    "get": (lambda c, q: q.get(fail=False), commands.Basic.Get, commands.Basic.GetEmpty()),
    "cancel": (lambda c, q: q.cancel("tag"), commands.Basic.Cancel, commands.Basic.CancelOk("tag")),
    "cancel nowait": (lambda c, q: q.cancel("tag", nowait=True), commands.Basic.Cancel, None),
    "purge nowait": (lambda c, q: q.purge(no_wait=True), commands.Queue.Purge, None),
    "close": (lambda c, q: c.close(), commands.Channel.Close, commands.Channel.CloseOk()),
}


@pytest.mark.parametrize("name", FOLLOWING)
async def test_an_ack_precedes_the_next_method_of_its_channel(name: str) -> None:
    call, request, reply = FOLLOWING[name]
    async with linked(lenient=True) as link:
        got = await messages(link, 2)
        channel = link.connection._channels.copy().pop()
        queue = await link.queue(channel)

        async def ack_and_call() -> None:
            for message in got:
                _ = message.ack()
            await call(channel, queue)

        task = asyncio.create_task(ack_and_call())
        order = [type((await link.session.receive())[1]) for _ in range(2)]
        if reply is not None:
            link.session.send(1, reply)
        await within(task)
        assert order == [Ack, request]


async def test_acks_and_publishes_of_a_transaction_keep_their_order() -> None:
    async with linked() as link:
        got = await messages(link, 1, confirm=False)
        channel = link.connection._channels.copy().pop()

        async def work() -> None:
            async with channel.transaction():
                _ = got[0].ack()
                await channel.default_exchange.publish(Message(b""), "key")

        task = asyncio.create_task(work())
        await link.session.expect(commands.Tx.Select)
        link.session.send(1, commands.Tx.SelectOk())
        names = [type((await link.session.receive())[1]).__name__ for _ in range(4)]
        link.session.send(1, commands.Tx.CommitOk())
        await within(task)
        assert set(names[:3]) == {"Ack", "Publish", "ContentHeader"}
        assert names[3] == "Commit"


class Broker:
    """What a broker knows: which tags are unacknowledged, and what happened to each."""

    def __init__(self) -> None:
        self.unacked: set[int] = set()
        self.fate: dict[int, str] = {}

    def deliver(self, tag: int) -> None:
        self.unacked.add(tag)

    def take(self, frame: Any) -> None:
        name, tag, multiple = plain([frame])[0]
        if multiple:
            covered = {t for t in self.unacked if t <= tag} if tag else set(self.unacked)
            assert covered, f"PRECONDITION_FAILED - unknown delivery tag {tag} (multiple)"
            assert tag in self.unacked or tag == 0, f"{name} multiple of {tag}, which is settled"
        else:
            assert tag in self.unacked, f"PRECONDITION_FAILED - unknown delivery tag {tag}"
            covered = {tag}
        kind = name if name == "Ack" else f"{name} requeue={frame.requeue}"
        for t in covered:
            self.unacked.discard(t)
            self.fate[t] = kind


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("multiples", [False, True])
async def test_random_settling_agrees_with_a_brokers_model(seed: int, multiples: bool) -> None:
    """What reaches the wire settles each tag as the user did, and never twice."""
    rng = random.Random(seed)
    broker = Broker()
    expected: dict[int, str] = {}
    async with linked() as link:
        got: list[IncomingMessage] = []
        channel = await link.channel()
        await link.consume(channel, got.append)
        last = 0
        for _ in range(12):
            for _ in range(rng.randrange(0, 12)):
                last += 1
                broker.deliver(last)
                link.session.deliver(1, "tag", last)
            await until(lambda: len(got) == last)  # noqa: B023
            open_messages = [message for message in got if message.delivery_tag not in expected]
            for _ in range(rng.randrange(0, 10)):
                if not open_messages:
                    break
                index = 0 if rng.random() < 0.5 else rng.randrange(len(open_messages))
                message = open_messages[index]
                tag = message.delivery_tag
                multiple = multiples and rng.random() < 0.15
                what = rng.choice(["ack", "ack", "ack", "ack", "nack", "reject"])
                requeue = rng.random() < 0.5
                if what == "ack":
                    outcome: Any = message.ack(multiple=multiple)
                    kind = "Ack"
                elif what == "nack":
                    outcome = message.nack(multiple=multiple, requeue=requeue)
                    kind = f"Nack requeue={requeue}"
                else:
                    multiple = False
                    outcome = message.reject(requeue=requeue)
                    kind = f"Reject requeue={requeue}"
                for other in list(open_messages):
                    if other is message or (multiple and other.delivery_tag <= tag):
                        expected[other.delivery_tag] = kind
                        open_messages.remove(other)
                if rng.random() < 0.3:
                    await outcome
                if rng.random() < 0.3:
                    await asyncio.sleep(0)
            for frame in await link.sent():
                broker.take(frame)
            assert broker.fate == expected
        assert not channel.is_closed


async def test_tags_of_deliveries_without_ack_and_of_gets_leave_gaps_that_do_no_harm() -> None:
    async with linked() as link:
        got: list[IncomingMessage] = []
        channel = await link.channel()
        await link.consume(channel, got.append, "quiet", no_ack=True)
        await link.consume(channel, got.append, "tag")
        broker = Broker()
        for n in range(1, 21):
            link.session.deliver(1, "quiet" if n % 3 == 1 else "tag", n)
            if n % 3 != 1:
                broker.deliver(n)
        await until(lambda: len(got) == 20)
        for message in got:
            if not message.processed:
                await message.ack()
        for frame in await link.sent():
            broker.take(frame)
        assert not broker.unacked


async def test_a_message_left_unacked_for_ever_costs_no_correctness() -> None:
    """More tags than are remembered out of order."""
    async with linked() as link:
        got = await messages(link, 6000)
        broker = Broker()
        for n in range(1, 6001):
            broker.deliver(n)
        for message in got[1:]:
            _ = message.ack()
        await got[0].ack()
        for frame in await link.sent():
            broker.take(frame)
        assert not broker.unacked


async def test_a_stale_ack_after_a_multiple_is_refused_locally_however_many_tags_there_were() -> None:
    async with linked(lenient=True) as link:
        got = await messages(link, 5003)
        for message in got[2:5001]:  # the first two are left for later
            _ = message.ack()
        await got[5002].ack(multiple=True)
        with pytest.raises(MessageProcessError):
            await got[1].ack()  # the broker would close the channel: 406
        await link.fence()


async def test_channel_close_overtakes_a_commit_that_is_never_answered() -> None:
    async with linked() as link:
        channel = await link.channel(confirm=False)
        transaction = channel.transaction()
        await link.answer(transaction.select(), commands.Tx.Select, commands.Tx.SelectOk())
        commit = asyncio.create_task(transaction.commit())
        await link.session.expect(commands.Tx.Commit)
        assert await within(channel.default_exchange.publish(Message(b""), "key")) is None
        assert await link.fence() == []  # waits for the commit
        await link.answer(channel.close(), commands.Channel.Close, commands.Channel.CloseOk())
        with pytest.raises(ChannelClosed):
            await within(commit)


async def test_settling_is_on_the_channel_that_delivered() -> None:
    async with linked() as link:
        one, two = await link.channel(), await link.channel()
        got: dict[int, IncomingMessage] = {}
        await link.consume(one, lambda message: got.setdefault(1, message))
        await link.consume(two, lambda message: got.setdefault(2, message))
        link.session.deliver(1, "tag", 1)
        link.session.deliver(2, "tag", 1)
        await until(lambda: len(got) == 2)
        await got[2].ack()
        ((channel, ack),) = await link.fence()
        assert (channel, type(ack)) == (2, Ack)
        await got[1].reject(requeue=True)
        ((channel, reject),) = await link.fence()
        assert isinstance(reject, Reject)
        assert (channel, reject.requeue) == (1, True)
