"""`leveret.testing.Broker` with the face of a `Node`, so that the broker tests run against it as they are.

``--brokers testing-4.0`` (or ``testing`` for each version) chooses it. What a `Node` is told by name has its
counterpart here; Erlang has none, and tests that speak Erlang, or hurt a process, are marked ``rabbitmq``.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Self

from leveret.testing import Broker

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from leveret.testing import ConnectionView

PREFIX = "testing-"
TESTING = tuple(f"{PREFIX}{version}" for version in ("3.10", "4.0", "4.3"))


class TestingNode:
    """A broker in a thread of this process.

    Args:
        version: ``"testing-4.0"``, for example.
        tls: as a `Node` takes it; ``None``: no TLS.
    """

    __test__ = False

    def __init__(self, version: str, *, tls: Mapping[str, str | Path] | None = None) -> None:
        self.version = version.removeprefix(PREFIX)
        self.broker = Broker(
            version=self.version,
            mechanisms=("PLAIN", "AMQPLAIN", "EXTERNAL"),
            ssl_context=None if tls is None else _context(tls),
            thread=True,
        )

    def __repr__(self) -> str:
        return f"<TestingNode {self.broker!r}>"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    # -- facts

    @property
    def url(self) -> str:
        return self.broker.url

    @property
    def tls_url(self) -> str:
        return self.broker.tls_url

    @property
    def port(self) -> int:
        return self.broker.port

    @property
    def tls_port(self) -> int:
        return self.broker.tls_port

    @property
    def version_info(self) -> tuple[int, ...]:
        return tuple(map(int, self.version.split(".")))

    @property
    def is_running(self) -> bool:
        return self.broker.is_running

    # -- life and faults

    def start(self, timeout: float = 60) -> None:
        self.broker.start_thread()

    def wait(self, timeout: float = 60) -> None:
        """It serves clients as soon as it has started."""

    def stop(self, *, remove: bool = True) -> None:
        self.broker.stop_thread(keep=not remove)

    def flush(self) -> None:
        """Nothing is on disk; what is kept over a restart is kept at once."""

    def kill(self) -> None:
        self.broker.stop_thread(keep=True, abruptly=True)

    def freeze(self) -> None:
        self.broker.pause()

    def thaw(self) -> None:
        self.broker.resume()

    def stop_app(self) -> None:
        self.broker.stop_thread(keep=True)

    def start_app(self) -> None:
        self.broker.start_thread()

    def drain(self) -> None:
        self.stop_app()

    def revive(self) -> None:
        self.start_app()

    # -- orders, as those of a Node

    def close_connections(self, reason: str = "test") -> None:
        self.broker.close_connections(reason)

    def set_memory_alarm(self, on: bool) -> None:
        if on:
            self.broker.block("memory")
        else:
            self.broker.unblock()

    def alarms(self) -> str:
        return "[]"

    def set_ack_timeout(self, seconds: float | None) -> None:
        self.broker.set_consumer_timeout(seconds or 1800.0, tick=60.0 if seconds is None else seconds / 5)

    def consumer_count(self, queue: str) -> int:
        found = self.broker.queues
        return len(found[queue].consumers) if queue in found else -1

    def add_user(self, name: str, password: str, configure: str = ".*", write: str = ".*", read: str = ".*") -> None:
        self.broker.add_user(name, password, permissions={"/": (configure, write, read)})

    def delete_user(self, name: str) -> None:
        self.broker.delete_user(name)

    def set_permissions(self, user: str, configure: str, write: str, read: str) -> None:
        self.broker.set_permissions(user, configure, write, read)

    def limit_channels(self, user: str, most: int | None) -> None:
        self.broker.set_limits(user, channels=most)

    def add_vhost(self, name: str, user: str = "guest") -> None:
        self.broker.add_vhost(name, users=(user,))

    def delete_vhost(self, name: str) -> None:
        self.broker.delete_vhost(name)

    def ctl(self, command: str, *args: str) -> str:
        """What ``rabbitmqctl -q`` prints, of the few commands that tests use."""
        match command:
            case "list_users":
                return "\n".join(self.broker.users)
            case "add_user":
                self.broker.add_user(*args, permissions={})
            case "set_permissions":
                self.broker.set_permissions(*args)
            case "list_connections":
                return _table(
                    args,
                    [
                        {"auth_mechanism": each.mechanism, "user": each.user, "client_properties": _erlang(each)}
                        for each in self.broker.connections
                    ],
                )
            case "list_consumers":
                return _table(
                    args,
                    [
                        {"queue_name": each.queue, "prefetch_count": str(each.prefetch)}
                        for each in self.broker.consumers
                    ],
                )
            case _:
                raise NotImplementedError(f"rabbitmqctl {command}")
        return ""


def _table(columns: Iterable[str], rows: Iterable[Mapping[str, str]]) -> str:
    return "\n".join("\t".join(row[column] for column in columns) for row in rows)


def _erlang(connection: ConnectionView) -> str:
    def term(value: object) -> str:
        if isinstance(value, dict):
            return "[" + ",".join(f'{{"{key}",{term(each)}}}' for key, each in value.items()) + "]"
        return str(value).lower() if isinstance(value, int) else f'"{value}"'

    return term(dict(connection.client_properties))


def _context(tls: Mapping[str, str | Path]) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(tls["cacertfile"]))
    context.load_cert_chain(tls["certfile"], tls["keyfile"])
    context.verify_mode = ssl.CERT_OPTIONAL
    return context
