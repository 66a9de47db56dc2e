# SPDX-License-Identifier: Apache-2.0
"""The lobby entries that several guards share: events happen in Redis, and every guard knows all entries.

Each change is published, so a guard answers questions from memory, and a request that is held at one guard ends when
the decision reaches another one. While Redis gives no answer, each guard goes on alone with what it knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from secrets import token_hex
from typing import Any

from attrs import define, field
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from lotusguard.clients.failures import DependencyFailed
from lotusguard.clients.redis.client import RedisClient, when_less_busy
from lotusguard.clients.redis.faults import NOT_CONNECTED
from lotusguard.clients.redis.link import ServerInfo
from lotusguard.clients.waiting import run_in_background
from lotusguard.guard.lobby.book import Held
from lotusguard.guard.lobby.redis.replica import Key, Replica
from lotusguard.guard.lobby.redis.script import CHANNEL
from lotusguard.rules.lobby import BEGINS, HELD_LEASE, TABLE, LobbyEntry, LobbyEvent, LobbyState
from lotusguard.rules.lobby_book import ENTRIES_KEPT, HELD_PER_USER, Answer, Change, LobbyBook

log = Logger()

REFRESH_AFTER = 600.0
"""Seconds for which an accepted user who needs no decision is not noted as such again."""
GIVEN_BACK_AT_ONCE = 200
CURRENT_WITHIN = 30.0
"""Seconds since the last answer of Redis within which a guard's entries may replace those that Redis has lost."""
_BY_TIME = (LobbyEvent.EXPIRE, LobbyEvent.TIME_OUT)


class Knowledge(Enum):
    """What has to be done before this guard and Redis know the same."""

    CURRENT = "current"
    BEHIND = "behind"
    """Changes may have been missed, or were made while this guard was alone."""
    REDIS_BEHIND = "redis_behind"
    """Redis was restarted, or another server took over: it may have lost entries that this guard knows."""


