"""Every example, and the code of the README, as a user runs them: a process of its own, against a real broker."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import leveret

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from tests.support.brokers import TLSAuthority
    from tests.support.node import Node

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
LIMIT = 60
QUEUES = ("leveret.demo", "hello", "task_queue", "rpc_queue", "greetings", "leveret.tasks")
EXCHANGES = ("logs", "direct_logs", "topic_logs")

pytestmark = pytest.mark.one_version

PAIRS = {
    # consumer, its arguments → producer, its arguments, what the producer prints, what the consumer prints
    ("simple_consumer.py",): (
        ("simple_publisher.py",),
        [f"Confirmed: Message {n} of 10" for n in range(1, 11)],
        [f"Received: Message {n} of 10" for n in range(1, 11)],
    ),
    ("simple_async_processing.py",): (
        ("simple_publisher.py",),
        [f"Confirmed: Message {n} of 10" for n in range(1, 11)],
        [f"Done: Message {n} of 10" for n in range(1, 11)],
    ),
    ("graceful_shutdown.py",): (
        ("simple_publisher.py",),
        [f"Confirmed: Message {n} of 10" for n in range(1, 11)],
        [f"Done: Message {n} of 10" for n in range(1, 11)],
    ),
    ("rpc_server.py",): (
        ("rpc_client.py",),
        [
            "2 * 3 = 6",
            "The sum of the first 100 squares is 328350",
            "The server says: y must not be 0 (DivisionByZero, {'x': 1})",
            "It fails at once: nobody serves 'leveret.add': the call was returned",
        ],
        [],
    ),
    ("worker.py",): (
        ("master.py",),
        ["Confirmed: 1", "Confirmed: 2", "Confirmed: 3", "Confirmed: -4"],
        ["Done: 1", "Done: 2", "Done: 3", "Refused: -4"],
    ),
    ("tutorials/receive.py",): (
        ("tutorials/send.py",),
        [" [x] Sent 'Hello World!'"],
        [" [x] Received 'Hello World!'"],
    ),
    ("tutorials/worker.py",): (
        ("tutorials/new_task.py", "A", "task."),
        [" [x] Sent 'A task.'"],
        [" [x] Received 'A task.'", " [x] Done"],
    ),
    ("tutorials/receive_logs.py",): (
        ("tutorials/emit_log.py", "Something", "happened"),
        [" [x] Sent 'Something happened' (somebody listens)"],
        [" [x] Something happened"],
    ),
    ("tutorials/receive_logs_direct.py", "warning", "error"): (
        ("tutorials/emit_log_direct.py", "error", "The", "disk", "is", "full"),
        [" [x] Sent error:The disk is full"],
        [" [x] error:The disk is full"],
    ),
    ("tutorials/receive_logs_topic.py", "kern.*", "*.critical"): (
        ("tutorials/emit_log_topic.py", "kern.critical", "A", "critical", "kernel", "error"),
        [" [x] Sent kern.critical:A critical kernel error"],
        [" [x] kern.critical:A critical kernel error"],
    ),
    ("tutorials/rpc_server.py",): (
        ("tutorials/rpc_client.py", "10", "20"),
        [" [x] Requesting fib of [10, 20]", " [.] fib(10) = 55", " [.] fib(20) = 6765"],
        [" [.] fib(10) = 55", " [.] fib(20) = 6765"],
    ),
}
ALONE = {
    # its arguments → what it prints
    ("get_one_message.py",): (r"The queue is empty\.",),
    ("transactions.py",): (
        r"Before the commit: 0 messages",
        r"After the commit: 2 messages",
        r"Rolled back \(no such account\): 2 messages",
    ),
    ("tutorials/publisher_confirms.py", "1500"): (
        r"   one_by_one: 1,500 messages confirmed in \S+ s, \S+ a second",
        r"   in_batches: 1,500 messages confirmed in \S+ s, \S+ a second",
        r"all_in_flight: 1,500 messages confirmed in \S+ s, \S+ a second",
        r"  by_iterable: 1,500 messages confirmed in \S+ s, \S+ a second",
    ),
}
OTHERS = {"tls_client_certificate.py"}


# ------------------------------------------------------------------------------------------------- processes


class Script:
    """A script that runs: Python's development mode, and every warning an error."""

    def __init__(self, *command: str, env: dict[str, str], cwd: Path = EXAMPLES) -> None:
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.lines: list[str] = []
        former = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-X", "dev", "-W", "error", *command],
                env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(sys.path), **env},
                cwd=cwd,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                text=True,
            )
        finally:
            signal.signal(signal.SIGINT, former)
        # Readline has no timeout: a script that says nothing is killed, which ends its output.
        self._alarm = threading.Timer(LIMIT, self.process.kill)
        self._alarm.start()

    def read_until(self, *wanted: str) -> None:
        """Read its output until each of *wanted* has been in a line, in any order."""
        missing = list(wanted)
        assert self.process.stdout is not None
        while missing:
            line = self.process.stdout.readline()
            assert line, f"it ended, or hung, before it said {missing}: {self.lines}\n{self.errors()}"
            self.lines.append(line.rstrip("\n"))
            missing = [text for text in missing if text not in line]

    def errors(self) -> str:
        """What it wrote to stderr, but for asyncio's complaints about a busy machine."""
        self._stderr.seek(0)
        return "".join(line for line in self._stderr if not re.match(r"Executing <.* took \d", line))

    def end(self, number: signal.Signals | None = None) -> list[str]:
        """Wait for its end, which *number* brings about if given; it must be a clean one. Its output."""
        if number is not None:
            self.process.send_signal(number)
        assert self.process.stdout is not None
        self.lines += self.process.stdout.read().splitlines()
        assert self.process.wait(LIMIT) == 0, f"{self.process.args}: {self.lines}\n{self.errors()}"
        assert self.errors() == ""
        return self.lines

    def kill(self) -> None:
        """Leave nothing behind."""
        self._alarm.cancel()
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._stderr.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Script]]:
    """Start a script: ``start("simple_publisher.py", env={…})``."""
    scripts: list[Script] = []

    def start(*command: str, **kwargs: object) -> Script:
        scripts.append(Script(*command, **kwargs))  # type: ignore[arg-type]
        return scripts[-1]

    yield start
    for script in scripts:
        script.kill()


