# SPDX-License-Identifier: Apache-2.0
"""Helpers for tests of a guard whose account is in rooms: an account without admin rights, invited by Alice."""

from __future__ import annotations

import json
from typing import Any

from lotusguard.sandbox.demo.sandbox import Sandbox
from tests.calls import ALICE, room_of
from tests.conftest import StartSandbox, until

GUARD = "@guard:sandbox.local"
NEVER = 3600


async def patient_sandbox(start_sandbox: StartSandbox, **settings: object) -> Sandbox:
    """A sandbox whose guard never reconciles and believes lookups for an hour: what it knows is new, it has heard."""
    return await start_sandbox(
        **{"guard_reconcile_interval": NEVER, "guard_policy_ttl": NEVER, "guard_membership_interval": NEVER, **settings}
    )


async def use_account(sandbox: Sandbox, **settings: object) -> None:
    """Start the guard again with the account."""
    logins = sandbox.homeserver.logins
    token = next((token for token, login in logins.items() if login.user_id == GUARD), "")
    if sandbox.guard.running:
        await sandbox.guard.stopService()
    await sandbox.start_guard(matrix_token=token or sandbox.homeserver.add_user("guard"), **settings)


async def resident_sandbox(start_sandbox: StartSandbox, **settings: object) -> Sandbox:
    """A guard with an account of its own whose sync is alive."""
    sandbox = await patient_sandbox(start_sandbox, **settings)
    await use_account(sandbox)
    await until(lambda: sandbox.guard.residence.alive)
    return sandbox


async def invited_room(sandbox: Sandbox, max_users: int | None = None, **quality: bool) -> str:
    """A room of Alice's, with Bob, Carol and Dave, to which she invites the guard; it has accepted."""
    room_id = room_of(sandbox, max_users, **quality)
    sandbox.homeserver.invite(room_id, GUARD, sender=ALICE)
    await knows(sandbox, room_id)
    return room_id


async def knows(sandbox: Sandbox, room_id: str) -> None:
    """Wait until the guard is in a room and knows its members."""
    residence = sandbox.guard.residence
    await until(lambda: residence.state_of(room_id) is not None and residence.is_joined(room_id, GUARD))


async def readiness(sandbox: Sandbox) -> tuple[int, dict[str, Any]]:
    answer = await sandbox.operator("GET", "/readyz")
    return answer.code, json.loads(answer.body)


def notices(sandbox: Sandbox, room_id: str) -> list[str]:
    """What the guard has said in a room."""
    return [
        event["content"]["body"]
        for _, event in sandbox.homeserver.rooms[room_id].timeline
        if event["type"] == "m.room.message" and event["sender"] == GUARD and event["content"].get("body")
    ]
