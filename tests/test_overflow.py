# SPDX-License-Identifier: Apache-2.0
"""Who comes in past the cap without a seat is put out again; who was in, or may be, never is."""

from __future__ import annotations

import json
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock, deferLater

from lotusguard.clients.http import Answer
from lotusguard.guard.seats.book import RECONNECTING, MemorySeatBook, Present
from lotusguard.metrics import Metrics
from lotusguard.rules.seats import Claim, RoomSeats, Session
from lotusguard.rules.tokens import SfuKey
from lotusguard.sandbox.demo.sandbox import KEY, SECRET, Sandbox
from lotusguard.sandbox.faults import Fault
from lotusguard.sandbox.livekit.participant import Participant
from tests.calls import (
    ALICE,
    BOB,
    CAROL,
    DAVE,
    change_policy,
    counted,
    crashes,
    logged,
    named,
    old_token,
    put_policy,
    room_of,
    seen_in,
)
from tests.conftest import StartSandbox, until


async def at_rest(sandbox: Sandbox) -> None:
    """PeriodicService webhook has been delivered and worked on."""
    await sandbox.livekit.drained()
    await until(lambda: not sandbox.guard._enforcement._running)


def put_out(sandbox: Sandbox) -> list[str]:
    """Who was put out so far."""
    return [
        change.identity.split(":")[0] for change in sandbox.livekit.update_log if change.method == "RemoveParticipant"
    ]


async def look_again(sandbox: Sandbox, *whose: Participant) -> None:
    for who in whose:
        sandbox.guard._enforcement.enforce(who.room.name)
    await at_rest(sandbox)


# -- put out ---------------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_an_old_token_does_not_get_into_a_full_room_however_often_it_is_tried(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    alice = await sandbox.enter(ALICE, room_id)
    with logged() as events:
        for times in (1, 2, 3):
            bob = sandbox.livekit.connect(old_token(BOB, room_id))
            await until(lambda bob=bob: not bob.connected)  # type: ignore[misc]
            await at_rest(sandbox)
            assert counted(sandbox, "ejections_total") == times
    assert alice.connected
    assert put_out(sandbox) == ["@bob"] * 3
    assert len(named(events, "ejected")) == 3
    assert await seen_in(sandbox, room_id) == [(ALICE, True)]


@pytest_twisted.ensureDeferred
async def test_another_issuer_s_guests_count_as_users_of_their_own(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id, new=True)
    guest = sandbox.livekit.connect(old_token("aGFzaGVk", room_id))
    await until(lambda: not guest.connected)


@pytest_twisted.ensureDeferred
async def test_a_seat_that_is_free_is_given_to_whoever_comes(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 2)
    await sandbox.enter(ALICE, room_id)
    bob = sandbox.livekit.connect(old_token(BOB, room_id))
    await at_rest(sandbox)
    assert bob.connected
    assert (await sandbox.ask_token(CAROL, room_id)).code == 403


