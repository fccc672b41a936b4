"""Tutorial 6, remote procedure call: compute Fibonacci numbers for whoever asks, until Ctrl-C.

Run it, and in a second terminal the client::

    python examples/tutorials/rpc_server.py
    python examples/tutorials/rpc_client.py 30

https://www.rabbitmq.com/tutorials/tutorial-six-python
"""

import asyncio
import contextlib
import os
import signal

import leveret

URL = os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/")


def fibonacci(n: int) -> int:
    """The n-th Fibonacci number, the slow way on purpose."""
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)


async def main() -> None:
    async with await leveret.connect(URL) as connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=1)  # several servers share the load evenly
        queue = await channel.declare_queue("rpc_queue", durable=True)

        async with queue.iterator() as requests:
            print(" [x] Waiting for RPC requests. To exit press CTRL+C")
            async for request in requests:
                async with request.process(requeue=True, reject_on_redelivered=True):
                    n = int(request.body)
                    # In a thread, because heartbeats and other requests need the event loop meanwhile.
                    result = await asyncio.to_thread(fibonacci, n)
                    print(f" [.] fib({n}) = {result}")
                    if request.reply_to:
                        reply = leveret.Message(str(result).encode(), correlation_id=request.correlation_id)
                        # Not mandatory: the client may have gone, and then nobody wants the answer.
                        await channel.default_exchange.publish(reply, request.reply_to, mandatory=False)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # even where a shell script had it ignored
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))  # stop as on Ctrl-C
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
