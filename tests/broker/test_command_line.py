"""The command line, as a user runs it: processes of their own, against a real broker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest
from yarl import URL

import leveret
from leveret.exceptions import ChannelNotFoundEntity

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from tests.support.brokers import TLSAuthority
    from tests.support.node import Node
    from tests.support.proxy import FaultProxy

LIMIT = 60


class Result:
    """How a command ended."""

    def __init__(self, code: int | None, out: bytes, err: bytes) -> None:
        self.code = code
        self.raw = out
        self.out = out.decode("utf-8", "replace")
        # asyncio's development mode complains about a busy machine
        lines = [line for line in err.decode().splitlines() if not re.match(r"Executing <.* took \d", line)]
        self.err = "".join(f"{line}\n" for line in lines)

    @property
    def records(self) -> list[dict[str, Any]]:
        """The lines of JSON on stdout."""
        return [json.loads(line) for line in self.out.splitlines()]


class Command:
    """A command that runs: Python's development mode, and every warning an error."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.said = b""

    async def reads(self, wanted: bytes) -> None:
        """Wait until it has written *wanted* to stdout."""
        assert self.process.stdout is not None
        async with asyncio.timeout(LIMIT):
            while wanted not in self.said:
                more = await self.process.stdout.read(65536)
                assert more, f"it ended: {self.said!r}"
                self.said += more

    async def end(self, number: signal.Signals | None = None) -> Result:
        """Send it the signal, and wait for its end."""
        if number is not None:
            self.process.send_signal(number)
        async with asyncio.timeout(LIMIT):
            out, err = await self.process.communicate()
        return Result(self.process.returncode, self.said + (out or b""), err or b"")


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Awaitable[Command]]]:
    """Start a command: ``await start("consume", "--queue", "q", url=…)``."""
    commands: list[Command] = []

    async def start(*arguments: str, url: str = "", stdout: int = asyncio.subprocess.PIPE) -> Command:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "AMQP_URL": url}
        former = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-X", "dev", "-W", "error", "-m", "leveret", *arguments,
                env=env, stdin=asyncio.subprocess.PIPE, stdout=stdout, stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
        finally:
            signal.signal(signal.SIGINT, former)
        commands.append(Command(process))
        return commands[-1]

    yield start
    for command in commands:
        with contextlib.suppress(ProcessLookupError):
            command.process.kill()
        await command.process.communicate()


@pytest.fixture
def run(start: Callable[..., Awaitable[Command]], amqp_url: str) -> Callable[..., Awaitable[Result]]:
    """Run a command to its end: ``await run("publish --queue q", "the body", input=b"…")``."""

    async def run(options: str, *more: str, input: bytes | None = None, url: str = amqp_url) -> Result:
        command = await start(*options.split(), *more, url=url)
        async with asyncio.timeout(LIMIT):
            out, err = await command.process.communicate(input)
        return Result(command.process.returncode, out, err)

    return run


Run = "Callable[..., Awaitable[Result]]"
Start = "Callable[..., Awaitable[Command]]"


@pytest.fixture
async def kept(channel: leveret.Channel, name: str) -> AsyncIterator[leveret.Queue]:
    """A queue that other connections may use."""
    queue = await channel.declare_queue(name, durable=True)
    yield queue
    await channel.queue_delete(name)


async def ready(channel: leveret.Channel, name: str) -> int:
    """How many messages the queue has for whoever wants them."""
    return (await channel.get_queue(name)).declaration_result.message_count or 0


async def until_ready(channel: leveret.Channel, name: str, count: int) -> None:
    """Wait until the queue has so many."""
    async with asyncio.timeout(LIMIT):
        while await ready(channel, name) != count:
            pass  # asking takes a round trip


# ----------------------------------------------------------------------------------------- publish, consume


