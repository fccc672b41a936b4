"""Numbers for those who watch over a program.

Nothing here is in anybody's way. What a connection has done it counts in passing (:mod:`leveret.wire.tally`), and
:class:`Metrics` reads that when it is asked. Only three things have to be measured while they happen, and are for
the watched connections alone: how long confirms take, how long callbacks run, and how late the event loop is.

Other threads (such as the one in which an exporter answers) get what the event loop last read by itself, so they never
meet an object that is being changed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
import threading
import weakref
from bisect import bisect_left
from collections.abc import Awaitable, Callable
from typing import Any, Final, Literal, NamedTuple

from leveret.connection import Connection
from leveret.failures import is_failure
from leveret.message import IncomingMessage
from leveret.wire.tally import Tally

LOOK_EVERY: Final = 0.25
"""Seconds between two looks at how late the event loop is: it counts what it stands still beyond the next look."""

_LOOKS_FOR_A_READ: Final = 4
"""How many of them to a read of the numbers, for threads that ask: it is about each channel."""

BUCKETS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of what is measured, in seconds."""


class Series(NamedTuple):
    """One of the numbers, and how to name it.

    Attributes:
        field: the attribute of :class:`Snapshot`.
        kind: a counter never decreases, a gauge is what is now, a histogram is a :class:`Distribution`.
        name: after the conventions of Prometheus, with the unit in it.
        help: what it counts.
    """

    field: str
    kind: Literal["counter", "gauge", "histogram"]
    name: str
    help: str


