"""The pytest plugin, in runs of pytest of its own."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import _leveret_pytest
import leveret
from leveret.testing import Broker

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[2]
INSTALLED = bool(importlib.metadata.entry_points(group="pytest11", name="leveret"))

Run = Callable[..., pytest.RunResult]


def ini(asyncio_mode: str = "auto", more: str = "") -> str:
    return f"[pytest]\nasyncio_mode = {asyncio_mode}\nasyncio_default_fixture_loop_scope = function\n{more}"


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run tests: their source, then options of pytest; *settings* is pytest.ini."""
    monkeypatch.delenv("AMQP_URL", raising=False)

    def run(source: str, *options: str, settings: str = ini()) -> pytest.RunResult:
        pytester.makeini(settings)
        pytester.makepyfile("import asyncio, pytest, leveret\n" + textwrap.dedent(source))
        loaded = () if INSTALLED else ("-p", "_leveret_pytest")  # what the entry point of the wheel does
        return pytester.runpytest_inprocess(*loaded, *options)

    return run


def says(result: pytest.RunResult, text: str) -> bool:
    return text in result.stdout.str()


# ------------------------------------------------------------------------------------------- who runs the tests

IN_EACH_WAY = """
    {fixture}
    async def queue(amqp_channel):
        return await amqp_channel.declare_queue("jobs")

    {mark}
    async def test_works(amqp_broker, amqp_url, amqp_connection, amqp_channel, queue):
        assert amqp_url == amqp_broker.url
        assert isinstance(amqp_connection, leveret.RobustConnection)
        await amqp_channel.default_exchange.publish(leveret.Message(b"hello"), "jobs")
        assert amqp_broker.queues["jobs"].bodies == [b"hello"]
        await (await queue.get()).ack()

    {mark}
    async def test_has_a_broker_of_its_own(amqp_channel, amqp_broker):
        assert list(amqp_broker.queues) == []
        assert len(amqp_broker.connections) == 1
"""


def test_fixtures_work_in_the_auto_mode_of_pytest_asyncio(run: Run) -> None:
    result = run(IN_EACH_WAY.format(fixture="@pytest.fixture", mark=""), "-Werror")
    result.assert_outcomes(passed=2)


def test_fixtures_work_in_the_strict_mode_of_pytest_asyncio(run: Run) -> None:
    source = IN_EACH_WAY.format(fixture="@__import__('pytest_asyncio').fixture", mark="@pytest.mark.asyncio")
    run(source, "-Werror", settings=ini("strict")).assert_outcomes(passed=2)


@pytest.mark.parametrize("options", [("-p", "no:asyncio"), ()], ids=["alone", "beside pytest-asyncio"])
def test_fixtures_work_with_anyio(run: Run, options: tuple[str, ...]) -> None:
    pytest.importorskip("anyio")
    backend = "@pytest.fixture\n    def anyio_backend(): return 'asyncio'\n"
    source = backend + IN_EACH_WAY.format(fixture="@pytest.fixture", mark="@pytest.mark.anyio")
    settings = ini("strict") if not options else "[pytest]\n"
    run(textwrap.dedent("    " + source), "-Werror", *options, settings=settings).assert_outcomes(passed=2)


@pytest.mark.parametrize("how", ["marker", "ini"])
def test_connection_is_made_in_the_loop_of_the_test_whatever_its_scope(run: Run, how: str) -> None:
    mark = "@pytest.mark.asyncio(loop_scope='session')" if how == "marker" else ""
    setting = "asyncio_default_test_loop_scope = session" if how == "ini" else ""
    source = f"""
        {mark}
        async def test_declares(amqp_channel):
            await amqp_channel.declare_queue("jobs")
    """
    run(source, "-Werror", settings=ini(more=setting)).assert_outcomes(passed=1)


