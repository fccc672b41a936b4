"""From which state of a connection to which one, and what a health check makes of its health."""

from __future__ import annotations

import pytest

from leveret.lifecycle import TRANSITIONS, ConnectionState, Event, Health, Status, next_state

S, E = ConnectionState, Event

TABLE = {
    #                 CONNECT       LINKED        RESTORED  LOST            GAVE_UP   CLOSE      CLOSED
    S.NEW: (S.CONNECTING, S.NEW, S.NEW, S.NEW, S.NEW, S.CLOSING, S.NEW),
    S.CONNECTING: (S.CONNECTING, S.RECOVERING, S.CONNECTING, S.CONNECTING, S.NEW, S.CLOSING, S.CONNECTING),
    S.RECOVERING: (S.RECOVERING, S.RECOVERING, S.READY, S.RECONNECTING, S.RECOVERING, S.CLOSING, S.RECOVERING),
    S.READY: (S.READY, S.READY, S.READY, S.RECONNECTING, S.READY, S.CLOSING, S.READY),
    S.RECONNECTING: (
        *(S.RECONNECTING, S.RECOVERING, S.RECONNECTING, S.RECONNECTING, S.CLOSED, S.CLOSING),
        S.RECONNECTING,
    ),
    S.CLOSING: (S.CLOSING, S.CLOSING, S.CLOSING, S.CLOSING, S.CLOSING, S.CLOSING, S.CLOSED),
    S.CLOSED: (S.CLOSED, S.CLOSED, S.CLOSED, S.CLOSED, S.CLOSED, S.CLOSED, S.CLOSED),
}
"""Every state, and where each event leads from it, in the order of :class:`Event`."""

COMBINATIONS = [(state, event, target) for state, row in TABLE.items() for event, target in zip(E, row, strict=True)]


def reachable(start: ConnectionState, without: frozenset[Event] = frozenset()) -> set[ConnectionState]:
    seen, due = set[ConnectionState](), [start]
    while due:
        state = due.pop()
        if state not in seen:
            seen.add(state)
            due += [next_state(state, event) for event in E if event not in without]
    return seen


def test_the_table_above_is_complete() -> None:
    assert list(TABLE) == list(S)
    assert len(COMBINATIONS) == len(S) * len(E)


@pytest.mark.parametrize(
    ("state", "event", "target"), COMBINATIONS, ids=lambda value: value.name if value in [*S, *E] else None
)
def test_where_each_event_leads_from_each_state(state: ConnectionState, event: Event, target: ConnectionState) -> None:
    assert next_state(state, event) is target


def test_a_transition_that_is_listed_changes_the_state() -> None:
    assert all(TRANSITIONS[state, event] is not state for state, event in TRANSITIONS)


@pytest.mark.parametrize("state", [state for state in S if state is not S.CLOSED])
def test_close_wins_in_every_state(state: ConnectionState) -> None:
    closing = next_state(state, E.CLOSE)
    assert closing is S.CLOSING
    assert reachable(closing) == {S.CLOSING, S.CLOSED}


def test_nothing_leaves_closed() -> None:
    assert reachable(S.CLOSED) == {S.CLOSED}


def test_only_closing_becomes_closed_by_the_end_of_a_close() -> None:
    assert [state for state in S if next_state(state, E.CLOSED) is not state] == [S.CLOSING]


def test_every_state_is_reachable_from_new() -> None:
    assert reachable(S.NEW) == set(S)


@pytest.mark.parametrize("state", S)
def test_every_state_can_be_closed(state: ConnectionState) -> None:
    assert S.CLOSED in reachable(state)


def test_a_connection_that_was_linked_once_is_never_new_again() -> None:
    assert S.NEW not in reachable(S.RECOVERING)


def test_without_a_close_or_giving_up_a_connection_always_can_become_ready_again() -> None:
    patient = frozenset({E.CLOSE, E.GAVE_UP})
    for state in (S.RECOVERING, S.READY, S.RECONNECTING):
        assert reachable(state, without=patient) == {S.RECOVERING, S.READY, S.RECONNECTING}


@pytest.mark.parametrize(
    ("events", "target"),
    [
        ((E.CONNECT, E.LINKED, E.RESTORED), S.READY),
        ((E.CONNECT, E.GAVE_UP, E.CONNECT, E.LINKED, E.RESTORED), S.READY),
        ((E.CONNECT, E.LINKED, E.LOST, E.LINKED, E.RESTORED), S.READY),
        ((E.CONNECT, E.LINKED, E.RESTORED, E.LOST, E.LINKED, E.LOST, E.LINKED, E.RESTORED), S.READY),
        ((E.CONNECT, E.LINKED, E.RESTORED, E.LOST, E.GAVE_UP), S.CLOSED),
        ((E.CONNECT, E.CLOSE, E.LINKED, E.RESTORED), S.CLOSING),
        ((E.CONNECT, E.LINKED, E.RESTORED, E.CLOSE, E.LOST, E.CLOSED), S.CLOSED),
        ((E.CLOSE, E.CLOSED, E.CONNECT), S.CLOSED),
    ],
    ids=lambda value: " ".join(event.name for event in value) if isinstance(value, tuple) else None,
)
def test_a_life(events: tuple[Event, ...], target: ConnectionState) -> None:
    state = S.NEW
    for event in events:
        state = next_state(state, event)
    assert state is target


@pytest.mark.parametrize(("status", "is_well"), [("ready", True), ("degraded", False), ("down", False)])
def test_health_is_true_when_it_is_ready_and_only_then(status: Status, is_well: bool) -> None:
    assert bool(Health(status)) is is_well
    assert bool(Health(status, ("queue 'q': 406",))) is is_well
    assert Health(status).reasons == ()
