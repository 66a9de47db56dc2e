# SPDX-License-Identifier: Apache-2.0
"""What leads to a pass over a call: LiveKit's webhooks, pushed changes, and reconciling every few seconds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from enum import Enum

from attrs import define, field
from cachetools import LRUCache
from livekit.protocol.webhook import WebhookEvent
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.livekit import LiveKitClient
from lotusguard.clients.waiting import in_slices, run_in_background
from lotusguard.guard.calls.discovery import Discovery
from lotusguard.guard.calls.enforcement import Enforcement
from lotusguard.guard.calls.entitlement import Entitlement
from lotusguard.guard.calls.lost_rooms import LostRooms
from lotusguard.guard.rooms.members import Members
from lotusguard.guard.rooms.policies import Policies
from lotusguard.guard.seats.book import SeatBook
from lotusguard.guard.seats.registry import Slot, TokenRegistry
from lotusguard.guard.seats.roster import DEPARTURES, Roster
from lotusguard.metrics import Metrics
from lotusguard.rules.identity import ROOM_SLOT, room_alias

log = Logger()

EVENTS_REMEMBERED = 10_000
EVENTS_OF_INTEREST = (*DEPARTURES, "participant_joined", "track_published", "room_finished")
COUNT_LAG = 10
"""Seconds after which a new SFU room's count of participants can be trusted: it comes up to 5 s late."""
DOUBT_INTERVAL = 10.0
"""Seconds within which everything is read again once at most, however often the connection to Redis is lost."""


class Told(Enum):
    """How a guard was told that a room has changed. The values are sent to other guards."""

    BY_MODULE = "module"
    """By the homeserver's module, which tells of every room."""
    IN_ROOM = "room"
    """By our account, which is in the room."""
    ROOM_LEFT = "left"
    """Our account is not in the room any more."""


