"""How connecting fails: whatever the peer does, in time, with one kind of error, and without a socket left."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
from collections.abc import Awaitable, Callable

import pytest
from pamqp import commands, frame, heartbeat

from leveret import Connection, connect
from leveret.exceptions import (
    AMQPConnectionError,
    AMQPError,
    AuthenticationError,
    ConnectionClosed,
    ConnectionInternalError,
    ConnectionNotAllowed,
    ConnectTimeout,
    IncompatibleProtocolError,
    LoginRefused,
    ProbableAuthenticationError,
)
from leveret.url import ConnectionParameters
from leveret.wire.transport import _explain_connect
from tests.protocol.kit import hang_up, linked, raw_frame, run_strictly, sockets, turns, until, within
from tests.support.peer import CAPABILITIES, PeerError, ScriptedPeer, Session

PROPERTIES = {"product": "RabbitMQ", "version": "4.0.5", "capabilities": CAPABILITIES}
START = frame.marshal(commands.Connection.Start(0, 9, PROPERTIES, "PLAIN AMQPLAIN", "en_US"), 0)
TUNE = frame.marshal(commands.Connection.Tune(2047, 131_072, 0), 0)
OPEN_OK = frame.marshal(commands.Connection.OpenOk(), 0)
STAGES = ("greeting", "start", "tune", "open")
Act = Callable[[Session], Awaitable[None] | None]


async def play_until(session: Session, stage: str) -> None:
    """Play the handshake until the client waits for what follows *stage*."""
    await session.expect_header()
    if stage == "greeting":
        return
    session.send(0, START)
    await session.expect(commands.Connection.StartOk)
    if stage == "start":
        return
    session.send(0, TUNE)
    await session.expect(commands.Connection.TuneOk)
    await session.expect(commands.Connection.Open)
    if stage == "tune":
        return
    session.send(0, OPEN_OK)


async def fail_to_connect(
    script: Callable[[Session], Awaitable[None]], kind: type[BaseException] = AMQPConnectionError, query: str = ""
) -> BaseException:
    """Connect to a peer with which that must fail; the error, after checking that no socket is left."""
    async with ScriptedPeer(script) as peer:
        before = sockets()
        with pytest.raises(kind) as caught:
            await within(connect(f"{peer.url}?connect_timeout=0.2&{query}"), 2.5)
        ours = sockets() - before
        for session in peer.sessions:
            session._writer.transport.abort()
        await turns()
        assert not (sockets() - before), f"sockets left: {ours}"
        assert "guest:guest" not in str(caught.value)
    return caught.value


@contextlib.contextmanager
def gone() -> contextlib.AbstractContextManager[None]:  # type: ignore[misc]
    """Waiting for the client's end: it may close or reset."""
    with contextlib.suppress(PeerError):
        yield


# ------------------------------------------------------------------------------------------------- silence, EOF


@pytest.mark.parametrize("stage", STAGES[:3])
async def test_silence_at_any_stage_is_a_timeout_that_names_the_stage(stage: str) -> None:
    async def script(session: Session) -> None:
        await play_until(session, stage)
        await session.closed()

    error = await fail_to_connect(script, ConnectTimeout)
    assert isinstance(error, TimeoutError)
    waiting = {"greeting": "connection.start", "start": "connection.tune", "tune": "connection.open-ok"}[stage]
    assert waiting in str(error)


async def test_silence_before_open_ok_names_what_was_negotiated() -> None:
    async def script(session: Session) -> None:
        await play_until(session, "tune")
        await session.closed()

    assert "frame_max 131072" in str(await fail_to_connect(script, ConnectTimeout))


async def test_heartbeats_do_not_prolong_a_stage() -> None:
    async def script(session: Session) -> None:
        await play_until(session, "start")
        loop = asyncio.get_running_loop()
        handle = [loop.call_later(0.05 * n, session.send_heartbeat) for n in range(40)]
        await session.closed(timeout=1)
        for timer in handle:
            timer.cancel()

    await fail_to_connect(script, ConnectTimeout)


