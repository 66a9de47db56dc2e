# SPDX-License-Identifier: Apache-2.0
"""What only the issuer of a token learns: which room an alias is, which user an identity. Floor: guard."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Protocol

from attrs import frozen
from twisted.internet.interfaces import IReactorTime

from lotusguard.guard.seats.store import Store
from lotusguard.metrics import Metrics
from lotusguard.rules.identity import base_identities, user_of
from lotusguard.rules.sources import Source

ALIASES_KEPT = 50_000
IDENTITIES_KEPT = 200_000
TAKEN_KEPT = 50_000
REFRESHED = 86400.0
"""Seconds after which what is learnt again is written again, so that the state directory sees it is in use."""


@frozen
class Slot:
    """Which Matrix room, and which slot of it, an SFU room is."""

    room_id: str
    slot_id: str


@frozen
class Promise:
    """A seat that was promised with a token. ``expires`` is in seconds since the epoch."""

    room_id: str
    user: str
    expires: float


class TokenRegistry(Protocol):
    """What is remembered about issued tokens. Several guards may share one, so every question is awaited."""

    async def learn(self, alias: str, slot: Slot, identity: str, user: str) -> None:
        """A token for this identity in this SFU room was issued to this user."""

    async def learn_alias(self, alias: str, slot: Slot) -> None:
        """An SFU room belongs to this slot."""

    async def slot_of(self, alias: str) -> Slot | None:
        """Which slot an SFU room is, if a token for it was ever issued."""

    async def aliases_of(self, room_id: str) -> Collection[str]:
        """The SFU rooms of a Matrix room."""

    async def user_behind(self, alias: str, identity: str) -> str:
        """Who is behind an identity. One that is not known counts as a user of its own."""

    async def taken_in(self, alias: str) -> Mapping[str, frozenset[Source]]:
        """What the guard itself took in an SFU room, by session."""

    async def remember_taken(self, alias: str, sid: str, sources: frozenset[Source]) -> None:
        """What has been taken from a session, all in all; nothing forgets it. By session, because a new one
        has what its own token granted."""


@frozen
class _Alias:
    slot: Slot
    seen: float


@frozen
class _Identity:
    user: str
    seen: float


class MemoryTokenRegistry:
    """The registry of one guard: answers from memory, written behind to the state directory if there is one.

    :param store: where it survives a restart; ``None`` keeps it in memory only.
    """

    def __init__(self, store: Store | None, clock: IReactorTime, metrics: Metrics) -> None:
        self._store = store
        self._clock = clock
        self._aliases: OrderedDict[str, _Alias] = OrderedDict()
        self._rooms: dict[str, dict[str, None]] = {}
        self._identities: OrderedDict[tuple[str, str], _Identity] = OrderedDict()
        self._taken: OrderedDict[tuple[str, str], frozenset[Source]] = OrderedDict()
        self._taken_in: dict[str, set[str]] = {}
        for cache, limit, entries in (
            ("aliases", ALIASES_KEPT, self._aliases),
            ("identities", IDENTITIES_KEPT, self._identities),
            ("taken", TAKEN_KEPT, self._taken),
        ):
            metrics.cache_limit.labels(cache).set(limit)
            metrics.cache_entries.labels(cache).set_function(entries.__len__)

    def load(self) -> list[Promise]:
        """Read what an earlier run remembered. Blocks, so before anything is served.

        :return: the seats it had promised that have not expired.
        """
        if self._store is None:
            return []
        for alias, room_id, slot_id in self._store.aliases(ALIASES_KEPT):
            self._place(alias, Slot(room_id, slot_id))
        for alias, identity, user in self._store.identities(IDENTITIES_KEPT):
            self._identities[alias, identity] = _Identity(user, self._clock.seconds())
        for alias, sid, numbers in self._store.taken():
            self._note_taken(alias, sid, frozenset(Source(number) for number in numbers))
        return [Promise(*promise) for promise in self._store.promises(self._clock.seconds())]

    async def learn(self, alias: str, slot: Slot, identity: str, user: str) -> None:
        await self.learn_alias(alias, slot)
        now = self._clock.seconds()
        known = self._identities.get((alias, identity))
        if known is None or known.user != user or now - known.seen > REFRESHED:
            self._identities[alias, identity] = _Identity(user, now)
            if self._store is not None:
                self._store.put_identity(alias, identity, user, now)
        self._identities.move_to_end((alias, identity))
        while len(self._identities) > IDENTITIES_KEPT:
            self._identities.popitem(last=False)

    async def learn_alias(self, alias: str, slot: Slot) -> None:
        now = self._clock.seconds()
        known = self._aliases.get(alias)
        if known is None or known.slot != slot or now - known.seen > REFRESHED:
            self._place(alias, slot)
            if self._store is not None:
                self._store.put_alias(alias, slot.room_id, slot.slot_id, now)
        self._aliases.move_to_end(alias)

    async def slot_of(self, alias: str) -> Slot | None:
        known = self._aliases.get(alias)
        return known.slot if known is not None else None

    async def aliases_of(self, room_id: str) -> Collection[str]:
        return tuple(self._rooms.get(room_id, ()))

    async def user_behind(self, alias: str, identity: str) -> str:
        for base in base_identities(identity):
            known = self._identities.get((alias, base))
            if known is not None:
                return known.user
        return user_of(base)

    async def taken_in(self, alias: str) -> Mapping[str, frozenset[Source]]:
        return {sid: self._taken[alias, sid] for sid in self._taken_in.get(alias, ())}

    async def remember_taken(self, alias: str, sid: str, sources: frozenset[Source]) -> None:
        before = self._taken.get((alias, sid), frozenset())
        self._note_taken(alias, sid, sources)
        if self._store is not None and sources != before:
            self._store.put_taken(alias, sid, sorted(sources), self._clock.seconds())

    def _note_taken(self, alias: str, sid: str, sources: frozenset[Source]) -> None:
        self._taken.pop((alias, sid), None)
        if sources:
            self._taken[alias, sid] = sources
            self._taken_in.setdefault(alias, set()).add(sid)
        else:
            self._not_taken_in(alias, sid)
        while len(self._taken) > TAKEN_KEPT:
            oldest, _ = self._taken.popitem(last=False)
            self._not_taken_in(*oldest)

    def _not_taken_in(self, alias: str, sid: str) -> None:
        of_room = self._taken_in.get(alias, set())
        of_room.discard(sid)
        if not of_room:
            self._taken_in.pop(alias, None)

    def _place(self, alias: str, slot: Slot) -> None:
        old = self._aliases.get(alias)
        if old is not None:
            self._rooms[old.slot.room_id].pop(alias, None)
        self._aliases[alias] = _Alias(slot, self._clock.seconds())
        self._rooms.setdefault(slot.room_id, {})[alias] = None
        while len(self._aliases) > ALIASES_KEPT:
            dropped, entry = self._aliases.popitem(last=False)
            remaining = self._rooms[entry.slot.room_id]
            remaining.pop(dropped, None)
            if not remaining:
                del self._rooms[entry.slot.room_id]
