# SPDX-License-Identifier: Apache-2.0
"""The bounds of the lobby book: in all, for each room, and for each user's held requests."""

from __future__ import annotations

from itertools import count

import pytest

from lotusguard.rules import lobby_book
from lotusguard.rules.lobby import TABLE, LobbyEntry, LobbyEvent, LobbyState
from lotusguard.rules.lobby_book import HELD_PER_USER, WAITING_PER_ROOM, LobbyBook

ROOM = "!room:x"
LONGEST_WAIT = 600.0
_ids = count(1)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> LobbyBook:
    """A book with room for three entries."""
    monkeypatch.setattr(lobby_book, "ENTRIES_KEPT", 3)
    monkeypatch.setattr(lobby_book, "DROPPED_AT_ONCE", 1)
    return LobbyBook(LONGEST_WAIT)


def entry(user: str, state: LobbyState = LobbyState.ACCEPTED, expires: float = 100.0) -> LobbyEntry:
    return LobbyEntry(f"id{next(_ids)}", user, state, 0.0, expires)


def happen(book: LobbyBook, event: LobbyEvent, user: str, now: float = 0.0, room_id: str = ROOM) -> bool:
    """:return: whether the event had an effect."""
    return book.happen(event, room_id, user, f"id{next(_ids)}", now).applied


def ask(book: LobbyBook, user: str, room_id: str = ROOM, now: float = 0.0) -> LobbyEntry | None:
    """A user asks for entry. :return: the user's entry; ``None`` if too many wait."""
    answer = book.happen(LobbyEvent.ASK, room_id, user, "id", now, local=True)
    return None if answer.full else answer.entry


def users(book: LobbyBook) -> list[str]:
    return sorted(entry.user for _, entry in book.entries())


def test_entries_of_an_earlier_run_are_restored_up_to_the_limit(small: LobbyBook) -> None:
    for user in "abcd":
        small.restore(f"!{user}", entry(user))
    assert users(small) == ["a", "b", "c"]
    assert happen(small, LobbyEvent.REMOVE, "a", room_id="!a")
    assert happen(small, LobbyEvent.LEAVE, "b", room_id="!b")
    small.restore("!e", entry("e"))
    small.restore("!f", entry("f"))
    assert users(small) == ["a", "c", "e"]


def test_beyond_the_limit_the_entry_that_expires_first_is_dropped_unless_it_waits(small: LobbyBook) -> None:
    small.restore(ROOM, entry("late", expires=200.0))
    small.restore(ROOM, entry("waiting", LobbyState.WAITING, expires=3.0))
    small.restore(ROOM, entry("early", expires=100.0))
    happen(small, LobbyEvent.LET_IN, "new", 1.0)
    assert users(small) == ["late", "new", "waiting"]
    dropped = [change for change in small.take_changes() if change.after is None]
    assert [(change.entry.user, change.event) for change in dropped] == [("early", LobbyEvent.EXPIRE)]
    happen(small, LobbyEvent.LET_IN, "newer", 2.0)
    assert users(small) == ["new", "newer", "waiting"]


def test_a_book_at_its_limit_has_room_after_an_entry_ended(small: LobbyBook) -> None:
    for user in "abc":
        happen(small, LobbyEvent.LET_IN, user)
    assert happen(small, LobbyEvent.LEAVE, "a", 1.0)
    happen(small, LobbyEvent.LET_IN, "d", 1.0)
    assert users(small) == ["b", "c", "d"]


def test_as_many_wait_in_a_room_as_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    book = LobbyBook(LONGEST_WAIT)
    for number in range(WAITING_PER_ROOM):
        assert ask(book, f"u{number}") is not None
    assert ask(book, "one-more") is None
    assert ask(book, "one-more", "!other") is not None
    assert book.waiting_in_all == WAITING_PER_ROOM + 1
    monkeypatch.setattr(lobby_book, "WAITING_IN_ALL", WAITING_PER_ROOM + 1)
    assert ask(book, "one-more", "!third") is None
    happen(book, LobbyEvent.LEAVE, "u0")
    assert ask(book, "one-more") is not None


@pytest.mark.parametrize(("held", "full"), [(HELD_PER_USER - 1, False), (HELD_PER_USER, True)])
def test_as_many_requests_of_one_user_are_held_as_are_allowed(held: int, full: bool) -> None:
    book = LobbyBook(LONGEST_WAIT)
    asked = ask(book, "a")
    assert asked is not None
    asked.held = held
    assert (ask(book, "a") is None) is full


@pytest.mark.parametrize("state", LobbyState)
def test_an_entry_ends_when_its_time_is_over_and_not_before(state: LobbyState) -> None:
    book = LobbyBook(LONGEST_WAIT)
    book.restore(ROOM, entry("a", state, expires=TABLE[state].lifetime))
    assert book.find(ROOM, "a", TABLE[state].lifetime - 0.1) is not None
    assert book.find(ROOM, "a", TABLE[state].lifetime) is None
    assert book.waiting_in_all == 0


@pytest.mark.parametrize(
    ("waited", "state"), [(LONGEST_WAIT - 0.1, LobbyState.WAITING), (LONGEST_WAIT, LobbyState.UNANSWERED)]
)
def test_a_held_request_waits_as_long_as_is_allowed(waited: float, state: LobbyState) -> None:
    book = LobbyBook(LONGEST_WAIT)
    asked = ask(book, "a", now=50.0)
    assert asked is not None
    asked.held = 1
    found = book.find(ROOM, "a", 50.0 + waited)
    assert found is not None
    assert found.state is state
    assert book.waiting_in(ROOM) == (["a"] if state is LobbyState.WAITING else [])


def test_a_decision_keeps_the_beginning_of_a_state_that_stays() -> None:
    book = LobbyBook(LONGEST_WAIT)
    for now in (0.0, 1.0, 2.0):
        ask(book, "a", now=now)
    waiting = book.find(ROOM, "a", 2.0)
    assert waiting is not None
    assert (waiting.began, waiting.expires) == (0.0, 2.0 + TABLE[LobbyState.WAITING].lifetime)
    assert happen(book, LobbyEvent.ADMIT, "a", 3.0)
    assert (waiting.began, waiting.expires) == (3.0, 3.0 + TABLE[LobbyState.ACCEPTED].lifetime)
    assert not happen(book, LobbyEvent.ADMIT, "nobody", 3.0)


def test_removing_somebody_again_is_told_again_and_letting_in_twice_is_not() -> None:
    book = LobbyBook(LONGEST_WAIT)
    for _ in range(2):
        assert happen(book, LobbyEvent.LET_IN, "a")
    assert len(book.take_changes()) == 1
    for _ in range(2):
        assert happen(book, LobbyEvent.REMOVE, "a")
    assert len(book.take_changes()) == 2
    assert book.has_removed(ROOM)
    assert not book.has_removed("!other")
    assert book.rooms_with(LobbyState.REMOVED) == [ROOM]
    assert book.rooms_with(LobbyState.ACCEPTED) == []
    assert not happen(book, LobbyEvent.LET_IN, "a")


def test_what_happens_to_a_room_happens_to_all_its_entries_and_to_no_others() -> None:
    book = LobbyBook(LONGEST_WAIT)
    for room_id, user in ((ROOM, "a"), (ROOM, "b"), ("!other", "c")):
        happen(book, LobbyEvent.LET_IN, user, room_id=room_id)
    book.happen_in_room(LobbyEvent.CALL_ENDED, ROOM, 1.0)
    assert users(book) == ["c"]
    book.pass_time(TABLE[LobbyState.ACCEPTED].lifetime)
    assert users(book) == []
