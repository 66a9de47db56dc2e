# SPDX-License-Identifier: Apache-2.0
"""Shared lookups: one call in flight per key, cancelled when nobody waits, and never older than a caller wants."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock

from lotusguard.clients.lookups import Fetched, FreshLookups, SharedLookups


def outcome(waiting: Deferred[Any]) -> Any:
    """The result or the exception of a Deferred; None while there is neither."""
    waiting.addErrback(lambda failure: failure.value)
    return waiting.result if waiting.called else None


class Source:
    """Calls that end when the test says so."""

    def __init__(self) -> None:
        self.calls: list[Deferred[Any]] = []
        self.cancelled: list[int] = []

    async def call(self, key: str) -> Any:
        number = len(self.calls)
        waiting: Deferred[Any] = Deferred(lambda _: self.cancelled.append(number))
        self.calls.append(waiting)
        return await waiting


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_callers_who_want_the_same_key_share_one_call(source: Source) -> None:
    shared = SharedLookups(source.call)
    first, second = shared.get("a"), shared.get("a")
    shared.get("b")
    assert len(source.calls) == 2
    source.calls[0].callback(5)
    assert (outcome(first), outcome(second)) == (5, 5)
    shared.get("a")
    assert len(source.calls) == 3


def test_a_failure_reaches_every_caller(source: Source) -> None:
    shared = SharedLookups(source.call)
    waiters = [shared.get("a") for _ in range(2)]
    source.calls[0].errback(ValueError("x"))
    assert [type(outcome(waiter)) for waiter in waiters] == [ValueError, ValueError]


def test_a_caller_who_gives_up_leaves_the_call_to_the_others(source: Source) -> None:
    shared = SharedLookups(source.call)
    first, second = shared.get("a"), shared.get("a")
    first.cancel()
    assert isinstance(outcome(first), CancelledError)
    assert source.cancelled == []
    source.calls[0].callback(5)
    assert outcome(second) == 5


def test_a_call_is_cancelled_when_the_last_caller_gives_up(source: Source) -> None:
    shared = SharedLookups(source.call)
    waiters = [shared.get("a") for _ in range(2)]
    for waiter in waiters:
        waiter.cancel()
        outcome(waiter)
    assert source.cancelled == [0]
    assert "a" not in shared
    again = shared.get("a")
    source.calls[1].callback(6)
    assert outcome(again) == 6


def test_after_forget_a_new_call_starts_while_the_old_one_still_runs(source: Source) -> None:
    shared = SharedLookups(source.call)
    old = shared.get("a")
    shared.forget("a")
    new = shared.get("a")
    source.calls[1].callback("new")
    source.calls[0].callback("old")
    assert (outcome(old), outcome(new)) == ("old", "new")


def test_a_fresh_lookup_joins_the_call_that_began_late_enough(source: Source, clock: Clock) -> None:
    fresh = FreshLookups(source.call, clock)
    clock.advance(5)
    first = fresh.get("a", since=5)
    clock.advance(1)
    second = fresh.get("a", since=4.5)
    assert len(source.calls) == 1
    source.calls[0].callback("x")
    assert outcome(first) == outcome(second) == Fetched("x", 5)


def test_later_callers_share_the_one_call_that_follows(source: Source, clock: Clock) -> None:
    fresh = FreshLookups(source.call, clock)
    first = fresh.get("a", since=0)
    clock.advance(1)
    later = [fresh.get("a", since=at) for at in (0.5, 0.7, 1.0)]
    assert len(source.calls) == 1
    clock.advance(1)
    source.calls[0].callback("old")
    assert outcome(first) == Fetched("old", 0)
    assert [outcome(waiter) for waiter in later] == [None] * 3
    assert len(source.calls) == 2
    source.calls[1].callback("new")
    assert [outcome(waiter) for waiter in later] == [Fetched("new", 2)] * 3
    assert len(fresh) == 0


def test_the_following_call_starts_even_if_the_running_one_fails(source: Source, clock: Clock) -> None:
    fresh = FreshLookups(source.call, clock)
    first = fresh.get("a", since=0)
    clock.advance(1)
    second = fresh.get("a", since=1)
    source.calls[0].errback(ValueError("x"))
    assert isinstance(outcome(first), ValueError)
    source.calls[1].callback("new")
    assert outcome(second) == Fetched("new", 1)


def test_calls_for_one_key_keep_their_spacing_and_other_keys_do_not_wait(source: Source, clock: Clock) -> None:
    fresh = FreshLookups(source.call, clock, spacing=2)
    outcome(fresh.get("a", since=0))
    source.calls[0].callback("x")
    clock.advance(0.5)
    waiting = [fresh.get("a", since=0.5), fresh.get("a", since=0.5)]
    fresh.get("b", since=0.5)
    assert len(source.calls) == 2
    clock.advance(1.4)
    assert len(source.calls) == 2
    clock.advance(0.1)
    assert len(source.calls) == 3
    source.calls[2].callback("y")
    assert [outcome(waiter) for waiter in waiting] == [Fetched("y", 2)] * 2


def test_a_following_call_that_waits_for_its_spacing_is_given_up(source: Source, clock: Clock) -> None:
    fresh = FreshLookups(source.call, clock, spacing=2)
    outcome(fresh.get("a", since=0))
    source.calls[0].callback("x")
    clock.advance(1)
    waiter = fresh.get("a", since=1)
    waiter.cancel()
    assert isinstance(outcome(waiter), CancelledError)
    assert clock.getDelayedCalls() == []
    assert len(fresh) == 0


def test_a_running_fresh_call_is_cancelled_when_nobody_waits_and_the_following_one_starts(
    source: Source, clock: Clock
) -> None:
    fresh = FreshLookups(source.call, clock)
    first = fresh.get("a", since=0)
    clock.advance(1)
    second = fresh.get("a", since=1)
    first.cancel()
    assert isinstance(outcome(first), CancelledError)
    assert source.cancelled == [0]
    source.calls[1].callback("new")
    assert outcome(second) == Fetched("new", 1)


def test_a_call_that_ends_at_once_serves_its_caller(clock: Clock) -> None:
    async def at_once(key: str) -> str:
        return key

    fresh = FreshLookups(at_once, clock)
    assert outcome(fresh.get("a", since=0)) == Fetched("a", 0)
    assert len(fresh) == 0
