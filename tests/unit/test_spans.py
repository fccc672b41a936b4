"""What spans say of messages that others may have made as they like; no broker is needed for that."""

from __future__ import annotations

import pytest
from opentelemetry.sdk.trace import TracerProvider

from leveret import IncomingMessage, Message
from leveret.spans import Carrier, Tracing


def incoming(exchange: bytes, routing_key: bytes) -> IncomingMessage:
    route = bytes([len(exchange)]) + exchange + bytes([len(routing_key)]) + routing_key
    return IncomingMessage.from_wire(None, None, 1, False, route, b"\0\0", b"body", no_ack=True)


def test_names_that_are_no_utf8_do_no_harm():
    span, _ = Tracing(TracerProvider(), linked=False).start_process(incoming(b"e\xff", b"\xfe"), None)
    assert span.name == "process e?"
    assert span.attributes["messaging.destination.name"] == "e?:?"
    assert span.attributes["messaging.rabbitmq.destination.routing_key"] == "?"
    span.name.encode()


@pytest.mark.parametrize(
    ("exchange", "routing_key", "queue", "name"),
    [
        (b"", b"", None, "amq.default"),
        (b"", b"key", None, "key"),
        (b"e", b"", None, "e"),
        (b"e", b"key", "q", "e:key:q"),
        (b"e", b"q", "q", "e:q"),
        (b"", b"q", "q", "q"),
        (b"same", b"same", "same", "same"),
    ],
)
def test_the_destination_has_each_part_once(exchange, routing_key, queue, name):
    span, _ = Tracing(TracerProvider(), linked=False).start_process(incoming(exchange, routing_key), queue)
    assert span.attributes["messaging.destination.name"] == name


def test_a_carrier_adds_to_the_headers_and_takes_the_rest_from_what_it_carries():
    given = Message(b"body", headers={"a": 1, "traceparent": "old"}, content_type="text/plain", expiration=5)
    carrier = Carrier(given, {"traceparent": "new"})
    assert carrier.body == b"body"
    assert carrier.wire_properties() == given.wire_properties()._replace(headers={"a": 1, "traceparent": "new"})
    assert given.headers == {"a": 1, "traceparent": "old"}
    assert Carrier(Message(b""), {"b": "c"}).wire_properties().headers == {"b": "c"}


def test_the_address_of_a_direct_reply_has_one_name_for_all_callers():
    message = incoming(b"", b"amq.rabbitmq.reply-to.g1h2AA5yZXBseUAx.abc")
    span, _ = Tracing(TracerProvider(), linked=False).start_process(message, None)
    assert span.attributes["messaging.destination.name"] == "amq.rabbitmq.reply-to"
    assert span.attributes["messaging.rabbitmq.destination.routing_key"] == "amq.rabbitmq.reply-to"
