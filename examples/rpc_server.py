"""Serve two functions that other programs call, until Ctrl-C.

Run it, and in a second terminal the client::

    python examples/rpc_server.py
    python examples/rpc_client.py
"""

import asyncio
import os

import leveret
from leveret.exceptions import RemoteError
from leveret.patterns import RPC

URL = os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/")


async def multiply(*, x: int, y: int) -> int:
    return x * y


async def divide(*, x: int, y: int) -> float:
    if y == 0:
        # What the caller gets. Any other exception would do, too: its class and its text are sent.
        raise RemoteError("DivisionByZero", "y must not be 0", data={"x": x})
    return x / y


async def main() -> None:
    connection = await leveret.connect_robust(URL)
    rpc = await RPC.create(await connection.channel())
    await rpc.register("leveret.multiply", multiply, concurrency=10, auto_delete=True)
    await rpc.register("leveret.divide", divide, concurrency=10, auto_delete=True)
    print("Waiting for calls. To stop, press Ctrl-C.")
    await leveret.run_until_signalled(connection, drain=10)


if __name__ == "__main__":
    asyncio.run(main())
