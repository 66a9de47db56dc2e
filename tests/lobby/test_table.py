# SPDX-License-Identifier: Apache-2.0
"""The states of a lobby entry: the table, and races between decisions, time and the user's own requests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotusguard.guard.lobby.colours import colour_of
from lotusguard.rules.lobby import TABLE, LobbyEntry, LobbyEvent, LobbyState
from lotusguard.rules.lobby_book import HELD_PER_USER, WAITING_IN_ALL, WAITING_PER_ROOM, LobbyBook
from lotusguard.rules.refusals import Refusal

ROOM, BOB = "!room:example.org", "@bob:example.org"
S, E = LobbyState, LobbyEvent


def book_with(state: LobbyState) -> LobbyBook:
    """A book with one entry of Bob's, at time 0."""
    book = LobbyBook(600.0)
    if state in (S.ACCEPTED, S.REMOVED):
        book.let_in(ROOM, BOB, "id", 0.0) if state is S.ACCEPTED else book.remove(ROOM, BOB, "id", 0.0)
    else:
        entry = book.ask(ROOM, BOB, "id", 0.0)
        assert isinstance(entry, LobbyEntry)
        if state is not S.WAITING:
            book.apply(ROOM, BOB, {S.DENIED: E.DENY, S.UNANSWERED: E.TIME_OUT}[state], 0.0)
    book.take_changes()
    return book


def state_at(book: LobbyBook, now: float) -> LobbyState | None:
    entry = book.find(ROOM, BOB, now)
    return entry.state if entry is not None else None


def test_the_table_has_every_state() -> None:
    assert set(TABLE) == set(LobbyState)
    assert all(E.EXPIRE in rules.moves for rules in TABLE.values())


@pytest.mark.parametrize(
    ("state", "seconds"), [(S.WAITING, 3), (S.ACCEPTED, 21600), (S.DENIED, 5), (S.UNANSWERED, 60), (S.REMOVED, 600)]
)
def test_each_state_lasts_as_long_as_it_should(state: LobbyState, seconds: float) -> None:
    assert state_at(book_with(state), seconds - 0.1) is state
    assert state_at(book_with(state), seconds) is None


@pytest.mark.parametrize("state", [S.ACCEPTED, S.DENIED, S.UNANSWERED, S.REMOVED])
def test_asking_never_overwrites_a_decision(state: LobbyState) -> None:
    book = book_with(state)
    entry = book.ask(ROOM, BOB, "other", 1.0)
    assert isinstance(entry, LobbyEntry)
    assert (entry.id, entry.state) == ("id", state)
    assert entry.expires == TABLE[state].lifetime


def test_of_two_moderators_the_first_decides() -> None:
    book = book_with(S.WAITING)
    assert book.decide(ROOM, BOB, E.ADMIT, 1.0)
    assert not book.decide(ROOM, BOB, E.DENY, 1.0)
    assert state_at(book, 1.0) is S.ACCEPTED
    book = book_with(S.WAITING)
    assert book.decide(ROOM, BOB, E.DENY, 1.0)
    assert not book.decide(ROOM, BOB, E.DENY, 1.0)
    assert state_at(book, 1.0) is S.DENIED


def test_a_moderator_can_still_admit_somebody_who_was_denied_timed_out_or_removed() -> None:
    for state in (S.DENIED, S.UNANSWERED, S.REMOVED):
        book = book_with(state)
        assert book.decide(ROOM, BOB, E.ADMIT, 1.0)
        assert state_at(book, 1.0) is S.ACCEPTED


def test_admitting_in_the_moment_of_expiry_admits_nobody_who_is_gone() -> None:
    assert book_with(S.WAITING).decide(ROOM, BOB, E.ADMIT, 2.9)
    assert not book_with(S.WAITING).decide(ROOM, BOB, E.ADMIT, 3.0)


def test_admitting_in_the_moment_of_the_time_out_still_admits() -> None:
    book = book_with(S.WAITING)
    entry = book.find(ROOM, BOB, 0.0)
    assert entry is not None
    entry.held = 1
    assert book.decide(ROOM, BOB, E.ADMIT, 600.0)
    assert [change.event for change in book.take_changes()] == [E.TIME_OUT, E.ADMIT]
    assert state_at(book, 600.0) is S.ACCEPTED


