"""The clients, and where each of them runs.

leveret runs from this checkout, in the interpreter that runs the benchmark. Every other client gets a virtual
environment of its own, made with that interpreter, in the cache folder of the tests; librabbitmq, the C client, gets
a compiler.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.provision import cache_folder

if TYPE_CHECKING:
    from tests.bench.scenarios import Job

ROOT = Path(__file__).parents[2]
LIBRABBITMQ = "librabbitmq"
UVLOOP = "uvloop==0.23.0"


class Unavailable(Exception):
    """A client, or the null sink, cannot be had on this machine."""


@dataclass(frozen=True)
class Peer:
    """A client in Python.

    Args:
        requirements: what pip installs for it; nothing for leveret.
        imports: the module whose import is measured.
        asyncio: whether it runs in an event loop.
    """

    requirements: tuple[str, ...]
    imports: str
    asyncio: bool = False


PEERS = {
    "leveret": Peer((), "leveret", asyncio=True),
    "bare_loop": Peer(("pamqp==4.0.1", "yarl==1.25.1", UVLOOP), "asyncio", asyncio=True),
    "aio_pika": Peer(("aio-pika==10.2.1", UVLOOP), "aio_pika", asyncio=True),
    "aiormq": Peer(("aiormq==7.2.4", UVLOOP), "aiormq", asyncio=True),
    "pika_async": Peer(("pika==1.4.4", UVLOOP), "pika.adapters.asyncio_connection", asyncio=True),
    "pika": Peer(("pika==1.4.4",), "pika"),
    "amqpstorm": Peer(("amqpstorm==3.1.4",), "amqpstorm"),
    "amqp": Peer(("amqp==5.4.2",), "amqp"),
    "kombu": Peer(("kombu==5.7.0", "amqp==5.4.2"), "kombu.transport.pyamqp"),
}
CLIENTS = (*PEERS, LIBRABBITMQ)


@dataclass(frozen=True)
class Contender:
    """A client on an event loop, ready to run.

    Args:
        client: its name in `CLIENTS`.
        loop: ``"asyncio"`` or ``"uvloop"``; means nothing to a client that has none.
        program: the interpreter, or the C program.
    """

    client: str
    loop: str
    program: str

    def __str__(self) -> str:
        return self.client if self.loop == "asyncio" else f"{self.client}, {self.loop}"

    def run(self, scenario: str, job: Job, timeout: float) -> dict[str, float] | None:
        """Run a scenario, in a process of its own; the figures, or None if the client cannot do such a thing.

        Raises:
            subprocess.SubprocessError: it failed, or took too long.
        """
        arguments = [scenario, job.url, str(job.n), str(job.size)]
        if self.client == LIBRABBITMQ:
            command = [self.program, *arguments]
        elif scenario == "import":
            command = [self.program, "-c", _IMPORT.format(PEERS[self.client].imports)]
        else:
            command = [self.program, "-m", "tests.bench.worker", self.loop, self.client, *arguments]
        path = [ROOT / "src", ROOT] if self.client == "leveret" else [ROOT]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environment |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raise subprocess.SubprocessError((done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1])
        figures: dict[str, float] | None = json.loads(done.stdout.splitlines()[-1])
        return figures


# In an interpreter that has the modules already that any program with asyncio has.
_IMPORT = """
import asyncio, logging, resource, ssl
before = resource.getrusage(resource.RUSAGE_SELF)
import {}
after = resource.getrusage(resource.RUSAGE_SELF)
print('{{"cpu_us":', (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1e6, "}}")
"""


def contender(client: str, loop: str) -> Contender | None:
    """Install what *client* needs; None if it has no event loop, and *loop* is another one than asyncio's.

    Raises:
        Unavailable: it cannot be had; the message says why.
    """
    if client == LIBRABBITMQ:
        if loop != "asyncio":
            return None
        return Contender(client, loop, compiled(Path(__file__).parent / "clients/librabbitmq.c", "-lrabbitmq"))
    peer = PEERS[client]
    if loop != "asyncio" and not peer.asyncio:
        return None
    return Contender(client, loop, _environment(client, peer) if peer.requirements else sys.executable)


def _environment(client: str, peer: Peer) -> str:
    """The interpreter of the client's virtual environment, made when it is not there."""
    key = _digest(f"{sys.executable} {sys.version} {peer.requirements}".encode())
    folder = cache_folder() / "bench" / f"{client}-{key}"
    python, complete = folder / "bin/python", folder / "complete"
    if not complete.exists():
        print(f"installing {client} …", file=sys.stderr)
        _call([sys.executable, "-m", "venv", "--clear", str(folder)])
        _call([str(python), "-m", "pip", "install", "--quiet", *peer.requirements])
        complete.touch()
    return str(python)


def compiled(source: Path, *libraries: str) -> str:
    """The program that *source*, in C, compiles to.

    Raises:
        Unavailable: no compiler, or a library is missing.
    """
    program = cache_folder() / "bench" / f"{source.stem}-{_digest(source.read_bytes())}"
    if not program.exists():
        compiler = shutil.which("cc")
        if compiler is None:
            raise Unavailable(f"{source.name} needs a C compiler, cc")
        program.parent.mkdir(parents=True, exist_ok=True)
        _call([compiler, "-O2", "-pthread", str(source), "-o", str(program), *libraries])
    return str(program)


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"{Path(command[0]).name}: {(done.stderr.strip() or done.stdout.strip())[:500]}")


def _digest(value: bytes) -> str:
    return hashlib.sha256(value).hexdigest()[:8]
