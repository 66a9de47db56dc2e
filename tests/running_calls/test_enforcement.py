# SPDX-License-Identifier: Apache-2.0
"""Forbidden sources are revoked in running calls, however the guard learns of the change or of the participant."""

from __future__ import annotations

import json
from typing import Any

import pytest
import pytest_twisted
from livekit.protocol.models import ParticipantInfo, ParticipantPermission, TrackSource
from livekit.protocol.room import ListParticipantsResponse, UpdateParticipantRequest
from twisted.internet.defer import Deferred

from lotusguard.rules.identity import room_alias
from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.sandbox.faults import Fault
from lotusguard.sandbox.livekit.participant import Participant
from lotusguard.sandbox.wire import Reply
from tests.calls import (
    ALICE,
    BOB,
    CAROL,
    change_policy,
    counted,
    crashes,
    logged,
    named,
    old_token,
    published,
    put_policy,
    room_of,
)
from tests.conftest import StartSandbox, until

NO_SCREEN = {"allow_screenshare": False}
NO_CAMERA = {"allow_camera": False}
NO_VIDEO = NO_SCREEN | NO_CAMERA
FORBIDDEN = {
    "no screen": {"SCREEN_SHARE", "SCREEN_SHARE_AUDIO"},
    "no camera": {"CAMERA"},
    "no video": {"CAMERA", "SCREEN_SHARE", "SCREEN_SHARE_AUDIO"},
}
POLICIES = {"no screen": NO_SCREEN, "no camera": NO_CAMERA, "no video": NO_VIDEO}
EVERYTHING = ("MICROPHONE", "CAMERA", "SCREEN_SHARE", "SCREEN_SHARE_AUDIO")


def may_publish(who: Participant) -> set[str]:
    return {source for source in EVERYTHING if who.grant.may_publish(TrackSource.Value(source))}


def other_flags(who: Participant) -> ParticipantPermission:
    """A participant's permission, without its fields about sources."""
    permission = who.grant.to_permission()
    del permission.can_publish_sources[:]
    permission.can_publish = False
    return permission


# -- policy, participant, order of events --------------------------------------------------------------


def wide(sandbox: Sandbox, room_id: str) -> Participant:
    return sandbox.livekit.connect(old_token(ALICE, room_id))


def still_connecting(sandbox: Sandbox, room_id: str) -> Participant:
    return sandbox.livekit.connect(old_token(ALICE, room_id), activate=False)


def suffixed(sandbox: Sandbox, room_id: str) -> Participant:
    return sandbox.livekit.connect(old_token(ALICE, room_id), publish="xyz")


def already_restricted(sandbox: Sandbox, room_id: str) -> Participant:
    return sandbox.livekit.connect(
        old_token(ALICE, room_id, canPublishSources=["screen_share", "camera", "microphone"])
    )


def camera_only(sandbox: Sandbox, room_id: str) -> Participant:
    return sandbox.livekit.connect(old_token(ALICE, room_id, canPublishSources=["camera"], canSubscribeMetrics=True))


def listener(sandbox: Sandbox, room_id: str) -> Participant:
    return sandbox.livekit.connect(old_token(ALICE, room_id, canPublish=False, hidden=True))


PARTICIPANTS = (wide, still_connecting, suffixed, already_restricted, camera_only, listener)


async def policy_then_join(sandbox: Sandbox, room_id: str, policy: dict[str, bool], joins: Any) -> Participant:
    put_policy(sandbox, room_id, **policy)
    await sandbox.ask_token(BOB, room_id)
    who: Participant = joins(sandbox, room_id)
    for source in EVERYTHING:
        who.publish(source)
    return who


async def join_then_push(sandbox: Sandbox, room_id: str, policy: dict[str, bool], joins: Any) -> Participant:
    await sandbox.ask_token(BOB, room_id)
    who: Participant = joins(sandbox, room_id)
    for source in EVERYTHING:
        who.publish(source)
    await sandbox.livekit.drained()
    await change_policy(sandbox, room_id, **policy)
    return who


async def join_then_track(sandbox: Sandbox, room_id: str, policy: dict[str, bool], joins: Any) -> Participant:
    """The change is not pushed, so it is noticed at the next webhook."""
    await sandbox.ask_token(BOB, room_id)
    who: Participant = joins(sandbox, room_id)
    await sandbox.livekit.drained()
    put_policy(sandbox, room_id, **policy)
    sandbox.guard.policies.forget_freshness(room_id)  # as if its TTL had expired
    for source in EVERYTHING:
        who.publish(source)
    who.activate()
    return who


