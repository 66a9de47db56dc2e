# SPDX-License-Identifier: Apache-2.0
"""Seats, without a reactor: the table, and each rule by name.

Every test runs twice: with the rules in memory, and with these and the Lua rules in Valkey side by side.
"""

from __future__ import annotations

import pytest

from lotusguard.rules.listings import OVERTAKEN_BY
from lotusguard.rules.refusals import Refusal
from lotusguard.rules.room_holds import RECONNECT_WINDOW, RESERVED_PER_USER
from lotusguard.rules.room_seats import UNCONFIRMED_KEPT, RoomSeats
from lotusguard.rules.seats import TABLE, Arrival, HoldEvent, HoldState, IdentityKey
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
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("rules")

# -- the table -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", HoldState)
def test_every_state_has_a_row_and_a_way_out(state: HoldState) -> None:
    rules = TABLE[state]
    reached, before = {state}, set[HoldState]()
    while reached != before:
        before = set(reached)
        reached |= {after for s in before for after in TABLE[s].moves.values() if after is not None}
    assert any(after is None for s in reached for after in TABLE[s].moves.values()), "a hold in it never ends"
    assert not (rules.removes and not rules.owns_seat), "somebody is removed for the sake of a user without a seat"
    assert not (rules.removes and rules.unconfirmed), "somebody is removed for a seat that may be free"
    assert rules.unconfirmed == (HoldEvent.CONFIRM in rules.moves)


def test_every_state_is_reached_from_a_request_or_an_arrival() -> None:
    reached = {HoldState.PENDING, HoldState.ISSUED_UNSEATED, HoldState.UNSEATED, HoldState.PRESENT}
    for _ in HoldState:
        reached |= {after for s in reached for after in TABLE[s].moves.values() if after is not None}
    assert reached == set(HoldState)


def test_only_requests_in_flight_leave_a_room_busy_instead_of_full() -> None:
    busy = {state for state, rules in TABLE.items() if rules.takes_seat and not rules.full}
    assert busy == {HoldState.PENDING}


# -- taking a seat -----------------------------------------------------------------------------------------


def test_only_those_without_a_seat_are_refused() -> None:
    seats = room()
    for user in ("a", "b"):
        enter(seats, user, 2)
    assert refused(seats, "c", 2) is Refusal.FULL
    assert refused(seats, "a", 2) is None
    assert refused(seats, "c", 3) is None


def test_second_device_takes_no_second_seat() -> None:
    seats = room()
    enter(seats, "a", 2)
    arrive(seats, "a", 2, 0, identity="a-tablet")
    assert seats.seats_taken(0) == 1
    assert refused(seats, "b", 2) is None


def test_slots_of_a_room_share_its_seats() -> None:
    seats = room()
    seats.apply_listing("other-slot", [], 1, 0, 0)
    enter(seats, "a", 1)
    assert refused(seats, "b", 1) is Refusal.FULL
    arrive(seats, "b", 1, 0, alias="other-slot")
    assert [hold.alias for hold in seats.overflow(1, 0)] == ["other-slot"]


def test_an_issued_token_keeps_its_seat_until_the_time_to_arrive_is_over() -> None:
    seats = room()
    issue(seats, "a", 1)
    assert refused(seats, "b", 1, TTL - 1) is Refusal.FULL
    assert refused(seats, "a", 1, TTL - 1) is None


def test_an_expired_hold_counts_until_a_listing_confirms_it() -> None:
    seats = room()
    issue(seats, "a", 1)
    assert refused(seats, "b", 1, TTL + 1) is Refusal.FULL
    assert seats.listing_required_since(TTL + 1) == TTL
    listing(seats, 1, TTL - 1)
    assert refused(seats, "b", 1, TTL + 1) is Refusal.FULL
    listing(seats, 1, TTL + 2)
    assert refused(seats, "b", 1, TTL + 2) is None


