"""`leveret.testing.Broker` under misuse: threads that start and stop it, clients that do not read, frames that hurt."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from pamqp import commands

import leveret
from leveret.testing import Broker
from leveret.testing import session as sessions
from tests.broker.test_helpers import eventually
from tests.protocol.test_testing_wire import PUBLISH, Raw

if TYPE_CHECKING:
    from collections.abc import Iterator

    from leveret.testing.session import Session


@pytest.fixture
def broker() -> Iterator[Broker]:
    with Broker() as broker:
        yield broker


@pytest.fixture
def ready(broker: Broker) -> Iterator[Raw]:
    with Raw(broker.port) as client:
        yield open_channel(client)


def open_channel(client: Raw) -> Raw:
    client.log_in()
    assert client.open() == "0 Connection.OpenOk"
    client.method(1, commands.Channel.Open())
    assert client.receive() == "1 Channel.OpenOk"
    return client


def until(condition: object) -> None:
    deadline = time.monotonic() + 5
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def only_session(broker: Broker) -> Session:
    [session] = broker._server.sessions
    return session


def buffered(broker: Broker) -> int:
    session = only_session(broker)
    assert session._transport is not None
    return session._out_size + session._transport.get_write_buffer_size()


# ------------------------------------------------------------------------------------------------- starts and stops


async def test_another_loop_may_stop_it() -> None:
    broker = await Broker().start()
    connection = await leveret.connect(broker.url)
    await asyncio.to_thread(lambda: asyncio.run(broker.stop()))
    assert not broker.is_running
    assert broker._server.sessions == {}
    await eventually(lambda: connection.is_closed)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", broker.port), 5)


async def test_stop_thread_stops_one_that_runs_in_a_loop_elsewhere_and_refuses_where_it_would_wait_for_itself() -> None:
    broker = await Broker().start()
    with pytest.raises(RuntimeError, match=r"await stop\(\) in that loop"):
        broker.stop_thread()
    assert broker.is_running
    await asyncio.to_thread(broker.stop_thread)
    assert not broker.is_running


def test_a_loop_that_does_not_run_cannot_stop_it() -> None:
    loop = asyncio.new_event_loop()
    broker = loop.run_until_complete(Broker().start())
    with pytest.raises(RuntimeError, match="does not run"):
        broker.stop_thread()
    with pytest.raises(RuntimeError, match="does not run"):
        asyncio.run(broker.stop())
    loop.run_until_complete(broker.stop())
    loop.close()


def test_of_two_threads_that_start_it_one_does() -> None:
    def listening() -> int:
        return sum(each.name == "leveret-broker" for each in threading.enumerate())

    before = listening()
    for _ in range(10):
        broker = Broker()
        both = threading.Barrier(2)

        def start(broker: Broker = broker, both: threading.Barrier = both) -> str:
            both.wait(5)
            try:
                broker.start_thread()
            except RuntimeError as error:
                return str(error)
            return "started"

        with ThreadPoolExecutor(2) as pool:
            answers = [each.result(20) for each in [pool.submit(start), pool.submit(start)]]
        assert sorted("runs already" in each for each in answers) == [False, True]
        assert listening() == before + 1
        broker.stop_thread()
        assert listening() == before


def test_starts_and_stops_of_four_threads_leave_it_whole() -> None:
    broker = Broker()

    def churn() -> None:
        for _ in range(10):
            try:
                broker.start_thread()
            except RuntimeError as error:
                assert "runs already" in str(error)  # noqa: PT017
            broker.stop_thread()

    with ThreadPoolExecutor(4) as pool:
        for each in [pool.submit(churn) for _ in range(4)]:
            each.result(30)
    assert not broker.is_running
    with broker, Raw(broker.port) as client:
        assert client.greet() == "0 Connection.Start"


async def test_two_stops_at_once_do_no_harm() -> None:
    broker = await Broker().start()
    await asyncio.gather(broker.stop(), broker.stop())
    assert not broker.is_running


def test_a_tls_port_that_is_taken_frees_the_other_one() -> None:
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with Broker() as other, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        with pytest.raises(OSError, match="in use"):
            Broker(port, ssl_context=context, tls_port=other.port).start_thread()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 5)


def test_a_call_that_waits_too_long_says_for_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leveret.testing.controls.PATIENCE", 0.01)
    loop = asyncio.new_event_loop()
    broker = loop.run_until_complete(Broker().start())
    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(TimeoutError, match="drop_connections: the broker's loop"),
    ):
        pool.submit(broker.drop_connections).result(5)
    loop.run_until_complete(broker.stop())
    loop.close()


# ---------------------------------------------------------------------------------------------------- time


async def test_the_consumer_timeout_is_found_by_a_jump_of_years_at_once(broker: Broker) -> None:
    async with await leveret.connect(broker.url) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue("q", durable=True)
        await queue.consume(lambda message: None)
        await channel.default_exchange.publish(leveret.Message(b"1"), "q")
        await eventually(lambda: broker.queues["q"].unacked == 1)
        began = time.perf_counter()
        broker.advance(10 * 365 * 86_400)
        assert time.perf_counter() - began < 1
        assert broker.queues["q"].bodies == [b"1"]


async def test_small_steps_come_to_the_tick_as_well(broker: Broker) -> None:
    broker.set_consumer_timeout(10, tick=60)
    async with await leveret.connect(broker.url) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue("q", durable=True)
        await queue.consume(lambda message: None)
        await channel.default_exchange.publish(leveret.Message(b"1"), "q")
        await eventually(lambda: broker.queues["q"].unacked == 1)
        for _ in range(5):
            broker.advance(11)
        assert broker.queues["q"].unacked == 1
        broker.advance(11)
        assert broker.queues["q"].unacked == 0


# ------------------------------------------------------------------------------------------------ memory


def test_a_body_that_is_too_large_is_not_kept() -> None:
    with Broker(max_message_size=1000) as broker, Raw(broker.port) as client:
        open_channel(client)
        client.send(1, 1, PUBLISH + b"q")
        client.send(2, 1, struct.pack(">HHQH", 60, 0, 50_000, 0))
        for _ in range(49):
            client.send(3, 1, bytes(1000))
        client.method(2, commands.Channel.Open())
        assert client.receive() == "2 Channel.OpenOk"
        assert only_session(broker).channels[1].publisher._body == []
        client.send(3, 1, bytes(1000))
        assert client.receive() == (
            "1 406 PRECONDITION_FAILED - message size 50000 is larger than configured max size 1000 60.40"
        )


def test_messages_that_are_fetched_and_not_read_fill_no_memory(broker: Broker, ready: Raw) -> None:
    ready.method(1, commands.Queue.Declare(queue="q"))
    assert ready.receive() == "1 Queue.DeclareOk"
    body = bytes(100_000)
    ready.send(1, 1, PUBLISH + b"q")
    ready.send(2, 1, struct.pack(">HHQH", 60, 0, len(body), 0))
    ready.send(3, 1, body)
    until(lambda: "q" in broker.queues and broker.queues["q"].messages)
    for tag in range(1, 401):
        ready.method(1, commands.Basic.Get(queue="q"))
        ready.method(1, commands.Basic.Nack(tag, requeue=True))
    until(lambda: only_session(broker)._held)
    assert buffered(broker) < 2_000_000
    got = 0
    while got < 400:  # it reads at last, and nothing is missing
        got += ready.receive() == "1 Basic.GetOk"
    ready.receive(), ready.receive()
    ready.method(1, commands.Channel.Close(0, "", 0, 0))
    assert ready.receive() == "1 Channel.CloseOk"
    assert only_session(broker)._held is None


def test_returns_that_are_not_read_fill_no_memory(broker: Broker, ready: Raw) -> None:
    body = bytes(100_000)
    publish = b"\0\x3c\0\x28\0\0\0\x04nope\x01"  # mandatory
    stopped = threading.Event()

    def flood() -> None:
        for _ in range(300):
            ready.send(1, 1, publish)
            ready.send(2, 1, struct.pack(">HHQH", 60, 0, len(body), 0))
            ready.send(3, 1, body)
        stopped.set()

    thread = threading.Thread(target=flood, daemon=True)
    thread.start()
    assert not stopped.wait(1)  # in which a broker that takes all of it is long done
    assert buffered(broker) < 2_000_000
    got = 0
    while got < 300:
        got += ready.receive() == "1 Basic.Return"
    thread.join(5)
    assert stopped.is_set()


def test_a_client_that_does_not_read_is_not_taken_for_dead(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    with Raw(broker.port) as client:
        client.log_in()
        assert client.open(heartbeat=1) == "0 Connection.OpenOk"
        session = only_session(broker)
        broker._call(session.pause_writing)
        broker._call(session._hold)
        broker._call(lambda: setattr(session, "_heard", session._heard - 10))
        broker._call(session._keep_beating)
        assert broker.connections
        broker._call(session.resume_writing)
        broker._call(lambda: setattr(session, "_heard", session._heard - 10))
        broker._call(session._keep_beating)
        assert broker.connections == ()


def test_an_alarm_and_a_client_that_does_not_read_end_in_any_order(broker: Broker, ready: Raw) -> None:
    ready.method(1, commands.Queue.Declare(queue="q"))
    assert ready.receive() == "1 Queue.DeclareOk"
    session = only_session(broker)
    for order in (("unblock", "resume"), ("resume", "unblock")):
        broker.block()
        ready.send(1, 1, PUBLISH + b"q")
        ready.send(2, 1, struct.pack(">HHQH", 60, 0, 0, 0))
        until(lambda: session._is_blocked)
        broker._call(session.pause_writing)
        for step in order:
            assert session._held is not None
            broker._call(broker.unblock if step == "unblock" else session.resume_writing)
        assert session._held is None
        ready.method(1, commands.Queue.Purge(queue="q"))
        assert ready.receive() == "1 Queue.PurgeOk"


# ------------------------------------------------------------------------------------------------ frames that hurt


FAULTY_PROPERTIES = struct.pack(">HHQH", 60, 0, 0, 0x0100)
"""``expiration``, and nothing behind it."""


def test_a_flag_of_a_property_that_is_not_there(broker: Broker, ready: Raw) -> None:
    ready.method(1, commands.Queue.Declare(queue="q"))
    assert ready.receive() == "1 Queue.DeclareOk"
    ready.send(1, 1, PUBLISH + b"q")
    ready.send(2, 1, FAULTY_PROPERTIES)
    ready.method(2, commands.Channel.Open())
    assert ready.receive() == "2 Channel.OpenOk"
    assert broker.queues["q"].bodies == [b""]


@pytest.mark.parametrize(("value", "kind"), [([1], "array"), ({"a": 1}, "table")])
def test_a_type_of_queue_that_is_no_text(ready: Raw, value: object, kind: str) -> None:
    ready.method(1, commands.Queue.Declare(queue="q", arguments={"x-queue-type": value}))
    assert ready.receive() == (
        "1 406 PRECONDITION_FAILED - invalid arg 'x-queue-type' for queue 'q' in vhost '/': "
        f"{{unacceptable_type,{kind}}} 50.10"
    )


def test_a_binding_with_a_timestamp_beyond_all_dates(broker: Broker, ready: Raw) -> None:
    ready.method(1, commands.Queue.Declare(queue="q"))
    assert ready.receive() == "1 Queue.DeclareOk"
    arguments = b"\x01kT" + b"\xff" * 8
    bind = b"\0\x32\0\x14\0\0\x01q\x0aamq.direct\x01k\0" + struct.pack(">I", len(arguments)) + arguments
    ready.send(1, 1, bind)
    assert ready.receive() == "1 Queue.BindOk"
    ready.send(1, 1, bind)
    assert ready.receive() == "1 Queue.BindOk"
    assert len(broker.bindings) == 1


async def test_a_long_chain_of_dead_letters(broker: Broker) -> None:
    async with await leveret.connect(broker.url) as connection:
        channel = await connection.channel()
        for number in range(400):
            arguments = {
                "x-max-length": 0,
                "x-dead-letter-exchange": "",
                "x-dead-letter-routing-key": f"q{number + 1}",
            }
            await channel.declare_queue(f"q{number}", arguments=arguments)
        await channel.declare_queue("q400")
        await channel.default_exchange.publish(leveret.Message(b"1"), "q0")
        assert broker.queues["q400"].bodies == [b"1"]


@pytest.mark.expects_errors
def test_what_nobody_thought_of_costs_the_connection_and_is_logged_once(
    broker: Broker, ready: Raw, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stumble(*_: object) -> None:
        raise ZeroDivisionError("nobody thought of it")

    monkeypatch.setattr(sessions.Channel, "on_frame", stumble)
    with caplog.at_level(logging.ERROR):
        ready.method(1, commands.Queue.Declare(queue="q"))
        ready.method(1, commands.Queue.Declare(queue="q"))
        assert ready.receive() == "0 541 INTERNAL_ERROR - ZeroDivisionError: nobody thought of it 0.0"
    assert [each.name for each in caplog.records] == ["leveret.testing"]
    ready.method(0, commands.Connection.CloseOk())
    assert ready.receive() == "gone"


def test_whoever_does_not_finish_the_handshake_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_HANDSHAKE_TIMEOUT", 0.05)
    with Broker() as broker, Raw(broker.port) as client, Raw(broker.port) as other:
        open_channel(other)
        assert client.receive() == "gone"
        until(lambda: len(broker._server.sessions) == 1)
        other.method(2, commands.Channel.Open())
        assert other.receive() == "2 Channel.OpenOk"


# ------------------------------------------------------------------------------------------------ no limits


async def test_nothing_is_limited_where_0_says_so() -> None:
    async with Broker(frame_max=0, channel_max=0, heartbeat=0) as broker:
        async with await leveret.connect(broker.url) as connection, connection.channel() as channel:
            queue = await channel.declare_queue("q")
            await channel.default_exchange.publish(leveret.Message(bytes(1_000_000)), "q")
            assert len((await queue.get(no_ack=True)).body) == 1_000_000
        with Raw(broker.port) as client:
            await asyncio.to_thread(client.log_in)
            answer = await asyncio.to_thread(client.open, "/", frame_max=0, channel_max=0)
            assert answer == "0 Connection.OpenOk"


async def test_a_user_with_a_negative_limit_has_none() -> None:
    async with Broker() as broker:
        broker.set_limits("guest", connections=0)
        with pytest.raises(leveret.exceptions.AMQPConnectionError):
            await leveret.connect(broker.url)
        broker.set_limits("guest", connections=-1, channels=-1)
        async with await leveret.connect(broker.url) as connection:
            await connection.channel()
