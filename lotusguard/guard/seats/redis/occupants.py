# SPDX-License-Identifier: Apache-2.0
"""Who the occupants of rooms are, as Redis last told. It is told of changes, not of all occupants each time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Set
from typing import Any

from attrs import define, field

ROOMS_KEPT = 2_000
NAMES_KEPT = 200_000
"""In all rooms together."""


@define
class _Room:
    number: str
    names: set[str]


@define(eq=False)
class KnownOccupants:
    """The occupants of the rooms that were asked about last.

    An *occupant* is a user who is in the call, has a token in time, or has a request in flight. The changes of a room
    are numbered.
    """

    _rooms: OrderedDict[str, _Room] = field(init=False, factory=OrderedDict)
    _names: int = field(init=False, default=0)

    def number(self, room_id: str) -> str | None:
        """The number of the last change that is known of a room; ``None`` if nothing is."""
        room = self._rooms.get(room_id)
        return None if room is None else room.number

    def names(self, room_id: str) -> Set[str]:
        """The occupants, as of that change."""
        room = self._rooms.get(room_id)
        return frozenset() if room is None else frozenset(room.names)

    def update(self, room_id: str, told: Any) -> Set[str] | None:
        """:param told: what the operation ``occupants`` tells.

        :return: the occupants; ``None`` if these are changes of a room that was forgotten since they were asked for.
        """
        number, whole, changes = told
        known = self._forget(room_id)
        if isinstance(whole, (list, dict)):
            names = set(whole)
        elif known is not None:
            names = _changed(known.names, changes)
        else:
            return None
        self._rooms[room_id] = _Room(str(number), names)
        self._names += len(names)
        while len(self._rooms) > 1 and (len(self._rooms) > ROOMS_KEPT or self._names > NAMES_KEPT):
            self._forget(next(iter(self._rooms)))
        return frozenset(names)

    def clear(self) -> None:
        """The data set is another one."""
        self._rooms.clear()
        self._names = 0

    def _forget(self, room_id: str) -> _Room | None:
        room = self._rooms.pop(room_id, None)
        if room is not None:
            self._names -= len(room.names)
        return room


def _changed(names: set[str], changes: Iterable[tuple[str, bool]]) -> set[str]:
    for user, is_there in changes:
        if is_there:
            names.add(user)
        else:
            names.discard(user)
    return names
