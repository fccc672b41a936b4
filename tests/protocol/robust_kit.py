"""What the tests of recovery share: a server that answers whatever it is asked, link after link, until told otherwise.

::

    async with robust() as (connection, server):
        channel = await connection.channel()
        server.at(commands.Queue.Declare, refuse(406), link=1)
        server.drop()
        await within(connection.ready())

Links are counted from 0, as the peer's sessions are. The pauses of recovery are cut down to milliseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, NamedTuple, TypeVar
from unittest import mock

from pamqp import base, body, commands, header

from leveret import RetryPolicy, RobustChannel, RobustConnection, RobustQueue, connect_robust
from tests.protocol.kit import turns, until, within
from tests.support.peer import PeerError, ScriptedPeer, Session

_M = TypeVar("_M", bound=base.Frame)
Action = Callable[["ServerLink", int, Any], object]
"""What to do instead of an answer: given the link, the channel and the method."""

QUICK = RetryPolicy(initial=0.001, maximum=0.05)

REPLIES: dict[type[base.Frame], Callable[[Any], base.Frame]] = {
    commands.Channel.Open: lambda _: commands.Channel.OpenOk(),
    commands.Channel.Close: lambda _: commands.Channel.CloseOk(),
    commands.Channel.Flow: lambda m: commands.Channel.FlowOk(m.active),
    commands.Confirm.Select: lambda _: commands.Confirm.SelectOk(),
    commands.Exchange.Declare: lambda _: commands.Exchange.DeclareOk(),
    commands.Exchange.Delete: lambda _: commands.Exchange.DeleteOk(),
    commands.Exchange.Bind: lambda _: commands.Exchange.BindOk(),
    commands.Exchange.Unbind: lambda _: commands.Exchange.UnbindOk(),
    commands.Queue.Bind: lambda _: commands.Queue.BindOk(),
    commands.Queue.Unbind: lambda _: commands.Queue.UnbindOk(),
    commands.Queue.Delete: lambda _: commands.Queue.DeleteOk(0),
    commands.Queue.Purge: lambda _: commands.Queue.PurgeOk(0),
    commands.Basic.Qos: lambda _: commands.Basic.QosOk(),
    commands.Basic.Consume: lambda m: commands.Basic.ConsumeOk(m.consumer_tag),
    commands.Basic.Cancel: lambda m: commands.Basic.CancelOk(m.consumer_tag),
    commands.Basic.Get: lambda _: commands.Basic.GetEmpty(),
    commands.Tx.Select: lambda _: commands.Tx.SelectOk(),
    commands.Tx.Commit: lambda _: commands.Tx.CommitOk(),
    commands.Tx.Rollback: lambda _: commands.Tx.RollbackOk(),
    commands.Connection.UpdateSecret: lambda _: commands.Connection.UpdateSecretOk(),
}


class Sent(NamedTuple):
    """A publish that came in whole."""

    link: int
    channel: int
    routing_key: str
    body: bytes


class Rule(NamedTuple):
    """See :meth:`Server.at`."""

    kind: type[base.Frame]
    action: Action
    link: int | None
    times: Iterator[object]
    where: Callable[[Any], object]


class ServerLink:
    """One connection, as the server sees it.

    Attributes:
        number: how many came before.
        is_up: whether the handshake is done.
        over: whether the server has ended it.
        methods: what came after the handshake, with the channel; without content.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.number = session.number
        self.is_up = False
        self.over = False
        self.open: set[int] = set()
        self.closing: set[int] = set()
        self.held: dict[int, Held] = {}
        self.confirming: Counter[int] = Counter()
        self.methods: list[tuple[int, base.Frame]] = []

    def all(self, kind: type[_M]) -> list[_M]:
        """The methods of one kind."""
        return [value for _, value in self.methods if isinstance(value, kind)]

    def channel_of(self, queue: str) -> int:
        """The channel that consumes *queue* was started on last."""
        return next(c for c, m in reversed(self.methods) if isinstance(m, commands.Basic.Consume) and m.queue == queue)

    def send(self, channel: int, *frames: base.Frame) -> None:
        """Send methods, in one piece."""
        self.session.send(channel, *frames)

    def reply(self, channel: int, method: base.Frame) -> None:
        """Answer as usual."""
        if isinstance(method, commands.Confirm.Select):
            self.confirming[channel] = 0
        if not getattr(method, "nowait", False):
            self.send(channel, answer(method))

    def deliver(self, queue: str, delivery_tag: int, data: bytes, tag: str | None = None) -> None:
        """Deliver to the consumer of *queue*, by the tag that it has on this link."""
        channel = self.channel_of(queue)
        consume = next(m for m in reversed(self.all(commands.Basic.Consume)) if m.queue == queue)
        self.session.deliver(channel, tag or consume.consumer_tag, delivery_tag, data)

    def cancel(self, queue: str) -> None:
        """Cancel the consumer of *queue*, as when the queue is deleted."""
        consume = next(m for m in reversed(self.all(commands.Basic.Consume)) if m.queue == queue)
        self.send(self.channel_of(queue), commands.Basic.Cancel(consume.consumer_tag, True))

    def close_channel(
        self, channel: int, code: int = 406, text: str = "REFUSED", ids: tuple[int, int] = (0, 0)
    ) -> None:
        """Close a channel; what still comes on it is discarded."""
        self.closing.add(channel)
        self.send(channel, commands.Channel.Close(code, text, *ids))

    def kill(self, code: int = 320, text: str = "CONNECTION_FORCED", ids: tuple[int, int] = (0, 0)) -> None:
        """Close the connection; what still comes on it is discarded."""
        self.over = True
        self.send(0, commands.Connection.Close(code, text, *ids))
        self.session.eof()

    def drop(self) -> None:
        """Reset the connection."""
        self.over = True
        self.session.reset()


