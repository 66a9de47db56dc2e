# SPDX-License-Identifier: Apache-2.0
"""Members only, during the call: users who leave the room, are kicked or banned are removed, and cannot return."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import pytest_twisted

from lotusguard.guard.calls import memberships
from lotusguard.rules.jwt import SfuKey
from lotusguard.sandbox.demo.sandbox import KEY, SECRET, Sandbox
from lotusguard.sandbox.faults import Fault
from lotusguard.sandbox.livekit.participant import Participant
from tests.calls import ALICE, BOB, CAROL, counted, logged, named, old_token, put_policy, room_of
from tests.conftest import StartSandbox, until

HS_TOKEN = "hs-token"
PROXIED = "/_matrix/client/unstable/io.element.msc4195/rtc/livekit/get_token"


async def enforced(sandbox: Sandbox) -> None:
    """Wait until everything that was reported has been enforced."""
    await sandbox.livekit.drained()
    await sandbox.guard.enforcement.worker.idle()


async def push(sandbox: Sandbox, room_id: str, user: str = "") -> None:
    """Tell the guard of a change, as the homeserver's module does."""
    body = {"room_id": room_id} | ({"user": user} if user else {})
    assert (await sandbox.operator("POST", "/policy-changed", json.dumps(body).encode())).code == 202


async def call_of(sandbox: Sandbox, *users: str) -> tuple[str, list[Participant]]:
    """A room without a policy, with these users in its call. The guard knows everything about them."""
    room_id = room_of(sandbox)
    everybody = [await sandbox.enter(user, room_id) for user in users]
    await enforced(sandbox)
    return room_id, everybody


def leave(sandbox: Sandbox, room_id: str) -> None:
    sandbox.homeserver.leave(room_id, BOB)


def kick(sandbox: Sandbox, room_id: str) -> None:
    sandbox.homeserver.kick(room_id, BOB)


def ban(sandbox: Sandbox, room_id: str) -> None:
    sandbox.homeserver.ban(room_id, BOB)


Departure = Callable[[Sandbox, str], None]
DEPARTURES = (leave, kick, ban)


# -- removed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("departs", DEPARTURES)
@pytest_twisted.ensureDeferred
async def test_a_departure_that_is_pushed_removes_the_participant(sandbox: Sandbox, departs: Departure) -> None:
    room_id, (alice, bob) = await call_of(sandbox, ALICE, BOB)
    lookups = sandbox.homeserver.asked["user_joined_rooms"]
    departs(sandbox, room_id)
    with logged() as events:
        await push(sandbox, room_id, BOB)
        await until(lambda: not bob.connected)
        await enforced(sandbox)
    assert alice.connected
    assert sandbox.homeserver.asked["user_joined_rooms"] == lookups + 1  # only Bob's
    assert counted(sandbox, "members_removed_total", reason="not_a_member") == 1
    assert named(events, "removed") == [f"removed {BOB} from the call of {room_id}: not_a_member"]


@pytest.mark.parametrize("departs", DEPARTURES)
@pytest_twisted.ensureDeferred
async def test_a_departure_that_is_not_pushed_is_noticed_within_the_interval(
    start_sandbox: StartSandbox, departs: Departure
) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=0.1, guard_membership_interval=1, guard_policy_ttl=0.1)
    room_id, (alice, bob) = await call_of(sandbox, ALICE, BOB)
    alice.room.refresh_listed()
    sandbox.livekit.webhooks.urls[:] = []
    departs(sandbox, room_id)
    await until(lambda: not bob.connected)
    assert alice.connected


@pytest_twisted.ensureDeferred
async def test_a_push_about_the_whole_room_checks_everybody(sandbox: Sandbox) -> None:
    room_id, (alice, bob, carol) = await call_of(sandbox, ALICE, BOB, CAROL)
    sandbox.homeserver.kick(room_id, BOB)
    sandbox.homeserver.ban(room_id, CAROL)
    await push(sandbox, room_id)
    await until(lambda: not bob.connected and not carol.connected)
    assert alice.connected


