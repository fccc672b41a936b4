"""What is said to people beside the result: on stderr, and live only where that is a terminal."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import traceback
from types import TracebackType
from typing import TextIO

from leveret.cli.options import hide_passwords

_log = logging.getLogger("leveret")


def say(text: str) -> None:
    """A line on stderr, if that can be written."""
    with contextlib.suppress(OSError):  # there is nowhere to tell it
        Live.clear()
        print(hide_passwords(text), file=sys.stderr, flush=True)


def tell(text: str) -> None:
    """A line on stdout.

    Raises:
        BrokenPipeError: whoever read it reads no more.
        OSError: it cannot be written, because the disk is full, say.
    """
    with contextlib.suppress(OSError):
        Live.clear()
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise output_failed(error) from error


def output_failed(error: OSError) -> OSError:
    """The same in words that name standard output."""
    return OSError(f"standard output cannot be written: {error.strerror}")


def discard(stream: TextIO) -> OSError | None:
    """Let go of what *stream* could not write, and return why: Python would complain about it when it exits."""
    try:
        stream.flush()
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()
        return error
    return None


class Live:
    """One line on stderr that changes in place; where stderr is no terminal, nothing at all."""

    _shown: TextIO | None = None

    def __init__(self) -> None:
        self.is_on = sys.stderr.isatty()

    def show(self, text: str) -> None:
        """Replace the line."""
        if self.is_on:
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"\r\x1b[K{text[:width]}")
            sys.stderr.flush()
            Live._shown = sys.stderr

    @classmethod
    def clear(cls) -> None:
        """Make room for a line that stays."""
        if cls._shown is not None:
            cls._shown.write("\r\x1b[K")
            cls._shown.flush()
            cls._shown = None

    def __enter__(self) -> Live:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.clear()


class LogToStderr(logging.Handler):
    """What leveret logs, as lines for people; with *debug* all of it, with the names of its loggers."""

    def __init__(self, *, debug: bool) -> None:
        super().__init__(logging.DEBUG if debug else logging.WARNING)
        self._debug = debug

    def emit(self, record: logging.LogRecord) -> None:
        """Print it."""
        name = f" {record.name}" if self._debug else ""
        say(f"{record.levelname.lower()}{name}: {record.getMessage()}")
        if self._debug and record.exc_info:
            say("".join(traceback.format_exception(*record.exc_info)).rstrip())

    def __enter__(self) -> LogToStderr:
        self._before = _log.level
        _log.setLevel(self.level)
        _log.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        _log.removeHandler(self)
        _log.setLevel(self._before)
