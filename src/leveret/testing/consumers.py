"""Who is next: the consumers of a queue, their priorities, their turns, and the single active one. Pure."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Protocol

from leveret.testing.messages import Entry

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from leveret.types import FieldValue


class Taker(Protocol):
    """What a queue asks of the channel that its consumer is on."""

    def can_take(self, consumer: Consumer) -> bool:
        """Whether there is room for one more message."""
        ...

    def deliver(self, consumer: Consumer, entry: Entry) -> None:
        """Send it."""
        ...

    def cancel_consumer(self, consumer: Consumer) -> None:
        """Tell the client that the queue gave the consumer up."""
        ...


class Consumer:
    """One ``basic.consume``.

    Attributes:
        in_hand: how many of its messages wait for their ack.
        prefetch: how many that may be; 0 is any number.
        offset: the next message it reads, of a stream.
    """

    __slots__ = (
        "arguments",
        "encoded_tag",
        "exclusive",
        "in_hand",
        "no_ack",
        "offset",
        "prefetch",
        "priority",
        "queue_name",
        "tag",
        "taker",
    )

    def __init__(
        self,
        tag: str,
        queue_name: str,
        taker: Taker,
        *,
        no_ack: bool = False,
        exclusive: bool = False,
        prefetch: int = 0,
        arguments: Mapping[str, FieldValue] | None = None,
    ) -> None:
        self.tag = tag
        self.encoded_tag = tag.encode("utf-8", "surrogateescape")
        self.queue_name = queue_name
        self.taker = taker
        self.no_ack = no_ack
        self.exclusive = exclusive
        self.prefetch = prefetch
        self.arguments = dict(arguments or {})
        priority = self.arguments.get("x-priority", 0)
        self.priority = priority if isinstance(priority, int) else 0
        self.in_hand = 0
        self.offset = 0

    def __repr__(self) -> str:
        return f"<Consumer {self.tag!r} of {self.queue_name!r} in_hand={self.in_hand}>"


class Consumers:
    """The consumers of one queue; those of the highest priority that have room take turns.

    Args:
        single_active: whether only one of them gets messages, until it goes (``x-single-active-consumer``).
    """

    __slots__ = ("_groups", "_order", "_single_active", "active")

    def __init__(self, *, single_active: bool = False) -> None:
        self._single_active = single_active
        self._order: list[Consumer] = []
        self._groups: list[deque[Consumer]] = []
        self.active: Consumer | None = None

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Consumer]:
        return iter(tuple(self._order))

    def add(self, consumer: Consumer) -> None:
        """Let *consumer* have its turns."""
        self._order.append(consumer)
        self._regroup()

    def remove(self, consumer: Consumer) -> None:
        """Let it have none."""
        if consumer in self._order:
            self._order.remove(consumer)
        if self.active is consumer:
            self.active = None
        self._regroup()

    def _regroup(self) -> None:
        if self._single_active:
            if self.active is None and self._order:
                self.active = max(self._order, key=lambda each: each.priority)  # of equals, the first that came
            self._groups = [deque([self.active])] if self.active is not None else []
            return
        priorities = sorted({each.priority for each in self._order}, reverse=True)
        self._groups = [deque(each for each in self._order if each.priority == p) for p in priorities]

    def next(self) -> Consumer | None:
        """Whose turn it is, among those who have room."""
        for group in self._groups:
            for _ in range(len(group)):
                consumer = group[0]
                group.rotate(-1)
                if consumer.taker.can_take(consumer):
                    return consumer
        return None
