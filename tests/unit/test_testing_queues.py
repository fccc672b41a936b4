"""`leveret.testing`: the order of messages, whose turn it is, what expires, overflows, comes back and dies."""

from __future__ import annotations

from typing import Any

import pytest

from leveret.testing.backlog import Backlog
from leveret.testing.clock import Clock
from leveret.testing.consumers import Consumer
from leveret.testing.dialect import dialect
from leveret.testing.messages import Entry, Stored
from leveret.testing.queues import Queue
from leveret.testing.refusals import Refusal
from leveret.testing.vhost import VirtualHost
from leveret.wire.codec import Properties


class FakeChannel:
    """Takes what it is given, up to the prefetch."""

    def __init__(self) -> None:
        self.got: list[tuple[str, bytes, bool]] = []
        self.entries: list[Entry] = []
        self.cancelled: list[str] = []

    def can_take(self, consumer: Consumer) -> bool:
        return not consumer.prefetch or consumer.in_hand < consumer.prefetch

    def deliver(self, consumer: Consumer, entry: Entry) -> None:
        consumer.in_hand += 1
        self.entries.append(entry)
        self.got.append((consumer.tag, entry.message.body, entry.redelivered))

    def cancel_consumer(self, consumer: Consumer) -> None:
        self.cancelled.append(consumer.tag)


class Bench:
    """A virtual host whose time stands still until it is moved."""

    def __init__(self, version: str = "4.0") -> None:
        self.clock = Clock(lambda: 1000.0)
        self.host = VirtualHost("/", self.clock, dialect(version))
        self.channel = FakeChannel()

    def queue(self, name: str = "q", *, durable: bool = True, auto_delete: bool = False, **arguments: Any) -> Queue:
        given = {f"x-{key.replace('_', '-')}": value for key, value in arguments.items()}
        return self.host.declare_queue(
            name, durable=durable, exclusive=False, auto_delete=auto_delete, arguments=given, owner=None
        )

    def publish(self, *bodies: bytes, to: str = "q", **properties: Any) -> list[bool]:
        default = self.host.exchanges[""]
        messages = [Stored.of("", to, Properties(**properties), body) for body in bodies]
        return [self.host.publish(default, message)[1] for message in messages]

    def consumer(self, queue: Queue, tag: str = "c", **options: Any) -> Consumer:
        consumer = Consumer(tag, queue.name, self.channel, **options)
        queue.add_consumer(consumer)
        return consumer


@pytest.fixture
def bench() -> Bench:
    return Bench()


def bodies(queue: Queue) -> list[bytes]:
    return [message.body for message in queue.waiting()]


def take(queue: Queue, count: int) -> list[Entry]:
    entries = [queue.get(no_ack=False) for _ in range(count)]
    return [entry for entry in entries if entry is not None]


# --------------------------------------------------------------------------------------------------------- order


def test_what_comes_back_has_the_place_that_it_had(bench: Bench) -> None:
    queue = bench.queue()
    bench.publish(b"1", b"2", b"3", b"4", b"5")
    entries = take(queue, 4)
    queue.requeue([entries[2], entries[0]])
    queue.requeue([entries[1]])
    assert bodies(queue) == [b"1", b"2", b"3", b"5"]
    assert [(entry.message.body, entry.redelivered) for entry in take(queue, 4)] == [
        (b"1", True),
        (b"2", True),
        (b"3", True),
        (b"5", False),
    ]
    assert queue.unacked == 5


def test_higher_priorities_first_and_by_age_within_one(bench: Bench) -> None:
    queue = bench.queue(max_priority=3)
    for body, priority in ((b"a", 0), (b"b", 2), (b"c", 9), (b"d", 3), (b"e", 2)):
        bench.publish(body, priority=priority)
    assert bodies(queue) == [b"c", b"d", b"b", b"e", b"a"]
    first = take(queue, 1)
    queue.requeue(first)
    assert [entry.message.body for entry in take(queue, 5)] == [b"c", b"d", b"b", b"e", b"a"]


def test_the_backlog_counts_and_weighs() -> None:
    backlog = Backlog()
    for position in range(3):
        backlog.push(Entry(Stored.of("", "q", Properties(), b"xy"), position, 0, None))
    assert (len(backlog), backlog.size) == (3, 6)
    backlog.put_back(backlog.pop())
    backlog.pop()
    assert (len(backlog), backlog.size) == (2, 4)
    assert len(backlog.clear()) == 2
    assert (len(backlog), backlog.size) == (0, 0)


