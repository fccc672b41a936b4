"""Confirms against a model that keeps a plain list and searches it from the front."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from leveret.exceptions import ProtocolError
from leveret.wire.confirms import Confirms


@dataclass(eq=False)
class Published:
    exchange: str = "ex"
    routing_key: str = "key"
    properties: bytes = b"\x00\x00"
    body: bytes = b"body"
    mandatory: bool = True
    returned: object | None = None
    number: int = 0


exchanges = st.sampled_from(["", "ex"])
keys = st.sampled_from(["a", "b"])
properties = st.sampled_from([b"\x00\x00", b"\x10\x00\x02"])
bodies = st.sampled_from([b"", b"x", b"y"])


class ConfirmsMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.confirms: Confirms[Published] = Confirms()
        self.outstanding: list[Published] = []
        self.last = 0

    @rule(
        exchange=exchanges,
        key=keys,
        properties=properties,
        body=bodies,
        mandatory=st.booleans(),
        times=st.integers(1, 4),
    )
    def publish(self, exchange, key, properties, body, mandatory, times):
        for _ in range(times):
            publish = Published(exchange, key, properties, body, mandatory)
            self.last += 1
            publish.number = self.last
            assert self.confirms.add(publish) == self.last
            self.outstanding.append(publish)

    @precondition(lambda self: self.outstanding)
    @rule(place=st.integers(0))
    def settle_one(self, place):
        publish = self.outstanding.pop(place % len(self.outstanding))
        assert self.confirms.settle(publish.number, multiple=False) == [publish]

    @rule(place=st.integers(0))
    def settle_up_to(self, place):
        number = place % (self.last + 1)
        expected = [publish for publish in self.outstanding if number == 0 or publish.number <= number]
        self.outstanding = [publish for publish in self.outstanding if publish not in expected]
        assert self.confirms.settle(number, multiple=True) == expected

    @rule(number=st.integers(0, 60))
    def settle_what_is_not_outstanding(self, number):
        if any(publish.number == number for publish in self.outstanding):
            return
        with pytest.raises(ProtocolError) as caught:
            self.confirms.settle(number, multiple=False)
        assert caught.value.reply_code == 503

    @rule(beyond=st.integers(1, 1000))
    def settle_up_to_what_was_never_published(self, beyond):
        with pytest.raises(ProtocolError) as caught:
            self.confirms.settle(self.last + beyond, multiple=True)
        assert caught.value.reply_code == 503

    @rule(exchange=exchanges, key=keys, properties=properties, body=bodies)
    def come_back(self, exchange, key, properties, body):
        fitting = [
            publish
            for publish in self.outstanding
            if publish.mandatory
            and publish.returned is None
            and (publish.exchange, publish.routing_key, publish.body) == (exchange, key, body)
        ]
        alike = [publish for publish in fitting if publish.properties == properties]
        expected = alike[0] if alike else fitting[0] if fitting else None
        found = self.confirms.match_return(exchange, key, properties, body)
        assert found is expected
        if found is not None:
            found.returned = object()

    @rule()
    def abandon(self):
        assert self.confirms.abandon() == self.outstanding
        self.outstanding = []

    @invariant()
    def outstanding_ones_are_there_oldest_first(self):
        assert list(self.confirms) == self.outstanding
        assert len(self.confirms) == len(self.outstanding)
        assert bool(self.confirms) == bool(self.outstanding)
        assert self.confirms.last_number == self.last


TestConfirmsAgainstTheModel = ConfirmsMachine.TestCase
TestConfirmsAgainstTheModel.settings = settings(max_examples=150, stateful_step_count=40)


# --------------------------------------------------------------------------------------------------------- speed


def filled(count: int, **facts) -> Confirms[Published]:
    confirms: Confirms[Published] = Confirms()
    publish = Published(**facts)
    for _ in range(count):
        confirms.add(publish)
    return confirms


@pytest.mark.parametrize("how", ["one multiple", "zero", "in order", "in reverse", "every other one, then the rest"])
def test_a_million_outstanding_are_settled_in_two_seconds(how):
    count = 1_000_000
    confirms = filled(count)
    began = time.process_time()
    settled = 0
    if how == "one multiple":
        settled = len(confirms.settle(count, multiple=True))
    elif how == "zero":
        settled = len(confirms.settle(0, multiple=True))
    elif how == "every other one, then the rest":
        for number in range(2, count + 1, 2):
            settled += len(confirms.settle(number, multiple=False))
        settled += len(confirms.settle(count, multiple=True))
    else:
        numbers = range(1, count + 1)
        for number in numbers if how == "in order" else reversed(numbers):
            settled += len(confirms.settle(number, multiple=False))
    assert time.process_time() - began < 2
    assert settled == count
    assert len(confirms) == 0


@pytest.mark.parametrize("confirmed", ["at once", "at the end"])
@pytest.mark.parametrize("unreturned", ["none", "the first", "every other one"])
@pytest.mark.parametrize("differ_in", ["nothing", "the key", "the body", "the properties"])
def test_10_000_returns_in_one_window_are_matched_in_a_second(differ_in, unreturned, confirmed):
    publishes = []
    confirms: Confirms[Published] = Confirms()
    for index in range(10_000):
        routed = (unreturned == "the first" and index == 0) or (unreturned == "every other one" and index % 2 == 0)
        facts = {}
        if differ_in == "the key":
            facts["routing_key"] = f"key{index}"
        elif differ_in == "the body" or (differ_in == "nothing" and routed):
            facts["body"] = b"%d" % (index if differ_in == "the body" else 0)
        elif differ_in == "the properties":
            facts["properties"] = b"\x10\x00%d" % index
        publish = Published(**facts)
        publish.number = confirms.add(publish)
        if not routed:
            publishes.append(publish)
    began = time.process_time()
    for publish in publishes:
        found = confirms.match_return(publish.exchange, publish.routing_key, publish.properties, publish.body)
        assert found is publish
        publish.returned = publish
        if confirmed == "at once":
            confirms.settle(publish.number, multiple=False)
        assert time.process_time() - began < 1, f"only {publish.number} of 10,000"
    assert time.process_time() - began < 1


def test_what_was_settled_is_forgotten_although_the_window_never_empties():
    confirms: Confirms[Published] = Confirms()
    confirms.add(Published(routing_key="slow"))
    tracemalloc.start()
    try:
        for index in range(50_000):
            number = confirms.add(Published(routing_key=f"key{index}"))
            if index % 10 == 0:
                found = confirms.match_return("ex", f"key{index}", b"\x00\x00", b"body")
                assert found is not None
                found.returned = found
            confirms.settle(number, multiple=False)

        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(confirms) == 1
    assert used < 1 << 20


def test_a_bodys_copy_is_not_needed_to_match_it():
    confirms: Confirms[Published] = Confirms()
    publish = Published(body=b"x" * 100_000)
    confirms.add(publish)
    assert confirms.match_return("ex", "key", b"\x00\x00", bytes(bytearray(publish.body))) is publish


def test_a_return_without_a_publish_matches_nothing():
    confirms: Confirms[Published] = Confirms()
    assert confirms.match_return("ex", "key", b"\x00\x00", b"body") is None
    confirms.add(Published(mandatory=False))
    assert confirms.match_return("ex", "key", b"\x00\x00", b"body") is None
