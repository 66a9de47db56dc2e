# SPDX-License-Identifier: Apache-2.0
"""What guards do while so many calls wait for an answer of Redis that no more are made."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import Clock

from lotusguard.clients.failures import DependencyFailed
from lotusguard.clients.redis.client import BUSY_LONGEST, BUSY_POLL, QUEUE_FULL, RedisClient, when_less_busy
from lotusguard.guard.seats.redis.scripts import room_key
from lotusguard.rules.seats import Arrival

from .conftest import OwnServer
from .guards import guards, reactor


@pytest_twisted.ensureDeferred
async def test_no_guard_goes_alone_because_the_queue_is_full_when_it_asks_which_rooms_are_kept(
    url: str, room: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, refused = RedisClient.call, set()

    async def full_once(client: RedisClient, *words: Any, **how: Any) -> Any:
        if words not in refused and words == ("PTTL", room_key(room)):
            refused.add(words)
            raise DependencyFailed("redis", QUEUE_FULL)
        return await call(client, *words, **how)

    alias = f"alias of {room}"
    async with guards(url, 1) as (guard,):
        await guard.book.apply_listing(room, alias, [Arrival("PA_a", "a", "a")], 1, reactor.seconds())
        await guard.book.is_started(room)
        monkeypatch.setattr(RedisClient, "call", full_once)
        assert alias in await guard.book.kept_aliases()
        assert refused
        assert not guard.book.unshared


@pytest_twisted.ensureDeferred
async def test_the_one_question_about_the_data_set_is_asked_although_the_queue_is_full(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with guards(url, 1) as (guard,):
        data_set = guard.rebuilding.data_set
        monkeypatch.setattr("lotusguard.clients.redis.client.CALLS_AT_ONCE", 0)
        with pytest.raises(DependencyFailed, match=QUEUE_FULL):
            await guard.client.call("PING")
        assert await guard.rebuilding.still(data_set, guard.rebuilding.ask_generation())


@pytest_twisted.ensureDeferred
async def test_a_crowd_loads_a_script_once_and_nobody_fails_although_it_fills_the_queue(
    own_server: OwnServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with guards(own_server.url, 1) as (guard,):
        monkeypatch.setattr("lotusguard.clients.redis.client.CALLS_AT_ONCE", 20)
        own_server.client.script_flush()
        own_server.client.config_resetstat()
        asked = [Deferred.fromCoroutine(guard.shared.owns_seat(f"!{n}", "a")) for n in range(20)]
        assert await gatherResults(asked, consumeErrors=True) == [False] * 20
        assert own_server.client.info("commandstats")["cmdstat_script|load"]["calls"] <= 3


def test_a_call_is_made_again_some_times_although_this_process_was_busy_for_long() -> None:
    clock, asked, outcome = Clock(), list[float](), list[Any]()

    async def full(until: int) -> str:
        asked.append(clock.seconds())
        if len(asked) <= until:
            raise DependencyFailed("redis", QUEUE_FULL)
        return "answer"

    Deferred.fromCoroutine(when_less_busy(clock, partial(full, 3))).addBoth(outcome.append)
    clock.advance(30.0)
    clock.pump([BUSY_POLL] * 2)
    assert outcome == ["answer"]
    asked.clear()
    Deferred.fromCoroutine(when_less_busy(clock, partial(full, 1000))).addErrback(outcome.append)
    clock.pump([BUSY_POLL] * 100)
    assert outcome[1].check(DependencyFailed)
    assert BUSY_LONGEST <= asked[-1] - asked[0] <= 2 * BUSY_LONGEST
