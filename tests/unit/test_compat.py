"""Drop-in compatibility that needs no broker: `install()`, what is loaded when, hand-made messages, older names."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import AsyncMock, Mock, create_autospec

import pytest
from pamqp.commands import Basic
from pamqp.header import ContentHeader

import leveret
import leveret.compat.aiormq as own_aiormq
from leveret import IncomingMessage, Message, ReturnedMessage, abc, exceptions, tools
from leveret.compat.aiormq.abc import DeliveredMessage
from leveret.delivered import WireOfDelivered
from leveret.message import encode_expiration, encode_timestamp, to_milliseconds
from leveret.older import OlderRobustConnection
from leveret.transaction import Transaction

SOURCE = str(Path(leveret.__file__).parents[1])


def python(code: str, *paths: str) -> str:
    """What *code* prints, in a process of its own."""
    path = ":".join((*paths, SOURCE))
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env={"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ------------------------------------------------------------------------------------------------- install()


def test_after_install_aio_pika_and_aiormq_are_leveret():
    code = """
import leveret.compat
leveret.compat.install()
import leveret, sys
import aio_pika, aio_pika.abc, aiormq
from aio_pika.robust_channel import RobustChannel
from aio_pika.abc import AbstractRobustConnection
from aiormq.exceptions import ChannelNotFoundEntity
from aiormq import abc
assert aio_pika is leveret
assert RobustChannel is leveret.RobustChannel and AbstractRobustConnection is leveret.RobustConnection
assert aio_pika.exceptions.ChannelNotFoundEntity is ChannelNotFoundEntity
assert aiormq.AMQPError is leveret.exceptions.AMQPError and aiormq.abc is abc
assert sys.modules["aio_pika.queue"] is leveret.queue
leveret.compat.install()
print("same", aio_pika is sys.modules["aio_pika"])
"""
    assert python(code) == "same True"


def test_install_comes_first_where_the_real_ones_are_installed(tmp_path):
    for name in ("aio_pika", "aiormq"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the real one')\n")
    code = "import leveret.compat; leveret.compat.install(); import aio_pika, aiormq; print(aio_pika.__name__)"
    assert python(code, str(tmp_path)) == "leveret"


@pytest.mark.parametrize("name", ["aio_pika", "aiormq"])
def test_install_refuses_when_the_real_one_is_in_use(tmp_path, name):
    (tmp_path / f"{name}.py").write_text("")
    code = f"""
import {name}, sys
import leveret.compat
try:
    leveret.compat.install()
except RuntimeError as exc:
    print(exc)
assert sys.modules["{name}"] is {name} and not {{"aio_pika", "aiormq"}} - {{"{name}"}} & sys.modules.keys()
"""
    told = python(code, str(tmp_path))
    assert told.startswith(f"{name} is imported already, from {tmp_path}")
    assert "before anything that imports it" in told


def test_aiormq_s_errors_are_the_same_classes():
    for name in own_aiormq.exceptions.__all__:
        assert getattr(own_aiormq.exceptions, name) is getattr(exceptions, name) is getattr(own_aiormq, name)


# ------------------------------------------------------------------------------------------ what is loaded when


def test_importing_leveret_loads_nothing_that_is_there_for_aio_pika_s_sake():
    code = """
import sys, leveret
for name in ("abc", "tools", "compat", "delivered", "underlay", "robust_queue", "robust_connection"):
    assert f"leveret.{name}" not in sys.modules, name
