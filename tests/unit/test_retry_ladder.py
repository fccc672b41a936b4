"""What is decided about failed messages: counts, verdicts, names, arguments, copies."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from leveret import Message
from leveret.message import IncomingMessage, incoming_message
from leveret.retry_ladder import (
    Backend,
    GiveBack,
    Park,
    Plan,
    QueueFacts,
    Wait,
    choose_backend,
    copy_to_park,
    copy_to_retry,
    derived_name,
    error_text,
    origin,
    parking,
    rung,
    version_of,
)
from leveret.wire.codec import encode_properties
from leveret.wire.tables import encode_table

QUORUM = {"x-queue-type": "quorum"}


def facts(name: str = "orders", *, known: bool = True, durable: bool = True, **kwargs: Any) -> QueueFacts:
    return QueueFacts(name=name, known=known, durable=durable, **kwargs)


def plan(
    attempts: int = 4, delays_ms: tuple[int, ...] = (1000, 5000), backend: Backend = Backend.LADDER, **kwargs: Any
) -> Plan:
    queue = kwargs.pop("queue", facts())
    return Plan(queue=queue, attempts=attempts, delays_ms=delays_ms, backend=backend, park_in="orders.parked")


def incoming(
    *, exchange: str = "shop", routing_key: str = "order.new", raw_headers: bytes | None = None, **properties: Any
) -> IncomingMessage:
    """A delivery, as if it had come over the wire."""
    raw = encode_properties(Message(b"body", **properties).wire_properties())
    if raw_headers is not None:
        raw = (0x2000).to_bytes(2) + len(raw_headers).to_bytes(4) + raw_headers
    route = b"".join(bytes([len(each)]) + each for each in (_bytes(exchange), _bytes(routing_key)))
    return incoming_message(None, b"tag", 1, False, route, raw, b"body", True)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


# ------------------------------------------------------------------------------------------------------ counting


@pytest.mark.parametrize(
    ("count", "failures"),
    [(None, 0), (0, 0), (1, 1), (3, 3), (-1, 0), (-(2**63), 0), (2**62, 3), ("3", 0), (True, 0), (2.5, 0), ([1], 0)],
)
def test_a_count_that_a_publisher_made_up_is_safe(count: Any, failures: int) -> None:
    headers = {} if count is None else {"x-retry-count": count}
    assert plan().failures(headers) == failures
    assert plan(backend=Backend.REQUEUE).failures(headers) == failures


def test_the_queue_s_count_matters_where_it_counts_failures_only() -> None:
    headers = {"x-delivery-count": 2, "x-retry-count": 1}
    assert plan().failures(headers) == 1
    assert plan(backend=Backend.REQUEUE).failures(headers) == 3
    assert plan(backend=Backend.DELAYED_RETRY).failures(headers) == 3
    assert plan(backend=Backend.REQUEUE).failures({"x-delivery-count": -5, "x-retry-count": 1}) == 1


@pytest.mark.parametrize("forged", [None, 0, -5, 2, 2**62, "x", [], {}])
def test_whatever_a_publisher_sends_there_is_an_end(forged: Any) -> None:
    """Each trip over a rung counts one more, whatever was there at first."""
    it, headers, trips = plan(attempts=4), {"x-retry-count": forged, "x-death": [1]}, 0
    while True:
        message = incoming(headers=headers)
        failures = it.failures(message.headers) + 1
        verdict = it.decide(failures, retryable=True, readable=True)
        if isinstance(verdict, Park):
            break
        headers = dict(copy_to_retry(message, "orders", failures).headers)
        trips += 1
    assert trips <= 3
    assert forged in (2, 2**62) or trips == 3


# ------------------------------------------------------------------------------------------------------ verdicts


def test_verdicts() -> None:
    ladder = plan()
    fates = [ladder.decide(n, retryable=True, readable=True) for n in (1, 2, 3, 4, 5)]
    assert fates == [Wait(1000), Wait(5000), Wait(5000), Park("attempts used up"), Park("attempts used up")]
    assert ladder.decide(1, retryable=False, readable=True) == Park("not retried")
    assert ladder.decide(1, retryable=True, readable=False) == Park("malformed headers")
    native = plan(backend=Backend.DELAYED_RETRY)
    assert native.decide(3, retryable=True, readable=True) == GiveBack()
    assert native.decide(4, retryable=True, readable=True) == Park("attempts used up")
    assert plan(attempts=1, delays_ms=()).decide(1, retryable=True, readable=True) == Park("attempts used up")


@pytest.mark.parametrize(
    ("arguments", "delays", "attempts", "version", "backend"),
    [
        ({}, (0,), 3, (4, 3), Backend.LADDER),
        ({"x-queue-type": "classic"}, (0,), 3, (4, 3), Backend.LADDER),
        (QUORUM, (0,), 3, (4, 0), Backend.REQUEUE),
        (QUORUM, (0, 0), 3, (3, 13), Backend.LADDER),  # a publisher can hide the count of 3.x
        (QUORUM, (0, 5), 3, (4, 3), Backend.LADDER),
        (QUORUM, (0,), 21, (4, 0), Backend.LADDER),  # the queue would drop it before
        (QUORUM | {"x-delivery-limit": 2}, (0,), 3, (4, 0), Backend.LADDER),
        (QUORUM | {"x-delivery-limit": -1}, (0,), 500, (4, 0), Backend.REQUEUE),
        (QUORUM | {"x-delivery-limit": "no"}, (0,), 20, (4, 0), Backend.REQUEUE),
        (QUORUM | {"x-delayed-retry-type": "failed"}, (5,), 3, (4, 3), Backend.DELAYED_RETRY),
        (QUORUM | {"x-delayed-retry-type": "all"}, (5,), 3, (5, 0), Backend.DELAYED_RETRY),
        (QUORUM | {"x-delayed-retry-type": "all"}, (5,), 3, (4, 2), Backend.LADDER),
        (QUORUM | {"x-delayed-retry-type": "returned"}, (5,), 3, (4, 3), Backend.LADDER),
        (QUORUM | {"x-delayed-retry-type": "disabled"}, (5,), 3, (4, 3), Backend.LADDER),
        ({"x-delayed-retry-type": "all"}, (5,), 3, (4, 3), Backend.LADDER),
    ],
)
def test_choice_of_the_backend(
    arguments: dict[str, Any], delays: tuple[int, ...], attempts: int, version: tuple[int, ...], backend: Backend
) -> None:
    assert choose_backend(facts(arguments=arguments), attempts, delays, version) is backend


def test_versions() -> None:
    assert version_of({"version": "4.3.6"}) == (4, 3)
    assert version_of({"version": "3.10.8+deb"}) == (3, 10)
    assert version_of({"version": "x"}) == version_of({}) == version_of({"version": None}) == (0, 0)


def test_a_message_goes_back_while_that_does_not_cost_it() -> None:
    assert plan().may_requeue({"x-delivery-count": 9}, readable=True)
    assert not plan().may_requeue({"x-delivery-count": 10}, readable=True)
    assert not plan().may_requeue({}, readable=False)
    assert plan(queue=facts(arguments={"x-queue-type": "classic"})).may_requeue({}, readable=False)
    assert plan(queue=facts(arguments={"x-delivery-limit": -1})).may_requeue({"x-delivery-count": 99}, readable=True)
    assert not plan(queue=facts(arguments={"x-delivery-limit": 1})).may_requeue({}, readable=True)


# ------------------------------------------------------------------------------------------------------ topology


def test_a_durable_rung_is_a_quorum_queue_whatever_is_known_of_the_queue() -> None:
    spec = rung(facts(arguments=QUORUM), 1500)
    assert spec.name == "orders.retry.1500"
    assert spec.durable
    assert not spec.exclusive
    assert not spec.is_temporary
    assert spec.arguments == {
        "x-queue-type": "quorum",
        "x-message-ttl": 1500,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": "orders",
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }
    assert spec == rung(facts(), 1500) == rung(facts(known=False, durable=False), 1500)


def test_rungs_of_temporary_queues() -> None:
    exclusive = rung(facts(durable=False, exclusive=True, auto_delete=True), 100)
    assert exclusive.exclusive
    assert not exclusive.durable
    assert exclusive.arguments["x-queue-type"] == "classic"
    assert not exclusive.is_temporary  # it goes with the connection
    auto_delete = rung(facts(auto_delete=True), 100)
    assert auto_delete.arguments["x-expires"] == 3_600_100
    assert auto_delete.is_temporary
    transient = rung(facts(durable=False), 100)
    assert not transient.durable
    assert not transient.is_temporary


def test_each_delay_has_one_rung_and_0_has_none() -> None:
    specs = plan(attempts=6, delays_ms=(0, 1000, 5000, 1000)).queues
    assert [spec.name for spec in specs] == ["orders.retry.1000", "orders.retry.5000", "orders.parked"]
    assert plan().key_of(0) == "orders"
    assert plan().key_of(1000) == "orders.retry.1000"
    assert plan(backend=Backend.REQUEUE).queues == (parking("orders.parked"),)
    assert parking("p").any_arguments


def test_names() -> None:
    assert derived_name("orders", ".parked") == "orders.parked"
    assert derived_name("amq.gen-X", ".retry.5") == "leveret.amq.gen-X.retry.5"
    assert derived_name("é" * 120, ".retry.1000") == "é" * 120 + ".retry.1000"
    for name in ("a" * 255, "é" * 127, "a" * 245, "\udcff" * 255):
        long = derived_name(name, ".retry.1000")
        assert len(long.encode("utf-8", "surrogateescape")) <= 255
        assert long.endswith(".retry.1000")
        assert long == derived_name(name, ".retry.1000")
        assert long != derived_name(name[:-1] + "b", ".retry.1000")


# -------------------------------------------------------------------------------------------------------- copies


def test_a_copy_to_retry_keeps_what_is_the_message_s_own() -> None:
    when = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    own = {
        "content_type": "text/plain",
        "content_encoding": "gzip",
        "delivery_mode": 2,
        "priority": 7,
        "correlation_id": "c",
        "reply_to": "r",
        "message_id": "m",
        "timestamp": when,
        "type": "t",
        "app_id": "a",
    }
    headers = {"mine": [1, {"a": b"\xff"}], "CC": ["x"], "BCC": ["y"], "x-delivery-count": 4, "x-acquired-count": 9}
    headers |= {"x-death": [{}], "x-first-death-queue": "q", "x-last-death-reason": "r", "x-deathly": 1}
    message = incoming(headers=headers, expiration=60, user_id="guest", **own)
    copy = copy_to_retry(message, "orders", 2)
    assert copy.body == b"body"
    assert {name: getattr(copy, name) for name in own} == own
    assert (copy.expiration, copy.user_id) == (None, None)
    assert copy.headers == {
        "mine": [1, {"a": b"\xff"}],
        "x-deathly": 1,
        "x-retry-count": 2,
        "x-retry-exchange": "shop",
        "x-retry-routing-key": "order.new",
        "x-retry-expiration": 60.0,
        "x-retry-user-id": "guest",
    }
    assert "CC" in message.headers  # the handler's own message is as it was
    assert message.expiration == 60


def test_the_origin_survives_trips_and_bad_names() -> None:
    first = incoming(exchange="shop\udcff", routing_key="k\udcff")
    assert origin(first, "orders") == ("shop\udcff", "k\udcff")
    copy = copy_to_retry(first, "orders", 1)
    encode_table(copy.headers)  # bad UTF-8 goes as bytes
    second = incoming(exchange="", routing_key="orders", headers=copy.headers)
    assert origin(second, "orders") == ("shop\udcff", "k\udcff")
    for bad in (5, None, "x" * 256, ["a"]):
        forged = {"x-retry-count": 1, "x-retry-exchange": bad, "x-retry-routing-key": bad}
        assert origin(incoming(exchange="", routing_key="orders", headers=forged), "orders") == ("", "")
        assert origin(incoming(headers=forged), "orders") == ("shop", "order.new")


def test_a_parked_copy_says_why_and_counts_anew() -> None:
    message = incoming(headers={"x-retry-count": 3, "x-death": [{"queue": "a"}], "CC": ["b"], "mine": 1}, priority=3)
    copy = copy_to_park(message, "orders", 4, "attempts used up", KeyError("no such thing"))
    when = copy.headers.pop("x-retry-error-time")
    assert isinstance(when, datetime.datetime)
    assert abs(when - datetime.datetime.now(datetime.UTC)) < datetime.timedelta(seconds=60)
    assert copy.priority == 3
    assert copy.headers == {
        "mine": 1,
        "x-death": [{"queue": "a"}],
        "x-retry-attempts": 4,
        "x-retry-reason": "attempts used up",
        "x-retry-error-type": "builtins.KeyError",
        "x-retry-error": "'no such thing'",
        "x-retry-queue": "orders",
        "x-retry-exchange": "shop",
        "x-retry-routing-key": "order.new",
    }


def test_a_parked_copy_of_what_cannot_be_read() -> None:
    message = incoming(raw_headers=b"\x05mine\xff?")
    assert message.headers_error is not None
    copy = copy_to_park(message, "orders", 1, "malformed headers", ValueError("x"))
    assert copy.headers["x-retry-raw-headers"] == message.headers_raw
    bare = copy_to_park(incoming(headers={"mine": 1}, type="t"), "orders", 1, "why", ValueError("x"), bare=True)
    assert bare.body == b"body"
    assert bare.type is None
    assert "mine" not in bare.headers
    assert bare.headers["x-retry-reason"] == "why"


def test_error_texts() -> None:
    class Bad(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert error_text(Bad()) == "(its text cannot be had: RuntimeError)"
    assert error_text(ValueError("\udcff")) == "\\udcff"
    assert len(error_text(ValueError("x" * 10**6))) == 1000
    encode_table({"x": error_text(ValueError("\ud800" * 2000))})
