# SPDX-License-Identifier: Apache-2.0
"""The states of a lobby entry: the table, and races between decisions, time and the user's own requests.

The same tests are for the rules in memory and for the rules in Valkey.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lotusguard.guard.lobby.colours import colour_of
from lotusguard.rules import lobby_book
from lotusguard.rules.lobby import BEGINS, DROPPED_FIRST, TABLE, LobbyEvent, LobbyState
from lotusguard.rules.lobby_book import HELD_PER_USER, WAITING_PER_USER, LobbyBook
from tests.redis.lobbies import AnyBook, MemoryBook, ValkeyBook

ROOM, OTHER_ROOM, BOB, EVE = "!room:example.org", "!other:example.org", "@bob:example.org", "@eve:example.org"
S, E = LobbyState, LobbyEvent
LONGEST_WAIT = 600.0
WAY_TO = {
    S.WAITING: [E.ASK], S.ACCEPTED: [E.LET_IN], S.DENIED: [E.ASK, E.DENY], S.UNANSWERED: [E.ASK, E.TIME_OUT],
    S.REMOVED: [E.REMOVE],
}  # fmt: skip
"""The events that bring an entry into a state."""

NewBook = Callable[[], AnyBook]


@pytest.fixture(params=[MemoryBook, ValkeyBook], ids=["memory", "valkey"])
def new_book(request: pytest.FixtureRequest) -> NewBook:
    def new() -> AnyBook:
        book: AnyBook = request.param(LONGEST_WAIT)
        return book

    return new


def in_state(book: AnyBook, state: LobbyState, user: str = BOB, now: float = 0.0) -> AnyBook:
    """The book with an entry in this state."""
    for event in WAY_TO[state]:
        assert book.happen(event, ROOM, user, "id", now).applied
    return book


def state_at(book: AnyBook, now: float, user: str = BOB) -> LobbyState | None:
    entry = book.find(ROOM, user, now)
    return entry.state if entry is not None else None


def hold(book: AnyBook, until: float) -> None:
    """A guard holds a request of Bob's from the beginning."""
    now = 0.0
    while now < until:
        book.hold(ROOM, BOB, now)
        now += 20.0


def test_the_table_has_every_state() -> None:
    assert set(TABLE) == set(LobbyState) == set(WAY_TO)
    assert all(E.EXPIRE in rules.moves for rules in TABLE.values())
    assert set(DROPPED_FIRST) == set(LobbyState) - {S.WAITING}


@pytest.mark.parametrize(
    ("state", "seconds"), [(S.WAITING, 3), (S.ACCEPTED, 21600), (S.DENIED, 5), (S.UNANSWERED, 60), (S.REMOVED, 600)]
)
def test_each_state_lasts_as_long_as_it_should(new_book: NewBook, state: LobbyState, seconds: float) -> None:
    assert state_at(in_state(new_book(), state), seconds - 0.1) is state
    assert state_at(in_state(new_book(), state), seconds) is None


@pytest.mark.parametrize("state", list(LobbyState))
@pytest.mark.parametrize("event", [event for event in LobbyEvent if event is not E.EXPIRE])
def test_an_event_moves_an_entry_as_the_table_says(new_book: NewBook, state: LobbyState, event: LobbyEvent) -> None:
    book = in_state(new_book(), state)
    answer = book.happen(event, ROOM, BOB, "other", 1.0)
    moves = TABLE[state].moves
    assert answer.applied is (event in moves)
    assert state_at(book, 1.0) is moves.get(event, state)


@pytest.mark.parametrize("event", list(LobbyEvent))
def test_only_some_events_begin_an_entry(new_book: NewBook, event: LobbyEvent) -> None:
    book = new_book()
    answer = book.happen(event, ROOM, BOB, "id", 0.0)
    assert answer.applied is (event in BEGINS)
    assert state_at(book, 0.0) is BEGINS.get(event)


@pytest.mark.parametrize("state", [S.ACCEPTED, S.DENIED, S.UNANSWERED, S.REMOVED])
def test_asking_never_overwrites_a_decision(new_book: NewBook, state: LobbyState) -> None:
    entry = in_state(new_book(), state).happen(E.ASK, ROOM, BOB, "other", 1.0).entry
    assert entry is not None
    assert (entry.id, entry.state) == ("id", state)
    assert entry.expires == TABLE[state].lifetime


