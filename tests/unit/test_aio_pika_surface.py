"""The public surface of aio-pika 10.2.1, name by name and parameter by parameter, against leveret's.

``data/aio_pika_surface.json`` was made with ``inspect`` from the wheel. What differs is in the tables below, with why.
leveret may have more: names, parameters with a default, and parameters that may be given by position too.
"""

from __future__ import annotations

import ast
import enum
import importlib
import importlib.util
import inspect
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pamqp.commands
import pytest

import leveret

DATA = Path(__file__).parent / "data"
SURFACE: dict[str, Any] = json.loads((DATA / "aio_pika_surface.json").read_text())
NAMES: dict[str, str] = json.loads((DATA / "aio_pika_names.json").read_text())
"""What ``dir()`` finds in each module, but for private names and those of the standard library."""

NOT_PASSED_ON = {
    "exceptions": "pamqp",
    "message": "D V",  # type variables
    "patterns.rpc": "T",
}
"""Those that leveret's modules do not have."""

NO_SUCH_NAME = {
    "channel.ChannelContext": "a base class of Channel; there is no hierarchy of abstract classes",
    "message.optional": "a helper of aio-pika's own constructors",
    "queue.consumer": "aio-pika's glue to aiormq, which is not there",
}
"""Names of modules that leveret does not have."""

NO_SUCH_IMPLEMENTATION = re.compile(r"message\.(en|de)code_(expiration|timestamp)_\w+")
"""aio-pika registers one function for each type; here one function knows them all, and ``register`` works."""

NO_SUCH_MEMBER = {
    "Message.headers_raw": "an alias of headers, deprecated; headers_raw of an incoming message is its bytes",
    "RobustChannel.RESTORE_RETRY_DELAY": "unused in aio-pika; pauses grow",
    "RobustConnection.CHANNEL_REOPEN_PAUSE": "unused in aio-pika; pauses grow",
    "QueueIterator.on_message": "aio-pika's glue to aiormq, which is not there",
    "RobustQueueIterator.on_message": "the same",
    "AbstractQueueIterator.on_message": "the same",
    "RobustQueueIterator.RETRY_DELAY": "an iterator does not poll for its channel",
    "UnderlayChannel.close_callback": "the channel's close_callbacks tell",
    "UnderlayChannel.create": "leveret opens its own channels",
    "UnderlayConnection.close_callback": "the connection's close_callbacks tell",
    "UnderlayConnection.connect": "leveret connects by itself",
    "UnderlayConnection.make_connection": "leveret connects by itself",
}
"""Members of classes that leveret does not have."""

OTHER_SIGNATURE = {
    "Connection.close": "exc=None stands for ConnectionClosed, here and in robust connections",
    "RobustConnection.close": "the same",
    "AbstractConnection.close": "the same",
    "AbstractRobustConnection.close": "the same",
    "ReturnedMessage.__init__": "made by leveret only",
    "CallbackCollection.discard": "the parameter has the name that collections.abc.MutableSet gives it",
    "CallbackCollection.remove": "the same",
    "DeliveryError.__init__": "(message, frame) or one text; subclasses say what happened",
    "PublishError.__init__": "the same",
    "UnderlayChannel.__init__": "a view of what leveret has, made by leveret",
    "UnderlayConnection.__init__": "the same",
}
"""Calls that take something else."""

CLASSES_OF_THEIR_OWN = {"ConsumerTag", "MessageInfo", "SSLOptions", "NoneType", "CallbackType"}
"""str, TypedDicts, a Protocol: what is inside them is Python's."""

DUNDERS = {"__init__", "__aenter__", "__aexit__", "__aiter__", "__anext__", "__await__", "__call__", "__iter__"}
"""Special methods that users rely on. The names of their parameters mean nothing, but those of ``__init__``."""


def load(module: str) -> Any:
    return leveret if module == "." else importlib.import_module(f"leveret.{module}")


def classes() -> Iterator[tuple[str, str]]:
    for module in SURFACE:
        for name, entry in SURFACE[module]["names"].items():
            if entry["kind"] == "class" and name not in CLASSES_OF_THEIR_OWN and f"{module}.{name}" not in NO_SUCH_NAME:
                yield module, name


def members() -> Iterator[tuple[str, str, str, str]]:
    for module, name in classes():
        for member, what in SURFACE[module]["names"][name].get("members", {}).items():
            if not member.startswith("_") or member in DUNDERS:
                yield module, name, member, what


