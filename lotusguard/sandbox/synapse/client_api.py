# SPDX-License-Identifier: Apache-2.0
"""The client API: state, membership and events of rooms, with the permission checks of the specification. Sandbox.

Read from Synapse 1.163's ``rest/client/room.py`` and ``event_auth.py``. Not checked: signatures, restricted joins
and third-party invitations.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from attrs import Factory, define

from lotusguard.sandbox.synapse.errors import error, forbidden, json_object
from lotusguard.sandbox.synapse.matrix import Login, Matrix
from lotusguard.sandbox.synapse.room import MatrixRoom, State
from lotusguard.sandbox.wire import Asked

_V3 = r"/_matrix/client/(?:v3|r0)"
_ROOM = rf"{_V3}/rooms/([^/]*)"
ROUTES = {
    "whoami": rf"{_V3}/account/whoami",
    "devices": rf"{_V3}/devices",
    "request_token": rf"{_V3}/user/([^/]*)/openid/request_token",
    "joined_rooms": rf"{_V3}/joined_rooms",
    "full_state": rf"{_ROOM}/state",
    "state_event": rf"{_ROOM}/state/([^/]*)(?:/([^/]*))?",
    "joined_members": rf"{_ROOM}/joined_members",
    "create_room": rf"{_V3}/createRoom",
    "room_alias": rf"{_V3}/directory/room/([^/]*)",
    "join": rf"{_V3}/join/([^/]*)",
    "join_room": rf"{_ROOM}/join",
    "leave": rf"{_ROOM}/leave",
    "forget": rf"{_ROOM}/forget",
    "kick": rf"{_ROOM}/kick",
    "ban": rf"{_ROOM}/ban",
    "unban": rf"{_ROOM}/unban",
    "invite": rf"{_ROOM}/invite",
    "knock": rf"{_V3}/knock/([^/]*)",
    "send": rf"{_ROOM}/send/([^/]*)/([^/]*)",
    "redact": rf"{_ROOM}/redact/([^/]*)/([^/]*)",
}
"""Patterns by route name. All need an access token."""
_POST = (
    "request_token",
    "create_room",
    "join",
    "join_room",
    "leave",
    "forget",
    "kick",
    "ban",
    "unban",
    "invite",
    "knock",
)
METHODS = dict.fromkeys(_POST, ("POST",)) | {"state_event": ("GET", "PUT"), "send": ("PUT",), "redact": ("PUT",)}
"""Methods by route name; GET where none are named."""

REMEMBERED_TRANSACTIONS = 10_000


@define
class ClientApi:
    """The answers. A method is named as its route and takes the decoded groups of the route's pattern."""

    matrix: Matrix
    _transactions: OrderedDict[tuple[str, ...], str] = Factory(OrderedDict)
    _aliases: dict[str, str] = Factory(dict)

    def answer(self, login: Login, route: str, asked: Asked, groups: list[str]) -> dict[str, Any]:
        """:raises Refusal: if the caller may not do that."""
        answered: dict[str, Any] = getattr(self, route)(login, asked, *groups)
        return answered

    # -- the account ---------------------------------------------------------------------------------------

    def whoami(self, login: Login, asked: Asked) -> dict[str, Any]:
        return {"user_id": login.user_id, "is_guest": False, "device_id": login.device_id}

    def devices(self, login: Login, asked: Asked) -> dict[str, Any]:
        ids = [one.device_id for one in self.matrix.logins.values() if one.user_id == login.user_id]
        nothing = {"display_name": None, "last_seen_ip": None, "last_seen_ts": None}
        return {"devices": [{"device_id": one, "user_id": login.user_id, **nothing} for one in ids]}

    def request_token(self, login: Login, asked: Asked, user_id: str) -> dict[str, Any]:
        if login.user_id != user_id:
            raise forbidden("Cannot request tokens for other users.")
        json_object(asked)
        return self.matrix.openid_token(user_id)

    def joined_rooms(self, login: Login, asked: Asked) -> dict[str, Any]:
        rooms = self.matrix.rooms
        return {"joined_rooms": [id for id, room in rooms.items() if room.membership(login.user_id) == "join"]}

    def create_room(self, login: Login, asked: Asked) -> dict[str, Any]:
        """The stand-in knows no presets: every room is private."""
        name = json_object(asked).get("room_alias_name")
        alias = f"#{name}:{self.matrix.server_name}"
        if name is not None and alias in self._aliases:
            raise error(400, "M_ROOM_IN_USE", "Room alias already taken")
        room_id = self.matrix.create_room(login.user_id)
        if name is not None:
            self._aliases[alias] = room_id
        return {"room_id": room_id}

    def room_alias(self, login: Login, asked: Asked, alias: str) -> dict[str, Any]:
        if alias not in self._aliases:
            raise error(404, "M_NOT_FOUND", f"Room alias {alias} not found.")
        return {"room_id": self._aliases[alias], "servers": [self.matrix.server_name]}

    # -- state ---------------------------------------------------------------------------------------------

    def full_state(self, login: Login, asked: Asked, room_id: str) -> Any:
        return list(self._readable_state(login, room_id).values())

    def state_event(self, login: Login, asked: Asked, room_id: str, type: str, state_key: str) -> dict[str, Any]:
        if asked.method == "GET":
            event = self._readable_state(login, room_id).get((type, state_key))
            if event is None:
                raise error(404, "M_NOT_FOUND", "Event not found.")
            content: dict[str, Any] = event["content"]
            return content
        content = json_object(asked)
        room = self._joined_room(login, room_id)
        if type == "m.room.member":
            raise error(400, "M_BAD_JSON", "The stand-in changes membership by its own routes only.")
        needed = room.level_to_send(type, is_state=True)
        if room.power_level(login.user_id) < needed:
            raise forbidden(_may_not_post(room, login, needed))
        if state_key.startswith("@") and state_key != login.user_id:
            raise forbidden("You are not allowed to set others state")
        event_id = self.matrix.set_state(room_id, type, content, state_key=state_key, sender=login.user_id)
        return {"event_id": event_id}

    def joined_members(self, login: Login, asked: Asked, room_id: str) -> dict[str, Any]:
        room = self._joined_room(login, room_id)
        names = {user: room.content("m.room.member", user).get("displayname") for user in room.members}
        return {"joined": {user: {"display_name": name, "avatar_url": None} for user, name in names.items()}}

    # -- membership ----------------------------------------------------------------------------------------

    def join(self, login: Login, asked: Asked, room_id: str) -> dict[str, Any]:
        room = self.matrix.rooms.get(room_id)
        if room is None:
            text = "Can't join remote room because no servers that are in the room have been provided."
            raise error(404, "M_UNKNOWN", text)
        membership = room.membership(login.user_id)
        if membership == "ban":
            raise error(403, "M_BAD_STATE", f"{login.user_id} is banned from the room")
        public = room.content("m.room.join_rules").get("join_rule") == "public"
        if membership not in ("invite", "join") and not public:
            raise forbidden("You are not invited to this room.")
        if membership != "join":
            self.matrix.join(room_id, login.user_id)
        return {"room_id": room_id}

    def join_room(self, login: Login, asked: Asked, room_id: str) -> dict[str, Any]:
        return self.join(login, asked, room_id)

    def knock(self, login: Login, asked: Asked, room_id: str) -> dict[str, Any]:
        room = self._room(room_id)
        if room.content("m.room.join_rules").get("join_rule") not in ("knock", "knock_restricted"):
            raise forbidden("You don't have permission to knock")
        if room.membership(login.user_id) in ("join", "ban"):
            raise forbidden("You cannot knock on a room you are already in or banned from")
        self.matrix.knock(room_id, login.user_id)
        return {"room_id": room_id}

    def leave(self, login: Login, asked: Asked, room_id: str) -> dict[str, Any]:
        room = self._room(room_id)
        if room.membership(login.user_id) not in ("join", "invite", "knock"):
            raise forbidden(f"User {login.user_id} not in room {room_id}")
        self.matrix.leave(room_id, login.user_id)
        return {}

    def forget(self, login: Login, asked: Asked, room_id: str) -> dict[str, Any]:
        room = self._room(room_id)
        if room.membership(login.user_id) not in (None, "leave", "ban"):
            raise error(400, "M_UNKNOWN", f"User {login.user_id} in room {room_id}")
        room.forgotten_by.add(login.user_id)
        return {}

    def invite(self, login: Login, asked: Asked, room_id: str) -> dict[str, Any]:
        room, user_id = self._joined_room(login, room_id), _user_in(asked)
        if room.power_level(login.user_id) < room.level_for("invite"):
            raise forbidden("You don't have permission to invite users")
        if room.membership(user_id) == "ban":
            raise error(403, "M_BAD_STATE", f"{user_id} is banned from the room")
        if room.membership(user_id) == "join":
            raise forbidden(f"{user_id} is already in the room.")
        self.matrix.invite(room_id, user_id, sender=login.user_id)
        return {}

    def kick(self, login: Login, asked: Asked, room_id: str) -> dict[str, Any]:
        room, user_id = self._joined_room(login, room_id), _user_in(asked)
        if room.membership(user_id) not in ("join", "invite", "knock"):
            raise forbidden(f"The target user {user_id} is not in the room")
        self._check_power_over(room, login, user_id, "kick", f"You cannot kick user {user_id}.")
        self.matrix.kick(room_id, user_id, sender=login.user_id)
        return {}

    def ban(self, login: Login, asked: Asked, room_id: str) -> dict[str, Any]:
        room, user_id = self._joined_room(login, room_id), _user_in(asked)
        self._check_power_over(room, login, user_id, "ban", "You don't have permission to ban")
        self.matrix.ban(room_id, user_id, sender=login.user_id)
        return {}

    def unban(self, login: Login, asked: Asked, room_id: str) -> dict[str, Any]:
        room, user_id = self._joined_room(login, room_id), _user_in(asked)
        if room.membership(user_id) != "ban":
            raise error(403, "M_BAD_STATE", "Cannot unban user who was not banned")
        self._check_power_over(room, login, user_id, "ban", f"You cannot unban user {user_id}.")
        self.matrix.unban(room_id, user_id, sender=login.user_id)
        return {}

    # -- events --------------------------------------------------------------------------------------------

    def send(self, login: Login, asked: Asked, room_id: str, type: str, transaction: str) -> dict[str, Any]:
        key = ("send", login.user_id, login.device_id, room_id, type, transaction)
        if key not in self._transactions:
            content, room = json_object(asked), self._joined_room(login, room_id)
            needed = room.level_to_send(type, is_state=False)
            if room.power_level(login.user_id) < needed:
                raise forbidden(_may_not_post(room, login, needed))
            self._remember(key, self.matrix.send_event(room_id, type, content, sender=login.user_id))
        return {"event_id": self._transactions[key]}

    def redact(self, login: Login, asked: Asked, room_id: str, event_id: str, transaction: str) -> dict[str, Any]:
        key = ("redact", login.user_id, login.device_id, room_id, event_id, transaction)
        if key not in self._transactions:
            reason = str(json_object(asked, may_be_empty=True).get("reason") or "")
            room = self._joined_room(login, room_id)
            target = room.event(event_id)
            if target is None:
                raise error(404, "M_NOT_FOUND", "Event not found.")
            own = target["sender"] == login.user_id
            if not own and room.power_level(login.user_id) < room.level_for("redact"):
                raise forbidden("You don't have permission to redact events")
            self._remember(key, self.matrix.redact(room_id, login.user_id, event_id, reason))
        return {"event_id": self._transactions[key]}

    def _remember(self, key: tuple[str, ...], event_id: str) -> None:
        self._transactions[key] = event_id
        if len(self._transactions) > REMEMBERED_TRANSACTIONS:
            self._transactions.popitem(last=False)

    # -- access --------------------------------------------------------------------------------------------

    def _room(self, room_id: str) -> MatrixRoom:
        room = self.matrix.rooms.get(room_id)
        if room is None:
            raise error(404, "M_UNKNOWN", "Not a known room")
        return room

    def _joined_room(self, login: Login, room_id: str) -> MatrixRoom:
        room = self.matrix.rooms.get(room_id)
        if room is None or room.membership(login.user_id) != "join":
            raise forbidden(f"User {login.user_id} not in room {room_id}")
        return room

    def _readable_state(self, login: Login, room_id: str) -> State:
        """The current state for members and in world-readable rooms; for former members, as it was when they left."""
        room = self.matrix.rooms.get(room_id)
        if room is not None:
            if room.membership(login.user_id) == "join":
                return room.state
            if login.user_id in room.state_at_departure and login.user_id not in room.forgotten_by:
                return room.state_at_departure[login.user_id]
            if room.content("m.room.history_visibility").get("history_visibility") == "world_readable":
                return room.state
        raise forbidden(f"User {login.user_id} not in room {room_id}, and room previews are disabled")

    def _check_power_over(self, room: MatrixRoom, login: Login, user_id: str, action: str, text: str) -> None:
        own = room.power_level(login.user_id)
        if own < room.level_for(action) or own <= room.power_level(user_id):
            raise forbidden(text)


def _user_in(asked: Asked) -> str:
    user_id = json_object(asked).get("user_id")
    if not isinstance(user_id, str) or not user_id.startswith("@") or ":" not in user_id:
        raise error(400, "M_BAD_JSON", "Missing or invalid user_id")
    return user_id


def _may_not_post(room: MatrixRoom, login: Login, needed: int) -> str:
    return (
        "You don't have permission to post that to the room. "
        f"user_level ({room.power_level(login.user_id)}) < send_level ({needed})"
    )
