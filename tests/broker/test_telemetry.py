"""Spans of OpenTelemetry on a real broker: one for each publish, and one for the work that it leads to."""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry import baggage, context
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, get_current_span

from leveret import Ack, Channel, Exchange, IncomingMessage, Message, MessageRetry, Queue, ReturnedMessage, telemetry
from leveret.exceptions import (
    ChannelInvalidStateError,
    MessageNacked,
    MessageReturned,
    PublishManyFailed,
    PublishOutcomeUnknown,
    QueueEmpty,
)
from leveret.outcome import Outcome
from tests.broker.test_helpers import drain, eventually, fill, holds
from tests.broker.test_robust import KEPT, restored

if TYPE_CHECKING:
    from collections.abc import Iterator

    from leveret import RobustConnection
    from tests.support.proxy import FaultProxy


class Spans:
    """The spans that have ended, and how they belong together."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._exporter = exporter

    def all(self, operation: str | None = None) -> list[ReadableSpan]:
        found = self._exporter.get_finished_spans()
        return [
            span
            for span in found
            if operation is None or (span.attributes or {}).get("messaging.operation.name") == operation
        ]

    def one(self, operation: str) -> ReadableSpan:
        (span,) = self.all(operation)
        return span

    async def have(self, operation: str, count: int) -> list[ReadableSpan]:
        await eventually(lambda: len(self.all(operation)) >= count)
        assert len(self.all(operation)) == count
        return self.all(operation)


@pytest.fixture
def provider() -> TracerProvider:
    return TracerProvider()


@pytest.fixture
def spans(provider: TracerProvider) -> Iterator[Spans]:
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    telemetry.instrument(provider)
    yield Spans(exporter)
    telemetry.uninstrument()


def span_id(span: ReadableSpan | None) -> int:
    assert span is not None
    return span.context.span_id


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def is_child(child: ReadableSpan, parent: ReadableSpan) -> bool:
    return (
        child.parent is not None
        and child.parent.span_id == parent.context.span_id
        and child.context.trace_id == parent.context.trace_id
    )


def links(span: ReadableSpan) -> list[int]:
    return [link.context.span_id for link in span.links]


async def test_a_publish_and_the_callback_that_it_leads_to_are_one_trace(
    channel: Channel, queue: Queue, spans: Spans, provider: TracerProvider
) -> None:
    inside: list[int] = []

    async def callback(message: IncomingMessage) -> None:
        await asyncio.sleep(0.001)
        inside.append(get_current_span().get_span_context().span_id)
        await message.ack()

    await queue.consume(callback)
    tracer = provider.get_tracer("test")
    with tracer.start_as_current_span("request") as request:
        message = Message(b"body", message_id="m1", correlation_id="c1")
        await channel.default_exchange.publish(message, queue.name)
    (process,) = await spans.have("process", 1)
    publish = spans.one("publish")
    assert publish.parent is not None
    assert publish.parent.span_id == request.get_span_context().span_id
    assert is_child(process, publish)
    assert inside == [span_id(process)]
    assert (publish.kind, process.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER)
    assert (publish.name, process.name) == ("publish amq.default", f"process {queue.name}")
    common = {
        "messaging.system": "rabbitmq",
        "messaging.destination.name": queue.name,
        "messaging.rabbitmq.destination.routing_key": queue.name,
        "messaging.message.id": "m1",
        "messaging.message.conversation_id": "c1",
        "messaging.message.body.size": 4,
    }
    parameters = channel.wire.transport.parameters
    common |= {"server.address": parameters.host, "server.port": parameters.port}
    assert attributes(publish) == {
        **common,
        "messaging.operation.name": "publish",
        "messaging.operation.type": "send",
    }
    assert attributes(process) == {
        **common,
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.rabbitmq.message.delivery_tag": 1,
    }
    assert publish.status.status_code == process.status.status_code == StatusCode.UNSET


async def test_the_destination_names_exchange_key_and_queue_once_each(
    channel: Channel, queue: Queue, spans: Spans, name: str
) -> None:
    exchange = await channel.declare_exchange(name, auto_delete=True)
    await queue.bind(exchange, "key")
    await queue.bind(exchange, queue.name)
    await queue.consume(lambda message: Ack)
    await exchange.publish(Message(b""), "key")
    await exchange.publish(Message(b""), queue.name)
    one, two = await spans.have("process", 2)
    assert attributes(one)["messaging.destination.name"] == f"{name}:key:{queue.name}"
    assert attributes(two)["messaging.destination.name"] == f"{name}:{queue.name}"
    assert attributes(spans.all("publish")[0])["messaging.destination.name"] == f"{name}:key"
    assert spans.all("publish")[0].name == f"publish {name}"


async def test_the_message_and_its_headers_stay_the_user_s(channel: Channel, queue: Queue, spans: Spans) -> None:
    headers = {"mine": 1, "nested": {"a": [1]}}
    message = Message(b"", headers=headers)
    bare = Message(b"")
    before = message.wire_properties()
    for _ in range(2):  # it may be published again
        await channel.default_exchange.publish(message, queue.name)
    await channel.default_exchange.publish(bare, queue.name)
    await channel.default_exchange.publish_many([message, (message, queue.name)], queue.name)
    assert message.wire_properties() == before
    assert message.headers == headers == {"mine": 1, "nested": {"a": [1]}}
    assert bare.wire_properties().headers is None
    telemetry.uninstrument()
    came = await queue.get_many(5)
    assert [each.headers.get("mine") for each in came] == [1, 1, None, 1, 1]
    parents = [str(each.headers["traceparent"]) for each in came]
    one, two, three, many = (f"{span_id(span):016x}" for span in spans.all("publish"))
    assert [parent.split("-")[2] for parent in parents] == [one, two, three, many, many]


async def test_a_subclass_of_message_is_sent_as_it_wants_to_be(channel: Channel, queue: Queue, spans: Spans) -> None:
    class Stamped(Message):
        def wire_properties(self) -> Any:
            return super().wire_properties()._replace(app_id="stamped")

    await channel.default_exchange.publish(Stamped(b""), queue.name)
    telemetry.uninstrument()
    message = await queue.get()
    assert message.app_id == "stamped"
    assert "traceparent" in message.headers


async def test_contexts_do_not_leak_from_one_callback_into_another(
    channel: Channel, queue: Queue, spans: Spans, provider: TracerProvider
) -> None:
    seen: list[tuple[bytes, int, object]] = []

    async def callback(message: IncomingMessage) -> None:
        context.attach(baggage.set_baggage("who", message.body))  # and never detached
        if int(message.body) % 2:
            await asyncio.sleep(0.001 * (10 - int(message.body)))
        seen.append((message.body, get_current_span().get_span_context().span_id, baggage.get_baggage("who")))
        await channel.default_exchange.publish(Message(b"", message_id=message.body.decode()), "nowhere")
        await message.ack()

    with provider.get_tracer("test").start_as_current_span("startup"):  # of which callbacks are no part
        await queue.consume(callback)
    await fill(channel, queue, [b"%d" % i for i in range(10)])
    processed = await spans.have("process", 10)
    by_id = {span_id(span): span for span in processed}
    assert len({found for _, found, _ in seen}) == 10
    assert all(who == body for body, _, who in seen)
    inner = [span for span in spans.all("publish") if "messaging.message.id" in attributes(span)]
    sizes = {body: found for body, found, _ in seen}
    for span in inner:
        assert span.parent is not None
        assert span.parent.span_id in by_id
        assert span.parent.span_id == sizes[attributes(span)["messaging.message.id"].encode()]
    assert not get_current_span().get_span_context().is_valid


@pytest.mark.expects_errors
async def test_a_callback_that_fails_says_so_on_its_span(channel: Channel, queue: Queue, spans: Spans) -> None:
    async def callback(message: IncomingMessage) -> None:
        async with message.process():
            raise LookupError("no such thing")

    await queue.consume(callback)
    await fill(channel, queue, [b""])
    (span,) = await spans.have("process", 1)  # process() has none of its own there
    assert span.status.status_code == StatusCode.ERROR
    assert span.status.description == "no such thing"
    assert attributes(span)["error.type"] == "LookupError"
    assert [event.name for event in span.events] == ["exception"]


async def test_callbacks_of_every_kind_have_a_span(channel: Channel, queue: Queue, spans: Spans) -> None:
    current: list[int] = []

    def plain(message: IncomingMessage) -> object:
        current.append(get_current_span().get_span_context().span_id)
        return Ack

    class Callable:
        async def __call__(self, message: IncomingMessage) -> object:
            return plain(message)

    for options in ({"callback": plain}, {"callback": plain, "thread": True}, {"callback": Callable()}):
        consumer = await queue.consume(**options)  # type: ignore[arg-type]
        await fill(channel, queue, [b""])
        await spans.have("process", len(current) or 1)
        await consumer.stop()
    assert current == [span_id(span) for span in await spans.have("process", 3)]
    with pytest.raises(TypeError, match="plain functions"):
        await queue.consume(Callable(), thread=True)
    with pytest.raises(TypeError, match="callable"):
        await queue.consume("callback")  # type: ignore[arg-type]


async def test_an_iterator_has_a_span_for_each_block_of_process(channel: Channel, queue: Queue, spans: Spans) -> None:
    await fill(channel, queue, [b"good", b"bad"])
    current = []
    async with queue.iterator() as messages:
        for _ in range(2):
            message = await anext(messages)
            try:
                async with message.process():
                    current.append(get_current_span().get_span_context().span_id)
                    if message.body == b"bad":
                        raise LookupError("bad")
            except LookupError:
                pass
            assert not get_current_span().get_span_context().is_valid
    good, bad = spans.all("process")
    assert current == [span_id(good), span_id(bad)]
    assert all(map(is_child, (good, bad), spans.all("publish")))
    assert good.name == f"process {queue.name}"
    assert attributes(good)["server.port"] == channel.wire.transport.parameters.port
    assert (good.status.status_code, bad.status.status_code) == (StatusCode.UNSET, StatusCode.ERROR)
    await holds(channel, queue, 0)


async def test_a_batch_is_linked_with_the_publishers_of_its_messages(
    channel: Channel, queue: Queue, spans: Spans
) -> None:
    await fill(channel, queue, [b"1", b"2", b"3"])
    async with queue.batches(3) as batches, (await anext(batches)).process():
        inside = get_current_span().get_span_context().span_id
    span = spans.one("process")
    assert span_id(span) == inside
    assert span.name == f"process {queue.name}"
    assert attributes(span)["messaging.batch.message_count"] == 3
    assert links(span) == [span_id(each) for each in spans.all("publish")]
    assert span.parent is None


async def test_fetching_has_a_span_that_is_linked(channel: Channel, queue: Queue, spans: Spans) -> None:
    with pytest.raises(QueueEmpty):
        await queue.get()
    assert await queue.get(fail=False) is None
    assert await queue.get_many(3) == []
    assert spans.all("receive") == [], "there was nothing"
    await fill(channel, queue, [b"1", b"2", b"3"])
    message = await queue.get()
    await queue.get_many(5)
    one, many = spans.all("receive")
    published = [span_id(span) for span in spans.all("publish")]
    assert (links(one), links(many)) == (published[:1], published[1:])
    assert one.kind == SpanKind.CLIENT
    assert one.name == f"receive {queue.name}"
    assert one.start_time is not None
    assert one.end_time is not None
    assert one.end_time > one.start_time
    async with message.process():
        pass
    assert spans.one("process").name == "process amq.default"  # a fetched message does not know its queue
    gone = await channel.get_queue("no-such-queue", ensure=False)
    with pytest.raises(Exception, match="NOT_FOUND"):
        await gone.get()
    assert spans.all("receive")[-1].status.status_code == StatusCode.ERROR


async def test_what_becomes_of_a_publish_is_on_its_span(channel: Channel, spans: Spans) -> None:
    exchange = channel.default_exchange
    full = await channel.declare_queue(exclusive=True, arguments={"x-max-length": 0, "x-overflow": "reject-publish"})
    assert isinstance(await exchange.publish(Message(b""), "nowhere"), ReturnedMessage)
    with pytest.raises(MessageNacked):
        await exchange.publish(Message(b""), full.name)
    with pytest.raises(ValueError, match="255"):
        exchange.publish(Message(b""), "x" * 256)
    cancelled = exchange.publish_nowait(Message(b""), full.name)
    assert isinstance(cancelled, asyncio.Future)
    cancelled.cancel()
    await asyncio.sleep(0)
    returned, nacked, refused, given_up = spans.all("publish")
    assert [span.status.status_code for span in (returned, nacked, refused)] == [StatusCode.ERROR] * 3
    assert [(event.name, dict(event.attributes or {})) for event in returned.events] == [
        ("returned", {"reply_code": 312, "reply_text": "NO_ROUTE"})
    ]
    assert attributes(nacked)["error.type"] == "leveret.exceptions.MessageNacked"
    assert attributes(refused)["error.type"] == "ValueError"
    assert [event.name for event in given_up.events] == ["cancelled"]


async def test_a_failure_that_nobody_awaits_is_still_told(
    channel: Channel, queue: Queue, spans: Spans, caplog: pytest.LogCaptureFixture
) -> None:
    unretrieved = Outcome.unretrieved
    full = await channel.declare_queue(exclusive=True, arguments={"x-max-length": 0, "x-overflow": "reject-publish"})
    channel.default_exchange.publish(Message(b""), full.name)
    await spans.have("publish", 1)
    await eventually(lambda: Outcome.unretrieved == unretrieved + 1)


async def test_a_raised_return_is_an_exception_on_the_span(channel: Channel, spans: Spans) -> None:
    strict = await channel._connection.channel(on_return_raises=True)
    with pytest.raises(MessageReturned):
        await strict.default_exchange.publish(Message(b""), "nowhere")
    assert attributes(spans.one("publish"))["error.type"] == "leveret.exceptions.MessageReturned"


async def test_publish_many_has_one_span_and_its_report_is_about_the_user_s_messages(
    channel: Channel, queue: Queue, spans: Spans
) -> None:
    good, bad = Message(b"good"), Message(b"bad")
    report = await channel.default_exchange.publish_many([(good, queue.name), (bad, "nowhere"), (good, queue.name)])
    assert [failure.message for failure in report.failures] == [bad]
    assert report.failures[0].message is bad
    span = spans.one("publish")
    assert attributes(span)["messaging.batch.message_count"] == 3
    assert [event.name for event in span.events] == ["failed"]
    assert span.status.status_code == StatusCode.ERROR
    with pytest.raises(PublishManyFailed):
        report.raise_for_failures()
    consumer = await queue.consume(lambda message: Ack)
    processed = await spans.have("process", 2)
    assert all(is_child(each, span) for each in processed)
    await consumer.stop()


async def test_publish_many_takes_and_closes_what_it_takes_without_spans(
    channel: Channel, queue: Queue, spans: Spans
) -> None:
    closed = False

    async def generator() -> Any:
        nonlocal closed
        try:
            yield Message(b"1")
            yield Message(b"2"), queue.name
            yield "no message"
        finally:
            closed = True

    with pytest.raises(TypeError, match=r"message at index 2 of publish_many.*'no message'") as caught:
        await channel.default_exchange.publish_many(generator(), queue.name)
    assert closed
    assert caught.value.publish_report.confirmed == 2  # type: ignore[attr-defined]
    for nonsense in (Message(b"1"), 5):
        with pytest.raises(TypeError, match="an iterable of messages"):
            await channel.default_exchange.publish_many(nonsense, queue.name)  # type: ignore[arg-type]
    report = await channel.default_exchange.publish_many((Message(b"%d" % i) for i in range(3)), queue.name)
    assert report.confirmed == 3
    assert len(await drain(queue)) == 5
    await channel.close()
    with pytest.raises(ChannelInvalidStateError):
        await channel.default_exchange.publish_many([Message(b"")], queue.name)


async def test_without_confirms_the_span_ends_with_the_call(channel: Channel, queue: Queue, spans: Spans) -> None:
    plain = await channel._connection.channel(publisher_confirms=False)
    plain.default_exchange.publish(Message(b""), queue.name)
    assert spans.one("publish").status.status_code == StatusCode.UNSET


async def test_linked_processing_is_a_trace_of_its_own(
    channel: Channel, queue: Queue, spans: Spans, provider: TracerProvider
) -> None:
    telemetry.instrument(provider, linked=True)
    await queue.consume(lambda message: Ack)
    await fill(channel, queue, [b""])
    (process,) = await spans.have("process", 1)
    publish = spans.one("publish")
    assert process.parent is None
    assert process.context.trace_id != publish.context.trace_id
    assert links(process) == [span_id(publish)]


async def test_a_message_that_came_without_a_context_begins_a_trace(
    channel: Channel, queue: Queue, spans: Spans, provider: TracerProvider
) -> None:
    telemetry.uninstrument()
    await fill(channel, queue, [b""])
    await fill(channel, queue, [b""], headers={"traceparent": 5, "tracestate": b"\xff"})
    telemetry.instrument(provider)
    await queue.consume(lambda message: Ack)
    for span in await spans.have("process", 2):
        assert span.parent is None
        assert span.links == ()


async def test_what_is_sent_on_stays_in_its_trace(channel: Channel, queue: Queue, spans: Spans) -> None:
    await channel.default_exchange.publish(Message(b""), queue.name)
    message = await queue.get()
    await channel.default_exchange.publish(message, queue.name)
    first, second = spans.all("publish")
    assert is_child(second, first)


@pytest.mark.expects_errors
async def test_a_message_that_is_tried_again_stays_in_its_trace(channel: Channel, spans: Spans, name: str) -> None:
    queue = await channel.declare_queue(name, durable=True, arguments=KEPT)
    tries = []

    async def callback(message: IncomingMessage) -> None:
        tries.append(message)
        if len(tries) == 1:
            raise LookupError("the first time")

    await queue.consume(callback, retry=MessageRetry(delays=[0.05]))
    await channel.default_exchange.publish(Message(b""), queue.name)
    first, second = await spans.have("process", 2)
    assert first.context.trace_id == second.context.trace_id
    assert first.status.status_code == StatusCode.ERROR
    assert second.status.status_code == StatusCode.UNSET
    await queue.delete(if_unused=False, if_empty=False)


async def test_spans_go_on_over_a_reconnect(
    robust: RobustConnection, link: FaultProxy, spans: Spans, name: str
) -> None:
    channel = await robust.channel()
    queue = await channel.declare_queue(name, arguments=KEPT)
    await queue.consume(lambda message: Ack)
    await fill(channel, queue, [b"before"])
    await spans.have("process", 1)
    link.up.blackhole = True  # what is sent now is lost
    lost = asyncio.ensure_future(channel.default_exchange.publish(Message(b"lost"), queue.name))
    again = asyncio.ensure_future(channel.default_exchange.publish(Message(b"again"), queue.name, retry_unknown=True))
    await asyncio.sleep(0)
    link.rst()
    link.heal()
    await restored(robust, 2)
    with pytest.raises(PublishOutcomeUnknown):
        await lost
    await again
    await fill(channel, queue, [b"after"])
    before, unknown, repeated, after = spans.all("publish")
    assert attributes(unknown)["error.type"] == "leveret.exceptions.PublishOutcomeUnknown"

    def parents() -> set[int]:
        return {span.parent.span_id for span in spans.all("process") if span.parent is not None}

    # The first one may come twice, because its ack may be lost, too.
    await eventually(lambda: parents() == {span_id(before), span_id(repeated), span_id(after)})


async def test_uninstrument_puts_everything_back(channel: Channel, queue: Queue, spans: Spans) -> None:
    consumer = await queue.consume(lambda message: Ack)
    assert inspect.iscoroutinefunction(Exchange.publish)
    assert Exchange.publish.__doc__ is not None
    replaced = [vars(cls)[name] for cls, name, _ in telemetry._REPLACEMENTS]
    telemetry.uninstrument()
    telemetry.uninstrument()  # does nothing
    originals = [vars(cls)[name] for cls, name, _ in telemetry._REPLACEMENTS]
    assert all(each.__module__ != "leveret.telemetry" for each in originals)
    assert [each.__wrapped__ for each in replaced] == originals
    await fill(channel, queue, [b""])
    await eventually(lambda: consumer.delivered)
    assert spans.all() == [], "consumers that had begun have none either"
