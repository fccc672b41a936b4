"""`leveret.testing`: the clock, users and permissions, properties that are checked, faults, reply texts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from leveret.testing import Broker
from leveret.testing.access import EVERYTHING, Permissions, given_users
from leveret.testing.clock import Clock
from leveret.testing.dialect import VERSIONS, dialect
from leveret.testing.faults import METHODS, Faults, plain
from leveret.testing.messages import Stored, check_expiration, check_user, copies
from leveret.testing.methods import HANDLERS
from leveret.testing.refusals import Refusal, fit, octets
from leveret.testing.server import Recent
from leveret.testing.session import _STEPS
from leveret.wire.codec import Properties
from leveret.wire.tables import encode_table

# --------------------------------------------------------------------------------------------------------- clock


def test_advancing_stops_at_every_timer_in_its_order() -> None:
    clock = Clock(lambda: 0.0)
    seen: list[tuple[str, float]] = []
    clock.call_later(2, lambda: seen.append(("second", clock.now())))
    clock.call_later(1, lambda: clock.call_later(0.5, lambda: seen.append(("first", clock.now()))))
    cancelled = clock.call_later(1, lambda: seen.append(("never", clock.now())))
    cancelled.cancel()
    clock.advance(3)
    assert seen == [("first", 1.5), ("second", 2.0)]
    assert clock.now() == 3
    assert clock.next_due is None


def test_whoever_runs_the_clock_is_told_of_earlier_timers() -> None:
    clock = Clock(lambda: 0.0)
    told: list[float | None] = []
    clock.on_earlier = lambda: told.append(clock.next_due)
    for delay in (5, 9, 2):
        clock.call_later(delay, lambda: None)
    assert told == [5, 2]


def test_timers_that_were_cancelled_take_no_memory() -> None:
    clock = Clock(lambda: 0.0)
    kept = clock.call_later(1000, lambda: None)
    for _ in range(10_000):
        clock.call_later(100, lambda: None).cancel()
    assert len(clock._timers) < 1000
    assert clock.next_due == kept.when


def test_what_is_remembered_is_bounded_by_number_and_by_bytes() -> None:
    recent = Recent(3)
    for body in (b"1", b"2", b"3", b"4", bytes(10 << 20), bytes(9 << 20)):
        recent.add(Stored.of("", "q", Properties(), body))
    assert [len(message.body) for message in recent] == [9 << 20]
    assert recent.total == 6


def test_time_does_not_go_back() -> None:
    with pytest.raises(ValueError, match="forward only"):
        Clock().advance(-1)


# -------------------------------------------------------------------------------------------------------- access


def test_who_logs_in() -> None:
    access = given_users(dialect("4.0"), {"guest": "secret"}, ("/",))
    amqplain = encode_table({"LOGIN": "guest", "PASSWORD": "secret"})[4:]
    for mechanism, response in (("PLAIN", b"\0guest\0secret"), ("AMQPLAIN", amqplain), ("ANONYMOUS", b"")):
        assert access.authenticate(mechanism, response, None) is access.users["guest"]
    assert access.authenticate("EXTERNAL", b"", "guest") is access.users["guest"]
    for mechanism, response in (("PLAIN", b"\0guest\0wrong"), ("PLAIN", b"\0nobody\0secret"), ("EXTERNAL", b"")):
        assert access.authenticate(mechanism, response, None) is None
    for mechanism, response in (("PLAIN", b"guest"), ("AMQPLAIN", b"nonsense"), ("AMQPLAIN", b"")):
        with pytest.raises(ValueError, match=mechanism):
            access.authenticate(mechanism, response, None)


@pytest.mark.parametrize(("version", "what"), [("3.10", "access to"), ("4.0", "configure access to")])
def test_a_permission_that_is_missing_is_named_from_4_0_on(version: str, what: str) -> None:
    access = given_users(dialect(version), {"limited": "x"}, ())
    user = access.users["limited"]
    user.permissions["lim"] = Permissions("^mine-", "", ".*")
    access.check(user, "lim", "configure", "mine-1", is_queue=True)
    with pytest.raises(Refusal) as caught:
        access.check(user, "lim", "configure", "zzz", is_queue=True)
    assert caught.value.text == f"ACCESS_REFUSED - {what} queue 'zzz' in vhost 'lim' refused for user 'limited'"
    with pytest.raises(Refusal, match=r"exchange 'amq\.default' in vhost 'lim'"):
        access.check(user, "lim", "write", "", is_queue=False)
    assert EVERYTHING == (".*", ".*", ".*")


# ------------------------------------------------------------------------------------------------------ messages


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("abc", "no_integer"),
        ("", "no_integer"),
        ("1.5", r'{leftover_string,"\.5"}'),
        ("-1", "{value_negative,-1}"),
        ("99999999999999", "{value_too_large,99999999999999}"),
    ],
)
def test_expirations_that_are_none(text: str, problem: str) -> None:
    with pytest.raises(Refusal, match=f"invalid expiration '{text}': {problem}"):
        check_expiration(text)
    check_expiration("0")


def test_nobody_publishes_as_somebody_else() -> None:
    message = Stored.of("", "q", Properties(user_id="other"), b"")
    with pytest.raises(Refusal, match="user_id property set to 'other' but authenticated user was 'guest'"):
        check_user(message, "guest", may_impersonate=False)
    check_user(message, "guest", may_impersonate=True)
    check_user(message, "other", may_impersonate=False)


def test_copies_go_to_cc_and_bcc() -> None:
    message = Stored.of("", "q", Properties(headers={"CC": ["a", 1], "BCC": ["b"]}), b"")
    assert copies(message) == (("a",), ("b",))
    with pytest.raises(Refusal, match='unacceptable_type_in_header,"CC",longstr'):
        copies(Stored.of("", "q", Properties(headers={"CC": "a"}), b""))


def test_malformed_headers_are_passed_on_as_they_are() -> None:
    raw = b"\x20\x00\x00\x00\x00\x05\x01aZ\x00\x00"
    message = Stored(b"\0\0", raw, b"")
    assert message.headers == {}
    assert message.with_headers({"x": 1}) == raw


# -------------------------------------------------------------------------------------------------------- faults


def test_a_fault_happens_once_and_to_its_method_only() -> None:
    faults = Faults()
    faults.add("basic.recover-async", 406, None)
    faults.add("queue.declare", 404, "gone")
    faults.apply("Queue.Delete")
    with pytest.raises(Refusal, match="NOT_FOUND - gone") as caught:
        faults.apply("Queue.Declare")
    assert not caught.value.closes_connection
    faults.apply("Queue.Declare")
    with pytest.raises(Refusal):
        faults.apply("Basic.RecoverAsync")
    with pytest.raises(ValueError, match="reply code"):
        faults.add("queue.declare", 999, None)


def test_reply_texts_fit_into_a_short_string() -> None:
    assert fit("x" * 255) == "x" * 255
    assert fit("ä" * 200).endswith("...")
    assert len(fit("ä" * 200).encode()) <= 255
    assert octets(b"\0\x14") == "<<0,20>>"
    assert Refusal(541, "").text == "INTERNAL_ERROR"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_broker_that_never_started_tells_what_it_is(version: str) -> None:
    broker = Broker(version=version)
    assert (broker.version, broker.port, broker.is_running) == (version, 0, False)
    assert "stopped" in repr(broker)


def test_mistakes_are_told_before_anything_is_started() -> None:
    with pytest.raises(ValueError, match=r"3\.10, 4\.0, 4\.3, not '2'"):
        Broker(version="2")
    with pytest.raises(ValueError, match="'bob', who is not among the users"):
        Broker(permissions={"bob": {}})
    with pytest.raises(ValueError, match="mechanisms are among"):
        Broker(mechanisms=("KERBEROS",))
    with pytest.raises(RuntimeError, match="ssl_context"):
        _ = Broker().tls_url


# -------------------------------------------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), 1e12])
def test_time_moves_by_a_finite_number_of_seconds(seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds must be"):
        Clock().advance(seconds)
    with pytest.raises(ValueError, match="seconds must be"):
        Broker().advance(seconds)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"consumer_timeout_tick": 0}, ValueError, "consumer_timeout_tick must be more than 0 seconds"),
        ({"consumer_timeout_tick": -1}, ValueError, "not -1"),
        ({"consumer_timeout_tick": math.nan}, ValueError, "not nan"),
        ({"consumer_timeout_tick": math.inf}, ValueError, "not inf"),
        ({"consumer_timeout": -5}, ValueError, "consumer_timeout must be 0 or more"),
        ({"consumer_timeout": "5"}, TypeError, "consumer_timeout must be a number of seconds, not '5'"),
        ({"heartbeat": -1}, ValueError, r"heartbeat must be from 0 to 65535 seconds \(0 is none\), not -1"),
        ({"heartbeat": 70_000}, ValueError, "not 70000"),
        ({"frame_max": -1}, ValueError, "frame_max must be from 0"),
        ({"frame_max": 100}, ValueError, "frame_max must be 8192 or more, as RabbitMQ 4.3 demands, or 0"),
        ({"channel_max": 65_536}, ValueError, "channel_max must be from 0 to 65535"),
        ({"max_message_size": 0}, ValueError, "max_message_size"),
        ({"keep_published": -1}, ValueError, "keep_published must be 0 or more, not -1"),
        ({"port": "5672"}, TypeError, "port must be an int, not '5672'"),
        ({"port": 70_000}, ValueError, "port must be from 0 to 65535"),
        ({"tls_port": -1}, ValueError, "tls_port"),
        ({"vhosts": "prod"}, TypeError, r"vhosts must be a tuple of strings, as \('prod',\), not 'prod'"),
        ({"vhosts": (1,)}, TypeError, "each of vhosts must be a str, not 1"),
        ({"mechanisms": "PLAIN"}, TypeError, "mechanisms must be a tuple"),
        ({"mechanisms": ("EXTERNAL",)}, ValueError, "give the broker an ssl_context"),
        ({"ssl_context": 1}, TypeError, "ssl_context must be a server's ssl.SSLContext, not 1"),
        ({"users": "guest"}, TypeError, "users must be a mapping"),
        ({"users": {"a": 1}}, TypeError, "the password of user 'a' must be a str, not 1"),
        ({"permissions": {"guest": {"/": ("(", "", "")}}}, ValueError, r"configure of 'guest' on '/' .*, not '\('"),
        ({"permissions": {"guest": {"/": (".*", "")}}}, ValueError, "must be three patterns"),
        ({"permissions": {"guest": {"/": ".*"}}}, TypeError, "must be Permissions"),
        ({"permissions": {"guest": {"typo": (".*", "", "")}}}, ValueError, "typo"),
        ({"users": {}}, ValueError, r"users must have one at least.*, not \{\}"),
        ({"users": {"a": ""}}, ValueError, "the password of user 'a' must not be empty: RabbitMQ refuses"),
        ({"users": {"": "secret"}}, ValueError, "a user's name must not be empty"),
        ({"users": {"u" * 256: "secret"}}, ValueError, "a user's name must be 255 bytes at most, not 256"),
        ({"vhosts": ()}, ValueError, r"vhosts must have one at least, as '/', not \(\)"),
        ({"vhosts": ("",)}, ValueError, "each of vhosts must not be empty"),
        ({"mechanisms": ()}, ValueError, "mechanisms must have one at least, as 'PLAIN', not"),
        ({"thread": 5}, TypeError, "thread must be True or False, not 5"),
        ({"consumer_timeout": 10**400}, ValueError, "consumer_timeout must be at most 3153600000, a hundred years"),
        ({"consumer_timeout_tick": 1e300}, ValueError, "consumer_timeout_tick must be at most"),
    ],
)
def test_arguments_of_a_broker_are_checked_when_it_is_made(
    arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        Broker(**{"version": "4.3"} | arguments)


async def tap_in_a_loop(_connection: object, _direction: str, data: bytes) -> bytes:
    return data


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda broker: broker.fail_next("queue.foo", 406), "not 'queue.foo'"),
        (lambda broker: broker.fail_next("basic.deliver", 406), "one that a client sends"),
        (lambda broker: broker.fail_next("basic.get", 999), "not 999"),
        (lambda broker: broker.set_permissions("guest", vhost="typo"), "no virtual host 'typo'"),
        (lambda broker: broker.set_permissions("guest", "("), "regular expression"),
        (lambda broker: broker.add_user("a", "b", permissions={"typo": ("", "", "")}), "no virtual host 'typo'"),
        (lambda broker: broker.delete_user("typo"), "no user 'typo'"),
        (lambda broker: broker.nack_next(-1), "count must be 0 or more, not -1"),
        (lambda broker: broker.nack_next(1.5), "count must be an int, not 1.5"),
        (lambda broker: broker.delay_confirms(-1), "not -1"),
        (lambda broker: broker.delay_confirms(math.nan), "not nan"),
        (lambda broker: broker.set_consumer_timeout(-5), "not -5"),
        (lambda broker: broker.set_consumer_timeout(5, tick=0), "tick must be more than 0 seconds, and finite, not 0"),
        (lambda broker: broker.set_limits("guest", channels="1"), "channels must be an int"),
        (lambda broker: broker.queues_of("nope"), "no virtual host 'nope'"),
        (lambda broker: broker.exchanges_of("nope"), "no virtual host 'nope'"),
        (lambda broker: broker.fail_next("queue.declare", "406"), "not '406'"),
        (lambda broker: broker.fail_next("queue.declare", [406]), r"not \[406\]"),
        (lambda broker: broker.fail_next(None, 406), "method must be a str, not None"),
        (lambda broker: broker.fail_next("queue.declare", 406, 5), "text must be a str, not 5"),
        (lambda broker: broker.advance(10**400), "seconds must be at most 3153600000, a hundred years"),
        (lambda broker: broker.delay_confirms(10**400), "seconds must be at most"),
        (lambda broker: broker.delay_confirms(1e300), "seconds must be at most .*, not 1e\\+300"),
        (lambda broker: broker.set_consumer_timeout(10**400), "seconds must be at most"),
        (lambda broker: broker.set_consumer_timeout(5, tick=10**400), "tick must be at most"),
        (lambda broker: broker.add_vhost("v", users="guest"), r"users must be a tuple of strings, as \('guest',\)"),
        (lambda broker: broker.add_vhost("v", users=5), "users must be a tuple"),
        (lambda broker: broker.add_vhost("v", users=("guest", "typo")), "no user 'typo'"),
        (lambda broker: broker.add_vhost(5), "name must be a str, not 5"),
        (lambda broker: broker.add_vhost(""), "name must not be empty"),
        (lambda broker: broker.add_vhost("é" * 128), "name must be 255 bytes at most, not 256"),
        (lambda broker: broker.add_user("", "secret"), "name must not be empty"),
        (lambda broker: broker.add_user("u" * 256, "secret"), "name must be 255 bytes at most"),
        (lambda broker: broker.add_user("u\ud800", "secret"), "name must be text that UTF-8 can carry"),
        (lambda broker: broker.add_user("u", ""), "password must not be empty"),
        (lambda broker: broker.set_limits("guest", channels=-5), "channels must be -1 or more .*, not -5"),
        (lambda broker: broker.cancel_consumers("nope"), r"no queue 'nope' in virtual host '/' \(there is none\)"),
        (lambda broker: broker.close_connections(5), "reason must be a str, not 5"),
        (lambda broker: broker.close_connections(code="x"), "not 'x'"),
        (lambda broker: broker.close_connections(name=5), "name must be a str, not 5"),
        (lambda broker: broker.close_channel("a"), "number must be an int, not 'a'"),
        (lambda broker: broker.close_channel(0), "number must be from 1 to 65535, not 0"),
        (lambda broker: broker.close_channel(1, code="x"), "not 'x'"),
        (lambda broker: broker.close_channel(1, reason=None), "reason must be a str"),
        (lambda broker: broker.drop_connections(5), "name must be a str, not 5"),
        (lambda broker: broker.drop_connections(port="x"), "port must be an int, not 'x'"),
        (lambda broker: broker.send_bytes("x"), "data must be bytes, not 'x'"),
        (lambda broker: broker.send_bytes(5), "data must be bytes, not 5"),
        (lambda broker: broker.on_bytes(5), "tap must be callable, not 5"),
        (lambda broker: broker.on_bytes(lambda data: data), "called with the connection, the direction and the bytes"),
        (lambda broker: broker.on_bytes(tap_in_a_loop), "must be no coroutine function"),
    ],
)
def test_wrong_names_and_numbers_are_refused_at_the_call(call: Callable[[Broker], object], text: str) -> None:
    broker = Broker()
    with pytest.raises((ValueError, TypeError), match=text):
        call(broker)
    assert broker.users == ("guest",)
    with pytest.raises(ValueError, match="no virtual host 'v'"):
        broker.queues_of("v")


def test_every_method_that_a_client_sends_can_be_refused() -> None:
    handled = {plain(each.name) for each in HANDLERS} | {plain(method.name) for _, method in _STEPS}
    handled |= {"basic.publish", "channel.open", "channel.close"}
    assert {plain(each) for each in METHODS} == handled


def test_there_is_no_url_before_there_is_a_port() -> None:
    with pytest.raises(RuntimeError, match="no port before its first start"):
        _ = Broker().url
    assert Broker(5672).url == "amqp://guest:guest@127.0.0.1:5672/"
