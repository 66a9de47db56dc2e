# SPDX-License-Identifier: Apache-2.0
"""The seat rules at the very moment and at the very number where they change, in memory and in Valkey."""

from __future__ import annotations

import pytest

from lotusguard.rules.ended_sessions import ENDED_SESSIONS_KEPT
from lotusguard.rules.refusals import Refusal
from lotusguard.rules.room_seats import UNCONFIRMED_KEPT, RoomSeats
from lotusguard.rules.seats import Arrival, HoldState, IdentityKey, Session
from tests.rules.seat_rooms import (
    ALIAS,
    TTL,
    arrive,
    enter,
    issue,
    leave,
    listing,
    over,
    refused,
    room,
    take,
    unlisted_room,
)

pytestmark = pytest.mark.usefixtures("rules")
OTHER = "other-slot"


def key(identity: str, alias: str = ALIAS) -> IdentityKey:
    return IdentityKey(alias, identity)


# -- numbers -----------------------------------------------------------------------------------------------


def test_a_room_has_as_many_slots_as_are_allowed_and_no_more() -> None:
    seats = room()
    for number, refusal in enumerate((None, None, Refusal.TOO_MANY_SLOTS)):
        assert seats.take(f"hold{number}", "a", None, f"slot{number}", 0, slots=2) is refusal
    assert seats.take("again", "b", None, "slot1", 0, slots=2) is None
    assert seats.take("unbounded", "b", None, "slot2", 0, slots=None) is None


def test_a_slot_is_free_again_when_its_last_hold_has_ended() -> None:
    seats = room()
    seats.take("first", "a", None, "slot0", 0, slots=1)
    seats.take("second", "b", None, "slot0", 0, slots=1)
    seats.release("first")
    assert seats.take("third", "c", None, "slot1", 0, slots=1) is Refusal.TOO_MANY_SLOTS
    seats.release("second")
    assert seats.take("fourth", "c", None, "slot1", 0, slots=1) is None


@pytest.mark.parametrize(("limit", "refusal"), [(1, Refusal.FULL), (2, Refusal.FULL), (3, None)])
def test_a_room_is_full_at_its_limit(limit: int, refusal: Refusal | None) -> None:
    seats = room()
    for user in ("a", "b"):
        enter(seats, user, 3)
    assert refused(seats, "c", limit, 1) is refusal


def test_requests_in_flight_beside_people_in_the_call_leave_a_room_busy() -> None:
    seats = room()
    enter(seats, "a", 2)
    take(seats, "b", 2)
    assert refused(seats, "c", 2) is Refusal.SEAT_PENDING
    enter(seats, "d", 3)
    assert refused(seats, "c", 2) is Refusal.FULL


@pytest.mark.parametrize(("limit", "seated"), [(1, False), (2, True)])
def test_a_participant_without_a_seat_gets_one_if_fewer_than_the_limit_have_one(limit: int, seated: bool) -> None:
    seats = room()
    enter(seats, "a", 1)
    arrive(seats, "b", 1, 1)
    assert (over(seats, limit, 2) == []) is seated
    assert seats.owns_seat("b") is seated


@pytest.mark.parametrize(("limit", "seated"), [(1, False), (2, True)])
def test_a_token_that_failed_open_gets_a_seat_if_fewer_than_the_limit_have_one(limit: int, seated: bool) -> None:
    seats = room()
    enter(seats, "a", 1)
    seats.issue_without_seat("hold", "b", ALIAS, "b", 1, TTL)
    listing(seats, limit, 2, "a")
    assert seats.owns_seat("b") is seated


def test_a_listing_without_a_limit_seats_nobody_who_failed_open() -> None:
    seats = room()
    seats.issue_without_seat("hold", "b", ALIAS, "b", 1, TTL)
    listing(seats, None, 2)
    assert not seats.owns_seat("b")


def test_a_token_that_failed_open_joins_the_seat_that_its_user_has() -> None:
    seats = room()
    seats.issue_without_seat("hold", "a", ALIAS, "a-tablet", 0, TTL)
    enter(seats, "a", 1)
    enter(seats, "b", 2)
    listing(seats, 1, 2, "a", "b")
    assert seats.reserved[key("a-tablet")].state is HoldState.ISSUED


# -- moments -----------------------------------------------------------------------------------------------


