# SPDX-License-Identifier: Apache-2.0
"""How a call is kept as its room asks: one pass over one SFU room, whatever led to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

from attrs import define, field
from cachetools import LRUCache
from twisted.internet.defer import TimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.keyed_worker import KeyedWorker
from lotusguard.clients.waiting import Deadline, Fetched, gather, gather_in_turns
from lotusguard.guard.calls.entitlement import Checked, Entitlement, Unentitled
from lotusguard.guard.calls.participants import PARTICIPANTS_AT_ONCE, Adjusted, ParticipantEnforcer
from lotusguard.guard.calls.settled import Basis, SettledCalls
from lotusguard.guard.rooms.policies import Freshness, KnownPolicy, Policies
from lotusguard.guard.seats.book import OverLimit, SeatBook
from lotusguard.guard.seats.registry import Slot, TokenRegistry
from lotusguard.guard.seats.roster import Listing, Roster
from lotusguard.metrics import Metrics
from lotusguard.rules.refusals import Refusal

log = Logger()

LARGE_CALL = 100
"""If a call has more participants than this, an arrival is checked without listing the call."""
ROOMS_AT_ONCE = 8
"""SFU rooms that reconciling works on at the same time."""
UNRESTRICTED_KEPT = 50_000


class RoomLease(Protocol):
    """Several guards enforce a room one at a time."""

    async def acquire(self, room_id: str) -> bool:
        """Whether this guard enforces the room for the next seconds."""

    async def confirms(self, room_id: str) -> bool:
        """Whether it still does, as its fencing token says."""

    async def ask_holder(self, alias: str) -> None:
        """Let the guard that does so enforce an SFU room at once."""


@define(eq=False)
class Enforcement:
    """Keeps calls as their rooms' policies ask. One bad room never stops the others.

    :param leases: ``None`` if no other guard enforces these rooms.
    :param eject: remove participants over the limit; else only say so.
    :ivar watched: participants in each SFU room where something is enforced, as of its last listing.
    """

    _policies: Policies
    _roster: Roster
    _seats: SeatBook
    _registry: TokenRegistry
    _entitlement: Entitlement
    _participants: ParticipantEnforcer
    _clock: IReactorTime
    _metrics: Metrics
    _lookup_timeout: float
    eject: bool
    _leases: RoomLease | None = None
    watched: dict[str, int] = field(factory=dict, init=False)
    _settled: SettledCalls = field(factory=SettledCalls, init=False)
    _unrestricted: LRUCache[str, None] = field(factory=lambda: LRUCache(UNRESTRICTED_KEPT), init=False)
    _worker: KeyedWorker[str] = field(init=False)
    _arrivals: KeyedWorker[tuple[str, str]] = field(init=False)
    _urgent: set[str] = field(init=False, factory=set)

    def __attrs_post_init__(self) -> None:
        self._worker = KeyedWorker(self._attempt, ROOMS_AT_ONCE, self._failed)
        self._arrivals = KeyedWorker(
            self._enforce_one, ROOMS_AT_ONCE, lambda who, failure: self._failed(who[0], failure)
        )
        self._metrics.rooms.set_function(lambda: len(self.watched))
        self._metrics.participants.set_function(lambda: sum(self.watched.values()))

    @property
    def worker(self) -> KeyedWorker[str]:
        """Runs the passes: never two at once for an SFU room."""
        return self._worker

    def stop(self) -> None:
        """Leave everything as it is now."""
        self._worker.stop()
        self._arrivals.stop()

    def enforce(self, alias: str, *, urgent: bool = True) -> None:
        """Bring one SFU room in line with its policy, in the background.

        :param urgent: now; else when few other rooms are being worked on.
        """
        if urgent and self._leases is not None:
            self._urgent.add(alias)
        self._settled.forget(alias)
        self._worker.run(alias, urgent=urgent)

    def reconcile(self, alias: str, *, again: bool = False) -> None:
        """Nothing is known to have changed in an SFU room: see whether anything has, when few others are worked on.

        :param again: a pass that has begun before is not enough.
        """
        self._worker.run(alias, urgent=False, again=again)

    def settings_changed(self) -> None:
        """Settings of what is enforced have changed."""
        self._settled.forget_all()

    def enforce_as_asked(self, alias: str) -> None:
        """Another guard asked the holder of the room's lease to enforce an SFU room. If this guard does not hold it, it
        does not ask on: guards would ask each other without end."""
        self._settled.forget(alias)
        self._worker.run(alias, urgent=True)

    async def _attempt(self, alias: str) -> None:
        with self._participants.failing.attempt(alias):
            await self._enforce(alias)

    async def _enforce(self, alias: str) -> None:
        urgent = alias in self._urgent
        self._urgent.discard(alias)
        slot = await self._registry.slot_of(alias)
        if slot is None or not await self._is_ours(slot, alias, urgent=urgent):
            return
        began = self._clock.seconds()
        self._settled.begin(alias)
        try:
            known = await self._policies.get(slot.room_id, self._deadline())
            if not known.policy and not self._entitlement.checks(slot.room_id) and alias in self._unrestricted:
                self._watch(alias, 0)
                return
            self._unrestricted.pop(alias, None)
            listing = await self._roster.list(alias, began, self._deadline())
            self._watch(alias, len(listing.value))
            departures = self._entitlement.memberships.departures(slot.room_id)
            basis = Basis(known.policy, self._roster.last_news(alias), departures)
            settles = self._entitlement.settles(slot.room_id, known)
            if listing.value and not (settles and self._settled.holds(alias, basis, began)):
                again_at = await self._pass(slot, alias, known, listing)
                if settles and again_at is not None:
                    self._settled.settle(alias, basis, again_at)
        except DependencyFailed as failed:
            self._participants.failed("list participants", alias, failed.reason)
        except TimeoutError:
            self._participants.failed("list participants", alias, "timeout")
        finally:
            self._settled.end(alias)

    async def reconciles(self, alias: str) -> bool:
        """Whether this guard, of several, reconciles an SFU room."""
        if self._leases is None:
            return True
        slot = await self._registry.slot_of(alias)
        return slot is not None and await self._is_ours(slot, alias, urgent=False)

    async def _is_ours(self, slot: Slot, alias: str, *, urgent: bool) -> bool:
        """Whether this guard reconciles the room. If another one does, it is told about what is urgent."""
        if self._leases is None:
            return True
        if await self._leases.acquire(slot.room_id):
            return True
        self._watch(alias, 0)
        if urgent:
            await self._leases.ask_holder(alias)
        return False

    async def _pass(self, slot: Slot, alias: str, known: KnownPolicy, listing: Listing) -> float | None:
        """The listing has been applied to the seat book already.

        Rights are adjusted at once: who may stay takes lookups, and a forbidden share must not last as long as those.

        :return: when time alone may give the next pass something to do; ``None`` if this one had something to do.
        """
        outcomes = await gather((
            self._participants.adjust(slot.room_id, alias, listing.value, known),
            self._remove(slot, alias, known, listing, whole=True),
        ))  # fmt: skip
        adjusted, checked = cast("tuple[Adjusted, Checked]", outcomes)
        if adjusted is Adjusted.LEFT_SOME:
            self.enforce(alias)
        elif known.is_certain and not known.policy and adjusted is Adjusted.NOTHING_TO_DO:
            self._unrestricted[alias] = None  # nothing is withheld from anybody
        return checked.again_at if adjusted is Adjusted.NOTHING_TO_DO and not checked.unentitled else None

    # -- one participant of a large call -------------------------------------------------------------------

    def enforce_arrival(self, alias: str, identity: str) -> None:
        """A participant arrived or published something. In a large call nobody else is looked at: a listing costs as
        much as it has participants, and reconciling makes the next one soon."""
        if self.watched.get(alias, 0) > LARGE_CALL:
            self._arrivals.run((alias, identity))
        else:
            self.enforce(alias)

    async def _enforce_one(self, arrival: tuple[str, str]) -> None:
        alias, identity = arrival
        slot = await self._registry.slot_of(alias)
        if slot is None or not await self._is_ours(slot, alias, urgent=True):
            return
        began = self._clock.seconds()
        try:
            known = await self._policies.get(slot.room_id, self._deadline())
            participant = await self._participants.find(slot.room_id, alias, identity)
        except DependencyFailed as failed:
            self._participants.failed("find a participant", alias, failed.reason)
            return
        if participant is not None:
            only: Listing = Fetched((participant,), began)
            await gather((
                self._participants.adjust(slot.room_id, alias, only.value, known),
                self._remove(slot, alias, known, only, whole=False),
            ))  # fmt: skip

    # -- who may stay --------------------------------------------------------------------------------------

    async def _remove(self, slot: Slot, alias: str, known: KnownPolicy, listing: Listing, *, whole: bool) -> Checked:
        """Remove participants who may not be in the call, and those over its limit.

        :param whole: whether the listing is one of the whole call.
        """
        checked = await self._remove_unentitled(slot, alias, known, listing, whole=whole)
        if known.freshness is Freshness.UNKNOWN:
            await self._seats.seat_everybody(slot.room_id)  # nobody who comes in now is removed for it later
        elif known.policy.max_users is not None and not self._seats.unshared:
            try:
                await self._remove_overflow(slot, known, listing.began)
            except DependencyFailed as failed:  # another slot of the room could not be listed
                self._participants.failed("list participants", alias, failed.reason)
            except TimeoutError:
                self._participants.failed("list participants", alias, "timeout")
        return checked

    async def _remove_unentitled(
        self, slot: Slot, alias: str, known: KnownPolicy, listing: Listing, *, whole: bool
    ) -> Checked:
        async def remove(found: Unentitled) -> None:
            identity = found.participant.identity
            if await self._may_remove(slot.room_id) and await self._participants.remove(
                slot.room_id, alias, identity, found.user, found.reason.value
            ):
                await self._roster.removed(slot, alias, found.participant.sid, identity)

        checked = await self._entitlement.unentitled(slot.room_id, alias, known, listing.value, whole=whole)
        await gather_in_turns(PARTICIPANTS_AT_ONCE, remove, checked.unentitled)
        return checked

    async def _remove_overflow(self, slot: Slot, known: KnownPolicy, since: float) -> None:
        """Remove participants over the limit, wherever in the Matrix room.

        :param since: when the listing began that brought us here. In the room's other slots somebody may have left
            before: while that is unknown, nobody is removed.
        """
        room_id, policy = slot.room_id, known.policy
        await self._roster.exempt(room_id, policy)
        if not await self._seats.overflow(room_id, policy.max_users):
            return
        await self._roster.refresh(room_id, since, self._deadline(), slot.slot_id)
        over = await self._seats.overflow(room_id, policy.max_users)
        if self.eject and self._participants.acts:
            await self._remove_newest_first(slot, over, policy.max_users)
            return
        for hold in over:
            self._participants.skipped("remove", room_id, hold.alias, hold.identity, Refusal.FULL.value, hold.sid)
        await self._seats.seat_everybody(room_id)

    async def _remove_newest_first(self, slot: Slot, over: Sequence[OverLimit], limit: int | None) -> None:
        """Remove several at once, the latest arrivals first: a seat that becomes free goes to the earliest.

        Of those who are left at most half are removed at once. Then it is asked again who has no seat.
        """

        async def remove(hold: OverLimit) -> None:
            if await self._participants.remove(slot.room_id, hold.alias, hold.identity, hold.user, Refusal.FULL.value):
                await self._roster.removed(slot, hold.alias, hold.sid, hold.identity)

        left = list(over)
        while left:
            still = await self._seats.overflow(slot.room_id, limit)
            if not await self._may_remove(slot.room_id):
                return
            stay = max(len(left) // 2, len(left) - PARTICIPANTS_AT_ONCE)
            await gather_in_turns(PARTICIPANTS_AT_ONCE, remove, [hold for hold in left[stay:] if hold in still])
            del left[stay:]

    async def _may_remove(self, room_id: str) -> bool:
        """Whether no other guard reconciles the room by now. It may have removed somebody else."""
        return self._leases is None or await self._leases.confirms(room_id)

    def _watch(self, alias: str, participants: int) -> None:
        if participants:
            self.watched[alias] = participants
        else:
            self.watched.pop(alias, None)
            self._entitlement.forget(alias)
            self._settled.forget(alias)

    def _deadline(self) -> Deadline:
        return Deadline.after(self._clock, self._lookup_timeout)

    def _failed(self, alias: str, failure: Failure) -> None:
        self._metrics.enforcement_failures.labels("enforce", "internal_error").inc()
        log.failure("enforcing in {alias} failed", failure, alias=alias)
