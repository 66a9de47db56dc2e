# SPDX-License-Identifier: Apache-2.0
"""How the guard speaks in the rooms it is in: rate-limited, and only there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attrs import define, field
from cachetools import LRUCache
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.synapse import MatrixClient
from lotusguard.guard.rooms.residence.residence import Residence
from lotusguard.guard.rooms.residence.room import MESSAGE, REACTION
from lotusguard.guard.rooms.voice import Reaction
from lotusguard.metrics import Metrics

log = Logger()

ROOM_BURST, ROOM_RATE = 60, 1.0
"""Events that may be sent into one room at once, and per second in the long run."""
ALL_BURST, ALL_RATE = 300, 20.0
"""The same for all rooms together."""


LONGEST_NOTICE = 8_000
"""Characters."""


@define(eq=False)
class RateLimit:
    """A token bucket. :param burst: what may be taken at once. :param rate: what is given back per second."""

    _clock: IReactorTime
    _burst: float
    _rate: float
    _left: float = field(init=False)
    _at: float = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._left, self._at = self._burst, self._clock.seconds()

    def take(self) -> bool:
        """Take one. :return: whether there was one."""
        now = self._clock.seconds()
        self._left, self._at = min(self._burst, self._left + (now - self._at) * self._rate), now
        if self._left < 1:
            return False
        self._left -= 1
        return True


@define(eq=False)
class ResidentVoice:
    """The `RoomVoice` of the guard's account."""

    _client: MatrixClient
    _residence: Residence
    _clock: IReactorTime
    _metrics: Metrics
    _all: RateLimit = field(init=False)
    _rooms: LRUCache[str, RateLimit] = field(factory=lambda: LRUCache(10_000), init=False)
    _listeners: list[Callable[[Reaction], None]] = field(factory=list, init=False)

    def __attrs_post_init__(self) -> None:
        self._all = RateLimit(self._clock, ALL_BURST, ALL_RATE)

    def can_speak(self, room_id: str) -> bool:
        """Whether the guard's account is in the room and hears what happens there."""
        return self._residence.alive and self._residence.is_resident(room_id)

    def is_heard_from(self, room_id: str) -> bool:
        """Whether moderators' answers from the room reach us, now or soon. Until then notices wait."""
        return self._residence.hears(room_id)

    async def notice(self, room_id: str, text: str, transaction: str = "") -> str:
        """Send an ``m.notice``, in clear in encrypted rooms too. It mentions nobody. :return: its event ID.

        :raises DependencyFailed: it was not sent: the homeserver refuses, or too much was sent lately.
        """
        content = {"msgtype": "m.notice", "body": _shown(text), "m.mentions": {}}
        return await self._send(room_id, MESSAGE, content, transaction)

    async def react(self, room_id: str, event_id: str, key: str, transaction: str = "") -> None:
        """React to an event. :raises DependencyFailed: as `notice`."""
        relation = {"rel_type": "m.annotation", "event_id": event_id, "key": key}
        await self._send(room_id, REACTION, {"m.relates_to": relation}, transaction)

    async def redact(self, room_id: str, event_id: str) -> None:
        """Redact an event of our own. There are never more of these than notices and reactions."""
        await self._client.redact(room_id, event_id)

    def on_reaction(self, listener: Callable[[Reaction], None]) -> None:
        """Call this for every reaction in these rooms, but for our own."""
        self._listeners.append(listener)

    def hear(self, reaction: Reaction) -> None:
        """Somebody reacted to an event."""
        for listener in self._listeners:
            try:
                listener(reaction)
            except Exception:
                log.failure("a reaction in {room_id} could not be handled", room_id=reaction.room_id)

    async def _send(self, room_id: str, kind: str, content: Mapping[str, Any], transaction: str) -> str:
        if not self.can_speak(room_id):
            raise DependencyFailed("matrix", "not_resident")
        in_room = self._rooms.get(room_id) or RateLimit(self._clock, ROOM_BURST, ROOM_RATE)
        self._rooms[room_id] = in_room
        if not in_room.take() or not self._all.take():
            self._metrics.notices.labels("rate_limited").inc()
            raise DependencyFailed("matrix", "rate_limited")
        try:
            event_id = await self._client.send(room_id, kind, content, transaction)
        except DependencyFailed:
            self._metrics.notices.labels("failed").inc()
            raise
        self._metrics.notices.labels("sent").inc()
        return event_id


def _shown(text: str) -> str:
    """The text without characters that hide or reorder others: user IDs of other homeservers may hold any."""
    shown = "".join(each if each.isprintable() or each == "\n" else "\N{REPLACEMENT CHARACTER}" for each in text)
    return shown if len(shown) <= LONGEST_NOTICE else f"{shown[:LONGEST_NOTICE]}…"
