# SPDX-License-Identifier: Apache-2.0
"""How a call is kept as its room's admins want it: webhooks, policy changes and reconciling lead here. Floor: guard.

It only takes away, keeps every other flag, and one bad room or participant does not stop the rest.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

from twisted.internet.defer import Deferred, DeferredSemaphore
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.livekit import LiveKitClient
from lotusguard.clients.waiting import Budget, run_in_background
from lotusguard.guard.calls.discovery import Discovery
from lotusguard.guard.calls.participants import ParticipantEnforcer
from lotusguard.guard.rooms.policies import Freshness, Policies
from lotusguard.guard.seats.book import Present, SeatBook
from lotusguard.guard.seats.registry import Slot, TokenRegistry
from lotusguard.guard.seats.roster import Roster
from lotusguard.metrics import Metrics
from lotusguard.rules.identity import ROOM_SLOT, room_alias

log = Logger()

ROOMS_AT_ONCE = 8
"""Rooms that reconciling works on at the same time."""
EVENTS_REMEMBERED = 10_000
COUNTED_BY = 10
"""Seconds after which a new SFU room's count of participants is to be trusted: it comes up to 5 s late."""


class Enforcement:
    """Keeps calls as their rooms' policies want them: sees to it that every room in question is looked at.

    :param participants: does what is to be done then.
    """

    def __init__(
        self,
        *,
        sfu: LiveKitClient | None,
        policies: Policies,
        roster: Roster,
        seats: SeatBook,
        registry: TokenRegistry,
        discovery: Discovery,
        participants: ParticipantEnforcer,
        clock: IReactorTime,
        metrics: Metrics,
        lookup_timeout: float,
    ) -> None:
        self._sfu = sfu
        self._policies = policies
        self._roster = roster
        self._seats = seats
        self._registry = registry
        self._discovery = discovery
        self._participants = participants
        self._clock = clock
        self._metrics = metrics
        self._lookup_timeout = lookup_timeout
        self._seen_events: OrderedDict[str, None] = OrderedDict()
        self._running: dict[str, Deferred[Any] | None] = {}
        self._again: set[str] = set()
        self._queued: set[str] = set()
        self._turns = DeferredSemaphore(ROOMS_AT_ONCE)
        self.webhook_at: float | None = None
        """When the SFU's last true webhook came."""
        self.round_at: float | None = None
        """When the last reconciling round ended well."""
        self.watched: dict[str, int] = {}
        """Participants seen in each SFU room with a policy, as of the last look."""
        metrics.rooms.set_function(lambda: len(self.watched))
        metrics.participants.set_function(lambda: sum(self.watched.values()))
        metrics.cache_limit.labels("webhook_ids").set(EVENTS_REMEMBERED)
        metrics.cache_entries.labels("webhook_ids").set_function(lambda: len(self._seen_events))

    # -- what leads here ---------------------------------------------------------------------------------

    async def noticed(self, event: dict[str, Any]) -> None:
        """The SFU told what happened, in a webhook that was verified. Idempotent."""
        self.webhook_at = self._clock.seconds()
        event_id = str(event.get("id", ""))
        if event_id in self._seen_events:
            self._metrics.webhooks.labels("duplicate").inc()
            return
        self._metrics.webhooks.labels("accepted").inc()
        if event_id:
            self._seen_events[event_id] = None
            while len(self._seen_events) > EVENTS_REMEMBERED:
                self._seen_events.popitem(last=False)
        alias = _text(event.get("room"), "name")
        kind = event.get("event")
        if not alias or kind not in _EVENTS_OF_INTEREST:
            return
        slot = await self._registry.slot_of(alias)
        if slot is None:
            self._discovery.want(alias, self.enforce)
            return
        participant = event.get("participant")
        sid, identity = _text(participant, "sid"), _text(participant, "identity")
        cap = self._policies.last_known(slot.room_id).max_users
        if kind in _LEFT:
            await self._registry.remember_taken(alias, sid, frozenset())
            replaced = _text(participant, "disconnectReason") == "DUPLICATE_IDENTITY"
            await self._seats.leave(slot.room_id, alias, sid, replaced=replaced)
        elif kind == "participant_joined" and cap is not None and _takes_a_seat(participant):
            user = await self._registry.user_behind(alias, identity)
            who = Present(sid, identity, user, joined=_joined(participant))
            await self._seats.arrive(slot.room_id, alias, who, cap)
        if kind not in _LEFT:
            self.enforce(alias)

    async def policy_changed(self, room_id: str) -> None:
        """The homeserver told that a room's policy changed: ask for it and enforce it at once."""
        self._policies.drop(room_id)
        main = room_alias(room_id, ROOM_SLOT)
        await self._registry.learn_alias(main, Slot(room_id, ROOM_SLOT))  # the call may be older than the guard
        for alias in await self._registry.aliases_of(room_id):
            self.enforce(alias)

    async def reconcile(self) -> None:
        """One round: what webhooks missed. Returns when it has been told which rooms there are; rooms that are
        still being worked on from the last round are left to it, so that a slow one delays no other.

        :raises DependencyFailed: the SFU does not tell.
        """
        if self._sfu is None:
            return
        began = self._clock.seconds()
        rooms = await self._sfu.list_rooms()
        occupied = {
            room.name
            for room in rooms
            if room.num_participants or room.num_publishers or room.creation_time > began - COUNTED_BY
        }
        for alias in [alias for alias in self.watched if alias not in occupied]:
            occupied.add(alias)  # once more, to see that nobody is there
        for alias in occupied:
            slot = await self._registry.slot_of(alias)
            if slot is None:
                self._discovery.want(alias, self.enforce)
            elif alias not in self._running:
                self.enforce(alias, in_turn=True)
        self.round_at = self._clock.seconds()
        self._metrics.reconcile_seconds.observe(self.round_at - began)

    def enforce(self, alias: str, *, in_turn: bool = False) -> None:
        """Bring one SFU room in line with its policy, in the background. Asked for again meanwhile, it is done again.

        :param in_turn: wait until few other rooms are being worked on.
        """
        if self._sfu is None:
            return
        if alias in self._queued:
            if in_turn:
                return
            self._queued.discard(alias)  # it does not wait for its turn any longer
        elif alias in self._running:
            self._again.add(alias)
            return
        self._running[alias] = None  # it may have ended before run_in_background returns
        begun = run_in_background(
            self._enforced(self._sfu, alias, in_turn),
            lambda failure: log.failure("enforcing in {alias} failed", failure, alias=alias),
        )
        if alias in self._running:
            self._running[alias] = begun

    async def stop(self) -> None:
        """Leave everything as it is now."""
        for work in list(self._running.values()):
            if work is not None:
                work.cancel()
        self._discovery.stop()

    # -- one room ----------------------------------------------------------------------------------------

    async def _enforced(self, sfu: LiveKitClient, alias: str, in_turn: bool) -> None:
        if in_turn and not await self._turn_of(alias):
            return
        try:
            while True:
                self._again.discard(alias)
                try:
                    await self._enforce_once(sfu, alias)
                except DependencyFailed as failed:
                    self._participants.failed("look", alias, failed.reason)
                if alias not in self._again:
                    return
        finally:
            self._running.pop(alias, None)
            self._again.discard(alias)
            if in_turn:
                self._turns.release()

    async def _turn_of(self, alias: str) -> bool:
        """Wait until few other rooms are being worked on. :return: whether it is still to be done then."""
        self._queued.add(alias)
        await self._turns.acquire()
        if alias in self._queued:
            self._queued.discard(alias)
            return True
        self._turns.release()
        return False

    async def _enforce_once(self, sfu: LiveKitClient, alias: str) -> None:
        slot = await self._registry.slot_of(alias)
        if slot is None:
            return
        known = await self._policies.get(slot.room_id, Budget(self._clock, self._lookup_timeout))
        policy, certain = known.policy, known.freshness is Freshness.FRESH
        if policy.max_users is None and certain:
            await self._seats.forget(slot.room_id)
        if known.freshness is Freshness.UNKNOWN:  # who is let in meanwhile is not put out when it is known again
            await self._seats.seat_all(slot.room_id)
        if not policy and not await self._participants.owes(alias):
            self.watched.pop(alias, None)
            return
        since = self._clock.seconds()
        participants = await sfu.list_participants(alias)
        if policy and participants:
            self.watched[alias] = len(participants)
        else:
            self.watched.pop(alias, None)
        if policy.max_users is not None:
            await self._roster.observed(slot.room_id, alias, participants, since)
            await self._participants.put_out(sfu, slot, policy.max_users, since)
        await self._participants.narrow(sfu, slot.room_id, alias, participants, policy.forbidden, certain=certain)


_LEFT = ("participant_left", "participant_connection_aborted")
_EVENTS_OF_INTEREST = (*_LEFT, "participant_joined", "track_published", "room_finished")


def _text(holder: object, key: str) -> str:
    value = holder.get(key) if isinstance(holder, dict) else None
    return value if isinstance(value, str) else ""


def _joined(participant: object) -> float:
    """When they came, by the SFU's clock, which gives whole seconds; infinity where that is not said."""
    seconds = _text(participant, "joinedAt")
    return int(seconds) + 1 if seconds.isdecimal() and len(seconds) < 16 else math.inf


def _takes_a_seat(participant: object) -> bool:
    return _text(participant, "sid") != "" and _text(participant, "kind") not in ("EGRESS", "AGENT")
