"""Publishes that wait for their channel: in order, in time, and no more of them than there is room for."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from leveret import Message
from leveret.exceptions import MessageTooLarge, PublishNotSent, PublishNotSentInTime
from leveret.wire.outgoing import Publish
from leveret.wire.waiting import Budget, WaitingRoom


class Sender:
    """Stands in for the publisher of a channel that is back."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    def adopt(self, publish: Publish) -> None:
        self.sent.append(publish.routing_key)
        publish.set_result(None)


def make(count: int = 100, size: int = 1000, timeout: float = 30.0) -> tuple[WaitingRoom, Budget]:
    budget = Budget(count, size)
    return WaitingRoom(budget, timeout, 4096, lambda: "the link is down"), budget


def put(room: WaitingRoom, key: str, body: bytes = b"", timeout: float | None = None, **headers: Any) -> Publish:
    message = Message(body, headers=headers)
    publish = room.publish("", key, message.wire_properties(), body, True, timeout)
    assert isinstance(publish, Publish)
    return publish


def hand_over(room: WaitingRoom) -> list[str]:
    sender = Sender()
    room.hand_over(sender)  # type: ignore[arg-type]
    return sender.sent


# ----------------------------------------------------------------------------------------------------------- budget


def test_a_budget_is_bounded_in_number_and_bytes() -> None:
    budget = Budget(3, 100)
    assert budget.take(60)
    assert not budget.take(41)
    assert budget.take(40)
    assert budget.take(0)
    assert not budget.take(0)
    budget.give_back(40)
    assert budget.take(40)
    assert (budget.count, budget.bytes) == (3, 100)


def test_one_that_is_larger_than_the_budget_may_wait_alone() -> None:
    budget = Budget(3, 100)
    assert budget.take(1000)
    assert not budget.take(0) or budget.bytes == 1000
    budget.give_back(1000)
    assert budget.take(100)
    assert not budget.take(1000)


# ------------------------------------------------------------------------------------------------------ waiting room


async def test_they_are_handed_over_in_their_order_and_make_room() -> None:
    room, budget = make()
    publishes = [put(room, f"{n}", b"xx") for n in range(5)]
    assert (len(room), budget.count, budget.bytes) == (5, 5, 10)
    assert hand_over(room) == ["0", "1", "2", "3", "4"]
    assert (len(room), budget.count, budget.bytes) == (0, 0, 0)
    await asyncio.gather(*publishes)
    assert (budget.count, budget.bytes) == (0, 0)
    assert hand_over(room) == []


async def test_who_was_cancelled_is_not_handed_over_and_gives_its_room_back_once() -> None:
    room, budget = make()
    publishes = [put(room, f"{n}", b"xx") for n in range(3)]
    publishes[1].cancel()
    assert hand_over(room) == ["0", "2"]  # in the same turn
    await asyncio.gather(*publishes, return_exceptions=True)
    assert (budget.count, budget.bytes) == (0, 0)
    publishes = [put(room, f"{n}", b"xx") for n in range(3)]
    publishes[1].cancel()
    await asyncio.sleep(0)
    assert (len(room), budget.count, budget.bytes) == (2, 2, 4)
    assert hand_over(room) == ["0", "2"]


@pytest.mark.parametrize("timeout", [0.0, 0.01])
async def test_time_is_up_after_the_timeout_with_the_reason(timeout: float) -> None:
    room, budget = make()
    publish = put(room, "key", b"xx", timeout)
    with pytest.raises(PublishNotSentInTime, match=r"the link is down.*'key'"):
        await publish
    await asyncio.sleep(0)
    assert (len(room), budget.count, budget.bytes) == (0, 0, 0)


async def test_without_a_timeout_the_default_counts() -> None:
    room, _ = make(timeout=0.01)
    with pytest.raises(PublishNotSentInTime, match=r"0\.01 s"):
        await put(room, "key")


async def test_time_without_limit_has_no_timer() -> None:
    room, _ = make(timeout=math.inf)
    publish = put(room, "key")
    assert publish.timer is None
    assert hand_over(room) == ["key"]
    await publish


async def test_beyond_the_limit_the_call_raises() -> None:
    room, budget = make(count=2)
    publishes = [put(room, f"{n}") for n in range(2)]
    with pytest.raises(PublishNotSent, match="2 publishes"):
        put(room, "too many")
    assert budget.count == 2
    hand_over(room)
    await asyncio.gather(*publishes)


async def test_rooms_share_their_budget() -> None:
    room, budget = make(count=2)
    other = WaitingRoom(budget, 30, 4096, lambda: "")
    publishes = [put(room, "a"), put(other, "b")]
    with pytest.raises(PublishNotSent):
        put(room, "c")
    assert hand_over(other) == ["b"]
    publishes.append(put(room, "c"))
    assert hand_over(room) == ["a", "c"]
    await asyncio.gather(*publishes)


async def test_what_could_not_be_sent_anyway_is_refused_and_takes_no_room() -> None:
    room, budget = make()
    with pytest.raises(ValueError, match="255"):
        put(room, "k" * 256)
    with pytest.raises(MessageTooLarge):
        put(room, "key", headers="x" * 5000)
    assert (len(room), budget.count) == (0, 0)


async def test_when_the_channel_is_gone_each_fails_with_an_error_of_its_own() -> None:
    room, budget = make()
    publishes = [put(room, f"{n}") for n in range(3)]
    cause = ConnectionError("gone")
    room.fail(cause)
    errors = await asyncio.gather(*publishes, return_exceptions=True)
    assert all(isinstance(error, PublishNotSent) and error.__cause__ is cause for error in errors)
    assert len({id(error) for error in errors}) == 3
    assert (len(room), budget.count) == (0, 0)


async def test_one_that_a_channel_lost_waits_behind_those_that_wait_already() -> None:
    room, _ = make()
    other, _ = make()
    first = put(other, "first")
    publishes = [put(room, "second"), first]
    assert room.add(first)
    assert first.holder is room
    assert hand_over(room) == ["second", "first"]
    await asyncio.gather(*publishes)