SERIES: Final = (
    Series("published", "counter", "leveret_messages_published_total", "Publishes written, sent again included"),
    Series("confirmed", "counter", "leveret_messages_confirmed_total", "Publishes that the broker confirmed"),
    Series("nacked", "counter", "leveret_messages_nacked_total", "Publishes that the broker refused"),
    Series("returned", "counter", "leveret_messages_returned_total", "Publishes that came back unroutable"),
    Series("unknown", "counter", "leveret_messages_unknown_total", "Publishes lost sight of: no answer, channel lost"),
    Series("resent", "counter", "leveret_messages_resent_total", "Publishes sent again with retry_unknown"),
    Series("delivered", "counter", "leveret_messages_delivered_total", "Messages delivered or fetched"),
    Series("acked", "counter", "leveret_messages_acked_total", "Deliveries acknowledged"),
    Series("requeued", "counter", "leveret_messages_requeued_total", "Deliveries given back to their queue"),
    Series("rejected", "counter", "leveret_messages_rejected_total", "Deliveries dropped or dead-lettered"),
    Series("handlers_failed", "counter", "leveret_handlers_failed_total", "Callbacks that raised"),
    Series("reconnects", "counter", "leveret_reconnects_total", "Times that a connection came back"),
    Series("blocked_seconds", "counter", "leveret_blocked_seconds_total", "Time the broker blocked publishers"),
    Series("connections", "gauge", "leveret_connections_open", "Connections that are ready"),
    Series("unconfirmed", "gauge", "leveret_messages_unconfirmed", "Publishes written and not answered"),
    Series("unsent", "gauge", "leveret_messages_unsent", "Publishes waiting to be written"),
    Series("waiting", "gauge", "leveret_messages_waiting", "Deliveries that no handler has started on"),
    Series("in_flight", "gauge", "leveret_messages_in_flight", "Deliveries that handlers work on"),
    Series("confirm_seconds", "histogram", "leveret_confirm_seconds", "From publish() to the broker's answer"),
    Series("handler_seconds", "histogram", "leveret_handler_seconds", "From the start of a callback to its end"),
    Series("loop_lag_seconds", "histogram", "leveret_event_loop_lag_seconds", "How late the event loop ran a timer"),
)
"""All numbers, in the order of :class:`Snapshot`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Distribution:
    """What was measured, sorted into buckets.

    Attributes:
        bounds: their upper bounds, in seconds; one more bucket takes the rest.
        counts: how many are in each.
        sum: of all, in seconds.
    """

    bounds: tuple[float, ...] = BUCKETS
    counts: tuple[int, ...] = (0,) * (len(BUCKETS) + 1)
    sum: float = 0.0

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(self.counts)


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """The numbers of a :class:`Metrics` at one moment.

    With publisher confirms, *published* is the sum of *confirmed*, *nacked*, *returned*, *unknown*, *resent* and
    *unconfirmed*, at every moment. Without, only it and *returned* are counted.

    Attributes:
        published: publishes that were written; those that were sent again count again.
        confirmed: publishes that the broker took responsibility for, without those that came back.
        nacked: publishes that it refused.
        returned: publishes that came back, because no queue is bound for them.
        unknown: publishes that were written, and whose channel was lost before the broker's answer. One whose time was
            up is unconfirmed until then, because its answer may still come.
        resent: publishes that were sent again by ``retry_unknown`` instead.
        delivered: messages that came, those that were fetched or redelivered included.
        acked: deliveries that were acknowledged.
        requeued: deliveries that were given back, by the user or because nobody started on them.
        rejected: deliveries that were refused for good: dropped, or dead-lettered.
        handlers_failed: callbacks that raised; not those that were cancelled, or whose message was lost with the link.
        reconnects: how often a connection came back.
        blocked_seconds: for how long the broker blocked publishers.
        connections: those that are ready now.
        unconfirmed: publishes that were written, and have no answer yet.
        unsent: publishes that wait to be written: for the link, for a broker that blocks, for room in the socket.
        waiting: messages that were delivered, and that no callback or iterating task has started on.
        in_flight: messages that callbacks have begun with and wait for something, or that iterating tasks hold.
        confirm_seconds: from ``publish()`` to the broker's answer, waiting for the link included.
        handler_seconds: how long callbacks took.
        loop_lag_seconds: how late the event loop ran a timer, four times a second.
    """

    published: int = 0
    confirmed: int = 0
    nacked: int = 0
    returned: int = 0
    unknown: int = 0
    resent: int = 0
    delivered: int = 0
    acked: int = 0
    requeued: int = 0
    rejected: int = 0
    handlers_failed: int = 0
    reconnects: int = 0
    blocked_seconds: float = 0.0
    connections: int = 0
    unconfirmed: int = 0
    unsent: int = 0
    waiting: int = 0
    in_flight: int = 0
    confirm_seconds: Distribution = Distribution()
    handler_seconds: Distribution = Distribution()
    loop_lag_seconds: Distribution = Distribution()


_OF_TALLY: Final = (
    *("published", "confirmed", "nacked", "returned", "unknown", "resent"),
    *("delivered", "acked", "requeued", "rejected", "reconnects"),
)


class _Histogram:
    """A distribution that grows."""

    __slots__ = ("_counts", "_sum")

    def __init__(self) -> None:
        self._counts = [0] * (len(BUCKETS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """One more."""
        self._counts[bisect_left(BUCKETS, seconds)] += 1
        self._sum += seconds

    def read(self) -> Distribution:
        """As it is now."""
        return Distribution(BUCKETS, tuple(self._counts), self._sum)


class Metrics:
    """The numbers of one connection, or of several together.

    ::

        metrics = leveret.metrics.Metrics()
        connection = await leveret.connect_robust("amqp://localhost/")
        metrics.watch(connection)
        ...
        print(metrics.snapshot().confirmed)

    Counters go on over reconnects, and keep what a connection has done that is closed.

    Args:
        name: tells it from others; exporters make a label of it.
    """

    def __init__(self, name: str = "default") -> None:
        self.name = name
        self._watched: list[Connection] = []
        self._past: dict[str, Any] = dict.fromkeys((*_OF_TALLY, "blocked_seconds"), 0)
        self._unwatched: weakref.WeakKeyDictionary[Connection, dict[str, Any]] = weakref.WeakKeyDictionary()
        """What is in the past of those that are not closed."""
        self._last_closed: Tally | None = None  # it may be closed in the middle of a read, which is counted after that
        self._handlers_failed = 0
        self._confirm, self._handler, self._lag = _Histogram(), _Histogram(), _Histogram()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: int | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._looks = 0
        self._due = 0.0
        self._last = Snapshot()

    def __repr__(self) -> str:
        return f"<Metrics {self.name!r} of {len(self._watched)} connections>"

    def watch(self, connection: Connection) -> None:
        """Count *connection* in, until it is closed or :meth:`unwatch`; what it has done before counts, too.

        What is measured is measured from now on; the time of callbacks, of consumers that begin from now on. So watch
        a connection as soon as it is there.

        Args:
            connection: of the event loop that runs, as are all that are watched at a time.

        Raises:
            ValueError: it is closed, or another Metrics watches it.
            RuntimeError: it is of another event loop than those that are watched.
        """
        if connection in self._watched:
            return
        if connection.is_closed:
            raise ValueError(f"{connection!r} is closed")
        tally = connection.tally
        if tally.on_confirmed is not None:
            raise ValueError(f"{connection!r} is watched by another Metrics")
        loop = asyncio.get_running_loop()
        if self._loop not in {None, loop}:
            raise RuntimeError("it watches connections of another event loop; make a Metrics for each loop")
        tally.on_confirmed = self._confirm.observe
        tally.measured = functools.partial(self._measured, connection)
        for name, number in self._unwatched.pop(connection, {}).items():
            self._past[name] -= number
        connection.close_callbacks.add(self._on_closed)
        self._watched.append(connection)
        self._loop, self._thread = loop, threading.get_ident()
        if self._timer is None:
            self._wait_for_next_look(loop)

    def unwatch(self, connection: Connection) -> None:
        """Count *connection* out: counters keep what it has done so far, gauges lose it, and nothing is measured.

        Another Metrics may watch it then, or this one again, which then counts what it did meanwhile as well. Nobody
        has to unwatch a connection that is closed.

        Args:
            connection: which may as well be closed, or not watched: then this does nothing.

        Raises:
            RuntimeError: called outside the event loop.
        """
        if connection not in self._watched:
            return
        if connection.is_closed:
            self._let_go(connection)
            return
        self._unwatched[connection] = done = dict.fromkeys(self._past, 0)
        _add(done, connection.tally, asyncio.get_running_loop().time())
        for name, number in done.items():
            self._past[name] += number
        self._forget(connection)
        self._read()

    def snapshot(self) -> Snapshot:
        """The numbers now; in another thread than the event loop's, as they were a quarter of a second ago at most.

        Where the event loop stands still, other threads get what was before that.
        """
        if self._thread == threading.get_ident():
            self._read()
        return self._last

    # -------------------------------------------------------------------------------------------------- reading

    def _read(self) -> None:
        for connection in [each for each in self._watched if each.is_closed]:
            self._let_go(connection)
        now = 0.0 if self._loop is None else self._loop.time()
        counters = dict(self._past)
        if self._last_closed is not None:
            _add(counters, self._last_closed, now)
        for connection in self._watched:
            _add(counters, connection.tally, now)
        consumers = [consumer for connection in self._watched for consumer in connection.consumers()]
        self._last = Snapshot(
            **counters,
            handlers_failed=self._handlers_failed,
            connections=sum(connection.connected.is_set() for connection in self._watched),
            unconfirmed=sum(connection.tally.unconfirmed for connection in self._watched),
            unsent=sum(connection.waiting_publishes for connection in self._watched),
            waiting=sum(consumer.waiting for consumer in consumers),
            in_flight=sum(consumer.in_flight for consumer in consumers),
            confirm_seconds=self._confirm.read(),
            handler_seconds=self._handler.read(),
            loop_lag_seconds=self._lag.read(),
        )

    def _on_closed(self, connection: Connection | None, _: BaseException | None) -> None:
        """A connection is closed, or has lost its link, which changes nothing."""
        self._read()

    def _let_go(self, connection: Connection) -> None:
        if self._last_closed is not None:
            _add(self._past, self._last_closed, 0.0)
        self._last_closed = connection.tally
        self._forget(connection)

    def _forget(self, connection: Connection) -> None:
        self._watched.remove(connection)
        connection.close_callbacks.discard(self._on_closed)
        connection.tally.on_confirmed = connection.tally.measured = None
        if not self._watched and self._timer is not None:
            self._timer.cancel()
            self._timer = self._loop = None

    # ------------------------------------------------------------------------------------------------ measuring

    def _measured(
        self, connection: Connection, callback: Callable[[IncomingMessage], object]
    ) -> Callable[[IncomingMessage], Awaitable[object]]:
        """Make of *callback* one whose time is taken."""
        clock = asyncio.get_running_loop().time

        async def timed(message: IncomingMessage) -> object:
            began = clock()
            is_watched = connection not in self._unwatched
            try:
                result = callback(message)
                return await result if inspect.isawaitable(result) else result
            except BaseException as error:
                self._handlers_failed += is_watched and is_failure(error)
                raise
            finally:
                if is_watched:
                    self._handler.observe(clock() - began)

        return timed

    def _wait_for_next_look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._due = loop.time() + LOOK_EVERY
        self._timer = loop.call_at(self._due, self._look)

    def _look(self) -> None:
        if self._loop is not None:
            self._lag.observe(max(0.0, self._loop.time() - self._due))
            self._wait_for_next_look(self._loop)
            self._looks = (self._looks + 1) % _LOOKS_FOR_A_READ
            if not self._looks:
                self._read()


def _add(counters: dict[str, Any], tally: Tally, now: float) -> None:
    for name in _OF_TALLY:
        counters[name] += getattr(tally, name)
    counters["blocked_seconds"] += tally.blocked_seconds(now)