@pytest_twisted.ensureDeferred
async def test_all_sessions_of_a_banned_user_are_removed_in_every_slot(sandbox: Sandbox) -> None:
    room_id, (alice, bob) = await call_of(sandbox, ALICE, BOB)
    sessions = [
        bob,
        await sandbox.enter(BOB, room_id, device="TABLET"),
        await sandbox.enter(BOB, room_id, new=True),
        await sandbox.enter(BOB, room_id, new=True, slot_id="m.call#another"),
        sandbox.livekit.connect(old_token(BOB, room_id), publish="screen"),
    ]
    await enforced(sandbox)
    sandbox.homeserver.ban(room_id, BOB)
    await push(sandbox, room_id, BOB)
    await until(lambda: not any(session.connected for session in sessions))
    assert alice.connected


@pytest.mark.parametrize("token", ["first", "refreshed"])
@pytest_twisted.ensureDeferred
async def test_a_banned_user_is_removed_at_each_of_ten_reconnects(sandbox: Sandbox, token: str) -> None:
    room_id = room_of(sandbox)
    alice = await sandbox.enter(ALICE, room_id)
    first = json.loads((await sandbox.ask_token(BOB, room_id)).body)["jwt"]
    bob = sandbox.livekit.connect(first)
    used = first if token == "first" else sandbox.livekit.refreshed_token(bob.room.name, bob.identity)
    await enforced(sandbox)
    sandbox.homeserver.ban(room_id, BOB)
    await push(sandbox, room_id, BOB)
    await until(lambda: not bob.connected)
    for _ in range(10):
        again = sandbox.livekit.connect(used)
        await until(lambda again=again: not again.connected)  # type: ignore[misc]
    await enforced(sandbox)
    assert alice.connected
    assert counted(sandbox, "members_removed_total", reason="not_a_member") == 11


@pytest_twisted.ensureDeferred
async def test_a_user_who_was_unbanned_and_joined_again_may_return_at_once(sandbox: Sandbox) -> None:
    room_id, (_, bob) = await call_of(sandbox, ALICE, BOB)
    sandbox.homeserver.ban(room_id, BOB)
    await push(sandbox, room_id, BOB)
    await until(lambda: not bob.connected)
    assert (await sandbox.ask_token(BOB, room_id)).code == 403
    sandbox.homeserver.unban(room_id, BOB)
    sandbox.homeserver.join(room_id, BOB)
    again = await sandbox.enter(BOB, room_id)  # nobody has told the guard
    await enforced(sandbox)
    assert again.connected


