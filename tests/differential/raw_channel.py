"""A channel on leveret's transport that refuses nothing and hides nothing: whatever the broker says is kept."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from pamqp.commands import Basic, Channel

from leveret.wire.codec import (
    BODY,
    HEADER,
    METHOD,
    Deliver,
    GetOk,
    Properties,
    PublishEncoder,
    Return,
    decode_deliver,
    decode_get_ok,
    decode_properties,
    decode_return,
    decode_route,
    encode_properties,
)
from leveret.wire.content import ContentAssembler
from leveret.wire.methods import decode_method, is_reply, make

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pamqp.base import Frame

    from leveret.wire.transport import Transport

_CONTENT: dict[int, Callable[[bytes], Deliver | GetOk | Return]] = {
    (60 << 16) + 60: decode_deliver,
    (60 << 16) + 71: decode_get_ok,
    (60 << 16) + 50: decode_return,
}


class Message(NamedTuple):
    """A message as it came: by ``basic.deliver``, ``basic.get-ok`` or ``basic.return``."""

    method: Deliver | GetOk | Return
    exchange: str
    routing_key: str
    properties: dict[str, Any]
    body: bytes


class Closed(NamedTuple):
    """The broker closed it."""

    what: str
    code: int
    text: str
    class_id: int
    method_id: int


class RawChannel:
    """One channel.

    Attributes:
        heard: what came without being asked for, in order: `Message`, or the method.
        closed: why it is closed.
    """

    def __init__(self, transport: Transport) -> None:
        self.heard: list[Message | Frame] = []
        self.closed: Closed | None = None
        self.consumers: dict[bytes, Any] = {}
        self.on_ack = None
        self.unlimited = ()
        self.has_idle_consumer = False
        self._replies: deque[tuple[Frame, asyncio.Future[Any]]] = deque()
        self._content = ContentAssembler()
        self._transport = transport
        self.number = transport.attach(self)
        self._encoder = PublishEncoder(self.number, 131_072)

    @property
    def is_awaited(self) -> bool:
        """Whether a reply is due."""
        return bool(self._replies)

    @property
    def is_assembling(self) -> bool:
        """Whether content is incomplete."""
        return not self._content.is_empty

    # -- out

    def request(self, method: Frame) -> asyncio.Future[Frame | Message | Closed]:
        """Send *method*; the future is its reply, or the close that came in its place."""
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self.closed is not None:
            reply.set_result(self.closed)
        else:
            self._replies.append((method, reply))
            self._transport.send(self.number, method)
        return reply

    def send(self, method: Frame) -> None:
        """Send *method*, which has no reply."""
        if self.closed is None:
            self._transport.send(self.number, method)

    def publish(
        self, exchange: str, routing_key: str, mandatory: bool, properties: Mapping[str, Any], body: bytes
    ) -> None:
        """``basic.publish``"""
        if self.closed is None:
            encoded = encode_properties(Properties(**properties))
            self._transport.output.write(self._encoder.encode(exchange, routing_key, mandatory, encoded, body))

    # -- in

    def on_frame(self, kind: int, payload: bytes) -> None:
        """A frame of this channel."""
        if kind == METHOD:
            index = int.from_bytes(payload[:4], "big")
            if index in _CONTENT:
                self._content.begin(_CONTENT[index](payload))
            else:
                self._on_method(decode_method(payload))
        elif kind in (HEADER, BODY):
            add = self._content.add_header if kind == HEADER else self._content.add_body
            content = add(payload)
            if content is not None:
                found = decode_properties(content.properties)
                assert found.error is None, found.error
                properties = {name: value for name, value in found.properties._asdict().items() if value is not None}
                message = Message(content.method, *decode_route(content.method.route), properties, content.body)
                if isinstance(content.method, GetOk):
                    self._replies.popleft()[1].set_result(message)
                else:
                    self.heard.append(message)

    def _on_method(self, method: Frame) -> None:
        if isinstance(method, Channel.Close):
            self._transport.send(self.number, make(Channel.CloseOk))
            self._transport.detach(self.number)
            self._end(
                Closed("channel", method.reply_code, method.reply_text, method.class_id or 0, method.method_id or 0)
            )
        elif isinstance(method, Channel.CloseOk):
            self._transport.detach(self.number)
            self._replies.popleft()[1].set_result(method)
            self._end(Closed("channel", 200, "closed by the client", 0, 0))
        elif self._replies and is_reply(type(self._replies[0][0]), method):
            self._replies.popleft()[1].set_result(method)
        else:
            assert isinstance(method, Basic.Ack | Basic.Nack | Basic.Cancel), method
            self.heard.append(method)

    def on_connection_lost(self, error: Exception) -> None:
        """The connection is gone, and the channel with it."""
        code, text = getattr(error, "reply_code", 0), getattr(error, "reply_text", str(error))
        ids = getattr(error, "class_id", 0) or 0, getattr(error, "method_id", 0) or 0
        self._end(Closed("connection", code, text, *ids))

    def _end(self, why: Closed) -> None:
        if self.closed is None:
            self.closed = why
        while self._replies:
            self._replies.popleft()[1].set_result(self.closed)
