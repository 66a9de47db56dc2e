# SPDX-License-Identifier: Apache-2.0
"""Rights by power level in a running call: promotion restores, demotion revokes, whatever the order of events."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, Mapping
from random import Random
from typing import Any

import pytest
import pytest_twisted
from livekit.protocol.models import TrackSource

from lotusguard.rules.identity import room_alias
from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.sandbox.livekit.participant import Participant
from tests.calls import ALICE, BOB, CAROL, DAVE, old_token, put_policy, room_of
from tests.conftest import StartSandbox, until

ALL = frozenset({"MICROPHONE", "CAMERA", "SCREEN_SHARE", "SCREEN_SHARE_AUDIO"})
SCREEN = frozenset({"SCREEN_SHARE", "SCREEN_SHARE_AUDIO"})
SPEAKERS = {"microphone": 50, "camera": 50, "screen_share": 50}
"""Only moderators speak."""


def may_publish(who: Participant) -> frozenset[str]:
    return frozenset(source for source in ALL if who.grant.may_publish(TrackSource.Value(source)))


async def enforced(sandbox: Sandbox) -> None:
    """Wait until everything that was reported has been enforced."""
    await sandbox.livekit.drained()
    await sandbox.guard.enforcement.worker.idle()


async def push(sandbox: Sandbox, room_id: str) -> None:
    """Tell the guard that the room changed, as the homeserver's module does, and wait until it is enforced."""
    assert (await sandbox.operator("POST", "/policy-changed", json.dumps({"room_id": room_id}).encode())).code == 202
    await enforced(sandbox)


def set_levels(sandbox: Sandbox, room_id: str, **levels: int) -> None:
    """Set the power levels of users by localpart. Alice always has 100."""
    users = {f"@{name}:sandbox.local": level for name, level in levels.items()}
    sandbox.homeserver.set_state(room_id, "m.room.power_levels", {"users": {ALICE: 100, **users}})


def set_permissions(sandbox: Sandbox, room_id: str, permissions: Mapping[str, Any]) -> None:
    sandbox.homeserver.set_state(room_id, "io.lotus.call_permissions", permissions)


async def speakers_room(sandbox: Sandbox) -> tuple[str, Participant, Participant]:
    """A room where only moderators speak. Alice, a moderator, and Bob, a listener, are in the call."""
    room_id = room_of(sandbox)
    set_permissions(sandbox, room_id, SPEAKERS)
    alice, bob = await sandbox.enter(ALICE, room_id), await sandbox.enter(BOB, room_id)
    await enforced(sandbox)
    return room_id, alice, bob


# -- promoted and demoted ------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_a_promotion_restores_and_a_demotion_revokes(sandbox: Sandbox) -> None:
    room_id, alice, bob = await speakers_room(sandbox)
    for _ in range(2):
        assert may_publish(alice) == ALL
        assert may_publish(bob) == frozenset()
        assert not bob.grant.to_permission().can_publish
        assert bob.grant.to_permission().can_publish_data
        set_levels(sandbox, room_id, bob=50)
        await push(sandbox, room_id)
        assert may_publish(bob) == ALL
        assert bob.publish("MICROPHONE")
        set_levels(sandbox, room_id, bob=49)
        await push(sandbox, room_id)
        assert not bob.tracks


@pytest_twisted.ensureDeferred
async def test_changed_permissions_and_exceptions_take_effect_in_the_call(sandbox: Sandbox) -> None:
    room_id, alice, bob = await speakers_room(sandbox)
    set_permissions(sandbox, room_id, SPEAKERS | {"users": {BOB: {"microphone": True}, ALICE: {"camera": False}}})
    await push(sandbox, room_id)
    assert may_publish(bob) == {"MICROPHONE"}
    assert may_publish(alice) == ALL - {"CAMERA"}
    set_permissions(sandbox, room_id, {"camera": 50})
    await push(sandbox, room_id)
    assert may_publish(bob) == ALL - {"CAMERA"}
    assert may_publish(alice) == ALL
    set_permissions(sandbox, room_id, {})
    await push(sandbox, room_id)
    assert may_publish(bob) == ALL


@pytest_twisted.ensureDeferred
async def test_what_the_room_forbids_everybody_is_not_restored_by_a_promotion(sandbox: Sandbox) -> None:
    room_id, alice, bob = await speakers_room(sandbox)
    put_policy(sandbox, room_id, allow_camera=False)
    set_levels(sandbox, room_id, bob=100)
    await push(sandbox, room_id)
    assert may_publish(alice) == may_publish(bob) == ALL - {"CAMERA"}


@pytest_twisted.ensureDeferred
async def test_a_promotion_grants_nothing_beyond_what_upstream_granted(start_sandbox: StartSandbox) -> None:
    granted = {"video": {"canPublishSources": ["microphone", "camera"]}}
    sandbox = await start_sandbox(guard_reconcile_interval=3600)
    room_id = room_of(sandbox)
    set_permissions(sandbox, room_id, SPEAKERS)
    sandbox.upstream.extra_claims = {
        "video": {"roomJoin": True, "room": room_alias(room_id), "canPublish": True, "canSubscribe": True,
                  **granted["video"]}
    }  # fmt: skip
    bob = await sandbox.enter(BOB, room_id)
    await enforced(sandbox)
    assert may_publish(bob) == frozenset()
    set_levels(sandbox, room_id, bob=100)
    await push(sandbox, room_id)
    assert may_publish(bob) == {"MICROPHONE", "CAMERA"}


