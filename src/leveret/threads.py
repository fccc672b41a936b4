"""Callbacks that block: plain functions, run in threads."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from leveret.message import IncomingMessage


def in_thread(callback: Callable[[IncomingMessage], object]) -> Callable[[IncomingMessage], Awaitable[object]]:
    """Make of *callback* one that runs in the event loop's default executor, in a copy of the context.

    A thread cannot be interrupted. When the task that waits for it is cancelled, a call that has not begun never
    does; one that has goes on to its end, and what it returns or raises is dropped.

    Raises:
        TypeError: *callback* is a coroutine function.
    """
    if _is_async(callback):
        raise TypeError(f"thread=True is for plain functions, and {callback!r} is a coroutine function")

    async def run(message: IncomingMessage) -> object:
        context = contextvars.copy_context()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, lambda: context.run(_call, callback, message))

    return run


def _call(callback: Callable[[IncomingMessage], object], message: IncomingMessage) -> object:
    try:
        result = callback(message)
    except StopIteration as exc:  # which no future can carry
        raise RuntimeError("the callback raised StopIteration") from exc
    if inspect.isawaitable(result):
        if inspect.iscoroutine(result):
            result.close()
        raise TypeError(f"thread=True is for plain functions, and {callback!r} returned an awaitable")
    return result


def _is_async(callback: Any) -> bool:
    while isinstance(callback, functools.partial):
        callback = callback.func
    return inspect.iscoroutinefunction(callback) or inspect.iscoroutinefunction(getattr(callback, "__call__", None))  # noqa: B004
