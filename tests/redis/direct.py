# SPDX-License-Identifier: Apache-2.0
"""Guards' seat books on a real Valkey whose clock, connections and data are in a test's hands.

Every command is carried out at once, so that a test decides what comes between two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from itertools import count
from typing import Any

import valkey
from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from lotusguard.clients.failures import DependencyFailed
from lotusguard.clients.redis.client import NO_SCRIPT, Script
from lotusguard.clients.redis.link import ServerInfo, read_info
from lotusguard.guard.seats.failover import FailoverSeatBook, guard_name
from lotusguard.guard.seats.memory import MemorySeatBook
from lotusguard.guard.seats.redis.book import RedisSeatBook
from lotusguard.guard.seats.redis.epoch import Rebuilding
from lotusguard.guard.seats.redis.own import OwnHolds
from lotusguard.guard.seats.redis.scripts import STEP
from lotusguard.metrics import Metrics

from .server import shared_client

METRICS = Metrics()
STARTED = 1000.0
"""When the first guard was started, on the server's clock."""
Spy = Callable[[str, str], None]


class Crash(Enum):
    """What happens to the next command of a guard."""

    BEFORE = "the connection is lost before the work is done"
    AFTER = "the connection is lost after the work was done"
    DEATH = "the guard dies after the work was done"


@define(eq=False)
class Server:
    """One Valkey, for one test at a time.

    :ivar now: its clock. :ivar up: whether it answers.
    :ivar spy: told of each step on a room that is carried out: the room's key and the request.
    :ivar answered: the answer to that step.
    """

    now: float = STARTED
    up: bool = True
    names: Iterator[int] = field(factory=lambda: count(1))
    epoch: str = "epoch0"
    spy: Spy = field(default=lambda key, request: None)
    answered: str = ""
    client: Any = field(factory=shared_client)
    listeners: dict[str, list[Callable[[str], None]]] = field(factory=dict)
    _shas: dict[str, str] = field(factory=dict)

    def run(self, script: Script, keys: Sequence[str], arguments: Sequence[str]) -> Any:
        sha = self._shas.get(script.sha)
        if sha is None:
            text = script.text.replace("redis.call('TIME')", "redis.call('MGET', 'test:s', 'test:us')")
            sha = self._shas[script.sha] = self.client.script_load(text)
        seconds = int(self.now)
        self.client.mset({"test:s": seconds, "test:us": int((self.now - seconds) * 1e6)})
        try:
            answer = self.client.evalsha(sha, len(keys), *keys, *arguments)
        except valkey.exceptions.NoScriptError:
            del self._shas[script.sha]
            raise DependencyFailed("redis", NO_SCRIPT) from None
        if script is STEP:
            self.answered = _text(answer)
            self.spy(keys[0], arguments[0])
        return _text(answer)

    def command(self, *words: Any) -> Any:
        if words[0] == "TIME":
            return [str(int(self.now)), str(int(self.now % 1 * 1e6))]
        if words[0] == "INFO":
            return self.info
        if words[0] == "PUBLISH":
            for listener in self.listeners.get(words[1], ()):
                listener(words[2])
            return 0
        return _text(self.client.execute_command(*words))

    @property
    def info(self) -> str:
        return f"run_id:run\r\nmaster_replid:{self.epoch}\r\nredis_version:9.0.0\r\nuptime_in_seconds:3600\r\n"

    def snapshot(self) -> dict[bytes, bytes]:
        return {key: self.client.dump(key) for key in self.client.keys("lotusguard:*")}

    def replace(self, data: dict[bytes, bytes], *, same_server: bool = False) -> None:
        """Have another data set, as after a restart or a failover."""
        keys = self.client.keys("lotusguard:*")
        if keys:
            self.client.delete(*keys)
        for key, dumped in data.items():
            self.client.restore(key, 600_000, dumped)
        if not same_server:
            self.epoch = f"epoch{next(self.names)}"


def _text(answer: Any) -> Any:
    if isinstance(answer, bytes):
        return answer.decode()
    return [_text(item) for item in answer] if isinstance(answer, list) else answer


