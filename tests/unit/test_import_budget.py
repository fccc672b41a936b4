"""What ``import leveret`` costs, counted in things that do not vary from run to run.

Each figure stands for milliseconds of CPU time (CPython 3.11): a frozen dataclass compiles code, 0.4; a module of the
standard library, 0.2 to 1; a module of leveret, 0.2.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import asyncio, ssl, logging, yarl, pamqp.commands  # what comes with them is not ours
import dataclasses, json, sys
before = set(sys.modules)
made, process = [], dataclasses._process_class
def count(cls, *args):
    made.append(f"{cls.__module__}.{cls.__qualname__}")
    return process(cls, *args)
dataclasses._process_class = count
import leveret
print(json.dumps({"modules": sorted(sys.modules.keys() - before), "dataclasses": made}))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, list[str]]:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    result: dict[str, list[str]] = json.loads(done.stdout)
    return result


def test_of_the_standard_library_it_takes_little(imported: dict[str, list[str]]) -> None:
    public = {name.split(".")[0] for name in imported["modules"] if not name.startswith("_")}
    others = {"pamqp", "org"}  # pamqp.exceptions and the like; `copy` asks for Jython's org.python
    assert public - others <= {"leveret", "copy", "random", "bisect"}


@pytest.mark.parametrize("name", ["abc", "passed_on", "retrier", "retry_ladder", "metrics", "wire.tls"])
def test_what_many_never_use_is_left_until_it_is_used(name: str, imported: dict[str, list[str]]) -> None:
    assert "leveret" in imported["modules"]
    assert f"leveret.{name}" not in imported["modules"]


def test_dataclasses_are_for_what_users_hold(imported: dict[str, list[str]]) -> None:
    assert set(imported["dataclasses"]) <= {
        "leveret.credentials.Credentials",
        "leveret.draining.DrainReport",
        "leveret.lifecycle.Health",
        "leveret.message_retry.MessageRetry",
        "leveret.report.PublishFailure",
        "leveret.report.PublishReport",
        "leveret.retry.RetryPolicy",
    }
