"""Callbacks that fail: counted, logged once, and answered as the user wants it."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Literal, TypeAlias

from leveret.exceptions import DeliveryLost
from leveret.log import get_logger
from leveret.message import IncomingMessage
from leveret.settling import Reject, Requeue, Verdict, settle

_log = get_logger("leveret.consumer")  # one name for all that is about callbacks

OnError: TypeAlias = (
    Literal["leave", "reject", "requeue"]
    | Callable[[IncomingMessage, BaseException], Awaitable[object] | Verdict | None]
)
"""What to do with a message whose callback failed."""

FailureHandler: TypeAlias = Callable[[IncomingMessage, BaseException], Awaitable[object]]
"""Called, and awaited, when a callback has failed; a :class:`~leveret.Verdict` that it returns is carried out."""

_PATIENCE = 10.0
"""Seconds after which messages that fill the prefetch, and that callbacks returned without settling, are told."""

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


def is_being_cancelled() -> bool:
    """Whether somebody cancels the running task; if not, a CancelledError is of something that it waited for."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def is_failure(error: BaseException) -> bool:
    """Whether a callback that raised *error* has failed: not if it was cut off, or its message is lost."""
    if isinstance(error, asyncio.CancelledError):
        return not is_being_cancelled()
    return isinstance(error, Exception) and not isinstance(error, DeliveryLost)


class Failures:
    """The failures of one consumer.

    Messages that a callback left unacknowledged count against the prefetch: when they fill it, the broker sends nothing
    more. That is said once, and for as long as it lasts in ``connection.health()``. A callback that has not failed may
    have left its message to somebody who acknowledges it later, so that gets some time.

    Args:
        prefetch: the consumer's; 0 for no limit.
        is_settled: whether a delivery tag of the present wire is settled.
        describe: tells what the log calls the consumer.

    Attributes:
        count: how many callbacks failed.
    """

    __slots__ = ("_describe", "_has_warned", "_is_settled", "_left", "_prefetch", "_second_look", "count")

    def __init__(self, prefetch: int, is_settled: Callable[[int], bool], describe: Callable[[], str]) -> None:
        self.count = 0
        self._prefetch = prefetch
        self._is_settled = is_settled
        self._describe = describe
        self._left: dict[int, IncomingMessage] = {}  # by delivery tag
        self._has_warned = False
        self._second_look: asyncio.TimerHandle | None = None

    def report(self, message: IncomingMessage, error: BaseException, fate: str) -> None:
        """The callback failed on *message*, whose *fate* that is if unsettled."""
        if isinstance(error, DeliveryLost):
            _log.warning("%s: %s", self._describe(), error)
            return
        self.count += 1
        _log.log(
            logging.ERROR if isinstance(error, Exception) else logging.WARNING,  # cancelled
            "the callback of %s failed on delivery %d (message_id %r, routing key %r, %s): %r",
            self._describe(),
            message.delivery_tag,
            message.message_id,
            message.routing_key,
            "settled" if message.processed else fate,
            error,
            exc_info=error,
        )

    def left(self, message: IncomingMessage) -> None:
        """Whoever saw to the failure is done with *message*."""
        if self._keep(message) and self._fill_the_prefetch():
            self._warn()

    def returned(self, message: IncomingMessage) -> None:
        """The callback is done with *message*, and has not failed."""
        if self._keep(message) and not self._has_warned and self._second_look is None and self._fill_the_prefetch():
            self._second_look = asyncio.get_running_loop().call_later(_PATIENCE, self._look_again)

    def _keep(self, message: IncomingMessage) -> bool:
        """Remember *message*, if it counts against the prefetch."""
        counts = bool(self._prefetch) and not message.processed and message.is_live
        if counts:
            self._left[message.delivery_tag] = message
        return counts

    def _look_again(self) -> None:
        self._second_look = None
        if self._fill_the_prefetch():
            self._warn()

    def _warn(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            _log.warning("%s", self._complaint())

    def forget(self) -> None:
        """What was left comes again: the wire is another one, or the broker has taken it back."""
        self._left.clear()
        self._has_warned = False
        if self._second_look is not None:
            self._second_look.cancel()
            self._second_look = None

    def _fill_the_prefetch(self) -> bool:
        if len(self._left) >= self._prefetch:
            self._left = {
                tag: message
                for tag, message in self._left.items()
                if not message.processed and message.is_live and not self._is_settled(tag)
            }
        return 0 < self._prefetch <= len(self._left)

    def _complaint(self) -> str:
        what = f"its callbacks left {len(self._left)} messages unacknowledged, which fill its prefetch"
        return f"{self._describe()} gets nothing more: {what}"

    def complaint(self) -> str | None:
        """What is wrong, and was told; or None."""
        if not self._has_warned or not self._fill_the_prefetch():
            return None
        return self._complaint()

    def guard(
        self,
        callback: Callable[[IncomingMessage], object],
        handler: FailureHandler,
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
                if is_being_cancelled():
                    raise
                error = exc
            if logs:
                self.report(message, error, "on_error decides")
            else:
                self.count += is_failure(error)
            return None if isinstance(error, DeliveryLost) else await self._see_to(message, error, handler)

        return guarded

    async def _see_to(self, message: IncomingMessage, error: BaseException, handler: FailureHandler) -> object:
        """Have *handler* say what becomes of *message*; gives what it said that cannot be done, as it is settled."""
        try:
            answer = await handler(message, error)
            if message.processed:
                return answer
            if isinstance(answer, Verdict) and message.is_live:
                _ = settle(message, answer)
        except (Exception, asyncio.CancelledError) as exc:
            if isinstance(exc, asyncio.CancelledError) and is_being_cancelled():
                raise
            _log.exception("on_error of %s failed on delivery %d", self._describe(), message.delivery_tag)
        self.left(message)
        return None
