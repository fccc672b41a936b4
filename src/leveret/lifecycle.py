"""The states of a connection that recovers, what leads from one to another, and how healthy it is.

::

    NEW ─connect→ CONNECTING ─linked→ RECOVERING ─restored→ READY
     ↑                │ gave up           │ lost              │ lost
     └────────────────┘                   ↓                   ↓
                 RECOVERING ←─linked─ RECONNECTING ─gave up→ CLOSED

    any state but CLOSED ─close→ CLOSING ─closed→ CLOSED

A loss in the middle of recovering starts over; ``close()`` wins in every state, for good.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Literal, TypeAlias


class ConnectionState(enum.Enum):
    """Where a robust connection is.

    Attributes:
        NEW: not connected yet, or the first attempt failed.
        CONNECTING: on its first way to the broker.
        RECOVERING: there is a link; topology, channels and consumers are being restored.
        READY: everything that can be restored is.
        RECONNECTING: the link was lost; on the way to another one.
        CLOSING: ``close()`` was called.
        CLOSED: for good.
    """

    __hash__ = object.__hash__  # Enum's is slow, and there is but one of each

    NEW = "new"
    CONNECTING = "connecting"
    RECOVERING = "recovering"
    READY = "ready"
    RECONNECTING = "reconnecting"
    CLOSING = "closing"
    CLOSED = "closed"


class Event(enum.Enum):
    """What leads from one state to another."""

    __hash__ = object.__hash__

    CONNECT = "connect"
    LINKED = "linked"
    RESTORED = "restored"
    LOST = "lost"
    GAVE_UP = "gave up"
    CLOSE = "close"
    CLOSED = "closed"


_S, _E = ConnectionState, Event

TRANSITIONS: dict[tuple[ConnectionState, Event], ConnectionState] = {
    (_S.NEW, _E.CONNECT): _S.CONNECTING,
    (_S.CONNECTING, _E.LINKED): _S.RECOVERING,
    (_S.CONNECTING, _E.GAVE_UP): _S.NEW,
    (_S.RECOVERING, _E.RESTORED): _S.READY,
    (_S.RECOVERING, _E.LOST): _S.RECONNECTING,
    (_S.READY, _E.LOST): _S.RECONNECTING,
    (_S.RECONNECTING, _E.LINKED): _S.RECOVERING,
    (_S.RECONNECTING, _E.GAVE_UP): _S.CLOSED,
    **{(state, _E.CLOSE): _S.CLOSING for state in _S if state not in {_S.CLOSING, _S.CLOSED}},
    (_S.CLOSING, _E.CLOSED): _S.CLOSED,
}
"""What is not here changes nothing: whoever closes, closes."""


def next_state(state: ConnectionState, event: Event) -> ConnectionState:
    """Where *event* leads from *state*; *state* itself where it means nothing."""
    return TRANSITIONS.get((state, event), state)


Status: TypeAlias = Literal["ready", "degraded", "down"]


@dataclasses.dataclass(frozen=True, slots=True)
class Health:
    """What ``connection.health()`` says, for a health check.

    Attributes:
        status: ``"ready"``; ``"degraded"`` when the link is there but something is not as it should be; ``"down"``.
        reasons: what is wrong, one line for each entity. Names in them are the broker's and the user's.
    """

    status: Status
    reasons: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.status == "ready"
