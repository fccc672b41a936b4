"""``publish``: a body, a file, or a line of standard input for each message; and what became of them."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import sys
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from time import time
from typing import Any

import leveret
from leveret.cli import session
from leveret.cli.ending import ending
from leveret.cli.explain import CommandFailed, sentence
from leveret.cli.measure import Pace, per_second
from leveret.cli.options import (
    FAILED,
    Subcommands,
    add_command,
    add_url,
    counted,
    epilog,
    name_and_value,
    name_of,
    queue_name,
    rate,
    seconds,
    whole,
)
from leveret.cli.pipes import read_all, read_lines
from leveret.cli.terminal import Live, say, tell
from leveret.exceptions import MessageReturned
from leveret.wire.codec import encode_properties

_TOLD = 10
"""Messages that went wrong which are told one by one."""
_AT_ONCE, _BYTES_AT_ONCE = 10_000, 64 * 1024 * 1024
"""Messages, and bytes of them, for one publish_many(), which keeps every one that fails."""
_LAST_WORDS = 1.0
"""Seconds in which publishing notes that the connection was aborted."""

_EPILOG = epilog(
    (
        "one message into a queue; --declare creates the queue if it is missing",
        "publish --queue hello --declare 'Hello'",
    ),
    (
        "to a topic exchange, with headers (JSON values) and properties",
        "publish --exchange logs --routing-key kern.info \\\n"
        "      -H tries=3 -H 'tags=[\"a\", \"b\"]' --content-type text/plain --persistent 'it works'",
    ),
    ("a file as one message", "publish --queue images --file hare.png --content-type image/png"),
    (
        "each line of a log as a message, as they come; Ctrl-C ends it",
        "publish --exchange logs --routing-key app < app.log",
    ),
    ("1,000 messages, 50 a second", "publish --queue hello --count 1000 --rate 50 x"),
    notes="""
header values: what is JSON is taken as such (3, 1.5, true, null, [1, 2], {"a": 1}); anything else is text.
  Text that looks like JSON goes into quotes: -H 'version="3"'.
