"""Play many sequences and print every difference once: ``python -m tests.differential 4.0 --sequences 500``."""

from __future__ import annotations

import argparse
import asyncio
import logging
import time

from leveret.testing import Broker
from tests.differential.play import Pair, shrunk
from tests.differential.regressions import REGRESSIONS
from tests.differential.sequences import sequence
from tests.support.node import Node


async def explore(version: str, real: str, seed: int, first: int, count: int, patience: float) -> None:
    """Play *count* sequences; print what differs."""
    async with Broker(version=version) as broker:
        pair = Pair(version, real, broker.url, patience=patience)
        seen: dict[str, int] = {}
        began = time.monotonic()
        spent = 0.0
        for name, operations in REGRESSIONS.items():
            found = await pair.play(operations)
            if found is not None:
                print(f"--- {name}\n{found}", flush=True)
        for number in range(first, first + count):
            try:
                found = await pair.play(sequence(seed, number))
            except Exception as error:
                print(f"--- {number}: {error!r}", flush=True)
                raise
            if found is None:
                continue
            at = time.monotonic()
            before = seen.get(found.signature, 0)
            seen[found.signature] = before + 1
            if before < 2:
                found = await shrunk(pair, found)
                print(f"--- {number}\n{found}", flush=True)
            spent += time.monotonic() - at
        took = time.monotonic() - began
        print(f"{count} sequences, {sum(seen.values())} differences, {took:.1f} s, {spent:.1f} of it for shrinking")
        for signature, times in sorted(seen.items(), key=lambda each: -each[1]):
            print(f"{times:4} {signature}")
        await pair.close()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("version")
    parser.add_argument("--sequences", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--patience", type=float, default=0.7)
    parser.add_argument("--url", help="of a RabbitMQ of that version that runs already")
    args = parser.parse_args()
    logging.disable()
    if args.url:
        asyncio.run(explore(args.version, args.url, args.seed, args.first, args.sequences, args.patience))
        return
    with Node(args.version) as node:
        print(node.url, flush=True)
        asyncio.run(explore(args.version, node.url, args.seed, args.first, args.sequences, args.patience))


if __name__ == "__main__":
    main()
