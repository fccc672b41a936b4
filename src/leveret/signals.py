"""Ending a service when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

from leveret.draining import DrainReport, check_drain, drain_for
from leveret.log import get_logger

if TYPE_CHECKING:
    from leveret.connection import Connection

_log = get_logger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


async def run_until_signalled(*connections: Connection, drain: float = 10, timeout: float = 10) -> DrainReport:
    """Let consumers run until the process gets SIGTERM or SIGINT; then drain and close *connections*.

    ::

        await queue.consume(handle)
        await leveret.run_until_signalled(connection, drain=30)

    It is the end of a program, in the main thread. A second signal closes them at once, without draining.

    Args:
        connections: closed in this order; one that callbacks publish on comes after the one that they consume on.
        drain: seconds that callbacks get to end by themselves.
        timeout: seconds on top of it, for each connection: see :meth:`Connection.close`.

    Returns:
        What became of the work at hand.

    Raises:
        ConnectionClosed: one of *connections* was lost for good before any signal came; the others are closed. One
            that this program closes ends the waiting as a signal does.
        ValueError: no connection, or a negative *drain*.
        RuntimeError: this event loop knows no signals (on Windows, or outside of the main thread).

    Cancellation: the connections are closed without draining.
    """
    if not connections:
        raise ValueError("run_until_signalled() needs a connection")
    check_drain(drain)
    loop = asyncio.get_running_loop()
    first, second = loop.create_future(), loop.create_future()

    def on_signal() -> None:
        for future in (first, second):
            if not future.done():
                future.set_result(None)
                break

    closing: asyncio.Task[DrainReport] | None = None
    try:
        with _handling_signals(loop, on_signal):
            ends = [connection.closed() for connection in connections]
            await asyncio.wait([first, *ends], return_when=asyncio.FIRST_COMPLETED)
            if not first.done():
                for connection in connections:
                    if connection.is_closed and not connection.close_called:
                        await connection.ready()  # raises why
            _log.info("stopping: handlers have %g s to end", drain)
            closing = loop.create_task(_close(connections, drain, timeout), name="leveret drains")
            await asyncio.wait([closing, second], return_when=asyncio.FIRST_COMPLETED)
        if not closing.done():
            for connection in connections:
                await connection.close(timeout=timeout)  # ends the draining, too
        report = await closing
        _log.info("stopped: %s", report)
        return report
    finally:
        if closing is not None and not closing.done():
            closing.cancel()
            await asyncio.wait([closing])
        for connection in connections:
            await connection.close(timeout=timeout)


async def _close(connections: tuple[Connection, ...], drain: float, timeout: float) -> DrainReport:
    consumers = [consumer for connection in connections for consumer in connection.consumers()]

    async def close(seconds: float) -> None:
        for connection in connections:
            await connection.close(timeout=seconds)

    return await drain_for(consumers, close, drain, timeout)


@contextlib.contextmanager
def _handling_signals(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> Generator[None]:
    """Call *callback* for each signal; afterwards they do what they did before."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        for number in _SIGNALS:
            loop.add_signal_handler(number, callback)
    except (NotImplementedError, ValueError, RuntimeError) as exc:
        raise RuntimeError(
            "this event loop handles no signals (on Windows, or outside of the main thread):"
            " await connection.close(drain=…) where your program ends"
        ) from exc
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            if handler is not None:  # else it is not one of Python's
                signal.signal(number, handler)
