"""Remote procedure calls on a real broker: both ends, the other library's ends, and what goes wrong between."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import uuid
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import pytest

import leveret
from leveret import Channel, Connection, Message, RobustConnection, connect
from leveret.exceptions import (
    ChannelInvalidStateError,
    ChannelPreconditionFailed,
    MessageDecodeError,
    MessageProcessError,
    NoServer,
    PublishOutcomeUnknown,
    RemoteError,
)
from leveret.patterns import RPC, JsonRPC, PickleRPC
from leveret.patterns.rpc import JsonRPCError
from tests.broker.test_helpers import eventually
from tests.support.proxy import FaultProxy

BOUND = 10
AIO_PIKA = "aio_pika"


async def within(awaitable: Any) -> Any:
    async with asyncio.timeout(BOUND):
        return await awaitable


async def add(*, x: int, y: int) -> int:
    return x + y


async def fails(**kwargs: Any) -> None:
    raise ValueError("no hares left", kwargs)


@pytest.fixture
def name() -> str:
    """A method that no other test has."""
    return f"leveret.rpc.{uuid.uuid4().hex}"


_warm: set[str] = set()


@pytest.fixture(autouse=True)
async def _direct_replies_go_through(amqp_url: str) -> None:
    """RabbitMQ 4.0 drops direct replies in the first tenth of a second after it began to listen."""
    if amqp_url in _warm:
        return
    async with await connect(amqp_url) as connection:
        rpc = await RPC.create(await connection.channel())
        await rpc.register("leveret.rpc.warm", add, auto_delete=True)
        async with asyncio.timeout(BOUND):
            while True:
                with contextlib.suppress(TimeoutError):
                    await rpc.call("leveret.rpc.warm", {"x": 1, "y": 1}, timeout=0.2)
                    break
    _warm.add(amqp_url)


@pytest.fixture
async def rpc(channel: Channel) -> AsyncIterator[RPC]:
    async with await RPC.create(channel) as rpc:
        yield rpc


@pytest.fixture
async def elsewhere(amqp_url: str) -> AsyncIterator[Channel]:
    """A channel of another connection."""
    async with await connect(amqp_url) as connection:
        yield await connection.channel()


# ---------------------------------------------------------------------------------------------------- calling


@pytest.mark.parametrize("confirms", [True, False])
@pytest.mark.parametrize("options", [{}, {"direct_reply_to": False}, {"exchange": "leveret.rpc"}])
async def test_a_call_returns_what_the_function_returns(
    connection: Connection, name: str, options: dict[str, Any], confirms: bool
) -> None:
    async with connection.channel(publisher_confirms=confirms) as channel:
        rpc = await RPC.create(channel, **options)
        await rpc.register(name, add, auto_delete=True)
        assert await rpc.call(name, {"x": 2, "y": 3}) == 5
        assert await getattr(rpc.proxy, name)(x=2, y=4) == 6
        assert await asyncio.gather(*(rpc.call(name, {"x": n, "y": n}) for n in range(50))) == list(range(0, 100, 2))
        assert not rpc.futures
        await rpc.close()


async def test_the_server_may_be_elsewhere_and_names_may_have_dots(rpc: RPC, elsewhere: Channel, name: str) -> None:
    server = await RPC.create(elsewhere)
    await server.register(f"{name}.add", add, auto_delete=True)
    method = rpc.proxy
    for part in f"{name}.add".split("."):
        method = getattr(method, part)
    assert await method(x=1, y=1) == 2  # type: ignore[operator]


async def test_what_json_does_not_know_arrives_in_its_plain_form(rpc: RPC, name: str) -> None:
    async def echo(**kwargs: Any) -> Any:
        return kwargs

    await rpc.register(name, echo, auto_delete=True)
    day = datetime.date(2026, 1, 2)
    assert await rpc.call(name, {"day": day, "price": Decimal("1.10"), "raw": b"\x00"}) == {
        "day": "2026-01-02",
        "price": "1.10",
        "raw": "AA==",
    }


@pytest.mark.parametrize(("confirms", "on_return_raises"), [(True, False), (True, True), (False, False)])
async def test_a_call_to_nobody_fails_at_once(
    connection: Connection, name: str, confirms: bool, on_return_raises: bool
) -> None:
    async with connection.channel(publisher_confirms=confirms, on_return_raises=on_return_raises) as channel:
        rpc = await RPC.create(channel)
        with pytest.raises(NoServer, match=name) as caught:
            await within(rpc.call(name, {}))
        assert isinstance(caught.value, MessageProcessError)
        assert caught.value.message is not None
        assert not rpc.futures


@pytest.mark.parametrize("options", [{}, {"direct_reply_to": False}])
async def test_a_call_that_nobody_takes_before_it_expires_fails_then(
    channel: Channel, name: str, options: dict[str, Any]
) -> None:
    rpc = await RPC.create(channel, **options)
    await channel.declare_queue(name, exclusive=True, arguments={"x-dead-letter-exchange": "rpc.dlx"})
    with pytest.raises(TimeoutError, match="expired"):
        await within(rpc.call(name, expiration=0.05))
    with pytest.raises(TimeoutError, match="expired"):
        await within(asyncio.gather(*(rpc.call(name, expiration=0.05) for _ in range(5))))
    await rpc.close()


async def test_a_call_times_out_and_is_not_executed_later(rpc: RPC, channel: Channel, name: str) -> None:
    queue = await channel.declare_queue(name, exclusive=True)
    with pytest.raises(TimeoutError, match=name):
        await rpc.call(name, timeout=0.1)
    assert not rpc.futures

    async def has_expired() -> bool:  # as the broker's clock has it
        return not (await queue.declare()).message_count

    await eventually(has_expired)


async def test_without_a_limit_a_call_never_expires(rpc: RPC, channel: Channel, name: str) -> None:
    queue = await channel.declare_queue(name, exclusive=True)
    calling = asyncio.ensure_future(rpc.call(name, timeout=float("inf")))
    message = await _first(queue)
    assert message.expiration is None
    calling.cancel()


async def _first(queue: leveret.Queue) -> leveret.IncomingMessage:
    async with asyncio.timeout(BOUND), queue.iterator(no_ack=True) as messages:
        return await anext(messages)


@pytest.mark.parametrize("how", ["cancelled", "timed out"])
async def test_a_late_reply_is_dropped_and_counted(
    rpc: RPC, name: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    began, go = asyncio.Event(), asyncio.Event()

    async def slow() -> str:
        began.set()
        await go.wait()
        return "late"

    await rpc.register(name, slow, auto_delete=True)
    calling = asyncio.ensure_future(rpc.call(name, timeout=0.2 if how == "timed out" else 30))
    await within(began.wait())
    if how == "cancelled":
        calling.cancel()
    with pytest.raises(asyncio.CancelledError if how == "cancelled" else TimeoutError):
        await calling
    assert not rpc.futures
    go.set()
    assert await within(rpc.call(name)) == "late"
    assert rpc.dropped_replies == 1
    assert "Unknown message" in caplog.text


# ---------------------------------------------------------------------------------------------------- serving


async def test_what_a_function_raises_comes_back_as_data(rpc: RPC, name: str, caplog: pytest.LogCaptureFixture) -> None:
    await rpc.register(name, fails, auto_delete=True)
    with pytest.raises(RemoteError) as caught:
        await rpc.call(name, {"a": 1})
    error = caught.value
    assert (error.type, error.data) == ("ValueError", ["no hares left", "{'a': 1}"])
    assert "no hares left" in error.message
    (record,) = (each for each in caplog.records if each.name == "leveret.patterns.rpc")
    assert record.levelno == logging.WARNING
    assert record.exc_info is None
    assert name in record.getMessage()


@pytest.mark.expects_errors
async def test_with_host_exceptions_the_traceback_is_logged(
    channel: Channel, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    rpc = await RPC.create(channel, host_exceptions=True)
    await rpc.register(name, fails, auto_delete=True)
    with pytest.raises(RemoteError):
        await rpc.call(name)
    (record,) = (each for each in caplog.records if each.name == "leveret.patterns.rpc")
    assert record.levelno == logging.ERROR
    assert record.exc_info


async def test_a_function_may_say_what_its_caller_gets(rpc: RPC, name: str) -> None:
    async def sold_out() -> None:
        raise RemoteError("SoldOut", "no hares", data={"left": 0})

    await rpc.register(name, sold_out, auto_delete=True)
    with pytest.raises(RemoteError) as caught:
        await rpc.call(name)
    assert (caught.value.type, caught.value.message, caught.value.data) == ("SoldOut", "no hares", {"left": 0})


@pytest.mark.expects_errors
@pytest.mark.parametrize("kind", ["wrong arguments", "a result that has no form", "a cancelled future", "a plain one"])
async def test_every_call_is_answered(rpc: RPC, name: str, kind: str) -> None:
    async def no_form() -> object:
        return object()

    async def waits_for_cancelled() -> None:
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    def plain() -> None:
        raise KeyError("plain")

    functions: dict[str, Any] = {
        "wrong arguments": (add, "TypeError"),
        "a result that has no form": (no_form, "TypeError"),
        "a cancelled future": (waits_for_cancelled, "CancelledError"),
        "a plain one": (plain, "KeyError"),
    }
    function, type_ = functions[kind]
    await rpc.register(name, function, auto_delete=True)
    with pytest.raises(RemoteError) as caught:
        await within(rpc.call(name))
    assert caught.value.type == type_


class _Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


SERVED_BADLY: dict[str, tuple[BaseException | Any, str, str]] = {
    "a lone surrogate in a result": ("\ud800", "UnicodeEncodeError", "surrogates not allowed"),
    "a lone surrogate in an error": (ValueError("a\ud800b"), "ValueError", r"a\\ud800b"),
    "a lone surrogate in a RemoteError": (RemoteError("Sold", "a\ud800b", ["\ud800"]), "Sold", r"a\\ud800b"),
    "NaN in a result": ([float("nan")], "ValueError", "neither NaN nor Infinity"),
    "NaN in an error": (ValueError(float("inf")), "ValueError", "inf"),
    "an error without a text": (_Mute(), "_Mute", "whose text fails with RuntimeError"),
}


@pytest.mark.expects_errors
@pytest.mark.parametrize("kind", SERVED_BADLY)
@pytest.mark.parametrize("cls", [RPC, JsonRPC])
async def test_what_cannot_be_sent_as_it_is_is_answered_all_the_same(
    channel: Channel, name: str, kind: str, cls: type[RPC]
) -> None:
    given, type_, text = SERVED_BADLY[kind]

    async def function() -> Any:
        if isinstance(given, Exception):
            raise given
        return given

    async with await cls.create(channel) as rpc:
        await rpc.register(name, function, auto_delete=True)
        with pytest.raises(RemoteError, match=text) as caught:
            await within(rpc.call(name, timeout=5))
        assert caught.value.type == type_


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800"])
async def test_arguments_that_json_does_not_have_are_refused(rpc: RPC, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"neither NaN nor Infinity|surrogates"):
        await rpc.call(name, {"x": value})
    assert not rpc.futures


async def test_a_function_that_cancels_itself_is_answered_for(rpc: RPC, name: str) -> None:
    async def cancels() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    await rpc.register(name, cancels, auto_delete=True)
    for _ in range(2):
        with pytest.raises(RemoteError, match="CancelledError"):
            await within(rpc.call(name, timeout=5))


@pytest.mark.parametrize("is_robust", [False, True], ids=["plain", "robust"])
@pytest.mark.parametrize("how", ["channel", "connection", "unregister", "stop"])
async def test_a_function_that_leveret_cancels_is_not_answered_for(
    rpc: RPC, amqp_url: str, name: str, how: str, is_robust: bool
) -> None:
    """Its call comes again, elsewhere."""
    began = asyncio.Event()

    async def slow() -> None:
        began.set()
        await asyncio.Event().wait()

    async with await (leveret.connect_robust if is_robust else connect)(amqp_url) as connection:
        channel = await connection.channel()
        server = await RPC.create(channel)
        await server.register(name, slow)
        calling = asyncio.ensure_future(rpc.call(name))
        await within(began.wait())
        if how == "channel":
            await channel.close()
        elif how == "connection":
            await connection.close()
        elif how == "unregister":
            await server.unregister(slow, drain=0)
        else:
            await server.consumer_tags[slow].stop(0)
        await rpc.register(name, lambda: "elsewhere")
        assert await within(calling) == "elsewhere"
    await rpc.channel.queue_delete(name)


@pytest.mark.expects_errors
@pytest.mark.parametrize("expires", [True, False])
async def test_a_reply_that_is_too_large_is_answered_by_an_error_and_disturbs_nobody(
    robust: RobustConnection, elsewhere: Channel, name: str, expires: bool
) -> None:
    runs: list[int] = []
    go, began = asyncio.Event(), asyncio.Event()

    async def big(size: int) -> str:
        runs.append(size)
        return "a" * size

    async def slow() -> str:
        runs.append(0)
        began.set()
        await go.wait()
        return "slow"

    server = await RPC.create(await robust.channel())
    await server.register(name, big, auto_delete=True)
    await server.register(f"{name}.slow", slow, auto_delete=True)
    rpc = await RPC.create(elsewhere)
    other = asyncio.ensure_future(rpc.call(f"{name}.slow"))
    await within(began.wait())
    size = 17_000_000
    calling = rpc.call(name, {"size": size}, timeout=20 if expires else float("inf"))
    if str(robust.server_properties["version"]).startswith("3."):  # takes 128 MiB, later ones 16
        assert len(await within(calling)) == size
    else:
        with pytest.raises(RemoteError, match="larger than") as caught:
            await within(calling)
        assert caught.value.type == "ReplyRefused"
    go.set()
    assert await within(other) == "slow"
    assert runs == [0, size]
    assert await within(rpc.call(name, {"size": 5})) == "aaaaa"


@pytest.mark.expects_errors
@pytest.mark.parametrize("caller", ["leveret", "aio-pika"])
async def test_where_the_broker_takes_less_than_expected_the_channel_is_closed_once(
    robust: RobustConnection, amqp_url: str, name: str, caller: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the reply of one call; another that runs then is run again, and gets its result."""
    if caller != "leveret":
        pytest.importorskip(AIO_PIKA)
    if str(robust.server_properties["version"]).startswith("3."):
        pytest.skip("RabbitMQ 3.10 takes 128 MiB")
    monkeypatch.setattr("leveret.patterns.serving.LARGE", 1 << 40)
    runs: list[str] = []
    go, began = asyncio.Event(), asyncio.Event()

    async def big() -> str:
        runs.append("big")
        return "a" * 17_000_000

    async def slow() -> str:
        runs.append("slow")
        began.set()
        await go.wait()
        return "slow"

    channel = await robust.channel()
    server = await RPC.create(channel)
    await server.register(name, big)
    await server.register(f"{name}.slow", slow)
    rpc_class: Any = JsonRPC if caller == "leveret" else their_rpc("json")
    connecting: Any = connect if caller == "leveret" else pytest.importorskip(AIO_PIKA).connect
    async with await connecting(amqp_url) as connection:
        rpc = await rpc_class.create(await connection.channel())
        other = asyncio.ensure_future(rpc.call(f"{name}.slow"))
        await within(began.wait())
        with pytest.raises(RuntimeError) as caught:
            await within(rpc.call(name))
        assert caught.value.args[1]["error"]["type"] == "ReplyRefused"
        go.set()
        assert await within(other) == "slow"
    assert runs.count("big") == 2
    assert runs.count("slow") == 2
    await within(channel.queue_delete(name))
    await within(channel.queue_delete(f"{name}.slow"))


