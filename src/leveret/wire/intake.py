"""How fast the socket is read while consumers do not keep up with what the broker sends.

A prefetch bounds what the broker sends ahead. Consumers without one (prefetch 0, or ``no_ack``) get all that the queue
has, as fast as the socket is read: what their handlers and iterators have not finished with is in memory. So reading
is *throttled* when that is more than HIGH bytes on one connection, until it is less than LOW.

**Never silent.** Whatever else the broker has to say comes behind the deliveries in the same stream, and a handler may
be waiting for just that. So a throttled socket is still read, a sip at a time:

* soon, while somebody waits for a reply, for a confirm, or for the end of the connection;
* now and then, while some consumer of the connection has nothing to do: what a handler waits for may be a message of
  that one, as the reply to a remote call is;
* rarely, where there are only consumers that have more than enough. RabbitMQ resets a connection that takes nothing
  for half a minute (observed on 4.3).

The more is held, the longer the pauses, up to two seconds. It is a brake, no wall: a sip every two seconds of small
messages, each with a task that waits, is a MiB a second. Only a prefetch is a bound.

**Costs.** Nothing for each message: consumers are asked what they hold once in so many bytes read, and while the
socket is throttled by a timer.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from leveret.log import get_logger

_log = get_logger(__name__)

HIGH = 64 * 1024 * 1024
"""Bytes of memory that consumers without a prefetch may hold on one connection before reading is throttled."""
LOW = HIGH // 2
"""Bytes below which it is read freely again. What is left keeps consumers busy until more is there."""

_TICK = 0.01
"""Seconds between two looks at what has become of a throttled connection."""
_SIP = 128 * 1024
"""Bytes to read at a time while it is throttled."""
_WHILE_AWAITED = 0.01
_WHILE_IDLE = 0.05
"""Seconds between two sips, at HIGH; they grow with the third power of what is held."""
_SIPS = 16
"""Sips after which messages are measured again; what is new may be bigger than what was there."""
_LONGEST = 2.0
"""Seconds between two sips, at most. Buffers of two kernels stand between the broker and us, and nothing that it sends
gets on before a good part of each is empty again, so a sip in half a minute would not do."""

_GROWTH = 32
"""Bytes of memory, at most, that a byte on the wire turns into: a handler's task for a message of some 100 bytes."""


class Holder(Protocol):
    """A consumer: what it has not finished with."""

    @property
    def backlog(self) -> int:
        """How many messages it holds."""
        ...

    def backlog_size(self) -> int:
        """Bytes of memory that they take, about."""
        ...


class Source(Protocol):
    """What is asked of a channel."""

    @property
    def unlimited(self) -> Iterable[Holder]:
        """Its consumers that get as much as the queue has."""
        ...

    @property
    def has_idle_consumer(self) -> bool:
        """Whether one of its consumers holds nothing."""
        ...


class ReadTransport(Protocol):
    """What is asked of the socket."""

    def pause_reading(self) -> None:
        """Read no more."""
        ...

    def resume_reading(self) -> None:
        """Go on."""
        ...


class Intake:
    """The reading half of one connection.

    Args:
        channels: whose consumers are looked at.
        is_awaited: whether somebody waits for something that the broker is to say.

    Attributes:
        is_throttled: whether reading is being held back.
        is_open: whether the socket is being read at the moment.
        budget: bytes that may be read before :meth:`look` is to be called; whoever reads takes off what it read.
        changed: when that changed last, in event loop time; silence before it was opened was our own doing.
    """

    __slots__ = (
        "_channels",
        "_has_warned",
        "_is_awaited",
        "_loop",
        "_mean",
        "_sips",
        "_socket",
        "_timer",
        "budget",
        "changed",
        "is_open",
        "is_throttled",
    )

    def __init__(self, channels: Mapping[int, Source], is_awaited: Callable[[], bool]) -> None:
        self.is_throttled = False
        self.is_open = True
        self.changed = -math.inf
        self._channels: Mapping[int, Source] = channels
        self._is_awaited = is_awaited
        self._loop = asyncio.get_running_loop()
        self._socket: ReadTransport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.budget: float = HIGH / _GROWTH
        self._mean = 0.0  # bytes of memory for each message, at the last look
        self._sips = 0
        self._has_warned = False

    def start(self, socket: ReadTransport) -> None:
        """Read *socket*."""
        self._socket = socket

    def stop(self) -> None:
        """The connection is over: what still comes is thrown away as it comes."""
        if self.is_throttled:
            self._end()
        self.budget = math.inf

    @property
    def complaint(self) -> str | None:
        """What is wrong, while reading is throttled."""
        if not self.is_throttled:
            return None
        held = self._count()
        return (
            f"reading is throttled: handlers and iterators without a prefetch hold {held} messages"
            f" ({held * self._mean / 2**20:.0f} MiB)"
        )

    # ------------------------------------------------------------------------------------------------ looking

    def _count(self) -> int:
        return sum(holder.backlog for channel in self._channels.values() for holder in channel.unlimited)

    def _measure(self) -> int:
        """Bytes that are held; it costs some time for each message."""
        size = sum(holder.backlog_size() for channel in self._channels.values() for holder in channel.unlimited)
        self._mean = size / max(1, self._count())
        return size

    def look(self) -> None:
        """As much was read as could bring them to HIGH: :attr:`budget` is used up."""
        if not self.is_throttled:
            size = self._measure()
            if size < HIGH:
                self.budget = (HIGH - size) / _GROWTH
                return
            self._begin()
        else:
            self._sips += 1
            if self._sips % _SIPS == 0:
                self._measure()
        self._close()

    def _begin(self) -> None:
        self.is_throttled = True
        self._timer = self._loop.call_later(_TICK, self._tick)
        if not self._has_warned:
            self._has_warned = True
            _log.warning("%s; a prefetch would leave them in the queue", self.complaint)

    def _end(self) -> None:
        self.is_throttled = False
        if self._timer is not None:
            self._timer.cancel()
        self._open()

    def _open(self) -> None:
        if not self.is_open:
            self.is_open = True
            self.budget = _SIP
            self.changed = self._loop.time()
            if self._socket is not None:
                self._socket.resume_reading()

    def _close(self) -> None:
        if self.is_open:
            self.is_open = False
            self.changed = self._loop.time()
            if self._socket is not None:
                self._socket.pause_reading()

    def _tick(self) -> None:
        held = self._count() * self._mean
        if held < LOW and (held := self._measure()) < LOW:
            self._end()
            self.budget = (HIGH - held) / _GROWTH
            return
        self._timer = self._loop.call_later(_TICK, self._tick)
        if not self.is_open and self._loop.time() - self.changed >= min(self._pause() * (held / HIGH) ** 3, _LONGEST):
            self._open()

    def _pause(self) -> float:
        """Seconds between two sips, at HIGH."""
        if self._is_awaited():
            return _WHILE_AWAITED
        if any(channel.has_idle_consumer for channel in self._channels.values()):
            return _WHILE_IDLE
        return _LONGEST
