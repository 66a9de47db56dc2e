# SPDX-License-Identifier: Apache-2.0
"""The rooms of a seat book: a bounded number of them, of which one caller cannot take many from others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from attrs import define, field
from twisted.logger import Logger

from lotusguard.guard.seats.waiters import SeatQueue
from lotusguard.rules.room_seats import RoomSeats

log = Logger()

ROOMS_KEPT = 20_000
ROOMS_PER_CALLER = 100
"""Rooms in which only one user has anything, for each user. Beyond it the oldest of that user's own is dropped."""
DROPPED_SHARE = 100
"""When the book is full, the hundredth part of its rooms is dropped at once, because looking for them takes time."""


@define(eq=False)
class Room:
    """A room's seats, the joins that wait for one, and whether its call was started.

    :ivar caller: the only user who has had anything here lately; "" if others have too, or nobody.
    """

    seats: RoomSeats
    waiting: SeatQueue = field(factory=SeatQueue, init=False)
    started: bool = field(default=False, init=False)
    caller: str = field(default="", init=False)


@define(eq=False)
class KeptRooms:
    """
    :param dropped: called with each room that is dropped because of a limit.
    """

    _dropped: Callable[[str, Room], None]
    _rooms: dict[str, Room] = field(factory=dict, init=False)
    _of_caller: dict[str, dict[str, None]] = field(factory=dict, init=False)

    @property
    def limit(self) -> int:
        """The most rooms."""
        return ROOMS_KEPT

    def __len__(self) -> int:
        return len(self._rooms)

    def __iter__(self) -> Iterator[tuple[str, Room]]:
        return iter(list(self._rooms.items()))

    def get(self, room_id: str) -> Room | None:
        return self._rooms.get(room_id)

    def add(self, room_id: str, seats: RoomSeats, now: float) -> Room:
        """A new room. If there are too many, those are dropped first that matter least."""
        if len(self._rooms) >= self.limit:
            self._make_place(now)
        room = self._rooms[room_id] = Room(seats)
        return room

    def forget(self, room_id: str) -> Room:
        """Nothing has happened in a room for long."""
        room = self._rooms.pop(room_id)
        self._set_caller(room_id, room, "")
        return room

    def used_by(self, room_id: str, room: Room, user: str, now: float) -> None:
        """A user is about to take a seat. Call it before."""
        if room.caller == user:
            return
        self._set_caller(room_id, room, user if room.seats.is_idle(now) else "")
        own = self._of_caller.get(user, {})
        if len(own) > ROOMS_PER_CALLER:
            self._drop(next(iter(own)))

    def occupied_by(self, room_id: str, room: Room, users: Collection[str]) -> None:
        """These users are in the call."""
        if room.caller and any(user != room.caller for user in users):
            self._set_caller(room_id, room, "")

    def _set_caller(self, room_id: str, room: Room, user: str) -> None:
        if room.caller:
            own = self._of_caller[room.caller]
            del own[room_id]
            if not own:
                del self._of_caller[room.caller]
        room.caller = user
        if user:
            self._of_caller.setdefault(user, {})[room_id] = None

    def _make_place(self, now: float) -> None:
        def worth(entry: tuple[str, Room]) -> int:
            """Rooms of the same worth stay in the order in which they were made."""
            room = entry[1]
            if room.seats.is_idle(now):
                return 0
            if room.seats.sessions:
                return 3
            return 1 if room.caller else 2

        leaving = sorted(self._rooms.items(), key=worth)[: max(1, len(self._rooms) // DROPPED_SHARE)]
        occupied = sum(1 for _, room in leaving if room.seats.sessions)
        for room_id, _ in leaving:
            self._drop(room_id)
        log.warn(
            "the seats of {count} rooms were forgotten, {occupied} of them with people in the call: more than {limit} "
            "rooms are in use", count=len(leaving), occupied=occupied, limit=self.limit, event_name="rooms_forgotten",
        )  # fmt: skip

    def _drop(self, room_id: str) -> None:
        room = self.forget(room_id)
        room.waiting.wake_all()
        self._dropped(room_id, room)
