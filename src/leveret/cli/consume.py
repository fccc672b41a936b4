"""``consume``: print what a queue has, and acknowledge it once it is printed; or only look."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Sequence

import leveret
from leveret.cli import session
from leveret.cli.formats import Format, as_json, as_pretty, raw
from leveret.cli.options import (
    FAILED,
    MAX_PREFETCH,
    Subcommands,
    add_command,
    add_url,
    counted,
    delimiter,
    epilog,
    name_and_value,
    name_of,
    seconds,
    whole,
)
from leveret.cli.pipes import OutputClosed, Writer
from leveret.cli.terminal import say
from leveret.exceptions import DeliveryLost

_PREFETCH = 100
_AT_ONCE = 100
"""Messages that are printed, and then acknowledged, together."""
_LAST_WORDS = 0.2
"""Seconds that writing gets when the command is to end."""

_EPILOG = epilog(
    ("print what comes to the queue, and acknowledge it, until Ctrl-C", "consume --queue hello"),
    ("look at the first 10, and leave them there", "consume --queue hello --peek --count 10"),
    (
        "empty a queue into a file; end when nothing came for 2 seconds",
        "consume --queue hello --format json --timeout 2 > messages.jsonl",
    ),
    (
        "see what passes an exchange, by a temporary queue",
        "consume --exchange logs --binding-key 'kern.*' --binding-key '*.error'",
    ),
    ("read a stream from its beginning", "consume --queue events --argument x-stream-offset=first --timeout 2"),
    (
        "the body of one message, byte for byte",
        "consume --queue images --count 1 --format raw --delimiter '' > hare.png",
    ),
    notes="""
formats: pretty, for people: properties, headers, and the body with its control characters escaped.
  json: a line of JSON for each message. A body that is not UTF-8 is in body_base64 instead of body.
  raw: the bodies as they are, each with a newline behind it, or with --delimiter.
--ack (the default) acknowledges a message when it is written, so what a closed pipe or Ctrl-C cuts off is not lost.
--peek fetches what is ready now, and requeues all of it at the end, so nobody else gets those messages meanwhile. The
  broker then marks them as redelivered, and quorum queues count it towards their delivery limit (before RabbitMQ 4.3).