@pytest_twisted.ensureDeferred
async def test_a_removed_participant_leaves_the_seat_to_others(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    bob = await sandbox.enter(BOB, room_id)
    await enforced(sandbox)
    sandbox.homeserver.ban(room_id, BOB)
    await push(sandbox, room_id, BOB)
    await until(lambda: not bob.connected)
    await enforced(sandbox)
    assert (await sandbox.ask_token(ALICE, room_id)).code == 200


@pytest_twisted.ensureDeferred
async def test_an_arrival_that_no_webhook_reported_is_checked_by_reconciling(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=0.1)
    room_id, (alice,) = await call_of(sandbox, ALICE)
    sandbox.livekit.webhooks.urls[:] = []
    sandbox.homeserver.ban(room_id, BOB)
    bob = sandbox.livekit.connect(old_token(BOB, room_id))
    alice.room.refresh_listed()
    await until(lambda: not bob.connected)
    assert alice.connected


@pytest_twisted.ensureDeferred
async def test_users_below_the_join_level_are_removed_when_permissions_say_so(sandbox: Sandbox) -> None:
    room_id, (alice, bob) = await call_of(sandbox, ALICE, BOB)
    sandbox.homeserver.set_state(room_id, "io.lotus.call_permissions", {"join": 50})
    await push(sandbox, room_id)
    await until(lambda: not bob.connected)
    await enforced(sandbox)
    assert alice.connected
    assert counted(sandbox, "members_removed_total", reason="join_level") == 1


# -- the app-service listener ----------------------------------------------------------------------------------


async def enter_proxied(sandbox: Sandbox, user: str, room_id: str) -> Participant:
    """Join through a homeserver that proxies the request."""
    body = {"room_id": room_id, "slot_id": "m.call#ROOM", "member_id": user, "url": "wss://x"}
    headers = {"Authorization": f"Bearer {HS_TOKEN}", "X-Matrix-User-Identifier": user}
    answer = await sandbox.request("POST", sandbox.appservice_url + PROXIED, json.dumps(body).encode(), headers)
    if answer.code != 200:
        raise AssertionError(json.loads(answer.body))
    return sandbox.livekit.connect(json.loads(answer.body)["jwt"])


@pytest_twisted.ensureDeferred
async def test_participants_who_joined_through_the_app_service_listener_are_enforced_alike(
    start_sandbox: StartSandbox,
) -> None:
    sandbox = await start_sandbox(
        guard_reconcile_interval=3600, guard_appservice_port=0, guard_appservice_token=HS_TOKEN,
        upstream_options={"hs_token": HS_TOKEN},
    )  # fmt: skip
    room_id = room_of(sandbox)
    bob, carol = await enter_proxied(sandbox, BOB, room_id), await enter_proxied(sandbox, CAROL, room_id)
    assert carol.publish("SCREEN_SHARE")
    await enforced(sandbox)
    sandbox.homeserver.ban(room_id, BOB)
    put_policy(sandbox, room_id, allow_screenshare=False)
    await push(sandbox, room_id)
    await until(lambda: not bob.connected and not carol.tracks)
    assert carol.connected
    with pytest.raises(AssertionError, match="not a member"):
        await enter_proxied(sandbox, BOB, room_id)


# -- never removed -------------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_a_ban_while_the_homeserver_is_down_takes_effect_when_it_is_back(sandbox: Sandbox) -> None:
    room_id, (alice, bob) = await call_of(sandbox, ALICE, BOB)
    for route in ("user_joined_rooms", "user_memberships"):
        sandbox.homeserver.faults[route] = Fault.status(500)
    sandbox.homeserver.ban(room_id, BOB)
    await push(sandbox, room_id, BOB)
    await enforced(sandbox)
    assert bob.connected
    assert counted(sandbox, "memberships_unknown_total") >= 1
    sandbox.homeserver.faults.clear()
    sandbox.guard.enforcement.enforce(bob.room.name)
    await until(lambda: not bob.connected)
    assert alice.connected


@pytest_twisted.ensureDeferred
async def test_a_missing_entry_removes_only_after_a_second_lookup(
    start_sandbox: StartSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memberships, "ABSENT_FOR", 0.3)
    sandbox = await start_sandbox(guard_reconcile_interval=3600)
    room_id, (alice, bob) = await call_of(sandbox, ALICE, BOB)
    sandbox.homeserver.purge_member(room_id, BOB)
    await push(sandbox, room_id, BOB)
    await enforced(sandbox)
    assert bob.connected
    lookups = 0

    def removed() -> bool:
        nonlocal lookups
        lookups += 1
        sandbox.guard.enforcement.enforce(bob.room.name)
        return not bob.connected

    await until(removed)
    assert lookups > 1
    assert alice.connected


@pytest_twisted.ensureDeferred
async def test_nobody_is_removed_from_a_room_whose_state_the_homeserver_has_forgotten(
    start_sandbox: StartSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its last user has left, a homeserver answers that the room has no state and no members."""
    monkeypatch.setattr(memberships, "ABSENT_FOR", 0.0)
    monkeypatch.setattr(memberships, "FOREIGN_ABSENT_FOR", 0.0)
    sandbox = await start_sandbox(guard_reconcile_interval=3600)
    room_id, (alice, bob) = await call_of(sandbox, ALICE, BOB)
    sandbox.homeserver.rooms[room_id].state.clear()
    for _ in range(3):
        await push(sandbox, room_id)
        await enforced(sandbox)
    assert alice.connected
    assert bob.connected


@pytest.mark.parametrize("kind", ["ingress", "egress", "sip", "agent"])
@pytest_twisted.ensureDeferred
async def test_participants_that_are_not_people_stay_and_are_counted(sandbox: Sandbox, kind: str) -> None:
    room_id, (alice,) = await call_of(sandbox, ALICE)
    key = SfuKey(KEY, SECRET)
    claims = key.read(old_token("@nobody:sandbox.local", room_id)) | {"kind": kind}
    service = sandbox.livekit.connect(key.sign(claims))
    await enforced(sandbox)
    await push(sandbox, room_id)
    await enforced(sandbox)
    assert service.connected
    assert alice.connected
    assert counted(sandbox, "unidentified_participants") == 1


@pytest_twisted.ensureDeferred
async def test_an_identity_that_nobody_can_resolve_stays_and_is_counted(sandbox: Sandbox) -> None:
    room_id, _ = await call_of(sandbox, ALICE)
    hashed = sandbox.livekit.connect(old_token("YrxuWaR+gvn98aOWeDBbgKTPaUDOGxY5XI3xcFmNN/A", room_id))
    await push(sandbox, room_id)
    await enforced(sandbox)
    assert hashed.connected
    assert counted(sandbox, "unidentified_participants") == 1


@pytest_twisted.ensureDeferred
async def test_a_room_upgrade_removes_nobody(sandbox: Sandbox) -> None:
    room_id, everybody = await call_of(sandbox, ALICE, BOB)
    sandbox.homeserver.set_state(
        room_id, "m.room.tombstone", {"body": "moved", "replacement_room": "!new:sandbox.local"}
    )
    await push(sandbox, room_id)
    await enforced(sandbox)
    assert all(one.connected for one in everybody)


@pytest.mark.parametrize("members_only", ["log", "off"])
@pytest_twisted.ensureDeferred
async def test_members_only_log_and_off_remove_nobody(start_sandbox: StartSandbox, members_only: str) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_members_only=members_only)
    room_id, (_, bob) = await call_of(sandbox, ALICE, BOB)
    sandbox.homeserver.ban(room_id, BOB)
    with logged() as events:
        for _ in range(3):
            await push(sandbox, room_id, BOB)
            await enforced(sandbox)
    assert bob.connected
    assert len(named(events, "not_a_member")) == (1 if members_only == "log" else 0)


# -- several guards on one state directory -----------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_a_guard_without_the_lease_changes_nobody_until_it_gets_it(
    start_sandbox: StartSandbox, tmp_path: Any
) -> None:
    from lotusguard.guard.seats.lease import StateLease

    other = StateLease(tmp_path)
    assert other.renew()
    sandbox = await start_sandbox(guard_reconcile_interval=0.1, guard_state_dir=tmp_path)
    room_id, (_, bob) = await call_of(sandbox, ALICE, BOB)
    assert bob.publish("SCREEN_SHARE")
    bob.room.refresh_listed()
    sandbox.homeserver.ban(room_id, BOB)
    put_policy(sandbox, room_id, 1, allow_screenshare=False)
    with logged() as events:
        await push(sandbox, room_id)
        await until(lambda: len(named(events, "skipped")) >= 2)
    assert bob.connected
    assert bob.tracks
    assert json.loads((await sandbox.operator("GET", "/readyz")).body)["enforcing"]["in_call"] is False
    other.release()
    await until(lambda: not bob.connected)


# -- large calls -------------------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_a_large_call_is_checked_with_few_requests(sandbox: Sandbox) -> None:
    people = 60
    room_id = room_of(sandbox)
    users = [f"@person{number}:sandbox.local" for number in range(people)]
    for user in users:
        sandbox.homeserver.join(room_id, user)
    alice = await sandbox.enter(ALICE, room_id)
    sandbox.livekit.webhooks.urls[:] = []
    everybody = [sandbox.livekit.connect(old_token(user, room_id)) for user in users]
    await enforced(sandbox)
    sandbox.homeserver.asked.clear()
    sandbox.homeserver.ban(room_id, users[7])
    await push(sandbox, room_id)
    await until(lambda: not everybody[7].connected)
    await enforced(sandbox)
    assert sum(one.connected for one in everybody) == people - 1
    assert alice.connected
    asked = sandbox.homeserver.asked
    assert asked["room_members"] == 1
    assert asked["user_joined_rooms"] == 1
    assert asked["user_memberships"] == 1
