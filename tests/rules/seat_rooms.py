# SPDX-License-Identifier: Apache-2.0
"""One room for the tests of the seat rules, and short ways to make things happen in it.

The fixture `rules` decides where the rules run.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

from lotusguard.rules.refusals import Refusal
from lotusguard.rules.room_seats import RoomSeats
from lotusguard.rules.seats import Arrival

TTL = 30.0
ALIAS = "alias"
_ids = count(1)
MakeSeats = Callable[[float], Any]
make: MakeSeats = RoomSeats
"""Makes the seats of a room from the time at which it was last known to have no limit. The fixture sets it."""


def unlisted_room(unlimited_at: float) -> RoomSeats:
    """A room that was never listed. :param unlimited_at: when it was last known to have no limit."""
    seats: RoomSeats = make(unlimited_at)
    return seats


def room() -> RoomSeats:
    """A room that was listed empty at 0, and has had a limit since -10."""
    seats = unlisted_room(-10.0)
    seats.apply_listing(ALIAS, [], 1, since=0.0, now=0.0)
    return seats


def take(seats: RoomSeats, user: str, limit: int | None, now: float = 0.0, *, exempt: bool = False) -> str:
    """Take a seat. :return: the hold's ID."""
    hold_id = f"hold{next(_ids)}"
    assert seats.take(hold_id, user, limit, ALIAS, now, exempt=exempt) is None
    return hold_id


def refused(seats: RoomSeats, user: str, limit: int, now: float = 0.0) -> Refusal | None:
    """Ask for a seat and give it back at once. :return: why there was none."""
    hold_id = f"hold{next(_ids)}"
    refusal = seats.take(hold_id, user, limit, ALIAS, now)
    seats.release(hold_id)
    return refusal


def issue(
    seats: RoomSeats, user: str, limit: int | None, now: float = 0.0, identity: str = "", device: str = "",
    alias: str = ALIAS,
) -> None:  # fmt: skip
    """Take a seat and be given a token."""
    assert seats.issue(take(seats, user, limit, now), alias, identity or user, now, TTL, device=device)


def enter(seats: RoomSeats, user: str, limit: int | None, now: float = 0.0, identity: str = "") -> None:
    """Take a seat, be given a token, and arrive."""
    issue(seats, user, limit, now, identity)
    arrive(seats, user, limit, now, identity)


def arrive(
    seats: RoomSeats, user: str, limit: int | None, now: float, identity: str = "", sid: str = "", alias: str = ALIAS
) -> None:
    identity = identity or user
    seats.arrive(alias, Arrival(sid or f"PA_{identity}", identity, user), limit, now)


def leave(seats: RoomSeats, identity: str, now: float, *, by_choice: bool = True, sid: str = "") -> None:
    seats.leave(ALIAS, sid or f"PA_{identity}", identity, now, now, by_choice=by_choice)


def listing(seats: RoomSeats, limit: int | None, now: float, *present: str, joined: float | None = None) -> None:
    """A listing that shows these users, each with the identity of their name."""
    who = [Arrival(f"PA_{user}", user, user, joined) for user in present]
    seats.apply_listing(ALIAS, who, limit, since=now, now=now)


def over(seats: RoomSeats, limit: int | None, now: float) -> list[str]:
    return [hold.user for hold in seats.overflow(limit, now)]
