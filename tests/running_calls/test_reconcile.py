# SPDX-License-Identifier: Apache-2.0
"""Reconciling: the requests of a round, the independence of rooms, and restarts of the guard."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from livekit.protocol import room as pb
from livekit.protocol.models import ParticipantPermission, TrackSource
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.guard.calls.enforcement import ROOMS_AT_ONCE
from lotusguard.guard.periodic import JITTER, PeriodicService
from lotusguard.rules.identity import room_alias
from lotusguard.sandbox.demo.sandbox import ADMIN_TOKEN, KEY, SECRET, Sandbox
from lotusguard.sandbox.faults import Fault
from lotusguard.sandbox.livekit.participant import Participant
from tests.calls import (
    ALICE,
    BOB,
    CAROL,
    change_policy,
    counted,
    crashes,
    event_about,
    logged,
    old_token,
    published,
    put_policy,
    room_of,
    tell,
)
from tests.conftest import StartSandbox, until

NO_SCREEN = {"allow_screenshare": False}


async def at_rest(sandbox: Sandbox) -> None:
    await sandbox.livekit.drained()
    await sandbox.guard.enforcement.worker.idle()


@pytest_twisted.ensureDeferred
async def test_a_round_begins_at_once_when_the_seats_are_known_again(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600)
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)
    await at_rest(sandbox)
    sandbox.livekit.webhooks.urls.clear()
    late = sandbox.livekit.connect(old_token(BOB, room_id))
    late.room.refresh_listed()
    assert late.connected
    sandbox.guard.changes.seats_are_known()
    await until(lambda: not late.connected)


async def sharing(sandbox: Sandbox, room_id: str) -> Participant:
    """Alice shares her screen in a room; the SFU has counted her."""
    alice = await sandbox.enter(ALICE, room_id)
    assert alice.publish("SCREEN_SHARE")
    alice.room.refresh_listed()
    return alice


async def calls_where_sharing_ends(sandbox: Sandbox, count: int) -> list[Participant]:
    """Running calls in rooms that have just forbidden screen sharing; the guard has not been told."""
    rooms = [room_of(sandbox) for _ in range(count)]
    everybody = [await sharing(sandbox, room_id) for room_id in rooms]
    await at_rest(sandbox)
    sandbox.livekit.webhooks.urls[:] = []
    for room_id in rooms:
        put_policy(sandbox, room_id, **NO_SCREEN)
        sandbox.guard.policies.forget_freshness(room_id)
    return everybody


def ended(who: Participant) -> bool:
    return published(who) == []


def asked_about(sandbox: Sandbox, method: str = "ListParticipants") -> list[str]:
    """The SFU rooms that a method was asked about."""
    return [
        pb.ListParticipantsRequest.FromString(asked.body).room
        for asked in sandbox.livekit.seen
        if asked.path.endswith(f"/{method}")
    ]


# -- requests -----------------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("new", [False, True])
async def test_a_round_lists_the_rooms_and_then_participants_where_something_is_enforced(
    start_sandbox: StartSandbox, new: bool
) -> None:
    """The list of rooms has no count of participants yet for a room that has just been created."""
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_members_only="off")
    with_policy = room_of(sandbox, 5)
    alice = await sharing(sandbox, with_policy)
    without = await sharing(sandbox, room_of(sandbox))
    empty = room_of(sandbox, 5)
    await sandbox.ask_token(BOB, empty)  # a room with a policy and no participants yet
    await at_rest(sandbox)
    assert len(sandbox.livekit.rooms) == 3
    for room in sandbox.livekit.rooms.values():
        room.listed.creation_time -= 0 if new else 60
    sandbox.livekit.seen.clear()
    sandbox.livekit.asked.clear()
    await sandbox.guard.changes.reconcile()
    await at_rest(sandbox)
    assert sandbox.livekit.asked["ListRooms"] == 1
    assert sorted(asked_about(sandbox)) == sorted([alice.room.name, *([room_alias(empty)] if new else [])])
    assert without.connected
    assert sandbox.guard.enforcement.watched == {alice.room.name: 1}


@pytest_twisted.ensureDeferred
async def test_without_calls_a_round_lists_the_rooms_and_nothing_else(sandbox: Sandbox) -> None:
    await until(lambda: sandbox.guard.changes.round_at is not None)
    sandbox.livekit.asked.clear()
    sandbox.homeserver.asked.clear()
    await sandbox.guard.changes.reconcile()
    assert sandbox.livekit.asked == {"ListRooms": 1}
    states = [asked.target for asked in sandbox.homeserver.seen if b"/state" in asked.target]
    assert all(b"%3Aprobe" in target for target in states)  # health asks for a room that does not exist


@pytest_twisted.ensureDeferred
async def test_a_fresh_policy_is_not_read_again_in_each_round(sandbox: Sandbox) -> None:
    await sharing(sandbox, room_of(sandbox, 5))
    await at_rest(sandbox)
    before = sandbox.homeserver.asked["room_state"]
    for _ in range(5):
        await sandbox.guard.changes.reconcile()
        await at_rest(sandbox)
    assert sandbox.homeserver.asked["room_state"] == before


@pytest_twisted.ensureDeferred
async def test_a_round_enforces_what_no_webhook_reported(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=0.1, guard_policy_ttl=0.1)
    room_id = room_of(sandbox)
    alice = await sharing(sandbox, room_id)
    sandbox.livekit.webhooks.urls[:] = []
    put_policy(sandbox, room_id, **NO_SCREEN)
    await until(lambda: ended(alice))
    bob = sandbox.livekit.connect(old_token(BOB, room_id))
    await until(lambda: not bob.grant.may_publish(TrackSource.SCREEN_SHARE))


@pytest_twisted.ensureDeferred
async def test_a_round_finds_departures_that_no_webhook_reported_and_keeps_their_seats_for_a_while(
    sandbox: Sandbox,
) -> None:
    alice = await sharing(sandbox, room_of(sandbox, 1))
    await at_rest(sandbox)
    assert counted(sandbox, "participants") == 1
    sandbox.livekit.webhooks.urls[:] = []
    alice.room.close()
    await sandbox.guard.changes.reconcile()
    await at_rest(sandbox)
    assert counted(sandbox, "participants") == counted(sandbox, "rooms") == 0
    assert counted(sandbox, "seats_held") == 1


@pytest_twisted.ensureDeferred
async def test_a_round_fails_while_livekit_does_not_answer(sandbox: Sandbox) -> None:
    await until(lambda: sandbox.guard.changes.round_at is not None)
    last = sandbox.guard.changes.round_at
    sandbox.livekit.faults["ListRooms"] = Fault.status(500)
    with pytest.raises(DependencyFailed):
        await sandbox.guard.changes.reconcile()
    assert sandbox.guard.changes.round_at == last


# -- one room does not delay another ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [Fault.hang(), Fault.status(500), Fault.invalid_response(), Fault.delay(1), Fault.close()],
    ids=lambda f: f.kind,
)
@pytest_twisted.ensureDeferred
async def test_a_room_that_fails_does_not_delay_the_others(start_sandbox: StartSandbox, fault: Fault) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_lookup_timeout=3)
    failing, *others = await calls_where_sharing_ends(sandbox, 6)
    sandbox.livekit.room_faults[failing.room.name] = fault
    await sandbox.guard.changes.reconcile()
    await until(lambda: all(map(ended, others)))
    if fault.kind in ("hang", "delay"):
        assert not sandbox.guard.enforcement.worker.idle().called
    assert not ended(failing)
    await at_rest(sandbox)
    sandbox.livekit.room_faults.clear()
    await sandbox.guard.changes.reconcile()
    await until(lambda: ended(failing))


@pytest_twisted.ensureDeferred
async def test_a_round_skips_a_room_whose_pass_is_still_running(sandbox: Sandbox) -> None:
    failing, other = await calls_where_sharing_ends(sandbox, 2)
    sandbox.livekit.room_faults[failing.room.name] = Fault.hang()
    sandbox.livekit.seen.clear()
    while asked_about(sandbox).count(other.room.name) < 3:
        await sandbox.guard.changes.reconcile()  # returns although the failing room's pass hangs
        await until(lambda: len(sandbox.livekit.in_flight) == 1)
    assert asked_about(sandbox).count(failing.room.name) == 1


@pytest_twisted.ensureDeferred
async def test_number_of_simultaneous_passes_is_limited(sandbox: Sandbox) -> None:
    everybody = await calls_where_sharing_ends(sandbox, 3 * ROOMS_AT_ONCE)
    sandbox.livekit.faults["ListParticipants"] = Fault.delay(0.02)
    at_once = 0

    def all_ended() -> bool:
        nonlocal at_once
        at_once = max(at_once, len(sandbox.livekit.in_flight))
        return all(map(ended, everybody))

    await sandbox.guard.changes.reconcile()
    await until(all_ended)
    assert 1 < at_once <= ROOMS_AT_ONCE


@pytest_twisted.ensureDeferred
async def test_webhooks_and_joins_are_handled_while_many_rooms_hang(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600)
    everybody = await calls_where_sharing_ends(sandbox, 2 * ROOMS_AT_ONCE)
    full = room_of(sandbox, 1)
    await sandbox.enter(ALICE, full)
    for who in everybody[:-1]:
        sandbox.livekit.room_faults[who.room.name] = Fault.hang()
    last = everybody[-1]
    enforcement = sandbox.guard.enforcement
    for who in everybody:
        enforcement.enforce(who.room.name, urgent=False)
    await until(lambda: len(sandbox.livekit.in_flight) == ROOMS_AT_ONCE)
    assert not enforcement.worker.idle().called
    assert not ended(last)
    await tell(sandbox, event_about("track_published", last))  # urgent work does not wait for a turn
    await until(lambda: ended(last), seconds=8)
    assert (await sandbox.ask_token(ALICE, full)).code == 200
    assert (await sandbox.ask_token(BOB, full)).code == 403
    assert len(sandbox.livekit.in_flight) == ROOMS_AT_ONCE  # the others still hang


@pytest_twisted.ensureDeferred
async def test_urgent_work_on_a_room_removes_it_from_the_queue(sandbox: Sandbox) -> None:
    everybody = await calls_where_sharing_ends(sandbox, ROOMS_AT_ONCE + 1)
    sandbox.livekit.faults["ListParticipants"] = Fault.delay(0.1, times=ROOMS_AT_ONCE)
    sandbox.livekit.seen.clear()
    for who in everybody:
        sandbox.guard.enforcement.enforce(who.room.name, urgent=False)
    sandbox.guard.enforcement.enforce(everybody[-1].room.name)
    await until(lambda: all(map(ended, everybody)))
    await at_rest(sandbox)
    assert asked_about(sandbox).count(everybody[-1].room.name) == 1
    for who in everybody:  # and all turns are free again
        sandbox.guard.enforcement.enforce(who.room.name, urgent=False)
    assert not sandbox.guard.enforcement.worker.idle().called
    await at_rest(sandbox)


# -- the interval ---------------------------------------------------------------------------------------------


class Rounds:
    """Work that ends when it is told to."""

    def __init__(self, clock: Clock, interval: float = 3.0, *, now: bool = True) -> None:
        self.begun: list[float] = []
        self.at_once = 0
        self.most_at_once = 0
        self.ends: Deferred[None] | None = None
        self._clock = clock
        self.every = PeriodicService("rounds", interval, self.work, clock, now=now)

    async def work(self) -> None:
        self.begun.append(self._clock.seconds())
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if self.ends is not None:
                await self.ends
        finally:
            self.at_once -= 1


def test_a_round_never_overlaps_itself() -> None:
    clock = Clock()
    rounds = Rounds(clock)
    rounds.ends = Deferred()
    rounds.every.startService()
    clock.pump([0.1] * 300)
    assert len(rounds.begun) == 1
    ending, rounds.ends = rounds.ends, None
    ending.callback(None)
    clock.pump([0.1] * 60)
    assert len(rounds.begun) >= 2
    assert rounds.most_at_once == 1
    rounds.every.stopService()


def test_rounds_are_an_interval_and_a_random_delay_apart() -> None:
    starts = set()
    for _ in range(20):
        clock = Clock()
        rounds = Rounds(clock)
        rounds.every.startService()
        clock.pump([0.01] * 1400)
        first, *later = rounds.begun
        assert first == 0
        assert len(later) == 4
        assert max(begun % 3.0 for begun in later) <= 3.0 * JITTER + 0.02
        starts.add(round(later[0], 2))
        rounds.every.stopService()
        assert not clock.getDelayedCalls()
    assert len(starts) > 3


def test_a_service_that_does_not_start_at_once_waits_for_an_interval() -> None:
    clock = Clock()
    rounds = Rounds(clock, now=False)
    rounds.every.startService()
    clock.advance(2.9)
    assert rounds.begun == []
    clock.pump([0.1] * 5)
    assert len(rounds.begun) == 1
    rounds.every.stopService()


@pytest.mark.parametrize("error", [DependencyFailed("livekit", "timeout"), ValueError("a mistake of ours")])
def test_a_failed_round_is_followed_by_the_next(error: Exception) -> None:
    clock = Clock()
    rounds = Rounds(clock)
    rounds.ends = Deferred()
    rounds.every.startService()
    clock.pump([0.1] * 5)
    failing, rounds.ends = rounds.ends, None
    with logged() as events:
        failing.errback(Failure(error))
    assert len(crashes(events)) == (1 if isinstance(error, ValueError) else 0)
    clock.pump([0.1] * 40)
    assert len(rounds.begun) >= 2
    rounds.every.stopService()


def test_stopping_the_service_cancels_the_running_round() -> None:
    clock = Clock()
    rounds = Rounds(clock)
    rounds.ends = Deferred()
    rounds.every.startService()
    clock.pump([0.1] * 5)
    rounds.every.stopService()
    assert rounds.at_once == 0
    assert not clock.getDelayedCalls()


# -- restarts and kills -----------------------------------------------------------------------------------------

UNUSUAL = {"new": True, "slot_id": "m.call#unusual"}
"""An unguessable slot with hashed identities: only the registry knows room and users."""


@pytest_twisted.ensureDeferred
async def test_rooms_and_identities_are_known_after_a_restart(start_sandbox: StartSandbox, tmp_path: Any) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_state_dir=tmp_path)
    room_id = room_of(sandbox, 1)
    alice = await sandbox.enter(ALICE, room_id, **UNUSUAL)
    assert alice.publish("SCREEN_SHARE")
    alice.room.refresh_listed()
    await sandbox.guard.stopService()
    put_policy(sandbox, room_id, 1, **NO_SCREEN)
    await sandbox.start_guard(guard_reconcile_interval=0.1)
    await until(lambda: ended(alice))
    assert (await sandbox.ask_token(ALICE, room_id, device="TABLET")).code == 200
    assert (await sandbox.ask_token(BOB, room_id)).code == 403


class Output(ProcessProtocol):
    """Forwards the output of a guard's process, which pytest shows when the test fails."""

    def __init__(self) -> None:
        self.gone: Deferred[None] = Deferred()

    def childDataReceived(self, fd: int, text: bytes) -> None:
        sys.stderr.write(text.decode(errors="replace"))

    def processEnded(self, reason: Failure) -> None:
        self.gone.callback(None)


