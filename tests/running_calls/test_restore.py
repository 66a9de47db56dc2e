# SPDX-License-Identifier: Apache-2.0
"""The guard restores what it revoked or withheld once that is allowed again; exactly that, and to nobody else."""

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
async def giving(start_sandbox: StartSandbox, tmp_path: Any) -> Any:
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
async def test_nothing_is_given_back_if_restoring_is_switched_off(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_restore=False)
    room_id = room_of(sandbox)
    alice = await connected(sandbox, room_id)
    await set_policy(sandbox, room_id, **NO_SCREEN)
    await set_policy(sandbox, room_id)
    assert may_publish(alice) == {"MICROPHONE", "CAMERA"}
    assert counted(sandbox, "restorations_total", source="screen_share") == 0


@pytest_twisted.ensureDeferred
async def test_exactly_the_revoked_sources_are_restored(giving: Sandbox) -> None:
    room_id = room_of(giving)
    sources = ["microphone", "camera", "screen_share"]
    alice = await connected(giving, room_id, canPublishSources=sources)
    before = alice.grant.to_permission()
    await set_policy(giving, room_id, **NO_VIDEO)
    assert may_publish(alice) == {"MICROPHONE"}
    with logged() as events:
        await set_policy(giving, room_id, **NO_CAMERA)
        assert may_publish(alice) == {"MICROPHONE", "SCREEN_SHARE"}
        await set_policy(giving, room_id)
    assert may_publish(alice) == {"MICROPHONE", "CAMERA", "SCREEN_SHARE"}
    after = alice.grant.to_permission()
    assert sorted(after.can_publish_sources) == sorted(before.can_publish_sources)
    del after.can_publish_sources[:], before.can_publish_sources[:]
    assert after == before
    assert len(named(events, "restored")) == 2
    assert counted(giving, "restorations_total", source="camera") == 1
    assert counted(giving, "restorations_total", source="screen_share_audio") == 0


@pytest_twisted.ensureDeferred
async def test_a_participant_without_any_source_gets_back_what_was_revoked(giving: Sandbox) -> None:
    room_id = room_of(giving)
    alice = await connected(giving, room_id, canPublishSources=["camera"])
    await set_policy(giving, room_id, **NO_CAMERA)
    assert not alice.grant.to_permission().can_publish
    await set_policy(giving, room_id)
    assert may_publish(alice) == {"CAMERA"}


@pytest_twisted.ensureDeferred
async def test_a_session_with_a_refreshed_token_gets_back_what_an_earlier_one_lost(giving: Sandbox) -> None:
    room_id = room_of(giving)
    alice = await connected(giving, room_id)
    await set_policy(giving, room_id, **NO_SCREEN)
    refreshed = giving.livekit.refreshed_token(alice.room.name, alice.identity)
    again = giving.livekit.connect(refreshed)
    await at_rest(giving)
    assert may_publish(again) == {"MICROPHONE", "CAMERA"}
    await set_policy(giving, room_id)
    assert may_publish(again) == ALL
    assert may_publish(giving.livekit.connect(giving.livekit.refreshed_token(again.room.name, again.identity))) == ALL


@pytest_twisted.ensureDeferred
async def test_what_the_token_withheld_is_given(giving: Sandbox) -> None:
    room_id = room_of(giving, **NO_SCREEN)
    alice = await giving.enter(ALICE, room_id)
    assert may_publish(alice) == {"MICROPHONE", "CAMERA"}
    await set_policy(giving, room_id)
    assert may_publish(alice) == ALL


@pytest_twisted.ensureDeferred
async def test_a_participant_of_unknown_ceiling_is_given_nothing(giving: Sandbox) -> None:
    room_id = room_of(giving)
    assert (await giving.ask_token(BOB, room_id)).code == 200
    alice = giving.livekit.connect(old_token(ALICE, room_id))
    await set_policy(giving, room_id, **NO_SCREEN)
    await set_policy(giving, room_id)
    assert may_publish(alice) == {"MICROPHONE", "CAMERA"}