@pytest_twisted.ensureDeferred
async def test_a_promotion_grants_nothing_to_a_participant_of_unknown_ceiling(sandbox: Sandbox) -> None:
    room_id, _, _ = await speakers_room(sandbox)
    carol = sandbox.livekit.connect(old_token(CAROL, room_id))
    await enforced(sandbox)
    assert may_publish(carol) == frozenset()
    set_levels(sandbox, room_id, carol=50)
    await push(sandbox, room_id)
    assert may_publish(carol) == frozenset()


@pytest_twisted.ensureDeferred
async def test_a_refreshed_token_carries_the_rights_after_a_promotion(sandbox: Sandbox) -> None:
    room_id, _, bob = await speakers_room(sandbox)
    set_levels(sandbox, room_id, bob=50)
    await push(sandbox, room_id)
    again = sandbox.livekit.connect(sandbox.livekit.refreshed_token(bob.room.name, bob.identity))
    assert may_publish(again) == ALL
    await enforced(sandbox)
    assert may_publish(again) == ALL


@pytest_twisted.ensureDeferred
async def test_a_promotion_that_is_not_pushed_takes_effect_when_the_policy_is_read_again(
    start_sandbox: StartSandbox,
) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=0.1, guard_policy_ttl=0.2)
    room_id, _, bob = await speakers_room(sandbox)
    bob.room.refresh_listed()
    set_levels(sandbox, room_id, bob=50)
    await until(lambda: may_publish(bob) == ALL)
    set_levels(sandbox, room_id)
    await until(lambda: may_publish(bob) == frozenset())


@pytest_twisted.ensureDeferred
async def test_withheld_sources_are_known_after_a_restart(start_sandbox: StartSandbox, tmp_path: Any) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_state_dir=tmp_path)
    room_id, _, bob = await speakers_room(sandbox)
    await sandbox.guard.stopService()
    set_levels(sandbox, room_id, bob=50)
    bob.room.refresh_listed()
    await sandbox.start_guard(guard_reconcile_interval=0.1)
    await until(lambda: may_publish(bob) == ALL)


@pytest_twisted.ensureDeferred
async def test_a_promotion_while_the_homeserver_is_down_takes_effect_when_it_is_back(sandbox: Sandbox) -> None:
    room_id, alice, bob = await speakers_room(sandbox)
    await sandbox.homeserver.stop_listening()
    set_levels(sandbox, room_id, bob=50)
    await push(sandbox, room_id)
    assert may_publish(bob) == frozenset()
    assert may_publish(alice) == ALL
    await sandbox.homeserver.listen()
    await push(sandbox, room_id)
    await until(lambda: may_publish(bob) == ALL)


# -- over the limit --------------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_a_user_who_bypasses_the_limit_takes_no_seat_and_stays_when_demoted(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    set_permissions(sandbox, room_id, {"bypass_limit": 50})
    set_levels(sandbox, room_id, carol=50)
    bob, carol = await sandbox.enter(BOB, room_id), await sandbox.enter(CAROL, room_id)
    await enforced(sandbox)
    assert (await sandbox.ask_token(DAVE, room_id)).code == 403
    set_levels(sandbox, room_id)
    await push(sandbox, room_id)
    assert bob.connected
    assert carol.connected
    sandbox.livekit.disconnect(bob.room.name, bob.identity)
    await enforced(sandbox)
    assert (await sandbox.ask_token(DAVE, room_id)).code == 200  # Carol still takes no seat


