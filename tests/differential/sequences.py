"""Sequences of operations, made from a seed."""

from __future__ import annotations

from random import Random
from typing import Any

from tests.differential.operations import SHORT, Op

LONG = 600_000
_KEYS = ("a", "b", "a.b", "a.b.c", "", "q0", "q1")
_PATTERNS = ("a", "b", "#", "*", "a.*", "a.#", "#.c", "*.b", "a.*.#", "#.#", "", "a.b", "*.#.c")
_HEADERS: tuple[dict[str, Any], ...] = (
    {},
    {"h": 1},
    {"h": 1, "g": "v"},
    {"h": "1"},
    {"g": "v", "x-h": 1},
    {"h": True},
    {"h": None},
)
_MATCHES: tuple[dict[str, Any], ...] = (
    {},
    {"x-match": "all", "h": 1},
    {"x-match": "any", "h": 1, "g": "v"},
    {"x-match": "all", "h": 1, "g": "v"},
    {"x-match": "any-with-x", "x-h": 1},
    {"x-match": "all-with-x", "x-h": 1, "g": "v"},
    {"h": None},
    {"x-match": "any"},
    {"x-match": "some"},
    {"x-match": 1},
)


_MAY_NOT_WAIT = {"queue.bind", "queue.delete", "queue.purge", "exchange.bind", "exchange.unbind", "exchange.delete"}


