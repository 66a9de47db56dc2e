# SPDX-License-Identifier: Apache-2.0
"""What a guard notes of the answers to its steps, so that it need not ask again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from attrs import define, evolve, field, frozen
from twisted.internet.interfaces import IReactorTime

ROOMS_NOTED = 20_000
FULL_NOTED = 2_000
FULL_FOR = 1.0
"""Seconds for which the questions that follow a refusal are answered by what the refusing step found."""


@frozen
class Listed:
    """What is known about a room's SFU rooms.

    :ivar since: when they were listed, on the server's clock.
    :ivar aliases: those in which somebody holds a seat.
    :ivar told: when Redis said so, on the guard's clock.
    :ivar version: of the holds. :ivar news: the number of the last change of who is an occupant.
    """

    since: dict[str, float]
    aliases: tuple[str, ...]
    told: float
    version: str = ""
    news: str = ""


@frozen
class Full:
    """What the last step found in a room that was full; all that is asked before somebody is refused.

    :ivar at: on the guard's clock. :ivar user: who found no seat, and so owns none.
    :ivar required_since: see `SeatBook.listing_required_since`; on the server's clock.
    :ivar has_strangers: whether somebody is in the call of whom no Matrix user is known.
    """

    at: float
    user: str
    required_since: float | None
    has_strangers: bool


@frozen
class Settled:
    """What became of the last listing of an SFU room that this guard applied as a whole.

    :ivar listing: its number.
    :ivar version: of the room's holds, if the listing told nothing new; "" if it did, or while there is no answer.
    """

    listing: int
    version: str = ""


@define(eq=False)
class RoomNotes:
    """Notes about the rooms that steps were made on last."""

    _clock: IReactorTime
    _listed: OrderedDict[str, Listed] = field(init=False, factory=OrderedDict)
    _full: OrderedDict[str, Full] = field(init=False, factory=OrderedDict)
    _settled: OrderedDict[tuple[str, str], Settled] = field(init=False, factory=OrderedDict)
    _listings: Iterator[int] = field(init=False, factory=count)

    def forget_times(self) -> None:
        """The server may be another one, with another clock."""
        self._listed.clear()

    def forget(self) -> None:
        """The data set is another one."""
        self._listed.clear()
        self._full.clear()
        self._settled.clear()

    # -- listings ----------------------------------------------------------------------------------------

    def note(self, room_id: str, listed: Listed) -> None:
        """A step told this. The room may not be full any more."""
        self._full.pop(room_id, None)
        self._put(room_id, listed)

    def listed(self, room_id: str) -> Listed | None:
        """What the last step on a room told. Listings may have been applied since."""
        return self._listed.get(room_id)

    def listing(self, room_id: str, alias: str, since: float) -> None:
        """The next step notes that an SFU room was listed. :param since: on the server's clock."""
        known = self._listed.get(room_id) or Listed({}, (), 0.0)
        aliases = known.aliases if alias in known.aliases else (*known.aliases, alias)
        self._put(room_id, evolve(known, since={**known.since, alias: since}, aliases=aliases))

    def settled(self, room_id: str, alias: str) -> str | None:
        """The version of a room's holds at which this guard's last listing of an SFU room told nothing new; ``None`` if
        it did, or if the holds have changed since as far as this guard knows."""
        known, settled = self._listed.get(room_id), self._settled.get((room_id, alias))
        if known is None or settled is None or not settled.version:
            return None
        return settled.version if known.version == settled.version else None

    def applying(self, room_id: str, alias: str) -> int:
        """A listing of an SFU room is about to be applied. :return: its number, for `note_settled`."""
        number = next(self._listings)
        self._settled[room_id, alias] = Settled(number)
        self._settled.move_to_end((room_id, alias))
        _shorten(self._settled, ROOMS_NOTED)
        return number

    def note_settled(self, room_id: str, alias: str, listing: int, version: str) -> None:
        """A listing was applied. Says nothing if a later one was to be applied since: that may have failed.

        :param version: of the holds; "" if it told anything new.
        """
        settled = self._settled.get((room_id, alias))
        if settled is not None and settled.listing == listing:
            self._settled[room_id, alias] = Settled(listing, version)

    def forget_settled(self) -> None:
        """The last listings were applied to another book."""
        self._settled.clear()

    def not_settled(self, room_id: str, alias: str) -> None:
        """The holds have changed since the last listing."""
        self._settled.pop((room_id, alias), None)

    # -- full rooms --------------------------------------------------------------------------------------

    def note_full(self, room_id: str, user: str, told: Sequence[Any]) -> None:
        """:param told: what the operation ``take`` tells about a room that is full."""
        required, has_strangers = told
        at = float(required) if required else None
        self._full[room_id] = Full(self._clock.seconds(), user, at, bool(has_strangers))
        self._full.move_to_end(room_id)
        _shorten(self._full, FULL_NOTED)

    def full(self, room_id: str) -> Full | None:
        """What the last step on a room told if it found the room full a moment ago."""
        full = self._full.get(room_id)
        return full if full is not None and self._clock.seconds() - full.at <= FULL_FOR else None

    def _put(self, room_id: str, listed: Listed) -> None:
        self._listed[room_id] = listed
        self._listed.move_to_end(room_id)
        _shorten(self._listed, ROOMS_NOTED)


def _shorten(notes: OrderedDict[Any, Any], most: int) -> None:
    while len(notes) > most:
        notes.popitem(last=False)
