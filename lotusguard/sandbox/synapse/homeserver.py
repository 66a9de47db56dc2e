# SPDX-License-Identifier: Apache-2.0
"""A stand-in for Synapse: the admin API that the guard asks, and as much of the client API as a demo needs. Sandbox.

Read from Synapse 1.163's ``rest/admin``, ``rest/client`` and ``federation/transport/server``.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, unquote

from lotusguard.sandbox.standin import StandIn
from lotusguard.sandbox.synapse.matrix import Matrix, MatrixRoom, User
from lotusguard.sandbox.wire import Asked, Refusal, Reply

_HEADERS = (
    ("Content-Type", "application/json"),
    ("Cache-Control", "no-cache, no-store, must-revalidate"),
    ("Access-Control-Allow-Origin", "*"),
    ("Access-Control-Allow-Methods", "GET, HEAD, POST, PUT, DELETE, OPTIONS"),
    ("Access-Control-Allow-Headers", "X-Requested-With, Content-Type, Authorization, Date"),
    ("Server", "Synapse/1.163.2"),
)
ROUTES = {
    "room_state": r"/_synapse/admin/v1/rooms/([^/]*)/state",
    "room_members": r"/_synapse/admin/v1/rooms/([^/]*)/members",
    "rooms": r"/_synapse/admin/v1/rooms",
    "user": r"/_synapse/admin/v2/users/([^/]*)",
    "server_version": r"/_synapse/admin/v1/server_version",
    "whoami": r"/_matrix/client/(?:v3|r0)/account/whoami",
    "userinfo": r"/_matrix/federation/v1/openid/userinfo",
    "versions": r"/_matrix/client/versions",
    "state_event": r"/_matrix/client/(?:v3|r0)/rooms/([^/]*)/state/([^/]*)(?:/([^/]*))?",
    "request_token": r"/_matrix/client/(?:v3|r0)/user/([^/]*)/openid/request_token",
}
_METHODS = {"state_event": ("GET", "PUT"), "request_token": ("POST",)}
_PATTERNS = {name: re.compile(pattern) for name, pattern in ROUTES.items()}


class FakeSynapse(Matrix, StandIn):
    """Synapse. Route names for ``faults``: the keys of ``ROUTES``, or ``""``.

    :param server_name: the part of user IDs after the first colon.
    :param ignores_type: answer with the whole state whatever ``type`` is asked for, as older releases do.
    :param now: seconds since the epoch, for OpenID tokens and events.
    """

    def __init__(
        self,
        reactor: Any,
        server_name: str = "sandbox.local",
        *,
        ignores_type: bool = False,
        now: Callable[[], float] = time.time,
        port: int = 0,
        clock: Any = None,
    ) -> None:
        Matrix.__init__(self, server_name, now)
        StandIn.__init__(self, reactor, port=port, clock=clock)
        self.ignores_type = ignores_type

    def route_of(self, asked: Asked) -> str:
        return next((name for name, it in _PATTERNS.items() if it.fullmatch(asked.path)), "")

    async def answer(self, asked: Asked, route: str) -> Reply:
        if asked.method == "OPTIONS":
            return Reply(204, b"", _HEADERS[2:])
        if not route:
            raise _error(404, "M_UNRECOGNIZED", "Unrecognized request")
        if asked.method not in _METHODS.get(route, ("GET",)):
            raise _error(405, "M_UNRECOGNIZED", "Unrecognized request")
        match = _PATTERNS[route].fullmatch(asked.path)
        assert match is not None
        # Synapse matches the undecoded path; only the groups are decoded.
        groups = [unquote(group or "", errors="strict") for group in match.groups()]
        answered = getattr(self, f"_{route}")(asked, *groups)
        return Reply(200, json.dumps(answered, separators=(",", ":")).encode(), _HEADERS)

    def _room_state(self, asked: Asked, room_id: str) -> dict[str, Any]:
        room = self._room_for_admin(asked, room_id)
        type = _query(asked).get("type")
        events = room.state.values()
        if type and not self.ignores_type:
            return {"state": [event for event in events if event["type"] == type]}
        return {"state": list(events)}

    def _room_members(self, asked: Asked, room_id: str) -> dict[str, Any]:
        members = self._room_for_admin(asked, room_id).members
        return {"members": members, "total": len(members)}

    def _rooms(self, asked: Asked) -> dict[str, Any]:
        self._admin(asked)
        query = _query(asked)
        try:
            start, limit = int(query.get("from", "0")), int(query.get("limit", "100"))
        except ValueError:
            raise _error(400, "M_INVALID_PARAM", "Query parameter must be an integer") from None
        page = sorted(self.rooms)[start : start + limit]
        answered: dict[str, Any] = {
            "offset": start,
            "rooms": [self._summary(self.rooms[room_id]) for room_id in page],
            "total_rooms": len(self.rooms),
        }
        if start + limit < len(self.rooms):
            answered["next_batch"] = start + limit
        if start > 0:
            answered["prev_batch"] = max(start - limit, 0)
        return answered

    def _summary(self, room: MatrixRoom) -> dict[str, Any]:
        return {
            "room_id": room.room_id,
            "name": None,
            "canonical_alias": None,
            "joined_members": len(room.members),
            "joined_local_members": len(room.members),
            "version": "10",
            "creator": room.creator,
            "encryption": None,
            "federatable": True,
            "public": False,
            "join_rules": "invite",
            "guest_access": None,
            "history_visibility": "shared",
            "state_events": len(room.state),
            "room_type": None,
        }

    def _user(self, asked: Asked, user_id: str) -> dict[str, Any]:
        self._admin(asked)
        user = self.users.get(user_id)
        if user is None:
            raise _error(404, "M_NOT_FOUND", "User not found")
        return {"name": user_id, "admin": user.admin, "deactivated": False, "is_guest": False}

    def _server_version(self, asked: Asked) -> dict[str, Any]:
        return {"server_version": "1.163.2"}

    def _versions(self, asked: Asked) -> dict[str, Any]:
        return {"versions": ["r0.6.1", "v1.1", "v1.11"], "unstable_features": {}}

    def _whoami(self, asked: Asked) -> dict[str, Any]:
        return {"user_id": self._requester(asked).user_id, "is_guest": False, "device_id": "SANDBOX"}

    def _userinfo(self, asked: Asked) -> dict[str, Any]:
        token = _query(asked).get("access_token")
        if token is None:
            raise _error(401, "M_MISSING_TOKEN", "Access Token required")
        user_id, expires = self.openid.get(token, ("", 0.0))
        if expires <= self.now():
            raise _error(401, "M_UNKNOWN_TOKEN", "Access Token unknown or expired")
        return {"sub": user_id}

    def _request_token(self, asked: Asked, user_id: str) -> dict[str, Any]:
        if self._requester(asked).user_id != user_id:
            raise _error(403, "M_FORBIDDEN", "Cannot request tokens for other users.")
        _json_object(asked)
        return self.openid_token(user_id)

    def _state_event(self, asked: Asked, room_id: str, type: str, state_key: str) -> dict[str, Any]:
        requester = self._requester(asked)
        room = self.rooms.get(room_id)
        if room is None or requester.user_id not in room.members:
            raise _error(403, "M_FORBIDDEN", f"User {requester.user_id} not in room {room_id}")
        if asked.method == "GET":
            event = room.state.get((type, state_key))
            if event is None:
                raise _error(404, "M_NOT_FOUND", "Event not found.")
            content: dict[str, Any] = event["content"]
            return content
        content = _json_object(asked)
        if requester.user_id != room.creator:
            raise _error(403, "M_FORBIDDEN", "You don't have permission to post that to the room")
        sender = requester.user_id
        return {"event_id": self.set_state(room_id, type, content, state_key=state_key, sender=sender)}

    def _requester(self, asked: Asked) -> User:
        header = asked.header("Authorization") or ""
        token = header.removeprefix("Bearer ") if header else _query(asked).get("access_token", "")
        if not token:
            raise _error(401, "M_MISSING_TOKEN", "Missing access token")
        user = self.logins.get(token)
        if user is None:
            raise _error(401, "M_UNKNOWN_TOKEN", "Invalid access token passed.", soft_logout=False)
        return user

    def _admin(self, asked: Asked) -> None:
        if not self._requester(asked).admin:
            raise _error(403, "M_FORBIDDEN", "You are not a server admin")

    def _room_for_admin(self, asked: Asked, room_id: str) -> MatrixRoom:
        self._admin(asked)
        room = self.rooms.get(room_id)
        if room is None:
            raise _error(404, "M_NOT_FOUND", "Room not found")
        return room


def _query(asked: Asked) -> dict[str, str]:
    return {key: values[0] for key, values in parse_qs(asked.query, keep_blank_values=True).items()}


def _json_object(asked: Asked) -> dict[str, Any]:
    try:
        value = asked.json()
    except ValueError:
        raise _error(400, "M_NOT_JSON", "Content not JSON.") from None
    if not isinstance(value, dict):
        raise _error(400, "M_BAD_JSON", "Content must be a JSON object.")
    return value


def _error(status: int, errcode: str, error: str, **more: Any) -> Refusal:
    body = json.dumps({"errcode": errcode, "error": error} | more).encode()
    return Refusal(Reply(status, body, _HEADERS))
