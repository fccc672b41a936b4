"""What all connections share: virtual hosts, users, limits, alarms, the clock; and the listening sockets.

A server belongs to one event loop, and is only touched from its thread: there is no lock anywhere.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

from leveret.testing.access import User, given_users
from leveret.testing.clock import Clock, Timer
from leveret.testing.dialect import Dialect
from leveret.testing.faults import Faults
from leveret.testing.messages import Stored
from leveret.testing.refusals import Refusal
from leveret.testing.session import Session
from leveret.testing.vhost import VirtualHost
from leveret.wire.codec import FRAME_OVERHEAD

if TYPE_CHECKING:
    import ssl

    from leveret.testing.channel import Channel
    from leveret.testing.taps import Tap

_REMEMBERED = 16 << 20
"""Bytes of bodies that `Recent` keeps."""
_FRAME_MAX = 131_072
_HANDSHAKE_TIMEOUT = 10.0
"""Seconds for the TLS handshake."""


class Limits(NamedTuple):
    """What the broker offers and allows; times are seconds."""

    frame_max: int
    channel_max: int
    heartbeat: int
    max_message_size: int
    consumer_timeout: float | None
    tick: float


class Recent:
    """The last messages, as many as one may remember: bounded by number and by bytes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._size = 0
        self._messages: deque[Stored] = deque()
        self.total = 0

    def __iter__(self) -> Iterator[Stored]:
        return iter(self._messages)

    def add(self, message: Stored) -> None:
        """Remember *message*, and forget the oldest for it."""
        self.total += 1
        self._messages.append(message)
        self._size += len(message.body)
        while self._messages and (len(self._messages) > self._most or self._size > _REMEMBERED):
            self._size -= len(self._messages.popleft().body)

    def clear(self) -> None:
        """Forget all."""
        self._messages.clear()
        self._size = self.total = 0


