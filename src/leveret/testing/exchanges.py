"""Where a message goes: exchanges, their bindings, and how each type chooses among them. Pure."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, TypeAlias

from leveret.testing.messages import Stored, erlang_type
from leveret.testing.refusals import Refusal
from leveret.wire.tables import encode_table

if TYPE_CHECKING:
    from leveret.types import FieldValue

PREDECLARED: Final = {
    "": "direct",
    "amq.direct": "direct",
    "amq.fanout": "fanout",
    "amq.topic": "topic",
    "amq.headers": "headers",
    "amq.match": "headers",
    "amq.rabbitmq.trace": "topic",
}
"""The exchanges that every virtual host has, all durable; the last one is internal."""


class Target(NamedTuple):
    """What a binding leads to."""

    is_queue: bool
    name: str


class Binding(NamedTuple):
    """One binding; *canonical* are its arguments, so that bindings can be compared."""

    source: str
    target: Target
    key: str
    arguments: Mapping[str, FieldValue]
    canonical: bytes

    @property
    def identity(self) -> Identity:
        """What makes it the same as another."""
        return (self.source, self.target, self.key, self.canonical)


Identity: TypeAlias = "tuple[str, Target, str, bytes]"


def binding(source: str, target: Target, key: str, arguments: Mapping[str, FieldValue] | None) -> Binding:
    """A binding of values; two are the same when all of them are."""
    arguments = arguments or {}
    ordered = dict(sorted(arguments.items()))
    try:
        canonical = encode_table(ordered)
    except ValueError:  # decoded from what no table is made of, as a timestamp beyond all dates
        canonical = repr(ordered).encode("utf-8", "surrogateescape")
    return Binding(source, target, key, arguments, canonical)


class Exchange:
    """One exchange and the bindings that lead away from it."""

    __slots__ = ("arguments", "auto_delete", "bindings", "durable", "internal", "name", "router", "type")

    def __init__(
        self,
        name: str,
        kind: str,
        *,
        durable: bool = True,
        auto_delete: bool = False,
        internal: bool = False,
        arguments: Mapping[str, FieldValue] | None = None,
    ) -> None:
        self.name = name
        self.type = kind
        self.durable = durable
        self.auto_delete = auto_delete
        self.internal = internal
        self.arguments = dict(arguments or {})
        self.bindings: dict[Identity, Binding] = {}
        self.router = ROUTERS[kind]()

    def __repr__(self) -> str:
        return f"<Exchange {self.name!r} {self.type} {len(self.bindings)} bindings>"

    @property
    def alternate(self) -> str | None:
        """The exchange that takes what has no route here."""
        name = self.arguments.get("alternate-exchange")
        return name if isinstance(name, str) else None

    def check(self, new: Binding) -> None:
        """Refuse a binding that the type cannot have.

        Raises:
            Refusal: 406: an ``x-match`` that there is not.
        """
        if self.type == "headers":
            check_match(new.arguments)

    def bind(self, new: Binding) -> bool:
        """Add a binding; whether it is a new one."""
        if new.identity in self.bindings:
            return False
        self.router.add(new)
        self.bindings[new.identity] = new
        return True

    def unbind(self, old: Binding) -> bool:
        """Remove a binding; whether there was one."""
        found = self.bindings.pop(old.identity, None)
        if found is None:
            return False
        self.router.remove(found)
        return True

    def route(self, key: str, message: Stored) -> Iterable[Target]:
        """Where *message* goes with *key*; a target may come more than once."""
        return self.router.route(key, message)


class Router(Protocol):
    """How one type of exchange chooses."""

    def add(self, binding: Binding) -> None:
        """Take *binding* into account."""
        ...

    def remove(self, binding: Binding) -> None:
        """Forget *binding*."""
        ...

    def route(self, key: str, message: Stored) -> Iterable[Target]:
        """The targets of *message*; one may come more than once."""
        ...


class Direct:
    """The routing key is the binding key."""

    def __init__(self) -> None:
        self._targets: dict[str, dict[Identity, Target]] = {}

    def add(self, binding: Binding) -> None:
        """Take *binding* into account."""
        self._targets.setdefault(binding.key, {})[binding.identity] = binding.target

    def remove(self, binding: Binding) -> None:
        """Forget *binding*."""
        targets = self._targets[binding.key]
        del targets[binding.identity]
        if not targets:
            del self._targets[binding.key]

    def route(self, key: str, message: Stored) -> Iterable[Target]:
        """The targets of *key*."""
        targets = self._targets.get(key)
        return targets.values() if targets else ()


class Fanout:
    """Everything goes everywhere."""

    def __init__(self) -> None:
        self._bindings: dict[Identity, Target] = {}

    def add(self, binding: Binding) -> None:
        """Take *binding* into account."""
        self._bindings[binding.identity] = binding.target

    def remove(self, binding: Binding) -> None:
        """Forget *binding*."""
        del self._bindings[binding.identity]

    def route(self, key: str, message: Stored) -> Iterable[Target]:
        """All targets."""
        return self._bindings.values()


class LocalRandom(Fanout):
    """One of the targets."""

    def route(self, key: str, message: Stored) -> Iterable[Target]:
        """One of them, by chance."""
        return [random.choice(list(self._bindings.values()))] if self._bindings else ()


def _words(key: str) -> list[str]:
    """The words of a key; an empty one has none."""
    return key.split(".") if key else []


class _Node:
    """A word of the patterns in a topic exchange."""

    __slots__ = ("bindings", "children")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.bindings: dict[Identity, Target] = {}


class Topic:
    """Words between dots; ``*`` is one word, ``#`` any number of them, zero too."""

    def __init__(self) -> None:
        self._root = _Node()
        self._known: dict[str, tuple[Target, ...]] = {}

    def add(self, binding: Binding) -> None:
        """Take *binding* into account."""
        node = self._root
        for word in _words(binding.key):
            node = node.children.setdefault(word, _Node())
        node.bindings[binding.identity] = binding.target
        self._known.clear()

    def remove(self, binding: Binding) -> None:
        """Forget *binding*, and the words that only it had."""
        path = [self._root]
        words = _words(binding.key)
        for word in words:
            path.append(path[-1].children[word])
        del path[-1].bindings[binding.identity]
        for parent, word, node in zip(reversed(path[:-1]), reversed(words), reversed(path[1:]), strict=True):
            if node.bindings or node.children:
                break
            del parent.children[word]
        self._known.clear()

    def route(self, key: str, message: Stored) -> Iterable[Target]:
        """The targets whose pattern *key* matches."""
        targets = self._known.get(key)
        if targets is None:
            if len(self._known) > 4096:
                self._known.clear()
            targets = self._known[key] = self._match(_words(key))
        return targets

    def _match(self, words: list[str]) -> tuple[Target, ...]:
        found: dict[Target, None] = {}
        # Several patterns can lead to one node: each (node, words left) is looked at once, so the work is bounded.
        seen: set[tuple[int, int]] = set()
        todo = [(self._root, 0)]
        while todo:
            node, at = todo.pop()
            if (id(node), at) in seen:
                continue
            seen.add((id(node), at))
            if at == len(words):
                found.update(dict.fromkeys(node.bindings.values()))
            else:
                for word in {words[at], "*"}:
                    child = node.children.get(word)
                    if child is not None and word != "#":
                        todo.append((child, at + 1))
            many = node.children.get("#")
            if many is not None:
                todo.extend((many, left) for left in range(at, len(words) + 1))
        return tuple(found)