def silent(link: ServerLink, channel: int, method: base.Frame) -> None:
    """Do not answer, nor what comes after it on its channel."""
    Held()(link, channel, method)


def drop(link: ServerLink, channel: int, method: base.Frame) -> None:
    """Reset the connection."""
    link.drop()


def refuse(code: int, text: str = "REFUSED") -> Action:
    """Close the channel over the method."""
    return lambda link, channel, method: link.close_channel(channel, code, text, ids(method))


def kill(code: int, text: str = "REFUSED") -> Action:
    """Close the connection over the method."""
    return lambda link, channel, method: link.kill(code, text, ids(method))


def ids(method: base.Frame) -> tuple[int, int]:
    """Its class and method number."""
    return method.index >> 16, method.index & 0xFFFF


class Held:
    """An action that keeps the answer back, and those to what follows on the channel, until :meth:`go`.

    Consumers are started and cancelled by queues, which keep nobody else waiting.
    """

    def __init__(self) -> None:
        self.kept: list[tuple[ServerLink, int, base.Frame]] = []

    def __call__(self, link: ServerLink, channel: int, method: base.Frame) -> None:
        self.kept.append((link, channel, method))
        if channel and not isinstance(method, commands.Basic.Consume | commands.Basic.Cancel):
            link.held[channel] = self

    async def reached(self, count: int = 1) -> None:
        await until(lambda: len(self.kept) >= count)

    def go(self) -> None:
        kept, self.kept = self.kept, []
        for link, channel, method in kept:
            link.held.pop(channel, None)
            link.reply(channel, method)


def answer(method: base.Frame) -> base.Frame:
    """The usual reply."""
    if isinstance(method, commands.Queue.Declare):
        return commands.Queue.DeclareOk(method.queue or f"amq.gen-{next(_names)}", 0, 0)
    return REPLIES[type(method)](method)


_names = itertools.count(1)


