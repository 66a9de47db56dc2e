# SPDX-License-Identifier: Apache-2.0
"""The rooms that the account is in, as they are kept in the state store."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Protocol

from attrs import define, field, frozen
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from lotusguard.guard.rooms.residence.room import ResidentRoom

log = Logger()

ROOM_ROW = "room "
"""What the name of a room's row begins with."""
_SYNC, _INVITE = "sync", "invite "


class ResidenceStore(Protocol):
    """What must survive a restart (`StateStore`)."""

    def residence(self) -> dict[str, str]:
        """What `put_residence` wrote."""

    def put_residence(self, rows: Mapping[str, str | None]) -> Deferred[bool]:
        """Write all of these rows, or none. :return: whether they are on disk."""


@frozen
class Stored:
    """What must survive a restart.

    :ivar since: the token up to which everything is taken over. :ivar saved_at: in seconds since the epoch.
    """

    user_id: str
    since: str
    saved_at: float
    rooms: dict[str, ResidentRoom]
    invites: dict[str, str]


@define(eq=False)
class StoredRows:
    """The rows of a store, which may be missing: then nothing is stored.

    Rooms and the token that belongs to them are written in one transaction.
    """

    _store: ResidenceStore | None
    _unsaved: dict[str, int] = field(factory=dict, init=False)
    _saves: int = field(default=0, init=False)

    def room_changed(self, room_id: str) -> None:
        """A room's row has to be written with the next save."""
        self._unsaved[ROOM_ROW + room_id] = self._saves + 1

    def invite_changed(self, room_id: str) -> None:
        """An invitation's row has to be written with the next save."""
        self._unsaved[_INVITE + room_id] = self._saves + 1

    def read(self) -> Stored | None:
        """What an earlier run wrote; ``None`` if there is nothing, or it cannot be used."""
        rows = self._store.residence() if self._store is not None else {}
        if not rows:
            return None
        try:
            place = json.loads(rows[_SYNC])
            rooms = {name: ResidentRoom.loaded(text) for name, text in rows.items() if name.startswith(ROOM_ROW)}
            invites = {name: str(json.loads(text)) for name, text in rows.items() if name.startswith(_INVITE)}
            return Stored(
                str(place["user_id"]), str(place["since"]), float(place["at"]),
                {name.removeprefix(ROOM_ROW): room for name, room in rooms.items()},
                {name.removeprefix(_INVITE): inviter for name, inviter in invites.items()},
            )  # fmt: skip
        except (KeyError, ValueError, TypeError) as error:
            log.warn("stored rooms are not used: {reason}", reason=str(error), event_name="residence_not_loaded")
            self._unsaved.update(dict.fromkeys((name for name in rows if name != _SYNC), 0))
            return None

    async def write(self, now: Stored) -> None:
        """Write what changed. Returns when it is on disk, or is late."""
        if self._store is None:
            return
        self._saves += 1
        mine = self._saves
        names = dict(self._unsaved)
        place = {"user_id": now.user_id, "since": now.since, "at": now.saved_at}
        rows: Mapping[str, str | None] = {**{name: _row(now, name) for name in names}, _SYNC: json.dumps(place)}
        if await self._store.put_residence(rows):
            self._unsaved = {
                name: touched for name, touched in self._unsaved.items() if touched > mine or name not in names
            }


def _row(now: Stored, name: str) -> str | None:
    """The value of a row; ``None`` if it is to be deleted."""
    if name.startswith(ROOM_ROW):
        room = now.rooms.get(name.removeprefix(ROOM_ROW))
        return room.dumped() if room is not None else None
    inviter = now.invites.get(name.removeprefix(_INVITE))
    return json.dumps(inviter) if inviter is not None else None
