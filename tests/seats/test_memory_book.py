# SPDX-License-Identifier: Apache-2.0
"""The seat book in memory: who is woken when a seat may be free, and when a call has started and ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock

from lotusguard.guard.seats.book import KEPT_FOR, Issued
from lotusguard.guard.seats.kept_rooms import ROOMS_PER_CALLER
from lotusguard.guard.seats.memory import SLOTS_PER_ROOM, MemorySeatBook
from lotusguard.guard.seats.store import StoredHold, open_state_store
from lotusguard.metrics import Metrics
from lotusguard.rules.refusals import Refusal
from lotusguard.rules.room_holds import RECONNECT_WINDOW, RESERVED_PER_USER
from lotusguard.rules.room_seats import CALL_ENDED_AFTER, UNCONFIRMED_KEPT
from lotusguard.rules.seats import Arrival
from tests.conftest import stopped_clock

ROOM, ALIAS = "!room", "alias"
SEAT_TTL = 30.0


@pytest.fixture
def clock() -> Clock:
    clock = Clock()
    clock.advance(1000)
    return clock


@pytest.fixture
def book(clock: Clock) -> MemorySeatBook:
    return MemorySeatBook(None, clock, clock.seconds, Metrics(), SEAT_TTL, clock.seconds())


def now(work: Any) -> Any:
    """The result of something that does not have to wait."""
    return Deferred.fromCoroutine(work).result


def take(book: MemorySeatBook, user: str, room_id: str = ROOM, limit: int | None = 1) -> str:
    hold_id = now(book.take(room_id, user, limit, ALIAS))
    assert isinstance(hold_id, str)
    return hold_id


def issue(book: MemorySeatBook, user: str, limit: int | None = 1, room_id: str = ROOM) -> None:
    now(book.issue(room_id, take(book, user, room_id, limit), Issued(ALIAS, user), durable=False))


def waiting(book: MemorySeatBook, user: str, *, again: bool = False) -> Deferred[None]:
    return Deferred.fromCoroutine(book.wait_for_seat(ROOM, user, again=again))


def listing(book: MemorySeatBook, clock: Clock, *users: str, joined: float | None = None) -> None:
    who = [Arrival(f"PA_{user}", user, user, clock.seconds() if joined is None else joined) for user in users]
    now(book.apply_listing(ROOM, ALIAS, who, 1, clock.seconds()))


# -- waiting for a seat ------------------------------------------------------------------------------------


def test_the_longest_waiting_is_woken_first_and_alone(book: MemorySeatBook) -> None:
    hold_id = take(book, "a")
    first, second = waiting(book, "b"), waiting(book, "c")
    now(book.release(ROOM, hold_id))
    assert first.called
    assert not second.called


def test_a_user_who_was_woken_and_found_no_seat_waits_on_at_the_head(book: MemorySeatBook) -> None:
    hold_id = take(book, "a")
    second = waiting(book, "c")
    again = waiting(book, "b", again=True)
    now(book.release(ROOM, hold_id))
    assert again.called
    assert not second.called


def test_a_user_who_has_a_seat_by_now_is_woken_besides(book: MemorySeatBook) -> None:
    hold_id = take(book, "a")
    stranger, owner = waiting(book, "b"), waiting(book, "a")
    now(book.issue(ROOM, hold_id, Issued(ALIAS, "a"), durable=False))
    assert stranger.called
    assert owner.called


def test_a_waiting_caller_who_disconnected_is_passed_over(book: MemorySeatBook) -> None:
    hold_id = take(book, "a")
    gone, second = waiting(book, "b"), waiting(book, "c")
    gone.addErrback(lambda failure: failure.trap(CancelledError))
    gone.cancel()
    now(book.release(ROOM, hold_id))
    assert second.called


def test_everybody_can_be_woken_to_look_again(book: MemorySeatBook) -> None:
    take(book, "a")
    others = [waiting(book, user) for user in "bcd"]
    now(book.wake_all(ROOM))
    assert all(other.called for other in others)


def test_a_seat_of_one_room_wakes_nobody_in_another(book: MemorySeatBook) -> None:
    take(book, "a")
    waiter = waiting(book, "b")
    now(book.release("!other", take(book, "a", "!other")))
    assert not waiter.called


def test_those_who_wait_in_a_room_that_is_forgotten_look_again(
    book: MemorySeatBook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lotusguard.guard.seats.kept_rooms.ROOMS_KEPT", 1)
    take(book, "a")
    waiter = waiting(book, "b")
    take(book, "a", "!other")
    assert waiter.called


# -- slots -------------------------------------------------------------------------------------------------


def test_a_room_has_sixteen_slots_and_its_main_one(book: MemorySeatBook) -> None:
    def enter(alias: str, *, new_slot: bool) -> str | Refusal:
        taken: str | Refusal = now(book.take(ROOM, "a", None, alias, new_slot=new_slot))
        return taken

    for number in range(SLOTS_PER_ROOM):
        assert enter(f"slot{number}", new_slot=True) is not Refusal.TOO_MANY_SLOTS
    assert enter("one-more", new_slot=True) is Refusal.TOO_MANY_SLOTS
    assert enter("slot0", new_slot=True) is not Refusal.TOO_MANY_SLOTS
    assert enter("main", new_slot=False) is not Refusal.TOO_MANY_SLOTS


# -- whether a call was started ----------------------------------------------------------------------------


def test_a_started_call_ends_a_minute_after_its_last_occupant_left(book: MemorySeatBook, clock: Clock) -> None:
    issue(book, "moderator")
    now(book.start(ROOM))
    now(book.arrive(ROOM, ALIAS, Arrival("PA", "moderator", "moderator"), 1))
    clock.advance(7200)
    assert now(book.is_started(ROOM))
    now(book.leave(ROOM, ALIAS, "PA", "moderator", clock.seconds(), by_choice=True))
    clock.advance(CALL_ENDED_AFTER - 1)
    assert now(book.is_started(ROOM))
    clock.advance(1)
    assert not now(book.is_started(ROOM))
    issue(book, "member", limit=None)
    assert not now(book.is_started(ROOM)), "a newcomer made the ended call look alive"


def test_a_call_ends_a_minute_after_the_last_token_expired_unused_however_late_a_listing_confirms_it(
    book: MemorySeatBook, clock: Clock
) -> None:
    issue(book, "moderator")
    now(book.start(ROOM))
    clock.advance(SEAT_TTL + CALL_ENDED_AFTER)
    listing(book, clock)
    assert not now(book.is_started(ROOM))


def test_a_call_is_kept_for_those_who_reconnect(book: MemorySeatBook, clock: Clock) -> None:
    issue(book, "moderator")
    now(book.start(ROOM))
    now(book.arrive(ROOM, ALIAS, Arrival("PA", "moderator", "moderator"), 1))
    now(book.leave(ROOM, ALIAS, "PA", "moderator", clock.seconds(), by_choice=False))
    clock.advance(RECONNECT_WINDOW + CALL_ENDED_AFTER - 1)
    assert now(book.is_started(ROOM))
    clock.advance(2)
    assert not now(book.is_started(ROOM))


@pytest.mark.parametrize(("ago", "started"), [(10, True), (-10, False)])
def test_only_a_call_that_is_older_than_the_guard_counts_as_started_when_it_is_first_seen(
    book: MemorySeatBook, clock: Clock, ago: float, started: bool
) -> None:
    joined = clock.seconds() - ago
    clock.advance(20)
    listing(book, clock, "member", joined=joined)
    assert now(book.is_started(ROOM)) is started


def test_a_user_with_a_request_in_flight_is_an_occupant_and_one_who_left_is_not(
    book: MemorySeatBook, clock: Clock
) -> None:
    hold_id = take(book, "a")
    assert set(now(book.occupants(ROOM))) == {"a"}
    now(book.issue(ROOM, hold_id, Issued(ALIAS, "a"), durable=False))
    assert set(now(book.occupants(ROOM))) == {"a"}
    clock.advance(SEAT_TTL)
    assert set(now(book.occupants(ROOM))) == set()
    now(book.arrive(ROOM, ALIAS, Arrival("PA", "a", "a"), 1))
    assert set(now(book.occupants(ROOM))) == {"a"}


# -- rooms that LiveKit may have lost ----------------------------------------------------------------------


def test_rooms_are_kept_for_people_in_the_call_and_those_with_a_token(book: MemorySeatBook, clock: Clock) -> None:
    assert now(book.kept_aliases()) == set()
    listing(book, clock, "a", "b")
    now(book.issue("!other", take(book, "c", "!other"), Issued("other", "c"), durable=False))
    assert now(book.kept_aliases()) == {ALIAS, "other"}


def test_a_room_whose_people_left_is_kept_until_a_listing_confirms_it(book: MemorySeatBook, clock: Clock) -> None:
    listing(book, clock, "a")
    now(book.leave(ROOM, ALIAS, "PA_a", "a", clock.seconds(), by_choice=True))
    assert now(book.kept_aliases()) == {ALIAS}
    clock.advance(1)
    listing(book, clock)
    assert now(book.kept_aliases()) == set()


@pytest.mark.parametrize(("ago", "kept"), [(KEPT_FOR - 1, {ALIAS}), (KEPT_FOR + 1, set()), (86400.0, set())])
def test_rooms_of_an_earlier_run_are_kept_if_it_ended_a_short_while_ago(
    book: MemorySeatBook, clock: Clock, ago: float, kept: set[str]
) -> None:
    hold = StoredHold(ROOM, "a", ALIAS, "a", "PHONE", present=True, expires=0.0)
    book.load([hold], ended=clock.seconds() - ago)
    assert now(book.kept_aliases()) == kept
    assert now(book.owns_seat(ROOM, "a"))  # until a listing shows that they are not there


# -- memory ------------------------------------------------------------------------------------------------


def test_holds_in_rooms_that_nobody_lists_are_forgotten(book: MemorySeatBook, clock: Clock) -> None:
    for number in range(50):
        now(book.issue(ROOM, take(book, "a", limit=None), Issued(ALIAS, f"identity{number}"), durable=False))
    clock.advance(SEAT_TTL + UNCONFIRMED_KEPT)
    now(book.prune())
    assert now(book.snapshots()) == []


def test_tokens_that_cannot_be_read_take_a_seat_each(book: MemorySeatBook) -> None:
    for user in ("a", "b"):
        now(book.issue(ROOM, take(book, user, limit=2), Issued("", ""), durable=False))
    assert now(book.take(ROOM, "c", 2, ALIAS)) is Refusal.FULL


def rooms_of(book: MemorySeatBook) -> list[str]:
    return [snapshot.room_id for snapshot in now(book.snapshots())]


def test_a_caller_who_names_many_rooms_loses_the_oldest_of_their_own(book: MemorySeatBook) -> None:
    issue(book, "victim", room_id="!victim")
    for number in range(ROOMS_PER_CALLER + 50):
        issue(book, "flooder", room_id=f"!flood{number:03}")
    rooms = rooms_of(book)
    assert "!victim" in rooms
    assert [room for room in rooms if room != "!victim"] == [f"!flood{number:03}" for number in range(50, 150)]


def test_a_room_in_which_others_hold_seats_is_not_counted_for_its_first_caller(book: MemorySeatBook) -> None:
    issue(book, "flooder", limit=2)
    issue(book, "other", limit=2)
    issue(book, "flooder", room_id="!call")
    now(book.arrive("!call", ALIAS, Arrival("PA", "guest", "guest"), None))
    for number in range(ROOMS_PER_CALLER + 1):
        issue(book, "flooder", room_id=f"!flood{number}")
    assert {ROOM, "!call"} <= set(rooms_of(book))


def test_a_full_book_forgets_rooms_with_people_in_the_call_last(
    book: MemorySeatBook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lotusguard.guard.seats.kept_rooms.ROOMS_KEPT", 4)
    now(book.arrive("!call", ALIAS, Arrival("PA", "a", "a"), None))
    for user in ("b", "c"):
        issue(book, user, limit=2, room_id="!two")
    issue(book, "d", room_id="!alone")
    now(book.start("!idle"))
    for number, left in enumerate(({"!call", "!two", "!alone"}, {"!call", "!two"}, {"!call"})):
        now(book.arrive(f"!new{number}", ALIAS, Arrival("PA", "e", "e"), None))
        assert {room for room in rooms_of(book) if not room.startswith("!new")} == left


def test_one_user_has_a_bounded_number_of_holds_in_a_room_and_keeps_the_seat(
    book: MemorySeatBook, clock: Clock
) -> None:
    for number in range(RESERVED_PER_USER + 10):
        now(book.issue(ROOM, take(book, "a"), Issued(f"alias{number}", f"identity{number}"), durable=False))
    assert len(now(book.aliases(ROOM))) == RESERVED_PER_USER
    assert now(book.take(ROOM, "b", 1, ALIAS)) is Refusal.FULL
    now(book.arrive(ROOM, "alias0", Arrival("PA", "identity0", "a"), 1))
    assert now(book.overflow(ROOM, 1)) == []


@pytest_twisted.ensureDeferred
async def test_holds_of_a_forgotten_room_are_not_read_after_a_restart(tmp_path: Path, clock: Clock) -> None:
    metrics = Metrics()
    store = open_state_store(tmp_path, stopped_clock(), metrics, clock.seconds)
    book = MemorySeatBook(store, clock, clock.seconds, metrics, SEAT_TTL, clock.seconds())
    for number in range(ROOMS_PER_CALLER + 1):
        issue(book, "flooder", room_id=f"!flood{number}")
    await store.close()
    reopened = open_state_store(tmp_path, reactor, Metrics(), clock.seconds)
    assert {hold.room_id for hold in reopened.holds()} == {f"!flood{n}" for n in range(1, ROOMS_PER_CALLER + 1)}
    await reopened.close()


# -- the state directory -----------------------------------------------------------------------------------


def issue_durably(book: MemorySeatBook, user: str) -> Deferred[None]:
    return Deferred.fromCoroutine(book.issue(ROOM, take(book, user, limit=9), Issued(ALIAS, user), durable=True))


@pytest_twisted.ensureDeferred
async def test_a_repeated_token_whose_hold_is_on_disk_does_not_wait_for_the_disk(tmp_path: Path, clock: Clock) -> None:
    metrics = Metrics()
    store = open_state_store(tmp_path, stopped_clock(), metrics, clock.seconds)
    book = MemorySeatBook(store, clock, clock.seconds, metrics, SEAT_TTL, clock.seconds())
    expires = clock.seconds() + SEAT_TTL
    first = issue_durably(book, "a")
    assert not first.called
    await first
    clock.advance(SEAT_TTL / 2)
    assert issue_durably(book, "a").called
    assert issue_durably(book, "a").called
    other = issue_durably(book, "b")
    assert not other.called
    await other
    assert {hold.user: hold.expires for hold in store.holds()} == {"a": expires, "b": clock.seconds() + SEAT_TTL}
    await store.close()


@pytest_twisted.ensureDeferred
async def test_a_token_after_an_arrival_waits_until_its_hold_is_on_disk(tmp_path: Path, clock: Clock) -> None:
    metrics = Metrics()
    store = open_state_store(tmp_path, stopped_clock(), metrics, clock.seconds)
    book = MemorySeatBook(store, clock, clock.seconds, metrics, SEAT_TTL, clock.seconds())
    await issue_durably(book, "a")
    clock.advance(1)
    now(book.arrive(ROOM, ALIAS, Arrival("PA", "a", "a"), 9))
    now(book.leave(ROOM, ALIAS, "PA", "a", clock.seconds(), by_choice=True))
    clock.advance(1)
    again = issue_durably(book, "a")
    assert not again.called
    await again
    assert [(hold.user, hold.present, hold.expires) for hold in store.holds()] == [
        ("a", False, clock.seconds() + SEAT_TTL)
    ]
    await store.close()
