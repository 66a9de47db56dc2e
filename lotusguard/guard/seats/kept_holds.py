# SPDX-License-Identifier: Apache-2.0
"""The holds of a seat book in the state directory, so that a restart of the guard frees no seat."""

from __future__ import annotations

from collections.abc import Callable

from attrs import frozen
from twisted.internet.interfaces import IReactorTime

from lotusguard.guard.seats.store import StateStore, StoredHold
from lotusguard.rules.room_seats import RoomSeats
from lotusguard.rules.seats import Hold, HoldState, IdentityKey


@frozen(eq=False)
class KeptHolds:
    """Writes what changes in rooms.

    :param store: ``None`` if nothing survives a restart.
    :param wall: seconds since the epoch, for what is kept on disk.
    """

    _store: StateStore | None
    _clock: IReactorTime
    _wall: Callable[[], float]

    async def write_before_sending(self, room_id: str, seats: RoomSeats, hold: Hold, older: Hold | None) -> None:
        """Write the hold of a token that is about to be sent. Asking again for a token that was not used changes
        nothing that is on disk: not even the time to arrive.

        :param older: the hold that the identity had before.
        """
        if self._store is None:
            return
        seats.changed.discard(IdentityKey(hold.alias, hold.identity))
        if older is not None and older.stored and _stored_alike(older, hold):
            hold.stored = True
        else:
            hold.stored = await self._store.put_hold(self._stored(room_id, hold, present=False))

    def write_changes(self, room_id: str, seats: RoomSeats) -> None:
        """Write what has changed in a room, without waiting for it."""
        changed, seats.changed = seats.changed, set()
        if self._store is None:
            return
        for key in changed:
            if not key.alias:
                continue
            hold = seats.find(key)
            if hold is None or hold.state in (HoldState.UNSEATED, HoldState.ISSUED_UNSEATED):
                self._store.drop_hold(room_id, key.alias, key.identity)
            else:
                present = hold.state is not HoldState.ISSUED
                self._store.put_hold_later(self._stored(room_id, hold, present=present))

    def drop_room(self, room_id: str, seats: RoomSeats) -> None:
        """A room was forgotten although people hold seats there."""
        if self._store is not None:
            for key in seats.identities():
                self._store.drop_hold(room_id, key.alias, key.identity)

    def _stored(self, room_id: str, hold: Hold, *, present: bool) -> StoredHold:
        expires = self._wall() + hold.expires - self._clock.seconds()
        return StoredHold(room_id, hold.user, hold.alias, hold.identity, hold.device, present, expires)


def _stored_alike(one: Hold, other: Hold) -> bool:
    """Whether two holds of the same identity are the same row on disk."""
    return (one.state, one.user, one.device, one.expires) == (other.state, other.user, other.device, other.expires)
