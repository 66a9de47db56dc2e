# SPDX-License-Identifier: Apache-2.0
"""Writing behind to a disk that hangs: nobody waits for it, the log says so, and the guard can still stop."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from lotusguard.guard.seats.writer import CLOSE_PATIENCE, HANGS, PATIENCE, WRITE_BEHIND, BatchWriter
from lotusguard.metrics import Metrics
from tests.calls import logged, named
from tests.conftest import until

HANG = "SELECT hang()"


class Disk:
    """A database whose statements hang until the test lets them go on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.begun, self.goes_on = Event(), Event()
        self.connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self.connection.create_function("hang", 0, self._hang)
        self.connection.execute("CREATE TABLE rows (name TEXT)")
        self.clock: Any = Clock()
        self.clock.callFromThread = reactor.callFromThread  # type: ignore[attr-defined]
        self.writer = BatchWriter(self.connection, path, self.clock, Metrics())

    def _hang(self) -> int:
        self.begun.set()
        assert self.goes_on.wait(60)
        return 0

    async def hang(self) -> Deferred[bool]:
        """Begin a write that does not end."""
        written = self.writer.put_now(("hanging",), HANG, ())
        await until(self.begun.is_set)
        return written


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "rows.sqlite3")
    yield disk
    disk.goes_on.set()


@pytest_twisted.ensureDeferred
async def test_a_hanging_disk_delays_a_caller_once_and_is_reported_once(disk: Disk) -> None:
    with logged() as events:
        written = await disk.hang()
        disk.clock.advance(PATIENCE)
        assert await written is False
        assert disk.writer.writable
        disk.clock.advance(HANGS - PATIENCE)
        assert not disk.writer.writable
        assert await disk.writer.put_now(("other",), "INSERT INTO rows VALUES ('other')", ()) is False
        disk.clock.advance(60)
    (line,) = named(events, "state_not_writable")
    assert "the disk does not answer" in line


@pytest_twisted.ensureDeferred
async def test_what_waited_for_a_hanging_disk_is_written_once_it_answers(disk: Disk) -> None:
    await disk.hang()
    disk.clock.pump([PATIENCE, HANGS])
    disk.writer.put(("other",), "INSERT INTO rows VALUES ('other')", ())
    with logged() as events:
        disk.goes_on.set()
        await until(lambda: disk.writer.pending == 0)
    assert disk.writer.writable
    assert len(named(events, "state_writable")) == 1
    assert await disk.writer.close()
    with closing(sqlite3.connect(disk.path)) as connection:
        assert connection.execute("SELECT name FROM rows").fetchall() == [("other",)]


@pytest_twisted.ensureDeferred
async def test_closing_ends_although_the_disk_hangs_and_says_what_is_lost(disk: Disk) -> None:
    await disk.hang()
    disk.writer.put(("other",), "INSERT INTO rows VALUES ('other')", ())
    with logged() as events:
        ended = Deferred.fromCoroutine(disk.writer.close())
        disk.clock.advance(CLOSE_PATIENCE - 0.1)
        assert not ended.called
        disk.clock.advance(0.1)
        assert await ended is False
    (line,) = named(events, "state_incomplete")
    assert "the last 2 writes" in line
    assert disk.clock.getDelayedCalls() == []


@pytest_twisted.ensureDeferred
async def test_closing_ends_although_the_disk_hangs_while_only_old_rows_are_deleted(disk: Disk) -> None:
    disk.writer.clean_up([(HANG, ())])
    disk.clock.advance(WRITE_BEHIND)
    await until(disk.begun.is_set)
    with logged() as events:
        ended = Deferred.fromCoroutine(disk.writer.close())
        disk.clock.advance(CLOSE_PATIENCE)
        assert await ended is False
    assert not named(events, "state_incomplete")
    assert disk.clock.getDelayedCalls() == []
