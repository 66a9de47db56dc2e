# SPDX-License-Identifier: Apache-2.0
"""Live rooms as JSON, made in slices: many rooms, or a large call, must not delay joins."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from attrs import define
from twisted.internet.interfaces import IReactorTime

from lotusguard.clients.waiting import Deadline, in_slices
from lotusguard.guard.calls.enforcement import Enforcement
from lotusguard.guard.rooms.policies import Policies
from lotusguard.guard.rooms.sources import RoomSources
from lotusguard.guard.seats.book import Presence, RoomSnapshot, SeatBook
from lotusguard.guard.seats.registry import TokenRegistry
from lotusguard.rules.permissions import permissions_as_json
from lotusguard.rules.policy import Policy
from lotusguard.rules.seats import HoldState

LOOKUP_TIME = 2.0
"""Seconds in which policies are looked up that only other guards know."""


@define(eq=False)
class RoomsReport:
    """Live rooms of all guards, and the SFU rooms that this guard enforces."""

    _seats: SeatBook
    _policies: Policies
    _sources: RoomSources
    _enforcement: Enforcement
    _registry: TokenRegistry
    _clock: IReactorTime

    async def as_json(self, **more: Any) -> bytes:
        """The report as a JSON object. :param more: what else belongs into it."""
        snapshots = await self._seats.snapshots()
        deadline = Deadline.after(self._clock, LOOKUP_TIME)  # other guards may know rooms that this one never read
        await self._policies.look_up_unknown([snapshot.room_id for snapshot in snapshots], deadline)
        rooms = [json.dumps(room).encode() async for room in self._rooms(snapshots)]
        sfu_rooms = [entry.encode() async for entry in self._sfu_rooms()]
        others = "".join(f"{json.dumps(name)}: {json.dumps(value)}, " for name, value in more.items()).encode()
        return b'{%b"rooms": [%b], "sfu_rooms": {%b}}\n' % (others, b", ".join(rooms), b", ".join(sfu_rooms))

    async def _rooms(self, snapshots: Sequence[RoomSnapshot]) -> AsyncIterator[dict[str, Any]]:
        room: dict[str, Any] = {}
        policy = Policy()
        async for snapshot, one in in_slices(self._clock, _participants(snapshots)):
            if one is not None:
                room["present"].append(_participant(one, policy))
                continue
            if room:
                yield room
            policy = self._policies.last_known(snapshot.room_id)
            room = self._room(snapshot, policy)
        if room:
            yield room

    def _room(self, snapshot: RoomSnapshot, policy: Policy) -> dict[str, Any]:
        return {
            "room_id": snapshot.room_id,
            "source": self._sources.source_of(snapshot.room_id).value,
            "policy": {
                "max_users": policy.max_users,
                "forbidden": sorted(source.claim for source in policy.forbidden),
                "permissions": permissions_as_json(policy.permissions),
                "lobby": policy.lobby is not None,
            },
            "seats_held": snapshot.seats_taken,
            "awaited": list(snapshot.awaited),
            "present": [],
        }

    async def _sfu_rooms(self) -> AsyncIterator[str]:
        async for alias, participants in in_slices(self._clock, list(self._enforcement.watched.items())):
            slot = await self._registry.slot_of(alias)
            entry = {"participants": participants, "room_id": slot.room_id if slot else None}
            yield f"{json.dumps(alias)}: {json.dumps(entry)}"


def _participants(snapshots: Sequence[RoomSnapshot]) -> Iterator[tuple[RoomSnapshot, Presence | None]]:
    """Each room, and then everybody in it."""
    for snapshot in snapshots:
        yield snapshot, None
        for one in snapshot.present:
            yield snapshot, one


def _participant(one: Presence, policy: Policy) -> dict[str, Any]:
    return {
        "user": one.user,
        "identity": one.identity,
        "alias": one.alias,
        "seated": one.state == HoldState.PRESENT.value,
        "allowed": sorted(source.claim for source in policy.allowed_sources(one.user)),
    }