# ------------------------------------------------------------------------------------------------------ consumers


def test_consumers_take_turns_as_far_as_they_have_room(bench: Bench) -> None:
    queue = bench.queue()
    one = bench.consumer(queue, "one", prefetch=1)
    bench.consumer(queue, "two", prefetch=2)
    bench.publish(b"1", b"2", b"3", b"4")
    assert [tag for tag, _, _ in bench.channel.got] == ["one", "two", "two"]
    one.in_hand = 0
    queue.dispatch()
    assert bench.channel.got[-1] == ("one", b"4", False)


def test_a_consumer_of_higher_priority_gets_all_until_it_is_full(bench: Bench) -> None:
    queue = bench.queue()
    bench.consumer(queue, "low")
    bench.consumer(queue, "high", prefetch=2, arguments={"x-priority": 5})
    bench.publish(b"1", b"2", b"3")
    assert [tag for tag, _, _ in bench.channel.got] == ["high", "high", "low"]


def test_a_single_active_consumer_of_a_quorum_queue_makes_place_for_a_higher_one_when_it_has_nothing_left() -> None:
    for version, expected in (("4.0", ["low", "high"]), ("3.10", ["low", "low"])):
        bench = Bench(version)
        queue = bench.queue(queue_type="quorum", single_active_consumer=True)
        low = bench.consumer(queue, "low")
        bench.publish(b"1")
        bench.consumer(queue, "high", arguments={"x-priority": 5})
        bench.publish(b"2")
        if version == "4.0":
            assert [tag for tag, _, _ in bench.channel.got] == ["low"]
        low.in_hand = 0
        queue.dispatch()
        assert [tag for tag, _, _ in bench.channel.got] == expected


def test_a_single_active_consumer_stays_when_the_higher_one_gives_up(bench: Bench) -> None:
    queue = bench.queue(queue_type="quorum", single_active_consumer=True)
    low = bench.consumer(queue, "low")
    bench.publish(b"1")
    queue.remove_consumer(bench.consumer(queue, "high", arguments={"x-priority": 5}))
    bench.publish(b"2")
    assert len(bench.channel.got) == 1
    low.in_hand = 0
    queue.dispatch()
    assert [tag for tag, _, _ in bench.channel.got] == ["low", "low"]


@pytest.mark.parametrize(("version", "expected"), [("3.10", "one"), ("4.0", "three"), ("4.3", "three")])
def test_which_waiting_consumer_of_a_quorum_queue_is_the_next_active_one(version: str, expected: str) -> None:
    bench = Bench(version)
    queue = bench.queue(queue_type="quorum", single_active_consumer=True)
    active = bench.consumer(queue, "zero")
    for tag, prefetch in (("one", 1), ("three", 3), ("two", 2)):
        bench.consumer(queue, tag, prefetch=prefetch)
    queue.remove_consumer(active)
    bench.publish(b"1")
    assert [tag for tag, _, _ in bench.channel.got] == [expected]


def test_a_consumer_keeps_its_turn_when_what_came_back_has_expired(bench: Bench) -> None:
    queue = bench.queue(queue_type="quorum", message_ttl=10)
    bench.consumer(queue, "one")
    bench.publish(b"1", b"2")
    bench.consumer(queue, "two")
    bench.clock.advance(1)
    queue.requeue(bench.channel.entries[1:])
    bench.publish(b"3")
    assert [tag for tag, _, _ in bench.channel.got] == ["one", "one", "one"]


def test_a_single_active_consumer_is_followed_by_the_next(bench: Bench) -> None:
    queue = bench.queue(single_active_consumer=True)
    first = bench.consumer(queue, "first")
    bench.consumer(queue, "second")
    bench.publish(b"1", b"2")
    queue.remove_consumer(first)
    bench.publish(b"3")
    assert [tag for tag, _, _ in bench.channel.got] == ["first", "first", "second"]


def test_an_auto_delete_queue_goes_with_its_last_consumer_only(bench: Bench) -> None:
    queue = bench.queue(auto_delete=True)
    one, two = bench.consumer(queue, "one"), bench.consumer(queue, "two")
    queue.remove_consumer(one)
    assert "q" in bench.host.queues
    queue.remove_consumer(two)
    assert "q" not in bench.host.queues


