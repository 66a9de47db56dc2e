# SPDX-License-Identifier: Apache-2.0
"""The state store: what must survive ``kill -9``.

In WAL mode with ``synchronous=NORMAL`` a commit is a write without an fsync. A process that is killed loses nothing
that was committed; a machine that loses its power may.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attrs import define, field
from twisted.internet.defer import Deferred

from lotusguard.guard.seats.rows import StateReader, StoredHold, StoredIdentity, StoredLobbyEntry
from lotusguard.guard.seats.statefile import StateUnusable, open_state_file
from lotusguard.guard.seats.writer import PATIENCE, BatchWriter
from lotusguard.metrics import Metrics

__all__ = [
    "PATIENCE",
    "StateStore",
    "StateUnusable",
    "StoredHold",
    "StoredIdentity",
    "StoredLobbyEntry",
    "open_state_store",
]

HEARTBEAT = 60.0
"""Seconds between two writes of ``last_alive``. Old rows are deleted in the same batch."""
GAP = 600.0
"""Seconds without a guard after which `StateStore.guarding_since` begins anew."""
ROWS_KEPT = {"aliases": 200_000, "identities": 1_000_000}
"""Rows that stay in the file; the oldest are deleted first."""
DELETED_AT_ONCE = 20_000
KEPT, PRESENT_KEPT = 30 * 86400.0, 7 * 86400.0
"""Seconds after which aliases and identities, and holds of people in a call, are deleted unless written again."""

_PUT_ALIAS = "INSERT OR REPLACE INTO aliases (alias, room_id, slot_id, seen) VALUES (?, ?, ?, ?)"
_PUT_IDENTITY = """INSERT OR REPLACE INTO identities (alias, identity, user, device, ceiling, withheld, seen)
    VALUES (?, ?, ?, ?, ?, ?, ?)"""
_PUT_HOLD = """INSERT OR REPLACE INTO holds (room_id, user, alias, identity, device, present, expires)
    VALUES (?, ?, ?, ?, ?, ?, ?)"""
_DROP_HOLD = "DELETE FROM holds WHERE room_id = ? AND alias = ? AND identity = ?"
_PUT_LOBBY = """INSERT OR REPLACE INTO lobby (room_id, user, id, state, began, expires, notice)
    VALUES (?, ?, ?, ?, ?, ?, ?)"""
_DROP_LOBBY = "DELETE FROM lobby WHERE room_id = ? AND user = ?"
_PUT_RESIDENCE = """INSERT OR REPLACE INTO residence (name, value)
    SELECT json_extract(row.value, '$[0]'), json_extract(row.value, '$[1]') FROM json_each(?) AS row"""
_DROP_RESIDENCE = "DELETE FROM residence WHERE value IS NULL"
_PUT_CLOCK = "INSERT OR REPLACE INTO clock (name, at) VALUES (?, ?)"
_DELETE_OLD = """DELETE FROM {table} WHERE rowid IN (SELECT rowid FROM {table} ORDER BY rowid LIMIT ?)
    AND (seen < ? OR rowid <= (SELECT max(rowid) FROM {table}) - ?)"""


def open_state_store(
    directory: Path, reactor: Any, metrics: Metrics, wall: Callable[[], float] = time.time
) -> StateStore:
    """Open the state directory, and create it if there is none.

    :param reactor: schedules, and takes the results of the writing thread. :param wall: seconds since the epoch.
    :raises StateUnusable: it cannot be read or written.
    """
    connection, path = open_state_file(directory, wall)
    try:
        return StateStore(connection, path, wall, reactor, metrics)
    except sqlite3.Error as error:
        connection.close()
        raise StateUnusable(f"{path}: {error}") from None


@define(eq=False)
class StateStore(StateReader):
    """Tables that are read once and then written behind: a write is on disk within a second; `put_hold` says when.

    :ivar guarding_since: since when, in seconds since the epoch, a guard has run on this directory without a gap of
        more than `GAP` seconds. Everybody who joined a call later got their token from a guard.
    :ivar last_run_ended: when the run before this one ended, or a minute before that if it was killed.
    """

    _reactor: Any = field(repr=False)
    _metrics: Metrics = field(repr=False)
    guarding_since: float = field(init=False)
    last_run_ended: float = field(init=False)
    _last_alive: float = field(init=False)
    _writer: BatchWriter = field(init=False, repr=False)
    _heartbeat: Any = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        now = self._last_alive = self._wall()
        times = self.times()
        self.last_run_ended = min(now, times.get("last_alive", now))
        unbroken = abs(now - times.get("last_alive", 0.0)) < GAP
        self.guarding_since = min(now, times.get("guarding_since", now)) if unbroken else now
        for name, at in (("guarding_since", self.guarding_since), ("last_alive", now)):
            self._connection.execute(_PUT_CLOCK, (name, at))
        self._writer = BatchWriter(self._connection, self._path, self._reactor, self._metrics)
        self._metrics.state_writes_pending.set_function(lambda: self.pending)
        self._metrics.state_bad_rows.set_function(lambda: self.bad_rows)
        self._heartbeat = self._reactor.callLater(HEARTBEAT, self._beat)

    @property
    def pending(self) -> int:
        """How many writes are not on disk yet."""
        return self._writer.pending

    @property
    def writable(self) -> bool:
        """Whether the last batch could be written."""
        return self._writer.writable

    # -- writing -------------------------------------------------------------------------------------------------

    def put_alias(self, alias: str, room_id: str, slot_id: str, seen: float) -> None:
        """An SFU room belongs to a slot. :param seen: seconds since the epoch."""
        self._writer.put(("aliases", alias), _PUT_ALIAS, (alias, room_id, slot_id, seen))

    def put_identity(
        self, alias: str, identity: str, user: str, device: str, ceiling: int | None, withheld: int, seen: float
    ) -> None:
        """See `StoredIdentity`. :param seen: seconds since the epoch."""
        values = (alias, identity, user, device, ceiling, withheld, seen)
        self._writer.put(("identities", alias, identity), _PUT_IDENTITY, values)

    def put_hold(self, hold: StoredHold) -> Deferred[bool]:
        """Write a hold at once.

        :return: fires when it is on disk, with whether it could be written; after `PATIENCE` with ``False``, although
            it will still be written.
        """
        return self._writer.put_now(_key(hold), _PUT_HOLD, _values(hold))

    def put_hold_later(self, hold: StoredHold) -> None:
        """Write a hold with the next batch."""
        self._writer.put(_key(hold), _PUT_HOLD, _values(hold))

    def drop_hold(self, room_id: str, alias: str, identity: str) -> None:
        """A hold has ended."""
        self._writer.put(("holds", room_id, alias, identity), _DROP_HOLD, (room_id, alias, identity))

    def put_lobby_entry(self, entry: StoredLobbyEntry) -> None:
        """Write a lobby entry at once, without waiting for it."""
        values = (
            entry.room_id, entry.user, entry.id, entry.state, float(entry.began), float(entry.expires), entry.notice
        )  # fmt: skip
        self._writer.put_now(("lobby", entry.room_id, entry.user), _PUT_LOBBY, values)

    def drop_lobby_entry(self, room_id: str, user: str) -> None:
        """A lobby entry has ended."""
        self._writer.put(("lobby", room_id, user), _DROP_LOBBY, (room_id, user))

    def put_residence(self, rows: Mapping[str, str | None]) -> Deferred[bool]:
        """Write what is known by being in rooms: all of these rows or none.

        A newer call replaces one that is not on disk yet, so its rows must include those of the older one.

        :param rows: values by name; ``None`` deletes. :return: as `put_hold`.
        """
        statement = json.dumps(list(rows.items()))
        return self._writer.put_now(("residence",), _PUT_RESIDENCE, (statement,))

    async def close(self) -> None:
        """Write what is left, as far as it can be written, and close the file. Ends although the disk hangs."""
        if self._heartbeat.active():
            self._heartbeat.cancel()
        self._put_clock("last_alive", self._wall())
        await self._writer.close()

    def _beat(self) -> None:
        now = self._wall()
        if now - self._last_alive > GAP:  # the machine was suspended
            self.guarding_since = now
            self._put_clock("guarding_since", now)
        self._last_alive = now
        self._put_clock("last_alive", now)
        self._writer.clean_up(
            [
                (_DROP_RESIDENCE, ()),
                ("DELETE FROM holds WHERE present = 0 AND expires < ?", (now,)),
                ("DELETE FROM holds WHERE present = 1 AND expires < ?", (now - PRESENT_KEPT,)),
                ("DELETE FROM lobby WHERE expires < ?", (now,)),
                *(
                    (_DELETE_OLD.format(table=table), (DELETED_AT_ONCE, now - KEPT, kept))
                    for table, kept in ROWS_KEPT.items()
                ),
            ]
        )
        self._heartbeat = self._reactor.callLater(HEARTBEAT, self._beat)

    def _put_clock(self, name: str, at: float) -> None:
        self._writer.put(("clock", name), _PUT_CLOCK, (name, at))


def _key(hold: StoredHold) -> tuple[str, ...]:
    return ("holds", hold.room_id, hold.alias, hold.identity)


def _values(hold: StoredHold) -> tuple[object, ...]:
    expires = float(hold.expires)
    return (hold.room_id, hold.user, hold.alias, hold.identity, hold.device, int(hold.present), expires)
