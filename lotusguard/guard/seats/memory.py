# SPDX-License-Identifier: Apache-2.0
"""The seat book of a guard that runs alone: in memory, with a copy of the holds in the state directory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from secrets import token_hex

from attrs import define, field
from twisted.internet.interfaces import IReactorTime

from lotusguard.clients.waiting import in_slices
from lotusguard.guard.seats.book import KEPT_FOR, Issued, OverLimit, Presence, RoomSnapshot
from lotusguard.guard.seats.kept_holds import KeptHolds
from lotusguard.guard.seats.kept_rooms import KeptRooms, Room
from lotusguard.guard.seats.store import StateStore, StoredHold
from lotusguard.metrics import Metrics
from lotusguard.rules.refusals import Refusal
from lotusguard.rules.room_seats import CALL_ENDED_AFTER, RoomSeats
from lotusguard.rules.seats import Arrival, HoldState, IdentityKey

IDLE_ROOM = 600.0
"""Seconds after which a room is forgotten in which nobody is and nobody holds a seat."""
SLOTS_PER_ROOM = 16
"""SFU rooms of one Matrix room in which people may hold seats at the same time."""


@define(eq=False)
class MemorySeatBook:
    """The seat book of one guard. See `lotusguard.guard.seats.book.SeatBook` for what its methods do.

    :param seat_ttl: seconds for which a seat is kept for somebody who was given a token.
    :param guarding_since: since when this guard, restarts included, has enforced limits. Participants who joined a room
        before then are not over its limit.
    :param wall: seconds since the epoch, for what is kept on disk.
    """

    _store: StateStore | None
    _clock: IReactorTime
    _wall: Callable[[], float]
    _metrics: Metrics
    _seat_ttl: float
    _guarding_since: float
    unshared: bool = field(default=False, init=False)
    is_remote: bool = field(default=False, init=False)
    _kept: KeptHolds = field(init=False)
    _rooms: KeptRooms = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._kept = KeptHolds(self._store, self._clock, self._wall)
        self._rooms = KeptRooms(lambda room_id, room: self._kept.drop_room(room_id, room.seats))
        self._metrics.cache_limit.labels("seats").set(self._rooms.limit)
        self._metrics.cache_entries.labels("seats").set_function(lambda: len(self._rooms))
        self._metrics.seats_held.set_function(self._seats_taken)

    def _seats_taken(self) -> int:
        now = self._clock.seconds()
        return sum(room.seats.seats_taken(now) for _, room in self._rooms)

    def load(self, holds: Iterable[StoredHold], ended: float | None = None) -> None:
        """Take over the holds of an earlier run. None lasts longer than one that is issued now.

        :param ended: when that run ended, on the guard's clock; by default now.
        """
        now = self._clock.seconds()
        ended = now if ended is None else min(now, max(ended, now - 2 * KEPT_FOR))
        for hold in holds:
            room = self._room(hold.room_id)
            left = min(hold.expires - self._wall(), self._seat_ttl)
            if not hold.present and left <= 0:
                continue
            hold_id, key = token_hex(8), IdentityKey(hold.alias, hold.identity)
            if hold.present:
                room.seats.restore_present(hold_id, hold.user, key, now, ended, hold.device)
                room.started = True
            else:
                room.seats.restore_issued(hold_id, hold.user, key, now, now + left, hold.device)

    # -- joins -------------------------------------------------------------------------------------------

    async def take(
        self, room_id: str, user: str, limit: int | None, alias: str, *, exempt: bool = False, new_slot: bool = False
    ) -> str | Refusal:
        hold_id = token_hex(8)
        room, now = self._room(room_id), self._clock.seconds()
        self._rooms.used_by(room_id, room, user, now)
        slots = SLOTS_PER_ROOM if new_slot else None
        refusal = room.seats.take(hold_id, user, limit, alias, now, exempt=exempt, slots=slots)
        return hold_id if refusal is None else refusal

    async def wait_for_seat(self, room_id: str, user: str, *, again: bool) -> None:
        await self._room(room_id).waiting.join(user, again=again)

    async def wake_all(self, room_id: str) -> None:
        room = self._rooms.get(room_id)
        if room is not None:
            room.waiting.wake_all()

    async def issue(self, room_id: str, hold_id: str, token: Issued, *, durable: bool) -> None:
        room, now = self._room(room_id), self._clock.seconds()
        older = room.seats.reserved.get(IdentityKey(token.alias, token.identity))
        hold = room.seats.issue(hold_id, token.alias, token.identity, now, self._seat_ttl, token.device)
        if hold is None:
            return
        room.waiting.wake(room.seats.owns_seat)
        if durable and token.alias and hold.state is HoldState.ISSUED:
            await self._kept.write_before_sending(room_id, room.seats, hold, older)
        self._kept.write_changes(room_id, room.seats)

    async def issue_without_seat(self, room_id: str, user: str, token: Issued) -> None:
        room, now = self._room(room_id), self._clock.seconds()
        self._rooms.used_by(room_id, room, user, now)
        room.seats.issue_without_seat(
            token_hex(8), user, token.alias, token.identity, now, self._seat_ttl, token.device
        )
        self._kept.write_changes(room_id, room.seats)

    async def release(self, room_id: str, hold_id: str) -> None:
        room = self._rooms.get(room_id)
        if room is not None:
            room.seats.release(hold_id)
            room.waiting.wake(room.seats.owns_seat)
            self._kept.write_changes(room_id, room.seats)

    async def owns_seat(self, room_id: str, user: str) -> bool:
        room = self._rooms.get(room_id)
        return room is not None and room.seats.owns_seat(user)

    async def exempt(self, room_id: str, user: str) -> None:
        room = self._rooms.get(room_id)
        if room is not None and not room.seats.is_exempt(user):
            room.seats.exempt(user)
            room.waiting.wake(room.seats.owns_seat)

    async def recognise(self, room_id: str, alias: str, identities: Collection[str], user: str) -> None:
        room = self._rooms.get(room_id)
        if room is not None:
            for identity in identities:
                room.seats.rename(IdentityKey(alias, identity), user)

    # -- the call ----------------------------------------------------------------------------------------

    async def arrive(self, room_id: str, alias: str, who: Arrival, limit: int | None) -> None:
        room = self._room(room_id)
        self._rooms.occupied_by(room_id, room, [who.user])
        room.seats.arrive(alias, who, limit, self._clock.seconds())
        self._kept.write_changes(room_id, room.seats)

    async def leave(
        self, room_id: str, alias: str, sid: str, identity: str, left_by: float, *, by_choice: bool
    ) -> None:
        room = self._rooms.get(room_id)
        if room is not None:
            room.seats.leave(alias, sid, identity, self._clock.seconds(), left_by, by_choice=by_choice)
            self._kept.write_changes(room_id, room.seats)

    async def apply_listing(
        self, room_id: str, alias: str, present: Collection[Arrival], limit: int | None, since: float
    ) -> None:
        room = self._room(room_id)
        self._rooms.occupied_by(room_id, room, [who.user for who in present])
        first = room.seats.listed_since([alias]) is None
        room.seats.apply_listing(alias, present, limit, since, self._clock.seconds())
        since_before_us = (who.joined is None or who.joined <= self._guarding_since for who in present)
        if first and any(since_before_us):  # the call is older than our memory of it: somebody must have started it
            room.started = True
        self._kept.write_changes(room_id, room.seats)

    async def listed_again(
        self, room_id: str, alias: str, limit: int | None, since: float, apply: Callable[[], Awaitable[None]]
    ) -> bool:
        room = self._rooms.get(room_id)
        return room is not None and room.seats.listed_again(alias, limit, since, self._clock.seconds())

    async def overflow(self, room_id: str, limit: int | None) -> Sequence[OverLimit]:
        room = self._room(room_id)
        over = room.seats.overflow(limit, self._clock.seconds())
        self._kept.write_changes(room_id, room.seats)
        return [OverLimit(hold.alias, hold.sid, hold.identity, hold.user) for hold in over]

    async def seat_everybody(self, room_id: str) -> None:
        room = self._rooms.get(room_id)
        if room is not None:
            room.seats.seat_everybody()
            self._kept.write_changes(room_id, room.seats)

    # -- questions ---------------------------------------------------------------------------------------

    async def aliases(self, room_id: str) -> Collection[str]:
        room = self._rooms.get(room_id)
        return room.seats.aliases() if room is not None else ()

    async def kept_aliases(self) -> Collection[str]:
        kept: set[str] = set()
        async for _, room in in_slices(self._clock, self._rooms):
            now = self._clock.seconds()
            kept |= room.seats.kept_aliases(now, now - KEPT_FOR)
        return kept

    async def listed_since(self, room_id: str, aliases: Collection[str]) -> float | None:
        room = self._rooms.get(room_id)
        return room.seats.listed_since(aliases) if room is not None else None

    async def listing_required_since(self, room_id: str) -> float | None:
        room = self._rooms.get(room_id)
        return room.seats.listing_required_since(self._clock.seconds()) if room is not None else None

    async def occupants(self, room_id: str) -> Collection[str]:
        room = self._rooms.get(room_id)
        return room.seats.occupants(self._clock.seconds()) if room is not None else ()

    async def is_started(self, room_id: str) -> bool:
        room = self._rooms.get(room_id)
        return room is not None and room.started and not self._has_ended(room)

    async def start(self, room_id: str) -> None:
        self._room(room_id).started = True

    async def snapshot(self, room_id: str) -> RoomSnapshot | None:
        room, now = self._rooms.get(room_id), self._clock.seconds()
        return None if room is None or room.seats.is_idle(now) else _snapshot(room_id, room.seats, now)

    async def snapshots(self) -> Sequence[RoomSnapshot]:
        now = self._clock.seconds()
        rooms = sorted(self._rooms, key=lambda room: room[0])
        return [
            _snapshot(room_id, room.seats, now)
            async for room_id, room in in_slices(self._clock, rooms)
            if not room.seats.is_idle(now)
        ]

    # -- upkeep ------------------------------------------------------------------------------------------

    async def prune(self) -> None:
        """Forget rooms in which nothing happens, and what no delayed event can refer to any more."""
        async for room_id, room in in_slices(self._clock, self._rooms):
            if self._rooms.get(room_id) is not room:
                continue
            now = self._clock.seconds()
            if now - room.seats.touched > IDLE_ROOM and room.seats.is_idle(now):
                self._rooms.forget(room_id)
                continue
            room.seats.forget_old(now, self._seat_ttl)
            self._kept.write_changes(room_id, room.seats)

    def _room(self, room_id: str) -> Room:
        room = self._rooms.get(room_id)
        if room is None:
            now = self._clock.seconds()
            room = self._rooms.add(room_id, RoomSeats(self._guarding_since, now), now)
        elif room.started and self._has_ended(room):
            room.started = False
        return room

    def _has_ended(self, room: Room) -> bool:
        now = self._clock.seconds()
        return not room.seats.is_occupied(now) and now - room.seats.vacated >= CALL_ENDED_AFTER


def _snapshot(room_id: str, seats: RoomSeats, now: float) -> RoomSnapshot:
    present = [
        Presence(at.alias, at.sid, hold.identity, hold.user, hold.state.value) for at, hold in seats.sessions.items()
    ]
    return RoomSnapshot(room_id, seats.seats_taken(now), sorted(seats.awaited(now)), present)
