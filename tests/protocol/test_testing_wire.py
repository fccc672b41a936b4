"""`leveret.testing.Broker` byte by byte: what RabbitMQ answers to clients that break the rules.

The expected texts were observed on RabbitMQ 3.10.8, 4.0.5 and 4.3.6.
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

import pytest
from pamqp import commands, frame

from leveret.testing import Broker

if TYPE_CHECKING:
    from collections.abc import Iterator

VERSIONS = ("3.10", "4.0", "4.3")


@pytest.fixture(scope="module", params=VERSIONS)
def broker(request: pytest.FixtureRequest) -> Iterator[Broker]:
    with Broker(version=request.param, users={"guest": "guest", "limited": "pw"}) as broker:
        broker.add_user("nowhere", "pw", permissions={})
        yield broker


class Raw:
    """A client that sends what it likes."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), 5)
        self.stream = self.sock.makefile("rb")

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stream.close()
        self.sock.close()

    def send(self, kind: int, channel: int, payload: bytes, end: bytes = b"\xce") -> None:
        self.sock.sendall(struct.pack(">BHI", kind, channel, len(payload)) + payload + end)

    def method(self, channel: int, method: frame.base.Frame) -> None:  # type: ignore[name-defined]
        self.sock.sendall(frame.marshal(method, channel))

    def receive(self) -> str:
        """The next frame in words; ``gone`` when the broker hung up."""
        try:
            head = self.stream.read(7)
            if len(head) < 7:
                return "gone"
            data = head + self.stream.read(int.from_bytes(head[3:7]) + 1)
        except ConnectionError:
            return "gone"
        _, channel, found = frame.unmarshal(data)
        if isinstance(found, commands.Connection.Close | commands.Channel.Close):
            return f"{channel} {found.reply_code} {found.reply_text} {found.class_id}.{found.method_id}"
        return f"{channel} {found.name}"

    def greet(self) -> str:
        self.sock.sendall(b"AMQP\0\0\x09\x01")
        return self.receive()

    def log_in(self, user: str = "guest", password: str = "guest", *, tells: bool = True) -> str:
        self.greet()
        properties = {"capabilities": {"authentication_failure_close": tells}}
        self.method(0, commands.Connection.StartOk(properties, "PLAIN", f"\0{user}\0{password}", "en_US"))
        return self.receive()

    def open(self, vhost: str = "/", **tune: int) -> str:
        tune_ok = commands.Connection.TuneOk(**{"channel_max": 2047, "frame_max": 131_072, "heartbeat": 0} | tune)
        self.sock.sendall(frame.marshal(tune_ok, 0) + frame.marshal(commands.Connection.Open(vhost), 0))
        return self.receive()


@pytest.fixture
def client(broker: Broker) -> Iterator[Raw]:
    with Raw(broker.port) as client:
        yield client


@pytest.fixture
def ready(client: Raw) -> Raw:
    """Logged in, with channel 1 open."""
    client.log_in()
    assert client.open() == "0 Connection.OpenOk"
    client.method(1, commands.Channel.Open())
    assert client.receive() == "1 Channel.OpenOk"
    return client


# ----------------------------------------------------------------------------------------------------- handshake


def test_whoever_speaks_something_else_is_told_what_is_spoken(broker: Broker, client: Raw) -> None:
    client.sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert client.stream.read(8) == (b"AMQP\0\0\x09\x01" if broker.version == "3.10" else b"AMQP\x03\x01\0\0")
    assert client.stream.read() == b""


def test_a_wrong_password(broker: Broker, client: Raw) -> None:
    assert client.log_in(password="wrong") == (
        "0 403 ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN. For details see the broker "
        "logfile. 0.0"
    )
    with Raw(broker.port) as other:
        assert other.log_in(password="wrong", tells=False) == "gone"


def test_virtual_hosts_that_are_not_there_or_not_for_everybody(broker: Broker, client: Raw) -> None:
    client.log_in()
    assert client.open("nope") == "0 530 NOT_ALLOWED - vhost nope not found 10.40"
    with Raw(broker.port) as other:
        other.log_in("nowhere", "pw")
        assert other.open() == "0 530 NOT_ALLOWED - access to vhost '/' refused for user 'nowhere' 10.40"


@pytest.mark.parametrize("tune", [{"frame_max": 1000}, {"frame_max": 200_000}, {"channel_max": 3000}])
def test_tuning_beyond_the_limits(client: Raw, tune: dict[str, int]) -> None:
    client.log_in()
    assert client.open(**tune) == "gone"


def test_the_least_frame_max(broker: Broker, client: Raw) -> None:
    client.log_in()
    assert client.open(frame_max=4096) == ("gone" if broker.version == "4.3" else "0 Connection.OpenOk")