@define(eq=False)
class CallChanges:
    """Passes on what happens to calls.

    :param lost_rooms: creates SFU rooms again that LiveKit has lost.
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
    lost_rooms: LostRooms
    _clock: IReactorTime
    _metrics: Metrics
    _tell_others: Callable[[str, str, str], Awaitable[None]] | None = None
    webhook_at: float | None = field(default=None, init=False)
    round_at: float | None = field(default=None, init=False)
    _seen_events: LRUCache[str, None] = field(factory=lambda: LRUCache(EVENTS_REMEMBERED), init=False)
    _doubted_at: float | None = field(default=None, init=False)
    _doubts_next: IDelayedCall | None = field(default=None, init=False)
    _stopped: bool = field(default=False, init=False)

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

    async def room_changed(self, room_id: str, user: str = "") -> None:
        """The homeserver's module says that a room's state or memberships changed: read them again and enforce at once.

        :param user: whose membership changed, if only one did.
        """
        await self._changed(room_id, user, Told.BY_MODULE)

    async def resident_room_changed(self, room_id: str, user: str = "") -> None:
        """The same, heard by our account in the room. It says nothing about other rooms."""
        await self._changed(room_id, user, Told.IN_ROOM)

    async def resident_room_left(self, room_id: str) -> None:
        """Our account is no longer in the room: what it heard there holds no longer."""
        await self._changed(room_id, "", Told.ROOM_LEFT)

    async def _changed(self, room_id: str, user: str, told: Told) -> None:
        try:  # here first: enforcement must not wait for Redis
            await self.changed_at_another_guard(room_id, user, told.value)
        finally:
            if self._tell_others is not None:
                await self._tell_others(room_id, user, told.value)

    async def changed_at_another_guard(self, room_id: str, user: str, how: str) -> None:
        """What another guard was told. :param how: a `Told`. Another release may know more ways."""
        if how == Told.ROOM_LEFT.value:
            self._policies.forget(room_id)
        elif user and how != Told.IN_ROOM.value:
            self._entitlement.memberships.pushed()
        await self._read_again(room_id, user)

    def anything_may_have_changed(self) -> None:
        """What other guards were told may have been missed: nothing that was read before is believed.

        At most once per `DOUBT_INTERVAL`: what comes sooner is done at its end.
        """
        if self._stopped or self._doubts_next is not None:
            return
        passed = DOUBT_INTERVAL if self._doubted_at is None else self._clock.seconds() - self._doubted_at
        if passed < DOUBT_INTERVAL:
            self._doubts_next = self._clock.callLater(DOUBT_INTERVAL - passed, self._read_everything_again)
        else:
            self._read_everything_again()

    def _read_everything_again(self) -> None:
        self._doubted_at, self._doubts_next = self._clock.seconds(), None
        self._policies.forget_all_freshness()
        self._members.forget_all_freshness()
        for alias in list(self._enforcement.watched):
            self._enforcement.enforce(alias, urgent=False)

    async def _read_again(self, room_id: str, user: str) -> None:
        self._policies.forget_freshness(room_id)
        self._members.forget_freshness(room_id, user)
        run_in_background(
            self._entitlement.end_waiting(room_id, user),
            lambda failure: log.failure("who waits in a lobby could not be checked", failure),
        )
        main = room_alias(room_id, ROOM_SLOT)
        if self._roster.may_exist(main):  # the call may be older than the guard
            await self._registry.learn_alias(main, Slot(room_id, ROOM_SLOT))
        issued = [alias for alias in await self._registry.aliases_of(room_id) if self._roster.may_exist(alias)]
        for alias in {*issued, *await self._seats.aliases(room_id)}:  # only SFU rooms that may exist, or hold seats
            self._enforcement.enforce(alias)

    def seats_are_known(self) -> None:
        """It was unknown who holds the seats of rooms with a limit, and is known now: begin a round at once. In the
        time before, more people may have got in than there are seats."""
        if not self._stopped:
            run_in_background(self.reconcile(again=True), _round_failed)

    async def reconcile(self, *, again: bool = False) -> None:
        """One round: what webhooks missed.

        It returns once LiveKit has told which rooms there are; what follows from that is done in the background. Rooms
        that are still being worked on from the last round are left alone, so that a slow one delays no other.

        :param again: those are worked on once more.
        :raises DependencyFailed: LiveKit does not tell.
        """
        began = self._clock.seconds()
        try:
            rooms = await self._livekit.list_rooms()
        except DependencyFailed:
            self.lost_rooms.was_away()
            raise
        listed = {room.name for room in rooms}
        lost = [alias for alias in self._enforcement.watched if alias not in listed and self._roster.may_exist(alias)]
        self._roster.rooms_listed(listed)
        self.lost_rooms.create_again(lost, listed)  # first: who tries to reconnect before that is refused for good
        young = self._livekit.now() - COUNT_LAG
        occupied = {
            room.name for room in rooms if room.num_participants or room.num_publishers or room.creation_time > young
        }
        for alias in [alias for alias in self._enforcement.watched if alias not in occupied]:
            occupied.add(alias)  # once more, to see that nobody is there
        async for alias in in_slices(self._clock, occupied):
            if await self._registry.slot_of(alias) is None:
                self._discovery.want(alias, self._enforcement.enforce)
            else:
                self._enforcement.reconcile(alias, again=again)
        self.round_at = self._clock.seconds()
        self._metrics.reconcile_seconds.observe(self.round_at - began)

    async def lease_ended(self, room_id: str) -> None:
        """The guard that enforced a room does so no longer: one of the others takes over, without waiting for its next
        round."""
        for alias in await self._registry.aliases_of(room_id):
            if self._roster.may_exist(alias):
                self._enforcement.reconcile(alias)

    async def livekit_returned(self) -> None:
        """LiveKit accepts connections again: create what it has lost before its clients give up.

        :raises DependencyFailed: it does not answer yet, or has not created a room.
        """
        self.lost_rooms.was_away()
        await self._livekit.probe()  # closes its circuit
        await self.reconcile()
        await self.lost_rooms.wait_until_created()

    def stop(self) -> None:
        """Leave everything as it is now."""
        self._stopped = True
        if self._doubts_next is not None:
            self._doubts_next.cancel()
            self._doubts_next = None
        self._enforcement.stop()
        self._discovery.stop()
        self.lost_rooms.stop()


def _round_failed(failure: Failure) -> None:
    if not failure.check(DependencyFailed):  # else the next round tries again
        log.failure("a round of reconciling failed", failure)
