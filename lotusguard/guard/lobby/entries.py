# SPDX-License-Identifier: Apache-2.0
"""Who waits to join which call, what moderators decide, and the requests that are held until then."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from attrs import define, field, frozen
from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.interfaces import IReactorTime

from lotusguard.clients.waiting import Deadline, fire_all
from lotusguard.guard.lobby.book import LobbyEntries
from lotusguard.guard.lobby.colours import colour_of
from lotusguard.guard.lobby.log import LobbyLog
from lotusguard.metrics import Metrics
from lotusguard.rules.lobby import LobbyEntry, LobbyEvent, LobbyState
from lotusguard.rules.lobby_book import Change
from lotusguard.rules.refusals import JoinRefused, Refusal

RETRY = 5.0
"""Seconds after which there may be fewer people waiting."""
POLL_AGAIN = 1.0
"""Seconds after which a client that polls asks again."""


@frozen
class Waiting:
    """Somebody who waits. :ivar since: seconds since the epoch."""

    room_id: str
    user: str
    since: float

    @property
    def color(self) -> str:
        """The user's colour in CSS."""
        return colour_of(self.user)


class LobbyStopped(Exception):
    """The guard stops. The client is to ask again, and reaches the next one."""


@define(eq=False)
class _Waiter:
    """:ivar is_silent: whether its client has been sent nothing yet."""

    woken: Deferred[LobbyState | None]
    is_silent: Callable[[], bool]


