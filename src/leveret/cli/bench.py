"""``bench``: a load generator, after RabbitMQ's PerfTest."""

from __future__ import annotations

import argparse
import json
from typing import Any

import leveret
from leveret.cli.load import DRAIN, Figures, Load
from leveret.cli.measure import per_second
from leveret.cli.options import (
    FAILED,
    MAX_PREFETCH,
    Subcommands,
    add_command,
    add_url,
    epilog,
    queue_name,
    rate,
    seconds,
    whole,
)
from leveret.cli.terminal import tell

_EPILOG = epilog(
    ("10 seconds, one producer, one consumer", "bench"),
    (
        "a latency, not a throughput: 1,000 messages a second, persistent, in a quorum queue",
        "bench --rate 1000 --persistent --queue-type quorum --size 1000",
    ),
    (
        "from two machines: fill a queue here, empty it there",
        "bench --queue load --producers 2 --consumers 0 --count 100000",
    ),
    ("", "bench --queue load --producers 0 --consumers 2 --time 30"),
    ("for a script", "bench --time 5 --json | jq .latency_ms.p99"),
    notes="""
Each producer and each consumer has a connection of its own. Without --queue, a queue is made and deleted again.
latency: from before a message is written to when its consumer has it. Between machines it is as right as their clocks.
After --time, confirms and consumers get 10 seconds more for what they are behind with; what is left in the queue then
is told, and is no error. With --producers 0, it waits for messages all of the --time.
confirm latency: from the same moment to the broker's confirm.
It measures this client, in one process, as much as the broker: look at the CPU of both.
exit code: 0; 1 on errors, and if a message was returned, refused, or confirmed and not received.""",
)


def add(commands: Subcommands) -> None:
    """Add the command to the parser."""
    parser = add_command(commands, "bench", "publish and consume as fast as it goes, and measure", run, epilog=_EPILOG)
    add_url(parser)
    load = parser.add_argument_group("the load")
    load.add_argument("--producers", metavar="N", type=whole(0, 1000), default=1, help="1 by default; 0 only consumes")
    load.add_argument("--consumers", metavar="N", type=whole(0, 1000), default=1, help="1 by default; 0 only publishes")
    load.add_argument("--rate", metavar="N", type=rate, help="messages a second of each producer; no limit by default")
    load.add_argument(
        "--size", metavar="BYTES", type=whole(0, 64 * 1024 * 1024), default=12, help="of a body; 12 by default"
    )
    load.add_argument("--persistent", action="store_true", help="persistent messages")
    load.add_argument(
        "--confirms",
        metavar="WINDOW",
        type=whole(0, 1_000_000),
        default=1000,
        help="unconfirmed messages of each producer, at most, and 16 MiB of them; 1000 by default, 0 to have none",
    )
    load.add_argument(
        "--prefetch", metavar="N", type=whole(1, MAX_PREFETCH), default=500, help="of each consumer; 500 by default"
    )
    load.add_argument(
        "--ack-batch",
        metavar="N",
        type=whole(0, MAX_PREFETCH),
        default=1,
        help="messages per ack; 1 by default, 0 for consumers that need not acknowledge",
    )
    queue = parser.add_argument_group("the queue")
    queue.add_argument(
        "--queue", metavar="NAME", type=queue_name, help="one that is there, or else is made, durable, and stays"
    )
    queue.add_argument(
        "--queue-type", choices=("classic", "quorum", "stream"), default="classic", help="classic by default"
    )
    until = parser.add_argument_group("until when")
    until.add_argument("--time", metavar="SECONDS", type=seconds, help="10 by default, unless there is a --count")
    until.add_argument(
        "--count", metavar="N", type=whole(1), help="messages of each producer; without producers, to consume"
    )
    parser.add_argument("--json", action="store_true", help="the summary as JSON")


async def run(args: argparse.Namespace) -> int:
    """Measure; the exit code tells whether all went well."""
    if not args.producers and not args.consumers:
        args.parser.error("--producers 0 --consumers 0: there is nothing to do")
    if args.queue is None and not args.producers:
        args.parser.error("--producers 0 needs a --queue to consume from")
    if args.ack_batch > args.prefetch:
        args.parser.error("--ack-batch is more than --prefetch: the broker would wait for acks that wait for messages")
    if args.queue_type == "stream" and not args.ack_batch:
        args.parser.error("--ack-batch 0: consumers of a stream have to acknowledge")
    if not args.producers and args.count is not None and not args.ack_batch:
        args.parser.error("--ack-batch 0 --count: the broker forgets more messages than that, as it sends them ahead")
    if args.time is None and args.count is None:
        args.time = 10.0
    load = Load(args)
    try:
        await load.run()
    finally:
        if load.has_begun:
            _tell(load, args)
    return 0 if load.is_well else FAILED


def _tell(load: Load, args: argparse.Namespace) -> None:
    result = summary(load.figures, args, load.queue)
    if args.json:
        tell(json.dumps(result))
        return
    for line in summary_lines(result):
        tell(line)
    if load.figures.unstamped:
        tell(f"{load.figures.unstamped:,} messages were not of a bench: they count for no latency")


def summary(figures: Figures, args: argparse.Namespace, queue: str) -> dict[str, Any]:
    """The result, as ``--json`` prints it: rates are per second, latencies in milliseconds."""
    names = ("producers", "consumers", "rate", "size", "persistent", "confirms", "prefetch", "ack_batch", "queue_type")
    return {
        "leveret": leveret.__version__,
        "queue": queue,
        **{name: getattr(args, name) for name in names},
        "publish_seconds": round(figures.publishing, 3),
        "consume_seconds": round(figures.consuming, 3),
        "sent": figures.sent,
        "sent_per_second": round(per_second(figures.sent, figures.publishing), 1),
        "confirmed": figures.confirmed,
        "returned": figures.returned,
        "failed": figures.failed,
        "received": figures.received,
        "left": figures.left,
        "received_per_second": round(per_second(figures.received, figures.consuming), 1),
        "latency_ms": figures.latency.summary(),
        "confirm_latency_ms": figures.confirm_latency.summary(),
    }


def summary_lines(result: dict[str, Any]) -> list[str]:
    """The same for people."""
    lines: list[str] = []
    if result["producers"]:
        confirmed = f"{result['confirmed']:,} confirmed" if result["confirms"] else "without confirms"
        wrong = "".join(f", {result[name]:,} {name}" for name in ("returned", "failed") if result[name])
        lines.append(f"sent      {result['sent']:>12,}  {result['sent_per_second']:>11,.0f}/s  {confirmed}{wrong}")
    if result["consumers"]:
        left = f"  {result['left']:,} left in the queue, {DRAIN:g} s after the end" if result["left"] else ""
        lines.append(f"received  {result['received']:>12,}  {result['received_per_second']:>11,.0f}/s{left}")
    for name, key in (("latency", "latency_ms"), ("confirm", "confirm_latency_ms")):
        if (latency := result[key]) is not None:
            figures = "  ".join(
                f"{label} {latency[each]:,.2f}"
                for label, each in (
                    ("min", "min"),
                    ("median", "median"),
                    ("95%", "p95"),
                    ("99%", "p99"),
                    ("max", "max"),
                )
            )
            lines.append(f"{name}   {figures} ms")
    return lines
