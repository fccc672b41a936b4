"""Hostile and malformed input: the connection is closed with the right code, or one message is marked; no more."""

from __future__ import annotations

import asyncio
import struct
from decimal import Decimal
from typing import Any

import pytest
from pamqp import body, commands, frame, header

from leveret import IncomingMessage, Message
from leveret.exceptions import AMQPError, ChannelClosed, MessageDecodeError, MessageTooLarge, PublishOutcomeUnknown
from tests.protocol.kit import Link, hang_up, linked, raw_frame, turns, until, within

METHOD, HEADER, BODY, HEARTBEAT = 1, 2, 3, 8
DELIVER = frame.marshal(commands.Basic.Deliver("tag", 1, False, "", "key"), 1)
NO_PROPERTIES = b"\0\0"


def content_header(size: int, properties: bytes = NO_PROPERTIES, *, class_id: int = 60, channel: int = 1) -> bytes:
    return raw_frame(HEADER, channel, struct.pack(">HHQ", class_id, 0, size) + properties)


def method(channel: int, value: Any) -> bytes:
    return frame.marshal(value, channel)


def cut(channel: int, value: Any, less: int) -> bytes:
    """A method frame, sound as a frame, whose arguments end too soon."""
    return raw_frame(METHOD, channel, method(channel, value)[7 : -1 - less])


