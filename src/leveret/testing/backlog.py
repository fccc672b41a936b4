"""What waits in a queue, in order: by priority, then by age, with what came back at the place it had. Pure.

New messages go to the end of a deque. What is requeued would belong somewhere into its middle, so it goes to a heap
beside it, and whichever of the two has the older head is next.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator

from leveret.testing.messages import Entry


class Level:
    """The messages of one priority."""

    __slots__ = ("fresh", "returned")

    def __init__(self) -> None:
        self.fresh: deque[Entry] = deque()
        self.returned: list[Entry] = []

    def head(self) -> Entry | None:
        """The next one, left where it is."""
        if self.returned and not (self.fresh and self.fresh[0].position < self.returned[0].position):
            return self.returned[0]
        return self.fresh[0] if self.fresh else None

    def pop(self) -> Entry:
        """The next one."""
        if self.returned and not (self.fresh and self.fresh[0].position < self.returned[0].position):
            return heapq.heappop(self.returned)
        return self.fresh.popleft()


class Backlog:
    """The messages of a queue that wait to be delivered.

    Args:
        priorities: the highest one; 0 is a queue without priorities.

    Attributes:
        count: how many there are.
        size: the bytes of their bodies.
    """

    __slots__ = ("_levels", "_only", "_top", "count", "size")

    def __init__(self, priorities: int = 0) -> None:
        self._top = priorities
        self._only = Level()
        self._levels: dict[int, Level] = {0: self._only}  # by priority, highest first
        self.count = 0
        self.size = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Entry]:
        """All of them in their order."""
        for level in self._levels.values():
            yield from sorted([*level.returned, *level.fresh]) if level.returned else level.fresh

    def _level(self, entry: Entry) -> Level:
        priority = min(entry.priority, self._top)
        level = self._levels.get(priority)
        if level is None:
            level = self._levels[priority] = Level()
            self._levels = dict(sorted(self._levels.items(), reverse=True))
        return level

    def push(self, entry: Entry) -> None:
        """Add a new one at the end."""
        (self._level(entry) if self._top else self._only).fresh.append(entry)
        self.count += 1
        self.size += len(entry.message.body)

    def put_back(self, entry: Entry) -> None:
        """Add one that was here before, at its place."""
        heapq.heappush((self._level(entry) if self._top else self._only).returned, entry)
        self.count += 1
        self.size += len(entry.message.body)

    def pop(self) -> Entry:
        """Take the next one; IndexError when there is none."""
        level = self._only
        if self._top:
            level = next((each for each in self._levels.values() if each.head() is not None), level)
        entry = level.pop()
        self.count -= 1
        self.size -= len(entry.message.body)
        return entry

    def expired(self, now: float) -> Iterator[Entry]:
        """Take what has expired at the head of the highest priority: RabbitMQ looks no further than there."""
        while (when := self.next_expiry()) is not None and when <= now:
            yield self.pop()

    def next_expiry(self) -> float | None:
        """When the head expires."""
        heads = (head for level in self._levels.values() if (head := level.head()) is not None)
        head = next(heads, None)
        return None if head is None else head.expires_at

    def clear(self) -> list[Entry]:
        """Take all."""
        entries = list(self)
        for level in self._levels.values():
            level.fresh.clear()
            level.returned.clear()
        self.count = self.size = 0
        return entries
