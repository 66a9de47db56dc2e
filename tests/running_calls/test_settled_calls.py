# SPDX-License-Identifier: Apache-2.0
"""Reconciling looks at nobody in calls where nothing has changed, and misses nothing that has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import pytest_twisted
from attrs import evolve
from livekit.protocol.models import TrackSource
from twisted.internet import reactor
from twisted.internet.task import deferLater

from lotusguard.guard.calls.settled import Basis, SettledCalls
from lotusguard.guard.seats.registry import MemoryTokenRegistry
from lotusguard.rules.policy import NO_POLICY, Policy
from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.sandbox.faults import Fault
from lotusguard.sandbox.livekit.participant import Participant
from tests.calls import ALICE, BOB, CAROL, counted, old_token, put_policy, room_of, seen_in
from tests.conftest import StartSandbox

NO_SCREEN = {"allow_screenshare": False}
ALIAS = "alias"


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The identities that the guard looked at."""
    looked_at: list[str] = []
    look = MemoryTokenRegistry.user_behind

    async def noted(registry: MemoryTokenRegistry, alias: str, identity: str) -> str:
        looked_at.append(identity)
        return await look(registry, alias, identity)

    monkeypatch.setattr(MemoryTokenRegistry, "user_behind", noted)
    return looked_at


async def reconciled(sandbox: Sandbox, rounds: int = 1) -> None:
    for _ in range(rounds):
        await sandbox.guard.changes.reconcile()
        await sandbox.guard.enforcement.worker.idle()


async def settled(sandbox: Sandbox, *users: str, **quality: bool) -> tuple[str, list[Participant]]:
    """A call in which nothing is left to do. From now on the guard gets no webhooks."""
    room_id = room_of(sandbox, 10, **quality)
    everybody = [await sandbox.enter(user, room_id) for user in users]
    await sandbox.livekit.drained()
    await sandbox.guard.enforcement.worker.idle()
    sandbox.livekit.webhooks.urls[:] = []
    everybody[0].room.refresh_listed()
    await reconciled(sandbox, 3)
    return room_id, everybody


@pytest_twisted.ensureDeferred
async def test_nobody_is_looked_at_where_nothing_has_changed(sandbox: Sandbox, looked_at: list[str]) -> None:
    room_id, everybody = await settled(sandbox, ALICE, BOB, **NO_SCREEN)
    looked_at.clear()
    listed = sandbox.livekit.asked["ListParticipants"]
    await reconciled(sandbox, 5)
    assert sandbox.livekit.asked["ListParticipants"] == listed + 5
    assert looked_at == []
    assert sandbox.guard.enforcement.watched == {everybody[0].room.name: 2}
    assert await seen_in(sandbox, room_id) == [(ALICE, True), (BOB, True)]


@pytest_twisted.ensureDeferred
async def test_a_policy_that_was_read_again_and_differs_is_enforced(sandbox: Sandbox) -> None:
    room_id, (alice, _) = await settled(sandbox, ALICE, BOB)
    put_policy(sandbox, room_id, 10, **NO_SCREEN)
    await reconciled(sandbox)
    assert alice.grant.may_publish(TrackSource.SCREEN_SHARE)  # the policy that is known is fresh
    sandbox.guard.policies.forget_freshness(room_id)
    await reconciled(sandbox)
    assert not alice.grant.may_publish(TrackSource.SCREEN_SHARE)


@pytest_twisted.ensureDeferred
async def test_a_right_that_somebody_else_gave_is_revoked(sandbox: Sandbox) -> None:
    _, (alice, _) = await settled(sandbox, ALICE, BOB, **NO_SCREEN)
    alice.grant = replace(alice.grant, can_publish_sources=[])
    await reconciled(sandbox)
    assert not alice.grant.may_publish(TrackSource.SCREEN_SHARE)


@pytest_twisted.ensureDeferred
async def test_arrivals_and_departures_without_webhooks_are_seen(sandbox: Sandbox) -> None:
    room_id, (_, bob) = await settled(sandbox, ALICE, BOB)
    sandbox.livekit.connect(old_token(CAROL, room_id))
    await reconciled(sandbox)
    assert [user for user, _ in await seen_in(sandbox, room_id)] == [ALICE, BOB, CAROL]
    sandbox.livekit.disconnect(bob.room.name, bob.identity)
    await reconciled(sandbox)
    assert [user for user, _ in await seen_in(sandbox, room_id)] == [ALICE, CAROL]


