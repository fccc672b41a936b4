"""What several broker tests need beside the fixtures, and the proof that it works."""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING, Any

import pytest

from leveret import Message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from leveret import Channel, Queue

QUICKLY = 10
"""Seconds that something which happens at once may take on a busy machine."""


async def eventually(condition: Callable[[], Any], timeout: float = QUICKLY) -> Any:
    """Wait until *condition*, a function or a coroutine function, gives something true, and return that."""
    async with asyncio.timeout(timeout):
        while True:
            result = condition()
            if inspect.isawaitable(result):
                result = await result
            if result:
                return result
            await asyncio.sleep(0.01)


async def fill(channel: Channel, queue: Queue | str, bodies: Iterable[bytes], **properties: Any) -> None:
    """Publish *bodies* to *queue*, confirmed."""
    publish = channel.default_exchange.publish
    await asyncio.gather(*[publish(Message(body, **properties), str(queue)) for body in bodies])


async def ready(channel: Channel, queue: Queue | str) -> int:
    """How many messages wait in *queue*, those out for acknowledgement not counted."""
    found = await channel.declare_queue(str(queue), passive=True)
    return found.declaration_result.message_count or 0


async def holds(channel: Channel, queue: Queue | str, count: int) -> None:
    """Wait until *count* messages wait in *queue*: what a channel was told reaches its queue a moment later."""

    async def is_so() -> bool:
        return await ready(channel, queue) == count

    await eventually(is_so)


async def consumers(channel: Channel, queue: Queue | str) -> int:
    """How many consumers *queue* has."""
    found = await channel.declare_queue(str(queue), passive=True)
    return found.declaration_result.consumer_count or 0


async def drain(queue: Queue) -> list[bytes]:
    """Take everything that waits in *queue*."""
    bodies = []
    while (message := await queue.get(no_ack=True, fail=False)) is not None:
        bodies.append(message.body)
    return bodies


def everything_said(error: BaseException) -> str:
    """All text of *error* and of whatever it is chained to."""
    texts: list[str] = []
    link: BaseException | None = error
    while link is not None:
        texts += [str(link), repr(link), repr(vars(link))]
        link = link.__cause__ or link.__context__
    return "\n".join(texts)


async def test_eventually_is_bounded() -> None:
    assert await eventually(lambda: 5) == 5
    with pytest.raises(TimeoutError):
        await eventually(lambda: False, timeout=0.02)
