# SPDX-License-Identifier: Apache-2.0
"""How the guard speaks in rooms to which its account was invited."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from attrs import frozen


@frozen
class Reaction:
    """A reaction (``m.reaction``) to an event. :ivar key: usually an emoji."""

    room_id: str
    sender: str
    event_id: str
    key: str


class RoomVoice(Protocol):
    """Sends notices into rooms. All methods raise `DependencyFailed` if the homeserver does not take the event."""

    def can_speak(self, room_id: str) -> bool:
        """Whether the guard's account is in the room and hears what happens there."""

    async def notice(self, room_id: str, text: str, transaction: str = "") -> str:
        """Send an ``m.notice``. :return: its event ID.

        :param transaction: names it: the same notice that is sent twice appears once.
        """

    async def react(self, room_id: str, event_id: str, key: str, transaction: str = "") -> None:
        """React to an event."""

    async def redact(self, room_id: str, event_id: str) -> None:
        """Redact an event of our own."""

    def on_reaction(self, listener: Callable[[Reaction], None]) -> None:
        """Call this for every reaction in these rooms, but for our own."""
