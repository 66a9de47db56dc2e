# SPDX-License-Identifier: Apache-2.0
"""How a join is decided, from the request that was read to the answer that is given.

The steps and their order are those of the README's diagram. Each check fails open on its own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from attrs import define
from twisted.internet.defer import CancelledError
from twisted.internet.interfaces import IReactorTime

from lotusguard.clients.http import Answer
from lotusguard.clients.lk_jwt_service import UpstreamFailed
from lotusguard.clients.waiting import Deadline, gather
from lotusguard.guard.joins.callers import Callers, Identified
from lotusguard.guard.joins.checks import EntryChecks
from lotusguard.guard.joins.decisions import Decision, DecisionLog, Stage, Verdict
from lotusguard.guard.joins.issuing import TokenIssuer, no_token
from lotusguard.guard.joins.join import Join
from lotusguard.guard.joins.seating import Seating
from lotusguard.guard.rooms.members import Members
from lotusguard.guard.rooms.policies import Freshness, Policies
from lotusguard.rules.refusals import JoinRefused
from lotusguard.rules.requests import TokenRequest

Forward = Callable[[bytes, float], Awaitable[Answer]]
"""Sends a body to upstream; the second argument is the time on the guard's clock by which it must have answered."""
SLACK = 0.5
"""Seconds that a join may take beside lookups and upstream."""
STALE_SHARE = 2 / 3
"""Part of the lookup timeout after which the last known policy serves; the rest is for the roster."""

Lookup = Callable[[Join, Deadline], Awaitable[None]]