async def test_a_function_that_is_not_there_any_more_is_answered_for(rpc: RPC, name: str) -> None:
    await rpc.register(name, add, auto_delete=True)
    del rpc.routes[name]
    with pytest.raises(RemoteError, match="MethodNotRegistered"):
        await within(rpc.call(name))


async def test_an_exception_that_cannot_be_pickled_or_unpickled_keeps_its_text(channel: Channel, name: str) -> None:
    class Local(Exception):
        pass

    async with await PickleRPC.create(channel) as rpc:
        for number, error in enumerate((Local("no hares"), _TwoArguments("no", "hares"))):

            async def function(error: Exception = error) -> None:
                raise error

            await rpc.register(f"{name}.{number}", function, auto_delete=True)
            with pytest.raises(RuntimeError, match=f"{type(error).__name__}: no hares"):
                await within(rpc.call(f"{name}.{number}"))


class _TwoArguments(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


async def test_names_and_functions_are_registered_once(rpc: RPC, name: str) -> None:
    arguments = {"x-max-length": 10}
    await rpc.register(name, add, auto_delete=True, arguments=arguments)
    assert arguments == {"x-max-length": 10}
    with pytest.raises(RuntimeError, match="the function is registered already"):
        await rpc.register(f"{name}.2", add)
    with pytest.raises(RuntimeError, match="Method name already used"):
        await rpc.register(name, fails)
    await rpc.unregister(add)
    await rpc.unregister(add)
    await rpc.register(name, add, auto_delete=True, arguments=arguments)  # the queue may not have gone yet
    assert await rpc.call(name, {"x": 1, "y": 1}) == 2


async def test_no_more_than_concurrency_run_at_a_time(rpc: RPC, name: str) -> None:
    running = most = 0
    together = asyncio.Barrier(3)

    async def work() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await within(together.wait())
        running -= 1

    await rpc.register(name, work, concurrency=3, auto_delete=True)
    await asyncio.gather(*(rpc.call(name) for _ in range(21)))
    assert most == 3


async def test_unregistering_lets_calls_end_and_gives_back_the_rest(rpc: RPC, channel: Channel, name: str) -> None:
    began, go = asyncio.Event(), asyncio.Event()

    async def slow() -> str:
        began.set()
        await go.wait()
        return "done"

    await rpc.register(name, slow, concurrency=1, prefetch=10)
    queue = rpc.queues[slow]
    calls = [asyncio.ensure_future(rpc.call(name)) for _ in range(3)]
    await within(began.wait())
    stopping = asyncio.ensure_future(rpc.unregister(slow))
    await asyncio.sleep(0)
    go.set()
    await within(stopping)
    assert await within(calls[0]) == "done"
    assert not calls[1].done()

    async def other() -> str:
        return "other"

    await rpc.register(name, other)
    assert await within(asyncio.gather(*calls[1:])) == ["other", "other"]
    await queue.delete(if_unused=False, if_empty=False)


async def test_a_call_without_an_address_is_executed_and_acknowledged(rpc: RPC, channel: Channel, name: str) -> None:
    done = asyncio.Event()

    async def work() -> None:
        done.set()

    await rpc.register(name, work, auto_delete=True)
    await channel.default_exchange.publish(Message(b"{}", type="call"), name)
    await within(done.wait())
    await rpc.unregister(work)


async def test_calls_that_run_while_the_channel_is_drained_get_the_replies_that_they_wait_for(
    amqp_url: str, name: str, elsewhere: Channel
) -> None:
    began, go = asyncio.Event(), asyncio.Event()

    async def gate() -> str:
        began.set()
        await go.wait()
        return "opened"

    server = await RPC.create(elsewhere)
    await server.register(f"{name}.gate", gate, auto_delete=True)
    async with await connect(amqp_url) as connection:
        channel = await connection.channel()
        middle = await RPC.create(channel)

        async def outer() -> Any:
            return await middle.call(f"{name}.gate")

        await middle.register(name, outer, auto_delete=True)
        calling = asyncio.ensure_future(server.call(name))
        await within(began.wait())
        closing = asyncio.ensure_future(channel.close(drain=BOUND))
        await eventually(lambda: any(getattr(each, "is_stopping", False) for each in channel.consumers))
        go.set()
        assert await within(calling) == "opened"
        await within(closing)


# ------------------------------------------------------------------------------------------ beginning, ending


async def test_one_rpc_of_a_channel_has_direct_reply_to_and_others_have_queues(channel: Channel, name: str) -> None:
    first, second = await asyncio.gather(RPC.create(channel), RPC.create(channel))
    assert first.result_queue.name == "amq.rabbitmq.reply-to"
    assert second.result_queue.name != first.result_queue.name
    await first.register(name, add, auto_delete=True)
    assert await second.call(name, {"x": 1, "y": 1}) == 2
    with pytest.raises(ValueError, match="another RPC on this channel"):
        await RPC.create(channel, direct_reply_to=True)
    await first.close()
    third = await RPC.create(channel, direct_reply_to=True)
    with pytest.raises(ValueError, match="no queue that other arguments"):
        await RPC.create(channel, direct_reply_to=True, auto_delete=False)
    await third.close()
    await second.close()


async def test_closing_ends_calls_and_leaves_nothing(
    rpc: RPC, channel: Channel, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    queue = await channel.declare_queue(name, exclusive=True)
    calling = asyncio.ensure_future(rpc.call(name))
    await _first(queue)
    await rpc.close()
    with pytest.raises(PublishOutcomeUnknown, match="closed"):
        await calling
    await rpc.close()
    assert "the RPC is closed already" in caplog.text
    with pytest.raises(RuntimeError, match="not initialised"):
        await rpc.call(name)
    assert not channel.return_callbacks
    await rpc.initialize()


async def test_a_function_may_close_its_rpc_and_is_not_waited_for(rpc: RPC, elsewhere: Channel, name: str) -> None:
    async def closes() -> str:
        await rpc.close()
        return "closed"

    await rpc.register(f"{name}.other", add, auto_delete=True)
    await rpc.register(name, closes, auto_delete=True)
    caller = await RPC.create(elsewhere)
    async with asyncio.timeout(5):  # functions get ten seconds to end
        assert await caller.call(name) == "closed"
    await rpc.initialize()


async def test_functions_that_run_while_it_is_closed_may_call_others(rpc: RPC, elsewhere: Channel, name: str) -> None:
    began, go = asyncio.Event(), asyncio.Event()

    async def outer() -> Any:
        began.set()
        await go.wait()
        return await rpc.call(f"{name}.add", {"x": 1, "y": 1})

    server = await RPC.create(elsewhere)
    await server.register(f"{name}.add", add, auto_delete=True)
    await rpc.register(name, outer, auto_delete=True)
    calling = asyncio.ensure_future(server.call(name))
    await within(began.wait())
    closing = asyncio.ensure_future(rpc.close())
    await asyncio.sleep(0)
    go.set()
    assert await within(calling) == 2
    await within(closing)
    await rpc.initialize()


async def test_a_closed_channel_ends_calls_and_refuses_more(channel: Channel, name: str) -> None:
    rpc = await RPC.create(channel)
    queue = await channel.declare_queue(name, exclusive=True)
    calling = asyncio.ensure_future(rpc.call(name))
    await _first(queue)
    await channel.close()
    with pytest.raises(PublishOutcomeUnknown):
        await within(calling)
    with pytest.raises(ChannelInvalidStateError, match="the channel is closed"):
        await rpc.call(name)
    with pytest.raises(ChannelInvalidStateError, match="the channel is closed"):
        await rpc.register(name, add)
    await channel.reopen()
    await rpc.initialize()
    await rpc.register(name + "2", add, auto_delete=True)
    assert await rpc.call(name + "2", {"x": 1, "y": 1}) == 2


async def test_unknown_replies_are_dropped(channel: Channel, caplog: pytest.LogCaptureFixture) -> None:
    rpc = await RPC.create(channel, direct_reply_to=False)
    for correlation_id in (None, "unknown"):
        await channel.default_exchange.publish(Message(b"", correlation_id=correlation_id), rpc.result_queue.name)
    await eventually(lambda: rpc.dropped_replies == 2)
    assert "a reply without a correlation_id" in caplog.text
    await rpc.close()


# --------------------------------------------------------------------------------------------------- the link


async def test_methods_and_callers_survive_the_link(robust: RobustConnection, link: FaultProxy, name: str) -> None:
    channel = await robust.channel()
    rpc = await RPC.create(channel)
    await rpc.register(name, add)
    queued = await RPC.create(await robust.channel(), direct_reply_to=False)
    for _ in range(3):
        assert await within(rpc.call(name, {"x": 1, "y": 1})) == 2
        assert await within(queued.call(name, {"x": 1, "y": 1})) == 2
        link.rst()
        assert await within(rpc.call(name, {"x": 1, "y": 2}, retry=True)) == 3
        assert await within(queued.call(name, {"x": 1, "y": 2}, retry=True)) == 3
    await rpc.queues[add].delete(if_unused=False, if_empty=False)


@pytest.mark.parametrize("retry", [False, True])
async def test_calls_that_the_link_dies_with_fail_at_once_or_are_made_again(
    robust: RobustConnection, link: FaultProxy, elsewhere: Channel, name: str, retry: bool
) -> None:
    began, go = asyncio.Event(), asyncio.Event()

    async def slow() -> str:
        began.set()
        await go.wait()
        return "done"

    server = await RPC.create(elsewhere)
    await server.register(name, slow, auto_delete=True)
    rpc = await RPC.create(await robust.channel())
    calling = asyncio.ensure_future(rpc.call(name, retry=retry))
    await within(began.wait())
    link.rst()
    if retry:
        go.set()
        assert await within(calling) == "done"
    else:
        with pytest.raises(PublishOutcomeUnknown) as caught:
            await within(calling)
        assert isinstance(caught.value, ConnectionError)
        go.set()
    assert not rpc.futures


async def test_a_call_that_the_broker_refuses_is_not_made_again_and_again(robust: RobustConnection, name: str) -> None:
    if str(robust.server_properties["version"]).startswith("3."):
        pytest.skip("RabbitMQ 3.10 takes 128 MiB")
    channel = await robust.channel()
    rpc = await RPC.create(channel)
    await rpc.register(name, add, auto_delete=True)
    losses: list[object] = []
    channel.close_callbacks.add(lambda _, error: losses.append(error))
    with pytest.raises(PublishOutcomeUnknown) as caught:
        await within(rpc.call(name, {"x": "a" * 17_000_000, "y": ""}, retry=True))
    assert isinstance(caught.value.__cause__, ChannelPreconditionFailed)
    assert len(losses) == 2
    assert await within(rpc.call(name, {"x": 1, "y": 2}, retry=True)) == 3


# -------------------------------------------------------------------------------------------------- aio-pika


@pytest.fixture
async def theirs(amqp_url: str) -> AsyncIterator[Any]:
    """A channel of aio-pika."""
    aio_pika = pytest.importorskip(AIO_PIKA)
    async with await aio_pika.connect(amqp_url) as connection:
        yield await connection.channel()


def their_rpc(kind: str) -> Any:
    """Their class that speaks *kind*."""
    from aio_pika import patterns

    return {"json": patterns.JsonRPC, "pickle": patterns.RPC}[kind]


KINDS: dict[str, Any] = {"json": JsonRPC, "pickle": PickleRPC}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"direct_reply_to": False}])
async def test_leveret_calls_aio_pika(
    theirs: Any, channel: Channel, name: str, kind: str, options: dict[str, Any]
) -> None:
    server = await their_rpc(kind).create(theirs)
    await server.register(name, add, auto_delete=True)
    await server.register(f"{name}.fails", fails, auto_delete=True)
    rpc = await KINDS[kind].create(channel, **options)
    assert await within(rpc.call(name, {"x": 1, "y": 2})) == 3
    error: Any = JsonRPCError if kind == "json" else ValueError
    with pytest.raises(error, match="no hares left"):
        await within(rpc.call(f"{name}.fails", {}))
    with pytest.raises(NoServer):
        await within(rpc.call(f"{name}.nobody", {}))
    await rpc.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_aio_pika_calls_leveret(theirs: Any, channel: Channel, name: str, kind: str) -> None:
    server = await KINDS[kind].create(channel)
    await server.register(name, add, auto_delete=True)
    await server.register(f"{name}.fails", fails, auto_delete=True)
    rpc = await their_rpc(kind).create(theirs)
    assert await within(rpc.call(name, {"x": 1, "y": 2})) == 3
    with pytest.raises(RuntimeError if kind == "json" else ValueError, match="no hares left"):
        await within(rpc.call(f"{name}.fails", {}))
    await rpc.close()