@pytest.fixture(autouse=True)
async def _clean(request: pytest.FixtureRequest) -> AsyncIterator[None]:
    """Delete what the examples declare, before and after: its names are fixed."""
    if "amqp_url" not in request.fixturenames:
        yield
        return
    url = request.getfixturevalue("amqp_url")

    async def delete() -> None:
        async with await leveret.connect(url) as connection:
            channel = await connection.channel()
            for queue in QUEUES:
                await channel.queue_delete(queue)
            for exchange in EXCHANGES:
                await channel.exchange_delete(exchange)

    await delete()
    yield
    await delete()


# ------------------------------------------------------------------------------------------------- examples


@pytest.mark.parametrize("consumer", PAIRS, ids=lambda command: command[0].removesuffix(".py"))
def test_pair(consumer: tuple[str, ...], amqp_url: str, start: Callable[..., Script]) -> None:
    producer, sent, received = PAIRS[consumer]
    env = {"AMQP_URL": amqp_url}
    consuming = start(*consumer, env=env)
    consuming.read_until("Waiting for")
    assert start(*producer, env=env).end() == sent
    consuming.read_until(*received)
    assert sorted(consuming.end(signal.SIGINT)[1:]) == sorted(received)


@pytest.mark.parametrize("consumer", ["simple_consumer.py", "simple_async_processing.py", "tutorials/rpc_server.py"])
def test_sigterm_ends_it_too(consumer: str, amqp_url: str, start: Callable[..., Script]) -> None:
    consuming = start(consumer, env={"AMQP_URL": amqp_url})
    consuming.read_until("Waiting for")
    consuming.end(signal.SIGTERM)


