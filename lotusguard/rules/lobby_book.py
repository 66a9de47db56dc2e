# SPDX-License-Identifier: Apache-2.0
"""The lobby entries of all rooms, by the table in `lotusguard.rules.lobby`. Waiting is bounded per room, per user, per
homeserver and in all, so that nobody can fill the lobbies of others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice, takewhile

from attrs import define, field, frozen

from lotusguard.rules.identity import server_of
from lotusguard.rules.lobby import BEGINS, DROPPED_FIRST, TABLE, LobbyEntry, LobbyEvent, LobbyState

WAITING_PER_ROOM = 100
WAITING_PER_USER = 16
"""Rooms in which one user may wait at the same time."""
WAITING_IN_ALL = 5_000
WAITING_FOR_OTHER_SERVERS = 2_500
"""While so many people wait in all, only users of our own homeserver begin to. Of any other homeserver, no more begin
than are left of this number then, however many of its rooms and users there are: none can take the places of all."""
ENTRIES_KEPT = 50_000
"""Entries in any state. Beyond it some are dropped, in the order of `DROPPED_FIRST`; of one state those that expire
first."""
DROPPED_AT_ONCE = 500
HELD_PER_USER = 16
"""Requests that are held for one user of one room."""


@frozen
class Change:
    """What an event did.

    :ivar event: ``None`` if this guard has only learnt what another one knows.
    :ivar before: the entry's state; ``None`` if it is new. :ivar after: likewise; ``None`` if it has ended.
    """

    room_id: str
    entry: LobbyEntry
    event: LobbyEvent | None
    before: LobbyState | None
    after: LobbyState | None


@frozen
class Answer:
    """What became of an event.

    :ivar applied: whether the entry's state lists the event, or the event began an entry.
    :ivar entry: the user's entry after it; ``None`` if there is none.
    :ivar full: whether the user may not wait, because too many people do.
    """

    applied: bool
    entry: LobbyEntry | None
    full: bool = False


@define(eq=False)
class LobbyBook:
    """Who waits in which room, and what was decided. All times are seconds on one clock.

    :param longest_wait: seconds that anybody may wait.
    :ivar changes: what has happened and nobody has taken yet; see `take_changes`.
    :ivar _states: the entries of each state, by room and user. Those of one state last equally long, so they expire in
        the order in which they were changed, and nothing has to look at all of them. (Entries that other guards changed
        may be out of order. They are found out to have expired when somebody asks.)
    """

    longest_wait: float
    changes: list[Change] = field(factory=list, init=False)
    _rooms: dict[str, dict[str, LobbyEntry]] = field(factory=dict, init=False)
    _states: dict[LobbyState, dict[tuple[str, str], LobbyEntry]] = field(
        factory=lambda: {state: {} for state in LobbyState}, init=False
    )
    _waiting: Counter[tuple[str, str]] = field(factory=Counter, init=False)

    @property
    def waiting_in_all(self) -> int:
        return len(self._states[LobbyState.WAITING])

    # -- events ------------------------------------------------------------------------------------------

    def happen(
        self, event: LobbyEvent, room_id: str, user: str, entry_id: str, now: float, *, local: bool = False
    ) -> Answer:
        """Something happens to a user's entry, or begins one. Asking never changes a decision.

        :param entry_id: the name of the entry, if it is a new one.
        :param local: whether the user is known to be one of our own homeserver's.
        """
        entry = self.find(room_id, user, now)
        begins = BEGINS.get(event)
        if entry is None and begins is None:
            return Answer(applied=False, entry=None)
        if entry is None:
            assert begins is not None
            if begins is LobbyState.WAITING and self._is_full(room_id, user, local=local):
                return Answer(applied=False, entry=None, full=True)
            return Answer(applied=True, entry=self._begin(room_id, user, entry_id, begins, event, now))
        applied = self._apply(room_id, entry, event, now)
        full = event is LobbyEvent.ASK and entry.held >= HELD_PER_USER
        return Answer(applied, self._rooms.get(room_id, {}).get(user), full)

    def happen_in_room(self, event: LobbyEvent, room_id: str, now: float) -> None:
        """Something happens to all entries of a room."""
        for entry in list(self._rooms.get(room_id, {}).values()):
            self._apply(room_id, entry, event, now)

    def pass_time(self, now: float) -> None:
        """Do what time does to all entries."""
        for room_id, entry in self.waiting():
            if entry.due(now, self.longest_wait) is not None:
                self.find(room_id, entry.user, now)
        for state in DROPPED_FIRST:
            expired = takewhile(lambda one: now >= one[1].expires, self._states[state].items())
            for (room_id, user), _ in list(expired):
                self.find(room_id, user, now)

    def take_changes(self) -> list[Change]:
        """What has happened since this was called last."""
        changes, self.changes = self.changes, []
        return changes

    # -- questions ---------------------------------------------------------------------------------------

    def get(self, room_id: str, user: str) -> LobbyEntry | None:
        """A user's entry as it was when something last happened to it."""
        return self._rooms.get(room_id, {}).get(user)

    def find(self, room_id: str, user: str, now: float) -> LobbyEntry | None:
        """A user's entry, as it is at this time."""
        entry = self.get(room_id, user)
        while entry is not None and (event := entry.due(now, self.longest_wait)) is not None:
            self._apply(room_id, entry, event, now)
            entry = self.get(room_id, user)
        return entry

    def entries(self) -> Iterator[tuple[str, LobbyEntry]]:
        """All entries with their rooms."""
        return ((room_id, entry) for room_id, entries in self._rooms.items() for entry in entries.values())

    def waiting(self) -> list[tuple[str, LobbyEntry]]:
        """The entries that wait, with their rooms."""
        return [(room_id, entry) for (room_id, _), entry in self._states[LobbyState.WAITING].items()]

    def entries_in(self, room_id: str) -> list[LobbyEntry]:
        """The entries of one room."""
        return list(self._rooms.get(room_id, {}).values())

    def waiting_in(self, room_id: str) -> list[str]:
        """Users who wait in one room."""
        return [entry.user for entry in self.entries_in(room_id) if entry.state is LobbyState.WAITING]

    def has_removed(self, room_id: str) -> bool:
        """Whether anybody is kept out of this room's call because a moderator removed them."""
        return any(entry.state is LobbyState.REMOVED for entry in self._rooms.get(room_id, {}).values())

    def rooms_with(self, state: LobbyState) -> list[str]:
        """The rooms that have entries in this state."""
        return list(dict.fromkeys(room_id for room_id, _ in self._states[state]))

    # -- entries that are kept elsewhere too -------------------------------------------------------------

    def restore(self, room_id: str, entry: LobbyEntry) -> None:
        """Put an entry of an earlier run back, unless it is over the limits."""
        if self._count() < ENTRIES_KEPT:
            self._put(room_id, entry)

    def learn(self, room_id: str, told: LobbyEntry, event: LobbyEvent | None) -> Change:
        """Take over an entry as others know it."""
        entry = self.get(room_id, told.user)
        before = entry.state if entry is not None else None
        if entry is None:
            self._put(room_id, told)
            entry = told
        else:
            self._move(room_id, entry, told.state)
            entry.id, entry.notice, entry.version = told.id, told.notice, told.version
            entry.began, entry.expires = told.began, told.expires
        return Change(room_id, entry, event, before, told.state)

    def learn_end(self, room_id: str, user: str, event: LobbyEvent | None) -> Change | None:
        """Others know that an entry has ended."""
        entry = self.get(room_id, user)
        if entry is None:
            return None
        self._discard(room_id, entry)
        return Change(room_id, entry, event, entry.state, None)

    # -- how it is done ----------------------------------------------------------------------------------

    def _apply(self, room_id: str, entry: LobbyEntry, event: LobbyEvent, now: float) -> bool:
        if event not in entry.rules.moves:
            return False
        before, after = entry.state, entry.rules.moves[event]
        if after is None:
            self._discard(room_id, entry)
        else:
            self._move(room_id, entry, after)
            if after is not before:
                entry.began = now
            entry.expires = now + TABLE[after].lifetime
        if after is not before or event is LobbyEvent.REMOVE:
            self.changes.append(Change(room_id, entry, event, before, after))
        return True

    def _is_full(self, room_id: str, user: str, *, local: bool) -> bool:
        waiting, in_all = self._waiting, self.waiting_in_all
        if waiting["room", room_id] >= WAITING_PER_ROOM or waiting["user", user] >= WAITING_PER_USER:
            return True
        if local:
            return in_all >= WAITING_IN_ALL
        return waiting["server", server_of(user)] >= WAITING_FOR_OTHER_SERVERS - in_all

    def _begin(
        self, room_id: str, user: str, entry_id: str, state: LobbyState, event: LobbyEvent, now: float
    ) -> LobbyEntry:
        if self._count() >= ENTRIES_KEPT:
            self._drop_some()
        entry = LobbyEntry(entry_id, user, state, now, now + TABLE[state].lifetime)
        self._put(room_id, entry)
        self.changes.append(Change(room_id, entry, event, None, state))
        return entry

    def _put(self, room_id: str, entry: LobbyEntry) -> None:
        self._rooms.setdefault(room_id, {})[entry.user] = entry
        self._states[entry.state][room_id, entry.user] = entry
        if entry.state is LobbyState.WAITING:
            self._count_waiting(room_id, entry.user, 1)

    def _discard(self, room_id: str, entry: LobbyEntry) -> None:
        entries = self._rooms[room_id]
        del entries[entry.user]
        if not entries:
            del self._rooms[room_id]
        del self._states[entry.state][room_id, entry.user]
        if entry.state is LobbyState.WAITING:
            self._count_waiting(room_id, entry.user, -1)

    def _move(self, room_id: str, entry: LobbyEntry, after: LobbyState) -> None:
        """The entry is the last one to expire in its state now."""
        difference = (after is LobbyState.WAITING) - (entry.state is LobbyState.WAITING)
        del self._states[entry.state][room_id, entry.user]
        entry.state = after
        self._states[after][room_id, entry.user] = entry
        self._count_waiting(room_id, entry.user, difference)

    def _count(self) -> int:
        return sum(map(len, self._states.values()))

    def _count_waiting(self, room_id: str, user: str, difference: int) -> None:
        for counted in (("room", room_id), ("user", user), ("server", server_of(user))):
            self._waiting[counted] += difference
            if not self._waiting[counted]:
                del self._waiting[counted]

    def _drop_some(self) -> None:
        others = (
            (room_id, entry)
            for state in DROPPED_FIRST
            for (room_id, _), entry in sorted(self._states[state].items(), key=lambda one: one[1].expires)
        )
        for room_id, entry in list(islice(others, DROPPED_AT_ONCE)):
            self._discard(room_id, entry)
            self.changes.append(Change(room_id, entry, LobbyEvent.EXPIRE, entry.state, None))
