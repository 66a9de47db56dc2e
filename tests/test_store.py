# SPDX-License-Identifier: Apache-2.0
"""The state store: a restart reads what was written last, despite faults of the disk or the file."""

from __future__ import annotations

import sqlite3
import stat
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor

from lotusguard.guard.seats.store import PATIENCE, StateStore, StoredHold, StoredIdentity, open_state_store
from lotusguard.guard.seats.writer import RETRY
from lotusguard.metrics import Metrics
from tests.conftest import stopped_clock, until

NOW = 1_800_000_000.0
"""The wall clock of these tests."""
VERSION_1 = """
CREATE TABLE aliases (alias TEXT PRIMARY KEY, room_id TEXT NOT NULL, slot_id TEXT NOT NULL, seen REAL NOT NULL);
CREATE TABLE identities (
    alias TEXT NOT NULL, identity TEXT NOT NULL, user TEXT NOT NULL, seen REAL NOT NULL, PRIMARY KEY (alias, identity)
);
CREATE TABLE promises (
    room_id TEXT NOT NULL, user TEXT NOT NULL, expires REAL NOT NULL, PRIMARY KEY (room_id, user)
) WITHOUT ROWID;
CREATE TABLE taken (
    alias TEXT NOT NULL, sid TEXT NOT NULL, sources TEXT NOT NULL, seen REAL NOT NULL, PRIMARY KEY (alias, sid)
);
INSERT INTO aliases VALUES ('alias', '!r:s', 'm.call#ROOM', 1.0);
INSERT INTO identities VALUES ('alias', 'identity', '@alice:s', 1.0);
INSERT INTO promises VALUES ('!r:s', '@alice:s', 1800000050.0);
INSERT INTO taken VALUES ('alias', 'PA_1', '1,3', 1.0);
PRAGMA user_version=1;
"""


def hold(user: str, *, room_id: str = "!r:s", present: bool = False, expires: float = NOW + 30) -> StoredHold:
    return StoredHold(room_id, user, "alias", f"identity of {user}", "DEVICE", present, expires)


class Wall:
    """A wall clock that a test sets."""

    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def opened(
    directory: Path, clock: Any = reactor, metrics: Metrics | None = None, wall: float | Wall = NOW
) -> AsyncIterator[StateStore]:
    now = wall if isinstance(wall, Wall) else Wall(wall)
    store = open_state_store(directory, clock, metrics or Metrics(), now)
    try:
        yield store
    finally:
        await store.close()


