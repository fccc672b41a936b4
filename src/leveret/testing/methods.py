"""Every method of a channel that is not about a single message: what it asks for, and the reply.

One function a method, in a table at the end. A function that returns a method has it sent; one that refuses raises.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, cast

from pamqp.base import Frame
from pamqp.commands import Basic, Confirm, Exchange, Queue, Tx
from pamqp.commands import Channel as ChannelMethods

from leveret.testing.arguments import not_an_int
from leveret.testing.consumers import Consumer
from leveret.testing.exchanges import Target, binding
from leveret.testing.messages import erlang_type
from leveret.testing.refusals import Refusal, exchange_name, queue_name
from leveret.testing.streams import is_offset
from leveret.testing.vhost import REPLY_TO
from leveret.wire.methods import make

if TYPE_CHECKING:
    from leveret.testing.channel import Channel

# ------------------------------------------------------------------------------------------------------ channel


def _flow(channel: Channel, method: ChannelMethods.Flow) -> Frame:
    if not method.active:
        raise Refusal(540, "active=false")
    return make(ChannelMethods.FlowOk, active=True)


def _flow_ok(channel: Channel, method: ChannelMethods.FlowOk) -> None:
    """Answers nothing that this broker asks."""


# ---------------------------------------------------------------------------------------------------- exchanges


def _not_default(name: str) -> None:
    if not name:
        raise Refusal(403, "operation not permitted on the default exchange")


def _exchange_declare(channel: Channel, method: Exchange.Declare) -> Frame:
    name, vhost = _name(method.exchange), channel.vhost
    if not method.passive:
        vhost.check_type(method.exchange_type)
    _not_default(name)
    if method.passive:
        vhost.exchange(name)
        return make(Exchange.DeclareOk)
    channel.session.check("configure", name, is_queue=False)
    arguments = _table(method.arguments)
    alternate = arguments.get("alternate-exchange")
    if isinstance(alternate, str):
        channel.session.check("read", name, is_queue=False)
        channel.session.check("write", alternate, is_queue=False)
    vhost.declare_exchange(
        name,
        method.exchange_type,
        durable=method.durable,
        auto_delete=method.auto_delete,
        internal=method.internal,
        arguments=arguments,
    )
    return make(Exchange.DeclareOk)


def _exchange_delete(channel: Channel, method: Exchange.Delete) -> Frame:
    name = _name(method.exchange)
    _not_default(name)
    if name.startswith("amq."):
        raise Refusal(403, f"deletion of system {exchange_name(name, channel.vhost.name)} not allowed")
    channel.session.check("configure", name, is_queue=False)
    channel.vhost.delete_exchange(name, if_unused=method.if_unused)
    return make(Exchange.DeleteOk)


def _exchange_bind(channel: Channel, method: Exchange.Bind) -> Frame:
    _bind(channel, method.source, Target(False, method.destination), method.routing_key, method.arguments)
    return make(Exchange.BindOk)


def _exchange_unbind(channel: Channel, method: Exchange.Unbind) -> Frame:
    _unbind(channel, method.source, Target(False, method.destination), method.routing_key, method.arguments)
    return make(Exchange.UnbindOk)


# ------------------------------------------------------------------------------------------------------- queues


def _the_queue(channel: Channel, name: str) -> str:
    if name:
        return name
    if not channel.queue:
        raise Refusal(404, "no previously declared queue")
    return channel.queue


def _queue_declare(channel: Channel, method: Queue.Declare) -> Frame:
    name, vhost = _name(method.queue), channel.vhost
    if name.startswith(REPLY_TO):
        if name != REPLY_TO and name.removeprefix(REPLY_TO + ".") not in vhost.replies:
            raise Refusal(404, f"no {queue_name(name, vhost.name)}")
        return make(Queue.DeclareOk, queue=name, message_count=0, consumer_count=1)
    if method.passive:
        queue = vhost.queue(name)
        vhost.check_owner(queue, channel.session)
        queue.touch()
    else:
        arguments = _table(method.arguments)
        channel.session.check("configure", name, is_queue=True)
        exchange = arguments.get("x-dead-letter-exchange")
        if name not in vhost.queues and isinstance(exchange, str):
            channel.session.check("read", name, is_queue=True)
            channel.session.check("write", exchange, is_queue=False)
        queue = vhost.declare_queue(
            name,
            durable=method.durable,
            exclusive=method.exclusive,
            auto_delete=method.auto_delete,
            arguments=arguments,
            owner=channel.session,
        )
    channel.queue = queue.name
    return make(Queue.DeclareOk, queue=queue.name, message_count=queue.ready, consumer_count=len(queue.consumers))


def _queue_delete(channel: Channel, method: Queue.Delete) -> Frame:
    name, vhost = _the_queue(channel, _name(method.queue)), channel.vhost
    channel.session.check("configure", name, is_queue=True)
    queue = vhost.queues.get(name)
    if queue is None:
        return make(Queue.DeleteOk, message_count=0)
    vhost.check_owner(queue, channel.session)
    called = queue_name(name, vhost.name)
    if queue.is_quorum:
        for flag, asked in (("if-unused", method.if_unused), ("if-empty", method.if_empty)):
            if asked:
                raise Refusal(
                    540,
                    f"cannot delete {called}. queue.delete operations with {flag} flag set are not supported by "
                    "quorum queues",
                )
    if queue.is_stream:
        return make(Queue.DeleteOk, message_count=vhost.delete_queue(queue))  # whatever the flags say
    if method.if_unused and queue.consumers:
        raise Refusal(406, f"{called} in use")
    if method.if_empty and queue.ready:
        raise Refusal(406, f"{called} not empty")
    return make(Queue.DeleteOk, message_count=vhost.delete_queue(queue))


def _queue_purge(channel: Channel, method: Queue.Purge) -> Frame:
    name, vhost = _the_queue(channel, _name(method.queue)), channel.vhost
    channel.session.check("read", name, is_queue=True)
    queue = vhost.queue(name)
    vhost.check_owner(queue, channel.session)
    if queue.is_stream:
        raise Refusal(540, f"queue.purge not supported by stream queues {queue_name(name, vhost.name)}")
    return make(Queue.PurgeOk, message_count=queue.purge())


def _queue_and_key(channel: Channel, method: Queue.Bind | Queue.Unbind) -> tuple[str, str]:
    queue = _the_queue(channel, _name(method.queue))
    # Both left out: the key is the queue's name (AMQP 0-9-1 reference, queue.bind).
    return queue, method.routing_key if method.queue or method.routing_key else queue


def _queue_bind(channel: Channel, method: Queue.Bind) -> Frame:
    queue, key = _queue_and_key(channel, method)
    _bind(channel, method.exchange, Target(True, queue), key, method.arguments)
    return make(Queue.BindOk)


def _queue_unbind(channel: Channel, method: Queue.Unbind) -> Frame:
    queue, key = _queue_and_key(channel, method)
    _unbind(channel, method.exchange, Target(True, queue), key, method.arguments)
    return make(Queue.UnbindOk)


def _bind(channel: Channel, source: str, target: Target, key: str, arguments: object) -> None:
    _check_ends(channel, source, target)
    vhost, new = channel.vhost, binding(source, target, key, _table(arguments))
    exchange = vhost.exchange(source)
    queue = vhost.queue(target.name) if target.is_queue else None
    if queue is None:
        vhost.exchange(target.name)
    exchange.check(new)
    if queue is not None:
        vhost.check_owner(queue, channel.session)
    vhost.bind(new)


def _unbind(channel: Channel, source: str, target: Target, key: str, arguments: object) -> None:
    _check_ends(channel, source, target)
    vhost, old = channel.vhost, binding(source, target, key, _table(arguments))
    if target.is_queue and vhost.has(old):
        vhost.check_owner(vhost.queue(target.name), channel.session)
    vhost.unbind(old)


def _check_ends(channel: Channel, source: str, target: Target) -> None:
    _not_default(source)
    if not target.is_queue:
        _not_default(target.name)
    channel.session.check("write", target.name, is_queue=target.is_queue)
    channel.session.check("read", source, is_queue=False)


# -------------------------------------------------------------------------------------------------------- basic


def _qos(channel: Channel, method: Basic.Qos) -> Frame:
    if method.prefetch_size:
        raise Refusal(540, f"prefetch_size!=0 ({method.prefetch_size})")
    is_global = method.global_ and channel.server.dialect.has_global_prefetch
    channel.set_prefetch(method.prefetch_count, of_channel=is_global)
    return make(Basic.QosOk)


def _consume(channel: Channel, method: Basic.Consume) -> Frame | None:
    vhost, tag = channel.vhost, _name(method.consumer_tag)
    if tag in channel.consumers:
        raise Refusal(530, f"attempt to reuse consumer tag '{tag}'")
    tag = tag or f"amq.ctag-{secrets.token_urlsafe(16)}"
    if method.queue == REPLY_TO:
        return _consume_replies(channel, method, tag)
    name = _the_queue(channel, _name(method.queue))
    channel.session.check("read", name, is_queue=True)
    queue = vhost.queue(name)
    vhost.check_owner(queue, channel.session)
    called = queue_name(name, vhost.name)
    arguments = _table(method.arguments)
    kind = f"rabbit_{queue.type}_queue"
    if (problem := not_an_int(arguments.get("x-priority", 0))) is not None and not queue.is_stream:
        raise Refusal(406, f"invalid arg 'x-priority' for {called}: {problem}")
    for key in _unknown(arguments, channel.server.dialect.consumer_arguments, queue.type):
        raise Refusal(406, f"invalid arg '{key}' for {called} of queue type {kind}")
    consumers = tuple(queue.consumers)
    alone = method.exclusive and (consumers or queue.consumers.is_single_active)
    if queue.type == "classic" and (alone or any(each.exclusive for each in consumers)):
        raise Refusal(403, f"{called} in exclusive use")
    if queue.is_stream:
        _check_reader(channel, method, arguments.get("x-stream-offset", "next"), called)
    if queue.type != "classic" and channel.global_prefetch:
        raise Refusal(540, f"{called} does not support global qos")
    consumer = Consumer(
        tag,
        name,
        channel,
        no_ack=method.no_ack,
        exclusive=method.exclusive,
        prefetch=channel.prefetch,
        arguments=arguments,
    )
    # Before the reply is sent, nothing may be delivered; and the queue may deliver at once.
    if not method.nowait:
        channel.session.send_method(channel.number, make(Basic.ConsumeOk, consumer_tag=tag))
    channel.consumers[tag] = consumer
    queue.add_consumer(consumer)
    return None


def _check_reader(channel: Channel, method: Basic.Consume, offset: object, called: str) -> None:
    """Refuse a consumer that the stream *called* cannot have."""
    dialect = channel.server.dialect
    if not is_offset(offset):
        if dialect.crashes_on_bad_values:
            raise Refusal(541, "", class_id=0, method_id=0)
        problem = f'{{invalid_stream_offset_arg,{{{erlang_type(offset)},<<"{offset}">>}}}}'
        raise Refusal(406, f"invalid arg 'x-stream-offset' for {called}: {problem}")
    if not channel.prefetch:
        stream = f"'{called}'" if dialect.quotes_streams else f"stream {called}"
        raise Refusal(406, f"consumer prefetch count is not set for {stream}")
    if method.no_ack:
        streams = "stream queues" if dialect.quotes_streams else "stream"
        raise Refusal(540, f"automatic acknowledgement not supported by {streams} {called}")


def _unknown(arguments: Iterable[str], known: Mapping[str, tuple[str, ...]], kind: str) -> list[str]:
    """The *arguments* that only other types of queues know."""
    others = {each for keys in known.values() for each in keys} - {*known[kind]}
    return [key for key in arguments if key in others]


def _consume_replies(channel: Channel, method: Basic.Consume, tag: str) -> Frame:
    if not method.no_ack:
        raise Refusal(406, "reply consumer cannot acknowledge")
    if channel.reply_consumer is not None:
        raise Refusal(406, "reply consumer already set")
    channel.add_reply_consumer(Consumer(tag, REPLY_TO, channel, no_ack=True))
    return make(Basic.ConsumeOk, consumer_tag=tag)


def _cancel(channel: Channel, method: Basic.Cancel) -> Frame:
    channel.cancel(_name(str(method.consumer_tag)))
    return make(Basic.CancelOk, consumer_tag=method.consumer_tag)


def _cancel_ok(channel: Channel, method: Basic.CancelOk) -> None:
    """Clients that are polite answer the broker's cancel."""


