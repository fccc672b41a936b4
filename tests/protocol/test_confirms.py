"""Publisher confirms: every publish has one outcome, the right one, whatever happens to those around it."""

from __future__ import annotations

import asyncio
import gc
import random
from typing import Any

import pytest
from pamqp import commands

from leveret import Channel, Message, ReturnedMessage
from leveret.exceptions import (
    AMQPConnectionError,
    ChannelInvalidStateError,
    ChannelNotFoundEntity,
    DeliveryError,
    MessageNacked,
    MessageReturned,
    PublishError,
    PublishOutcomeUnknown,
    PublishUnconfirmedInTime,
)
from leveret.outcome import Outcome
from leveret.wire.publisher import Publisher
from tests.protocol.kit import Link, linked, turns, until, within

Ack, Nack = commands.Basic.Ack, commands.Basic.Nack


async def publish(link: Link, channel: Channel, count: int, **kwargs: Any) -> list[asyncio.Future[Any]]:
    """Publish that many; the peer has read them when this returns."""
    futures = [
        asyncio.ensure_future(channel.default_exchange.publish(Message(b"%d" % n), f"key{n}", **kwargs))
        for n in range(count)
    ]
    for n in range(count):
        *_, body = await link.session.expect_publish()
        assert body == b"%d" % n
    return futures


def outcomes(futures: list[asyncio.Future[Any]]) -> str:
    """One letter for each publish: acked, nacked, returned, unknown, cancelled, or - for none yet."""
    letters = ""
    for future in futures:
        if not future.done():
            letters += "-"
        elif future.cancelled():
            letters += "c"
        elif future.exception() is not None:
            error = future.exception()
            letters += "n" if isinstance(error, MessageNacked) else "r" if isinstance(error, MessageReturned) else "u"
        else:
            letters += "r" if isinstance(future.result(), ReturnedMessage) else "a"
    return letters


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        ([Ack(1), Ack(2), Ack(3)], "aaa--"),
        ([Ack(3), Ack(1)], "a-a--"),
        ([Ack(5), Ack(4), Ack(3), Ack(2), Ack(1)], "aaaaa"),
        ([Ack(3, True)], "aaa--"),
        ([Ack(0, True)], "aaaaa"),
        ([Nack(2), Ack(4, True)], "anaa-"),
        ([Nack(3, True), Ack(5, True)], "nnnaa"),
        ([Ack(2), Nack(4, True), Ack(5)], "nanna"),
        ([Ack(5), Ack(3, True), Ack(4)], "aaaaa"),
        ([Nack(0, True)], "nnnnn"),
        ([Ack(3, True), Ack(2, True), Ack(3, True)], "aaa--"),
    ],
)
async def test_acks_and_nacks_settle_in_any_order(frames: list[Any], expected: str) -> None:
    async with linked() as link:
        channel = await link.channel()
        futures = await publish(link, channel, 5)
        link.session.send(1, *frames)
        await link.fence()
        assert outcomes(futures) == expected
        link.session.send(1, Ack(0, True))
        await within(asyncio.gather(*futures, return_exceptions=True))


async def test_random_confirms_agree_with_a_model() -> None:
    rng = random.Random(7)
    async with linked() as link:
        channel = await link.channel()
        model: dict[int, str] = {}
        futures: list[asyncio.Future[Any]] = []
        for _ in range(30):
            count = rng.randrange(1, 12)
            first = len(futures) + 1
            futures += await publish(link, channel, count)
            open_tags = [n for n in range(1, first + count) if n not in model]
            rng.shuffle(open_tags)
            for tag in open_tags[: rng.randrange(len(open_tags) + 1)]:
                if tag in model:
                    continue
                kind, multiple = rng.choice([Ack, Nack]), rng.random() < 0.3
                for n in range(1 if multiple else tag, tag + 1):
                    model.setdefault(n, "a" if kind is Ack else "n")
                link.session.send(1, kind(tag, multiple))
            await link.fence()
            assert outcomes(futures) == "".join(model.get(n + 1, "-") for n in range(len(futures)))
        link.session.send(1, Ack(0, True))
        await within(asyncio.gather(*futures, return_exceptions=True))