def test_mechanisms_that_are_not_offered(client: Raw) -> None:
    client.greet()
    client.method(0, commands.Connection.StartOk({}, "EXTERNAL", "", "en_US"))
    assert client.receive() == "gone"


# -------------------------------------------------------------------------------------------------- broken rules

PUBLISH = b"\0\x3c\0\x28\0\0\0\x01q"
HARD = {
    "a wrong frame end": (
        (1, 1, b"\0\x14\0\x0a\0", b"\0"),
        "501 FRAME_ERROR - type 1, all octets = <<0,20,0,10,0>>: {invalid_frame_end_marker,0} 0.0",
    ),
    "an unknown frame": ((9, 0, b""), "501 FRAME_ERROR - type 9, all octets = <<>>: unknown_frame 0.0"),
    "an unknown class": ((1, 1, b"\x03\xe7\0\x0a"), "gone"),
    "a body without a method": (
        (3, 1, b"x"),
        "505 UNEXPECTED_FRAME - expected method frame, got non method frame instead 0.0",
    ),
    "a method of channels on channel 0": (
        (1, 0, b"\0\x3c\0\x0a\0\0\0\0\0\0\0"),
        "504 CHANNEL_ERROR - unexpected method in connection state running 60.10",
    ),
    "a method of connections on a channel": (
        (1, 1, b"\0\x0a\0\x28\x01/\0\0"),
        "503 COMMAND_INVALID - unimplemented method 10.40",
    ),
    "a channel that is not open": (
        (1, 7, b"\0\x3c\0\x0a\0\0\0\0\0\0\0"),
        "504 CHANNEL_ERROR - expected 'channel.open' 60.10",
    ),
    "a channel that is open": ((1, 1, b"\0\x14\0\x0a\0"), "504 CHANNEL_ERROR - second 'channel.open' seen 20.10"),
    "a heartbeat on a channel": ((8, 1, b""), "505 UNEXPECTED_FRAME - type 8, all octets = <<>> 0.0"),
    "arguments cut short": ((1, 1, b"\0\x32\0\x0a\0\0\x20"), "501 FRAME_ERROR - cannot decode <<0,0,32>> 50.10"),
    "tune-ok again": (
        (1, 0, struct.pack(">HHHIH", 10, 31, 1, 8192, 0)),
        "504 CHANNEL_ERROR - unexpected method in connection state running 10.31",
    ),
    "close-ok unasked": ((1, 1, b"\0\x14\0\x29"), "503 COMMAND_INVALID - unimplemented method 20.41"),
    "a name that is no text": (
        (1, 1, b"\0\x32\0\x0a\0\0\x02\xff\xff\0\0\0\0\0"),
        "501 FRAME_ERROR - Malformed UTF-8 in shortstr 0.0",
    ),
    "a prefetch size": (
        (1, 1, b"\0\x3c\0\x0a\0\0\0\x0a\0\0\0"),
        "540 NOT_IMPLEMENTED - prefetch_size!=0 (10) 60.10",
    ),
    "immediate": ((1, 1, PUBLISH + b"\x02"), "540 NOT_IMPLEMENTED - immediate=true 60.40"),
    "flow": ((1, 1, b"\0\x14\0\x14\0"), "540 NOT_IMPLEMENTED - active=false 20.20"),
}


@pytest.mark.parametrize(("sent", "answer"), HARD.values(), ids=HARD)
def test_what_costs_the_connection(ready: Raw, sent: tuple[int, int, bytes], answer: str) -> None:
    ready.send(*sent)
    assert ready.receive() == (answer if answer == "gone" else f"0 {answer}")


def test_a_frame_that_is_too_large(ready: Raw) -> None:
    ready.sock.sendall(struct.pack(">BHI", 3, 1, 131_073))
    assert ready.receive() == ("0 501 FRAME_ERROR - type 3, all octets = <<>>: {frame_too_large,131073,131064} 0.0")


def test_a_method_in_the_middle_of_a_publish(ready: Raw) -> None:
    ready.send(1, 1, PUBLISH + b"\0")
    ready.send(1, 1, b"\0\x3c\0\x0a\0\0\0\0\0\0\0")
    assert ready.receive() == (
        "0 505 UNEXPECTED_FRAME - expected content header for class 60, got non content header frame instead 60.40"
    )


def test_more_body_than_was_declared(broker: Broker, ready: Raw) -> None:
    ready.send(1, 1, PUBLISH + b"\0")
    ready.send(2, 1, struct.pack(">HHQH", 60, 0, 2, 0))
    ready.send(3, 1, b"xxx")
    if broker.version == "4.3":
        assert ready.receive() == "0 501 FRAME_ERROR - content body frame exceeds remaining content size 60.40"
    else:
        ready.method(1, commands.Channel.Close(0, "", 0, 0))
        assert ready.receive() != ""


