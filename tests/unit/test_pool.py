"""The pool: who gets which item when, and what becomes of what fails, is cancelled, or dies."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from leveret.pool import Pool, PoolInstance, PoolInvalidStateError


class Item(PoolInstance):
    """Counts itself."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.is_closed = False

    async def close(self) -> None:
        self.is_closed = True


class Maker:
    """A constructor whose items come when the test wants it."""

    def __init__(self) -> None:
        self.made = 0
        self.making = 0
        self.most = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None

    async def __call__(self) -> Item:
        self.making += 1
        try:
            await self.gate.wait()
            if self.error is not None:
                raise self.error
            self.made += 1
            return Item(self.made)
        finally:
            self.making -= 1


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def starts(function: Callable[[], Awaitable[Any]]) -> asyncio.Future[Any]:
    return asyncio.ensure_future(function())


@pytest.fixture
def maker() -> Maker:
    return Maker()


async def test_an_item_is_used_again(maker: Maker) -> None:
    async with Pool(maker) as pool:
        async with pool.acquire() as first:
            pass
        async with pool.acquire() as second:
            assert first is second
    assert first.is_closed
    assert pool.is_closed


async def test_without_a_limit_everybody_gets_one(maker: Maker) -> None:
    async with Pool(maker) as pool:
        items = [await pool.get() for _ in range(100)]
        assert len({item.number for item in items}) == 100


async def test_the_constructor_gets_its_arguments() -> None:
    async def make(*args: int) -> Item:
        return Item(sum(args))

    async with Pool(make, 1, 2, max_size=1) as pool, pool.acquire() as item:
        assert item.number == 3


async def test_there_are_never_more_than_max_size_and_waiters_are_served_in_their_order(maker: Maker) -> None:
    pool = Pool(maker, max_size=3)
    served: list[int] = []
    in_use = most = 0

    async def work(number: int) -> None:
        nonlocal in_use, most
        async with pool.acquire():
            served.append(number)
            in_use += 1
            most = max(most, in_use)
            await turns()
            in_use -= 1

    await asyncio.gather(*map(work, range(30)))
    assert served == list(range(30))
    assert most == maker.made == 3


async def test_who_comes_later_does_not_overtake_who_waits(maker: Maker) -> None:
    pool = Pool(maker, max_size=1)
    item = await pool.get()
    waiting = starts(pool.get)
    await turns()
    pool.put(item)  # the waiter has it, though it did not run yet
    late = starts(pool.get)
    await turns()
    assert waiting.result() is item
    assert not late.done()
    pool.put(item)
    assert await late is item


async def test_a_constructor_that_fails_takes_no_room(maker: Maker) -> None:
    pool = Pool(maker, max_size=1)
    maker.error = OSError("no broker")
    for _ in range(3):
        with pytest.raises(OSError, match="no broker"):
            await pool.get()
    maker.error = None
    assert (await pool.get()).number == 1


async def test_when_the_constructor_fails_the_next_one_tries(maker: Maker) -> None:
    pool = Pool(maker, max_size=1)
    maker.gate.clear()
    maker.error = OSError("no broker")
    first, second = starts(pool.get), starts(pool.get)
    await turns()
    assert maker.making == 1  # the limit holds while items are made
    maker.gate.set()
    with pytest.raises(OSError, match="no broker"):
        await first
    with pytest.raises(OSError, match="no broker"):
        await second


@pytest.mark.parametrize("moment", ["making", "waiting", "given an item", "given leave to make one"])
async def test_a_cancelled_acquire_leaks_nothing(maker: Maker, moment: str) -> None:
    pool = Pool(maker, max_size=1)
    if moment == "making":
        maker.gate.clear()
        victim = starts(pool.get)
        await turns()
        victim.cancel()
    else:
        item = await pool.get()
        victim = starts(pool.get)
        await turns()
        if moment == "given leave to make one":
            item.is_closed = True
        if moment == "waiting":
            victim.cancel()
            await turns()
            pool.put(item)
        else:
            pool.put(item)
            victim.cancel()
    with pytest.raises(asyncio.CancelledError):
        await victim
    maker.gate.set()
    async with asyncio.timeout(1):
        async with pool.acquire():
            assert "1 in use, 0 idle" in repr(pool)
    assert "0 in use, 1 idle" in repr(pool)


async def test_what_a_cancelled_waiter_was_given_goes_to_the_next(maker: Maker) -> None:
    pool = Pool(maker, max_size=1)
    item = await pool.get()
    victim, heir = starts(pool.get), starts(pool.get)
    await turns()
    pool.put(item)
    victim.cancel()
    assert await heir is item


