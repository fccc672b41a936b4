"""A robust connection's life: its states in order, retrying and giving up, and close() in every one of them."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import pytest
from pamqp import commands

from leveret import ConnectionState, Credentials, Message, RetryPolicy, RobustConnection, connect_robust
from leveret.exceptions import (
    AMQPConnectionError,
    AuthenticationError,
    ChannelInvalidStateError,
    ConnectionClosed,
    ConnectionNotAllowed,
    PublishNotSent,
)
from tests.protocol.kit import deaf, sockets, turns, until, within
from tests.protocol.robust_kit import (
    QUICK,
    Held,
    Server,
    again,
    back,
    channel_of,
    closed_by_broker,
    fence,
    kill,
    lost,
    quick,
    robust,
    silent,
)
from tests.support.peer import Session

S = ConnectionState
Change = tuple[ConnectionState, ConnectionState, Exception | None]

_request: ContextVar[str] = ContextVar("request", default="none")

TWICE = RetryPolicy(initial=0.001, maximum=0.001, max_attempts=2)


def record(connection: RobustConnection) -> list[Change]:
    """The state events that are yet to come."""
    changes: list[Change] = []
    connection.state_callbacks.add(lambda _, old, new, cause: changes.append((old, new, cause)))
    return changes


def steps(changes: list[Change]) -> list[tuple[ConnectionState, ConnectionState]]:
    return [(old, new) for old, new, _ in changes]


async def refuse_login(session: Session) -> None:
    await session.expect_header()
    properties: dict[str, Any] = {"capabilities": {"authentication_failure_close": True}}
    session.send(0, commands.Connection.Start(0, 9, properties, "PLAIN", "en_US"))
    await session.expect(commands.Connection.StartOk)
    session.send(0, commands.Connection.Close(403, "ACCESS_REFUSED - login refused", 0, 0))
    await session.expect(commands.Connection.CloseOk)
    session.eof()
    await session.closed()


async def refuse_vhost(session: Session) -> None:
    await session.expect_header()
    session.send(0, commands.Connection.Start(0, 9, {}, "PLAIN", "en_US"))
    await session.expect(commands.Connection.StartOk)
    session.send(0, commands.Connection.Tune(2047, 131072, 0))
    await session.expect(commands.Connection.TuneOk)
    await session.expect(commands.Connection.Open)
    session.send(0, commands.Connection.Close(530, "NOT_ALLOWED - vhost / not found", 10, 40))
    await session.expect(commands.Connection.CloseOk)
    session.eof()
    await session.closed()


async def force_off(session: Session) -> None:
    """connection.close 320 in the middle of the handshake."""
    await session.expect_header()
    session.send(0, commands.Connection.Start(0, 9, {}, "PLAIN", "en_US"))
    await session.expect(commands.Connection.StartOk)
    session.send(0, commands.Connection.Close(320, "CONNECTION_FORCED - broker is shutting down", 0, 0))
    await session.expect(commands.Connection.CloseOk)
    session.eof()
    await session.closed()


async def say_nothing(session: Session) -> None:
    await session.expect_header()
    await session.closed()


# ---------------------------------------------------------------------------------------------------------- events


async def test_the_states_of_a_life_come_in_order_with_their_causes() -> None:
    with quick():
        async with Server() as server:
            connection = RobustConnection(server.url, retry=QUICK)
            changes = record(connection)
            await within(connection.connect())
            assert steps(changes) == [(S.NEW, S.CONNECTING), (S.CONNECTING, S.RECOVERING), (S.RECOVERING, S.READY)]
            assert connection.connection_attempt == 1
            del changes[:]
            await again(connection, server)
            assert steps(changes) == [
                (S.READY, S.RECONNECTING),
                (S.RECONNECTING, S.RECOVERING),
                (S.RECOVERING, S.READY),
            ]
            assert isinstance(changes[0][2], ConnectionClosed)
            assert [cause for _, _, cause in changes[1:]] == [None, None]
            assert connection.connection_attempt == 2
            del changes[:]
            await within(connection.close())
            assert steps(changes) == [(S.READY, S.CLOSING), (S.CLOSING, S.CLOSED)]


async def test_callbacks_are_told_of_loss_and_return_in_order() -> None:
    told: list[str] = []
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        channel.close_callbacks.add(lambda *_: told.append("channel lost"))
        connection.close_callbacks.add(lambda *_: told.append("connection lost"))
        channel.reopen_callbacks.add(lambda *_: told.append("channel back"))
        connection.reconnect_callbacks.add(lambda *_: told.append("connection back"))
        await again(connection, server)
        assert told == ["channel lost", "connection lost", "channel back", "connection back"]


async def test_while_reconnecting_health_is_down_and_says_why() -> None:
    async with robust() as (connection, server):
        assert connection.health().status == "ready"
        await lost(connection, server)
        assert connection.reconnecting
        health = connection.health()
        assert health.status == "down"
        assert "reconnecting" in health.reasons[0]
        assert "lost" in health.reasons[0] or "127.0.0.1" in health.reasons[0]
        await back(connection, server)
        assert connection.health().status == "ready"
        assert not connection.reconnecting


async def test_a_state_callback_that_raises_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async with robust() as (connection, server):

        def fail(*_: object) -> None:
            raise ZeroDivisionError

        connection.state_callbacks.add(fail)
        logging.getLogger("leveret").setLevel(logging.CRITICAL)
        try:
            await again(connection, server)
        finally:
            logging.getLogger("leveret").setLevel(logging.NOTSET)
        connection.state_callbacks.remove(fail)


# ----------------------------------------------------------------------------------------------- the first connect


async def test_fail_fast_raises_the_first_error_and_connect_may_be_called_again() -> None:
    with quick():
        async with Server() as server:
            server.is_down = True
            connection = RobustConnection(server.url)
            changes = record(connection)
            for _ in range(2):
                with pytest.raises(AMQPConnectionError):
                    await within(connection.connect())
                assert connection.state is S.NEW
                assert not connection.is_closed
            assert len(server.links) == 2
            assert steps(changes[:2]) == [(S.NEW, S.CONNECTING), (S.CONNECTING, S.NEW)]
            assert isinstance(changes[1][2], AMQPConnectionError)
            server.is_down = False
            await within(connection.connect())
            assert connection.state is S.READY
            with pytest.raises(RuntimeError):
                await connection.connect()
            await connection.close()


async def test_without_fail_fast_it_goes_on_until_somebody_answers() -> None:
    with quick():
        async with Server() as server:
            server.is_down = True
            task = asyncio.create_task(connect_robust(f"{server.url}?fail_fast=0", retry=QUICK))
            await until(lambda: len(server.links) >= 3)
            server.is_down = False
            connection = await within(task)
            assert connection.state is S.READY
            await connection.close()


async def test_first_retry_gives_up_after_its_attempts() -> None:
    with quick():
        async with Server() as server:
            server.is_down = True
            with pytest.raises(AMQPConnectionError):
                await within(connect_robust(server.url, first_retry=RetryPolicy(initial=0.001, max_attempts=3)))
            assert len(server.links) == 3


async def test_first_retry_gives_up_when_its_time_is_over() -> None:
    with quick():
        async with Server() as server:
            server.is_down = True
            policy = RetryPolicy.every(0.1)
            with pytest.raises(AMQPConnectionError):
                await within(connect_robust(server.url, first_retry=dataclasses.replace(policy, max_time=0.35)))
            assert 2 <= len(server.links) <= 4


@pytest.mark.parametrize(
    ("greeting", "error"), [(refuse_login, AuthenticationError), (refuse_vhost, ConnectionNotAllowed)]
)
async def test_a_refusal_is_final_on_the_first_connect(greeting: Any, error: type[Exception]) -> None:
    with quick():
        async with Server() as server:
            server.greetings[0] = greeting
            with pytest.raises(error):
                await within(connect_robust(f"{server.url}?fail_fast=0", retry=QUICK))
            assert len(server.links) == 1


async def test_cancelling_connect_leaves_nothing() -> None:
    before = sockets()
    async with Server() as server:
        server.greetings[0] = say_nothing
        task = asyncio.create_task(connect_robust(server.url))
        await until(lambda: server.links)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await within(task)
    await until(lambda: not sockets() - before)


@pytest.mark.expects_errors
async def test_connect_ends_when_the_first_link_is_lost_at_once_and_retrying_is_given_up() -> None:
    with quick():
        async with Server() as server:
            connection = RobustConnection(server.url, retry=TWICE)

            def lose(_: object, old: object, new: ConnectionState, cause: object) -> None:
                if new is S.RECOVERING:
                    server.is_down = True
                    assert connection._transport is not None
                    connection._transport.abort(ConnectionClosed("lost"))

            connection.state_callbacks.add(lose)
            with pytest.raises(AMQPConnectionError):
                await within(connection.connect())
            assert connection.state is S.CLOSED
            assert len(server.links) == 3


# ------------------------------------------------------------------------------------------------------ reconnecting


@pytest.mark.expects_errors
@pytest.mark.parametrize("greeting", [refuse_login, refuse_vhost])
async def test_a_refusal_while_reconnecting_is_retried(greeting: Any) -> None:
    async with robust() as (connection, server):
        server.greetings |= {1: greeting, 2: greeting}
        await again(connection, server)
        assert server.link.number == 3


@pytest.mark.expects_errors
async def test_a_refusal_while_reconnecting_is_retried_slowly_and_shows() -> None:
    slow = RetryPolicy(initial=0.001, maximum=0.2, max_attempts=None)
    async with robust(retry=slow) as (connection, server):
        server.greetings[1] = refuse_login
        loop = asyncio.get_running_loop()
        server.drop()
        await until(lambda: "refused" in str(connection.health().reasons))
        refused_at = loop.time()
        await within(connection.ready())
        assert loop.time() - refused_at > 0.15


async def test_a_forced_close_during_the_handshake_is_retried() -> None:
    async with robust() as (connection, server):
        server.greetings |= dict.fromkeys(range(1, 6), force_off)
        await again(connection, server)
        assert server.link.number == 6


async def test_a_forced_close_during_replay_starts_over() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        queue = await channel.declare_queue("q")
        await queue.consume(print)
        for link in range(1, 6):
            server.at(commands.Queue.Declare, lambda link, *_: link.kill(320), link=link)
        await again(connection, server)
        assert server.link.number == 6
        assert len(server.link.all(commands.Basic.Consume)) == 1


@pytest.mark.expects_errors
async def test_giving_up_closes_for_good_and_tells_everybody() -> None:
    async with robust(retry=TWICE) as (connection, server):
        channel = await channel_of(connection)
        queue = await channel.declare_queue("q")
        iterator = queue.iterator()
        await iterator.consume()
        waiting = asyncio.ensure_future(anext(iterator))
        changes = record(connection)
        closed = connection.closed()
        channel_closed = channel.closed()
        calls: list[asyncio.Future[Any]] = []

        def when_lost(_: object, error: BaseException | None) -> None:
            if not calls:
                calls.append(asyncio.ensure_future(channel.default_exchange.publish(Message(b""), "q")))
                calls.append(asyncio.ensure_future(channel.declare_queue("r")))
                calls.append(asyncio.ensure_future(connection.ready()))
                calls.append(asyncio.ensure_future(connection.channel().initialize()))

        connection.close_callbacks.add(when_lost)
        server.is_down = True
        server.drop()
        await within(closed)
        await within(channel_closed)
        assert connection.state is S.CLOSED
        assert steps(changes) == [(S.READY, S.RECONNECTING), (S.RECONNECTING, S.CLOSED)]
        assert isinstance(changes[-1][2], AMQPConnectionError)
        assert len(server.links) == 3
        with pytest.raises(AMQPConnectionError):
            await within(waiting)
        published, declared, ready, opened = await within(asyncio.gather(*calls, return_exceptions=True))
        assert isinstance(published, PublishNotSent)
        assert isinstance(declared, ChannelInvalidStateError)
        assert isinstance(ready, ConnectionClosed)
        assert isinstance(opened, ChannelInvalidStateError)
        for call in (channel.declare_queue("r"), channel.set_qos(1), connection.channel().initialize()):
            with pytest.raises(ChannelInvalidStateError):
                await within(call)
        with pytest.raises(ChannelInvalidStateError):
            await channel.default_exchange.publish(Message(b""), "q")
        with pytest.raises(ConnectionClosed):
            await within(connection.ready())


# ------------------------------------------------------------------------------------------------------------ close


async def new(server: Server) -> RobustConnection:
    return RobustConnection(server.url, retry=QUICK)


async def connecting(server: Server) -> RobustConnection:
    server.greetings[0] = say_nothing
    connection = RobustConnection(server.url, retry=QUICK)
    _keep(asyncio.create_task(connection.connect()))
    await until(lambda: server.links)
    return connection


async def backing_off(server: Server) -> RobustConnection:
    connection = await connect_robust(server.url, retry=RetryPolicy.every(3600))
    await lost(connection, server)
    await until(lambda: len(server.links) == 2)
    await turns(20)
    return connection


async def reconnecting(server: Server) -> RobustConnection:
    connection = await connect_robust(server.url, retry=QUICK)
    server.greetings[1] = say_nothing
    server.drop()
    await until(lambda: len(server.links) == 2)
    return connection


async def recovering_later(server: Server) -> RobustConnection:
    connection = await connect_robust(server.url, retry=QUICK)
    queue = await (await channel_of(connection)).declare_queue("q")
    await queue.consume(print)
    server.drop()
    await until(lambda: not connection.connected.is_set())
    return connection


async def recovering(server: Server) -> RobustConnection:
    connection = await connect_robust(server.url, retry=QUICK)
    queue = await (await channel_of(connection)).declare_queue("q")
    await queue.consume(print)
    held = Held()
    server.at(commands.Queue.Declare, held)
    server.drop()
    await held.reached()
    return connection


async def opening_channels(server: Server) -> RobustConnection:
    connection = await connect_robust(server.url, retry=QUICK)
    await channel_of(connection)
    held = Held()
    server.at(commands.Channel.Open, held)
    server.drop()
    await held.reached()
    return connection


async def ready(server: Server) -> RobustConnection:
    connection = await connect_robust(server.url, retry=QUICK)
    await channel_of(connection)
    return connection


_tasks: set[asyncio.Task[None]] = set()


def _keep(task: asyncio.Task[None]) -> None:
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)
    task.add_done_callback(lambda task: task.cancelled() or task.exception())


STATES: list[Callable[[Server], Any]] = [
    new,
    connecting,
    backing_off,
    reconnecting,
    recovering,
    opening_channels,
    ready,
]


@pytest.mark.parametrize("how", ["once", "twice", "concurrently"])
@pytest.mark.parametrize("state", STATES)
async def test_close_in_every_state_returns_at_once_and_leaves_nothing(
    state: Callable[[Server], Any], how: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = sockets()
    with quick():
        async with Server() as server:
            connection = await within(state(server))
            changes = record(connection)
            seen = len(server.links)
            caplog.clear()
            if how == "concurrently":
                await within(asyncio.gather(*(connection.close() for _ in range(3))), 0.5)
            else:
                await within(connection.close(), 0.5)
            if how == "twice":
                await within(connection.close(), 0.5)
            assert connection.is_closed
            assert connection.state is S.CLOSED
            assert steps(changes)[-2:] == [(steps(changes)[-2][0], S.CLOSING), (S.CLOSING, S.CLOSED)]
            assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
            await turns(20)
            assert len(server.links) == seen  # no later attempt
            with pytest.raises(RuntimeError):
                await connection.connect()
            assert connection.health().status == "down"
    await until(lambda: not sockets() - before)


async def test_close_is_no_loss_to_those_who_are_told() -> None:
    """RabbitMQ sends its close-ok and hangs up."""
    told: list[BaseException | None] = []
    async with robust() as (connection, _):
        channel = await channel_of(connection)
        connection.close_callbacks.add(lambda _, error: told.append(error))
        channel.close_callbacks.add(lambda _, error: told.append(error))
        await within(connection.close())
        assert [isinstance(error, ConnectionClosed) and error.is_normal for error in told] == [True, True]


async def test_close_while_recovering_ends_iterators_calls_and_publishes() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        queue = await channel.declare_queue("q")
        iterator = queue.iterator()
        await iterator.consume()
        held = Held()
        server.at(commands.Basic.Consume, held, link=1)
        server.drop()
        await held.reached()
        waiting = asyncio.ensure_future(anext(iterator))
        call = asyncio.ensure_future(channel.declare_queue("r"))
        publish = asyncio.ensure_future(channel.default_exchange.publish(Message(b""), "q"))
        await turns()
        await within(connection.close(), 0.5)
        with pytest.raises(PublishNotSent):
            await within(publish)
        with pytest.raises(ChannelInvalidStateError):
            await within(call)
        with pytest.raises(StopAsyncIteration):
            await within(waiting)


async def test_connect_is_told_of_a_close_meanwhile() -> None:
    async with Server() as server:
        server.greetings[0] = say_nothing
        connection = RobustConnection(server.url)
        task = asyncio.create_task(connection.connect())
        await until(lambda: server.links)
        await within(connection.close(), 0.5)
        with pytest.raises(ConnectionClosed):
            await within(task)


@pytest.mark.parametrize("state", [S.RECONNECTING, S.RECOVERING, S.READY])
async def test_close_from_a_state_callback(state: ConnectionState) -> None:
    async with robust() as (connection, server):
        await channel_of(connection)

        async def close(connection: RobustConnection, old: object, new: ConnectionState, cause: object) -> None:
            if new is state:
                await connection.close()

        connection.state_callbacks.add(close)
        server.drop()
        await within(connection.closed())
        await until(lambda: connection.state is S.CLOSED)


async def test_close_from_a_consumer_callback() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        queue = await channel.declare_queue("q")
        done = asyncio.Event()

        async def close(_: object) -> None:
            await connection.close()
            done.set()

        await queue.consume(close)
        await again(connection, server)
        server.link.deliver("q", 1, b"")
        await within(done.wait())
        assert connection.state is S.CLOSED


@pytest.mark.parametrize("first", [True, False])
async def test_close_from_the_credentials_provider_closes_for_good(first: bool) -> None:
    connections: list[RobustConnection] = []
    is_armed = first

    async def provider() -> Credentials:
        if is_armed:
            await connections[0].close()
        return Credentials("guest", "guest")

    with quick():
        async with Server() as server:
            connection = RobustConnection(server.url, retry=QUICK, credentials=provider)
            connections.append(connection)
            try:
                if first:
                    with pytest.raises(ConnectionClosed):
                        await within(connection.connect())
                else:
                    await within(connection.connect())
                    is_armed = True
                    server.drop()
                    await within(connection.closed())
                await turns(50)
                await asyncio.sleep(0.05)  # nothing announces what is not to happen
                assert connection.state is S.CLOSED
                assert len(server.links) == (0 if first else 1)
            finally:
                for task in asyncio.all_tasks():
                    if task.get_name() == "leveret recovery":
                        task.cancel()
                if connection._transport is not None:
                    connection._transport.abort(ConnectionClosed("over"))
                await turns(20)


async def test_nobody_reconnects_after_close_with_a_link_that_just_came() -> None:
    """The link is made in the turn in which close() is called."""
    with quick():
        async with Server() as server:
            connection = await connect_robust(server.url, retry=QUICK)
            server.drop()
            await server.up(1)
            await within(connection.close(), 0.5)
            assert connection.state is S.CLOSED
            await turns(20)
            assert len(server.links) == 2


@pytest.mark.parametrize("delay", range(12))
async def test_close_so_many_turns_after_the_loss(delay: int) -> None:
    before = sockets()
    with quick():
        async with Server() as server:
            server.may_leave = True
            connection = await recovering_later(server)
            await turns(delay * 4)
            await within(connection.close(), 0.5)
            assert connection.state is S.CLOSED
            seen = len(server.links)
            await turns(20)
            assert len(server.links) <= seen + 1  # what was on its way when close() was called
    await until(lambda: not sockets() - before)


async def test_close_without_time_leaves_no_socket() -> None:
    before = sockets()
    with quick():
        async with Server() as server:
            connection = await reconnecting(server)
            await within(connection.close(timeout=0), 0.5)
    await until(lambda: not sockets() - before)


async def test_reconnect_makes_a_new_link_with_all_that_was_there() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        queue = await channel.declare_queue("q")
        await queue.consume(print)
        await within(connection.reconnect())
        assert connection.state is S.READY
        assert len(server.links) == 2
        await fence(connection)
        assert len(server.link.all(commands.Basic.Consume)) == 1
        await within(connection.close())
        with pytest.raises(ConnectionClosed):
            await within(connection.reconnect())


async def test_reconnect_while_down_waits_for_the_link() -> None:
    async with robust() as (connection, server):
        await lost(connection, server)
        task = asyncio.create_task(connection.reconnect())
        await turns()
        assert not task.done()
        await back(connection, server)
        await within(task)


@pytest.mark.parametrize("call", ["publish", "declare", "channel", "reconnect"])
async def test_calls_during_the_goodbye_of_reconnect_wait_for_the_next_link(call: str) -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        server.at(commands.Connection.Close, silent)
        task = asyncio.create_task(connection.reconnect())
        await server.seen(commands.Connection.Close)
        calls: dict[str, Callable[[], Any]] = {
            "publish": lambda: channel.default_exchange.publish(Message(b""), "key"),
            "declare": lambda: channel.declare_queue("q"),
            "channel": lambda: connection.channel().initialize(),
            "reconnect": lambda: connection.reconnect(),
        }
        other = asyncio.ensure_future(calls[call]())
        await turns()
        early = other.done()
        server.drop()
        results = await within(asyncio.gather(task, other, return_exceptions=True))
        assert not early
        assert [r for r in results if isinstance(r, Exception)] == []


async def test_a_blocked_link_is_forgotten_with_its_loss() -> None:
    told: list[str | None] = []
    async with robust() as (connection, server):
        connection.blocked_callbacks.add(lambda _, reason: told.append(reason))
        server.link.send(0, commands.Connection.Blocked("low on memory"))
        await until(lambda: connection.blocked)
        await again(connection, server)
        assert connection.blocked is None
        assert connection.health().status == "ready"


async def test_blocked_callbacks_are_told_that_a_lost_link_blocks_no_more() -> None:
    told: list[str | None] = []
    async with robust() as (connection, server):
        connection.blocked_callbacks.add(lambda _, reason: told.append(reason))
        server.link.send(0, commands.Connection.Blocked("low on memory"))
        await until(lambda: connection.blocked)
        await again(connection, server)
        assert told == ["low on memory", None]


async def test_an_expired_login_is_renewed_on_the_link() -> None:
    asked: list[int] = []

    async def provider() -> Credentials:
        asked.append(1)
        return Credentials("guest", f"token-{len(asked)}", expires_in=0.05 if len(asked) == 1 else None)

    async with robust(credentials=provider) as (connection, server):
        (secret,) = await server.seen(commands.Connection.UpdateSecret)
        assert secret.new_secret == "token-2"
        await again(connection, server)
        assert server.link.session.start_ok.response == "\0guest\0token-3"


@pytest.mark.parametrize("slow", ["provider", "broker"])
async def test_renewing_a_login_keeps_nobody_waiting(slow: str) -> None:
    asked: list[int] = []

    async def provider() -> Credentials:
        asked.append(1)
        if len(asked) == 2 and slow == "provider":
            await asyncio.Event().wait()
        return Credentials("guest", "guest", expires_in=0.02 if len(asked) == 1 else None)

    async with robust(credentials=provider) as (connection, server):
        channel = await channel_of(connection)
        server.at(commands.Connection.UpdateSecret, silent)
        await until(lambda: len(asked) == 2)
        await turns()
        await closed_by_broker(channel, server)
        await within(channel.ready(), 0.5)


async def test_keywords_count_for_the_hosts_of_a_resolver() -> None:
    with quick():
        async with Server() as server:

            async def resolve() -> list[str]:
                return [server.url]

            connection = await connect_robust("amqp://localhost/", operation_timeout=7, name="me", resolver=resolve)
            try:
                assert connection.operation_timeout == 7
            finally:
                await connection.close()


async def test_a_renewal_that_ended_with_its_link_is_forgotten_with_the_next_login() -> None:
    asked: list[int] = []

    async def provider() -> Credentials:
        asked.append(1)
        return Credentials("guest", "guest", expires_in=0.02 if len(asked) == 1 else None)

    async with robust(credentials=provider) as (connection, server):
        server.at(commands.Connection.UpdateSecret, lambda link, *_: link.drop())
        await server.up(1)
        await until(lambda: connection.health().status == "ready")


async def test_the_next_host_is_tried_when_one_is_down() -> None:
    with quick():
        async with Server() as one, Server() as two:
            connection = await within(connect_robust([one.url, two.url], retry=QUICK))
            first, second = (one, two) if one.links else (two, one)
            await again_on(connection, first)
            assert second.links or len(first.links) > 1
            await connection.close()


async def again_on(connection: RobustConnection, server: Server) -> None:
    await lost(connection, server)
    await within(connection.ready())


async def test_a_refused_connection_over_a_method_of_the_user_is_recovered() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        server.at(commands.Queue.Declare, kill(540, "NOT_IMPLEMENTED"))
        with pytest.raises(ConnectionClosed):
            await within(channel.declare_queue("q"))
        await within(connection.ready())
        await within(channel.declare_queue("q"))


def recoveries() -> list[asyncio.Task[Any]]:
    return [task for task in asyncio.all_tasks() if task.get_name() == "leveret recovery"]


async def test_there_is_a_task_only_while_there_is_something_to_recover() -> None:
    async with robust() as (connection, server):
        await channel_of(connection)
        await turns(5)
        assert not recoveries()
        for _ in range(3):
            await lost(connection, server)
            assert len(recoveries()) == 1
            await back(connection, server)
            await turns(5)
            assert not recoveries()
        await connection.close()
        assert not recoveries()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with 3.12")
async def test_it_comes_back_under_an_eager_task_factory_after_recovery_had_nothing_to_do() -> None:
    asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        queue = await channel.declare_queue("q")
        await queue.consume(lambda message: None)
        for _ in range(2):
            connection.recovery.hurry()
            await turns(5)
            assert not recoveries()
            await lost(connection, server)
            await back(connection, server)
            await turns(5)
            assert not recoveries()


def cancel_recoveries(of: str = "") -> None:
    for task in asyncio.all_tasks():
        if task.get_name().startswith(f"leveret recovery{of}"):
            task.cancel()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with 3.12")
async def test_a_host_is_found_by_name_under_an_eager_task_factory() -> None:
    """asyncio's own way to try several addresses fails there, before 3.12.8 and 3.13.1."""
    asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
    async with Server() as server:
        connection = await within(connect_robust(server.url.replace("127.0.0.1", "localhost")))
        await within(connection.close())