@pytest.mark.parametrize("how", ["eof", "reset"])
@pytest.mark.parametrize("stage", STAGES[:3])
async def test_the_peer_hangs_up_at_any_stage(stage: str, how: str) -> None:
    async def script(session: Session) -> None:
        await play_until(session, stage)
        getattr(session, how)()
        if how == "eof":
            await session.closed()

    error = await fail_to_connect(script, ProbableAuthenticationError if stage == "start" else AMQPConnectionError)
    assert ("login" in str(error)) == (stage == "start")


@pytest.mark.parametrize("how", ["eof", "reset"])
async def test_hanging_up_right_after_open_ok_is_told_by_connect_or_by_the_first_use(how: str) -> None:
    async def script(session: Session) -> None:
        await play_until(session, "open")
        getattr(session, how)()

    async with ScriptedPeer(script) as peer:
        connection = None
        try:
            connection = await within(connect(f"{peer.url}?connect_timeout=0.2"))
            await within(connection.closed())
            with pytest.raises(AMQPError):
                await connection.channel()
        except AMQPConnectionError:
            assert connection is None


@pytest.mark.parametrize("how", ["eof", "reset"])
async def test_every_cut_of_the_handshake_is_an_AMQPConnectionError(how: str) -> None:  # noqa: N802
    stages = (b"", START, TUNE, OPEN_OK)
    total = sum(map(len, stages))

    async def script(session: Session) -> None:
        left = session.number
        await session.expect_header()
        for stage in (START, TUNE, OPEN_OK):
            if stage is TUNE:
                await session.expect(commands.Connection.StartOk)
            if stage is OPEN_OK:
                await session.expect(commands.Connection.TuneOk)
                await session.expect(commands.Connection.Open)
            session.send_raw(stage[:left])
            left -= len(stage)
            if left < 0:
                break
        getattr(session, how)()
        if how == "eof":
            await session.closed()

    async with ScriptedPeer(script) as peer:
        before = len(sockets())
        for cut in range(total):
            with pytest.raises(AMQPConnectionError):
                await within(connect(f"{peer.url}?connect_timeout=1"))
            assert len(peer.sessions) == cut + 1
            peer.sessions[cut]._writer.transport.abort()
        await turns()
        assert len(sockets()) <= before


async def test_the_handshake_byte_by_byte() -> None:
    async def script(session: Session) -> None:
        async def trickle(data: bytes) -> None:
            for i in range(len(data)):
                session.send_raw(data[i : i + 1])
                await session.drain()
                await asyncio.sleep(0)

        await session.expect_header()
        await trickle(START)
        await session.expect(commands.Connection.StartOk)
        await trickle(TUNE)
        await session.expect(commands.Connection.TuneOk)
        await session.expect(commands.Connection.Open)
        await trickle(OPEN_OK)
        await session.play_close()

    async with ScriptedPeer(script) as peer, await within(connect(peer.url)) as connection:
        assert connection.server_properties["version"] == "4.0.5"


# ------------------------------------------------------------------------------------------------------ garbage


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", "management port"),
        (b"\x15\x03\x03\x00\x02\x02\x46", "amqps://"),
        (b"\x15\x03\x01\x00\x02\x02\x0a", "amqps://"),
        (b"AMQP\x03\x01\x00\x00", "AMQP 1.0.0"),
        (b"AMQP\x00\x01\x00\x00", "AMQP 1.0.0"),
        (b"AMQP\x00\x00\x09\x01", "0-9-1"),
        (b"220 mail.example.org ESMTP\r\n", "220 mail"),
        (b"-ERR unknown command\r\n", "-ERR unknown"),
        (b"\x00" * 16, "does not speak AMQP"),
        (b"\xff" * 16, "does not speak AMQP"),
        (b"\x01" * 16, "does not speak AMQP"),
        (b"\x02" * 16, "does not speak AMQP"),
        (b"\x08" * 16, "does not speak AMQP"),
        (random.Random(1).randbytes(64), "does not speak AMQP"),
    ],
)
@pytest.mark.expects_errors
async def test_garbage_says_what_answered(answer: bytes, hint: str) -> None:
    async def script(session: Session) -> None:
        await session.expect_header()
        session.send_raw(answer)
        with contextlib.suppress(PeerError, ValueError):
            await session.closed()

    assert hint in str(await fail_to_connect(script, IncompatibleProtocolError))