async def test_what_is_published_is_consumed_with_all_that_it_has(run: Run, kept: leveret.Queue) -> None:
    sent = await run(
        f"publish --queue {kept} --persistent --content-type text/plain --priority 3 --correlation-id c --reply-to r "
        "--type t --app-id a --message-id m --expiration 60 --user-id guest -H n=1",
        "-H",
        'tags=["a", null]',
        "Grüße, Hase!",
    )
    assert (sent.code, sent.err) == (0, "")
    assert re.fullmatch(rf"published 1 message to queue '{kept}' in \d+\.\d\d s: 1 confirmed\n", sent.out)
    got = await run(f"consume --queue {kept} --count 1 --format json")
    assert (got.code, got.err) == (0, f"consumed 1 message from queue '{kept}'\n")
    assert got.records == [
        {
            "exchange": "",
            "routing_key": kept.name,
            "redelivered": False,
            "properties": {
                "content_type": "text/plain",
                "delivery_mode": 2,
                "priority": 3,
                "correlation_id": "c",
                "reply_to": "r",
                "expiration": 60.0,
                "message_id": "m",
                "type": "t",
                "user_id": "guest",
                "app_id": "a",
            },
            "headers": {"n": 1, "tags": ["a", None]},
            "body": "Grüße, Hase!",
        }
    ]


async def test_each_line_of_stdin_is_a_message(run: Run, kept: leveret.Queue) -> None:
    lines = [f"line {number}" for number in range(2000)]
    sent = await run(f"publish --queue {kept}", input="\r\n".join(lines).encode())
    assert (sent.code, sent.err) == (0, "")
    assert sent.out.startswith(f"published 2,000 messages to queue '{kept}' ")
    assert sent.out.endswith(": 2,000 confirmed\n")
    got = await run(f"consume --queue {kept} --count 2000 --format raw --prefetch 10")
    assert (got.code, got.out.splitlines()) == (0, lines)


async def test_a_file_is_one_message_byte_for_byte(run: Run, kept: leveret.Queue, tmp_path: Path) -> None:
    body = bytes(range(256)) * 300
    (tmp_path / "file").write_bytes(body)
    assert (await run(f"publish --queue {kept} --file", str(tmp_path / "file"))).code == 0
    assert (await run(f"publish --queue {kept} --file -", input=body)).code == 0
    got = await run(f"consume --queue {kept} --count 2 --format raw --delimiter", "")
    assert got.raw == body * 2
    missing = await run(f"publish --queue {kept} --file /nowhere/file")
    assert (missing.code, missing.err) == (1, "error: No such file or directory: /nowhere/file.\n")


async def test_a_body_is_published_many_times_at_a_rate(
    run: Run, kept: leveret.Queue, channel: leveret.Channel
) -> None:
    sent = await run(f"publish --queue {kept} --count 20 --rate 100 x")
    assert sent.code == 0
    assert float(re.search(r"in (\S+) s", sent.out)[1]) >= 0.15  # type: ignore[index]
    assert await ready(channel, kept.name) == 20


async def test_lines_are_published_up_to_a_count(run: Run, kept: leveret.Queue, channel: leveret.Channel) -> None:
    assert (await run(f"publish --queue {kept} --count 3", input=b"a\nb\nc\nd\n")).code == 0
    assert await ready(channel, kept.name) == 3


async def test_a_message_that_comes_back_is_told_and_exit_1(run: Run, name: str) -> None:
    for confirm in ("", " --no-confirm"):
        done = await run(f"publish --queue {name}{confirm} --count 12 x")
        assert done.code == 1
        told = done.err.splitlines()
        assert told[0] == (
            f"returned by the broker (NO_ROUTE), routing key '{name}': is there a queue '{name}'? --declare creates it"
        )
        assert told[-1] == "more are returned …"
        assert len(told) == 11
        assert done.out.endswith("12 returned\n")


async def test_a_returned_message_without_a_routing_key(run: Run, channel: leveret.Channel, name: str) -> None:
    await channel.declare_exchange(name, "direct", durable=True)
    done = await run(f"publish --exchange {name} x")
    assert done.code == 1
    assert done.err == "returned by the broker (NO_ROUTE), routing key '': no queue is bound for it\n"
    assert f"to exchange '{name}'" in done.out
    await channel.exchange_delete(name)


