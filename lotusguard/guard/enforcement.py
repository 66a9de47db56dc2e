# SPDX-License-Identifier: Apache-2.0
"""How a call is kept as its room's admins want it: webhooks, policy changes and reconciling lead here. Floor: guard.

It only takes away, keeps every other flag, and one bad room or participant does not stop the rest.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from livekit.protocol.models import ParticipantInfo
from twisted.internet.defer import Deferred, DeferredSemaphore
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from lotusguard.clients.http import NeighbourFailed
from lotusguard.clients.sfu import NoSuchParticipant, Sfu
from lotusguard.clients.waiting import Budget, in_background
from lotusguard.guard.discovery import Discovery
from lotusguard.guard.ledger import Ledger
from lotusguard.guard.policies import Policies
from lotusguard.guard.roster import Roster
from lotusguard.guard.seatbook import Present, SeatBook
from lotusguard.metrics import Metrics
from lotusguard.rules.policy import Policy
from lotusguard.rules.sources import Source, disguised, permitted_sources, restored, revoked, within

log = Logger()

ROOMS_AT_ONCE = 8
"""Rooms that reconciling works on at the same time."""
EVENTS_REMEMBERED = 10_000


class Enforcement:
    """Keeps calls as their rooms' policies want them.

    :param overflow: ``eject`` puts out who joins past the cap without a seat, ``allow`` only says so.
    :param restore: give back what the guard itself took in the call, when it is allowed again.
    :param dry_run: decide, log and count, change nothing.
    """

    def __init__(
        self,
        *,
        sfu: Sfu | None,
        policies: Policies,
        roster: Roster,
        seats: SeatBook,
        ledger: Ledger,
        discovery: Discovery,
        clock: IReactorTime,
        metrics: Metrics,
        lookup_timeout: float,
        overflow: str,
        restore: bool,
        dry_run: bool,
    ) -> None:
        self._sfu = sfu
        self._policies = policies
        self._roster = roster
        self._seats = seats
        self._ledger = ledger
        self._discovery = discovery
        self._clock = clock
        self._metrics = metrics
        self._lookup_timeout = lookup_timeout
        self._eject = overflow == "eject"
        self._restore = restore
        self._dry_run = dry_run
        self._seen_events: OrderedDict[str, None] = OrderedDict()
        self._said: OrderedDict[tuple[str, ...], None] = OrderedDict()
        self._running: dict[str, Deferred[Any] | None] = {}
        self._again: set[str] = set()
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
        self._seen_events[event_id] = None
        while len(self._seen_events) > EVENTS_REMEMBERED:
            self._seen_events.popitem(last=False)
        alias = _text(event.get("room"), "name")
        kind = event.get("event")
        if not alias or kind not in _EVENTS_OF_INTEREST:
            return
        slot = await self._ledger.slot_of(alias)
        if slot is None:
            self._discovery.want(alias)
            return
        participant = event.get("participant")
        sid, identity = _text(participant, "sid"), _text(participant, "identity")
        cap = self._policies.last_known(slot.room_id).max_users
        if kind in _LEFT:
            await self._seats.leave(slot.room_id, alias, sid)
            await self._ledger.remember_taken(alias, sid, frozenset())
        elif kind == "participant_joined" and cap is not None and _takes_a_seat(participant):
            who = Present(sid, identity, await self._ledger.user_behind(alias, identity))
            await self._seats.arrive(slot.room_id, alias, who, cap)
        if kind not in _LEFT:
            self.enforce(alias)

    async def policy_changed(self, room_id: str) -> None:
        """The homeserver told that a room's policy changed: ask for it and enforce it at once."""
        self._policies.drop(room_id)
        for alias in await self._ledger.aliases_of(room_id):
            self.enforce(alias)

    async def reconcile(self) -> None:
        """One round: what webhooks missed. Returns when it has been told which rooms there are; rooms that are
        still being worked on from the last round are left to it, so that a slow one delays no other.

        :raises NeighbourFailed: the SFU does not tell.
        """
        if self._sfu is None:
            return
        began = self._clock.seconds()
        rooms = await self._sfu.list_rooms()
        occupied = {room.name for room in rooms if room.num_participants or room.num_publishers}
        for alias in [alias for alias in self.watched if alias not in occupied]:
            occupied.add(alias)  # once more, to see that nobody is there
        for alias in occupied:
            slot = await self._ledger.slot_of(alias)
            if slot is None:
                self._discovery.want(alias)
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
        if alias in self._running:
            self._again.add(alias)
            return
        self._running[alias] = None  # it may have ended before in_background returns
        begun = in_background(
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

    async def _enforced(self, sfu: Sfu, alias: str, in_turn: bool) -> None:
        if in_turn:
            await self._turns.acquire()
        try:
            while True:
                self._again.discard(alias)
                await self._enforce_once(sfu, alias)
                if alias not in self._again:
                    return
        except NeighbourFailed as failed:
            self._failed("look", alias, failed.reason)
        finally:
            self._running.pop(alias, None)
            self._again.discard(alias)
            if in_turn:
                self._turns.release()

    async def _enforce_once(self, sfu: Sfu, alias: str) -> None:
        slot = await self._ledger.slot_of(alias)
        if slot is None:
            return
        known = await self._policies.get(slot.room_id, Budget(self._clock, self._lookup_timeout))
        policy = known.policy
        if policy.max_users is None:
            await self._seats.forget(slot.room_id)
        if not policy and not self._restore:
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
            await self._put_out(sfu, slot.room_id, policy.max_users)
        for participant in participants:
            await self._narrow(sfu, slot.room_id, alias, participant, policy)

    async def _put_out(self, sfu: Sfu, room_id: str, cap: int) -> None:
        """Put out who came in past the cap without a seat, wherever in the Matrix room."""
        for at, identity in await self._seats.overflow(room_id, cap):
            if self._dry_run or not self._eject:
                self._withheld("eject", room_id, at.alias, identity, at.sid)
                await self._seats.seat_all(room_id)
                continue
            try:
                await sfu.remove_participant(at.alias, identity)
            except NoSuchParticipant:
                await self._seats.leave(room_id, at.alias, at.sid)
                continue
            except NeighbourFailed as failed:
                self._failed("eject", at.alias, failed.reason)
                continue
            await self._seats.leave(room_id, at.alias, at.sid)
            self._metrics.ejections.inc()
            log.warn(
                "put {identity} out of {room_id}: all {cap} seats are taken and they had none",
                identity=identity, room_id=room_id, alias=at.alias, cap=cap, event_name="ejected",
            )  # fmt: skip

    async def _narrow(self, sfu: Sfu, room_id: str, alias: str, seen: ParticipantInfo, policy: Policy) -> None:
        """Take from one participant what the policy forbids; give back what may come back."""
        try:
            if revoked(seen.permission, policy.forbidden) is not None:
                await self._revoke(sfu, room_id, alias, seen, policy)
            elif self._restore:
                await self._give_back(sfu, room_id, alias, seen, policy)
            for track in disguised(seen, policy.forbidden):
                if self._dry_run:
                    self._withheld("mute", room_id, alias, seen.identity, track.sid)
                    continue
                await sfu.mute_track(alias, seen.identity, track.sid)
                self._metrics.mutes.inc()
                log.warn(
                    "muted a video track of {identity} in {room_id} that calls itself a {label}",
                    identity=seen.identity, room_id=room_id, alias=alias, label=Source(track.source).claim,
                    event_name="muted",
                )  # fmt: skip
        except NoSuchParticipant:
            return  # left meanwhile, or stale after a node crashed
        except NeighbourFailed as failed:
            self._failed("revoke", alias, failed.reason)

    async def _revoke(self, sfu: Sfu, room_id: str, alias: str, seen: ParticipantInfo, policy: Policy) -> None:
        if self._dry_run:
            self._withheld("revoke", room_id, alias, seen.identity, seen.sid, *map(str, sorted(policy.forbidden)))
            return
        fresh = await sfu.get_participant(alias, seen.identity)
        wanted = revoked(fresh.permission, policy.forbidden)
        if wanted is None:
            return
        taken = policy.forbidden.intersection(permitted_sources(fresh.permission))
        # Put down before it happens: an early note takes nothing, a late one would lose what a kill interrupts.
        if self._restore:
            before = await self._ledger.taken_from(alias, fresh.sid)
            await self._ledger.remember_taken(alias, fresh.sid, before | taken)
        after = await sfu.update_permission(alias, fresh.identity, wanted)
        if not within(after.permission, wanted):
            self._failed("revoke", alias, "not_applied")
            return
        for source in taken:
            self._metrics.revocations.labels(source.claim).inc()
        log.info(
            "took {sources} from {identity} in {room_id}",
            sources=sorted(source.claim for source in taken), identity=fresh.identity, room_id=room_id, alias=alias,
            event_name="revoked",
        )  # fmt: skip

    async def _give_back(self, sfu: Sfu, room_id: str, alias: str, seen: ParticipantInfo, policy: Policy) -> None:
        taken = await self._ledger.taken_from(alias, seen.sid)
        if not taken - policy.forbidden:
            return
        if self._dry_run:
            self._withheld("restore", room_id, alias, seen.identity, seen.sid)
            return
        fresh = await sfu.get_participant(alias, seen.identity)
        if fresh.sid != seen.sid:
            return
        wanted = restored(fresh.permission, taken, policy.forbidden)
        if wanted is not None:
            await sfu.update_permission(alias, fresh.identity, wanted)
            for source in taken - policy.forbidden:
                self._metrics.restorations.labels(source.claim).inc()
            log.info(
                "gave {sources} back to {identity} in {room_id}",
                sources=sorted(source.claim for source in taken - policy.forbidden), identity=fresh.identity,
                room_id=room_id, alias=alias, event_name="restored",
            )  # fmt: skip
        await self._ledger.remember_taken(alias, fresh.sid, taken & policy.forbidden)

    # -- saying so ---------------------------------------------------------------------------------------

    def _withheld(self, action: str, room_id: str, alias: str, identity: str, *what: str) -> None:
        """Something was decided and not done. Said and counted once, not at every round."""
        said = (action, alias, identity, *what)
        if said in self._said:
            return
        self._said[said] = None
        while len(self._said) > EVENTS_REMEMBERED:
            self._said.popitem(last=False)
        self._metrics.withheld.labels(action).inc()
        log.info(
            "would {action} {identity} in {room_id}",
            action=action, identity=identity, room_id=room_id, alias=alias, event_name="withheld",
        )  # fmt: skip

    def _failed(self, action: str, alias: str, reason: str) -> None:
        self._metrics.enforcement_failures.labels(action, reason).inc()
        log.warn(
            "could not {action} in {alias}, will try again: {reason}",
            action=action, alias=alias, reason=reason, event_name="enforcement_failed",
        )  # fmt: skip


_LEFT = ("participant_left", "participant_connection_aborted")
_EVENTS_OF_INTEREST = (*_LEFT, "participant_joined", "track_published", "room_finished")


def _text(holder: object, key: str) -> str:
    value = holder.get(key) if isinstance(holder, dict) else None
    return value if isinstance(value, str) else ""


def _takes_a_seat(participant: object) -> bool:
    return _text(participant, "sid") != "" and _text(participant, "kind") not in ("EGRESS", "AGENT")
