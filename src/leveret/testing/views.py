"""What a test sees of the broker: snapshots of values, which no later event changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from leveret.testing.consumers import Consumer
    from leveret.testing.exchanges import Exchange
    from leveret.testing.messages import Stored
    from leveret.testing.queues import Queue
    from leveret.testing.session import Session
    from leveret.wire.codec import Properties

T = TypeVar("T")


class MessageView:
    """One message: ``body``, ``exchange``, ``routing_key``, ``headers``, ``properties``."""

    __slots__ = ("_stored",)

    def __init__(self, stored: Stored) -> None:
        self._stored = stored

    def __repr__(self) -> str:
        return f"<MessageView {self.exchange!r} {self.routing_key!r} {self.body[:40]!r}>"

    @property
    def body(self) -> bytes:
        """What was published."""
        return self._stored.body

    @property
    def exchange(self) -> str:
        """Where to; a dead letter has its dead letter exchange."""
        return self._stored.exchange

    @property
    def routing_key(self) -> str:
        """With what."""
        return self._stored.routing_key

    @property
    def headers(self) -> Mapping[str, Any]:
        """The headers; empty without any, or with malformed ones."""
        return self._stored.headers

    @property
    def properties(self) -> Properties:
        """All properties, with the values that the wire has."""
        return self._stored.decoded()


@dataclass(frozen=True)
class ConsumerView:
    """One consumer: its tag, its queue, what it asked for, and how many messages it has in hand."""

    tag: str
    queue: str
    no_ack: bool
    exclusive: bool
    prefetch: int
    priority: int
    in_hand: int
    active: bool

    @classmethod
    def of(cls, each: Consumer, active: bool) -> ConsumerView:
        """A snapshot."""
        return cls(
            each.tag, each.queue_name, each.no_ack, each.exclusive, each.prefetch, each.priority, each.in_hand, active
        )


@dataclass(frozen=True)
class QueueView:
    """One queue.

    Attributes:
        messages: what waits, in order; what is out for acknowledgement is only counted, in *unacked*.
    """

    name: str
    type: str
    durable: bool
    exclusive: bool
    auto_delete: bool
    arguments: Mapping[str, Any]
    messages: tuple[MessageView, ...]
    unacked: int
    consumers: tuple[ConsumerView, ...]

    @classmethod
    def of(cls, queue: Queue) -> QueueView:
        """A snapshot."""
        return cls(
            queue.name,
            queue.type,
            queue.durable,
            queue.exclusive,
            queue.auto_delete,
            dict(queue.arguments),
            tuple(MessageView(message) for message in queue.waiting()),
            queue.unacked,
            tuple(ConsumerView.of(each, queue.consumers.active in (None, each)) for each in queue.consumers),
        )

    @property
    def bodies(self) -> list[bytes]:
        """The bodies of what waits, in order."""
        return [message.body for message in self.messages]


@dataclass(frozen=True)
class BindingView:
    """One binding; *is_queue* says whether the destination is a queue or an exchange."""

    source: str
    destination: str
    is_queue: bool
    routing_key: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class ExchangeView:
    """One exchange and what is bound to it."""

    name: str
    type: str
    durable: bool
    auto_delete: bool
    internal: bool
    arguments: Mapping[str, Any]
    bindings: tuple[BindingView, ...]

    @classmethod
    def of(cls, exchange: Exchange) -> ExchangeView:
        """A snapshot."""
        bindings = tuple(
            BindingView(each.source, each.target.name, each.target.is_queue, each.key, dict(each.arguments))
            for each in exchange.bindings.values()
        )
        return cls(
            exchange.name,
            exchange.type,
            exchange.durable,
            exchange.auto_delete,
            exchange.internal,
            dict(exchange.arguments),
            bindings,
        )


@dataclass(frozen=True)
class ConnectionView:
    """One open connection.

    Attributes:
        port: the client's, which tells connections apart.
        channels: the numbers of its open channels.
    """

    port: int
    name: str
    user: str
    vhost: str
    mechanism: str
    client_properties: Mapping[str, Any]
    channels: tuple[int, ...]

    @classmethod
    def of(cls, session: Session) -> ConnectionView:
        """A snapshot."""
        return cls(
            session.peer[1],
            session.name,
            session.user.name,
            session.vhost.name,
            session.mechanism,
            dict(session.client_properties),
            tuple(session.channels),
        )


class Views(Mapping[str, T]):
    """Snapshots by name, each taken when it is asked for.

    Args:
        names: gives the names.
        view: gives the snapshot of a name; KeyError when it is gone.
    """

    def __init__(self, names: Callable[[], list[str]], view: Callable[[str], T]) -> None:
        self._names = names
        self._view = view

    def __getitem__(self, name: str) -> T:
        return self._view(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def __contains__(self, name: object) -> bool:
        return name in self._names()

    def __repr__(self) -> str:
        return f"<Views of {', '.join(self._names()) or 'nothing'}>"