async def test_many_that_come_back_are_counted_and_not_kept(run: Run, name: str) -> None:
    done = await run(f"publish --queue {name} --count 25001 x")
    assert done.code == 1
    assert done.out.endswith(": 0 confirmed, 25,001 returned\n")
    assert len(done.err.splitlines()) == 11


async def test_a_message_that_cannot_be_sent_is_named_by_its_number(run: Run, kept: leveret.Queue) -> None:
    done = await run(f"publish --queue {kept} -H", f"a={'x' * 100_000}", "-H", f"b={'x' * 100_000}", "x")
    assert done.code == 1
    assert done.err.startswith("error: message 1: ")
    assert "publish_many" not in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "said", "fix"),
    [
        ("publish --user-id evil x --queue", "user_id property", "The user id has to be the user"),
        ("consume --argument x-priority=abc --queue", "x-priority", "Correct that argument"),
    ],
)
async def test_a_precondition_that_failed_is_told_with_its_own_fix(
    run: Run, kept: leveret.Queue, options: str, said: str, fix: str
) -> None:
    done = await run(f"{options} {kept}")
    assert done.code == 1
    assert said in done.err
    assert fix in done.err
    assert "other properties" not in done.err


async def test_the_longest_expiration_is_what_the_broker_takes(
    run: Run, kept: leveret.Queue, connection: leveret.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await run(f"publish --queue {kept} --expiration 315360000 x")).code == 0
    done = await run(f"publish --queue {kept} --expiration 315360000.001 x")
    assert "must not be over 315,360,000 seconds" in done.err
    monkeypatch.setattr("leveret.times._LONGEST_EXPIRATION", 10**15)
    channel = await connection.channel()  # `kept` is deleted on another one
    with pytest.raises(leveret.exceptions.DeliveryError, match="value_too_large"):
        await channel.default_exchange.publish(leveret.Message(b"x", expiration=315_360_000.001), kept.name)


async def test_a_body_that_is_too_large_is_told_with_its_own_fix(
    run: Run, kept: leveret.Queue, connection: leveret.Connection, tmp_path: Path
) -> None:
    if str(connection.server_properties["version"]).startswith("3."):
        pytest.skip("it takes 128 MiB")
    large = tmp_path / "large"
    large.touch()
    os.truncate(large, 16 * 1024 * 1024 + 1)
    done = await run(f"publish --queue {kept} --file {large}")
    assert done.code == 1
    assert "message 1: the broker says: PRECONDITION_FAILED - message size" in done.err
    assert "Send less in one message" in done.err


async def test_declare_creates_the_queue_once(run: Run, channel: leveret.Channel, name: str) -> None:
    for _ in range(2):
        done = await run(f"publish --queue {name} --declare x")
        assert (done.code, done.err) == (0, "")
    assert await ready(channel, name) == 2
    await channel.queue_delete(name)


async def test_declare_takes_a_queue_as_it_is(run: Run, channel: leveret.Channel, name: str) -> None:
    await channel.declare_queue(name, durable=True, arguments={"x-max-length": 5})
    assert (await run(f"publish --queue {name} --declare x")).code == 0
    assert await ready(channel, name) == 1
    await channel.queue_delete(name)


@pytest.mark.parametrize("options", ["publish --exchange", "publish --no-confirm --exchange", "consume --exchange"])
async def test_a_missing_exchange_is_one_sentence(run: Run, name: str, options: str) -> None:
    done = await run(f"{options} {name}", *(["x"] if "publish" in options else []))
    assert (done.code, done.out) == (1, "")
    assert done.err == (
        f"error: the broker says: NOT_FOUND - no exchange '{name}' in vhost '/'. "
        "Is the name right? Exchanges are declared by the programs that use them.\n"
    )


async def test_a_missing_queue_is_one_sentence(run: Run, name: str) -> None:
    done = await run(f"consume --queue {name}")
    assert (done.code, done.out) == (1, "")
    assert done.err == (
        f"error: the broker says: NOT_FOUND - no queue '{name}' in vhost '/'. "
        "Is the name right? --declare creates a queue that is missing.\n"
    )


