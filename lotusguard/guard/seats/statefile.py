# SPDX-License-Identifier: Apache-2.0
"""Opens the SQLite file in the state directory: its permissions, its schema, and what to do with a file we cannot use.

The order of rowids is the order of writes, because ``INSERT OR REPLACE`` gives a row a new one. So the latest rows are
found, and the oldest deleted, without a scan and without an index on ``seen``.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from twisted.logger import Logger

log = Logger()

FILE_NAME = "lotusguard.sqlite3"
SCHEMA_VERSION = 2
LOCK_TIMEOUT = 2.0
"""Seconds that SQLite waits for a lock which another process holds."""
CHECK_TIMEOUT = 0.3
"""Seconds for SQLite's integrity check at the start. A large file is checked as far as it gets."""

LEAST_SPACE = 1 << 17
"""Free bytes that SQLite needs to open the file: 32 kB to share its index, and a few pages."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS aliases (
    alias TEXT PRIMARY KEY, room_id TEXT NOT NULL, slot_id TEXT NOT NULL, seen REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS identities (
    alias TEXT NOT NULL, identity TEXT NOT NULL, user TEXT NOT NULL, seen REAL NOT NULL,
    device TEXT NOT NULL DEFAULT '', ceiling INTEGER, withheld INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (alias, identity)
);
CREATE TABLE IF NOT EXISTS holds (
    room_id TEXT NOT NULL, alias TEXT NOT NULL, identity TEXT NOT NULL, user TEXT NOT NULL, device TEXT NOT NULL,
    present INTEGER NOT NULL, expires REAL NOT NULL, PRIMARY KEY (room_id, alias, identity)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS holds_by_expiry ON holds (present, expires);
CREATE TABLE IF NOT EXISTS lobby (
    room_id TEXT NOT NULL, user TEXT NOT NULL, id TEXT NOT NULL, state TEXT NOT NULL, began REAL NOT NULL,
    expires REAL NOT NULL, notice TEXT NOT NULL, PRIMARY KEY (room_id, user)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS residence (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS clock (name TEXT PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID;
"""
_NEW_COLUMNS = (
    "ALTER TABLE identities ADD COLUMN device TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE identities ADD COLUMN ceiling INTEGER",
    "ALTER TABLE identities ADD COLUMN withheld INTEGER NOT NULL DEFAULT 0",
)


class StateUnusable(Exception):
    """The state directory cannot be used. The text is one line and names the file."""


class _NewerVersion(sqlite3.DatabaseError):
    pass


def open_state_file(directory: Path, wall: Callable[[], float]) -> tuple[sqlite3.Connection, Path]:
    """Open the file, and create it if there is none. A corrupt one, or one of a newer release, is renamed first.

    :raises StateUnusable: it cannot be opened or written.
    """
    path = directory / FILE_NAME
    for last_attempt in (False, True):
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            return _connect(path), path
        except sqlite3.DatabaseError as error:
            if last_attempt or isinstance(error, sqlite3.OperationalError):
                raise StateUnusable(f"{path}: {error}{_cause(directory)}") from None
            _set_aside(path, error, wall)
        except OSError as error:
            raise StateUnusable(f"{path}: {error.strerror}") from None
    raise AssertionError


def _cause(directory: Path) -> str:
    """What SQLite does not say: a file that it cannot enlarge for lack of space is a "disk I/O error" to it."""
    try:
        free = shutil.disk_usage(directory).free
    except OSError:
        return ""
    return ", no space is left" if free < LEAST_SPACE else ""


def _set_aside(path: Path, error: sqlite3.DatabaseError, wall: Callable[[], float]) -> None:
    why = "newer" if isinstance(error, _NewerVersion) else "corrupt"
    aside = path.with_name(f"{path.name}.{why}-{int(wall())}")
    try:
        path.rename(aside)
        for suffix in ("-wal", "-shm"):
            beside = path.with_name(path.name + suffix)
            if beside.exists():
                beside.rename(aside.with_name(aside.name + suffix))
    except OSError as failed:
        raise StateUnusable(f"{path} cannot be used ({error}) nor set aside: {failed.strerror}") from None
    log.error(
        "{path} cannot be used and was set aside as {aside}: {reason}",
        path=str(path), aside=str(aside), reason=str(error), event_name="state_set_aside",
    )  # fmt: skip


def _connect(path: Path) -> sqlite3.Connection:
    make_private(path)
    # check_same_thread: opened and read here; later only the writing thread uses it.
    connection = sqlite3.connect(path, timeout=LOCK_TIMEOUT, isolation_level=None, check_same_thread=False)
    try:
        _check(connection)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        _migrate(connection)
        connection.text_factory = bytes  # text that is not UTF-8 must spoil only its own row
    except BaseException:
        connection.close()
        raise
    return connection


def make_private(path: Path) -> None:
    """Create the file with mode 0600 before SQLite does; SQLite gives ``-wal`` and ``-shm`` the mode of the file."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        for suffix in ("", "-wal", "-shm"):
            existing = path.with_name(path.name + suffix)
            if existing.exists():
                existing.chmod(0o600)


def _check(connection: sqlite3.Connection) -> None:
    """:raises sqlite3.DatabaseError: the file is corrupt, as far as `CHECK_TIMEOUT` allows to find out."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise _NewerVersion(f"it has version {version} of the format, this release knows {SCHEMA_VERSION}")
    end = time.monotonic() + CHECK_TIMEOUT
    timed_out = False

    def interrupt() -> int:
        nonlocal timed_out
        timed_out = time.monotonic() > end
        return int(timed_out)

    connection.set_progress_handler(interrupt, 1000)
    try:
        if connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("the integrity check failed")
    except sqlite3.OperationalError:
        if not timed_out:
            raise
    finally:
        connection.set_progress_handler(None, 0)


def _migrate(connection: sqlite3.Connection) -> None:
    """Bring the tables to the current version, in one transaction. Takes the same time however many rows there are."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        columns = {row[1] for row in connection.execute("PRAGMA table_info(identities)")}
        if columns and "ceiling" not in columns:
            for statement in _NEW_COLUMNS:
                connection.execute(statement)
        for statement in _SCHEMA.split(";"):
            connection.execute(statement)
        if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'promises'").fetchone():
            connection.execute(
                "INSERT OR REPLACE INTO holds SELECT room_id, '', user, user, '', 0, expires FROM promises"
                " WHERE typeof(room_id) = 'text' AND typeof(user) = 'text' AND typeof(expires) = 'real'"
            )
        connection.execute("DROP TABLE IF EXISTS promises")
        connection.execute("DROP TABLE IF EXISTS taken")
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # SQLite has rolled back itself if the disk is full
            connection.execute("ROLLBACK")
        raise
