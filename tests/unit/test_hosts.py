"""Which host is tried next: each once a round, from the one whose turn it is, with what was learned meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from yarl import URL

from leveret.hosts import Host, Hosts, Resolver
from leveret.url import make_urls

THREE = [Host.at(URL(f"amqp://guest:secret@{name}/")) for name in ("one", "two", "three")]


def names(hosts: Sequence[Host]) -> list[str]:
    return [host.parameters.host for host in hosts]


async def test_a_round_has_each_host_once() -> None:
    assert sorted(names(await Hosts(THREE).round(1))) == ["one", "three", "two"]


async def test_hosts_are_shuffled_once() -> None:
    orders = {tuple(names(await Hosts(THREE).round(1))) for _ in range(200)}
    assert len(orders) == 6
    hosts = Hosts(THREE)
    assert {tuple(names(await hosts.round(1))) for _ in range(20)} == {tuple(names(await hosts.round(1)))}


async def test_the_next_round_begins_behind_the_host_that_was_tried_last() -> None:
    hosts = Hosts(THREE)
    order = await hosts.round(1)
    hosts.used(order[0])
    assert names(await hosts.round(1)) == names([order[1], order[2], order[0]])
    hosts.used(order[1])
    hosts.used(order[2])
    assert names(await hosts.round(1)) == names(order)


async def test_a_host_that_is_gone_changes_nothing() -> None:
    hosts = Hosts(THREE)
    order = names(await hosts.round(1))
    other = URL("amqp://other/")
    hosts.used(Host.at(other))
    assert names(await hosts.round(1)) == order


async def test_a_round_is_not_changed_by_what_is_tried_in_it() -> None:
    hosts = Hosts(THREE)
    order = await hosts.round(1)
    tried = []
    for host in order:
        tried.append(host)
        hosts.used(host)
    assert tried == order


async def test_several_hosts_in_one_url_share_all_the_rest() -> None:
    hosts = await Hosts(list(map(Host.at, make_urls("amqp://me:secret@one:1,two:2/vhost?heartbeat=7")))).round(1)
    found = sorted((h.parameters.host, h.parameters.port, h.parameters.login, h.parameters.heartbeat) for h in hosts)
    assert found == [("one", 1, "me", 7), ("two", 2, "me", 7)]
    assert {h.parameters.virtualhost for h in hosts} == {"vhost"}


async def test_a_changed_password_is_that_of_all_hosts() -> None:
    hosts = Hosts(THREE)
    order = names(await hosts.round(1))
    hosts.change_password("new")
    changed = await hosts.round(1)
    assert names(changed) == order
    assert {host.parameters.password for host in changed} == {"new"}
    assert {host.url.password for host in changed} == {"new"}


# -------------------------------------------------------------------------------------------------------- resolvers


def resolver(*rounds: Sequence[str | URL]) -> Resolver:
    """Returns one after another, and the last for ever."""
    left = list(rounds)

    async def resolve() -> Sequence[str | URL]:
        return left.pop(0) if len(left) > 1 else left[0]

    return resolve


async def test_a_resolver_is_asked_before_each_round() -> None:
    hosts = Hosts(THREE, resolver(["amqp://a/"], ["amqp://b/", "amqp://c/"]))
    assert names(await hosts.round(1)) == ["a"]
    assert sorted(names(await hosts.round(1))) == ["b", "c"]


async def test_the_turn_and_the_password_stay_while_the_resolver_says_the_same_in_any_order() -> None:
    urls = ["amqp://u:p@a/", "amqp://u:p@b/", "amqp://u:p@c/"]
    hosts = Hosts(THREE, resolver(urls, urls[::-1]))
    order = await hosts.round(1)
    hosts.used(order[0])
    hosts.change_password("new")
    after = await hosts.round(1)
    assert names(after) == names([order[1], order[2], order[0]])
    assert {host.parameters.password for host in after} == {"new"}


async def test_a_resolver_that_hangs_runs_out_of_time() -> None:
    async def hang() -> Sequence[str | URL]:
        await asyncio.Event().wait()
        raise AssertionError

    with pytest.raises(TimeoutError):
        await Hosts(THREE, hang).round(0.01)


async def test_what_a_resolver_raises_is_raised() -> None:
    async def fail() -> Sequence[str | URL]:
        raise LookupError("no such service")

    with pytest.raises(LookupError, match="no such service"):
        await Hosts(THREE, fail).round(1)


async def test_no_urls_at_all_are_a_value_error() -> None:
    with pytest.raises(ValueError, match="empty"):
        await Hosts(THREE, resolver([])).round(1)


async def test_a_resolver_may_return_the_same_list_changed() -> None:
    given = ["amqp://a/"]
    hosts = Hosts(THREE, resolver(given))
    assert names(await hosts.round(1)) == ["a"]
    given[0] = "amqp://b/"
    assert names(await hosts.round(1)) == ["b"]


@pytest.mark.parametrize("given", [["http://one/"], ["amqp://one:port/"]])
async def test_what_are_no_urls_is_a_value_error(given: list[str]) -> None:
    with pytest.raises(ValueError, match=r"."):
        await Hosts(THREE, resolver(given)).round(1)
