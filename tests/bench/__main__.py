"""The command line: what to run, and in which order. The docstring of the package says how it is meant."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench import report
from tests.bench.brokers import rabbitmq, sink
from tests.bench.peers import CLIENTS, Contender, Unavailable, contender
from tests.bench.scenarios import SCENARIOS, Job
from tests.support.provision import BrokerUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from tests.bench.brokers import Broker

LOOPS = ("asyncio", "uvloop")
LARGE = 32 * 1024
"""Of bodies of this size and more, a tenth of the messages will do."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for, and print a table for each broker."""
    options = _parse(arguments)
    try:
        contenders = _contenders(options)
        with contextlib.ExitStack() as stack:
            brokers = [stack.enter_context(sink())] if options.sink else []
            if options.url or not options.sink:
                brokers.append(stack.enter_context(rabbitmq(options.url)))
            for broker in brokers:
                _table(broker, contenders, options)
    except (Unavailable, BrokerUnavailable) as error:
        sys.exit(str(error))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="AMQP clients side by side.")
    add = parser.add_argument
    add("--clients", type=_names(CLIENTS), default=["leveret", "aio_pika"], metavar="A,B", help=", ".join(CLIENTS))
    add("--scenarios", type=_names(SCENARIOS), default=[*SCENARIOS], metavar="A,B", help="all; " + ", ".join(SCENARIOS))
    add("--sizes", type=_sizes, default=[16], metavar="A,B", help="of bodies, in bytes (16)")
    add("--loop", type=_names(LOOPS), default=["asyncio"], metavar="A,B", help="asyncio (the default), uvloop, or both")
    add("--reps", type=int, default=5, help="repetitions of each measurement (5)")
    add("--scale", type=float, default=1, help="factor on the number of messages (1)")
    add("--baseline", choices=CLIENTS, default="aio_pika", metavar="A", help="what others are compared with (aio_pika)")
    add("--url", help="the broker; by default a private RabbitMQ")
    add("--sink", action="store_true", help="against the null sink; together with --url against both")
    add("--timeout", type=float, default=120, help="seconds for one measurement (120)")
    add("--json", type=Path, metavar="FILE", help="append every single result, a line of JSON each")
    return parser.parse_args(arguments)


def _names(known: Collection[str]) -> Callable[[str], list[str]]:
    """What reads a list of names out of *known*."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(known)}")
        return names

    return parse


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]


def _contenders(options: argparse.Namespace) -> list[Contender]:
    """Those that can be had; the others are reported.

    Raises:
        Unavailable: the baseline is among the others.
    """
    found = []
    for loop in options.loop:
        for client in options.clients:
            try:
                found.append(contender(client, loop))
            except Unavailable as error:
                if client == options.baseline:
                    raise
                print(f"without {client}: {error}", file=sys.stderr)
    return [one for one in found if one is not None]


def _table(broker: Broker, contenders: Sequence[Contender], options: argparse.Namespace) -> None:
    compared = f"; ratios to {options.baseline}" if options.baseline in options.clients else ""
    print(f"\n{broker.name}; median of {options.reps}{compared}\n")
    print(report.head(contenders), flush=True)
    for name in options.scenarios:
        scenario = SCENARIOS[name]
        if broker.is_sink and not scenario.sink:
            continue
        for size in options.sizes if scenario.sized else options.sizes[:1]:
            n = max(1, round(scenario.n * options.scale * (0.1 if size >= LARGE else 1)))
            cells = _cells(broker, name, Job(broker.url, n, size), contenders, options)
            print(f"| {name} | {f'{size} B' if scenario.sized else ''} | {' | '.join(cells)} |", flush=True)


def _cells(
    broker: Broker, name: str, job: Job, contenders: Sequence[Contender], options: argparse.Namespace
) -> list[str]:
    """Run one scenario with all *contenders*, in turn; what the table says of each."""
    scenario = SCENARIOS[name]
    results: dict[Contender, list[dict[str, float]]] = {one: [] for one in contenders}
    out: dict[Contender, str] = {}  # who cannot do it, or failed
    for _ in range(options.reps):
        for one in contenders:
            if one in out:
                continue
            try:
                with broker.prepared(scenario, job):
                    figures = one.run(name, job, options.timeout)
            except subprocess.SubprocessError as error:
                print(f"{name}, {one}: {error}", file=sys.stderr)
                out[one] = "failed"
                continue
            if figures is None:
                out[one] = ""
                continue
            results[one].append(figures)
            if options.json:
                line = {"broker": broker.name, "scenario": name, "client": str(one), "n": job.n, "size": job.size}
                with options.json.open("a") as file:
                    file.write(json.dumps(line | figures) + "\n")
    baseline = next((results[one] for one in contenders if one.client == options.baseline and one not in out), None)
    return [out[one] if one in out else report.cell(scenario, results[one], baseline) for one in contenders]


if __name__ == "__main__":
    main()
