# SPDX-License-Identifier: Apache-2.0
"""A Matrix room of the stand-in homeserver: its state, its timeline, its members and their power levels. Sandbox."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from attrs import Factory, define

Event = dict[str, Any]
State = dict[tuple[str, str], Event]

TIMELINE_LENGTH = 10_000
"""Events kept per room; ``/sync`` cannot go back further."""

_CREATOR_LEVEL = 1 << 60
_PRIVILEGED_CREATORS_FROM = 12
"""The first room version in which creators stand above every power level."""


@define
class MatrixRoom:
    """One room.

    :ivar state: the current state, by type and state key.
    :ivar timeline: the latest events with their stream positions, oldest first.
    :ivar state_at_departure: by user ID, the state as it was when that user left or was removed. Synapse shows it
        to former members.
    :ivar forgotten_by: former members who called ``/forget``.
    """

    room_id: str
    creator: str
    version: str = "10"
    state: State = Factory(dict)
    timeline: deque[tuple[int, Event]] = Factory(lambda: deque(maxlen=TIMELINE_LENGTH))
    state_at_departure: dict[str, State] = Factory(dict)
    forgotten_by: set[str] = Factory(set)

    @property
    def members(self) -> list[str]:
        """User IDs of the joined members."""
        return [
            key
            for (type, key), event in self.state.items()
            if type == "m.room.member" and event["content"].get("membership") == "join"
        ]

    @property
    def encrypted(self) -> bool:
        return ("m.room.encryption", "") in self.state

    def membership(self, user_id: str) -> str | None:
        """``join``, ``invite``, ``knock``, ``leave`` or ``ban``; ``None`` if the room has no entry for the user."""
        event = self.state.get(("m.room.member", user_id))
        return None if event is None else event["content"].get("membership")

    def has_local_member(self, server_name: str) -> bool:
        """Whether a user of this homeserver is joined. Without one, the homeserver no longer takes part."""
        suffix = f":{server_name}"
        return any(
            key.endswith(suffix) and event["content"].get("membership") == "join"
            for (type, key), event in self.state.items()
            if type == "m.room.member"
        )

    def content(self, type: str, state_key: str = "") -> Mapping[str, Any]:
        """The content of a state event; empty if there is none."""
        event = self.state.get((type, state_key))
        return {} if event is None else event["content"]

    def event(self, event_id: str) -> Event | None:
        """An event of the timeline."""
        return next((event for _, event in self.timeline if event["event_id"] == event_id), None)

    @property
    def creators(self) -> set[str]:
        """The sender of ``m.room.create`` and, where the room version has them, the additional creators."""
        more = self.content("m.room.create").get("additional_creators", ())
        return {self.creator, *(more if self.has_privileged_creators else ())}

    @property
    def has_privileged_creators(self) -> bool:
        return self.version.isdigit() and int(self.version) >= _PRIVILEGED_CREATORS_FROM

    def power_level(self, user_id: str) -> int:
        """The user's power level. Creators in version 12 and later have a level above all others."""
        if self.has_privileged_creators and user_id in self.creators:
            return _CREATOR_LEVEL
        if ("m.room.power_levels", "") not in self.state:
            return 100 if user_id == self.creator else 0
        levels = self.content("m.room.power_levels")
        return _level(levels.get("users", {}).get(user_id), _level(levels.get("users_default"), 0))

    def level_for(self, action: str) -> int:
        """The power level that ``kick``, ``ban``, ``invite`` or ``redact`` needs."""
        return _level(self.content("m.room.power_levels").get(action), 0 if action == "invite" else 50)

    def level_to_send(self, type: str, *, is_state: bool) -> int:
        """The power level that sending such an event needs."""
        levels = self.content("m.room.power_levels")
        default = "state_default" if is_state else "events_default"
        otherwise = 50 if is_state and ("m.room.power_levels", "") in self.state else 0
        return _level(levels.get("events", {}).get(type), _level(levels.get(default), otherwise))


def _level(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise
