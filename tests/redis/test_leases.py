# SPDX-License-Identifier: Apache-2.0
"""One guard at a time reconciles a room. When it is killed, another one takes over."""

from __future__ import annotations

from collections.abc import AsyncIterator
from secrets import token_hex

import pytest
import pytest_twisted
from twisted.internet.task import deferLater

from lotusguard.clients.redis.client import RedisClient
from lotusguard.guard.seats.redis.leases import RoomLeases
from lotusguard.metrics import Metrics
from lotusguard.rules.redis_address import parse_address
from tests.calls import ALICE, BOB, old_token, room_of
from tests.conftest import StartSandbox, until

from .conftest import OwnServer
from .guards import PATIENT, reactor

SHORT = 0.3


@pytest_twisted.async_yield_fixture
async def client(url: str) -> AsyncIterator[RedisClient]:
    client = RedisClient(parse_address(url), reactor, Metrics(), timeout=PATIENT)
    client.start()
    await until(lambda: client.available)
    yield client
    client.stop()


def leases(client: RedisClient, seconds: float = 60.0) -> RoomLeases:
    return RoomLeases(client, token_hex(4), reactor, seconds)


async def take_over(leases: RoomLeases, room: str) -> None:
    end = reactor.seconds() + 15
    while not await leases.acquire(room):
        assert reactor.seconds() < end, "the lease did not expire"
        await deferLater(reactor, 0.02)


@pytest_twisted.ensureDeferred
async def test_one_guard_at_a_time_has_the_lease_of_a_room(client: RedisClient, room: str) -> None:
    first, second = leases(client), leases(client)
    assert await first.acquire(room)
    assert not await second.acquire(room)
    assert await first.acquire(room)
    assert await first.confirms(room)
    assert not await second.confirms(room)


@pytest_twisted.ensureDeferred
async def test_a_guard_that_stops_hands_its_leases_over(client: RedisClient, room: str) -> None:
    first, second = leases(client), leases(client)
    assert await first.acquire(room)
    await first.hand_over()
    assert await second.acquire(room)


@pytest_twisted.ensureDeferred
async def test_the_lease_of_a_killed_guard_expires_and_its_token_is_worth_nothing(
    client: RedisClient, room: str
) -> None:
    killed, other = leases(client, SHORT), leases(client)
    assert await killed.acquire(room)
    await take_over(other, room)
    assert not await killed.confirms(room)
    assert await other.confirms(room)
    assert other.held[room] > killed.held[room]


@pytest_twisted.ensureDeferred
async def test_a_guard_is_told_when_the_lease_of_a_killed_one_has_ended(client: RedisClient, room: str) -> None:
    killed, other = leases(client, SHORT), leases(client)
    ended: list[str] = []
    other.ended = ended.append
    assert await killed.acquire(room)
    assert not await other.acquire(room)
    await until(lambda: bool(ended))
    assert ended == [room]
    await take_over(other, room)


@pytest_twisted.ensureDeferred
async def test_a_guard_does_not_wait_for_a_lease_that_lasts_or_after_it_stopped(client: RedisClient, room: str) -> None:
    holder, short, other = leases(client), leases(client, SHORT), leases(client)
    ended: list[str] = []
    other.ended = ended.append
    assert await holder.acquire(room)
    assert await short.acquire(room + "short")
    assert not await other.acquire(room)
    assert not await other.acquire(room + "short")
    await other.hand_over()
    await deferLater(reactor, 2 * SHORT)
    assert not ended


@pytest_twisted.ensureDeferred
async def test_a_token_of_an_earlier_lease_of_the_same_guard_is_worth_nothing(client: RedisClient, room: str) -> None:
    guard, other = leases(client, SHORT), leases(client, SHORT)
    assert await guard.acquire(room)
    earlier = guard.held[room]
    await take_over(other, room)
    await take_over(guard, room)
    assert guard.held[room] > earlier
    guard.held[room] = earlier
    assert not await guard.confirms(room)


@pytest_twisted.ensureDeferred
async def test_nobody_is_removed_under_a_lease_that_another_guard_has_by_now(
    start_sandbox: StartSandbox, own_server: OwnServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[str] = []

    async def confirms(self: RoomLeases, room_id: str) -> bool:
        lost.append(room_id)
        return False

    sandbox = await start_sandbox(guard_redis_url=own_server.url, guard_reconcile_interval=0.2)
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)
    with monkeypatch.context() as patched:
        patched.setattr(RoomLeases, "confirms", confirms)
        late = sandbox.livekit.connect(old_token(BOB, room_id))
        await until(lambda: len(lost) > 2)
        assert late.connected
    await until(lambda: not late.connected)


@pytest_twisted.ensureDeferred
async def test_a_room_is_taken_over_when_the_lease_of_a_killed_guard_ends(
    start_sandbox: StartSandbox, own_server: OwnServer
) -> None:
    client = RedisClient(parse_address(own_server.url), reactor, Metrics(), timeout=PATIENT)
    client.start()
    await until(lambda: client.available)
    sandbox = await start_sandbox(guard_redis_url=own_server.url, guard_reconcile_interval=3600.0)
    room_id = room_of(sandbox, 1)
    assert await leases(client, 2.0).acquire(room_id)
    await sandbox.enter(ALICE, room_id)
    late = sandbox.livekit.connect(old_token(BOB, room_id))
    await sandbox.livekit.drained()
    await until(lambda: not late.connected, 30)
    client.stop()


@pytest_twisted.ensureDeferred
async def test_three_guards_do_not_ask_each_other_without_end(
    start_sandbox: StartSandbox, own_server: OwnServer
) -> None:
    """An urgent change reaches a guard without the lease: it asks whoever has it, once."""
    settings = {"guard_redis_url": own_server.url, "guard_reconcile_interval": 3600.0}
    sandbox = await start_sandbox(**settings)
    first, hooks = sandbox.guard, list(sandbox.livekit.webhooks.urls)
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)  # the first guard reconciles the room
    await sandbox.livekit.drained()
    await first.enforcement.worker.idle()
    others = []
    for _ in range(2):
        await sandbox.start_guard(**settings)
        others.append(sandbox.guard)
    sandbox.livekit.webhooks.urls[:] = hooks
    before = own_server.client.info("commandstats").get("cmdstat_publish", {}).get("calls", 0)
    late = sandbox.livekit.connect(old_token(BOB, room_id))
    for alias in [late.room.name] * 2:
        others[0].enforcement.enforce(alias)
        await until(lambda: not late.connected)
        for guard in (first, *others) * 10:
            await guard.enforcement.worker.idle()
            await sandbox.operator("GET", "/rooms")
    asked = own_server.client.info("commandstats")["cmdstat_publish"]["calls"] - before
    assert 0 < asked < 20
    for guard in (first, others[0]):
        await guard.stopService()
