# SPDX-License-Identifier: Apache-2.0
"""One deadline for a whole join: nobody waits longer, whoever hangs, and slow services disable no rule."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import Clock

from lotusguard.clients.http import Answer
from lotusguard.clients.waiting import Deadline
from lotusguard.guard.joins.callers import UNIDENTIFIED, Caller
from lotusguard.guard.joins.join import LEAST_LOOKUPS, Join
from lotusguard.guard.joins.lookups import Lookups
from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.sandbox.faults import Fault
from tests.calls import ALICE, BOB, CAROL, counted, room_of
from tests.conftest import StartSandbox, until
from tests.joins.helpers import EVE, FULL, NOT_A_MEMBER, ask, bodies, content, other_homeserver

LOOKUP, UPSTREAM = 1.0, 1.5
BUSY = 1.0
"""Seconds that a busy machine may add."""


async def timed(sandbox: Sandbox, user: str, room_id: str, **how: Any) -> tuple[Answer, float]:
    began = reactor.seconds()
    answer = await sandbox.ask_token(user, room_id, **how)
    return answer, reactor.seconds() - began


def members(sandbox: Sandbox, room_id: str, count: int) -> list[str]:
    """New members of a room."""
    users = [f"@member{number}:sandbox.local" for number in range(count)]
    for user in users:
        sandbox.homeserver.add_user(user[1:].partition(":")[0])
        sandbox.homeserver.join(room_id, user)
    return users


@pytest_twisted.ensureDeferred
async def test_everybody_is_answered_within_one_deadline_although_upstream_hangs(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(
        guard_reconcile_interval=3600, guard_lookup_timeout=LOOKUP, guard_upstream_timeout=UPSTREAM
    )
    room_id = room_of(sandbox, 1)
    users = members(sandbox, room_id, 6)
    sandbox.upstream.fault = Fault.hang()
    answers = await gatherResults([Deferred.fromCoroutine(timed(sandbox, user, room_id)) for user in users])
    assert {answer.code for answer, _ in answers} <= {503, 504}
    assert max(seconds for _, seconds in answers) < LOOKUP + UPSTREAM + 1 + BUSY
    for answer, _ in answers:
        assert answer.headers.getRawHeaders("access-control-allow-origin") is None


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("new", [False, True], ids=["sfu_get", "get_token"])
async def test_a_participant_does_not_wait_behind_requests_in_flight(sandbox: Sandbox, new: bool) -> None:
    room_id = room_of(sandbox, 2)
    await sandbox.enter(ALICE, room_id)
    sandbox.upstream.faults["sfu_get"] = Fault.hang()
    hanging = ask(sandbox, BOB, room_id)
    await until(lambda: len(bodies(sandbox)) == 2)
    sandbox.upstream.faults.clear()
    waiting = ask(sandbox, CAROL, room_id)
    answer = await ask(sandbox, ALICE, room_id, new=new, device="TABLET").addTimeout(10, reactor)
    assert answer.code == 200
    assert not waiting.called
    for left in (hanging, waiting):
        left.addErrback(lambda failure: None)
        left.cancel()


@pytest_twisted.ensureDeferred
async def test_callers_whom_nobody_has_verified_hold_no_seat(sandbox: Sandbox) -> None:
    """Anonymous requests, and ones whose homeserver hangs, keep nobody waiting while upstream checks them."""
    room_id = room_of(sandbox, 1)
    sandbox.upstream.faults["sfu_get"] = Fault.hang()
    openid = sandbox.homeserver.openid_token(BOB)
    doubtful = [openid | {"access_token": "made-up"}, openid | {"matrix_server_name": "hangs.example"}]
    hanging = [ask(sandbox, BOB, room_id, openid_token=token) for token in doubtful]
    await until(lambda: len(bodies(sandbox)) == 2)
    answer = await ask(sandbox, ALICE, room_id, new=True).addTimeout(10, reactor)
    assert answer.code == 200
    for left in hanging:
        left.addErrback(lambda failure: None)
        left.cancel()


@pytest_twisted.ensureDeferred
async def test_the_limit_holds_although_the_homeserver_hangs(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_lookup_timeout=3, guard_policy_ttl=0.001)
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)
    openid = sandbox.homeserver.openid_token(BOB)
    assert (await sandbox.ask_token(BOB, room_id, openid_token=openid)).code == 403
    sandbox.homeserver.fault = Fault.hang()
    answer = await sandbox.ask_token(BOB, room_id, openid_token=openid)
    assert (answer.code, content(answer)) == (403, FULL)
    assert counted(sandbox, "fail_open_total", check="limit", reason="timeout") == 0


@pytest_twisted.ensureDeferred
async def test_a_homeserver_that_verifies_its_users_slowly_gets_nobody_in_unchecked(
    start_sandbox: StartSandbox,
) -> None:
    """Upstream waits for the user's own homeserver. The time that the guard needs afterwards is not used up."""
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_lookup_timeout=2, guard_upstream_timeout=4)
    async with other_homeserver(sandbox) as other:
        room_id = room_of(sandbox)
        sandbox.homeserver.join(room_id, EVE)
        sandbox.homeserver.ban(room_id, EVE)
        other.fault = Fault.delay(3.5)
        answer = await sandbox.ask_token(EVE, room_id, openid_token=other.openid_token(EVE))
        assert (answer.code, content(answer)) == (403, NOT_A_MEMBER)
        other.fault = Fault.delay(6)
        assert (await sandbox.ask_token(EVE, room_id, openid_token=other.openid_token(EVE))).code == 504


