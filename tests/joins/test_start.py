# SPDX-License-Identifier: Apache-2.0
"""Who may join by power level, who may start a call, and who gets in past the limit."""

from __future__ import annotations

import json
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import gatherResults

from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.sandbox.faults import Fault
from tests.calls import ALICE, BOB, CAROL, DAVE, counted, old_token, room_of
from tests.conftest import StartSandbox, until
from tests.joins.helpers import FULL, NOT_STARTED, ask, calls_of, claims_of, content


def permit(sandbox: Sandbox, room_id: str, **permissions: Any) -> None:
    """Write ``io.lotus.call_permissions``. Alice has power level 100, everybody else 0."""
    sandbox.homeserver.set_state(room_id, "io.lotus.call_permissions", permissions)


async def push(sandbox: Sandbox, room_id: str) -> None:
    answer = await sandbox.operator("POST", "/policy-changed", json.dumps({"room_id": room_id}).encode())
    assert answer.code == 202


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("new", [False, True], ids=["sfu_get", "get_token"])
async def test_join_needs_its_level_or_an_exception(sandbox: Sandbox, new: bool) -> None:
    room_id = room_of(sandbox)
    permit(sandbox, room_id, join=50, users={BOB: {"join": True}, ALICE: {"join": False}})
    answers = {user: await sandbox.ask_token(user, room_id, new=new) for user in (ALICE, BOB, CAROL)}
    assert {user: answer.code for user, answer in answers.items()} == {ALICE: 403, BOB: 200, CAROL: 403}
    assert content(answers[CAROL])["error"] == "You may not join calls in this room."
    assert {issued.user for issued in sandbox.upstream.issued} == {BOB}


@pytest_twisted.ensureDeferred
async def test_a_promotion_counts_at_once_without_a_push(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox)
    permit(sandbox, room_id, join=50)
    assert (await sandbox.ask_token(BOB, room_id)).code == 403
    sandbox.homeserver.set_state(room_id, "m.room.power_levels", {"users": {ALICE: 100, BOB: 50}})
    assert (await sandbox.ask_token(BOB, room_id)).code == 200


@pytest_twisted.ensureDeferred
async def test_sources_are_granted_by_level(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox)
    permit(sandbox, room_id, microphone=50, camera=50, screen_share=50, users={CAROL: {"microphone": True}})
    alice, bob, carol = [claims_of(await sandbox.ask_token(user, room_id))["video"] for user in (ALICE, BOB, CAROL)]
    assert "canPublishSources" not in alice
    assert (bob["canPublish"], bob["canPublishData"]) == (False, True)
    assert carol["canPublishSources"] == ["microphone"]


@pytest_twisted.ensureDeferred
async def test_a_call_is_started_by_somebody_who_may_and_others_follow(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox)
    permit(sandbox, room_id, start=50)
    refused = await sandbox.ask_token(BOB, room_id)
    assert (refused.code, content(refused)) == (403, NOT_STARTED)
    assert not sandbox.upstream.seen
    assert (await sandbox.ask_token(ALICE, room_id)).code == 200  # she holds a seat, and has not arrived yet
    assert (await sandbox.ask_token(BOB, room_id)).code == 200


@pytest_twisted.ensureDeferred
async def test_a_call_in_another_slot_counts_as_started(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox)
    permit(sandbox, room_id, start=50)
    await sandbox.enter(ALICE, room_id, new=True, slot_id="m.call#OTHER")
    assert (await sandbox.ask_token(BOB, room_id)).code == 200


@pytest_twisted.ensureDeferred
async def test_a_participant_asks_again_although_the_starter_has_left(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox)
    permit(sandbox, room_id, start=50)
    alice = await sandbox.enter(ALICE, room_id)
    await sandbox.enter(BOB, room_id, new=True)
    sandbox.livekit.disconnect(alice.room.name, alice.identity)
    await sandbox.livekit.drained()
    assert (await sandbox.ask_token(BOB, room_id, device="TABLET")).code == 200
    assert (await sandbox.ask_token(CAROL, room_id)).code == 200  # the call has not ended