async def test_the_result_is_the_brokers_frame_and_a_nack_carries_it() -> None:
    async with linked() as link:
        channel = await link.channel()
        acked, nacked = await publish(link, channel, 2)
        link.session.send(1, Ack(1), Nack(2))
        result = await within(acked)
        assert isinstance(result, Ack)
        assert result.delivery_tag == 1
        with pytest.raises(MessageNacked) as caught:
            await within(nacked)
        assert isinstance(caught.value, DeliveryError)
        assert caught.value.frame.delivery_tag == 2


async def test_a_confirm_that_comes_before_the_caller_runs_again_is_not_lost() -> None:
    async with linked() as link:
        channel = await link.channel()
        outcome = channel.default_exchange.publish(Message(b"x"), "key")
        await link.session.expect_publish()
        link.session.send(1, Ack(1))
        await link.fence()
        assert isinstance(await within(outcome), Ack)


async def test_cancelled_and_timed_out_publishes_keep_the_numbering() -> None:
    async with linked() as link:
        channel = await link.channel()
        futures = await publish(link, channel, 3)
        futures += [asyncio.ensure_future(channel.default_exchange.publish(Message(b"t"), "key", timeout=0.02))]
        await link.session.expect_publish()
        futures[1].cancel()
        await until(futures[3].done)
        futures += await publish(link, channel, 1)
        link.session.send(1, Ack(2), Nack(4), Nack(1), Ack(3), Nack(5))
        await link.fence()
        assert outcomes(futures) == "ncaun"
        assert not channel.is_closed


async def test_a_task_that_awaits_a_publish_may_be_cancelled() -> None:
    async def awaiting(channel: Channel) -> None:
        await channel.default_exchange.publish(Message(b"0"), "key")

    async with linked() as link:
        channel = await link.channel()
        task = asyncio.create_task(awaiting(channel))
        await link.session.expect_publish()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await within(task)
        (second,) = await publish(link, channel, 1)
        link.session.send(1, Nack(1), Ack(2))
        await link.fence()
        assert outcomes([second]) == "a"


@pytest.mark.parametrize("default", [True, False])
async def test_a_publish_without_confirm_in_time_is_unknown_and_a_TimeoutError(default: bool) -> None:  # noqa: N802
    async with linked(query="operation_timeout=0.05" if default else "") as link:
        channel = await link.channel()
        (future,) = await publish(link, channel, 1, timeout=None if default else 0.05)
        with pytest.raises(PublishUnconfirmedInTime, match=r"0\.05 s.*key0") as caught:
            await within(future)
        assert isinstance(caught.value, PublishOutcomeUnknown)
        assert isinstance(caught.value, TimeoutError)
        assert isinstance(caught.value, AMQPConnectionError)
        link.session.send(1, Ack(1))
        assert await link.fence() == []
        assert not channel.is_closed


async def test_each_publish_has_its_own_default_deadline_on_one_timer() -> None:
    async with linked(query="operation_timeout=0.15") as link:
        channel = await link.channel()
        loop = asyncio.get_running_loop()
        before = len(loop._scheduled)  # type: ignore[attr-defined]
        begun = loop.time()
        first = [asyncio.ensure_future(channel.default_exchange.publish(Message(b""), "key")) for _ in range(50)]
        assert len(loop._scheduled) - before == 1  # type: ignore[attr-defined]
        for _ in first:
            await link.session.expect_publish()
        await until(lambda: loop.time() - begun > 0.07)
        (last,) = await publish(link, channel, 1)
        await until(first[-1].done)
        assert not last.done()
        await until(last.done)
        assert outcomes([*first, last]) == "u" * 51
        (again,) = await publish(link, channel, 1)
        await until(again.done)
        assert outcomes([again]) == "u"
        link.session.send(1, Ack(0, True))


async def test_infinite_timeouts_never_expire() -> None:
    async with linked(query="operation_timeout=inf") as link:
        channel = await link.channel()
        futures = await publish(link, channel, 1)
        futures += await publish(link, channel, 1, timeout=float("inf"))
        link.session.send(1, Ack(0, True))
        await within(asyncio.gather(*futures))


