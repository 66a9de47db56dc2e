# SPDX-License-Identifier: Apache-2.0
"""Finding a seat for a join, and giving it back unless a token is issued for it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from attrs import define
from twisted.internet.defer import CancelledError, Deferred, TimeoutError
from twisted.internet.interfaces import IReactorTime

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.guard.joins.checks import EntryChecks
from lotusguard.guard.joins.decisions import Stage
from lotusguard.guard.joins.join import Join
from lotusguard.guard.seats.book import SeatBook
from lotusguard.guard.seats.roster import Roster
from lotusguard.metrics import Metrics
from lotusguard.rules.identity import possible_identities
from lotusguard.rules.refusals import JoinRefused, Refusal

ROSTER_AGE = 2.0
"""Seconds that a listing may be old when somebody is let in. Before a refusal it is never older than the request."""
SLOTS_RETRY = 60.0
"""Seconds after which a slot of a room that has too many may be free."""


@define(eq=False)
class Seating:
    """Holds seats for joins.

    :param lookup_timeout: seconds for one look at the roster after waiting for a seat.
    """

    _seats: SeatBook
    _roster: Roster
    _checks: EntryChecks
    _clock: IReactorTime
    _metrics: Metrics
    _lookup_timeout: float

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
        except (JoinRefused, CancelledError):
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
        waited = False
        try:
            while True:
                taken = await self._take(join, waited)
                if isinstance(taken, str):
                    waited = False
                    return taken
                if taken is not Refusal.SEAT_PENDING:
                    return await self._refuse(join, taken)
                with join.log.stage(join.decision, Stage.SEAT):
                    await self._wait(join, again=waited)
                waited = True
        finally:
            if waited:  # others may find a seat that this join was woken for
                await self._seats.wake_all(join.room_id)

    async def _take(self, join: Join, waited: bool) -> str | Refusal:
        """Look for a free seat and take it, on a roster that is fresh enough for the answer."""
        policy = join.policy
        needs_no_roster = (
            policy.max_users is None
            or policy.bypasses_limit(join.user)
            or await self._seats.owns_seat(join.room_id, join.user)
        )
        deadline = join.deadline.sooner(self._lookup_timeout if waited else join.lookups.left())
        since = self._clock.seconds() - ROSTER_AGE
        while True:
            if not needs_no_roster:
                with join.log.stage(join.decision, Stage.ROSTER):
                    await self._roster.refresh(join.room_id, since, deadline, join.request.slot_id)
            taken = await self._seats.take(
                join.room_id, join.user, policy.max_users, join.alias,
                exempt=policy.max_users is not None and policy.bypasses_limit(join.user),
                new_slot=not join.is_main_slot,
            )  # fmt: skip
            if taken is not Refusal.FULL:
                return taken
            if await self._is_recognised(join):
                needs_no_roster = True
                continue
            required = max(join.arrived, await self._seats.listing_required_since(join.room_id) or join.arrived)
            if since >= required:
                return taken
            since = required

    async def _is_recognised(self, join: Join) -> bool:
        """Whether the user turns out to be in the call under an identity that only their own request explains.

        This happens after our memory was lost: a hashed identity says nothing about its user.
        """
        identities = possible_identities(join.user, join.request.device_id or "", join.request.member_id)
        await self._seats.recognise(join.room_id, join.alias, identities, join.user)
        return await self._seats.owns_seat(join.room_id, join.user)

    async def _wait(self, join: Join, *, again: bool) -> None:
        """:raises JoinRefused: the deadline passed behind requests in flight."""
        waiting = Deferred.fromCoroutine(self._seats.wait_for_seat(join.room_id, join.user, again=again))
        try:
            await join.deadline.wait(waiting)
        except TimeoutError:
            join.refuse(Refusal.SEAT_PENDING)

    async def _refuse(self, join: Join, refusal: Refusal) -> str | None:
        """There is no seat. :raises JoinRefused: unless the room's limit has changed, or in a dry run."""
        if refusal is Refusal.TOO_MANY_SLOTS:
            self._metrics.slots_rejected.inc()
            join.refuse(refusal, SLOTS_RETRY)
            return None
        before = join.policy
        await self._checks.read_policy_again(join)
        if join.policy != before:
            taken = await self._take(join, waited=False)
            if isinstance(taken, str):
                return taken
        limit = join.policy.max_users
        join.decision.seats = f"all {limit} seats are taken"
        join.refuse(refusal)
        return None
