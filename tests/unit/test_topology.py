"""What is remembered, under which identity, what goes along with what, and in which order it is replayed."""

from __future__ import annotations

import copy
import datetime
import time
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest
from pamqp.base import Frame
from pamqp.commands import Basic, Exchange, Queue

from leveret.records import (
    Binding,
    ConsumerRecord,
    Entity,
    ExchangeBinding,
    ExchangeRecord,
    Key,
    QosRecord,
    QueueBinding,
    QueueRecord,
    Record,
    canonical,
    consumer_key,
    exchange_key,
    queue_key,
)
from leveret.topology import Topology
from leveret.types import Arguments
from leveret.wire.methods import encode_method


def exchange(name: str, *, auto_delete: bool = False) -> ExchangeRecord:
    return ExchangeRecord(name=name, type="topic", auto_delete=auto_delete)


def queue(name: str, *, auto_delete: bool = False) -> QueueRecord:
    return QueueRecord(name=name, auto_delete=auto_delete)


def bound(queue: str, exchange: str, routing_key: str = "key", arguments: Arguments = None) -> QueueBinding:
    return QueueBinding(queue=queue, exchange=exchange, routing_key=routing_key, arguments=arguments)


def linked(destination: str, source: str, routing_key: str = "key", arguments: Arguments = None) -> ExchangeBinding:
    return ExchangeBinding(destination=destination, source=source, routing_key=routing_key, arguments=arguments)


def consumer(queue: str, channel: int = 1, tag: str = "tag") -> ConsumerRecord:
    return ConsumerRecord(channel=channel, consumer_tag=tag, queue=queue)


def topology(*records: Record, channel: int = 1) -> Topology:
    """With *records* by way of *channel*, or of their own where they have one."""
    made = Topology()
    remember(made, *records, channel=channel)
    return made


def flat(topology: Topology) -> list[Entity]:
    """The stages of its plan, one after the other."""
    return [record for stage in topology.plan() for record in stage]


def remember(topology: Topology, *records: Record, channel: int = 1) -> None:
    for record in records:
        own = record.channel if isinstance(record, ConsumerRecord | QosRecord) else channel
        topology.remember(record, own)


def is_empty(topology: Topology) -> bool:
    return not (topology._records or topology._owners or topology._owned)


# ------------------------------------------------------------------------------------------------------ identity


def test_a_record_is_found_by_its_key() -> None:
    records: list[Record] = [exchange("e"), queue("q"), bound("q", "e"), linked("e", "f"), consumer("q")]
    known = topology(*records)
    assert len(known) == len(list(known)) == 5
    assert list(known) == records
    for record in records:
        assert record.key in known
        assert known.get(record.key) == record


def test_what_nobody_remembered_is_not_there() -> None:
    known = topology(queue("q"))
    assert queue_key("other") not in known
    assert exchange_key("q") not in known
    assert known.get(exchange_key("q")) is None


def test_an_exchange_and_a_queue_of_one_name_are_two() -> None:
    known = topology(exchange("same"), queue("same"))
    assert [type(record) for record in known] == [ExchangeRecord, QueueRecord]


def test_a_queue_and_an_exchange_bound_alike_are_two() -> None:
    assert len(topology(bound("same", "source"), linked("same", "source"))) == 2


def test_the_same_tag_on_two_channels_is_two_consumers() -> None:
    known = topology(consumer("q", channel=1), consumer("q", channel=2))
    assert [record.channel for record in known.consumers()] == [1, 2]
    assert consumer_key(1, "tag") in known


@pytest.mark.parametrize("make", [bound, linked])
@pytest.mark.parametrize(
    ("one", "another"),
    [
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, None),
        ({"a": 1}, {"b": 1}),
        ({"a": True}, {"a": 1}),
        ({"a": False}, {"a": 0}),
        ({"a": 1}, {"a": 1.0}),
        ({"a": "1"}, {"a": 1}),
        ({"a": "x"}, {"a": b"x"}),
        ({"a": None}, {}),
        ({"a": {"b": True}}, {"a": {"b": 1}}),
        ({"a": [{"b": 1}]}, {"a": [{"b": 2}]}),
        ({"a": [1, 2]}, {"a": [2, 1]}),
        ({"a": {"b": {}}}, {"a": {"b": []}}),
        ({"x-match": "any", "a": 1}, {"x-match": "all", "a": 1}),
    ],
    ids=str,
)
def test_bindings_that_differ_in_their_arguments_only_are_two(
    make: Callable[..., Binding], one: Arguments, another: Arguments
) -> None:
    first, second = make("d", "s", arguments=one), make("d", "s", arguments=another)
    known = topology(first, second)
    assert len(known) == 2
    known.forget(first.key)
    assert list(known) == [second]


