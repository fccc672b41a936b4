"""What those who iterate have taken, and not come back from: draining waits for that."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from leveret.draining import wait_until
from leveret.message import IncomingMessage

_LOOK = 0.05
"""Seconds between two looks: nobody tells when a message is settled, or a task has ended."""


class InHand:
    """The messages that the users of one iterator work on, by task: several may share it."""

    __slots__ = ("_back", "_taken")

    def __init__(self) -> None:
        self._taken: dict[asyncio.Task[Any] | None, Sequence[IncomingMessage]] = {}
        self._back: asyncio.Future[object] | None = None

    def take(self, messages: Sequence[IncomingMessage]) -> None:
        """The running task works on *messages*, instead of what it had."""
        self._taken[asyncio.current_task()] = messages

    def come_back(self, task: asyncio.Task[Any] | None) -> None:
        """*task* asks for the next, or for none any more."""
        self._taken.pop(task, None)
        self.look_again()

    def look_again(self) -> None:
        """Something may have become of them."""
        if self._back is not None and not self._back.done():
            self._back.set_result(None)

    @property
    def unsettled(self) -> list[IncomingMessage]:
        """Those that may still be settled by a task that goes on."""
        return [
            message
            for task, messages in self._taken.items()
            if task is None or not task.done()
            for message in messages
            if message.is_live and not message.processed
        ]

    @property
    def is_deserted(self) -> bool:
        """Whether nobody is known who would come back."""
        return all(task is not None and task.done() for task in self._taken)

    async def until_next(self, deadline: float) -> None:
        """Wait until somebody comes back, but not long; until *deadline* in event loop time at most."""
        loop = asyncio.get_running_loop()
        self._back = loop.create_future()
        await wait_until([self._back], min(deadline, loop.time() + _LOOK))

    async def until_settled(self, deadline: float) -> None:
        """Wait until there are none; until *deadline* in event loop time at most."""
        loop = asyncio.get_running_loop()
        while self.unsettled and loop.time() < deadline:
            await self.until_next(deadline)
