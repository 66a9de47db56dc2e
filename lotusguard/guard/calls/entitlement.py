# SPDX-License-Identifier: Apache-2.0
"""Who may stay in a running call: every arrival is checked like a join, and everybody again from time to time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from attrs import define, evolve, field, frozen
from cachetools import LRUCache
from livekit.protocol.models import ParticipantInfo
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from lotusguard.clients.waiting import Deadline, gather_in_turns, in_slices
from lotusguard.guard.lobby import Lobby
from lotusguard.guard.lobby.switching import LobbySwitch
from lotusguard.guard.rooms.members import KnownMembership, Members
from lotusguard.guard.rooms.policies import KnownPolicy
from lotusguard.guard.seats.registry import TokenRegistry
from lotusguard.metrics import Metrics
from lotusguard.rules.homeservers import HomeserverList
from lotusguard.rules.identity import is_matrix_user, server_of
from lotusguard.rules.lobby import LobbyState
from lotusguard.rules.members_only import MembersOnly
from lotusguard.rules.membership import Membership
from lotusguard.rules.refusals import Refusal

log = Logger()

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
class Unentitled:
    """A participant who has to be removed."""

    participant: ParticipantInfo
    user: str
    reason: Refusal


@frozen
class _Absence:
    """When the lookups began that found no entry for a user: the first one and the latest."""

    first: float
    latest: float


@frozen
class _Check:
    """One check of a call's participants. :ivar deadline: for all lookups together; what is late stays unknown."""

    room_id: str
    policy: KnownPolicy
    began: float
    deadline: Deadline


