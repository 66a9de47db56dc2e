# SPDX-License-Identifier: Apache-2.0
"""Everything that a guard needs to share its seats and its account with others, put together."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from attrs import frozen
from twisted.internet.interfaces import IReactorTime

from lotusguard.clients.redis.client import RedisClient
from lotusguard.clients.redis.faults import ADVICE
from lotusguard.guard.seats.failover import FailoverSeatBook, guard_name
from lotusguard.guard.seats.memory import MemorySeatBook
from lotusguard.guard.seats.redis.account import TURN_INTERVAL, AccountTurns
from lotusguard.guard.seats.redis.book import RENEW_INTERVAL, RedisSeatBook
from lotusguard.guard.seats.redis.epoch import HEARTBEAT_INTERVAL, Rebuilding
from lotusguard.guard.seats.redis.leases import RoomLeases
from lotusguard.guard.seats.redis.own import OwnHolds
from lotusguard.guard.seats.redis.registry import RedisTokenRegistry
from lotusguard.guard.seats.registry import MemoryTokenRegistry
from lotusguard.metrics import Metrics
from lotusguard.rules.redis_address import parse_address


@frozen
class Sharing:
    """The seats of one guard among several.

    :ivar guard: this guard's name.
    :ivar turns: which guard listens in the rooms of the account.
    """

    guard: str
    redis: RedisClient
    book: FailoverSeatBook
    shared: RedisSeatBook
    rebuilding: Rebuilding
    leases: RoomLeases
    turns: AccountTurns

    @classmethod
    def create(
        cls,
        url: str,
        reactor: Any,
        metrics: Metrics,
        wall: Callable[[], float],
        seat_ttl: float,
        guarding_since: float,
    ) -> Sharing:
        """:raises ValueError: the URL cannot be used."""
        guard, own = guard_name(), OwnHolds(reactor)
        redis = RedisClient(parse_address(url), reactor, metrics)
        rebuilding = Rebuilding(redis, guard, reactor)
        shared = RedisSeatBook(redis, reactor, seat_ttl, guarding_since, rebuilding, own)

        def alone() -> MemorySeatBook:
            return MemorySeatBook(None, reactor, wall, metrics, seat_ttl, reactor.seconds())

        book = FailoverSeatBook(redis, shared, alone, own, reactor, wall, seat_ttl)
        rebuilding.give_back = book.give_back
        turns = AccountTurns(redis, guard, reactor)
        return cls(guard, redis, book, shared, rebuilding, RoomLeases(redis, guard, reactor), turns)

    def registry(self, own: MemoryTokenRegistry, clock: IReactorTime) -> RedisTokenRegistry:
        """The shared registry. :param own: becomes this guard's cache."""
        registry = RedisTokenRegistry(self.redis, own, self.guard, clock)
        self.rebuilding.on_data_set.append(registry.data_set_changed)
        return registry

    def when_shared(self, callback: Callable[[], None]) -> None:
        """Register a callback for the moments at which it is known again who holds the seats of all rooms."""
        self.rebuilding.on_complete.append(callback)
        self.book.on_shared.append(lambda: callback() if self.rebuilding.complete else None)

    def start(self) -> None:
        self.redis.start()

    async def stop(self) -> None:
        await self.leases.hand_over()
        self.rebuilding.stop()
        self.shared.stop()
        self.redis.stop()

    def upkeep(self) -> Sequence[tuple[str, float, Callable[[], Awaitable[None]]]]:
        """What has to be done again and again: its name, the interval in seconds, and the work."""
        return (
            ("renewing requests in flight", RENEW_INTERVAL, self.book.renew),
            ("telling other guards of this one", HEARTBEAT_INTERVAL, self.rebuilding.heartbeat),
            ("taking turns to listen in rooms", TURN_INTERVAL, self.turns.take_turns),
        )

    def fault(self) -> str:
        """Why the seats are not shared now, and what to do; "" if they are."""
        fault = self.redis.fault or (self.redis.trouble if self.book.unshared else "")
        if fault:
            return f"Redis: {fault}. {ADVICE.get(fault, '')}".strip()
        if self.book.unshared:
            return "Redis: no answer a moment ago"
        if self.redis.message_fault:
            fault = self.redis.message_fault
            return f"Redis: messages of other guards do not arrive: {fault}. {ADVICE.get(fault, '')}".strip()
        return "" if self.rebuilding.complete else "Redis: what it may have lost is being collected"