class Server:
    """A broker, without the thread that it may run in.

    Attributes:
        alarms: what is short: ``memory``, ``disk``.
        is_paused: whether it answers nobody.
        seen, lost: the last messages that were published, and those of them that had no route.
    """

    loop: asyncio.AbstractEventLoop

    def __init__(
        self, dialect: Dialect, limits: Limits, users: Mapping[str, str], vhosts: tuple[str, ...], kept: int
    ) -> None:
        self.dialect = dialect
        self.frame_max = limits.frame_max
        self.channel_max = limits.channel_max
        self.heartbeat = limits.heartbeat
        self.max_message_size = limits.max_message_size
        self.consumer_timeout = limits.consumer_timeout
        self.tick = limits.tick
        self.clock = Clock()
        self.access = given_users(dialect, users, vhosts)
        self.vhosts = {name: VirtualHost(name, self.clock, dialect) for name in vhosts}
        self.faults = Faults()
        self.sessions: dict[Session, None] = {}
        self.alarms: dict[str, None] = {}
        self.is_paused = False
        self.tap: Tap | None = None
        self.seen = Recent(kept)
        self.lost = Recent(kept)
        self._listeners: list[asyncio.Server] = []
        self._poke: asyncio.TimerHandle | None = None
        self._next_tick: Timer | None = None

    @property
    def largest_frame(self) -> int:
        """The limit of frames; where there is none (0), the largest message still has one."""
        return self.frame_max or max(_FRAME_MAX, self.max_message_size + FRAME_OVERHEAD)

    # ----------------------------------------------------------------------------------------------------- life

    async def listen(self, port: int, tls_port: int | None, context: ssl.SSLContext | None) -> tuple[int, int | None]:
        """Serve clients on loopback; the ports, chosen where they were 0."""
        self.loop = asyncio.get_running_loop()
        self.clock.on_earlier = self._arm
        try:
            found = [await self._listen(port, None)]
            if context is not None:
                found.append(await self._listen(tls_port or 0, context))
        except BaseException:
            self._close_listeners()
            raise
        self._arm()
        self._tick()
        return found[0], found[1] if len(found) > 1 else None

    async def _listen(self, port: int, context: ssl.SSLContext | None) -> int:
        listener = await self.loop.create_server(
            lambda: Session(self),
            "127.0.0.1",
            port,
            ssl=context,
            ssl_handshake_timeout=None if context is None else _HANDSHAKE_TIMEOUT,
            backlog=1024,
            family=socket.AF_INET,
        )
        self._listeners.append(listener)
        found: int = listener.sockets[0].getsockname()[1]
        return found

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()

    async def shut(self, farewell: Refusal | None) -> None:
        """End all: with words for every client first, when there are some."""
        self._close_listeners()
        if farewell is not None and not self.is_paused:
            for session in tuple(self.sessions):
                session.close(farewell)
                session.flush()
        self.drop(tuple(self.sessions))
        self.clock.on_earlier = None
        if self._next_tick is not None:
            self._next_tick.cancel()
            self._next_tick = None
        if self._poke is not None:
            self._poke.cancel()
            self._poke = None
        self.is_paused = False
        self.alarms.clear()
        await asyncio.sleep(0)  # connection_lost of each

    def restart(self, *, keep: bool) -> None:
        """What is left for the next start: all that is durable, or nothing."""
        for name, vhost in self.vhosts.items():
            if keep:
                vhost.restart()
            else:
                vhost.end()
                self.vhosts[name] = VirtualHost(name, self.clock, self.dialect)

    @property
    def is_listening(self) -> bool:
        """Whether clients are welcome."""
        return bool(self._listeners)

    def drop(self, sessions: Iterable[Session]) -> None:
        """Reset connections."""
        for session in sessions:
            session.abort()

    # ----------------------------------------------------------------------------------------------------- time

    def _arm(self) -> None:
        if self._poke is not None:
            self._poke.cancel()
            self._poke = None
        due = self.clock.next_due
        if due is not None and not self.is_paused:
            self._poke = self.loop.call_later(max(0.0, due - self.clock.now()), self._run_due)

    def _run_due(self) -> None:
        self._poke = None
        if not self.is_paused:
            try:
                self.clock.run_due()
            finally:
                self._arm()

    def _tick(self) -> None:
        """Look for acks that are overdue; https://www.rabbitmq.com/docs/consumers#acknowledgement-timeout"""
        if self.consumer_timeout is not None:
            deadline = self.clock.now() - self.consumer_timeout
            for session in tuple(self.sessions):
                for channel in tuple(session.channels.values()):
                    self._check_overdue(channel, deadline)
        self._next_tick = self.clock.call_later(self.tick, self._tick)

    def advance(self, seconds: float) -> None:
        """Move the time forward; of the ticks on the way only one happens, at the end: years have too many."""
        tick, self._next_tick = self._next_tick, None
        if tick is None:
            self.clock.advance(seconds)
            return
        due = tick.when
        tick.cancel()
        try:
            self.clock.advance(seconds)
        finally:
            if due <= self.clock.now():
                self._tick()
                self.clock.run_due()  # what came back may have expired meanwhile
            else:
                self._next_tick = self.clock.call_at(due, self._tick)

    def set_consumer_timeout(self, seconds: float | None, tick: float) -> None:
        """Look every *tick* for acks that *seconds* have not brought."""
        self.consumer_timeout, self.tick = seconds, tick
        if self._next_tick is not None:
            self._next_tick.cancel()
            self._tick()

    def _check_overdue(self, channel: Channel, deadline: float) -> None:
        assert self.consumer_timeout is not None
        overdue = channel.overdue(deadline)
        if self.dialect.timeout_closes_channel:
            if overdue or channel.timed_out:
                channel.timed_out = True
                refusal = Refusal(
                    406,
                    f"delivery acknowledgement on channel {channel.number} timed out. Timeout value used: "
                    f"{self.consumer_timeout * 1000:.0f} ms. This timeout value can be configured, see consumers doc "
                    "guide to learn more",
                )
                channel.close(refusal, 0, 0)
            return
        for consumer in dict.fromkeys(each.consumer for each in overdue if each.queue.is_quorum):
            if consumer is not None:
                channel.give_up(consumer)

    # --------------------------------------------------------------------------------------------------- pauses

    def pause(self) -> None:
        """Answer nobody; connections are accepted all the same, by the operating system."""
        self.is_paused = True
        for session in self.sessions:
            session.freeze()

    def resume(self) -> None:
        """Undo :meth:`pause`."""
        self.is_paused = False
        for session in tuple(self.sessions):
            session.thaw()
        self._arm()

    @property
    def alarm_reason(self) -> str:
        """What ``connection.blocked`` says."""
        return f"low on {' & '.join(self.alarms)}"

    def unblock(self) -> None:
        """No alarm any more."""
        self.alarms.clear()
        for session in tuple(self.sessions):
            session.unblock()

    # ---------------------------------------------------------------------------------------------------- facts

    def note(self, message: Stored, routed: bool) -> None:
        """Remember what was published, the last ones only."""
        self.seen.add(message)
        if not routed:
            self.lost.add(message)

    def tapped(self, session: Session, direction: Literal["in", "out"], data: bytes) -> bytes:
        """*data*, or what the tap makes of it."""
        assert self.tap is not None
        return self.tap(session, direction, data)

    def connections_of(self, user: User) -> int:
        """How many connections *user* has."""
        return sum(session.stage == "running" and session.user is user for session in self.sessions)

    def channels_of(self, user: User) -> int:
        """How many channels *user* has."""
        return sum(
            len(session.channels) for session in self.sessions if session.stage == "running" and session.user is user
        )
