# SPDX-License-Identifier: Apache-2.0
"""The lease of a state directory: one guard at a time holds it."""

from __future__ import annotations

import stat
from pathlib import Path

from lotusguard.guard.seats.lease import StateLease
from tests.calls import logged


def test_one_of_two_guards_holds_the_lease(tmp_path: Path) -> None:
    first, second = StateLease(tmp_path), StateLease(tmp_path)
    assert not first.held
    assert first.renew()
    assert not second.renew()
    first.release()
    assert not first.held
    assert second.renew()
    assert not first.renew()
    second.release()


def test_changes_are_logged_once(tmp_path: Path) -> None:
    first, second = StateLease(tmp_path), StateLease(tmp_path)
    with logged() as events:
        first.renew()
        for _ in range(3):
            second.renew()
        first.release()
        for _ in range(3):
            second.renew()
    names = [event.get("event_name") for event in events]
    assert names == ["lease_acquired", "lease_missing", "lease_acquired"]
    second.release()


def test_a_directory_that_cannot_be_used_gives_no_lease(tmp_path: Path) -> None:
    lease = StateLease(tmp_path / "missing")
    assert not lease.renew()
    (tmp_path / "missing").mkdir()
    assert lease.renew()
    assert stat.S_IMODE((tmp_path / "missing" / "lock").stat().st_mode) == 0o600
    lease.release()
