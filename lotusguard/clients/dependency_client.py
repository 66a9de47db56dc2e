# SPDX-License-Identifier: Apache-2.0
"""What the clients of all dependencies can tell about them without a call."""

from __future__ import annotations

from attrs import define

from lotusguard.clients.dependency import Dependency


@define(eq=False)
class DependencyClient:
    """The base of a client: what its calls have shown of the dependency."""

    _dependency: Dependency

    @property
    def available(self) -> bool:
        """Whether its circuit is closed."""
        return not self._dependency.breaker.open

    @property
    def refused(self) -> str | None:
        """``status_401`` or ``status_403`` if it refused our credentials and has not accepted them since."""
        return self._dependency.refused

    @property
    def clock_skew(self) -> float | None:
        """Seconds by which its clock is ahead of ours; ``None`` while unknown."""
        return self._dependency.skew
