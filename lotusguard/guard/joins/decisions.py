# SPDX-License-Identifier: Apache-2.0
"""What was decided about each join: one line in the log, one count, and the latest few for operators."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from enum import StrEnum
from itertools import count

from attrs import Factory, define, field
from cachetools import TTLCache
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from lotusguard.guard.joins.decision_store import HOLDERS_KEPT, DecisionHistory, Record, RecordKind
from lotusguard.guard.joins.history import JoinHistory
from lotusguard.metrics import Metrics

log = Logger()

DECISIONS_KEPT = 500
FAILURES_KEPT, FAILURES_COUNTED_FOR = 60, 60.0
"""Failed joins that are kept for operators in so many seconds. Their callers are often unverified, and must not push
the decisions about others out."""
LONGEST_NAME = 255
"""Bytes of a room's or user's name that are kept; longer ones are refused before they get here."""


class Stage(StrEnum):
    """Where a join's time goes."""

    LOOKUP = "lookup"
    """Policy, caller and membership, concurrently."""
    CHECK = "check"
    """Reading again what a refusal would rest on."""
    ROSTER = "roster"
    SEAT = "seat"
    """Waiting behind requests in flight."""
    LOBBY = "lobby"
    UPSTREAM = "upstream"
    RECORD = "record"
    TOTAL = "total"


class Verdict(StrEnum):
    ALLOWED = "allowed"
    REFUSED = "refused"
    WOULD_REFUSE = "would_refuse"
    """Dry run: it would have been refused."""
    WAITING = "waiting"
    """A client that polls was told that it has to wait in the lobby."""
    FAILED = "failed"
    """Upstream gave no token, or the caller went away."""
    ERROR = "error"
    """A failure of our own; the join went on without what failed."""


@define
class Decision:
    """One join: what is known of it, and in the end what became of it.

    :ivar began: seconds on the guard's clock.
    :ivar reason: why, in one word: a refusal, an upstream status, or what the policy rests on.
    :ivar unenforced: what passed without being enforced, as ``check:reason``.
    :ivar stages: seconds by stage.
    """

    request_id: str
    route: str
    room_id: str | None
    user: str | None
    began: float
    verdict: Verdict = Verdict.ALLOWED
    reason: str = "no_policy"
    unenforced: list[str] = Factory(list)
    stages: dict[str, float] = Factory(dict)
    seats: str = ""
    """The limit, and how many users hold seats, if there was none."""
    holders: list[str] = Factory(list)
    """Those users."""


@define(eq=False)
class _Timed(AbstractContextManager[None]):
    """Adds the time spent inside. A class: joins enter it several times, and a generator takes three times as long."""

    _stages: dict[str, float]
    _name: str
    _clock: IReactorTime
    _began: float = 0.0

    def __enter__(self) -> None:
        self._began = self._clock.seconds()

    def __exit__(self, *exc: object) -> None:
        self._stages[self._name] = self._stages.get(self._name, 0.0) + self._clock.seconds() - self._began