def test_the_time_to_arrive_is_over_when_it_ends() -> None:
    seats = room()
    issue(seats, "a", 1)
    assert seats.listing_required_since(TTL - 0.1) is None
    assert seats.listing_required_since(TTL) == TTL


@pytest.mark.parametrize(("now", "state"), [(TTL - 0.1, HoldState.ISSUED), (TTL, HoldState.ISSUED_EXPIRED)])
def test_a_token_issued_when_the_time_to_arrive_ends_is_late(now: float, state: HoldState) -> None:
    seats = room()
    issue(seats, "a", 1)
    issue(seats, "a", 1, now, "a-again")
    assert seats.reserved[key("a-again")].state is state


@pytest.mark.parametrize(("pause", "state"), [(TTL, HoldState.ISSUED_EXPIRED), (TTL + 0.1, HoldState.ISSUED)])
def test_the_time_to_arrive_begins_anew_only_after_a_longer_pause_than_itself(pause: float, state: HoldState) -> None:
    seats = room()
    issue(seats, "a", 1)
    seats.forget_old(pause, TTL)
    issue(seats, "a", 1, pause, "a-again")
    assert seats.reserved[key("a-again")].state is state


def test_asking_without_a_pause_keeps_the_time_to_arrive_of_the_first_token() -> None:
    seats = room()
    for now in (0.0, 20.0, 40.0, 60.0):
        issue(seats, "a", 1, now)
        seats.forget_old(now, TTL)
    assert seats.reserved[key("a")].state is HoldState.ISSUED_EXPIRED
    assert seats.reserved[key("a")].expires == TTL


@pytest.mark.parametrize(("began", "free"), [(TTL - 0.1, False), (TTL, True)])
def test_a_listing_confirms_what_ended_until_it_began(began: float, free: bool) -> None:
    seats = room()
    issue(seats, "a", 1)
    seats.apply_listing(ALIAS, [], 1, began, TTL + 1)
    assert (refused(seats, "b", 1, TTL + 1) is None) is free


def test_a_listing_confirms_no_end_in_another_slot() -> None:
    seats = room()
    issue(seats, "a", 1)
    seats.apply_listing(OTHER, [], 1, TTL + 1, TTL + 1)
    assert refused(seats, "b", 1, TTL + 1) is Refusal.FULL


def test_any_listing_confirms_the_end_of_a_hold_that_names_no_slot() -> None:
    seats = room()
    seats.restore_present("hold", "a", key("a", ""), now=0, ended=0)
    seats.apply_listing(OTHER, [], 1, 1, 1)
    assert refused(seats, "b", 1, 1) is None


@pytest.mark.parametrize(("began", "believed"), [(4.9, False), (5.0, True)])
def test_a_listing_that_began_with_the_last_one_is_not_overtaken(began: float, believed: bool) -> None:
    seats = room()
    listing(seats, 1, 5)
    seats.apply_listing(ALIAS, [Arrival("PA_a", "a", "a")], 1, began, 6)
    assert (seats.users() == {"a"}) is believed


@pytest.mark.parametrize(("began", "there"), [(2.0, False), (2.1, True)])
def test_only_a_listing_that_began_after_a_departure_brings_the_session_back(began: float, there: bool) -> None:
    seats = room()
    enter(seats, "a", 1)
    leave(seats, "a", 2)
    seats.apply_listing(ALIAS, [Arrival("PA_a", "a", "a")], 1, began, 3)
    assert ("a" in seats.users()) is there


@pytest.mark.parametrize(("began", "vanished"), [(2.0, False), (2.1, True)])
def test_a_listing_ends_no_session_that_is_as_young_as_itself(began: float, vanished: bool) -> None:
    seats = room()
    arrive(seats, "a", 1, 2)
    seats.apply_listing(ALIAS, [], 1, began, 3)
    assert ("a" in seats.users()) is not vanished


@pytest.mark.parametrize(("joined", "left"), [(100.0, []), (100.1, ["b"])])
def test_whoever_joined_while_there_was_no_limit_stays_at_the_first_listing(joined: float, left: list[str]) -> None:
    seats = unlisted_room(100.0)
    who = [Arrival(f"PA_{user}", user, user, at) for user, at in (("a", 50.0), ("b", joined))]
    seats.apply_listing(ALIAS, who, 1, 200, 200)
    assert over(seats, 1, 200) == left