@define(eq=False)
class Entitlement:
    """Finds participants who may not be in the call.

    Never among them: participants whose Matrix user is unknown, and anybody while what decides is unknown.

    :param interval: seconds for which the membership of somebody in the call is believed.
    :param arrival_age: the same for somebody who has just arrived.
    """

    _members: Members
    _registry: TokenRegistry
    _lobby: Lobby
    _switch: LobbySwitch
    _homeservers: HomeserverList
    _members_only: MembersOnly
    _server_name: Callable[[], str]
    _clock: IReactorTime
    _metrics: Metrics
    _lookup_timeout: float
    _interval: float
    _arrival_age: float
    _pushed_at: float | None = field(default=None, init=False)
    _checked: LRUCache[tuple[str, str], None] = field(factory=lambda: LRUCache(SESSIONS_KEPT), init=False)
    _reported: LRUCache[tuple[str, str], None] = field(factory=lambda: LRUCache(SESSIONS_KEPT), init=False)
    _absences: LRUCache[tuple[str, str], _Absence] = field(factory=lambda: LRUCache(ABSENCES_KEPT), init=False)
    _unidentified: dict[str, int] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self._metrics.unidentified_participants.set_function(lambda: sum(self._unidentified.values()))

    @property
    def removes_non_members(self) -> bool:
        return self._members_only is MembersOnly.ON

    def checks(self, room_id: str) -> bool:
        """Whether participants of this room are checked although it has no policy."""
        return (
            self._members_only is not MembersOnly.OFF
            or not self._homeservers.allows_all
            or self._lobby.has_removed(room_id)
        )

    def membership_pushed(self) -> None:
        """Somebody tells us of changed memberships: they are read less often now, until that seems to have ended."""
        self._pushed_at = self._clock.seconds()

    async def unentitled(
        self, room_id: str, alias: str, known: KnownPolicy, participants: Iterable[ParticipantInfo], *, whole: bool
    ) -> list[Unentitled]:
        """Those of these participants of one SFU room who may not be in its call.

        :param whole: whether these are all of its participants.
        """
        now = self._clock.seconds()
        check = _Check(room_id, known, now, Deadline.after(self._clock, self._lookup_timeout))
        found, allowed = [], []
        async for participant, user in in_slices(self._clock, await self._identified(alias, participants, whole)):
            refusal = await self._refused_by_policy(room_id, known, user)
            if refusal is not None:
                found.append(Unentitled(participant, user, refusal))
            else:
                allowed.append((participant, user))
        if self._members_only is not MembersOnly.OFF:
            gone = await self._non_members(check, allowed)
            for one in gone:
                await self._lobby.left_room(room_id, one.user)
            users = {one.user for one in gone}
            allowed = [(participant, user) for participant, user in allowed if user not in users]
            found += gone
        return found + await self._not_admitted(check, allowed)

    async def end_waiting(self, room_id: str, user: str) -> None:
        """Memberships of a room have changed: people who wait in its lobby and are not joined any more stop waiting.

        :param user: whose membership it is; ``""`` for everybody's.
        """
        waiting = [one for one in self._lobby.waiting_in(room_id) if user in ("", one)]
        if waiting and self.removes_non_members:
            await self._end_waiting(room_id, waiting, Deadline.after(self._clock, self._lookup_timeout))

    async def end_waiting_unheard(self) -> None:
        """The same for all lobbies, where nobody tells of changed memberships. To be called every few seconds: each
        membership is believed as long as that of somebody in a call, and all lookups have one deadline."""
        if not self.removes_non_members:
            return
        deadline = Deadline.after(self._clock, self._lookup_timeout)
        for room_id in self._lobby.rooms_with(LobbyState.WAITING):
            # those who are looked up are believed in the next round, so that it comes further
            await self._end_waiting(room_id, self._lobby.waiting_in(room_id), deadline, self._believed_for())

    async def _end_waiting(
        self, room_id: str, waiting: Collection[str], deadline: Deadline, max_age: float | None = None
    ) -> None:
        async def end(one: str) -> None:
            if deadline.passed:
                return
            known = await self._members.get(room_id, one, deadline, max_age=max_age)
            if known.membership not in (None, Membership.JOIN):
                await self._lobby.left_room(room_id, one)

        await gather_in_turns(LOOKUPS_AT_ONCE, end, waiting)

    def forget(self, alias: str) -> None:
        """Nobody is in this SFU room any more."""
        self._unidentified.pop(alias, None)

    async def _identified(
        self, alias: str, participants: Iterable[ParticipantInfo], whole: bool
    ) -> list[tuple[ParticipantInfo, str]]:
        """The participants whose Matrix user is known; the others are counted."""
        identified, unidentified = [], 0
        async for participant in in_slices(self._clock, participants):
            user = await self._registry.user_behind(alias, participant.identity)
            if is_matrix_user(user) and participant.kind == ParticipantInfo.Kind.STANDARD:
                identified.append((participant, user))
            else:
                unidentified += 1
        if whole:
            self._unidentified.pop(alias, None)
            if unidentified:
                self._unidentified[alias] = unidentified
        return identified

    async def _refused_by_policy(self, room_id: str, known: KnownPolicy, user: str) -> Refusal | None:
        if await self._is_removed(room_id, user):
            return Refusal.REMOVED
        if not self._homeservers.allows_user(user):
            return Refusal.HOMESERVER_NOT_ALLOWED
        if known.is_certain and not known.policy.may_join(user):
            return Refusal.JOIN_LEVEL
        return None

    # -- the lobby ---------------------------------------------------------------------------------------

    async def _is_removed(self, room_id: str, user: str) -> bool:
        """Whether a moderator removed the user, and none has admitted them since, through whatever guard."""
        if self._lobby.state_of(room_id, user) is not LobbyState.REMOVED:
            return False
        return await self._lobby.read(room_id, user) is LobbyState.REMOVED

    async def _is_accepted(self, room_id: str, user: str) -> bool:
        """Whether a moderator admitted the user. The others are asked before somebody is removed."""
        if self._lobby.state_of(room_id, user) is LobbyState.ACCEPTED:
            return True
        return await self._lobby.read(room_id, user) is LobbyState.ACCEPTED

    async def _not_admitted(
        self, check: _Check, participants: Iterable[tuple[ParticipantInfo, str]]
    ) -> list[Unentitled]:
        """Everybody who may stay is noted as accepted: they stay when their power level falls. A policy that may be out
        of date removes nobody, and accepts nobody."""
        room_id, known = check.room_id, check.policy
        is_on = await self._switch.is_on(room_id, known)
        if not is_on or not known.is_certain or known.policy.lobby is None:
            return []
        found = []
        for participant, user in participants:
            if (
                not known.policy.bypasses_lobby(user)
                and not self._switch.joined_before_us(participant)
                and not await self._is_accepted(room_id, user)
            ):
                found.append(Unentitled(participant, user, Refusal.NOT_ADMITTED))
            else:
                await self._lobby.let_in(room_id, user)
        return found

    # -- membership --------------------------------------------------------------------------------------

    async def _non_members(
        self, check: _Check, participants: Collection[tuple[ParticipantInfo, str]]
    ) -> list[Unentitled]:
        due = await self._not_believed(check, participants)
        users = {user for _, user in due}
        if len(users) > LIST_FROM:
            half = check.deadline.sooner(self._lookup_timeout / 2)  # the other half is for single lookups
            await self._members.load_joined(check.room_id, users, half)
            due = await self._not_believed(check, due)

        async def checked(one: tuple[ParticipantInfo, str]) -> Unentitled | None:
            participant, user = one
            known = await self._membership(check, user, participant.sid)
            if known.membership is None:
                self._metrics.memberships_unknown.inc()
                return None
            self._checked[check.room_id, participant.sid] = None
            if not self._counts_as_gone(check, user, known):
                return None
            return self._non_member(check, participant, user, known.membership)

        outcomes = await gather_in_turns(LOOKUPS_AT_ONCE, checked, due)
        return [found for found in outcomes if found is not None]

    async def _not_believed(
        self, check: _Check, participants: Iterable[tuple[ParticipantInfo, str]]
    ) -> list[tuple[ParticipantInfo, str]]:
        """Those who are due for a lookup. The others count as checked."""
        due = []
        async for participant, user in in_slices(self._clock, participants):
            if self._believed(check, user, participant.sid):
                self._checked[check.room_id, participant.sid] = None
                self._absences.pop((check.room_id, user), None)
            else:
                due.append((participant, user))
        return due

    def _believed(self, check: _Check, user: str, sid: str) -> KnownMembership | None:
        """What is in memory, if it saves a lookup: a fresh enough "joined", and nothing else."""
        known = self._members.last_known(check.room_id, user)
        if known is None or known.membership is not Membership.JOIN:
            return None
        max_age = self._max_age(check.room_id, sid)
        return known if self._members.is_fresh(check.room_id, user, known, max_age) else None

    def _max_age(self, room_id: str, sid: str) -> float:
        return self._believed_for() if (room_id, sid) in self._checked else self._arrival_age

    def _believed_for(self) -> float:
        """Seconds for which a membership is believed."""
        pushed = self._pushed_at is not None and self._clock.seconds() - self._pushed_at < PUSHES_LAPSE
        return self._interval * (PUSHED_FACTOR if pushed else 1)

    async def _membership(self, check: _Check, user: str, sid: str) -> KnownMembership:
        """The membership, looked up again if it is not "joined": a removal rests on nothing old."""
        if check.deadline.passed:
            return KnownMembership(None, reason="timeout")
        room_id = check.room_id
        known = await self._members.get(room_id, user, check.deadline, max_age=self._max_age(room_id, sid))
        if known.membership in (None, Membership.JOIN) or known.began >= check.began:
            return known
        return await self._members.get(room_id, user, check.deadline, since=check.began)

    def _counts_as_gone(self, check: _Check, user: str, known: KnownMembership) -> bool:
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

    def _non_member(
        self, check: _Check, participant: ParticipantInfo, user: str, membership: Membership
    ) -> Unentitled | None:
        if self.removes_non_members:
            return Unentitled(participant, user, Refusal.NOT_A_MEMBER)
        if (check.room_id, participant.sid) not in self._reported:
            self._reported[check.room_id, participant.sid] = None
            log.info(
                "{user} is in the call of {room_id} and is not a member ({membership}); GUARD_MEMBERS_ONLY=log",
                user=user, room_id=check.room_id, membership=membership.value, event_name="not_a_member",
            )  # fmt: skip
        return None