@pytest.mark.parametrize("is_closed", [True, lambda: True])
@pytest.mark.parametrize("when", ["in use", "idle"])
async def test_a_dead_item_is_replaced(maker: Maker, when: str, is_closed: Any) -> None:
    pool = Pool(maker, max_size=1)
    async with pool.acquire() as dead:
        if when == "in use":
            dead.is_closed = is_closed
    dead.is_closed = is_closed
    async with pool.acquire() as item:
        assert item.number == 2
    assert maker.made == 2


async def test_a_waiter_gets_a_new_one_for_a_dead_one(maker: Maker) -> None:
    pool = Pool(maker, max_size=1)
    item = await pool.get()
    waiting = starts(pool.get)
    await turns()
    await item.close()
    pool.put(item)
    assert (await waiting).number == 2


async def test_close_closes_what_is_in_use_and_the_block_ends_well(maker: Maker) -> None:
    pool = Pool(maker)
    async with pool.acquire() as item:
        await pool.close()
        assert item.is_closed
    await pool.close()


async def test_close_wakes_who_waits(maker: Maker) -> None:
    pool = Pool(maker, max_size=1)
    await pool.get()
    waiting = [starts(pool.get) for _ in range(3)]
    await turns()
    await pool.close()
    for each in waiting:
        with pytest.raises(PoolInvalidStateError):
            await each


@pytest.mark.parametrize("died", [True, False])
async def test_close_just_after_an_item_was_given(maker: Maker, died: bool) -> None:
    pool = Pool(maker, max_size=1)
    item = await pool.get()
    waiting = starts(pool.get)
    await turns()
    item.is_closed = died
    pool.put(item)
    await pool.close()
    with pytest.raises(PoolInvalidStateError):
        await waiting
    assert item.is_closed
    assert maker.made == 1


async def test_close_does_not_wait_for_an_item_that_is_being_made(maker: Maker) -> None:
    """The one in aio-pika holds a lock over the constructor."""
    made: list[Item] = []

    async def make() -> Item:
        made.append(await maker())
        return made[0]

    pool = Pool(make)
    maker.gate.clear()
    acquiring = starts(pool.get)
    await turns()
    async with asyncio.timeout(1):
        await pool.close()
    maker.gate.set()
    with pytest.raises(PoolInvalidStateError):
        await acquiring
    assert made[0].is_closed


async def test_a_closed_pool_refuses(maker: Maker) -> None:
    pool = Pool(maker)
    item = await pool.get()
    manager = pool.acquire()
    await pool.close()
    with pytest.raises(PoolInvalidStateError):
        pool.acquire()
    with pytest.raises(PoolInvalidStateError):
        await manager.__aenter__()
    with pytest.raises(PoolInvalidStateError):
        pool.put(item)
    assert issubclass(PoolInvalidStateError, RuntimeError)


async def test_an_item_that_cannot_be_closed_is_logged_and_stops_nothing(
    maker: Maker, caplog: pytest.LogCaptureFixture
) -> None:
    pool = Pool(maker)
    bad, good = await pool.get(), await pool.get()

    async def close() -> None:
        raise OSError("stuck")

    bad.close = close  # type: ignore[method-assign]
    await pool.close()
    assert good.is_closed
    assert "could not be closed" in caplog.text


@pytest.mark.parametrize("kind", ["plain", "none"])
async def test_items_may_be_anything(kind: str) -> None:
    closed: list[int] = []

    class Plain:
        def close(self) -> None:
            closed.append(1)

    async def make() -> object:
        return Plain() if kind == "plain" else 5

    async with Pool(make) as pool, pool.acquire() as first, pool.acquire() as second:
        assert (first is second) == (kind == "none")
    assert closed == ([1, 1] if kind == "plain" else [])


async def test_an_item_cannot_be_given_back_twice(maker: Maker) -> None:
    pool = Pool(maker)
    item = await pool.get()
    pool.put(item)
    with pytest.raises(ValueError, match="was not acquired"):
        pool.put(item)
    with pytest.raises(ValueError, match="was not acquired"):
        pool.put(Item(9))


async def test_a_wrong_size_is_refused(maker: Maker) -> None:
    with pytest.raises(ValueError, match="max_size must be 1 or more"):
        Pool(maker, max_size=0)


async def test_loop_is_ignored_with_a_warning(maker: Maker) -> None:
    with pytest.warns(DeprecationWarning, match="loop"):
        pool = Pool(maker, loop=asyncio.get_running_loop())
    assert (await pool.get()).number == 1


@pytest.mark.parametrize("wrong", [1.5, True, "3"])
async def test_a_size_is_a_whole_number(maker: Maker, wrong: Any) -> None:
    with pytest.raises(TypeError, match="max_size must be an int, not "):
        Pool(maker, max_size=wrong)


async def test_a_pool_knows_its_loop(maker: Maker) -> None:
    """As in aio-pika."""
    assert Pool(maker).loop is asyncio.get_running_loop()