def test_a_held_request_keeps_the_entry_until_the_longest_wait() -> None:
    book = book_with(S.WAITING)
    entry = book.find(ROOM, BOB, 0.0)
    assert entry is not None
    entry.held = 1
    assert state_at(book, 599.0) is S.WAITING
    assert state_at(book, 600.0) is S.UNANSWERED


def test_asking_again_does_not_extend_the_longest_wait() -> None:
    book = book_with(S.WAITING)
    now = 0.0
    while now < 599.0:
        book.ask(ROOM, BOB, "id", now)
        now += 2.0
    assert state_at(book, 600.0) is S.UNANSWERED


def test_the_end_of_the_call_clears_only_who_was_accepted() -> None:
    for state in LobbyState:
        book = book_with(state)
        book.apply_to_room(ROOM, E.CALL_ENDED, 1.0)
        assert state_at(book, 1.0) is (None if state is S.ACCEPTED else state)


def test_nothing_but_a_moderator_or_time_ends_a_removal() -> None:
    book = book_with(S.REMOVED)
    for event in set(LobbyEvent) - {E.ADMIT, E.EXPIRE, E.REMOVE}:
        assert not book.apply(ROOM, BOB, event, 1.0)
    assert not book.let_in(ROOM, BOB, "id", 1.0)


def test_a_room_has_so_many_people_waiting_and_no_more() -> None:
    book = LobbyBook(600.0)
    for n in range(WAITING_PER_ROOM):
        assert isinstance(book.ask(ROOM, f"@{n}:example.org", "id", 0.0), LobbyEntry)
    assert book.ask(ROOM, BOB, "id", 0.0) is Refusal.LOBBY_FULL
    assert isinstance(book.ask("!other:example.org", BOB, "id", 0.0), LobbyEntry)
    assert isinstance(book.ask(ROOM, "@1:example.org", "id", 0.0), LobbyEntry)
    book.decide(ROOM, "@1:example.org", E.ADMIT, 0.0)
    assert isinstance(book.ask(ROOM, BOB, "id", 0.0), LobbyEntry)


def test_all_rooms_have_so_many_people_waiting_and_no_more() -> None:
    book = LobbyBook(600.0)
    for n in range(WAITING_IN_ALL):
        assert isinstance(book.ask(f"!{n // 50}:example.org", f"@{n}:example.org", "id", 0.0), LobbyEntry)
    assert book.ask(ROOM, BOB, "id", 0.0) is Refusal.LOBBY_FULL
    book.pass_time(3.0)
    assert book.waiting_in_all == 0
    assert isinstance(book.ask(ROOM, BOB, "id", 3.0), LobbyEntry)


def test_one_person_holds_so_many_requests_and_no_more() -> None:
    book = book_with(S.WAITING)
    entry = book.find(ROOM, BOB, 0.0)
    assert entry is not None
    entry.held = HELD_PER_USER
    assert book.ask(ROOM, BOB, "id", 0.0) is Refusal.LOBBY_FULL


STEPS = st.lists(
    st.tuples(st.sampled_from([*LobbyEvent, None]), st.sampled_from([BOB, "@eve:example.org"]), st.floats(0, 700)),
    max_size=30,
)


@given(STEPS)
def test_the_count_of_people_waiting_is_always_right(steps: list[tuple[LobbyEvent | None, str, float]]) -> None:
    book, now = LobbyBook(600.0), 0.0
    for event, user, pause in steps:
        now += pause
        if event is None:
            book.pass_time(now)
        elif event is E.ASK:
            book.ask(ROOM, user, "id", now)
        elif event is E.LET_IN:
            book.let_in(ROOM, user, "id", now)
        elif event is E.REMOVE:
            book.remove(ROOM, user, "id", now)
        else:
            book.apply(ROOM, user, event, now)
        waiting = [entry for _, entry in book.entries() if entry.state is S.WAITING]
        assert book.waiting_in_all == len(waiting)
        assert bool(book.rooms_with(S.WAITING)) == bool(waiting)


def test_a_user_has_the_same_colour_in_every_process() -> None:
    assert colour_of("@alice:example.org") == "hsl(151, 66%, 36%)"
    assert colour_of("@bob:example.org") != colour_of("@alice:example.org")
