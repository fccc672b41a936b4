"""Docstrings (architecture.md §8): everything public has one, and calls say what they take and what they raise.

The rule for sections, of every awaitable function or method that ``leveret.__all__`` and the patterns lead to, and of
every method of ``leveret.testing.Broker``:

* one that takes an argument besides ``self`` and ``timeout`` has ``Raises:``, or says in words that it never raises;
* one that takes three or more of them (besides ``self`` and ``timeout``) has ``Args:``.
"""

from __future__ import annotations

import inspect
import re

import pytest

import leveret
import leveret.testing


def public() -> dict[str, object]:
    """Qualified name → each public class, function, method and property."""
    found: dict[str, object] = {}
    todo = [(name, getattr(leveret, name)) for name in leveret.__all__]
    todo += [
        (f"exceptions.{name}", value)
        for name, value in vars(leveret.exceptions).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == "leveret.exceptions"
    ]
    todo += [(f"patterns.{name}", getattr(leveret.patterns, name)) for name in leveret.patterns.__all__]
    todo += [(f"pool.{name}", getattr(leveret.pool, name)) for name in ("Pool", "PoolInstance")]
    todo += [(f"testing.{name}", getattr(leveret.testing, name)) for name in leveret.testing.__all__]
    for name, value in todo:
        if inspect.isclass(value):
            found[name] = value
            for attribute, member in inspect.getmembers_static(value):
                inherited = not any(attribute in vars(base) for base in value.__mro__ if "leveret" in base.__module__)
                if attribute.startswith("_") or inherited:
                    continue
                if isinstance(member, staticmethod | classmethod):
                    member = member.__func__
                if inspect.isfunction(member) or isinstance(member, property):
                    found[f"{name}.{attribute}"] = member
        elif inspect.isfunction(value):
            found[name] = value
    return found


PUBLIC = public()
AWAITABLE = {name: value for name, value in PUBLIC.items() if inspect.iscoroutinefunction(value)}
CALLS = AWAITABLE | {
    name: value for name, value in PUBLIC.items() if name.startswith("testing.Broker.") and inspect.isfunction(value)
}


def arguments(function: object) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in {"self", "cls", "timeout"}]


def sections(function: object) -> set[str]:
    return set(re.findall(r"^(\w+):", inspect.getdoc(function) or "", re.MULTILINE))


def test_the_walk_finds_the_api():
    assert {"connect", "Channel.declare_queue", "Exchange.publish", "IncomingMessage.ack"} <= AWAITABLE.keys()
    assert {"Message", "Message.body_size", "Connection.channel", "exceptions.QueueEmpty"} <= PUBLIC.keys()
    assert {"testing.Broker", "testing.Broker.fail_next", "testing.QueueView"} <= PUBLIC.keys()


@pytest.mark.parametrize("name", PUBLIC)
def test_everything_public_has_a_docstring_of_its_own(name):
    value = PUBLIC[name]
    doc = value.__doc__
    assert doc, f"{name} has no docstring"
    assert doc.strip()
    if inspect.isclass(value):
        assert vars(value).get("__doc__"), f"{name} has only its base's docstring"


def test_calls_that_take_arguments_say_what_they_raise():
    lacking = [
        name
        for name, value in CALLS.items()
        if arguments(value) and "Raises" not in sections(value) and "never raises" not in (inspect.getdoc(value) or "")
    ]
    assert lacking == []


def test_calls_that_take_several_arguments_describe_them():
    lacking = [name for name, value in CALLS.items() if len(arguments(value)) > 2 and "Args" not in sections(value)]
    assert lacking == []


@pytest.mark.parametrize("name", CALLS)
def test_an_args_section_names_every_argument(name):
    doc = inspect.getdoc(CALLS[name]) or ""
    match = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", doc, re.MULTILINE | re.DOTALL)
    if match is None:
        return
    described = set(re.findall(r"^    \**(\w+):", match[1], re.MULTILINE))
    taken = {each for each in inspect.signature(CALLS[name]).parameters if each not in {"self", "cls"}}
    assert described <= taken, f"{name} describes what it does not take: {described - taken}"
    assert taken - described <= {"timeout"}, f"{name} does not describe {taken - described}"


@pytest.mark.parametrize("name", PUBLIC)
def test_a_docstring_begins_with_one_sentence_on_one_line(name):
    first, _, rest = (PUBLIC[name].__doc__ or "").strip().partition("\n")
    assert not rest or rest.startswith("\n"), f"{name}: {first!r} goes on in the next line"
