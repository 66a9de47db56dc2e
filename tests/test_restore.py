# SPDX-License-Identifier: Apache-2.0
"""What the guard took in the call it gives back when it is allowed again, if so told; exactly that and to no other."""

from __future__ import annotations

import json
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
    """A sandbox whose guard gives back."""
    yield await start_sandbox(guard_reconcile_interval=3600, guard_restore=True, guard_state_dir=tmp_path)


def may_publish(who: Participant) -> set[str]:
    return {source for source in ALL if who.grant.may_publish(TrackSource.Value(source))}


async def at_rest(sandbox: Sandbox) -> None:
    await sandbox.livekit.drained()
    await sandbox.guard.enforcement.worker.idle()


async def connected(sandbox: Sandbox, room_id: str, **video: Any) -> Participant:
    """Alice, with a token that never passed the guard, in a room that the guard knows."""
    assert (await sandbox.ask_token(BOB, room_id)).code == 200
    alice = sandbox.livekit.connect(old_token(ALICE, room_id, **video))
    await at_rest(sandbox)
    return alice


async def set_policy(sandbox: Sandbox, room_id: str, **quality: bool) -> None:
    await change_policy(sandbox, room_id, **quality)
    await at_rest(sandbox)


@pytest_twisted.ensureDeferred
async def test_by_default_nothing_is_given_back(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox)
    alice = await connected(sandbox, room_id)
    await set_policy(sandbox, room_id, **NO_SCREEN)
    await set_policy(sandbox, room_id)
    assert may_publish(alice) == {"MICROPHONE", "CAMERA"}
    assert counted(sandbox, "restorations_total", source="screen_share") == 0


@pytest_twisted.ensureDeferred
async def test_exactly_what_was_taken_comes_back_when_it_is_allowed(giving: Sandbox) -> None:
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
async def test_who_was_left_with_nothing_gets_back_what_they_had(giving: Sandbox) -> None:
    room_id = room_of(giving)
    alice = await connected(giving, room_id, canPublishSources=["camera"])
    await set_policy(giving, room_id, **NO_CAMERA)
    assert not alice.grant.to_permission().can_publish
    await set_policy(giving, room_id)
    assert may_publish(alice) == {"CAMERA"}


@pytest_twisted.ensureDeferred
async def test_it_is_given_to_the_session_it_was_taken_from_and_to_no_later_one(giving: Sandbox) -> None:
    room_id = room_of(giving)
    wide = await connected(giving, room_id)
    await set_policy(giving, room_id, **NO_SCREEN)
    narrow = giving.livekit.connect(old_token(ALICE, room_id, canPublishSources=["microphone"]))
    assert narrow.identity == wide.identity
    await set_policy(giving, room_id)
    assert may_publish(narrow) == {"MICROPHONE"}


@pytest_twisted.ensureDeferred
async def test_what_a_token_never_granted_is_not_given(giving: Sandbox) -> None:
    room_id = room_of(giving, **NO_SCREEN)
    answer = await giving.ask_token(ALICE, room_id)
    alice = giving.livekit.connect(json.loads(answer.body)["jwt"])
    await set_policy(giving, room_id)
    assert may_publish(alice) == {"MICROPHONE", "CAMERA"}


@pytest_twisted.ensureDeferred
async def test_what_somebody_else_took_is_not_given(giving: Sandbox) -> None:
    room_id = room_of(giving)
    alice = await connected(giving, room_id)
    await set_policy(giving, room_id, **NO_SCREEN)
    moderated = alice.grant.to_permission()
    moderated.can_publish_sources.remove(TrackSource.CAMERA)
    alice.set_permission(moderated)
    await set_policy(giving, room_id)
    assert may_publish(alice) == {"MICROPHONE", "SCREEN_SHARE", "SCREEN_SHARE_AUDIO"}


@pytest_twisted.ensureDeferred
async def test_it_is_given_back_only_once(giving: Sandbox) -> None:
    room_id = room_of(giving)
    alice = await connected(giving, room_id)
    await set_policy(giving, room_id, **NO_SCREEN)
    await set_policy(giving, room_id)
    moderated = alice.grant.to_permission()
    moderated.can_publish_sources.remove(TrackSource.SCREEN_SHARE)
    alice.set_permission(moderated)
    await set_policy(giving, room_id)
    assert "SCREEN_SHARE" not in may_publish(alice)


@pytest_twisted.ensureDeferred
async def test_a_new_run_of_the_guard_gives_back_what_an_earlier_one_took(giving: Sandbox) -> None:
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
async def test_nothing_is_given_back_while_the_policy_is_unknown(giving: Sandbox) -> None:
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
async def test_an_sfu_that_does_not_give_it_back_is_asked_again(giving: Sandbox) -> None:
    room_id = room_of(giving)
    alice = await connected(giving, room_id)
    await set_policy(giving, room_id, **NO_SCREEN)
    giving.livekit.deaf = True
    await set_policy(giving, room_id)
    assert counted(giving, "enforcement_failures_total", action="restore", reason="not_applied") == 1
    giving.livekit.deaf = False
    await set_policy(giving, room_id)
    assert may_publish(alice) == ALL


@pytest_twisted.ensureDeferred
async def test_what_was_taken_is_forgotten_with_the_session(giving: Sandbox) -> None:
    room_id = room_of(giving)
    alice = await connected(giving, room_id)
    bob = giving.livekit.connect(old_token(BOB, room_id))
    await set_policy(giving, room_id, **NO_SCREEN)
    registry, alias = giving.guard._enforcement._registry, alice.room.name
    assert (await registry.taken_in(alias)).keys() == {alice.sid, bob.sid}
    giving.livekit.disconnect(alias, alice.identity)
    await giving.livekit.drained()
    assert (await registry.taken_in(alias)).keys() == {bob.sid}
    giving.livekit.webhooks.urls[:] = []
    giving.livekit.disconnect(alias, bob.identity)  # nobody tells; the next look does
    await set_policy(giving, room_id, **NO_SCREEN)
    assert not await registry.taken_in(alias)


@pytest_twisted.ensureDeferred
async def test_rooms_without_a_policy_that_are_owed_nothing_are_left_in_peace(giving: Sandbox) -> None:
    room_id = room_of(giving)
    alice = await connected(giving, room_id)
    alice.room.refresh_listed()
    await giving.guard.changes.reconcile()
    await at_rest(giving)
    assert not giving.livekit.asked["ListParticipants"]
