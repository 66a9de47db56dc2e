# SPDX-License-Identifier: Apache-2.0
"""The guard restores the sources that it revoked or withheld, and no others, once they are allowed again."""

from __future__ import annotations

from typing import Any

import pytest_twisted
from livekit.protocol.models import TrackSource

from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.sandbox.livekit.participant import Participant
from tests.calls import ALICE, BOB, change_policy, counted, logged, named, old_token, put_policy, room_of
from tests.conftest import StartSandbox, until

NO_SCREEN = {"allow_screenshare": False}
NO_CAMERA = {"allow_camera": False}
NO_VIDEO = NO_SCREEN | NO_CAMERA
ALL = {"MICROPHONE", "CAMERA", "SCREEN_SHARE", "SCREEN_SHARE_AUDIO"}


@pytest_twisted.async_yield_fixture
async def restoring(start_sandbox: StartSandbox, tmp_path: Any) -> Any:
    """A sandbox whose guard has a state directory."""
    yield await start_sandbox(guard_reconcile_interval=3600, guard_state_dir=tmp_path)


def may_publish(who: Participant) -> set[str]:
    return {source for source in ALL if who.grant.may_publish(TrackSource.Value(source))}


async def at_rest(sandbox: Sandbox) -> None:
    await sandbox.livekit.drained()
    await sandbox.guard.enforcement.worker.idle()


async def connected(sandbox: Sandbox, room_id: str, **video: Any) -> Participant:
    """Alice in the call. Her token never passed the guard, but the guard has issued one for the same identity, so it
    knows what upstream grants her."""
    assert (await sandbox.ask_token(ALICE, room_id)).code == 200
    alice = sandbox.livekit.connect(old_token(ALICE, room_id, **video))
    await at_rest(sandbox)
    return alice


async def set_policy(sandbox: Sandbox, room_id: str, **quality: bool) -> None:
    await change_policy(sandbox, room_id, **quality)
    await at_rest(sandbox)


@pytest_twisted.ensureDeferred
async def test_nothing_is_restored_if_restoring_is_switched_off(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_restore=False)
    room_id = room_of(sandbox)
    alice = await connected(sandbox, room_id)
    await set_policy(sandbox, room_id, **NO_SCREEN)
    await set_policy(sandbox, room_id)
    assert may_publish(alice) == {"MICROPHONE", "CAMERA"}
    assert counted(sandbox, "restorations_total", source="screen_share") == 0


@pytest_twisted.ensureDeferred
async def test_exactly_the_revoked_sources_are_restored(restoring: Sandbox) -> None:
    room_id = room_of(restoring)
    sources = ["microphone", "camera", "screen_share"]
    alice = await connected(restoring, room_id, canPublishSources=sources)
    before = alice.grant.to_permission()
    await set_policy(restoring, room_id, **NO_VIDEO)
    assert may_publish(alice) == {"MICROPHONE"}
    with logged() as events:
        await set_policy(restoring, room_id, **NO_CAMERA)
        assert may_publish(alice) == {"MICROPHONE", "SCREEN_SHARE"}
        await set_policy(restoring, room_id)
    assert may_publish(alice) == {"MICROPHONE", "CAMERA", "SCREEN_SHARE"}
    after = alice.grant.to_permission()
    assert sorted(after.can_publish_sources) == sorted(before.can_publish_sources)
    del after.can_publish_sources[:], before.can_publish_sources[:]
    assert after == before
    assert len(named(events, "restored")) == 2
    assert counted(restoring, "restorations_total", source="camera") == 1
    assert counted(restoring, "restorations_total", source="screen_share_audio") == 0


@pytest_twisted.ensureDeferred
async def test_revoked_sources_are_restored_to_a_participant_without_any_source(restoring: Sandbox) -> None:
    room_id = room_of(restoring)
    alice = await connected(restoring, room_id, canPublishSources=["camera"])
    await set_policy(restoring, room_id, **NO_CAMERA)
    assert not alice.grant.to_permission().can_publish
    await set_policy(restoring, room_id)
    assert may_publish(alice) == {"CAMERA"}


@pytest_twisted.ensureDeferred
async def test_sources_revoked_in_an_earlier_session_are_restored_with_a_refreshed_token(restoring: Sandbox) -> None:
    room_id = room_of(restoring)
    alice = await connected(restoring, room_id)
    await set_policy(restoring, room_id, **NO_SCREEN)
    refreshed = restoring.livekit.refreshed_token(alice.room.name, alice.identity)
    again = restoring.livekit.connect(refreshed)
    await at_rest(restoring)
    assert may_publish(again) == {"MICROPHONE", "CAMERA"}
    await set_policy(restoring, room_id)
    assert may_publish(again) == ALL
    assert (
        may_publish(restoring.livekit.connect(restoring.livekit.refreshed_token(again.room.name, again.identity)))
        == ALL
    )


@pytest_twisted.ensureDeferred
async def test_sources_withheld_in_the_token_are_restored(restoring: Sandbox) -> None:
    room_id = room_of(restoring, **NO_SCREEN)
    alice = await restoring.enter(ALICE, room_id)
    assert may_publish(alice) == {"MICROPHONE", "CAMERA"}
    await set_policy(restoring, room_id)
    assert may_publish(alice) == ALL


