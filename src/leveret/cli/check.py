"""``check``: every stage between here and a message that made its way, with its time; and how to fix what fails."""

from __future__ import annotations

import argparse
import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import leveret
from leveret.cli.ending import ending
from leveret.cli.explain import BROKER, CommandFailed, fix_for, is_refused, what_happened
from leveret.cli.measure import milliseconds
from leveret.cli.options import FAILED, Subcommands, add_command, add_url, epilog
from leveret.cli.terminal import Live, tell
from leveret.exceptions import ChannelAccessRefused, ConnectionNotAllowed, ConnectTimeout
from leveret.log import printable
from leveret.url import ConnectionParameters, make_urls, parse_url, redact
from leveret.wire.tls import create_context

T = TypeVar("T")

_TIMEOUT = 10.0
_EPILOG = epilog(
    ("the broker on this machine", "check"),
    ("any broker; each of several hosts is checked", "check --url amqps://user:password@one,two/vhost"),
    ("in a script", "check > /dev/null || echo 'RabbitMQ is not all right'"),
    notes="""
Nothing is left behind: the queue is a temporary one. exit code: 0 if all is well, else 1.""",
)


def add(commands: Subcommands) -> None:
    """Add the command to the parser."""
    summary = "check the way to the broker, stage by stage, and tell how to fix what fails"
    add_url(add_command(commands, "check", summary, run, epilog=_EPILOG))


async def run(args: argparse.Namespace) -> int:
    """Check each host; the exit code tells whether all is well with all of them."""
    results: list[bool] = []
    for one in make_urls(args.url):
        tell(redact(one))
        results.append(await _Check(str(one), parse_url(one)).run())
    return 0 if all(results) else FAILED


class _StageFailed(Exception):
    """A stage failed, and was told."""