@pytest.mark.parametrize(("first", "second"), [(E.ADMIT, E.DENY), (E.DENY, E.DENY)])
def test_of_two_moderators_the_first_decides(new_book: NewBook, first: LobbyEvent, second: LobbyEvent) -> None:
    book = in_state(new_book(), S.WAITING)
    assert book.happen(first, ROOM, BOB, "", 1.0).applied
    assert not book.happen(second, ROOM, BOB, "", 1.0).applied
    assert state_at(book, 1.0) is TABLE[S.WAITING].moves[first]


def test_admitting_in_the_moment_of_expiry_admits_nobody_who_is_gone(new_book: NewBook) -> None:
    assert in_state(new_book(), S.WAITING).happen(E.ADMIT, ROOM, BOB, "", 2.9).applied
    assert not in_state(new_book(), S.WAITING).happen(E.ADMIT, ROOM, BOB, "", 3.0).applied


def test_admitting_in_the_moment_of_the_time_out_still_admits(new_book: NewBook) -> None:
    book = in_state(new_book(), S.WAITING)
    hold(book, 600.0)
    assert book.happen(E.ADMIT, ROOM, BOB, "", 600.0).applied
    assert book.events[-2:] == ["time_out", "admit"]
    assert state_at(book, 600.0) is S.ACCEPTED


def test_a_time_out_in_the_moment_of_a_decision_changes_nothing(new_book: NewBook) -> None:
    book = in_state(new_book(), S.WAITING)
    hold(book, 599.0)
    book.happen(E.ADMIT, ROOM, BOB, "", 599.9)
    answer = book.happen(E.TIME_OUT, ROOM, BOB, "", 600.0)
    assert answer.entry is not None
    assert (answer.applied, answer.entry.state) == (False, S.ACCEPTED)


def test_a_held_request_keeps_the_entry_until_the_longest_wait(new_book: NewBook) -> None:
    book = in_state(new_book(), S.WAITING)
    hold(book, 600.0)
    assert state_at(book, 599.0) is S.WAITING
    assert state_at(book, 600.0) is S.UNANSWERED


def test_asking_again_does_not_extend_the_longest_wait(new_book: NewBook) -> None:
    book = in_state(new_book(), S.WAITING)
    now = 0.0
    while now < 599.0:
        book.happen(E.ASK, ROOM, BOB, "other", now)
        now += 2.0
    assert state_at(book, 600.0) is S.UNANSWERED


def test_the_end_of_the_call_clears_only_who_was_accepted(new_book: NewBook) -> None:
    for state in LobbyState:
        book = in_state(new_book(), state)
        book.happen_in_room(E.CALL_ENDED, ROOM, 1.0)
        assert state_at(book, 1.0) is (None if state is S.ACCEPTED else state)


def test_nothing_but_a_moderator_or_time_ends_a_removal(new_book: NewBook) -> None:
    book = in_state(new_book(), S.REMOVED)
    for event in set(LobbyEvent) - {E.ADMIT, E.EXPIRE, E.REMOVE}:
        assert not book.happen(event, ROOM, BOB, "id", 1.0).applied


def test_a_room_has_so_many_people_waiting_and_no_more(new_book: NewBook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lobby_book, "WAITING_PER_ROOM", 3)
    book = new_book()
    for n in range(3):
        assert book.happen(E.ASK, ROOM, f"@{n}:example.org", "id", 0.0).applied
    assert book.happen(E.ASK, ROOM, BOB, "id", 0.0).full
    assert book.happen(E.ASK, OTHER_ROOM, BOB, "id", 0.0).applied
    assert book.happen(E.ASK, ROOM, "@1:example.org", "id", 0.0).applied
    book.happen(E.ADMIT, ROOM, "@1:example.org", "", 0.0)
    assert book.happen(E.ASK, ROOM, BOB, "id", 0.0).applied


def test_all_rooms_have_so_many_people_waiting_and_no_more(new_book: NewBook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lobby_book, "WAITING_IN_ALL", 30)
    book = new_book()
    for n in range(30):
        assert book.happen(E.ASK, f"!{n // 5}:example.org", f"@{n}:example.org", "id", 0.0, local=True).applied
    assert book.happen(E.ASK, ROOM, BOB, "id", 0.0, local=True).full
    book.pass_time(3.0)
    assert book.waiting_in_all == 0
    assert book.happen(E.ASK, ROOM, BOB, "id", 3.0, local=True).applied


