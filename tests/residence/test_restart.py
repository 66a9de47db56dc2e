# SPDX-License-Identifier: Apache-2.0
"""What a guard knows of rooms after a restart."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytest_twisted

from lotusguard.sandbox.demo.sandbox import Refused, Sandbox
from lotusguard.sandbox.faults import Fault
from tests.calls import ALICE, BOB, CAROL, put_policy, room_of
from tests.conftest import StartSandbox, until
from tests.residence.helpers import GUARD, invited_room, knows, notices, patient_sandbox, resident_sandbox, use_account

ROUTES = ("sync", "state_event", "room_state", "joined_members")


async def persistent(start_sandbox: StartSandbox, directory: Path, **settings: object) -> Sandbox:
    return await resident_sandbox(start_sandbox, guard_state_dir=directory, **settings)


@pytest_twisted.ensureDeferred
async def test_restarted_guard_continues_where_it_stopped(start_sandbox: StartSandbox, tmp_path: Path) -> None:
    sandbox = await persistent(start_sandbox, tmp_path)
    room_id = await invited_room(sandbox, 1)
    since = sandbox.guard.residence.since
    await sandbox.guard.stopService()
    put_policy(sandbox, room_id, 2)
    sandbox.homeserver.leave(room_id, CAROL)
    await use_account(sandbox)
    await knows(sandbox, room_id)
    assert sandbox.guard.residence.since != since
    await sandbox.enter(ALICE, room_id)
    await sandbox.enter(BOB, room_id)
    with pytest.raises(Refused, match="not a member"):
        await sandbox.enter(CAROL, room_id)


@pytest_twisted.ensureDeferred
async def test_limit_is_known_after_a_restart_although_the_homeserver_is_down(
    start_sandbox: StartSandbox, tmp_path: Path
) -> None:
    sandbox = await persistent(start_sandbox, tmp_path, guard_members_only="off", guard_lookup_timeout=1)
    room_id = await invited_room(sandbox, 1)
    await sandbox.enter(BOB, room_id)
    for route in ROUTES:
        sandbox.homeserver.faults[route] = Fault.status(503)
    await use_account(sandbox)
    await until(lambda: sandbox.guard.residence.is_resident(room_id))
    with pytest.raises(Refused, match="full"):
        await sandbox.enter(CAROL, room_id)


@pytest_twisted.ensureDeferred
async def test_room_that_was_left_while_the_guard_was_away_is_not_resident(
    start_sandbox: StartSandbox, tmp_path: Path
) -> None:
    sandbox = await persistent(start_sandbox, tmp_path)
    room_id = await invited_room(sandbox, 1)
    await sandbox.guard.stopService()
    sandbox.homeserver.kick(room_id, GUARD, sender=ALICE)
    await use_account(sandbox)
    await until(lambda: sandbox.guard.residence.alive)
    assert not sandbox.guard.residence.is_resident(room_id)
    await sandbox.guard.stopService()
    await use_account(sandbox)
    await until(lambda: sandbox.guard.residence.alive)
    assert len(sandbox.guard.residence) == 0


@pytest_twisted.ensureDeferred
async def test_invitation_that_was_not_settled_survives_a_restart(start_sandbox: StartSandbox, tmp_path: Path) -> None:
    sandbox = await persistent(start_sandbox, tmp_path)
    sandbox.homeserver.faults["join_room"] = Fault.hang()
    room_id = room_of(sandbox)
    sandbox.homeserver.invite(room_id, GUARD, sender=ALICE)
    await until(lambda: room_id in sandbox.guard.residence.invites)
    await sandbox.guard.stopService()
    del sandbox.homeserver.faults["join_room"]
    await use_account(sandbox)
    await knows(sandbox, room_id)


@pytest_twisted.ensureDeferred
async def test_command_is_not_done_twice(start_sandbox: StartSandbox, tmp_path: Path) -> None:
    sandbox = await persistent(start_sandbox, tmp_path)
    room_id = await invited_room(sandbox)
    sandbox.homeserver.send_message(room_id, ALICE, "!call help")
    await until(lambda: len(notices(sandbox, room_id)) == 1)
    await use_account(sandbox)
    await knows(sandbox, room_id)
    sandbox.homeserver.send_message(room_id, ALICE, "!call")
    await until(lambda: len(notices(sandbox, room_id)) == 2)
    assert "Commands:" not in notices(sandbox, room_id)[1]


@pytest_twisted.ensureDeferred
async def test_stored_rooms_of_another_account_are_not_used(start_sandbox: StartSandbox, tmp_path: Path) -> None:
    sandbox = await persistent(start_sandbox, tmp_path)
    await invited_room(sandbox, 1)
    other = sandbox.homeserver.add_user("other")
    await sandbox.guard.stopService()
    await sandbox.start_guard(matrix_token=other)
    await until(lambda: sandbox.guard.residence.alive)
    assert len(sandbox.guard.residence) == 0


@pytest_twisted.ensureDeferred
async def test_without_a_state_directory_the_first_sync_is_a_full_one(start_sandbox: StartSandbox) -> None:
    sandbox = await patient_sandbox(start_sandbox)
    await use_account(sandbox)
    await until(lambda: sandbox.guard.residence.alive)
    room_id = await invited_room(sandbox, 1)
    await use_account(sandbox)
    await knows(sandbox, room_id)
    await sandbox.enter(BOB, room_id)
    with pytest.raises(Refused, match="full"):
        await sandbox.enter(CAROL, room_id)
