# SPDX-License-Identifier: Apache-2.0
"""What a request proves about its caller, and what its answer may not tell others."""

from __future__ import annotations

from typing import Any

import pytest
import pytest_twisted

from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.sandbox.faults import Fault
from tests.calls import ALICE, BOB, CAROL, counted, room_of
from tests.conftest import StartSandbox
from tests.joins.helpers import FULL, content


@pytest_twisted.ensureDeferred
async def test_a_participant_who_asks_again_is_recognised_after_all_memory_was_lost(
    start_sandbox: StartSandbox,
) -> None:
    """The identity is a hash. Only the participant's own request says whose it is."""
    sandbox = await start_sandbox(guard_reconcile_interval=3600)
    room_id = room_of(sandbox, 1)
    member: dict[str, Any] = {"new": True, "member_id": "m1"}
    alice = await sandbox.enter(ALICE, room_id, **member)
    assert ALICE not in alice.identity
    await sandbox.livekit.drained()
    await sandbox.guard.stopService()
    await sandbox.start_guard()
    other = await sandbox.ask_token(BOB, room_id, **member)
    assert (other.code, content(other)) == (403, FULL)
    assert (await sandbox.ask_token(ALICE, room_id, **member)).code == 200
    assert (await sandbox.ask_token(CAROL, room_id)).code == 403
    assert alice.connected


@pytest_twisted.ensureDeferred
async def test_a_forged_token_causes_the_same_calls_whoever_it_names(sandbox: Sandbox) -> None:
    """Else the calls, or their time, would tell who is in a full room."""
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)
    await sandbox.livekit.drained()
    services = (sandbox.homeserver, sandbox.livekit, sandbox.upstream)

    async def calls_for(user: str) -> list[list[str]]:
        before = [len(service.seen) for service in services]
        forged = sandbox.homeserver.openid_token(user) | {"access_token": f"forged for {user}"}
        assert (await sandbox.ask_token(user, room_id, new=True, openid_token=forged)).code == 401
        return [
            [asked.path for asked in list(service.seen)[count:]]
            for service, count in zip(services, before, strict=True)
        ]

    for_participant, for_stranger = await calls_for(ALICE), await calls_for(BOB)
    assert for_participant == for_stranger
    assert for_participant[1] == []  # LiveKit is not asked for somebody who is not verified


@pytest.mark.parametrize("body", [b"\x1f\x8b\x08\x00 not JSON", b'{"jwt": '])
@pytest_twisted.ensureDeferred
async def test_an_answer_that_cannot_be_decoded_counts_as_not_enforced(sandbox: Sandbox, body: bytes) -> None:
    room_id = room_of(sandbox, 1)
    sandbox.upstream.fault = Fault.invalid_response(body)
    answer = await sandbox.ask_token(ALICE, room_id)
    assert (answer.code, answer.body) == (200, body)
    assert counted(sandbox, "fail_open_total", check="token", reason="undecodable_answer") == 1
