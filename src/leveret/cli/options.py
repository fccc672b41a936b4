"""What the commands' arguments mean: text → values, and the options that several commands share. No I/O."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import warnings
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeAlias

from leveret.log import printable
from leveret.types import FieldValue
from leveret.url import make_urls, parse_url

Subcommands: TypeAlias = "argparse._SubParsersAction[Parser]"  # pyright: ignore[reportPrivateUsage]
"""Where commands are added to the parser."""

Command: TypeAlias = Callable[[argparse.Namespace], Awaitable[int]]
"""What runs a command; it returns the exit code."""

DEFAULT_URL = "amqp://guest:guest@localhost/"
FAILED = 1
"""Exit code of a command that did not do what it was asked to; 2, for wrong usage, is argparse's."""
MAX_PREFETCH = 65535
_VARIABLE = "the variable AMQP_URL: "

_PASSWORD = re.compile(r"(\w+://[^\s:/?#@]*:)[^\s]*@")
_SECRET = re.compile(r"([?&][^\s=&#]*(?:passw|passphrase|secret|token|cadata)[^\s=&#]*=)[^\s&#]+", re.IGNORECASE)


def hide_passwords(text: str) -> str:
    """*text* with the passwords of all URLs in it replaced by ``******``."""
    return _SECRET.sub(r"\1******", _PASSWORD.sub(r"\1******@", text))


class _Variable(str):
    """A URL that is not of the command line, but of the environment."""


class Parser(argparse.ArgumentParser):
    """A parser whose complaints show no password, and which keeps the lines of its texts as they are."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Exit 2, saying why; argparse quotes what it does not know, a URL with its password, too."""
        message = message.replace(f"argument --url: {_VARIABLE}", _VARIABLE)
        self.exit(2, f"error: {hide_passwords(message)}\n`{self.prog} --help` tells how it is used.\n")


def add_command(commands: Subcommands, name: str, summary: str, run: Command, *, epilog: str) -> Parser:
    """A parser for the command *name*, with the option that all have."""
    parser = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=epilog)
    parser.set_defaults(run=run, parser=parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks, and log everything on stderr")
    return parser


def add_url(parser: Parser) -> None:
    """``--url``; the default is not shown, because it may hold a password."""
    parser.add_argument(
        "--url",
        type=url,
        default=_Variable(os.environ.get("AMQP_URL") or DEFAULT_URL),
        help="amqp[s]://user:password@host:port/vhost; several hosts with commas between. By default the variable "
        "AMQP_URL, where other users of this machine cannot read it, or else amqp://guest:guest@localhost/",
    )


# -------------------------------------------------------------------------------------------- text → values


def url(text: str) -> str:
    """A URL, or several hosts in one, as :func:`leveret.connect_robust` takes it; here it is checked only."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come when it is used
            for one in make_urls(text):
                parse_url(one)
    except ValueError as error:
        where = _VARIABLE if isinstance(text, _Variable) else ""
        raise argparse.ArgumentTypeError(f"{where}{error}") from None
    return text


def whole(low: int, high: float = math.inf) -> Callable[[str], int]:
    """A whole number from *low* to *high*."""

    def read(text: str) -> int:
        digits = text.replace("_", "").replace(",", "")
        if not re.fullmatch(r"\d{1,15}", digits, re.ASCII) or not low <= int(digits) <= high:
            upper = "" if high == math.inf else f" to {high}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low}{upper or ' on'}")
        return int(digits)

    return read


def seconds(text: str) -> float:
    """A number of seconds over 0."""
    return _positive(text, "a number of seconds over 0, such as 0.5 or 10")


def rate(text: str) -> float:
    """Messages a second, over 0."""
    return _positive(text, "a number of messages a second over 0, such as 100")


def _positive(text: str, expected: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return number


def name_and_value(text: str) -> tuple[str, FieldValue]:
    """``name=value``; a value that is JSON is what JSON says, any other is text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not name=value, such as tries=3 or 'source=\"sensor 7\"'")
    if len(name.encode()) > 255:
        raise argparse.ArgumentTypeError("a header's name is at most 255 bytes long")
    return name, _json_or_text(value)


def _json_or_text(value: str) -> FieldValue:
    try:
        # NaN and Infinity are no JSON, though Python reads them: they stay text.
        decoded: FieldValue = json.loads(value, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):
        return value
    return decoded


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def _finite(text: str) -> float:
    # RabbitMQ ends the connection over an infinity.
    if math.isinf(number := float(text)):
        raise argparse.ArgumentTypeError(f"{text} is more than a number can be; in quotes it is text: '\"{text}\"'")
    return number


def queue_name(text: str) -> str:
    """The name of a queue that there may be: the empty one means something else everywhere."""
    if not text:
        raise argparse.ArgumentTypeError("the name of a queue is not empty")
    return text


def delimiter(text: str) -> bytes:
    r"""What separates bodies: text in which ``\n``, ``\t``, ``\r``, ``\0`` and ``\\`` are escapes."""
    escapes = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\0": "\0", r"\\": "\\"}
    return re.sub(r"\\.", lambda match: escapes.get(match[0], match[0]), text).encode()


# ----------------------------------------------------------------------------------------- texts for people


def name_of(thing: str) -> str:
    """A name as it is shown: quoted, and harmless on a terminal."""
    return f"'{printable(thing)}'"


def counted(number: int, thing: str) -> str:
    """``1 message``, ``2,000 messages``."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def epilog(*examples: tuple[str, str], notes: str = "") -> str:
    """The end of a command's help: what one does with it, and how, and what else there is to know."""
    lines = [(f"\n  # {what}\n" if what else "") + f"  python -m leveret {how}" for what, how in examples]
    return "examples:" + "\n".join(lines) + (f"\n\n{notes.strip()}" if notes else "")