@pytest.mark.parametrize("make", [bound, linked])
@pytest.mark.parametrize(
    ("one", "another"),
    [
        (None, {}),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"c": 2, "b": 1}}),
        ({"a": [{"b": 1, "c": 2}]}, {"a": [{"c": 2, "b": 1}]}),
        ({"a": [1, 2]}, {"a": (1, 2)}),
        ({"a": b"x"}, {"a": bytearray(b"x")}),
        ({"a": {"b": 1}}, MappingProxyType({"a": MappingProxyType({"b": 1})})),
    ],
    ids=str,
)
def test_bindings_that_a_broker_takes_for_the_same_are_one(
    make: Callable[..., Binding], one: Arguments, another: Arguments
) -> None:
    known = topology(make("d", "s", arguments=one), make("d", "s", arguments=another))
    assert len(known) == 1
    known.forget(make("d", "s", arguments=one).key)
    assert is_empty(known)


def test_arguments_of_declarations_and_consumers_are_not_part_of_their_identity() -> None:
    assert QueueRecord(name="q", arguments={"x-max-length": 1}).key == queue_key("q")
    assert ExchangeRecord(name="e", type="direct", arguments={"alternate-exchange": "f"}).key == exchange_key("e")
    tuned = ConsumerRecord(channel=1, consumer_tag="tag", queue="q", arguments={"x-priority": 1})
    assert tuned.key == consumer_key(1, "tag")


def test_a_table_is_canonical_at_every_depth() -> None:
    assert canonical(None) == canonical({}) == b"\0\0\0\0"
    assert canonical({"b": 1, "a": [{"d": 2, "c": 3}]}) == canonical({"a": [{"c": 3, "d": 2}], "b": 1})


@pytest.mark.parametrize("arguments", [None, {"a": 1}])
def test_bindings_with_other_keys_are_others(arguments: Arguments) -> None:
    assert len(topology(bound("q", "e", "one", arguments), bound("q", "e", "two", arguments))) == 2


# ------------------------------------------------------------------------------------------------ remembering


def test_declaring_again_replaces_the_record() -> None:
    again = QueueRecord(name="q", durable=True, arguments={"x-max-length": 1})
    known = topology(queue("q"), again)
    assert list(known) == [again]


def test_setting_the_prefetch_again_replaces_it_and_both_kinds_are_kept() -> None:
    known = topology(
        QosRecord(channel=1, prefetch_count=10, global_=False),
        QosRecord(channel=1, prefetch_count=20, global_=False),
        QosRecord(channel=1, prefetch_count=50, global_=True),
        QosRecord(channel=2, prefetch_count=1, global_=False),
    )
    assert [record.prefetch_count for record in known.qos(1)] == [20, 50]
    assert [record.prefetch_count for record in known.qos(2)] == [1]
    assert known.qos(3) == []


def test_consumers_are_told_by_channel_or_all_in_the_order_in_which_they_came() -> None:
    known = topology(consumer("q", 1, "b"), consumer("q", 2, "c"), queue("q"), consumer("q", 1, "a"))
    assert [record.consumer_tag for record in known.consumers(1)] == ["b", "a"]
    assert [record.consumer_tag for record in known.consumers()] == ["b", "c", "a"]
    assert known.consumers(3) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda arguments: QueueRecord(name="q", arguments=arguments),
        lambda arguments: ExchangeRecord(name="e", type="headers", arguments=arguments),
        lambda arguments: bound("q", "e", arguments=arguments),
        lambda arguments: linked("e", "f", arguments=arguments),
        lambda arguments: ConsumerRecord(channel=1, consumer_tag="tag", queue="q", arguments=arguments),
    ],
    ids=["queue", "exchange", "queue binding", "exchange binding", "consumer"],
)
@pytest.mark.parametrize("arguments", [{}, {"a": {"b": [1, {"c": 2}]}, "data": bytearray(b"abc")}], ids=str)
def test_what_the_caller_does_to_the_arguments_later_changes_nothing(
    make: Callable[[Arguments], Record], arguments: dict[str, Any]
) -> None:
    arguments = copy.deepcopy(arguments)
    before = make(copy.deepcopy(arguments))
    known = topology(make(arguments))
    if arguments:
        arguments["a"]["b"][1]["c"] = 3
        arguments["a"]["b"].append(4)
        arguments["data"][0] = 0
    arguments["new"] = 1
    assert list(known) == [before]
    assert [record.key for record in known] == [before.key]
    known.forget(before.key)
    assert is_empty(known)