def parameters(signature: str) -> list[tuple[str, str, str]]:
    """(name, kind, default) of each parameter in *signature*, which is text."""
    text = re.sub(r"<(\w+)\.(\w+): [^>]*>", r"'\1.\2'", signature)
    text = re.sub(r"<class '[\w.]*?(\w+)'>", r"'\1'", text)
    arguments = ast.parse(f"def f{text}: ...").body[0].args  # type: ignore[attr-defined]
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    found = [(each.arg, "positional", unparse(default)) for each, default in zip(positional, defaults, strict=True)]
    if arguments.vararg:
        found.append((arguments.vararg.arg, "args", ""))
    found += [
        (each.arg, "keyword", unparse(default))
        for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    if arguments.kwarg:
        found.append((arguments.kwarg.arg, "kwargs", ""))
    return found


def unparse(default: ast.expr | None) -> str:
    if default is None:
        return ""
    return default.value if isinstance(default, ast.Constant) and "." in str(default.value) else ast.unparse(default)


def shown(default: Any) -> str:
    if default is inspect.Parameter.empty:
        return ""
    if isinstance(default, enum.Enum):
        return str(default.__class__.__name__ + "." + default.name)
    return default.__name__ if inspect.isclass(default) else repr(default)


def differences(signature: str, function: Any, *, is_special: bool = False) -> list[str]:
    """What code that was written for *signature* cannot do with *function*."""
    own = inspect.signature(function).parameters
    names = list(own)
    kinds = {parameter.kind for parameter in own.values()}
    wrong = []
    for index, (name, kind, default) in enumerate(parameters(signature)):
        if kind in {"args", "kwargs"} or (is_special and inspect.Parameter.VAR_POSITIONAL in kinds):
            continue
        if is_special:
            wrong += [] if index < len(names) else [f"takes no parameter {name}"]
            continue
        if name == "self":
            continue
        if name not in own:
            if not (kind == "keyword" and inspect.Parameter.VAR_KEYWORD in kinds):
                wrong.append(f"no parameter {name}")
            continue
        if shown(own[name].default) != default and default:
            wrong.append(f"{name}={shown(own[name].default)}, not {default}")
        if kind == "positional" and (names.index(name) != index or own[name].kind is inspect.Parameter.KEYWORD_ONLY):
            wrong.append(f"{name} is not at position {index}")
    asked = {name for name, _, _ in parameters(signature)}
    variable = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    for name, parameter in own.items():
        needs = parameter.default is inspect.Parameter.empty and parameter.kind not in variable
        if needs and name not in asked | {"self", "_cls"} and not is_special:
            wrong.append(f"needs {name}")
    return wrong


@pytest.mark.parametrize("module", SURFACE)
def test_every_module_can_be_imported(module):
    assert inspect.ismodule(load(module))


@pytest.mark.parametrize("module", SURFACE)
def test_a_module_has_every_name(module):
    lacking = [
        name
        for name in {*SURFACE[module]["names"], *SURFACE[module].get("__all__", ())}
        if not hasattr(load(module), name)
        and f"{module}.{name}" not in NO_SUCH_NAME
        and not NO_SUCH_IMPLEMENTATION.fullmatch(f"{module}.{name}")
    ]
    assert lacking == []


def test_the_submodules_are_attributes_of_the_package_without_being_imported():
    for module in SURFACE:
        if module != ".":
            assert getattr(leveret, module) is load(module)


def test_functions_take_what_aio_pika_s_take():
    wrong = []
    for module in SURFACE:
        for name, entry in SURFACE[module]["names"].items():
            full = f"{module}.{name}"
            if "signature" not in entry or full in NO_SUCH_NAME or NO_SUCH_IMPLEMENTATION.fullmatch(full):
                continue
            function = getattr(load(module), name)
            wrong += [f"{full}: {each}" for each in differences(positionally(entry["signature"]), positional(function))]
            if inspect.iscoroutinefunction(function) != (entry["kind"] == "async def"):
                wrong.append(f"{full}: is {entry['kind']}")
    assert wrong == []


def positionally(signature: str) -> str:
    """*signature*, with the one parameter of a function that has one called ``_``: nobody gives it by its name."""
    given = parameters(signature)
    return "(_)" if len(given) == 1 and given[0][1] == "positional" else signature


def positional(function: Any) -> Any:
    if len(inspect.signature(function).parameters) == 1:
        return lambda _: None
    return function


@pytest.mark.parametrize(("module", "name", "member", "what"), list(members()))
def test_a_class_has_every_member(module, name, member, what):
    cls = getattr(load(module), name)
    if f"{name}.{member}" in NO_SUCH_MEMBER:
        assert not hasattr(cls, member), f"take {name}.{member} out of the table"
        return
    annotated = any(member in getattr(base, "__annotations__", {}) for base in cls.__mro__)
    assert hasattr(cls, member) or annotated or member in attributes_of(cls)


def attributes_of(cls: type) -> set[str]:
    """What the docstrings and constructors of leveret's classes set."""
    own = [base for base in cls.__mro__ if base.__module__.startswith("leveret.")]
    return {name for base in own for name in re.findall(r"self\.(\w+)\b[^=\n]* = ", inspect.getsource(base))}


@pytest.mark.parametrize(
    ("module", "name", "member", "what"), [each for each in members() if re.match(r"(async )?\(", each[3])]
)
def test_a_method_takes_what_aio_pika_s_takes(module, name, member, what):
    full = f"{name}.{member}"
    if full in NO_SUCH_MEMBER or full in OTHER_SIGNATURE:
        return
    method = getattr(getattr(load(module), name), member)
    if method is object.__init__:  # of a NamedTuple
        method = getattr(load(module), name).__new__
    if inspect.isclass(getattr(load(module), name)) and issubclass(getattr(load(module), name), BaseException):
        return
    signature = what.removeprefix("async ")
    special = member.startswith("__") and member != "__init__"
    assert differences(signature, method, is_special=special) == []
    if not special and member != "__init__":
        assert inspect.iscoroutinefunction(method) or not what.startswith("async ")


@pytest.mark.parametrize("full", sorted(OTHER_SIGNATURE))
def test_a_signature_in_the_table_still_differs(full):
    wrong = []
    for module, name, member, what in members():
        if f"{name}.{member}" == full:
            wrong += differences(what.removeprefix("async "), getattr(getattr(load(module), name), member))
    assert wrong, f"take {full} out of the table"


@pytest.mark.parametrize(("module", "name"), [each for each in classes() if each[0] in {".", "exceptions"}])
def test_an_error_is_caught_by_the_same_except_clauses(module, name):
    cls = getattr(load(module), name)
    if issubclass(cls, BaseException):
        bases = set(SURFACE[module]["names"][name]["mro"]) - {"AMQPException"}
        assert bases <= {base.__name__ for base in cls.__mro__}


@pytest.mark.parametrize("name", ["ExchangeType", "DeliveryMode", "TransactionState"])
def test_the_enumerations_have_aio_pika_s_members(name):
    expected = SURFACE["abc"]["names"][name]["values"]
    own = {each: member.value for each, member in getattr(leveret.abc, name).__members__.items()}
    assert own.items() >= expected.items()


@pytest.mark.parametrize("name", ["MessageInfo", "SSLOptions"])
def test_the_dictionaries_have_the_keys(name):
    keys = set(SURFACE["abc"]["names"][name]["members"])
    assert keys <= get_type_hints(getattr(leveret.abc, name)).keys()


def test_constants_have_aio_pika_s_values():
    assert leveret.abc.MILLISECONDS == 1000
    assert leveret.abc.NoneType is type(None)
    assert leveret.abc.ConsumerTag is str


def test_the_version_has_three_numbers():
    assert re.fullmatch(r"\d+\.\d+\.\d+", leveret.__version__)


def test_a_handle_passes_for_its_abstract_class():
    pairs = [
        (leveret.Channel, "AbstractChannel"),
        (leveret.RobustChannel, "AbstractChannel"),
        (leveret.RobustChannel, "AbstractRobustChannel"),
        (leveret.RobustConnection, "AbstractRobustConnection"),
        (leveret.RobustQueue, "AbstractQueue"),
        (leveret.RobustExchange, "AbstractExchange"),
        (leveret.IncomingMessage, "AbstractMessage"),
        (leveret.IncomingMessage, "AbstractIncomingMessage"),
    ]
    for cls, name in pairs:
        assert issubclass(cls, getattr(leveret.abc, name))
    assert not issubclass(leveret.Channel, leveret.abc.AbstractRobustChannel)


@pytest.mark.parametrize("module", NAMES)
def test_names_that_aio_pika_s_modules_only_pass_on_can_be_imported_from_them(module):
    own = importlib.import_module(f"leveret.{module}")
    lacking = {name for name in NAMES[module].split() if not hasattr(own, name)}
    expected = {name for name in lacking if f"{module}.{name}" in NO_SUCH_NAME}
    expected |= set(NOT_PASSED_ON.get(module, "").split())
    expected |= {name for name in lacking if NO_SUCH_IMPLEMENTATION.fullmatch(f"{module}.{name}")}
    assert lacking == expected


def test_what_is_passed_on_is_the_same_wherever_it_is_imported_from():
    from leveret.channel import AbstractChannel, aiormq  # type: ignore[attr-defined]
    from leveret.robust_connection import log, parse_bool  # type: ignore[attr-defined]
    from leveret.transaction import commands  # type: ignore[attr-defined]

    assert AbstractChannel is leveret.Channel
    assert commands is pamqp.commands
    assert aiormq is leveret.compat.aiormq
    assert log is logging.getLogger("leveret.robust_connection")
    assert (parse_bool("yes"), parse_bool("no"), parse_bool(True)) == (True, False, True)


@pytest.mark.parametrize(("text", "seconds"), [("5", 5), ("2.0", 2), ("0.5", 0.5), ("soon", 0), (3, 3), (1.5, 1.5)])
def test_a_parameter_of_the_user_s_own_may_be_a_timeout(text, seconds):
    assert leveret.robust_connection.parse_timeout(text) == seconds


def test_a_module_still_lacks_what_nobody_has():
    with pytest.raises(ImportError, match="cannot import name 'AbstractTypo'"):
        from leveret.channel import AbstractTypo  # type: ignore[attr-defined]  # noqa: F401
    with pytest.raises(AttributeError, match=r"module 'leveret.channel' has no attribute 'Connnection'"):
        leveret.channel.Connnection  # noqa: B018
