"""pika's asyncio adapter: callbacks, made awaitable as a user of it has to."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pika
from pika.adapters.asyncio_connection import AsyncioConnection

from tests.bench.adapter import CONTENT_TYPE, DONE, Adapter

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class Confirms:
    """The futures of a channel's publishes, by delivery tag."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._last = 0
        self._settled = 0

    def on_confirm(self, frame: Any) -> None:
        tag = frame.method.delivery_tag
        if frame.method.multiple:
            for earlier in range(self._settled + 1, tag + 1):
                if (waiter := self._waiting.pop(earlier, None)) is not None:
                    waiter.set_result(None)
            self._settled = tag
        else:
            self._waiting.pop(tag).set_result(None)

    def add(self) -> asyncio.Future[None]:
        self._last += 1
        waiter = self._waiting[self._last] = self._loop.create_future()
        return waiter


class Client(Adapter):
    async def connect(self, url: str) -> None:
        opened = _future()
        AsyncioConnection(
            pika.URLParameters(url),
            on_open_callback=opened.set_result,
            on_open_error_callback=lambda _, error: opened.set_exception(error),
        )
        self.connection = await opened

    async def close(self) -> None:
        closed = _future()
        self.connection.add_on_close_callback(lambda _, error: closed.set_result(error))
        self.connection.close()
        await closed

    async def channel(self, *, confirms: bool = True) -> Any:
        opened = _future()
        self.connection.channel(on_open_callback=opened.set_result)
        channel = await opened
        channel.confirms = None
        if confirms:
            channel.confirms = Confirms()
            selected = _future()
            channel.confirm_delivery(channel.confirms.on_confirm, callback=selected.set_result)
            await selected
        return channel

    async def qos(self, channel: Any, prefetch: int) -> None:
        answered = _future()
        channel.basic_qos(prefetch_count=prefetch, callback=answered.set_result)
        await answered

    async def publisher(
        self, channel: Any, exchange: str, key: str, body: bytes, *, persistent: bool = False
    ) -> Callable[[], Awaitable[object]]:
        mode = 2 if persistent else 1
        published = 0

        def publish_one() -> Awaitable[object]:
            nonlocal published
            properties = pika.BasicProperties(content_type=CONTENT_TYPE, delivery_mode=mode)
            channel.basic_publish(exchange, key, body, properties)
            if channel.confirms is not None:
                return channel.confirms.add()  # type: ignore[no-any-return]
            published += 1
            return DONE if published % 100 else asyncio.sleep(0)  # nothing is sent before the loop's next turn

        return publish_one

    def sender(self, channel: Any) -> Callable[..., Awaitable[object]]:
        def send(
            queue: str, body: bytes, correlation_id: str | None = None, reply_to: str | None = None
        ) -> Awaitable[object]:
            channel.basic_publish(
                "", queue, body, pika.BasicProperties(correlation_id=correlation_id, reply_to=reply_to)
            )
            return DONE

        return send

    async def consume(self, channel: Any, queue: str, n: int, *, ack: bool) -> None:
        done = asyncio.Event()
        seen = 0

        def on_message(channel: Any, method: Any, _properties: Any, _body: bytes) -> None:
            nonlocal seen
            if ack:
                channel.basic_ack(method.delivery_tag)
            seen += 1
            if seen == n:
                done.set()

        channel.basic_consume(queue, on_message, auto_ack=not ack)
        await done.wait()

    async def collect(self, channel: Any, queue: str, n: int) -> list[Any]:
        done = asyncio.Event()
        messages: list[Any] = []

        def on_message(_channel: Any, method: Any, properties: Any, body: bytes) -> None:
            messages.append((method, properties, body))
            if len(messages) == n:
                done.set()

        channel.basic_consume(queue, on_message, auto_ack=True)
        await done.wait()
        return messages

    async def listen(self, channel: Any, queue: str, on_message: Callable[[bytes, str, str], Any]) -> None:
        def on_incoming(_channel: Any, _method: Any, properties: Any, body: bytes) -> None:
            on_message(body, properties.correlation_id, properties.reply_to)  # what it sends is sent

        channel.basic_consume(queue, on_incoming, auto_ack=True)


def _future() -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_future()
