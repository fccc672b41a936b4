"""Standard input and output that may block, next to an event loop that must not.

A thread waits in their stead. It is a daemon, and works on the file descriptor itself: so it holds up nobody who ends,
neither by being waited for nor by the lock of a buffered stream, over which Python would abort when it exits.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import stat
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from queue import SimpleQueue
from typing import IO

from leveret.cli.terminal import output_failed

if sys.platform == "linux":
    import fcntl
    import termios

_CHUNK = 65536


class OutputClosed(Exception):
    """Whoever read the output reads no more."""


async def _in_thread(work: Callable[[], bytes | None]) -> bytes | None:
    """What *work* returns or raises, from a thread that may be left behind."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[bytes | None] = loop.create_future()

    def end(result: bytes | None, error: BaseException | None) -> None:
        if not future.done():
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except OSError as exc:
            error = exc
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits
            loop.call_soon_threadsafe(end, result, error)

    threading.Thread(target=run, name="leveret pipe", daemon=True).start()
    return await future


async def read_lines(source: IO[bytes]) -> AsyncGenerator[list[bytes]]:
    r"""The lines of *source*, as many as are there at a time, without their ``\n`` or ``\r\n``."""
    fd, rest = source.fileno(), b""
    while chunk := await _in_thread(lambda: os.read(fd, _CHUNK)):
        *lines, rest = (rest + chunk).split(b"\n")
        if lines:
            yield [line.removesuffix(b"\r") for line in lines]
    if rest:
        yield [rest]


async def read_all(source: IO[bytes]) -> bytes:
    """All of *source*."""
    fd, chunks = source.fileno(), list[bytes]()
    while chunk := await _in_thread(lambda: os.read(fd, _CHUNK)):
        chunks.append(chunk)
    return b"".join(chunks)


class Writer:
    """Writes to *target*, without holding up the event loop, whatever the reader does.

    Args:
        target: such as ``sys.stdout``.
    """

    def __init__(self, target: IO[str] | None = None) -> None:
        self._fd = (target or sys.stdout).fileno()
        self._loop = asyncio.get_running_loop()
        self._todo: SimpleQueue[tuple[bytes, asyncio.Future[None]]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    async def write(self, data: bytes) -> None:
        """Returns when all of *data* is written.

        Raises:
            OutputClosed: nobody reads it.
            OSError: it cannot be written, because the disk is full, say.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="leveret output", daemon=True)
            self._thread.start()
        done = self._loop.create_future()
        self._todo.put((data, done))
        try:
            await done
        except BrokenPipeError as exc:
            raise OutputClosed from exc
        except OSError as exc:
            raise output_failed(exc) from exc

    @property
    def is_pipe(self) -> bool:
        """Whether what is written waits for its reader in a pipe, and the system tells how much of it does."""
        return sys.platform.startswith("linux") and stat.S_ISFIFO(os.fstat(self._fd).st_mode)

    def unread(self) -> int:
        """Bytes that are written, and that the reader has not read; 0 where there is no telling."""
        if sys.platform != "linux" or not self.is_pipe:
            return 0
        return int.from_bytes(fcntl.ioctl(self._fd, termios.FIONREAD, bytes(4)), sys.byteorder)

    def _run(self) -> None:
        while True:
            data, done = self._todo.get()
            error: OSError | None = None
            view = memoryview(data)
            try:
                while view:
                    try:
                        view = view[os.write(self._fd, view) :]
                    except BlockingIOError:  # somebody made it so
                        select.select([], [self._fd], [])
            except OSError as exc:
                error = exc
            try:
                self._loop.call_soon_threadsafe(_end, done, error)
            except RuntimeError:
                return  # the loop was closed

    def when_closed(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have *callback* called when the reader goes, where the system tells; returns what ends that."""
        # An error is all that the writing end of a pipe can tell who waits to read from it: the other end is closed.
        if not self.is_pipe:
            return lambda: None
        self._loop.add_reader(self._fd, callback)
        return self._stop_watching

    def _stop_watching(self) -> None:
        self._loop.remove_reader(self._fd)


def _end(done: asyncio.Future[None], error: OSError | None) -> None:
    if not done.done():
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)