def _get(channel: Channel, method: Basic.Get) -> Frame | None:
    name, vhost = _the_queue(channel, _name(method.queue)), channel.vhost
    channel.session.check("read", name, is_queue=True)
    queue = vhost.queue(name)
    vhost.check_owner(queue, channel.session)
    if queue.is_stream:
        raise Refusal(540, f"basic.get not supported by stream queues {queue_name(name, vhost.name)}")
    if queue.is_quorum and queue.consumers.is_single_active:
        raise Refusal(
            405,
            f"cannot obtain access to locked {queue_name(name, vhost.name)}. basic.get operations are not supported by "
            f"{channel.server.dialect.quorum_in_text} queues with single active consumer",
        )
    entry = queue.get(no_ack=method.no_ack)
    if entry is None:
        return make(Basic.GetEmpty, cluster_id="")
    channel.deliver_got(queue, entry, no_ack=method.no_ack)
    return None


def _ack(channel: Channel, method: Basic.Ack) -> None:
    channel.settle(method.delivery_tag, multiple=method.multiple, verdict="ack")


def _nack(channel: Channel, method: Basic.Nack) -> None:
    verdict = "requeue" if method.requeue else "discard"
    channel.settle(method.delivery_tag, multiple=method.multiple, verdict=verdict)


def _reject(channel: Channel, method: Basic.Reject) -> None:
    channel.settle(method.delivery_tag or 0, multiple=False, verdict="retry" if method.requeue else "fail")