def test_a_time_in_the_arguments_stays_a_time() -> None:
    moment = time.gmtime(1_600_000_000)
    offset = QueueRecord(name="q", arguments={"at": moment})
    (kept,) = flat(topology(offset))
    assert encode_method(1, kept.method()) == encode_method(1, offset.method())
    as_datetime = {"at": datetime.datetime.fromtimestamp(1_600_000_000, datetime.UTC)}
    assert bound("q", "e", arguments={"at": moment}).key == bound("q", "e", arguments=as_datetime).key


# --------------------------------------------------------------------------------------------------- forgetting


def test_an_unknown_key_is_forgotten_without_a_word() -> None:
    known = topology(queue("q"))
    for key in (queue_key("other"), exchange_key("q"), consumer_key(1, "tag"), bound("q", "e").key):
        known.forget(key)
    assert list(known) == [queue("q")]


def test_forgetting_twice_is_forgetting_once() -> None:
    known = topology(exchange("e"), queue("q"), bound("q", "e"))
    known.forget(queue_key("q"))
    known.forget(queue_key("q"))
    assert list(known) == [exchange("e")]


def test_with_a_queue_go_its_bindings_and_its_consumers_on_every_channel() -> None:
    known = topology(
        *(exchange("e"), queue("q"), queue("other"), bound("q", "e"), bound("q", "amq.topic"), bound("other", "e")),
        *(consumer("q", 1), consumer("q", 2), consumer("other", 2, "its own")),
    )
    known.forget(queue_key("q"))
    assert list(known) == [exchange("e"), queue("other"), bound("other", "e"), consumer("other", 2, "its own")]


def test_with_an_exchange_go_the_bindings_from_it_and_to_it() -> None:
    known = topology(
        *(exchange("e"), exchange("before"), exchange("after"), queue("q")),
        *(bound("q", "e"), linked("e", "before"), linked("after", "e"), linked("after", "before"), bound("q", "after")),
    )
    known.forget(exchange_key("e"))
    assert list(known) == [
        *(exchange("before"), exchange("after"), queue("q")),
        *(linked("after", "before"), bound("q", "after")),
    ]


def test_with_what_somebody_else_declared_go_its_bindings_and_consumers_too() -> None:
    known = topology(queue("q"), bound("q", "theirs"), bound("their queue", "e"), consumer("their queue"))
    known.forget(exchange_key("theirs"))
    known.forget(queue_key("their queue"))
    assert list(known) == [queue("q")]


def test_a_binding_that_is_forgotten_takes_nothing_along() -> None:
    known = topology(exchange("e"), queue("q"), bound("q", "e", "one"), bound("q", "e", "two"))
    known.forget(bound("q", "e", "one").key)
    assert list(known) == [exchange("e"), queue("q"), bound("q", "e", "two")]


def test_an_exchange_that_is_bound_to_itself_goes_once() -> None:
    known = topology(exchange("e", auto_delete=True), linked("e", "e"))
    known.forget(exchange_key("e"))
    assert is_empty(known)


# -------------------------------------------------------------------------------------------------- auto-delete


def test_an_auto_delete_queue_goes_with_its_last_consumer_and_not_before() -> None:
    known = topology(queue("q", auto_delete=True), consumer("q", 1), consumer("q", 2))
    known.forget(consumer_key(1, "tag"))
    assert queue_key("q") in known
    known.forget(consumer_key(2, "tag"))
    assert is_empty(known)


def test_an_auto_delete_queue_that_never_had_a_consumer_stays() -> None:
    known = topology(queue("q", auto_delete=True), exchange("e"), bound("q", "e"))
    known.forget(bound("q", "e").key)
    assert queue_key("q") in known


