"""Fetching several messages: ``basic.get``, with more than one on its way at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from pamqp.commands import Basic

from leveret.log import get_logger

if TYPE_CHECKING:
    from leveret.wire.channel import Fetched, WireChannel

_log = get_logger(__name__)

_AHEAD = 64
"""How many are on their way at a time. Where the queue is empty sooner, the rest of them is for nothing."""


async def fetch_many(wire: WireChannel, queue: str, count: int, no_ack: bool, timeout: float) -> list[Fetched]:
    """Up to *count* messages, until the queue is empty.

    When time is up or the channel is lost, what has come is returned, as far as it can still be used; what comes
    after the caller has gone is requeued.

    Args:
        wire: the channel.
        queue: its name.
        count: how many at most; never more are taken out of the queue.
        no_ack: the broker forgets each message as it sends it.
        timeout: seconds for all; ``math.inf`` for none.

    Raises:
        ChannelInvalidStateError: the channel is not open.
        ChannelClosed, ConnectionClosed: it was lost, and with it what had come.
        TimeoutError: nothing came in time.
    """
    fetched: list[Fetched] = []
    asked: deque[asyncio.Future[Fetched | Basic.GetEmpty]] = deque()
    left = count
    try:
        async with asyncio.timeout(timeout):
            while True:
                while left and len(asked) < _AHEAD:
                    asked.append(wire.ask_for(queue, no_ack))
                    left -= 1
                if not asked:
                    return fetched
                result = await asked[0]
                asked.popleft()
                if isinstance(result, Basic.GetEmpty):
                    left = 0
                else:
                    fetched.append(result)
    except BaseException as exc:
        for reply in asked:
            if not reply.cancel() and not reply.cancelled() and reply.exception() is None:
                result = reply.result()  # it came just before the caller went
                fetched += [] if isinstance(result, Basic.GetEmpty) else [result]
        if isinstance(exc, Exception) and fetched and (no_ack or wire.is_open):
            return fetched
        if fetched and no_ack:
            _log.warning("%r: %d messages are gone: nobody waits for them any more (no_ack)", wire, len(fetched))
        elif not no_ack:
            for each in fetched:
                wire.give_back(each)
        if isinstance(exc, TimeoutError):
            hint = wire.transport.blocked_hint()
            raise TimeoutError(f"Basic.Get got no answer within {timeout:g} s{hint}") from None
        raise
