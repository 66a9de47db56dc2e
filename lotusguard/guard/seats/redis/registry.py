# SPDX-License-Identifier: Apache-2.0
"""What is known about issued tokens, shared by several guards, with a cache in each of them.

Facts never change but for what is withheld, so the cache needs to be told only about that. What is not in it is read
from Redis. Without Redis, and for what Redis has lost, the cache answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from contextlib import suppress

from attrs import define, field
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from lotusguard.clients.failures import DependencyFailed
from lotusguard.clients.redis.client import RedisClient
from lotusguard.clients.waiting import gather, run_in_background
from lotusguard.guard.lru import LruCache
from lotusguard.guard.seats.redis.scripts import PREFIX
from lotusguard.guard.seats.registry import NOTHING, IdentityEntry, MemoryTokenRegistry, Slot, mask_of, sources_of
from lotusguard.rules.identity import base_identities, user_of
from lotusguard.rules.sources import Source

log = Logger()

ALIAS_KEPT = 30 * 86400
IDENTITY_KEPT = 7 * 86400
"""Seconds for which Redis keeps what nobody has written again."""
WITHHELD_CHANNEL = PREFIX + "identity"
ALIASES_READ = 256
"""SFU rooms of one Matrix room that are read at once."""
ASKED_AGAIN = 10.0
"""Seconds after which Redis is asked again about what it did not know, or about a room's SFU rooms. Guards tell each
other about identities at once, and the SFU rooms in which somebody holds a seat are in the seat book."""
ASKED_KEPT, ASKED_BYTES = 50_000, 16 << 20


@define(eq=False)
class RedisTokenRegistry:
    """See `lotusguard.guard.seats.registry.TokenRegistry`. No method fails because of Redis.

    :param own: this guard's own registry, which is the cache.
    :param guard: this guard's name.
    """

    _redis: RedisClient
    _own: MemoryTokenRegistry
    _guard: str
    _clock: IReactorTime
    _asked: LruCache[str, float] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._asked = LruCache(ASKED_KEPT, ASKED_BYTES, lambda key, _: (key,))
        self._redis.listen(WITHHELD_CHANNEL, self._changed_elsewhere)

    async def learn(
        self,
        alias: str,
        slot: Slot,
        identity: str,
        user: str,
        device: str = "",
        ceiling: frozenset[Source] | None = None,
        withheld: frozenset[Source] = NOTHING,
    ) -> None:
        await self.learn_alias(alias, slot)
        before = await self.entry(alias, identity)  # what another guard withholds from an earlier token stays withheld
        await self._own.learn(alias, slot, identity, user, device, ceiling, withheld)
        if await self._own.entry(alias, identity) != before:
            await self._write(alias, identity)

    async def learn_alias(self, alias: str, slot: Slot) -> None:
        if await self._own.slot_of(alias) != slot:
            with suppress(DependencyFailed):
                await self._redis.call("SET", _alias_key(alias), json.dumps([slot.room_id, slot.slot_id]),
                                       "EX", ALIAS_KEPT)  # fmt: skip
                await self._redis.call("SADD", _room_key(slot.room_id), alias)
                await self._redis.call("EXPIRE", _room_key(slot.room_id), ALIAS_KEPT)
        await self._own.learn_alias(alias, slot)

    async def slot_of(self, alias: str) -> Slot | None:
        slot = await self._own.slot_of(alias)
        if slot is None:
            with suppress(DependencyFailed):
                stored = await self._redis.call("GET", _alias_key(alias))
                if stored is not None:
                    slot = Slot(*json.loads(stored))
                    await self._own.learn_alias(alias, slot)
        return slot

    async def aliases_of(self, room_id: str) -> Collection[str]:
        aliases = dict.fromkeys(await self._own.aliases_of(room_id))
        if not self._may_ask(_room_key(room_id)):
            return tuple(aliases)
        with suppress(DependencyFailed):
            for alias in list(await self._redis.call("SMEMBERS", _room_key(room_id)))[:ALIASES_READ]:
                if alias not in aliases and await self.slot_of(alias) is not None:
                    aliases[alias] = None
        return tuple(aliases)

    async def user_behind(self, alias: str, identity: str) -> str:
        entry = await self.entry(alias, identity)
        return entry.user if entry is not None else user_of([*base_identities(identity)][-1])

    async def entry(self, alias: str, identity: str) -> IdentityEntry | None:
        entry = await self._own.entry(alias, identity)
        if entry is not None:
            return entry
        for base in base_identities(identity):
            key = _identity_key(alias, base)
            if not self._may_ask(key):
                continue
            with suppress(DependencyFailed):
                stored = await self._redis.call("GET", key)
                if stored is not None:
                    return await self._remember(alias, base, stored)
        return None

    async def set_withheld(self, alias: str, identity: str, sources: frozenset[Source]) -> None:
        await self.entry(alias, identity)
        await self._own.set_withheld(alias, identity, sources)
        await self._write(alias, identity)

    def _may_ask(self, key: str) -> bool:
        """Whether Redis has not been asked lately. It is going to be."""
        now, asked = self._clock.seconds(), self._asked.get(key)
        if asked is not None and now - asked < ASKED_AGAIN:
            return False
        self._asked.put(key, now)
        return True

    async def _write(self, alias: str, identity: str) -> None:
        """Write what this guard knows by now, and tell the others."""
        entry = await self._own.entry(alias, identity)
        if entry is None:
            return
        ceiling = None if entry.ceiling is None else mask_of(entry.ceiling)
        stored = json.dumps([entry.user, entry.device, ceiling, mask_of(entry.withheld)])
        with suppress(DependencyFailed):
            await gather(
                (
                    self._redis.call("SET", _identity_key(alias, identity), stored, "EX", IDENTITY_KEPT),
                    self._redis.publish(WITHHELD_CHANNEL, json.dumps([self._guard, alias, identity, stored])),
                )
            )

    async def _remember(self, alias: str, identity: str, stored: str) -> IdentityEntry | None:
        user, device, ceiling, withheld = json.loads(stored)
        slot = await self.slot_of(alias)
        if slot is None:
            return None
        granted = None if ceiling is None else sources_of(ceiling)
        await self._own.learn(alias, slot, identity, user, device, granted, sources_of(withheld))
        await self._own.set_withheld(alias, identity, sources_of(withheld))
        return await self._own.entry(alias, identity)

    def _changed_elsewhere(self, message: str) -> None:
        guard, alias, identity, stored = json.loads(message)
        self._asked.discard(_identity_key(alias, identity))
        if guard != self._guard:
            run_in_background(self._update(alias, identity, stored), _report)

    async def _update(self, alias: str, identity: str, stored: str) -> None:
        """Take over what another guard wrote, if it is cached here."""
        if await self._own.entry(alias, identity) is not None:
            await self._remember(alias, identity, stored)


def _report(failure: Failure) -> None:
    log.failure("what another guard wrote about a token could not be read", failure)


def _alias_key(alias: str) -> str:
    return f"{PREFIX}alias:{{{alias}}}"


def _room_key(room_id: str) -> str:
    return f"{PREFIX}aliases:{{{room_id}}}"


def _identity_key(alias: str, identity: str) -> str:
    return f"{PREFIX}identity:{{{alias}}}:{hashlib.sha256(identity.encode()).hexdigest()[:32]}"
