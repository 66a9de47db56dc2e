# SPDX-License-Identifier: Apache-2.0
"""``GUARD_DRY_RUN``: everything is decided, logged and counted, and nothing is changed."""

from __future__ import annotations

import json
from typing import Any

import pytest_twisted
from livekit.protocol.models import TrackSource

from lotusguard.rules.jwt import read_unverified
from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.sandbox.livekit.participant import Participant
from tests.calls import ALICE, BOB, CAROL, change_policy, counted, logged, named, old_token, published, room_of
from tests.conftest import StartSandbox, until

CHANGES = ("UpdateParticipant", "RemoveParticipant", "MutePublishedTrack")


@pytest_twisted.async_yield_fixture
async def dry(start_sandbox: StartSandbox) -> Any:
    yield await start_sandbox(guard_reconcile_interval=3600, guard_dry_run=True)


async def at_rest(sandbox: Sandbox) -> None:
    await sandbox.livekit.drained()
    await sandbox.guard.enforcement.worker.idle()


async def enforced_again(sandbox: Sandbox, *whose: Participant) -> None:
    for _ in range(3):
        for who in whose:
            sandbox.guard.enforcement.enforce(who.room.name)
        await at_rest(sandbox)


def dry_run_skipped(sandbox: Sandbox) -> dict[str, float]:
    actions = ("narrow", "revoke", "mute", "remove", "restore")
    counts = {action: counted(sandbox, "dry_run_skipped_total", action=action) for action in actions}
    return {action: count for action, count in counts.items() if count}


def nothing_was_changed(sandbox: Sandbox) -> bool:
    return not sandbox.livekit.update_log and not any(sandbox.livekit.asked[method] for method in CHANGES)


@pytest_twisted.ensureDeferred
async def test_a_full_room_admits_everybody_and_logs_it(dry: Sandbox) -> None:
    room_id = room_of(dry, 1)
    await dry.enter(ALICE, room_id)
    with logged() as events:
        answer = await dry.ask_token(BOB, room_id)
    assert answer.code == 200
    assert counted(dry, "joins_total", verdict="would_refuse", reason="full") == 1
    assert any("would_refuse" in text for text in named(events, "join"))


@pytest_twisted.ensureDeferred
async def test_tokens_are_passed_on_unchanged(dry: Sandbox) -> None:
    answer = await dry.ask_token(ALICE, room_of(dry, allow_screenshare=False))
    assert json.loads(answer.body)["jwt"] == dry.upstream.issued[-1].token
    claims = read_unverified(json.loads(answer.body)["jwt"])
    assert claims is not None
    assert claims["exp"] - claims["nbf"] >= 3600
    assert dry_run_skipped(dry) == {"narrow": 1}


@pytest_twisted.ensureDeferred
async def test_sources_tracks_and_participants_stay_and_each_is_logged_once(dry: Sandbox) -> None:
    room_id = room_of(dry, 1, allow_screenshare=False, allow_camera=False)
    await dry.ask_token(ALICE, room_id)
    with logged() as events:
        alice = dry.livekit.connect(old_token(ALICE, room_id))
        for source in ("SCREEN_SHARE", "CAMERA"):
            assert alice.publish(source)
        disguise = alice.publish("MICROPHONE", "VIDEO")
        await at_rest(dry)
        bob = dry.livekit.connect(old_token(BOB, room_id, canPublishSources=["microphone"]))
        await at_rest(dry)
        await enforced_again(dry, alice, bob)
    assert published(alice) == ["CAMERA", "MICROPHONE", "SCREEN_SHARE"]
    assert disguise is not None
    assert not disguise.muted
    assert bob.connected
    assert nothing_was_changed(dry)
    assert dry_run_skipped(dry) == {"narrow": 1, "revoke": 1, "mute": 1, "remove": 1}
    said = named(events, "skipped")
    assert sorted(text.split()[1] for text in said) == ["mute", "remove", "revoke"]
    for counter in ("revocations_total", "members_removed_total", "mutes_total"):
        assert not counted(dry, counter, **({"source": "camera"} if counter == "revocations_total" else {}))


@pytest_twisted.ensureDeferred
async def test_another_policy_is_logged_again_and_another_session_is_not(dry: Sandbox) -> None:
    room_id = room_of(dry, allow_camera=False)
    await dry.ask_token(BOB, room_id)
    alice = dry.livekit.connect(old_token(ALICE, room_id))
    await at_rest(dry)
    assert dry_run_skipped(dry)["revoke"] == 1
    await change_policy(dry, room_id, allow_screenshare=False)
    await at_rest(dry)
    assert dry_run_skipped(dry)["revoke"] == 2
    again = dry.livekit.connect(old_token(ALICE, room_id))
    await at_rest(dry)
    assert dry_run_skipped(dry)["revoke"] == 2  # once more: clients reconnect often
    assert again.connected
    assert not alice.connected


@pytest_twisted.ensureDeferred
async def test_what_an_earlier_run_revoked_is_not_restored(start_sandbox: StartSandbox, tmp_path: Any) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_restore=True, guard_state_dir=tmp_path)
    room_id = room_of(sandbox)
    await sandbox.ask_token(ALICE, room_id)
    alice = sandbox.livekit.connect(old_token(ALICE, room_id))
    await change_policy(sandbox, room_id, allow_camera=False)
    await until(lambda: not alice.grant.may_publish(TrackSource.CAMERA))
    await at_rest(sandbox)
    await sandbox.guard.stopService()
    await sandbox.start_guard(guard_dry_run=True)
    changes = len(sandbox.livekit.update_log)
    await change_policy(sandbox, room_id)
    await at_rest(sandbox)
    await enforced_again(sandbox, alice)
    assert dry_run_skipped(sandbox) == {"restore": 1}
    assert len(sandbox.livekit.update_log) == changes
    assert not alice.grant.may_publish(TrackSource.CAMERA)


@pytest_twisted.ensureDeferred
async def test_the_seats_are_counted_as_if_they_were_enforced(dry: Sandbox) -> None:
    room_id = room_of(dry, 2)
    for user in (ALICE, BOB):
        await dry.enter(user, room_id)
    await dry.ask_token(CAROL, room_id)
    assert counted(dry, "joins_total", verdict="would_refuse", reason="full") == 1
    assert counted(dry, "seats_held") == 2
