"""Checked by mypy and pyright, both strict, and never run: code as users write it."""

from __future__ import annotations

import asyncio
import datetime
import ssl
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import assert_type

from pamqp.commands import Basic
from pamqp.commands import Connection as ConnectionMethods
from pamqp.commands import Exchange as ExchangeMethods
from pamqp.commands import Queue as QueueMethods

import leveret
import leveret as aio_pika
from leveret import (
    CallbackCollection,
    Channel,
    Connection,
    Consumer,
    DeliveryMode,
    DrainReport,
    Exchange,
    ExchangeType,
    IncomingMessage,
    Message,
    PublishFailure,
    PublishReport,
    Queue,
    QueueIterator,
    ReturnedMessage,
    Transaction,
    connect,
    exceptions,
)
from leveret.abc import (
    AbstractChannel,
    AbstractExchange,
    AbstractIncomingMessage,
    AbstractQueueIterator,
    AbstractRobustChannel,
    AbstractRobustQueue,
    AbstractTransaction,
    ConsumerTag,
    PublishResultType,
    SSLOptions,
    TimeoutType,
    TransactionState,
    UnderlayChannel,
    UnderlayConnection,
    get_exchange_name,
)
from leveret.metrics import Metrics
from leveret.patterns import RPC, Master, Worker
from leveret.pool import Pool
from leveret.prometheus import MetricsCollector, register
from leveret.telemetry import instrument, uninstrument
from leveret.types import FieldValue, HeadersType


class MyConnection(Connection):
    """A user's own."""

    extra = 5


async def watching(connection: Connection) -> None:
    metrics = Metrics("orders")
    metrics.watch(connection)
    now = metrics.snapshot()
    assert_type(now.published, int)
    assert_type(now.blocked_seconds, float)
    assert_type(now.confirm_seconds.count, int)
    assert_type(register(metrics), MetricsCollector)
    instrument(linked=True)
    uninstrument()


async def connecting() -> None:
    connection = await connect("amqp://guest:guest@localhost/")
    assert_type(connection, Connection)
    async with connection as same:
        assert_type(same, Connection)
    async with await connect(host="broker", port=5671, login="me", password="secret", ssl=True) as tls:
        assert_type(tls.is_closed, bool)
    context = ssl.create_default_context()
    await connect("amqps://broker/", ssl_context=context, timeout=5, client_properties={"service": "shop"})
    await connect("amqps://broker/", ssl_options={"cafile": "ca.pem"})
    own = await connect("amqp://localhost/", connection_class=MyConnection)
    assert_type(own, MyConnection)
    assert_type(own.extra, int)
    await connection.close()
    await connection.close(timeout=5)
    assert_type(await connection.close(drain=5), DrainReport)
    assert_type(await leveret.run_until_signalled(connection, own, drain=30), DrainReport)
    assert_type(await connection.closed(), bool)
    assert_type(connection.blocked, str | None)
    assert_type(await connection.update_secret("new", reason="expired"), ConnectionMethods.UpdateSecretOk)
    assert_type(leveret.__version__, str)


async def channels(connection: Connection) -> None:
    awaited = await connection.channel()
    assert_type(awaited, Channel)
    async with connection.channel(publisher_confirms=True, on_return_raises=True) as channel:
        assert_type(channel, Channel)
        assert_type(channel.number, int | None)
        assert_type(channel.default_exchange, Exchange)
        assert_type(await channel.set_qos(prefetch_count=100), Basic.QosOk)
        assert_type(channel.is_closed, bool)
    await awaited.close()
    await awaited.reopen()


def on_close(connection: Connection, error: BaseException | None) -> None:
    print(connection, error)


async def on_return(channel: Channel, message: ReturnedMessage) -> None:
    print(channel, message.reply_text)


def on_blocked(connection: Connection, reason: str | None) -> None:
    print(connection, reason)


async def callbacks(connection: Connection, channel: Channel) -> None:
    assert_type(connection.close_callbacks, CallbackCollection[Connection, [BaseException | None]])
    connection.close_callbacks.add(on_close)
    connection.blocked_callbacks.add(on_blocked, weak=True)
    channel.return_callbacks.add(on_return)
    channel.return_callbacks.discard(on_return)


