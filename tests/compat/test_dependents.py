"""Packages built on aio-pika run on leveret, unchanged, after ``leveret.compat.install()``.

Each program imports `common` first, which installs leveret, and asserts at its end that nothing of the real aio-pika
and aiormq was loaded, although both are in its environment. Where it asks to, its connections are cut.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

import leveret
from tests.compat.dependents import DEPENDENTS, Unavailable, interpreter
from tests.support.proxy import FaultProxy

PROGRAMS = Path(__file__).parent / "programs"
LIMIT = 90

pytestmark = [pytest.mark.one_version, pytest.mark.timeout(600)]  # the first run installs them


@pytest.fixture
def python(request: pytest.FixtureRequest) -> str:
    try:
        return interpreter(request.param)
    except Unavailable as exc:
        pytest.skip(f"no package index: {exc}")


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """A folder with leveret in it, and nothing else of this environment."""
    (tmp_path / "leveret").symlink_to(Path(leveret.__file__).parent)
    return tmp_path


async def run(python: str, program: str, link: FaultProxy, alone: Path) -> tuple[list[str], str]:
    """What it prints; when it asks for it, the connections are cut."""
    paths = [alone, PROGRAMS]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"AMQP_URL": link.url, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    process = await asyncio.create_subprocess_exec(
        python,
        str(PROGRAMS / program),
        env=environment,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stderr is not None
    complaining = asyncio.create_task(process.stderr.read())
    printed = []
    try:
        async with asyncio.timeout(LIMIT):
            async for line in process.stdout:
                printed.append(line.decode().rstrip())
                if printed[-1] == "CUT":
                    link.rst()
                    process.stdin.write(b"\n")
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        errors = (await complaining).decode()
    assert process.returncode == 0, errors
    return printed, errors


def test_every_program_is_run():
    assert {path.stem for path in PROGRAMS.glob("use_*.py")} == {f"use_{name}" for name in DEPENDENTS}


@pytest.mark.parametrize("python", ["faststream", "socketio", "taskiq"], indirect=True, ids=lambda name: name)
async def test_it_runs_and_goes_on_after_its_connections_were_cut(python, request, link, alone):
    printed, _ = await run(python, f"use_{request.node.callspec.params['python']}.py", link, alone)
    assert [line for line in printed if line in {"CUT", "DONE"}] == ["CUT", "DONE"]


@pytest.mark.parametrize("python", ["opentelemetry"], indirect=True)
async def test_instrumentation_wraps_publish_and_consume_and_lets_go_again(python, link, alone):
    printed, errors = await run(python, "use_opentelemetry.py", link, alone)
    assert printed == ["DONE"]
    assert errors == ""
