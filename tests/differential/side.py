"""One of the two brokers: plays operations, and says what there is to see, as plain values.

What is random in a broker is taken out: prefixes, server-named queues and tags, times. Deliveries are listed by
consumer, because RabbitMQ lets those of different queues overtake each other; confirms by the publish they are for.
"""

from __future__ import annotations

import asyncio
import datetime
import re
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from pamqp.commands import INDEX_MAPPING, Basic, Exchange, Queue
from pamqp.commands import Channel as ChannelMethods

import leveret
from leveret.wire.codec import Deliver, GetOk, Return
from leveret.wire.methods import make
from tests.differential.raw_channel import Closed, Message, RawChannel

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pamqp.base import Frame

    from tests.differential.operations import Op

CONNECTION_OF = (0, 0, 1)
"""Channel → connection."""
_NAME = re.compile(r"\b(?:[qx]|gen)\d\b")
_RANDOM = re.compile(r"(amq\.(?:gen-|ctag-|rabbitmq\.reply-to\.))[\w=./+-]+")
_METHODS = {command.name.lower(): command for command in cast("dict[int, type[Frame]]", INDEX_MAPPING).values()}


class Slot:
    """A channel of the sequence, in its present incarnation."""

    def __init__(self, raw: RawChannel) -> None:
        self.raw = raw
        self.mode = ""
        self.published = 0
        self.pending: dict[int, int] = {}  # confirm number → number of the publish
        self.confirms: dict[int, str] = {}
        self.unsettled: dict[int, tuple[str, int]] = {}  # delivery tag → (consumer, how manieth of it)
        self.settled_in_tx: dict[int, tuple[str, int]] = {}
        self.no_ack: set[str] = set()
        self.counts: dict[str, int] = {}
        self.seen: dict[str, Any] = {"deliveries": {}, "returns": [], "cancels": [], "confirms": {}}

    def arrived(self, who: str, tag: int, *, no_ack: bool) -> None:
        """A message came."""
        number = self.counts[who] = self.counts.get(who, 0) + 1
        if not no_ack:
            self.unsettled[tag] = (who, number)


class State(NamedTuple):
    """What there is to see after an operation."""

    channels: dict[int, dict[str, Any]]
    queues: dict[str, Any]


