# SPDX-License-Identifier: Apache-2.0
"""``lotusguard check`` asks Valkey or Redis: does it answer, is it new enough, may the guard write there?"""

from __future__ import annotations

import json
from typing import Any

from twisted.internet.defer import TimeoutError
from twisted.internet.task import deferLater

from lotusguard.check.report import Findings
from lotusguard.clients.failures import DependencyFailed
from lotusguard.clients.redis.client import RedisClient, Script
from lotusguard.clients.redis.faults import ADVICE, NOT_CONNECTED
from lotusguard.clients.redis.link import ServerInfo
from lotusguard.clients.waiting import Deadline
from lotusguard.metrics import Metrics
from lotusguard.rules.redis_address import parse_address

SLOW = 0.1
"""Seconds of a round trip above which joins become noticeably slower: each needs two."""
POLL = 0.02
KEY, CHANNEL = "lotusguard:{check}", "lotusguard:check"
WRITE = Script("return redis.call('SET', KEYS[1], '1', 'EX', '10')")
START = "start Valkey, or correct the address in GUARD_REDIS_URL"


class RedisCheck:
    """Connects as a guard does, runs a script, and publishes a message."""

    def __init__(self, url: str, findings: Findings, reactor: Any, patience: float) -> None:
        self._say = findings
        self._reactor = reactor
        self._patience = patience
        self._servers: list[ServerInfo] = []
        self._client = RedisClient(parse_address(url), reactor, Metrics(), timeout=patience)
        self._client.on_server.append(self._servers.append)
        self._heard = False
        self._client.listen(CHANNEL, self._hear)

    async def run(self) -> None:
        """Problems become findings, not exceptions."""
        self._client.start()
        try:
            if await self._connects() and await self._writes():
                await self._reads_memory()
                await self._hears()
        finally:
            self._client.stop()

    def _hear(self, message: str) -> None:
        self._heard = True

    async def _connects(self) -> bool:
        deadline = Deadline.after(self._reactor, self._patience)
        while not self._client.available and self._client.fault == NOT_CONNECTED and not deadline.passed:
            await deferLater(self._reactor, POLL)
        if not self._client.available:
            fault = self._client.fault
            reason = "no answer" if fault == NOT_CONNECTED else fault
            self._say.wrong("reachable", f"no connection: {reason}", ADVICE.get(fault, START))
            return False
        version = ".".join(map(str, self._servers[-1].version))
        self._say.fine("reachable", f"speaks Redis {version}")
        return True

    async def _writes(self) -> bool:
        began = self._reactor.seconds()
        try:
            await self._client.call("PING")
            took = self._reactor.seconds() - began
            await self._client.run(WRITE, [KEY])
            await self._client.publish(CHANNEL, json.dumps(["check"]))
        except DependencyFailed as failed:
            self._say.wrong("scripts", f"are rejected: {failed.reason}", ADVICE.get(failed.reason, "see its log"))
            return False
        self._say.fine("scripts", "run, and may write")
        if took > SLOW:
            self._say.warning(
                "round trip", f"{took * 1000:.0f} ms; a join needs two", "move it closer to the guards"
            )  # fmt: skip
        else:
            self._say.fine("round trip", f"{took * 1000:.1f} ms")
        return True

    async def _reads_memory(self) -> None:
        try:
            info = str(await self._client.call("INFO", "memory"))
        except DependencyFailed:
            return
        values = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
        policy, most = values.get("maxmemory_policy", "noeviction"), values.get("maxmemory", "0")
        if policy != "noeviction" and most != "0":
            self._say.warning(
                "maxmemory-policy", f"is {policy}: seats are deleted when memory is short",
                "set maxmemory-policy noeviction",
            )  # fmt: skip
        else:
            self._say.fine("maxmemory-policy", "deletes no seats")

    async def _hears(self) -> None:
        """The second connection may be there a little later than the first: the message is sent again."""
        deadline = Deadline.after(self._reactor, self._patience)
        while not self._heard and not self._client.message_fault and not deadline.passed:
            try:
                await deadline.wait(deferLater(self._reactor, POLL))
                await self._client.publish(CHANNEL, json.dumps(["check"]))
            except (DependencyFailed, TimeoutError):
                break
        if self._heard:
            self._say.fine("messages", "arrive")
        else:
            fault = self._client.message_fault or "none came in time"
            self._say.wrong("messages", f"do not arrive: {fault}", ADVICE.get(fault, "see its log"))
