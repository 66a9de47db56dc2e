# SPDX-License-Identifier: Apache-2.0
"""Participants without a seat are removed from a full room, but never those who were or may have been in it before."""

from __future__ import annotations

import json
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred

from lotusguard.clients.http import Answer
from lotusguard.rules.jwt import SfuKey
from lotusguard.sandbox.demo.sandbox import KEY, SECRET, Sandbox
from lotusguard.sandbox.faults import Fault
from lotusguard.sandbox.livekit.participant import Participant
from tests.calls import (
    ALICE,
    BOB,
    CAROL,
    DAVE,
    change_policy,
    counted,
    crashes,
    logged,
    named,
    old_token,
    put_policy,
    room_of,
    seen_in,
)
from tests.conftest import StartSandbox, until


async def at_rest(sandbox: Sandbox) -> None:
    """Wait until every webhook has been delivered and enforced."""
    await sandbox.livekit.drained()
    await sandbox.guard.enforcement.worker.idle()


def removed(sandbox: Sandbox) -> list[str]:
    """The users removed so far."""
    return [
        change.identity.split(":")[0] for change in sandbox.livekit.update_log if change.method == "RemoveParticipant"
    ]


async def enforce_again(sandbox: Sandbox, *whose: Participant) -> None:
    for who in whose:
        sandbox.guard.enforcement.enforce(who.room.name)
    await at_rest(sandbox)


# -- removed ---------------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_a_guard_that_knew_no_limit_gives_nobody_a_seat_when_a_moderator_acts_through_it(
    start_sandbox: StartSandbox,
) -> None:
    """One of several guards may not have read the policy of a room for a long time: another one enforces it."""
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_policy_ttl=0.0001)
    room_id = room_of(sandbox)
    await sandbox.enter(ALICE, room_id)
    await at_rest(sandbox)
    sandbox.livekit.webhooks.urls.clear()
    put_policy(sandbox, room_id, 1)
    late = sandbox.livekit.connect(old_token(BOB, room_id))
    late.room.refresh_listed()
    body = {"room_id": room_id, "user": CAROL, "action": "mute"}
    assert (await sandbox.operator("POST", "/moderate", json.dumps(body).encode())).code == 404
    await enforce_again(sandbox, late)
    assert removed(sandbox) == ["@bob"]


