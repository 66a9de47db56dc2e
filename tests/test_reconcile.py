# SPDX-License-Identifier: Apache-2.0
"""Reconciling: what it asks, whom it waits for, and what it knows after the guard was started again or killed."""

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

from lotusguard.clients.neighbour import NeighbourFailed
from lotusguard.guard.enforcement import ROOMS_AT_ONCE
from lotusguard.guard.reconciler import JITTER, Every
from lotusguard.rules.identity import room_alias
from lotusguard.sandbox.faults import Fault
from lotusguard.sandbox.sfu_participant import Participant
from lotusguard.sandbox.stage import ADMIN_TOKEN, KEY, SECRET, Stage
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
from tests.conftest import SetStage, until

NO_SCREEN = {"allow_screenshare": False}


async def at_rest(stage: Stage) -> None:
    await stage.sfu.drained()
    await until(lambda: not stage.guard._enforcement._running)


async def sharing(stage: Stage, room_id: str) -> Participant:
    """Alice in a room, sharing her screen; the SFU has counted her."""
    alice = await stage.enter(ALICE, room_id)
    assert alice.publish("SCREEN_SHARE")
    alice.room._count()
    return alice


async def calls_where_sharing_ends(stage: Stage, count: int) -> list[Participant]:
    """Running calls whose rooms have just forbidden what is shared in them; nobody has told the guard."""
    rooms = [room_of(stage) for _ in range(count)]
    everybody = [await sharing(stage, room_id) for room_id in rooms]
    await at_rest(stage)
    stage.sfu.webhooks.urls[:] = []
    for room_id in rooms:
        put_policy(stage, room_id, **NO_SCREEN)
        stage.guard._enforcement._policies.drop(room_id)
    return everybody


def ended(who: Participant) -> bool:
    return published(who) == []


def asked_about(stage: Stage, method: str = "ListParticipants") -> list[str]:
    """The SFU rooms that a method was asked about."""
    return [
        pb.ListParticipantsRequest.FromString(asked.body).room
        for asked in stage.sfu.seen
        if asked.path.endswith(f"/{method}")
    ]


# -- what it asks --------------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("new", [False, True])
async def test_one_list_of_rooms_and_then_only_those_with_a_policy_and_people_in_them(stage: Stage, new: bool) -> None:
    """Of a room that was made just now the list does not tell yet whether anybody is there."""
    with_policy = room_of(stage, 5)
    alice = await sharing(stage, with_policy)
    without = await sharing(stage, room_of(stage))
    empty = room_of(stage, 5)
    await stage.ask_token(BOB, empty)  # a room with a policy, where nobody is yet
    await at_rest(stage)
    assert len(stage.sfu.rooms) == 3
    for room in stage.sfu.rooms.values():
        room.listed.creation_time -= 0 if new else 60
    stage.sfu.seen.clear()
    stage.sfu.asked.clear()
    await stage.guard._enforcement.reconcile()
    await at_rest(stage)
    assert stage.sfu.asked["ListRooms"] == 1
    assert sorted(asked_about(stage)) == sorted([alice.room.name, *([room_alias(empty)] if new else [])])
    assert without.connected
    assert stage.guard._enforcement.watched == {alice.room.name: 1}


@pytest_twisted.ensureDeferred
async def test_an_idle_guard_asks_for_the_rooms_and_nothing_else(stage: Stage) -> None:
    await stage.guard._enforcement.reconcile()
    assert stage.sfu.asked == {"ListRooms": 1}
    assert not stage.homeserver.asked["room_state"]


@pytest_twisted.ensureDeferred
async def test_a_policy_is_asked_for_once_in_its_time_however_often_it_is_reconciled(stage: Stage) -> None:
    await sharing(stage, room_of(stage, 5))
    await at_rest(stage)
    before = stage.homeserver.asked["room_state"]
    for _ in range(5):
        await stage.guard._enforcement.reconcile()
        await at_rest(stage)
    assert stage.homeserver.asked["room_state"] == before


@pytest_twisted.ensureDeferred
async def test_it_catches_what_no_webhook_told(set_stage: SetStage) -> None:
    stage = await set_stage(guard_reconcile_interval=0.1, guard_policy_ttl=0.1)
    room_id = room_of(stage)
    alice = await sharing(stage, room_id)
    stage.sfu.webhooks.urls[:] = []
    put_policy(stage, room_id, **NO_SCREEN)
    await until(lambda: ended(alice))
    bob = stage.sfu.connect(old_token(BOB, room_id))
    await until(lambda: not bob.grant.may_publish(TrackSource.SCREEN_SHARE))


