"""Faults that tests ask for: the next declare refused, publishes nacked, confirms that take their time. Pure."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from leveret.testing.refusals import Refusal, check_code

if TYPE_CHECKING:
    from leveret.testing.clock import Clock, Timer

METHODS: Final = frozenset(
    (
        *("connection.start-ok", "connection.tune-ok", "connection.open", "connection.close"),
        *("connection.update-secret", "channel.open", "channel.close", "channel.flow", "channel.flow-ok"),
        *("exchange.declare", "exchange.delete", "exchange.bind", "exchange.unbind"),
        *("queue.declare", "queue.delete", "queue.purge", "queue.bind", "queue.unbind"),
        *("basic.qos", "basic.consume", "basic.cancel", "basic.cancel-ok", "basic.get", "basic.publish"),
        *("basic.ack", "basic.nack", "basic.reject", "basic.recover", "basic.recover-async"),
        *("confirm.select", "tx.select", "tx.commit", "tx.rollback"),
    )
)
"""What a client may send, and a test may have refused."""


def plain(method: str) -> str:
    """A method's name as it is looked up: ``queue.declare``."""
    return method.lower().replace("-", "").replace("_", "")


_PLAIN: Final = frozenset(map(plain, METHODS))


class Faults:
    """What is to go wrong next.

    Attributes:
        nacks: how many publishes are still to be nacked.
        confirm_delay: seconds that each confirm waits.
    """

    def __init__(self) -> None:
        self._refusals: dict[str, deque[Refusal]] = {}
        self._delayed: dict[int, Timer] = {}
        self._numbers = itertools.count()
        self.nacks = 0
        self.confirm_delay = 0.0

    def add(self, method: str, code: int, text: str | None) -> None:
        """Refuse the next *method* with *code*.

        Raises:
            ValueError: no method that a client sends, no reply code.
        """
        if plain(method) not in _PLAIN:
            known = ", ".join(sorted(METHODS))
            raise ValueError(f"method must be one that a client sends ({known}), not {method!r}")
        refusal = Refusal(check_code(code), text or f"refused by fail_next({method!r}, {code})")
        self._refusals.setdefault(plain(method), deque()).append(refusal)

    def awaits(self, method: str) -> bool:
        """Whether *method* is to be refused."""
        return bool(self._refusals) and plain(method) in self._refusals

    def apply(self, method: str) -> None:
        """Refuse *method*, if it is its turn.

        Raises:
            Refusal: as it was asked for.
        """
        waiting = self._refusals.get(plain(method))
        if waiting:
            refusal = waiting.popleft()
            if not waiting:
                del self._refusals[plain(method)]
            raise refusal

    def take_nack(self) -> bool:
        """Whether this publish is to be nacked."""
        if self.nacks <= 0:
            return False
        self.nacks -= 1
        return True

    def delay(self, clock: Clock, confirm: Callable[[], object]) -> None:
        """Have *confirm* called after the delay, or when it is ended."""
        number = next(self._numbers)

        def late() -> None:
            del self._delayed[number]
            confirm()

        self._delayed[number] = clock.call_later(self.confirm_delay, late)

    def set_delay(self, seconds: float) -> None:
        """Have later confirms wait for *seconds*; 0 lets go of those that wait now, the oldest first."""
        self.confirm_delay = seconds
        if not seconds:
            for timer in tuple(self._delayed.values()):
                timer.fire()

    def clear(self) -> None:
        """Let nothing go wrong any more; confirms that wait are forgotten, as are those who wait for them."""
        self._refusals.clear()
        self.nacks = 0
        self.confirm_delay = 0.0
        for timer in self._delayed.values():
            timer.cancel()
        self._delayed.clear()
