# SPDX-License-Identifier: Apache-2.0
"""The roster of each call, from listings and webhooks. Nothing else writes arrivals and departures into the book."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from hashlib import blake2b

from attrs import define, field, frozen
from cachetools import LRUCache
from livekit.protocol.models import ParticipantInfo
from livekit.protocol.webhook import WebhookEvent
from twisted.internet.interfaces import IReactorTime

from lotusguard.clients.livekit import LiveKitClient
from lotusguard.clients.waiting import Deadline, Fetched, FreshLookups, gather, in_slices
from lotusguard.guard.rooms.policies import Policies
from lotusguard.guard.seats.book import SeatBook
from lotusguard.guard.seats.registry import Slot, TokenRegistry
from lotusguard.metrics import Metrics
from lotusguard.rules.identity import ROOM_SLOT, alias_cache_info, room_alias
from lotusguard.rules.participants import ended_by_choice, joined_at, takes_seat
from lotusguard.rules.policy import Policy
from lotusguard.rules.seats import Arrival

Listing = Fetched[Sequence[ParticipantInfo]]
"""Everybody in one SFU room, and when that was asked."""
LISTINGS_REMEMBERED = 20_000
SLOTS_LISTED = 16
"""SFU rooms of one Matrix room that are listed while it is unknown which of them exist."""


@frozen
class _Applied:
    """The last listing of an SFU room that was applied to the seats.

    :ivar digest: of its participants. :ivar number: no other listing has it.
    """

    digest: bytes
    number: int


@define(eq=False)
class Roster:
    """Keeps the seat book in step with LiveKit.

    :param lookup_timeout: seconds to wait for a policy.
    :param guarding_since: since when every token should have come from this guard, on its clock.
    :ivar sfu_rooms: the SFU rooms that LiveKit named lately; ``None`` while it has named none.
    """

    _livekit: LiveKitClient
    _seats: SeatBook
    _registry: TokenRegistry
    _policies: Policies
    _clock: IReactorTime
    _metrics: Metrics
    _lookup_timeout: float
    _guarding_since: float
    sfu_rooms: set[str] | None = field(default=None, init=False)
    _listings: FreshLookups[str, Sequence[ParticipantInfo]] = field(init=False)
    _unissued: dict[str, int] = field(factory=dict, init=False)
    _applied: LRUCache[str, _Applied] = field(factory=lambda: LRUCache(LISTINGS_REMEMBERED), init=False)
    _numbers: int = field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        self._listings = FreshLookups(self._list, self._clock)
        self._metrics.unissued_participants.set_function(lambda: self.unissued)
        self._metrics.cache_limit.labels("hashes").set(alias_cache_info().maxsize or 0)
        self._metrics.cache_entries.labels("hashes").set_function(lambda: alias_cache_info().currsize)

    # -- listings ----------------------------------------------------------------------------------------

    async def refresh(self, room_id: str, since: float, deadline: Deadline, requested: str = ROOM_SLOT) -> None:
        """See to it that every SFU room of a Matrix room was listed at ``since`` or later.

        :param requested: the slot that somebody is about to enter. It is listed only if LiveKit or a token named it:
            an invented slot costs nothing.
        :raises DependencyFailed: LiveKit does not tell. :raises TimeoutError: not in time.
        """
        aliases = await self._aliases_to_list(room_id, requested)
        listed = await self._seats.listed_since(room_id, aliases)
        if listed is None or listed < since:
            await gather(self._refresh_one(room_id, alias, since, deadline) for alias in aliases)

    async def is_listed(self, room_id: str, since: float, requested: str = ROOM_SLOT) -> bool:
        """Whether `refresh` would find nothing to do."""
        listed = await self._seats.listed_since(room_id, await self._aliases_to_list(room_id, requested))
        return listed is not None and listed >= since

    async def _refresh_one(self, room_id: str, alias: str, since: float, deadline: Deadline) -> None:
        listed = await self._seats.listed_since(room_id, [alias])
        if listed is None or listed < since:
            await self.list(alias, since, deadline)

    async def list(self, alias: str, since: float, deadline: Deadline) -> Listing:
        """A listing of one SFU room that began at ``since`` or later. At most one is in flight for each room.

        :raises DependencyFailed: LiveKit does not tell. :raises TimeoutError: not in time.
        """
        return await deadline.wait(self._listings.get(alias, since))

    async def _list(self, alias: str) -> Sequence[ParticipantInfo]:
        since = self._clock.seconds()
        slot = await self._registry.slot_of(alias)
        participants = await self._livekit.list_participants(alias, turn=slot.room_id if slot is not None else alias)
        if slot is not None:
            digest = await self._digest(participants)
            # The policy was read before the listing was asked for. It is not read again: the homeserver may be slow.
            limit = self._policies.last_known(slot.room_id).max_users
            before = self._applied.pop(alias, None)
            if before is None or before.digest != digest or not await self._seats.listed_again(
                slot.room_id, alias, limit, since
            ):  # fmt: skip
                await self._apply(slot, alias, participants, limit, since)
                self._numbers += 1
                before = _Applied(digest, self._numbers)
            self._applied[alias] = before
        return participants

    async def _apply(
        self, slot: Slot, alias: str, participants: Sequence[ParticipantInfo], limit: int | None, since: float
    ) -> None:
        await self._registry.read_ahead(alias, [participant.identity for participant in participants])
        present = [await self._arrival(alias, p) async for p in in_slices(self._clock, participants) if takes_seat(p)]
        await self._count_unissued(alias, present)
        await self._seats.apply_listing(slot.room_id, alias, present, limit, since)

    async def _digest(self, participants: Sequence[ParticipantInfo]) -> bytes:
        """The same for listings that show the same. LiveKit lists participants in any order."""
        parts = [
            participant.SerializeToString(deterministic=True)
            async for participant in in_slices(self._clock, participants)
        ]
        return blake2b(b"".join(sorted(parts)), digest_size=16).digest()

    def last_news(self, alias: str) -> int | None:
        """The number of the last listing that told anything new about an SFU room, or about its seats since the one
        before; ``None`` if that is not remembered."""
        applied = self._applied.get(alias)
        return applied.number if applied is not None else None

    async def list_all(
        self, room_id: str, since: float, deadline: Deadline, requested: str = ROOM_SLOT
    ) -> Sequence[tuple[str, Listing]]:
        """Listings of all SFU rooms of a Matrix room, each begun at ``since`` or later.

        :param requested: as for `refresh`. :raises DependencyFailed: LiveKit does not tell. :raises TimeoutError:
        """
        # This guard may not have read the policy for a long time, if another one enforces the room.
        await self._policies.get(room_id, deadline.sooner(self._lookup_timeout / 2))
        aliases = [*await self._aliases_to_list(room_id, requested)]
        return [*zip(aliases, await gather(self.list(alias, since, deadline) for alias in aliases), strict=True)]

    async def _aliases_to_list(self, room_id: str, requested: str) -> Collection[str]:
        main = room_alias(room_id, ROOM_SLOT)
        await self._registry.learn_alias(main, Slot(room_id, ROOM_SLOT))
        if requested != ROOM_SLOT:
            alias = room_alias(room_id, requested)
            if self.sfu_rooms is not None and alias in self.sfu_rooms:  # a call that is older than this guard
                await self._registry.learn_alias(alias, Slot(room_id, requested))
        known = await self._registry.aliases_of(room_id)
        existing = self.sfu_rooms
        alive = [*known][-SLOTS_LISTED:] if existing is None else [alias for alias in known if alias in existing]
        return {main, *alive, *await self._seats.aliases(room_id)}

    async def exempt(self, room_id: str, policy: Policy) -> None:
        """Users in the call who bypass the limit take no seat from now on. They keep their place when that ends."""
        if policy.max_users is None or not policy.has_bypass:
            return
        for user in await self._seats.occupants(room_id):
            if policy.bypasses_limit(user):
                await self._seats.exempt(room_id, user)

    @property
    def unissued(self) -> int:
        """Participants whose token this guard did not issue. Upstream is reached past it, or another guard runs."""
        return sum(self._unissued.values())

    # -- webhooks ----------------------------------------------------------------------------------------

    async def handle(self, slot: Slot, event: WebhookEvent) -> None:
        """A participant of one SFU room joined or left. Idempotent."""
        participant, alias = event.participant, event.room.name
        if event.event in DEPARTURES:
            left_by = min(self._clock.seconds(), self._on_our_clock(event.created_at + 1.0) or self._clock.seconds())
            await self._seats.leave(
                slot.room_id, alias, participant.sid, participant.identity, left_by,
                by_choice=ended_by_choice(participant.disconnect_reason),
            )  # fmt: skip
        elif event.event == "participant_joined" and participant.sid and takes_seat(participant):
            limit = await self._limit(slot.room_id)
            await self._seats.arrive(slot.room_id, alias, await self._arrival(alias, participant), limit)

    def rooms_listed(self, aliases: Iterable[str]) -> None:
        """These are all of LiveKit's SFU rooms."""
        self.sfu_rooms = set(aliases)
        self._unissued = {alias: count for alias, count in self._unissued.items() if alias in self.sfu_rooms}

    def heard_of(self, alias: str, *, exists: bool) -> None:
        """LiveKit named an SFU room in a webhook. :param exists: not if it said that the room is finished."""
        if self.sfu_rooms is None:
            return
        if exists:
            self.sfu_rooms.add(alias)
        else:
            self.sfu_rooms.discard(alias)

    async def removed(self, slot: Slot, alias: str, sid: str, identity: str) -> None:
        """We removed a participant, or LiveKit said that there is none of that name."""
        now = self._clock.seconds()
        await self._seats.leave(slot.room_id, alias, sid, identity, now, by_choice=True)

    def may_exist(self, alias: str) -> bool:
        """Whether this SFU room may exist, by what LiveKit has reported."""
        return self.sfu_rooms is None or alias in self.sfu_rooms

    # -- how it is done ----------------------------------------------------------------------------------

    async def _limit(self, room_id: str) -> int | None:
        known = await self._policies.get(room_id, Deadline.after(self._clock, self._lookup_timeout))
        return known.policy.max_users

    async def _arrival(self, alias: str, participant: ParticipantInfo) -> Arrival:
        user = await self._registry.user_behind(alias, participant.identity)
        return Arrival(
            participant.sid or participant.identity, participant.identity, user,
            self._on_our_clock(joined_at(participant)),
        )  # fmt: skip

    async def _count_unissued(self, alias: str, present: Sequence[Arrival]) -> None:
        unissued = 0
        async for who in in_slices(self._clock, present):
            ours = who.joined is None or who.joined <= self._guarding_since
            if not ours and await self._registry.entry(alias, who.identity) is None:
                unissued += 1
        if unissued:
            self._unissued[alias] = unissued
        else:
            self._unissued.pop(alias, None)

    def _on_our_clock(self, at: float | None) -> float | None:
        """A time that LiveKit gave, on the guard's clock."""
        if at is None or at <= 1.0:
            return None
        ago = self._livekit.now() - at
        return self._clock.seconds() - ago


DEPARTURES = ("participant_left", "participant_connection_aborted")
