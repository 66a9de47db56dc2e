# SPDX-License-Identifier: Apache-2.0
"""Work that nobody waits for, and that ends with the guard."""

from __future__ import annotations

from collections.abc import Coroutine, Hashable
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
    """Every wait in the work must be bounded, though it may try again for as long as the guard runs."""

    _running: set[Deferred[object]] = field(factory=set, init=False)
    _by_key: dict[Hashable, Deferred[object]] = field(factory=dict, init=False)

    def start(self, work: Coroutine[Any, Any, object]) -> None:
        """Start it. Its failure is logged."""
        running = run_in_background(work, _log_failure)
        if not running.called:
            self._running.add(running)
            running.addBoth(lambda _: self._running.discard(running))

    def start_anew(self, key: Hashable, work: Coroutine[Any, Any, object]) -> None:
        """Start it, and cancel what was started under this key before and has not ended."""
        self.cancel(key)
        running = self._by_key[key] = run_in_background(work, _log_failure)
        running.addBoth(lambda _: self._ended(key, running))

    def cancel(self, key: Hashable) -> None:
        """Cancel what was started under this key, if it has not ended."""
        running = self._by_key.pop(key, None)
        if running is not None:
            running.cancel()

    def _ended(self, key: Hashable, work: Deferred[object]) -> None:
        if self._by_key.get(key) is work:
            del self._by_key[key]

    def stop(self) -> None:
        """Cancel all of it."""
        for work in (*self._running, *self._by_key.values()):
            work.cancel()


def _log_failure(failure: Failure) -> None:
    if failure.check(DependencyFailed):
        log.debug("{reason}", reason=failure.getErrorMessage())
    else:
        log.failure("work for a room failed", failure)
