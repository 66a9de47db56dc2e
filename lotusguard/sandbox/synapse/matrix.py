# SPDX-License-Identifier: Apache-2.0
"""The data of the stand-in homeserver: users, rooms with their state and members, OpenID tokens. Sandbox."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from attrs import frozen

from lotusguard.sandbox.synapse.room import Event, MatrixRoom

OPENID_LIFETIME = 3600
"""Seconds."""


@frozen
class User:
    user_id: str
    admin: bool


@frozen
class Login:
    """One device of a user; has an access token of its own."""

    user: User
    device_id: str

    @property
    def user_id(self) -> str:
        return self.user.user_id

    @property
    def admin(self) -> bool:
        return self.user.admin


class Matrix:
    """Users and rooms, changed by Python methods. The methods check no permissions.

    Wherever a method takes a user, it takes a user ID or, for a user of this homeserver, a localpart. Users of other
    homeservers can be members of rooms too.

    :param server_name: the part of user IDs after the first colon.
    :param now: seconds since the epoch, for OpenID tokens and events.
    :ivar on_state_change: called with room ID and event type after each change of state, before ``/sync`` wakes.
    :ivar on_event: called after each event; ``/sync`` uses it.
    """

    def __init__(self, server_name: str, now: Callable[[], float]) -> None:
        self.server_name = server_name
        self.now = now
        self.on_state_change: list[Callable[[str, str], None]] = []
        self.on_event: list[Callable[[], None]] = []
        self.rooms: dict[str, MatrixRoom] = {}
        self.users: dict[str, User] = {}
        """By user ID."""
        self.logins: dict[str, Login] = {}
        """By access token."""
        self.openid: dict[str, tuple[str, float]] = {}
        """User ID and time of expiry, by OpenID token."""
        self.position = 0
        """The stream position of the latest event."""
        self._numbers = itertools.count(1)

    def user_id(self, user: str) -> str:
        """The user ID for a user ID or a localpart."""
        return user if user.startswith("@") else f"@{user}:{self.server_name}"

    # -- users ---------------------------------------------------------------------------------------------

    def add_user(self, localpart: str, admin: bool = False, device_id: str = "") -> str:
        """Register a user unless they exist, and log in with a new device.

        :param admin: make the user an administrator of the homeserver. Has no effect on an existing user.
        :return: the access token.
        """
        token = f"syt_{secrets.token_urlsafe(18)}"
        user_id = self.user_id(localpart)
        user = self.users.setdefault(user_id, User(user_id, admin))
        self.logins[token] = Login(user, device_id or secrets.token_hex(5).upper())
        return token

    def log_out(self, token: str) -> None:
        """Make an access token invalid and remove its device."""
        self.logins.pop(token, None)

    def openid_token(self, user: str) -> dict[str, Any]:
        """An OpenID token for a user, valid for an hour."""
        token = secrets.token_urlsafe(18)
        self.openid[token] = (self.user_id(user), self.now() + OPENID_LIFETIME)
        return {
            "access_token": token,
            "token_type": "Bearer",
            "matrix_server_name": self.server_name,
            "expires_in": OPENID_LIFETIME,
        }

    # -- rooms and state -----------------------------------------------------------------------------------

    def create_room(
        self,
        creator: str = "admin",
        room_id: str | None = None,
        members: int = 0,
        *,
        room_version: str = "10",
        creators: Iterable[str] = (),
        joined: Iterable[str] = (),
        encrypted: bool = False,
    ) -> str:
        """Make a room. It can be joined by invitation only, as there is no ``m.room.join_rules``.

        :param creator: has power level 100, or stands above every level from room version 12 on.
        :param members: how many made-up users are joined too.
        :param creators: additional creators, from room version 12 on; they are joined too.
        :param joined: further users who are joined.
        :return: the room ID. From room version 12 on it contains no server name.
        """
        who = self.user_id(creator)
        room = MatrixRoom("", who, room_version)
        suffix = "" if room.has_privileged_creators else f":{self.server_name}"
        room.room_id = room_id or f"!{secrets.token_urlsafe(32 if not suffix else 13)}{suffix}"
        self.rooms[room.room_id] = room
        create: dict[str, Any] = {"room_version": room_version}
        power_levels: dict[str, Any] = {"users": {who: 100}}
        additional = [self.user_id(user) for user in creators]
        if room.has_privileged_creators:
            power_levels = {"users": {}}
            if additional:
                create["additional_creators"] = additional
        elif additional:
            raise ValueError(f"room version {room_version} has no additional creators")
        else:
            create["creator"] = who
        self.set_state(room.room_id, "m.room.create", create, sender=who)
        self.join(room.room_id, who)
        self.set_state(room.room_id, "m.room.power_levels", power_levels, sender=who)
        if encrypted:
            self.set_state(room.room_id, "m.room.encryption", {"algorithm": "m.megolm.v1.aes-sha2"}, sender=who)
        for user in (*additional, *(f"member{n}" for n in range(members)), *joined):
            if room.membership(self.user_id(user)) != "join":
                self.join(room.room_id, user)
        return room.room_id

    def set_state(
        self, room_id: str, type: str, content: Mapping[str, Any], *, state_key: str = "", sender: str = ""
    ) -> str:
        """Write a state event. Any JSON is accepted, sensible or not.

        :return: the event ID.
        """
        return str(self._append(room_id, type, content, sender=sender, state_key=state_key)["event_id"])

    def clear_state(self, room_id: str, type: str) -> None:
        """Remove a state event without a trace. Rooms cannot do that, but a purged database looks like this."""
        self.rooms[room_id].state.pop((type, ""), None)

    def send_event(self, room_id: str, type: str, content: Mapping[str, Any], *, sender: str) -> str:
        """Send an event that is not state. :return: the event ID."""
        return str(self._append(room_id, type, content, sender=sender)["event_id"])

    def send_message(self, room_id: str, sender: str, body: str) -> str:
        """Send a text message; in an encrypted room it is an ``m.room.encrypted`` event. :return: the event ID."""
        if self.rooms[room_id].encrypted:
            content = {"algorithm": "m.megolm.v1.aes-sha2", "ciphertext": secrets.token_urlsafe(32)}
            return self.send_event(room_id, "m.room.encrypted", content, sender=sender)
        return self.send_event(room_id, "m.room.message", {"msgtype": "m.text", "body": body}, sender=sender)

    def react(self, room_id: str, sender: str, event_id: str, key: str) -> str:
        """React to an event. Reactions are never encrypted. :return: the event ID."""
        relation = {"rel_type": "m.annotation", "event_id": event_id, "key": key}
        return self.send_event(room_id, "m.reaction", {"m.relates_to": relation}, sender=sender)

    def redact(self, room_id: str, sender: str, event_id: str, reason: str = "") -> str:
        """Redact an event: its content is reduced to what the room version protects. :return: the event ID."""
        content = {"redacts": event_id} | ({"reason": reason} if reason else {})
        redaction = self._append(room_id, "m.room.redaction", content, sender=sender, redacts=event_id)
        target = self.rooms[room_id].event(event_id)
        if target is not None:
            kept = _PROTECTED.get(target["type"], ())
            target["content"] = {key: value for key, value in target["content"].items() if key in kept}
            target["unsigned"] = {"redacted_because": redaction}
            if "state_key" in target:
                self._notify(room_id, target["type"])
        return str(redaction["event_id"])

    # -- membership ----------------------------------------------------------------------------------------

    def join(self, room_id: str, user: str) -> str:
        """The user joins the room. :return: the event ID, as for all of these."""
        return self._set_membership(room_id, user, "join", displayname=self.user_id(user)[1:].partition(":")[0])

    def leave(self, room_id: str, user: str) -> str:
        """The user leaves the room, rejects an invitation or withdraws a knock."""
        return self._set_membership(room_id, user, "leave")

    def kick(self, room_id: str, user: str, *, sender: str = "") -> str:
        """``sender`` (by default the room's creator) removes the user, who may join again if invited."""
        return self._set_membership(room_id, user, "leave", sender=sender or self.rooms[room_id].creator)

    def ban(self, room_id: str, user: str, *, sender: str = "") -> str:
        return self._set_membership(room_id, user, "ban", sender=sender or self.rooms[room_id].creator)

    def unban(self, room_id: str, user: str, *, sender: str = "") -> str:
        """The user is no longer banned. Their membership is ``leave`` afterwards."""
        return self._set_membership(room_id, user, "leave", sender=sender or self.rooms[room_id].creator)

    def invite(self, room_id: str, user: str, *, sender: str = "") -> str:
        return self._set_membership(room_id, user, "invite", sender=sender or self.rooms[room_id].creator)

    def knock(self, room_id: str, user: str) -> str:
        return self._set_membership(room_id, user, "knock")

    def purge_member(self, room_id: str, user: str) -> None:
        """Remove a user's member event from the state without any event.

        So it looks while a room joined over federation is in partial state, or after state resolution.
        """
        self.rooms[room_id].state.pop(("m.room.member", self.user_id(user)), None)

    def _set_membership(self, room_id: str, user: str, membership: str, *, sender: str = "", **more: str) -> str:
        user_id, room = self.user_id(user), self.rooms[room_id]
        was_joined = room.membership(user_id) == "join"
        content = {"membership": membership, **more}
        event_id = self.set_state(room_id, "m.room.member", content, state_key=user_id, sender=sender or user_id)
        if was_joined and membership in ("leave", "ban"):
            room.state_at_departure[user_id] = dict(room.state)
        elif membership == "join":
            room.state_at_departure.pop(user_id, None)
            room.forgotten_by.discard(user_id)
        return event_id

    # -- events --------------------------------------------------------------------------------------------

    def _append(
        self, room_id: str, type: str, content: Mapping[str, Any], *, sender: str, **more: str
    ) -> dict[str, Any]:
        room = self.rooms[room_id]
        sender = self.user_id(sender) if sender else room.creator
        event: Event = {
            "type": type,
            "content": dict(content),
            "sender": sender,
            "room_id": room_id,
            "event_id": f"$event{next(self._numbers)}",
            "origin_server_ts": int(self.now() * 1000),
            "unsigned": {},
            "user_id": sender,
            **more,
        }
        self.position += 1
        room.timeline.append((self.position, event))
        if "state_key" in more:
            replaced = room.state.get((type, more["state_key"]))
            if replaced is not None:
                event["unsigned"] = {"replaces_state": replaced["event_id"], "prev_content": replaced["content"]}
            room.state[type, more["state_key"]] = event
            self._notify(room_id, type)
        else:
            self._notify(room_id)
        return event

    def _notify(self, room_id: str, state_type: str = "") -> None:
        if state_type:
            for callback in list(self.on_state_change):
                callback(room_id, state_type)
        for wake in list(self.on_event):
            wake()


_PROTECTED = {
    "m.room.member": ("membership",),
    "m.room.create": ("creator", "room_version", "additional_creators"),
    "m.room.join_rules": ("join_rule",),
    "m.room.power_levels": (
        "users", "users_default", "events", "events_default", "state_default", "ban", "kick", "redact", "invite",
    ),
    "m.room.history_visibility": ("history_visibility",),
}  # fmt: skip
"""By event type, the content keys that a redaction keeps."""
