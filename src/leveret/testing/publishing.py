"""The publishing half of the broker's side of a channel: gathering content, routing, returns and confirms.

What is confirmed while one read of the socket is handled is told by one ack.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from leveret.exceptions import ProtocolError
from leveret.testing import frames
from leveret.testing.messages import (
    HAS_EXPIRATION,
    HAS_HEADERS,
    HAS_REPLY_TO,
    Stored,
    check_expiration,
    check_user,
    copies,
    names_of,
)
from leveret.testing.refusals import Refusal, exchange_name, octets
from leveret.testing.vhost import REPLY_TO
from leveret.wire.codec import BODY, HEADER, decode_content_header, encode_ack, encode_nack

if TYPE_CHECKING:
    from collections.abc import Iterable

    from leveret.testing.channel import Channel
    from leveret.testing.exchanges import Exchange
    from leveret.testing.queues import Queue

_ENDLESS = 536_870_912
"""A body that RabbitMQ 4.3 does not even begin to read."""
_ERLANG_LINE = 46
"""How much of a term in an error text fits into a line, there where it stands."""


class Content(NamedTuple):
    """A publish whose content has not come yet."""

    route: bytes
    mandatory: bool
    exchange: Exchange


class Publisher:
    """What one channel publishes."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._server = channel.server
        self._content: Content | None = None
        self._size = -1
        self._properties = b""
        self._body: list[bytes] = []
        self._have = 0
        self._published = 0
        self._lowest_unconfirmed = 1
        self._confirmed: list[int] = []  # tags of this round, in order
        self._tx: list[tuple[Exchange, Stored, bool, list[Queue]]] = []
        self._permitted: set[str] = set()

    @property
    def is_gathering(self) -> bool:
        """Whether a publish waits for its content."""
        return self._content is not None

    def forget_permissions(self) -> None:
        """Look anew at what the user may publish to."""
        self._permitted.clear()

    def on_content(self, kind: int, payload: bytes) -> None:
        """A frame that is, or ought to be, the next of a publish.

        Raises:
            Refusal: it is not.
        """
        if self._content is None:
            raise Refusal(505, "expected method frame, got non method frame instead", class_id=0, method_id=0)
        if kind == HEADER and self._size < 0:
            self._on_header(payload)
        elif kind == BODY and self._size >= 0:
            self._on_body(payload)
        else:
            wanted = "header" if self._size < 0 else "body"
            raise _of_publish(505, f"expected content {wanted} for class 60, got non content {wanted} frame instead")

    def on_publish(self, payload: bytes) -> None:
        """A ``basic.publish``, whose content follows.

        Raises:
            Refusal: what is wrong with it.
        """
        if self._server.faults.awaits("basic.publish"):
            self._server.faults.apply("basic.publish")
        try:
            route, mandatory, immediate = frames.decode_publish(payload)
        except IndexError:
            raise Refusal(501, f"cannot decode {octets(payload[4:])}", class_id=60, method_id=40) from None
        if immediate:
            raise Refusal(540, "immediate=true")
        name = names_of(route)[0]
        exchange = self._channel.vhost.exchanges.get(name)
        if exchange is None:
            raise Refusal(404, f"no {exchange_name(name, self._channel.vhost.name)}")
        if name not in self._permitted:
            self._channel.session.check("write", name, is_queue=False)
            self._permitted.add(name)
        if exchange.internal:
            raise Refusal(403, f"cannot publish to internal {exchange_name(name, self._channel.vhost.name)}")
        self._content = Content(route, mandatory, exchange)

    def _on_header(self, payload: bytes) -> None:
        try:
            size, self._properties = decode_content_header(payload)
        except ProtocolError as error:
            raise Refusal(501, str(error), class_id=60, method_id=40) from None
        if size > _ENDLESS and self._server.dialect.checks_body_size:
            raise Refusal(
                501, f"content body size {size} exceeds maximum allowed size {_ENDLESS}", class_id=60, method_id=40
            )
        self._size = size
        if not size:
            self._complete(b"")

    def _on_body(self, payload: bytes) -> None:
        self._have += len(payload)
        if self._size > self._server.max_message_size and self._have <= self._size:
            if self._have == self._size:  # only counted so far: it is refused where it ends, as by RabbitMQ
                self._refuse_size(self._size)
        elif self._have < self._size:
            self._body.append(payload)
        elif self._have > self._size:
            if self._server.dialect.checks_body_size:
                raise Refusal(501, "content body frame exceeds remaining content size", class_id=60, method_id=40)
        elif self._body:
            self._body.append(payload)
            self._complete(b"".join(self._body))
        else:
            self._complete(payload)

    def _complete(self, body: bytes) -> None:
        content, properties = self._content, self._properties
        assert content is not None
        self.drop_content()
        message = Stored(content.route, properties, body)
        flags = message.flags
        if flags:
            user, user_first = self._channel.session.user, self._server.dialect.checks_user_first
            try:
                if user_first:
                    check_user(message, user.name, may_impersonate=user.impersonates)
                if flags & HAS_EXPIRATION and (expiration := message.decoded().expiration) is not None:
                    check_expiration(expiration)
                if flags & HAS_HEADERS and b"CC" in properties:
                    message = self._with_copies(message)
                if flags & HAS_REPLY_TO and REPLY_TO.encode() in properties:
                    message = self._with_reply_address(message)
                if not user_first:
                    check_user(message, user.name, may_impersonate=user.impersonates)
            except Refusal as refusal:
                refusal.class_id, refusal.method_id = 60, 40
                raise
        at_once = not self._server.dialect.holds_replies and self._channel.vhost.is_reply(content.exchange, message)
        if self._channel.mode == "tx" and not at_once:
            queues = self._channel.vhost.route(content.exchange, message)
            self._tx.append((content.exchange, message, content.mandatory, queues))
            return
        self._route(content.exchange, message, content.mandatory)

    def _refuse_size(self, size: int) -> None:
        self.drop_content()
        most = self._server.max_message_size
        raise _of_publish(406, f"message size {size} is larger than configured max size {most}")

    def drop_content(self) -> None:
        """Forget what was gathered of a publish."""
        self._content = None
        self._size = -1
        self._have = 0
        if self._body:
            self._body = []

    def _with_copies(self, message: Stored) -> Stored:
        also, blind = copies(message)
        if "BCC" in message.headers:  # which nobody is to see
            message = message.changed(headers={k: v for k, v in message.headers.items() if k != "BCC"})
        message.also, message.blind = also, blind
        return message

    def _with_reply_address(self, message: Stored) -> Stored:
        if message.decoded().reply_to != REPLY_TO:
            return message
        if self._channel.reply_consumer is None:
            raise Refusal(406, "fast reply consumer does not exist")
        return message.changed(reply_to=f"{REPLY_TO}.{self._channel.reply_token}")

    def _route(self, exchange: Exchange, message: Stored, mandatory: bool, queues: list[Queue] | None = None) -> bool:
        routed, taken = self._channel.vhost.publish(exchange, message, queues)
        self._server.note(message, routed)
        if not routed and mandatory:
            self._channel.session.send(
                frames.encode_return(self._channel.number, 312, message.route)
                + frames.encode_content(
                    self._channel.number, message.properties, message.body, self._channel.session.frame_max
                )
            )
        if self._channel.mode == "confirm":
            self._published += 1
            faults = self._server.faults
            if faults.nacks and faults.take_nack():
                taken = False
            if faults.confirm_delay:
                tag = self._published
                faults.delay(self._server.clock, lambda: self._confirm(tag, taken))
            else:
                self._confirm(self._published, taken)
        return taken

    def _confirm(self, tag: int, taken: bool) -> None:
        if self._channel.is_closing or self._channel.session.channels.get(self._channel.number) is not self._channel:
            return
        if taken:
            if not self._confirmed:
                self._channel.session.will_confirm(self._channel)
            self._confirmed.append(tag)
        else:
            self.flush_confirms()
            self._channel.session.send(encode_nack(self._channel.number, tag, False, False))
            if tag == self._lowest_unconfirmed:
                self._lowest_unconfirmed = tag + 1

    def flush_confirms(self) -> None:
        """Send what was confirmed since: one ack for what is contiguous."""
        tags, self._confirmed = self._confirmed, []
        first = 0
        for index, tag in enumerate(tags):
            if index + 1 < len(tags) and tags[index + 1] == tag + 1:
                continue
            self._send_confirm(tags[first], tag)
            first = index + 1

    def _send_confirm(self, first: int, last: int) -> None:
        if first == last:
            self._channel.session.send(encode_ack(self._channel.number, last, False))
        elif first == self._lowest_unconfirmed:
            self._channel.session.send(encode_ack(self._channel.number, last, True))
        else:
            for tag in range(first, last + 1):
                self._channel.session.send(encode_ack(self._channel.number, tag, False))
        if first == self._lowest_unconfirmed:
            self._lowest_unconfirmed = last + 1

    # ---------------------------------------------------------------------------------------------- transactions

    def commit(self) -> bool:
        """Publish what the transaction holds, to where it was routed before; whether every queue took it."""
        held, self._tx = self._tx, []
        taken = True
        for exchange, message, mandatory, queues in held:
            if self._server.dialect.deleted_in_tx == "by-name":
                queues = self._now(exchange, message, queues)
            elif self._server.dialect.deleted_in_tx == "fatal":
                queues = [self._successor(queue) for queue in queues]
            taken &= self._route(exchange, message, mandatory, queues)
        return taken

    def _successor(self, queue: Queue) -> Queue:
        """What RabbitMQ 4.3 finds by the name of *queue* when it commits; a classic one has to be the same."""
        vhost = self._channel.vhost
        found = vhost.queues.get(queue.name)
        if found is None:
            resource = f'{{resource,<<"{vhost.name}">>,queue,<<"{queue.name}">>}}'
            if len(resource) > _ERLANG_LINE:
                resource = resource.replace(",queue,", f",queue,\n{' ' * 35}")
            raise Refusal(506, f"failed to deliver message: {{not_found,\n{' ' * 31}{resource}}}")
        if found.type != queue.type:
            raise Refusal(541, "", class_id=0, method_id=0)
        return queue if queue.type == "classic" else found

    def _now(self, exchange: Exchange, message: Stored, queues: Iterable[Queue]) -> list[Queue]:
        """The queues that have now the names of those that *message* was routed to."""
        vhost = self._channel.vhost
        if not exchange.name:
            return vhost.route(exchange, message)  # to names, whether there were queues or not
        return [vhost.queues[each.name] for each in queues if each.name in vhost.queues]

    def rollback(self) -> None:
        """Forget what the transaction holds."""
        self._tx.clear()


def _of_publish(code: int, sentence: str) -> Refusal:
    return Refusal(code, sentence, class_id=60, method_id=40)
