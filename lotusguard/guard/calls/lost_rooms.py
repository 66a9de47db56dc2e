# SPDX-License-Identifier: Apache-2.0
"""SFU rooms that LiveKit has lost. It keeps rooms in memory: after a crash it knows none, and where it creates none by
itself (``auto_create: false``), clients that try to reconnect are refused for ever. Element Call asks for no new token,
which would create the room."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable
from enum import Enum

from attrs import define, field
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.keyed_worker import KeyedWorker
from lotusguard.clients.livekit import LiveKitClient
from lotusguard.guard.seats.book import SeatBook

log = Logger()

AT_ONCE = 8
GIVEN_UP_AFTER = 60.0
"""Seconds for which clients try to reconnect, about."""
EMPTY_TIMEOUT = 60
"""Seconds after which LiveKit closes the room if nobody comes back."""
_BOOK = "seat book"
"""The only key of the worker that asks it."""


class Book(Enum):
    """Whether the next round asks the seat book for rooms that LiveKit may have lost."""

    TO_BE_ASKED = "to be asked"
    """The guard has just started and saw no call, or LiveKit was away."""
    ASKED = "asked"


@define(eq=False)
class LostRooms:
    """Creates rooms again whose participants are trying to reconnect.

    This guard saw them in use, or the seat book says so: if the guard restarts together with LiveKit, it has seen none.

    A room is also missing if somebody deleted it and another guard was told. So rooms that this guard saw are created
    only if LiveKit was away a short while ago. The book is asked only after that, and once after the start.

    :param is_ours: whether this guard, of several, reconciles an SFU room.
    :param acts: whether anything may be changed in LiveKit.
    """

    _livekit: LiveKitClient
    _seats: SeatBook
    _is_ours: Callable[[str], Awaitable[bool]]
    _clock: IReactorTime
    _acts: Callable[[], bool]
    _lost: dict[str, float] = field(factory=dict, init=False)
    _kept: dict[str, float] = field(factory=dict, init=False)
    _listed: Collection[str] = field(default=(), init=False)
    _not_created: set[str] = field(factory=set, init=False)
    _away_at: float | None = field(default=None, init=False)
    _book: Book = field(default=Book.TO_BE_ASKED, init=False)
    _asker: KeyedWorker[str] = field(init=False)
    _creator: KeyedWorker[str] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._asker = KeyedWorker(self._ask_book, 1, _not_asked)
        self._creator = KeyedWorker(self._create, AT_ONCE, _failed)

    async def wait_until_created(self) -> None:
        """Wait until the rooms are created. :raises DependencyFailed: LiveKit did not create one."""
        await self.idle()
        if self._not_created:
            raise DependencyFailed("livekit", "room_not_created")

    async def idle(self) -> None:
        """Wait until nothing is being created."""
        await self._asker.idle()
        await self._creator.idle()

    def was_away(self) -> None:
        """LiveKit does not answer, or answers again after that."""
        self._away_at, self._book = self._clock.seconds(), Book.TO_BE_ASKED

    def create_again(self, lost: Iterable[str], listed: Collection[str]) -> None:
        """Create what was lost, now or a short while ago. It is done in the background.

        :param lost: aliases of rooms that had participants, and that LiveKit does not list any more although it never
            said that they are finished.
        :param listed: those that LiveKit lists.
        """
        self._listed = listed
        self._not_created.clear()
        self._note(self._lost, lost)
        self._note(self._kept, ())
        self._create_all()
        if self._book is Book.TO_BE_ASKED:
            self._book = Book.ASKED
            self._asker.run(_BOOK)

    def stop(self) -> None:
        """Create nothing more."""
        self._asker.stop()
        self._creator.stop()

    async def _ask_book(self, _: str) -> None:
        self._note(self._kept, await self._seats.kept_aliases())
        if self._seats.unshared:  # this guard is alone, and what the others know counts too
            self._book = Book.TO_BE_ASKED
        self._create_all()

    def _note(self, missing: dict[str, float], aliases: Iterable[str]) -> None:
        """Add aliases to those that are missing; drop those that exist, and those that nobody waits for any more."""
        now = self._clock.seconds()
        for alias in aliases:
            missing.setdefault(alias, now)
        for alias, since in list(missing.items()):
            if alias in self._listed or now - since > GIVEN_UP_AFTER:
                del missing[alias]

    def _create_all(self) -> None:
        if not self._acts():
            return
        was_away = self._away_at is not None and self._clock.seconds() - self._away_at <= GIVEN_UP_AFTER
        for alias in {**self._kept, **self._lost} if was_away else self._kept:
            self._creator.run(alias, urgent=False)

    async def _create(self, alias: str) -> None:
        if alias not in self._lost and alias not in self._kept:
            return  # it exists by now
        if not await self._is_ours(alias):
            return  # asked again in the next round: that guard may have ended
        try:
            await self._livekit.create_room(alias, EMPTY_TIMEOUT)
        except DependencyFailed as failed:  # tried again in the next round
            log.warn(
                "LiveKit has lost {alias}, and it could not be created again: {reason}",
                alias=alias, reason=failed.reason, event_name="lost_room_not_created",
            )  # fmt: skip
            self._not_created.add(alias)
            return
        self._lost.pop(alias, None)
        self._kept.pop(alias, None)
        log.warn(
            "LiveKit does not have {alias}, where people were a moment ago: created again, so that they can reconnect",
            alias=alias, event_name="lost_room_created",
        )  # fmt: skip


def _failed(alias: str, failure: Failure) -> None:
    log.failure("{alias} could not be created again", failure, alias=alias)


def _not_asked(_: str, failure: Failure) -> None:
    log.failure("the seat book could not be asked for rooms that LiveKit may have lost", failure)
