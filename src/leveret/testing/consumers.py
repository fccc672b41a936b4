"""Who is next: the consumers of a queue, their priorities, their turns, and the single active one. Pure."""

from __future__ import annotations

import itertools
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


_numbers = itertools.count()


class Consumer:
    """One ``basic.consume``.

    Attributes:
        number: the order in which consumers came.
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
        "number",
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
        self.number = next(_numbers)
        self.in_hand = 0
        self.offset = 0

    def __repr__(self) -> str:
        return f"<Consumer {self.tag!r} of {self.queue_name!r} in_hand={self.in_hand}>"


class Consumers:
    """The consumers of one queue; those of the highest priority that have room take turns.

    Args:
        single_active: whether only one of them gets messages, until it goes (``x-single-active-consumer``).

    Attributes:
        is_single_active: that.
        active: that one.
    """

    __slots__ = ("_blocked", "_order", "_turns", "active", "is_single_active")

    def __init__(self, *, single_active: bool = False) -> None:
        self.is_single_active = single_active
        self._order: list[Consumer] = []
        self._turns: dict[int, deque[Consumer]] = {}  # by priority, highest first
        self._blocked: list[Consumer] = []
        self.active: Consumer | None = None

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Consumer]:
        return iter(tuple(self._order))

    def add(self, consumer: Consumer) -> None:
        """Let *consumer* have its turns."""
        self._order.append(consumer)
        if not self.is_single_active:
            self._line_up(consumer)
        elif self.active is None:
            self._activate(consumer)

    def _line_up(self, consumer: Consumer) -> None:
        if consumer.priority not in self._turns:
            self._turns[consumer.priority] = deque()
            self._turns = dict(sorted(self._turns.items(), reverse=True))
        self._turns[consumer.priority].append(consumer)

    def _heir(self) -> Consumer | None:
        """Who is to be the single active one: of the highest priority; of equals, the first that came."""
        return max(self._order, key=lambda each: each.priority, default=None)

    def review(self) -> None:
        """Look whether the single active one has to make place; that of a classic queue never has."""

    def _activate(self, consumer: Consumer | None) -> None:
        self.active = consumer
        self._turns.clear()
        self._blocked.clear()
        if consumer is not None:
            self._line_up(consumer)

    def remove(self, consumer: Consumer) -> None:
        """Let it have none."""
        if consumer not in self._order:
            return
        self._order.remove(consumer)
        if self.active is consumer:
            self._activate(self._heir())
        elif consumer in self._blocked:
            self._blocked.remove(consumer)
        elif not self.is_single_active:
            self._turns[consumer.priority].remove(consumer)

    @property
    def has_blocked(self) -> bool:
        """Whether somebody had no room when it was asked."""
        return bool(self._blocked)

    def refresh(self) -> None:
        """Let those queue up again who have room again."""
        waiting, self._blocked = self._blocked, []
        for each in waiting:
            if each.taker.can_take(each):
                self._line_up(each)
            else:
                self._blocked.append(each)

    def set_aside(self, consumer: Consumer) -> None:
        """Take its turns from *consumer* if it has no room, before it is asked."""
        turns = self._turns.get(consumer.priority)
        if turns is not None and consumer in turns and not consumer.taker.can_take(consumer):
            turns.remove(consumer)
            self._blocked.append(consumer)

    def next(self) -> Consumer | None:
        """Whose turn it is, among those who have room.

        Who has none loses its place, and queues up again at the end when it has.
        """
        if self._blocked:
            self.refresh()
        for turns in self._turns.values():
            while turns:
                consumer = turns[0]
                if consumer.taker.can_take(consumer):
                    turns.rotate(-1)
                    return consumer
                self._blocked.append(turns.popleft())
        return None


_MUCH = 2000
"""The prefetch of a quorum queue's consumer that has none."""


class QuorumConsumers(Consumers):
    """The consumers of a quorum queue.

    Args:
        single_active: as for all.
        yields: whether the single active one makes place for one of higher priority, as soon as it has nothing in hand:
            until then it gets no more (RabbitMQ 4.0). Otherwise priorities mean nothing to it.
    """

    __slots__ = ("_is_leaving", "_yields")

    def __init__(self, *, single_active: bool, yields: bool) -> None:
        super().__init__(single_active=single_active)
        self._yields = yields
        self._is_leaving = False

    def _heir(self) -> Consumer | None:
        if not self._yields:
            return self._order[0] if self._order else None
        return max(self._order, key=lambda each: (each.priority, each.prefetch or _MUCH, -each.number), default=None)

    def _activate(self, consumer: Consumer | None) -> None:
        self._is_leaving = False
        super()._activate(consumer)

    def review(self) -> None:
        """Look whether the single active one has to make place."""
        active = self.active
        if active is None or not self._yields:
            return
        heir = self._heir()
        if heir is not None and (self._is_leaving or heir.priority > active.priority):
            if not active.in_hand:
                self._activate(heir)
            elif not self._is_leaving:
                self._is_leaving = True
                self._turns.clear()
                self._blocked = [active]

    def refresh(self) -> None:
        """Let those queue up again who have room again, and do not leave."""
        if not self._is_leaving:
            super().refresh()
