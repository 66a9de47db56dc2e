# SPDX-License-Identifier: Apache-2.0
"""One guard at a time listens in rooms, and the others learn what it writes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from secrets import token_hex

import pytest
import pytest_twisted
from attrs import define, field
from twisted.internet.task import deferLater

from lotusguard.clients.failures import DependencyFailed
from lotusguard.clients.redis.client import RedisClient
from lotusguard.guard.seats.redis import account
from lotusguard.guard.seats.redis.account import AccountTurns
from lotusguard.metrics import Metrics
from lotusguard.rules.redis_address import parse_address
from tests.conftest import until

from .conftest import OwnServer
from .guards import PATIENT, reactor


@define(eq=False)
class Listener:
    """Implements `Listens`. :ivar rows: what it was told as a follower."""

    ready: bool = True
    hears: bool = True
    listening: bool = False
    heard: bool = False
    rows: dict[str, str | None] = field(factory=dict)

    def listen(self) -> None:
        self.listening = True

    async def pause(self) -> None:
        self.listening = False

    def follow(self, changed: Mapping[str, str | None], *, heard: bool) -> None:
        self.rows.update(changed)
        self.heard = heard


@define(eq=False)
class Guard:
    client: RedisClient
    turns: AccountTurns
    listener: Listener = field(factory=Listener)

    async def tick(self) -> bool:
        """:return: whether it listens now."""
        await self.turns.take_turns()
        return self.listener.listening


NewGuard = Callable[[], Guard]


@pytest_twisted.async_yield_fixture
async def new_guard(own_server: OwnServer) -> AsyncIterator[Callable[[], Guard]]:
    started: list[Guard] = []

    def new() -> Guard:
        client = RedisClient(parse_address(own_server.url), reactor, Metrics(), timeout=PATIENT)
        guard = Guard(client, AccountTurns(client, token_hex(4), reactor))
        guard.turns.listener = guard.listener
        client.start()
        started.append(guard)
        return guard

    yield new
    for guard in started:
        guard.client.stop()
    await deferLater(reactor, 0.02)


async def connected(*guards: Guard) -> None:
    await until(lambda: all(guard.client.available for guard in guards))


@pytest_twisted.ensureDeferred
async def test_one_guard_listens_and_the_others_learn_what_it_writes(new_guard: NewGuard) -> None:
    first, second = new_guard(), new_guard()
    await connected(first, second)
    assert await first.tick()
    assert not await second.tick()
    assert await first.turns.put_residence({"sync": "s1", "room !a": "{}", "room !b": "{}"})
    assert await first.turns.put_residence({"sync": "s2", "room !b": None})
    assert await first.tick()
    assert not await second.tick()
    assert second.listener.rows == {"sync": "s2", "room !a": "{}", "room !b": None}
    assert second.listener.heard
    second.listener.rows.clear()
    await second.tick()
    assert second.listener.rows == {}, "only what changed is told"


@pytest_twisted.ensureDeferred
async def test_the_others_learn_that_the_one_that_listens_hears_nothing(new_guard: NewGuard) -> None:
    first, second = new_guard(), new_guard()
    await connected(first, second)
    first.listener.hears = False
    await first.tick()
    await second.tick()
    assert not second.listener.heard


@pytest_twisted.ensureDeferred
async def test_a_guard_that_hands_over_is_replaced_at_once_and_does_not_listen_again(new_guard: NewGuard) -> None:
    first, second = new_guard(), new_guard()
    await connected(first, second)
    await first.tick()
    await first.turns.put_residence({"sync": "s1"})
    await first.turns.hand_over()
    assert not first.listener.listening
    assert await second.tick()
    assert second.turns.residence() == {"sync": "s1"}
    await second.turns.hand_over()
    assert not await first.tick()


@pytest_twisted.ensureDeferred
async def test_a_guard_whose_lease_expired_writes_nothing_and_follows(
    new_guard: NewGuard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(account, "LEASE_SECONDS", 0.1)
    hanging, other = new_guard(), new_guard()
    await connected(hanging, other)
    await hanging.tick()
    monkeypatch.undo()
    end = reactor.seconds() + 15
    while not await other.tick():
        assert reactor.seconds() < end
    with pytest.raises(DependencyFailed):
        await hanging.turns.put_residence({"sync": "old"})
    assert not await hanging.tick()
    assert await other.tick()


@pytest_twisted.ensureDeferred
async def test_rooms_that_redis_has_lost_are_written_again(new_guard: NewGuard, own_server: OwnServer) -> None:
    first, second = new_guard(), new_guard()
    await connected(first, second)
    await first.tick()
    await first.turns.put_residence({"sync": "s1", "room !a": "{}"})
    await second.tick()
    for listens in (first, second):
        own_server.client.flushall()
        assert await listens.tick()
        third = new_guard()
        await connected(third)
        await third.tick()
        assert third.listener.rows == {"sync": "s1", "room !a": "{}"}
        await first.tick()


@pytest_twisted.ensureDeferred
async def test_a_guard_that_cannot_ask_redis_for_long_listens_until_it_can(
    new_guard: NewGuard, own_server: OwnServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = new_guard(), new_guard()
    await connected(first, second)
    await first.tick()
    await second.tick()
    own_server.stop()
    await until(lambda: not first.client.available and not second.client.available)
    assert await first.tick()
    assert not await second.tick()
    monkeypatch.setattr(account, "LEASE_SECONDS", 0.0)
    assert await second.tick()
    assert not await second.turns.put_residence({"sync": "alone"})
    monkeypatch.undo()
    own_server.start_again()
    await connected(first, second)
    assert await first.tick()
    assert not await second.tick()
