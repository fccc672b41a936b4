"""What is written for deliveries that are settled, and what is counted."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from leveret.exceptions import ChannelClosed, DeliveryLost
from leveret.wire.codec import encode_ack, encode_nack, encode_reject
from leveret.wire.output import Output
from leveret.wire.settler import Settler
from leveret.wire.tally import Tally

GONE = ChannelClosed("gone")


class Bench:
    """A settler of channel 7, and what it has written."""

    def __init__(self, *, knows_nack=True):
        self.parts: list[bytes] = []
        self.output = Output(1)
        self.output.may_send_at_once = False
        self.output.open(SimpleNamespace(write=self.parts.append))
        self.tally = Tally()
        transport = SimpleNamespace(output=self.output, tally=self.tally, server_supports=lambda _: knows_nack)
        self.settler = Settler(SimpleNamespace(number=7, transport=transport))

    @property
    def written(self):
        self.output.flush_all()
        return b"".join(self.parts)

    @property
    def counted(self):
        return self.tally.acked, self.tally.requeued, self.tally.rejected


async def test_acks_of_one_turn_are_one_multiple_and_counted_each():
    bench = Bench()
    for tag in (1, 2, 3):
        await bench.settler.ack(tag)
    assert bench.parts == []
    assert bench.written == encode_ack(7, 3, True)
    assert bench.counted == (3, 0, 0)


async def test_what_was_saved_up_is_written_before_what_refuses():
    bench = Bench()
    await bench.settler.ack(1)
    await bench.settler.nack(3, requeue=False)
    await bench.settler.reject(2, requeue=True)
    assert bench.written == encode_ack(7, 1, True) + encode_nack(7, 3, False, False) + encode_reject(7, 2, True)
    assert bench.counted == (1, 1, 1)


async def test_those_that_are_settled_together_are_one_frame_and_counted_each():
    bench = Bench()
    await bench.settler.settle_all([1, 2, 3], requeue=True)
    await bench.settler.settle_all([5], requeue=None)
    assert bench.written == encode_nack(7, 3, True, True) + encode_ack(7, 5, False)
    assert bench.counted == (1, 3, 0)


@pytest.mark.parametrize(
    ("knows_nack", "data"), [(True, encode_nack(7, 1, False, True)), (False, encode_reject(7, 1, True))]
)
async def test_a_delivery_is_handed_back_by_the_method_that_the_broker_knows(knows_nack, data):
    bench = Bench(knows_nack=knows_nack)
    bench.settler.requeue(1)
    assert bench.written == data
    assert bench.counted == (0, 1, 0)


async def test_acks_are_kept_for_others_until_the_channel_is_about_to_be_closed():
    bench = Bench()
    await bench.settler.ack_later(2, 10)
    await bench.settler.ack_later(1, 10)
    assert bench.written == b""
    bench.settler.begin_close()
    await bench.settler.ack_later(4, 10)
    assert bench.written == encode_ack(7, 2, True) + encode_ack(7, 4, False)


async def test_every_way_to_settle_raises_DeliveryLost_once_the_channel_is_gone():  # noqa: N802
    bench = Bench()
    bench.settler.end(GONE)
    assert not bench.settler.is_open
    for settle in (
        lambda: bench.settler.ack(1),
        lambda: bench.settler.ack_later(1, 10),
        lambda: bench.settler.nack(1),
        lambda: bench.settler.reject(1),
        lambda: bench.settler.settle_all([1], requeue=None),
    ):
        with pytest.raises(DeliveryLost) as caught:
            settle()
        assert caught.value.__cause__ is GONE
    assert bench.written == b""
    assert bench.counted == (0, 0, 0)


async def test_a_channel_that_ends_takes_what_was_to_be_written_with_it():
    bench = Bench()
    await bench.settler.ack_later(3, 10)  # held back: 1 and 2 are not settled
    await bench.settler.ack(1)  # due at the end of this turn
    bench.settler.end(GONE)
    assert bench.written == b"", "RabbitMQ closes the connection (504) over an ack on a channel that is closed"
    await asyncio.sleep(0)
    assert bench.written == b""
