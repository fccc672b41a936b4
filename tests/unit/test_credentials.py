"""Logins that are asked for: before every attempt, again before they expire, and never shown."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable

import pytest

from leveret.credentials import Credentials, Login
from leveret.url import ConnectionParameters, parse_url

PARAMETERS = parse_url("amqp://url-user:url-password@host/?connect_timeout=1")


def provider(*answers: Credentials | Exception) -> Callable[[], Awaitable[Credentials]]:
    """Gives one answer after another, and the last for ever."""
    left = list(answers)

    async def ask() -> Credentials:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return ask


def now() -> float:
    return asyncio.get_running_loop().time()


class Broker:
    """Takes new secrets, or does not."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.secrets: list[str] = []

    async def update_secret(self, secret: str) -> object:
        self.secrets.append(secret)
        if self.error is not None:
            raise self.error
        return None


def test_credentials_do_not_show_their_password() -> None:
    assert "hush" not in repr(Credentials("me", "hush", expires_in=3))
    assert "me" in repr(Credentials("me", "hush"))


async def test_without_a_provider_the_url_counts_and_nothing_expires() -> None:
    login, broker = Login(None), Broker()
    assert await login.apply(PARAMETERS) is PARAMETERS
    await login.renew(broker.update_secret, 1)
    assert login.due == math.inf
    assert login.problem is None
    assert not broker.secrets


async def test_the_provider_is_asked_for_every_attempt_and_changes_the_login_alone() -> None:
    login = Login(provider(Credentials("a", "1"), Credentials("b", "2")))
    first, second = await login.apply(PARAMETERS), await login.apply(PARAMETERS)
    assert [(p.login, p.password) for p in (first, second)] == [("a", "1"), ("b", "2")]
    assert isinstance(first, ConnectionParameters)
    assert (first.host, first.connect_timeout) == (PARAMETERS.host, 1)
    assert PARAMETERS.password == "url-password"
    assert login.due == math.inf


async def test_a_login_that_expires_is_due_after_four_fifths_of_its_life() -> None:
    login = Login(provider(Credentials("a", "1", expires_in=100), Credentials("a", "2")))
    await login.apply(PARAMETERS)
    assert login.due - now() == pytest.approx(80, abs=1)
    broker = Broker()
    await login.renew(broker.update_secret, 1)
    assert broker.secrets == ["2"]
    assert login.due == math.inf


async def test_a_provider_that_hangs_runs_out_of_time() -> None:
    async def hang() -> Credentials:
        await asyncio.Event().wait()
        raise AssertionError

    login = Login(hang)
    with pytest.raises(TimeoutError):
        await login.apply(parse_url("amqp://host/?connect_timeout=0.01"))
    await login.renew(Broker().update_secret, 0.01)
    assert login.problem is not None
    assert "TimeoutError" in login.problem


async def test_what_a_provider_raises_fails_the_attempt() -> None:
    with pytest.raises(LookupError):
        await Login(provider(LookupError("vault is sealed"))).apply(PARAMETERS)


async def test_a_provider_that_returns_something_else_is_told_so() -> None:
    async def wrong() -> Credentials:
        return ("me", "hush")  # type: ignore[return-value]

    with pytest.raises(TypeError, match="tuple") as caught:
        await Login(wrong).apply(PARAMETERS)
    assert "hush" not in str(caught.value)


async def test_a_failure_to_ask_again_is_a_problem_that_is_retried_ever_later_and_ends() -> None:
    failing: list[Credentials | Exception] = [LookupError("vault is sealed")] * 9
    login = Login(provider(Credentials("a", "1", expires_in=10), *failing, Credentials("a", "2")))
    await login.apply(PARAMETERS)
    pauses = []
    for _ in failing:
        await login.renew(Broker().update_secret, 1)
        pauses.append(login.due - now())
        assert login.problem is not None
        assert "vault is sealed" in login.problem
    assert pauses == pytest.approx([1, 2, 4, 8, 16, 32, 60, 60, 60], abs=0.5)
    broker = Broker()
    await login.renew(broker.update_secret, 1)
    assert login.problem is None
    assert broker.secrets == ["2"]


async def test_a_secret_that_the_broker_does_not_take_is_a_problem() -> None:
    login = Login(provider(Credentials("a", "hush", expires_in=10)))
    await login.renew(Broker(TimeoutError("no answer")).update_secret, 1)
    assert login.problem is not None
    assert "no answer" in login.problem
    assert "hush" not in login.problem
    assert login.due - now() == pytest.approx(1, abs=0.5)


async def test_secrets_that_the_broker_does_not_take_are_given_ever_later() -> None:
    login = Login(provider(Credentials("a", "1", expires_in=10)))
    pauses = []
    for _ in range(4):
        await login.renew(Broker(TimeoutError("no answer")).update_secret, 1)
        pauses.append(login.due - now())
    assert pauses == pytest.approx([1, 2, 4, 8], abs=0.5)


@pytest.mark.parametrize("expires_in", [0.0, -5.0])
async def test_an_expired_login_is_not_asked_for_without_pause(expires_in: float) -> None:
    login = Login(provider(Credentials("a", "1", expires_in=expires_in)))
    await login.renew(Broker().update_secret, 1)
    assert login.due > now() + 0.1
