# SPDX-License-Identifier: Apache-2.0
"""When a dependency is not waited for any more: counting failures in a row. Floor: rules."""

from __future__ import annotations

from attrs import define

FAILURES_TO_OPEN = 5
PROBE_INTERVAL = 2.0
"""Seconds between two probes of a dependency that is not waited for."""


@define
class CircuitBreaker:
    """Closed while a dependency answers; open after five failures in a row, until one call succeeds.

    Without I/O: whoever calls tells how it went, and asks before the next call whether to wait for it.
    """

    failures: int = 0

    @property
    def open(self) -> bool:
        return self.failures >= FAILURES_TO_OPEN

    def succeeded(self) -> bool:
        """:return: whether that closed it."""
        closed, self.failures = self.open, 0
        return closed

    def failed(self) -> bool:
        """:return: whether that opened it."""
        self.failures += 1
        return self.failures == FAILURES_TO_OPEN
