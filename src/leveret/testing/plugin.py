"""What the pytest fixtures of `_leveret_pytest` do, which pytest loads; this is imported when one of them is used.

The fixtures are plain generators, though connections are made in the test's event loop. Only one thing is asked of
whichever plugin runs that test, pytest-asyncio or anyio: an async fixture that gives its loop. All else is
``loop.run_until_complete()``. So neither plugin is needed to be here, and pytest-asyncio's strict mode and its loop
scopes make no difference.

The broker has a thread of its own: sync tests can use it, and it goes on while the test's loop does not run.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
import types
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import pytest

from _leveret_pytest import CALL, LEFTOVERS
from leveret.robust import connect_robust
from leveret.testing.broker import Broker

if TYPE_CHECKING:
    from leveret.robust import RobustConnection
    from leveret.robust_channel import RobustChannel

_ARGUMENTS: Final = frozenset(inspect.signature(Broker).parameters) - {"thread"}

_GRACE: Final = 0.2
"""Seconds that acks and closing sockets may still be on their way."""


# ------------------------------------------------------------------------------------------------------ fixtures


def broker(request: pytest.FixtureRequest, external: str | None) -> Iterator[Broker]:
    """A broker for one test; a skip where an *external* one is to be used."""
    if external is not None:
        pytest.skip("amqp_broker is the broker in this process, and the run has another (--amqp-url, AMQP_URL)")
    if _is_async(request):
        _loop(request)  # so that the loop outlives the broker, and what the test left open can still be seen
    with Broker(**_arguments(request)) as broker:
        watch = request.node.stash[_WATCH] = Watch(broker, request)
        yield broker
        watch.look_for_connections()
    watch.report()


def url(request: pytest.FixtureRequest, external: str | None) -> str:
    """Where the test's broker is."""
    if external is None:
        amqp_broker: Broker = request.getfixturevalue("amqp_broker")
        return amqp_broker.url
    if arguments := _arguments(request):
        wanted = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        pytest.skip(f"asks for a broker with {wanted}, and that of --amqp-url or AMQP_URL is as it is")
    return external


def connection(request: pytest.FixtureRequest, url: str) -> Iterator[RobustConnection]:
    """A robust connection for one test."""
    loop = _loop_or_fail(request)
    connection = loop.run_until_complete(connect_robust(url))
    yield connection
    loop.run_until_complete(_look_at_acks(request))
    loop.run_until_complete(connection.close())


def channel(request: pytest.FixtureRequest, connection: RobustConnection) -> Iterator[RobustChannel]:
    """A channel for one test."""

    async def open_channel() -> RobustChannel:
        return await connection.channel()

    loop = _loop_or_fail(request)
    channel = loop.run_until_complete(open_channel())
    yield channel
    loop.run_until_complete(_look_at_acks(request))
    loop.run_until_complete(channel.close())


# ------------------------------------------------------------------------------------------------- the test's loop


def _is_async(request: pytest.FixtureRequest) -> bool:
    return inspect.iscoroutinefunction(getattr(request.node, "obj", None))


_RUNNERS: Final = {"asyncio": "pytest_asyncio.plugin", "anyio": "anyio.pytest_plugin"}
"""Plugins that run async tests: their entry points, and their modules, the names of those that were loaded by hand."""


def _has(config: pytest.Config, runner: str) -> bool:
    return config.pluginmanager.hasplugin(runner) or config.pluginmanager.hasplugin(_RUNNERS[runner])


def _by_asyncio(request: pytest.FixtureRequest) -> bool:
    """Whether pytest-asyncio runs the test, or would run the async fixtures of a sync one."""
    if not _has(request.config, "asyncio"):
        return False
    if request.node.get_closest_marker("asyncio") is not None:  # in auto mode, all async tests have it
        return True
    return not _is_async(request) and "anyio_backend" not in request.fixturenames