@pytest.mark.parametrize("length", range(1, 8))
async def test_garbage_shorter_than_a_frame_and_a_hang_up(length: int) -> None:
    async def script(session: Session) -> None:
        await session.expect_header()
        session.send_raw(b"HTTP/1.1 400"[:length])
        session.eof()
        await session.closed()

    await fail_to_connect(script)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.expects_errors
async def test_random_bytes_are_never_another_exception(seed: int) -> None:
    rng = random.Random(seed)
    answer = bytes([rng.choice([1, 2, 3, 8, rng.randrange(256)])]) + rng.randbytes(rng.randrange(8, 200))

    async def script(session: Session) -> None:
        await session.expect_header()
        session.send_raw(answer)
        session.eof()
        with contextlib.suppress(PeerError, ValueError):
            await session.closed()

    await fail_to_connect(script, AMQPConnectionError)


# ---------------------------------------------------------------------------------- refusals and broken protocol


@pytest.mark.parametrize("stage", STAGES[:3])
@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (403, LoginRefused),
        (530, ConnectionNotAllowed),
        (320, ConnectionClosed),
        (541, ConnectionInternalError),
    ],
)
async def test_connection_close_at_any_stage_is_answered_and_told(
    stage: str, code: int, kind: type[AMQPConnectionError]
) -> None:
    async def script(session: Session) -> None:
        await play_until(session, stage)
        session.send(0, commands.Connection.Close(code, "SOME_REASON - in words", 10, 40))
        await session.expect(commands.Connection.CloseOk, channel=0)
        await hang_up(session)

    error = await fail_to_connect(script, kind)
    assert "in words" in str(error)
    closed = error if isinstance(error, ConnectionClosed) else error.__cause__
    assert isinstance(closed, ConnectionClosed)
    assert (closed.reply_code, closed.by_broker, closed.class_id, closed.method_id) == (code, True, 10, 40)
    assert closed.retryable is (code in {320, 541})


@pytest.mark.parametrize(
    "wrong",
    [
        commands.Connection.OpenOk(),
        commands.Connection.CloseOk(),
        commands.Connection.Blocked("low"),
        commands.Connection.UpdateSecretOk(),
        commands.Channel.OpenOk(),
        commands.Basic.Ack(1),
    ],
    ids=lambda method: method.name,
)
@pytest.mark.parametrize("stage", STAGES[:3])
@pytest.mark.expects_errors
async def test_a_method_out_of_place_closes_with_503(stage: str, wrong: commands.Connection.OpenOk) -> None:
    if stage == "tune" and isinstance(wrong, commands.Connection.OpenOk):
        pytest.skip("in place")

    async def script(session: Session) -> None:
        await play_until(session, stage)
        session.send(0, wrong)
        _, close = await session.expect(commands.Connection.Close, channel=0)
        assert close.reply_code in {503, 504}
        await hang_up(session)

    error = await fail_to_connect(script, AMQPConnectionError)
    assert wrong.name in str(error)


@pytest.mark.expects_errors
async def test_a_protocol_error_while_connecting_is_an_AMQPConnectionError_too() -> None:  # noqa: N802
    """`connect()` documents AMQPConnectionError for everything but the caller's mistakes."""

    async def script(session: Session) -> None:
        await play_until(session, "greeting")
        session.send(0, TUNE)
        await session.expect(commands.Connection.Close, channel=0)
        await hang_up(session)

    await fail_to_connect(script, AMQPConnectionError)


async def test_a_heartbeat_as_the_first_word_is_tolerated() -> None:
    async def script(session: Session) -> None:
        session.send_heartbeat()
        await session.handshake()
        await session.play_close()

    async with ScriptedPeer(script) as peer, await within(connect(peer.url)):
        pass


@pytest.mark.expects_errors
async def test_a_frame_over_8_KiB_before_tune_is_refused_on_its_head() -> None:  # noqa: N802
    async def script(session: Session) -> None:
        await session.expect_header()
        session.send_raw(b"\x01\x00\x00" + (8193 - 8).to_bytes(4, "big"))  # and not a byte of the payload
        _, close = await session.expect(commands.Connection.Close, channel=0)
        assert close.reply_code == 501
        await hang_up(session)

    assert "8193" in str(await fail_to_connect(script, AMQPError))


