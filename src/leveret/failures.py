"""Callbacks that fail: counted, logged once, and answered as the user wants it."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Literal, TypeAlias

from leveret.exceptions import DeliveryLost
from leveret.log import get_logger, printable
from leveret.message import IncomingMessage
from leveret.settling import Reject, Requeue, Verdict

_log = get_logger("leveret.consumer")  # one name for all that is about callbacks

OnError: TypeAlias = (
    Literal["leave", "reject", "requeue"]
    | Callable[[IncomingMessage, BaseException], Awaitable[object] | Verdict | None]
)
"""What to do with a message whose callback failed."""

FailureHandler: TypeAlias = Callable[[IncomingMessage, BaseException], Awaitable[object]]
"""Called, and awaited, when a callback has failed; a :class:`~leveret.Verdict` that it returns is carried out."""

_VERDICTS = {"reject": Reject, "requeue": Requeue}


def failure_handler(on_error: OnError) -> FailureHandler | None:
    """What *on_error* stands for; None where there is nothing to do.

    Raises:
        ValueError: it is none of the choices.
    """
    if on_error == "leave":
        return None
    if callable(on_error):
        given = on_error

        async def call(message: IncomingMessage, error: BaseException) -> object:
            result = given(message, error)
            return await result if inspect.isawaitable(result) else result

        return call
    if on_error not in _VERDICTS:
        raise ValueError(f"on_error must be leave, reject, requeue or a callable, not {on_error!r}")
    verdict = _VERDICTS[on_error]

    async def settle(message: IncomingMessage, error: BaseException) -> object:
        return None if message.processed else verdict

    return settle


class Failures:
    """The failures of one consumer.

    Messages that a failed callback left unacknowledged count against the prefetch: when they fill it, the broker
    sends nothing more. That is said once, and for as long as it lasts in ``connection.health()``.

    Args:
        prefetch: the consumer's; 0 for no limit.
        is_settled: whether a delivery tag of the present wire is settled.

    Attributes:
        count: how many callbacks failed.
    """

    __slots__ = ("_has_warned", "_is_settled", "_left", "_prefetch", "count")

    def __init__(self, prefetch: int, is_settled: Callable[[int], bool]) -> None:
        self.count = 0
        self._prefetch = prefetch
        self._is_settled = is_settled
        self._left: list[IncomingMessage] = []
        self._has_warned = False

    def report(self, tag: bytes, message: IncomingMessage, error: BaseException, fate: str) -> None:
        """The callback of the consumer that is called *tag* failed on *message*, whose *fate* that is if unsettled."""
        if isinstance(error, DeliveryLost):
            _log.warning("consumer %r: %s", tag, error)
            return
        self.count += 1
        _log.log(
            logging.ERROR if isinstance(error, Exception) else logging.WARNING,  # cancelled
            "the callback of consumer %r failed on delivery %d (message_id %r, routing key %r, %s): %r",
            tag,
            message.delivery_tag,
            message.message_id,
            message.routing_key,
            "settled" if message.processed else fate,
            error,
            exc_info=error,
        )

    def left(self, tag: bytes, message: IncomingMessage) -> None:
        """Whoever saw to the failure is done with *message*."""
        if message.processed or not message.is_live or not self._prefetch:
            return
        self._left.append(message)
        if self._fill_the_prefetch() and not self._has_warned:
            self._has_warned = True
            _log.warning("consumer %r gets nothing more: %s", tag, self._description())

    def forget(self) -> None:
        """What was left comes again: the wire is another one, or the broker has taken it back."""
        self._left.clear()
        self._has_warned = False

    def _fill_the_prefetch(self) -> bool:
        if len(self._left) >= self._prefetch:
            self._left = [
                message
                for message in self._left
                if not message.processed and message.is_live and not self._is_settled(message.delivery_tag)
            ]
        return 0 < self._prefetch <= len(self._left)

    def _description(self) -> str:
        return f"{len(self._left)} messages whose callbacks failed are unacknowledged, and fill its prefetch"

    def complaint(self, tag: bytes) -> str | None:
        """What is wrong, or None."""
        if not self._fill_the_prefetch():
            return None
        return printable(f"consumer {tag.decode('utf-8', 'replace')!r} gets nothing more: {self._description()}")

    def guard(
        self,
        callback: Callable[[IncomingMessage], object],
        handler: FailureHandler,
        tag: Callable[[], bytes],
        *,
        logs: bool = True,
    ) -> Callable[[IncomingMessage], Awaitable[object]]:
        """Make of *callback* one that never fails: *handler* sees to it, and, unless this *logs* failures, tells."""

        async def guarded(message: IncomingMessage) -> object:
            try:
                result = callback(message)
                return await result if inspect.isawaitable(result) else result
            except Exception as exc:
                error: BaseException = exc
            except asyncio.CancelledError as exc:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                error = exc  # of something that it waited for: nobody cancelled this task
            if logs:
                self.report(tag(), message, error, "on_error decides")
            else:
                self.count += not isinstance(error, DeliveryLost)
            if isinstance(error, DeliveryLost):
                return None  # it comes again
            try:
                answer = await handler(message, error)
            except Exception:
                _log.exception("on_error of consumer %r failed on delivery %d", tag(), message.delivery_tag)
                answer = None
            if not isinstance(answer, Verdict):
                self.left(tag(), message)
            return answer

        return guarded
