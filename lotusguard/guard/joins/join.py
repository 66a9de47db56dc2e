# SPDX-License-Identifier: Apache-2.0
"""What the steps of one join pass on to each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from attrs import Factory, define, field

from lotusguard.clients.waiting import Deadline
from lotusguard.guard.joins.callers import UNIDENTIFIED, Caller
from lotusguard.guard.joins.decisions import Decision, DecisionLog, Verdict
from lotusguard.guard.rooms.members import KnownMembership
from lotusguard.guard.rooms.policies import Freshness, KnownPolicy
from lotusguard.rules.identity import ROOM_SLOT, room_alias
from lotusguard.rules.policy import NO_POLICY, Policy
from lotusguard.rules.refusals import JoinRefused, Refusal
from lotusguard.rules.requests import TokenRequest

NOT_LOOKED_UP = KnownPolicy(NO_POLICY, Freshness.UNKNOWN, None, "not_looked_up")


LEAST_LOOKUPS = 1 / 6
"""Part of the lookup timeout that is left for lookups after a wait, whatever those before it took."""


@define
class Join:
    """One token request on its way.

    :ivar deadline: for everything, upstream's answer included.
    :ivar lookups: for what is asked of the homeserver and LiveKit.
    :ivar lookup_timeout: seconds that such lookups may take, all together.
    :ivar user: who asks, once that is proven; "" before.
    :ivar arrived: when the request arrived, or was decided anew after waiting in the lobby. No refusal rests on a
        lookup that began before.
    :ivar not_before: after a wait, nothing that was looked up before this time counts, whatever it says. What is pushed
        does.
    """

    request: TokenRequest
    room_id: str
    decision: Decision
    log: DecisionLog
    deadline: Deadline
    lookups: Deadline
    lookup_timeout: float
    dry_run: bool
    caller: Caller = UNIDENTIFIED
    known: KnownPolicy = field(default=NOT_LOOKED_UP)
    membership: KnownMembership | None = None
    user: str = ""
    arrived: float = field(default=Factory(lambda join: join.decision.began, takes_self=True), kw_only=True)
    not_before: float = field(default=0.0, kw_only=True)

    @property
    def policy(self) -> Policy:
        return self.known.policy

    @property
    def alias(self) -> str:
        """The SFU room that current releases of upstream use for the request's slot."""
        return room_alias(self.room_id, self.request.slot_id)

    @property
    def is_main_slot(self) -> bool:
        return self.request.slot_id == ROOM_SLOT

    def learn_policy(self, known: KnownPolicy) -> None:
        """The room's policy was looked up."""
        self.known = known
        if known.freshness is Freshness.UNKNOWN:
            self.unenforced("policy", known.reason)
        elif known.policy and self.decision.verdict is Verdict.ALLOWED:
            self.decision.reason = "policy" if known.is_certain else "stale_policy"

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While the join waits for something else than a lookup, its time for lookups does not pass."""
        left = max(self.lookups.left(), LEAST_LOOKUPS * self.lookup_timeout)
        try:
            yield
        finally:
            self.lookups = self.deadline.sooner(left)

    def refuse(self, refusal: Refusal, retry_after: float | None = None) -> None:
        """Refuse the join, or only say so in a dry run. :raises JoinRefused:"""
        self.decision.reason = refusal.value
        if self.dry_run:
            self.decision.verdict = Verdict.WOULD_REFUSE
            return
        raise JoinRefused(refusal, retry_after)

    def unenforced(self, check: str, reason: str) -> None:
        self.log.unenforced(self.decision, check, reason)
