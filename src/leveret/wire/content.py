"""Putting together what comes in several frames: method, content header, bodies (AMQP 0-9-1 §2.3.5.2).

They follow each other without anything between them on their channel; other channels' frames and heartbeats
may come between. Nothing is allocated by the size that a header declares.
"""

from __future__ import annotations

from typing import NamedTuple

from leveret.exceptions import MessageTooLarge, ProtocolError
from leveret.wire.codec import Deliver, GetOk, Return, decode_content_header

MAX_MESSAGE_SIZE = 536_870_912
"""RabbitMQ's own upper limit; a header that announces more is refused before a byte of it is kept."""


class Content(NamedTuple):
    """A method with its properties, still encoded, and its body."""

    method: Deliver | GetOk | Return
    properties: bytes
    body: bytes


class ContentAssembler:
    """The content that is arriving on one channel, if any."""

    __slots__ = ("_method", "_parts", "_properties", "_remaining")

    def __init__(self) -> None:
        self.drop()

    def drop(self) -> None:
        """Forget what has come so far."""
        self._method: Deliver | GetOk | Return | None = None
        self._properties: bytes | None = None
        self._parts: list[bytes] = []
        self._remaining = 0

    @property
    def is_empty(self) -> bool:
        """Whether no content has begun."""
        return self._method is None

    def begin(self, method: Deliver | GetOk | Return) -> None:
        """A method came that content follows."""
        self._method = method

    def add_header(self, payload: bytes) -> Content | None:
        """Take a header frame; the content, if it is complete with that.

        Raises:
            ProtocolError: no method announced it, or it is malformed.
            MessageTooLarge: it announces more than RabbitMQ can hold.
        """
        if self._method is None or self._properties is not None:
            raise ProtocolError("a content header that no method announced", reply_code=505, data=payload)
        self._remaining, self._properties = decode_content_header(payload)
        if self._remaining > MAX_MESSAGE_SIZE:
            raise MessageTooLarge(f"a message of {self._remaining} bytes is over the limit of {MAX_MESSAGE_SIZE}")
        return None if self._remaining else self._complete()

    def add_body(self, payload: bytes) -> Content | None:
        """Take a body frame, which may be empty; the content, if it is complete with that.

        Raises:
            ProtocolError: no header announced it, or not that much.
        """
        if self._properties is None:
            raise ProtocolError("a content body that no header announced", reply_code=505, data=payload[:64])
        self._remaining -= len(payload)
        if self._remaining < 0:
            raise ProtocolError("a content body longer than its header announced", reply_code=501, data=payload[:64])
        self._parts.append(payload)
        return None if self._remaining else self._complete()

    def _complete(self) -> Content:
        method, properties, parts = self._method, self._properties, self._parts
        assert method is not None
        assert properties is not None
        self.drop()
        return Content(method, properties, parts[0] if len(parts) == 1 else b"".join(parts))
