"""Replies that the broker may refuse.

It does so by closing the channel, and with it everything else that runs there: the calls in hand come again, that one
too, which would go on for ever. So such a reply goes by a channel of its own, and whoever sends it learns its fate.
"""

from __future__ import annotations

from leveret.channel import Channel
from leveret.exceptions import ChannelClosed, PublishOutcomeUnknown
from leveret.message import Message

LARGE = 16 * 1024 * 1024
"""Bytes beyond which a reply may be refused: RabbitMQ 4 takes no more, unless its ``max_message_size`` says so."""


async def publish_apart(channel: Channel, message: Message, routing_key: str) -> None:
    """Publish to the default exchange, on another channel of the connection of *channel*, and wait for the confirm.

    Raises:
        ChannelClosed: the broker refuses *message*.
        DeliveryError, ChannelInvalidStateError, ChannelLimitReached, TimeoutError: it was not confirmed.
    """
    async with channel.connection.channel() as apart:
        try:
            await apart.default_exchange.publish(message, routing_key, mandatory=False, wait_for_link=False)
        except PublishOutcomeUnknown as exc:
            if (refusal := refused(exc.__cause__)) is None:
                raise
            raise refusal from exc


def refused(error: BaseException | None) -> ChannelClosed | None:
    """*error*, if it says that the broker closed a channel."""
    return error if isinstance(error, ChannelClosed) and error.by_broker else None
