# SPDX-License-Identifier: Apache-2.0
"""Listings: what they ask for, and what they do not wait for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from lotusguard.clients.waiting import Deadline
from lotusguard.guard.rooms.policies import Policies
from lotusguard.guard.rooms.remembered import RememberedPolicies
from lotusguard.guard.seats.memory import MemorySeatBook
from lotusguard.guard.seats.registry import MemoryTokenRegistry
from lotusguard.guard.seats.roster import Roster
from lotusguard.metrics import Metrics
from lotusguard.rules.identity import room_alias
from lotusguard.rules.membership import Membership
from lotusguard.rules.refusals import Refusal
from lotusguard.rules.state import CREATE, VOICE_LIMIT, StateEvent

ROOM = "!room:x"


class Homeserver:
    """Answers until it hangs. It is a `RoomStateSource`."""

    hangs = False

    async def room_state(self, room_id: str, types: Collection[str]) -> Mapping[str, StateEvent] | None:
        if self.hangs:
            await Deferred()
        return {CREATE: StateEvent(CREATE, {}, "@a:x"), VOICE_LIMIT: StateEvent(VOICE_LIMIT, {"max_users": 1}, "@a:x")}

    async def membership(self, user_id: str, room_id: str) -> Membership:
        return Membership.JOIN

    async def members(self, room_id: str) -> frozenset[str] | None:
        return None


class LiveKit:
    """Nobody is in any SFU room."""

    clock_skew = None

    def __init__(self) -> None:
        self.listed: list[str] = []

    async def list_participants(self, alias: str, turn: str = "") -> list[Any]:
        self.listed.append(alias)
        return []


def test_a_listing_does_not_wait_for_the_homeserver() -> None:
    clock, homeserver, metrics = Clock(), Homeserver(), Metrics()
    policies = Policies(homeserver, RememberedPolicies(metrics), clock, metrics, ttl=10, stale=3600)
    Deferred.fromCoroutine(policies.get(ROOM, Deadline.after(clock, 1.5)))
    homeserver.hangs = True
    clock.advance(60)
    seats = MemorySeatBook(None, clock, clock.seconds, metrics, 30.0, 0.0)
    livekit: Any = LiveKit()
    registry = MemoryTokenRegistry(None, clock, metrics, wall=clock.seconds)
    roster = Roster(livekit, seats, registry, policies, clock, metrics, 1.5, 0.0)
    refreshed = Deferred.fromCoroutine(roster.refresh(ROOM, clock.seconds(), Deadline.after(clock, 0.5), "m.call#X"))
    assert refreshed.called
    assert refreshed.result is None
    assert livekit.listed == [room_alias(ROOM)]  # and not the invented slot
    for user, refusal in (("@a:x", None), ("@b:x", Refusal.SEAT_PENDING)):
        taken = Deferred.fromCoroutine(seats.take(ROOM, user, 1, room_alias(ROOM))).result
        assert (taken if isinstance(taken, Refusal) else None) is refusal
