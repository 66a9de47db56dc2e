# SPDX-License-Identifier: Apache-2.0
"""What is done to participants: sources revoked and restored, tracks muted, people removed.

Rights are only ever narrowed, but for what the guard itself withheld or revoked; every other flag stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from enum import Enum

from attrs import define, field, frozen
from cachetools import LRUCache
from livekit.protocol.models import ParticipantInfo
from twisted.internet.defer import CancelledError
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.livekit import LiveKitClient, NodeGone, NoSuchParticipant
from lotusguard.clients.waiting import gather_in_turns, in_slices
from lotusguard.guard.calls.failing import FailingCalls
from lotusguard.guard.rooms.policies import KnownPolicy
from lotusguard.guard.seats.registry import TokenRegistry
from lotusguard.metrics import Metrics
from lotusguard.rules.identity import is_matrix_user
from lotusguard.rules.policy import Policy
from lotusguard.rules.sources import (
    EVERY_SOURCE,
    NO_SOURCE,
    Source,
    adjusted,
    disguised,
    permitted_sources,
    within,
)

log = Logger()

PARTICIPANTS_AT_ONCE = 12
"""Participants of one SFU room that are changed at the same time: several, so that those whose node hangs delay few of
the others, and fewer than the calls to LiveKit that may be in flight."""
LOGGED_KEPT = 10_000


AT_ONCE_FROM = 50
"""If more participants than this are to be changed, each is changed as the listing showed them, which halves the calls.
Otherwise each is read again first."""
LISTING_SERVES = 1.0
"""Seconds for which a listing may serve for that, once it has been worked through."""


class Adjusted(Enum):
    """How far the rights in a call are as they should be."""

    NOTHING_TO_DO = "nothing to do"
    DONE = "done"
    LEFT_SOME = "left some"
    """The listing became too old; the rest needs another one."""


@frozen
class _Adjustment:
    """What one participant may publish, and what the guard owes them."""

    participant: ParticipantInfo
    allowed: frozenset[Source]
    owed: frozenset[Source]


@define(eq=False)
class ParticipantEnforcer:
    """Changes participants, checks that LiveKit did it, and says so.

    :param restore: give back what the guard withheld or revoked, once it is allowed again.
    :param dry_run: decide, log and count, change nothing.
    :param may_act: whether this guard may change participants; not while another one runs on its state directory.
    :param removed: is told of each removal: user, room and reason.
    :ivar failing: is told of what fails.
    """

    _livekit: LiveKitClient
    _registry: TokenRegistry
    _clock: IReactorTime
    _metrics: Metrics
    failing: FailingCalls
    restore: bool
    dry_run: bool
    _may_act: Callable[[], bool]
    _removed: Callable[[str, str, str], None] = lambda user, room_id, reason: None
    _logged: LRUCache[tuple[str, ...], None] = field(factory=lambda: LRUCache(LOGGED_KEPT), init=False)

    @property
    def acts(self) -> bool:
        """Whether participants are changed at all."""
        return not self.dry_run and self._may_act()

    async def remove(self, room_id: str, alias: str, identity: str, user: str, reason: str) -> bool:
        """Disconnect a participant. Their token stays valid. :return: whether they are gone."""
        if not self.acts:
            self.skipped("remove", room_id, alias, identity, reason)
            return False
        with self._failures("remove", alias, identity):
            try:
                await self._livekit.remove_participant(alias, identity)
            except NodeGone:
                raise
            except NoSuchParticipant:
                return True
            self._metrics.removals.labels(reason).inc()
            self._removed(user or identity, room_id, reason)
            log.info(
                "removed {user} from the call of {room_id}: {reason}",
                user=user, identity=identity, room_id=room_id, alias=alias, reason=reason, event_name="removed",
            )  # fmt: skip
            return True
        return False

    async def adjust(
        self, room_id: str, alias: str, participants: Collection[ParticipantInfo], known: KnownPolicy
    ) -> Adjusted:
        """Bring everybody's rights in line with the policy.

        Rights are given back only while the policy is certain.
        """
        due = [
            adjustment
            async for participant in in_slices(self._clock, participants)
            if (adjustment := await self._due(alias, participant, known)) is not None
        ]

        many, until = len(due) > AT_ONCE_FROM, self._clock.seconds() + LISTING_SERVES
        outcome = Adjusted.DONE if due else Adjusted.NOTHING_TO_DO

        async def adjust(adjustment: _Adjustment) -> None:
            nonlocal outcome
            if many and self._clock.seconds() > until:
                outcome = Adjusted.LEFT_SOME
            else:
                await self._adjust(room_id, alias, adjustment, read_again=not many)

        await gather_in_turns(PARTICIPANTS_AT_ONCE, adjust, due)
        return outcome

    async def _due(self, alias: str, participant: ParticipantInfo, known: KnownPolicy) -> _Adjustment | None:
        """What has to change for a participant, as the listing shows them; ``None`` if nothing has to."""
        policy = known.policy
        owed = await self._owed(alias, participant.identity) if self.restore and known.is_certain else NO_SOURCE
        if not owed and not policy:
            return None
        user = await self._registry.user_behind(alias, participant.identity)
        allowed = _allowed(policy, user)
        if adjusted(participant.permission, allowed, owed) is None and not disguised(participant, allowed):
            return None
        return _Adjustment(participant, allowed, owed)

    async def _owed(self, alias: str, identity: str) -> frozenset[Source]:
        """What the guard withheld from this identity or revoked, within what upstream granted."""
        entry = await self._registry.entry(alias, identity)
        return entry.withheld & entry.ceiling if entry is not None and entry.ceiling is not None else NO_SOURCE

    async def _adjust(self, room_id: str, alias: str, adjustment: _Adjustment, *, read_again: bool) -> None:
        participant = adjustment.participant
        with self._failures("adjust", alias, participant.identity):
            if adjusted(participant.permission, adjustment.allowed, adjustment.owed) is not None:
                await self._set_rights(room_id, alias, adjustment, read_again=read_again)
            for track in disguised(participant, adjustment.allowed):
                await self._mute(room_id, alias, participant.identity, track.sid, Source(track.source))

    async def find(self, room_id: str, alias: str, identity: str) -> ParticipantInfo | None:
        """A participant as LiveKit shows them now; ``None`` if there is none of that identity.

        :raises DependencyFailed: LiveKit does not tell.
        """
        try:
            return await self._livekit.get_participant(alias, identity, turn=room_id)
        except NoSuchParticipant:
            return None

    async def _set_rights(self, room_id: str, alias: str, adjustment: _Adjustment, *, read_again: bool) -> None:
        fresh, identity = adjustment.participant, adjustment.participant.identity
        if read_again:
            fresh = await self._livekit.get_participant(alias, identity)
        if fresh.sid != adjustment.participant.sid:
            return  # another session since the listing; its arrival is worked on next
        wanted = adjusted(fresh.permission, adjustment.allowed, adjustment.owed)
        if wanted is None:
            return
        before, after = set(permitted_sources(fresh.permission)), set(permitted_sources(wanted))
        revoked, restored = frozenset(before - after), frozenset(after - before)
        if not self.acts:
            action = "revoke" if revoked else "restore"
            self.skipped(action, room_id, alias, identity, *_claims(revoked | restored))
            return
        # Recorded before it happens: a record of something that did not happen restores nothing, a missing one would
        # lose what was revoked if we are killed in between.
        await self._registry.set_withheld(alias, identity, await self._withheld(alias, identity) | revoked)
        updated = await self._livekit.update_permission(alias, identity, wanted)
        if updated.sid != fresh.sid or not (within(updated.permission, wanted) and within(wanted, updated.permission)):
            self.failed("adjust", alias, "not_applied")
            return
        # Read again: a token that was issued in between may have withheld more.
        await self._registry.set_withheld(alias, identity, await self._withheld(alias, identity) - restored)
        self._tell(room_id, alias, identity, revoked, restored)

    async def _withheld(self, alias: str, identity: str) -> frozenset[Source]:
        entry = await self._registry.entry(alias, identity)
        return entry.withheld if entry is not None else NO_SOURCE

    async def _mute(self, room_id: str, alias: str, identity: str, track_sid: str, label: Source) -> None:
        if not self.acts:
            self.skipped("mute", room_id, alias, identity, track_sid)
            return
        await self._livekit.mute_track(alias, identity, track_sid)
        self._metrics.mutes.inc()
        log.warn(
            "muted a video track of {identity} in {room_id} that is labelled {label}",
            identity=identity, room_id=room_id, alias=alias, label=label.claim, event_name="muted",
        )  # fmt: skip

    # -- logging -----------------------------------------------------------------------------------------

    @contextmanager
    def _failures(self, action: str, alias: str, identity: str) -> Iterator[None]:
        """Logs and counts what goes wrong inside; the next round tries again."""
        try:
            yield
        except CancelledError:
            raise
        except DependencyFailed as failed:
            self.failed(action, alias, failed.reason)
        except NodeGone:  # such an entry is listed for long after its node crashed: logged once, counted each time
            if self._first_time("failed", action, alias, identity):
                self.failed(action, alias, "node_gone")
            else:
                self._metrics.enforcement_failures.labels(action, "node_gone").inc()
        except NoSuchParticipant:
            pass
        except Exception:
            self._count_failure(action, alias, "internal_error")
            log.failure("could not {action} {identity} in {alias}", action=action, identity=identity, alias=alias)

    def failed(self, action: str, alias: str, reason: str) -> None:
        """Something could not be done."""
        self._count_failure(action, alias, reason)
        log.warn(
            "could not {action} in {alias}, will try again: {reason}",
            action=action, alias=alias, reason=reason, event_name="enforcement_failed",
        )  # fmt: skip

    def _count_failure(self, action: str, alias: str, reason: str) -> None:
        self._metrics.enforcement_failures.labels(action, reason).inc()
        self.failing.failed(alias, action, reason)

    def skipped(self, action: str, room_id: str, alias: str, identity: str, *what: str) -> None:
        """Something was decided and not done. Logged and counted once, not in every round."""
        if self._first_time(action, alias, identity, *what):
            self._metrics.dry_run_skipped.labels(action).inc()
            log.info(
                "would {action} {identity} in {room_id}: {what}",
                action=action, identity=identity, room_id=room_id, alias=alias, what=", ".join(what),
                event_name="skipped",
            )  # fmt: skip

    def _first_time(self, *what: str) -> bool:
        first = what not in self._logged
        self._logged[what] = None
        return first

    def _tell(
        self, room_id: str, alias: str, identity: str, revoked: frozenset[Source], restored: frozenset[Source]
    ) -> None:
        for source in revoked:
            self._metrics.revocations.labels(source.claim).inc()
        for source in restored:
            self._metrics.restorations.labels(source.claim).inc()
        if revoked:
            log.info(
                "revoked {sources} from {identity} in {room_id}",
                sources=_claims(revoked), identity=identity, room_id=room_id, alias=alias, event_name="revoked",
            )  # fmt: skip
        if restored:
            log.info(
                "restored {sources} to {identity} in {room_id}",
                sources=_claims(restored), identity=identity, room_id=room_id, alias=alias, event_name="restored",
            )  # fmt: skip


def _claims(sources: frozenset[Source]) -> list[str]:
    return sorted(source.claim for source in sources)


def _allowed(policy: Policy, user: str) -> frozenset[Source]:
    """What a participant may publish. Power levels decide nothing about an identity without a known user."""
    return policy.allowed_sources(user) if is_matrix_user(user) else EVERY_SOURCE - policy.forbidden
