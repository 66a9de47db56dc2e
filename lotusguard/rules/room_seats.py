# SPDX-License-Identifier: Apache-2.0
"""The seats of one Matrix room, over all its slots.

Every method is one step without an await, so looking for a free seat and taking it cannot be torn apart. Times are
seconds on one monotonic clock. Every operation costs the same however many seats are held; a listing costs as much
as it has participants, and one that shows the same as the last one costs nothing (``RoomSeats.listed_again``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from attrs import define, field

from lotusguard.rules.arrival_times import ArrivalTimes
from lotusguard.rules.ended_sessions import EndedSessions
from lotusguard.rules.listings import Listings
from lotusguard.rules.refusals import Refusal
from lotusguard.rules.room_holds import RoomHolds
from lotusguard.rules.seats import Arrival, Hold, HoldEvent, HoldState, IdentityKey, Session

CALL_ENDED_AFTER = 60.0
"""Seconds without occupants and holds after which a call has ended."""
UNCONFIRMED_KEPT = 600.0
"""Seconds for which an ended hold waits for a listing that confirms it. Where nothing is enforced nobody lists."""


@define
class RoomSeats(RoomHolds):
    """Who holds the seats of one Matrix room.

    :ivar unlimited_at: when the room was last known to have no limit; people who joined earlier stay.
    :ivar touched: when anything happened here.
    """

    unlimited_at: float
    touched: float = 0.0
    _arrival_times: ArrivalTimes = field(factory=ArrivalTimes, init=False)
    _ended: EndedSessions = field(factory=EndedSessions, init=False)
    _listings: Listings = field(factory=Listings, init=False)

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

    def issue(self, hold_id: str, alias: str, identity: str, now: float, ttl: float, device: str = "") -> Hold | None:
        """The token of a pending hold was issued. ``None`` if there is no such hold.

        :param ttl: seconds to arrive. They run from the first token that the user did not use.
        :param device: the device that the token was asked for; "" if it is not known.
        """
        self._advance(now)
        hold = self.pending.pop(hold_id, None)
        if hold is None:
            return None
        self._uncount(hold)
        hold.device = device
        return self._reserve(hold, _key(alias, identity, hold_id), now, ttl)

    def issue_without_seat(
        self, hold_id: str, user: str, alias: str, identity: str, now: float, ttl: float, device: str = ""
    ) -> Hold:
        """A token was issued although nobody could tell whether a seat was free."""
        self._advance(now)
        key = _key(alias, identity, hold_id)
        if self.owns_seat(user):
            return self._reserve(Hold(hold_id, user, HoldState.PENDING, alias, device=device), key, now, ttl)
        expires = self._arrival_times.issued(user, now, ttl)
        hold = Hold(
            hold_id, user, HoldState.ISSUED_UNSEATED, key.alias, key.identity, began=now, expires=expires, device=device
        )
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
        if who.joined is not None and self._listings.overtook_arrival(alias, who.joined):
            return
        joined_by = now if who.joined is None else who.joined
        self._arrived(Session(alias, who.sid), who, limit, now, joined_by)

    def leave(self, alias: str, sid: str, identity: str, now: float, left_by: float, *, by_choice: bool) -> None:
        """A session ended. It never comes back: a delayed event of an old session says nothing about a new one.

        Clients that use both token routes join with an identity of ``/sfu/get`` and may leave a token of ``/get_token``
        unused. Their hanging up ends the hold of that token too. Not the other way round: in the middle of a join such
        a client connects with the other identity for a moment, and leaves with it.

        :param left_by: when it ended, at the latest. Holds issued after this time are kept.
        :param by_choice: whether the participant hung up or a moderator removed them.
        """
        self._advance(now)
        self.touched = now
        at, key = Session(alias, sid), IdentityKey(alias, identity)
        self._ended.note(at, now)
        self._ended.forget_old(now)
        reserved = self.reserved.get(key)
        hold = self.sessions.get(at)
        known = hold or reserved
        if by_choice and known is not None:
            self._end_unused(known.user, key, left_by, now)
        if by_choice and reserved is not None and (reserved.began <= left_by or reserved.sid == sid != ""):
            self._move(reserved, HoldEvent.LEAVE, now)
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
        self._listings.unsettle(alias)
        if self._listings.overtook(alias, since):
            return  # this one would bring back people who have left
        first = alias not in self._listings
        self._note_listing(alias, limit, since, now)
        there = set()
        unsettled = []
        for who in present:
            at = Session(alias, who.sid)
            there.add(at)
            if self._is_settled(at, who):
                self._arrival_times.arrived(who.user)
            else:
                unsettled.append(who)
        for who in sorted(unsettled, key=_joined):
            at = Session(alias, who.sid)
            self._ended.shown_by_listing(at, since)
            before = first and (who.joined is None or who.joined <= self.unlimited_at)
            self._arrived(at, who, None if before else limit, now, since)
        self._end_missing(alias, there, since, now)
        if limit is not None:
            self._seat_failed_open(limit)
        self._ended.forget_old(now)
        undecided = self._unconfirmed or self._unseated or self._failed_open
        if not unsettled and not undecided and len(self._by_alias.get(alias, ())) == len(there):
            self._listings.settle(alias, self.version)

    def listed_again(self, alias: str, limit: int | None, since: float, now: float) -> bool:
        """A listing that shows the same participants as the last one that was applied. Costs the same at any size.

        :return: whether it tells nothing new. If not, it has to be applied: a seat was taken or given up since, or
            somebody's seat depends on a listing.
        """
        self._advance(now)
        if not self._listings.is_settled(alias, self.version) or self._listings.overtook(alias, since):
            return False
        self._note_listing(alias, limit, since, now)
        return True

    def listed_since(self, aliases: Iterable[str]) -> float | None:
        """When the oldest of the last listings of these SFU rooms began; ``None`` if one was never listed."""
        return self._listings.oldest(aliases)

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
            elif self._counted.total.removes >= limit and hold.alias in self._listings:
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

    def forget_old(self, now: float, ttl: float) -> None:
        """Drop what no delayed event can refer to any more."""
        self._advance(now)
        self._ended.forget_old(now)
        for hold in [hold for hold in self._unconfirmed.values() if hold.expires + UNCONFIRMED_KEPT <= now]:
            self._move(hold, HoldEvent.CONFIRM)
        self._arrival_times.forget_old(now, ttl)
        self._listings.forget_others(self._aliases)

    # -- an earlier run of the guard ---------------------------------------------------------------------

    def restore_issued(
        self, hold_id: str, user: str, key: IdentityKey, now: float, expires: float, device: str = ""
    ) -> None:
        """A token was issued, and its user had not arrived. :param expires: when the time to arrive is over."""
        self._restore(Hold(hold_id, user, HoldState.ISSUED, *key, began=now, expires=expires, device=device), now)

    def restore_present(
        self, hold_id: str, user: str, key: IdentityKey, now: float, ended: float, device: str = ""
    ) -> None:
        """The user was in the call. A listing has to confirm that they are not any more.

        :param ended: when that run ended.
        """
        hold = Hold(hold_id, user, HoldState.LEFT, *key, began=now, expires=min(now, ended), device=device)
        self._restore(hold, now)

    def _restore(self, hold: Hold, now: float) -> None:
        key = IdentityKey(hold.alias, hold.identity)
        self._put_reserved(key, hold)
        self.vacated = max(self.vacated, now)
        self.changed.discard(key)

    # -- how it is done ----------------------------------------------------------------------------------

    def _note_listing(self, alias: str, limit: int | None, since: float, now: float) -> None:
        self._listings.note(alias, since)
        self.touched = now
        if limit is None:
            self.unlimited_at = now

    def _is_settled(self, at: Session, who: Arrival) -> bool:
        """Whether a listing says nothing new about a participant: they have a seat, and no unused token."""
        hold = self.sessions.get(at)
        return (
            hold is not None
            and hold.state is HoldState.PRESENT
            and at not in self._ended
            and IdentityKey(at.alias, who.identity) not in self.reserved
        )

    def _end_missing(self, alias: str, there: Collection[Session], since: float, now: float) -> None:
        """A listing confirms the end of what it does not show, unless that began after the listing."""
        for at, hold in list(self._by_alias.get(alias, {}).items()):
            if at not in there and hold.began < since:
                self._move(hold, HoldEvent.VANISH, now)
        for hold in list(self._unconfirmed.values()):
            if hold.alias in (alias, "") and hold.expires <= since:
                self._move(hold, HoldEvent.CONFIRM)

    def _end_unused(self, user: str, left: IdentityKey, left_by: float, now: float) -> None:
        """End the holds of tokens that the device of an identity was given for the same call and did not use."""
        device = _device_named_by(left.identity, user)
        for key, hold in self.reserved_for(user):
            same_call = key.alias == left.alias and key.identity != left.identity
            if device and hold.device == device and same_call and hold.sid == "" and hold.began <= left_by:
                self._move(hold, HoldEvent.LEAVE, now)

    def _reserve(self, hold: Hold, key: IdentityKey, now: float, ttl: float) -> Hold:
        """Make an issued hold of a pending one."""
        expires = self._arrival_times.issued(hold.user, now, ttl)
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
        self._arrival_times.arrived(who.user)
        if hold.state is HoldState.UNSEATED and (limit is None or self._may_sit(hold, limit)):
            self._move(hold, HoldEvent.SEAT)

    def _may_sit(self, hold: Hold, limit: int) -> bool:
        """Whether a participant without a seat may have one. Before the first listing nobody can tell."""
        return self.owns_seat(hold.user) or (hold.alias in self._listings and self._counted.total.owns_seat < limit)

    def _seat_failed_open(self, limit: int) -> None:
        """Tokens that were issued while the roster was unknown get the seats that are free, first come first served."""
        for hold in list(self._failed_open.values()):
            if self.owns_seat(hold.user) or self._counted.total.owns_seat < limit:
                self._move(hold, HoldEvent.SEAT)


def _key(alias: str, identity: str, hold_id: str) -> IdentityKey:
    """The key of a token. One that cannot be read gets a key of its own, so that it replaces no other hold."""
    return IdentityKey(alias, identity or hold_id)


def _joined(who: Arrival) -> float:
    """When somebody joined; those of whom the SFU does not say are taken for the oldest."""
    return who.joined if who.joined is not None else 0.0


def _device_named_by(identity: str, user: str) -> str:
    """The device that an identity of ``/sfu/get`` names in clear; "" if this is none of that user's."""
    return identity[len(user) + 1 :] if identity.startswith(f"{user}:") else ""