async def declaring(channel: Channel) -> None:
    exchange = await channel.declare_exchange("logs", ExchangeType.TOPIC, durable=True)
    assert_type(exchange, Exchange)
    await channel.declare_exchange("delayed", "x-delayed-message", arguments={"x-delayed-type": "direct"})
    assert_type(await channel.get_exchange("logs", ensure=False), Exchange)
    queue = await channel.declare_queue("jobs", durable=True, arguments={"x-queue-type": "quorum"})
    assert_type(queue, Queue)
    assert_type(queue.name, str)
    assert_type(queue.declaration_result, QueueMethods.DeclareOk)
    assert_type(await queue.bind(exchange, "jobs.*"), QueueMethods.BindOk)
    assert_type(await queue.bind("logs"), QueueMethods.BindOk)
    assert_type(await queue.unbind(exchange, "jobs.*"), QueueMethods.UnbindOk)
    assert_type(await exchange.bind("upstream", "#"), ExchangeMethods.BindOk)
    assert_type(await queue.purge(), QueueMethods.PurgeOk | None)
    assert_type(await queue.delete(if_unused=False, if_empty=False), QueueMethods.DeleteOk)
    assert_type(await exchange.delete(), ExchangeMethods.DeleteOk)


def messages() -> None:
    headers: HeadersType = {
        "text": "x",
        "number": 5,
        "float": 0.5,
        "decimal": Decimal("1.5"),
        "none": None,
        "bytes": b"x",
        "list": [1, "two", {"three": 3}],
        "time": datetime.datetime.now(datetime.UTC),
    }
    message = Message(
        b"body",
        headers=headers,
        content_type="text/plain",
        delivery_mode=DeliveryMode.PERSISTENT,
        priority=5,
        correlation_id="1",
        reply_to="replies",
        expiration=datetime.timedelta(seconds=5),
        message_id="m",
        timestamp=datetime.datetime.now(datetime.UTC),
        type="order",
        user_id="guest",
        app_id="shop",
    )
    Message(b"", headers={"attempt": 1, "list": ["a", "b"]}, expiration=1.5, timestamp=0)
    counts: dict[str, int] = {"a": 1}
    Message(b"", headers=counts)
    assert_type(message.body, bytes)
    assert_type(message.headers, HeadersType)
    assert_type(message.content_type, str | None)
    assert_type(message.correlation_id, str | None)
    assert_type(message.priority, int | None)
    assert_type(message.delivery_mode, DeliveryMode | int)
    assert_type(message.timestamp, datetime.datetime | int | None)
    message.content_type = "text/html"
    message.expiration = 5
    message.timestamp = datetime.datetime.now(datetime.UTC)
    message.delivery_mode = DeliveryMode.NOT_PERSISTENT
    message.headers["more"] = [1, 2]
    message.headers = {"only": "this"}
    value: FieldValue = message.headers.get("more")
    print(value, message.info()["message_id"], message.properties.app_id)


async def publishing(exchange: Exchange) -> None:
    message = Message(b"body")
    confirmation = await exchange.publish(message, "key")
    assert_type(confirmation, Basic.Ack | ReturnedMessage | None)
    if isinstance(confirmation, ReturnedMessage):
        print(confirmation.reply_code, confirmation.routing_key)

    results = await asyncio.gather(*(exchange.publish(message, f"key{n}") for n in range(10)))
    assert_type(results, list[Basic.Ack | ReturnedMessage | None])
    first, second = await asyncio.gather(exchange.publish(message, "a"), exchange.publish(message, "b"))
    assert_type(first, Basic.Ack | ReturnedMessage | None)
    assert_type(second, Basic.Ack | ReturnedMessage | None)
    outcomes = await asyncio.gather(exchange.publish(message, "a"), return_exceptions=True)
    assert_type(outcomes[0], Basic.Ack | ReturnedMessage | BaseException | None)

    async with asyncio.TaskGroup() as group:
        task = group.create_task(exchange.publish(message, "key", timeout=5), name="publish")
    assert_type(task.result(), Basic.Ack | ReturnedMessage | None)
    assert_type(
        await asyncio.wait_for(exchange.publish(message, "key", mandatory=False), 5),
        Basic.Ack | ReturnedMessage | None,
    )
    later = asyncio.create_task(exchange.publish(message, "key"))
    assert_type(await later, Basic.Ack | ReturnedMessage | None)
    assert_type(await asyncio.shield(exchange.publish(message, "key")), Basic.Ack | ReturnedMessage | None)
    _ = exchange.publish(message, "nobody waits")
    assert_type(await exchange.publish_nowait(message, "key", timeout=5), Basic.Ack | ReturnedMessage | None)


async def publishing_many(exchange: Exchange) -> None:
    async def pairs() -> AsyncIterator[tuple[Message, str]]:
        yield Message(b"body"), "key"

    report = await exchange.publish_many([Message(b"body")] * 3, "key", window=10, timeout=5)
    assert_type(report, PublishReport)
    await exchange.publish_many((Message(b"%d" % n) for n in range(10)), "key", retry_unknown=True)
    await exchange.publish_many([(Message(b"body"), "key")])
    await exchange.publish_many(pairs(), mandatory=False, window_bytes=1_000_000)
    if not report:
        for failure in report.failures:
            assert_type(failure, PublishFailure)
            assert_type(failure.error, Exception)
            print(failure.index, failure.message.body, failure.routing_key)
    again = [(failure.message, failure.routing_key) for failure in report.failures]
    (await exchange.publish_many(again)).raise_for_failures()


