"""The error tree is exactly the one that is drawn, and every class can be copied, pickled and shown."""

from __future__ import annotations

import asyncio
import copy
import inspect
import pickle
import re

import pytest
from pamqp.commands import Basic, Channel, Connection
from pamqp.exceptions import PAMQPException

from leveret import exceptions
from leveret.exceptions import (
    AMQPError,
    AMQPException,
    ChannelClosed,
    Closed,
    ConnectionClosed,
    channel_closed,
    connection_closed,
    fresh,
)
from leveret.message import ReturnedMessage
from leveret.report import PublishReport

CLASSES = {
    name: value
    for name, value in vars(exceptions).items()
    if inspect.isclass(value) and issubclass(value, BaseException) and value.__module__ == exceptions.__name__
    if name == value.__name__  # not an alias
}
UNDRAWN = {
    "Closed",  # the mixin of ConnectionClosed and ChannelClosed
}

# architecture.md §7, and what §6 ("more errors") adds: name → its parents.
TREE = {
    "AMQPError": "Exception",
    "AMQPConnectionError": "AMQPError ConnectionError",
    "ConnectTimeout": "AMQPConnectionError TimeoutError",
    "IncompatibleProtocolError": "AMQPConnectionError",
    "AuthenticationError": "AMQPConnectionError",
    "ProbableAuthenticationError": "AMQPConnectionError",
    "LoginRefused": "AuthenticationError ProbableAuthenticationError",
    "ConnectionClosed": "AMQPConnectionError",
    "ConnectionFrameError": "ConnectionClosed",
    "ConnectionSyntaxError": "ConnectionClosed",
    "ConnectionCommandInvalid": "ConnectionClosed",
    "ConnectionChannelError": "ConnectionClosed",
    "ConnectionUnexpectedFrame": "ConnectionClosed",
    "ConnectionResourceError": "ConnectionClosed",
    "ConnectionNotAllowed": "ConnectionClosed",
    "ConnectionNotImplemented": "ConnectionClosed",
    "ConnectionInternalError": "ConnectionClosed",
    "HeartbeatTimeout": "ConnectionClosed",
    "AMQPChannelError": "AMQPError",
    "ChannelInvalidStateError": "AMQPChannelError RuntimeError",
    "ChannelLimitReached": "AMQPChannelError",
    "ChannelClosed": "AMQPChannelError",
    "ChannelAccessRefused": "ChannelClosed",
    "ChannelNotFoundEntity": "ChannelClosed",
    "ChannelLockedResource": "ChannelClosed",
    "ChannelPreconditionFailed": "ChannelClosed",
    "DuplicateConsumerTag": "ChannelClosed",
    "ProtocolError": "AMQPError",
    "HandshakeError": "IncompatibleProtocolError ProtocolError",
    "ProtocolSyntaxError": "AMQPError",
    "InvalidFrameError": "ProtocolSyntaxError",
    "DeliveryError": "AMQPError",
    "PublishError": "DeliveryError",
    "MessageReturned": "PublishError",
    "MessageNacked": "DeliveryError",
    "PublishNotSent": "DeliveryError ChannelInvalidStateError",
    "PublishNotSentInTime": "PublishNotSent TimeoutError",
    "PublishUnconfirmedInTime": "PublishOutcomeUnknown TimeoutError",
    "ConnectionBlocked": "PublishNotSentInTime",
    "PublishOutcomeUnknown": "DeliveryError AMQPConnectionError",
    "PublishManyFailed": "DeliveryError",
    "DeliveryLost": "ChannelInvalidStateError",
    "ConsumerCancelled": "AMQPError",
    "MessageDecodeError": "AMQPError",
    "MessageTooLarge": "AMQPError",
    "MessageProcessError": "AMQPError",
    "NoServer": "MessageProcessError",
    "RemoteError": "AMQPError",
    "MethodNotImplemented": "AMQPError",
    "QueueEmpty": "AMQPError asyncio.QueueEmpty",
    "TopologyError": "AMQPError",
}

