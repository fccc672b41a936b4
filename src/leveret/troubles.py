"""What the broker refuses, or takes away again and again, and when the next attempt is due.

Times are in event loop time. Nothing here waits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from typing import NamedTuple

from leveret.exceptions import ChannelLockedResource
from leveret.log import printable
from leveret.records import Key

_FIRST_PAUSE, _MAX_PAUSE = 0.2, 30.0
_MAX_LOSS_PAUSE = 2.0
"""For what the broker lets us restore each time: others on that channel wait, and did nothing wrong."""
_MAX_LOCKED_PAUSE = 1.0
"""For an exclusive queue (405): it is there as soon as the broker notices that the old link is dead."""
_FORGIVEN_AFTER = 60.0
"""Seconds without a loss after which earlier losses count no more."""


class Trouble(NamedTuple):
    """Something that is not as the user wants it.

    Attributes:
        what: for people.
        error: what was said about it last.
        attempts: how often in a row.
        at: when the last time was.
        due: when it is tried again.
        is_loss: it had been restored, and was lost again.
    """

    what: str
    error: Exception
    attempts: int
    at: float
    due: float
    is_loss: bool

    def __str__(self) -> str:
        times = f" ({self.attempts} times)" if self.attempts > 1 else ""
        return printable(f"{self.what}: {self.error}{times}")


class Troubles:
    """The troubles of one connection, by the key of what they are about.

    Args:
        time: event loop time.
    """

    def __init__(self, time: Callable[[], float]) -> None:
        self._time = time
        self._troubles: dict[Key, Trouble] = {}

    def get(self, key: Key) -> Trouble | None:
        """What is wrong with that."""
        return self._troubles.get(key)

    def __contains__(self, key: Key) -> bool:
        return key in self._troubles

    def refused(self, key: Key, what: str, error: Exception) -> Trouble:
        """It cannot be restored now: try again after a pause that grows."""
        earlier = self._troubles.get(key)
        attempts = 1 if earlier is None else earlier.attempts + 1
        pause = _pause(attempts)
        if isinstance(error, ChannelLockedResource):
            pause = min(pause, _MAX_LOCKED_PAUSE)
        return self._note(key, what, error, attempts, pause, is_loss=False)

    def lost(self, key: Key, what: str, error: Exception) -> Trouble:
        """It was restored, and is gone: try again at once, but if that goes on after a pause that grows."""
        earlier = self._troubles.get(key)
        in_a_row = earlier is not None and self._time() - earlier.at < _FORGIVEN_AFTER
        attempts = earlier.attempts + 1 if earlier is not None and in_a_row else 1
        pause = min(_pause(attempts - 1), _MAX_LOSS_PAUSE) if attempts > 1 else 0.0
        return self._note(key, what, error, attempts, pause, is_loss=True)

    def _note(self, key: Key, what: str, error: Exception, attempts: int, pause: float, *, is_loss: bool) -> Trouble:
        now = self._time()
        self._troubles[key] = trouble = Trouble(what, error, attempts, now, now + pause, is_loss)
        return trouble

    def restored(self, key: Key) -> None:
        """It is as it should be; losses are not forgotten yet."""
        if (trouble := self._troubles.get(key)) is not None and not trouble.is_loss:
            self.over(key)

    def over(self, key: Key) -> None:
        """It is as it should be, or nobody wants it any more."""
        self._troubles.pop(key, None)

    def keep(self, wanted: Container[Key]) -> None:
        """Forget the others."""
        self._troubles = {key: trouble for key, trouble in self._troubles.items() if key in wanted}

    def __bool__(self) -> bool:
        return bool(self._troubles)

    def hurry(self, key: Key) -> None:
        """Something has changed: try it again now."""
        if (trouble := self._troubles.get(key)) is not None:
            self._troubles[key] = trouble._replace(due=0.0)

    def hurry_all(self, *, but: type[Exception] | tuple[type[Exception], ...]) -> None:
        """The same for all, but those that ended in an error of that kind."""
        for key, trouble in list(self._troubles.items()):
            if not isinstance(trouble.error, but):
                self.hurry(key)

    def may_try(self, key: Key) -> bool:
        """Whether nothing is wrong with it, or the next attempt is due."""
        trouble = self._troubles.get(key)
        return trouble is None or trouble.due <= self._time()

    def next_due(self, after: float) -> float:
        """When the first attempt after that moment is due; ``math.inf`` if there is none."""
        return min((trouble.due for trouble in self._troubles.values() if trouble.due > after), default=math.inf)

    def current(self, is_well: Callable[[Key], bool]) -> list[Trouble]:
        """Those to be told of: all but what is well again and was not lost again and again within a minute."""
        forgiven = self._time() - _FORGIVEN_AFTER
        return [t for key, t in self._troubles.items() if not is_well(key) or (t.attempts > 2 and t.at > forgiven)]


def _pause(attempts: int) -> float:
    return float(min(_MAX_PAUSE, _FIRST_PAUSE * 2 ** min(attempts - 1, 20)))