exit code: 0 if the broker confirmed every message and returned none, else 1.""",
)


def add(commands: Subcommands) -> None:
    """Add the command to the parser."""
    parser = add_command(commands, "publish", "publish messages, and tell what became of each", run, epilog=_EPILOG)
    body = parser.add_mutually_exclusive_group()
    body.add_argument("body", nargs="?", help="the body, as text; without it and --file, lines of standard input")
    body.add_argument("--file", metavar="PATH", help="a file that is the body of one message; - is standard input")
    where = parser.add_argument_group("where to")
    target = where.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--queue", metavar="NAME", type=queue_name, help="straight into this queue (by the default exchange)"
    )
    target.add_argument("--exchange", metavar="NAME", help="to this exchange")
    where.add_argument("--routing-key", metavar="KEY", help="for --exchange; empty by default")
    where.add_argument("--declare", action="store_true", help="create the queue if it is missing, as a durable one")
    add_url(parser)
    how = parser.add_argument_group("how")
    how.add_argument(
        "--count", metavar="N", type=whole(1), help="publish the body N times, or at most N lines of standard input"
    )
    how.add_argument("--rate", metavar="N", type=rate, help="messages a second, at most")
    how.add_argument("--no-confirm", action="store_true", help="do not have the broker confirm; then nobody knows")
    _add_properties(parser)


def _add_properties(parser: argparse.ArgumentParser) -> None:
    message = parser.add_argument_group("the message")
    message.add_argument(
        "-H",
        "--header",
        metavar="NAME=VALUE",
        type=name_and_value,
        action="append",
        default=[],
        help="a header, any number of times; the value is JSON, or else text",
    )
    message.add_argument("--content-type", metavar="MIME", help="such as application/json")
    message.add_argument("--content-encoding", metavar="NAME", help="such as gzip")
    message.add_argument(
        "--persistent", action="store_true", help="survive a restart of the broker, in a durable queue"
    )
    message.add_argument("--expiration", metavar="SECONDS", type=seconds, help="time to live")
    message.add_argument("--priority", metavar="N", type=whole(0, 255), help="0 to 255, for queues with x-max-priority")
    message.add_argument("--correlation-id", metavar="ID", help="what the reply carries back")
    message.add_argument("--reply-to", metavar="QUEUE", help="where the reply goes")
    message.add_argument("--message-id", metavar="ID", help="of your own")
    message.add_argument("--type", metavar="NAME", help="your name for the kind of message")
    message.add_argument("--app-id", metavar="NAME", help="the application that publishes")
    message.add_argument("--user-id", metavar="NAME", help="the user that is logged in; the broker checks it")
    message.add_argument("--timestamp", action="store_true", help="the time of publishing, as the timestamp")


def make_message(args: argparse.Namespace, body: bytes) -> leveret.Message:
    """The message that the arguments describe."""
    return leveret.Message(
        body,
        headers=dict(args.header) or None,
        content_type=args.content_type,
        content_encoding=args.content_encoding,
        delivery_mode=leveret.DeliveryMode.PERSISTENT if args.persistent else None,
        expiration=args.expiration,
        priority=args.priority,
        correlation_id=args.correlation_id,
        reply_to=args.reply_to,
        message_id=args.message_id,
        type=args.type,
        app_id=args.app_id,
        user_id=args.user_id,
        timestamp=time() if args.timestamp else None,
    )


async def run(args: argparse.Namespace) -> int:
    """Publish; the exit code tells whether all was confirmed and none came back."""
    if args.routing_key is not None and args.queue is not None:
        args.parser.error("--routing-key goes with --exchange: --queue is the routing key of the default exchange")
    if args.declare and args.queue is None:
        args.parser.error("--declare goes with --queue")
    try:  # what cannot be a message is told before anything is done
        encode_properties(make_message(args, b"").wire_properties())
    except (ValueError, TypeError) as error:
        args.parser.error(str(error))
    if args.body is None and args.file in {None, "-"}:
        if sys.stdin is None:  # pyright: ignore[reportUnnecessaryComparison]  # <&-
            raise CommandFailed("standard input is closed.", "Give the message as an argument, or as a --file.")
        if args.file is None and sys.stdin.isatty():
            say("Each line is a message; Ctrl-D ends it.")
    chunks = await _chunks(args)
    async with await session.connect(args.url, "publish") as connection:
        channel = await connection.channel(publisher_confirms=not args.no_confirm)
        if args.queue is not None and args.declare:
            await session.get_queue(channel, args.queue, declare=True)
        exchange = await session.get_exchange(channel, args.exchange or "")
        return await _Publishing(args, channel).run(exchange, chunks)


async def _chunks(args: argparse.Namespace) -> AsyncGenerator[list[bytes]]:
    """The bodies: what is there of them at a time."""
    if args.body is not None:
        return _repeated(args.body.encode("utf-8", "surrogateescape"), args.count or 1)
    if args.file is not None:
        with contextlib.ExitStack() as stack:
            file = sys.stdin.buffer if args.file == "-" else stack.enter_context(Path(args.file).open("rb"))  # noqa: ASYNC230
            return _repeated(await read_all(file), args.count or 1)
    return read_lines(sys.stdin.buffer)


async def _repeated(body: bytes, count: int) -> AsyncGenerator[list[bytes]]:
    for begun in itertools.count(0, 1000):
        if begun >= count:
            return
        yield [body] * min(1000, count - begun)


class _Publishing:
    """One run: counts what goes and what comes back, and tells it."""

    def __init__(self, args: argparse.Namespace, channel: leveret.Channel) -> None:
        self._args = args
        self._channel = channel
        self._loop = asyncio.get_running_loop()
        self._stop: asyncio.Future[None] = self._loop.create_future()
        self._sent = self._returned = 0
        self._total = self._confirmed = 0
        self._failed: Counter[str] = Counter()
        self._stopped_by: Exception | None = None
        self._is_all = False

    async def run(self, exchange: leveret.Exchange, chunks: AsyncGenerator[list[bytes]]) -> int:
        """Publish all; after Ctrl-C what is on its way still gets its confirm."""
        self._channel.return_callbacks.add(self._on_returned)
        routing_key = self._args.queue or self._args.routing_key or ""
        begun = self._loop.time()
        with Live() as live:
            publishing = asyncio.ensure_future(self._publish(exchange, self._messages(chunks, live.show), routing_key))
            try:
                await asyncio.shield(publishing)
            except asyncio.CancelledError:
                self._stop.set_result(None)
                ending().waits_for = "the confirms of what is on its way"
                with contextlib.suppress(asyncio.CancelledError):  # by a second one: the connection is aborted
                    await asyncio.wait([publishing])
                await asyncio.wait([publishing], timeout=_LAST_WORDS)
                publishing.cancel()
                await asyncio.wait([publishing])
                self._tell(self._loop.time() - begun)
                raise
            except Exception:
                if self._total:
                    self._tell(self._loop.time() - begun)
                raise
        if self._args.no_confirm:
            # Its answer comes behind all that came back, and behind a refusal.
            await self._channel.set_qos(1)
        return self._tell(self._loop.time() - begun)

    async def _publish(
        self, exchange: leveret.Exchange, messages: AsyncGenerator[leveret.Message], routing_key: str
    ) -> None:
        async with contextlib.aclosing(messages):
            while not self._is_all and self._stopped_by is None:
                try:
                    report = await exchange.publish_many(self._some(messages), routing_key, timeout=None)
                except Exception as error:
                    report = getattr(error, "publish_report", leveret.PublishReport())
                    self._add(report)
                    if not isinstance(error, TypeError | ValueError) or error.__cause__ is None:
                        raise
                    raise CommandFailed(f"message {self._total + 1:,}: {sentence(error.__cause__)}") from error
                self._add(report)

    async def _some(self, messages: AsyncGenerator[leveret.Message]) -> AsyncGenerator[leveret.Message]:
        size = 0
        for _ in range(_AT_ONCE):
            if size >= _BYTES_AT_ONCE:
                return
            try:
                message = await anext(messages)
            except StopAsyncIteration:
                self._is_all = True
                return
            size += message.body_size
            yield message

    def _add(self, report: leveret.PublishReport) -> None:
        """Count, and tell the first failures; those that came back were told as they came."""
        for failure in report.failures:
            if not isinstance(failure.error, MessageReturned):
                if self._failed.total() < _TOLD:
                    number = self._total + failure.index + 1
                    say(f"message {number:,}: {sentence(failure.error.__cause__ or failure.error)}")
                self._failed[type(failure.error).__name__] += 1
        self._total += report.total
        self._confirmed += report.confirmed
        self._stopped_by = report.stopped_by

    async def _messages(
        self, chunks: AsyncGenerator[list[bytes]], show: Callable[[str], None]
    ) -> AsyncGenerator[leveret.Message]:
        pace = Pace(self._args.rate, self._loop.time())
        shown = self._loop.time()
        async for bodies in _until(self._stop, chunks):
            for body in bodies:
                while not self._stop.done() and (pause := pace.due(self._loop.time())) > 0:
                    await asyncio.wait([self._stop], timeout=pause)
                if self._stop.done() or self._sent == self._args.count:
                    return
                self._sent += 1
                pace.went()
                yield make_message(self._args, body)
                if (now := self._loop.time()) - shown >= 0.2:
                    shown = now
                    show(f"{self._sent:,} sent, {self._returned:,} returned")

    def _on_returned(self, channel: object, message: leveret.ReturnedMessage) -> None:
        self._returned += 1
        if self._returned <= _TOLD:
            advice = (
                f"is there a queue {name_of(self._args.queue)}? --declare creates it"
                if self._args.queue is not None
                else ("no queue is bound for it")
            )
            key = f"routing key {name_of(message.routing_key or '')}"
            say(f"returned by the broker ({message.reply_text}), {key}: {advice}")
        elif self._returned == _TOLD + 1:
            say("more are returned …")

    def _tell(self, duration: float) -> int:
        if self._stopped_by is not None:
            say(f"stopped: {sentence(self._stopped_by)}")
        queue, exchange = self._args.queue, self._args.exchange
        to = f"exchange {name_of(exchange)}" if queue is None else f"queue {name_of(queue)}"
        facts = ["not confirmed, as you wanted"] if self._args.no_confirm else [f"{self._confirmed:,} confirmed"]
        if self._returned:
            facts.append(f"{self._returned:,} returned")
        facts += [f"{number:,} failed ({kind})" for kind, number in self._failed.items()]
        speed = f" ({per_second(self._total, duration):,.0f}/s)" if self._total > 1 else ""
        tell(f"published {counted(self._total, 'message')} to {to} in {duration:.2f} s{speed}: {', '.join(facts)}")
        return FAILED if self._failed or self._returned or self._stopped_by is not None else 0


async def _until(stop: asyncio.Future[None], chunks: AsyncGenerator[list[bytes]]) -> AsyncIterator[list[bytes]]:
    """The *chunks* that come before *stop* is done."""
    async with contextlib.aclosing(chunks):
        while True:
            chunk: asyncio.Future[list[bytes] | None] = asyncio.ensure_future(anext(chunks, None))
            either: list[asyncio.Future[Any]] = [chunk, stop]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not chunk.done():
                chunk.cancel()
                await asyncio.wait([chunk])
                return
            if (bodies := chunk.result()) is None:
                return
            yield bodies
