# SPDX-License-Identifier: Apache-2.0
"""The token registry: what is known about issued tokens, within limits, also after a restart."""

from __future__ import annotations

from pathlib import Path
from time import time

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.task import Clock

from lotusguard.guard.seats.registry import IdentityEntry, MemoryTokenRegistry, Slot
from lotusguard.guard.seats.store import StoredHold, open_state_store
from lotusguard.metrics import Metrics
from lotusguard.rules.sources import ALL_SOURCES, CAMERA, MICROPHONE, SCREEN_SHARE

SLOT = Slot("!r:s", "m.call#ROOM")
NOTHING: frozenset[object] = frozenset()
EVERYTHING = frozenset(ALL_SOURCES)


def registry_in_memory() -> MemoryTokenRegistry:
    return MemoryTokenRegistry(None, Clock(), Metrics())


@pytest_twisted.ensureDeferred
async def test_registry_is_restored_after_a_restart(tmp_path: Path) -> None:
    for _ in range(2):
        store = open_state_store(tmp_path, reactor, Metrics())
        registry = MemoryTokenRegistry(store, Clock(), Metrics())
        registry.load()
        await registry.learn("alias", SLOT, "@a:s:D", "@a:s", "D", EVERYTHING, frozenset({CAMERA}))
        await registry.learn("alias", SLOT, "hashed", "@b:s")
        await store.close()
    store = open_state_store(tmp_path, reactor, Metrics())
    registry = MemoryTokenRegistry(store, Clock(), Metrics())
    registry.load()
    assert await registry.slot_of("alias") == SLOT
    assert await registry.aliases_of("!r:s") == ("alias",)
    assert await registry.entry("alias", "@a:s:D") == IdentityEntry("@a:s", "D", EVERYTHING, frozenset({CAMERA}))
    assert await registry.entry("alias", "hashed") == IdentityEntry("@b:s")
    await store.close()


@pytest_twisted.ensureDeferred
async def test_withheld_sources_are_kept_until_set_again_and_stay_within_the_ceiling() -> None:
    registry = registry_in_memory()
    await registry.learn("alias", SLOT, "i", "@a:s", "D", EVERYTHING, frozenset({CAMERA, SCREEN_SHARE}))
    await registry.learn("alias", SLOT, "i", "@a:s", "D", frozenset({CAMERA, MICROPHONE}))
    entry = await registry.entry("alias", "i")
    assert entry is not None
    assert entry.withheld == {CAMERA}
    await registry.set_withheld("alias", "i", frozenset())
    entry = await registry.entry("alias", "i")
    assert entry == IdentityEntry("@a:s", "D", frozenset({CAMERA, MICROPHONE}))
    await registry.set_withheld("alias", "unknown", frozenset({CAMERA}))
    assert await registry.entry("alias", "unknown") is None


@pytest_twisted.ensureDeferred
async def test_a_suffixed_identity_has_its_bases_entry_until_it_has_its_own() -> None:
    registry = registry_in_memory()
    await registry.learn("alias", SLOT, "@a:s:D", "@a:s", "D", EVERYTHING)
    assert await registry.entry("alias", "@a:s:D#x#y") == await registry.entry("alias", "@a:s:D")
    assert await registry.user_behind("alias", "@a:s:D#x") == "@a:s"
    assert await registry.user_behind("alias", "@b:s:D#x") == "@b:s"
    await registry.set_withheld("alias", "@a:s:D#x", frozenset({CAMERA}))
    assert await registry.entry("alias", "@a:s:D#x") == IdentityEntry("@a:s", "D", EVERYTHING, frozenset({CAMERA}))
    assert await registry.entry("alias", "@a:s:D") == IdentityEntry("@a:s", "D", EVERYTHING)


@pytest_twisted.ensureDeferred
async def test_an_evicted_alias_is_reported_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lotusguard.guard.seats.registry.ALIASES_KEPT", 2)
    registry = registry_in_memory()
    evicted: list[tuple[str, Slot]] = []
    registry.on_alias_evicted.append(lambda alias, slot: evicted.append((alias, slot)))
    for alias in ("a", "b", "a", "c"):
        await registry.learn_alias(alias, SLOT)
    assert evicted == [("b", SLOT)]
    assert await registry.aliases_of("!r:s") == ("a", "c")
    assert await registry.slot_of("b") is None


@pytest_twisted.ensureDeferred
async def test_people_in_calls_are_remembered_however_many_tokens_one_caller_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lotusguard.guard.seats.registry.ALIASES_KEPT", 10)
    monkeypatch.setattr("lotusguard.guard.seats.registry.IDENTITIES_KEPT", 10)
    registry = registry_in_memory()
    await registry.learn("call", SLOT, "hashed", "@a:s", "D")
    for number in range(100):
        await registry.learn(f"flood{number}", Slot(f"!flood{number}:s", "slot"), f"identity{number}", "@flooder:s")
        if not number % 5:  # as reconciling does every few seconds
            assert await registry.slot_of("call") == SLOT
            assert await registry.user_behind("call", "hashed#screen") == "@a:s"
    assert await registry.entry("call", "hashed") == IdentityEntry("@a:s", "D")
    assert await registry.aliases_of("!r:s") == ("call",)


@pytest_twisted.ensureDeferred
async def test_people_in_calls_are_remembered_by_a_restart_after_a_flood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lotusguard.guard.seats.registry.ALIASES_KEPT", 10)
    monkeypatch.setattr("lotusguard.guard.seats.registry.IDENTITIES_LOADED", 10)
    for present in (True, False):
        store = open_state_store(tmp_path, reactor, Metrics())
        registry = MemoryTokenRegistry(store, Clock(), Metrics())
        registry.load()
        name = "present" if present else "absent"
        await registry.learn(f"{name} call", SLOT, name, "@a:s", "D")
        store.put_hold_later(StoredHold("!r:s", "@a:s", f"{name} call", name, "D", present, time() + 30))
        for number in range(20):
            await registry.learn(f"flood{number}", Slot(f"!flood{number}:s", "slot"), f"i{number}", "@flooder:s")
        await store.close()
    store = open_state_store(tmp_path, reactor, Metrics())
    registry = MemoryTokenRegistry(store, Clock(), Metrics())
    registry.load()
    assert await registry.slot_of("present call") == SLOT
    assert await registry.entry("present call", "present") == IdentityEntry("@a:s", "D")
    assert await registry.entry("absent call", "absent") is None
    await store.close()


@pytest_twisted.ensureDeferred
async def test_long_names_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lotusguard.guard.seats.registry.IDENTITY_BYTES", 100_000)
    registry = registry_in_memory()
    for number in range(200):
        await registry.learn("alias", SLOT, f"{number}".rjust(255), "@a:s")
    known = [number for number in range(200) if await registry.entry("alias", f"{number}".rjust(255)) is not None]
    assert 50 < len(known) < 150
    assert known == list(range(200 - len(known), 200))


@pytest_twisted.ensureDeferred
async def test_an_alias_that_changes_its_room_is_in_one_room_only() -> None:
    registry = registry_in_memory()
    await registry.learn_alias("alias", SLOT)
    await registry.learn_alias("alias", Slot("!other:s", "slot"))
    assert await registry.aliases_of("!r:s") == ()
    assert await registry.aliases_of("!other:s") == ("alias",)
