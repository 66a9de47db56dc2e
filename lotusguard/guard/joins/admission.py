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
from lotusguard.clients.waiting import Deadline
from lotusguard.guard.joins.callers import Caller, Identified
from lotusguard.guard.joins.checks import EntryChecks, MustWait
from lotusguard.guard.joins.decisions import Decision, DecisionLog, Stage, Verdict
from lotusguard.guard.joins.issuing import TokenIssuer, no_token
from lotusguard.guard.joins.join import Join
from lotusguard.guard.joins.lookups import Lookups
from lotusguard.guard.joins.patience import SILENT, InLobby, Patience
from lotusguard.guard.joins.seating import Seating
from lotusguard.guard.lobby import POLL_AGAIN, Lobby, LobbyStopped
from lotusguard.guard.lobby.colours import colour_of
from lotusguard.guard.rooms.policies import Freshness, Policies
from lotusguard.rules.lobby import TABLE, LobbyEntry
from lotusguard.rules.refusals import JoinRefused, Refusal
from lotusguard.rules.requests import TokenRequest

Forward = Callable[[bytes, float], Awaitable[Answer]]
"""Sends a body to upstream; the second argument is the time on the guard's clock by which it must have answered."""
SLACK = 0.5
"""Seconds that a join may take beside lookups and upstream."""


