# SPDX-License-Identifier: Apache-2.0
"""Where lobby entries are kept: in the memory of one guard and its state directory, or in Redis for several guards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from secrets import token_hex
from typing import Protocol

from attrs import define, field
from twisted.internet.interfaces import IReactorTime

from lotusguard.guard.seats.store import StateStore, StoredLobbyEntry
from lotusguard.rules.lobby import HELD_LEASE, TABLE, LobbyEntry, LobbyEvent, LobbyState
from lotusguard.rules.lobby_book import Answer, Change, LobbyBook

Held = Sequence[tuple[str, str]]
"""Rooms and users for whom this guard holds requests."""


class LobbyEntries(Protocol):
    """The lobby entries. Questions are answered from memory at once; an event may take a moment, and never fails.

    :ivar book: what this guard knows. Its ``changes`` are those that this guard caused.
    :ivar learnt: called with what other guards did.
    """

    @property
    def book(self) -> LobbyBook:
        """See above."""

    learnt: Callable[[Sequence[Change]], None]

    def state_of(self, room_id: str, user: str) -> LobbyState | None:
        """What this guard knows of a user in a room."""

    async def read(self, room_id: str, user: str) -> LobbyState | None:
        """The same, as it certainly is: before somebody is removed because of it."""

    async def happen(self, event: LobbyEvent, room_id: str, user: str, *, local: bool = False) -> Answer:
        """Something happens to a user's entry, or begins one.

        :param local: whether the user is known to be one of our own homeserver's.
        """

    async def happen_in_room(self, event: LobbyEvent, room_id: str) -> None:
        """Something happens to all entries of a room."""

    async def set_notice(self, room_id: str, entry: LobbyEntry, event_id: str) -> None:
        """A notice asks the room's moderators about an entry; "" if none does any more."""

    async def let_go(self, room_id: str, user: str) -> None:
        """This guard holds no request of the user any more."""

    async def pass_time(self, held: Held) -> None:
        """Do what time does. To be called every second."""

    def keep(self, change: Change) -> None:
        """Write a change of ``book.changes`` to disk."""

    def stop(self) -> None:
        """The guard stops: entries are left to the next guard."""


def nobody_learns(changes: Sequence[Change]) -> None:
    """The default of `LobbyEntries.learnt`."""


@define(eq=False)
class MemoryEntries:
    """The `LobbyEntries` of a guard that runs alone.

    :param wall: seconds since the epoch.
    :param longest_wait: seconds that anybody may wait.
    """

    _store: StateStore | None
    _clock: IReactorTime
    _wall: Callable[[], float]
    _longest_wait: float
    book: LobbyBook = field(init=False)
    learnt: Callable[[Sequence[Change]], None] = field(default=nobody_learns, init=False)
    _stopped: bool = field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self.book = LobbyBook(self._longest_wait)

    def load(self) -> None:
        """Take over the entries of an earlier run. People who waited stay in the lobby for a while without asking."""
        now, wall = self._clock.seconds(), self._wall()
        stored_entries = self._store.lobby_entries() if self._store is not None else []
        for stored in sorted(stored_entries, key=lambda one: one.expires):  # the book has them in this order
            try:
                state = LobbyState(stored.state)
            except ValueError:
                continue
            left = min(stored.expires - wall, TABLE[state].lifetime)
            if state is LobbyState.WAITING:
                left = HELD_LEASE
            began = now - max(0.0, wall - stored.began)
            entry = LobbyEntry(stored.id, stored.user, state, began, now + left, notice=stored.notice)
            self.book.restore(stored.room_id, entry)

    def state_of(self, room_id: str, user: str) -> LobbyState | None:
        entry = self.book.get(room_id, user)
        return entry.state_at(self._clock.seconds(), self._longest_wait) if entry is not None else None

    async def read(self, room_id: str, user: str) -> LobbyState | None:
        return self.state_of(room_id, user)

    async def happen(self, event: LobbyEvent, room_id: str, user: str, *, local: bool = False) -> Answer:
        return self.book.happen(event, room_id, user, token_hex(8), self._clock.seconds(), local=local)

    async def happen_in_room(self, event: LobbyEvent, room_id: str) -> None:
        self.book.happen_in_room(event, room_id, self._clock.seconds())

    async def set_notice(self, room_id: str, entry: LobbyEntry, event_id: str) -> None:
        entry.notice = event_id
        if self.book.get(room_id, entry.user) is entry:
            self._write(room_id, entry)

    async def let_go(self, room_id: str, user: str) -> None:
        entry = self.book.get(room_id, user)
        if entry is not None and entry.state is LobbyState.WAITING:
            entry.expires = self._clock.seconds() + entry.rules.lifetime

    async def pass_time(self, held: Held) -> None:
        if not self._stopped:
            self.book.pass_time(self._clock.seconds())

    def keep(self, change: Change) -> None:
        if change.after is not None:
            self._write(change.room_id, change.entry)
        elif self._store is not None and not self._stopped:  # then the next guard takes the entry over
            self._store.drop_lobby_entry(change.room_id, change.entry.user)

    def stop(self) -> None:
        self._stopped = True

    def _write(self, room_id: str, entry: LobbyEntry) -> None:
        if self._store is None:
            return
        ahead = self._wall() - self._clock.seconds()
        ends = entry.began + self._longest_wait if entry.state is LobbyState.WAITING else entry.expires
        self._store.put_lobby_entry(
            StoredLobbyEntry(
                room_id, entry.user, entry.id, entry.state.value, entry.began + ahead, ends + ahead, entry.notice
            )
        )
