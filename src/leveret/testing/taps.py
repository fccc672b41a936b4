"""What a test lets look at all bytes, and change them. A mistake in it is the test's, and costs no client."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from leveret.testing.views import ConnectionView

if TYPE_CHECKING:
    from leveret.testing.session import Session

_log = logging.getLogger("leveret.testing")


class Tap:
    """A function of a test, and whether it was told to be faulty.

    Args:
        function: as of :meth:`~leveret.testing.Broker.on_bytes`.
    """

    def __init__(self, function: Callable[[ConnectionView | None, str, bytes], object]) -> None:
        self._function = function
        self._is_told = False

    def __call__(self, session: Session, direction: str, data: bytes) -> bytes:
        """*data*, or what the function makes of it."""
        seen = ConnectionView.of(session) if session.stage == "running" else None
        try:
            changed = self._function(seen, direction, data)
        except Exception as error:
            self._tell(f"raised {type(error).__name__}: {error}", error)
            return data
        if changed is None:
            return data
        if not isinstance(changed, bytes | bytearray):
            self._tell(f"returned {reprlib.repr(changed)}, which is not bytes or None", None)
            return data
        return bytes(changed)

    def _tell(self, what: str, error: Exception | None) -> None:
        """Say it once: bytes come often."""
        if self._is_told:
            return
        self._is_told = True
        name = getattr(self._function, "__qualname__", repr(self._function))
        _log.error(
            "the tap %s of on_bytes() %s: bytes are passed on unchanged whenever it fails, and this is told once",
            name,
            what,
            exc_info=error,
        )