async def test_an_explicit_timeout_may_be_longer_than_the_default() -> None:
    async with linked(query="operation_timeout=0.03") as link:
        channel = await link.channel()
        (patient,) = await publish(link, channel, 1, timeout=5)
        (hasty,) = await publish(link, channel, 1)
        await until(hasty.done)
        assert not patient.done()
        link.session.send(1, Ack(0, True))
        await within(patient)


# ------------------------------------------------------------------------------------------------------ returns


def send_back(link: Link, data: bytes, key: str, headers: dict[str, Any] | None = None, channel: int = 1) -> None:
    properties = commands.Basic.Properties(delivery_mode=1, priority=0, headers=headers)
    link.session.send_content(channel, commands.Basic.Return(312, "NO_ROUTE", "", key), data, properties)


async def test_a_returned_message_is_the_result_of_its_publish() -> None:
    returned: list[ReturnedMessage] = []
    async with linked() as link:
        channel = await link.channel()
        channel.return_callbacks.add(lambda _, message: returned.append(message))
        futures = await publish(link, channel, 3)
        send_back(link, b"1", "key1")
        link.session.send(1, Ack(3, True))
        results = await within(asyncio.gather(*futures))
        assert outcomes(futures) == "ara"
        message = results[1]
        assert (message.reply_code, message.reply_text, message.body, message.routing_key, message.exchange) == (
            312,
            "NO_ROUTE",
            b"1",
            "key1",
            "",
        )
        assert returned == [message]


async def test_a_returned_message_raises_where_asked_for() -> None:
    async with linked() as link:
        channel = await link.channel(on_return_raises=True)
        (future,) = await publish(link, channel, 1)
        send_back(link, b"0", "key0")
        link.session.send(1, Ack(1))
        with pytest.raises(MessageReturned, match=r"NO_ROUTE.*key0") as caught:
            await within(future)
        assert isinstance(caught.value, PublishError)
        assert caught.value.message.body == b"0"


async def test_one_message_published_thrice_reports_exactly_the_lost_ones() -> None:
    async with linked() as link:
        channel = await link.channel()
        message = Message(b"same", message_id="same")
        futures = [asyncio.ensure_future(channel.default_exchange.publish(message, key)) for key in ("no", "yes", "no")]
        for _ in range(3):
            await link.session.expect_publish()
        properties = commands.Basic.Properties(delivery_mode=1, priority=0, message_id="same")
        for tag in (1, 3):
            link.session.send_content(1, commands.Basic.Return(312, "NO_ROUTE", "", "no"), b"same", properties)
            link.session.send(1, Ack(tag))
        link.session.send(1, Ack(2))
        await within(asyncio.gather(*futures))
        assert outcomes(futures) == "rar"


async def test_returns_pair_by_body_and_by_properties() -> None:
    async with linked() as link:
        channel = await link.channel()
        contents = [(b"a", None), (b"b", None), (b"b", {"n": "1"}), (b"b", {"n": "2"})]
        futures = [
            asyncio.ensure_future(channel.default_exchange.publish(Message(body, headers=headers), "key"))
            for body, headers in contents
        ]
        for _ in contents:
            await link.session.expect_publish()
        send_back(link, b"b", "key", {"n": "2"})
        send_back(link, b"b", "key")
        link.session.send(1, Ack(4, True))
        await within(asyncio.gather(*futures))
        assert outcomes(futures) == "arar"


async def test_a_return_whose_headers_the_broker_altered_still_finds_its_publish() -> None:
    async with linked() as link:
        channel = await link.channel()
        (future,) = [
            asyncio.ensure_future(
                channel.default_exchange.publish(Message(b"x", headers={"BCC": ["other"], "n": 1}), "key")
            )
        ]
        await link.session.expect_publish()
        send_back(link, b"x", "key", {"n": 1, "added": True})
        link.session.send(1, Ack(1))
        await within(future)
        assert outcomes([future]) == "r"