def test_deleting_cancels_the_consumers_and_what_is_out_leads_nowhere(bench: Bench) -> None:
    queue = bench.queue()
    bench.consumer(queue)
    bench.publish(b"1")
    assert bench.host.delete_queue(queue) == 0
    assert bench.channel.cancelled == ["c"]
    queue.requeue(bench.channel.entries)
    assert bodies(queue) == []


# ---------------------------------------------------------------------------------------------------------- time


def test_a_message_expires_at_the_head_only(bench: Bench) -> None:
    queue = bench.queue(dead_letter_exchange="", dead_letter_routing_key="dead")
    dead = bench.queue("dead")
    bench.publish(b"long", expiration="5000")
    bench.publish(b"short", expiration="1000")
    bench.clock.advance(4.9)
    assert bodies(queue) == [b"long", b"short"]
    bench.clock.advance(0.2)
    assert (bodies(queue), bodies(dead)) == ([], [b"long", b"short"])


def test_the_shorter_of_the_two_ttls_counts(bench: Bench) -> None:
    queue = bench.queue(message_ttl=2000)
    bench.publish(b"1", expiration="9000")
    bench.clock.advance(1.9)
    assert queue.ready == 1
    bench.clock.advance(0.1)
    assert queue.ready == 0


def test_a_ttl_of_zero_is_for_those_who_wait_already(bench: Bench) -> None:
    queue = bench.queue(message_ttl=0)
    bench.publish(b"nobody")
    bench.consumer(queue)
    bench.publish(b"somebody")
    bench.clock.run_due()
    assert [body for _, body, _ in bench.channel.got] == [b"somebody"]
    assert queue.ready == 0


def test_an_unused_queue_expires_and_a_used_one_does_not(bench: Bench) -> None:
    queue = bench.queue(expires=1000)
    bench.clock.advance(0.9)
    queue.get(no_ack=True)
    bench.clock.advance(0.9)
    consumer = bench.consumer(queue)
    bench.clock.advance(10)
    assert "q" in bench.host.queues
    queue.remove_consumer(consumer)
    bench.clock.advance(1)
    assert "q" not in bench.host.queues


# ------------------------------------------------------------------------------------------------------ overflow


def test_drop_head_makes_room_and_tells_why(bench: Bench) -> None:
    queue = bench.queue(max_length=2, dead_letter_exchange="", dead_letter_routing_key="dead")
    dead = bench.queue("dead")
    assert bench.publish(b"1", b"2", b"3") == [True, True, True]
    assert (bodies(queue), bodies(dead)) == ([b"2", b"3"], [b"1"])
    [message] = dead.waiting()
    assert message.headers["x-first-death-reason"] == "maxlen"


@pytest.mark.parametrize(("overflow", "dies"), [("reject-publish", []), ("reject-publish-dlx", [b"3", b"4"])])
def test_a_full_queue_refuses(bench: Bench, overflow: str, dies: list[bytes]) -> None:
    queue = bench.queue(max_length=2, overflow=overflow, dead_letter_exchange="", dead_letter_routing_key="dead")
    dead = bench.queue("dead")
    assert bench.publish(b"1", b"2", b"3", b"4") == [True, True, False, False]
    assert (bodies(queue), bodies(dead)) == ([b"1", b"2"], dies)


def test_bytes_are_counted_too(bench: Bench) -> None:
    queue = bench.queue(max_length_bytes=10)
    bench.publish(b"12345", b"67890", b"x")
    assert bodies(queue) == [b"67890", b"x"]


# -------------------------------------------------------------------------------------------------------- quorum


def count_of(queue: Queue, entry: Entry) -> Any:
    properties = queue.properties_of(entry)
    return Stored(b"\0\0", properties, b"").headers.get("x-delivery-count")


def test_a_quorum_queue_gives_up_after_its_limit(bench: Bench) -> None:
    queue = bench.queue(queue_type="quorum", delivery_limit=2, dead_letter_exchange="", dead_letter_routing_key="dead")
    dead = bench.queue("dead")
    bench.publish(b"1")
    counts = []
    for _ in range(3):
        [entry] = take(queue, 1)
        counts.append(count_of(queue, entry))
        queue.requeue([entry])
    assert counts == [None, 1, 2]
    assert (bodies(queue), bodies(dead)) == ([], [b"1"])


