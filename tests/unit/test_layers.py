"""The map of architecture.md §2 as code: who may import whom, who may know asyncio, and how long a module is."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import leveret

ROOT = Path(leveret.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".") or "__init__": path
    for path in sorted(ROOT.rglob("*.py"))
}
LEAVES = {"exceptions", "types", "log", "checks", "lazy"}
"""What everything may import."""

# The column "may import" of the map, and the note below it: `prompt`, and `outcome` on it, are leaves of their own.
MAP: dict[str, set[str]] = {
    "exceptions": set(),
    "types": set(),
    "log": set(),
    "checks": set(),
    "_version": set(),
    "prompt": set(),
    "deadlines": {"outcome"},
    "outcome": {"prompt"},
    "url": set(),
    "callbacks": {"prompt"},
    "wire": set(),
    "wire.codec": {"wire.tables"},
    "wire.decoder": {"wire.codec", "wire.tally"},
    "wire.tables": set(),
    "wire.methods": {"wire.codec", "wire.tables"},
    "wire.confirms": set(),
    "wire.handshake": {"wire.methods", "url", "wire.codec", "wire.tables", "_version"},
    "wire.tls": {"url"},
    "wire.transport": {"wire.decoder", "wire.codec", "wire.methods", "wire.handshake", "wire.tls", "url", "outcome"},
    "wire.channel": {"wire.transport", "wire.decoder", "wire.codec", "wire.methods", "wire.confirms", "outcome"},
    "message": {"wire.codec", "outcome"},
    "consumer": {"message", "draining", "failures", "handlers", "prompt", "settling"},
    "handlers": {"message", "draining"},
    "consuming": {"message", "message_retry", "consumer", "draining", "failures", "records", "settling", "threads"},
    "settling": {"message"},
    "failures": {"message", "settling"},
    "threads": {"message"},
    "draining": set(),
    "signals": {"draining"},
    "exchange": {"message", "consumer", "outcome"},
    "in_hand": {"message", "draining"},
    "iterator": {"message", "consumer", "draining", "in_hand", "prompt", "records"},
    "batches": {"message", "consumer", "iterator", "outcome"},
    "queue": {"message", "consumer", "consuming", "failures", "iterator", "batches"},
    "transaction": {"message", "consumer"},
    "report": {"message"},
    "bulk": {"message", "report", "wire.codec", "wire.outgoing"},
    "channel": {"exchange", "queue", "transaction", "message", "consumer", "draining", "wire.channel"},
    "connection": {"channel", "draining", "exchange", "queue", "wire.channel", "wire.transport"},
}

# Files that the map does not have: parts of wire/channel.py and wire/transport.py, split off to keep those readable.
# Each may import what the module that it was split from may.
MAP |= {
    "wire.acks": set(),
    "wire.settler": {"wire.acks", "wire.codec", "wire.output"},
    "wire.content": {"wire.codec"},
    "wire.publisher": {"wire.transport", "wire.codec", "wire.methods", "wire.confirms", "wire.output", "outcome"},
    "wire.output": {"outcome"},
    "wire.hand": {"prompt", "wire.output"},
    "wire.tally": set(),
    "wire.intake": set(),
    "wire.fetching": set(),
    "wire.replies": {"wire.methods"},
}
MAP |= {
    "wire.outgoing": {"outcome", "prompt"},
    "wire.waiting": {"wire.outgoing", "wire.publisher", "wire.codec", "outcome"},
    "records": {"wire.methods", "wire.tables"},
    "topology": {"records"},
    "lifecycle": set(),
    "retry": set(),
    "retry_ladder": {"message"},
    "retrier": {"failures", "message", "retry_ladder"},
    "message_retry": {"retrier", "retry_ladder", "wire.codec"},
    "troubles": {"records"},
    "credentials": {"url"},
    "hosts": {"url"},
    "registry": {"topology", "records", "troubles"},
    "restore": {"prompt", "registry", "records", "troubles"},
    "recovery": {"registry", "restore", "records", "lifecycle", "retry", "outcome", "prompt"},
    "robust_channel": {"channel", "queue", "exchange", "consumer", "records", "callbacks"},
    "robust": {
        "connection",
        "channel",
        "consumer",
        "robust_channel",
        "recovery",
        "registry",
        "records",
        "lifecycle",
        "retry",
        "hosts",
        "credentials",
        "callbacks",
        "url",
        "wire.transport",
        "wire.waiting",
    },
}
# What is there for code written for aio-pika.
MAP |= {
    "times": set(),
    "underlay": {"wire.channel", "wire.methods", "wire.transport"},
    "older": {"callbacks", "underlay", "url"},
    "delivered": {"message", "outcome", "wire.codec"},
    "lazy": {"passed_on"},
    "passed_on": set(),
    "tools": {"callbacks"},
    "robust_connection": {"abc", "connection", "robust", "robust_channel"},
    "robust_exchange": {"abc", "exchange", "robust_channel"},
    "robust_queue": {"abc", "iterator", "queue", "robust_channel"},
    "abc": {"channel", "connection", "exchange", "iterator", "message", "queue", "robust", "robust_channel"},
    "compat": set(),
    "compat.aiormq": {"compat.aiormq.abc", "compat.aiormq.connection", "compat.aiormq.exceptions", "underlay"},
    "compat.aiormq.abc": {"delivered", "underlay"},
    "compat.aiormq.connection": {"underlay"},
    "compat.aiormq.exceptions": set(),
}
MAP["abc"] |= {"delivered", "pool", "tools", "transaction", "underlay", "url"}
MAP["message"] |= {"older", "times", "underlay"}
for handle in ("channel", "connection", "robust", "transaction"):
    MAP[handle] |= {"older"}
# On top of the handles: nothing below imports these.
_HANDLES = {"channel", "exchange", "queue", "consuming", "message"}
MAP |= {
    "pool": set(),
    "patterns": {"patterns.master", "patterns.rpc"},
    "patterns.serializers": set(),
    "patterns.base": {"message", "patterns.serializers"},
    "patterns.apart": {"channel", "message"},
    "patterns.calls": {"deadlines", "message", "outcome", "prompt"},
    "patterns.errors": {"message"},
    "patterns.replies": {"message", "prompt", "queue", "records"},
    "patterns.serving": {
        *_HANDLES,
        "draining",
        "failures",
        "outcome",
        "patterns.apart",
        "patterns.base",
        "patterns.errors",
        "prompt",
    },
    "patterns.rpc": {
        *_HANDLES,
        "abc",
        "outcome",
        "patterns.apart",
        "patterns.base",
        "patterns.calls",
        "patterns.errors",
        "patterns.replies",
        "patterns.serializers",
        "patterns.serving",
    },
    "patterns.master": {*_HANDLES, "abc", "patterns.base", "patterns.serializers"},
}
# leveret.testing: a broker of its own, on the wire's codec; nothing of the client's handles.
MAP |= {
    "testing": {"testing.access", "testing.broker", "testing.views"},
    "testing.refusals": set(),
    "testing.dialect": {"_version"},
    "testing.given": set(),
    "testing.clock": {"testing.given"},
    "testing.taps": {"testing.views"},
    "testing.faults": {"testing.refusals"},
    "testing.messages": {"testing.refusals", "wire.codec"},
    "testing.backlog": {"testing.messages"},
    "testing.consumers": {"testing.messages"},
    "testing.exchanges": {"testing.messages", "testing.refusals", "wire.tables"},
    "testing.arguments": {"testing.messages", "testing.refusals"},
    "testing.queues": {"testing.backlog", "testing.consumers", "testing.messages"},
    "testing.quorum": {"testing.backlog", "testing.consumers", "testing.messages", "testing.queues"},
    "testing.streams": {"testing.arguments", "testing.messages", "testing.queues"},
    "testing.dead_letters": {"testing.messages", "wire.codec"},
    "testing.access": {"testing.refusals", "wire.tables"},
    "testing.vhost": {
        "testing.arguments",
        "testing.dead_letters",
        "testing.exchanges",
        "testing.messages",
        "testing.queues",
        "testing.quorum",
        "testing.refusals",
        "testing.streams",
    },
    "testing.frames": {"testing.refusals", "wire.codec"},
    "testing.publishing": {
        "testing.frames",
        "testing.messages",
        "testing.refusals",
        "testing.vhost",
        "wire.codec",
    },
    "testing.channel": {
        "testing.consumers",
        "testing.frames",
        "testing.messages",
        "testing.publishing",
        "testing.refusals",
        "wire.codec",
        "wire.methods",
    },
    "testing.methods": {
        "testing.arguments",
        "testing.consumers",
        "testing.exchanges",
        "testing.messages",
        "testing.refusals",
        "testing.streams",
        "testing.vhost",
        "wire.methods",
    },
    "testing.session": {
        "testing.channel",
        "testing.frames",
        "testing.login",
        "testing.methods",
        "testing.refusals",
        "wire.codec",
        "wire.decoder",
        "wire.methods",
    },
    "testing.login": {"testing.refusals", "wire.methods"},
    "testing.controls": {
        "testing.access",
        "testing.given",
        "testing.refusals",
        "testing.taps",
        "testing.vhost",
        "testing.views",
    },
    "testing.server": {
        "testing.access",
        "testing.clock",
        "testing.dialect",
        "testing.faults",
        "testing.messages",
        "testing.refusals",
        "testing.session",
        "testing.vhost",
        "wire.codec",
    },
    "testing.views": set(),
    "testing.broker": {
        "testing.access",
        "testing.controls",
        "testing.dialect",
        "testing.given",
        "testing.refusals",
        "testing.server",
    },
}
for handle in ("exchange", "queue", "consumer", "channel"):
    MAP[handle] |= {"records"}
MAP["channel"] |= {"wire.outgoing", "wire.transport", "wire.tally"}
MAP["connection"] |= {"lifecycle", "wire.tally"}
MAP["wire.publisher"] |= {"wire.outgoing"}
MAP["wire.channel"] |= {"prompt", "wire.content", "wire.output", "wire.publisher", "wire.replies", "wire.settler"}
MAP["wire.transport"] |= {"deadlines", "prompt", "wire.hand", "wire.output", "wire.intake", "wire.tally"}
# What looks on.
MAP |= {
    "metrics": {"connection", "failures", "message", "wire.tally"},
    "prometheus": {"metrics"},
    "spans": {
        *("_version", "batches", "channel", "exchange", "iterator", "message", "queue", "report"),
        *("wire.channel", "wire.codec"),
    },
    "telemetry": {"spans", "batches", "exchange", "message", "outcome", "queue", "report", "threads"},
}

# The command line: on the public API, and on the leaves that read URLs.
MAP |= {
    "__main__": {"cli.main"},
    "cli": set(),
    "cli.options": {"url"},
    "cli.measure": set(),
    "cli.explain": {"cli.options"},
    "cli.formats": {"cli.options", "message"},
    "cli.terminal": {"cli.options"},
    "cli.pipes": {"cli.terminal"},
    "cli.printing": {"cli.formats", "cli.pipes"},
    "cli.ending": {"cli.terminal"},
    "cli.session": {"cli.ending"},
    "cli.relay": {"url"},
    "cli.load": {"cli.ending", "cli.explain", "cli.measure", "cli.options", "cli.session", "cli.terminal"},
}
for command, needs in {
    "publish": {"cli.ending", "cli.measure", "cli.pipes", "cli.session", "wire.codec"},
    "consume": {"cli.formats", "cli.pipes", "cli.printing", "cli.session"},
    "check": {"cli.ending", "cli.measure", "url"},
    "bench": {"cli.load", "cli.measure"},
    "broker": {"testing"},
    "demo": {"testing", "cli.ending", "cli.relay", "url"},
}.items():
    MAP[f"cli.{command}"] = {"cli.explain", "cli.options", "cli.terminal", *needs}
MAP["cli.main"] = {f"cli.{each}" for each in ("publish", "consume", "check", "bench", "broker", "demo")}
MAP["cli.main"] |= {"_version", "cli.ending", "cli.explain", "cli.options", "cli.pipes", "cli.terminal"}

# `_leveret_pytest`, which pytest loads, stands beside the package: importing anything in that imports the client.
MAP["testing.plugin"] = {"robust", "testing.broker"}

# What the code imports beyond the map. A line here is a debt: the map is to be corrected, or the import to go.
BEYOND_THE_MAP: dict[str, dict[str, str]] = {
    "exchange": {
        "wire.methods": "builds the methods of its verbs",
        "bulk": "publishes many",
        "report": "the type of a result, for a signature",
    },
    "queue": {
        "wire.methods": "builds the methods of its verbs",
        "wire.fetching": "fetches several at a time",
        "exchange": "binds to an Exchange or its name",
    },
    "transaction": {"wire.methods": "builds the methods of its verbs"},
    "channel": {
        "callbacks": "close_callbacks, return_callbacks, consumer_cancelled_callbacks",
        "wire.codec": "the type of a Return, for a signature",
        "wire.methods": "builds basic.qos and the like",
    },
    "cli.check": {"wire.tls": "shakes hands with the context that connect() would make"},
    "recovery": {"wire.transport": "the type of the link"},
    "restore": {
        "wire.channel": "opens the private channel that declares",
        "wire.transport": "the type of the link",
        "wire.outgoing": "the type of a publish, for a signature",
    },
    "robust_channel": {
        "wire.channel": "opens its wires",
        "wire.outgoing": "the type of a publish, for a signature",
        "wire.transport": "the type of the link",
    },
    "connection": {
        "callbacks": "close_callbacks, blocked_callbacks",
        "url": "make_url, parse_url, redact",
        "wire.methods": "builds connection.update-secret",
    },
}

ASYNCIO = {
    "callbacks",
    "deadlines",
    "outcome",
    "prompt",
    "consumer",
    "iterator",
    "channel",
    "connection",
    "wire.transport",
    "wire.channel",
}
ASYNCIO |= {"recovery", "restore", "robust", "robust_channel", "credentials", "hosts", "wire.waiting", "wire.outgoing"}
ASYNCIO |= {"message_retry", "retrier"}
ASYNCIO |= {"bulk", "metrics", "spans"}
ASYNCIO |= {"older", "tools", "underlay"}
ASYNCIO |= {"batches", "wire.intake", "wire.fetching"}
ASYNCIO |= {"consuming", "in_hand", "draining", "failures", "handlers", "signals", "threads"}
ASYNCIO |= {
    "wire.publisher",
    "wire.settler",
    "wire.hand",
    "wire.output",
    "wire.replies",
}  # replies: for the type Future only, see below
ASYNCIO |= {f"cli.{name}" for name in ("main", "publish", "consume", "check", "broker", "demo")}
ASYNCIO |= {f"cli.{name}" for name in ("ending", "load", "pipes", "printing", "relay")}
ASYNCIO |= {"pool", "patterns.calls", "patterns.serving", "patterns.rpc", "patterns.master"}
ASYNCIO |= {"testing.session", "testing.server", "testing.broker", "testing.controls"}
ASYNCIO |= {"testing.plugin"}
ASYNCIO_NAMES = {"exceptions": {"QueueEmpty"}}
"""Modules that know nothing of asyncio but these names, for the bases of errors."""

LINES = {
    "exceptions": 300,
    "types": 120,
    "log": 30,
    "checks": 60,
    "_version": 5,
    "prompt": 180,
    "deadlines": 80,
    "outcome": 120,
    "url": 250,
    "callbacks": 140,
    "wire": 5,
    "wire.codec": 500,
    "wire.decoder": 350,
    "wire.tables": 250,
    "wire.methods": 180,
    "wire.confirms": 160,
    "wire.handshake": 260,
    "wire.tls": 100,
    "wire.transport": 450,
    "wire.channel": 480,
    "wire.acks": 100,
    "wire.content": 100,
    "wire.publisher": 270,
    "wire.settler": 160,
    "wire.output": 160,
    "wire.hand": 120,
    "wire.replies": 90,
    "wire.intake": 200,
    "wire.fetching": 80,
    "wire.tally": 110,
    "metrics": 300,
    "prometheus": 80,
    "spans": 280,
    "telemetry": 320,
    "message": 420,
    "consumer": 300,
    "handlers": 140,
    "consuming": 200,
    "settling": 120,
    "failures": 160,
    "threads": 60,
    "draining": 160,
    "signals": 120,
    "iterator": 240,
    "in_hand": 70,
    "batches": 230,
    "exchange": 280,
    "queue": 360,
    "transaction": 90,
    "channel": 440,
    "connection": 340,
    "bulk": 300,
    "report": 100,
    "wire.waiting": 130,
    "wire.outgoing": 180,
    "records": 280,
    "topology": 200,
    "lifecycle": 120,
    "retry": 100,
    "retry_ladder": 300,
    "message_retry": 200,
    "retrier": 300,
    "troubles": 120,
    "credentials": 100,
    "hosts": 80,
    "registry": 350,
    "restore": 330,
    "recovery": 300,
    "robust_channel": 400,
    "robust": 400,
    "times": 100,
    "underlay": 280,
    "older": 130,
    "delivered": 130,
    "lazy": 30,
    "passed_on": 50,
    "tools": 130,
    "robust_connection": 25,
    "robust_exchange": 15,
    "robust_queue": 20,
    "abc": 100,
    "compat": 100,
    "compat.aiormq": 80,
    "compat.aiormq.abc": 60,
    "compat.aiormq.connection": 40,
    "compat.aiormq.exceptions": 80,
    "pool": 240,
    "patterns": 30,
    "patterns.serializers": 160,
    "patterns.base": 140,
    "patterns.calls": 120,
    "patterns.apart": 40,
    "patterns.errors": 60,
    "patterns.replies": 100,
    "patterns.serving": 260,
    "patterns.rpc": 400,
    "patterns.master": 240,
    "__init__": 100,
    "__main__": 10,
    "cli": 5,
    "cli.main": 140,
    "cli.options": 170,
    "cli.explain": 100,
    "cli.formats": 140,
    "cli.measure": 100,
    "cli.terminal": 100,
    "cli.pipes": 140,
    "cli.printing": 110,
    "cli.session": 60,
    "cli.ending": 140,
    "cli.relay": 100,
    "cli.publish": 250,
    "cli.consume": 200,
    "cli.check": 200,
    "cli.bench": 180,
    "cli.load": 270,
    "cli.broker": 50,
    "cli.demo": 190,
    "testing": 30,
    "testing.refusals": 90,
    "testing.dialect": 280,
    "testing.clock": 100,
    "testing.faults": 90,
    "testing.given": 120,
    "testing.taps": 60,
    "testing.messages": 210,
    "testing.backlog": 120,
    "testing.consumers": 160,
    "testing.exchanges": 290,
    "testing.arguments": 260,
    "testing.queues": 330,
    "testing.quorum": 210,
    "testing.streams": 140,
    "testing.dead_letters": 100,
    "testing.access": 120,
    "testing.vhost": 330,
    "testing.frames": 130,
    "testing.publishing": 250,
    "testing.channel": 380,
    "testing.methods": 400,
    "testing.session": 400,
    "testing.server": 250,
    "testing.views": 220,
    "testing.broker": 270,
    "testing.controls": 400,
    "testing.login": 130,
    "testing.plugin": 250,
}
ASKED_WHY = {
    "robust_channel": (680, "a tenth of it says for type checkers that what a robust channel gives is robust"),
    "exceptions": (520, "two thirds of it is docstrings; a class for each thing that can be told apart"),
    "callbacks": (240, "half of it is docstrings; chained and weak callbacks"),
    "channel": (800, "half of it is docstrings: what users declare, and the hooks that a robust channel changes"),
    "wire.methods": (300, "encoding and decoding are mirrored: a change to one is a change to the other"),
    "message": (740, "what settles several at once is about their private state"),
    "url": (450, "three dialects of parameters, each with its reader; several hosts"),
}
"""Modules past 1.6 times their line: how long they may be, and the answer."""

EXTRAS = {"prometheus": "prometheus_client", "spans": "opentelemetry", "telemetry": "opentelemetry"}
"""Modules that need what only an extra installs."""


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(path: Path) -> list[tuple[str, set[str], bool]]:
    """(module, names, whether only type checkers see it) of each import."""
    found = []

    def visit(node: ast.AST, for_types: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, set(), for_types) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.append((node.module or "", {alias.name for alias in node.names}, for_types))
        if is_type_checking(node):
            for child in node.body:
                visit(child, True)
            for child in node.orelse:
                visit(child, for_types)
        else:
            for child in ast.iter_child_nodes(node):
                visit(child, for_types)

    visit(ast.parse(path.read_text()), False)
    return found


def own_imports(name: str) -> set[str]:
    """The modules of leveret that *name* imports when it runs."""
    found = set()
    for module, names, for_types in imports(MODULES[name]):
        if for_types or module.split(".")[0] != "leveret":
            continue
        inside = module.removeprefix("leveret").lstrip(".")
        if inside in MODULES and inside:
            submodules = {f"{inside}.{each}" for each in names} & MODULES.keys()
            found |= submodules or {inside}
        else:
            found |= names & MODULES.keys()
    return found


every_module = pytest.mark.parametrize("name", [name for name in MODULES if name != "__init__"])


@every_module
def test_the_map_has_every_module(name):
    assert name in MAP
    assert name in LINES


@every_module
def test_a_module_imports_only_what_the_map_allows(name):
    allowed = MAP[name] | (set() if name in LEAVES else LEAVES) | BEYOND_THE_MAP.get(name, {}).keys()
    if name in LEAVES:
        allowed = allowed | (LEAVES - {name})
    assert own_imports(name) <= allowed, f"leveret.{name} imports {own_imports(name) - allowed}"


@pytest.mark.parametrize("name", BEYOND_THE_MAP)
def test_what_is_listed_beyond_the_map_is_still_imported(name):
    assert BEYOND_THE_MAP[name].keys() <= own_imports(name)
    assert not BEYOND_THE_MAP[name].keys() & MAP[name]


def test_imports_make_no_circle():
    done: list[str] = []
    todo = {name: own_imports(name) for name in MODULES if name != "__init__"}
    while todo:
        free = [name for name, needs in todo.items() if not needs & todo.keys()]
        assert free, f"a circle among {sorted(todo)}"
        for name in free:
            del todo[name]
        done += free


def test_only_the_map_s_modules_know_asyncio():
    for name, path in MODULES.items():
        for module, names, for_types in imports(path):
            if for_types or module.split(".")[0] != "asyncio" or name in ASYNCIO:
                continue
            assert names, f"leveret.{name} imports asyncio"
            assert names <= ASYNCIO_NAMES.get(name, set()), f"leveret.{name} imports {names} of asyncio"


def test_the_book_of_replies_knows_of_asyncio_the_future_only():
    tree = ast.parse(MODULES["wire.replies"].read_text())
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "asyncio"
    }
    assert used <= {"Future"}
    assert not any(isinstance(node, ast.AsyncFunctionDef | ast.Await) for node in ast.walk(tree))


@every_module
def test_imports_for_type_checkers_never_reach_from_the_wire_to_the_handles(name):
    if not name.startswith("wire."):
        return
    handles = {"connection", "channel", "exchange", "queue", "consumer", "iterator", "message", "transaction"}
    for module, _, _ in imports(MODULES[name]):
        assert module.removeprefix("leveret.") not in handles


def test_the_package_itself_re_exports_and_does_nothing_else():
    tree = ast.parse(MODULES["__init__"].read_text())
    for node in tree.body:
        assert (
            isinstance(node, ast.ImportFrom)
            or ast.unparse(node) == "import typing"
            or (isinstance(node, ast.If) and ast.unparse(node.test) == "typing.TYPE_CHECKING")
            or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
            or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__")
        ), ast.unparse(node)


@pytest.mark.parametrize("name", MODULES)
def test_at_run_time_only_pamqp_yarl_and_the_standard_library_are_imported(name):
    known = {"leveret", "pamqp", "yarl", EXTRAS.get(name)}
    if name == "testing.plugin":  # only pytest imports it
        known |= {"pytest", "pytest_asyncio", "_leveret_pytest"}
    for module, _, _ in imports(MODULES[name]):
        top = module.split(".")[0]
        assert top in known or top in sys.stdlib_module_names, f"leveret.{name} imports {module}"


def test_what_needs_an_extra_is_imported_by_nobody_else():
    for name in MODULES.keys() - EXTRAS.keys():
        assert not own_imports(name) & EXTRAS.keys(), name


def test_the_pure_modules_load_without_asyncio_s_help():
    """What is pure imports no socket, selectors or ssl either (tls is about ssl)."""
    for name in (
        "wire.codec",
        "wire.decoder",
        "wire.tables",
        "wire.methods",
        "wire.confirms",
        "wire.handshake",
        "url",
        "types",
    ):
        for module, _, for_types in imports(MODULES[name]):
            assert for_types or module.split(".")[0] not in {"socket", "selectors", "ssl", "threading"}, name


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_about_as_long_as_planned_or_was_asked_why(name):
    lines = len(MODULES[name].read_text().splitlines())
    limit, _ = ASKED_WHY.get(name, (1.6 * LINES[name], ""))
    assert lines <= limit, f"leveret.{name} has {lines} lines; {LINES[name]} were planned"


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_is(name):
    if name == "_version":
        return
    assert ast.get_docstring(ast.parse(MODULES[name].read_text())), f"leveret.{name} has no docstring"
