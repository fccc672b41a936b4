"""Wrong arguments are named, with what would be right."""

from __future__ import annotations

import functools
from unittest import mock

import pytest

from leveret.checks import check_callback, check_count, check_timeout


@pytest.mark.parametrize("wrong", ["5", 5.0, None, True])
def test_a_count_is_an_int(wrong):
    with pytest.raises(TypeError, match=r"concurrency must be an int, not "):
        check_count("concurrency", wrong, 1)


@pytest.mark.parametrize(("wrong", "text"), [(0, "size must be from 1 to 10, not 0"), (11, "not 11")])
def test_a_count_has_a_range(wrong, text):
    with pytest.raises(ValueError, match=text):
        check_count("size", wrong, 1, 10)


def test_a_count_may_have_no_upper_limit():
    check_count("window", 10**12, 1)
    with pytest.raises(ValueError, match="window must be 1 or more, or None for no limit, not 0"):
        check_count("window", 0, 1, hint=", or None for no limit")


class Handler:
    def method(self, message): ...

    def __call__(self, message, *, verbose=False): ...


@pytest.mark.parametrize(
    "good",
    [
        Handler(),
        Handler().method,
        print,
        [].append,
        lambda *args: None,
        lambda message, more=1: None,
        functools.partial(lambda store, message: None, {}),
        mock.Mock(),
        mock.AsyncMock(),
    ],
)
def test_callbacks_that_can_take_a_message(good):
    check_callback(good)


async def pika_style(channel, method, properties, body): ...


@pytest.mark.parametrize("wrong", [pika_style, lambda: None, Handler.method, lambda message, *, key: None])
def test_callbacks_that_cannot_are_told_before_the_first_message(wrong):
    with pytest.raises(TypeError, match=r"called with one argument, the message, but is .*\("):
        check_callback(wrong)


def test_what_is_not_callable_is_no_callback():
    with pytest.raises(TypeError, match="must be callable, not 5"):
        check_callback(5)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", ["5", None, True, [1]])
def test_seconds_are_a_number(wrong):
    with pytest.raises(TypeError, match="timeout must be a number of seconds, not "):
        check_timeout("timeout", wrong)


def test_seconds_may_be_endless_but_not_nan():
    check_timeout("timeout", 5)
    check_timeout("timeout", 0.5)
    check_timeout("timeout", float("inf"))
    with pytest.raises(ValueError, match="not nan"):
        check_timeout("timeout", float("nan"))
