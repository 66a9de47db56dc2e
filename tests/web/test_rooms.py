# SPDX-License-Identifier: Apache-2.0
"""``/rooms`` and the console's tables with many rooms and large calls: complete, and made a part at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from enum import Enum
from typing import Any
from urllib.parse import urlencode

import pytest
import pytest_twisted
from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.task import Clock

from lotusguard.clients.waiting import SLICE
from lotusguard.guard.rooms.policies import Policies
from lotusguard.guard.rooms.remembered import RememberedPolicies
from lotusguard.guard.seats.memory import IDLE_ROOM, MemorySeatBook
from lotusguard.guard.seats.registry import MemoryTokenRegistry, Slot
from lotusguard.metrics import Metrics
from lotusguard.rules.membership import Membership
from lotusguard.rules.seats import Arrival
from lotusguard.rules.state import CREATE, ROOM_QUALITY, StateEvent
from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.web.rooms import RoomsReport
from tests.calls import ALICE, BOB, CAROL, room_of
from tests.web.test_console import get, sign_in, text


class Homeserver:
    """Every room forbids screen sharing. It is a `RoomStateSource`."""

    async def room_state(self, room_id: str, types: Collection[str]) -> Mapping[str, StateEvent] | None:
        forbids = StateEvent(ROOM_QUALITY, {"allow_screenshare": False}, "@a:x")
        return {CREATE: StateEvent(CREATE, {}, "@a:x"), ROOM_QUALITY: forbids}

    async def membership(self, user_id: str, room_id: str) -> Membership:
        return Membership.JOIN

    async def members(self, room_id: str) -> frozenset[str] | None:
        return None


class Source(Enum):
    ONLY = "admin_api"


class Sources:
    def source_of(self, room_id: str) -> Source:
        return Source.ONLY


@define
class Watching:
    watched: dict[str, int] = field(factory=dict)


class CountingClock(Clock):
    """Counts how often something gave way to other work."""

    turns = 0

    def callLater(self, delay: float, callable: Any, *args: object, **kw: object) -> IDelayedCall:
        self.turns += delay == 0
        return super().callLater(delay, callable, *args, **kw)


class Rooms:
    """A guard's rooms, on a clock that the test advances."""

    def __init__(self) -> None:
        self.clock = CountingClock()
        self.clock.advance(1000)
        metrics = Metrics()
        self.book = MemorySeatBook(None, self.clock, self.clock.seconds, metrics, 30.0, 0.0)
        policies = Policies(Homeserver(), RememberedPolicies(metrics), self.clock, metrics, ttl=10, stale=3600)
        self.registry = MemoryTokenRegistry(None, self.clock, metrics, wall=self.clock.seconds)
        self.enforcement = Watching()
        sources: Any = Sources()
        enforcement: Any = self.enforcement
        self.report = RoomsReport(self.book, policies, sources, enforcement, self.registry, self.clock)

    def add(self, room_id: str, people: int) -> None:
        alias = f"alias of {room_id}"
        present = [Arrival(f"PA_{number}", f"@{number}:x:D", f"@{number}:x") for number in range(people)]
        for work in (
            self.book.apply_listing(room_id, alias, present, None, self.clock.seconds()),
            self.registry.learn_alias(alias, Slot(room_id, "m.call#ROOM")),
        ):
            assert Deferred.fromCoroutine(work).called
        self.enforcement.watched[alias] = people

    def in_parts(self, work: Any) -> tuple[Any, int]:
        """The result of some work, and how often the reactor had its turn meanwhile."""
        before = self.clock.turns
        working = Deferred.fromCoroutine(work)
        self.clock.advance(0)
        assert working.called
        return working.result, self.clock.turns - before


@pytest.mark.parametrize(("rooms", "people"), [(4 * SLICE, 1), (1, 8 * SLICE), (40, 20)])
def test_the_report_is_complete_and_made_in_parts(rooms: int, people: int) -> None:
    guard = Rooms()
    for number in range(rooms):
        guard.add(f"!{number:04}:x", people)
    body, turns = guard.in_parts(guard.report.as_json(guard="one", decisions=[]))
    report = json.loads(body)
    assert turns >= rooms * people // SLICE
    assert report.keys() == {"guard", "rooms", "sfu_rooms", "decisions"}
    assert [room["room_id"] for room in report["rooms"]] == [f"!{number:04}:x" for number in range(rooms)]
    assert all(len(room["present"]) == room["seats_held"] == people for room in report["rooms"])
    last = report["rooms"][-1]["present"][-1]
    assert last == {
        "user": f"@{people - 1}:x", "identity": f"@{people - 1}:x:D", "alias": f"alias of !{rooms - 1:04}:x",
        "seated": True, "allowed": ["camera", "microphone"],
    }  # fmt: skip
    assert report["rooms"][0]["policy"]["forbidden"] == ["screen_share", "screen_share_audio"]
    assert report["sfu_rooms"]["alias of !0000:x"] == {"participants": people, "room_id": "!0000:x"}
    assert len(report["sfu_rooms"]) == rooms


def test_a_report_without_rooms_is_json() -> None:
    guard = Rooms()
    body, turns = guard.in_parts(guard.report.as_json(guard="one"))
    assert json.loads(body) == {"guard": "one", "rooms": [], "sfu_rooms": {}}
    assert turns == 0


def test_idle_rooms_are_forgotten_in_parts() -> None:
    guard = Rooms()
    for number in range(4 * SLICE):
        guard.add(f"!{number}:x", 0)
    guard.add("!busy:x", 1)
    guard.clock.advance(IDLE_ROOM + 1)
    _, turns = guard.in_parts(guard.book.prune())
    assert turns >= 4
    (room,), _ = guard.in_parts(guard.book.snapshots())
    assert room.room_id == "!busy:x"


# -- the console ----------------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_the_consoles_calls_are_shown_a_page_at_a_time(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lotusguard.web.console.view.PER_PAGE", 2)
    rooms = {room_of(sandbox) for _ in range(3)}
    for room_id in rooms:
        await sandbox.enter(ALICE, room_id)
    cookie = await sign_in(sandbox)
    shown: list[str] = []
    for path, link in (("/console/rooms", "page=2"), ("/console/rooms?page=2", "page=1")):
        page = text(await get(sandbox, path, cookie))
        assert "Live calls (3)" in page
        assert link in page
        shown += re.findall(r"![\w.:-]+(?=</code>|</a>)", page)
    assert set(shown) == rooms
    assert text(await get(sandbox, "/console/rooms?page=99", cookie)) == page  # the last one
    for wrong in ("0", "-1", "x", "٣", "9" * 5000):
        answer = await get(sandbox, f"/console/rooms?{urlencode({'page': wrong})}", cookie)
        assert answer.code == 200


@pytest_twisted.ensureDeferred
async def test_a_large_calls_participants_are_shown_a_page_at_a_time(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lotusguard.web.console.view.PER_PAGE", 2)
    room_id = room_of(sandbox)
    for user in (ALICE, BOB, CAROL):
        await sandbox.enter(user, room_id)
    await sandbox.livekit.drained()
    await sandbox.guard.enforcement.worker.idle()
    cookie = await sign_in(sandbox)
    first, second = [
        text(await get(sandbox, f"/console/room?{urlencode({'id': room_id, 'page': page})}", cookie)) for page in (1, 2)
    ]
    assert [user in first for user in (ALICE, BOB, CAROL)] == [True, True, False]
    assert [user in second for user in (ALICE, BOB, CAROL)] == [False, False, True]
    assert "Page 1 of 2" in first
