# SPDX-License-Identifier: Apache-2.0
"""Floods of requests: what they may cost LiveKit and the homeserver, and that they lift no limit."""

from __future__ import annotations

import json

import pytest_twisted
from twisted.internet.defer import Deferred, gatherResults

from lotusguard.clients.waiting import Deadline
from lotusguard.guard.rooms.policies import Freshness
from lotusguard.guard.seats.memory import SLOTS_PER_ROOM
from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.sandbox.faults import Fault
from tests.calls import ALICE, BOB, CAROL, counted, room_of
from tests.conftest import StartSandbox, until
from tests.joins.helpers import EVE, ask, calls_of, content, other_homeserver

FLOOD = 1200


async def flood(
    sandbox: Sandbox, room_id: str, user: str, openid: dict[str, object], requests_at_once: int = FLOOD
) -> list[int]:
    """Requests for slots that do not exist, all at once. :return: the statuses of the answers."""
    requests = [
        ask(sandbox, user, room_id, new=True, slot_id=f"m.call#{number}", openid_token=openid)
        for number in range(requests_at_once)
    ]
    return [answer.code for answer in await gatherResults(requests)]


@pytest_twisted.ensureDeferred
async def test_anonymous_requests_for_random_slots_cost_no_listings_and_lift_no_limit(
    start_sandbox: StartSandbox,
) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_lookup_timeout=60, guard_upstream_timeout=120)
    room_id, other = room_of(sandbox, 1), room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)
    await sandbox.enter(ALICE, other)
    await sandbox.livekit.drained()
    listings = calls_of(sandbox, "ListParticipants")
    made_up = sandbox.homeserver.openid_token(BOB) | {"access_token": "made-up"}
    flooding = Deferred.fromCoroutine(flood(sandbox, room_id, BOB, made_up))
    answers = await gatherResults([ask(sandbox, CAROL, room) for room in (room_id, other)])
    assert set(await flooding) == {401}
    assert [answer.code for answer in answers] == [403, 403]
    assert calls_of(sandbox, "ListParticipants") - listings <= 4
    assert counted(sandbox, "fail_open_total", check="limit", reason="timeout") == 0


@pytest_twisted.ensureDeferred
async def test_a_member_without_a_seat_causes_one_listing_at_a_time_and_none_of_invented_slots(
    sandbox: Sandbox,
) -> None:
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)
    assert set(await flood(sandbox, room_id, BOB, sandbox.homeserver.openid_token(BOB), 200)) == {403}
    listed = {asked.body for asked in sandbox.livekit.seen if asked.path.endswith("/ListParticipants")}
    assert len(listed) == 1
    assert calls_of(sandbox, "ListParticipants") < 100


@pytest_twisted.ensureDeferred
async def test_one_account_cannot_make_more_than_sixteen_slots(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    openid = sandbox.homeserver.openid_token(ALICE)
    codes = await flood(sandbox, room_id, ALICE, openid)
    assert sorted(codes) == [200] * SLOTS_PER_ROOM + [429] * (FLOOD - SLOTS_PER_ROOM)
    assert calls_of(sandbox, "ListParticipants") <= 4 * (SLOTS_PER_ROOM + 1)
    assert (await sandbox.ask_token(BOB, room_id)).code == 403
    assert (await sandbox.ask_token(ALICE, room_id)).code == 200  # the room's main slot is always there


@pytest_twisted.ensureDeferred
async def test_a_refused_slot_says_when_to_ask_again(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox)
    for number in range(SLOTS_PER_ROOM):
        assert (await sandbox.ask_token(ALICE, room_id, new=True, slot_id=f"m.call#{number}")).code == 200
    answer = await sandbox.ask_token(BOB, room_id, new=True, slot_id="m.call#one-more")
    assert answer.code == 429
    assert content(answer)["errcode"] == "M_LIMIT_EXCEEDED"
    assert content(answer)["retry_after_ms"] > 0
    assert counted(sandbox, "slots_rejected_total") == 1
    assert (await sandbox.ask_token(BOB, room_id, new=True, slot_id="m.call#0")).code == 200


@pytest_twisted.ensureDeferred
async def test_slots_whose_tokens_were_not_used_are_free_again(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_seat_ttl=0.5)
    room_id = room_of(sandbox)
    for number in range(SLOTS_PER_ROOM):
        assert (await sandbox.ask_token(ALICE, room_id, new=True, slot_id=f"m.call#{number}")).code == 200

    async def another_slot_is_given() -> bool:
        return (await sandbox.ask_token(BOB, room_id, new=True, slot_id="m.call#one-more")).code == 200

    end = sandbox.reactor.seconds() + 15
    while not await another_slot_is_given():
        assert sandbox.reactor.seconds() < end


@pytest_twisted.ensureDeferred
async def test_anonymous_requests_for_rooms_that_are_not_in_memory_ask_the_homeserver_for_nothing_else(
    sandbox: Sandbox,
) -> None:
    made_up = sandbox.homeserver.openid_token(BOB) | {"access_token": "made-up"}
    before = len(sandbox.homeserver.seen)
    answers = await gatherResults([ask(sandbox, BOB, f"!r{n}:x", openid_token=made_up) for n in range(50)])
    assert {answer.code for answer in answers} == {401}
    asked = [asked for asked in list(sandbox.homeserver.seen)[before:] if b"%3Aprobe" not in asked.target]
    assert asked
    assert not [request for request in asked if "/rooms/" in request.path or "/users/" in request.path]


@pytest_twisted.ensureDeferred
async def test_a_seat_issued_while_livekit_did_not_answer_is_checked_when_it_does(
    start_sandbox: StartSandbox,
) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_lookup_timeout=2)
    room_id = room_of(sandbox, 1)
    alice = await sandbox.enter(ALICE, room_id)
    await sandbox.livekit.drained()
    # LiveKit's answer is older than this join may rest on, and a new one is not to be had
    answer = await sandbox.operator("POST", "/policy-changed", json.dumps({"room_id": room_id}).encode())
    assert answer.code == 202
    await sandbox.guard.enforcement.worker.idle()
    sandbox.livekit.faults["ListParticipants"] = Fault.status(503)
    answer = await sandbox.ask_token(BOB, room_id)
    assert answer.code == 200
    assert counted(sandbox, "fail_open_total", check="limit", reason="status_503") >= 1
    sandbox.livekit.faults.clear()
    bob = sandbox.livekit.connect(content(answer)["jwt"])
    await until(lambda: not bob.connected)
    assert alice.connected


