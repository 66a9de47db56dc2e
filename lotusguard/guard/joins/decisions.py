# SPDX-License-Identifier: Apache-2.0
"""What became of each join: one line in the log, one count, and the last few at hand for operators. Floor: guard."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable
from typing import TypeVar

from attrs import Factory, define
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from lotusguard.metrics import Metrics

log = Logger()
T = TypeVar("T")

DECISIONS_KEPT = 500
STAGES = ("policy", "roster", "verify", "seat", "upstream", "total")


@define
class Decision:
    """One join: what is known of it, and in the end what became of it.

    :ivar began: seconds on the decision_log's clock.
    :ivar unenforced: what passed without being enforced, as ``check:reason``.
    :ivar stages: seconds by sandbox.
    """

    request_id: str
    route: str
    room_id: str | None
    user: str | None
    began: float
    verdict: str = "allowed"
    reason: str = "no_policy"
    unenforced: list[str] = Factory(list)
    stages: dict[str, float] = Factory(dict)


class DecisionLog:
    """Where decisions are written down."""

    def __init__(self, clock: IReactorTime, metrics: Metrics) -> None:
        self._clock = clock
        self._metrics = metrics
        self._stage_seconds = {sandbox: metrics.join_seconds.labels(sandbox) for sandbox in STAGES}
        self.decisions: deque[Decision] = deque(maxlen=DECISIONS_KEPT)
        self.secret_mismatch_at: float | None = None
        """When a token was last issued that our secret did not sign."""

    def begin(self, request_id: str, route: str, room_id: str | None, user: str | None) -> Decision:
        """A join has come in."""
        return Decision(request_id, route, room_id, user, self._clock.seconds())

    async def timed(self, decision: Decision, sandbox: str, work: Awaitable[T]) -> T:
        """Do one sandbox of a join, and add its time."""
        began = self._clock.seconds()
        try:
            return await work
        finally:
            decision.stages[sandbox] = decision.stages.get(sandbox, 0.0) + self._clock.seconds() - began

    def unenforced(self, decision: Decision, check: str, reason: str) -> None:
        """Something passes without being enforced: one event, one count."""
        decision.unenforced.append(f"{check}:{reason}")
        self._metrics.fail_open.labels(check, reason).inc()
        log.warn(
            "{check} not enforced for {user} in {room_id}: {reason}",
            check=check, reason=reason, user=decision.user, room_id=decision.room_id,
            request_id=decision.request_id, event_name="fail_open",
        )  # fmt: skip

    def secret_mismatch(self, decision: Decision, why: str) -> None:
        """Upstream issued a token that our secret did not sign, so that nothing can be taken from it."""
        self.secret_mismatch_at = self._clock.seconds()
        self._metrics.secret_mismatches.inc()
        log.critical(
            "upstream issues tokens that LIVEKIT_KEY/LIVEKIT_SECRET did not sign ({why}): they are not narrowed",
            why=why, event_name="secret_mismatch",
        )  # fmt: skip
        self.unenforced(decision, "sources", "secret_mismatch")

    def end(self, decision: Decision) -> None:
        """A join is over: say what became of it."""
        total = decision.stages["total"] = self._clock.seconds() - decision.began
        self.decisions.append(decision)
        self._metrics.joins.labels(decision.verdict, decision.reason).inc()
        for sandbox, seconds in decision.stages.items():
            self._stage_seconds[sandbox].observe(seconds)
        line = "{verdict} {user} in {room_id}: {reason}, {total:.0f} ms [{request_id}]"
        log.info(
            line + " unenforced: {unenforced}" if decision.unenforced else line,
            verdict=decision.verdict, user=decision.user or "somebody", room_id=decision.room_id,
            reason=decision.reason, total=total * 1000, request_id=decision.request_id, route=decision.route,
            unenforced=decision.unenforced,
            stages={sandbox: round(seconds, 6) for sandbox, seconds in decision.stages.items()}, event_name="join",
        )  # fmt: skip
