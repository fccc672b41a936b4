"""Which deliveries of a channel are settled, and which ack is still to be written.

Acks that come in the order of their delivery tags are saved up and written as one ``multiple``; any other is
written by itself, or held back until those before it have come, or until it is no longer worth waiting for them. A
``multiple`` may only name a tag that the broker still waits for, and may only cover tags that are settled, so both
ends of the saved-up range are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

from leveret.exceptions import MessageProcessError

_TRACKED = 4096
"""Tags settled out of order to remember. A tag that is never settled (left unacknowledged, or of a ``no_ack``
consumer) stops the count; beyond this many, acks are written singly and not remembered until a ``multiple``
begins a new count."""


class Acks:
    """The delivery tags of one channel."""

    __slots__ = ("_ahead", "_held", "_settled", "due", "pending")

    def __init__(self) -> None:
        self.due = 0
        """The tag up to which an ack is to be written; 0 for none."""
        self._settled = 0  # every tag up to it is settled; -1 when no longer counted
        # As keys of a dict: see WireChannel.
        self._ahead: dict[int, None] = {}  # tags beyond it that are settled
        self._held: dict[int, None] = {}  # those of them whose acks are not written
        self.pending = 0
        """How many acks were held back since :meth:`take_held`."""

    def save_up(self, delivery_tag: int) -> bool:
        """Make an ack of *delivery_tag* due, if it is next in order; otherwise it must be written by itself."""
        if delivery_tag != self._settled + 1:
            return False
        self.due = self._settled = delivery_tag  # not what it catches up with: the broker refuses a tag settled before
        if self._ahead:
            self._catch_up()
        return True

    def split(self, delivery_tags: Sequence[int]) -> tuple[int, list[int]]:
        """How to settle *delivery_tags*, which ascend, by as few methods as it takes.

        Returns:
            The tag up to which a ``multiple`` may settle, or 0; and those beyond it, each for itself, because
            something before them is unsettled. What a ``multiple`` has settled already is in neither.
        """
        settled, ahead = self._settled, self._ahead
        if settled < 0:
            return 0, list(delivery_tags)
        if not ahead and delivery_tags[0] == settled + 1 and delivery_tags[-1] == settled + len(delivery_tags):
            return delivery_tags[-1], []
        together = 0
        apart: list[int] = []
        for tag in delivery_tags:
            if tag <= settled or tag in ahead:
                continue
            while settled + 1 in ahead:
                settled += 1
            if tag == settled + 1:
                together = settled = tag
            else:
                apart.append(tag)
        return together, apart

    def save_up_to(self, delivery_tag: int) -> None:
        """Make an ack up to *delivery_tag* due, as :meth:`split` has it."""
        self.due = delivery_tag
        self.note(delivery_tag, multiple=True)

    def hold(self, delivery_tag: int) -> bool:
        """Hold an ack of *delivery_tag* back, unless it must be written by itself.

        Raises:
            MessageProcessError: as :meth:`check`.
        """
        if not self.save_up(delivery_tag):
            if self._settled < 0 or len(self._ahead) >= _TRACKED:
                return False
            self.check(delivery_tag)
            self._ahead[delivery_tag] = self._held[delivery_tag] = None
        self.pending += 1
        return True

    def is_settled(self, delivery_tag: int) -> bool:
        """Whether *delivery_tag* is known to be settled."""
        return delivery_tag <= self._settled or delivery_tag in self._ahead

    def unsettled_up_to(self, delivery_tag: int) -> int:
        """How many a ``multiple`` would settle; 1 where that is no longer known."""
        if self._settled < 0:
            return 1
        return delivery_tag - self._settled - sum(tag <= delivery_tag for tag in self._ahead)

    def check(self, delivery_tag: int) -> None:
        """Raise MessageProcessError if *delivery_tag* is settled: the broker would close the channel (406)."""
        if self.is_settled(delivery_tag):
            raise MessageProcessError(f"delivery tag {delivery_tag} was settled by an earlier multiple")

    def note(self, delivery_tag: int, multiple: bool) -> None:
        """*delivery_tag* was settled by a method of its own."""
        if multiple:
            self._settled = delivery_tag
            if self._ahead:
                self._ahead = {tag: None for tag in self._ahead if tag > delivery_tag}
                self._held = {tag: None for tag in self._held if tag > delivery_tag}
        elif self._settled >= 0:
            self._ahead[delivery_tag] = None
        else:
            return
        self._catch_up()
        if len(self._ahead) > _TRACKED:
            self._settled = -1
            self._ahead.clear()

    def stop_counting(self) -> None:
        """A rollback has undone acks: what is settled is no longer known."""
        self._settled = -1
        self._ahead.clear()

    def take_due(self) -> int:
        """The tag up to which to write an ack now, or 0."""
        due, self.due = self.due, 0
        return due

    def take_held(self) -> list[int]:
        """The other tags that were held back, in order, to be acked one by one."""
        held = sorted(self._held)
        self._held.clear()
        self.pending = 0
        return held

    def _catch_up(self) -> None:
        while self._settled + 1 in self._ahead:
            self._settled += 1
            del self._ahead[self._settled]
            if self._settled in self._held:
                del self._held[self._settled]
                self.due = self._settled
