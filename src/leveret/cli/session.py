"""What commands that talk to a broker have in common."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Generator
from typing import Any

import leveret
from leveret.cli.ending import ending
from leveret.exceptions import ChannelNotFoundEntity


async def connect(url: str, command: str) -> leveret.RobustConnection:
    """A connection that comes back, and that the management UI shows as ``leveret publish``, say."""
    named = re.search(r"[?&](connection_)?name=", url)
    connection = await leveret.connect_robust(
        url, client_properties=None if named else {"connection_name": f"leveret {command}"}
    )
    ending().add(connection)
    return connection


async def get_queue(channel: leveret.Channel, name: str, *, declare: bool, **kwargs: Any) -> leveret.Queue:
    """The queue *name*; one that is missing is declared as a durable one if *declare* says so, with *kwargs*.

    Raises:
        ChannelNotFoundEntity: it is missing, and stays so.
    """
    with _quiet(), contextlib.suppress(*(ChannelNotFoundEntity,) if declare else ()):
        return await channel.get_queue(name)
    return await channel.declare_queue(name, durable=True, **kwargs)


async def get_exchange(channel: leveret.Channel, name: str) -> leveret.Exchange:
    """The exchange *name*; "" is the default one.

    Raises:
        ChannelNotFoundEntity: it is missing.
    """
    with _quiet():
        return await channel.get_exchange(name) if name else channel.default_exchange


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """The broker answers a question for what is missing by closing the channel: that is not worth a warning."""
    logger = logging.getLogger("leveret.channel")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
