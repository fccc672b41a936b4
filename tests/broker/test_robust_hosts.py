"""Where a robust connection connects to, with which login, and when it stops trying."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import pytest
from yarl import URL

from leveret import ConnectionState, Credentials, RetryPolicy, RobustConnection, connect_robust
from leveret.exceptions import (
    AMQPConnectionError,
    ConnectionClosed,
    ConnectionNotAllowed,
    ConnectTimeout,
    LoginRefused,
)
from tests.broker.test_helpers import eventually, everything_said, fill
from tests.broker.test_robust import QUICK, Inbox, close_all, kept_queue, restored
from tests.support.ports import free_port
from tests.support.proxy import FaultProxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.node import Node


@pytest.fixture
async def second(link: FaultProxy) -> AsyncIterator[FaultProxy]:
    """Another way to the same broker."""
    async with FaultProxy(*link.target) as second:
        yield second


async def set_password(node: Node, user: str, password: str) -> None:
    await asyncio.to_thread(node.add_user, user, password)


# ------------------------------------------------------------------------------------------------------- hosts


@pytest.mark.parametrize("form", ["list", "commas"])
@pytest.mark.parametrize("fault", ["refused", "silent"])
async def test_one_of_two_hosts_is_enough(amqp_url: str, link: FaultProxy, form: str, fault: str) -> None:
    if fault == "refused":
        await link.refuse()
    link.silent = True
    good = URL(amqp_url)
    if form == "list":
        urls: str | list[str] = [f"{link.url}?connect_timeout=0.5", f"{amqp_url}?connect_timeout=0.5"]
    else:
        urls = f"amqp://guest:guest@127.0.0.1:{link.port},127.0.0.1:{good.port}/?connect_timeout=0.5"
    for _ in range(4):  # in either order
        async with asyncio.timeout(3):
            async with await connect_robust(urls) as robust:
                assert robust.url.port == good.port
                assert robust.state is ConnectionState.READY


async def test_no_host_answers(link: FaultProxy) -> None:
    ports = [free_port(), free_port()]
    with pytest.raises(AMQPConnectionError) as caught:
        await connect_robust([f"amqp://127.0.0.1:{port}/" for port in ports])
    assert all(str(port) in str(caught.value) for port in ports)


@pytest.mark.parametrize("how", ["rst", "down"])
async def test_the_next_host_is_tried_at_once(link: FaultProxy, second: FaultProxy, name: str, how: str) -> None:
    loop = asyncio.get_running_loop()
    async with await connect_robust([link.url, second.url]) as robust:
        mine = await robust.channel()
        queue = await kept_queue(mine, name)
        inbox = Inbox()
        await queue.consume(inbox)
        for attempt in range(2, 6):
            here, there = (link, second) if robust.url.port == link.port else (second, link)
            if how == "down":
                await here.refuse()
            began = loop.time()
            here.rst()
            await restored(robust, attempt)
            assert robust.url.port == there.port
            # A link that is lost again at once makes for a pause.
            assert loop.time() - began < (1 if attempt == 2 else 2.5)
            await here.accept()
        await fill(mine, queue, [b"1"])
        await inbox.has(b"1")


async def test_a_silent_host_in_the_middle(link: FaultProxy, second: FaultProxy) -> None:
    urls = [f"{proxy.url}?connect_timeout=0.5&heartbeat=1" for proxy in (link, second)]
    async with await connect_robust(urls, retry=QUICK) as robust:
        link.silent = second.silent = True
        link.rst()
        second.rst()
        await eventually(lambda: link.accepted + second.accepted >= 4)  # each in its turn
        assert abs(link.accepted - second.accepted) <= 1
        assert robust.health().status == "down"
        second.silent = False
        await restored(robust, 2)
        assert robust.url.port == second.port


async def test_a_resolver_is_asked_before_each_round(amqp_url: str, link: FaultProxy, second: FaultProxy) -> None:
    answers: list[list[str]] = [[link.url], [second.url]]
    asked = 0

    async def resolve() -> list[str]:
        nonlocal asked
        asked += 1
        return answers[min(asked, len(answers)) - 1]

    async with await connect_robust("amqp://nowhere.invalid/", resolver=resolve) as robust:
        assert asked == 1
        assert robust.url.port == link.port
        link.rst()
        await restored(robust, 2)
        assert robust.url.port == second.port
        assert asked == 2


async def test_a_resolver_may_change_and_return_one_list(link: FaultProxy, second: FaultProxy) -> None:
    urls = [link.url]

    async def resolve() -> list[str]:
        return urls

    async with await connect_robust(link.url, resolver=resolve, retry=QUICK) as robust:
        urls[:] = [second.url]
        await link.refuse()
        link.rst()
        await restored(robust, 2, 2)


async def test_a_resolver_that_fails_for_a_while(link: FaultProxy) -> None:
    asked = 0

    async def resolve() -> list[str]:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise OSError("no DNS")
        return [link.url]

    async with await connect_robust(link.url, resolver=resolve, retry=QUICK) as robust:
        link.rst()
        await restored(robust, 2)
        assert asked == 3


@pytest.mark.parametrize("order", ["drain", "stop_app"])
async def test_a_node_that_leaves_is_left_at_once(shaky: Node, amqp_url: str, name: str, order: str) -> None:
    """320: maintenance, or an orderly stop; the other host is another broker."""
    loop = asyncio.get_running_loop()

    async def resolve() -> list[str]:
        return [shaky.url] if first else [shaky.url, amqp_url]

    first = True
    async with await connect_robust(shaky.url, resolver=resolve) as robust:
        mine = await robust.channel()
        queue = await kept_queue(mine, name)
        inbox = Inbox()
        await queue.consume(inbox)
        lost: list[tuple[float, BaseException | None]] = []
        back: list[float] = []
        robust.close_callbacks.add(lambda _, error: lost.append((loop.time(), error)))
        robust.reconnect_callbacks.add(lambda _: back.append(loop.time()))
        first = False
        try:
            if order == "drain":
                await asyncio.to_thread(shaky.drain)
            else:
                await asyncio.to_thread(shaky.stop_app)
            await restored(robust, 2)
            [(at, error)] = lost
            assert isinstance(error, ConnectionClosed)
            assert error.reply_code == 320
            assert back[0] - at < 1
            assert str(robust.url.port) in amqp_url
            await fill(mine, queue, [b"1"])
            await inbox.has(b"1")
        finally:
            if order == "drain":
                await asyncio.to_thread(shaky.revive)
            else:
                await asyncio.to_thread(shaky.start_app)


# ------------------------------------------------------------------------------------------------------- login


async def test_the_provider_is_asked_each_time(shaky: Node, name: str) -> None:
    user = name.replace(".", "-")
    await set_password(shaky, user, "first")
    password, asked = "first", 0

    async def credentials() -> Credentials:
        nonlocal asked
        asked += 1
        return Credentials(user, password)

    async with await connect_robust(shaky.url, credentials=credentials, retry=QUICK) as robust:
        assert asked == 1
        await set_password(shaky, user, "second")
        password = "second"
        await close_all(shaky)
        await restored(robust, 2)
        assert asked == 2
        assert "second" not in f"{robust}{robust!r}{robust.health()}"


@pytest.mark.expects_errors
async def test_a_password_that_changes_while_the_link_is_down(
    shaky: Node, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A refused login is told, and retried slowly, not given up."""
    user = name.replace(".", "-")
    await set_password(shaky, user, "first")
    passwords = ["first", "first", "first", "second"]
    asked = 0

    async def credentials() -> Credentials:
        nonlocal asked
        asked += 1
        return Credentials(user, passwords[min(asked, len(passwords)) - 1])

    slowly = RetryPolicy(initial=0.01, maximum=0.3, jitter=False)
    with caplog.at_level(logging.ERROR, "leveret"):
        async with await connect_robust(shaky.url, credentials=credentials, retry=slowly) as robust:
            await set_password(shaky, user, "second")
            await close_all(shaky)
            await eventually(lambda: asked == 2)
            await eventually(lambda: "ACCESS_REFUSED" in str(robust.health().reasons))
            assert robust.health().status == "down"
            await restored(robust, 2)
            assert asked == 4
    assert sum("not connected, next attempt" in record.getMessage() for record in caplog.records) == 2
    assert "first" not in caplog.text
    assert "second" not in caplog.text


