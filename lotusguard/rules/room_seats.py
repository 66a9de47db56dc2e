# SPDX-License-Identifier: Apache-2.0
"""The seats of one Matrix room, over all its slots.

Every method is one step without an await, so looking for a free seat and taking it cannot be torn apart. Times are
seconds on one monotonic clock. Every operation costs the same however many seats are held; a listing costs as much
as it has participants.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from heapq import heappop, heappush
from typing import TypeVar

from attrs import Factory, define, field

from lotusguard.rules.refusals import Refusal
from lotusguard.rules.seat_count import SeatCount
from lotusguard.rules.seats import TABLE, Arrival, Hold, HoldEvent, HoldState, IdentityKey, Session

K = TypeVar("K")

RECONNECT_WINDOW = 20.0
"""Seconds for which a seat is kept after a departure that neither the participant nor a moderator caused."""
ENDED_SESSIONS_KEPT = 120.0
"""Seconds for which an ended session is remembered, so that a delayed event cannot bring it back."""
UNCONFIRMED_KEPT = 600.0
"""Seconds for which an ended hold waits for a listing that confirms it. Where nothing is enforced nobody lists."""


@define
class _Chain:
    """A user's time to arrive, from the first token they did not use."""

    expires: float
    asked: float


@define
class RoomSeats:
    """Who holds the seats of one Matrix room.

    :ivar unlimited_at: when the room was last known to have no limit; people who joined earlier stay.
    :ivar touched: when anything happened here.
    :ivar vacated: when the last hold of those that make the room occupied ended.
    :ivar changed: identities whose hold changed since somebody last cleared this set; for persistence.
    """

    unlimited_at: float
    touched: float = 0.0
    vacated: float = field(default=0.0, init=False)
    sessions: dict[Session, Hold] = Factory(dict)
    """PRESENT and UNSEATED holds"""
    reserved: dict[IdentityKey, Hold] = Factory(dict)
    """ISSUED…, RECONNECTING and LEFT holds"""
    pending: dict[str, Hold] = Factory(dict)
    """PENDING holds by ID"""
    changed: set[IdentityKey] = Factory(set)
    _listed: dict[str, float] = field(factory=dict, init=False)
    _by_alias: dict[str, dict[Session, Hold]] = field(factory=dict, init=False)
    _sessions_of: dict[IdentityKey, list[Hold]] = field(factory=dict, init=False)
    _unseated: dict[Session, Hold] = field(factory=dict, init=False)
    _unconfirmed: dict[IdentityKey, Hold] = field(factory=dict, init=False)
    _counted: SeatCount = field(factory=SeatCount, init=False)
    _expiring: list[tuple[float, int, Hold]] = field(factory=list, init=False)
    _failed_open: dict[IdentityKey, Hold] = field(factory=dict, init=False)
    _aliases: dict[str, int] = field(factory=dict, init=False)
    _serial: int = field(default=0, init=False)
    _ended: dict[Session, float] = field(factory=dict, init=False)
    _chains: dict[str, _Chain] = field(factory=dict, init=False)

    # -- a join ------------------------------------------------------------------------------------------

    def take(
        self,
        hold_id: str,
        user: str,
        limit: int | None,
        alias: str,
        now: float,
        *,
        exempt: bool = False,
        slots: int | None = None,
    ) -> Refusal | None:
        """Look for a free seat and take it: ``None``, and the hold is PENDING.

        :param alias: the SFU room that the user is about to enter.
        :param exempt: the user enters past the limit and takes no seat from others (``bypass_limit``).
        :param slots: in how many SFU rooms of this room people may hold seats; ``None`` for no limit.
        :return: `Refusal.TOO_MANY_SLOTS`, `Refusal.FULL`, or `Refusal.SEAT_PENDING` if only requests in flight fill the
            room.
        """
        self._advance(now)
        self.touched = now
        if slots is not None and alias not in self._aliases and len(self._aliases) >= slots:
            return Refusal.TOO_MANY_SLOTS
        if limit is None:
            self.unlimited_at = now
        elif not exempt and self._counted.total.takes_seat >= limit and not self.owns_seat(user):
            return Refusal.FULL if self._counted.total.full >= limit else Refusal.SEAT_PENDING
        hold = self.pending[hold_id] = Hold(hold_id, user, HoldState.PENDING, alias, began=now)
        self._count(hold)
        if exempt:
            self.exempt(user)
        return None

    def issue(self, hold_id: str, alias: str, identity: str, now: float, ttl: float) -> Hold | None:
        """The token of a pending hold was issued. ``None`` if there is no such hold.

        :param ttl: seconds to arrive. They run from the first token that the user did not use.
        """
        self._advance(now)
        hold = self.pending.pop(hold_id, None)
        if hold is None:
            return None
        self._uncount(hold)
        return self._reserve(hold, _key(alias, identity, hold_id), now, ttl)

    def issue_without_seat(self, hold_id: str, user: str, alias: str, identity: str, now: float, ttl: float) -> Hold:
        """A token was issued although nobody could tell whether a seat was free."""
        self._advance(now)
        key = _key(alias, identity, hold_id)
        if self.owns_seat(user):
            return self._reserve(Hold(hold_id, user, HoldState.PENDING, alias), key, now, ttl)
        expires = self._time_to_arrive(user, now, ttl)
        hold = Hold(hold_id, user, HoldState.ISSUED_UNSEATED, key.alias, key.identity, began=now, expires=expires)
        self._put_reserved(key, hold)
        return hold

    def release(self, hold_id: str) -> None:
        """No token was issued, or the caller went away."""
        hold = self.pending.get(hold_id)
        if hold is not None:
            self._move(hold, HoldEvent.RELEASE)

    # -- the call ----------------------------------------------------------------------------------------

    def arrive(self, alias: str, who: Arrival, limit: int | None, now: float) -> None:
        """Somebody is in the call. Idempotent."""
        self._advance(now)
        self.touched = now
        if limit is None:
            self.unlimited_at = now
        joined_by = now if who.joined is None else who.joined
        self._arrived(Session(alias, who.sid), who, limit, now, joined_by)

    def leave(self, alias: str, sid: str, identity: str, now: float, left_by: float, *, by_choice: bool) -> None:
        """A session ended. It never comes back: a delayed event of an old session says nothing about a new one.

        :param left_by: when it ended, at the latest. Holds issued after this time are kept.
        :param by_choice: whether the participant hung up or a moderator removed them.
        """
        self._advance(now)
        self.touched = now
        at, key = Session(alias, sid), IdentityKey(alias, identity)
        self._ended[at] = now
        reserved = self.reserved.get(key)
        if by_choice and reserved is not None and (reserved.began <= left_by or reserved.sid == sid != ""):
            self._move(reserved, HoldEvent.LEAVE, now)
        hold = self.sessions.get(at)
        if hold is not None:
            self._move(hold, HoldEvent.LEAVE if by_choice else HoldEvent.VANISH, now)

    def apply_listing(
        self, alias: str, present: Collection[Arrival], limit: int | None, since: float, now: float
    ) -> None:
        """A complete listing of one SFU room.

        At the first listing, participants who joined while the room had no limit that we know of stay.

        :param since: when the listing began. It does not contradict anything that happened later.
        """
        self._advance(now)
        if since < self._listed.get(alias, since):
            return  # a later listing overtook it: this one would bring back people who have left
        first = alias not in self._listed
        self._listed[alias] = since
        self.touched = now
        if limit is None:
            self.unlimited_at = now
        there = set()
        news = []
        for who in present:
            at = Session(alias, who.sid)
            there.add(at)
            if not self._is_settled(at, who):
                news.append(who)
        for who in sorted(news, key=self._precedence):
            at = Session(alias, who.sid)
            if self._ended.get(at, since) < since:
                del self._ended[at]  # the SFU was asked after that event, and says it is there
            before = first and (who.joined is None or who.joined <= self.unlimited_at)
            self._arrived(at, who, None if before else limit, now, since)
        for at, hold in list(self._by_alias.get(alias, {}).items()):
            if at not in there and hold.began < since:
                self._move(hold, HoldEvent.VANISH, now)
        for hold in [
            hold for hold in self._unconfirmed.values() if hold.alias in (alias, "") and hold.expires <= since
        ]:
            self._move(hold, HoldEvent.CONFIRM)
        if limit is not None:
            self._seat_failed_open(limit)
        self._forget_ended(now)

    def overflow(self, limit: int | None, now: float) -> list[Hold]:
        """Participants to be removed: those without a seat in a room that is certainly full.

        First, everybody gets a seat who can be given one. While requests in flight fill the room, or holds that a
        listing has yet to confirm, nobody is removed.
        """
        self._advance(now)
        over = []
        for hold in list(self._unseated.values()):
            if limit is None or self._may_sit(hold, limit):
                self._move(hold, HoldEvent.SEAT)
            elif self._counted.total.removes >= limit and hold.alias in self._listed:
                over.append(hold)
        return over

    def seat_everybody(self) -> None:
        """Participants without a seat get one, limit or not."""
        for hold in list(self._unseated.values()):
            self._move(hold, HoldEvent.SEAT)

    def exempt(self, user: str) -> None:
        """This user takes no seat from others, for as long as they hold anything here (``bypass_limit``)."""
        self._counted.exempt(user)

    def rename(self, key: IdentityKey, user: str) -> None:
        """The sessions of an identity belong to this user, as their own request proves."""
        for hold in self._sessions_of.get(key, ()):
            if hold.user != user:
                nobody = hold.user
                self._uncount(hold)
                hold.user = user
                self._count(hold)
                self._counted.forget(nobody)

    def restore(self, hold_id: str, user: str, key: IdentityKey, *, present: bool, now: float, expires: float) -> None:
        """A hold of an earlier run of the guard. A listing has to confirm those that were in the call."""
        state = HoldState.LEFT if present else HoldState.ISSUED
        hold = Hold(hold_id, user, state, key.alias, key.identity, began=now, expires=now if present else expires)
        self._put_reserved(key, hold)
        self.vacated = max(self.vacated, now)
        self.changed.discard(key)

    # -- questions ---------------------------------------------------------------------------------------

    def owns_seat(self, user: str) -> bool:
        """Whether this user has a seat (or needs none) and so may enter again."""
        return self._counted.owns_seat(user)

    def is_exempt(self, user: str) -> bool:
        """Whether this user takes no seat."""
        return self._counted.is_exempt(user)

    def is_present(self, user: str) -> bool:
        """Whether this user is in the call."""
        return self._counted.is_present(user)

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

    def listed_since(self, aliases: Iterable[str]) -> float | None:
        """When the oldest of the last listings of these SFU rooms began; ``None`` if one was never listed."""
        oldest: float | None = None
        for alias in aliases:
            since = self._listed.get(alias)
            if since is None:
                return None
            oldest = since if oldest is None else min(oldest, since)
        return oldest

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

    def knows(self, key: IdentityKey) -> bool:
        """Whether an identity holds anything here."""
        return key in self.reserved or key in self._sessions_of

    # -- how it is done ----------------------------------------------------------------------------------

    def _is_settled(self, at: Session, who: Arrival) -> bool:
        """Whether a listing says nothing new about a participant: they have a seat, and no unused token."""
        hold = self.sessions.get(at)
        return (
            hold is not None
            and hold.state is HoldState.PRESENT
            and at not in self._ended
            and IdentityKey(at.alias, who.identity) not in self.reserved
            and who.user not in self._chains
        )

    def _precedence(self, who: Arrival) -> tuple[bool, float]:
        """Owners of a seat first, then by the time they joined."""
        return (not self.owns_seat(who.user), who.joined if who.joined is not None else 0.0)

    def _time_to_arrive(self, user: str, now: float, ttl: float) -> float:
        chain = self._chains.get(user)
        if chain is None or chain.asked + ttl < now:
            chain = self._chains[user] = _Chain(now + ttl, now)
        chain.asked = now
        return chain.expires

    def _reserve(self, hold: Hold, key: IdentityKey, now: float, ttl: float) -> Hold:
        """Make an issued hold of a pending one."""
        expires = self._time_to_arrive(hold.user, now, ttl)
        state = hold.rules.moves[HoldEvent.ISSUE_LATE if expires <= now else HoldEvent.ISSUE]
        assert state is not None
        hold.state, hold.alias, hold.identity = state, key.alias, key.identity
        hold.began, hold.expires = now, expires
        self._put_reserved(key, hold)
        return hold

    def _arrived(self, at: Session, who: Arrival, limit: int | None, now: float, joined_by: float) -> None:
        """:param joined_by: tokens issued after this time are not what they joined with."""
        if at in self._ended:
            return
        key = IdentityKey(at.alias, who.identity)
        reserved = self.reserved.get(key)
        if reserved is not None and reserved.began > joined_by:
            reserved = None
        hold = self.sessions.get(at)
        if hold is not None:
            if reserved is not None:
                self._move(reserved, HoldEvent.REPLACE)
        elif reserved is not None and reserved.user == who.user:
            hold = reserved
            hold.sid = who.sid
            self._move(hold, HoldEvent.ARRIVE, now)
        else:
            state = HoldState.PRESENT if self.owns_seat(who.user) else HoldState.UNSEATED
            hold = Hold(who.sid, who.user, state, at.alias, who.identity, who.sid, began=now)
            self._put_session(at, hold)
        self._chains.pop(who.user, None)
        if hold.state is HoldState.UNSEATED and (limit is None or self._may_sit(hold, limit)):
            self._move(hold, HoldEvent.SEAT)

    def _may_sit(self, hold: Hold, limit: int) -> bool:
        """Whether a participant without a seat may have one. Before the first listing nobody can tell."""
        return self.owns_seat(hold.user) or (
            hold.alias in self._listed and self._counted.owners_besides(hold.user) < limit
        )

    def _seat_failed_open(self, limit: int) -> None:
        """Tokens that were issued while the roster was unknown get the seats that are free, first come first served."""
        for hold in list(self._failed_open.values()):
            if self.owns_seat(hold.user) or self._counted.owners_besides(hold.user) < limit:
                self._move(hold, HoldEvent.SEAT)

    def _advance(self, now: float) -> None:
        """Let everything expire that has."""
        while self._expiring and self._expiring[0][0] <= now:
            expires, _, hold = heappop(self._expiring)
            key = IdentityKey(hold.alias, hold.identity)
            if self.reserved.get(key) is hold and hold.expires == expires and HoldEvent.EXPIRE in hold.rules.moves:
                self._move(hold, HoldEvent.EXPIRE, expires)

    def _move(self, hold: Hold, event: HoldEvent, now: float = 0.0) -> None:
        """The one place where a hold that counts changes its state."""
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
        del self._by_alias[at.alias][at]
        if not self._by_alias[at.alias]:
            del self._by_alias[at.alias]
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
        if hold.rules.unconfirmed:
            self._unconfirmed[key] = hold
        if hold.state is HoldState.ISSUED_UNSEATED:
            self._failed_open[key] = hold
        if HoldEvent.EXPIRE in hold.rules.moves:
            self._serial += 1
            heappush(self._expiring, (hold.expires, self._serial, hold))
        self.changed.add(key)

    def _take_reserved(self, key: IdentityKey) -> None:
        del self.reserved[key]
        self._unconfirmed.pop(key, None)
        self._failed_open.pop(key, None)

    def _count(self, hold: Hold) -> None:
        self._aliases[hold.alias] = self._aliases.get(hold.alias, 0) + 1
        self._counted.add(hold)

    def _uncount(self, hold: Hold) -> None:
        """Must be called before the hold's state changes."""
        _one_less(self._aliases, hold.alias)
        self._counted.subtract(hold)

    def _forget_ended(self, now: float) -> None:
        oldest = now - ENDED_SESSIONS_KEPT
        while self._ended:
            at = next(iter(self._ended))
            if self._ended[at] > oldest:
                break
            del self._ended[at]

    def forget_old(self, now: float, ttl: float) -> None:
        """Drop what no delayed event can refer to any more."""
        self._advance(now)
        self._forget_ended(now)
        for hold in [hold for hold in self._unconfirmed.values() if hold.expires + UNCONFIRMED_KEPT <= now]:
            self._move(hold, HoldEvent.CONFIRM)
        self._chains = {user: chain for user, chain in self._chains.items() if chain.asked + ttl >= now}
        self._listed = {alias: since for alias, since in self._listed.items() if alias in self._aliases}


_ENDINGS = (HoldEvent.LEAVE, HoldEvent.VANISH, HoldEvent.EXPIRE)


def _key(alias: str, identity: str, hold_id: str) -> IdentityKey:
    """The key of a token. One that cannot be read gets a key of its own, so that it replaces no other hold."""
    return IdentityKey(alias, identity or hold_id)


def _one_less(counts: dict[K, int], key: K) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