def test_somebody_who_arrived_late_is_found_by_the_listing() -> None:
    seats = room()
    issue(seats, "a", 1)
    listing(seats, 1, TTL + 1, "a")
    assert refused(seats, "b", 1, TTL + 2) is Refusal.FULL
    assert over(seats, 1, TTL + 2) == []


def test_asking_again_without_arriving_does_not_extend_the_hold() -> None:
    seats = room()
    for now in (0.0, 18.0, 36.0, 54.0):
        issue(seats, "ghost", 1, now)
        listing(seats, 1, now + 1)
        assert refused(seats, "b", 1, now + 1) is (Refusal.FULL if now + 1 < TTL else None)


def test_the_time_to_arrive_starts_anew_after_a_pause_or_an_arrival() -> None:
    seats = room()
    issue(seats, "a", 1)
    listing(seats, 1, 2 * TTL + 1)
    issue(seats, "a", 1, 2 * TTL + 2)
    assert refused(seats, "b", 1, 3 * TTL) is Refusal.FULL
    arrive(seats, "a", 1, 3 * TTL)
    leave(seats, "a", 3 * TTL + 1)
    issue(seats, "a", 1, 3 * TTL + 2)
    listing(seats, 1, 3 * TTL + 3)
    assert refused(seats, "b", 1, 4 * TTL) is Refusal.FULL


def test_a_failed_request_gives_back_its_seat_and_no_other() -> None:
    seats = room()
    first, second = take(seats, "a", 1), take(seats, "a", 1)
    seats.release(first)
    assert refused(seats, "b", 1) is Refusal.SEAT_PENDING
    seats.issue(second, ALIAS, "a", 0, TTL)
    assert refused(seats, "b", 1) is Refusal.FULL


def test_a_room_filled_by_requests_in_flight_is_busy() -> None:
    seats = room()
    hold_id = take(seats, "a", 1)
    assert refused(seats, "b", 1) is Refusal.SEAT_PENDING
    seats.release(hold_id)
    assert refused(seats, "b", 1) is None


# -- devices -----------------------------------------------------------------------------------------------


def test_arrival_of_one_device_leaves_the_holds_of_others() -> None:
    seats = room()
    issue(seats, "a", 1, identity="a-phone")
    issue(seats, "a", 1, identity="a-tablet")
    arrive(seats, "a", 1, 1, identity="a-phone")
    leave(seats, "a-phone", 2)
    listing(seats, 1, 3)
    assert refused(seats, "b", 1, 4) is Refusal.FULL
    arrive(seats, "a", 1, 5, identity="a-tablet")
    assert over(seats, 1, 5) == []


def test_hanging_up_ends_the_holds_issued_to_that_identity_before() -> None:
    seats = room()
    enter(seats, "a", 1)
    issue(seats, "a", 1, 1)
    leave(seats, "a", 2)
    listing(seats, 1, 3)
    assert refused(seats, "b", 1, 3) is None


def test_hanging_up_a_session_that_was_never_seen_frees_no_seat_before_a_listing() -> None:
    seats = room()
    issue(seats, "a", 1)  # two sessions of it are in the call by now, and no webhook has said so
    leave(seats, "a", 1, sid="PA_first")
    arrive(seats, "late", 1, 2)
    assert over(seats, 1, 2) == []
    listing(seats, 1, 3, "a", "late")
    assert over(seats, 1, 3) == ["late"]


def test_a_delayed_leave_of_an_older_session_keeps_a_hold_issued_after_it() -> None:
    seats = room()
    enter(seats, "a", 1)
    issue(seats, "a", 1, 5)
    seats.leave(ALIAS, "PA_a", "a", 6.0, 4.0, by_choice=True)
    listing(seats, 1, 7)
    assert refused(seats, "b", 1, 8) is Refusal.FULL


def test_a_token_asked_for_in_mid_call_does_not_outlive_the_session() -> None:
    seats = room()
    enter(seats, "a", 1)
    issue(seats, "a", 1, 1)
    listing(seats, 1, 2, "a")
    leave(seats, "a", 3)
    listing(seats, 1, 4)
    assert refused(seats, "b", 1, 4) is None


