"""What a user settles is what the broker is told, by the end of the turn, in any order and never twice."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pamqp import frame
from pamqp.commands import Basic

from leveret import Batch, Connection, IncomingMessage, MessageProcessError
from tests.unit.test_call_ceilings import FakeSocket, deliver, run

COUNT = 5
tags = st.integers(1, COUNT)
settlements = st.one_of(
    st.tuples(st.just("ack"), tags, st.booleans()),
    st.tuples(st.just("ack"), tags, st.just(False)),
    st.tuples(st.just("nack"), tags, st.booleans()),
    st.tuples(st.just("reject"), tags, st.just(False)),
    st.tuples(st.sampled_from(["all ack", "all nack"]), tags, tags),
    st.tuples(st.just("turn"), st.just(0), st.just(False)),
)


def settled_on_the_wire(written: list[bytes], unsettled: dict[int, str | None]) -> None:
    """Play the broker: mark in *unsettled* what the frames settle; a tag that is not outstanding is its 406."""
    data = b"".join(written)
    while data:
        consumed, _, method = frame.unmarshal(data)
        data = data[consumed:]
        if not isinstance(method, Basic.Ack | Basic.Nack | Basic.Reject):
            continue
        tag = method.delivery_tag
        assert unsettled[tag] is None, f"{method.name} of tag {tag}, which is settled: the broker would answer 406"
        for each in range(1 if getattr(method, "multiple", False) else tag, tag + 1):
            if unsettled[each] is None:
                unsettled[each] = method.name.removeprefix("Basic.").lower()


async def play(
    connection: Connection, fake: FakeSocket, script: list[tuple[str, int, int]], ack_batch: int | None = None
) -> None:
    channel = await connection.channel()
    queue = await channel.get_queue("q", ensure=False)
    messages: dict[int, IncomingMessage] = {}
    consumer = await queue.consume(
        lambda message: messages.__setitem__(message.delivery_tag, message), consumer_tag="tag", ack_batch=ack_batch
    )
    fake.is_quiet = True
    fake.receive(b"".join(deliver("tag", number) for number in range(1, COUNT + 1)))
    for _ in range(5):
        await asyncio.sleep(0)
    assert len(messages) == COUNT
    fake.written.clear()
    wanted: dict[int, str | None] = dict.fromkeys(messages)
    for verb, tag, multiple in script:
        if verb == "turn":
            await asyncio.sleep(0)
            continue
        if verb.startswith("all "):  # a batch of the tags from one to another, which leaves out what is settled
            verb = verb.removeprefix("all ")
            some = range(min(tag, multiple), max(tag, multiple) + 1)
            _ = getattr(Batch([messages[each] for each in some]), verb)()
            wanted |= {each: wanted[each] or verb for each in some}
            continue
        settle = getattr(messages[tag], verb)
        if wanted[tag] is not None:
            with pytest.raises(MessageProcessError):
                settle() if verb == "reject" else settle(multiple=multiple)
            continue
        _ = settle() if verb == "reject" else settle(multiple=multiple)
        for each in range(1 if multiple else tag, tag + 1):
            wanted[each] = wanted[each] or verb
    if ack_batch is not None:
        fake.is_quiet = False
        await consumer.stop()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    got: dict[int, str | None] = dict.fromkeys(messages)
    settled_on_the_wire(fake.written, got)
    assert got == wanted


@settings(max_examples=400, deadline=None)
@given(st.lists(settlements, max_size=8))
def test_the_broker_is_told_what_was_settled_and_nothing_twice(script):
    run(lambda connection, fake: play(connection, fake, script))


@settings(max_examples=400, deadline=None)
@given(st.lists(settlements, max_size=8), st.integers(2, COUNT + 1))
def test_the_same_with_batches_by_the_time_the_consumer_has_stopped(script, ack_batch):
    run(lambda connection, fake: play(connection, fake, script, ack_batch))


@pytest.mark.parametrize(
    "script",
    [
        [("ack", 1, True)],
        [("ack", 1, True), ("ack", 2, False), ("ack", 3, False)],
        [("ack", 1, True), ("turn", 0, False), ("ack", 2, False)],
        [("ack", 3, True), ("ack", 4, True)],
        [("ack", 2, False), ("ack", 1, True), ("ack", 3, False)],
        [("nack", 3, False), ("all ack", 2, 4), ("all ack", 1, 5)],
        [("ack", 1, False), ("all nack", 1, 3), ("all ack", 3, 5), ("turn", 0, False)],
    ],
    ids=str,
)
def test_an_ack_of_all_up_to_the_next_tag_is_written(script):
    run(lambda connection, fake: play(connection, fake, script))