def _recover(channel: Channel, method: Basic.Recover) -> Frame:
    _recover_async(channel, method)
    return make(Basic.RecoverOk)


def _recover_async(channel: Channel, method: Basic.Recover | Basic.RecoverAsync) -> None:
    if not method.requeue:
        raise Refusal(540, "requeue=false")
    channel.recover()


# ------------------------------------------------------------------------------------------------------- modes


def _confirm_select(channel: Channel, method: Confirm.Select) -> Frame:
    if channel.mode == "tx":
        raise Refusal(406, "cannot switch from tx to confirm mode")
    channel.mode = "confirm"
    return make(Confirm.SelectOk)


def _tx_select(channel: Channel, method: Tx.Select) -> Frame:
    if channel.mode == "confirm":
        raise Refusal(406, "cannot switch from confirm to tx mode")
    channel.mode = "tx"
    return make(Tx.SelectOk)


def _tx_commit(channel: Channel, method: Tx.Commit) -> Frame:
    _in_tx(channel)
    channel.commit()
    return make(Tx.CommitOk)


def _tx_rollback(channel: Channel, method: Tx.Rollback) -> Frame:
    _in_tx(channel)
    channel.rollback()
    return make(Tx.RollbackOk)


def _in_tx(channel: Channel) -> None:
    if channel.mode != "tx":
        raise Refusal(406, "channel is not transactional")


