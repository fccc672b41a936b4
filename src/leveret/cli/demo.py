"""``demo``: publish and consume while the link is cut, and count what arrived."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import secrets
from collections import Counter
from typing import TYPE_CHECKING

import leveret
from leveret.cli.ending import ending
from leveret.cli.explain import CommandFailed
from leveret.cli.options import FAILED, Subcommands, add_command, epilog, url
from leveret.cli.relay import Relay
from leveret.cli.terminal import Live, tell
from leveret.exceptions import AMQPError, PublishOutcomeUnknown
from leveret.log import printable
from leveret.url import make_urls

if TYPE_CHECKING:
    from leveret.testing import Broker

_MESSAGES, _BURST, _PAUSE = 1000, 25, 0.04
_CUT_AFTER = 500
_PATIENCE = 20.0
"""Seconds for all of it; it takes about two."""

_EPILOG = epilog(
    ("with a broker in this process; there is nothing to install", "demo"),
    ("with a RabbitMQ of yours", "demo --url amqp://user:password@host/vhost"),
    notes="""
With --url, the connection takes the way of a relay in this process, which cuts it: nothing happens to your broker, and
the queue, of a random name, is deleted at the end.
"confirmed" means that the broker took responsibility for a message. Those whose confirm was lost with the link are
published again, because nobody knows: so a message may arrive twice, but none is lost.
exit code: 0 if all messages arrived, else 1.""",
)


def add(commands: Subcommands) -> None:
    """Add the command to the parser."""
    summary = "see it work: publish, consume, cut the link, and count what arrived"
    parser = add_command(commands, "demo", summary, run, epilog=_EPILOG)
    parser.add_argument("--url", type=url, help="of a RabbitMQ; by default a broker in this process is started")


async def run(args: argparse.Namespace) -> int:
    """Play it; the exit code tells whether all arrived."""
    # What the log would say of the link is what the demo tells.
    logger = logging.getLogger("leveret")
    if not args.debug:
        logger.setLevel(logging.ERROR)
    async with contextlib.AsyncExitStack() as stack:
        broker: Broker | Relay
        if args.url is None:
            from leveret.testing import Broker  # not for the other commands

            broker = await stack.enter_async_context(Broker())
            where = "a broker in this process"
        else:
            # Without the relay first, which would have to tell why there is no broker behind it.
            async with await leveret.connect(target := make_urls(args.url)[0]) as direct:
                ending().add(direct)
                where = " ".join(str(direct.server_properties.get(key, "")) for key in ("product", "version"))
            broker = await stack.enter_async_context(Relay(target))
        # The connection is to end before the broker, and before the relay.
        connection = await stack.enter_async_context(await leveret.connect_robust(broker.url))
        ending().add(connection)
        return await _Demo(connection, broker).play(where)


class _Demo:
    """One run, and its figures."""

    def __init__(self, connection: leveret.RobustConnection, broker: Broker | Relay) -> None:
        self._connection = connection
        self._broker = broker
        self._loop = asyncio.get_running_loop()
        self._live = Live()
        self._confirmed: set[int] = set()
        self._arrived: Counter[int] = Counter()
        self._again = 0
        self._lost_at = self._recovered_after = 0.0
        self._up = True
        self._half, self._complete = asyncio.Event(), asyncio.Event()

    async def play(self, where: str) -> int:
        """Tell what happens while it happens."""
        self._connection.state_callbacks.add(self._on_state)
        channel = await self._connection.channel()
        # Not exclusive: such a queue would be gone with the link. It expires, should nobody come to delete it.
        name = f"leveret.demo.{secrets.token_hex(4)}"
        queue = await channel.declare_queue(name, durable=True, arguments={"x-expires": 60_000})
        await queue.consume(self._on_message, prefetch=100)
        tell(f"connected   to {printable(where)}")
        tell(f"publishing  {_MESSAGES:,} messages, each confirmed by the broker; consuming them, each acknowledged")
        begun = self._loop.time()
        try:
            with self._live:
                async with asyncio.timeout(_PATIENCE):
                    async with asyncio.TaskGroup() as tasks:
                        await self._publish_all(channel.default_exchange, name, tasks)
                    await self._complete.wait()
        except TimeoutError:
            pass  # the figures say what is missing
        finally:
            with contextlib.suppress(AMQPError, TimeoutError):
                await queue.delete(if_unused=False, if_empty=False, timeout=5)
        return self._tell_result(self._loop.time() - begun)

    async def _publish_all(self, exchange: leveret.Exchange, key: str, tasks: asyncio.TaskGroup) -> None:
        for number in range(_MESSAGES):
            tasks.create_task(self._publish(exchange, key, number))
            sent = number + 1
            if sent % _BURST == 0:
                self._show()
                if sent == _CUT_AFTER:
                    await self._half.wait()  # they arrive, and their acks are about to be lost
                    continue
                if sent == _CUT_AFTER + _BURST:
                    await self._cut(sent)
                await asyncio.sleep(_PAUSE)

    async def _publish(self, exchange: leveret.Exchange, key: str, number: int) -> None:
        message = leveret.Message(b"%d" % number, delivery_mode=leveret.DeliveryMode.PERSISTENT)
        while number not in self._confirmed:
            try:
                if not isinstance(await exchange.publish(message, key), leveret.ReturnedMessage):
                    self._confirmed.add(number)
            except PublishOutcomeUnknown:  # the link died before the confirm came
                self._again += 1

    async def _cut(self, sent: int) -> None:
        for _ in range(2):  # the publishes begin, and are written: their confirms are about to be lost
            await asyncio.sleep(0)
        waiting = sent - len(self._confirmed)
        tell(f"link cut    on purpose: {len(self._confirmed):,} messages are confirmed, {waiting} are on their way")
        self._broker.drop_connections()

    def _on_state(
        self,
        connection: object,
        old: leveret.ConnectionState,
        new: leveret.ConnectionState,
        cause: Exception | None,
    ) -> None:
        if new is leveret.ConnectionState.RECONNECTING and self._up:
            self._up, self._lost_at = False, self._loop.time()
        elif new is leveret.ConnectionState.READY and not self._up:
            self._up, self._recovered_after = True, self._loop.time() - self._lost_at
            tell(f"recovered   in {self._recovered_after:.2f} s: the link, the channel, the queue, the consumer")

    def _on_message(self, message: leveret.IncomingMessage) -> leveret.Verdict:
        self._arrived[int(message.body)] += 1
        if len(self._arrived) > _CUT_AFTER - _BURST:
            self._half.set()
        if len(self._arrived) == _MESSAGES:
            self._complete.set()
        return leveret.Ack

    def _show(self) -> None:
        done = len(self._arrived) * 30 // _MESSAGES
        link = "" if self._up else "   link down, reconnecting"
        bar = "=" * done + " " * (30 - done)
        self._live.show(f"[{bar}] {len(self._confirmed):,} confirmed, {len(self._arrived):,} arrived{link}")

    def _tell_result(self, duration: float) -> int:
        if not self._recovered_after and not self._lost_at:
            raise CommandFailed("the link was not cut, so the demo shows nothing: please report it.")
        arrived = len(self._arrived)
        twice = sum(times > 1 for times in self._arrived.values())
        lost = len(self._confirmed - self._arrived.keys())
        tell(f"sent again  {self._again} messages, whose confirms were lost with the link")
        tell(
            f"result      {arrived:,} of {_MESSAGES:,} arrived in {duration:.1f} s: "
            f"{lost:,} lost, {twice:,} twice (that is at-least-once delivery)"
        )
        return 0 if arrived == _MESSAGES else FAILED