@pytest_twisted.ensureDeferred
async def test_nothing_is_restored_to_a_participant_of_unknown_ceiling(restoring: Sandbox) -> None:
    room_id = room_of(restoring)
    assert (await restoring.ask_token(BOB, room_id)).code == 200
    alice = restoring.livekit.connect(old_token(ALICE, room_id))
    await set_policy(restoring, room_id, **NO_SCREEN)
    await set_policy(restoring, room_id)
    assert may_publish(alice) == {"MICROPHONE", "CAMERA"}


@pytest_twisted.ensureDeferred
async def test_sources_revoked_by_others_are_not_restored(restoring: Sandbox) -> None:
    room_id = room_of(restoring)
    alice = await connected(restoring, room_id)
    await set_policy(restoring, room_id, **NO_SCREEN)
    moderated = alice.grant.to_permission()
    moderated.can_publish_sources.remove(TrackSource.CAMERA)
    alice.set_permission(moderated)
    await set_policy(restoring, room_id)
    assert may_publish(alice) == {"MICROPHONE", "SCREEN_SHARE", "SCREEN_SHARE_AUDIO"}


@pytest_twisted.ensureDeferred
async def test_sources_are_restored_only_once(restoring: Sandbox) -> None:
    room_id = room_of(restoring)
    alice = await connected(restoring, room_id)
    await set_policy(restoring, room_id, **NO_SCREEN)
    await set_policy(restoring, room_id)
    assert may_publish(alice) == ALL
    moderated = alice.grant.to_permission()
    moderated.can_publish_sources[:] = [TrackSource.MICROPHONE]
    alice.set_permission(moderated)
    await set_policy(restoring, room_id)
    assert may_publish(alice) == {"MICROPHONE"}


@pytest_twisted.ensureDeferred
async def test_sources_revoked_before_a_restart_are_restored_after_it(restoring: Sandbox) -> None:
    room_id = room_of(restoring)
    alice = await connected(restoring, room_id)
    alice.room.refresh_listed()
    await set_policy(restoring, room_id, **NO_VIDEO)
    await restoring.guard.stopService()
    put_policy(restoring, room_id, **NO_CAMERA)
    await restoring.start_guard(guard_reconcile_interval=0.1)
    await until(lambda: may_publish(alice) == {"MICROPHONE", "SCREEN_SHARE", "SCREEN_SHARE_AUDIO"})
    put_policy(restoring, room_id)
    await set_policy(restoring, room_id)
    assert may_publish(alice) == ALL


@pytest_twisted.ensureDeferred
async def test_nothing_is_restored_while_the_policy_is_unknown(restoring: Sandbox) -> None:
    room_id = room_of(restoring)
    alice = await connected(restoring, room_id)
    alice.room.refresh_listed()
    await set_policy(restoring, room_id, **NO_SCREEN)
    await restoring.guard.stopService()
    await restoring.homeserver.stop_listening()
    await restoring.start_guard(guard_reconcile_interval=0.1)
    await until(lambda: restoring.guard.changes.round_at is not None)
    restoring.guard.enforcement.enforce(alice.room.name)
    await at_rest(restoring)
    assert may_publish(alice) == {"MICROPHONE", "CAMERA"}
    await restoring.homeserver.listen()


@pytest_twisted.ensureDeferred
async def test_a_restoration_without_effect_is_retried(restoring: Sandbox) -> None:
    room_id = room_of(restoring)
    alice = await connected(restoring, room_id)
    await set_policy(restoring, room_id, **NO_SCREEN)
    restoring.livekit.deaf = True
    await set_policy(restoring, room_id)
    assert counted(restoring, "enforcement_failures_total", action="adjust", reason="not_applied") == 1
    restoring.livekit.deaf = False
    await set_policy(restoring, room_id)
    assert may_publish(alice) == ALL


@pytest_twisted.ensureDeferred
async def test_a_call_without_a_policy_is_listed_once_if_memberships_are_not_checked(
    start_sandbox: StartSandbox,
) -> None:
    """One listing, because an earlier run of the guard may have revoked something."""
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_members_only="off")
    alice = await connected(sandbox, room_of(sandbox))
    alice.room.refresh_listed()
    for _ in range(3):
        await sandbox.guard.changes.reconcile()
        await at_rest(sandbox)
    assert sandbox.livekit.asked["ListParticipants"] == 1


@pytest_twisted.ensureDeferred
async def test_what_was_revoked_is_restored_although_the_token_was_passed_on_as_it_came(
    start_sandbox: StartSandbox,
) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_tokens="policy")
    room_id = room_of(sandbox)
    alice = await sandbox.enter(ALICE, room_id)
    await at_rest(sandbox)
    await set_policy(sandbox, room_id, **NO_CAMERA)
    assert may_publish(alice) == ALL - {"CAMERA"}
    await set_policy(sandbox, room_id)
    assert may_publish(alice) == ALL
