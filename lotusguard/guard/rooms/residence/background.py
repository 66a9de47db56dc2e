# SPDX-License-Identifier: Apache-2.0
"""Work that nobody waits for, and that ends with the guard."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.waiting import run_in_background

log = Logger()


@define(eq=False)
class BackgroundWork:
    """Every wait in the work must be bounded."""

    _running: set[Deferred[object]] = field(factory=set, init=False)

    def start(self, work: Coroutine[Any, Any, object]) -> None:
        """Start it. Its failure is logged."""
        running = run_in_background(work, _log_failure)
        if not running.called:
            self._running.add(running)
            running.addBoth(lambda _: self._running.discard(running))

    def stop(self) -> None:
        """Cancel all of it."""
        for work in list(self._running):
            work.cancel()


def _log_failure(failure: Failure) -> None:
    if failure.check(DependencyFailed):
        log.debug("{reason}", reason=failure.getErrorMessage())
    else:
        log.failure("work for a room failed", failure)
