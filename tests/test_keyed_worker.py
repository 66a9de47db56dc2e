# SPDX-License-Identifier: Apache-2.0
"""Work by key: never twice at once for a key, urgent work first, and a way to wait until everything is done."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from lotusguard.clients.keyed_worker import KeyedWorker

LIMIT = 2


class Work:
    """Work that ends when the test says so.

    :ivar begun: keys in the order in which their work began. :ivar running: the Deferreds that end it.
    """

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.running: dict[str, Deferred[None]] = {}
        self.failures: list[tuple[str, type[BaseException]]] = []
        self.worker = KeyedWorker(self._work, LIMIT, self._failed)

    async def _work(self, key: str) -> None:
        assert key not in self.running
        self.begun.append(key)
        self.running[key] = Deferred()
        try:
            await self.running[key]
        finally:
            del self.running[key]

    def _failed(self, key: str, failure: Failure) -> None:
        assert failure.type is not None
        self.failures.append((key, failure.type))

    def end(self, key: str, outcome: Any = None) -> None:
        self.running[key].callback(outcome)


@pytest.fixture
def work() -> Work:
    return Work()


def test_work_starts_at_once(work: Work) -> None:
    work.worker.run("a")
    assert work.begun == ["a"]
    assert not work.worker.idle().called
    work.end("a")
    assert work.worker.idle().called


def test_urgent_requests_for_a_running_key_lead_to_one_more_run(work: Work) -> None:
    for _ in range(4):
        work.worker.run("a")
    assert work.begun == ["a"]
    work.end("a")
    assert work.begun == ["a", "a"]
    work.end("a")
    assert work.begun == ["a", "a"]


def test_a_request_that_is_not_urgent_leaves_a_running_key_alone(work: Work) -> None:
    work.worker.run("a")
    work.worker.run("a", urgent=False)
    work.end("a")
    assert work.begun == ["a"]


def test_a_running_key_is_worked_on_again_for_a_request_that_is_not_urgent_and_needs_that(work: Work) -> None:
    work.worker.run("a")
    work.worker.run("a", urgent=False, again=True)
    work.end("a")
    assert work.begun == ["a", "a"]


def test_requests_that_are_not_urgent_wait_for_a_turn_in_their_order(work: Work) -> None:
    for key in "abcde":
        work.worker.run(key, urgent=False)
    assert work.begun == ["a", "b"]
    work.end("b")
    work.end("a")
    assert work.begun == ["a", "b", "c", "d"]
    work.end("d")
    assert work.begun[-1] == "e"


def test_urgent_work_does_not_wait_for_a_turn(work: Work) -> None:
    for key in "abc":
        work.worker.run(key, urgent=False)
    work.worker.run("d")
    assert work.begun == ["a", "b", "d"]


def test_urgent_request_removes_the_key_from_the_queue(work: Work) -> None:
    for key in "abc":
        work.worker.run(key, urgent=False)
    work.worker.run("c")
    assert work.begun == ["a", "b", "c"]
    for key in "abc":
        work.end(key)
    assert work.begun == ["a", "b", "c"]


def test_while_urgent_work_exceeds_the_limit_nothing_is_taken_from_the_queue(work: Work) -> None:
    for key in "abc":
        work.worker.run(key)
    work.worker.run("d", urgent=False)
    work.end("a")
    assert work.begun == ["a", "b", "c"]
    work.end("b")
    assert work.begun == ["a", "b", "c", "d"]


@pytest.mark.parametrize("urgent", [True, False])
def test_a_failure_is_reported_and_the_key_can_run_again(work: Work, urgent: bool) -> None:
    work.worker.run("a")
    work.worker.run("a", urgent=urgent)
    work.end("a", Failure(ValueError("broken")))
    assert work.failures == [("a", ValueError)]
    if not urgent:
        work.worker.run("a")
    assert work.begun == ["a", "a"]


def test_a_failing_report_does_not_keep_the_key_busy() -> None:
    async def fail(key: str) -> None:
        raise ValueError(key)

    def failing_report(key: str, failure: Failure) -> None:
        raise RuntimeError

    worker = KeyedWorker(fail, LIMIT, failing_report)
    for key in "abc":
        worker.run(key, urgent=False)
    assert worker.idle().called


def test_work_that_does_not_wait_is_over_when_run_returns() -> None:
    done: list[str] = []

    async def note(key: str) -> None:
        done.append(key)

    worker = KeyedWorker(note, LIMIT, lambda key, failure: None)
    for key in "abc":
        worker.run(key, urgent=False)
    assert done == ["a", "b", "c"]
    assert worker.idle().called


def test_idle_fires_when_nothing_runs_and_nothing_waits(work: Work) -> None:
    assert work.worker.idle().called
    for key in "abc":
        work.worker.run(key, urgent=False)
    idle = [work.worker.idle() for _ in range(2)]
    work.end("a")
    work.end("b")
    assert not any(waiter.called for waiter in idle)
    work.end("c")
    assert all(waiter.called for waiter in idle)


def test_idle_waits_for_the_second_run_of_a_key(work: Work) -> None:
    work.worker.run("a")
    work.worker.run("a")
    idle = work.worker.idle()
    work.end("a")
    assert not idle.called
    work.end("a")
    assert idle.called


def test_stop_cancels_the_work_and_starts_nothing_more(work: Work) -> None:
    for key in "abc":
        work.worker.run(key, urgent=False)
    work.worker.run("a")
    idle = work.worker.idle()
    work.worker.stop()
    assert work.running == {}
    assert work.failures == []
    assert idle.called
    work.worker.run("d")
    assert work.begun == ["a", "b"]


def test_thousands_of_queued_keys_may_end_at_once() -> None:
    first: Deferred[None] = Deferred()
    worked_on: list[str] = []

    async def work(key: str) -> None:
        if key == "first":
            await first
        worked_on.append(key)

    worker = KeyedWorker(work, 1, lambda key, failure: None)
    worker.run("first")
    for number in range(2000):
        worker.run(str(number), urgent=False)
    idle = worker.idle()
    first.callback(None)
    assert worked_on == ["first", *map(str, range(2000))]
    assert idle.called
