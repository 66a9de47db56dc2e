# SPDX-License-Identifier: Apache-2.0
"""Several guards' lobbies over one Valkey: one entry for each person, one decision, whatever happens to a guard."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from random import Random
from secrets import token_hex
from typing import Any

import pytest
import pytest_twisted
from attrs import define, evolve
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import Clock, deferLater

from lotusguard.clients.circuit_breaker import FAILURES_TO_OPEN
from lotusguard.clients.redis.client import RedisClient
from lotusguard.guard.lobby import Lobby, LobbyStopped
from lotusguard.guard.lobby.redis.entries import RedisEntries
from lotusguard.guard.lobby.redis.replica import Replica
from lotusguard.metrics import Metrics
from lotusguard.rules import lobby, lobby_book
from lotusguard.rules.lobby import LobbyState
from lotusguard.rules.redis_address import parse_address
from lotusguard.rules.refusals import JoinRefused
from tests.calls import logged, named
from tests.conftest import until

from .conftest import OwnServer
from .guards import PATIENT, reactor

BOB, CAROL, MALLORY = "@bob:example.org", "@carol:example.org", "@mallory:example.org"
S = LobbyState


@define(eq=False)
class PassingTime:
    """The reactor's clock, on which a test lets time pass."""

    passed: float = 0.0

    def seconds(self) -> float:
        return float(reactor.seconds()) + self.passed

    def callLater(self, delay: float, *work: Any, **more: Any) -> Any:
        return reactor.callLater(delay, *work, **more)

    def getDelayedCalls(self) -> Any:
        return reactor.getDelayedCalls()


@define(eq=False)
class GuardLobby:
    """The parts of a guard that deal with the lobby. Time passes when the test says so."""

    client: RedisClient
    entries: RedisEntries
    lobby: Lobby
    metrics: Metrics

    @classmethod
    def start(cls, url: str, longest_wait: float = 600.0, clock: Any = reactor) -> GuardLobby:
        metrics = Metrics()
        client = RedisClient(parse_address(url), reactor, metrics, timeout=PATIENT)
        entries = RedisEntries(client, token_hex(4), clock, longest_wait)
        guard = cls(client, entries, Lobby(entries, clock, time.time, metrics, longest_wait), metrics)
        client.start()
        return guard

    def wait(self, room: str, user: str = BOB) -> Deferred[LobbyState | None]:
        """Hold a request of somebody who has asked."""
        until = reactor.seconds() + 600
        return Deferred.fromCoroutine(self.lobby.wait(room, user, until, lambda: True))

    async def ask(self, room: str, user: str = BOB) -> Deferred[LobbyState | None]:
        await self.lobby.ask(room, user)
        return self.wait(room, user)

    def knows(self, room: str, state: LobbyState | None, user: str = BOB) -> Deferred[None]:
        return until(lambda: self.lobby.state_of(room, user) is state)

    def connected(self, connected: bool = True) -> Deferred[None]:
        return until(lambda: self.client.available is connected)

    def decided(self, decision: str) -> float:
        labels = {"decision": decision}
        return self.metrics.registry.get_sample_value("lotusguard_lobby_decisions_total", labels) or 0.0

    def kill(self) -> None:
        self.client.stop()


@asynccontextmanager
async def lobbies(
    url: str, count: int = 2, longest_wait: float = 600.0, clock: Any = reactor
) -> AsyncIterator[Sequence[GuardLobby]]:
    started = [GuardLobby.start(url, longest_wait, clock) for _ in range(count)]
    try:
        for guard in started:
            await guard.connected()
            await guard.lobby.pass_time()
            await hears(guard, started[0])
        yield started
    finally:
        for guard in started:
            guard.kill()
        await deferLater(reactor, 0.02)


async def hears(guard: GuardLobby, other: GuardLobby) -> None:
    """Wait until a guard hears what another one does."""
    room = f"!{token_hex(4)}:example.org"
    await other.lobby.ask(room, BOB)
    await guard.knows(room, S.WAITING)
    await other.lobby.left_room(room, BOB)
    await guard.knows(room, None)