CLEAR, HASHED = "@a:s:PHONE", "hashed"
"""Identities of one device of the user ``@a:s``: as ``/sfu/get`` and as ``/get_token`` give them."""


def with_both_routes(device: str = "PHONE", alias: str = ALIAS) -> RoomSeats:
    """Somebody is in the call by one route, and did not use the token of the other one."""
    seats = room()
    issue(seats, "@a:s", 1, 0, HASHED, device, alias)
    issue(seats, "@a:s", 1, 0, CLEAR, "PHONE")
    arrive(seats, "@a:s", 1, 1, CLEAR)
    return seats


def test_hanging_up_ends_the_hold_of_an_unused_token_of_the_other_route() -> None:
    seats = with_both_routes()
    leave(seats, CLEAR, 2)
    listing(seats, 1, 3)
    assert refused(seats, "b", 1, 3) is None


def test_a_moment_in_the_call_by_the_other_route_ends_no_hold() -> None:
    seats = room()
    issue(seats, "@a:s", 1, 0, HASHED, "PHONE")
    issue(seats, "@a:s", 1, 0, CLEAR, "PHONE")
    arrive(seats, "@a:s", 1, 1, HASHED)
    leave(seats, HASHED, 2)
    listing(seats, 1, 3)
    assert refused(seats, "b", 1, 3) is Refusal.FULL
    arrive(seats, "@a:s", 1, 4, CLEAR)
    assert over(seats, 1, 4) == []


@pytest.mark.parametrize(("device", "alias"), [("TABLET", ALIAS), ("", ALIAS), ("PHONE", "other-slot")])
def test_hanging_up_keeps_the_holds_of_other_devices_and_slots(device: str, alias: str) -> None:
    seats = with_both_routes(device, alias)
    leave(seats, CLEAR, 2)
    assert seats.reserved[IdentityKey(alias, HASHED)].state is HoldState.ISSUED
    listing(seats, 1, 3)
    assert refused(seats, "b", 1, 3) is Refusal.FULL


def test_a_session_that_is_lost_ends_no_hold_of_the_other_route() -> None:
    seats = with_both_routes()
    leave(seats, CLEAR, 2, by_choice=False)
    listing(seats, 1, 3)
    assert seats.reserved[IdentityKey(ALIAS, HASHED)].state is HoldState.ISSUED


def test_a_token_of_the_other_route_that_was_issued_after_the_departure_is_kept() -> None:
    seats = room()
    enter(seats, "@a:s", 1, 0, CLEAR)
    issue(seats, "@a:s", 1, 5, HASHED, "PHONE")
    seats.leave(ALIAS, f"PA_{CLEAR}", CLEAR, 6.0, 4.0, by_choice=True)
    listing(seats, 1, 7)
    assert refused(seats, "b", 1, 8) is Refusal.FULL


def test_a_departure_that_was_never_an_arrival_ends_both_holds_of_the_device() -> None:
    seats = room()
    issue(seats, "@a:s", 1, 0, HASHED, "PHONE")
    issue(seats, "@a:s", 1, 0, CLEAR, "PHONE")
    leave(seats, CLEAR, 2)
    listing(seats, 1, 3)
    assert refused(seats, "b", 1, 3) is None


def test_a_session_of_the_other_route_that_reconnects_is_not_ended() -> None:
    seats = room()
    issue(seats, "@a:s", 1, 0, HASHED, "PHONE")
    arrive(seats, "@a:s", 1, 0, HASHED)
    enter(seats, "@a:s", 1, 0, CLEAR)
    leave(seats, HASHED, 1, by_choice=False)
    leave(seats, CLEAR, 2)
    assert seats.reserved[IdentityKey(ALIAS, HASHED)].state is HoldState.RECONNECTING


