"""Names that code written for aio-pika has for what leveret calls otherwise.

Each says in its docstring what to write instead; those that aio-pika itself dropped after 6.8 warn as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from leveret.callbacks import CallbackCollection
from leveret.url import warn_user

if TYPE_CHECKING:
    from yarl import URL

    from leveret.types import TimeoutType
    from leveret.underlay import UnderlayChannel, UnderlayConnection
    from leveret.url import ConnectionParameter
    from leveret.wire.channel import WireChannel
    from leveret.wire.transport import Transport


def warn_of(old: str, new: str) -> None:
    """Tell the user that *old* is out of date."""
    warn_user(f"{old} is of an older aio-pika: {new}", DeprecationWarning)


def choose_loop(loop: asyncio.AbstractEventLoop | None) -> asyncio.AbstractEventLoop:
    """The running loop; where none runs, *loop* or the current one.

    Warns:
        DeprecationWarning: a *loop* is given.
    """
    if loop is not None:
        warn_of("loop=", "leave it out, connections use the running loop")
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return loop or asyncio.get_event_loop()


class OlderConnection:
    """What a connection has for aio-pika's sake."""

    __slots__ = ()

    if TYPE_CHECKING:
        PARAMETERS: tuple[ConnectionParameter, ...]
        url: URL
        _transport: Transport | None
        close_callbacks: CallbackCollection[Any, [BaseException | None]]

    @property
    def kwargs(self) -> dict[str, Any]:
        """The values of the query parameters that were given, in the URL or beside it."""
        query = self.url.query
        known = (each for each in self.PARAMETERS if each.is_kwarg and each.name in query)
        return {each.name: each.parse(query[each.name]) for each in known}

    @property
    def transport(self) -> UnderlayConnection | None:
        """What is below, with the names that aiormq has; None before it is connected."""
        from leveret.underlay import UnderlayConnection

        return None if self._transport is None else UnderlayConnection(self._transport)

    def add_close_callback(self, callback: Callable[..., object], weak: bool = False) -> None:
        """Write ``connection.close_callbacks.add(callback)``."""
        warn_of("add_close_callback()", "use close_callbacks.add()")
        self.close_callbacks.add(callback, weak)


class OlderRobustConnection:
    """What a robust connection has for aio-pika's sake."""

    __slots__ = ()

    if TYPE_CHECKING:
        reconnect_callbacks: CallbackCollection[Any, []]

    def add_reconnect_callback(self, callback: Callable[..., object], weak: bool = False) -> None:
        """Write ``connection.reconnect_callbacks.add(callback)``; this one is called with the connection twice."""
        warn_of("add_reconnect_callback()", "use reconnect_callbacks.add(), whose callbacks take the connection once")
        older: CallbackCollection[Any, [Any]] = CallbackCollection(self)
        older.add(callback, weak)
        self.reconnect_callbacks.add(older.__call__)


class OlderChannel:
    """What a channel has for aio-pika's sake."""

    __slots__ = ()

    if TYPE_CHECKING:

        @cached_property
        def close_callbacks(self) -> CallbackCollection[Any, [BaseException | None]]: ...

        @cached_property
        def return_callbacks(self) -> CallbackCollection[Any, [Any]]: ...

        @property
        def wire(self) -> WireChannel: ...

        async def live_wire(self, seconds: float) -> tuple[WireChannel, float]: ...

        def seconds(self, timeout: TimeoutType) -> float: ...

        def tag_of(self, wire_tag: str) -> str: ...

    @property
    def channel(self) -> UnderlayChannel:
        """Write ``await channel.get_underlay_channel()``.

        Raises:
            ChannelInvalidStateError: it was never opened.
        """
        from leveret.underlay import UnderlayChannel

        warn_of("channel.channel", "use await channel.get_underlay_channel()")
        return UnderlayChannel(self.wire, self.tag_of)

    async def get_underlay_channel(self) -> UnderlayChannel:
        """What is below, with the names that aiormq has; on a robust channel, once it is back.

        Raises:
            ChannelInvalidStateError: it is closed, or was never opened.
            TimeoutError: it is not back within the connection's ``operation_timeout``.
        """
        from leveret.underlay import UnderlayChannel

        wire, _ = await self.live_wire(self.seconds(None))
        wire.check_open()
        return UnderlayChannel(wire, self.tag_of)

    def add_close_callback(self, callback: Callable[..., object], weak: bool = False) -> None:
        """Write ``channel.close_callbacks.add(callback)``."""
        warn_of("add_close_callback()", "use close_callbacks.add()")
        self.close_callbacks.add(callback, weak)

    def remove_close_callback(self, callback: Callable[..., object]) -> None:
        """Write ``channel.close_callbacks.remove(callback)``."""
        warn_of("remove_close_callback()", "use close_callbacks.remove()")
        self.close_callbacks.remove(callback)

    def add_on_return_callback(self, callback: Callable[..., object], weak: bool = False) -> None:
        """Write ``channel.return_callbacks.add(callback)``."""
        warn_of("add_on_return_callback()", "use return_callbacks.add()")
        self.return_callbacks.add(callback, weak)

    def remove_on_return_callback(self, callback: Callable[..., object], weak: bool = False) -> None:
        """Write ``channel.return_callbacks.remove(callback)``."""
        warn_of("remove_on_return_callback()", "use return_callbacks.remove()")
        self.return_callbacks.remove(callback)

    @property
    def done_callbacks(self) -> CallbackCollection[Any, [BaseException | None]]:
        """Write ``channel.close_callbacks``."""
        warn_of("done_callbacks", "use close_callbacks")
        return self.close_callbacks


class OlderTransaction:
    """What a transaction has for the sake of aio-pika's documentation."""

    __slots__ = ()

    def close(self) -> None:
        """Leave it out: there is nothing to close."""
        warn_of("tx.close()", "leave it out, there is nothing to close")
