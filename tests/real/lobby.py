# SPDX-License-Identifier: Apache-2.0
"""Rooms with a lobby, with the guard's own account in them, and what their moderator does there. Tests."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from attrs import define

from tests.real.processes import eventually, http
from tests.real.services import OPERATORS
from tests.real.stack import Stack

ADMIT, DENY = "✅", "❌"
ENCRYPTION = {"algorithm": "m.megolm.v1.aes-sha2"}


def run_resident_guard(stack: Stack, account: str, **settings: object) -> None:
    """Run the guard with an account that is no admin's; people invite it into their rooms."""
    stack.run_guard(pushed=True, matrix_token=stack.tokens[account], **settings)


@define
class LobbyRoom:
    """A room whose lobby is on.

    :ivar account: the guard's. It is a member of the room.
    """

    stack: Stack
    room_id: str
    account: str

    @classmethod
    def open(cls, stack: Stack, room_id: str, account: str, **content: Any) -> LobbyRoom:
        """Invite the guard's account into a room, and switch the lobby on.

        :param content: the rest of the content of ``io.lotus.lobby``.
        """
        stack.moderate("invite", account, room_id)
        room = cls(stack, room_id, account)
        eventually(room._has_the_guard, 60.0, "the guard has to accept its invitation")
        stack.set_state(room_id, "io.lotus.lobby", {"enabled": True, **content})
        return room

    def _has_the_guard(self) -> bool:
        path = f"/_matrix/client/v3/rooms/{self.room_id}/joined_members"
        return self.account in self.stack.matrix("GET", path, user=self.stack.moderator)["joined"]

    def waiting(self) -> list[str]:
        """Who waits, as the operators' listener says."""
        answer = http("GET", f"{self.stack.operators_url}/lobby", bearer=OPERATORS)
        assert answer.status == 200, answer.body
        rooms = {room["room_id"]: room["waiting"] for room in answer.content["rooms"]}
        return sorted(one["user"] for one in rooms.get(self.room_id, ()))

    def messages(self) -> list[dict[str, Any]]:
        """The latest events of the room, the newest first. Redacted ones have no body."""
        path = f"/_matrix/client/v3/rooms/{self.room_id}/messages?dir=b&limit=100"
        events: list[dict[str, Any]] = self.stack.matrix("GET", path, user=self.stack.moderator)["chunk"]
        return events

    def notice(self, user: str) -> str:
        """The event ID of the guard's notice about a user; "" if there is none, or it was redacted."""
        asks = f"{user} asks to join the call"
        for event in self.messages():
            if event["sender"] == self.account and asks in str(event["content"].get("body")):
                return str(event["event_id"])
        return ""

    def said(self, text: str) -> bool:
        """Whether the guard wrote this."""
        return any(
            event["sender"] == self.account and event["content"].get("body") == text for event in self.messages()
        )

    def react(self, event_id: str, key: str, user: str = "") -> None:
        """React to a notice from another client than Element Call. :param user: by default the moderator."""
        relation = {"rel_type": "m.annotation", "event_id": event_id, "key": key}
        self._send("m.reaction", {"m.relates_to": relation}, user)

    def say(self, text: str, user: str = "") -> None:
        """Write a message, a command for instance. :param user: by default the moderator."""
        self._send("m.room.message", {"msgtype": "m.text", "body": text}, user)

    def _send(self, kind: str, content: dict[str, Any], user: str) -> None:
        path = f"/_matrix/client/v3/rooms/{self.room_id}/send/{kind}/{uuid4().hex}"
        self.stack.matrix("PUT", path, content, user=user or self.stack.moderator)
