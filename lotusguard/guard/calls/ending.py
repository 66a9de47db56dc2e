# SPDX-License-Identifier: Apache-2.0
"""Ending a call: everybody is removed, and may come back."""

from __future__ import annotations

from attrs import define
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from lotusguard.clients.waiting import Deadline
from lotusguard.guard.calls.participants import ParticipantEnforcer
from lotusguard.guard.seats.book import SeatBook
from lotusguard.guard.seats.registry import Slot, TokenRegistry
from lotusguard.guard.seats.roster import Roster
from lotusguard.rules.identity import ROOM_SLOT, room_alias

log = Logger()

ENDED = "ended"
"""The reason of these removals, in logs and metrics."""


@define(eq=False)
class CallEnder:
    """Removes all participants of a Matrix room's calls, in all its slots."""

    _roster: Roster
    _seats: SeatBook
    _registry: TokenRegistry
    _participants: ParticipantEnforcer
    _clock: IReactorTime
    _lookup_timeout: float

    async def end(self, room_id: str, by: str) -> int:
        """:return: how many participants were removed.

        :raises DependencyFailed: LiveKit does not tell who is in the call. :raises TimeoutError: not in time.
        """
        deadline, now = Deadline.after(self._clock, self._lookup_timeout), self._clock.seconds()
        main = room_alias(room_id, ROOM_SLOT)
        await self._registry.learn_alias(main, Slot(room_id, ROOM_SLOT))
        removed = 0
        for alias in {main, *await self._seats.aliases(room_id)}:
            slot = await self._registry.slot_of(alias)
            if slot is None:
                continue
            for participant in (await self._roster.list(alias, now, deadline)).value:
                user = await self._registry.user_behind(alias, participant.identity)
                if await self._participants.remove(room_id, alias, participant.identity, user, ENDED):
                    await self._roster.removed(slot, alias, participant.sid, participant.identity)
                    removed += 1
        log.info(
            "{by} ended the call of {room_id}: {count} participants removed",
            by=by, room_id=room_id, count=removed, event_name="call_ended",
        )  # fmt: skip
        return removed