FATAL: dict[str, tuple[bytes, set[int]]] = {
    "frame over frame_max": (b"\x01\x00\x01" + (131_073 - 8).to_bytes(4, "big"), {501}),
    "frame of 4 GiB": (b"\x03\x00\x01\xff\xff\xff\xff", {501}),
    "frame of 4 GiB on an unknown channel": (b"\x01\x09\x09\xff\xff\xff\xff", {501}),
    "wrong frame end": (raw_frame(METHOD, 1, b"\0\x3c\0\x50", b"\xcd"), {501}),
    "wrong frame end of a large frame": (raw_frame(BODY, 1, bytes(100_000), b"\0"), {501}),
    "wrong frame end of a heartbeat": (raw_frame(HEARTBEAT, 0, b"", b"\0"), {501}),
    "frame type 0": (raw_frame(0, 1, b"\0" * 8), {501}),
    "frame type 4": (raw_frame(4, 1, b"\0" * 8), {501}),
    "frame type 255": (raw_frame(255, 1, b"\0" * 8), {501}),
    "unknown class": (raw_frame(METHOD, 1, b"\0\x63\0\x01"), {503}),
    "unknown class on channel 0": (raw_frame(METHOD, 0, b"\0\x63\0\x01"), {503}),
    "unknown method": (raw_frame(METHOD, 1, b"\0\x3c\x03\xe7"), {540}),
    "unknown method on channel 0": (raw_frame(METHOD, 0, b"\0\x0a\x03\xe7"), {540}),
    **{f"method frame of {n} bytes": (raw_frame(METHOD, 1, bytes(n)), {501}) for n in range(4)},
    **{f"method frame of {n} bytes on channel 0": (raw_frame(METHOD, 0, bytes(n)), {501}) for n in range(4)},
    "truncated deliver": (cut(1, commands.Basic.Deliver("tag", 1, False, "ex", "key"), 2), {501, 502}),
    "truncated return": (cut(1, commands.Basic.Return(312, "NO_ROUTE", "ex", "key"), 2), {501, 502}),
    "truncated ack": (cut(1, commands.Basic.Ack(1), 3), {501, 502}),
    "truncated declare-ok": (cut(1, commands.Queue.DeclareOk("q", 0, 0), 3), {501, 502}),
    "truncated channel.close": (cut(1, commands.Channel.Close(404, "text", 0, 0), 6), {501, 502}),
    "truncated blocked": (cut(0, commands.Connection.Blocked("text"), 1), {501, 502}),
    "basic on channel 0": (method(0, commands.Basic.Ack(1)), {504}),
    "queue on channel 0": (method(0, commands.Queue.DeclareOk("q", 0, 0)), {504}),
    "channel.close on channel 0": (method(0, commands.Channel.Close(404, "", 0, 0)), {504}),
    "connection.close on channel 1": (method(1, commands.Connection.Close(320, "", 0, 0)), {504}),
    "connection.blocked on channel 1": (method(1, commands.Connection.Blocked("x")), {504}),
    "method on a channel never opened": (method(7, commands.Basic.CancelOk("tag")), {504}),
    "channel.close on a channel never opened": (method(7, commands.Channel.Close(404, "", 0, 0)), {504}),
    "header on a channel never opened": (content_header(1, channel=7), {504}),
    "body on a channel never opened": (raw_frame(BODY, 7, b"x"), {504}),
    "delivery on a channel never opened": (
        method(7, commands.Basic.Deliver("tag", 1, False, "", "")) + content_header(0, channel=7),
        {504},
    ),
    "heartbeat with a payload": (raw_frame(HEARTBEAT, 0, b"x"), {501}),
    "heartbeat on an open channel": (raw_frame(HEARTBEAT, 1, b""), {505}),
    "heartbeat on another channel": (raw_frame(HEARTBEAT, 7, b""), {505}),
    "header without a method": (content_header(1), {505}),
    "body without a method": (raw_frame(BODY, 1, b"x"), {505}),
    "body without a header": (DELIVER + raw_frame(BODY, 1, b"x"), {505}),
    "header on channel 0": (content_header(1, channel=0), {505}),
    "body on channel 0": (raw_frame(BODY, 0, b"x"), {505}),
    "method after deliver": (DELIVER + DELIVER, {505}),
    "method after the header": (DELIVER + content_header(1) + DELIVER, {505}),
    "method within the body": (
        DELIVER + content_header(2) + raw_frame(BODY, 1, b"x") + method(1, commands.Basic.CancelOk("tag")),
        {505},
    ),
    "channel.flow within content": (DELIVER + method(1, commands.Channel.Flow(True)), {505}),
    "second header": (DELIVER + content_header(1) + content_header(1), {505}),
    "header of class 10": (DELIVER + content_header(1, class_id=10), {505}),
    "header of class 0": (DELIVER + content_header(0, class_id=0), {505}),
    "header of 13 bytes": (DELIVER + raw_frame(HEADER, 1, bytes(13)), {501, 502, 505}),
    "body longer than declared": (DELIVER + content_header(3) + raw_frame(BODY, 1, b"four"), {501}),
    "bodies longer than declared": (
        DELIVER + content_header(3) + raw_frame(BODY, 1, b"tw") + raw_frame(BODY, 1, b"tw"),
        {501},
    ),
    "AMQP header in mid-stream": (b"AMQP\x00\x00\x09\x01", {501}),
    "HTTP in mid-stream": (b"HTTP/1.1 200 OK\r\n", {501}),
    "confirm of tag 0": (method(1, commands.Basic.Ack(0)), {503}),
    "confirm of a publish that was not made": (method(1, commands.Basic.Ack(2)), {503}),
    "nack of a publish that was not made": (method(1, commands.Basic.Nack(2)), {503}),
    "multiple confirm beyond the last": (method(1, commands.Basic.Ack(2, True)), {503}),
    "confirm without confirms": (method(2, commands.Basic.Ack(1)), {503}),
    "a reply to another call": (method(1, commands.Exchange.BindOk()), {503}),
    "a reply to no call": (method(2, commands.Queue.BindOk()), {503}),
    "close-ok without close": (method(2, commands.Channel.CloseOk()), {503}),
    "open-ok again": (method(2, commands.Channel.OpenOk()), {503}),
    "get-ok without get": (method(2, commands.Basic.GetOk(1, False, "", "", 0)), {503}),
    "what only clients send": (method(2, commands.Basic.Publish()), {503}),
    "connection.start again": (method(0, commands.Connection.Start(0, 9, {}, "PLAIN", "en_US")), {503}),
    "connection.close-ok without close": (method(0, commands.Connection.CloseOk()), {503}),
    "delivery for an unknown consumer": (
        method(1, commands.Basic.Deliver("nobody", 1, False, "", "")) + content_header(0),
        {503},
    ),
}


