# SPDX-License-Identifier: Apache-2.0
"""Noticing that Redis may have lost something, and waiting until the guards have given back their holds.

Redis confirms writes before they are on its disk or on a replica. After a restart or a failover, holds that were issued
may be gone: nobody new is seated in a room with a limit until every guard of the last seconds has given back its own.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from attrs import define, field
from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from lotusguard.clients.failures import DependencyFailed
from lotusguard.clients.redis.client import RedisClient, Script
from lotusguard.clients.redis.link import ServerInfo
from lotusguard.clients.waiting import fire_all, run_in_background
from lotusguard.guard.seats.redis.scripts import PREFIX, lua

log = Logger()

HEARTBEAT_INTERVAL = 1.0
GUARD_SEEN = 30.0
"""Seconds after which a guard that has not been seen is not waited for."""
REBUILD_LONGEST = 5.0
"""Seconds for which the holds of other guards are waited for."""
_POLL = 0.1
SEEN, RECORD = f"{PREFIX}{{guards}}:seen", f"{PREFIX}{{guards}}:epoch"
"""Keys: the guards by the time they were last seen; what is known of the data set."""

HEARTBEAT = Script(f"local GUARD_SEEN = {GUARD_SEEN}\n" + lua("heartbeat"))


@define(eq=False)
class Rebuilding:
    """Whether the data set can be relied on.

    :param guard: this guard's name, which no other has.
    :param longest: seconds for which the holds of other guards are waited for.
    :ivar give_back: gives this guard's holds to Redis. Set before the client is started.
    :ivar guards: the guards seen lately.
    """

    _redis: RedisClient
    _guard: str
    _reactor: Any
    _longest: float = REBUILD_LONGEST
    give_back: Callable[[], Awaitable[None]] = field(init=False)
    guards: list[str] = field(init=False, factory=list)
    complete: bool = field(init=False, default=False)
    _epoch: str = field(init=False, default="")
    _fresh: bool = field(init=False, default=False)
    _running: Deferred[Any] | None = field(init=False, default=None)
    _waiting: list[Deferred[None]] = field(init=False, factory=list)

    def __attrs_post_init__(self) -> None:
        self._redis.on_server.append(self._connected)

    async def wait(self) -> None:
        """Wait until the data set is complete. :raises DependencyFailed: that takes too long."""
        if self.complete:
            return
        waiting: Deferred[None] = Deferred()
        self._waiting.append(waiting)
        try:
            await waiting.addTimeout(self._longest + 1.0, self._reactor)
        except TimeoutError:
            raise DependencyFailed("redis", "rebuilding") from None

    async def heartbeat(self) -> None:
        """Say that this guard is alive; call it every `HEARTBEAT_INTERVAL`."""
        if not self._redis.available or self._running is not None:
            return
        try:
            known = await self._beat(given_back=True)
        except DependencyFailed:
            return
        if not known:  # the data set was deleted while the server ran
            self._rebuild()

    def stop(self) -> None:
        if self._running is not None:
            self._running.cancel()
        fire_all(self._waiting, None)

    def _connected(self, server: ServerInfo) -> None:
        if server.epoch != self._epoch:
            if self._epoch:
                log.warn(
                    "Redis may have lost seats: it was restarted, or another server took over", event_name="redis_epoch"
                )
            self._epoch, self.complete = server.epoch, False
            self._fresh = server.uptime < GUARD_SEEN
        self._reactor.callLater(0, self._rebuild)  # the connection can be used then

    def _rebuild(self) -> None:
        if self._running is not None:
            self._running.cancel()
        self._running = run_in_background(self._give_back(), _report)
        self._running.addBoth(self._ended, self._running)

    def _ended(self, _: object, ended: Deferred[Any]) -> None:
        if self._running is ended:
            self._running = None

    async def _give_back(self) -> None:
        """Announce the epoch, give back the holds, and wait for the other guards."""
        while True:
            try:
                await self._beat(given_back=False)
                await self.give_back()
                await self._beat(given_back=True)
                break
            except DependencyFailed:
                if not self._redis.available:
                    return  # the next connection begins anew
            await deferLater(self._reactor, _POLL)
        while not self.complete and self._redis.available:
            await deferLater(self._reactor, _POLL)
            await self._beat(given_back=True)

    async def _beat(self, *, given_back: bool) -> bool:
        """:return: whether another guard, or this one, has announced this epoch before."""
        request = {
            "epoch": self._epoch,
            "guard": self._guard,
            "seen": self.guards if not self.complete else [],
            "given_back": given_back,
            "fresh": self._fresh,
            "longest": self._longest,
        }
        answer = await self._redis.run(HEARTBEAT, (SEEN, RECORD), json.dumps(request))
        known, complete, guards = json.loads(answer)
        self.guards = list(guards) if known or self.complete else sorted({*self.guards, *guards})
        if not known:
            self.complete = False
        elif complete and not self.complete:
            self.complete = True
            waiting, self._waiting = self._waiting, []
            fire_all(waiting, None)
        return bool(known)


def _report(failure: Failure) -> None:
    if not failure.check(DependencyFailed):
        log.failure("giving back holds to Redis failed", failure)
