# SPDX-License-Identifier: Apache-2.0
"""Whether a room's lobby is on: switched on by its moderators, and somebody can admit people there."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import partial

from attrs import define, field
from livekit.protocol.models import ParticipantInfo
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from lotusguard.clients.livekit import LiveKitClient
from lotusguard.clients.waiting import Deadline, gather_in_turns
from lotusguard.guard.lobby import Lobby
from lotusguard.guard.rooms.policies import Freshness, KnownPolicy, Policies
from lotusguard.guard.seats.book import SeatBook
from lotusguard.guard.seats.registry import TokenRegistry
from lotusguard.guard.seats.roster import Roster
from lotusguard.rules.identity import ROOM_SLOT
from lotusguard.rules.lobby import LobbyState
from lotusguard.rules.participants import joined_at
from lotusguard.rules.room_seats import CALL_ENDED_AFTER

log = Logger()

ROOMS_REMEMBERED = 20_000
"""Rooms beyond which those are forgotten that were not asked about for longest and have no occupants. Of a
forgotten room nobody knows that its lobby was off, and people would be removed from its call when it is switched on."""
LET_IN_AT_ONCE = 32
"""Users who are accepted at the same time when a lobby is switched on."""
OCCUPANTS_ASKED_EVERY = 15.0
"""Seconds. With several guards this is a round trip for every room in which people were accepted."""
ROOMS_AT_ONCE = 16
"""Rooms whose occupants are asked about at the same time."""
LOOKUPS_AT_ONCE = 4
"""Rooms whose policies are looked up at the same time. A lookup takes a call for each type of event; more lookups would
wait for each other until they are too late."""


class Seen(Enum):
    """How this guard last saw a room's lobby."""

    OFF = "off"
    ON = "on"
    """It was off before: everybody who was in the call then was accepted."""
    ON_FROM_THE_START = "on_from_the_start"
    """It was on when this guard first saw the room."""
    UNDECIDABLE = "undecidable"
    """It is switched on in the room, but nobody could admit people. Nobody waits."""
    UNKNOWN = "unknown"
    """The room's policy is unknown. Nobody begins to wait."""
    UNDECIDABLE_AND_UNKNOWN = "undecidable_and_unknown"


_IS_ON = (Seen.ON, Seen.ON_FROM_THE_START)
_UNDECIDABLE = (Seen.UNDECIDABLE, Seen.UNDECIDABLE_AND_UNKNOWN)