async def test_a_login_that_expires_is_renewed(shaky: Node) -> None:
    """update-secret at 80 % of its life; a provider that fails is asked again, and shows in health()."""
    asked: list[float] = []
    loop = asyncio.get_running_loop()

    async def credentials() -> Credentials:
        asked.append(loop.time())
        if len(asked) == 3:
            raise OSError("the identity provider is down")
        return Credentials("guest", "guest", expires_in=0.5)

    async with await connect_robust(shaky.url, credentials=credentials) as robust:
        await eventually(lambda: len(asked) >= 3)
        assert asked[1] - asked[0] == pytest.approx(0.4, abs=0.15)
        await eventually(lambda: robust.health().status == "degraded")
        assert "identity provider" in robust.health().reasons[0]
        await eventually(lambda: len(asked) >= 4)
        await eventually(lambda: robust.health().status == "ready")
        assert robust.connection_attempt == 1
        await close_all(shaky)
        await restored(robust, 2)
        count = len(asked)
        await eventually(lambda: len(asked) > count)
        assert robust.connection_attempt == 2


# ------------------------------------------------------------------------------------------- the first connect


async def test_the_first_failure_is_raised(shaky: Node) -> None:
    wrong = shaky.url.replace("guest:guest", "guest:hush")
    for fail_fast in ("1", "0"):  # final either way
        with pytest.raises(LoginRefused) as caught:
            await asyncio.wait_for(connect_robust(f"{wrong}?fail_fast={fail_fast}"), 10)
        assert "hush" not in everything_said(caught.value)
        with pytest.raises(ConnectionNotAllowed, match="nowhere"):
            await asyncio.wait_for(connect_robust(f"{shaky.url}nowhere?fail_fast={fail_fast}"), 10)
    with pytest.raises(ValueError, match="fail_fast"):
        await connect_robust(f"{shaky.url}?fail_fast=perhaps")


