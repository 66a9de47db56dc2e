# SPDX-License-Identifier: Apache-2.0
"""How a call is kept as its room asks: one pass over one SFU room, whatever led to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

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
from lotusguard.guard.calls.over_limit import LimitEnforcer
from lotusguard.guard.calls.participants import PARTICIPANTS_AT_ONCE, Adjusted, ParticipantEnforcer
from lotusguard.guard.calls.removal import Remover, RoomLease
from lotusguard.guard.calls.settled import Basis, SettledCalls
from lotusguard.guard.rooms.policies import KnownPolicy, Policies
from lotusguard.guard.seats.registry import Slot, TokenRegistry
from lotusguard.guard.seats.roster import Listing, Roster
from lotusguard.metrics import Metrics

log = Logger()

LARGE_CALL = 100
"""If a call has more participants than this, an arrival is checked without listing the call."""
ROOMS_AT_ONCE = 8
"""SFU rooms that reconciling works on at the same time."""
UNRESTRICTED_KEPT = 50_000


@define(eq=False)
class Enforcement:
    """Keeps calls as their rooms' policies ask. One bad room never stops the others.

    :param leases: ``None`` if no other guard enforces these rooms.
    :ivar watched: participants in each SFU room where something is enforced, as of its last listing.
    """

    _policies: Policies
    _roster: Roster
    _registry: TokenRegistry
    _entitlement: Entitlement
    _participants: ParticipantEnforcer
    _remover: Remover
    _limits: LimitEnforcer
    _clock: IReactorTime
    _metrics: Metrics
    _lookup_timeout: float
    _leases: RoomLease | None
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
        self._settled.begin(alias)
        try:
            with self._listing_failures(alias):
                await self._look_again(slot, alias)
        finally:
            self._settled.end(alias)

    async def _look_again(self, slot: Slot, alias: str) -> None:
        """List an SFU room, and make a pass unless nothing can have changed since the last one."""
        began = self._clock.seconds()
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

        async def remove(found: Unentitled) -> None:
            who = found.participant
            if await self._remover.may_remove(slot.room_id):
                await self._remover.remove(slot, alias, who.sid, who.identity, found.user, found.reason.value)

        checked = await self._entitlement.unentitled(slot.room_id, alias, known, listing.value, whole=whole)
        await gather_in_turns(PARTICIPANTS_AT_ONCE, remove, checked.unentitled)
        with self._listing_failures(alias):  # of another slot of the room
            await self._limits.enforce(slot, known, listing.began)
        return checked

    def _watch(self, alias: str, participants: int) -> None:
        if participants:
            self.watched[alias] = participants
        else:
            self.watched.pop(alias, None)
            self._entitlement.forget(alias)
            self._settled.forget(alias)

    def _deadline(self) -> Deadline:
        return Deadline.after(self._clock, self._lookup_timeout)

    @contextmanager
    def _listing_failures(self, alias: str) -> Iterator[None]:
        """Logs and counts that LiveKit did not list participants; the next round tries again."""
        try:
            yield
        except DependencyFailed as failed:
            self._participants.failed("list participants", alias, failed.reason)
        except TimeoutError:
            self._participants.failed("list participants", alias, "timeout")

    def _failed(self, alias: str, failure: Failure) -> None:
        self._metrics.enforcement_failures.labels("enforce", "internal_error").inc()
        log.failure("enforcing in {alias} failed", failure, alias=alias)