async def test_a_refused_message_is_told_and_exit_1(run: Run, channel: leveret.Channel, name: str) -> None:
    arguments = {"x-max-length": 1, "x-overflow": "reject-publish"}
    await channel.declare_queue(name, durable=True, arguments=arguments)
    await run(f"publish --queue {name} fills")
    done = await run(f"publish --queue {name} x")
    assert done.code == 1
    assert done.err.startswith("message 1: the broker refused the message (basic.nack")
    assert done.out.endswith("0 confirmed, 1 failed (MessageNacked)\n")
    await channel.queue_delete(name)


async def test_peek_leaves_the_messages_where_they_were(
    run: Run, kept: leveret.Queue, channel: leveret.Channel
) -> None:
    await run(f"publish --queue {kept}", input=b"\n".join(b"%d" % number for number in range(250)))
    seen = await run(f"consume --queue {kept} --peek --format raw")
    assert seen.out.split() == [str(number) for number in range(250)]
    assert seen.err == f"looked at 250 messages of queue '{kept}', and left them there\n"
    await until_ready(channel, kept.name, 250)
    some = await run(f"consume --queue {kept} --peek --count 3 --format json")
    assert [(record["body"], record["redelivered"]) for record in some.records] == [
        ("0", True),
        ("1", True),
        ("2", True),
    ]
    await until_ready(channel, kept.name, 250)
    assert (await run(f"consume --queue {kept} --peek --count 251 --format raw")).code == 0


async def test_peek_at_a_stream_says_how_to_read_it(run: Run, channel: leveret.Channel, name: str) -> None:
    await channel.declare_queue(name, durable=True, arguments={"x-queue-type": "stream"})
    await run(f"publish --queue {name} x")
    peeked = await run(f"consume --queue {name} --peek --count 1")
    assert peeked.code == 1
    assert "`consume --argument x-stream-offset=first`" in peeked.err.splitlines()[-1]
    read = await run(f"consume --queue {name} --argument x-stream-offset=first --count 1 --format raw")
    assert (read.code, read.out) == (0, "x\n")
    await channel.queue_delete(name)


async def test_consume_ends_after_silence(run: Run, kept: leveret.Queue) -> None:
    await run(f"publish --queue {kept} x")
    done = await run(f"consume --queue {kept} --timeout 0.2")
    assert done.code == 0
    assert done.out == f"1 | default exchange | routing key '{kept}' | 1 byte\nx\n\n"
    assert done.err == f"consumed 1 message from queue '{kept}': nothing came for 0.2 s\n"
    assert (await run(f"consume --queue {kept} --timeout 0.2 --count 1")).code == 1


async def test_consume_takes_no_more_than_its_count(run: Run, kept: leveret.Queue, channel: leveret.Channel) -> None:
    await run(f"publish --queue {kept} --count 10 x")
    assert (await run(f"consume --queue {kept} --count 4 --format raw")).out == "x\n" * 4
    await until_ready(channel, kept.name, 6)
    message = await kept.get()
    assert not message.redelivered
    await message.ack()


async def test_consume_from_an_exchange_by_binding_keys(
    run: Run, start: Start, amqp_url: str, channel: leveret.Channel, name: str
) -> None:
    exchange = await channel.declare_exchange(name, "topic")
    options = f"consume --exchange {name} --binding-key kern.* --binding-key *.error --count 2 --format raw"
    consuming = await start(*options.split(), url=amqp_url)
    assert consuming.process.stderr is not None
    assert b"waiting for messages of exchange" in await consuming.process.stderr.readline()
    for key in ("kern.info", "user.info", "user.error"):
        await exchange.publish(leveret.Message(key.encode()), key, mandatory=False)
    done = await consuming.end()
    assert (done.code, done.out) == (0, "kern.info\nuser.error\n")
    await exchange.delete()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_consume_ends_well_on_a_signal(
    start: Start, amqp_url: str, kept: leveret.Queue, channel: leveret.Channel, number: signal.Signals, code: int
) -> None:
    await channel.default_exchange.publish(leveret.Message(b"one"), kept.name)
    consuming = await start("consume", "--queue", kept.name, "--format", "raw", url=amqp_url)
    await consuming.reads(b"one\n")
    done = await consuming.end(number)
    assert (done.code, done.err) == (code, f"consumed 1 message from queue '{kept}'\n")
    assert await ready(channel, kept.name) == 0