def test_the_holds_of_one_user_are_bounded_and_the_oldest_are_dropped_first() -> None:
    seats = room()
    for number in range(RESERVED_PER_USER + 1):
        issue(seats, "a", 1, 0, f"identity{number}")
    assert len(seats.reserved) == RESERVED_PER_USER
    assert IdentityKey(ALIAS, "identity0") not in seats.reserved
    assert refused(seats, "b", 1, 1) is Refusal.FULL
    arrive(seats, "a", 1, 1, "identity0")
    assert over(seats, 1, 1) == []


# -- departures --------------------------------------------------------------------------------------------


def test_a_seat_is_free_after_hanging_up_once_a_listing_confirms_it() -> None:
    seats = room()
    enter(seats, "a", 1)
    leave(seats, "a", 1)
    assert refused(seats, "b", 1, 1) is Refusal.FULL
    assert seats.listing_required_since(1) == 1
    listing(seats, 1, 2)
    assert refused(seats, "b", 1, 2) is None


@pytest.mark.parametrize("announced", [True, False])
def test_a_seat_is_kept_for_a_session_that_ended_for_other_reasons(announced: bool) -> None:
    seats = room()
    enter(seats, "a", 1)
    if announced:
        leave(seats, "a", 1, by_choice=False)
    listing(seats, 1, 1)
    listing(seats, 1, RECONNECT_WINDOW)
    assert refused(seats, "b", 1, RECONNECT_WINDOW) is Refusal.FULL
    arrive(seats, "b", 1, RECONNECT_WINDOW)
    assert over(seats, 1, RECONNECT_WINDOW) == ["b"]
    arrive(seats, "a", 1, RECONNECT_WINDOW, sid="PA_again")
    assert over(seats, 1, RECONNECT_WINDOW) == ["b"]


def test_a_seat_of_a_session_that_does_not_return_becomes_free() -> None:
    seats = room()
    enter(seats, "a", 1)
    leave(seats, "a", 1, by_choice=False)
    listing(seats, 1, 1 + RECONNECT_WINDOW)
    assert refused(seats, "b", 1, 1 + RECONNECT_WINDOW) is None


def test_hanging_up_is_believed_after_a_listing_saw_the_session_vanish() -> None:
    seats = room()
    enter(seats, "a", 1)
    listing(seats, 1, 1)
    leave(seats, "a", 2)
    listing(seats, 1, 3)
    assert refused(seats, "b", 1, 3) is None


def test_a_delayed_leave_of_an_old_session_does_not_unseat_the_new_one() -> None:
    seats = room()
    enter(seats, "a", 1)
    arrive(seats, "a", 1, 1, sid="PA_new")
    leave(seats, "a", 2, by_choice=False)
    assert seats.owns_seat("a")
    leave(seats, "a", 3, sid="PA_new")
    listing(seats, 1, 4)
    assert refused(seats, "b", 1, 4) is None


def test_a_delayed_arrival_of_a_session_that_a_listing_saw_vanish_brings_no_seat_back() -> None:
    seats = room()
    enter(seats, "a", 1, 1)
    listing(seats, 1, 5)
    gone = 5 + RECONNECT_WINDOW
    listing(seats, 1, gone + 1)
    seats.arrive(ALIAS, Arrival("PA_a", "a", "a", 1.0), 1, gone + 2)
    assert refused(seats, "b", 1, gone + 2) is None
    assert not seats.owns_seat("a")


def test_an_arrival_counts_if_they_may_have_joined_after_the_last_listing() -> None:
    seats = room()
    listing(seats, 1, 5)
    seats.arrive(ALIAS, Arrival("PA_a", "a", "a", 5 - OVERTAKEN_BY + 0.1), 1, 6)
    assert refused(seats, "b", 1, 6) is Refusal.FULL


# -- listings ----------------------------------------------------------------------------------------------


def test_an_overtaken_listing_says_nothing() -> None:
    seats = room()
    listing(seats, 1, 5)
    seats.apply_listing(ALIAS, [Arrival("PA_a", "a", "a")], 1, since=4, now=7)
    assert seats.users() == set()


