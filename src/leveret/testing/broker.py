"""A small AMQP 0-9-1 broker on a loopback socket, for tests and for trying out.

::

    async with Broker() as broker:
        async with await leveret.connect(broker.url) as connection:
            ...

It speaks like RabbitMQ, reply texts included, and any client can talk to it. It keeps nothing on disk, has no cluster,
and listens on 127.0.0.1 only. What it does not know, it refuses with 540 and a sentence.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import threading
from collections.abc import AsyncGenerator, Generator, Mapping
from typing import TYPE_CHECKING
from urllib.parse import quote

from leveret.checks import check_count
from leveret.testing.access import MECHANISMS, Permissions, User, given_permissions
from leveret.testing.controls import PATIENCE, Controls
from leveret.testing.dialect import dialect
from leveret.testing.given import check_any, check_consumer_timeout, check_names, check_users
from leveret.testing.refusals import Refusal
from leveret.testing.server import Limits, Server

if TYPE_CHECKING:
    import ssl
    from typing import Self


class Broker(Controls):
    """A broker for tests and for trying out; nothing on disk, no cluster, 127.0.0.1 only.

    Use it as ``async with Broker() as broker`` in the running loop; with ``thread=True``, or as ``with Broker() as
    broker``, it has a thread and a loop of its own, after a restart too. All its methods may be called from any thread;
    of starts and stops at the same time, one waits for the other.

    Args:
        port: where to listen; 0 chooses a free port, which later starts use again.
        version: the RabbitMQ to speak like: ``"3.10"``, ``"4.0"`` or ``"4.3"``.
        users: names and passwords; each may do everything, unless *permissions* says otherwise.
        permissions: user → virtual host → `Permissions`; a virtual host that is not there is closed to the user.
        vhosts: the virtual hosts that there are.
        ssl_context: a server's context; the broker then has a second port for TLS, and with a client's certificate
            clients can log in by EXTERNAL (the common name is the user).
        tls_port: that port; 0 chooses.
        mechanisms: the SASL mechanisms to offer; ``None`` is what the version offers. EXTERNAL is offered by TLS only.
        thread: whether to run in a thread of its own.
        heartbeat: seconds, what ``connection.tune`` proposes; 0 is none.
        frame_max, channel_max: what ``connection.tune`` allows; 0 is no limit.
        max_message_size: bytes; ``None`` is what the version has (16 MiB, 128 MiB on 3.10).
        consumer_timeout: seconds that a delivery may wait for its ack; ``None`` is for ever.
        consumer_timeout_tick: seconds between two looks for those that waited too long.
        keep_published: how many of the last messages :attr:`published` and :attr:`unrouted` remember, of 16 MiB at
            most.

    Raises:
        TypeError: an argument of another type.
        ValueError: a version or a mechanism that there is not, permissions for a user that there is not, a number that
            is out of range, EXTERNAL alone without an ``ssl_context``; no user, no password or no virtual host to log
            in with.
    """

    def __init__(
        self,
        port: int = 0,
        *,
        version: str = "4.0",
        users: Mapping[str, str] | None = None,
        permissions: Mapping[str, Mapping[str, Permissions | tuple[str, str, str]]] | None = None,
        vhosts: tuple[str, ...] = ("/",),
        ssl_context: ssl.SSLContext | None = None,
        tls_port: int = 0,
        mechanisms: tuple[str, ...] | None = None,
        thread: bool = False,
        heartbeat: int = 60,
        frame_max: int = 131_072,
        channel_max: int = 2047,
        max_message_size: int | None = None,
        consumer_timeout: float | None = 1800.0,
        consumer_timeout_tick: float = 60.0,
        keep_published: int = 1000,
    ) -> None:
        self._dialect = dialect(version)
        check_names("vhosts", vhosts)
        check_any("vhosts", vhosts, "'/'")
        if mechanisms is not None:
            check_names("mechanisms", mechanisms)
            check_any("mechanisms", mechanisms, "'PLAIN'")
        users = {"guest": "guest"} if users is None else users
        check_users(users)
        if not isinstance(thread, bool):
            raise TypeError(f"thread must be True or False, not {thread!r}")
        _check_context(ssl_context, mechanisms or ())
        _check_numbers(
            port=port, tls_port=tls_port, heartbeat=heartbeat, channel_max=channel_max, keep_published=keep_published
        )
        check_count("frame_max", frame_max, 0, 0xFFFF_FFFF)
        if 0 < frame_max < self._dialect.min_frame_max:
            raise ValueError(
                f"frame_max must be {self._dialect.min_frame_max} or more, as RabbitMQ {version} demands, or 0 for no "
                f"limit, not {frame_max}"
            )
        if max_message_size is not None:
            check_count("max_message_size", max_message_size, 1)
        check_consumer_timeout("consumer_timeout", consumer_timeout, "consumer_timeout_tick", consumer_timeout_tick)
        if mechanisms is not None:
            if unknown := set(mechanisms) - MECHANISMS:
                raise ValueError(f"mechanisms are among {', '.join(sorted(MECHANISMS))}, not {', '.join(unknown)}")
            self._dialect = dataclasses.replace(self._dialect, mechanisms=tuple(mechanisms))
        if max_message_size is None:
            max_message_size = self._dialect.max_message_size
        limits = Limits(frame_max, channel_max, heartbeat, max_message_size, consumer_timeout, consumer_timeout_tick)
        super().__init__(Server(self._dialect, limits, users, tuple(vhosts), keep_published))
        for name, by_vhost in (permissions or {}).items():
            if name not in self._server.access.users:
                raise ValueError(f"permissions are for {name!r}, who is not among the users")
            if unknown := by_vhost.keys() - self._server.vhosts.keys():
                raise ValueError(f"permissions of {name!r} are for {unknown}, which is not among the vhosts")
            self._server.access.users[name].permissions = given_permissions(name, by_vhost)
        self._port = port
        self._tls_port = tls_port
        self._ssl_context = ssl_context
        self._in_thread = thread
        self._thread: threading.Thread | None = None
        self._life = threading.Lock()

    def __repr__(self) -> str:
        state = f"127.0.0.1:{self._port}" if self.is_running else "stopped"
        return f"<Broker {state} as RabbitMQ {self._dialect.server_version}>"

    # ----------------------------------------------------------------------------------------------------- life

    @property
    def is_running(self) -> bool:
        """Whether clients can connect."""
        return self._loop is not None

    @property
    def version(self) -> str:
        """The RabbitMQ that it speaks like."""
        return self._dialect.version

    @property
    def port(self) -> int:
        """Where it listens, or last did; 0 before the first start."""
        return self._port

    @property
    def tls_port(self) -> int:
        """Where it listens for TLS; 0 without an ``ssl_context``."""
        return self._tls_port if self._ssl_context is not None else 0

    @property
    def url(self) -> str:
        """What to connect to, as the first of its users, to the first of its virtual hosts.

        Raises:
            RuntimeError: the port is chosen by the first start, and there was none.
        """
        self._refuse_unknown(self._port)
        return f"amqp://{self._login}@127.0.0.1:{self._port}/{self._path}"

    @property
    def tls_url(self) -> str:
        """The same by TLS.

        Raises:
            RuntimeError: there was no ``ssl_context``, or no start yet.
        """
        if self._ssl_context is None:
            raise RuntimeError("the broker has no TLS: give it an ssl_context")
        self._refuse_unknown(self._tls_port)
        return f"amqps://{self._login}@localhost:{self._tls_port}/{self._path}"

    def _refuse_unknown(self, port: int) -> None:
        if not port:
            raise RuntimeError("the broker has no port before its first start: start it, or give it one")

    @property
    def _login(self) -> str:
        user = next(iter(self._server.access.users.values()), User("guest", "guest"))
        return f"{quote(user.name, safe='')}:{quote(user.password or '', safe='')}"

    @property
    def _path(self) -> str:
        vhost = next(iter(self._server.vhosts), "/")
        return "" if vhost == "/" else quote(vhost, safe="")

    async def start(self) -> Self:
        """Begin to serve clients; in a thread, if the broker was made for one, or began in one before.

        Returns:
            The broker.

        Raises:
            RuntimeError: it runs already.
            OSError: the port is taken.
        """
        if self._in_thread:
            return await asyncio.to_thread(self.start_thread)
        async with self._turn():
            await self._start()
        return self

    def start_thread(self) -> Self:
        """Begin to serve clients, in a thread and a loop of its own; returns when they can connect.

        Raises:
            RuntimeError: it runs already.
            OSError: the port is taken.
        """
        with self._turn_of_thread():
            self._start_thread()
            self._in_thread = True
        return self

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncGenerator[None, None]:
        """One start or stop at a time, and no loop that stands still for it."""
        while not self._life.acquire(blocking=False):  # noqa: ASYNC110 (of another thread, perhaps)
            await asyncio.sleep(0.005)
        try:
            yield
        finally:
            self._life.release()

    @contextlib.contextmanager
    def _turn_of_thread(self) -> Generator[None, None, None]:
        if not self._life.acquire(timeout=PATIENCE):
            raise RuntimeError(f"{self!r} has been starting or stopping for {PATIENCE:.0f} s, elsewhere")
        try:
            yield
        finally:
            self._life.release()

    def _start_thread(self) -> None:
        self._refuse_two()
        ready: concurrent.futures.Future[None] = concurrent.futures.Future()

        def run() -> None:
            loop = asyncio.new_event_loop()
            try:
                try:
                    loop.run_until_complete(self._start())
                except BaseException as error:
                    ready.set_exception(error)
                    return
                ready.set_result(None)
                loop.run_forever()
            finally:
                loop.run_until_complete(_end_accepting())
                loop.run_until_complete(loop.shutdown_asyncgens())
                loop.close()

        self._thread = threading.Thread(target=run, name="leveret-broker", daemon=True)
        self._thread.start()
        try:
            ready.result()
        except BaseException:
            self._thread.join(PATIENCE)
            self._thread = None
            raise

    def _refuse_two(self) -> None:
        if self.is_running:
            raise RuntimeError(f"{self!r} runs already")

    async def _start(self) -> None:
        self._refuse_two()
        self._port, tls_port = await self._server.listen(self._port, self._tls_port, self._ssl_context)
        self._tls_port = tls_port or 0
        self._loop_thread = threading.get_ident()
        self._loop = asyncio.get_running_loop()

    async def stop(self, *, keep: bool = False, abruptly: bool = False) -> None:
        """Close every connection (320) and the port; does no harm twice.

        Args:
            keep: whether the next :meth:`start` finds what a restart of RabbitMQ finds: durable exchanges and queues,
                and the persistent messages in them. Otherwise it begins anew.
            abruptly: whether connections are reset without a word, as in a crash.

        Raises:
            RuntimeError, TimeoutError: as :meth:`stop_thread`, where it was started in another loop.
        """
        if self._thread is None and self._loop in (None, asyncio.get_running_loop()):
            async with self._turn():
                if self._loop is asyncio.get_running_loop():
                    await self._stop(keep, abruptly)
                    return
        await asyncio.to_thread(self.stop_thread, keep=keep, abruptly=abruptly)

    def stop_thread(self, *, keep: bool = False, abruptly: bool = False) -> None:
        """As :meth:`stop`, without a loop to await it in.

        Raises:
            RuntimeError: the loop that the broker was started in is this thread's, or does not run.
            TimeoutError: that loop did not come to it.
        """
        with self._turn_of_thread():
            loop, thread = self._loop, self._thread
            if loop is None:
                return
            if self._loop_thread == threading.get_ident() or not loop.is_running():
                raise RuntimeError(
                    f"{self!r} was started in a loop that waits for this call, or that does not run: "
                    "await stop() in that loop, or give the broker a thread of its own (thread=True)"
                )
            stopping = asyncio.run_coroutine_threadsafe(self._stop(keep, abruptly), loop)
            try:
                stopping.result(PATIENCE)
            except TimeoutError:
                stopping.cancel()
                raise TimeoutError(f"the loop of {self!r} did not come to its stop in {PATIENCE:.0f} s") from None
            if thread is not None:
                loop.call_soon_threadsafe(loop.stop)
                thread.join(PATIENCE)
                self._thread = None

    async def _stop(self, keep: bool, abruptly: bool) -> None:
        farewell = Refusal(320, "broker forced connection closure with reason 'shutdown'", class_id=0, method_id=0)
        await self._server.shut(None if abruptly else farewell)
        self._server.restart(keep=keep)
        self._loop = self._loop_thread = None

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    def __enter__(self) -> Self:
        return self.start_thread()

    def __exit__(self, *exc_info: object) -> None:
        self.stop_thread()


async def _end_accepting() -> None:
    """End the tasks in which asyncio was accepting connections, and let their sockets be closed."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.sleep(0)


def _check_context(context: object, mechanisms: tuple[str, ...]) -> None:
    if context is None:
        if set(mechanisms) == {"EXTERNAL"}:
            raise ValueError("mechanisms has only EXTERNAL, which needs TLS: give the broker an ssl_context")
        return
    import ssl

    if not isinstance(context, ssl.SSLContext):
        raise TypeError(f"ssl_context must be a server's ssl.SSLContext, not {context!r}")


def _check_numbers(*, port: int, tls_port: int, heartbeat: int, channel_max: int, keep_published: int) -> None:
    for name, value, hint in (
        ("port", port, " (0 chooses one)"),
        ("tls_port", tls_port, " (0 chooses one)"),
        ("heartbeat", heartbeat, " seconds (0 is none)"),
        ("channel_max", channel_max, " (0 is no limit)"),
    ):
        check_count(name, value, 0, 65_535, hint)
    check_count("keep_published", keep_published, 0)