class _Check:
    """The stages, for one host."""

    def __init__(self, url: str, parameters: ConnectionParameters) -> None:
        self._url = url
        self._parameters = parameters
        self._loop = asyncio.get_running_loop()
        self._detail = ""
        self._stages = 0
        self._connection: leveret.Connection | None = None

    async def run(self) -> bool:
        """Whether all is well."""
        begun = self._loop.time()
        try:
            await self._reach()
            await self._use()
        except _StageFailed:
            return False
        tell(f"all is well: {self._stages} stages in {milliseconds(self._loop.time() - begun)}")
        return True

    async def _stage(self, name: str, work: Callable[[], Awaitable[T]], fix: str) -> T:
        """Do it, and tell how it went; *fix* is for errors that tell nothing better."""
        begun = self._loop.time()
        self._detail = ""
        try:
            with Live() as live:
                live.show(f"  ...   {name}")
                async with asyncio.timeout(self._parameters.connect_timeout * 2):
                    result = await work()
        except Exception as error:
            if isinstance(error, ConnectionNotAllowed):  # it knows who we are
                self._tell("ok", f"log in as {self._parameters.login}", self._loop.time() - begun)
                name = f"open vhost {self._parameters.virtualhost}"
            self._tell("FAIL", name, self._loop.time() - begun)
            tell(f"        {what_happened(error)}")
            tell(f"   fix  {_fix_for_blocked(self._blocked) or fix_for(error) or fix}")
            raise _StageFailed from error
        self._tell("ok", name, self._loop.time() - begun)
        self._stages += 1
        return result

    @property
    def _blocked(self) -> str | None:
        """Why the broker takes no messages."""
        return self._connection.blocked if self._connection is not None else None

    def _tell(self, state: str, name: str, duration: float) -> None:
        tell(f"  {state:<4}  {printable(name):<44} {milliseconds(duration):>9}  {self._detail}".rstrip())

    # ------------------------------------------------------------------------------------------ to the broker

    async def _reach(self) -> None:
        p = self._parameters
        await self._stage(
            f"find {p.host}",
            self._resolve,
            "Correct the host name in --url, or the name server or /etc/hosts of this machine.",
        )
        await self._stage(
            f"connect to port {p.port}",
            self._connect,
            f"Is RabbitMQ running there, and is {p.port} its port? Does a firewall let it through?",
        )
        if p.ssl:
            await self._stage(
                "TLS", self._shake_hands, "Does that port speak TLS? It is usually 5671; amqp:// and 5672 are without."
            )

    async def _resolve(self) -> None:
        found = await self._loop.getaddrinfo(self._parameters.host, None, type=socket.SOCK_STREAM)
        self._detail = ", ".join(dict.fromkeys(str(address[0]) for *_, address in found))

    async def _connect(self, **tls: Any) -> asyncio.StreamWriter:
        # RabbitMQ does not even log a connection that ends before a byte was sent, as those of load balancers do.
        p = self._parameters
        try:
            async with asyncio.timeout(p.connect_timeout):
                _, writer = await asyncio.open_connection(p.host, p.port, **tls)
        except TimeoutError:
            raise ConnectTimeout(f"no answer from {p.host}:{p.port} within {p.connect_timeout:g} s") from None
        except OSError as error:
            if is_refused(error):
                fix = f"Start RabbitMQ there, or correct host and port in --url. {BROKER[0].upper() + BROKER[1:]}."
                raise CommandFailed(f"nothing listens at {p.host}:{p.port}: connection refused.", fix) from error
            raise
        writer.transport.abort()
        return writer

    async def _shake_hands(self) -> None:
        p = self._parameters
        try:
            writer = await self._connect(ssl=create_context(p), server_hostname=p.server_hostname or p.host)
        except ssl.SSLCertVerificationError as error:
            fix = "If its authority is your own, name the file of that: ?cafile=/path/to/ca.pem in the URL."
            if "match" in error.verify_message:
                fix = "Use the name that is in the certificate, or say which it is: ?server_hostname=NAME in the URL."
            text = f"the certificate of {p.host} was not accepted: {error.verify_message.rstrip('.')}."
            raise CommandFailed(text, fix) from error
        except ssl.SSLError as error:
            raise CommandFailed(f"TLS failed: {error.reason or error}.") from error
        certificate: dict[str, Any] = writer.get_extra_info("peercert") or {}
        until = (
            f", certificate valid until {certificate['notAfter']}" if "notAfter" in certificate else ", not verified"
        )
        self._detail = f"{writer.get_extra_info('ssl_object').version()}{until}"

    # ---------------------------------------------------------------------------------------- with the broker

    async def _use(self) -> None:
        p = self._parameters
        login = f"log in as {p.login}, open vhost {p.virtualhost}"
        permit = (
            f"Permit it: `rabbitmqctl set_permissions -p {printable(p.virtualhost)} {printable(p.login)} "
            "'.*' '.*' '.*'`, or use another user."
        )
        again = "Look into the broker's log: it closed or blocked what should work."
        connection = await self._stage(login, self._log_in, "Correct user, password and vhost in --url.")
        self._connection = connection
        async with connection:
            channel = await self._stage("open a channel", lambda: connection.channel().__aenter__(), again)
            queue = await self._stage(
                "declare a temporary queue",
                lambda: _permitted(channel.declare_queue("", exclusive=True), permit),
                again,
            )
            exchange = channel.default_exchange
            message = leveret.Message(b"leveret check")
            blocked = "The broker may be short of memory or disk: `rabbitmq-diagnostics alarms`."

            async def publish() -> None:
                await _permitted(exchange.publish(message, queue.name, timeout=_TIMEOUT), permit)

            async def get() -> None:
                await (await _permitted(queue.get(timeout=_TIMEOUT), permit)).ack()

            async def consume() -> None:
                async with queue.iterator(timeout=_TIMEOUT) as messages:
                    await exchange.publish(message, queue.name, timeout=_TIMEOUT)
                    await (await anext(messages)).ack()

            async def delete() -> None:
                await queue.delete(if_unused=False, if_empty=False)

            await self._stage("publish, and wait for the confirm", publish, blocked)
            await self._stage("get it back", get, again)
            await self._stage("publish and consume another one", consume, again)
            await self._stage("delete the queue", delete, again)

    async def _log_in(self) -> leveret.Connection:
        connection = await leveret.connect(self._url, client_properties={"connection_name": "leveret check"})
        ending().add(connection)
        said = connection.server_properties
        self._detail = printable(f"{said.get('product', 'an AMQP broker')} {said.get('version', '')}".strip())
        return connection


def _fix_for_blocked(reason: str | None) -> str:
    """What to do about an alarm of the broker: *reason* is its own, such as ``low on disk``."""
    if reason is None:
        return ""
    free = [what for what, word in (("disk space", "disk"), ("memory", "memory")) if word in reason]
    return f"Free {' and '.join(free) or 'what it is short of'} there: `rabbitmq-diagnostics alarms` tells which node."


async def _permitted(work: Awaitable[T], fix: str) -> T:
    """*work*; where it is not permitted, the advice is *fix*."""
    try:
        return await work
    except ChannelAccessRefused as error:
        raise CommandFailed(what_happened(error), fix) from error