async def test_recovery_goes_on_after_somebody_cancelled_its_task_on_a_link_that_is_there() -> None:
    """Before its first step."""
    async with robust() as (connection, server):
        await channel_of(connection)
        connection.recovery.hurry()
        cancel_recoveries()
        await turns(5)
        await lost(connection, server)
        await back(connection, server)


async def test_whoever_cancels_recovery_without_a_link_ends_the_connection() -> None:
    """Who cancels all tasks wants no new ones; and nobody is to wait for ever."""
    async with robust() as (connection, server):
        await channel_of(connection)
        await lost(connection, server)
        cancel_recoveries()
        await within(connection.closed())
        assert connection.state is S.CLOSED


async def test_whoever_cancels_recovery_at_the_first_attempt_ends_that() -> None:
    async with deaf() as (url, has_come, _):
        connecting = asyncio.create_task(connect_robust(url))
        await within(has_come.wait())
        cancel_recoveries()
        with pytest.raises(ConnectionClosed, match="cancelled"):
            await within(connecting)


async def test_a_channel_is_restored_on_the_next_link_when_somebody_cancelled_its_recovery() -> None:
    async with robust() as (connection, server):
        channel = await channel_of(connection)
        is_cancelled = False

        def on_state(_: object, old: object, new: ConnectionState, cause: object) -> None:
            nonlocal is_cancelled
            if new is S.RECOVERING and not is_cancelled:
                is_cancelled = True
                asyncio.get_running_loop().call_soon(cancel_recoveries, " of channel")

        connection.state_callbacks.add(on_state)
        await lost(connection, server)
        server.is_down = False
        await until(lambda: is_cancelled)
        await turns(20)
        await lost(connection, server)
        await back(connection, server)
        assert channel.is_live