@contextmanager
def database(directory: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(directory / "lotusguard.sqlite3", isolation_level=None)) as connection:
        yield connection


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Another process holds the file locked, so nothing can be written."""
    with database(directory) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


def modes(directory: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}


# -- what is kept -------------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_holds_that_have_not_expired_are_read_after_a_restart(tmp_path: Path) -> None:
    async with opened(tmp_path, stopped_clock()) as store:
        assert await store.put_hold(hold("@alice:s", expires=NOW + 10))
        store.put_hold_later(hold("@bob:s", expires=NOW + 20))
        assert await store.put_hold(hold("@alice:s", expires=NOW + 40))
    async with opened(tmp_path) as again:
        assert again.holds() == [hold("@alice:s", expires=NOW + 40), hold("@bob:s", expires=NOW + 20)]
    async with opened(tmp_path, wall=NOW + 30) as later:
        assert later.holds() == [hold("@alice:s", expires=NOW + 40)]


@pytest_twisted.ensureDeferred
async def test_a_hold_of_somebody_in_the_call_is_kept_until_it_is_dropped(tmp_path: Path) -> None:
    async with opened(tmp_path, stopped_clock()) as store:
        for user in ("@alice:s", "@bob:s"):
            assert await store.put_hold(hold(user, present=True))
    async with opened(tmp_path, wall=NOW + 7200) as again:
        assert {found.user for found in again.holds()} == {"@alice:s", "@bob:s"}
        again.drop_hold("!r:s", "alias", "identity of @bob:s")
    async with opened(tmp_path, wall=NOW + 7300) as third:
        assert third.holds() == [hold("@alice:s", present=True)]


@pytest_twisted.ensureDeferred
async def test_the_latest_aliases_and_identities_are_read_latest_last(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        for number in (1, 2, 3, 1):  # the first is written again, so it is the latest
            store.put_alias(f"a{number}", "!r:s", f"slot{number}", NOW)
            store.put_identity(f"a{number}", "i", "@u:s", "D", None if number == 1 else 30, 6, NOW)
    async with opened(tmp_path) as again:
        assert list(again.aliases(2)) == [("a3", "!r:s", "slot3"), ("a1", "!r:s", "slot1")]
        assert list(again.identities(2)) == [
            StoredIdentity("a3", "i", "@u:s", "D", 30, 6),
            StoredIdentity("a1", "i", "@u:s", "D", None, 6),
        ]


@pytest_twisted.ensureDeferred
async def test_old_rows_are_deleted_and_rows_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lotusguard.guard.seats.store.ROWS_KEPT", {"aliases": 2, "identities": 1000})
    clock, wall = stopped_clock(), Wall()
    async with opened(tmp_path, clock, wall=wall) as store:
        for number in range(5):
            store.put_alias(f"a{number}", "!r:s", "slot", NOW)
            store.put_identity("a", f"i{number}", "@u:s", "", None, 0, NOW if number else NOW - 31 * 86400)
        store.put_hold_later(hold("@alice:s", expires=NOW - 1))
        clock.advance(1)
        await until(lambda: store.pending == 0)
        clock.advance(60)
        clock.advance(1)
        await until(lambda: store.pending == 0)
    with database(tmp_path) as file:
        assert file.execute("SELECT alias FROM aliases ORDER BY rowid").fetchall() == [("a3",), ("a4",)]
        assert file.execute("SELECT count(*) FROM identities").fetchone() == (4,)
        assert file.execute("SELECT count(*) FROM holds").fetchone() == (0,)


# -- faults of the disk -------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_a_caller_waits_for_a_slow_disk_once_and_later_callers_do_not_wait(tmp_path: Path) -> None:
    clock = stopped_clock()
    async with opened(tmp_path, clock) as store:
        with locked(tmp_path):
            first, second = (store.put_hold(hold(user)) for user in ("@alice:s", "@bob:s"))
            clock.advance(PATIENCE - 0.01)
            assert not first.called
            assert not second.called
            clock.advance(0.02)
            assert [await first, await second] == [False, False]
            later = store.put_hold(hold("@carol:s"))
            assert later.called
            assert not await later
    async with opened(tmp_path) as again:
        assert sorted(found.user for found in again.holds()) == ["@alice:s", "@bob:s", "@carol:s"]


@pytest_twisted.ensureDeferred
async def test_a_batch_that_failed_is_written_when_the_lock_is_gone(tmp_path: Path) -> None:
    clock, metrics = stopped_clock(), Metrics()
    async with opened(tmp_path, clock, metrics) as store:
        with locked(tmp_path):
            store.put_hold(hold("@alice:s", expires=NOW + 1))
            await until(lambda: not store.writable)
            assert not await store.put_hold(hold("@bob:s"))
            store.put_hold_later(hold("@alice:s", expires=NOW + 50))
            assert store.pending == 2
            assert metrics.registry.get_sample_value("lotusguard_state_writes_pending") == 2
        clock.advance(RETRY)
        await until(lambda: store.writable)
        assert await store.put_hold(hold("@carol:s"))
        with database(tmp_path) as file:
            found = dict(file.execute("SELECT user, expires FROM holds"))
        assert found == {"@alice:s": NOW + 50, "@bob:s": NOW + 30, "@carol:s": NOW + 30}


@pytest_twisted.ensureDeferred
async def test_the_oldest_writes_are_dropped_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lotusguard.guard.seats.writer.PENDING_LIMIT", 3)
    clock, metrics = stopped_clock(), Metrics()
    async with opened(tmp_path, clock, metrics) as store:
        with locked(tmp_path):
            store.put_hold(hold("@u0:s"))
            await until(lambda: not store.writable)
            for number in range(1, 6):
                store.put_hold_later(hold(f"@u{number}:s"))
            assert store.pending == 3
        clock.advance(RETRY)
        await until(lambda: store.writable)
    async with opened(tmp_path) as again:
        assert sorted(found.user for found in again.holds()) == ["@u3:s", "@u4:s", "@u5:s"]
    assert metrics.registry.get_sample_value("lotusguard_state_writes_total", {"outcome": "dropped"}) == 3


@pytest_twisted.ensureDeferred
async def test_invalid_write_does_not_block_others(tmp_path: Path) -> None:
    async with opened(tmp_path, stopped_clock()) as store:
        store.put_hold_later(hold("@lone-surrogate-\ud800:s"))
        assert await store.put_hold(hold("@alice:s"))
    async with opened(tmp_path) as again:
        assert [found.user for found in again.holds()] == ["@alice:s"]


@pytest_twisted.ensureDeferred
async def test_closing_with_a_locked_file_ends(tmp_path: Path) -> None:
    store = open_state_store(tmp_path, reactor, Metrics(), Wall())
    store.put_hold_later(hold("@alice:s"))
    with locked(tmp_path):
        await store.close()
    assert store.pending == 2  # with the heartbeat


# -- files of other releases, damaged files ----------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_a_file_of_version_1_is_migrated(tmp_path: Path) -> None:
    with database(tmp_path) as file:
        file.executescript(VERSION_1)
    for _ in range(2):
        async with opened(tmp_path, stopped_clock()) as store:
            assert list(store.aliases(10)) == [("alias", "!r:s", "m.call#ROOM")]
            assert list(store.identities(10)) == [StoredIdentity("alias", "identity", "@alice:s", "", None, 0)]
            assert store.holds() == [StoredHold("!r:s", "@alice:s", "", "@alice:s", "", False, NOW + 50)]
            assert await store.put_hold(hold("@bob:s", expires=NOW + 1))
            store.drop_hold("!r:s", "alias", "identity of @bob:s")
    assert set(modes(tmp_path)) == {"lotusguard.sqlite3"}


@pytest_twisted.ensureDeferred
async def test_a_file_of_a_newer_release_is_set_aside_and_kept(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        store.put_alias("alias", "!r:s", "slot", NOW)
    with database(tmp_path) as file:
        file.execute("PRAGMA user_version=3")
    async with opened(tmp_path) as again:
        assert list(again.aliases(10)) == []
    (aside,) = (tmp_path / name for name in modes(tmp_path) if name.startswith("lotusguard.sqlite3.newer-"))
    with closing(sqlite3.connect(aside)) as kept:
        assert kept.execute("SELECT alias FROM aliases").fetchall() == [("alias",)]


@pytest_twisted.ensureDeferred
async def test_rows_that_cannot_be_read_are_skipped_and_counted(tmp_path: Path) -> None:
    metrics = Metrics()
    async with opened(tmp_path, stopped_clock()) as store:
        for user in ("@alice:s", "@bob:s", "@carol:s"):
            assert await store.put_hold(hold(user))
        store.put_identity("a", "good", "@u:s", "", 2, 0, NOW)
        store.put_identity("a", "bad", "@u:s", "", 2, 0, NOW)
        store.put_alias("a", "!r:s", "slot", NOW)
    with database(tmp_path) as file:
        file.execute("UPDATE holds SET expires = 'never' WHERE user = '@alice:s'")
        file.execute("UPDATE holds SET device = CAST(x'ff' AS TEXT) WHERE user = '@bob:s'")
        file.execute("UPDATE identities SET withheld = 'camera' WHERE identity = 'bad'")
        file.execute("UPDATE aliases SET slot_id = 7.5")
        file.execute("INSERT INTO clock VALUES ('odd', 'text')")
    async with opened(tmp_path, metrics=metrics) as again:
        assert [found.user for found in again.holds()] == ["@carol:s"]
        assert [found.identity for found in again.identities(10)] == ["good"]
        assert list(again.aliases(10)) == [("a", "!r:s", "7.5")]  # SQLite stores it as text
        assert again.bad_rows == 4
        assert metrics.registry.get_sample_value("lotusguard_state_bad_rows") == 4


@pytest_twisted.ensureDeferred
async def test_every_file_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    directory = tmp_path / "var" / "state"
    async with opened(directory, stopped_clock()) as store:
        assert await store.put_hold(hold("@alice:s"))
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        names = ("lotusguard.sqlite3", "lotusguard.sqlite3-wal", "lotusguard.sqlite3-shm")
        assert modes(directory) == dict.fromkeys(names, 0o600)


@pytest_twisted.ensureDeferred
async def test_a_file_that_others_could_read_is_made_private(tmp_path: Path) -> None:
    (tmp_path / "lotusguard.sqlite3").touch(mode=0o644)
    async with opened(tmp_path, stopped_clock()) as store:
        assert await store.put_hold(hold("@alice:s"))
        assert set(modes(tmp_path).values()) == {0o600}


@pytest_twisted.ensureDeferred
async def test_million_identities_do_not_delay_the_start(tmp_path: Path) -> None:
    with database(tmp_path) as file:
        file.executescript(VERSION_1)
        file.execute("PRAGMA synchronous=OFF")
        file.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000000)"
            " INSERT INTO identities SELECT 'alias', 'identity-' || i, '@user-' || i || ':s', i FROM n"
        )
    began = time.process_time()
    async with opened(tmp_path) as store:
        latest = list(store.identities(1000))
        spent = time.process_time() - began
    assert latest[-1].identity == "identity-1000000"
    assert spent < 1.5


# -- since when a guard has been running --------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_a_short_restart_keeps_the_time_since_which_a_guard_has_run(tmp_path: Path) -> None:
    async with opened(tmp_path, wall=NOW) as store:
        assert store.guarding_since == NOW
    async with opened(tmp_path, wall=NOW + 599) as store:
        assert store.guarding_since == NOW
    async with opened(tmp_path, wall=NOW + 599 + 601) as store:
        assert store.guarding_since == NOW + 1200


@pytest_twisted.ensureDeferred
async def test_a_guard_that_was_killed_was_alive_at_its_last_heartbeat(tmp_path: Path) -> None:
    clock, wall = stopped_clock(), Wall()
    async with opened(tmp_path, clock, wall=wall) as store:
        for _ in range(20):  # nothing else is written
            wall.now += 60
            clock.advance(60)
            clock.advance(1)
            await until(lambda: store.pending == 0)
        with database(tmp_path) as file:
            (last_alive,) = file.execute("SELECT at FROM clock WHERE name = 'last_alive'").fetchone()
        assert last_alive == NOW + 1200


@pytest_twisted.ensureDeferred
async def test_time_starts_again_after_the_machine_was_suspended(tmp_path: Path) -> None:
    clock, wall = stopped_clock(), Wall()
    async with opened(tmp_path, clock, wall=wall) as store:
        wall.now += 7200
        clock.advance(60)
        assert store.guarding_since == NOW + 7200
    async with opened(tmp_path, wall=NOW + 7210) as again:
        assert again.guarding_since == NOW + 7200
