# SPDX-License-Identifier: Apache-2.0
"""Seats after departures and restarts: kept after a lost connection, free at once after a deliberate leave."""

from __future__ import annotations

import json
from typing import Any

import pytest
import pytest_twisted

from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.sandbox.livekit.participant import Participant
from tests.calls import ALICE, BOB, CAROL, old_token, room_of
from tests.conftest import StartSandbox, until

INVOLUNTARY = (
    "SERVER_SHUTDOWN", "MIGRATION", "STATE_MISMATCH", "JOIN_FAILURE", "SIGNAL_CLOSE", "CONNECTION_TIMEOUT",
    "MEDIA_FAILURE", "DUPLICATE_IDENTITY", "UNKNOWN_REASON",
)  # fmt: skip
CHOSEN = ("CLIENT_INITIATED", "PARTICIPANT_REMOVED", "ROOM_DELETED")


async def enforced(sandbox: Sandbox) -> None:
    """Wait until everything that was reported has been enforced."""
    await sandbox.livekit.drained()
    await sandbox.guard.enforcement.worker.idle()


async def only_seat(sandbox: Sandbox, **how: Any) -> tuple[str, str, Participant]:
    """A room with one seat, taken by Alice. :return: the room, Alice's token, Alice."""
    room_id = room_of(sandbox, 1)
    token = json.loads((await sandbox.ask_token(ALICE, room_id, **how)).body)["jwt"]
    alice = sandbox.livekit.connect(token)
    await enforced(sandbox)
    return room_id, token, alice


async def returns(sandbox: Sandbox, token: str) -> None:
    """Alice reconnects with her token and is not removed."""
    again = sandbox.livekit.connect(token)
    await enforced(sandbox)
    assert again.connected


@pytest.mark.parametrize("reason", INVOLUNTARY)
@pytest_twisted.ensureDeferred
async def test_a_seat_is_kept_after_a_departure_that_nobody_chose(sandbox: Sandbox, reason: str) -> None:
    room_id, token, alice = await only_seat(sandbox)
    sandbox.livekit.disconnect(alice.room.name, alice.identity, reason)
    await enforced(sandbox)
    assert (await sandbox.ask_token(BOB, room_id)).code == 403
    late = sandbox.livekit.connect(old_token(BOB, room_id))
    await until(lambda: not late.connected)
    await returns(sandbox, token)


@pytest.mark.parametrize("reason", CHOSEN)
@pytest_twisted.ensureDeferred
async def test_a_seat_is_free_at_once_after_a_departure_by_choice(sandbox: Sandbox, reason: str) -> None:
    room_id, _, alice = await only_seat(sandbox)
    sandbox.livekit.disconnect(alice.room.name, alice.identity, reason)
    await enforced(sandbox)
    assert (await sandbox.ask_token(BOB, room_id)).code == 200


@pytest.mark.parametrize("graceful", [True, False])
@pytest_twisted.ensureDeferred
async def test_seats_are_kept_over_a_restart_of_livekit(sandbox: Sandbox, graceful: bool) -> None:
    room_id, token, _ = await only_seat(sandbox)
    sandbox.livekit.restart(graceful=graceful)
    await enforced(sandbox)
    assert (await sandbox.ask_token(BOB, room_id)).code == 403
    await returns(sandbox, token)


@pytest_twisted.ensureDeferred
async def test_a_seat_is_kept_for_a_session_that_vanished_between_two_listings(sandbox: Sandbox) -> None:
    room_id, token, alice = await only_seat(sandbox)
    sandbox.livekit.lose(alice.room.name, alice.identity)
    sandbox.guard.enforcement.enforce(alice.room.name)
    await enforced(sandbox)
    assert (await sandbox.ask_token(BOB, room_id)).code == 403
    await returns(sandbox, token)


@pytest_twisted.ensureDeferred
async def test_an_unused_token_of_the_other_route_keeps_no_seat_after_hanging_up(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    assert (await sandbox.ask_token(ALICE, room_id, new=True)).code == 200
    alice = await sandbox.enter(ALICE, room_id)
    await enforced(sandbox)
    sandbox.livekit.disconnect(alice.room.name, alice.identity)
    await enforced(sandbox)
    assert (await sandbox.ask_token(BOB, room_id)).code == 200


@pytest_twisted.ensureDeferred
async def test_a_moment_in_the_call_by_the_other_route_does_not_cost_the_seat(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    hashed = await sandbox.enter(ALICE, room_id, new=True)
    answer = await sandbox.ask_token(ALICE, room_id)
    await enforced(sandbox)
    sandbox.livekit.disconnect(hashed.room.name, hashed.identity)
    await enforced(sandbox)
    assert (await sandbox.ask_token(BOB, room_id)).code == 403
    alice = sandbox.livekit.connect(json.loads(answer.body)["jwt"])
    await enforced(sandbox)
    assert alice.connected


@pytest.mark.parametrize("new", [False, True])
@pytest_twisted.ensureDeferred
async def test_tokens_asked_for_after_the_arrival_keep_no_seat_after_hanging_up(sandbox: Sandbox, new: bool) -> None:
    """Element Call asks for two more tokens just after it has connected."""
    how: dict[str, Any] = {"new": True, "member_id": "uuid"} if new else {}
    room_id, _, alice = await only_seat(sandbox, **how)
    for _ in range(2):
        assert (await sandbox.ask_token(ALICE, room_id, **how)).code == 200
    sandbox.livekit.disconnect(alice.room.name, alice.identity)
    await enforced(sandbox)
    assert (await sandbox.ask_token(BOB, room_id)).code == 200


@pytest_twisted.ensureDeferred
async def test_participants_who_arrived_during_a_restart_have_no_prior_claim_to_a_seat(
    start_sandbox: StartSandbox, tmp_path: Any
) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_state_dir=tmp_path)
    room_id, _, alice = await only_seat(sandbox)
    await sandbox.guard.stopService()
    late = sandbox.livekit.connect(old_token(BOB, room_id))
    late.room.refresh_listed()
    await sandbox.start_guard(guard_reconcile_interval=0.1)
    await until(lambda: not late.connected)
    assert alice.connected


@pytest_twisted.ensureDeferred
async def test_occupants_from_before_the_first_start_stay(start_sandbox: StartSandbox, tmp_path: Any) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600)
    await sandbox.guard.stopService()
    room_id = room_of(sandbox, 1)
    now = sandbox.livekit.now
    sandbox.livekit.now = lambda: now() - 60
    older = [sandbox.livekit.connect(old_token(user, room_id)) for user in (ALICE, BOB)]
    sandbox.livekit.now = now
    await sandbox.start_guard(guard_state_dir=tmp_path)
    assert (await sandbox.ask_token(CAROL, room_id)).code == 403
    sandbox.guard.enforcement.enforce(older[0].room.name)
    await sandbox.guard.enforcement.worker.idle()  # webhooks of the time before come half a minute later
    assert all(one.connected for one in older)