def test_an_auto_delete_exchange_goes_with_its_last_binding_and_not_before() -> None:
    known = topology(exchange("e", auto_delete=True), queue("q"), bound("q", "e", "one"), bound("q", "e", "two"))
    known.forget(bound("q", "e", "one").key)
    assert exchange_key("e") in known
    known.forget(bound("q", "e", "two").key)
    assert list(known) == [queue("q")]


def test_a_binding_to_an_auto_delete_exchange_does_not_keep_it_nor_is_its_loss_the_end_of_it() -> None:
    # Only bindings *from* an exchange count: https://www.rabbitmq.com/docs/exchanges#auto-deletion
    known = topology(exchange("source"), exchange("e", auto_delete=True), linked("e", "source"), bound("q", "e"))
    known.forget(linked("e", "source").key)
    assert exchange_key("e") in known
    remember(known, linked("e", "source"))
    known.forget(bound("q", "e").key)
    assert list(known) == [exchange("source")]


def test_an_auto_delete_exchange_is_kept_by_an_exchange_that_is_bound_to_it() -> None:
    known = topology(
        exchange("e", auto_delete=True), exchange("after"), queue("q"), bound("q", "e"), linked("after", "e")
    )
    known.forget(queue_key("q"))
    assert list(known) == [exchange("e", auto_delete=True), exchange("after"), linked("after", "e")]


def chain(*, auto_delete: bool) -> list[Record]:
    """consumer ← queue ← inner ← middle ← outer"""
    return [
        *(exchange(name, auto_delete=auto_delete) for name in ("outer", "middle", "inner")),
        *(queue("q", auto_delete=auto_delete), consumer("q")),
        *(bound("q", "inner"), linked("inner", "middle"), linked("middle", "outer")),
    ]


def test_the_last_consumer_takes_its_queue_and_that_all_exchanges_that_fill_it() -> None:
    known = topology(*chain(auto_delete=True))
    known.forget(consumer_key(1, "tag"))
    assert is_empty(known)


def test_a_cascade_ends_where_something_else_is_bound() -> None:
    known = topology(*chain(auto_delete=True), queue("other"), bound("other", "middle"))
    known.forget(consumer_key(1, "tag"))
    assert {record.key for record in known} == {
        *(exchange_key("outer"), exchange_key("middle"), queue_key("other")),
        *(linked("middle", "outer").key, bound("other", "middle").key),
    }


def test_a_cascade_ends_at_what_is_not_auto_delete() -> None:
    known = topology(*chain(auto_delete=True), channel=1)
    remember(known, exchange("middle"))
    known.forget(consumer_key(1, "tag"))
    assert list(known) == [exchange("outer", auto_delete=True), exchange("middle"), linked("middle", "outer")]


def test_nothing_goes_along_that_is_not_auto_delete() -> None:
    records = chain(auto_delete=False)
    known = topology(*records)
    known.forget(consumer_key(1, "tag"))
    assert list(known) == [record for record in records if not isinstance(record, ConsumerRecord)]
    known.forget(queue_key("q"))
    assert [record.key[1] for record in known if isinstance(record, ExchangeRecord)] == ["outer", "middle", "inner"]


def test_exchanges_in_a_circle_end_a_cascade() -> None:
    known = topology(
        exchange("a", auto_delete=True), exchange("b", auto_delete=True), linked("a", "b"), linked("b", "a")
    )
    known.forget(linked("a", "b").key)
    assert is_empty(known)


# ------------------------------------------------------------------------------------------- closing a channel


def test_consumers_and_prefetch_go_with_their_channel() -> None:
    known = topology(QosRecord(channel=1, prefetch_count=1, global_=False), consumer("q", 1), consumer("q", 2))
    known.forget_channel(1)
    assert list(known) == [consumer("q", 2)]
    assert known.qos(1) == []


def test_what_a_channel_alone_declared_goes_with_it() -> None:
    known = topology(exchange("e"), queue("q"), bound("q", "e"), linked("e", "amq.topic"))
    known.forget_channel(1)
    assert is_empty(known)


def test_what_another_channel_declared_too_stays_until_that_closes() -> None:
    known = topology(queue("mine"), queue("ours"), channel=1)
    remember(known, queue("ours"), queue("theirs"), channel=2)
    known.forget_channel(1)
    assert list(known) == [queue("ours"), queue("theirs")]
    known.forget_channel(2)
    assert is_empty(known)


