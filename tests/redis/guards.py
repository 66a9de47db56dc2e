# SPDX-License-Identifier: Apache-2.0
"""Guards' seat books over a real Valkey."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from attrs import define
from twisted.internet import reactor as default_reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall, deferLater

from lotusguard.clients.redis.client import RedisClient
from lotusguard.guard.seats.failover import FailoverSeatBook, guard_name
from lotusguard.guard.seats.memory import MemorySeatBook
from lotusguard.guard.seats.redis.book import RedisSeatBook
from lotusguard.guard.seats.redis.epoch import Rebuilding
from lotusguard.guard.seats.redis.own import OwnHolds
from lotusguard.metrics import Metrics
from lotusguard.rules.redis_address import parse_address
from tests.conftest import until

reactor: Any = default_reactor
LEASE, REBUILD = 2.5, 1.0
"""Shorter than the service's: tests wait for them."""
PATIENT = 15.0
"""Seconds for a call to Redis: the machine may be busy."""


@define
class GuardSeats:
    """The parts of a guard that deal with seats. They do upkeep more often than the service."""

    client: RedisClient
    shared: RedisSeatBook
    rebuilding: Rebuilding
    book: FailoverSeatBook
    _upkeep: list[LoopingCall]

    @classmethod
    def start(cls, url: str, seat_ttl: float = 30.0) -> GuardSeats:
        metrics = Metrics()
        client = RedisClient(parse_address(url), reactor, metrics, timeout=PATIENT)
        rebuilding = Rebuilding(client, guard_name(), reactor, REBUILD)
        own = OwnHolds(reactor)
        since = reactor.seconds()
        shared = RedisSeatBook(client, reactor, seat_ttl, since, rebuilding, own, LEASE)

        def alone() -> MemorySeatBook:
            return MemorySeatBook(None, reactor, time.time, metrics, seat_ttl, reactor.seconds())

        book = FailoverSeatBook(client, shared, alone, own, reactor, time.time, seat_ttl)
        rebuilding.give_back = book.give_back
        upkeep = []
        for interval, work in ((0.2, book.renew), (0.2, rebuilding.heartbeat)):
            call = LoopingCall(lambda work=work: Deferred.fromCoroutine(work()))
            call.start(interval, now=False)
            upkeep.append(call)
        client.start()
        return cls(client, shared, rebuilding, book, upkeep)

    def kill(self) -> None:
        """End without giving anything back, as a process that is killed."""
        for call in self._upkeep:
            if call.running:
                call.stop()
        self.rebuilding.stop()
        self.shared.stop()
        self.client.stop()


@asynccontextmanager
async def guards(url: str, count: int, seat_ttl: float = 30.0) -> AsyncIterator[Sequence[GuardSeats]]:
    """Guards that share one server, when all are connected."""
    started = [GuardSeats.start(url, seat_ttl) for _ in range(count)]
    try:
        for guard in started:
            await guard.rebuilding.wait()
        yield started
    finally:
        for guard in started:
            guard.kill()
        await deferLater(reactor, 0.02)  # the connections are closed


async def share_again(*started: GuardSeats) -> None:
    """Wait until guards that had lost their connection all share their seats in a complete data set.

    Each of them must be connected: until then, what it says of the data set is about the one before.
    """

    def shares(guard: GuardSeats) -> bool:
        return guard.client.available and not guard.book.unshared and guard.rebuilding.complete

    await until(lambda: all(shares(guard) for guard in started), 30)
