# SPDX-License-Identifier: Apache-2.0
"""What the stand-in homeserver knows: users, rooms and their state, OpenID tokens. Sandbox."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

OPENID_LIFETIME = 3600


@dataclass
class MatrixRoom:
    room_id: str
    creator: str
    members: list[str]
    state: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class User:
    user_id: str
    admin: bool


class Matrix:
    """Users and rooms, changed by Python methods.

    :param server_name: the part of user IDs after the first colon.
    :param now: seconds since the epoch, for OpenID tokens and events.
    :ivar on_state_change: called with room ID and event type after each change of state.
    """

    def __init__(self, server_name: str, now: Callable[[], float]) -> None:
        self.server_name = server_name
        self.now = now
        self.on_state_change: list[Callable[[str, str], None]] = []
        self.rooms: dict[str, MatrixRoom] = {}
        self.users: dict[str, User] = {}
        """By user ID."""
        self.logins: dict[str, User] = {}
        """By access token."""
        self.openid: dict[str, tuple[str, float]] = {}
        """User ID and end of life, by OpenID token."""
        self._numbers = itertools.count(1)

    def add_user(self, localpart: str, admin: bool = False) -> str:
        """Register a user (a homeserver's admin, with ``admin``), if need be, and log in.

        :return: the access token.
        """
        token = f"syt_{secrets.token_urlsafe(18)}"
        user_id = f"@{localpart}:{self.server_name}"
        self.logins[token] = self.users.setdefault(user_id, User(user_id, admin))
        return token

    def create_room(self, creator: str = "admin", room_id: str | None = None, members: int = 0) -> str:
        """Make a room.

        :param creator: the localpart or user ID of its admin, who alone may change its state by HTTP.
        :param members: how many more are in it; each has an event in the room's state.
        :return: the room ID.
        """
        who = creator if creator.startswith("@") else f"@{creator}:{self.server_name}"
        room_id = room_id or f"!{secrets.token_urlsafe(13)}:{self.server_name}"
        everybody = [who, *(f"@member{n}:{self.server_name}" for n in range(members))]
        self.rooms[room_id] = MatrixRoom(room_id, who, everybody)
        self.set_state(room_id, "m.room.create", {"creator": who, "room_version": "10"}, sender=who)
        self.set_state(room_id, "m.room.power_levels", {"users": {who: 100}}, sender=who)
        for member in everybody:
            joined = {"membership": "join", "displayname": member}
            self.set_state(room_id, "m.room.member", joined, state_key=member, sender=member)
        return room_id

    def set_state(
        self, room_id: str, type: str, content: Mapping[str, Any], *, state_key: str = "", sender: str = ""
    ) -> str:
        """Put a state event, asking nobody. Any JSON goes, also what makes no sense.

        :return: the event ID.
        """
        room = self.rooms[room_id]
        event = {
            "type": type,
            "state_key": state_key,
            "content": dict(content),
            "sender": sender or room.creator,
            "room_id": room_id,
            "event_id": f"$event{next(self._numbers)}",
            "origin_server_ts": int(self.now() * 1000),
            "unsigned": {},
            "user_id": sender or room.creator,
        }
        room.state[type, state_key] = event
        for callback in self.on_state_change:
            callback(room_id, type)
        return str(event["event_id"])

    def clear_state(self, room_id: str, type: str) -> None:
        """Forget a state event altogether, which a real room cannot do but a purged one has done."""
        self.rooms[room_id].state.pop((type, ""), None)

    def openid_token(self, user: str) -> dict[str, Any]:
        """An OpenID token for a user ID (or localpart), good for an hour."""
        user_id = user if user.startswith("@") else f"@{user}:{self.server_name}"
        token = secrets.token_urlsafe(18)
        self.openid[token] = (user_id, self.now() + OPENID_LIFETIME)
        return {
            "access_token": token,
            "token_type": "Bearer",
            "matrix_server_name": self.server_name,
            "expires_in": OPENID_LIFETIME,
        }
