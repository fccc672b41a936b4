"""Which call a reply belongs to.

The broker answers the methods of a channel in their order, with two exceptions: it leaves ``basic.consume`` and
``basic.cancel`` to the queue, so that replies to later calls overtake theirs (observed on RabbitMQ 3.10 to 4.3).
Those two are found by the consumer tag that they name.

A call that nobody waits for any more keeps its place: its late reply is swallowed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NamedTuple

from pamqp.base import Frame
from pamqp.commands import Basic

from leveret.wire.methods import is_reply


class Pending(NamedTuple):
    """A call that waits for its reply; *on_late* undoes what a reply did that nobody waits for any more."""

    method: Frame
    reply: asyncio.Future[Any]
    on_reply: Callable[[Frame], None] | None = None
    on_late: Callable[[Any], None] | None = None

    def settle(self, result: Any) -> None:
        """Hand *result* to the caller, or undo it if the caller has gone."""
        if not self.reply.done():
            self.reply.set_result(result)
        elif self.on_late is not None:
            self.on_late(result)


class Replies:
    """The calls of one channel that wait for their replies."""

    __slots__ = ("_in_order", "_of_consumers")

    def __init__(self) -> None:
        self._in_order: list[Pending] = []  # no deques: see WireChannel
        self._of_consumers: list[Pending] = []

    def add(self, pending: Pending) -> None:
        """A call was sent."""
        if isinstance(pending.method, Basic.Consume | Basic.Cancel):
            self._of_consumers.append(pending)
        else:
            self._in_order.append(pending)

    def take(self, reply: Frame) -> Pending | None:
        """The call that *reply* answers; None if there is none."""
        if isinstance(reply, Basic.ConsumeOk | Basic.CancelOk):
            for index, pending in enumerate(self._of_consumers):
                method = pending.method
                if is_reply(type(method), reply) and getattr(method, "consumer_tag", None) == reply.consumer_tag:
                    del self._of_consumers[index]
                    return pending
            return None
        if self._in_order and is_reply(type(self._in_order[0].method), reply):
            return self._in_order.pop(0)
        return None

    @property
    def awaits_message(self) -> bool:
        """Whether ``basic.get-ok`` may come now."""
        return bool(self._in_order) and isinstance(self._in_order[0].method, Basic.Get)

    def take_get(self) -> Pending:
        """The ``basic.get`` that a message answers."""
        return self._in_order.pop(0)

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits for one."""
        return any(not pending.reply.done() for pending in (*self._in_order, *self._of_consumers))

    def take_all(self) -> list[Pending]:
        """Every call; the channel is gone."""
        pending = [*self._in_order, *self._of_consumers]
        self._in_order.clear()
        self._of_consumers.clear()
        return pending
