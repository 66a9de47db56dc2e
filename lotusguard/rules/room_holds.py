# SPDX-License-Identifier: Apache-2.0
"""The holds of one Matrix room: where each is, what they count as, and how an event moves one of them.

`lotusguard.rules.room_seats` decides which event happens to which hold. Every operation costs the same however many
seats are held, but for the questions that return sets.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TypeVar

from attrs import define, field

from lotusguard.rules.seat_count import SeatCount
from lotusguard.rules.seats import TABLE, Hold, HoldEvent, HoldState, IdentityKey, Session

K = TypeVar("K")

RECONNECT_WINDOW = 20.0
"""Seconds for which a seat is kept after a departure that neither the participant nor a moderator caused."""
RESERVED_PER_USER = 64
"""Holds that are reserved for one user. Each token may have an identity of its own; beyond the limit the oldest hold is
dropped. The user keeps the seat by the others."""
_ENDINGS = (HoldEvent.LEAVE, HoldEvent.VANISH, HoldEvent.EXPIRE)


@define
class RoomHolds:
    """Who holds what in one Matrix room.

    :ivar version: is higher after each change of what is held here, and by whom.
    :ivar vacated: when the last hold of those that make the room occupied ended.
    :ivar changed: identities whose hold changed since somebody last cleared this set; for persistence.
    """

    version: int = field(default=0, init=False)
    vacated: float = field(default=0.0, init=False)
    sessions: dict[Session, Hold] = field(factory=dict, init=False)
    """PRESENT and UNSEATED holds"""
    reserved: dict[IdentityKey, Hold] = field(factory=dict, init=False)
    """ISSUED…, RECONNECTING and LEFT holds"""
    pending: dict[str, Hold] = field(factory=dict, init=False)
    """PENDING holds by ID"""
    changed: set[IdentityKey] = field(factory=set, init=False)
    _by_alias: dict[str, dict[Session, Hold]] = field(factory=dict, init=False)
    _sessions_of: dict[IdentityKey, list[Hold]] = field(factory=dict, init=False)
    _reserved_for: dict[str, dict[IdentityKey, Hold]] = field(factory=dict, init=False)
    _unseated: dict[Session, Hold] = field(factory=dict, init=False)
    _unconfirmed: dict[IdentityKey, Hold] = field(factory=dict, init=False)
    _failed_open: dict[IdentityKey, Hold] = field(factory=dict, init=False)
    _counted: SeatCount = field(factory=SeatCount, init=False)
    _aliases: dict[str, int] = field(factory=dict, init=False)
    _expiring: list[tuple[float, int, Hold]] = field(factory=list, init=False)
    _serial: int = field(default=0, init=False)

    # -- questions ---------------------------------------------------------------------------------------

    def owns_seat(self, user: str) -> bool:
        """Whether this user has a seat (or needs none) and so may enter again."""
        return self._counted.owns_seat(user)

    def is_exempt(self, user: str) -> bool:
        """Whether this user takes no seat."""
        return self._counted.is_exempt(user)

    def seats_taken(self, now: float) -> int:
        """How many seats are taken, requests in flight included."""
        self._advance(now)
        return self._counted.total.takes_seat

    def users(self) -> set[str]:
        """The distinct users in the call."""
        return {hold.user for hold in self.sessions.values()}

    def awaited(self, now: float) -> set[str]:
        """Users who have a seat, have no request in flight, and are not in the call as far as we know."""
        self._advance(now)
        return {hold.user for hold in self.reserved.values() if hold.rules.owns_seat}

    def aliases(self) -> set[str]:
        """The SFU rooms in which somebody holds a seat or is about to."""
        return {alias for alias in self._aliases if alias}

    def kept_aliases(self, now: float, since: float) -> set[str]:
        """The SFU rooms in which somebody is or has a token, or was until ``since`` or later."""
        self._advance(now)
        kept = {at.alias for at in self.sessions}
        for key, hold in self.reserved.items():
            if not hold.rules.unconfirmed or hold.expires >= since:
                kept.add(key.alias)
        return {alias for alias in kept if alias}

    def listing_required_since(self, now: float) -> float | None:
        """Latest end of a hold that no listing has confirmed; ``None`` if there is none."""
        self._advance(now)
        return max((hold.expires for hold in self._unconfirmed.values()), default=None)

    def is_idle(self, now: float) -> bool:
        """Whether nobody is in the call, nobody holds a seat and no request is in flight."""
        self._advance(now)
        return not (self.sessions or self.reserved or self.pending)

    def is_occupied(self, now: float) -> bool:
        """Whether anybody is in the call or has a token in time, as far as we know; requests in flight do not count."""
        self._advance(now)
        return bool(self.sessions) or len(self.reserved) > len(self._unconfirmed)

    def occupants(self, now: float) -> set[str]:
        """Users who are in the call, have a token in time, or have a request in flight that holds a seat."""
        self._advance(now)
        reserved = {hold.user for hold in self.reserved.values() if not hold.rules.unconfirmed}
        return self.users() | reserved | {hold.user for hold in self.pending.values()}

    def find(self, key: IdentityKey) -> Hold | None:
        """The hold of an identity: a session if there is one, else what is reserved for it."""
        return self._sessions_of.get(key, [None])[-1] or self.reserved.get(key)

    def reserved_for(self, user: str) -> list[tuple[IdentityKey, Hold]]:
        """What is reserved for a user, the oldest first."""
        return list(self._reserved_for.get(user, {}).items())

    def identities(self) -> set[IdentityKey]:
        """The identities that hold anything here."""
        return {*self.reserved, *self._sessions_of}

    # -- moving ------------------------------------------------------------------------------------------

    def _advance(self, now: float) -> None:
        """Let everything expire that has."""
        while self._expiring and self._expiring[0][0] <= now:
            expires, _, hold = heappop(self._expiring)
            key = IdentityKey(hold.alias, hold.identity)
            if self.reserved.get(key) is hold and hold.expires == expires and HoldEvent.EXPIRE in hold.rules.moves:
                self._move(hold, HoldEvent.EXPIRE, expires)

    def _move(self, hold: Hold, event: HoldEvent, now: float = 0.0) -> None:
        """The one place where a hold that counts changes its state. :param now: matters for arrivals and endings."""
        before, after = hold.state, hold.rules.moves[event]
        key = IdentityKey(hold.alias, hold.identity)
        if before is HoldState.PENDING:
            del self.pending[hold.id]
        elif hold.rules.in_call:
            self._take_session(Session(hold.alias, hold.sid))
        else:
            self._take_reserved(key)
        self._uncount(hold)
        self.changed.add(key)
        if event in _ENDINGS:
            self.vacated = max(self.vacated, now)
        if after is not None:
            hold.state = after
            if hold.rules.in_call:
                hold.began = now if event is HoldEvent.ARRIVE else hold.began
                self._put_session(Session(hold.alias, hold.sid), hold)
            elif not (TABLE[before].in_call and (key in self.reserved or key in self._sessions_of)):
                # else the identity has a newer token or session, which keeps the seat
                if event in (HoldEvent.LEAVE, HoldEvent.VANISH):
                    hold.began = now
                    hold.expires = now if event is HoldEvent.LEAVE else now + RECONNECT_WINDOW
                self._put_reserved(key, hold)
        self._counted.forget(hold.user)

    def _put_session(self, at: Session, hold: Hold) -> None:
        self.sessions[at] = hold
        self._by_alias.setdefault(at.alias, {})[at] = hold
        key = IdentityKey(at.alias, hold.identity)
        self._sessions_of.setdefault(key, []).append(hold)
        if hold.state is HoldState.UNSEATED:
            self._unseated[at] = hold
        self.changed.add(key)
        self._count(hold)

    def _take_session(self, at: Session) -> None:
        hold = self.sessions.pop(at)
        _remove(self._by_alias, at.alias, at)
        key = IdentityKey(at.alias, hold.identity)
        self._sessions_of[key].remove(hold)
        if not self._sessions_of[key]:
            del self._sessions_of[key]
        self._unseated.pop(at, None)

    def _put_reserved(self, key: IdentityKey, hold: Hold) -> None:
        self._count(hold)  # first, so that the user is known throughout
        older = self.reserved.get(key)
        if older is not None:
            self._move(older, HoldEvent.REPLACE)
        self.reserved[key] = hold
        of_user = self._reserved_for.setdefault(hold.user, {})
        of_user[key] = hold
        if hold.rules.unconfirmed:
            self._unconfirmed[key] = hold
        if hold.state is HoldState.ISSUED_UNSEATED:
            self._failed_open[key] = hold
        if HoldEvent.EXPIRE in hold.rules.moves:
            self._serial += 1
            heappush(self._expiring, (hold.expires, self._serial, hold))
        self.changed.add(key)
        if len(of_user) > RESERVED_PER_USER:
            self._move(next(iter(of_user.values())), HoldEvent.REPLACE)

    def _take_reserved(self, key: IdentityKey) -> None:
        hold = self.reserved.pop(key)
        _remove(self._reserved_for, hold.user, key)
        self._unconfirmed.pop(key, None)
        self._failed_open.pop(key, None)

    def _count(self, hold: Hold) -> None:
        self.version += 1
        self._aliases[hold.alias] = self._aliases.get(hold.alias, 0) + 1
        self._counted.add(hold)

    def _uncount(self, hold: Hold) -> None:
        """Must be called before the hold's state changes."""
        self.version += 1
        self._aliases[hold.alias] -= 1
        if not self._aliases[hold.alias]:
            del self._aliases[hold.alias]
        self._counted.subtract(hold)


def _remove(groups: dict[str, dict[K, Hold]], name: str, key: K) -> None:
    """Take a hold out of its group, and drop the group when it is empty."""
    group = groups[name]
    del group[key]
    if not group:
        del groups[name]
