"""The pytest plugin that gives tests a real RabbitMQ: options, fixtures, and the `node` marker.

``--brokers 3.10,4.0,4.3`` chooses the versions, all by default; a test that asks for a broker runs once for each.
A broker that cannot be had is a failure, never a skip. ``--brokers auto`` means all of them too, but ends the run at
once, with the reason, on a machine that cannot have them (as a failure only in CI). With ``AMQP_URL`` set,
that broker is the only one. ``testing-3.10``, ``testing-4.0`` and ``testing-4.3`` are no RabbitMQ, but the broker of
`leveret.testing` in this process; ``testing`` is all three.
"""

from __future__ import annotations

import os
import ssl
import urllib.parse
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import pytest

from tests.support.node import Node, server_version
from tests.support.provision import VERSIONS, BrokerUnavailable, provision
from tests.support.testing_node import PREFIX, TESTING, TestingNode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PLUGINS = ("rabbitmq_auth_mechanism_ssl", "rabbitmq_consistent_hash_exchange", "rabbitmq_sharding")
CONF = """
auth_mechanisms.1 = PLAIN
auth_mechanisms.2 = AMQPLAIN
auth_mechanisms.3 = EXTERNAL
ssl_cert_login_from = common_name
"""


@dataclass(frozen=True)
class RemoteBroker:
    """The broker of ``AMQP_URL``: nothing but its URL is known, and nothing can be done to it."""

    url: str
    version: str

    @property
    def version_info(self) -> tuple[int, ...]:
        """The version that the server reports, to compare with."""
        parts = urllib.parse.urlsplit(self.url)
        version = server_version(parts.hostname or "localhost", parts.port or 5672)
        return tuple(map(int, version.split(".")[:2]))


@dataclass(frozen=True)
class TLSAuthority:
    """Files for TLS: a server's, a client's, and those of an authority that nobody trusts."""

    ca_file: Path
    server_cert: Path
    server_key: Path
    client_cert: Path
    """Its common name is ``alice``, a user of every node here, for EXTERNAL."""
    client_key: Path
    wrong_ca_file: Path
    wrong_client_cert: Path
    wrong_client_key: Path

    def client_context(self, *, cert: bool = False) -> ssl.SSLContext:
        """A context that trusts the nodes here; with *cert* it shows the certificate of alice."""
        context = ssl.create_default_context(cafile=str(self.ca_file))
        if cert:
            context.load_cert_chain(self.client_cert, self.client_key)
        return context


# -------------------------------------------------------------------------------------------------- options


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--brokers", default=",".join(VERSIONS), help="RabbitMQ versions to test against, auto, testing")


