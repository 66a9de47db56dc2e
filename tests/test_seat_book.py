# SPDX-License-Identifier: Apache-2.0
"""The seat book's queue: who waits for a seat is told when there may be one, in turn, and nobody is forgotten."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from lotusguard.guard.seats.book import MemorySeatBook
from lotusguard.metrics import Metrics
from lotusguard.rules.seats import Claim

ROOM = "!room"


@pytest.fixture
def book() -> MemorySeatBook:
    return MemorySeatBook(None, Clock(), Metrics(), seat_ttl=30)


def now(work: Any) -> Any:
    """What comes out of something that does not have to wait."""
    return Deferred.fromCoroutine(work).result


def claim_of(book: MemorySeatBook, user: str | None) -> Claim:
    claim = now(book.take(ROOM, user, 1))
    assert isinstance(claim, Claim)
    return claim


def waiting(book: MemorySeatBook, user: str | None, *, again: bool = False) -> Deferred[None]:
    return Deferred.fromCoroutine(book.freed(ROOM, user, again=again))


def test_who_has_waited_longest_is_told_first_and_alone(book: MemorySeatBook) -> None:
    claim = claim_of(book, "a")
    first, second = waiting(book, "b"), waiting(book, "c")
    now(book.release(ROOM, claim))
    assert first.called
    assert not second.called


def test_who_was_told_for_nothing_waits_on_at_the_head(book: MemorySeatBook) -> None:
    claim = claim_of(book, "a")
    waiting(book, "b")
    second = waiting(book, "c")
    now(book.settle(ROOM, claim, "a", "alias", "a"))
    again = waiting(book, "b", again=True)
    now(book.release(ROOM, claim))
    assert again.called
    assert not second.called


def test_who_holds_a_seat_by_now_does_not_wait_for_their_turn(book: MemorySeatBook) -> None:
    claim = claim_of(book, None)
    first, holder = waiting(book, "b"), waiting(book, "a")
    now(book.settle(ROOM, claim, "a", "alias", "a"))
    assert first.called
    assert holder.called


def test_who_hung_up_is_passed_over(book: MemorySeatBook) -> None:
    claim = claim_of(book, "a")
    gone, second = waiting(book, "b"), waiting(book, "c")
    gone.addErrback(lambda failure: None)
    gone.cancel()
    now(book.release(ROOM, claim))
    assert second.called


def test_when_one_waited_in_vain_all_may_ask_again(book: MemorySeatBook) -> None:
    claim_of(book, "a")
    others = [waiting(book, user) for user in "bcd"]
    now(book.waited_in_vain(ROOM))
    assert all(other.called for other in others)


def test_other_rooms_are_not_told(book: MemorySeatBook) -> None:
    claim_of(book, "a")
    waiter = waiting(book, "b")
    other = now(book.take("!other", "a", 1))
    now(book.release("!other", other))
    assert not waiter.called


def test_who_waits_in_a_room_that_is_forgotten_for_another_may_ask_again(
    book: MemorySeatBook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lotusguard.guard.seats.book.ROOMS_KEPT", 1)
    claim_of(book, "a")
    waiter = waiting(book, "b")
    now(book.take("!other", "a", 1))
    assert waiter.called