def test_a_listing_from_before_a_departure_does_not_bring_anybody_back() -> None:
    seats = room()
    enter(seats, "a", 1)
    leave(seats, "a", 2)
    seats.apply_listing(ALIAS, [Arrival("PA_a", "a", "a")], 1, since=1, now=3)
    assert seats.users() == set()


def test_a_session_listed_after_its_departure_is_there() -> None:
    seats = room()
    enter(seats, "a", 1)
    leave(seats, "a", 2)
    listing(seats, 1, 3, "a")
    assert seats.users() == {"a"}


def test_a_listing_from_before_an_arrival_does_not_end_it() -> None:
    seats = room()
    issue(seats, "a", 1, 1)
    arrive(seats, "a", 1, 2)
    seats.apply_listing(ALIAS, [], 1, since=1, now=3)
    assert seats.users() == {"a"}
    listing(seats, 1, 4)
    assert seats.users() == set()


def test_participants_who_joined_before_there_was_a_limit_stay() -> None:
    seats = unlisted_room(100.0)
    users = [str(n) for n in range(5)]
    listing(seats, 2, 110, *users, joined=90)
    assert over(seats, 2, 110) == []
    assert refused(seats, "3", 2, 111) is None
    assert refused(seats, "new", 2, 111) is Refusal.FULL


def test_participants_at_the_first_listing_who_joined_under_the_limit_are_seated_by_the_time_they_joined() -> None:
    seats = unlisted_room(100.0)
    who = [Arrival(f"PA_{joined}", str(joined), str(joined), float(joined)) for joined in (107, 105, 106)]
    seats.apply_listing(ALIAS, who, 2, 110, 110)
    assert over(seats, 2, 110) == ["107"]


def test_an_arrival_before_the_first_listing_gets_no_seat_from_those_already_there() -> None:
    seats = unlisted_room(100.0)
    seats.arrive(ALIAS, Arrival("PA_late", "late", "late", 105.0), 1, 105)
    seats.apply_listing(
        ALIAS, [Arrival("PA_a", "a", "a", 50.0), Arrival("PA_late", "late", "late", 105.0)], 1, 107, 107
    )
    assert over(seats, 1, 107) == ["late"]


def test_a_restored_hold_keeps_its_seat_until_a_listing() -> None:
    seats = unlisted_room(100.0)
    seats.restore_present("in-call", "in-call", IdentityKey(ALIAS, "in-call"), now=110, ended=120)
    seats.restore_issued("invited", "invited", IdentityKey(ALIAS, "invited"), now=110, expires=120)
    who = [Arrival("PA_late", "late", "late", 101.0), Arrival("PA_1", "in-call", "in-call", 105.0)]
    seats.apply_listing(ALIAS, who, 2, 111, 111)
    assert over(seats, 2, 111) == ["late"]
    seats.apply_listing(ALIAS, who, 2, 121, 121)
    assert over(seats, 2, 121) == []


def test_an_identity_whose_alias_is_listed_no_more_does_not_keep_others_expired() -> None:
    seats = room()
    seats.apply_listing("gone", [], 2, 0, 0)
    issue(seats, "a", 2)
    listing(seats, 2, TTL + 1)
    assert seats.seats_taken(TTL + 1) == 0


# -- over the limit ----------------------------------------------------------------------------------------


def test_lowering_the_limit_removes_nobody() -> None:
    seats = room()
    for user in ("a", "b", "c"):
        enter(seats, user, 3)
    assert over(seats, 1, 1) == []
    assert refused(seats, "c", 1, 1) is None


def test_a_participant_without_a_seat_is_over_the_limit_until_a_seat_is_free() -> None:
    seats = room()
    enter(seats, "a", 1)
    arrive(seats, "late", 1, 1)
    assert over(seats, 1, 1) == ["late"]
    assert refused(seats, "late", 1, 1) is Refusal.FULL
    leave(seats, "a", 2)
    assert over(seats, 1, 2) == []
    listing(seats, 1, 3, "late")
    assert over(seats, 1, 3) == []
    assert seats.owns_seat("late")


