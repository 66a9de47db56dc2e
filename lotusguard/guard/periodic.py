# SPDX-License-Identifier: Apache-2.0
"""A service that does something every few seconds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from random import random

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall, deferLater
from twisted.logger import Logger

from lotusguard.clients.dependency import DependencyFailed

log = Logger()

JITTER = 0.1
"""Part of the interval by which a round may start later, so that several guards do not run in step. The first round of
a service that starts at once is not delayed."""


class PeriodicService(Service):
    """Does its work every ``interval`` seconds, one round at a time. A failed round is logged; the next one follows.

    :param name: the service's name, used in logs.
    :param now: whether the first round starts at once, and not after an interval.
    """

    def __init__(
        self,
        name: str,
        interval: float,
        work: Callable[[], Awaitable[object]],
        clock: IReactorTime,
        *,
        now: bool = False,
    ) -> None:
        self.name = name
        self._interval = interval
        self._work = work
        self._clock = clock
        self._at_once = now
        self._round: Deferred[None] | None = None
        self._loop = LoopingCall(self._start_round)
        self._loop.clock = clock

    def startService(self) -> None:
        super().startService()
        self._loop.start(self._interval, now=self._at_once).addErrback(
            lambda failure: log.failure("{name} stopped", failure, name=self.name)
        )

    def stopService(self) -> None:
        """Start no more rounds, and cancel the running one."""
        super().stopService()
        if self._loop.running:
            self._loop.stop()
        if self._round is not None:
            self._round.cancel()

    def _start_round(self) -> Deferred[None]:
        self._round = Deferred.fromCoroutine(self._run_round())
        return self._round

    async def _run_round(self) -> None:
        try:
            at_once, self._at_once = self._at_once, False
            if not at_once:
                await deferLater(self._clock, random() * JITTER * self._interval)
            await self._work()
        except CancelledError:
            pass
        except DependencyFailed as failed:
            log.debug("{name}: {reason}", name=self.name, reason=str(failed))
        except Exception:
            log.failure("{name} failed; the next round will try again", name=self.name)
