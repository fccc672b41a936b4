"""Sequences that told leveret's broker from RabbitMQ once, and do so no more; each is played on every version."""

from __future__ import annotations

from tests.differential.operations import SHORT, Op

_QUORUM = {"x-queue-type": "quorum"}
_STREAM = {"x-queue-type": "stream"}
_TO_Q1, _TO_Q2, _TO_Q3 = (
    {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": queue} for queue in ("q1", "q2", "q3")
)


def _fill(queue: str, count: int) -> list[Op]:
    return [Op("basic.publish", routing_key=queue, body=f"m{number}") for number in range(count)]


def _full(length: int, overflow: str) -> dict[str, object]:
    return {"x-max-length": length, "x-overflow": overflow}


REGRESSIONS: dict[str, list[Op]] = {
    "a bind names the missing exchange first": [Op("queue.bind", queue="q0", exchange="x1", routing_key="")],
    "a missing exchange comes before an owner": [
        Op("queue.declare", 0, queue="", exclusive=True),
        Op("queue.bind", 2, queue="gen0", exchange="x2", routing_key="a.b"),
    ],
    "a quorum queue has to have a name": [Op("queue.declare", queue="", durable=True, arguments=_QUORUM)],
    "a queue type that is no text": [Op("queue.declare", queue="", arguments={"x-queue-type": True})],
    "a queue type that there is not, for a queue without a name": [
        Op("queue.declare", queue="", arguments={"x-queue-type": "lazy"})
    ],
    "reserved names cannot be declared even when they are there": [
        Op("queue.declare", queue=""),
        Op("queue.declare", queue="gen0", exclusive=True),
    ],
    "the name of a queue is not guessed when it is declared passively": [
        Op("queue.declare", queue="q1", exclusive=True),
        Op("queue.declare", queue="", passive=True),
    ],
    "the default exchange is not declared, not even passively": [
        Op("exchange.declare", exchange="", exchange_type="topic", passive=True)
    ],
    "an exchange of no type": [Op("exchange.declare", exchange="x0", exchange_type="")],
    "an alternate exchange of no type": [
        Op("exchange.declare", exchange="x2", exchange_type="direct", arguments={"alternate-exchange": None})
    ],
    "a void argument that was not there": [
        Op("exchange.declare", exchange="x1", exchange_type="topic"),
        Op("exchange.declare", exchange="x1", exchange_type="topic", arguments={"alternate-exchange": None}),
    ],
    "the default exchange as an alternate one has no bindings": [
        Op("queue.declare", queue="q1"),
        Op("exchange.declare", exchange="x2", exchange_type="direct", arguments={"alternate-exchange": ""}),
        Op("basic.publish", exchange="x2", routing_key="q1", body="m", mandatory=True),
    ],
    "an empty routing key has no words": [
        Op("queue.declare", queue="q0"),
        Op("exchange.declare", exchange="x1", exchange_type="topic"),
        Op("queue.bind", queue="q0", exchange="x1", routing_key="*"),
        Op("basic.publish", exchange="x1", routing_key="", body="one word?"),
        Op("queue.bind", queue="q0", exchange="x1", routing_key=""),
        Op("basic.publish", exchange="x1", routing_key="", body="none"),
    ],
    "arguments are compared in an order that depends on the type": [
        Op("queue.declare", queue="q3", durable=True, arguments=_QUORUM | {"x-message-ttl": 600000, "x-max-length": 0}),
        Op("queue.declare", queue="q3", durable=True, arguments=_QUORUM | {"x-max-length": 1, "x-delivery-limit": 0}),
    ],
    "arguments that a stream does not know are not compared": [
        Op("queue.declare", queue="q2", durable=True, arguments=_STREAM),
        Op("queue.declare", queue="q2", durable=True, arguments={"x-queue-type": 1.5, "x-dead-letter-exchange": "x1"}),
    ],
    "a stream has consumers without priorities": [
        Op("queue.declare", queue="q0", durable=True, arguments=_STREAM),
        Op("basic.qos", prefetch_count=10),
        Op("basic.consume", queue="q0", consumer_tag="c0", arguments={"x-priority": 5, "x-stream-offset": "next"}),
    ],
    "a stream tells whether a message is durable": [
        Op("queue.declare", queue="q3", durable=True, arguments=_STREAM),
        Op("basic.publish", routing_key="q3", body="m1"),
        Op("basic.qos", prefetch_count=10),
        Op("basic.consume", queue="q3", consumer_tag="c0", arguments={"x-stream-offset": "first"}),
    ],
    "a queue mode that there is not": [Op("queue.declare", queue="q0", arguments={"x-queue-mode": "1"})],
    "nothing is fetched from a quorum queue with a single active consumer": [
        Op("queue.declare", queue="q1", durable=True, arguments=_QUORUM | {"x-single-active-consumer": True}),
        Op("basic.get", queue="q1"),
    ],
    "an exclusive consumer beside a single active one": [
        Op("queue.declare", queue="q3", arguments={"x-single-active-consumer": True}),
        Op("basic.consume", queue="q3", consumer_tag="c1", exclusive=True),
    ],
    "a quorum queue knows no exclusive consumers": [
        Op("queue.declare", queue="q3", durable=True, arguments=_QUORUM),
        Op("basic.consume", queue="q3", consumer_tag="c1", exclusive=True),
        Op("basic.consume", queue="q3", consumer_tag="c2"),
    ],
    "the consumer of replies has its tag to itself": [
        Op("basic.consume", queue="amq.rabbitmq.reply-to", consumer_tag="r", no_ack=True),
        Op("queue.declare", queue="q0"),
        Op("basic.consume", queue="q0", consumer_tag="r"),
        Op("basic.consume", queue="amq.rabbitmq.reply-to", consumer_tag="r", no_ack=True),
    ],
    "what comes back expired is gone": [
        Op("queue.declare", queue="q2"),
        Op("basic.consume", queue="q2", consumer_tag="c2"),
        Op("basic.publish", routing_key="q2", body="m3", properties={"expiration": "0"}),
        Op("basic.recover", requeue=True),
    ],
    "what expired behind another message is gone when its turn comes": [
        Op("queue.declare", queue="q1"),
        Op("basic.publish", routing_key="q1", body="m4"),
        Op("basic.publish", routing_key="q1", body="m6", properties={"expiration": "0"}),
        Op("basic.consume", queue="q1", consumer_tag="c1"),
    ],
    "a quorum queue takes one message more than its limit before it refuses one": [
        Op(
            "queue.declare",
            queue="q0",
            durable=True,
            arguments=_QUORUM | {"x-max-length": 1, "x-overflow": "reject-publish"},
        ),
        Op("confirm.select"),
        *(Op("basic.publish", routing_key="q0", body=f"m{number}") for number in range(3)),
        Op("basic.get", queue="q0", no_ack=True),
        Op("basic.publish", routing_key="q0", body="m3"),
        Op("queue.purge", queue="q0"),
        Op("basic.publish", routing_key="q0", body="m4"),
    ],
    "a quorum queue does not refuse into dead letters": [
        Op(
            "queue.declare",
            queue="q0",
            durable=True,
            arguments=_QUORUM | {"x-max-length": 0, "x-overflow": "reject-publish-dlx"},
        ),
        Op("confirm.select"),
        Op("basic.publish", routing_key="q0", body="m1"),
    ],
    "a quorum queue counts what it can deliver at once not as too long": [
        Op("queue.declare", queue="q3", durable=True, arguments=_QUORUM | {"x-max-length": 0, "x-delivery-limit": 1}),
        Op("basic.consume", queue="q3", consumer_tag="c1"),
        Op("basic.publish", routing_key="q3", body="m1"),
        Op("basic.recover", requeue=True),
    ],
    "priorities of a quorum queue": [
        Op("queue.declare", queue="q0", durable=True, arguments=_QUORUM),
        *(
            Op("basic.publish", routing_key="q0", body=f"m{number}", properties={"priority": priority})
            for number, priority in enumerate([0, 1, 4, 5, 9, 255, 3, 6, 7, 8])
        ),
        Op("basic.publish", routing_key="q0", body="without"),
        *(Op("basic.get", queue="q0") for _ in range(5)),
        Op("settle", verdict="nack", which=3),
        Op("settle", verdict="nack", which=0),
        *(Op("basic.get", queue="q0", no_ack=True) for _ in range(8)),
    ],
    "what expires in a queue with a consumer that has enough": [
        Op(
            "queue.declare",
            queue="q0",
            arguments={"x-message-ttl": SHORT, "x-dead-letter-exchange": "", "x-dead-letter-routing-key": "q1"},
        ),
        Op("queue.declare", queue="q1"),
        Op("basic.qos", prefetch_count=1),
        Op("basic.consume", queue="q0", consumer_tag="c0"),
        *(Op("basic.publish", routing_key="q0", body=f"m{number}") for number in range(3)),
        Op("settle", verdict="nack"),
        Op("basic.get", queue="q1"),
    ],
    "a quorum queue delivers what lives no time, once": [
        Op("queue.declare", queue="q0", durable=True, arguments=_QUORUM),
        Op("basic.consume", queue="q0", consumer_tag="c0"),
        Op("basic.publish", routing_key="q0", body="m7", properties={"expiration": "0"}),
        Op("settle", verdict="nack"),
    ],
    "a stream is deleted whatever is in it": [
        Op("queue.declare", queue="q2", durable=True, arguments=_STREAM),
        Op("basic.publish", routing_key="q2", body="m1"),
        Op("queue.delete", queue="q2", if_empty=True),
    ],
    "a consumer that has had enough loses its turn": [
        Op("queue.declare", queue="q2"),
        Op("basic.qos", prefetch_count=2),
        Op("basic.publish", routing_key="q2", body="m1"),
        Op("basic.publish", routing_key="q2", body="m2"),
        Op("basic.consume", queue="q2", consumer_tag="c2"),
        Op("basic.consume", queue="q2", consumer_tag="c1"),
        Op("basic.publish", routing_key="q2", body="m7"),
        Op("settle", verdict="nack", which=2),
    ],
    "a transaction with a message that is refused": [
        Op("queue.declare", queue="q2", arguments=_full(0, "reject-publish")),
        Op("tx.select"),
        Op("basic.publish", routing_key="q2", body="m1"),
        Op("tx.commit"),
    ],
    "who may not bind may not unbind": [
        Op("queue.declare", 0, queue="q2", exclusive=True),
        Op("queue.unbind", 2, queue="q2", exchange="amq.topic", routing_key="#"),
        Op("queue.bind", 0, queue="q2", exchange="amq.topic", routing_key="#"),
        Op("queue.unbind", 2, queue="q2", exchange="amq.topic", routing_key="#"),
    ],
    "what expires behind a message of higher priority stays until its turn comes": [
        Op("queue.declare", queue="q0", arguments={"x-max-priority": 5}),
        Op("basic.publish", routing_key="q0", body="m6", properties={"priority": 2}),
        Op("basic.publish", routing_key="q0", body="m3", properties={"expiration": "0"}),
        Op("basic.get", queue="q0"),
    ],
    "what expired is gone as soon as it is at the head": [
        Op("queue.declare", queue="q0"),
        Op("basic.qos", prefetch_count=1),
        Op("basic.publish", routing_key="q0", body="m1"),
        Op("basic.publish", routing_key="q0", body="m2", properties={"expiration": "0"}),
        Op("basic.consume", queue="q0", consumer_tag="c0"),
    ],
    "a wrong expiration and a wrong user": [
        Op("basic.publish", routing_key="q2", body="m1", properties={"expiration": "x", "user_id": "other"}),
    ],
    "a wrong binding to another's queue": [
        Op("queue.declare", 2, queue="q2", exclusive=True),
        Op("queue.bind", 1, queue="q2", exchange="amq.headers", routing_key="a", arguments={"x-match": 1}),
    ],
    "what expired behind what was too much": [
        Op("queue.declare", queue="q0", durable=True, arguments=_QUORUM | {"x-max-length": 3}),
        Op("queue.declare", queue="q1", arguments={"x-max-length": 3}),
        *(
            Op("basic.publish", routing_key=queue, body=f"m{number}", properties={"expiration": expiration})
            for queue in ("q0", "q1")
            for number, expiration in enumerate(["1000000", "0", "1000000", "1000000"])
        ),
    ],
    "how many are left": [
        Op("queue.declare", queue="q0"),
        *(Op("basic.publish", routing_key="q0", body=f"m{number}") for number in range(3)),
        Op("basic.get", queue="q0"),
        Op("basic.get", queue="q0", no_ack=True),
    ],
    "without waiting": [
        Op("queue.declare", queue="q0"),
        Op("queue.bind", queue="q0", exchange="amq.fanout", routing_key="", nowait=True),
        Op("basic.publish", exchange="amq.fanout", body="m", mandatory=True),
        Op("queue.purge", queue="q0", nowait=True),
        Op("queue.delete", queue="q0", nowait=True),
        Op("queue.bind", queue="q0", exchange="amq.fanout", routing_key="", nowait=True),
    ],
    "consumers of a quorum queue lose their turn as soon as they have enough": [
        Op("queue.declare", queue="q0", durable=True, arguments=_QUORUM),
        Op("basic.qos", prefetch_count=1),
        Op("basic.consume", queue="q0", consumer_tag="c1", no_ack=True),
        Op("basic.consume", queue="q0", consumer_tag="c2"),
        *(Op("basic.publish", routing_key="q0", body=f"m{number}") for number in range(3)),
        Op("settle", verdict="ack"),
        Op("basic.publish", routing_key="q0", body="m3"),
    ],
    "who acks first is first again": [
        Op("queue.declare", queue="q0"),
        Op("basic.qos", prefetch_count=1),
        Op("basic.consume", queue="q0", consumer_tag="c1"),
        Op("basic.consume", queue="q0", consumer_tag="c2"),
        *(Op("basic.publish", routing_key="q0", body=f"m{number}") for number in range(2)),
        Op("basic.publish", routing_key="q0", body="m3", properties={"expiration": "0"}),
        Op("settle", verdict="ack", which=1),
        Op("settle", verdict="ack", which=0),
        Op("basic.publish", routing_key="q0", body="m4"),
    ],
    "what several consumers give back goes back one consumer after the other": [
        Op("queue.declare", queue="q0"),
        Op("basic.qos", prefetch_count=2),
        *(Op("basic.publish", routing_key="q0", body=f"m{number}") for number in range(4)),
        Op("basic.consume", queue="q0", consumer_tag="c3"),
        Op("basic.consume", queue="q0", consumer_tag="c0"),
        Op("settle", verdict="nack", multiple=True, which=1),
    ],
    "a transaction is routed before it is committed": [
        Op("queue.declare", queue="q2"),
        Op("queue.declare", queue="q3"),
        Op("tx.select"),
        Op("basic.publish", exchange="amq.fanout", body="m1"),
        Op("queue.bind", queue="q3", exchange="amq.fanout", routing_key=""),
        Op("tx.commit"),
        Op("basic.publish", routing_key="q2", body="m2"),
        Op("queue.delete", queue="q2"),
        Op("tx.commit"),
    ],
    "what has expired at the head by its priority alone": [
        Op("queue.declare", queue="q1", arguments={"x-max-priority": 10}),
        Op("basic.publish", routing_key="q1", body="m1"),
        Op("basic.publish", routing_key="q1", body="m2", properties={"expiration": "0", "priority": 5}),
    ],
    "what a channel had of a quorum queue when it ends": [
        Op("queue.declare", queue="q1", durable=True, arguments=_QUORUM),
        *(Op("basic.publish", routing_key="q1", body=f"m{number}") for number in range(4)),
        Op("basic.get", queue="q1"),
        Op("basic.qos", prefetch_count=1),
        Op("basic.consume", queue="q1", consumer_tag="c2"),
        Op("basic.consume", queue="q1", consumer_tag="c1"),
        Op("close"),
        *(Op("basic.get", queue="q1", no_ack=True) for number in range(4)),
    ],
    "arguments of all types in a text": [
        Op("queue.declare", queue="q1"),
        *(
            Op("queue.declare", queue="q1", arguments={"x-max-priority": value})
            for value in ([1, "a", [True]], {"a": 1, "b": {"c": None}}, 1.5, "text", True, None)
        ),
    ],
    "the default exchange, of no type": [Op("exchange.declare", exchange="", exchange_type="")],
    "neither queue nor key": [
        Op("queue.declare", queue="q3"),
        Op("queue.bind", queue="", exchange="amq.direct", routing_key=""),
        Op("basic.publish", exchange="amq.direct", routing_key="q3", body="m1"),
        Op("queue.unbind", queue="", exchange="amq.direct", routing_key=""),
        Op("basic.publish", exchange="amq.direct", routing_key="q3", body="m2"),
    ],
    "a direct reply in a transaction": [
        Op("queue.declare", queue="q0"),
        Op("basic.consume", queue="amq.rabbitmq.reply-to", consumer_tag="r", no_ack=True),
        Op("basic.publish", routing_key="q0", properties={"reply_to": "amq.rabbitmq.reply-to"}, body="ask"),
        Op("tx.select", 2),
        Op("basic.get", 2, queue="q0", no_ack=True),
        Op("reply", 2, body="answer"),
        Op("tx.commit", 2),
    ],
    "a queue type that is a number": [Op("queue.declare", queue="", arguments={"x-queue-type": 0})],
    "a wrong BCC and a wrong user": [
        Op("basic.publish", routing_key="q3", body="m", properties={"headers": {"BCC": "q1"}, "user_id": "other"}),
    ],
    "queue types that are none": [
        *(
            Op("queue.declare", queue=queue, durable=True, arguments={"x-queue-type": kind})
            for queue in ("", "q0")
            for kind in ("", "undefined")
        ),
        Op(
            "queue.declare",
            queue="q1",
            arguments={"x-queue-type": "undefined", "x-max-age": "1D", "x-delivery-limit": 1},
        ),
    ],
    "a transaction with a message for a queue that is another one when it is committed": [
        Op("queue.declare", queue="q2"),
        Op("tx.select"),
        Op("basic.publish", routing_key="q2", body="m1"),
        Op("queue.delete", queue="q2"),
        Op("queue.declare", queue="q2"),
        Op("tx.commit"),
    ],
    **{
        f"a dead letter from {source} to {target} that came back by {verdict}": [
            Op("queue.declare", queue="q0", durable=True, arguments=_TO_Q1 | {"x-queue-type": source}),
            Op("queue.declare", queue="q1", durable=True, arguments={"x-queue-type": target}),
            Op("basic.publish", routing_key="q0", body="m1"),
            Op("basic.publish", routing_key="q0", body="m2"),
            Op("basic.get", queue="q0"),
            *([Op("settle", verdict=verdict), Op("basic.get", queue="q0")] if verdict != "nothing" else []),
            Op("settle", verdict="discard"),
            Op("basic.get", queue="q0"),
            Op("settle", verdict="discard", multiple=True),
            Op("basic.get", queue="q1"),
            Op("basic.get", queue="q1"),
            Op("settle", verdict="nack"),
            Op("basic.get", queue="q1"),
        ]
        for source in ("classic", "quorum")
        for target in ("classic", "quorum")
        for verdict in ("nothing", "nack", "reject")
    },
    "a single active consumer of a quorum queue makes place for one of higher priority": [
        Op("queue.declare", queue="q0", durable=True, arguments=_QUORUM | {"x-single-active-consumer": True}),
        Op("basic.consume", queue="q0", consumer_tag="c0"),
        Op("basic.consume", queue="q0", consumer_tag="c1", arguments={"x-priority": 1}),
        Op("basic.publish", routing_key="q0", body="m1"),
        Op("basic.consume", queue="q0", consumer_tag="c2", arguments={"x-priority": 2}),
        Op("basic.publish", routing_key="q0", body="m2"),
        Op("settle", verdict="ack"),
        Op("basic.publish", routing_key="q0", body="m3"),
        Op("basic.cancel", consumer_tag="c2"),
        Op("basic.publish", routing_key="q0", body="m4"),
    ],
    "a single active consumer of a quorum queue that did not have to make place": [
        Op("queue.declare", queue="q0", durable=True, arguments=_QUORUM | {"x-single-active-consumer": True}),
        Op("basic.consume", queue="q0", consumer_tag="c0"),
        Op("basic.publish", routing_key="q0", body="m1"),
        Op("basic.consume", queue="q0", consumer_tag="c1", arguments={"x-priority": 1}),
        Op("basic.publish", routing_key="q0", body="m2"),
        Op("basic.cancel", consumer_tag="c1"),
        Op("settle", verdict="ack"),
    ],
    "of consumers that wait to be active, the one that takes most is next": [
        Op("queue.declare", queue="q0", durable=True, arguments=_QUORUM | {"x-single-active-consumer": True}),
        Op("basic.consume", queue="q0", consumer_tag="c0"),
        Op("basic.qos", prefetch_count=1),
        Op("basic.consume", queue="q0", consumer_tag="c1"),
        Op("basic.qos", prefetch_count=3),
        Op("basic.consume", queue="q0", consumer_tag="c2"),
        Op("basic.cancel", consumer_tag="c0"),
        Op("basic.publish", routing_key="q0", body="m1"),
    ],
    "what expires in a quorum queue behind a message of higher priority": [
        Op("queue.declare", queue="q0", durable=True, arguments=_QUORUM | _TO_Q1),
        Op("queue.declare", queue="q1"),
        Op("basic.publish", routing_key="q0", body="m1", properties={"priority": 5}),
        Op("basic.publish", routing_key="q0", body="m2", properties={"priority": 1, "expiration": str(SHORT)}),
        Op("basic.publish", routing_key="q0", body="m3", properties={"priority": 1}),
        Op("basic.get", queue="q0"),
        Op("settle", verdict="nack"),
        Op("basic.publish", routing_key="q0", body="m4", properties={"priority": 2, "expiration": str(SHORT)}),
        Op("basic.get", queue="q1"),
    ],
    "a prefetch of the consumers ends that of the channel": [
        Op("queue.declare", queue="q0"),
        *_fill("q0", 6),
        Op("basic.qos", prefetch_count=2, global_=True),
        Op("basic.consume", queue="q0", consumer_tag="c0"),
        Op("basic.qos", prefetch_count=1),
    ],
    "what was fetched counts for the prefetch of a channel": [
        Op("queue.declare", queue="q0"),
        *_fill("q0", 6),
        Op("basic.get", queue="q0"),
        Op("basic.get", queue="q0"),
        Op("basic.qos", prefetch_count=3, global_=True),
        Op("basic.consume", queue="q0", consumer_tag="c0"),
        *(Op("settle", verdict="ack") for _ in range(5)),
    ],
    "the prefetch of a channel stops those that do not acknowledge": [
        Op("queue.declare", queue="q0"),
        *_fill("q0", 3),
        Op("basic.qos", prefetch_count=2, global_=True),
        Op("basic.consume", queue="q0", consumer_tag="c0"),
        Op("basic.consume", queue="q0", consumer_tag="c1", no_ack=True),
        Op("settle", verdict="ack"),
        Op("settle", verdict="ack"),
        *_fill("q0", 3),
    ],
    "a stream and the prefetch of a channel": [
        Op("queue.declare", queue="q1", durable=True, arguments=_STREAM),
        Op("queue.declare", queue="q0"),
        *_fill("q1", 4),
        *_fill("q0", 6),
        Op("basic.qos", prefetch_count=10),
        Op("basic.consume", queue="q1", consumer_tag="c1", arguments={"x-stream-offset": "first"}),
        Op("basic.qos", prefetch_count=2, global_=True),
        Op("basic.consume", queue="q0", consumer_tag="c0"),
        Op("basic.consume", queue="q1", consumer_tag="c2", arguments={"x-stream-offset": "first"}),
    ],
    "what is wrong first with a consumer of a stream": [
        Op("queue.declare", queue="q1", durable=True, arguments=_STREAM),
        Op("basic.consume", queue="q1", consumer_tag="c0", no_ack=True, arguments={"x-stream-offset": "wrong"}),
        Op("basic.consume", queue="q1", consumer_tag="c0", no_ack=True),
        Op("basic.qos", prefetch_count=2),
        Op("basic.consume", queue="q1", consumer_tag="c0", no_ack=True),
    ],
    "headers that a stream loses": [
        Op("queue.declare", queue="q1", durable=True, arguments=_STREAM),
        Op(
            "basic.publish",
            routing_key="q1",
            body="m1",
            properties={"headers": {"a": [1], "x-a": ["b"], "t": {"u": 1}, "x-t": {}, "n": None, "CC": ["q2"], "i": 1}},
        ),
        Op("basic.qos", prefetch_count=10),
        Op("basic.consume", queue="q1", consumer_tag="c0", arguments={"x-stream-offset": "first"}),
    ],
    "a stream takes nothing back": [
        Op("queue.declare", queue="q1", durable=True, arguments=_STREAM),
        *_fill("q1", 1),
        *(
            each
            for settling in (
                [Op("settle", verdict="discard")],
                [Op("settle", verdict="nack", multiple=True)],
                [Op("basic.recover", requeue=True)],
                [Op("tx.select"), Op("settle", verdict="reject"), Op("tx.commit")],
                [Op("close")],
                [Op("queue.delete", queue="q1"), Op("settle", verdict="nack")],
            )
            for each in (
                Op("basic.qos", prefetch_count=10),
                Op("basic.consume", queue="q1", consumer_tag="c0", arguments={"x-stream-offset": "first"}),
                *settling,
                Op("close"),
            )
        ),
    ],
    "dead letters in a stream": [
        Op("queue.declare", queue="q0", arguments=_TO_Q1),
        Op("queue.declare", queue="q1", durable=True, arguments=_STREAM),
        *_fill("q0", 1),
        Op("basic.get", queue="q0"),
        Op("settle", verdict="discard"),
        *_fill("q1", 1),
        Op("basic.qos", prefetch_count=10),
        Op("basic.consume", queue="q1", consumer_tag="c0", arguments={"x-stream-offset": "first"}),
    ],
    "a delivery limit below zero": [
        Op("queue.declare", queue="q0", durable=True, arguments=_QUORUM | {"x-delivery-limit": -1}),
        *_fill("q0", 3),
        Op("basic.get", queue="q0"),
        Op("settle", verdict="reject"),
        Op("basic.get", queue="q0"),
        Op("basic.recover", requeue=True),
        Op("basic.consume", queue="q0", consumer_tag="c0"),
    ],
    "what comes back without a delivery limit loses its priority": [
        Op("queue.declare", queue="q0", durable=True, arguments=_QUORUM | {"x-delivery-limit": -1}),
        *(
            Op("basic.publish", routing_key="q0", body=f"m{number}", properties={"priority": priority})
            for number, priority in enumerate([9, 9, 0, 0])
        ),
        Op("basic.get", queue="q0"),
        Op("settle", verdict="nack"),
        *(Op("basic.get", queue="q0") for _ in range(4)),
    ],
    "what is dropped for its delivery limit makes room": [
        Op("queue.declare", queue="q0", durable=True, arguments=_QUORUM | {"x-delivery-limit": 0}),
        *_fill("q0", 9),
        Op("basic.qos", prefetch_count=1),
        Op("basic.consume", queue="q0", consumer_tag="c0"),
        Op("settle", verdict="reject"),
        Op("settle", verdict="ack"),
        Op("settle", verdict="ack"),
    ],
    "a queue type that is not given again": [
        Op("queue.declare", queue="q0", durable=True, arguments=_QUORUM),
        Op("queue.declare", queue="q0", durable=True),
        Op("queue.declare", queue="q1", durable=True),
        Op("queue.declare", queue="q1", durable=True, arguments={"x-queue-type": "classic"}),
        Op("queue.declare", queue="q1", durable=True, arguments=_QUORUM),
    ],
    "a void argument in a text": [
        Op("queue.declare", queue="q0", arguments={"x-max-length": 0}),
        Op("queue.declare", queue="q0", arguments={"x-max-length": None}),
        Op("exchange.declare", exchange="x0", exchange_type="fanout", arguments={"alternate-exchange": "x1"}),
        Op("exchange.declare", exchange="x0", exchange_type="fanout", arguments={"alternate-exchange": None}),
    ],
    "a transaction and a queue that is declared before it is committed": [
        Op("tx.select"),
        Op("basic.publish", routing_key="q0", body="m1", mandatory=True),
        Op("queue.declare", queue="q0"),
        Op("tx.commit"),
    ],
    "a transaction and a queue that is deleted before it is committed": [
        Op("tx.select"),
        Op("queue.declare", queue="q0"),
        Op("basic.publish", routing_key="q0", body="m1", mandatory=True),
        Op("queue.delete", queue="q0"),
        Op("tx.commit"),
    ],
    "dead letters that were refused count as delivered": [
        Op("queue.declare", queue="q0", durable=True, arguments=_QUORUM | _TO_Q1),
        Op("queue.declare", queue="q1", durable=True, arguments=_QUORUM | _TO_Q2),
        Op("queue.declare", queue="q2", arguments=_TO_Q3),
        Op("queue.declare", queue="q3", durable=True, arguments=_QUORUM),
        *_fill("q0", 1),
        Op("basic.get", queue="q0"),
        Op("settle", verdict="nack"),
        Op("basic.get", queue="q0"),
        Op("settle", verdict="discard"),
        Op("basic.get", queue="q1"),
        Op("settle", verdict="nack"),
        Op("basic.get", queue="q1"),
        Op("settle", verdict="discard"),
        Op("basic.get", queue="q2"),
        Op("settle", verdict="discard"),
        Op("basic.get", queue="q3"),
    ],
    "dead letters of what was too long, once its channel had ended": [
        Op("queue.declare", queue="q0", durable=True, arguments=_QUORUM | _TO_Q1 | {"x-max-length": 1}),
        Op("queue.declare", queue="q2", arguments=_TO_Q1 | {"x-max-length": 1}),
        Op("queue.declare", queue="q1", durable=True, arguments=_QUORUM),
        *(
            each
            for queue in ("q0", "q2")
            for each in (
                *_fill(queue, 1),
                Op("basic.get", queue=queue),
                Op("close"),
                *_fill(queue, 1),
                Op("basic.get", queue="q1", no_ack=True),
            )
        ),
    ],
    "dead letters and BCC": [
        Op("queue.declare", queue="q0", arguments={"x-dead-letter-exchange": ""}),
        Op("queue.declare", queue="q1"),
        Op("queue.declare", queue="q2"),
        Op("basic.publish", routing_key="q0", body="m1", properties={"headers": {"CC": ["q2"], "BCC": ["q1"]}}),
        Op("queue.purge", queue="q1"),
        Op("basic.get", queue="q0"),
        Op("settle", verdict="discard"),
        Op("basic.get", queue="q1"),
    ],
    "a consumer keeps its turn when what came back has expired": [
        Op("queue.declare", queue="q0", durable=True, arguments=_QUORUM | {"x-message-ttl": 0}),
        Op("basic.consume", queue="q0", consumer_tag="c0"),
        *_fill("q0", 2),
        Op("basic.consume", queue="q0", consumer_tag="c1"),
        Op("settle", verdict="nack"),
        Op("settle", verdict="nack"),
        *_fill("q0", 1),
    ],
    "who need not acknowledge has a prefetch in a quorum queue all the same": [
        Op("queue.declare", queue="q0", durable=True, arguments=_QUORUM | {"x-max-length": 0}),
        Op("basic.consume", 1, queue="q0", consumer_tag="c0", arguments={"x-priority": 5}),
        Op("basic.qos", prefetch_count=1),
        Op("basic.consume", queue="q0", consumer_tag="c1", no_ack=True),
        *_fill("q0", 2),
        Op("close", 1),
    ],
    "a version of a queue that is no more": [
        Op("queue.declare", queue="q0", durable=True, arguments={"x-queue-version": 2}),
        Op("queue.declare", queue="q1", durable=True, arguments={"x-queue-version": 1, "x-queue-mode": "default"}),
    ],
    "a transaction with a message for a queue of a long name that is gone": [
        Op("queue.declare", queue=""),
        Op("tx.select"),
        Op("basic.publish", routing_key="gen0", body="m1"),
        Op("queue.delete", queue="gen0"),
        Op("tx.commit"),
    ],
}