class KillableSandbox(Sandbox):
    """A sandbox whose guard is a process of its own that tests can kill."""

    def __init__(self, state_dir: Path) -> None:
        super().__init__(reactor)
        self.state_dir = state_dir
        self.port, self.admin_port = free_ports()
        self.output: Output | None = None
        self.process: Any = None

    async def start_guard(self, **settings: object) -> None:
        self.url, self.admin_url = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{self.admin_port}"
        self.livekit.webhooks.urls[:] = [f"{self.url}/sfu_webhook"]
        root = str(Path(__file__).parent.parent.parent)
        environment = {
            "PATH": os.environ.get("PATH", ""), "PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1",
            "GUARD_BIND_HOST": "127.0.0.1", "GUARD_BIND_PORT": str(self.port),
            "GUARD_ADMIN_PORT": str(self.admin_port), "GUARD_ADMIN_TOKEN": ADMIN_TOKEN,
            "GUARD_UPSTREAM": self.upstream.url, "LIVEKIT_API": self.livekit.url, "SYNAPSE_API": self.homeserver.url,
            "LIVEKIT_KEY": KEY, "LIVEKIT_SECRET": SECRET, "MATRIX_TOKEN": self.admin_token,
            "GUARD_STATE_DIR": str(self.state_dir), "GUARD_RECONCILE_INTERVAL": "1", "GUARD_POLICY_TTL": "1",
            "GUARD_LOOKUP_TIMEOUT": "10",
        }  # fmt: skip
        command = [sys.executable, "-c", "from twisted.scripts.twistd import run; run()"]
        command += ["-n", "--pidfile=", "lotusguard"]
        self.output = Output()
        self.process = reactor.spawnProcess(self.output, command[0], command, env=environment, path=str(self.state_dir))
        await until(lambda: listens(self.port) and listens(self.admin_port), seconds=30)

    async def kill(self) -> None:
        """``kill -9``."""
        if self.output is not None and not self.output.gone.called:
            self.process.signalProcess("KILL")
            await self.output.gone

    async def stop(self) -> None:
        await self.kill()
        for standin in (self.upstream, self.livekit, self.homeserver):
            await standin.stop()
        await self._pool.close()