class Server(ScriptedPeer):
    """Answers whatever it is asked.

    Attributes:
        is_down: whether new connections are reset at once.
        greetings: what to do with a link instead of shaking hands; the link ends with it.
        holds_confirms: whether publishes are left unconfirmed.
        may_leave: whether a client that goes away in the middle of something is no failure.
        published: what was published, over all links.
        violations: methods on channels that are not open, over which a broker closes the connection (504).
    """

    def __init__(self, **handshake: Any) -> None:
        super().__init__()
        self.options = handshake
        self.is_down = False
        self.holds_confirms = False
        self.may_leave = False
        self.greetings: dict[int, Callable[[Session], Awaitable[object]]] = {}
        self.links: list[ServerLink] = []
        self.published: list[Sent] = []
        self.violations: list[tuple[int, object]] = []
        self._rules: list[Rule] = []

    def at(
        self,
        kind: type[base.Frame],
        action: Action,
        *,
        link: int | None = None,
        times: int | None = 1,
        where: Callable[[Any], object] = lambda _: True,
    ) -> None:
        """Do *action* instead of answering a *kind*, so many times (None: always)."""
        limit = iter(range(times)) if times is not None else itertools.count()
        self._rules.append(Rule(kind, action, link, limit, where))

    def forget_rules(self) -> None:
        """Answer everything again."""
        self._rules.clear()

    @property
    def link(self) -> ServerLink:
        """The newest one."""
        return self.links[-1]

    async def up(self, number: int) -> ServerLink:
        """Wait until the link of that number has shaken hands."""
        await until(lambda: len(self.links) > number and self.links[number].is_up)
        return self.links[number]

    async def seen(self, kind: type[_M], count: int = 1, link: int | None = None) -> list[_M]:
        """Wait until so many of a *kind* have come, on one link or on all."""

        def found() -> list[_M]:
            return [m for each in self.links if link in (None, each.number) for m in each.all(kind)]

        await until(lambda: len(found()) >= count)
        return found()

    def drop(self) -> None:
        """Reset the newest link."""
        self.link.drop()

    def keys(self) -> list[str]:
        """Routing keys of what was published."""
        return [sent.routing_key for sent in self.published]

    # ------------------------------------------------------------------------------------------------ the script

    async def script(self, session: Session) -> None:
        link = ServerLink(session)
        self.links.append(link)
        if self.is_down:
            session.reset()
        elif session.number in self.greetings:
            await self.greetings[session.number](session)
        else:
            try:
                await session.handshake(**self.options)
                link.is_up = True
                await self._serve(link)
            except (PeerError, ConnectionError):
                if not (link.over or self.may_leave):
                    raise

    async def _serve(self, link: ServerLink) -> None:
        parts: dict[int, tuple[commands.Basic.Publish, int, bytes]] = {}
        async for channel, value in link.session.frames():
            if link.over:
                continue
            if channel in link.closing:
                if isinstance(value, commands.Channel.CloseOk):
                    link.closing.discard(channel)
                    link.open.discard(channel)
                elif isinstance(value, commands.Channel.Close):
                    link.send(channel, commands.Channel.CloseOk())
                continue
            if channel and (channel in link.open) == isinstance(value, commands.Channel.Open):
                self.violations.append((channel, value))
            if isinstance(value, base.Frame):
                link.methods.append((channel, value))
                if isinstance(value, commands.Channel.Close):
                    link.open.discard(channel)
                elif isinstance(value, commands.Channel.Open):
                    link.open.add(channel)
                    link.confirming.pop(channel, None)
                    parts.pop(channel, None)
            if isinstance(value, commands.Basic.Publish):
                parts[channel] = (value, -1, b"")
            elif isinstance(value, header.ContentHeader):
                parts[channel] = (parts[channel][0], value.body_size, b"")
            elif isinstance(value, body.ContentBody):
                publish, size, data = parts[channel]
                parts[channel] = (publish, size, data + value.value)
            if not isinstance(value, base.Frame | header.ContentHeader | body.ContentBody):
                continue
            if (part := parts.get(channel)) is not None:
                if len(part[2]) == part[1]:
                    del parts[channel]
                    self._on_publish(link, channel, *part)
            elif isinstance(value, base.Frame):
                self._on_method(link, channel, value)

    def _apply_rule(self, link: ServerLink, channel: int, method: base.Frame) -> bool:
        for rule in self._rules:
            fits = isinstance(method, rule.kind) and rule.link in (None, link.number) and rule.where(method)
            if fits and next(rule.times, None) is not None:
                rule.action(link, channel, method)
                return True
        return False

    def _on_publish(self, link: ServerLink, channel: int, publish: commands.Basic.Publish, _: int, data: bytes) -> None:
        self.published.append(Sent(link.number, channel, publish.routing_key, data))
        is_confirming = channel in link.confirming
        if is_confirming:
            link.confirming[channel] += 1
        if not self._apply_rule(link, channel, publish) and is_confirming and not self.holds_confirms:
            link.send(channel, commands.Basic.Ack(link.confirming[channel]))

    def _on_method(self, link: ServerLink, channel: int, method: base.Frame) -> None:
        if (held := link.held.get(channel)) is not None:
            held.kept.append((link, channel, method))
        elif self._apply_rule(link, channel, method):
            pass
        elif isinstance(method, commands.Connection.Close):
            link.send(0, commands.Connection.CloseOk())
            with contextlib.suppress(OSError):
                link.session.eof()
        elif type(method) in REPLIES or isinstance(method, commands.Queue.Declare):
            link.reply(channel, method)


