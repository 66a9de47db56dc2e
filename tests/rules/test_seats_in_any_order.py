# SPDX-License-Identifier: Apache-2.0
"""No order of events breaks the rules of seats, in memory and in Valkey."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lotusguard.rules.refusals import Refusal
from lotusguard.rules.room_seats import RoomSeats
from lotusguard.rules.seats import Arrival, HoldState
from tests.redis.rooms import ComparedSeats

TTL = 30.0
ALIAS = "alias"
_ids = count(1)
MakeSeats = Callable[[float], Any]


class Calls(RuleBasedStateMachine):
    """Users ask, are answered, arrive and leave in any order; listings and webhooks come late, twice or never.

    The world keeps its own books: who may be in the call because of a token given in time, and who truly is in it.
    """

    USERS = st.sampled_from("abc")
    make: MakeSeats = RoomSeats

    @initialize(limit=st.integers(1, 2))
    def opened(self, limit: int) -> None:
        self.limit = limit
        self.now = 100.0
        self.seats: RoomSeats = type(self).make(0.0)
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
        assert self.seats.occupants(self.now) == {hold.user for hold in holds if not hold.rules.unconfirmed}
        occupies = [hold for hold in holds if hold.state is not HoldState.PENDING and not hold.rules.unconfirmed]
        assert self.seats.is_occupied(self.now) == bool(occupies)


class CallsCompared(Calls):
    make = ComparedSeats


Calls.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
CallsCompared.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestCalls = Calls.TestCase
TestCallsCompared = CallsCompared.TestCase
