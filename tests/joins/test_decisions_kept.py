# SPDX-License-Identifier: Apache-2.0
"""What is kept of joins for operators: callers whom nobody verified cannot push out what is known about others."""

from __future__ import annotations

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from lotusguard.guard.joins.decision_store import MemoryHistory, Question
from lotusguard.guard.joins.decisions import FAILURES_COUNTED_FOR, FAILURES_KEPT, DecisionLog, Verdict
from lotusguard.metrics import Metrics


class Decided:
    """A decision log and its clock."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.log = DecisionLog(self.clock, Metrics(), self.clock.seconds, MemoryHistory())

    def decide(self, user: str, verdict: Verdict, times: int = 1) -> None:
        for _ in range(times):
            decision = self.log.begin("id", "/get_token", "!room", user)
            decision.verdict = verdict
            self.log.end(decision)

    def kept(self, user: str) -> int:
        found = Deferred.fromCoroutine(self.log.kept.find(Question(0, self.clock.seconds(), user)))
        return len(found.result)  # type: ignore[arg-type]


def test_failed_joins_push_out_no_decisions_about_others() -> None:
    decided = Decided()
    decided.decide("@alice:x", Verdict.REFUSED)
    decided.decide("@made-up:x", Verdict.FAILED, 5000)
    decided.decide("@bob:x", Verdict.ALLOWED)
    assert [decided.kept(user) for user in ("@alice:x", "@made-up:x", "@bob:x")] == [1, FAILURES_KEPT, 1]


def test_failed_joins_are_kept_again_a_minute_later() -> None:
    decided = Decided()
    decided.decide("@alice:x", Verdict.FAILED, 1000)
    decided.clock.advance(FAILURES_COUNTED_FOR)
    decided.decide("@bob:x", Verdict.FAILED, 3)
    assert decided.kept("@bob:x") == 3
