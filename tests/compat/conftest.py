"""What the tests of compatibility begin with."""

from __future__ import annotations

from tests.broker.conftest import channel, connection, link, queue, robust

__all__ = ["channel", "connection", "link", "queue", "robust"]
