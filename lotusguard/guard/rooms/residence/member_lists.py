# SPDX-License-Identifier: Apache-2.0
"""Reads who is joined to the rooms that the account is in: on entering, after a gap, and again if it failed."""

from __future__ import annotations

from collections.abc import Iterable

from attrs import define, field
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.keyed_worker import KeyedWorker
from lotusguard.clients.synapse import MatrixClient
from lotusguard.clients.synapse.sync_answer import MEMBER, RoomEvent
from lotusguard.guard.rooms.residence.background import BackgroundWork
from lotusguard.guard.rooms.residence.residence import Residence

log = Logger()

ROOMS_AT_ONCE = 4
"""Rooms whose members are read at the same time."""
READ_AGAIN, READ_AGAIN_LATEST = 10.0, 600.0
"""Seconds after which something that could not be read is read again: twice as many each time, up to the latter."""
MEMBERS_PER_SECOND = 500
"""Members of a room that are read per second in the long run: whoever floods a large room causes gap after gap."""


@define(eq=False)
class MemberLists:
    """The member lists of all rooms. While one is not known, memberships of that room are looked up one by one."""

    _client: MatrixClient
    _residence: Residence
    _clock: IReactorTime
    _recent: dict[str, dict[str, bool]] = field(factory=dict, init=False)
    _pauses: dict[str, float] = field(factory=dict, init=False)
    _not_before: dict[str, float] = field(factory=dict, init=False)
    _waiting: set[str] = field(factory=set, init=False)
    _being_read: set[str] = field(factory=set, init=False)
    _outdated: set[str] = field(factory=set, init=False)
    _readers: KeyedWorker[str] = field(init=False)
    _background: BackgroundWork = field(factory=BackgroundWork, init=False)

    def __attrs_post_init__(self) -> None:
        self._readers = KeyedWorker(self._read, ROOMS_AT_ONCE, _failed)

    def stop(self) -> None:
        self._readers.stop()
        self._background.stop()

    def read(self, room_id: str, recent: Iterable[RoomEvent] = ()) -> None:
        """Read the room's list soon. :param recent: events that the list may be too old to tell."""
        members = [event for event in recent if event.type == MEMBER]
        if members:
            self._recent[room_id] = {
                event.state_key: event.mapping.get("membership") == "join" for event in members if event.state_key
            }
        self._residence.members_unknown(room_id)
        pause = self._not_before.get(room_id, 0.0) - self._clock.seconds()
        if room_id in self._being_read:
            self._outdated.add(room_id)
        elif pause > 0:
            self._read_later(room_id, pause)
        else:
            self._readers.run(room_id, urgent=False)

    def read_missing(self) -> None:
        """The homeserver answers again: read what could not be read."""
        for room_id, pause in self._pauses.items():
            if pause < READ_AGAIN_LATEST:
                self._readers.run(room_id, urgent=False)

    def left(self, room_id: str) -> None:
        """The account is not in the room any more."""
        self._recent.pop(room_id, None)
        self._pauses.pop(room_id, None)
        self._not_before.pop(room_id, None)

    async def _read(self, room_id: str) -> None:
        room = self._residence.room(room_id)
        if room is None:
            return
        room.begin_reading_members(self._recent.pop(room_id, {}).items())
        self._being_read.add(room_id)
        try:
            members = await self._client.joined_members(room_id)
        except DependencyFailed as failed:
            log.debug("the members of {room_id} were not read: {reason}", room_id=room_id, reason=failed.reason)
            room.members_read(None)
            too_large = failed.reason == "too_large"
            pause = READ_AGAIN_LATEST if too_large else 2 * self._pauses.get(room_id, READ_AGAIN / 2)
            self._read_later(room_id, min(pause, READ_AGAIN_LATEST))
        else:
            self._pauses.pop(room_id, None)
            spacing = min(len(members) / MEMBERS_PER_SECOND, READ_AGAIN_LATEST)
            self._not_before[room_id] = self._clock.seconds() + spacing if spacing >= 1 else 0.0
            if room_id in self._outdated:  # there was another gap: what was read may be older
                room.members_read(None)
                self._read_later(room_id, spacing)
            elif not self._residence.members_read(room_id, members):
                self._read_later(room_id, READ_AGAIN_LATEST, len(members))
        finally:
            self._being_read.discard(room_id)
            self._outdated.discard(room_id)

    def _read_later(self, room_id: str, pause: float, count: int = 0) -> None:
        """:param count: how many members the list has, if it did not fit."""
        self._pauses[room_id] = pause
        if room_id not in self._waiting:
            self._waiting.add(room_id)
            self._background.start(self._wait_and_read(room_id, count))

    async def _wait_and_read(self, room_id: str, count: int) -> None:
        try:
            await deferLater(self._clock, self._pauses.get(room_id, READ_AGAIN))
            while self._residence.is_resident(room_id) and not self._residence.has_room_for(count):
                await deferLater(self._clock, READ_AGAIN_LATEST)
        finally:
            self._waiting.discard(room_id)
        room = self._residence.room(room_id)
        if room is not None and room.joined is None:
            self._readers.run(room_id, urgent=False)


def _failed(room_id: str, failure: Failure) -> None:
    log.failure("the members of {room_id} could not be taken over", failure, room_id=room_id)
