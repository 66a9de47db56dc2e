# SPDX-License-Identifier: Apache-2.0
"""Large calls: what one participant does costs the same however many others there are, and rights change at once."""

from __future__ import annotations

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from lotusguard.clients.waiting import SLICE, in_slices
from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.sandbox.faults import Fault
from lotusguard.sandbox.livekit.participant import Participant
from tests.calls import ALICE, BOB, CAROL, change_policy, counted, old_token, published, room_of
from tests.conftest import StartSandbox, until

NO_SCREEN = {"allow_screenshare": False}


def times_asked(sandbox: Sandbox, method: str) -> int:
    return sum(asked.path.endswith(f"/{method}") for asked in sandbox.livekit.seen)


async def sharing(sandbox: Sandbox, room_id: str, *users: str) -> list[Participant]:
    """These users in the room's call, sharing their screens, as the guard has seen it."""
    people = [await sandbox.enter(user, room_id) for user in users]
    for who in people:
        assert who.publish("SCREEN_SHARE")
    await sandbox.livekit.drained()
    await sandbox.guard.enforcement.worker.idle()
    return people


@pytest_twisted.ensureDeferred
async def test_an_arrival_in_a_large_call_is_checked_without_a_listing(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lotusguard.guard.calls.enforcement.LARGE_CALL", 1)
    room_id = room_of(sandbox, **NO_SCREEN)
    for user in (ALICE, BOB):
        await sandbox.enter(user, room_id)
    await until(lambda: sum(sandbox.guard.enforcement.watched.values()) == 2)
    await sandbox.livekit.drained()
    await sandbox.guard.enforcement.worker.idle()
    listings = times_asked(sandbox, "ListParticipants")
    carol = sandbox.livekit.connect(old_token(CAROL, room_id))
    assert carol.publish("SCREEN_SHARE")
    await until(lambda: published(carol) == [])
    assert times_asked(sandbox, "ListParticipants") == listings


@pytest_twisted.ensureDeferred
async def test_somebody_who_is_not_a_member_is_removed_from_a_large_call(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lotusguard.guard.calls.enforcement.LARGE_CALL", 1)
    room_id = room_of(sandbox)
    for user in (ALICE, BOB):
        await sandbox.enter(user, room_id)
    await until(lambda: sum(sandbox.guard.enforcement.watched.values()) == 2)
    sandbox.homeserver.ban(room_id, CAROL)
    carol = sandbox.livekit.connect(old_token(CAROL, room_id))
    await until(lambda: not carol.connected)
    await until(lambda: counted(sandbox, "members_removed_total", reason="not_a_member") == 1)


@pytest_twisted.ensureDeferred
async def test_when_many_participants_change_none_of_them_is_read_again(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lotusguard.guard.calls.participants.AT_ONCE_FROM", 1)
    room_id = room_of(sandbox)
    people = await sharing(sandbox, room_id, ALICE, BOB, CAROL)
    await change_policy(sandbox, room_id, **NO_SCREEN)
    await until(lambda: all(published(who) == [] for who in people))
    assert times_asked(sandbox, "GetParticipant") == 0
    assert times_asked(sandbox, "UpdateParticipant") == 3


@pytest_twisted.ensureDeferred
async def test_what_one_listing_is_too_old_for_is_done_with_the_next(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lotusguard.guard.calls.participants.AT_ONCE_FROM", 1)
    monkeypatch.setattr("lotusguard.guard.calls.participants.PARTICIPANTS_AT_ONCE", 1)
    monkeypatch.setattr("lotusguard.guard.calls.participants.LISTING_SERVES", 0.0)
    room_id = room_of(sandbox)
    people = await sharing(sandbox, room_id, ALICE, BOB, CAROL)
    monkeypatch.setattr("lotusguard.guard.calls.participants.LISTING_SERVES", 0.001)
    await change_policy(sandbox, room_id, **NO_SCREEN)
    await until(lambda: all(published(who) == [] for who in people))


@pytest_twisted.ensureDeferred
async def test_rights_are_adjusted_before_memberships_are_known(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_lookup_timeout=60)
    room_id = room_of(sandbox)
    (alice,) = await sharing(sandbox, room_id, ALICE)
    for route in ("user_joined_rooms", "user_memberships"):
        sandbox.homeserver.faults[route] = Fault.hang()
    await change_policy(sandbox, room_id, **NO_SCREEN)
    await until(lambda: published(alice) == [])
    sandbox.homeserver.faults.clear()


def test_other_work_gets_its_turn_between_slices() -> None:
    clock, seen = Clock(), []

    async def walk() -> None:
        async for item in in_slices(clock, range(2 * SLICE + 1)):
            seen.append(item)

    walking = Deferred.fromCoroutine(walk())
    seen_in_between: list[int] = []
    clock.callLater(0, lambda: seen_in_between.append(len(seen)))
    clock.advance(0)
    assert seen_in_between == [2 * SLICE]
    assert seen == [*range(2 * SLICE + 1)]
    assert walking.called