@define(eq=False)
class DecisionLog:
    """Records decisions.

    :param wall: seconds since the epoch.
    :param kept: where decisions are kept for operators' questions.
    :ivar secret_mismatch_at: when upstream last issued a token that our secret did not sign.
    :ivar error_at: when our own code last failed in a join.
    """

    _clock: IReactorTime
    _metrics: Metrics
    _wall: Callable[[], float]
    kept: DecisionHistory
    decisions: deque[Decision] = field(factory=lambda: deque(maxlen=DECISIONS_KEPT), init=False)
    secret_mismatch_at: float | None = field(default=None, init=False)
    error_at: float | None = field(default=None, init=False)
    history: JoinHistory = field(init=False)
    _failures: Iterator[int] = field(factory=count, init=False)
    _failures_kept: TTLCache[int, None] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.history = JoinHistory(self._clock)
        self._failures_kept = TTLCache(FAILURES_KEPT, FAILURES_COUNTED_FOR, timer=self._clock.seconds)

    def begin(self, request_id: str, route: str, room_id: str | None, user: str | None) -> Decision:
        return Decision(request_id, route, room_id, user, self._clock.seconds())

    def stage(self, decision: Decision, stage: Stage) -> AbstractContextManager[None]:
        """Adds the time spent inside to a stage of the join."""
        return _Timed(decision.stages, stage, self._clock)

    def unenforced(self, decision: Decision, check: str, reason: str) -> None:
        """A check is passed without being enforced: one event, one count."""
        decision.unenforced.append(f"{check}:{reason}")
        self._metrics.fail_open.labels(check, reason).inc()
        log.warn(
            "{check} not enforced for {user} in {room_id}: {reason}",
            check=check, reason=reason, user=_user(decision), room_id=_room(decision),
            request_id=decision.request_id, event_name="fail_open",
        )  # fmt: skip

    def failure(self, decision: Decision, check: str) -> None:
        """Our own code failed in a check (call this in an ``except`` clause). The join goes on without it."""
        decision.verdict = Verdict.ERROR
        decision.reason = "internal_error"
        decision.unenforced.append(f"{check}:internal_error")
        self._metrics.fail_open.labels(check, "internal_error").inc()
        self.error_at = self._clock.seconds()
        log.failure(
            "{check} failed for a join to {room_id} [{request_id}]; the join goes on without it",
            check=check, room_id=_room(decision), request_id=decision.request_id, event_name="internal_error",
        )  # fmt: skip

    def secret_mismatch(self, decision: Decision, why: str) -> None:
        """Upstream issued a token that our secret did not sign, so nothing can be withheld from it."""
        self.secret_mismatch_at = self._clock.seconds()
        self._metrics.secret_mismatches.inc()
        log.critical(
            "upstream issues tokens that LIVEKIT_KEY/LIVEKIT_SECRET did not sign ({why}): nothing is withheld",
            why=why, event_name="secret_mismatch",
        )  # fmt: skip
        self.unenforced(decision, "token", "secret_mismatch")

    def end(self, decision: Decision) -> None:
        """A join is over. Clients that poll come back every second: for them there is a count, and no line."""
        if decision.verdict is Verdict.ERROR:
            decision.reason = "internal_error"
        total = self._clock.seconds() - decision.began
        self._metrics.joins.labels(decision.verdict, decision.reason).inc()
        for stage, seconds in decision.stages.items():
            self._metrics.join_seconds.labels(stage).observe(seconds)
        # An alert on slow joins must not fire because somebody waits for a moderator.
        undelayed = total - decision.stages.get(Stage.LOBBY, 0.0)
        self._metrics.join_seconds.labels(Stage.TOTAL).observe(undelayed)
        decision.stages[Stage.TOTAL] = total
        if decision.verdict is Verdict.WAITING:
            return
        self.decisions.append(decision)
        self.history.add(refused=decision.verdict is Verdict.REFUSED, seconds=undelayed)
        self._keep(decision)
        line = "{verdict} {user} in {room_id}: {reason}, {seconds:.3f} s [{request_id}]"
        if decision.seats:
            line += " ({seats})"
        if decision.unenforced:
            line += " not enforced: {passed}"
        log.info(
            line,
            verdict=decision.verdict, user=_user(decision), room_id=_room(decision),
            reason=decision.reason, seconds=total, passed=", ".join(decision.unenforced),
            request_id=decision.request_id, route=decision.route,
            unenforced=decision.unenforced, seats=decision.seats,
            stages=decision.stages, event_name="join",
        )  # fmt: skip
        if decision.holders:
            log.debug(
                "{n} users hold seats in {room_id} or are about to join [{request_id}]",
                n=len(decision.holders), room_id=decision.room_id, request_id=decision.request_id,
                holders=decision.holders, event_name="seat_holders",
            )  # fmt: skip

    def _may_keep_failure(self) -> bool:
        if len(self._failures_kept) >= FAILURES_KEPT:
            self._failures_kept.expire()
        if len(self._failures_kept) >= FAILURES_KEPT:
            return False
        self._failures_kept[next(self._failures)] = None
        return True

    def removed(self, user: str, room_id: str, reason: str) -> None:
        """A participant was removed from a call."""
        self.kept.put(Record(self._wall(), RecordKind.REMOVAL, user, room_id, "removed", reason))

    def _keep(self, decision: Decision) -> None:
        if not decision.user or decision.room_id is None:
            return
        if decision.verdict is Verdict.FAILED and not self._may_keep_failure():
            return
        self.kept.put(
            Record(
                self._wall(), RecordKind.JOIN, decision.user, decision.room_id, decision.verdict, decision.reason,
                decision.seats, tuple(decision.holders[:HOLDERS_KEPT]), tuple(decision.unenforced[:10]),
                decision.route, decision.request_id,
            )
        )  # fmt: skip


def _user(decision: Decision) -> str:
    """The user, for the log."""
    return decision.user or "an unnamed user"


def _room(decision: Decision) -> str:
    """The room, for the log: a request may name none."""
    return decision.room_id or "an unnamed room"