@pytest_twisted.ensureDeferred
async def test_an_old_token_gives_no_seat_in_a_full_room_however_often_it_is_used(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    alice = await sandbox.enter(ALICE, room_id)
    with logged() as events:
        for times in (1, 2, 3):
            bob = sandbox.livekit.connect(old_token(BOB, room_id))
            await until(lambda bob=bob: not bob.connected)  # type: ignore[misc]
            await at_rest(sandbox)
            assert counted(sandbox, "members_removed_total", reason="full") == times
    assert alice.connected
    assert removed(sandbox) == ["@bob"] * 3
    assert len(named(events, "removed")) == 3
    assert await seen_in(sandbox, room_id) == [(ALICE, True)]


@pytest_twisted.ensureDeferred
async def test_identities_of_another_issuer_count_as_users_of_their_own(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id, new=True)
    guest = sandbox.livekit.connect(old_token("aGFzaGVk", room_id))
    await until(lambda: not guest.connected)


@pytest_twisted.ensureDeferred
async def test_an_arrival_with_an_old_token_takes_a_free_seat(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 2)
    await sandbox.enter(ALICE, room_id)
    bob = sandbox.livekit.connect(old_token(BOB, room_id))
    await at_rest(sandbox)
    assert bob.connected
    assert (await sandbox.ask_token(CAROL, room_id)).code == 403


@pytest_twisted.ensureDeferred
async def test_an_old_token_does_not_use_the_hold_of_an_issued_one(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    answer = await sandbox.ask_token(ALICE, room_id)
    bob = sandbox.livekit.connect(old_token(BOB, room_id))
    await until(lambda: not bob.connected)
    alice = sandbox.livekit.connect(json.loads(answer.body)["jwt"])
    await at_rest(sandbox)
    assert alice.connected


@pytest_twisted.ensureDeferred
async def test_reconciling_removes_arrivals_that_no_webhook_reported(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=0.1)
    room_id = room_of(sandbox, 1)
    alice = await sandbox.enter(ALICE, room_id)
    await at_rest(sandbox)
    sandbox.livekit.webhooks.urls[:] = []
    alice.room.refresh_listed()
    bob = sandbox.livekit.connect(old_token(BOB, room_id))
    await until(lambda: not bob.connected)
    assert alice.connected


@pytest_twisted.ensureDeferred
async def test_of_several_unreported_arrivals_the_first_has_the_seat(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 2)
    alice = await sandbox.enter(ALICE, room_id)
    await at_rest(sandbox)
    sandbox.livekit.webhooks.urls[:] = []
    now = sandbox.livekit.now
    sandbox.livekit.now = lambda: now() + 1
    bob = sandbox.livekit.connect(old_token(BOB, room_id))
    sandbox.livekit.now = lambda: now() + 2
    carol = sandbox.livekit.connect(old_token(CAROL, room_id))
    await enforce_again(sandbox, alice)
    assert bob.connected
    assert not carol.connected


# -- never removed ---------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_further_devices_and_connections_of_an_occupant_stay(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)
    further = [
        sandbox.livekit.connect(old_token(ALICE, room_id, device="TABLET")),
        sandbox.livekit.connect(old_token(ALICE, room_id), publish="screen"),
        await sandbox.enter(ALICE, room_id, new=True),
    ]
    await at_rest(sandbox)
    assert all(who.connected for who in further)
    assert removed(sandbox) == []


@pytest.mark.parametrize("kind", ["egress", "agent"])
@pytest_twisted.ensureDeferred
async def test_recorders_and_agents_take_no_seat_and_are_not_removed(sandbox: Sandbox, kind: str) -> None:
    room_id = room_of(sandbox, 1)
    key = SfuKey(KEY, SECRET)
    recorder = sandbox.livekit.connect(key.sign(key.read(old_token("recorder", room_id)) | {"kind": kind}))
    await at_rest(sandbox)
    alice = await sandbox.enter(ALICE, room_id)
    await enforce_again(sandbox, alice)
    assert recorder.connected
    assert alice.connected
    assert await seen_in(sandbox, room_id) == [(ALICE, True)]


@pytest_twisted.ensureDeferred
async def test_occupants_stay_when_the_limit_is_lowered(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 3)
    everybody = [await sandbox.enter(user, room_id) for user in (ALICE, BOB, CAROL)]
    await at_rest(sandbox)
    for limit in (2, 1):
        await change_policy(sandbox, room_id, limit)
        await enforce_again(sandbox, *everybody)
    assert all(who.connected for who in everybody)
    late = sandbox.livekit.connect(old_token(DAVE, room_id))
    await until(lambda: not late.connected)


@pytest_twisted.ensureDeferred
async def test_occupants_stay_when_a_limit_is_set_again(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    everybody = [await sandbox.enter(ALICE, room_id)]
    await at_rest(sandbox)
    await change_policy(sandbox, room_id)
    await enforce_again(sandbox, *everybody)
    everybody += [await sandbox.enter(BOB, room_id), sandbox.livekit.connect(old_token(CAROL, room_id))]
    await at_rest(sandbox)
    await change_policy(sandbox, room_id, 1)
    await enforce_again(sandbox, *everybody)
    assert all(who.connected for who in everybody)
    assert (await sandbox.ask_token(DAVE, room_id)).code == 403
    late = sandbox.livekit.connect(old_token(DAVE, room_id))
    await until(lambda: not late.connected)
    assert removed(sandbox) == ["@dave"]


@pytest_twisted.ensureDeferred
async def test_occupants_stay_over_a_restart_of_the_guard(start_sandbox: StartSandbox, tmp_path: Any) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_state_dir=tmp_path)
    room_id = room_of(sandbox, 3)
    everybody = [await sandbox.enter(user, room_id) for user in (ALICE, BOB, CAROL)]
    await at_rest(sandbox)
    await sandbox.guard.stopService()
    put_policy(sandbox, room_id, 1)
    await sandbox.start_guard()
    await enforce_again(sandbox, *everybody)
    assert all(who.connected for who in everybody)
    late = sandbox.livekit.connect(old_token(DAVE, room_id))
    await until(lambda: not late.connected)


@pytest_twisted.ensureDeferred
async def test_overflow_allow_only_logs(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_overflow="allow")
    room_id = room_of(sandbox, 1)
    alice = await sandbox.enter(ALICE, room_id)
    with logged() as events:
        bob = sandbox.livekit.connect(old_token(BOB, room_id))
        await at_rest(sandbox)
        await enforce_again(sandbox, alice, bob)
    assert bob.connected
    assert not sandbox.livekit.asked["RemoveParticipant"]
    assert counted(sandbox, "dry_run_skipped_total", action="remove") == 1
    assert counted(sandbox, "members_removed_total", reason="full") == 0
    assert [bob.identity in text for text in named(events, "skipped")] == [True]
    assert (await sandbox.ask_token(CAROL, room_id)).code == 403  # requests are still refused
    assert (await sandbox.ask_token(BOB, room_id)).code == 200  # but not those of participants


# -- while something is unknown -------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_nobody_is_removed_while_participants_cannot_be_listed(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    alice = await sandbox.enter(ALICE, room_id)
    await at_rest(sandbox)
    sandbox.livekit.faults["ListParticipants"] = Fault.status(500)
    bob = sandbox.livekit.connect(old_token(BOB, room_id))
    await at_rest(sandbox)
    assert counted(sandbox, "enforcement_failures_total", action="list participants", reason="status_500")
    assert bob.connected
    del sandbox.livekit.faults["ListParticipants"]
    await enforce_again(sandbox, alice)
    assert not bob.connected


@pytest_twisted.ensureDeferred
async def test_participants_who_arrived_while_the_policy_was_unknown_stay(
    start_sandbox: StartSandbox,
) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600)
    room_id = room_of(sandbox, 1)
    alice = await sandbox.enter(ALICE, room_id)
    await at_rest(sandbox)
    sandbox.homeserver.faults["room_state"] = Fault.status(500)
    sandbox.guard.policies.forget(room_id)  # as if it were too old to be used
    bob = await sandbox.enter(BOB, room_id)
    await at_rest(sandbox)
    del sandbox.homeserver.faults["room_state"]
    await change_policy(sandbox, room_id, 1)
    await enforce_again(sandbox, alice, bob)
    assert await seen_in(sandbox, room_id) == [(ALICE, True), (BOB, True)]
    assert bob.connected
    late = sandbox.livekit.connect(old_token(CAROL, room_id))
    await until(lambda: not late.connected)


async def in_another_slot(sandbox: Sandbox, room_id: str) -> Participant:
    """Alice has the only seat, in a slot of the room that others do not use."""
    assert (await sandbox.ask_token(ALICE, room_id)).code == 200  # so the guard knows the usual slot
    answer = await sandbox.ask_token(ALICE, room_id, new=True, slot_id="m.call#second")
    alice = sandbox.livekit.connect(json.loads(answer.body)["jwt"])
    await at_rest(sandbox)
    return alice


@pytest_twisted.ensureDeferred
async def test_slots_of_a_room_share_its_seats(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    alice = await in_another_slot(sandbox, room_id)
    bob = sandbox.livekit.connect(old_token(BOB, room_id))
    await until(lambda: not bob.connected)
    assert alice.connected
    assert alice.room.name != bob.room.name


@pytest_twisted.ensureDeferred
async def test_nobody_is_removed_while_another_slot_cannot_be_listed(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    alice = await in_another_slot(sandbox, room_id)
    sandbox.livekit.room_faults[alice.room.name] = Fault.status(500)
    bob = sandbox.livekit.connect(old_token(BOB, room_id))
    await at_rest(sandbox)
    assert bob.connected
    assert counted(sandbox, "enforcement_failures_total", action="list participants", reason="status_500") >= 1
    sandbox.livekit.room_faults.clear()
    await enforce_again(sandbox, bob)
    assert not bob.connected


@pytest_twisted.ensureDeferred
async def test_a_session_that_vanished_from_another_slot_keeps_its_seat_for_a_while(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    alice = await in_another_slot(sandbox, room_id)
    sandbox.livekit.lose(alice.room.name, alice.identity)
    bob = sandbox.livekit.connect(old_token(BOB, room_id))
    await until(lambda: not bob.connected)
    await at_rest(sandbox)
    assert await seen_in(sandbox, room_id) == []
    assert (await sandbox.ask_token(ALICE, room_id)).code == 200


@pytest_twisted.ensureDeferred
async def test_a_pending_hold_removes_nobody(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_upstream_timeout=3)
    room_id = room_of(sandbox, 1)
    sandbox.upstream.faults["sfu_get"] = Fault.hang(times=1)
    asking: Deferred[Answer] = Deferred.fromCoroutine(sandbox.ask_token(ALICE, room_id))
    await until(lambda: sandbox.upstream.asked["sfu_get"] == 1)
    bob = sandbox.livekit.connect(old_token(BOB, room_id))
    await at_rest(sandbox)
    await enforce_again(sandbox, bob)
    assert not asking.called
    assert bob.connected
    assert (await asking).code == 504
    await enforce_again(sandbox, bob)
    assert bob.connected  # the join failed, so the seat is Bob's
    assert await seen_in(sandbox, room_id) == [(BOB, True)]


@pytest_twisted.ensureDeferred
async def test_an_issued_hold_removes_an_arrival_without_a_seat(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    sandbox.upstream.faults["sfu_get"] = Fault.delay(0.2, times=1)
    asking: Deferred[Answer] = Deferred.fromCoroutine(sandbox.ask_token(ALICE, room_id))
    await until(lambda: sandbox.upstream.asked["sfu_get"] == 1)
    bob = sandbox.livekit.connect(old_token(BOB, room_id))
    await at_rest(sandbox)
    assert bob.connected
    assert (await asking).code == 200
    await enforce_again(sandbox, bob)
    assert not bob.connected


# -- removals that fail -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault.status(500), "status_500"),
        (Fault.status(503, b'{"code":"unavailable","msg":"no response from servers"}'), "node_gone"),
        (Fault.status(503, b"<html>a proxy's"), "status_503"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_failed_removal_is_retried(sandbox: Sandbox, fault: Fault, reason: str) -> None:
    room_id = room_of(sandbox, 1)
    alice = await sandbox.enter(ALICE, room_id)
    await at_rest(sandbox)
    sandbox.livekit.faults["RemoveParticipant"] = fault
    bob = sandbox.livekit.connect(old_token(BOB, room_id))
    await at_rest(sandbox)
    assert bob.connected
    assert (BOB, False) in await seen_in(sandbox, room_id)
    del sandbox.livekit.faults["RemoveParticipant"]
    await enforce_again(sandbox, alice)
    assert not bob.connected
    assert counted(sandbox, "enforcement_failures_total", action="remove", reason=reason) == 1
    assert counted(sandbox, "members_removed_total", reason="full") == 1


@pytest_twisted.ensureDeferred
async def test_a_404_of_a_proxy_empties_no_room_and_ends_no_hold(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    alice = await sandbox.enter(ALICE, room_id)
    await at_rest(sandbox)
    sandbox.livekit.faults["ListParticipants"] = Fault.status(404, b"404 page not found")
    assert (await sandbox.ask_token(BOB, room_id)).code == 200
    await enforce_again(sandbox, alice)
    assert counted(sandbox, "fail_open_total", check="limit", reason="status_404") == 1
    del sandbox.livekit.faults["ListParticipants"]
    await enforce_again(sandbox, alice)
    assert alice.connected
    assert await seen_in(sandbox, room_id) == [(ALICE, True)]


@pytest_twisted.ensureDeferred
async def test_a_stale_entry_is_not_a_failure_and_does_not_stop_other_removals(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    alice = await sandbox.enter(ALICE, room_id)
    await at_rest(sandbox)
    sandbox.livekit.add_stale(alice.room.name, f"{CAROL}:PHONE", 404)
    with logged() as events:
        bob = sandbox.livekit.connect(old_token(BOB, room_id))
        await until(lambda: not bob.connected)
        await at_rest(sandbox)
    assert crashes(events) == []
    assert counted(sandbox, "members_removed_total", reason="full") == 1
    assert alice.connected


@pytest_twisted.ensureDeferred
async def test_a_seat_that_becomes_free_during_removals_is_given_to_the_next(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 2)
    await sandbox.enter(ALICE, room_id)
    bob = await sandbox.enter(BOB, room_id)
    await at_rest(sandbox)
    sandbox.livekit.faults["RemoveParticipant"] = Fault.status(500)
    carol, dave = (sandbox.livekit.connect(old_token(user, room_id)) for user in (CAROL, DAVE))
    await at_rest(sandbox)
    assert await seen_in(sandbox, room_id) == [(ALICE, True), (BOB, True), (CAROL, False), (DAVE, False)]
    sandbox.livekit.faults["RemoveParticipant"] = Fault.delay(0.3, times=1)
    sandbox.guard.enforcement.enforce(carol.room.name)
    await until(lambda: bool(sandbox.livekit.in_flight) and sandbox.livekit.faults["RemoveParticipant"].times == 0)
    bob.room.remove(bob, 1)
    await at_rest(sandbox)
    assert [carol.connected, dave.connected].count(True) == 1
    await enforce_again(sandbox, dave)
    assert counted(sandbox, "members_removed_total", reason="full") == 1
    assert len(await seen_in(sandbox, room_id)) == 2
