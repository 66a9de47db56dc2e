# SPDX-License-Identifier: Apache-2.0
"""Delayed webhooks: LiveKit retries them in order, so what they report may be over when they arrive."""

from __future__ import annotations

import time

import pytest
import pytest_twisted

from lotusguard.rules.refusals import Refusal
from lotusguard.rules.room_seats import RoomSeats
from lotusguard.rules.seats import Arrival
from lotusguard.sandbox.demo.sandbox import Sandbox
from tests.calls import ALICE, BOB, event_about, room_of, tell

LIMIT = 2
BOB_IN_CALL = Arrival("PA_bob", "bob", "bob")


def room_with_a_token(now: float) -> RoomSeats:
    """Two seats: Bob is in the call, and Alice was given a token just now."""
    seats = RoomSeats(unlimited_at=-10.0)
    seats.apply_listing("room", [BOB_IN_CALL], LIMIT, now, now)
    assert seats.take("hold", "alice", LIMIT, "room", now) is None
    assert seats.issue("hold", "room", "alice", now, 30)
    return seats


def listing(seats: RoomSeats, since: float, *others: Arrival) -> None:
    seats.apply_listing("room", [BOB_IN_CALL, *others], LIMIT, since, since)


def refusal_of_carol(seats: RoomSeats, now: float) -> Refusal | None:
    return seats.take("carol's", "carol", LIMIT, "room", now)


def test_delayed_arrival_of_an_older_session_does_not_use_up_a_newer_token() -> None:
    seats = room_with_a_token(10)
    seats.arrive("room", Arrival("PA_old", "alice", "alice", joined=6), LIMIT, 10.5)
    listing(seats, 11)  # the old session is not in the call
    assert refusal_of_carol(seats, 12) is Refusal.FULL
    seats.arrive("room", Arrival("PA_new", "alice", "alice", joined=12), LIMIT, 12)
    assert seats.overflow(LIMIT, 12) == []


def test_a_token_holds_no_second_seat_once_its_user_has_arrived() -> None:
    seats = room_with_a_token(10)
    seats.arrive("room", Arrival("PA_new", "alice", "alice", joined=11), LIMIT, 11)
    seats.leave("room", "PA_new", "alice", 12, 12, by_choice=True)
    listing(seats, 13)
    assert refusal_of_carol(seats, 13) is None


def test_a_listing_that_began_before_a_token_was_issued_does_not_use_it_up() -> None:
    seats = room_with_a_token(10)
    old = Arrival("PA_old", "alice", "alice", joined=6)
    seats.apply_listing("room", [BOB_IN_CALL, old], LIMIT, 9.5, 10.5)
    seats.apply_listing("room", [BOB_IN_CALL, old], LIMIT, 9.8, 10.6)
    seats.leave("room", "PA_old", "alice", 11, 9.9, by_choice=True)
    listing(seats, 12)
    assert refusal_of_carol(seats, 12) is Refusal.FULL


def test_hanging_up_is_believed_although_a_listing_noticed_the_departure_before_the_webhook_came() -> None:
    seats = room_with_a_token(10)
    seats.arrive("room", Arrival("PA_alice", "alice", "alice", joined=11), LIMIT, 11)
    listing(seats, 13)  # without Alice
    seats.leave("room", "PA_alice", "alice", 15, 12.2, by_choice=True)  # she left before that
    listing(seats, 16)
    assert refusal_of_carol(seats, 16) is None


@pytest.mark.parametrize(("ago", "code"), [(10, 403), (0, 200)], ids=["from before the token", "from after it"])
@pytest_twisted.ensureDeferred
async def test_a_webhook_about_a_departure_ends_only_tokens_from_before_it(
    sandbox: Sandbox, ago: int, code: int
) -> None:
    """Over the wire: Alice has a token; then LiveKit reports that a session of hers has ended."""
    room_id = room_of(sandbox, 1)
    alice = await sandbox.enter(ALICE, room_id)
    await sandbox.livekit.drained()
    sandbox.livekit.disconnect(alice.room.name, alice.identity)
    await sandbox.livekit.drained()
    assert (await sandbox.ask_token(ALICE, room_id)).code == 200
    left = event_about("participant_left", alice, createdAt=str(int(time.time()) - ago))
    left["participant"] |= {"sid": "PA_older", "disconnectReason": "CLIENT_INITIATED"}
    assert (await tell(sandbox, left)).code == 200
    assert (await sandbox.ask_token(BOB, room_id)).code == code
