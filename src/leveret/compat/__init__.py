"""Other packages' ``import aio_pika`` gives leveret, once :func:`install` was called."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

AIO_PIKA = (
    "abc",
    "channel",
    "connection",
    "exceptions",
    "exchange",
    "log",
    "message",
    "patterns",
    "patterns.base",
    "patterns.master",
    "patterns.rpc",
    "pool",
    "queue",
    "robust_channel",
    "robust_connection",
    "robust_exchange",
    "robust_queue",
    "tools",
    "transaction",
    "types",
)
"""The modules of aio-pika; the last is of release 6."""

AIORMQ = ("abc", "connection", "exceptions")
"""Those of aiormq that its users import."""


def install() -> None:
    """Have ``import aio_pika`` and ``import aiormq`` give leveret, in this process.

    Call it before anything imports them, so at the top of the program::

        import leveret.compat

        leveret.compat.install()

        import faststream.rabbit

    It may be called again. Neither of the two needs to be installed; where they are, leveret comes first.

    Raises:
        RuntimeError: the real ones have been imported already, so that some of the program would go on using them.
    """
    modules = _modules()
    for name in ("aio_pika", "aiormq"):
        present = sys.modules.get(name)
        if present is not None and present is not modules[name]:
            raise RuntimeError(
                f"{name} is imported already, from {getattr(present, '__file__', None)}: call"
                " leveret.compat.install() before anything that imports it"
            )
    sys.modules.update(modules)


def _modules() -> dict[str, ModuleType]:
    """Each name that is to be imported, and what it gives."""
    found = {"aio_pika": importlib.import_module("leveret")}
    for module in AIO_PIKA:
        if _exists(f"leveret.{module}"):
            found[f"aio_pika.{module}"] = importlib.import_module(f"leveret.{module}")
    found["aiormq"] = importlib.import_module("leveret.compat.aiormq")
    for module in AIORMQ:
        found[f"aiormq.{module}"] = importlib.import_module(f"leveret.compat.aiormq.{module}")
    return found


def _exists(name: str) -> bool:
    parent = name.rpartition(".")[0]
    return (not parent or _exists(parent)) and importlib.util.find_spec(name) is not None
