"""Names that are loaded when somebody asks for them: ``leveret.abc`` and the like, and those that modules pass on."""

from __future__ import annotations

import sys
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    """The module of the package that is called *name*; the package uses this function as its own.

    Raises:
        AttributeError: there is none.
    """
    import importlib.util  # which is not needed otherwise

    if name.startswith("_") or importlib.util.find_spec(f"leveret.{name}") is None:
        raise AttributeError(f"module 'leveret' has no attribute {name!r}")
    return importlib.import_module(f"leveret.{name}")


def pass_on(module: str) -> None:
    """Let *module* have, for imports from there, what aio-pika's module of that name only passes on from others."""

    def look_up(name: str) -> object:
        if not name.startswith("_"):
            from leveret.passed_on import find

            found = find(name, module)
            if found is not None:
                return found
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    vars(sys.modules[module])["__getattr__"] = look_up