async def on_message(message: IncomingMessage) -> None:
    async with message.process(requeue=True, reject_on_redelivered=True, ignore_processed=True) as same:
        assert_type(same, IncomingMessage)
        assert_type(message.body, bytes)
        assert_type(message.routing_key, str)
        assert_type(message.exchange, str)
        assert_type(message.delivery_tag, int)
        assert_type(message.redelivered, bool)
        assert_type(message.message_count, int | None)
        assert_type(message.headers_error, exceptions.MessageDecodeError | None)


class Service:
    """A bound method as callback."""

    async def handle(self, message: IncomingMessage) -> int:
        assert_type(await message.ack(), None)
        return 5


def returns_an_ack(message: IncomingMessage) -> asyncio.Future[None]:
    return asyncio.ensure_future(message.ack())


async def returns_a_verdict(message: IncomingMessage) -> leveret.Verdict | None:
    return leveret.Ack if message.body else None


def decides_at_once(message: IncomingMessage) -> leveret.Verdict:
    return leveret.Nack


def decide(message: IncomingMessage, error: BaseException) -> leveret.Verdict:
    return leveret.Reject if isinstance(error, ValueError) else leveret.Requeue


async def decide_later(message: IncomingMessage, error: BaseException) -> None:
    await message.reject()


async def consuming(channel: Channel, queue: Queue) -> None:
    tag = await queue.consume(on_message)
    assert_type(tag, Consumer)
    as_text: str = tag
    assert_type(tag.is_active, bool)
    assert_type(tag.delivered + tag.waiting + tag.in_flight + tag.failed, int)
    tag.set_concurrency(None)
    assert_type(await tag.stop(), DrainReport)
    assert_type((await tag.stop(drain=5, timeout=1)).requeued, int)
    await queue.cancel(as_text)
    await queue.consume(returns_a_verdict, concurrency=5, on_error="requeue", ack_batch=10)
    await queue.consume(decides_at_once, thread=True, on_error=decide)
    await queue.consume(on_message, on_error=decide_later)
    await queue.consume(Service().handle, no_ack=False, arguments={"x-priority": 10})
    await queue.consume(returns_an_ack)
    await queue.consume(lambda message: message.ack())
    assert_type(await queue.cancel(tag), Basic.CancelOk | None)

    async with queue.iterator() as iterator:
        assert_type(iterator, QueueIterator)
        async for message in iterator:
            assert_type(message, IncomingMessage)
            async with message.process():
                if message.headers.get("stop"):
                    break
    async with queue.iterator(no_ack=True, timeout=5, consumer_tag="mine") as iterator:
        assert_type(await anext(iterator), IncomingMessage)
    async for message in queue:
        await message.nack(requeue=False)
        await message.reject(requeue=True)
        await asyncio.gather(message.ack(), message.ack(multiple=True))
        asyncio.create_task(message.ack()).cancel()

    assert_type(await queue.get(), IncomingMessage)
    assert_type(await queue.get(timeout=5), IncomingMessage)
    maybe = await queue.get(fail=False)
    assert_type(maybe, IncomingMessage | None)
    print(channel)


async def transacting(connection: Connection) -> None:
    async with connection.channel(publisher_confirms=False) as channel:
        async with channel.transaction() as transaction:
            assert_type(transaction, Transaction)
            await channel.default_exchange.publish(Message(b""), "key")
        await transaction.rollback()


class Own(leveret.RobustConnection):
    """A user's own connection."""


async def robust() -> None:
    connection = await leveret.connect_robust(
        ["amqp://one/", "amqp://two/"],
        retry=leveret.RetryPolicy(maximum=5),
        credentials=login,
    )
    assert_type(connection, leveret.RobustConnection)
    assert_type(await leveret.connect_robust(connection_class=Own), Own)
    assert_type(connection.state, leveret.ConnectionState)
    assert_type(connection.health(), leveret.Health)
    channel = await connection.channel()
    assert_type(channel, leveret.RobustChannel)
    channel.reopen_callbacks.add(lambda channel: print(channel.number))
    queue = await channel.declare_queue("q", robust=False)
    assert_type(queue, leveret.RobustQueue)
    assert_type(await channel.get_queue("q"), leveret.RobustQueue)
    assert_type(await channel.declare_exchange("e", "topic"), leveret.RobustExchange)
    assert_type(await channel.get_exchange("e", ensure=False), leveret.RobustExchange)
    assert_type(channel.default_exchange, leveret.RobustExchange)
    await queue.restore()
    await queue.consume(print, on_cancelled="raise")
    connection.on_recovery_error.add(lambda connection, record, error: print(connection.url, record, error))
    await channel.default_exchange.publish(Message(b""), "key", wait_for_link=False, retry_unknown=True)