# aio_pika_api.md §8: every base that an `except` clause may name.
AIO_PIKA = {
    "AMQPChannelError": "AMQPError",
    "AMQPConnectionError": "AMQPError ConnectionError OSError",
    "AMQPError": "Exception",
    "AMQPException": "Exception",
    "AuthenticationError": "AMQPConnectionError AMQPError ConnectionError OSError",
    "ChannelClosed": "AMQPChannelError AMQPError",
    "ChannelInvalidStateError": "RuntimeError",
    "ChannelNotFoundEntity": "ChannelClosed AMQPChannelError AMQPError",
    "ChannelPreconditionFailed": "ChannelClosed AMQPChannelError AMQPError",
    "ChannelAccessRefused": "ChannelClosed",
    "ChannelLockedResource": "ChannelClosed",
    "ConnectionClosed": "AMQPConnectionError AMQPError ConnectionError OSError",
    "DeliveryError": "AMQPError",
    "DuplicateConsumerTag": "ChannelClosed AMQPChannelError AMQPError",
    "IncompatibleProtocolError": "AMQPConnectionError AMQPError ConnectionError OSError",
    "InvalidFrameError": "ProtocolSyntaxError AMQPError",
    "MessageProcessError": "AMQPError",
    "MethodNotImplemented": "AMQPError",
    "ProbableAuthenticationError": "AMQPConnectionError AMQPError ConnectionError OSError",
    "ProtocolSyntaxError": "AMQPError",
    "PublishError": "DeliveryError AMQPError",
    "QueueEmpty": "AMQPError asyncio.QueueEmpty",
    "ConnectionSyntaxError": "ConnectionClosed",
    "ConnectionFrameError": "ConnectionClosed",
    "ConnectionCommandInvalid": "ConnectionClosed",
    "ConnectionChannelError": "ConnectionClosed",
    "ConnectionUnexpectedFrame": "ConnectionClosed",
    "ConnectionResourceError": "ConnectionClosed",
    "ConnectionNotAllowed": "ConnectionClosed",
    "ConnectionNotImplemented": "ConnectionClosed",
    "ConnectionInternalError": "ConnectionClosed",
}


def named(name: str) -> type:
    if name == "asyncio.QueueEmpty":
        return asyncio.QueueEmpty
    import builtins

    return getattr(exceptions, name, None) or getattr(builtins, name)


def returned() -> ReturnedMessage:
    return ReturnedMessage(312, "NO_ROUTE", b"\x02ex\x03key", b"\x00\x00", b"body")


SPECIAL = {
    "MessageReturned": lambda cls: cls(returned()),
    "MessageNacked": lambda cls: cls(Basic.Nack(delivery_tag=7)),
    "ConsumerCancelled": lambda cls: cls("ctag"),
    "ProtocolError": lambda cls: cls("bad frame", reply_code=505, data=b"x" * 100),
    "PublishManyFailed": lambda cls: cls("2 messages, 1 confirmed", PublishReport(2, 1)),
    "NoServer": lambda cls: cls("nobody serves 'm'", None),
    "RemoteError": lambda cls: cls("ValueError", "no hares left", [5]),
    "MessageProcessError": lambda cls: cls("Message already processed", None),
}


def make(cls: type[BaseException]) -> BaseException:
    if cls.__name__ in SPECIAL:
        return SPECIAL[cls.__name__](cls)
    if issubclass(cls, Closed):
        return cls("the text", reply_code=320, reply_text="the text", class_id=10, method_id=50, by_broker=True)
    return cls("the text")


every_class = pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)


# ------------------------------------------------------------------------------------------------------- the tree


def drawn() -> dict[str, str | None]:
    """The tree of the module's docstring: name → the class above it, and what "also" says, as further parents."""
    parents: dict[str, list[str]] = {}
    stack: list[tuple[int, str]] = []
    lines = exceptions.__doc__.partition("::\n\n")[2].partition("\n\nA mistake")[0].splitlines()
    for line in lines:
        line = line[4:]
        indent = len(line) - len(line.lstrip("│├└─ "))
        while stack and stack[-1][0] >= indent:
            stack.pop()
        above = stack[-1][1] if stack else "Exception"
        first = None
        for group in line[indent:].split(" · "):
            group = re.split(r" {2,}the peer", group)[0]
            last = above
            for part in group.split("──"):
                match = re.match(r"\s*·?\s*(\w+)(?: \(also an? ([\w.]+)\)| \(= \w+\)| is both| \d{3})*\s*$", part)
                if match is None:
                    continue
                name = match[1]
                parents[name] = [last, match[2]] if match[2] else [last]
                first = first or name
                last = name
        if first is not None:
            stack.append((indent, first))
    return parents


