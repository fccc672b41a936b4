"""The scripted peer, the proxy, and what lets tests run in several processes do what the tests rely on."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest
from pamqp import body, commands, frame, header, heartbeat

from tests.support import ports
from tests.support.parallel import group_of
from tests.support.peer import PeerError, ScriptedPeer, Session
from tests.support.proxy import FaultProxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from typing import Any

    Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

pytestmark = pytest.mark.timeout(20)


# -------------------------------------------------------------------------------------------------- the peer


@contextlib.asynccontextmanager
async def client(port: int) -> AsyncIterator[Streams]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def read(reader: asyncio.StreamReader) -> Any:
    head = await reader.readexactly(7)
    return frame.unmarshal(head + await reader.readexactly(int.from_bytes(head[3:]) + 1))[2]


async def shake(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, frame_max: int = 131_072) -> None:
    writer.write(b"AMQP\x00\x00\x09\x01")
    assert isinstance(await read(reader), commands.Connection.Start)
    writer.write(frame.marshal(commands.Connection.StartOk({}, "PLAIN", "\0guest\0guest", "en_US"), 0))
    assert isinstance(await read(reader), commands.Connection.Tune)
    writer.write(frame.marshal(commands.Connection.TuneOk(2047, frame_max, 0), 0))
    writer.write(frame.marshal(commands.Connection.Open("/"), 0))
    assert isinstance(await read(reader), commands.Connection.OpenOk)


async def test_peer_plays_a_whole_conversation() -> None:
    async def script(session: Session) -> None:
        await session.handshake()
        assert session.open.virtual_host == "/"
        channel = await session.open_channel(confirm=True)
        _, publish, head, data = await session.expect_publish()
        assert (channel, publish.routing_key, head.body_size, data) == (3, "key", 5, b"hello")
        session.send(channel, commands.Basic.Ack(1))
        session.deliver(channel, "tag", 1, b"x" * 10_000)
        await session.play_close()

    async with ScriptedPeer(script) as peer, client(peer.port) as (reader, writer):
        await shake(reader, writer, frame_max=8192)
        writer.write(frame.marshal(commands.Channel.Open(), 3) + frame.marshal(commands.Confirm.Select(), 3))
        assert isinstance(await read(reader), commands.Channel.OpenOk)
        assert isinstance(await read(reader), commands.Confirm.SelectOk)
        writer.write(frame.marshal(commands.Basic.Publish(routing_key="key"), 3))
        writer.write(frame.marshal(heartbeat.Heartbeat(), 0))
        writer.write(frame.marshal(header.ContentHeader(0, 5, commands.Basic.Properties()), 3))
        writer.write(frame.marshal(body.ContentBody(b"hel"), 3) + frame.marshal(body.ContentBody(b"lo"), 3))
        assert isinstance(await read(reader), commands.Basic.Ack)
        assert isinstance(await read(reader), commands.Basic.Deliver)
        assert (await read(reader)).body_size == 10_000
        assert [len((await read(reader)).value) for _ in range(2)] == [8184, 1816]
        writer.write(frame.marshal(commands.Connection.Close(200, "bye", 0, 0), 0))
        assert isinstance(await read(reader), commands.Connection.CloseOk)
        assert await reader.read() == b""


async def play(script: Callable[[Session], Awaitable[None]], *sent: bytes, timeout: float = 5) -> None:
    """Send bytes to a peer, wait until it closes, and leave."""
    async with ScriptedPeer(script, timeout=timeout) as peer, client(peer.port) as (reader, writer):
        writer.writelines(sent)
        with contextlib.suppress(ConnectionResetError):
            await reader.read()


async def test_peer_raises_what_its_script_raised() -> None:
    async def script(session: Session) -> None:
        await session.expect_header()
        await session.expect(commands.Queue.Declare)

    with pytest.raises(PeerError, match=r"Queue\.Declare was expected, not .*Channel\.Open"):
        await play(script, b"AMQP\x00\x00\x09\x01", frame.marshal(commands.Channel.Open(), 1))


async def test_peer_does_not_wait_for_ever() -> None:
    async def script(session: Session) -> None:
        await session.expect_header()
        await session.expect(commands.Connection.StartOk)

    with pytest.raises(PeerError, match=r"no Connection\.StartOk in time; received so far: nothing"):
        await play(script, b"AMQP\x00\x00\x09\x01", timeout=0.05)


async def test_peer_tells_that_the_client_went_away() -> None:
    async def script(session: Session) -> None:
        await session.expect_header()
        session.eof()
        await session.expect(commands.Connection.StartOk)

    with pytest.raises(PeerError, match="the client went away"):
        await play(script, b"AMQP\x00\x00\x09\x01")


# ------------------------------------------------------------------------------------------------- the proxy


@contextlib.asynccontextmanager
async def echo_through_proxy(cut: Any = "rst") -> AsyncIterator[FaultProxy]:
    """A proxy before a server that sends back what it gets."""
    tasks: set[asyncio.Task[None]] = set()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(echo(reader, writer)))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with FaultProxy("127.0.0.1", server.sockets[0].getsockname()[1], cut) as proxy:
        yield proxy
    server.close()
    await asyncio.wait_for(asyncio.gather(*tasks), 5)


async def test_proxy_passes_bytes_slices_and_records() -> None:
    async with echo_through_proxy() as proxy, client(proxy.port) as (reader, writer):
        proxy.down.slice, proxy.up.record = 1, True
        proxy.up.mangle = bytes.upper
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"HELLO"
        assert (bytes(proxy.up.log), proxy.down.bytes, proxy.connections) == (b"HELLO", 5, 1)


@pytest.mark.parametrize(("cut", "ending"), [("rst", ConnectionResetError), ("fin", None)])
async def test_proxy_cuts_after_n_bytes(cut: str, ending: type[Exception] | None) -> None:
    async with echo_through_proxy(cut) as proxy, client(proxy.port) as (reader, writer):
        proxy.up.cut_after = 3
        writer.write(b"hello")
        with pytest.raises(ending) if ending else contextlib.nullcontext():
            assert await reader.read() in (b"", b"hel")
        assert proxy.up.bytes == 3


async def test_proxy_stalls_and_swallows_until_it_is_healed() -> None:
    async with echo_through_proxy() as proxy, client(proxy.port) as (reader, writer):
        proxy.up.stall = True
        writer.write(b"late")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.readexactly(1), 0.05)
        proxy.heal()
        assert await reader.readexactly(4) == b"late"
        proxy.down.blackhole = True
        writer.write(b"lost")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.readexactly(1), 0.05)


async def test_proxy_limits_the_rate_and_adds_latency() -> None:
    loop = asyncio.get_running_loop()
    async with echo_through_proxy() as proxy, client(proxy.port) as (reader, writer):
        begun = loop.time()
        proxy.down.rate, proxy.up.latency = 10_000, 0.05
        writer.write(b"x" * 2_000)
        await reader.readexactly(2_000)
        assert loop.time() - begun > 0.15


async def test_proxy_refuses_and_accepts_again_on_its_port() -> None:
    async with echo_through_proxy() as proxy:
        await proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", proxy.port)
        await proxy.accept()
        proxy.silent = True
        async with client(proxy.port) as (reader, writer):
            writer.write(b"anybody there?")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.readexactly(1), 0.05)


@pytest.mark.parametrize(("fault", "ending"), [("rst", ConnectionResetError), ("fin", asyncio.IncompleteReadError)])
async def test_proxy_ends_open_connections(fault: str, ending: type[Exception]) -> None:
    async with echo_through_proxy() as proxy, client(proxy.port) as (reader, writer):
        writer.write(b"x")
        await reader.readexactly(1)
        end: Callable[[], Awaitable[None] | None] = getattr(proxy, fault)
        end()
        with pytest.raises(ending):
            await reader.readexactly(1)


# ---------------------------------------------------------------------------------------- several processes


def test_no_two_processes_share_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "3")
    shares: list[range] = []
    for worker in range(4):  # the fourth takes the place of the first, which crashed
        monkeypatch.setenv("PYTEST_XDIST_WORKER", f"gw{worker}")
        shares.append(ports.own_range())
    assert shares[0] == shares[3]
    assert len({*shares[0], *shares[1], *shares[2]}) == 3 * len(shares[0]) > 19_000


@pytest.mark.parametrize(
    ("nodeid", "group"),
    [
        ("tests/broker/test_tls.py::test_tls_versions[4.0-TLSv1.2]", "broker 4.0"),
        ("tests/broker/test_node.py::test_url[3.10]", "broker 3.10"),
        ("tests/chaos/test_leaks.py::test_channels[AMQP_URL]", "chaos AMQP_URL"),
        ("tests/broker/test_connecting.py::test_nobody_listens", None),
        ("tests/broker/test_connecting.py::test_a_wrong_url_is_a_value_error[http]", None),
    ],
)
def test_tests_that_share_nodes_run_in_one_process(nodeid: str, group: str | None) -> None:
    assert group_of(nodeid) == (group or nodeid)