@pytest_twisted.ensureDeferred
async def test_a_crowd_before_the_call_has_started_is_refused_with_few_lookups(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox)
    sandbox.homeserver.set_state(room_id, "io.lotus.call_permissions", {"start": 50})
    assert (await ask(sandbox, BOB, room_id)).code == 403
    listings = calls_of(sandbox, "ListParticipants")
    sandbox.livekit.faults["ListParticipants"] = Fault.delay(1.0)
    answers = await gatherResults([ask(sandbox, BOB, room_id) for _ in range(200)])
    assert {answer.code for answer in answers} == {403}
    assert calls_of(sandbox, "ListParticipants") - listings < 20


@pytest_twisted.ensureDeferred
async def test_one_user_who_asks_for_150_rooms_gets_into_none_of_them_and_delays_nobody(
    start_sandbox: StartSandbox,
) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_lookup_timeout=10)
    theirs, other = room_of(sandbox), room_of(sandbox)
    sandbox.homeserver.leave(other, CAROL)
    sandbox.homeserver.fault = Fault.delay(0.05)
    before = sandbox.homeserver.asked.copy()
    joins = [ask(sandbox, BOB, f"!room{number}:sandbox.local") for number in range(150)]
    members = await gatherResults([ask(sandbox, CAROL, room) for room in (theirs, other)])
    answers = await gatherResults(joins)
    assert [answer.code for answer in members] == [200, 403]
    assert {answer.code for answer in answers} == {403, 429}
    limited = next(content(answer) for answer in answers if answer.code == 429)
    assert (limited["errcode"], limited["retry_after_ms"]) == ("M_LIMIT_EXCEEDED", 2000)
    asked = sandbox.homeserver.asked - before
    assert asked["user_joined_rooms"] + asked["user_memberships"] < 60
    for check in ("policy", "membership"):
        assert counted(sandbox, "fail_open_total", check=check, reason="timeout") == 0


@pytest_twisted.ensureDeferred
async def test_one_user_of_another_homeserver_who_asks_for_many_rooms_is_limited_too(
    start_sandbox: StartSandbox,
) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_lookup_timeout=10, guard_members_only="off")
    async with other_homeserver(sandbox) as other:
        openid = other.openid_token(EVE)
        sandbox.homeserver.fault = Fault.delay(0.2)
        rooms = [f"!room{number}:sandbox.local" for number in range(60)]
        answers = await gatherResults([ask(sandbox, EVE, room, openid_token=openid) for room in rooms])
    assert {answer.code for answer in answers} == {200, 429}
    assert counted(sandbox, "fail_open_total", check="policy", reason="timeout") == 0


@pytest_twisted.ensureDeferred
async def test_made_up_tokens_whose_check_hangs_keep_no_lookup_waiting_and_open_no_other_circuit(
    start_sandbox: StartSandbox,
) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_lookup_timeout=2, guard_upstream_timeout=4)
    room_id = room_of(sandbox, 1)
    sandbox.homeserver.faults["userinfo"] = Fault.hang()
    made_up = sandbox.homeserver.openid_token(BOB)
    asked = [
        ask(sandbox, BOB, room_id, openid_token=made_up | {"access_token": f"made-up-{number}"}) for number in range(60)
    ]
    flooding = gatherResults(asked)
    await until(lambda: sandbox.homeserver.asked["userinfo"] >= 16)
    known = await sandbox.guard.policies.get(room_id, Deadline.after(sandbox.reactor, 1.5))
    assert known.freshness is Freshness.FRESH
    await flooding
    assert counted(sandbox, "circuit_open", dependency="synapse_openid") == 1
    assert counted(sandbox, "circuit_open", dependency="synapse") == 0
