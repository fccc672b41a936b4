"""Content: put together from any frames, interleaved with anything, cut anywhere."""

from __future__ import annotations

import asyncio
import random
import time

import pytest
from pamqp import body, commands, frame, header

from leveret import IncomingMessage
from leveret.wire.codec import BODY, METHOD
from leveret.wire.decoder import FrameDecoder
from tests.protocol.kit import linked, raw_frame, until, within


def pieces(channel: int, tag: str, delivery_tag: int, *bodies: bytes) -> list[bytes]:
    """The frames of a delivery whose body comes in these parts."""
    size = sum(map(len, bodies))
    return [
        frame.marshal(commands.Basic.Deliver(tag, delivery_tag, False, "x", "key"), channel),
        frame.marshal(header.ContentHeader(0, size, commands.Basic.Properties(message_id="id")), channel),
        *(raw_frame(BODY, channel, part) for part in bodies),
    ]


@pytest.mark.parametrize(
    "bodies",
    [
        [],
        [b""],
        [b"x"],
        [b"one", b"two", b"three"],
        [b"", b"one", b"", b"", b"two"],
        [b"a"] * 1000,
        [bytes(131_064), bytes(131_064), b"end"],
        [bytes(100_000), b"", bytes(20_000)],
    ],
    ids=["none", "empty frame", "one", "three", "empty frames", "1000", "full frames", "mixed"],
)
async def test_a_body_in_any_number_of_frames(bodies: list[bytes]) -> None:
    got: list[IncomingMessage] = []
    async with linked() as link:
        channel = await link.channel()
        await link.consume(channel, got.append)
        if bodies == [b""]:  # an empty frame, though none was announced, is one too many
            bodies = []
        for n in (1, 2, 3):
            for piece in pieces(1, "tag", n, *bodies):
                link.session.send_raw(piece)
        await until(lambda: len(got) == 3)
        for n, message in enumerate(got, 1):
            assert (message.body, message.delivery_tag, message.message_id) == (b"".join(bodies), n, "id")
            assert (message.exchange, message.routing_key, message.consumer_tag) == ("x", "key", "tag")


async def test_content_of_two_channels_interleaved_frame_by_frame_with_heartbeats_between() -> None:
    got: list[tuple[str | None, bytes]] = []

    def note(message: IncomingMessage) -> None:
        got.append((message.consumer_tag, message.body))

    async with linked() as link:
        one, two = await link.channel(), await link.channel()
        await link.consume(one, note, "one")
        await link.consume(two, note, "two")
        first = pieces(1, "one", 1, b"a", b"", b"b", b"c")
        second = pieces(2, "two", 1, b"x", b"", b"y", b"z")
        for a, b in zip(first, second, strict=True):
            link.session.send_raw(a)
            link.session.send_heartbeat()
            link.session.send_raw(b)
            link.session.send(0, commands.Connection.Blocked("x"), commands.Connection.Unblocked())
        await until(lambda: len(got) == 2)
        assert sorted(got) == [("one", b"abc"), ("two", b"xyz")]


async def test_a_reply_on_another_channel_within_content() -> None:
    got: list[IncomingMessage] = []
    async with linked() as link:
        one, two = await link.channel(), await link.channel()
        await link.consume(one, got.append)
        *beginning, last = pieces(1, "tag", 1, b"a", b"b")
        for piece in beginning:
            link.session.send_raw(piece)
        await link.answer(two.set_qos(1), commands.Basic.Qos, commands.Basic.QosOk(), channel=2)
        assert not got
        link.session.send_raw(last)
        await until(lambda: got)
        assert got[0].body == b"ab"


@pytest.mark.parametrize("seed", range(5))
async def test_any_chunks_of_a_stream_of_deliveries_give_the_same_messages(seed: int) -> None:
    rng = random.Random(seed)
    got: list[IncomingMessage] = []
    bodies = [rng.randbytes(rng.choice([0, 1, 10, 10, 10, 300, 20_000])) for _ in range(60)]
    stream = b"".join(b"".join(pieces(1, "tag", n, *([data] if data else []))) for n, data in enumerate(bodies, 1))
    async with linked() as link:
        channel = await link.channel()
        await link.consume(channel, got.append)
        while stream:
            size = rng.choice([1, 2, 7, 50, 1000, 10_000])
            link.session.send_raw(stream[:size])
            stream = stream[size:]
            await link.session.drain()
            await asyncio.sleep(0)
        await until(lambda: len(got) == len(bodies))
        assert [message.body for message in got] == bodies
        assert [message.delivery_tag for message in got] == list(range(1, 61))


async def test_a_delivery_byte_by_byte_through_the_socket() -> None:
    got: list[IncomingMessage] = []
    async with linked() as link:
        channel = await link.channel()
        await link.consume(channel, got.append)
        for n in (1, 2, 3):
            for byte in b"".join(pieces(1, "tag", n, b"hello", b" world")):
                link.session.send_raw(bytes([byte]))
                await asyncio.sleep(0)
        await until(lambda: len(got) == 3)
        assert [message.body for message in got] == [b"hello world"] * 3


def test_5_MB_byte_by_byte_are_cut_in_bounded_time() -> None:  # noqa: N802
    frames: list[tuple[int, int, bytes]] = []
    decoder = FrameDecoder(lambda *cut: frames.append(cut), {})
    decoder.limit(131_072)
    data = random.Random(1).randbytes(131_064)
    stream = raw_frame(METHOD, 1, b"\0\x3c\0\x3d") + raw_frame(BODY, 1, data) * 40
    begun = time.perf_counter()
    for byte in stream:
        decoder.get_buffer()[0] = byte
        decoder.buffer_updated(1)
    took = time.perf_counter() - begun
    assert len(frames) == 41
    assert all(cut == (BODY, 1, data) for cut in frames[1:])
    assert took < 20, f"{took:.1f} s"


