# SPDX-License-Identifier: Apache-2.0
"""Who is in the call: one look at the SFU for all who wait for the same room. Floor: guard."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from livekit.protocol.models import ParticipantInfo
from twisted.internet.interfaces import IReactorTime

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.livekit import LiveKitClient
from lotusguard.clients.waiting import Budget, SharedLookups, gather
from lotusguard.guard.rooms.policies import Policies
from lotusguard.guard.seats.book import Present, SeatBook
from lotusguard.guard.seats.registry import Slot, TokenRegistry
from lotusguard.metrics import Metrics
from lotusguard.rules.identity import ROOM_SLOT, alias_cache_info, room_alias
from lotusguard.rules.participants import takes_seat

FEW_SLOTS = 3
"""SFU rooms of one Matrix room that are looked into without asking first which of them exist."""


class Roster:
    """Keeps the seat book in step with the SFU. The seats are what is exact; a look may be a little old."""

    def __init__(
        self,
        sfu: LiveKitClient | None,
        seats: SeatBook,
        registry: TokenRegistry,
        policies: Policies,
        clock: IReactorTime,
        metrics: Metrics,
    ) -> None:
        self._sfu = sfu
        self._seats = seats
        self._registry = registry
        self._policies = policies
        self._clock = clock
        self._looks: SharedLookups[tuple[str, str], float] = SharedLookups(self._look)
        metrics.cache_limit.labels("hashes").set(alias_cache_info().maxsize or 0)
        metrics.cache_entries.labels("hashes").set_function(lambda: alias_cache_info().currsize)

    async def fresh(self, room_id: str, slot_id: str, budget: Budget, since: float) -> None:
        """See to it that the last look at all SFU rooms of a Matrix room began at ``since`` or later.

        :param slot_id: the slot somebody is about to enter, which may not be known yet.
        :raises DependencyFailed: the SFU does not tell. :raises TimeoutError: not in time.
        """
        if self._sfu is None:
            raise DependencyFailed("livekit", "no_livekit_key")
        alias = room_alias(room_id, slot_id)
        known = {*await self._registry.aliases_of(room_id), room_alias(room_id, ROOM_SLOT), alias}
        for _ in range(2):  # a look that others wait for already may have begun too early
            if await self._seats.observed_since(room_id, known) >= since:
                return
            if await budget.wait(self._looks.get((room_id, slot_id))) >= since:
                return

    async def observed(
        self, room_id: str, alias: str, participants: Iterable[ParticipantInfo], since: float
    ) -> Collection[Present]:
        """A complete list of who is in one SFU room, asked for at ``since``."""
        present = [
            Present(p.sid or p.identity, p.identity, await self._registry.user_behind(alias, p.identity))
            for p in sorted(participants, key=lambda p: p.joined_at)  # the SFU lists them in no order
            if takes_seat(p)
        ]
        cap = self._policies.last_known(room_id).max_users
        await self._seats.observe(room_id, alias, present, cap, since)
        return present

    async def _look(self, key: tuple[str, str]) -> float:
        """Look into all SFU rooms of a Matrix room. :return: when it began."""
        assert self._sfu is not None
        room_id, slot_id = key
        asked = room_alias(room_id, slot_id)
        since = self._clock.seconds()
        lasting = {*await self._registry.aliases_of(room_id), room_alias(room_id, ROOM_SLOT)}
        aliases = lasting | {asked}
        existing: Collection[str] = aliases
        if len(aliases) > FEW_SLOTS:
            existing = aliases.intersection(room.name for room in await self._sfu.list_rooms(aliases))
        lists = await gather(self._sfu.list_participants(alias) for alias in existing)
        found = dict(zip(existing, lists, strict=True))
        for alias in aliases:
            participants = found.get(alias, ())
            if participants and alias not in lasting:  # a call that is older than the guard; the hash proves whose
                await self._registry.learn_alias(alias, Slot(room_id, slot_id))
            if participants or alias in lasting:  # a slot that is only asked for leaves no trace
                await self.observed(room_id, alias, participants, since)
        return since