# ------------------------------------------------------------------------------------------------------ helpers


def _name(name: str) -> str:
    # RabbitMQ takes line breaks out of names, so that they cannot forge lines of its log.
    return name.replace("\r", "").replace("\n", "")


def _table(arguments: object) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", arguments) if isinstance(arguments, Mapping) else {}


HANDLERS: Final[Mapping[type[Frame], Callable[[Channel, Any], Frame | None]]] = {
    ChannelMethods.Flow: _flow,
    ChannelMethods.FlowOk: _flow_ok,
    Exchange.Declare: _exchange_declare,
    Exchange.Delete: _exchange_delete,
    Exchange.Bind: _exchange_bind,
    Exchange.Unbind: _exchange_unbind,
    Queue.Declare: _queue_declare,
    Queue.Delete: _queue_delete,
    Queue.Purge: _queue_purge,
    Queue.Bind: _queue_bind,
    Queue.Unbind: _queue_unbind,
    Basic.Qos: _qos,
    Basic.Consume: _consume,
    Basic.Cancel: _cancel,
    Basic.CancelOk: _cancel_ok,
    Basic.Get: _get,
    Basic.Ack: _ack,
    Basic.Nack: _nack,
    Basic.Reject: _reject,
    Basic.Recover: _recover,
    Basic.RecoverAsync: _recover_async,
    Confirm.Select: _confirm_select,
    Tx.Select: _tx_select,
    Tx.Commit: _tx_commit,
    Tx.Rollback: _tx_rollback,
}
"""What to do for each method; others are answered with 503 or 540."""
