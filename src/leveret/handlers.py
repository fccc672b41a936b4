"""The callbacks of one consumer that run: who waits for them, who cancels them, and what became of them."""

from __future__ import annotations

import asyncio
from typing import Any

from leveret.draining import DrainReport, wait_until
from leveret.message import IncomingMessage


class Handlers:
    """Callbacks that run, as tasks.

    Args:
        no_ack: whether their messages need no acknowledgement.
        of_channel: where the channel keeps the tasks of all its consumers.

    Attributes:
        is_due: whether callbacks are about to begin.
        tasks: all that run callbacks.
        of_channel: as above.
        suspended: the tasks whose callbacks have begun, and wait for something, with their messages.
        requeued: messages that come again, since the consumer was stopped.
        abandoned: messages that were cut off, and do not.
    """

    __slots__ = (
        "_cut",
        "_drained",
        "_drains",
        "_entered",
        "_idle",
        "_no_ack",
        "abandoned",
        "is_due",
        "of_channel",
        "requeued",
        "suspended",
        "tasks",
    )

    def __init__(self, no_ack: bool, of_channel: set[asyncio.Task[None]]) -> None:
        self.suspended: dict[asyncio.Task[Any], IncomingMessage] = {}
        self.requeued = self.abandoned = 0
        self.is_due = False
        self._drained = 0
        self._no_ack = no_ack
        self.of_channel = of_channel
        self.tasks: set[asyncio.Task[None]] = set()
        self._drains = 0  # how many wait for the callbacks
        self._entered: set[asyncio.Task[Any]] = set()  # those of tasks that do
        self._idle: asyncio.Future[object] | None = None
        self._cut: dict[asyncio.Task[Any], bool] = {}  # cancelled; whether the message comes again

    def add_chore(self, task: asyncio.Task[None]) -> None:
        """*task* runs no callback; the channel ends it all the same."""
        self.of_channel.add(task)
        task.add_done_callback(self.of_channel.discard)

    def remove(self, task: asyncio.Task[Any]) -> None:
        """*task* runs callbacks no more."""
        self.tasks.discard(task)
        self.of_channel.discard(task)
        if self._drains:
            self._entered.discard(task)
            self.tell_idle()

    def on_end(self, task: asyncio.Task[Any], message: IncomingMessage, has_ended: bool) -> None:
        """A callback has ended, or was cancelled, while the consumer stops."""
        comes_again = self._cut.pop(task, not self._no_ack)
        if has_ended:
            self._drained += 1
        elif comes_again:
            if not message.processed and message.is_live:
                _ = message.give_back()
            self.requeued += 1
        else:
            self.abandoned += 1

    def report(self) -> DrainReport:
        """What became of the messages since the consumer was stopped; what still runs is abandoned."""
        return DrainReport(self._drained, self.requeued, self.abandoned + len(self.tasks) - len(self._entered))

    # ------------------------------------------------------------------------------------------------- cancelling

    def cancel_lost(self) -> None:
        """While somebody waits: cancel those whose messages come again, for they are not worth it."""
        for task, message in list(self.suspended.items()):
            if self._drains and not message.processed and not message.is_live:
                self._cancel(task, message)

    def cut_short(self) -> None:
        """Cancel all, but those that wait for the others."""
        for task, message in list(self.suspended.items()):
            self._cancel(task, message)

    def _cancel(self, task: asyncio.Task[Any], message: IncomingMessage) -> None:
        if task not in self._entered and task not in self._cut:
            self._cut[task] = not message.processed
            task.cancel()

    # ---------------------------------------------------------------------------------------------------- waiting

    def enter(self, task: asyncio.Task[Any]) -> None:
        """*task* waits for callbacks: if it is one itself, nobody waits for it, nor cancels it."""
        self._drains += 1
        if task in self.tasks:
            self._entered.add(task)
            self.tell_idle()

    def leave(self, task: asyncio.Task[Any]) -> None:
        """It no longer does."""
        self._drains -= 1
        self._entered.discard(task)

    @property
    def _is_idle(self) -> bool:
        return not self.is_due and len(self.tasks) == len(self._entered)

    def tell_idle(self) -> None:
        """Those who wait until none runs are to look."""
        if self._idle is not None and self._is_idle and not self._idle.done():
            self._idle.set_result(None)

    async def until_idle(self, deadline: float) -> None:
        """Wait until none runs but those that wait for the same; until *deadline* at most."""
        while not self._is_idle:
            if self._idle is None or self._idle.done():
                self._idle = asyncio.get_running_loop().create_future()
            await wait_until([self._idle], deadline)
            if not self._idle.done():
                return