async def test_a_16_MiB_body_both_ways() -> None:  # noqa: N802
    from leveret import Message

    data = random.Random(1).randbytes(1 << 24)
    got: list[IncomingMessage] = []
    async with linked() as link:
        channel = await link.channel()
        await link.consume(channel, got.append)
        publish = asyncio.ensure_future(channel.default_exchange.publish(Message(data), "key"))
        assert (await link.session.expect_publish())[3] == data
        link.session.send(1, commands.Basic.Ack(1))
        await within(publish)
        link.session.deliver(1, "tag", 1, data)
        await until(lambda: got)
        assert got[0].body == data


@pytest.mark.parametrize("how", ["eof", "reset"])
@pytest.mark.parametrize("after", [1, 2, 3])
async def test_a_partial_message_is_never_handed_out(after: int, how: str) -> None:
    got: list[IncomingMessage] = []
    async with linked() as link:
        channel = await link.channel()
        await link.consume(channel, got.append)
        for piece in pieces(1, "tag", 1, b"a", b"b")[:after]:
            link.session.send_raw(piece)
        await link.fence()
        getattr(link.session, how)()
        await within(link.connection.closed())
        assert not got


async def test_every_cut_of_a_delivery_hands_out_nothing_or_all() -> None:
    stream = b"".join(pieces(1, "tag", 1, b"body"))
    for cut in range(0, len(stream) + 1, 7):
        got: list[IncomingMessage] = []
        async with linked() as link:
            channel = await link.channel()
            await link.consume(channel, got.append)
            link.session.send_raw(stream[:cut])
            link.session.eof()
            await within(link.connection.closed())
            assert not got  # all of it lay there, but the link died before a handler could start


async def test_deliveries_between_cancel_and_cancel_ok_go_to_the_callback() -> None:
    got: list[IncomingMessage] = []
    async with linked() as link:
        channel = await link.channel()
        queue = await link.consume(channel, got.append)
        cancel = asyncio.create_task(queue.cancel("tag"))
        await link.session.expect(commands.Basic.Cancel)
        for n in range(1, 201):
            link.session.deliver(1, "tag", n, b"x")
        link.session.send(1, commands.Basic.CancelOk("tag"))
        await within(cancel)
        await link.fence()
        assert [message.delivery_tag for message in got] == list(range(1, 201))
        await got[-1].ack(multiple=True)
        (ack,) = await link.sent()
        assert isinstance(ack, commands.Basic.Ack)
        assert (ack.delivery_tag, ack.multiple) == (200, True)


@pytest.mark.parametrize("level", ["channel", "connection"])
async def test_deliveries_after_our_close_are_dropped_and_not_acked(level: str) -> None:
    got: list[IncomingMessage] = []
    async with linked() as link:
        channel = await link.channel()
        await link.consume(channel, got.append)
        link.session.deliver(1, "tag", 1, b"before")
        await until(lambda: got)
        closing = asyncio.create_task(channel.close() if level == "channel" else link.connection.close())
        close = commands.Channel.Close if level == "channel" else commands.Connection.Close
        await link.session.expect(close)
        for n in range(2, 301):
            link.session.deliver(1, "tag", n, b"x")
        link.session.send_raw(pieces(1, "tag", 301, b"part of", b" it")[0])
        if level == "channel":
            link.session.send(1, commands.Channel.CloseOk())
            await within(closing)
            assert await link.fence() == []
        else:
            link.session.send(0, commands.Connection.CloseOk())
            await within(closing)
            await link.session.closed()
        assert [message.body for message in got] == [b"before"]


async def test_a_reused_channel_number_does_not_inherit_content_or_consumers() -> None:
    old: list[IncomingMessage] = []
    new: list[IncomingMessage] = []
    async with linked(channel_max=1) as link:
        channel = await link.channel()
        await link.consume(channel, old.append)
        for n in (1, 2, 3):  # enough for the decoder to learn their shape
            link.session.deliver(1, "tag", n, b"old")
        await until(lambda: len(old) == 3)
        link.session.send_raw(pieces(1, "tag", 4, b"half", b"whole")[0])
        await link.fence()
        await link.answer(channel.close(), commands.Channel.Close, commands.Channel.CloseOk())
        again = await link.channel()
        await link.consume(again, new.append)
        for n in (1, 2, 3):
            link.session.deliver(1, "tag", n, b"new")
        await until(lambda: len(new) == 3)
        assert len(old) == 3
        await new[2].ack(multiple=True)
        assert len(await link.sent()) == 1


async def test_get_brings_a_body_of_many_frames() -> None:
    async with linked() as link:
        channel = await link.channel()
        queue = await link.queue(channel)
        getting = asyncio.create_task(queue.get())
        await link.session.expect(commands.Basic.Get)
        link.session.send(1, commands.Basic.GetOk(1, True, "x", "key", 5))
        link.session.send(1, header.ContentHeader(0, 6, commands.Basic.Properties()))
        link.session.send(1, body.ContentBody(b"abc"))
        link.session.send_heartbeat()
        link.session.send(1, body.ContentBody(b"def"))
        message = await within(getting)
        assert (message.body, message.redelivered, message.message_count) == (b"abcdef", True, 5)
