"""When reading is throttled, how fast it goes on meanwhile, and when it is free again."""

from __future__ import annotations

import asyncio
import logging

import pytest

from leveret.wire import intake
from leveret.wire.intake import HIGH, LOW, Intake

KIB = 1024


class Consumer:
    """Holds so many messages of so many bytes."""

    def __init__(self, backlog: int = 0, each: int = KIB) -> None:
        self.backlog = backlog
        self.each = each
        self.looks = 0

    def backlog_size(self) -> int:
        self.looks += 1
        return self.backlog * self.each


class Channel:
    def __init__(self, *unlimited: Consumer, others: tuple[Consumer, ...] = ()) -> None:
        self.unlimited = list(unlimited)
        self.others = others

    @property
    def has_idle_consumer(self) -> bool:
        return any(not consumer.backlog for consumer in (*self.unlimited, *self.others))


class Socket:
    """Delivers a byte whenever it is read again, to whoever is to have it."""

    def __init__(self) -> None:
        self.is_reading = True
        self.resumed = 0

    def pause_reading(self) -> None:
        assert self.is_reading
        self.is_reading = False

    def resume_reading(self) -> None:
        assert not self.is_reading
        self.is_reading = True
        self.resumed += 1


class Rig:
    def __init__(self, *channels: Channel) -> None:
        self.socket = Socket()
        self.is_awaited = False
        self.intake = Intake(dict(enumerate(channels)), lambda: self.is_awaited)
        self.intake.start(self.socket)

    def read(self, count: int) -> None:
        self.intake.budget -= count
        if self.intake.budget < 0:
            self.intake.look()


@pytest.fixture
def consumer() -> Consumer:
    return Consumer()


@pytest.fixture
async def rig(consumer: Consumer):
    rig = Rig(Channel(consumer))
    yield rig
    rig.intake.stop()


def full(rig: Rig, consumer: Consumer, size: int = HIGH) -> None:
    consumer.backlog = size // consumer.each
    rig.read(HIGH)


async def until(condition) -> None:
    async with asyncio.timeout(3):
        while not condition():  # noqa: ASYNC110 - a timer brings it about
            await asyncio.sleep(0.001)


async def test_consumers_that_keep_up_are_hardly_ever_asked(rig, consumer):
    for _ in range(1000):
        rig.read(128 * KIB)
    assert rig.socket.is_reading
    assert not rig.intake.is_throttled
    assert rig.intake.complaint is None
    assert consumer.looks < 70  # once in 2 MiB


async def test_the_more_is_held_the_sooner_they_are_asked_again(rig, consumer):
    full(rig, consumer, HIGH - 32 * KIB)
    looks = consumer.looks
    rig.read(KIB)
    assert consumer.looks == looks
    rig.read(1)
    assert consumer.looks == looks + 1
    assert rig.socket.is_reading


async def test_too_much_pauses_and_half_of_it_resumes(rig, consumer, caplog):
    full(rig, consumer)
    assert not rig.socket.is_reading
    assert not rig.intake.is_open
    assert "65536 messages (64 MiB)" in rig.intake.complaint
    consumer.backlog = LOW // KIB
    await asyncio.sleep(3 * intake._TICK)
    assert not rig.socket.is_reading
    consumer.backlog -= 1
    before = asyncio.get_running_loop().time()
    await until(lambda: rig.socket.is_reading)
    assert rig.intake.is_open
    assert not rig.intake.is_throttled
    assert rig.intake.changed >= before
    assert rig.intake.complaint is None
    full(rig, consumer)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]  # the first time only


async def test_those_that_are_left_may_be_the_big_ones(rig, consumer):
    full(rig, consumer)
    consumer.backlog //= 4
    consumer.each *= 4
    await asyncio.sleep(3 * intake._TICK)
    assert rig.intake.is_throttled
    consumer.backlog = 10
    await until(lambda: rig.socket.is_reading)


async def test_a_socket_that_nobody_waits_for_is_read_rarely(rig, consumer, monkeypatch):
    monkeypatch.setattr(intake, "_LONGEST", 10 * intake._TICK)
    begun = asyncio.get_running_loop().time()
    full(rig, consumer)
    consumer.backlog *= 10  # it does not take longer for that
    await until(lambda: rig.socket.is_reading)
    assert rig.intake.is_throttled
    assert asyncio.get_running_loop().time() - begun >= 9 * intake._TICK


async def test_who_waits_has_the_socket_read_a_little_at_a_time(rig, consumer):
    full(rig, consumer)
    rig.is_awaited = True
    for number in range(1, 4):
        await until(lambda: rig.socket.is_reading)
        assert rig.intake.is_throttled
        rig.read(intake._SIP)
        assert rig.socket.is_reading  # as long as there was not much
        rig.read(1)
        assert not rig.socket.is_reading
        assert rig.socket.resumed == number
    rig.is_awaited = False
    await asyncio.sleep(5 * intake._TICK)
    assert rig.socket.resumed == 3


async def test_messages_that_come_sip_by_sip_are_measured_now_and_then(rig, consumer):
    full(rig, consumer)
    consumer.each *= 2
    assert "(64 MiB)" in rig.intake.complaint
    rig.is_awaited = True
    for _ in range(intake._SIPS):
        rig.intake._open()
        rig.read(intake._SIP + 1)
    assert "(128 MiB)" in rig.intake.complaint


async def test_a_socket_that_is_open_and_silent_stays_open(rig, consumer):
    full(rig, consumer)
    rig.is_awaited = True
    await until(lambda: rig.socket.is_reading)
    opened = rig.intake.changed
    await asyncio.sleep(5 * intake._TICK)
    assert rig.socket.resumed == 1
    assert rig.intake.changed == opened  # so that silence counts from there


async def test_the_more_is_held_the_longer_it_takes(rig, consumer):
    full(rig, consumer)
    rig.is_awaited = True
    consumer.backlog *= 3
    await asyncio.sleep(10 * intake._TICK)
    assert rig.socket.resumed == 0
    await until(lambda: rig.socket.is_reading)  # but it comes


@pytest.mark.parametrize("limited", [True, False])
async def test_an_idle_consumer_has_it_read_now_and_then(consumer, limited):
    idle = Consumer()
    rig = Rig(Channel(consumer), Channel(others=(idle,)) if limited else Channel(idle))
    full(rig, consumer)
    await until(lambda: rig.socket.is_reading)
    assert rig.intake.is_throttled
    rig.read(intake._SIP + 1)
    idle.backlog = 1
    await asyncio.sleep(2 * intake._WHILE_IDLE)
    assert rig.socket.resumed == 1
    rig.intake.stop()


async def test_what_limited_consumers_hold_does_not_count():
    rig = Rig(Channel(others=(Consumer(10 * HIGH),)))
    rig.read(HIGH)
    assert rig.socket.is_reading


async def test_all_channels_count_together():
    rig = Rig(*(Channel(Consumer(HIGH // KIB // 4)) for _ in range(4)))
    rig.read(HIGH)
    assert not rig.socket.is_reading
    rig.intake.stop()


@pytest.mark.parametrize("is_throttled", [True, False])
async def test_the_end_lets_everything_through(rig, consumer, is_throttled):
    if is_throttled:
        full(rig, consumer)
    rig.intake.stop()
    assert rig.socket.is_reading
    full(rig, consumer)
    assert rig.socket.is_reading
    assert not rig.intake.is_throttled
    await asyncio.sleep(2 * intake._TICK)
    assert rig.socket.is_reading