@pytest_twisted.ensureDeferred
async def test_who_went_unnoticed_is_seen_to_be_gone(stage: Stage) -> None:
    alice = await sharing(stage, room_of(stage, 1))
    await at_rest(stage)
    assert counted(stage, "participants") == 1
    stage.sfu.webhooks.urls[:] = []
    alice.room.close()
    await stage.guard._enforcement.reconcile()
    await at_rest(stage)
    assert counted(stage, "participants") == counted(stage, "rooms") == counted(stage, "seats_held") == 0


@pytest_twisted.ensureDeferred
async def test_a_round_fails_with_the_sfu_and_says_so(stage: Stage) -> None:
    stage.sfu.faults["ListRooms"] = Fault.status(500)
    with pytest.raises(NeighbourFailed):
        await stage.guard._enforcement.reconcile()
    assert stage.guard._enforcement.round_at is None


# -- one room does not delay another ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", [Fault.hang(), Fault.status(500), Fault.garbage(), Fault.delay(1), Fault.close()], ids=lambda f: f.kind
)
@pytest_twisted.ensureDeferred
async def test_an_ill_room_does_not_delay_the_others(set_stage: SetStage, fault: Fault) -> None:
    stage = await set_stage(guard_reconcile_interval=3600, guard_lookup_timeout=3)
    ill, *others = await calls_where_sharing_ends(stage, 6)
    stage.sfu.room_faults[ill.room.name] = fault
    await stage.guard._enforcement.reconcile()
    await until(lambda: all(map(ended, others)))
    if fault.kind in ("hang", "delay"):
        assert ill.room.name in stage.guard._enforcement._running
    assert not ended(ill)
    await at_rest(stage)
    stage.sfu.room_faults.clear()
    await stage.guard._enforcement.reconcile()
    await until(lambda: ended(ill))


@pytest_twisted.ensureDeferred
async def test_rounds_leave_alone_what_an_earlier_one_is_still_at(stage: Stage) -> None:
    ill, other = await calls_where_sharing_ends(stage, 2)
    stage.sfu.room_faults[ill.room.name] = Fault.hang()
    stage.sfu.seen.clear()
    for rounds in range(1, 4):
        await stage.guard._enforcement.reconcile()  # returns although that room hangs
        await until(lambda: other.room.name not in stage.guard._enforcement._running)
        assert asked_about(stage).count(other.room.name) == rounds
    assert asked_about(stage).count(ill.room.name) == 1
    assert not stage.guard._enforcement._again


@pytest_twisted.ensureDeferred
async def test_only_so_many_rooms_are_worked_on_at_once(stage: Stage) -> None:
    everybody = await calls_where_sharing_ends(stage, 3 * ROOMS_AT_ONCE)
    stage.sfu.faults["ListParticipants"] = Fault.delay(0.02)
    at_once = 0

    def all_ended() -> bool:
        nonlocal at_once
        at_once = max(at_once, len(stage.sfu.in_flight))
        return all(map(ended, everybody))

    await stage.guard._enforcement.reconcile()
    await until(all_ended)
    assert 1 < at_once <= ROOMS_AT_ONCE


@pytest_twisted.ensureDeferred
async def test_when_many_rooms_hang_webhooks_and_joins_go_on(set_stage: SetStage) -> None:
    stage = await set_stage(guard_reconcile_interval=3600)
    everybody = await calls_where_sharing_ends(stage, 2 * ROOMS_AT_ONCE)
    full = room_of(stage, 1)
    await stage.enter(ALICE, full)
    for who in everybody[:-1]:
        stage.sfu.room_faults[who.room.name] = Fault.hang()
    last = everybody[-1]
    enforcement = stage.guard._enforcement
    for who in everybody:
        enforcement.enforce(who.room.name, in_turn=True)
    await until(lambda: len(stage.sfu.in_flight) == ROOMS_AT_ONCE)
    assert last.room.name in enforcement._queued
    await tell(stage, event_about("track_published", last))  # which does not wait for its turn
    await until(lambda: ended(last), seconds=8)
    assert (await stage.ask_token(ALICE, full)).code == 200
    assert (await stage.ask_token(BOB, full)).code == 403
    assert len(stage.sfu.in_flight) == ROOMS_AT_ONCE  # they still hang


