# SPDX-License-Identifier: Apache-2.0
"""Whose invitations the guard accepts, and what a flood of them costs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.task import Clock

from lotusguard.guard.rooms.residence import invites as invites_module
from lotusguard.guard.rooms.residence import residence as residence_module
from lotusguard.guard.rooms.residence.account import Invites
from lotusguard.guard.rooms.residence.invites import InviteHandler
from lotusguard.guard.rooms.residence.residence import Residence
from lotusguard.metrics import Metrics
from lotusguard.sandbox.faults import Fault
from tests.calls import ALICE, BOB, counted, logged, named, room_of
from tests.conftest import StartSandbox, until
from tests.residence.helpers import GUARD, patient_sandbox, readiness, resident_sandbox, use_account

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


@pytest_twisted.ensureDeferred
async def test_one_user_cannot_take_all_places_of_the_account_although_the_guard_is_restarted(
    start_sandbox: StartSandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(invites_module, "ROOMS_PER_INVITER", 2)
    sandbox = await resident_sandbox(start_sandbox, guard_state_dir=tmp_path)
    homeserver = sandbox.homeserver
    rooms = [room_of(sandbox) for _ in range(5)]
    for room_id in rooms[:2]:
        homeserver.invite(room_id, GUARD, sender=BOB)
    await until(lambda: len(sandbox.guard.residence) == 2)
    await use_account(sandbox)
    await until(lambda: sandbox.guard.residence.alive)
    with logged() as events:
        homeserver.invite(rooms[2], GUARD, sender=BOB)
        homeserver.invite(rooms[3], GUARD, sender=ALICE)
        await until(lambda: sandbox.guard.residence.is_resident(rooms[3]))
        await until(lambda: homeserver.rooms[rooms[2]].membership(GUARD) == "leave")
        await until(lambda: len(named(events, "invite")) == 2)
    assert f"invited to {rooms[2]} by {BOB}: declined (too_many_rooms_of_inviter)" in named(events, "invite")
    sandbox.homeserver.leave(rooms[0], GUARD)
    await until(lambda: not sandbox.guard.residence.is_resident(rooms[0]))
    homeserver.invite(rooms[4], GUARD, sender=BOB)
    await until(lambda: sandbox.guard.residence.is_resident(rooms[4]))


@pytest_twisted.ensureDeferred
async def test_many_invitations_of_one_user_at_once_do_not_exceed_the_bound(
    start_sandbox: StartSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(invites_module, "ROOMS_PER_INVITER", 2)
    sandbox = await resident_sandbox(start_sandbox)
    sandbox.homeserver.faults["join_room"] = Fault.delay(0.2)
    for _ in range(8):
        sandbox.homeserver.invite(room_of(sandbox), GUARD, sender=BOB)
    await until(lambda: counted(sandbox, "invites_total", outcome="declined") == 6)
    await until(lambda: not sandbox.guard.residence.invites)
    assert len(sandbox.guard.residence) == 2


@pytest_twisted.ensureDeferred
async def test_log_and_report_say_that_no_more_rooms_fit(
    start_sandbox: StartSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (invites_module, residence_module):
        monkeypatch.setattr(module, "ROOMS_KEPT", 1)
    sandbox = await resident_sandbox(start_sandbox)
    sandbox.homeserver.invite(room_of(sandbox), GUARD, sender=BOB)
    await until(lambda: len(sandbox.guard.residence) == 1)
    with logged() as events:
        sandbox.homeserver.invite(room_of(sandbox), GUARD, sender=ALICE)
        await until(lambda: named(events, "invite"))
    assert "declined (too_many_rooms)" in named(events, "invite")[0]
    _, report = await readiness(sandbox)
    expected = "the account of MATRIX_TOKEN is in 1 rooms, as many as fit: it declines invitations"
    assert expected in report["reasons"]


class Joins:
    """A homeserver that lets the account join."""

    async def join(self, room_id: str) -> None: ...


def test_rooms_that_the_account_joined_and_has_left_unheard_take_no_place() -> None:
    clock, metrics = Clock(), Metrics()
    residence = Residence(None, clock, lambda: 0.0, metrics)
    account: Any = SimpleNamespace(invites=Invites.ANY, server_name="h")
    client: Any = Joins()
    handler = InviteHandler(client, account, residence, clock, metrics)
    for number in range(3):
        handler.invited(f"!{number}:h", ALICE)
    residence.add_invite("!waits:h", BOB)
    assert set(residence.invites) == {"!0:h", "!1:h", "!2:h", "!waits:h"}
    handler.heard_all({"!1:h"})
    assert set(residence.invites) == {"!1:h", "!waits:h"}
