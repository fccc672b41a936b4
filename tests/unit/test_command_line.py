"""The command line without a broker: what arguments mean, how messages are shown, how errors are told, and figures."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import io
import json
import logging
import math
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
from pamqp.commands import Basic

import leveret
from leveret import exceptions
from leveret.cli import load
from leveret.cli.bench import run as run_bench
from leveret.cli.bench import summary, summary_lines
from leveret.cli.explain import CommandFailed, fix_for, sentence, what_happened
from leveret.cli.formats import as_json, as_pretty, json_value, raw
from leveret.cli.load import Figures, Load, sent_at, stamp
from leveret.cli.main import main, make_parser
from leveret.cli.measure import Latencies, Pace, milliseconds, per_second
from leveret.cli.options import DEFAULT_URL, counted, delimiter, hide_passwords, name_and_value, rate, seconds, whole
from leveret.cli.publish import make_message
from leveret.cli.terminal import Live, LogToStderr, say
from leveret.message import IncomingMessage
from leveret.testing import Broker
from leveret.wire.codec import Properties, encode_properties

if TYPE_CHECKING:
    from collections.abc import Callable

COMMANDS = ("publish", "consume", "check", "bench", "demo", "broker")
BAD_TABLE = struct.pack(">I", 3) + b"\x01kz"
BAD_HEADERS = b"\xb0\x80" + b"\x04text" + BAD_TABLE + b"\x02" + b"\x02me"


def incoming(
    body: bytes = b"Hello",
    properties: bytes | None = None,
    *,
    exchange: bytes = b"logs",
    key: bytes = b"kern.info",
    redelivered: bool = False,
    **kwargs: Any,
) -> IncomingMessage:
    found = encode_properties(Properties(**kwargs)) if properties is None else properties
    route = bytes([len(exchange)]) + exchange + bytes([len(key)]) + key
    return IncomingMessage.from_wire(None, b"tag", 1, redelivered, route, found, body, True)


# ------------------------------------------------------------------------------------------------- arguments


def refused(read: Callable[[str], object], text: str) -> str:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        read(text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("tries=3", 3),
        ("ratio=1.5", 1.5),
        ("on=true", True),
        ("nothing=null", None),
        ('tags=["a", 1]', ["a", 1]),
        ('deep={"a": {"b": [1]}}', {"a": {"b": [1]}}),
        ("plain=some text", "some text"),
        ('quoted="3"', "3"),
        ("empty=", ""),
        ("equation=a=b", "a=b"),
        ("odd=NaN", "NaN"),
        ("deep=" + "[" * 50_000, "[" * 50_000),
        ("far=[Infinity]", "[Infinity]"),
    ],
)
def test_a_header_is_json_or_else_text(text: str, value: object) -> None:
    assert name_and_value(text) == (text.partition("=")[0], value)


@pytest.mark.parametrize("text", ["name", "=value", "", f"{'n' * 256}=1"])
def test_a_header_without_a_name_is_refused(text: str) -> None:
    assert "name" in refused(name_and_value, text)


@pytest.mark.parametrize("text", ["a=1e999", "a=-1e999", 'a={"b": [1e999]}'])
def test_a_number_that_is_too_large_for_one_is_refused(text: str) -> None:
    assert "1e999 is more than a number can be" in refused(name_and_value, text)
    assert name_and_value('a="1e999"') == ("a", "1e999")


def test_numbers_are_read_and_refused_with_what_is_expected() -> None:
    assert whole(0)("1,000") == whole(0)("1_000") == 1000
    assert refused(whole(1), "0") == "'0' is not a whole number from 1 on"
    assert refused(whole(0, 255), "256") == "'256' is not a whole number from 0 to 255"
    for text in ("-1", "1.5", "²", ""):
        assert refused(whole(1), text)
    assert seconds("0.5") == 0.5
    assert rate("100") == 100
    for text in ("0", "-1", "inf", "nan", "x"):
        assert "over 0" in refused(seconds, text)
        assert "over 0" in refused(rate, text)


def test_a_delimiter_may_be_escaped() -> None:
    assert [delimiter(text) for text in (r"\n", r"\0", "", r"\t|", r"\\n", r"\x", "→")] == [
        b"\n", b"\0", b"", b"\t|", b"\\n", b"\\x", "→".encode(),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("amqp://me:secret@host/v", "amqp://me:******@host/v"),
        (
            "at amqps://me:se@cr:et@host:1/, twice amqp://a:b@c/",
            "at amqps://me:******@host:1/, twice amqp://a:******@c/",
        ),
        ("amqp://me:se/c#r?et@host/", "amqp://me:******@host/"),
        ("amqp://:secret@host/", "amqp://:******@host/"),
        ("amqp://host/?password=secret&heartbeat=5", "amqp://host/?password=******&heartbeat=5"),
        ("amqp://host:5672/ is all right, and so is me@host", "amqp://host:5672/ is all right, and so is me@host"),
    ],
)
def test_passwords_are_hidden(text: str, hidden: str) -> None:
    assert hide_passwords(text) == hidden


def test_the_url_is_an_argument_or_else_the_variable_or_else_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMQP_URL", "amqp://variable/")
    assert make_parser().parse_args(["check", "--url", "amqp://one,two/"]).url == "amqp://one,two/"
    assert make_parser().parse_args(["check"]).url == "amqp://variable/"
    monkeypatch.delenv("AMQP_URL")
    assert make_parser().parse_args(["check"]).url == DEFAULT_URL == "amqp://guest:guest@localhost/"


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "--url", "http://me:SECRET@host/"],
        ["check", "--url", "amqp://me:SEC#RET@host/"],
        ["check", "amqp://me:SECRET@host/"],
        ["amqp://me:SECRET@host/"],
        ["check", "--uri=amqp://me:SECRET@host/"],
    ],
)
def test_wrong_usage_shows_no_password(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    said = capsys.readouterr()
    assert caught.value.code == 2
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert "--help` tells how it is used" in said.err
    assert "SEC" not in said.err


def test_a_wrong_variable_is_told_without_its_password(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AMQP_URL", "http://me:SECRET@host/")
    with pytest.raises(SystemExit):
        main(["check"])
    assert "scheme is 'http'" in (said := capsys.readouterr().err)
    assert "SECRET" not in said
    assert said.startswith("error: the variable AMQP_URL: ")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("publish x", "--queue --exchange is required"),
        ("publish --queue q --exchange e x", "not allowed with"),
        ("publish --queue q --routing-key k x", "--routing-key goes with --exchange"),
        ("publish --exchange e --declare x", "--declare goes with --queue"),
        ("publish --queue q --file f x", "not allowed with"),
        ("publish --queue q --priority 256 x", "whole number from 0 to 255"),
        ("publish --queue= x", "the name of a queue is not empty"),
        ("consume --queue=", "the name of a queue is not empty"),
        ("bench --queue=", "the name of a queue is not empty"),
        ("bench --producers 0 --queue q --count 5 --ack-batch 0", "the broker forgets more messages than that"),
        ("publish --queue q -H a=1e999 x", "1e999 is more than a number can be"),
        ("consume", "--queue --exchange is required"),
        ("consume --queue q --binding-key k", "--binding-key goes with --exchange"),
        ("consume --exchange e --declare", "--declare goes with --queue"),
        ("consume --exchange e --peek", "--peek goes with --queue"),
        ("consume --queue q --peek --ack", "not allowed with"),
        ("consume --queue q --peek --timeout 1", "takes no --timeout"),
        ("consume --queue q --format xml", "invalid choice: 'xml'"),
        ("bench --producers 0 --consumers 0", "nothing to do"),
        ("bench --producers 0", "needs a --queue"),
        ("bench --ack-batch 10 --prefetch 5", "more than --prefetch"),
        ("bench --queue-type stream --ack-batch 0", "have to acknowledge"),
        ("consume --queue q --delimiter x", "--delimiter goes with --format raw"),
        ("broker --version foo", "version must be one of 3.10, 4.0"),
        ("publish --queue q --expiration 1e30 x", "expiration must not be over"),
        (f"publish --queue q -H a={2**64} x", "64 bits"),
        ("", "required: COMMAND"),
        ("nonsense", "invalid choice: 'nonsense'"),
    ],
)
def test_wrong_usage_is_told(arguments: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    assert caught.value.code == 2
    assert told in capsys.readouterr().err.replace("one of the arguments ", "")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_teaches_by_examples(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    said = capsys.readouterr().out
    assert caught.value.code == 0
    assert "examples:\n  # " in said
    assert f"\n  python -m leveret {command or 'demo'}" in said
    assert max(map(len, said.splitlines())) <= 120


def examples() -> list[list[str]]:
    """The arguments of each example in the helps, as a shell would read them."""
    import shlex

    found: list[list[str]] = []
    parser = make_parser()
    subparsers = next(action for action in parser._actions if isinstance(action.choices, dict))
    for each in (parser, *subparsers.choices.values()):  # type: ignore[union-attr]
        for line in (each.epilog or "").replace("\\\n", " ").splitlines():
            if line.startswith("  python -m leveret ") and "COMMAND" not in line:
                words = shlex.split(line)[3:]
                stop = next((i for i, word in enumerate(words) if word in {"<", ">", "|", "||"}), len(words))
                found.append(words[:stop])
    return found


def test_the_examples_of_the_helps_are_right_usage() -> None:
    assert len(examples()) > 20
    for words in examples():
        assert make_parser().parse_args(words).command == words[0]


def test_every_option_is_described() -> None:
    parser = make_parser()
    subparsers = next(action for action in parser._actions if isinstance(action.choices, dict))
    for name, command in subparsers.choices.items():  # type: ignore[union-attr]
        for action in command._actions:
            assert action.help, f"{name} {action.option_strings}"


def test_the_properties_of_a_message_are_what_was_given() -> None:
    options = (
        "--content-type text/plain --content-encoding gzip --persistent --expiration 1.5 --priority 3 "
        "--correlation-id c --reply-to r --message-id m --type t --app-id a --user-id u -H n=1 -H s=x"
    )
    args = make_parser().parse_args(["publish", "--queue", "q", *options.split()])
    message = make_message(args, b"body")
    assert message.body == b"body"
    assert message.headers == {"n": 1, "s": "x"}
    properties = message.wire_properties()
    assert (properties.content_type, properties.content_encoding, properties.delivery_mode) == ("text/plain", "gzip", 2)
    assert (properties.expiration, properties.priority, properties.correlation_id) == ("1500", 3, "c")
    assert (properties.reply_to, properties.message_id, properties.type) == ("r", "m", "t")
    assert (properties.app_id, properties.user_id, properties.timestamp) == ("a", "u", None)


# --------------------------------------------------------------------------------------------------- formats


def test_json_is_a_line_with_what_was_set() -> None:
    line = as_json(1, incoming("grüß\ndich".encode(), content_type="text/plain", headers={"n": 1}, redelivered=True))
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert json.loads(line) == {
        "exchange": "logs",
        "routing_key": "kern.info",
        "redelivered": True,
        "properties": {"content_type": "text/plain"},
        "headers": {"n": 1},
        "body": "grüß\ndich",
    }


def test_json_has_a_body_that_is_no_text_as_base64() -> None:
    record = json.loads(as_json(1, incoming(b"\xff\x00")))
    assert record["body_base64"] == "/wA="
    assert "body" not in record


def test_json_has_a_bad_table_as_it_came() -> None:
    record = json.loads(as_json(1, incoming(b"x", BAD_HEADERS)))
    assert record["headers"] == {}
    assert record["headers_error"]
    assert record["headers_raw_base64"] == "AAAAAwFreg=="
    assert record["properties"] == {"content_type": "text", "delivery_mode": 2, "message_id": "me"}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (b"text", "text"),
        (b"\xff", {"base64": "/w=="}),
        (Decimal("1.50"), "1.50"),
        (datetime.datetime(2026, 11, 21, tzinfo=datetime.UTC), "2026-11-21T00:00:00+00:00"),
        (math.inf, "inf"),
        ([1, [b"a"], {"k": None}], [1, ["a"], {"k": None}]),
        ({"\udcff": "\udcff"}, {"\\udcff": "\\udcff"}),
        (True, True),
    ],
)
def test_any_header_can_be_json(value: object, shown: object) -> None:
    assert json_value(value) == shown
    json.dumps(json_value(value), allow_nan=False, ensure_ascii=False).encode()


def test_pretty_shows_what_was_set_and_the_body() -> None:
    message = incoming(b"two\nlines", content_type="text/plain", headers={"n": 1, "s": "x"}, redelivered=True)
    assert as_pretty(2, message).decode() == (
        "2 | exchange 'logs' | routing key 'kern.info' | 9 bytes | redelivered\n"
        "  content_type     text/plain\n"
        "  header n = 1\n"
        "  header s = x\n"
        "two\nlines\n\n"
    )
    assert as_pretty(1, incoming(b"1", exchange=b"")).startswith(
        b"1 | default exchange | routing key 'kern.info' | 1 byte\n"
    )


def test_pretty_shows_a_bad_table_as_it_came() -> None:
    shown = as_pretty(1, incoming(b"x", BAD_HEADERS)).decode()
    assert "  headers cannot be read: " in shown
    assert "  headers, as they came: 00 00 00 03 01 6b 7a\n" in shown
    assert "  message_id       me\n" in shown


def test_pretty_lets_nothing_reach_the_terminal_but_text() -> None:
    """A body or a name with escape sequences could change the title, the colours or the keyboard."""
    message = incoming(
        b"a\x1b]0;title\x07b\r\tc",
        key=b"\x1b[31m",
        headers={"\x1b[2J": "\x1b[2J"},
        message_id="\x1b",
        redelivered=False,
    )
    shown = as_pretty(1, message).decode()
    assert not set("\x1b\x07\r") & set(shown)
    assert "a\\x1b]0;title\\x07b\\r\tc" in shown
    assert as_pretty(1, incoming(b"\xff" * 300)).decode().count("ff") == 256


def test_raw_is_the_body_and_a_delimiter() -> None:
    assert raw(b"\n")(1, incoming(b"\xff\x1b")) == b"\xff\x1b\n"
    assert raw(b"")(1, incoming(b"\xff\x1b")) == b"\xff\x1b"


# ---------------------------------------------------------------------------------------------------- errors


def test_an_error_is_a_sentence_with_a_fix() -> None:
    refusal = exceptions.LoginRefused("the broker refused the login of user 'me' by PLAIN (vhost '/')")
    assert sentence(refusal) == f"{refusal}. Correct the user or the password in --url or AMQP_URL."
    missing = exceptions.ChannelNotFoundEntity(
        "NOT_FOUND", reply_code=404, reply_text="NOT_FOUND - no queue 'q' in vhost '/'", by_broker=True
    )
    assert sentence(missing) == (
        "the broker says: NOT_FOUND - no queue 'q' in vhost '/'. Is the name right? "
        "--declare creates a queue that is missing."
    )
    missing.reply_text = "NOT_FOUND - no exchange 'e' in vhost '/'"
    assert "--declare" not in sentence(missing)
    assert "python -m leveret broker" in sentence(ConnectionRefusedError(111, "Connect call failed"))
    assert sentence(FileNotFoundError(2, "No such file or directory", "/no")) == "No such file or directory: /no."
    assert sentence(TimeoutError()) == "it took too long."
    assert sentence(RuntimeError()) == "RuntimeError."
    assert sentence(CommandFailed("It is so.", "Do that.")) == "It is so. Do that."
    mute = exceptions.AMQPConnectionError("h:1 closed the connection before it said a word: is that an AMQP port?")
    assert fix_for(mute) == "Correct the port or the scheme in --url."


def test_a_nack_is_no_broker_that_is_missing() -> None:
    error = exceptions.MessageNacked(Basic.Nack(1))
    assert "queue full (`x-max-length` with `reject-publish`)" in sentence(error)
    assert "leveret broker" not in sentence(error)


def test_an_error_shows_no_password_and_no_control_characters() -> None:
    assert sentence(OSError("amqp://me:SECRET@host/ is \x1b[31m")) == "amqp://me:******@host/ is \\x1b[31m."


def test_every_refusal_that_a_newcomer_meets_has_a_fix() -> None:
    for kind in (
        exceptions.LoginRefused,
        exceptions.ConnectionNotAllowed,
        exceptions.ConnectTimeout,
        exceptions.IncompatibleProtocolError,
        exceptions.ChannelNotFoundEntity,
        exceptions.ChannelAccessRefused,
        exceptions.ChannelLockedResource,
    ):
        error = kind("why")
        assert fix_for(error)
        assert sentence(error) == f"{what_happened(error)} {fix_for(error)}"


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("inequivalent arg 'durable' for queue 'q' in vhost '/'", "It exists with other properties"),
        ("message size 17000000 is larger than configured max size 16777216", "Send less in one message"),
        ("user_id property set to 'evil' but authenticated user was 'guest'", "The user id has to be the user"),
        ("invalid expiration 'x': no_integer", "Correct the expiration"),
        ("invalid arg 'x-priority' for queue 'q' in vhost '/'", "Correct that argument"),
        ("unknown delivery tag 99", ""),
    ],
)
def test_a_precondition_that_failed_has_a_fix_of_its_own(text: str, fix: str) -> None:
    reply = f"PRECONDITION_FAILED - {text}"
    error = exceptions.ChannelPreconditionFailed(reply, reply_code=406, reply_text=reply, by_broker=True)
    assert fix_for(error).startswith(fix)
    assert bool(fix_for(error)) == bool(fix)


# --------------------------------------------------------------------------------------------------- figures


def test_percentiles_are_near_those_of_a_sorted_list() -> None:
    rng = random.Random(1)
    values = sorted(int(rng.lognormvariate(13, 2)) for _ in range(10_000))
    latencies = Latencies()
    for value in values:
        latencies.add(value)
    for percent in (1, 50, 95, 99, 99.9):
        exact = values[math.ceil(percent / 100 * len(values)) - 1]
        assert exact * (1 - 1 / 64) <= latencies.percentile(percent) <= exact
    assert (latencies.percentile(0), latencies.percentile(100), latencies.count) == (values[0], values[-1], 10_000)


@pytest.mark.parametrize("value", [0, 1, 127, 128, 129, 10**6, 2**62])
def test_the_percentiles_of_one_value_are_that_value_nearly(value: int) -> None:
    latencies = Latencies()
    latencies.add(value)
    assert [latencies.percentile(percent) for percent in (0, 50, 99, 100)] == [value] * 4


def test_percentiles_of_few_small_values_are_exact() -> None:
    latencies = Latencies()
    for value in (30, 10, 20, -5):
        latencies.add(value)
    assert [latencies.percentile(percent) for percent in (0, 25, 26, 50, 75, 76, 100)] == [0, 0, 10, 10, 20, 30, 30]


def test_a_summary_is_in_milliseconds_and_of_nothing_is_none() -> None:
    latencies = Latencies()
    assert latencies.summary() is None
    latencies.add(1_500_000)
    assert latencies.summary() == {"min": 1.5, "median": 1.5, "p95": 1.5, "p99": 1.5, "max": 1.5}


def test_a_histogram_does_not_grow_with_what_it_counts() -> None:
    latencies = Latencies()
    for value in range(0, 10_000_000, 101):
        latencies.add(value)
    assert len(latencies._buckets) < 1500


def test_a_pace_is_kept_and_lost_time_is_not_made_up_for_without_end() -> None:
    pace = Pace(10, now=100.0)
    assert pace.due(100.0) == 0
    pace.went()
    assert pace.due(100.0) == pytest.approx(0.1)
    assert pace.due(100.05) == pytest.approx(0.05)
    assert pace.due(100.1) == 0
    sent = 0
    while not pace.due(200.0):  # after a long pause
        pace.went()
        sent += 1
    assert 10 <= sent <= 11
    free = Pace(None, now=0)
    free.went()
    assert free.due(0) == 0


def test_rates_and_times_for_people() -> None:
    assert (per_second(10, 2), per_second(10, 0)) == (5, 0)
    assert [milliseconds(each) for each in (0.00044, 0.012, 3.2044)] == ["0.4 ms", "12 ms", "3,204 ms"]
    assert [counted(each, "message") for each in (0, 1, 2000)] == ["0 messages", "1 message", "2,000 messages"]


def test_a_bench_knows_its_own_messages() -> None:
    assert sent_at(leveret.Message(stamp(b"xyz", 10**18))) == 10**18
    assert sent_at(leveret.Message(b"tiny", headers={"x-leveret-sent": 7})) == 7
    assert sent_at(leveret.Message(b"somebody else's message")) is None
    assert sent_at(leveret.Message(b"", headers={"x-leveret-sent": "7"})) is None


def test_the_figures_of_a_bench_are_told_in_lines_and_in_json() -> None:
    args = make_parser().parse_args(["bench", "--count", "10"])
    figures = Figures()
    figures.sent = figures.confirmed = 10
    figures.received, figures.publishing, figures.consuming = 9, 2.0, 3.0
    figures.returned = 1
    figures.latency.add(2_000_000)
    result = summary(figures, args, "q")
    assert json.loads(json.dumps(result)) == result
    assert (result["sent_per_second"], result["received_per_second"], result["latency_ms"]["p99"]) == (5, 3, 2)
    lines = summary_lines(result)
    assert [line.split()[0] for line in lines] == ["sent", "received", "latency"]
    assert lines[0].endswith("10 confirmed, 1 returned")


@pytest.mark.parametrize(("until", "is_bounded"), [("--time 0.3", True), ("--time 0.3 --count 10", False)])
def test_a_bench_with_a_time_does_not_wait_for_ever_for_slow_consumers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], until: str, is_bounded: bool
) -> None:
    async def slowly(self: Load, message: IncomingMessage) -> leveret.Verdict | None:
        await asyncio.sleep(0.01)
        return on_message(self, message)

    async def bench() -> int:
        async with Broker() as broker:
            command = f"bench --url {broker.url} --prefetch 1 --rate 2000 {until} --json"
            return await run_bench(make_parser().parse_args(command.split()))

    on_message = Load._on_message
    monkeypatch.setattr(Load, "_on_message", slowly)
    monkeypatch.setattr(load, "DRAIN", 0.3)
    assert asyncio.run(bench()) == 0, "what is left is not lost"
    result = json.loads(capsys.readouterr().out)
    assert result["left"] == result["sent"] - result["received"]
    assert (result["left"] > 0) == is_bounded
    lines = summary_lines(result)
    assert ("left in the queue" in lines[1]) == is_bounded


# -------------------------------------------------------------------------------------------------- terminal


class Screen(io.StringIO):
    """A stderr that is a terminal, or none."""

    def __init__(self, tty: bool) -> None:
        super().__init__()
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty


@pytest.mark.parametrize("tty", [True, False])
def test_what_changes_in_place_is_shown_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch, tty: bool) -> None:
    monkeypatch.setattr(sys, "stderr", screen := Screen(tty))
    with Live() as live:
        live.show("half")
        say("a line that stays, of amqp://me:secret@host/")
        live.show("all")
    line = "a line that stays, of amqp://me:******@host/\n"
    clear = "\r\x1b[K"
    assert screen.getvalue() == (f"{clear}half{clear}{line}{clear}all{clear}" if tty else line)


# ------------------------------------------------------------------------------------------------- processes


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(sys.path)
    given = {name: value for name, value in os.environ.items() if name != "AMQP_URL"}
    command = [sys.executable, "-W", "error", "-m", "leveret", *arguments]
    return subprocess.run(command, env=given | {"PYTHONPATH": path} | env, capture_output=True, text=True, check=False)


def test_python_m_leveret_is_the_command_line() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"leveret {leveret.__version__}\n", "")


def test_a_failure_is_one_line_on_stderr_and_exit_1() -> None:
    done = run("publish", "--queue", "q", "x", AMQP_URL="amqps://me:SECRET@nobody.invalid/")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: cannot find the host 'nobody.invalid': ")
    assert done.stderr.count("\n") == 1


def test_debug_shows_the_traceback_without_the_password() -> None:
    done = run("check", "--debug", "--url", "amqps://me:SECRET@nobody.invalid/")
    assert done.returncode == 1
    done = run("publish", "--debug", "--queue", "q", "x", AMQP_URL="amqps://me:SECRET@nobody.invalid/")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "SECRET" not in done.stdout + done.stderr


def test_check_tells_which_stage_failed_and_how_to_fix_it() -> None:
    done = run("check", "--url", "amqp://me:SECRET@nobody.invalid/")
    assert (done.returncode, done.stderr) == (1, "")
    url, stage, why, fix = done.stdout.splitlines()
    assert url == "amqp://me:******@nobody.invalid/"
    assert stage.startswith("  FAIL  find nobody.invalid ")
    assert why
    assert fix.startswith("   fix  Correct the host name in --url")


def test_a_mistake_in_the_url_is_warned_of_once() -> None:
    path = os.pathsep.join(sys.path)
    command = [sys.executable, "-m", "leveret", "publish", "--queue", "q", "x"]
    env = {**os.environ, "PYTHONPATH": path, "AMQP_URL": "amqps://me:SECRET@nobody.invalid/?heartbeet=5"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    warning, error = done.stderr.splitlines()
    assert warning == "warning: unknown parameter 'heartbeet', in the URL or beside it: did you mean 'heartbeat'?"
    assert error.startswith("error: cannot find the host")


# ---------------------------------------------------------------------------- streams that are closed, or full


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """A command as sh runs it; nothing listens at its URL."""
    full = command.replace("leveret", f"{sys.executable} -X dev -W error -m leveret")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "AMQP_URL": "amqp://localhost:1/"}
    environment.pop("PYTHONUNBUFFERED", None)  # argparse hides that a help text cannot be written
    return subprocess.run(["sh", "-c", full], env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("command", ["publish --queue a x", "consume --queue a", "check", "bench", "demo"])
def test_a_closed_standard_output_is_told_before_anything_is_done(command: str) -> None:
    done = shell(f"leveret {command} >&-")
    assert (done.returncode, done.stderr) == (
        1,
        "error: standard output is closed. >/dev/null throws away what is written to it.\n",
    )


def test_a_closed_standard_input_is_told_where_it_is_read() -> None:
    for command in ("publish --queue a", "publish --queue a --file -"):
        done = shell(f"leveret {command} <&-")
        fix = "Give the message as an argument, or as a --file."
        assert (done.returncode, done.stderr) == (1, f"error: standard input is closed. {fix}\n")
    assert "Connection refused" in shell("leveret publish --queue a x <&-").stderr


@pytest.mark.parametrize("where", ["2>&-", "2>/dev/full", "2>&- <&-"])
def test_a_standard_error_that_takes_nothing_changes_no_exit_code(where: str) -> None:
    done = shell(f"leveret publish --queue a x {where}")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    assert shell(f"leveret publish {where}").returncode == 2
    assert shell(f"leveret --version {where}").returncode == 0


def test_a_full_standard_output_is_one_sentence() -> None:
    for command in ("check", "--help"):
        done = shell(f"leveret {command} >/dev/full")
        told = "error: standard output cannot be written: No space left on device.\n"
        assert (done.returncode, done.stderr) == (1, told)
    assert shell("leveret --help | true").stderr == ""


def test_an_expiration_that_no_broker_takes_is_told_before_connecting() -> None:
    done = run("publish", "--queue", "a", "--expiration", "1e12", "x", AMQP_URL="amqp://localhost:1/")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: expiration must not be over 315,360,000 seconds, which is RabbitMQ's limit: 1000000000000.0\n"
    )


@pytest.mark.parametrize("debug", [True, False])
def test_debug_shows_the_traceback_of_what_is_logged(debug: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with LogToStderr(debug=debug):
        try:
            raise LookupError("at amqp://u:secret@host/")
        except LookupError:
            logging.getLogger("leveret.x").warning("it failed", exc_info=True)
    shown = capsys.readouterr().err
    assert "it failed" in shown
    assert ("Traceback" in shown) is debug
    assert "secret" not in shown


# ------------------------------------------------------------------------------- brokers that refuse, block or hang

LIMIT = 40
PLENTY = 8.0
"""Seconds, on a busy machine; what is waited for without a second signal takes ten."""


async def started(url: str, command: str) -> asyncio.subprocess.Process:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "AMQP_URL": url}
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
    try:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-X", "dev", "-W", "error", "-m", "leveret", *command.split(),
            env=env, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, former)


def interrupt(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:  # Popen.send_signal() would take the exit code away from asyncio
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGINT)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT):
        while not condition():  # noqa: ASYNC110  # a broker's views tell nobody
            await asyncio.sleep(0.01)


async def ended(process: asyncio.subprocess.Process) -> tuple[int | None, str, str]:
    async with asyncio.timeout(LIMIT):
        out, err = await process.communicate()
    lines = [line for line in err.decode().splitlines() if "Executing <" not in line]
    return process.returncode, out.decode(), "".join(f"{line}\n" for line in lines)


COMMANDS_THAT_LAST = ("publish --queue zz", "consume --queue zz", "bench --queue zz --time 60 --rate 100", "demo --url")


@pytest.mark.parametrize("fault", ["pause", "block"])
@pytest.mark.parametrize("command", COMMANDS_THAT_LAST)
def test_a_second_signal_ends_at_once_what_waits_for_the_broker(command: str, fault: str) -> None:
    async def scenario() -> None:
        async with Broker() as broker:
            async with await leveret.connect(broker.url) as connection, connection.channel() as channel:
                await channel.declare_queue("zz", durable=True)
            args = f"{command} {broker.url}" if command.startswith("demo") else command
            process = await started(broker.url, args)
            assert process.stdin is not None
            assert process.stderr is not None
            if command.startswith("publish"):
                process.stdin.write(b"one\n")
            await until(lambda: broker.consumers if command.startswith("consume") else broker.published)
            if fault == "pause":
                broker.pause()
            else:
                broker.block("memory")
            process.stdin.write(b"two\n")
            told = b""
            interrupt(process)
            async with asyncio.timeout(LIMIT):
                while b"Ctrl-C again" not in told and (line := await process.stderr.readline()):
                    told += line
            begun = asyncio.get_running_loop().time()
            interrupt(process)
            await asyncio.sleep(0.05)
            interrupt(process)  # it changes nothing
            code, out, err = await ended(process)
            assert asyncio.get_running_loop().time() - begun < PLENTY
            assert code in {130, -signal.SIGINT}, "the third one may come in the last moments of Python"
            err = told.decode() + err
            for word in ("Traceback", "nobody awaited", "Task was destroyed", "Event loop is closed"):
                assert word not in err
            first = {"publish": "published ", "bench": "sent ", "consume": "", "demo": "connected "}[command.split()[0]]
            assert out.startswith(first)
            assert ("consumed 0 messages" in err) == command.startswith("consume")
            if fault == "pause":
                assert re.search("waiting for .*, 10 s at most; Ctrl-C again stops at once", err)

    asyncio.run(scenario())


def test_a_bench_of_a_broker_that_hangs_ends_soon_after_its_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its connections aborted, and told what had no confirm."""
    monkeypatch.setattr(load, "DRAIN", 0.5)
    monkeypatch.setattr(load, "_CLOSING", 0.5)
    with Broker() as broker:
        threading.Timer(1.0, broker.pause).start()
        begun = time.monotonic()
        assert main(f"bench --url {broker.url} --time 1.5 --rate 200".split()) == 1
        assert time.monotonic() - begun < PLENTY
    said = capsys.readouterr()
    assert re.search(r"sent .* failed", said.out)
    assert re.search(r"\d+ messages have no confirm 0.5 s after the end", said.err)
    assert "nobody awaited" not in said.err