@pytest_twisted.ensureDeferred
async def test_what_somebody_else_revoked_is_not_restored(giving: Sandbox) -> None:
    room_id = room_of(giving)
    alice = await connected(giving, room_id)
    await set_policy(giving, room_id, **NO_SCREEN)
    moderated = alice.grant.to_permission()
    moderated.can_publish_sources.remove(TrackSource.CAMERA)
    alice.set_permission(moderated)
    await set_policy(giving, room_id)
    assert may_publish(alice) == {"MICROPHONE", "SCREEN_SHARE", "SCREEN_SHARE_AUDIO"}


@pytest_twisted.ensureDeferred
async def test_sources_are_restored_only_once(giving: Sandbox) -> None:
    room_id = room_of(giving)
    alice = await connected(giving, room_id)
    await set_policy(giving, room_id, **NO_SCREEN)
    await set_policy(giving, room_id)
    assert may_publish(alice) == ALL
    moderated = alice.grant.to_permission()
    moderated.can_publish_sources[:] = [TrackSource.MICROPHONE]
    alice.set_permission(moderated)
    await set_policy(giving, room_id)
    assert may_publish(alice) == {"MICROPHONE"}


@pytest_twisted.ensureDeferred
async def test_after_a_restart_what_the_earlier_run_revoked_is_restored(giving: Sandbox) -> None:
    room_id = room_of(giving)
    alice = await connected(giving, room_id)
    alice.room.refresh_listed()
    await set_policy(giving, room_id, **NO_VIDEO)
    await giving.guard.stopService()
    put_policy(giving, room_id, **NO_CAMERA)
    await giving.start_guard(guard_reconcile_interval=0.1)
    await until(lambda: may_publish(alice) == {"MICROPHONE", "SCREEN_SHARE", "SCREEN_SHARE_AUDIO"})
    put_policy(giving, room_id)
    await set_policy(giving, room_id)
    assert may_publish(alice) == ALL


@pytest_twisted.ensureDeferred
async def test_nothing_is_restored_while_the_policy_is_unknown(giving: Sandbox) -> None:
    room_id = room_of(giving)
    alice = await connected(giving, room_id)
    alice.room.refresh_listed()
    await set_policy(giving, room_id, **NO_SCREEN)
    await giving.guard.stopService()
    await giving.homeserver.stop_listening()
    await giving.start_guard(guard_reconcile_interval=0.1)
    await until(lambda: giving.guard.changes.round_at is not None)
    giving.guard.enforcement.enforce(alice.room.name)
    await at_rest(giving)
    assert may_publish(alice) == {"MICROPHONE", "CAMERA"}
    await giving.homeserver.listen()


@pytest_twisted.ensureDeferred
async def test_a_restoration_that_changed_nothing_is_tried_again(giving: Sandbox) -> None:
    room_id = room_of(giving)
    alice = await connected(giving, room_id)
    await set_policy(giving, room_id, **NO_SCREEN)
    giving.livekit.deaf = True
    await set_policy(giving, room_id)
    assert counted(giving, "enforcement_failures_total", action="adjust", reason="not_applied") == 1
    giving.livekit.deaf = False
    await set_policy(giving, room_id)
    assert may_publish(alice) == ALL


@pytest_twisted.ensureDeferred
async def test_a_call_without_a_policy_is_listed_once_if_memberships_are_not_checked(
    start_sandbox: StartSandbox,
) -> None:
    """Once, because an earlier run of the guard may have revoked something."""
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_members_only="off")
    alice = await connected(sandbox, room_of(sandbox))
    alice.room.refresh_listed()
    for _ in range(3):
        await sandbox.guard.changes.reconcile()
        await at_rest(sandbox)
    assert sandbox.livekit.asked["ListParticipants"] == 1
