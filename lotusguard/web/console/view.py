# SPDX-License-Identifier: Apache-2.0
"""What the console shows, gathered from the guard's parts as plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any, Generic, TypeVar

from attrs import define, field, frozen
from twisted.internet.interfaces import IReactorTime

from lotusguard.clients.waiting import Deadline
from lotusguard.guard.health import Health
from lotusguard.guard.joins.decisions import Decision, DecisionLog
from lotusguard.guard.joins.history import Minute
from lotusguard.guard.lobby import Waiting
from lotusguard.guard.rooms.policies import Policies
from lotusguard.guard.seats.book import Presence, RoomSnapshot, SeatBook
from lotusguard.web.console.names import RoomNames

DECISIONS_SHOWN = 20
ROOMS_SHOWN = 25
"""Calls on the front page, the largest first; other pages have all of them."""
PER_PAGE = 200
"""Rows of a table on one page. One takes up to a tenth of a millisecond."""
WAITING_SHOWN = 100
"""People in lobbies on the front page, those who have waited longest."""
LOOKUP_TIME = 1.0
"""Seconds in which policies are looked up that only other guards know."""
REPORT_AGE = 10.0
"""Seconds for which a health report is shown again: making one asks every dependency."""


T = TypeVar("T")


@frozen
class Page(Generic[T]):
    """A part of a long table: making all of its rows at once would delay joins.

    :ivar number: from 1 to `pages`. :ivar total: items on all pages.
    """

    items: Sequence[T]
    number: int
    pages: int
    total: int

    @classmethod
    def of(cls, items: Sequence[T], number: int) -> Page[T]:
        """The page of this number, or the last one if there are fewer."""
        pages = max(1, ceil(len(items) / PER_PAGE))
        number = min(number, pages)
        return cls(items[(number - 1) * PER_PAGE : number * PER_PAGE], number, pages, len(items))


@frozen
class RoomRow:
    """One live call. :ivar name: the room's, "" if it is not known. :ivar limit: its seats, ``None`` for no limit."""

    room_id: str
    name: str
    seats_taken: int
    limit: int | None
    present: Sequence[Presence]
    awaited: Sequence[str]


@frozen
class Overview:
    """Everything on the front page. :ivar calls: how many live calls there are."""

    report: dict[str, Any]
    calls: int
    rooms: Sequence[RoomRow]
    waiting: Sequence[Waiting]
    waiting_in_all: int
    decisions: Sequence[Decision]
    minutes: Sequence[Minute]
    began: Callable[[float], float]
    """turns a time on the guard's clock into seconds since the epoch"""
    names: Mapping[str, str]
    """names of rooms in which somebody waits, or about which something was decided"""


@define(eq=False)
class ConsoleView:
    """Gathers what the console shows."""

    _health: Health
    _seats: SeatBook
    _policies: Policies
    _decision_log: DecisionLog
    _clock: IReactorTime
    _wall: Callable[[], float]
    _waiting: Callable[[], Sequence[Waiting]]
    names: RoomNames
    _report: dict[str, Any] = field(factory=dict, init=False)
    _reported_at: float | None = field(default=None, init=False)

    async def overview(self) -> Overview:
        now = self._clock.seconds()
        if self._reported_at is None or now - self._reported_at >= REPORT_AGE:
            self._report = await self._health.report()
            self._reported_at = self._clock.seconds()
        snapshots = await self._sorted()
        rooms = await self._rows(snapshots[:ROOMS_SHOWN])
        decisions = list(self._decision_log.decisions)[-DECISIONS_SHOWN:][::-1]
        all_waiting = self._waiting()
        waiting = all_waiting[:WAITING_SHOWN]
        named = {*(one.room_id for one in waiting), *(decision.room_id or "" for decision in decisions)} - {""}
        return Overview(
            self._report, len(snapshots), rooms, waiting, len(all_waiting), decisions,
            self._decision_log.history.last_hour(), self._since_epoch,
            {room_id: self.names.of(room_id) for room_id in named},
        )  # fmt: skip

    def _since_epoch(self, at: float) -> float:
        return self._wall() - (self._clock.seconds() - at)

    async def rooms(self, number: int) -> Page[RoomRow]:
        """A page of all live calls."""
        page = Page.of(await self._sorted(), number)
        return Page(await self._rows(page.items), page.number, page.pages, page.total)

    async def _sorted(self) -> list[RoomSnapshot]:
        """The largest calls first."""
        return sorted(await self._seats.snapshots(), key=lambda snapshot: (-len(snapshot.present), snapshot.room_id))

    async def room(self, room_id: str) -> RoomRow | None:
        """One call; ``None`` if there is none."""
        snapshot = await self._seats.snapshot(room_id)
        return (await self._rows([snapshot]))[0] if snapshot is not None else None

    def allowed(self, room_id: str, user: str) -> list[str]:
        """What a user may publish in a room, by the names that people know."""
        return sorted(
            source.claim.replace("_", " ") for source in self._policies.last_known(room_id).allowed_sources(user)
        )

    async def _rows(self, snapshots: Sequence[RoomSnapshot]) -> list[RoomRow]:
        """Calls with their policies. Other guards may know rooms that this one never read."""
        deadline = Deadline.after(self._clock, LOOKUP_TIME)
        await self._policies.look_up_unknown([snapshot.room_id for snapshot in snapshots], deadline)
        return [self._row(snapshot) for snapshot in snapshots]

    def _row(self, snapshot: RoomSnapshot) -> RoomRow:
        policy = self._policies.last_known(snapshot.room_id)
        return RoomRow(
            snapshot.room_id, self.names.of(snapshot.room_id), snapshot.seats_taken, policy.max_users,
            snapshot.present, snapshot.awaited,
        )  # fmt: skip