async def test_a_return_never_pairs_with_a_publish_that_is_not_mandatory() -> None:
    async with linked() as link:
        channel = await link.channel()
        lenient = asyncio.ensure_future(channel.default_exchange.publish(Message(b"x"), "key", mandatory=False))
        strict = asyncio.ensure_future(channel.default_exchange.publish(Message(b"x"), "key"))
        for _ in range(2):
            await link.session.expect_publish()
        send_back(link, b"x", "key")
        link.session.send(1, Ack(2, True))
        await within(asyncio.gather(lenient, strict))
        assert outcomes([lenient, strict]) == "ar"


async def test_a_large_returned_body_is_put_together() -> None:
    async with linked(frame_max=8192) as link:
        channel = await link.channel()
        body = random.Random(1).randbytes(50_000)
        future = asyncio.ensure_future(channel.default_exchange.publish(Message(body), "key"))
        await link.session.expect_publish()
        send_back(link, body, "key")
        link.session.send(1, Ack(1))
        assert (await within(future)).body == body


async def test_returns_without_confirms_reach_the_callbacks() -> None:
    returned: list[ReturnedMessage] = []
    async with linked() as link:
        channel = await link.channel(confirm=False)
        channel.return_callbacks.add(lambda _, message: returned.append(message))
        assert await within(channel.default_exchange.publish(Message(b"x"), "key")) is None
        await link.session.expect_publish()
        send_back(link, b"x", "key")
        await link.fence()
        assert [message.body for message in returned] == [b"x"]
        with pytest.raises(TypeError):
            await returned[0].ack()


@pytest.mark.expects_errors
async def test_a_failing_return_callback_does_not_lose_the_outcome() -> None:
    async with linked() as link:
        channel = await link.channel()
        channel.return_callbacks.add(lambda _, message: message.nothing)
        (future,) = await publish(link, channel, 1)
        send_back(link, b"0", "key0")
        link.session.send(1, Ack(1))
        await within(future)
        assert outcomes([future]) == "r"


# -------------------------------------------------------------------------------------------------- lost channels


async def test_publishes_pending_when_a_404_closes_the_channel_are_unknown_with_the_404_as_cause() -> None:
    async with linked() as link:
        channel, other = await link.channel(), await link.channel()
        futures = await publish(link, channel, 3)
        elsewhere = asyncio.ensure_future(other.default_exchange.publish(Message(b"x"), "key"))
        await link.session.expect_publish()
        link.session.send(1, Ack(1), commands.Channel.Close(404, "NOT_FOUND - no exchange", 60, 40))
        await link.session.expect(commands.Channel.CloseOk, channel=1)
        await until(futures[2].done)
        assert outcomes(futures) == "auu"
        errors = [future.exception() for future in futures[1:]]
        assert all(isinstance(error, PublishOutcomeUnknown) for error in errors)
        assert all(isinstance(error.__cause__, ChannelNotFoundEntity) for error in errors if error)
        assert errors[0] is not errors[1]
        with pytest.raises(ChannelInvalidStateError) as caught:
            channel.default_exchange.publish(Message(b""), "key")
        assert isinstance(caught.value.__cause__, ChannelNotFoundEntity)
        link.session.send(2, Ack(1))
        await within(elsewhere)


@pytest.mark.parametrize("how", ["eof", "reset"])
async def test_publishes_pending_when_the_link_is_lost_are_unknown(how: str) -> None:
    async with linked() as link:
        channel = await link.channel()
        futures = await publish(link, channel, 3)
        link.session.send(1, Ack(2))
        await link.fence()
        getattr(link.session, how)()
        await until(futures[2].done)
        assert outcomes(futures) == "uau"


