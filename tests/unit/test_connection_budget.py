"""What connections and channels cost before they are used: writes, Python calls, bytes of memory.

Everything is real but the socket, as in :mod:`tests.unit.test_call_ceilings`. ``pytest -s`` shows the numbers.
"""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from typing import TYPE_CHECKING

import pytest

import leveret
from tests.unit.test_call_ceilings import PACKAGE, Count, FakeSocket

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from leveret import Connection

    Connect = Callable[[str], Awaitable[Connection]]

CONNECTS = pytest.mark.parametrize("connect", [leveret.connect, leveret.connect_robust])
CHANNELS = 100


def run(scenario: Callable[[FakeSocket], Awaitable[None]]) -> None:
    async def main() -> None:
        fake = FakeSocket()

        async def create_connection(factory, *_, **__):
            fake.protocol = factory()
            fake.protocol.connection_made(fake)
            return fake, fake.protocol

        asyncio.get_running_loop().create_connection = create_connection  # type: ignore[method-assign]
        await scenario(fake)

    with asyncio.Runner(debug=False) as runner:  # debug mode keeps a stack for each handle
        runner.run(main())


@CONNECTS
def test_what_the_broker_is_told_without_waiting_goes_out_in_one_write(connect: Connect) -> None:
    async def scenario(fake: FakeSocket) -> None:
        async with await connect("amqp://127.0.0.1/") as connection:
            assert len(fake.written) == 3  # the protocol header; start-ok; tune-ok and open
            await connection.channel()
            assert len(fake.written) == 4  # channel.open and confirm.select

    run(scenario)


@pytest.mark.parametrize(("connect", "ceiling"), [(leveret.connect, 340), (leveret.connect_robust, 480)])
def test_connecting_opening_a_channel_and_closing_stay_below_the_ceiling(connect: Connect, ceiling: int) -> None:
    async def scenario(fake: FakeSocket) -> None:
        for _ in range(3):  # caches are warm after the first
            with Count() as count:
                connection = await connect("amqp://127.0.0.1/")
                await connection.channel()
                await connection.close()
        count.report(f"{connect.__name__}, channel, close")
        assert count.total(of=PACKAGE) <= ceiling

    run(scenario)


@pytest.mark.parametrize(("connect", "ceiling"), [(leveret.connect, 2850), (leveret.connect_robust, 3250)])
def test_an_open_channel_that_was_not_used_takes_little_memory(connect: Connect, ceiling: int) -> None:
    async def scenario(fake: FakeSocket) -> None:
        async with await connect("amqp://127.0.0.1/") as connection:
            kept = [await connection.channel() for _ in range(10)]
            gc.collect()
            fake.written.clear()
            tracemalloc.start()
            try:
                before = tracemalloc.get_traced_memory()[0]
                kept += [await connection.channel() for _ in range(CHANNELS)]
                fake.written.clear()
                gc.collect()
                each = (tracemalloc.get_traced_memory()[0] - before) / CHANNELS
            finally:
                tracemalloc.stop()
            print(f"\n{connect.__name__}: {each:.0f} bytes for each channel")
            assert each <= ceiling

    run(scenario)
