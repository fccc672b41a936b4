"""What a test sees of the broker, and what it does to it. All of it may be called from any thread.

How the broker lives, and in which thread, is :mod:`leveret.testing.broker`'s.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from leveret.checks import check_count
from leveret.testing.access import EVERYTHING, Permissions, User, given_permissions
from leveret.testing.given import (
    check_bytes,
    check_consumer_timeout,
    check_limit,
    check_name,
    check_names,
    check_number,
    check_password,
    check_span,
    check_tap,
    check_text,
    check_text_or_none,
)
from leveret.testing.refusals import Refusal, check_code
from leveret.testing.taps import Tap
from leveret.testing.vhost import VirtualHost
from leveret.testing.views import (
    BindingView,
    ConnectionView,
    ConsumerView,
    ExchangeView,
    MessageView,
    QueueView,
    Views,
)

if TYPE_CHECKING:
    from leveret.testing.server import Server
    from leveret.testing.session import Session

T = TypeVar("T")

PATIENCE = 30.0
"""Seconds that a call from another thread may take."""


class Controls:
    """The half of a :class:`~leveret.testing.Broker` that looks at its server and hurts it."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread: int | None = None

    def _call(self, act: Callable[[], T]) -> T:
        """Run *act* in the broker's thread."""
        loop = self._loop
        if loop is None or self._loop_thread == threading.get_ident():
            return act()
        done: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                done.set_result(act())
            except BaseException as error:
                done.set_exception(error)

        loop.call_soon_threadsafe(run)
        try:
            return done.result(PATIENCE)
        except TimeoutError:
            if not done.cancel():
                raise
            what = act.__qualname__.split(".<locals>")[0].rpartition(".")[2]
            raise TimeoutError(
                f"{what}: the broker's loop did not come to it within {PATIENCE:.0f} s; it is busy, or does not run "
                "(thread=True gives the broker a loop of its own)"
            ) from None

    # ----------------------------------------------------------------------------------------------- to look at

    def _vhost(self, name: str) -> VirtualHost:
        try:
            return self._server.vhosts[name]
        except KeyError:
            raise ValueError(f"there is no virtual host {name!r}") from None

    @property
    def queues(self) -> Mapping[str, QueueView]:
        """The queues of the virtual host ``/`` by name; see :meth:`queues_of`."""
        return self.queues_of("/")

    def queues_of(self, vhost: str) -> Mapping[str, QueueView]:
        """The queues of *vhost* by name; each look takes a new snapshot of the one that is looked at.

        Raises:
            ValueError: there is no such virtual host.
        """
        self._call(lambda: self._vhost(vhost))
        return Views(
            lambda: self._call(lambda: list(self._vhost(vhost).queues)),
            lambda name: self._call(lambda: QueueView.of(self._vhost(vhost).queues[name])),
        )

    @property
    def exchanges(self) -> Mapping[str, ExchangeView]:
        """The exchanges of the virtual host ``/`` by name; see :meth:`exchanges_of`."""
        return self.exchanges_of("/")

    def exchanges_of(self, vhost: str) -> Mapping[str, ExchangeView]:
        """The exchanges of *vhost* by name, with their bindings.

        Raises:
            ValueError: there is no such virtual host.
        """
        self._call(lambda: self._vhost(vhost))
        return Views(
            lambda: self._call(lambda: list(self._vhost(vhost).exchanges)),
            lambda name: self._call(lambda: ExchangeView.of(self._vhost(vhost).exchanges[name])),
        )

    @property
    def bindings(self) -> tuple[BindingView, ...]:
        """All bindings of the virtual host ``/``; those of the default exchange, which nobody made, are not listed."""
        return self._call(
            lambda: tuple(
                each for exchange in self._vhost("/").exchanges.values() for each in ExchangeView.of(exchange).bindings
            )
        )

    @property
    def consumers(self) -> tuple[ConsumerView, ...]:
        """All consumers of the virtual host ``/``."""
        return self._call(
            lambda: tuple(
                ConsumerView.of(each, queue.consumers.active in (None, each))
                for queue in self._vhost("/").queues.values()
                for each in queue.consumers
            )
        )

    @property
    def connections(self) -> tuple[ConnectionView, ...]:
        """The open connections, the oldest first."""
        return self._call(lambda: tuple(ConnectionView.of(each) for each in self._sessions()))

    @property
    def published(self) -> tuple[MessageView, ...]:
        """The last messages that clients published, the oldest first: ``keep_published`` of them."""
        return self._call(lambda: tuple(map(MessageView, self._server.seen)))

    @property
    def unrouted(self) -> tuple[MessageView, ...]:
        """Those of them that reached no queue."""
        return self._call(lambda: tuple(map(MessageView, self._server.lost)))

    @property
    def published_count(self) -> int:
        """How many messages clients have published."""
        return self._server.seen.total

    def _sessions(self, name: str | None = None, port: int | None = None) -> list[Session]:
        return [
            each
            for each in self._server.sessions
            if each.stage == "running" and name in (None, each.name) and port in (None, each.peer[1])
        ]

    # -------------------------------------------------------------------------------------------------- to hurt

    def drop_connections(self, name: str | None = None, *, port: int | None = None) -> int:
        """Reset connections without a word, as a crash or a firewall does.

        Args:
            name: only those with this ``connection_name``; ``None`` is all, those that are still logging in too.
            port: only the one whose client has this port; ``None`` is all.

        Returns:
            How many.

        Raises:
            TypeError, ValueError: *name* is no string, or *port* is no port.
            TimeoutError: called in another thread, and the broker's loop did not come to it.
        """
        check_text_or_none("name", name)
        check_number("port", port)

        def drop() -> int:
            chosen = self._sessions(name, port)
            found = [*self._server.sessions] if name is None and port is None else chosen
            self._server.drop(found)
            return len(found)

        return self._call(drop)

    def close_connections(self, reason: str = "maintenance", *, code: int = 320, name: str | None = None) -> int:
        """Close connections as an operator does, with ``connection.close``.

        Args:
            reason: the reply text, behind the name of the code.
            code: the reply code.
            name: only those with this ``connection_name``; ``None`` is all.

        Returns:
            How many.

        Raises:
            TypeError: *reason* or *name* is no string.
            ValueError: that is no reply code.
        """
        check_text("reason", reason)
        check_code(code)
        check_text_or_none("name", name)

        def close() -> int:
            found = self._sessions(name)
            for session in found:
                session.close(Refusal(code, reason, class_id=0, method_id=0))
            return len(found)

        return self._call(close)

    def close_channel(
        self,
        number: int | None = None,
        *,
        code: int = 406,
        reason: str = "closed by the test",
        name: str | None = None,
    ) -> int:
        """Close channels with ``channel.close``.

        Args:
            number: only those with this number; ``None`` is all.
            code: the reply code.
            reason: the reply text, behind the name of the code.
            name: only those of connections with this ``connection_name``; ``None`` is all.

        Returns:
            How many.

        Raises:
            TypeError: *reason* or *name* is no string, or *number* no int.
            ValueError: that is no reply code, or no number of a channel.
        """
        check_number("number", number)
        check_code(code)
        check_text("reason", reason)
        check_text_or_none("name", name)

        def close() -> int:
            found = [
                channel
                for session in self._sessions(name)
                for channel in session.channels.values()
                if number in (None, channel.number) and not channel.is_closing
            ]
            for channel in found:
                channel.close(Refusal(code, reason), 0, 0)
            return len(found)

        return self._call(close)

    def cancel_consumers(self, queue: str, *, vhost: str = "/") -> int:
        """Cancel the consumers of *queue* with ``basic.cancel``, as when a queue's node goes; the queue stays.

        Returns:
            How many.

        Raises:
            TypeError: *queue* is no string.
            ValueError: there is no such virtual host, or no such queue.
        """
        check_text("queue", queue)

        def cancel() -> int:
            queues = self._vhost(vhost).queues
            if queue not in queues:
                known = f"there are {', '.join(map(repr, queues))}" if queues else "there is none"
                raise ValueError(f"there is no queue {queue!r} in virtual host {vhost!r} ({known})")
            consumers = tuple(queues[queue].consumers)
            for consumer in consumers:
                queues[queue].consumers.remove(consumer)
                consumer.taker.cancel_consumer(consumer)
            return len(consumers)

        return self._call(cancel)

    def block(self, resource: str = "memory") -> None:
        """Raise an alarm: whoever publishes from now on is told ``connection.blocked`` and is not read any more.

        Args:
            resource: what is short, ``"memory"`` or ``"disk"``.

        Raises:
            ValueError: there is no such resource.
        """
        if resource not in {"memory", "disk"}:
            raise ValueError(f"resource must be 'memory' or 'disk', not {resource!r}")
        self._call(lambda: self._server.alarms.update({resource: None}))

    def unblock(self) -> None:
        """End every alarm."""
        self._call(self._server.unblock)

    def pause(self) -> None:
        """Freeze: connections are accepted, and nobody is answered, not even with a heartbeat."""
        self._call(self._server.pause)

    def resume(self) -> None:
        """Undo :meth:`pause`."""
        self._call(self._server.resume)

    def fail_next(self, method: str, code: int, text: str | None = None) -> None:
        """Refuse the next *method* of any client.

        Args:
            method: AMQP's name, ``"queue.declare"``; one that clients send.
            code: the reply code; it decides whether the channel or the connection is closed.
            text: what to say, behind the name of the code; ``None`` says that it was a test.

        Raises:
            TypeError: *method* or *text* is no string.
            ValueError: no method that a client sends, no reply code.
        """
        check_text("method", method)
        check_text_or_none("text", text)
        self._call(lambda: self._server.faults.add(method, code, text))

    def nack_next(self, count: int = 1) -> None:
        """Answer the next *count* confirmed publishes with ``basic.nack``; they are in their queues all the same.

        Raises:
            TypeError, ValueError: that is no whole number, or negative.
        """
        check_count("count", count, 0)
        self._call(lambda: setattr(self._server.faults, "nacks", count))

    def delay_confirms(self, seconds: float) -> None:
        """Have every confirm of later publishes wait; 0 ends it, and sends those that wait now.

        Args:
            seconds: how long.

        Raises:
            TypeError: that is no number.
            ValueError: it is negative, NaN, or more than a hundred years.
        """
        check_span("seconds", seconds)
        self._call(lambda: self._server.faults.set_delay(seconds))

    def advance(self, seconds: float) -> None:
        """Move the broker's clock: TTL, ``x-expires``, ack timeouts, delayed confirms that are due then happen now.

        Acks that are overdue are looked for once, at the end.

        Raises:
            ValueError: the seconds are negative, NaN, or more than a hundred years.
        """
        self._call(lambda: self._server.advance(seconds))

    def set_consumer_timeout(self, seconds: float | None, *, tick: float = 60.0) -> None:
        """Change how long a delivery may wait for its ack, and how often that is looked at, in seconds.

        Args:
            seconds: how long; ``None`` is for ever.
            tick: how often.

        Raises:
            TypeError: that is no number.
            ValueError: it is negative, NaN, or more than a hundred years, or the tick is 0.
        """
        check_consumer_timeout("seconds", seconds, "tick", tick)
        self._call(lambda: self._server.set_consumer_timeout(seconds, tick))

    def on_bytes(self, tap: Callable[[ConnectionView | None, str, bytes], bytes | None] | None) -> None:
        """Show *tap* all bytes, before a client's are read and before the broker's are sent.

        Args:
            tap: called with the connection (``None`` before it is open), ``"in"`` or ``"out"``, and the bytes, in the
                broker's thread; what it returns takes their place, ``None`` leaves them. Where it raises or returns
                something else, they are left as well, and an error is logged, once. ``None`` ends it.

        Raises:
            TypeError: *tap* cannot be called with these three, or is a coroutine function.
            TimeoutError: called in another thread, and the broker's loop did not come to it.
        """
        if tap is not None:
            check_tap(tap)
        given = None if tap is None else Tap(tap)
        self._call(lambda: setattr(self._server, "tap", given))

    def send_bytes(self, data: bytes, *, name: str | None = None) -> int:
        """Send raw bytes to clients, behind what is on its way to them; how many got them.

        Raises:
            TypeError: *data* is not bytes, or *name* no string.
            TimeoutError: called in another thread, and the broker's loop did not come to it.
        """
        check_bytes("data", data)
        check_text_or_none("name", name)
        raw = bytes(data)

        def send() -> int:
            found = self._sessions(name)
            for session in found:
                session.send(raw)
            return len(found)

        return self._call(send)

    def reset(self) -> None:
        """Begin anew without closing the port: no connections, queues, faults, alarms; users stay."""

        def reset() -> None:
            self._server.faults.clear()
            self._server.tap = None
            self._server.drop(tuple(self._server.sessions))
            self._server.unblock()
            if self._server.is_paused:
                self._server.resume()
            self._server.restart(keep=False)
            self._server.seen.clear()
            self._server.lost.clear()

        self._call(reset)

    # ------------------------------------------------------------------------------------- users, virtual hosts

    @property
    def users(self) -> tuple[str, ...]:
        """The names of the users."""
        return self._call(lambda: tuple(self._server.access.users))

    def add_user(
        self,
        name: str,
        password: str,
        *,
        permissions: Mapping[str, Permissions | tuple[str, str, str]] | None = None,
    ) -> None:
        """Add a user, or change the password of one that there is.

        Args:
            name: the user's name.
            password: the password.
            permissions: by virtual host; ``None`` is everything on all of them, or what the user has.

        Raises:
            TypeError: name, password or a pattern is no string.
            ValueError: there is no such virtual host, or that is no regular expression; a name that is empty or longer
                than 255 bytes, an empty password.
        """
        check_name("name", name)
        check_password("password", password)
        given = None if permissions is None else given_permissions(name, permissions)

        def add() -> None:
            for vhost in given or ():
                self._vhost(vhost)
            user = self._server.access.users.setdefault(
                name, User(name, password, dict.fromkeys(self._server.vhosts, EVERYTHING))
            )
            user.password = password
            if given is not None:
                user.permissions = given

        self._call(add)

    def delete_user(self, name: str) -> None:
        """Delete a user; connections stay.

        Raises:
            ValueError: there is no such user.
        """
        self._call(lambda: self._server.access.users.pop(self._user(name).name))

    def set_permissions(
        self, user: str, configure: str = ".*", write: str = ".*", read: str = ".*", *, vhost: str = "/"
    ) -> None:
        """Say what *user* may do; regular expressions, ``""`` for nothing.

        Args:
            user: the user's name.
            configure: what may be declared and deleted.
            write: what may be published to.
            read: what may be consumed from.
            vhost: the virtual host that it is about.

        Raises:
            ValueError: there is no such user or virtual host, or that is no regular expression.
        """
        given = given_permissions(user, {vhost: Permissions(configure, write, read)})

        def change() -> None:
            self._vhost(vhost)
            self._user(user).permissions.update(given)
            for session in self._server.sessions:
                for channel in session.channels.values():
                    channel.publisher.forget_permissions()

        self._call(change)

    def set_limits(self, user: str, *, channels: int | None = None, connections: int | None = None) -> None:
        """Say how many channels and connections *user* may have; ``None``, or -1, is any number.

        Args:
            user: the user's name.
            channels: on all of the user's connections together.
            connections: how many of these.

        Raises:
            ValueError: there is no such user, or a limit is less than -1.
            TypeError: a limit is no whole number.
        """
        check_limit("channels", channels)
        check_limit("connections", connections)

        def change() -> None:
            self._user(user).max_channels = None if channels == -1 else channels
            self._user(user).max_connections = None if connections == -1 else connections

        self._call(change)

    def _user(self, name: str) -> User:
        try:
            return self._server.access.users[name]
        except KeyError:
            raise ValueError(f"there is no user {name!r}") from None

    def add_vhost(self, name: str, *, users: tuple[str, ...] | None = None) -> None:
        """Add a virtual host.

        Args:
            name: of the virtual host.
            users: who may do everything there; ``None`` is all users that there are.

        Raises:
            TypeError: *name* is no string, or *users* no tuple of them.
            ValueError: there is no such user; a name that is empty or longer than 255 bytes.
        """
        check_name("name", name)
        if users is not None:
            check_names("users", users)

        def add() -> None:
            welcome = [self._user(each) for each in (self._server.access.users if users is None else users)]
            if name not in self._server.vhosts:
                self._server.vhosts[name] = VirtualHost(name, self._server.clock, self._server.dialect)
            for user in welcome:
                user.permissions[name] = EVERYTHING

        self._call(add)

    def delete_vhost(self, name: str) -> None:
        """Delete a virtual host with all that it has; its connections are closed.

        Raises:
            ValueError: there is no such virtual host.
        """

        def delete() -> None:
            vhost = self._vhost(name)
            for session in self._sessions():
                if session.vhost is vhost:
                    session.close(Refusal(320, f"vhost '{name}' is down", class_id=0, method_id=0))
            vhost.end()
            del self._server.vhosts[name]
            for user in self._server.access.users.values():
                user.permissions.pop(name, None)

        self._call(delete)
