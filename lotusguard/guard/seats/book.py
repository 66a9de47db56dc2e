# SPDX-License-Identifier: Apache-2.0
"""The seats of all rooms, behind one interface: only IDs and values cross it, because several guards may share a book.

Whatever looks for a free seat and takes it does both in one step.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Protocol

from attrs import frozen

from lotusguard.rules.refusals import Refusal
from lotusguard.rules.seats import Arrival

KEPT_FOR = 120.0
"""Seconds for which `SeatBook.kept_aliases` names an SFU room in which nobody is known to be any more. Clients try to
reconnect for about 60 s, and when an earlier run ended is known to the minute."""


@frozen
class Issued:
    """A token that was issued for a seat.

    :ivar alias: the SFU room. :ivar identity: the participant's identity in it. Both are "" if the token is unreadable.
    """

    alias: str
    identity: str
    device: str = ""


@frozen
class OverLimit:
    """A participant without a seat in a room that is certainly full."""

    alias: str
    sid: str
    identity: str
    user: str


@frozen
class Presence:
    """One session in a call. :ivar state: a value of `lotusguard.rules.seats.HoldState`."""

    alias: str
    sid: str
    identity: str
    user: str
    state: str


@frozen
class RoomSnapshot:
    """What is known of one room's seats, for operators."""

    room_id: str
    seats_taken: int
    awaited: Sequence[str]
    present: Sequence[Presence]


class SeatBook(Protocol):
    """Who holds the seats of which Matrix room. Times are seconds on the guard's monotonic clock.

    :ivar unshared: whether other guards have seats that this book does not know of now, although it should.
    :ivar is_remote: whether a question costs a round trip.
    """

    @property
    def unshared(self) -> bool: ...

    @property
    def is_remote(self) -> bool: ...

    async def take(
        self, room_id: str, user: str, limit: int | None, alias: str, *, exempt: bool = False, new_slot: bool = False
    ) -> str | Refusal:
        """Take a seat for a request in flight.

        :param limit: the room's seats; ``None`` for no limit.
        :param alias: the SFU room that the user is about to enter.
        :param exempt: the user may enter past the limit, and takes no seat from others.
        :param new_slot: the slot counts towards the most that a room may have.
        :return: the hold's ID, or `Refusal.FULL`, or `Refusal.SEAT_PENDING` if only requests in flight fill the room.
        """

    async def wait_for_seat(self, room_id: str, user: str, *, again: bool) -> None:
        """Wait until a seat may be free, because a request in flight has ended.

        The longest waiting is woken first, alone but for those who own a seat by now.

        :param again: there was no seat after all; wait at the head of the queue.
        """

    async def wake_all(self, room_id: str) -> None:
        """Let everybody who waits look for a seat again."""

    async def issue(self, room_id: str, hold_id: str, token: Issued, *, durable: bool) -> None:
        """The token of a hold was issued. The seat is kept until its user arrives or the time to arrive is over.

        :param durable: return only when it is on disk (or the disk is too slow).
        """

    async def issue_without_seat(self, room_id: str, user: str, token: Issued) -> None:
        """A token was issued although nobody could tell whether a seat was free."""

    async def release(self, room_id: str, hold_id: str) -> None:
        """No token was issued for this hold. Does nothing if one was."""

    async def owns_seat(self, room_id: str, user: str) -> bool:
        """Whether this user is let in again without looking for a seat."""

    async def exempt(self, room_id: str, user: str) -> None:
        """This user takes no seat from now on, for as long as they are in the call or hold a seat."""

    async def recognise(self, room_id: str, alias: str, identities: Collection[str], user: str) -> None:
        """Sessions under these identities belong to this user."""

    async def arrive(self, room_id: str, alias: str, who: Arrival, limit: int | None) -> None:
        """Somebody is in the call."""

    async def leave(
        self, room_id: str, alias: str, sid: str, identity: str, left_by: float, *, by_choice: bool
    ) -> None:
        """A session ended. :param left_by: when, at the latest."""

    async def apply_listing(
        self, room_id: str, alias: str, present: Collection[Arrival], limit: int | None, since: float
    ) -> None:
        """A complete listing of one SFU room, begun at ``since``."""

    async def listed_again(
        self, room_id: str, alias: str, limit: int | None, since: float, apply: Callable[[], Awaitable[None]]
    ) -> bool:
        """A complete listing, begun at ``since``, that shows the same as the last one of its SFU room that was applied.

        :param apply: applies it like any other. It is called if it turns out later that another guard has changed
            something: before the next question about the room is answered.
        :return: whether it tells nothing new. If not, it has to be applied.
        """

    async def overflow(self, room_id: str, limit: int | None) -> Sequence[OverLimit]:
        """Participants to be removed."""

    async def seat_everybody(self, room_id: str) -> None:
        """Everybody in the call gets a seat, limit or not."""

    async def aliases(self, room_id: str) -> Collection[str]:
        """The SFU rooms in which somebody holds a seat."""

    async def kept_aliases(self) -> Collection[str]:
        """The SFU rooms of all Matrix rooms in which somebody is or has a token, as far as the book knows, or was a
        short while ago. What an earlier run of the guard knew counts."""

    async def listed_since(self, room_id: str, aliases: Collection[str]) -> float | None:
        """When the oldest of the last listings of these SFU rooms began; ``None`` if one was never listed."""

    async def listing_required_since(self, room_id: str) -> float | None:
        """Latest end of a hold not yet confirmed by a listing; ``None`` if none."""

    async def occupants(self, room_id: str) -> Collection[str]:
        """Users who are in the call, have a token in time, or have a request in flight that holds a seat."""

    async def is_started(self, room_id: str) -> bool:
        """Whether the call was started by somebody entitled to, and has not ended since."""

    async def start(self, room_id: str) -> None:
        """Somebody who may start the call is in it or owns a seat."""

    async def snapshot(self, room_id: str) -> RoomSnapshot | None:
        """One room; ``None`` if nobody is there or owns a seat."""

    async def snapshots(self) -> Sequence[RoomSnapshot]:
        """All rooms in which somebody is or owns a seat."""
