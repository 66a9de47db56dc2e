# SPDX-License-Identifier: Apache-2.0
"""Writes to an SQLite file from a thread of its own.

Writes are collected while a batch is being written. A batch that fails is written again, so that a
locked file or a full disk loses nothing.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import Any

from attrs import Factory, define, field
from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool

from lotusguard.guard.seats.batch import Statement, WritingThread, run_batch
from lotusguard.metrics import Metrics

log = Logger()

Key = tuple[str, ...]
"""The table and the primary key of the row that a write is about. A newer write of a row replaces an older one."""

WRITE_BEHIND = 0.2
"""Batching delay for writes that nobody awaits, in seconds."""
PATIENCE = 0.25
"""Seconds after which a caller that awaits a write continues without it: a slow disk delays no join for long."""
HANGS = 5.0
"""Seconds after which a batch that is still being written is reported."""
CLOSE_PATIENCE = 5.0
"""Seconds that `BatchWriter.close` may take. A disk that does not answer must not keep the guard from stopping."""
RETRY = 1.0
"""Seconds until a batch that failed is written again."""
BATCH = 5_000
"""Writes in one transaction."""
PENDING_LIMIT = 100_000
"""Writes that may wait while the file cannot be written. Names have at most 255 bytes, so they take at most 200 MB, and
40 MB with names of the usual length. Beyond the limit the oldest are dropped."""


class _State(Enum):
    IDLE = "idle"
    WRITING = "writing"
    LATE = "late"
    """The batch takes longer than `PATIENCE`."""
    BACKING_OFF = "backing off"
    """The last batch failed; the next attempt is scheduled."""


@define(eq=False)
class _Write:
    statement: str
    values: tuple[object, ...]
    waiters: list[Deferred[bool]] = Factory(list)


@define(eq=False)
class BatchWriter:
    """Writes rows in the order of arrival, one transaction at a time.

    :ivar writable: whether the last batch could be written.
    """

    _connection: sqlite3.Connection = field(repr=False)
    _path: Path
    _reactor: Any = field(repr=False)
    _metrics: Metrics = field(repr=False)
    writable: bool = field(init=False, default=True)
    _pool: ThreadPool = field(init=False, repr=False)
    _state: _State = field(init=False, default=_State.IDLE)
    _queue: dict[Key, _Write] = field(init=False, repr=False, factory=dict)
    _batch: dict[Key, _Write] = field(init=False, repr=False, factory=dict)
    _cleanup: Sequence[Statement] = field(init=False, repr=False, default=())
    _scheduled: Any = field(init=False, repr=False, default=None)
    _overdue: Any = field(init=False, repr=False, default=None)
    _batch_ended: list[Deferred[None]] = field(init=False, repr=False, factory=list)

    def __attrs_post_init__(self) -> None:
        self._pool = WritingThread(1, 1, "lotusguard-store")
        self._pool.start()

    @property
    def pending(self) -> int:
        """How many writes are not on disk yet."""
        return len(self._queue) + len(self._batch)

    def put(self, key: Key, statement: str, values: tuple[object, ...]) -> None:
        """Write with the next batch."""
        self._enqueue(key, statement, values)
        self._schedule(WRITE_BEHIND)

    def put_now(self, key: Key, statement: str, values: tuple[object, ...]) -> Deferred[bool]:
        """Write at once.

        :return: fires when it is on disk, with whether it could be written; after `PATIENCE` with ``False``, although
            it will still be written.
        """
        written: Deferred[bool] = Deferred()
        write = self._enqueue(key, statement, values)
        if self._state in (_State.LATE, _State.BACKING_OFF) or len(self._queue) > BATCH:
            written.callback(False)
        else:
            write.waiters.append(written)
            self._write_batch()
        return written

    def clean_up(self, statements: Sequence[Statement]) -> None:
        """Run statements that delete old rows with the next batch. They are dropped if it fails."""
        self._cleanup = statements
        self._schedule(WRITE_BEHIND)

    async def close(self) -> bool:
        """Write what is left, as far as it can be written, close the connection and stop the thread.

        :return: whether that was done within `CLOSE_PATIENCE`. If not, the disk does not answer.
        """
        try:
            await Deferred.fromCoroutine(self._finish()).addTimeout(CLOSE_PATIENCE, self._reactor)
        except TimeoutError:
            self._say_incomplete()
            return False
        finally:
            self._unschedule()
            self._cancel_overdue()
        self._pool.stop()
        return True

    async def _finish(self) -> None:
        """Everything that waits for the disk is done in the thread, and nothing that does not end is waited for longer
        than `CLOSE_PATIENCE`: a batch may only delete old rows, and closing writes too."""
        await self._write_all()
        await deferToThreadPool(self._reactor, self._pool, self._connection.close)

    async def _write_all(self) -> None:
        while self.pending or self._state in (_State.WRITING, _State.LATE):
            if self._state is _State.BACKING_OFF:
                self._state = _State.IDLE  # one last attempt
            self._write_batch()
            ended: Deferred[None] = Deferred()
            self._batch_ended.append(ended)
            await ended
            if self._state is _State.BACKING_OFF:
                self._say_incomplete()
                break

    def _say_incomplete(self) -> None:
        if self.pending:
            log.error(
                "{path} lacks the last {count} writes",
                path=str(self._path), count=self.pending, event_name="state_incomplete",
            )  # fmt: skip

    def _enqueue(self, key: Key, statement: str, values: tuple[object, ...]) -> _Write:
        write = _Write(statement, values)
        older = self._queue.pop(key, None)
        if older is not None:
            write.waiters = older.waiters
        self._queue[key] = write
        self._drop_oldest()
        return write

    def _drop_oldest(self) -> None:
        while self.pending > PENDING_LIMIT and self._queue:
            dropped = self._queue.pop(next(iter(self._queue)))
            _answer([dropped], False)
            self._metrics.state_writes.labels("dropped").inc()

    def _schedule(self, delay: float) -> None:
        if self._scheduled is None and self._state in (_State.IDLE, _State.BACKING_OFF):
            self._scheduled = self._reactor.callLater(delay, self._due)

    def _unschedule(self) -> None:
        if self._scheduled is not None:
            self._scheduled.cancel()
            self._scheduled = None

    def _due(self) -> None:
        self._scheduled = None
        if self._state is _State.BACKING_OFF:
            self._state = _State.IDLE
        self._write_batch()

    def _write_batch(self) -> None:
        """Begin the next batch, unless one is being written or the last one failed just now."""
        if self._state is not _State.IDLE or not (self._queue or self._cleanup):
            return
        self._unschedule()
        self._state = _State.WRITING
        for key in list(islice(self._queue, BATCH)):
            self._batch[key] = self._queue.pop(key)
        cleanup, self._cleanup = self._cleanup, ()
        statements = [(write.statement, write.values) for write in self._batch.values()]
        self._overdue = self._reactor.callLater(PATIENCE, self._late)
        writing = deferToThreadPool(self._reactor, self._pool, run_batch, self._connection, statements, cleanup)
        writing.addBoth(self._ended).addErrback(
            lambda failure: log.failure("writing {path} failed", failure, path=str(self._path))
        )

    def _late(self) -> None:
        self._state = _State.LATE
        self._overdue = self._reactor.callLater(HANGS - PATIENCE, self._hanging)
        _answer((*self._batch.values(), *self._queue.values()), False)

    def _hanging(self) -> None:
        self._say_not_writable("the disk does not answer")

    def _cancel_overdue(self) -> None:
        if self._overdue is not None and self._overdue.active():
            self._overdue.cancel()

    def _ended(self, outcome: int | Failure) -> None:
        self._cancel_overdue()
        batch, self._batch = self._batch, {}
        written = not isinstance(outcome, Failure)
        self._metrics.state_writes.labels("ok" if written else "failed").inc()
        if isinstance(outcome, Failure):
            self._state = _State.BACKING_OFF
            self._queue = {**{key: write for key, write in batch.items() if key not in self._queue}, **self._queue}
            self._drop_oldest()
            self._schedule(RETRY)
        else:
            self._state = _State.IDLE
            if outcome:
                self._metrics.state_writes.labels("invalid").inc(outcome)
        self._say_whether_writable(outcome)
        _answer(batch.values() if written else (*batch.values(), *self._queue.values()), written)
        self._write_batch()
        ended, self._batch_ended = self._batch_ended, []
        for waiter in ended:
            waiter.callback(None)

    def _say_whether_writable(self, outcome: int | Failure) -> None:
        if isinstance(outcome, Failure):
            self._say_not_writable(outcome.getErrorMessage())
        elif not self.writable:
            self.writable = True
            log.info("{path} can be written again", path=str(self._path), event_name="state_writable")

    def _say_not_writable(self, reason: str) -> None:
        """Once, until it can be written again."""
        if self.writable:
            log.error(
                "{path} cannot be written, {count} writes wait: {reason}",
                path=str(self._path), count=self.pending, reason=reason, event_name="state_not_writable",
            )  # fmt: skip
        self.writable = False


def _answer(writes: Iterable[_Write], written: bool) -> None:
    """Tell those who still await these writes."""
    for write in list(writes):
        waiters, write.waiters = write.waiters, []
        for waiter in waiters:
            if not waiter.called:
                waiter.callback(written)
