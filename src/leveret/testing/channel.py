"""The broker's side of a channel: what it consumes, and what waits for its acks.

A delivery goes to the connection's buffer at once. Publishes are :mod:`leveret.testing.publishing`'s; everything else
is a method of :mod:`leveret.testing.methods`, which calls back into this.
"""

from __future__ import annotations

import secrets
import struct
from typing import TYPE_CHECKING, NamedTuple

from pamqp.commands import Basic
from pamqp.commands import Channel as ChannelMethods

from leveret.testing import frames
from leveret.testing.consumers import Consumer
from leveret.testing.messages import Entry, Stored
from leveret.testing.publishing import Publisher
from leveret.testing.refusals import Refusal, octets, queue_name
from leveret.wire.codec import METHOD
from leveret.wire.methods import make

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from leveret.testing.queues import Queue
    from leveret.testing.session import Session


class Unacked(NamedTuple):
    """A delivery that waits for its ack; *consumer* is ``None`` for ``basic.get``."""

    tag: int
    queue: Queue
    entry: Entry
    consumer: Consumer | None
    time: float


class Channel:
    """One channel of a :class:`~leveret.testing.session.Session`.

    Attributes:
        mode: ``"confirm"``, ``"tx"`` or neither.
        prefetch: what the next consumer may have in hand; 0 is any number.
        global_prefetch: what all consumers of classic queues together may.
        is_closing: whether the broker closed it and waits for the client's close-ok.
        timed_out: whether it was closed because an ack was overdue, which RabbitMQ repeats.
        queue: the name of the queue that was declared last, which an empty name means.
        publisher: the half of the channel that publishes.
    """

    def __init__(self, session: Session, number: int) -> None:
        self.session = session
        self.server = session.server
        self.vhost = session.vhost
        self.number = number
        self.consumers: dict[str, Consumer] = {}
        self.unacked: dict[int, Unacked] = {}
        self.mode = ""
        self.prefetch = 0
        self.global_prefetch = 0
        self.is_closing = False
        self.timed_out = False
        self.queue = ""
        self.reply_consumer: Consumer | None = None
        self.reply_token = ""
        self._volume = 0  # what counts for the global prefetch
        self._next_tag = 1
        self.publisher = Publisher(self)
        self._tx_settled: list[tuple[list[Unacked], str]] = []

    def __repr__(self) -> str:
        return f"<Channel {self.number} of {self.session!r}>"

    # --------------------------------------------------------------------------------------------------- frames

    def on_frame(self, kind: int, payload: bytes) -> None:
        """One frame of this channel.

        Raises:
            Refusal, ProtocolError: what is wrong with it.
        """
        if kind != METHOD or self.publisher.is_gathering:
            self.publisher.on_content(kind, payload)
            return
        index = payload[:4]
        if index == frames.PUBLISH:
            self.publisher.on_publish(payload)
        elif index == frames.ACK and not self.server.faults.awaits("basic.ack"):
            self._on_ack(payload)
        else:
            self.session.on_channel_method(self, payload)

    # ------------------------------------------------------------------------------------------------ delivering

    def can_take(self, consumer: Consumer) -> bool:
        """Whether there is room for one more message of *consumer*."""
        if not self.session.can_write:
            return False
        if consumer.prefetch and consumer.in_hand >= consumer.prefetch:
            return False
        if not self.global_prefetch or self._volume < self.global_prefetch:
            return True
        return self.vhost.queues[consumer.queue_name].type != "classic"

    def set_prefetch(self, count: int, *, of_channel: bool) -> None:
        """``basic.qos``: how many messages each further consumer, or all of the channel, may have in hand.

        As in RabbitMQ, a prefetch of consumers ends that of the channel; when that begins, it counts what was fetched
        by ``basic.get`` as well.
        """
        had_limit = self.global_prefetch > 0
        if not of_channel:
            self.prefetch = count
        elif not had_limit:
            self._volume = len(self.unacked)
        self.global_prefetch = count if of_channel else 0
        if had_limit:
            self.dispatch()

    def deliver(self, consumer: Consumer, entry: Entry) -> None:
        """Send *entry* to the client."""
        tag = self._next_tag
        self._next_tag = tag + 1
        message = entry.message
        queue = self.vhost.queues[consumer.queue_name]
        if not consumer.no_ack:
            consumer.in_hand += 1
            if self.global_prefetch and queue.type == "classic":
                self._volume += 1
            self.unacked[tag] = Unacked(tag, queue, entry, consumer, self.server.clock.now())
        self.session.send(
            frames.encode_deliver(self.number, consumer.encoded_tag, tag, entry.redelivered, message.route)
            + frames.encode_content(self.number, queue.properties_of(entry), message.body, self.session.frame_max)
        )

    def deliver_reply(self, message: Stored) -> None:
        """Send a direct reply."""
        consumer = self.reply_consumer
        if consumer is not None:
            tag = self._next_tag
            self._next_tag = tag + 1
            self.session.send(
                frames.encode_deliver(self.number, consumer.encoded_tag, tag, False, message.route)
                + frames.encode_content(self.number, message.properties, message.body, self.session.frame_max)
            )

    def deliver_got(self, queue: Queue, entry: Entry, *, no_ack: bool) -> None:
        """Answer ``basic.get`` with *entry*."""
        tag = self._next_tag
        self._next_tag = tag + 1
        if not no_ack:
            self.unacked[tag] = Unacked(tag, queue, entry, None, self.server.clock.now())
        message = entry.message
        self.session.send(
            frames.encode_get_ok(self.number, tag, entry.redelivered, message.route, queue.ready)
            + frames.encode_content(
                self.number, queue.properties_of(entry, by_get=True), message.body, self.session.frame_max
            )
        )

    # -------------------------------------------------------------------------------------------------- settling

    def _on_ack(self, payload: bytes) -> None:
        try:
            tag, bits = frames.decode_settle(payload)
        except struct.error:
            raise Refusal(501, f"cannot decode {octets(payload[4:])}", class_id=60, method_id=80) from None
        if bits or self.mode == "tx":
            self.settle(tag, multiple=bool(bits & 1), verdict="ack")
            return
        unacked = self.unacked.pop(tag, None)
        if unacked is None:
            raise Refusal(406, f"unknown delivery tag {tag}")
        queue = unacked.queue
        queue.settled(unacked.entry)
        if unacked.consumer is not None:
            unacked.consumer.in_hand -= 1
            if self.global_prefetch:
                self._make_room(1)
            elif queue.ready or queue.consumers.has_blocked:
                queue.dispatch()

    def settle(self, tag: int, *, multiple: bool, verdict: str) -> None:
        """Settle one delivery, or all up to it.

        Args:
            tag: the delivery tag; 0 with *multiple* is all.
            multiple: whether those before it are meant as well.
            verdict: ``ack``, ``discard`` or ``requeue``; or ``fail`` and ``retry``, which are the same by
                ``basic.reject``.

        Raises:
            Refusal: 406: there is no such delivery.
        """
        found = self._taken(tag, multiple)
        if self.mode == "tx":
            self._tx_settled.append((found, verdict))
        else:
            self._settle(found, verdict)

    def _taken(self, tag: int, multiple: bool) -> list[Unacked]:
        if multiple and tag == 0:
            everything = list(self.unacked.values())
            self.unacked.clear()
            return everything
        if tag not in self.unacked:
            raise Refusal(406, f"unknown delivery tag {tag}")
        if not multiple:
            return [self.unacked.pop(tag)]
        found: list[Unacked] = []
        for each in self.unacked.values():
            if each.tag > tag:
                break
            found.append(each)
        for each in found:
            del self.unacked[each.tag]
        return found

    def _settle(self, found: Collection[Unacked], verdict: str) -> None:
        for queue, group in _by_consumer(found):
            if (
                verdict != "ack"
                and queue.is_stream
                and not queue.is_deleted
                and self.server.dialect.streams_refuse_nacks
            ):
                called = queue_name(queue.name, self.vhost.name)
                raise Refusal(540, f"basic.nack and basic.reject not supported by stream queues {called}")
            for each in group:
                if each.consumer is not None:
                    each.consumer.in_hand -= 1
            if verdict in {"requeue", "retry"}:
                queue.requeue([each.entry for each in group], failed=verdict == "retry", consumer=group[0].consumer)
                continue
            for each in group:
                if verdict == "ack":
                    queue.settled(each.entry)
                else:
                    queue.reject(each.entry, failed=verdict == "fail")
            queue.dispatch()
        if self.global_prefetch:
            self._make_room(sum(each.consumer is not None for each in found))

    def _make_room(self, count: int) -> None:
        if self._volume:
            self._volume -= count
        self.dispatch()

    def dispatch(self) -> None:
        """Look whether what this channel consumes has more for it."""
        for consumer in tuple(self.consumers.values()):
            queue = self.vhost.queues.get(consumer.queue_name)
            if queue is not None:
                queue.dispatch()

    def recover(self) -> None:
        """Requeue all that waits for its ack.

        Raises:
            Refusal: 541: it is a stream's.
        """
        found = list(self.unacked.values())
        if self.server.dialect.streams_refuse_nacks and any(
            each.queue.is_stream and not each.queue.is_deleted for each in found
        ):
            raise Refusal(541, "", class_id=0, method_id=0)
        self.unacked.clear()
        self._settle(found, "requeue")

    # ---------------------------------------------------------------------------------------------- transactions

    def commit(self) -> None:
        """Do what the transaction holds.

        Raises:
            Refusal: 406: a queue refused a message; the rest is done.
        """
        settled, self._tx_settled = self._tx_settled, []
        is_complete = self.publisher.commit()
        for found, verdict in settled:
            self._settle(found, verdict)
        if not is_complete:
            raise Refusal(406, "partial tx completion")

    def rollback(self) -> None:
        """Forget what the transaction holds; what it settled waits for its ack again."""
        self.publisher.rollback()
        back = [each for found, _ in self._tx_settled for each in found]
        self._tx_settled.clear()
        merged = sorted([*self.unacked.values(), *back], key=lambda each: each.tag)
        self.unacked = {each.tag: each for each in merged}

    # ------------------------------------------------------------------------------------------------- consumers

    def add_reply_consumer(self, consumer: Consumer) -> None:
        """Consume direct replies."""
        self.reply_consumer = consumer
        self.reply_token = secrets.token_urlsafe(16)
        self.vhost.replies[self.reply_token] = self

    def cancel(self, tag: str) -> None:
        """Forget a consumer; what it has in hand stays there."""
        if self.reply_consumer is not None and self.reply_consumer.tag == tag:
            self.reply_consumer = None
            self.vhost.replies.pop(self.reply_token, None)
            return
        consumer = self.consumers.pop(tag, None)
        queue = None if consumer is None else self.vhost.queues.get(consumer.queue_name)
        if queue is not None and consumer is not None:
            queue.remove_consumer(consumer)

    def cancel_consumer(self, consumer: Consumer) -> None:
        """The queue gave *consumer* up: tell the client, if it understands."""
        if self.consumers.pop(consumer.tag, None) is None or self.is_closing:
            return
        if self.session.understands("consumer_cancel_notify"):
            self.session.send_method(self.number, make(Basic.Cancel, consumer_tag=consumer.tag, nowait=True))

    def overdue(self, deadline: float) -> list[Unacked]:
        """The deliveries to consumers of before *deadline*."""
        found: list[Unacked] = []
        for each in self.unacked.values():
            if each.time > deadline:
                break
            if each.consumer is not None and not each.queue.is_deleted:
                found.append(each)
        return found

    def give_up(self, consumer: Consumer) -> None:
        """Take everything from *consumer*, requeue it, and tell the client."""
        found = [each for each in self.unacked.values() if each.consumer is consumer]
        for each in found:
            del self.unacked[each.tag]
        queue = self.vhost.queues.get(consumer.queue_name)
        if queue is not None:
            queue.consumers.remove(consumer)
        self.cancel_consumer(consumer)
        self._settle(found, "requeue")

    # --------------------------------------------------------------------------------------------------- its end

    def close(self, refusal: Refusal, class_id: int, method_id: int) -> None:
        """The broker closes the channel; the client's close-ok is awaited."""
        self.publisher.flush_confirms()
        self.is_closing = True
        self.session.send_method(
            self.number,
            make(
                ChannelMethods.Close,
                reply_code=refusal.code,
                reply_text=refusal.text,
                class_id=class_id,
                method_id=method_id,
            ),
        )
        self.release()

    def release(self) -> None:
        """Give everything back: the consumers first, so that they do not get what is requeued."""
        self.publisher.drop_content()
        self.publisher.rollback()
        consumers, self.consumers = self.consumers, {}
        if self.reply_consumer is not None:
            self.cancel(self.reply_consumer.tag)
        queues: dict[Queue, None] = {}
        for consumer in consumers.values():
            queue = self.vhost.queues.get(consumer.queue_name)
            if queue is not None:
                queue.consumers.remove(consumer)
                queues[queue] = None
        found = [*self.unacked.values(), *(each for group, _ in self._tx_settled for each in group)]
        self.unacked.clear()
        self._tx_settled.clear()
        by_name = self.server.dialect.quorum_returns_by_name
        requeue(sorted(found, key=lambda each: _place(each, by_name)), failed=True)
        for queue in queues:
            if queue.auto_delete and not queue.consumers:
                self.vhost.delete_queue(queue)
            else:
                queue.touch()
                queue.dispatch()


