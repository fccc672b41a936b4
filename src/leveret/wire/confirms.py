"""Publisher confirms: number publishes, settle them, and find the one that a return belongs to.

The n-th publish after ``confirm.select`` has number n. The broker settles in any order, one by one or all up
to a number, and a mandatory message that it cannot route comes back *before* its confirm, without a number.
So a return is matched by what it carries: the oldest unsettled mandatory publish with the same exchange,
routing key, properties and body. Identical ones cannot be told apart, and need not be.

https://www.rabbitmq.com/docs/confirms
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from leveret.exceptions import ProtocolError


class Published(Protocol):
    """What is asked of a publish that waits for its confirm; *properties* are encoded."""

    exchange: str
    routing_key: str
    properties: bytes
    body: bytes
    mandatory: bool
    returned: object | None


P = TypeVar("P", bound=Published)


class Confirms(Generic[P]):
    """The unsettled publishes of one channel."""

    __slots__ = ("_indexed", "_lowest", "_returnable", "_unsettled", "last_number")

    def __init__(self) -> None:
        self.last_number = 0
        self._unsettled: dict[int, P] = {}
        self._lowest = 1  # no unsettled number is below it
        # Unsettled mandatory numbers by (exchange, routing key), built only when something is returned.
        self._returnable: dict[tuple[str, str], deque[int]] = {}
        self._indexed = 0  # the last number that was looked at for it

    def __len__(self) -> int:
        return len(self._unsettled)

    def __iter__(self) -> Iterator[P]:
        """The unsettled publishes, oldest first."""
        return iter(self._unsettled.values())

    def add(self, publish: P) -> int:
        """Number *publish*; its bytes must be written before the next one is numbered."""
        self.last_number = number = self.last_number + 1
        self._unsettled[number] = publish
        return number

    def settle(self, number: int, multiple: bool) -> list[P]:
        """Take out what ``basic.ack`` or ``basic.nack`` settles; 0 with *multiple* means all.

        Raises:
            ProtocolError: nothing of that number is outstanding.
        """
        if multiple:
            if number > self.last_number:
                raise _unknown(number)
            stop = (number or self.last_number) + 1
            pop = self._unsettled.pop
            settled = [p for n in range(self._lowest, stop) if (p := pop(n, None)) is not None]
            self._lowest = max(self._lowest, stop)
        else:
            try:
                settled = [self._unsettled.pop(number)]
            except KeyError:
                raise _unknown(number) from None
            if number == self._lowest:
                self._lowest += 1
        if self._returnable and not self._unsettled:
            self._returnable.clear()
        return settled

    def match_return(self, exchange: str, routing_key: str, properties: bytes, body: bytes) -> P | None:
        """The publish that came back, or None where nothing fits.

        Equal properties are preferred but not required: brokers strip the BCC header, and plugins add some.
        """
        self._index()
        numbers = self._returnable.get((exchange, routing_key))
        if numbers is None:
            return None
        while numbers and not self._is_returnable(numbers[0]):
            numbers.popleft()
        same_body = None
        for number in numbers:
            publish = self._unsettled.get(number)
            if publish is None or publish.returned is not None or publish.body != body:
                continue
            if publish.properties == properties:
                return publish
            same_body = same_body or publish
        return same_body

    def abandon(self) -> list[P]:
        """Take out all: their channel is gone."""
        abandoned = list(self._unsettled.values())
        self._unsettled.clear()
        self._returnable.clear()
        return abandoned

    def _index(self) -> None:
        for number in range(max(self._lowest, self._indexed + 1), self.last_number + 1):
            publish = self._unsettled.get(number)
            if publish is not None and publish.mandatory:
                self._returnable.setdefault((publish.exchange, publish.routing_key), deque()).append(number)
        self._indexed = self.last_number

    def _is_returnable(self, number: int) -> bool:
        publish = self._unsettled.get(number)
        return publish is not None and publish.returned is None


def _unknown(number: int) -> ProtocolError:
    return ProtocolError(f"the broker confirmed publish {number}, which is not outstanding", reply_code=503)