def _loop(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoop | None:
    """The event loop that the test will run in, kept until those who asked for it have ended; ``None``: not known."""
    by_anyio = "anyio_backend" in request.fixturenames
    if _by_asyncio(request):
        if by_anyio:
            return None  # anyio runs the fixtures, and pytest-asyncio the test, in another loop
        import pytest_asyncio

        scope = _loop_scope(request)
        return _loop_by(request, f"_amqp_loop_{scope}", pytest_asyncio.fixture(loop_scope=scope))
    if by_anyio and _anyio_backend(request) == "asyncio":
        return _loop_by(request, "_amqp_loop_anyio", pytest.fixture)
    return None


def _loop_or_fail(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoop:
    loop = _loop(request)
    if loop is None:
        pytest.fail(f"{request.fixturename} needs an asyncio loop: {_advice(request)}", pytrace=False)
    return loop


def _anyio_backend(request: pytest.FixtureRequest) -> str:
    name: str = request.getfixturevalue("anyio_backend_name")
    return name


def _loop_by(request: pytest.FixtureRequest, name: str, decorate: Any) -> asyncio.AbstractEventLoop:
    """What the fixture *name* gives, which *decorate* makes on its first use, for its plugin may not be there."""
    manager = request.config.pluginmanager
    if not manager.hasplugin(name):

        async def loop() -> AsyncIterator[asyncio.AbstractEventLoop]:
            yield asyncio.get_running_loop()

        holder = types.ModuleType(name)
        setattr(holder, name, decorate(loop))
        manager.register(holder, name)
    found: asyncio.AbstractEventLoop = request.getfixturevalue(name)
    return found


def _loop_scope(request: pytest.FixtureRequest) -> Any:
    """pytest-asyncio's scope of the test's loop: https://pytest-asyncio.readthedocs.io, "loop scope"."""
    mark = request.node.get_closest_marker("asyncio")
    if mark is not None:
        default = request.config.getini("asyncio_default_test_loop_scope")
        return mark.kwargs.get("loop_scope") or mark.kwargs.get("scope") or default
    scope = request.config.getini("asyncio_default_fixture_loop_scope")
    return scope if scope in {"class", "module", "package", "session"} else "function"


def _advice(request: pytest.FixtureRequest) -> str:
    """What to do where :func:`_loop` has none."""
    if _by_asyncio(request):
        return "pytest-asyncio and anyio both want to run it; set asyncio_mode = strict, or do without anyio's mark"
    if "anyio_backend" in request.fixturenames:
        return f"have a fixture anyio_backend that returns 'asyncio', not {_anyio_backend(request)!r}"
    ways: list[str] = []
    if _has(request.config, "asyncio"):
        ways.append("mark the test with @pytest.mark.asyncio or set asyncio_mode = auto")
    if _has(request.config, "anyio"):
        ways.append("mark the test with @pytest.mark.anyio")
    return ", or ".join(ways or ["install pytest-asyncio or anyio, and mark the test for it"])


# ------------------------------------------------------------------------------------------------------ the marker


def _asked(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the markers ``amqp`` of the test, its class and its module say; the nearest wins."""
    asked: dict[str, Any] = {}
    for mark in reversed(list(request.node.iter_markers("amqp"))):
        if mark.args:
            pytest.fail(f"@pytest.mark.amqp takes keywords only, not {mark.args[0]!r}", pytrace=False)
        asked |= mark.kwargs
    if unknown := asked.keys() - _ARGUMENTS - {"leftovers"}:
        pytest.fail(
            f"@pytest.mark.amqp does not know {', '.join(sorted(unknown))}; "
            f"it knows leftovers, {', '.join(sorted(_ARGUMENTS))}",
            pytrace=False,
        )
    return asked


def _arguments(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {name: value for name, value in _asked(request).items() if name != "leftovers"}


# ------------------------------------------------------------------------------------------------------- leftovers


@dataclass
class Watch:
    """What one test leaves behind on its broker.

    Attributes:
        unacked: by queue, the messages that waited for their ack when the test had ended.
        connections: those that were still open when all fixtures had ended.
    """

    broker: Broker
    request: pytest.FixtureRequest
    unacked: dict[str, int] = field(default_factory=dict[str, int])
    connections: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self.verdict: str = _asked(self.request).get("leftovers") or self.request.config.getini("amqp_leftovers")
        if self.verdict not in LEFTOVERS:
            known = ", ".join(LEFTOVERS)
            pytest.fail(f"leftovers of @pytest.mark.amqp is one of {known}, not {self.verdict!r}", pytrace=False)

    def _end_faults(self) -> None:
        """Answer again, whatever the test did: clients want to close their connections."""
        self.broker.on_bytes(None)
        self.broker.resume()
        self.broker.unblock()
        self.broker.delay_confirms(0)

    def _count_unacked(self) -> dict[str, int]:
        unacked: dict[str, int] = {}
        for vhost in {each.vhost for each in self.broker.connections}:
            queues = self.broker.queues_of(vhost)
            for name in queues:
                queue = queues.get(name)  # which may be gone by now, with the connection that it was exclusive to
                if queue is not None and queue.unacked:
                    unacked[name] = queue.unacked
        return unacked

    async def look_at_acks(self) -> None:
        """Note what has no ack; those on their way may arrive."""
        self._end_faults()
        if self.verdict == "ignore":
            return
        deadline = time.monotonic() + _GRACE
        await asyncio.sleep(0)  # acks are written at the end of the loop's turn
        while (found := self._count_unacked()) and time.monotonic() < deadline:  # noqa: ASYNC110 (of another thread)
            await asyncio.sleep(0.005)
        for queue, count in found.items():
            self.unacked[queue] = max(count, self.unacked.get(queue, 0))

    def look_for_connections(self) -> None:
        """Note the connections that are open, and what those have not acked."""
        self._end_faults()
        if self.verdict == "ignore":
            return
        deadline = time.monotonic() + _GRACE
        while self.broker.connections and time.monotonic() < deadline:
            time.sleep(0.005)
        self.connections = [
            f"{each.name or 'one without a name'} (port {each.port})" for each in self.broker.connections
        ]
        self.unacked |= self._count_unacked()

    def report(self) -> None:
        """Fail the test or warn, if it passed.

        One that failed left things because it did, one that was skipped has its reason, one that is to fail has told
        enough, and where pytest was interrupted, there is no report: fixtures end where a failure is a traceback.
        """
        lines = [f"unacked messages in queue {queue!r}: {count}" for queue, count in self.unacked.items()]
        lines += [f"open connection: {each}" for each in self.connections]
        call = self.request.node.stash.get(CALL, None)
        if not lines or call is None or not call.passed or hasattr(call, "wasxfail"):
            return
        text = f"{self.request.node.name} left behind: {'; '.join(lines)}"
        if self.verdict == "warn":
            with contextlib.suppress(pytest.PytestWarning):  # raised where warnings are errors: fail, without traceback
                self.request.node.warn(pytest.PytestWarning(text))
                return
        pytest.fail(text, pytrace=False)


_WATCH: Final = pytest.StashKey[Watch]()


async def _look_at_acks(request: pytest.FixtureRequest) -> None:
    if (watch := request.node.stash.get(_WATCH, None)) is not None:
        await watch.look_at_acks()