def test_an_unknown_type_of_exchange(broker: Broker, ready: Raw) -> None:
    ready.method(1, commands.Exchange.Declare(exchange="x", exchange_type="nosuch"))
    text = "unknown exchange type 'nosuch' 40.10"
    expected = f"0 503 COMMAND_INVALID - {text}" if broker.version == "3.10" else f"1 406 PRECONDITION_FAILED - {text}"
    assert ready.receive() == expected


# -------------------------------------------------------------------------------------------------------- races


def test_closes_that_cross_and_a_number_that_comes_again(ready: Raw) -> None:
    ready.method(1, commands.Queue.Declare(queue="nope", passive=True))
    ready.method(1, commands.Queue.Declare(queue="dropped"))
    ready.method(1, commands.Channel.Close(0, "", 0, 0))
    assert ready.receive() == "1 404 NOT_FOUND - no queue 'nope' in vhost '/' 50.10"
    assert ready.receive() == "1 Channel.CloseOk"
    ready.method(1, commands.Channel.CloseOk())
    ready.method(1, commands.Channel.Open())
    assert ready.receive() == "1 Channel.OpenOk"
    ready.method(1, commands.Basic.Ack(1))
    assert ready.receive() == "1 406 PRECONDITION_FAILED - unknown delivery tag 1 60.80"
    ready.method(1, commands.Channel.Open())
    assert ready.receive() == "0 504 CHANNEL_ERROR - second 'channel.open' seen 20.10"


def test_one_tag_for_two_consumers(ready: Raw) -> None:
    for name in ("Queue.DeclareOk", "Basic.ConsumeOk"):
        if name == "Queue.DeclareOk":
            ready.method(1, commands.Queue.Declare(queue="", exclusive=True))
        else:
            ready.method(1, commands.Basic.Consume(queue="", consumer_tag="t"))
        assert ready.receive() == f"1 {name}"
    ready.method(1, commands.Basic.Consume(queue="", consumer_tag="t"))
    assert ready.receive() == "0 530 NOT_ALLOWED - attempt to reuse consumer tag 't' 60.20"


def test_modes_exclude_each_other(ready: Raw) -> None:
    ready.method(1, commands.Confirm.Select())
    assert ready.receive() == "1 Confirm.SelectOk"
    ready.method(1, commands.Tx.Select())
    assert ready.receive() == "1 406 PRECONDITION_FAILED - cannot switch from confirm to tx mode 90.10"


def test_bytes_one_by_one_are_the_same(broker: Broker) -> None:
    with Raw(broker.port) as client:
        for byte in b"AMQP\0\0\x09\x01":
            client.sock.sendall(bytes((byte,)))
        assert client.receive() == "0 Connection.Start"


# -------------------------------------------------------------------------------------------------- transactions


@pytest.mark.parametrize(
    ("kind", "again", "answer"),
    [
        ("classic", "", "0 506 RESOURCE_ERROR - failed to deliver message: {not_found,"),
        ("classic", "classic", "1 406 PRECONDITION_FAILED - partial tx completion 90.20"),
        ("classic", "quorum", "0 541 INTERNAL_ERROR 0.0"),
        ("quorum", "", "0 506 RESOURCE_ERROR - failed to deliver message: {not_found,"),
        ("quorum", "quorum", "1 Tx.CommitOk"),
    ],
)
def test_4_3_looks_for_queues_again_when_it_commits(kind: str, again: str, answer: str) -> None:
    with Broker(version="4.3") as broker, Raw(broker.port) as client:
        client.log_in()
        client.open()

        def call(method: frame.base.Frame) -> str:  # type: ignore[name-defined]
            client.method(1, method)
            return client.receive()

        def declare(name: str, kind: str) -> None:
            declared = call(commands.Queue.Declare(queue=name, durable=True, arguments={"x-queue-type": kind}))
            assert declared == "1 Queue.DeclareOk"

        call(commands.Channel.Open())
        declare("first", "classic")
        declare("q", kind)
        call(commands.Tx.Select())
        for name in ("first", "q"):
            client.method(1, commands.Basic.Publish(routing_key=name))
            client.send(2, 1, b"\x00\x3c\x00\x00" + bytes(10))
        assert call(commands.Queue.Delete(queue="q")) == "1 Queue.DeleteOk"
        if again:
            declare("q", again)
        assert call(commands.Tx.Commit()).startswith(answer)
        assert len(broker.queues["first"].messages) == 1
        if again:
            assert len(broker.queues["q"].messages) == (answer == "1 Tx.CommitOk")
