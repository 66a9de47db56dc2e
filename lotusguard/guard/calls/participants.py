# SPDX-License-Identifier: Apache-2.0
"""What is done to participants: sources taken and given back, tracks muted, people put out. Floor: guard.

It only takes away, but for what it took itself, and every other flag stays as it was.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from livekit.protocol.models import ParticipantInfo
from twisted.internet.defer import CancelledError, Deferred, DeferredSemaphore, TimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.livekit import LiveKitClient, NodeGone, NoSuchParticipant
from lotusguard.clients.waiting import Budget, gather
from lotusguard.guard.seats.book import SeatBook
from lotusguard.guard.seats.registry import Slot, TokenRegistry
from lotusguard.guard.seats.roster import Roster
from lotusguard.metrics import Metrics
from lotusguard.rules.sources import EVERY_SOURCE, Source, disguised, permitted_sources, restored, revoked, within

log = Logger()

PARTICIPANTS_AT_ONCE = 3
"""Participants of one SFU room that are worked on at the same time, so that one whose node hangs holds up few."""
SAID_KEPT = 10_000
NOTHING: frozenset[Source] = frozenset()


class ParticipantEnforcer:
    """Changes participants, checks that it came about, and says so.

    :param eject: put out who joins past the cap without a seat; else only say so.
    :param restore: give back what the guard itself took in the call, when it is allowed again.
    :param dry_run: decide, log and count, change nothing.
    """

    def __init__(
        self,
        *,
        roster: Roster,
        seats: SeatBook,
        registry: TokenRegistry,
        clock: IReactorTime,
        metrics: Metrics,
        lookup_timeout: float,
        eject: bool,
        restore: bool,
        dry_run: bool,
    ) -> None:
        self._roster = roster
        self._seats = seats
        self._registry = registry
        self._clock = clock
        self._metrics = metrics
        self._lookup_timeout = lookup_timeout
        self._eject = eject
        self._restore = restore
        self._dry_run = dry_run
        self._said: OrderedDict[tuple[str, ...], None] = OrderedDict()

    async def owes(self, alias: str) -> bool:
        """Whether somebody in this SFU room may have to be given something back."""
        return self._restore and bool(await self._registry.taken_in(alias))

    async def put_out(self, sfu: LiveKitClient, slot: Slot, cap: int, since: float) -> None:
        """Put out who came in past the cap without a seat, wherever in the Matrix room.

        :param since: when the look began that brought us here. In the room's other slots somebody may have left
            before: while that cannot be found out, nobody is put out.
        """
        room_id = slot.room_id
        if not await self._seats.overflow(room_id, cap):
            return
        try:
            await self._roster.fresh(room_id, slot.slot_id, Budget(self._clock, self._lookup_timeout), since)
        except (DependencyFailed, TimeoutError) as trouble:
            self.failed("eject", room_id, trouble.reason if isinstance(trouble, DependencyFailed) else "timeout")
            return
        for at, identity in await self._seats.overflow(room_id, cap):
            if self._dry_run or not self._eject:
                self._withheld("eject", room_id, at.alias, identity, at.sid)
                continue
            if (at, identity) not in await self._seats.overflow(room_id, cap):
                continue  # while others were put out somebody left
            try:
                await sfu.remove_participant(at.alias, identity)
            except DependencyFailed as failed:
                self.failed("eject", at.alias, failed.reason)
                continue
            except NodeGone:
                self._failed_once("eject", at.alias, identity)
                continue
            except NoSuchParticipant:
                await self._seats.leave(room_id, at.alias, at.sid)
                continue
            await self._seats.leave(room_id, at.alias, at.sid)
            self._metrics.ejections.inc()
            log.warn(
                "put {identity} out of {room_id}: all {cap} seats are taken and they had none",
                identity=identity, room_id=room_id, alias=at.alias, cap=cap, event_name="ejected",
            )  # fmt: skip
        if self._dry_run or not self._eject:
            await self._seats.seat_all(room_id)

    async def narrow(
        self,
        sfu: LiveKitClient,
        room_id: str,
        alias: str,
        participants: Collection[ParticipantInfo],
        forbidden: frozenset[Source],
        *,
        certain: bool,
    ) -> None:
        """Take from everybody in an SFU room what is forbidden; give back what may come back.

        :param participants: everybody who is there.
        :param certain: whether nothing but ``forbidden`` is forbidden. What is not known gives nothing back.
        """
        taken = await self._registry.taken_in(alias) if self._restore else {}
        for sid in taken.keys() - {seen.sid for seen in participants}:
            await self._registry.remember_taken(alias, sid, NOTHING)
        turns = DeferredSemaphore(PARTICIPANTS_AT_ONCE)

        async def in_turn(seen: ParticipantInfo, owed: frozenset[Source]) -> None:
            await turns.run(lambda: Deferred.fromCoroutine(self._narrow(sfu, room_id, alias, seen, forbidden, owed)))

        works = []
        for seen in participants:
            owed = taken.get(seen.sid, NOTHING) - forbidden if certain else NOTHING
            if owed or revoked(seen.permission, forbidden) is not None or disguised(seen, EVERY_SOURCE - forbidden):
                works.append(in_turn(seen, owed))
        await gather(works)

    async def _narrow(
        self,
        sfu: LiveKitClient,
        room_id: str,
        alias: str,
        seen: ParticipantInfo,
        forbidden: frozenset[Source],
        owed: frozenset[Source],
    ) -> None:
        try:
            if revoked(seen.permission, forbidden) is not None:
                await self._revoke(sfu, room_id, alias, seen, forbidden)
            elif owed:
                await self._give_back(sfu, room_id, alias, seen, owed)
            for track in disguised(seen, EVERY_SOURCE - forbidden):
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
        except DependencyFailed as failed:
            self.failed("revoke", alias, failed.reason)
        except NodeGone:
            self._failed_once("revoke", alias, seen.identity)
        except NoSuchParticipant:
            return  # left meanwhile, or stale
        except CancelledError:
            raise
        except Exception:
            self._metrics.enforcement_failures.labels("revoke", "internal_error").inc()
            log.failure("enforcing for {identity} in {alias} failed", identity=seen.identity, alias=alias)

    async def _revoke(
        self, sfu: LiveKitClient, room_id: str, alias: str, seen: ParticipantInfo, forbidden: frozenset[Source]
    ) -> None:
        if self._dry_run:
            self._withheld("revoke", room_id, alias, seen.identity, seen.sid, *map(str, sorted(forbidden)))
            return
        fresh = await sfu.get_participant(alias, seen.identity)
        wanted = revoked(fresh.permission, forbidden)
        if wanted is None:
            return
        taken = forbidden.intersection(permitted_sources(fresh.permission))
        # Put down before it happens: an early note takes nothing, a late one would lose what a kill interrupts.
        if self._restore:
            before = (await self._registry.taken_in(alias)).get(fresh.sid, NOTHING)
            await self._registry.remember_taken(alias, fresh.sid, before | taken)
        after = await sfu.update_permission(alias, fresh.identity, wanted)
        if after.sid != fresh.sid or not within(after.permission, wanted):
            self.failed("revoke", alias, "not_applied")
            return
        for source in taken:
            self._metrics.revocations.labels(source.claim).inc()
        log.info(
            "took {sources} from {identity} in {room_id}",
            sources=sorted(source.claim for source in taken), identity=fresh.identity, room_id=room_id, alias=alias,
            event_name="revoked",
        )  # fmt: skip

    async def _give_back(
        self, sfu: LiveKitClient, room_id: str, alias: str, seen: ParticipantInfo, owed: frozenset[Source]
    ) -> None:
        if self._dry_run:
            self._withheld("restore", room_id, alias, seen.identity, seen.sid, *map(str, sorted(owed)))
            return
        fresh = await sfu.get_participant(alias, seen.identity)
        if fresh.sid != seen.sid:
            return
        wanted = restored(fresh.permission, owed)
        if wanted is not None:
            after = await sfu.update_permission(alias, fresh.identity, wanted)
            if not within(wanted, after.permission):
                self.failed("restore", alias, "not_applied")
                return
            for source in owed:
                self._metrics.restorations.labels(source.claim).inc()
            log.info(
                "gave {sources} back to {identity} in {room_id}",
                sources=sorted(source.claim for source in owed), identity=fresh.identity, room_id=room_id, alias=alias,
                event_name="restored",
            )  # fmt: skip
        taken = (await self._registry.taken_in(alias)).get(fresh.sid, NOTHING)
        await self._registry.remember_taken(alias, fresh.sid, taken - owed)

    # -- saying so ---------------------------------------------------------------------------------------

    def failed(self, action: str, where: str, reason: str) -> None:
        """Something did not come about; the next round tries again."""
        self._metrics.enforcement_failures.labels(action, reason).inc()
        log.warn(
            "could not {action} in {alias}, will try again: {reason}",
            action=action, alias=where, reason=reason, event_name="enforcement_failed",
        )  # fmt: skip

    def _failed_once(self, action: str, alias: str, identity: str) -> None:
        """Counted each time, said once: what a crashed node left behind is listed for long."""
        if self._first_time("failed", action, alias, identity):
            self.failed(action, alias, "node_gone")
        else:
            self._metrics.enforcement_failures.labels(action, "node_gone").inc()

    def _withheld(self, action: str, room_id: str, alias: str, identity: str, *what: str) -> None:
        """Something was decided and not done. Said and counted once, not at every round."""
        if self._first_time(action, alias, identity, *what):
            self._metrics.dry_run_skipped.labels(action).inc()
            log.info(
                "would {action} {identity} in {room_id}",
                action=action, identity=identity, room_id=room_id, alias=alias, event_name="dry_run_skipped",
            )  # fmt: skip

    def _first_time(self, *what: str) -> bool:
        if what in self._said:
            return False
        self._said[what] = None
        if len(self._said) > SAID_KEPT:
            self._said.popitem(last=False)
        return True