def _by_consumer(found: Iterable[Unacked]) -> Iterator[tuple[Queue, list[Unacked]]]:
    """Deliveries as RabbitMQ settles them: those of one consumer at a time, by the names of queue and tag."""
    groups: dict[tuple[str, int, bool, str], list[Unacked]] = {}
    for each in found:
        consumer = each.consumer
        key = (each.queue.name, id(each.queue), consumer is not None, "" if consumer is None else consumer.tag)
        groups.setdefault(key, []).append(each)
    for _, group in sorted(groups.items()) if len(groups) > 1 else groups.items():
        yield group[0].queue, group


def _place(each: Unacked, by_name: bool) -> tuple[int, str, int]:
    """In which order a channel that ends gives back; quorum queues take it from one consumer after the other."""
    if not each.queue.is_quorum:
        return 0, "", each.tag
    if by_name:
        return 0, str(each.tag) if each.consumer is None else each.consumer.tag, each.tag
    return (1, "", each.tag) if each.consumer is None else (0, f"{each.consumer.number:020}", each.tag)


def requeue(found: Iterable[Unacked], *, failed: bool = False) -> None:
    """Put deliveries of a channel that ends back into their queues; *failed* says that they count as rejected."""
    by_queue: dict[Queue, list[Entry]] = {}
    for each in found:
        by_queue.setdefault(each.queue, []).append(each.entry)
    for queue, entries in by_queue.items():
        queue.requeue(entries, failed=failed, ended=True)
