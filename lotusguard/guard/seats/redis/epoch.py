# SPDX-License-Identifier: Apache-2.0
"""Noticing that Redis may have lost something, and waiting until the guards have given back their holds.

Redis confirms writes before they are on its disk or on a replica. After a restart or a failover, holds that were issued
may be gone: nobody new is seated in a room with a limit until every guard of the last seconds has given back its own.

A data set has a name: the server's epoch, and a *generation* that the first guard wrote into it. If everything is
deleted while the server runs (``FLUSHALL``), or the server comes back with older data, the generation is another one.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from secrets import token_hex
from typing import Any

from attrs import define, field
from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from lotusguard.clients.failures import DependencyFailed
from lotusguard.clients.redis.client import RedisClient, Script
from lotusguard.clients.redis.link import ServerInfo, read_info
from lotusguard.clients.waiting import fire_all, run_in_background
from lotusguard.guard.seats.redis.generation import RECORD, Generation, Question
from lotusguard.guard.seats.redis.scripts import PREFIX, lua

log = Logger()

HEARTBEAT_INTERVAL = 1.0
GUARD_SEEN = 30.0
"""Seconds after which a guard that has not been seen is not waited for."""
REBUILD_LONGEST = 5.0
"""Seconds for which the holds of other guards are waited for."""
_POLL = 0.1
SEEN = f"{PREFIX}{{guards}}:seen"
"""Key: the guards by the time they were last seen."""
GUARDS_KEPT, RECORD_KEPT = 120, 2 * 86400
"""Seconds after the last heartbeat of all guards until Redis deletes these keys. Rooms are kept for a day at most."""
NAMED_WITHIN = 1.0
"""Seconds for which a step on a new connection waits until the data set has a name."""

HEARTBEAT = Script(
    f"local GUARD_SEEN, GUARDS_KEPT, RECORD_KEPT = {GUARD_SEEN}, {GUARDS_KEPT}, {RECORD_KEPT}\n" + lua("heartbeat")
)


@define(eq=False)
class Rebuilding:
    """Whether the data set can be relied on.

    :param guard: this guard's name, which no other has.
    :param longest: seconds for which the holds of other guards are waited for.
    :ivar give_back: gives this guard's holds to Redis. Set before the client is started.
    :ivar on_data_set: called when the data set turns out to be another one than before.
    :ivar on_complete: called when the data set is complete.
    :ivar guards: the guards seen lately.
    :ivar data_set: the name of the data set; "" while it is not known.
    """

    _redis: RedisClient
    _guard: str
    _reactor: Any
    _longest: float = REBUILD_LONGEST
    give_back: Callable[[], Awaitable[None]] = field(init=False)
    on_data_set: list[Callable[[], None]] = field(init=False, factory=list)
    on_complete: list[Callable[[], None]] = field(init=False, factory=list)
    guards: list[str] = field(init=False, factory=list)
    complete: bool = field(init=False, default=False)
    data_set: str = field(init=False, default="")
    _asked: Generation = field(init=False)
    _epoch: str = field(init=False, default="")
    _generation: str = field(init=False, default="")
    _fresh: bool = field(init=False, default=False)
    _running: Deferred[Any] | None = field(init=False, default=None)
    _waiting: dict[Deferred[None], None] = field(init=False, factory=dict)  # in the order in which they came
    _unnamed: dict[Deferred[None], None] = field(init=False, factory=dict)

    def __attrs_post_init__(self) -> None:
        self._asked = Generation(self._redis, self._reactor)
        self._redis.on_server.append(self._connected)

    async def wait(self) -> None:
        """Wait until the data set is complete. :raises DependencyFailed: that takes too long."""
        if not self.complete:
            await self._wait(self._waiting, self._longest + 1.0)

    async def named(self) -> str:
        """The name of the data set. :raises DependencyFailed: it is not known soon."""
        if not self.data_set:
            await self._wait(self._unnamed, NAMED_WITHIN)
        return self.data_set

    def ask_generation(self) -> Question:
        """Ask for the generation that Redis has after everything that is sent in this turn of the reactor."""
        return self._asked.ask()

    async def still(self, data_set: str, question: Question) -> bool:
        """Whether Redis has this data set still. :raises DependencyFailed: Redis gives no usable answer."""
        generation = await question.answer()
        return data_set == f"{self._epoch}.{generation}"

    async def look_again(self) -> None:
        """See whether the data set is another one by now. :raises DependencyFailed: Redis gives no usable answer."""
        await self._beat(given_back=self.complete)
        if not self.complete and self._running is None:
            self._rebuild()

    async def heartbeat(self) -> None:
        """Say that this guard is alive; call it every `HEARTBEAT_INTERVAL`."""
        if not self._redis.available or self._running is not None:
            return
        with suppress(DependencyFailed):  # the next one says so
            await self.look_again()

    def stop(self) -> None:
        if self._running is not None:
            self._running.cancel()
        _fire(self._waiting)
        _fire(self._unnamed)

    async def _wait(self, waiting: dict[Deferred[None], None], seconds: float) -> None:
        waiter: Deferred[None] = Deferred()
        waiting[waiter] = None
        try:
            await waiter.addTimeout(seconds, self._reactor)
        except TimeoutError:
            raise DependencyFailed("redis", "rebuilding") from None
        finally:
            waiting.pop(waiter, None)

    def _connected(self, server: ServerInfo) -> None:
        if server.epoch != self._epoch:
            self._epoch, self.complete, self.data_set = server.epoch, False, ""
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
        """Announce the data set, give back the holds, and wait for the other guards."""
        given: str | None = None
        while self._redis.available:  # else the next connection begins anew
            with suppress(DependencyFailed):
                await self._beat(given_back=given == self.data_set != "")
                if self.complete and given == self.data_set:
                    return
                if given != self.data_set:
                    data_set = self.data_set
                    await self.give_back()
                    given = data_set
                    continue
            await deferLater(self._reactor, _POLL)

    async def _beat(self, *, given_back: bool) -> None:
        request = {
            "epoch": self._epoch,
            "generation": self._generation,
            "proposed": token_hex(6),
            "guard": self._guard,
            "seen": self.guards if not self.complete else [],
            "given_back": given_back,
            "fresh": self._fresh,
            "longest": self._longest,
        }
        epoch = self._epoch
        answer = await self._redis.run(HEARTBEAT, (SEEN, RECORD), json.dumps(request))
        generation, complete, guards = json.loads(answer)
        if epoch != self._epoch:  # there is another connection by now
            return
        named = f"{epoch}.{generation}"
        if self.data_set not in ("", named) and await self._renamed(epoch):
            return
        if self.data_set != named:
            self.guards = sorted({*self.guards, *guards})
            self._changed(epoch, generation)
            return
        self.guards = list(guards) if self.complete else sorted({*self.guards, *guards})
        if complete and given_back and not self.complete:
            self.complete, self.guards = True, list(guards)
            _fire(self._waiting)
            for told in self.on_complete:
                told()

    async def _renamed(self, epoch: str) -> bool:
        """Whether the server has another epoch by now. A server that runs changes its replication ID when its first
        replica comes, and an hour after the last one has left.
        """
        server = read_info(await self._redis.call("INFO"))
        if server.epoch != self._epoch:
            self._connected(server)
        return self._epoch != epoch

    def _changed(self, epoch: str, generation: str) -> None:
        if self._generation:
            log.warn(
                "Redis may have lost seats: it was restarted, another server took over, its data were deleted, or its "
                "replication ID changed",
                event_name="redis_epoch",
            )
        self.complete, self._generation, self.data_set = False, generation, f"{epoch}.{generation}"
        for told in self.on_data_set:
            told()
        _fire(self._unnamed)


def _fire(waiting: dict[Deferred[None], None]) -> None:
    fire_all(list(waiting), None)


def _report(failure: Failure) -> None:
    if not failure.check(DependencyFailed):
        log.failure("giving back holds to Redis failed", failure)