def test_plugins_may_be_loaded_by_hand(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    source = "async def test_it(amqp_channel): await amqp_channel.declare_queue()"
    by_hand = ("-p", "leveret") if INSTALLED else ()
    run(source, "-Werror", "-p", "pytest_asyncio.plugin", *by_hand).assert_outcomes(passed=1)


def test_sync_test_may_have_async_fixtures(run: Run) -> None:
    source = """
        @pytest.fixture
        async def queue(amqp_channel):
            return await amqp_channel.declare_queue("jobs")

        def test_is_there(queue, amqp_broker):
            assert "jobs" in amqp_broker.queues
    """
    run(source, "-Werror").assert_outcomes(passed=1)


def test_sync_test_needs_no_plugin_for_the_broker(run: Run) -> None:
    source = """
        def test_connects(amqp_broker, amqp_url):
            async def declare():
                async with await leveret.connect(amqp_url) as connection:
                    await (await connection.channel()).declare_queue("jobs")

            asyncio.run(declare())
            assert "jobs" in amqp_broker.queues
    """
    result = run(source, "-Werror", "-p", "no:asyncio", "-p", "no:anyio", settings="[pytest]\n")
    result.assert_outcomes(passed=1)


ASYNC = """
    {mark}
    async def test_it(amqp_connection):
        pass
"""


def test_nobody_is_there_to_run_the_test(run: Run) -> None:
    result = run(ASYNC.format(mark=""), "-p", "no:asyncio", "-p", "no:anyio", settings="[pytest]\n")
    result.assert_outcomes(errors=1)
    assert says(result, "amqp_connection needs an asyncio loop: install pytest-asyncio or anyio, and mark the test")


def test_strict_mode_and_no_mark(run: Run) -> None:
    result = run(ASYNC.format(mark=""), "-p", "no:anyio", settings=ini("strict"))
    result.assert_outcomes(errors=1)
    assert says(result, "amqp_connection needs an asyncio loop: mark the test with @pytest.mark.asyncio or set")


def test_nobody_runs_the_test_but_anyio_could(run: Run) -> None:
    pytest.importorskip("anyio")
    result = run(ASYNC.format(mark=""), "-p", "no:asyncio", settings="[pytest]\n")
    result.assert_outcomes(errors=1)
    assert says(result, "amqp_connection needs an asyncio loop: mark the test with @pytest.mark.anyio")


def test_two_plugins_want_to_run_the_test(run: Run) -> None:
    pytest.importorskip("anyio")
    result = run(ASYNC.format(mark="@pytest.mark.anyio"), settings=ini("auto"))
    assert says(result, "set asyncio_mode = strict, or do without anyio's mark")


def test_test_that_runs_on_trio(run: Run) -> None:
    pytest.importorskip("anyio")
    source = """
        @pytest.fixture
        def anyio_backend():
            return "trio"

        @pytest.mark.anyio
        async def test_it(amqp_connection):
            pass
    """
    result = run(source, "-p", "no:asyncio", settings="[pytest]\n")
    result.assert_outcomes(errors=1)
    assert says(
        result, "amqp_connection needs an asyncio loop: have a fixture anyio_backend that returns 'asyncio', not 'trio'"
    )


def test_broker_does_not_ask_who_runs_the_test(run: Run, pytester: pytest.Pytester) -> None:
    pytester.makeconftest("""
        import asyncio

        def pytest_pyfunc_call(pyfuncitem):
            asyncio.run(pyfuncitem.obj(pyfuncitem.funcargs["amqp_url"]))
            return True
    """)
    source = """
        async def test_it(amqp_url):
            async with await leveret.connect(amqp_url) as connection:
                await (await connection.channel()).declare_queue("jobs")
    """
    result = run(source, "-Werror", "-p", "no:asyncio", "-p", "no:anyio", settings="[pytest]\n")
    result.assert_outcomes(passed=1)


# ---------------------------------------------------------------------------------------------------- leftovers

UNACKED = """
    {mark}
    async def test_it(amqp_channel):
        queue = await amqp_channel.declare_queue("jobs")
        await amqp_channel.default_exchange.publish(leveret.Message(b"1"), "jobs")
        await queue.get()
        {end}
"""
OPEN = """
    kept = []

    async def test_it(amqp_url):
        kept.append(await leveret.connect_robust(amqp_url, client_properties={"connection_name": "worker"}))
"""
FAIL = ini(more="amqp_leftovers = fail")


def test_unacked_message_is_a_warning(run: Run) -> None:
    result = run(UNACKED.format(mark="", end=""), "-Wdefault")
    result.assert_outcomes(passed=1, warnings=1)
    assert says(result, "test_it left behind: unacked messages in queue 'jobs': 1")


def test_unacked_message_fails_the_test_when_asked_to(run: Run) -> None:
    result = run(UNACKED.format(mark="", end=""), settings=FAIL)
    result.assert_outcomes(passed=1, errors=1)
    assert says(result, "test_it left behind: unacked messages in queue 'jobs': 1")


def test_unacked_message_is_a_short_failure_where_warnings_are_errors(run: Run) -> None:
    result = run(UNACKED.format(mark="", end=""), "-Werror")
    result.assert_outcomes(passed=1, errors=1)
    assert says(result, "test_it left behind: unacked messages in queue 'jobs': 1")
    assert not says(result, "During handling")
    assert not says(result, "plugin.py")


@pytest.mark.parametrize("by", ["marker", "ini"])
def test_leftovers_may_be_ignored(run: Run, by: str) -> None:
    mark, setting = ("@pytest.mark.amqp(leftovers='ignore')", FAIL)
    if by == "ini":
        mark, setting = "", ini(more="amqp_leftovers = ignore")
    run(UNACKED.format(mark=mark, end=""), "-Werror", settings=setting).assert_outcomes(passed=1)


def test_one_test_may_be_stricter_than_the_others(run: Run) -> None:
    run(UNACKED.format(mark="@pytest.mark.amqp(leftovers='fail')", end="")).assert_outcomes(passed=1, errors=1)


def test_test_that_failed_is_not_told_about_leftovers(run: Run) -> None:
    result = run(UNACKED.format(mark="", end="assert False"), settings=FAIL)
    result.assert_outcomes(failed=1)
    assert not says(result, "left behind")


@pytest.mark.parametrize("end", ["raise KeyboardInterrupt", "pytest.exit('enough')"])
@pytest.mark.parametrize("settings", [FAIL, ini()], ids=["fail", "warn"])
def test_interrupted_run_ends_as_always(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, end: str, settings: str
) -> None:
    source = """
        def test_it(amqp_broker):
            loop.run_until_complete(leave(amqp_broker.url))
            END

        kept = []
        loop = asyncio.new_event_loop()

        async def leave(url):
            kept.append(await leveret.connect(url))
            queue = await (await kept[0].channel()).declare_queue("jobs")
            await (await kept[0].channel()).default_exchange.publish(leveret.Message(b"1"), "jobs")
            await queue.get()
    """
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.delenv("AMQP_URL", raising=False)
    pytester.makeini(settings)
    pytester.makepyfile("import asyncio, pytest, leveret\n" + textwrap.dedent(source).replace("END", end))
    loaded = () if INSTALLED else ("-p", "_leveret_pytest")
    result = pytester.runpytest_subprocess(*loaded)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    output = result.stdout.str() + result.stderr.str()
    assert "left behind" not in output
    assert "pytest_sessionfinish" not in output


@pytest.mark.parametrize(
    ("mark", "end", "outcome"),
    [
        ("", "pytest.skip('not today')", {"skipped": 1}),
        ("", "pytest.xfail('known')", {"xfailed": 1}),
        ("@pytest.mark.xfail", "assert False", {"xfailed": 1}),
        ("@pytest.mark.xfail", "pass", {"xpassed": 1}),
    ],
)
def test_only_a_test_that_passed_is_told_about_leftovers(
    run: Run, mark: str, end: str, outcome: dict[str, int]
) -> None:
    result = run(UNACKED.format(mark=mark, end=end), settings=FAIL)
    result.assert_outcomes(**outcome)
    assert not says(result, "left behind")


def test_open_connection_fails_the_test_when_asked_to(run: Run) -> None:
    result = run(OPEN, settings=FAIL)
    assert result.parseoutcomes()["errors"] == 1
    assert says(result, "test_it left behind: open connection:")


def test_ack_that_is_on_its_way_is_none(run: Run) -> None:
    source = """
        async def test_it(amqp_channel):
            queue = await amqp_channel.declare_queue("jobs")
            began = asyncio.Event()

            async def callback(message):
                began.set()
                for _ in range(10):
                    await asyncio.sleep(0)
                await message.ack()

            await queue.consume(callback)
            await amqp_channel.default_exchange.publish(leveret.Message(b"1"), "jobs")
            await began.wait()
    """
    run(source, settings=FAIL).assert_outcomes(passed=1)


def test_connection_that_a_fixture_closes_is_none(run: Run) -> None:
    source = """
        @pytest.fixture
        async def connection(amqp_url):
            async with await leveret.connect(amqp_url) as connection:
                yield connection

        async def test_it(connection):
            assert not connection.is_closed
    """
    run(source, "-Werror", settings=FAIL).assert_outcomes(passed=1)


@pytest.mark.parametrize(
    "act", ["amqp_broker.pause()", "amqp_broker.block()", "await amqp_broker.stop()", "amqp_broker.drop_connections()"]
)
def test_broker_that_the_test_has_hurt_keeps_nobody_waiting(run: Run, act: str) -> None:
    source = f"""
        async def test_it(amqp_broker, amqp_channel):
            {act}
    """
    result = run(source, "-Werror", settings=FAIL)
    result.assert_outcomes(passed=1)
    assert result.duration < 5  # closing gives up after 10


@pytest.mark.parametrize(
    "act",
    [
        """
            amqp_broker.delay_confirms(1000)
            publishing = asyncio.ensure_future(exchange.publish(leveret.Message(b"hello"), "jobs"))
            while not amqp_broker.queues["jobs"].messages:
                await asyncio.sleep(0.005)
            assert not publishing.done()
        """,
        "amqp_broker.on_bytes(lambda connection, direction, data: b'')",
    ],
    ids=["delay", "tap"],
)
def test_faults_that_are_still_on_end_before_the_connection_is_closed(run: Run, act: str) -> None:
    source = f"""
        async def test_it(amqp_broker, amqp_channel):
            await amqp_channel.declare_queue("jobs")
            exchange = amqp_channel.default_exchange
            {act.strip()}
    """
    result = run(source, settings=FAIL)
    result.assert_outcomes(passed=1)
    assert result.duration < 5


def test_broker_may_be_restarted_by_the_test(run: Run) -> None:
    source = """
        async def test_it(amqp_broker, amqp_channel):
            await amqp_channel.declare_queue("jobs", durable=True)
            await amqp_broker.stop(keep=True)
            await amqp_broker.start()
            assert list(amqp_broker.queues) == ["jobs"]
            await amqp_channel.declare_queue("jobs", durable=True)

        async def test_without_a_connection(amqp_broker):
            await amqp_broker.stop(keep=True)
            await amqp_broker.start()
    """
    run(source, "-Werror", settings=FAIL).assert_outcomes(passed=2)


def test_unknown_verdict_is_refused(run: Run) -> None:
    result = run("", settings=ini(more="amqp_leftovers = shout"))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "amqp_leftovers is one of fail, warn, ignore, not 'shout'" in result.stderr.str()
    result = run(UNACKED.format(mark="@pytest.mark.amqp(leftovers='shout')", end=""))
    assert says(result, "leftovers of @pytest.mark.amqp is one of fail, warn, ignore, not 'shout'")


# --------------------------------------------------------------------------------------------------- the marker


def test_marker_gives_the_broker_arguments_and_the_nearest_wins(run: Run) -> None:
    source = """
        pytestmark = pytest.mark.amqp(version="3.10", users={"alice": "secret"})

        def test_module(amqp_broker):
            assert amqp_broker.version == "3.10"

        @pytest.mark.amqp(version="4.3")
        def test_nearest(amqp_broker, amqp_url):
            assert amqp_broker.version == "4.3"
            assert "alice:secret@" in amqp_url
    """
    run(source, "-Werror", "--strict-markers").assert_outcomes(passed=2)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("'4.3'", "takes keywords only, not '4.3'"),
        ("verzion='4.3'", "does not know verzion; it knows leftovers, channel_max, "),
        ("thread=False", "does not know thread; "),
        ("version='2.8'", "2.8"),
    ],
)
def test_marker_with_a_mistake(run: Run, arguments: str, text: str) -> None:
    source = f"""
        @pytest.mark.amqp({arguments})
        def test_it(amqp_broker):
            pass
    """
    result = run(source)
    result.assert_outcomes(errors=1)
    assert says(result, text)