@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "byte by byte"])
@pytest.mark.parametrize("name", FATAL)
@pytest.mark.expects_errors
async def test_malformed_input_closes_with_its_code_and_tells_all_who_wait(name: str, in_pieces: bool) -> None:
    data, codes = FATAL[name]
    if in_pieces and len(data) > 1000:
        pytest.skip("large")
    delivered: list[IncomingMessage] = []
    async with linked() as link:
        channel = await link.channel()
        await link.channel(confirm=False)
        await link.consume(channel, delivered.append)
        queue = await link.queue(channel, "q")
        declare = asyncio.create_task(queue.declare())
        await link.session.expect(commands.Queue.Declare)
        publish = asyncio.ensure_future(channel.default_exchange.publish(Message(b""), "key"))
        await link.session.expect_publish()

        for piece in [data[i : i + 1] for i in range(len(data))] if in_pieces else [data]:
            if link.connection.is_closed:
                break
            link.session.send_raw(piece)
            if in_pieces:
                await link.session.drain()
                await asyncio.sleep(0)
        number, close = await link.session.expect(commands.Connection.Close)
        assert number == 0
        assert close.reply_code in codes
        assert close.reply_text

        with pytest.raises(AMQPError):
            await within(declare)
        with pytest.raises(PublishOutcomeUnknown):
            await within(publish)
        await within(link.connection.closed())
        assert channel.is_closed
        assert not delivered
        link.session.send(0, commands.Connection.CloseOk())
        await hang_up(link.session)


@pytest.mark.parametrize("size", [2**29 + 1, 2**63, 2**64 - 1])
@pytest.mark.expects_errors
async def test_a_body_over_all_limits_closes_its_channel_only(size: int) -> None:
    async with linked() as link:
        channel = await link.channel()
        other = await link.channel()
        errors: list[BaseException | None] = []
        channel.close_callbacks.add(lambda _, error: errors.append(error))
        await link.consume(channel, print)
        link.session.send_raw(DELIVER + content_header(size))
        _, close = await link.session.expect(commands.Channel.Close, channel=1)
        assert close.reply_code == 311
        link.session.send_raw(raw_frame(BODY, 1, b"x" * 1000))  # still on its way
        link.session.send(1, commands.Channel.CloseOk())
        await link.fence()
        assert isinstance(errors[0], MessageTooLarge)
        assert channel.is_closed
        assert not other.is_closed


async def test_octets_after_the_last_argument_are_ignored() -> None:
    async with linked() as link:
        channel = await link.channel()
        queue = await link.queue(channel)
        declare = asyncio.create_task(queue.declare())
        await link.session.expect(commands.Queue.Declare)
        payload = method(1, commands.Queue.DeclareOk("q", 3, 0))[7:-1]
        link.session.send_raw(raw_frame(METHOD, 1, payload + b"junk"))
        assert (await within(declare)).message_count == 3
        await link.fence()


async def test_frames_for_a_channel_that_was_just_closed_are_ignored() -> None:
    async with linked() as link:
        channel = await link.channel()
        await link.answer(channel.close(), commands.Channel.Close, commands.Channel.CloseOk())
        link.session.send_raw(DELIVER + content_header(1) + raw_frame(BODY, 1, b"x") + method(1, commands.Basic.Ack(1)))
        assert await link.fence() == []


# ---------------------------------------------------------------------------------------- one message's trouble


