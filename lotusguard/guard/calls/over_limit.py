# SPDX-License-Identifier: Apache-2.0
"""Participants over a room's limit: without a seat, in a room that is certainly full."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import define
from twisted.internet.interfaces import IReactorTime

from lotusguard.clients.waiting import Deadline, gather_in_turns
from lotusguard.guard.calls.participants import PARTICIPANTS_AT_ONCE, ParticipantEnforcer
from lotusguard.guard.calls.removal import Remover
from lotusguard.guard.rooms.policies import Freshness, KnownPolicy
from lotusguard.guard.seats.book import OverLimit, SeatBook
from lotusguard.guard.seats.registry import Slot
from lotusguard.guard.seats.roster import Roster
from lotusguard.rules.refusals import Refusal


@define(eq=False)
class LimitEnforcer:
    """Removes participants over the limit, wherever in the Matrix room.

    :ivar eject: remove them; else only say so.
    """

    _roster: Roster
    _seats: SeatBook
    _participants: ParticipantEnforcer
    _remover: Remover
    _clock: IReactorTime
    _lookup_timeout: float
    eject: bool

    async def enforce(self, slot: Slot, known: KnownPolicy, since: float) -> None:
        """Remove them. While the room's policy is unknown, everybody in the call gets a seat instead.

        :param since: when the listing began that brought us here. In the room's other slots somebody may have left
            before: while that is unknown, nobody is removed.
        :raises DependencyFailed: another slot of the room could not be listed. :raises TimeoutError: not in time.
        """
        room_id, limit = slot.room_id, known.policy.max_users
        if known.freshness is Freshness.UNKNOWN:
            await self._seats.seat_everybody(room_id)  # nobody who comes in now is removed for it later
            return
        if limit is None or self._seats.unshared:
            return
        await self._roster.exempt(room_id, known.policy)
        if not await self._seats.overflow(room_id, limit):
            return
        deadline = Deadline.after(self._clock, self._lookup_timeout)
        await self._roster.refresh(room_id, since, deadline, slot.slot_id)
        over = await self._seats.overflow(room_id, limit)
        if self.eject and self._participants.acts:
            await self._remove_newest_first(slot, over, limit)
            return
        for hold in over:
            self._participants.skipped("remove", room_id, hold.alias, hold.identity, Refusal.FULL.value, hold.sid)
        await self._seats.seat_everybody(room_id)

    async def _remove_newest_first(self, slot: Slot, over: Sequence[OverLimit], limit: int) -> None:
        """Remove several at once, the latest arrivals first: a seat that becomes free goes to the earliest.

        Of those who are left at most half are removed at once. Then it is asked again who has no seat.
        """

        async def remove(hold: OverLimit) -> None:
            await self._remover.remove(slot, hold.alias, hold.sid, hold.identity, hold.user, Refusal.FULL.value)

        left = list(over)
        while left:
            still = await self._seats.overflow(slot.room_id, limit)
            if not await self._remover.may_remove(slot.room_id):
                return
            stay = max(len(left) // 2, len(left) - PARTICIPANTS_AT_ONCE)
            await gather_in_turns(PARTICIPANTS_AT_ONCE, remove, [hold for hold in left[stay:] if hold in still])
            del left[stay:]