@define(eq=False)
class Admission:
    """Decides joins.

    :param lookup_timeout: seconds for what is asked of the homeserver and LiveKit, all together.
    :param upstream_timeout: seconds for upstream's answers, all together.
    """

    _callers: Callers
    _policies: Policies
    _members: Members
    _checks: EntryChecks
    _seating: Seating
    _issuer: TokenIssuer
    _log: DecisionLog
    _clock: IReactorTime
    _lookup_timeout: float
    _upstream_timeout: float
    _dry_run: bool

    async def join(self, request: TokenRequest, request_id: str, forward: Forward) -> Answer:
        """Decide one token request.

        :raises JoinRefused: the guard refuses it. :raises UpstreamFailed: upstream gives no answer.
        """
        decision = self._log.begin(request_id, request.route.path, request.room_id, request.user)
        try:
            return await self._decide(request, decision, forward)
        except JoinRefused:
            decision.verdict = Verdict.REFUSED
            raise
        except UpstreamFailed as failed:
            decision.verdict, decision.reason = Verdict.FAILED, f"upstream_{failed.reason}"
            raise
        except CancelledError:
            decision.verdict, decision.reason = Verdict.FAILED, "caller_disconnected"
            raise
        finally:
            self._log.end(decision)

    async def _decide(self, request: TokenRequest, decision: Decision, forward: Forward) -> Answer:
        arrived = decision.began
        deadline = Deadline(self._clock, arrived + self._lookup_timeout + self._upstream_timeout + SLACK)
        if request.room_id is None:
            decision.reason = "no_room"
            return await forward(request.body, deadline.at)
        lookups = Deadline(self._clock, arrived + self._lookup_timeout)
        join = Join(
            request, request.room_id, decision, self._log, deadline, lookups, self._lookup_timeout, self._dry_run
        )
        try:
            if request.openid is not None:
                self._checks.homeserver_may_join(join, request.openid.server_name)
            await self._look_up(join)
            if join.caller.identified is Identified.PROVEN:
                return await self._admit(join, forward)
            return await self._admit_when_named(join, forward)
        except (JoinRefused, UpstreamFailed, CancelledError):
            raise
        except Exception:  # of our own: the token is still rebuilt
            self._log.failure(decision, "join")
            return await self._issuer.issue(join, await self._forward(join, forward, request.body), None)

    # -- lookups -----------------------------------------------------------------------------------------

    async def _look_up(self, join: Join) -> None:
        """Find out who asks and what the room wants, concurrently.

        For a room that is not in memory nothing is looked up before the caller is known. For one that is, a slow
        homeserver leaves time to ask LiveKit.
        """
        with self._log.stage(join.decision, Stage.LOOKUP):
            if self._policies.is_remembered(join.room_id):
                deadline = join.lookups.sooner(self._lookup_timeout * STALE_SHARE)
                await gather((
                    self._look_up_caller(join, deadline, self._look_up_membership),
                    self._look_up_policy(join, deadline),
                ))  # fmt: skip
            else:
                await self._look_up_caller(join, join.lookups, self._look_up_room)

    async def _look_up_caller(self, join: Join, deadline: Deadline, then: Lookup) -> None:
        """:param then: what is looked up once the caller is proven."""
        with self._failing_open(join, "caller"):
            caller = join.caller = await self._callers.identify(join.request, deadline)
            if caller.identified is Identified.PROVEN:
                join.user = join.decision.user = caller.user
                await then(join, deadline)

    async def _look_up_room(self, join: Join, deadline: Deadline) -> None:
        await gather((self._look_up_policy(join, deadline), self._look_up_membership(join, deadline)))

    async def _look_up_policy(self, join: Join, deadline: Deadline) -> None:
        with self._failing_open(join, "policy"):
            join.known = await self._policies.get(join.room_id, deadline)
            if join.known.freshness is Freshness.UNKNOWN:
                join.unenforced("policy", join.known.reason)
            elif join.policy and join.decision.verdict is Verdict.ALLOWED:
                join.decision.reason = "policy" if join.known.is_certain else "stale_policy"

    async def _look_up_membership(self, join: Join, deadline: Deadline) -> None:
        with self._failing_open(join, "membership"):
            if self._checks.asks_membership:
                join.membership = await self._members.get(join.room_id, join.user, deadline)

    @contextmanager
    def _failing_open(self, join: Join, check: str) -> Iterator[None]:
        """A failure of our own in one lookup does not stop the others."""
        try:
            yield
        except CancelledError:
            raise
        except Exception:
            self._log.failure(join.decision, check)

    # -- the two ways through ----------------------------------------------------------------------------

    async def _admit(self, join: Join, forward: Forward) -> Answer:
        """The caller is proven: everything is decided before upstream has done anything."""
        await self._checks.may_join(join)
        async with self._seating.seat(join) as hold_id:
            answer = await self._forward(join, forward, join.request.body)
            return await self._issuer.issue(join, answer, hold_id)

    async def _admit_when_named(self, join: Join, forward: Forward) -> Answer:
        """Only upstream can tell who asks: the token is withheld until that is decided.

        Where a refusal is possible, the first request goes without its delay fields: upstream would act on them.
        Once the caller is admitted it is repeated as it came.
        """
        request = join.request
        body = request.body
        if request.has_delay and self._may_refuse(join):
            body = request.without_delay()
        answer = await self._forward(join, forward, body)
        token = self._issuer.read(join, answer)
        if token is None:
            no_token(join, answer)
            return answer
        join.user = join.decision.user = self._issuer.named_user(join, token)
        join.renew_lookups()
        with self._log.stage(join.decision, Stage.LOOKUP):
            await self._look_up_room(join, join.lookups)
        await self._checks.may_join(join)
        async with self._seating.seat(join) as hold_id:
            if body is not request.body:
                answer = await self._forward(join, forward, request.body)
            return await self._issuer.issue(join, answer, hold_id)

    def _may_refuse(self, join: Join) -> bool:
        """Whether the caller may turn out to be refused. A room that was never read may have any policy."""
        known = self._policies.is_remembered(join.room_id)
        return not known or self._checks.may_refuse(self._policies.last_known(join.room_id))

    async def _forward(self, join: Join, forward: Forward, body: bytes) -> Answer:
        with self._log.stage(join.decision, Stage.UPSTREAM):
            return await forward(body, join.deadline.at)
