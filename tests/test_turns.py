# SPDX-License-Identifier: Apache-2.0
"""Turns go round the keys that wait, in order of arrival within a key, and no key uses the queue up."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import CancelledError, Deferred

from lotusguard.clients.turns import FairSemaphore, QueueFull


class Work:
    """Records the order in which pieces of work start; each ends when told."""

    def __init__(self, turns: FairSemaphore) -> None:
        self.turns = turns
        self.started: list[str] = []
        self.running: dict[str, Deferred[None]] = {}

    def begin(self, name: str) -> Deferred[Any]:
        """:param name: the key is its first letter."""

        async def work() -> str:
            self.started.append(name)
            self.running[name] = Deferred()
            await self.running[name]
            return name

        return Deferred.fromCoroutine(self.turns.run(name[0], work))

    def end(self, name: str) -> None:
        self.running.pop(name).callback(None)


def outcome(waiting: Deferred[Any]) -> Any:
    waiting.addErrback(lambda failure: failure.value)
    return waiting.result if waiting.called else None


def test_turns_go_round_the_keys_and_first_in_first_out_within_a_key() -> None:
    work = Work(FairSemaphore(1))
    for name in ("a1", "a2", "a3", "a4", "b1", "b2", "c1"):
        work.begin(name)
    while work.running:
        work.end(work.started[-1])
    assert work.started == ["a1", "a2", "b1", "c1", "a3", "b2", "a4"]


def test_no_more_than_the_limit_run_at_once() -> None:
    work = Work(FairSemaphore(2))
    for name in ("a1", "b1", "c1", "d1"):
        work.begin(name)
    assert work.started == ["a1", "b1"]
    work.end("a1")
    assert work.started == ["a1", "b1", "c1"]


def test_a_waiter_that_is_cancelled_takes_no_turn() -> None:
    work = Work(FairSemaphore(1))
    work.begin("a1")
    gone = work.begin("b1")
    work.begin("c1")
    gone.cancel()
    assert isinstance(outcome(gone), CancelledError)
    work.end("a1")
    assert work.started == ["a1", "c1"]
    work.end("c1")
    work.begin("d1")
    assert work.started == ["a1", "c1", "d1"]


def test_work_that_fails_or_is_cancelled_frees_its_turn() -> None:
    turns = FairSemaphore(1)
    work = Work(turns)
    first = work.begin("a1")
    second = work.begin("a2")
    first.cancel()
    assert isinstance(outcome(first), CancelledError)
    work.running["a2"].errback(ValueError("x"))
    assert isinstance(outcome(second), ValueError)
    work.begin("a3")
    assert work.started == ["a1", "a2", "a3"]


def test_a_full_queue_refuses_the_key_that_fills_it() -> None:
    work = Work(FairSemaphore(1, queue_limit=3))
    work.begin("a1")
    for name in ("b1", "b2", "b3"):
        work.begin(name)
    assert isinstance(outcome(work.begin("b4")), QueueFull)
    assert work.turns.waiting == 3


def test_a_full_queue_makes_room_for_another_key() -> None:
    work = Work(FairSemaphore(1, queue_limit=3))
    work.begin("a1")
    flood = [work.begin(name) for name in ("b1", "b2", "b3")]
    other = work.begin("c1")
    assert [isinstance(outcome(one), QueueFull) for one in flood] == [False, False, True]
    assert outcome(other) is None
    while work.running:
        work.end(work.started[-1])
    assert work.started == ["a1", "b1", "c1", "b2"]


def test_queue_limit_of_zero_refuses_every_waiter() -> None:
    work = Work(FairSemaphore(1, queue_limit=0))
    work.begin("a1")
    assert isinstance(outcome(work.begin("b1")), QueueFull)


def test_thousands_of_waiters_may_end_their_turns_at_once() -> None:
    turns = FairSemaphore(1)
    first, others = turns.acquire("room"), [turns.acquire(f"room {number % 7}") for number in range(2000)]
    assert first.called
    for turn in others:
        turn.addCallback(lambda _: turns.release())
    turns.release()
    assert all(turn.called for turn in others)
    assert turns.idle
    assert turns.acquire("room").called
    assert not turns.idle
