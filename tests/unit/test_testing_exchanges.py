"""`leveret.testing`: how each type of exchange chooses, and the way of a message through several of them."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leveret.testing.clock import Clock
from leveret.testing.dialect import dialect
from leveret.testing.exchanges import Exchange, Target, binding
from leveret.testing.messages import Stored
from leveret.testing.refusals import Refusal
from leveret.testing.vhost import VirtualHost
from leveret.wire.codec import Properties

EMPTY = Stored.of("x", "k", Properties(), b"")


def with_headers(**headers: Any) -> Stored:
    return Stored.of("x", "k", Properties(headers=headers), b"")


def exchange(kind: str, *bindings: tuple[str, str, dict[str, Any]]) -> Exchange:
    made = Exchange("x", kind)
    for queue, key, arguments in bindings:
        made.bind(binding("x", Target(True, queue), key, arguments))
    return made


def reached(made: Exchange, key: str = "", message: Stored = EMPTY) -> set[str]:
    return {target.name for target in made.route(key, message)}


# --------------------------------------------------------------------------------------------------------- topic

words = st.sampled_from(["a", "b", ""])
patterns = st.lists(st.sampled_from(["a", "b", "", "*", "#"]), min_size=1, max_size=5)


def matches(pattern: tuple[str, ...], key: tuple[str, ...]) -> bool:
    """The rule of AMQP 0-9-1 §3.1.3.3, word by word."""

    @cache
    def match(i: int, j: int) -> bool:
        if i == len(pattern):
            return j == len(key)
        if pattern[i] == "#":
            return match(i + 1, j) or (j < len(key) and match(i, j + 1))
        return j < len(key) and pattern[i] in ("*", key[j]) and match(i + 1, j + 1)

    return match(0, 0)


@given(st.lists(patterns, min_size=1, max_size=4), st.lists(words, min_size=1, max_size=6))
def test_topic_matches_as_the_rule_says(each: list[list[str]], key: list[str]) -> None:
    made = exchange("topic", *[(f"q{i}", ".".join(pattern), {}) for i, pattern in enumerate(each)])
    expected = {f"q{i}" for i, pattern in enumerate(each) if matches(_words(pattern), _words(key))}
    assert reached(made, ".".join(key)) == expected


def _words(parts: list[str]) -> tuple[str, ...]:
    """An empty key has no words, as RabbitMQ counts them."""
    return () if parts == [""] else tuple(parts)


@pytest.mark.parametrize(("pattern", "key"), [("logs.#", "logs"), ("#.error", "error"), ("a.#.b", "a.b"), ("#", "")])
def test_a_hash_matches_no_word_at_all(pattern: str, key: str) -> None:
    assert reached(exchange("topic", ("q", pattern, {})), key) == {"q"}


def test_many_hashes_are_no_trap() -> None:
    made = exchange("topic", ("q", ".".join(["#", "a"] * 15) + ".b", {}), ("r", ".".join(["#", "a"] * 15), {}))
    assert reached(made, ".".join("a" * 200)) == {"r"}


def test_what_is_unbound_is_forgotten_by_every_router() -> None:
    for kind in ("direct", "fanout", "topic", "headers"):
        made = exchange(kind, ("q", "a.b", {}), ("r", "a.b", {}))
        assert reached(made, "a.b") == {"q", "r"}
        assert made.unbind(binding("x", Target(True, "q"), "a.b", {}))
        assert not made.unbind(binding("x", Target(True, "q"), "a.b", {}))
        assert reached(made, "a.b") == {"r"}


# ------------------------------------------------------------------------------------------------------- headers


@pytest.mark.parametrize(
    ("arguments", "headers", "expected"),
    [
        ({"x-match": "all", "a": 1, "b": 2}, {"a": 1, "b": 2, "c": 3}, True),
        ({"x-match": "all", "a": 1, "b": 2}, {"a": 1}, False),
        ({"a": 1}, {"a": 1}, True),
        ({"x-match": "any", "a": 1, "b": 2}, {"b": 2}, True),
        ({"x-match": "any", "a": 1}, {"a": 2}, False),
        ({"x-match": "any"}, {"a": 2}, False),
        ({"x-match": "all"}, {}, True),
        ({"x-match": "all", "x-a": 1}, {}, True),
        ({"x-match": "all-with-x", "x-a": 1}, {}, False),
        ({"x-match": "any-with-x", "x-a": 1, "b": 1}, {"x-a": 1}, True),
        ({"x-match": "any", "x-a": 1, "b": 1}, {"x-a": 1}, False),
        ({"a": None}, {"a": "whatever"}, True),
        ({"a": True}, {"a": 1}, False),
    ],
)
def test_headers_match(arguments: dict[str, Any], headers: dict[str, Any], expected: bool) -> None:
    assert bool(reached(exchange("headers", ("q", "", arguments)), "", with_headers(**headers))) is expected


def test_an_unknown_match_is_refused_in_the_broker_s_words() -> None:
    with pytest.raises(Refusal, match='Invalid x-match field value <<"foo">>; expected all, any') as caught:
        exchange("headers").check(binding("x", Target(True, "q"), "", {"x-match": "foo"}))
    assert caught.value.code == 406


# ----------------------------------------------------------------------------------------------------- the host


@pytest.fixture
def host() -> VirtualHost:
    return VirtualHost("/", Clock(), dialect("4.0"))


def declare(host: VirtualHost, name: str, kind: str = "fanout", **options: Any) -> Exchange:
    given = {"durable": False, "auto_delete": False, "internal": False, "arguments": {}} | options
    return host.declare_exchange(name, kind, **given)


def queue(host: VirtualHost, name: str, **arguments: Any) -> Any:
    return host.declare_queue(name, durable=False, exclusive=False, auto_delete=False, arguments=arguments, owner=None)


def test_exchanges_in_a_circle_deliver_once(host: VirtualHost) -> None:
    one, _ = declare(host, "one"), declare(host, "two")
    q = queue(host, "q")
    for source, target in (("one", Target(False, "two")), ("two", Target(False, "one"))):
        host.bind(binding(source, target, "", {}))
    host.bind(binding("one", Target(True, "q"), "", {}))
    host.bind(binding("two", Target(True, "q"), "", {}))
    assert host.publish(one, EMPTY) == (True, True)
    assert q.ready == 1


def test_the_alternate_exchange_is_asked_only_when_there_is_no_route(host: VirtualHost) -> None:
    declare(host, "other")
    first = declare(host, "first", "direct", arguments={"alternate-exchange": "other"})
    q, r = queue(host, "q"), queue(host, "r")
    host.bind(binding("other", Target(True, "q"), "", {}))
    host.bind(binding("first", Target(True, "r"), "k", {}))
    host.publish(first, EMPTY)
    host.publish(first, Stored.of("first", "elsewhere", Properties(), b""))
    assert (q.ready, r.ready) == (1, 1)


def test_an_auto_delete_exchange_goes_with_its_last_binding_and_takes_others_along(host: VirtualHost) -> None:
    declare(host, "top", auto_delete=True)
    declare(host, "below", auto_delete=True)
    q = queue(host, "q")
    host.bind(binding("top", Target(False, "below"), "", {}))
    host.bind(binding("below", Target(True, "q"), "", {}))
    host.delete_queue(q)
    assert not {"top", "below"} & host.exchanges.keys()


def test_a_restart_keeps_what_is_durable(host: VirtualHost) -> None:
    declare(host, "kept", durable=True)
    declare(host, "gone")
    queue(host, "gone")
    kept = host.declare_queue("kept", durable=True, exclusive=False, auto_delete=False, arguments={}, owner=None)
    kept.publish(Stored.of("", "kept", Properties(delivery_mode=2), b"kept"))
    kept.publish(Stored.of("", "kept", Properties(), b"gone"))
    host.bind(binding("kept", Target(True, "gone"), "", {}))
    host.bind(binding("kept", Target(True, "kept"), "", {}))
    host.restart()
    assert (host.queues.keys(), "gone" in host.exchanges) == ({"kept"}, False)
    assert [message.body for message in kept.waiting()] == [b"kept"]
    assert len(host.exchanges["kept"].bindings) == 1