async def test_consume_ends_when_nobody_reads_any_more(
    start: Start, amqp_url: str, kept: leveret.Queue, channel: leveret.Channel
) -> None:
    """At once, where the system tells; it need not wait for a message that it then cannot write."""
    reading, writing = os.pipe()
    consuming = await start("consume", "--queue", kept.name, "--format", "raw", url=amqp_url, stdout=writing)
    os.close(writing)
    await channel.default_exchange.publish(leveret.Message(b"one"), kept.name)
    assert await asyncio.to_thread(os.read, reading, 100) == b"one\n"
    os.close(reading)
    done = await consuming.end()
    assert (done.code, done.err) == (0, f"consumed 1 message from queue '{kept}'\n")
    assert await ready(channel, kept.name) == 0


async def test_what_a_closed_pipe_cut_off_stays_in_the_queue(
    start: Start, amqp_url: str, kept: leveret.Queue, channel: leveret.Channel
) -> None:
    body = leveret.Message(b"x" * 1_000_000)  # more than a pipe holds
    for _ in range(3):
        await channel.default_exchange.publish(body, kept.name)
    reading, writing = os.pipe()
    consuming = await start("consume", "--queue", kept.name, "--format", "raw", url=amqp_url, stdout=writing)
    os.close(writing)
    await asyncio.to_thread(os.read, reading, 100)
    os.close(reading)
    done = await consuming.end()
    assert (done.code, done.err) == (0, f"consumed 0 messages from queue '{kept}'\n")
    await until_ready(channel, kept.name, 3)


@pytest.mark.skipif(sys.platform != "linux", reason="nothing else tells what of a pipe was read")
async def test_what_a_reader_has_not_read_stays_in_the_queue(
    start: Start, amqp_url: str, kept: leveret.Queue, channel: leveret.Channel
) -> None:
    await channel.default_exchange.publish_many([leveret.Message(b"%d" % number) for number in range(50)], kept.name)
    reading, writing = os.pipe()
    consuming = await start("consume", "--queue", kept.name, "--format", "raw", url=amqp_url, stdout=writing)
    os.close(writing)
    assert await asyncio.to_thread(os.read, reading, 4096) == b"0\n"
    os.close(reading)
    done = await consuming.end()
    assert (done.code, done.err) == (0, f"consumed 1 message from queue '{kept}'\n")
    await until_ready(channel, kept.name, 49)


async def test_a_reader_behind_a_pipe_gets_all_of_it(run: Run, kept: leveret.Queue, channel: leveret.Channel) -> None:
    await run(f"publish --queue {kept}", input=b"\n".join(b"%d" % number for number in range(5000)))
    done = await run(f"consume --queue {kept} --format raw --timeout 1")
    assert done.out.split() == [str(number) for number in range(5000)]
    assert await ready(channel, kept.name) == 0


async def test_consume_into_what_is_full_keeps_the_message(
    start: Start, amqp_url: str, kept: leveret.Queue, channel: leveret.Channel
) -> None:
    await channel.default_exchange.publish(leveret.Message(b"x"), kept.name)
    full = os.open("/dev/full", os.O_WRONLY)
    consuming = await start("consume", "--queue", kept.name, url=amqp_url, stdout=full)
    os.close(full)
    done = await consuming.end()
    assert done.code == 1
    assert done.err.splitlines()[-1] == "error: standard output cannot be written: No space left on device."
    await until_ready(channel, kept.name, 1)


async def test_publish_into_what_is_full_is_told(start: Start, amqp_url: str, kept: leveret.Queue) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    publishing = await start("publish", "--queue", kept.name, "x", url=amqp_url, stdout=full)
    os.close(full)
    done = await publishing.end()
    assert (done.code, done.err) == (1, "error: standard output cannot be written: No space left on device.\n")


