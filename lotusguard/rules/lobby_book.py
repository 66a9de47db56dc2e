# SPDX-License-Identifier: Apache-2.0
"""The lobby entries of all rooms. It reads `lotusguard.rules.lobby.TABLE`, and is bounded per room and in all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from attrs import define, field, frozen

from lotusguard.rules.lobby import TABLE, LobbyEntry, LobbyEvent, LobbyState
from lotusguard.rules.refusals import Refusal

WAITING_PER_ROOM = 100
WAITING_IN_ALL = 5_000
ENTRIES_KEPT = 50_000
"""Entries in any state. Beyond it those that expire first are dropped, but for those that wait."""
DROPPED_AT_ONCE = 500
HELD_PER_USER = 16
"""Requests that are held for one user of one room."""


@frozen
class Change:
    """What an event did.

    :ivar before: the entry's state; ``None`` if it is new. :ivar after: likewise; ``None`` if it has ended.
    """

    room_id: str
    entry: LobbyEntry
    event: LobbyEvent
    before: LobbyState | None
    after: LobbyState | None


@define(eq=False)
class LobbyBook:
    """Who waits in which room, and what was decided. All times are seconds on one clock.

    :param longest_wait: seconds that anybody may wait.
    :ivar changes: what has happened and nobody has taken yet; see `take_changes`.
    """

    _longest_wait: float
    changes: list[Change] = field(factory=list, init=False)
    _rooms: dict[str, dict[str, LobbyEntry]] = field(factory=dict, init=False)
    _waiting: Counter[str] = field(factory=Counter, init=False)
    _waiting_in_all: int = field(default=0, init=False)
    _entries: int = field(default=0, init=False)

    @property
    def waiting_in_all(self) -> int:
        return self._waiting_in_all

    def restore(self, room_id: str, entry: LobbyEntry) -> None:
        """Put an entry of an earlier run back, unless it is over the limits."""
        if self._entries < ENTRIES_KEPT:
            self._put(room_id, entry)

    def find(self, room_id: str, user: str, now: float) -> LobbyEntry | None:
        """A user's entry, as it is at this time."""
        entry = self._rooms.get(room_id, {}).get(user)
        while entry is not None and (event := entry.due(now, self._longest_wait)) is not None:
            self.apply(room_id, user, event, now)
            entry = self._rooms.get(room_id, {}).get(user)
        return entry

    def ask(self, room_id: str, user: str, entry_id: str, now: float) -> LobbyEntry | Refusal:
        """A user asks for entry. Asking never changes a decision.

        :param entry_id: the name of the entry, if it is a new one.
        :return: the user's entry, or `Refusal.LOBBY_FULL`.
        """
        entry = self.find(room_id, user, now)
        if entry is not None:
            self.apply(room_id, user, LobbyEvent.ASK, now)
            return entry if entry.held < HELD_PER_USER else Refusal.LOBBY_FULL
        if self._waiting[room_id] >= WAITING_PER_ROOM or self._waiting_in_all >= WAITING_IN_ALL:
            return Refusal.LOBBY_FULL
        return self._add(room_id, user, entry_id, LobbyState.WAITING, LobbyEvent.ASK, now)

    def apply(self, room_id: str, user: str, event: LobbyEvent, now: float) -> bool:
        """Something happens to an entry that exists. :return: whether the entry's state lists this event."""
        entry = self._rooms.get(room_id, {}).get(user)
        if entry is None or event not in entry.rules.moves:
            return False
        before, after = entry.state, entry.rules.moves[event]
        if after is None:
            self._discard(room_id, entry)
        else:
            self._count(room_id, before, after)
            entry.state = after
            if after is not before:
                entry.began = now
            entry.expires = now + TABLE[after].lifetime
        if after is not before or event is LobbyEvent.REMOVE:
            self.changes.append(Change(room_id, entry, event, before, after))
        return True

    def decide(self, room_id: str, user: str, event: LobbyEvent, now: float) -> bool:
        """A moderator decides. :return: ``False`` if there is nothing to decide about this user."""
        return self.find(room_id, user, now) is not None and self.apply(room_id, user, event, now)

    def let_in(self, room_id: str, user: str, entry_id: str, now: float) -> bool:
        """A user needs no decision. :return: ``False`` if a moderator removed them."""
        if self.find(room_id, user, now) is None:
            self._add(room_id, user, entry_id, LobbyState.ACCEPTED, LobbyEvent.LET_IN, now)
            return True
        return self.apply(room_id, user, LobbyEvent.LET_IN, now)

    def remove(self, room_id: str, user: str, entry_id: str, now: float) -> None:
        """A moderator removed a user from the call."""
        if self.find(room_id, user, now) is None:
            self._add(room_id, user, entry_id, LobbyState.REMOVED, LobbyEvent.REMOVE, now)
        else:
            self.apply(room_id, user, LobbyEvent.REMOVE, now)

    def apply_to_room(self, room_id: str, event: LobbyEvent, now: float) -> None:
        """Something happens to all entries of a room."""
        for user in list(self._rooms.get(room_id, {})):
            self.apply(room_id, user, event, now)

    def pass_time(self, now: float) -> None:
        """Do what time does to all entries."""
        for room_id, entry in list(self.entries()):
            if entry.due(now, self._longest_wait) is not None:
                self.find(room_id, entry.user, now)

    def entries(self) -> Iterator[tuple[str, LobbyEntry]]:
        """All entries with their rooms."""
        return ((room_id, entry) for room_id, entries in self._rooms.items() for entry in entries.values())

    def waiting_in(self, room_id: str) -> list[str]:
        """Users who wait in one room."""
        entries = self._rooms.get(room_id, {}).values()
        return [entry.user for entry in entries if entry.state is LobbyState.WAITING]

    def has_removed(self, room_id: str) -> bool:
        """Whether anybody is kept out of this room's call because a moderator removed them."""
        return any(entry.state is LobbyState.REMOVED for entry in self._rooms.get(room_id, {}).values())

    def rooms_with(self, state: LobbyState) -> list[str]:
        """The rooms that have entries in this state."""
        return [
            room_id
            for room_id, entries in self._rooms.items()
            if any(entry.state is state for entry in entries.values())
        ]

    def take_changes(self) -> list[Change]:
        """What has happened since this was called last."""
        changes, self.changes = self.changes, []
        return changes

    def _add(
        self, room_id: str, user: str, entry_id: str, state: LobbyState, event: LobbyEvent, now: float
    ) -> LobbyEntry:
        if self._entries >= ENTRIES_KEPT:
            self._drop_some()
        entry = LobbyEntry(entry_id, user, state, now, now + TABLE[state].lifetime)
        self._put(room_id, entry)
        self.changes.append(Change(room_id, entry, event, None, state))
        return entry

    def _put(self, room_id: str, entry: LobbyEntry) -> None:
        self._rooms.setdefault(room_id, {})[entry.user] = entry
        self._entries += 1
        self._count(room_id, None, entry.state)

    def _discard(self, room_id: str, entry: LobbyEntry) -> None:
        entries = self._rooms[room_id]
        del entries[entry.user]
        if not entries:
            del self._rooms[room_id]
        self._entries -= 1
        self._count(room_id, entry.state, None)

    def _count(self, room_id: str, before: LobbyState | None, after: LobbyState | None) -> None:
        difference = (after is LobbyState.WAITING) - (before is LobbyState.WAITING)
        if difference:
            self._waiting_in_all += difference
            self._waiting[room_id] += difference
            if not self._waiting[room_id]:
                del self._waiting[room_id]

    def _drop_some(self) -> None:
        others = [
            (entry.expires, room, entry) for room, entry in self.entries() if entry.state is not LobbyState.WAITING
        ]
        for _, room_id, entry in sorted(others, key=lambda other: other[0])[:DROPPED_AT_ONCE]:
            self._discard(room_id, entry)
            self.changes.append(Change(room_id, entry, LobbyEvent.EXPIRE, entry.state, None))