@pytest_twisted.ensureDeferred
async def test_an_arrival_over_the_limit_stays_if_the_user_may_now_bypass_it(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    bob = await sandbox.enter(BOB, room_id)
    set_permissions(sandbox, room_id, {"bypass_limit": 50})
    set_levels(sandbox, room_id, carol=50)
    await push(sandbox, room_id)
    carol = sandbox.livekit.connect(old_token(CAROL, room_id))
    await enforced(sandbox)
    assert bob.connected
    assert carol.connected
    dave = sandbox.livekit.connect(old_token(DAVE, room_id))
    await until(lambda: not dave.connected)
    assert carol.connected


@pytest_twisted.ensureDeferred
async def test_a_promotion_in_mid_call_frees_the_seat_and_a_demotion_takes_the_place_from_nobody(
    sandbox: Sandbox,
) -> None:
    room_id = room_of(sandbox, 1)
    set_permissions(sandbox, room_id, {"bypass_limit": 50})
    bob = await sandbox.enter(BOB, room_id)
    await enforced(sandbox)
    assert (await sandbox.ask_token(CAROL, room_id)).code == 403
    set_levels(sandbox, room_id, bob=50)
    await push(sandbox, room_id)
    carol = await sandbox.enter(CAROL, room_id)
    set_levels(sandbox, room_id)
    await push(sandbox, room_id)
    await sandbox.guard.changes.reconcile()
    await enforced(sandbox)
    assert bob.connected
    assert carol.connected
    assert (await sandbox.ask_token(BOB, room_id)).code == 200  # a client asks again in mid-call
    assert (await sandbox.ask_token(DAVE, room_id)).code == 403


@pytest_twisted.ensureDeferred
async def test_a_promotion_that_was_not_pushed_frees_the_seat_for_the_next_join(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    set_permissions(sandbox, room_id, {"bypass_limit": 50})
    bob = await sandbox.enter(BOB, room_id)
    await enforced(sandbox)
    set_levels(sandbox, room_id, bob=50)
    carol = await sandbox.enter(CAROL, room_id)
    await enforced(sandbox)
    assert bob.connected
    assert carol.connected
    assert (await sandbox.ask_token(DAVE, room_id)).code == 403


@pytest_twisted.ensureDeferred
async def test_a_user_who_bypassed_the_limit_and_left_needs_a_seat_once_demoted(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    set_permissions(sandbox, room_id, {"bypass_limit": 50})
    set_levels(sandbox, room_id, carol=50)
    await sandbox.enter(BOB, room_id)
    carol = await sandbox.enter(CAROL, room_id)
    await enforced(sandbox)
    set_levels(sandbox, room_id)
    await push(sandbox, room_id)
    sandbox.livekit.disconnect(carol.room.name, carol.identity)
    await enforced(sandbox)
    await sandbox.guard.changes.reconcile()  # a listing confirms that she has left
    await enforced(sandbox)
    assert (await sandbox.ask_token(CAROL, room_id)).code == 403


# -- in any order -----------------------------------------------------------------------------------------------

Step = Callable[[Sandbox, str], Awaitable[None]]


async def pushed(sandbox: Sandbox, room_id: str) -> None:
    await sandbox.operator("POST", "/policy-changed", json.dumps({"room_id": room_id}).encode())


async def reconciled(sandbox: Sandbox, room_id: str) -> None:
    await sandbox.guard.changes.reconcile()


async def track_published(sandbox: Sandbox, room_id: str) -> None:
    for participant in list(sandbox.livekit.rooms[room_alias(room_id)].participants.values()):
        participant.publish("MICROPHONE")


async def reconnected(sandbox: Sandbox, room_id: str) -> None:
    room = sandbox.livekit.rooms[room_alias(room_id)]
    for participant in list(room.participants.values()):
        sandbox.livekit.connect(participant.refreshed_token())


async def settled(sandbox: Sandbox, room_id: str) -> None:
    await enforced(sandbox)


STEPS: tuple[Step, ...] = (pushed, reconciled, track_published, reconnected, settled)
LEVELS = (0, 50, 100)
PERMISSIONS: tuple[Mapping[str, Any], ...] = (
    {}, SPEAKERS, {"camera": 50}, {"microphone": 100, "users": {BOB: {"microphone": True}}},
)  # fmt: skip
SEEDS = range(int(os.environ.get("ORDERS", "8")))


def expected(permissions: Mapping[str, Any], user: str, level: int) -> frozenset[str]:
    """The sources that the event allows a user, computed without the guard's rules."""
    exceptions = permissions.get("users", {}).get(user, {})
    sources = {"microphone": {"MICROPHONE"}, "camera": {"CAMERA"}, "screen_share": SCREEN}
    allowed = (
        kind for key, kind in sources.items() if exceptions.get(key, level >= permissions.get(key, -1))
    )  # fmt: skip
    return frozenset[str]().union(*allowed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest_twisted.ensureDeferred
async def test_rights_end_the_same_whatever_the_order_of_pushes_webhooks_and_rounds(
    sandbox: Sandbox, seed: int
) -> None:
    random = Random(seed)
    room_id = room_of(sandbox)
    set_permissions(sandbox, room_id, random.choice(PERMISSIONS))
    for user in (BOB, CAROL):
        await sandbox.enter(user, room_id)
    sandbox.livekit.rooms[room_alias(room_id)].refresh_listed()
    levels: dict[str, int] = {}
    permissions: Mapping[str, Any] = {}
    for _ in range(6):
        permissions = random.choice(PERMISSIONS)
        levels = {"bob": random.choice(LEVELS), "carol": random.choice(LEVELS)}
        changes = [
            lambda p=permissions: set_permissions(sandbox, room_id, p),
            lambda v=levels: set_levels(sandbox, room_id, **v),
        ]
        random.shuffle(changes)
        for change in changes:
            change()
            await random.choice(STEPS)(sandbox, room_id)
    await pushed(sandbox, room_id)
    await enforced(sandbox)
    participants = sandbox.livekit.rooms[room_alias(room_id)].participants.values()
    rights = {participant.identity.split(":")[0][1:]: may_publish(participant) for participant in participants}
    assert rights == {name: expected(permissions, f"@{name}:sandbox.local", level) for name, level in levels.items()}
