"""Programs in the way of aio-pika's documentation, of 10.2 and of 6.8, that differ in their import only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import leveret

SCRIPTS = Path(__file__).parent / "scripts"
LIMIT = 60

PRINTED = {
    "iterate.py": ["b'one'", "b'two'", "b'test_queue_iterate'"],
    "fetch.py": ["b'Hello' {'foo': 'bar'} text/plain"],
    "process.py": ["b'0' {'n': 0}", "b'1' {'n': 1}", "b'2' {'n': 2}"],
    "transact.py": ["11 True"],
    "rpc.py": ["55 144"],
    "topic.py": ["'kern.info':b'log'", "'auth.critical':b'log'"],
}
OLDER = {
    "older_loop.py": [
        "returned b'nowhere'",
        "b'one'",
        "b'two'",
        "b'test_queue_older'",
        "channel closed",
        "closed RobustConnection",
    ],
    "older_tutorial.py": [" [x] Received message b'task'", "900"],
    "older_transact.py": ["11"],
}


def run(script: str, url: str, *options: str) -> tuple[list[str], str]:
    """What it prints on standard output and on the other one."""
    environment = os.environ | {"AMQP_URL": url, "PYTHONPATH": str(Path(leveret.__file__).parents[1])}
    command = [sys.executable, *options, str(SCRIPTS / script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


def test_every_script_is_run():
    assert {path.name for path in SCRIPTS.glob("*.py")} == PRINTED.keys() | OLDER.keys()


@pytest.mark.parametrize("script", PRINTED)
def test_what_the_documentation_of_10_shows_runs_without_a_warning(script, amqp_url):
    printed, errors = run(script, amqp_url, "-W", "error")
    assert printed == PRINTED[script]
    assert errors == ""


@pytest.mark.parametrize("script", OLDER)
def test_what_the_documentation_of_6_8_shows_runs_and_says_what_is_out_of_date(script, amqp_url):
    printed, errors = run(script, amqp_url, "-W", "default")
    assert printed == OLDER[script]
    told = [line for line in errors.splitlines() if "Warning" in line]
    assert told
    assert all(f"{script}:" in line and "DeprecationWarning" in line for line in told)
