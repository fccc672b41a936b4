"""Packages built on aio-pika, each in a virtual environment of its own, which is made once and kept in the cache."""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
import sys

from tests.support.provision import cache_folder

DEPENDENTS: dict[str, tuple[str, ...]] = {
    "faststream": ("faststream[rabbit]==0.7.8",),
    "opentelemetry": ("opentelemetry-instrumentation-aio-pika==0.66b1", "opentelemetry-sdk", "aiormq"),
    "socketio": ("python-socketio==5.18.1", "aio-pika"),
    "taskiq": ("taskiq-aio-pika==0.6.1",),
}
"""What pip installs for each; aio-pika itself comes along, and is not to be used."""

NEEDS = ("pamqp>=4.0.1,<5", "yarl>=1.9.5")
"""What leveret, which is not installed there, needs."""


class Unavailable(Exception):
    """A package cannot be had on this machine."""


def interpreter(name: str) -> str:
    """The Python that has the dependent *name*.

    Raises:
        Unavailable: there is no package index; the message says what pip said.
    """
    requirements = (*DEPENDENTS[name], *NEEDS)
    key = hashlib.sha256(f"{sys.executable} {sys.version} {requirements}".encode()).hexdigest()[:8]
    folder = cache_folder() / "compat" / f"{name}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other workers of this run want it too
        if not (folder / "complete").exists():
            _call([sys.executable, "-m", "venv", "--clear", str(folder)])
            _call([str(folder / "bin/python"), "-m", "pip", "install", "--quiet", *requirements])
            (folder / "complete").touch()
    return str(folder / "bin/python")


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"{' '.join(command[1:4])}: {(done.stderr.strip() or done.stdout.strip())[-500:]}")
