"""When what the broker refuses or takes away is tried again, and what a health check is told of it."""

from __future__ import annotations

import math

import pytest

from leveret.exceptions import ChannelAccessRefused, ChannelLockedResource
from leveret.troubles import Trouble, Troubles

Q, R = ("queue", "q"), ("queue", "r")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def troubles(clock: Clock) -> Troubles:
    return Troubles(clock)


def refused(troubles: Troubles, error: Exception | None = None) -> Trouble:
    return troubles.refused(Q, "queue 'q'", error or ChannelAccessRefused("no"))


def lost(troubles: Troubles) -> Trouble:
    return troubles.lost(Q, "channel 1", ChannelAccessRefused("no"))


def nobody(_: object) -> bool:
    return False


def test_what_is_in_no_trouble_may_be_tried(troubles: Troubles) -> None:
    assert troubles.may_try(Q)
    assert Q not in troubles
    assert troubles.get(Q) is None
    assert troubles.next_due(0) == math.inf
    assert troubles.current(nobody) == []


def test_the_pauses_after_refusals_double_up_to_thirty_seconds(troubles: Troubles, clock: Clock) -> None:
    pauses = []
    for _ in range(12):
        trouble = refused(troubles)
        pauses.append(trouble.due - clock.now)
        clock.now = trouble.due
    assert pauses == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30, 30, 30, 30])


def test_a_thousand_refusals_do_not_overflow(troubles: Troubles, clock: Clock) -> None:
    for _ in range(2000):
        trouble = refused(troubles)
    assert trouble.due - clock.now == 30


def test_a_locked_queue_is_tried_again_at_least_every_second(troubles: Troubles, clock: Clock) -> None:
    pauses = [refused(troubles, ChannelLockedResource("locked")).due - clock.now for _ in range(6)]
    assert pauses == pytest.approx([0.2, 0.4, 0.8, 1, 1, 1])


def test_it_may_be_tried_when_it_is_due(troubles: Troubles, clock: Clock) -> None:
    trouble = refused(troubles)
    assert not troubles.may_try(Q)
    assert troubles.may_try(R)
    clock.now = trouble.due
    assert troubles.may_try(Q)


def test_what_is_over_begins_afresh(troubles: Troubles, clock: Clock) -> None:
    for _ in range(5):
        refused(troubles)
    troubles.over(Q)
    troubles.over(Q)
    assert troubles.may_try(Q)
    assert refused(troubles).due - clock.now == pytest.approx(0.2)


def test_hurrying_makes_it_due_and_forgets_nothing(troubles: Troubles) -> None:
    refused(troubles)
    refused(troubles)
    troubles.hurry(Q)
    troubles.hurry(R)
    assert troubles.may_try(Q)
    assert R not in troubles
    assert refused(troubles).attempts == 3


def test_a_first_loss_is_mended_at_once_and_those_that_follow_after_growing_pauses(
    troubles: Troubles, clock: Clock
) -> None:
    pauses = []
    for _ in range(4):
        trouble = lost(troubles)
        pauses.append(trouble.due - clock.now)
        clock.now = trouble.due + 1
    assert pauses == pytest.approx([0, 0.2, 0.4, 0.8])


def test_losses_more_than_a_minute_apart_are_no_series(troubles: Troubles, clock: Clock) -> None:
    for _ in range(5):
        trouble = lost(troubles)
        assert (trouble.attempts, trouble.due) == (1, clock.now)
        clock.now += 60


def test_one_loss_is_told_only_while_it_is_not_mended_and_several_for_a_minute(
    troubles: Troubles, clock: Clock
) -> None:
    lost(troubles)
    assert len(troubles.current(nobody)) == 1
    assert troubles.current(lambda _: True) == []
    lost(troubles)
    assert troubles.current(lambda _: True) == []
    lost(troubles)
    assert len(troubles.current(lambda _: True)) == 1
    clock.now += 60
    assert troubles.current(lambda _: True) == []


def test_the_next_due_is_the_first_after_a_moment(troubles: Troubles, clock: Clock) -> None:
    first = refused(troubles)
    clock.now += 0.1
    second = troubles.refused(R, "queue 'r'", ChannelAccessRefused("no"))
    assert troubles.next_due(clock.now) == first.due
    assert troubles.next_due(first.due) == second.due
    assert troubles.next_due(second.due) == math.inf


def test_a_trouble_says_what_why_and_how_often_in_one_line(troubles: Troubles) -> None:
    assert str(refused(troubles)) == "queue 'q': no"
    refused(troubles)
    trouble = refused(troubles, ChannelAccessRefused("no\nline"))
    assert "\n" not in str(trouble)
    assert str(trouble).endswith("(3 times)")
