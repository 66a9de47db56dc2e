# SPDX-License-Identifier: Apache-2.0
"""The circuit breaker of a dependency: counting failures in a row, and probing until the dependency answers again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from random import random

from attrs import define
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from lotusguard.clients.failures import DependencyFailed

log = Logger()

FAILURES_TO_OPEN = 5
PROBE_INTERVAL = 2.0
"""Seconds between two probes of a dependency whose circuit is open."""
JITTER = 0.25
"""Part of the interval by which a probe may be later, so that several guards do not probe in step."""


@define
class CircuitBreaker:
    """Opens after five failures in a row; closes on one success. No I/O: callers report how each call went."""

    failures: int = 0

    @property
    def open(self) -> bool:
        return self.failures >= FAILURES_TO_OPEN

    def succeeded(self) -> bool:
        """:return: whether this success closed the circuit."""
        closed, self.failures = self.open, 0
        return closed

    def failed(self) -> bool:
        """:return: whether this failure opened the circuit."""
        self.failures += 1
        return self.failures == FAILURES_TO_OPEN


@define(eq=False)
class Prober:
    """Calls a dependency's probe every two seconds for as long as its circuit is open.

    :param breaker: the probe reports its outcome there, as every call does.
    :ivar probe: one call that shows whether the dependency works. None: there is none, or the service has stopped.
    """

    _breaker: CircuitBreaker
    _clock: IReactorTime
    probe: Callable[[], Awaitable[object]] | None = None
    _next: IDelayedCall | None = None
    _running: Deferred[None] | None = None

    def start(self) -> None:
        """Probe soon, and again until the circuit is closed."""
        if self.probe is not None and self._next is None and self._running is None:
            self._next = self._clock.callLater(PROBE_INTERVAL * (1 + JITTER * random()), self._begin)

    def stop(self) -> None:
        """Probe no more."""
        self.probe = None
        if self._next is not None:
            self._next.cancel()
            self._next = None
        if self._running is not None:
            self._running.cancel()

    def _begin(self) -> None:
        self._next = None
        if self.probe is None or not self._breaker.open:  # a call has closed the circuit
            return
        self._running = Deferred.fromCoroutine(self._tried(self.probe))
        self._running.addErrback(_log_unexpected).addBoth(lambda _: self._ended())

    async def _tried(self, probe: Callable[[], Awaitable[object]]) -> None:
        await probe()

    def _ended(self) -> None:
        self._running = None
        if self._breaker.open:
            self.start()


def _log_unexpected(failure: Failure) -> None:
    if not failure.check(CancelledError, DependencyFailed):
        log.failure("a probe failed in an unexpected way", failure)
