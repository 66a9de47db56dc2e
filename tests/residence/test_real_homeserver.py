# SPDX-License-Identifier: Apache-2.0
"""The guard's account in rooms of a real Synapse, without admin rights. By default its rooms have version 12."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from statistics import median
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor

from lotusguard.sandbox.demo.sandbox import Refused
from tests.calls import published
from tests.conftest import until
from tests.residence.helpers import NEVER
from tests.synapse import Guarded, MakeGuarded, User

LIMIT, QUALITY = "io.lotus.voice_limit", "io.lotus.room_quality"
ENCRYPTED = [{"type": "m.room.encryption", "state_key": "", "content": {"algorithm": "m.megolm.v1.aes-sha2"}}]
CHANGES = 20
HEARD_WITHIN = 1.0
"""Seconds, on a busy machine; usually 20 ms."""


class Residents:
    """A guard that never looks anything up again, with its account and three users."""

    def __init__(self, guarded: Guarded, account: User, users: list[User]) -> None:
        self.guarded, self.account = guarded, account
        self.synapse, self.sandbox = guarded.synapse, guarded.sandbox
        self.alice, self.bob, self.carol = users

    async def room(self, **how: Any) -> str:
        """A room of Alice's with Bob and Carol, to which the guard was invited."""
        room_id = await self.synapse.create_room(self.alice, preset="public_chat", **how)
        for user in (self.bob, self.carol):
            await self.synapse.change_membership(user, room_id, "join")
        await self.synapse.change_membership(self.alice, room_id, "invite", self.account)
        residence = self.sandbox.guard.residence
        await until(lambda: residence.state_of(room_id) is not None, 30)
        await until(lambda: residence.is_joined(room_id, self.carol.user_id), 30)
        return room_id

    async def put(self, room_id: str, kind: str, content: dict[str, Any]) -> None:
        await self.synapse.set_state(self.alice, room_id, kind, content)

    async def limit_is(self, room_id: str, limit: int | None) -> None:
        def known() -> bool:
            pushed = self.sandbox.guard.residence.state_of(room_id)
            event = pushed.events.get(LIMIT) if pushed is not None else None
            return (event.mapping.get("max_users") if event is not None else None) == limit

        await until(known, 30)


@pytest_twisted.async_yield_fixture
async def residents(set_guarded: MakeGuarded) -> AsyncIterator[Residents]:
    guarded = await set_guarded(guard_policy_ttl=NEVER, guard_membership_interval=NEVER)
    synapse, sandbox = guarded.synapse, guarded.sandbox
    account = await synapse.register("guard")
    users = [await synapse.register(name) for name in ("alice", "bob", "carol")]
    await sandbox.guard.stopService()
    await sandbox.start_guard(matrix_token=account.token)
    await until(lambda: sandbox.guard.residence.alive, 30)
    yield Residents(guarded, account, users)


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("how", [{"room_version": "10"}, {"initial_state": ENCRYPTED}], ids=["v10", "encrypted"])
async def test_policy_and_membership_are_enforced_as_soon_as_they_change(
    residents: Residents, how: dict[str, Any]
) -> None:
    room_id = await residents.room(**how)
    await residents.put(room_id, LIMIT, {"max_users": 1})
    await residents.limit_is(room_id, 1)
    bob = await residents.guarded.enter(residents.bob, room_id)
    with pytest.raises(Refused, match="full"):
        await residents.guarded.enter(residents.carol, room_id)
    bob.publish("SCREEN_SHARE")
    await residents.put(room_id, QUALITY, {"allow_screenshare": False})
    await until(lambda: not published(bob))
    await residents.synapse.change_membership(residents.alice, room_id, "ban", residents.bob)
    await until(lambda: not bob.connected)
    with pytest.raises(Refused, match="not a member"):
        await residents.guarded.enter(residents.bob, room_id)
    await residents.guarded.enter(residents.carol, room_id)


@pytest_twisted.ensureDeferred
async def test_redacted_limit_is_no_limit(residents: Residents) -> None:
    room_id = await residents.room()
    event_id = await residents.synapse.set_state(residents.alice, room_id, LIMIT, {"max_users": 1})
    await residents.limit_is(room_id, 1)
    await residents.synapse.redact(residents.alice, room_id, event_id)
    await residents.limit_is(room_id, None)


@pytest_twisted.ensureDeferred
async def test_guard_that_is_removed_enforces_nothing_more(residents: Residents) -> None:
    room_id = await residents.room()
    await residents.put(room_id, LIMIT, {"max_users": 1})
    await residents.limit_is(room_id, 1)
    await residents.guarded.enter(residents.bob, room_id)
    await residents.synapse.change_membership(residents.alice, room_id, "kick", residents.account)
    await until(lambda: not residents.sandbox.guard.residence.is_resident(room_id), 30)
    await residents.guarded.enter(residents.carol, room_id)


@pytest_twisted.ensureDeferred
async def test_command_is_answered_by_a_notice_and_sets_the_limit(residents: Residents) -> None:
    room_id = await residents.room()
    await residents.put(room_id, "m.room.power_levels", {"users": {residents.account.user_id: 50}})
    since = await residents.synapse.saw(residents.alice)
    path = f"/_matrix/client/v3/rooms/{room_id}/send/m.room.message/1"
    message = {"msgtype": "m.text", "body": "!call limit 4"}
    assert (await residents.synapse.ask("PUT", path, residents.alice.token, message))[0] == 200
    await residents.limit_is(room_id, 4)
    await residents.synapse.saw(residents.alice, "At most 4 people", since)


@pytest_twisted.ensureDeferred
async def test_change_made_while_the_guard_restarts_is_heard(residents: Residents) -> None:
    room_id = await residents.room()
    await residents.put(room_id, LIMIT, {"max_users": 2})
    await residents.limit_is(room_id, 2)
    await residents.sandbox.guard.stopService()
    await residents.put(room_id, LIMIT, {"max_users": 1})
    await residents.sandbox.start_guard(matrix_token=residents.account.token)
    await residents.limit_is(room_id, 1)


async def latencies(residents: Residents, room_id: str) -> list[float]:
    """Seconds from the moment a state event is sent until the screen share is revoked on the SFU, sorted."""
    bob = await residents.guarded.enter(residents.bob, room_id)
    seconds = []
    for _ in range(CHANGES):
        await residents.put(room_id, QUALITY, {"allow_screenshare": True})
        await until(lambda: bob.grant.may_publish(3), 30)
        bob.publish("SCREEN_SHARE")
        began = reactor.seconds()
        await residents.put(room_id, QUALITY, {"allow_screenshare": False})
        await until(lambda: not published(bob), 30)
        seconds.append(reactor.seconds() - began)
    return sorted(seconds)


@pytest_twisted.ensureDeferred
async def test_resident_hears_changes_within_a_second(residents: Residents) -> None:
    """``docs/resident.md`` has the figures of a quiet machine; set ``LATENCIES`` to print them."""
    seconds = await latencies(residents, await residents.room())
    if os.environ.get("LATENCIES"):
        sys.stdout.write(f"\nresident: median {1000 * median(seconds):.0f} ms, worst {1000 * seconds[-1]:.0f} ms\n")
    assert median(seconds) < HEARD_WITHIN
