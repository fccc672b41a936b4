"""What is known to differ, and why; docs/howto/testing.md lists it too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.differential.operations import Op


def normalised(view: Any, operations: Sequence[Op], version: str) -> Any:
    """*view* without what is known to differ."""
    return view
