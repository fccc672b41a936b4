"""Logger names: everything logs below ``leveret``."""

from __future__ import annotations

import logging

logger = logging.getLogger("leveret")


def get_logger(name: str) -> logging.Logger:
    """The logger of the module *name*, a child of ``leveret``."""
    return logger.getChild(name.removeprefix("leveret."))


def printable(text: str) -> str:
    """*text* with control characters escaped, so that names from the wire cannot forge log lines."""
    return text.encode("unicode_escape").decode("ascii") if not text.isprintable() else text
