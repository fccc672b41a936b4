"""Bytes on their way to the socket.

What one turn of the event loop writes goes out in one piece; but whoever writes first after something was read is most
likely to have waited for it, and to wait for the answer: that goes out at once. Only publishes ever wait, and only
while somebody holds them: the socket's buffer is full, the broker blocks publishers, or it stopped a channel's flow.
Acks, calls and heartbeats always go out.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from leveret.outcome import DONE, Outcome

T = TypeVar("T")

_FLUSH_AT = 65_536


class Output:
    """The writing half of one connection.

    Args:
        timeout: seconds that waiting for the socket may take.

    Attributes:
        is_held: whether publishes must wait; see :meth:`when_released`.
        has_written: set whenever something was sent; the heartbeat clears it.
        may_send_at_once: set by who reads.
    """

    __slots__ = (
        "_before_flush",
        "_drained",
        "_flush_due",
        "_held",
        "_holders",
        "_loop",
        "_parts",
        "_paused",
        "_size",
        "_socket",
        "_timeout",
        "has_written",
        "is_held",
        "may_send_at_once",
    )

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self.is_held = False
        self.has_written = False
        self.may_send_at_once = True
        self._loop = asyncio.get_running_loop()
        self._socket: asyncio.WriteTransport | None = None
        self._parts: list[bytes] = []
        self._size = 0
        self._flush_due = False
        self._before_flush: list[Callable[[], None]] = []
        self._paused = False
        self._drained: list[Outcome[None]] = []
        self._holders: set[object] = set()
        self._held: OrderedDict[object, Callable[[], None]] = OrderedDict()

    def open(self, socket: asyncio.WriteTransport) -> None:
        """Send to *socket* from now on."""
        self._socket = socket

    def close(self) -> None:
        """Drop what was not sent, and write no more; those who wait for the socket go on."""
        self._socket = None
        self._parts.clear()
        self._before_flush.clear()
        self._held.clear()
        self._holders.clear()
        self._resume_waiters()

    def write(self, data: bytes) -> None:
        """Send *data* with whatever else this turn of the event loop writes, or at once."""
        if self.may_send_at_once and not self._flush_due and self._socket is not None:
            self.may_send_at_once = False
            self.has_written = True
            self._socket.write(data)
            return
        self._parts.append(data)
        self._size += len(data)
        if self._size >= _FLUSH_AT:
            self.flush()
        elif not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush_turn)

    def before_flush(self, callback: Callable[[], None]) -> None:
        """Call *callback* once at the end of this turn, so that it can write what it has saved up."""
        self._before_flush.append(callback)
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush_turn)

    def together(self, write: Callable[[], T]) -> T:
        """Send in one piece what *write* writes and what it has others save up: at once where :meth:`write` would.

        Raises:
            Exception: whatever *write* raises.
        """
        if self._flush_due:
            return write()
        self._flush_due = True  # so nothing goes out by itself
        try:
            return write()
        finally:
            if self.may_send_at_once:
                self.may_send_at_once = False
                self._flush_turn()
            else:
                self._loop.call_soon(self._flush_turn)

    def _flush_turn(self) -> None:
        try:
            self.flush_all()
        finally:
            self._flush_due = False

    def flush_all(self) -> None:
        """Send what is written, and what others have saved up."""
        callbacks, self._before_flush = self._before_flush, []
        for callback in callbacks:
            callback()
        self.flush()

    def flush(self) -> None:
        """Send what is written."""
        parts, self._parts = self._parts, []
        self._size = 0
        if parts and self._socket is not None:
            self.has_written = True
            self._socket.write(parts[0] if len(parts) == 1 else b"".join(parts))

    # ------------------------------------------------------------------------------------------ back-pressure

    def pause(self) -> None:
        """The socket's buffer is full."""
        self._paused = True
        self.hold("socket")

    def resume(self) -> None:
        """The socket's buffer has emptied."""
        self._resume_waiters()
        self.release("socket")

    def _resume_waiters(self) -> None:
        self._paused = False
        drained, self._drained = self._drained, []
        for waiter in drained:
            if not waiter.done():
                waiter.set_result(None)

    def drain(self) -> Coroutine[Any, Any, None]:
        """Done at once, or when a full socket buffer has emptied, or when that takes too long."""
        if not self._paused:
            return DONE
        waiter: Outcome[None] = Outcome(loop=self._loop)
        self._drained.append(waiter)
        if self._timeout != math.inf:
            timer = self._loop.call_later(self._timeout, self._stop_waiting, waiter)
            waiter.add_done_callback(lambda _: timer.cancel())
        return waiter

    def _stop_waiting(self, waiter: Outcome[None]) -> None:
        # No failure: what it waited behind takes effect as soon as the socket has room again.
        if not waiter.done():
            self._drained.remove(waiter)
            waiter.set_result(None)

    def hold(self, holder: object) -> None:
        """Hold publishes until *holder* (the socket, the broker, a channel) releases them."""
        self._holders.add(holder)
        self.is_held = True

    def release(self, holder: object) -> None:
        """*holder* no longer minds; when nobody does, held publishes go out in their order."""
        self._holders.discard(holder)
        while self._held and not self._holders:
            _, write = self._held.popitem(last=False)
            write()
        self.is_held = bool(self._holders or self._held)

    def when_released(self, publish: object, write: Callable[[], None]) -> None:
        """Call *write* when nobody holds publishes any more, after those that wait already."""
        self._held[publish] = write

    def forget(self, publish: object) -> None:
        """*publish* waits no longer."""
        self._held.pop(publish, None)


class CommitGate:
    """The output of a channel with transactions: keeps back what is written while a commit is under way.

    RabbitMQ closes the connection (504) over any method but ``channel.close`` that reaches a channel which is
    still committing.
    """

    __slots__ = (
        "_committing",
        "_kept",
        "_output",
        "before_flush",
        "drain",
        "forget",
        "hold",
        "release",
        "together",
        "when_released",
    )

    def __init__(self, output: Output) -> None:
        self.before_flush = output.before_flush
        self.drain = output.drain
        self.forget = output.forget
        self.hold = output.hold
        self.release = output.release
        self.together = output.together
        self.when_released = output.when_released
        self._output = output
        self._committing = False
        self._kept: deque[tuple[bytes, bool]] = deque()

    @property
    def is_held(self) -> bool:
        """Whether publishes must wait."""
        return self._output.is_held

    def write(self, data: bytes, is_commit: bool = False) -> None:
        """Send *data* now, or when the commit before it is done."""
        if self._committing:
            self._kept.append((data, is_commit))
        else:
            self._committing = is_commit
            self._output.write(data)

    def on_commit_ok(self) -> None:
        """The commit is done."""
        self._committing = False
        while self._kept and not self._committing:
            self.write(*self._kept.popleft())