async def join_then_nothing(sandbox: Sandbox, room_id: str, policy: dict[str, bool], joins: Any) -> Participant:
    """Neither a push nor a webhook, so reconciling notices the change."""
    await sandbox.ask_token(BOB, room_id)
    sandbox.livekit.webhooks.urls[:] = []
    who: Participant = joins(sandbox, room_id)
    for source in EVERYTHING:
        who.publish(source)
    who.room.refresh_listed()  # the SFU counts participants every five seconds
    put_policy(sandbox, room_id, **policy)
    sandbox.guard.policies.forget_freshness(room_id)
    await sandbox.guard.changes.reconcile()
    return who


ORDERS = (policy_then_join, join_then_push, join_then_track, join_then_nothing)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("joins", PARTICIPANTS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest_twisted.ensureDeferred
async def test_forbidden_sources_are_revoked_and_everything_else_stays(
    sandbox: Sandbox, policy: str, joins: Any, order: Any
) -> None:
    room_id = room_of(sandbox)
    token: Participant = joins(sandbox, room_of(sandbox))  # the same token in a room where nothing is forbidden
    granted, flags = may_publish(token), other_flags(token)
    who = await order(sandbox, room_id, POLICIES[policy], joins)
    if joins is still_connecting and order is policy_then_join:
        who.activate()
    await until(lambda: may_publish(who) == granted - FORBIDDEN[policy])
    await sandbox.guard.enforcement.worker.idle()
    assert may_publish(who) == granted - FORBIDDEN[policy]
    assert other_flags(who) == flags
    assert set(published(who)) <= granted - FORBIDDEN[policy]
    if not granted - FORBIDDEN[policy]:
        assert not who.info().permission.can_publish
    assert who.connected


# -- how sources are revoked -----------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_unknown_fields_of_a_permission_are_preserved(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox)
    alice = await sandbox.enter(ALICE, room_id)
    later = b"\xf8\x06\x01"  # field 111
    info = alice.info()
    info.permission.ParseFromString(info.permission.SerializeToString() + later)
    sandbox.livekit.faults["GetParticipant"] = Fault(
        "invalid_response", reply=Reply(200, info.SerializeToString(), [("Content-Type", "application/protobuf")])
    )
    await change_policy(sandbox, room_id, **NO_SCREEN)
    await until(lambda: "SCREEN_SHARE" not in may_publish(alice))
    asked = next(a for a in sandbox.livekit.seen if a.path.endswith("/UpdateParticipant"))
    assert asked.header("Content-Type") == "application/protobuf"
    sent = UpdateParticipantRequest.FromString(asked.body)
    assert sent.permission.SerializeToString().endswith(later)
    assert list(sent.permission.can_publish_sources) == [2, 1]
    assert not sent.name
    assert not sent.metadata


@pytest_twisted.ensureDeferred
async def test_sources_are_revoked_at_each_arrival_with_an_old_token(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, **NO_SCREEN)
    await sandbox.ask_token(BOB, room_id)
    for times in (1, 2, 3):
        bob = sandbox.livekit.connect(old_token(BOB, room_id))
        assert bob.publish("SCREEN_SHARE")
        await until(lambda bob=bob: published(bob) == [])  # type: ignore[misc]
        assert not bob.publish("SCREEN_SHARE")
        await sandbox.livekit.drained()
        await sandbox.guard.enforcement.worker.idle()
        assert counted(sandbox, "revocations_total", source="screen_share") == times


@pytest_twisted.ensureDeferred
async def test_nothing_is_granted_to_participants_of_unknown_ceiling(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, **NO_SCREEN)
    await sandbox.ask_token(CAROL, room_id)
    mute = sandbox.livekit.connect(old_token(ALICE, room_id, canPublish=False))
    speaker = sandbox.livekit.connect(old_token(BOB, room_id, canPublishSources=["microphone"]))
    for policy in (NO_CAMERA, {}, NO_VIDEO, {}):
        await change_policy(sandbox, room_id, **policy)
        await sandbox.guard.enforcement.worker.idle()
        assert may_publish(mute) == set()
        assert may_publish(speaker) == {"MICROPHONE"}
    assert not sandbox.livekit.update_log


@pytest_twisted.ensureDeferred
async def test_video_labelled_as_microphone_is_muted_and_logged(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, **NO_SCREEN)
    bob = await sandbox.enter(BOB, room_id)
    with logged() as events:
        voice, disguise = bob.publish("MICROPHONE"), bob.publish("MICROPHONE", "VIDEO")
        camera = bob.publish("CAMERA")
        assert voice
        assert disguise
        assert camera
        await until(lambda: disguise.muted)
        await sandbox.guard.enforcement.worker.idle()
    assert not voice.muted
    assert not camera.muted
    assert published(bob) == ["CAMERA", "MICROPHONE", "MICROPHONE"]
    assert len(named(events, "muted")) == 1
    assert bob.identity in named(events, "muted")[0]
    assert counted(sandbox, "mutes_total") == 1
    bob.set_muted(disguise.sid, False)  # the client unmutes it
    bob.publish("CAMERA")
    await until(lambda: disguise.muted)


@pytest_twisted.ensureDeferred
async def test_video_under_any_label_is_left_alone_where_all_video_is_allowed(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 5)
    bob = await sandbox.enter(BOB, room_id)
    disguise = bob.publish("MICROPHONE", "VIDEO")
    await sandbox.livekit.drained()
    await sandbox.guard.enforcement.worker.idle()
    assert disguise is not None
    assert not disguise.muted


# -- failures -------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_an_update_without_effect_is_detected_and_retried(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=0.1)
    room_id = room_of(sandbox)
    alice = await sandbox.enter(ALICE, room_id)
    alice.room.refresh_listed()
    sandbox.livekit.deaf = True
    with logged() as events:
        await change_policy(sandbox, room_id, **NO_SCREEN)
        await until(lambda: counted(sandbox, "enforcement_failures_total", action="adjust", reason="not_applied") >= 2)
    assert named(events, "enforcement_failed")
    assert counted(sandbox, "revocations_total", source="screen_share") == 0
    sandbox.livekit.deaf = False
    await until(lambda: "SCREEN_SHARE" not in may_publish(alice))
    await until(lambda: counted(sandbox, "revocations_total", source="screen_share") == 1)


@pytest_twisted.ensureDeferred
async def test_a_failed_update_is_counted_and_retried(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=0.1)
    room_id = room_of(sandbox)
    alice = await sandbox.enter(ALICE, room_id)
    alice.room.refresh_listed()
    sandbox.livekit.faults["UpdateParticipant"] = Fault.status(500, times=2)
    await change_policy(sandbox, room_id, **NO_SCREEN)
    await until(lambda: "SCREEN_SHARE" not in may_publish(alice))
    assert counted(sandbox, "enforcement_failures_total", action="adjust", reason="status_500") == 2


@pytest.mark.parametrize("status", [404, 503])
@pytest_twisted.ensureDeferred
async def test_stale_entries_of_a_crashed_node_do_not_stop_the_rest(sandbox: Sandbox, status: int) -> None:
    room_id = room_of(sandbox)
    for number in range(4):
        sandbox.livekit.add_stale(room_alias(room_id), f"@ghost{number}:sandbox.local:D", status)
    alice, bob = await sandbox.enter(ALICE, room_id), await sandbox.enter(BOB, room_id)
    await sandbox.livekit.drained()
    await sandbox.guard.enforcement.worker.idle()
    with logged() as events:
        for _ in range(4):
            await change_policy(sandbox, room_id, **NO_SCREEN)
            await sandbox.guard.enforcement.worker.idle()
    for who in (alice, bob):
        assert "SCREEN_SHARE" not in may_publish(who)
    assert crashes(events) == []
    assert not counted(sandbox, "circuit_open", dependency="livekit")
    failures = counted(sandbox, "enforcement_failures_total", action="adjust", reason="node_gone")
    assert failures == (16 if status == 503 else 0)
    assert len(named(events, "enforcement_failed")) == (4 if status == 503 else 0)


@pytest_twisted.ensureDeferred
async def test_a_participant_who_left_in_between_is_no_failure(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox)
    alice, bob = await sandbox.enter(ALICE, room_id), await sandbox.enter(BOB, room_id)
    gone = alice.info()
    alice.room.remove(alice, 1)
    sandbox.livekit.faults["ListParticipants"] = Fault(
        "invalid_response", times=1, reply=_listing(gone, bob.info())
    )  # Alice left just after this listing
    await sandbox.livekit.drained()
    with logged() as events:
        await change_policy(sandbox, room_id, **NO_SCREEN)
        await until(lambda: "SCREEN_SHARE" not in may_publish(bob))
        await sandbox.guard.enforcement.worker.idle()
    assert crashes(events) == []
    assert named(events, "enforcement_failed") == []


def _listing(*participants: ParticipantInfo) -> Reply:
    body = ListParticipantsResponse(participants=list(participants)).SerializeToString()
    return Reply(200, body, [("Content-Type", "application/protobuf")])


# -- pushed changes ----------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_a_lookup_that_began_before_a_push_is_not_used(sandbox: Sandbox) -> None:
    """Neither the first lookup of a room nor a later one."""
    room_id = room_of(sandbox)
    for _ in range(2):
        put_policy(sandbox, room_id)
        sandbox.guard.policies.forget_freshness(room_id)
        before = sandbox.homeserver.asked["room_state"]
        # slow answers, with the state at the time of the request
        sandbox.homeserver.faults["room_state"] = Fault.drip(0.0005, times=5)
        entering: Deferred[Participant] = Deferred.fromCoroutine(sandbox.enter(ALICE, room_id))
        await until(lambda before=before: sandbox.homeserver.asked["room_state"] >= before + 5)  # type: ignore[misc]
        await change_policy(sandbox, room_id, **NO_SCREEN)
        assert not entering.called
        alice = await entering
        assert alice.publish("SCREEN_SHARE")  # admitted by the policy at the time of the request
        await until(lambda alice=alice: published(alice) == [])  # type: ignore[misc]
        answer = await sandbox.ask_token(BOB, room_id)
        bob = sandbox.livekit.connect(json.loads(answer.body)["jwt"])
        assert not bob.publish("SCREEN_SHARE")


@pytest_twisted.ensureDeferred
async def test_a_push_during_a_pass_leads_to_another_pass(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, **NO_CAMERA)
    alice = await sandbox.enter(ALICE, room_id)
    await sandbox.livekit.drained()
    await sandbox.guard.enforcement.worker.idle()
    sandbox.livekit.room_faults[alice.room.name] = Fault.status(500, times=1)
    sandbox.guard.enforcement.enforce(alice.room.name)
    await change_policy(sandbox, room_id, **NO_SCREEN)
    await until(lambda: may_publish(alice) == {"MICROPHONE", "CAMERA"})


@pytest_twisted.ensureDeferred
async def test_a_change_reaches_every_slot_of_the_room_and_no_other_room(sandbox: Sandbox) -> None:
    room_id, other = room_of(sandbox), room_of(sandbox)
    alice, bob = await sandbox.enter(ALICE, room_id), await sandbox.enter(BOB, other)
    answer = await sandbox.ask_token(CAROL, room_id, new=True, slot_id="m.call#another")
    carol = sandbox.livekit.connect(json.loads(answer.body)["jwt"])
    assert carol.room.name != alice.room.name
    await change_policy(sandbox, room_id, **NO_SCREEN)
    await until(lambda: not may_publish(alice) & {"SCREEN_SHARE"} and not may_publish(carol) & {"SCREEN_SHARE"})
    assert may_publish(bob) == set(EVERYTHING)


LONG = b"x" * 255


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b'{"room_id": 7}', b'{"room": "!x"}', b'{"room_id": "x"}', b"\xff", b'{"room_id": "!\\ud800"}',
     b'{"room_id": "!%b"}' % LONG, b'{"room_id": "!x", "user": "@\\ud800"}',
     b'{"room_id": "!x", "user": "@%b"}' % LONG],
)  # fmt: skip
@pytest_twisted.ensureDeferred
async def test_a_push_that_names_no_possible_room_or_user_is_refused(sandbox: Sandbox, body: bytes) -> None:
    assert (await sandbox.operator("POST", "/policy-changed", body)).code == 400


@pytest_twisted.ensureDeferred
async def test_a_push_without_the_operators_token_changes_nothing(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox)
    alice = await sandbox.enter(ALICE, room_id)
    await sandbox.livekit.drained()
    put_policy(sandbox, room_id, **NO_SCREEN)
    before = dict(sandbox.homeserver.asked)
    body = json.dumps({"room_id": room_id}).encode()
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": sandbox.admin_token}):
        assert (await sandbox.request("POST", f"{sandbox.admin_url}/policy-changed", body, headers)).code == 403
    assert dict(sandbox.homeserver.asked) == before
    assert may_publish(alice) == set(EVERYTHING)


@pytest_twisted.ensureDeferred
async def test_a_push_about_a_room_without_a_call_costs_nothing(sandbox: Sandbox) -> None:
    await change_policy(sandbox, room_of(sandbox), **NO_SCREEN)
    assert not sandbox.homeserver.asked["room_state"]
    assert not sandbox.livekit.asked["ListParticipants"]
