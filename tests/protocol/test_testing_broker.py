"""`leveret.testing.Broker` on its socket: what tests can do to it and see of it, and that other clients know it."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from typing import TYPE_CHECKING, Any

import pytest
from pamqp.commands import Basic

import leveret
from leveret import Channel, Connection, Message
from leveret.exceptions import (
    ChannelAccessRefused,
    ChannelPreconditionFailed,
    ConnectionClosed,
    ConnectionNotImplemented,
    ConsumerCancelled,
    MessageNacked,
)
from leveret.testing import Broker, Permissions
from tests.broker.test_helpers import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def broker() -> AsyncIterator[Broker]:
    async with Broker() as broker:
        yield broker


@pytest.fixture
async def connection(broker: Broker) -> AsyncIterator[Connection]:
    async with await leveret.connect(broker.url, name="mine") as connection:
        yield connection


@pytest.fixture
async def channel(connection: Connection) -> AsyncIterator[Channel]:
    async with connection.channel() as channel:
        yield channel


async def publish(channel: Channel, *bodies: bytes, to: str = "q") -> None:
    for body in bodies:
        await channel.default_exchange.publish(Message(body), to)


# ---------------------------------------------------------------------------------------------------------- life


async def test_it_starts_at_once_on_loopback_only() -> None:
    broker = Broker()
    began = time.perf_counter()
    await broker.start()
    assert time.perf_counter() - began < 0.05
    with pytest.raises(RuntimeError, match="runs already"):
        await broker.start()
    listener = broker._server._listeners[0].sockets[0]
    assert listener.getsockname() == ("127.0.0.1", broker.port)
    await broker.stop()
    await broker.stop()
    assert not broker.is_running


async def test_a_port_that_is_taken_is_told(broker: Broker) -> None:
    for thread in (False, True):
        with pytest.raises(OSError, match="in use"):
            await Broker(broker.port, thread=thread).start()


def test_a_thread_of_its_own_for_programs_without_a_loop() -> None:
    with Broker() as broker, socket.create_connection(("127.0.0.1", broker.port), 5) as sock:
        sock.sendall(b"AMQP\0\0\x09\x01")
        assert sock.recv(1) == b"\x01"
        assert broker.connections == ()
        assert list(broker.queues) == []
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", broker.port), 5)


async def test_a_thread_is_awaited_like_a_loop() -> None:
    async with Broker(thread=True) as broker, await leveret.connect(broker.url) as connection:
        channel = await connection.channel()
        await channel.declare_queue("q")
        await publish(channel, b"1")
        assert broker.queues["q"].bodies == [b"1"]


@pytest.mark.parametrize("keep", [True, False])
async def test_a_restart_on_the_same_port_with_or_without_its_contents(broker: Broker, keep: bool) -> None:
    connection = await leveret.connect(broker.url)
    channel = await connection.channel()
    await channel.declare_queue("q", durable=True)
    await channel.declare_queue("transient")
    await channel.default_exchange.publish(Message(b"1", delivery_mode=2), "q")
    port = broker.port
    await broker.stop(keep=keep)
    await eventually(lambda: connection.is_closed)
    await broker.start()
    assert broker.port == port
    assert dict(broker.queues).keys() == ({"q"} if keep else set())
    assert not keep or broker.queues["q"].bodies == [b"1"]


async def test_a_broker_that_began_in_a_thread_goes_on_in_one() -> None:
    with Broker() as broker:
        await broker.stop(keep=True)
        await broker.start()
        assert broker._loop is not asyncio.get_running_loop()
        async with await leveret.connect(broker.url):
            pass


async def test_a_robust_connection_comes_back_to_it(broker: Broker) -> None:
    async with await leveret.connect_robust(broker.url) as robust:
        channel = await robust.channel()
        queue = await channel.declare_queue("q", durable=True)
        got: list[bytes] = []

        async def callback(message: leveret.IncomingMessage) -> None:
            got.append(message.body)
            await message.ack()

        await queue.consume(callback)
        assert broker.drop_connections() == 1
        await eventually(lambda: robust.connection_attempt >= 2 and robust.connected.is_set())
        await publish(channel, b"1")
        await eventually(lambda: got == [b"1"])


# ------------------------------------------------------------------------------------------------------- to look


async def test_what_is_there_can_be_looked_at(broker: Broker, channel: Channel) -> None:
    exchange = await channel.declare_exchange("x", "topic")
    queue = await channel.declare_queue("q", durable=True, arguments={"x-max-length": 5})
    await queue.bind(exchange, "a.*", arguments={"k": 1})
    await exchange.publish(Message(b"1", headers={"h": 1}, message_id="m"), "a.b")
    await exchange.publish(Message(b"2"), "nowhere", mandatory=False)
    view = broker.queues["q"]
    assert (view.type, view.durable, view.exclusive, view.arguments) == ("classic", True, False, {"x-max-length": 5})
    [message] = view.messages
    assert (message.body, message.exchange, message.routing_key) == (b"1", "x", "a.b")
    assert (message.headers, message.properties.message_id) == ({"h": 1}, "m")
    [bound] = broker.bindings
    assert (bound.source, bound.destination, bound.is_queue, bound.routing_key) == ("x", "q", True, "a.*")
    assert broker.exchanges["x"].bindings == (bound,)
    assert [each.body for each in broker.published] == [b"1", b"2"]
    assert [each.body for each in broker.unrouted] == [b"2"]
    [seen] = broker.connections
    assert (seen.name, seen.user, seen.vhost, seen.channels) == ("mine", "guest", "/", (1,))
    await channel.set_qos(7)
    tag = await queue.consume(print, no_ack=False)  # type: ignore[arg-type]
    await eventually(lambda: broker.queues["q"].unacked == 1)
    [consumer] = broker.consumers
    assert (consumer.tag, consumer.queue, consumer.prefetch, consumer.in_hand) == (str(tag), "q", 7, 1)
    assert "nothing" not in broker.queues
    with pytest.raises(KeyError):
        _ = broker.queues["nothing"]


async def test_only_the_last_messages_are_remembered() -> None:
    async with Broker(keep_published=2) as broker, await leveret.connect(broker.url) as connection:
        async with connection.channel() as channel:
            for body in (b"1", b"2", b"3"):
                await channel.default_exchange.publish(Message(body), "nowhere", mandatory=False)
        assert [each.body for each in broker.published] == [b"2", b"3"]
        assert broker.published_count == 3


# ------------------------------------------------------------------------------------------------------- to hurt


async def test_the_next_call_fails_and_the_one_after_does_not(broker: Broker, connection: Connection) -> None:
    broker.fail_next("queue.declare", 406, "no such luck")
    async with connection.channel() as channel:
        with pytest.raises(ChannelPreconditionFailed, match="PRECONDITION_FAILED - no such luck") as caught:
            await channel.declare_queue("q")
        assert (caught.value.class_id, caught.value.method_id) == (50, 10)
    async with connection.channel() as channel:
        await channel.declare_queue("q")
    broker.fail_next("basic.publish", 403)
    async with connection.channel() as channel:
        with pytest.raises(leveret.exceptions.PublishOutcomeUnknown) as unknown:
            await publish(channel, b"1")
        assert isinstance(unknown.value.__cause__, ChannelAccessRefused)
    assert not connection.is_closed
    broker.fail_next("channel.open", 540)
    with pytest.raises(ConnectionNotImplemented):
        await connection.channel()
    assert connection.is_closed


async def test_publishes_are_nacked_on_request(broker: Broker, channel: Channel) -> None:
    await channel.declare_queue("q")
    broker.nack_next(2)
    results = await asyncio.gather(
        *[channel.default_exchange.publish(Message(b"%d" % i), "q") for i in range(4)], return_exceptions=True
    )
    assert [type(result) for result in results] == [MessageNacked, MessageNacked, Basic.Ack, Basic.Ack]


async def test_confirms_come_late_on_request(broker: Broker, channel: Channel) -> None:
    await channel.declare_queue("q")
    broker.delay_confirms(60)
    waiting = [asyncio.ensure_future(channel.default_exchange.publish(Message(b""), "q")) for _ in range(3)]
    await eventually(lambda: len(broker.queues["q"].messages) == 3)
    assert not any(each.done() for each in waiting)
    broker.delay_confirms(0)
    assert all(isinstance(each, Basic.Ack) for each in await asyncio.wait_for(asyncio.gather(*waiting), 5))


async def test_confirms_that_come_late_come_in_their_time(broker: Broker, channel: Channel) -> None:
    await channel.declare_queue("q")
    broker.delay_confirms(60)
    waiting = asyncio.ensure_future(channel.default_exchange.publish(Message(b""), "q"))
    await eventually(lambda: len(broker.queues["q"].messages) == 1)
    broker.advance(61)
    assert isinstance(await asyncio.wait_for(waiting, 5), Basic.Ack)
    assert not broker._server.faults._delayed


async def test_consumers_are_cancelled_and_the_queue_stays(broker: Broker, channel: Channel) -> None:
    queue = await channel.declare_queue("q")
    async with queue.iterator() as messages:
        waiting = asyncio.ensure_future(anext(messages))
        await eventually(lambda: broker.consumers)
        assert broker.cancel_consumers("q") == 1
        with pytest.raises(ConsumerCancelled):
            await asyncio.wait_for(waiting, 5)
    assert "q" in broker.queues
    with pytest.raises(ValueError, match=r"no queue 'nope' in virtual host '/' \(there are 'q'\)"):
        broker.cancel_consumers("nope")


async def test_channels_are_closed_one_by_one(broker: Broker, connection: Connection) -> None:
    async with connection.channel() as one, connection.channel() as two:
        assert broker.close_channel(one.number, code=406, reason="for a test") == 1
        await eventually(lambda: one.is_closed)
        assert not two.is_closed
        await two.declare_queue("q")


async def test_connections_are_closed_with_words(broker: Broker, connection: Connection) -> None:
    lost: list[BaseException | None] = []
    connection.close_callbacks.add(lambda _, error: lost.append(error))
    assert broker.close_connections("maintenance", name="other") == 0
    assert broker.close_connections("maintenance", name="mine") == 1
    await eventually(lambda: lost)
    [error] = lost
    assert isinstance(error, ConnectionClosed)
    assert (error.reply_code, error.reply_text) == (320, "CONNECTION_FORCED - maintenance")
    assert await eventually(lambda: broker.connections == ())


async def test_blocked_publishers_wait_in_order(broker: Broker, connection: Connection, channel: Channel) -> None:
    await channel.declare_queue("q")
    broker.block("disk")
    waiting = [asyncio.ensure_future(channel.default_exchange.publish(Message(b"%d" % i), "q")) for i in range(3)]
    await eventually(lambda: connection.blocked == "low on disk")
    assert broker.queues["q"].messages == ()
    broker.unblock()
    await asyncio.wait_for(asyncio.gather(*waiting), 5)
    assert broker.queues["q"].bodies == [b"0", b"1", b"2"]
    with pytest.raises(ValueError, match="'memory' or 'disk'"):
        broker.block("money")


async def test_a_pause_answers_nobody(broker: Broker, channel: Channel) -> None:
    broker.pause()
    declared = asyncio.ensure_future(channel.declare_queue("q"))
    _, writer = await asyncio.open_connection("127.0.0.1", broker.port)  # the operating system accepts
    writer.close()
    with pytest.raises(TimeoutError):
        await leveret.connect(broker.url, timeout=0.1)
    assert not declared.done()
    broker.resume()
    assert (await asyncio.wait_for(declared, 5)).name == "q"


async def test_time_is_moved_not_waited_for(broker: Broker, channel: Channel) -> None:
    await channel.declare_queue("dead")
    arguments = {"x-message-ttl": 60_000, "x-dead-letter-exchange": "", "x-dead-letter-routing-key": "dead"}
    await channel.declare_queue("q", arguments=arguments)
    await publish(channel, b"1")
    broker.advance(59)
    assert broker.queues["q"].bodies == [b"1"]
    broker.advance(1)
    assert (broker.queues["q"].bodies, broker.queues["dead"].bodies) == ([], [b"1"])


async def test_bytes_are_seen_and_changed(broker: Broker, channel: Channel) -> None:
    seen: list[tuple[str, str]] = []

    def tap(connection: Any, direction: str, data: bytes) -> bytes:
        seen.append((connection.name, direction))
        return data.replace(b"secret", b"public")

    broker.on_bytes(tap)
    await channel.declare_queue("q")
    await publish(channel, b"secret")
    broker.on_bytes(None)
    assert broker.queues["q"].bodies == [b"public"]
    assert {("mine", "in"), ("mine", "out")} == set(seen)
    await publish(channel, b"secret")
    assert broker.queues["q"].bodies == [b"public", b"secret"]


@pytest.mark.expects_errors
@pytest.mark.parametrize(
    ("result", "text"),
    [("text", "returned 'text'"), (5, "returned 5"), (ZeroDivisionError("oops"), "raised ZeroDivisionError: oops")],
)
async def test_a_tap_that_fails_is_told_once_and_changes_nothing(
    broker: Broker, channel: Channel, caplog: pytest.LogCaptureFixture, result: object, text: str
) -> None:
    def faulty_tap(*_: object) -> Any:
        if isinstance(result, Exception):
            raise result
        return result

    broker.on_bytes(faulty_tap)
    await channel.declare_queue("q")
    await publish(channel, b"1")
    broker.on_bytes(None)
    assert broker.queues["q"].bodies == [b"1"]
    [record] = caplog.records
    assert record.name == "leveret.testing"
    assert "faulty_tap" in record.getMessage()
    assert text in record.getMessage()


async def test_a_tap_may_return_any_kind_of_bytes(broker: Broker, channel: Channel) -> None:
    broker.on_bytes(lambda connection, direction, data: bytearray(data))
    assert (await channel.declare_queue("q")).name == "q"
    broker.on_bytes(lambda connection, direction, data: None)
    assert (await channel.declare_queue("q")).name == "q"


@pytest.mark.expects_errors
async def test_raw_bytes_reach_the_client(broker: Broker, connection: Connection) -> None:
    assert broker.send_bytes(b"\x09nonsense") == 1
    await eventually(lambda: connection.is_closed)


async def test_reset_begins_anew_on_the_same_port(broker: Broker, connection: Connection, channel: Channel) -> None:
    await channel.declare_queue("q")
    broker.delay_confirms(60)
    lost = asyncio.ensure_future(publish(channel, b"1"))
    await eventually(lambda: broker.queues["q"].messages)
    broker.fail_next("queue.declare", 406)
    broker.block()
    broker.pause()
    broker.reset()
    await eventually(lambda: connection.is_closed)
    with pytest.raises(leveret.exceptions.PublishOutcomeUnknown):
        await lost
    broker.advance(61)
    assert dict(broker.queues) == {}
    async with await leveret.connect(broker.url) as again, again.channel() as fresh:
        await fresh.declare_queue("q")
        await publish(fresh, b"1")


async def test_an_ack_that_is_overdue(broker: Broker, channel: Channel) -> None:
    broker.set_consumer_timeout(60, tick=10)
    queue = await channel.declare_queue("q")
    await publish(channel, b"1")
    await queue.consume(lambda _: None)
    await eventually(lambda: broker.queues["q"].unacked == 1)
    broker.advance(50)
    assert broker.queues["q"].unacked == 1
    broker.advance(30)
    await eventually(lambda: channel.is_closed)
    assert broker.queues["q"].bodies == [b"1"]


# ---------------------------------------------------------------------------------------------------------- users


async def test_the_url_is_for_the_first_user_and_virtual_host() -> None:
    async with Broker(users={"a:b/c": "p@%#"}, vhosts=("v/1", "/")) as broker:
        async with await leveret.connect(broker.url):
            [seen] = broker.connections
        assert (seen.user, seen.vhost) == ("a:b/c", "v/1")


async def test_users_have_their_permissions_and_limits() -> None:
    nothing = Permissions("", "", "")
    users = {"guest": "guest", "limited": "pw"}
    async with Broker(users=users, permissions={"limited": {"/": nothing}}, vhosts=("/", "other")) as broker:
        url = broker.url.replace("guest:guest", "limited:pw")
        async with await leveret.connect(url) as connection:
            async with connection.channel() as channel:
                with pytest.raises(ChannelAccessRefused, match="configure access to queue 'q' in vhost '/' refused"):
                    await channel.declare_queue("q")
            broker.set_permissions("limited")
            async with connection.channel() as channel:
                await channel.declare_queue("q")
        with pytest.raises(leveret.exceptions.ConnectionNotAllowed, match="access to vhost 'other' refused"):
            await leveret.connect(f"{url}other")
        with pytest.raises(leveret.exceptions.LoginRefused):
            await leveret.connect(broker.url.replace("guest:guest", "guest:wrong"))
        with pytest.raises(ValueError, match="no user 'nobody'"):
            broker.set_permissions("nobody")


# ------------------------------------------------------------------------------------------------- other clients


async def test_aio_pika_knows_no_difference(broker: Broker) -> None:
    aio_pika = pytest.importorskip("aio_pika")
    connection = await aio_pika.connect_robust(broker.url)
    async with connection:
        channel = await connection.channel()
        queue = await channel.declare_queue("q", auto_delete=True)
        await channel.default_exchange.publish(aio_pika.Message(b"hello", headers={"k": [1, "two"]}), "q")
        async with queue.iterator() as messages:
            async for message in messages:
                assert (message.body, message.headers) == (b"hello", {"k": [1, "two"]})
                await message.ack()
                break
    assert await eventually(lambda: broker.connections == ())
    assert "q" not in broker.queues


async def test_a_client_that_vanishes_gives_back_what_it_had(broker: Broker, channel: Channel) -> None:
    await channel.declare_queue("q")
    await publish(channel, b"1", b"2")
    other = await leveret.connect(broker.url, name="other")
    theirs = await other.channel()
    await theirs.declare_queue("own", exclusive=True)
    message = await (await theirs.get_queue("q")).get()
    assert message.body == b"1"
    broker.drop_connections("other")
    await eventually(lambda: broker.queues["q"].bodies == [b"1", b"2"])
    assert "own" not in broker.queues
    await other.close()


async def test_a_consumer_that_does_not_read_fills_no_memory(broker: Broker, channel: Channel) -> None:
    """What the socket does not take stays in the queue, where it is anyway."""
    queue = await channel.declare_queue("q")
    body = b"x" * 100_000
    for _ in range(300):
        await channel.default_exchange.publish(Message(body), queue.name)
    reader, writer = await asyncio.open_connection("127.0.0.1", broker.port, limit=1)
    frames = [
        (0, b"\0\x0a\0\x0b" + b"\0\0\0\0" + b"\x05PLAIN" + b"\0\0\0\x0c\0guest\0guest" + b"\x05en_US"),
        (0, struct.pack(">HHHIH", 10, 31, 2047, 131_072, 0)),
        (0, b"\0\x0a\0\x28\x01/\0\0"),
        (1, b"\0\x14\0\x0a\0"),
        (1, b"\0\x3c\0\x14\0\0\x01q\0\x02" + b"\0\0\0\0"),
    ]
    writer.write(b"AMQP\0\0\x09\x01")
    for number, payload in frames:
        writer.write(struct.pack(">BHI", 1, number, len(payload)) + payload + b"\xce")
    await reader.readexactly(1)
    await eventually(lambda: broker.consumers)
    sessions = [each for each in broker._server.sessions if not each.can_write]
    await eventually(lambda: [each for each in broker._server.sessions if not each.can_write])
    assert len(broker.queues["q"].messages) > 100
    assert sum(each._out_size for each in sessions) < 1_000_000
    writer.transport.abort()
    await eventually(lambda: not broker.consumers)