def test_one_user_waits_in_so_many_rooms_and_no_more(new_book: NewBook) -> None:
    book = new_book()
    for n in range(WAITING_PER_USER):
        assert book.happen(E.ASK, f"!{n}:example.org", EVE, "id", 0.0, local=True).applied
    assert book.happen(E.ASK, ROOM, EVE, "id", 0.0, local=True).full
    assert book.happen(E.ASK, "!0:example.org", EVE, "id", 0.0, local=True).applied
    assert book.happen(E.ASK, ROOM, BOB, "id", 0.0, local=True).applied
    book.happen(E.LEAVE, "!0:example.org", EVE, "", 0.0)
    assert book.happen(E.ASK, ROOM, EVE, "id", 0.0, local=True).applied


def fill(book: AnyBook, server: str, *, local: bool = False) -> int:
    """As many users of a homeserver wait as may. :return: how many."""
    for n in range(1000):
        if book.happen(E.ASK, f"!{n // 10}:{server}", f"@{n}:{server}", "id", 0.0, local=local).full:
            return n
    raise AssertionError("no bound")


def test_no_other_homeserver_takes_all_places_of_all_lobbies(
    new_book: NewBook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lobby_book, "WAITING_IN_ALL", 80)
    monkeypatch.setattr(lobby_book, "WAITING_FOR_OTHER_SERVERS", 40)
    book = new_book()
    assert [fill(book, "hostile.example:8448"), fill(book, "b.example"), fill(book, "c.example")] == [20, 10, 5]
    assert fill(book, "hostile.example:8448") == 20
    assert fill(book, "ours.example", local=True) == 80 - 35
    assert book.happen(E.ASK, ROOM, "@new:d.example", "id", 0.0).full
    book.pass_time(3.0)
    assert fill(book, "d.example") == 20


def test_one_person_holds_so_many_requests_and_no_more() -> None:
    book = LobbyBook(LONGEST_WAIT)
    entry = book.happen(E.ASK, ROOM, BOB, "id", 0.0).entry
    assert entry is not None
    entry.held = HELD_PER_USER
    assert book.happen(E.ASK, ROOM, BOB, "id", 0.0).full


def test_of_too_many_entries_accepted_ones_are_dropped_before_removed_ones_and_waiting_ones_never(
    new_book: NewBook, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = {state: f"@{state.value}:example.org" for state in LobbyState}
    for kept in range(1, 6):
        monkeypatch.setattr(lobby_book, "ENTRIES_KEPT", 5)
        monkeypatch.setattr(lobby_book, "DROPPED_AT_ONCE", kept)
        book = new_book()
        for state, user in users.items():
            in_state(book, state, user)
        book.happen(E.LET_IN, OTHER_ROOM, EVE, "id", 1.0)
        left = [state for state, user in users.items() if state_at(book, 1.0, user) is not None]
        assert left == [S.WAITING, *[state for state in LobbyState if state in DROPPED_FIRST[kept:]]]


STEPS = st.lists(
    st.tuples(
        st.sampled_from([*LobbyEvent, None]), st.sampled_from([BOB, EVE]), st.sampled_from([0, 1, 2.5, 4, 70, 650])
    ),
    max_size=30,
)


@given(STEPS)
@settings(max_examples=40)
def test_the_rules_are_the_same_in_memory_and_in_valkey(steps: list[tuple[LobbyEvent | None, str, float]]) -> None:
    memory, valkey, now = MemoryBook(LONGEST_WAIT), ValkeyBook(LONGEST_WAIT), 0.0
    for event, user, pause in steps:
        now += pause
        if event is None:
            memory.pass_time(now)
            valkey.pass_time(now)
            assert all(entry.due(now, LONGEST_WAIT) is None for _, entry in memory.entries())
        else:
            answers = [book.happen(event, ROOM, user, "id", now) for book in (memory, valkey)]
            assert answers[0].applied == answers[1].applied
        for who in (BOB, EVE):
            entry, other = memory.find(ROOM, who, now), valkey.find(ROOM, who, now)
            assert (entry is None) == (other is None)
            if entry is not None and other is not None:
                assert (entry.id, entry.state, entry.began) == (other.id, other.state, other.began)
                assert entry.expires == pytest.approx(other.expires)
        waiting = [entry for _, entry in memory.entries() if entry.state is S.WAITING]
        assert memory.waiting_in_all == valkey.waiting_in_all == len(waiting)
        assert {id(entry) for _, entry in memory.waiting()} == {id(entry) for entry in waiting}
        assert bool(memory.rooms_with(S.WAITING)) == bool(waiting)


def test_a_user_has_the_same_colour_in_every_process() -> None:
    assert colour_of("@alice:example.org") == "hsl(151, 66%, 36%)"
    assert colour_of("@bob:example.org") != colour_of("@alice:example.org")
