# SPDX-License-Identifier: Apache-2.0
"""Where room state and membership come from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from attrs import frozen

from lotusguard.rules.membership import Membership
from lotusguard.rules.state import StateEvent


class RoomStateSource(Protocol):
    """What the guard asks a homeserver about rooms. All raise `DependencyFailed` if there is no usable answer."""

    async def room_state(self, room_id: str, types: Collection[str]) -> Mapping[str, StateEvent] | None:
        """The room's state events of these types with the state key ``""``; ``None`` if the room is unknown there."""

    async def membership(self, user_id: str, room_id: str) -> Membership:
        """A user's membership of a room."""

    async def members(self, room_id: str) -> Collection[str] | None:
        """The users who are joined to a room; ``None`` if the room is unknown there."""


@frozen
class PushedState:
    """A room's state as the homeserver pushed it.

    :ivar events: the state events with the state key ``""``, by type; another object after each change.
    :ivar at: when they were current, on the guard's clock.
    :ivar live: they are current now: every change is pushed.
    """

    events: Mapping[str, StateEvent]
    at: float
    live: bool


class PushedRooms(Protocol):
    """Rooms whose changes the homeserver pushes to us. Nothing here waits."""

    def state_of(self, room_id: str) -> PushedState | None:
        """The room's state; ``None`` if its changes are not pushed."""

    def is_joined(self, room_id: str, user: str) -> bool:
        """Whether the user is certainly joined to the room now. ``False`` also where that is not known."""


class NothingPushed:
    """The `PushedRooms` of a guard that asks for everything."""

    def state_of(self, room_id: str) -> PushedState | None:
        return None

    def is_joined(self, room_id: str, user: str) -> bool:
        return False


NOTHING_PUSHED = NothingPushed()