async def test_both_serve_one_method(theirs: Any, channel: Channel, name: str) -> None:
    """Their queues have the same arguments."""
    server = await their_rpc("json").create(theirs)
    await server.register(name, add)
    ours = await JsonRPC.create(channel)
    await ours.register(name, add)
    assert await within(asyncio.gather(*(ours.call(name, {"x": n, "y": 0}) for n in range(20)))) == list(range(20))
    await ours.queues[add].delete(if_unused=False, if_empty=False)


async def test_a_call_of_aio_pika_s_expires_in_leveret_s_queue(theirs: Any, channel: Channel, name: str) -> None:
    began, go = asyncio.Event(), asyncio.Event()

    async def slow() -> None:
        began.set()
        await go.wait()

    server = await JsonRPC.create(channel)
    await server.register(name, slow, prefetch=1, auto_delete=True)
    rpc = await their_rpc("json").create(theirs)
    first = asyncio.ensure_future(rpc.call(name))
    await within(began.wait())
    with pytest.raises(TimeoutError):
        await within(rpc.call(name, expiration=0.05))
    go.set()
    await within(first)
    await rpc.close()


@pytest.mark.expects_errors
async def test_a_pickle_is_not_read_as_json_nor_the_reverse(theirs: Any, channel: Channel, name: str) -> None:
    server = await RPC.create(channel)
    await server.register(name, add, auto_delete=True)
    rpc = await their_rpc("pickle").create(theirs)
    with pytest.raises(Exception, match=r"."):  # what aio-pika makes of JSON
        await within(rpc.call(name, {"x": 1, "y": 1}))
    await rpc.close()
    their_server = await their_rpc("pickle").create(theirs)
    await their_server.register(f"{name}.2", add, auto_delete=True)
    with pytest.raises(MessageDecodeError, match="application/python-pickle"):
        await within(server.call(f"{name}.2", {"x": 1, "y": 1}))


