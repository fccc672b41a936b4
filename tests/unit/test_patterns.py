"""Serializers, proxies, and what subclasses may change."""

from __future__ import annotations

import asyncio
import datetime
import enum
import gzip
import json
import math
import pickle
import types
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest

from leveret.exceptions import MessageDecodeError, NoServer, PublishOutcomeUnknown, RemoteError
from leveret.message import IncomingMessage
from leveret.patterns import NackMessage, RejectMessage
from leveret.patterns.base import Base, Proxy, as_coroutine_function
from leveret.patterns.calls import Calls
from leveret.patterns.rpc import JsonRPC, JsonRPCError, PickleRPC, RPCException, error_fields
from leveret.patterns.serializers import (
    CompressedJSONSerializer,
    JSONSerializer,
    PickleSerializer,
    is_content_type,
)
from leveret.prompt import Wakeups
from leveret.wire.codec import Properties, encode_properties

UTC = datetime.UTC


@dataclass
class Hare:
    name: str
    born: datetime.date


class Colour(enum.Enum):
    BROWN = "brown"


PLAIN: list[tuple[Any, Any]] = [
    (datetime.datetime(2026, 1, 2, 3, 4, 5, 6, UTC), "2026-01-02T03:04:05.000006+00:00"),
    (datetime.date(2026, 1, 2), "2026-01-02"),
    (datetime.time(3, 4), "03:04:00"),
    (datetime.timedelta(minutes=1.5), 90.0),
    (Decimal("1.10"), "1.10"),
    (uuid.UUID(int=5), "00000000-0000-0000-0000-000000000005"),
    (b"\x00\xff", "AP8="),
    (bytearray(b"\x00\xff"), "AP8="),
    (Colour.BROWN, "brown"),
    (Hare("Lev", datetime.date(2026, 1, 2)), {"name": "Lev", "born": "2026-01-02"}),
    (types.MappingProxyType({"a": 1}), {"a": 1}),
    ({5}, [5]),
    ((1, 2), [1, 2]),
    ("häsin 🐇", "häsin 🐇"),
]


@pytest.mark.parametrize("serializer", [JSONSerializer(), CompressedJSONSerializer()])
@pytest.mark.parametrize(("value", "arrives"), PLAIN, ids=lambda value: type(value).__name__)
def test_what_json_has_not_arrives_in_a_plain_form(serializer: Any, value: Any, arrives: Any) -> None:
    assert serializer.deserialize(serializer.serialize({"it": [value]})) == {"it": [arrives]}


def test_the_plain_forms_lead_back() -> None:
    assert datetime.datetime.fromisoformat("2026-01-02T03:04:05.000006+00:00") == PLAIN[0][0]
    assert uuid.UUID(PLAIN[5][1]) == PLAIN[5][0]
    assert Decimal(PLAIN[4][1]) == PLAIN[4][0]


def test_pydantic_s_models_are_dumped() -> None:
    class Model:
        def model_dump(self, *, mode: str) -> dict[str, str]:
            return {"mode": mode}

    assert JSONSerializer().serialize(Model()) == b'{"mode":"json"}'


def test_json_is_utf_8_and_short() -> None:
    assert JSONSerializer().serialize({"a": ["ä", 1]}) == '{"a":["ä",1]}'.encode()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [{"x": float("-inf")}]])
def test_json_has_no_nan(value: Any) -> None:
    with pytest.raises(ValueError, match="JSON has neither NaN nor Infinity"):
        JSONSerializer().serialize(value)


@pytest.mark.parametrize("body", [b"no pickle", b"", b"cno_such_module\nThing\n."])
def test_what_cannot_be_unpickled_is_a_decode_error(body: bytes) -> None:
    with pytest.raises(MessageDecodeError, match="cannot be unpickled"):
        PickleSerializer().deserialize(body)


@pytest.mark.parametrize("kind", [NackMessage, RejectMessage])
def test_verdicts_have_the_arguments_that_they_have_in_aio_pika(kind: Any) -> None:
    assert kind(requeue=True).args == ()
    assert kind(True).args == (True,)
    assert pickle.loads(pickle.dumps(kind(requeue=True))).requeue is True


def test_what_has_no_form_is_named() -> None:
    with pytest.raises(TypeError, match="object has no form in JSON"):
        JSONSerializer().serialize([object()])


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000], ids=repr)
def test_what_is_no_json_is_a_decode_error(body: bytes) -> None:
    with pytest.raises(MessageDecodeError, match="no JSON"):
        JSONSerializer().deserialize(body)


