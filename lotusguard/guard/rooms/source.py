# SPDX-License-Identifier: Apache-2.0
"""Where room state and membership come from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

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
