"""Spans: when they begin and end, what they say, and how their context travels with a message.

Only the API of OpenTelemetry is used. Attributes have the names of its conventions for messaging; as those are not
final, they are written out here.

https://opentelemetry.io/docs/specs/semconv/messaging/rabbitmq/
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final

from leveret._version import __version__
from leveret.batches import Batch
from leveret.channel import Channel
from leveret.exchange import Exchange
from leveret.iterator import QueueConsumer
from leveret.message import IncomingMessage, Message, ReturnedMessage
from leveret.queue import Queue
from leveret.report import PublishReport
from leveret.wire.channel import WireChannel
from leveret.wire.codec import Properties

try:
    from opentelemetry import propagate
    from opentelemetry.context import Context, get_current
    from opentelemetry.propagators.textmap import Getter
    from opentelemetry.trace import (
        Link,
        Span,
        SpanKind,
        StatusCode,
        TracerProvider,
        get_current_span,
        get_tracer,
        set_span_in_context,
    )
except ImportError as exc:
    raise ImportError("leveret.telemetry needs opentelemetry-api: pip install leveret[otel]") from exc

_Attributes = dict[str, str | int]

_MAX_EVENTS: Final = 100
"""Failures of one ``publish_many()`` that are events of its span; tracers keep few more."""


_REPLY_TO: Final = "amq.rabbitmq.reply-to"
"""What the addresses of direct replies begin with. https://www.rabbitmq.com/docs/direct-reply-to"""


class _HeaderGetter(Getter[Mapping[str, Any]]):
    """Reads a context out of headers, whoever wrote them."""

    def get(self, carrier: Mapping[str, Any], key: str) -> list[str] | None:
        value = carrier.get(key)
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        return [value] if isinstance(value, str) else None

    def keys(self, carrier: Mapping[str, Any]) -> list[str]:
        return list(carrier)


_getter: Final = _HeaderGetter()


class Carrier(Message):
    """A message with the context of a span in its headers, sent in the place of the one that is *given*.

    It asks that one for everything else when it is sent, so classes of the user's may do as they like.
    """

    __slots__ = ("_context", "given")

    def __init__(self, given: Message, context: Mapping[str, str]) -> None:
        self.given = given
        self._body = given.body
        self._properties = given._properties
        self._locked = True
        self._context = context

    def wire_properties(self) -> Properties:
        """Those of the given one, with the context."""
        properties = self.given.wire_properties()
        return properties._replace(headers={**(properties.headers or {}), **self._context})


class Tracing:
    """How spans are made."""

    def __init__(self, tracer_provider: TracerProvider | None, linked: bool) -> None:
        self._tracer = get_tracer("leveret", __version__, tracer_provider)
        self._linked = linked

    # ----------------------------------------------------------------------------------------------- publishing

    def start_publish(self, exchange: Exchange, routing_key: str | None, message: Message | None) -> Span:
        """Start the span of a publish; without a *message*, of many."""
        attributes = _attributes("publish", "send", exchange.name, routing_key, None)
        attributes |= _server(exchange.channel)
        parent = get_current()
        if message is not None:
            attributes |= _of_message(message)
            if not get_current_span(parent).get_span_context().is_valid:
                # What is sent on, after it came with a context, goes on with it; leveret's own retries do so.
                parent = propagate.extract(message.wire_properties().headers or {}, parent, _getter)
        name = f"publish {exchange.name or 'amq.default'}"
        return self._tracer.start_span(name, parent, SpanKind.PRODUCER, attributes)

    def carrier(self, span: Span) -> Callable[[Message], Carrier]:
        """What makes messages carry the context of *span*."""
        headers: dict[str, str] = {}
        propagate.inject(headers, set_span_in_context(span))
        return lambda message: Carrier(message, headers)

    # ------------------------------------------------------------------------------------------------ consuming

    def received(self, queue: Queue, messages: list[IncomingMessage], began: int, error: Exception | None) -> None:
        """Make the span of a fetch that began at *began*, in nanoseconds since 1970."""
        attributes = _attributes("receive", "receive", "", None, queue.name) | _server(queue.channel)
        if len(messages) == 1:
            attributes |= _of_message(messages[0])
        attributes["messaging.batch.message_count"] = len(messages)
        links = [link for message in messages for link in _links(message)]
        span = self._tracer.start_span(
            f"receive {queue.name}", None, SpanKind.CLIENT, attributes, links, start_time=began
        )
        if error is not None:
            record(span, error)
        span.end()

    def start_process(self, message: IncomingMessage, queue: str | None) -> tuple[Span, Context]:
        """Start the span of the work on *message*, in the context of its publisher unless they are to be linked.

        Args:
            message: of a callback, or of an iterator.
            queue: where it came from; None to find that out.

        Returns:
            The span, and the context to work in.
        """
        if queue is None:
            queue = _queue_of(message)
        attributes = _attributes("process", "process", message.exchange, message.routing_key, queue)
        attributes |= _server_of(message) | _of_message(message)
        parent, links = get_current(), _links(message)
        if links and not self._linked:
            parent, links = propagate.extract(message.headers, parent, _getter), []
        name = f"process {queue or _clean(message.exchange) or 'amq.default'}"
        span = self._tracer.start_span(name, parent, SpanKind.CONSUMER, attributes, links)
        return span, set_span_in_context(span, parent)

    def start_batch(self, batch: Batch) -> tuple[Span, Context]:
        """Start the span of the work on *batch*, which is linked with the publishers of all its messages."""
        queue = _queue_of(batch[0]) if batch else None
        attributes = _attributes("process", "process", "", None, queue)
        attributes["messaging.batch.message_count"] = len(batch)
        if batch:
            attributes |= _server_of(batch[0])
        links = [link for message in batch for link in _links(message)]
        span = self._tracer.start_span(f"process {queue or 'batch'}", None, SpanKind.CONSUMER, attributes, links)
        return span, set_span_in_context(span)