async def test_close_ends_a_former_link_whose_last_words_are_under_way() -> None:
    async with robust() as (connection, server):
        server.at(commands.Connection.Close, silent)
        await within(connection.reconnect())
        (former,) = connection._former
        assert former is not connection._transport
        await connection.close()
        assert former._disconnected._is_set


async def test_a_restore_in_the_turn_of_close_says_that_it_is_closed() -> None:
    async with robust() as (connection, _):
        channel = await channel_of(connection)
        queue = await channel.declare_queue("q")
        restoring = asyncio.create_task(queue.restore())
        closing = asyncio.create_task(connection.close())
        await within(closing, 2)
        with pytest.raises((ConnectionClosed, ChannelInvalidStateError)):
            await within(restoring, 2)


@pytest.mark.expects_errors
async def test_giving_up_takes_the_alarm_back() -> None:
    """A login that expires in an hour does not keep a connection that is closed."""

    async def credentials() -> Credentials:
        return Credentials("guest", "guest", expires_in=3600)

    once = dataclasses.replace(QUICK, max_attempts=1)
    async with robust(credentials=credentials, retry=once) as (connection, server):
        await turns(5)
        assert connection.recovery._alarm is not None
        alarm = connection.recovery._alarm
        server.is_down = True
        server.drop()
        await within(connection.closed())
        assert alarm.cancelled()
        assert connection.recovery._alarm is None


async def test_recovery_runs_in_the_context_of_whoever_connected() -> None:
    seen: list[str] = []
    async with robust() as (connection, server):
        await channel_of(connection)
        connection.reconnect_callbacks.add(lambda _: seen.append(_request.get()))
        _request.set("of a request handler")
        await lost(connection, server)
        await back(connection, server)
        connection.recovery.hurry()
        await connection.reconnect()
        await until(lambda: len(seen) == 2)
        assert seen == ["none", "none"]


async def test_the_socket_is_closed_when_close_returns() -> None:
    async with robust() as (connection, _):
        socket = connection.open_transport()._socket
        assert socket is not None
        handle = socket.get_extra_info("socket")
        await connection.close()
        assert handle.fileno() == -1
