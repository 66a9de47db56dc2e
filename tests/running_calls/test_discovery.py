# SPDX-License-Identifier: Apache-2.0
"""SFU rooms for which the guard issued no token: found among the homeserver's rooms, by few and bounded searches."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

import pytest_twisted
from livekit.protocol.models import TrackSource
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.synapse import ROOMS_A_PAGE, SynapseClient
from lotusguard.guard.calls.discovery import (
    ALIASES_KEPT,
    FIRST_BACKOFF,
    LONGEST_ALIAS,
    LONGEST_BACKOFF,
    NOT_AGAIN,
    REST,
    Discovery,
)
from lotusguard.guard.seats.registry import MemoryTokenRegistry, Slot
from lotusguard.metrics import Metrics
from lotusguard.rules.identity import ROOM_SLOT, room_alias
from lotusguard.sandbox.demo.sandbox import KEY, SECRET, Sandbox
from lotusguard.sandbox.faults import Fault
from lotusguard.sandbox.livekit.participant import Participant
from lotusguard.sandbox.livekit.tokens import mint
from tests.calls import ALICE, counted, crashes, logged, named, old_token, room_of
from tests.conftest import StartSandbox, until


class Rooms:
    """A homeserver that lists its rooms, at once or when the test says so.

    :ivar seconds: how long one list takes.
    """

    def __init__(self, *room_ids: str) -> None:
        self.room_ids_known = room_ids
        self.searches = 0
        self.available = True
        self.seconds = 0.0
        self.clock: Clock | None = None
        self.fails = False
        self.waiting: Deferred[None] | None = None

    async def room_ids(self, most: int) -> AsyncIterator[str]:
        self.searches += 1
        if self.clock is not None:
            self.clock.advance(self.seconds)
        if self.fails:
            raise DependencyFailed("synapse", "timeout")
        for room_id in self.room_ids_known[:most]:
            if self.waiting is not None:
                await self.waiting
            yield room_id


class Searching:
    """A `Discovery`, its surroundings, and what it found."""

    def __init__(self, *room_ids: str) -> None:
        self.clock = Clock()
        self.homeserver = Rooms(*room_ids)
        self.registry = MemoryTokenRegistry(None, self.clock, Metrics())
        self.found: list[str] = []
        self.metrics = Metrics()
        self.discovery = Discovery(cast(SynapseClient, self.homeserver), self.registry, self.clock, self.metrics)

    def want(self, *aliases: str) -> None:
        for alias in aliases:
            self.discovery.want(alias, self.found.append)
        self.clock.advance(0)


ROOM, ALIAS = "!here:sandbox.local", room_alias("!here:sandbox.local")


@pytest_twisted.ensureDeferred
async def test_a_room_is_found_by_the_hash_of_its_id_and_remembered() -> None:
    searching = Searching("!a:x", ROOM, "!b:x")
    searching.want(ALIAS)
    assert searching.found == [ALIAS]
    assert await searching.registry.slot_of(ALIAS) == Slot(ROOM, ROOM_SLOT)
    assert await searching.registry.aliases_of(ROOM) == (ALIAS,)


@pytest_twisted.ensureDeferred
async def test_an_sfu_room_of_an_old_release_is_found_by_the_room_id() -> None:
    searching = Searching(ROOM)
    searching.want(ROOM)
    assert await searching.registry.slot_of(ROOM) == Slot(ROOM, ROOM_SLOT)


def test_an_alias_that_was_not_found_is_not_searched_for_again_within_an_hour() -> None:
    searching = Searching("!a:x")
    for _ in range(100):
        searching.want("nobody's")
        searching.clock.advance(NOT_AGAIN / 100 - 0.01)
    assert searching.homeserver.searches == 1
    searching.clock.advance(2)
    searching.want("nobody's")
    assert searching.homeserver.searches == 2
    assert searching.found == []


def test_another_alias_is_searched_for_in_that_hour() -> None:
    searching = Searching(ROOM)
    searching.want("nobody's")
    searching.want(ALIAS)
    assert searching.found == [ALIAS]


def test_aliases_wanted_during_a_search_wait_for_the_next_one() -> None:
    searching = Searching("!a:x", ROOM)
    waiting = searching.homeserver.waiting = Deferred()
    searching.want("nobody's")
    for _ in range(10):  # reconciling continues while a long list is read
        searching.want("nobody's")
    searching.want(ALIAS)
    assert searching.homeserver.searches == 1
    searching.homeserver.waiting = None
    waiting.callback(None)
    assert searching.homeserver.searches == 2  # for the alias that was wanted too late for the first search
    assert searching.found == [ALIAS]


def test_aliases_of_one_round_share_one_search() -> None:
    searching = Searching("!a:x", ROOM)
    searching.want("nobody's", ALIAS, "no other's", room_alias("!a:x"))
    assert searching.homeserver.searches == 1
    assert searching.found == [room_alias("!a:x"), ALIAS]


def test_a_failed_search_is_repeated_after_a_pause_that_grows() -> None:
    searching = Searching(ROOM)
    searching.homeserver.fails = True
    with logged() as events:
        searching.want(ALIAS)
        for pause in (FIRST_BACKOFF, 2 * FIRST_BACKOFF, 4 * FIRST_BACKOFF):
            searches = searching.homeserver.searches
            searching.clock.advance(pause - 0.1)
            searching.want(ALIAS)
            assert searching.homeserver.searches == searches
            searching.clock.advance(0.1)
            searching.want(ALIAS)
            assert searching.homeserver.searches == searches + 1
    assert len(named(events, "discovery_failed")) == 4
    searching.homeserver.fails = False
    searching.clock.advance(LONGEST_BACKOFF)
    searching.want(ALIAS)
    assert searching.found == [ALIAS]


def test_a_search_that_fails_by_our_own_fault_is_not_repeated_each_round() -> None:
    searching = Searching(ROOM)
    searching.homeserver.room_ids_known = cast(Any, (None,))
    with logged() as events:
        for _ in range(5):
            searching.want(ALIAS)
            searching.clock.advance(1)
    assert searching.homeserver.searches == 1
    assert len(crashes(events)) == 1
    searching.homeserver.room_ids_known = (ROOM,)
    searching.clock.advance(FIRST_BACKOFF)
    searching.want(ALIAS)
    assert searching.found == [ALIAS]


def test_a_slow_search_is_followed_by_a_pause() -> None:
    searching = Searching(ROOM)
    searching.homeserver.clock, searching.homeserver.seconds = searching.clock, 3.0
    searching.want("nobody's")
    searching.want(ALIAS)
    searching.clock.advance(3 * REST - 0.1)
    assert searching.homeserver.searches == 1
    searching.clock.advance(0.2)
    assert searching.found == [ALIAS]


def test_an_alias_longer_than_any_of_ours_is_not_searched_for() -> None:
    searching = Searching(ROOM)
    searching.want("a" * (LONGEST_ALIAS + 1))
    assert searching.homeserver.searches == 0


def test_nothing_is_searched_while_the_circuit_is_open() -> None:
    searching = Searching(ROOM)
    searching.homeserver.available = False
    searching.want(ALIAS)
    assert searching.homeserver.searches == 0


def test_the_memory_of_aliases_that_were_not_found_is_bounded() -> None:
    searching = Searching("!a:x")
    for batch in range(3):
        searching.want(*(f"alias{batch}-{number}" for number in range(ALIASES_KEPT // 2)))
    entries = searching.metrics.registry.get_sample_value("lotusguard_cache_entries", {"cache": "unknown_aliases"})
    assert entries == ALIASES_KEPT


def test_a_search_ends_with_the_guard() -> None:
    searching = Searching(ROOM)
    waiting = searching.homeserver.waiting = Deferred()
    searching.want(ALIAS)
    with logged() as events:
        searching.discovery.stop()
    assert waiting.called
    assert searching.found == []
    assert [event for event in events if "log_failure" in event] == []


# -- over the wire --


def is_restricted(who: Participant) -> bool:
    return not who.grant.may_publish(TrackSource.SCREEN_SHARE)


@pytest_twisted.ensureDeferred
async def test_an_unknown_room_is_enforced_after_its_first_webhook(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, allow_screenshare=False)
    alice = sandbox.livekit.connect(old_token(ALICE, room_id))
    await until(lambda: is_restricted(alice))


@pytest_twisted.ensureDeferred
async def test_reconciling_finds_a_room_on_the_last_page_of_the_list(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=0.2)
    sandbox.livekit.webhooks.urls[:] = []
    for number in range(2 * ROOMS_A_PAGE):
        sandbox.homeserver.create_room(room_id=f"!{number:05}:sandbox.local")
    room_id = sandbox.homeserver.create_room(creator=ALICE, room_id="!zzz:sandbox.local")
    sandbox.homeserver.set_state(room_id, "io.lotus.room_quality", {"allow_screenshare": False})
    alice = sandbox.livekit.connect(old_token(ALICE, room_id))
    nobodys = sandbox.livekit.connect(_token_for("alias-of-nobody"))
    for who in (alice, nobodys):
        who.room.refresh_listed()
    await until(lambda: is_restricted(alice))
    lists = sandbox.livekit.asked["ListRooms"]
    await until(lambda: sandbox.livekit.asked["ListRooms"] >= lists + 3)  # further rounds
    assert sandbox.homeserver.asked["rooms"] == 3
    assert not is_restricted(nobodys)


def _token_for(alias: str) -> str:
    claims: dict[str, Any] = {"sub": "somebody", "video": {"roomJoin": True, "room": alias}}
    return mint(KEY, SECRET, claims, now=1.7e9, valid_for=1e9)


@pytest_twisted.ensureDeferred
async def test_a_room_that_was_found_is_known_after_a_restart(start_sandbox: StartSandbox, tmp_path: Any) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_state_dir=tmp_path)
    room_id = room_of(sandbox, allow_screenshare=False)
    alice = sandbox.livekit.connect(old_token(ALICE, room_id))
    await until(lambda: is_restricted(alice))
    await sandbox.guard.stopService()
    await sandbox.start_guard()
    searches = sandbox.homeserver.asked["rooms"]
    again = sandbox.livekit.connect(old_token(ALICE, room_id))
    await until(lambda: is_restricted(again))
    assert sandbox.homeserver.asked["rooms"] == searches


@pytest_twisted.ensureDeferred
async def test_a_homeserver_that_cannot_list_its_rooms_delays_no_join(sandbox: Sandbox) -> None:
    sandbox.homeserver.faults["rooms"] = Fault.status(500)
    unknown = room_of(sandbox, allow_screenshare=False)
    sandbox.livekit.connect(old_token(ALICE, unknown))
    failed = {"dependency": "synapse_discovery", "outcome": "failed"}
    await until(lambda: counted(sandbox, "dependency_calls_total", **failed) == 1)
    assert counted(sandbox, "dependency_calls_total", dependency="synapse", outcome="failed") == 0
    assert (await sandbox.ask_token(ALICE, room_of(sandbox, 1))).code == 200
    assert counted(sandbox, "fail_open_total", check="policy", reason="circuit_open") == 0
