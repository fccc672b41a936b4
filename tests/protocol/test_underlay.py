"""The views of what is below a channel, frame by frame."""

from __future__ import annotations

import asyncio

import pytest
from pamqp import commands

from leveret.exceptions import ChannelPreconditionFailed
from tests.protocol.kit import Link, linked, until, within


async def refuse(link: Link) -> None:
    """Close the channel, as the broker does."""
    link.session.send(1, commands.Channel.Close(406, "PRECONDITION_FAILED", 0, 0))
    await link.session.expect(commands.Channel.CloseOk, channel=1)


async def test_all_who_look_wait_for_one_future_that_says_what_ended_the_channel() -> None:
    async with linked() as link:
        channel = await link.channel()
        watchers = len(channel.wire._watchers)
        looks = [(await channel.get_underlay_channel()).closing for _ in range(3)]
        assert looks[0] is looks[1] is looks[2]
        assert len(channel.wire._watchers) == watchers + 1
        await refuse(link)
        with pytest.raises(ChannelPreconditionFailed):
            await within(looks[0])


async def test_whoever_waits_no_longer_takes_it_from_nobody_that_looks_later() -> None:
    async with linked() as link:
        channel = await link.channel()
        view = await channel.get_underlay_channel()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(view.closing, 0.01)  # which cancels it
        watchers, closing = len(channel.wire._watchers), view.closing
        assert not closing.done()
        assert len(channel.wire._watchers) == watchers
        await refuse(link)
        with pytest.raises(ChannelPreconditionFailed):
            await within(closing)


async def test_a_channel_that_is_gone_is_known_to_be_at_once() -> None:
    async with linked() as link:
        channel = await link.channel()
        view = await channel.get_underlay_channel()
        await refuse(link)
        await until(lambda: view.is_closed)
        with pytest.raises(ChannelPreconditionFailed):
            await within(view.closing)


async def test_a_call_gives_the_reply_and_with_nowait_none() -> None:
    async with linked() as link:
        view = await (await link.channel()).get_underlay_channel()
        reply = commands.Queue.DeclareOk("q", 3, 0)
        declared = await link.answer(view.queue_declare("q"), commands.Queue.Declare, reply)
        assert declared is not None
        assert declared.message_count == 3
        assert await within(view.queue_declare("q", nowait=True)) is None
        _, method = await link.session.expect(commands.Queue.Declare, channel=1)
        assert method.nowait
