"""How many Python functions a message costs: publish + confirm, and deliver + callback + ack.

Everything is real but the socket: connection, channel, exchange, transport, codec, event loop. Counted is every
Python function that is entered, of leveret and of what it calls, but not the callback itself. As in the model of
architecture.md §3, asyncio's own loop is reported but not counted: one turn of it costs some ten calls, whatever
runs in it. A ceiling that is broken means that somebody put a layer into the hot path. ``pytest -s`` shows the
numbers.
"""

from __future__ import annotations

import asyncio
import selectors
import struct
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from pamqp import frame
from pamqp.commands import Basic, Channel, Confirm
from pamqp.commands import Connection as Methods

import leveret
from leveret import Connection, Message
from leveret.wire import transport as transport_module
from leveret.wire.codec import BODY, HEADER, METHOD, encode_frame

CEILING = 30
"""architecture.md §3 asks for it; the model had 15 and 13."""
ALONE = {"publish": 45, "deliver": 90}
"""With those of the event loop, for a message that comes alone: who saves it a turn may spend some of them."""
PACKAGE = str(Path(leveret.__file__).parent)
ASYNCIO = str(Path(asyncio.__file__).parent)
ANSWERS = {
    "Connection.StartOk": Methods.Tune(2047, 131_072, 0),
    "Connection.Open": Methods.OpenOk(),
    "Channel.Open": Channel.OpenOk(),
    "Confirm.Select": Confirm.SelectOk(),
    "Basic.Consume": None,
    "Basic.Cancel": None,
    "Channel.Close": Channel.CloseOk(),
    "Connection.Close": Methods.CloseOk(),
}
CAPABILITIES = {"publisher_confirms": True, "basic.nack": True, "consumer_cancel_notify": True}


