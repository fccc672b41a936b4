"""Spans of OpenTelemetry for what is published and consumed. It needs ``pip install leveret[otel]``.

::

    from leveret.telemetry import instrument

    instrument()

From then on every publish has a span, whose context goes along in the headers of the message, and what becomes of the
message on the other side has a span that belongs to it. :func:`instrument` puts other methods into the place of
leveret's, and :func:`uninstrument` puts those back, so a program that does not ask for spans pays nothing. What is in
the spans is :mod:`leveret.spans`'s.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Generator, Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, Final, cast

from leveret.batches import Batch, BatchContext
from leveret.exceptions import QueueEmpty
from leveret.exchange import Exchange
from leveret.message import IncomingMessage, Message, ProcessContext
from leveret.outcome import DONE, returns_awaitable
from leveret.queue import Queue
from leveret.report import PublishReport
from leveret.spans import Tracing, end_publish, end_publish_many, record
from leveret.threads import in_thread

try:
    from opentelemetry.context import attach, detach, get_value, set_value
    from opentelemetry.trace import INVALID_SPAN, Span, TracerProvider, set_span_in_context
except ImportError as exc:
    raise ImportError("leveret.telemetry needs opentelemetry-api: pip install leveret[otel]") from exc

_MESSAGE: Final = "leveret-message"
"""Key of the message that the running callback is about."""


class _CarrierStream:
    """The messages of a ``publish_many()``, as carriers."""

    def __init__(self, messages: Iterable[Any], carry: Callable[[Any], Any]) -> None:
        self.messages = messages
        self._carry = carry

    def __iter__(self) -> Iterator[Any]:
        return map(self._carry, self.messages)


class _SizedCarrierStream(_CarrierStream):
    """One that is known to end, which makes a difference when the channel is closed."""

    messages: Any

    def __len__(self) -> int:
        return len(self.messages)


async def _carry_async(messages: AsyncIterable[Any], carry: Callable[[Any], Any]) -> AsyncGenerator[Any]:
    iterator = aiter(messages)
    try:
        async for item in iterator:
            yield carry(item)
    finally:
        if isinstance(iterator, AsyncGenerator):
            await iterator.aclose()


# ------------------------------------------------------------------------------- what replaces leveret's methods


def _publish(tracing: Tracing, original: Any) -> Any:
    @functools.wraps(original)
    def publish(self: Exchange, message: Message, routing_key: str, **options: Any) -> Any:
        if not isinstance(message, Message):
            return original(self, message, routing_key, **options)
        span = tracing.start_publish(self, routing_key, message)
        try:
            outcome: Any = original(self, tracing.carrier(span)(message), routing_key, **options)
        except BaseException as exc:
            record(span, exc)
            span.end()
            raise
        if outcome is DONE:  # without publisher confirms nobody knows more
            span.end()
        else:
            outcome.on_end(functools.partial(end_publish, span))
        return outcome

    return returns_awaitable(publish)


def _publish_many(tracing: Tracing, original: Any) -> Any:
    @functools.wraps(original)
    async def publish_many(self: Exchange, messages: Any, routing_key: str | None = None, **options: Any) -> Any:
        span = tracing.start_publish(self, routing_key, None)
        make = tracing.carrier(span)

        def carry(item: Any) -> Any:
            if isinstance(item, Message):
                return make(item)
            pair = cast("tuple[Any, ...]", item)
            if isinstance(item, tuple) and len(pair) == 2 and isinstance(pair[0], Message):
                return (make(pair[0]), pair[1])
            return pair

        given = messages
        if isinstance(messages, AsyncIterable):
            given = _carry_async(given, carry)
        elif isinstance(messages, Iterable) and not isinstance(messages, Message):
            stream = _SizedCarrierStream if isinstance(messages, Sized) else _CarrierStream
            given = stream(given, carry)
        try:
            report: PublishReport = await original(self, given, routing_key, **options)
        except BaseException as exc:
            if isinstance(report_so_far := getattr(exc, "publish_report", None), PublishReport):
                end_publish_many(span, report_so_far)
            record(span, exc)
            raise
        else:
            end_publish_many(span, report)
            return report
        finally:
            span.end()

    return publish_many


@contextlib.contextmanager
def _processing(tracing: Tracing, message: IncomingMessage, queue: Queue) -> Generator[None]:
    """The span of a callback."""
    if _active is not tracing:  # uninstrument() was called
        yield
        return
    span, context = tracing.start_process(message, queue.name)
    token = attach(set_value(_MESSAGE, message, context))
    try:
        yield
    except BaseException as exc:
        record(span, exc)
        raise
    finally:
        detach(token)
        span.end()


def _traced(tracing: Tracing, queue: Queue, callback: Callable[[IncomingMessage], Any]) -> Any:
    async def traced(message: IncomingMessage) -> object:
        with _processing(tracing, message, queue):
            result = callback(message)
            return await result if inspect.isawaitable(result) else result

    return traced


def _traced_in_thread(tracing: Tracing, queue: Queue, callback: Callable[[IncomingMessage], object]) -> Any:
    def traced(message: IncomingMessage) -> object:
        with _processing(tracing, message, queue):
            return callback(message)

    return traced


def _consume(tracing: Tracing, original: Any) -> Any:
    @functools.wraps(original)
    async def consume(self: Queue, callback: Any, *args: Any, **options: Any) -> Any:
        if options.get("thread"):
            in_thread(callback)  # raises what it has to raise, which a plain function around it would hide
            callback = _traced_in_thread(tracing, self, callback)
        elif callable(callback):
            callback = _traced(tracing, self, callback)
        # Callbacks run in a copy of this context: what began the consumer is not what they are about.
        token = attach(set_span_in_context(INVALID_SPAN))
        try:
            return await original(self, callback, *args, **options)
        finally:
            detach(token)

    return consume


def _get(tracing: Tracing, original: Any) -> Any:
    @functools.wraps(original)
    async def get(self: Queue, *args: Any, **options: Any) -> Any:
        began = time.time_ns()
        try:
            result = await original(self, *args, **options)
        except QueueEmpty:
            raise
        except Exception as exc:
            tracing.received(self, [], began, exc)
            raise
        messages = cast("list[IncomingMessage]", result if isinstance(result, list) else [result])
        if any(messages):
            tracing.received(self, messages, began, None)
        return cast("Any", result)

    return get


class _TracedProcess(ProcessContext):
    """``async with message.process()``, with a span."""

    __slots__ = ("_span", "_token", "_tracing")

    def __init__(self, tracing: Tracing, message: IncomingMessage, **options: bool) -> None:
        super().__init__(message, **options)
        self._tracing = tracing

    async def __aenter__(self) -> IncomingMessage:
        self._span, context = self._tracing.start_process(self._message, None)
        self._token = attach(context)
        return await super().__aenter__()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        detach(self._token)
        with _ending(self._span, exc):
            await super().__aexit__(exc_type, exc, tb)


class _TracedBatch(BatchContext):
    """``async with batch.process()``, with a span."""

    __slots__ = ("_span", "_token", "_tracing")

    def __init__(self, tracing: Tracing, batch: Batch, **options: bool) -> None:
        super().__init__(batch, **options)
        self._tracing = tracing

    async def __aenter__(self) -> Batch:
        self._span, context = self._tracing.start_batch(self._batch)
        self._token = attach(context)
        return await super().__aenter__()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        detach(self._token)
        with _ending(self._span, exc):
            await super().__aexit__(exc_type, exc, tb)


@contextlib.contextmanager
def _ending(span: Span, error: BaseException | None) -> Generator[None]:
    """End *span* after the block, which may fail as well."""
    try:
        yield
    except BaseException as exc:
        error = error or exc
        raise
    finally:
        if error is not None:
            record(span, error)
        span.end()


def _process(tracing: Tracing, original: Any) -> Any:
    @functools.wraps(original)
    def process(
        self: IncomingMessage,
        requeue: bool = False,
        reject_on_redelivered: bool = False,
        ignore_processed: bool = False,
    ) -> ProcessContext:
        options = {
            "requeue": requeue,
            "reject_on_redelivered": reject_on_redelivered,
            "ignore_processed": ignore_processed,
        }
        if get_value(_MESSAGE) is self:  # its callback has a span
            return ProcessContext(self, **options)
        return _TracedProcess(tracing, self, **options)

    return process


def _process_batch(tracing: Tracing, original: Any) -> Any:
    @functools.wraps(original)
    def process(self: Batch, requeue: bool = False, reject_on_redelivered: bool = False) -> BatchContext:
        return _TracedBatch(tracing, self, requeue=requeue, reject_on_redelivered=reject_on_redelivered)

    return process


_REPLACEMENTS: Final[tuple[tuple[type, str, Callable[[Tracing, Any], Any]], ...]] = (
    (Exchange, "publish", _publish),  # which publish_nowait() calls
    (Exchange, "publish_many", _publish_many),
    (Queue, "consume", _consume),
    (Queue, "get", _get),
    (Queue, "get_many", _get),
    (IncomingMessage, "process", _process),
    (Batch, "process", _process_batch),
)
_originals: Final[dict[tuple[type, str], Any]] = {}
_active: Tracing | None = None


def instrument(tracer_provider: TracerProvider | None = None, *, linked: bool = False) -> None:
    """Have spans made, on all connections of this process; call it before consumers begin.

    Calling it again changes how they are made; consumers that have begun then stop having some.

    Args:
        tracer_provider: None for the global one of OpenTelemetry.
        linked: begin a trace of its own for the work on a message, linked with the one of its publisher, instead of
            going on with that. Batches always do.

    https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/
    """
    global _active
    uninstrument()
    _active = tracing = Tracing(tracer_provider, linked)
    for cls, name, replace in _REPLACEMENTS:
        original = _originals[cls, name] = vars(cls)[name]
        setattr(cls, name, replace(tracing, original))


def uninstrument() -> None:
    """Have no more spans made, also by consumers that have begun; without :func:`instrument` it does nothing."""
    global _active
    _active = None
    for (cls, name), original in _originals.items():
        setattr(cls, name, original)
    _originals.clear()
