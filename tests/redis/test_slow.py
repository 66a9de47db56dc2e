# SPDX-License-Identifier: Apache-2.0
"""A Redis that answers late, or whose answers are lost."""

from __future__ import annotations

from secrets import token_hex
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from lotusguard.clients.redis.client import RedisClient
from lotusguard.guard.lobby import Lobby
from lotusguard.guard.seats.redis.book import RedisSeatBook
from lotusguard.guard.seats.redis.leases import RoomLeases
from lotusguard.metrics import Metrics
from lotusguard.rules.redis_address import parse_address
from lotusguard.sandbox.demo.sandbox import Sandbox
from tests.calls import ALICE, counted, put_policy
from tests.conftest import StartSandbox, until

from .conftest import OwnServer
from .guards import PATIENT, guards, reactor
from .slow import slow_proxy
from .test_seat_book import issue, join, listed

DELAY = 0.3
ROUNDS = 4


def crowd(sandbox: Sandbox, limit: int) -> tuple[str, list[str]]:
    """A room with a limit, and users who are joined to it."""
    users = [f"@u{number}:sandbox.local" for number in range(ROUNDS + limit)]
    for user in users:
        sandbox.homeserver.add_user(user.split(":")[0][1:])
    room_id = sandbox.homeserver.create_room(creator=ALICE, joined=users)
    put_policy(sandbox, room_id, limit)
    return room_id, users


async def seconds(sandbox: Sandbox, user: str, room_id: str, code: int) -> float:
    began = reactor.seconds()
    assert (await sandbox.ask_token(user, room_id)).code == code
    return float(reactor.seconds() - began)


@pytest_twisted.ensureDeferred
async def test_a_join_costs_two_round_trips_at_most(start_sandbox: StartSandbox, own_server: OwnServer) -> None:
    async with slow_proxy(own_server.port) as proxy:
        sandbox = await start_sandbox(guard_redis_url=proxy.url)
        rooms = [crowd(sandbox, 2) for _ in range(ROUNDS)]
        _, waiting = rooms[0]
        await sandbox.ask_token(waiting[0], sandbox.homeserver.create_room(creator=ALICE, joined=waiting))
        proxy.delay = DELAY
        first = [await seconds(sandbox, users[0], room_id, 200) for room_id, users in rooms]
        second = [await seconds(sandbox, users[1], room_id, 200) for room_id, users in rooms]
        again = [await seconds(sandbox, users[1], room_id, 200) for room_id, users in rooms]
        refused = [await seconds(sandbox, users[2], room_id, 403) for room_id, users in rooms]
        assert counted(sandbox, "fail_open_total", check="limit", reason="redis") == 0
        proxy.delay = 0.0
    for took in (first, second, again, refused):
        assert min(took) < 2.9 * DELAY, (first, second, again, refused)


@pytest_twisted.ensureDeferred
async def test_a_lost_redis_costs_a_join_nothing_once_that_is_known(
    start_sandbox: StartSandbox, own_server: OwnServer
) -> None:
    sandbox = await start_sandbox(guard_redis_url=own_server.url)
    room_id, users = crowd(sandbox, 2)
    assert (await sandbox.ask_token(users[0], room_id)).code == 200
    own_server.client.execute_command("CLIENT", "PAUSE", 600_000, "ALL")  # it is there, and gives no answer
    await until(lambda: counted(sandbox, "circuit_open", dependency="redis") == 1, 60)
    took = [await seconds(sandbox, users[1], room_id, 200) for _ in range(ROUNDS)]
    assert min(took) < DELAY
    assert counted(sandbox, "fail_open_total", check="limit", reason="redis") == ROUNDS