# ----------------------------------------------------------------------------------------- what spans say


def _clean(text: str) -> str:
    """*text* without what is no UTF-8, as others may publish it: exporters fail on that, with all other spans."""
    return text.encode("utf-8", "replace").decode()


def _attributes(name: str, kind: str, exchange: str, routing_key: str | None, queue: str | None) -> _Attributes:
    if not exchange and routing_key and routing_key.startswith(_REPLY_TO):
        routing_key = _REPLY_TO  # what follows is another one for each caller
    parts = dict.fromkeys(_clean(part) for part in (exchange, routing_key, queue) if part)  # each once
    attributes: _Attributes = {
        "messaging.system": "rabbitmq",
        "messaging.operation.name": name,
        "messaging.operation.type": kind,
        "messaging.destination.name": ":".join(parts) or "amq.default",
    }
    if routing_key:
        attributes["messaging.rabbitmq.destination.routing_key"] = _clean(routing_key)
    return attributes


def _of_message(message: Message) -> _Attributes:
    attributes: _Attributes = {"messaging.message.body.size": message.body_size}
    if message.message_id is not None:
        attributes["messaging.message.id"] = _clean(message.message_id)
    if message.correlation_id is not None:
        attributes["messaging.message.conversation_id"] = _clean(message.correlation_id)
    if isinstance(message, IncomingMessage):
        attributes["messaging.rabbitmq.message.delivery_tag"] = message.delivery_tag
    return attributes


def _server(channel: Channel) -> _Attributes:
    return _address(channel.wire) if channel.is_initialized else {}


def _address(wire: WireChannel) -> _Attributes:
    parameters = wire.transport.parameters
    return {"server.address": parameters.host, "server.port": parameters.port}


def _wire_of(message: IncomingMessage) -> WireChannel | None:
    """The channel that brought *message*; None if it needs no acknowledgement."""
    wire = message._wire  # pyright: ignore[reportPrivateUsage]
    channel = None if wire is None else wire.channel
    return channel if isinstance(channel, WireChannel) else None


def _server_of(message: IncomingMessage) -> _Attributes:
    wire = _wire_of(message)
    return {} if wire is None else _address(wire)


def _queue_of(message: IncomingMessage) -> str | None:
    """The queue that an iterator got *message* from, where that can still be found out."""
    wire, tag = _wire_of(message), message._consumer_tag  # pyright: ignore[reportPrivateUsage]
    consumer = None if wire is None or tag is None else wire.consumer(tag)
    return consumer.queue_name if isinstance(consumer, QueueConsumer) else None


def _links(message: IncomingMessage) -> list[Link]:
    """A link to what the publisher of *message* did, if that said so."""
    context = get_current_span(propagate.extract(message.headers, Context(), _getter)).get_span_context()
    return [Link(context)] if context.is_valid else []


def _kind(error: object) -> str:
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def record(span: Span, error: BaseException) -> None:
    """Say on *span* what it ended with."""
    if isinstance(error, asyncio.CancelledError):
        span.add_event("cancelled")
        return
    span.record_exception(error)
    span.set_attribute("error.type", _kind(error))
    span.set_status(StatusCode.ERROR, _clean(str(error)))


def end_publish(span: Span, publish: asyncio.Future[Any]) -> None:
    """A publish has ended; what it ended with stays for whoever awaits it to be looked at."""
    if publish.cancelled():
        record(span, asyncio.CancelledError())
    elif (error := publish._exception) is not None:  # not exception(), after which nobody would be warned
        record(span, error)
    elif isinstance(returned := publish.result(), ReturnedMessage):
        span.add_event("returned", {"reply_code": returned.reply_code, "reply_text": returned.reply_text})
        span.set_attribute("error.type", "returned")
        span.set_status(StatusCode.ERROR, f"returned: {returned.reply_text}")
    span.end()


def end_publish_many(span: Span, report: PublishReport) -> None:
    """A ``publish_many()`` has ended; the user gets back what the user gave."""
    for number, failure in enumerate(report.failures):
        if isinstance(carrier := failure.message, Carrier):
            report.failures[number] = dataclasses.replace(failure, message=carrier.given)
        if number < _MAX_EVENTS:
            span.add_event(
                "failed",
                {
                    "index": failure.index,
                    "routing_key": _clean(failure.routing_key),
                    "error.type": _kind(failure.error),
                },
            )
    span.set_attribute("messaging.batch.message_count", report.total)
    if not report:
        first = report.failures[0].error if report.failures else report.stopped_by
        span.set_attribute("error.type", _kind(first))
        span.set_status(StatusCode.ERROR, _clean(str(report)))