def test_a_bench_that_only_consumes_waits_for_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario(url: str) -> None:
        async with await leveret.connect(url) as connection, connection.channel() as channel:
            await until(lambda: broker.consumers)
            await asyncio.sleep(0.3)
            await channel.default_exchange.publish(leveret.Message(b"late"), "zz")

    with Broker() as broker:
        late = threading.Thread(target=lambda: asyncio.run(scenario(broker.url)))
        late.start()
        assert main(f"bench --url {broker.url} --time 2 --producers 0 --queue zz".split()) == 0
        late.join()
    assert "received             1" in capsys.readouterr().out


def test_publish_and_check_ask_whether_the_queue_is_full(capsys: pytest.CaptureFixture[str]) -> None:
    with Broker() as broker:
        for command in ("publish --queue zz --declare x", "check"):
            broker.nack_next(1)
            assert main([*command.split()[:1], "--url", broker.url, *command.split()[1:]]) == 1
            said = capsys.readouterr()
            assert "Is the queue full (`x-max-length` with `reject-publish`)?" in said.out + said.err
            assert "starts one" not in said.out + said.err


@pytest.mark.parametrize(("alarm", "fix"), [("disk", "Free disk space"), ("memory", "Free memory")])
def test_check_names_what_a_blocked_broker_is_short_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], alarm: str, fix: str
) -> None:
    monkeypatch.setattr("leveret.cli.check._TIMEOUT", 0.5)
    with Broker() as broker:
        broker.block(alarm)
        assert main(["check", "--url", broker.url]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"   fix  {fix}")


def test_check_of_a_port_that_is_no_broker_names_the_port(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            for _ in range(2):
                connection, _ = server.accept()
                connection.close()

        threading.Thread(target=hang_up, daemon=True).start()
        assert main(["check", "--url", f"amqp://127.0.0.1:{server.getsockname()[1]}/"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "   fix  Correct the port or the scheme in --url."
