"""Getting in: URL and keywords, logins, virtual hosts, what the broker sees, and every way to be refused."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest
from pamqp import commands
from yarl import URL

from leveret import Connection, connect
from leveret.exceptions import (
    AMQPConnectionError,
    AuthenticationError,
    ChannelInvalidStateError,
    ChannelNotFoundEntity,
    ConnectionNotAllowed,
    ConnectTimeout,
    HeartbeatTimeout,
    IncompatibleProtocolError,
    LoginRefused,
    ProbableAuthenticationError,
)
from tests.broker.test_helpers import eventually, everything_said
from tests.support.ports import free_port
from tests.support.proxy import FaultProxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.support.node import Node

SECRET = "s3cr3t-p4ssw0rd"


async def assert_usable(connection: Connection) -> None:
    async with connection.channel() as channel:
        assert (await channel.declare_queue(exclusive=True)).name


@pytest.fixture
async def proxy(amqp_url: str) -> AsyncIterator[FaultProxy]:
    url = URL(amqp_url)
    async with FaultProxy(url.host or "localhost", url.port or 5672) as proxy:
        yield proxy


@pytest.fixture
def vhost(broker: Node) -> Iterator[str]:
    """A virtual host whose name wants care, for guest only."""
    name = "a/b c"
    broker.add_vhost(name)
    yield name
    broker.delete_vhost(name)


@pytest.fixture
def bob(broker: Node) -> Iterator[None]:
    """A user with a password worth hiding."""
    broker.add_user("bob", SECRET)
    yield
    broker.delete_user("bob")


# ---------------------------------------------------------------------------------------------------- success


async def test_connects_by_url(amqp_url: str) -> None:
    async with await connect(amqp_url) as connection:
        assert connection.connected.is_set()
        assert not connection.is_closed
        assert connection.server_properties["product"] == "RabbitMQ"
        await connection.ready()
        await assert_usable(connection)
    assert connection.is_closed
    assert not connection.connected.is_set()


async def test_connects_by_yarl_url(amqp_url: str) -> None:
    async with await connect(URL(amqp_url)) as connection:
        await assert_usable(connection)


async def test_connects_by_keywords(amqp_url: str) -> None:
    url = URL(amqp_url)
    async with await connect(
        host=url.host or "localhost", port=url.port or 5672, login=url.user or "guest", password=url.password or "guest"
    ) as connection:
        await assert_usable(connection)


async def test_connects_with_a_class_of_its_own(amqp_url: str) -> None:
    class Mine(Connection):
        pass

    async with await connect(amqp_url, connection_class=Mine) as connection:
        assert type(connection) is Mine


@pytest.mark.node
async def test_virtual_host_by_url_and_by_keyword_is_the_same(broker: Node, vhost: str, name: str) -> None:
    url = f"{broker.url}{quote(vhost, safe='')}"
    async with await connect(url) as one, one.channel() as channel:
        await channel.declare_queue(name, auto_delete=True)
        async with await connect(host="127.0.0.1", port=broker.port, virtualhost=vhost) as two:
            assert (await (await two.channel()).get_queue(name)).name == name
        async with await connect(broker.url) as other:
            with pytest.raises(ChannelNotFoundEntity):
                await (await other.channel()).get_queue(name)


@pytest.mark.node
@pytest.mark.parametrize("mechanism", ["PLAIN", "AMQPLAIN"])
async def test_logs_in_by_mechanism(broker: Node, name: str, mechanism: str) -> None:
    async with await connect(broker.url, auth=mechanism.lower(), name=name) as connection:
        await assert_usable(connection)
        shown = await asyncio.to_thread(broker.ctl, "list_connections", "auth_mechanism", "client_properties")
    [line] = [line for line in shown.splitlines() if name in line]
    assert line.startswith(f"{mechanism}\t")


@pytest.mark.node
async def test_odd_characters_in_user_and_password(broker: Node) -> None:
    user, password = "us:er/@#?ä", "p%:/@#?&ö"
    await asyncio.to_thread(broker.ctl, "add_user", user, password)
    await asyncio.to_thread(broker.ctl, "set_permissions", user, ".*", ".*", ".*")
    async with await connect(
        f"amqp://{quote(user, safe='')}:{quote(password, safe='')}@127.0.0.1:{broker.port}/"
    ) as connection:
        await assert_usable(connection)
    async with await connect(port=broker.port, host="127.0.0.1", login=user, password=password) as connection:
        await assert_usable(connection)


@pytest.mark.node
async def test_name_and_client_properties_are_seen_at_the_broker(broker: Node, name: str) -> None:
    async with await connect(broker.url, name=name, client_properties={"service": "billing", "build": 7}):
        shown = await asyncio.to_thread(broker.ctl, "list_connections", "client_properties")
    [line] = [line for line in shown.splitlines() if name in line]
    assert f'{{"connection_name","{name}"}}' in line
    assert '{"service","billing"}' in line
    assert '{"build",7}' in line
    assert '{"product","leveret"}' in line
    assert '{"publisher_confirms",true}' in line


async def test_update_secret_is_accepted_and_kept_out_of_sight(amqp_url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with await connect(amqp_url) as connection:
        result = await connection.update_secret(SECRET, reason="rotation")
        assert isinstance(result, commands.Connection.UpdateSecretOk)
        assert connection.url.password == SECRET
        await assert_usable(connection)
        assert SECRET not in f"{connection} {connection!r} {caplog.text}"


# --------------------------------------------------------------------------------------------------- heartbeats


async def test_an_idle_connection_survives_by_heartbeats(amqp_url: str) -> None:
    async with await connect(amqp_url, heartbeat=1) as connection:
        with pytest.raises(TimeoutError):  # the broker drops a silent client after 3 s
            await asyncio.wait_for(connection.closed(), 3.5)
        await assert_usable(connection)


async def test_a_silent_broker_is_found_dead_after_two_heartbeats(proxy: FaultProxy) -> None:
    loop = asyncio.get_running_loop()
    async with await connect(proxy.url, heartbeat=1) as connection:
        errors: list[BaseException | None] = []
        connection.close_callbacks.add(lambda _, error: errors.append(error))
        proxy.down.blackhole = True
        began = loop.time()
        await asyncio.wait_for(connection.closed(), 5)
        assert loop.time() - began < 3.5
        [error] = errors
        assert isinstance(error, HeartbeatTimeout)


# ----------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.node
async def test_wrong_password_names_user_and_vhost_and_keeps_the_password(
    broker: Node, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(LoginRefused) as caught:
        await connect(f"amqp://guest:{SECRET}@127.0.0.1:{broker.port}/")
    error = caught.value
    assert isinstance(error, AuthenticationError)
    assert isinstance(error, ProbableAuthenticationError)
    assert "'guest'" in str(error)
    assert "'/'" in str(error)
    assert "localhost" in str(error)  # guest may log in from there only
    assert "ACCESS_REFUSED" in str(error)
    assert SECRET not in everything_said(error) + caplog.text


@pytest.mark.node
@pytest.mark.usefixtures("bob")
async def test_missing_virtual_host_is_not_allowed_and_named(broker: Node, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(ConnectionNotAllowed, match="vhost nope not found") as caught:
        await connect(f"amqp://bob:{SECRET}@127.0.0.1:{broker.port}/nope")
    error = caught.value
    assert (error.reply_code, error.by_broker, error.retryable) == (530, True, False)
    assert (error.class_id, error.method_id) == (10, 40)
    assert SECRET not in everything_said(error) + caplog.text


@pytest.mark.node
@pytest.mark.usefixtures("bob")
async def test_virtual_host_without_access_is_not_allowed_and_names_the_user(broker: Node, vhost: str) -> None:
    with pytest.raises(ConnectionNotAllowed, match="refused for user 'bob'") as caught:
        await connect(host="127.0.0.1", port=broker.port, login="bob", password=SECRET, virtualhost=vhost)
    assert SECRET not in everything_said(caught.value)


async def test_nobody_listens(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    port = free_port()
    with pytest.raises(AMQPConnectionError, match=rf"127\.0\.0\.1:{port}.*RabbitMQ") as caught:
        await connect(f"amqp://guest:{SECRET}@127.0.0.1:{port}/")
    assert isinstance(caught.value.__cause__, OSError)
    assert SECRET not in everything_said(caught.value) + caplog.text


async def test_an_http_server_is_recognised_at_once() -> None:
    def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", port := free_port()):
        with pytest.raises(IncompatibleProtocolError, match=r"HTTP/1\.1 400"):
            await asyncio.wait_for(connect(host="127.0.0.1", port=port), 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("amqp://", "http://"), "amqp and amqps"),
        (("guest@", f"{SECRET}#x@"), "percent-encode"),
        (("/", "/?heartbeat=abc"), "heartbeat"),
    ],
    ids=["http", "hash-in-password", "heartbeat"],
)
async def test_a_wrong_url_is_a_value_error(change: tuple[str, str], message: str) -> None:
    head, _, tail = "amqp://guest:guest@127.0.0.1:5672/".rpartition(change[0])
    with pytest.raises(ValueError, match=message) as caught:
        await connect(head + change[1] + tail)
    assert SECRET not in everything_said(caught.value)


async def test_an_unknown_parameter_warns_with_the_nearest(amqp_url: str) -> None:
    with pytest.warns(UserWarning, match="heartbeet.*heartbeat"):
        connection = await connect(amqp_url, heartbeet=5)
    await connection.close()


async def test_a_broker_that_never_answers_is_given_up_in_time(proxy: FaultProxy) -> None:
    proxy.silent = True
    with pytest.raises(ConnectTimeout, match=r"connection\.start"):
        await asyncio.wait_for(connect(proxy.url, connect_timeout=0.2), 5)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(connect(proxy.url, timeout=0.2), 5)


async def test_cancelled_connect_leaves_no_connection(proxy: FaultProxy) -> None:
    proxy.silent = True
    task = asyncio.create_task(connect(proxy.url))
    await eventually(lambda: proxy.connections)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: not proxy.connections)


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5, 0.7, 0.9])
async def test_a_link_cut_in_the_handshake_is_an_error_and_no_hang(proxy: FaultProxy, fraction: float) -> None:
    async with await connect(proxy.url):
        whole = proxy.down.bytes
    proxy.down.cut_after = int(whole * fraction)
    with pytest.raises(AMQPConnectionError):
        await asyncio.wait_for(connect(proxy.url), 5)


async def test_a_closed_connection_opens_no_channel(amqp_url: str) -> None:
    connection = await connect(amqp_url)
    await connection.close()
    with pytest.raises(ChannelInvalidStateError):
        await connection.channel()
    with pytest.raises(RuntimeError):
        await connection.connect()
    with pytest.raises(AMQPConnectionError):
        await connection.update_secret("x")


async def test_a_connection_that_was_never_opened_says_so(amqp_url: str) -> None:
    connection = Connection(amqp_url)
    with pytest.raises(RuntimeError, match="not opened"):
        connection.channel()
    with pytest.raises(RuntimeError, match="not opened"):
        await connection.update_secret("x")
    await connection.close()
    assert connection.is_closed
