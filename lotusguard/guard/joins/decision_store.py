# SPDX-License-Identifier: Apache-2.0
"""What became of joins, and who was removed from calls: kept for operators' questions, on disk for seven days."""

from __future__ import annotations

import json
import sqlite3
from collections import deque
from collections.abc import Callable
from enum import Enum
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from attrs import define, field, frozen
from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger

from lotusguard.guard.seats.batch import WritingThread
from lotusguard.guard.seats.statefile import LOCK_TIMEOUT, make_private
from lotusguard.guard.seats.writer import BatchWriter
from lotusguard.metrics import Metrics
from lotusguard.rules.jwt import compact

log = Logger()

FILE_NAME = "decisions.sqlite3"
KEPT_FOR = 7 * 86400.0
"""Seconds for which records are kept."""
ROWS_KEPT = 500_000
PAGES_KEPT = 16_384
"""Pages of 4 kB that the file may use; then the oldest records are deleted."""
KEPT_IN_MEMORY = 2_000
DELETED_AT_ONCE = 20_000
CLEAN_UP_INTERVAL = 60.0
READ_PATIENCE = 10.0
"""Seconds after which a question is given up: the disk does not answer."""
READS = 4
"""Questions that are being answered or wait for it. More are rejected."""
FOUND_AT_ONCE = 1_000
"""Records that one question is answered with, at most."""
HOLDERS_KEPT = 50
"""Users that one record names as holding seats."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    id INTEGER PRIMARY KEY, at REAL NOT NULL, kind TEXT NOT NULL, user TEXT NOT NULL, room_id TEXT NOT NULL,
    content TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS records_by_user ON records (user, at);
CREATE INDEX IF NOT EXISTS records_by_kind ON records (kind, at);
"""
_PUT = "INSERT INTO records (at, kind, user, room_id, content) VALUES (?, ?, ?, ?, ?)"
_FIND = """SELECT at, kind, user, room_id, content FROM records
    WHERE at >= ? AND at <= ? AND (? = '' OR user = ?) AND (? = '' OR room_id = ?) AND (? = '' OR kind = ?)
    ORDER BY at DESC LIMIT ?"""
_DELETE_OLD = "DELETE FROM records WHERE id IN (SELECT id FROM records WHERE kind = ? AND at < ? LIMIT ?)"
"""By time and not by place: the clock may have been wrong when a record was made."""
_DELETE_FIRST = """DELETE FROM records WHERE id IN (SELECT id FROM records ORDER BY id LIMIT ?)
    AND (id <= (SELECT max(id) FROM records) - ?
        OR (SELECT page_count FROM pragma_page_count) - (SELECT freelist_count FROM pragma_freelist_count) > ?)"""


class RecordKind(Enum):
    JOIN = "join"
    """A token request was decided."""
    REMOVAL = "removal"
    """A participant was removed from a call."""


@frozen
class Record:
    """One decision.

    :ivar at: seconds since the epoch.
    :ivar verdict: as in the log; "removed" for a removal.
    :ivar seats: the limit, and how many users hold seats, if that is why.
    :ivar holders: those users, at most `HOLDERS_KEPT`.
    :ivar unenforced: what passed without being enforced, as ``check:reason``.
    """

    at: float
    kind: RecordKind
    user: str
    room_id: str
    verdict: str
    reason: str
    seats: str = ""
    holders: tuple[str, ...] = ()
    unenforced: tuple[str, ...] = ()
    route: str = ""
    request_id: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            "at": round(self.at, 3), "kind": self.kind.value, "user": self.user, "room_id": self.room_id,
            **self.content(),
        }  # fmt: skip

    def content(self) -> dict[str, Any]:
        """The fields that nothing is looked up by."""
        return {
            "verdict": self.verdict, "reason": self.reason, "seats": self.seats, "holders": list(self.holders),
            "unenforced": list(self.unenforced), "route": self.route, "request_id": self.request_id,
        }  # fmt: skip


@frozen
class Question:
    """Which records are wanted; "" and ``None`` mean any. Times are seconds since the epoch, both inclusive."""

    since: float
    until: float
    user: str = ""
    room_id: str = ""
    kind: RecordKind | None = None
    limit: int = FOUND_AT_ONCE

    def wants(self, record: Record) -> bool:
        return (
            self.since <= record.at <= self.until
            and self.user in ("", record.user)
            and self.room_id in ("", record.room_id)
            and self.kind in (None, record.kind)
        )


class HistoryUnavailable(Exception):
    """Records cannot be read now; the text says why."""


class DecisionHistory(Protocol):
    """Where records are kept."""

    def put(self, record: Record) -> None:
        """Keep a record."""

    async def find(self, question: Question) -> list[Record]:
        """The latest records that are wanted, oldest first. :raises HistoryUnavailable:"""

    async def close(self) -> None:
        """Write what is left. Ends although the disk hangs."""