async def test_a_timeout_does_not_count_while_the_link_is_down(
    start: Start, link: FaultProxy, kept: leveret.Queue, channel: leveret.Channel
) -> None:
    options = ("--format", "raw", "--timeout", "1")
    consuming = await start("consume", "--queue", kept.name, *options, url=link.url)
    await channel.default_exchange.publish(leveret.Message(b"one"), kept.name)
    await consuming.reads(b"one\n")
    await link.refuse()
    link.rst()
    await channel.default_exchange.publish(leveret.Message(b"two"), kept.name)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(consuming.process.wait(), 2)
    await link.accept()
    await consuming.reads(b"two\n")
    done = await consuming.end()
    assert done.code == 0
    assert "nothing came for 1 s" in done.err


async def test_a_link_that_does_not_come_back_is_a_failure(
    start: Start, link: FaultProxy, kept: leveret.Queue, channel: leveret.Channel
) -> None:
    url = str(URL(link.url).update_query(operation_timeout="1"))
    consuming = await start("consume", "--queue", kept.name, "--format", "raw", "--timeout", "0.5", url=url)
    await channel.default_exchange.publish(leveret.Message(b"one"), kept.name)
    await consuming.reads(b"one\n")
    await link.refuse()
    link.rst()
    done = await consuming.end()
    assert done.code == 1
    assert "error: the link was lost, and is not back after 1 s: the connection is reconnecting" in done.err
    assert "nothing came" not in done.err


async def test_consume_ends_on_ctrl_c_while_its_reader_does_not_read(
    start: Start, amqp_url: str, kept: leveret.Queue, channel: leveret.Channel
) -> None:
    await channel.default_exchange.publish(leveret.Message(b"x" * 1_000_000), kept.name)
    reading, writing = os.pipe()
    consuming = await start("consume", "--queue", kept.name, "--format", "raw", url=amqp_url, stdout=writing)
    os.close(writing)
    await asyncio.to_thread(os.read, reading, 100)
    done = await consuming.end(signal.SIGINT)
    os.close(reading)
    assert done.code == 130
    await until_ready(channel, kept.name, 1)


async def test_consume_goes_on_after_the_link_was_lost(
    start: Start, link: FaultProxy, kept: leveret.Queue, channel: leveret.Channel
) -> None:
    consuming = await start("consume", "--queue", kept.name, "--format", "raw", url=link.url)
    await channel.default_exchange.publish(leveret.Message(b"one"), kept.name)
    await consuming.reads(b"one\n")
    link.rst()
    await channel.default_exchange.publish(leveret.Message(b"two"), kept.name)
    await consuming.reads(b"two\n")  # "one" may have come again: its ack was on the way
    done = await consuming.end(signal.SIGINT)
    assert done.code == 130
    assert "connection lost, reconnecting" in done.err
    assert "guest:guest" not in done.err


async def test_publish_ends_on_ctrl_c_and_tells_what_was_confirmed(
    start: Start, amqp_url: str, kept: leveret.Queue, channel: leveret.Channel
) -> None:
    publishing = await start("publish", "--queue", kept.name, url=amqp_url)
    assert publishing.process.stdin is not None
    publishing.process.stdin.write(b"one\ntwo\nhalf")
    await until_ready(channel, kept.name, 2)
    done = await publishing.end(signal.SIGINT)
    assert done.code == 130
    assert re.fullmatch(rf"published 2 messages to queue '{kept}' in .*: 2 confirmed\n", done.out)


# ------------------------------------------------------------------------------------------------------ check


async def test_check_of_a_broker_that_is_all_right(run: Run, amqp_url: str) -> None:
    done = await run("check")
    assert (done.code, done.err) == (0, "")
    url, *stages, last = done.out.splitlines()
    assert url == str(URL(amqp_url).with_password("******"))
    assert [re.split(r"\s{2,}", line.strip())[:2] for line in stages[2:]] == [
        ["ok", "log in as guest, open vhost /"],
        ["ok", "open a channel"],
        ["ok", "declare a temporary queue"],
        ["ok", "publish, and wait for the confirm"],
        ["ok", "get it back"],
        ["ok", "publish and consume another one"],
        ["ok", "delete the queue"],
    ]
    assert "RabbitMQ " in stages[2]
    assert re.fullmatch(r"all is well: 9 stages in [\d.,]+ ms", last)


