# SPDX-License-Identifier: Apache-2.0
"""Seats, without a reactor: each rule by name, and that no order of events breaks them."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lotusguard.rules.seats import Claim, Refusal, RoomSeats, Session

TTL = 30.0


def taken(seats: RoomSeats, user: str | None, cap: int, now: float = 0.0) -> Claim:
    claim = seats.take(user, cap, now)
    assert isinstance(claim, Claim)
    return claim


def seated(seats: RoomSeats, user: str, cap: int, now: float = 0.0) -> None:
    """Let somebody in and have them arrive."""
    claim = taken(seats, user, cap, now)
    seats.settle(claim, user, ("room", user), 0, now + TTL)
    assert seats.arrive(Session("room", f"PA_{user}"), user, user, cap, now)


def test_should_block_only_without_a_seat() -> None:
    seats = RoomSeats()
    for user in ("a", "b"):
        seated(seats, user, 2)
    assert seats.take("c", 2, 0) is Refusal.FULL
    assert isinstance(seats.take("c", 3, 0), Claim)


def test_a_second_device_takes_no_second_seat() -> None:
    seats = RoomSeats()
    seated(seats, "a", 2)
    seats.arrive(Session("room", "PA_tablet"), "a", "a-tablet", 2, 0)
    assert seats.held(0) == 1
    assert isinstance(seats.take("b", 2, 0), Claim)


def test_another_slot_of_the_room_has_the_same_seats() -> None:
    seats = RoomSeats()
    seated(seats, "a", 1)
    assert seats.take("b", 1, 0) is Refusal.FULL
    seats.arrive(Session("other-slot", "PA_1"), "b", "b", 1, 0)
    assert [at.alias for at in seats.overflow(1, 0)] == ["other-slot"]


def test_who_was_given_a_token_and_has_not_arrived_holds_a_seat_for_a_while() -> None:
    seats = RoomSeats()
    seats.observe("room", [], 1, since=0, now=0)
    seats.settle(taken(seats, "a", 1), "a", ("room", "a"), 0, TTL)
    assert seats.take("b", 1, TTL - 1) is Refusal.FULL
    assert isinstance(seats.take("a", 1, TTL - 1), Claim)


def test_an_expired_promise_counts_until_somebody_has_looked_whether_its_user_arrived() -> None:
    seats = RoomSeats()
    seats.observe("room", [], 1, since=0, now=0)
    seats.settle(taken(seats, "a", 1), "a", ("room", "a"), 0, TTL)
    assert seats.take("b", 1, TTL + 1) is Refusal.FULL
    seats.observe("room", [("PA_a", "a", "a")], 1, since=TTL + 1, now=TTL + 1)
    assert seats.take("b", 1, TTL + 2) is Refusal.FULL
    assert seats.overflow(1, TTL + 2) == []


def test_an_expired_promise_is_over_once_somebody_has_looked() -> None:
    seats = RoomSeats()
    seats.settle(taken(seats, "a", 1), "a", ("room", "a"), 0, TTL)
    seats.observe("room", [], 1, since=TTL + 1, now=TTL + 1)
    assert isinstance(seats.take("b", 1, TTL + 1), Claim)


def test_a_look_begun_before_a_promise_ended_does_not_end_it() -> None:
    seats = RoomSeats()
    seats.observe("room", [], 1, since=0, now=0)
    seats.settle(taken(seats, "a", 1), "a", ("room", "a"), 0, TTL)
    seats.observe("room", [], 1, since=TTL - 1, now=TTL + 1)
    assert seats.take("b", 1, TTL + 1) is Refusal.FULL


def test_a_request_that_failed_gives_its_seat_back_and_no_other() -> None:
    seats = RoomSeats()
    first = taken(seats, "a", 1)
    second = taken(seats, "a", 1)
    seats.release(first)
    assert seats.take("b", 1, 0) is Refusal.BUSY
    seats.settle(second, "a", ("room", "a"), 0, TTL)
    assert seats.take("b", 1, 0) is Refusal.FULL


def test_a_room_that_only_unanswered_requests_fill_is_busy_and_not_full() -> None:
    seats = RoomSeats()
    claim = taken(seats, None, 1)
    assert seats.take("b", 1, 0) is Refusal.BUSY
    seats.release(claim)
    assert isinstance(seats.take("b", 1, 0), Claim)


def test_an_unnamed_claim_of_somebody_who_is_in_takes_no_second_seat_once_it_is_named() -> None:
    seats = RoomSeats()
    seated(seats, "a", 2)
    claim = taken(seats, None, 2)
    assert seats.take("b", 2, 0) is Refusal.BUSY
    seats.settle(claim, "a", ("room", "a"), 0, TTL)
    assert isinstance(seats.take("b", 2, 0), Claim)


def test_a_token_for_who_is_there_already_outlives_nobodys_leaving() -> None:
    seats = RoomSeats()
    seated(seats, "a", 1)
    seats.settle(taken(seats, "a", 1), "a", ("room", "a"), 1, 1 + TTL)
    seats.observe("room", [("PA_a", "a", "a")], 1, since=2, now=2)
    seats.leave(Session("room", "PA_a"), 3)
    seats.observe("room", [], 1, since=4, now=4)
    assert isinstance(seats.take("b", 1, 4), Claim)


def test_who_is_gone_unnoticed_and_asks_again_keeps_the_seat() -> None:
    seats = RoomSeats()
    seated(seats, "a", 1)
    seats.settle(taken(seats, "a", 1, 5), "a", ("room", "a"), 5, 5 + TTL)
    seats.observe("room", [], 1, since=6, now=6)
    assert seats.take("b", 1, 6) is Refusal.FULL
    assert seats.arrive(Session("room", "PA_again"), "a", "a", 1, 7)


def test_a_token_for_another_device_keeps_the_seat_for_it() -> None:
    seats = RoomSeats()
    seated(seats, "a", 1)
    seats.settle(taken(seats, "a", 1), "a", ("room", "a-tablet"), 0, TTL)
    seats.leave(Session("room", "PA_a"), 1)
    seats.observe("room", [], 1, since=1, now=1)
    assert seats.take("b", 1, 1) is Refusal.FULL
    assert seats.arrive(Session("room", "PA_tablet"), "a", "a-tablet", 1, 2)


def test_what_became_free_is_given_away_only_after_another_look() -> None:
    seats = RoomSeats()
    seats.observe("room", [], 1, since=0, now=0)
    seated(seats, "a", 1)
    seats.leave(Session("room", "PA_a"), 1)
    assert seats.take("b", 1, 1) is Refusal.FULL
    seats.observe("room", [("PA_b", "b", "b"), ("PA_tablet", "tablet", "a")], 1, since=2, now=2)
    assert seats.take("b", 1, 2) is Refusal.FULL
    assert [at.sid for at in seats.overflow(1, 2)] == ["PA_b"]
    seats.leave(Session("room", "PA_tablet"), 3)
    seats.leave(Session("room", "PA_b"), 3)
    seats.observe("room", [], 1, since=4, now=4)
    assert isinstance(seats.take("b", 1, 4), Claim)


def test_a_look_that_a_later_one_overtook_says_nothing() -> None:
    seats = RoomSeats()
    seats.observe("room", [("PA_a", "a", "a")], 1, since=0, now=0)
    seats.observe("room", [], 1, since=5, now=6)
    seats.observe("room", [("PA_a", "a", "a")], 1, since=4, now=7)
    assert seats.users() == set()


def test_a_late_left_of_an_old_session_does_not_unseat_the_new_one() -> None:
    seats = RoomSeats()
    seated(seats, "a", 1)
    seats.arrive(Session("room", "PA_new"), "a", "a", 1, 1)
    seats.leave(Session("room", "PA_a"), 2)
    assert seats.holds("a", 2)
    assert seats.take("b", 1, 2) is Refusal.FULL


def test_a_look_from_before_somebody_left_does_not_bring_them_back() -> None:
    seats = RoomSeats()
    seated(seats, "a", 1)
    seats.leave(Session("room", "PA_a"), 2)
    seats.observe("room", [("PA_a", "a", "a")], 1, since=1, now=3)
    assert seats.users() == set()


def test_a_look_from_before_somebody_came_does_not_put_them_out() -> None:
    seats = RoomSeats()
    seats.observe("room", [], 1, since=0, now=0)
    claim = taken(seats, "a", 1, 1)
    seats.settle(claim, "a", ("room", "a"), 0, 1 + TTL)
    seats.arrive(Session("room", "PA_a"), "a", "a", 1, 2)
    seats.observe("room", [], 1, since=1, now=3)
    assert seats.users() == {"a"}
    seats.observe("room", [], 1, since=4, now=5)
    assert seats.users() == set()


def test_who_was_in_before_we_looked_for_the_first_time_stays() -> None:
    seats = RoomSeats()
    seats.observe("room", [(f"PA_{n}", str(n), str(n)) for n in range(5)], 2, since=0, now=0)
    assert seats.overflow(2, 0) == []
    assert isinstance(seats.take("3", 2, 0), Claim)
    assert seats.take("new", 2, 0) is Refusal.FULL


def test_who_comes_at_the_first_look_is_no_one_who_was_there_before() -> None:
    seats = RoomSeats()
    present = [("PA_a", "a", "a"), ("PA_late", "late", "late")]
    seats.observe("room", present, 1, since=0, now=0, newcomers=frozenset({"PA_late"}))
    assert [at.sid for at in seats.overflow(1, 0)] == ["PA_late"]


def test_who_was_in_when_the_cap_was_lowered_stays() -> None:
    seats = RoomSeats()
    for user in ("a", "b", "c"):
        seated(seats, user, 3)
    assert seats.overflow(1, 1) == []
    assert isinstance(seats.take("c", 1, 1), Claim)


def test_who_comes_without_a_seat_into_a_full_room_is_overflow_until_a_seat_is_free() -> None:
    seats = RoomSeats()
    seated(seats, "a", 1)
    late = Session("room", "PA_late")
    assert not seats.arrive(late, "late", "late", 1, 1)
    assert seats.overflow(1, 1) == [late]
    assert seats.take("late", 1, 1) is Refusal.FULL
    seats.leave(Session("room", "PA_a"), 2)
    assert seats.overflow(1, 2) == []
    seats.observe("room", [("PA_late", "late", "late")], 1, since=3, now=3)
    assert seats.overflow(1, 3) == []
    assert seats.holds("late", 3)


def test_nobody_is_put_out_for_requests_that_may_come_to_nothing() -> None:
    seats = RoomSeats()
    claim = taken(seats, "slow", 1)
    late = Session("room", "PA_late")
    assert not seats.arrive(late, "late", "late", 1, 1)
    assert seats.overflow(1, 1) == []
    seats.settle(claim, "slow", ("room", "slow"), 0, TTL)
    assert seats.overflow(1, 1) == [late]


def test_who_is_listed_later_than_they_left_is_there() -> None:
    seats = RoomSeats()
    seated(seats, "a", 1)
    seats.leave(Session("room", "PA_a"), 2)
    seats.observe("room", [("PA_a", "a", "a")], 1, since=3, now=3)
    assert seats.users() == {"a"}


class Calls(RuleBasedStateMachine):
    """Users ask, are answered, arrive and leave in any order; looks and news come late, twice or never.

    The world keeps its own books: who may be in because of a token given in time, and who truly is.
    """

    USERS = st.sampled_from("abc")

    @initialize(cap=st.integers(1, 2))
    def opened(self, cap: int) -> None:
        self.cap = cap
        self.seats = RoomSeats()
        self.now = 100.0
        self.asked: list[tuple[str, Claim]] = []
        self.promised: dict[str, float] = {}
        self.inside: dict[str, str] = {}
        self.entitled: set[str] = set()
        self.looks: list[tuple[float, list[tuple[str, str, str]]]] = []
        self.sids = 0
        self.seats.observe("room", [], cap, self.now, self.now)

    def _holds(self, user: str) -> bool:
        in_call = any(u == user and sid in self.entitled for sid, u in self.inside.items())
        return in_call or self.promised.get(user, 0) > self.now

    @rule(seconds=st.sampled_from([1.0, 29.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(user=USERS, named=st.booleans())
    def asks(self, user: str, named: bool) -> None:
        """As admission does: with a look that is at most two seconds old to let in, and a new one to refuse."""
        name = user if named else None
        self._look_if_before(self.now - 2)
        verdict = self.seats.take(name, self.cap, self.now)
        if verdict is Refusal.FULL:
            self._look_if_before(self.now)
            verdict = self.seats.take(name, self.cap, self.now)
        if isinstance(verdict, Claim):
            self.asked.append((user, verdict))
        elif named:
            assert not self._holds(user), "a holder was refused"

    def _look_if_before(self, since: float) -> None:
        if self.seats.observed_since(["room"]) < since:
            self.now += 0.001
            self.looks.insert(0, (self.now, [(sid, user, user) for sid, user in self.inside.items()]))
            self.a_look_ends()

    @rule(user=USERS)
    def asks_and_is_answered(self, user: str) -> None:
        before = len(self.asked)
        self.asks(user, named=True)
        if len(self.asked) > before:
            self._answer(*self.asked.pop())

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def is_answered(self, data: st.DataObject) -> None:
        self._answer(*self.asked.pop(data.draw(st.integers(0, len(self.asked) - 1))))

    def _answer(self, user: str, claim: Claim) -> None:
        self.seats.settle(claim, user, ("room", user), self.now, self.now + TTL)
        self.promised[user] = self.now + TTL

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def fails(self, data: st.DataObject) -> None:
        self.seats.release(self.asked.pop(data.draw(st.integers(0, len(self.asked) - 1)))[1])

    @rule(user=USERS, told=st.booleans())
    def arrives(self, user: str, told: bool) -> None:
        self.sids += 1
        sid = f"PA_{self.sids}"
        if self._holds(user):
            self.entitled.add(sid)
            self.promised.pop(user, None)
        self.inside[sid] = user
        if told:
            self.seats.arrive(Session("room", sid), user, user, self.cap, self.now)
            self._see_who_was_given_a_seat()

    def _see_who_was_given_a_seat(self) -> None:
        """Whoever came without a token into a room that was not full sits as well as anybody."""
        self.entitled |= {at.sid for at, seat in self.seats.sessions.items() if seat.seated and at.sid in self.inside}

    @precondition(lambda self: self.inside)
    @rule(data=st.data(), told=st.booleans())
    def leaves(self, data: st.DataObject, told: bool) -> None:
        sid = data.draw(st.sampled_from(sorted(self.inside)))
        del self.inside[sid]
        if told:
            self.seats.leave(Session("room", sid), self.now)

    @rule()
    def a_look_begins(self) -> None:
        self.now += 0.001
        self.looks.append((self.now, [(sid, user, user) for sid, user in self.inside.items()]))

    @precondition(lambda self: self.looks)
    @rule()
    def a_look_ends(self) -> None:
        since, present = self.looks.pop(0)
        self.seats.observe("room", present, self.cap, since, self.now)
        for _, _, user in present:  # who was seen there under a token of before has arrived
            if user not in self.seats.awaited(self.now):
                self.promised.pop(user, None)
        self._see_who_was_given_a_seat()

    @rule()
    def the_overflow_is_put_out(self) -> None:
        overflow = self.seats.overflow(self.cap, self.now)
        self._see_who_was_given_a_seat()
        for at in overflow:
            assert at.sid not in self.entitled, "somebody with a seat was put out"
            self.inside.pop(at.sid, None)
            self.seats.leave(at, self.now)

    @invariant()
    def never_more_than_the_cap(self) -> None:
        if not hasattr(self, "seats"):
            return
        in_call = {user for sid, user in self.inside.items() if sid in self.entitled}
        let_in = in_call | {user for user, until in self.promised.items() if until > self.now}
        assert len(let_in) <= self.cap, let_in
        on_seats = {seat.user for seat in self.seats.sessions.values() if seat.seated}
        assert len(on_seats | self.seats.awaited(self.now)) <= self.cap


Calls.TestCase.settings = settings(max_examples=400, stateful_step_count=30, deadline=None)
TestCalls = Calls.TestCase