def quick() -> contextlib.ExitStack:
    """Recovery with pauses of milliseconds."""
    stack = contextlib.ExitStack()
    for name, seconds in {
        "leveret.recovery._MIN_PAUSE": 0.001,
        "leveret.recovery._MAX_FLAP_PAUSE": 0.005,
        "leveret.troubles._FIRST_PAUSE": 0.01,
    }.items():
        stack.enter_context(mock.patch(name, seconds))
    return stack


@contextlib.asynccontextmanager
async def robust(
    query: str = "", *, server: Server | None = None, **kwargs: Any
) -> AsyncIterator[tuple[RobustConnection, Server]]:
    """A robust connection and its server; *query* is of the URL, *kwargs* of connect_robust()."""
    with quick():
        async with server or Server() as peer:
            connection = await within(connect_robust(f"{peer.url}?{query}", **{"retry": QUICK} | kwargs))
            try:
                yield connection, peer
            finally:
                await connection.close(timeout=1)
            assert not peer.violations


async def lost(connection: RobustConnection, server: Server) -> None:
    """Drop the link, with the server down, until the connection knows."""
    server.is_down = True
    server.drop()
    await until(lambda: not connection.connected.is_set())


async def back(connection: RobustConnection, server: Server) -> None:
    """The server is up again: wait for the connection."""
    server.is_down = False
    await within(connection.ready())


async def again(connection: RobustConnection, server: Server) -> ServerLink:
    """Drop the link and wait until all is back on another one, which is returned."""
    attempt = connection.connection_attempt
    server.drop()
    await until(lambda: connection.connection_attempt > attempt)
    return server.link


async def closed_by_broker(channel: RobustChannel, server: Server, code: int = 406, text: str = "REFUSED") -> None:
    """Have the broker close *channel*, until it knows."""
    gone = asyncio.Event()

    def on_close(*_: object) -> None:
        gone.set()

    channel.close_callbacks.add(on_close)
    server.link.close_channel(channel.number or 0, code, text)
    await within(gone.wait())
    channel.close_callbacks.remove(on_close)


async def fence(connection: RobustConnection) -> None:
    """Wait until each side has read all that the other wrote so far."""
    for _ in range(2):
        await within(connection.update_secret("guest"))
        await turns()


async def channel_of(connection: RobustConnection, **kwargs: Any) -> RobustChannel:
    """An open channel."""
    channel = connection.channel(**kwargs)
    await within(channel.initialize())
    return channel


async def queue_on(channel: RobustChannel, name: str = "q") -> RobustQueue:
    """A declared queue, as what it is."""
    queue = await within(channel.declare_queue(name))
    assert isinstance(queue, RobustQueue)
    return queue