async def test_check_tells_a_wrong_password_from_a_wrong_vhost(run: Run, amqp_url: str) -> None:
    url = URL(amqp_url)
    wrong = await run("check", url=str(url.with_password("SECRET")))
    assert wrong.code == 1
    assert "FAIL  log in as guest" in wrong.out
    assert wrong.out.splitlines()[-1] == "   fix  Correct the user or the password in --url or AMQP_URL."
    assert "SECRET" not in wrong.out + wrong.err
    missing = await run("check", url=str(url.with_path("/missing")))
    assert missing.code == 1
    assert "  ok    log in as guest " in missing.out
    assert "  FAIL  open vhost missing " in missing.out
    assert "rabbitmqctl add_vhost" in missing.out


@pytest.mark.node
async def test_check_names_the_permission_that_is_missing(run: Run, broker: Node) -> None:
    broker.add_user("carol", "secret", "", "", "")
    url = URL(broker.url).with_user("carol").with_password("secret")
    done = await run("check", url=str(url))
    assert done.code == 1
    assert "FAIL  declare a temporary queue" in done.out
    assert "rabbitmqctl set_permissions -p / carol '.*' '.*' '.*'" in done.out.splitlines()[-1]


@pytest.mark.node
async def test_check_over_tls(run: Run, broker: Node, tls_authority: TLSAuthority) -> None:
    url = URL(broker.tls_url)
    good = await run("check", url=str(url.update_query(cafile=str(tls_authority.ca_file))))
    assert good.code == 0
    assert re.search(r"ok +TLS .*TLSv1\.\d, certificate valid until ", good.out)
    unknown = await run("check", url=str(url.update_query(cafile=str(tls_authority.wrong_ca_file))))
    assert unknown.code == 1
    assert "FAIL  TLS" in unknown.out
    assert "?cafile=" in unknown.out.splitlines()[-1]


# ---------------------------------------------------------------------------------------------- bench, demo


async def test_bench_measures_and_leaves_nothing_behind(run: Run, channel: leveret.Channel) -> None:
    done = await run("bench --count 2000 --producers 2 --consumers 2 --ack-batch 10 --persistent --json")
    assert (done.code, done.err) == (0, "")
    (result,) = done.records
    assert (result["sent"], result["confirmed"], result["received"]) == (4000, 4000, 4000)
    for latency in (result["latency_ms"], result["confirm_latency_ms"]):
        assert 0 < latency["min"] <= latency["median"] <= latency["p95"] <= latency["p99"] <= latency["max"] < 60_000
    with pytest.raises(ChannelNotFoundEntity):
        await channel.get_queue(result["queue"])


@pytest.mark.parametrize("queue_type", ["classic", "quorum", "stream"])
async def test_bench_of_queue_types_and_small_bodies(run: Run, queue_type: str) -> None:
    done = await run(f"bench --time 0.5 --rate 200 --size 5 --queue-type {queue_type}")
    assert (done.code, done.err) == (0, "")
    sent, received, latency, confirm = done.out.splitlines()
    assert re.match(r"sent +\d+ +\d+/s +\d+ confirmed", sent)
    assert re.match(r"received +\d+", received)
    assert latency.startswith("latency   min ")
    assert confirm.startswith("confirm   min ")


async def test_bench_without_confirms_and_acks(run: Run) -> None:
    done = await run("bench --count 1000 --confirms 0 --ack-batch 0 --json")
    (result,) = done.records
    assert (done.code, result["sent"], result["confirmed"], result["received"]) == (0, 1000, 0, 1000)
    assert result["confirm_latency_ms"] is None