@pytest_twisted.ensureDeferred
async def test_a_dry_run_goes_on_when_the_deadline_passes_behind_a_request_in_flight(
    start_sandbox: StartSandbox,
) -> None:
    sandbox = await start_sandbox(
        guard_reconcile_interval=3600, guard_dry_run=True, guard_lookup_timeout=1, guard_upstream_timeout=1
    )
    room_id = room_of(sandbox, 1)
    sandbox.upstream.fault = Fault.hang()
    answers = [ask(sandbox, user, room_id).addTimeout(20, reactor) for user in (ALICE, BOB)]
    assert [answer.code for answer in await gatherResults(answers)] == [504, 504]


@pytest.mark.parametrize("has_existed", [True, False])
@pytest_twisted.ensureDeferred
async def test_a_caller_who_is_verified_slowly_takes_no_more_time_than_all_lookups_have(has_existed: bool) -> None:
    """A part of the lookups' time is left for those that follow when upstream names the caller."""
    clock, asked = Clock(), []

    class SlowCallers:
        async def identify(self, request: Any, deadline: Deadline) -> Caller:
            asked.append(deadline.at)
            clock.advance(deadline.left())
            return UNIDENTIFIED

    nothing: Any = SimpleNamespace(
        identify=SlowCallers().identify, in_memory=lambda room_id: None, has_existed=lambda room_id: has_existed
    )
    nothing.get_anew = lambda *_: Deferred.fromCoroutine(SlowCallers().identify(None, Deadline(clock, 0.0)))
    nothing.began = 0.0
    log: Any = SimpleNamespace(stage=lambda *_: nullcontext(), failure=lambda *_: None)
    join = Join(nothing, "!r:s", nothing, log, Deadline(clock, 60.0), Deadline(clock, 6.0), 6.0, False)
    await Lookups(nothing, nothing, nothing, asks_membership=False).all_of(join)
    with join.waiting():
        clock.advance(10)
    assert max(asked) <= 6.0 * (1 - LEAST_LOOKUPS)
    assert join.lookups.left() >= 6.0 * LEAST_LOOKUPS - 1e-9
    assert clock.seconds() - 10 + join.lookups.left() <= 6.0 + 1e-9