@define(eq=False)
class Lobby:
    """Holds requests until the entry of their user is decided, whichever guard is told the decision.

    :param wall: seconds since the epoch.
    :param longest_wait: seconds that anybody may wait.
    :ivar listeners: called with every change of an entry.
    """

    _entries: LobbyEntries
    _clock: IReactorTime
    _wall: Callable[[], float]
    _metrics: Metrics
    _longest_wait: float
    listeners: list[Callable[[Change], None]] = field(factory=list, init=False)
    _log: LobbyLog = field(init=False)
    _waiters: dict[tuple[str, str], list[_Waiter]] = field(factory=dict, init=False)
    _stopped: bool = field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self._log = LobbyLog(self._metrics)
        self._entries.learnt = self._learn
        book = self._entries.book
        self._metrics.lobby_waiting.set_function(lambda: book.waiting_in_all)

    # -- joins -------------------------------------------------------------------------------------------

    def state_of(self, room_id: str, user: str) -> LobbyState | None:
        """What this guard knows of a user in a room."""
        return self._entries.state_of(room_id, user)

    async def read(self, room_id: str, user: str) -> LobbyState | None:
        """What all guards know of a user in a room: before somebody is refused or removed because of it."""
        state = await self._entries.read(room_id, user)
        self._tell()
        return state

    async def ask(self, room_id: str, user: str, *, local: bool = False) -> LobbyEntry:
        """Enter the lobby, or find out what was decided.

        :param local: whether the user is known to be one of our own homeserver's.
        :raises JoinRefused: the user may not wait.
        """
        answer = await self._entries.happen(LobbyEvent.ASK, room_id, user, local=local)
        self._tell()
        if answer.full or answer.entry is None:
            raise JoinRefused(Refusal.LOBBY_FULL, RETRY)
        return answer.entry

    async def wait(self, room_id: str, user: str, until: float, is_silent: Callable[[], bool]) -> LobbyState | None:
        """Hold a request of somebody who is waiting.

        :param until: when to give up, at the latest.
        :return: the entry's next state; ``None`` if it has ended: then the join is decided anew.
        :raises LobbyStopped: the guard stops.
        """
        entry, key = self._entries.book.get(room_id, user), (room_id, user)
        if entry is None or self.state_of(room_id, user) is not LobbyState.WAITING:
            return self.state_of(room_id, user)
        if self._stopped and is_silent():
            raise LobbyStopped
        waiter = _Waiter(Deferred(), is_silent)
        self._waiters.setdefault(key, []).append(waiter)
        entry.held += 1
        try:
            deadline = Deadline(self._clock, min(until, entry.began + self._longest_wait))
            return await deadline.wait(waiter.woken)
        except TimeoutError:
            answer = await self._entries.happen(LobbyEvent.TIME_OUT, room_id, user)
            self._tell()
            return answer.entry.state if answer.entry is not None else LobbyState.UNANSWERED
        finally:
            entry.held -= 1
            await self._stop_holding(key, waiter)

    async def _stop_holding(self, key: tuple[str, str], waiter: _Waiter) -> None:
        waiters = self._waiters.get(key, [])
        if waiter in waiters:
            waiters.remove(waiter)
        if not waiters:
            self._waiters.pop(key, None)
        if not self._stopped and self.state_of(*key) is LobbyState.WAITING:
            await self._entries.let_go(*key)

    async def let_in(self, room_id: str, user: str) -> bool:
        """The user does not have to wait. :return: ``False`` if a moderator removed them."""
        answer = await self._entries.happen(LobbyEvent.LET_IN, room_id, user)
        self._tell()
        return answer.applied

    # -- moderators --------------------------------------------------------------------------------------

    async def decide(self, room_id: str, user: str, *, admit: bool, by: str) -> bool:
        """A moderator decides. The first decision holds.

        :return: ``False`` if there is nothing to decide: the user does not wait, or may enter already.
        """
        answer = await self._entries.happen(LobbyEvent.ADMIT if admit else LobbyEvent.DENY, room_id, user)
        self._tell(by)
        return answer.applied

    async def remove(self, room_id: str, user: str, by: str) -> None:
        """A moderator removes the user, who is refused for ten minutes or until a moderator admits them."""
        await self._entries.happen(LobbyEvent.REMOVE, room_id, user)
        self._tell(by)

    def waiting(self) -> Sequence[Waiting]:
        """Everybody who waits, the longest waiting first."""
        ahead = self._wall() - self._clock.seconds()
        found = [
            Waiting(room_id, entry.user, entry.began + ahead)
            for room_id, entry in self._entries.book.waiting()
            if self._waits(room_id, entry.user)
        ]
        return sorted(found, key=lambda one: one.since)

    # -- what happens to rooms and members ---------------------------------------------------------------

    async def left_room(self, room_id: str, user: str) -> None:
        """The user is not a member of the room any more."""
        if self._entries.book.get(room_id, user) is not None:
            await self._entries.happen(LobbyEvent.LEAVE, room_id, user)
            self._tell()

    async def switched_off(self, room_id: str) -> None:
        """The lobby is off: everybody who waits comes in, seats permitting."""
        await self._happen_in_room(room_id, LobbyEvent.SWITCH_OFF)

    async def call_ended(self, room_id: str) -> None:
        """People who were accepted wait again before the next call."""
        await self._happen_in_room(room_id, LobbyEvent.CALL_ENDED)

    def waiting_in(self, room_id: str) -> list[str]:
        """Users who wait in one room."""
        return [user for user in self._entries.book.waiting_in(room_id) if self._waits(room_id, user)]

    def has_entries(self, room_id: str) -> bool:
        """Whether anybody waits in this room, or was decided about."""
        return bool(self._entries.book.entries_in(room_id))

    def has_removed(self, room_id: str) -> bool:
        """Whether moderators removed anybody from this room's call a short while ago."""
        return self._entries.book.has_removed(room_id)

    def rooms_with(self, state: LobbyState) -> list[str]:
        return self._entries.book.rooms_with(state)

    # -- notices -----------------------------------------------------------------------------------------

    def noticed(self) -> list[tuple[str, LobbyEntry]]:
        """Entries with a notice, with their rooms."""
        return [(room_id, entry) for room_id, entry in self._entries.book.entries() if entry.notice]

    def without_notice(self) -> list[tuple[str, LobbyEntry]]:
        """Waiting entries without a notice, with their rooms."""
        return [
            (room_id, entry)
            for room_id, entry in self._entries.book.waiting()
            if not entry.notice and self._waits(room_id, entry.user)
        ]

    async def set_notice(self, room_id: str, entry: LobbyEntry, event_id: str) -> None:
        """A notice asks the room's moderators about this entry."""
        await self._entries.set_notice(room_id, entry, event_id)
        self._tell()

    async def forget_notice(self, room_id: str, user: str, event_id: str) -> None:
        """A notice was redacted: after a restart it need not be redacted again."""
        entry = self._entries.book.get(room_id, user)
        if entry is not None and entry.notice == event_id:
            await self.set_notice(room_id, entry, "")

    # -- upkeep ------------------------------------------------------------------------------------------

    async def pass_time(self) -> None:
        """Do what time does: to be called every second."""
        await self._entries.pass_time(list(self._waiters))
        self._tell()

    def stop(self) -> None:
        """Give up requests to which nothing was sent yet. Their entries are kept for the next guard."""
        self._stopped = True
        self._entries.stop()
        for waiters in list(self._waiters.values()):
            for waiter in list(waiters):
                if waiter.is_silent() and not waiter.woken.called:
                    waiter.woken.errback(LobbyStopped())

    # -- how it is done ----------------------------------------------------------------------------------

    def _waits(self, room_id: str, user: str) -> bool:
        return self.state_of(room_id, user) is LobbyState.WAITING

    async def _happen_in_room(self, room_id: str, event: LobbyEvent) -> None:
        if any(event in entry.rules.moves for entry in self._entries.book.entries_in(room_id)):
            await self._entries.happen_in_room(event, room_id)
            self._tell()

    def _tell(self, by: str = "") -> None:
        """Write, log and count what this guard has changed."""
        changes = self._entries.book.take_changes()
        for change in changes:
            self._entries.keep(change)
            self._log.tell(change, by)
        self._learn(changes)

    def _learn(self, changes: Sequence[Change]) -> None:
        """Wake those who waited for what has changed, here or at another guard."""
        for change in changes:
            for listener in self.listeners:
                listener(change)
            if change.after is not LobbyState.WAITING:
                woken = [waiter.woken for waiter in self._waiters.pop((change.room_id, change.entry.user), ())]
                fire_all(woken, change.after)
