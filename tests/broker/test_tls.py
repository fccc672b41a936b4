"""TLS: verified by default, certificates as logins, and mistakes that say what is wrong."""

from __future__ import annotations

import ssl
import warnings
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import pytest

from leveret import Connection, connect
from leveret.exceptions import AMQPConnectionError, AuthenticationError, LoginRefused
from tests.broker.test_helpers import drain, everything_said, fill

if TYPE_CHECKING:
    from tests.support.brokers import TLSAuthority
    from tests.support.node import Node

pytestmark = pytest.mark.node


async def assert_usable(connection: Connection) -> None:
    async with connection.channel() as channel:
        queue = await channel.declare_queue(exclusive=True)
        await fill(channel, queue, [bytes(300_000)])
        assert await drain(queue) == [bytes(300_000)]


async def test_a_ca_file_in_the_url(broker: Node, tls_authority: TLSAuthority) -> None:
    async with await connect(f"{broker.tls_url}?{urlencode({'cafile': tls_authority.ca_file})}") as connection:
        await assert_usable(connection)


async def test_rabbitmqs_own_spelling_in_the_url(broker: Node, tls_authority: TLSAuthority) -> None:
    query = urlencode(
        {"cacertfile": tls_authority.ca_file, "verify": "verify_peer", "server_name_indication": "localhost"}
    )
    async with await connect(f"{broker.tls_url}?{query}") as connection:
        await assert_usable(connection)


async def test_a_context(broker: Node, tls_authority: TLSAuthority) -> None:
    async with await connect(broker.tls_url, ssl_context=tls_authority.client_context()) as connection:
        await assert_usable(connection)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_tls_versions(broker: Node, tls_authority: TLSAuthority, version: ssl.TLSVersion) -> None:
    context = tls_authority.client_context()
    context.minimum_version = context.maximum_version = version
    async with await connect(broker.tls_url, ssl_context=context) as connection:
        await assert_usable(connection)


async def test_keywords_with_options(broker: Node, tls_authority: TLSAuthority) -> None:
    async with await connect(
        host="localhost", port=broker.tls_port, ssl=True, ssl_options={"cafile": str(tls_authority.ca_file)}
    ) as connection:
        await assert_usable(connection)


async def test_ca_data(broker: Node, tls_authority: TLSAuthority) -> None:
    async with await connect(broker.tls_url, ssl_options={"cadata": tls_authority.ca_file.read_text()}) as connection:
        await assert_usable(connection)


def with_certificate(tls: TLSAuthority) -> dict[str, Any]:
    return {
        "cafile": str(tls.ca_file),
        "certfile": str(tls.client_cert),
        "keyfile": str(tls.client_key),
    }


async def test_a_certificate_is_a_login(broker: Node, tls_authority: TLSAuthority, name: str) -> None:
    async with await connect(
        broker.tls_url, auth="external", name=name, ssl_options=with_certificate(tls_authority)
    ) as connection:
        await assert_usable(connection)
        shown = broker.ctl("list_connections", "auth_mechanism", "user", "client_properties")
    [line] = [line for line in shown.splitlines() if name in line]
    assert line.startswith("EXTERNAL\talice\t")


async def test_a_certificate_and_a_password(broker: Node, tls_authority: TLSAuthority) -> None:
    async with await connect(broker.tls_url, ssl_options=with_certificate(tls_authority)) as connection:
        await assert_usable(connection)


# ----------------------------------------------------------------------------------------------------- mistakes


async def test_external_without_a_certificate_is_refused(broker: Node, tls_authority: TLSAuthority) -> None:
    with pytest.raises(LoginRefused, match="EXTERNAL"):
        await connect(broker.tls_url, auth="external", ssl_options={"cafile": str(tls_authority.ca_file)})


async def test_external_without_tls_is_not_offered(broker: Node) -> None:
    with pytest.raises(AuthenticationError, match=r"EXTERNAL.*PLAIN"):
        await connect(broker.url, auth="external")


async def test_the_server_is_verified_by_default(broker: Node) -> None:
    with pytest.raises(AMQPConnectionError, match="certificate was not accepted") as caught:
        await connect(broker.tls_url)
    assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)


async def test_a_server_of_another_authority_is_refused(broker: Node, tls_authority: TLSAuthority) -> None:
    with pytest.raises(AMQPConnectionError, match="certificate was not accepted"):
        await connect(broker.tls_url, ssl_options={"cafile": str(tls_authority.wrong_ca_file)})


async def test_a_server_of_another_name_is_refused(broker: Node, tls_authority: TLSAuthority) -> None:
    with pytest.raises(AMQPConnectionError, match=r"(?i)hostname mismatch.*other\.example"):
        await connect(broker.tls_url, server_hostname="other.example", cafile=str(tls_authority.ca_file))


async def test_a_client_of_another_authority_is_refused(broker: Node, tls_authority: TLSAuthority) -> None:
    options = with_certificate(tls_authority)
    options |= {"certfile": str(tls_authority.wrong_client_cert), "keyfile": str(tls_authority.wrong_client_key)}
    with pytest.raises(AMQPConnectionError) as caught:
        await connect(broker.tls_url, ssl_options=options)
    assert "TLS" in str(caught.value)


async def test_verification_can_be_switched_off_and_warns(broker: Node, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.warns(UserWarning, match="anybody can pose"):
        connection = await connect(f"{broker.tls_url}?verify=verify_none")
    async with connection:
        await assert_usable(connection)
    assert "not verified" in caplog.text


async def test_tls_to_a_plain_port_says_so(broker: Node, tls_authority: TLSAuthority) -> None:
    with pytest.raises(AMQPConnectionError, match=r"does not speak TLS.*5672.*5671"):
        await connect(f"amqps://guest:s3cr3t@localhost:{broker.port}/", ssl_context=tls_authority.client_context())


async def test_plain_to_a_tls_port_says_so(broker: Node) -> None:
    with pytest.raises(AMQPConnectionError) as caught:
        await connect(f"amqp://guest:s3cr3t@localhost:{broker.tls_port}/")
    # RabbitMQ 3.10 resets the connection, so that the alert, which says it, may be lost
    assert "amqps://" in str(caught.value) or "before it said a word" in str(caught.value)
    assert "s3cr3t" not in everything_said(caught.value)


async def test_missing_files_are_named(broker: Node) -> None:
    with pytest.raises(FileNotFoundError, match=r"nosuch\.pem"):
        await connect(broker.tls_url, ssl_options={"cafile": "/nosuch.pem"})


async def test_nothing_warns_on_the_good_way(broker: Node, tls_authority: TLSAuthority) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        async with await connect(broker.tls_url, cafile=str(tls_authority.ca_file)) as connection:
            await assert_usable(connection)
    assert not caught
