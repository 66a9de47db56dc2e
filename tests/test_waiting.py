# SPDX-License-Identifier: Apache-2.0
"""Deadlines, several calls at once, the circuit breaker, and how long a policy is used. All on a `Clock`."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.defer import Deferred, TimeoutError, succeed
from twisted.internet.task import Clock

from lotusguard.clients.circuit_breaker import FAILURES_TO_OPEN, CircuitBreaker
from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.waiting import Budget, Deadline, gather
from lotusguard.guard.rooms.policies import Freshness, Known, Policies
from lotusguard.metrics import Metrics
from lotusguard.rules.policy import NO_POLICY, Policy


def outcome(waiting: Deferred[Any]) -> Any:
    """The result or the exception of a Deferred; None while there is neither."""
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


def test_a_deadline_bounds_every_wait_and_work_in_between_counts_too() -> None:
    clock = Clock()
    deadline = Deadline.after(clock, 1.5)
    first: Deferred[int] = Deferred()
    waited = deadline.wait(first)
    clock.advance(1.0)
    first.callback(1)
    assert outcome(waited) == 1
    assert deadline.left() == 0.5
    second: Deferred[int] = deadline.wait(Deferred())
    clock.advance(0.4)
    assert outcome(second) is None
    clock.advance(0.2)
    assert isinstance(outcome(second), TimeoutError)
    assert deadline.passed
    assert deadline.left() == 0
    third: Deferred[int] = deadline.wait(Deferred())
    clock.advance(0)
    assert isinstance(outcome(third), TimeoutError)


def test_a_result_that_is_there_already_is_returned_even_after_the_deadline() -> None:
    clock = Clock()
    deadline = Deadline.after(clock, 1)
    clock.advance(2)
    assert outcome(deadline.wait(succeed(7))) == 7


def test_a_sooner_deadline_is_never_later_than_the_whole_one() -> None:
    clock = Clock()
    deadline = Deadline.after(clock, 1.5)
    assert deadline.sooner(0.5).at == 0.5
    assert deadline.sooner(5).at == 1.5


def test_a_wait_is_cancelled_at_the_deadline() -> None:
    clock = Clock()
    cancelled: list[Any] = []
    waited: Deferred[int] = Deadline.after(clock, 1).wait(Deferred(cancelled.append))
    clock.advance(1)
    assert isinstance(outcome(waited), TimeoutError)
    assert len(cancelled) == 1


def test_the_first_failure_of_several_calls_is_raised_and_cancels_the_others() -> None:
    source = Source()
    waiting = Deferred.fromCoroutine(gather([source.call("a"), source.call("b")]))
    source.calls[1].errback(ValueError("x"))
    assert isinstance(outcome(waiting), ValueError)
    assert source.calls[0].called


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
    """A homeserver that answers when the test says so."""

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


def test_a_policy_is_fresh_for_its_ttl(policies: Policies, rooms: Rooms, clock: Clock) -> None:
    first = get(policies, clock)
    rooms.answer(5)
    assert outcome(first) == Known(Policy(5), Freshness.FRESH)
    clock.advance(9.9)
    assert outcome(get(policies, clock)) == Known(Policy(5), Freshness.FRESH)
    assert len(rooms.asked) == 1
    clock.advance(0.2)
    get(policies, clock)
    assert len(rooms.asked) == 2


def test_the_age_of_a_policy_counts_from_the_request(policies: Policies, rooms: Rooms, clock: Clock) -> None:
    get(policies, clock)
    clock.advance(1.4)
    rooms.answer(5)
    clock.advance(8.7)
    assert policies.believed("!r") is None


def test_the_last_known_policy_is_used_for_a_limited_time(policies: Policies, rooms: Rooms, clock: Clock) -> None:
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


def test_a_lookup_that_nobody_awaits_any_more_is_cancelled(policies: Policies, rooms: Rooms, clock: Clock) -> None:
    waiting = get(policies, clock)
    clock.advance(1.6)
    assert outcome(waiting) == Known(NO_POLICY, Freshness.UNKNOWN, "timeout")
    assert rooms.asked[0].called
    clock.advance(1.1)
    again = get(policies, clock)
    rooms.answer(5)
    assert outcome(again) == Known(Policy(5), Freshness.FRESH)


def test_an_answer_to_a_request_from_before_the_change_is_not_used(
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


def test_a_dropped_policy_is_still_the_last_known_one_while_the_homeserver_is_down(rooms: Rooms, clock: Clock) -> None:
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
def test_a_name_that_no_room_can_have_is_not_looked_up(
    policies: Policies, rooms: Rooms, clock: Clock, room_id: str
) -> None:
    asked = Deferred.fromCoroutine(policies.get(room_id, Budget(clock, 1.5)))
    assert outcome(asked) == Known(NO_POLICY, Freshness.FRESH)
    assert not rooms.asked
