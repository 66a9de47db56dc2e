# SPDX-License-Identifier: Apache-2.0
"""Ending a call: everybody is removed, and may come back."""

from __future__ import annotations

from attrs import define
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from lotusguard.clients.waiting import Deadline
from lotusguard.guard.calls.removal import Remover
from lotusguard.guard.seats.registry import TokenRegistry
from lotusguard.guard.seats.roster import Roster

log = Logger()

ENDED = "ended"
"""The reason of these removals, in logs and metrics."""


@define(eq=False)
class CallEnder:
    """Removes all participants of a Matrix room's call, in all its slots."""

    _roster: Roster
    _registry: TokenRegistry
    _remover: Remover
    _clock: IReactorTime
    _lookup_timeout: float

    async def end(self, room_id: str, by: str) -> int:
        """:return: how many participants were removed.

        :raises DependencyFailed: LiveKit does not tell who is in the call. :raises TimeoutError: not in time.
        """
        deadline, now = Deadline.after(self._clock, self._lookup_timeout), self._clock.seconds()
        removed = 0
        for alias, listing in await self._roster.list_all(room_id, now, deadline):
            slot = await self._registry.slot_of(alias)
            if slot is None:
                continue
            for participant in listing.value:
                user = await self._registry.user_behind(alias, participant.identity)
                if await self._remover.remove(slot, alias, participant.sid, participant.identity, user, ENDED):
                    removed += 1
        log.info(
            "{by} ended the call of {room_id}: {count} participants removed",
            by=by, room_id=room_id, count=removed, event_name="call_ended",
        )  # fmt: skip
        return removed
