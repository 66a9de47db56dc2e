# SPDX-License-Identifier: Apache-2.0
"""What guards do while so many calls wait for an answer of Redis that no more are made."""

from __future__ import annotations

from typing import Any

import pytest
import pytest_twisted

from lotusguard.clients.failures import DependencyFailed
from lotusguard.clients.redis.client import QUEUE_FULL, RedisClient
from lotusguard.guard.seats.redis.scripts import room_key
from lotusguard.rules.seats import Arrival

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