def table(content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + content


def nested(depth: int) -> bytes:
    inner = b""
    for _ in range(depth):
        inner = b"\x01aF" + table(inner)
    return table(inner)


def nested_arrays(depth: int) -> bytes:
    inner = b""
    for _ in range(depth):
        inner = b"A" + table(inner)
    return table(b"\x01a" + inner)


HEADERS = b"\x20\x00"  # property flags: headers only
POISON_TABLES: dict[str, bytes] = {
    "table longer than the frame": b"\0\0\xff\xff",
    "table of 4 GiB": b"\xff\xff\xff\xff",
    "inner table longer than the rest": table(b"\x01aF\0\0\0\xff"),
    "array longer than the rest": table(b"\x01aA\0\0\0\xff"),
    "array of negative length": table(b"\x01aA\xff\xff\xff\xff"),
    "string longer than the rest": table(b"\x01aS\0\0\0\xffabc"),
    "string of negative length": table(b"\x01aS\xff\xff\xff\xff"),
    "byte array longer than the rest": table(b"\x01ax\0\0\0\xff"),
    "key longer than the rest": table(b"\xffabc"),
    "key without a value": table(b"\x01a"),
    "unknown type": table(b"\x01aZ"),
    "type nul": table(b"\x01a\0"),
    "truncated integer": table(b"\x01aI\0\0"),
    "truncated decimal": table(b"\x01aD\0\0"),
    "tables nested 500 deep": nested(500),
    "tables nested 5000 deep": nested(5000),
    "arrays nested 20000 deep": nested_arrays(20_000),
}
POISON_PROPERTIES: dict[str, bytes] = {
    "undefined flag": b"\x80\x02\x01a",
    "continuation bit": b"\x80\x01\0\0\x01a",
    "content type cut short": b"\x80\x00\xffabc",
    "timestamp cut short": b"\x00\x40\0\0",
    "priority missing": b"\x08\x00",
}


async def deliver_raw(link: Link, properties: bytes) -> IncomingMessage:
    """Deliver a message with these properties, and then a sound one; the first, which a callback got."""
    got: list[IncomingMessage] = []
    channel = await link.channel()
    await link.consume(channel, got.append)
    session = link.session
    session.send_raw(DELIVER + content_header(4, properties) + raw_frame(BODY, 1, b"body"))
    session.deliver(1, "tag", 2, b"sound", properties=commands.Basic.Properties(headers={"a": 1}))
    await until(lambda: len(got) == 2)
    assert got[1].headers == {"a": 1}
    assert got[1].headers_error is None
    assert got[1].headers_raw is None
    assert got[0].body == b"body"
    return got[0]


@pytest.mark.parametrize("name", POISON_TABLES)
async def test_malformed_headers_are_that_messages_trouble_only(name: str) -> None:
    async with linked() as link:
        message = await deliver_raw(link, HEADERS + POISON_TABLES[name])
        assert message.headers == {}
        assert isinstance(message.headers_error, MessageDecodeError)
        assert message.headers_raw == POISON_TABLES[name]
        assert message.info()["routing_key"] == "key"
        assert repr(message)
        await message.ack()
        assert [value.delivery_tag for value in await link.sent() if isinstance(value, commands.Basic.Ack)] == [1]


async def test_properties_around_malformed_headers_are_read() -> None:
    async with linked() as link:
        message = await deliver_raw(link, b"\xa0\x80\x04text" + table(b"\x01aZ") + b"\x02id")
        assert (message.content_type, message.headers, message.message_id) == ("text", {}, "id")
        assert message.headers_error is not None


@pytest.mark.parametrize("name", POISON_PROPERTIES)
async def test_malformed_properties_are_that_messages_trouble_only(name: str) -> None:
    async with linked() as link:
        message = await deliver_raw(link, POISON_PROPERTIES[name])
        assert isinstance(message.headers_error, MessageDecodeError)
        assert message.headers == {}
        assert repr(message)
        await link.fence()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"T" + b"\x80" + bytes(7), 2**63),
        (b"T" + b"\xff" * 8, 2**64 - 1),
        (b"D\xff\0\0\0\x01", Decimal((0, (1,), -255))),
        (b"d\x7f\xf0\0\0\0\0\0\0", float("inf")),
        (b"S\0\0\0\x02\xff\xfe", b"\xff\xfe"),
        (b"V", None),
        (b"B\xff", 255),
        (b"u\xff\xff", 65_535),
        (b"i\xff\xff\xff\xff", 2**32 - 1),
    ],
)
async def test_odd_but_sound_header_values_are_delivered(value: bytes, expected: Any) -> None:
    async with linked() as link:
        message = await deliver_raw(link, HEADERS + table(b"\x01a" + value))
        assert message.headers == {"a": expected}
        assert message.headers_error is None


async def test_a_timestamp_beyond_datetime_stays_a_number() -> None:
    async with linked() as link:
        message = await deliver_raw(link, b"\x00\x40" + b"\xff" * 8)
        assert message.timestamp == 2**64 - 1


async def test_a_routing_key_that_is_no_text_reaches_the_handler_and_can_be_sent_back() -> None:
    got: list[IncomingMessage] = []
    async with linked() as link:
        channel = await link.channel(confirm=False)
        await link.consume(channel, got.append)
        link.session.send_raw(
            raw_frame(METHOD, 1, b"\0\x3c\0\x3c\x03tag" + (1).to_bytes(8, "big") + b"\0\0\x02\xff\xfe")
        )
        link.session.send_raw(content_header(0))
        await until(lambda: got)
        assert got[0].routing_key.encode("utf-8", "surrogateescape") == b"\xff\xfe"
        assert repr(got[0])


