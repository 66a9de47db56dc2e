# SPDX-License-Identifier: Apache-2.0
"""Rooms in which Element Call works, and their members. Tests."""

from __future__ import annotations

from tests.real.stack import Stack

ANNOUNCEMENTS = ("org.matrix.msc3401.call.member", "org.matrix.msc4143.rtc.member")
"""Events that every participant of a call must be allowed to send."""


def members(stack: Stack, *names: str) -> list[str]:
    """New users with these names as display names."""
    users = stack.users(*(name.lower() for name in names))
    for user, name in zip(users, names, strict=True):
        stack.matrix("PUT", f"/_matrix/client/v3/profile/{user}/displayname", {"displayname": name}, user=user)
    return users


def call_room(stack: Stack, users: list[str], max_users: int | None = None, **quality: bool) -> str:
    """A new room with these members, in which everybody may announce that they are in the call."""
    room_id = stack.room(max_users, **quality)
    path = f"/_matrix/client/v3/rooms/{room_id}/state/m.room.power_levels"
    levels = stack.matrix("GET", path, user=stack.moderator)
    levels.setdefault("events", {}).update(dict.fromkeys(ANNOUNCEMENTS, 0))
    stack.set_state(room_id, "m.room.power_levels", levels)
    stack.set_state(room_id, "m.room.name", {"name": "Weekly"})
    for user in users:
        stack.join(user, room_id)
    return room_id
