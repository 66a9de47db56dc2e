# SPDX-License-Identifier: Apache-2.0
"""A guard's copy of the shared lobby entries: kept up to date by the answers of Redis and by what guards publish."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attrs import define, field
from cachetools import LRUCache
from twisted.internet.interfaces import IReactorTime

from lotusguard.clients.failures import DependencyFailed
from lotusguard.clients.redis.client import RedisClient, Script
from lotusguard.guard.lobby.book import nobody_learns
from lotusguard.guard.lobby.redis.script import BASE, lobby_script
from lotusguard.guard.seats.redis.clock import ServerClock
from lotusguard.rules.lobby import LobbyEntry, LobbyEvent, LobbyState
from lotusguard.rules.lobby_book import Change, LobbyBook

ENDS_REMEMBERED = 5_000
PATIENCE = 0.9
"""Seconds after which a change that Redis named must have been heard of."""
SILENCE = 5.0
"""Seconds after which something must have been heard: every guard makes itself heard every second."""

Key = tuple[str, str]
"""A room and a user."""
Told = Mapping[str, Any]
"""An entry as Redis keeps it; times are on the server's clock."""


@define(eq=False)
class Replica:
    """All changes have one order, given by their version. What is older than what is known is ignored.

    :param guard: this guard's name.
    :param decided_alone: whether this guard changed an entry and Redis does not know it yet. Then nothing that others
        know replaces it: Redis decides between the two when it is given back.
    :ivar learnt: called with changes that were heard of.
    :ivar born: names the data set: another value shows that Redis lost it.
    :ivar answered_at: when Redis answered last.
    """

    _redis: RedisClient
    _guard: str
    _clock: IReactorTime
    _longest_wait: float
    _decided_alone: Callable[[Key], bool]
    book: LobbyBook = field(init=False)
    time: ServerClock = field(factory=ServerClock, init=False)
    learnt: Callable[[Sequence[Change]], None] = field(default=nobody_learns, init=False)
    born: str = field(default="", init=False)
    answered_at: float | None = field(default=None, init=False)
    _script: Script = field(factory=lobby_script, init=False)
    _version: int = field(default=0, init=False)
    _heard: int = field(default=0, init=False)
    _awaited: tuple[int, float] = field(default=(0, 0.0), init=False)
    _heard_at: float = field(init=False)
    _ended: LRUCache[Key, int] = field(factory=lambda: LRUCache(ENDS_REMEMBERED), init=False)

    def __attrs_post_init__(self) -> None:
        self.book = LobbyBook(self._longest_wait)
        self._heard_at = self._clock.seconds()

    async def ask(self, *operations: Sequence[Any]) -> list[Any]:
        """Run operations of ``lobby.lua``. What they change is in ``book.changes`` then.

        :raises DependencyFailed: Redis gives no usable answer.
        """
        request = {"guard": self._guard, "longest_wait": self._longest_wait, "operations": operations}
        sent = self._clock.seconds()
        answer = await self._redis.run(self._script, [BASE], json.dumps(request))
        try:
            now, version, born, changes, results = json.loads(answer)
            self.time.learn(float(now), sent, self._clock.seconds())
            self.born, self._version, self.answered_at = str(born), int(version), self._clock.seconds()
            for change in changes:
                self._caused(*change)
            return list(results)
        except (TypeError, ValueError, KeyError):
            raise DependencyFailed("redis", "invalid_response") from None

    def hear(self, message: str) -> None:
        """A guard, perhaps this one, published changes."""
        _, version, changes = json.loads(message)
        self._heard, self._heard_at = max(self._heard, int(version)), self._clock.seconds()
        if not self.time.known:
            return  # all entries are about to be read
        adopted = [
            self._adopt(room_id, told, event, after)
            for room_id, told, event, _, after in changes
            if not self._decided_alone((room_id, told["user"]))
        ]
        self.learnt([change for change in adopted if change is not None])

    def has_missed(self) -> bool:
        """Whether changes that Redis named a second ago have not been heard of, or nothing at all is heard.

        To be asked every second.
        """
        awaited, since = self._awaited
        now = self._clock.seconds()
        if self._heard < awaited:
            return now - since >= PATIENCE
        self._awaited = (self._version, now)
        return now - self._heard_at >= SILENCE

    def take_over(self, room_id: str, told: Told) -> LobbyEntry:
        """An entry as it is in Redis now."""
        known = self.book.get(room_id, told["user"])
        if known is not None and known.version >= int(told["version"]):
            return known
        return self.book.learn(room_id, self._entry(told), None).entry

    async def read_all(self) -> None:
        """Learn all entries. Those that Redis does not have, have ended, unless its data are deleted meanwhile.

        :raises DependencyFailed: Redis gives no answer.
        """
        seen: set[Key] = set()
        changes: list[Change | None] = []
        born = self.born
        await self.ask()
        began, last, more = self._version, "", True
        while more:
            ((last, found),) = await self.ask(("page", last))
            for room_id, text in found:
                told = json.loads(text)
                key, version = (room_id, told["user"]), int(told["version"])
                seen.add(key)
                if self._decided_alone(key):
                    continue
                known = self.book.get(*key)
                newest = self._ended.get(key, 0) if known is None else known.version
                if newest <= version:  # else it was heard of while the entries were read
                    change = self.book.learn(room_id, self._entry(told), None)
                    changes.append(change if change.before is not change.after else None)
            more = bool(last)
        for room_id, entry in list(self.book.entries()):
            key = (room_id, entry.user)
            if self.born == born and key not in seen and entry.version <= began and not self._decided_alone(key):
                changes.append(self.book.learn_end(*key, None))
        self._heard, self._heard_at = max(self._heard, began), self._clock.seconds()
        self._awaited = (began, self._clock.seconds())
        self.learnt([change for change in changes if change is not None])

    def _caused(self, room_id: str, told: Told, event: str, before: str, after: str) -> None:
        """This guard changed an entry. Others may have done so since, and be heard of already."""
        self._adopt(room_id, told, event, after)
        if event:
            entry = self.book.get(room_id, told["user"]) or self._entry(told)
            self.book.changes.append(Change(room_id, entry, LobbyEvent(event), _state(before), _state(after)))

    def _adopt(self, room_id: str, told: Told, event: str, after: str) -> Change | None:
        """:return: what changed for this guard; ``None`` if it knew that, or something newer."""
        key, version = (room_id, told["user"]), int(told["version"])
        known = self.book.get(*key)
        if version <= max(known.version if known is not None else 0, self._ended.get(key, 0)):
            return None
        happened = LobbyEvent(event) if event else None
        if not after:
            self._ended[key] = version
            return self.book.learn_end(*key, happened)
        return self.book.learn(room_id, self._entry(told), happened)

    def _entry(self, told: Told) -> LobbyEntry:
        began, expires = self.time.to_guard(float(told["began"])), self.time.to_guard(float(told["expires"]))
        state, version = LobbyState(told["state"]), int(told["version"])
        return LobbyEntry(told["id"], told["user"], state, began, expires, notice=told["notice"], version=version)


def _state(told: str) -> LobbyState | None:
    return LobbyState(told) if told else None
