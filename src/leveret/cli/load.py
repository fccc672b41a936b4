"""The load of ``bench``: producers and consumers, and what is counted meanwhile."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import secrets
import sys
import time
from collections import deque
from collections.abc import Awaitable
from typing import Any, TypeAlias

import leveret
from leveret.cli import session
from leveret.cli.ending import ending
from leveret.cli.explain import sentence
from leveret.cli.measure import Latencies, Pace, per_second
from leveret.cli.options import name_of
from leveret.cli.terminal import say
from leveret.exceptions import AMQPError

_MARK = b"LVB1"
"""What a body begins with: this, and the time in nanoseconds since 1970, 8 bytes, big-endian."""
_STAMP = len(_MARK) + 8
_HEADER = "x-leveret-sent"
"""The same time, in the headers, where the body is too small for it."""
_EXPIRES = 10 * 60 * 1000
"""Milliseconds after which the broker deletes a queue of ours, should we not come to it."""
_SILENCE = 2.0
"""Seconds that consumers wait for what is missing at the end."""
DRAIN = 10.0
"""Seconds for the confirms at the end and, with ``--time``, for what consumers are behind with."""
_CLOSING = 2.0
"""Seconds to delete the queue and to close, after that."""
_WINDOW_BYTES = 16 * 1024 * 1024
"""Bytes of bodies that a producer has on their way, at most."""
_BURST = 100
"""Messages that are written before the event loop turns."""

Pending: TypeAlias = "deque[tuple[int, Awaitable[object] | None]]"
"""When each publish on its way began, and its outcome; the None is the last."""


class Figures:
    """What is counted; the same figures for all producers and consumers together."""

    def __init__(self) -> None:
        self.sent = self.confirmed = self.returned = self.failed = self.received = self.left = self.unstamped = 0
        self.latency, self.confirm_latency = Latencies(), Latencies()
        self.publishing = self.consuming = 0.0
        """Seconds that it took."""


def stamp(body_rest: bytes, now: int) -> bytes:
    """A body that says when it was sent."""
    return _MARK + now.to_bytes(8, "big") + body_rest


def sent_at(message: leveret.Message) -> int | None:
    """When it was sent, in nanoseconds since 1970; None for a message of somebody else."""
    body = message.body
    if len(body) >= _STAMP and body.startswith(_MARK):
        return int.from_bytes(body[len(_MARK) : _STAMP], "big")
    value = message.headers.get(_HEADER)
    return value if isinstance(value, int) else None


class Load:
    """One run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.figures = Figures()
        self._args = args
        self._loop = asyncio.get_running_loop()
        self._received = asyncio.Event()
        self._begun = self._last_received = 0.0
        self.queue = args.queue or f"leveret.bench.{secrets.token_hex(4)}"
        self._told: set[str] = set()
        self._is_behind = False
        self._wanted: float = math.inf if args.producers or args.count is None else args.count
        """Messages that are acknowledged, at most: the broker has the others back."""

    @property
    def has_begun(self) -> bool:
        """Whether it came to publishing or consuming."""
        return self._begun > 0

    @property
    def is_well(self) -> bool:
        """Whether nothing came back, was refused, or is missing."""
        f, args = self.figures, self._args
        missing = args.producers and args.consumers and args.queue is None and f.received + f.left < self._expected()
        return not (f.returned or f.failed or missing)

    async def run(self) -> None:
        """Connect, publish and consume, wait for what is missing, delete the queue."""
        async with await session.connect(self._args.url, "bench") as control:
            channel = await control.channel()
            await self._declare(channel)
            try:
                await self._run_all()
            finally:
                if self._args.queue is None:
                    with contextlib.suppress(AMQPError, TimeoutError):
                        await channel.queue_delete(self.queue)

    async def _run_all(self) -> None:
        args = self._args
        async with contextlib.AsyncExitStack() as stack:

            async def connect(role: str) -> leveret.RobustConnection:
                return await stack.enter_async_context(await session.connect(args.url, f"bench {role}"))

            producers = [await connect("producer") for _ in range(args.producers)]
            for _ in range(args.consumers):
                await self._consume(await (await connect("consumer")).channel())
            self._begun = self._loop.time()
            if args.time is not None:
                ending().limit(args.time + DRAIN + _CLOSING)
            ticking = asyncio.ensure_future(self._tick())
            try:
                await self._measure(producers)
            finally:
                ticking.cancel()
                await asyncio.wait([ticking])
                self.figures.consuming = max(0.0, self._last_received - self._begun)
        if self._is_behind:  # only now does nothing come any more
            self.figures.left = self._expected() - self.figures.received

    async def _declare(self, channel: leveret.Channel) -> None:
        arguments: dict[str, Any] = {"x-queue-type": self._args.queue_type}
        if self._args.queue is not None:
            await session.get_queue(channel, self.queue, declare=True, arguments=arguments)
            return
        if self._args.queue_type != "stream":
            arguments["x-expires"] = _EXPIRES
        await channel.declare_queue(self.queue, durable=True, arguments=arguments)

    async def _measure(self, producers: list[leveret.RobustConnection]) -> None:
        try:
            async with asyncio.timeout(self._args.time), asyncio.TaskGroup() as tasks:
                for connection in producers:
                    tasks.create_task(self._produce(connection))
                if not producers:
                    await self._all_received(self._args.count or math.inf)
        except TimeoutError:
            pass
        finally:
            if producers:
                self.figures.publishing = self._loop.time() - self._begun
        if producers and self._args.consumers and self._args.queue is None:
            await self._drain()

    async def _drain(self) -> None:
        """Wait for what was sent and not received; with a ``--time``, not for as long as it takes."""
        try:
            async with asyncio.timeout_at(None if self._args.time is None else self._end_by()):
                await self._all_received(None)
        except TimeoutError:
            self._is_behind = True

    def _end_by(self) -> float:
        """The event loop time up to which confirms, and with a ``--time`` messages, are waited for."""
        return DRAIN + (self._loop.time() if self._args.time is None else self._begun + self._args.time)

    async def _all_received(self, count: float | None) -> None:
        """Wait for *count* messages; None for all that were sent, while some come."""
        while self.figures.received < (self._expected() if count is None else count):
            self._received.clear()
            try:
                async with asyncio.timeout(_SILENCE if count is None else None):
                    await self._received.wait()
            except TimeoutError:
                return

    def _expected(self) -> int:
        f = self.figures
        return f.sent - f.returned - f.failed

    # -------------------------------------------------------------------------------------------- publishing

    async def _produce(self, connection: leveret.Connection) -> None:
        window = self._args.confirms
        channel = await connection.channel(publisher_confirms=bool(window))
        channel.return_callbacks.add(self._on_returned)
        pending: Pending = deque()
        more, room = asyncio.Event(), asyncio.Event()
        settling = asyncio.ensure_future(self._settle(pending, more, room))
        ending().waits_for = "confirms, and the broker to close the connections"
        try:
            await self._publish(channel.default_exchange, pending, more, room)
        finally:
            # What is on its way still gets its confirm, or Ctrl-C would make failures of them.
            pending.append((0, None))
            more.set()
            await asyncio.wait([settling], timeout=self._end_by() - self._loop.time())
            if not settling.done():
                say(f"{len(pending) - 1:,} messages have no confirm {DRAIN:g} s after the end")
                await connection.close(timeout=0)  # now they have failed
            await asyncio.wait([settling])

    async def _publish(
        self, exchange: leveret.Exchange, pending: Pending, more: asyncio.Event, room: asyncio.Event
    ) -> None:
        args, figures, time_ns = self._args, self.figures, time.time_ns
        window = min(args.confirms or _BURST, max(1, _WINDOW_BYTES // max(1, args.size)))
        pace = Pace(args.rate, self._loop.time())
        mode = leveret.DeliveryMode.PERSISTENT if args.persistent else leveret.DeliveryMode.NOT_PERSISTENT
        fits, rest = args.size >= _STAMP, b"x" * max(0, args.size - _STAMP)
        small = b"x" * args.size
        number = 0
        while number != args.count:
            if args.rate is not None and (pause := pace.due(self._loop.time())) > 0:
                await asyncio.sleep(pause)
                continue
            while len(pending) >= window:
                room.clear()
                await room.wait()
            now = time_ns()
            if fits:
                message = leveret.Message(stamp(rest, now), delivery_mode=mode)
            else:
                message = leveret.Message(small, headers={_HEADER: now}, delivery_mode=mode)
            pending.append((now, exchange.publish(message, self.queue)))
            more.set()
            figures.sent += 1
            number += 1
            pace.went()
            if number % min(_BURST, window) == 0:
                await asyncio.sleep(0)

    async def _settle(self, pending: Pending, more: asyncio.Event, room: asyncio.Event) -> None:
        """Await the outcomes in their order, which is that of the confirms; note how long each took."""
        figures, time_ns, latency = self.figures, time.time_ns, self.figures.confirm_latency
        confirms = bool(self._args.confirms)
        while True:
            while not pending:
                more.clear()
                await more.wait()
            begun, outcome = pending[0]
            if outcome is None:
                return
            try:
                result = await outcome
            except AMQPError as error:
                figures.failed += 1
                self._tell_once(sentence(error))
            else:
                if confirms and not isinstance(result, leveret.ReturnedMessage):
                    figures.confirmed += 1
                    latency.add(time_ns() - begun)
            pending.popleft()
            room.set()

    def _on_returned(self, channel: object, message: leveret.ReturnedMessage) -> None:
        self.figures.returned += 1
        self._tell_once(f"returned by the broker: {message.reply_text}. Was queue {name_of(self.queue)} deleted?")

    def _tell_once(self, text: str) -> None:
        if text not in self._told and len(self._told) < 10:
            self._told.add(text)
            say(text)

    # --------------------------------------------------------------------------------------------- consuming

    async def _consume(self, channel: leveret.Channel) -> None:
        queue = await channel.get_queue(self.queue, ensure=False)
        args = self._args
        prefetch = int(min(args.prefetch, self._wanted))
        ack_batch = min(args.ack_batch, prefetch)
        await queue.consume(
            self._on_message,
            no_ack=not args.ack_batch,
            prefetch=prefetch,
            ack_batch=ack_batch if ack_batch > 1 else None,
        )

    def _on_message(self, message: leveret.IncomingMessage) -> leveret.Verdict | None:
        if self.figures.received >= self._wanted:
            return None  # it fills the prefetch until the channel closes, and the broker requeues it
        now, begun = time.time_ns(), sent_at(message)
        if begun is not None:
            self.figures.latency.add(now - begun)
        else:
            self.figures.unstamped += 1
        self.figures.received += 1
        self._last_received = self._loop.time()
        self._received.set()
        return leveret.Ack

    # ----------------------------------------------------------------------------------------------- telling

    async def _tick(self) -> None:
        """A line a second, on a terminal."""
        sent = received = 0
        if not sys.stderr.isatty():
            return
        last = self._begun
        while True:
            await asyncio.sleep(1)
            f, now = self.figures, self._loop.time()
            facts = [f"{now - self._begun:6.1f} s"]
            if self._args.producers:
                facts.append(f"sent {per_second(f.sent - sent, now - last):>9,.0f}/s")
            if self._args.consumers:
                facts.append(f"received {per_second(f.received - received, now - last):>9,.0f}/s")
            if f.latency.count:
                facts.append(
                    f"median {f.latency.percentile(50) / 1e6:,.2f} ms  99% {f.latency.percentile(99) / 1e6:,.2f} ms"
                )
            say("   ".join(facts))
            sent, received, last = f.sent, f.received, now
