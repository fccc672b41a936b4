"""In what the versions of RabbitMQ differ, as far as a client can see it on the wire.

A version is a row of facts; the rest of the broker asks for a fact, never for a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal

from leveret._version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

    from leveret.types import FieldValue

MIB: Final = 1 << 20


@dataclass(frozen=True)
class Dialect:
    """One version of RabbitMQ.

    Attributes:
        version: as it is asked for, ``"4.0"``.
        server_version: as the server reports it.
        mechanisms: SASL mechanisms, in the server's order; EXTERNAL is for TLS only.
        max_message_size: bytes; larger messages close the channel.
        min_frame_max: the least that a client may tune to.
        unknown_type_is_hard: an unknown exchange type closes the connection (503).
        names_permission: a refused access says which permission is missing.
        adds_queue_type: a declaration without ``x-queue-type`` is taken as if it said ``classic``, in error texts too.
        default_delivery_limit: of quorum queues; ``None`` is no limit.
        negative_is_no_limit: an ``x-delivery-limit`` below 0 is none; otherwise what comes back once is dropped.
        quorum_returns_by_name: what a channel that ends had of a quorum queue goes back by the tags of its consumers,
            otherwise by their age, and what was fetched last.
        quorum_priorities: how many priorities quorum queues have; 1 is none, 2 are normal and high, more are strict.
        quorum_requeues_at_end: what returns to a quorum queue without a delivery limit goes to its end.
        single_active_yields: the single active consumer of a quorum queue makes place for one of higher priority.
        tells_first_get: ``basic.get`` from a quorum queue gives ``x-delivery-count: 0`` with a message that is new.
        counts_failures_only: ``basic.nack`` does not count as a delivery of a quorum queue, ``basic.reject`` does;
            ``x-acquired-count`` counts all, and ``x-delayed-retry-…`` work.
        failures_counted_by: types of queues that count, and tell by a dead letter, how often a delivery was refused or
            lost with its channel; where such a dead letter arrives, it counts as redelivered.
        drops_make_room: what a quorum queue drops for its delivery limit makes room for two messages.
        has_global_prefetch: ``basic.qos`` with ``global`` is about the channel; otherwise it is as without.
        returns_replies: a mandatory direct reply is delivered, and returned all the same.
        crashes_on_bad_values: a stream offset, or the type of a queue without a name, that there is not closes the
            connection (541).
        has_last_death: dead letters carry ``x-last-death-…``.
        timeout_closes_channel: an overdue ack costs the channel; otherwise the consumer, of a quorum queue only.
        checks_body_size: content that is longer than declared, or too long by far, closes the connection.
        wrong_header_answer: what is sent to whoever does not speak AMQP.
        has_local_random: exchanges of type ``x-local-random``.
        queue_arguments: type of queue → the arguments that it knows, in the order in which they are compared.
        streams_tell_durability: what comes out of a stream has a ``delivery_mode``, 1 where it came in without.
        streams_keep_annotations: of the headers that are arrays or tables, a stream keeps ``CC`` and those that begin
            with ``x-``; otherwise none.
        streams_take_dead_letters: otherwise they vanish.
        quotes_streams: what the refusals of a consumer call a stream.
        streams_refuse_nacks: what a stream delivered can be acknowledged, nothing else.
        holds_replies: a direct reply in a transaction waits for its commit.
        deleted_in_tx: a commit of what was routed to a queue that is gone reaches what has its name then, or nothing:
            ``"by-name"``; or it is ``"partial"`` (406), or closes the connection: ``"fatal"`` (506).
        checks_user_first: a wrong ``user_id`` is refused before a wrong ``expiration`` or ``CC``, not after it.
        default_types: what as an ``x-queue-type`` is as none.
        unchecked_arguments: those that may have any value.
        queue_versions: what ``x-queue-version`` may be.
        quorum_in_text: what the refusal of a ``basic.get`` calls a quorum queue.
        consumer_arguments: type of queue → the arguments that its consumers know.
    """

    version: str
    server_version: str
    mechanisms: tuple[str, ...]
    max_message_size: int
    min_frame_max: int
    unknown_type_is_hard: bool
    names_permission: bool
    adds_queue_type: bool
    default_delivery_limit: int | None
    negative_is_no_limit: bool
    quorum_returns_by_name: bool
    quorum_priorities: int
    quorum_requeues_at_end: bool
    single_active_yields: bool
    tells_first_get: bool
    counts_failures_only: bool
    failures_counted_by: tuple[str, ...]
    drops_make_room: bool
    has_global_prefetch: bool
    returns_replies: bool
    crashes_on_bad_values: bool
    has_last_death: bool
    timeout_closes_channel: bool
    checks_body_size: bool
    wrong_header_answer: bytes
    has_local_random: bool
    queue_arguments: Mapping[str, tuple[str, ...]]
    streams_tell_durability: bool
    streams_keep_annotations: bool
    streams_take_dead_letters: bool
    quotes_streams: bool
    streams_refuse_nacks: bool
    holds_replies: bool
    deleted_in_tx: Literal["by-name", "partial", "fatal"]
    checks_user_first: bool
    default_types: tuple[str, ...]
    unchecked_arguments: tuple[str, ...]
    queue_versions: tuple[int, ...]
    quorum_in_text: str
    consumer_arguments: Mapping[str, tuple[str, ...]]

    @property
    def version_info(self) -> tuple[int, ...]:
        """The version to compare with."""
        return tuple(map(int, self.version.split(".")))

    def server_properties(self) -> dict[str, FieldValue]:
        """What the server says of itself in ``connection.start``."""
        return {
            "capabilities": dict(CAPABILITIES),
            "cluster_name": "leveret@testing",
            "copyright": "leveret's broker for tests and for trying out; not RabbitMQ, speaks like it",
            "information": "keeps nothing on disk",
            "platform": f"Python, leveret {__version__}",
            "product": "RabbitMQ",
            "version": self.server_version,
        }


CAPABILITIES: Final[Mapping[str, FieldValue]] = MappingProxyType(
    {
        "publisher_confirms": True,
        "exchange_exchange_bindings": True,
        "basic.nack": True,
        "consumer_cancel_notify": True,
        "connection.blocked": True,
        "consumer_priorities": True,
        "authentication_failure_close": True,
        "per_consumer_qos": True,
        "direct_reply_to": True,
    }
)

_CLASSIC: Final = (
    "x-expires",
    "x-message-ttl",
    "x-dead-letter-exchange",
    "x-dead-letter-routing-key",
    "x-max-length",
    "x-max-length-bytes",
    "x-max-priority",
    "x-overflow",
    "x-queue-mode",
    "x-queue-version",
    "x-single-active-consumer",
    "x-queue-type",
    "x-queue-master-locator",
)
_QUORUM: Final = (
    "x-dead-letter-exchange",
    "x-dead-letter-routing-key",
    "x-dead-letter-strategy",
    "x-expires",
    "x-max-length",
    "x-max-length-bytes",
    "x-max-in-memory-length",
    "x-max-in-memory-bytes",
    "x-overflow",
    "x-single-active-consumer",
    "x-queue-type",
    "x-quorum-initial-group-size",
    "x-delivery-limit",
    "x-message-ttl",
    "x-queue-leader-locator",
)
_STREAM: Final = (
    "x-max-length-bytes",
    "x-queue-type",
    "x-max-age",
    "x-stream-max-segment-size-bytes",
    "x-initial-cluster-size",
    "x-queue-leader-locator",
)
_STREAM_CONSUMERS: Final = ("x-stream-offset", "x-stream-filter", "x-stream-match-unfiltered")

_3_10: Final = Dialect(
    version="3.10",
    server_version="3.10.8",
    mechanisms=("PLAIN", "AMQPLAIN", "EXTERNAL"),
    max_message_size=128 * MIB,
    min_frame_max=4096,
    unknown_type_is_hard=True,
    names_permission=False,
    adds_queue_type=False,
    default_delivery_limit=None,
    negative_is_no_limit=False,
    quorum_returns_by_name=True,
    quorum_priorities=1,
    quorum_requeues_at_end=True,
    single_active_yields=False,
    tells_first_get=True,
    counts_failures_only=False,
    failures_counted_by=(),
    drops_make_room=True,
    has_global_prefetch=True,
    returns_replies=True,
    crashes_on_bad_values=True,
    has_last_death=False,
    timeout_closes_channel=True,
    checks_body_size=False,
    wrong_header_answer=b"AMQP\x00\x00\x09\x01",
    has_local_random=False,
    queue_arguments={"classic": _CLASSIC, "quorum": _QUORUM, "stream": _STREAM},
    streams_tell_durability=False,
    streams_keep_annotations=False,
    streams_take_dead_letters=False,
    quotes_streams=True,
    streams_refuse_nacks=True,
    holds_replies=False,
    deleted_in_tx="by-name",
    checks_user_first=True,
    default_types=(),
    unchecked_arguments=(),
    queue_versions=(1, 2),
    quorum_in_text="quorum",
    consumer_arguments={
        "classic": ("x-cancel-on-ha-failover", "x-priority", "x-credit"),
        "quorum": ("x-priority", "x-credit"),
        "stream": ("x-stream-offset", "x-credit"),
    },
)
_4_0: Final = Dialect(
    version="4.0",
    server_version="4.0.5",
    mechanisms=("PLAIN", "AMQPLAIN", "ANONYMOUS", "EXTERNAL"),
    max_message_size=16 * MIB,
    min_frame_max=4096,
    unknown_type_is_hard=False,
    names_permission=True,
    adds_queue_type=True,
    default_delivery_limit=20,
    negative_is_no_limit=True,
    quorum_returns_by_name=False,
    quorum_priorities=2,
    quorum_requeues_at_end=True,
    single_active_yields=True,
    tells_first_get=False,
    counts_failures_only=False,
    failures_counted_by=("quorum",),
    drops_make_room=False,
    has_global_prefetch=True,
    returns_replies=True,
    crashes_on_bad_values=True,
    has_last_death=True,
    timeout_closes_channel=True,
    checks_body_size=False,
    wrong_header_answer=b"AMQP\x03\x01\x00\x00",
    has_local_random=True,
    queue_arguments={"classic": (*_CLASSIC, "x-queue-leader-locator"), "quorum": _QUORUM, "stream": _STREAM},
    streams_tell_durability=True,
    streams_keep_annotations=True,
    streams_take_dead_letters=True,
    quotes_streams=False,
    streams_refuse_nacks=False,
    holds_replies=False,
    deleted_in_tx="partial",
    checks_user_first=False,
    default_types=("undefined",),
    unchecked_arguments=(),
    queue_versions=(1, 2),
    quorum_in_text="quorum",
    consumer_arguments={"classic": ("x-priority",), "quorum": ("x-priority",), "stream": _STREAM_CONSUMERS},
)
_4_3: Final = Dialect(
    version="4.3",
    server_version="4.3.6",
    mechanisms=("AMQPLAIN", "ANONYMOUS", "PLAIN", "EXTERNAL"),
    max_message_size=16 * MIB,
    min_frame_max=8192,
    unknown_type_is_hard=False,
    names_permission=True,
    adds_queue_type=True,
    default_delivery_limit=20,
    negative_is_no_limit=True,
    quorum_returns_by_name=False,
    quorum_priorities=32,
    quorum_requeues_at_end=False,
    single_active_yields=True,
    tells_first_get=False,
    counts_failures_only=True,
    failures_counted_by=("classic", "quorum"),
    drops_make_room=False,
    has_global_prefetch=False,
    returns_replies=False,
    crashes_on_bad_values=False,
    has_last_death=True,
    timeout_closes_channel=False,
    checks_body_size=True,
    wrong_header_answer=b"AMQP\x03\x01\x00\x00",
    has_local_random=True,
    queue_arguments={
        "classic": (*_CLASSIC, "x-queue-leader-locator"),
        "quorum": (
            *_QUORUM,
            "x-consumer-disconnected-timeout",
            "x-consumer-timeout",
            "x-delayed-retry-type",
            "x-delayed-retry-min",
            "x-delayed-retry-max",
        ),
        "stream": (
            "x-max-length-bytes",
            "x-queue-type",
            "x-max-age",
            "x-stream-max-segment-size-bytes",
            "x-stream-filter-size-bytes",
            "x-initial-cluster-size",
            "x-queue-leader-locator",
        ),
    },
    streams_tell_durability=True,
    streams_keep_annotations=True,
    streams_take_dead_letters=True,
    quotes_streams=False,
    streams_refuse_nacks=False,
    holds_replies=True,
    deleted_in_tx="fatal",
    checks_user_first=False,
    default_types=("", "undefined"),
    unchecked_arguments=("x-queue-mode",),
    queue_versions=(2,),
    quorum_in_text='<<"quorum">>',
    consumer_arguments={
        "classic": ("x-priority",),
        "quorum": ("x-priority", "x-consumer-timeout"),
        "stream": _STREAM_CONSUMERS,
    },
)
VERSIONS: Final[Mapping[str, Dialect]] = MappingProxyType({each.version: each for each in (_3_10, _4_0, _4_3)})
"""What ``Broker(version=…)`` takes."""


def dialect(version: str) -> Dialect:
    """The facts of *version*.

    Raises:
        ValueError: not one of `VERSIONS`.
    """
    try:
        return VERSIONS[version]
    except KeyError:
        raise ValueError(f"version must be one of {', '.join(VERSIONS)}, not {version!r}") from None
