"""What a robust connection has declared, bound and consumed, and the order to replay it in.

:class:`Topology` keeps the records (:mod:`leveret.records`) of one connection, strongly, whichever channel they came
by. A record leaves only by delete, unbind, cancel or close, by what the broker deletes along with it (a queue's
bindings; an auto-delete queue with its last consumer), or when the last channel that declared it is closed and
nothing that is left depends on it.

Nothing here awaits: replaying is :mod:`leveret.restore`'s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from leveret.records import (
    Binding,
    ConsumerRecord,
    Entity,
    ExchangeBinding,
    ExchangeRecord,
    Key,
    QosRecord,
    QueueBinding,
    QueueRecord,
    Record,
    exchange_key,
    queue_key,
    renamed,
    with_own_arguments,
)


class Forgotten(NamedTuple):
    """A record that went, and the channels that it came by."""

    record: Record
    owners: frozenset[int]


class Topology:
    """The records of one connection."""

    def __init__(self) -> None:
        self._records: dict[Key, Record] = {}
        self._owners: dict[Key, set[int]] = {}
        self._owned: dict[int, dict[Key, None]] = {}

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, key: Key) -> bool:
        return key in self._records

    def __iter__(self) -> Iterator[Record]:
        return iter(list(self._records.values()))

    def get(self, key: Key) -> Record | None:
        """The record of that identity."""
        return self._records.get(key)

    def remember(self, record: Record, channel: int) -> None:
        """*record* is true, by way of *channel*; it takes the place of one with the same identity."""
        self._put(with_own_arguments(record), {channel})

    def forget(self, key: Key) -> list[Forgotten]:
        """It was deleted, unbound or cancelled, and with it what the broker deletes along; unknown is fine.

        Returns:
            What went, for :meth:`bring_back`.
        """
        due = deque([key])
        forgotten: list[Forgotten] = []
        while due:
            lost = due.popleft()
            owners = frozenset(self._owners.get(lost, ()))
            record = self._drop(lost)
            if record is not None:
                forgotten.append(Forgotten(record, owners))
            if record is None or isinstance(record, ExchangeRecord | QueueRecord):  # None: declared by somebody else
                due += [other.key for other in self._records.values() if lost in other.needs]
            elif isinstance(record, QueueBinding | ExchangeBinding):
                source = self._records.get(exchange_key(record.source))
                if isinstance(source, ExchangeRecord) and source.auto_delete and not self._is_bound(source):
                    due.append(source.key)
            elif isinstance(record, ConsumerRecord):
                queue = self._records.get(queue_key(record.queue))
                if isinstance(queue, QueueRecord) and queue.auto_delete and not self._is_consumed(queue):
                    due.append(queue.key)
        return forgotten

    def bring_back(self, forgotten: Iterable[Forgotten]) -> None:
        """They were not deleted after all."""
        for record, owners in forgotten:
            if record.key not in self._records:
                self._put(record, set(owners))

    def forget_channel(self, channel: int) -> list[Record]:
        """The user closed *channel*: forget its consumers and QoS, and what no other channel has a part in.

        Returns:
            What went.
        """
        before = dict(self._records)
        for key in list(self._owned.get(channel, ())):
            if isinstance(self._records.get(key), QosRecord | ConsumerRecord):  # one may take others along
                self.forget(key)
        for key in self._owned.pop(channel, ()):
            self._owners[key].discard(channel)
        in_use = self._in_use()
        for key in [key for key in self._records if key not in in_use]:
            self._drop(key)
        return [record for key, record in before.items() if key not in self._records]

    def rename(self, old: str, new: str) -> None:
        """The broker gave queue *old* the name *new*: its bindings and consumers follow."""
        for key, record in list(self._records.items()):
            new_record = renamed(record, old, new)
            if new_record is not record:
                owners = self._owners[key]
                self._drop(key)
                self._put(new_record, owners)

    def keys_of(self, channel: int) -> list[Key]:
        """What came by way of *channel*."""
        return list(self._owned.get(channel, ()))

    def with_dependents(self, keys: Iterable[Key]) -> list[Key]:
        """*keys*, and the records that need one of them."""
        wanted = set(keys)
        return [*wanted, *(key for key, r in self._records.items() if key not in wanted and wanted & {*r.needs})]

    def plan(self) -> Iterator[list[Entity]]:
        """What is replayed before the channels are, in stages in which each finds what it needs.

        A stage is what there is when it is asked for: a queue may have got another name in the one before.
        """
        yield [record for record in self if isinstance(record, ExchangeRecord)]
        yield [record for record in self if isinstance(record, QueueRecord)]
        yield [record for record in self if isinstance(record, QueueBinding | ExchangeBinding)]

    def qos(self, channel: int) -> list[QosRecord]:
        """The prefetch of *channel*, and the one that is for all of its consumers together."""
        return [r for r in self._of(channel) if isinstance(r, QosRecord)]

    def consumers(self, channel: int | None = None) -> list[ConsumerRecord]:
        """The consumers of *channel*, or of all."""
        records = self._records.values() if channel is None else self._of(channel)
        return [record for record in records if isinstance(record, ConsumerRecord)]

    # ---------------------------------------------------------------------------------------------- inside

    def _of(self, channel: int) -> Iterable[Record]:
        return [self._records[key] for key in self._owned.get(channel, ())]

    def _put(self, record: Record, owners: set[int]) -> None:
        key = record.key
        self._records[key] = record
        self._owners.setdefault(key, set()).update(owners)
        for owner in owners:
            self._owned.setdefault(owner, {})[key] = None

    def _drop(self, key: Key) -> Record | None:
        for owner in self._owners.pop(key, ()):
            owned = self._owned[owner]
            owned.pop(key, None)
            if not owned:
                del self._owned[owner]
        return self._records.pop(key, None)

    def _is_bound(self, exchange: ExchangeRecord) -> bool:
        """Whether anything is bound to it: an auto-delete exchange lives as long."""
        return any(isinstance(r, Binding) and r.source == exchange.name for r in self._records.values())

    def _is_consumed(self, queue: QueueRecord) -> bool:
        return any(isinstance(r, ConsumerRecord) and r.queue == queue.name for r in self._records.values())

    def _in_use(self) -> set[Key]:
        """Every record that an open channel has a part in, and what those depend on: the queue of a consumer, the
        bindings that fill a queue or exchange, the exchanges that these come from.
        """
        filled_by: dict[Key, list[Key]] = {}
        for key, record in self._records.items():
            if isinstance(record, QueueBinding | ExchangeBinding):
                filled_by.setdefault(record.needs[0], []).append(key)
        in_use: set[Key] = set()
        due = [key for key, owners in self._owners.items() if owners]
        while due:
            key = due.pop()
            if key not in in_use:
                in_use.add(key)
                found = self._records.get(key)  # None: declared by somebody else
                due += [*(found.needs if found else ()), *filled_by.get(key, ())]
        return in_use