@pytest_twisted.ensureDeferred
async def test_a_room_that_was_done_out_of_turn_is_not_done_again_in_its_turn(stage: Stage) -> None:
    everybody = await calls_where_sharing_ends(stage, ROOMS_AT_ONCE + 1)
    stage.sfu.faults["ListParticipants"] = Fault.delay(0.1, times=ROOMS_AT_ONCE)
    stage.sfu.seen.clear()
    for who in everybody:
        stage.guard._enforcement.enforce(who.room.name, in_turn=True)
    stage.guard._enforcement.enforce(everybody[-1].room.name)
    await until(lambda: all(map(ended, everybody)))
    await at_rest(stage)
    assert asked_about(stage).count(everybody[-1].room.name) == 1
    for who in everybody:  # and all turns are free again
        stage.guard._enforcement.enforce(who.room.name, in_turn=True)
    assert not stage.guard._enforcement._queued - {everybody[-1].room.name}
    await at_rest(stage)


# -- every few seconds -------------------------------------------------------------------------------------------


class Rounds:
    """Work that ends when it is told to."""

    def __init__(self, clock: Clock, interval: float = 3.0, *, now: bool = True) -> None:
        self.begun: list[float] = []
        self.at_once = 0
        self.most_at_once = 0
        self.ends: Deferred[None] | None = None
        self._clock = clock
        self.every = Every("rounds", interval, self.work, clock, now=now)

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


def test_rounds_come_every_interval_and_a_little_by_chance() -> None:
    starts = set()
    for _ in range(20):
        clock = Clock()
        rounds = Rounds(clock)
        rounds.every.startService()
        clock.pump([0.01] * 1500)
        offsets = [begun % 3.0 for begun in rounds.begun]
        assert len(rounds.begun) == 5
        assert max(offsets) <= 3.0 * JITTER + 0.02
        starts.add(round(rounds.begun[0], 2))
        rounds.every.stopService()
        assert not clock.getDelayedCalls()
    assert len(starts) > 3


@pytest.mark.parametrize("error", [NeighbourFailed("livekit", "timeout"), ValueError("a mistake of ours")])
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


def test_a_round_that_is_under_way_ends_with_the_service() -> None:
    clock = Clock()
    rounds = Rounds(clock)
    rounds.ends = Deferred()
    rounds.every.startService()
    clock.pump([0.1] * 5)
    rounds.every.stopService()
    assert rounds.at_once == 0
    assert not clock.getDelayedCalls()


# -- started again, killed -----------------------------------------------------------------------------------------

UNUSUAL = {"new": True, "slot_id": "m.call#unusual"}
"""A slot that nobody can guess, with identities that tell nothing: only the ledger knows either."""


@pytest_twisted.ensureDeferred
async def test_after_a_restart_the_guard_knows_its_rooms_and_who_is_in_them(set_stage: SetStage, tmp_path: Any) -> None:
    stage = await set_stage(guard_reconcile_interval=3600, guard_state_dir=tmp_path)
    room_id = room_of(stage, 1)
    alice = await stage.enter(ALICE, room_id, **UNUSUAL)
    assert alice.publish("SCREEN_SHARE")
    alice.room._count()
    await stage.guard.stopService()
    put_policy(stage, room_id, 1, **NO_SCREEN)
    await stage.start_guard(guard_reconcile_interval=0.1)
    await until(lambda: ended(alice))
    assert (await stage.ask_token(ALICE, room_id, device="TABLET")).code == 200
    assert (await stage.ask_token(BOB, room_id)).code == 403


class Output(ProcessProtocol):
    """A guard in a process of its own; what it writes is shown when the test fails."""

    def __init__(self) -> None:
        self.gone: Deferred[None] = Deferred()

    def childDataReceived(self, fd: int, text: bytes) -> None:
        sys.stderr.write(text.decode(errors="replace"))

    def processEnded(self, reason: Failure) -> None:
        self.gone.callback(None)


