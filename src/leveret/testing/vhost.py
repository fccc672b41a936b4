"""A virtual host: its exchanges and queues, what is bound to what, and the way of a message through them. Pure."""

from __future__ import annotations

import base64
import secrets
from collections import deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

from leveret.testing.arguments import assert_same, assert_same_arguments, check_declaration, inequivalent, plain
from leveret.testing.dead_letters import dead_letter, is_cycle
from leveret.testing.exchanges import PREDECLARED, ROUTERS, Binding, Exchange, Identity, Target
from leveret.testing.messages import Stored, erlang_type
from leveret.testing.queues import Queue
from leveret.testing.quorum import Quorum
from leveret.testing.refusals import Refusal, exchange_name, queue_name
from leveret.testing.streams import Stream

if TYPE_CHECKING:
    from leveret.testing.clock import Clock
    from leveret.testing.dialect import Dialect
    from leveret.testing.queues import Reason

_KINDS: Final[Mapping[str, type[Queue]]] = {"classic": Queue, "quorum": Quorum, "stream": Stream}
REPLY_TO: Final = "amq.rabbitmq.reply-to"


class ReplyTaker(Protocol):
    """Who consumes direct replies."""

    def deliver_reply(self, message: Stored) -> None:
        """Send it."""
        ...


class VirtualHost:
    """One virtual host.

    Attributes:
        replies: who waits for direct replies, by the secret part of the address.
    """

    def __init__(self, name: str, clock: Clock, dialect: Dialect) -> None:
        self.name = name
        self.clock = clock
        self.dialect = dialect
        self.exchanges: dict[str, Exchange] = {}
        self.queues: dict[str, Queue] = {}
        self.replies: dict[str, ReplyTaker] = {}
        self._leading_to: dict[Target, dict[Identity, Binding]] = {}
        self._dead: deque[tuple[Queue, Stored, Reason, int]] | None = None
        for each, kind in PREDECLARED.items():
            self.exchanges[each] = Exchange(each, kind, internal=each == "amq.rabbitmq.trace")

    def __repr__(self) -> str:
        return f"<VirtualHost {self.name!r} {len(self.exchanges)} exchanges, {len(self.queues)} queues>"

    # ------------------------------------------------------------------------------------------------ exchanges

    def exchange(self, name: str) -> Exchange:
        """The exchange of that name.

        Raises:
            Refusal: 404.
        """
        try:
            return self.exchanges[name]
        except KeyError:
            raise Refusal(404, f"no {exchange_name(name, self.name)}") from None

    def check_type(self, kind: str) -> None:
        """Refuse an exchange type that there is not.

        Raises:
            Refusal: 503 or 406.
        """
        if kind not in ROUTERS or (kind == "x-local-random" and not self.dialect.has_local_random):
            hard = self.dialect.unknown_type_is_hard
            problem = "unknown" if kind else "invalid"
            raise Refusal(503 if hard else 406, f"{problem} exchange type '{kind}'", closes_connection=hard)

    def declare_exchange(
        self,
        name: str,
        kind: str,
        *,
        durable: bool,
        auto_delete: bool,
        internal: bool,
        arguments: Mapping[str, Any],
    ) -> Exchange:
        """Make an exchange, or find the same one.

        Raises:
            Refusal: 406 for what differs, 403 for a reserved name, 503 or 406 for a type that there is not.
        """
        self.check_type(kind)
        called = exchange_name(name, self.name)
        found = self.exchanges.get(name)
        if found is None:
            if name.startswith("amq."):
                raise Refusal(403, f"exchange name '{name}' contains reserved prefix 'amq.*'")
            alternate = arguments.get("alternate-exchange", "")
            if not isinstance(alternate, str):
                kind = erlang_type(alternate)
                raise Refusal(406, f"invalid type '{kind}' for arg 'alternate-exchange' in {called}")
            found = self.exchanges[name] = Exchange(
                name, kind, durable=durable, auto_delete=auto_delete, internal=internal, arguments=arguments
            )
            return found
        for key, received, current in (
            ("type", kind, found.type),
            ("durable", durable, found.durable),
            ("auto_delete", auto_delete, found.auto_delete),
            ("internal", internal, found.internal),
        ):
            if received != current:
                raise inequivalent(key, called, received, current)
        assert_same_arguments(found.arguments, arguments, called, ["alternate-exchange"])
        return found

    def delete_exchange(self, name: str, *, if_unused: bool = False) -> None:
        """Delete an exchange with its bindings; one that is not there is no error.

        Raises:
            Refusal: 406: it is in use.
        """
        found = self.exchanges.get(name)
        if found is None:
            return
        if if_unused and found.bindings:
            raise Refusal(406, f"{exchange_name(name, self.name)} in use")
        self._remove_exchange(found)

    def _remove_exchange(self, exchange: Exchange) -> None:
        del self.exchanges[exchange.name]
        for each in list(exchange.bindings.values()):
            self._leading_to[each.target].pop(each.identity, None)
        exchange.bindings.clear()
        self._unbind_all(Target(False, exchange.name))

    # --------------------------------------------------------------------------------------------------- queues

    def queue(self, name: str) -> Queue:
        """The queue of that name.

        Raises:
            Refusal: 404.
        """
        try:
            return self.queues[name]
        except KeyError:
            raise Refusal(404, f"no {queue_name(name, self.name)}") from None

    def declare_queue(
        self,
        name: str,
        *,
        durable: bool,
        exclusive: bool,
        auto_delete: bool,
        arguments: Mapping[str, Any],
        owner: object,
    ) -> Queue:
        """Make a queue, or find the same one.

        Raises:
            Refusal: 405 another connection's, 406 what differs or is no argument, 403 a reserved name.
        """
        if name.startswith("amq."):
            raise Refusal(403, f"queue name '{name}' contains reserved prefix 'amq.*'")
        kind = arguments.get("x-queue-type", "classic")
        if kind in self.dialect.default_types:
            kind = "classic"
        if not name and kind != "classic":
            raise self._has_to_have_a_name(kind)
        durable = durable and not exclusive
        found = self.queues.get(name)
        if found is not None:
            self.check_owner(found, owner, must_own=exclusive)
            known = self.dialect.queue_arguments[found.type]
            assert_same(
                found,
                self.name,
                arguments,
                known,
                adds_type=self.dialect.adds_queue_type,
                durable=durable,
                auto_delete=auto_delete,
            )
            found.touch()
            return found
        return self._new_queue(name or self._generated(), kind, durable, exclusive, auto_delete, arguments, owner)

    def _has_to_have_a_name(self, kind: object) -> Refusal:
        if isinstance(kind, str) and kind in _KINDS:
            return Refusal(406, f"Cannot declare a server-named queue for type rabbit_{kind}_queue")
        if self.dialect.crashes_on_bad_values or not isinstance(kind, str | bool):
            return Refusal(541, "", class_id=0, method_id=0)
        return Refusal(406, f"unknown queue type '{plain(kind)}'")

    def _generated(self) -> str:
        return "amq.gen-" + base64.urlsafe_b64encode(secrets.token_bytes(16)).decode()[:22]

    def _new_queue(
        self,
        name: str,
        kind: str,
        durable: bool,
        exclusive: bool,
        auto_delete: bool,
        arguments: Mapping[str, Any],
        owner: object,
    ) -> Queue:
        no_type = self.dialect.default_types
        check_declaration(
            name,
            self.name,
            {key: arguments[key] for key in arguments if key != "x-queue-type" or arguments[key] not in no_type},
            self.dialect.queue_arguments,
            self.dialect.unchecked_arguments,
            self.dialect.queue_versions,
            durable=durable,
            exclusive=exclusive,
            auto_delete=auto_delete,
        )
        queue = self.queues[name] = _KINDS[kind](
            name,
            self,
            durable=durable,
            exclusive=exclusive,
            auto_delete=auto_delete,
            arguments=arguments,
            owner=owner if exclusive else None,
        )
        return queue

    def check_owner(self, queue: Queue, connection: object, *, must_own: bool | None = None) -> None:
        """Refuse the exclusive queue of another connection; *must_own* refuses one that is not exclusive, too.

        Raises:
            Refusal: 405.
        """
        owned = queue.owner is not None
        if (owned and queue.owner is not connection) or (must_own is not None and must_own != owned):
            raise Refusal(
                405,
                f"cannot obtain exclusive access to locked {queue_name(queue.name, self.name)}. It could be "
                "originally declared on another connection or the exclusive property value does not match that of "
                "the original declaration.",
            )

    def delete_queue(self, queue: Queue) -> int:
        """Delete *queue*; how many messages waited in it."""
        if self.queues.get(queue.name) is not queue:
            return 0
        del self.queues[queue.name]
        self._unbind_all(Target(True, queue.name))
        return queue.delete()

    # ------------------------------------------------------------------------------------------------- bindings

    def bind(self, new: Binding) -> None:
        """Add a binding between what is there."""
        if self.exchanges[new.source].bind(new):
            self._leading_to.setdefault(new.target, {})[new.identity] = new

    def has(self, wanted: Binding) -> bool:
        """Whether there is such a binding."""
        source = self.exchanges.get(wanted.source)
        return source is not None and wanted.identity in source.bindings

    def unbind(self, old: Binding) -> None:
        """Remove a binding; an auto-delete exchange goes with its last one."""
        source = self.exchanges.get(old.source)
        if source is None or not source.unbind(old):
            return
        self._leading_to[old.target].pop(old.identity, None)
        if source.auto_delete and not source.bindings:
            self._remove_exchange(source)

    def _unbind_all(self, target: Target) -> None:
        for each in list(self._leading_to.get(target, {}).values()):
            self.unbind(each)
        self._leading_to.pop(target, None)

    # ------------------------------------------------------------------------------------------------- messages

    def route(self, exchange: Exchange, message: Stored) -> list[Queue]:
        """The queues that *message* reaches, each once."""
        if not exchange.name and not message.also and not message.blind:
            queue = self.queues.get(message.routing_key)
            return [] if queue is None else [queue]
        keys = (message.routing_key, *message.also, *message.blind)
        found: dict[Queue, None] = {}
        seen = {exchange.name}
        todo = [exchange]
        while todo:
            each = todo.pop()
            if each.name:
                targets = [target for key in keys for target in each.route(key, message)]
            elif each is exchange:
                targets = [Target(True, key) for key in keys if key in self.queues]
            else:
                targets = []  # as an alternate exchange, the default one has no bindings
            if not targets and each.alternate is not None:
                targets = [Target(False, each.alternate)]
            for is_queue, name in targets:
                if is_queue:
                    found[self.queues[name]] = None
                elif name not in seen and name in self.exchanges:
                    seen.add(name)
                    todo.append(self.exchanges[name])
        return list(found)

    def is_reply(self, exchange: Exchange, message: Stored) -> bool:
        """Whether it is a direct reply, for which there is no queue."""
        return not exchange.name and message.routing_key.startswith(REPLY_TO)

    def publish(self, exchange: Exchange, message: Stored, queues: Iterable[Queue] | None = None) -> tuple[bool, bool]:
        """Put *message* where it belongs; whether it reached a queue, and whether every queue took it.

        Transactions say to which *queues* it was routed before.
        """
        if self.is_reply(exchange, message):
            taker = self.replies.get(message.routing_key.removeprefix(REPLY_TO + "."))
            if taker is not None:
                taker.deliver_reply(message)
            return taker is not None and not self.dialect.returns_replies, True
        routed, taken = False, True
        for queue in self.route(exchange, message) if queues is None else queues:
            routed = True
            taken &= not queue.is_deleted and queue.publish(message)
        return routed, taken

    def dead_letter(self, queue: Queue, message: Stored, reason: Reason, failures: int) -> None:
        """Publish what left *queue* to its dead letter exchange, if it has one."""
        if self._dead is not None:  # of a queue that takes a dead letter: a long chain must not become a deep stack
            self._dead.append((queue, message, reason, failures))
            return
        self._dead = deque([(queue, message, reason, failures)])
        try:
            while self._dead:
                self._dead_letter(*self._dead.popleft())
        finally:
            self._dead = None

    def _dead_letter(self, queue: Queue, message: Stored, reason: Reason, failures: int) -> None:
        target = queue.arguments.get("x-dead-letter-exchange")
        exchange = self.exchanges.get(target) if isinstance(target, str) else None
        if exchange is None:
            return
        key = queue.arguments.get("x-dead-letter-routing-key")
        dead = dead_letter(
            message,
            queue.name,
            reason,
            exchange=exchange.name,
            routing_key=key if isinstance(key, str) else None,
            wall=self.clock.wall(),
            has_last_death=self.dialect.has_last_death,
        )
        dead.failures = failures
        for each in self.route(exchange, dead):
            if reason != "rejected" and is_cycle(dead, each.name):
                continue
            if not each.is_stream or self.dialect.streams_take_dead_letters:
                each.publish(dead)

    # --------------------------------------------------------------------------------------------------- its end

    def restart(self) -> None:
        """Forget what a restart of a broker forgets: all that is not durable."""
        self.replies.clear()
        for queue in list(self.queues.values()):
            if queue.durable and queue.owner is None:
                queue.forget_transient()
            else:
                self.delete_queue(queue)
        for exchange in list(self.exchanges.values()):
            if not exchange.durable and exchange.name in self.exchanges:
                self._remove_exchange(exchange)

    def end(self) -> None:
        """Delete every queue, and with it its timers."""
        for queue in list(self.queues.values()):
            self.delete_queue(queue)
