"""``broker``: a broker in this process, for trying out."""

from __future__ import annotations

import argparse
import asyncio
import errno

from leveret.cli.explain import CommandFailed
from leveret.cli.options import Parser, Subcommands, add_command, epilog, whole
from leveret.cli.terminal import tell

_EPILOG = epilog(
    ("in one terminal", "broker"),
    ("in others", "consume --queue hello --declare"),
    ("", "publish --queue hello 'Hello, hare!'"),
    notes="""
It listens on this machine only (127.0.0.1), forgets all when it ends, and is no RabbitMQ: it has no disk, no cluster,
no management. For the real one see https://www.rabbitmq.com/docs/download""",
)


def add(commands: Subcommands) -> None:
    """Add the command to the parser."""
    parser = add_command(commands, "broker", "run a broker for trying out and tests, in memory", run, epilog=_EPILOG)
    parser.add_argument(
        "--port", metavar="N", type=whole(0, 65535), default=5672, help="5672 by default; 0 for a free one"
    )
    parser.add_argument(
        "--version", metavar="X.Y", default="4.0", help="behave as this release of RabbitMQ; 4.0 by default"
    )


async def run(args: argparse.Namespace) -> int:
    """Run it until Ctrl-C."""
    from leveret.testing import Broker  # not for the other commands

    try:
        serving = Broker(port=args.port, version=args.version)
    except ValueError as error:
        parser: Parser = args.parser
        parser.error(f"argument --version: {error}")
    try:
        async with serving as broker:
            tell(f"listening at {broker.url}")
            tell("for trying out and tests: it keeps nothing on disk. Ctrl-C ends it.")
            await asyncio.get_running_loop().create_future()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        text = f"port {args.port} is in use, by a RabbitMQ perhaps."
        raise CommandFailed(text, "Try --port 0, which takes any that is free.") from error
    return 0
