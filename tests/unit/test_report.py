"""What became of many messages: true, told and raised."""

from __future__ import annotations

import pytest

from leveret import Message, PublishFailure, PublishReport
from leveret.exceptions import AMQPError, DeliveryError, PublishManyFailed, PublishNotSent, PublishOutcomeUnknown

FAILURES = [
    PublishFailure(3, Message(b"3"), "key", PublishNotSent("not sent")),
    PublishFailure(7, Message(b"7"), "key", PublishOutcomeUnknown("lost")),
]


def test_a_good_one() -> None:
    report = PublishReport(10, 10)
    assert report
    assert report.returned == []
    assert report.error(0) is report.error(9) is None
    assert str(report) == "10 messages, 10 confirmed, 0 failed"
    assert repr(report) == "<PublishReport: 10 messages, 10 confirmed, 0 failed>"
    report.raise_for_failures()


def test_one_with_failures() -> None:
    report = PublishReport(10, 8, FAILURES)
    assert not report
    errors = [report.error(index) for index in range(10)]
    assert [index for index, error in enumerate(errors) if error is not None] == [3, 7]
    assert (errors[3], errors[7]) == (FAILURES[0].error, FAILURES[1].error)
    assert str(report).startswith("10 messages, 8 confirmed, 2 failed; the first of them, at index 3: PublishNotSent(")
    with pytest.raises(PublishManyFailed) as caught:
        report.raise_for_failures()
    assert caught.value.report is report
    assert str(caught.value) == str(report)
    assert caught.value.__cause__ is FAILURES[0].error
    assert isinstance(caught.value, DeliveryError)
    assert isinstance(caught.value, AMQPError)


def test_one_that_was_stopped() -> None:
    error = PublishNotSent("closed")
    report = PublishReport(10, 10, [], error)
    assert not report
    with pytest.raises(PublishManyFailed, match="the channel was closed: closed") as caught:
        report.raise_for_failures()
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("index", [-1, 10])
def test_the_outcome_of_what_was_not_taken(index: int) -> None:
    with pytest.raises(IndexError, match="10 messages"):
        PublishReport(10, 10).error(index)
