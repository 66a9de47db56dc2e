# SPDX-License-Identifier: Apache-2.0
"""The rooms that the guard's account is in: what is known of them, in memory and in the state store."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from enum import Enum

from attrs import define, field
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from lotusguard.clients.synapse.sync_answer import SyncAnswer
from lotusguard.guard.rooms.residence.room import ResidentRoom, RoomChange
from lotusguard.guard.rooms.residence.stored import ROOM_ROW, Stored, StoredRows
from lotusguard.guard.rooms.source import PushedState
from lotusguard.metrics import Metrics
from lotusguard.rules.state import CREATE, StateEvent

log = Logger()

ROOMS_KEPT = 2_000
"""Rooms beyond these are not resident: they are looked up like any other."""
STATE_KEPT = 64 * 1024 * 1024
"""Bytes of the state of all rooms. If they are exceeded, the state of the largest rooms is looked up."""
MEMBERS_KEPT = 500_000
"""User IDs of all rooms; in rooms that do not fit, memberships are looked up."""


SILENCE = 60.0
"""Seconds that a sync may start or fail before nobody is told to wait for a moderator's answer any more."""


class SyncStatus(Enum):
    """How ``/sync`` goes."""

    STARTING = "starting"
    OFF = "off"
    """It is never called: see ``GUARD_INVITES``."""
    ALIVE = "alive"
    FAILING = "failing"
    """The last attempt failed. What is known may have changed."""
    FOLLOWING = "following"
    """Another guard calls it, and tells which rooms there are. What is known may have changed."""