exit code: 0; 1 on errors, and if --timeout passed before --count messages came; 130 for Ctrl-C.""",
)


def add(commands: Subcommands) -> None:
    """Add the command to the parser."""
    parser = add_command(commands, "consume", "print the messages of a queue", run, epilog=_EPILOG)
    where = parser.add_argument_group("where from")
    source = where.add_mutually_exclusive_group(required=True)
    source.add_argument("--queue", metavar="NAME", help="this queue")
    source.add_argument("--exchange", metavar="NAME", help="a temporary queue that is bound to this exchange")
    where.add_argument(
        "--binding-key",
        metavar="KEY",
        action="append",
        default=[],
        help="for --exchange, any number of times; # by default, which is all of a topic or fanout exchange",
    )
    where.add_argument("--declare", action="store_true", help="create the queue if it is missing, as a durable one")
    where.add_argument(
        "--argument",
        metavar="NAME=VALUE",
        type=name_and_value,
        action="append",
        default=[],
        help="of the consumer, such as x-stream-offset=first; the value is JSON, or else text",
    )
    add_url(parser)
    how = parser.add_argument_group("how")
    how.add_argument("--format", choices=("pretty", "json", "raw"), default="pretty", help="pretty by default")
    how.add_argument("--delimiter", type=delimiter, default=b"\n", help=r"behind each raw body; \n by default, \0, ''")
    how.add_argument("--count", metavar="N", type=whole(1), help="end after N messages")
    how.add_argument("--timeout", metavar="SECONDS", type=seconds, help="end when nothing came for so long")
    mode = how.add_mutually_exclusive_group()
    mode.add_argument("--ack", action="store_true", help="acknowledge what is printed (the default)")
    mode.add_argument(
        "--peek", action="store_true", help="leave the messages in the queue; ends with what is there now"
    )
    how.add_argument(
        "--prefetch",
        metavar="N",
        type=whole(1, MAX_PREFETCH),
        help=f"messages that the broker may send ahead; {_PREFETCH} by default, and never more than --count",
    )


async def run(args: argparse.Namespace) -> int:
    """Consume; the exit code tells whether as many came as were wanted."""
    if args.binding_key and args.exchange is None:
        args.parser.error("--binding-key goes with --exchange")
    if args.declare and args.queue is None:
        args.parser.error("--declare goes with --queue")
    if args.peek and args.queue is None:
        args.parser.error("--peek goes with --queue: a temporary queue is empty")
    if args.peek and (args.timeout or args.argument or args.prefetch):
        args.parser.error("--peek fetches what is there: it takes no --timeout, --prefetch and --argument")
    async with await session.connect(args.url, "consume") as connection:
        channel = await connection.channel()
        queue = await _queue(args, channel)
        printing = _Printing({"pretty": as_pretty, "json": as_json}.get(args.format) or raw(args.delimiter))
        with printing:
            if args.peek:
                return await _peek(args, queue, printing)
            return await _consume(args, queue, printing)


async def _queue(args: argparse.Namespace, channel: leveret.RobustChannel) -> leveret.Queue:
    if args.queue is not None:
        return await session.get_queue(channel, args.queue, declare=args.declare)
    await session.get_exchange(channel, args.exchange)
    queue = await channel.declare_queue("", exclusive=True)
    for key in args.binding_key or ["#"]:
        await queue.bind(args.exchange, key)
    say(f"waiting for messages of exchange {name_of(args.exchange)}; Ctrl-C ends it")
    return queue


class _Printing:
    """Prints messages, and counts those that are printed; for ``with``, so that a reader who goes ends the command."""

    def __init__(self, format: Format) -> None:
        self.count = 0
        self._format = format
        self._writer = Writer()
        self._waiting = False
        self._closed = False
        self._task = asyncio.current_task()

    async def print(self, messages: Sequence[leveret.IncomingMessage]) -> None:
        """Returns when all are written.

        Cancellation: what is written in the next moment counts as written, so that it can be acknowledged; the
        cancellation comes with the next wait then.
        """
        first = self.count + 1
        data = b"".join(self._format(number, message) for number, message in enumerate(messages, first))
        writing = asyncio.ensure_future(self._writer.write(data))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait([writing], timeout=_LAST_WORDS)
            if not writing.done() or self._task is None:
                writing.cancel()
                await asyncio.wait([writing])
                raise
            self._task.uncancel()
            self._task.cancel()
            writing.result()
        self.count += len(messages)

    async def next(self, messages: leveret.QueueIterator, timeout: float | None) -> leveret.IncomingMessage | None:
        """The next message; None if none comes in time.

        Raises:
            OutputClosed: nobody would read it.
        """
        if self._closed:
            raise OutputClosed
        self._waiting = True
        try:
            async with asyncio.timeout(timeout):
                return await anext(messages)
        except TimeoutError:
            return None
        finally:
            self._waiting = False

    def _on_closed(self) -> None:
        self._stop_watching()
        self._closed = True
        if self._waiting and self._task is not None:  # what is being written fails by itself
            self._task.cancel()

    def __enter__(self) -> _Printing:
        self._stop_watching = self._writer.when_closed(self._on_closed)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop_watching()
        if kind is asyncio.CancelledError and self._closed:
            raise OutputClosed


async def _consume(args: argparse.Namespace, queue: leveret.Queue, printing: _Printing) -> int:
    count = args.count or math.inf
    prefetch = int(min(args.prefetch or _PREFETCH, count))
    unacked: deque[leveret.IncomingMessage] = deque()
    acked = again = 0
    why = ""
    try:
        async with queue.iterator(prefetch=prefetch, arguments=dict(args.argument) or None) as messages:
            while printing.count < count:
                first = await printing.next(messages, args.timeout)
                if first is None:
                    why = f": nothing came for {args.timeout:g} s"
                    break
                some = [first]
                while messages.backlog and len(some) < min(_AT_ONCE, count - printing.count):
                    some.append(await anext(messages))
                await printing.print(some)
                unacked.extend(some)
                # The last ones wait for the end, or the broker would send more than are wanted in their stead.
                while unacked and acked + prefetch < count:
                    again += not await _acknowledge(unacked.popleft())
                    acked += 1
    finally:
        for message in unacked:
            again += not await _acknowledge(message)
        say(f"consumed {counted(printing.count, 'message')} from queue {name_of(queue.name)}{why}")
        if again:
            say(f"{again:,} of them will come again: the link was lost before they were acknowledged")
    return 0


async def _acknowledge(message: leveret.IncomingMessage) -> bool:
    """Whether that was possible."""
    try:
        await message.ack()
    except DeliveryLost:
        return False
    return True


async def _peek(args: argparse.Namespace, queue: leveret.Queue, printing: _Printing) -> int:
    # Not more than were there to begin with, or it would follow a queue that is being filled for ever.
    wanted = args.count or queue.declaration_result.message_count or 0
    last: leveret.IncomingMessage | None = None
    try:
        while printing.count < wanted:
            some = await queue.get_many(min(_AT_ONCE, wanted - printing.count), timeout=30)
            if not some:
                break
            last = some[-1]
            await printing.print(some)
    finally:
        if last is not None:
            with contextlib.suppress(DeliveryLost):  # then the broker has requeued them
                await last.nack(multiple=True, requeue=True)
        say(f"looked at {counted(printing.count, 'message')} of queue {name_of(queue.name)}, and left them there")
    return 0 if args.count is None or printing.count == args.count else FAILED
