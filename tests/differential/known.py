"""What is known to differ, and why; docs/howto/testing.md lists it too.

Some of it `tests.differential.sequences` does not even try, because it would change all that follows: a short
``x-expires``, a small ``x-max-length-bytes`` or ``x-overflow: reject-publish`` for quorum queues, and the tag of a
consumer of one that was cancelled with messages in hand, which RabbitMQ counts for the next consumer of that tag.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tests.differential.operations import Op
    from tests.differential.side import State


def normalised(view: tuple[State, Any], operations: Sequence[Op], version: str) -> tuple[State, Any]:
    """*view* (the state, and the reply to the last operation) without what is known to differ."""
    state, reply = view
    types = {
        each.arguments["queue"]: each.arguments.get("arguments", {}).get("x-queue-type")
        for each in reversed(operations)
        if each.kind == "queue.declare"
    }
    asked = types.get(operations[-1].arguments.get("queue"))
    for name, seen in state.queues.items():
        if types.get(name) == "stream" and isinstance(seen, tuple):
            # RabbitMQ counts the messages and consumers of a stream now and then only.
            state.queues[name] = "a stream"
        elif types.get(name) == "quorum" and isinstance(seen, tuple):
            # RabbitMQ counts as a consumer whatever has a message in hand, as basic.get.
            state.queues[name] = seen[:1]
    if isinstance(reply, list) and reply[0] == "get-ok" and asked == "quorum":
        reply[1] = "some"  # a quorum queue goes on counting while it answers
    elif isinstance(reply, list) and reply[0].startswith("Queue."):
        if asked == "stream":
            reply = reply[:1]
        elif asked == "quorum":
            reply[1].pop("consumer_count", None)
    return state, reply


def is_open(operations: Sequence[Op], version: str) -> bool:
    """Whether nobody can say what *operations* deliver: who gets what may differ from there on."""
    if version == "3.10" and _cancels_the_active_one(operations):
        return True
    return version != "4.3" and _shares_a_prefetch(operations)


def _shares_a_prefetch(operations: Sequence[Op]) -> bool:
    """Whether several queues wait for the prefetch of one channel: RabbitMQ draws lots which of them is the next."""
    classic = {name for name, _ in _classic(operations)}
    limited = {each.channel for each in operations if each.kind == "basic.qos" and each.arguments.get("global_")}
    consumed = {(each.channel, each.arguments["queue"]) for each in operations if each.kind == "basic.consume"}
    return any(sum(channel == each and queue in classic for channel, queue in consumed) > 1 for each in limited)


def _cancels_the_active_one(operations: Sequence[Op]) -> bool:
    """Whether a single active consumer of a classic queue was cancelled, and another one waited.

    That gets nothing of what waits there: RabbitMQ 3.10 forgets to look, and then delivers in another order, or
    restarts the queue.
    """
    alone = {name for name, arguments in _classic(operations) if "x-single-active-consumer" in arguments}
    consumers: dict[tuple[int, str], str] = {}
    for each in operations:
        key = each.channel, each.arguments.get("consumer_tag", "")
        if each.kind == "basic.consume":
            consumers[key] = each.arguments["queue"]
        elif each.kind == "basic.cancel":
            queue = consumers.pop(key, None)
            if queue in alone and queue in consumers.values():
                return True
    return False


def _classic(operations: Sequence[Op]) -> list[tuple[str, Mapping[str, Any]]]:
    """The declarations of classic queues: names and arguments."""
    declared = [
        (each.arguments["queue"] or "gen0", each.arguments.get("arguments", {}))
        for each in operations
        if each.kind == "queue.declare" and not each.arguments.get("passive")
    ]
    return [(name, given) for name, given in declared if given.get("x-queue-type", "classic") == "classic"]
