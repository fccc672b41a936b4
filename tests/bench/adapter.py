"""What a scenario asks of a client."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

CONTENT_TYPE = "application/octet-stream"


class _Done:
    """An awaitable that never waits."""

    def __await__(self) -> Generator[None]:
        return
        yield


DONE = _Done()
"""What a call that is complete when it returns gives to ``await``."""


class Adapter:
    """A client, behind the few calls that the scenarios are made of; a scenario is skipped where one is missing.

    An adapter does what the documentation of its client shows, no less (a robust connection, where there is one) and
    no more. Blocking clients have the same calls, which never wait in the event loop then.
    """

    concurrent = True
    """Whether many calls can be in flight; False for blocking clients."""

    connection: Any

    # -- connections and channels

    async def connect(self, url: str) -> None:
        """Open `connection`."""
        raise NotImplementedError

    async def close(self) -> None:
        """Close `connection`."""
        raise NotImplementedError

    async def channel(self, *, confirms: bool = True) -> Any:
        """Open a channel."""
        raise NotImplementedError

    async def open(self, url: str, *, confirms: bool = True) -> Any:
        """Connect, and open a channel."""
        await self.connect(url)
        return await self.channel(confirms=confirms)

    async def qos(self, channel: Any, prefetch: int) -> None:
        """Set the prefetch count: also the round trip after which all that was sent has been read."""
        raise NotImplementedError

    async def declare(self, channel: Any, name: str) -> Any:
        """Declare an exclusive queue; the object that the client has for it."""
        raise NotImplementedError

    # -- publishing

    async def publisher(
        self, channel: Any, exchange: str, key: str, body: bytes, *, persistent: bool = False
    ) -> Callable[[], Awaitable[object]]:
        """A function that makes a message and publishes it; awaiting waits for the confirm, if there are any."""
        raise NotImplementedError

    async def publish_many(self, channel: Any, exchange: str, key: str, body: bytes, n: int) -> None:
        """Publish *n* messages, 1,000 in flight: with ``gather`` where the client has nothing of its own for it."""
        if not self.concurrent:
            raise NotImplementedError
        publish = await self.publisher(channel, exchange, key, body)
        for begun in range(0, n, 1000):
            await asyncio.gather(*[publish() for _ in range(min(1000, n - begun))])

    def sender(self, channel: Any) -> Callable[..., Awaitable[object]]:
        """A function ``send(queue, body, correlation_id=None, reply_to=None)``, for the default exchange."""
        raise NotImplementedError

    async def procedure(self, channel: Any, name: str) -> Callable[[str], Awaitable[object]]:
        """Register a function that returns its argument, with the client's own RPC; a function that calls it."""
        raise NotImplementedError

    # -- consuming; all but `listen` return when they had n messages

    async def consume(self, channel: Any, queue: str, n: int, *, ack: bool) -> None:
        """With a callback; without *ack* the broker forgets messages as it sends them (``no_ack``)."""
        raise NotImplementedError

    async def iterate(self, channel: Any, queue: str, n: int) -> None:
        """With an iterator, acknowledging each."""
        raise NotImplementedError

    async def batches(self, channel: Any, queue: str, n: int) -> None:
        """In batches of 100, each acknowledged at once: with the iterator where the client has no batches."""
        await self.iterate(channel, queue, n)

    async def collect(self, channel: Any, queue: str, n: int) -> list[Any]:
        """The messages, as the client hands them to a callback (``no_ack``)."""
        raise NotImplementedError

    async def listen(self, channel: Any, queue: str, on_message: Callable[[bytes, str, str], Any]) -> None:
        """Call *on_message* with body, correlation_id and reply_to (``no_ack``), and await what it returns, if any."""
        raise NotImplementedError


class Blocking(Adapter):
    """A client that blocks."""

    concurrent = False
