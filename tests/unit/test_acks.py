"""Which acks are saved up, and what is known to be settled."""

from __future__ import annotations

import pytest

from leveret.exceptions import MessageProcessError
from leveret.wire.acks import Acks


def test_acks_in_order_are_saved_up_and_the_last_one_is_due():
    acks = Acks()
    assert all(acks.save_up(tag) for tag in (1, 2, 3))
    assert (acks.take_due(), acks.take_due()) == (3, 0)


def test_an_ack_out_of_order_is_written_by_itself_and_the_count_catches_up():
    acks = Acks()
    assert not acks.save_up(2)
    acks.note(2, multiple=False)
    assert acks.save_up(1)
    assert acks.take_due() == 1  # not 2, which the broker has seen settled
    assert acks.save_up(3)


def test_what_a_multiple_settled_is_refused():
    acks = Acks()
    acks.note(5, multiple=True)
    for tag in (1, 5):
        with pytest.raises(MessageProcessError):
            acks.check(tag)
    acks.check(6)


def test_after_a_rollback_no_ack_covers_another():
    acks = Acks()
    assert acks.save_up(1)
    acks.take_due()
    acks.stop_counting()
    assert not acks.save_up(2)
    acks.note(2, multiple=False)
    assert not acks.save_up(3)


def test_a_tag_that_is_never_settled_costs_bounded_memory_and_a_multiple_begins_anew():
    acks = Acks()
    for tag in range(2, 10_000):
        assert not acks.save_up(tag)
        acks.note(tag, multiple=False)
    assert len(acks._ahead) < 5_000
    acks.note(20_000, multiple=True)
    assert acks.save_up(20_001)


def test_a_batch_in_order_is_one_multiple():
    acks = Acks()
    assert acks.split([1, 2, 3]) == (3, [])
    acks.save_up_to(3)
    assert acks.take_due() == 3
    assert acks.split([4, 5]) == (5, [])


def test_what_is_left_out_before_a_batch_makes_the_rest_single():
    acks = Acks()
    assert acks.split([2, 3]) == (0, [2, 3])
    assert acks.split([1, 2, 4, 5]) == (2, [4, 5])


def test_what_was_settled_before_is_no_gap_and_not_settled_again():
    acks = Acks()
    acks.note(2, False)
    acks.note(5, False)
    assert acks.split([1, 3, 4, 6]) == (6, [])
    assert acks.split([1, 2, 3, 4, 5]) == (4, [])  # the broker refuses a multiple up to what it has seen settled
    acks.save_up_to(4)
    assert acks.take_due() == 4
    assert acks.split([6]) == (6, [])
    acks.note(6, True)
    assert acks.split([4, 5, 6, 7]) == (7, [])
    assert acks.split([5, 6]) == (0, [])


def test_what_is_not_counted_any_more_is_settled_singly():
    acks = Acks()
    acks.stop_counting()
    assert acks.split([1, 2]) == (0, [1, 2])


def test_acks_are_held_back_in_any_order_and_each_is_written_once():
    acks = Acks()
    assert all(acks.hold(tag) for tag in (1, 3, 4))
    assert (acks.pending, acks.due) == (3, 1)
    assert acks.hold(2)
    assert (acks.take_due(), acks.take_held(), acks.pending) == (4, [], 0)
    assert all(acks.hold(tag) for tag in (8, 6))
    assert (acks.take_due(), acks.take_held()) == (0, [6, 8])
    assert acks.hold(5)
    assert (acks.take_due(), acks.take_held()) == (5, [])  # not 6, which was written
    assert acks.hold(7)
    assert acks.take_due() == 7
    assert acks.is_settled(8)
    assert not acks.is_settled(9)


def test_what_cannot_be_counted_is_not_held_back():
    acks = Acks()
    for tag in range(2, 4098):
        assert acks.hold(tag)
    assert not acks.hold(4098)
    acks = Acks()
    acks.stop_counting()
    assert not acks.hold(1)


def test_what_a_multiple_settled_is_not_held_back():
    acks = Acks()
    acks.note(5, multiple=True)
    with pytest.raises(MessageProcessError):
        acks.hold(4)


def test_a_batch_takes_the_held_acks_within_it_along_and_those_that_follow_it():
    acks = Acks()
    assert all(acks.hold(tag) for tag in (3, 6))
    assert acks.split([1, 2, 4, 5]) == (5, [])
    acks.save_up_to(5)
    assert (acks.take_due(), acks.take_held()) == (6, [])
