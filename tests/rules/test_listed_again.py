# SPDX-License-Identifier: Apache-2.0
"""A listing that shows the same as the one before is passed over only if applying it would change nothing."""

from __future__ import annotations

from collections.abc import Collection
from copy import deepcopy

import pytest
from hypothesis import settings
from hypothesis.stateful import rule

from lotusguard.rules.room_seats import RoomSeats
from lotusguard.rules.seats import Arrival
from tests.rules.seat_rooms import ALIAS, TTL, enter, leave, listing, room, take
from tests.rules.test_seats_in_any_order import Calls

States = tuple[dict[object, str], dict[object, str], list[str]]


def states(seats: RoomSeats) -> States:
    """What everybody holds."""
    return (
        {at: hold.state.value for at, hold in seats.sessions.items()},
        {key: hold.state.value for key, hold in seats.reserved.items()},
        sorted(seats.pending),
    )


class PassingOver(RoomSeats):
    """Seats to which repeated listings are not applied."""

    repeated: tuple[list[Arrival], int | None] | None = None
    passed_over = 0

    def apply_listing(
        self, alias: str, present: Collection[Arrival], limit: int | None, since: float, now: float
    ) -> None:
        shown = sorted(present, key=lambda who: who.sid)
        if (shown, limit) == self.repeated:
            applied = deepcopy(self)
            applied.repeated = None
            if self.listed_again(alias, limit, since, now):
                applied.apply_listing(alias, present, limit, since, now)
                assert states(applied) == states(self)
                assert applied.listed_since([alias]) == self.listed_since([alias])
                PassingOver.passed_over += 1
                return
        super().apply_listing(alias, present, limit, since, now)
        self.repeated = (shown, limit)


class CallsListedAgain(Calls):
    make = PassingOver

    @rule()
    def is_listed_twice(self) -> None:
        for _ in range(2):
            self.a_listing_begins()
            self.listings = self.listings[-1:]
            self.a_listing_ends()


CallsListedAgain.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestCallsListedAgain = CallsListedAgain.TestCase


@pytest.mark.usefixtures("rules")
def test_a_call_in_which_nothing_happens_is_passed_over() -> None:
    seats = room()
    enter(seats, "a", 2, 1)
    enter(seats, "b", 2, 1)
    listing(seats, 2, 3, "a", "b")
    assert seats.listed_again(ALIAS, 2, 6, 6)
    assert seats.listed_since([ALIAS]) == 6
    assert seats.listed_again(ALIAS, 2, 9, 9)


@pytest.mark.usefixtures("rules")
def test_a_first_listing_is_applied() -> None:
    assert not room().listed_again("never-listed", 2, 6, 6)


@pytest.mark.usefixtures("rules")
def test_a_seat_that_was_taken_since_calls_for_a_whole_listing() -> None:
    seats = room()
    enter(seats, "a", 2, 1)
    listing(seats, 2, 3, "a")
    take(seats, "b", 2, 4)
    assert not seats.listed_again(ALIAS, 2, 6, 6)


@pytest.mark.usefixtures("rules")
def test_somebody_whom_a_webhook_removed_and_the_listings_still_show_is_put_back() -> None:
    seats = room()
    enter(seats, "a", 2, 1)
    listing(seats, 2, 3, "a")
    leave(seats, "a", 4)
    listing(seats, 2, 3.5, "a")  # began before that
    assert not seats.listed_again(ALIAS, 2, 6, 6)
    listing(seats, 2, 6, "a")
    assert seats.users() == {"a"}


@pytest.mark.usefixtures("rules")
def test_a_token_that_nobody_used_is_confirmed_as_over_although_the_listings_show_the_same() -> None:
    seats = room()
    enter(seats, "a", 2, 1)
    issued = take(seats, "b", 2, 2)
    assert seats.issue(issued, ALIAS, "b", 2, TTL)
    listing(seats, 2, 3, "a")
    assert seats.listed_again(ALIAS, 2, 6, 6)  # the token is valid
    assert not seats.listed_again(ALIAS, 2, 2 + TTL + 1, 2 + TTL + 1)
    listing(seats, 2, 2 + TTL + 1, "a")
    assert seats.seats_taken(2 + TTL + 1) == 1


@pytest.mark.usefixtures("rules")
def test_an_overtaken_listing_is_not_what_the_next_one_is_compared_with() -> None:
    seats = room()
    enter(seats, "a", 2, 1)
    listing(seats, 2, 6, "a")
    listing(seats, 2, 5)  # shows nobody, and is ignored
    assert not seats.listed_again(ALIAS, 2, 7, 7)


@pytest.mark.usefixtures("rules")
def test_somebody_whom_a_webhook_brought_and_no_listing_shows_calls_for_a_whole_listing() -> None:
    seats = room()
    enter(seats, "a", 2, 1)
    listing(seats, 2, 3, "a")
    enter(seats, "b", 2, 5)
    seats.apply_listing(ALIAS, [Arrival("PA_a", "a", "a")], 2, since=4, now=6)
    assert not seats.listed_again(ALIAS, 2, 7, 7)
