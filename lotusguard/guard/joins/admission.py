# SPDX-License-Identifier: Apache-2.0
"""How a join is decided, from the request that was read to the answer that is given. Floor: guard.

`Admission.join` reads top to bottom as DESIGN's seven steps. Each check fails open on its own.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from attrs import define, field
from twisted.internet.defer import CancelledError, Deferred, TimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.http import Answer
from lotusguard.clients.lk_jwt_service import UpstreamFailed
from lotusguard.clients.synapse import SynapseClient
from lotusguard.clients.waiting import Budget
from lotusguard.guard.joins.decisions import Decision, DecisionLog
from lotusguard.guard.rooms.policies import Freshness, Policies
from lotusguard.guard.seats.book import SeatBook
from lotusguard.guard.seats.registry import Slot, TokenRegistry
from lotusguard.guard.seats.roster import Roster
from lotusguard.metrics import Metrics
from lotusguard.rules.identity import user_of
from lotusguard.rules.policy import Policy
from lotusguard.rules.refusals import JoinRefused
from lotusguard.rules.refusals import Refusal as Reason
from lotusguard.rules.requests import TokenRequest
from lotusguard.rules.seats import Claim, Refusal
from lotusguard.rules.tokens import Issued, NotOurs, SfuKey, compact, issued_to, narrowed, read_unverified

log = Logger()

ROSTER_AGE = 2.0
"""Seconds that a look at the SFU may be old when somebody is let in. Before anybody is refused it is
never older than their request."""
NO_CAP = 2**31
NEVER = float("-inf")
NO_KEY = "no_livekit_key"
Forward = Callable[[bytes, float | None], Awaitable[Answer]]
"""Sends a body upstream and returns the answer, at the latest at a time on the clock."""


@define
class _Join:
    """What the steps of one join hand on to each other."""

    request: TokenRequest
    room_id: str
    budget: Budget
    decision: Decision
    policy: Policy = field(factory=Policy)
    user: str | None = None
    """who is proven or, on routes where upstream proves it, claimed"""
    claim: Claim | None = None
    late: bool = False
    """nobody could tell who asks: the seat is decided on when the answer names them"""


class Admission:
    """Decides joins.

    :param lookup_timeout: seconds a join waits for Synapse and LiveKit, all in all.
    :param token_ttl: longest life in seconds of a token for a room with a policy.
    """

    def __init__(
        self,
        *,
        policies: Policies,
        roster: Roster,
        seats: SeatBook,
        registry: TokenRegistry,
        homeserver: SynapseClient | None,
        key: SfuKey | None,
        decision_log: DecisionLog,
        clock: IReactorTime,
        metrics: Metrics,
        lookup_timeout: float,
        token_ttl: float,
        dry_run: bool,
    ) -> None:
        self._policies = policies
        self._roster = roster
        self._seats = seats
        self._registry = registry
        self._homeserver = homeserver
        self._key = key
        self._decision_log = decision_log
        self._clock = clock
        self._metrics = metrics
        self._lookup_timeout = lookup_timeout
        self._token_ttl = token_ttl
        self._dry_run = dry_run

    async def join(self, request: TokenRequest, request_id: str, forward: Forward) -> Answer:
        """Decide one token request.

        :param forward: hands the request to upstream and brings its answer.
        :raises JoinRefused: refused. :raises UpstreamFailed: there is no answer.
        """
        decision = self._decision_log.begin(request_id, request.route.path, request.room_id, request.user)
        try:
            return await self._joined(request, decision, forward)
        except JoinRefused:
            decision.verdict = "refused"
            raise
        except UpstreamFailed as failed:
            decision.verdict, decision.reason = "failed", f"upstream_{failed.reason}"
            raise
        except CancelledError:
            decision.verdict, decision.reason = "failed", "caller_went_away"
            raise
        finally:
            self._decision_log.end(decision)

    async def _joined(self, request: TokenRequest, decision: Decision, forward: Forward) -> Answer:
        if request.room_id is None:
            decision.reason = "no_room"
            return await self._decision_log.timed(decision, "upstream", forward(request.body, None))
        join = _Join(request, request.room_id, Budget(self._clock, self._lookup_timeout), decision, user=request.user)
        join.policy = await self._policy(join)
        try:
            if join.policy.max_users is not None:
                await self._find_seat(join, join.policy.max_users)
            answer = await self._decision_log.timed(decision, "upstream", forward(request.body, None))
            return await self._answered(join, answer)
        finally:
            if join.claim is not None:  # nothing came of it
                await self._seats.release(join.room_id, join.claim)

    async def _policy(self, join: _Join) -> Policy:
        known = await self._decision_log.timed(join.decision, "policy", self._policies.get(join.room_id, join.budget))
        if known.freshness is Freshness.UNKNOWN:
            self._decision_log.unenforced(join.decision, "policy", known.reason)
        elif known.policy:
            join.decision.reason = "policy" if known.freshness is Freshness.FRESH else "stale_policy"
        return known.policy

    # -- the seat, before upstream has done anything -----------------------------------------------------

    async def _find_seat(self, join: _Join, cap: int) -> None:
        """Hold a seat for this join, or find out that there is none. :raises JoinRefused:"""
        try:
            seated = await self._seat(join, cap, NEVER)
            if not seated and not await self._known_caller(join):
                join.late = True
            elif not seated and not await self._seat(join, cap, join.decision.began):
                self._refuse(join)
        except (DependencyFailed, TimeoutError) as trouble:
            self._decision_log.unenforced(join.decision, "cap", _reason(trouble))
            await self._seat_regardless(join)
        except (JoinRefused, CancelledError):
            raise
        except Exception:
            log.failure("deciding on a seat in {room_id} failed", room_id=join.room_id)
            self._decision_log.unenforced(join.decision, "cap", "internal_error")

    async def _seat(self, join: _Join, cap: int, since: float) -> bool:
        """Take a seat if there is one.

        What is known of who is in is as young as ``since`` and no older than `ROSTER_AGE`; before there is no seat, as
        young as the request and as the latest leaving.
        """
        decision, waited = join.decision, False
        try:
            while True:
                since = max(since, self._clock.seconds() - ROSTER_AGE)
                look = self._roster.fresh(join.room_id, join.request.slot_id, join.budget, since)
                await self._decision_log.timed(decision, "roster", look)
                taken = await self._seats.take(join.room_id, join.user, cap)
                if isinstance(taken, Claim):
                    join.claim, waited = taken, False
                    return True
                if taken is Refusal.BUSY:
                    freed = self._seats.freed(join.room_id, join.user, again=waited)
                    waited = True
                    await self._decision_log.timed(decision, "seat", freed)
                    continue
                owed = max(decision.began, await self._seats.doubted_since(join.room_id))
                if since >= owed:
                    return False
                since = owed
        finally:
            if waited:
                await self._seats.waited_in_vain(join.room_id)

    async def _seat_regardless(self, join: _Join) -> None:
        """Who is let in because we cannot tell still takes up a seat."""
        taken = await self._seats.take(join.room_id, join.user, NO_CAP)
        if isinstance(taken, Claim):
            join.claim = taken

    async def _known_caller(self, join: _Join) -> bool:
        """On the way to a refusal: find out who asks, so that nobody learns who is in which room.

        :return: whether the caller is known now. A bad OpenID token is for upstream to refuse, in its own words;
            users of other homeservers only upstream can verify.
        """
        if join.request.proven_user is not None:
            return True
        openid, homeserver = join.request.openid, self._homeserver
        if openid is None or homeserver is None:
            return False
        asked = Deferred.fromCoroutine(homeserver.local_user(openid))
        try:
            user = await self._decision_log.timed(join.decision, "verify", join.budget.wait(asked))
        except (DependencyFailed, TimeoutError) as trouble:
            join.decision.unenforced.append(f"early_refusal:{_reason(trouble)}")
            return False
        if user is None or join.user not in (None, user):
            return False
        join.user = join.decision.user = user
        return True

    def _refuse(self, join: _Join) -> None:
        join.decision.reason = "full"
        if not self._dry_run:
            raise JoinRefused(Reason.FULL)
        join.decision.verdict = "would_refuse"
        self._metrics.dry_run_skipped.labels("refuse").inc()

    # -- the answer --------------------------------------------------------------------------------------

    async def _answered(self, join: _Join, answer: Answer) -> Answer:
        """What becomes of upstream's answer. :raises JoinRefused: only now it was known who asked."""
        content = _token_answer(answer)
        if content is None:
            join.decision.reason = f"upstream_status_{answer.code}"
            join.decision.verdict = "failed"
            return answer
        try:
            return await self._issued(join, answer, content)
        except (JoinRefused, CancelledError):
            raise
        except Exception:
            log.failure("an issued token for {room_id} could not be worked on", room_id=join.room_id)
            self._decision_log.unenforced(join.decision, "sources", "internal_error")
            return answer

    async def _issued(self, join: _Join, answer: Answer, content: dict[str, Any]) -> Answer:
        claims, mismatch = self._claims(content["jwt"]) if join.policy else (read_unverified(content["jwt"]), "")
        issued = issued_to(claims) if claims is not None else None
        if issued is None:
            if join.policy:
                self._decision_log.unenforced(join.decision, "sources", "unreadable_token")
            if join.claim is not None and join.user is not None:  # a token was given, whatever it says
                await self._seats.settle(join.room_id, join.claim, join.user, "", "")
                join.claim = None
            return answer
        user = join.user or user_of(issued.identity, join.request.device_id)
        join.decision.user = user
        if join.late:
            await self._late_seat(join, user)
        if join.claim is not None:
            settled = self._seats.settle(join.room_id, join.claim, user, issued.alias, issued.identity)
            await self._decision_log.timed(join.decision, "seat", settled)
            join.claim = None
        await self._remember(join, issued, user)
        if not join.policy:
            return answer
        if mismatch == NO_KEY:
            self._decision_log.unenforced(join.decision, "sources", NO_KEY)
            return answer
        if mismatch:
            self._decision_log.secret_mismatch(join.decision, mismatch)
            return answer
        if self._dry_run:
            self._metrics.dry_run_skipped.labels("narrow").inc()
            return answer
        assert self._key is not None
        assert claims is not None
        kept = narrowed(claims, join.policy, self._clock.seconds(), self._token_ttl)
        body = compact({**content, "jwt": self._key.sign(kept)}).encode() + b"\n"
        return Answer(answer.code, answer.headers, body)

    def _claims(self, token: str) -> tuple[dict[str, Any] | None, str]:
        """The claims, and why they are not ours to change if so."""
        if self._key is None:
            return read_unverified(token), NO_KEY
        try:
            return self._key.read(token), ""
        except NotOurs as other:
            return read_unverified(token), str(other)

    async def _late_seat(self, join: _Join, user: str) -> None:
        """Decide on the seat of somebody whom only the answer names. :raises JoinRefused:"""
        assert join.policy.max_users is not None
        join.user = user
        try:
            if not await self._seat(join, join.policy.max_users, NEVER):
                self._refuse(join)
        except (DependencyFailed, TimeoutError) as trouble:
            self._decision_log.unenforced(join.decision, "cap", _reason(trouble))
            await self._seat_regardless(join)

    async def _remember(self, join: _Join, issued: Issued, user: str) -> None:
        slot = Slot(join.room_id, join.request.slot_id)
        await self._registry.learn(issued.alias, slot, issued.identity, user)


def _token_answer(answer: Answer) -> dict[str, Any] | None:
    """The JSON object of an answer that carries a token, else ``None``."""
    try:
        content = json.loads(answer.body)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get("jwt"), str) else None


def _reason(trouble: DependencyFailed | TimeoutError) -> str:
    return trouble.reason if isinstance(trouble, DependencyFailed) else "timeout"