class InAProcess(Stage):
    """A stage whose guard is started as an operator starts it, and can be killed as a kernel kills it."""

    def __init__(self, state_dir: Path) -> None:
        super().__init__(reactor)
        self.state_dir = state_dir
        self.port, self.admin_port = free_ports()
        self.output: Output | None = None
        self.process: Any = None

    async def start_guard(self, **settings: object) -> None:
        self.url, self.admin_url = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{self.admin_port}"
        self.sfu.webhooks.urls[:] = [f"{self.url}/sfu_webhook"]
        root = str(Path(__file__).parent.parent)
        environment = {
            "PATH": os.environ.get("PATH", ""), "PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1",
            "GUARD_BIND_HOST": "127.0.0.1", "GUARD_BIND_PORT": str(self.port),
            "GUARD_ADMIN_PORT": str(self.admin_port), "GUARD_ADMIN_TOKEN": ADMIN_TOKEN,
            "GUARD_UPSTREAM": self.authorizer.url, "LIVEKIT_API": self.sfu.url, "SYNAPSE_API": self.homeserver.url,
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
        for standin in (self.authorizer, self.sfu, self.homeserver):
            await standin.stop()
        await self._pool.closeCachedConnections()


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
    stage = InAProcess(tmp_path)
    await stage.start()
    yield stage
    await stage.stop()


@pytest_twisted.ensureDeferred
async def test_a_guard_killed_between_a_policy_s_change_and_its_next_round_enforces_it_when_it_is_back(
    killable: InAProcess,
) -> None:
    stage = killable
    room_id = room_of(stage)
    alice = await stage.enter(ALICE, room_id, **UNUSUAL)
    assert alice.publish("SCREEN_SHARE")
    alice.room._count()
    with sqlite3.connect(stage.state_dir / "lotusguard.sqlite3") as ledger:
        await until(lambda: ledger.execute("SELECT 1 FROM identities").fetchone(), seconds=1)
    ledger.close()
    put_policy(stage, room_id, 1, **NO_SCREEN)
    await stage.kill()  # in the same breath: it cannot have noticed
    assert published(alice) == ["SCREEN_SHARE"]
    await stage.start_guard()
    await until(lambda: ended(alice), seconds=10)
    assert alice.connected
    # That the hashed identity in the call is Alice's was on disk too:
    assert (await stage.ask_token(ALICE, room_id)).code == 200
    assert (await stage.ask_token(BOB, room_id)).code == 403
    carol = stage.sfu.connect(old_token(CAROL, room_id))
    await until(lambda: not carol.connected)
    answer = await stage.operator("POST", "/policy-changed", json.dumps({"room_id": room_id}).encode())
    assert answer.code == 202


@pytest_twisted.ensureDeferred
async def test_a_change_that_is_told_does_not_wait_for_a_round(stage: Stage) -> None:
    room_id = room_of(stage)
    alice = await sharing(stage, room_id)
    lists = stage.sfu.asked["ListRooms"]
    await change_policy(stage, room_id, **NO_SCREEN)
    await until(lambda: ended(alice))
    assert stage.sfu.asked["ListRooms"] == lists


async def reconciled(
    stage: Stage, *, forbid: bool = True, **video: Any
) -> tuple[ParticipantPermission, ParticipantPermission]:
    """The permission of somebody with an old token before and after a round, in a room where nobody may share."""
    room_id = room_of(stage, **({"allow_screenshare": False} if forbid else {}))
    await stage.ask_token(BOB, room_id)  # whose room it is, is learnt from a token
    stage.sfu.webhooks.urls.clear()
    participant = stage.sfu.connect(old_token(ALICE, room_id, **video))
    before = participant.info().permission
    await stage.guard._enforcement.reconcile()
    await at_rest(stage)
    return before, participant.info().permission


@pytest_twisted.ensureDeferred
async def test_reconcile_never_grants(stage: Stage) -> None:
    for sources in (["microphone"], ["microphone", "camera"]):
        before, after = await reconciled(stage, canPublishSources=sources)
        assert after == before
    before, after = await reconciled(stage, canPublish=False)
    assert after == before
    assert not after.can_publish


@pytest_twisted.ensureDeferred
async def test_reconcile_preserves_flags(stage: Stage) -> None:
    flags = {"hidden": True, "canSubscribe": False, "canPublishData": False, "canUpdateOwnMetadata": True}
    before, after = await reconciled(stage, **flags)
    assert list(after.can_publish_sources) == [TrackSource.MICROPHONE, TrackSource.CAMERA]
    after.can_publish_sources[:] = before.can_publish_sources
    assert after == before


@pytest_twisted.ensureDeferred
async def test_reconcile_disables_on_empty(stage: Stage) -> None:
    before, after = await reconciled(stage, canPublishSources=["screen_share", "screen_share_audio"])
    assert before.can_publish
    assert not after.can_publish
    assert not after.can_publish_sources


@pytest_twisted.ensureDeferred
async def test_reconcile_leaves_rooms_without_a_policy_alone(stage: Stage) -> None:
    before, after = await reconciled(stage, forbid=False)
    assert after == before