def test_compressed_json_is_gzip_as_others_make_it() -> None:
    serializer = CompressedJSONSerializer()
    assert serializer.deserialize(gzip.compress(b'{"a":1}')) == {"a": 1}
    assert gzip.decompress(serializer.serialize({"a": 1})) == b'{"a":1}'


@pytest.mark.parametrize("body", [b"", b"{}", gzip.compress(b"{}")[:-4], gzip.compress(b"{")], ids=range(4))
def test_what_is_not_compressed_json_is_a_decode_error(body: bytes) -> None:
    with pytest.raises(MessageDecodeError):
        CompressedJSONSerializer().deserialize(body)


def test_a_small_body_cannot_unpack_to_gigabytes() -> None:
    bomb = gzip.compress(b" " * 1_000_000 + b"1")
    with pytest.raises(MessageDecodeError, match="more than 1000 bytes"):
        CompressedJSONSerializer(max_size=1000).deserialize(bomb)
    assert CompressedJSONSerializer().deserialize(bomb) == 1


@pytest.mark.parametrize(
    ("given", "fits"),
    [
        (None, True),
        ("application/json", True),
        ("Application/JSON; charset=UTF-8", True),
        ("application/json;compression=gzip", False),
        ("application/python-pickle", False),
        ("application/json; charset=latin-1", False),
    ],
)
def test_content_types(given: str | None, fits: bool) -> None:
    assert is_content_type(given, "application/json") is fits


# ------------------------------------------------------------------------------------------------- subclasses


def incoming(content_type: str | None, body: bytes = b"") -> IncomingMessage:
    none = Properties(*[None] * 14)
    properties = encode_properties(none._replace(content_type=content_type))
    return IncomingMessage.from_wire(None, None, 1, False, b"\x00\x00", properties, body, True)


def test_a_message_of_another_serializer_is_refused_by_name() -> None:
    with pytest.raises(MessageDecodeError, match=r"'application/python-pickle'.*Base reads 'application/json'"):
        Base().check_content_type(incoming("application/python-pickle"))


def test_a_subclass_may_name_a_module() -> None:
    class Modular(Base):
        SERIALIZER = json
        CONTENT_TYPE = "text/json"

    assert Modular().deserialize(Modular().serialize({"a": 1})) == {"a": 1}
    with pytest.raises(MessageDecodeError):
        Modular().check_content_type(incoming("application/json"))


def test_a_subclass_may_name_a_serializer_and_has_its_content_type() -> None:
    class Compressed(Base):
        SERIALIZER = CompressedJSONSerializer()

    assert Compressed.CONTENT_TYPE == "application/json;compression=gzip"
    with pytest.raises(MessageDecodeError):
        Compressed().check_content_type(incoming("application/json"))


def test_a_subclass_with_methods_and_no_content_type_reads_anything() -> None:
    """As in aio-pika, where such a class sends pickle's."""

    class Own(Base):
        def serialize(self, data: Any) -> bytes:
            return repr(data).encode()

        def deserialize(self, data: bytes) -> Any:
            return data.decode()

    Own().check_content_type(incoming("application/python-pickle"))
    assert Own().deserialize(Own().serialize(5)) == "5"

    class Strict(Own):
        CONTENT_TYPE = "text/x-repr"

    with pytest.raises(MessageDecodeError):
        Strict().check_content_type(incoming("application/python-pickle"))


def test_an_instance_may_have_its_own_serializer() -> None:
    base, other = Base(), Base()
    base.use(PickleSerializer())
    assert base.deserialize(base.serialize({5})) == {5}
    base.check_content_type(incoming("application/python-pickle"))
    assert other.serialize({5}) == b"[5]"
    with pytest.raises(MessageDecodeError):
        other.check_content_type(incoming("application/python-pickle"))


@pytest.mark.parametrize("module", ["orjson", "msgpack"])
def test_others_fit_as_they_are(module: str) -> None:
    found = pytest.importorskip(module)

    class Other(Base):
        SERIALIZER = found
        CONTENT_TYPE = f"application/{module}"

    assert Other().deserialize(Other().serialize({"a": [1, "ä"]})) == {"a": [1, "ä"]}


# ------------------------------------------------------------------------------------------- proxies, functions


