# SPDX-License-Identifier: Apache-2.0
"""The state directory: an SQLite file, written behind by one thread, for what must survive ``kill -9``. Floor: guard.

Batches commit as fast as the disk takes them: while one is being written the next gathers. In WAL mode with
``synchronous=NORMAL`` a commit is a write without an fsync, which a killed process does not lose.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool

from lotusguard.clients.waiting import tell
from lotusguard.metrics import Metrics

log = Logger()

WRITE_BEHIND = 0.2
"""Seconds in which what nobody waits for gathers."""
PATIENCE = 0.25
"""Seconds that a batch may take before nobody waits for the disk any more. Longer would put a sick one in the way."""
KEPT, TAKEN_KEPT = 30 * 86400.0, 2 * 86400.0
"""Seconds after which what nobody asked for any more is forgotten."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS aliases (
    alias TEXT PRIMARY KEY, room_id TEXT NOT NULL, slot_id TEXT NOT NULL, seen REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS identities (
    alias TEXT NOT NULL, identity TEXT NOT NULL, user TEXT NOT NULL, seen REAL NOT NULL, PRIMARY KEY (alias, identity)
);
CREATE TABLE IF NOT EXISTS promises (
    room_id TEXT NOT NULL, user TEXT NOT NULL, expires REAL NOT NULL, PRIMARY KEY (room_id, user)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS taken (
    alias TEXT NOT NULL, sid TEXT NOT NULL, sources TEXT NOT NULL, seen REAL NOT NULL, PRIMARY KEY (alias, sid)
);
"""
_PROMISE = "INSERT INTO promises VALUES (?, ?, ?) ON CONFLICT (room_id, user) DO UPDATE SET expires = excluded.expires"
_VERSION = 1


class StateUnusable(Exception):
    """The state directory cannot be used. The text is one line and names it."""


def open_state_store(directory: Path, reactor: Any, metrics: Metrics) -> Store:
    """Open the state directory; a corrupt file in it is set aside.

    :raises StateUnusable: it cannot be written.
    """
    path = directory / "lotusguard.sqlite3"
    for attempt in (1, 2):
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            return Store(_connected(path), path, reactor, metrics)
        except sqlite3.DatabaseError as error:
            corrupt = not isinstance(error, sqlite3.OperationalError)
            if not corrupt or attempt == 2:
                raise StateUnusable(f"{path}: {error}") from None
            _set_aside(path)
        except OSError as error:
            raise StateUnusable(f"{path}: {error.strerror}") from None
    raise AssertionError


def _set_aside(path: Path) -> None:
    aside = path.with_name(f"{path.name}.corrupt-{int(time.time())}")
    try:
        path.rename(aside)
        for rest in ("-wal", "-shm"):
            path.with_name(path.name + rest).unlink(missing_ok=True)
    except OSError as error:
        raise StateUnusable(f"{path} is corrupt and cannot be set aside: {error.strerror}") from None
    log.error("{path} is corrupt; it was set aside as {aside}", path=path, aside=aside, event_name="state_corrupt")


def _connected(path: Path) -> sqlite3.Connection:
    # check_same_thread: opened and read here, later only the writing thread uses it
    connection = sqlite3.connect(path, timeout=2.0, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        if connection.execute("PRAGMA quick_check").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("quick_check failed")
        connection.executescript(_SCHEMA)
        connection.execute(f"PRAGMA user_version={_VERSION}")
        path.chmod(0o600)
    except BaseException:
        connection.close()
        raise
    return connection


class Store:
    """Write-behind tables. What is put is on disk within a second; `put_promise` tells when."""

    def __init__(self, connection: sqlite3.Connection, path: Path, reactor: Any, metrics: Metrics) -> None:
        self._connection = connection
        self._path = path
        self._reactor = reactor
        self._writes = metrics.state_writes
        self._pool = ThreadPool(1, 1, "lotusguard-store")
        self._pool.start()
        self._queue: list[tuple[str, tuple[object, ...]]] = []
        self._waiting: list[Deferred[bool]] = []
        self._later: Any = None
        self._writing: Deferred[None] | None = None
        self._late = False
        """Whether the batch that is being written has taken too long."""
        self._emptied: Deferred[None] | None = None
        self._pruned = 0.0
        self.writable = True
        """Whether the last batch could be written."""

    def aliases(self, most: int) -> Iterator[tuple[str, str, str]]:
        """Alias, room and slot, the latest last."""
        query = "SELECT alias, room_id, slot_id FROM (SELECT * FROM aliases ORDER BY seen DESC LIMIT ?) ORDER BY seen"
        return iter(self._connection.execute(query, (most,)))

    def identities(self, most: int) -> Iterator[tuple[str, str, str]]:
        """Alias, identity and user, the latest last."""
        query = "SELECT alias, identity, user FROM (SELECT * FROM identities ORDER BY seen DESC LIMIT ?) ORDER BY seen"
        return iter(self._connection.execute(query, (most,)))

    def promises(self, now: float) -> list[tuple[str, str, float]]:
        """Room, user and expiry (seconds since the epoch) of the seats that are promised still."""
        return self._connection.execute(
            "SELECT room_id, user, expires FROM promises WHERE expires > ?", (now,)
        ).fetchall()

    def taken(self) -> list[tuple[str, str, list[int]]]:
        """Alias and sid of participants, and the numbers of the sources taken from them."""
        rows = self._connection.execute("SELECT alias, sid, sources FROM taken ORDER BY seen")
        return [(alias, sid, [int(number) for number in sources.split(",")]) for alias, sid, sources in rows]

    def put_alias(self, alias: str, room_id: str, slot_id: str, now: float) -> None:
        self._put("INSERT OR REPLACE INTO aliases VALUES (?, ?, ?, ?)", (alias, room_id, slot_id, now))

    def put_identity(self, alias: str, identity: str, user: str, now: float) -> None:
        self._put("INSERT OR REPLACE INTO identities VALUES (?, ?, ?, ?)", (alias, identity, user, now))

    def put_taken(self, alias: str, sid: str, sources: Sequence[int], now: float) -> None:
        if sources:
            text = ",".join(str(int(source)) for source in sources)
            self._put("INSERT OR REPLACE INTO taken VALUES (?, ?, ?, ?)", (alias, sid, text, now))
        else:
            self._put("DELETE FROM taken WHERE alias = ? AND sid = ?", (alias, sid))

    def put_promise(self, room_id: str, user: str, expires: float) -> Deferred[bool]:
        """A seat is promised.

        :return: fires when that is on disk, with whether it could be written; after `PATIENCE` with ``False``, although
            it may still be.
        """
        written: Deferred[bool] = Deferred()
        if self._late:
            written.callback(False)
        else:
            self._waiting.append(written)
        self._queue.append((_PROMISE, (room_id, user, expires)))
        self._write_now()
        return written

    def drop_promise(self, room_id: str, user: str) -> None:
        """A promise has been kept, or taken back."""
        self._put("DELETE FROM promises WHERE room_id = ? AND user = ?", (room_id, user))

    async def close(self) -> None:
        """Write what is left and close the file."""
        self._write_now()
        if self._writing is not None:
            self._emptied = Deferred()
            await self._emptied
        self._pool.stop()
        self._connection.close()

    def _put(self, statement: str, values: tuple[object, ...]) -> None:
        self._queue.append((statement, values))
        if self._writing is None and self._later is None:
            self._later = self._reactor.callLater(WRITE_BEHIND, self._write_now)

    def _write_now(self) -> None:
        if self._writing is not None or not self._queue:
            return
        if self._later is not None:
            if self._later.active():
                self._later.cancel()
            self._later = None
        batch, self._queue = self._queue, []
        waiting, self._waiting = self._waiting, []
        now = self._reactor.seconds()
        prune, self._pruned = now - self._pruned > 60, now if now - self._pruned > 60 else self._pruned

        def too_long() -> None:
            self._late = True
            tell(waiting, False)
            tell(self._waiting, False)

        def finished(outcome: object) -> None:
            self._writing = None
            self._late = False
            if waited.active():
                waited.cancel()
            written = not isinstance(outcome, Failure)
            self._writes.labels("ok" if written else "failed").inc()
            if written != self.writable:
                self.writable = written
                (log.info if written else log.error)(
                    "{path} can{no} be written: {reason}",
                    path=self._path, no="" if written else "not",
                    reason=outcome.getErrorMessage() if isinstance(outcome, Failure) else "well again",
                    event_name="state_writable",
                )  # fmt: skip
            tell(waiting, written)
            self._write_now()
            if self._writing is None and self._emptied is not None:
                self._emptied.callback(None)

        waited = self._reactor.callLater(PATIENCE, too_long)
        self._writing = deferToThreadPool(self._reactor, self._pool, self._write, batch, now if prune else None)
        self._writing.addBoth(finished)

    def _write(self, batch: list[tuple[str, tuple[object, ...]]], prune_at: float | None) -> None:
        """In the writing thread."""
        cursor = self._connection.cursor()
        cursor.execute("BEGIN IMMEDIATE")
        try:
            for statement, values in batch:
                cursor.execute(statement, values)
            if prune_at is not None:
                cursor.execute("DELETE FROM promises WHERE expires < ?", (prune_at,))
                cursor.execute("DELETE FROM identities WHERE seen < ?", (prune_at - KEPT,))
                cursor.execute("DELETE FROM aliases WHERE seen < ?", (prune_at - KEPT,))
                cursor.execute("DELETE FROM taken WHERE seen < ?", (prune_at - TAKEN_KEPT,))
            cursor.execute("COMMIT")
        except BaseException:
            cursor.execute("ROLLBACK")
            raise