@define(eq=False)
class RedisEntries:
    """See `lotusguard.guard.lobby.book.LobbyEntries`.

    :param guard: this guard's name.
    :param longest_wait: seconds that anybody may wait.
    :ivar alone: whether this guard decides alone, because Redis gives no answer.
    """

    _redis: RedisClient
    _guard: str
    _clock: IReactorTime
    _longest_wait: float
    alone: bool = field(default=False, init=False)
    _replica: Replica = field(init=False)
    _knows: Knowledge = field(default=Knowledge.BEHIND, init=False)
    _doubts: int = field(default=0, init=False)
    _catching_up: bool = field(default=False, init=False)
    _epoch: str = field(default="", init=False)
    _born: str = field(default="", init=False)
    _changed_alone: dict[Key, LobbyEvent] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self._replica = Replica(
            self._redis, self._guard, self._clock, self._longest_wait, lambda key: key in self._changed_alone
        )
        self._redis.listen(CHANNEL, self._replica.hear)
        self._redis.on_server.append(self._connected)
        self._redis.on_subscribed.append(lambda: self._doubt(Knowledge.BEHIND))

    # -- LobbyEntries --------------------------------------------------------------------------------------

    @property
    def book(self) -> LobbyBook:
        return self._replica.book

    @property
    def learnt(self) -> Callable[[Sequence[Change]], None]:
        return self._replica.learnt

    @learnt.setter
    def learnt(self, listener: Callable[[Sequence[Change]], None]) -> None:
        self._replica.learnt = listener

    def state_of(self, room_id: str, user: str) -> LobbyState | None:
        """Somebody who waits does so until Redis says otherwise: only it knows which guards hold requests."""
        entry = self.book.get(room_id, user)
        if entry is None or (entry.state is LobbyState.WAITING and not self.alone):
            return entry.state if entry is not None else None
        return entry.state_at(self._clock.seconds(), self._longest_wait)

    async def read(self, room_id: str, user: str) -> LobbyState | None:
        try:
            (told,) = await self._run(("read", room_id, user))
        except DependencyFailed as failed:
            self._go_alone(failed.reason)
            return self.state_of(room_id, user)
        return self._replica.take_over(room_id, told).state if told else None

    async def happen(self, event: LobbyEvent, room_id: str, user: str, *, local: bool = False) -> Answer:
        entry = self.book.get(room_id, user)
        if event is LobbyEvent.LET_IN and entry is not None and self._is_accepted_lately(entry):
            return Answer(applied=True, entry=entry)
        if event is LobbyEvent.ASK and entry is not None and entry.held >= HELD_PER_USER:
            return Answer(applied=False, entry=entry, full=True)
        entry_id = token_hex(8)
        try:
            ((applied, told, full),) = await self._run(("happen", event.value, room_id, user, entry_id, local))
        except DependencyFailed as failed:
            self._go_alone(failed.reason)
            return self.book.happen(event, room_id, user, entry_id, self._clock.seconds(), local=local)
        return Answer(bool(applied), self._replica.take_over(room_id, told) if told else None, bool(full))

    async def happen_in_room(self, event: LobbyEvent, room_id: str) -> None:
        try:
            await self._run(("happen_in_room", event.value, room_id))
        except DependencyFailed as failed:
            self._go_alone(failed.reason)
            self.book.happen_in_room(event, room_id, self._clock.seconds())

    async def set_notice(self, room_id: str, entry: LobbyEntry, event_id: str) -> None:
        entry.notice = event_id
        try:
            await self._run(("set_notice", room_id, entry.user, entry.id, event_id))
        except DependencyFailed as failed:
            self._go_alone(failed.reason)

    async def let_go(self, room_id: str, user: str) -> None:
        entry = self.book.get(room_id, user)
        if entry is not None:
            entry.expires = self._clock.seconds() + TABLE[LobbyState.WAITING].lifetime  # counts while we are alone
        try:
            await self._run(("let_go", room_id, user))
        except DependencyFailed as failed:
            self._go_alone(failed.reason)

    async def pass_time(self, held: Held) -> None:
        """Redis does what time does, whichever guard is the first to ask. This guard finds out what it missed."""
        try:
            await self._catch_up()
            await self._run(("pass_time",), ("hold", [list(who) for who in held]))
        except DependencyFailed as failed:
            self._go_alone(failed.reason)
            self.book.pass_time(self._clock.seconds())
            return
        if self._replica.has_missed():
            log.warn("messages of other guards were missed; the subscription is renewed", event_name="lobby_missed")
            self._redis.subscribe_again()
            self._doubt(Knowledge.BEHIND)

    def keep(self, change: Change) -> None:
        """What happened while this guard was alone is given to Redis later. Time passes there by itself."""
        if self.alone and change.event is not None and change.event not in _BY_TIME:
            self._changed_alone[change.room_id, change.entry.user] = change.event
            if len(self._changed_alone) > ENTRIES_KEPT:
                del self._changed_alone[next(iter(self._changed_alone))]

    def stop(self) -> None:
        """Entries stay in Redis."""

    # -- alone, and together again -------------------------------------------------------------------------

    async def _run(self, *operations: Sequence[Any]) -> list[Any]:
        """:raises DependencyFailed: Redis gives no usable answer, or this guard is alone."""
        if self.alone:
            raise DependencyFailed("redis", "not_shared")
        if not self._redis.available and self._redis.fault == NOT_CONNECTED:  # the guard has just been started
            await self._redis.connected_again()
        results = await when_less_busy(self._clock, lambda: self._replica.ask(*operations))
        born, self._born = self._born, self._replica.born
        if born not in ("", self._born):
            self._doubt(Knowledge.REDIS_BEHIND)  # its data were deleted while it ran
        return results

    def _go_alone(self, reason: str) -> None:
        """People who wait at other guards wait here too for a while: a moderator may decide about them here."""
        if self.alone:
            return
        log.error(
            "lobbies are not shared with the other guards: Redis gives no answer ({reason})", reason=reason,
            event_name="lobby_unshared",
        )  # fmt: skip
        self.alone = True
        until = self._clock.seconds() + HELD_LEASE
        for _, entry in self.book.entries():
            if entry.state is LobbyState.WAITING:
                entry.expires = until
        self._doubt(Knowledge.BEHIND)

    def _connected(self, server: ServerInfo) -> None:
        if server.epoch != self._epoch:
            self._replica.time.reset()
            self._knows = Knowledge.REDIS_BEHIND if self._epoch else Knowledge.BEHIND
            self._epoch = server.epoch
            self._doubts += 1
        self._clock.callLater(0, self._catch_up_soon)  # the connection can be used then

    def _doubt(self, knows: Knowledge) -> None:
        """What this guard knows, or Redis, may be out of date."""
        self._doubts += 1
        if self._knows is not Knowledge.REDIS_BEHIND:
            self._knows = knows
        self._catch_up_soon()

    def _catch_up_soon(self) -> None:
        if self._redis.available:
            run_in_background(self._catch_up(), _report)

    async def _catch_up(self) -> None:
        """Give Redis what it cannot know, and read all entries. :raises DependencyFailed: Redis gives no answer."""
        if self._catching_up or self._knows is Knowledge.CURRENT:
            return
        if not self._redis.available:
            raise DependencyFailed("redis", self._redis.fault)
        self._catching_up = True
        try:
            doubts = -1
            # changed alone, or deleted, while Redis was read: it is read again
            while doubts != self._doubts or self._changed_alone or self._born != self._replica.born:
                doubts, answered_at = self._doubts, self._replica.answered_at
                await self._replica.ask()
                if self._born not in ("", self._replica.born):  # its data were deleted
                    self._knows = Knowledge.REDIS_BEHIND
                self._born = self._replica.born
                if self._knows is Knowledge.REDIS_BEHIND:
                    self._mark_all(answered_at)
                await self._give_back()
                await self._replica.read_all()
        finally:
            self._catching_up = False
        self._knows = Knowledge.CURRENT
        if self.alone:
            log.info("lobbies are shared with the other guards again", event_name="lobby_shared")
        self.alone = False

    def _mark_all(self, answered_at: float | None) -> None:
        """Redis may have lost every entry. What this guard has not heard of for long may have ended since.

        :param answered_at: when Redis answered last, before the answer that shows the loss.
        """
        if answered_at is not None and self._clock.seconds() - answered_at < CURRENT_WITHIN:
            for room_id, entry in self.book.entries():
                self._changed_alone.setdefault((room_id, entry.user), LobbyEvent.ASK)
        self._knows = Knowledge.BEHIND

    async def _give_back(self) -> None:
        while True:
            await self._replica.ask()  # tells the server's time
            events = [(key, self._changed_alone[key]) for key in list(self._changed_alone)[:GIVEN_BACK_AT_ONCE]]
            if not events:
                return
            await self._replica.ask(*(self._given_back(key, event) for key, event in events))
            for key, event in events:
                if self._changed_alone.get(key) is event:
                    del self._changed_alone[key]

    def _given_back(self, key: Key, event: LobbyEvent) -> Sequence[Any]:
        entry, time = self.book.get(*key), self._replica.time
        if entry is None:
            return ("read", *key) if event in BEGINS else ("happen", event.value, *key, "")
        expires = self._clock.seconds() + HELD_LEASE if entry.state is LobbyState.WAITING else entry.expires
        told = {
            "id": entry.id, "user": entry.user, "state": entry.state.value, "notice": entry.notice,
            "began": time.to_server(entry.began), "expires": time.to_server(expires),
        }  # fmt: skip
        return ("restore", key[0], told)

    def _is_accepted_lately(self, entry: LobbyEntry) -> bool:
        left = entry.expires - self._clock.seconds()
        return entry.state is LobbyState.ACCEPTED and left > entry.rules.lifetime - REFRESH_AFTER


def _report(failure: Failure) -> None:
    if not failure.check(DependencyFailed):
        log.failure("the shared lobby entries could not be read", failure)