async def test_a_large_void_array_is_read_in_linear_time() -> None:
    async with linked() as link:
        message = await deliver_raw(link, HEADERS + table(b"\x01aA" + table(b"V" * 120_000)))
        begun = asyncio.get_running_loop().time()
        assert len(message.headers["a"]) == 120_000  # type: ignore[arg-type]
        assert asyncio.get_running_loop().time() - begun < 0.5  # 30 ms, and time for a busy machine


async def test_the_last_of_equal_keys_wins() -> None:
    async with linked() as link:
        message = await deliver_raw(link, HEADERS + table(b"\x01aB\x01" * 15_000 + b"\x01aB\x02"))
        assert message.headers == {"a": 2}


async def test_a_flood_of_harmless_methods_makes_no_tasks() -> None:
    async with linked(lenient=True) as link:
        channel = await link.channel()
        before = len(asyncio.all_tasks())
        for _ in range(1000):
            link.session.send_heartbeat()
            link.session.send(0, commands.Connection.Blocked("low"), commands.Connection.Unblocked())
            link.session.send(1, commands.Basic.Cancel("nobody", True), commands.Channel.Flow(True))
        await link.fence()
        assert len(asyncio.all_tasks()) == before
        assert not channel.is_closed


@pytest.mark.parametrize("stranger", [body.ContentBody(b"x"), header.ContentHeader(0, 0, commands.Basic.Properties())])
@pytest.mark.expects_errors
async def test_only_one_connection_close_is_sent_for_a_row_of_faults(stranger: Any) -> None:
    async with linked() as link:
        await link.channel()
        for _ in range(5):
            link.session.send(1, stranger)
        await link.session.expect(commands.Connection.Close)
        link.session.send(0, commands.Connection.CloseOk())
        await hang_up(link.session)


@pytest.mark.expects_errors
async def test_the_peer_is_told_even_if_it_does_not_answer_and_the_socket_ends() -> None:
    async with linked() as link:
        await link.channel()
        link.session.send_raw(b"nonsense")
        await link.session.expect(commands.Connection.Close)
        await link.session.closed(timeout=2)


@pytest.mark.expects_errors
async def test_a_peer_that_goes_on_sending_still_gets_to_read_why_it_was_closed() -> None:
    """A socket that is closed with bytes unread is reset, and a reset takes our connection.close with it."""
    async with linked() as link:
        await link.channel()
        link.session.send_raw(raw_frame(METHOD, 1, b"\0\x63\0\x01"))
        await within(link.connection.closed())
        for _ in range(20):
            link.session.send_heartbeat()
            await turns()
        await link.session.expect(commands.Connection.Close)


@pytest.mark.expects_errors
async def test_control_characters_of_the_peer_do_not_reach_the_log_raw(caplog: pytest.LogCaptureFixture) -> None:
    async with linked() as link:
        await link.channel()
        link.session.send(1, commands.Channel.Close(404, "NOT\r\nFOUND\x1b[31m", 0, 0))
        await link.session.expect(commands.Channel.CloseOk)
        link.session.send(0, commands.Connection.Close(320, "bye\r\nforged", 0, 0))
        await link.session.expect(commands.Connection.CloseOk)
        await turns()
    assert not any(c in record.getMessage() for record in caplog.records for c in "\r\n\x1b"), caplog.text


async def test_the_error_of_a_channel_that_was_closed_carries_the_brokers_words() -> None:
    async with linked() as link:
        channel = await link.channel()
        queue = await link.queue(channel)
        task = asyncio.create_task(queue.declare())
        await link.session.expect(commands.Queue.Declare)
        link.session.send(1, commands.Channel.Close(499, "SOMETHING - new", 50, 10))
        await link.session.expect(commands.Channel.CloseOk)
        with pytest.raises(ChannelClosed) as caught:
            await within(task)
        error = caught.value
        assert (error.reply_code, error.reply_text, error.class_id, error.method_id) == (499, "SOMETHING - new", 50, 10)
