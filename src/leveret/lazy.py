"""``leveret.abc``, ``leveret.pool`` and the like: loaded when somebody asks for them."""

from __future__ import annotations

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