@define(eq=False)
class Residence:
    """What is known by being in rooms; a `PushedRooms`.

    :ivar status: only while it is ALIVE, what is known is current.
    :ivar reason: why it is FAILING or OFF.
    :ivar since: the token that the next sync continues from; ``""`` for a full one.
    :ivar invites: who invited the account, by the ID of a room that it has not been heard to join or to leave since.
    """

    _rows: StoredRows = field(alias="store", converter=StoredRows)
    _clock: IReactorTime
    _wall: Callable[[], float]
    _metrics: Metrics
    status: SyncStatus = field(default=SyncStatus.STARTING, init=False)
    reason: str = field(default="", init=False)
    since: str = field(default="", init=False)
    invites: dict[str, str] = field(factory=dict, init=False)
    _user_id: str = field(default="", init=False)
    _rooms: dict[str, ResidentRoom] = field(factory=dict, init=False)
    _members: int = field(default=0, init=False)
    _size: int = field(default=0, init=False)
    _current_at: float = field(default=0.0, init=False)
    _silent_since: float = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._silent_since = self._clock.seconds()
        self._metrics.resident_rooms.set_function(lambda: len(self._rooms))
        self._metrics.sync_alive.set_function(lambda: int(self.alive))

    # -- what others ask -----------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether every change in the rooms reaches us now."""
        return self.status is SyncStatus.ALIVE

    def hears(self, room_id: str) -> bool:
        """Whether reactions and commands in a room reach us, now or soon.

        A sync that starts, or fails, is expected to work within `SILENCE`. Which rooms the account is in may be known
        only then.
        """
        silence = self._clock.seconds() - self._silent_since
        match self.status:
            case SyncStatus.ALIVE:
                return self.is_resident(room_id)
            case SyncStatus.STARTING:
                return silence < SILENCE
            case SyncStatus.FAILING | SyncStatus.FOLLOWING:
                return self.is_resident(room_id) and silence < SILENCE
            case SyncStatus.OFF:
                return False

    def __len__(self) -> int:
        return len(self._rooms)

    @property
    def full(self) -> bool:
        """Whether the account is in as many rooms as fit."""
        return len(self._rooms) >= ROOMS_KEPT

    def invited_by(self, user: str) -> int:
        """The number of rooms to which a user invited the account."""
        return sum(room.inviter == user for room in self._rooms.values())

    def is_resident(self, room_id: str) -> bool:
        """Whether our account is in the room, as far as it heard."""
        return room_id in self._rooms

    def room(self, room_id: str) -> ResidentRoom | None:
        """What is known of a room."""
        return self._rooms.get(room_id)

    def room_ids(self) -> list[str]:
        return list(self._rooms)

    def state_of(self, room_id: str) -> PushedState | None:
        """See `PushedRooms`. A state without ``m.room.create`` is not the room's state."""
        room = self._rooms.get(room_id)
        if room is None or CREATE not in room.state:
            return None
        return PushedState(room.state, self._clock.seconds() if self.alive else self._current_at, self.alive)

    def is_joined(self, room_id: str, user: str) -> bool:
        """See `PushedRooms`."""
        room = self._rooms.get(room_id)
        return self.alive and room is not None and room.joined is not None and user in room.joined

    # -- what /sync says -----------------------------------------------------------------------------------

    def apply(
        self, answer: SyncAnswer, all_rooms: Collection[str] | None = None
    ) -> tuple[dict[str, RoomChange], list[str]]:
        """Take over an answer.

        :param all_rooms: all rooms that the account is in, if that is known; others are not resident any more.
        :return: what changed in which rooms, and the rooms that the account is not in any more.
        """
        gone = [
            room_id
            for room_id in self._rooms
            if room_id in answer.left or (all_rooms is not None and room_id not in all_rooms)
        ]
        for room_id in gone:
            self.drop(room_id)
        changes = {}
        for room_id, news in answer.joined.items():
            room = self._rooms.get(room_id) or self._new_room(room_id)
            self.settle_invite(room_id)
            if room is None:
                self._metrics.residence_overflow.labels("room").inc()
                continue
            members, size = len(room.joined or ()), room.size
            changes[room_id] = change = room.apply(news)
            self._rooms[room_id] = room
            self._members += len(room.joined or ()) - members
            self._size += room.size - size
            if change.state:
                self._rows.room_changed(room_id)
        for room_id in answer.left:
            self.settle_invite(room_id)
        self._keep_within_bounds()
        return changes, gone

    def continue_from(self, since: str) -> None:
        """Everything before this token is taken over: what is known is current."""
        self.since = since
        self.status, self.reason, self._current_at = SyncStatus.ALIVE, "", self._clock.seconds()

    def _keep_within_bounds(self) -> None:
        """Forget the state of the largest rooms, if all states are too large, and who is joined to the largest, if too
        many were heard to join. Both are looked up from now on."""
        if self._members > MEMBERS_KEPT:
            for room_id in sorted(self._rooms, key=lambda each: -len(self._rooms[each].joined or ())):
                self.members_unknown(room_id)
                self._metrics.residence_overflow.labels("members").inc()
                if self._members <= MEMBERS_KEPT:
                    break
        while self._size > STATE_KEPT:
            room_id = max(self._rooms, key=lambda each: self._rooms[each].size)
            room = self._rooms[room_id]
            self._size -= room.size
            room.forget_state()
            self._rows.room_changed(room_id)
            self._metrics.residence_overflow.labels("state").inc()
            log.warn("the state of {room_id} is too large to be kept", room_id=room_id, event_name="state_too_large")

    def failing(self, reason: str) -> None:
        """The sync failed: what is known is not current from now on."""
        if self.alive:
            self._silent_since = self._clock.seconds()
        self.status, self.reason = SyncStatus.FAILING, reason

    def turn_off(self, reason: str) -> None:
        """``/sync`` will not be called."""
        self._forget_everything()
        self.status, self.reason = SyncStatus.OFF, reason

    def drop(self, room_id: str) -> None:
        """The account is not in the room any more."""
        room = self._rooms.pop(room_id, None)
        if room is not None:
            self._members -= len(room.joined or ())
            self._size -= room.size
            self._rows.room_changed(room_id)

    def _new_room(self, room_id: str) -> ResidentRoom | None:
        return None if self.full else ResidentRoom(inviter=self.invites.get(room_id, ""))

    def put_state(self, room_id: str, event: StateEvent) -> None:
        """A state event as it was just read."""
        room = self._rooms.get(room_id)
        if room is not None:
            size = room.size
            room.put(event)
            self._size += room.size - size
            self._rows.room_changed(room_id)

    def members_unknown(self, room_id: str) -> None:
        """Memberships of a room may have changed unseen, or are too many."""
        room = self._rooms.get(room_id)
        if room is not None and room.joined is not None:
            self._members -= len(room.joined)
            room.joined = None

    def has_room_for(self, members: int) -> bool:
        """Whether a list of so many members fits."""
        return self._members + members <= MEMBERS_KEPT

    def members_read(self, room_id: str, members: frozenset[str]) -> bool:
        """The members of a room were read. :return: whether they fit; if not, they are looked up one by one."""
        room = self._rooms.get(room_id)
        if room is None:
            return True
        before = len(room.joined or ())
        fits = self.has_room_for(len(members) - before)
        if not fits:
            self._metrics.residence_overflow.labels("members").inc()
        room.members_read(members if fits else None)
        self._members += len(room.joined or ()) - before
        return fits

    # -- invitations ---------------------------------------------------------------------------------------

    def add_invite(self, room_id: str, inviter: str) -> None:
        """Somebody invited the account. It is kept until `settle_invite`, over a restart too."""
        self.invites[room_id] = inviter
        self._rows.invite_changed(room_id)

    def settle_invite(self, room_id: str) -> None:
        """The account was heard to be in the room, or not to be invited any more."""
        if self.invites.pop(room_id, None) is not None:
            self._rows.invite_changed(room_id)

    # -- the state store -----------------------------------------------------------------------------------

    def load(self) -> None:
        """Take over what an earlier run stored: last known policies hold before the homeserver has answered."""
        stored = self._rows.read()
        if stored is not None:
            self._rooms, self.invites, self._members = stored.rooms, stored.invites, 0
            self._size = sum(room.size for room in self._rooms.values())
            self._user_id, self.since = stored.user_id, stored.since
            self._current_at = self._clock.seconds() - max(0.0, self._wall() - stored.saved_at)

    def follow(self, changed: Mapping[str, str | None], *, heard: bool) -> None:
        """Another guard listens. :param changed: rows that it stored. :param heard: whether it hears the rooms."""
        if self.status is not SyncStatus.FOLLOWING or heard:
            self._silent_since = self._clock.seconds()
        self.status, self.reason = SyncStatus.FOLLOWING, ""
        for name, text in changed.items():
            if name.startswith(ROOM_ROW):
                self._follow_room(name.removeprefix(ROOM_ROW), text)
        self._current_at = self._clock.seconds() if heard else self._current_at

    def _follow_room(self, room_id: str, text: str | None) -> None:
        before = self._rooms.pop(room_id, None)
        if before is not None:
            self._members -= len(before.joined or ())
            self._size -= before.size
        if text is not None:
            with suppress(ValueError):
                room = self._rooms[room_id] = ResidentRoom.loaded(text)
                self._size += room.size

    def belong_to(self, user_id: str) -> None:
        """The account is known now: what another one knew does not count."""
        if self._user_id not in ("", user_id):
            log.warn("stored rooms are another account's and are not used", event_name="residence_not_loaded")
            self._forget_everything()
        self._user_id = user_id

    def _forget_everything(self) -> None:
        for room_id in list(self._rooms):
            self.drop(room_id)
        for room_id in list(self.invites):
            self.settle_invite(room_id)
        self.since = ""

    async def save(self) -> None:
        """Write what changed, together with the token that belongs to it. Returns when it is on disk, or is late."""
        if self.since:
            await self._rows.write(Stored(self._user_id, self.since, self._wall(), self._rooms, self.invites))
