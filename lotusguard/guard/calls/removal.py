# SPDX-License-Identifier: Apache-2.0
"""Removing participants: LiveKit disconnects them, and their seats are free."""

from __future__ import annotations

from typing import Protocol

from attrs import define

from lotusguard.guard.calls.participants import ParticipantEnforcer
from lotusguard.guard.seats.registry import Slot
from lotusguard.guard.seats.roster import Roster


class RoomLease(Protocol):
    """Several guards enforce a room one at a time."""

    async def acquire(self, room_id: str) -> bool:
        """Whether this guard enforces the room for the next seconds."""

    async def confirms(self, room_id: str) -> bool:
        """Whether it still does, as its fencing token says."""

    async def ask_holder(self, alias: str) -> None:
        """Let the guard that does so enforce an SFU room at once."""


@define(eq=False)
class Remover:
    """Removes participants from SFU rooms, and frees their seats.

    :param leases: ``None`` if no other guard enforces these rooms.
    """

    _participants: ParticipantEnforcer
    _roster: Roster
    _leases: RoomLease | None

    async def may_remove(self, room_id: str) -> bool:
        """Whether no other guard reconciles the room by now. It may have removed somebody else."""
        return self._leases is None or await self._leases.confirms(room_id)

    async def remove(self, slot: Slot, alias: str, sid: str, identity: str, user: str, reason: str) -> bool:
        """Remove a participant of an SFU room. Their token stays valid. :return: whether they are gone."""
        gone = await self._participants.remove(slot.room_id, alias, identity, user, reason)
        if gone:
            await self._roster.removed(slot, alias, sid, identity)
        return gone
