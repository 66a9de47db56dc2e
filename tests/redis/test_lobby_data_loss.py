# SPDX-License-Identifier: Apache-2.0
"""Lobby entries whose Redis loses its data at a moment at which a guard reads all of them."""

from __future__ import annotations

import json
from typing import Any

import pytest_twisted
from twisted.internet.task import Clock

from lotusguard.clients.circuit_breaker import FAILURES_TO_OPEN
from lotusguard.guard.lobby.redis.replica import Replica
from tests.conftest import until

from .conftest import OwnServer
from .test_shared_lobby import BOB, S, lobbies


@pytest_twisted.ensureDeferred
async def test_a_removal_is_given_back_if_everything_was_deleted_while_the_guards_were_alone(
    own_server: OwnServer, room: str
) -> None:
    async with lobbies(own_server.url) as guards:
        await guards[0].lobby.remove(room, BOB, "")
        await guards[1].knows(room, S.REMOVED)
        for guard in guards:
            guard.client.breaker.failures = FAILURES_TO_OPEN  # it makes no calls
            await guard.lobby.pass_time()
            assert guard.entries.alone
        own_server.client.flushall()
        for guard in guards:
            guard.client.breaker.succeeded()
            await guard.lobby.pass_time()
        await until(lambda: not any(guard.entries.alone for guard in guards))
        for guard in guards:
            assert guard.lobby.state_of(room, BOB) is S.REMOVED
            assert await guard.lobby.read(room, BOB) is S.REMOVED


@pytest_twisted.ensureDeferred
async def test_a_removal_is_given_back_if_everything_was_deleted_while_the_subscription_was_lost(
    own_server: OwnServer, room: str
) -> None:
    async with lobbies(own_server.url, 1) as (guard,):
        await guard.lobby.remove(room, BOB, "")
        own_server.client.flushall()
        guard.client.subscribe_again()
        async with lobbies(own_server.url, 1) as (other,):
            await other.knows(room, S.REMOVED)
        assert guard.lobby.state_of(room, BOB) is S.REMOVED


@pytest_twisted.ensureDeferred
async def test_nothing_ends_if_everything_is_deleted_while_all_entries_are_read(room: str) -> None:
    told = {"id": "1", "user": BOB, "state": "removed", "began": "0", "expires": "99", "notice": "", "version": 5}

    class Redis:
        """It loses its data before it is asked for a page."""

        async def run(self, script: object, keys: object, request: str) -> str:
            if not json.loads(request)["operations"]:
                return json.dumps(["1", 5, "born", [], []])
            return json.dumps(["1", 0, "born again", [], [["", []]]])

    redis: Any = Redis()
    replica = Replica(redis, "own", Clock(), 600.0, lambda key: False)
    await replica.ask()
    replica.take_over(room, told)
    await replica.read_all()
    assert replica.book.get(room, BOB) is not None