def test_nobody_is_removed_for_requests_in_flight() -> None:
    seats = room()
    hold_id = take(seats, "slow", 1)
    arrive(seats, "late", 1, 1)
    assert over(seats, 1, 1) == []
    seats.issue(hold_id, ALIAS, "slow", 1, TTL)
    assert over(seats, 1, 1) == ["late"]


def test_lifting_the_limit_seats_everybody() -> None:
    seats = room()
    enter(seats, "a", 1)
    arrive(seats, "late", 1, 1)
    assert over(seats, None, 2) == []
    assert over(seats, 1, 3) == []


def test_a_token_issued_while_failing_open_gets_a_seat_only_if_one_is_free() -> None:
    seats = room()
    enter(seats, "a", 2)
    for user in ("b", "c"):
        seats.issue_without_seat(f"hold-{user}", user, ALIAS, user, 1, TTL)
    listing(seats, 2, 2, "a")
    assert refused(seats, "d", 2, 2) is Refusal.FULL
    arrive(seats, "c", 2, 3)
    arrive(seats, "b", 2, 4)
    assert over(seats, 2, 4) == ["c"]


def test_a_token_issued_while_failing_open_to_somebody_with_a_seat_keeps_it() -> None:
    seats = room()
    enter(seats, "a", 1)
    seats.issue_without_seat("hold", "a", ALIAS, "a-tablet", 1, TTL)
    leave(seats, "a", 2)
    listing(seats, 1, 3)
    assert refused(seats, "b", 1, 3) is Refusal.FULL


# -- past the limit ----------------------------------------------------------------------------------------


def test_an_exempt_user_takes_no_seat_and_is_never_over_the_limit() -> None:
    seats = room()
    enter(seats, "a", 1)
    assert seats.issue(take(seats, "moderator", 1, exempt=True), ALIAS, "moderator", 0, TTL)
    arrive(seats, "moderator", 1, 1)
    listing(seats, 1, 2, "a", "moderator")
    assert over(seats, 1, 2) == []
    assert seats.seats_taken(2) == 1
    leave(seats, "a", 3)
    listing(seats, 1, 4, "moderator")
    assert refused(seats, "b", 1, 4) is None


def test_a_participant_who_becomes_exempt_frees_the_seat_and_keeps_the_place() -> None:
    seats = room()
    enter(seats, "a", 1)
    seats.exempt("a")
    enter(seats, "b", 1, 1)
    assert over(seats, 1, 2) == []
    assert refused(seats, "c", 1, 2) is Refusal.FULL
    leave(seats, "a", 3)
    listing(seats, 1, 4, "b")
    assert refused(seats, "a", 1, 4) is Refusal.FULL


def test_an_ended_hold_that_no_listing_confirms_is_forgotten_after_a_while() -> None:
    seats = room()
    issue(seats, "a", 1)
    seats.forget_old(TTL + UNCONFIRMED_KEPT - 1, TTL)
    assert refused(seats, "b", 1, TTL + UNCONFIRMED_KEPT - 1) is Refusal.FULL
    seats.forget_old(TTL + UNCONFIRMED_KEPT, TTL)
    assert refused(seats, "b", 1, TTL + UNCONFIRMED_KEPT) is None


def test_a_room_is_occupied_by_tokens_in_time_and_participants_but_not_by_requests() -> None:
    seats = room()
    take(seats, "a", None)
    assert not seats.is_occupied(0.0)
    assert seats.occupants(0.0) == {"a"}
    issue(seats, "b", None)
    assert seats.is_occupied(TTL - 1)
    assert seats.occupants(TTL - 1) == {"a", "b"}
    assert not seats.is_occupied(TTL)
    assert seats.occupants(TTL) == {"a"}


def test_tokens_that_cannot_be_read_do_not_replace_each_other() -> None:
    seats = room()
    for user in ("a", "b"):
        seats.issue(take(seats, user, 2), ALIAS, "", 0.0, TTL)
    assert refused(seats, "c", 2) is Refusal.FULL
