# SPDX-License-Identifier: Apache-2.0
"""The guards that the users of a soak reach: one, or several that share a Valkey, behind one address."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from attrs import define, field
from twisted.internet.defer import Deferred, gatherResults, maybeDeferred
from twisted.internet.interfaces import IListeningPort
from twisted.internet.threads import deferToThread

from tests.soak.balancer import Balancer
from tests.soak.guard_process import GuardUnderSoak, seconds_waited
from tests.soak.stampede.guards import Valkey


@define(eq=False)
class Guards:
    """To users, operators and LiveKit they look like one guard.

    :ivar each: the guards, to be restarted one by one.
    :ivar valkey: what they share; ``None`` if there is one guard.
    :ivar url: any guard's public listener. :ivar admin_url: any guard's operators' listener.
    """

    each: Sequence[GuardUnderSoak]
    valkey: Valkey | None
    url: str
    admin_url: str
    _reactor: Any
    _listening: Sequence[IListeningPort]
    _waited: dict[int, float] = field(init=False, factory=dict)

    @classmethod
    async def create(
        cls, reactor: Any, count: int, directory: Path, environment: dict[str, str], dice: Random
    ) -> Guards:
        """Guards that are not started yet, behind addresses that last."""
        valkey = None
        if count > 1:
            valkey = Valkey(directory / "valkey")
            valkey.start()
            environment = {**environment, "GUARD_REDIS_URL": f"redis://127.0.0.1:{valkey.port}"}
        each = [GuardUnderSoak(reactor, environment, directory / f"guard{number + 1}") for number in range(count)]
        public = Balancer(reactor, [guard.port for guard in each], dice)
        operators = Balancer(reactor, [guard.admin_port for guard in each], dice)
        listening = [await public.listen(), await operators.listen()]
        return cls(each, valkey, public.url, operators.url, reactor, listening)

    @property
    def several(self) -> bool:
        return len(self.each) > 1

    @property
    def logs(self) -> Sequence[Path]:
        return [guard.log for guard in self.each]

    async def start(self) -> None:
        self._reactor.addSystemEventTrigger("after", "shutdown", self._kill)
        await gatherResults([Deferred.fromCoroutine(guard.start()) for guard in self.each], consumeErrors=True)

    async def end(self, how: signal.Signals) -> Sequence[int]:
        """Send all a signal and wait for their ends. :return: the exit statuses, as of `GuardUnderSoak.end`."""
        statuses = [await guard.end(how) for guard in self.each]
        for listening in self._listening:
            await maybeDeferred(listening.stopListening)
        return statuses

    async def start_valkey(self) -> None:
        """Start the killed Valkey again; that blocks for a moment."""
        assert self.valkey is not None
        await deferToThread(self.valkey.start)

    def waited(self) -> float:
        """How long they waited for processors since the last call, or this process did: the longest, in seconds."""
        waited = {guard.port: guard.waited() for guard in self.each} | {0: seconds_waited("self")}
        before, self._waited = self._waited, waited
        return max(seconds - before.get(port, seconds) for port, seconds in waited.items())

    def measure(self) -> None:
        """Record what each uses."""
        for guard in self.each:
            guard.measure()

    def growth(self) -> tuple[float, int, int, int]:
        """Of the process that lived longest, as `GuardUnderSoak.growth`."""
        return max(guard.growth() for guard in self.each)

    def descriptors(self) -> int:
        """How many are open now in the guard that has most of them."""
        return max(guard.descriptors() for guard in self.each)

    def _kill(self) -> None:
        """Leave nothing behind, however the soak ended. Valkey ends by itself."""
        for guard in self.each:
            guard.kill()
