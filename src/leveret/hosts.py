"""Which host to try next."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from yarl import URL

from leveret.url import ConnectionParameters, make_urls, parse_url

Resolver: TypeAlias = Callable[[], Awaitable[Sequence[URL | str]]]
"""Asked for the URLs to try, before each round of attempts."""


class Host(NamedTuple):
    """One to try."""

    url: URL
    parameters: ConnectionParameters

    @classmethod
    def at(cls, url: URL) -> Host:
        """The one that *url* names.

        Raises:
            ValueError: the URL is wrong.
        """
        return cls(url, parse_url(url))


class Hosts:
    """The hosts of one cluster, shuffled once, so that not all clients crowd on the first.

    Args:
        hosts: at least one.
        resolver: asked for the URLs of others before each round; None to keep to *hosts*.
        query: parameters to add to those.
    """

    def __init__(
        self, hosts: Sequence[Host], resolver: Resolver | None = None, query: Mapping[str, Any] | None = None
    ) -> None:
        self._query = query or {}
        self._hosts = _shuffled(hosts)
        self._resolver = resolver
        self._given: list[str] | None = None

    async def round(self, timeout: float) -> list[Host]:
        """Each host once, beginning with the one whose turn it is.

        Raises:
            TimeoutError: the resolver took longer than *timeout* seconds.
            ValueError: what it returned are no URLs.
            Exception: what the resolver raises.
        """
        if self._resolver is not None:
            async with asyncio.timeout(timeout):
                given = await self._resolver()
            if (names := sorted(map(str, given))) != self._given:
                self._hosts = _shuffled(map(Host.at, make_urls(given, **self._query)))
                self._given = names
        return list(self._hosts)

    def used(self, host: Host) -> None:
        """*host* was tried: the next round begins behind it."""
        if host in self._hosts:
            place = self._hosts.index(host) + 1
            self._hosts = self._hosts[place:] + self._hosts[:place]

    def change_password(self, password: str) -> None:
        """The password of all of them is another one now."""
        self._hosts = [
            Host(host.url.with_password(password), host.parameters._replace(password=password)) for host in self._hosts
        ]


def _shuffled(hosts: Iterable[Host]) -> list[Host]:
    shuffled = list(hosts)
    random.shuffle(shuffled)
    return shuffled