async def test_a_frame_of_8_KiB_before_tune_is_taken() -> None:  # noqa: N802
    async def script(session: Session) -> None:
        await session.expect_header()
        properties = {**PROPERTIES, "filler": ""}
        size = len(frame.marshal(commands.Connection.Start(0, 9, properties, "PLAIN", "en_US"), 0))
        properties["filler"] = "x" * (8192 - size)
        start = frame.marshal(commands.Connection.Start(0, 9, properties, "PLAIN", "en_US"), 0)
        assert len(start) == 8192
        session.send(0, start)
        await session.expect(commands.Connection.StartOk)
        session.send(0, commands.Connection.Close(320, "bye", 0, 0))
        await session.expect(commands.Connection.CloseOk)
        await hang_up(session)

    assert isinstance(await fail_to_connect(script), ConnectionClosed)


@pytest.mark.expects_errors
async def test_malformed_server_properties_are_a_protocol_error() -> None:
    async def script(session: Session) -> None:
        await session.expect_header()
        session.send_raw(raw_frame(1, 0, b"\x00\x0a\x00\x0a\x00\x09\x00\x00\x00\xff\x01aZ"))
        _, close = await session.expect(commands.Connection.Close, channel=0)
        assert close.reply_code in {501, 502}
        await hang_up(session)

    await fail_to_connect(script, AMQPError)


async def test_mechanisms_without_ours_are_named() -> None:
    async def script(session: Session) -> None:
        await session.expect_header()
        session.send(0, commands.Connection.Start(0, 9, PROPERTIES, "KERBEROS ANONYMOUS", "en_US"))
        await session.closed()

    error = str(await fail_to_connect(script, AuthenticationError))
    assert "KERBEROS" in error
    assert "PLAIN" in error


async def test_another_version_of_AMQP_in_start() -> None:  # noqa: N802
    async def script(session: Session) -> None:
        await session.expect_header()
        session.send(0, commands.Connection.Start(8, 0, PROPERTIES, "PLAIN", "en_US"))
        await session.closed()

    await fail_to_connect(script, IncompatibleProtocolError)


async def test_connection_secure_is_an_AuthenticationError() -> None:  # noqa: N802
    async def script(session: Session) -> None:
        await play_until(session, "start")
        session.send(0, commands.Connection.Secure("challenge"))
        await session.closed()

    await fail_to_connect(script, AuthenticationError)


# -------------------------------------------------------------------------------------------------- negotiation


@pytest.mark.parametrize(
    ("query", "tune", "agreed"),
    [  # (channel_max, frame_max, heartbeat)
        ("", (2047, 131_072, 60), (2047, 131_072, 60)),
        ("", (0, 0, 0), (2047, 131_072, 60)),
        ("", (100, 8192, 10), (100, 8192, 10)),
        ("", (65_535, 1_000_000, 600), (2047, 131_072, 60)),
        ("channel_max=0", (0, 0, 0), (65_535, 131_072, 60)),
        ("channel_max=5&frame_max=10000&heartbeat=7", (0, 0, 60), (5, 10_000, 7)),
        ("channel_max=5&frame_max=10000&heartbeat=70", (3, 9000, 60), (3, 9000, 70)),
        ("heartbeat=0", (0, 0, 60), (2047, 131_072, 0)),
    ],
)
async def test_tune_is_negotiated(query: str, tune: tuple[int, int, int], agreed: tuple[int, int, int]) -> None:
    channel_max, frame_max, interval = tune
    async with linked(query=query, channel_max=channel_max, frame_max=frame_max, heartbeat=interval) as link:
        answer = link.session.tune_ok
        assert (answer.channel_max, answer.frame_max, answer.heartbeat) == agreed


@pytest.mark.parametrize("frame_max", [1, 4096, 8191])
async def test_a_frame_max_under_8192_is_refused_by_name(frame_max: int) -> None:
    async def script(session: Session) -> None:
        await play_until(session, "start")
        session.send(0, commands.Connection.Tune(0, frame_max, 0))
        await session.closed()

    assert f"{frame_max} bytes (frame_max)" in str(await fail_to_connect(script))


