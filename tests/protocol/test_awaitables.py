"""What plain functions return can be awaited in every way; names of exchange types go out as they are; other loops."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any
from unittest.mock import AsyncMock, create_autospec

import pytest
from pamqp import commands

from leveret import Exchange, ExchangeType, IncomingMessage, Message
from leveret.exceptions import MessageNacked
from tests.protocol.kit import linked, run_strictly, until, within


async def _await(outcome: Any) -> Any:
    return await outcome


async def _gather(outcome: Any) -> Any:
    return (await asyncio.gather(outcome, asyncio.sleep(0)))[0]


async def _wait_for(outcome: Any) -> Any:
    return await asyncio.wait_for(outcome, 2)


async def _create_task(outcome: Any) -> Any:
    return await asyncio.create_task(outcome)


async def _ensure_future(outcome: Any) -> Any:
    return await asyncio.ensure_future(outcome)


async def _task_group(outcome: Any) -> Any:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(outcome)
    return task.result()


async def _shield(outcome: Any) -> Any:
    return await asyncio.shield(outcome)


async def _timeout(outcome: Any) -> Any:
    async with asyncio.timeout(2):
        return await outcome


async def _as_completed(outcome: Any) -> Any:
    (first,) = asyncio.as_completed([outcome])
    return await first


FORMS = [_await, _gather, _wait_for, _create_task, _ensure_future, _task_group, _shield, _timeout, _as_completed]
Form = Callable[[Any], Awaitable[Any]]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__.strip("_"))
@pytest.mark.parametrize("confirmed", ["late", "early", "nacked", "none"])
async def test_publish_in_every_form(form: Form, confirmed: str) -> None:
    async with linked() as link:
        channel = await link.channel(confirm=confirmed != "none")
        outcome = channel.default_exchange.publish(Message(b"x"), "key")
        if confirmed == "early":
            await link.session.expect_publish()
            link.session.send(1, commands.Basic.Ack(1))
            await link.fence()
        task = asyncio.create_task(form(outcome))
        if confirmed != "early":
            await link.session.expect_publish()
        if confirmed == "nacked":
            link.session.send(1, commands.Basic.Nack(1))
            with pytest.raises((MessageNacked, ExceptionGroup)):
                await within(task)
            return
        if confirmed == "late":
            link.session.send(1, commands.Basic.Ack(1))
        result = await within(task)
        assert result is None if confirmed == "none" else isinstance(result, commands.Basic.Ack)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__.strip("_"))
@pytest.mark.parametrize("settle", ["ack", "nack", "reject"])
async def test_settling_in_every_form(form: Form, settle: str) -> None:
    got: list[IncomingMessage] = []
    async with linked() as link:
        channel = await link.channel()
        await link.consume(channel, got.append)
        link.session.deliver(1, "tag", 1)
        await until(lambda: got)
        assert await within(form(getattr(got[0], settle)())) is None
        (frame,) = await link.sent()
        assert frame.name == f"Basic.{settle.capitalize()}"


async def test_many_outcomes_in_one_gather() -> None:
    got: list[IncomingMessage] = []
    async with linked() as link:
        channel = await link.channel()
        await link.consume(channel, got.append)
        for n in range(1, 11):
            link.session.deliver(1, "tag", n)
        await until(lambda: len(got) == 10)
        await within(asyncio.gather(*(message.ack() for message in got)))
        assert len(await link.sent()) == 1
        publishes = asyncio.gather(*(channel.default_exchange.publish(Message(b""), "key") for _ in range(10)))
        for _ in range(10):
            await link.session.expect_publish()
        link.session.send(1, commands.Basic.Ack(10, True))
        assert len(await within(publishes)) == 10


async def test_an_outcome_may_be_awaited_twice() -> None:
    async with linked() as link:
        channel = await link.channel()
        outcome = channel.default_exchange.publish(Message(b""), "key")
        await link.session.expect_publish()
        link.session.send(1, commands.Basic.Ack(1))
        assert await within(outcome) is await within(outcome)


def test_plain_functions_that_return_awaitables_look_like_coroutine_functions() -> None:
    for function in (Exchange.publish, IncomingMessage.ack, IncomingMessage.nack, IncomingMessage.reject):
        assert inspect.iscoroutinefunction(function)
    assert isinstance(create_autospec(Exchange).publish, AsyncMock)


async def test_bad_arguments_raise_at_the_call_not_at_the_await() -> None:
    async with linked() as link:
        channel = await link.channel()
        with pytest.raises(TypeError):
            channel.default_exchange.publish("text", "key")  # type: ignore[arg-type]


@pytest.mark.parametrize("type_", [*ExchangeType, "x-recent-history", "x-random", "x-jms-topic", "any string", ""])
async def test_exchange_types_go_out_as_given(type_: ExchangeType | str) -> None:
    async with linked() as link:
        channel = await link.channel()
        declare = asyncio.create_task(
            channel.declare_exchange("x", type_, durable=True, arguments={"x-delayed-type": "direct"})
        )
        _, sent = await link.session.expect(commands.Exchange.Declare)
        value = type_.value if isinstance(type_, ExchangeType) else type_
        assert (sent.exchange, sent.exchange_type, sent.durable) == ("x", value, True)
        assert sent.arguments == {"x-delayed-type": "direct"}
        link.session.send(1, commands.Exchange.DeclareOk())
        assert (await within(declare)).type == value


UNDER_UVLOOP = """
import asyncio, warnings
import uvloop
from pamqp import commands
import leveret
from tests.protocol.kit import linked, until

async def main():
    got = []
    async with linked(query="{query}") as link:
        channel = await link.channel()
        await link.consume(channel, got.append)
        publishes = [asyncio.ensure_future(channel.default_exchange.publish(leveret.Message(b"x" * 200_000), "key"))
                     for _ in range(20)]
        for _ in publishes:
            await link.session.expect_publish()
        link.session.send(1, commands.Basic.Ack(20, True))
        await asyncio.gather(*publishes)
        for n in range(1, 101):
            link.session.deliver(1, "tag", n, bytes(n * 1000))
        await until(lambda: len(got) == 100)
        assert [len(message.body) for message in got] == [n * 1000 for n in range(1, 101)]
        for message in got:
            message.ack()
        sent = await link.fence()
        assert sum(isinstance(value, commands.Basic.Ack) for _, value in sent) == 1
        getting = asyncio.create_task((await link.queue(channel)).get(timeout=0.05))
        await link.session.expect(commands.Basic.Get)
        try:
            await getting
            raise AssertionError
        except TimeoutError:
            pass
        link.session.send(1, commands.Basic.GetEmpty())
    assert link.connection.is_closed

uvloop.run(main())
print("good")
"""


@pytest.mark.parametrize("query", ["", "heartbeat=1", "operation_timeout=inf", "interleave=1&happy_eyeballs_delay=0.1"])
def test_a_round_trip_under_uvloop(query: str) -> None:
    pytest.importorskip("uvloop")
    run = run_strictly(UNDER_UVLOOP.replace("{query}", query))
    assert run.stdout == "good\n", run.stderr


def test_a_host_name_connects_under_uvloop() -> None:
    """uvloop's create_connection() has no happy_eyeballs_delay."""
    pytest.importorskip("uvloop")
    script = UNDER_UVLOOP.replace("{query}", "").replace(
        "async def main():",
        "from tests.support.peer import ScriptedPeer\n"
        'ScriptedPeer.url = property(lambda peer: f"amqp://guest:guest@localhost:{peer.port}/")\n\n'
        "async def main():",
    )
    run = run_strictly(script)
    assert run.stdout == "good\n", run.stderr
