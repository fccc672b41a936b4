"""Tasks for workers, on a real broker."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pamqp.commands import Basic

from leveret import Channel, Message, ReturnedMessage, RobustConnection
from leveret.patterns import CompressedJsonMaster, JsonMaster, Master, NackMessage, PickleMaster, RejectMessage
from tests.support.proxy import FaultProxy

BOUND = 10


async def within(awaitable: Any) -> Any:
    async with asyncio.timeout(BOUND):
        return await awaitable


class Log:
    """A worker's function that keeps what it was called with."""

    def __init__(self, *errors: Exception) -> None:
        self.calls: list[dict[str, Any]] = []
        self._errors = list(errors)
        self._called = asyncio.Condition()

    async def __call__(self, **kwargs: Any) -> None:
        async with self._called:
            self.calls.append(kwargs)
            self._called.notify_all()
        if self._errors:
            raise self._errors.pop(0)

    async def wait(self, count: int) -> list[dict[str, Any]]:
        async with asyncio.timeout(BOUND), self._called:
            await self._called.wait_for(lambda: len(self.calls) >= count)
        return self.calls


@pytest.fixture
def name() -> str:
    """A queue that no other test has."""
    return f"leveret.master.{uuid.uuid4().hex}"


@pytest.mark.parametrize("kind", [Master, JsonMaster, CompressedJsonMaster, PickleMaster])
async def test_a_task_is_done_by_a_worker(channel: Channel, name: str, kind: type[Master]) -> None:
    master = kind(channel)
    log = Log()
    worker = await master.create_worker(name, log, auto_delete=True)
    assert isinstance(await master.create_task(name, {"x": 1}), Basic.Ack)
    assert isinstance(await master.create_task(name), Basic.Ack)
    proxy: Any = master.proxy
    for part in name.split("."):
        proxy = getattr(proxy, part)
    await proxy(x=2)
    assert await log.wait(3) == [{"x": 1}, {}, {"x": 2}]
    await worker.close()


async def test_tasks_are_persistent_messages_with_the_arguments_of_the_caller(channel: Channel, name: str) -> None:
    queue = await channel.declare_queue(name, exclusive=True)
    await Master(channel).create_task(name, {"x": 1}, priority=3, headers={"a": "b"})
    message = await queue.get(no_ack=True)
    assert (message.body, message.content_type) == (b'{"x":1}', "application/json")
    assert (message.delivery_mode, message.priority, message.headers) == (2, 3, {"a": "b"})