async def agree(guards: Sequence[GuardLobby], room: str, states: Mapping[str, LobbyState]) -> None:
    """Wait until all guards know these states. Time passes for them as it does in the service."""

    def known(guard: GuardLobby) -> dict[str, LobbyState | None]:
        return {user: guard.lobby.state_of(room, user) for user in states}

    end = reactor.seconds() + 60
    while not all(known(guard) == states for guard in guards):
        assert reactor.seconds() < end, [known(guard) for guard in guards]
        for guard in guards:
            await guard.lobby.pass_time()
        await deferLater(reactor, 0.05)


@pytest.fixture
def short_lives(monkeypatch: pytest.MonkeyPatch) -> float:
    """Entries that no request is held for last shorter than they do in operation."""
    seconds = 0.3
    monkeypatch.setitem(lobby.TABLE, S.WAITING, evolve(lobby.TABLE[S.WAITING], lifetime=seconds))
    return seconds


@pytest.mark.parametrize(("admit", "state"), [(True, S.ACCEPTED), (False, S.DENIED)])
@pytest_twisted.ensureDeferred
async def test_a_request_held_at_one_guard_ends_when_another_one_is_told_the_decision(
    url: str, room: str, admit: bool, state: LobbyState
) -> None:
    async with lobbies(url) as (first, second):
        held = await first.ask(room)
        assert await second.lobby.decide(room, BOB, admit=admit, by="@mod:example.org")
        began = reactor.seconds()
        assert await held is state
        assert reactor.seconds() - began < 5
        counted = [guard.decided("admitted" if admit else "denied") for guard in (first, second)]
        assert counted == [0, 1], "a decision is counted once"


@pytest_twisted.ensureDeferred
async def test_one_person_has_one_entry_however_many_guards_they_ask(url: str, room: str) -> None:
    async with lobbies(url, 3) as guards:
        asked = await gatherResults([Deferred.fromCoroutine(guard.lobby.ask(room, BOB)) for guard in guards])
        assert len({entry.id for entry in asked}) == 1
        held = [guard.wait(room) for guard in guards]
        for guard in guards:
            await guard.knows(room, S.WAITING)
        assert (
            len({round(one.since, 1) for guard in guards for one in guard.lobby.waiting() if one.room_id == room}) == 1
        )
        await guards[2].lobby.decide(room, BOB, admit=True, by="")
        assert [await answer for answer in held] == [S.ACCEPTED] * 3


@pytest_twisted.ensureDeferred
async def test_of_two_moderators_at_two_guards_one_decides(url: str, room: str) -> None:
    async with lobbies(url) as (first, second):
        for user in (f"@{n}:example.org" for n in range(20)):
            await first.lobby.ask(room, user)
            deciding = [
                Deferred.fromCoroutine(guard.lobby.decide(room, user, admit=admit, by=""))
                for guard, admit in ((first, True), (second, False))
            ]
            assert (await gatherResults(deciding)).count(True) >= 1
            state = S.ACCEPTED if await first.lobby.read(room, user) is S.ACCEPTED else S.DENIED
            await gatherResults([guard.knows(room, state, user) for guard in (first, second)])


@pytest_twisted.ensureDeferred
async def test_asking_at_another_guard_never_overwrites_a_decision(url: str, room: str) -> None:
    async with lobbies(url) as (first, second):
        await first.lobby.ask(room, BOB)
        await first.lobby.decide(room, BOB, admit=False, by="")
        assert (await second.lobby.ask(room, BOB)).state is S.DENIED


@pytest_twisted.ensureDeferred
async def test_a_removal_and_a_late_admission_are_known_to_all_guards(url: str, room: str) -> None:
    async with lobbies(url) as (first, second):
        await first.lobby.remove(room, BOB, "@mod:example.org")
        await second.knows(room, S.REMOVED)
        assert second.lobby.has_removed(room)
        assert not await second.lobby.let_in(room, BOB)
        assert await second.lobby.decide(room, BOB, admit=True, by="")
        await first.knows(room, S.ACCEPTED)
        await first.lobby.call_ended(room)
        await second.knows(room, None)


