# SPDX-License-Identifier: Apache-2.0
"""The seats of one Matrix room, over all its slots: who holds one, who may take one. Floor: rules.

PeriodicService method is one step without an await, so that looking whether a seat is free and taking it cannot be
torn apart. Times are seconds on one clock that never has to be the wall's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import Enum

from attrs import Factory, define, frozen

GONE_MEMORY = 120.0
"""Seconds for which a session that left is remembered, so that news older than that cannot bring it back."""


class Refusal(Enum):
    """Why there is no seat."""

    FULL = "full"
    """PeriodicService seat is held by somebody who is in the call or has been let in."""
    BUSY = "busy"
    """PeriodicService seat is held, but some only by requests that are still being answered: ask again when one is."""


@frozen
class Session:
    """One connection to the SFU. ``sid`` is the SFU's name for it and never used again."""

    alias: str
    sid: str


@define(eq=False)
class Claim:
    """A seat held for one token request.

    :ivar user: who holds it; ``None`` while the answer has not said it yet.
    :ivar expires: when it ends; infinity while the request is being answered.
    """

    user: str | None
    expires: float = math.inf
    issued_to: tuple[str, str] | None = None
    """alias and identity of the token"""
    issued_at: float = math.inf

    @property
    def in_flight(self) -> bool:
        return self.expires == math.inf


@define
class Seating:
    """Where one session sits. ``since`` is when we heard of it."""

    user: str
    identity: str
    since: float
    seated: bool = True


