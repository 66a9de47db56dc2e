# SPDX-License-Identifier: Apache-2.0
"""Room state as the rules read it: which events, and what is kept of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

VOICE_LIMIT = "io.lotus.voice_limit"
ROOM_QUALITY = "io.lotus.room_quality"
CALL_PERMISSIONS = "io.lotus.call_permissions"
LOBBY = "io.lotus.lobby"
POWER_LEVELS = "m.room.power_levels"
CREATE = "m.room.create"

POLICY_TYPES = (VOICE_LIMIT, ROOM_QUALITY, CALL_PERMISSIONS, LOBBY)
"""The events that moderators write for the guard."""
LEVEL_TYPES = (POWER_LEVELS, CREATE)
"""The events that say which power level a user has."""


@frozen
class StateEvent:
    """A state event with the state key ``""``.

    :ivar content: as JSON gave it. It should be an object, but nothing in it can be relied on.
    :ivar sender: the Matrix user who sent the event.
    """

    type: str
    content: Any
    sender: str = ""

    @property
    def mapping(self) -> Mapping[str, Any]:
        """The content, or an empty mapping if the content is not an object."""
        return self.content if isinstance(self.content, Mapping) else {}