assert leveret.abc.AbstractChannel is leveret.Channel
print("leveret.abc" in sys.modules)
"""
    assert python(code) == "True"


@pytest.mark.parametrize("name", ["nope", "_nope", "__wrapped__"])
def test_a_name_that_is_not_there_is_an_attribute_error(name):
    with pytest.raises(AttributeError, match=name):
        getattr(leveret, name)
    assert not hasattr(leveret, name)


# ------------------------------------------------------------------------------------------------ abc and mocks


def test_autospecs_of_the_abstract_names_have_what_the_handles_have():
    channel = create_autospec(abc.AbstractChannel)
    assert isinstance(channel, abc.AbstractChannel)
    assert isinstance(channel.declare_queue, AsyncMock)
    exchange = create_autospec(abc.AbstractExchange, instance=True)
    assert isinstance(exchange.publish, AsyncMock)
    with pytest.raises(AttributeError):
        _ = exchange.publsh
    queue = Mock(spec=abc.AbstractQueue)
    assert queue.name is not None
    assert queue.channel is not None


def test_the_name_of_an_exchange():
    channel = SimpleNamespace(close_callbacks=None)
    assert abc.get_exchange_name(leveret.Exchange(channel, "logs")) == "logs"  # type: ignore[arg-type]
    assert abc.get_exchange_name("logs") == "logs"
    with pytest.raises(ValueError, match="5"):
        abc.get_exchange_name(5)  # type: ignore[arg-type]


def test_queues_and_exchanges_take_channel_and_name_by_position():
    channel = SimpleNamespace(close_callbacks=None)
    queue = leveret.Queue(channel, "jobs", True)  # type: ignore[arg-type]
    assert (queue.channel, queue.name, queue.durable, queue.exclusive, queue.arguments) == (
        channel,
        "jobs",
        True,
        False,
        None,
    )
    exchange = leveret.RobustExchange(channel, "logs")  # type: ignore[arg-type]
    assert (exchange.channel, exchange.name, exchange.type) == (channel, "logs", "direct")


def test_publish_and_consume_of_the_plain_classes_are_the_robust_ones_too(monkeypatch):
    for cls, method in ((leveret.Queue, "consume"), (leveret.Exchange, "publish")):
        robust = getattr(leveret, f"Robust{cls.__name__}")
        monkeypatch.setattr(cls, method, "patched")
        assert getattr(robust, method) == "patched"


def test_the_headers_of_the_properties_are_those_of_the_message():
    message = Message(b"")
    message.properties.headers["traceparent"] = "00"
    assert message.headers == {"traceparent": "00"}
    assert message.properties.headers is message.headers
    given = Message(b"", headers={"k": "v"})
    assert given.properties.headers is given.headers


def test_parameters_of_a_url_are_described():
    parameter = abc.ConnectionParameter("n", int, "5")
    assert [parameter.parse(value) for value in ("7", "x", None)] == [7, "5", "5"]
    assert {"heartbeat", "reconnect_interval", "interleave"} <= {each.name for each in leveret.Connection.PARAMETERS}


def test_other_types_can_be_taught_to_expiration_and_timestamp():
    class Minutes:
        def __init__(self, n: int) -> None:
            self.n = n

    with pytest.raises(TypeError):
        encode_expiration(Minutes(1))
    encode_expiration.register(Minutes, lambda value: str(value.n * 60_000))
    encode_timestamp.register(Minutes, lambda value: value.n * 60)
    message = Message(b"", expiration=Minutes(2), timestamp=Minutes(3))  # type: ignore[arg-type]
    properties = message.wire_properties()
    assert (properties.expiration, properties.timestamp) == ("120000", 180)
    assert to_milliseconds(1.5) == 1500


@pytest.mark.parametrize(("kind", "value"), [(int, 5), (float, 1.5)])
def test_what_is_registered_for_plain_seconds_counts_too(kind, value):
    built_in = encode_expiration.dispatch(object)
    encode_expiration.register(kind, lambda value: f"{value} jiffies")
    try:
        assert Message(b"", expiration=value).properties.expiration == f"{value} jiffies"
    finally:
        encode_expiration.register(kind, built_in)
    assert Message(b"", expiration=value).properties.expiration == str(round(value * 1000))


# ------------------------------------------------------------------------------------------- hand-made messages


def delivered(channel: object = None, **properties: object) -> DeliveredMessage:
    return DeliveredMessage(
        delivery=Basic.Deliver(consumer_tag="tag", delivery_tag=7, exchange="ex", routing_key="key"),
        header=ContentHeader(properties=Basic.Properties(**properties)),
        body=b"body",
        channel=channel,
    )


def mock_channel() -> Mock:
    channel = Mock(is_closed=False)
    channel.basic_ack = AsyncMock()
    channel.basic_nack = AsyncMock()
    channel.basic_reject = AsyncMock()
    return channel


def test_a_message_made_of_frames_has_their_facts():
    message = IncomingMessage(
        delivered(headers={"k": "v"}, expiration="1500", message_id="id", message_type="order", priority=3)
    )
    assert (message.body, message.exchange, message.routing_key) == (b"body", "ex", "key")
    assert (message.consumer_tag, message.delivery_tag, message.redelivered) == ("tag", 7, False)
    assert (message.headers, message.expiration, message.message_id) == ({"k": "v"}, 1.5, "id")
    assert (message.type, message.priority, message.message_count) == ("order", 3, None)
    assert message.headers_error is None
    assert not message.locked
    assert copy.copy(message).body == b"body"


def test_a_fetched_message_made_of_frames_has_its_count():
    frames = DeliveredMessage(Basic.GetOk(1, False, "ex", "key", 5), ContentHeader(), b"", None)
    assert IncomingMessage(frames, no_ack=True).message_count == 5


async def test_a_message_made_of_frames_is_settled_on_its_channel():
    channel = mock_channel()
    message = IncomingMessage(delivered(channel))
    await message.ack(multiple=True)
    channel.basic_ack.assert_awaited_once_with(delivery_tag=7, multiple=True)
    assert message.processed
    assert message.locked
    with pytest.raises(leveret.MessageProcessError):
        await message.ack()
    await IncomingMessage(delivered(channel)).reject(requeue=True)
    channel.basic_reject.assert_awaited_once_with(delivery_tag=7, requeue=True)
    await IncomingMessage(delivered(channel)).nack()
    channel.basic_nack.assert_awaited_once_with(delivery_tag=7, multiple=False, requeue=True)
    assert message.channel is channel


@pytest.mark.parametrize(("requeue", "method"), [(None, "basic_ack"), (True, "basic_nack")])
async def test_settling_several_of_a_channel_made_by_hand_settles_each(requeue, method):
    channel = mock_channel()
    await WireOfDelivered(channel).settle_all([1, 2, 3], requeue=requeue)
    assert [call.kwargs["delivery_tag"] for call in getattr(channel, method).await_args_list] == [1, 2, 3]
    await WireOfDelivered(channel).settle_all([], requeue=requeue)


async def test_a_message_made_of_frames_knows_that_its_channel_is_closed():
    channel = mock_channel()
    message = IncomingMessage(delivered(channel))
    channel.is_closed = True
    with pytest.raises(exceptions.ChannelInvalidStateError):
        await message.ack()
    with pytest.raises(exceptions.ChannelInvalidStateError):
        _ = message.channel
    channel.basic_ack.assert_not_called()


async def test_process_lets_the_block_s_error_out_when_rejecting_fails_on_a_closed_channel():
    channel = mock_channel()
    channel.basic_reject.side_effect = exceptions.ChannelInvalidStateError
    with pytest.raises(KeyError, match="the block's"):
        async with IncomingMessage(delivered(channel)).process():
            raise KeyError("the block's")
    channel.basic_ack.side_effect = exceptions.ChannelInvalidStateError
    with pytest.raises(exceptions.ChannelInvalidStateError):
        async with IncomingMessage(delivered(channel)).process():
            pass


async def test_a_subclass_may_settle_in_its_own_way():
    class Fake(IncomingMessage):
        acked = False

        async def ack(self, multiple: bool = False) -> None:
            self.acked = True

    message = Fake(DeliveredMessage(Basic.Deliver(routing_key="q"), ContentHeader(), b"", None))
    assert message.locked  # it has no delivery tag
    async with message.process():
        pass
    assert message.acked


def test_what_came_back_passes_for_aiormq_s_object():
    returned = ReturnedMessage(312, "NO_ROUTE", b"\x02ex\x03key", b"\x00\x00", b"body")
    assert isinstance(returned, DeliveredMessage)
    assert (returned.delivery.reply_code, returned.delivery.routing_key) == (312, "key")
    assert returned.header.properties.headers == {}
    error = exceptions.MessageReturned(returned)
    assert (error.message, error.frame.name) == (returned, "Basic.Return")


def test_errors_are_made_by_hand_as_aio_pika_s():
    frame = Basic.Nack(5)
    error = exceptions.DeliveryError(None, frame)
    assert (error.message, error.frame) == (None, frame)
    assert exceptions.AMQPError("why").reason == "why"


# ---------------------------------------------------------------------------------- what 6.8 had, and 10 does not


@pytest.mark.parametrize(("failure", "verb"), [(None, "basic_ack"), (ValueError("bad"), "basic_reject")])
def test_a_sync_process_settles_and_says_that_it_is_out_of_date(failure, verb):
    def work() -> None:
        with contextlib.suppress(ValueError), message.process() as entered:
            assert entered is message
            if failure:
                raise failure

    channel = Mock(is_closed=False)
    message = IncomingMessage(delivered(channel))
    with pytest.warns(DeprecationWarning, match="async with") as told:
        work()
    assert told[0].filename == __file__
    getattr(channel, verb).assert_called_once()
    assert message.processed


def test_closing_a_transaction_does_nothing():
    transaction = Transaction(Mock())
    with pytest.warns(DeprecationWarning, match="leave it out"):
        transaction.close()
    assert transaction.state is abc.TransactionState.CREATED


async def test_a_loop_is_not_looked_at_where_one_runs():
    other = asyncio.new_event_loop()
    with pytest.warns(DeprecationWarning, match="loop="):
        connection = leveret.Connection("amqp://localhost/", other)
    assert connection.loop is asyncio.get_running_loop()
    other.close()


async def test_an_older_reconnect_callback_is_called_with_the_connection_twice():
    class Fake(OlderRobustConnection):
        def __init__(self) -> None:
            self.reconnect_callbacks = tools.CallbackCollection(self)

    calls = []
    connection = Fake()
    with pytest.warns(DeprecationWarning, match=r"reconnect_callbacks\.add"):
        connection.add_reconnect_callback(lambda *args: calls.append(args))
    await connection.reconnect_callbacks()
    assert calls == [(connection, connection)]


# ------------------------------------------------------------------------------------------------------- tools


async def test_create_task_runs_functions_of_both_kinds():
    async def double(n: int) -> int:
        return 2 * n

    assert await tools.create_task(double, 2) == 4
    assert await tools.create_task(lambda n: 3 * n, 2) == 6
    with pytest.raises(ZeroDivisionError):
        await tools.create_task(lambda: 1 / 0)


async def test_ensure_awaitable_takes_functions_of_both_kinds():
    async def double(n: int) -> int:
        return 2 * n

    assert tools.ensure_awaitable(double) is double
    assert await tools.ensure_awaitable(lambda n: n + 1)(2) == 3
    assert await tools.ensure_awaitable(lambda n: double(n))(2) == 4


async def test_a_one_shot_callback_runs_once():
    calls = []

    async def callback(n: int) -> None:
        calls.append(n)

    once = tools.OneShotCallback(callback)
    await once(1)
    await once(2)
    await once.wait()
    assert calls == [1]


@pytest.mark.expects_errors
async def test_a_one_shot_callback_that_fails_is_finished_and_logged(caplog):
    async def callback() -> None:
        raise ValueError("broken")

    once = tools.OneShotCallback(callback)
    await once()
    assert once.finished.is_set()
    assert "broken" in caplog.text


def test_a_weak_method_callback_does_not_hold_its_object():
    class Owner:
        def method(self, n: int) -> int:
            return n

    owner = Owner()
    callback = tools.weak_method_callback(owner.method)
    assert callback(5) == 5
    del owner
    assert callback(5) is None


def test_iscoroutinepartial_says_what_to_use():
    with pytest.warns(DeprecationWarning, match="iscoroutinefunction"):
        assert not tools.iscoroutinepartial(print)
