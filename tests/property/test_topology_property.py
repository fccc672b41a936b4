"""Topology against a model that keeps (record, channels) and applies each rule until nothing changes any more."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from leveret.records import (
    ConsumerRecord,
    Entity,
    ExchangeBinding,
    ExchangeRecord,
    Key,
    QosRecord,
    QueueBinding,
    QueueRecord,
    Record,
    consumer_key,
    exchange_key,
    queue_key,
)
from leveret.topology import Topology

channels = st.integers(1, 3)
exchange_names = st.sampled_from(["e", "f", "g"])
queue_names = st.sampled_from(["q", "r", "s"])
tags = st.sampled_from(["a", "b"])
routing_keys = st.sampled_from(["key", "q", "r"])  # some are names of queues
arguments = st.sampled_from([None, {"x-match": "any", "a": 1}, {"a": 1, "x-match": "any"}, {"a": True}])

exchanges = st.builds(ExchangeRecord, name=exchange_names, type=st.just("topic"), auto_delete=st.booleans())
queues = st.builds(QueueRecord, name=queue_names, auto_delete=st.booleans())
queue_bindings = st.builds(
    QueueBinding, queue=queue_names, exchange=exchange_names, routing_key=routing_keys, arguments=arguments
)
exchange_bindings = st.builds(
    ExchangeBinding, destination=exchange_names, source=exchange_names, routing_key=routing_keys, arguments=arguments
)
qos = st.builds(QosRecord, channel=channels, prefetch_count=st.integers(0, 3), global_=st.booleans())
consumers = st.builds(ConsumerRecord, channel=channels, consumer_tag=tags, queue=queue_names)
keys = st.one_of(
    exchange_names.map(exchange_key),
    queue_names.map(queue_key),
    st.tuples(channels, tags).map(lambda pair: consumer_key(*pair)),
    st.one_of(queue_bindings, exchange_bindings).map(lambda record: record.key),
)


class Model:
    """Says when a record goes, but not how to find it quickly."""

    def __init__(self) -> None:
        self.records: dict[Key, Record] = {}
        self.owners: dict[Key, set[int]] = {}

    def remember(self, record: Record, owners: set[int]) -> None:
        self.records[record.key] = record
        self.owners[record.key] = self.owners.get(record.key, set()) | owners

    def forget(self, key: Key) -> None:
        before = dict(self.records)
        gone = {key}
        size = 0
        while size != len(gone):
            size = len(gone)
            gone |= {each for each, record in before.items() if self.goes_with(record, gone, before)}
        for each in gone:
            self.drop(each)

    @staticmethod
    def goes_with(record: Record, gone: set[Key], before: dict[Key, Record]) -> bool:
        if gone & set(record.needs):
            return True
        if isinstance(record, ExchangeRecord) and record.auto_delete:
            uses = {
                key
                for key, other in before.items()
                if isinstance(other, QueueBinding | ExchangeBinding) and other.source == record.name
            }
        elif isinstance(record, QueueRecord) and record.auto_delete:
            uses = {
                key for key, other in before.items() if isinstance(other, ConsumerRecord) and other.queue == record.name
            }
        else:
            return False
        return bool(uses) and uses <= gone

    def forget_channel(self, channel: int) -> None:
        for record in list(self.records.values()):
            if isinstance(record, ConsumerRecord | QosRecord) and record.channel == channel:
                self.forget(record.key)
        for owners in self.owners.values():
            owners.discard(channel)
        used = {key for key, owners in self.owners.items() if owners}
        size = -1
        while size != len(used):
            size = len(used)
            for key, record in self.records.items():
                if key in used:
                    used |= set(record.needs)
                elif isinstance(record, QueueBinding | ExchangeBinding) and record.needs[0] in used:
                    used.add(key)
        for key in set(self.records) - used:
            self.drop(key)

    def rename(self, old: str, new: str) -> None:
        for key, record in list(self.records.items()):
            owners = self.owners[key]
            if isinstance(record, QueueRecord) and record.name == old:
                renamed: Record = record._replace(name=new)
            elif isinstance(record, ConsumerRecord) and record.queue == old:
                renamed = record._replace(queue=new)
            elif isinstance(record, QueueBinding) and record.queue == old:
                routing_key = new if record.routing_key == old else record.routing_key
                renamed = record._replace(queue=new, routing_key=routing_key)
            else:
                continue
            self.drop(key)
            self.remember(renamed, owners)

    def drop(self, key: Key) -> None:
        self.records.pop(key, None)
        self.owners.pop(key, None)


class TopologyMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.topology = Topology()
        self.model = Model()

    @rule(record=st.one_of(exchanges, queues, queue_bindings, exchange_bindings), channel=channels)
    def declare_or_bind(self, record: Entity, channel: int) -> None:
        self.topology.remember(record, channel)
        self.model.remember(record, {channel})

    @rule(record=st.one_of(consumers, qos))
    def consume_or_set_the_prefetch(self, record: ConsumerRecord | QosRecord) -> None:
        self.topology.remember(record, record.channel)
        self.model.remember(record, {record.channel})

    @rule(key=keys)
    def delete_unbind_or_cancel(self, key: Key) -> None:
        self.topology.forget(key)
        self.model.forget(key)
        assert key not in self.topology
        assert not [str(record) for record in self.topology if key in record.needs]

    @rule(key=keys)
    def forgetting_again_changes_nothing(self, key: Key) -> None:
        self.topology.forget(key)
        self.model.forget(key)
        once = list(self.topology)
        self.topology.forget(key)
        assert list(self.topology) == once

    @rule(channel=channels)
    def close_a_channel(self, channel: int) -> None:
        self.topology.forget_channel(channel)
        self.model.forget_channel(channel)
        assert not self.topology.qos(channel)
        assert not self.topology.consumers(channel)

    @rule(old=queue_names, new=queue_names)
    def the_broker_renames_a_queue(self, old: str, new: str) -> None:
        self.topology.rename(old, new)
        self.model.rename(old, new)

    @invariant()
    def it_is_as_the_model_says(self) -> None:
        assert dict(self.topology._records) == self.model.records
        assert self.topology._owners == self.model.owners
        assert len(self.topology) == len(self.model.records)

    @invariant()
    def every_record_is_under_its_key(self) -> None:
        assert all(record.key == key for key, record in self.topology._records.items())

    @invariant()
    def who_owns_what_is_the_same_from_both_sides(self) -> None:
        owned: dict[int, set[Key]] = {}
        for key, owners in self.topology._owners.items():
            for owner in owners:
                owned.setdefault(owner, set()).add(key)
        assert {channel: set(keys) for channel, keys in self.topology._owned.items()} == owned

    @invariant()
    def a_plan_has_everything_once_and_what_is_needed_earlier(self) -> None:
        plan = [record for stage in self.topology.plan() for record in stage]
        place = {record.key: index for index, record in enumerate(plan)}
        assert len(place) == len(plan)
        assert place.keys() == {
            record.key for record in self.topology if not isinstance(record, ConsumerRecord | QosRecord)
        }
        for index, record in enumerate(plan):
            assert all(place.get(need, -1) < index for need in record.needs)

    def teardown(self) -> None:
        for channel in (2, 1, 3):
            self.topology.forget_channel(channel)
        assert (self.topology._records, self.topology._owners, self.topology._owned) == ({}, {}, {})


TestTopologyAgainstTheModel = TopologyMachine.TestCase
TestTopologyAgainstTheModel.settings = settings(max_examples=150, stateful_step_count=40)
