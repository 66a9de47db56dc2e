# SPDX-License-Identifier: Apache-2.0
"""Seats, without a reactor: the table, each rule by name, and that no order of events breaks them."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lotusguard.rules.refusals import Refusal
from lotusguard.rules.room_seats import RECONNECT_WINDOW, RoomSeats
from lotusguard.rules.seats import TABLE, Arrival, HoldEvent, HoldState, IdentityKey

TTL = 30.0
ALIAS = "alias"
_ids = count(1)


def room() -> RoomSeats:
    """A room that was listed empty at 0, and has had a limit since -10."""
    seats = RoomSeats(unlimited_at=-10.0)
    seats.apply_listing(ALIAS, [], 1, since=0.0, now=0.0)
    return seats


def take(seats: RoomSeats, user: str, limit: int | None, now: float = 0.0, *, exempt: bool = False) -> str:
    """Take a seat. :return: the hold's ID."""
    hold_id = f"hold{next(_ids)}"
    assert seats.take(hold_id, user, limit, ALIAS, now, exempt=exempt) is None
    return hold_id


def refused(seats: RoomSeats, user: str, limit: int, now: float = 0.0) -> Refusal | None:
    """Ask for a seat and give it back at once. :return: why there was none."""
    hold_id = f"hold{next(_ids)}"
    refusal = seats.take(hold_id, user, limit, ALIAS, now)
    seats.release(hold_id)
    return refusal


def issue(seats: RoomSeats, user: str, limit: int | None, now: float = 0.0, identity: str = "") -> None:
    """Take a seat and be given a token."""
    assert seats.issue(take(seats, user, limit, now), ALIAS, identity or user, now, TTL)


def enter(seats: RoomSeats, user: str, limit: int | None, now: float = 0.0, identity: str = "") -> None:
    """Take a seat, be given a token, and arrive."""
    issue(seats, user, limit, now, identity)
    arrive(seats, user, limit, now, identity)


def arrive(
    seats: RoomSeats, user: str, limit: int | None, now: float, identity: str = "", sid: str = "", alias: str = ALIAS
) -> None:
    identity = identity or user
    seats.arrive(alias, Arrival(sid or f"PA_{identity}", identity, user), limit, now)


def leave(seats: RoomSeats, identity: str, now: float, *, by_choice: bool = True, sid: str = "") -> None:
    seats.leave(ALIAS, sid or f"PA_{identity}", identity, now, now, by_choice=by_choice)


def listing(seats: RoomSeats, limit: int | None, now: float, *present: str, joined: float | None = None) -> None:
    """A listing that shows these users, each with the identity of their name."""
    who = [Arrival(f"PA_{user}", user, user, joined) for user in present]
    seats.apply_listing(ALIAS, who, limit, since=now, now=now)


def over(seats: RoomSeats, limit: int | None, now: float) -> list[str]:
    return [hold.user for hold in seats.overflow(limit, now)]


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
    seats = RoomSeats(unlimited_at=100.0)
    users = [str(n) for n in range(5)]
    listing(seats, 2, 110, *users, joined=90)
    assert over(seats, 2, 110) == []
    assert refused(seats, "3", 2, 111) is None
    assert refused(seats, "new", 2, 111) is Refusal.FULL


def test_participants_at_the_first_listing_who_joined_under_the_limit_are_seated_by_the_time_they_joined() -> None:
    seats = RoomSeats(unlimited_at=100.0)
    who = [Arrival(f"PA_{joined}", str(joined), str(joined), float(joined)) for joined in (107, 105, 106)]
    seats.apply_listing(ALIAS, who, 2, 110, 110)
    assert over(seats, 2, 110) == ["107"]


def test_an_arrival_before_the_first_listing_gets_no_seat_from_those_already_there() -> None:
    seats = RoomSeats(unlimited_at=100.0)
    seats.arrive(ALIAS, Arrival("PA_late", "late", "late", 105.0), 1, 105)
    seats.apply_listing(
        ALIAS, [Arrival("PA_a", "a", "a", 50.0), Arrival("PA_late", "late", "late", 105.0)], 1, 107, 107
    )
    assert over(seats, 1, 107) == ["late"]


def test_a_restored_hold_keeps_its_seat_until_a_listing() -> None:
    seats = RoomSeats(unlimited_at=100.0)
    for user, present in (("in-call", True), ("invited", False)):
        seats.restore(user, user, IdentityKey(ALIAS, user), present=present, now=110, expires=120)
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


# -- any order ---------------------------------------------------------------------------------------------