async def test_fail_fast(link: FaultProxy) -> None:
    await link.refuse()
    with pytest.raises(AMQPConnectionError):
        await connect_robust(link.url)
    with pytest.raises(AMQPConnectionError):
        await connect_robust(link.url, fail_fast=True)
    few = RetryPolicy(initial=0.01, maximum=0.01, max_attempts=3)
    with pytest.raises(AMQPConnectionError):
        await connect_robust(link.url, first_retry=few)
    with pytest.raises(AMQPConnectionError):
        await connect_robust(link.url, fail_fast=False, retry=few)
    connecting = asyncio.create_task(connect_robust(link.url, fail_fast=False, reconnect_interval=0.05))
    await asyncio.sleep(0.12)  # some attempts
    assert not connecting.done()
    await link.accept()
    robust = await asyncio.wait_for(connecting, 5)
    assert robust.state is ConnectionState.READY
    assert robust.connection_attempt == 1
    await robust.close()


async def test_the_first_connect_is_cancelled(link: FaultProxy) -> None:
    link.silent = True
    connecting = asyncio.create_task(connect_robust(link.url, fail_fast=False))
    await eventually(lambda: link.accepted == 1)
    connecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connecting
    await eventually(lambda: link.connections == 0)
    with pytest.raises(ConnectTimeout):
        await connect_robust(link.url, timeout=0.2)


async def test_a_connection_class(link: FaultProxy) -> None:
    class Mine(RobustConnection):
        pass

    async with await connect_robust(link.url, connection_class=Mine, reconnect_interval=0.01) as robust:
        assert type(robust) is Mine
        assert robust.reconnect_interval == 0.01
