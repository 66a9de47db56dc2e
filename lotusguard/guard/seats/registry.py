# SPDX-License-Identifier: Apache-2.0
"""Facts that only the issuer of a token learns: an SFU room's slot, an identity's user, and what was granted."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Protocol

from attrs import define, evolve, field, frozen
from twisted.internet.interfaces import IReactorTime

from lotusguard.guard.lru import LruCache
from lotusguard.guard.seats.store import StateStore
from lotusguard.metrics import Metrics
from lotusguard.rules.identity import base_identities, user_of
from lotusguard.rules.sources import NO_SOURCE, Source, mask_of, sources_of

ALIASES_KEPT, ALIAS_BYTES = 50_000, 64 << 20
IDENTITIES_KEPT, IDENTITY_BYTES = 200_000, 256 << 20
"""Limits of the caches. Names have at most 255 bytes. With those of the usual length an alias takes 0.8 kB and an
identity 1 kB, so the number of entries is the limit; only unusually long names reach the limit in bytes first."""
IDENTITIES_LOADED = 50_000
"""The latest identities that are read at the start, so that it takes less than a second however many there are."""
REFRESHED = 86400.0
"""Seconds after which a known fact is written again, so that the state store does not delete it as unused."""


@frozen
class Slot:
    """A Matrix room and a slot of it. An SFU room belongs to one."""

    room_id: str
    slot_id: str


@frozen
class IdentityEntry:
    """What is known about an identity for which a token was issued.

    :ivar device: empty if it is not known.
    :ivar ceiling: the sources that upstream granted; ``None`` if they are not known.
    :ivar withheld: the sources that the guard left out of the token or revoked, and did not give back.
    """

    user: str
    device: str = ""
    ceiling: frozenset[Source] | None = None
    withheld: frozenset[Source] = NO_SOURCE


def user_behind(entry: IdentityEntry | None, identity: str) -> str:
    """The user of an identity, by what is known about it. An unknown identity counts as a user of its own."""
    return entry.user if entry is not None else user_of([*base_identities(identity)][-1])


class TokenRegistry(Protocol):
    """What is remembered about issued tokens. Several guards may share one, so every question is awaited."""

    async def learn(
        self,
        alias: str,
        slot: Slot,
        identity: str,
        user: str,
        device: str = "",
        ceiling: frozenset[Source] | None = None,
        withheld: frozenset[Source] = NO_SOURCE,
    ) -> None:
        """A token for this identity in this SFU room was issued to this user.

        What is withheld from an earlier token stays withheld, because its session may still be in the call;
        `set_withheld` ends that.
        """

    async def learn_alias(self, alias: str, slot: Slot) -> None:
        """An SFU room belongs to this slot."""

    async def slot_of(self, alias: str) -> Slot | None:
        """The slot of an SFU room, if it is known."""

    async def aliases_of(self, room_id: str) -> Collection[str]:
        """The SFU rooms of a Matrix room."""

    async def user_behind(self, alias: str, identity: str) -> str:
        """The user of an identity. An unknown identity counts as a user of its own."""

    async def entry(self, alias: str, identity: str) -> IdentityEntry | None:
        """What is known about an identity, or about the one it is made of (see `base_identities`)."""

    async def read_ahead(self, alias: str, identities: Collection[str]) -> None:
        """These identities are going to be asked about."""

    async def set_withheld(self, alias: str, identity: str, sources: frozenset[Source]) -> None:
        """The sources that are withheld from an identity from now on. An unknown identity stays unknown: nothing may
        be given to it anyway."""


@frozen
class _Alias:
    slot: Slot
    written: float


@frozen
class _Identity:
    entry: IdentityEntry
    written: float


def _texts_of_alias(alias: str, known: _Alias) -> tuple[str, ...]:
    return alias, known.slot.room_id, known.slot.slot_id


def _texts_of_identity(key: tuple[str, str], known: _Identity) -> tuple[str, ...]:
    return *key, known.entry.user, known.entry.device


@define(eq=False)
class MemoryTokenRegistry:
    """The registry of one guard: answers from memory, and is written behind to the state store if there is one.

    A question counts as use. Reconciling asks every few seconds about those who are in a call, so that however many
    tokens one caller asks for, these are not forgotten.

    :param store: where it survives a restart; ``None`` keeps it in memory only.
    :param wall: seconds since the epoch.
    :ivar on_alias_evicted: called with an alias and its slot when the cache forgets it.
    """

    _store: StateStore | None = field(repr=False)
    _clock: IReactorTime = field(repr=False)
    _metrics: Metrics = field(repr=False)
    _wall: Callable[[], float] = field(default=time.time, repr=False, kw_only=True)
    on_alias_evicted: list[Callable[[str, Slot], None]] = field(init=False, repr=False, factory=list)
    _aliases: LruCache[str, _Alias] = field(init=False, repr=False)
    _rooms: dict[str, dict[str, None]] = field(init=False, repr=False, factory=dict)
    _identities: LruCache[tuple[str, str], _Identity] = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._aliases = LruCache(ALIASES_KEPT, ALIAS_BYTES, _texts_of_alias, self._alias_evicted)
        self._identities = LruCache(IDENTITIES_KEPT, IDENTITY_BYTES, _texts_of_identity)
        for cache, limit, entries in (
            ("aliases", ALIASES_KEPT, self._aliases),
            ("identities", IDENTITIES_KEPT, self._identities),
        ):
            self._metrics.cache_limit.labels(cache).set(limit)
            self._metrics.cache_entries.labels(cache).set_function(entries.__len__)

    def load(self) -> None:
        """Read what an earlier run remembered. It blocks, so it is called before anything is served."""
        if self._store is None:
            return
        now = self._clock.seconds()
        for alias, room_id, slot_id in (*self._store.aliases(ALIASES_KEPT), *self._store.aliases_in_use(ALIASES_KEPT)):
            self._place(alias, Slot(room_id, slot_id))
        for row in (
            *self._store.identities(IDENTITIES_LOADED), *self._store.identities_in_use(IDENTITIES_LOADED)
        ):  # fmt: skip
            ceiling = None if row.ceiling is None else sources_of(row.ceiling)
            entry = IdentityEntry(row.user, row.device, ceiling, sources_of(row.withheld))
            self._identities.put((row.alias, row.identity), _Identity(entry, now))

    async def learn(
        self,
        alias: str,
        slot: Slot,
        identity: str,
        user: str,
        device: str = "",
        ceiling: frozenset[Source] | None = None,
        withheld: frozenset[Source] = NO_SOURCE,
    ) -> None:
        await self.learn_alias(alias, slot)
        known = self._identities.get((alias, identity))
        if known is not None and known.entry.user == user:
            withheld |= known.entry.withheld
        if ceiling is not None:
            withheld &= ceiling
        self._remember(alias, identity, IdentityEntry(user, device, ceiling, withheld))

    async def learn_alias(self, alias: str, slot: Slot) -> None:
        known = self._aliases.get(alias)
        if known is None or known.slot != slot or self._clock.seconds() - known.written > REFRESHED:
            self._place(alias, slot)
            if self._store is not None:
                self._store.put_alias(alias, slot.room_id, slot.slot_id, self._wall())
        else:
            self._aliases.touch(alias)

    async def slot_of(self, alias: str) -> Slot | None:
        known = self._aliases.get(alias)
        if known is None:
            return None
        self._aliases.touch(alias)
        return known.slot

    async def aliases_of(self, room_id: str) -> Collection[str]:
        return tuple(self._rooms.get(room_id, ()))

    async def user_behind(self, alias: str, identity: str) -> str:
        return user_behind(await self.entry(alias, identity), identity)

    async def entry(self, alias: str, identity: str) -> IdentityEntry | None:
        for base in base_identities(identity):
            known = self._identities.get((alias, base))
            if known is not None:
                self._identities.touch((alias, base))
                return known.entry
        return None

    async def read_ahead(self, alias: str, identities: Collection[str]) -> None:
        """All are in memory."""

    async def set_withheld(self, alias: str, identity: str, sources: frozenset[Source]) -> None:
        entry = await self.entry(alias, identity)
        if entry is not None and entry.withheld != sources:
            self._remember(alias, identity, evolve(entry, withheld=sources))

    def _remember(self, alias: str, identity: str, entry: IdentityEntry) -> None:
        now, key = self._clock.seconds(), (alias, identity)
        known = self._identities.get(key)
        if known is not None and known.entry == entry and now - known.written <= REFRESHED:
            self._identities.touch(key)
            return
        self._identities.put(key, _Identity(entry, now))
        if self._store is not None:
            ceiling = None if entry.ceiling is None else mask_of(entry.ceiling)
            self._store.put_identity(
                alias, identity, entry.user, entry.device, ceiling, mask_of(entry.withheld), self._wall()
            )

    def _place(self, alias: str, slot: Slot) -> None:
        old = self._aliases.get(alias)
        if old is not None:
            self._forget_alias(alias, old.slot)
        self._rooms.setdefault(slot.room_id, {})[alias] = None
        self._aliases.put(alias, _Alias(slot, self._clock.seconds()))

    def _alias_evicted(self, alias: str, known: _Alias) -> None:
        self._forget_alias(alias, known.slot)
        for hook in self.on_alias_evicted:
            hook(alias, known.slot)

    def _forget_alias(self, alias: str, slot: Slot) -> None:
        remaining = self._rooms[slot.room_id]
        remaining.pop(alias, None)
        if not remaining:
            del self._rooms[slot.room_id]
