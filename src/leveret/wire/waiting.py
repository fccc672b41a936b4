"""Publishes that wait for a channel to be there: in their order, each within its deadline, bounded in all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from leveret.exceptions import PublishNotSent
from leveret.wire.codec import Properties, PublishEncoder, encode_properties
from leveret.wire.outgoing import AwaitedPublish, Publish
from leveret.wire.publisher import Publisher


class Budget:
    """How much may wait at a time on one connection, not counting what is bounded by others."""

    __slots__ = ("bytes", "count", "max_bytes", "max_count")

    def __init__(self, max_count: int, max_bytes: int) -> None:
        self.max_count = max_count
        self.max_bytes = max_bytes
        self.count = 0
        self.bytes = 0

    def take(self, size: int) -> bool:
        """Make room for *size* bytes more; False if there is none."""
        if self.count >= self.max_count or (self.bytes + size > self.max_bytes and self.count):
            return False
        self.count += 1
        self.bytes += size
        return True

    def give_back(self, size: int) -> None:
        """What :meth:`take` took."""
        self.count -= 1
        self.bytes -= size


class WaitingRoom:
    """Publishes for one channel while it has no wire.

    Args:
        budget: shared by the channels of a connection.
        timeout: seconds for a publish that names none.
        frame_max: bytes; what could not be sent anyway is refused at once.
        why: says why they wait, for errors.
    """

    __slots__ = ("_budget", "_frame_max", "_timeout", "_waiting", "_why")

    def __init__(self, budget: Budget, timeout: float, frame_max: int, why: Callable[[], str]) -> None:
        self._budget = budget
        self._timeout = timeout
        self._frame_max = frame_max
        self._why = why
        self._waiting: dict[Publish, None] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def publish(
        self,
        exchange: str,
        routing_key: str,
        properties: Properties,
        body: bytes,
        mandatory: bool,
        timeout: float | None,
        retry_unknown: bool = False,
    ) -> Coroutine[Any, Any, Any]:
        """As :meth:`~leveret.wire.publisher.Publisher.publish`, but later.

        Raises:
            PublishNotSent: too many wait already.
            ValueError, TypeError: a property that AMQP cannot carry.
            MessageTooLarge: the headers do not fit into one frame.
        """
        encoded = encode_properties(properties)
        seconds = self._timeout if timeout is None else timeout
        loop = asyncio.get_running_loop()
        publish = AwaitedPublish(
            self, loop, None, exchange, routing_key, encoded, body, mandatory, seconds, retry_unknown
        )
        self.send(publish)
        return publish

    def send(self, publish: Publish) -> None:
        """As :meth:`publish`, for one that is made already.

        Raises:
            PublishNotSent: too many wait already.
            ValueError: exchange or routing key over 255 bytes.
            MessageTooLarge: the headers do not fit into one frame.
        """
        # This raises what sending it would.
        encoder = PublishEncoder(1, self._frame_max)
        encoder.encode(publish.exchange, publish.routing_key, publish.mandatory, publish.properties, b"")
        if not self.add(publish):
            budget = self._budget
            raise PublishNotSent(
                f"{budget.count} publishes ({budget.bytes} bytes) wait for the connection already: {self._why()}"
            )

    def add(self, publish: Publish) -> bool:
        """Let *publish* wait behind the others; False if there is no room."""
        if not (publish.is_bounded or self._budget.take(len(publish.body))):
            return False
        self._waiting[publish] = None
        publish.holder = self
        publish.on_end(self._forget)
        publish.limit_time()
        return True

    def hand_over(self, publisher: Publisher) -> None:
        """The channel is back: *publisher* sends them, in their order."""
        for publish in self._take_all():
            publisher.adopt(publish)

    def fail(self, error: Exception) -> None:
        """The channel will not come back."""
        for publish in self._take_all():
            lost = publish.unsent(f"it waited for a channel that does not come back: {error}")
            lost.__cause__ = error
            publish.fail(lost)

    def _take_all(self) -> list[Publish]:
        if not self._waiting:
            return []
        waiting, self._waiting = self._waiting, {}
        for publish in waiting:
            self._give_back(publish)
        return [publish for publish in waiting if not publish.done()]

    def _forget(self, publish: Publish) -> None:
        if publish in self._waiting:
            del self._waiting[publish]
            self._give_back(publish)

    def _give_back(self, publish: Publish) -> None:
        if not publish.is_bounded:
            self._budget.give_back(len(publish.body))

    def timeout_error(self, publish: Publish) -> Exception:
        """What a publish fails with whose time is up."""
        return publish.unsent(f"not sent within {publish.timeout:g} s: {self._why()} ({publish})", in_time=True)
