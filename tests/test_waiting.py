# SPDX-License-Identifier: Apache-2.0
"""Waiting gather and only so long; policies believed and remembered; breakers. All on a clock that is turned."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred, TimeoutError
from twisted.internet.task import Clock

from lotusguard.clients.circuit_breaker import FAILURES_TO_OPEN, CircuitBreaker
from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.waiting import Budget, SharedLookups, gather
from lotusguard.guard.rooms.policies import Freshness, Known, Policies
from lotusguard.metrics import Metrics
from lotusguard.rules.policy import NO_POLICY, Policy


def outcome(waiting: Deferred[Any]) -> Any:
    """What a Deferred has come to: its result, its exception, or nothing yet."""
    waiting.addErrback(lambda failure: failure.value)
    return waiting.result if waiting.called else None


class Source:
    """Calls that end when the test says so."""

    def __init__(self) -> None:
        self.calls: list[Deferred[Any]] = []

    async def call(self, key: str) -> Any:
        waiting: Deferred[Any] = Deferred()
        self.calls.append(waiting)
        return await waiting


def test_one_call_serves_all_who_wait() -> None:
    source = Source()
    shared = SharedLookups(source.call)
    first, second = shared.get("a"), shared.get("a")
    shared.get("b")
    assert len(source.calls) == 2
    source.calls[0].callback(5)
    assert (outcome(first), outcome(second)) == (5, 5)
    shared.get("a")
    assert len(source.calls) == 3


def test_a_failure_is_everybodys() -> None:
    source = Source()
    shared = SharedLookups(source.call)
    waiters = [shared.get("a") for _ in range(2)]
    source.calls[0].errback(ValueError("x"))
    assert [type(outcome(waiter)) for waiter in waiters] == [ValueError, ValueError]


def test_who_gives_up_leaves_the_call_to_the_others() -> None:
    source = Source()
    shared = SharedLookups(source.call)
    first, second = shared.get("a"), shared.get("a")
    first.cancel()
    assert isinstance(outcome(first), CancelledError)
    source.calls[0].callback(5)
    assert outcome(second) == 5


def test_what_is_forgotten_is_asked_for_anew_while_the_old_call_still_runs() -> None:
    source = Source()
    shared = SharedLookups(source.call)
    old = shared.get("a")
    shared.forget("a")
    new = shared.get("a")
    source.calls[1].callback("new")
    source.calls[0].callback("old")
    assert (outcome(old), outcome(new)) == ("old", "new")


def test_a_budget_is_for_all_waits_together_and_only_for_waiting() -> None:
    clock = Clock()
    budget = Budget(clock, 1.5)
    first: Deferred[int] = Deferred()
    waited = budget.wait(first)
    clock.advance(1.0)
    first.callback(1)
    assert outcome(waited) == 1
    clock.advance(60)  # what is done meanwhile does not count
    second: Deferred[int] = budget.wait(Deferred())
    clock.advance(0.4)
    assert outcome(second) is None
    clock.advance(0.2)
    assert isinstance(outcome(second), TimeoutError)
    done: Deferred[int] = Deferred()
    done.callback(7)
    assert outcome(budget.wait(done)) == 7
    third: Deferred[int] = budget.wait(Deferred())
    clock.advance(0)
    assert isinstance(outcome(third), TimeoutError)


def test_of_several_questions_the_first_that_fails_makes_all_fail() -> None:
    source = Source()
    asked = Deferred.fromCoroutine(gather([source.call("a"), source.call("b")]))
    source.calls[1].errback(ValueError("x"))
    assert isinstance(outcome(asked), ValueError)


def test_a_breaker_opens_after_five_failures_in_a_row_and_closes_on_one_success() -> None:
    breaker = CircuitBreaker()
    for _ in range(FAILURES_TO_OPEN - 1):
        assert not breaker.failed()
    breaker.succeeded()
    for _ in range(FAILURES_TO_OPEN - 1):
        assert not breaker.failed()
    assert not breaker.open
    assert breaker.failed()
    assert breaker.open
    assert not breaker.failed()
    assert breaker.succeeded()
    assert not breaker.open


class Rooms:
    """A homeserver whose answers the test gives."""

    def __init__(self) -> None:
        self.asked: list[Deferred[dict[str, Any]]] = []

    async def policy_events(self, room_id: str) -> dict[str, Any]:
        waiting: Deferred[dict[str, Any]] = Deferred()
        self.asked.append(waiting)
        return await waiting

    def answer(self, limit: int | None) -> None:
        self.asked[-1].callback({} if limit is None else {"io.lotus.voice_limit": {"max_users": limit}})

    def fail(self) -> None:
        self.asked[-1].errback(DependencyFailed("synapse", "timeout"))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rooms() -> Rooms:
    return Rooms()


@pytest.fixture
def policies(clock: Clock, rooms: Rooms) -> Policies:
    homeserver: Any = rooms
    return Policies(homeserver, clock, Metrics(), ttl=10, stale=3600)


def get(policies: Policies, clock: Clock) -> Deferred[Known]:
    return Deferred.fromCoroutine(policies.get("!r", Budget(clock, 1.5)))


def test_a_policy_is_believed_for_its_ttl(policies: Policies, rooms: Rooms, clock: Clock) -> None:
    first = get(policies, clock)
    rooms.answer(5)
    assert outcome(first) == Known(Policy(5), Freshness.FRESH)
    clock.advance(9.9)
    assert outcome(get(policies, clock)) == Known(Policy(5), Freshness.FRESH)
    assert len(rooms.asked) == 1
    clock.advance(0.2)
    get(policies, clock)
    assert len(rooms.asked) == 2


def test_a_policy_is_as_old_as_the_question_and_not_as_the_answer(
    policies: Policies, rooms: Rooms, clock: Clock
) -> None:
    get(policies, clock)
    clock.advance(1.4)
    rooms.answer(5)
    clock.advance(8.7)
    assert policies.believed("!r") is None


def test_the_last_known_policy_serves_for_a_while(policies: Policies, rooms: Rooms, clock: Clock) -> None:
    get(policies, clock)
    rooms.answer(5)
    clock.advance(11)
    stale = get(policies, clock)
    rooms.fail()
    assert outcome(stale) == Known(Policy(5), Freshness.STALE, "timeout")
    clock.advance(3600)
    unknown = get(policies, clock)
    rooms.fail()
    assert outcome(unknown) == Known(NO_POLICY, Freshness.UNKNOWN, "timeout")


def test_a_failure_is_remembered_briefly(policies: Policies, rooms: Rooms, clock: Clock) -> None:
    get(policies, clock)
    rooms.fail()
    assert outcome(get(policies, clock)) == Known(NO_POLICY, Freshness.UNKNOWN, "timeout")
    assert len(rooms.asked) == 1
    clock.advance(1.1)
    get(policies, clock)
    assert len(rooms.asked) == 2


def test_nobody_waits_longer_than_their_budget_and_the_answer_still_helps_the_next(
    policies: Policies, rooms: Rooms, clock: Clock
) -> None:
    waiting = get(policies, clock)
    clock.advance(1.6)
    assert outcome(waiting) == Known(NO_POLICY, Freshness.UNKNOWN, "timeout")
    rooms.answer(5)
    assert outcome(get(policies, clock)) == Known(Policy(5), Freshness.FRESH)


def test_an_answer_that_was_under_way_when_the_policy_changed_is_not_believed(
    policies: Policies, rooms: Rooms, clock: Clock
) -> None:
    get(policies, clock)
    old = rooms.asked[0]
    policies.drop("!r")
    new = get(policies, clock)
    rooms.answer(2)
    old.callback({"io.lotus.voice_limit": {"max_users": 9}})
    assert outcome(new) == Known(Policy(2), Freshness.FRESH)
    assert outcome(get(policies, clock)) == Known(Policy(2), Freshness.FRESH)


def test_a_changed_policy_still_serves_as_long_as_any_when_the_homeserver_is_away(rooms: Rooms, clock: Clock) -> None:
    homeserver: Any = rooms
    policies = Policies(homeserver, clock, Metrics(), ttl=3600, stale=3600)
    get(policies, clock)
    rooms.answer(5)
    policies.drop("!r")
    policies.drop("!r")
    stale = get(policies, clock)
    rooms.fail()
    assert outcome(stale) == Known(Policy(5), Freshness.STALE, "timeout")


@pytest.mark.parametrize("room_id", ["!" + "a" * 300, "!room\x00:x", "!room\n:x"])
def test_what_no_room_can_be_called_is_not_asked_for(
    policies: Policies, rooms: Rooms, clock: Clock, room_id: str
) -> None:
    asked = Deferred.fromCoroutine(policies.get(room_id, Budget(clock, 1.5)))
    assert outcome(asked) == Known(NO_POLICY, Freshness.FRESH)
    assert not rooms.asked