def test_the_docstring_draws_every_class_below_its_parents():
    tree = drawn()
    assert tree.keys() == CLASSES.keys() - UNDRAWN
    for name, parents in tree.items():
        for parent in parents:
            assert issubclass(CLASSES[name], named(parent)), f"{name} is not a {parent}"


def test_every_class_has_the_parents_of_the_architecture():
    assert TREE.keys() == CLASSES.keys() - UNDRAWN
    for name, parents in TREE.items():
        wanted = [named(parent) for parent in parents.split()]
        cls = CLASSES[name]
        assert all(issubclass(cls, parent) for parent in wanted), name
        ours = {
            base.__name__
            for base in cls.__mro__[1:]
            if base.__module__ == exceptions.__name__ and base.__name__ not in UNDRAWN
        }
        allowed = {base.__name__ for parent in wanted for base in parent.__mro__}
        assert ours <= allowed, f"{name} has more parents than are drawn: {ours - allowed}"


def test_the_names_that_are_not_drawn_are_kinds_of_drawn_ones():
    assert issubclass(ConnectionClosed, Closed)
    assert issubclass(ChannelClosed, Closed)


@pytest.mark.parametrize("name", AIO_PIKA)
def test_an_except_clause_written_for_aio_pika_catches_what_it_did(name):
    error = make(getattr(exceptions, name))
    for base in [*AIO_PIKA[name].split(), "Exception"]:
        with pytest.raises(named(base)) as caught:
            raise error
        assert caught.value is error


def test_aio_pikas_other_names():
    assert AMQPException is AMQPError
    assert (
        AMQPError,
        ConnectionError,
        OSError,
        RuntimeError,
        StopAsyncIteration,
        PAMQPException,
    ) == exceptions.CONNECTION_EXCEPTIONS


@every_class
def test_what_took_too_long_is_a_timeout_error_and_nothing_else_is(cls):
    timed = re.search(r"Timeout|InTime|Blocked", cls.__name__) and cls is not exceptions.HeartbeatTimeout
    assert issubclass(cls, TimeoutError) == bool(timed)


@every_class
def test_every_class_says_what_it_means(cls):
    assert cls.__doc__
    assert cls.__doc__.strip().splitlines()[0].endswith((".", "…"))


# ---------------------------------------------------------------------------------------------- copies, pickles


@every_class
@pytest.mark.parametrize("duplicate", [copy.copy, lambda e: pickle.loads(pickle.dumps(e)), fresh])
def test_a_copy_says_and_holds_the_same(cls, duplicate):
    error = make(cls)
    twin = duplicate(error)
    assert twin is not error
    assert type(twin) is cls
    assert str(twin) == str(error)
    if cls.__name__ not in {"MessageReturned", "MessageNacked"}:  # messages and frames have no ==
        assert twin.args == error.args
        assert vars(twin) == vars(error)


@pytest.mark.parametrize("arguments", [(), ("text",), (320, "CONNECTION_FORCED"), (104, "reset", "file")])
@pytest.mark.parametrize("cls", [exceptions.AMQPConnectionError, ConnectionClosed, exceptions.PublishOutcomeUnknown])
def test_connection_errors_of_any_arguments_are_copied_although_oserror_has_its_own_ideas(cls, arguments):
    error = cls(*arguments)
    for twin in (fresh(error), copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert twin.args == error.args
        assert str(twin) == str(error)
        assert "[Errno" not in str(twin)


@every_class
def test_a_fresh_one_is_chained_to_the_original_and_has_no_traceback(cls):
    error = make(cls)
    try:
        raise error
    except cls:
        twin = fresh(error)
    assert twin.__cause__ is error
    assert twin.__traceback__ is None
    assert error.__traceback__ is not None
    assert fresh(error) is not twin


def test_what_a_returned_message_said_survives_pickling():
    twin = pickle.loads(pickle.dumps(exceptions.MessageReturned(returned())))
    assert (twin.message.reply_code, twin.message.routing_key, twin.message.body) == (312, "key", b"body")
    twin = pickle.loads(pickle.dumps(exceptions.MessageNacked(Basic.Nack(delivery_tag=7))))
    assert twin.frame.delivery_tag == 7


class Users(Exception):
    """An exception as users write them: copying it calls its constructor with what it passed on."""

    def __init__(self, code: int, *, text: str) -> None:
        super().__init__(f"{code} {text}")


class Hostile(Exception):
    def __reduce_ex__(self, protocol):
        raise RuntimeError("not me")


@pytest.mark.parametrize("error", [Users(1, text="x"), Hostile("x")])
def test_fresh_never_raises_whatever_error_a_user_closes_a_connection_with(error):
    twin = fresh(error)
    assert isinstance(twin, Exception)
    assert twin is error or twin.__cause__ is error


@pytest.mark.parametrize("error", [OSError(111, "refused"), UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), EOFError()])
def test_errors_of_python_are_made_fresh_as_well(error):
    twin = fresh(error)
    assert type(twin) is type(error)
    assert twin.args == error.args
    assert twin.__cause__ is error


