"""What `import leveret` gives."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import leveret
from leveret import exceptions

ISSUE = {
    "Channel",
    "Connection",
    "DeliveryMode",
    "Exchange",
    "ExchangeType",
    "IncomingMessage",
    "Message",
    "Queue",
    "QueueIterator",
    "ReturnedMessage",
    "Transaction",
    "connect",
}
"""The handles that the issue names."""


def test_all_is_sorted_and_has_nothing_twice():
    assert list(leveret.__all__) == sorted(set(leveret.__all__))


def test_everything_in_all_can_be_imported():
    for name in leveret.__all__:
        assert getattr(leveret, name) is not None


def test_all_has_every_public_name():
    public = {name for name, value in vars(leveret).items() if not isinstance(value, types.ModuleType)}
    public = {name for name in public if not name.startswith("_")}
    assert public == set(leveret.__all__) - {"__version__", "abc", "exceptions", "patterns", "pool"}


def test_all_has_the_handles_of_the_issue():
    assert set(leveret.__all__) >= ISSUE


def test_star_import_gives_exactly_all():
    namespace: dict[str, object] = {}
    exec("from leveret import *", namespace)
    assert namespace.keys() - {"__builtins__"} == set(leveret.__all__)


def test_the_exceptions_are_reachable_by_either_way():
    assert leveret.exceptions is exceptions
    assert leveret.AMQPException is exceptions.AMQPError
    assert leveret.MessageProcessError is exceptions.MessageProcessError


def test_the_version_is_a_version():
    assert [part.isdigit() for part in leveret.__version__.split(".")[:2]] == [True, True]


def test_the_package_is_typed():
    assert (Path(leveret.__file__).parent / "py.typed").exists()


def test_importing_does_not_warn_or_load_what_only_tls_needs():
    code = "import sys, leveret; print('leveret.wire.tls' in sys.modules)"
    path = str(Path(leveret.__file__).parents[1])
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env={"PYTHONPATH": path}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert done.stderr == ""
