"""What users write: `MessageRetry` and its mistakes, and what it makes of a queue. No broker."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from typing import Any

import pytest

from leveret import MessageRetry, Queue
from leveret.retry_ladder import Backend


class _Channel:
    close_callbacks = None


def queue(name: str = "orders", *, durable: bool = True, passive: bool = False, **kwargs: Any) -> Queue:
    return Queue(
        _Channel(),  # type: ignore[arg-type]
        name,
        durable,
        kwargs.get("exclusive", False),
        kwargs.get("auto_delete", False),
        kwargs.get("arguments"),
        passive,
    )


def test_defaults() -> None:
    retry = MessageRetry()
    assert (retry.attempts, retry.delays) == (5, (1, 5, 30, 120))
    assert retry.retry_on == (Exception,)
    assert MessageRetry(attempts=3).delays == (1, 5)
    assert MessageRetry(attempts=9).delays == (1, 5, 30, 120)
    assert (MessageRetry(attempts=1).delays, MessageRetry(delays=()).attempts) == ((), 1)
    assert (MessageRetry(delays=2).attempts, MessageRetry(delays=[1, 2.5]).delays) == (2, (1, 2.5))


def test_it_is_a_value() -> None:
    assert MessageRetry(attempts=3) == MessageRetry(attempts=3, delays=(1, 5))
    assert hash(MessageRetry()) == hash(MessageRetry())
    assert "attempts=5" in repr(MessageRetry())
    with pytest.raises(dataclasses.FrozenInstanceError):
        MessageRetry().attempts = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"attempts": 0}, "attempts"),
        ({"attempts": True}, "attempts"),
        ({"attempts": 2.0}, "attempts"),
        ({"attempts": 3, "delays": ()}, "delays=0"),
        ({"attempts": 2, "delays": (1, 2)}, "more than the 1"),
        ({"attempts": 1, "delays": 1}, "more than the 0"),
        ({"delays": -1}, "0 to"),
        ({"delays": (1, math.nan)}, "0 to"),
        ({"delays": math.inf}, "0 to"),
        ({"delays": 366 * 86400}, "a year"),
        ({"park_in": "a", "dead_letter_to": "b"}, "choose one"),
        ({"dead_letter_key": "b"}, "dead_letter_to"),
        ({"park_in": ""}, "empty"),
        ({"dead_letter_to": ""}, "empty"),
        ({"park_in": "é" * 128}, "255"),
        ({"dead_letter_to": "x", "dead_letter_key": "k" * 256}, "255"),
    ],
)
def test_mistakes(kwargs: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        MessageRetry(**kwargs)


@pytest.mark.parametrize("value", [5, BaseException, asyncio.CancelledError, (ValueError, "x"), "ValueError"])
def test_what_is_no_exception(value: Any) -> None:
    with pytest.raises(TypeError, match="retry_on"):
        MessageRetry(retry_on=value)
    with pytest.raises(TypeError, match="never"):
        MessageRetry(never=value)


@pytest.mark.parametrize("delays", ["1s", ["1", "5"], [None]])
def test_delays_are_numbers(delays: Any) -> None:
    with pytest.raises(TypeError, match="seconds, an int or float, not"):
        MessageRetry(delays=delays)


def test_exponential() -> None:
    assert MessageRetry.exponential(5) == (1, 2, 4, 8)
    assert MessageRetry.exponential(5, first=0.5, factor=10, maximum=60) == (0.5, 5, 50, 60)
    assert MessageRetry(delays=MessageRetry.exponential(7)).attempts == 7
    assert MessageRetry.exponential(1) == ()
    for bad in (
        {"attempts": 0},
        {"first": 0},
        {"factor": 0.5},
        {"factor": math.nan},
        {"maximum": 0.1},
        {"maximum": math.inf},
    ):
        with pytest.raises(ValueError, match="expected"):
            MessageRetry.exponential(**{"attempts": 3, **bad})  # type: ignore[arg-type]


def test_which_errors_are_tried_again() -> None:
    retry = MessageRetry(retry_on=(OSError, ValueError), never=UnicodeError)
    assert [retry.retries(e) for e in (TimeoutError(), ValueError(), UnicodeError(), KeyError())] == [
        True,
        True,
        False,
        False,
    ]
    assert retry.retries(asyncio.CancelledError())  # of something that the handler waited for


def test_plans() -> None:
    plan = MessageRetry(delays=(0.0001, 0, 1.5)).plan(queue(), (4, 3))
    assert plan.delays_ms == (1, 0, 1500)
    assert plan.park_in == "orders.parked"
    assert plan.backend is Backend.LADDER
    assert MessageRetry(dead_letter_to="dlx").plan(queue(exclusive=True), (4, 3)).park_in is None
    assert not MessageRetry().plan(queue(passive=True), (4, 3)).queue.known


@pytest.mark.parametrize(
    ("retry", "kwargs", "text"),
    [
        (MessageRetry(), {"name": ""}, "no name"),
        (MessageRetry(), {"arguments": {"x-queue-type": "stream"}}, "stream"),
        (MessageRetry(), {"exclusive": True}, "temporary"),
        (MessageRetry(), {"auto_delete": True}, "temporary"),
        (MessageRetry(park_in="orders"), {}, "round for ever"),
        (MessageRetry(park_in="orders.retry.5000"), {}, "round for ever"),
    ],
)
def test_queues_that_cannot_be_served(retry: MessageRetry, kwargs: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        retry.plan(queue(**kwargs), (4, 3))
