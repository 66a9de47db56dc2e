# SPDX-License-Identifier: Apache-2.0
"""The rows of the state store, and how they are read at the start."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from attrs import define, field, frozen
from twisted.logger import Logger

log = Logger()

HOLDS_READ = 200_000
LOBBY_READ = 50_000
_ALIASES = """SELECT alias, room_id, slot_id FROM
    (SELECT rowid AS written, * FROM aliases ORDER BY rowid DESC LIMIT ?) ORDER BY written"""
_IDENTITIES = """SELECT alias, identity, user, device, ceiling, withheld FROM
    (SELECT rowid AS written, * FROM identities ORDER BY rowid DESC LIMIT ?) ORDER BY written"""
_HOLDS = """SELECT room_id, user, alias, identity, device, present, expires FROM holds
    WHERE present = 1 OR expires > ? ORDER BY expires DESC LIMIT ?"""
_ALIASES_IN_USE = """SELECT alias, room_id, slot_id FROM aliases
    WHERE alias IN (SELECT alias FROM holds WHERE present = 1) LIMIT ?"""
_IDENTITIES_IN_USE = """SELECT i.alias, i.identity, i.user, i.device, i.ceiling, i.withheld
    FROM holds AS h JOIN identities AS i ON i.alias = h.alias AND i.identity = h.identity
    WHERE h.present = 1 LIMIT ?"""
_LOBBY = """SELECT room_id, user, id, state, began, expires, notice FROM lobby
    WHERE expires > ? ORDER BY expires DESC LIMIT ?"""


@frozen
class StoredHold:
    """A seat that is held for a user.

    :ivar alias: the SFU room of the issued token. It is empty in holds from version 1 of the file, whose ``identity``
        is the user.
    :ivar present: the user has arrived. Such a hold is kept until they leave, so that a restart knows who had a seat.
    :ivar expires: seconds since the epoch.
    """

    room_id: str
    user: str
    alias: str
    identity: str
    device: str
    present: bool
    expires: float


@frozen
class StoredIdentity:
    """An identity for which a token was issued.

    :ivar ceiling: what upstream granted, as a bit mask of source numbers; ``None`` if it is not known.
    :ivar withheld: what the guard keeps back of it, as a bit mask.
    """

    alias: str
    identity: str
    user: str
    device: str
    ceiling: int | None
    withheld: int


@frozen
class StoredLobbyEntry:
    """An entry in a room's lobby; see `lotusguard.rules.lobby.LobbyEntry`. Times are seconds since the epoch."""

    room_id: str
    user: str
    id: str
    state: str
    began: float
    expires: float
    notice: str


@define(eq=False)
class StateReader:
    """Reads the tables, before the first write.

    :ivar bad_rows: rows that could not be read and were skipped.
    """

    _connection: sqlite3.Connection = field(repr=False)
    _path: Path
    _wall: Callable[[], float] = field(repr=False)
    bad_rows: int = field(init=False, default=0)

    def aliases(self, limit: int) -> Iterator[tuple[str, str, str]]:
        """Alias, room and slot, the latest last."""
        return self._aliases(_ALIASES, limit)

    def aliases_in_use(self, limit: int) -> Iterator[tuple[str, str, str]]:
        """The same of SFU rooms with somebody in the call."""
        return self._aliases(_ALIASES_IN_USE, limit)

    def _aliases(self, query: str, limit: int) -> Iterator[tuple[str, str, str]]:
        return ((alias, room, slot) for alias, room, slot in self._rows(query, (limit,), str, str, str))

    def identities(self, limit: int) -> Iterator[StoredIdentity]:
        """Identities with what is known about them, the latest last."""
        return self._identities(_IDENTITIES, limit)

    def identities_in_use(self, limit: int) -> Iterator[StoredIdentity]:
        """The same of people in a call."""
        return self._identities(_IDENTITIES_IN_USE, limit)

    def _identities(self, query: str, limit: int) -> Iterator[StoredIdentity]:
        rows = self._rows(query, (limit,), str, str, str, str, (int, type(None)), int)
        return (StoredIdentity(*row) for row in rows)

    def holds(self) -> list[StoredHold]:
        """The holds of people in a call, and those that have not expired."""
        rows = self._rows(_HOLDS, (self._wall(), HOLDS_READ), str, str, str, str, str, int, float)
        return [
            StoredHold(room_id, user, alias, identity, device, bool(present), expires)
            for room_id, user, alias, identity, device, present, expires in rows
        ]

    def lobby_entries(self) -> list[StoredLobbyEntry]:
        """The lobby entries that have not expired."""
        rows = self._rows(_LOBBY, (self._wall(), LOBBY_READ), str, str, str, str, float, float, str)
        return [StoredLobbyEntry(*row) for row in rows]

    def residence(self) -> dict[str, str]:
        """What `put_residence` wrote: values by name."""
        return dict(self._rows("SELECT name, value FROM residence WHERE value IS NOT NULL", (), str, str))

    def times(self) -> dict[str, float]:
        """What was written about the guard's own life, in seconds since the epoch."""
        return dict(self._rows("SELECT name, at FROM clock", (), str, float))

    def _rows(self, query: str, values: tuple[object, ...], *types: Any) -> Iterator[tuple[Any, ...]]:
        """The rows whose values have these types. Others are counted, and the rest of a damaged table counts as one."""
        try:
            for row in self._connection.execute(query, values):
                try:
                    decoded = tuple(value.decode() if isinstance(value, bytes) else value for value in row)
                except UnicodeDecodeError:
                    self.bad_rows += 1
                    continue
                if all(map(isinstance, decoded, types)):
                    yield decoded
                else:
                    self.bad_rows += 1
        except sqlite3.DatabaseError as error:
            self.bad_rows += 1
            log.error("{path} is damaged, not all of it was read: {reason}",
                      path=str(self._path), reason=str(error), event_name="state_damaged")  # fmt: skip
