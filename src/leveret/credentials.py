"""Logins that are asked for when they are needed, and renewed before they expire."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import math
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from leveret.log import get_logger, printable
from leveret.url import ConnectionParameters

_log = get_logger(__name__)

_RENEW_AT = 0.8
"""Part of a login's life after which it is renewed (https://www.rabbitmq.com/docs/oauth2#token-expiration)."""
_PAUSES = (1.0, 60.0)
"""Seconds after a first and between later failures to renew, at most."""


@dataclasses.dataclass(frozen=True, slots=True)
class Credentials:
    """A login.

    Args:
        login: user name; with OAuth 2 anything.
        password: password or token; never in the ``repr``.
        expires_in: seconds until the broker takes it no more; None if it does not expire. It is renewed after 80 % of
            them (``connection.update-secret``).
    """

    login: str
    password: str = dataclasses.field(repr=False)
    expires_in: float | None = None


CredentialsProvider: TypeAlias = Callable[[], Awaitable[Credentials]]
"""Asked for a login before every attempt to connect, and to renew one that expires."""


class Login:
    """The login of one connection.

    Args:
        provider: who is asked; None to take what the URL says.

    Attributes:
        due: when to renew it, in event loop time; ``math.inf`` for never.
        problem: why it could not be renewed; None while all is well.
    """

    def __init__(self, provider: CredentialsProvider | None) -> None:
        if provider is not None and not callable(provider):
            raise TypeError(
                f"credentials must be an async callable that returns Credentials, not {type(provider).__name__}"
            )
        self.due = math.inf
        self.problem: str | None = None
        self._provider = provider
        self._failures = 0

    async def apply(self, parameters: ConnectionParameters) -> ConnectionParameters:
        """*parameters* with the login to use now.

        Raises:
            TimeoutError: the provider took longer than ``connect_timeout``.
            Exception: what the provider raises.
        """
        if self._provider is None:
            return parameters
        credentials = await self._ask(self._provider, parameters.connect_timeout)
        self.problem, self._failures = None, 0
        return parameters._replace(login=credentials.login, password=credentials.password)

    async def renew(self, update_secret: Callable[[str], Awaitable[object]], timeout: float) -> None:
        """Ask for a new secret and pass it to *update_secret*; what goes wrong is retried, and shows in ``problem``."""
        if self._provider is None:
            return
        first, most = _PAUSES
        try:
            credentials = await self._ask(self._provider, timeout)
            await update_secret(credentials.password)
            self.problem, self._failures = None, 0
            self.due = max(self.due, asyncio.get_running_loop().time() + first)
        except Exception as exc:
            self._failures += 1
            self.problem = f"the login could not be renewed: {printable(f'{type(exc).__name__}: {exc}')}"
            _log.warning("%s", self.problem)
            self.due = asyncio.get_running_loop().time() + min(most, first * 2 ** min(self._failures - 1, 10))

    async def _ask(self, provider: CredentialsProvider, timeout: float) -> Credentials:
        async with asyncio.timeout(timeout):
            asked = provider()
            if not inspect.isawaitable(asked):
                raise TypeError(f"credentials must be an async callable that returns Credentials, not {provider!r}")
            credentials = await asked
        if not isinstance(credentials, Credentials):
            raise TypeError(f"the credentials provider must return Credentials, not {type(credentials).__name__}")
        life = credentials.expires_in
        self.due = math.inf if life is None else asyncio.get_running_loop().time() + life * _RENEW_AT
        return credentials
