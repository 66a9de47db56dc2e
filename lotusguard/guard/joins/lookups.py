# SPDX-License-Identifier: Apache-2.0
"""What a join has to know before it can be decided: who asks, what the room wants, and whether they are a member."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from attrs import define, field
from twisted.internet.defer import CancelledError

from lotusguard.clients.waiting import Deadline, gather
from lotusguard.guard.joins.callers import Callers, Identified
from lotusguard.guard.joins.decisions import Stage
from lotusguard.guard.joins.join import LEAST_LOOKUPS, Join
from lotusguard.guard.joins.user_turns import RETRY, TooManyLookups, UserTurns
from lotusguard.guard.rooms.members import Members
from lotusguard.guard.rooms.policies import Policies
from lotusguard.rules.refusals import JoinRefused, Refusal

STALE_SHARE = 2 / 3
"""Part of the lookup timeout after which the last known policy serves; the rest is for the roster."""

Lookup = Callable[[Join, Deadline], Awaitable[None]]


@define(eq=False)
class Lookups:
    """Looks up what a join needs, and notes it there. Each lookup fails open on its own.

    :param asks_membership: whether any check wants to know it.
    """

    _callers: Callers
    _policies: Policies
    _members: Members
    _asks_membership: bool
    _turns: UserTurns = field(factory=UserTurns, init=False)

    async def all_of(self, join: Join) -> None:
        """Find out who asks and what the room wants, concurrently.

        For a room that is not in memory, or did not exist, nothing is looked up before the caller is known. For one
        that is, a slow homeserver leaves time to ask LiveKit. A policy that needs no lookup needs nothing done at once
        either.
        """
        with join.log.stage(join.decision, Stage.LOOKUP):
            known = self._policies.in_memory(join.room_id)
            if known is not None:
                join.learn_policy(known)
                await self._caller(join, join.lookups, self._membership)
            elif self._policies.has_existed(join.room_id):
                deadline = join.lookups.sooner(join.lookup_timeout * STALE_SHARE)
                await gather((self._caller(join, deadline, self._membership), self.policy(join, deadline)))
            else:
                await self._caller(join, join.lookups, self._unknown_room)

    async def named(self, join: Join) -> None:
        """What is to be known once upstream has named the caller."""
        with join.log.stage(join.decision, Stage.LOOKUP):
            if self._policies.has_existed(join.room_id) or self._policies.in_memory(join.room_id) is not None:
                await self._room(join, join.lookups)
            else:
                await self._unknown_room(join, join.lookups)

    async def anew(self, join: Join) -> None:
        """What may have changed while a proven caller waited."""
        with join.log.stage(join.decision, Stage.LOOKUP):
            await self._room(join, join.lookups)

    async def policy(self, join: Join, deadline: Deadline) -> None:
        """The room's policy, no older than the join asks for."""
        try:
            join.learn_policy(await self._policies.get_anew(join.room_id, deadline, join.not_before))
        except CancelledError:
            raise
        except Exception:
            join.log.failure(join.decision, "policy")

    async def _caller(self, join: Join, deadline: Deadline, then: Lookup) -> None:
        """Leaves time for what has to be looked up when upstream has named a caller whom the homeserver did not.

        :param then: what is looked up once the caller is proven.
        """
        try:
            by = deadline.sooner(join.lookup_timeout * (1 - LEAST_LOOKUPS))
            caller = join.caller = await self._callers.identify(join.request, by)
            if caller.identified is Identified.PROVEN:
                join.user = join.decision.user = caller.user
                await then(join, deadline)
        except (JoinRefused, CancelledError):
            raise
        except Exception:
            join.log.failure(join.decision, "caller")

    async def _room(self, join: Join, deadline: Deadline) -> None:
        await gather((self.policy(join, deadline), self._membership(join, deadline)))

    async def _unknown_room(self, join: Join, deadline: Deadline) -> None:
        await gather((self._policy_in_turn(join, deadline), self._membership(join, deadline)))

    async def _policy_in_turn(self, join: Join, deadline: Deadline) -> None:
        """However many rooms one user names, lookups for the others are not late.

        :raises JoinRefused: the user asks for too many rooms at once.
        """
        left = deadline.left()
        try:
            async with self._turns.of(join):
                await self.policy(join, join.deadline.sooner(left))
        except TooManyLookups:
            join.refuse(Refusal.TOO_MANY_LOOKUPS, RETRY)
            join.unenforced("policy", "too_many_lookups")

    async def _membership(self, join: Join, deadline: Deadline) -> None:
        if not self._asks_membership:
            return
        try:
            join.membership = await self._members.get(join.room_id, join.user, deadline, not_before=join.not_before)
        except CancelledError:
            raise
        except Exception:
            join.log.failure(join.decision, "membership")