def test_4_3_counts_what_was_rejected_only_and_delays_it() -> None:
    bench = Bench("4.3")
    arguments = {"delayed_retry_type": "failed", "delayed_retry_min": 1000, "delayed_retry_max": 1500}
    queue = bench.queue(queue_type="quorum", **arguments)
    bench.publish(b"1")
    queue.requeue(take(queue, 1))
    assert queue.ready == 1
    for wait in (1.0, 1.5, 1.5):
        queue.requeue(take(queue, 1), failed=True)
        bench.clock.advance(wait - 0.01)
        assert queue.ready == 0
        bench.clock.advance(0.01)
    [entry] = take(queue, 1)
    assert count_of(queue, entry) == 3
    assert Stored(b"\0\0", queue.properties_of(entry), b"").headers["x-acquired-count"] == 4


def test_3_10_puts_what_returns_to_the_end_without_a_limit() -> None:
    bench = Bench("3.10")
    queue = bench.queue(queue_type="quorum")
    bench.publish(b"1", b"2")
    queue.requeue(take(queue, 1))
    assert bodies(queue) == [b"2", b"1"]


def test_4_0_puts_what_returns_to_the_end_without_its_priority_only_when_there_is_no_limit(bench: Bench) -> None:
    for name, limit, order in (("endless", -1, [b"2", b"1"]), ("limited", 5, [b"1", b"2"])):
        queue = bench.queue(name, queue_type="quorum", delivery_limit=limit)
        bench.publish(b"1", to=name, priority=9)
        bench.publish(b"2", to=name)
        queue.requeue(take(queue, 1))
        assert bodies(queue) == order


def test_3_10_drops_what_comes_back_below_a_limit_of_zero_and_makes_room_for_two() -> None:
    bench = Bench("3.10")
    queue = bench.queue(queue_type="quorum", delivery_limit=-1)
    consumer = bench.consumer(queue, prefetch=1)
    bench.publish(b"1", b"2", b"3", b"4")
    consumer.in_hand -= 1
    queue.requeue(bench.channel.entries[:], consumer=consumer)
    assert [body for _, body, _ in bench.channel.got] == [b"1", b"2", b"3"]
    assert bodies(queue) == [b"4"]


# ------------------------------------------------------------------------------------------------------- streams


def test_a_stream_is_read_from_where_one_likes_and_stays(bench: Bench) -> None:
    queue = bench.queue(queue_type="stream")
    bench.publish(*[b"%d" % i for i in range(5)])
    for tag, offset in (("first", "first"), ("last", "last"), ("next", "next"), ("three", 3), ("beyond", 99)):
        bench.consumer(queue, tag, prefetch=10, arguments={"x-stream-offset": offset})
    bench.publish(b"5")
    got: dict[str, list[bytes]] = {}
    for tag, body, _ in bench.channel.got:
        got.setdefault(tag, []).append(body)
    assert got["first"] == [b"0", b"1", b"2", b"3", b"4", b"5"]
    assert got["last"] == [b"4", b"5"]
    assert got["three"] == [b"3", b"4", b"5"]
    assert got["next"] == [b"5"]
    assert "beyond" not in got
    assert queue.ready == 6


def test_a_stream_goes_on_as_its_reader_acks(bench: Bench) -> None:
    queue = bench.queue(queue_type="stream")
    bench.publish(b"0", b"1", b"2")
    consumer = bench.consumer(queue, prefetch=2, arguments={"x-stream-offset": "first"})
    assert len(bench.channel.got) == 2
    consumer.in_hand = 0
    queue.dispatch()
    assert [body for _, body, _ in bench.channel.got] == [b"0", b"1", b"2"]


def test_a_stream_drops_its_oldest(bench: Bench) -> None:
    queue = bench.queue(queue_type="stream", max_length_bytes=10)
    bench.publish(b"12345", b"67890", b"x")
    bench.consumer(queue, prefetch=9, arguments={"x-stream-offset": 0})
    assert [(entry.position, entry.message.body) for entry in bench.channel.entries] == [(1, b"67890"), (2, b"x")]