# ----------------------------------------------------------------------------------------------- reply codes

CONNECTION_CODES = {
    501: "ConnectionFrameError",
    502: "ConnectionSyntaxError",
    503: "ConnectionCommandInvalid",
    504: "ConnectionChannelError",
    505: "ConnectionUnexpectedFrame",
    506: "ConnectionResourceError",
    530: "ConnectionNotAllowed",
    540: "ConnectionNotImplemented",
    541: "ConnectionInternalError",
}
CHANNEL_CODES = {
    403: "ChannelAccessRefused",
    404: "ChannelNotFoundEntity",
    405: "ChannelLockedResource",
    406: "ChannelPreconditionFailed",
}


@pytest.mark.parametrize(
    ("convert", "method", "code", "name"),
    [
        *((connection_closed, Connection.Close, code, name) for code, name in CONNECTION_CODES.items()),
        *((channel_closed, Channel.Close, code, name) for code, name in CHANNEL_CODES.items()),
    ],
)
def test_a_reply_code_with_a_class_of_its_own_has_the_text_as_its_argument(convert, method, code, name):
    error = convert(method(code, "SOME TEXT", 60, 40))
    assert type(error) is CLASSES[name]
    assert error.args == ("SOME TEXT",)
    assert (error.reply_code, error.reply_text, error.class_id, error.method_id) == (code, "SOME TEXT", 60, 40)
    assert error.by_broker
    assert not error.is_normal


@pytest.mark.parametrize("code", [200, 302, 311, 312, 320, 402, 500, 999])
def test_any_other_reply_code_has_code_and_text_as_its_arguments(code):
    for convert, method, cls in (
        (connection_closed, Connection.Close, ConnectionClosed),
        (channel_closed, Channel.Close, ChannelClosed),
    ):
        error = convert(method(code, "SOME TEXT", 0, 0))
        assert type(error) is cls
        assert error.args == (code, "SOME TEXT")
        assert str(code) in str(error)
        assert "SOME TEXT" in str(error)
        assert error.is_normal == (code == 200)


@pytest.mark.parametrize(("code", "retryable"), [(320, True), (541, True), (0, True), (403, False), (530, False)])
def test_whether_connecting_again_may_help(code, retryable):
    assert ConnectionClosed("x", reply_code=code).retryable is retryable


# ---------------------------------------------------------------------------------------------------- str, repr


@every_class
def test_str_and_repr_are_readable(cls):
    error = make(cls)
    assert str(error).strip()
    assert str(error) != repr(error)
    assert cls.__name__ in repr(error)


def test_a_protocol_error_holds_64_offending_bytes_and_shows_none():
    error = exceptions.ProtocolError("bad frame", data=b"password=hunter2" * 10)
    assert len(error.data) == 64
    assert "hunter2" not in str(error) + repr(error)


def test_a_returned_messages_error_shows_where_it_went_and_not_what_it_was():
    error = exceptions.MessageReturned(ReturnedMessage(312, "NO_ROUTE", b"\x02ex\x03key", b"\x00\x00", b"hunter2"))
    assert str(error) == "NO_ROUTE (exchange 'ex', routing key 'key')"
    assert "hunter2" not in str(error) + repr(error)
