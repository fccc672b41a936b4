"""Publisher confirms: number publishes, settle them, and find the one that a return belongs to.

The n-th publish after ``confirm.select`` has number n. The broker settles in any order, one by one or all up
to a number, and a mandatory message that it cannot route comes back *before* its confirm, without a number.
So a return is matched by what it carries: the oldest unsettled mandatory publish with the same exchange,
routing key, properties and body. Identical ones cannot be told apart, and need not be.

https://www.rabbitmq.com/docs/confirms
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
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

    __slots__ = ("_indexed", "_indexed_count", "_lowest", "_returnable", "_unsettled", "last_number")

    def __init__(self) -> None:
        self.last_number = 0
        self._unsettled: dict[int, P] = {}
        self._lowest = 1  # no unsettled number is below it
        # Unsettled mandatory numbers by (exchange, routing key), built only when something is returned.
        self._returnable: dict[tuple[object, ...], deque[int]] = {}
        self._indexed_count = 0
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
                while self._lowest <= self.last_number and self._lowest not in self._unsettled:
                    self._lowest += 1
        if self._returnable and not self._unsettled:
            self._returnable.clear()
            self._indexed_count = 0
        return settled

    def match_return(self, exchange: str, routing_key: str, properties: bytes, body: bytes) -> P | None:
        """The publish that came back, or None where nothing fits.

        Equal properties are preferred but not required: brokers strip the BCC header, and plugins add some.
        """
        self._index()
        key = (exchange, routing_key, body)
        return self._first((*key, properties)) or self._first(key)

    def _first(self, key: tuple[object, ...]) -> P | None:
        """The oldest publish under *key* that is unsettled and has not come back."""
        numbers = self._returnable.get(key)
        while numbers:
            publish = self._unsettled.get(numbers[0])
            if publish is not None and publish.returned is None:
                return publish
            numbers.popleft()
        self._returnable.pop(key, None)
        return None

    def abandon(self) -> list[P]:
        """Take out all: their channel is gone."""
        abandoned = list(self._unsettled.values())
        self._unsettled.clear()
        self._returnable.clear()
        return abandoned

    def _index(self) -> None:
        new: Iterable[tuple[int, P | None]]
        if self._indexed_count > 2 * len(self._unsettled) + 100:  # mostly settled ones: begin again
            self._returnable.clear()
            self._indexed_count = 0
            new = self._unsettled.items()
        else:
            numbers = range(max(self._lowest, self._indexed + 1), self.last_number + 1)
            new = ((number, self._unsettled.get(number)) for number in numbers)
        for number, publish in new:
            if publish is not None and publish.mandatory:
                key = (publish.exchange, publish.routing_key, publish.body)
                self._returnable.setdefault(key, deque()).append(number)
                self._returnable.setdefault((*key, publish.properties), deque()).append(number)
                self._indexed_count += 1
        self._indexed = self.last_number


def _unknown(number: int) -> ProtocolError:
    return ProtocolError(f"the broker confirmed publish {number}, which is not outstanding", reply_code=503)