# --------------------------------------------------------------------------------------------- another broker

ELSEWHERE = """
    async def test_url(amqp_url, amqp_channel):
        assert ":secret@" in amqp_url
        await amqp_channel.declare_queue("here")

    def test_broker(amqp_broker):
        raise AssertionError

    @pytest.mark.amqp(version="4.3", leftovers="fail")
    async def test_marked(amqp_channel):
        raise AssertionError

    @pytest.mark.amqp(leftovers="fail")
    async def test_marked_for_leftovers_only(amqp_channel):
        pass
"""


@pytest.mark.parametrize("by", ["option", "environment"])
def test_url_of_another_broker(run: Run, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    with Broker(users={"alice": "secret"}) as broker:
        options = ["-Werror", "-rs"]
        if by == "option":
            options.append(f"--amqp-url={broker.url}")
            monkeypatch.setenv("AMQP_URL", "amqp://not.this.one")
        else:
            monkeypatch.setenv("AMQP_URL", broker.url)
        result = run(ELSEWHERE, *options)
        assert "here" in broker.queues
        assert broker.connections == ()
    result.assert_outcomes(passed=2, skipped=2)
    assert says(result, "amqp_broker is the broker in this process, and the run has another (--amqp-url, AMQP_URL)")
    assert says(result, "asks for a broker with version='4.3', and that of --amqp-url or AMQP_URL is as it is")
    assert says(result, f"leveret: amqp_url is at 127.0.0.1:{broker.port}\n")


def test_header_shows_no_password(run: Run) -> None:
    for url in (
        "amqp://a:secret@b:1,c:2/v?x=1",
        "amqp://a:secret/@b:1,c:2",
        "amqp://a:secr?secret@b:1,c:2/",
        "amqp://b:1,c:2/secret",
    ):
        result = run("def test_it(): pass", f"--amqp-url={url}")
        assert says(result, "leveret: amqp_url is at b:1,c:2\n")
        assert not says(result, "secret")


# ------------------------------------------------------------------------------------------- who does not use it


def outside(code: str, *path: Path) -> str:
    """What *code* prints, in a Python of its own where warnings are errors."""
    sources = [*path, Path(_leveret_pytest.__file__).parent, Path(leveret.__file__).parents[1]]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sources))}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_loading_the_plugin_imports_nothing_else() -> None:
    code = "import pytest, sys; before = {*sys.modules}; import _leveret_pytest; print(*({*sys.modules} - before))"
    assert outside(code).split() == ["_leveret_pytest"]


def test_package_that_was_imported_before_pytest_is_no_warning(tmp_path: Path) -> None:
    info = tmp_path / "leveret-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: leveret\nVersion: 0\n")
    (info / "RECORD").write_text("_leveret_pytest.py,,\nleveret/__init__.py,,\n")
    (info / "entry_points.txt").write_text("[pytest11]\nleveret = _leveret_pytest\n")
    (tmp_path / "test_it.py").write_text(
        "def test_it(pytestconfig): assert pytestconfig.pluginmanager.hasplugin('leveret')"
    )
    options = ["-q", "-p", "no:asyncio", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tmp_path)]
    code = f"import leveret, pytest; raise SystemExit(pytest.main({[*options, str(tmp_path)]!r}))"
    assert "1 passed" in outside(code, tmp_path)


def test_wheel_has_the_plugin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["pytest11"] == {"leveret": _leveret_pytest.__name__}
    assert "src/_leveret_pytest.py" in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
