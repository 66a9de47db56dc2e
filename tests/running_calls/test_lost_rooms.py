# SPDX-License-Identifier: Apache-2.0
"""SFU rooms that LiveKit loses in a restart are created again, so that their participants can reconnect."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import AsyncMock

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectingCancelledError, ConnectionRefusedError
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from lotusguard.clients import livekit_link
from lotusguard.clients.dependency import DependencyFailed
from lotusguard.rules.identity import room_alias
from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.sandbox.faults import Fault
from tests.calls import ALICE, BOB, CAROL, logged, named, room_of
from tests.conftest import StartSandbox, until


async def call_of_two(sandbox: Sandbox) -> str:
    """A call that the guard has seen. :return: its alias."""
    room_id = room_of(sandbox, 2)
    for user in (ALICE, BOB):
        await sandbox.enter(user, room_id)
    await next_round(sandbox)
    alias = room_alias(room_id)
    assert alias in sandbox.guard.enforcement.watched
    return alias


async def next_round(sandbox: Sandbox) -> None:
    await sandbox.livekit.drained()
    await sandbox.guard.changes.reconcile()
    await at_rest(sandbox)


async def crash(sandbox: Sandbox) -> None:
    """LiveKit restarts, and the guard sees that it was away."""
    sandbox.livekit.restart()
    await sandbox.guard.changes.livekit_returned()
    await at_rest(sandbox)


async def at_rest(sandbox: Sandbox) -> None:
    await sandbox.guard.enforcement.worker.idle()
    await sandbox.guard.changes.lost_rooms.idle()


@pytest_twisted.ensureDeferred
async def test_a_room_that_a_crash_ended_is_created_again(sandbox: Sandbox) -> None:
    alias = await call_of_two(sandbox)
    with logged() as events:
        await crash(sandbox)
    assert alias in sandbox.livekit.rooms
    assert sandbox.livekit.rooms[alias].settings.empty_timeout == 60
    assert len(named(events, "lost_room_created")) == 1


@pytest_twisted.ensureDeferred
async def test_what_fails_is_tried_again_in_the_next_round(sandbox: Sandbox) -> None:
    alias = await call_of_two(sandbox)
    sandbox.livekit.faults["CreateRoom"] = Fault.status(500)
    with pytest.raises(DependencyFailed):
        await crash(sandbox)
    assert alias not in sandbox.livekit.rooms
    del sandbox.livekit.faults["CreateRoom"]
    await next_round(sandbox)
    assert alias in sandbox.livekit.rooms


@pytest_twisted.ensureDeferred
async def test_a_call_that_ended_is_not_created_again(sandbox: Sandbox) -> None:
    alias = await call_of_two(sandbox)
    for identity in list(sandbox.livekit.rooms[alias].participants):
        sandbox.livekit.disconnect(alias, identity)
    await next_round(sandbox)
    await crash(sandbox)
    assert alias not in sandbox.livekit.rooms


@pytest_twisted.ensureDeferred
async def test_a_room_that_somebody_deleted_is_not_created_again(sandbox: Sandbox) -> None:
    alias = await call_of_two(sandbox)
    sandbox.livekit.rooms[alias].close()
    await next_round(sandbox)
    assert alias not in sandbox.livekit.rooms


@pytest_twisted.ensureDeferred
async def test_a_room_that_is_missing_is_not_created_unless_livekit_was_away(sandbox: Sandbox) -> None:
    alias = await call_of_two(sandbox)
    sandbox.livekit.restart()  # as if it was deleted, and another guard was told
    await next_round(sandbox)
    assert alias not in sandbox.livekit.rooms
    sandbox.livekit.faults["ListRooms"] = Fault.status(500)
    with pytest.raises(DependencyFailed):
        await next_round(sandbox)
    del sandbox.livekit.faults["ListRooms"]
    await next_round(sandbox)
    assert alias in sandbox.livekit.rooms


@pytest_twisted.ensureDeferred
async def test_a_round_does_not_wait_until_a_room_is_created(sandbox: Sandbox) -> None:
    alias = await call_of_two(sandbox)
    sandbox.livekit.faults["CreateRoom"] = Fault.hang()
    sandbox.livekit.restart()
    sandbox.guard.changes.lost_rooms.was_away()
    await sandbox.guard.changes.reconcile()
    await until(lambda: "CreateRoom" in sandbox.livekit.asked)
    assert alias not in sandbox.livekit.rooms


@pytest_twisted.ensureDeferred
async def test_a_dry_run_creates_nothing_until_it_is_turned_off(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_dry_run=True)
    alias = await call_of_two(sandbox)
    await crash(sandbox)
    assert alias not in sandbox.livekit.rooms
    sandbox.guard.reload(sandbox.settings.model_copy(update={"guard_dry_run": False}))
    await next_round(sandbox)
    assert alias in sandbox.livekit.rooms


async def restart_together(sandbox: Sandbox, *, away: bool = False) -> None:
    """The guard and LiveKit restart at the same time. :param away: LiveKit answers only after the guard's first round.

    The guard's first round is the one that is made here.
    """
    await sandbox.guard.stopService()
    sandbox.livekit.restart()
    await sandbox.start_guard(guard_reconcile_interval=3600)
    if away:
        sandbox.livekit.faults["ListRooms"] = Fault.status(500)
        with pytest.raises(DependencyFailed):
            await next_round(sandbox)
        del sandbox.livekit.faults["ListRooms"]
    await next_round(sandbox)


@pytest.mark.parametrize("away", [False, True])
@pytest_twisted.ensureDeferred
async def test_a_room_is_created_again_by_a_guard_that_restarted_together_with_livekit(
    start_sandbox: StartSandbox, tmp_path: Path, away: bool
) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_state_dir=tmp_path / "state")
    alias = await call_of_two(sandbox)
    await restart_together(sandbox, away=away)
    assert alias in sandbox.livekit.rooms


@pytest_twisted.ensureDeferred
async def test_a_call_that_ended_is_not_created_again_by_a_guard_that_restarts(
    start_sandbox: StartSandbox, tmp_path: Path
) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_state_dir=tmp_path / "state")
    alias = await call_of_two(sandbox)
    for identity in list(sandbox.livekit.rooms[alias].participants):
        sandbox.livekit.disconnect(alias, identity)
    await next_round(sandbox)
    await restart_together(sandbox)
    assert alias not in sandbox.livekit.rooms


@pytest_twisted.ensureDeferred
async def test_a_lost_room_that_was_listed_before_the_round_is_created_again(sandbox: Sandbox) -> None:
    alias = await call_of_two(sandbox)
    sandbox.livekit.restart()
    sandbox.guard.enforcement.enforce(alias)
    await at_rest(sandbox)
    assert alias not in sandbox.guard.enforcement.watched
    await sandbox.guard.changes.livekit_returned()
    await at_rest(sandbox)
    assert alias in sandbox.livekit.rooms


@pytest.mark.parametrize("not_ready", [None, "ListRooms", "CreateRoom"])
@pytest_twisted.ensureDeferred
async def test_what_livekit_lost_is_created_as_soon_as_it_is_back(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, not_ready: str | None
) -> None:
    monkeypatch.setattr(livekit_link, "SHORT_LIVED", 0.0)
    (link,) = (service for service in sandbox.guard if isinstance(service, livekit_link.LiveKitLink))
    alias = await call_of_two(sandbox)
    await sandbox.livekit.stop_listening()
    sandbox.livekit.restart()
    await until(lambda: link.attempts)
    if not_ready:  # it accepts connections, and does not answer yet
        sandbox.livekit.faults[not_ready] = Fault.status(503, times=2)
    await sandbox.livekit.listen()
    await until(lambda: alias in sandbox.livekit.rooms)


@pytest.mark.parametrize("error", [ConnectionRefusedError(), ConnectingCancelledError(None)])
def test_a_link_that_is_stopped_while_it_connects_tries_no_more(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Twisted's endpoint tells of a refused connection if it is cancelled while that is being handled."""

    class Endpoint:
        def __init__(self, *arguments: object, **options: object) -> None: ...

        def connect(self, factory: object) -> Deferred[None]:
            return Deferred(lambda connecting: connecting.errback(error))

    monkeypatch.setattr(livekit_link, "HostnameEndpoint", Endpoint)
    clock, failures = Clock(), list[Failure]()
    link = livekit_link.LiveKitLink(clock, "http://livekit", AsyncMock(), failures.append)
    link.startService()
    link.stopService()
    assert not clock.getDelayedCalls()
    assert failures == []


@pytest_twisted.ensureDeferred
async def test_a_connection_that_is_only_closed_leads_to_no_round(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(livekit_link, "SHORT_LIVED", 0.0)  # it connects again at once
    await call_of_two(sandbox)
    asked = sandbox.livekit.asked["ListRooms"]
    await sandbox.livekit.drop_connections()
    await sandbox.enter(CAROL, room_of(sandbox, 2))
    await sandbox.livekit.drained()
    assert sandbox.livekit.asked["ListRooms"] == asked
