"""The fifth tutorial in aio-pika's way: a topic exchange."""

import asyncio
import os

from leveret import DeliveryMode, ExchangeType, Message, connect
from leveret.message import IncomingMessage


async def main() -> None:
    connection = await connect(os.environ["AMQP_URL"])
    async with connection, connection.channel() as channel:
        topic_logs_exchange = await channel.declare_exchange("topic_logs_compat", ExchangeType.TOPIC, auto_delete=True)
        queue = await channel.declare_queue(exclusive=True)
        for binding_key in ("kern.*", "*.critical"):
            await queue.bind(topic_logs_exchange, routing_key=binding_key)
        for routing_key in ("kern.info", "auth.info", "auth.critical"):
            message = Message(b"log", delivery_mode=DeliveryMode.PERSISTENT)
            await topic_logs_exchange.publish(message, routing_key=routing_key)
        received: IncomingMessage | None
        while (received := await queue.get(fail=False)) is not None:
            async with received.process():
                print(f"{received.routing_key!r}:{received.body!r}")


if __name__ == "__main__":
    asyncio.run(main())
