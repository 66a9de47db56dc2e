# SPDX-License-Identifier: Apache-2.0
"""Whose invitations the guard accepts, and what a flood of them costs."""

from __future__ import annotations

import pytest
import pytest_twisted

from lotusguard.sandbox.faults import Fault
from tests.calls import ALICE, counted
from tests.conftest import StartSandbox, until
from tests.residence.helpers import GUARD, patient_sandbox, resident_sandbox, use_account

FOREIGN = "@zoe:elsewhere.org"


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize(
    ("invites", "inviter", "membership"),
    [("local", ALICE, "join"), ("local", FOREIGN, "leave"), ("any", FOREIGN, "join"), (None, ALICE, "join")],
)
async def test_setting_decides_whose_invitations_are_accepted(
    start_sandbox: StartSandbox, invites: str | None, inviter: str, membership: str
) -> None:
    sandbox = await resident_sandbox(start_sandbox, **({"guard_invites": invites} if invites else {}))
    room_id = sandbox.homeserver.create_room(ALICE, joined=[FOREIGN])
    sandbox.homeserver.invite(room_id, GUARD, sender=inviter)
    await until(lambda: sandbox.homeserver.rooms[room_id].membership(GUARD) == membership)


@pytest_twisted.ensureDeferred
async def test_switched_off_invitations_are_left_alone(start_sandbox: StartSandbox) -> None:
    sandbox = await patient_sandbox(start_sandbox, guard_invites="off")
    await use_account(sandbox)
    room_id = sandbox.homeserver.create_room(ALICE)
    sandbox.homeserver.invite(room_id, GUARD, sender=ALICE)
    await until(lambda: sandbox.guard.residence.status.value == "off")
    assert sandbox.homeserver.rooms[room_id].membership(GUARD) == "invite"
    assert sandbox.homeserver.asked["sync"] == 0


@pytest_twisted.ensureDeferred
async def test_guard_joins_no_room_by_itself(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    public = sandbox.homeserver.create_room(ALICE)
    sandbox.homeserver.set_state(public, "m.room.join_rules", {"join_rule": "public"})
    invited = sandbox.homeserver.create_room(ALICE)
    sandbox.homeserver.invite(invited, GUARD, sender=ALICE)
    await until(lambda: sandbox.guard.residence.is_resident(invited))
    assert sandbox.homeserver.rooms[public].membership(GUARD) is None


@pytest_twisted.ensureDeferred
async def test_flood_of_invitations_is_bounded_and_counted(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    sandbox.homeserver.faults["join_room"] = Fault.delay(0.2)
    for _ in range(260):
        sandbox.homeserver.invite(sandbox.homeserver.create_room(ALICE), GUARD, sender=ALICE)
    await until(lambda: counted(sandbox, "invites_total", outcome="dropped") >= 10)
    assert len(sandbox.guard.residence.invites) <= 200


@pytest_twisted.ensureDeferred
async def test_invitation_that_fails_is_tried_again(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    sandbox.homeserver.faults["join_room"] = Fault.status(503, times=1)
    room_id = sandbox.homeserver.create_room(ALICE)
    sandbox.homeserver.invite(room_id, GUARD, sender=ALICE)
    await until(lambda: sandbox.guard.residence.is_resident(room_id), 30)
    assert counted(sandbox, "invites_total", outcome="accepted") == 1