async def annotated_as_for_aio_pika(url: str) -> None:
    connection: aio_pika.abc.AbstractRobustConnection = await aio_pika.connect_robust(url)
    plain: aio_pika.abc.AbstractConnection = connection
    channel: AbstractRobustChannel = await connection.channel()
    also: AbstractChannel = channel
    queue: AbstractRobustQueue = await channel.declare_queue("q", arguments={"x-queue-type": "quorum"})
    exchange: AbstractExchange = await channel.declare_exchange("e", aio_pika.ExchangeType.TOPIC)
    headers: HeadersType = {"k": "v"}
    timeout: TimeoutType = 5
    tag: ConsumerTag = await queue.consume(on_delivery, timeout=timeout)
    result: PublishResultType | None = await exchange.publish(Message(b"", headers=dict(headers)), "key")
    iterator: AbstractQueueIterator = queue.iterator()
    async with iterator as messages:
        async for message in messages:
            assert_type(message, IncomingMessage)
    transaction: AbstractTransaction = also.transaction()
    assert_type(transaction.state, TransactionState)
    assert_type(await also.get_underlay_channel(), UnderlayChannel)
    assert_type(plain.transport, UnderlayConnection | None)
    options: SSLOptions = {"cafile": "ca.pem"}
    print(tag, result, get_exchange_name(exchange), options, aio_pika.tools.create_task(login))
    aio_pika.compat.install()


async def on_delivery(message: AbstractIncomingMessage) -> None:
    async with message.process() as same:
        assert_type(same, IncomingMessage)


async def login() -> leveret.Credentials:
    return leveret.Credentials("user", "token", expires_in=60)


async def failing(exchange: Exchange, queue: Queue) -> None:
    try:
        await exchange.publish(Message(b""), "key")
    except exceptions.MessageReturned as error:
        assert_type(error.message, ReturnedMessage)
    except exceptions.MessageNacked as error:
        assert_type(error.frame, Basic.Nack)
    except exceptions.PublishNotSent as error:
        assert_type(error, exceptions.PublishNotSent)
    except (exceptions.ChannelClosed, exceptions.ConnectionClosed) as error:
        assert_type(error.reply_code, int)
        assert_type(error.reply_text, str)
    except exceptions.CONNECTION_EXCEPTIONS as error:
        print(error)
    except leveret.AMQPException as error:
        print(error)
    try:
        await queue.get()
    except asyncio.QueueEmpty:
        pass
    except leveret.MessageProcessError as error:
        assert_type(error.message, IncomingMessage | None)


class Audited(Exchange):
    """A user's own exchange, with publish overridden."""

    async def audited(self, message: Message, routing_key: str) -> Basic.Ack | ReturnedMessage | None:
        return await super().publish(message, routing_key)


def accepts_either(exchange: Exchange | str, type: ExchangeType | str = ExchangeType.DIRECT) -> str:
    return str(exchange) + str(type)


class Packed:
    """A serializer of the user's."""

    content_type = "application/x-packed"

    def serialize(self, data: object) -> bytes:
        return repr(data).encode()

    def deserialize(self, data: bytes) -> object:
        return data


async def patterns(channel: Channel) -> None:
    async def add(*, x: int, y: int) -> int:
        return x + y

    rpc = await RPC.create(channel, serializer=Packed())
    assert_type(rpc, RPC)
    await rpc.register("add", add, concurrency=5, auto_delete=True)
    await rpc.call("add", {"x": 1, "y": 2}, timeout=5, retry=True)
    await rpc.proxy.math.add(x=1, y=2)
    assert_type(rpc.result_queue, Queue)
    await rpc.unregister(add, drain=5)
    await rpc.close()
    master = Master(channel, reject_on_redelivered=True)
    worker = await master.create_worker("add", add, durable=True)
    assert_type(worker, Worker)
    await worker.consumer_tag.stop(drain=5)
    await worker.close()
    await master.proxy.add(x=1, y=2)
    assert_type(await master.create_task("add", {"x": 1}, priority=5), Basic.Ack | ReturnedMessage | None)


async def pools() -> None:
    connections: Pool[Connection] = Pool(connect, "amqp://localhost/", max_size=2)
    async with connections, connections.acquire() as connection:
        assert_type(connection, Connection)

        async def new_channel() -> Channel:
            return await connection.channel()

        async with Pool(new_channel) as channels, channels.acquire() as channel:
            assert_type(channel, Channel)
    assert_type(connections.is_closed, bool)