@define
class RoomSeats:
    """Who holds the seats of one Matrix room.

    A seat is held by a user in the call, or by one who was given a token and has not arrived. Whoever
    holds one keeps it: for further devices, other endpoints, a second try.
    """

    sessions: dict[Session, Seating] = Factory(dict)
    claims: list[Claim] = Factory(list)
    observed: dict[str, float] = Factory(dict)
    """alias → the start of the last complete look at who is in it"""
    gone: dict[Session, float] = Factory(dict)
    touched: float = 0.0
    uncapped: float = -math.inf
    """when there was last known to be no cap"""

    def take(self, user: str | None, cap: int, now: float) -> Claim | Refusal:
        """Look whether a seat is free and take it.

        :param user: who asks; ``None`` when only the answer will tell.
        """
        self.touched = now
        if self.held(now) >= cap and (user is None or not self.holds(user, now)):
            return Refusal.FULL if len(self.users() | self.awaited(now)) >= cap else Refusal.BUSY
        claim = Claim(user)
        self.claims.append(claim)
        return claim

    def settle(self, claim: Claim, user: str, issued_to: tuple[str, str], now: float, expires: float) -> None:
        """The token of a claim has been issued: the claim is a promise now, which outlives the request.

        :param user: whom the answer names; an unnamed claim becomes theirs.
        :param issued_to: alias and identity of the token.
        :param expires: until when the seat is kept for them.
        """
        claim.user, claim.expires, claim.issued_to, claim.issued_at = user, expires, issued_to, now
        if claim in self.claims:  # one promise an identity is enough
            self.claims = [c for c in self.claims if c is claim or c.user != user or c.issued_to != issued_to]

    def release(self, claim: Claim) -> None:
        """No token was issued, or the caller went away: the seat is free unless something else holds it."""
        if claim in self.claims:
            self.claims.remove(claim)

    def promise(self, user: str, expires: float) -> Claim:
        """A promise that was given before (by an earlier run of the guard) holds."""
        claim = Claim(user, expires)
        self.claims.append(claim)
        return claim

    def holds(self, user: str, now: float) -> bool:
        """Whether this user holds a seat."""
        return any(seat.user == user and seat.seated for seat in self.sessions.values()) or any(
            claim.user == user for claim in self._live(now)
        )

    def holders(self, now: float) -> set[str]:
        """All users who hold a seat."""
        seated = {seat.user for seat in self.sessions.values() if seat.seated}
        return seated.union(claim.user for claim in self._live(now) if claim.user is not None)

    def arrive(
        self, at: Session, user: str, identity: str, cap: int | None, now: float, *, joined: float = math.inf
    ) -> bool:
        """Somebody is in the call. Idempotent.

        :param cap: seats there are; ``None`` seats whoever comes.
        :param joined: when they came, at the latest. What they were promised after that is not what they came for:
            news can be late, and this an old session that has ended since.
        :return: whether they sit on a seat; if not, they came in past the cap (an old token, another issuer).
        """
        self.touched = now
        if at in self.gone:
            return True
        seat = self.sessions.get(at)
        if seat is None:
            seated = cap is None or self.holds(user, now) or self._free_besides(user, cap, now)
            seat = self.sessions[at] = Seating(user, identity, now, seated)
            self.claims = [
                claim
                for claim in self.claims
                if claim.user != user or claim.in_flight or joined < claim.issued_at < math.inf
            ]
        return seat.seated

    def leave(self, at: Session, now: float, *, back_by: float | None = None) -> None:
        """A session ended. What ended once never comes back: a late message of an old session
        says nothing about the new one.

        Their user may be there with a further device that we have not heard of yet: the seat stays theirs until
        somebody has looked, as with a promise that ends now.

        :param back_by: until when the seat is kept for a new session that is known to be on its way.
        """
        self.touched = now
        self.gone[at] = now
        seat = self.sessions.pop(at, None)
        if seat is not None and seat.seated and not self.holds(seat.user, now):
            self.claims.append(Claim(seat.user, expires=now if back_by is None else back_by))

    def forget_gone(self, now: float) -> None:
        """Of who left long ago no late news comes any more."""
        self.gone = {at: when for at, when in self.gone.items() if when > now - GONE_MEMORY}

    def observe(
        self,
        alias: str,
        present: Iterable[tuple[str, str, str]],
        cap: int | None,
        since: float,
        now: float,
        newcomers: frozenset[str] = frozenset(),
    ) -> None:
        """A complete look at who is in one SFU room.

        At the first look whoever is there was there before we knew the room, and stays.

        :param present: sid, identity and user of each participant that counts.
        :param since: when the look began; what we heard later than that is not contradicted by it.
        :param newcomers: sids of whom we know that they came just now, also at the first look.
        """
        if since < self.observed.get(alias, -math.inf):
            return  # overtaken by a later look: it would bring back who has left since
        first = alias not in self.observed
        present = sorted(present, key=lambda who: who[0] in newcomers)  # who was there before sits down first
        there, identities = set(), set()
        for sid, identity, user in present:
            at = Session(alias, sid)
            if self.gone.get(at, math.inf) < since:
                del self.gone[at]  # the SFU says that it is there, and was asked later
            there.add(at)
            identities.add((alias, identity))
            self.arrive(at, user, identity, None if first and sid not in newcomers else cap, now, joined=since)
        for at, seat in list(self.sessions.items()):
            if at.alias == alias and at not in there and seat.since < since:
                del self.sessions[at]
        self.observed[alias] = since
        self.forget_gone(now)
        horizon = min(now, self.observed_since(self.observed))
        self.claims = [
            claim
            for claim in self.claims
            # who is there under a token of before the look has nothing left to arrive for
            if claim.expires >= horizon and not (claim.issued_to in identities and claim.issued_at <= since)
        ]
        self.touched = now

    def observed_since(self, aliases: Iterable[str]) -> float:
        """The oldest of the last looks at these SFU rooms; minus infinity when one was never looked at."""
        return min((self.observed.get(alias, -math.inf) for alias in aliases), default=-math.inf)

    def doubted_since(self, now: float) -> float:
        """Since when a look has been owed: the latest end of a claim that counts only because nobody has looked
        since; minus infinity when none is."""
        ended = (claim.expires for claim in self._live(now) if claim.expires <= now)
        return max(ended, default=-math.inf)

    def overflow(self, cap: int | None, now: float) -> list[Session]:
        """Who is to be put out: sessions without a seat in a room that is certainly full.

        Whoever can be given a seat by now gets it. While it takes unanswered requests to fill the room, or promises
        that have ended since the last look, nobody is put out, for those may come to nothing.
        """
        out = []
        promised = {claim.user for claim in self.claims if not claim.in_flight and claim.expires > now}
        for at, seat in self.sessions.items():
            if seat.seated:
                continue
            if cap is None or self.holds(seat.user, now) or self._free_besides(seat.user, cap, now):
                seat.seated = True
            elif len(promised.union(seat.user for seat in self.sessions.values() if seat.seated)) >= cap:
                out.append(at)
        return out

    def seat_all(self) -> None:
        """Whoever is in has a seat (``GUARD_OVERFLOW=allow``)."""
        for seat in self.sessions.values():
            seat.seated = True

    def users(self) -> set[str]:
        """The distinct users in the call."""
        return {seat.user for seat in self.sessions.values()}

    def awaited(self, now: float) -> set[str]:
        """The users who were given a token and have not arrived."""
        return {claim.user for claim in self._live(now) if claim.user and not claim.in_flight}

    def held(self, now: float) -> int:
        """How many seats are held, unanswered requests included."""
        claiming = [claim.user for claim in self._live(now)]
        named = {*self.users(), *claiming} - {None}
        return len(named) + claiming.count(None)

    def idle(self, now: float) -> bool:
        """Whether nobody is in the call and nobody awaited."""
        return not self.sessions and not self._live(now)

    def _live(self, now: float) -> list[Claim]:
        # A claim that ended since the last look counts until the next one: its user may have arrived meanwhile.
        horizon = min(now, self.observed_since(self.observed))
        return [claim for claim in self.claims if claim.expires >= horizon]

    def _free_besides(self, user: str, cap: int, now: float) -> bool:
        unnamed = sum(1 for claim in self._live(now) if claim.user is None)
        return len(self.holders(now) - {user}) + unnamed < cap