async def test_a_read_that_breaks_off_leaves_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch, loop_errors: list[dict[str, Any]]
) -> None:
    """As a signal's KeyboardInterrupt may break it off at any moment, or an error of ours."""

    def broken(publisher: Publisher, number: int, multiple: bool) -> None:
        raise ZeroDivisionError

    async def waits(future: asyncio.Future[Any]) -> object:
        return await future

    monkeypatch.setattr(Publisher, "on_nack", broken)
    async with linked() as link:
        channel = await link.channel()
        confirmed, lost = [asyncio.create_task(waits(future)) for future in await publish(link, channel, 2)]
        await turns()
        link.session.send(1, Ack(1), Nack(2))
        assert isinstance(await within(confirmed), Ack)
        with pytest.raises(PublishOutcomeUnknown):
            await within(lost)
    assert [type(error["exception"]) for error in loop_errors] == [ZeroDivisionError]
    loop_errors.clear()


async def test_numbers_begin_again_on_a_reopened_channel() -> None:
    async with linked() as link:
        channel = await link.channel()
        (lost,) = await publish(link, channel, 1)
        link.session.send(1, commands.Channel.Close(404, "NOT_FOUND", 60, 40))
        await link.session.expect(commands.Channel.CloseOk)
        await until(lost.done)
        assert outcomes([lost]) == "u"
        reopening = asyncio.create_task(channel.reopen())
        number = await link.session.open_channel(confirm=True)
        await within(reopening)
        (future,) = await publish(link, channel, 1)
        link.session.send(number, Ack(1))
        await within(future)


# ---------------------------------------------------------------------------------------------- nobody awaits it


async def test_a_failed_publish_that_nobody_awaits_is_logged_and_counted_once(
    caplog: pytest.LogCaptureFixture, loop_errors: list[Any]
) -> None:
    before = Outcome.unretrieved
    async with linked() as link:
        channel = await link.channel()
        _ = channel.default_exchange.publish(Message(b"x"), "key")
        del _
        await link.session.expect_publish()
        link.session.send(1, Nack(1))
        await link.fence()
        gc.collect()
        await turns()
    assert Outcome.unretrieved == before + 1
    lines = [record.getMessage() for record in caplog.records if "nobody awaited" in record.getMessage()]
    assert len(lines) == 1
    assert "a publish (exchange '', routing key 'key'), and it failed: MessageNacked" in lines[0]
    assert "basic.nack" in lines[0]
    assert not loop_errors
    assert "never retrieved" not in caplog.text


async def test_a_confirmed_publish_that_nobody_awaits_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    before = Outcome.unretrieved
    async with linked() as link:
        channel = await link.channel()
        channel.default_exchange.publish(Message(b"x"), "key")
        await link.session.expect_publish()
        link.session.send(1, Ack(1))
        await link.fence()
        gc.collect()
    assert Outcome.unretrieved == before
    assert not [record for record in caplog.records if record.name.startswith("leveret")]


async def test_an_awaited_failure_is_not_counted() -> None:
    before = Outcome.unretrieved
    async with linked() as link:
        channel = await link.channel()
        (future,) = await publish(link, channel, 1)
        link.session.send(1, Nack(1))
        with pytest.raises(MessageNacked):
            await within(future)
        del future
        gc.collect()
    assert Outcome.unretrieved == before


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"routing_key": "k" * 256}, ValueError),
        ({"routing_key": "é" * 128}, ValueError),
        ({"routing_key": 5}, TypeError),
        ({"message": b"x"}, TypeError),
        ({"immediate": True}, ValueError),
        ({"message": Message(b"", headers={"x": object()})}, TypeError),  # type: ignore[dict-item]
        ({"message": Message(b"", headers={"x": "y" * 200_000})}, ValueError),
        ({"message": Message(b"", headers={"x": 2**63})}, ValueError),
        ({"message": Message(b"", message_id="i" * 256)}, ValueError),
    ],
)
async def test_a_bad_argument_raises_at_the_call_and_takes_no_number(
    arguments: dict[str, Any], error: type[Exception]
) -> None:
    async with linked() as link:
        channel = await link.channel()
        message = arguments.pop("message", Message(b"x"))
        key = arguments.pop("routing_key", "key")
        with pytest.raises(error):
            channel.default_exchange.publish(message, key, **arguments)
        assert await link.fence() == []
        futures = await publish(link, channel, 1)
        link.session.send(1, Ack(1))
        await within(futures[0])