def _versions(config: pytest.Config) -> list[str]:
    """The versions to run against, as the ids of tests show them."""
    if "AMQP_URL" in os.environ:
        return ["AMQP_URL"]
    chosen: str = config.getoption("--brokers")
    groups = {"auto": list(VERSIONS), "testing": list(TESTING)}
    return [version for part in chosen.split(",") for version in groups.get(part.strip(), [part.strip()])]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "node: needs more of the broker than its URL: faults, rabbitmqctl, TLS files")
    config.addinivalue_line("markers", "one_version: depends on the broker so little that one of --brokers will do")
    config.addinivalue_line("markers", "rabbitmq(reason): leveret's own broker (--brokers testing) cannot do it")
    if "AMQP_URL" in os.environ:
        return
    if unknown := set(_versions(config)) - {*VERSIONS, *TESTING}:
        known = ", ".join((*VERSIONS, "auto", *TESTING, "testing"))
        raise pytest.UsageError(f"--brokers: {', '.join(sorted(unknown))} is not among {known}")
    if config.getoption("--brokers") == "auto":
        try:
            for version in VERSIONS:
                provision(version)  # now, because the download is not to count against a test's time
        except BrokerUnavailable as error:
            pytest.exit(f"THE BROKER TESTS DID NOT RUN. {error}", returncode=1 if os.environ.get("CI") else 0)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "broker_version" in metafunc.fixturenames:
        versions = _versions(metafunc.config)
        in_full = metafunc.config.getoption("chaos_minutes", None)
        if metafunc.definition.get_closest_marker("one_version") and not in_full:
            versions = [versions[len(versions) // 2]]
        metafunc.parametrize("broker_version", versions, indirect=True, scope="session")


def pytest_runtest_setup(item: pytest.Item) -> None:
    real = item.get_closest_marker("rabbitmq")
    chosen = getattr(getattr(item, "callspec", None), "params", {}).get("broker_version", "")
    if real is not None and chosen in TESTING:
        pytest.skip(f"needs RabbitMQ: {real.args[0]}")
    private = item.get_closest_marker("node") or "start_node" in getattr(item, "fixturenames", ())
    if private and "AMQP_URL" in os.environ:
        pytest.skip("needs a node of its own, and AMQP_URL is set")


# ------------------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="session")
def broker_version(request: pytest.FixtureRequest) -> str:
    """The RabbitMQ version that the test runs against, ``"4.0"`` for example, or ``"AMQP_URL"``."""
    version: str = request.param
    return version


@pytest.fixture(scope="session")
def tls_authority(tmp_path_factory: pytest.TempPathFactory) -> TLSAuthority:
    """Certificates of an authority made for this test run."""
    import trustme

    folder = tmp_path_factory.mktemp("tls")

    def write(name: str, blob: trustme.Blob) -> Path:
        path = folder / name
        blob.write_to_path(str(path))
        return path

    def write_pair(name: str, cert: trustme.LeafCert) -> tuple[Path, Path]:
        chain = write(f"{name}.pem", cert.cert_chain_pems[0])
        return chain, write(f"{name}.key", cert.private_key_pem)

    ca, wrong_ca = trustme.CA(), trustme.CA()
    server = write_pair("server", ca.issue_cert("localhost", "127.0.0.1"))
    client = write_pair("client", ca.issue_cert("alice@example", common_name="alice"))
    wrong_client = write_pair("wrong-client", wrong_ca.issue_cert("alice@example", common_name="alice"))
    return TLSAuthority(
        write("ca.pem", ca.cert_pem), *server, *client, write("wrong-ca.pem", wrong_ca.cert_pem), *wrong_client
    )


def plain_node(version: str) -> Node:
    """A node, not started, without TLS; or leveret's broker with the face of one."""
    return cast("Node", TestingNode(version)) if version.startswith(PREFIX) else Node(version)


def _new_node(version: str, tls: TLSAuthority, *, plugins: tuple[str, ...], conf: str, advanced: str) -> Node:
    """Start a node with every listener and mechanism, and the user alice."""
    options: dict[str, str | Path] = {
        "cacertfile": tls.ca_file,
        "certfile": tls.server_cert,
        "keyfile": tls.server_key,
        "verify": "verify_peer",
        "fail_if_no_peer_cert": "false",
    }
    if version.startswith(PREFIX):
        if plugins or conf or advanced:
            pytest.skip("needs RabbitMQ: reads a configuration")
        node = cast("Node", TestingNode(version, tls=options))
    else:
        node = Node(version, plugins=(*PLUGINS, *plugins), conf=CONF + conf, advanced=advanced, tls=options)
    try:
        node.start()
        node.add_user("alice", "unused")
    except BaseException:
        node.stop()
        raise
    return node


@pytest.fixture(scope="session")
def broker(broker_version: str, request: pytest.FixtureRequest) -> Iterator[Node | RemoteBroker]:
    """The broker that all tests of one version share: a `Node`, or the `RemoteBroker` of ``AMQP_URL``.

    Tests that use more of it than ``url``, ``version`` and ``version_info`` are marked ``node``, and undo what they
    do to it. What hurts other tests (kill, freeze, alarms) is for ``own_broker``.
    """
    if broker_version == "AMQP_URL":
        yield RemoteBroker(os.environ["AMQP_URL"], broker_version)
        return
    tls: TLSAuthority = request.getfixturevalue("tls_authority")
    node = _new_node(broker_version, tls, plugins=(), conf="", advanced="")
    yield node
    node.stop()


@pytest.fixture
def amqp_url(broker: Node | RemoteBroker) -> str:
    """The URL of the shared broker."""
    return broker.url


@pytest.fixture
def start_node(broker_version: str, tls_authority: TLSAuthority) -> Iterator[Callable[..., Node]]:
    """Start a private node: ``start_node(conf="consumer_timeout = 3000", plugins=[…], advanced="…")``."""
    nodes: list[Node] = []

    def start(*, plugins: tuple[str, ...] = (), conf: str = "", advanced: str = "") -> Node:
        nodes.append(_new_node(broker_version, tls_authority, plugins=tuple(plugins), conf=conf, advanced=advanced))
        return nodes[-1]

    yield start
    for node in nodes:
        node.stop()


@pytest.fixture
def own_broker(start_node: Callable[..., Node]) -> Node:
    """A node of the test's own, running, to kill, freeze or choke."""
    return start_node()
