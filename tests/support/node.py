"""Private RabbitMQ nodes on loopback: no service, no root, no container.

::

    node = Node("4.0")          # provisioned on first use
    node.start()
    connect(node.url)
    node.freeze()               # SIGSTOP: the port still accepts, nobody answers
    node.thaw()
    node.kill()                 # SIGKILL: every client sees a reset
    node.start()                # the same ports, the same data
    node.stop()

Everything here blocks: call it from a fixture, or from a coroutine by way of ``asyncio.to_thread``.
Each process started is a child of the test run and ends with it, even when the run itself is killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pamqp import commands, frame

from tests.support.ports import free_port
from tests.support.provision import provision

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

AMQP_HEADER = b"AMQP\x00\x00\x09\x01"


class NodeError(Exception):
    """A node, or a tool that was to talk to it, failed."""


# ------------------------------------------------------------------------------------------------ processes

# PR_SET_PDEATHSIG (1): the kernel kills this process when the *thread* that started it ends. Set by a launcher which
# then becomes the program, because a `preexec_fn` is not safe in a process with threads.
_DIE_WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"
_LAUNCHER = ThreadPoolExecutor(1, "node-launcher")  # a thread that lasts as long as the test run


def _launch(command: list[str], *, env: Mapping[str, str], cwd: Path, log: Path) -> subprocess.Popen[bytes]:
    """Start *command* (its first item is a path) as a child whose process id is the program's own."""

    def launch() -> subprocess.Popen[bytes]:
        with log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, *command],
                env=env,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    launched: Future[subprocess.Popen[bytes]] = _LAUNCHER.submit(launch)
    return launched.result()


class Epmd:
    """A private Erlang port mapper in the foreground.

    The usual one is started by the first node, stays for ever, and lets nodes of other test runs meet.
    """

    def __init__(self, program: Path, base: Path) -> None:
        self.port = free_port()
        command = [str(program), "-port", str(self.port), "-address", "127.0.0.1"]
        self._process = _launch(command, env={"PATH": "/usr/bin:/bin"}, cwd=base, log=base / "epmd.log")
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 0.2):
                return
            time.sleep(0.02)
        self.stop()
        raise NodeError(f"epmd does not listen: {(base / 'epmd.log').read_text()}")

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


# --------------------------------------------------------------------------------------------------- a node


def server_version(host: str, port: int, timeout: float = 2) -> str:
    """The version in the ``connection.start`` of the broker on a plain port.

    Raises:
        OSError: nobody listens, answers in time, or the answer is not AMQP.
    """
    with socket.create_connection((host, port), timeout) as sock, sock.makefile("rb") as stream:
        sock.sendall(AMQP_HEADER)
        head = stream.read(7)
        if len(head) < 7 or head[0] != 1:
            raise ConnectionError(f"no AMQP broker on port {port}: {head!r}")
        _, _, start = frame.unmarshal(head + stream.read(int.from_bytes(head[3:7]) + 1))
    assert isinstance(start, commands.Connection.Start)
    return str(start.server_properties["version"])