def free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest_twisted.async_yield_fixture
async def killable(tmp_path: Path) -> Any:
    sandbox = KillableSandbox(tmp_path)
    await sandbox.start()
    yield sandbox
    await sandbox.stop()


@pytest_twisted.ensureDeferred
async def test_a_policy_that_changed_while_the_guard_was_killed_is_enforced_when_it_is_back(
    killable: KillableSandbox,
) -> None:
    sandbox = killable
    room_id = room_of(sandbox)
    alice = await sandbox.enter(ALICE, room_id, **UNUSUAL)
    assert alice.publish("SCREEN_SHARE")
    alice.room.refresh_listed()
    with sqlite3.connect(sandbox.state_dir / "lotusguard.sqlite3") as registry:
        await until(lambda: registry.execute("SELECT 1 FROM identities").fetchone(), seconds=1)
    registry.close()
    put_policy(sandbox, room_id, 1, **NO_SCREEN)
    await sandbox.kill()  # at once, so the guard cannot have noticed
    assert published(alice) == ["SCREEN_SHARE"]
    await sandbox.start_guard()
    await until(lambda: ended(alice), seconds=10)
    assert alice.connected
    # The state file also says that the hashed identity in the call is Alice's.
    assert (await sandbox.ask_token(ALICE, room_id)).code == 200
    assert (await sandbox.ask_token(BOB, room_id)).code == 403
    carol = sandbox.livekit.connect(old_token(CAROL, room_id))
    await until(lambda: not carol.connected)
    answer = await sandbox.operator("POST", "/policy-changed", json.dumps({"room_id": room_id}).encode())
    assert answer.code == 202