class Headers:
    """The headers of the message, compared with the arguments of the binding."""

    def __init__(self) -> None:
        self._bindings: list[Binding] = []

    def add(self, binding: Binding) -> None:
        """Take *binding* into account."""
        self._bindings.append(binding)

    def remove(self, binding: Binding) -> None:
        """Forget *binding*."""
        self._bindings.remove(binding)

    def route(self, key: str, message: Stored) -> Iterable[Target]:
        """The targets whose arguments match."""
        headers = message.headers
        return [binding.target for binding in self._bindings if headers_match(binding.arguments, headers)]


def check_match(arguments: Mapping[str, FieldValue]) -> None:
    """Refuse an ``x-match`` that RabbitMQ does not have."""
    match = arguments.get("x-match", "all")
    if not isinstance(match, str):
        raise Refusal(406, f"Invalid x-match field type {erlang_type(match)} (value {match!r}); expected longstr")
    if match not in {"all", "any", "all-with-x", "any-with-x"}:
        raise Refusal(406, f'Invalid x-match field value <<"{match}">>; expected all, any, all-with-x, or any-with-x')


def headers_match(arguments: Mapping[str, FieldValue], headers: Mapping[str, FieldValue]) -> bool:
    """Whether *headers* satisfy a binding's *arguments*; a void argument asks for presence only."""
    match = arguments.get("x-match", "all")
    with_x = match in {"all-with-x", "any-with-x"}
    wanted = [
        (name, value)
        for name, value in arguments.items()
        if name != "x-match" and (with_x or not name.startswith("x-"))
    ]
    results = (name in headers and (value is None or _same(value, headers[name])) for name, value in wanted)
    return any(results) if match in {"any", "any-with-x"} else all(results)


def _same(one: object, other: object) -> bool:
    # True == 1 in Python, but a bool is no number in AMQP.
    return one == other and isinstance(one, bool) == isinstance(other, bool)


ROUTERS: Final[dict[str, Callable[[], Router]]] = {
    "direct": Direct,
    "fanout": Fanout,
    "topic": Topic,
    "headers": Headers,
    "x-local-random": LocalRandom,
}
"""The types of exchanges."""
