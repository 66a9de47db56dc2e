# SPDX-License-Identifier: Apache-2.0
"""Webhooks come late when upstream was away, for the SFU tries again in order: what they tell may be long over."""

from __future__ import annotations

import json

import pytest
import pytest_twisted

from lotusguard.rules.seats import Claim, RoomSeats, Session
from lotusguard.sandbox.demo.sandbox import Sandbox
from tests.calls import ALICE, BOB, room_of


def full_room(now: float, *, issued: float) -> RoomSeats:
    """Two seats: one taken, one promised to alice."""
    seats = RoomSeats()
    seats.observe("room", [("PA_bob", "bob", "bob")], 2, now, now)
    claim = seats.take("alice", 2, now)
    assert isinstance(claim, Claim)
    seats.settle(claim, "alice", ("room", "alice"), issued, issued + 30)
    return seats


def test_late_news_of_an_ended_session_does_not_take_a_promise_that_came_after_it() -> None:
    seats = full_room(10, issued=10)
    assert seats.arrive(Session("room", "PA_old"), "alice", "alice", 2, 10.5, joined=6)
    seats.observe("room", [("PA_bob", "bob", "bob")], 2, 11, 11)  # the old session is not there
    assert not isinstance(seats.take("carol", 2, 12), Claim)
    assert seats.arrive(Session("room", "PA_new"), "alice", "alice", 2, 12, joined=12)


def test_who_arrives_has_nothing_left_to_arrive_for() -> None:
    seats = full_room(10, issued=10)
    at = Session("room", "PA_new")
    assert seats.arrive(at, "alice", "alice", 2, 11, joined=11)
    seats.leave(at, 12)
    seats.observe("room", [("PA_bob", "bob", "bob")], 2, 13, 13)
    assert isinstance(seats.take("carol", 2, 13), Claim)


def test_a_look_that_began_before_a_promise_does_not_end_it() -> None:
    seats = full_room(10, issued=10)
    seats.observe("room", [("PA_bob", "bob", "bob"), ("PA_old", "alice", "alice")], 2, 9.5, 10.5)
    seats.observe("room", [("PA_bob", "bob", "bob"), ("PA_old", "alice", "alice")], 2, 9.8, 10.6)
    seats.leave(Session("room", "PA_old"), 11)
    seats.observe("room", [("PA_bob", "bob", "bob")], 2, 12, 12)
    assert seats.arrive(Session("room", "PA_new"), "alice", "alice", 2, 13, joined=13)


@pytest.mark.parametrize("told", [True, False], ids=["with joinedAt", "without"])
@pytest_twisted.ensureDeferred
async def test_a_webhook_says_when_somebody_came(sandbox: Sandbox, told: bool) -> None:
    """Over the wire: alice left and has a new token when the news of her first coming arrive at last."""
    room_id = room_of(sandbox, 2)
    await sandbox.enter(BOB, room_id)
    alice = await sandbox.enter(ALICE, room_id)
    await sandbox.livekit.drained()
    sandbox.livekit.disconnect(alice.room.name, alice.identity)
    await sandbox.livekit.drained()
    assert (await sandbox.ask_token(ALICE, room_id)).code == 200
    came = {"joinedAt": str(int(sandbox.reactor.seconds()) - 5)} if told else {}
    who = {"sid": "PA_older", "identity": alice.identity, **came}
    late = {"id": "EV_late", "event": "participant_joined", "room": {"name": alice.room.name}, "participant": who}
    body = json.dumps(late).encode()
    headers = {"Authorization": sandbox.livekit.webhooks.authorization(body)}
    assert (await sandbox.request("POST", sandbox.url + "/sfu_webhook", body, headers)).code == 200
    rooms = json.loads((await sandbox.operator("GET", "/rooms")).body)["rooms"]
    assert (ALICE in rooms[0]["awaited"]) is told
