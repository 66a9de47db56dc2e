# SPDX-License-Identifier: Apache-2.0
"""Deadlines, several calls at once, and the circuit breaker. All on a `Clock`."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred, TimeoutError, succeed
from twisted.internet.task import Clock

from lotusguard.clients.circuit_breaker import FAILURES_TO_OPEN, CircuitBreaker
from lotusguard.clients.waiting import Deadline, gather


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


def test_earlier_deadline_never_exceeds_the_original() -> None:
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
