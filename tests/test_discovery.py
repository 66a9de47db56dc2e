# SPDX-License-Identifier: Apache-2.0
"""SFU rooms that we issued no token for: found among the homeserver's rooms, and not looked for over and over."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
import pytest_twisted
from livekit.protocol.models import TrackSource
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.synapse import ROOMS_A_PAGE, SynapseClient
from lotusguard.guard.calls.discovery import NOT_AGAIN, Discovery
from lotusguard.guard.seats.registry import MemoryTokenRegistry, Slot
from lotusguard.metrics import Metrics
from lotusguard.rules.identity import ROOM_SLOT, room_alias
from lotusguard.sandbox.demo.sandbox import KEY, SECRET, Sandbox
from lotusguard.sandbox.livekit.participant import Participant
from lotusguard.sandbox.livekit.tokens import mint
from tests.calls import ALICE, logged, named, old_token, room_of
from tests.conftest import StartSandbox, until


class Rooms:
    """A homeserver that knows some rooms and tells them when it is told to."""

    def __init__(self, *room_ids: str) -> None:
        self.room_ids_known = room_ids
        self.searches = 0
        self.well = True
        self.fails = False
        self.waiting: Deferred[None] | None = None

    async def room_ids(self, most: int) -> AsyncIterator[str]:
        self.searches += 1
        if self.fails:
            raise DependencyFailed("synapse", "timeout")
        for room_id in self.room_ids_known[:most]:
            if self.waiting is not None:
                await self.waiting
            yield room_id


class Searching:
    """A discovery with what it needs, and what it found."""

    def __init__(self, *room_ids: str) -> None:
        self.clock = Clock()
        self.homeserver = Rooms(*room_ids)
        self.registry = MemoryTokenRegistry(None, self.clock, Metrics())
        self.found: list[str] = []
        self.discovery = Discovery(cast(SynapseClient, self.homeserver), self.registry, self.clock, Metrics())

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
async def test_old_releases_named_the_sfu_room_as_the_matrix_room() -> None:
    searching = Searching(ROOM)
    searching.want(ROOM)
    assert await searching.registry.slot_of(ROOM) == Slot(ROOM, ROOM_SLOT)


def test_what_was_not_found_is_not_looked_for_again_within_an_hour() -> None:
    searching = Searching("!a:x")
    for _ in range(100):
        searching.want("nobody's")
        searching.clock.advance(NOT_AGAIN / 100 - 0.01)
    assert searching.homeserver.searches == 1
    searching.clock.advance(2)
    searching.want("nobody's")
    assert searching.homeserver.searches == 2
    assert searching.found == []


def test_other_aliases_are_looked_for_meanwhile() -> None:
    searching = Searching(ROOM)
    searching.want("nobody's")
    searching.want(ALIAS)
    assert searching.found == [ALIAS]


def test_one_search_serves_all_and_is_not_repeated_for_what_it_looks_for() -> None:
    searching = Searching("!a:x", ROOM)
    waiting = searching.homeserver.waiting = Deferred()
    searching.want("nobody's")
    for _ in range(10):  # reconciling goes on while a long list is being read
        searching.want("nobody's")
    searching.want(ALIAS)
    assert searching.homeserver.searches == 1
    searching.homeserver.waiting = None
    waiting.callback(None)
    assert searching.homeserver.searches == 2  # for the one that came too late for the first
    assert searching.found == [ALIAS]


def test_what_one_round_asks_for_is_looked_for_in_one_search() -> None:
    searching = Searching("!a:x", ROOM)
    searching.want("nobody's", ALIAS, "no other's", room_alias("!a:x"))
    assert searching.homeserver.searches == 1
    assert searching.found == [room_alias("!a:x"), ALIAS]


def test_a_homeserver_that_fails_has_not_said_that_there_is_no_such_room() -> None:
    searching = Searching(ROOM)
    searching.homeserver.fails = True
    with logged() as events:
        searching.want(ALIAS)
    assert len(named(events, "discovery_failed")) == 1
    searching.homeserver.fails = False
    searching.want(ALIAS)
    assert searching.found == [ALIAS]


def test_a_homeserver_that_is_ill_is_not_asked() -> None:
    searching = Searching(ROOM)
    searching.homeserver.well = False
    searching.want(ALIAS)
    assert searching.homeserver.searches == 0


def test_what_is_remembered_as_not_found_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lotusguard.guard.calls.discovery.WANTED_KEPT", 10)
    searching = Searching("!a:x")
    for number in range(50):
        searching.want(f"alias{number}")
    assert len(searching.discovery._not_found) == 10


def test_a_search_ends_with_the_guard() -> None:
    searching = Searching(ROOM)
    waiting = searching.homeserver.waiting = Deferred()
    searching.want(ALIAS)
    with logged() as events:
        searching.discovery.stop()
    assert waiting.called
    assert searching.found == []
    assert [event for event in events if "log_failure" in event] == []


# -- over the wire -------------------------------------------------------------------------------------------


def is_narrowed(who: Participant) -> bool:
    return not who.grant.may_publish(TrackSource.SCREEN_SHARE)


@pytest_twisted.ensureDeferred
async def test_a_webhook_from_an_unknown_room_leads_to_its_being_enforced(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, allow_screenshare=False)
    alice = sandbox.livekit.connect(old_token(ALICE, room_id))
    await until(lambda: is_narrowed(alice))


@pytest_twisted.ensureDeferred
async def test_reconciling_finds_unknown_rooms_on_the_last_page_too(start_sandbox: StartSandbox) -> None:
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
    await until(lambda: is_narrowed(alice))
    lists = sandbox.livekit.asked["ListRooms"]
    await until(lambda: sandbox.livekit.asked["ListRooms"] >= lists + 3)  # further rounds
    assert sandbox.homeserver.asked["rooms"] == 3
    assert not is_narrowed(nobodys)


def _token_for(alias: str) -> str:
    claims: dict[str, Any] = {"sub": "somebody", "video": {"roomJoin": True, "room": alias}}
    return mint(KEY, SECRET, claims, now=1.7e9, valid_for=1e9)


@pytest_twisted.ensureDeferred
async def test_what_was_found_once_is_known_after_a_restart(start_sandbox: StartSandbox, tmp_path: Any) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_state_dir=tmp_path)
    room_id = room_of(sandbox, allow_screenshare=False)
    alice = sandbox.livekit.connect(old_token(ALICE, room_id))
    await until(lambda: is_narrowed(alice))
    await sandbox.guard.stopService()
    await sandbox.start_guard()
    searches = sandbox.homeserver.asked["rooms"]
    again = sandbox.livekit.connect(old_token(ALICE, room_id))
    await until(lambda: is_narrowed(again))
    assert sandbox.homeserver.asked["rooms"] == searches
