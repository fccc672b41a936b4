"""``consume``: print what a queue has, and acknowledge it once it is printed; or only look."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
from collections import deque

import leveret
from leveret.cli import session
from leveret.cli.explain import CommandFailed
from leveret.cli.formats import as_json, as_pretty, raw
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
    queue_name,
    seconds,
    whole,
)
from leveret.cli.pipes import OutputClosed
from leveret.cli.printing import AT_ONCE, Printing
from leveret.cli.terminal import say
from leveret.exceptions import DeliveryLost
from leveret.log import printable

_PREFETCH = 100

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
--ack (the default) acknowledges a message when it is written; into a pipe (on Linux), when it is read from there. So
  what a closed pipe or Ctrl-C cuts off is not lost.
--peek fetches what is ready now, and requeues all of it at the end, so nobody else gets those messages meanwhile. The
  broker then marks them as redelivered, and quorum queues count it towards their delivery limit (before RabbitMQ 4.3).
exit code: 0; 1 on errors, and if --timeout passed before --count messages came; 130 for Ctrl-C.
--timeout does not count while the link is lost: that is an error if it is not back in 30 s (?operation_timeout=…).""",
)


def add(commands: Subcommands) -> None:
    """Add the command to the parser."""
    parser = add_command(commands, "consume", "print the messages of a queue", run, epilog=_EPILOG)
    where = parser.add_argument_group("where from")
    source = where.add_mutually_exclusive_group(required=True)
    source.add_argument("--queue", metavar="NAME", type=queue_name, help="this queue")
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
    how.add_argument("--delimiter", type=delimiter, help=r"behind each raw body; \n by default, \0, ''")
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
    if args.delimiter is not None and args.format != "raw":
        args.parser.error("--delimiter goes with --format raw")
    if args.delimiter is None:
        args.delimiter = b"\n"
    async with await session.connect(args.url, "consume") as connection:
        channel = await connection.channel()
        queue = await _queue(args, channel)
        printing = Printing({"pretty": as_pretty, "json": as_json}.get(args.format) or raw(args.delimiter))
        silence = _Silence(connection, args.timeout)
        with printing:
            if args.peek:
                return await _peek(args, queue, printing)
            return await _consume(args, queue, printing, silence)


async def _queue(args: argparse.Namespace, channel: leveret.RobustChannel) -> leveret.Queue:
    if args.queue is not None:
        return await session.get_queue(channel, args.queue, declare=args.declare)
    await session.get_exchange(channel, args.exchange)
    queue = await channel.declare_queue("", exclusive=True)
    for key in args.binding_key or ["#"]:
        await queue.bind(args.exchange, key)
    say(f"waiting for messages of exchange {name_of(args.exchange)}; Ctrl-C ends it")
    return queue


class _Silence:
    """Waits for messages until none came for *timeout* seconds in which the link was there; None waits for ever."""

    def __init__(self, connection: leveret.RobustConnection, timeout: float | None) -> None:
        self._connection = connection
        self._timeout = timeout
        self._ready_since = 0.0
        connection.state_callbacks.add(self._on_state)

    def _on_state(self, connection: leveret.RobustConnection, old: object, new: object, cause: object) -> None:
        self._ready_since = connection.loop.time()

    async def next(self, messages: leveret.QueueIterator) -> leveret.IncomingMessage | None:
        """The next message; None if none comes in time.

        Raises:
            CommandFailed: the link does not come back within the connection's ``operation_timeout``.
        """
        if self._timeout is None:
            return await anext(messages)
        connection, now = self._connection, self._connection.loop.time
        begun = now()
        while True:
            try:
                async with asyncio.timeout_at(max(begun, self._ready_since) + self._timeout):
                    return await anext(messages)
            except TimeoutError:
                if connection.reconnecting:
                    await self._until_ready()
                    begun = now()
                elif now() >= max(begun, self._ready_since) + self._timeout:
                    return None

    async def _until_ready(self) -> None:
        limit = self._connection.operation_timeout
        try:
            async with asyncio.timeout(limit):
                await self._connection.ready()
        except TimeoutError:
            why = printable(self._connection.why_down())
            raise CommandFailed(f"the link was lost, and is not back after {limit:g} s: {why}") from None


async def _consume(args: argparse.Namespace, queue: leveret.Queue, printing: Printing, silence: _Silence) -> int:
    count = args.count or math.inf
    prefetch = int(min(args.prefetch or _PREFETCH, count))
    unacked: deque[leveret.IncomingMessage] = deque()
    acked = again = 0
    why = ""
    try:
        async with queue.iterator(prefetch=prefetch, arguments=dict(args.argument) or None) as messages:
            while printing.count < count:
                first = await printing.wait_for(lambda: silence.next(messages))
                if first is None:
                    why = f": nothing came for {args.timeout:g} s"
                    break
                some = [first]
                while messages.backlog and len(some) < min(printing.at_once, count - printing.count):
                    some.append(await anext(messages))
                await printing.print(some)
                try:
                    if printing.count < count:
                        await printing.until_read()
                except OutputClosed:
                    printing.count -= len(some)
                    raise
                except asyncio.CancelledError:
                    unacked.extend(some)
                    raise
                unacked.extend(some)
                # The last ones wait for the end, or the broker would send more than are wanted in their stead.
                while unacked and acked + prefetch < count:
                    again += not await _acknowledge(unacked.popleft())
                    acked += 1
    finally:
        try:
            while unacked:
                again += not await _acknowledge(unacked[0])
                unacked.popleft()
        finally:
            again += len(unacked)
            say(f"consumed {counted(printing.count, 'message')} from queue {name_of(queue.name)}{why}")
            if again:
                say(f"{again:,} of them will come again: the link was lost before they were acknowledged")
    return 0 if args.count is None or printing.count == args.count else FAILED


async def _acknowledge(message: leveret.IncomingMessage) -> bool:
    """Whether that was possible."""
    try:
        await message.ack()
    except DeliveryLost:
        return False
    return True


async def _peek(args: argparse.Namespace, queue: leveret.Queue, printing: Printing) -> int:
    # Not more than were there to begin with, or it would follow a queue that is being filled for ever.
    wanted = args.count or queue.declaration_result.message_count or 0
    last: leveret.IncomingMessage | None = None
    try:
        while printing.count < wanted:
            some = await queue.get_many(min(AT_ONCE, wanted - printing.count), timeout=30)
            if not some:
                break
            last = some[-1]
            await printing.print(some)
    finally:
        if last is not None:
            with contextlib.suppress(DeliveryLost):  # then the broker has requeued them
                await last.nack(multiple=True, requeue=True)
        say(f"looked at {counted(printing.count, 'message')} of queue {name_of(queue.name)}, and left them there")
    return 0
