# SPDX-License-Identifier: Apache-2.0
"""Whether participants of a running call are members of its room: believed for a while, and looked up again in time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Coroutine, Iterable
from typing import Any, TypeVar

from attrs import define, evolve, field, frozen
from cachetools import LRUCache
from livekit.protocol.models import ParticipantInfo
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from lotusguard.clients.waiting import Deadline, gather_in_turns, in_slices
from lotusguard.guard.rooms.members import KnownMembership, Members
from lotusguard.guard.rooms.policies import KnownPolicy
from lotusguard.metrics import Metrics
from lotusguard.rules.identity import server_of
from lotusguard.rules.members_only import MembersOnly
from lotusguard.rules.membership import Membership

log = Logger()
T = TypeVar("T")

LOOKUPS_AT_ONCE = 4
"""Memberships that one call looks up at the same time: joins come first."""
LIST_FROM = 8
"""If more users than this are due in one call, the room's list of members is read first, with one request. For a room
of 10,000 members that costs Synapse as much as four single lookups, and the guard as much as eight."""
ABSENT_FOR, FOREIGN_ABSENT_FOR = 3.0, 60.0
"""Seconds between two answers without any entry before that counts as "not a member"; the second for users of other
homeservers, whose events arrive late."""
ABSENCE_FORGOTTEN = 120.0
"""Seconds without such an answer after which the next one counts as the first again."""
PUSHED_FACTOR = 10
"""How many times longer a membership is believed where changes are pushed."""
PUSHES_LAPSE = 600.0
"""Seconds without a pushed membership after which nobody seems to push any more."""
SESSIONS_KEPT = 100_000
ABSENCES_KEPT = 50_000


@frozen
class _Absence:
    """When the lookups began that found no entry for a user: the first one and the latest."""

    first: float
    latest: float


@define
class Check:
    """One check of a call's participants.

    :ivar deadline: for all lookups together; what is late stays unknown.
    :ivar again_at: when the first membership among them has to be looked up again.
    """

    room_id: str
    policy: KnownPolicy
    began: float
    deadline: Deadline
    again_at: float


@define(eq=False)
class CallMemberships:
    """Finds participants who are certainly not members.

    :param interval: seconds for which the membership of somebody in the call is believed; of somebody who has just
        arrived it is as long as `Members.ttl`.
    """

    _members: Members
    _members_only: MembersOnly
    _server_name: Callable[[], str]
    _clock: IReactorTime
    _metrics: Metrics
    lookup_timeout: float
    interval: float
    _pushed_at: float | None = field(default=None, init=False)
    _checked: LRUCache[tuple[str, str], None] = field(factory=lambda: LRUCache(SESSIONS_KEPT), init=False)
    _reported: LRUCache[tuple[str, str], None] = field(factory=lambda: LRUCache(SESSIONS_KEPT), init=False)
    _absences: LRUCache[tuple[str, str], _Absence] = field(factory=lambda: LRUCache(ABSENCES_KEPT), init=False)

    @property
    def asked_for(self) -> bool:
        """Whether memberships matter at all."""
        return self._members_only is not MembersOnly.OFF

    @property
    def removes_non_members(self) -> bool:
        return self._members_only is MembersOnly.ON

    def pushed(self) -> None:
        """Somebody tells us of changed memberships: they are read less often now, until that seems to have ended."""
        self._pushed_at = self._clock.seconds()

    def departures(self, room_id: str) -> int:
        """See `Members.departures`."""
        return self._members.departures(room_id)

    async def not_joined(
        self, room_id: str, users: Iterable[str], deadline: Deadline, max_age: float | None = None
    ) -> list[str]:
        """Those of these users who are not joined to the room, as far as that is known by the deadline.

        :param max_age: seconds for which "joined" is believed; anything else is looked up again.
        """

        async def has_left(user: str) -> bool:
            known = await self._membership(room_id, user, deadline, max_age, self._clock.seconds())
            return known.membership not in (None, Membership.JOIN)

        return await _those(has_left, users)

    async def non_members(
        self, check: Check, participants: Collection[tuple[ParticipantInfo, str]]
    ) -> list[tuple[ParticipantInfo, str]]:
        """Those of the participants who have to go. Notes in the check when memberships have to be looked up again."""
        due = await self._not_believed(check, participants)
        users = {user for _, user in due}
        if len(users) > LIST_FROM:
            half = check.deadline.sooner(self.lookup_timeout / 2)  # the other half is for single lookups
            await self._members.load_joined(check.room_id, users, half)
            due = await self._not_believed(check, due)

        async def has_to_go(one: tuple[ParticipantInfo, str]) -> bool:
            participant, user = one
            max_age = self._max_age(check.room_id, participant.sid)
            known = await self._membership(check.room_id, user, check.deadline, max_age, check.began)
            if known.membership is not Membership.JOIN:
                check.again_at = check.began
            if known.membership is None:
                self._metrics.memberships_unknown.inc()
                return False
            self._checked[check.room_id, participant.sid] = None
            return self._counts_as_gone(check, user, known) and self._removes(check, participant, user, known)

        return await _those(has_to_go, due)

    async def _not_believed(
        self, check: Check, participants: Iterable[tuple[ParticipantInfo, str]]
    ) -> list[tuple[ParticipantInfo, str]]:
        """Those who are due for a lookup. The others count as checked."""
        due = []
        async for participant, user in in_slices(self._clock, participants):
            believed_until = self._believed_until(check, user, participant.sid)
            if believed_until is not None:
                check.again_at = min(check.again_at, believed_until)
                self._checked[check.room_id, participant.sid] = None
                self._absences.pop((check.room_id, user), None)
            else:
                due.append((participant, user))
        return due

    def _believed_until(self, check: Check, user: str, sid: str) -> float | None:
        """How long what is in memory saves a lookup; ``None`` if it does not. Only a fresh enough "joined" does."""
        known = self._members.last_known(check.room_id, user)
        if known is None or known.membership is not Membership.JOIN:
            return None
        max_age = self._max_age(check.room_id, sid)
        return known.began + max_age if self._members.is_fresh(check.room_id, user, known, max_age) else None

    def _max_age(self, room_id: str, sid: str) -> float:
        return self.believed_for() if (room_id, sid) in self._checked else self._members.ttl

    def believed_for(self) -> float:
        """Seconds for which a membership is believed."""
        pushed = self._pushed_at is not None and self._clock.seconds() - self._pushed_at < PUSHES_LAPSE
        return self.interval * (PUSHED_FACTOR if pushed else 1)

    async def _membership(
        self, room_id: str, user: str, deadline: Deadline, max_age: float | None, since: float
    ) -> KnownMembership:
        """The membership. If it is not "joined" it was looked up at ``since`` or later: a removal rests on nothing
        old."""
        if deadline.passed:
            return KnownMembership(None, reason="timeout")
        known = await self._members.get(room_id, user, deadline, max_age=max_age)
        if known.membership in (None, Membership.JOIN) or known.began >= since:
            return known
        return await self._members.get(room_id, user, deadline, since=since)

    def _counts_as_gone(self, check: Check, user: str, known: KnownMembership) -> bool:
        """Whether somebody is certainly not joined. A missing entry is not "leave": it counts if it is still missing
        after some seconds, and if the state of the room is known.
        """
        key = (check.room_id, user)
        if known.membership is not Membership.ABSENT:
            self._absences.pop(key, None)
            return known.membership is not Membership.JOIN
        if not check.policy.is_certain:
            return False
        absence = self._absences.get(key)
        if absence is None or known.began - absence.latest > ABSENCE_FORGOTTEN:
            absence = _Absence(known.began, known.began)
        self._absences[key] = evolve(absence, latest=known.began)
        enough = ABSENT_FOR if server_of(user) == self._server_name() else FOREIGN_ABSENT_FOR
        return known.began - absence.first >= enough

    def _removes(self, check: Check, participant: ParticipantInfo, user: str, known: KnownMembership) -> bool:
        """Whether a non-member is removed. Otherwise it is logged, once for each session."""
        if self.removes_non_members:
            return True
        if (check.room_id, participant.sid) not in self._reported:
            self._reported[check.room_id, participant.sid] = None
            log.info(
                "{user} is in the call of {room_id} and is not a member ({membership}); GUARD_MEMBERS_ONLY=log",
                user=user, room_id=check.room_id, membership=known.membership and known.membership.value,
                event_name="not_a_member",
            )  # fmt: skip
        return False


async def _those(is_so: Callable[[T], Coroutine[Any, Any, bool]], of: Iterable[T]) -> list[T]:
    """Those for whom a question is answered with yes, a few asked at the same time."""

    async def ask(one: T) -> tuple[T, bool]:
        return one, await is_so(one)

    return [one for one, yes in await gather_in_turns(LOOKUPS_AT_ONCE, ask, of) if yes]
