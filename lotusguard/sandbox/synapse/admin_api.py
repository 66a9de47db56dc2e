# SPDX-License-Identifier: Apache-2.0
"""Synapse's admin API, as far as the guard uses it. Sandbox.

Read from Synapse 1.163's ``rest/admin/rooms.py`` and ``rest/admin/users.py``.
"""

from __future__ import annotations

from typing import Any

from attrs import define

from lotusguard.sandbox.synapse.errors import error, query
from lotusguard.sandbox.synapse.matrix import Login, Matrix
from lotusguard.sandbox.synapse.room import MatrixRoom
from lotusguard.sandbox.wire import Asked

ROUTES = {
    "room_state": r"/_synapse/admin/v1/rooms/([^/]*)/state",
    "room_members": r"/_synapse/admin/v1/rooms/([^/]*)/members",
    "rooms": r"/_synapse/admin/v1/rooms",
    "user": r"/_synapse/admin/v2/users/([^/]*)",
    "user_joined_rooms": r"/_synapse/admin/v1/users/([^/]*)/joined_rooms",
    "user_memberships": r"/_synapse/admin/v1/users/([^/]*)/memberships",
}
"""Patterns by route name. All are GET and need the access token of an administrator."""


@define
class AdminApi:
    """The answers. A method is named as its route and takes the decoded groups of the route's pattern.

    :ivar ignores_type: answer with the whole state whatever ``type`` is asked for, as older releases do.
    """

    matrix: Matrix
    ignores_type: bool = False

    def answer(self, login: Login, route: str, asked: Asked, groups: list[str]) -> dict[str, Any]:
        """:raises Refusal: 403 if the caller is not an administrator, 404 if something is unknown."""
        if not login.admin:
            raise error(403, "M_FORBIDDEN", "You are not a server admin")
        answered: dict[str, Any] = getattr(self, route)(asked, *groups)
        return answered

    def room_state(self, asked: Asked, room_id: str) -> dict[str, Any]:
        room = self._room(room_id)
        if not self._takes_part_in(room):
            return {"state": []}
        type = query(asked).get("type")
        events = room.state.values()
        if type and not self.ignores_type:
            return {"state": [event for event in events if event["type"] == type]}
        return {"state": list(events)}

    def room_members(self, asked: Asked, room_id: str) -> dict[str, Any]:
        room = self._room(room_id)
        members = room.members if self._takes_part_in(room) else []
        return {"members": members, "total": len(members)}

    def rooms(self, asked: Asked) -> dict[str, Any]:
        given = query(asked)
        try:
            start, limit = int(given.get("from", "0")), int(given.get("limit", "100"))
        except ValueError:
            raise error(400, "M_INVALID_PARAM", "Query parameter must be an integer") from None
        rooms = self.matrix.rooms
        answered: dict[str, Any] = {
            "offset": start,
            "rooms": [self._summary(rooms[room_id]) for room_id in sorted(rooms)[start : start + limit]],
            "total_rooms": len(rooms),
        }
        if start + limit < len(rooms):
            answered["next_batch"] = start + limit
        if start > 0:
            answered["prev_batch"] = max(start - limit, 0)
        return answered

    def user(self, asked: Asked, user_id: str) -> dict[str, Any]:
        if user_id.partition(":")[2] != self.matrix.server_name:
            raise error(400, "M_UNKNOWN", "Can only look up local users")
        user = self.matrix.users.get(user_id)
        if user is None:
            raise error(404, "M_NOT_FOUND", "User not found")
        return {"name": user_id, "admin": user.admin, "deactivated": False, "is_guest": False}

    def user_joined_rooms(self, asked: Asked, user_id: str) -> dict[str, Any]:
        joined = [room_id for room_id, kind in self._memberships(user_id).items() if kind == "join"]
        return {"joined_rooms": joined, "total": len(joined)}

    def user_memberships(self, asked: Asked, user_id: str) -> dict[str, Any]:
        return {"memberships": self._memberships(user_id)}

    def _memberships(self, user_id: str) -> dict[str, str]:
        """Of rooms this homeserver takes part in. A user it has never seen has none, which is not an error."""
        found = {}
        for room_id, room in self.matrix.rooms.items():
            membership = room.membership(user_id)
            if membership is not None and self._takes_part_in(room):
                found[room_id] = membership
        return found

    def _takes_part_in(self, room: MatrixRoom) -> bool:
        """After the last local user has left, Synapse has no current state of the room any more."""
        return room.has_local_member(self.matrix.server_name)

    def _room(self, room_id: str) -> MatrixRoom:
        room = self.matrix.rooms.get(room_id)
        if room is None:
            raise error(404, "M_NOT_FOUND", "Room not found")
        return room

    def _summary(self, room: MatrixRoom) -> dict[str, Any]:
        members = room.members if self._takes_part_in(room) else []
        return {
            "room_id": room.room_id,
            "name": None,
            "canonical_alias": None,
            "joined_members": len(members),
            "joined_local_members": sum(one.partition(":")[2] == self.matrix.server_name for one in members),
            "version": room.version,
            "creator": room.creator,
            "encryption": room.content("m.room.encryption").get("algorithm"),
            "federatable": True,
            "public": False,
            "join_rules": room.content("m.room.join_rules").get("join_rule", "invite"),
            "guest_access": None,
            "history_visibility": room.content("m.room.history_visibility").get("history_visibility", "shared"),
            "state_events": len(room.state),
            "room_type": None,
        }
