# SPDX-License-Identifier: Apache-2.0
"""A guard whose account was invited into rooms hears what changes there, and needs no admin rights."""

from __future__ import annotations

import json

import pytest
import pytest_twisted
from livekit.protocol.models import TrackSource

from lotusguard.sandbox.demo.sandbox import Refused
from lotusguard.sandbox.faults import Fault
from lotusguard.sandbox.livekit.participant import Participant
from tests.calls import ALICE, BOB, CAROL, DAVE, counted, published, put_policy, room_of
from tests.conftest import StartSandbox, until
from tests.residence.helpers import (
    GUARD,
    invited_room,
    patient_sandbox,
    readiness,
    resident_sandbox,
    use_account,
)

LIMIT = "io.lotus.voice_limit"


def may_publish(participant: Participant) -> set[str]:
    """The sources that a participant may publish now."""
    return {name for name, source in TrackSource.items() if participant.grant.may_publish(source)}


@pytest_twisted.ensureDeferred
async def test_limit_of_a_resident_room_holds_without_admin_rights(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    room_id = await invited_room(sandbox, 1)
    await sandbox.enter(BOB, room_id)
    with pytest.raises(Refused, match="full"):
        await sandbox.enter(CAROL, room_id)


@pytest_twisted.ensureDeferred
async def test_join_in_a_resident_room_looks_nothing_up(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    room_id = await invited_room(sandbox, 3)
    before = counted(sandbox, "dependency_calls_total", dependency="matrix", outcome="ok")
    await sandbox.enter(BOB, room_id)
    assert counted(sandbox, "dependency_calls_total", dependency="matrix", outcome="ok") == before


@pytest_twisted.ensureDeferred
async def test_forbidden_source_is_revoked_as_soon_as_the_event_is_sent(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    room_id = await invited_room(sandbox)
    bob = await sandbox.enter(BOB, room_id)
    bob.publish("SCREEN_SHARE")
    put_policy(sandbox, room_id, allow_screenshare=False)
    await until(lambda: published(bob) == [])


@pytest_twisted.ensureDeferred
async def test_permission_follows_a_promotion_in_power_levels(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    room_id = await invited_room(sandbox)
    sandbox.homeserver.set_state(room_id, "io.lotus.call_permissions", {"screen_share": 50})
    bob = await sandbox.enter(BOB, room_id)
    await until(lambda: "SCREEN_SHARE" not in may_publish(bob))
    sandbox.homeserver.set_state(room_id, "m.room.power_levels", {"users": {ALICE: 100, BOB: 50}})
    await until(lambda: "SCREEN_SHARE" in may_publish(bob))


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("action", ["kick", "ban", "leave"])
async def test_participant_who_leaves_the_room_is_removed_at_once(start_sandbox: StartSandbox, action: str) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    room_id = await invited_room(sandbox)
    bob, carol = await sandbox.enter(BOB, room_id), await sandbox.enter(CAROL, room_id)
    getattr(sandbox.homeserver, action)(room_id, BOB)
    await until(lambda: not bob.connected)
    assert carol.connected


@pytest_twisted.ensureDeferred
async def test_newcomer_may_join_at_once_and_a_stranger_may_not(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    room_id = await invited_room(sandbox)
    sandbox.homeserver.add_user("eve")
    with pytest.raises(Refused, match="not a member"):
        await sandbox.enter("@eve:sandbox.local", room_id)
    sandbox.homeserver.join(room_id, "eve")
    assert await sandbox.enter("@eve:sandbox.local", room_id)


@pytest_twisted.ensureDeferred
async def test_encrypted_room_is_enforced_and_told_that_commands_cannot_be_read(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    room_id = sandbox.homeserver.create_room(ALICE, joined=[BOB, CAROL], encrypted=True)
    for user in ("alice", "bob", "carol"):
        sandbox.homeserver.add_user(user)
    sandbox.homeserver.set_state(room_id, LIMIT, {"max_users": 1})
    sandbox.homeserver.invite(room_id, GUARD, sender=ALICE)

    def said() -> list[str]:
        timeline = sandbox.homeserver.rooms[room_id].timeline
        return [event["content"]["body"] for _, event in timeline if event["type"] == "m.room.message"]

    await until(lambda: len(said()) == 1)
    assert "encrypted" in said()[0]
    await sandbox.enter(BOB, room_id)
    with pytest.raises(Refused, match="full"):
        await sandbox.enter(CAROL, room_id)
    await use_account(sandbox)
    await until(lambda: sandbox.guard.residence.alive)
    assert len(said()) == 1


@pytest_twisted.ensureDeferred
async def test_room_without_the_guard_passes_and_readiness_says_so(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    room_id = room_of(sandbox, 1)
    await sandbox.enter(BOB, room_id)
    await sandbox.enter(CAROL, room_id)
    code, report = await readiness(sandbox)
    assert code == 200, report
    assert report["rooms"] == {
        "admin_api": "no", "invites": "local", "invites_off_because": None, "sync": "alive", "sync_error": None,
        "resident": 0,
    }  # fmt: skip
    assert any("only the rooms that its account is in (0)" in reason for reason in report["reasons"])
    assert counted(sandbox, "fail_open_total", check="policy", reason="not_resident") >= 1


@pytest_twisted.ensureDeferred
async def test_readiness_names_the_homeserver_if_it_is_not_the_configured_one(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_server_name="Sandbox.local", guard_reconcile_interval=3600)
    await until(lambda: sandbox.guard.residence.status.value == "off")  # the account is known
    reasons = (await readiness(sandbox))[1]["reasons"]
    assert any(one.startswith("GUARD_SERVER_NAME is Sandbox.local, the homeserver is sandbox.local") for one in reasons)


@pytest_twisted.ensureDeferred
async def test_removed_guard_enforces_nothing_more_and_forgets_the_room(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    room_id = await invited_room(sandbox, 1)
    await sandbox.enter(BOB, room_id)
    sandbox.homeserver.kick(room_id, GUARD, sender=ALICE)
    await until(lambda: GUARD in sandbox.homeserver.rooms[room_id].forgotten_by)
    assert not sandbox.guard.residence.is_resident(room_id)
    assert await sandbox.enter(CAROL, room_id)


@pytest_twisted.ensureDeferred
async def test_account_of_an_admin_never_syncs(start_sandbox: StartSandbox) -> None:
    sandbox = await patient_sandbox(start_sandbox)
    room_id = room_of(sandbox, 1)
    sandbox.homeserver.invite(room_id, "admin", sender=ALICE)
    await until(lambda: sandbox.guard.residence.status.value == "off")
    _, report = await readiness(sandbox)
    assert report["rooms"]["invites"] == "off"
    assert report["rooms"]["invites_off_because"] == "the account is an admin's"
    await sandbox.enter(BOB, room_id)
    with pytest.raises(Refused, match="full"):
        await sandbox.enter(CAROL, room_id)
    assert sandbox.homeserver.asked["sync"] == 0
    assert sandbox.homeserver.rooms[room_id].membership("@admin:sandbox.local") == "invite"


@pytest_twisted.ensureDeferred
async def test_account_with_other_devices_never_syncs(start_sandbox: StartSandbox) -> None:
    sandbox = await patient_sandbox(start_sandbox)
    sandbox.homeserver.add_user("guard")
    token = sandbox.homeserver.add_user("guard", device_id="PHONE")
    await sandbox.guard.stopService()
    await sandbox.start_guard(matrix_token=token)
    await until(lambda: sandbox.guard.residence.status.value == "off")
    code, report = await readiness(sandbox)
    assert code == 503
    assert report["dependencies"]["synapse"]["error"] == "no_admin_and_no_invites"
    assert report["rooms"]["invites_off_because"] == "the account has other devices"
    assert sandbox.homeserver.asked["sync"] == 0


@pytest_twisted.ensureDeferred
async def test_admin_account_told_to_accept_invitations_enforces_both_kinds_of_rooms(
    start_sandbox: StartSandbox,
) -> None:
    sandbox = await patient_sandbox(start_sandbox, guard_invites="local")
    await until(lambda: sandbox.guard.residence.alive)
    looked_up, resident = room_of(sandbox, 1), room_of(sandbox, 1)
    sandbox.homeserver.invite(resident, "admin", sender=ALICE)
    await until(lambda: sandbox.guard.residence.is_joined(resident, BOB))
    for room_id in (looked_up, resident):
        await sandbox.enter(BOB, room_id)
        with pytest.raises(Refused, match="full"):
            await sandbox.enter(CAROL, room_id)


@pytest_twisted.ensureDeferred
async def test_stalled_sync_falls_back_to_lookups_as_a_member(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox, guard_policy_ttl=0.1)
    room_id = await invited_room(sandbox, 1)
    sandbox.homeserver.faults["sync"] = Fault.status(503)
    await until(lambda: not sandbox.guard.residence.alive)
    put_policy(sandbox, room_id, 2)
    await sandbox.enter(BOB, room_id)
    await sandbox.enter(CAROL, room_id)
    with pytest.raises(Refused, match="full"):
        await sandbox.enter(DAVE, room_id)
    code, report = await readiness(sandbox)
    assert (code, report["rooms"]["sync"]) == (503, "failing")
    del sandbox.homeserver.faults["sync"]
    await until(lambda: sandbox.guard.residence.alive, 60)
    put_policy(sandbox, room_id, 3)
    await sandbox.enter(DAVE, room_id)


@pytest_twisted.ensureDeferred
async def test_last_known_limit_holds_while_the_homeserver_is_down(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox, guard_members_only="off", guard_lookup_timeout=1)
    room_id = await invited_room(sandbox, 1)
    await sandbox.enter(BOB, room_id)
    sandbox.homeserver.faults[""] = Fault.status(503)
    for route in ("sync", "state_event", "room_state", "whoami"):
        sandbox.homeserver.faults[route] = Fault.status(503)
    await until(lambda: not sandbox.guard.residence.alive)
    with pytest.raises(Refused, match="full"):
        await sandbox.enter(CAROL, room_id)


@pytest_twisted.ensureDeferred
async def test_redacted_limit_is_no_limit(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    room_id = await invited_room(sandbox)
    event_id = sandbox.homeserver.set_state(room_id, LIMIT, {"max_users": 1})
    await sandbox.enter(BOB, room_id)
    sandbox.homeserver.redact(room_id, ALICE, event_id)
    await until(lambda: sandbox.guard.policies.last_known(room_id).max_users is None)
    await sandbox.enter(CAROL, room_id)


@pytest_twisted.ensureDeferred
async def test_gap_in_the_timeline_reads_members_again(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    room_id = await invited_room(sandbox)
    bob = await sandbox.enter(BOB, room_id)
    sandbox.homeserver.leave(room_id, BOB)
    for number in range(200):
        sandbox.homeserver.send_message(room_id, CAROL, f"{number}")
    sandbox.homeserver.set_state(room_id, LIMIT, {"max_users": 7})
    await until(lambda: not bob.connected)
    await until(lambda: sandbox.guard.residence.is_joined(room_id, CAROL))
    assert not sandbox.guard.residence.is_joined(room_id, BOB)


@pytest_twisted.ensureDeferred
async def test_sync_asks_to_appear_offline(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    assert sandbox.homeserver.sync_api.presence[GUARD] == "offline"


@pytest_twisted.ensureDeferred
async def test_hanging_sync_delays_no_join(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    room_id = await invited_room(sandbox, 1)
    other = room_of(sandbox)
    sandbox.homeserver.faults["sync"] = Fault.hang()
    put_policy(sandbox, room_id, 1)  # the running sync ends with it; the next one hangs
    await sandbox.enter(BOB, room_id)
    with pytest.raises(Refused, match="full"):
        await sandbox.enter(CAROL, room_id)
    await sandbox.enter(CAROL, other)


@pytest_twisted.ensureDeferred
async def test_unknown_sync_token_leads_to_a_full_sync(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    room_id = await invited_room(sandbox, 1)
    sandbox.homeserver.faults["sync"] = Fault.status(400, b'{"errcode": "M_UNKNOWN"}', times=2)
    put_policy(sandbox, room_id, 2)
    await until(lambda: not sandbox.guard.residence.alive)
    await until(lambda: sandbox.guard.residence.alive, 60)
    await sandbox.enter(BOB, room_id)
    await sandbox.enter(CAROL, room_id)


@pytest_twisted.ensureDeferred
async def test_rooms_lists_where_state_comes_from(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    room_id = await invited_room(sandbox, 1)
    await sandbox.enter(BOB, room_id)
    rooms = json.loads((await sandbox.operator("GET", "/rooms")).body)["rooms"]
    assert [(room["room_id"], room["source"]) for room in rooms] == [(room_id, "residence")]


@pytest_twisted.ensureDeferred
async def test_rooms_lists_rights_and_the_lobby(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    room_id = await invited_room(sandbox)
    content = {"camera": 50, "users": {BOB: {"camera": True, "microphone": False}}}
    sandbox.homeserver.set_state(room_id, "io.lotus.call_permissions", content)
    await until(lambda: sandbox.guard.policies.last_known(room_id).permissions)
    await sandbox.enter(BOB, room_id)
    await sandbox.livekit.drained()
    await sandbox.guard.enforcement.worker.idle()
    (room,) = json.loads((await sandbox.operator("GET", "/rooms")).body)["rooms"]
    assert room["policy"] == {"max_users": None, "forbidden": [], "permissions": content, "lobby": False}
    assert [one["allowed"] for one in room["present"]] == [["camera", "screen_share", "screen_share_audio"]]
