# SPDX-License-Identifier: Apache-2.0
"""Several guards' registries over one Valkey: what one guard learns, all know."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from secrets import token_hex
from typing import Any

import pytest_twisted
from twisted.internet.defer import CancelledError, Deferred, gatherResults
from twisted.internet.task import deferLater

from lotusguard.clients.redis.client import RedisClient
from lotusguard.guard.seats.redis.registry import RedisTokenRegistry
from lotusguard.guard.seats.registry import MemoryTokenRegistry, Slot, TokenRegistry
from lotusguard.metrics import Metrics
from lotusguard.rules.redis_address import parse_address
from lotusguard.rules.sources import Source
from tests.conftest import until

from .conftest import OwnServer
from .guards import reactor

BOTH = frozenset({Source.CAMERA, Source.MICROPHONE})
CAMERA = frozenset({Source.CAMERA})


@pytest_twisted.async_yield_fixture
async def two(own_server: OwnServer) -> AsyncIterator[tuple[TokenRegistry, TokenRegistry]]:
    clients = []
    registries = []
    for _ in range(2):
        metrics = Metrics()
        client = RedisClient(parse_address(own_server.url), reactor, metrics)
        registries.append(
            RedisTokenRegistry(client, MemoryTokenRegistry(None, reactor, metrics), token_hex(4), reactor)
        )
        client.start()
        clients.append(client)
    await until(lambda: all(client.available for client in clients))
    await deferLater(reactor, 0.1)  # for the subscriptions
    yield registries[0], registries[1]
    for client in clients:
        client.stop()


async def withheld(registry: TokenRegistry) -> frozenset[Source]:
    entry = await registry.entry("alias", "id")
    return entry.withheld if entry is not None else frozenset()


async def eventually(question: Callable[[Any], Awaitable[object]], about: object, answer: object) -> None:
    """Wait until a question is answered in this way."""
    end = reactor.seconds() + 15
    while await question(about) != answer:
        assert reactor.seconds() < end
        await deferLater(reactor, 0.01)


@pytest_twisted.ensureDeferred
async def test_what_one_guard_learns_the_other_knows(two: tuple[TokenRegistry, TokenRegistry]) -> None:
    first, second = two
    slot = Slot("!room", "m.call#ROOM")
    await first.learn("alias", slot, "hash", "@a:x", "PHONE", BOTH, CAMERA)
    assert await second.slot_of("alias") == slot
    assert await second.user_behind("alias", "hash") == "@a:x"
    entry = await second.entry("alias", "hash")
    assert entry is not None
    assert (entry.device, entry.ceiling, entry.withheld) == ("PHONE", BOTH, CAMERA)
    await eventually(second.aliases_of, "!room", ("alias",))
    assert await second.slot_of("unknown") is None
    assert await second.entry("alias", "unknown") is None


@pytest_twisted.ensureDeferred
async def test_what_one_guard_withholds_the_other_knows_at_once(two: tuple[TokenRegistry, TokenRegistry]) -> None:
    first, second = two
    await first.learn("alias", Slot("!room", "s"), "id", "@a:x", "PHONE", BOTH)
    assert await second.entry("alias", "id") == await first.entry("alias", "id")
    await first.set_withheld("alias", "id", CAMERA)

    await eventually(withheld, second, CAMERA)
    await second.set_withheld("alias", "id", frozenset())
    await second.learn("alias", Slot("!room", "s"), "id", "@a:x", "PHONE", BOTH)
    assert await withheld(second) == frozenset()


@pytest_twisted.ensureDeferred
async def test_what_one_guard_withholds_stays_withheld_from_a_token_of_another(
    two: tuple[TokenRegistry, TokenRegistry],
) -> None:
    first, second = two
    await first.learn("alias", Slot("!room", "s"), "id", "@a:x", "PHONE", BOTH, CAMERA)
    await second.learn("alias", Slot("!room", "s"), "id", "@a:x", "TABLET", BOTH)
    await eventually(withheld, second, CAMERA)
    entry = await second.entry("alias", "id")
    assert entry is not None
    assert entry.device == "TABLET"


@pytest_twisted.ensureDeferred
async def test_a_guard_that_asked_too_early_is_told(two: tuple[TokenRegistry, TokenRegistry]) -> None:
    first, second = two
    assert await second.user_behind("alias", "hash") == "hash"
    await second.read_ahead("alias", ["other"])
    await first.learn("alias", Slot("!room", "s"), "hash", "@a:x")
    await first.learn("alias", Slot("!room", "s"), "other", "@b:x")
    await eventually(lambda identity: second.user_behind("alias", identity), "hash", "@a:x")
    await eventually(lambda identity: second.user_behind("alias", identity), "other", "@b:x")


@pytest_twisted.ensureDeferred
async def test_what_was_withheld_while_messages_were_lost_is_known_afterwards(
    two: tuple[TokenRegistry, TokenRegistry], own_server: OwnServer
) -> None:
    first, second = two
    await first.learn("alias", Slot("!room", "s"), "id", "@a:x", "PHONE", BOTH)
    assert await withheld(second) == frozenset()
    client = own_server.client
    client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    await first.set_withheld("alias", "id", CAMERA)
    await eventually(withheld, second, CAMERA)


@pytest_twisted.ensureDeferred
async def test_without_redis_each_guard_answers_from_its_cache(
    two: tuple[TokenRegistry, TokenRegistry], own_server: OwnServer
) -> None:
    first, second = two
    await first.learn("alias", Slot("!room", "s"), "id", "@a:x")
    assert await second.slot_of("alias") is not None
    own_server.stop()
    assert await second.slot_of("alias") == Slot("!room", "s")
    assert await first.user_behind("alias", "id") == "@a:x"
    await second.learn("other", Slot("!room", "t"), "id", "@b:x")
    assert set(await second.aliases_of("!room")) == {"alias", "other"}


@pytest_twisted.ensureDeferred
async def test_what_may_be_old_in_a_large_call_is_read_with_one_command(
    two: tuple[TokenRegistry, TokenRegistry], own_server: OwnServer
) -> None:
    first, second = two
    names = [f"id{number}" for number in range(50)]
    for name in names:
        await first.learn("alias", Slot("!room", "s"), name, "@a:x", "PHONE", BOTH)
    await second.read_ahead("alias", names)
    await until_subscribed_again(own_server)
    await second.read_ahead("alias", names)
    before = commands(own_server)
    assert [await second.user_behind("alias", name) for name in names] == 50 * ["@a:x"]
    assert commands(own_server) == before


@pytest_twisted.ensureDeferred
async def test_what_redis_has_lost_is_written_again(
    two: tuple[RedisTokenRegistry, RedisTokenRegistry], own_server: OwnServer
) -> None:
    first, second = two
    await first.learn("alias", Slot("!room", "s"), "id", "@a:x", "PHONE", BOTH, CAMERA)
    await until(lambda: len(own_server.client.keys("*{alias}*")) == 2)
    own_server.client.flushall()
    first.data_set_changed()
    await first.read_ahead("alias", ["id", "id#screen"])
    await eventually(lambda identity: second.user_behind("alias", identity), "id", "@a:x")
    assert await withheld(second) == CAMERA
    assert await second.slot_of("alias") == Slot("!room", "s")


def commands(server: OwnServer) -> int:
    """Reads of single keys that the server has answered."""
    return int(server.client.info("commandstats").get("cmdstat_get", {"calls": 0})["calls"])


async def until_subscribed_again(server: OwnServer) -> None:
    before = int(server.client.info("clients")["connected_clients"])
    server.client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    await until(lambda: server.client.info("clients").get("pubsub_clients", before) >= 2)
    await deferLater(reactor, 0.1)


@pytest_twisted.ensureDeferred
async def test_who_asks_while_another_is_asking_learns_the_same(two: tuple[TokenRegistry, TokenRegistry]) -> None:
    first, second = two
    await first.learn("alias", Slot("!room", "slot"), "hash", "@alice:x", "PHONE", BOTH, frozenset())
    await eventually(lambda registry: registry.slot_of("alias"), second, Slot("!room", "slot"))
    asking = [Deferred.fromCoroutine(second.user_behind("alias", "hash")) for _ in range(3)]
    assert await gatherResults(asking) == ["@alice:x"] * 3


@pytest_twisted.ensureDeferred
async def test_who_asks_while_a_listing_is_read_ahead_learns_the_same(two: tuple[TokenRegistry, TokenRegistry]) -> None:
    first, second = two
    await first.learn("alias", Slot("!room", "slot"), "hash", "@alice:x", "PHONE", BOTH, frozenset())
    await eventually(lambda registry: registry.slot_of("alias"), second, Slot("!room", "slot"))
    ahead = Deferred.fromCoroutine(second.read_ahead("alias", ["hash"]))
    cancelled = Deferred.fromCoroutine(second.user_behind("alias", "hash"))
    cancelled.addErrback(lambda failure: failure.trap(CancelledError))
    asking = Deferred.fromCoroutine(second.user_behind("alias", "hash"))
    cancelled.cancel()
    assert await asking == "@alice:x"
    await ahead


@pytest_twisted.ensureDeferred
async def test_a_question_that_was_cancelled_is_asked_again(two: tuple[TokenRegistry, TokenRegistry]) -> None:
    first, second = two
    await first.learn("alias", Slot("!room", "slot"), "hash", "@alice:x", "PHONE", BOTH, frozenset())
    await eventually(lambda registry: registry.slot_of("alias"), second, Slot("!room", "slot"))
    cancelled = Deferred.fromCoroutine(second.user_behind("alias", "hash"))
    asking = Deferred.fromCoroutine(second.user_behind("alias", "hash"))
    cancelled.addErrback(lambda failure: failure.trap(CancelledError))
    cancelled.cancel()
    assert await asking == "@alice:x"
    assert await second.user_behind("alias", "hash") == "@alice:x"