@pytest_twisted.ensureDeferred
async def test_somebody_who_came_with_an_old_token_does_not_start_a_call(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600)
    room_id = room_of(sandbox)
    permit(sandbox, room_id, start=50)
    assert (await sandbox.ask_token(CAROL, room_id)).code == 403  # the room has been listed, empty
    sandbox.livekit.connect(old_token(BOB, room_id))
    await sandbox.livekit.drained()
    answer = await sandbox.ask_token(CAROL, room_id)
    assert (answer.code, content(answer)) == (403, NOT_STARTED)


@pytest_twisted.ensureDeferred
async def test_a_member_who_asks_while_the_starters_request_is_in_flight_is_let_in(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox)
    permit(sandbox, room_id, start=50)
    sandbox.upstream.faults["sfu_get"] = Fault.delay(0.5, times=1)
    alice = ask(sandbox, ALICE, room_id)
    await until(lambda: sandbox.upstream.seen)
    bob = ask(sandbox, BOB, room_id)
    assert [answer.code for answer in await gatherResults([alice, bob])] == [200, 200]


@pytest_twisted.ensureDeferred
async def test_members_who_arrive_together_share_one_decision_about_the_start(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox)
    permit(sandbox, room_id, start=50)
    await sandbox.ask_token(BOB, room_id)
    listings = calls_of(sandbox, "ListParticipants")
    answers = await gatherResults([ask(sandbox, user, room_id) for user in (BOB, CAROL, DAVE) * 10])
    assert {answer.code for answer in answers} == {403}
    assert calls_of(sandbox, "ListParticipants") - listings <= 10


@pytest_twisted.ensureDeferred
async def test_the_start_is_enforced_although_the_homeserver_hangs(start_sandbox: StartSandbox) -> None:
    """The last known policy serves, and LiveKit has time left to answer."""
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_lookup_timeout=3, guard_policy_ttl=0.001)
    room_id = room_of(sandbox)
    permit(sandbox, room_id, start=50)
    openid = sandbox.homeserver.openid_token(BOB)
    assert (await sandbox.ask_token(BOB, room_id, openid_token=openid)).code == 403
    for route in ("room_state", "user_joined_rooms", "user_memberships"):
        sandbox.homeserver.faults[route] = Fault.hang()
    answer = await sandbox.ask_token(BOB, room_id, openid_token=openid)
    assert (answer.code, content(answer)) == (403, NOT_STARTED)


@pytest_twisted.ensureDeferred
async def test_bypass_limit_enters_a_full_room_and_takes_no_seat(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    permit(sandbox, room_id, bypass_limit=50)
    bob = await sandbox.enter(BOB, room_id)
    await sandbox.enter(ALICE, room_id)
    answer = await sandbox.ask_token(CAROL, room_id)
    assert (answer.code, content(answer)) == (403, FULL)
    sandbox.livekit.disconnect(bob.room.name, bob.identity)
    await sandbox.livekit.drained()
    assert (await sandbox.ask_token(CAROL, room_id)).code == 200


@pytest_twisted.ensureDeferred
async def test_without_bypass_limit_nobody_enters_a_full_room(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    permit(sandbox, room_id, microphone=0)
    await sandbox.enter(BOB, room_id)
    assert (await sandbox.ask_token(ALICE, room_id)).code == 403


@pytest_twisted.ensureDeferred
async def test_a_demoted_user_keeps_their_place_past_the_limit(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    permit(sandbox, room_id, users={CAROL: {"bypass_limit": True}})
    await sandbox.enter(BOB, room_id)
    carol = await sandbox.enter(CAROL, room_id)
    permit(sandbox, room_id)
    await push(sandbox, room_id)
    await sandbox.guard.enforcement.worker.idle()
    assert carol.connected
    assert (await sandbox.ask_token(CAROL, room_id)).code == 200
    assert (await sandbox.ask_token(DAVE, room_id)).code == 403


@pytest_twisted.ensureDeferred
async def test_a_malformed_permission_is_ignored_by_itself_and_counted_once(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox)
    permit(sandbox, room_id, join="50", camera=50, users={BOB: {"camera": 1}})
    video = claims_of(await sandbox.ask_token(BOB, room_id))["video"]
    assert video["canPublishSources"] == ["microphone", "screen_share", "screen_share_audio"]
    await push(sandbox, room_id)
    await sandbox.ask_token(BOB, room_id)
    assert counted(sandbox, "malformed_policies_total", event="io.lotus.call_permissions") == 2
