# SPDX-License-Identifier: Apache-2.0
"""Who may stay in a running call: every arrival is checked like a join, and everybody again from time to time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from attrs import define, field, frozen
from livekit.protocol.models import ParticipantInfo
from twisted.internet.interfaces import IReactorTime

from lotusguard.clients.waiting import Deadline, in_slices
from lotusguard.guard.calls.memberships import CallMemberships, Check
from lotusguard.guard.lobby import Lobby
from lotusguard.guard.lobby.switching import LobbySwitch
from lotusguard.guard.rooms.policies import KnownPolicy
from lotusguard.guard.seats.registry import TokenRegistry
from lotusguard.metrics import Metrics
from lotusguard.rules.homeservers import HomeserverList
from lotusguard.rules.identity import is_matrix_user
from lotusguard.rules.lobby import LobbyState
from lotusguard.rules.refusals import Refusal

LOOKED_AT_AGAIN = 30.0
"""Seconds after which participants are looked at again in any case."""


@frozen
class Unentitled:
    """A participant who has to be removed."""

    participant: ParticipantInfo
    user: str
    reason: Refusal


@frozen
class Checked:
    """The result of checking participants.

    :ivar again_at: when the first membership among them has to be looked up again.
    """

    unentitled: Sequence[Unentitled]
    again_at: float


@define(eq=False)
class Entitlement:
    """Finds participants who may not be in the call.

    Never among them: participants whose Matrix user is unknown, and anybody while what decides is unknown.

    :ivar memberships: whether participants are members.
    """

    memberships: CallMemberships
    _registry: TokenRegistry
    _lobby: Lobby
    _switch: LobbySwitch
    _homeservers: HomeserverList
    _clock: IReactorTime
    _metrics: Metrics
    _unidentified: dict[str, int] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self._metrics.unidentified_participants.set_function(lambda: sum(self._unidentified.values()))

    def checks(self, room_id: str) -> bool:
        """Whether participants of this room are checked although it has no policy."""
        return self.memberships.asked_for or not self._homeservers.allows_all or self._lobby.has_removed(room_id)

    async def unentitled(
        self, room_id: str, alias: str, known: KnownPolicy, participants: Iterable[ParticipantInfo], *, whole: bool
    ) -> Checked:
        """Those of these participants of one SFU room who may not be in its call.

        :param whole: whether these are all of its participants.
        """
        now = self._clock.seconds()
        check = Check(room_id, known, now, self._deadline(), now + min(self.memberships.interval, LOOKED_AT_AGAIN))
        found, allowed = [], []
        async for participant, user in in_slices(self._clock, await self._identified(alias, participants, whole)):
            refusal = await self._refused_by_policy(room_id, known, user)
            if refusal is not None:
                found.append(Unentitled(participant, user, refusal))
            else:
                allowed.append((participant, user))
        if self.memberships.asked_for:
            gone = await self.memberships.non_members(check, allowed)
            users = {user for _, user in gone}
            for user in users:
                await self._lobby.left_room(room_id, user)
            allowed = [(participant, user) for participant, user in allowed if user not in users]
            found += [Unentitled(participant, user, Refusal.NOT_A_MEMBER) for participant, user in gone]
        found += await self._not_admitted(check, allowed)
        return Checked(found, check.again_at)

    def settles(self, room_id: str, known: KnownPolicy) -> bool:
        """Whether only what `Checked` and the listing tell can change who may be in the call. Where moderators decide,
        their decisions can too."""
        return known.is_certain and known.policy.lobby is None and not self._lobby.has_removed(room_id)

    async def end_waiting(self, room_id: str, user: str) -> None:
        """Memberships of a room have changed: people who wait in its lobby and are not joined any more stop waiting.

        :param user: whose membership it is; ``""`` for everybody's.
        """
        waiting = [one for one in self._lobby.waiting_in(room_id) if user in ("", one)]
        if waiting and self.memberships.removes_non_members:
            await self._end_waiting(room_id, waiting, self._deadline())

    async def end_waiting_unheard(self) -> None:
        """The same for all lobbies, where nobody tells of changed memberships. To be called every few seconds: each
        membership is believed as long as that of somebody in a call, and all lookups have one deadline."""
        if not self.memberships.removes_non_members:
            return
        deadline = self._deadline()
        for room_id in self._lobby.rooms_with(LobbyState.WAITING):
            # those who are looked up are believed in the next round, so that it comes further
            await self._end_waiting(room_id, self._lobby.waiting_in(room_id), deadline, self.memberships.believed_for())

    async def _end_waiting(
        self, room_id: str, waiting: Collection[str], deadline: Deadline, max_age: float | None = None
    ) -> None:
        for user in await self.memberships.not_joined(room_id, waiting, deadline, max_age):
            await self._lobby.left_room(room_id, user)

    def _deadline(self) -> Deadline:
        return Deadline.after(self._clock, self.memberships.lookup_timeout)

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
        self, check: Check, participants: Iterable[tuple[ParticipantInfo, str]]
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