@define(eq=False)
class Admission:
    """Decides joins.

    :param lookup_timeout: seconds for what is asked of the homeserver and LiveKit, all together.
    :param upstream_timeout: seconds for upstream's answers, all together.
    :param longest_wait: seconds that a request may be held in a lobby, all its waits together.
    """

    _lookups: Lookups
    _policies: Policies
    _checks: EntryChecks
    _seating: Seating
    _issuer: TokenIssuer
    _log: DecisionLog
    _clock: IReactorTime
    _lookup_timeout: float
    _upstream_timeout: float
    dry_run: bool
    _lobby: Lobby
    _longest_wait: float

    async def join(
        self, request: TokenRequest, request_id: str, forward: Forward, patience: Patience = SILENT
    ) -> Answer:
        """Decide one token request.

        :param patience: how its client waits in a lobby.
        :raises JoinRefused: the guard refuses it. :raises UpstreamFailed: upstream gives no answer.
        :raises InLobby: the client polls, and has to wait. :raises LobbyStopped: the guard stops.
        """
        decision = self._log.begin(request_id, request.route.path, request.room_id, request.user)
        try:
            return await self._decide(request, decision, forward, patience)
        except InLobby:
            decision.verdict, decision.reason = Verdict.WAITING, "lobby"
            raise
        except LobbyStopped:
            decision.verdict, decision.reason = Verdict.FAILED, "guard_stopped"
            raise
        except JoinRefused as refused:
            decision.reason = refused.refusal.value
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

    async def _decide(self, request: TokenRequest, decision: Decision, forward: Forward, patience: Patience) -> Answer:
        arrived = decision.began
        deadline = Deadline(self._clock, arrived + self._lookup_timeout + self._upstream_timeout + SLACK)
        lookups = Deadline(self._clock, arrived + self._lookup_timeout)
        join = Join(
            request, request.room_id or "", decision, self._log, deadline, lookups, self._lookup_timeout, self.dry_run
        )
        if request.room_id is None:
            return await self._admit_without_room(join, forward)
        try:
            if request.openid is not None:
                self._checks.homeserver_may_join(join, request.openid.server_name)
            await self._lookups.all_of(join)
            return await self._admit_after_waiting(join, forward, patience)
        except (JoinRefused, UpstreamFailed, CancelledError, InLobby, LobbyStopped):
            raise
        except Exception:
            self._log.failure(decision, "join")
        return await self._admit_unchecked(join, forward)

    async def _admit_without_room(self, join: Join, forward: Forward) -> Answer:
        """The body names no room, so that upstream refuses it. A token that it issues all the same is rebuilt."""
        join.decision.reason = "no_room"
        answer = await self._forward(join, forward, join.request.body)
        return self._issuer.rebuild(join, answer)

    async def _admit_unchecked(self, join: Join, forward: Forward) -> Answer:
        """Our own code failed: the join goes on without a seat, and its token is rebuilt as far as that is possible."""
        if join.deadline.passed:  # it waited in the lobby
            join.deadline = Deadline.after(self._clock, self._upstream_timeout + SLACK)
        answer = await self._forward(join, forward, join.request.body)
        token = self._issuer.read(join, answer)
        if token is not None and not join.user:
            join.user = join.decision.user = self._issuer.named_user(join, token)
        if join.known.freshness is Freshness.UNKNOWN:
            await self._lookups.policy(join, join.deadline.sooner(self._lookup_timeout))
        return await self._issuer.issue(join, answer, None)

    # -- waiting in the lobby ------------------------------------------------------------------------------

    async def _admit_after_waiting(self, join: Join, forward: Forward, patience: Patience) -> Answer:
        """After a wait in the lobby everything is decided anew."""
        caller = join.caller
        while True:
            try:
                if caller.identified is Identified.PROVEN:
                    return await self._admit(join, forward)
                return await self._admit_when_named(join, forward)
            except MustWait as must_wait:
                await self._wait_in_lobby(join, must_wait.entry, patience)
                join = await self._begin_anew(join, caller)

    async def _wait_in_lobby(self, join: Join, entry: LobbyEntry, patience: Patience) -> None:
        """Returns when the join may be decided anew. :raises JoinRefused: a moderator denied it, or nobody answered."""
        if patience.polls:
            raise InLobby(entry.id, colour_of(join.user), POLL_AGAIN)
        patience.begin()
        with self._log.stage(join.decision, Stage.LOBBY):
            until = join.decision.began + self._longest_wait
            state = await self._lobby.wait(join.room_id, join.user, until, patience.is_silent)
        refusal = TABLE[state].refusal if state is not None else None
        if refusal is None and self._clock.seconds() >= until:
            refusal = Refusal.NOBODY_ADMITTED
        if refusal is not None:
            raise JoinRefused(refusal)

    async def _begin_anew(self, waited: Join, caller: Caller) -> Join:
        """The same join, as if the request had arrived now."""
        now = self._clock.seconds()
        join = Join(
            waited.request, waited.room_id, waited.decision, waited.log,
            Deadline(self._clock, now + self._lookup_timeout + self._upstream_timeout + SLACK),
            Deadline(self._clock, now + self._lookup_timeout), self._lookup_timeout, waited.dry_run, caller,
            arrived=now, not_before=now,
        )  # fmt: skip
        if caller.identified is Identified.PROVEN:
            join.user = caller.user
            await self._lookups.anew(join)
        return join

    # -- the two ways through ----------------------------------------------------------------------------

    async def _admit(self, join: Join, forward: Forward) -> Answer:
        """The caller is proven: everything is decided before upstream has done anything."""
        await self._checks.may_join(join)
        async with self._seating.seat(join) as hold_id:
            answer = await self._forward(join, forward, join.request.body)
            return await self._issuer.issue(join, answer, hold_id)

    async def _admit_when_named(self, join: Join, forward: Forward) -> Answer:
        """Only upstream can tell who asks: the token is withheld until that is decided.

        Where a refusal is possible, the first request goes without its delay fields: upstream would act on them. One
        with an OpenID token may always be refused: its homeserver may vouch for a user of another one. Once the caller
        is admitted the request is repeated as it came.
        """
        request = join.request
        body = request.body
        if request.has_delay and (request.openid is not None or self._may_refuse(join)):
            body = request.without_delay()
        with join.waiting():
            answer = await self._forward(join, forward, body)
        token = self._issuer.read(join, answer)
        if token is None:
            no_token(join, answer)
            return answer
        join.user = join.decision.user = self._issuer.named_user(join, token)
        self._checks.server_may_vouch(join)
        await self._lookups.named(join)
        await self._checks.may_join(join)
        async with self._seating.seat(join) as hold_id:
            if body is not request.body:
                answer = await self._forward(join, forward, request.body)
            return await self._issuer.issue(join, answer, hold_id)

    def _may_refuse(self, join: Join) -> bool:
        """Whether the caller may turn out to be refused. A room that was never read may have any policy."""
        known = self._policies.is_remembered(join.room_id)
        return (
            not known
            or not join.is_main_slot
            or self._lobby.has_removed(join.room_id)
            or self._checks.may_refuse(self._policies.last_known(join.room_id))
        )

    async def _forward(self, join: Join, forward: Forward, body: bytes) -> Answer:
        with self._log.stage(join.decision, Stage.UPSTREAM):
            return await forward(body, join.deadline.at)
