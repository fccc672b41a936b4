"""opentelemetry-instrumentation-aio-pika: spans for publishing and consuming, one trace through the headers."""

from __future__ import annotations

# ruff: noqa: I001 - common comes first, and makes leveret of aio_pika
import asyncio

from common import URL, finish
from opentelemetry import trace
from opentelemetry.instrumentation.aio_pika import AioPikaInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import aio_pika

exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)


async def traced(connect) -> None:
    exporter.clear()
    received: asyncio.Future = asyncio.get_running_loop().create_future()

    async def on_message(message: aio_pika.abc.AbstractIncomingMessage) -> None:
        async with message.process():
            received.set_result((message.headers, trace.get_current_span().get_span_context().trace_id))

    async with await connect(URL) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue(exclusive=True)
        await queue.consume(on_message)
        message = aio_pika.Message(b"traced", message_id="id", correlation_id="corr")
        confirmed = await channel.default_exchange.publish(message, routing_key=queue.name)
        assert type(confirmed).__name__ == "Ack"
        headers, trace_id = await asyncio.wait_for(received, 10)
        await asyncio.sleep(0)
    send, receive = sorted(exporter.get_finished_spans(), key=lambda span: span.name.endswith("receive"))
    assert send.name == f",{queue.name} send", send.name
    assert receive.name == f"{queue.name} receive", receive.name
    assert headers["traceparent"].split("-")[1] == f"{trace_id:032x}" == f"{send.context.trace_id:032x}"
    assert receive.context.trace_id == trace_id
    assert receive.parent.span_id == send.context.span_id
    assert send.attributes["net.peer.name"] == "127.0.0.1"
    assert send.attributes["messaging.message.id"] == "id"


async def main() -> None:
    AioPikaInstrumentor().instrument(skip_dep_check=True)
    await traced(aio_pika.connect)
    await traced(aio_pika.connect_robust)
    AioPikaInstrumentor().uninstrument()
    assert not hasattr(aio_pika.Queue.consume, "__wrapped__")
    assert not hasattr(aio_pika.Exchange.publish, "__wrapped__")
    finish()


asyncio.run(main())