async def test_a_task_for_nobody_comes_back_and_is_logged(
    channel: Channel, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert isinstance(await Master(channel).create_task(name, {}), ReturnedMessage)
    assert "there is no such queue" in caplog.text


@pytest.mark.expects_errors
@pytest.mark.parametrize(
    ("options", "error", "times"),
    [
        ({}, ValueError(), 2),
        ({"requeue": False}, ValueError(), 1),
        ({"reject_on_redelivered": True}, ValueError(), 2),
        ({}, RejectMessage(), 1),
        ({}, RejectMessage(requeue=True), 2),
        ({}, NackMessage(), 1),
        ({}, NackMessage(requeue=True), 2),
    ],
    ids=repr,
)
async def test_what_becomes_of_a_task_that_failed(
    channel: Channel, name: str, options: dict[str, bool], error: Exception, times: int
) -> None:
    master = Master(channel, **options)
    log = Log(error, *([ValueError()] if options.get("reject_on_redelivered") else []))
    worker = await master.create_worker(name, log, prefetch=1, auto_delete=False)
    await master.create_task(name, {"n": 1})
    await log.wait(times)
    await master.create_task(name, {"n": 2})  # with a prefetch of one, it comes when the first is settled for good
    assert await log.wait(times + 1) == [{"n": 1}] * times + [{"n": 2}]
    await worker.consumer_tag.stop()
    assert (await worker.queue.declare()).message_count == 0
    await worker.queue.delete(if_unused=False, if_empty=False)


@pytest.mark.expects_errors
@pytest.mark.parametrize(
    "message",
    [
        Message(b"{", content_type="application/json"),
        Message(b"[1]", content_type="application/json"),
    ],
    ids=["no JSON", "no keyword arguments"],
)
async def test_a_task_that_cannot_be_read_is_not_requeued_for_ever(
    channel: Channel, name: str, message: Message
) -> None:
    master = Master(channel)
    log = Log()
    worker = await master.create_worker(name, log, prefetch=1)
    await channel.default_exchange.publish(message, name)
    await master.create_task(name, {"n": 2})
    assert await log.wait(1) == [{"n": 2}]
    await worker.consumer_tag.stop()
    assert (await worker.queue.declare()).message_count == 0
    await worker.queue.delete(if_unused=False, if_empty=False)


@pytest.mark.expects_errors
async def test_a_task_of_another_serializer_is_kept_for_a_worker_that_can_read_it(
    robust: RobustConnection, channel: Channel, name: str
) -> None:
    """So a service that changes the import does not drop what aio-pika's Master had queued."""
    changed = await robust.channel()
    tasks = Log()
    await Master(changed).create_worker(name, tasks, prefetch=2)
    await PickleMaster(channel).create_task(name, {"n": 1})
    await Master(channel).create_task(name, {"n": 2})
    assert await tasks.wait(1) == [{"n": 2}]
    other = Log()
    await PickleMaster(channel).create_worker(name, other)
    await changed.close()
    assert await other.wait(1) == [{"n": 1}]
    await channel.queue_delete(name)


async def test_no_more_than_concurrency_are_worked_on_at_a_time(channel: Channel, name: str) -> None:
    running = most = done = 0
    all_done = asyncio.Event()

    async def work() -> None:
        nonlocal running, most, done
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        done += 1
        if done == 10:
            all_done.set()

    master = Master(channel)
    await master.create_worker(name, work, concurrency=2, auto_delete=True)
    for _ in range(10):
        await master.create_task(name)
    await within(all_done.wait())
    assert most == 2


async def test_a_worker_may_be_a_plain_function_and_closes_once(channel: Channel, name: str) -> None:
    done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    master = Master(channel)
    worker = await master.create_worker(name, lambda x: done.set_result(x))
    await master.proxy.__getattr__(name)(x=5)
    assert await within(done) == 5
    first = worker.close()
    assert worker.close() is first
    await first
    assert not worker.consumer_tag.is_active
    await worker.queue.delete()


async def test_a_worker_survives_the_link(robust: RobustConnection, link: FaultProxy, name: str) -> None:
    master = Master(await robust.channel())
    log = Log()
    worker = await master.create_worker(name, log, durable=True)
    await master.create_task(name, {"n": 1})
    await log.wait(1)
    back = asyncio.Event()
    robust.reconnect_callbacks.add(lambda *_: back.set())
    link.rst()
    await within(back.wait())
    await within(master.create_task(name, {"n": 2}))
    async with asyncio.timeout(BOUND):
        while {"n": 2} not in await log.wait(1):  # the first may come twice: its ack may be lost
            await log.wait(len(log.calls) + 1)
    await worker.consumer_tag.stop()
    await worker.queue.delete(if_unused=False, if_empty=False)


@pytest.fixture
async def theirs(amqp_url: str) -> AsyncIterator[Any]:
    """A channel of aio-pika."""
    aio_pika = pytest.importorskip("aio_pika")
    async with await aio_pika.connect(amqp_url) as connection:
        yield await connection.channel()


KINDS: dict[str, tuple[type[Master], str]] = {
    "JSON": (JsonMaster, "JsonMaster"),
    "compressed JSON": (CompressedJsonMaster, "CompressedJsonMaster"),
    "pickle": (PickleMaster, "Master"),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_tasks_go_from_and_to_aio_pika(theirs: Any, channel: Channel, name: str, kind: str) -> None:
    from aio_pika.patterns import master as their_patterns

    ours_class, their_name = KINDS[kind]
    ours, their = ours_class(channel), getattr(their_patterns, their_name)(theirs)
    log = Log()
    worker = await ours.create_worker(name, log)
    await within(their.create_task(name, {"x": "ä"}))
    await log.wait(1)
    await worker.close()

    async def work(**kwargs: Any) -> None:
        await log(**kwargs)

    await their.create_worker(name, work)
    await ours.create_task(name, {"x": "ö"})
    assert await log.wait(2) == [{"x": "ä"}, {"x": "ö"}]
    await channel.queue_delete(name)


async def test_a_subclass_as_aio_pika_has_them_works(channel: Channel, name: str) -> None:
    executed: list[Any] = []

    class Own(Master):
        CONTENT_TYPE = "text/plain"

        def serialize(self, data: Any) -> bytes:
            return repr(data).encode()

        def deserialize(self, data: bytes) -> Any:
            return {"text": data.decode()}

        @classmethod
        async def execute(cls, func: Any, kwargs: Any) -> Any:
            executed.append(kwargs)
            return await super().execute(func, kwargs)

    log = Log()
    await Own(channel).create_worker(name, log, auto_delete=True)
    await Own(channel).create_task(name, {"x": 1})
    assert await log.wait(1) == [{"text": "{'x': 1}"}] == executed