async def test_the_negotiated_frame_max_splits_bodies() -> None:
    async with linked(frame_max=8192) as link:
        channel = await link.channel()
        from leveret import Message

        publish = asyncio.ensure_future(channel.default_exchange.publish(Message(b"x" * 20_000), "key"))
        *_, data = await link.session.expect_publish()  # the peer refuses larger frames
        assert len(data) == 20_000
        link.session.send(1, commands.Basic.Ack(1))
        await within(publish)


async def test_login_vhost_and_client_properties_go_out() -> None:
    async def script(session: Session) -> None:
        await session.handshake()
        start_ok = session.start_ok
        assert (start_ok.mechanism, start_ok.response, session.open.virtual_host) == ("PLAIN", "\0us/er\0p@ss", "v/h")
        properties = start_ok.client_properties
        assert (properties["connection_name"], properties["answer"]) == ("me", 42)
        assert properties["capabilities"]["connection.blocked"] is True
        await session.play_close()

    async with ScriptedPeer(script) as peer:
        url = f"amqp://us%2Fer:p%40ss@127.0.0.1:{peer.port}/v%2Fh?name=me"
        async with await within(connect(url, client_properties={"answer": 42})):
            pass


# ---------------------------------------------------------------------------------------- cancellation, timeout


@pytest.mark.parametrize("stage", STAGES)
async def test_a_cancelled_connect_leaves_no_socket(stage: str) -> None:
    reached = asyncio.Event()

    async def script(session: Session) -> None:
        await play_until(session, stage)
        reached.set()
        with gone():
            async for _ in session.frames():
                pass

    async with ScriptedPeer(script) as peer:
        task = asyncio.create_task(connect(peer.url))
        await within(reached.wait())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await within(task)


CANCELLED_UNDER_UVLOOP = """
import asyncio
import uvloop
import leveret
from leveret.testing import Broker

async def main():
    async with Broker() as broker:
        for count in range(40):
            task = asyncio.create_task(leveret.connect(broker.url))
            for _ in range(count):
                await asyncio.sleep(0)
            task.cancel()
            _, pending = await asyncio.wait([task], timeout=5)
            assert not pending, f"cancelled after {count} turns, it goes on"
            if not task.cancelled():
                await task.result().close()

uvloop.run(main())
print("good")
"""


def test_a_cancelled_connect_ends_under_uvloop() -> None:
    """uvloop's create_connection(), when it is cancelled, calls connection_made() at times and no connection_lost()."""
    pytest.importorskip("uvloop")
    run = run_strictly(CANCELLED_UNDER_UVLOOP)
    assert run.stdout == "good\n", run.stderr


@pytest.mark.parametrize("count", range(12))
async def test_connect_cancelled_after_any_number_of_loop_turns_leaves_no_socket(count: int) -> None:
    async def script(session: Session) -> None:
        with contextlib.suppress(PeerError, ConnectionError):
            await session.handshake()
            await session.play_close()

    async with ScriptedPeer(script) as peer:
        before = sockets()
        task = asyncio.create_task(connect(peer.url))
        await turns(count)
        task.cancel()
        try:
            connection = await within(task)
        except asyncio.CancelledError:
            pass
        else:
            await connection.close()

        def is_tidy() -> bool:
            for session in peer.sessions:  # one may be accepted late
                session._writer.transport.abort()
            return len(sockets()) <= len(before)

        await until(is_tidy)


@pytest.mark.parametrize("stage", STAGES[:3])
async def test_connect_timeout_bounds_the_whole(stage: str) -> None:
    async def script(session: Session) -> None:
        await play_until(session, stage)
        with gone():
            await session.closed()

    async with ScriptedPeer(script) as peer:
        begun = asyncio.get_running_loop().time()
        with pytest.raises(ConnectTimeout, match=r"within 0\.1 s"):
            await within(connect(peer.url, timeout=0.1))
        assert asyncio.get_running_loop().time() - begun < 0.5


