# SPDX-License-Identifier: Apache-2.0
"""Timeouts of calls to Redis when this process itself was busy or stopped."""

from __future__ import annotations

import pytest
from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.task import Clock

from lotusguard.clients.redis.patience import with_timeout


def test_an_answer_that_does_not_come_is_a_timeout() -> None:
    clock = Clock()
    outcome: Deferred[str] = with_timeout(Deferred(), 1.0, clock, lambda: 0.0)
    failed: list[object] = []
    outcome.addErrback(failed.append)
    clock.advance(0.9)
    assert not failed
    clock.advance(0.1)
    assert failed[0].check(TimeoutError)  # type: ignore[attr-defined]


def test_an_answer_that_arrived_while_the_process_was_stopped_is_read() -> None:
    clock = Clock()
    asked: Deferred[str] = Deferred()
    outcome = with_timeout(asked, 1.0, clock, lambda: 0.0)
    got: list[str] = []
    outcome.addCallback(got.append)
    clock.advance(30.0)
    asked.callback("answer")
    assert got == ["answer"]
    assert not clock.getDelayedCalls()


def test_a_process_that_stays_busy_gives_up_in_the_end() -> None:
    clock = Clock()
    outcome: Deferred[str] = with_timeout(Deferred(), 1.0, clock, lambda: 0.0)
    failed: list[object] = []
    outcome.addErrback(failed.append)
    for _ in range(100):
        clock.advance(5.0)
    assert failed
    assert not clock.getDelayedCalls()


def test_a_call_is_waited_for_while_others_are_answered() -> None:
    clock = Clock()
    heard = [0.0]
    asked: Deferred[str] = Deferred()
    outcome = with_timeout(asked, 1.0, clock, lambda: heard[0])
    failed: list[object] = []
    outcome.addErrback(failed.append)
    for _ in range(40):
        clock.advance(0.1)
        heard[0] = clock.seconds()
    assert not failed
    for _ in range(15):
        clock.advance(0.1)
        heard[0] = clock.seconds()
    assert failed, "five times the timeout is enough"


@pytest.mark.parametrize("value", ["answer", ""])
def test_an_answer_in_time_leaves_no_timer(value: str) -> None:
    clock = Clock()
    asked: Deferred[str] = Deferred()
    outcome = with_timeout(asked, 1.0, clock, lambda: 0.0)
    got: list[str] = []
    outcome.addCallback(got.append)
    asked.callback(value)
    assert got == [value]
    assert not clock.getDelayedCalls()