@pytest_twisted.ensureDeferred
async def test_a_member_who_left_unseen_is_removed_when_the_membership_is_due(start_sandbox: StartSandbox) -> None:
    interval = 2.0
    sandbox = await start_sandbox(
        guard_reconcile_interval=3600, guard_membership_interval=interval, guard_policy_ttl=interval
    )
    room_id, (alice, bob) = await settled(sandbox, ALICE, BOB)
    sandbox.homeserver.leave(room_id, BOB)
    began = reactor.seconds()
    while bob.connected:
        assert reactor.seconds() < began + 15
        await reconciled(sandbox)
        await deferLater(reactor, 0.05)
    assert reactor.seconds() < began + 2 * interval + 5
    assert alice.connected
    assert counted(sandbox, "members_removed_total", reason="not_a_member") == 1


@pytest_twisted.ensureDeferred
async def test_a_departure_that_a_join_finds_out_is_acted_on_in_the_next_round(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_policy_ttl=0.0001)
    room_id, (alice, bob) = await settled(sandbox, ALICE, BOB)
    sandbox.homeserver.leave(room_id, BOB)
    assert (await sandbox.ask_token(BOB, room_id)).code == 403
    await reconciled(sandbox)
    assert not bob.connected
    assert alice.connected


@pytest_twisted.ensureDeferred
async def test_memberships_that_may_have_changed_are_read_again(sandbox: Sandbox) -> None:
    room_id, (alice, bob) = await settled(sandbox, ALICE, BOB)
    sandbox.homeserver.leave(room_id, BOB)
    await reconciled(sandbox, 2)
    assert bob.connected  # the membership that is known is believed
    sandbox.guard.changes.anything_may_have_changed()
    await sandbox.guard.enforcement.worker.idle()
    assert not bob.connected
    assert alice.connected


@pytest_twisted.ensureDeferred
async def test_what_is_owed_is_restored_when_restoring_is_switched_on(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_restore=False)
    room_id, (alice,) = await settled(sandbox, ALICE, **NO_SCREEN)
    put_policy(sandbox, room_id, 10)
    sandbox.guard.policies.forget_freshness(room_id)
    await reconciled(sandbox, 3)
    assert not alice.grant.may_publish(TrackSource.SCREEN_SHARE)
    sandbox.guard.reload(sandbox.settings.model_copy(update={"guard_restore": True}))
    await reconciled(sandbox)
    assert alice.grant.may_publish(TrackSource.SCREEN_SHARE)


@pytest_twisted.ensureDeferred
async def test_a_round_in_which_the_homeserver_fails_settles_nothing(sandbox: Sandbox, looked_at: list[str]) -> None:
    room_id, _ = await settled(sandbox, ALICE, BOB)
    sandbox.homeserver.faults["room_state"] = Fault.status(500)
    sandbox.guard.policies.forget_freshness(room_id)
    await reconciled(sandbox, 2)
    looked_at.clear()
    await reconciled(sandbox)
    assert set(looked_at) == {f"{user}:PHONE" for user in (ALICE, BOB)}


# -- what is remembered ---------------------------------------------------------------------------------------


BASIS = Basis(NO_POLICY, 1, 0)


def settled_at(until: float) -> SettledCalls:
    """One settled call. :param until: when a membership is due."""
    calls = SettledCalls()
    calls.begin(ALIAS)
    calls.settle(ALIAS, BASIS, until)
    calls.end(ALIAS)
    return calls


def test_a_settled_call_stays_so_until_a_membership_is_due() -> None:
    calls = settled_at(30.0)
    assert calls.holds(ALIAS, BASIS, 29.9)
    assert not calls.holds(ALIAS, BASIS, 30.0)


@pytest.mark.parametrize("change", [{"policy": Policy(max_users=1)}, {"news": 2}, {"news": None}, {"departures": 1}])
def test_another_basis_ends_it(change: dict[str, Any]) -> None:
    assert not settled_at(30.0).holds(ALIAS, evolve(BASIS, **change), 0.0)


def test_a_listing_without_a_number_settles_nothing() -> None:
    calls = SettledCalls()
    calls.begin(ALIAS)
    calls.settle(ALIAS, evolve(BASIS, news=None), 30.0)
    assert not calls.holds(ALIAS, evolve(BASIS, news=None), 0.0)


@pytest.mark.parametrize(
    "change", [lambda calls: calls.forget(ALIAS), SettledCalls.forget_all, lambda calls: calls.end(ALIAS)]
)
def test_a_change_during_a_pass_counts(change: Callable[[SettledCalls], None]) -> None:
    calls = SettledCalls()
    calls.begin(ALIAS)
    change(calls)
    calls.settle(ALIAS, BASIS, 30.0)
    assert not calls.holds(ALIAS, BASIS, 0.0)


def test_a_pass_that_fails_settles_nothing() -> None:
    calls = settled_at(30.0)
    calls.begin(ALIAS)
    assert not calls.holds(ALIAS, evolve(BASIS, policy=Policy(max_users=1)), 0.0)  # so there is a whole pass; it fails
    assert not calls.holds(ALIAS, BASIS, 0.0)
