"""Call the functions of rpc_server.py, a hundred at a time too, and see what may become of a call.

Run the server, and in a second terminal the client::

    python examples/rpc_server.py
    python examples/rpc_client.py
"""

import asyncio
import os

import leveret
from leveret.exceptions import NoServer, RemoteError
from leveret.patterns import RPC

URL = os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/")


async def main() -> None:
    async with await leveret.connect_robust(URL) as connection:
        rpc = await RPC.create(await connection.channel())

        print("2 * 3 =", await rpc.proxy.leveret.multiply(x=2, y=3))

        calls = [rpc.call("leveret.multiply", {"x": n, "y": n}, timeout=10) for n in range(100)]
        print("The sum of the first 100 squares is", sum(await asyncio.gather(*calls)))

        try:
            await rpc.proxy.leveret.divide(x=1, y=0)
        except RemoteError as error:
            print(f"The server says: {error.message} ({error.type}, {error.data})")

        try:
            await rpc.proxy.leveret.add(x=1, y=1)
        except NoServer as error:
            print(f"It fails at once: {error}")


if __name__ == "__main__":
    asyncio.run(main())
