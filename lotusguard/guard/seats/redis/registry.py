# SPDX-License-Identifier: Apache-2.0
"""What is known about issued tokens, shared by several guards, with a cache in each of them.

Facts never change but for what is withheld, so the cache needs to be told only about that. What is not in it is read
from Redis. Without Redis, and for what Redis has lost, the cache answers.

Nobody waits for a write. Redis carries out what comes over one connection in its order, so a token's facts are written
when the step that issues it, which follows over the same connection, has been answered.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any

from attrs import define, field
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from lotusguard.clients.failures import DependencyFailed
from lotusguard.clients.redis.client import RedisClient
from lotusguard.clients.waiting import gather, gather_in_turns, run_in_background
from lotusguard.guard.seats.redis.facts import (
    ALIAS_KEPT,
    ALIASES_KEPT,
    IDENTITY_KEPT,
    NOBODY,
    alias_key,
    entry_from_text,
    entry_to_text,
    identity_key,
    merged,
    slot_from_text,
    slot_to_text,
    slots_key,
)
from lotusguard.guard.seats.redis.freshness import Freshness
from lotusguard.guard.seats.redis.questions import ASKED_AGAIN, Questions
from lotusguard.guard.seats.redis.scripts import PREFIX
from lotusguard.guard.seats.registry import IdentityEntry, MemoryTokenRegistry, Slot, user_behind
from lotusguard.rules.identity import base_identities
from lotusguard.rules.sources import NO_SOURCE, Source

log = Logger()

WITHHELD_CHANNEL = PREFIX + "identity"
GIVEN_BACK_AT_ONCE = 32
"""Identities that are written again at the same time. Joins need the other calls."""


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
    _wall: Callable[[], float] = time.time
    _questions: Questions = field(init=False)
    _freshness: Freshness = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._questions = Questions(self._clock)
        self._freshness = Freshness(self._clock, self._questions)
        self._redis.listen(WITHHELD_CHANNEL, self._changed_elsewhere)
        self._redis.on_subscribed.append(self._freshness.messages_began)

    def data_set_changed(self) -> None:
        """Redis may have lost what it was given."""
        self._freshness.data_set_changed()

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
        before = await self._own.entry(alias, identity)
        await self._own.learn(alias, slot, identity, user, device, ceiling, withheld)
        is_new = await self._own.entry(alias, identity) != before
        if is_new or self._freshness.is_to_be_written(identity_key(alias, identity)):
            await self._write(alias, identity, new=before is None)

    async def learn_alias(self, alias: str, slot: Slot) -> None:
        known = await self._own.slot_of(alias)
        await self._own.learn_alias(alias, slot)
        if known != slot or self._freshness.is_to_be_written(alias_key(alias)):
            self._freshness.note_written(alias_key(alias))
            self._in_background(self._write_alias, alias, slot)

    async def _write_alias(self, alias: str, slot: Slot) -> None:
        room, call = slots_key(slot.room_id), self._redis.call
        await gather(
            (
                call("SET", alias_key(alias), slot_to_text(slot), "EX", ALIAS_KEPT),
                call("ZADD", room, int(self._wall()), json.dumps([alias, slot.slot_id])),
                call("ZREMRANGEBYRANK", room, 0, -ALIASES_KEPT - 1),
                call("EXPIRE", room, ALIAS_KEPT),
            )
        )

    async def slot_of(self, alias: str) -> Slot | None:
        slot = await self._own.slot_of(alias)
        if slot is None:
            with suppress(DependencyFailed):
                stored = await self._redis.call("GET", alias_key(alias))
                if stored is not None:
                    slot = slot_from_text(stored)
                    await self._own.learn_alias(alias, slot)
        return slot

    async def aliases_of(self, room_id: str) -> Collection[str]:
        """Those that this guard knows of. Redis is asked for the others: they are known soon."""
        if self._questions.may_ask(slots_key(room_id)):
            self._in_background(self._read_aliases, room_id)
        return await self._own.aliases_of(room_id)

    async def _read_aliases(self, room_id: str) -> None:
        known = set(await self._own.aliases_of(room_id))
        for stored in await self._redis.call("ZREVRANGE", slots_key(room_id), 0, ALIASES_KEPT - 1):
            alias, slot_id = json.loads(stored)
            if alias not in known:
                await self._own.learn_alias(alias, Slot(room_id, slot_id))

    async def user_behind(self, alias: str, identity: str) -> str:
        return user_behind(await self.entry(alias, identity), identity)

    async def entry(self, alias: str, identity: str) -> IdentityEntry | None:
        entry = await self._own.entry(alias, identity)
        for base in base_identities(identity):
            key = identity_key(alias, base)
            if entry is None and await self._questions.wait(key):
                found = await self._own.entry(alias, identity)
                if found is not None:
                    return found
            if not self._is_to_be_read(key, entry):
                continue
            with self._questions.asking([key]), suppress(DependencyFailed):
                stored, _ = await gather((self._redis.call("GET", key), self._ask_to_be_told(key)))
                if stored:
                    return await self._remember(alias, base, stored)
                if await self._is_known_as(alias, base):
                    self._in_background(self._give_back, alias, [base])
        return entry

    async def set_withheld(self, alias: str, identity: str, sources: frozenset[Source]) -> None:
        await self.entry(alias, identity)  # so that it is known here
        await self._own.set_withheld(alias, identity, sources)
        await self._write(alias, identity, new=False)

    async def read_ahead(self, alias: str, identities: Collection[str]) -> None:
        """One command for all that are not known, or may be old, so that a listing of a large call does not ask for
        each of them. What Redis has lost is written again."""
        slot = await self._own.slot_of(alias)
        if slot is not None:
            await self.learn_alias(alias, slot)
        asked: dict[str, str] = {}
        for name in identities:
            entry = await self._own.entry(alias, name)
            bases = {identity_key(alias, base): base for base in base_identities(name)}
            asked.update((key, base) for key, base in bases.items() if self._is_to_be_read(key, entry))
        if not asked:
            return
        with self._questions.asking(asked), suppress(DependencyFailed):
            found, lost = await self._redis.call("MGET", *asked), list[str]()
            for (key, base), stored in zip(asked.items(), found, strict=True):
                if stored:
                    await self._remember(alias, base, stored)
                elif await self._is_known_as(alias, base):
                    lost.append(base)
                else:
                    self._in_background(self._ask_to_be_told, key)
            if lost:
                self._in_background(self._give_back, alias, lost)

    def _is_to_be_read(self, key: str, entry: IdentityEntry | None) -> bool:
        """Whether Redis is to be asked about an identity of which this guard knows an entry, or nothing. It is going to
        be."""
        return self._questions.may_ask(key) if entry is None else self._freshness.is_to_be_read(key)

    async def _is_known_as(self, alias: str, identity: str) -> bool:
        """Whether this guard knows this very identity, rather than it without its suffix."""
        known = [base for base in base_identities(identity) if await self._own.entry(alias, base) is not None]
        return known == [identity]

    async def _give_back(self, alias: str, identities: Collection[str]) -> None:
        """Write what this guard knows and Redis does not: its data were lost, or it gave no answer at the time."""

        async def write(identity: str) -> None:
            entry = await self._own.entry(alias, identity)
            if entry is not None:
                self._freshness.note_written(identity_key(alias, identity))
                await self._exchange(alias, identity, entry, new=True)

        await gather_in_turns(GIVEN_BACK_AT_ONCE, write, identities)

    async def _ask_to_be_told(self, key: str) -> None:
        await self._redis.call("SET", key, NOBODY, "NX", "EX", int(ASKED_AGAIN))

    def _in_background(self, work: Callable[..., Coroutine[Any, Any, None]], *arguments: Any) -> None:
        """Start what nobody waits for. It is done again if the connection is lost."""

        async def twice() -> None:
            try:
                await work(*arguments)
            except DependencyFailed as failed:
                if failed.reason == "connection_lost":
                    await self._redis.connected_again()
                    await work(*arguments)

        run_in_background(twice(), _report)

    async def _write(self, alias: str, identity: str, *, new: bool) -> None:
        """Write what this guard knows by now, and tell the others if they may know otherwise."""
        entry = await self._own.entry(alias, identity)
        if entry is not None:
            self._freshness.note_written(identity_key(alias, identity))
            self._in_background(partial(self._exchange, new=new), alias, identity, entry)

    async def _exchange(self, alias: str, identity: str, entry: IdentityEntry, *, new: bool) -> None:
        """:param new: this guard did not know the identity. What another withholds from it stays withheld."""
        key, stored = identity_key(alias, identity), entry_to_text(entry)
        before = await self._redis.call("SET", key, stored, "EX", IDENTITY_KEPT, "GET")
        if before is None or before == stored:
            return
        if new and before != NOBODY:
            entry = merged(entry, entry_from_text(before))
            if entry_to_text(entry) != stored:
                stored = entry_to_text(entry)
                await self._own.set_withheld(alias, identity, entry.withheld)
                await self._redis.call("SET", key, stored, "EX", IDENTITY_KEPT)
        await self._redis.publish(WITHHELD_CHANNEL, json.dumps([self._guard, alias, identity, stored]))

    async def _remember(self, alias: str, identity: str, stored: str) -> IdentityEntry | None:
        told, slot = entry_from_text(stored), await self.slot_of(alias)
        if slot is None:
            return None
        await self._own.learn(alias, slot, identity, told.user, told.device, told.ceiling, told.withheld)
        await self._own.set_withheld(alias, identity, told.withheld)
        return await self._own.entry(alias, identity)

    def _changed_elsewhere(self, message: str) -> None:
        guard, alias, identity, stored = json.loads(message)
        self._questions.forget(identity_key(alias, identity))
        if guard != self._guard:
            run_in_background(self._update(alias, identity, stored), _report)

    async def _update(self, alias: str, identity: str, stored: str) -> None:
        """Take over what another guard wrote, if it is cached here."""
        if await self._own.entry(alias, identity) is not None:
            await self._remember(alias, identity, stored)


def _report(failure: Failure) -> None:
    if not failure.check(DependencyFailed):
        log.failure("what is known about a token could not be shared", failure)
