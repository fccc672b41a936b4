"""What a message carries when it leaves a queue for a dead letter exchange: ``x-death``, as RabbitMQ writes it. Pure.

One entry per (queue, reason), the latest first; a message that comes again counts. A message that went round in a
circle in which nobody rejected it is dropped. https://www.rabbitmq.com/docs/dlx#effects
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any, cast

from leveret.testing.messages import Stored, encode_route
from leveret.wire.codec import decode_properties, encode_properties

if TYPE_CHECKING:
    from leveret.testing.queues import Reason

Death = dict[str, Any]


def deaths_of(message: Stored) -> list[Death]:
    """The entries of ``x-death``, the latest first."""
    deaths = message.headers.get("x-death")
    return [cast("Death", death) for death in deaths if isinstance(death, dict)] if isinstance(deaths, list) else []


def dead_letter(
    message: Stored,
    queue: str,
    reason: Reason,
    *,
    exchange: str,
    routing_key: str | None,
    wall: float,
    has_last_death: bool = True,
) -> Stored:
    """*message* as it is published to the dead letter *exchange*.

    Args:
        queue: what it left, for *reason*.
        routing_key: ``x-dead-letter-routing-key``; ``None`` keeps its own, and those of its ``CC`` and ``BCC``.
        wall: seconds since 1970.
        has_last_death: whether ``x-last-death-…`` are written, ``CC`` is kept, and so is the order of older deaths, as
            RabbitMQ does from 3.13 on.
    """
    found = decode_properties(message.properties)
    properties = found.properties
    headers: dict[str, Any] = dict(properties.headers or {})
    death: Death = {} if properties.expiration is None else {"original-expiration": properties.expiration}
    death |= {
        "count": 1,
        "reason": reason,
        "queue": queue,
        "time": datetime.datetime.fromtimestamp(int(wall), datetime.UTC),
        "exchange": message.exchange,
        "routing-keys": [message.routing_key, *message.also],
    }
    deaths = deaths_of(message)
    if not has_last_death:
        deaths.reverse()
    for index, known in enumerate(deaths):
        if (known.get("queue"), known.get("reason")) == (queue, reason):
            count = known.get("count", 0)
            death = {**known, "count": (count if isinstance(count, int) else 0) + 1}
            if has_last_death:
                death["time"] = datetime.datetime.fromtimestamp(int(wall), datetime.UTC)
            del deaths[index]
            break
    headers["x-death"] = [death, *deaths]
    if "x-first-death-queue" not in headers:
        headers |= {
            "x-first-death-exchange": message.exchange,
            "x-first-death-queue": queue,
            "x-first-death-reason": reason,
        }
    if has_last_death:
        headers |= {
            "x-last-death-exchange": message.exchange,
            "x-last-death-queue": queue,
            "x-last-death-reason": reason,
        }
    also, blind = message.also, message.blind
    if routing_key is not None:
        also = blind = ()
        if not has_last_death:
            headers.pop("CC", None)
    # A dead letter does not expire again by what it was published with: it would be dead in every queue.
    properties = properties._replace(headers=headers, expiration=None)
    route = encode_route(exchange, message.routing_key if routing_key is None else routing_key)
    dead = Stored(route, encode_properties(properties), message.body, also)
    dead.blind = blind
    return dead


def is_cycle(message: Stored, queue: str) -> bool:
    """Whether the dead letter *message* has been in *queue* before, and nobody rejected it since."""
    for death in deaths_of(message):
        if death.get("reason") == "rejected":
            return False
        if death.get("queue") == queue:
            return True
    return False