def test_a_queue_that_is_consumed_on_another_channel_stays_with_all_that_fills_it() -> None:
    fills = [*(record for record in chain(auto_delete=False) if not isinstance(record, ConsumerRecord))]
    known = topology(*fills, queue("idle"), exchange("e"), bound("idle", "e"), bound("idle", "inner"), channel=1)
    remember(known, consumer("q", channel=2))
    known.forget_channel(1)
    assert list(known) == [*fills, consumer("q", channel=2)]
    assert flat(known) == fills
    known.forget_channel(2)
    assert is_empty(known)


def test_a_queue_that_somebody_else_declared_keeps_its_bindings_as_long_as_it_is_consumed() -> None:
    known = topology(exchange("e"), bound("theirs", "e"), consumer("theirs", channel=2), channel=1)
    known.forget_channel(1)
    assert list(known) == [exchange("e"), bound("theirs", "e"), consumer("theirs", channel=2)]


def test_a_binding_of_another_channel_keeps_both_its_ends() -> None:
    known = topology(exchange("e"), queue("q"), queue("idle"), channel=1)
    remember(known, bound("q", "e"), channel=2)
    known.forget_channel(1)
    assert list(known) == [exchange("e"), queue("q"), bound("q", "e")]


def test_an_exchange_of_another_channel_stays_but_not_what_only_came_from_it() -> None:
    known = topology(exchange("e"), channel=2)
    remember(known, queue("q"), bound("q", "e"), channel=1)
    known.forget_channel(1)
    assert list(known) == [exchange("e")]


def test_an_auto_delete_queue_goes_when_its_last_consumer_s_channel_closes_whoever_declared_it() -> None:
    known = topology(queue("q", auto_delete=True), queue("kept"), channel=1)
    remember(known, consumer("q", channel=2))
    known.forget_channel(2)
    assert list(known) == [queue("kept")]


@pytest.mark.parametrize("count", range(8))
def test_a_channel_whose_consumers_take_its_queues_along_is_forgotten_in_any_order(count: int) -> None:
    known = topology(*(queue(f"q{n}", auto_delete=True) for n in range(count)), queue("kept"), channel=1)
    remember(known, queue("kept"), channel=2)
    for n in range(count):
        remember(known, bound(f"q{n}", "e"), consumer(f"q{n}", tag=f"tag {n}"))
    known.forget_channel(1)
    assert list(known) == [queue("kept")]


def test_an_unknown_channel_is_forgotten_without_a_word() -> None:
    known = topology(queue("q"))
    known.forget_channel(7)
    assert list(known) == [queue("q")]


def test_what_outlived_its_channel_goes_when_the_last_that_used_it_closes_though_that_has_nothing_any_more() -> None:
    known = topology(exchange("e"), queue("q"), bound("q", "e"), channel=1)
    remember(known, consumer("q", channel=2))
    known.forget_channel(1)
    known.forget(consumer_key(2, "tag"))
    known.forget_channel(2)
    assert is_empty(known)


def test_no_channel_leaves_anything_behind() -> None:
    known = topology()
    for channel in range(1, 6):
        remember(known, *chain(auto_delete=channel % 2 == 0), channel=channel)
        remember(known, consumer("q", channel), QosRecord(channel=channel, prefetch_count=1, global_=False))
        remember(known, queue(f"of {channel}"), bound(f"of {channel}", "middle"), channel=channel)
    for channel in (3, 1, 5, 2, 4):
        assert not is_empty(known)
        known.forget_channel(channel)
        assert channel not in known._owned
    assert is_empty(known)


# ------------------------------------------------------------------------------------------------------- rename


def test_bindings_and_consumers_follow_a_renamed_queue() -> None:
    known = topology(
        *(exchange("e"), QueueRecord(name="old", exclusive=True, server_named=True), queue("other")),
        *(bound("old", "e", "key", {"a": 1}), bound("other", "e"), consumer("old"), consumer("other", tag="its own")),
    )
    known.rename("old", "new")
    assert queue_key("old") not in known
    assert known.get(queue_key("new")) == QueueRecord(name="new", exclusive=True, server_named=True)
    assert known.get(bound("new", "e", "key", {"a": 1}).key) == bound("new", "e", "key", {"a": 1})
    assert known.get(bound("old", "e", "key", {"a": 1}).key) is None
    assert known.get(consumer_key(1, "tag")) == consumer("new")
    for untouched in (exchange("e"), queue("other"), bound("other", "e"), consumer("other", tag="its own")):
        assert known.get(untouched.key) == untouched
    assert len(known) == 7