class Calls(RuleBasedStateMachine):
    """Users ask, are answered, arrive and leave in any order; listings and webhooks come late, twice or never.

    The world keeps its own books: who may be in the call because of a token given in time, and who truly is in it.
    """

    USERS = st.sampled_from("abc")

    @initialize(limit=st.integers(1, 2))
    def opened(self, limit: int) -> None:
        self.limit = limit
        self.now = 100.0
        self.seats = RoomSeats(unlimited_at=0.0)
        self.asked: list[tuple[str, str | None]] = []
        self.promised: dict[str, float] = {}
        self.promise_asked: dict[str, float] = {}
        self.inside: dict[str, str] = {}
        self.entitled: set[str] = set()
        self.listings: list[tuple[float, list[Arrival]]] = []
        self.sids = 0
        self.seats.apply_listing(ALIAS, [], limit, self.now, self.now)

    def _holds(self, user: str) -> bool:
        in_call = any(u == user and sid in self.entitled for sid, u in self.inside.items())
        return in_call or self.promised.get(user, 0) > self.now

    def _present(self) -> list[Arrival]:
        return [Arrival(sid, user, user) for sid, user in self.inside.items()]

    @rule(seconds=st.sampled_from([1.0, 19.0, 29.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(user=USERS, verified=st.booleans())
    def asks(self, user: str, verified: bool) -> None:
        """As admission does: a seat before upstream is asked for verified callers, afterwards for others."""
        if not verified:
            self.asked.append((user, None))
            return
        hold_id = self._take(user)
        if hold_id is not None:
            self.asked.append((user, hold_id))

    def _take(self, user: str) -> str | None:
        """With a listing at most two seconds old to let in, and a new one to refuse."""
        self._list_if_before(self.now - 2)
        hold_id = f"hold{next(_ids)}"
        refusal = self.seats.take(hold_id, user, self.limit, ALIAS, self.now)
        if refusal is Refusal.FULL:
            self._list_if_before(self.now)
            refusal = self.seats.take(hold_id, user, self.limit, ALIAS, self.now)
        if refusal is None:
            return hold_id
        assert not self._holds(user), "a holder was refused"
        return None

    def _list_if_before(self, since: float) -> None:
        listed = self.seats.listed_since([ALIAS])
        if listed is None or listed < since:
            self.now += 0.001
            self.listings.insert(0, (self.now, self._present()))
            self.a_listing_ends()

    @rule(user=USERS)
    def asks_and_is_answered(self, user: str) -> None:
        before = len(self.asked)
        self.asks(user, verified=True)
        if len(self.asked) > before:
            self._answer(*self.asked.pop())

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def is_answered(self, data: st.DataObject) -> None:
        self._answer(*self.asked.pop(data.draw(st.integers(0, len(self.asked) - 1))))

    def _answer(self, user: str, hold_id: str | None) -> None:
        if hold_id is None:
            hold_id = self._take(user)
        if hold_id is None:
            return
        assert self.seats.issue(hold_id, ALIAS, user, self.now, TTL)
        if self.promise_asked.get(user, -TTL) + TTL < self.now:  # asking again does not extend it
            self.promised[user] = self.now + TTL
        self.promise_asked[user] = self.now

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def fails(self, data: st.DataObject) -> None:
        _, hold_id = self.asked.pop(data.draw(st.integers(0, len(self.asked) - 1)))
        if hold_id is not None:
            self.seats.release(hold_id)

    def _has_arrived(self, user: str) -> None:
        self.promised.pop(user, None)
        self.promise_asked.pop(user, None)

    @rule(user=USERS, told=st.booleans())
    def arrives(self, user: str, told: bool) -> None:
        self.sids += 1
        sid = f"PA_{self.sids}"
        if self._holds(user):
            self.entitled.add(sid)
            self.promised.pop(user, None)
        self.inside[sid] = user
        if told:
            self.promise_asked.pop(user, None)
            self.seats.arrive(ALIAS, Arrival(sid, user, user), self.limit, self.now)
            self._see_who_was_given_a_seat()

    def _see_who_was_given_a_seat(self) -> None:
        """Somebody who came without a token into a room that was not full has a seat like anybody."""
        seated = {at.sid for at, hold in self.seats.sessions.items() if hold.state is HoldState.PRESENT}
        self.entitled |= seated & self.inside.keys()

    @precondition(lambda self: self.inside)
    @rule(data=st.data(), told=st.booleans(), by_choice=st.booleans())
    def leaves(self, data: st.DataObject, told: bool, by_choice: bool) -> None:
        sid = data.draw(st.sampled_from(sorted(self.inside)))
        user = self.inside.pop(sid)
        if told:
            self.seats.leave(ALIAS, sid, user, self.now, self.now, by_choice=by_choice)
            if by_choice:
                self.promised.pop(user, None)

    @rule()
    def a_listing_begins(self) -> None:
        self.now += 0.001
        self.listings.append((self.now, self._present()))

    @precondition(lambda self: self.listings)
    @rule()
    def a_listing_ends(self) -> None:
        since, present = self.listings.pop(0)
        self.seats.apply_listing(ALIAS, present, self.limit, since, self.now)
        for who in present:  # a user seen there under a token from before the listing has arrived
            if who.user in self.seats.users():
                self.promise_asked.pop(who.user, None)
            if who.user not in self.seats.awaited(self.now):
                self.promised.pop(who.user, None)
        self._see_who_was_given_a_seat()

    @rule()
    def the_overflow_is_removed(self) -> None:
        overflow = self.seats.overflow(self.limit, self.now)
        self._see_who_was_given_a_seat()
        for hold in overflow:
            assert hold.sid not in self.entitled, "somebody with a seat was removed"
            self.inside.pop(hold.sid, None)
            self.seats.leave(ALIAS, hold.sid, hold.identity, self.now, self.now, by_choice=True)

    @invariant()
    def never_more_than_the_limit(self) -> None:
        if not hasattr(self, "seats"):
            return
        in_call = {user for sid, user in self.inside.items() if sid in self.entitled}
        let_in = in_call | {user for user, until in self.promised.items() if until > self.now}
        assert len(let_in) <= self.limit, let_in
        on_seats = {hold.user for hold in self.seats.sessions.values() if hold.state is HoldState.PRESENT}
        assert len(on_seats | self.seats.awaited(self.now)) <= self.limit

    @invariant()
    def counts_agree_with_the_holds(self) -> None:
        if not hasattr(self, "seats"):
            return
        holds = [*self.seats.pending.values(), *self.seats.reserved.values(), *self.seats.sessions.values()]
        assert self.seats.seats_taken(self.now) == len({hold.user for hold in holds if hold.rules.takes_seat})
        assert self.seats.aliases() == {hold.alias for hold in holds}


Calls.TestCase.settings = settings(max_examples=400, stateful_step_count=30, deadline=None)
TestCalls = Calls.TestCase
