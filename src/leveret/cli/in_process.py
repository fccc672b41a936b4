"""The broker of :mod:`leveret.testing`, for the commands that start one; imported when they do."""

from __future__ import annotations

import importlib
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from leveret.cli.explain import CommandFailed


class LocalBroker(Protocol):
    """What the commands ask of it."""

    @property
    def url(self) -> str:
        """Where it listens."""
        ...

    def drop_connections(self) -> object:
        """Cut every connection, as a network that fails does."""
        ...


def new_broker(**kwargs: Any) -> AbstractAsyncContextManager[LocalBroker]:
    """A broker in this process; *kwargs* are those of ``leveret.testing.Broker``.

    Raises:
        CommandFailed: this leveret has none.
    """
    try:
        testing: Any = importlib.import_module("leveret.testing")
    except ModuleNotFoundError as error:
        raise CommandFailed("this leveret has no broker of its own.", "Use a RabbitMQ, by --url.") from error
    broker: AbstractAsyncContextManager[LocalBroker] = testing.Broker(**kwargs)
    return broker
