# SPDX-License-Identifier: Apache-2.0
"""How a join is decided, from the request that was read to the answer that is given.

The steps and their order are those of the README's diagram. Each check fails open on its own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from attrs import define
from twisted.internet.defer import CancelledError
from twisted.internet.interfaces import IReactorTime

from lotusguard.clients.http import Answer
from lotusguard.clients.lk_jwt_service import UpstreamFailed
from lotusguard.clients.waiting import Deadline, gather
from lotusguard.guard.joins.callers import Caller, Callers, Identified
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

UNIDENTIFIED = Caller(Identified.UNKNOWN, reason="internal_error")


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
    dry_run: bool

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
        join = Join(request, request.room_id, decision, self._log, deadline, lookups, self.dry_run)
        try:
            return await self._judge(join, forward)
        except (JoinRefused, UpstreamFailed, CancelledError):
            raise
        except Exception:
            self._log.failure(decision, "join")
        return await self._admit_unchecked(join, forward)

    async def _admit_unchecked(self, join: Join, forward: Forward) -> Answer:
        """Our own code failed: the join goes on without a seat, and its token is rebuilt as far as that is possible."""
        answer = await self._forward(join, forward, join.request.body)
        token = self._issuer.read(join, answer)
        if token is not None and not join.user:
            join.user = join.decision.user = self._issuer.named_user(join, token)
        try:
            await self._look_up_policy(join)
        except CancelledError:
            raise
        except Exception:
            self._log.failure(join.decision, "policy")
        return await self._issuer.issue(join, answer, None)

    async def _judge(self, join: Join, forward: Forward) -> Answer:
        """Whatever of our own fails in here, the join goes on without a seat, and its token is still rebuilt."""
        if join.request.openid is not None:
            self._checks.homeserver_may_join(join, join.request.openid.server_name)
        caller = await self._look_up(join)
        if caller.identified is Identified.PROVEN:
            return await self._admit(join, forward)
        return await self._admit_when_named(join, forward)

    # -- lookups -----------------------------------------------------------------------------------------

    async def _look_up(self, join: Join) -> Caller:
        """Find out who asks and what the room wants.

        For a room that is not in memory nothing is looked up before the caller is known.
        """
        with self._log.stage(join.decision, Stage.LOOKUP):
            try:
                if not self._policies.is_remembered(join.room_id):
                    await self._identify(join)
                    caller = join.caller or UNIDENTIFIED
                    if caller.identified is Identified.PROVEN:
                        await self._look_up_room(join)
                    return caller
                await gather((self._identify(join), self._look_up_policy(join)))
                caller = join.caller or UNIDENTIFIED
                if caller.identified is Identified.PROVEN:
                    await self._look_up_membership(join)
                return caller
            except CancelledError:
                raise
            except Exception:
                self._log.failure(join.decision, "lookups")
                return join.caller or UNIDENTIFIED

    async def _identify(self, join: Join) -> None:
        caller = join.caller = await self._callers.identify(join.request, join.lookups)
        if caller.identified is Identified.PROVEN:
            join.user = join.decision.user = caller.user

    async def _look_up_room(self, join: Join) -> None:
        await gather((self._look_up_policy(join), self._look_up_membership(join)))

    async def _look_up_policy(self, join: Join) -> None:
        deadline = join.lookups
        if self._policies.is_remembered(join.room_id):
            deadline = deadline.sooner(self._lookup_timeout * STALE_SHARE)
        join.known = await self._policies.get(join.room_id, deadline)
        if join.known.freshness is Freshness.UNKNOWN:
            join.unenforced("policy", join.known.reason)
        elif join.policy:
            join.decision.reason = "policy" if join.known.is_certain else "stale_policy"

    async def _look_up_membership(self, join: Join) -> None:
        if self._checks.asks_membership:
            deadline = join.lookups.sooner(self._lookup_timeout * STALE_SHARE)
            join.membership = await self._members.get(join.room_id, join.user, deadline)

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
        if request.has_delay and self._checks.may_refuse(self._policies.last_known(join.room_id)):
            body = request.without_delay()
        answer = await self._forward(join, forward, body)
        token = self._issuer.read(join, answer)
        if token is None:
            no_token(join, answer)
            return answer
        join.user = join.decision.user = self._issuer.named_user(join, token)
        join.lookups = join.deadline.sooner(self._lookup_timeout)
        with self._log.stage(join.decision, Stage.LOOKUP):
            await self._look_up_room(join)
        await self._checks.may_join(join)
        async with self._seating.seat(join) as hold_id:
            if body is not request.body:
                answer = await self._forward(join, forward, request.body)
            return await self._issuer.issue(join, answer, hold_id)

    async def _forward(self, join: Join, forward: Forward, body: bytes) -> Answer:
        with self._log.stage(join.decision, Stage.UPSTREAM):
            return await forward(body, join.deadline.at)