class Maker:
    """Makes one sequence; what it knows of the broker's state is a guess that makes the operations meaningful."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.operations: list[Op] = []
        self.queues: dict[str, str] = {}  # name → type
        self.exchanges: dict[str, str] = {}
        self.consumers: list[tuple[int, str]] = []
        self.quorum = self.chance(0.2)
        self.stream = not self.quorum and self.chance(0.06)
        self.short = self.chance(0.08)
        self.wild = self.chance(0.25)
        self.channels = (0, 0, 1, 2) if self.chance(0.4) else (0,)
        self.bodies = 0

    def chance(self, probability: float) -> bool:
        """True so often."""
        return self.random.random() < probability

    def pick(self, *choices: Any) -> Any:
        """One of them."""
        return self.random.choice(choices)

    def add(self, kind: str, channel: int | None = None, **arguments: Any) -> None:
        """One more operation."""
        if kind in _MAY_NOT_WAIT and self.chance(0.04):
            arguments["nowait"] = True
        self.operations.append(Op(kind, self.pick(*self.channels) if channel is None else channel, **arguments))

    def queue(self) -> str:
        """The name of a queue, which is there most of the time."""
        if self.queues and not self.chance(0.06):
            return self.pick(*self.queues)
        return self.pick("q0", "q1", "q2", "q3", "", "gen0")

    def exchange(self) -> str:
        """The name of an exchange, which is there most of the time."""
        if self.exchanges and not self.chance(0.15):
            return self.pick(*self.exchanges)
        return self.pick("", "amq.direct", "amq.fanout", "amq.topic", "amq.headers", "x0", "x1", "x2")

    # ------------------------------------------------------------------------------------------------ declaring

    def declare_queue(self, *, again: bool = False) -> None:
        """Declare a queue, or one that is there with other arguments."""
        name = self.queue() if again else self.pick("q0", "q1", "q2", "q3", "q0", "q1", "")
        kind = "quorum" if self.quorum and self.chance(0.8) else "stream" if self.stream else "classic"
        flags: dict[str, Any] = {}
        if kind != "classic" or self.chance(0.6):
            flags["durable"] = True
        if kind == "classic" or self.chance(0.05):
            for flag in ("exclusive", "auto_delete"):
                if self.chance(0.12):
                    flags[flag] = True
        arguments = self.queue_arguments(kind)
        if arguments:
            flags["arguments"] = arguments
        if again and self.chance(0.5):
            flags["passive"] = True
        self.add("queue.declare", queue=name, **flags)
        if name:
            self.queues.setdefault(name, kind)
        elif not again:
            self.queues.setdefault(f"gen{sum(each.startswith('gen') for each in self.queues)}", kind)

    def queue_arguments(self, kind: str) -> dict[str, Any]:
        """Arguments, valid most of the time."""
        arguments: dict[str, Any] = {}
        if kind != "classic" or self.chance(0.1):
            arguments["x-queue-type"] = kind
        ttl = SHORT if self.short else LONG
        rare = 0.1
        if kind != "stream" or self.chance(0.1):
            if self.chance(0.5 if self.short else rare):
                arguments["x-message-ttl"] = self.pick(0, ttl, ttl, LONG)
            if self.chance(0.2 if self.short else 0.05):
                arguments["x-expires"] = self.pick(ttl, ttl, LONG) if kind == "classic" else LONG
            if self.chance(0.3):
                arguments["x-dead-letter-exchange"] = self.pick("", "x0", "x1", "amq.fanout", "x3")
                if self.chance(0.6):
                    arguments["x-dead-letter-routing-key"] = self.pick("q0", "q1", "q2", "a")
            if self.chance(0.25):
                arguments["x-max-length"] = self.pick(0, 1, 1, 2, 3)
            if self.chance(0.07):
                arguments["x-max-length-bytes"] = self.pick(0, 3, 10, 1000) if kind == "classic" else 1000
            if self.chance(0.25) and kind == "classic":
                arguments["x-overflow"] = self.pick(
                    "drop-head", "reject-publish", "reject-publish", "reject-publish-dlx"
                )
            if self.chance(0.12):
                arguments["x-single-active-consumer"] = True
        if (kind == "classic" and self.chance(0.12)) or self.chance(0.01):
            arguments["x-max-priority"] = self.pick(1, 3, 5, 10)
        if (kind == "quorum" and self.chance(0.3)) or self.chance(0.01):
            arguments["x-delivery-limit"] = self.pick(0, 1, 2, 5)
        if self.wild and self.chance(0.3):
            arguments[
                self.pick(
                    "x-message-ttl",
                    "x-expires",
                    "x-dead-letter-exchange",
                    "x-dead-letter-routing-key",
                    "x-max-length",
                    "x-max-length-bytes",
                    "x-max-priority",
                    "x-overflow",
                    "x-single-active-consumer",
                    "x-delivery-limit",
                    "x-queue-type",
                    "x-queue-mode",
                    "x-queue-version",
                    "x-queue-leader-locator",
                    "x-max-age",
                    "x-unknown",
                    "x-dead-letter-strategy",
                    "x-quorum-initial-group-size",
                    "x-max-in-memory-length",
                    "x-stream-max-segment-size-bytes",
                )
            ] = self.pick(
                -1, 0, 1, 256, 1 << 40, "1", "", "lazy", "classic", "7D", True, False, None, 1.5, [1], {"a": 1}
            )
        return arguments

    def declare_exchange(self, *, again: bool = False) -> None:
        """Declare an exchange, or one that is there with other arguments."""
        name = self.exchange() if again else self.pick("x0", "x1", "x2")
        kind = self.pick("direct", "fanout", "topic", "headers", "direct", "topic", "fanout")
        if self.chance(0.02):
            kind = self.pick("x-nosuch", "", "Direct")
        flags: dict[str, Any] = {}
        for flag, probability in (("durable", 0.4), ("auto_delete", 0.15), ("internal", 0.1)):
            if self.chance(probability):
                flags[flag] = True
        if self.chance(0.2):
            flags["arguments"] = {"alternate-exchange": self.pick("x0", "x1", "x2", "amq.fanout", "x3", "")}
            if self.wild and self.chance(0.3):
                flags["arguments"]["alternate-exchange"] = self.pick(1, True, None)
        if again and self.chance(0.4):
            flags["passive"] = True
        self.add("exchange.declare", exchange=name, exchange_type=kind, **flags)
        if name.startswith("x"):
            self.exchanges.setdefault(name, kind)

    def binding(self, exchange: str) -> dict[str, Any]:
        """A key and arguments that make sense for the type."""
        kind = self.exchanges.get(exchange, "")
        if kind == "headers" or exchange == "amq.headers":
            return {"routing_key": self.pick("", "a"), "arguments": self.pick(*_MATCHES)}
        key = self.pick(*_PATTERNS) if kind == "topic" or exchange == "amq.topic" else self.pick(*_KEYS)
        return {"routing_key": key} | ({"arguments": {"h": 1}} if self.chance(0.05) else {})

    def bind(self) -> None:
        """Bind or unbind."""
        exchange = self.exchange()
        verb = "unbind" if self.chance(0.25) else "bind"
        previous = [each for each in self.operations if each.kind.endswith(".bind") and self.random.random() < 0.8]
        if verb == "unbind" and previous:
            chosen = self.random.choice(previous)
            same = {name: value for name, value in chosen.arguments.items() if name != "nowait"}
            self.add(chosen.kind.replace(".bind", ".unbind"), **same)
        elif self.chance(0.25) and self.exchanges:
            self.add(f"exchange.{verb}", destination=self.exchange(), source=exchange, **self.binding(exchange))
        else:
            self.add(f"queue.{verb}", queue=self.queue(), exchange=exchange, **self.binding(exchange))

    # ------------------------------------------------------------------------------------------------- messages

    def publish(self) -> None:
        """Publish one or several messages."""
        exchange = self.exchange() if self.exchanges and self.chance(0.6) else ""
        key = self.pick(*(self.queues or ("q0",))) if not exchange else self.pick(*_KEYS)
        if not exchange and self.chance(0.1):
            key = self.pick(*_KEYS)
        channel = self.pick(*self.channels)
        for _ in range(self.pick(1, 1, 1, 2, 3)):
            properties: dict[str, Any] = {}
            if self.chance(0.2):
                properties["delivery_mode"] = self.pick(1, 2, 2)
            if self.chance(0.25) or "headers" in self.exchanges.values():
                properties["headers"] = dict(self.pick(*_HEADERS))
            if self.chance(0.08):
                properties.setdefault("headers", {})[self.pick("CC", "BCC")] = self.pick(
                    ["q1"], ["q0", "q1"], ["a"], [], "q1", [1]
                )
            if self.chance(0.5 if self.short else 0.06):
                properties["expiration"] = self.pick("0", str(SHORT if self.short else LONG), str(LONG))
                if self.wild and self.chance(0.2):
                    properties["expiration"] = self.pick("-1", "x", "", "1.5", "10s", str(1 << 40))
            if self.chance(0.15):
                properties["priority"] = self.pick(0, 1, 2, 5, 9, 255)
            if self.chance(0.05):
                properties |= self.pick(
                    {"content_type": "text/plain", "type": "t"},
                    {"message_id": "m", "app_id": "a"},
                    {"user_id": "guest"},
                )
            if self.wild and self.chance(0.03):
                properties["user_id"] = "other"
            self.bodies += 1
            body = f"m{self.bodies}" + "." * self.pick(0, 0, 0, 5)
            arguments: dict[str, Any] = {"exchange": exchange, "routing_key": key, "body": body}
            if properties:
                arguments["properties"] = properties
            if self.chance(0.3):
                arguments["mandatory"] = True
            self.add("basic.publish", channel, **arguments)

    def get(self) -> None:
        """Fetch."""
        self.add("basic.get", queue=self.queue(), **({"no_ack": True} if self.chance(0.3) else {}))

    def consume(self) -> None:
        """Begin to consume."""
        channel = self.pick(*self.channels)
        tag = self.pick("c0", "c1", "c2", "c3", "c0", "c1")
        if self.quorum:
            tag = f"c{len(self.operations)}"  # see known.py: tags that are used again
        if (channel, tag) in self.consumers and not self.chance(0.05):
            return
        flags: dict[str, Any] = {}
        for flag, probability in (("no_ack", 0.25), ("exclusive", 0.06)):
            if self.chance(probability):
                flags[flag] = True
        arguments: dict[str, Any] = {}
        if self.chance(0.1):
            arguments["x-priority"] = self.pick(0, 1, 5, -1)
            if self.wild and self.chance(0.2):
                arguments["x-priority"] = self.pick("1", True, 1.5)
        if self.stream:
            arguments["x-stream-offset"] = self.pick("first", "next", 0, 1)
            self.add("basic.qos", channel, prefetch_count=10)
            flags.pop("no_ack", None)
        if arguments:
            flags["arguments"] = arguments
        self.add("basic.consume", channel, queue=self.queue(), consumer_tag=tag, **flags)
        self.consumers.append((channel, tag))

    def cancel(self) -> None:
        """Consume no more."""
        if self.consumers and not self.chance(0.05):
            channel, tag = self.random.choice(self.consumers)
            self.consumers.remove((channel, tag))
            self.add("basic.cancel", channel, consumer_tag=tag)
        else:
            self.add("basic.cancel", consumer_tag="c9")

    def settle(self) -> None:
        """Settle a delivery, or several."""
        arguments: dict[str, Any] = {"verdict": self.pick("ack", "ack", "nack", "reject", "discard", "discard")}
        if self.chance(0.2):
            arguments["multiple"] = True
        if self.chance(0.04):
            arguments["tag"] = self.pick(0, 1, 99)
        else:
            arguments["which"] = self.pick(0, 0, 0, 1, 2, -1)
        self.add("settle", **arguments)

    def other(self) -> None:
        """What is rare."""
        match self.random.randrange(9):
            case 0:
                self.add("queue.purge", queue=self.queue())
            case 1:
                flags = {flag: True for flag in ("if_unused", "if_empty") if self.chance(0.3)}
                self.add("queue.delete", queue=self.queue(), **flags)
            case 2:
                self.add(
                    "exchange.delete", exchange=self.exchange(), **({"if_unused": True} if self.chance(0.4) else {})
                )
            case 3:
                self.add("basic.recover", requeue=not self.chance(0.1))
            case 4:
                self.add("close")
            case 5 | 6:
                flags = {"global_": True} if self.chance(0.15) else {}
                self.add("basic.qos", prefetch_count=self.pick(0, 1, 1, 2, 3), **flags)
            case 7:
                self.add(self.pick("confirm.select", "tx.select"))
            case _:
                self.add(self.pick("tx.commit", "tx.rollback"))

    def replies(self) -> None:
        """Direct reply-to: ask, and answer."""
        flags = {} if self.chance(0.1) else {"no_ack": True}
        self.add("basic.consume", 0, queue="amq.rabbitmq.reply-to", consumer_tag="r", **flags)
        properties = {"reply_to": "amq.rabbitmq.reply-to"}
        self.add("basic.publish", 0, exchange="", routing_key="q0", properties=properties, body="ask")
        self.add("basic.get", queue="q0", no_ack=True)
        self.add("reply", self.pick(0, 1, 2), body="answer")

    # ---------------------------------------------------------------------------------------------------- all

    def make(self) -> list[Op]:
        """The sequence."""
        for _ in range(self.pick(1, 1, 2, 2, 3)):
            self.declare_queue()
        for _ in range(self.pick(0, 1, 1, 2)):
            self.declare_exchange()
        for _ in range(self.pick(0, 1, 2, 3) if self.exchanges else 0):
            self.bind()
        if self.chance(0.35):
            self.add("confirm.select", 0)
        elif self.chance(0.15):
            self.add("tx.select", 0)
        if self.chance(0.3):
            self.add("basic.qos", 0, prefetch_count=self.pick(1, 2, 3))
        verbs = [
            (self.publish, 30),
            (self.get, 9),
            (self.consume, 9),
            (self.cancel, 2),
            (self.settle, 16),
            (self.other, 9),
            (self.bind, 4),
            (lambda: self.declare_queue(again=True), 4),
            (lambda: self.declare_exchange(again=True), 2),
            (self.declare_queue, 1),
            (self.replies, 1),
        ]
        if any(each.kind == "tx.select" for each in self.operations):
            verbs.append((lambda: self.add(self.pick("tx.commit", "tx.commit", "tx.rollback"), 0), 15))
        for _ in range(self.random.randrange(3, 11) if self.chance(0.7) else self.random.randrange(10, 26)):
            self.random.choices([each for each, _ in verbs], [weight for _, weight in verbs])[0]()
        return self.operations


def sequence(seed: int, number: int) -> list[Op]:
    """The sequence *number* of *seed*: always the same."""
    return Maker(Random(f"{seed} {number}")).make()