def test_whoever_joined_while_there_was_no_limit_has_no_prior_claim_at_later_listings() -> None:
    seats = unlisted_room(100.0)
    listing(seats, 1, 200, "a")
    listing(seats, 1, 201, "a", "b", joined=50)
    assert over(seats, 1, 202) == ["b"]


@pytest.mark.parametrize(("left_by", "kept"), [(4.9, True), (5.0, False)])
def test_a_departure_ends_holds_that_were_issued_until_then(left_by: float, kept: bool) -> None:
    seats = room()
    enter(seats, "a", 1)
    issue(seats, "a", 1, 5)
    seats.leave(ALIAS, "PA_a", "a", 6, left_by, by_choice=True)
    listing(seats, 1, 7)
    assert (refused(seats, "b", 1, 7) is Refusal.FULL) is kept


@pytest.mark.parametrize(("left_by", "kept"), [(4.9, True), (5.0, False)])
def test_a_departure_ends_unused_holds_of_the_other_route_that_were_issued_until_then(
    left_by: float, kept: bool
) -> None:
    seats = room()
    enter(seats, "@a:s", 1, identity="@a:s:PHONE")
    issue(seats, "@a:s", 1, 5, "hashed", "PHONE")
    seats.leave(ALIAS, "PA_@a:s:PHONE", "@a:s:PHONE", 6, left_by, by_choice=True)
    listing(seats, 1, 7)
    assert (refused(seats, "b", 1, 7) is Refusal.FULL) is kept


def test_a_late_word_that_a_lost_session_hung_up_ends_its_hold() -> None:
    seats = room()
    enter(seats, "a", 1)
    listing(seats, 1, 5)
    seats.leave(ALIAS, "PA_a", "a", 6, 1, by_choice=True)
    assert seats.reserved[key("a")].state is HoldState.LEFT


def test_a_late_word_about_another_session_does_not_end_the_hold_of_a_lost_one() -> None:
    seats = room()
    enter(seats, "a", 1)
    listing(seats, 1, 5)
    seats.leave(ALIAS, "PA_before", "a", 6, 1, by_choice=True)
    assert seats.reserved[key("a")].state is HoldState.RECONNECTING


def test_a_departure_without_a_session_does_not_end_a_token_issued_later() -> None:
    seats = room()
    issue(seats, "a", 1, 5)
    seats.leave(ALIAS, "", "a", 6, 1, by_choice=True)
    assert seats.reserved[key("a")].state is HoldState.ISSUED


@pytest.mark.parametrize(("joined", "used"), [(4.9, False), (5.0, True)])
def test_a_token_issued_after_somebody_joined_is_not_the_one_they_joined_with(joined: float, used: bool) -> None:
    seats = room()
    issue(seats, "a", 1, 5)
    seats.arrive(ALIAS, Arrival("PA_a", "a", "a", joined), 1, 6)
    assert (key("a") not in seats.reserved) is used


def test_a_token_of_another_user_under_the_same_identity_is_not_used_up_by_an_arrival() -> None:
    seats = room()
    issue(seats, "a", 2, 0, "shared")
    arrive(seats, "b", 2, 1, "shared")
    assert seats.reserved[key("shared")].user == "a"
    assert seats.sessions[Session(ALIAS, "PA_shared")].user == "b"


@pytest.mark.parametrize(("later", "there"), [(ENDED_SESSIONS_KEPT - 0.1, False), (ENDED_SESSIONS_KEPT, True)])
def test_an_ended_session_is_remembered_for_two_minutes(later: float, there: bool) -> None:
    seats = room()
    enter(seats, "a", 1)
    leave(seats, "a", 2)
    seats.forget_old(2 + later, TTL)
    arrive(seats, "a", 1, 2 + later)
    assert ("a" in seats.users()) is there


@pytest.mark.parametrize(("later", "kept"), [(UNCONFIRMED_KEPT - 0.1, True), (UNCONFIRMED_KEPT, False)])
def test_an_end_that_nobody_confirms_is_believed_after_ten_minutes(later: float, kept: bool) -> None:
    seats = room()
    issue(seats, "a", 1)
    seats.forget_old(TTL + later, TTL)
    assert seats.owns_seat("a") is kept


