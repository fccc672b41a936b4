"""The nodes that the broker tests stand on: right version, every listener, every fault."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from typing import TYPE_CHECKING

import pytest
from pamqp import commands, frame

from tests.support.node import AMQP_HEADER, Node, server_version

if TYPE_CHECKING:
    from tests.support.brokers import RemoteBroker, TLSAuthority


def greeting(sock: socket.socket) -> commands.Connection.Start:
    """What the broker says to a client that sent the protocol header."""
    sock.sendall(AMQP_HEADER)
    with sock.makefile("rb") as stream:
        head = stream.read(7)
        start = frame.unmarshal(head + stream.read(int.from_bytes(head[3:]) + 1))[2]
    assert isinstance(start, commands.Connection.Start)
    return start


def greeting_over_tls(node: Node, context: ssl.SSLContext) -> commands.Connection.Start:
    with (
        socket.create_connection(("127.0.0.1", node.tls_port), 5) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as sock,
    ):
        return greeting(sock)


def test_url(amqp_url: str, broker: Node | RemoteBroker) -> None:
    assert amqp_url.startswith("amqp")
    assert broker.version_info >= (3, 10)


@pytest.mark.node
def test_server_reports_the_wanted_version(broker: Node, broker_version: str) -> None:
    assert server_version("127.0.0.1", broker.port).startswith(broker_version.removeprefix("testing-"))


@pytest.mark.node
def test_listeners_offer_their_mechanisms(broker: Node, tls_authority: TLSAuthority) -> None:
    with socket.create_connection(("127.0.0.1", broker.port), 5) as sock:
        assert set(greeting(sock).mechanisms.split()) == {"PLAIN", "AMQPLAIN"}
    context = tls_authority.client_context(cert=True)
    assert set(greeting_over_tls(broker, context).mechanisms.split()) == {"PLAIN", "AMQPLAIN", "EXTERNAL"}


@pytest.mark.node
def test_tls_listener_is_not_trusted_by_default(broker: Node) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        greeting_over_tls(broker, ssl.create_default_context())


@pytest.mark.node
def test_user_for_external_is_there(broker: Node) -> None:
    assert "alice" in broker.ctl("list_users")


@pytest.mark.one_version
async def test_own_broker_freezes_dies_and_comes_back(own_broker: Node, broker_version: str) -> None:
    own_broker.freeze()
    with pytest.raises(TimeoutError):
        server_version("127.0.0.1", own_broker.port, timeout=0.3)
    own_broker.thaw()
    assert server_version("127.0.0.1", own_broker.port, timeout=10).startswith(broker_version.removeprefix("testing-"))

    reader, writer = await asyncio.open_connection("127.0.0.1", own_broker.port)
    writer.write(AMQP_HEADER)
    await reader.readexactly(1)
    own_broker.kill()
    with contextlib.suppress(ConnectionResetError):
        await reader.read()
    writer.close()
    with pytest.raises(ConnectionRefusedError):
        server_version("127.0.0.1", own_broker.port)

    await asyncio.to_thread(own_broker.start)
    assert own_broker.alarms() == "[]"
