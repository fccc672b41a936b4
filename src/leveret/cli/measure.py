"""Latencies and rates: pure figures. Times are whole nanoseconds."""

from __future__ import annotations

from collections import Counter

_BITS = 7
"""Leading bits that are told apart: a figure is at most 1.6 % too small."""


class Latencies:
    """A histogram whose size does not grow with what it counts."""

    def __init__(self) -> None:
        self.count = 0
        self._least = self._most = 0
        self._buckets: Counter[int] = Counter()

    def add(self, nanoseconds: int) -> None:
        """One more; below 0, which a clock that was set back makes, counts as 0."""
        value = max(0, nanoseconds)
        if not self.count or value < self._least:
            self._least = value
        if value > self._most:
            self._most = value
        self.count += 1
        shift = max(0, value.bit_length() - _BITS)
        self._buckets[value >> shift << shift] += 1

    def percentile(self, percent: float) -> int:
        """The smallest value that *percent* of all are not above (nearest rank); 0 and 100 are exact."""
        if percent <= 0 or not self.count:
            return self._least
        if percent >= 100:
            return self._most
        rank, seen = percent / 100 * self.count, 0
        for value in sorted(self._buckets):
            seen += self._buckets[value]
            if seen >= rank:
                return min(max(value, self._least), self._most)
        return self._most

    def summary(self) -> dict[str, float] | None:
        """Milliseconds: min, median, p95, p99, max; None if there was nothing to count."""
        if not self.count:
            return None
        names = {"min": 0, "median": 50, "p95": 95, "p99": 99, "max": 100}
        return {name: round(self.percentile(percent) / 1e6, 3) for name, percent in names.items()}


class Pace:
    """So many a second, and none that is made up for later in one burst of more than a second's worth.

    Args:
        rate: a second; None for as many as there may be.
        now: seconds, of any clock.
    """

    def __init__(self, rate: float | None, now: float) -> None:
        self._rate = rate
        self._begun = now
        self._done = 0

    def due(self, now: float) -> float:
        """Seconds until the next may go; 0 for now."""
        if self._rate is None:
            return 0.0
        behind = (now - self._begun) * self._rate - self._done
        if behind > self._rate:  # it could not keep up: it does not try to catch up with all of that
            self._begun += (behind - self._rate) / self._rate
        return max(0.0, self._begun + self._done / self._rate - now)

    def went(self) -> None:
        """One went."""
        self._done += 1


def per_second(count: int, seconds: float) -> float:
    """A rate; 0 where there was no time."""
    return count / seconds if seconds > 0 else 0.0


def milliseconds(seconds: float) -> str:
    """``0.4 ms``, ``12 ms``, ``3,204 ms``."""
    value = seconds * 1000
    return f"{value:.1f} ms" if value < 10 else f"{value:,.0f} ms"