async def test_work_in_progress_is_requeued_on_sigint(amqp_url: str, start: Callable[..., Script]) -> None:
    env = {"AMQP_URL": amqp_url}
    consuming = start("tutorials/worker.py", env=env)
    consuming.read_until("Waiting for")
    start("tutorials/new_task.py", "long" + "." * 60, env=env).end()
    consuming.read_until("Received 'long")
    consuming.end(signal.SIGINT)
    async with await leveret.connect(amqp_url) as connection:
        queue = await (await connection.channel()).get_queue("task_queue")
        async with (await queue.get()).process() as message:
            assert message.redelivered


@pytest.mark.parametrize("example", ALONE, ids=lambda command: Path(command[0]).stem)
def test_alone(example: tuple[str, ...], amqp_url: str, start: Callable[..., Script]) -> None:
    lines = start(*example, env={"AMQP_URL": amqp_url}).end()
    for line, pattern in zip(lines, ALONE[example], strict=True):
        assert re.fullmatch(pattern, line)


def test_get_one_message_of_some(amqp_url: str, start: Callable[..., Script]) -> None:
    env = {"AMQP_URL": amqp_url}
    start("simple_publisher.py", env=env).end()
    assert start("get_one_message.py", env=env).end() == ["Got: Message 1 of 10 (9 more in the queue)"]


@pytest.mark.node
@pytest.mark.parametrize("auth", ["external", None])
def test_tls_client_certificate(
    auth: str | None, broker: Node, tls_authority: TLSAuthority, start: Callable[..., Script]
) -> None:
    env = {
        "AMQP_URL": broker.tls_url,
        "CA_FILE": str(tls_authority.ca_file),
        "CERT_FILE": str(tls_authority.client_cert),
        "KEY_FILE": str(tls_authority.client_key),
    }
    lines = start("tls_client_certificate.py", env=env | ({"AUTH": auth} if auth else {})).end()
    assert re.fullmatch(rf"Connected to RabbitMQ {re.escape(broker.version)}\.\d+ over TLS", lines[0])
    assert lines[1:] == ["Received: for your eyes only"]


@pytest.mark.parametrize("example", ["tutorials/receive_logs_direct.py", "tutorials/receive_logs_topic.py"])
def test_usage(example: str) -> None:
    done = subprocess.run([sys.executable, EXAMPLES / example], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Usage: ")


def test_every_example_is_tested() -> None:
    tested = {command[0] for consumer, (producer, _, _) in PAIRS.items() for command in (consumer, producer)}
    found = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.py")}
    assert found == tested | {command[0] for command in ALONE} | OTHERS


# --------------------------------------------------------------------------------------------------- README


def readme_blocks() -> list[str]:
    """The Python code of the README."""
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)


def test_readme(amqp_url: str, start: Callable[..., Script], tmp_path: Path) -> None:
    """The first block publishes, the second consumes; others are run by themselves."""
    publisher, consumer, *others = (
        block.replace("amqp://guest:guest@localhost/", amqp_url) for block in readme_blocks()
    )
    for name, text in (("consumer", consumer), ("publisher", publisher)):
        assert amqp_url in text
        assert len(text.splitlines()) <= 16, f"the {name} is to be short"
        (tmp_path / f"{name}.py").write_text(text)
    assert start(str(tmp_path / "publisher.py"), env={}).end() == ["confirmed"]
    consuming = start(str(tmp_path / "consumer.py"), env={})
    consuming.read_until("Hello, hare!")
    consuming.process.send_signal(signal.SIGINT)
    consuming.process.wait(LIMIT)
    assert consuming.errors().rstrip().endswith("KeyboardInterrupt")  # the README does not handle it
    for number, block in enumerate(others):
        (tmp_path / f"{number}.py").write_text(block)
        start(str(tmp_path / f"{number}.py"), env={}).end()


@pytest.mark.one_version
def test_readme_demo_prints_what_it_says(start: Callable[..., Script]) -> None:
    """The output below the set-up command is that of the command, but for figures."""

    def shape(line: str) -> str:
        return re.sub(r"\d[\d.,]*", "0", line)

    readme = (ROOT / "README.md").read_text()
    shown = re.search(r"python -m leveret demo\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    assert shown is not None
    lines = start("-m", "leveret", "demo", env={}).end()
    assert list(map(shape, lines)) == list(map(shape, shown[1].splitlines()))