@define(eq=False)
class LobbySwitch:
    """Notices when lobbies are switched on and off, and when calls end.

    :param can_decide: whether somebody could admit people in a room.
    """

    _lobby: Lobby
    _policies: Policies
    _seats: SeatBook
    _roster: Roster
    _registry: TokenRegistry
    _livekit: LiveKitClient
    _clock: IReactorTime
    _can_decide: Callable[[str], bool]
    _lookup_timeout: float
    _started: float = field(init=False)
    _seen: dict[str, Seen] = field(factory=dict, init=False)
    _empty_since: dict[str, float] = field(factory=dict, init=False)
    _ask_occupants_at: float = field(default=0.0, init=False)

    def __attrs_post_init__(self) -> None:
        self._started = self._clock.seconds()

    async def is_on(self, room_id: str, known: KnownPolicy) -> bool:
        """Whether people have to wait in this room. While the policy is unknown nobody has to.

        When a lobby was switched on, this is said to nobody before everybody in the call is accepted.
        """
        before = self._seen.get(room_id)
        seen = self._look(room_id, known, before)
        if seen is Seen.OFF and before is not seen and self._lobby.has_entries(room_id):
            known = await self._read_anew(room_id)
            if known.freshness is Freshness.STALE:  # it ends nobody's waiting
                return False
            seen = self._look(room_id, known, before)
        if seen is Seen.ON and before is not Seen.ON:
            let_in = partial(self._lobby.let_in, room_id)
            await gather_in_turns(LET_IN_AT_ONCE, let_in, await self._seats.occupants(room_id))
        elif seen in _UNDECIDABLE or (seen is Seen.OFF and before is not seen):  # later another guard may know better
            await self._lobby.switched_off(room_id)
        if seen is Seen.UNDECIDABLE and before is not seen:
            log.warn(
                "the lobby of {room_id} is off: nobody could admit people there. Invite the guard's account, or set "
                "GUARD_ADMIN_TOKEN", room_id=room_id, event_name="lobby_undecidable",
            )  # fmt: skip
        if self._seen.get(room_id) is before:  # others may have seen a change meanwhile
            self._note(room_id, seen)
        return seen in _IS_ON

    def _note(self, room_id: str, seen: Seen) -> None:
        """Remember how a room's lobby was seen. The dictionary begins with the room that was not noted for longest."""
        self._seen.pop(room_id, None)
        self._seen[room_id] = seen

    async def _forget_some(self) -> None:
        for _ in range(len(self._seen) - ROOMS_REMEMBERED):
            room_id = next(iter(self._seen))
            if await self._seats.occupants(room_id):
                self._note(room_id, self._seen[room_id])
            elif next(iter(self._seen)) == room_id:  # else somebody is about to enter
                del self._seen[room_id]

    async def _read_anew(self, room_id: str) -> KnownPolicy:
        """The policy as it is now: entries are those of all guards, and another one may know a newer policy."""
        deadline = Deadline.after(self._clock, self._lookup_timeout)
        return await self._policies.get_anew(room_id, deadline, self._clock.seconds())

    def _look(self, room_id: str, known: KnownPolicy, before: Seen | None) -> Seen:
        if known.freshness is Freshness.UNKNOWN:
            return Seen.UNKNOWN if self._can_decide(room_id) else Seen.UNDECIDABLE_AND_UNKNOWN
        if known.policy.lobby is None:
            return Seen.OFF
        if not self._can_decide(room_id):
            return Seen.UNDECIDABLE
        if before in _IS_ON:
            return before
        return Seen.ON_FROM_THE_START if before is None else Seen.ON

    @property
    def undecidable_rooms(self) -> int:
        """Rooms whose lobby is switched on and yet off, because nobody could admit people."""
        return sum(seen is Seen.UNDECIDABLE for seen in self._seen.values())

    def joined_before_us(self, participant: ParticipantInfo) -> bool:
        """Whether a participant was in the call before this guard ran; then nobody knows who let them in."""
        joined = joined_at(participant)
        if joined is None:
            return False
        return self._clock.seconds() - (self._livekit.now() - joined) < self._started

    async def was_in_before_us(
        self, room_id: str, user: str, since: float, deadline: Deadline, requested: str = ROOM_SLOT
    ) -> bool:
        """Whether a user is in the call, and was so before this guard ran.

        :param requested: the slot that the user is about to enter.
        :raises DependencyFailed: LiveKit does not tell. :raises TimeoutError: not in time.
        """
        if self._seen.get(room_id) is not Seen.ON_FROM_THE_START:
            return False
        for alias, listing in await self._roster.list_all(room_id, since, deadline, requested):
            for participant in listing.value:
                is_theirs = await self._registry.user_behind(alias, participant.identity) == user
                if is_theirs and self.joined_before_us(participant):
                    return True
        return False

    async def pass_time(self) -> None:
        """See whether lobbies were switched off, people who wait were promoted, and calls have ended.

        To be called every few seconds.
        """
        await gather_in_turns(LOOKUPS_AT_ONCE, self._look_after, self._lobby.rooms_with(LobbyState.WAITING))
        await self._notice_ended_calls()
        await self._forget_some()

    async def _look_after(self, room_id: str) -> None:
        known = await self._policies.get(room_id, Deadline.after(self._clock, self._lookup_timeout))
        if not await self.is_on(room_id, known):
            return
        for user in self._lobby.waiting_in(room_id):
            if known.policy.bypasses_lobby(user):
                await self._lobby.let_in(room_id, user)

    async def _notice_ended_calls(self) -> None:
        now = self._clock.seconds()
        if now < self._ask_occupants_at:
            return
        self._ask_occupants_at = now + OCCUPANTS_ASKED_EVERY
        rooms = set(self._lobby.rooms_with(LobbyState.ACCEPTED))
        self._empty_since = {room_id: at for room_id, at in self._empty_since.items() if room_id in rooms}
        await gather_in_turns(ROOMS_AT_ONCE, partial(self._notice_end, now), rooms)

    async def _notice_end(self, now: float, room_id: str) -> None:
        if await self._seats.occupants(room_id):
            self._empty_since.pop(room_id, None)
        elif now - self._empty_since.setdefault(room_id, now) >= CALL_ENDED_AFTER:
            self._empty_since.pop(room_id)
            await self._lobby.call_ended(room_id)