def test_a_routing_key_that_is_the_queue_s_name_follows_it_and_no_other_does() -> None:
    known = topology(
        bound("old", "e", "old"), bound("old", "e", "old.x"), bound("other", "e", "old"), linked("old", "e")
    )
    known.rename("old", "new")
    assert {record.key for record in known} == {
        *(bound("new", "e", "new").key, bound("new", "e", "old.x").key),
        *(bound("other", "e", "old").key, linked("old", "e").key),
    }


def test_an_exchange_of_the_same_name_keeps_it() -> None:
    known = topology(exchange("old"), queue("old"), bound("old", "old"))
    known.rename("old", "new")
    assert {record.key for record in known} == {exchange_key("old"), queue_key("new"), bound("new", "old").key}


def test_a_renamed_queue_still_belongs_to_the_channels_that_declared_it() -> None:
    known = topology(queue("old"), channel=1)
    remember(known, queue("old"), queue("other"), bound("other", "e"), channel=2)
    known.rename("old", "new")
    known.forget_channel(2)
    assert list(known) == [queue("new")]
    known.forget_channel(1)
    assert is_empty(known)


def test_a_queue_that_outlived_its_channel_can_be_renamed() -> None:
    known = topology(queue("old"), exchange("e"), bound("old", "e"), channel=1)
    remember(known, consumer("old", channel=2))
    known.forget_channel(1)
    known.rename("old", "new")
    assert flat(known) == [exchange("e"), queue("new"), bound("new", "e")]
    assert known.consumers(2) == [consumer("new", channel=2)]
    known.forget_channel(2)
    assert is_empty(known)


def test_bindings_that_become_the_same_by_a_rename_are_one_of_both_channels() -> None:
    known = topology(bound("old", "e", "old"), channel=1)
    remember(known, bound("old", "e", "new"), channel=2)
    known.rename("old", "new")
    assert list(known) == [bound("new", "e", "new")]
    known.forget_channel(1)
    assert list(known) == [bound("new", "e", "new")]
    known.forget_channel(2)
    assert is_empty(known)


@pytest.mark.parametrize(("old", "new"), [("nobody", "else"), ("q", "q")])
def test_renaming_an_unknown_queue_or_one_to_its_own_name_changes_nothing(old: str, new: str) -> None:
    records: list[Record] = [queue("q"), bound("q", "e", "q"), consumer("q")]
    known = topology(*records)
    known.rename(old, new)
    assert list(known) == records


# --------------------------------------------------------------------------------------------------------- plan


def test_exchanges_come_before_queues_and_these_before_bindings_whatever_was_remembered_first() -> None:
    known = topology(
        *(bound("q", "inner"), consumer("q"), linked("inner", "outer"), queue("q"), exchange("inner")),
        *(QosRecord(channel=1, prefetch_count=1, global_=False), queue("p"), exchange("outer")),
    )
    assert flat(known) == [
        *(exchange("inner"), exchange("outer")),
        *(queue("q"), queue("p")),
        *(bound("q", "inner"), linked("inner", "outer")),
    ]


def test_everything_that_a_record_needs_comes_earlier() -> None:
    known = topology(*reversed(chain(auto_delete=False)))
    seen: set[Key] = set()
    for record in flat(known):
        assert seen.issuperset(record.needs), f"{record} comes too early"
        seen.add(record.key)
    for consumer_record in known.consumers():
        assert seen.issuperset(consumer_record.needs)


def test_a_plan_and_an_iterator_are_of_the_moment() -> None:
    known = topology(exchange("e"), queue("q"), bound("q", "e"))
    plan = flat(known)
    for record in known:
        known.forget(record.key)
    assert len(plan) == 3
    assert flat(known) == []


# ------------------------------------------------------------------------------------------------------ methods