@pytest_twisted.ensureDeferred
async def test_places_in_lobbies_are_shared_out_over_all_guards_and_by_one_that_is_alone(
    own_server: OwnServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(lobby.TABLE, S.WAITING, evolve(lobby.TABLE[S.WAITING], lifetime=600.0))
    monkeypatch.setattr(lobby_book, "WAITING_PER_USER", 2)
    monkeypatch.setattr(lobby_book, "WAITING_FOR_OTHER_SERVERS", 3)
    async with lobbies(own_server.url) as guards:
        first, second = (guard.lobby for guard in guards)
        await first.ask("!0:example.org", BOB, local=True)
        await second.ask("!1:example.org", BOB, local=True)
        await guards[1].knows("!0:example.org", S.WAITING)
        await guards[0].knows("!1:example.org", S.WAITING)
        for alone in (False, True):
            if alone:
                own_server.stop()
                await guards[0].connected(False)
            with pytest.raises(JoinRefused):  # Bob waits in as many rooms as anybody may
                await first.ask("!2:example.org", BOB, local=True)
            user = f"@{alone}:hostile.example"
            assert (await first.ask(f"!3:{alone}", user)).state is S.WAITING
            with pytest.raises(JoinRefused):  # all that is left is taken by the server of the first
                await first.ask("!4:example.org", "@second:hostile.example")
            assert (await first.ask("!4:example.org", CAROL, local=True)).state is S.WAITING
            await first.left_room(f"!3:{alone}", user)
            await first.left_room("!4:example.org", CAROL)


@pytest_twisted.ensureDeferred
async def test_a_person_who_waits_at_a_guard_that_is_killed_keeps_their_entry(
    url: str, room: str, short_lives: float
) -> None:
    async with lobbies(url) as (killed, other):
        (await killed.ask(room)).addErrback(lambda failure: None)
        await killed.lobby.pass_time()  # says that it holds a request
        before = killed.lobby.waiting()[0].since
        killed.kill()
        end = reactor.seconds() + 1.2 * short_lives
        await until(lambda: reactor.seconds() > end)
        await other.lobby.pass_time()
        assert other.lobby.waiting_in(room) == [BOB]
        held = await other.ask(room)
        assert [one.since for one in other.lobby.waiting()] == [pytest.approx(before, abs=0.5)]
        await other.lobby.decide(room, BOB, admit=True, by="")
        assert await held is S.ACCEPTED


@pytest_twisted.ensureDeferred
async def test_a_person_who_disconnects_stops_waiting_at_all_guards(url: str, room: str, short_lives: float) -> None:
    async with lobbies(url) as (first, second):
        held = await first.ask(room)
        held.addErrback(lambda failure: None)
        await first.lobby.pass_time()
        held.cancel()
        end = reactor.seconds() + 60
        while second.lobby.waiting_in(room):
            assert reactor.seconds() < end
            await deferLater(reactor, 0.05)
            await second.lobby.pass_time()


@pytest_twisted.ensureDeferred
async def test_a_guard_that_stops_leaves_its_entries_to_the_others(url: str, room: str) -> None:
    async with lobbies(url) as (first, second):
        held = await first.ask(room)
        outcome: list[object] = []
        held.addErrback(lambda failure: outcome.append(failure.check(LobbyStopped)))
        await first.lobby.pass_time()
        first.lobby.stop()
        assert outcome == [LobbyStopped]
        await second.knows(room, S.WAITING)


@pytest_twisted.ensureDeferred
async def test_nobody_waits_longer_than_the_setting_says(url: str, room: str) -> None:
    async with lobbies(url, longest_wait=0.3) as (first, second):
        held = await first.ask(room)
        assert await held is S.UNANSWERED
        await second.knows(room, S.UNANSWERED)


@pytest_twisted.ensureDeferred
async def test_nobody_waits_longer_without_redis(own_server: OwnServer, room: str) -> None:
    async with lobbies(own_server.url, 1, longest_wait=1.0) as (guard,):
        held = await guard.ask(room)
        own_server.stop()
        await guard.connected(False)
        await guard.lobby.pass_time()
        assert await held is S.UNANSWERED
        assert guard.entries.alone


@pytest_twisted.ensureDeferred
async def test_a_guard_that_starts_learns_what_was_decided(url: str, room: str) -> None:
    async with lobbies(url, 1) as (first,):
        await first.lobby.remove(room, BOB, "")
        await first.lobby.ask(room, CAROL)
        async with lobbies(url, 1) as (started,):
            await started.knows(room, S.REMOVED)
            await started.knows(room, S.WAITING, CAROL)


@pytest_twisted.ensureDeferred
async def test_what_happened_while_a_subscription_was_lost_is_found_out(url: str, room: str) -> None:
    async with lobbies(url) as (first, second):
        held = await second.ask(room)
        second.client.subscribe_again()
        await first.lobby.decide(room, BOB, admit=True, by="")
        assert await held is S.ACCEPTED


@pytest_twisted.ensureDeferred
async def test_a_subscription_that_loses_messages_is_renewed(url: str, room: str) -> None:
    async with lobbies(url) as (first, second):
        held = await second.ask(room)
        second.client.listen("lotusguard:lobby", lambda message: None)
        await first.lobby.decide(room, BOB, admit=True, by="")
        with logged() as events:
            end = reactor.seconds() + 60
            while not held.called:
                assert reactor.seconds() < end
                await second.lobby.pass_time()
                await deferLater(reactor, 0.1)
        assert named(events, "lobby_missed")
        assert await held is S.ACCEPTED


@pytest_twisted.ensureDeferred
async def test_without_redis_each_guard_goes_on_alone_and_what_it_decided_is_shared_later(
    own_server: OwnServer, room: str
) -> None:
    async with lobbies(own_server.url) as (first, second):
        held = await first.ask(room)
        await second.knows(room, S.WAITING)
        own_server.stop()
        for guard in (first, second):
            await guard.connected(False)
            await guard.lobby.pass_time()
            assert guard.entries.alone
        await second.lobby.remove(room, CAROL, "@mod:example.org")
        assert await second.lobby.decide(room, BOB, admit=True, by="")
        assert not held.called
        own_server.start_again()
        await agree((first, second), room, {BOB: S.ACCEPTED, CAROL: S.REMOVED})
        assert await held is S.ACCEPTED
        await until(lambda: not first.entries.alone and not second.entries.alone)


@pytest_twisted.ensureDeferred
async def test_a_redis_that_comes_back_empty_is_given_what_the_guards_know(own_server: OwnServer, room: str) -> None:
    async with lobbies(own_server.url) as (first, second):
        held = await first.ask(room)
        await second.lobby.remove(room, CAROL, "")
        await second.knows(room, S.WAITING)
        own_server.stop()
        await until(lambda: not first.client.available and not second.client.available)
        own_server.start_again()
        end = reactor.seconds() + 60
        for guard in (first, second):
            await guard.connected()
            for user, state in ((BOB, S.WAITING), (CAROL, S.REMOVED)):
                while await guard.lobby.read(room, user) is not state:  # the guards give entries back one by one
                    assert reactor.seconds() < end
                    await guard.lobby.pass_time()
        await second.lobby.decide(room, BOB, admit=True, by="")
        assert await held is S.ACCEPTED


@pytest_twisted.ensureDeferred
async def test_data_that_are_deleted_while_redis_runs_are_given_back(own_server: OwnServer, room: str) -> None:
    async with lobbies(own_server.url) as (first, second):
        await first.lobby.remove(room, BOB, "")
        await second.knows(room, S.REMOVED)
        await deferLater(reactor, 0.01)
        own_server.client.flushall()
        await second.lobby.pass_time()
        end = reactor.seconds() + 60
        while await first.lobby.read(room, BOB) is not S.REMOVED:
            assert reactor.seconds() < end


@pytest_twisted.ensureDeferred
async def test_what_two_guards_decided_alone_becomes_one_decision(own_server: OwnServer, room: str) -> None:
    clock = PassingTime()
    async with lobbies(own_server.url, clock=clock) as (first, second):
        await first.lobby.let_in(room, BOB)
        await second.knows(room, S.ACCEPTED)
        own_server.stop()
        await until(lambda: not first.client.available and not second.client.available)
        clock.passed += 10  # the later decision counts, and answers that take long make times uncertain
        await second.lobby.remove(room, BOB, "")
        await first.lobby.ask(room, CAROL)
        await second.lobby.let_in(room, CAROL)
        own_server.start_again()
        await agree((first, second), room, {BOB: S.REMOVED, CAROL: S.ACCEPTED})


@pytest_twisted.ensureDeferred
async def test_what_a_guard_hears_while_it_is_alone_does_not_undo_what_it_decided(url: str, room: str) -> None:
    async with lobbies(url) as (first, second):
        second.client.breaker.failures = FAILURES_TO_OPEN  # it makes no calls, and hears other guards all the same
        assert await second.lobby.let_in(room, BOB)
        await second.lobby.remove(room, CAROL, "")
        assert second.entries.alone
        for user in (BOB, CAROL):
            await first.lobby.ask(room, user)
        await first.lobby.let_in(room, MALLORY)
        await second.knows(room, S.ACCEPTED, MALLORY)  # so it has heard of the others
        second.client.breaker.succeeded()
        await agree((first, second), room, {BOB: S.ACCEPTED, CAROL: S.REMOVED, MALLORY: S.ACCEPTED})


@pytest_twisted.ensureDeferred
async def test_all_entries_are_read_in_pages(url: str, room: str) -> None:
    async with lobbies(url, 1) as (first,):
        rooms = [f"{room}{number}" for number in range(120)]
        asked = [Deferred.fromCoroutine(first.lobby.let_in(name, BOB)) for name in rooms]
        await gatherResults(asked)
        async with lobbies(url, 1) as (started,):
            await until(lambda: {started.lobby.state_of(name, BOB) for name in rooms} == {S.ACCEPTED})


@pytest_twisted.ensureDeferred
async def test_what_guards_know_already_costs_no_script(url: str, room: str) -> None:
    async with lobbies(url, 1) as (first,):
        await first.lobby.let_in(room, BOB)
        first.kill()
        await until(lambda: not first.client.available)
        assert await first.lobby.let_in(room, BOB)
        await first.lobby.switched_off("!nobody-waits-here:example.org")
        assert not first.entries.alone


@pytest_twisted.ensureDeferred
async def test_an_end_that_is_heard_of_while_all_entries_are_read_counts(room: str) -> None:
    told = {"id": "1", "user": BOB, "state": "waiting", "began": "0", "expires": "99", "notice": "", "version": 5}

    class Redis:
        """Its answer is overtaken by the message that the entry has ended."""

        async def run(self, script: object, keys: object, request: str) -> str:
            if not json.loads(request)["operations"]:
                return json.dumps(["1", 5, "1", [], []])
            replica.hear(json.dumps(["other", 6, [[room, {**told, "version": 6}, "call_ended", "waiting", ""]]]))
            return json.dumps(["1", 6, "1", [], [["", [[room, json.dumps(told)]]]]])

    redis: Any = Redis()
    replica = Replica(redis, "own", Clock(), 600.0, lambda key: False)
    await replica.read_all()
    assert replica.book.get(room, BOB) is None


@pytest.mark.parametrize("seed", range(3))
@pytest_twisted.ensureDeferred
async def test_whatever_happens_all_guards_know_the_same_in_the_end(
    own_server: OwnServer, room: str, seed: int
) -> None:
    random = Random(seed)
    users = [f"@{number}:example.org" for number in range(6)]
    async with lobbies(own_server.url, 3) as guards:
        for step in range(120):
            lobby, user = random.choice(guards).lobby, random.choice(users)
            match random.choice(["ask", "ask", "let_in", "admit", "deny", "remove", "leave", "tick", "subscription"]):
                case "ask":
                    assert (await lobby.ask(room, user)).user == user
                case "let_in":
                    await lobby.let_in(room, user)
                case "admit":
                    await lobby.decide(room, user, admit=True, by="")
                case "deny":
                    await lobby.decide(room, user, admit=False, by="")
                case "remove":
                    await lobby.remove(room, user, "")
                case "leave":
                    await lobby.left_room(room, user)
                case "tick":
                    await lobby.pass_time()
                case "subscription":
                    random.choice(guards).client.subscribe_again()
            if step % 40 == 20:
                own_server.stop()
            elif step % 40 == 30:
                own_server.start_again()
        await until(lambda: all(guard.client.available and not guard.entries.alone for guard in guards))

        def known(guard: GuardLobby) -> list[LobbyState | None]:
            return [guard.lobby.state_of(room, user) for user in users]

        end = reactor.seconds() + 60
        while not known(guards[0]) == known(guards[1]) == known(guards[2]):
            assert reactor.seconds() < end, [known(guard) for guard in guards]
            for guard in guards:
                await guard.lobby.pass_time()
            await deferLater(reactor, 0.1)
        in_redis = [await guards[0].lobby.read(room, user) for user in users]
        assert in_redis == known(guards[0])