async def test_a_refused_port_is_told_with_its_address() -> None:
    async with ScriptedPeer() as peer:
        port = peer.port
    with pytest.raises(AMQPConnectionError, match=rf"127\.0\.0\.1:{port}"):
        await within(connect(f"amqp://127.0.0.1:{port}"))


async def test_a_refused_port_is_told_in_words_and_asks_for_the_broker() -> None:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    with pytest.raises(AMQPConnectionError) as caught:
        await connect(f"amqp://127.0.0.1:{port}/")
    assert str(caught.value) == f"cannot connect to 127.0.0.1:{port}: Connection refused. Is RabbitMQ running there?"


async def test_a_host_that_is_not_found_is_told_so_and_not_asked_for_its_broker() -> None:
    """RFC 2606 keeps `.invalid` free of hosts."""
    with pytest.raises(AMQPConnectionError) as caught:
        await connect("amqps://nobody.invalid/")
    assert str(caught.value).startswith("cannot find the host 'nobody.invalid': ")
    assert "RabbitMQ" not in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


async def test_a_host_that_cannot_be_a_name_is_a_mistake_of_the_url() -> None:
    with pytest.raises(ValueError, match=r"'a\.\.b' cannot be the name of a host"):
        await connect("amqps://a..b/")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "Multiple exceptions: [Errno 111] Connect call failed ('::1', 1, 0, 0), "
            "[Errno 111] Connect call failed ('127.0.0.1', 1)",
            "cannot connect to one:1: Connection refused. Is RabbitMQ running there?",
        ),
        (
            "Multiple exceptions: [Errno 101] Network is unreachable, [Errno 111] Connect call failed ('127.0.0.1', 1)",
            "cannot connect to one:1: Network is unreachable, Connection refused. Is RabbitMQ running there?",
        ),
        (
            "[Errno 113] Connect call failed ('10.0.0.1', 1)",
            "cannot connect to one:1: No route to host. Is the address right, and the network up?",
        ),
        ("something odd", "cannot connect to one:1: something odd. Is RabbitMQ running there?"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="numbers of errors are the system's")
def test_what_several_addresses_say_is_told_once(text: str, told: str) -> None:
    parameters = ConnectionParameters(host="one", port=1)
    assert str(_explain_connect(OSError(text), parameters)) == told


@pytest.mark.parametrize("stage", STAGES[:3])
async def test_close_during_connect_wins(stage: str) -> None:
    """Connection.close() "may be called at any time, in any state": no connection may come to life after it."""
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def script(session: Session) -> None:
        await play_until(session, stage)
        reached.set()
        with gone():
            await asyncio.wait_for(go_on.wait(), 2)
            for reply, answers in ((START, 1), (TUNE, 2), (OPEN_OK, 0))[STAGES.index(stage) :]:
                session.send(0, reply)
                for _ in range(answers):
                    await session.receive()
            async for _, value in session.frames():
                if isinstance(value, commands.Connection.Close):
                    session.send(0, commands.Connection.CloseOk())

    async with ScriptedPeer(script) as peer:
        connection = Connection(peer.url)
        connecting = asyncio.create_task(connection.connect())
        await within(reached.wait())
        await within(connection.close(timeout=1))
        go_on.set()
        try:
            with pytest.raises(AMQPConnectionError):
                await within(connecting)
            assert connection.is_closed
            assert not connection.connected.is_set()
        finally:
            connecting.cancel()
            transport = connection._transport
            if transport is not None and transport.is_open:
                transport.abort(ConnectionClosed("cleaning up"))
            await turns()


async def test_a_failed_connect_can_be_told_from_an_open_one() -> None:
    async def script(session: Session) -> None:
        await session.expect_header()

    async with ScriptedPeer(script) as peer:
        connection = Connection(f"{peer.url}?connect_timeout=0.05")
        with pytest.raises(ConnectTimeout):
            await within(connection.connect())
        assert not connection.connected.is_set()
        with pytest.raises((AMQPError, RuntimeError)):
            await connection.channel()
        await within(connection.close())


def test_a_heartbeat_frame_is_what_it_should_be() -> None:
    assert frame.marshal(heartbeat.Heartbeat(), 0) == raw_frame(8, 0, b"")