@define(eq=False)
class DirectClient:
    """The part of `RedisClient` that seat books use.

    :ivar crash: what happens to the command after so many others. :ivar dead: whether its guard has died.
    :ivar rejects: whether every command fails, as writes do on a server without memory.
    :ivar answers_late: answers to scripts arrive when this fires.
    """

    server: Server
    clock: Clock
    crash: Crash | None = None
    crash_after: int = 0
    connected: bool = False
    dead: bool = False
    on_server: list[Callable[[ServerInfo], None]] = field(factory=list)
    on_subscribed: list[Callable[[], None]] = field(factory=list)
    fault: str = "connection_lost"
    rejects: bool = False
    answers_late: Deferred[None] | None = None

    @property
    def available(self) -> bool:
        return self.connected and self.server.up and not self.dead

    def connect(self) -> None:
        self.connected = True
        for told in self.on_server:
            told(read_info(self.server.info))
        self.clock.advance(0)

    def listen(self, channel: str, listener: Callable[[str], None]) -> None:
        self.server.listeners.setdefault(channel, []).append(lambda message: None if self.dead else listener(message))

    async def publish(self, channel: str, message: str) -> None:
        await self.call("PUBLISH", channel, message)

    async def connected_again(self) -> None:
        if not self.server.up or self.dead:
            raise DependencyFailed("redis", "unreachable")
        if not self.connected:
            self.connect()

    async def probe(self) -> None:
        await self.call("SET", "lotusguard:probe", "1", "EX", 60)

    async def load(self, script: Script) -> None:
        return None

    async def run(self, script: Script, keys: Sequence[str], *arguments: str) -> Any:
        late = self.answers_late
        answer = await self._do(lambda: self.server.run(script, keys, arguments))
        if late is not None:
            await late
        self.clock.advance(0)  # what is sent at the end of a turn of the reactor
        return answer

    run_loaded = run

    async def call(self, *words: Any, limited: bool = True) -> Any:
        return await self._do(lambda: self.server.command(*words))

    async def _do(self, work: Callable[[], Any]) -> Any:
        if self.dead:
            await Deferred()  # a process that has ended learns nothing
        if not self.available:
            raise DependencyFailed("redis", "connection_lost" if self.server.up else "unreachable")
        if self.rejects:
            raise DependencyFailed("redis", "out_of_memory")
        crash = self._crash_now()
        if crash is Crash.BEFORE:
            self.connected = False
            raise DependencyFailed("redis", "connection_lost")
        answer = work()
        if crash is Crash.AFTER:
            self.connected = False
            raise DependencyFailed("redis", "connection_lost")
        if crash is Crash.DEATH:
            self.dead = True
            await Deferred()
        return answer

    def _crash_now(self) -> Crash | None:
        if self.crash is None:
            return None
        if self.crash_after:
            self.crash_after -= 1
            return None
        crash, self.crash = self.crash, None
        return crash


@define(eq=False)
class DirectGuard:
    """The seats of one guard, as `lotusguard.guard.seats.sharing` puts them together."""

    server: Server
    seat_ttl: float = 30.0
    clock: Clock = field(init=False, factory=Clock)
    name: str = field(init=False, factory=guard_name)
    client: DirectClient = field(init=False)
    own: OwnHolds = field(init=False)
    rebuilding: Rebuilding = field(init=False)
    shared: RedisSeatBook = field(init=False)
    book: FailoverSeatBook = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.clock.advance(float(next(self.server.names)))  # no two guards' clocks agree
        client: Any = DirectClient(self.server, self.clock)
        self.client, self.own = client, OwnHolds(self.clock)
        self.rebuilding = Rebuilding(client, self.name, self.clock)
        since = self.clock.seconds() - (self.server.now - STARTED)  # it has a state directory
        self.shared = RedisSeatBook(client, self.clock, self.seat_ttl, since, self.rebuilding, self.own)

        def alone() -> MemorySeatBook:
            return MemorySeatBook(None, self.clock, self.wall, METRICS, self.seat_ttl, self.clock.seconds())

        self.book = FailoverSeatBook(client, self.shared, alone, self.own, self.clock, self.wall, self.seat_ttl)
        self.rebuilding.give_back = self.book.give_back
        client.connect()

    def wall(self) -> float:
        return self.server.now

    @property
    def dead(self) -> bool:
        return self.client.dead

    async def upkeep(self) -> None:
        """What the service does every second or so."""
        if self.server.up and not self.client.connected:
            self.client.connect()
        await self.book.renew()
        await self.rebuilding.heartbeat()
