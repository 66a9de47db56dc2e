# SPDX-License-Identifier: Apache-2.0
"""Finding a seat for a join, and giving it back unless a token is issued for it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from attrs import define
from twisted.internet.defer import CancelledError, Deferred, TimeoutError
from twisted.internet.interfaces import IReactorTime

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.guard.joins.checks import EntryChecks, MustWait
from lotusguard.guard.joins.decisions import Stage
from lotusguard.guard.joins.join import Join
from lotusguard.guard.seats.book import SeatBook
from lotusguard.guard.seats.roster import Roster
from lotusguard.metrics import Metrics
from lotusguard.rules.identity import possible_identities
from lotusguard.rules.refusals import JoinRefused, Refusal

ROSTER_AGE = 4.0
"""Seconds that a listing may be old when somebody is let in. While ``GUARD_RECONCILE_INTERVAL`` is shorter, reconciling
makes the next one sooner, so that joins to a large call rarely wait for one. Before a refusal it is never older than
the request."""
SLOTS_RETRY = 60.0
"""Seconds after which a slot of a room that has too many may be free."""


@define(eq=False)
class Seating:
    """Holds seats for joins."""

    _seats: SeatBook
    _roster: Roster
    _checks: EntryChecks
    _clock: IReactorTime
    _metrics: Metrics

    @asynccontextmanager
    async def seat(self, join: Join) -> AsyncIterator[str | None]:
        """The ID of a hold for this join. It is released at the end unless a token was issued for it.

        ``None`` if the join goes on without a seat, because nobody can tell or in a dry run.

        :raises JoinRefused: there is no seat.
        """
        hold_id = await self._failing_open(join)
        try:
            yield hold_id
        finally:
            if hold_id is not None:
                await self._seats.release(join.room_id, hold_id)

    async def _failing_open(self, join: Join) -> str | None:
        try:
            return await self._find(join)
        except (JoinRefused, MustWait, CancelledError):
            raise
        except TimeoutError:
            join.unenforced("limit", "timeout")
        except DependencyFailed as failed:
            join.unenforced("limit", failed.reason)
        except Exception:
            join.log.failure(join.decision, "limit")
        return None

    async def _find(self, join: Join) -> str | None:
        """Take a seat, waiting behind requests in flight if only they fill the room."""
        waited = unused = False
        try:
            while True:
                taken = await self._take(join)
                if isinstance(taken, str):
                    unused = False
                    return taken
                if taken is Refusal.SEAT_PENDING:
                    unused = False
                    if not await self._wait(join, again=waited):
                        return None
                    waited = unused = True
                    await self._checks.see_policy_after_wait(join)
                elif not await self._has_new_policy(join, taken):
                    await self._refuse(join, taken)
                    return None
        finally:
            if unused:  # others may find a seat that this join was woken for
                await self._seats.wake_all(join.room_id)

    async def _take(self, join: Join) -> str | Refusal:
        """Look for a free seat and take it, on a roster that is fresh enough for the answer."""
        policy = join.policy
        exempt = policy.max_users is not None and policy.bypasses_limit(join.user)
        since = self._clock.seconds() - ROSTER_AGE
        if policy.max_users is not None and not exempt:
            await self._see_to_listing(join, since)
            await self._roster.exempt(join.room_id, policy)
        refreshed: float | None = None
        while True:
            taken = await self._take_in_time(join, exempt=exempt)
            if self._seats.unshared and policy.max_users is not None:
                join.unenforced("limit", "redis")
            if isinstance(taken, str):
                return taken
            if taken is not Refusal.TOO_MANY_SLOTS and await self._is_recognised(join):
                continue
            if taken is Refusal.SEAT_PENDING:
                return taken
            required = await self._listing_required(join, taken)
            if required is None or (refreshed is not None and refreshed >= required):
                return taken
            await self._refresh(join, required)
            refreshed = required

    async def _take_in_time(self, join: Join, *, exempt: bool) -> str | Refusal:
        """Take a seat if one is free. A wait for other guards takes nothing from the join's time for lookups.

        :raises TimeoutError: not in time.
        """
        taking = self._seats.take(
            join.room_id, join.user, join.policy.max_users, join.alias, exempt=exempt, new_slot=not join.is_main_slot
        )
        if not self._seats.is_remote:
            return await taking
        with join.waiting():
            return await join.deadline.wait(Deferred.fromCoroutine(taking))

    async def _see_to_listing(self, join: Join, since: float) -> None:
        """An owner of a seat is let in whoever is in the call, so they need no listing. Where this question costs a
        round trip, it is asked only if LiveKit does not answer.
        """
        if await self._roster.is_listed(join.room_id, since, join.request.slot_id):
            return
        if not self._seats.is_remote and await self._seats.owns_seat(join.room_id, join.user):
            return
        try:
            await self._refresh(join, since)
        except (DependencyFailed, TimeoutError):
            if not (self._seats.is_remote and await self._seats.owns_seat(join.room_id, join.user)):
                raise

    async def _is_recognised(self, join: Join) -> bool:
        """Whether the user turns out to be in the call under an identity that only their own request explains.

        This happens after our memory was lost: a hashed identity says nothing about its user.
        """
        identities = possible_identities(join.user, join.request.device_id or "", join.request.member_id)
        await self._seats.recognise(join.room_id, join.alias, identities, join.user)
        return await self._seats.owns_seat(join.room_id, join.user)

    async def _listing_required(self, join: Join, refusal: Refusal) -> float | None:
        """When a listing must have begun that such a refusal may rest on; ``None`` if it needs none."""
        ended = await self._seats.listing_required_since(join.room_id)
        if refusal is Refusal.TOO_MANY_SLOTS:
            return ended
        return max(join.arrived, join.arrived if ended is None else ended)

    async def _refresh(self, join: Join, since: float) -> None:
        with join.log.stage(join.decision, Stage.ROSTER):
            await self._roster.refresh(join.room_id, since, join.lookups, join.request.slot_id)

    async def _wait(self, join: Join, *, again: bool) -> bool:
        """Wait until a seat may be free.

        :return: whether to look again. Not in a dry run whose deadline passed behind requests in flight.
        :raises JoinRefused: it passed, and this is no dry run.
        """
        waiting = Deferred.fromCoroutine(self._seats.wait_for_seat(join.room_id, join.user, again=again))
        try:
            with join.waiting(), join.log.stage(join.decision, Stage.SEAT):
                await join.deadline.wait(waiting)
        except TimeoutError:
            join.refuse(Refusal.SEAT_PENDING)
            return False
        return True

    async def _has_new_policy(self, join: Join, refusal: Refusal) -> bool:
        """Read the policy as it is now: a refusal rests on nothing older than the request."""
        if refusal is not Refusal.FULL:
            return False
        before = join.policy
        await self._checks.read_policy_again(join)
        return join.policy != before

    async def _refuse(self, join: Join, refusal: Refusal) -> None:
        """:raises JoinRefused: except in a dry run."""
        if refusal is Refusal.TOO_MANY_SLOTS:
            self._metrics.slots_rejected.inc()
            join.refuse(refusal, SLOTS_RETRY)
            return
        holders = sorted(await self._seats.occupants(join.room_id))
        join.decision.holders = holders
        join.decision.seats = f"limit {join.policy.max_users}, {len(holders)} users in the call or about to join"
        join.refuse(refusal)
