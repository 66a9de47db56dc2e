# SPDX-License-Identifier: Apache-2.0
"""The services that do something every few seconds. Floor: guard."""

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
"""Part of the interval by which a round may begin later, so that several guards do not move in step."""


class PeriodicService(Service):
    """Does something every ``interval`` seconds, never twice at once; a failure is said and the next round tried.

    :param name: the service's name, also what a failure is called.
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
        self._now = now
        self._round: Deferred[None] | None = None
        self._loop = LoopingCall(self._begin)
        self._loop.clock = clock

    def startService(self) -> None:
        super().startService()
        self._loop.start(self._interval, now=self._now).addErrback(
            lambda failure: log.failure("{name} stopped", failure, name=self.name)
        )

    def stopService(self) -> None:
        super().stopService()
        if self._loop.running:
            self._loop.stop()
        if self._round is not None:
            self._round.cancel()

    def _begin(self) -> Deferred[None]:
        begun = Deferred.fromCoroutine(self._tried())
        self._round = begun
        return begun

    async def _tried(self) -> None:
        try:
            await deferLater(self._clock, random() * JITTER * self._interval)
            await self._work()
        except CancelledError:
            pass
        except DependencyFailed as failed:
            log.debug("{name}: {reason}", name=self.name, reason=str(failed))
        except Exception:
            log.failure("{name} failed; the next round will try again", name=self.name)
        finally:
            self._round = None
