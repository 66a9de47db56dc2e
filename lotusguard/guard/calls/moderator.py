# SPDX-License-Identifier: Apache-2.0
"""What moderators do through the guard: admit, deny, remove, mute."""

from __future__ import annotations

from collections.abc import AsyncIterator

from attrs import define
from livekit.protocol.models import ParticipantInfo, TrackType
from twisted.internet.defer import TimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.livekit import LiveKitClient, NoSuchParticipant
from lotusguard.clients.waiting import Deadline
from lotusguard.guard.calls.enforcement import Enforcement
from lotusguard.guard.calls.moderation import ModerationAction, OnlyDecided
from lotusguard.guard.calls.participants import ParticipantEnforcer
from lotusguard.guard.calls.removal import Remover
from lotusguard.guard.lobby import Lobby
from lotusguard.guard.seats.book import SeatBook
from lotusguard.guard.seats.registry import Slot, TokenRegistry
from lotusguard.guard.seats.roster import Roster
from lotusguard.rules.lobby import LobbyState
from lotusguard.rules.refusals import Refusal

log = Logger()


@define(eq=False)
class Moderator:
    """Implements `lotusguard.guard.calls.moderation.Moderation`. Whether somebody may do this is checked before."""

    _lobby: Lobby
    _livekit: LiveKitClient
    _roster: Roster
    _seats: SeatBook
    _registry: TokenRegistry
    _participants: ParticipantEnforcer
    _remover: Remover
    _enforcement: Enforcement
    _clock: IReactorTime
    _lookup_timeout: float

    async def act(self, room_id: str, user: str, action: ModerationAction, by: str) -> bool:
        """Do it.

        :param by: who asked for it, for the log.
        :return: ``False`` if the user neither waits nor is in the call.
        :raises OnlyDecided: in a dry run.
        :raises DependencyFailed: LiveKit does not do it. :raises TimeoutError: not in time.
        """
        match action:
            case ModerationAction.ADMIT:
                return await self._lobby.decide(room_id, user, admit=True, by=by)
            case ModerationAction.DENY:
                return await self._lobby.decide(room_id, user, admit=False, by=by)
            case ModerationAction.REMOVE:
                done = await self._remove(room_id, user, by)
            case ModerationAction.MUTE:
                done = await self._mute(room_id, user, by)
        if done and self._participants.dry_run:
            raise OnlyDecided
        return done

    async def _remove(self, room_id: str, user: str, by: str) -> bool:
        """Remove a user from the call, and refuse them for ten minutes. Enforcement tries again what fails now.

        Somebody who waits and has no seat is removed by being refused, whether or not LiveKit can be asked.
        """
        waits = self._lobby.state_of(room_id, user) is LobbyState.WAITING
        has_seat = user in await self._seats.occupants(room_id)
        found = waits or has_seat
        if found:
            await self._refuse(room_id, user, by)  # first: they may ask for a token at once
        try:
            return await self._remove_sessions(room_id, user, by, refused=found) or found
        except (DependencyFailed, TimeoutError):
            if waits and not has_seat:
                return True
            raise

    async def _remove_sessions(self, room_id: str, user: str, by: str, *, refused: bool) -> bool:
        """Remove a user's sessions.

        :param refused: whether the user is refused already.
        :return: whether there was a session.
        """
        found = False
        async for alias, slot, participant in self._sessions(room_id, user):
            if not refused and not found:
                await self._refuse(room_id, user, by)
            found = True
            if not await self._remover.remove(
                slot, alias, participant.sid, participant.identity, user, Refusal.REMOVED.value
            ):
                self._enforcement.enforce(alias)
        return found

    async def _refuse(self, room_id: str, user: str, by: str) -> None:
        """Refuse a user's joins from now on, unless this is a dry run."""
        if not self._participants.dry_run:
            await self._lobby.remove(room_id, user, by)

    async def _mute(self, room_id: str, user: str, by: str) -> bool:
        """Mute everything of a user's that can be heard. They can unmute themselves."""
        found = False
        async for alias, _, participant in self._sessions(room_id, user):
            found = True
            for track in participant.tracks:
                if track.type != TrackType.AUDIO or track.muted:
                    continue
                if not self._participants.acts:
                    self._participants.skipped("mute", room_id, alias, participant.identity, track.sid)
                    continue
                try:
                    await self._livekit.mute_track(alias, participant.identity, track.sid)
                except NoSuchParticipant:
                    continue
                log.info(
                    "{by} muted {user} in the call of {room_id}",
                    by=by, user=user, room_id=room_id, event_name="muted_by_moderator",
                )  # fmt: skip
        return found

    async def _sessions(self, room_id: str, user: str) -> AsyncIterator[tuple[str, Slot, ParticipantInfo]]:
        """The user's sessions in all SFU rooms of the Matrix room, as LiveKit lists them now."""
        deadline, now = Deadline.after(self._clock, self._lookup_timeout), self._clock.seconds()
        for alias, listing in await self._roster.list_all(room_id, now, deadline):
            slot = await self._registry.slot_of(alias)
            if slot is None:
                continue
            for participant in listing.value:
                if await self._registry.user_behind(alias, participant.identity) == user:
                    yield alias, slot, participant