@pytest_twisted.ensureDeferred
async def test_a_promised_seat_is_not_for_somebody_with_an_old_token(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    answer = await sandbox.ask_token(ALICE, room_id)
    bob = sandbox.livekit.connect(old_token(BOB, room_id))
    await until(lambda: not bob.connected)
    alice = sandbox.livekit.connect(json.loads(answer.body)["jwt"])
    await at_rest(sandbox)
    assert alice.connected


@pytest_twisted.ensureDeferred
async def test_reconciling_finds_whom_no_webhook_told_of(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=0.1)
    room_id = room_of(sandbox, 1)
    alice = await sandbox.enter(ALICE, room_id)
    await at_rest(sandbox)
    sandbox.livekit.webhooks.urls[:] = []
    alice.room.refresh_listed()
    bob = sandbox.livekit.connect(old_token(BOB, room_id))
    await until(lambda: not bob.connected)
    assert alice.connected


@pytest_twisted.ensureDeferred
async def test_of_several_whom_no_webhook_told_of_the_first_to_come_has_the_seat(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 2)
    alice = await sandbox.enter(ALICE, room_id)
    await at_rest(sandbox)
    sandbox.livekit.webhooks.urls[:] = []
    now = sandbox.livekit.now
    sandbox.livekit.now = lambda: now() + 1
    bob = sandbox.livekit.connect(old_token(BOB, room_id))
    sandbox.livekit.now = lambda: now() + 2
    carol = sandbox.livekit.connect(old_token(CAROL, room_id))
    await look_again(sandbox, alice)
    assert bob.connected
    assert not carol.connected


# -- never put out ---------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_further_devices_and_second_connections_of_who_is_in_stay(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)
    further = [
        sandbox.livekit.connect(old_token(ALICE, room_id, device="TABLET")),
        sandbox.livekit.connect(old_token(ALICE, room_id), publish="screen"),
        await sandbox.enter(ALICE, room_id, new=True),
    ]
    await at_rest(sandbox)
    assert all(who.connected for who in further)
    assert put_out(sandbox) == []


@pytest.mark.parametrize("kind", ["egress", "agent"])
@pytest_twisted.ensureDeferred
async def test_recorders_and_agents_take_no_seat_and_are_not_put_out(sandbox: Sandbox, kind: str) -> None:
    room_id = room_of(sandbox, 1)
    key = SfuKey(KEY, SECRET)
    recorder = sandbox.livekit.connect(key.sign(key.read(old_token("recorder", room_id)) | {"kind": kind}))
    await at_rest(sandbox)
    alice = await sandbox.enter(ALICE, room_id)
    await look_again(sandbox, alice)
    assert recorder.connected
    assert alice.connected
    assert await seen_in(sandbox, room_id) == [(ALICE, True)]


@pytest_twisted.ensureDeferred
async def test_who_was_in_when_the_cap_was_lowered_stays(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 3)
    everybody = [await sandbox.enter(user, room_id) for user in (ALICE, BOB, CAROL)]
    await at_rest(sandbox)
    for cap in (2, 1):
        await change_policy(sandbox, room_id, cap)
        await look_again(sandbox, *everybody)
    assert all(who.connected for who in everybody)
    late = sandbox.livekit.connect(old_token(DAVE, room_id))
    await until(lambda: not late.connected)


@pytest_twisted.ensureDeferred
async def test_who_was_in_when_a_cap_was_set_again_stays(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    everybody = [await sandbox.enter(ALICE, room_id)]
    await at_rest(sandbox)
    await change_policy(sandbox, room_id)
    await look_again(sandbox, *everybody)
    everybody += [await sandbox.enter(BOB, room_id), sandbox.livekit.connect(old_token(CAROL, room_id))]
    await at_rest(sandbox)
    await change_policy(sandbox, room_id, 1)
    await look_again(sandbox, *everybody)
    assert all(who.connected for who in everybody)
    assert (await sandbox.ask_token(DAVE, room_id)).code == 403
    late = sandbox.livekit.connect(old_token(DAVE, room_id))
    await until(lambda: not late.connected)
    assert put_out(sandbox) == ["@dave"]


@pytest_twisted.ensureDeferred
async def test_who_was_in_when_the_guard_started_again_stays(start_sandbox: StartSandbox, tmp_path: Any) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_state_dir=tmp_path)
    room_id = room_of(sandbox, 3)
    everybody = [await sandbox.enter(user, room_id) for user in (ALICE, BOB, CAROL)]
    await at_rest(sandbox)
    await sandbox.guard.stopService()
    put_policy(sandbox, room_id, 1)
    await sandbox.start_guard()
    await look_again(sandbox, *everybody)
    assert all(who.connected for who in everybody)
    late = sandbox.livekit.connect(old_token(DAVE, room_id))
    await until(lambda: not late.connected)


@pytest_twisted.ensureDeferred
async def test_allow_only_says_so(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_overflow="allow")
    room_id = room_of(sandbox, 1)
    alice = await sandbox.enter(ALICE, room_id)
    with logged() as events:
        bob = sandbox.livekit.connect(old_token(BOB, room_id))
        await at_rest(sandbox)
        await look_again(sandbox, alice, bob)
    assert bob.connected
    assert not sandbox.livekit.asked["RemoveParticipant"]
    assert counted(sandbox, "withheld_total", action="eject") == 1
    assert counted(sandbox, "ejections_total") == 0
    assert [bob.identity in text for text in named(events, "dry_run_skipped")] == [True]
    assert (await sandbox.ask_token(CAROL, room_id)).code == 403  # who asks is still refused
    assert (await sandbox.ask_token(BOB, room_id)).code == 200  # and who is in is not


# -- not while anything is unknown -------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_nobody_is_put_out_while_it_is_unknown_who_is_in(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    alice = await sandbox.enter(ALICE, room_id)
    await at_rest(sandbox)
    sandbox.livekit.faults["ListParticipants"] = Fault.status(500)
    bob = sandbox.livekit.connect(old_token(BOB, room_id))
    await at_rest(sandbox)
    assert counted(sandbox, "enforcement_failures_total", action="look", reason="status_500")
    assert bob.connected
    del sandbox.livekit.faults["ListParticipants"]
    await look_again(sandbox, alice)
    assert not bob.connected


@pytest_twisted.ensureDeferred
async def test_who_was_let_in_while_nobody_knew_the_policy_is_not_put_out_when_it_is_known_again(
    start_sandbox: StartSandbox,
) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_policy_ttl=0.05, guard_policy_stale=0.1)
    room_id = room_of(sandbox, 1)
    alice = await sandbox.enter(ALICE, room_id)
    await at_rest(sandbox)
    sandbox.homeserver.faults["room_state"] = Fault.status(500)
    await deferLater(reactor, 0.12)  # it is too old to be of any use now
    bob = await sandbox.enter(BOB, room_id)
    await at_rest(sandbox)
    del sandbox.homeserver.faults["room_state"]
    await change_policy(sandbox, room_id, 1)
    await look_again(sandbox, alice, bob)
    assert await seen_in(sandbox, room_id) == [(ALICE, True), (BOB, True)]
    assert bob.connected
    late = sandbox.livekit.connect(old_token(CAROL, room_id))
    await until(lambda: not late.connected)


