# SPDX-License-Identifier: Apache-2.0
"""What leads to a pass over a call: LiveKit's webhooks, pushed changes, and reconciling every few seconds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from attrs import define, field
from cachetools import LRUCache
from livekit.protocol.webhook import WebhookEvent
from twisted.internet.interfaces import IReactorTime

from lotusguard.clients.livekit import LiveKitClient
from lotusguard.guard.calls.discovery import Discovery
from lotusguard.guard.calls.enforcement import Enforcement
from lotusguard.guard.calls.entitlement import Entitlement
from lotusguard.guard.rooms.members import Members
from lotusguard.guard.rooms.policies import Policies
from lotusguard.guard.seats.book import SeatBook
from lotusguard.guard.seats.registry import Slot, TokenRegistry
from lotusguard.guard.seats.roster import DEPARTURES, Roster
from lotusguard.metrics import Metrics
from lotusguard.rules.identity import ROOM_SLOT, room_alias

EVENTS_REMEMBERED = 10_000
EVENTS_OF_INTEREST = (*DEPARTURES, "participant_joined", "track_published", "room_finished")
COUNT_LAG = 10
"""Seconds after which a new SFU room's count of participants can be trusted: it comes up to 5 s late."""


@define(eq=False)
class CallChanges:
    """Passes on what happens to calls.

    :param tell_others: tells the guards that share their seats with this one about a changed room.
    :ivar webhook_at: when LiveKit's last genuine webhook came.
    :ivar round_at: when the last round of reconciling ended.
    """

    _livekit: LiveKitClient
    _roster: Roster
    _seats: SeatBook
    _registry: TokenRegistry
    _policies: Policies
    _members: Members
    _discovery: Discovery
    _entitlement: Entitlement
    _enforcement: Enforcement
    _clock: IReactorTime
    _metrics: Metrics
    _tell_others: Callable[[str, str], Awaitable[None]] | None = None
    webhook_at: float | None = field(default=None, init=False)
    round_at: float | None = field(default=None, init=False)
    _seen_events: LRUCache[str, None] = field(factory=lambda: LRUCache(EVENTS_REMEMBERED), init=False)

    def __attrs_post_init__(self) -> None:
        self._metrics.cache_limit.labels("webhook_ids").set(EVENTS_REMEMBERED)
        self._metrics.cache_entries.labels("webhook_ids").set_function(self._seen_events.__len__)

    async def handle_webhook(self, event: WebhookEvent) -> None:
        """LiveKit says what happened, in a webhook that was verified. Idempotent."""
        self.webhook_at = self._clock.seconds()
        if event.id and event.id in self._seen_events:
            self._metrics.webhooks.labels("duplicate").inc()
            return
        self._metrics.webhooks.labels("accepted").inc()
        if event.id:
            self._seen_events[event.id] = None
        alias = event.room.name
        if not alias or event.event not in EVENTS_OF_INTEREST:
            return
        self._roster.heard_of(alias, exists=event.event != "room_finished")
        slot = await self._registry.slot_of(alias)
        if slot is None:
            self._discovery.want(alias, self._enforcement.enforce)
            return
        await self._roster.handle(slot, event)
        if event.event in ("participant_joined", "track_published"):
            self._enforcement.enforce_arrival(alias, event.participant.identity)
        elif event.event not in DEPARTURES:
            self._enforcement.enforce(alias)

    async def room_changed(self, room_id: str, user: str = "", *, from_guard: bool = False) -> None:
        """The homeserver's module says that a room's state or memberships changed: read them again and enforce at once.

        :param user: whose membership changed, if only one did.
        :param from_guard: another guard says so; the others know.
        """
        if user:
            self._entitlement.membership_pushed()
        if self._tell_others is not None and not from_guard:
            await self._tell_others(room_id, user)
        await self.resident_room_changed(room_id, user)

    async def resident_room_changed(self, room_id: str, user: str = "") -> None:
        """The same, heard by our account in the room. It says nothing about other rooms."""
        self._policies.forget_freshness(room_id)
        self._members.forget_freshness(room_id, user)
        main = room_alias(room_id, ROOM_SLOT)
        if self._roster.may_exist(main):  # the call may be older than the guard
            await self._registry.learn_alias(main, Slot(room_id, ROOM_SLOT))
        issued = [alias for alias in await self._registry.aliases_of(room_id) if self._roster.may_exist(alias)]
        for alias in {*issued, *await self._seats.aliases(room_id)}:  # none without a call
            self._enforcement.enforce(alias)

    async def resident_room_left(self, room_id: str) -> None:
        """Our account is no longer in the room: what it heard there holds no longer."""
        self._policies.forget(room_id)
        await self.resident_room_changed(room_id)

    async def reconcile(self) -> None:
        """One round: what webhooks missed.

        It returns once LiveKit has told which rooms there are. Rooms that are still being worked on from the last round
        are left alone, so that a slow one delays no other.

        :raises DependencyFailed: LiveKit does not tell.
        """
        began = self._clock.seconds()
        rooms = await self._livekit.list_rooms()
        self._roster.rooms_listed(room.name for room in rooms)
        young = self._livekit.now() - COUNT_LAG
        occupied = {
            room.name for room in rooms if room.num_participants or room.num_publishers or room.creation_time > young
        }
        for alias in [alias for alias in self._enforcement.watched if alias not in occupied]:
            occupied.add(alias)  # once more, to see that nobody is there
        for alias in occupied:
            if await self._registry.slot_of(alias) is None:
                self._discovery.want(alias, self._enforcement.enforce)
            else:
                self._enforcement.enforce(alias, urgent=False)
        self.round_at = self._clock.seconds()
        self._metrics.reconcile_seconds.observe(self.round_at - began)

    def stop(self) -> None:
        """Leave everything as it is now."""
        self._enforcement.stop()
        self._discovery.stop()