@pytest.mark.parametrize(
    ("version", "kept"), [("3.10", set[str]()), ("4.0", {"x-a", "x-t", "CC"}), ("4.3", {"x-a", "x-t", "CC"})]
)
def test_a_stream_loses_headers_that_are_arrays_or_tables(version: str, kept: set[str]) -> None:
    bench = Bench(version)
    queue = bench.queue(queue_type="stream")
    bench.publish(b"1", headers={"a": [1], "t": {}, "x-a": [1], "x-t": {}, "CC": ["q"], "plain": 1})
    [message] = queue.waiting()
    assert message.headers.keys() == kept | {"plain"}


@pytest.mark.parametrize(("version", "arrived"), [("3.10", []), ("4.0", [b"1"])])
def test_dead_letters_reach_a_stream_from_4_0_on(version: str, arrived: list[bytes]) -> None:
    bench = Bench(version)
    bench.queue(max_length=0, dead_letter_exchange="", dead_letter_routing_key="dead")
    dead = bench.queue("dead", queue_type="stream")
    bench.publish(b"1")
    assert bodies(dead) == arrived


# -------------------------------------------------------------------------------------------------- dead letters


def test_a_circle_without_a_rejection_ends(bench: Bench) -> None:
    queue = bench.queue(message_ttl=10, dead_letter_exchange="")
    bench.publish(b"1")
    bench.clock.advance(60)
    assert queue.ready == 0


def test_who_is_rejected_may_go_round_and_is_counted(bench: Bench) -> None:
    queue = bench.queue(dead_letter_exchange="", dead_letter_routing_key="wait")
    bench.queue("wait", message_ttl=10, dead_letter_exchange="", dead_letter_routing_key="q")
    bench.publish(b"1", expiration="60000")
    for _ in range(3):
        [entry] = take(queue, 1)
        queue.reject(entry)
        bench.clock.advance(0.01)
    [entry] = take(queue, 1)
    headers = entry.message.headers
    deaths: Any = headers["x-death"]
    assert [(d["queue"], d["reason"], d["count"]) for d in deaths] == [("wait", "expired", 3), ("q", "rejected", 3)]
    assert deaths[1]["original-expiration"] == "60000"
    assert deaths[1]["routing-keys"] == ["q"]
    assert (headers["x-first-death-queue"], headers["x-last-death-queue"]) == ("q", "wait")
    assert entry.message.decoded().expiration is None


def test_3_10_knows_no_last_death() -> None:
    bench = Bench("3.10")
    bench.queue(max_length=0, dead_letter_exchange="", dead_letter_routing_key="dead")
    dead = bench.queue("dead")
    bench.publish(b"1")
    [message] = dead.waiting()
    assert not [name for name in message.headers if name.startswith("x-last")]


def test_3_10_turns_the_older_deaths_round() -> None:
    bench = Bench("3.10")
    for name, to in (("q", "two"), ("two", "three"), ("three", "four")):
        bench.queue(name, max_length=0, dead_letter_exchange="", dead_letter_routing_key=to)
    last = bench.queue("four")
    bench.publish(b"1")
    [message] = last.waiting()
    deaths: Any = message.headers["x-death"]
    assert [death["queue"] for death in deaths] == ["three", "q", "two"]


@pytest.mark.parametrize(
    ("version", "kind", "redelivered"),
    [
        ("3.10", "quorum", [False, False, False]),
        ("4.0", "classic", [False, False, False]),
        ("4.0", "quorum", [True, True, False]),
        ("4.3", "classic", [True, True, True]),
        ("4.3", "quorum", [True, True, True]),
    ],
)
def test_a_dead_letter_that_failed_counts_as_redelivered(version: str, kind: str, redelivered: list[bool]) -> None:
    bench = Bench(version)
    queue = bench.queue(queue_type=kind, max_length=1, dead_letter_exchange="", dead_letter_routing_key="dead")
    dead = bench.queue("dead", queue_type=kind)
    bench.publish(b"refused")
    queue.reject(take(queue, 1)[0])
    bench.publish(b"left")
    queue.requeue(take(queue, 1), failed=True, ended=True)
    bench.publish(b"given back")
    queue.requeue(take(queue, 1), failed=True)
    bench.publish(b"last")
    assert [entry.redelivered for entry in take(dead, 3)] == redelivered


