# SPDX-License-Identifier: Apache-2.0
"""Times on the guard's clock as times on the clock of the Redis server, and back."""

from __future__ import annotations

from attrs import define, field


@define
class ServerClock:
    """Learns from each answer how far the server's clock is ahead of the guard's.

    The difference is kept at its lower bound, so a listing never counts as younger than it is.
    """

    _ahead: float | None = field(init=False, default=None)

    @property
    def known(self) -> bool:
        return self._ahead is not None

    def learn(self, server: float, sent: float, received: float) -> None:
        """The server said its time at some moment between two moments on the guard's clock."""
        least, most = server - received, server - sent
        if self._ahead is None or not least <= self._ahead <= most:
            self._ahead = least

    def reset(self) -> None:
        """Another server has another clock."""
        self._ahead = None

    def to_server(self, at: float) -> float:
        """:raises ValueError: no answer has come yet."""
        return at + self._known()

    def to_guard(self, at: float) -> float:
        """:raises ValueError: no answer has come yet."""
        return at - self._known()

    def _known(self) -> float:
        if self._ahead is None:
            raise ValueError("the server has not said its time yet")
        return self._ahead
