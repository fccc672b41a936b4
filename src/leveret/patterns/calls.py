"""Calls that wait for their replies.

A reply goes straight into the future of its call, and the caller is the only one who waits: no task, no queue.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Coroutine
from typing import Any

from leveret.deadlines import Deadlines
from leveret.exceptions import NoServer, PublishOutcomeUnknown
from leveret.message import IncomingMessage, ReturnedMessage
from leveret.outcome import DONE, fail
from leveret.prompt import Prompt, Wakeups


class Call(Prompt[Any]):
    """The reply to one call.

    Attributes:
        name: what is called, for messages.
        has_message: whether its message was handed over to be sent.
        publish: awaits what becomes of that; None where it is written, and nobody will tell.
    """

    __slots__ = ("has_message", "name", "publish")

    def __init__(self, wakeups: Wakeups | None, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(wakeups, loop=loop)
        self.name = ""
        self.has_message = False
        self.publish: asyncio.Future[Any] | None = None

    def watch(self, publish: Awaitable[object]) -> None:
        """Its message was handed over: fail as *publish* does."""
        self.has_message = True
        if isinstance(publish, Prompt):
            self.publish = publish
            publish.on_end(self._on_published)
        elif publish is not DONE:  # of an Exchange.publish that somebody has wrapped
            self.publish = task = asyncio.ensure_future(publish)
            task.add_done_callback(self._on_published)

    def _on_published(self, publish: asyncio.Future[Any]) -> None:
        if publish.cancelled():
            return
        if (error := publish.exception()) is not None:
            fail(self, error)
        elif isinstance(returned := publish.result(), ReturnedMessage):
            fail(self, no_server(returned))

    def lose(self, error: BaseException | None) -> None:
        """The channel is gone: no reply comes, unless the message is still to be sent."""
        if not self.has_message or self.done() or (self.publish is not None and not self.publish.done()):
            return
        if self.publish is not None and not self.publish.cancelled() and (reason := self.publish.exception()):
            fail(self, reason)  # which knows whether it was sent
            return
        lost = PublishOutcomeUnknown(f"the channel was lost before the reply to {self.name!r} came: {error}")
        lost.__cause__ = error
        fail(self, lost)

    def end(self) -> None:
        """Nobody waits for it any more; if its message still waits to be sent, it is not."""
        if self.publish is not None and not self.publish.done():
            self.publish.cancel()
        if not self.done():
            self.cancel()


class Calls:
    """The calls of one RPC object.

    Attributes:
        futures: the calls that wait, by correlation id.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.futures: dict[str, Call] = {}
        self._loop = loop
        self._deadlines = Deadlines(loop)

    def begin(self, wakeups: Wakeups | None) -> tuple[Call, str]:
        """A new call, and its correlation id, which nobody can guess.

        Args:
            wakeups: those of the connection that brings the replies.
        """
        call, correlation_id = Call(wakeups, self._loop), os.urandom(16).hex()
        self.futures[correlation_id] = call
        return call, correlation_id

    def waiting(self, correlation_id: str | None) -> Call | None:
        """The call of that id, if somebody waits for it."""
        call = self.futures.get(correlation_id or "")
        return None if call is None or call.done() else call

    def result(self, call: Call, deadline: float) -> Coroutine[Any, Any, Any]:
        """What comes of *call*, until *deadline* in event loop time; then a TimeoutError."""
        return self._deadlines.in_time(call, deadline, lambda: TimeoutError(f"no reply to {call.name!r} in time"))

    def lose(self, error: BaseException | None) -> None:
        """The channel is gone."""
        for call in list(self.futures.values()):
            call.lose(error)
        if all(call.done() for call in self.futures.values()):
            self._deadlines.end()

    def close(self) -> None:
        """Nobody listens for replies any more."""
        self._deadlines.end()
        for call in list(self.futures.values()):
            fail(call, PublishOutcomeUnknown(f"the RPC was closed before the reply to {call.name!r} came"))


def no_server(returned: IncomingMessage) -> NoServer:
    """The exception for a call that came back."""
    return NoServer(f"nobody serves {returned.routing_key!r}: the call was returned", returned)