async def test_bench_only_publishes_or_only_consumes(run: Run, kept: leveret.Queue, channel: leveret.Channel) -> None:
    filled = await run(f"bench --queue {kept} --consumers 0 --count 500 --json")
    assert (filled.code, filled.records[0]["sent"], filled.records[0]["latency_ms"]) == (0, 500, None)
    assert await ready(channel, kept.name) == 500
    await channel.default_exchange.publish(leveret.Message(b"somebody else's"), kept.name)
    emptied = await run(f"bench --queue {kept} --producers 0 --count 501")
    assert emptied.code == 0
    assert emptied.out.splitlines()[0].startswith("received           501")
    assert emptied.out.splitlines()[-1] == "1 messages were not of a bench: they count for no latency"
    assert await ready(channel, kept.name) == 0


@pytest.mark.parametrize("options", ["", "--ack-batch 100", "--consumers 3", "--count 1000 --prefetch 20"])
async def test_bench_consumes_no_more_than_its_count(
    run: Run, kept: leveret.Queue, channel: leveret.Channel, options: str
) -> None:
    await run(f"publish --queue {kept} --count 1500 x")
    done = await run(f"bench --producers 0 --queue {kept} --count 10 {options} --json")
    wanted = 1000 if "--count" in options else 10
    assert (done.code, done.records[0]["received"], done.err) == (0, wanted, "")
    await until_ready(channel, kept.name, 1500 - wanted)


async def test_bench_of_large_bodies_takes_the_time_that_it_was_given(run: Run) -> None:
    done = await run("bench --time 1 --size 15000000 --json")
    assert done.code == 0
    assert done.records[0]["publish_seconds"] < 4
    assert done.records[0]["consume_seconds"] < 6


async def test_bench_ends_on_ctrl_c_with_its_figures(
    start: Start, amqp_url: str, kept: leveret.Queue, channel: leveret.Channel
) -> None:
    benching = await start("bench", "--queue", kept.name, "--consumers", "0", "--rate", "100", url=amqp_url)
    async with asyncio.timeout(LIMIT):
        while not await ready(channel, kept.name):
            pass
    done = await benching.end(signal.SIGINT)
    assert (done.code, done.err) == (130, "")
    assert re.match(r"sent +\d+ +\d+/s +\d+ confirmed\n", done.out)


def check_demo(done: Result) -> None:
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    patterns = (
        r"connected   to .*\S",
        r"publishing  1,000 messages, each confirmed by the broker; consuming them, each acknowledged",
        r"link cut    on purpose: \d+ messages are confirmed, \d+ are on their way",
        r"recovered   in \d\.\d\d s: the link, the channel, the queue, the consumer",
        r"sent again  \d+ messages, whose confirms were lost with the link",
        r"result      1,000 of 1,000 arrived in \d\.\d s: 0 lost, \d+ twice \(that is at-least-once delivery\)",
    )
    assert len(lines) == len(patterns), lines
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line)


async def test_demo_on_a_broker_of_ones_own(run: Run, amqp_url: str) -> None:
    check_demo(await run("demo --url", amqp_url))


@pytest.mark.one_version
async def test_demo_ends_well_when_its_reader_goes_away_in_the_middle(start: Start) -> None:
    reading, writing = os.pipe()
    demo = await start("demo", stdout=writing)
    os.close(writing)
    await asyncio.to_thread(os.read, reading, 10)
    os.close(reading)
    done = await demo.end()
    assert (done.code, done.err) == (0, "")


@pytest.mark.node
async def test_demo_over_tls(run: Run, broker: Node, tls_authority: TLSAuthority) -> None:
    check_demo(await run("demo --url", str(URL(broker.tls_url).update_query(cafile=str(tls_authority.ca_file)))))


@pytest.mark.one_version
async def test_demo_with_nothing_installed(run: Run) -> None:
    check_demo(await run("demo"))


@pytest.mark.one_version
async def test_broker_serves_other_processes(run: Run, start: Start) -> None:
    serving = await start("broker", "--port", "0", "--version", "4.0")
    await serving.reads(b"Ctrl-C ends it.\n")
    url = re.search(rb"amqp://\S+", serving.said)[0].decode()  # type: ignore[index]
    assert (await run("check", url=url)).code == 0
    taken = await run(f"broker --port {URL(url).port}")
    assert taken.code == 1
    assert "is in use" in taken.err
    done = await serving.end(signal.SIGINT)
    assert (done.code, done.err) == (130, "")