async def in_another_slot(sandbox: Sandbox, room_id: str) -> Participant:
    """Alice, on the only seat, in a slot of the room that others do not use."""
    assert (await sandbox.ask_token(ALICE, room_id)).code == 200  # which is how the guard knows the usual one
    answer = await sandbox.ask_token(ALICE, room_id, new=True, slot_id="m.call#second")
    alice = sandbox.livekit.connect(json.loads(answer.body)["jwt"])
    await at_rest(sandbox)
    return alice


@pytest_twisted.ensureDeferred
async def test_the_seats_are_the_room_s_over_all_its_slots(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    alice = await in_another_slot(sandbox, room_id)
    bob = sandbox.livekit.connect(old_token(BOB, room_id))
    await until(lambda: not bob.connected)
    assert alice.connected
    assert alice.room.name != bob.room.name


@pytest_twisted.ensureDeferred
async def test_nobody_is_put_out_while_another_slot_is_unknown(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    alice = await in_another_slot(sandbox, room_id)
    sandbox.livekit.room_faults[alice.room.name] = Fault.status(500)
    bob = sandbox.livekit.connect(old_token(BOB, room_id))
    await at_rest(sandbox)
    assert bob.connected
    assert counted(sandbox, "enforcement_failures_total", action="eject", reason="status_500") == 1
    sandbox.livekit.room_faults.clear()
    await look_again(sandbox, bob)
    assert not bob.connected


@pytest_twisted.ensureDeferred
async def test_nobody_is_put_out_for_who_left_another_slot_unnoticed(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    alice = await in_another_slot(sandbox, room_id)
    urls, sandbox.livekit.webhooks.urls[:] = list(sandbox.livekit.webhooks.urls), []
    sandbox.livekit.disconnect(alice.room.name, alice.identity)
    sandbox.livekit.webhooks.urls[:] = urls
    bob = sandbox.livekit.connect(old_token(BOB, room_id))
    await at_rest(sandbox)
    assert bob.connected
    assert await seen_in(sandbox, room_id) == [(BOB, True)]


@pytest_twisted.ensureDeferred
async def test_an_unanswered_request_puts_nobody_out(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_upstream_timeout=3)
    room_id = room_of(sandbox, 1)
    sandbox.upstream.faults["sfu_get"] = Fault.hang(times=1)
    asking: Deferred[Answer] = Deferred.fromCoroutine(sandbox.ask_token(ALICE, room_id))
    await until(lambda: sandbox.upstream.asked["sfu_get"] == 1)
    bob = sandbox.livekit.connect(old_token(BOB, room_id))
    await at_rest(sandbox)
    await look_again(sandbox, bob)
    assert not asking.called
    assert bob.connected
    assert (await asking).code == 504
    await look_again(sandbox, bob)
    assert bob.connected  # nothing came of it: the seat is Bob's
    assert await seen_in(sandbox, room_id) == [(BOB, True)]


@pytest_twisted.ensureDeferred
async def test_an_answered_one_does(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    sandbox.upstream.faults["sfu_get"] = Fault.delay(0.2, times=1)
    asking: Deferred[Answer] = Deferred.fromCoroutine(sandbox.ask_token(ALICE, room_id))
    await until(lambda: sandbox.upstream.asked["sfu_get"] == 1)
    bob = sandbox.livekit.connect(old_token(BOB, room_id))
    await at_rest(sandbox)
    assert bob.connected
    assert (await asking).code == 200
    await look_again(sandbox, bob)
    assert not bob.connected


# -- when it does not come about -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault.status(500), "status_500"),
        (Fault.status(503, b'{"code":"unavailable","msg":"no response from servers"}'), "node_gone"),
        (Fault.status(503, b"<html>a proxy's"), "status_503"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_who_could_not_be_put_out_is_tried_again(sandbox: Sandbox, fault: Fault, reason: str) -> None:
    room_id = room_of(sandbox, 1)
    alice = await sandbox.enter(ALICE, room_id)
    await at_rest(sandbox)
    sandbox.livekit.faults["RemoveParticipant"] = fault
    bob = sandbox.livekit.connect(old_token(BOB, room_id))
    await at_rest(sandbox)
    assert bob.connected
    assert (BOB, False) in await seen_in(sandbox, room_id)
    del sandbox.livekit.faults["RemoveParticipant"]
    await look_again(sandbox, alice)
    assert not bob.connected
    assert counted(sandbox, "enforcement_failures_total", action="eject", reason=reason) == 1
    assert counted(sandbox, "ejections_total") == 1


@pytest_twisted.ensureDeferred
async def test_a_404_that_is_not_the_sfu_s_empties_no_room_and_costs_nobody_their_seat(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    alice = await sandbox.enter(ALICE, room_id)
    await at_rest(sandbox)
    sandbox.livekit.faults["ListParticipants"] = Fault.status(404, b"404 page not found")
    assert (await sandbox.ask_token(BOB, room_id)).code == 200
    await look_again(sandbox, alice)
    assert counted(sandbox, "fail_open_total", check="cap", reason="status_404") == 1
    del sandbox.livekit.faults["ListParticipants"]
    await look_again(sandbox, alice)
    assert alice.connected
    assert await seen_in(sandbox, room_id) == [(ALICE, True)]


@pytest_twisted.ensureDeferred
async def test_a_stale_entry_is_no_failure_and_does_not_save_the_others(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    alice = await sandbox.enter(ALICE, room_id)
    await at_rest(sandbox)
    sandbox.livekit.add_stale(alice.room.name, f"{CAROL}:PHONE", 404)
    with logged() as events:
        bob = sandbox.livekit.connect(old_token(BOB, room_id))
        await until(lambda: not bob.connected)
        await at_rest(sandbox)
    assert crashes(events) == []
    assert counted(sandbox, "ejections_total") == 1
    assert alice.connected


@pytest_twisted.ensureDeferred
async def test_a_seat_that_comes_free_while_others_are_put_out_saves_the_next(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 2)
    await sandbox.enter(ALICE, room_id)
    bob = await sandbox.enter(BOB, room_id)
    await at_rest(sandbox)
    sandbox.livekit.faults["RemoveParticipant"] = Fault.status(500)
    carol, dave = (sandbox.livekit.connect(old_token(user, room_id)) for user in (CAROL, DAVE))
    await at_rest(sandbox)
    assert await seen_in(sandbox, room_id) == [(ALICE, True), (BOB, True), (CAROL, False), (DAVE, False)]
    sandbox.livekit.faults["RemoveParticipant"] = Fault.delay(0.3, times=1)
    sandbox.guard._enforcement.enforce(carol.room.name)
    await until(lambda: bool(sandbox.livekit.in_flight) and sandbox.livekit.faults["RemoveParticipant"].times == 0)
    bob.room.remove(bob, 1)
    await at_rest(sandbox)
    assert [carol.connected, dave.connected].count(True) == 1
    await look_again(sandbox, dave)
    assert counted(sandbox, "ejections_total") == 1
    assert len(await seen_in(sandbox, room_id)) == 2


# -- in the seat book itself -----------------------------------------------------------------------------------


def book(clock: Clock) -> MemorySeatBook:
    return MemorySeatBook(None, clock, Metrics(), seat_ttl=30)


@pytest_twisted.ensureDeferred
async def test_a_newcomer_does_not_sit_down_before_who_was_there_already() -> None:
    clock = Clock()
    seats = book(clock)
    alice, bob = Present("PA_a", "alice", "alice"), Present("PA_b", "bob", "bob")
    await seats.arrive("!r", "alias", bob, 1)  # a webhook, before we ever looked
    await seats.observe("!r", "alias", [bob, alice], 1, clock.seconds())
    assert await seats.overflow("!r", 1) == [(Session("alias", "PA_b"), "bob")]


@pytest_twisted.ensureDeferred
async def test_who_came_while_there_was_no_cap_is_no_newcomer() -> None:
    clock = Clock()
    seats = book(clock)
    alice, bob = Present("PA_a", "alice", "alice"), Present("PA_b", "bob", "bob")
    await seats.arrive("!r", "alias", bob, 1)
    await seats.forget("!r")
    await seats.observe("!r", "alias", [alice, bob], 1, clock.seconds())
    assert await seats.overflow("!r", 1) == []


@pytest.mark.parametrize(("joined", "newcomer"), [(4, False), (104, False), (112, True)])
@pytest_twisted.ensureDeferred
async def test_late_news_of_who_came_before_there_was_a_guard_or_a_cap_puts_nobody_out(
    joined: float, newcomer: bool
) -> None:
    clock = Clock()
    clock.advance(5)
    seats = book(clock)
    alice, bob = Present("PA_a", "alice", "alice"), Present("PA_b", "bob", "bob", joined=joined)
    if joined > 5:
        clock.advance(100)
        await seats.observe("!r", "alias", [alice], 1, clock.seconds())
        await seats.forget("!r")
    clock.advance(10)
    await seats.arrive("!r", "alias", bob, 1)
    await seats.observe("!r", "alias", [alice, bob], 1, clock.seconds())
    assert await seats.overflow("!r", 1) == ([(Session("alias", "PA_b"), "bob")] if newcomer else [])


@pytest_twisted.ensureDeferred
async def test_promises_of_a_room_without_a_cap_end_with_their_time() -> None:
    clock = Clock()
    seats = book(clock)
    claim = await seats.take("!r", "alice", 1)
    assert isinstance(claim, Claim)
    await seats.settle("!r", claim, "alice", "alias", "alice:D")
    clock.advance(31)
    await seats.forget("!r")
    assert seats.rooms["!r"].idle(clock.seconds())


def test_a_look_that_was_overtaken_by_a_later_one_brings_nobody_back() -> None:
    room = RoomSeats()
    room.observe("alias", [("PA_a", "alice", "alice")], 2, since=1, now=2)
    room.observe("alias", [], 2, since=5, now=6)
    room.observe("alias", [("PA_a", "alice", "alice")], 2, since=3, now=7)
    assert room.users() == set()
    assert room.observed_since(["alias"]) == 5


@pytest_twisted.ensureDeferred
async def test_who_left_is_not_remembered_for_ever() -> None:
    clock = Clock()
    seats = book(clock)
    await seats.arrive("!r", "alias", Present("PA_0", "alice", "alice"), 5)
    await seats.take("!r", "alice", 5)
    for number in range(100):
        await seats.leave("!r", "alias", f"PA_{number}")
    clock.advance(60)
    seats.prune()
    assert len(seats.rooms["!r"].gone) == 100
    clock.advance(61)
    seats.prune()
    assert not seats.rooms["!r"].gone


@pytest_twisted.ensureDeferred
async def test_a_seat_is_kept_for_a_reconnect_only_so_long() -> None:
    clock = Clock()
    seats = book(clock)
    alice = Present("PA_a", "alice", "alice")
    await seats.observe("!r", "alias", [alice], 1, clock.seconds())
    await seats.leave("!r", "alias", "PA_a", replaced=True)
    clock.advance(RECONNECTING - 1)
    await seats.observe("!r", "alias", [], 1, clock.seconds())
    assert not isinstance(await seats.take("!r", "bob", 1), Claim)
    clock.advance(2)
    await seats.observe("!r", "alias", [], 1, clock.seconds())
    assert isinstance(await seats.take("!r", "bob", 1), Claim)