def test_what_was_dead_keeps_its_count_on_the_way_through_another_queue(bench: Bench) -> None:
    first = bench.queue(queue_type="quorum", dead_letter_exchange="", dead_letter_routing_key="two")
    second = bench.queue("two", dead_letter_exchange="", dead_letter_routing_key="three")
    third = bench.queue("three", queue_type="quorum")
    bench.publish(b"1")
    first.reject(take(first, 1)[0])
    second.reject(take(second, 1)[0])
    [entry] = take(third, 1)
    assert count_of(third, entry) == 1
    third.requeue([entry])
    assert count_of(third, entry) == 1


@pytest.mark.parametrize(("version", "counts"), [("4.0", [1, 1]), ("4.3", [1, 0])])
def test_only_a_basic_reject_counts_as_a_failure_of_4_3(version: str, counts: list[int]) -> None:
    bench = Bench(version)
    queue = bench.queue(queue_type="quorum", dead_letter_exchange="", dead_letter_routing_key="dead")
    dead = bench.queue("dead", queue_type="quorum")
    bench.publish(b"rejected", b"nacked")
    for entry, failed in zip(take(queue, 2), (True, False), strict=True):
        queue.reject(entry, failed=failed)
    assert [entry.failures for entry in take(dead, 2)] == counts


def test_a_dead_letter_that_is_delivered_at_once_is_not_called_redelivered() -> None:
    bench = Bench("4.3")
    queue = bench.queue(dead_letter_exchange="", dead_letter_routing_key="dead")
    bench.consumer(bench.queue("dead"))
    bench.publish(b"1")
    queue.reject(take(queue, 1)[0])
    assert [redelivered for _, _, redelivered in bench.channel.got] == [False]


def test_without_its_exchange_a_dead_letter_is_dropped(bench: Bench) -> None:
    bench.queue(max_length=0, dead_letter_exchange="nowhere")
    assert bench.publish(b"1") == [True]


# ---------------------------------------------------------------------------------------------------- declaring

BY_THE_WIRE = {
    ("message_ttl", -1): "{value_negative,-1}",
    ("message_ttl", "a"): '"expected integer, got longstr"',
    ("message_ttl", 10**13): "{value_too_large,10000000000000}",
    ("expires", 0): "{value_zero,0}",
    ("max_priority", 300): "{max_value_exceeded,300}",
    ("overflow", "foo"): "invalid_overflow",
    ("queue_type", "foo"): "\"unsupported queue type 'foo'\"",
    ("dead_letter_routing_key", "k"): "routing_key_but_no_dlx_defined",
    ("delivery_limit", 3): " of queue type rabbit_classic_queue",
}
"""As RabbitMQ 4.0.5 says it."""


@pytest.mark.parametrize(("argument", "said"), BY_THE_WIRE.items())
def test_bad_arguments_are_refused_in_the_broker_s_words(bench: Bench, argument: tuple[str, Any], said: str) -> None:
    name, value = argument
    with pytest.raises(Refusal) as caught:
        bench.queue(**{name: value})
    assert caught.value.code == 406
    assert caught.value.text.startswith(f"PRECONDITION_FAILED - invalid arg 'x-{name.replace('_', '-')}' for queue 'q'")
    assert caught.value.text.endswith(said)


def test_another_declaration_is_told_what_differs(bench: Bench) -> None:
    bench.queue(max_length=1, message_ttl=5000)
    with pytest.raises(Refusal) as caught:
        bench.queue(max_length=2, message_ttl=5000)
    assert caught.value.text == (
        "PRECONDITION_FAILED - inequivalent arg 'x-max-length' for queue 'q' in vhost '/': "
        "received '2' but current is '1'"
    )
    with pytest.raises(Refusal, match="received none but current is the value '5000' of type 'signedint'"):
        bench.queue(max_length=1)
    with pytest.raises(Refusal, match=r"inequivalent arg 'durable'.* received 'false' but current is 'true'"):
        bench.queue(max_length=1, message_ttl=5000, durable=False)
    assert bench.queue(max_length=1, message_ttl=5000) is bench.host.queues["q"]


@pytest.mark.parametrize(
    ("flags", "said"), [({"durable": False}, "non-durable"), ({"auto_delete": True}, "auto-delete")]
)
def test_quorum_queues_and_streams_are_durable_and_shared(bench: Bench, flags: dict[str, bool], said: str) -> None:
    for kind in ("quorum", "stream"):
        with pytest.raises(Refusal, match=f"invalid property '{said}' for queue 'q'"):
            bench.queue(queue_type=kind, **flags)
