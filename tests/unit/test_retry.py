"""How long the pauses between attempts to connect are, how many there are, and which errors are worth one."""

from __future__ import annotations

import asyncio
import itertools
import math
import socket
import ssl
from typing import Any

import pytest

from leveret import exceptions as e
from leveret.retry import RetryPolicy, is_retryable


def first(count: int, policy: RetryPolicy, random_number: float = 1.0) -> list[float]:
    return list(itertools.islice(policy.pauses(lambda: random_number), count))


# -------------------------------------------------------------------------------------------------------- pauses


def test_the_bound_doubles_up_to_its_maximum_and_stays_there() -> None:
    assert first(5, RetryPolicy(initial=1, maximum=5)) == [1, 2, 4, 5, 5]


def test_by_default_pauses_grow_from_a_tenth_of_a_second_to_thirty() -> None:
    pauses = first(100, RetryPolicy())
    assert pauses[:3] == pytest.approx([0.1, 0.2, 0.4])
    assert pauses == sorted(pauses)
    assert pauses[8] == pytest.approx(25.6)
    assert set(pauses[9:]) == {30.0}


def test_a_multiplier_of_one_makes_equal_pauses() -> None:
    assert first(4, RetryPolicy(initial=3, multiplier=1)) == [3, 3, 3, 3]


def test_an_initial_pause_may_be_the_maximum() -> None:
    assert first(3, RetryPolicy(initial=7, maximum=7)) == [7, 7, 7]


@pytest.mark.parametrize("random_number", [0.0, 0.25, 0.999])
def test_a_random_number_scales_each_pause_between_nothing_and_its_bound(random_number: float) -> None:
    bounds = [1, 2, 4, 5, 5]
    pauses = first(5, RetryPolicy(initial=1, maximum=5), random_number)
    assert pauses == [bound * random_number for bound in bounds]


def test_each_pause_has_a_random_number_of_its_own() -> None:
    numbers = iter([0.5, 0.0, 1.0])
    policy = RetryPolicy(initial=1, max_attempts=4)
    assert list(policy.pauses(lambda: next(numbers))) == [0.5, 0.0, 4.0]


def test_pauses_that_nobody_seeded_differ_and_keep_within_their_bounds() -> None:
    bounds = first(200, RetryPolicy())
    one, another = (list(itertools.islice(RetryPolicy().pauses(), 200)) for _ in range(2))
    assert one != another
    for pauses in (one, another):
        assert all(0 <= pause <= bound for pause, bound in zip(pauses, bounds, strict=True))
        late = pauses[9:]
        assert min(late) < 10  # the full range: not only its upper half
        assert max(late) > 20


def test_without_jitter_no_random_number_is_asked_for() -> None:
    def refuse() -> float:
        raise AssertionError

    assert list(RetryPolicy(initial=1, jitter=False, max_attempts=4).pauses(refuse)) == [1, 2, 4]


@pytest.mark.parametrize("attempts", [1, 2, 10])
def test_between_so_many_attempts_there_is_one_pause_less(attempts: int) -> None:
    assert len(list(RetryPolicy(max_attempts=attempts).pauses())) == attempts - 1


def test_without_max_attempts_pauses_never_end_nor_overflow() -> None:
    assert first(5_000, RetryPolicy())[-1] == 30.0
    assert math.isinf(first(5_000, RetryPolicy(maximum=math.inf, jitter=False))[-1])


def test_every_recovery_begins_with_short_pauses_again() -> None:
    policy = RetryPolicy(initial=1)
    assert first(3, policy) == first(3, policy) == [1, 2, 4]


def test_every_is_the_same_pause_for_ever() -> None:
    policy = RetryPolicy.every(5)
    assert set(first(1_000, policy, random_number=0.0)) == {5}
    assert (policy.max_attempts, policy.max_time) == (None, None)
    assert set(first(1_000, RetryPolicy.every(3_600))) == {3_600}  # the default maximum does not cut it