def test_a_proxy_makes_names_of_attributes() -> None:
    called: list[tuple[str, Mapping[str, Any]]] = []
    proxy = Proxy(lambda name, kwargs: called.append((name, kwargs)))
    proxy.one(x=1)
    proxy.a.b.c()
    assert called == [("one", {"x": 1}), ("a.b.c", {})]


async def test_plain_functions_are_awaited_too() -> None:
    def plain(x: int) -> int:
        return x + 1

    async def coroutine(x: int) -> int:
        return x + 2

    assert await as_coroutine_function(plain)(x=1) == 2
    assert as_coroutine_function(coroutine) is coroutine
    assert await as_coroutine_function(lambda x: coroutine(x))(x=1) == 3
    with pytest.raises(TypeError, match="a function is needed, not 5"):
        as_coroutine_function(5)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ errors


def test_remote_errors_carry_data_and_can_be_pickled() -> None:
    error = RemoteError("ValueError", "no hares", {"left": 0})
    assert (error.type, error.message, error.data) == ("ValueError", "no hares", {"left": 0})
    assert str(error) == "ValueError: no hares"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.args) == (RemoteError, error.args)


def test_errors_of_json_rpc_are_as_in_aio_pika() -> None:
    payload = {"error": {"type": "ValueError", "message": "ValueError('x')", "args": ["x"]}}
    error = JsonRPC._remote_error(payload)
    assert isinstance(error, JsonRPCError | RuntimeError | RemoteError)
    assert error.args == ("RPC exception", payload)
    assert isinstance(error, JsonRPCError)
    assert (error.type, error.message, error.data) == ("ValueError", "ValueError('x')", ["x"])


@pytest.mark.parametrize(
    ("message", "args", "text"),
    [
        ("ValueError('no such sku')", ["no such sku"], "ValueError: no such sku"),
        ("ValueError()", [], "ValueError"),
        ("ValueError('a', 1)", ["a", 1], "ValueError('a', 1)"),
        ("no such sku", None, "ValueError: no such sku"),
    ],
)
def test_an_error_of_json_rpc_has_its_type_once_in_its_text(message: str, args: Any, text: str) -> None:
    error = JsonRPC._remote_error({"error": {"type": "ValueError", "message": message, "args": args}})
    assert str(error) == text


@pytest.mark.parametrize("payload", [None, 5, "error", {}, {"error": 5}, {"error": {"type": "T"}}])
def test_an_error_of_another_shape_is_wrapped(payload: Any) -> None:
    assert error_fields(payload) is None
    error = PickleRPC._remote_error(payload)
    assert isinstance(error, RPCException)
    assert error.args[1] == payload


def test_a_stop_iteration_is_wrapped_because_no_future_takes_it() -> None:
    assert isinstance(PickleRPC._remote_error(StopIteration()), RPCException)


# ------------------------------------------------------------------------------------------------------- calls


async def test_a_call_ends_at_its_deadline_and_all_when_nobody_listens_any_more() -> None:
    loop = asyncio.get_running_loop()
    calls = Calls(loop)
    endless, late = calls.begin(Wakeups())[0], calls.begin(Wakeups())[0]
    late.name = "add"
    with pytest.raises(TimeoutError, match="no reply to 'add' in time"):
        await calls.result(late, loop.time() + 0.01)
    assert not endless.done()
    calls.close()
    with pytest.raises(PublishOutcomeUnknown):
        await calls.result(endless, math.inf)


async def test_no_two_calls_have_one_correlation_id() -> None:
    calls = Calls(asyncio.get_running_loop())
    assert len({calls.begin(Wakeups())[1] for _ in range(1000)}) == 1000
    assert calls.waiting("unknown") is None
    assert calls.waiting(None) is None


async def test_a_call_whose_message_still_waits_to_be_sent_is_not_lost_with_the_channel() -> None:
    calls = Calls(asyncio.get_running_loop())
    waiting, sent = calls.begin(Wakeups())[0], calls.begin(Wakeups())[0]
    publish: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waiting.watch(publish)
    written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    written.set_result(None)
    sent.watch(written)
    calls.lose(OSError("reset"))
    with pytest.raises(PublishOutcomeUnknown, match="reset"):
        await sent
    assert not waiting.done()
    waiting.end()
    assert publish.cancelled()


async def test_a_call_fails_as_its_message_does() -> None:
    call, _ = Calls(asyncio.get_running_loop()).begin(Wakeups())
    publish: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    call.watch(publish)
    publish.set_exception(NoServer("nobody"))
    with pytest.raises(NoServer):
        await call