@define(eq=False)
class MemoryHistory:
    """The latest records, in memory: where there is no state directory."""

    _records: deque[Record] = field(factory=lambda: deque(maxlen=KEPT_IN_MEMORY), init=False)

    def put(self, record: Record) -> None:
        self._records.append(record)

    async def find(self, question: Question) -> list[Record]:
        return [record for record in self._records if question.wants(record)][-question.limit :]

    async def close(self) -> None:
        pass


@define(eq=False)
class DecisionStore:
    """Records in a file of the state directory. They are written behind, and read in a thread of their own: what hangs
    there delays nothing else."""

    _connection: sqlite3.Connection = field(repr=False)
    _path: Path
    _reactor: Any = field(repr=False)
    _metrics: Metrics = field(repr=False)
    _wall: Callable[[], float] = field(repr=False)
    _writer: BatchWriter = field(init=False, repr=False)
    _numbers: Any = field(factory=count, init=False, repr=False)
    _clean_up: Any = field(init=False, repr=False)
    _reader: WritingThread = field(init=False, repr=False)
    _reads: int = field(init=False, repr=False, default=0)

    def __attrs_post_init__(self) -> None:
        self._reader = WritingThread(0, 1, "lotusguard-decisions")
        self._reader.start()
        self._writer = BatchWriter(self._connection, self._path, self._reactor, self._metrics)
        self._clean_up = self._reactor.callLater(CLEAN_UP_INTERVAL, self._delete_old)

    def put(self, record: Record) -> None:
        content = compact(record.content())
        values = (record.at, record.kind.value, record.user, record.room_id, content)
        self._writer.put(("records", str(next(self._numbers))), _PUT, values)

    async def find(self, question: Question) -> list[Record]:
        if self._reads >= READS:
            raise HistoryUnavailable("too many questions wait for the disk")
        self._reads += 1
        found: Deferred[list[Record]] = Deferred()
        reading = deferToThreadPool(self._reactor, self._reader, _find, self._path, question)
        reading.addBoth(self._read).chainDeferred(found)
        try:
            return await found.addTimeout(READ_PATIENCE, self._reactor)
        except TimeoutError:
            raise HistoryUnavailable("the disk does not answer") from None
        except sqlite3.Error as error:
            raise HistoryUnavailable(str(error)) from None

    def _read(self, outcome: Any) -> Any:
        """A question is over, however long ago its caller gave up."""
        self._reads -= 1
        return outcome

    async def close(self) -> None:
        if self._clean_up.active():
            self._clean_up.cancel()
        await self._writer.close()
        if not self._reads:  # else its thread may hang; it does not keep the process from ending
            self._reader.stop()

    def _delete_old(self) -> None:
        oldest = self._wall() - KEPT_FOR
        old = [(_DELETE_OLD, (kind.value, oldest, DELETED_AT_ONCE)) for kind in RecordKind]
        self._writer.clean_up([*old, (_DELETE_FIRST, (DELETED_AT_ONCE, ROWS_KEPT, PAGES_KEPT))])
        self._clean_up = self._reactor.callLater(CLEAN_UP_INTERVAL, self._delete_old)


def open_history(directory: Path | None, reactor: Any, metrics: Metrics, wall: Callable[[], float]) -> DecisionHistory:
    """The history in a state directory that is known to be writable; in memory without one, or if the file cannot be
    used. A damaged file is deleted: nothing is enforced by it. One that cannot be opened now, because the
    disk is full or it is locked, is left."""
    if directory is None:
        return MemoryHistory()
    path = directory / FILE_NAME
    for last_attempt in (False, True):
        try:
            return DecisionStore(_connect(path), path, reactor, metrics, wall)
        except (sqlite3.Error, OSError) as error:
            log.error(
                "{path} cannot be used, earlier decisions are not known: {reason}",
                path=str(path), reason=str(error), event_name="decisions_lost",
            )  # fmt: skip
            damaged = not isinstance(error, (OSError, sqlite3.OperationalError))
            if last_attempt or not damaged or not _delete(path):
                break
    return MemoryHistory()


def _connect(path: Path) -> sqlite3.Connection:
    make_private(path)
    connection = sqlite3.connect(path, timeout=LOCK_TIMEOUT, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=OFF")
        for statement in _SCHEMA.split(";"):
            connection.execute(statement)
    except BaseException:
        connection.close()
        raise
    return connection


def _delete(path: Path) -> bool:
    try:
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _find(path: Path, question: Question) -> list[Record]:
    """In a thread."""
    kind = question.kind.value if question.kind is not None else ""
    user, room_id = question.user, question.room_id
    values = (question.since, question.until, user, user, room_id, room_id, kind, kind, question.limit)
    connection = sqlite3.connect(path, timeout=LOCK_TIMEOUT, isolation_level=None)
    try:
        connection.execute("PRAGMA query_only=ON")
        rows = connection.execute(_FIND, values).fetchall()
    finally:
        connection.close()
    return [_record(*row) for row in reversed(rows)]


def _record(at: float, kind: str, user: str, room_id: str, content: str) -> Record:
    fields = json.loads(content)
    for name in ("holders", "unenforced"):
        fields[name] = tuple(fields[name])
    return Record(at, RecordKind(kind), user, room_id, **fields)
