"""What is known to differ, and why; docs/howto/testing.md lists it too.

Some of it `tests.differential.sequences` does not even try, because it would change all that follows: a short
``x-expires``, a small ``x-max-length-bytes`` or ``x-overflow: reject-publish`` for quorum queues, and the tag of a
consumer of one that was cancelled with messages in hand, which RabbitMQ counts for the next consumer of that tag.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

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