@pytest_twisted.ensureDeferred
async def test_a_pushed_change_does_not_wait_for_a_round(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox)
    alice = await sharing(sandbox, room_id)
    lists = sandbox.livekit.asked["ListRooms"]
    await change_policy(sandbox, room_id, **NO_SCREEN)
    await until(lambda: ended(alice))
    assert sandbox.livekit.asked["ListRooms"] == lists


async def reconciled(
    sandbox: Sandbox, *, forbid: bool = True, **video: Any
) -> tuple[ParticipantPermission, ParticipantPermission]:
    """A participant's permission before and after a round, in a room that forbids sharing. They have an old token."""
    room_id = room_of(sandbox, **({"allow_screenshare": False} if forbid else {}))
    await sandbox.ask_token(BOB, room_id)  # the guard learns from a token which room the SFU room belongs to
    sandbox.livekit.webhooks.urls.clear()
    participant = sandbox.livekit.connect(old_token(ALICE, room_id, **video))
    before = participant.info().permission
    await sandbox.guard.changes.reconcile()
    await at_rest(sandbox)
    return before, participant.info().permission


@pytest_twisted.ensureDeferred
async def test_reconcile_never_grants(sandbox: Sandbox) -> None:
    for sources in (["microphone"], ["microphone", "camera"]):
        before, after = await reconciled(sandbox, canPublishSources=sources)
        assert after == before
    before, after = await reconciled(sandbox, canPublish=False)
    assert after == before
    assert not after.can_publish


@pytest_twisted.ensureDeferred
async def test_reconcile_preserves_flags(sandbox: Sandbox) -> None:
    flags = {"hidden": True, "canSubscribe": False, "canPublishData": False, "canUpdateOwnMetadata": True}
    before, after = await reconciled(sandbox, **flags)
    assert list(after.can_publish_sources) == [TrackSource.MICROPHONE, TrackSource.CAMERA]
    after.can_publish_sources[:] = before.can_publish_sources
    assert after == before


@pytest_twisted.ensureDeferred
async def test_reconcile_disables_on_empty(sandbox: Sandbox) -> None:
    before, after = await reconciled(sandbox, canPublishSources=["screen_share", "screen_share_audio"])
    assert before.can_publish
    assert not after.can_publish
    assert not after.can_publish_sources


@pytest_twisted.ensureDeferred
async def test_reconcile_leaves_rooms_without_a_policy_alone(sandbox: Sandbox) -> None:
    before, after = await reconciled(sandbox, forbid=False)
    assert after == before