class FakeSocket(asyncio.Transport):
    """Answers methods that have an answer, and keeps the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.protocol: asyncio.BufferedProtocol
        self.written: list[bytes] = []
        self.is_quiet = False

    def write(self, data: bytes) -> None:
        self.written.append(bytes(data))
        if self.is_quiet:
            return
        data = bytes(data)
        while data:
            consumed, channel, value = frame.unmarshal(data)
            data = data[consumed:]
            name = getattr(value, "name", "")
            answer = ANSWERS.get(name)
            if type(value).__name__ == "ProtocolHeader":
                answer = Methods.Start(0, 9, {"capabilities": CAPABILITIES}, "PLAIN", "en_US")
            elif name == "Basic.Consume":
                answer = Basic.ConsumeOk(value.consumer_tag)
            elif name == "Basic.Cancel":
                answer = Basic.CancelOk(value.consumer_tag)
            if answer is not None:
                asyncio.get_running_loop().call_soon(self.receive, frame.marshal(answer, channel))

    def receive(self, data: bytes) -> None:
        while data:
            view = self.protocol.get_buffer(-1)
            count = min(len(view), len(data))
            view[:count] = data[:count]
            self.protocol.buffer_updated(count)
            data = data[count:]

    def close(self) -> None:
        asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    abort = close

    def is_closing(self) -> bool:
        return False

    def get_extra_info(self, name: str, default: object = None) -> object:
        return default


async def connected() -> tuple[Connection, FakeSocket]:
    fake = FakeSocket()
    loop = asyncio.get_running_loop()

    async def create_connection(factory, *_, **__):
        fake.protocol = factory()
        fake.protocol.connection_made(fake)
        return fake, fake.protocol

    loop.create_connection = create_connection  # type: ignore[method-assign]
    return await leveret.connect("amqp://guest:guest@localhost/"), fake


class Count:
    """Counts the Python functions entered inside a ``with`` block."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()

    def _on_event(self, entered, event, _):
        if event == "call" and entered.f_code.co_filename != __file__:
            self.calls[entered.f_code.co_filename, entered.f_code.co_name] += 1

    def __enter__(self) -> Count:
        sys.setprofile(self._on_event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def total(self, *, of: str = "") -> int:
        return sum(count for (path, _), count in self.calls.items() if path.startswith(of))

    def report(self, what: str, messages: int = 1) -> float:
        """Print the numbers; the result is calls per message, without the event loop's."""
        loop = self.total(of=ASYNCIO) + self.total(of=selectors.__file__)
        each = (self.total() - loop) / messages
        files = {path for path, _ in self.calls if path.startswith(PACKAGE)}
        print(
            f"\n{what}: {each:.2f} Python calls per message, {self.total(of=PACKAGE) / messages:.2f} of them leveret's"
            f" in {len(files)} files; the event loop's are {loop / messages:.2f} more"
        )
        for (path, name), count in sorted(self.calls.items(), key=lambda item: -item[1]):
            print(f"    {count / messages:6.2f}  {Path(path).name}:{name}")
        return each


def run(scenario: Callable[[Connection, FakeSocket], object]) -> None:
    async def main() -> None:
        connection, fake = await connected()
        try:
            await scenario(connection, fake)
        finally:
            fake.is_quiet = False
            await connection.close()

    with asyncio.Runner(debug=False) as runner:  # debug mode takes a stack for each handle
        runner.run(main())


def ack(number: int, multiple: bool = False) -> bytes:
    return encode_frame(METHOD, 1, struct.pack(">IQB", 60 << 16 | 80, number, multiple))


def deliver(tag: str, number: int) -> bytes:
    method = struct.pack(">IB", 60 << 16 | 60, len(tag)) + tag.encode() + struct.pack(">QB", number, 0) + b"\x00\x01q"
    return (
        encode_frame(METHOD, 1, method)
        + encode_frame(HEADER, 1, struct.pack(">HHQ", 60, 0, 4) + b"\x10\x00\x01")
        + encode_frame(BODY, 1, b"body")
    )


def test_publish_and_confirm_one_at_a_time_stay_below_the_ceiling():
    async def scenario(connection: Connection, fake: FakeSocket) -> None:
        channel = await connection.channel()
        exchange, fake.is_quiet = channel.default_exchange, True
        loop = asyncio.get_running_loop()
        message = Message(b"body")
        for number in range(1, 4):  # caches are warm after the first
            count = Count()
            loop.call_later(0.01, fake.receive, ack(number))
            with count:
                await exchange.publish(message, "key")
        # One publish, and the turns of the event loop that write it and read its confirm.
        assert count.report("publish + confirm, one at a time") <= CEILING
        assert count.total() <= ALONE["publish"]

    run(scenario)


@pytest.mark.parametrize("multiple", [True, False])
def test_publish_and_confirm_in_a_window_stay_below_the_ceiling(multiple):
    size = 1000

    async def scenario(connection: Connection, fake: FakeSocket) -> None:
        channel = await connection.channel()
        exchange, fake.is_quiet = channel.default_exchange, True
        await asyncio.sleep(0)
        count = Count()
        confirms = ack(0, True) if multiple else b"".join(map(ack, range(1, size + 1)))
        asyncio.get_running_loop().call_later(0.1, fake.receive, confirms)
        with count:
            results = await asyncio.gather(*(exchange.publish(Message(b"body"), "key") for _ in range(size)))
        assert len(results) == size
        what = f"publish + confirm, gather of {size}, {'one multiple ack' if multiple else 'single acks'}"
        assert count.report(what, size) <= CEILING

    run(scenario)


@pytest.mark.parametrize("multiple", [True, False])
def test_publish_many_stays_below_the_ceiling(multiple):
    size = 1000

    async def scenario(connection: Connection, fake: FakeSocket) -> None:
        channel = await connection.channel()
        exchange, fake.is_quiet = channel.default_exchange, True
        await asyncio.sleep(0)
        messages = [Message(b"body") for _ in range(size)]
        count = Count()
        confirms = ack(0, True) if multiple else b"".join(map(ack, range(1, size + 1)))
        asyncio.get_running_loop().call_later(0.1, fake.receive, confirms)
        with count:
            report = await exchange.publish_many(messages, "key")
        assert report.confirmed == size
        what = f"publish_many of {size}, {'one multiple ack' if multiple else 'single acks'}"
        assert count.report(what, size) <= CEILING * 2 / 3

    run(scenario)


@pytest.mark.parametrize("size", [1, 100])
def test_deliver_callback_and_ack_stay_below_the_ceiling(size):
    async def scenario(connection: Connection, fake: FakeSocket) -> None:
        channel = await connection.channel()
        queue = await channel.get_queue("q", ensure=False)
        done = asyncio.Event()
        left = 0

        async def callback(message: leveret.IncomingMessage) -> None:
            nonlocal left
            await message.ack()
            left -= 1
            if not left:
                asyncio.get_running_loop().call_soon(done.set)

        tag = await queue.consume(callback)
        fake.is_quiet = True
        number = 0
        for _ in range(4):  # the template is learned from the second
            numbers = range(number + 1, number + size + 1)
            number, left = number + size, size
            stream = b"".join(deliver(tag, each) for each in numbers)
            done.clear()
            fake.written.clear()
            count = Count()
            asyncio.get_running_loop().call_soon(fake.receive, stream)
            with count:
                await done.wait()
                await asyncio.sleep(0)
        assert b"".join(fake.written).endswith(ack(number, True))
        assert len(fake.written) == 1, "the acks of one turn are written in one piece"
        each = count.report(f"deliver + callback + ack, {size} in a read", size)
        assert count.total() <= ALONE["deliver"] if size == 1 else each <= CEILING

    run(scenario)


def test_deliver_and_ack_through_the_iterator_stay_below_the_ceiling():
    size = 100

    async def scenario(connection: Connection, fake: FakeSocket) -> None:
        channel = await connection.channel()
        queue = await channel.get_queue("q", ensure=False)
        async with queue.iterator(consumer_tag="tag") as messages:
            fake.is_quiet = True
            stream = b"".join(deliver("tag", each) for each in range(1, size + 1))
            count = Count()
            asyncio.get_running_loop().call_soon(fake.receive, stream)
            with count:
                for _ in range(size):
                    await (await anext(messages)).ack()
            await asyncio.sleep(0)
            fake.is_quiet = False
        assert count.report(f"deliver + iterator + ack, {size} in a read", size) <= CEILING

    run(scenario)


def test_the_fake_stands_where_the_socket_was():
    assert transport_module.Transport.__mro__[1] is asyncio.BufferedProtocol
