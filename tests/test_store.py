# SPDX-License-Identifier: Apache-2.0
"""The state directory: what was put last is what is read after a restart."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.task import Clock, deferLater

from lotusguard.guard.seats.store import PATIENCE, Store, open_state_store
from lotusguard.metrics import Metrics

LATER = 4_000_000_000.0
"""Long after any of these tests: what has ended is thrown away."""
BEFORE = "CREATE TABLE promises (room_id TEXT, user TEXT, expires REAL, PRIMARY KEY (room_id, user))"
"""As earlier releases made it."""


@asynccontextmanager
async def opened(directory: Path, clock: Any = reactor) -> AsyncIterator[Store]:
    store = open_state_store(directory, clock, Metrics())
    try:
        yield store
    finally:
        await store.close()


def stopped_clock() -> Any:
    """A clock for the store, whose thread tells the real reactor."""
    clock: Any = Clock()
    clock.callFromThread = reactor.callFromThread  # type: ignore[attr-defined]
    return clock


@contextmanager
def sick_disk(directory: Path) -> Iterator[None]:
    """Nothing can be written meanwhile: somebody holds the file locked."""
    with closing(sqlite3.connect(directory / "lotusguard.sqlite3", isolation_level=None)) as somebody:
        somebody.execute("BEGIN IMMEDIATE")
        yield


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("upgraded", [False, True])
async def test_a_promise_that_is_renewed_ends_later(tmp_path: Path, upgraded: bool) -> None:
    if upgraded:
        with sqlite3.connect(tmp_path / "lotusguard.sqlite3") as earlier:
            earlier.execute(BEFORE)
            earlier.execute("INSERT INTO promises VALUES ('!r:s', '@alice:s', 4000000050.0)")
        earlier.close()
    async with opened(tmp_path) as store:
        assert await store.put_promise("!r:s", "@alice:s", LATER + 100)
        for user, expires in (("@alice:s", LATER + 200), ("@bob:s", LATER + 150)):
            assert await store.put_promise("!r:s", user, expires)
    async with opened(tmp_path) as again:
        assert sorted(again.promises(LATER + 60)) == [
            ("!r:s", "@alice:s", LATER + 200),
            ("!r:s", "@bob:s", LATER + 150),
        ]
        assert again.promises(LATER + 180) == [("!r:s", "@alice:s", LATER + 200)]


@pytest_twisted.ensureDeferred
async def test_a_promise_that_was_kept_is_forgotten_unless_given_anew(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        for user in ("@alice:s", "@bob:s"):
            store.put_promise("!r:s", user, LATER + 100)
            store.drop_promise("!r:s", user)
        assert await store.put_promise("!r:s", "@bob:s", LATER + 100)
    async with opened(tmp_path) as again:
        assert again.promises(LATER) == [("!r:s", "@bob:s", LATER + 100)]


@pytest_twisted.ensureDeferred
async def test_a_sick_disk_is_waited_for_once_and_then_by_nobody(tmp_path: Path) -> None:
    clock = stopped_clock()
    async with opened(tmp_path, clock) as store:
        with sick_disk(tmp_path):
            first, gathering = (store.put_promise("!r:s", user, LATER) for user in ("@alice:s", "@bob:s"))
            clock.advance(PATIENCE - 0.01)
            assert not first.called
            assert not gathering.called
            clock.advance(0.02)
            assert [await first, await gathering] == [False, False]
            later = store.put_promise("!r:s", "@carol:s", LATER)
            assert later.called
            assert not await later
    async with opened(tmp_path) as again:  # what nobody waited for was written all the same
        assert sorted(user for _, user, _ in again.promises(0.0)) == ["@alice:s", "@bob:s", "@carol:s"]
        assert await again.put_promise("!r:s", "@dave:s", LATER)


@pytest_twisted.ensureDeferred
async def test_a_disk_that_is_well_again_is_waited_for_again(tmp_path: Path) -> None:
    clock = stopped_clock()
    async with opened(tmp_path, clock) as store:
        with sick_disk(tmp_path):
            first = store.put_promise("!r:s", "@alice:s", LATER)
            clock.advance(PATIENCE)
            assert not await first
        while store.put_promise("!r:s", "@bob:s", LATER).called:
            await deferLater(reactor, 0.005)  # the batch that was late is still on its way back
        assert await store.put_promise("!r:s", "@carol:s", LATER)
        assert not clock.getDelayedCalls()