# ---------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize(
    "numbers",
    [
        {"initial": -0.1},
        {"initial": 31},
        {"initial": 1, "maximum": 0.5},
        {"initial": math.nan},
        {"maximum": math.nan},
        {"multiplier": 0.9},
        {"multiplier": 0},
        {"multiplier": -2},
        {"multiplier": math.nan},
        {"max_attempts": 0},
        {"max_attempts": -1},
        {"max_time": 0},
        {"max_time": -1},
        {"max_time": math.nan},
    ],
    ids=str,
)
def test_a_number_that_makes_no_sense_is_refused_by_name(numbers: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(numbers))):
        RetryPolicy(**numbers)


def test_every_refuses_a_negative_pause() -> None:
    with pytest.raises(ValueError, match="initial"):
        RetryPolicy.every(-1)


@pytest.mark.parametrize(
    "numbers",
    [{"initial": 0}, {"initial": 30}, {"multiplier": 1}, {"max_attempts": 1}, {"max_time": 0.001}],
    ids=str,
)
def test_numbers_at_the_edge_of_sense_are_fine(numbers: dict[str, Any]) -> None:
    policy = RetryPolicy(**numbers)
    assert {name: getattr(policy, name) for name in numbers} == numbers


def test_a_policy_cannot_be_changed_and_is_equal_to_its_like() -> None:
    assert RetryPolicy(initial=1) == RetryPolicy(initial=1) != RetryPolicy()
    with pytest.raises(AttributeError):
        RetryPolicy().initial = 1  # type: ignore[misc]


# --------------------------------------------------------------------------------------------------- is_retryable


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def closed(cls: type[e.ConnectionClosed], code: int) -> e.ConnectionClosed:
    return cls("text", reply_code=code, by_broker=True)


WORTH_ANOTHER_ATTEMPT = [
    closed(e.ConnectionClosed, 320),
    closed(e.ConnectionClosed, 0),
    closed(e.ConnectionFrameError, 501),
    closed(e.ConnectionSyntaxError, 502),
    closed(e.ConnectionCommandInvalid, 503),
    closed(e.ConnectionChannelError, 504),
    closed(e.ConnectionUnexpectedFrame, 505),
    closed(e.ConnectionResourceError, 506),
    closed(e.ConnectionNotImplemented, 540),
    closed(e.ConnectionInternalError, 541),
    e.HeartbeatTimeout("silence"),
    e.AMQPConnectionError("cannot connect"),
    caused(e.AMQPConnectionError("cannot connect"), ConnectionRefusedError(111, "refused")),
    caused(e.AMQPConnectionError("TLS failed"), ssl.SSLError(1, "handshake failure")),
    caused(e.AMQPConnectionError("no such host"), socket.gaierror(-2, "unknown")),
    e.ConnectTimeout("no answer"),
    e.ProbableAuthenticationError("hung up"),
    e.ProtocolError("malformed"),
    ConnectionRefusedError(111, "refused"),
    ConnectionResetError(104, "reset"),
    OSError(113, "no route"),
    socket.gaierror(-3, "try again"),
    TimeoutError(),
    ConnectionError(),
]
FINAL = [
    closed(e.ConnectionClosed, 403),
    closed(e.ConnectionNotAllowed, 530),
    e.AuthenticationError("no common mechanism"),
    e.LoginRefused("403"),
    e.IncompatibleProtocolError("HTTP"),
    e.HandshakeError("no AMQP"),
    caused(e.AMQPConnectionError("TLS failed"), ssl.SSLCertVerificationError(1, "self-signed certificate")),
    caused(e.AMQPConnectionError("no such host"), UnicodeError("label too long")),
    ValueError("a wrong URL"),
    TypeError(),
    RuntimeError(),
    asyncio.CancelledError(),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("error", WORTH_ANOTHER_ATTEMPT, ids=repr)
def test_what_may_pass_by_itself_is_retryable(error: BaseException) -> None:
    assert is_retryable(error) is True


@pytest.mark.parametrize("error", FINAL, ids=repr)
def test_what_somebody_has_to_change_is_not_retryable(error: BaseException) -> None:
    assert is_retryable(error) is False


def test_a_policy_asks_that_function_unless_it_has_another() -> None:
    assert RetryPolicy().retryable is is_retryable

    def never(error: BaseException) -> bool:
        return False

    assert RetryPolicy(retryable=never).retryable(OSError()) is False
