# SPDX-License-Identifier: Apache-2.0
"""Failures of the guard's own code: one check that crashes skips no other, and the token is still rebuilt."""

from __future__ import annotations

from typing import Any

import pytest
import pytest_twisted

from lotusguard.guard.joins.callers import Callers
from lotusguard.guard.joins.issuing import TokenIssuer
from lotusguard.guard.rooms.members import Members
from lotusguard.guard.rooms.policies import Policies
from lotusguard.guard.seats.memory import MemorySeatBook
from lotusguard.guard.seats.registry import MemoryTokenRegistry
from lotusguard.guard.seats.roster import Roster
from lotusguard.sandbox.demo.sandbox import Sandbox
from tests.calls import ALICE, BOB, counted, crashes, logged, room_of
from tests.joins.helpers import FULL, NOT_A_MEMBER, claims_of, content


class Bug(Exception):
    """A mistake in our own code."""


async def crash(*args: Any, **kwargs: Any) -> Any:
    raise Bug


def crash_at_once(*args: Any, **kwargs: Any) -> Any:
    raise Bug


CHECKS = [
    (Callers, "identify", crash),
    (Policies, "get", crash),
    (Policies, "in_memory", crash_at_once),
    (Policies, "last_known", crash_at_once),
    (Members, "get", crash),
    (Roster, "refresh", crash),
    (MemorySeatBook, "take", crash),
    (MemorySeatBook, "release", crash),
    (MemorySeatBook, "issue", crash),
    (MemoryTokenRegistry, "learn", crash),
    (TokenIssuer, "named_user", crash_at_once),
]


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize(("part", "method", "instead"), CHECKS, ids=[f"{c[0].__name__}.{c[1]}" for c in CHECKS])
async def test_a_join_goes_on_with_a_rebuilt_token(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, part: Any, method: str, instead: Any
) -> None:
    room_id = room_of(sandbox, 5)
    openid = sandbox.homeserver.openid_token(BOB)
    sandbox.upstream.extra_claims = {"video": {"roomAdmin": True}}
    monkeypatch.setattr(part, method, instead)
    with logged() as events:
        answer = await sandbox.ask_token(BOB, room_id, openid_token=openid)
    assert answer.code == 200
    claims = claims_of(answer)
    assert claims["exp"] - claims["iat"] == 120
    assert "roomAdmin" not in claims["video"]
    if method == "named_user":
        assert not crashes(events)  # Bob was proven: upstream need not name him
        return
    assert crashes(events)
    assert counted(sandbox, "joins_total", verdict="error", reason="internal_error") == 1
    assert content(await sandbox.operator("GET", "/readyz"))["internal_errors_seen"] is True


@pytest_twisted.ensureDeferred
async def test_membership_is_checked_although_reading_the_policy_crashes(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    room_id = room_of(sandbox)
    sandbox.homeserver.ban(room_id, BOB)
    monkeypatch.setattr(Policies, "get", crash)
    with logged():
        answer = await sandbox.ask_token(BOB, room_id)
    assert (answer.code, content(answer)) == (403, NOT_A_MEMBER)


@pytest_twisted.ensureDeferred
async def test_the_limit_is_checked_although_looking_up_the_membership_crashes(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)
    monkeypatch.setattr(Members, "get", crash)
    with logged():
        answer = await sandbox.ask_token(BOB, room_id)
    assert (answer.code, content(answer)) == (403, FULL)
