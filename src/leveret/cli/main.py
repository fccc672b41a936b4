"""The parser, and how a command ends: its exit code, and errors in one sentence."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import TextIO, cast

from leveret._version import __version__
from leveret.cli import bench, broker, check, consume, demo, publish
from leveret.cli.ending import Ending
from leveret.cli.explain import CommandFailed, sentence
from leveret.cli.options import FAILED, Parser, epilog, hide_passwords
from leveret.cli.pipes import OutputClosed
from leveret.cli.terminal import LogToStderr, discard, output_failed, say
from leveret.exceptions import AMQPError

_BY_SIGNAL = 128
"""Exit codes of commands that a signal ended begin here, as in a shell."""
_EXPECTED = (AMQPError, OSError, ValueError, CommandFailed)

_EPILOG = epilog(
    ("nothing installed? a broker in this process, a link that is cut, and nothing lost", "demo"),
    ("is everything all right between here and the broker?", "check --url amqp://user:password@host/vhost"),
    ("one message into the queue 'hello', and out again", "publish --queue hello --declare 'Hello, hare!'"),
    ("", "consume --queue hello --count 1"),
    notes="""
All commands that connect take --url, or else the variable AMQP_URL, or else amqp://guest:guest@localhost/.
exit codes: 0 done, 1 failed (stderr says why, and what to do), 2 wrong usage, 130 Ctrl-C, 143 SIGTERM.
`python -m leveret COMMAND --help` has the options and more examples.""",
).replace("\n\n  python -m", "\n  python -m")


def make_parser() -> Parser:
    """The parser of the whole command line."""
    parser = Parser(
        prog="python -m leveret",
        description="Publish, consume, check and measure on RabbitMQ; or try it out where there is none.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"leveret {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="command")
    for command in (publish, consume, check, bench, demo, broker):
        command.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit code: 0 done, 1 failed, 130 interrupted, 143 terminated. Wrong usage is a SystemExit(2).
    """
    if sys.stderr is None:  # pyright: ignore[reportUnnecessaryComparison]  # 2>&-
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:  # pyright: ignore[reportUnnecessaryComparison]  # >&-
        # Before anything is done whose result nobody would see; a socket would get its file descriptor, too.
        say("error: standard output is closed. >/dev/null throws away what is written to it.")
        return FAILED
    try:
        code = _main(make_parser().parse_args(argv))
    except SystemExit:
        error = discard(sys.stdout)  # a help text
        if error is not None and not isinstance(error, BrokenPipeError):
            say(f"error: {output_failed(error)}.")
            raise SystemExit(FAILED) from error
        raise
    finally:
        discard(sys.stdout)
        discard(sys.stderr)
    if code > _BY_SIGNAL:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Python ends: one more would make another exit code
    return code


def _main(args: argparse.Namespace) -> int:
    with Ending() as ending, LogToStderr(debug=args.debug), warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return asyncio.run(_run(args, ending))
        except asyncio.CancelledError:
            if ending.signal is not None:
                return _BY_SIGNAL + ending.signal
            say("error: the broker did not answer any more, so the connections were cut off.")
            return FAILED
        except (OutputClosed, BrokenPipeError):
            return 0  # whoever read our output has enough
        except Exception as error:
            if args.debug:
                print(hide_passwords("".join(traceback.format_exception(error))), end="", file=sys.stderr)
            say(f"error: {sentence(error)}")
            if not isinstance(error, _EXPECTED) and not args.debug:
                say("That should not happen, please report it: --debug shows more.")
            return FAILED


def _first(error: Exception) -> Exception:
    while isinstance(error, ExceptionGroup):
        error = cast("ExceptionGroup[Exception]", error).exceptions[0]
    return error


async def _run(args: argparse.Namespace, ending: Ending) -> int:
    try:
        return await ending.run(lambda: args.run(args))
    except ExceptionGroup as group:  # of a TaskGroup: what ended it
        raise _first(group) from group


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    say(f"warning: {message}")