@pytest_twisted.ensureDeferred
async def test_a_full_room_is_full_although_a_join_waited_for_other_guards(
    start_sandbox: StartSandbox, own_server: OwnServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = await start_sandbox(
        guard_redis_url=own_server.url, guard_lookup_timeout=1.0, guard_reconcile_interval=3600
    )
    room_id, users = crowd(sandbox, 1)
    await sandbox.enter(users[0], room_id)
    assert (await sandbox.ask_token(users[2], room_id)).code == 403  # the call is listed by now
    take = RedisSeatBook.take

    async def take_late(*args: Any, **kwargs: Any) -> Any:
        await deferLater(reactor, 1.5)
        return await take(*args, **kwargs)

    monkeypatch.setattr(RedisSeatBook, "take", take_late)
    assert (await sandbox.ask_token(users[1], room_id)).code == 403


@pytest.mark.parametrize(("part", "method", "check"), [(RedisSeatBook, "take", "limit"), (Lobby, "ask", "lobby")])
@pytest_twisted.ensureDeferred
async def test_a_join_waits_for_redis_until_its_deadline_at_most(
    start_sandbox: StartSandbox, own_server: OwnServer, monkeypatch: pytest.MonkeyPatch, part: Any, method: str,
    check: str,
) -> None:  # fmt: skip
    sandbox = await start_sandbox(guard_redis_url=own_server.url, guard_lookup_timeout=0.5, guard_upstream_timeout=0.5)
    room_id, users = crowd(sandbox, 1)
    sandbox.homeserver.set_state(room_id, "io.lotus.lobby", {"enabled": check == "lobby"})

    async def never(*args: Any, **kwargs: Any) -> Any:
        await Deferred()

    monkeypatch.setattr(part, method, never)
    assert (await sandbox.ask_token(users[0], room_id)).code == 504
    assert counted(sandbox, "fail_open_total", check=check, reason="timeout") == 1
    assert counted(sandbox, "fail_open_total", check="limit", reason="redis") == 0


@pytest_twisted.ensureDeferred
async def test_answers_that_are_lost_after_the_work_was_done_cost_no_seat(own_server: OwnServer, room: str) -> None:
    async with slow_proxy(own_server.port) as proxy, guards(proxy.url, 1) as (guard,):
        await listed(guard, room, 2)
        for user in ("a", "b"):
            proxy.loses_answers = True
            reactor.callLater(0.2, setattr, proxy, "loses_answers", False)
            await issue(guard, room, user, 2)
        assert proxy.lost > 0
        await until(lambda: guard.client.available and not guard.book.unshared, 30)
        await guard.rebuilding.wait()
        assert not await join(guard, room, "c", 2)
        (snapshot,) = [found for found in await guard.book.snapshots() if found.room_id == room]
        assert snapshot.seats_taken == 2


@pytest_twisted.ensureDeferred
async def test_a_guard_that_slept_over_the_end_of_its_lease_does_not_act(own_server: OwnServer, room: str) -> None:
    async with slow_proxy(own_server.port) as proxy:
        client = RedisClient(parse_address(proxy.url), reactor, Metrics(), timeout=PATIENT)
        client.start()
        await until(lambda: client.available)
        leases = RoomLeases(client, token_hex(4), reactor, 0.5)
        assert await leases.acquire(room)
        assert await leases.confirms(room)
        proxy.delay = 2.0  # the answer was right when Redis gave it
        assert await leases.acquire(room) is False
        assert await leases.confirms(room) is False
        client.stop()


@pytest_twisted.ensureDeferred
async def test_a_guard_whose_question_about_its_lease_is_not_answered_does_not_act(
    own_server: OwnServer, room: str
) -> None:
    client = RedisClient(parse_address(own_server.url), reactor, Metrics(), timeout=0.3)
    client.start()
    await until(lambda: client.available)
    leases = RoomLeases(client, token_hex(4), reactor, 60.0)
    assert await leases.acquire(room)
    own_server.client.execute_command("CLIENT", "PAUSE", 60_000, "ALL")
    assert await leases.confirms(room) is False
    assert await leases.acquire(room) is False
    while client.available:
        await leases.acquire(room)
    assert await leases.acquire(room), "without Redis every guard acts for itself"
    await deferLater(reactor, 0)
    client.stop()
