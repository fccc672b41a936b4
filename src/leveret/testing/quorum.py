"""A quorum queue, with one member: it counts how often a message came back, and orders messages in its own way. Pure.

What came back is delivered first, in the order in which it came back; new messages follow, by what the version makes of
priorities.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from leveret.testing.backlog import Backlog
from leveret.testing.consumers import Consumer, Consumers, QuorumConsumers
from leveret.testing.messages import HAS_EXPIRATION, HAS_PRIORITY, Entry, Stored
from leveret.testing.queues import Keeper, Queue

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from leveret.types import FieldValue

_SHARED = 2
"""The number of priorities that share."""
_EVERY_THIRD = 2
"""How many messages of high priority go before one of normal priority, if that is older (RabbitMQ 4.0)."""


class QuorumBacklog(Backlog):
    """What waits in a quorum queue.

    Args:
        ranks: how many priorities there are: 1 is none; 2 are normal and high (from 5 on), which share; more are
            strict, and what has none has 4. The priority of an entry is its rank.
    """

    __slots__ = ("_fresh", "_ranks", "_returned", "_turn")

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self._ranks = ranks
        self._returned: deque[Entry] = deque()
        self._fresh: dict[int, deque[Entry]] = {}
        self._turn = 0

    def __iter__(self) -> Iterator[Entry]:
        yield from self._returned
        for rank in sorted(self._fresh, reverse=True):
            yield from self._fresh[rank]

    def push(self, entry: Entry) -> None:
        """Add a new one."""
        self._fresh.setdefault(entry.priority, deque()).append(entry)
        self._add(entry)

    def put_back(self, entry: Entry) -> None:
        """Add one that was here before."""
        self._returned.append(entry)
        self._add(entry)

    def _add(self, entry: Entry) -> None:
        self.count += 1
        self.size += len(entry.message.body)

    def _next(self) -> deque[Entry]:
        """Where the next one is."""
        if self._returned:
            return self._returned
        ranks = sorted((rank for rank, entries in self._fresh.items() if entries), reverse=True)
        if self._ranks == _SHARED and len(ranks) == 2 and self._turn == _EVERY_THIRD:
            return min((self._fresh[rank] for rank in ranks), key=lambda entries: entries[0].position)
        return self._fresh[ranks[0]]

    def pop(self) -> Entry:
        """Take the next one; IndexError when there is none."""
        if not self.count:
            raise IndexError("the queue is empty")
        entries = self._next()
        if entries is not self._returned:
            self._turn = (self._turn + 1) % (_EVERY_THIRD + 1)
        return self._take(entries)

    def _take(self, entries: deque[Entry]) -> Entry:
        entry = entries.popleft()
        self.count -= 1
        self.size -= len(entry.message.body)
        return entry

    def expired(self, now: float) -> Iterator[Entry]:
        """Take what has expired at the head; where priorities are strict, at the head of each."""
        if self._ranks > _SHARED:
            for entries in self._heads():
                while entries and _is_over(entries[0], now):
                    yield self._take(entries)
        while self.count and _is_over(self._next()[0], now):
            yield self.pop()

    def _heads(self) -> list[deque[Entry]]:
        """Of what RabbitMQ looks at the heads."""
        if self._ranks <= _SHARED:
            return [self._next()] if self.count else []
        ranked = (self._fresh[rank] for rank in sorted(self._fresh, reverse=True))
        return [entries for entries in (self._returned, *ranked) if entries]

    def next_expiry(self) -> float | None:
        """When the first of the heads expires."""
        moments = [entries[0].expires_at for entries in self._heads()]
        return min((each for each in moments if each is not None), default=None)

    def clear(self) -> list[Entry]:
        """Take all."""
        entries = list(self)
        self._returned.clear()
        self._fresh.clear()
        self._turn = self.count = self.size = 0
        return entries


def _is_over(entry: Entry, now: float) -> bool:
    return entry.expires_at is not None and entry.expires_at <= now


class Quorum(Queue):
    """A queue of type ``quorum``."""

    type = "quorum"

    def __init__(self, name: str, keeper: Keeper, **options: Any) -> None:
        super().__init__(name, keeper, **options)
        self._dialect = keeper.dialect
        self.backlog = QuorumBacklog(self._dialect.quorum_priorities)
        self._refuses = False
        self._settling: list[Consumer] = []  # once for each message that is not to be acknowledged
        if self._overflow == "reject-publish-dlx":
            self._overflow = "drop-head"  # which RabbitMQ logs, and does
        limit = self._number("x-delivery-limit")
        if limit is None:
            limit = self._dialect.default_delivery_limit
        if limit is not None and limit < 0 and self._dialect.negative_is_no_limit:
            limit = None
        self._limit = limit

    # ----------------------------------------------------------------------------------------------- coming in

    def publish(self, message: Stored) -> bool:
        """Take *message*; ``False`` when the queue was over its limit and refuses it (``x-overflow: reject-publish``).

        It is over its limit with one message more than that, and takes messages again at 80 %.
        """
        rejects = self._is_limited and self._overflow == "reject-publish"
        if self._refuses:
            self._refuses = not self._is_below(0.8)
            if self._refuses:
                return False
        began = self._clock.now()
        self._position += 1
        expires_at = None
        if self._ttl is not None or message.flags & HAS_EXPIRATION:
            expires_at = self._expiry_of(message, least=0.001)  # so that a TTL of 0 still reaches a consumer
            self._may_expire = True
        self.backlog.push(self._entry(message, self._rank(message), expires_at))
        self._dispatch(began)  # for which no time passes meanwhile
        if rejects:
            self._refuses = not self._is_below(1)
        if self._may_expire:
            self._expire()
        return True

    def _rank(self, message: Stored) -> int:
        ranks = self._dialect.quorum_priorities
        if ranks == 1:
            return 0
        priority = message.priority if message.flags & HAS_PRIORITY else 4
        return int(priority > 4) if ranks == _SHARED else min(priority, ranks - 1)

    def _is_below(self, part: float) -> bool:
        backlog, length, size = self.backlog, self._max_length, self._max_bytes
        return (length is None or backlog.count <= int(length * part)) and (
            size is None or backlog.size <= int(size * part)
        )

    # ------------------------------------------------------------------------------------------------ going out

    def _no_consumers(self) -> Consumers:
        yields = self._keeper.dialect.single_active_yields
        return QuorumConsumers(single_active=self._has_single_active, yields=yields)

    def dispatch(self) -> None:
        """Hand out what waits to those who have room, and whose turn it is; drop what is too much then.

        Who need not acknowledge has room for more as soon as that is done.
        """
        self._dispatch(self._clock.now())

    def _dispatch(self, now: float) -> None:
        self.consumers.review()
        while True:
            if self._may_expire:
                self._expire(now)
            super().dispatch()
            if self._is_limited and self._overflow == "drop-head":
                self._drop_heads()
            if not self._settling:
                break
            for consumer in self._settling:
                consumer.in_hand -= 1
            self._settling.clear()

    def _hand_out(self, consumer: Consumer, entry: Entry) -> None:
        super()._hand_out(consumer, entry)
        if consumer.no_ack and consumer.prefetch:
            consumer.in_hand += 1
            self._settling.append(consumer)
        self.consumers.set_aside(consumer)

    def properties_of(self, entry: Entry, *, by_get: bool = False) -> bytes:
        """The properties to send *entry* with: they tell how often it was out."""
        headers: dict[str, FieldValue] = {}
        returns = entry.returns or entry.failures  # a dead letter that is new here tells what was before
        if returns and self._dialect.counts_failures_only:
            headers["x-acquired-count"] = returns
        count = entry.failures if self._dialect.counts_failures_only else returns
        if count or (by_get and self._dialect.tells_first_get):
            headers["x-delivery-count"] = count
        return entry.message.with_headers(headers) if headers else entry.message.properties

    # ------------------------------------------------------------------------------------------- and coming back

    def requeue(
        self, entries: Iterable[Entry], *, failed: bool = False, ended: bool = False, consumer: Consumer | None = None
    ) -> None:
        """*entries* come back, before all that is new, or are dropped."""
        if self.is_deleted:
            return
        only_failures = self._dialect.counts_failures_only
        for entry in entries:
            self.unacked -= 1
            entry.redelivered = True
            entry.returns += 1
            entry.failures += self._counts_failures and (failed if only_failures else ended)
            if self._limit is not None and (entry.failures if only_failures else entry.returns) > self._limit:
                if consumer is not None and self._dialect.drops_make_room:
                    consumer.in_hand -= 1
                self._die(entry, "delivery_limit")
            elif (delay := self._retry_delay(entry, failed)) is not None:
                self._clock.call_later(delay, partial(self._is_back, entry))
            elif not ended and self._limit is None and self._dialect.quorum_requeues_at_end:
                self._position += 1
                entry.position, entry.priority = self._position, 0
                self.backlog.push(entry)
            else:
                self.backlog.put_back(entry)
        self._came_back()

    def _came_back(self) -> None:
        self.dispatch()
        self._expire()

    def _retry_delay(self, entry: Entry, failed: bool) -> float | None:
        """The seconds of ``x-delayed-retry-…``, which RabbitMQ 4.3 has."""
        kinds = ("all", "failed") if failed else ("all", "returned")
        if not self._dialect.counts_failures_only or self.arguments.get("x-delayed-retry-type") not in kinds:
            return None
        least, most = self._number("x-delayed-retry-min") or 0, self._number("x-delayed-retry-max")
        delay = least * max(1, entry.failures)
        return (delay if most is None else min(delay, most)) / 1000

    def _is_back(self, entry: Entry) -> None:
        if not self.is_deleted:
            self.backlog.put_back(entry)
            self._came_back()