ARGUMENTS: dict[str, Any] = {"x": "y"}


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (
            ExchangeRecord(name="e", type="topic", durable=True, internal=True, arguments=ARGUMENTS).method(),
            Exchange.Declare(exchange="e", exchange_type="topic", durable=True, internal=True, arguments=ARGUMENTS),
        ),
        (
            ExchangeRecord(name="e", type="x-mine", auto_delete=True).method(),
            Exchange.Declare(exchange="e", exchange_type="x-mine", auto_delete=True),
        ),
        (
            ExchangeRecord(name="e", type="fanout").method(passive=True),
            Exchange.Declare(exchange="e", exchange_type="fanout", passive=True),
        ),
        (
            QueueRecord(name="q", durable=True, exclusive=True, arguments=ARGUMENTS).method(),
            Queue.Declare(queue="q", durable=True, exclusive=True, arguments=ARGUMENTS),
        ),
        (QueueRecord(name="q", auto_delete=True).method(), Queue.Declare(queue="q", auto_delete=True)),
        (QueueRecord(name="q").method(passive=True), Queue.Declare(queue="q", passive=True)),
        (
            QueueRecord(name="amq.gen-1", exclusive=True, server_named=True).method(),
            Queue.Declare(queue="", exclusive=True),
        ),
        (
            QueueRecord(name="amq.gen-1", server_named=True).method(passive=True),
            Queue.Declare(queue="amq.gen-1", passive=True),
        ),
        (
            bound("q", "e", "key", ARGUMENTS).method(),
            Queue.Bind(queue="q", exchange="e", routing_key="key", arguments=ARGUMENTS),
        ),
        (
            bound("q", "e", "key", ARGUMENTS).undo(),
            Queue.Unbind(queue="q", exchange="e", routing_key="key", arguments=ARGUMENTS),
        ),
        (bound("q", "e", "").method(), Queue.Bind(queue="q", exchange="e")),
        (
            linked("d", "s", "key", ARGUMENTS).method(),
            Exchange.Bind(destination="d", source="s", routing_key="key", arguments=ARGUMENTS),
        ),
        (
            linked("d", "s", "key", ARGUMENTS).undo(),
            Exchange.Unbind(destination="d", source="s", routing_key="key", arguments=ARGUMENTS),
        ),
        (linked("d", "s", "").undo(), Exchange.Unbind(destination="d", source="s")),
        (
            QosRecord(channel=3, prefetch_count=10, global_=False).method(),
            Basic.Qos(prefetch_count=10, global_=False),
        ),
        (QosRecord(channel=3, prefetch_count=0, global_=True).method(), Basic.Qos(prefetch_count=0, global_=True)),
    ],
    ids=lambda value: value.name if isinstance(value, Frame) else None,
)
def test_a_record_is_made_true_or_untrue_by_the_method_that_pamqp_would_send(method: Frame, expected: Frame) -> None:
    assert type(method) is type(expected)
    assert {name: value or None for name, value in method} == {name: value or None for name, value in expected}
    assert encode_method(1, method) == encode_method(1, expected)


def test_a_remembered_record_sends_what_was_declared() -> None:
    arguments: Arguments = {"x-match": "all", "deep": {"b": [1, True], "a": None}}
    for record in (bound("q", "e", "key", arguments), linked("d", "s", "key", arguments)):
        (kept,) = flat(topology(record))
        assert encode_method(1, kept.method()) == encode_method(1, record.method())


@pytest.mark.parametrize(
    ("record", "needs"),
    [
        (exchange("e"), ()),
        (queue("q"), ()),
        (bound("q", "e"), (queue_key("q"), exchange_key("e"))),
        (linked("d", "s"), (exchange_key("d"), exchange_key("s"))),
        (QosRecord(channel=1, prefetch_count=1, global_=False), ()),
        (consumer("q"), (queue_key("q"),)),
    ],
    ids=str,
)
def test_what_a_record_needs_to_be_there_first(record: Record, needs: tuple[object, ...]) -> None:
    assert record.needs == needs


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (exchange("e"), "exchange 'e'"),
        (queue("q\n"), r"queue 'q\n'"),
        (bound("q", "e"), "binding of queue 'q' to exchange 'e' with 'key'"),
        (linked("d", "s"), "binding of exchange 'd' to exchange 's' with 'key'"),
        (QosRecord(channel=1, prefetch_count=5, global_=False), "prefetch 5"),
        (consumer("q"), "consumer 'tag' of queue 'q'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_record_can_be_named_in_a_log_or_an_error(record: Record, text: str) -> None:
    assert str(record) == text
