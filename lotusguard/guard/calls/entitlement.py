# SPDX-License-Identifier: Apache-2.0
"""Who may stay in a running call: every arrival is checked like a join, and everybody again from time to time."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from attrs import define, field, frozen
from cachetools import LRUCache
from livekit.protocol.models import ParticipantInfo
from twisted.internet.defer import Deferred, DeferredSemaphore
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from lotusguard.clients.waiting import Deadline, gather
from lotusguard.guard.joins.checks import MembersOnly
from lotusguard.guard.joins.lobby import Lobby
from lotusguard.guard.joins.lobby.switching import LobbySwitch
from lotusguard.guard.rooms.members import KnownMembership, Members
from lotusguard.guard.rooms.policies import KnownPolicy
from lotusguard.guard.seats.registry import TokenRegistry
from lotusguard.metrics import Metrics
from lotusguard.rules.homeservers import HomeserverList
from lotusguard.rules.identity import server_of
from lotusguard.rules.lobby import LobbyState
from lotusguard.rules.membership import Membership
from lotusguard.rules.refusals import Refusal

log = Logger()

LOOKUPS_AT_ONCE = 4
"""Memberships that one call looks up at the same time: joins come first."""
ABSENT_FOR, FOREIGN_ABSENT_FOR = 3.0, 60.0
"""Seconds between two answers without any entry before that counts as "not a member"; the second for users of other
homeservers, whose events arrive late."""
PUSHED_FACTOR = 10
"""How many times longer a membership is believed where changes are pushed."""
SESSIONS_KEPT = 100_000
ABSENCES_KEPT = 50_000


@frozen
class Unentitled:
    """A participant who has to be removed."""

    participant: ParticipantInfo
    user: str
    reason: Refusal


@define(eq=False)
class Entitlement:
    """Finds participants who may not be in the call.

    Never among them: participants whose Matrix user is unknown, and anybody while what decides is unknown.

    :param interval: seconds for which the membership of somebody in the call is believed.
    :param arrival_age: the same for somebody who has just arrived.
    :ivar changes_are_pushed: whether somebody tells us of changes; memberships are read less often then.
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
    changes_are_pushed: bool = field(default=False, init=False)
    _checked: LRUCache[tuple[str, str], None] = field(factory=lambda: LRUCache(SESSIONS_KEPT), init=False)
    _absent_since: LRUCache[tuple[str, str], float] = field(factory=lambda: LRUCache(ABSENCES_KEPT), init=False)
    _unidentified: dict[str, int] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self._metrics.unidentified_participants.set_function(lambda: sum(self._unidentified.values()))

    @property
    def enforces_membership(self) -> bool:
        return self._members_only is not MembersOnly.OFF

    @property
    def checks_everybody(self) -> bool:
        """Whether participants are checked in rooms without a policy too."""
        return self.enforces_membership or not self._homeservers.allows_all

    async def unentitled(
        self, room_id: str, alias: str, known: KnownPolicy, participants: Iterable[ParticipantInfo]
    ) -> list[Unentitled]:
        """The participants of one SFU room who may not be in its call."""
        began = self._clock.seconds()
        turns = DeferredSemaphore(LOOKUPS_AT_ONCE)
        unidentified = 0
        checks = []
        for participant in participants:
            user = await self._registry.user_behind(alias, participant.identity)
            if not is_matrix_user(user) or participant.kind != ParticipantInfo.Kind.STANDARD:
                unidentified += 1
                continue
            checks.append(self._checked_in_turn(turns, room_id, known, participant, user, began))
        if unidentified:
            self._unidentified[alias] = unidentified
        else:
            self._unidentified.pop(alias, None)
        return [found for found in await gather(checks) if found is not None]

    def forget(self, alias: str) -> None:
        """Nobody is in this SFU room any more."""
        self._unidentified.pop(alias, None)

    async def _checked_in_turn(
        self, turns: DeferredSemaphore, room_id: str, known: KnownPolicy, participant: ParticipantInfo, user: str,
        began: float,
    ) -> Unentitled | None:  # fmt: skip
        reason = self._refused_by_policy(room_id, known, user)
        if reason is None and self.enforces_membership:
            membership = self._members.last_known(room_id, user)
            if membership is None or not self._is_believed(room_id, user, participant.sid, membership):
                look = self._membership(room_id, participant.sid, user, began)
                membership = await turns.run(lambda: Deferred.fromCoroutine(look))
            reason = self._refused_by_membership(room_id, user, membership)
            if reason is not None:
                self._lobby.left_room(room_id, user)
        if reason is None:
            reason = await self._refused_by_lobby(room_id, known, participant, user)
        self._checked[room_id, participant.sid] = None
        return Unentitled(participant, user, reason) if reason is not None else None

    def _refused_by_policy(self, room_id: str, known: KnownPolicy, user: str) -> Refusal | None:
        if self._lobby.state_of(room_id, user) is LobbyState.REMOVED:
            return Refusal.REMOVED
        if not self._homeservers.allows_user(user):
            return Refusal.HOMESERVER_NOT_ALLOWED
        if known.is_certain and not known.policy.may_join(user):
            return Refusal.JOIN_LEVEL
        return None

    async def _refused_by_lobby(
        self, room_id: str, known: KnownPolicy, participant: ParticipantInfo, user: str
    ) -> Refusal | None:
        """Whoever may be in the call is noted as accepted: they stay when their power level falls."""
        if not await self._switch.is_on(room_id, known):
            return None
        if (
            self._lobby.state_of(room_id, user) is not LobbyState.ACCEPTED
            and known.is_certain
            and not known.policy.bypasses_lobby(user)
            and not self._switch.joined_before_us(participant)
        ):
            return Refusal.NOT_ADMITTED
        self._lobby.let_in(room_id, user)
        return None

    def _is_believed(self, room_id: str, user: str, sid: str, known: KnownMembership) -> bool:
        """Whether what is in memory saves a lookup: a fresh enough "joined", and nothing else."""
        return known.membership is Membership.JOIN and self._members.is_fresh(
            room_id, user, known, self._max_age(room_id, sid)
        )

    def _max_age(self, room_id: str, sid: str) -> float:
        if (room_id, sid) not in self._checked:
            return self._arrival_age
        return self._interval * (PUSHED_FACTOR if self.changes_are_pushed else 1)

    async def _membership(self, room_id: str, sid: str, user: str, began: float) -> KnownMembership:
        """The membership, looked up again if it is not "joined": a removal rests on nothing old."""
        deadline = Deadline.after(self._clock, self._lookup_timeout)
        known = await self._members.get(room_id, user, deadline, max_age=self._max_age(room_id, sid))
        if known.membership in (None, Membership.JOIN) or known.began >= began:
            return known
        return await self._members.get(room_id, user, Deadline.after(self._clock, self._lookup_timeout), since=began)

    def _refused_by_membership(self, room_id: str, user: str, known: KnownMembership) -> Refusal | None:
        key = (room_id, user)
        if known.membership is None:
            self._metrics.memberships_unknown.inc()
            return None
        if known.membership is not Membership.ABSENT:
            self._absent_since.pop(key, None)
            return None if known.membership is Membership.JOIN else self._not_a_member(room_id, user, known)
        first = self._absent_since.setdefault(key, known.began)
        enough = ABSENT_FOR if server_of(user) == self._server_name() else FOREIGN_ABSENT_FOR
        return self._not_a_member(room_id, user, known) if known.began - first >= enough else None

    def _not_a_member(self, room_id: str, user: str, known: KnownMembership) -> Refusal | None:
        if self._members_only is MembersOnly.ON:
            return Refusal.NOT_A_MEMBER
        log.info(
            "{user} is in the call of {room_id} and is not a member ({membership}); GUARD_MEMBERS_ONLY=log",
            user=user, room_id=room_id, membership=known.membership.value if known.membership else "",
            event_name="not_a_member",
        )  # fmt: skip
        return None


def is_matrix_user(user: str) -> bool:
    """Whether an identity was resolved to a Matrix user."""
    return user.startswith("@") and ":" in user
