"""leveret's pytest plugin: fixtures, the marker ``amqp``, ``--amqp-url``; see docs/howto/testing-with-pytest.md.

pytest imports this in every run, also in those that never use it, and importing anything in the package ``leveret``
imports the client. So this module stands beside the package and imports nothing; what the fixtures do is in
`leveret.testing.plugin`, which the first test that uses one of them imports.

(PYTEST_DONT_REWRITE: there is no assert here, and pytest would warn where this was imported before it.)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from leveret import RobustChannel, RobustConnection
    from leveret.testing import Broker

LEFTOVERS = ("fail", "warn", "ignore")
CALL = pytest.StashKey[pytest.TestReport]()
"""What became of the test itself, without its fixtures."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("leveret")
    group.addoption("--amqp-url", metavar="URL", help="a broker for amqp_url, instead of one in this process")
    parser.addini(
        "amqp_leftovers",
        f"what becomes of a test that leaves unacked messages or open connections: {', '.join(LEFTOVERS)}",
        default="warn",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "amqp(leftovers=None, **arguments): arguments of leveret.testing.Broker")
    if (leftovers := config.getini("amqp_leftovers")) not in LEFTOVERS:
        raise pytest.UsageError(f"amqp_leftovers is one of {', '.join(LEFTOVERS)}, not {leftovers!r}")


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say that tests go to a broker that others may use as well; its host only, which is no secret."""
    if not (url := external_url(config)):
        return None
    host = url.rpartition("@")[2].rpartition("//")[2]  # whatever may be in a password
    return f"leveret: amqp_url is at {host.partition('/')[0].partition('?')[0]}"


def external_url(config: pytest.Config) -> str | None:
    """The broker that is not in this process; ``None``: it is."""
    return config.getoption("--amqp-url") or os.environ.get("AMQP_URL") or None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep what became of the test: only one that passed is told about what it left behind."""
    report = yield
    if call.when == "call":
        item.stash[CALL] = report
    elif call.when == "setup" and CALL in item.stash:  # of the run before, where a plugin runs tests again
        del item.stash[CALL]
    return report


@pytest.fixture
def amqp_broker(request: pytest.FixtureRequest) -> Iterator[Broker]:
    """A `leveret.testing.Broker` in a thread, new for each test.

    ``@pytest.mark.amqp(version="4.3")`` gives it arguments. Tests that ask for it are skipped with ``--amqp-url``.
    """
    from leveret.testing import plugin

    yield from plugin.broker(request, external_url(request.config))


@pytest.fixture
def amqp_url(request: pytest.FixtureRequest) -> str:
    """What to connect to: the URL of `amqp_broker`, or that of ``--amqp-url`` or the environment's ``AMQP_URL``."""
    from leveret.testing import plugin

    return plugin.url(request, external_url(request.config))


@pytest.fixture
def amqp_connection(request: pytest.FixtureRequest, amqp_url: str) -> Iterator[RobustConnection]:
    """What ``connect_robust(amqp_url)`` gives, in the test's event loop; closed after the test."""
    from leveret.testing import plugin

    yield from plugin.connection(request, amqp_url)


@pytest.fixture
def amqp_channel(request: pytest.FixtureRequest, amqp_connection: RobustConnection) -> Iterator[RobustChannel]:
    """A channel of `amqp_connection`, with publisher confirms; closed after the test."""
    from leveret.testing import plugin

    yield from plugin.channel(request, amqp_connection)