# ------------------------------------------------------------------------------------------------- subclasses


async def test_a_subclass_as_aio_pika_has_them_works(channel: Channel, name: str) -> None:
    seen: list[str] = []

    class Own(RPC):
        CONTENT_TYPE = "text/x-repr"

        def serialize(self, data: Any) -> bytes:
            return repr(data).encode()

        def deserialize(self, data: bytes) -> Any:
            import ast

            return ast.literal_eval(data.decode())

        def serialize_exception(self, exception: Exception) -> Any:
            return ("own", str(exception))

        async def execute(self, func: Any, payload: dict[str, Any]) -> Any:
            seen.append("execute")
            return await super().execute(func, payload)

        async def deserialize_message(self, message: leveret.IncomingMessage) -> Any:
            await asyncio.sleep(0)
            payload = await super().deserialize_message(message)
            return LookupError(payload) if message.type == "error" else payload

    rpc = await Own.create(channel)
    await rpc.register(name, add, auto_delete=True)
    assert await rpc.call(name, {"x": 1, "y": 1}) == 2
    with pytest.raises(LookupError, match="own"):
        await rpc.call(name, {"x": 1})
    assert seen == ["execute", "execute"]


async def test_a_reply_that_takes_for_ever_to_read_ends_with_the_call_s_timeout_or_the_rpc(
    channel: Channel, name: str
) -> None:
    class Stuck(RPC):
        async def deserialize_message(self, message: leveret.IncomingMessage) -> Any:
            if message.type == "result":
                await asyncio.Event().wait()
            return await super().deserialize_message(message)

    rpc = await Stuck.create(channel)
    await rpc.register(name, add, auto_delete=True)
    with pytest.raises(TimeoutError):
        await rpc.call(name, {"x": 1, "y": 1}, timeout=0.3)
    waiting = asyncio.create_task(rpc.call(name, {"x": 1, "y": 1}))
    await eventually(lambda: rpc.futures)
    await asyncio.wait_for(rpc.close(), BOUND)
    with pytest.raises(PublishOutcomeUnknown):
        await waiting


async def test_calls_and_replies_go_through_a_publish_that_somebody_has_wrapped(
    channel: Channel, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As instrumentation does: a coroutine function that runs nothing before it is awaited."""
    publish, seen = leveret.Exchange.publish, []

    async def wrapped(self: Any, message: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(message.type)
        return await publish(self, message, *arguments, **options)

    monkeypatch.setattr(leveret.Exchange, "publish", wrapped)
    rpc = await RPC.create(channel)
    await rpc.register(name, add, auto_delete=True)
    assert await within(rpc.call(name, {"x": 1, "y": 2})) == 3
    with pytest.raises(NoServer):
        await within(rpc.call(f"{name}.nobody"))
    assert seen == ["call", "result", "call"]