class Side:
    """A broker at *url*; *prefix* is put before names."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.prefix = ""
        self.connections: dict[int, leveret.Connection] = {}
        self.slots: dict[int, Slot] = {}
        self.generated: list[str] = []
        self.queues: dict[str, int] = {}  # those that may be there, and the connection to ask on
        self.exchanges: dict[str, int] = {}
        self.replies: list[str] = []
        self._observers: dict[int, RawChannel] = {}

    # -------------------------------------------------------------------------------------------------- names

    def _full(self, value: Any) -> Any:
        """*value* with the names as the broker knows them."""
        if isinstance(value, str):
            return _NAME.sub(self._full_name, value)
        if isinstance(value, dict):
            return {key: self._full(each) for key, each in value.items()}
        return [self._full(each) for each in value] if isinstance(value, list) else value

    def _full_name(self, found: re.Match[str]) -> str:
        name = found[0]
        if not name.startswith("gen"):
            return self.prefix + name
        number = int(name[3:])
        return self.generated[number] if number < len(self.generated) else self.prefix + name

    def _short(self, value: Any) -> Any:
        """*value* as an operation would write it."""
        if isinstance(value, str):
            for number, name in enumerate(self.generated):
                value = value.replace(name, f"gen{number}")
            return _RANDOM.sub(r"\1…", value.replace(self.prefix, ""))
        if isinstance(value, dict):
            return {key: self._short(each) for key, each in sorted(value.items())}
        if isinstance(value, list | tuple):
            return [self._short(each) for each in value]
        return "<time>" if isinstance(value, datetime.datetime) else value

    # --------------------------------------------------------------------------------------------- connections

    async def _connection(self, number: int) -> leveret.Connection:
        found = self.connections.get(number)
        if found is None or found.is_closed:
            found = self.connections[number] = await leveret.connect(self.url)
            self._observers.pop(number, None)
        return found

    async def _open(self, connection: int) -> RawChannel:
        raw = RawChannel((await self._connection(connection)).open_transport())
        await raw.request(make(ChannelMethods.Open))
        return raw

    async def _slot(self, number: int) -> Slot:
        slot = self.slots.get(number)
        if slot is None or slot.raw.closed is not None:
            slot = self.slots[number] = Slot(await self._open(CONNECTION_OF[number]))
        return slot

    async def _observer(self, connection: int) -> RawChannel:
        found = self._observers.get(connection)
        if found is None or found.closed is not None:
            found = self._observers[connection] = await self._open(connection)
        return found

    async def begin(self, prefix: str) -> None:
        """Begin a sequence."""
        self.prefix = prefix

    async def end(self) -> None:
        """Remove what the sequence left."""
        for slot in self.slots.values():
            if slot.raw.closed is None:
                await slot.raw.request(make(ChannelMethods.Close, reply_code=200, reply_text=""))
        for name, connection in self.queues.items():
            raw = await self._observer(connection)
            await raw.request(make(Queue.Delete, queue=self._full(name)))
        for name, connection in self.exchanges.items():
            raw = await self._observer(connection)
            await raw.request(make(Exchange.Delete, exchange=self._full(name)))
        self.slots.clear()
        self.generated.clear()
        self.queues.clear()
        self.exchanges.clear()
        self.replies.clear()

    async def close(self) -> None:
        """Close the connections."""
        for connection in self.connections.values():
            await connection.close()

    # ------------------------------------------------------------------------------------------------- playing

    async def play(self, op: Op, *, may_be_multiple: bool = True) -> Any:
        """Do it; the reply."""
        slot = await self._slot(op.channel)
        if op.kind == "close":
            await slot.raw.request(make(ChannelMethods.Close, reply_code=200, reply_text="bye"))
            return None
        if op.kind == "settle":
            return self._settle(slot, dict(op.arguments), may_be_multiple)
        if op.kind in {"basic.publish", "reply"}:
            return self._publish(slot, op.kind, dict(op.arguments))
        return await self._call(slot, op)

    def _publish(self, slot: Slot, kind: str, arguments: dict[str, Any]) -> None:
        properties = {key: self._full(value) for key, value in arguments.get("properties", {}).items()}
        key = self._full(arguments.get("routing_key", ""))
        if kind == "reply":
            key = self.replies[-1] if self.replies else "amq.rabbitmq.reply-to.none"
        slot.published += 1
        if slot.mode == "confirm":
            slot.pending[len(slot.pending) + 1] = slot.published
        slot.raw.publish(
            self._full(arguments.get("exchange", "")),
            key,
            arguments.get("mandatory", False),
            properties,
            str(arguments.get("body", "")).encode(),
        )

    def _settle(self, slot: Slot, arguments: dict[str, Any], may_be_multiple: bool) -> str:
        multiple, verdict = arguments.get("multiple", False), arguments["verdict"]
        tag = arguments.get("tag")
        if tag is None:
            ordered = sorted(slot.unsettled, key=lambda each: slot.unsettled[each])
            if not ordered or (multiple and not may_be_multiple):
                return "nothing to settle"
            tag = ordered[arguments.get("which", 0) % len(ordered)]
        if multiple:
            gone = [each for each in slot.unsettled if tag == 0 or each <= tag]
        else:
            gone = [tag] if tag in slot.unsettled else []
        for each in gone:
            who = slot.unsettled.pop(each)
            if slot.mode == "tx":
                slot.settled_in_tx[each] = who
        if verdict == "ack":
            slot.raw.send(make(Basic.Ack, delivery_tag=tag, multiple=multiple))
        elif multiple:
            slot.raw.send(make(Basic.Nack, delivery_tag=tag, multiple=True, requeue=verdict != "discard"))
        elif verdict == "nack":
            slot.raw.send(make(Basic.Nack, delivery_tag=tag, multiple=False, requeue=True))
        else:
            slot.raw.send(make(Basic.Reject, delivery_tag=tag, requeue=verdict != "discard"))
        return "settled"

    async def _call(self, slot: Slot, op: Op) -> Any:
        arguments: Mapping[str, Any] = self._full(dict(op.arguments))
        tag = arguments.get("consumer_tag", "")
        if op.kind == "basic.consume" and arguments.get("no_ack"):
            slot.no_ack.add(tag)
        if arguments.get("nowait"):
            slot.raw.send(make(_METHODS[op.kind], **arguments))
            return None
        reply = await slot.raw.request(make(_METHODS[op.kind], **arguments))
        if isinstance(reply, Closed):
            return None  # the state says so
        self._note(slot, op, reply)
        return self._seen(slot, reply, op)

    def _note(self, slot: Slot, op: Op, reply: Frame | Message) -> None:
        connection = CONNECTION_OF[op.channel]
        if isinstance(reply, Queue.DeclareOk):
            given = op.arguments.get("queue", "")
            if not given and not op.arguments.get("passive"):
                self.generated.append(reply.queue)
            name = self._short(reply.queue)
            if not name.startswith("amq.rabbitmq"):
                self.queues.setdefault(name, connection)
        elif op.kind == "exchange.declare" and not op.arguments["exchange"].startswith("amq."):
            self.exchanges.setdefault(op.arguments["exchange"], connection)
        elif op.kind in {"confirm.select", "tx.select"}:
            slot.mode = op.kind.split(".")[0]
        elif op.kind == "tx.commit":
            slot.settled_in_tx.clear()
        elif op.kind == "tx.rollback":
            slot.unsettled.update(slot.settled_in_tx)
            slot.settled_in_tx.clear()
        elif op.kind == "basic.recover":
            slot.unsettled.clear()

    def _seen(self, slot: Slot, reply: Frame | Message, op: Op) -> Any:
        if isinstance(reply, Message):
            assert isinstance(reply.method, GetOk)
            slot.arrived("get", reply.method.delivery_tag, no_ack=bool(op.arguments.get("no_ack")))
            return ["get-ok", reply.method.message_count, bool(reply.method.redelivered), *self._content(reply)]
        return [reply.name, {name: self._short(getattr(reply, name)) for name in reply.__slots__}]

    def _content(self, message: Message) -> list[Any]:
        properties = self._short(message.properties)
        if str(message.properties.get("reply_to", "")).startswith("amq.rabbitmq.reply-to."):
            self.replies.append(message.properties["reply_to"])
        return [message.body.decode(), *self._short([message.exchange, message.routing_key]), properties]

    # -------------------------------------------------------------------------------------------------- seeing

    async def state(self) -> State:
        """What there is to see now, when everybody has said what there is to say."""
        await self._flush()
        queues = await self._counts()
        await self._flush()
        channels: dict[int, dict[str, Any]] = {}
        for number, slot in sorted(self.slots.items()):
            channels[number] = self._heard(slot)
        return State(channels, queues)

    async def _flush(self) -> None:
        raws = [slot.raw for slot in self.slots.values() if slot.raw.closed is None]
        await asyncio.gather(*(raw.request(make(ChannelMethods.Flow, active=True)) for raw in raws))

    async def _counts(self) -> dict[str, Any]:
        counts: dict[str, Any] = {}
        todo = sorted(self.queues.items())
        while todo:
            asked = [(name, each, await self._observer(each)) for name, each in todo]
            replies = await asyncio.gather(
                *(raw.request(make(Queue.Declare, queue=self._full(name), passive=True)) for name, _, raw in asked)
            )
            todo = []
            failed: set[int] = set()
            for (name, connection, _), reply in zip(asked, replies, strict=True):
                if isinstance(reply, Queue.DeclareOk):
                    counts[name] = (reply.message_count, reply.consumer_count)
                elif connection in failed:
                    todo.append((name, connection))  # the channel was closed over the one before
                else:
                    assert isinstance(reply, Closed), reply
                    failed.add(connection)
                    counts[name] = self._short(reply.text)
                    if reply.code == 404:
                        self.queues.pop(name)
        return counts

    def _heard(self, slot: Slot) -> dict[str, Any]:
        """What *slot* has heard so far."""
        seen = slot.seen
        for each in slot.raw.heard:
            if isinstance(each, Message) and isinstance(each.method, Deliver):
                tag = self._short(each.method.consumer_tag.decode())
                slot.arrived(tag, each.method.delivery_tag, no_ack=tag in slot.no_ack)
                told = [bool(each.method.redelivered), *self._content(each)]
                seen["deliveries"].setdefault(tag, []).append(told)
            elif isinstance(each, Message) and isinstance(each.method, Return):
                seen["returns"].append([each.method.reply_code, each.method.reply_text, *self._content(each)])
            elif isinstance(each, Basic.Cancel):
                seen["cancels"] = sorted([*seen["cancels"], self._short(each.consumer_tag)])
            elif isinstance(each, Basic.Ack | Basic.Nack):
                verdict = "ack" if isinstance(each, Basic.Ack) else "nack"
                for number, publish in slot.pending.items():
                    if number == each.delivery_tag or (each.multiple and number < each.delivery_tag):
                        seen["confirms"].setdefault(publish, verdict)
        slot.raw.heard.clear()
        seen["unsettled"] = sorted(slot.unsettled.values())
        closed = slot.raw.closed
        if closed is not None:
            slot.unsettled.clear()
            slot.settled_in_tx.clear()
            seen["closed"] = self._short(closed)
            seen.pop("unsettled")
        return seen

    def order(self, channel: int) -> list[tuple[str, int]]:
        """The unsettled deliveries of a channel by their tags."""
        slot = self.slots.get(channel)
        return [] if slot is None else [slot.unsettled[tag] for tag in sorted(slot.unsettled)]
