"""Checked by mypy and pyright, both strict, and never run: mistakes that a checker has to find.

An ``ignore`` comment that is not needed is an error itself, so each line proves that it is refused.
"""

from __future__ import annotations

from leveret import Channel, Exchange, IncomingMessage, Message, Queue


async def mistakes(channel: Channel, exchange: Exchange, queue: Queue) -> None:
    Message("text")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Message(b"", priority="5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Message(b"", headers={"k": object()})  # type: ignore[dict-item]  # pyright: ignore[reportArgumentType]
    Message(b"", contant_type="x")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await exchange.publish(b"body", "key")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await exchange.publish_many([b"body"], "key")  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    await exchange.publish(Message(b""))  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await channel.declare_queue("q", durible=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await queue.consume("not callable")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def may_be_none(queue: Queue, message: IncomingMessage) -> None:
    found = await queue.get(fail=False)
    print(found.body)  # type: ignore[union-attr]  # pyright: ignore[reportOptionalMemberAccess]
    message.delivery_tag = "5"  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
