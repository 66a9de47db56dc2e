# SPDX-License-Identifier: Apache-2.0
"""Who waits to join which call, what moderators decide, and the requests that are held until then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from secrets import token_hex

from attrs import define, field, frozen
from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.interfaces import IReactorTime

from lotusguard.clients.waiting import Deadline, fire_all
from lotusguard.guard.lobby.colours import colour_of
from lotusguard.guard.lobby.log import LobbyLog
from lotusguard.guard.seats.store import StateStore, StoredLobbyEntry
from lotusguard.metrics import Metrics
from lotusguard.rules.lobby import TABLE, LobbyEntry, LobbyEvent, LobbyState
from lotusguard.rules.lobby_book import Change, LobbyBook
from lotusguard.rules.refusals import JoinRefused, Refusal

RETRY = 5.0
"""Seconds after which there may be fewer people waiting."""
POLL_AGAIN = 1.0
"""Seconds after which a client that polls asks again."""
RESTARTED = 30.0
"""Seconds for which people who waited before a restart stay in the lobby without asking. Element Call asks a request
that was cut off again after 2, 4, 8 and 16 s."""


@frozen
class Waiting:
    """Somebody who waits. :ivar since: seconds since the epoch. :ivar color: in CSS."""

    room_id: str
    user: str
    since: float
    color: str


class LobbyStopped(Exception):
    """The guard stops. The client is to ask again, and reaches the next one."""


@define(eq=False)
class _Waiter:
    """:ivar is_silent: whether its client has been sent nothing yet."""

    woken: Deferred[LobbyState | None]
    is_silent: Callable[[], bool]


@define(eq=False)
class Lobby:
    """Keeps the lobby entries, on disk too, and holds requests until their entry is decided.

    :param wall: seconds since the epoch.
    :param longest_wait: seconds that anybody may wait.
    :ivar listeners: called with every change of an entry.
    """

    _store: StateStore | None
    _clock: IReactorTime
    _wall: Callable[[], float]
    _metrics: Metrics
    _longest_wait: float
    listeners: list[Callable[[Change], None]] = field(factory=list, init=False)
    _log: LobbyLog = field(init=False)
    _book: LobbyBook = field(init=False)
    _waiters: dict[tuple[str, str], list[_Waiter]] = field(factory=dict, init=False)
    _stopped: bool = field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self._log = LobbyLog(self._metrics)
        self._book = LobbyBook(self._longest_wait)
        self._metrics.lobby_waiting.set_function(lambda: self._book.waiting_in_all)

    def load(self) -> None:
        """Take over the entries of an earlier run."""
        now, wall = self._clock.seconds(), self._wall()
        for stored in self._store.lobby_entries() if self._store is not None else ():
            try:
                state = LobbyState(stored.state)
            except ValueError:
                continue
            left = min(stored.expires - wall, TABLE[state].lifetime)
            if state is LobbyState.WAITING:
                left = RESTARTED
            began = now - max(0.0, wall - stored.began)
            self._book.restore(
                stored.room_id,
                LobbyEntry(stored.id, stored.user, state, began, now + left, notice=stored.notice),
            )

    # -- joins -------------------------------------------------------------------------------------------

    def state_of(self, room_id: str, user: str) -> LobbyState | None:
        """What is known of a user in a room."""
        entry = self._book.find(room_id, user, self._clock.seconds())
        self._tell()
        return entry.state if entry is not None else None

    def ask(self, room_id: str, user: str) -> LobbyEntry:
        """Enter the lobby, or find out what was decided. :raises JoinRefused: the user may not wait."""
        answer = self._book.ask(room_id, user, token_hex(8), self._clock.seconds())
        self._tell()
        if answer is Refusal.LOBBY_FULL:
            raise JoinRefused(Refusal.LOBBY_FULL, RETRY)
        assert isinstance(answer, LobbyEntry)
        return answer

    async def wait(self, room_id: str, user: str, until: float, is_silent: Callable[[], bool]) -> LobbyState | None:
        """Hold a request of somebody who is waiting.

        :param until: when to give up, at the latest.
        :return: the entry's next state; ``None`` if it has ended: then the join is decided anew.
        :raises LobbyStopped: the guard stops.
        """
        entry = self._book.find(room_id, user, self._clock.seconds())
        if entry is None or entry.state is not LobbyState.WAITING:
            return entry.state if entry is not None else None
        if self._stopped and is_silent():
            raise LobbyStopped
        waiter = _Waiter(Deferred(), is_silent)
        self._waiters.setdefault((room_id, user), []).append(waiter)
        entry.held += 1
        try:
            deadline = Deadline(self._clock, min(until, entry.began + self._longest_wait))
            return await deadline.wait(waiter.woken)
        except TimeoutError:
            self._apply(room_id, user, LobbyEvent.TIME_OUT)
            return LobbyState.UNANSWERED
        finally:
            entry.held -= 1
            if entry.state is LobbyState.WAITING:
                entry.expires = self._clock.seconds() + entry.rules.lifetime
            waiters = self._waiters.get((room_id, user), [])
            if waiter in waiters:
                waiters.remove(waiter)
            if not waiters:
                self._waiters.pop((room_id, user), None)

    def let_in(self, room_id: str, user: str) -> bool:
        """The user does not have to wait. :return: ``False`` if a moderator removed them."""
        let_in = self._book.let_in(room_id, user, token_hex(8), self._clock.seconds())
        self._tell()
        return let_in

    # -- moderators --------------------------------------------------------------------------------------

    def decide(self, room_id: str, user: str, *, admit: bool, by: str) -> bool:
        """A moderator decides. The first decision holds.

        :return: ``False`` if there is nothing to decide: the user does not wait, or may enter already.
        """
        event = LobbyEvent.ADMIT if admit else LobbyEvent.DENY
        decided = self._book.decide(room_id, user, event, self._clock.seconds())
        self._tell(by)
        return decided

    def remove(self, room_id: str, user: str, by: str) -> None:
        """A moderator removes the user, who is refused for ten minutes or until a moderator admits them."""
        self._book.remove(room_id, user, token_hex(8), self._clock.seconds())
        self._tell(by)

    def waiting(self) -> Sequence[Waiting]:
        """Everybody who waits, the longest waiting first."""
        now, wall = self._clock.seconds(), self._wall()
        found = [
            Waiting(room_id, entry.user, wall - (now - entry.began), colour_of(entry.user))
            for room_id, entry in self._book.entries()
            if entry.state is LobbyState.WAITING
        ]
        return sorted(found, key=lambda one: one.since)

    # -- what happens to rooms and members ---------------------------------------------------------------

    def left_room(self, room_id: str, user: str) -> None:
        """The user is not a member of the room any more."""
        self._apply(room_id, user, LobbyEvent.LEAVE)

    def switched_off(self, room_id: str) -> None:
        """The lobby is off: everybody who waits comes in, seats permitting."""
        self._apply_to_room(room_id, LobbyEvent.SWITCH_OFF)

    def call_ended(self, room_id: str) -> None:
        """Whoever was accepted waits again before the next call."""
        self._apply_to_room(room_id, LobbyEvent.CALL_ENDED)

    def waiting_in(self, room_id: str) -> list[str]:
        """Users who wait in one room."""
        return self._book.waiting_in(room_id)

    def has_removed(self, room_id: str) -> bool:
        """Whether moderators removed anybody from this room's call a short while ago."""
        return self._book.has_removed(room_id)

    def rooms_with(self, state: LobbyState) -> list[str]:
        return self._book.rooms_with(state)

    # -- notices -----------------------------------------------------------------------------------------

    def noticed(self) -> list[tuple[str, LobbyEntry]]:
        """Entries with a notice, with their rooms."""
        return [(room_id, entry) for room_id, entry in self._book.entries() if entry.notice]

    def without_notice(self) -> list[tuple[str, LobbyEntry]]:
        """Waiting entries without a notice, with their rooms."""
        return [
            (room_id, entry)
            for room_id, entry in self._book.entries()
            if entry.state is LobbyState.WAITING and not entry.notice
        ]

    def set_notice(self, room_id: str, entry: LobbyEntry, event_id: str) -> None:
        """A notice asks the room's moderators about this entry."""
        entry.notice = event_id
        self._keep(room_id, entry)

    def forget_notice(self, room_id: str, user: str, event_id: str) -> None:
        """A notice was redacted: after a restart it need not be redacted again."""
        entry = self._book.find(room_id, user, self._clock.seconds())
        self._tell()
        if entry is not None and entry.notice == event_id:
            self.set_notice(room_id, entry, "")

    # -- upkeep ------------------------------------------------------------------------------------------

    def pass_time(self) -> None:
        """Do what time does: to be called every second."""
        if not self._stopped:
            self._book.pass_time(self._clock.seconds())
            self._tell()

    def stop(self) -> None:
        """Give up requests to which nothing was sent yet. Their entries stay on disk, for the next guard."""
        self._stopped = True
        for waiters in list(self._waiters.values()):
            for waiter in list(waiters):
                if waiter.is_silent() and not waiter.woken.called:
                    waiter.woken.errback(LobbyStopped())

    # -- how it is done ----------------------------------------------------------------------------------

    def _apply(self, room_id: str, user: str, event: LobbyEvent) -> None:
        self._book.apply(room_id, user, event, self._clock.seconds())
        self._tell()

    def _apply_to_room(self, room_id: str, event: LobbyEvent) -> None:
        self._book.apply_to_room(room_id, event, self._clock.seconds())
        self._tell()

    def _tell(self, by: str = "") -> None:
        """Write, log and count what has changed, and wake those who waited for it."""
        for change in self._book.take_changes():
            self._write(change)
            self._log.tell(change, by)
            for listener in self.listeners:
                listener(change)
            if change.after is not LobbyState.WAITING:
                woken = [waiter.woken for waiter in self._waiters.pop((change.room_id, change.entry.user), ())]
                fire_all(woken, change.after)

    def _write(self, change: Change) -> None:
        if change.after is not None:
            self._keep(change.room_id, change.entry)
        elif self._store is not None and not self._stopped:  # then the next guard takes the entry over
            self._store.drop_lobby_entry(change.room_id, change.entry.user)

    def _keep(self, room_id: str, entry: LobbyEntry) -> None:
        if self._store is None:
            return
        now, wall = self._clock.seconds(), self._wall()
        ends = entry.began + self._longest_wait if entry.state is LobbyState.WAITING else entry.expires
        self._store.put_lobby_entry(
            StoredLobbyEntry(
                room_id,
                entry.user,
                entry.id,
                entry.state.value,
                wall + entry.began - now,
                wall + ends - now,
                entry.notice,
            )
        )