def test_what_ended_last_in_a_room_is_when_it_became_empty() -> None:
    seats = room()
    enter(seats, "a", 2)
    issue(seats, "b", 2, 1)
    leave(seats, "a", 5)
    assert seats.vacated == 5
    assert seats.is_occupied(TTL + 0.9)
    assert not seats.is_occupied(TTL + 1)
    assert seats.vacated == TTL + 1


def test_a_restored_hold_of_somebody_in_the_call_has_to_be_confirmed_and_another_one_does_not() -> None:
    seats = room()
    seats.restore_present("hold1", "a", key("a"), now=10, ended=50)
    seats.restore_issued("hold2", "b", key("b"), now=10, expires=50)
    assert [seats.reserved[key(user)].state for user in "ab"] == [HoldState.LEFT, HoldState.ISSUED]
    assert [seats.reserved[key(user)].expires for user in "ab"] == [10, 50]
    assert seats.vacated == 10


# -- questions ---------------------------------------------------------------------------------------------


def test_a_room_is_idle_only_without_requests_in_flight_holds_and_people() -> None:
    seats = room()
    assert seats.is_idle(0)
    hold_id = take(seats, "a", 1)
    assert not seats.is_idle(0)
    seats.issue(hold_id, ALIAS, "a", 0, TTL)
    assert not seats.is_idle(0)
    arrive(seats, "a", 1, 1)
    assert not seats.is_idle(1)
    leave(seats, "a", 2)
    assert not seats.is_idle(2)
    listing(seats, 1, 3)
    assert seats.is_idle(3)


def test_a_room_was_listed_when_the_oldest_of_its_slots_was() -> None:
    seats = room()
    assert seats.listed_since([OTHER]) is None
    seats.apply_listing(OTHER, [], 1, 5, 5)
    for aliases, since in (([ALIAS], 0), ([OTHER], 5), ([ALIAS, OTHER], 0), ([OTHER, ALIAS], 0)):
        assert seats.listed_since(aliases) == since
    assert seats.listed_since([ALIAS, "a third"]) is None


def test_only_slots_with_holds_stay_listed() -> None:
    seats = room()
    seats.apply_listing(OTHER, [], 1, 0, 0)
    issue(seats, "a", 1, alias=OTHER)
    seats.forget_old(1, TTL)
    assert [seats.listed_since([alias]) for alias in (ALIAS, OTHER)] == [None, 0]


def test_the_hold_of_an_identity_is_its_latest_session_or_else_what_is_reserved() -> None:
    seats = RoomSeats(0.0)
    assert seats.find(key("a")) is None
    issue(seats, "a", None)
    issued = seats.reserved[key("a")]
    assert seats.find(key("a")) is issued
    arrive(seats, "a", None, 1)
    arrive(seats, "a", None, 2, sid="PA_second")
    issue(seats, "a", None, 3)
    found = seats.find(key("a"))
    assert found is not None
    assert found.sid == "PA_second"
    assert seats.identities() == {key("a")}


def test_a_session_that_is_recognised_belongs_to_its_user_from_then_on() -> None:
    seats = room()
    for identity in ("hashed", "other"):
        arrive(seats, identity, 2, 1, identity)
    assert seats.users() == {"hashed", "other"}
    seats.rename(key("hashed"), "a")
    seats.rename(key("hashed"), "a")
    seats.rename(key("unheard-of"), "a")
    assert seats.users() == {"a", "other"}
    assert seats.seats_taken(1) == 2
    seats.rename(key("other"), "a")
    assert seats.seats_taken(1) == 1


def test_an_exemption_counts_once_and_only_for_users_who_hold_something() -> None:
    seats = room()
    seats.exempt("nobody")
    assert not seats.is_exempt("nobody")
    for user in ("a", "b"):
        enter(seats, user, 2)
    for _ in range(2):
        seats.exempt("a")
    assert seats.is_exempt("a")
    assert seats.seats_taken(1) == 1
    leave(seats, "a", 2)
    listing(seats, 2, 3, "b")
    assert not seats.is_exempt("a")
    assert seats.seats_taken(3) == 1


def test_people_of_whom_the_sfu_does_not_say_when_they_joined_are_taken_for_the_oldest() -> None:
    seats = room()
    who = [Arrival("PA_a", "a", "a", 1.0), Arrival("PA_b", "b", "b"), Arrival("PA_c", "c", "c", 0.5)]
    seats.apply_listing(ALIAS, who, 1, 5, 5)
    assert over(seats, 1, 5) == ["c", "a"]