class Node:
    """One RabbitMQ node with a folder, ports and a port mapper of its own.

    Args:
        version: the RabbitMQ to run, ``"4.0"`` for example; provisioned when it is not there yet.
        plugins: the plugins to enable.
        conf: more lines for ``rabbitmq.conf``.
        advanced: the text of ``advanced.config``, an Erlang term.
        tls: ``ssl_options`` of a TLS listener (``cacertfile``, ``certfile``, …); ``None``: no such listener.
        epmd: the port mapper to share; ``None``: one of its own.
        home: the folder with the Erlang cookie; ``None``: one of its own. Nodes of one cluster share it.
    """

    def __init__(
        self,
        version: str,
        *,
        plugins: Iterable[str] = (),
        conf: str = "",
        advanced: str = "",
        tls: Mapping[str, str | Path] | None = None,
        epmd: Epmd | None = None,
        home: Path | None = None,
    ) -> None:
        prefix = provision(version)
        self.version = version
        self.plugins = tuple(plugins)
        self.base = Path(tempfile.mkdtemp(prefix="leveret-node-"))
        self.name = f"leveret{os.urandom(3).hex()}@localhost"
        self.port, self.tls_port, self.management_port = free_port(), free_port(), free_port()
        self.epmd = epmd
        self._owns_epmd = epmd is None
        self._dist_port = free_port()
        self._erlang = prefix / "usr/lib/erlang"
        self._sbin = next(prefix.glob("usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin"))
        self._home = home or self.base / "home"
        self._process: subprocess.Popen[bytes] | None = None
        self._other_ports: list[int] = []
        self._write_files(conf, advanced, tls)

    def _write_files(self, conf: str, advanced: str, tls: Mapping[str, str | Path] | None) -> None:
        lines = [f"listeners.tcp.1 = 127.0.0.1:{self.port}", "log.file.level = info", conf]
        if tls is not None:
            self._other_ports.append(self.tls_port)
            lines.append(f"listeners.ssl.1 = 127.0.0.1:{self.tls_port}")
            lines += [f"ssl_options.{key} = {value}" for key, value in tls.items()]
        if "rabbitmq_management" in self.plugins:
            self._other_ports.append(self.management_port)
            lines += ["management.tcp.ip = 127.0.0.1", f"management.tcp.port = {self.management_port}"]
        (self.base / "rabbitmq.conf").write_text("\n".join(lines) + "\n")
        (self.base / "enabled_plugins").write_text(f"[{','.join(self.plugins)}].\n")
        if advanced:
            (self.base / "advanced.config").write_text(advanced)
        for folder in (self.base / "mnesia", self.base / "log", self._home):
            folder.mkdir(exist_ok=True)
        cookie = self._home / ".erlang.cookie"
        if not cookie.exists():
            cookie.write_text(f"LEVERET{os.urandom(12).hex().upper()}")
            cookie.chmod(0o400)

    def __repr__(self) -> str:
        return f"<Node {self.version} {self.name} port={self.port} {'up' if self.is_running else 'down'}>"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    # -- facts

    @property
    def url(self) -> str:
        """The URL of the plain listener, with the default user."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    @property
    def tls_url(self) -> str:
        """The URL of the TLS listener, with the default user."""
        return f"amqps://guest:guest@localhost:{self.tls_port}/"

    @property
    def version_info(self) -> tuple[int, ...]:
        """The version to compare with: ``node.version_info >= (4, 3)``."""
        return tuple(map(int, self.version.split(".")))

    @property
    def is_running(self) -> bool:
        """Whether the process is there (frozen, or not ready yet, is running too)."""
        return self._process is not None and self._process.poll() is None

    @property
    def output(self) -> str:
        """What the node printed."""
        return (self.base / "out.log").read_text(errors="replace")

    @property
    def log(self) -> str:
        """What the node logged."""
        return "".join(path.read_text(errors="replace") for path in sorted((self.base / "log").glob("*.log")))

    # -- life

    def start(self, timeout: float = 60) -> None:
        """Start the node and wait until it serves clients; after :meth:`kill` its data and ports are the same."""
        self.launch()
        self.wait(timeout)

    def launch(self) -> None:
        """Start the node's process, without waiting for it."""
        assert not self.is_running, f"{self!r} runs already"
        if self.epmd is None:
            self.epmd = Epmd(self._erlang / "bin/epmd", self.base)
        # Not the script of the same name in /usr/sbin: that one changes the user and takes the system's paths.
        self._process = _launch(
            [str(self._sbin / "rabbitmq-server")], env=self._environment(), cwd=self.base, log=self.base / "out.log"
        )

    def wait(self, timeout: float = 60) -> None:
        """Wait until a client is greeted and every listener is there, and check the server's version."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if not self.is_running:
                raise NodeError(f"{self!r} ended while starting: {self.output[-2000:]}")
            try:
                found = server_version("127.0.0.1", self.port)
                for port in self._other_ports:  # opened after the plain one
                    socket.create_connection(("127.0.0.1", port), 1).close()
            except OSError:
                time.sleep(0.05)
                continue
            if not f"{found}.".startswith(f"{self.version}."):
                self.stop()
                raise NodeError(f"the server says that it is RabbitMQ {found}, and {self.version} was wanted")
            return
        raise NodeError(f"{self!r} was not ready within {timeout:g} s: {self.output[-2000:]}")

    def stop(self, *, remove: bool = True) -> None:
        """End the node and its port mapper: in an orderly way when it is to keep its data, at once when *remove* is
        true and nothing is to be left. Does no harm twice.
        """
        if self._process is not None and self.is_running:
            if not remove:
                self.thaw()
                self._process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(30)
            self.kill()
        if self.epmd is not None and self._owns_epmd:  # after the node, which would start another one, for ever
            self.epmd.stop()
            self.epmd = None
        if remove:
            shutil.rmtree(self.base, ignore_errors=True)

    # -- faults

    def flush(self) -> None:
        """Have the registry of queues written to disk: before 4.3 that is otherwise done within some seconds, and a
        queue that was declared a moment before :meth:`kill` is gone with its messages.
        """
        if self.version_info < (4, 3):
            self.call("mnesia sync_log []")

    def kill(self) -> None:
        """End the process at once (SIGKILL), as a crash does."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(30)

    def freeze(self) -> None:
        """Stop the process in its tracks (SIGSTOP): the kernel goes on accepting, nobody answers."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Undo :meth:`freeze`."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    # -- orders

    def ctl(self, *args: str, tool: str = "rabbitmqctl", timeout: float = 120) -> str:
        """Run ``rabbitmqctl`` (or another *tool* beside it), about half a second; returns what it printed."""
        quiet = [] if tool == "rabbitmq-plugins" else ["-q"]
        return self._run([str(self._sbin / tool), *quiet, "-n", self.name, *args], timeout)

    def stop_app(self) -> None:
        """As ``rabbitmqctl stop_app``: the broker ends, its virtual machine stays."""
        self.eval("ok = rabbit:stop()", 60)

    def start_app(self) -> None:
        """Undo :meth:`stop_app`, and wait until clients are served."""
        self.eval("ok = rabbit:start()", 60)
        self.wait()

    def call(self, call: str, timeout: float = 20) -> str:
        """Call an Erlang function, in milliseconds: ``node.call("rabbit_alarm get_alarms []")``."""
        return self._erl_call(["-a", call], "", timeout)

    def eval(self, code: str, timeout: float = 20) -> str:
        """Evaluate Erlang expressions, in milliseconds; returns ``{ok, Result}`` as Erlang prints it."""
        answer = self._erl_call(["-e"], f"{code}.\n", timeout)
        if not answer.startswith("{ok,"):
            raise NodeError(f"{code}: {answer}")
        return answer

    # -- orders that `tests.support.testing_node.TestingNode` knows as well; each takes milliseconds

    def close_connections(self, reason: str = "test") -> None:
        """Close every connection, as an operator does."""
        self.eval(f'[rabbit_networking:close_connection(P, <<"{reason}">>) || P <- rabbit_networking:connections()]')

    def set_memory_alarm(self, on: bool) -> None:
        """Be low on memory, or not any more."""
        self.call(f"vm_memory_monitor set_vm_memory_high_watermark [{'0.00001' if on else '0.6'}]")

    def alarms(self) -> str:
        """The alarms that are on, as Erlang prints a list."""
        return self.call("rabbit_alarm get_alarms []").strip()

    def set_ack_timeout(self, seconds: float | None) -> None:
        """How long a delivery may wait for its ack, on later channels and queues; ``None`` is the default."""
        timeout, tick, quorum_tick = (1_800_000, 60_000, 5_000) if seconds is None else (seconds * 1000, 200, 500)
        for key, value in (
            ("consumer_timeout", timeout),
            ("channel_tick_interval", tick),
            ("quorum_tick_interval", quorum_tick),
        ):
            self.eval(f"application:set_env(rabbit, {key}, {value:.0f})")

    def consumer_count(self, queue: str) -> int:
        """How many consumers *queue* has, asked without a connection; -1 without such a queue."""
        answer = self.eval(
            f'case rabbit_amqqueue:lookup(rabbit_misc:r(<<"/">>, queue, <<"{queue}">>)) of '
            "{ok, Q} -> proplists:get_value(consumers, rabbit_amqqueue:info(Q, [consumers])); _ -> -1 end",
        )
        return int(answer.removeprefix("{ok,").rstrip("}\n "))

    def add_user(self, name: str, password: str, configure: str = ".*", write: str = ".*", read: str = ".*") -> None:
        """Add a user with permissions on the default virtual host, or change those of one, and the password."""
        self.eval(
            f'case rabbit_auth_backend_internal:exists(<<"{name}">>) of true -> '
            f'ok = rabbit_auth_backend_internal:change_password(<<"{name}">>, <<"{password}">>, <<"tests">>); false -> '
            f'ok = rabbit_auth_backend_internal:add_user(<<"{name}">>, <<"{password}">>, <<"tests">>) end'
        )
        self.set_permissions(name, configure, write, read)

    def delete_user(self, name: str) -> None:
        """Delete a user."""
        self.eval(f'rabbit_auth_backend_internal:delete_user(<<"{name}">>, <<"tests">>)')

    def set_permissions(self, user: str, configure: str, write: str, read: str, vhost: str = "/") -> None:
        """What *user* may do."""
        self.eval(
            f'ok = rabbit_auth_backend_internal:set_permissions(<<"{user}">>, <<"{vhost}">>, '
            f'<<"{configure}">>, <<"{write}">>, <<"{read}">>, <<"tests">>)'
        )

    def limit_channels(self, user: str, most: int | None) -> None:
        """How many channels *user* may have; ``None`` is any number."""
        order, limit = (
            ("clear_user_limits", '<<"max-channels">>')
            if most is None
            else (
                "set_user_limits",
                f'#{{<<"max-channels">> => {most}}}',
            )
        )
        self.eval(f'rabbit_auth_backend_internal:{order}(<<"{user}">>, {limit}, <<"tests">>)')

    def add_vhost(self, name: str, user: str = "guest") -> None:
        """Add a virtual host, in which *user* may do everything."""
        self.eval(f'rabbit_vhost:add(<<"{name}">>, <<"tests">>)')
        self.set_permissions(user, ".*", ".*", ".*", name)

    def delete_vhost(self, name: str) -> None:
        """Delete a virtual host."""
        self.eval(f'rabbit_vhost:delete(<<"{name}">>, <<"tests">>)')

    def drain(self) -> None:
        """Maintenance: clients are sent away."""
        self.eval("ok = rabbit_maintenance:drain()")

    def revive(self) -> None:
        """Undo :meth:`drain`, and wait until clients are served."""
        self.eval("ok = rabbit_maintenance:revive()")
        self.wait()

    def _erl_call(self, args: list[str], code: str, timeout: float) -> str:
        program = next(self._erlang.glob("lib/erl_interface-*/bin/erl_call"))
        cookie = (self._home / ".erlang.cookie").read_text()
        caller = f"call{os.urandom(4).hex()}"  # two calls at a time under one name refuse each other
        command = [str(program), "-timeout", f"{timeout:.0f}", "-h", caller, "-sname", self.name, "-c", cookie, *args]
        return self._run(command, timeout, code)

    def _run(self, command: list[str], timeout: float, stdin: str = "") -> str:
        done = subprocess.run(
            command,
            env=self._environment(),
            cwd=self.base,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if done.returncode:
            raise NodeError(f"{command[0].rpartition('/')[2]} {command[-1]}: {done.stderr}{done.stdout}")
        return done.stdout

    def _environment(self) -> dict[str, str]:
        assert self.epmd is not None, "start the node first"
        base = self.base
        return {
            "PATH": f"{self._sbin}:{self._erlang}/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": str(self._home),
            "LANG": "C.UTF-8",
            "ERL_CRASH_DUMP": "/dev/null",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self.epmd.port),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(base / "advanced.config"),
            # The start script then replaces itself by the Erlang VM: our child *is* the broker, for every signal.
            "RABBITMQ_ALLOW_INPUT": "true",
            "RABBITMQ_CONFIG_FILE": str(base / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(base / "enabled_plugins"),
            "RABBITMQ_FEATURE_FLAGS_FILE": str(base / "mnesia/feature_flags"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(base / "generated"),
            "RABBITMQ_LOG_BASE": str(base / "log"),
            "RABBITMQ_MNESIA_BASE": str(base / "mnesia"),
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_PID_FILE": str(base / "pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                "-noinput -kernel inet_dist_use_interface {127,0,0,1} +S 2:2 +A 16 "
                "+sbwt none +sbwtdcpu none +sbwtdio none"  # nobody spins: the processors are for those who have work
            ),
        }


# ------------------------------------------------------------------------------------------------- a cluster


@contextlib.contextmanager
def cluster(version: str, size: int = 3, *, conf: str = "", advanced: str = "") -> Iterator[list[Node]]:
    """*size* nodes of one cluster, running; about 12 s and 450 MB for three. They are stopped at the end."""
    home = Path(tempfile.mkdtemp(prefix="leveret-cluster-"))
    epmd = Epmd(provision(version) / "usr/lib/erlang/bin/epmd", home)
    nodes: list[Node] = []
    try:
        nodes += [Node(version, conf=conf, advanced=advanced, epmd=epmd, home=home) for _ in range(size)]
        for node in nodes:
            node.launch()
        for node in nodes:
            node.wait(90)
        for node in nodes[1:]:
            node.ctl("stop_app")  # which waits where the node serves clients, but has not booted to the end
            node.ctl("join_cluster", nodes[0].name)
            node.start_app()
        yield nodes
    finally:
        for node in nodes:
            node.stop()
        epmd.stop()
        shutil.rmtree(home, ignore_errors=True)
